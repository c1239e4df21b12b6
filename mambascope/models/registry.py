"""timm entries: after ``import mambascope``, ``timm.create_model("mambascope_tiny_patch16_224", num_classes=10)``.

Every field of the model's config is accepted as a keyword. ``pretrained=True`` loads the weights that are shipped for a
model, or any file of weights that ``pretrained_cfg_overlay=dict(file=...)`` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from mambascope.models.architectures import Architecture, architecture_of, configured, register
from mambascope.models.checkpoint import CheckpointError, described_config, read_state_dict
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS, ScopeConfig, VimConfig
from mambascope.models.meaning import differences
from mambascope.models.preprocessing import default_preprocessing
from mambascope.models.scope import MambaScope
from mambascope.models.tables import fit_tables
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import PRETRAINED

__all__ = [
    "mambascope_base_patch16_224",
    "mambascope_nano_patch8_64",
    "mambascope_pico_patch2_28",
    "mambascope_small_patch16_224",
    "mambascope_tiny_patch16_224",
    "vim_base_patch16_224",
    "vim_nano_patch8_64",
    "vim_pico_patch2_28",
    "vim_small_patch16_224",
    "vim_tiny_patch16_224",
]

register(
    Architecture(
        "vim",
        VimConfig,
        VisionMamba,
        VIM_CONFIGS,
        mark="cls_token",
        tables={"pos_embed": None},
    )
)
register(
    Architecture(
        "mambascope",
        ScopeConfig,
        MambaScope,
        SCOPE_CONFIGS,
        module="mambascope.training.scope_module:ScopeModule",
        settings=("alpha", "threshold", "coarse_weight"),
        mark="cls_token",
        additions=("reuse.", "pos_embed_coarse", "gate.", "coarse_offsets."),
        tables={"pos_embed": None, "pos_embed_coarse": "pos_embed"},
    )
)

_FIRST_CONVS = ("patch_embed.proj", "patch_embed.stem.levels.0.0.0")
"""What reads the image; the second is the stem's."""


def _default_cfg(config: VimConfig) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, *config.image_hw),
        "fixed_input_size": False,
        "pool_size": None,
        **default_preprocessing(config.image_hw),
        "first_conv": _FIRST_CONVS[0],
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        name: {**_default_cfg(cfg), **({"file": str(PRETRAINED[name])} if name in PRETRAINED else {})}
        for name, cfg in {**VIM_CONFIGS, **SCOPE_CONFIGS}.items()
    }
)
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices", "feature_cls")


def feature_blocks(depth: int) -> tuple[int, ...]:
    """Blocks whose outputs are feature maps by default: the last of every quarter, 5, 11, 17, 23 of 24."""
    return tuple(-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)) if depth >= 4 else (depth - 1,)


def _weights_file(variant: str, kwargs: dict[str, Any]) -> str:
    """The file that ``pretrained=True`` means: of the overlay, of the given cfg, or the shipped one."""
    for name in ("pretrained_cfg_overlay", "pretrained_cfg"):
        cfg = kwargs.get(name)
        file = cfg.get("file") if isinstance(cfg, dict) else getattr(cfg, "file", None)
        if file:
            return os.fspath(file)
    if variant not in PRETRAINED:
        raise ValueError(
            f"no pretrained weights are published for {variant}; load your own with "
            "mambascope.models.checkpoint.load_checkpoint(model, path), or pass "
            "pretrained_cfg_overlay=dict(file=path)"
        )
    return str(PRETRAINED[variant])


