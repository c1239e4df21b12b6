"""What a number of images can decide about a threshold, by exact binomial bounds (Clopper and Pearson, 1934)."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log
from typing import Any

import numpy as np

from mambascope.evaluation.promise import images_to_promise
from mambascope.evaluation.sweep import StageRecord, Target

CONFIDENCE = 0.95
SMALLEST_DROP = 0.005  # half a point: what a target of no drop at all is for, on other images
WIDEST_SHARE = 0.5  # an interval of the share refined that says more than nothing is narrower


def binomial_interval(hits: int, images: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Two-sided interval of a probability, 0 to 1, after `hits` of `images`; all of [0, 1] without images."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, images - hits + 1))
    high = 1.0 if hits == images else float(beta.ppf(1 - tail, hits + 1, images - hits))
    return low, high


def images_for_drop(drop: float) -> int:
    """The fewest images that can show, none of them being lost, that less than `drop` (0 to 1) of all are lost.

    The one-sided bound after 0 of n is ``1 - (1 - confidence)**(1 / n)``: 598 images for half a point.
    """
    drop = min(max(drop, SMALLEST_DROP), 1.0)
    return 1 if drop == 1 else ceil(log(1 - CONFIDENCE) / log(1 - drop))


def images_for_share() -> int:
    """The fewest images whose share refined is known to better than :data:`WIDEST_SHARE`, whatever it is."""
    images = 1
    while np.subtract(*binomial_interval(images // 2, images)[::-1]) >= WIDEST_SHARE:
        images += 1
    return images


def images_needed(target: Target) -> int:
    """How many images can decide which threshold meets a target; fewer leave the model's own in place."""
    if target.confidence is not None:
        return images_to_promise(target.value, target.confidence)
    return images_for_drop(target.value) if target.kind == "acc_drop" else images_for_share()


def drop_interval(lost: int, won: int, images: int) -> tuple[float, float]:
    """Interval of a drop of accuracy, -1 to 1, where `lost` images became wrong and `won` became right."""
    each = (1 + CONFIDENCE) / 2  # both bounds hold together with the confidence
    (lost_low, lost_high), (won_low, won_high) = (binomial_interval(k, images, each) for k in (lost, won))
    return lost_low - won_high, lost_high - won_low


def describe_choice(target: Target, record: StageRecord, eta: float, model_eta: float) -> dict[str, Any]:
    """What the report and the weights say about a threshold that was chosen on `record`.

    Args:
        target: What it was chosen for.
        record: Both stages' answers.
        eta: The threshold in use.
        model_eta: The model's own, which stays where the images are too few.
    """
    n, needed = len(record), images_needed(target)
    refined = (record.confidence < eta) | (eta >= 1) if eta > 0 else np.zeros(n, dtype=bool)
    lost = int((~refined & record.fine_correct & ~record.coarse_correct).sum())
    won = int((~refined & record.coarse_correct & ~record.fine_correct).sum())
    rule = target.describe()
    if target.confidence is not None and eta >= 1:
        rule += f"; no threshold below 1 can be promised on {n:,} images"
    if n < needed:
        rule = f"the model's own {model_eta:g} stays: {n:,} images are too few to choose ({rule}); {needed:,} can"
    return {
        "threshold": eta,
        "rule": rule,
        "decided": n >= needed,
        "images": n,
        "images_needed": needed,
        "drop": (lost - won) / n,
        "drop_interval": list(drop_interval(lost, won, n)),
        "share_refined": float(refined.mean()),
        "share_interval": list(binomial_interval(int(refined.sum()), n)),
        "confidence": CONFIDENCE,  # of the intervals
        "promised_confidence": target.confidence,
    }


def interval_text(choice: Mapping[str, Any]) -> str:
    """Drop and share at the threshold with their intervals, in words."""
    low, high = (100 * v for v in choice["drop_interval"])
    least, most = (100 * v for v in choice["share_interval"])
    return (
        f"there a drop of {100 * choice['drop']:.2f} points ({100 * choice['confidence']:g} % interval {low:.2f} to "
        f"{high:.2f}) with {100 * choice['share_refined']:.0f} % refined ({least:.0f} to {most:.0f})"
    )


def stored_rule(model: Any) -> str | None:
    """Which rule chose the threshold that a model has now, as its weights say; ``None`` if they do not."""
    choice = (model.description.get("report") or {}).get("choice") or {}
    return choice.get("rule") if choice.get("threshold") == model.threshold else None
