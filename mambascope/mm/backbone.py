"""Vim as an OpenMMLab backbone, and what MambaScope's shares with it (MambaScope section 5.2 and Appendix A).

Shape letters: B batch, C gate classes, d model width, h x w patch grid, M coarse cells, k selected cells. Registered in
mmengine's root registry, so one class serves mmseg and mmdet.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mambascope.mm.canvas import (
    Group,
    Look,
    Size,
    batch_order,
    check_sizes,
    cover,
    erase_padding,
    group_images,
    join_looks,
)
from mambascope.mm.pyramid import STEPS, ImageDetail, SimplePyramid
from mambascope.mm.weights import pretrained_options, read_weights, start_backbone
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.configs import VIM_CONFIGS, VimConfig, with_overrides
from mambascope.models.cost import stage_macs
from mambascope.models.description import shortened
from mambascope.models.meaning import MEANING, differences
from mambascope.models.registry import feature_blocks
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba


class EncoderBackbone(BaseModule):
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
        if config.depth < len(STEPS):
            raise ValueError(f"depth must be at least {len(STEPS)} for {len(STEPS)} feature maps, got {config.depth}")
        indices = feature_blocks(config.depth) if out_indices is None else tuple(out_indices)
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
            self.detail = ImageDetail(config.in_chans, config.patch_size, channels, stem or 32, separate_stem=not stem)
        self.strides = tuple(config.patch_size / step for step in STEPS)
        self._freeze()

    # ---- weights -------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Loads what ``init_cfg`` names, in mmengine's spelling, and logs a report.

        ``dict(type='Pretrained', checkpoint=..., prefix=None, strict=True)``: the checkpoint is one of our
        ``.safetensors``, a Lightning ``.ckpt``, a ``.pth`` of an official Vim, a segmentor or a detector, a URL of one
        of these, or the name of weights that come with the package (``scopedigits``, ``scopedigits_dense``).
        ``prefix`` (``"backbone."``) says where in the file the weights are; wrappers that are known need none. Position
        tables are resampled. Of a segmentor or detector the gate, the pyramid and what else fits is taken too.
        With ``strict=False`` the encoder also takes what fits, and the rest is reported.

        An empty checkpoint means random weights, with a warning: so that configs can leave the place to be filled in.
        All modules initialise themselves when they are made, so without ``init_cfg`` there is nothing to do.

        Raises:
            ValueError: If the file cannot be read or belongs to another architecture, or ``init_cfg`` is of another
                type.
        """
        if self.init_cfg is None:
            return
        options = pretrained_options(self.init_cfg)
        checkpoint, strict = options.get("checkpoint"), options.get("strict", True)
        if not checkpoint:
            print_log(
                f"{type(self).__name__} starts from random weights; give a file with "
                "--cfg-options model.backbone.init_cfg.checkpoint=FILE",
                logger="current",
                level=logging.WARNING,
            )
            return
        source = read_weights(checkpoint, options.get("prefix"))
        self._check_description(source.name, source.description.get("config", {}), strict)
        report = start_backbone(self, source, strict)
        print_log(f"{type(self).__name__} starts from {source.name}\n{report}", logger="current")
        self._is_init = True

    def _check_description(self, path: str, config: Mapping[str, Any], strict: bool) -> None:
        names = ("embed_dim", "depth", "d_state", "d_conv", "expand", *MEANING)
        mismatches = differences(config, asdict(self.encoder.config), names)
        if mismatches:
            texts = [f"{m.argument} (here {shortened(m.model)})" for m in mismatches]
            line = (
                f"checkpoint {path} belongs to another architecture than {self.arch}: it has {', '.join(texts)}; "
                "change arch or arch_options of the backbone"
            )
            if strict:
                raise CheckpointError(line)
            print_log(line, logger="current", level=logging.WARNING)

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

    def train(self, mode: bool = True) -> EncoderBackbone:
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

    @property
    def cell(self) -> int:
        """Side of a coarse cell in pixels."""
        return 2 * self.encoder.config.patch_size

    def _groups(self, x: Tensor, sizes: Sequence[Sequence[int]] | None) -> tuple[list[Group], list[Size]]:
        """The images without padding, those of one grid together, and their checked sizes."""
        self.encoder.check_images(x)
        image_sizes = check_sizes(x, sizes)
        return group_images(x, image_sizes, self.cell), image_sizes

    def _levels(
        self, looks: Sequence[Look], groups: Sequence[Group], canvas: Size, sizes: Sequence[Size]
    ) -> tuple[Tensor, ...]:
        """The pyramid on a whole canvas, without what only covers padding.

        Once for all groups: processes that see different numbers of them would wait for each other in a ``SyncBN``.
        """
        rows, cols = cover(canvas, self.cell)
        look = join_looks([look.on_canvas((2 * rows, 2 * cols)) for look in looks], batch_order(groups))
        levels = []
        for level, stride in zip(self.pyramid(*look), self.strides, strict=True):
            height, width = cover(canvas, stride)
            cropped = level[..., :height, :width]
            levels.append(erase_padding(cropped, [cover(size, stride) for size in sizes]).contiguous())
        if self.training:
            # exits, grids and out_indices decide what a batch uses
            zero = _zero(self.parameters())
            levels = [level + zero for level in levels]
        return tuple(levels)

    def cost(self, height: int, width: int, convention: str = "both_directions") -> tuple[float, float]:
        """GFLOPs (multiply-adds / 1e9) of one image for the backbone, pyramid included.

        Args:
            height, width: Of the image in pixels.
            convention: ``both_directions`` (what is computed) or ``one_direction`` (as published).

        Returns:
            For an image that exits and for one that is refined; the same figure twice for a plain Vim.
        """
        config = self.encoder.config
        rows, cols = cover((height, width), self.cell)
        size = (rows * self.cell, cols * self.cell)
        alpha: dict[str, Any] = {"alpha": self.encoder.alpha} if isinstance(self.encoder, MambaScope) else {}
        cost = stage_macs(config, size, convention=convention, **alpha)
        pyramid = self.pyramid.macs(2 * rows, 2 * cols)
        detail = half = 0
        if self.detail is not None:
            detail, half = (self.detail.macs(2 * rows, 2 * cols, half=h) for h in (False, True))
        exits = cost.coarse + half if alpha else cost.fine + detail
        return (exits + pyramid) / 1e9, (cost.refined + pyramid + detail) / 1e9


