"""Residual addition and RMSNorm in one call. Shape letters: D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambascope.ops._checks import check_tensor
from mambascope.ops._library import call, define, dense, differentiable, needs_grad
from mambascope.ops.backends import check_backend, implementation, resolve
from mambascope.ops.selective_scan.common import state_dtype

_ARGS = "Tensor hidden, Tensor? residual, Tensor weight, float eps, ScalarType out_dtype, str backend"


def _norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = implementation("norm", backend, hidden)
    residual = None if residual is None else dense(residual)
    return module.norm_forward(dense(hidden), residual, weight, eps=eps, out_dtype=out_dtype)


def _norm_fake(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape, dtype=out_dtype),
        hidden.new_empty(hidden.shape, dtype=dtype),
        hidden.new_empty(hidden.shape[:-1], dtype=dtype),
    )


def _norm_backward(
    total: Tensor, rstd: Tensor, weight: Tensor, grad_normed: Tensor | None, grad_total: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    grads = (None if g is None else g.contiguous() for g in (grad_normed, grad_total))
    return implementation("norm", backend, total).norm_backward(*grads, total, rstd, weight)


NORM = define(f"add_rms_norm({_ARGS}) -> (Tensor, Tensor, Tensor)", _norm, _norm_fake)
NORM_BACKWARD = define(
    "add_rms_norm_backward(Tensor total, Tensor rstd, Tensor weight, Tensor? grad_normed, Tensor? grad_total, "
    "str backend) -> (Tensor, Tensor)",
    _norm_backward,
    lambda total, rstd, weight, *_: (total.new_empty(total.shape), weight.new_empty(weight.shape)),
)


def _norm_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, residual, weight, _, _, ctx.backend = inputs
    ctx.dtypes = hidden.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], output[2], weight)


def _norm_autograd(ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None, _: Any) -> tuple:
    if grad_normed is None and grad_total is None:
        return (None,) * 6
    d_total, d_weight = NORM_BACKWARD(*ctx.saved_tensors, grad_normed, grad_total, ctx.backend)
    hidden, residual = ctx.dtypes
    return d_total.to(hidden), None if residual is None else d_total.to(residual), d_weight, None, None, None


differentiable("add_rms_norm", _norm_context, _norm_autograd)


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
        ValueError: A shape, dtype or device that does not fit, or an unknown backend.
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
    chosen = resolve("norm", backend, device, hidden.dtype, 0)
    grad = needs_grad(hidden, residual, weight)
    normed, total, _ = call(NORM, grad, hidden, residual, weight, float(eps), out_dtype, chosen)
    return normed, total
