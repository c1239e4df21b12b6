"""mamba_ssm's Triton kernels behind our signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mambascope.ops._library import needs_grad, refusing

_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_CHUNK = 256


@cache
def _load() -> tuple[Any, str]:
    """The kernels' entry point, or ``None`` and why there is none."""
    try:
        return import_module(_MODULE).mamba_chunk_scan_combined, ""
    except Exception as error:  # a build for another torch or Triton fails in many ways while it is imported
        return None, f"{_MODULE} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot take such tensors; empty if they can."""
    if device.type != "cuda":
        return f"mamba_ssm's kernels run on CUDA only, not on {device.type}"
    if dtype == torch.float64:
        return "mamba_ssm's kernels do not take float64"
    return _load()[1]


class _FirstOrder(torch.autograd.Function):
    """Their function, whose own backward pass would take part in second derivatives as if it were constant."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            outputs = function(*leaves)
        ctx.save_for_backward(*tensors)
        ctx.inner = leaves, outputs
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves, outputs = ctx.inner
        # their graph goes with this node
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        if torch.is_grad_enabled():
            gradients = refusing("ssd_scan", gradients, (*ctx.saved_tensors, *grads))
        return (None, *gradients)


def scan_mamba_ssm(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    state_BHPN: Tensor,
    *,
    function: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] without the skip term, and the last state; ``dt`` is past its softplus.

    `function` is called instead of ``mamba_ssm``'s ``mamba_chunk_scan_combined``.
    """
    scan, reason = (function, "") if function is not None else _load()
    assert scan is not None, reason

    def run(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return scan(x, dt, A, b, c, _CHUNK, initial_states=state, return_final_states=True)

    dtype = x_BLHP.dtype
    b_BLGN, c_BLGN = B_BLGN.to(dtype).contiguous(), C_BLGN.to(dtype).contiguous()
    tensors = (x_BLHP.contiguous(), dt_BLH.contiguous(), A_H, b_BLGN, c_BLGN, state_BHPN.contiguous())
    return _FirstOrder.apply(run, *tensors) if needs_grad(*tensors) else run(*tensors)
