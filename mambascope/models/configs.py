"""Sizes and options of every model: the single source that timm entries, Lightning YAML and OpenMMLab configs use."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from mambascope.layers.pos_embed import CLS_POSITIONS
from mambascope.layers.reuse import REUSE_KINDS
from mambascope.layers.stem import stem_convs
from mambascope.models.gate import GATES, check_threshold
from mambascope.models.retired import without_retired
from mambascope.models.scores import SCORES, Score
from mambascope.ops import check_backend
from mambascope.utils import as_number, check_choice, check_positive, share

GLOBAL_POOLS = ("token", "avg", "lse", "")
CELL_ORDERS = ("cell", "raster")
FINE_ORDERS = ("important_first", "important_last")
COARSE_POSITIONS = ("own", "resampled")


@dataclass(frozen=True)
class VimConfig:
    """Vision Mamba (Vim, arXiv 2401.09417).

    Attributes:
        img_size: Image side in pixels, or (height, width), for which the position table is made. Other sizes work too.
        patch_size: Side of a patch in pixels.
        stride: Distance between patches in pixels; ``None`` means ``patch_size``.
        in_chans: Image channels.
        num_classes: Classes of the head; 0 for none.
        embed_dim: Model width d.
        depth: Number of blocks.
        d_state: SSM states N per channel.
        d_conv: Width of the causal convolution.
        expand: Inner width E as a multiple of d.
        dt_rank: Rank of the step-size projection; ``None`` means ``ceil(d / 16)``.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; earlier blocks rise to it linearly.
        norm_eps: Epsilon of the RMSNorms.
        cls_position: Place of the CLS token among the patches: ``first``, ``middle`` or ``last``.
        global_pool: What the head reads: the CLS ``token``, the ``avg`` of all tokens, ``lse`` for CLS and every patch,
            whose logits are pooled by log-mean-exp and added (weakly supervised localisation, arXiv 1411.6228): the
            patches then learn to name what they show, as dense models want it; or ``""`` for no pooling.
        scan_backend: Scan backend by name; ``None`` for the automatic choice.
        stem_width: Channels w of a convolutional stem beside the linear patch embedding (after arXiv 2106.14881): maps
            at a quarter, half and the whole of the patches' stride with w, 2 w and 2 w channels; the last is projected
            and added to the patches. What is smaller than a patch is then not lost, and dense models read the finer
            maps too; MambaScope's second look runs it on the whole image. For patches of 8, 16, 32, ... pixels without
            overlap; 0 for none, as published.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int | None = None
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-5
    cls_position: str = "middle"
    global_pool: str = "token"
    scan_backend: str | None = None
    stem_width: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))
        sizes = self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)
        if len(sizes) != 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
            raise ValueError(f"img_size must be a positive integer or (height, width), got {self.img_size!r}")
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "d_state", "d_conv", "expand"):
            check_positive(name, getattr(self, name))
        for name in ("stride", "dt_rank"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.stride is not None and self.stride > self.patch_size:
            raise ValueError(f"stride must not exceed patch_size {self.patch_size}, got {self.stride}")
        if not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0, got {self.num_classes!r}")
        for name in ("drop_rate", "drop_path_rate"):
            # as plain floats: NumPy's are no JSON
            object.__setattr__(self, name, share(name, getattr(self, name), below_one=True))
        self._check_stem()
        eps = as_number(self.norm_eps)
        if eps is None or not 0 < eps < math.inf:
            raise ValueError(f"norm_eps must be a positive number, got {self.norm_eps!r}")
        object.__setattr__(self, "norm_eps", eps)
        try:
            check_backend(self.scan_backend)
        except ValueError as error:
            raise ValueError(f"scan_{error}") from None
        check_choice("cls_position", self.cls_position, CLS_POSITIONS)
        check_choice("global_pool", self.global_pool, GLOBAL_POOLS)

    def _check_stem(self) -> None:
        if not isinstance(self.stem_width, int) or isinstance(self.stem_width, bool) or self.stem_width < 0:
            raise ValueError(f"stem_width must be an integer >= 0, got {self.stem_width!r}")
        if self.stem_width:
            _ = self.stem_convs  # checks the patch size
            if self.patch_stride != self.patch_size:
                raise ValueError(f"stride must equal patch_size, {self.patch_size}, with a stem, got {self.stride}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def patch_stride(self) -> int:
        """Distance between patches in pixels."""
        return self.stride or self.patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of the configured size, padded at the right and bottom if need be."""
        rows, cols = (1 + max(0, math.ceil((side - self.patch_size) / self.patch_stride)) for side in self.image_hw)
        return rows, cols

    @property
    def stem_convs(self) -> list[tuple[int, int, int]]:
        """Stride in the image, input and output channels of the stem's convolutions; none without a stem."""
        return stem_convs(self.in_chans, self.patch_size, self.stem_width) if self.stem_width else []

    @property
    def inner_dim(self) -> int:
        """Inner width E."""
        return self.expand * self.embed_dim

    @property
    def rank(self) -> int:
        """Rank R of the step-size projection."""
        return self.dt_rank or math.ceil(self.embed_dim / 16)


@dataclass(frozen=True)
class ScopeConfig(VimConfig):
    """MambaScope (arXiv 2512.00647): the Vim encoder read twice, coarse first.

    Attributes:
        alpha: Share of coarse cells that the fine stage re-reads (section 3.3). 0 is the coarse model alone.
        beta: Momentum of the importance average over layers (eq. 12, Table 6).
        threshold: Confidence eta at which the coarse answer is accepted. ``<= 0`` always, ``>= 1`` never.
        gate: What says how sure the coarse answer is: a name in :data:`mambascope.models.gate.GATES`. ``max``: the
            largest class probability.
        score_metric: Token importance: a name in :data:`mambascope.models.scores.SCORES`. ``max``, ``l2``, ``mean``,
            ``clip``, ``softplus`` and ``topk`` are the paper's (Table 4).
        score_topk: Channels averaged by ``topk``.
        score_layers: From how many of the last layers every second one takes part; ``None``: half of all (Table 6).
        fine_cls: Place of the CLS token in the fine sequence (Table 7).
        fine_order: ``important_first`` or ``important_last`` (Table 7).
        cell_order: Fine tokens ``cell`` by cell, or in ``raster`` order over the image.
        reuse: Feature reuse by ``mlp``, ``linear`` or ``off`` (Figure 5).
        reuse_ratio: Hidden width of the reuse MLP as a multiple of d.
        reuse_cls: Whether the coarse CLS output is reused too (Figure 5).
        coarse_pos: Position table of the coarse grid: its ``own``, or the fine one ``resampled``.
        coarse_offsets: Whether the coarse look has norm gains, step-size biases, CLS and D of its own, as offsets to
            the shared ones (ours, after arXiv 2007.09558).
        coarse_weight: Share of the coarse log-probabilities that is added to the fine ones where both looks were taken
            (ours). 0: the fine answer alone, as published.
    """

    alpha: float = 0.7
    beta: float = 0.99
    threshold: float = 0.8
    gate: str = "max"
    score_metric: str = "max"
    score_topk: int = 16
    score_layers: int | None = None
    fine_cls: str = "first"
    fine_order: str = "important_first"
    cell_order: str = "cell"
    reuse: str = "mlp"
    reuse_ratio: float = 4.0
    reuse_cls: bool = False
    coarse_pos: str = "own"
    coarse_offsets: bool = False
    coarse_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride not in (None, self.patch_size):
            raise ValueError(
                f"stride must equal patch_size {self.patch_size} in MambaScope (a cell owns four patches), "
                f"got {self.stride}"
            )
        object.__setattr__(self, "alpha", share("alpha", self.alpha))
        object.__setattr__(self, "beta", share("beta", self.beta, below_one=True))
        object.__setattr__(self, "threshold", check_threshold(self.threshold))
        for name, entries in (("gate", GATES), ("score_metric", SCORES)):
            if getattr(self, name) not in entries:
                raise ValueError(f"{name} must be one of {', '.join(entries)}, got {getattr(self, name)!r}")
        check_positive("score_topk", self.score_topk)
        if self.score_layers is not None:
            check_positive("score_layers", self.score_layers)
            if self.score_layers > self.depth:
                raise ValueError(f"score_layers must lie in 1..{self.depth} (the depth), got {self.score_layers}")
        check_choice("fine_cls", self.fine_cls, CLS_POSITIONS)
        check_choice("fine_order", self.fine_order, FINE_ORDERS)
        check_choice("cell_order", self.cell_order, CELL_ORDERS)
        if self.reuse is False:  # how YAML reads "off"
            object.__setattr__(self, "reuse", "off")
        check_choice("reuse", self.reuse, REUSE_KINDS)
        check_choice("coarse_pos", self.coarse_pos, COARSE_POSITIONS)
        ratio = as_number(self.reuse_ratio)
        if ratio is None or not 0 < ratio < math.inf:
            raise ValueError(f"reuse_ratio must be a positive number, got {self.reuse_ratio!r}")
        for name in ("reuse_cls", "coarse_offsets"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        weight = as_number(self.coarse_weight)
        if weight is None or not 0 <= weight < math.inf:
            raise ValueError(f"coarse_weight must be a number >= 0, got {self.coarse_weight!r}")
        object.__setattr__(self, "coarse_weight", weight)
        if self.reuse_cls and self.reuse == "off":
            raise ValueError("reuse_cls needs reuse to be 'mlp' or 'linear', got reuse='off'")

    @property
    def score(self) -> Score:
        """The token score."""
        return SCORES[self.score_metric]

    @property
    def taking_part(self) -> tuple[int, ...]:
        """Indices of the layers whose scores enter the importance average."""
        last = self.depth - self.depth // 2 if self.score_layers is None else self.score_layers
        return tuple(range(self.depth - last, self.depth, 2))


VIM_CONFIGS: dict[str, VimConfig] = {
    "vim_tiny_patch16_224": VimConfig(embed_dim=192),
    "vim_small_patch16_224": VimConfig(embed_dim=384),
    "vim_base_patch16_224": VimConfig(embed_dim=768),
    "vim_nano_patch8_64": VimConfig(img_size=64, patch_size=8, embed_dim=96, depth=6, num_classes=10),
    "vim_pico_patch2_28": VimConfig(img_size=28, patch_size=2, embed_dim=64, depth=4, d_state=8, num_classes=10),
}

SCOPE_CONFIGS: dict[str, ScopeConfig] = {
    name.replace("vim_", "mambascope_"): ScopeConfig(**asdict(config)) for name, config in VIM_CONFIGS.items()
}

ConfigT = TypeVar("ConfigT", bound=VimConfig)


def with_overrides(config: ConfigT, overrides: dict[str, Any]) -> ConfigT:
    """Returns ``config`` with some fields replaced.

    Raises:
        ValueError: If a key is not a field of the config, the message lists the accepted ones; or if it is one that was
            removed (:mod:`mambascope.models.retired`) and has another value than its old default.
    """
    accepted = {f.name for f in fields(config)}
    overrides = without_retired(overrides)
    unknown = sorted(set(overrides) - accepted)
    if unknown:
        raise ValueError(
            f"unknown model argument{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
            f"{type(config).__name__} accepts {', '.join(sorted(accepted))}"
        )
    return replace(config, **overrides)
