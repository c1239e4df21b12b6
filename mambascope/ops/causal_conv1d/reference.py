"""Causal depthwise convolution over tokens, as the equation reads.

Shape letters: B batch, L tokens, E width, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.causal_conv1d.common import ConvSide
from mambascope.ops.selective_scan.common import state_dtype


def causal_conv1d_reference(x_BLE: Tensor, side: ConvSide, *, silu: bool) -> Tensor:
    """``y_t = act(bias + sum_k weight_k x_{t-K+1+k})`` with zeros before the first token; reversed: looks ahead."""
    dtype = state_dtype(x_BLE.dtype)
    x, weight = x_BLE.to(dtype), side.weight.to(dtype)
    length, taps = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, 0, taps - 1) if side.reverse else (0, 0, taps - 1, 0))
    # the walk from the end meets the same taps in the opposite order
    order = range(taps - 1, -1, -1) if side.reverse else range(taps)
    y = torch.stack([weight[:, k] * x[:, i : i + length] for i, k in enumerate(order)]).sum(0)
    if side.bias is not None:
        y = y + side.bias.to(dtype)
    return (F.silu(y) if silu else y).to(x_BLE.dtype)


def conv_forward(x: Tensor, sides: Sequence[ConvSide], *, silu: bool) -> list[Tensor]:
    """One output [B, L, E] per side."""
    return [causal_conv1d_reference(x, side, silu=silu).contiguous() for side in sides]


def conv_backward(
    grads: Sequence[Tensor], x: Tensor, sides: Sequence[ConvSide], *, silu: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Gradients of `x` and of every side's weight and bias."""
    primals = [x] + [t for side in sides for t in (side.weight, side.bias) if t is not None]

    def run(x: Tensor, *tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        parts = [ConvSide(next(rest), None if s.bias is None else next(rest), s.reverse) for s in sides]
        return [causal_conv1d_reference(x, part, silu=silu) for part in parts]

    pullback = torch.func.vjp(run, *primals)[1]
    rest = iter([g.contiguous() for g in pullback(list(grads))])
    dx = next(rest)
    return dx, [(next(rest), None if side.bias is None else next(rest)) for side in sides]
