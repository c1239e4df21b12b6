"""Simple feature pyramid: maps of one stride become maps at four (MambaScope Appendix A, as in ViTDet and BEiT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mambascope.layers import ConvStem, conv_half, stem_convs
from mambascope.models.cost import stem_macs

# finest level first: how the patch grid is brought to 1/4, 1/2, 1 and 2 times the patch side
STEPS = (4, 2, 1, 0.5)


def double(x: Tensor) -> Tensor:
    """A map [B, d, h, w] resized to [B, d, 2h, 2w]."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _norm(dim: int, norm_cfg: dict | None) -> nn.Module:
    return LayerNorm2d(dim) if norm_cfg is None else build_norm_layer(norm_cfg, dim)[1]


class SimplePyramid(nn.Module):
    """Four maps of one stride s in, maps at strides s/4, s/2, s and 2s out.

    Each input is normalised first: the residual stream's scale grows from block to block.

    Args:
        dim: Channels d of the inputs.
        out_channels: Channels of every output; ``None`` for d.
        norm_cfg: Normalisation between the two transposed convolutions, as OpenMMLab writes it; ``None`` for LayerNorm.
        readout: Whether the CLS outputs are projected and added to every position of their maps (DPT's readout).
    """

    def __init__(
        self, dim: int, out_channels: int | None = None, norm_cfg: dict | None = None, readout: bool = False
    ) -> None:
        super().__init__()
        self.readout = (
            nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in STEPS) if readout else None
        )
        self.dim = dim
        self.norms = nn.ModuleList(LayerNorm2d(dim) for _ in STEPS)
        up = [nn.ConvTranspose2d(dim, dim, 2, 2) for _ in range(3)]
        scales = [
            nn.Sequential(up[0], _norm(dim, norm_cfg), nn.GELU(), up[1]),
            up[2],
            nn.Identity(),
            nn.MaxPool2d(2, 2),
        ]
        if out_channels is not None and out_channels != dim:
            scales = [nn.Sequential(scale, nn.Conv2d(dim, out_channels, 1)) for scale in scales]
        self.scales = nn.ModuleList(scales)
        self.out_channels = out_channels or dim

    def forward(
        self, maps: Sequence[Tensor], cls: Sequence[Tensor] | None = None, detail: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Brings four maps [B, d, h, w] to [B, out, 4h, 4w], [B, out, 2h, 2w], [B, out, h, w], [B, out, h/2, w/2].

        Args:
            maps: One for each level.
            cls: The CLS outputs [B, d] of the same blocks; needed with ``readout``.
            detail: Maps of the outputs' shapes that are added to them; none or four.
        """
        levels = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        if self.readout is not None:
            assert cls is not None
            levels = [m + read(c)[..., None, None] for m, read, c in zip(levels, self.readout, cls, strict=True)]
        levels = [scale(m) for scale, m in zip(self.scales, levels, strict=True)]
        return [m + d for m, d in zip(levels, detail, strict=True)] if detail else levels

    def macs(self, rows: int, cols: int) -> int:
        """Multiply-adds of one image with a grid of ``rows`` x ``cols`` patches."""
        dim = self.dim
        cells = rows * cols
        total = (4 + 16 + 4) * cells * dim * dim  # two steps to the finest level, one to the next
        if self.out_channels != dim:
            total += (16 + 4 + 1) * cells * dim * self.out_channels
            total += (rows // 2) * (cols // 2) * dim * self.out_channels
        if self.readout is not None:
            total += len(STEPS) * dim * dim
        return total


class ImageDetail(nn.Module):
    """Convolutions of the image at the pyramid's strides, which are added to its levels.

    A classifier's linear patch embedding keeps what tells its classes apart, and its tokens come one for a whole patch;
    masks and boxes need more. The maps are those of a :class:`~mambascope.layers.stem.ConvStem` and one level more: of
    the encoder's stem, which has learned from a classifier's images, or, where it has none, of a separate one.

    Args:
        in_chans: Channels of the image.
        patch_size: Side P of a patch in pixels, a power of two and at least 8.
        out_channels: Channels of the maps.
        width: Channels at the finest stride; the others have twice as many.
        separate_stem: Whether the convolutions are made here; if not, their maps have to be given.

    Raises:
        ValueError: If the patch size of a separate stem is another.
    """

    def __init__(
        self, in_chans: int, patch_size: int, out_channels: int, width: int = 32, separate_stem: bool = True
    ) -> None:
        super().__init__()
        self.width = width
        self.stem_macs = stem_macs(stem_convs(in_chans, patch_size, width), patch_size) if separate_stem else 0
        self.stem = ConvStem(in_chans, patch_size, width) if separate_stem else None
        self.last = conv_half(2 * width, 2 * width)
        channels = (width, *[2 * width] * (len(STEPS) - 1))
        self.outs: Any = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)

    def forward(self, x: Tensor, stem_maps: Sequence[Tensor] = ()) -> list[Tensor]:
        """Maps [B, out, H/s, W/s] of images [B, C, H, W], s = P/4, P/2, P and 2P; sides are multiples of 2P.

        Args:
            x: The images.
            stem_maps: What the encoder's stem makes of them, where it has one.
        """
        levels = self._stem_maps(x, stem_maps)
        return self._project([*levels, self.last(levels[-1])])

    def forward_half(self, half: Tensor, stem_maps: Sequence[Tensor] = ()) -> list[Tensor]:
        """The same maps from the half-size image [B, C, H/2, W/2]: each is one level finer there, the first resized."""
        levels = self._project(self._stem_maps(half, stem_maps))
        return [double(levels[0]), *levels]

    def _stem_maps(self, x: Tensor, stem_maps: Sequence[Tensor]) -> Sequence[Tensor]:
        return stem_maps if self.stem is None else self.stem(x)

    def _project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        # the half-size image has no fourth level
        return [out(m) for out, m in zip(self.outs, maps, strict=False)]

    def macs(self, rows: int, cols: int, half: bool = False) -> int:
        """Multiply-adds of one image of ``rows`` x ``cols`` patches; with ``half`` of its half-size image's maps.

        Without those of the encoder's stem.
        """
        patches = rows * cols // 4 if half else rows * cols
        fine, wide = (out.weight.numel() for out in (self.outs[0], self.outs[-1]))
        total = patches * (self.stem_macs + 16 * fine + (4 + 1) * wide)
        if not half:
            total += patches // 4 * (wide + 9 * self.width**2 * 4)
        return total
