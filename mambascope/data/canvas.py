"""Background, ink and noise shared by the one-digit and the many-digit images of ScopeDigits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambascope.data.glyphs import Scans, blur_matrix, enlarge, resize_matrix

_COARSE_GRID = 4  # control points of the large and the small waves of the background, per image side
_FINE_GRID = 11
_FRAGMENT = (3, 4)  # side of a fragment in scan pixels (of 8): too little to be read as a digit
_NOISE_STD = 104.5  # standard deviation of the sum of two uniform bytes

Box = tuple[int, int, int, int]


def overlap(a: Box, b: Box) -> int:
    """Common area of two boxes (x0, y0, x1, y1) in pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


class Canvas:
    """One image under construction: planes [3, H, W] float32 in 0–1.

    Args:
        rng: Source of every random choice of this image.
        size: Side in pixels.
        contrast: Range of the ink's brightness above the background, in 0–1.
        noise: Standard deviation of the pixel noise, in 0–1.
        texture: Strength of the background's waves, in 0–1.
    """

    def __init__(
        self, rng: np.random.Generator, size: int, contrast: tuple[float, float], noise: float, texture: float
    ) -> None:
        self.rng, self.size, self.contrast, self.noise = rng, size, contrast, noise
        base = rng.uniform(0.12, 0.40) + rng.uniform(-0.08, 0.08, 3)
        self.base: NDArray[np.float32] = base.astype(np.float32)
        waves: NDArray[Any] = np.zeros((3, size, size), np.float32)
        for grid, share in ((_COARSE_GRID, 0.7), (_FINE_GRID, 0.3)):
            control = rng.uniform(-1.0, 1.0, (3, grid, grid))
            control = (0.7 * control[:1] + 0.3 * control) * (texture * share)
            weights = resize_matrix(grid, size)
            waves += weights @ (control.astype(np.float32) @ weights.T)
        self.planes = waves
        self.planes += self.base[:, None, None]

    def ink(self) -> NDArray[Any]:
        """A random colour [3] lighter than the background."""
        low, high = self.contrast
        level = self.rng.uniform(low, high)
        return self.base + (level * (1.0 + self.rng.uniform(-0.25, 0.25, 3))).astype(np.float32)

    def paint(self, alpha: NDArray[Any], top: int, left: int, outline: float = 0.0) -> None:
        """Covers what an opacity mask [h, w] at (top, left) shows with ink; parts outside the image are cut off.

        ``outline`` darkens the surroundings of the strokes: at 1 the mean brightness hardly changes, so that averaging
        neighbouring pixels hides the digit.
        """
        if outline > 0:
            alpha = np.pad(alpha, 2)
            top, left = top - 2, left - 2
            blurred = blur_matrix(alpha.shape[0]) @ alpha @ blur_matrix(alpha.shape[1])
            alpha = alpha - outline * blurred
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + alpha.shape[0], self.size), min(left + alpha.shape[1], self.size)
        if y1 > y0 and x1 > x0:
            alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
            area = self.planes[:, y0:y1, x0:x1]
            area += alpha * (self.ink()[:, None, None] - area)

    def clutter(self, scans: Scans, sizes: list[int], avoid: list[Box]) -> None:
        """Paints fragments of random digits.

        Args:
            scans: Where the fragments come from.
            sizes: For each fragment the side in pixels that the whole digit would have.
            avoid: Boxes that the fragments keep away from where there is room.
        """
        for side in sizes:
            scan = scans.images[self.rng.integers(len(scans.images))]
            h, w = self.rng.integers(_FRAGMENT[0], _FRAGMENT[1] + 1, 2).tolist()
            y, x = self.rng.integers(0, 9 - h), self.rng.integers(0, 9 - w)
            height, width = max(1, round(side * h / 8)), max(1, round(side * w / 8))
            spots = self.rng.random((6, 2))
            best, place = None, (0, 0)
            for v, u in spots.tolist():
                top, left = round(v * (self.size - height)), round(u * (self.size - width))
                covered = sum(overlap((left, top, left + width, top + height), box) for box in avoid)
                if best is None or covered < best:
                    best, place = covered, (top, left)
                if covered == 0:
                    break
            self.paint(enlarge(scan[y : y + h, x : x + w], height, width), *place)

    def finish(self) -> NDArray[np.uint8]:
        """The image [H, W, 3] uint8, with pixel noise."""
        pixels = self.planes * 255.0
        if self.noise > 0:
            grain = np.frombuffer(self.rng.bytes(2 * pixels.size), np.uint8).reshape(2, *pixels.shape)
            scale = self.noise * 255.0 / _NOISE_STD
            total = grain[0].astype(np.float32)
            total += grain[1]
            total -= 255.0
            total *= scale
            pixels += total
        np.clip(pixels, 0.0, 255.0, out=pixels)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))
