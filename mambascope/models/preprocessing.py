"""From a picture to the tensor that a model takes: what its weights say, carried out by timm's transforms."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from mambascope.models.picture_files import read_picture
from mambascope.models.pictures import ValueRange, check_value_range, to_picture


def per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value per channel, from as many or from one for all.

    Raises:
        ValueError: For another number of values.
    """
    if len(values) not in (1, channels):
        raise ValueError(f"{name} must hold one value per channel ({channels}) or one for all, got {len(values)}")
    return tuple(float(v) for v in values) * (channels if len(values) == 1 else 1)


def average(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Values of red, green and blue for a model with `channels`: themselves, or their mean for each."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


class PerBand:
    """A transform for other than three channels: each as a grey picture, all with the same random choices.

    Args:
        transforms: One per channel, each from a grey picture to [1, h, w].
    """

    def __init__(self, transforms: Sequence[Callable[[Image.Image], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Tensor:
        """Values [H, W, C], or a picture that has so many channels or becomes grey, to [C, h, w]."""
        values = np.asarray(to_picture(image, len(self.transforms)))
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (transforms use them)
        bands = []
        for number, transform in enumerate(self.transforms):
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])
            bands.append(transform(Image.fromarray(np.ascontiguousarray(values[:, :, number]))))
        return torch.cat(bands)


def create_transform(
    input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], **options: Any
) -> Callable[[Any], Tensor]:
    """``timm.data.create_transform`` for any number of channels.

    Args:
        input_size: (channels, height, width).
        mean: One value per channel, or one for all.
        std: The same.
        **options: Of timm's.

    Returns:
        From an RGB picture, or uint8 [H, W, C] where there are not three channels, to the tensor [C, H, W].
    """
    from timm.data import create_transform as timm_transform

    channels, height, width = input_size
    mean, std = per_channel("mean", mean, channels), per_channel("std", std, channels)
    if channels == 3:
        return timm_transform(input_size, mean=mean, std=std, **options)
    return PerBand(
        [timm_transform((1, height, width), mean=(m,), std=(s,), **options) for m, s in zip(mean, std, strict=True)]
    )


def default_preprocessing(image_hw: tuple[int, int]) -> dict[str, Any]:
    """Of models for images of (height, width) whose weights say nothing else."""
    small = image_hw[0] < 128
    return {
        "mean": IMAGENET_INCEPTION_MEAN if small else IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_INCEPTION_STD if small else IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if small else 0.9,
    }


def preprocessing(model: Any) -> dict[str, Any]:
    """How images are prepared for `model`: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` and
    ``value_range``.

    From what its file says; the rest is as timm's entries of this package have it for images of that size. A file that
    says something, but nothing of a crop, is of a model that saw whole images.
    """
    channels = model.config.in_chans
    cfg = getattr(model, "pretrained_cfg", None) or {}
    facts = default_preprocessing(model.config.image_hw)
    stored = model.description.get("transform") or {}
    for source in (cfg, model.description, {"crop_pct": 1.0, **stored} if stored else {}):
        facts.update({key: source[key] for key in facts if source.get(key) is not None})
    for name in ("mean", "std"):
        # timm's entries are for RGB, whatever the model takes
        values = facts[name]
        facts[name] = average(values, channels) if len(values) == 3 else per_channel(name, values, channels)
    return {**facts, "value_range": stored_value_range(model), "input_size": (channels, *model.config.image_hw)}


def stored_value_range(model: Any) -> ValueRange:
    """The values of a file that become 0–255, as the weights say; None where they do not.

    Raises:
        ValueError: When they say something else.
    """
    return check_value_range((model.description.get("transform") or {}).get("value_range"))


@dataclass(frozen=True)
class ToPicture:
    """First step of a transform: paths, Pillow images of any mode and arrays become pictures as models take them.

    Attributes:
        channels: Of the model.
        value_range: Values of the images that become 0–255.
    """

    channels: int
    value_range: ValueRange

    def __call__(self, image: Any) -> Image.Image | np.ndarray:
        """The picture."""
        read = read_picture if isinstance(image, (str, os.PathLike)) else to_picture
        return read(image, self.channels, self.value_range)


def make_transform(model: Any, is_training: bool = False, value_range: ValueRange = None) -> Callable[[Any], Tensor]:
    """Preprocessing of one image for `model` to the tensor [C, H, W].

    Args:
        model: The model.
        is_training: With timm's random crop, flip and colours.
        value_range: Values of the images that become 0–255; by default they are pictures of 8 bits already, as
            ``open_image`` gives them.
    """
    from torchvision.transforms import Compose

    options = preprocessing(model)
    del options["value_range"]
    first = ToPicture(model.config.in_chans, value_range)
    return Compose([first, create_transform(**options, is_training=is_training)])
