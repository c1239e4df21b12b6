"""Memory that a call takes, as the operating system sees it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _read(field: str) -> float | None:
    """A field of the process's status in MiB; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None


def _give_back() -> None:
    """Returns freed memory to the system, so that it is not counted as held."""
    gc.collect()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(call: Callable[[], Any]) -> float | None:
    """Largest resident memory in MiB during a call, on top of what the process held before it.

    The call runs twice and the second run is measured: buffers that the first one leaves for the next count, what only
    a first run needs (a compiler, an allocation plan) does not, unless it is kept: modules that it imports are.

    Args:
        call: What is measured; its result is dropped.

    Returns:
        MiB; None where the system does not tell (other than Linux).
    """
    _give_back()
    before = _read("VmRSS")
    call()
    _give_back()
    try:
        _RESET.write_text("5", encoding="ascii")  # sets the highest resident size back to the present one
    except OSError:
        before = None
    call()
    highest = _read("VmHWM")
    return None if before is None or highest is None else max(0.0, highest - before)
