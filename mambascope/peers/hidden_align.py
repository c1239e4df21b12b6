"""HiddenAlign, also known as ToP-ViM (arXiv 2409.18962): prune tokens, but let their positions advance the state.

Token score: the SSM output of both directions, clipped at zero and summed over channels. After some blocks the patches
with the highest scores stay, in their order, and CLS goes to the middle of them again.

Alignment: without pruned positions, two tokens that were far apart become neighbours, and the state that one leaves to
the other decays by one step only. Here a pruned position is an empty token: it brings nothing into the state, and the
state decays by the step size that the scan gives to a zero input, ``softplus(dt_bias)``. So g pruned positions before a
token multiply the state by ``exp(g softplus(dt_bias) A)``, which needs their number and no computation of theirs: the
scan over the tokens that stay equals the scan over all positions with zeros at the pruned ones. The paper has the
alignment in its kernel, by a position map; the step size of a pruned position, which a later layer cannot know without
computing the token, is our choice.

Shape letters: B batch, M patches of the image, K patches that stay, L tokens (K + 1), E inner width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.layers import BidirectionalMamba, BlockTrace, cls_index, gather_rows
from mambascope.models.scores import clipped
from mambascope.ops import ScanDirection, selective_scan
from mambascope.peers.base import (
    EncoderSizes,
    Reducer,
    ReductionConfig,
    TokenState,
    as_layers,
    check_ratio,
    kept_of,
    layers_within,
    order_with_cls,
    patch_rows,
)


@dataclass(frozen=True)
class HiddenAlignConfig(ReductionConfig):
    """Pruning after some blocks.

    Attributes:
        layers: Blocks after which patches are pruned; ``None`` for the published 5, 10 and 15 of 24, and the same
            fractions of another depth.
        keep: Share of the patches that each pruning keeps, in (0, 1]; one number, or one per layer.
        align: Whether pruned positions advance the state. The public code of the method does not do it.
    """

    name: str = field(init=False, default="hidden_align")
    layers: tuple[int, ...] | None = None
    keep: float | tuple[float, ...] = 0.8
    align: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_layers(self.layers))
        if isinstance(self.keep, (list, tuple)):
            object.__setattr__(self, "keep", tuple(check_ratio("keep", ratio) for ratio in self.keep))
        else:
            object.__setattr__(self, "keep", check_ratio("keep", self.keep))
        if not isinstance(self.align, bool):
            raise ValueError(f"reduction.align must be true or false, got {self.align!r}")

    def ratios(self, depth: int) -> dict[int, float]:
        """Keep ratio of every block after which patches are pruned."""
        layers = self.layers or tuple(sorted({min(round(depth * block / 24), depth - 2) for block in (5, 10, 15)}))
        layers_within(layers, 0, depth - 2, depth)  # after the last block there is nothing left to save
        keep = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(layers)
        if len(keep) != len(layers):
            raise ValueError(f"reduction.keep must be one number or {len(layers)}, one per layer, got {len(keep)}")
        return dict(zip(layers, keep, strict=True))

    def patch_counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches that each block computes."""
        ratios = self.ratios(depth)
        counts, left = [], patches
        for layer in range(depth):
            counts.append(left)
            left = kept_of(ratios.get(layer, 1.0), left)
        return tuple(counts)

    def build(self, sizes: EncoderSizes) -> HiddenAlign:
        """The method for an encoder of these sizes."""
        return HiddenAlign(self, sizes)


@dataclass
class AlignState(TokenState):
    """The sequence and what is known of its gaps.

    Attributes:
        patches: Patches of the image.
        places: Raster index of every patch that is left [B, K]; ``None`` while all are.
        gaps: Pruned positions between each token and the next [B, L - 1]; ``None`` without alignment.
        score: Of the tokens, from a block after which patches are pruned [B, L].
        origin: Index of the CLS token before anything was pruned.
    """

    patches: int = 0
    places: Tensor | None = None
    gaps: Tensor | None = None
    score: Tensor | None = None
    origin: int = 0


def gaps_between(places_BK: Tensor, patches: int, origin: int, at: int) -> Tensor:
    """Pruned positions between neighbours of a sequence.

    The CLS token stood before patch `origin` and stands before the patch number `at` of those that are left. Of the
    pruned positions between its two neighbours, those on its old side of `origin` stay on that side.

    Args:
        places_BK: Raster indices of the patches that are left, ascending.
        patches: Patches of the image.
        origin: Index of the CLS token in the full sequence.
        at: Index of the CLS token in this sequence.

    Returns:
        [B, K] int64: between tokens 0 and 1, 1 and 2, ...
    """
    bounds = F.pad(F.pad(places_BK, (1, 0), value=-1), (0, 1), value=patches)
    gaps = bounds.diff(dim=1) - 1
    here = gaps[:, at : at + 1]
    before = torch.minimum((origin - bounds[:, at : at + 1] - 1).clamp_min(0), here)
    return torch.cat([gaps[:, :at], before, here - before, gaps[:, at + 1 :]], dim=1)[:, 1:-1]


