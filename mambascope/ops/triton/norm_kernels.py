# Triton compiles these functions: its types are not Python's.
# mypy: ignore-errors
"""Triton kernels of residual addition and RMSNorm. A program holds whole rows; D model width, BD its power of two."""

from __future__ import annotations

import triton
import triton.language as tl

from mambascope.ops.triton.device import loop


@triton.jit
def norm_forward_kernel(
    hidden, residual, weight, normed, total, rstd, D, h_row, r_row, eps,
    HAS_RESIDUAL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    ok = d < D
    r = tl.load(hidden + row * h_row + d, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r += tl.load(residual + row * r_row + d, mask=ok, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, axis=0) / D + eps)
    gain = tl.load(weight + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(total + row * D + d, r, mask=ok)
    tl.store(rstd + row, scale)
    tl.store(normed + row * D + d, (r * scale * gain).to(normed.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "per_program"])
def norm_backward_kernel(
    grad, grad_total, total, rstd, weight, d_total, d_weight, rows, per_program, D, g_row, t_row,
    HAS_TOTAL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (programs,); d_weight [programs, D] float32."""
    d = tl.arange(0, BD)
    ok = d < D
    gain = tl.load(weight + d, mask=ok, other=0.0).to(tl.float32)
    sums = tl.zeros([BD], tl.float32)
    first = tl.program_id(0) * per_program
    for i in loop(tl.maximum(tl.minimum(per_program, rows - first), 0)):
        row = tl.cast(first + i, tl.int64)
        scale = tl.load(rstd + row)
        unit = tl.load(total + row * D + d, mask=ok, other=0.0) * scale
        g = tl.load(grad + row * g_row + d, mask=ok, other=0.0).to(tl.float32)
        sums += g * unit
        g = g * gain
        out = scale * (g - unit * (tl.sum(g * unit, axis=0) / D))
        if HAS_TOTAL:
            out += tl.load(grad_total + row * t_row + d, mask=ok, other=0.0).to(tl.float32)
        tl.store(d_total + row * D + d, out, mask=ok)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * D + d, sums, mask=ok)
