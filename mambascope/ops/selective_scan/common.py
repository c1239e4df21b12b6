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
        proj: If given, the [B, L, R + 2N] tensor whose columns `dt`, `B` and `C` are.
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
    proj: Tensor | None = None


class ScanGrads(NamedTuple):
    """Gradients of the tensors of a :class:`ScanSide`, each in the dtype of its tensor; ``None`` where that is.

    A backend may give the gradient of `proj` instead of those of `dt`, `B` and `C`, if it was given `proj`.
    """

    x: Tensor
    dt: Tensor | None
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    proj: Tensor | None = None


class Kept(NamedTuple):
    """What a forward pass keeps for its backward pass besides the inputs.

    Attributes:
        states: Flat buffer of :func:`states_numel` numbers in the state's dtype, laid out as the backend likes: the
            state before every STATE_INTERVAL-th token of a walk, without the zero state at its start. Empty if nothing
            was kept or nothing needs to be.
        total: Sum of the directions before gate and scale [B, L, E], in the dtype of x; empty without a gate.
    """

    states: Tensor
    total: Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and softplus: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def states_numel(sides: int, x_shape: Sequence[int], states: int) -> int:
    """Size of ``Kept.states``; E and N are rounded up to 16 because compiled kernels pad them."""
    batch, length, width = x_shape
    return sides * ((length - 1) // STATE_INTERVAL) * batch * (-(-width // 16) * 16) * (-(-states // 16) * 16)


def new_kept(sides: int, x: Tensor, states: int, gated: bool) -> Kept:
    """Buffers for a forward pass to fill."""
    # what padding leaves unused must not be garbage: results of an operator are reproducible
    new = x.new_zeros if x.shape[2] % 16 or states % 16 else x.new_empty
    return Kept(
        new(states_numel(sides, x.shape, states), dtype=state_dtype(x.dtype)),
        x.new_empty(x.shape if gated else (0,)),
    )


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
