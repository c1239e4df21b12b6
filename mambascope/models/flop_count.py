"""Multiply-adds counted by ``torch.utils.flop_counter`` on the running model, to check the closed form of ``cost``.

The counter sees matrix products, convolutions and, through the formulas in :mod:`mambascope.ops.flops`, the operators
of this package. It counts two operations per multiply-add; half of that is returned. Compared with the closed form it
also sees the classifier head, and it does not see patches and coarse outputs of cells that were left out, because the
model never computes them (:func:`mambascope.models.cost.skipped_macs`): :func:`expected_count` puts both right.

Models that have no closed form here, such as timm's DeiT and ResNet, are counted: :func:`costs_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambascope.models.cost import CONVENTIONS, StageCost, head_macs, skipped_macs, stage_macs
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.ops import flops
from mambascope.utils import evaluating, model_device


@dataclass(frozen=True)
class CountedCost:
    """Multiply-adds of one image; a one-stage model has 0 in ``coarse``."""

    coarse: int
    fine: int


def count_macs(model: Any, img_size: Sequence[int] | None = None) -> CountedCost:
    """Runs one image of zeros through each stage under the counter.

    Args:
        model: On any device; its current alpha counts.
        img_size: (height, width) in pixels; default: the model's.
    """
    height, width = img_size or model.config.image_hw
    image = torch.zeros(1, model.config.in_chans, height, width, device=model_device(model))
    # the counter does not know every fused attention kernel; it does know the matrix products
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        if not isinstance(model, MambaScope):
            return CountedCost(0, flops.count_macs(model, image))
        coarse = flops.count_macs(model.forward_coarse, image)
        return CountedCost(coarse, flops.count_macs(model.forward_fine, image, model.forward_coarse(image)))


def expected_count(model: VisionMamba, img_size: Sequence[int] | None = None) -> CountedCost:
    """What :func:`count_macs` must give by the closed form: both directions, with the head, without what is skipped."""
    if not isinstance(model, MambaScope):
        cost = stage_macs(model.config, img_size, convention="both_directions")
        return CountedCost(0, cost.fine + head_macs(model.config, cost.tokens_fine))
    cost = stage_macs(model.config, img_size, model.alpha, "both_directions")
    skipped = skipped_macs(model.config, img_size, model.alpha)
    first, last = (head_macs(model.config, tokens) for tokens in (cost.tokens_coarse, cost.tokens_fine))
    return CountedCost(cost.coarse + first, cost.reuse + cost.fine - skipped + last)


def costs_of(
    model: Any,
    img_size: Sequence[int] | None = None,
    alpha: float | None = None,
    batches: Iterable[Any] | None = None,
) -> dict[str, StageCost]:
    """Cost per convention: closed form for the models of this package, counted for others.

    A model whose cost depends on its images says it itself: ``stage_costs(img_size, batches)``.

    Args:
        model: A classifier with a ``config``.
        img_size: (height, width) in pixels; default: the model's.
        alpha: Share of cells that a MambaScope refines; default: its current one.
        batches: Pairs of images [B, C, H, W] and labels [B] to measure such a model on; ``None`` for the most that it
            can cost.
    """
    if hasattr(model, "stage_costs"):
        return model.stage_costs(img_size, batches)
    if isinstance(model, VisionMamba):
        if isinstance(model, MambaScope) and alpha is None:
            alpha = model.alpha
        return {c: stage_macs(model.config, img_size, alpha, c) for c in CONVENTIONS}
    # nothing in them runs in two directions: both conventions are the same
    macs, params = count_macs(model, img_size).fine, sum(p.numel() for p in model.parameters())
    return {c: StageCost(c, params, 0, 0, 0, 0, macs) for c in CONVENTIONS}
