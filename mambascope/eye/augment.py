"""Random glimpse sequences for training MambaEye: the augmentation of its public recipe, on uint8 pictures throughout.

Where the public code drops an image whose crop cannot be drawn (extreme aspect ratios) and puts a copy of another one
in its place, the range of the crop is narrowed here, so that every image is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from mambascope.data.errors import DataError
from mambascope.eye.glimpses import GlimpseSequence, make_sequence, training_positions
from mambascope.eye.placement import Placement, as_bands, from_bands, paste

_BLUR_KERNEL, _BLUR_SIGMA = (5, 9), (0.1, 5.0)  # width and height in pixels; standard deviation
_ERASED_AREA, _ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)


@dataclass(frozen=True)
class GlimpseAugment:
    """What happens to a training image, in this order; the defaults are the paper's.

    Attributes:
        canvas_size: Smallest and largest side of the canvas, which every image draws anew.
        hflip: Probability of a horizontal flip.
        color_jitter: Largest change of brightness, contrast, saturation and hue.
        color_jitter_prob: Probability of it.
        grayscale: Probability of losing the colours.
        blur: Probability of a Gaussian blur.
        perspective: Probability of a perspective view: every corner moves.
        perspective_shift: How far at most, as a share of the shorter side.
        crop: Probability of a random crop.
        min_share: Shortest side of the crop and of the stretched image, as a share of the shorter side.
        stretch: Whether the crop is resized to a random height and width up to the canvas; otherwise it stays as large
            as it is.
        erase: Probability of erasing a rectangle.
        localised: Probability that glimpses fall on the image, otherwise anywhere on the canvas.
    """

    canvas_size: tuple[int, int] = (256, 1024)
    hflip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    color_jitter_prob: float = 0.4
    grayscale: float = 0.2
    blur: float = 0.2
    perspective: float = 0.3
    perspective_shift: float = 0.25
    crop: float = 0.8
    min_share: float = 0.3
    stretch: bool = True
    erase: float = 0.4
    localised: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.canvas_size
        if not 1 <= low <= high:
            raise DataError(f"augment.canvas_size must be (smallest, largest) in pixels, got {self.canvas_size!r}")
        for name in ("hflip", "color_jitter_prob", "grayscale", "blur", "perspective", "crop", "erase", "localised"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if not all(0 <= value <= limit for value, limit in zip(self.color_jitter, (1, 1, 1, 0.5), strict=True)):
            raise DataError(f"augment.color_jitter must lie in [0, 1] (hue: [0, 0.5]), got {self.color_jitter!r}")
        for name in ("perspective_shift", "min_share"):
            if not 0 <= getattr(self, name) < 0.5:
                raise DataError(f"augment.{name} must lie in [0, 0.5), got {getattr(self, name)!r}")

    def __call__(self, picture: Any, rng: np.random.Generator, patch_size: int) -> tuple[Tensor, Placement]:
        """A random view of a picture (RGB, or uint8 [H, W, C]) on a canvas [C, S, S] uint8, and where it lies there."""
        bands = as_bands(picture)
        side = max(patch_size, int(rng.integers(*self.canvas_size, endpoint=True)))
        scale = side / max(bands[0].size)
        width, height = (max(1, int(scale * v)) for v in bands[0].size)
        bands = [band.resize((width, height), Image.Resampling.BICUBIC) for band in bands]
        if rng.random() < self.hflip:
            bands = [band.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for band in bands]
        bands = self._colours(bands, rng)
        if rng.random() < self.perspective:
            bands = _perspective(bands, rng, self.perspective_shift)
        smallest = max(patch_size, int(self.min_share * min(bands[0].size)))
        if rng.random() < self.crop:
            bands = _crop(bands, rng, smallest)
        if self.stretch:
            smallest = min(smallest, side)
            width, height = rng.integers(smallest, side, 2, endpoint=True).tolist()
        else:  # the perspective view may be larger than the canvas, a thin image smaller than a patch
            fit = min(1.0, side / max(bands[0].size))
            width, height = (min(side, max(patch_size, int(fit * v))) for v in bands[0].size)
        if (width, height) != bands[0].size:
            bands = [band.resize((width, height), Image.Resampling.LANCZOS) for band in bands]
        pixels = from_bands(bands)
        if rng.random() < self.erase:
            _erase(pixels, rng)
        return paste(pixels, side)

    def _colours(self, bands: list[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        """Of other than three channels only brightness and contrast change: grey pictures have no colours to change."""
        if rng.random() < self.color_jitter_prob:
            adjust: list[Callable[..., Any]] = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
            for i in rng.permutation(4).tolist():
                strength = self.color_jitter[i]
                change = adjust[i] if i < 3 else F.adjust_hue
                amount = rng.uniform(1 - strength, 1 + strength) if i < 3 else rng.uniform(-strength, strength)
                bands = [change(band, amount) for band in bands]
        if rng.random() < self.grayscale:
            bands = [band.convert("L").convert(band.mode) for band in bands]
        if rng.random() < self.blur:
            # mirrored at the edges, which a thinner image has no room for
            kernel = [min(size, 2 * side - 1) for size, side in zip(_BLUR_KERNEL, bands[0].size, strict=True)]
            sigma = [rng.uniform(*_BLUR_SIGMA)]
            bands = [F.gaussian_blur(band, kernel, sigma) for band in bands]
        return bands


def _perspective(bands: list[Image.Image], rng: np.random.Generator, shift: float) -> list[Image.Image]:
    """Moves every corner; the result is the box around the moved corners, black outside the image."""
    width, height = bands[0].size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    reach = shift * min(width, height)
    moved = corners + rng.uniform(-reach, reach, (4, 2))
    low = np.floor(moved.min(axis=0))
    size = np.maximum(np.ceil(moved.max(axis=0)) - low, 1).astype(int)
    moved -= low
    # PIL wants the map from the result to the source: (a x + b y + c) / (g x + h y + 1), the same with d, e, f
    rows, values = [], []
    for (u, v), (x, y) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows), np.array(values))
    view = (int(size[0]), int(size[1]))
    return [
        band.transform(view, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BICUBIC)
        for band in bands
    ]


def _crop(bands: list[Image.Image], rng: np.random.Generator, smallest: int) -> list[Image.Image]:
    box = []
    for length in bands[0].size:
        low = min(smallest, length)
        size = int(rng.integers(low, max(low, length - smallest), endpoint=True))
        start = int(rng.integers(0, length - size, endpoint=True))
        box.append((start, start + size))
    (left, right), (top, bottom) = box
    return [band.crop((left, top, right, bottom)) for band in bands]


def _erase(pixels: Tensor, rng: np.random.Generator) -> None:
    """Blackens a random rectangle, in place; none if ten draws do not fit."""
    _, height, width = pixels.shape
    for _ in range(10):
        area = height * width * rng.uniform(*_ERASED_AREA)
        ratio = float(np.exp(rng.uniform(*np.log(_ERASED_RATIO))))
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if h < height and w < width:
            top, left = int(rng.integers(0, height - h, endpoint=True)), int(rng.integers(0, width - w, endpoint=True))
            pixels[:, top : top + h, left : left + w] = 0
            return


@dataclass(frozen=True)
class TrainGlimpses:
    """A picture as a random glimpse sequence.

    Attributes:
        augment: What happens to the image.
        length: Glimpses.
        patch_size: Their side in pixels.
    """

    augment: GlimpseAugment
    length: int
    patch_size: int = 16

    def sequence(self, picture: Any, rng: np.random.Generator) -> GlimpseSequence:
        """The sequence that follows from ``rng``."""
        canvas, placement = self.augment(picture, rng, self.patch_size)
        positions = training_positions(
            self.length, placement, patch_size=self.patch_size, seed=rng, localised=self.augment.localised
        )
        return make_sequence(canvas, placement, positions, self.patch_size)

    def __call__(self, picture: Any) -> GlimpseSequence:
        """The same from PyTorch's global generator, which the loaders seed for every sample."""
        return self.sequence(picture, np.random.default_rng(int(torch.randint(2**62, ()).item())))
