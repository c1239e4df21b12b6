"""When the coarse answer is accepted (MambaScope section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambascope.utils import as_number

CONFIDENCES = ("max", "margin", "entropy")


def check_threshold(threshold: Any) -> float:
    """Returns the threshold as a float, or raises ``ValueError`` if it is no number."""
    if type(threshold) is float and not math.isnan(threshold):  # what torch.compile can follow
        return threshold
    number = as_number(threshold)
    if number is None:
        raise ValueError(f"threshold must be a number (<= 0 always exits, >= 1 always refines), got {threshold!r}")
    return number


def check_temperature(temperature: Any) -> float:
    """Returns the temperature as a float, or raises ``ValueError`` if it is no positive number."""
    number = as_number(temperature)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    return number


def confidence(logits: Tensor, rule: str = "max", temperature: float = 1.0) -> Tensor:
    """How sure logits [B, C] are, 0 to 1 per image [B], in at least fp32.

    Args:
        logits: [B, C].
        rule: ``max``: the largest class probability (the paper's). ``margin``: by how much it exceeds the second one.
            ``entropy``: 1 less the entropy as a share of the largest possible one, ``log C``.
        temperature: Divides the logits first (Guo et al., arXiv 1706.04599).

    Raises:
        ValueError: For an unknown rule, or a rule other than ``max`` with fewer than two classes.
    """
    if rule not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {rule!r}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    if rule == "max":
        return logits.softmax(-1).amax(-1)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"confidence {rule!r} needs at least two classes, got {classes}")
    if rule == "margin":
        first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second
    log_p = logits.log_softmax(-1)
    return (1 + (log_p.exp() * log_p).sum(-1) / math.log(classes)).clamp(0, 1)  # a sum may round below 0


def exit_mask(conf: Tensor, threshold: float) -> Tensor:
    """Which images [B] leave after the coarse stage: ``conf >= threshold``.

    A threshold of 0 or less always exits and one of 1 or more never does, whatever the confidences round to.
    """
    threshold = check_threshold(threshold)
    if threshold <= 0:
        return torch.ones_like(conf, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(conf, dtype=torch.bool)
    return conf >= threshold
