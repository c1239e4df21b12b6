"""ToMe (arXiv 2210.09461) as it is for ViT, put on Vim without training: the order of the tokens is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mambascope.peers.base import EncoderSizes
from mambascope.peers.merging import Matching, MergeConfig, MergeReducer, MergeState, match_bipartite


@dataclass(frozen=True)
class ToMeConfig(MergeConfig):
    """Bipartite merging without retraining.

    Attributes:
        ordered: Whether the tokens keep their order, which ToMe does not care for and a scan does.
    """

    name: str = field(init=False, default="tome")
    ordered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ordered, bool):
            raise ValueError(f"reduction.ordered must be true or false, got {self.ordered!r}")

    def build(self, sizes: EncoderSizes) -> ToMe:
        """The method for an encoder of these sizes."""
        return ToMe(self, sizes)


class ToMe(MergeReducer):
    """Matches by the cosine of the blocks' inputs."""

    config: ToMeConfig

    def match(self, metric_BMd: Tensor, state: MergeState) -> Matching:
        """Which patches are merged, from the block's input [B, M, d]."""
        del state
        return match_bipartite(metric_BMd, self.config.r, ordered=self.config.ordered)
