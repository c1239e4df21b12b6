"""The compiled CPU convolution behind the interface that all convolution backends have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mambascope.ops import native
from mambascope.ops.causal_conv1d.common import ConvSide


def _arguments(sides: Sequence[ConvSide], silu: bool) -> tuple:
    activation = "silu" if silu else None
    if len(sides) == 1:
        (s,) = sides
        return s.weight, s.bias, None, None, activation, s.reverse
    forward, backward = sides
    return forward.weight, forward.bias, backward.weight, backward.bias, activation


def conv_forward(x: Tensor, sides: Sequence[ConvSide], *, silu: bool) -> list[Tensor]:
    """One output [B, L, E] per side."""
    return [y for y in native.conv_forward(x, *_arguments(sides, silu)) if y is not None]


def conv_backward(
    grads: Sequence[Tensor], x: Tensor, sides: Sequence[ConvSide], *, silu: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Gradients of `x` and of every side's weight and bias."""
    grad_f, grad_b = grads if len(grads) == 2 else (grads[0], None)
    dx, dw_f, db_f, dw_b, db_b = native.conv_backward(grad_f, grad_b, x, *_arguments(sides, silu))
    return dx, [(dw_f, db_f)] if dw_b is None else [(dw_f, db_f), (dw_b, db_b)]
