"""Choice of the implementation behind the ops.

Every backend answers ``why_not(request)``: ``None`` if it can do what is asked, otherwise the reason in words. The
choice is the ``backend`` argument, else the environment variable ``MAMBASCOPE_SCAN_BACKEND``, else the first in the
automatic order of the device that does not refuse. When something refuses, the next one is used and the reason is
logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

BACKENDS = ("reference", "torch", "cpu", "triton", "mamba_ssm")
ENV = "MAMBASCOPE_SCAN_BACKEND"
OPS = ("scan", "conv", "norm")

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """What a backend is asked for.

    Attributes:
        op: ``"scan"``, ``"conv"`` or ``"norm"``.
        device: Device type, e.g. ``"cpu"``.
        dtype: Dtype of the tokens.
        size: States N of a scan, taps K of a convolution, 0 for a norm.
    """

    op: str
    device: str
    dtype: torch.dtype
    size: int = 0


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: One of :data:`BACKENDS`.
        why_not: ``None`` if the request can be served, else the reason in words.
        modules: Module per op, imported on first use. A scan module has ``scan_forward`` and ``scan_backward`` (and may
            have ``joint_forward``: two directions with unsplit projections), a convolution module ``conv_forward`` and
            ``conv_backward``, a norm module ``norm_forward`` and ``norm_backward``.
        auto: Device types on which it is chosen automatically, before the backends registered after it.
        note: Line for :func:`report`.
    """

    name: str
    why_not: Callable[[Request], str | None]
    modules: dict[str, str]
    auto: tuple[str, ...] = ()
    note: Callable[[], str] = lambda: ""


_REGISTRY: dict[str, Backend] = {}
_chosen: dict[tuple, str] = {}
_modules: dict[tuple, ModuleType] = {}
_logged: set[str] = set()


def register(backend: Backend) -> None:
    """Adds or replaces a backend.

    Raises:
        ValueError: A name that is not one of :data:`BACKENDS`.
    """
    check_backend(backend.name)
    _REGISTRY[backend.name] = backend
    _chosen.clear()
    _modules.clear()


def check_backend(name: str | None) -> None:
    """Raises ValueError unless `name` is ``None`` (automatic choice) or a known backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def why_not(name: str, request: Request) -> str | None:
    """Why backend `name` cannot serve `request`; ``None`` if it can.

    Raises:
        ValueError: An unknown backend.
    """
    check_backend(name)
    backend = _REGISTRY.get(name)
    return "not part of this version" if backend is None else backend.why_not(request)


def _log_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _logged:
        _logged.add(message)
        _log.log(level, message)


def choose(request: Request, name: str | None = None) -> str:
    """Name of the backend that serves `request`.

    Args:
        request: What is asked for.
        name: A backend, or ``None`` for the environment variable or the automatic choice.

    Raises:
        ValueError: An unknown backend, here or in the environment variable.
    """
    preferred = name or os.environ.get(ENV) or None
    if preferred is not None and preferred not in BACKENDS:
        source = "backend" if name else ENV
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {preferred!r}")
    call = f"{request.op} on {request.device}, {str(request.dtype).removeprefix('torch.')}"
    refused = None
    if preferred is not None:
        refused = why_not(preferred, request)
        if refused is None:
            return preferred
    for backend in _REGISTRY.values():
        if request.device not in backend.auto and "*" not in backend.auto:
            continue
        reason = backend.why_not(request)
        if reason is None:
            if preferred is not None:
                _log_once(f"{call}: backend {preferred!r} refused ({refused}); using {backend.name!r}")
            return backend.name
        _log_once(f"{call}: backend {backend.name!r} not used ({reason})")
    raise RuntimeError(f"no backend can serve {request}")


@torch.compiler.assume_constant_result
def resolve(op: str, name: str | None, device: str, dtype: torch.dtype, size: int) -> str:
    """Name of the backend for a call, remembered per argument set. A constant under ``torch.compile`` and export.

    Resolved before the operator runs, so that forward and backward of one call use the same backend.
    """
    key = (op, name, os.environ.get(ENV), device, dtype, size)
    backend = _chosen.get(key)
    if backend is None:
        backend = _chosen[key] = choose(Request(op, device, dtype, size), name)
    return backend


def implementation(op: str, name: str, tensor: torch.Tensor, size: int = 0) -> ModuleType:
    """Module that runs `op` on `tensor` with backend `name` (empty: automatic), or with what replaces it here.

    A program that was exported elsewhere may name a backend that this machine does not have.
    """
    key = (op, name, tensor.device.type, tensor.dtype, size)
    module = _modules.get(key)
    if module is None:
        chosen = resolve(op, name or None, *key[2:])
        module = importlib.import_module(_REGISTRY[chosen].modules[op])
        if name:  # otherwise the environment decides, and it may change
            _modules[key] = module
    return module


def report() -> str:
    """Which backend is used per device, and why the others are not. Several lines of text."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    forced = os.environ.get(ENV)
    if forced:
        lines.append(f"{ENV}={forced}")
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            request = Request("scan", device, dtype, 16)
            chosen = choose(request)
            lines.append(f"{device}, {str(dtype).removeprefix('torch.')}: {chosen}")
            for name in BACKENDS:
                if name != chosen:
                    reason = why_not(name, request)
                    lines.append(f"  {name}: {'available, not the first choice' if reason is None else reason}")
    for backend in _REGISTRY.values():
        note = backend.note()
        if note:
            lines.append(f"{backend.name}: {note}")
    return "\n".join(lines)


