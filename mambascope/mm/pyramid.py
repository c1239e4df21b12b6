"""Simple feature pyramid: maps of one stride become maps at four (MambaScope Appendix A, as in ViTDet and BEiT)."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# finest level first: how the patch grid is brought to 1/4, 1/2, 1 and 2 times the patch side
STEPS = (4, 2, 1, 0.5)


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
        own = (nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in STEPS)
        self.readout = nn.ModuleList(own) if readout else None
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
        self, maps: Sequence[Tensor], cls: Sequence[Tensor] | None = None, detail: Tensor | None = None
    ) -> list[Tensor]:
        """Brings four maps [B, d, h, w] to [B, out, 4h, 4w], [B, out, 2h, 2w], [B, out, h, w], [B, out, h/2, w/2].

        Args:
            maps: One for each level.
            cls: The CLS outputs [B, d] of the same blocks; needed with ``readout``.
            detail: A map [B, d, h, w] that is added to every one of them.
        """
        levels = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        if self.readout is not None:
            assert cls is not None
            levels = [m + read(c)[..., None, None] for m, read, c in zip(levels, self.readout, cls, strict=True)]
        if detail is not None:
            levels = [m + detail for m in levels]
        return [scale(m) for scale, m in zip(self.scales, levels, strict=True)]

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


class PatchDetail(nn.Sequential):
    """The pixels of every patch as a map of their own beside the encoder's: what an edge needs and a class does not.

    A trained classifier's patch embedding and blocks keep what tells its classes apart; masks and boxes
    need the rest too.

    Args:
        in_chans: Channels of the image.
        patch_size: Side of a patch in pixels.
        dim: Channels d of the map.
    """

    def __init__(self, in_chans: int, patch_size: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, patch_size, patch_size), LayerNorm2d(dim))
        self.patch_macs = in_chans * patch_size**2 * dim

    def macs(self, rows: int, cols: int) -> int:
        """Multiply-adds of one image with a grid of ``rows`` x ``cols`` patches."""
        return rows * cols * self.patch_macs
