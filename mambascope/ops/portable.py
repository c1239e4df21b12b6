"""Our operators written with PyTorch's own, so that an exported program runs where this package is not installed.

The scan is ``torch``'s higher-order ``scan``, which the ONNX exporter turns into one ``Scan`` node that walks both
directions at once. Measured on the coarse stage of the demo model (16 tokens, 6 blocks, onnxruntime, one thread),
against an unrolled loop and against doubling (Hillis-Steele): 2.7, 4.0 and 3.0 MB; 2.6, 4.5 and 4.8 ms for one image;
125, 207 and 529 ms for 64 images. The unrolled loop also grows with the number of tokens.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from mambascope.ops import norm_torch
from mambascope.ops.selective_scan.common import state_dtype, step_sizes


def bidirectional_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mambascope::bidirectional_scan`` without what only a backward pass needs; same arguments and results."""
    *tensors, z, scale, _, _, return_score = args
    forward, backward = tensors[:6], tensors[6:]
    dtype = state_dtype(forward[0].dtype)
    walks, skip = [], None
    for (x, proj, dt_weight, dt_bias, A, D), reverse in ((forward, False), (backward, True)):
        x, n = x.to(dtype), A.shape[1]
        low, b, c = proj.to(dtype).split([dt_weight.shape[1], n, n], dim=-1)
        dt = step_sizes(low, dt_weight, dt_bias, True, dtype)
        skip = D * x if skip is None else skip + D * x
        walks.append([t.transpose(0, 1).flip(0) if reverse else t.transpose(0, 1) for t in (dt, dt * x, b, c)])
    # time first, then direction: [L, 2, B, E] and [L, 2, B, N]
    dt, du, b, c = (torch.stack(pair, dim=1) for pair in zip(*walks, strict=True))
    A = torch.stack([forward[4], backward[4]]).to(dtype).unsqueeze(1)

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, du_t, b_t, c_t = inputs
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + du_t.unsqueeze(-1) * b_t.unsqueeze(-2)
        return h.clone(), (h @ c_t.unsqueeze(-1)).squeeze(-1)  # results of a scan must not share memory

    start = torch.zeros_like(du[0]).unsqueeze(-1) * A
    y = scan(step, start, (dt, du, b, c))[1]
    total = (y[:, 0] + y[:, 1].flip(0)).transpose(0, 1) + skip
    out = total * scale
    if z is not None:
        out = out * F.silu(z.to(dtype))
    nothing = total.new_zeros(0)
    return out.to(forward[0].dtype), total.amax(-1) if return_score else nothing, nothing, nothing


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mambascope::selective_scan`` (the ablation's token scores use it); same arguments and results."""
    dtype = state_dtype(x.dtype)
    wide, A = x.to(dtype), A.to(dtype)
    steps = step_sizes(dt, dt_weight, dt_bias, dt_softplus, dtype)
    # a scan would guard on the strides of slices, which may depend on the batch
    inputs = tuple(t.transpose(0, 1).contiguous() for t in (steps, steps * wide, B.to(dtype), C.to(dtype)))

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, du_t, b_t, c_t = inputs
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + du_t.unsqueeze(-1) * b_t.unsqueeze(-2)
        return h.clone(), (h @ c_t.unsqueeze(-1)).squeeze(-1)

    start = torch.zeros_like(inputs[1][0]).unsqueeze(-1) * A
    walked = tuple(t.flip(0) for t in inputs) if reverse else inputs
    y = scan(step, start, walked)[1]
    y = (y.flip(0) if reverse else y).transpose(0, 1)
    if D is not None:
        y = y + D.to(dtype) * wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    nothing = y.new_zeros(0)
    return y.to(x.dtype), nothing, nothing


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    taps = weight.shape[1]
    padded = F.pad(x.transpose(1, 2), (0, taps - 1) if reverse else (taps - 1, 0))
    kernel = (weight.flip(1) if reverse else weight).unsqueeze(1)
    y = F.conv1d(padded, kernel, bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y) if silu else y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, backend: str) -> Tensor:
    """``mambascope::causal_conv1d``; same arguments and result."""
    return _conv(x, weight, bias, silu, reverse)


def bidirectional_conv(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``mambascope::bidirectional_conv``; same arguments and results."""
    return _conv(x, weight_f, bias_f, silu, False), _conv(x, weight_b, bias_b, silu, True)


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``mambascope::add_rms_norm``; same arguments and results."""
    return norm_torch.norm_forward(hidden, residual, weight, eps=eps, out_dtype=out_dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` takes: each of our operators and what stands for it."""
    ops = torch.ops.mambascope
    return {
        ops.bidirectional_scan.default: bidirectional_scan,
        ops.selective_scan.default: selective_scan,
        ops.causal_conv1d.default: causal_conv1d,
        ops.bidirectional_conv.default: bidirectional_conv,
        ops.add_rms_norm.default: add_rms_norm,
    }
