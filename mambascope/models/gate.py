"""When the coarse answer is accepted (MambaScope section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mambascope.utils import as_number


def check_threshold(threshold: Any) -> float:
    """Returns the threshold as a float, or raises ``ValueError`` if it is no number."""
    if type(threshold) is float and not math.isnan(threshold):  # what torch.compile can follow
        return threshold
    number = as_number(threshold)
    if number is None:
        raise ValueError(f"threshold must be a number (<= 0 always exits, >= 1 always refines), got {threshold!r}")
    return number


def confidence(logits: Tensor) -> Tensor:
    """The largest class probability of logits [B, C], per image [B] in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).amax(-1)


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
