"""Residual addition and RMSNorm of the Triton kernels on torch tensors. Shape letters: D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.triton.launch import multiprocessors, on_device_of, power_of_two, why_not_dtype, why_unavailable

MAX_WIDTH = 16384


def supports_norm(dtype: torch.dtype, width: int | None = None, device: str = "cuda") -> str | None:
    """Why the RMSNorm kernels refuse a problem, in words; ``None`` if they take it (rows of up to 16384 numbers)."""
    reason = why_unavailable(device) or why_not_dtype(dtype)
    if reason is None and width is not None and not 1 <= width <= MAX_WIDTH:
        return f"takes rows of 1 to {MAX_WIDTH} numbers, got {width}"
    return reason


def _rows(t: Tensor) -> Tensor:
    """[rows, D] with contiguous rows; a view where the strides allow it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _shape(hidden: Tensor) -> dict[str, int]:
    width = hidden.shape[-1]
    reason = supports_norm(hidden.dtype, width, hidden.device.type)
    if reason is not None:
        raise ValueError(f"the triton RMSNorm {reason}")
    block = power_of_two(width)
    return {"BD": block, "num_warps": min(8, max(1, block // 256))}


def norm_forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``r = residual + hidden`` in float32; returns ``r * rstd * weight`` in `out_dtype`, ``r`` and ``rstd``.

    Args:
        hidden: [..., D].
        residual: [..., D] or ``None``.
        weight: [D].
        eps: Added to the mean square.
        out_dtype: Dtype of the first result.

    Raises:
        ValueError: A dtype or width that the kernel does not take.
    """
    tile = _shape(hidden)
    from mambascope.ops.triton.norm_kernels import norm_forward_kernel

    h, width = _rows(hidden), hidden.shape[-1]
    r = h if residual is None else _rows(residual)
    normed = torch.empty(hidden.shape, dtype=out_dtype, device=hidden.device)
    total = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    rstd = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
    if rstd.numel():
        with on_device_of(hidden):
            norm_forward_kernel[(h.shape[0],)](
                h, r, weight.contiguous(), normed, total, rstd, width, h.stride(0), r.stride(0), eps,
                HAS_RESIDUAL=residual is not None, **tile,
            )  # fmt: skip
    return normed, total, rstd


def norm_backward(
    grad_normed: Tensor | None, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum [..., D], in float32, and of the weight [D]; an absent gradient is zero."""
    if grad_normed is None or not rstd.numel():
        d_total = torch.zeros_like(total) if grad_total is None else grad_total.to(total.dtype, copy=True)
        return d_total.contiguous(), torch.zeros_like(weight)
    tile = _shape(total)
    from mambascope.ops.triton.norm_kernels import norm_backward_kernel

    g, width = _rows(grad_normed), total.shape[-1]
    extra = g if grad_total is None else _rows(grad_total)
    rows = g.shape[0]
    per_program = -(-rows // min(rows, 8 * multiprocessors(total.device)))
    programs = -(-rows // per_program)
    d_total = torch.empty_like(total)
    d_weight = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    with on_device_of(total):
        norm_backward_kernel[(programs,)](
            g, extra, total, rstd, weight.contiguous(), d_total, d_weight, rows, per_program, width,
            g.stride(0), extra.stride(0), HAS_TOTAL=grad_total is not None, **tile,
        )  # fmt: skip
    return d_total, d_weight.sum(0).to(weight.dtype)
