"""A model from a file, ready to use: on its device, at its input size, in evaluation mode."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm

from mambascope.models.architectures import architecture_of, architecture_of_entry
from mambascope.models.checkpoint import (
    CheckpointError,
    described_config,
    load_checkpoint,
    load_model,
    read_state_dict,
)
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS
from mambascope.models.frozen import freeze_where_possible
from mambascope.models.gate import check_threshold
from mambascope.models.pictures import ValueRange
from mambascope.models.scope import MambaScope
from mambascope.models.tables import table_stride
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import find_weights
from mambascope.utils import pick_device


def ready_model(
    checkpoint: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str = "auto",
    threshold: float | None = None,
    alpha: float | None = None,
    img_size: Sequence[int] | None = None,
    values: ValueRange = None,
) -> VisionMamba:
    """A model in evaluation mode on its device; on the CPU in its frozen form where it has one.

    Args:
        checkpoint: Weights that describe their model (``.safetensors`` or ``.ckpt`` of ours), a folder with
            ``model.safetensors``, the name of a shipped model, or any other weights together with `name`.
        name: Registered model that the weights belong to; needed where they do not describe it.
        device: See :func:`pick_device`.
        threshold, alpha: Replace the stored η and α of a MambaScope.
        img_size: (height, width) to run at; position tables are resampled. Default: the stored size.
        values: Values of the image files that become 0–255, in place of the stored ones.

    Raises:
        ValueError: An argument outside what is accepted, or a checkpoint that cannot be used.
    """
    path = find_weights(checkpoint)
    target = pick_device(device)
    model = load_model(path) if name is None else _named(name, path)
    if not isinstance(model, VisionMamba):
        raise ValueError(f"{path} holds a {type(model).__name__}; this command takes a MambaScope or a VisionMamba")
    if img_size is not None:
        height, width = img_size
        model.set_input_size((int(height), int(width)))
    if isinstance(model, MambaScope):
        if threshold is not None:
            model.threshold = check_threshold(threshold)
        if alpha is not None:
            model.set_alpha(alpha)
    elif threshold is not None or alpha is not None:
        raise ValueError(f"threshold and alpha need a MambaScope; {path} holds a one-stage {type(model).__name__}")
    use_value_range(model, values)
    model = model.to(target).eval()
    freeze_where_possible(model)
    return model


def _named(name: str, path: Path) -> VisionMamba:
    names = sorted([*VIM_CONFIGS, *SCOPE_CONFIGS])
    if name not in names:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names)}")
    state, description = read_state_dict(path)
    base = {**VIM_CONFIGS, **SCOPE_CONFIGS}[name]
    options: dict[str, Any] = {}
    described = described_config(path, state, description)
    same_kind = described is not None and architecture_of_entry(name, asdict(described)) is architecture_of(described)
    if same_kind and all(
        getattr(described, size) == getattr(base, size) for size in ("embed_dim", "depth", "patch_size")
    ):  # the place of CLS, what the head reads and so on are those that the weights were trained with
        options = asdict(described)
    elif "head.weight" in state and state["head.weight"].ndim == 2:
        options["num_classes"] = len(state["head.weight"])
    if described is None and name in VIM_CONFIGS and (fit := table_stride(state, base)) is not None:
        options["stride"] = fit.stride
        print(f"{path}: stride={fit.stride}, as its position table says", file=sys.stderr)
    model: Any = timm.create_model(name, **options)
    try:
        report = load_checkpoint(model, path, verbose=False)
    except CheckpointError as error:
        if described is None:
            raise
        raise CheckpointError(f"{error}; the file describes its own model: leave --model {name} out") from None
    if notes := report.notes():
        print(f"{path}: {notes}", file=sys.stderr)
    model.description = description
    return model


def use_value_range(model: Any, values: ValueRange) -> None:
    """Makes image files be read with other values than those that the weights say; None leaves them."""
    if values is not None:
        model.description = {
            **model.description,
            "transform": {**(model.description.get("transform") or {}), "value_range": values},
        }
