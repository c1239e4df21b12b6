"""Which sample comes when: batches of keys as a pure function of (seed, epoch), shared between processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mambascope.data.errors import DataError
from mambascope.data.seeding import check_seed


class SampleKey(NamedTuple):
    """Names one sample of a run: ``position`` counts the samples of an epoch over all processes, ``row`` is the row
    of the data set shown there."""

    epoch: int
    position: int
    row: int


class EpochBatchSampler:
    """Batches of :class:`SampleKey` for training or evaluation.

    In training the order is a permutation drawn from (seed, epoch). Position p of the global order belongs to process
    ``p % world_size``, so that the same samples with the same keys are seen whatever the number of processes or
    workers. Repeated augmentation shows each image ``repeats`` times in neighbouring positions (hence on different
    processes, as in DeiT) and still ends the epoch after ``length`` positions.

    Args:
        length: Number of rows of the data set.
        batch_size: Samples per batch and process.
        seed: Decides the order.
        shuffle: Draw a new order each epoch; otherwise rows come in order.
        drop_last: Leave out the samples that fill no whole batch on every process. Otherwise the last batch is smaller,
            and when ``even`` is set the order is wrapped around so that all processes have the same number of samples.
        repeats: How often an image is repeated (repeated augmentation); 1 turns it off.
        rank: This process.
        world_size: Number of processes.
        even: Give every process the same number of samples (needed in training; evaluation must count each once, and a
            process may be left without any).

    Raises:
        ValueError: For an argument out of range.
        DataError: When an epoch would have no batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, check_seed(seed), shuffle
        self.drop_last, self.repeats, self.rank, self.world_size, self.even = drop_last, repeats, rank, world_size, even
        self.epoch = 0
        self.start_batch = 0
        self.same_every_epoch = False
        if drop_last:
            self.samples = length // (batch_size * world_size) * batch_size
        elif even:
            self.samples = math.ceil(length / world_size)
        else:
            self.samples = len(range(rank, length, world_size))
        self.batches = math.ceil(self.samples / batch_size)
        if self.batches == 0 and (length == 0 or drop_last or even):
            raise DataError(
                f"{length} images are fewer than one batch on each process "
                f"(batch size {batch_size}, {world_size} processes)"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch on this process, wherever it is entered."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration yields."""
        self.epoch = epoch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Row at each global position [length] of an epoch."""
        rows = np.arange(self.length, dtype=np.int64)
        if self.shuffle:
            rows = np.random.default_rng((self.seed, epoch)).permutation(rows)
        if self.repeats > 1:
            rows = np.repeat(rows[: math.ceil(self.length / self.repeats)], self.repeats)[: self.length]
        return rows

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields the batches from ``start_batch`` on, without touching the samples before it."""
        epoch = 0 if self.same_every_epoch else self.epoch
        order = self.order(epoch)
        for first in range(self.start_batch * self.batch_size, self.samples, self.batch_size):
            last = min(first + self.batch_size, self.samples)
            positions = [self.rank + number * self.world_size for number in range(first, last)]
            yield [SampleKey(epoch, p, int(order[p % self.length])) for p in positions]

    def geometry(self) -> dict[str, int]:
        """What must be the same for a resumed run to see the same samples."""
        return {
            "seed": self.seed,
            "length": self.length,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "repeats": self.repeats,
        }
