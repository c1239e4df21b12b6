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
    from mambascope.data.small_datamodule import SmallImageDataModule

DATA_MODULES = {
    "ImageDataModule": "mambascope.data.image_datamodule",
    "ScopeDigitsDataModule": "mambascope.data.digits_datamodule",
    "SmallImageDataModule": "mambascope.data.small_datamodule",
}
"""The file of each data module that ``--data NAME`` means; wings add theirs."""

_LAZY = {
    "ScopeDigits": "mambascope.data.scopedigits",
    "ScopeDigitsConfig": "mambascope.data.scopedigits_config",
    "open_image": "mambascope.data.image_io",
}

__all__ = [
    "DATA_MODULES",
    "DataError",
    "ImageDataModule",
    "ScopeDigits",
    "ScopeDigitsConfig",
    "ScopeDigitsDataModule",
    "SmallImageDataModule",
    "load_data_modules",
    "open_image",
]


def load_data_modules() -> dict[str, type]:
    """Every registered data module by name; the command line finds those that are imported."""
    return {name: getattr(import_module(file), name) for name, file in DATA_MODULES.items()}


def __getattr__(name: str) -> Any:
    file = DATA_MODULES.get(name) or _LAZY.get(name)
    if file is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(file), name)
