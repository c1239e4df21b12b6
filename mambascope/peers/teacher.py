"""The trained Vim that a Vim with token reduction learns from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mambascope.layers import cls_index
from mambascope.models import VimConfig, VisionMamba, load_checkpoint
from mambascope.models.checkpoint import stem_width
from mambascope.models.cost import plain_vim
from mambascope.models.reading import read_state_dict
from mambascope.models.weights import find_weights
from mambascope.peers.base import patch_rows


class Teacher:
    """Computes every token with fixed weights.

    It is no module, so that neither the optimizer nor the average of the weights nor checkpoints see it.

    Args:
        config: Of the model that learns; what it has beyond a plain Vim is left out.
        checkpoint: Weights of the teacher.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit.
    """

    def __init__(self, config: VimConfig, checkpoint: str) -> None:
        state, description = read_state_dict(find_weights(checkpoint))
        pool = description.get("config", {}).get("global_pool", config.global_pool)  # what its own head reads
        self.model = VisionMamba(replace(plain_vim(config), global_pool=pool, stem_width=stem_width(state)))
        load_checkpoint(self.model, checkpoint, verbose=False)
        self.model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # the averaged copy of the trained module needs none of its own

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and patch outputs [B, M, d] in raster order, of images [B, C, H, W]."""
        self.model.to(x.device)  # Lightning does not move what is no module
        tokens = self.model.forward_features(x)
        at = cls_index(tokens.shape[1] - 1, self.model.config.cls_position)
        return self.model.forward_head(tokens), patch_rows(tokens, at)
