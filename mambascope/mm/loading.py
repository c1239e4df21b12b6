"""A ready segmentor or detector from a config and a checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mambascope.data.errors import DataError
from mambascope.mm.backbone import VimBackbone
from mambascope.mm.runner import misfit
from mambascope.mm.scope_backbone import ScopeBackbone
from mambascope.mm.weights import local_file
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.frozen import freeze_where_possible

PLAIN = {"ScopeEncoderDecoder": "VimEncoderDecoder", "ScopeCascadeRCNN": "VimCascadeRCNN"}


def read_config(path: str | os.PathLike[str], options: dict | None = None) -> Config:
    """A config with ``--cfg-options`` merged in; its package is imported and becomes the default scope.

    Raises:
        ValueError: If the file does not exist or is no config of a segmentor or detector.
    """
    if not Path(path).is_file():
        raise ValueError(f"config {path} does not exist")
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    scope = cfg.get("default_scope")
    if scope not in ("mmseg", "mmdet") or "model" not in cfg:
        raise ValueError(f"config {path} must have a model and default_scope 'mmseg' or 'mmdet', got {scope!r}")
    register(scope)
    return cfg


def register(scope: str) -> None:
    """Registers everything of mmseg or mmdet and makes it the default scope."""
    if scope == "mmseg":
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    init_default_scope(scope)


def build_model(
    cfg: Config, checkpoint: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The config's model in evaluation mode; its ``dataset_meta`` holds the classes and the palette.

    Args:
        cfg: See :func:`read_config`.
        checkpoint: Written by a training of the same model; ``None`` for random weights.
        device: Where it goes.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another model.
    """
    model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    meta = cfg.test_dataloader.dataset.get("metainfo")
    if checkpoint is not None:
        path = local_file(checkpoint)
        if not path.is_file():
            raise CheckpointError(f"checkpoint {checkpoint} does not exist")
        try:
            content = CheckpointLoader.load_checkpoint(str(path), map_location="cpu", logger="silent")
        except Exception as error:
            raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {str(error).splitlines()[0]}") from None
        state = content.get("state_dict") if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"checkpoint {checkpoint} is not one of a segmentor or detector (no 'state_dict')")
        try:
            model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
        except RuntimeError as error:
            raise CheckpointError(misfit(checkpoint, error)) from None
        stored = content.get("meta")
        stored = stored.get("dataset_meta") if isinstance(stored, Mapping) else None
        meta = stored if isinstance(stored, Mapping) and stored else meta
    model.dataset_meta = dict(meta or {})
    model.cfg = cfg
    model = model.to(device).eval()
    freeze_where_possible(model)
    return model


def plain_config(cfg: Config) -> Config:
    """The same model with a plain Vim of the same sizes as backbone.

    Raises:
        ValueError: If the config's model has no :class:`ScopeBackbone`.
    """
    if cfg.model.type not in PLAIN:
        raise ValueError(f"the config's model must be one of {', '.join(PLAIN)}, got {cfg.model.type!r}")
    plain = copy.deepcopy(cfg)
    plain.model.type = PLAIN[cfg.model.type]
    backbone = plain.model.backbone
    backbone.type = "VimBackbone"
    backbone.arch = backbone.arch.replace("mambascope_", "vim_")
    for name in ("gate", "threshold", "exit_prob", "coarse_resize", "init_cfg"):
        backbone.pop(name, None)
    fields = VimBackbone.archs[backbone.arch].__dataclass_fields__
    backbone.arch_options = {k: v for k, v in (backbone.get("arch_options") or {}).items() if k in fields}
    return plain


def image_pipeline(cfg: Config) -> Compose:
    """The config's test pipeline for images without annotations."""
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    return Compose(steps)


def load_image(pipeline: Compose, path: str | os.PathLike[str]) -> tuple[dict[str, Any], np.ndarray]:
    """One image as a batch for ``model.test_step``, and what the pipeline's first step read.

    Predictions are in the pixels of that: RGB [H, W, 3], 0 to 1.

    Raises:
        ValueError: If the file is missing or no image.
    """
    if not Path(path).is_file():
        raise ValueError(f"image {path} does not exist")
    data: dict[str, Any] | None = {"img_path": str(path), "img_id": 0}
    image = None
    try:
        for step in pipeline.transforms:
            data = step(data)
            if data is None:
                raise ValueError("the pipeline leaves it out")
            if image is None and "img" in data:
                image = np.array(data["img"], dtype=np.float32) / 255
    except DataError:
        raise
    except (OSError, ValueError, AttributeError, AssertionError, cv2.error) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"image {path} cannot be read: {reason}") from None
    assert image is not None
    grey = image.ndim == 2 or image.shape[2] == 1
    rgb = image.reshape(*image.shape[:2], 1).repeat(3, 2) if grey else image[..., 2::-1]
    return pseudo_collate([data]), rgb.clip(0, 1)


def scope_backbone(model: Any) -> ScopeBackbone:
    """The model's :class:`ScopeBackbone` with a gate; ``ValueError`` if it has none."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ScopeBackbone) or backbone.gate is None:
        raise ValueError(f"the config's model must have a ScopeBackbone with a gate, got {type(backbone).__name__}")
    return backbone
