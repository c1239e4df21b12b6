"""Depthwise convolutions of the Triton kernels on torch tensors; nothing here knows of autograd.

Shape letters: B batch, L tokens, E channels, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambascope.ops.causal_conv1d.common import ConvSide
from mambascope.ops.triton.launch import on_device_of, same_strides, why_not_dtype, why_unavailable

MAX_TAPS = 8
_CHANNELS, _WARPS, _TOKENS = 128, 2, 4
_SPAN = 64  # tokens per program: a shorter span would read more of its neighbours' tokens again


def supports_conv(dtype: torch.dtype, taps: int | None = None, device: str = "cuda") -> str | None:
    """Why the convolution kernels refuse a problem, in words; ``None`` if they take it (1 to 8 taps)."""
    reason = why_unavailable(device) or why_not_dtype(dtype)
    if reason is None and taps is not None and not 1 <= taps <= MAX_TAPS:
        return f"takes 1 to {MAX_TAPS} taps, got {taps}"
    return reason


def _pair(sides: Sequence[ConvSide], x: Tensor) -> tuple[list[Tensor], dict[str, int | bool]]:
    """Weight and bias of the causal and the anti-causal side (x stands for an absent one), and what there is."""
    causal = next((s for s in sides if not s.reverse), None)
    anti = next((s for s in sides if s.reverse), None)
    if len(sides) != (causal is not None) + (anti is not None):
        raise ValueError("sides must be a causal and an anti-causal one, or one of them")
    taps = sides[0].weight.shape[1]
    reason = supports_conv(x.dtype, taps, x.device.type)
    if reason is not None:
        raise ValueError(f"the triton convolution {reason}")
    has_bias = sides[0].bias is not None
    if any(s.weight.shape[1] != taps or (s.bias is not None) != has_bias for s in sides):
        raise ValueError("both sides must have the same taps, and a bias or none")
    operands = []
    for side in (causal, anti):
        operands.append(x if side is None else side.weight.contiguous())
        operands.append(x if side is None or side.bias is None else side.bias.contiguous())
    return operands, {"K": taps, "CAUSAL": causal is not None, "ANTI": anti is not None, "HAS_BIAS": has_bias}


def _grid(x: Tensor) -> tuple[int, int, int]:
    batch, length, width = x.shape
    return -(-width // _CHANNELS), -(-length // _SPAN), batch


_TILE = {"BE": _CHANNELS, "SPAN": _SPAN, "T": _TOKENS, "num_warps": _WARPS}


def conv_forward(x: Tensor, sides: Sequence[ConvSide], *, silu: bool) -> list[Tensor]:
    """One output [B, L, E] per side, from one read of x.

    Args:
        x: [B, L, E], last dimension contiguous.
        sides: A causal and an anti-causal side, in any order, or one of them.
        silu: Whether SiLU follows.

    Raises:
        ValueError: A dtype, number of taps or combination of sides that the kernel does not take.
    """
    (x,) = same_strides(x)
    operands, flags = _pair(sides, x)
    from mambascope.ops.triton.conv_kernels import conv_forward_kernel

    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in sides]
    by_direction = {side.reverse: y for side, y in zip(sides, outputs, strict=True)}
    with on_device_of(x):
        conv_forward_kernel[_grid(x)](
            x, *operands, by_direction.get(False, x), by_direction.get(True, x), *x.shape[1:], *x.stride()[:2],
            **flags, SILU=silu, **_TILE,
        )  # fmt: skip
    return outputs


def conv_backward(
    grads: Sequence[Tensor], x: Tensor, sides: Sequence[ConvSide], *, silu: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Gradients of `x` and of every side's weight and bias; what enters the activation is computed again, not kept.

    Args:
        grads: Gradient of every output [B, L, E].
        x: [B, L, E]; likewise `sides` and `silu` as in :func:`conv_forward`.
    """
    (x,) = same_strides(x)
    operands, flags = _pair(sides, x)
    from mambascope.ops.triton.conv_kernels import conv_backward_kernel

    taps, grid = sides[0].weight.shape[1], _grid(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(x.shape[0], grid[1], 2, taps + 1, x.shape[2], dtype=torch.float32, device=x.device)
    by_direction = {side.reverse: same_strides(g)[0] for side, g in zip(sides, grads, strict=True)}
    g_f, g_b = by_direction.get(False, x), by_direction.get(True, x)
    with on_device_of(x):
        conv_backward_kernel[grid](
            x, *operands, g_f, g_b, dx, partial, *x.shape[1:], *x.stride()[:2], *g_f.stride()[:2], *g_b.stride()[:2],
            **flags, SILU=silu, **_TILE,
        )  # fmt: skip
    sums = partial.sum((0, 1))
    params: list[tuple[Tensor, Tensor | None]] = []
    for side in sides:
        side_sums = sums[int(side.reverse)]
        weight = side_sums[:taps].T.to(side.weight.dtype, copy=True, memory_format=torch.contiguous_format)
        params.append((weight, None if side.bias is None else side_sums[taps].to(side.bias.dtype, copy=True)))
    return dx, params
