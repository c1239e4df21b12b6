"""Which fields of a config say what weights mean, and where a file's differ from a model's.

Every field of every config is in one of the four lists; ``tests/models/test_meaning.py`` fails if a new one is in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mambascope.models.description import shortened

SIZES = (
    "in_chans", "num_classes", "embed_dim", "depth", "d_state", "d_conv", "expand", "dt_rank", "stem_width",
    "reuse_ratio", "head_dim",
)  # fmt: skip
"""Sizes of tensors: a difference shows in their shapes."""

MEANING = (
    "patch_size", "stride", "move_dim",  # a MambaEye's first layer takes patch and move together: no shape tells them
    "cls_position", "global_pool", "norm_eps", "reduction",
    "fine_cls", "fine_order", "cell_order", "reuse", "reuse_cls", "coarse_pos", "coarse_offsets",
    "name", "args",
)  # fmt: skip
"""What the weights were trained to compute: another value makes other answers of the same tensors."""

CHOICES = ("alpha", "beta", "threshold", "gate", "score_metric", "score_topk", "score_layers", "coarse_weight")
"""How much is computed, and which cells are read again: free after training too, but results depend on it."""

SILENT = ("img_size", "drop_rate", "drop_path_rate", "scan_backend", "chunk_size")
"""Training, speed, or (``img_size``) what is resampled and reported with the position tables."""

_TRAINING_ARGS = (
    "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate",
    "drop_block_rate", "weight_init", "fix_init", "head_init_scale", "zero_init_last", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
)  # fmt: skip


class Difference(NamedTuple):
    """A field that has one value in a file and another in a model."""

    name: str
    file: Any
    model: Any

    def __str__(self) -> str:
        return f"{self.name} is {shortened(self.file)} in the file and {shortened(self.model)} in the model"

    @property
    def argument(self) -> str:
        """The keyword argument that makes the model as the file says."""
        return f"{self.name}={shortened(self.file)}"


def _effective(name: str, config: Mapping[str, Any]) -> Any:
    """A field's value with what ``None`` stands for, so that two ways to say the same are equal."""
    value = config[name]
    if name == "name" and isinstance(value, str):
        return value.partition(".")[0]  # timm's tag names weights
    if name == "reduction" and isinstance(value, Mapping):
        return value.get("name")
    if name == "reuse" and value is False:  # how YAML reads "off"
        return "off"
    depth = config.get("depth")
    if value is None and name == "score_layers" and isinstance(depth, int):
        return depth - depth // 2
    return config.get("patch_size") if value is None and name == "stride" else _listed(value)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(file: Mapping[str, Any], model: Mapping[str, Any], names: Iterable[str] = MEANING) -> list[Difference]:
    """The fields that both configs have and in which they differ.

    Args:
        file: Config that a file describes; it may lack fields, or be of another class.
        model: Config of the model, as a mapping.
        names: Fields to compare.
    """
    result = []
    model = {"reduction": None, **model}  # a plain Vim's config does not say that it computes every token
    for name in names:
        if name not in file or name not in model or file[name] == model[name]:
            continue
        if name == "global_pool" and (model.get("num_classes") == 0 or model[name] == ""):
            continue  # only a classifier of pooled tokens asks for it
        file_value, model_value = _effective(name, file), _effective(name, model)
        if name == "reduction" and file_value is None:
            continue  # a plain Vim is what every reduced one starts from
        if name == "args" and isinstance(file_value, Mapping) and isinstance(model_value, Mapping):
            keys = sorted({*file_value, *model_value} - {*_TRAINING_ARGS})
            pairs = ((key, _listed(file_value.get(key)), _listed(model_value.get(key))) for key in keys)
            result += [Difference(*pair) for pair in pairs if pair[1] != pair[2]]
        elif file_value != model_value:
            result.append(Difference(name, file_value, model_value))
    return result
