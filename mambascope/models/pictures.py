"""Images of any kind as pictures of 8 bits per channel: one set of rules for training, prediction and exported models.

This file needs numpy and Pillow only: tools/export.py puts it beside the models, inside of early_exit.py.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple, Tuple, Union  # noqa: UP035 (the copy is for any Python 3)

import numpy as np
from PIL import Image, ImageOps

BACKGROUND = (255, 255, 255)  # what lies behind transparent pixels
PERCENTILES = (2.0, 98.0)
STRETCHES = ("file", "percentile")

ValueRange = Union[Tuple[float, float], str, None]  # noqa: UP006, UP007


class ChannelsError(ValueError):
    """An image with another number of channels than the model takes."""

    def __init__(self, channels: int, accepted: int) -> None:
        super().__init__(
            f"it has {channels} channels, the model takes {accepted} (a model for such images is trained with "
            f"--model.net.args.in_chans {channels})"
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


def keep_info(image: Image.Image, original: Image.Image) -> Image.Image:
    """`image` with the transparency and EXIF data of the one that it was made of."""
    for name in ("transparency", "exif"):
        if name in original.info:
            image.info.setdefault(name, original.info[name])
    return image


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF data say that an image is to be shown turned."""
    with suppress(Exception):
        return bool(image.getexif().get(274, 1) != 1)
    return False


def upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF data say that it is to be shown."""
    with suppress(Exception):  # broken EXIF data is no reason to refuse an image
        return keep_info(ImageOps.exif_transpose(image), image)
    return image


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
    stored = values.shape[2]
    if channels == 3 and stored == 1:
        return Image.fromarray(to_bytes(values[:, :, 0], value_range)).convert("RGB")
    if channels == 1 and stored == 3:
        return _grey(Image.fromarray(to_bytes(values, value_range)))
    if stored != channels:
        raise ChannelsError(min(values.shape[0], stored), channels)
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
    if is_turned(image):
        image = upright(image)
    if channels == 3:
        return _to_rgb(image, value_range)
    if channels > 1:
        return _array_picture(_bands(image), channels, value_range)
    if image.mode == "L" and "transparency" not in image.info:
        return _array_picture(np.asarray(image), 1, value_range)
    return _grey(_to_rgb(image, value_range))
