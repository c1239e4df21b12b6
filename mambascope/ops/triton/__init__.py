"""Triton kernels for CUDA devices: selective scan, depthwise convolution, RMSNorm; forward and backward.

Importing this package needs neither Triton nor a GPU: kernels are imported when they are first launched, and
:func:`why_unavailable` says what is missing. With ``TRITON_INTERPRET=1`` set before the process starts, Triton's
interpreter runs them on CPU tensors, slowly, which is how they are tested without a GPU.

float32, bfloat16 and float16 inputs; state, softplus, sums and parameters' gradients are float32.
"""

import torch

from mambascope.ops.triton.conv import conv_backward, conv_forward, supports_conv
from mambascope.ops.triton.launch import interpreted, why_unavailable
from mambascope.ops.triton.norm import norm_backward, norm_forward, supports_norm
from mambascope.ops.triton.scan import scan_backward, scan_forward, supports

__all__ = [
    "conv_backward",
    "conv_forward",
    "interpreted",
    "norm_backward",
    "norm_forward",
    "scan_backward",
    "scan_forward",
    "supports",
    "supports_conv",
    "supports_norm",
    "why_not",
    "why_unavailable",
]


def why_not(op: str, device: str, dtype: torch.dtype, size: int = 0) -> str | None:
    """Why an op cannot be served, in words; ``None`` if it can.

    Args:
        op: ``"scan"``, ``"conv"`` or ``"norm"``.
        device: Device type, e.g. ``"cuda"``.
        dtype: Dtype of the tokens.
        size: States N of a scan, taps K of a convolution.
    """
    if op == "scan":
        return supports(dtype, N=size or None, device=device)
    if op == "conv":
        return supports_conv(dtype, size or None, device=device)
    return supports_norm(dtype, device=device) if op == "norm" else f"has no {op}"
