"""Images of several sizes in one padded batch.

The encoders read sequences in both directions, so that a token of padding would change every other token of its image.
Images are therefore taken off the canvas [B, C, H, W] before they are read, those of one grid together, and their maps
are put back. An image lies at the top left of its canvas, as mmdet's and mmseg's preprocessors put it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.layers import pad_to
from mambascope.mm.pyramid import STEPS

Size = tuple[int, int]
"""Height and width, of images in pixels, of grids in cells."""


def check_sizes(x: Tensor, sizes: Sequence[Sequence[int]] | None) -> list[Size]:
    """The images' sizes without padding; those of the whole canvas for ``None``.

    Args:
        x: Canvas [B, C, H, W].
        sizes: Height and width of each image in pixels.

    Raises:
        ValueError: If there is not one size for every image, or one does not lie on the canvas.
    """
    height, width = x.shape[-2:]
    if sizes is None:
        return [(height, width)] * x.shape[0]
    checked = [(int(size[0]), int(size[1])) for size in sizes]
    if len(checked) != x.shape[0] or not all(0 < h <= height and 0 < w <= width for h, w in checked):
        raise ValueError(
            f"sizes must be {x.shape[0]} heights and widths of 1 to {height} x {width} pixels, got {checked}"
        )
    return checked


def cover(size: Size, side: float) -> Size:
    """Rows and columns of squares of ``side`` pixels that cover a size."""
    rows, cols = (int(-(-s // side)) for s in size)
    return rows, cols


def by_value(values: Iterable[Size]) -> dict[Size, list[int]]:
    """Where each value stands, in the order in which they first occur."""
    places: dict[Size, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(value, []).append(i)
    return places


class Group(NamedTuple):
    """Images of a batch whose cells form the same grid.

    Attributes:
        images: [n, C, h, w] of whole cells, zero where an image does not reach.
        rows: Which images of the batch they are [n] int64.
    """

    images: Tensor
    rows: Tensor


def group_images(x: Tensor, sizes: Sequence[Size], cell: int) -> list[Group]:
    """Takes images off their canvas.

    Args:
        x: Canvas [B, C, H, W].
        sizes: Of each image, see :func:`check_sizes`.
        cell: Side of a cell in pixels.
    """
    if all(size == tuple(x.shape[-2:]) for size in sizes):
        return [Group(pad_to(x, cell), torch.arange(len(x), device=x.device))]
    groups = []
    for (rows, cols), members in by_value(cover(size, cell) for size in sizes).items():
        crops = [x[i, :, : sizes[i][0], : sizes[i][1]] for i in members]
        images = torch.stack([pad_map(crop, (rows * cell, cols * cell)) for crop in crops])
        groups.append(Group(images, torch.tensor(members, device=x.device)))
    return groups


def batch_order(groups: Sequence[Group]) -> Tensor:
    """Where each image of the batch stands among those of the groups, one group after the other [B] int64."""
    return torch.cat([group.rows for group in groups]).argsort()


def join(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Images of several tensors [n, ...], one tensor after the other, in ``order`` [B] int64."""
    if len(parts) == 1:  # a single group has the batch's order
        return parts[0]
    return torch.cat([part.to(parts[0].dtype) for part in parts]).index_select(0, order)


def pad_map(x: Tensor, grid: Size) -> Tensor:
    """A map [..., h, w] on a larger grid, with zeros on the right and at the bottom."""
    below, right = grid[0] - x.shape[-2], grid[1] - x.shape[-1]
    return F.pad(x, (0, right, 0, below)) if below or right else x


def erase_padding(x: Tensor, grids: Sequence[Size]) -> Tensor:
    """A map [B, d, h, w] with zeros where an image's own grid does not reach."""
    height, width = x.shape[-2:]
    if all(grid == (height, width) for grid in grids):
        return x
    rows, cols = torch.tensor(grids, device=x.device).unbind(1)
    below = torch.arange(height, device=x.device) >= rows.unsqueeze(1)
    right = torch.arange(width, device=x.device) >= cols.unsqueeze(1)
    return x.masked_fill((below.unsqueeze(2) | right.unsqueeze(1)).unsqueeze(1), 0)


def cells_on_canvas(cells: Tensor, grid: Size, canvas: Size, count: int) -> Tensor:
    """Raster indices [n, k] of cells on the grid of a canvas; ``count`` of them with -1 at the end; -1 stays.

    Args:
        cells: Raster indices on the images' grid.
        grid: Rows and columns of that.
        canvas: Rows and columns of the canvas.
        count: At least k.
    """
    moved = cells // grid[1] * canvas[1] + cells % grid[1]
    return F.pad(moved.masked_fill(cells < 0, -1), (0, count - cells.shape[1]), value=-1)


class Look(NamedTuple):
    """What a pass over images left for the pyramid.

    Attributes:
        maps: Four maps [B, d, h, w] on the fine grid.
        cls: The CLS outputs [B, d] of the same blocks.
        detail: Maps of the image's detail, none or four.
    """

    maps: list[Tensor]
    cls: list[Tensor]
    detail: list[Tensor]

    def on_canvas(self, grid: Size) -> Look:
        """The look with its maps on the fine grid of a canvas."""
        levels = [(int(grid[0] * step), int(grid[1] * step)) for step in STEPS]
        detail = [pad_map(m, level) for m, level in zip(self.detail, levels, strict=False)]
        return Look([pad_map(m, grid) for m in self.maps], self.cls, detail)


def join_looks(looks: Sequence[Look], order: Tensor) -> Look:
    """The images of several looks, see :func:`join`."""
    fields = zip(*looks, strict=True)
    return Look(*([join(parts, order) for parts in zip(*levels, strict=True)] for levels in fields))
