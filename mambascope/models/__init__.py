"""Encoders and their timm entries."""

from mambascope.eye.config import MAMBAEYE_CONFIGS, MambaEyeConfig
from mambascope.eye.model import EyeState, MambaEye
from mambascope.eye.registry import *  # noqa: F403  (registers the timm entries)
from mambascope.models.checkpoint import LoadReport, load_checkpoint, load_model, read_state_dict, save_safetensors
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS, ScopeConfig, VimConfig
from mambascope.models.registry import *  # noqa: F403  (registers the timm entries)
from mambascope.models.scope import MambaScope
from mambascope.models.states import CoarseState, FineState, ScopeOutput, StageLogits
from mambascope.models.vim import VisionMamba

__all__ = [
    "MAMBAEYE_CONFIGS",
    "SCOPE_CONFIGS",
    "VIM_CONFIGS",
    "CoarseState",
    "EyeState",
    "FineState",
    "LoadReport",
    "MambaEye",
    "MambaEyeConfig",
    "MambaScope",
    "ScopeConfig",
    "ScopeOutput",
    "StageLogits",
    "VimConfig",
    "VisionMamba",
    "load_checkpoint",
    "load_model",
    "read_state_dict",
    "save_safetensors",
]
