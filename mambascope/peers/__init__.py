"""Token reduction for the Vim encoder: the published methods that MambaScope is compared with."""

from dataclasses import asdict
from typing import Any

from mambascope.models.architectures import Architecture, register
from mambascope.models.configs import VimConfig
from mambascope.peers.base import ReducedOutput, Reducer, ReductionConfig
from mambascope.peers.config import REDUCTIONS, ReducedConfig, reduction_config
from mambascope.peers.dyvm import DyVMConfig
from mambascope.peers.hidden_align import HiddenAlignConfig
from mambascope.peers.model import ReducedVim
from mambascope.peers.mtr import MTRConfig
from mambascope.peers.r_meeto import RMeeToConfig
from mambascope.peers.timm_classifier import TimmConfig, create_timm_classifier, is_timm_classifier
from mambascope.peers.tome import ToMeConfig


def _reduced(config: VimConfig, reduction: Any) -> ReducedConfig:
    """The config of a Vim with token reduction put around it."""
    return ReducedConfig(**asdict(config), reduction=reduction)


register(
    Architecture(
        "reduced_vim",
        ReducedConfig,
        ReducedVim,
        mark="cls_token",
        additions=("reduction.",),
        tables={"pos_embed": None},
        extends="vim",
        keyword="reduction",
        extend=_reduced,
        module="mambascope.peers.module:ReducedModule",
    )
)
register(
    Architecture(
        "timm",
        TimmConfig,
        create_timm_classifier,
        has_entry=is_timm_classifier,
        create=lambda name, options: create_timm_classifier(TimmConfig.of(name, dict(options))),
        read_config=TimmConfig.read,
        write_config=TimmConfig.write,
    )
)

__all__ = [
    "REDUCTIONS",
    "DyVMConfig",
    "HiddenAlignConfig",
    "MTRConfig",
    "RMeeToConfig",
    "ReducedConfig",
    "ReducedOutput",
    "ReducedVim",
    "Reducer",
    "ReductionConfig",
    "ToMeConfig",
    "reduction_config",
]
