"""Opens any image that users really have, as RGB."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from mambascope.data.errors import DataError
from mambascope.data.files import image_formats

BACKGROUND = (255, 255, 255)  # what lies behind transparent pixels
MAX_PIXELS = 2**30  # beyond this a file is taken for an attack or an accident
REDUCE_ABOVE = 2**26  # images with more pixels are shrunk by a whole factor while they are read

_lock = threading.Lock()
_REDUCIBLE = ("L", "RGB", "RGBA", "CMYK", "LA", "YCbCr")


class BadImageError(DataError):
    """A file that cannot be read as an image."""


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


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and floating-point grey values to 0–255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = values.max(initial=0.0)
    if image.mode == "F":
        scale = 255.0 if top <= 1 else 1.0 if top <= 255 else 255.0 / top
    else:  # 16-bit files arrive as I;16, or as I where Pillow has no 16-bit mode for them
        scale = 255.0 / (65535.0 if top <= 65535 else 2.0**31 - 1 if top < 2**31 else 2.0**32 - 1)
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.convert("RGB")


def _decode(source: str | os.PathLike[str] | IO[bytes], whole: bool) -> Image.Image:
    with _own_limit():
        file = Image.open(source, formats=image_formats())
    with file:
        image: Image.Image = file
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}×{height} pixels are more than the {MAX_PIXELS / 1e6:.0f} million allowed")
        factor = 1 if whole else math.ceil(math.sqrt(width * height / REDUCE_ABOVE))
        if factor > 1:
            file.draft(None, (width // factor, height // factor))  # JPEG: decodes at a fraction of the size
        with _own_limit():
            image.load()  # the first frame
        if factor > 1 and image.size == (width, height) and image.mode in _REDUCIBLE:
            image = _keep_info(image.reduce(factor), image)
        with suppress(Exception):  # broken EXIF data is no reason to refuse an image
            image = _keep_info(ImageOps.exif_transpose(image), image)
        return _to_rgb(image)


def _keep_info(image: Image.Image, original: Image.Image) -> Image.Image:
    for name in ("transparency", "exif"):
        if name in original.info:
            image.info.setdefault(name, original.info[name])
    return image


def open_image(
    source: str | os.PathLike[str] | IO[bytes], name: str | None = None, *, whole: bool = False
) -> Image.Image:
    """Reads an image file as RGB.

    Grey, palette, CMYK, YCbCr, Lab, 1-bit, 16-bit, 32-bit and floating-point images are converted: 16-bit values are
    divided by 257; floating-point ones up to 1 are multiplied by 255, larger ones scaled by their maximum when it
    exceeds 255. Transparent pixels show :data:`BACKGROUND` (white). EXIF rotation is applied. Of several frames the
    first is taken. Images of more than :data:`REDUCE_ABOVE` pixels come back smaller by a whole factor.

    Args:
        source: path or binary file.
        name: how errors call it; by default the path.
        whole: never to shrink it, for annotations that are in its pixels.

    Raises:
        BadImageError: naming the file, when it is missing, no image, damaged, or larger than :data:`MAX_PIXELS`.
    """
    if name is None:
        name = str(getattr(source, "name", source) if hasattr(source, "read") else os.fspath(source))
    try:
        return _decode(source, whole)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen kinds of exceptions on damaged files
        raise BadImageError(f"cannot read image {name}: {read_reason(error)}") from error


def read_reason(error: Any) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
