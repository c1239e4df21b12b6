"""Residual addition and RMSNorm in PyTorch. Shape letters: D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.selective_scan.common import state_dtype


def norm_forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``r = residual + hidden``; returns ``r * rstd * weight`` in `out_dtype`, ``r`` [..., D] and ``rstd`` [...]."""
    dtype = state_dtype(hidden.dtype)
    if residual is None:
        total = hidden.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        total = torch.add(residual.to(dtype), hidden.to(dtype)).contiguous()
    rstd = torch.rsqrt(total.square().mean(-1) + eps)
    return (total * rstd[..., None] * weight.to(dtype)).to(out_dtype), total, rstd


def norm_backward(
    grad_normed: Tensor | None, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum [..., D], in its dtype, and of the weight [D]."""
    dtype, width = total.dtype, total.shape[-1]
    if grad_normed is None:
        d_total = torch.zeros_like(total) if grad_total is None else grad_total.to(dtype, copy=True)
        return d_total.contiguous(), torch.zeros_like(weight)
    g = grad_normed.to(dtype)
    unit = total * rstd[..., None]
    d_weight = (g * unit).reshape(-1, width).sum(0).to(weight.dtype)
    g = g * weight.to(dtype)
    d_total = rstd[..., None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    return (d_total if grad_total is None else d_total + grad_total.to(dtype)).contiguous(), d_weight
