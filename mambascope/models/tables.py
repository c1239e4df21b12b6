"""Position tables of weights files: which grid they were made for, and on which grid a model has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mambascope.layers import resample_pos_embed
from mambascope.models.architectures import architecture_of
from mambascope.models.configs import VimConfig
from mambascope.models.description import CheckpointError
from mambascope.models.meaning import Difference

FINE_TABLE, COARSE_TABLE = "pos_embed", "pos_embed_coarse"
"""The full-size image's table, and that of the half-size image of a MambaScope."""


def table_grid(rows: int, config: Mapping[str, Any], coarse: bool, target: tuple[int, int]) -> tuple[int, int] | None:
    """Grid of a table with this many patch rows: from the file's config, else the model's own, else a square."""
    if (grid := _described_grid(config, coarse)) is not None and grid[0] * grid[1] == rows:
        return grid
    if target[0] * target[1] == rows:
        return target
    side = math.isqrt(rows)
    return (side, side) if side * side == rows else None


def _described_grid(config: Mapping[str, Any], coarse: bool) -> tuple[int, int] | None:
    """Grid of the table that a config describes; ``None`` if it does not say.

    Raises:
        CheckpointError: If its sizes are none.
    """
    if config.get("img_size") is None:
        return None
    try:
        sizes = VimConfig(**{name: config[name] for name in ("img_size", "patch_size", "stride") if name in config})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint has a damaged description: {error}") from None
    if "alpha" not in config:
        return sizes.patch_grid
    rows, cols = (-(-side // (2 * sizes.patch_size)) for side in sizes.image_hw)
    return (rows, cols) if coarse else (2 * rows, 2 * cols)


class TableStride(NamedTuple):
    """What a position table was made with.

    Attributes:
        stride: Distance between patches in pixels.
        image: Height and width in pixels.
        grid: Rows and columns of patches.
    """

    stride: int
    image: tuple[int, int]
    grid: tuple[int, int]


def table_stride(state: Mapping[str, Tensor], config: VimConfig) -> TableStride | None:
    """The stride that a position table was made with, where it is another than the config's.

    Found by fitting the config's image or the published one, which dense models and finetuning enlarge, exactly:
    27 x 27 positions are stride 8 of 224 pixels, sooner than stride 16 of 432. ``None`` for any other table.
    """
    table = state.get(FINE_TABLE)
    rows = table.shape[1] - 1 if table is not None and table.ndim == 3 else 0
    if rows == math.prod(config.patch_grid):
        return None
    size = config.patch_size
    for image in dict.fromkeys((config.image_hw, VimConfig().image_hw)):
        for stride in range(1, size + 1):
            grid = 1 + (image[0] - size) // stride, 1 + (image[1] - size) // stride
            exact = size % stride == 0 and all((side - size) % stride == 0 for side in image)
            if exact and stride != config.patch_stride and math.prod(grid) == rows:
                return TableStride(stride, image, grid)
    return None


def other_stride(
    state: Mapping[str, Tensor], model: Any, config: Mapping[str, Any]
) -> tuple[TableStride, Difference, str] | None:
    """The stride of a file that does not say its sizes, where its table tells another than the model's.

    Returns:
        What the table says, how the model differs, and one line on it with the way out; ``None`` for no other stride.
    """
    table = table_stride(state, model.config) if config.get("img_size") is None else None
    if table is None:
        return None
    differs = Difference("stride", table.stride, model.config.patch_stride)
    size = " x ".join(map(str, dict.fromkeys(table.image)))
    scope = COARSE_TABLE in architecture_of(model).tables
    way = "which only a VisionMamba can have" if scope else f"pass stride={table.stride}"
    grid = " x ".join(map(str, table.grid))
    return table, differs, f"{differs}, as its {grid} positions for {size} pixels say: {way}"


class FittedTable(NamedTuple):
    """A position table of a file on a model's grid.

    Attributes:
        table: [1, rows + 1, D]; ``None`` where the grid that it was made for is unknown.
        resampled: Whether it was made for another grid.
        stride: How the model's stride differs from the one that the table was made with, and one line on it.
    """

    table: Tensor | None
    resampled: bool
    stride: tuple[Difference, str] | None


def fit_table(
    name: str, source: str, state: Mapping[str, Tensor], model: Any, config: Mapping[str, Any]
) -> FittedTable:
    """A position table on the grid of a model.

    Args:
        name: The model's table.
        source: The table of the file that it starts from; a plain Vim's starts both of a MambaScope.
        state: Tensors of the file.
        model: A model with a ``grid``.
        config: Config that the file describes; empty if it does not.
    """
    table, coarse = state[source], name == COARSE_TABLE
    rows = table.shape[1] - 1
    grid = (model.grid[0] // 2, model.grid[1] // 2) if coarse else model.grid
    stride = other_stride(state, model, config) if source == FINE_TABLE else None
    made_for = table_grid(rows, config, source == COARSE_TABLE, grid) if stride is None else stride[0].grid
    note = None if stride is None or coarse else stride[1:]
    if made_for is None:
        return FittedTable(None, False, note)
    if made_for == grid:
        return FittedTable(table, False, note)
    return FittedTable(resample_pos_embed(table, made_for, grid, model.config.cls_position), True, note)


def fit_tables(state: Mapping[str, Tensor], model: Any, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The position tables of a state dict on the grids of `model`; those whose own grid is unknown are left out.

    Raises:
        CheckpointError: If a table was made for another stride.
    """
    fitted = {}
    for name in architecture_of(model).tables:
        table = state.get(name)
        if table is None or table.ndim != 3 or table.shape[1] < 2:
            continue
        fit = fit_table(name, name, state, model, description.get("config", {}))
        if fit.stride is not None:
            raise CheckpointError(f"weights do not fit {type(model).__name__}: {fit.stride[1]}")
        if fit.table is not None:
            fitted[name] = fit.table
    return fitted
