"""Randomness that does not depend on what ran before.

Every training step draws from generators seeded by (seed, epoch, batch, rank) alone, so a run that is resumed in the
middle of an epoch draws what the uninterrupted run drew: drop path, dropout, Mixup. (Images have their own seeds.)
"""

from __future__ import annotations

import random

import numpy as np
import torch


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """A 64-bit seed from its coordinates; neighbouring coordinates give unrelated seeds.

    Args:
        seed: The run's seed.
        epoch: From 0.
        batch: Batch in the epoch, from 0.
        rank: Process among all processes.
    """
    coordinates = (seed % 2**64, epoch, batch, rank)
    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0])


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seeds torch (all devices), NumPy and ``random`` for one step; see :func:`step_seed`."""
    value = step_seed(seed, epoch, batch, rank)
    torch.manual_seed(value % 2**63)
    np.random.seed(value % 2**32)  # noqa: NPY002 (timm's Mixup draws from the global generator)
    random.seed(value)
