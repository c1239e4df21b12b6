"""Data sets that answer a :class:`~mambascope.data.sampling.SampleKey`: what a worker process runs."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mambascope.data.errors import DataError
from mambascope.data.image_io import LOOKED_AT, BadImageError, convert_image, open_image, read_reason, survey
from mambascope.data.loader import Item, Packet
from mambascope.data.sampling import SampleKey
from mambascope.data.scopedigits import ScopeDigits
from mambascope.data.seeding import seeded
from mambascope.models.pictures import ValueRange

_MAX_TRIES = 20  # unreadable files in a row


def check_label(target: Any, num_classes: int, name: str) -> int:
    """Returns the label as an int, or raises :class:`DataError` naming the sample."""
    try:
        label = int(target)
    except (TypeError, ValueError):
        raise DataError(f"label of {name} must be one class number, got {target!r}") from None
    if not 0 <= label < num_classes:
        raise DataError(f"label {label} of {name} is outside 0..{num_classes - 1} (num_classes={num_classes})")
    return label


def _close_tars(state: Any) -> None:
    """Makes timm's tar reader open its archives again: a forked process shares the file position with its parent."""
    for item in state.values() if isinstance(state, dict) else [state]:
        if item is not None:
            item.tf = None
            _close_tars(item.children)


class ImageSource:
    """Rows of a data set as (picture, label): RGB, or uint8 [H, W, C] where the model takes other than three channels.

    Args:
        rows: A timm ``ImageDataset`` (its reader hands over undecoded files), or any sequence of (picture, label).
        num_classes: Labels must lie below it.
        channels: Of the model.
        value_range: Values of the files that become 0–255; see :func:`~mambascope.data.image_io.open_image`.
    """

    def __init__(self, rows: Any, num_classes: int, channels: int = 3, value_range: ValueRange = None) -> None:
        self.rows, self.num_classes = rows, num_classes
        self.channels, self.value_range = channels, value_range
        self.reader = getattr(rows, "reader", None)
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """How errors call a row: its file if there is one."""
        if self.reader is not None:
            try:
                return str(self.reader.filename(index, absolute=True) or f"row {index}")
            except Exception:  # readers without files answer with all kinds of errors
                return f"row {index}"
        return f"row {index}"

    def __call__(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """Picture and label of a row.

        Raises:
            BadImageError: When the file cannot be read.
            DataError: When the label is out of range.
        """
        if os.getpid() != self._pid:
            self._pid = os.getpid()
            _close_tars(getattr(self.reader, "tar_state", None))
        if self.reader is None:
            image, target = self.rows[index]
            picture = convert_image(image, f"row {index}", self.channels, self.value_range)
            return picture, check_label(target, self.num_classes, f"row {index}")
        file, target = self._open(index)
        with file:
            picture = open_image(file, self.name(index), self.channels, self.value_range)
        return picture, check_label(target, self.num_classes, self.name(index))

    def _open(self, index: int) -> tuple[Any, Any]:
        """The undecoded file and the label of a row."""
        assert self.reader is not None
        try:
            return self.reader[index][:2]
        except (OSError, tarfile.TarError) as error:
            raise BadImageError(f"cannot read image {self.name(index)}: {read_reason(error)}") from error
        except KeyError as error:
            raise DataError(f"label {error.args[0]!r} of {self.name(index)} is not in class_map") from None

    def survey(self, warn: bool = True) -> None:
        """Looks at some images, evenly spaced; see :func:`~mambascope.data.image_io.survey`."""

        def some() -> Iterator[tuple[Any, str]]:
            for index in range(0, len(self), max(1, len(self) // LOOKED_AT)):
                with suppress(BadImageError):
                    file = self.rows[index][0] if self.reader is None else self._open(index)[0]
                    with file:
                        yield file, self.name(index)

        survey(some(), self.channels, self.value_range, warn)


class KeyedImages(Dataset):
    """Transformed images, each with random choices that depend on its key only.

    Args:
        source: Pictures and labels.
        transform: Picture to tensor; may use Python's, NumPy's or PyTorch's global generators.
        seed: Together with epoch and position it decides the transform's random choices.
        skip_bad_files: Leave unreadable files out instead of failing.
        replace: Put the next readable row in the place of an unreadable one (training), instead of making the batch
            smaller (evaluation).
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Tensor],
        seed: int,
        skip_bad_files: bool = False,
        replace: bool = False,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.skip_bad_files, self.replace = skip_bad_files, replace

    def __getitem__(self, key: SampleKey) -> Item:
        skipped: list[str] = []
        for attempt in range(_MAX_TRIES):
            try:
                picture, label = self.source((key.row + attempt) % len(self.source))
            except BadImageError as error:
                if not self.skip_bad_files:
                    return Item(None, failure=f"{error} (pass skip_bad_files=true to leave such files out)")
                skipped.append(str(error))
                if not self.replace:
                    return Item(None, tuple(skipped))
                continue
            except DataError as error:
                return Item(None, failure=str(error))
            with seeded(self.seed, key.epoch, key.position):
                return Item((self.transform(picture), label), tuple(skipped))
        return Item(None, failure=f"{_MAX_TRIES} unreadable images in a row; the first: {skipped[0]}")


class KeyedStream(IterableDataset):
    """Transformed samples of a timm ``IterableImageDataset``, each with random choices of its own.

    Args:
        stream: Yields (picture, label); its own transform must be None.
        transform: As in :class:`KeyedImages`.
        num_classes: Labels must lie below it.
        seed: Decides, with the epoch, the process, the worker and the place in the worker's stream, the transform.
        epoch: Of this pass.
        rank: This process.
        channels: Of the model.
        value_range: As for :class:`ImageSource`.
    """

    def __init__(
        self,
        stream: Any,
        transform: Callable[[Any], Tensor],
        num_classes: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        channels: int = 3,
        value_range: ValueRange = None,
    ) -> None:
        self.stream, self.transform, self.num_classes = stream, transform, num_classes
        self.channels, self.value_range = channels, value_range
        self.seed, self.epoch, self.rank = seed, epoch, rank

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        try:
            for place, (image, target) in enumerate(self.stream):
                name = f"sample {place} of worker {worker}"
                label = check_label(target, self.num_classes, name)
                picture = convert_image(image, name, self.channels, self.value_range)
                with seeded(self.seed, self.epoch, self.rank, worker, place):
                    value = self.transform(picture), label
                yield Item(value)
        except (DataError, OSError) as error:
            yield Item(None, failure=str(error))


class KeyedDigits(Dataset):
    """ScopeDigits as normalised tensors, whole batches at a time.

    Args:
        digits: The images (task "cls").
        mean: Per channel, of values in 0–1.
        std: Per channel.
        fresh: Draw new images in every epoch instead of repeating those of the first.
        start: Index of the image in row 0; beyond the data set's length come further images of the same kind.
        size: Side in pixels to which the images are resized; by default they stay as they are drawn.
    """

    def __init__(
        self,
        digits: ScopeDigits,
        mean: Sequence[float],
        std: Sequence[float],
        fresh: bool = False,
        start: int = 0,
        size: int | None = None,
    ) -> None:
        self.digits, self.fresh, self.start = digits, fresh, start
        self.size = size or digits.config.size
        self.scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.shift = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1) * 255.0 * self.scale

    def __getitem__(self, key: SampleKey) -> Item:
        images, targets = self.__getitems__([key]).batch
        return Item((images[0], int(targets[0])))

    def __getitems__(self, keys: Sequence[SampleKey]) -> Packet:
        length = len(self.digits)
        images, targets = self.digits.batch(
            [self.start + k.row + (k.epoch * length if self.fresh else 0) for k in keys]
        )
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.size != self.digits.config.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return Packet((pixels.mul_(self.scale).sub_(self.shift), torch.from_numpy(targets)))


def first(packet: Any) -> Any:
    """Collation of a data set that already returns packets."""
    return packet
