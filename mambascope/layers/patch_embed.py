"""Patch embedding: the whole image, or only the pixels of selected cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.layers.plain import embed_patches
from mambascope.layers.stem import ConvStem


def image_sides(x: Tensor) -> tuple[int, int]:
    """Height and width of images [B, C, H, W].

    Raises:
        ValueError: If there is not a single pixel.
    """
    height, width = x.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"images must have at least one pixel, got {height} x {width}")
    return height, width


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pads images [B, C, H, W] with zeros on the right and at the bottom to multiples of ``multiple`` pixels."""
    height, width = image_sides(x)
    pad_h, pad_w = -height % multiple, -width % multiple
    return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x


class PatchEmbed(nn.Module):
    """Linear embedding of square patches, with the official Vim's optional overlap or with a convolutional stem.

    Args:
        patch_size: Side of a patch in pixels.
        stride: Distance between patches; smaller than ``patch_size`` makes them overlap.
        in_chans: Image channels.
        embed_dim: Model width d.
        stem_width: Channels of a stem's finest map; its coarsest is projected and added to the tokens, which must not
            overlap then. 0 for no stem.

    Raises:
        ValueError: If a stem is asked for and the patches are of another size than it can have.
    """

    def __init__(self, patch_size: int, stride: int, in_chans: int, embed_dim: int, stem_width: int = 0) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)
        self.stem = self.stem_proj = None
        if stem_width:
            self.stem = ConvStem(in_chans, patch_size, stem_width)
            self.stem_proj = nn.Conv2d(self.stem.channels[-1], embed_dim, 1, bias=False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of this size, after padding."""
        rows, cols = (max(0, -(-(side - self.patch_size) // self.stride)) + 1 for side in (height, width))
        return rows, cols

    def pad(self, x: Tensor) -> Tensor:
        """Pads images [B, C, H, W] on the right and at the bottom so that the patches cover them."""
        rows, cols = self.grid_size(*image_sides(x))
        pad_h = (rows - 1) * self.stride + self.patch_size - x.shape[-2]
        pad_w = (cols - 1) * self.stride + self.patch_size - x.shape[-1]
        return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x

    def stem_maps(self, x: Tensor) -> list[Tensor]:
        """The maps that :class:`~mambascope.layers.stem.ConvStem` makes of images [B, C, H, W]; none without a stem."""
        return [] if self.stem is None else self.stem(self.pad(x))

    def forward(self, x: Tensor, stem_maps: list[Tensor] | None = None) -> Tensor:
        """Embeds images [B, C, H, W] as tokens [B, rows * cols, d] in raster order.

        Args:
            x: The images.
            stem_maps: What :meth:`stem_maps` makes of them, where that is known already.
        """
        tokens = self.proj(self.pad(x))
        if self.stem_proj is not None:
            tokens = tokens + self.stem_proj((self.stem_maps(x) if stem_maps is None else stem_maps)[-1])
        return tokens.flatten(2).transpose(1, 2)

    def embed_cells(self, x: Tensor, rows: Tensor, cols: Tensor, stem_maps: list[Tensor] | None = None) -> Tensor:
        """Embeds the four patches of the named 2x2-patch cells only; other pixels are read by a stem alone.

        Args:
            x: Images [B, C, H, W], H and W multiples of two patches.
            rows: Cell rows [B, k].
            cols: Cell columns [B, k].
            stem_maps: What :meth:`stem_maps` makes of the images, where that is known already.

        Returns:
            Tokens [B, k, 4, d], children in the order (0,0), (0,1), (1,0), (1,1).
        """
        tokens = embed_patches(self.proj, _cells(x, self.patch_size, rows, cols), self.patch_size)
        if self.stem_proj is None:
            return tokens
        coarsest = (self.stem_maps(x) if stem_maps is None else stem_maps)[-1]
        return tokens + embed_patches(self.stem_proj, _cells(coarsest, 1, rows, cols), 1)


def _cells(x: Tensor, side: int, rows: Tensor, cols: Tensor) -> Tensor:
    """What lies in the named 2x2-patch cells of maps [B, C, h, w] with patches of ``side``: [B, k, 4, C * side**2]."""
    batch, chans, height, width = x.shape
    p = side
    # [B, cell rows, cell cols, child row, child col, C, p, p] as a view: indexing copies the selected pixels alone
    view = x.view(batch, chans, height // (2 * p), 2, p, width // (2 * p), 2, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    index = torch.arange(batch, device=rows.device).unsqueeze(1)
    return view[index, rows, cols].flatten(5).flatten(2, 3).flatten(3)
