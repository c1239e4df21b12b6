"""A threshold with a promise: risk control on finitely many images.

Learn then Test (arXiv 2110.01052), as for early exits (arXiv 2405.20915). Thresholds that were fixed before any image
was seen are tested from the safest on, where every image is refined, to lower ones; the first that cannot be shown to
be safe ends it, and the one before is taken. Each test may err as often as the whole may (a fixed sequence needs no
correction), so that the accuracy on new images of the same kind drops by more than was promised with at most the
probability that was stated, whatever the model.

What is tested: a drop of accuracy is at most the probability of losing an image, of answering wrongly what the fine
look would have answered rightly, so a drop above the target means that more images than that are lost, of which few
among n are improbable: an exact binomial test. Tests that count won images too (both bounds at half the risk; betting,
arXiv 2010.09686) refined as many images or more on the built-in data at 1,000 to 5,000 images.
"""

from __future__ import annotations

from math import ceil, log

import numpy as np

from mambascope.evaluation.sweep import StageRecord

GRID: tuple[float, ...] = (1.0, *(1 - np.geomspace(1e-6, 1, 241)).tolist())
"""Thresholds in the order in which they are tested: dense near 1, where confidences are."""


def images_to_promise(drop: float, confidence: float) -> int:
    """The fewest images with which a drop (0 to 1, exclusive) can be promised, none of them being lost.

    The p-value of none of n is ``(1 - drop)**n``: 598 images for half a point with a confidence of 0.95.
    """
    return ceil(log(1 - confidence) / log(1 - drop))


def promised_threshold(record: StageRecord, drop: float, confidence: float) -> float:
    """The threshold that refines fewest images with the promise kept.

    Args:
        record: Both stages' answers on N images that nothing was fitted to.
        drop: How much lower top-1 may be than with every image refined, 0 to 1, exclusive.
        confidence: How probable the promise must be, 0 to 1, exclusive.

    Returns:
        One of :data:`GRID`; 1 where nothing below can be promised.

    Raises:
        ValueError: Too few images to promise anything.
    """
    from scipy.stats import binom

    images, needed = len(record), images_to_promise(drop, confidence)
    if images < needed:
        raise ValueError(
            f"{images:,} images are too few to promise a drop of at most {100 * drop:g} points with a confidence of "
            f"{confidence:g}: {needed:,} are needed, and more where some are lost"
        )
    worse = np.sort(record.confidence[record.fine_correct & ~record.coarse_correct])
    safe = GRID[0]
    for eta in GRID[1:]:
        lost = len(worse) - int(np.searchsorted(worse, eta, side="left"))  # those that leave: confidence >= eta
        if binom.cdf(lost, images, drop) > 1 - confidence:
            break
        safe = eta
    return safe
