"""Cost of a Vim with token reduction: the closed form, and the share of the scans that ran where images differ in it.

The sequence shrinks from block to block, and what the method computes to decide (similarities, predictors, switches) is
added. Where it switches scans off per image, the scan part of each block is multiplied by the share that ran.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mambascope.models.cost import (
    CONVENTIONS,
    StageCost,
    count_parameters,
    embedding_macs,
    stage_macs,
    token_macs,
    vim_grid,
)
from mambascope.peers.config import ReducedConfig
from mambascope.utils import evaluating, model_device, unpack


def reduced_macs(
    config: ReducedConfig, patches: int, convention: str = "one_direction", scan_share: Sequence[float] | None = None
) -> int:
    """Multiply-adds of an image of `patches` patches.

    Args:
        config: Of the model.
        patches: Patches of the image.
        convention: ``"one_direction"`` or ``"both_directions"``.
        scan_share: Share of the scans that ran, per block; default: all.

    Raises:
        ValueError: If the convention is unknown, or there is not one share in [0, 1] per block.
    """
    shares = [1.0] * config.depth if scan_share is None else list(scan_share)
    if len(shares) != config.depth or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"scan_share must be {config.depth} numbers in [0, 1], one per block, got {shares}")
    projections, scans = token_macs(config, convention)
    counts = config.reduction.patch_counts(patches, config.depth)
    blocks = sum((count + 1) * (projections + share * scans) for count, share in zip(counts, shares, strict=True))
    return (
        round(blocks)
        + patches * embedding_macs(config)
        + config.reduction.extra_macs(config.sizes, patches, 1 + CONVENTIONS.index(convention))
    )


@stage_macs.register
def reduced_cost(
    config: ReducedConfig,
    img_size: int | Sequence[int] | None = None,
    alpha: None = None,
    convention: str = "one_direction",
    scan_share: Sequence[float] | None = None,
) -> StageCost:
    """Cost of one image: the form of :func:`mambascope.models.cost.stage_macs` for a Vim with token reduction.

    Args:
        config: Of the model.
        img_size: Side or (height, width) in pixels; default ``config.img_size``.
        alpha: ``None``: there is one stage.
        convention: ``"one_direction"`` (published) or ``"both_directions"`` (honest).
        scan_share: Share of the scans that ran, per block; default: all.

    Raises:
        ValueError: If an argument is outside what is accepted.
    """
    if alpha is not None:
        raise ValueError("alpha applies to MambaScope models only; a Vim with token reduction has one stage")
    patches = math.prod(vim_grid(config, img_size))
    macs = reduced_macs(config, patches, convention, scan_share)
    return StageCost(convention, count_parameters(config), 0, patches + 1, 0, 0, macs)


def scan_share(model: Any, batches: Iterable[Any]) -> tuple[float, ...] | None:
    """Share of the scans of every block that ran, mean over images and directions.

    Args:
        model: A Vim with token reduction, on any device.
        batches: Pairs of images [B, C, H, W] and labels [B].

    Returns:
        One share in [0, 1] per block, as :func:`reduced_cost` takes them; ``None`` for a model that runs every scan:
        nothing had to be measured.

    Raises:
        ValueError: If there are no images, or the batches are something else.
    """
    if not switches_scans(model):
        return None
    total, images_seen = torch.zeros(model.config.depth, dtype=torch.float64), 0
    with evaluating(model):
        for batch in batches:
            images, _ = unpack(batch)
            switches = model.forward_reduced(images.to(model_device(model))).switches
            total += switches.double().mean(2).sum(0).cpu()
            images_seen += len(images)
    if not images_seen:
        raise ValueError("there are no images to measure the share of scans on")
    return tuple((total / images_seen).tolist())


def switches_scans(model: Any) -> bool:
    """Whether the model decides per image which scans run."""
    return bool(getattr(model.reduction, "switches", ()))
