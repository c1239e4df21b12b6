"""Where an image lies on its canvas (MambaEye, arXiv 2511.19963).

Shape letters: C channels, H and W canvas height and width, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambascope.data.errors import DataError

RESIZE_MODES = ("none", "fit", "full")


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise DataError(f"{name} must be a positive integer or (height, width), got {value!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class Placement:
    """Where an image lies on its canvas, in pixels.

    Attributes:
        canvas: Height and width of the canvas.
        top: First canvas row of the image.
        left: First canvas column of the image.
        height: Rows of the image as it lies there.
        width: Columns of the image as it lies there.
        source: Height and width of the image before it was resized; ``None`` if it was not.
    """

    canvas: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    source: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise DataError(f"the image must have pixels, got {self.height}x{self.width}")
        ends = self.top + self.height, self.left + self.width
        if min(self.top, self.left) < 0 or ends[0] > self.canvas[0] or ends[1] > self.canvas[1]:
            raise DataError(
                f"an image of {self.height}x{self.width} at ({self.top}, {self.left}) does not fit on a canvas of "
                f"{self.canvas[0]}x{self.canvas[1]} pixels; use a larger canvas_size or resize_mode 'fit' or 'full'"
            )

    @classmethod
    def centred(
        cls, height: int, width: int, canvas: int | tuple[int, int], source: tuple[int, int] | None = None
    ) -> Placement:
        """An image in the middle of a canvas (half pixels go to the bottom and right)."""
        rows, columns = _pair("canvas_size", canvas)
        return cls((rows, columns), (rows - height) // 2, (columns - width) // 2, height, width, source)

    def spans(
        self, patch_size: int, region: tuple[int, int, int, int] | None = None, compat: bool = False
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """First position and end of the area to scan, per axis; a patch that fits ends at or before the end.

        Args:
            patch_size: P.
            region: Part of the placed image to stay in: (top, left, height, width) in its pixels. ``None`` for all.
            compat: The public evaluation's end, P - 1 pixels short where the image reaches the canvas's edge.
        """
        top, left, height, width = region if region is not None else (0, 0, self.height, self.width)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > self.height or left + width > self.width:
            raise DataError(
                f"region must be (top, left, height, width) inside the placed image of {self.height}x{self.width} "
                f"pixels, got {region}"
            )
        spans = []
        for start, size, side in (
            (self.top + top, height, self.canvas[0]),
            (self.left + left, width, self.canvas[1]),
        ):
            if side < patch_size:
                raise DataError(
                    f"canvas_size must be at least the patch size {patch_size}, got {self.canvas[0]}x{self.canvas[1]}"
                )
            end = start + size
            if compat:
                end = min(max(start + 1, end), side - patch_size + 1)
            # an image that resizing made thinner than a patch may lie too close to the edge for one
            spans.append((min(start, side - patch_size), end))
        return spans[0], spans[1]


def as_bands(image: Any) -> list[Image.Image]:
    """An image as pictures that can be resized: one in RGB, or a grey one for each of other than three channels.

    Raises:
        DataError: If it is no PIL image (which becomes RGB), uint8 array [H, W, C] or uint8 tensor [C, H, W].
    """
    if isinstance(image, Image.Image):
        return [image.convert("RGB")]
    array = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    if not isinstance(array, np.ndarray) or array.ndim != 3 or not array.size or array.dtype != np.uint8:
        raise DataError("image must be a PIL image, a uint8 array [H, W, C] or a uint8 tensor [C, H, W]")
    parts = [array] if array.shape[2] == 3 else [array[:, :, i] for i in range(array.shape[2])]
    return [Image.fromarray(np.ascontiguousarray(part)) for part in parts]


def from_bands(bands: Sequence[Image.Image]) -> Tensor:
    """Pixels [C, H, W] uint8 of :func:`as_bands`."""
    return torch.from_numpy(np.dstack([np.array(band) for band in bands])).permute(2, 0, 1)


def paste(pixels: Tensor, canvas_size: int | tuple[int, int]) -> tuple[Tensor, Placement]:
    """Puts pixels [C, h, w] of any dtype into the middle of a zero canvas [C, H, W].

    Raises:
        DataError: If they do not fit.
    """
    placement = Placement.centred(pixels.shape[1], pixels.shape[2], canvas_size)
    canvas = pixels.new_zeros(pixels.shape[0], *placement.canvas)
    rows = slice(placement.top, placement.top + placement.height)
    canvas[:, rows, placement.left : placement.left + placement.width] = pixels
    return canvas, placement


def _resized(bands: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    return [band.resize(size[::-1], Image.Resampling.LANCZOS) for band in bands]


def _fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect that a canvas holds."""
    # whole numbers: the longer side meets the canvas exactly
    if size[0] * canvas[1] >= size[1] * canvas[0]:
        return canvas[0], max(1, size[1] * canvas[0] // size[0])
    return max(1, size[0] * canvas[1] // size[1]), canvas[1]


def place_image(
    image: Any,
    canvas_size: int | tuple[int, int] | None = 512,
    resize_mode: str = "fit",
    *,
    patch_size: int = 16,
    compat: bool = False,
) -> tuple[Tensor, Placement]:
    """Resizes an image (Lanczos) and puts it into the middle of a black canvas.

    Args:
        image: PIL image, which becomes RGB, uint8 array [H, W, C] or uint8 tensor [C, H, W].
        canvas_size: Side of the canvas, or (height, width). ``None`` with mode ``none``: the square around the image.
        resize_mode: ``none`` keeps the size if it fits, else shrinks; ``fit`` scales to touch the canvas's edges, with
            the aspect kept; ``full`` stretches over the whole canvas.
        patch_size: P, to refuse images smaller than a patch.
        compat: Resample large images twice, as the published evaluation does.

    Returns:
        The canvas [C, H, W] uint8 and where the image lies on it.

    Raises:
        DataError: If an argument does not have an accepted value, or the image is smaller than a patch.
    """
    if resize_mode not in RESIZE_MODES:
        raise DataError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}")
    bands = as_bands(image)
    height, width = source = (bands[0].height, bands[0].width)
    if canvas_size is None:
        if resize_mode != "none":
            raise DataError(f"canvas_size must be given for resize_mode {resize_mode!r}")
        canvas_size = max(source)
    rows, columns = whole = _pair("canvas_size", canvas_size)
    if min(whole) < patch_size:
        raise DataError(f"canvas_size must be at least the patch size {patch_size}, got {rows}x{columns}")
    size = source
    if height > rows or width > columns:
        size = _fitted(source, whole)
        if compat and resize_mode != "none":
            bands = _resized(bands, size)
            height, width = size
    if resize_mode == "fit":
        size = _fitted((height, width), whole)
    elif resize_mode == "full":
        size = whole
    if any(max(a, b) < patch_size for a, b in zip(source, size, strict=True)):
        raise DataError(
            f"an image of {source[0]}x{source[1]} pixels is smaller than a patch of {patch_size}x{patch_size}; "
            "use resize_mode 'full' or a smaller patch_size"
        )
    if size != (height, width):
        bands = _resized(bands, size)
    canvas, placement = paste(from_bands(bands), whole)
    if size != source:
        placement = Placement.centred(*size, whole, source)
    return canvas, placement
