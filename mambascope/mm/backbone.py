"""MambaScope and Vim as OpenMMLab backbones (MambaScope section 5.2 and Appendix A).

Shape letters: B batch, C gate classes, d model width, h x w patch grid, M coarse cells, k selected cells. Registered in
mmengine's root registry, so one class serves mmseg and mmdet.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mambascope.evaluation.cost import stage_macs
from mambascope.layers import cls_index, pad_to, remove_cls
from mambascope.mm.gate import GateHead
from mambascope.mm.pyramid import STEPS, ImageDetail, SimplePyramid, double
from mambascope.models.checkpoint import CheckpointError, load_checkpoint, read_state_dict
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS, VimConfig, with_overrides
from mambascope.models.exit import check_threshold, exit_mask
from mambascope.models.scope import MambaScope
from mambascope.models.scope_states import CoarseState
from mambascope.models.selection import num_selected
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import find_weights

# fields that a checkpoint and the backbone must agree on: without them the weights mean something else
_SAME = ("patch_size", "embed_dim", "depth", "d_state", "d_conv", "expand", "cls_position")
_SAME_SCOPE = ("fine_cls", "fine_order", "cell_order", "reuse", "reuse_cls")


@dataclass
class ScopeFeatures:
    """What the backbone found in a batch and how it came to it.

    Attributes:
        maps: Four maps [B, channels, H/s, W/s], s = 4, 8, 16, 32 for 16-pixel patches; sides rounded up.
        gate_logits: Multi-label logits [B, C] of the coarse look; ``None`` without a gate.
        confidence: Of the gate [B]; ``None`` without one.
        exited: Which images kept the coarse features [B] bool.
        importance: Importance of each coarse cell [B, M].
        selected: Re-read cells [B, k]; rows of -1 for images that exited.
        grid: Rows and columns of the coarse grid.
    """

    maps: tuple[Tensor, ...]
    gate_logits: Tensor | None
    confidence: Tensor | None
    exited: Tensor
    importance: Tensor
    selected: Tensor
    grid: tuple[int, int]


def default_indices(depth: int) -> tuple[int, ...]:
    """The last block of every quarter: 5, 11, 17, 23 for 24 blocks."""
    if depth < len(STEPS):
        raise ValueError(f"depth must be at least {len(STEPS)} for {len(STEPS)} feature maps, got {depth}")
    return tuple(-(-depth * (i + 1) // len(STEPS)) - 1 for i in range(len(STEPS)))


class Look(NamedTuple):
    """What a pass over images left for the pyramid.

    Attributes:
        maps: Four maps [B, d, h, w] on the fine grid.
        cls: The CLS outputs [B, d] of the same blocks.
        detail: Maps of the image's detail, none or four.
    """

    maps: list[Tensor]
    cls: list[Tensor]
    detail: list[Tensor]

    def joined(self, other: Look, order: Tensor) -> Look:
        """Both looks' images, those of ``self`` first, in ``order`` [B] int64."""

        def join(own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
            pairs = zip(own, others, strict=True)
            return [torch.cat([a, b.to(a.dtype)]).index_select(0, order) for a, b in pairs]

        return Look(*(join(own, others) for own, others in zip(self, other, strict=True)))


class _EncoderBackbone(BaseModule):
    """What both backbones share: the encoder, the pyramid, freezing and weights."""

    encoder_class: type[VisionMamba] = VisionMamba
    archs: Mapping[str, VimConfig] = VIM_CONFIGS
    ignored: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        arch: str = "",
        arch_options: dict | None = None,
        img_size: int | Sequence[int] | None = None,
        out_indices: Sequence[int] | None = None,
        out_channels: int | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        norm_cfg: dict | None = None,
        readout: bool = False,
        detail: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if arch not in self.archs:
            raise ValueError(f"arch must be one of {', '.join(self.archs)}, got {arch!r}")
        options: dict[str, Any] = {**(arch_options or {}), "num_classes": 0, "drop_path_rate": drop_path_rate}
        if img_size is not None:
            options["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        config = with_overrides(self.archs[arch], options)
        if config.stride not in (None, config.patch_size):
            raise ValueError(f"stride must equal patch_size, {config.patch_size}, in a backbone, got {config.stride}")
        self.arch = arch
        self.encoder = self.encoder_class(config)
        indices = default_indices(config.depth) if out_indices is None else tuple(out_indices)
        rising = all(a < b for a, b in itertools.pairwise(indices))
        if len(indices) != len(STEPS) or not rising or indices[0] < 0 or indices[-1] >= config.depth:
            raise ValueError(
                f"out_indices must be {len(STEPS)} rising block numbers in 0..{config.depth - 1}, got {out_indices}"
            )
        self.out_indices = indices
        if not -1 <= frozen_stages <= config.depth:
            raise ValueError(
                f"frozen_stages must lie in -1..{config.depth} (-1 nothing, 0 the embeddings, n also n blocks), "
                f"got {frozen_stages}"
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.encoder.set_grad_checkpointing(with_cp)
        self.pyramid = SimplePyramid(config.embed_dim, out_channels, norm_cfg, readout)
        channels = self.pyramid.out_channels
        stem = config.stem_width
        self.detail = None
        if detail:
            self.detail = ImageDetail(config.in_chans, config.patch_size, channels, stem or 32, own_stem=not stem)
        self.strides = tuple(config.patch_size / step for step in STEPS)
        self._freeze()

    # ---- weights -------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Loads what ``init_cfg=dict(type='Pretrained', checkpoint=..., strict=True)`` names and logs a report.

        An empty checkpoint means random weights, with a warning: so that configs can leave the place to be filled in.

        Reads our ``.safetensors``, Lightning ``.ckpt`` and official Vim ``.pth`` files, and the weights that come with
        the package by name (``scopedigits``, ``scopedigits_dense``); position tables are resampled.
        All modules initialise themselves when they are made, so without ``init_cfg`` there is nothing to do.

        Raises:
            ValueError: If the file cannot be read or belongs to another architecture, or ``init_cfg`` is of another
                type.
        """
        if self.init_cfg is None:
            return
        given = self.init_cfg
        accepted = {"type", "checkpoint", "strict"}
        if not isinstance(given, Mapping) or given.get("type") != "Pretrained" or set(given) - accepted:
            raise ValueError(
                f"init_cfg must be dict(type='Pretrained', checkpoint=FILE, strict=True) or None, got {given!r}"
            )
        path, strict = given.get("checkpoint"), given.get("strict", True)
        if not path:
            print_log(
                f"{type(self).__name__} starts from random weights; give a file with "
                "--cfg-options model.backbone.init_cfg.checkpoint=FILE",
                logger="current",
                level=logging.WARNING,
            )
            return
        path = find_weights(path)
        _, description = read_state_dict(path)
        self._check_description(str(path), description.get("config", {}))
        report = load_checkpoint(self.encoder, path, strict, verbose=False, ignore=self.ignored)
        print_log(f"{type(self).__name__} starts from {path}\n{report}", logger="current")
        self._is_init = True

    def _check_description(self, path: str, config: Mapping[str, Any]) -> None:
        own = self.encoder.config
        names = _SAME + (_SAME_SCOPE if "alpha" in config and isinstance(self.encoder, MambaScope) else ())
        other = [
            f"{n}={config[n]!r} (here {getattr(own, n)!r})"
            for n in names
            if config.get(n, getattr(own, n)) != getattr(own, n)
        ]
        if other:
            raise CheckpointError(
                f"checkpoint {path} belongs to another architecture than {self.arch}: it has {', '.join(other)}; "
                "change arch or arch_options of the backbone"
            )

    # ---- training mode -------------------------------------------------------------------------------------------

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.encoder.patch_embed, *self.encoder.layers[: self.frozen_stages]]

    def _freeze(self) -> None:
        for module in self._frozen():
            module.eval()
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name in ("cls_token", "pos_embed", "pos_embed_coarse"):
                if hasattr(self.encoder, name):
                    getattr(self.encoder, name).requires_grad_(False)

    def train(self, mode: bool = True) -> _EncoderBackbone:
        """Switches the mode; frozen blocks and, with ``norm_eval``, batch norms stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self._frozen():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
        return self

    # ---- features ------------------------------------------------------------------------------------------------

    def _pad(self, x: Tensor) -> Tensor:
        self.encoder.check_images(x)
        return pad_to(x, 2 * self.encoder.config.patch_size)

    def _levels(self, look: Look, height: int, width: int) -> tuple[Tensor, ...]:
        """The pyramid without what only covers padding."""
        sizes = [(-(-height // s), -(-width // s)) for s in self.strides]
        levels = self.pyramid(*look)
        return tuple(m[..., : int(r), : int(c)].contiguous() for m, (r, c) in zip(levels, sizes, strict=True))

    def cost(self, height: int, width: int, convention: str = "both_directions") -> tuple[float, float]:
        """GFLOPs (multiply-adds / 1e9) of one image for the backbone, pyramid included.

        Args:
            height, width: Of the image in pixels.
            convention: ``both_directions`` (what is computed) or ``one_direction`` (as published).

        Returns:
            For an image that exits and for one that is refined; the same figure twice for a plain Vim.
        """
        config = self.encoder.config
        cell = 2 * config.patch_size
        size = (-(-height // cell) * cell, -(-width // cell) * cell)
        alpha: dict[str, Any] = {"alpha": self.encoder.alpha} if isinstance(self.encoder, MambaScope) else {}
        cost = stage_macs(config, size, convention=convention, **alpha)
        rows, cols = size[0] // config.patch_size, size[1] // config.patch_size
        pyramid = self.pyramid.macs(rows, cols)
        detail = half = 0
        if self.detail is not None:
            detail, half = self.detail.macs(rows, cols), self.detail.macs(rows, cols, half=True)
        exits = cost.coarse + half if alpha else cost.fine + detail
        return (exits + pyramid) / 1e9, (cost.refined + pyramid + detail) / 1e9


@MODELS.register_module()
class VimBackbone(_EncoderBackbone):
    """Plain Vim: every patch of the full-size image in one pass.

    Args:
        arch: ``vim_tiny_patch16_224``, ``vim_small_patch16_224``, ``vim_base_patch16_224`` or ``vim_nano_patch8_64``.
        arch_options: Further fields of :class:`~mambascope.models.configs.VimConfig`.
        img_size: Side or (height, width) that the position table is made for; ``None`` for the arch's. Any other image
            size works: the table is resampled.
        out_indices: Four blocks whose outputs become the maps; ``None`` for the last of every quarter.
        out_channels: Channels of the maps; ``None`` for the width d.
        drop_path_rate: Stochastic depth of the last block.
        frozen_stages: -1 trains everything, 0 freezes the embeddings with their stem, n also the first n blocks.
        with_cp: Recompute blocks in the backward pass to save memory.
        norm_eval: Keep batch norms of the pyramid in evaluation mode while training.
        norm_cfg: Normalisation inside the pyramid; ``None`` for LayerNorm.
        readout: Add the projected CLS outputs to the maps: a classifier keeps what it knows there, not in the patches.
        detail: Add convolutions of the image to the maps, see :class:`~mambascope.mm.pyramid.ImageDetail`: those of the
            encoder's stem (``arch_options=dict(stem_width=32)``) start from the classifier's weights, too.
        init_cfg: See :meth:`init_weights`.

    Raises:
        ValueError: If an argument is out of range.
    """

    # a MambaScope file starts a plain Vim too: the encoder is the same
    ignored = ("head.", "reuse.", "pos_embed_coarse", "norm_f.")

    def __init__(self, arch: str = "", **kwargs: Any) -> None:
        super().__init__(arch, **kwargs)
        self.encoder.norm_f = nn.Identity()  # the maps are read before it: in DDP it would wait for a gradient

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, channels, H/s, W/s] of images [B, 3, H, W], s = 4, 8, 16, 32 for 16-pixel patches."""
        padded = self._pad(x)
        stem_maps = self.encoder.patch_embed.stem_maps(padded)
        _, maps, cls = self.encoder._intermediates(padded, list(self.out_indices), None, False, stem_maps)
        detail = [] if self.detail is None else self.detail(padded, stem_maps)
        return self._levels(Look(maps, [c.squeeze(1) for c in cls], detail), *x.shape[-2:])


@MODELS.register_module()
class ScopeBackbone(_EncoderBackbone):
    """MambaScope: coarse features for images of which the gate is confident, refined ones for the others.

    With ``detail``, images that exit get that of the half-size image, refined ones that of the whole full-size image.

    In training every image exits with probability ``exit_prob``, so that the heads learn from both kinds of features.
    The gate learns in models that ask for its loss (``ScopeEncoderDecoder``, ``ScopeCascadeRCNN``); inside others it
    stays untrained and ``threshold`` should be 0 or 1.

    Args:
        arch: ``mambascope_tiny_patch16_224`` and so on, as :class:`VimBackbone`.
        gate: Arguments of :class:`~mambascope.mm.gate.GateHead` without the width, ``num_classes`` at least; ``None``
            for no gate.
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
            for own in maps:
                nn.init.zeros_(own.weight)
            self.coarse_up = nn.ModuleList(maps)
        if not 0 <= exit_prob <= 1:
            raise ValueError(f"exit_prob must lie in [0, 1], got {exit_prob!r}")
        self.gate = None if gate is None else GateHead(self.encoder.embed_dim, **gate)
        self.threshold = check_threshold(threshold)
        self.exit_prob = exit_prob

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, channels, H/s, W/s] of images [B, 3, H, W], s = 4, 8, 16, 32 for 16-pixel patches."""
        return self.forward_scope(x).maps

    def _decide(self, x: Tensor, confidence: Tensor | None, cells: int) -> Tensor:
        """Which images [B] exit."""
        everything = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        if num_selected(self.encoder.alpha, cells) == 0:
            return everything  # alpha = 0 is the coarse model alone
        if self.training:
            return torch.rand(x.shape[0], device=x.device) < self.exit_prob
        threshold = check_threshold(self.threshold)
        if confidence is not None:
            return exit_mask(confidence, threshold)
        if 0 < threshold < 1:
            raise ValueError(f"threshold must be 0 or 1 in a backbone without a gate, got {threshold:g}")
        return everything if threshold <= 0 else ~everything

    def forward_scope(self, x: Tensor) -> ScopeFeatures:
        """Features of images [B, 3, H, W] with what was decided on the way; the fine pass reads refined images only."""
        height, width = x.shape[-2:]
        x = self._pad(x)
        half = self.encoder.half_image(x)
        stem_maps = self.encoder.patch_embed.stem_maps(half)
        coarse = self.encoder.forward_half(half, self.out_indices, stem_maps)
        logits = confidence = None
        if self.gate is not None:
            logits = self.gate(coarse.cls)
            confidence = self.gate.sureness(logits)
        batch, cells = coarse.importance.shape
        exited = self._decide(x, confidence, cells)
        selected = torch.full((batch, num_selected(self.encoder.alpha, cells)), -1, dtype=torch.long, device=x.device)
        refined = exited.logical_not().nonzero().squeeze(1)
        if refined.numel() == batch:
            look, selected = self._fine_look(x, coarse)
        elif refined.numel() == 0:
            look = self._coarse_look(coarse, half, stem_maps)
            if self.training:
                look.maps[0] = look.maps[0] + _zero(self._fine_parameters(), look.maps[0])
        else:
            stayed = exited.nonzero().squeeze(1)
            fine, cells_read = self._fine_look(x.index_select(0, refined), coarse.index_select(refined))
            selected = selected.index_copy(0, refined, cells_read)
            own = [] if self.detail is None else [m.index_select(0, stayed) for m in stem_maps]
            kept = self._coarse_look(coarse.index_select(stayed), half.index_select(0, stayed), own)
            look = kept.joined(fine, torch.cat([stayed, refined]).argsort())
        levels = self._levels(look, height, width)
        return ScopeFeatures(levels, logits, confidence, exited, coarse.importance, selected, coarse.grid)

    def _coarse_grids(self, coarse: CoarseState) -> list[Tensor]:
        """Coarse tokens as maps [B, d, h/2, w/2]."""
        position = self.encoder.config.cls_position
        return [remove_cls(t, position).transpose(1, 2).unflatten(2, coarse.grid) for t in coarse.taken]

    def _with_places(self, maps: list[Tensor], grids: Sequence[Tensor]) -> list[Tensor]:
        """Adds to maps [B, d, h, w] what the coarse tokens say about each of their four places, if that is learned."""
        if self.coarse_up is None:
            return maps
        return [m + up(grid) for m, up, grid in zip(maps, self.coarse_up, grids, strict=True)]

    def _coarse_look(self, coarse: CoarseState, half: Tensor, stem_maps: Sequence[Tensor]) -> Look:
        """Coarse tokens resized to the fine grid, with the detail of the half-size image."""
        grids = self._coarse_grids(coarse)
        at = cls_index(coarse.tokens.shape[1], self.encoder.config.cls_position)
        maps = self._with_places([double(g) for g in grids], grids)
        detail = [] if self.detail is None else self.detail.forward_half(half, stem_maps)
        return Look(maps, [t[:, at] for t in coarse.taken], detail)

    def _fine_look(self, x: Tensor, coarse: CoarseState) -> tuple[Look, Tensor]:
        """Fine tokens on the fine grid, with the detail of the whole image; and the cells re-read [B, k]."""
        stem_maps = self.encoder.patch_embed.stem_maps(x)
        fine = self.encoder.forward_fine(x, coarse, take=self.out_indices, stem_maps=stem_maps)
        at = cls_index(fine.length - 1, self.encoder.config.fine_cls)
        maps = [self.encoder.fine_map(t, fine, coarse.grid) for t in fine.taken]
        maps = self._with_places(maps, self._coarse_grids(coarse))
        detail = [] if self.detail is None else self.detail(x, stem_maps)
        return Look(maps, [t[:, at] for t in fine.taken], detail), fine.selected

    def _fine_parameters(self) -> list[Tensor]:
        """What only the fine pass uses."""
        reuse = [] if self.encoder.reuse is None else self.encoder.reuse.parameters()
        return [self.encoder.pos_embed, *reuse, *([] if self.detail is None else self.detail.full_parameters())]

    def cost(self, height: int, width: int, convention: str = "both_directions") -> tuple[float, float]:
        """As for :class:`VimBackbone`, with the learned resize."""
        exits, refined = super().cost(height, width, convention)
        if self.coarse_up is None:
            return exits, refined
        cell = 2 * self.encoder.config.patch_size
        places = 4 * -(-height // cell) * -(-width // cell) * self.encoder.embed_dim**2 / 1e9  # of one learned map
        return exits + len(STEPS) * places, refined + len(STEPS) * places

    def image_gflops(self, features: ScopeFeatures, height: int, width: int) -> dict[str, list[float]]:
        """Backbone GFLOPs of every image of a batch, per convention of :meth:`cost`."""
        left = features.exited.tolist()
        both = {c: self.cost(height, width, c) for c in ("one_direction", "both_directions")}
        return {c: [cost[0] if out else cost[1] for out in left] for c, cost in both.items()}


def _zero(parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    """Zero that depends on parameters a batch did not need: DDP wants a gradient for every one in every step."""
    return sum((0.0 * p.sum() for p in parameters), like.new_zeros(()))


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
