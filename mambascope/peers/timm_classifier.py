"""Classifiers of timm's own (DeiT, ResNet, ...) beside the models of this package, as references in comparisons.

They are trained by the same command with plain cross entropy, and their weights files describe them as ours do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from mambascope.models.description import MAX_SIDE, shortened

START_ARGS = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments of ``timm.create_model`` that say where weights come from: for the command line, never in a file."""

COUNT_ARGS = ("block_config", "depth", "depths", "layers", "num_blocks")
"""Arguments that say how many blocks there are, in all or per stage."""

SHAPE_ARGS = (
    *COUNT_ARGS,
    "aa_layer", "act_layer", "attn_drop_rate", "avg_down", "base_width", "block_reduce_first", "bn_size", "cardinality",
    "channels", "class_token", "conv_bias", "conv_mlp", "dims", "drop_block_rate", "drop_path_rate", "drop_rate",
    "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims", "expand_ratio", "fc_norm", "final_norm",
    "fix_init", "fix_stem", "global_pool", "groups", "growth_rate", "head_dim", "head_hidden_size", "head_init_scale",
    "head_norm_first", "init_values", "kernel_size", "kernel_sizes", "key_dim", "layer_scale_init_value",
    "ls_init_value", "mlp_ratio", "mlp_ratios", "no_embed_class", "norm_eps", "norm_layer", "num_features",
    "num_heads", "num_init_features", "num_kv_heads", "output_stride", "pad_type", "patch_drop_rate", "patch_norm",
    "patch_size", "pos_drop_rate", "pos_embed", "pre_norm", "proj_bias", "proj_drop_rate", "qk_norm", "qkv_bias",
    "reg_tokens", "scale_mlp", "stem_size", "stem_stride", "stem_type", "stem_width", "stride", "strict_img_size",
    "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm", "use_pos_embed", "use_rel_pos_bias", "use_shared_rel_pos_bias",
    "weight_init", "width", "width_factor", "widths", "window_size", "zero_init_last",
)  # fmt: skip
"""Arguments of timm's entries that a config may hold: sizes and choices of its classifiers, given as plain values."""


@dataclass(frozen=True)
class TimmConfig:
    """What a classifier of timm's is made from.

    Attributes:
        name: Entry of timm, e.g. ``deit_small_patch16_224`` or ``resnet50``.
        num_classes: Classes of the head; 0 for none.
        in_chans: Image channels.
        img_size: Image side in pixels, or (height, width). Told to the model only where timm builds it for a size.
        args: Further arguments of the entry, e.g. ``{"depth": 6}`` or ``{"pretrained": True}``: any of
            :data:`SHAPE_ARGS`, and of :data:`START_ARGS` where the config does not come from a file of weights.

    Raises:
        ValueError: If a field does not have an accepted value.
    """

    name: str
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | tuple[int, int] = 224
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))
        if not isinstance(self.name, str):
            raise ValueError(f"name must be that of a model of timm's, got {self.name!r}")
        for name, least in (("num_classes", 0), ("in_chans", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        sides = self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)
        if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"img_size must be an integer in 1..{MAX_SIDE} or (height, width), got {self.img_size!r}")
        if not isinstance(self.args, Mapping):
            raise ValueError(f"args must be a mapping, got {self.args!r}")
        unknown = sorted(map(str, {*self.args} - {*SHAPE_ARGS, *START_ARGS}))
        if unknown:
            raise ValueError(
                f"{self.name} is not made with {', '.join(unknown)}: arguments of timm's models that are taken here "
                f"are {', '.join(sorted(SHAPE_ARGS))}"
            )
        for name in SHAPE_ARGS:
            if not _is_plain(self.args.get(name)):
                raise ValueError(f"{name} must be a number, a text or a list of them, got {shortened(self.args[name])}")

    def check_sizes(self, tensors: int) -> None:
        """Checks that weights of this many tensors can fill as many blocks as the arguments ask for.

        Raises:
            ValueError: If they cannot.
        """
        for name in COUNT_ARGS:
            value = self.args.get(name) or 0
            counts = value if isinstance(value, (list, tuple)) else [value]
            if any(type(count) is not int or count < 0 for count in counts) or sum(counts) > tensors:
                raise ValueError(f"{name} must be as many blocks as {tensors} tensors can fill, got {shortened(value)}")

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> TimmConfig:
        """From options in one dictionary, as ``timm.create_model`` takes them."""
        sizes = {f.name for f in fields(cls)} - {"name", "args"}
        args = {key: value for key, value in options.items() if key not in sizes}
        return cls(name, **{key: value for key, value in options.items() if key in sizes}, args=args)

    @classmethod
    def read(cls, values: dict[str, Any], tensors: int) -> TimmConfig:
        """From what a file of so many tensors says; its weights follow, so that nothing is downloaded."""
        args = values.get("args", {})
        if not isinstance(args, Mapping):
            raise ValueError(f"args must be a mapping, got {shortened(args)}")
        if refused := sorted({*args} & {*START_ARGS} - {"pretrained"}):
            raise ValueError(f"a weights file may not say {', '.join(refused)}")
        config = cls(**{**values, "args": {key: value for key, value in args.items() if key != "pretrained"}})
        config.check_sizes(tensors)
        return config

    def write(self) -> dict[str, Any]:
        """What a file says: where weights came from is no part of the model."""
        args = {key: value for key, value in self.args.items() if key not in START_ARGS}
        return {**asdict(self), "args": args}

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)


def _is_plain(value: Any) -> bool:
    inner = value if isinstance(value, (list, tuple)) else [value]
    return all(v is None or isinstance(v, (bool, int, float, str)) for v in inner)


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
    published = get_pretrained_cfg(config.name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = config.image_hw
    try:
        model: nn.Module = timm.create_model(config.name, **options)
    except (TypeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or "the arguments do not fit together"
        raise ValueError(f"{config.name} cannot be built from these arguments: {reason}") from None
    model.config, model.description = config, {}  # type: ignore[assignment]
    return model
