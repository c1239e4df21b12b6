"""Closed-form cost of Vim and MambaScope: parameters and multiply-adds per stage.

Symbols: d ``embed_dim``, E = ``expand``·d inner width, N ``d_state``, R ``dt_rank``, K ``d_conv``, L tokens with CLS.
Multiply-adds per token and layer::

    d·2E + E·d                                 in_proj and out_proj
    K·E + E·(R+2N) + R·E + 9·E·N + 2·E         per scan direction: conv, x_proj, dt_proj, scan, D term and gate

plus ``in_chans·patch²·d`` for every patch that is embedded, and with a stem its convolutions and ``2·w·d`` per patch.
The published fine stage embeds every patch of the full-size image and projects every coarse output, also those of cells
it then leaves out; so does this count. The model in this package skips them: :func:`skipped_macs` says how much that
saves (about 1 %). A stem's convolutions read the whole image in both. Left out, as in the published tables: classifier
head (also where it reads every patch, ``global_pool="lse"``: :func:`head_macs`; but not where a score asks it about
every cell), norms, activations, residual
additions, position tables, resizing and ranking the cells.

Two conventions, both in GFLOPs = multiply-adds / 1e9 as the field writes it:

- ``one_direction`` counts a single scan direction. It reproduces the published tables.
- ``both_directions`` counts what a bidirectional block really does. It is the honest figure.

``python -m mambascope.commands.cost MODEL`` prints the table for one model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, singledispatch

import torch

from mambascope.models.architectures import architecture_of
from mambascope.models.cells import num_selected
from mambascope.models.configs import ScopeConfig, VimConfig, with_overrides

CONVENTIONS = ("one_direction", "both_directions")


@dataclass(frozen=True)
class StageCost:
    """Multiply-adds of one image, split by stage.

    A plain Vim has one stage: it is held in ``fine``; ``coarse`` and ``reuse`` are 0.

    Attributes:
        convention: ``"one_direction"`` or ``"both_directions"``.
        params: Learned parameters of the whole model.
        tokens_coarse, tokens_fine: Sequence lengths including CLS (``tokens_coarse`` 0 for a plain Vim; before anything
            is reduced).
        coarse, reuse, fine: Multiply-adds of the coarse pass, the feature-reuse projection and the fine pass.
    """

    convention: str
    params: int
    tokens_coarse: int
    tokens_fine: int
    coarse: int
    reuse: int
    fine: int

    @property
    def refined(self) -> int:
        """Multiply-adds of an image that goes through both stages."""
        return self.coarse + self.reuse + self.fine

    def expected(self, share: float) -> float:
        """Mean multiply-adds per image when `share` of the images (0 to 1) is refined."""
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1], got {share!r}")
        return self.coarse + share * (self.reuse + self.fine)

    def gflops(self, share: float = 1.0) -> float:
        """:meth:`expected` in GFLOPs (multiply-adds / 1e9)."""
        return self.expected(share) / 1e9


def _hw(config: VimConfig, img_size: int | Sequence[int] | None) -> tuple[int, int]:
    if img_size is None:
        return config.image_hw
    return with_overrides(config, {"img_size": img_size if isinstance(img_size, int) else tuple(img_size)}).image_hw


def vim_grid(config: VimConfig, img_size: int | Sequence[int] | None = None) -> tuple[int, int]:
    """Patch grid (rows, columns) of a plain Vim; sizes that do not fit are padded at the right and bottom."""
    return replace(config, img_size=_hw(config, img_size)).patch_grid


def scope_grid(config: ScopeConfig, img_size: int | Sequence[int] | None = None) -> tuple[int, int]:
    """Coarse grid (rows, columns); the fine grid has twice as many of both. Sizes are padded to 2·``patch_size``."""
    cell = 2 * config.patch_size
    h, w = _hw(config, img_size)
    return math.ceil(h / cell), math.ceil(w / cell)


def encoder_macs(config: VimConfig, tokens: int, patches: int, convention: str = "one_direction") -> int:
    """Multiply-adds of embedding `patches` patches and running `tokens` tokens (CLS included) through the encoder."""
    projections, scans = token_macs(config, convention)
    return tokens * config.depth * (projections + scans) + patches * embedding_macs(config)


def embedding_macs(config: VimConfig) -> int:
    """Multiply-adds of embedding one patch, with its share of the stem."""
    return projection_macs(config) + stem_macs(config.stem_convs, config.patch_size)


def projection_macs(config: VimConfig) -> int:
    """Multiply-adds of projecting one patch's pixels, and its place in the stem's last map, to a token."""
    return (config.in_chans * config.patch_size**2 + 2 * config.stem_width) * config.embed_dim


def stem_macs(convs: Sequence[tuple[int, int, int]], patch_size: int) -> int:
    """Multiply-adds of a stem for every patch, its convolutions as :attr:`VimConfig.stem_convs` names them."""
    return sum((patch_size // stride) ** 2 * 9 * chans * out for stride, chans, out in convs)


def token_macs(config: VimConfig, convention: str = "one_direction") -> tuple[int, int]:
    """Multiply-adds of one token in one block: the input and output projections, and everything per scan direction."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    d, e, n, k, r = config.embed_dim, config.inner_dim, config.d_state, config.d_conv, config.rank
    direction = k * e + e * (r + 2 * n) + r * e + 9 * e * n + 2 * e
    return d * 2 * e + e * d, direction * (2 if convention == "both_directions" else 1)


