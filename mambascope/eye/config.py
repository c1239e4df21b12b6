"""Sizes and options of MambaEye."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambascope.ops import check_backend
from mambascope.utils import as_number


@dataclass(frozen=True)
class MambaEyeConfig:
    """MambaEye (arXiv 2511.19963): a causal Mamba-2 encoder that reads an image glimpse by glimpse.

    Attributes:
        patch_size: Side of a glimpse in pixels.
        in_chans: Image channels.
        num_classes: Classes of the head; 0 for none.
        embed_dim: Model width.
        move_dim: Width of the move embedding per axis; even.
        depth: Number of blocks.
        d_state: SSM states N per head.
        d_conv: Width of the causal convolution.
        expand: Inner width as a multiple of ``embed_dim``.
        head_dim: Width of a head; it divides the inner width.
        drop_rate: Dropout after the input projection and of every block's output.
        drop_path_rate: Stochastic depth of the last block; earlier blocks rise to it linearly.
        norm_eps: Epsilon of the RMSNorms.
        chunk_size: Tokens per chunk of the scan; changes speed, not results.
        scan_backend: Scan backend by name; ``None`` for the automatic choice.
    """

    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 256
    move_dim: int = 256
    depth: int = 12
    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 64
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-5
    chunk_size: int = 64
    scan_backend: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "patch_size", "in_chans", "embed_dim", "move_dim", "depth", "d_state", "d_conv", "expand", "head_dim",
            "chunk_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0, got {self.num_classes!r}")
        if self.move_dim % 2:
            raise ValueError(f"move_dim must be even (sines and cosines), got {self.move_dim}")
        if self.inner_dim % self.head_dim:
            raise ValueError(
                f"head_dim must divide the inner width {self.inner_dim} (expand * embed_dim), got {self.head_dim}"
            )
        for name in ("drop_rate", "drop_path_rate"):
            rate = as_number(getattr(self, name))
            if rate is None or not 0 <= rate < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")
        eps = as_number(self.norm_eps)
        if eps is None or not 0 < eps < math.inf:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps!r}")
        try:
            check_backend(self.scan_backend)
        except ValueError as error:
            raise ValueError(f"scan_{error}") from None

    @property
    def inner_dim(self) -> int:
        """Inner width."""
        return self.expand * self.embed_dim

    @property
    def patch_dim(self) -> int:
        """Values of a glimpse's pixels."""
        return self.in_chans * self.patch_size**2

    @property
    def input_dim(self) -> int:
        """Values of one input vector: pixels, then the move embedding."""
        return self.patch_dim + 2 * self.move_dim


MAMBAEYE_CONFIGS: dict[str, MambaEyeConfig] = {
    "mambaeye_tiny": MambaEyeConfig(depth=12),
    "mambaeye_small": MambaEyeConfig(depth=24),
    "mambaeye_base": MambaEyeConfig(depth=48),
    "mambaeye_nano_patch16": MambaEyeConfig(
        num_classes=10, embed_dim=96, move_dim=32, depth=4, d_state=32, head_dim=32
    ),
}