def aligned_scan(
    direction: ScanDirection, gaps: Tensor, *, reverse: bool = False, backend: str | None = None
) -> Tensor:
    """Scan of one direction in which the state also decays at pruned positions.

    Equal to the plain scan over all positions with empty tokens (x = B = C = 0, step ``softplus(dt_bias)``) at the
    pruned ones, at the cost of the tokens that are left.

    Args:
        direction: Of the tokens that are left.
        gaps: Pruned positions between each token and the next [B, L - 1].
        reverse: Walk from the last token to the first.
        backend: Scan backend by name; ``None`` for the automatic choice.

    Returns:
        SSM output before the gate [B, L, E], at least fp32.

    Raises:
        ValueError: If the step sizes are not projected by a plain layer.
    """
    if direction.dt_weight is None or direction.dt_bias is None:
        raise ValueError(
            "hidden_align needs plain dt_proj and dt_proj_b, for the step sizes where tokens were pruned: "
            "merge adapters and remove hooks first"
        )
    states = direction.A.shape[1]
    wide = torch.promote_types(direction.x.dtype, torch.float32)
    low, b, c = direction.proj.to(wide).split([direction.proj.shape[-1] - 2 * states, states, states], dim=-1)
    x, bias = direction.x.to(wide), direction.dt_bias.to(wide)
    step = F.softplus(F.linear(low, direction.dt_weight.to(wide), bias))
    # the walk meets a gap before the token it leads to
    before = F.pad(gaps, (0, 1) if reverse else (1, 0)).to(wide).unsqueeze(-1)
    longer = step + before * F.softplus(bias)
    # the longer step is for the decay alone: the input is scaled back
    scale = step / longer.clamp_min(torch.finfo(wide).tiny)
    y = selective_scan(x * scale, longer, direction.A, b, c, dt_softplus=False, reverse=reverse, backend=backend)
    return torch.addcmul(y, x, direction.D.to(wide))


class HiddenAlign(Reducer):
    """Prunes after some blocks, and aligns the states of the blocks behind them."""

    config: HiddenAlignConfig

    def __init__(self, config: HiddenAlignConfig, sizes: EncoderSizes) -> None:
        super().__init__(config, sizes)
        self.ratios = {layer: ratio for layer, ratio in config.ratios(sizes.depth).items() if ratio < 1}

    def start(self, tokens: Tensor, position: str) -> AlignState:
        """State of the sequence [B, L, d] before the first block, with the CLS token at `position`."""
        patches = tokens.shape[1] - 1
        cls = cls_index(patches, position)
        return AlignState(tokens, None, position, cls, patches=patches, origin=cls)

    def mix(self, layer: int, mixer: BidirectionalMamba, u_BLD: Tensor, state: Any) -> tuple[Tensor, AlignState]:
        """The mixer's output [B, L, d], and the score where patches are pruned next."""
        scored = layer in self.ratios
        if state.gaps is None:
            out, trace = mixer(u_BLD, ("outputs",) if scored else ())
            return out, replace(state, score=None if trace is None else clipped(trace))
        x_BLE, z_BLE = mixer.project(u_BLD)
        forward, backward = mixer.directions(x_BLE)
        y_f = aligned_scan(forward, state.gaps, backend=mixer.scan_backend)
        y_b = aligned_scan(backward, state.gaps, reverse=True, backend=mixer.scan_backend)
        score = clipped(BlockTrace(outputs=(y_f.detach(), y_b.detach()))) if scored else None
        return mixer.finish(y_f + y_b, z_BLE), replace(state, score=score)

    def after(self, layer: int, state: Any) -> AlignState:
        """Prunes, if this block is among the layers."""
        left = state.hidden.shape[1] - 1
        keep = kept_of(self.ratios.get(layer, 1.0), left)
        return state if keep == left else self._prune(state, keep)

    def _prune(self, state: AlignState, keep: int) -> AlignState:
        assert state.score is not None
        assert state.residual is not None
        assert isinstance(state.cls, int)
        scores = patch_rows(state.score, state.cls)
        # ties go to the lower index
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values
        places = best if state.places is None else state.places.gather(1, best)
        at = cls_index(keep, state.position)
        rows = order_with_cls(best, state.cls, at)
        return replace(
            state,
            hidden=gather_rows(state.hidden, rows),
            residual=gather_rows(state.residual, rows),
            cls=at,
            places=places,
            gaps=gaps_between(places, state.patches, state.origin, at) if self.config.align else None,
        )

    def describe(self, state: Any) -> dict[str, Any]:
        """Raster indices of the patches that are left."""
        return {"places": state.places}
