"""Choice of the implementation behind the ops."""

from __future__ import annotations

BACKENDS = ("reference", "torch", "cpu", "triton", "mamba_ssm")
ENV = "MAMBASCOPE_SCAN_BACKEND"


def check_backend(name: str | None) -> None:
    """Raises ValueError unless `name` is ``None`` (automatic choice) or a known backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def report() -> str:
    """Which backend is used per device."""
    return "cpu: reference"
