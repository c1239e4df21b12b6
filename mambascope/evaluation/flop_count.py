"""Multiply-adds counted by ``torch.utils.flop_counter`` on the running model, to check the closed form of ``cost``.

The counter sees matrix products, convolutions and, through the formulas in :mod:`mambascope.ops.flops`, the operators
of this package. It counts two operations per multiply-add; half of that is returned. Compared with the closed form it
also sees the classifier head, and it does not see patches and coarse outputs of cells that were left out, because the
model never computes them (:func:`mambascope.evaluation.cost.skipped_macs`), and skip term and gate of blocks that scan
the means of cells once per cell only: :func:`expected_count` puts all of them right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mambascope.evaluation.collect import evaluating, model_device
from mambascope.evaluation.cost import skipped_macs, stage_macs
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.ops import flops


@dataclass(frozen=True)
class CountedCost:
    """Multiply-adds of one image; a one-stage model has 0 in ``coarse``."""

    coarse: int
    fine: int


def count_macs(model: VisionMamba, img_size: Sequence[int] | None = None) -> CountedCost:
    """Runs one image of zeros through each stage under the counter.

    Args:
        model: on any device; its current alpha counts.
        img_size: (height, width) in pixels; default: the model's.
    """
    height, width = img_size or model.config.image_hw
    image = torch.zeros(1, model.in_chans, height, width, device=model_device(model))
    with evaluating(model):
        if not isinstance(model, MambaScope):
            return CountedCost(0, flops.count_macs(model, image))
        coarse = flops.count_macs(model.forward_coarse, image)
        return CountedCost(coarse, flops.count_macs(model.forward_fine, image, model.forward_coarse(image)))


def expected_count(model: VisionMamba, img_size: Sequence[int] | None = None) -> CountedCost:
    """What :func:`count_macs` must give by the closed form: both directions, with the head, without what is skipped."""
    head = model.embed_dim * model.num_classes
    if not isinstance(model, MambaScope):
        return CountedCost(0, stage_macs(model.config, img_size, convention="both_directions").fine + head)
    cost = stage_macs(model.config, img_size, model.alpha, "both_directions")
    # skip term and gate are 2 E per token and direction; a cell has four tokens
    pooled = 2 * 2 * model.config.inner_dim * 3 * cost.cells * len(model.config.pooled_layers)
    skipped = skipped_macs(model.config, img_size, model.alpha) + pooled
    return CountedCost(cost.coarse + head, cost.reuse + cost.fine - skipped + head)
