"""Image files: what their decoders give, and pictures of it. Formats, sizes, damaged files, orientation.

This file needs numpy and Pillow only, and tifffile for the TIFF files that Pillow cannot read: tools/export.py puts it
beside the models, inside of early_exit.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO, Any, Iterator, Union  # noqa: UP035 (the copy is for any Python 3)

import numpy as np
from PIL import Image, ImageFile

from mambascope.models.pictures import ChannelsError, Colours, ValueRange, is_deep, keep_info, to_picture, upright

MAX_PIXELS = 2**30  # beyond this a file is taken for an attack or an accident
REDUCE_ABOVE = 2**26  # images with more pixels are shrunk by a whole factor while they are read

Source = Union[str, "os.PathLike[str]", IO[bytes]]

# Pillow knows the formats' names; MPEG it cannot decode, for EPS it runs Ghostscript
_NO_IMAGES = ("EPS", "MPEG")
_lock = threading.Lock()
_REDUCIBLE = ("L", "RGB", "RGBA", "CMYK", "LA", "YCbCr")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NUMPY = b"\x93NUMPY"
# Pillow hands over the upper bytes of 16-bit colours; read in the other byte order the same unpackers give the lower
_OTHER_BYTE = {
    f"{name};16{order}": f"{name};16{other}"
    for name in ("RGB", "RGBX", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B"))
}


@lru_cache(maxsize=None)  # noqa: UP033 (the copy is for any Python 3)
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read as images, in the order in which they are tried."""
    Image.preinit()  # the usual formats first
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in _NO_IMAGES and not _is_stub(Image.OPEN[kind][0]))


def _is_stub(opener: object) -> bool:
    """Whether Pillow recognises a format and cannot read it: HDF5, GRIB, BUFR, WMF."""
    return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Suspends Pillow's limit on the number of pixels, in favour of ours."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels are more than the {MAX_PIXELS / 1e6:.0f} million allowed")


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """The file at its beginning, where it is left again."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    else:
        source.seek(0)
        yield source
        source.seek(0)


def _read_numpy(source: Source) -> np.ndarray:
    values = np.load(source, allow_pickle=False)
    if values.ndim == 3:  # height and width are the longest two, wherever the channels stand
        _check_size(*sorted(values.shape)[1:])
    elif values.ndim == 2:
        _check_size(*values.shape)
    return values


def _samples(source: Source) -> int:
    """Channels of a TIFF file by its header; 0 where Pillow does not understand even that."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with _opened(source) as file, suppress(Exception):  # BigTIFF and damaged headers
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(277, 1))
    return 0


def _read_tiff(source: Source, channels: int) -> np.ndarray:
    """Values of a TIFF file that Pillow has no mode for: several channels of other than 8 bits, or many of them."""
    if importlib.util.find_spec("tifffile") is None:
        stored = _samples(source)
        if stored > 4 and stored != channels:
            raise ChannelsError(stored, channels)
        raise ValueError("Pillow has no mode for this kind of TIFF: pip install tifffile")
    import tifffile

    with _opened(source) as binary, tifffile.TiffFile(binary) as file:
        page: Any = file.pages[0]
        series = file.series[0]
        # one page per channel; or, as tifffile writes an array [H, W, C] unless it is told more, one per row
        stack = page.ndim == 2 and series.ndim == 3 and channels > 1 and channels in (series.shape[0], series.shape[2])
        _check_size(page.imagelength, page.imagewidth)
        values: np.ndarray = series.asarray() if stack else page.asarray()
    if not stack and page.ndim == 3 and page.planarconfig == 2:
        values = np.moveaxis(values, 0, 2)
    return values


def _damaging(image: Image.Image) -> bool:
    """Whether Pillow would read a TIFF's separate 16-bit channels as bytes, which makes noise of them."""
    tags = getattr(image, "tag_v2", {})
    deep = max(tags.get(258, (8,))) > 8
    return deep and tags.get(284) == 2 and image.mode in ("RGB", "RGBA", "CMYK", "LAB")


def _lower_bytes(source: Source) -> Image.Image | None:
    """The lower bytes of 16-bit colours; None where Pillow has no unpacker for them."""

    def other(args: Any) -> Any:
        if isinstance(args, tuple):
            return tuple(other(part) for part in args)
        return _OTHER_BYTE.get(args, args) if isinstance(args, str) else args

    with _without_pillows_limit():
        file = Image.open(source, formats=image_formats())
    with file:
        tiles = [tile._replace(args=other(tile.args)) for tile in file.tile]
        if tiles == file.tile:
            return None
        file.tile = tiles
        with _without_pillows_limit():
            file.load()
        return upright(file)


