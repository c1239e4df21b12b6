"""timm's transforms, with what current Pillow needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import auto_augment

from mambascope.models.preprocessing import create_transform


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    # strong magnitudes ask for 0 bits, which is a black image; Pillow 13 refuses that number
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def _operations(transform: Any) -> Iterator[Any]:
    """All AugmentOps inside a transform."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _operations(part)
    else:
        for name in ("transforms", "ops", "policy"):
            yield from _operations(getattr(transform, name, ()))


def make_transform(input_size: tuple[int, int, int], **options: Any) -> Callable[[Any], Any]:
    """:func:`mambascope.models.preprocessing.create_transform` for a model of (channels, height, width).

    Raises:
        ValueError: When timm does not accept an option.
    """
    try:
        transform = create_transform(input_size, **options)
    except AssertionError as error:
        raise ValueError(f"transform options not accepted: {error or options.get('auto_augment')}") from error
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform
