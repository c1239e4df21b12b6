"""Merging of similar tokens: matching, the size-weighted mean, and the schedule that all merging methods share.

Shape letters: B batch, M patches in the sequence, r patches that are merged away, L tokens (M + 1), d model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.layers import cls_index, flat_rows, gather_rows
from mambascope.peers.base import (
    EncoderSizes,
    Reducer,
    ReductionConfig,
    TokenState,
    check_count,
    in_sequence,
    order_with_cls,
    patch_rows,
)


class Matching(NamedTuple):
    """Which patches are merged, as numbers among the M patches.

    Attributes:
        sources: Patches that leave [B, r].
        targets: The patch that each of them is merged into [B, r].
        stay: The others, in the order that they take [B, M - r].
    """

    sources: Tensor
    targets: Tensor
    stay: Tensor


@dataclass
class MergeState(TokenState):
    """The sequence, and how many patches each token stands for [B, L]; ``None`` while that is one each.

    ``score`` [B, L] is what the last block found out about its tokens, for methods that ask.
    """

    sizes: Tensor | None = None
    score: Tensor | None = None


@dataclass(frozen=True)
class MergeConfig(ReductionConfig):
    """When and how much is merged.

    Attributes:
        r: Tokens that every merge removes, at most half of the patches it finds; 0 for none.
        start: First block before which tokens are merged, at least 1.
        every: Every how many blocks.
    """

    r: int = 5
    start: int = 2
    every: int = 2

    def __post_init__(self) -> None:
        check_count("r", self.r, 0)
        check_count("start", self.start, 1)
        check_count("every", self.every, 1)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Blocks before which tokens are merged."""
        return tuple(range(self.start, depth, self.every)) if self.r else ()

    def patch_counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches that each block computes; ``ValueError`` if a merge would have to remove more than half of them."""
        if self.start >= depth:
            raise ValueError(
                f"reduction.start must lie in 1..{depth - 1} for an encoder of {depth} blocks, got {self.start}"
            )
        layers = self.layers(depth)
        counts, left = [], patches
        for layer in range(depth):
            if layer in layers:
                if self.r > left // 2:
                    raise ValueError(
                        f"reduction.r must be at most {left // 2}, half of the {left} patches before block {layer}, "
                        f"got {self.r}"
                    )
                left -= self.r
            counts.append(left)
        return tuple(counts)

    def pairs(self, patches: int) -> int:
        """Similarities that a merge of `patches` patches computes."""
        return (patches - patches // 2) * (patches // 2)

    def extra_macs(self, sizes: EncoderSizes, patches: int, directions: int) -> int:
        """Multiply-adds of the similarities."""
        del directions
        counts = self.patch_counts(patches, sizes.depth)
        return sum(self.pairs(counts[layer - 1]) * sizes.embed_dim for layer in self.layers(sizes.depth))


def match_bipartite(metric_BMd: Tensor, r: int, *, ordered: bool = True) -> Matching:
    """ToMe's matching (arXiv 2210.09461): every even patch proposes its most similar odd one, the r best pairs merge.

    Args:
        metric_BMd: What is compared by its cosine [B, M, d].
        r: Pairs, at most M // 2.
        ordered: Whether those that stay keep their order; otherwise the even ones come first, the most similar of them
            in front, and then the odd ones.
    """
    with torch.no_grad():
        unit = F.normalize(metric_BMd.float(), dim=-1)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        best, partner = similarity.max(-1)
        order = best.sort(dim=1, descending=True, stable=True).indices
        merged, unmerged = order[:, :r], order[:, r:]
        odd = torch.arange(1, metric_BMd.shape[1], 2, device=order.device).expand(len(order), -1)
        stay = torch.cat([2 * unmerged, odd], dim=1)
        if ordered:
            stay = stay.sort(dim=1).values
        return Matching(2 * merged, 2 * partner.gather(1, merged) + 1, stay)


def match_least(metric_BMd: Tensor, score_BM: Tensor, r: int) -> Matching:
    """The r patches with the lowest score leave, each merged into the most similar one of those that stay, in order.

    Args:
        metric_BMd: What is compared by its cosine [B, M, d].
        score_BM: Importance [B, M]; of equal ones the later leaves.
        r: Patches that leave, below M.
    """
    with torch.no_grad():
        order = score_BM.sort(dim=1, descending=True, stable=True).indices
        stay, sources = order[:, : len(order[0]) - r].sort(dim=1).values, order[:, len(order[0]) - r :]
        unit = F.normalize(metric_BMd.float(), dim=-1)
        similarity = gather_rows(unit, sources) @ gather_rows(unit, stay).transpose(1, 2)
        return Matching(sources, stay.gather(1, similarity.argmax(-1)), stay)


def merge(state: MergeState, matching: Matching) -> MergeState:
    """Replaces every target by the size-weighted mean of itself and its sources, in hidden tokens and residual stream.

    The CLS token is left alone; its index shrinks with the length of the sequence (R-MeeTo).
    """
    assert isinstance(state.cls, int)
    length, r = state.hidden.shape[1], matching.sources.shape[1]
    at = state.cls * (length - r) // length
    sources, targets = in_sequence(matching.sources, state.cls), in_sequence(matching.targets, state.cls)
    rows = order_with_cls(matching.stay, state.cls, at)
    sizes = torch.ones_like(state.hidden[..., 0], dtype=torch.float32) if state.sizes is None else state.sizes
    grown = sizes.scatter_add(1, targets, sizes.gather(1, sources)).gather(1, rows)

    def mean(tokens: Tensor) -> Tensor:
        weighted = (tokens * sizes.unsqueeze(-1)).flatten(0, 1)
        total = weighted.index_add(0, flat_rows(targets, length), weighted.index_select(0, flat_rows(sources, length)))
        return (gather_rows(total.unflatten(0, tokens.shape[:2]), rows) / grown.unsqueeze(-1)).to(tokens.dtype)

    residual = None if state.residual is None else mean(state.residual)
    return replace(state, hidden=mean(state.hidden), residual=residual, cls=at, sizes=grown, score=None)


class MergeReducer(Reducer):
    """Merges before some blocks; how pairs are found is up to :meth:`match`."""

    config: MergeConfig

    def __init__(self, config: MergeConfig, sizes: EncoderSizes) -> None:
        super().__init__(config, sizes)
        self.layers = config.layers(sizes.depth)

    def start(self, tokens: Tensor, position: str) -> MergeState:
        """State of the sequence [B, L, d] before the first block; ``ValueError`` if `r` is too large for it."""
        patches = tokens.shape[1] - 1
        self.config.patch_counts(patches, self.sizes.depth)
        return MergeState(tokens, None, position, cls_index(patches, position))

    def match(self, metric_BMd: Tensor, state: MergeState) -> Matching:
        """Which patches are merged, from the block's input [B, M, d]."""
        raise NotImplementedError

    def before(self, layer: int, state: Any) -> MergeState:
        """Merges, if this block is among the layers."""
        if layer not in self.layers:
            return state
        return merge(state, self.match(patch_rows(state.hidden, state.cls), state))
