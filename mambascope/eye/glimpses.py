"""Glimpse sequences for MambaEye (arXiv 2511.19963): which patches of a canvas are read in which order, and how much of
the image they have shown.

Positions are (row, column) of a patch's top left pixel on the canvas. Shape letters: B batch, L glimpses, C channels, H
and W canvas height and width, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mambascope.data.errors import DataError
from mambascope.eye.patterns import GRID_ORDERS, resolve_pattern
from mambascope.eye.placement import Placement

Positions: TypeAlias = NDArray[np.int64]
Seed: TypeAlias = int | Sequence[int] | np.random.Generator


def _generator(seed: Seed) -> np.random.Generator:
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)


def _lines(start: int, end: int, patch_size: int) -> NDArray[np.int64]:
    """Positions a patch apart; the last is moved back to end with the area, overlapping the one before."""
    lines = np.arange(start, max(end, start + 1), patch_size, dtype=np.int64)
    lines[-1] = min(lines[-1], max(start, end - patch_size))
    return lines


def _check_counts(length: int, patch_size: int) -> None:
    for name, value in (("length", length), ("patch_size", patch_size)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} must be a positive integer, got {value!r}")


def scan_positions(
    pattern: str,
    length: int,
    placement: Placement,
    *,
    patch_size: int = 16,
    seed: Seed = 0,
    region: tuple[int, int, int, int] | None = None,
    compat: bool = False,
) -> Positions:
    """Glimpse positions of a scan pattern over an image.

    ``random`` draws independent positions at single pixels. The other patterns walk over a grid whose last row and
    column end with the image; a walk shorter than ``length`` is repeated.

    Args:
        pattern: One of :data:`mambascope.eye.patterns.PATTERNS`, or a name of the public code.
        length: L.
        placement: Where the image lies.
        patch_size: P.
        seed: Seed or generator of ``random`` and ``random_grid``.
        region: Part of the placed image to scan: (top, left, height, width) in its pixels. ``None`` for all of it.
        compat: Reproduce the published evaluation: its scan area, which misses the last P - 1 rows and columns of an
            image that reaches the canvas's edge, and its reading of ``column_snake``.

    Returns:
        [L, 2] int64.

    Raises:
        DataError: If an argument does not have an accepted value.
    """
    _check_counts(length, patch_size)
    try:
        name = resolve_pattern(pattern, compat)
    except ValueError as error:
        raise DataError(str(error)) from None
    spans = placement.spans(patch_size, region, compat)
    if name == "random":
        rng = _generator(seed)
        axes = [rng.integers(start, max(start, end - patch_size), length, endpoint=True) for start, end in spans]
        return np.stack(axes, axis=1)
    rows, columns = (_lines(start, end, patch_size) for start, end in spans)
    if name == "random_grid":
        order = _generator(seed).permutation(GRID_ORDERS["row_raster"](len(rows), len(columns)))
    else:
        order = GRID_ORDERS[name](len(rows), len(columns))
    order = order[np.arange(length) % len(order)]
    return np.stack([rows[order[:, 0]], columns[order[:, 1]]], axis=1)


def training_positions(
    length: int, placement: Placement, *, patch_size: int = 16, seed: Seed = 0, localised: float = 0.5
) -> Positions:
    """Random positions as in training: with probability ``localised`` over the image, else over the whole canvas.

    Unlike those of :func:`scan_positions` they may reach over the image's bottom and right edge into the padding.

    Returns:
        [L, 2] int64.
    """
    _check_counts(length, patch_size)
    if not 0 <= localised <= 1:
        raise DataError(f"localised must lie in [0, 1], got {localised!r}")
    rng = _generator(seed)
    spans = placement.spans(patch_size)  # checks the canvas
    if rng.random() >= localised:
        spans = ((0, placement.canvas[0]), (0, placement.canvas[1]))
    ends = (min(end, side - patch_size + 1) for (_, end), side in zip(spans, placement.canvas, strict=True))
    axes = [rng.integers(start, max(start + 1, end), length) for (start, _), end in zip(spans, ends, strict=True)]
    return np.stack(axes, axis=1)


def point_positions(
    points: ArrayLike,
    placement: Placement,
    *,
    patch_size: int = 16,
    anchor: str = "centre",
    coordinates: str = "image",
    clamp: bool = False,
) -> Positions:
    """Glimpse positions chosen by the user, e.g. from an eye tracker or a saliency map.

    Args:
        points: (row, column) pairs [L, 2].
        placement: Where the image lies.
        patch_size: P.
        anchor: Whether a point is the ``centre`` or the top left ``corner`` of its glimpse.
        coordinates: Whether points are in pixels of the original ``image`` or of the ``canvas``.
        clamp: Move glimpses that would leave the canvas back onto it, instead of refusing them.

    Returns:
        [L, 2] int64.

    Raises:
        DataError: If a glimpse does not lie inside the canvas, or an argument does not have an accepted value.
    """
    for name, value, accepted in (
        ("anchor", anchor, ("centre", "corner")),
        ("coordinates", coordinates, ("image", "canvas")),
    ):
        if value not in accepted:
            raise DataError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values) or not np.isfinite(values).all():
        raise DataError(f"points must be finite (row, column) pairs [L, 2], got shape {list(values.shape)}")
    if coordinates == "image":
        height, width = placement.source or (placement.height, placement.width)
        values = values * (placement.height / height, placement.width / width) + (placement.top, placement.left)
    if anchor == "centre":
        values = values - patch_size / 2
    positions = np.floor(values + 0.5).astype(np.int64)
    if clamp:
        positions = positions.clip(0, np.maximum(0, np.array(placement.canvas) - patch_size))
    return check_positions(positions, placement.canvas, patch_size)


def check_positions(positions: ArrayLike, canvas: tuple[int, int], patch_size: int) -> Positions:
    """Positions [L, 2] as int64.

    Raises:
        DataError: If they are not whole numbers, or a glimpse does not lie inside the canvas.
    """
    values = np.asarray(positions)
    if values.ndim != 2 or values.shape[1] != 2 or not np.issubdtype(values.dtype, np.integer) or not len(values):
        raise DataError(
            f"positions must be whole (row, column) pairs [L, 2], got shape {list(values.shape)} of {values.dtype}"
        )
    last = np.array(canvas) - patch_size
    outside = ((values < 0) | (values > last)).any(axis=1)
    if outside.any():
        first = int(outside.argmax())
        raise DataError(
            f"glimpses must lie inside the canvas of {canvas[0]}x{canvas[1]} pixels (rows 0..{last[0]}, columns "
            f"0..{last[1]} for patch size {patch_size}), but glimpse {first} is at ({values[first][0]}, "
            f"{values[first][1]}){'' if outside.sum() == 1 else f' and {int(outside.sum()) - 1} more are outside'}"
        )
    return values.astype(np.int64, copy=False)


def moves_from_positions(positions: ArrayLike, previous: tuple[int, int] | None = None) -> Tensor:
    """Displacements in pixels [..., L, 2] float32 of positions [..., L, 2].

    Args:
        positions: In the order of reading.
        previous: The position before the first, when a sequence continues; ``None`` makes the first move zero.
    """
    values = torch.as_tensor(np.asarray(positions), dtype=torch.int64)
    before = values[..., :1, :] if previous is None else torch.tensor(previous).expand_as(values[..., :1, :])
    return values.diff(dim=-2, prepend=before).to(torch.float32)


def extract_patches(canvas: Tensor, positions: ArrayLike | Tensor, patch_size: int = 16) -> Tensor:
    """Patches [L, C P P] in (channel, row, column) order, in the dtype of ``canvas``.

    Args:
        canvas: [C, H, W].
        positions: [L, 2].
        patch_size: P.

    Raises:
        DataError: If a glimpse does not lie inside the canvas.
    """
    if canvas.ndim != 3:
        raise DataError(f"canvas must be [C, H, W], got {list(canvas.shape)}")
    checked = check_positions(positions, (canvas.shape[1], canvas.shape[2]), patch_size)
    index = torch.from_numpy(checked).to(canvas.device)
    windows = canvas.unfold(1, patch_size, 1).unfold(2, patch_size, 1)
    return windows[:, index[:, 0], index[:, 1]].transpose(0, 1).flatten(1)


def information_ratio(positions: ArrayLike, placement: Placement, patch_size: int = 16) -> NDArray[np.float32]:
    """Share of the image's pixels that the first t glimpses have shown, for every t.

    Overlaps count once, padding not at all. Instead of painting patch after patch, each pixel looks up the earliest
    glimpse that covers it: a minimum over the P x P positions from which a patch reaches it, by doubling shifts.

    Args:
        positions: [L, 2] on the canvas.
        placement: Where the image lies.
        patch_size: P.

    Returns:
        [L], rising, at most 1.
    """
    values = check_positions(positions, placement.canvas, patch_size)
    length, reach = len(values), patch_size - 1
    height, width = placement.height, placement.width
    # positions from which a patch reaches the image, counted from the one that shows just its corner pixel
    rows = values[:, 0] - placement.top + reach
    columns = values[:, 1] - placement.left + reach
    shape = (height + reach, width + reach)
    step = np.arange(length)
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    # the smallest type keeps the passes below fast
    first = np.full(shape, length, dtype=np.uint16 if length < 2**16 else np.uint32)
    late_to_early = step[inside][::-1]  # of glimpses at one place, the last one written stays
    first[rows[late_to_early], columns[late_to_early]] = late_to_early
    for axis in (0, 1):
        covered = 1
        while covered < patch_size:
            shift = min(covered, patch_size - covered)
            near, far = (first[:-shift], first[shift:]) if axis == 0 else (first[:, :-shift], first[:, shift:])
            first = np.minimum(near, far)
            covered += shift
    counts = np.bincount(first.ravel(), minlength=length + 1)[:length].cumsum()
    return (counts / (height * width)).astype(np.float32)


class Coverage:
    """Information ratio kept up to date glimpse by glimpse, for glimpses that are chosen on the way.

    Args:
        placement: Where the image lies.
        patch_size: P.
    """

    def __init__(self, placement: Placement, patch_size: int = 16) -> None:
        self.placement = placement
        self.patch_size = patch_size
        self.seen = np.zeros((placement.height, placement.width), dtype=bool)
        self._count = 0

    @property
    def ratio(self) -> float:
        """Share of the image's pixels seen so far."""
        return self._count / self.seen.size

    def add(self, row: int, column: int) -> float:
        """Marks the glimpse at this canvas position as seen and returns the new ratio."""
        check_positions([[row, column]], self.placement.canvas, self.patch_size)
        top, left = row - self.placement.top, column - self.placement.left
        area = self.seen[max(top, 0) : max(top + self.patch_size, 0), max(left, 0) : max(left + self.patch_size, 0)]
        self._count += int(area.size - np.count_nonzero(area))
        area[:] = True
        return self.ratio


class GlimpseSequence(NamedTuple):
    """What the model reads of one image, or of a batch after collation.

    Attributes:
        patches: Pixels [L, C P P], uint8 or as the canvas.
        moves: Displacements in pixels [L, 2] float32.
        information_ratio: [L] float32.
        positions: On the canvas [L, 2] int64.
    """

    patches: Tensor
    moves: Tensor
    information_ratio: Tensor
    positions: Tensor


def make_sequence(canvas: Tensor, placement: Placement, positions: ArrayLike, patch_size: int = 16) -> GlimpseSequence:
    """Reads glimpses from a canvas [C, H, W] at positions [L, 2]."""
    checked = check_positions(positions, placement.canvas, patch_size)
    return GlimpseSequence(
        extract_patches(canvas, checked, patch_size),
        moves_from_positions(checked),
        torch.from_numpy(information_ratio(checked, placement, patch_size)),
        torch.from_numpy(checked),
    )
