"""Temperature of the exit gate: one scalar that makes the coarse stage's confidences honest (Guo et al., 1706.04599).

N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.models.scope import MambaScope
from mambascope.utils import evaluating, model_device, unpack

BOUNDS = (0.05, 20.0)
"""Temperatures that are considered."""
_CHI_SQUARE = 3.84  # 95 % quantile with one degree of freedom


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which logits [N, C] have the smallest cross entropy with labels [N], within :data:`BOUNDS`.

    Cross entropy is convex in the inverse temperature, so that the root of its slope is found by bisection.

    Raises:
        ValueError: No images, shapes that do not belong together, or logits that are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits must be [N, C] and labels [N] with N > 0, got {list(logits.shape)} and {list(labels.shape)}"
        )
    z = logits.detach().double()
    if not bool(z.isfinite().all()):
        raise ValueError("logits must be finite: the model returned NaN or inf")
    own = z.gather(1, labels.to(z.device).unsqueeze(1)).squeeze(1)
    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]
    for _ in range(60):
        inverse = (low * high) ** 0.5
        expected = ((inverse * z).softmax(1) * z).sum(1)
        low, high = (low, inverse) if float((expected - own).mean()) > 0 else (inverse, high)
    return 1 / (low * high) ** 0.5


def calibrate(model: MambaScope, loader: Iterable[Any]) -> float:
    """Fits the temperature of a model's gate on held-out images, sets it and returns it.

    Args:
        model: On any device; only its ``temperature`` changes.
        loader: Gives images [B, C, H, W] and labels [B] that the model was not trained on.

    Raises:
        ValueError: The loader is empty or gives something else, a logit is NaN or inf, or there are too few images
            to tell the temperature from an infinite one.
    """
    device = model_device(model)
    logits, labels = [], []
    with evaluating(model):
        for images, y in map(unpack, loader):
            logits.append(model.forward_coarse(images.to(device)).logits.float().cpu())
            labels.append(y.cpu().long())
    if not logits:
        raise ValueError("there are no images to fit the temperature on")
    z = torch.cat(logits)
    found = fit_temperature(z, torch.cat(labels))
    # what the temperature explains, against an infinite one at which every class is as likely: a likelihood ratio test
    explained = len(z) * log(z.shape[1]) - float(F.cross_entropy(z / found, torch.cat(labels), reduction="sum"))
    if not BOUNDS[0] * 1.001 < found < BOUNDS[1] / 1.001 or 2 * explained < _CHI_SQUARE:
        raise ValueError(
            f"{len(z):,} images do not tell the temperature: the fit gives {found:.3g}, which is at the end of the "
            "accepted range or no better than an infinite one; use more images"
        )
    model.temperature = found
    return found
