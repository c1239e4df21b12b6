"""Glimpse sequences of a data set and of a batch of images.

Shape letters: B batch, L glimpses, C channels, H and W canvas height and width, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mambascope.data.errors import DataError
from mambascope.eye.glimpses import (
    GlimpseSequence,
    Seed,
    extract_patches,
    information_ratio,
    make_sequence,
    moves_from_positions,
    scan_positions,
)
from mambascope.eye.placement import Placement, place_image


@dataclass(frozen=True)
class GlimpseOptions:
    """How an image becomes a glimpse sequence; the defaults are the published evaluation's, with full coverage.

    Attributes:
        length: Glimpses per image.
        pattern: Scan pattern.
        canvas_size: Side of the canvas, (height, width), or ``None`` for the image's own size.
        resize_mode: ``none``, ``fit`` or ``full``; see :func:`mambascope.eye.placement.place_image`.
        patch_size: Side of a glimpse in pixels.
        compat: Reproduce the published evaluation's scan area, pattern names and resampling.
    """

    length: int = 4096
    pattern: str = "random"
    canvas_size: int | tuple[int, int] | None = 512
    resize_mode: str = "fit"
    patch_size: int = 16
    compat: bool = False

    def place(self, image: Any) -> tuple[Tensor, Placement]:
        """The image on its canvas [C, H, W] uint8, and where it lies."""
        return place_image(image, self.canvas_size, self.resize_mode, patch_size=self.patch_size, compat=self.compat)

    def positions(self, placement: Placement, seed: Seed) -> Any:
        """Positions [L, 2] of the pattern."""
        return scan_positions(
            self.pattern, self.length, placement, patch_size=self.patch_size, seed=seed, compat=self.compat
        )

    def sequence(self, image: Any, seed: Seed = 0) -> GlimpseSequence:
        """All glimpses of one image."""
        canvas, placement = self.place(image)
        return make_sequence(canvas, placement, self.positions(placement, seed), self.patch_size)


class _Indexed(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class GlimpseDataset(Dataset[tuple[GlimpseSequence, Any]]):
    """Turns the (image, target) pairs of a map-style data set into (glimpse sequence, target) pairs.

    Positions depend only on the seed, the epoch and the index: not on the batch size, the order or the workers.

    Args:
        dataset: Images as :func:`mambascope.eye.placement.place_image` takes them.
        options: How they become sequences.
        seed: Non-negative.
    """

    def __init__(self, dataset: _Indexed, options: GlimpseOptions | None = None, seed: int = 0) -> None:
        if seed < 0:
            raise DataError(f"seed must not be negative, got {seed}")
        self.dataset = dataset
        self.options = options or GlimpseOptions()
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Other random positions for another pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[GlimpseSequence, Any]:
        image, target = self.dataset[index]
        return self.options.sequence(image, (self.seed, self.epoch, index)), target


@dataclass
class ImageGlimpses:
    """Glimpses of a batch of images, cut out only when they are read (images may differ in size and canvas).

    Attributes:
        canvases: One canvas [C, H, W] per image.
        positions: One array [L, 2] per image, all of the same length.
        ratios: Information ratio [B, L].
        patch_size: P.
    """

    canvases: Sequence[Tensor]
    positions: Sequence[Any]
    ratios: Tensor
    patch_size: int = 16
    moves: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if len({len(p) for p in self.positions}) != 1 or len(self.positions) != len(self.canvases):
            raise DataError("positions must hold one array [L, 2] per image, all of the same length")
        self.moves = moves_from_positions(np.stack([np.asarray(p) for p in self.positions]))

    @classmethod
    def of_images(cls, images: Sequence[Any], options: GlimpseOptions, seeds: Sequence[Seed]) -> ImageGlimpses:
        """Places images and draws their positions, one seed per image."""
        placed = [options.place(image) for image in images]
        positions = [options.positions(p, seed) for (_, p), seed in zip(placed, seeds, strict=True)]
        ratios = [information_ratio(xy, p, options.patch_size) for xy, (_, p) in zip(positions, placed, strict=True)]
        return cls([c for c, _ in placed], positions, torch.from_numpy(np.stack(ratios)), options.patch_size)

    @property
    def length(self) -> int:
        """Glimpses per image."""
        return self.ratios.shape[1]

    def __len__(self) -> int:
        return len(self.canvases)

    def read(self, rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [b, l, C P P], moves [b, l, 2] and information ratio [b, l] of some rows' glimpses."""
        patches = [
            extract_patches(self.canvases[i], self.positions[i][start:stop], self.patch_size) for i in rows.tolist()
        ]
        return torch.stack(patches), self.moves[rows, start:stop], self.ratios[rows, start:stop]
