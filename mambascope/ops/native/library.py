"""Finds and loads the compiled kernels: one shared object per instruction-set level, chosen by the CPU's flags."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import torch  # loads the libgomp whose thread pool the kernels share

ENV = "MAMBASCOPE_NATIVE_ISA"
LEVELS = ("v4", "v3", "v1", "base")  # best first; v1, v3, v4 are the x86-64 levels, base is any other machine

# Layouts of the argument structs in scan.h, conv.h, norm.h, gemm.h and program.h, in the order in which the library
# reports their sizes.
FORWARD = struct.Struct("=46qd5q")
BACKWARD = struct.Struct("=46qd28q")
CONV = struct.Struct("=30q")
NORM = struct.Struct("=5qd10q")
GEMM = struct.Struct("=9q")
ADD = struct.Struct("=4q")
PROGRAM = struct.Struct("=10q")
_LAYOUTS = (FORWARD, BACKWARD, CONV, NORM, GEMM, ADD, PROGRAM)

_ENTRIES = (
    *("scan_forward", "scan_backward", "conv_forward", "conv_backward", "norm_forward", "norm_backward"),
    *("gemm", "program"),
)
_HERE = Path(__file__).parent


class Library:
    """The loaded kernels of one instruction-set level.

    Attributes:
        isa: One of :data:`LEVELS`.
        path: Shared object.
        openmp: Built with OpenMP; otherwise std::thread is used.
        lanes: Float lanes of its vectors.
    """

    def __init__(self, isa: str, path: Path) -> None:
        self.isa, self.path = isa, path
        self._lib = lib = ctypes.CDLL(str(path))
        for which, layout in enumerate(_LAYOUTS):
            if lib.mambascope_struct_size(which) != layout.size:
                raise OSError(f"{path.name} was built from another version of the sources: reinstall the package")
        lib.mambascope_states_size.restype = ctypes.c_int64
        lib.mambascope_states_size.argtypes = [ctypes.c_int64] * 3
        self.states_size = lib.mambascope_states_size
        lib.mambascope_gemm_size.restype, lib.mambascope_gemm_size.argtypes = ctypes.c_int64, [ctypes.c_int64] * 2
        lib.mambascope_gemm_pack.restype = None
        lib.mambascope_gemm_pack.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        lib.mambascope_scan_packed_size.restype = ctypes.c_int64
        lib.mambascope_scan_packed_size.argtypes = [ctypes.c_char_p]
        lib.mambascope_scan_pack.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        self.openmp = bool(lib.mambascope_openmp())
        self.lanes = int(lib.mambascope_lanes())
        self._entries = {}
        for name in _ENTRIES:
            function = getattr(lib, f"mambascope_{name}")
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
            self._entries[name] = function

    def cpu_level(self) -> int:
        """Highest x86-64 level of this machine, 0 on other architectures."""
        return int(self._lib.mambascope_cpu_level())

    def packed_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [columns, depth] in the order in which the products of ``gemm.h`` read it."""
        weight = weight.detach().float().contiguous()
        packed = torch.empty(self._lib.mambascope_gemm_size(*weight.shape), dtype=torch.float32, device="cpu")
        self._lib.mambascope_gemm_pack(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return packed

    def packed_scan(self, arguments: bytes) -> torch.Tensor:
        """The parameters that a ``ForwardArgs`` names, as the forward scan reads them."""
        packed = torch.empty(self._lib.mambascope_scan_packed_size(arguments), dtype=torch.float32, device="cpu")
        self._lib.mambascope_scan_pack(arguments, packed.data_ptr())
        return packed

    def run(self, entry: str, arguments: bytes) -> None:
        """Calls a kernel; the GIL is released meanwhile.

        Raises:
            MemoryError: If one of its threads could not allocate its buffers.
            RuntimeError: If a thread could not be started.
        """
        status = self._entries[entry](arguments)
        if status == 1:
            raise MemoryError(f"native {entry} could not allocate its buffers")
        if status:
            raise RuntimeError(f"native {entry} could not start its threads: lower torch.set_num_threads")


def _find() -> tuple[Library | None, str | None]:
    level = os.environ.get(ENV, "").strip().lower()
    if level in ("off", "none", "0"):
        return None, f"switched off by {ENV}={level}"
    paths = {isa: _HERE / f"_kernels_{isa}.so" for isa in LEVELS}
    built = [isa for isa in LEVELS if paths[isa].exists()]
    if not built:
        log = _HERE / "_build_error.txt"
        why = log.read_text().strip() if log.exists() else "no C++ compiler was used when the package was installed"
        return None, f"not compiled: {why}"
    if level and level not in built:
        return None, f"{ENV}={level!r} is not one of the levels built here: {', '.join(built)}"
    try:
        # The lowest level runs everywhere; only it may ask the CPU what it can do.
        lowest = Library(built[-1], paths[built[-1]])
        usable = [isa for isa in built if isa == "base" or int(isa[1:]) <= lowest.cpu_level()]
        if not usable:
            return None, f"this CPU cannot run the levels built here: {', '.join(built)}"
        if level and level not in usable:
            return None, f"{ENV}={level!r} is beyond this CPU, which runs {', '.join(usable)}"
        isa = level or usable[0]
        return (lowest if isa == lowest.isa else Library(isa, paths[isa])), None
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels do not load: {error}"


_library, _reason = _find()


def get() -> Library:
    """The loaded library. Raises RuntimeError with the reason if there is none."""
    if _library is None:
        raise RuntimeError(f"native kernels are not available: {_reason}")
    return _library


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used, in words; ``None`` if they can."""
    return _reason


def info() -> dict[str, str | bool | int | None]:
    """What is loaded: ``isa``, ``path``, ``openmp``, ``lanes``, ``threads``; values are ``None`` if nothing is."""
    if _library is None:
        return {"isa": None, "path": None, "openmp": None, "lanes": None, "threads": None}
    return {
        "isa": _library.isa,
        "path": str(_library.path),
        "openmp": _library.openmp,
        "lanes": _library.lanes,
        "threads": torch.get_num_threads(),
    }