@MODELS.register_module()
class VimBackbone(EncoderBackbone):
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
    ignored = ("head.", "reuse.", "pos_embed_coarse", "coarse_offsets.", "norm_f.")

    def __init__(self, arch: str = "", **kwargs: Any) -> None:
        super().__init__(arch, **kwargs)
        self.encoder.norm_f = nn.Identity()  # the maps are read before it: in DDP it would wait for a gradient

    def forward(self, x: Tensor, sizes: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, ...]:
        """Maps [B, channels, H/s, W/s] of images [B, 3, H, W], s = 4, 8, 16, 32 for 16-pixel patches.

        Args:
            x: The images, each at the top left.
            sizes: Height and width of each image in pixels; what lies outside is padding, which is not read, and where
                the maps are zero. ``None`` if there is none.
        """
        groups, image_sizes = self._groups(x, sizes)
        return self._levels(
            [self._look(group.images) for group in groups], groups, (x.shape[-2], x.shape[-1]), image_sizes
        )

    def _look(self, x: Tensor) -> Look:
        _, maps, cls, stem_maps = self.encoder._intermediates(x, list(self.out_indices), None, False)
        detail = [] if self.detail is None else self.detail(x, stem_maps)
        return Look(maps, [c.squeeze(1) for c in cls], detail)


def _zero(parameters: Iterable[Tensor]) -> Tensor | float:
    """Zero that depends on all parameters: DDP wants a gradient for every one in every step."""
    first = [p.flatten()[:1] for p in parameters if p.requires_grad]
    return 0.0 * torch.cat(first).sum() if first else 0.0
