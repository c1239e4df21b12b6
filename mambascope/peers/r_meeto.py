"""R-MeeTo (arXiv 2412.12496): merge similar tokens in their order, then retrain for a few epochs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mambascope.peers.base import EncoderSizes
from mambascope.peers.merging import Matching, MergeConfig, MergeReducer, MergeState, match_bipartite


@dataclass(frozen=True)
class RMeeToConfig(MergeConfig):
    """Bipartite merging with the order kept.

    Published: before every second block from the third on, ``r`` 5 for Vim-T and 11 for Vim-S and Vim-B, retrained for
    30, 15 and 15 epochs with CE + 0.5 KL to the unreduced Vim (the training command's ``teacher``).
    """

    name: str = field(init=False, default="r_meeto")

    def build(self, sizes: EncoderSizes) -> RMeeTo:
        """The method for an encoder of these sizes."""
        return RMeeTo(self, sizes)


class RMeeTo(MergeReducer):
    """Matches by the cosine of the blocks' inputs; what stays keeps its order."""

    def match(self, metric_BMd: Tensor, state: MergeState) -> Matching:
        """Which patches are merged, from the block's input [B, M, d]."""
        del state
        return match_bipartite(metric_BMd, self.config.r)
