"""Classifiers of timm's own (DeiT, ResNet, ...) beside the models of this package, as references in comparisons.

They are trained by the same command with plain cross entropy, and their weights files describe them as ours do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn


@dataclass(frozen=True)
class TimmConfig:
    """What a classifier of timm's is made from.

    Attributes:
        name: timm entry, e.g. ``deit_small_patch16_224`` or ``resnet50``.
        num_classes: Classes of the head; 0 for none.
        in_chans: Image channels.
        img_size: Image side in pixels, or (height, width). Told to the model only where timm builds it for a size.
        args: Further arguments of the entry, e.g. ``{"depth": 6}`` or ``{"pretrained": True}``.
    """

    name: str
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | tuple[int, int] = 224
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> TimmConfig:
        """From options in one dictionary, as ``timm.create_model`` takes them."""
        own = {f.name for f in fields(cls)} - {"name", "args"}
        rest = {key: value for key, value in options.items() if key not in own}
        return cls(name, **{key: value for key, value in options.items() if key in own}, args=rest)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)


def is_timm_classifier(name: str) -> bool:
    """Whether timm itself has an entry of this name."""
    return timm.is_model(name) and not timm.models.model_entrypoint(name).__module__.startswith("mambascope.")


def create_timm_classifier(config: TimmConfig) -> Any:
    """The model, with ``config`` and an empty ``description`` as the models of this package have them.

    Raises:
        ValueError: If timm has no such entry, or the entry does not take an argument.
    """
    if not is_timm_classifier(config.name):
        raise ValueError(f"timm has no model {config.name!r}; timm.list_models() names those it has")
    options = {**config.args, "num_classes": config.num_classes, "in_chans": config.in_chans}
    known = get_pretrained_cfg(config.name)
    if known is not None and known.fixed_input_size:
        options["img_size"] = config.image_hw
    try:
        model: nn.Module = timm.create_model(config.name, **options)
    except (TypeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or "the arguments do not fit together"
        raise ValueError(f"{config.name} cannot be built from these arguments: {reason}") from None
    model.config, model.description = config, {}  # type: ignore[assignment]
    return model