def _fitted(
    state: Mapping[str, Tensor], model: VisionMamba, description: dict[str, Any], base: VimConfig
) -> dict[str, Tensor]:
    """The weights with position tables on the model's grids; timm itself adapts the classifier and the first layer.

    Raises:
        CheckpointError: If the model was asked for with another structure or meaning than the weights have.
    """
    values = asdict(model.config)
    if model.config.num_classes != base.num_classes:
        values.pop("global_pool")  # the head that asks for it is new
    if mismatches := differences(asdict(base), values):
        raise CheckpointError(
            f"pretrained weights do not fit a model with another {', '.join(m.name for m in mismatches)} "
            f"({mismatches[0]}); leave that as it is, or start without pretrained=True"
        )
    fitted = {**state, **fit_tables(state, model, description)}
    target = model.state_dict()
    adapted = ("head.", *(f"{name}.weight" for name in _FIRST_CONVS))
    wrong = [
        key
        for key in sorted(target.keys() | fitted.keys())
        if not key.startswith(adapted)
        and (key not in target or key not in fitted or target[key].shape != fitted[key].shape)
    ]
    if wrong:
        changed = [f.name for f in fields(base) if getattr(base, f.name) != getattr(model.config, f.name)]
        raise CheckpointError(
            f"pretrained weights do not fit a model with another {', '.join(changed) or 'structure'} "
            f"({len(wrong)} parameters differ, e.g. {wrong[0]}); leave that as it is, or start without pretrained=True"
        )
    return fitted


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionMamba:
    base: VimConfig = {**VIM_CONFIGS, **SCOPE_CONFIGS}[variant]
    description: dict[str, Any] = {}
    loading: dict[str, Any] = {}
    if pretrained:
        file = _weights_file(variant, kwargs)
        state, description = read_state_dict(file)
        described = described_config(Path(file), state, description)
        if described is not None:
            # alpha, threshold, the place of CLS and so on are those that the weights were trained with
            base = configured(base, asdict(described))
        source = {"num_classes": base.num_classes, "input_size": (base.in_chans, *base.image_hw)}
        loading["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), **source}
        loading["pretrained_cfg_overlay"]["file"] = file
        loading["pretrained_cfg_overlay"]["first_conv"] = _FIRST_CONVS if base.stem_width else _FIRST_CONVS[0]
        # timm's own reader would keep the names of compiled or wrapped models
        loading["pretrained_filter_fn"] = lambda _, model: _fitted(state, model, description, base)
    config: VimConfig = configured(base, {k: v for k, v in kwargs.items() if k not in _TIMM_ONLY})
    rest = {k: v for k, v in kwargs.items() if k in _TIMM_ONLY}
    model: VisionMamba = build_model_with_cfg(
        architecture_of(config).build,
        variant,
        pretrained,
        config=config,
        # timm would fill these from the default_cfg and so override the config
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        feature_cfg={"out_indices": feature_blocks(config.depth), "feature_cls": "getter"},
        **{**rest, **loading},
    )
    if pretrained and rest.get("features_only") and isinstance(config, ScopeConfig) and config.score.head:
        extractor: Any = model
        head = extractor.model.head  # timm leaves it out of feature extractors, whose score asks it here
        if head.weight.shape == state["head.weight"].shape:
            head.load_state_dict({name: state[f"head.{name}"] for name in ("weight", "bias")})
    if pretrained and isinstance(model, VisionMamba):
        same_head = config.num_classes == base.num_classes
        model.description = {k: v for k, v in description.items() if k != "labels" or same_head}
    return model


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-T: width 192, 7.1 M parameters."""
    return _create("vim_tiny_patch16_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: width 384, 25.8 M parameters."""
    return _create("vim_small_patch16_224", pretrained, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: width 768, 97.6 M parameters."""
    return _create("vim_base_patch16_224", pretrained, **kwargs)


@register_model
def vim_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """The small Vim of the built-in data."""
    return _create("vim_nano_patch8_64", pretrained, **kwargs)


@register_model
def mambascope_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """MambaScope-T: width 192, 7.5 M parameters."""
    return _create("mambascope_tiny_patch16_224", pretrained, **kwargs)


@register_model
def mambascope_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """MambaScope-S: width 384, 27.0 M parameters."""
    return _create("mambascope_small_patch16_224", pretrained, **kwargs)


@register_model
def mambascope_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """MambaScope-B: width 768, 102.4 M parameters."""
    return _create("mambascope_base_patch16_224", pretrained, **kwargs)


@register_model
def mambascope_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """The small MambaScope of the built-in data."""
    return _create("mambascope_nano_patch8_64", pretrained, **kwargs)


@register_model
def vim_pico_patch2_28(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A Vim for images of 28 pixels in 14 x 14 patches: width 64, 4 blocks, 8 states."""
    return _create("vim_pico_patch2_28", pretrained, **kwargs)


@register_model
def mambascope_pico_patch2_28(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """MambaScope for images of 28 pixels: 14 x 14 fine and 7 x 7 coarse tokens, width 64, 4 blocks, 8 states."""
    return _create("mambascope_pico_patch2_28", pretrained, **kwargs)
