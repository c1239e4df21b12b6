"""DyVM, Dynamic Vision Mamba (arXiv 2504.04787): learned token pruning, and scans that are switched off per image.

Tokens: a predictor before some blocks decides for every patch. In training the decision is a Gumbel-softmax sample;
patches that are dropped move behind those that stay, with the order kept, and stay in the sequence as masked rows, so
that gradients reach the predictors. What is kept is computed exactly as at test time, when a fixed share of the patches
with the highest scores is gathered: the causal scan never sees what stands behind, and the anti-causal one starts with
rows that bring nothing into its state.

Scans: the CLS token's row before the convolution decides whether the forward and the backward scan of a block run for
this image. At test time only the rows of the images whose scan runs are computed.

Shape letters: B batch, M patches, L tokens (M + 1), d model width, E inner width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambascope.layers import BidirectionalMamba, cls_index, gather_rows
from mambascope.layers.plain import project
from mambascope.peers.base import (
    EncoderSizes,
    ReducedOutput,
    Reducer,
    ReductionConfig,
    TokenState,
    as_layers,
    check_ratio,
    check_weight,
    cls_row,
    kept_of,
    layers_within,
    order_with_cls,
    patch_rows,
)

_TAU = 2.0  # temperature of the switches, as in the public code


@dataclass(frozen=True)
class DyVMConfig(ReductionConfig):
    """Token predictors and scan switches.

    Published: ``keep`` 0.9 for Vim-T, 0.7 for Vim-S and Vim-B, ``block_ratio`` 0.8 and for Vim-B 0.7; 30 epochs with
    the terms below and 0.5 (KL + token distillation) to the unreduced Vim (the training command's ``teacher``).

    Attributes:
        layers: Blocks before which patches are pruned; ``None`` for the quarters of the depth (6, 12 and 18 of 24).
        keep: Share r of the patches that stays, in (0, 1]: r after the first pruning, r² and r³ of all after the next.
            1 has no predictors.
        block_ratio: Share of the scans that training aims at, in (0, 1]. 1 has no switches.
        ratio_weight: Weight of the squared distances from both shares in the training loss.
    """

    name: str = field(init=False, default="dyvm")
    layers: tuple[int, ...] | None = None
    keep: float = 0.7
    block_ratio: float = 0.8
    ratio_weight: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_layers(self.layers))
        for name in ("keep", "block_ratio"):
            object.__setattr__(self, name, check_ratio(name, getattr(self, name)))
        object.__setattr__(self, "ratio_weight", check_weight("ratio_weight", self.ratio_weight))

    def ratios(self, depth: int) -> dict[int, float]:
        """Share of all patches that is left, by the block before which the others are pruned; empty without pruning."""
        layers = self.layers or tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0}))
        layers_within(layers, 1, depth - 1, depth)  # a predictor reads the output of a block
        return {layer: self.keep**stage for stage, layer in enumerate(layers, start=1)} if self.keep < 1 else {}

    def patch_counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches that each block computes at test time."""
        ratios = self.ratios(depth)
        counts, left = [], patches
        for layer in range(depth):
            left = kept_of(ratios[layer], patches) if layer in ratios else left
            counts.append(left)
        return tuple(counts)

    def build(self, sizes: EncoderSizes) -> DyVM:
        """The method for an encoder of these sizes."""
        return DyVM(self, sizes)

    def _predictor_widths(self, width: int) -> tuple[tuple[int, int], ...]:
        return (width, width), (width, width // 2), (width // 2, width // 4), (width // 4, 2)

    def extra_macs(self, sizes: EncoderSizes, patches: int, directions: int) -> int:
        """Multiply-adds of the predictors and of the switches."""
        del directions
        counts = self.patch_counts(patches, sizes.depth)
        predictor = sum(a * b for a, b in self._predictor_widths(sizes.embed_dim))
        predictors = sum(counts[layer - 1] * predictor for layer in self.ratios(sizes.depth))
        return predictors + (sizes.depth * 2 * sizes.inner_dim * 2 if self.block_ratio < 1 else 0)


class TokenPredictor(nn.Module):
    """DynamicViT's predictor (arXiv 2106.02034): half of the features stay a patch's own, half are averaged over all.

    Args:
        dim: Model width d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, patches_BMd: Tensor, kept_BM: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, M, 2] of keeping and of dropping each patch.

        Args:
            patches_BMd: Patches.
            kept_BM: 1 for those that count in the average; ``None`` for all.
        """
        local, shared = self.local(patches_BMd).tensor_split([patches_BMd.shape[-1] // 2], dim=-1)
        if kept_BM is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = kept_BM.unsqueeze(-1)
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
        return self.head(torch.cat([local, mean.expand_as(shared)], dim=-1)).float().log_softmax(-1)


@dataclass
class DyVMState(TokenState):
    """The sequence and the decisions.

    Attributes:
        patches: Patches of the image.
        places: Raster index of every patch [B, M].
        kept: 1 for the patches that are left, which come first [B, M]; with gradient. ``None`` if all are.
        decisions: Of every stage so far, over the patches of the sequence it saw.
        switches: Of every block so far [B, 2].
    """

    patches: int = 0
    places: Tensor | None = None
    kept: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    switches: tuple[Tensor, ...] = ()


def keep_best(state: DyVMState, score_BM: Tensor, count: int) -> DyVMState:
    """Gathers the `count` patches with the highest score, in their order; the others leave the sequence."""
    best = score_BM.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    return _reordered(state, best, cls_index(count, state.position))


def keep_in_front(state: DyVMState, decision_BM: Tensor) -> DyVMState:
    """Moves the patches decided 0 behind the others, both in their order, with the CLS token among those that stay.

    Args:
        state: The sequence.
        decision_BM: 1 or 0 for every patch, already 0 for those that were dropped before; with gradient.
    """
    stays = (decision_BM.detach() > 0.5).long()  # a straight-through 1 is rounded
    order, count = stays.sort(dim=1, descending=True, stable=True).indices, stays.sum(1, keepdim=True)
    at = {"first": torch.zeros_like(count), "middle": count // 2, "last": count}[state.position]
    return replace(_reordered(state, order, at), kept=decision_BM.gather(1, order))


def _reordered(state: DyVMState, patch_BK: Tensor, at: int | Tensor) -> DyVMState:
    assert state.places is not None
    assert state.residual is not None
    rows = order_with_cls(patch_BK, state.cls, at)
    return replace(
        state,
        hidden=gather_rows(state.hidden, rows),
        residual=gather_rows(state.residual, rows),
        cls=at,
        places=state.places.gather(1, patch_BK),
    )


class DyVM(Reducer):
    """Predicts which patches stay and which scans run."""

    config: DyVMConfig

    def __init__(self, config: DyVMConfig, sizes: EncoderSizes) -> None:
        super().__init__(config, sizes)
        self.ratios = config.ratios(sizes.depth)
        self.predictors = nn.ModuleDict({str(layer): TokenPredictor(sizes.embed_dim) for layer in self.ratios})
        switched = range(sizes.depth) if config.block_ratio < 1 else range(0)
        self.switches = nn.ModuleList(nn.Linear(2 * sizes.inner_dim, 2) for _ in switched)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers as in timm's ViT; every switch open, in training as often as the target asks for."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for switch in self.switches:
            ratio = self.config.block_ratio
            nn.init.zeros_(switch.weight)  # type: ignore[arg-type]
            nn.init.constant_(switch.bias, math.log(ratio / (1 - ratio)))  # type: ignore[arg-type]

    def start(self, tokens: Tensor, position: str) -> DyVMState:
        """State of the sequence [B, L, d] before the first block, with the CLS token at `position`."""
        patches = tokens.shape[1] - 1
        places = torch.arange(patches, device=tokens.device).expand(len(tokens), -1)
        return DyVMState(tokens, None, position, cls_index(patches, position), patches, places)

    def before(self, layer: int, state: Any) -> DyVMState:
        """Prunes, if this block is among the layers."""
        if layer not in self.ratios:
            return state
        stream = patch_rows(state.hidden + state.residual, state.cls)
        scores = self.predictors[str(layer)](stream, state.kept)
        if not self.training:
            return keep_best(state, scores[..., 0], kept_of(self.ratios[layer], state.patches))
        decision = F.gumbel_softmax(scores, hard=True)[..., 0]
        if state.kept is not None:
            decision = decision * state.kept
        state = keep_in_front(state, decision)
        return replace(state, decisions=(*state.decisions, decision))

    # ---- scans ---------------------------------------------------------------------------------------------------

    def mix(self, layer: int, mixer: BidirectionalMamba, u_BLD: Tensor, state: Any) -> tuple[Tensor, DyVMState]:
        """The mixer's output [B, L, d] with dropped patches masked and the scans of some images switched off."""
        x_BLE, z_BLE = mixer.project(u_BLD)
        if not self.switches:
            y_BLE = mixer.scan_both(*self._directions(mixer, x_BLE, state), z_BLE)
            return project(mixer.out_proj, y_BLE), state
        on_B2 = self._switch(layer, cls_row(x_BLE, state.cls), cls_row(z_BLE, state.cls))
        state = replace(state, switches=(*state.switches, on_B2))
        if self.training:
            forward, backward = self._directions(mixer, x_BLE, state)
            gate = on_B2.unsqueeze(-1).unsqueeze(-1)
            y_BLE = gate[:, 0] * mixer.scan(forward, reverse=False) + gate[:, 1] * mixer.scan(backward, reverse=True)
            return mixer.finish(y_BLE, z_BLE), state
        if bool(on_B2.all()):
            return project(mixer.out_proj, mixer.scan_both(*mixer.directions(x_BLE), z_BLE)), state
        return mixer.finish(self._scan_active(mixer, x_BLE, on_B2 > 0), z_BLE), state

    def _switch(self, layer: int, x_B1E: Tensor, z_B1E: Tensor) -> Tensor:
        """1 for every scan that runs [B, 2]; in training a straight-through Gumbel-sigmoid sample."""
        logits = self.switches[layer](torch.cat([x_B1E, z_B1E], dim=-1)).squeeze(1).float()
        if not self.training:
            return (logits > 0).to(logits.dtype)
        noise = torch.empty_like(logits).exponential_().log() - torch.empty_like(logits).exponential_().log()
        soft = ((logits + noise) / _TAU).sigmoid()
        return (soft > 0.5).to(soft.dtype) - soft.detach() + soft

    def _directions(self, mixer: BidirectionalMamba, x_BLE: Tensor, state: DyVMState) -> tuple[Any, Any]:
        """Both directions with dropped patches masked.

        The mask is on what goes into the convolutions and into the states, not on what B, C and the step sizes are made
        of: a product of two masked terms would have no gradient where the mask is 0.
        """
        if state.kept is None:
            return mixer.directions(x_BLE)
        assert isinstance(state.cls, Tensor)
        every = torch.arange(state.kept.shape[1], device=x_BLE.device).expand(len(x_BLE), -1)
        rows = every + (every >= state.cls)
        mask = torch.ones_like(x_BLE[..., 0]).scatter(1, rows, state.kept.to(x_BLE.dtype)).unsqueeze(-1)
        forward, backward = mixer.directions(x_BLE * mask)
        return forward._replace(x=forward.x * mask), backward._replace(x=backward.x * mask)

    def _scan_active(self, mixer: BidirectionalMamba, x_BLE: Tensor, on_B2: Tensor) -> Tensor:
        """Sum of the SSM outputs that are switched on [B, L, E]; the rows of the other images are not computed."""
        y_BLE = torch.zeros_like(x_BLE, dtype=torch.promote_types(x_BLE.dtype, torch.float32))
        for reverse in (False, True):
            images = on_B2[:, int(reverse)].nonzero().squeeze(1)
            if not len(images):
                continue
            x = mixer.convolve_one(x_BLE[images], reverse=reverse)
            y = mixer.scan(mixer.direction(x, reverse=reverse), reverse=reverse)
            y_BLE = y_BLE.index_add(0, images, y.to(y_BLE.dtype))
        return y_BLE

    # ---- what training and measurement need ----------------------------------------------------------------------

    def describe(self, state: Any) -> dict[str, Any]:
        """Places, what is kept, decisions and switches."""
        switches = torch.stack(state.switches, dim=1) if state.switches else None
        return {"places": state.places, "kept": state.kept, "decisions": state.decisions, "switches": switches}

    def penalties(self, output: ReducedOutput) -> dict[str, tuple[float, Tensor]]:
        """Squared distances of the shares of tokens (per image, mean over the stages) and of scans from the wanted."""
        terms = {}
        if output.decisions:
            stages = zip(output.decisions, self.ratios.values(), strict=True)
            parts = [(decision.mean(1) - ratio).square().mean() for decision, ratio in stages]
            terms["token_ratio"] = (self.config.ratio_weight, torch.stack(parts).mean())
        if output.switches is not None:
            distance = output.switches.mean() - self.config.block_ratio
            terms["block_ratio"] = (self.config.ratio_weight, distance.square())
        return terms
