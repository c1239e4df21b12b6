"""What the stages of a MambaScope leave: logits, features, cells and tokens.

Shape letters: B batch, M coarse cells, k selected cells, L tokens, d model width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor


class StageLogits(NamedTuple):
    """Logits [B, C] of both stages for the same images."""

    coarse: Tensor
    fine: Tensor


@dataclass
class CoarseState:
    """What the coarse stage leaves for the decision and for the fine stage.

    Attributes:
        logits: [B, C].
        cls: Normalised CLS output [B, d].
        features: Normalised patch outputs [B, M, d].
        tokens: Patch embeddings plus coarse positions [B, M, d], as they entered the encoder; with
            ``rest_tokens="state"`` the residual stream where they join the fine pass.
        importance: Averaged importance of each cell [B, M], without gradient.
        grid: Rows and columns of the coarse grid.
        taken: Requested block outputs [B, M + 1, d].
    """

    logits: Tensor
    cls: Tensor
    features: Tensor
    tokens: Tensor
    importance: Tensor
    grid: tuple[int, int]
    taken: list[Tensor]

    def index_select(self, rows: Tensor) -> CoarseState:
        """The state of some of the images, ``rows`` [n] int64."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("logits", "cls", "features", "tokens", "importance"):
            picked[name] = picked[name].index_select(0, rows)
        picked["taken"] = [t.index_select(0, rows) for t in self.taken]
        return CoarseState(**picked)


@dataclass
class FineState:
    """What the fine stage returns.

    Attributes:
        logits: [B, C].
        cls: Normalised CLS output [B, d].
        tokens: Normalised sequence [B, L, d] in the order it was read.
        selected: Re-read cells [B, k], ascending.
        others: The remaining cells [B, M - k], ascending.
        taken: Requested block outputs [B, L, d].
    """

    logits: Tensor
    cls: Tensor
    tokens: Tensor
    selected: Tensor
    others: Tensor
    taken: list[Tensor]

    @property
    def length(self) -> int:
        """Tokens in the fine sequence, CLS included, registers not."""
        return self.tokens.shape[1]


class RefinedState(NamedTuple):
    """What the fine stage made of images that may differ in their number of re-read cells.

    Attributes:
        logits: [B, C].
        selected: Re-read cells [B, k], ascending, padded with -1 to the largest number that is possible.
        lengths: Tokens in the fine sequence of each image [B] int64, CLS and registers included.
    """

    logits: Tensor
    selected: Tensor
    lengths: Tensor

    @property
    def cells(self) -> Tensor:
        """Re-read cells of each image [B] int64."""
        return (self.selected >= 0).sum(1)


@dataclass
class ScopeOutput:
    """Result of dynamic inference.

    Attributes:
        logits: Final logits [B, C]: coarse where the image exited, fine elsewhere.
        coarse_logits: [B, C].
        confidence: What the threshold is compared with [B]: the largest coarse probability, or what
            ``config.confidence`` names.
        exited: Whether the coarse answer was accepted [B], bool.
        importance: Importance of each coarse cell [B, M].
        selected: Re-read cells [B, k], ascending; -1 where an image has fewer than k, or exited.
        tokens: Tokens used by each image over both stages, CLS and registers included [B], int64.
        grid: Rows and columns of the coarse grid.
    """

    logits: Tensor
    coarse_logits: Tensor
    confidence: Tensor
    exited: Tensor
    importance: Tensor
    selected: Tensor
    tokens: Tensor
    grid: tuple[int, int]
