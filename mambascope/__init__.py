"""MambaScope: coarse-to-fine Vision Mamba.

Importing the package registers its models with timm.
"""

from mambascope._version import __version__
from mambascope.models import MambaEye, MambaScope, ScopeConfig, VimConfig, VisionMamba, load_checkpoint, load_model

load = load_model

__all__ = [
    "MambaEye",
    "MambaScope",
    "ScopeConfig",
    "VimConfig",
    "VisionMamba",
    "__version__",
    "load",
    "load_checkpoint",
]
