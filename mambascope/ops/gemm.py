"""Matrix products with the faster of the two libraries that torch brings.

For float32, ``torch.nn.functional.linear`` calls MKL, which runs its AVX2 code on CPUs that are not Intel's. oneDNN,
which is in the same wheel, uses AVX-512 there: 2.2 times as fast on Zen 5, with the same rounding error.
``MAMBASCOPE_GEMM`` (``auto``, ``torch``, ``onednn``) overrides the choice.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mambascope.ops._library import needs_grad, transformed

ENV = "MAMBASCOPE_GEMM"
CHOICES = ("auto", "torch", "onednn")
_MIN_ROWS = 16  # below, the call costs more than the product


def _vendor() -> str:
    """CPU vendor as the kernel names it; empty where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")


@functools.cache
def why_not_onednn() -> str | None:
    """Why float32 products stay with torch's own library; ``None`` if oneDNN is used.

    Raises:
        ValueError: If ``MAMBASCOPE_GEMM`` has an unknown value.
    """
    choice = os.environ.get(ENV, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{ENV} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        return f"{ENV}=torch"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch has no oneDNN"
    if choice == "onednn":
        return None
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "only AVX-512 CPUs gain from it"
    if _vendor() != "AuthenticAMD":
        return "MKL uses AVX-512 itself on this CPU"
    return None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """``x @ weight.T + bias``; the two products of the backward pass are the same call on transposed views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        product = linear if torch.is_grad_enabled() else _onednn  # for second derivatives, of which this has all
        rows = grad.flatten(0, -2)
        dx = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        dw = product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        db = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out], in the dtype ``torch.nn.functional.linear`` gives.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.ndim < 2
        or torch.compiler.is_compiling()  # before sizes are compared: an exported program would keep that as a guard
        or x.numel() < _MIN_ROWS * x.shape[-1]
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or transformed()
        or why_not_onednn() is not None
    ):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape: Any, weight_shape: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
        rows = 1
        for side in x_shape[:-1]:
            rows *= side
        return 2 * rows * weight_shape[0] * weight_shape[1]
