"""MTR (arXiv 2507.14042): training-free reduction by a score that the SSM itself provides.

A step size near zero leaves the state as it is and lets the token pass by; a large one writes the token into it. So
the mean step size over channels and directions says how much a token matters. The least important tokens leave, each
merged into the most similar one that stays, and the order is kept. No code of the paper is public: the score and the
matching are built from its description.

Shape letters: B batch, L tokens, E inner width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mambascope.layers import BidirectionalMamba
from mambascope.models.scores import mean_step
from mambascope.peers.base import EncoderSizes, patch_rows
from mambascope.peers.merging import Matching, MergeConfig, MergeReducer, MergeState, match_least


@dataclass(frozen=True)
class MTRConfig(MergeConfig):
    """Prune-and-merge by the mean step size, without training; the schedule is R-MeeTo's."""

    name: str = field(init=False, default="mtr")

    def build(self, sizes: EncoderSizes) -> MTR:
        """The method for an encoder of these sizes."""
        return MTR(self, sizes)

    def pairs(self, patches: int) -> int:
        """Similarities that a merge of `patches` patches computes."""
        return self.r * (patches - self.r)

    def extra_macs(self, sizes: EncoderSizes, patches: int, directions: int) -> int:
        """Multiply-adds of the similarities and of the step sizes, which the scan does not hand out."""
        counts = self.patch_counts(patches, sizes.depth)
        steps = sum((counts[layer - 1] + 1) * sizes.rank * sizes.inner_dim for layer in self.layers(sizes.depth))
        return super().extra_macs(sizes, patches, directions) + directions * steps


class MTR(MergeReducer):
    """The block before a merge also gives the mean step sizes of its tokens."""

    def mix(self, layer: int, mixer: BidirectionalMamba, u_BLD: Tensor, state: Any) -> tuple[Tensor, MergeState]:
        """The mixer's output [B, L, d], and the score where the next block needs it."""
        out, trace = mixer(u_BLD, ("steps",) if layer + 1 in self.layers else ())
        return out, state if trace is None else replace(state, score=mean_step(trace))

    def match(self, metric_BMd: Tensor, state: MergeState) -> Matching:
        """Which patches are merged, from the block's input [B, M, d]."""
        assert state.score is not None
        return match_least(metric_BMd, patch_rows(state.score, state.cls), self.config.r)
