"""Temperature of the exit gate: one scalar that makes the coarse stage's confidences honest (Guo et al., 1706.04599).

N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mambascope.evaluation.collect import evaluating, model_device, unpack
from mambascope.models.scope import MambaScope

BOUNDS = (0.05, 20.0)
"""Temperatures that are considered."""
_DEVIATIONS = 1.96  # of a 95 % interval


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
        model: on any device; only its ``temperature`` changes.
        loader: gives images [B, C, H, W] and labels [B] that the model was not trained on.

    Raises:
        ValueError: the loader is empty or gives something else, a logit is NaN or inf, or there are too few images
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
    if not BOUNDS[0] * 1.001 < found < BOUNDS[1] / 1.001 or 1 / found <= _DEVIATIONS * _deviation(z, found):
        raise ValueError(
            f"{len(z):,} images do not tell the temperature: the fit gives {found:.3g}, and an infinite one is within "
            "its 95 % interval or it has left the accepted range; use more images"
        )
    model.temperature = found
    return found


def _deviation(logits: Tensor, temperature: float) -> float:
    """Standard deviation of the fitted inverse temperature, from the curvature of the cross entropy at it."""
    z = logits.double()
    weights = (z / temperature).softmax(1)
    return float(((weights * z.square()).sum(1) - (weights * z).sum(1).square()).sum()) ** -0.5
