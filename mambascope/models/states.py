"""What the stages of a MambaScope leave: logits, features, cells and tokens.

Shape letters: B batch, M coarse cells, k selected cells, L tokens, d model width, C classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


def merge(coarse: Tensor, fine: Tensor, rows: Tensor) -> Tensor:
    """Puts what the fine stage says of images ``rows`` [n] int64 in the place of what the coarse stage said."""
    return coarse.index_copy(0, rows, fine.to(coarse.dtype))


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
        tokens: Patch embeddings plus coarse positions [B, M, d], as they entered the encoder.
        importance: Averaged importance of each cell [B, M], without gradient.
        grid: Rows and columns of the coarse grid.
        taken: Requested block outputs [B, M + 1, d].
        stem_maps: What a stem made of the half-size images, for dense models; none without a stem.
    """

    logits: Tensor
    cls: Tensor
    features: Tensor
    tokens: Tensor
    importance: Tensor
    grid: tuple[int, int]
    taken: list[Tensor] = field(default_factory=list)
    stem_maps: list[Tensor] = field(default_factory=list)

    def index_select(self, rows: Tensor) -> CoarseState:
        """The state of some of the images, ``rows`` [n] int64, without stem maps: the fine stage reads none."""
        return CoarseState(
            logits=self.logits.index_select(0, rows),
            cls=self.cls.index_select(0, rows),
            features=self.features.index_select(0, rows),
            tokens=self.tokens.index_select(0, rows),
            importance=self.importance.index_select(0, rows),
            grid=self.grid,
            taken=[t.index_select(0, rows) for t in self.taken],
        )


@dataclass
class FineState:
    """What the fine stage returns.

    Attributes:
        logits: [B, C].
        cls: Normalised CLS output [B, d].
        tokens: Normalised sequence [B, L, d] in the order it was read.
        selected: Re-read cells [B, k], ascending.
        remaining: The other cells [B, M - k], ascending.
        taken: Requested block outputs [B, L, d].
        stem_maps: What a stem made of the images, for dense models; none without a stem.
    """

    logits: Tensor
    cls: Tensor
    tokens: Tensor
    selected: Tensor
    remaining: Tensor
    taken: list[Tensor] = field(default_factory=list)
    stem_maps: list[Tensor] = field(default_factory=list)

    def split(self, sizes: list[int]) -> list[FineState]:
        """The states of consecutive images, as many as each of ``sizes`` says."""
        ends = list(itertools.accumulate(sizes, initial=0))
        return [self._part(slice(*bounds)) for bounds in itertools.pairwise(ends)]

    def _part(self, rows: slice) -> FineState:
        return FineState(
            logits=self.logits[rows],
            cls=self.cls[rows],
            tokens=self.tokens[rows],
            selected=self.selected[rows],
            remaining=self.remaining[rows],
            taken=[t[rows] for t in self.taken],
        )

    @property
    def length(self) -> int:
        """Tokens in the fine sequence, CLS included."""
        return self.tokens.shape[1]


@dataclass
class ScopeOutput:
    """Result of dynamic inference.

    Attributes:
        logits: Final logits [B, C]: coarse where the image exited, fine elsewhere.
        coarse_logits: [B, C].
        confidence: What the threshold is compared with [B].
        exited: Whether the coarse answer was accepted [B], bool.
        importance: Importance of each coarse cell [B, M].
        selected: Re-read cells [B, k], ascending; -1 where an image exited.
        tokens: Tokens used by each image over both stages, CLS included [B], int64.
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

    @classmethod
    def start(cls, coarse: CoarseState, confidence: Tensor, exited: Tensor, cells: int) -> ScopeOutput:
        """The coarse stage's answer for every image, before any of them is refined by ``cells`` re-read cells."""
        batch, total = coarse.importance.shape
        device = coarse.importance.device
        return cls(
            logits=coarse.logits,
            coarse_logits=coarse.logits,
            confidence=confidence,
            exited=exited,
            importance=coarse.importance,
            selected=torch.full((batch, cells), -1, dtype=torch.long, device=device),
            tokens=torch.full((batch,), total + 1, dtype=torch.long, device=device),
            grid=coarse.grid,
        )

    def merge(self, fine: FineState, rows: Tensor | None = None) -> None:
        """Puts in what the fine stage says of images ``rows`` [n] int64 (``None``: of all of them, in order)."""
        if rows is None:
            self.logits, self.selected, self.tokens = fine.logits, fine.selected, self.tokens + fine.length
            return
        self.logits = merge(self.logits, fine.logits, rows)
        self.selected = merge(self.selected, fine.selected, rows)
        self.tokens = self.tokens.index_add(0, rows, torch.full_like(rows, fine.length))
