"""Which coarse cells are read again, and in which order their tokens enter the fine stage (MambaScope eq. 13-16).

Shape letters: B batch, M coarse cells, k selected cells. Pure functions without parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambascope.utils import share


def num_selected(alpha: float, num_cells: int) -> int:
    """``k = ceil(alpha * M)`` (eq. 13), safe against binary rounding: 0.7 of 10 cells is 7.

    Raises:
        ValueError: If ``alpha`` is no number in [0, 1].
    """
    if not (type(alpha) is float and 0 <= alpha <= 1):  # first what torch.compile can follow
        alpha = share("alpha", alpha)
    return min(num_cells, math.ceil(alpha * num_cells - 1e-9))


def select_cells(importance_BM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Splits the cells into the ``k`` most important ones and the remaining ones (eq. 13).

    Ties go to the lower index.

    Args:
        importance_BM: Scores [B, M].
        alpha: Share to select, in [0, 1].

    Returns:
        Selected cells [B, k] and the remaining ones [B, M - k], int64, each in raster order.
    """
    count = num_selected(alpha, importance_BM.shape[1])
    order = torch.sort(importance_BM, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def children(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fine raster indices [..., 4] of the patches that each coarse cell [...] owns.

    Args:
        cells: Raster indices on the coarse grid.
        grid: Rows and columns of the coarse grid.
    """
    cols = grid[1]
    row, col = cells // cols, cells % cols
    corner = (4 * cols) * row + 2 * col  # two fine rows of 2 * cols patches per coarse row
    pair = torch.arange(2, device=cells.device)  # made on the device: copying a list there would wait for it
    return corner.unsqueeze(-1) + (2 * cols * pair.unsqueeze(1) + pair).flatten()
