"""Where to look next: glimpses chosen by something better than chance, with what the choice itself costs.

- ``contrast``: places of strong local contrast. Needs no model.
- ``scope:WEIGHTS``: places that a trained MambaScope's coarse look finds important.
- ``lookahead[:K]``: tries K random places, each as one step of the model from the current state, and takes the one
  after which the answer is surest. Costs K + 1 glimpses for each one that is kept.

The first two draw places at single pixels, as the ``random`` scan does, but with probabilities that follow a map. Shape
letters: B batch, L glimpses, C channels, H and W canvas height and width, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mambascope.eye.glimpses import Coverage, Positions, extract_patches
from mambascope.eye.model import EyeState, MambaEye
from mambascope.eye.placement import Placement, as_bands, from_bands
from mambascope.eye.stopping import corrected_confidence
from mambascope.models.checkpoint import load_model
from mambascope.models.scope import MambaScope
from mambascope.utils import evaluating, model_device

CHOICES = "contrast, scope:WEIGHTS or lookahead[:K]"


def places(placement: Placement, patch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns at which the ``random`` scan puts glimpses."""
    rows, columns = (
        np.arange(start, max(start, end - patch_size) + 1, dtype=np.int64) for start, end in placement.spans(patch_size)
    )
    return rows, columns


