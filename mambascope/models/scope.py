"""MambaScope (arXiv 2512.00647): a Vim that looks coarsely first and re-reads only what it needs.

Shape letters: B batch, M coarse cells, k selected cells, L tokens, d model width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mambascope.layers import (
    FeatureReuse,
    cls_index,
    gather_rows,
    insert_cls,
    pad_to,
    remove_cls,
    resample_pos_embed,
)
from mambascope.models.cells import average_importance, children, num_selected, select_cells
from mambascope.models.configs import ScopeConfig
from mambascope.models.gate import check_threshold, confidence, exit_mask
from mambascope.models.states import CoarseState, FineState, ScopeOutput, StageLogits
from mambascope.models.vim import VisionMamba
from mambascope.utils import share


class MambaScope(VisionMamba):
    """One Vim encoder for a half-size look and, where that is not enough, a second look at the important cells.

    In evaluation ``forward`` returns logits at ``self.threshold``; in training it returns both stages' logits.

    Attributes:
        alpha: Share of cells to re-read; may be changed at any time.
        threshold: Confidence at which the coarse answer is accepted; may be changed at any time.
    """

    config_class = ScopeConfig
    two_stage = True
    config: ScopeConfig

    def __init__(self, config: ScopeConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        config = self.config
        self.alpha = config.alpha
        self.threshold = config.threshold
        self.pos_embed_coarse: nn.Parameter | None = None
        if config.coarse_pos == "own":
            cells = (self.grid[0] // 2) * (self.grid[1] // 2)
            self.pos_embed_coarse = nn.Parameter(torch.zeros(1, cells + 1, config.embed_dim))
            nn.init.trunc_normal_(self.pos_embed_coarse, std=0.02)
        self.reuse = None if config.reuse == "off" else FeatureReuse(config.embed_dim, config.reuse, config.reuse_ratio)

    def _trained_grid(self, config: Any) -> tuple[int, int]:
        rows, cols = (-(-side // (2 * config.patch_size)) for side in config.image_hw)
        return 2 * rows, 2 * cols

    # ---- the two stages ------------------------------------------------------------------------------------------

    def _prepare(self, x: Tensor) -> Tensor:
        """Pads images to whole cells."""
        self.check_images(x)
        return pad_to(x, 2 * self.config.patch_size)

    def half_image(self, x: Tensor) -> Tensor:
        """The half-size image."""
        if x.device.type == "cpu" and x.dtype == torch.float32:
            rows = x[..., 0::2, :] + x[..., 1::2, :]  # pooling runs one pixel at a time there: 6 times slower
            return (rows[..., 0::2] + rows[..., 1::2]) * 0.25
        return F.avg_pool2d(x, 2)  # bilinear at one half is the mean of four pixels

    def forward_coarse(self, x: Tensor, take: tuple[int, ...] | list[int] = ()) -> CoarseState:
        """First look (section 3.2): the half-size image through the encoder.

        Args:
            x: Images [B, C, H, W] at full size.
            take: Blocks whose outputs are wanted.
        """
        return self.forward_half(self.half_image(self._prepare(x)), take)

    def forward_half(
        self, half: Tensor, take: tuple[int, ...] | list[int] = (), stem_maps: list[Tensor] | None = None
    ) -> CoarseState:
        """:meth:`forward_coarse` of half-size images [B, C, H/2, W/2]; ``stem_maps``: theirs, if known."""
        patches, grid = self._embed(half, stem_maps)
        position = self.config.cls_position
        if self.pos_embed_coarse is None:
            table = resample_pos_embed(self.pos_embed, self.grid, grid, position)
        else:
            trained = (self.grid[0] // 2, self.grid[1] // 2)
            table = resample_pos_embed(self.pos_embed_coarse, trained, grid, position)
        tokens = insert_cls(patches, self.cls_token, position) + table
        layers = self.config.taking_part
        out, scores, taken = self.encode(tokens, score=self.config.score, score_layers=layers, take=take)
        with torch.no_grad():
            importance = average_importance((remove_cls(s.detach(), position) for s in scores), self.config.beta)
        return CoarseState(
            logits=self.answer(out, position),
            cls=out[:, cls_index(patches.shape[1], position)],
            features=remove_cls(out, position),
            tokens=remove_cls(tokens, position),
            importance=importance,
            grid=grid,
            taken=taken,
        )

    def _fine_tokens(
        self, x: Tensor, coarse: CoarseState, selected: Tensor, stem_maps: list[Tensor] | None = None
    ) -> Tensor:
        """Embeddings [B, 4k, d] of the selected cells' patches with positions and reused features."""
        cols = coarse.grid[1]
        fine_grid = (2 * coarse.grid[0], 2 * cols)
        tokens = self.patch_embed.embed_cells(x, selected // cols, selected % cols, stem_maps)
        position = self.config.cls_position
        table = remove_cls(resample_pos_embed(self.pos_embed, self.grid, fine_grid, position), position)
        patches = children(selected, coarse.grid)
        tokens = tokens + gather_rows(table, patches.flatten(1)).unflatten(1, patches.shape[1:])
        if self.reuse is not None:
            tokens = tokens + self.reuse(gather_rows(coarse.features, selected)).unsqueeze(2)
        tokens = tokens.flatten(1, 2)
        if self.config.cell_order == "raster":
            tokens = gather_rows(tokens, patches.flatten(1).argsort(dim=1))
        return tokens

    def fine_sequence(
        self, x: Tensor, coarse: CoarseState, alpha: float | None = None, stem_maps: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fine stage's tokens [B, L, d], the selected cells [B, k] and the others [B, M - k] (eq. 13-16)."""
        config = self.config
        selected, others = select_cells(coarse.importance, self.alpha if alpha is None else alpha)
        fine = self._fine_tokens(self._prepare(x), coarse, selected, stem_maps)
        rest = gather_rows(coarse.tokens, others).to(fine.dtype)
        row = cls_index(self.pos_embed.shape[1] - 1, config.cls_position)
        cls = self.cls_token + self.pos_embed[:, row : row + 1]
        if self.reuse is not None and config.reuse_cls:
            cls = cls + self.reuse(coarse.cls).unsqueeze(1)
        sequence = torch.cat([fine, rest] if config.fine_order == "important_first" else [rest, fine], dim=1)
        return insert_cls(sequence, cls, config.fine_cls), selected, others

    def forward_fine(
        self,
        x: Tensor,
        coarse: CoarseState,
        alpha: float | None = None,
        take: tuple[int, ...] | list[int] = (),
        stem_maps: list[Tensor] | None = None,
    ) -> FineState:
        """Second look (section 3.3): selected cells at full resolution, the others as coarse tokens.

        Args:
            x: Images [B, C, H, W] at full size.
            coarse: The same images' coarse state.
            alpha: Share of cells to re-read; ``None`` for ``self.alpha``.
            take: Blocks whose outputs are wanted.
            stem_maps: Those of ``x``, if known.
        """
        sequence, selected, others = self.fine_sequence(x, coarse, alpha, stem_maps)
        tokens, _, taken = self.encode(sequence, take=take)
        cls_out = tokens[:, cls_index(tokens.shape[1] - 1, self.config.fine_cls)]
        return FineState(self.answer(tokens), cls_out, tokens, selected, others, taken)

    def forward_both(self, x: Tensor, alpha: float | None = None) -> StageLogits:
        """Both stages for every image, as in training (section 3.5)."""
        coarse = self.forward_coarse(x)
        if num_selected(self.alpha if alpha is None else alpha, coarse.importance.shape[1]) == 0:
            return StageLogits(coarse.logits, coarse.logits)  # alpha = 0 is the coarse model alone
        return StageLogits(coarse.logits, self.forward_fine(x, coarse, alpha).logits)

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence [B] of coarse logits [B, C] that the exit threshold is compared with."""
        return confidence(logits)

    def decide(
        self, coarse: CoarseState, threshold: float | None = None, alpha: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which images leave after the coarse stage (section 3.2).

        Args:
            coarse: State of the images.
            threshold: Confidence eta; ``None`` for ``self.threshold``.
            alpha: Share of cells to re-read; ``None`` for ``self.alpha``. 0 accepts every coarse answer.

        Returns:
            Confidence [B] and whether it is enough [B], bool.
        """
        threshold = check_threshold(self.threshold if threshold is None else threshold)
        if not self._has_classifier() and 0 < threshold < 1:
            raise ValueError(f"threshold must be 0 or 1 in a model without a classifier, got {threshold:g}")
        cells = num_selected(self.alpha if alpha is None else alpha, coarse.importance.shape[1])
        conf = self.confidence(coarse.logits)
        return conf, exit_mask(conf, threshold if cells else 0.0)

    def forward_scope(self, x: Tensor, threshold: float | None = None, alpha: float | None = None) -> ScopeOutput:
        """Dynamic inference: the fine stage runs on the images whose coarse confidence is below the threshold only.

        Synchronises with the host once per batch, and not at all when the threshold alone decides. With a threshold of
        1 both stages run for every image: ``logits`` are the fine ones beside ``coarse_logits``.

        Args:
            x: Images [B, C, H, W].
            threshold: Confidence eta; ``None`` for ``self.threshold``.
            alpha: Share of cells to re-read; ``None`` for ``self.alpha``. 0 accepts every coarse answer.
        """
        threshold = check_threshold(self.threshold if threshold is None else threshold)
        alpha = self.alpha if alpha is None else alpha
        coarse = self.forward_coarse(x)
        conf, exited = self.decide(coarse, threshold, alpha)
        cells = num_selected(alpha, coarse.importance.shape[1])
        output = ScopeOutput.start(coarse, conf, exited, cells)
        if threshold <= 0 or cells == 0 or len(x) == 0:
            return output
        if threshold >= 1:
            output.merge(self.forward_fine(x, coarse, alpha))
            return output
        rows = exited.logical_not().nonzero().squeeze(1)  # the one synchronisation
        if len(rows):
            output.merge(self.forward_fine(x.index_select(0, rows), coarse.index_select(rows), alpha), rows)
        return output

    # ---- timm's model contract -----------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Any:
        """Training: :class:`StageLogits`. Evaluation: logits [B, C] at ``self.threshold``."""
        if self.training:
            return self.forward_both(x)
        # without class probabilities there is no confidence: a feature extractor refines everything
        return self.forward_scope(x, None if self._has_classifier() else 1.0).logits

    def _has_classifier(self) -> bool:
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
            own, rest = body[:, :count], body[:, count:]
        else:
            rest, own = body[:, : body.shape[1] - count], body[:, body.shape[1] - count :]
        where = children(fine.selected, grid).flatten(1)
        if self.config.cell_order == "raster":
            where = where.sort(dim=1).values
        index = torch.cat([where, children(fine.others, grid).flatten(1)], dim=1)
        values = torch.cat([own, rest.repeat_interleave(4, dim=1)], dim=1)
        out = torch.empty_like(values).scatter(1, index.unsqueeze(-1).expand_as(values), values)
        return out.transpose(1, 2).unflatten(2, (2 * grid[0], 2 * grid[1]))

    def _intermediates(
        self, x: Tensor, take: list[int], stop: int | None, norm: bool, stem_maps: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Fine maps of the layers ``take``; the coarse pass needs every block, so nothing stops early."""
        coarse = self.forward_coarse(x)
        fine = self.forward_fine(x, coarse, take=take, stem_maps=stem_maps)
        taken = [self._normalised(t) for t in fine.taken] if norm else fine.taken
        maps = [self.fine_map(t, fine, coarse.grid).contiguous() for t in taken]
        at = cls_index(fine.length - 1, self.config.fine_cls)
        return fine.tokens, maps, [t[:, at : at + 1] for t in taken]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the head only: the coarse pass needs every block and the final norm."""
        take, _ = feature_take_indices(len(self.layers), indices)
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _resample_tables(self) -> None:
        old = (self.grid[0] // 2, self.grid[1] // 2)
        super()._resample_tables()
        new = (self.grid[0] // 2, self.grid[1] // 2)
        if self.pos_embed_coarse is not None:
            self.pos_embed_coarse = self._resampled(self.pos_embed_coarse, old, new)

    def set_alpha(self, alpha: float) -> None:
        """Sets the share of cells to re-read; raises ``ValueError`` outside [0, 1]."""
        self.alpha = share("alpha", alpha)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates; the reuse branch goes with the head."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^reuse", (99999,))],
        }
