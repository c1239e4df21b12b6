"""Position tables of weights files: which grid they were made for, and on which grid a model has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mambascope.layers import resample_pos_embed
from mambascope.models.configs import VimConfig
from mambascope.models.description import CheckpointError
from mambascope.models.meaning import Difference
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba

POSITION_TABLES = ("pos_embed", "pos_embed_coarse")


def table_grid(rows: int, config: Mapping[str, Any], coarse: bool, own: tuple[int, int]) -> tuple[int, int] | None:
    """Grid of a table with this many patch rows: from the file's config, else the model's own, else a square."""
    if (grid := _described_grid(config, coarse)) is not None and grid[0] * grid[1] == rows:
        return grid
    if own[0] * own[1] == rows:
        return own
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

    Known by fitting the config's image or the published one, which dense models and finetuning enlarge, exactly:
    27 x 27 positions are stride 8 of 224 pixels, sooner than stride 16 of 432. ``None`` for any other table.
    """
    table = state.get("pos_embed")
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
    state: Mapping[str, Tensor], model: VisionMamba, config: Mapping[str, Any]
) -> tuple[TableStride, Difference, str] | None:
    """The stride of a file that does not say its sizes, where its table tells another than the model's.

    Returns:
        What the table says, how the model differs, and one line on it with the way out; ``None`` for no other stride.
    """
    found = table_stride(state, model.config) if config.get("img_size") is None else None
    if found is None:
        return None
    differs = Difference("stride", found.stride, model.config.patch_stride)
    size = " x ".join(map(str, dict.fromkeys(found.image)))
    way = "which only a VisionMamba can have" if isinstance(model, MambaScope) else f"pass stride={found.stride}"
    grid = " x ".join(map(str, found.grid))
    return found, differs, f"{differs}, as its {grid} positions for {size} pixels say: {way}"


def fit_tables(state: Mapping[str, Tensor], model: VisionMamba, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The position tables of a state dict on the grids of `model`; those whose own grid is unknown are left out.

    Raises:
        CheckpointError: If a table was made for another stride.
    """
    config = description.get("config", {})
    fitted = {}
    for name in POSITION_TABLES:
        table = state.get(name)
        if table is None or table.ndim != 3 or table.shape[1] < 2 or not hasattr(model, name):
            continue
        if name == "pos_embed" and (found := other_stride(state, model, config)):
            raise CheckpointError(f"weights do not fit {type(model).__name__}: {found[2]}")
        coarse = name == "pos_embed_coarse"
        new = (model.grid[0] // 2, model.grid[1] // 2) if coarse else model.grid
        old = table_grid(table.shape[1] - 1, config, coarse, new)
        if old is not None:
            fitted[name] = resample_pos_embed(table, old, new, model.config.cls_position)
    return fitted
