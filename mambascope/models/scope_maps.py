"""timm's model contract for two stages: features, maps of blocks, input sizes, parameter groups.

Shape letters: B batch, M coarse cells, L tokens, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mambascope.layers import cls_index, remove_cls
from mambascope.models.cells import children
from mambascope.models.configs import ScopeConfig
from mambascope.models.encoded import Intermediates
from mambascope.models.scores import Presence
from mambascope.models.states import CoarseState, FineState
from mambascope.models.vim import VisionMamba


class TwoStageContract(VisionMamba):
    """What timm and dense models ask of a Vim, answered by its fine stage."""

    two_stage = True
    config: ScopeConfig
    pos_embed_coarse: nn.Parameter | None
    coarse_weight: float

    def forward_coarse(self, x: Tensor, take: Sequence[int] = (), presence: Presence | None = None) -> CoarseState:
        """First look at images [B, C, H, W]."""
        raise NotImplementedError

    def forward_fine(
        self, x: Tensor, coarse: CoarseState, alpha: float | None = None, take: Sequence[int] = ()
    ) -> FineState:
        """Second look at images [B, C, H, W]."""
        raise NotImplementedError

    def half_image(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] at half their size."""
        if x.device.type == "cpu" and x.dtype == torch.float32:
            rows = x[..., 0::2, :] + x[..., 1::2, :]  # pooling runs one pixel at a time there: 6 times slower
            return (rows[..., 0::2] + rows[..., 1::2]) * 0.25
        return F.avg_pool2d(x, 2)  # bilinear at one half is the mean of four pixels

    def answer_of_both(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Logits [B, C] of images that both looks were taken at; while training, the fine look answers alone."""
        if self.coarse_weight == 0 or self.training or not self.has_classifier:
            return fine
        return fine.log_softmax(-1) + self.coarse_weight * coarse.log_softmax(-1)

    @property
    def has_classifier(self) -> bool:
        """Whether the logits are those of classes."""
        return self.num_classes > 0 and self.global_pool != ""

    def _cls_position(self) -> str:
        return self.config.fine_cls

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, L, d] of the fine stage for every image, in the order they were read."""
        return self.forward_fine(x, self.forward_coarse(x)).tokens

    def fine_map(self, tokens: Tensor, fine: FineState, grid: tuple[int, int]) -> Tensor:
        """Scatters a fine sequence onto the full-size grid (section 5.2).

        Fine tokens go to their patches; a cell that was not re-read gives its coarse token to its four patches.

        Args:
            tokens: Sequence [B, L, d] in the fine stage's order.
            fine: The state with the cells.
            grid: Rows and columns of the coarse grid.

        Returns:
            Map [B, d, 2 * rows, 2 * cols].
        """
        body = remove_cls(tokens, self.config.fine_cls)
        count = 4 * fine.selected.shape[1]
        if self.config.fine_order == "important_first":
            refined, rest = body[:, :count], body[:, count:]
        else:
            rest, refined = body[:, : body.shape[1] - count], body[:, body.shape[1] - count :]
        patches = children(fine.selected, grid).flatten(1)
        if self.config.cell_order == "raster":
            patches = patches.sort(dim=1).values
        index = torch.cat([patches, children(fine.remaining, grid).flatten(1)], dim=1)
        values = torch.cat([refined, rest.repeat_interleave(4, dim=1)], dim=1)
        out = torch.empty_like(values).scatter(1, index.unsqueeze(-1).expand_as(values), values)
        return out.transpose(1, 2).unflatten(2, (2 * grid[0], 2 * grid[1]))

    def _intermediates(self, x: Tensor, take: list[int], stop: int | None, norm: bool) -> Intermediates:
        """Fine maps of the blocks ``take``; the coarse pass needs every block, so nothing stops early."""
        coarse = self.forward_coarse(x)
        fine = self.forward_fine(x, coarse, take=take)
        taken = [self._normalised(t) for t in fine.taken] if norm else fine.taken
        maps = [self.fine_map(t, fine, coarse.grid).contiguous() for t in taken]
        at = cls_index(fine.length - 1, self.config.fine_cls)
        return Intermediates(fine.tokens, maps, [t[:, at : at + 1] for t in taken], fine.stem_maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the head only, unless the score asks it: the coarse pass needs every block and the final norm."""
        take, _ = feature_take_indices(len(self.layers), indices)
        if prune_head and not self.config.score.head:
            self.reset_classifier(0, "")
        return take

    def _trained_grid(self, config: Any) -> tuple[int, int]:
        rows, cols = (-(-side // (2 * config.patch_size)) for side in config.image_hw)
        return 2 * rows, 2 * cols

    def _resample_tables(self) -> None:
        old = (self.grid[0] // 2, self.grid[1] // 2)
        super()._resample_tables()
        new = (self.grid[0] // 2, self.grid[1] // 2)
        if self.pos_embed_coarse is not None:
            self.pos_embed_coarse = self._resampled(self.pos_embed_coarse, old, new)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise rates: reuse and gate go with the head, offsets with what they add to."""
        of_look = r"^(?:coarse_offsets\.)?"
        return {
            "stem": of_look + "cls_token|pos_embed|patch_embed",
            "blocks": [(of_look + r"layers\.(\d+)", None), (of_look + "norm_f|^reuse|^gate", (99999,))],
        }
