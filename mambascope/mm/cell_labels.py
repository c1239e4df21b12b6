"""Which classes are in which coarse cell: what a gate that is asked about cells learns from.

Shape letters: B batch, C classes, M cells of the canvas' grid, H and W pixels, n boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.mm.canvas import Size, cover


def cells_from_masks(
    masks: Sequence[Tensor], num_classes: int, cell: int, grid: Size, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Classes in the cells of segmentation masks.

    Args:
        masks: One integer mask [..., H, W] per image, with classes and ``ignore_index`` only.
        num_classes: C.
        cell: Side of a cell in pixels.
        grid: Rows and columns of the canvas' cells; they cover every mask.
        ignore_index: Label of pixels that say nothing.

    Returns:
        Presence [B, M, C] (0 or 1, float32) and which cells have any labelled pixel [B, M] bool.
    """
    rows, cols = grid
    presence, labelled = [], []
    for mask in masks:
        height, width = mask.shape[-2:]
        labels = mask.reshape(height, width).long()
        labels = F.pad(labels, (0, cols * cell - width, 0, rows * cell - height), value=ignore_index)
        pixels = labels.unflatten(1, (cols, cell)).unflatten(0, (rows, cell)).transpose(1, 2).flatten(2).flatten(0, 1)
        valid = pixels != ignore_index
        # what says nothing goes into a column of its own, which is cut off
        counted = torch.zeros(rows * cols, num_classes + 1, device=mask.device)
        counted.scatter_(1, pixels.where(valid, torch.full_like(pixels, num_classes)), 1.0)
        presence.append(counted[:, :num_classes])
        labelled.append(valid.any(1))
    return torch.stack(presence), torch.stack(labelled)


def _touched(boxes: Tensor, cell: int, grid: Size) -> Tensor:
    """Which cells [n, M] bool boxes [n, 4] (x0, y0, x1, y1 in pixels) share an area with."""
    rows, cols = (cell * torch.arange(count, device=boxes.device) for count in grid)
    x0, y0, x1, y1 = (side.unsqueeze(1) for side in boxes.unbind(1))
    down = (y0 < rows + cell) & (y1 > rows)
    across = (x0 < cols + cell) & (x1 > cols)
    return (down.unsqueeze(2) & across.unsqueeze(1)).flatten(1)


def cells_from_boxes(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    ignored: Sequence[Tensor],
    sizes: Sequence[Size],
    num_classes: int,
    cell: int,
    grid: Size,
) -> tuple[Tensor, Tensor]:
    """Classes in the cells that objects' boxes reach into.

    Args:
        boxes: Of each image's objects [n, 4], (x0, y0, x1, y1) in pixels; n may be 0.
        labels: Their classes [n].
        ignored: Boxes [m, 4] of regions that say nothing, such as crowds.
        sizes: Height and width of each image in pixels.
        num_classes: C.
        cell: Side of a cell in pixels.
        grid: Rows and columns of the canvas' cells.

    Returns:
        Presence [B, M, C] (0 or 1, float32) and which cells lie in their image and in no ignored region [B, M] bool.
    """
    presence, labelled = [], []
    for image_boxes, classes, crowds, size in zip(boxes, labels, ignored, sizes, strict=True):
        one_hot = F.one_hot(classes.long(), num_classes).float()
        presence.append((_touched(image_boxes, cell, grid).float().T @ one_hot).clamp(max=1))
        rows, cols = (torch.arange(count, device=image_boxes.device) for count in grid)
        height, width = cover(size, cell)
        inside = ((rows < height).unsqueeze(1) & (cols < width)).flatten()
        labelled.append(inside & ~_touched(crowds, cell, grid).any(0))
    return torch.stack(presence), torch.stack(labelled)
