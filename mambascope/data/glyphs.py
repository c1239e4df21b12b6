"""The handwritten digit scans that scikit-learn ships, and how they are enlarged.

1,797 scans of 8×8 pixels with values 0–16 (UCI "Optical Recognition of Handwritten Digits", the part that is
installed with scikit-learn: nothing is downloaded).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
SCAN_SIDE = 8
NUM_CLASSES = 10
VAL_SCANS = 450
_SPLIT_SEED = 20240607  # never change: it decides which scans are test scans


class Scans(NamedTuple):
    """Scans of one split.

    ``images`` [n, 8, 8] float32 in 0–1, ``labels`` [n] int64, ``source`` [n] int64 (row in scikit-learn's table),
    ``by_class``: for each of the ten digits the rows of this split.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    source: NDArray[np.int64]
    by_class: tuple[NDArray[np.int64], ...]


def check_split(split: str) -> Split:
    """Returns the split, or raises ``ValueError`` naming the accepted ones."""
    for name in get_args(Split):
        if split == name:
            return name
    raise ValueError(f"split must be 'train' or 'val', got {split!r}")


@lru_cache(maxsize=1)
def _all_scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    # imported here: scikit-learn takes half a second that no other reader should pay
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def split_rows(split: str) -> NDArray[np.int64]:
    """Rows of scikit-learn's table that belong to a split: 1,347 for training, 450 for testing, stratified by class.

    The split is fixed: it depends on no seed of the data set, so that no setting can leak test scans into training.
    """
    split = check_split(split)
    _, labels = _all_scans()
    rng = np.random.default_rng(_SPLIT_SEED)
    quantile = np.empty(len(labels))
    for digit in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == digit)
        quantile[rng.permutation(rows)] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.argsort(quantile, kind="stable")  # the first rows hold the same share of every class
    return np.sort(order[:VAL_SCANS] if split == "val" else order[VAL_SCANS:])


@lru_cache(maxsize=2)
def load_scans(split: str) -> Scans:
    """The scans of a split (read-only arrays, kept in memory)."""
    images, labels = _all_scans()
    rows = split_rows(split)
    scans = Scans(
        images[rows], labels[rows], rows, tuple(np.flatnonzero(labels[rows] == digit) for digit in range(NUM_CLASSES))
    )
    arrays: list[NDArray[Any]] = [scans.images, scans.labels, scans.source, *scans.by_class]
    for array in arrays:
        array.setflags(write=False)
    return scans


@lru_cache(maxsize=4096)
def resize_matrix(n_in: int, n_out: int) -> NDArray[np.float32]:
    """Cubic-convolution weights [n_out, n_in] that enlarge ``n_in`` samples to ``n_out`` (pixel centres aligned).

    Rows sum to one; beyond the border the outermost sample is repeated. The filter widens when ``n_out < n_in``.
    """
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre = (np.arange(n_out) + 0.5) * scale - 0.5
    taps = np.arange(int(np.floor(centre.min() - 2 * width)), int(np.ceil(centre.max() + 2 * width)) + 1)
    d = np.abs(centre[:, None] - taps[None, :]) / width
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    kernel = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    weights = np.zeros((n_out, n_in))
    np.add.at(weights.T, np.clip(taps, 0, n_in - 1), kernel.T)
    weights /= weights.sum(1, keepdims=True)
    result = weights.astype(np.float32)
    result.setflags(write=False)
    return result


@lru_cache(maxsize=256)
def blur_matrix(n: int) -> NDArray[np.float32]:
    """Gaussian blur of one pixel's width as a symmetric matrix [n, n]."""
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    weights = np.exp(-0.5 * distance.astype(np.float64) ** 2) / np.sqrt(2 * np.pi)
    result = weights.astype(np.float32)
    result.setflags(write=False)
    return result


def enlarge(scan: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Opacity [height, width] in 0–1 of a scan (or a part of one) at the given size in pixels."""
    alpha: NDArray[Any] = resize_matrix(scan.shape[0], height) @ scan @ resize_matrix(scan.shape[1], width).T
    # a little gain: pen strokes become opaque, the cubic filter's small ripples around them vanish
    alpha *= 1.3
    alpha -= 0.08
    return alpha.clip(0.0, 1.0)
