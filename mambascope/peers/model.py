"""A Vim that computes fewer and fewer tokens: token reduction around its blocks, put there from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled
from torch.utils.checkpoint import checkpoint

from mambascope.models.cost import CONVENTIONS, StageCost
from mambascope.models.vim import VisionMamba
from mambascope.peers.base import ReducedOutput, Reducer, cls_to_place, patch_rows
from mambascope.peers.config import ReducedConfig
from mambascope.peers.cost import reduced_cost, scan_share


class ReducedVim(VisionMamba):
    """Vim whose blocks a :class:`~mambascope.peers.base.Reducer` runs; all other parameters are Vim's.

    Args:
        config: Sizes, options and the method; by default a Vim-T with R-MeeTo.
        **overrides: Any field of the config, e.g. ``reduction={"name": "dyvm"}``.

    Attributes:
        reduction: The method.

    Raises:
        ValueError: If an override is not a field of the config or has a value that is not accepted.
    """

    config_class = ReducedConfig
    encodes_all_blocks = False
    config: ReducedConfig

    def __init__(self, config: ReducedConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.reduction: Reducer = self.config.reduction.build(self.config.sizes)
        for name in ("norm_f", "head_drop", "head"):  # behind it, where the optimizers of saved runs have them
            self._modules[name] = self._modules.pop(name)

    def _reduce(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Normalised output [B, L, d] of the tokens that are left, and the state they are in."""
        state = self.reduction.start(tokens, self.config.cls_position)
        block: Any
        for i, block in enumerate(self.layers):
            if self.grad_checkpointing and self.training and is_grad_enabled():
                state = checkpoint(self.reduction.step, i, block, state, use_reentrant=False)
            else:
                state = self.reduction.step(i, block, state)
        return self.norm_f(state.hidden, state.residual)[0], state

    def forward_reduced(self, x: Tensor) -> ReducedOutput:
        """Logits of images [B, C, H, W] with what token reduction decided."""
        tokens, state = self._reduce(self._tokens(x)[0])
        logits = self.forward_head(cls_to_place(tokens, state.cls, self.config.cls_position))
        return ReducedOutput(logits, patch_rows(tokens, state.cls), **self.reduction.describe(state))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, M + 1, d] of the M patches that are left and CLS, at its place among them."""
        tokens, state = self._reduce(self._tokens(x)[0])
        return cls_to_place(tokens, state.cls, self.config.cls_position)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused with ``ValueError``: maps need every token."""
        raise ValueError("intermediate maps need every token; this model was made with reduction")

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Refused with ``ValueError``: the method's settings are for this depth."""
        raise ValueError("layers cannot be removed from a model with reduction: its settings are for this depth")

    def stage_costs(
        self, img_size: Sequence[int] | None = None, batches: Iterable[Any] | None = None
    ) -> dict[str, StageCost]:
        """Cost per convention, with the share of the scans that ran on some images where the method switches them.

        Args:
            img_size: (height, width) in pixels; default: the model's.
            batches: Pairs of images [B, C, H, W] and labels [B]; ``None``: every scan counts.
        """
        share = None if batches is None else scan_share(self, batches)
        return {c: reduced_cost(self.config, img_size, convention=c, scan_share=share) for c in CONVENTIONS}
