"""Vision Mamba (Vim, arXiv 2401.09417) with timm's model contract.

Loads the official checkpoints: state-dict names and shapes are theirs. Shape letters: B batch, M patches, L tokens
(M + 1), d model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import resample_patch_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambascope.layers import (
    BidirectionalMamba,
    BlockTrace,
    LookOffsets,
    PatchEmbed,
    RMSNorm,
    VimBlock,
    cls_index,
    insert_cls,
    remove_cls,
    resample_pos_embed,
)
from mambascope.layers.plain import is_plain
from mambascope.models.configs import GLOBAL_POOLS, VimConfig, with_overrides
from mambascope.models.encoded import Embedded, Encoded, Intermediates
from mambascope.models.frozen import packed_stack
from mambascope.models.hub import HubMixin


class VisionMamba(nn.Module, HubMixin):
    """Vim encoder with a linear classifier on the CLS token, or on what ``global_pool`` names.

    Args:
        config: Sizes and options; defaults to Vim-T.
        **overrides: Any field of the config, e.g. ``num_classes=10``.

    Raises:
        ValueError: If an override is not a field of the config or has a value that is not accepted.
    """

    config_class: type[VimConfig] = VimConfig
    two_stage = False  # see mambascope.models.two_stage
    encodes_all_blocks = True  # whether `encode` runs the blocks: mambascope.models.frozen packs those of such models

    def __init__(self, config: VimConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = with_overrides(config or self.config_class(), overrides)
        self.config = config
        self.description: dict[str, Any] = {}
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = config.embed_dim
        self.global_pool = config.global_pool
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        dim = config.embed_dim

        self.patch_embed = PatchEmbed(config.patch_size, config.patch_stride, config.in_chans, dim, config.stem_width)
        self.grid = self._trained_grid(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, dim))
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(
            VimBlock(
                BidirectionalMamba(
                    dim,
                    config.d_state,
                    config.d_conv,
                    config.expand,
                    config.dt_rank,
                    depth=config.depth,
                    scan_backend=config.scan_backend,
                ),
                dim,
                config.norm_eps,
                rate,
            )
            for rate in rates
        )
        self.norm_f: nn.Module = RMSNorm(dim, config.norm_eps)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module = self._make_head(config.num_classes)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": dim, "reduction": config.patch_stride} for i in range(config.depth)
        ]
        self.init_weights()

    def _trained_grid(self, config: VimConfig) -> tuple[int, int]:
        return self.patch_embed.grid_size(*config.image_hw)

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    @torch.no_grad()
    def init_weights(self) -> None:
        """Patch embedding LeCun normal, CLS and positions truncated normal 0.02; mixers and stem as they are made."""
        weight = self.patch_embed.proj.weight
        # a truncated normal (at two deviations) has 0.8796 of the deviation it is drawn with
        trunc_normal_(weight, std=weight[0].numel() ** -0.5 / 0.87962566103423978)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    # ---- encoder -------------------------------------------------------------------------------------------------

    def check_images(self, x: Tensor) -> None:
        """Raises ``ValueError`` unless ``x`` is [B, C, H, W] with the model's channels."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, H, W], got {list(x.shape)}")

    def embed(
        self, x: Tensor, table: Tensor, table_grid: tuple[int, int], offsets: LookOffsets | None = None
    ) -> Embedded:
        """The encoder's input for images [B, C, H, W]: patches, CLS (and its offset), and a position table."""
        self.check_images(x)
        position, grid = self.config.cls_position, self.patch_embed.grid_size(*x.shape[-2:])
        stem_maps = self.patch_embed.stem_maps(x)
        cls = self.cls_token if offsets is None else self.cls_token + offsets.cls_token
        tokens = insert_cls(self.patch_embed(x, stem_maps), cls, position)
        return Embedded(tokens + resample_pos_embed(table, table_grid, grid, position), grid, stem_maps)

    def _tokens(self, x: Tensor) -> Embedded:
        """:meth:`embed` with the model's own position table."""
        return self.embed(x, self.pos_embed, self.grid)

    def encode(
        self,
        tokens: Tensor,
        *,
        take: tuple[int, ...] | list[int] = (),
        stop_after: int | None = None,
        trace: tuple[str, ...] = (),
        trace_layers: tuple[int, ...] = (),
        offsets: LookOffsets | None = None,
    ) -> Encoded:
        """Runs the blocks and the final norm.

        Args:
            tokens: [B, L, d].
            take: Blocks whose output is returned.
            stop_after: Last block to run; the final norm is then skipped.
            trace: Fields of :class:`~mambascope.layers.BlockTrace` that a token score reads.
            trace_layers: Blocks in which it does.
            offsets: What this look adds to the parameters of blocks and final norm.
        """
        stack = packed_stack(self, tokens, trace, offsets)
        if stack is not None:
            packed = stack(tokens, tuple(take), tuple(trace_layers) if trace else (), stop_after)
            return Encoded(packed.tokens, packed.taken, [BlockTrace(top=top) for top in packed.tops])
        hidden: Tensor = tokens
        residual: Any = None
        taken: list[Tensor] = []
        traces: list[BlockTrace] = []
        for i, block in enumerate(self.layers[: None if stop_after is None else stop_after + 1]):
            fields = trace if i in trace_layers else ()
            more = () if offsets is None else (offsets.layers[i],)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, residual, left = checkpoint(block, hidden, residual, fields, *more, use_reentrant=False)
            else:
                hidden, residual, left = block(hidden, residual, fields, *more)
            if left is not None:
                traces.append(left)
            if i in take:
                taken.append(residual + hidden)
        if stop_after is not None or isinstance(self.norm_f, nn.Identity):
            return Encoded(residual + hidden, taken, traces)
        gain = () if offsets is None else (offsets.norm_f,)
        return Encoded(self.norm_f(hidden, residual, *gain)[0], taken, traces)

    # ---- timm's model contract -----------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens [B, M + 1, d] of images [B, C, H, W], CLS at its place among the patches."""
        return self.encode(self._tokens(x).tokens).tokens

    def _cls_position(self) -> str:
        """Where CLS sits in what ``forward_features`` returns."""
        return self.config.cls_position

    def pool(self, tokens: Tensor, position: str | None = None) -> Tensor:
        """Reads the CLS row (or the mean) of tokens [B, L, d] as [B, d]; all tokens if ``global_pool`` is empty.

        With ``lse`` that is the CLS row too; the logits need the patches as well, see :meth:`answer`.
        """
        if self.global_pool in ("token", "lse"):
            return tokens[:, cls_index(tokens.shape[1] - 1, position or self._cls_position())]
        return tokens.mean(1) if self.global_pool == "avg" else tokens

    def classify(self, feature: Tensor) -> Tensor:
        """Logits [B, C] of a pooled feature [B, d]."""
        return self.head(self.head_drop(feature))

    def answer(self, tokens: Tensor, position: str | None = None) -> Tensor:
        """Logits [B, C] of normalised tokens [B, L, d] with CLS at ``position``; features where there is no head."""
        if self.global_pool != "lse" or self.num_classes == 0:
            return self.classify(self.pool(tokens, position))
        logits = self.classify(tokens)
        cls, patches = self.pool(logits, position), remove_cls(logits, position or self._cls_position())
        if patches.shape[1] == 0:  # a sequence of nothing but CLS
            return cls
        pooled = patches.to(torch.promote_types(patches.dtype, torch.float32)).logsumexp(1)
        return cls + (pooled - math.log(patches.shape[1])).to(cls.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, C] (or the pooled feature [B, d], see :meth:`pool`) from ``forward_features``' output."""
        return self.pool(x) if pre_logits else self.answer(x)

    def forward(self, x: Tensor) -> Any:
        """Logits [B, C] of images [B, C, H, W] of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Outputs of several blocks, with timm's arguments.

        Args:
            x: Images [B, C, H, W].
            indices: Last n blocks if an int, all if ``None``, else the named ones.
            return_prefix_tokens: Pair each map with its CLS token [B, 1, d].
            norm: Apply the final norm to each map.
            stop_early: Stop after the last block needed.
            output_fmt: ``NCHW`` maps or ``NLC`` tokens without CLS.
            intermediates_only: Leave out the final features.
            output_dict: Return a dictionary.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.layers), indices)
        stop = last if stop_early and intermediates_only else None
        final, maps, prefixes, _ = self._intermediates(x, take, stop, norm)
        if output_fmt == "NLC":
            maps = [m.flatten(2).transpose(1, 2) for m in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": final}
        paired = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return paired if intermediates_only else (final, paired)

    def _intermediates(self, x: Tensor, take: list[int], stop: int | None, norm: bool) -> Intermediates:
        """Outputs of the blocks ``take`` as maps; ``stop``: last block to run."""
        tokens, grid, stem_maps = self._tokens(x)
        final, taken, _ = self.encode(tokens, take=take, stop_after=stop)
        if norm:
            taken = [self._normalised(t) for t in taken]
        position = self.config.cls_position
        at = cls_index(tokens.shape[1] - 1, position)
        maps = [remove_cls(t, position).transpose(1, 2).unflatten(2, grid).contiguous() for t in taken]
        return Intermediates(final, maps, [t[:, at : at + 1] for t in taken], stem_maps)

    def _normalised(self, tokens: Tensor) -> Tensor:
        return tokens if isinstance(self.norm_f, nn.Identity) else self.norm_f(tokens)[0]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes blocks after the last one needed; returns the kept feature indices."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.config = with_overrides(self.config, {"depth": last + 1})
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one (0 classes: none)."""
        if global_pool is not None and global_pool not in GLOBAL_POOLS:
            raise ValueError(f"global_pool must be one of {GLOBAL_POOLS}, got {global_pool!r}")
        pool = self.global_pool if global_pool is None else global_pool
        self.config = with_overrides(self.config, {"num_classes": num_classes, "global_pool": pool})
        self.global_pool = pool
        self.num_classes = num_classes
        self.head = self._make_head(num_classes).to(self.cls_token)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resamples the position tables (and the patch kernel) for another image or patch size; patches are square."""
        changes: dict[str, Any] = {}
        if isinstance(patch_size, (tuple, list)):
            if len(patch_size) != 2 or patch_size[0] != patch_size[1]:
                raise ValueError(f"patch_size must be one side or two equal ones, got {patch_size!r}")
            patch_size = int(patch_size[0])
        if img_size is not None:
            changes["img_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        if patch_size is not None and patch_size != self.config.patch_size:
            changes["patch_size"], changes["stride"] = patch_size, None
        if "patch_size" in changes and self.config.stem_width:
            raise ValueError(f"patch_size must stay {self.config.patch_size} with a stem, got {patch_size}")
        if "patch_size" in changes and not is_plain(self.patch_embed.proj, nn.Conv2d):
            raise ValueError("patch_size cannot be changed while patch_embed.proj is wrapped or has hooks")
        # before anything changes: a wrong size must not leave half a model
        config = with_overrides(self.config, changes)
        if "patch_size" in changes:
            assert patch_size is not None
            with torch.no_grad():
                proj = self.patch_embed.proj
                kernel = resample_patch_embed(proj.weight, [patch_size, patch_size])
                embed = PatchEmbed(patch_size, patch_size, self.in_chans, self.embed_dim).to(kernel)
                embed.proj.weight.copy_(kernel)
                embed.proj.bias.copy_(proj.bias)  # type: ignore[union-attr, arg-type]
            embed.proj.requires_grad_(proj.weight.requires_grad)
            self.patch_embed = embed
        self.config = config
        self._resample_tables()
        for info in self.feature_info:
            info["reduction"] = self.config.patch_stride

    def _resample_tables(self) -> None:
        new = self._trained_grid(self.config)
        self.pos_embed = self._resampled(self.pos_embed, self.grid, new)
        self.grid = new

    def _resampled(self, table: nn.Parameter, old: tuple[int, int], new: tuple[int, int]) -> nn.Parameter:
        resampled = resample_pos_embed(table.detach(), old, new, self.config.cls_position)
        return nn.Parameter(resampled.clone(), requires_grad=table.requires_grad)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond biases and gains: CLS, positions, A_log and D."""
        tails = ("cls_token", "pos_embed", "pos_embed_coarse", "A_log", "A_b_log", "D", "D_b")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in tails}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
