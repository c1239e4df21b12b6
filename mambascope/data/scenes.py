"""Images with several digits, with class masks and instance masks and boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mambascope.data.canvas import Box, Canvas, overlap
from mambascope.data.glyphs import Scans, enlarge

if TYPE_CHECKING:
    from mambascope.data.scopedigits_config import ScopeDigitsConfig

_MAX_OVERLAP = 0.08  # of the smaller digit's box
_TRIES = 20
VISIBLE = 0.35  # opacity from which a pixel belongs to the digit


@dataclass(frozen=True)
class Scene:
    """One image with its objects.

    Attributes:
        image: [H, W, 3] uint8 RGB.
        labels: [n] int64, the digits 0–9.
        masks: [n, H, W] bool, visible pixels; no pixel belongs to two objects.
        boxes: [n, 4] float32, (x0, y0, x1, y1) around each mask in pixels, x1 and y1 exclusive.
        small: [n] bool, digits too small for an image of half the size.
        is_hard: Whether there is such a digit.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    small: NDArray[np.bool_]
    is_hard: bool

    def class_mask(self) -> NDArray[np.uint8]:
        """Class of every pixel [H, W]: 0 background, d + 1 for digit d."""
        result = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            result[mask] = label + 1
        return result

    def detection_target(self) -> dict[str, Any]:
        """``boxes`` [n, 4] float32, ``labels`` [n] int64 and ``masks`` [n, H, W] bool."""
        return {"boxes": self.boxes, "labels": self.labels, "masks": self.masks}


def mask_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Smallest box (x0, y0, x1, y1), ends exclusive, around a mask [H, W] that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(rng: np.random.Generator, side: int, size: int, taken: list[Box]) -> Box | None:
    """A free place for a square digit, or None when there is no room."""
    for x, y in (rng.random((_TRIES, 2)) * (size - side)).round().astype(int).tolist():
        box = (x, y, x + side, y + side)
        if all(overlap(box, b) <= _MAX_OVERLAP * min(side * side, (b[2] - b[0]) ** 2) for b in taken):
            return box
    return None


def draw_scene(rng: np.random.Generator, config: ScopeDigitsConfig, scans: Scans) -> Scene:
    """Draws large digits, and small ones among them unless the scene is easy; there is always at least one digit."""
    is_easy = bool(rng.random() < config.easy_share)
    n_large = int(rng.integers(config.scene_large[0], config.scene_large[1] + 1))
    n_small = 0 if is_easy else int(rng.integers(config.scene_small[0], config.scene_small[1] + 1))
    if n_large + n_small == 0:
        n_large = 1
    sides = rng.integers(*_inclusive(config.pixels("scene")), n_large).tolist()
    sides += rng.integers(*_inclusive(config.pixels("hard")), n_small).tolist()

    boxes: list[Box] = []
    digits: list[tuple[int, bool]] = []
    for number, side in enumerate(sides):
        row = int(rng.integers(len(scans.labels)))
        if (box := _place(rng, side, config.size, boxes)) is not None:
            boxes.append(box)
            digits.append((row, number >= n_large))

    canvas = Canvas(rng, config.size, config.contrast, config.noise, config.texture)
    fragments = rng.integers(
        *_inclusive((config.pixels("hard")[0], config.pixels("scene")[1])),
        rng.integers(config.clutter[0], config.clutter[1] + 1),
    )
    canvas.clutter(scans, fragments.tolist(), boxes)
    masks = np.zeros((len(boxes), config.size, config.size), bool)
    for n, ((row, is_small), (x0, y0, x1, y1)) in enumerate(zip(digits, boxes, strict=True)):
        alpha = enlarge(scans.images[row], y1 - y0, x1 - x0)
        canvas.paint(alpha, y0, x0, config.hard_outline if is_small else 0.0)
        masks[n, y0:y1, x0:x1] = alpha > VISIBLE
        masks[:n] &= ~masks[n]  # the later digit lies on top
    keep = masks.any((1, 2))
    masks = masks[keep]
    small = np.array([is_small for _, is_small in digits], bool)[keep]
    labels = scans.labels[[row for row, _ in digits]][keep]
    return Scene(
        image=canvas.finish(),
        labels=labels,
        masks=masks,
        boxes=np.array([mask_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        small=small,
        is_hard=bool(small.any()),
    )


def _inclusive(limits: tuple[int, int]) -> tuple[int, int]:
    return limits[0], limits[1] + 1
