"""Image files as pictures of 8 bits per channel: one set of rules for training, prediction and exported models.

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
from typing import IO, Any, Iterator, NamedTuple, Tuple, Union  # noqa: UP035 (the copy is for any Python 3)

import numpy as np
from PIL import Image, ImageFile, ImageOps

BACKGROUND = (255, 255, 255)  # what lies behind transparent pixels
MAX_PIXELS = 2**30  # beyond this a file is taken for an attack or an accident
REDUCE_ABOVE = 2**26  # images with more pixels are shrunk by a whole factor while they are read
PERCENTILES = (2.0, 98.0)
STRETCHES = ("file", "percentile")

Source = Union[str, "os.PathLike[str]", IO[bytes]]
ValueRange = Union[Tuple[float, float], str, None]  # noqa: UP006, UP007

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


class ChannelsError(ValueError):
    """An image with another number of channels than the model takes."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(
            f"it has {found} channels, the model takes {wanted} (a model for such images is trained with "
            f"--model.net.args.in_chans {found})"
        )


class Colours(NamedTuple):
    """Colours of 16 bits, for which Pillow has no mode.

    Attributes:
        values: Red, green and blue [H, W, 3] uint16.
        alpha: How opaque [H, W] uint16; None where everything is.
    """

    values: np.ndarray
    alpha: np.ndarray | None = None


def check_value_range(value: Any) -> ValueRange:
    """A value range as (low, high), ``"file"``, ``"percentile"`` or None.

    Raises:
        ValueError: For anything else.
    """
    if value is None or value in STRETCHES:
        return value
    with suppress(TypeError, ValueError):
        low, high = (float(v) for v in ([] if isinstance(value, str) else value))
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    raise ValueError(
        f"value_range must be the values that become 0 and 255, [low, high], or one of {', '.join(STRETCHES)}, "
        f"got {value!r}"
    )


def full_range(values: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 255 where no range is given: what such values usually span."""
    top = float(np.max(values, initial=0.0, where=np.isfinite(values)))
    if values.dtype.kind == "b":
        return 0.0, 1.0
    if values.dtype.kind == "f":
        return 0.0, 1.0 if top <= 1 else 255.0 if top <= 255 else top
    if values.dtype.itemsize == 1:
        return 0.0, float(np.iinfo(values.dtype).max)
    # 16-bit files arrive as 16 bits, or as 32 where Pillow has no mode for them
    return 0.0, 65535.0 if top <= 65535 else 2.0**31 - 1 if top < 2**31 else 2.0**32 - 1


def to_bytes(values: np.ndarray, value_range: ValueRange = None) -> np.ndarray:
    """Values of any kind and shape as 0–255 (uint8); what is not a number becomes 0.

    Args:
        values: Whole, floating-point or logical numbers.
        value_range: (low, high) become 0 and 255, values beyond are cut; ``"file"``: the smallest and the largest
            value do; ``"percentile"``: :data:`PERCENTILES` of the values do. None: see :func:`full_range`.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(f"images hold numbers, not {values.dtype}")
    if value_range is None and values.dtype == np.uint8:
        return values
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if value_range is None:
        numbers[~finite] = 0.0
        low, high = full_range(values)
    elif isinstance(value_range, str):
        some = numbers[finite]
        if not some.size:
            return np.zeros(values.shape, np.uint8)
        low, high = (
            (some.min(), some.max()) if value_range == "file" else (float(v) for v in np.percentile(some, PERCENTILES))
        )
    else:
        low, high = value_range
    numbers[np.isnan(numbers)] = low
    scale = 255.0 / (high - low) if high > low else 0.0
    with np.errstate(invalid="ignore"):  # infinity times no contrast
        return np.clip(np.nan_to_num((numbers - low) * scale) + 0.5, 0, 255).astype(np.uint8)


# ---- from what a decoder gives to a picture --------------------------------------------------------------------------


def is_deep(image: Image.Image) -> bool:
    """Whether an image holds 16-bit, 32-bit or floating-point values."""
    return image.mode.startswith("I") or image.mode == "F"


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _to_rgb(image: Image.Image, value_range: ValueRange) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info and value_range is None:
        return image
    if is_deep(image):
        image = Image.fromarray(to_bytes(np.asarray(image), value_range))
        value_range = None
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if not image.has_transparency_data:
        image = image.convert("RGB")
        return image if value_range is None else Image.fromarray(to_bytes(np.asarray(image), value_range))
    layer = image.convert("RGBA")
    if value_range is not None:
        pixels = np.asarray(layer)
        layer = Image.fromarray(np.dstack([to_bytes(pixels[..., :3], value_range), pixels[..., 3]]))
    canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(canvas, layer).convert("RGB")


def _bands(image: Image.Image) -> np.ndarray:
    """Every band as a channel [H, W, C]."""
    if image.mode in ("1", "P", "PA", "LAB", "YCbCr", "HSV"):
        image = _lab_to_rgb(image) if image.mode == "LAB" else image.convert("RGB")
    return np.atleast_3d(np.asarray(image))


def _grey(image: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(image.convert("L")))


def _array_picture(values: np.ndarray, channels: int, value_range: ValueRange) -> Image.Image | np.ndarray:
    """Picture of values [H, W], [H, W, C] or [C, H, W]."""
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"it must be an array [H, W] or [H, W, channels], got {list(values.shape)}")
    if values.shape[2] not in (channels, 1) and values.shape[0] in (channels, 1):
        values = np.moveaxis(values, 0, 2)
    found = values.shape[2]
    if channels == 3 and found == 1:
        return Image.fromarray(to_bytes(values[:, :, 0], value_range)).convert("RGB")
    if channels == 1 and found == 3:
        return _grey(Image.fromarray(to_bytes(values, value_range)))
    if found != channels:
        raise ChannelsError(min(values.shape[0], found), channels)
    pixels = np.ascontiguousarray(to_bytes(values, value_range))
    return Image.fromarray(pixels) if channels == 3 else pixels


