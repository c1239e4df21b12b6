"""Data: the built-in ScopeDigits, ImageNet-like folders and archives, and loaders that resume exactly.

Importing this package is cheap; Lightning and scikit-learn are imported when a name needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mambascope.data.errors import DataError

if TYPE_CHECKING:
    from mambascope.data.digits_datamodule import ScopeDigitsDataModule
    from mambascope.data.image_datamodule import ImageDataModule
    from mambascope.data.image_io import open_image
    from mambascope.data.scopedigits import ScopeDigits
    from mambascope.data.scopedigits_config import ScopeDigitsConfig
    from mambascope.eye.datamodules import GlimpseDigitsDataModule, GlimpseImageDataModule

_LAZY = {
    "GlimpseDigitsDataModule": "mambascope.eye.datamodules",
    "GlimpseImageDataModule": "mambascope.eye.datamodules",
    "ImageDataModule": "mambascope.data.image_datamodule",
    "ScopeDigits": "mambascope.data.scopedigits",
    "ScopeDigitsConfig": "mambascope.data.scopedigits",
    "ScopeDigitsDataModule": "mambascope.data.digits_datamodule",
    "open_image": "mambascope.data.image_io",
}

__all__ = [
    "DataError",
    "GlimpseDigitsDataModule",
    "GlimpseImageDataModule",
    "ImageDataModule",
    "ScopeDigits",
    "ScopeDigitsConfig",
    "ScopeDigitsDataModule",
    "open_image",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
