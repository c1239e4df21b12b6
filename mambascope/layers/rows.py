"""Taking tokens out of sequences by their row numbers.

Shape letters: B batch, L tokens of a sequence, K of them that are taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flat_rows(index_BK: Tensor, length: int) -> Tensor:
    """Row numbers [B * K] in a batch of sequences of `length` tokens that is read as one long sequence."""
    first = torch.arange(index_BK.shape[0], device=index_BK.device) * length
    return (index_BK + first.unsqueeze(1)).flatten()


def gather_rows(rows: Tensor, index_BK: Tensor) -> Tensor:
    """Takes rows [B, K, ...] by index [B, K] out of [B, L, ...] or of one shared table [1, L, d]."""
    if rows.shape[0] == 1 and rows.ndim == 3:
        # indexing would add up the gradients in an order that differs from run to run
        return F.embedding(index_BK, rows[0])
    # whole rows are copied; gather with an index for every number takes tens of times longer on a CPU
    taken = rows.flatten(0, 1).index_select(0, flat_rows(index_BK, rows.shape[1]))
    return taken.unflatten(0, index_BK.shape)
