"""What launching these kernels from PyTorch needs: is Triton there, on what does it run, how is memory aligned."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPROCESSORS = 132  # of an H200: what the interpreter pretends to have


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for: the kernels then run on CPU tensors, slowly, without a GPU.

    Triton reads ``TRITON_INTERPRET`` when it is imported, so set it before the process starts.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.lru_cache(maxsize=1)
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken or foreign build may raise anything
        return f"importing triton failed: {type(error).__name__}: {error}"
    return None


def why_unavailable(device: str = "cuda") -> str | None:
    """Why these kernels cannot run on tensors of a device type, in words; ``None`` if they can.

    Args:
        device: ``"cuda"`` or ``"cpu"``; the latter only with Triton's interpreter.
    """
    if device not in ("cuda", "cpu"):
        return f"runs on CUDA devices, not on {device}"
    if device == "cpu" and not interpreted():
        return "runs on CUDA devices; on the CPU only with TRITON_INTERPRET=1, for tests"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        if interpreted():
            return None if _no_triton() is None else _no_triton()
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return f"needs compute capability 7.0 or higher, this device has {major}.{minor}"
    return _no_triton()


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Why a dtype of the streamed tensors is refused; ``None`` if it is taken."""
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*tensors: Tensor) -> int:
    """Largest power of two up to 16 that divides the byte address of every row of these tensors [B, L, *]."""
    best = 16
    for t in tensors:
        size = t.element_size()
        for value in (t.data_ptr(), t.stride(0) * size, t.stride(1) * size):
            while value % best:
                best //= 2
    return best


def power_of_two(value: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, value - 1).bit_length()


def same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors [B, L, *] with common strides and contiguous last dimension; copies only if they differ."""
    strides = {t.stride()[:2] for t in tensors}
    if len(strides) == 1 and all(t.stride(2) == 1 or t.shape[2] == 1 for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with a float32 result: gradients of parameters should not be rounded to the dtype of the tokens."""
    if a.is_cuda and a.dtype != torch.float32:
        try:
            return torch.mm(a, b, out_dtype=torch.float32)
        except TypeError:  # before torch 2.8
            return (a @ b).float()
    return a.float() @ b.float()
