"""Where to look next: glimpses chosen by something better than chance, with what the choice itself costs.

- ``contrast``: cells with strong local contrast first. Needs no model.
- ``scope:WEIGHTS``: cells that a trained MambaScope's coarse look finds important first.
- ``lookahead[:K]``: tries K cells not yet seen, each as one step of the model from the current state, and takes the one
  after which the answer is surest. Costs K + 1 glimpses for each one that is kept.

The first two draw cells without replacement, with probabilities that follow the map; when all have been seen, they
start again on a shifted grid. Shape letters: B batch, L glimpses, C channels, H and W canvas height and width, P patch
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mambascope.data.glimpses import Coverage, Placement, Positions, extract_patches
from mambascope.evaluation.collect import evaluating, model_device
from mambascope.models.checkpoint import load_model
from mambascope.models.eye_exit import corrected_confidence
from mambascope.models.mambaeye import EyeState, MambaEye
from mambascope.models.scope import MambaScope

CHOICES = "contrast, scope:WEIGHTS or lookahead[:K]"


def candidate_cells(placement: Placement, patch_size: int, shift: tuple[int, int] = (0, 0)) -> Positions:
    """Cells [n, 2] that cover the placed image: a grid whose last row and column end with it.

    Args:
        placement: Where the image lies.
        patch_size: P.
        shift: Moves the inner rows and columns by so many pixels up and to the left; 0 to P - 1.
    """
    axes = []
    for (start, end), move in zip(placement.spans(patch_size), shift, strict=True):
        last = max(start, end - patch_size)
        inner = np.arange(start - move, last, patch_size, dtype=np.int64)
        axes.append(np.unique(np.append(inner, last).clip(start, last)))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def positions_by_importance(
    importance: Tensor,
    placement: Placement,
    length: int,
    *,
    patch_size: int = 16,
    seed: Any = 0,
    sharpness: float = 1.0,
) -> Positions:
    """Draws cells without replacement, the more important ones earlier.

    Args:
        importance: Map [h, w] over the placed image, any size and scale, not negative.
        placement: Where the image lies.
        length: L.
        patch_size: P.
        seed: Seed or generator.
        sharpness: Power of the importance that a cell's probability follows: 0 ignores it; large values sort by it.

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
    chosen: list[NDArray[np.int64]] = []
    count, shift = 0, (0, 0)
    while count < length:
        cells = candidate_cells(placement, patch_size, shift)
        top, left = (cells - (placement.top, placement.left)).T
        bottom, right = np.minimum(top + patch_size, size[0]), np.minimum(left + patch_size, size[1])
        top, left = top.clip(0), left.clip(0)
        weight = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        weight = np.maximum(weight / ((bottom - top) * (right - left)), 0)
        # the largest of log w + Gumbel noise is a draw with probability w: sorting them draws without replacement
        noise = rng.gumbel(size=len(cells))
        keys = sharpness * np.log(weight + 1e-6 * max(weight.max(), 1e-12)) + noise
        chosen.append(cells[np.argsort(-keys, kind="stable")])
        count += len(cells)
        shift = tuple(rng.integers(0, patch_size, 2).tolist())
    return np.concatenate(chosen)[:length]


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
    """Prefers cells of strong local contrast.

    Attributes:
        length: Glimpses.
        patch_size: Their side.
        sharpness: See :func:`positions_by_importance`.
        cost: Glimpses that the model reads for each one that is kept.
    """

    length: int
    patch_size: int
    sharpness: float = 4.0
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
    """Prefers cells that a MambaScope's coarse look finds important; the attributes are those of `ByContrast`."""

    scope: MambaScope
    length: int
    patch_size: int
    sharpness: float = 4.0
    cost: float = 1.0

    def importance(self, pixels: Tensor) -> Tensor:
        """Coarse importance map [rows, columns], from 0, of pixels [3, h, w] uint8."""
        from mambascope.evaluation.inference import make_transform

        picture = _picture(pixels)
        height, width = self.scope.config.image_hw
        # the map must show the whole image: no centre crop
        image = make_transform(self.scope)(picture.resize((width, height), 3))
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


def _picture(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


@dataclass
class ByLookahead:
    """Takes, of a few cells not yet seen, the one after which the model is surest.

    Attributes:
        model: The model.
        length: Glimpses.
        candidates: Cells tried for each glimpse, K.
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
        queues: list[list[list[int]]] = [[] for _ in canvases]
        kept: list[list[list[int]]] = [[] for _ in canvases]
        count = len(canvases)
        with evaluating(self.model):
            state = self.model.start(count)
            for _ in range(self.length):
                tries = [self._cells(*args) for args in zip(queues, placements, rngs, strict=True)]
                width = max(map(len, tries))
                tries = [cells + cells[-1:] * (width - len(cells)) for cells in tries]
                patches, moves, ratios = [], [], []
                for i, cells in enumerate(tries):
                    patches.append(extract_patches(canvases[i], cells, size))
                    before = np.array(kept[i][-1] if kept[i] else cells[0])
                    step = np.array(cells) - before if kept[i] else np.zeros((width, 2))
                    moves.append(torch.from_numpy(step).float())
                    ratios += [_ratio_with(seen[i], cell) for cell in cells]
                after = self._try(state, torch.cat(patches).to(device), torch.cat(moves).to(device), width)
                assert after.logits is not None
                sure = corrected_confidence(after.logits.float().cpu(), torch.tensor(ratios))
                best = sure.reshape(count, width).argmax(1)
                state = after.index_select(torch.arange(count) * width + best)
                for i, choice in enumerate(best.tolist()):
                    cell = tries[i][choice]
                    kept[i].append(cell)
                    queues[i].remove(cell)
                    seen[i].add(*cell)
        return [np.array(cells, dtype=np.int64) for cells in kept]

    def _cells(self, queue: list[list[int]], placement: Placement, rng: np.random.Generator) -> list[list[int]]:
        """The next cells to try; a queue that has run out starts again."""
        if not queue:
            queue += rng.permutation(candidate_cells(placement, self.model.config.patch_size)).tolist()
        return queue[: self.candidates]

    def _try(self, state: EyeState, patches: Tensor, moves: Tensor, width: int) -> EyeState:
        rows = torch.arange(len(state)).repeat_interleave(width)
        return self.model.step(state.index_select(rows), patches, moves)


def _ratio_with(coverage: Coverage, cell: Sequence[int]) -> float:
    """Information ratio if this cell were seen too."""
    top, left = cell[0] - coverage.placement.top, cell[1] - coverage.placement.left
    size = coverage.patch_size
    area = coverage.seen[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]
    return coverage.ratio + (area.size - np.count_nonzero(area)) / coverage.seen.size


def make_chooser(text: str, model: MambaEye, length: int, sharpness: float = 4.0) -> ByContrast | ByScope | ByLookahead:
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
