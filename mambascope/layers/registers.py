"""Register tokens spread evenly through a sequence (Mamba-Reg, arXiv 2405.14858)."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_sizes(length: int, registers: int) -> list[int]:
    """Sizes of the ``registers + 1`` runs of tokens between registers, as equal as ``length`` allows."""
    ends = [(i + 1) * length // (registers + 1) for i in range(registers + 1)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def insert_registers(tokens_BLd: Tensor, registers_1rd: Tensor) -> Tensor:
    """Puts r learned tokens [1, r, d] evenly into a sequence [B, L, d]; returns [B, L + r, d]."""
    batch, length, _ = tokens_BLd.shape
    runs = tokens_BLd.split(chunk_sizes(length, registers_1rd.shape[1]), dim=1)
    own = registers_1rd.to(tokens_BLd.dtype).expand(batch, -1, -1).split(1, dim=1)
    return torch.cat([part for pair in zip(runs, own, strict=False) for part in pair] + [runs[-1]], dim=1)


def remove_registers(tokens: Tensor, registers: int) -> Tensor:
    """Takes the r registers out of a sequence [B, L + r, ...] again; returns [B, L, ...]."""
    runs = chunk_sizes(tokens.shape[1] - registers, registers)
    sizes = [size for run in runs for size in (run, 1)][:-1]
    return torch.cat(tokens.split(sizes, dim=1)[::2], dim=1)
