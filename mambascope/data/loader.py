"""Loaders whose order can be resumed from the middle of an epoch.

They are plain iterables with ``state_dict`` and ``load_state_dict``, which Lightning stores in its checkpoints, and are
deliberately no subclass of ``DataLoader``: Lightning would rebuild those with its own samplers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mambascope.data.errors import DataError, worker_failure
from mambascope.data.sampling import EpochBatchSampler

_log = logging.getLogger("mambascope.data")
_SHOWN = 20  # bad files named in the log; the rest are only counted


class Item(NamedTuple):
    """One sample as a worker hands it over: ``value`` is None when it is left out; ``failure`` ends the run."""

    value: Any
    skipped: tuple[str, ...] = ()
    failure: str | None = None


class Packet(NamedTuple):
    """One collated batch with what went wrong on the way (exceptions would arrive with a worker's traceback)."""

    batch: Any
    skipped: tuple[str, ...] = ()
    failure: str | None = None


def collate_items(items: Sequence[Item]) -> Packet:
    """Collates the values that are there."""
    for item in items:
        if item.failure is not None:
            return Packet(None, failure=item.failure)
    skipped = tuple(reason for item in items for reason in item.skipped)
    values = [item.value for item in items if item.value is not None]
    return Packet(default_collate(values) if values else None, skipped)


def _in_shared_memory(collate: Callable[[Any], Packet], samples: Any) -> Packet:
    """Collates; in a worker the tensors move to shared memory here, where it can be said that there is none left.

    Left to the queue between the processes, the batch would be dropped and waited for without end.
    """
    packet = collate(samples)
    if get_worker_info() is not None:
        tree_map_only(Tensor, Tensor.share_memory_, packet.batch)
    return packet


class _Worklog:
    """Counts files that were left out and names the first of them."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def add(self, skipped: Iterable[str]) -> None:
        for reason in skipped:
            if reason not in self.reasons and len(self.reasons) < _SHOWN:
                _log.warning("skipped: %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def summary(self) -> None:
        if self.reasons:
            _log.warning("%d unreadable files skipped so far", len(self.reasons))


def _receive(loader: DataLoader, worklog: _Worklog) -> Iterator[Any]:
    """Batches (None where nothing was left of one) with errors turned into one-line ones."""
    iterator = None
    try:
        iterator = iter(loader)
        for packet in iterator:
            if packet.failure is not None:
                raise DataError(packet.failure)
            worklog.add(packet.skipped)
            yield packet.batch
    except GeneratorExit:  # Lightning takes as many batches as there are and does not ask for the end
        worklog.summary()
        raise
    except Exception as error:
        # left to the garbage collector (the traceback holds the iterator), workers may take seconds to end
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
            loader._iterator = None
        if (failure := worker_failure(error)) is not None:
            raise failure from None
        raise
    worklog.summary()


class _Positioned:
    """What both loaders share: an epoch, a place in it, and a list of files that were left out."""

    sampler: Any  # Lightning sets the epoch here
    batch_sampler = None  # and reads this name

    def __init__(self, progress: Callable[[], int | None] | None) -> None:
        self._progress = progress
        self._pending: tuple[int, int] | None = None  # where to continue, once
        self._current = (0, 0)  # epoch and batches of it handed out
        self._worklog = _Worklog()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """Number of distinct unreadable files met so far."""
        return len(self._worklog.reasons)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration yields."""
        self.sampler.set_epoch(epoch)

    def repeat_first_epoch(self) -> None:
        """Makes every epoch show the images of the first, in its order and with its random choices."""
        self.sampler.same_every_epoch = True

    def set_position(self, epoch: int, batches_done: int) -> None:
        """Makes the next iteration of that epoch start after ``batches_done`` batches."""
        if epoch < 0 or not 0 <= batches_done <= len(self):
            raise ValueError(f"batches_done must be in [0, {len(self)}] and epoch >= 0, got {batches_done} and {epoch}")
        self.sampler.set_epoch(epoch)
        self._pending = self._current = (epoch, batches_done)

    def _begin(self) -> tuple[int, int]:
        """Epoch and first batch of an iteration that starts now."""
        epoch, start = self.sampler.epoch, 0
        if self._pending is not None and self._pending[0] == epoch:
            start = self._pending[1]
        self._pending = None
        self._current = (epoch, start)
        return epoch, start

    def _position(self) -> int:
        epoch, done = self._current
        if epoch != self.sampler.epoch:
            return 0  # the epoch was set but not begun
        used = self._progress() if self._progress is not None else None
        return done if used is None else min(done, used)


class ResumableLoader(_Positioned):
    """Batches of a map-style data set in the order of an :class:`EpochBatchSampler`.

    Every ``iter()`` yields the epoch set on ``sampler``. Nothing is decided before the first ``next()``, because
    Lightning creates iterators before it sets the epoch.

    Args:
        dataset: Maps a :class:`~mambascope.data.sampling.SampleKey` to an :class:`Item`, or a list of keys to a
            :class:`Packet` through ``__getitems__``.
        sampler: Order and batches.
        num_workers: Worker processes; 0 loads in this process. The samples do not depend on it.
        pin_memory: Copy batches to page-locked memory.
        collate: Makes a :class:`Packet` of what the data set returned for one batch.
        progress: Number of batches of the current epoch that training has really used, if someone knows; a batch that
            was fetched but not trained on when a run is interrupted then counts as not done.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: EpochBatchSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate: Callable[[Any], Packet] = collate_items,
        progress: Callable[[], int | None] | None = None,
    ) -> None:
        super().__init__(progress)
        self.sampler = sampler
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=partial(_in_shared_memory, collate),
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, also when the next iteration starts in its middle; 1 where a process has none.

        Lightning leaves a process with 0 out of the validation, at whose end the others then wait for it.
        """
        return max(1, len(self.sampler))

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return self._loader.num_workers

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value  # Lightning ends the workers through this name

    def close(self) -> None:
        """Ends the worker processes now."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done, and the settings that decide the order."""
        return {"epoch": self.sampler.epoch, "batches_done": self._position(), **self.sampler.geometry()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the stored batch; warns when the stored settings belong to another order."""
        changed = [
            f"{name} {state[name]} -> {value}"
            for name, value in self.sampler.geometry().items()
            if name in state and state[name] != value
        ]
        if changed:
            _log.warning("the data differ from the checkpoint's, so the resumed order does too: %s", ", ".join(changed))
        self.set_position(state["epoch"], min(state["batches_done"], len(self)))

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self._begin()
        self.sampler.start_batch = start
        for done, batch in enumerate(_receive(self._loader, self._worklog), start + 1):
            self._current = (epoch, done)
            if batch is not None:
                yield batch


class _Clock:
    """Holds the epoch of a stream where Lightning looks for it (``loader.sampler.set_epoch``)."""

    def __init__(self) -> None:
        self.epoch = 0
        self.same_every_epoch = False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class StreamLoader(_Positioned):
    """Batches of an iterable data set (WebDataset and other streams).

    A stream is opened anew each epoch with seeds drawn from (seed, epoch), so an epoch does not depend on the run's
    history; it does depend on the number of workers and processes, since those divide the archives. A resumed epoch
    reads and drops the batches before its start.

    Args:
        factory: Opens the stream of an epoch: items for :func:`collate_items`.
        length: Batches per epoch.
        batch_size: Samples per batch and process.
        seed: Seed of the workers.
        num_workers: Worker processes.
        pin_memory: Copy batches to page-locked memory.
        drop_last: Leave out a last, smaller batch.
        progress: As in :class:`ResumableLoader`.
    """

    def __init__(
        self,
        factory: Callable[[int], IterableDataset],
        length: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = True,
        progress: Callable[[], int | None] | None = None,
    ) -> None:
        super().__init__(progress)
        self.sampler = _Clock()
        self.batch_sampler = None  # Lightning reads it of everything that has a sampler
        self._factory, self._length, self._batch_size, self._seed = factory, length, batch_size, seed
        self.num_workers, self._pin_memory, self._drop_last = num_workers, pin_memory, drop_last

    def __len__(self) -> int:
        return self._length

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done and number of workers."""
        return {"epoch": self.sampler.epoch, "batches_done": self._position(), "num_workers": self.num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the stored batch; warns when another number of workers changes the order."""
        if state.get("num_workers", self.num_workers) != self.num_workers:
            _log.warning("num_workers changed: the order of a streamed data set changes with it")
        self.set_position(state["epoch"], min(state["batches_done"], len(self)))

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self._begin()
        shown = 0 if self.sampler.same_every_epoch else epoch
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((self._seed, shown)).generate_state(1)[0]))
        loader: DataLoader = DataLoader(
            self._factory(shown),
            batch_size=self._batch_size,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            drop_last=self._drop_last,
            collate_fn=collate_items,
            generator=generator,
        )
        for done, batch in enumerate(_receive(loader, self._worklog), 1):
            if done <= start:
                continue
            self._current = (epoch, done)
            if batch is not None:
                yield batch
            if done >= self._length:
                return
