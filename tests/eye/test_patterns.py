"""Scan patterns: their geometry on small grids, and the public code's names."""

import numpy as np
import pytest

from mambascope.eye.patterns import GRID_ORDERS, LEGACY_PATTERNS, PATTERNS, resolve_pattern

GRIDS = [(1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (5, 3), (3, 6), (7, 8)]


def numbered(order, rows, columns):
    """The step at which each cell is visited, as nested lists."""
    grid = np.full((rows, columns), -1)
    grid[order[:, 0], order[:, 1]] = np.arange(len(order))
    return grid.tolist()


@pytest.mark.parametrize("name", GRID_ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_is_visited_once(name, grid):
    order = GRID_ORDERS[name](*grid)
    assert order.shape == (grid[0] * grid[1], 2)
    assert sorted(map(tuple, order.tolist())) == [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    assert order[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("row_raster", [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ("column_raster", [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
        ("row_snake", [[0, 1, 2], [5, 4, 3], [6, 7, 8]]),
        ("column_snake", [[0, 5, 6], [1, 4, 7], [2, 3, 8]]),
        ("diagonal", [[0, 1, 3], [2, 4, 6], [5, 7, 8]]),
        ("spiral", [[0, 7, 6], [1, 8, 5], [2, 3, 4]]),
    ],
)
def test_geometry(name, steps):
    assert numbered(GRID_ORDERS[name](3, 3), 3, 3) == steps


@pytest.mark.parametrize("name", ["row_snake", "column_snake", "spiral"])
@pytest.mark.parametrize("grid", GRIDS)
def test_walks_never_jump(name, grid):
    steps = np.abs(np.diff(GRID_ORDERS[name](*grid), axis=0)).sum(1)
    assert (steps == 1).all()


def test_hilbert():
    for side in (2, 4, 8, 32):
        curve = GRID_ORDERS["hilbert"](side, side)
        assert curve[:4].tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]
        assert (np.abs(np.diff(curve, axis=0)).sum(1) == 1).all()
    # a grid that is no power of two leaves out the cells outside it and keeps the order of the others
    whole = GRID_ORDERS["hilbert"](8, 8).tolist()
    assert GRID_ORDERS["hilbert"](5, 7).tolist() == [[r, c] for r, c in whole if r < 5 and c < 7]


def test_golden_strides_through_the_columns():
    # 6 cells: floor(0.618 * 6) = 3 shares a factor with 6, as does 4; 5 does not
    assert GRID_ORDERS["golden"](2, 3).tolist() == [[0, 0], [1, 2], [0, 2], [1, 1], [0, 1], [1, 0]]


def test_names():
    assert {resolve_pattern(name) for name in PATTERNS} == set(PATTERNS)
    assert resolve_pattern("vertical_raster") == "row_snake"  # it is no raster
    assert resolve_pattern("column_major") == "row_raster"
    assert resolve_pattern("horizontal_zigzag") == resolve_pattern("horizontal_snake") == "column_snake"
    # the one name with two meanings
    assert resolve_pattern("column_snake") == "column_snake"
    assert resolve_pattern("column_snake", compat=True) == "row_snake"
    for compat in (False, True):
        for name in LEGACY_PATTERNS:
            assert resolve_pattern(name, compat) in PATTERNS
    with pytest.raises(ValueError, match=r"pattern must be one of random, random_grid.*got 'zigzag'"):
        resolve_pattern("zigzag")
