"""Orders in which glimpses visit a grid of rows and columns, named by what they do.

Every function returns an array [rows * columns, 2] of (row, column) indices that visits each cell once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Order = NDArray[np.int64]


def _cells(rows: int, columns: int) -> Order:
    """All cells row by row as [rows, columns, 2]."""
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).astype(np.int64)


def row_raster(rows: int, columns: int) -> Order:
    """Row by row, each left to right."""
    return _cells(rows, columns).reshape(-1, 2)


def column_raster(rows: int, columns: int) -> Order:
    """Column by column, each top to bottom."""
    return _cells(rows, columns).swapaxes(0, 1).reshape(-1, 2)


def row_snake(rows: int, columns: int) -> Order:
    """Row by row, left to right and back in turn."""
    cells = _cells(rows, columns)
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells.reshape(-1, 2)


def column_snake(rows: int, columns: int) -> Order:
    """Column by column, down and up in turn."""
    return row_snake(columns, rows)[:, ::-1].copy()


def diagonal(rows: int, columns: int) -> Order:
    """Anti-diagonals from the top left corner, each from its top right end to its bottom left one."""
    cells = row_raster(rows, columns)
    return cells[np.lexsort((cells[:, 0], cells.sum(1)))]


def spiral(rows: int, columns: int) -> Order:
    """Inwards from the top left corner: down, right, up, left."""
    top, left, bottom, right = 0, 0, rows - 1, columns - 1
    path: list[tuple[int, int]] = []
    while top <= bottom and left <= right:
        path += [(r, left) for r in range(top, bottom + 1)]
        path += [(bottom, c) for c in range(left + 1, right + 1)]
        if left < right:
            path += [(r, right) for r in range(bottom - 1, top - 1, -1)]
        if top < bottom:
            path += [(top, c) for c in range(right - 1, left, -1)]
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1
    return np.array(path, dtype=np.int64).reshape(-1, 2)


def hilbert(rows: int, columns: int) -> Order:
    """Hilbert curve on the smallest power-of-two square that holds the grid, without the cells outside it.

    It leaves the top left corner to the right: (0, 0), (0, 1), (1, 1), (1, 0).
    """
    curve = np.zeros((1, 2), dtype=np.int64)
    side = 1
    while side < max(rows, columns):
        # Four copies, the first and last transposed so that the ends meet; a transposition also turns the first step.
        down, right = np.array([side, 0]), np.array([0, side])
        last = side - 1 - curve[:, ::-1] + right
        curve = np.concatenate([curve[:, ::-1], curve + down, curve + down + right, last])
        side *= 2
    if side > 1 and curve[1, 0] == 1:
        curve = curve[:, ::-1]
    return curve[(curve[:, 0] < rows) & (curve[:, 1] < columns)]


def golden(rows: int, columns: int) -> Order:
    """Jumps of the golden ratio's share of all cells, along the columns."""
    count = rows * columns
    step = max(1, math.floor(0.618033988749895 * count))
    while math.gcd(step, count) != 1:
        step += 1
    return column_raster(rows, columns)[np.arange(count, dtype=np.int64) * step % count]


GRID_ORDERS: dict[str, Callable[[int, int], Order]] = {
    "row_raster": row_raster,
    "column_raster": column_raster,
    "row_snake": row_snake,
    "column_snake": column_snake,
    "hilbert": hilbert,
    "spiral": spiral,
    "diagonal": diagonal,
    "golden": golden,
}
PATTERNS = ("random", "random_grid", *GRID_ORDERS)

# The public code calls rows x and columns y; these are the walks that its names lead to.
LEGACY_PATTERNS = {
    "random_fixed_grid": "random_grid",
    "column_major": "row_raster",
    "horizontal_raster": "column_raster",
    "horizontal_zigzag": "column_snake",
    "horizontal_snake": "column_snake",
    "vertical_raster": "row_snake",
    "column_snake": "row_snake",
}


def resolve_pattern(name: str, compat: bool = False) -> str:
    """The pattern that a name means.

    ``column_snake`` is both one of our names and a name of the public code for another walk (rows); it has the latter
    meaning only with ``compat``. Every other legacy name is understood always.

    Raises:
        ValueError: If the name is unknown; the message lists the accepted ones.
    """
    if name in PATTERNS and not (compat and name in LEGACY_PATTERNS):
        return name
    if name in LEGACY_PATTERNS:
        return LEGACY_PATTERNS[name]
    raise ValueError(
        f"pattern must be one of {', '.join(PATTERNS)} (or, from the public code, "
        f"{', '.join(n for n in LEGACY_PATTERNS if n not in PATTERNS)}), got {name!r}"
    )
