"""How much the coarse answer counts in images that both looks were taken at (``coarse_weight``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.models.two_stage import is_two_stage
from mambascope.utils import evaluating, model_device, unpack

WEIGHTS = tuple(i / 20 for i in range(21))
FEWEST = 500  # images; fewer leave the model's own weight


def best_weight(coarse: Tensor, fine: Tensor, confidence: Tensor, labels: Tensor) -> float:
    """The weight of the coarse log-probabilities with which both answers together are likeliest to be right.

    Judged by the cross entropy on the half of the images that the coarse look is least sure of: those that are refined.

    Args:
        coarse: Coarse logits [N, C].
        fine: Logits [N, C] of the fine look alone.
        confidence: Of the coarse look [N].
        labels: Classes [N].

    Returns:
        One of :data:`WEIGHTS`.
    """
    unsure = confidence.argsort()[: max(1, len(labels) // 2)]
    first, second, y = coarse[unsure].log_softmax(1), fine[unsure].log_softmax(1), labels[unsure]
    losses = [float(F.cross_entropy(second + weight * first, y)) for weight in WEIGHTS]
    return WEIGHTS[losses.index(min(losses))]


def fit_coarse_weight(model: Any, loader: Iterable[Any]) -> float:
    """:func:`best_weight` of a model on images [B, C, H, W] and labels [B]; the model is left as it is.

    Every other image is left out, for a threshold to be promised on (:mod:`mambascope.evaluation.promise`): what was
    fitted to promises nothing. With fewer than :data:`FEWEST` images in use, or nothing to refine, the model's own
    weight.
    """
    if not is_two_stage(model) or model.alpha == 0 or not model.has_classifier:
        return float(getattr(model, "coarse_weight", 0.0))
    before, device = model.coarse_weight, model_device(model)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    try:
        model.coarse_weight = 0.0
        with evaluating(model):
            for batch in loader:
                images, labels = unpack(batch)
                output = model.forward_scope(images.to(device), 1.0)
                parts = (output.coarse_logits, output.logits, output.confidence)
                coarse, fine, confidence = (part.double().cpu() for part in parts)
                rows.append((coarse, fine, confidence, labels.cpu().long()))
    finally:
        model.coarse_weight = before
    if (sum(len(row[3]) for row in rows) + 1) // 2 < FEWEST:
        return before
    coarse, fine, confidence, labels = (torch.cat(parts)[::2] for parts in zip(*rows, strict=True))
    return best_weight(coarse, fine, confidence, labels)
