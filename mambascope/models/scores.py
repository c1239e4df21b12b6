"""Token importance: which coarse cells are worth a second look (MambaScope eq. 11-12, Table 4).

A score reads what the coarse pass left, a :class:`CoarseTrace`, and gives importance [B, M] without gradient. It says
what it needs of the blocks, so that nothing else is kept. One's own is an entry of :data:`SCORES`:

    SCORES["gate"] = average_blocks(lambda block: block.gate.float().abs().mean(-1), "gate")

and is then named by ``score_metric="gate"``.

Shape letters: B batch, M coarse cells, L tokens (M + 1), E inner width, d model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mambascope.layers import BlockTrace, remove_cls


def average_importance(scores: Iterable[Tensor], beta: float) -> Tensor:
    """Momentum average of the layers' scores [B, M], starting from zero: ``S <- beta S + (1 - beta) s`` (eq. 12)."""
    total: Tensor | None = None
    for score in scores:
        total = (1 - beta) * score if total is None else beta * total + (1 - beta) * score
    if total is None:
        raise ValueError("scores must come from at least one layer")
    return total


Presence = Callable[[Tensor], Tensor]
"""Features [..., d] to the probabilities [..., C] that each class is there, where several can be."""


class CoarseTrace(NamedTuple):
    """What the coarse pass left for a score.

    Attributes:
        blocks: What the blocks that take part left, in order, with the fields that the score needs.
        features: Normalised patch outputs [B, M, d].
        cls: Normalised CLS output [B, d].
        classify: The head: features [..., d] to logits [..., C]; ``None`` without a classifier.
        presence: A dense model's gate; ``None`` for classifiers.
        cls_position: Place of the CLS token among a block's tokens: ``first``, ``middle`` or ``last``.
        beta: Momentum of the average over blocks.
        topk: Channels that ``topk`` averages.
        logits: The coarse answer [B, C].
        image: What was looked at: the half-size images [B, channels, h, w].
        grid: Rows and columns of the cells.
    """

    blocks: list[BlockTrace]
    features: Tensor
    cls: Tensor
    classify: Callable[[Tensor], Tensor] | None
    presence: Presence | None
    cls_position: str
    beta: float
    topk: int
    logits: Tensor
    image: Tensor
    grid: tuple[int, int]

    def average(self, metric: Callable[[BlockTrace], Tensor]) -> Tensor:
        """Momentum average over the blocks of a metric [B, L] of their tokens, CLS left out: [B, M] (eq. 12)."""
        return average_importance((remove_cls(metric(block), self.cls_position) for block in self.blocks), self.beta)


class Score(NamedTuple):
    """An entry of :data:`SCORES`.

    Attributes:
        compute: Importance [B, M] from what the coarse pass left.
        needs: Fields of :class:`~mambascope.layers.BlockTrace` that it reads. Without ``outputs`` the fused scan runs.
        head: Whether it asks the classifier head (a dense model's gate) about every cell, which the cost then counts.
    """

    compute: Callable[[CoarseTrace], Tensor]
    needs: tuple[str, ...] = ()
    head: bool = False


def average_blocks(metric: Callable[[BlockTrace], Tensor], *needs: str) -> Score:
    """The score that averages a metric of single blocks, [B, L], over those that take part."""
    return Score(lambda coarse: coarse.average(metric), needs)


# ---- metrics of a block ------------------------------------------------------------------------------------------


def ssm_output(block: BlockTrace) -> Tensor:
    """The SSM output y [B, L, E] of both directions together."""
    assert block.outputs is not None
    return block.outputs[0] + block.outputs[1]


def largest(block: BlockTrace) -> Tensor:
    """``max softplus(y)`` over channels [B, L] (eq. 11). Softplus is monotone: of the largest output alone."""
    assert block.top is not None
    return F.softplus(block.top)


def clipped(block: BlockTrace) -> Tensor:
    """Mean of ``max(y, 0)`` over channels [B, L]; HiddenAlign (arXiv 2409.18962) ranks tokens by it."""
    return ssm_output(block).clamp_min(0).mean(-1)


def top_channels(block: BlockTrace, channels: int) -> Tensor:
    """Mean softplus of the largest channels [B, L]."""
    y = F.softplus(ssm_output(block))
    return y.topk(min(channels, y.shape[-1]), dim=-1).values.mean(-1)


def mean_step(block: BlockTrace) -> Tensor:
    """Mean step size over channels, summed over both directions [B, L], by which MTR (arXiv 2507.14042) ranks tokens.

    A step near zero leaves the state as it is and lets the token pass by.
    """
    assert block.steps is not None
    return block.steps[0].mean(-1) + block.steps[1].mean(-1)


# ---- scores ------------------------------------------------------------------------------------------------------


def class_evidence(coarse: CoarseTrace) -> Tensor:
    """How likely a cell's own logits make the class of the coarse answer [B, M].

    For models whose head reads every token (``global_pool="lse"``): the patches of others have not learned to answer.
    Images of dense models have objects of several classes: there it is how likely the cell has any of them, classes
    taken as independent. Where nothing tells classes no cell says more than another: all are 1.
    """
    if coarse.presence is not None:
        return 1 - (1 - coarse.presence(coarse.features).float()).prod(-1)
    if coarse.classify is None:
        return coarse.features.new_ones(coarse.features.shape[:2])
    answer = coarse.logits.argmax(1).view(-1, 1, 1).expand(-1, coarse.features.shape[1], 1)
    return coarse.classify(coarse.features).float().softmax(-1).gather(2, answer).squeeze(2)


_PLAIN = 1e-3  # standard deviation of normalised pixels; a grey level is about 0.018


def contrast(coarse: CoarseTrace) -> Tensor:
    """Standard deviation of a cell's pixels, mean over the channels [B, M].

    What is a twentieth of a grey level is none: rounding must not rank the cells of a plain area.
    """
    (rows, cols), (height, width) = coarse.grid, coarse.image.shape[-2:]
    pixels = coarse.image.float().unflatten(3, (cols, width // cols)).unflatten(2, (rows, height // rows))
    return (pixels.var(dim=(3, 5), correction=0).sqrt().mean(1).flatten(1) - _PLAIN).clamp_min(0)


def evident_contrast(coarse: CoarseTrace) -> Tensor:
    """:func:`class_evidence` times :func:`contrast` [B, M]: where the answer is seen, and something can be read."""
    return class_evidence(coarse) * contrast(coarse)


SCORES: dict[str, Score] = {
    "max": average_blocks(largest, "top"),
    "l2": average_blocks(lambda block: ssm_output(block).norm(dim=-1), "outputs"),
    "mean": average_blocks(lambda block: ssm_output(block).mean(-1), "outputs"),
    "clip": average_blocks(clipped, "outputs"),
    "softplus": average_blocks(lambda block: F.softplus(ssm_output(block)).mean(-1), "outputs"),
    "topk": Score(lambda coarse: coarse.average(partial(top_channels, channels=coarse.topk)), ("outputs",)),
    "step": average_blocks(mean_step, "steps"),
    "evidence": Score(class_evidence, head=True),
    "evidence_contrast": Score(evident_contrast, head=True),
}
"""Importance by name, see ``ScopeConfig.score_metric``: the paper's six (Table 4; ``mean`` is its "no clip"), MTR's
step sizes, and ours: what the head sees in each cell of the class that the coarse look answers (a dense model's gate:
of any class), alone or times the contrast of the pixels."""
