"""The formulas of the compiled kernels in float64 PyTorch, token by token for autograd; used by the tests only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(x, dt, A, B, C, D=None, z=None, dt_weight=None, dt_bias=None, dt_softplus=True, reverse=False) -> Tensor:
    """Selective scan, h = exp(dt A) h + dt x B, y = h . C + D x."""
    if dt_weight is not None:
        dt = dt @ dt_weight.T
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    length, h, rows = x.shape[1], x.new_zeros(x.shape[0], *A.shape), {}
    for step in range(length):
        at = length - 1 - step if reverse else step
        decay = torch.exp(dt[:, at, :, None] * A)
        h = decay * h + (dt[:, at] * x[:, at])[:, :, None] * B[:, at, None, :]
        rows[at] = (h * C[:, at, None, :]).sum(-1)
    y = torch.stack([rows[i] for i in range(length)], 1)
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z)


def bidirectional(forward: dict[str, Tensor], backward: dict[str, Tensor], z, scale) -> tuple[Tensor, Tensor]:
    """Output and y_f + y_b of a mixer; each direction holds x, proj, dt_weight, dt_bias, A, D."""
    total: Tensor | None = None
    for side, reverse in ((forward, False), (backward, True)):
        rank, states = side["dt_weight"].shape[1], side["A"].shape[1]
        dt, B, C = side["proj"].split([rank, states, states], -1)
        y = scan(side["x"], dt, side["A"], B, C, side["D"], None, side["dt_weight"], side["dt_bias"], True, reverse)
        total = y if total is None else total + y
    assert total is not None
    return scale * total * (1 if z is None else F.silu(z)), total


def conv(x, weight, bias, activation, reverse) -> Tensor:
    """Causal (or anti-causal) depthwise convolution of [B, L, E]."""
    taps, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    kernel = weight.reshape(-1, taps)
    order = range(taps - 1, -1, -1) if reverse else range(taps)
    y = sum(padded[:, i : i + length] * kernel[:, j] for i, j in enumerate(order))
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y


def norm(hidden, residual, weight, eps) -> tuple[Tensor, Tensor]:
    """RMSNorm of residual + hidden, and that sum."""
    total = hidden if residual is None else hidden + residual
    return total * torch.rsqrt((total * total).mean(-1, keepdim=True) + eps) * weight, total