def _torch_why_not(request: Request) -> str | None:
    return None if request.op in OPS else f"has no {request.op}"


def _native_why_not(request: Request) -> str | None:
    if request.device != "cpu":
        return "runs on CPU only"
    try:
        from mambascope.ops import native
    except ImportError as error:
        return f"not installed: {error}"
    if request.op == "scan":
        return native.supports(request.dtype, N=request.size)
    if request.op == "conv":
        return native.supports_conv(request.dtype, request.size)
    return native.supports_norm(request.dtype) if request.op == "norm" else f"has no {request.op}"


def _native_note() -> str:
    if _native_why_not(Request("norm", "cpu", torch.float32)) is not None:
        return ""
    from mambascope.ops import native

    info = native.info()
    threads = "OpenMP" if info["openmp"] else "std::thread"
    return f"compiled kernels, level {info['isa']}, {info['lanes']} lanes, {info['threads']} threads ({threads})"


def _triton_why_not(request: Request) -> str | None:
    from mambascope.ops import triton

    return triton.why_not(*request)


def _mamba_ssm_why_not(request: Request) -> str | None:
    from mambascope.ops import mamba_ssm

    return mamba_ssm.why_not(*request)


_SCAN, _CONV, _NORM = "mambascope.ops.selective_scan", "mambascope.ops.causal_conv1d", "mambascope.ops.norm"
register(
    Backend(
        "cpu",
        _native_why_not,
        {"scan": f"{_SCAN}.native", "conv": f"{_CONV}.native", "norm": f"{_NORM}_native"},
        auto=("cpu",),
        note=_native_note,
    )
)
register(
    Backend(
        "triton",
        _triton_why_not,
        {op: f"mambascope.ops.triton.{op}" for op in OPS},
        auto=("cuda",),
    )
)
register(
    Backend(
        "torch",
        _torch_why_not,
        {"scan": f"{_SCAN}.chunked", "conv": f"{_CONV}.depthwise", "norm": f"{_NORM}_torch"},
        auto=("*",),
    )
)
register(
    Backend(
        "reference",
        _torch_why_not,
        {"scan": f"{_SCAN}.reference", "conv": f"{_CONV}.reference", "norm": f"{_NORM}_torch"},
    )
)
register(
    Backend(
        "mamba_ssm",
        _mamba_ssm_why_not,
        {"scan": "mambascope.ops.mamba_ssm", "conv": "mambascope.ops.mamba_ssm"},
    )
)
