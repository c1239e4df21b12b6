"""MambaEye (arXiv 2511.19963): a wing, which registers its models by name; no file outside this folder needs it."""

from mambascope.data import DATA_MODULES
from mambascope.eye.config import MAMBAEYE_CONFIGS, MambaEyeConfig
from mambascope.eye.model import EyeState, MambaEye
from mambascope.eye.registry import *  # noqa: F403  (registers the timm entries)

__all__ = ["MAMBAEYE_CONFIGS", "EyeState", "MambaEye", "MambaEyeConfig"]

DATA_MODULES.update(
    GlimpseDigitsDataModule="mambascope.eye.datamodules",
    GlimpseImageDataModule="mambascope.eye.datamodules",
)
