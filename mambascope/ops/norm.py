"""Residual addition and RMSNorm in one call. Shape letters: D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops._checks import check_tensor
from mambascope.ops.backends import check_backend
from mambascope.ops.selective_scan.reference import state_dtype


def add_rms_norm_reference(
    hidden: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``r = residual + hidden``; returns ``r / sqrt(mean(r^2) + eps) * weight`` in `out_dtype`, and `r`."""
    dtype = state_dtype(hidden.dtype)
    total = hidden.to(dtype) if residual is None else residual.to(dtype) + hidden.to(dtype)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * scale * weight_D.to(dtype)).to(out_dtype), total


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds `hidden` to the residual stream and normalises the sum (RMSNorm, arXiv 1910.07467).

    Args:
        hidden: Branch output [..., D].
        residual: Residual stream [..., D], or ``None`` before the first block.
        weight: Gain [D].
        eps: Added to the mean square.
        backend: Name of a backend, ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice.

    Returns:
        ``(normed, residual_new)``, both [..., D]. ``residual_new = residual + hidden`` is fp32 (fp64 for fp64 `hidden`)
        so that a deep stream does not lose small updates; ``normed`` has the dtype of autocast where that is on,
        otherwise the dtype of `weight` (fp64 for fp64 `hidden`).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
    """
    check_backend(backend)
    if not isinstance(hidden, Tensor) or hidden.dim() < 1 or not hidden.is_floating_point():
        raise ValueError("hidden must be a floating point tensor [..., D]")
    check_tensor("weight", weight, "[D]", (hidden.shape[-1],), hidden)
    if residual is not None:
        check_tensor("residual", residual, "[..., D] as hidden", tuple(hidden.shape), hidden)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    device = hidden.device.type
    if hidden.dtype == torch.float64:
        out_dtype = torch.float64
    elif torch.is_autocast_enabled(device):
        out_dtype = torch.get_autocast_dtype(device)
    else:
        out_dtype = weight.dtype
    with torch.autocast(device, enabled=False):
        return add_rms_norm_reference(hidden, residual, weight, eps, out_dtype)
