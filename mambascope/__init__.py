"""MambaScope: coarse-to-fine Vision Mamba.

Importing the package registers its models with timm.
"""

from typing import Any

import mambascope.eye  # each wing registers its models; without its folder and its line here the rest works
import mambascope.peers  # noqa: F401
from mambascope._version import __version__
from mambascope.models import MambaScope, ScopeConfig, VimConfig, VisionMamba, load_checkpoint, load_model
from mambascope.models.architectures import ARCHITECTURES as _ARCHITECTURES
from mambascope.models.frozen import freeze, unfreeze

load = load_model

__all__ = [
    "MambaScope",
    "ScopeConfig",
    "VimConfig",
    "VisionMamba",
    "__version__",
    "freeze",
    "load",
    "load_checkpoint",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    """The classes of the wings' models, as ``mambascope.MambaEye``."""
    for architecture in _ARCHITECTURES.values():
        if isinstance(architecture.build, type) and architecture.build.__name__ == name:
            return architecture.build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
