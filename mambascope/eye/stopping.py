"""Stopping a MambaEye as soon as it is sure, with confidence measured against what it has seen (shape letters: B batch,
L glimpses, C classes).

The training target after glimpse t is ``q_t(k) = r_t 1[k = y] + (1 - r_t) / C`` with the information ratio ``r_t``, so
even a perfectly recognised image at 10 % coverage is answered with a probability of about 0.1. A fixed threshold on the
softmax would therefore measure coverage. ``r_t`` is known, so it can be taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mambascope.eye.model import MambaEye
from mambascope.models.gate import Gate

CRITERIA = ("confidence", "margin", "entropy", "raw")


def corrected_confidence(logits: Tensor, coverage: Tensor, criterion: str = "confidence") -> Tensor:
    """How sure an answer is, 0 to 1, where 1 is as sure as training allows at this coverage.

    ``confidence``: ``(p_1 - (1 - r) / C) / r``, the largest probability with the target's two parts undone; an even
    answer comes out as chance, ``1 / C``. ``margin``: ``(p_1 - p_2) / r``. ``entropy``:
    ``(log C - H(p)) / (log C - H(q_r))``, the share of the reachable information. ``raw``: ``p_1``, not corrected.

    Args:
        logits: [..., C].
        coverage: Information ratio r of the glimpses read [...], in [0, 1]; where it is 0 the result is 0.
        criterion: One of those above.

    Returns:
        [...] in at least fp32.

    Raises:
        ValueError: If the criterion is unknown, or shapes or values of ``coverage`` do not fit.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if coverage.shape != logits.shape[:-1]:
        raise ValueError(f"coverage must be {list(logits.shape[:-1])} as the logits are, got {list(coverage.shape)}")
    if coverage.numel() and not bool(((coverage >= 0) & (coverage <= 1)).all()):
        raise ValueError("coverage must lie in [0, 1]")
    classes = logits.shape[-1]
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    r = coverage.to(log_p)
    top = log_p.topk(min(2, classes), dim=-1).values.exp()
    if criterion == "raw":
        return top[..., 0]
    if criterion == "entropy":
        # xlogy is 0 where a probability is 0
        entropy = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
        spread = (1 - r) / classes
        peak = r + spread
        target = -torch.xlogy(peak, peak) - (classes - 1) * torch.xlogy(spread, spread)
        score = (log(classes) - entropy) / (log(classes) - target)
    elif criterion == "margin":
        score = (top[..., 0] - top[..., -1]) / r
    else:
        score = (top[..., 0] - (1 - r) / classes) / r
    return torch.where(r > 0, score, 0).clamp(0, 1)


class Glance(NamedTuple):
    """What a MambaEye leaves after some glimpses.

    Attributes:
        logits: Its answer [B, C].
        coverage: Information ratio of the glimpses read [B].
    """

    logits: Tensor
    coverage: Tensor


class CoverageGate(Gate):
    """Confidence measured against what has been seen: the gate of a MambaEye.

    Args:
        criterion: See :func:`corrected_confidence`.
        min_coverage: No image exits below this information ratio, where dividing by it only magnifies noise.

    Raises:
        ValueError: If an option does not have an accepted value.
    """

    def __init__(self, criterion: str = "confidence", min_coverage: float = 0.05) -> None:
        super().__init__()
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage must lie in [0, 1], got {min_coverage!r}")
        self.criterion, self.min_coverage = criterion, min_coverage

    def forward(self, coarse: Glance) -> Tensor:
        """Confidence [B] of the answers so far."""
        return corrected_confidence(coarse.logits, coarse.coverage, self.criterion)

    def decide(self, glance: Glance, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """How sure the answers are, and which images exit.

        Args:
            glance: Of the images.
            threshold: Confidence at which an image exits, or several [K]; above 1 none does.

        Returns:
            Confidence [B], and whether the image exits [B], bool; [B, K] at several thresholds.
        """
        confidence, enough = self(glance), glance.coverage >= self.min_coverage
        if isinstance(threshold, Tensor):
            return confidence, (confidence[:, None] >= threshold) & enough[:, None]
        return confidence, (confidence >= threshold) & enough


class GlimpseReader(Protocol):
    """Glimpses of a batch of images, read when they are needed."""

    @property
    def length(self) -> int:
        """Glimpses per image."""
        ...

    def __len__(self) -> int:
        """Images."""
        ...

    def read(self, rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches, moves and information ratio [b, l] of glimpses ``start`` to ``stop`` of some images.

        Patches and moves are as :meth:`MambaEye.forward` takes them.
        """
        ...


@dataclass(frozen=True)
class AnytimeResult:
    """Answers of a batch that could stop early.

    Attributes:
        logits: Answer of each image [B, C].
        used: Glimpses read for it [B] int64.
        exited: Whether it exited before the last glimpse [B] bool.
        confidence: Corrected confidence of the answer [B].
        coverage: Information ratio of the glimpses read for it [B].
        steps_computed: Glimpses the model processed in all: the sum of ``used``.
    """

    logits: Tensor
    used: Tensor
    exited: Tensor
    confidence: Tensor
    coverage: Tensor
    steps_computed: int


@torch.no_grad()
def answer_when_sure(
    model: MambaEye,
    glimpses: GlimpseReader,
    *,
    threshold: float = 0.8,
    criterion: str = "confidence",
    min_coverage: float = 0.05,
    every: int = 16,
    max_glimpses: int | None = None,
) -> AnytimeResult:
    """Reads glimpses until each image's answer is sure enough; finished images leave the batch.

    Args:
        model: The model, in evaluation mode.
        glimpses: Where patches come from; those after an image has exited are never read.
        threshold: Corrected confidence at which an image exits; above 1 never.
        criterion: Of the :class:`CoverageGate`.
        min_coverage: Of the gate.
        every: Glimpses between two checks.
        max_glimpses: Most glimpses per image; ``None`` for all there are.

    Raises:
        ValueError: If an option does not have an accepted value, or a batch holds no glimpse.
    """
    gate = CoverageGate(criterion, min_coverage)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive integer, got {every!r}")
    length = glimpses.length if max_glimpses is None else min(glimpses.length, max_glimpses)
    if length < 1 or len(glimpses) < 1:
        raise ValueError(f"glimpses must hold at least one glimpse, got {len(glimpses)} images of {length}")

    state = model.start(len(glimpses))
    device = state.steps.device
    active = torch.arange(len(glimpses), device=device)
    finished: list[tuple[Tensor, ...]] = []
    computed = 0
    for start in range(0, length, every):
        stop = min(start + every, length)
        patches, moves, coverage = (t.to(device) for t in glimpses.read(active.cpu(), start, stop))
        state = model.step(state, patches, moves)
        computed += len(state) * (stop - start)
        assert state.logits is not None
        seen = coverage[:, -1]
        confidence, exited = gate.decide(Glance(state.logits, seen), threshold)
        leaves = torch.ones_like(exited) if stop == length else exited
        rows = leaves.nonzero().squeeze(1)
        if rows.numel():
            early = exited[rows] & (stop < length)
            finished.append((active[rows], state.logits[rows], state.steps[rows], early, confidence[rows], seen[rows]))
            if rows.numel() == len(state):
                break
            active, state = active[~leaves], state.index_select(~leaves)
    index, *parts = (torch.cat(part) for part in zip(*finished, strict=True))
    logits, used, early, confidence, seen = (part[index.argsort()] for part in parts)
    return AnytimeResult(logits, used, early, confidence, seen, computed)
