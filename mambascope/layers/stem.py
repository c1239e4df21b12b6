"""Convolutional stem: maps of an image at a quarter, half and the whole of the patches' stride."""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

STEM_LEVELS = 3
"""Maps of a stem: strides P/4, P/2 and P for patches of P pixels."""


def conv_half(channels: int, out: int) -> nn.Sequential:
    """A map [B, channels, h, w] to [B, out, h/2, w/2]: convolution 3x3 with stride 2, layer norm, GELU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), LayerNorm2d(out), nn.GELU())


def stem_convs(in_chans: int, patch_size: int, width: int) -> list[tuple[int, int, int]]:
    """Stride in the image, input and output channels of each convolution of a stem.

    Raises:
        ValueError: If the patch size is no power of two from 8 on.
    """
    if patch_size < 8 or patch_size & (patch_size - 1):
        raise ValueError(f"patch_size must be 8, 16, 32, ... with a stem or detail, got {patch_size}")
    count = patch_size.bit_length() - 1
    outs = [width] * (count - STEM_LEVELS + 1) + [2 * width] * (STEM_LEVELS - 1)
    return [(2 ** (i + 1), outs[i - 1] if i else in_chans, out) for i, out in enumerate(outs)]


class ConvStem(nn.Module):
    """Convolutions that see what a linear embedding of patches loses: edges inside patches, and what small things are.

    As early convolutions do it for transformers (arXiv 2106.14881). Where they stand beside an encoder instead, for
    dense models, they are the spatial prior module of the ViT-Adapter (arXiv 2205.08534).

    Args:
        in_chans: Channels of the image.
        patch_size: Side P of a patch in pixels, a power of two and at least 8.
        width: Channels w of the finest map; the others have 2 w.

    Raises:
        ValueError: If the patch size is another.
    """

    def __init__(self, in_chans: int, patch_size: int, width: int) -> None:
        super().__init__()
        halves = [conv_half(chans, out) for _, chans, out in stem_convs(in_chans, patch_size, width)]
        first = len(halves) - STEM_LEVELS + 1
        self.levels = nn.ModuleList([nn.Sequential(*halves[:first]), *halves[first:]])
        self.channels = (width, *[2 * width] * (STEM_LEVELS - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps [B, w, 4 h, 4 w'], [B, 2 w, 2 h, 2 w'] and [B, 2 w, h, w'] of images [B, C, P h, P w']."""
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps
