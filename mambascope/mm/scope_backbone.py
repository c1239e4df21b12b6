"""MambaScope as an OpenMMLab backbone with confidence-gated early exit (MambaScope section 5.2).

Shape letters: B batch, C gate classes, d model width, h x w patch grid, M coarse cells, k selected cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mambascope.layers import cls_index, remove_cls
from mambascope.mm.backbone import EncoderBackbone
from mambascope.mm.canvas import Look, Size, batch_order, cells_on_canvas, cover, join, join_looks, pad_map
from mambascope.mm.gate import DenseGate, build_gate
from mambascope.mm.pyramid import STEPS, double
from mambascope.models.cells import num_selected
from mambascope.models.configs import SCOPE_CONFIGS
from mambascope.models.gate import check_threshold, exit_mask
from mambascope.models.scope import MambaScope
from mambascope.models.states import CoarseState, merge


@dataclass
class ScopeFeatures:
    """What the backbone found in a batch and how it came to it.

    Attributes:
        maps: Four maps [B, channels, H/s, W/s], s = 4, 8, 16, 32 for 16-pixel patches; sides rounded up. Zero in
            padding.
        gate_logits: Multi-label logits [B, C] of the coarse look; ``None`` without a gate.
        confidence: Of the gate [B]; ``None`` without one.
        cell_logits: Of the gate [B, M, C] in training, zero in padding; ``None`` where the score does not ask for them.
        exited: Which images kept the coarse features [B] bool.
        importance: Importance of each coarse cell [B, M]; zero in padding.
        selected: Re-read cells [B, k]; -1 where an image has fewer than k, or exited.
        grid: Rows and columns of the coarse grid of the whole canvas.
        sizes: Height and width of each image without padding.
    """

    maps: tuple[Tensor, ...]
    gate_logits: Tensor | None
    confidence: Tensor | None
    cell_logits: Tensor | None
    exited: Tensor
    importance: Tensor
    selected: Tensor
    grid: Size
    sizes: list[Size]


class _Part(NamedTuple):
    """What both stages found in the images of one grid; fields as in :class:`ScopeFeatures`."""

    look: Look
    gate_logits: Tensor | None
    confidence: Tensor | None
    cell_logits: Tensor | None
    exited: Tensor
    importance: Tensor
    selected: Tensor
    grid: Size


@MODELS.register_module()
class ScopeBackbone(EncoderBackbone):
    """MambaScope: coarse features for images of which the gate is confident, refined ones for the others.

    With ``detail``, images that exit get that of the half-size image, refined ones that of the whole full-size image.

    In training every image exits with probability ``exit_prob``, so that the heads learn from both kinds of features.
    The gate learns in models that ask for its loss (``ScopeEncoderDecoder``, ``ScopeCascadeRCNN``); inside others it
    stays untrained and ``threshold`` should be 0 or 1.

    Args:
        arch: ``mambascope_tiny_patch16_224`` and so on, as :class:`VimBackbone`.
        gate: Arguments of :class:`~mambascope.mm.gate.GateHead` without the width, ``num_classes`` at least; with a
            ``type`` those of another :class:`~mambascope.mm.gate.DenseGate`; ``None`` for no gate.
        threshold: Confidence at which the coarse features are kept; ``<= 0`` always, ``>= 1`` never.
        exit_prob: Share of training images that exit, in [0, 1].
        coarse_resize: How coarse tokens come to the fine grid: ``bilinear`` (copied in cells that are not re-read), or
            ``learned``: to that, and to the fine tokens, a linear map of the coarse token for each of its four places
            is added, zero at the start. Blends and copies cannot say where in its cell an edge runs; with the map a
            token can.
        **kwargs: As for :class:`VimBackbone`; ``arch_options`` takes fields of
            :class:`~mambascope.models.configs.ScopeConfig`, e.g. ``alpha``.

    Raises:
        ValueError: If an argument is out of range.
    """

    encoder_class = MambaScope
    archs = SCOPE_CONFIGS
    encoder: MambaScope

    def __init__(
        self,
        arch: str = "",
        gate: dict | None = None,
        threshold: float = 0.8,
        exit_prob: float = 0.25,
        coarse_resize: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, **kwargs)
        if coarse_resize not in ("bilinear", "learned"):
            raise ValueError(f"coarse_resize must be bilinear or learned, got {coarse_resize!r}")
        dim = self.encoder.embed_dim
        self.coarse_up = None
        if coarse_resize == "learned":
            maps = [nn.ConvTranspose2d(dim, dim, 2, 2, bias=False) for _ in STEPS]
            for linear in maps:
                nn.init.zeros_(linear.weight)
            self.coarse_up = nn.ModuleList(maps)
        if not 0 <= exit_prob <= 1:
            raise ValueError(f"exit_prob must lie in [0, 1], got {exit_prob!r}")
        self.gate = build_gate(gate, dim)
        self._cell_macs = 0
        if self.encoder.config.score.head:
            self._cell_macs = self._cell_gate(self.encoder.config.score_metric).cell_macs(dim)
        self.threshold = check_threshold(threshold)
        self.exit_prob = exit_prob

    def _cell_gate(self, score: str) -> DenseGate:
        if self.gate is None or not self.gate.tells_cells:
            kind = "none" if self.gate is None else f"a {type(self.gate).__name__} without cell_logits"
            raise ValueError(
                f"score_metric={score!r} asks a gate what is in each cell: gate must be a GateHead or another "
                f"DenseGate with cell_logits, got {kind}"
            )
        return self.gate

    def forward(self, x: Tensor, sizes: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, ...]:
        """Maps [B, channels, H/s, W/s], see :meth:`forward_scope`."""
        return self.forward_scope(x, sizes).maps

    def _decide(self, coarse: CoarseState) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The gate's logits [B, C] and confidence [B] (``None`` without one), and which images exit [B] bool."""
        logits = None if self.gate is None else self.gate.logits(coarse)
        confidence = None if self.gate is None or logits is None else self.gate.confidence(logits)
        batch, cells = coarse.importance.shape
        sure = coarse.importance.new_ones(batch)
        if num_selected(self.encoder.alpha, cells) == 0:
            return logits, confidence, exit_mask(sure, 0.0)  # alpha = 0 is the coarse model alone
        if self.training:
            return logits, confidence, torch.rand_like(sure, dtype=torch.float32) < self.exit_prob
        threshold = check_threshold(self.threshold)
        if confidence is None and 0 < threshold < 1:
            raise ValueError(f"threshold must be 0 or 1 in a backbone without a gate, got {threshold:g}")
        return logits, confidence, exit_mask(sure if confidence is None else confidence, threshold)

    def forward_scope(self, x: Tensor, sizes: Sequence[Sequence[int]] | None = None) -> ScopeFeatures:
        """Features of images with what was decided on the way; the fine pass reads refined images only.

        Args:
            x: Images [B, 3, H, W], each at the top left.
            sizes: Height and width of each image in pixels; what lies outside is padding, which is neither read nor
                selected, and where the maps are zero. ``None`` if there is none.
        """
        groups, image_sizes = self._groups(x, sizes)
        canvas = (x.shape[-2], x.shape[-1])
        parts = [self._part(group.images) for group in groups]
        levels = self._levels([part.look for part in parts], groups, canvas, image_sizes)
        order = batch_order(groups)
        grid = cover(canvas, self.cell)
        most = max(part.selected.shape[1] for part in parts)
        importance = [pad_map(part.importance.unflatten(1, part.grid), grid).flatten(1) for part in parts]
        selected = [cells_on_canvas(part.selected, part.grid, grid, most) for part in parts]
        logits = [part.gate_logits for part in parts if part.gate_logits is not None]
        of_cells = [self._cells_on(grid, part.cell_logits, part.grid) for part in parts if part.cell_logits is not None]
        confidence = [part.confidence for part in parts if part.confidence is not None]
        return ScopeFeatures(
            maps=levels,
            gate_logits=join(logits, order) if logits else None,
            confidence=join(confidence, order) if confidence else None,
            cell_logits=join(of_cells, order) if of_cells else None,
            exited=join([part.exited for part in parts], order),
            importance=join(importance, order),
            selected=join(selected, order),
            grid=grid,
            sizes=image_sizes,
        )

    def _part(self, x: Tensor) -> _Part:
        """Look, decide, refine, merge, as a MambaScope does, on images [n, 3, H, W] of whole cells."""
        gate = self.gate if self.encoder.config.score.head else None
        coarse = self.encoder.forward_coarse(x, self.out_indices, None if gate is None else gate.cell_presence)
        of_cells = gate.cell_logits(coarse.features) if gate is not None and self.training else None
        logits, confidence, exited = self._decide(coarse)
        batch, cells = coarse.importance.shape
        selected = torch.full((batch, num_selected(self.encoder.alpha, cells)), -1, dtype=torch.long, device=x.device)
        refined = exited.logical_not().nonzero().squeeze(1)
        if len(refined) == batch:
            look, selected = self._fine_look(x, coarse)
        elif len(refined) == 0:
            look = self._coarse_look(x, coarse)
        else:  # maps of the coarse look are made for the images that keep them only
            fine, fine_cells = self._fine_look(x.index_select(0, refined), coarse.index_select(refined))
            selected = merge(selected, fine_cells, refined)
            exits = exited.nonzero().squeeze(1)
            exit_state = coarse.index_select(exits)
            exit_state.stem_maps = [m.index_select(0, exits) for m in coarse.stem_maps]
            look = join_looks(
                [self._coarse_look(x.index_select(0, exits), exit_state), fine], torch.cat([exits, refined]).argsort()
            )
        return _Part(look, logits, confidence, of_cells, exited, coarse.importance, selected, coarse.grid)

    @staticmethod
    def _cells_on(canvas: Size, logits: Tensor, grid: Size) -> Tensor:
        """What was told of cells [n, M, C] of images of one grid, on the grid of the canvas."""
        return pad_map(logits.transpose(1, 2).unflatten(2, grid), canvas).flatten(2).transpose(1, 2)

    def _coarse_grids(self, coarse: CoarseState) -> list[Tensor]:
        """Coarse tokens as maps [B, d, h/2, w/2]."""
        position = self.encoder.config.cls_position
        return [remove_cls(t, position).transpose(1, 2).unflatten(2, coarse.grid) for t in coarse.taken]

    def _with_places(self, maps: list[Tensor], grids: Sequence[Tensor]) -> list[Tensor]:
        """Adds to maps [B, d, h, w] what the coarse tokens say about each of their four places, if that is learned."""
        if self.coarse_up is None:
            return maps
        return [m + up(grid) for m, up, grid in zip(maps, self.coarse_up, grids, strict=True)]

    def _coarse_look(self, x: Tensor, coarse: CoarseState) -> Look:
        """Coarse tokens resized to the fine grid, with the detail of the half-size image."""
        grids = self._coarse_grids(coarse)
        at = cls_index(coarse.tokens.shape[1], self.encoder.config.cls_position)
        maps = self._with_places([double(g) for g in grids], grids)
        detail = []
        if self.detail is not None:
            detail = self.detail.forward_half(self.encoder.half_image(x), coarse.stem_maps)
        return Look(maps, [t[:, at] for t in coarse.taken], detail)

    def _fine_look(self, x: Tensor, coarse: CoarseState) -> tuple[Look, Tensor]:
        """Fine tokens on the fine grid, with the detail of the whole image; and the cells re-read [B, k]."""
        fine = self.encoder.forward_fine(x, coarse, take=self.out_indices)
        at = cls_index(fine.length - 1, self.encoder.config.fine_cls)
        maps = [self.encoder.fine_map(t, fine, coarse.grid) for t in fine.taken]
        maps = self._with_places(maps, self._coarse_grids(coarse))
        detail = [] if self.detail is None else self.detail(x, fine.stem_maps)
        return Look(maps, [t[:, at] for t in fine.taken], detail), fine.selected

    def cost(self, height: int, width: int, convention: str = "both_directions") -> tuple[float, float]:
        """As for :class:`VimBackbone`, with the learned resize and what the score asks the gate about every cell."""
        exits, refined = super().cost(height, width, convention)
        rows, cols = cover((height, width), self.cell)
        cell = self._cell_macs
        if self.coarse_up is not None:
            cell += len(STEPS) * 4 * self.encoder.embed_dim**2
        return exits + rows * cols * cell / 1e9, refined + rows * cols * cell / 1e9

    def image_gflops(self, features: ScopeFeatures) -> dict[str, list[float]]:
        """Backbone GFLOPs of every image of a batch, padding not counted, per convention of :meth:`cost`."""
        gflops = {}
        for convention in ("one_direction", "both_directions"):
            costs = {size: self.cost(*size, convention) for size in set(features.sizes)}
            pairs = zip(features.exited.tolist(), features.sizes, strict=True)
            gflops[convention] = [costs[size][0 if exited else 1] for exited, size in pairs]
        return gflops


def check_gate(backbone: Any, num_classes: int) -> ScopeBackbone:
    """Returns the backbone if it is a :class:`ScopeBackbone` whose gate knows ``num_classes`` classes.

    Raises:
        ValueError: Otherwise.
    """
    if not isinstance(backbone, ScopeBackbone) or backbone.gate is None:
        raise ValueError(
            "backbone must be a ScopeBackbone with a gate; other backbones belong in mmseg's or mmdet's own models"
        )
    if backbone.gate.num_classes != num_classes:
        raise ValueError(
            f"num_classes of the gate must equal that of the heads, {num_classes}, got {backbone.gate.num_classes}"
        )
    return backbone
