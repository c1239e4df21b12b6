"""Random choices as a function of a key instead of history."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def check_seed(seed: int) -> int:
    """Returns the seed, or raises ``ValueError`` when it is negative."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return seed


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and PyTorch's (CPU) generators are functions of ``key`` alone; afterwards as before.

    Args:
        *key: Non-negative integers, e.g. (seed, epoch, position).
    """
    generator = torch.default_generator
    before = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002 (transforms use them)
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(4, np.uint32)]
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002
    # not torch.manual_seed, which would also reseed every GPU and leave it so
    generator.manual_seed(words[2] << 32 | words[3])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        generator.set_state(before[2])
