"""Image files as batches: decoded in threads, a few batches ahead of the model, in order."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mambascope.data.files import Source
from mambascope.data.image_io import LOOKED_AT, BadImageError, open_image, survey
from mambascope.models.pictures import ValueRange
from mambascope.utils import CommandError

_AHEAD = 4  # batches decoded ahead of the model


class Skipped:
    """Unreadable files: an error, or counted when that was asked for."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.count = 0

    def add(self, error: BadImageError) -> None:
        """Takes note of one; raises :class:`CommandError` unless files may be skipped."""
        if not self.allowed:
            raise CommandError(f"{error} (--skip-bad leaves such files out)")
        self.count += 1
        tqdm.write(f"skipped: {error}", file=sys.stderr)


def surveyed(sources: Iterable[Source], channels: int, values: ValueRange) -> Iterator[Source]:
    """The same files, after a look at the first ones; see :func:`mambascope.data.image_io.survey`."""
    feed, some, failure = iter(sources), [], None
    try:
        for source in itertools.islice(feed, LOOKED_AT):
            some.append(source)
    except ValueError as error:  # of an input: what comes before it is answered first
        failure = error
    survey([(source.path, str(source.path)) for source in some], channels, values)

    def rest() -> Iterator[Source]:
        if failure is not None:
            raise failure
        yield from feed

    return itertools.chain(some, rest())


def load_batches(
    sources: Iterable[Source],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    skipped: Skipped,
    workers: int = 4,
    channels: int = 3,
    values: ValueRange = None,
) -> Iterator[tuple[Tensor, list[Source]]]:
    """Decodes images in threads, a few batches ahead; gives images [B, C, H, W] and their files, in order.

    Raises:
        CommandError: At a file that may not be skipped, after the batch of the files before it.
        OSError, ValueError: Of `sources`, likewise.
    """

    def decode(source: Source) -> Tensor:
        return transform(open_image(source.path, None, channels, values))

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Source, Future[Tensor]]] = deque()
        images: list[Tensor] = []
        files: list[Source] = []
        feed = iter(sources)
        ended: Exception | None = None
        stop: Exception | None = None
        try:
            while stop is None:
                try:
                    for source in itertools.islice(feed, max(0, _AHEAD * batch_size - len(waiting))):
                        waiting.append((source, pool.submit(decode, source)))
                except (OSError, ValueError) as error:
                    ended = error  # after this the feed is empty
                if not waiting:
                    stop = ended
                    break
                source, result = waiting.popleft()
                try:
                    images.append(result.result())
                    files.append(source)
                except BadImageError as error:
                    try:
                        skipped.add(error)
                    except CommandError as refusal:
                        stop = refusal
                if len(files) == batch_size:
                    yield torch.stack(images), files
                    images, files = [], []
            if files:
                yield torch.stack(images), files
            if stop is not None:
                raise stop
        finally:
            for _, result in waiting:
                result.cancel()
