"""Throughput engine: keeps fine batches full by collecting unconfident images across coarse batches.

Splitting every batch on its own leaves the fine stage with small, uneven batches: eight images of which three go on
make a fine batch of three. :class:`ScopePredictor` lets these wait until a full fine batch has gathered, and hands
results out in input order all the same. B images per batch, C classes, M coarse cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from mambascope.models.cells import num_selected
from mambascope.models.frozen import freeze_where_possible
from mambascope.models.gate import check_threshold
from mambascope.models.scope import MambaScope
from mambascope.models.states import CoarseState, ScopeOutput
from mambascope.utils import evaluating, model_device, share

T = TypeVar("T")


@dataclass
class _Open:
    """A batch whose results are not complete: `missing` images still wait for the fine stage."""

    output: ScopeOutput
    missing: int


@dataclass
class _Waiting:
    """Images of one batch that wait for the fine stage."""

    images: Tensor
    coarse: CoarseState
    owner: _Open
    rows: Tensor

    def split(self, count: int) -> tuple[_Waiting, _Waiting]:
        """The first `count` images and the others."""
        cut = torch.arange(len(self.rows), device=self.rows.device).split([count, len(self.rows) - count])
        first, rest = (
            _Waiting(self.images[index], self.coarse.index_select(index), self.owner, self.rows[index]) for index in cut
        )
        return first, rest


def concatenate_states(states: list[CoarseState]) -> CoarseState:
    """Joins coarse states of images of one size along the batch, without block outputs."""
    if len(states) == 1:
        return states[0]
    names = ("logits", "cls", "features", "tokens", "importance")
    logits, cls, features, tokens, importance = (torch.cat([getattr(s, name) for s in states]) for name in names)
    return CoarseState(logits, cls, features, tokens, importance, states[0].grid)


class ScopePredictor:
    """Dynamic inference over a stream of batches with full fine batches.

    Args:
        model: A MambaScope; used in evaluation mode without gradients, on the CPU in its frozen form.
        threshold: Confidence η; ``None`` for the model's.
        alpha: Share of cells to refine; ``None`` for the model's.
        fine_batch_size: Images per fine pass; only the last one of a stream may be smaller, and those that `max_open`
            forces.
        max_open: Batches that may wait for their results before an incomplete fine pass is forced. Bounds memory and
            delay where only few images are refined.

    Attributes:
        fine_batches: Sizes of the fine passes of the latest stream.

    Raises:
        ValueError: An argument outside what is accepted.
    """

    def __init__(
        self,
        model: MambaScope,
        *,
        threshold: float | None = None,
        alpha: float | None = None,
        fine_batch_size: int = 64,
        max_open: int = 64,
    ) -> None:
        if not isinstance(model, MambaScope):
            raise ValueError(f"model must be a MambaScope, got {type(model).__name__}")
        for name, value in (("fine_batch_size", fine_batch_size), ("max_open", max_open)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        freeze_where_possible(model)
        self.model = model
        self.threshold = check_threshold(model.threshold if threshold is None else threshold)
        self.alpha = share("alpha", model.alpha if alpha is None else alpha)
        self.fine_batch_size = fine_batch_size
        self.max_open = max_open
        self.fine_batches: list[int] = []

    def stream(self, batches: Iterable[tuple[Tensor, T]]) -> Iterator[tuple[ScopeOutput, T]]:
        """Results of every batch, in input order; a batch is given out when all its images are done.

        Args:
            batches: Pairs of images [B, C, H, W] and anything that belongs to them (names, labels), which is passed
                through. Sizes of batches and of images may change along the way.
        """
        self.fine_batches = []
        device = model_device(self.model)
        open_batches: deque[tuple[_Open, T]] = deque()
        waiting: deque[_Waiting] = deque()
        size: torch.Size | None = None
        for images, extra in batches:
            with evaluating(self.model):
                images = images.to(device, non_blocking=True)
                if images.shape[1:] != size:
                    self._refine(waiting, flush=True)  # a fine pass takes images of one size
                    size = images.shape[1:]
                opened, state = self._look(images)
                open_batches.append((opened, extra))
                if state is not None:
                    waiting.append(state)
                self._refine(waiting, flush=len(open_batches) > self.max_open)
            while open_batches and not open_batches[0][0].missing:
                done, its_extra = open_batches.popleft()
                yield done.output, its_extra
        with evaluating(self.model):
            self._refine(waiting, flush=True)
        for done, its_extra in open_batches:
            yield done.output, its_extra

    def __call__(self, images: Tensor, batch_size: int = 64) -> ScopeOutput:
        """Results for images [B, C, H, W], taken `batch_size` at a time through the coarse stage."""
        if not len(images):
            raise ValueError("images must hold at least one image")
        outputs = [output for output, _ in self.stream((part, None) for part in images.split(batch_size))]
        joined = {f.name: getattr(outputs[0], f.name) for f in fields(ScopeOutput)}
        for name, value in joined.items():
            if isinstance(value, Tensor):
                joined[name] = torch.cat([getattr(o, name) for o in outputs])
        return ScopeOutput(**joined)

    def _look(self, images: Tensor) -> tuple[_Open, _Waiting | None]:
        """The coarse pass: a batch's results so far, and those of its images that must go on."""
        coarse = self.model.forward_coarse(images)
        confidence, exited = self.model.decide(coarse, self.threshold, self.alpha)
        output = ScopeOutput.start(coarse, confidence, exited, num_selected(self.alpha, coarse.importance.shape[1]))
        rows = exited.logical_not().nonzero().squeeze(1)
        opened = _Open(output, missing=len(rows))
        if not len(rows):
            return opened, None
        return opened, _Waiting(images[rows], coarse.index_select(rows), opened, rows)

    def _refine(self, waiting: deque[_Waiting], *, flush: bool) -> None:
        """Runs fine passes while a full one has gathered; with `flush`, until nobody waits."""
        count = sum(len(w.rows) for w in waiting)
        while count and (flush or count >= self.fine_batch_size):
            taken: list[_Waiting] = []
            room = self.fine_batch_size
            while waiting and room:
                item = waiting.popleft()
                if len(item.rows) > room:
                    item, rest = item.split(room)
                    waiting.appendleft(rest)
                taken.append(item)
                room -= len(item.rows)
            size = sum(len(item.rows) for item in taken)
            self._fine_pass(taken)
            self.fine_batches.append(size)
            count -= size

    def _fine_pass(self, items: list[_Waiting]) -> None:
        images = torch.cat([item.images for item in items]) if len(items) > 1 else items[0].images
        state = concatenate_states([item.coarse for item in items])
        fine = self.model.forward_fine(images, state, self.alpha)
        for item, part in zip(items, fine.split([len(item.rows) for item in items]), strict=True):
            item.owner.output.merge(part, item.rows)
            item.owner.missing -= len(item.rows)