def reuse_macs(config: ScopeConfig, cells: int) -> int:
    """Multiply-adds of the feature-reuse projection on `cells` coarse outputs (with ``reuse_cls``: and CLS)."""
    rows, d = cells + int(config.reuse_cls), config.embed_dim
    return {"mlp": rows * 2 * int(config.reuse_ratio * d) * d, "linear": rows * d * d, "off": 0}[config.reuse]


@lru_cache(maxsize=256)
def count_parameters(config: Hashable) -> int:
    """Parameters of the model that a config describes, which is made without memory for them.

    Position tables are sized by ``config.img_size``.
    """
    with torch.device("meta"):
        model = architecture_of(config).build(config)
    return sum(parameter.numel() for parameter in model.parameters())


def head_macs(config: VimConfig, tokens: int) -> int:
    """Multiply-adds of the classifier head on a sequence of `tokens`; the tables leave it out."""
    rows = tokens if config.global_pool in ("lse", "") else 1
    return rows * config.embed_dim * config.num_classes


@singledispatch
def stage_macs(
    config: VimConfig,
    img_size: int | Sequence[int] | None = None,
    alpha: float | None = None,
    convention: str = "one_direction",
) -> StageCost:
    """Cost of one image under `config`; a wing registers the closed form of its own kind of config.

    Args:
        config: A :class:`VimConfig` or :class:`ScopeConfig`.
        img_size: Side or (height, width) in pixels; default ``config.img_size``.
        alpha: Share of the cells that the fine stage refines, 0 to 1; default ``config.alpha``. MambaScope only.
        convention: ``"one_direction"`` (published) or ``"both_directions"`` (honest).

    Raises:
        ValueError: An argument outside what is accepted, or `alpha` for a plain Vim.
    """
    params = count_parameters(config)
    if not isinstance(config, ScopeConfig):
        if alpha is not None:
            raise ValueError("alpha applies to MambaScope models only; a plain Vim has one stage")
        patches = math.prod(vim_grid(config, img_size))
        macs = encoder_macs(config, patches + 1, patches, convention)
        return StageCost(convention, params, 0, patches + 1, 0, 0, macs)
    cells = math.prod(scope_grid(config, img_size))
    alpha = config.alpha if alpha is None else alpha
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    k = num_selected(alpha, cells)
    scoring = cells * config.embed_dim * config.num_classes if config.score.head else 0
    return StageCost(
        convention=convention,
        params=params,
        tokens_coarse=1 + cells,
        tokens_fine=1 + 4 * k + cells - k,
        coarse=encoder_macs(config, 1 + cells, cells, convention) + scoring,
        reuse=reuse_macs(config, cells),
        fine=encoder_macs(config, 1 + 4 * k + cells - k, 4 * cells, convention),
    )


def skipped_macs(config: ScopeConfig, img_size: int | Sequence[int] | None = None, alpha: float | None = None) -> int:
    """Multiply-adds in :func:`stage_macs` that the model here does not spend on the cells it leaves out."""
    cells = math.prod(scope_grid(config, img_size))
    remaining = cells - num_selected(config.alpha if alpha is None else alpha, cells)
    embedding = 4 * remaining * projection_macs(config)  # the stem itself reads the whole image
    return embedding + reuse_macs(config, cells) - reuse_macs(config, cells - remaining)


def plain_vim(config: VimConfig) -> VimConfig:
    """The one-stage Vim of the same sizes that computes every token: what MambaScope is compared with."""
    return VimConfig(**{field.name: getattr(config, field.name) for field in fields(VimConfig)})


def format_gflops(macs: float) -> str:
    """Multiply-adds as GFLOPs: two decimals as in the published tables, four below 0.1 GFLOPs."""
    value = macs / 1e9
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.4f}"
