"""Every method of token reduction by name, and the config of a Vim that has one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mambascope.models.configs import VimConfig
from mambascope.peers.base import EncoderSizes, ReductionConfig
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
    names = ", ".join(REDUCTIONS)
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"reduction must be a mapping with a name, one of {names}, got {value!r}")
    name = value["name"]
    if name not in REDUCTIONS:
        raise ValueError(f"reduction.name must be one of {names}, got {name!r}")
    accepted = [f.name for f in fields(REDUCTIONS[name]) if f.init]
    unknown = sorted(set(value) - {"name", *accepted})
    if unknown:
        raise ValueError(f"unknown reduction setting {', '.join(unknown)}; {name} accepts {', '.join(accepted)}")
    return REDUCTIONS[name](**{key: setting for key, setting in value.items() if key != "name"})


@dataclass(frozen=True)
class ReducedConfig(VimConfig):
    """A Vim with token reduction.

    Attributes:
        reduction: A mapping with the ``name`` of a method (:data:`REDUCTIONS`) and its settings.
    """

    reduction: ReductionConfig = field(default_factory=RMeeToConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        reduction = reduction_config(self.reduction)
        if reduction is None:
            raise ValueError(f"reduction must be a mapping with a name, one of {', '.join(REDUCTIONS)}, got None")
        object.__setattr__(self, "reduction", reduction)
        reduction.patch_counts(math.prod(self.patch_grid), self.depth)  # checks that the settings fit the sizes
        if self.global_pool in ("avg", "lse"):
            raise ValueError(
                f"global_pool must be 'token' or '' with reduction, which leaves other tokens, got {self.global_pool!r}"
            )

    @property
    def sizes(self) -> EncoderSizes:
        """The sizes that token reduction depends on."""
        return EncoderSizes(self.embed_dim, self.inner_dim, self.rank, self.depth)
