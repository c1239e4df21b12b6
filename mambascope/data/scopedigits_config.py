"""What the images of ScopeDigits look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_HARD_PIXELS = (10.0, 15.0)  # the 8 scan pixels still fit; halved to 5–7.5 they do not


_MIN_SIDE = 6  # pixels; smaller digits carry no information


@dataclass(frozen=True)
class ScopeDigitsConfig:
    """What the images look like. Sizes are the side of the digit's 8×8 scan.

    Attributes:
        size: Image side in pixels (at least 32).
        easy_share: Share of images that show only large digits, in [0, 1].
        easy_size: Smallest and largest large digit of a one-digit image, as fractions of the image side.
        hard_size: The same for small digits; ``None`` means 10–15 pixels whatever the image size, because it is the
            number of pixels left after halving that decides whether a digit can be read.
        hard_outline: Strength of a dark outline around small digits, in [0, 1]; near 1 halving the image hides them.
        scene_size: Smallest and largest large digit of a many-digit image (segmentation and detection).
        scene_large: Fewest and most large digits in a many-digit image.
        scene_small: Fewest and most small digits in a many-digit image that is not easy.
        jitter: How far a digit may lie from the centre: 0 centred, 1 anywhere inside the image.
        clutter: Fewest and most fragments of other digits.
        contrast: Range of the ink's brightness above the background, in (0, 1].
        noise: Standard deviation of the pixel noise, in [0, 1].
        texture: Strength of the background's smooth texture, in [0, 1].
        seed: Every image depends on it; the division of the scans into training and test scans does not.
    """

    size: int = 64
    easy_share: float = 0.6
    easy_size: tuple[float, float] = (0.41, 0.83)
    hard_size: tuple[float, float] | None = None
    hard_outline: float = 0.0
    scene_size: tuple[float, float] = (0.28, 0.45)
    scene_large: tuple[int, int] = (1, 3)
    scene_small: tuple[int, int] = (1, 4)
    jitter: float = 0.4
    clutter: tuple[int, int] = (1, 3)
    contrast: tuple[float, float] = (0.35, 0.6)
    noise: float = 0.03
    texture: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 32:
            raise ValueError(f"size must be an integer of at least 32 pixels, got {self.size!r}")
        for name in ("easy_share", "hard_outline", "jitter", "noise", "texture"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        for name in ("easy_size", "hard_size", "scene_size", "contrast"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
                raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest <= 1, got {value!r}")
        for name in ("scene_large", "scene_small", "clutter"):
            value = getattr(self, name)
            if not (len(value) == 2 and 0 <= value[0] <= value[1]):
                raise ValueError(f"{name} must be (fewest, most) with 0 <= fewest <= most, got {value!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def pixels(self, kind: Literal["easy", "hard", "scene"]) -> tuple[int, int]:
        """Smallest and largest side in pixels of a kind of digit."""
        if kind == "hard" and self.hard_size is None:
            low, high = _HARD_PIXELS
        else:
            fractions = {"easy": self.easy_size, "hard": self.hard_size, "scene": self.scene_size}[kind]
            assert fractions is not None
            low, high = fractions[0] * self.size, fractions[1] * self.size
        smallest = min(max(round(low), _MIN_SIDE), self.size)
        return smallest, min(max(round(high), smallest), self.size)
