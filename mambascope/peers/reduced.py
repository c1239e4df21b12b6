"""What a model with token reduction really did: the share of scans that ran, where that differs between images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mambascope.models.vim import VisionMamba
from mambascope.utils import evaluating, model_device, unpack


def scan_share(model: Any, loader: Iterable[Any]) -> tuple[float, ...] | None:
    """Share of the scans of every block that ran, mean over images and directions.

    Args:
        model: on any device.
        loader: gives (images [B, C, H, W], labels [B]).

    Returns:
        One share in [0, 1] per block, as :func:`mambascope.models.cost.stage_macs` takes them; ``None`` for a model
        that runs every scan (also one without reduction): nothing had to be measured.

    Raises:
        ValueError: the loader is empty or gives something else.
    """
    if not switches_scans(model):
        return None
    total, images_seen = torch.zeros(model.config.depth, dtype=torch.float64), 0
    with evaluating(model):
        for batch in loader:
            images, _ = unpack(batch)
            switches = model.forward_reduced(images.to(model_device(model))).switches
            assert switches is not None
            total += switches.double().mean(2).sum(0).cpu()
            images_seen += len(images)
    if not images_seen:
        raise ValueError("there are no images to measure the share of scans on")
    return tuple((total / images_seen).tolist())


def switches_scans(model: Any) -> bool:
    """Whether the model decides per image which scans run."""
    reduced = isinstance(model, VisionMamba) and model.reduction is not None
    return reduced and bool(getattr(model.reduction, "switches", ()))
