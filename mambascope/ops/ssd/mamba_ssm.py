"""mamba_ssm's Triton kernels behind our signature."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

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


def scan_mamba_ssm(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] without the skip term, and the last state; ``dt`` is past its softplus."""
    scan, reason = _load()
    assert scan is not None, reason
    dtype = x_BLHP.dtype
    return scan(
        x_BLHP.contiguous(),
        dt_BLH.contiguous(),
        A_H,
        B_BLGN.to(dtype).contiguous(),
        C_BLGN.to(dtype).contiguous(),
        _CHUNK,
        initial_states=state_BHPN.contiguous(),
        return_final_states=True,
    )
