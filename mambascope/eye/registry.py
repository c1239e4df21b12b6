"""timm entries of MambaEye. Every field of the config is accepted as a keyword.

``timm.create_model("mambaeye_tiny", pretrained=True)`` downloads the weights the authors publish;
``mambaeye_tiny.ft_in1k`` names those fine-tuned on longer sequences.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from mambascope.eye.config import MAMBAEYE_CONFIGS, MambaEyeConfig
from mambascope.eye.model import MambaEye
from mambascope.models.architectures import Architecture, register
from mambascope.models.configs import with_overrides

__all__ = ["mambaeye_base", "mambaeye_nano_patch16", "mambaeye_small", "mambaeye_tiny"]

register(
    Architecture(
        "mambaeye",
        MambaEyeConfig,
        MambaEye,
        MAMBAEYE_CONFIGS,
        mark="init_fc.0.weight",
        inputs="glimpses",
        module="mambascope.eye.module:EyeModule",
        report="mambascope.eye.report:report_training",
        predict="mambascope.eye.predict",
    )
)


def _default_cfg(config: MambaEyeConfig, side: int, **source: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, side, side),  # canvas of the published evaluation; any other works
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "lanczos",
        "mean": (0.0, 0.0, 0.0),  # pixels are only scaled to [0, 1]
        "std": (1.0, 1.0, 1.0),
        "classifier": "classification_head.0",
        "license": "mit" if source else "apache-2.0",
        **source,
    }


def _published(size: str) -> dict[str, Any]:
    config, hub = MAMBAEYE_CONFIGS[f"mambaeye_{size}"], f"usingcolor/MambaEye-{size}"
    return {
        f"mambaeye_{size}.in1k": _default_cfg(config, 512, hf_hub_id=hub, hf_hub_filename=f"mambaeye_{size}.pt"),
        f"mambaeye_{size}.ft_in1k": _default_cfg(config, 512, hf_hub_id=hub, hf_hub_filename=f"mambaeye_{size}_ft.pt"),
    }


default_cfgs = generate_default_cfgs(
    {
        **_published("tiny"),
        **_published("small"),
        **_published("base"),
        "mambaeye_nano_patch16": _default_cfg(MAMBAEYE_CONFIGS["mambaeye_nano_patch16"], 64),
    }
)

_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MambaEye:
    if kwargs.pop("features_only", False):
        raise ValueError(f"{variant} reads sequences of glimpses and has no feature maps; features_only must be False")
    overrides = {k: v for k, v in kwargs.items() if k not in _TIMM_ONLY}
    config = with_overrides(MAMBAEYE_CONFIGS[variant], overrides)  # type: ignore[type-var]
    return build_model_with_cfg(
        MambaEye,
        variant,
        pretrained,
        config=config,
        # timm would fill these from the default_cfg and so override the config
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        **{k: v for k, v in kwargs.items() if k in _TIMM_ONLY},
    )


@register_model
def mambaeye_tiny(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """MambaEye-T: 12 blocks, 5.8 M parameters."""
    return _create("mambaeye_tiny", pretrained, **kwargs)


@register_model
def mambaeye_small(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """MambaEye-S: 24 blocks, 11.0 M parameters."""
    return _create("mambaeye_small", pretrained, **kwargs)


@register_model
def mambaeye_base(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """MambaEye-B: 48 blocks, 21.3 M parameters."""
    return _create("mambaeye_base", pretrained, **kwargs)


@register_model
def mambaeye_nano_patch16(pretrained: bool = False, **kwargs: Any) -> MambaEye:
    """The small MambaEye of the built-in data."""
    return _create("mambaeye_nano_patch16", pretrained, **kwargs)
