"""Quality of the selection: how much of what is to be recognised lies in the cells that are read again.

Share of the object's pixels in the selected cells (eq. 13), beside the share that random cells have, which is that of
the cells, the share of as many cells at fixed places, and the largest that as many cells can have. A score that is no
better than fixed places tells where objects usually are, not where this one is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.models.cells import num_selected, select_cells
from mambascope.utils import evaluating, model_device

ALPHAS = (0.3, 0.5, 0.7)
_BATCH = 64


def object_shares(importance: Tensor, pixels: Tensor, alphas: Iterable[float] = ALPHAS) -> list[dict[str, float]]:
    """Mean shares of the objects' pixels, 0 to 1, at every share of cells; images without an object are left out.

    Args:
        importance: Scores [N, M].
        pixels: The object's pixels in each cell [N, M].
        alphas: Shares of cells to select.

    Returns:
        Per share ``alpha``, ``selected``, ``random``, ``fixed`` and ``best``. The fixed cells are those that hold most
        on average over every other image, for the images between them.
    """
    shown = pixels.sum(1) > 0
    importance, pixels = importance[shown], pixels[shown].double()
    share = pixels / pixels.sum(1, keepdim=True)
    places = _usual_places(share)
    best = share.sort(dim=1, descending=True).values.cumsum(1)
    rows = []
    for alpha in alphas:
        count = num_selected(float(alpha), share.shape[1])
        selected, _ = select_cells(importance, float(alpha))
        fixed, _ = select_cells(places, float(alpha))
        rows.append(
            {
                "alpha": float(alpha),
                "selected": float(share.gather(1, selected).sum(1).mean()),
                "random": count / share.shape[1],
                "fixed": float(share.gather(1, fixed).sum(1).mean()),
                "best": float(best[:, count - 1].mean()) if count else 0.0,
            }
        )
    return rows


def _usual_places(share: Tensor) -> Tensor:
    """What each cell holds on average [N, M] over the images of the other half: no image tells where its object is."""
    half = torch.arange(len(share)) % 2
    means = [
        share[half != side].mean(0) if bool((half != side).any()) else share.new_zeros(share.shape[1])
        for side in (0, 1)
    ]
    return torch.stack(means)[half]


def cell_pixels(masks: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The objects' pixels in each cell [N, M] of masks [N, H, W]; a cell is two by two patches."""
    rows, cols = grid
    cell = 2 * patch_size
    height, width = masks.shape[1:]
    padded = F.pad(masks.float(), (0, cols * cell - width, 0, rows * cell - height))
    return (F.avg_pool2d(padded.unsqueeze(1), cell) * cell**2).flatten(1)


def selection_quality(model: Any, images: Tensor, masks: Any) -> dict[str, Any]:
    """:func:`object_shares` of a model's cells, for the report.

    Args:
        model: A MambaScope on its device.
        images: [N, C, H, W].
        masks: The objects' pixels [N, H, W], bool.

    Returns:
        ``images`` that show an object, ``rows`` at :data:`ALPHAS` and the ``curve``.
    """
    importance, pixels = [], []
    with evaluating(model):
        for part, mask in zip(images.split(_BATCH), torch.as_tensor(masks).split(_BATCH), strict=True):
            state = model.forward_coarse(part.to(model_device(model)))
            importance.append(state.importance.float().cpu())
            pixels.append(cell_pixels(mask, state.grid, model.config.patch_size))
    scores, held = torch.cat(importance), torch.cat(pixels)
    cells = scores.shape[1]
    counts = sorted({round(i * cells / 20) for i in range(21)})
    return {
        "images": int((held.sum(1) > 0).sum()),
        "rows": object_shares(scores, held),
        "curve": object_shares(scores, held, (count / cells for count in counts)),
    }


def selection_text(quality: dict[str, Any]) -> str:
    """The rows in words."""
    parts = []
    for row in quality["rows"]:
        selected, random, fixed, best = (100 * row[name] for name in ("selected", "random", "fixed", "best"))
        parts.append(
            f"{selected:.0f} % at α {row['alpha']:g} (random {random:.0f}, fixed places {fixed:.0f}, best {best:.0f})"
        )
    return f"object pixels in re-read cells, {quality['images']:,} images: {', '.join(parts)}"
