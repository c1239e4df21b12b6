"""ScopeDigits: real handwritten digits, large or small, on textured canvases — no download needed.

The digits are the scans that scikit-learn ships (:mod:`mambascope.data.glyphs`). *Easy* images show a large digit that
an image of half the size still shows; *hard* ones a digit so small that halving the image leaves fewer pixels than the
scan has, while the full image shows it whole. That is the situation a coarse-to-fine classifier is made for.

How hard is hard: a small convolutional net with 8-pixel patches, trained for 8 epochs of 6,000 fresh images, reads
89 % of the easy and 19 % of the hard digits in halved 64-pixel images (chance is 10 %), and 93 % and 54 % in full ones.
Finding and reading with few tokens is the limit: a support vector machine that is shown exactly where the digit lies
still reads most of the halved ones. ``hard_outline`` takes part of that information away as well.

Every image is a pure function of (seed, split, index).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mambascope.data.canvas import Box, Canvas
from mambascope.data.glyphs import NUM_CLASSES, check_split, enlarge, load_scans
from mambascope.data.scenes import VISIBLE, Scene, draw_scene
from mambascope.data.scopedigits_config import ScopeDigitsConfig

Task = Literal["cls", "seg", "det"]
CLASS_NAMES: tuple[str, ...] = tuple(str(digit) for digit in range(NUM_CLASSES))
_SPLIT_KEY = {"train": 0, "val": 1}


class ScopeDigits(torch.utils.data.Dataset):
    """Map-style data set of ScopeDigits images.

    ``dataset[index]`` returns ``(image, target)``. The image is uint8 [H, W, 3] RGB, or what ``transform`` makes of it.
    Targets: ``"cls"`` the digit 0–9; ``"seg"`` a class mask uint8 [H, W] (0 background, digit d is d + 1); ``"det"`` a
    dict with ``boxes`` float32 [n, 4] (x0, y0, x1, y1 in pixels), ``labels`` int64 [n] (0–9) and ``masks`` bool
    [n, H, W].

    Args:
        task: "cls", "seg" or "det".
        split: "train" or "val"; the two share no scan.
        length: Number of images.
        config: Appearance; ``options`` replace single fields of it, e.g. ``ScopeDigits(size=112, seed=3)``.
        transform: For "cls" called with the PIL image; otherwise with (PIL image, target), returning both.
        cache: Draw each image once and keep it (uint8, length × H × W × 3 bytes, for "cls" only); see :meth:`preload`.
        **options: Fields of :class:`ScopeDigitsConfig`.

    Raises:
        ValueError: For an argument out of range.
    """

    num_classes = NUM_CLASSES
    class_names = CLASS_NAMES

    def __init__(
        self,
        task: Task = "cls",
        split: str = "train",
        length: int = 6000,
        config: ScopeDigitsConfig | None = None,
        transform: Callable[..., Any] | None = None,
        cache: bool = False,
        **options: Any,
    ) -> None:
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1 image, got {length}")
        if cache and task != "cls":
            raise ValueError(f"cache is for task 'cls', got task {task!r}")
        accepted = {field.name for field in dataclasses.fields(ScopeDigitsConfig)}
        if unknown := sorted(set(options) - accepted):
            raise ValueError(
                f"unknown option {', '.join(unknown)}; ScopeDigitsConfig has {', '.join(sorted(accepted))}"
            )
        self.task: Task = task
        self.split = check_split(split)
        self.length = length
        self.config = dataclasses.replace(config or ScopeDigitsConfig(), **options)
        self.transform = transform
        self._want_cache = cache
        self._cache: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return self.length

    def _rng(self, index: int) -> np.random.Generator:
        if index < 0:
            raise IndexError(f"index must not be negative, got {index}")
        return np.random.default_rng((self.config.seed, _SPLIT_KEY[self.split], index))

    def _plan(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        """The choices that :meth:`meta` reports; drawn first, so that it need not paint the image."""
        config, scans = self.config, load_scans(self.split)
        target = index % NUM_CLASSES  # every ten images in a row hold all classes
        rows = scans.by_class[target]
        row = int(rows[rng.integers(len(rows))])
        is_hard = bool(rng.random() >= config.easy_share)
        low, high = config.pixels("hard" if is_hard else "easy")
        side = int(rng.integers(low, high + 1))
        shift_y, shift_x = (rng.uniform(-1.0, 1.0, 2) * config.jitter).tolist()
        top = math.floor((config.size - side) * (0.5 + 0.5 * shift_y) + 0.5)
        left = math.floor((config.size - side) * (0.5 + 0.5 * shift_x) + 0.5)
        box: Box = (left, top, left + side, top + side)
        return {"target": target, "is_hard": is_hard, "side": side, "box": box, "row": row}

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], int]:
        config, scans = self.config, load_scans(self.split)
        rng = self._rng(index)
        plan = self._plan(rng, index)
        canvas = Canvas(rng, config.size, config.contrast, config.noise, config.texture)
        sides = rng.integers(
            config.pixels("hard")[0],
            config.pixels("easy")[1] + 1,
            rng.integers(config.clutter[0], config.clutter[1] + 1),
        )
        canvas.clutter(scans, sides.tolist(), [plan["box"]])
        left, top = plan["box"][:2]
        outline = config.hard_outline if plan["is_hard"] else 0.0
        canvas.paint(enlarge(scans.images[plan["row"]], plan["side"], plan["side"]), top, left, outline)
        return canvas.finish(), plan["target"]

    def scene(self, index: int) -> Scene:
        """The many-digit scene of an index (tasks "seg" and "det"), without transform."""
        return draw_scene(self._rng(index), self.config, load_scans(self.split))

    def meta(self, index: int) -> dict[str, Any]:
        """What is known about an image without drawing it.

        For "cls": ``target``, ``is_hard``, ``side`` (pixels), ``box`` (x0, y0, x1, y1), ``row`` (of the split's scans)
        and ``source`` (row in scikit-learn's table). For the other tasks: ``is_hard`` and ``count`` of digits (drawn).
        """
        if self.task == "cls":
            plan = self._plan(self._rng(index), index)
            plan["source"] = int(load_scans(self.split).source[plan["row"]])
            return plan
        scene = self.scene(index)
        return {"is_hard": scene.is_hard, "count": len(scene.labels)}

    def object_mask(self, index: int) -> NDArray[np.bool_]:
        """Which pixels [H, W] of an image belong to its digits."""
        if self.task != "cls":
            return np.any(self.scene(index).masks, axis=0)
        plan = self._plan(self._rng(index), index)
        x0, y0, x1, y1 = plan["box"]
        mask = np.zeros((self.config.size, self.config.size), bool)
        mask[y0:y1, x0:x1] = enlarge(load_scans(self.split).images[plan["row"]], y1 - y0, x1 - x0) > VISIBLE
        return mask

    def targets(self) -> NDArray[np.int64]:
        """Class of every image [length] (task "cls")."""
        return np.arange(self.length, dtype=np.int64) % NUM_CLASSES

    def is_hard(self) -> NDArray[np.bool_]:
        """Which images [length] show a digit (also) too small for half the size."""
        return np.array([self.meta(index)["is_hard"] for index in range(self.length)])

    def image(self, index: int) -> NDArray[np.uint8]:
        """The image [H, W, 3] uint8 of an index, without transform."""
        if self._want_cache and 0 <= index < self.length:
            return self.preload()[index]
        return self._draw(index)[0] if self.task == "cls" else self.scene(index).image

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images [B, H, W, 3] uint8 and digits [B] int64 of several indices at once (task "cls", no transform)."""
        if self.task != "cls":
            raise ValueError(f"batch is for task 'cls', got task {self.task!r}")
        targets = np.asarray([index % NUM_CLASSES for index in indices], dtype=np.int64)
        if self._want_cache and all(0 <= index < self.length for index in indices):
            return self.preload()[np.asarray(indices, dtype=np.int64)], targets
        return np.stack([self._draw(index)[0] for index in indices]), targets

    def preload(self, progress: bool = False) -> NDArray[np.uint8]:
        """Draws all images once [length, H, W, 3] and keeps them; later calls return the same array.

        Call it before worker processes start, so that they share the memory.
        """
        if self.task != "cls":
            raise ValueError(f"preload is for task 'cls', got task {self.task!r}")
        if self._cache is None:
            from tqdm import tqdm

            images = np.empty((self.length, self.config.size, self.config.size, 3), np.uint8)
            for index in tqdm(range(self.length), desc=f"ScopeDigits {self.split}", unit="img", disable=not progress):
                images[index] = self._draw(index)[0]
            images.setflags(write=False)
            self._cache, self._want_cache = images, True
        return self._cache

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        return self.sample(index)

    def sample(self, index: int) -> tuple[Any, Any]:
        """Like ``self[index]``, for any index >= 0: beyond ``length`` come further images of the same kind."""
        if self.task == "cls":
            image, digit = self.image(index), index % NUM_CLASSES
            return (self.transform(Image.fromarray(image)), digit) if self.transform else (image, digit)
        scene = self.scene(index)
        target: Any = scene.class_mask() if self.task == "seg" else scene.detection_target()
        return self.transform(Image.fromarray(scene.image), target) if self.transform else (scene.image, target)
