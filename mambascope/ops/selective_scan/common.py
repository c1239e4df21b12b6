"""What all scan backends share: the inputs of one direction, and where states are kept for the backward pass.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STATE_INTERVAL = 32
"""A backend that keeps states for the backward pass keeps one per this many tokens and recomputes the others."""


class ScanSide(NamedTuple):
    """One direction of a scan as a backend receives it: shapes are checked, dtypes may differ, strides are free.

    Attributes:
        x: [B, L, E].
        dt: [B, L, R] with `dt_weight`, else [B, L, E].
        A: [E, N].
        B: [B, L, N].
        C: [B, L, N].
        D: [E] or ``None``.
        dt_weight: [E, R] or ``None``.
        dt_bias: [E] or ``None``.
        reverse: Walk from the last token.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    reverse: bool


class ScanGrads(NamedTuple):
    """Gradients of the tensors of a :class:`ScanSide`, each in the dtype of its tensor; ``None`` where that is."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and softplus: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def states_shape(sides: int, x_shape: Sequence[int], states: int) -> tuple[int, int, int, int, int]:
    """Shape of the kept states: [sides, ceil(L / STATE_INTERVAL), B, N, E].

    Entry i of a side is its state before token ``i * STATE_INTERVAL`` of its walk. A backend may order the last four
    axes otherwise: only its own backward pass reads them.
    """
    batch, length, width = x_shape
    return (sides, (length + STATE_INTERVAL - 1) // STATE_INTERVAL, batch, states, width)


def step_sizes(
    dt: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype
) -> Tensor:
    """The step sizes [B, L, E] in `dtype`: projected if low rank, biased, softplus."""
    dt, bias = dt.to(dtype), None if dt_bias is None else dt_bias.to(dtype)
    if dt_weight is not None:
        dt = F.linear(dt, dt_weight.to(dtype), bias)
    elif bias is not None:
        dt = dt + bias
    return F.softplus(dt) if dt_softplus else dt
