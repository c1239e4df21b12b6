"""Opens any image that users really have, as models take it; files that cannot be read are named."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any, Literal, overload

import numpy as np
from PIL import Image

from mambascope.data.errors import DataError
from mambascope.models import picture_files, pictures
from mambascope.models.picture_files import read_reason
from mambascope.models.pictures import ChannelsError, ValueRange

_log = logging.getLogger("mambascope.data")
LOOKED_AT = 16  # files whose values are looked at before a run
_SMALL_PART = 0.25  # of the range
_BELOW = 0.02  # of the range: a resampled image may overshoot a little


class BadImageError(DataError):
    """A file that cannot be read as an image."""


def _name(source: Any, name: str | None) -> str:
    if name is not None:
        return name
    return str(getattr(source, "name", source) if hasattr(source, "read") else os.fspath(source))


@overload
def open_image(
    source: str | os.PathLike[str] | IO[bytes],
    name: str | None = None,
    channels: Literal[3] = 3,
    value_range: ValueRange = None,
    *,
    whole: bool = False,
) -> Image.Image: ...


@overload
def open_image(
    source: str | os.PathLike[str] | IO[bytes], name: str | None, channels: int, value_range: ValueRange = None
) -> Image.Image | np.ndarray: ...


def open_image(
    source: str | os.PathLike[str] | IO[bytes],
    name: str | None = None,
    channels: int = 3,
    value_range: ValueRange = None,
    *,
    whole: bool = False,
) -> Image.Image | np.ndarray:
    """Reads an image file by the rules of :func:`mambascope.models.picture_files.read_picture`.

    Args:
        source: Path or binary file.
        name: How errors call it; by default the path.
        channels: Of the model.
        value_range: The file's values that become 0–255: (low, high), ``"file"`` or ``"percentile"``; by default all
            that such files can hold.
        whole: Never to shrink it, for annotations that are in its pixels.

    Returns:
        An RGB picture for three channels, else uint8 [H, W, channels].

    Raises:
        BadImageError: Naming the file, when it is missing, no image, damaged, too large, or has other channels.
    """
    try:
        return picture_files.read_picture(source, channels, value_range, whole)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen kinds of exceptions on damaged files
        raise BadImageError(f"cannot read image {_name(source, name)}: {read_reason(error)}") from error


def convert_image(image: Any, name: str, channels: int = 3, value_range: ValueRange = None) -> Image.Image | np.ndarray:
    """An image that somebody else has read, as :func:`open_image` gives it.

    Raises:
        BadImageError: Naming the image, when it has other channels.
    """
    try:
        return pictures.to_picture(image, channels, value_range)
    except ValueError as error:
        raise BadImageError(f"cannot use image {name}: {error}") from error


@dataclass
class _Values:
    """What the values of some files are, and which of them become 0 and 255."""

    low: float = np.inf
    high: float = -np.inf
    full: tuple[float, float] = (np.inf, -np.inf)
    files: int = 0

    def add(self, values: np.ndarray, full: tuple[float, float]) -> None:
        finite = values[np.isfinite(values)]
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.full = min(self.full[0], full[0]), max(self.full[1], full[1])
        self.files += 1

    def narrow(self, chosen: bool) -> bool:
        """Whether little is left of the range, or values below it are cut although nobody chose it."""
        bottom, top = self.full
        used = min(self.high, top) - max(self.low, bottom)
        below = not chosen and self.low < bottom - _BELOW * (top - bottom)
        return self.low <= self.high and (used < _SMALL_PART * (top - bottom) or below)


def survey(
    sources: Iterable[tuple[Any, str]],
    channels: int,
    value_range: ValueRange,
    warn: bool = True,
) -> None:
    """Looks at some images before many are read, and warns in one line when their values use little of the range.

    Args:
        sources: (path, binary file or Pillow image, name); the first :data:`LOOKED_AT` are taken.
        channels: Of the model.
        value_range: As for :func:`open_image`.
        warn: Whether to say it; of several processes only one should.

    Raises:
        BadImageError: Naming the first file, when all of them have other channels than the model. Single files that
            cannot be read are left to whoever reads them all.
    """
    seen, chosen = _Values(), value_range is not None
    fits, refusal = False, None
    for source, name in itertools.islice(sources, LOOKED_AT):
        try:
            read = isinstance(source, Image.Image)
            if not chosen and channels == 3 and not read and picture_files.is_ordinary(source):
                fits = True
                continue
            loaded = source if read else picture_files.load(source, channels, deep=True)
            pictures.to_picture(loaded, channels, value_range)
        except ChannelsError as error:
            refusal = refusal or BadImageError(f"cannot read image {name}: {error}")
            continue
        except Exception:  # named when it is read
            continue
        fits = True
        if isinstance(loaded, Image.Image) and not pictures.is_deep(loaded):
            loaded = loaded.convert("RGB")  # a palette's numbers are no values
        values = loaded.values if isinstance(loaded, pictures.Colours) else np.asarray(loaded)
        if not isinstance(value_range, str) and (chosen or values.dtype != np.uint8):
            seen.add(values, value_range if isinstance(value_range, tuple) else pictures.full_range(values))
    if refusal is not None and not fits:
        raise refusal
    if warn and seen.narrow(chosen):
        bottom, top = seen.full
        ends = pictures.to_bytes(np.array([seen.low, seen.high]), seen.full)
        _log.warning(
            "the values of %d images looked at are %g to %g; of the range %g to %g they become %d to %d of 0 to 255: "
            "set value_range to those that shall become 0 and 255 ([low,high], file or percentile)",
            *(seen.files, seen.low, seen.high, bottom, top, *ends),
        )
