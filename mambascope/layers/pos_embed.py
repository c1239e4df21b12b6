"""Where the CLS token sits, and position tables for other grids.

A table is [1, M + 1, d]: one row per patch in raster order, and the CLS row where the CLS token sits in the sequence.
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

CLS_POSITIONS = ("first", "middle", "last")


def cls_index(num_tokens: int, position: str) -> int:
    """Index of the CLS token in a sequence of ``num_tokens`` other tokens."""
    if position not in CLS_POSITIONS:
        raise ValueError(f"CLS position must be one of {', '.join(CLS_POSITIONS)}, got {position!r}")
    return {"first": 0, "middle": num_tokens // 2, "last": num_tokens}[position]


def insert_cls(tokens: Tensor, cls: Tensor, position: str) -> Tensor:
    """Puts ``cls`` [B or 1, 1, d] into ``tokens`` [B, M, d]; returns [B, M + 1, d]."""
    at = cls_index(tokens.shape[1], position)
    cls = cls.expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :at], cls.to(tokens.dtype), tokens[:, at:]], dim=1)


def remove_cls(tokens: Tensor, position: str) -> Tensor:
    """Drops the CLS row from a sequence [B, M + 1, ...]; returns [B, M, ...]."""
    at = cls_index(tokens.shape[1] - 1, position)
    if at == 0:
        return tokens[:, 1:]
    if at == tokens.shape[1] - 1:
        return tokens[:, :-1]
    return torch.cat([tokens[:, :at], tokens[:, at + 1 :]], dim=1)


def resample_pos_embed(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], position: str = "middle"
) -> Tensor:
    """Resamples a position table bicubically to another grid; the CLS row is kept and moves to its new place.

    Args:
        table: [1, rows * cols + 1, d] for ``old_grid``.
        old_grid: Rows and columns of the table.
        new_grid: Rows and columns wanted.
        position: Place of the CLS row.

    Returns:
        [1, new_rows * new_cols + 1, d].
    """
    if old_grid == new_grid:
        return table
    at = cls_index(table.shape[1] - 1, position)
    patches = resample_abs_pos_embed(
        remove_cls(table, position), list(new_grid), old_size=list(old_grid), num_prefix_tokens=0
    )
    return insert_cls(patches, table[:, at : at + 1], position)
