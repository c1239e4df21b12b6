"""The method, the encoder that it stands on, and what every model needs.

- The method: ``scope`` and, as it is read, ``cells``, ``scores``, ``gate``, ``states``, ``losses``. ``scope_maps``:
  what timm asks of it. ``two_stage``: whether a model has two stages. The encoder: ``vim``,
  ``encoded`` (what it gives), ``frozen`` (its inference form on the CPU).
- Configs: ``configs``, ``meaning`` (what their fields mean to weights), ``retired``. Kinds of models:
  ``architectures``, ``registry`` (timm).
- Weights: ``checkpoint``, ``description``, ``tables``, ``reading``, ``saving``, ``weights``, ``hub``, ``ready``.
- Images: ``preprocessing``, ``pictures``, ``picture_files``. Cost: ``cost``, ``flop_count``.
- Use: ``engine``, ``export``.
"""

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