def _colour_picture(image: Colours, channels: int, value_range: ValueRange) -> Image.Image | np.ndarray:
    values, alpha = image
    if channels not in (1, 3):
        return _array_picture(values if alpha is None else np.dstack([values, alpha]), channels, value_range)
    pixels = to_bytes(values, value_range)
    if alpha is not None:
        pixels = np.dstack([pixels, to_bytes(alpha)])
    picture = _to_rgb(Image.fromarray(pixels), None)
    return picture if channels == 3 else _grey(picture)


def to_picture(image: Any, channels: int = 3, value_range: ValueRange = None) -> Image.Image | np.ndarray:
    """An image as models take it: an RGB picture for three channels, else uint8 [H, W, channels].

    Args:
        image: Pillow image of any mode, values [H, W], [H, W, C] or [C, H, W], or 16-bit colours.
        channels: Of the model. Colours become grey for one; other numbers must be those of the image.
        value_range: See :func:`to_bytes`.

    Raises:
        ChannelsError: When the channels are others.
        ValueError: For an array of another shape or kind.
    """
    if isinstance(image, Colours):
        return _colour_picture(image, channels, value_range)
    if not isinstance(image, Image.Image):
        return _array_picture(np.asarray(image), channels, value_range)
    if _is_turned(image):
        image = _upright(image)
    if channels == 3:
        return _to_rgb(image, value_range)
    if channels > 1:
        return _array_picture(_bands(image), channels, value_range)
    if image.mode == "L" and "transparency" not in image.info:
        return _array_picture(np.asarray(image), 1, value_range)
    return _grey(_to_rgb(image, value_range))


# ---- from a file to what its decoder gives ---------------------------------------------------------------------------


@contextmanager
def _own_limit() -> Iterator[None]:
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
        found = _samples(source)
        if found > 4 and found != channels:
            raise ChannelsError(found, channels)
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


def _keep_info(image: Image.Image, original: Image.Image) -> Image.Image:
    for name in ("transparency", "exif"):
        if name in original.info:
            image.info.setdefault(name, original.info[name])
    return image


def _is_turned(image: Image.Image) -> bool:
    with suppress(Exception):
        return bool(image.getexif().get(274, 1) != 1)
    return False


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # broken EXIF data is no reason to refuse an image
        return _keep_info(ImageOps.exif_transpose(image), image)
    return image


def _lower_bytes(source: Source) -> Image.Image | None:
    """The lower bytes of 16-bit colours; None where Pillow has no unpacker for them."""

    def other(args: Any) -> Any:
        if isinstance(args, tuple):
            return tuple(other(part) for part in args)
        return _OTHER_BYTE.get(args, args) if isinstance(args, str) else args

    with _own_limit():
        file = Image.open(source, formats=image_formats())
    with file:
        tiles = [tile._replace(args=other(tile.args)) for tile in file.tile]
        if tiles == file.tile:
            return None
        file.tile = tiles
        with _own_limit():
            file.load()
        return _upright(file)


def _colours(source: Source, image: Image.Image) -> Colours:
    """Both bytes of 16-bit colours, of which Pillow gives the upper."""
    lower = _lower_bytes(source)
    upper = _upright(image)
    values = np.asarray(upper).astype(np.uint16) << 8 | np.asarray(upper if lower is None else lower)
    if image.mode == "RGBA":
        return Colours(values[..., :3], values[..., 3])
    clear = image.info.get("transparency")  # the colour that is to be seen through
    return Colours(values, None if clear is None else 65535 * (values != clear).any(2).astype(np.uint16))


def _read_pillow(source: Source, deep: bool, whole: bool) -> Image.Image | Colours:
    with _own_limit():
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
        with _own_limit():
            image.load()  # the first frame
        if deep:
            return _colours(source, image)
        if factor > 1 and image.size == (width, height) and image.mode in _REDUCIBLE:
            image = _keep_info(image.reduce(factor), image)
        return _upright(image)


def is_ordinary(source: Source) -> bool:
    """Whether a file says that it is an image of 8 bits and up to four channels; its pixels are not read."""
    try:
        with _own_limit():
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
