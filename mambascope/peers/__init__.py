"""Token reduction for the Vim encoder: the published methods that MambaScope is compared with."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mambascope.peers.base import EncoderSizes, ReducedOutput, Reducer, ReductionConfig, cls_to_place, patch_rows
from mambascope.peers.dyvm import DyVMConfig
from mambascope.peers.hidden_align import HiddenAlignConfig
from mambascope.peers.mtr import MTRConfig
from mambascope.peers.r_meeto import RMeeToConfig
from mambascope.peers.tome import ToMeConfig

REDUCTIONS: dict[str, type[ReductionConfig]] = {
    "hidden_align": HiddenAlignConfig,
    "r_meeto": RMeeToConfig,
    "dyvm": DyVMConfig,
    "mtr": MTRConfig,
    "tome": ToMeConfig,
}
"""Settings of every method, by name."""


def reduction_config(value: Any) -> ReductionConfig | None:
    """Settings from a mapping with the method's ``name`` and its fields; settings and ``None`` stay what they are.

    Raises:
        ValueError: For an unknown name or field, or a value that is not accepted.
    """
    if value is None or isinstance(value, ReductionConfig):
        return value
    known = ", ".join(REDUCTIONS)
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"reduction must be a mapping with a name, one of {known}, got {value!r}")
    name = value["name"]
    if name not in REDUCTIONS:
        raise ValueError(f"reduction.name must be one of {known}, got {name!r}")
    accepted = [f.name for f in fields(REDUCTIONS[name]) if f.init]
    unknown = sorted(set(value) - {"name", *accepted})
    if unknown:
        raise ValueError(f"unknown reduction setting {', '.join(unknown)}; {name} accepts {', '.join(accepted)}")
    return REDUCTIONS[name](**{key: setting for key, setting in value.items() if key != "name"})


__all__ = [
    "REDUCTIONS",
    "DyVMConfig",
    "EncoderSizes",
    "HiddenAlignConfig",
    "MTRConfig",
    "RMeeToConfig",
    "ReducedOutput",
    "Reducer",
    "ReductionConfig",
    "ToMeConfig",
    "cls_to_place",
    "patch_rows",
    "reduction_config",
]
