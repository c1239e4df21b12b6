"""The compiled CPU norm behind the interface that all norm backends have. Shape letters: D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops import native, norm_torch


def norm_forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``r = residual + hidden``; returns ``r * rstd * weight`` in `out_dtype`, ``r`` [..., D] and ``rstd`` [...]."""
    if native.supports_norm(out_dtype) is not None:
        return norm_torch.norm_forward(hidden, residual, weight, eps=eps, out_dtype=out_dtype)
    return native.add_rms_norm_forward(hidden, residual, weight, eps, out_dtype)


def norm_backward(
    grad_normed: Tensor | None, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum [..., D], in its dtype, and of the weight [D]."""
    if grad_normed is None or native.supports_norm(grad_normed.dtype) is not None:
        return norm_torch.norm_backward(grad_normed, grad_total, total, rstd, weight)
    return native.add_rms_norm_backward(grad_normed, grad_total, total, weight, rstd)
