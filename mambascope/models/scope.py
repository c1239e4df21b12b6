"""MambaScope (arXiv 2512.00647): a Vim that looks coarsely first and re-reads only what it needs.

The file follows the paper: coarse look (section 3.2), token importance (eq. 11-12), selection (eq. 13), fine sequence
(eq. 14-16), feature reuse (eq. 17-19), dynamic inference, training (section 3.5). Whoever runs the stages on their own
does the same in the same order: ``forward_coarse``, ``decide``, ``forward_fine``, ``ScopeOutput.merge``.

Shape letters: B batch, M coarse cells, k selected cells, L tokens, d model width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.layers import (
    FeatureReuse,
    LookOffsets,
    cls_index,
    gather_rows,
    insert_cls,
    pad_to,
    remove_cls,
    resample_pos_embed,
)
from mambascope.models.cells import children, num_selected, select_cells
from mambascope.models.configs import ScopeConfig
from mambascope.models.gate import GATES, check_threshold, exit_mask
from mambascope.models.scope_maps import TwoStageContract
from mambascope.models.scores import CoarseTrace, Presence
from mambascope.models.states import CoarseState, FineState, ScopeOutput, StageLogits
from mambascope.utils import share


class MambaScope(TwoStageContract):
    """One Vim encoder for a half-size look and, where that is not enough, a second look at the important cells.

    In evaluation ``forward`` returns logits at ``self.threshold``; in training it returns both stages' logits.

    Attributes:
        alpha: Share of cells to re-read; may be changed at any time.
        threshold: Confidence at which the coarse answer is accepted; may be changed at any time.
        gate: What says how sure the coarse answer is.
        reuse: What carries coarse features over to the fine stage; ``None`` without reuse.
    """

    config_class = ScopeConfig

    def __init__(self, config: ScopeConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        config = self.config
        self.alpha = config.alpha
        self.threshold = config.threshold
        self.coarse_weight = config.coarse_weight
        self.pos_embed_coarse: nn.Parameter | None = None
        if config.coarse_pos == "own":
            cells = (self.grid[0] // 2) * (self.grid[1] // 2)
            self.pos_embed_coarse = nn.Parameter(torch.zeros(1, cells + 1, config.embed_dim))
            nn.init.trunc_normal_(self.pos_embed_coarse, std=0.02)
        self.coarse_offsets = (
            LookOffsets(config.embed_dim, config.inner_dim, config.depth) if config.coarse_offsets else None
        )
        self.reuse = None if config.reuse == "off" else FeatureReuse(config.embed_dim, config.reuse, config.reuse_ratio)
        self.gate = GATES[config.gate](config)

    def set_alpha(self, alpha: float) -> None:
        """Sets the share of cells to re-read; raises ``ValueError`` outside [0, 1]."""
        self.alpha = share("alpha", alpha)

    # ---- coarse look (section 3.2) -------------------------------------------------------------------------------

    def forward_coarse(self, x: Tensor, take: Sequence[int] = (), presence: Presence | None = None) -> CoarseState:
        """First look: the half-size image through the encoder.

        Args:
            x: Images [B, C, H, W] at full size.
            take: Blocks whose outputs are wanted.
            presence: What tells the score which classes a cell has; ``None`` for the classifier.
        """
        config = self.config
        position = config.cls_position
        if self.pos_embed_coarse is None:
            table, table_grid = self.pos_embed, self.grid
        else:
            table, table_grid = self.pos_embed_coarse, (self.grid[0] // 2, self.grid[1] // 2)
        image = self.half_image(self.whole_cells(x))
        half = self.embed(image, table, table_grid, self.coarse_offsets)
        encoded = self.encode(
            half.tokens,
            take=tuple(take),
            trace=config.score.needs,
            trace_layers=config.taking_part,
            offsets=self.coarse_offsets,
        )
        cls = encoded.tokens[:, cls_index(half.tokens.shape[1] - 1, position)]
        features = remove_cls(encoded.tokens, position)
        logits = self.answer(encoded.tokens, position)
        head = self.classify if self.has_classifier else None
        settings = (position, config.beta, config.score_topk)
        trace = CoarseTrace(encoded.traces, features, cls, head, presence, *settings, logits, image, half.grid)
        return CoarseState(
            logits=logits,
            cls=cls,
            features=features,
            tokens=remove_cls(half.tokens, position),
            importance=self.importance(trace),
            grid=half.grid,
            taken=encoded.taken,
            stem_maps=half.stem_maps,
        )

    def whole_cells(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] padded to whole cells."""
        self.check_images(x)
        return pad_to(x, 2 * self.config.patch_size)

    # ---- token importance (eq. 11-12) ----------------------------------------------------------------------------

    @torch.no_grad()
    def importance(self, trace: CoarseTrace) -> Tensor:
        """Importance of each cell [B, M] from what the coarse pass left."""
        return self.config.score.compute(trace)

    # ---- selection (eq. 13), fine sequence (eq. 14-16), feature reuse (eq. 17-19) --------------------------------

    def forward_fine(
        self, x: Tensor, coarse: CoarseState, alpha: float | None = None, take: Sequence[int] = ()
    ) -> FineState:
        """Second look (section 3.3): selected cells at full resolution, the others as coarse tokens.

        Args:
            x: Images [B, C, H, W] at full size.
            coarse: The same images' coarse state.
            alpha: Share of cells to re-read; ``None`` for ``self.alpha``.
            take: Blocks whose outputs are wanted.
        """
        selected, remaining = select_cells(coarse.importance, self.alpha if alpha is None else alpha)
        x = self.whole_cells(x)
        stem_maps = self.patch_embed.stem_maps(x)
        sequence = self.fine_sequence(self.refined_tokens(x, stem_maps, coarse, selected), coarse, remaining)
        tokens, taken, _ = self.encode(sequence, take=tuple(take))
        position = self.config.fine_cls
        cls = tokens[:, cls_index(tokens.shape[1] - 1, position)]
        logits = self.answer_of_both(self.answer(tokens, position), coarse.logits)
        return FineState(logits, cls, tokens, selected, remaining, taken, stem_maps)

    def refined_tokens(self, x: Tensor, stem_maps: list[Tensor], coarse: CoarseState, selected: Tensor) -> Tensor:
        """Tokens [B, 4k, d] of the selected cells' patches, with positions and reused features.

        Args:
            x: Images [B, C, H, W] of whole cells.
            stem_maps: What the stem makes of them.
            coarse: The same images' coarse state.
            selected: Cells [B, k].
        """
        rows, cols = coarse.grid
        position = self.config.cls_position
        patches = children(selected, coarse.grid)
        table = remove_cls(resample_pos_embed(self.pos_embed, self.grid, (2 * rows, 2 * cols), position), position)
        tokens = self.patch_embed.embed_cells(x, selected // cols, selected % cols, stem_maps)
        tokens = tokens + gather_rows(table, patches.flatten(1)).unflatten(1, patches.shape[1:])
        if self.reuse is not None:  # each cell's feature goes to its four patches
            tokens = tokens + self.reuse(gather_rows(coarse.features, selected)).unsqueeze(2)
        tokens = tokens.flatten(1, 2)
        if self.config.cell_order == "raster":
            tokens = gather_rows(tokens, patches.flatten(1).argsort(dim=1))
        return tokens

    def fine_sequence(self, refined: Tensor, coarse: CoarseState, remaining: Tensor) -> Tensor:
        """The fine stage's sequence [B, 1 + 4k + M - k, d]: CLS, refined and remaining coarse tokens."""
        config = self.config
        at = cls_index(self.pos_embed.shape[1] - 1, config.cls_position)
        cls = self.cls_token + self.pos_embed[:, at : at + 1]
        if self.reuse is not None and config.reuse_cls:
            cls = cls + self.reuse(coarse.cls).unsqueeze(1)
        rest = gather_rows(coarse.tokens, remaining).to(refined.dtype)
        parts = [refined, rest] if config.fine_order == "important_first" else [rest, refined]
        return insert_cls(torch.cat(parts, dim=1), cls, config.fine_cls)

    # ---- dynamic inference ---------------------------------------------------------------------------------------

    def decide(
        self, coarse: CoarseState, threshold: float | None = None, alpha: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """How sure the coarse answers are, and which of them stand.

        Args:
            coarse: State of the images.
            threshold: Confidence eta; ``None`` for ``self.threshold``.
            alpha: Share of cells to re-read; ``None`` for ``self.alpha``. 0 accepts every coarse answer.

        Returns:
            Confidence [B] and whether the image leaves after the coarse stage [B], bool.
        """
        threshold = check_threshold(self.threshold if threshold is None else threshold)
        if not self.has_classifier and 0 < threshold < 1:
            raise ValueError(f"threshold must be 0 or 1 in a model without a classifier, got {threshold:g}")
        cells = num_selected(self.alpha if alpha is None else alpha, coarse.importance.shape[1])
        confidence = self.gate(coarse)
        return confidence, exit_mask(confidence, threshold if cells else 0.0)

    def forward_scope(self, x: Tensor, threshold: float | None = None, alpha: float | None = None) -> ScopeOutput:
        """Look, decide, refine, merge: the fine stage runs on images whose confidence is below the threshold only.

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
        confidence, exited = self.decide(coarse, threshold, alpha)
        cells = num_selected(alpha, coarse.importance.shape[1])
        output = ScopeOutput.start(coarse, confidence, exited, cells)
        if threshold <= 0 or cells == 0 or len(x) == 0:
            return output
        if threshold >= 1:
            output.merge(self.forward_fine(x, coarse, alpha))
            return output
        rows = exited.logical_not().nonzero().squeeze(1)  # the one synchronisation
        if len(rows):
            output.merge(self.forward_fine(x.index_select(0, rows), coarse.index_select(rows), alpha), rows)
        return output

    # ---- training (section 3.5) ----------------------------------------------------------------------------------

    def forward_both(self, x: Tensor, alpha: float | None = None) -> StageLogits:
        """Both stages for every image; ``alpha``: share of cells to re-read, ``None`` for ``self.alpha``."""
        coarse = self.forward_coarse(x)
        if num_selected(self.alpha if alpha is None else alpha, coarse.importance.shape[1]) == 0:
            return StageLogits(coarse.logits, coarse.logits)  # alpha = 0 is the coarse model alone
        return StageLogits(coarse.logits, self.forward_fine(x, coarse, alpha).logits)

    def forward(self, x: Tensor) -> Any:
        """Training: :class:`StageLogits`. Evaluation: logits [B, C] at ``self.threshold``."""
        if self.training:
            return self.forward_both(x)
        # without class probabilities there is no confidence: a feature extractor refines everything
        return self.forward_scope(x, None if self.has_classifier else 1.0).logits
