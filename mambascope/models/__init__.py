"""Encoders and their timm entries."""

from mambascope.models.checkpoint import LoadReport, load_checkpoint, load_model, read_state_dict, save_safetensors
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS, ScopeConfig, VimConfig
from mambascope.models.registry import *  # noqa: F403  (registers the timm entries)
from mambascope.models.scope import MambaScope
from mambascope.models.states import CoarseState, FineState, ScopeOutput, StageLogits
from mambascope.models.vim import VisionMamba

__all__ = [
    "SCOPE_CONFIGS",
    "VIM_CONFIGS",
    "CoarseState",
    "FineState",
    "LoadReport",
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