def positions_by_importance(
    importance: Tensor,
    placement: Placement,
    length: int,
    *,
    patch_size: int = 16,
    seed: Any = 0,
    sharpness: float = 1.0,
) -> Positions:
    """Draws glimpses, more of them where they show something important.

    Args:
        importance: Map [h, w] over the placed image, any size and scale, not negative.
        placement: Where the image lies.
        length: L.
        patch_size: P.
        seed: Seed or generator.
        sharpness: Power of the mean importance under a glimpse that its probability follows; 0 ignores the map.

    Returns:
        Positions [L, 2].

    Raises:
        ValueError: If the map is not a finite [h, w] of values >= 0, or an argument does not have an accepted value.
    """
    if importance.ndim != 2 or not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError(f"importance must be a finite map [h, w] of values >= 0, got {list(importance.shape)}")
    if length < 1 or not sharpness >= 0:
        raise ValueError(f"length must be at least 1 and sharpness >= 0, got {length} and {sharpness}")
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    size = (placement.height, placement.width)
    pixels = F.interpolate(importance[None, None].double(), size, mode="bilinear", align_corners=False)[0, 0]
    sums = F.pad(pixels.cumsum(0).cumsum(1), (1, 0, 1, 0)).numpy()  # integral image
    rows, columns = places(placement, patch_size)
    top, left = (rows - placement.top).clip(0)[:, None], (columns - placement.left).clip(0)
    bottom = np.minimum(rows - placement.top + patch_size, size[0])[:, None]
    right = np.minimum(columns - placement.left + patch_size, size[1])
    weight = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    weight = np.maximum(weight / ((bottom - top) * (right - left)), 0)
    peak = weight.max()
    # scaled first: powers of small numbers would vanish
    weight = (weight / peak) ** sharpness if peak > 0 else np.ones_like(weight)
    drawn = rng.choice(weight.size, length, p=weight.ravel() / weight.sum())
    return np.stack([rows[drawn // len(columns)], columns[drawn % len(columns)]], axis=1)


def local_contrast(pixels: Tensor, window: int = 5) -> Tensor:
    """Standard deviation of the brightness around every pixel [h, w], from pixels [C, h, w] of any dtype."""
    grey = pixels.to(torch.float32).mean(0)[None, None]
    pad = window // 2
    mean, square = (
        F.avg_pool2d(F.pad(v, [pad] * 4, mode="replicate"), window, stride=1)[0, 0] for v in (grey, grey.square())
    )
    return (square - mean.square()).clamp_min(0).sqrt()


def _inside(canvas: Tensor, placement: Placement) -> Tensor:
    rows = slice(placement.top, placement.top + placement.height)
    return canvas[:, rows, placement.left : placement.left + placement.width]


@dataclass
class ByContrast:
    """Prefers places of strong local contrast.

    Attributes:
        length: Glimpses.
        patch_size: Their side.
        sharpness: See :func:`positions_by_importance`.
        cost: Glimpses that the model reads for each one that is kept.
    """

    length: int
    patch_size: int
    sharpness: float = 2.0
    cost: float = 1.0

    def __call__(
        self, canvases: Sequence[Tensor], placements: Sequence[Placement], seeds: Sequence[Sequence[int]]
    ) -> list[Positions]:
        """Positions of each image."""
        return [
            positions_by_importance(
                local_contrast(_inside(canvas, placement)),
                placement,
                self.length,
                patch_size=self.patch_size,
                seed=tuple(seed),
                sharpness=self.sharpness,
            )
            for canvas, placement, seed in zip(canvases, placements, seeds, strict=True)
        ]


@dataclass
class ByScope:
    """Prefers places that a MambaScope's coarse look finds important; the attributes are those of `ByContrast`."""

    scope: MambaScope
    length: int
    patch_size: int
    sharpness: float = 2.0
    cost: float = 1.0

    def importance(self, pixels: Tensor) -> Tensor:
        """Coarse importance map [rows, columns], from 0, of pixels [C, h, w] uint8."""
        from mambascope.models.preprocessing import make_transform

        height, width = self.scope.config.image_hw
        # the map must show the whole image: no centre crop
        resized = [band.resize((width, height), Image.Resampling.BICUBIC) for band in as_bands(pixels)]
        image = make_transform(self.scope)(from_bands(resized).numpy().transpose(1, 2, 0))
        with evaluating(self.scope):
            coarse = self.scope.forward_coarse(image[None].to(model_device(self.scope)))
        values = coarse.importance[0].float().cpu()
        return (values - values.min()).reshape(coarse.grid)

    def __call__(
        self, canvases: Sequence[Tensor], placements: Sequence[Placement], seeds: Sequence[Sequence[int]]
    ) -> list[Positions]:
        """Positions of each image."""
        return [
            positions_by_importance(
                self.importance(_inside(canvas, placement)),
                placement,
                self.length,
                patch_size=self.patch_size,
                seed=tuple(seed),
                sharpness=self.sharpness,
            )
            for canvas, placement, seed in zip(canvases, placements, seeds, strict=True)
        ]


@dataclass
class ByLookahead:
    """Takes, of a few random places, the one after which the model is surest.

    Attributes:
        model: The model.
        length: Glimpses.
        candidates: Places tried for each glimpse, K.
    """

    model: MambaEye
    length: int
    candidates: int = 4

    @property
    def cost(self) -> float:
        """Glimpses that the model reads for each one that is kept: the candidates, and the kept one in the end."""
        return self.candidates + 1.0

    def __call__(
        self, canvases: Sequence[Tensor], placements: Sequence[Placement], seeds: Sequence[Sequence[int]]
    ) -> list[Positions]:
        """Positions of each image."""
        size, device = self.model.config.patch_size, model_device(self.model)
        seen = [Coverage(placement, size) for placement in placements]
        rngs = [np.random.default_rng(tuple(seed)) for seed in seeds]
        grids = [places(placement, size) for placement in placements]
        kept: list[list[list[int]]] = [[] for _ in canvases]
        count = len(canvases)
        with evaluating(self.model):
            state = self.model.start(count)
            for _ in range(self.length):
                tries = [self._places(*grid, rng) for grid, rng in zip(grids, rngs, strict=True)]
                patches, moves, ratios = [], [], []
                for i, cells in enumerate(tries):
                    patches.append(extract_patches(canvases[i], cells, size))
                    before = np.array(kept[i][-1] if kept[i] else cells[0])
                    step = np.array(cells) - before if kept[i] else np.zeros((self.candidates, 2))
                    moves.append(torch.from_numpy(step).float())
                    ratios += [_ratio_with(seen[i], cell) for cell in cells]
                after = self._try(state, torch.cat(patches).to(device), torch.cat(moves).to(device))
                assert after.logits is not None
                sure = corrected_confidence(after.logits.float().cpu(), torch.tensor(ratios))
                best = sure.reshape(count, -1).argmax(1)
                state = after.index_select(torch.arange(count) * self.candidates + best)
                for i, choice in enumerate(best.tolist()):
                    cell = tries[i][choice]
                    kept[i].append(cell)
                    seen[i].add(*cell)
        return [np.array(cells, dtype=np.int64) for cells in kept]

    def _places(self, rows: NDArray[np.int64], columns: NDArray[np.int64], rng: np.random.Generator) -> list[list[int]]:
        picked = [rng.integers(0, len(axis), self.candidates) for axis in (rows, columns)]
        return np.stack([rows[picked[0]], columns[picked[1]]], axis=1).tolist()

    def _try(self, state: EyeState, patches: Tensor, moves: Tensor) -> EyeState:
        rows = torch.arange(len(state)).repeat_interleave(self.candidates)
        return self.model.step(state.index_select(rows), patches, moves)


def _ratio_with(coverage: Coverage, cell: Sequence[int]) -> float:
    """Information ratio if this cell were seen too."""
    top, left = cell[0] - coverage.placement.top, cell[1] - coverage.placement.left
    size = coverage.patch_size
    area = coverage.seen[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]
    return coverage.ratio + (area.size - np.count_nonzero(area)) / coverage.seen.size


def make_chooser(text: str, model: MambaEye, length: int, sharpness: float = 2.0) -> ByContrast | ByScope | ByLookahead:
    """The chooser that a command line names: one of :data:`CHOICES`.

    Raises:
        ValueError: If it is none of them, or the weights are not a MambaScope's.
    """
    name, _, value = text.partition(":")
    size = model.config.patch_size
    if name == "contrast" and not value:
        return ByContrast(length, size, sharpness)
    if name == "scope":
        scope = load_model(value or "scopedigits")
        if not isinstance(scope, MambaScope):
            raise ValueError(f"choice scope:{value} needs a MambaScope, got a {type(scope).__name__}")
        return ByScope(scope.to(model_device(model)).eval(), length, size, sharpness)
    if name == "lookahead" and (not value or (value.isdigit() and int(value) > 0)):
        return ByLookahead(model, length, int(value or 4))
    raise ValueError(f"choice must be {CHOICES}, got {text!r}")