def _colours(source: Source, image: Image.Image) -> Colours:
    """Both bytes of 16-bit colours, of which Pillow gives the upper."""
    lower = _lower_bytes(source)
    upper = upright(image)
    values = np.asarray(upper).astype(np.uint16) << 8 | np.asarray(upper if lower is None else lower)
    if image.mode == "RGBA":
        return Colours(values[..., :3], values[..., 3])
    clear = image.info.get("transparency")  # the colour that is to be seen through
    return Colours(values, None if clear is None else 65535 * (values != clear).any(2).astype(np.uint16))


def _read_pillow(source: Source, deep: bool, whole: bool) -> Image.Image | Colours:
    with _without_pillows_limit():
        file = Image.open(source, formats=image_formats())
    with file:
        image: Image.Image = file
        if _damaging(file):
            raise Image.UnidentifiedImageError
        width, height = image.size
        _check_size(height, width)
        factor = 1 if whole else math.ceil(math.sqrt(width * height / REDUCE_ABOVE))
        if factor > 1:
            file.draft(None, (width // factor, height // factor))  # JPEG: decodes at a fraction of the size
        deep = deep and image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in file.tile)
        with _without_pillows_limit():
            image.load()  # the first frame
        if deep:
            return _colours(source, image)
        if factor > 1 and image.size == (width, height) and image.mode in _REDUCIBLE:
            image = keep_info(image.reduce(factor), image)
        return upright(image)


def is_ordinary(source: Source) -> bool:
    """Whether a file says that it is an image of 8 bits and up to four channels; its pixels are not read."""
    try:
        with _without_pillows_limit():
            image = Image.open(source, formats=image_formats())
    except Image.UnidentifiedImageError:
        return False
    with image:
        return not is_deep(image) and not any(";16" in str(tile[3]) for tile in image.tile) and not _damaging(image)


def load(
    source: Source, channels: int = 3, deep: bool = False, whole: bool = False
) -> Image.Image | Colours | np.ndarray:
    """What :func:`to_picture` makes a picture of: an upright Pillow image, or values that Pillow has no mode for.

    Args:
        source: Path or binary file: any format of Pillow's, TIFF, or an array in an ``.npy`` file.
        channels: That are wanted.
        deep: Read both bytes of 16-bit colours.
        whole: Never shrink it, for annotations that are in its pixels.
    """
    with _opened(source) as file:
        start = file.read(6)
    if start == _NUMPY:
        return _read_numpy(source)
    tiff = start[:4] in _TIFF
    if tiff and channels not in (1, 3) and importlib.util.find_spec("tifffile") is not None:
        return _read_tiff(source, channels)
    try:
        return _read_pillow(source, deep, whole)
    except Image.UnidentifiedImageError:
        if not tiff:
            raise
        return _read_tiff(source, channels)


def read_picture(
    source: Source, channels: int = 3, value_range: ValueRange = None, whole: bool = False
) -> Image.Image | np.ndarray:
    """Reads an image file as models take it.

    Grey, palette, CMYK, YCbCr, Lab, 1-bit, 16-bit, 32-bit and floating-point images are converted. Without a value
    range 16-bit values are divided by 257 (by 256 in colours); floating-point ones up to 1 are multiplied by 255,
    larger ones scaled by their maximum when it exceeds 255. Transparent pixels show :data:`BACKGROUND` (white). EXIF
    rotation is applied. Of several frames the first is taken. Images of more than :data:`REDUCE_ABOVE` pixels come back
    smaller by a whole factor.

    Args:
        source: Path or binary file, see :func:`load`.
        channels: Of the model, see :func:`to_picture`.
        value_range: The file's values that become 0–255, see :func:`to_bytes`.
        whole: See :func:`load`.

    Returns:
        An RGB picture for three channels, else uint8 [H, W, channels].

    Raises:
        Exception: Of whatever kind the decoder raises; :func:`read_reason` puts it into words.
    """
    return to_picture(load(source, channels, value_range is not None, whole), channels, value_range)


def read_reason(error: Any) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
