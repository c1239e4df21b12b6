"""MambaEye (arXiv 2511.19963): a causal, size-agnostic classifier that can answer after every glimpse.

The model sees patches and the displacement in pixels from each patch to the next, never a position or an image size.
State-dict names and shapes are those of the official code.

Shape letters: B batch, L glimpses, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambascope.eye.config import MambaEyeConfig
from mambascope.eye.mamba2 import Mamba2, Mamba2Block, Mamba2State
from mambascope.layers.norm import RMSNorm
from mambascope.layers.plain import run_all
from mambascope.models.configs import with_overrides
from mambascope.models.hub import HubMixin
from mambascope.models.preprocessing import ToPicture, stored_value_range


def move_embedding(moves: Tensor, dim: int = 256) -> Tensor:
    """Sines, then cosines, of the row displacement; the same of the column displacement.

    ``PE(u) = [sin(u w_0), ..., sin(u w_{dim/2-1}), cos(u w_0), ...]`` with ``w_i = 10000^(-2i/dim)``. A move of
    zero, as the first glimpse has, gives zeros and ones.

    Args:
        moves: Displacements (rows, columns) in pixels [..., 2].
        dim: Width per axis; even.

    Returns:
        [..., 2 dim] in fp32 (fp64 for fp64 ``moves``).
    """
    if moves.ndim < 1 or moves.shape[-1] != 2:
        raise ValueError(f"moves must be [..., 2] (rows, columns), got {list(moves.shape)}")
    dtype = torch.float64 if moves.dtype == torch.float64 else torch.float32
    half = torch.arange(dim // 2, device=moves.device, dtype=dtype)
    angles = moves.to(dtype)[..., None] * torch.pow(10000.0, -2 * half / dim)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


@dataclass(frozen=True)
class EyeState:
    """What the model remembers after some glimpses; its size does not depend on how many. Steps never write to it.

    Attributes:
        layers: Each mixer's convolution history and scan state.
        steps: Glimpses read so far, per image [B] int64.
        feature: Feature after the last glimpse [B, D]; ``None`` before the first.
        logits: Answer after the last glimpse [B, C]; ``None`` before the first.
    """

    layers: tuple[Mamba2State, ...]
    steps: Tensor
    feature: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return self.steps.shape[0]

    def _map(self, change: Any) -> EyeState:
        return EyeState(
            tuple(Mamba2State(change(layer.conv), change(layer.ssm)) for layer in self.layers),
            change(self.steps),
            None if self.feature is None else change(self.feature),
            None if self.logits is None else change(self.logits),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, of all rows together."""
        tensors = [self.steps, self.feature, self.logits, *(t for layer in self.layers for t in layer)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def index_select(self, rows: Tensor | Sequence[int]) -> EyeState:
        """The state of some images: picks, reorders or repeats rows of the batch.

        Args:
            rows: Row numbers, or a mask [B] of bool. Rows left out are dropped and their memory is freed.

        Raises:
            ValueError: If a row is not in the batch.
        """
        index = torch.as_tensor(rows, device=self.steps.device)
        if index.dtype == torch.bool:
            if index.shape != self.steps.shape:
                raise ValueError(f"rows must be a mask of {len(self)} images, got shape {list(index.shape)}")
            index = index.nonzero().squeeze(1)
        index = index.to(torch.int64).reshape(-1)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise ValueError(f"rows must lie in 0..{len(self) - 1}, got {index.tolist()}")
        return self._map(lambda t: t.index_select(0, index))

    def drop(self, rows: Tensor | Sequence[int]) -> EyeState:
        """The state without some images (row numbers, or a mask [B] of bool)."""
        keep = torch.ones(len(self), dtype=torch.bool, device=self.steps.device)
        keep[torch.as_tensor(rows, device=keep.device)] = False
        return self.index_select(keep)

    def reset(self, rows: Tensor | Sequence[int]) -> EyeState:
        """The state with some images (row numbers, or a mask [B] of bool) put back to before their first glimpse.

        Their ``feature`` and ``logits`` become zero until the next step.
        """
        fresh = torch.zeros(len(self), dtype=torch.bool, device=self.steps.device)
        fresh[torch.as_tensor(rows, device=fresh.device)] = True
        return self._map(lambda t: t.masked_fill(fresh.reshape(-1, *[1] * (t.ndim - 1)), 0))

    def clone(self) -> EyeState:
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def detach(self) -> EyeState:
        """The state cut off from the autograd graph (truncated backpropagation)."""
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> EyeState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))


class _Encoder(nn.Module):
    """The blocks and the final norm, under the names of the official checkpoint."""

    def __init__(self, config: MambaEyeConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(
            Mamba2Block(
                Mamba2(
                    dim,
                    config.d_state,
                    config.d_conv,
                    config.expand,
                    config.head_dim,
                    config.depth,
                    config.norm_eps,
                    config.chunk_size,
                    config.scan_backend,
                ),
                dim,
                config.norm_eps,
                config.drop_rate,
                rate,
            )
            for rate in rates
        )
        self.norm_f = RMSNorm(dim, config.norm_eps)

    def blocks(self) -> list[Mamba2Block]:
        """The layers, typed."""
        return [cast(Mamba2Block, layer) for layer in self.layers]


class MambaEye(nn.Module, HubMixin):
    """Causal encoder of glimpses with a linear classifier at every step.

    Whole sequences: ``logits = model(patches, moves)``. Glimpse by glimpse, or chunk by chunk::

        state = model.start(batch)
        state = model.step(state, patches, moves)  # state.logits

    Both give the same logits.

    Args:
        config: Sizes and options; defaults to MambaEye-T.
        **overrides: Any field of the config, e.g. ``num_classes=10``.

    Raises:
        ValueError: If an override is not a field of the config or has a value that is not accepted.
    """

    config_class = MambaEyeConfig

    def __init__(self, config: MambaEyeConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = with_overrides(config or self.config_class(), overrides)  # type: ignore[type-var]
        self.config = config
        self.description: dict[str, Any] = {}
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = config.embed_dim
        self.grad_checkpointing = False
        # the projection and the head keep PyTorch's initialisation, as in the official code
        self.init_fc = nn.Sequential(
            nn.Linear(config.input_dim, config.embed_dim), nn.SiLU(), nn.Dropout(config.drop_rate)
        )
        self.mamba2_net = _Encoder(config)
        self.classification_head = self._make_head(config.num_classes)

    def _make_head(self, num_classes: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity())

    # ---- inputs --------------------------------------------------------------------------------------------------

    def _embed(self, patches: Tensor, moves: Tensor) -> Tensor:
        """Input vectors [B, L, patch_dim + 2 move_dim] of checked patches and moves."""
        config = self.config
        if patches.ndim == 5:
            image = (config.in_chans, config.patch_size, config.patch_size)
            if tuple(patches.shape[2:]) != image:
                raise ValueError(f"patches must be [B, L, {', '.join(map(str, image))}], got {list(patches.shape)}")
            patches = patches.flatten(2)
        if patches.ndim != 3 or patches.shape[2] != config.patch_dim:
            raise ValueError(
                f"patches must be [B, L, {config.patch_dim}] (channel, row, column) or [B, L, {config.in_chans}, "
                f"{config.patch_size}, {config.patch_size}], got {list(patches.shape)}"
            )
        if patches.shape[1] == 0:
            raise ValueError("patches must hold at least one glimpse")
        if moves.shape[:-1] != patches.shape[:2] or moves.shape[-1] not in (2, 2 * config.move_dim):
            batch, length = patches.shape[:2]
            raise ValueError(
                f"moves must be [{batch}, {length}, 2] in pixels or their embedding [{batch}, {length}, "
                f"{2 * config.move_dim}] to go with the patches, got {list(moves.shape)}"
            )
        dtype = self._dtype
        pixels = patches.to(dtype) / 255 if patches.dtype == torch.uint8 else patches.to(dtype)
        if moves.shape[-1] == 2:
            # displacements are whole pixels, so the widening is exact
            moves = move_embedding(moves.to(torch.float64) if dtype == torch.float64 else moves, config.move_dim)
        return torch.cat([pixels, moves.to(dtype)], dim=-1)

    @property
    def _dtype(self) -> torch.dtype:
        return self.mamba2_net.norm_f.weight.dtype

    # ---- encoder -------------------------------------------------------------------------------------------------

    def _encode(self, inputs: Tensor, states: Sequence[Mamba2State | None]) -> tuple[Tensor, tuple[Mamba2State, ...]]:
        hidden, residual = run_all(self.init_fc, inputs), None
        new: list[Mamba2State] = []
        for block, state in zip(self.mamba2_net.blocks(), states, strict=True):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                hidden, residual, after = checkpoint(block, hidden, residual, state, use_reentrant=False)
            else:
                hidden, residual, after = block(hidden, residual, state)
            new.append(after)
        return self.mamba2_net.norm_f(hidden, residual)[0], tuple(new)

    def forward_features(self, patches: Tensor, moves: Tensor) -> Tensor:
        """Features [B, L, D] after every glimpse; the arguments are those of :meth:`forward`."""
        return self._encode(self._embed(patches, moves), [None] * self.config.depth)[0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [..., C] of features [..., D] (the features themselves if ``pre_logits``)."""
        return features if pre_logits else run_all(self.classification_head, features)

    def forward(self, patches: Tensor, moves: Tensor) -> Tensor:
        """Logits [B, L, C] after every glimpse.

        Args:
            patches: Pixels [B, L, c s s] in (channel, row, column) order, or [B, L, c, s, s]; float in [0, 1] or uint8.
                They are not normalised by any mean.
            moves: Displacement (rows, columns) from the previous glimpse in pixels [B, L, 2], zero for the first; or
                its embedding [B, L, 2 move_dim], see :func:`move_embedding`.

        Raises:
            ValueError: If a shape does not fit.
        """
        return self.forward_head(self.forward_features(patches, moves))

    # ---- anytime use ---------------------------------------------------------------------------------------------

    def start(self, batch_size: int = 1) -> EyeState:
        """The state of ``batch_size`` images before their first glimpse."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        weight = self.mamba2_net.norm_f.weight
        layers = tuple(block.start(batch_size, weight.device, weight.dtype) for block in self.mamba2_net.blocks())
        return EyeState(layers, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def forward_chunk(self, state: EyeState, patches: Tensor, moves: Tensor) -> tuple[Tensor, EyeState]:
        """Reads glimpses that follow those of ``state``.

        Args:
            state: From :meth:`start` or an earlier call.
            patches: As for :meth:`forward`, of this chunk only.
            moves: As for :meth:`forward`; the first one leads from the last glimpse of ``state`` to this chunk's first.

        Returns:
            Features [B, L, D] after every glimpse of the chunk, and the new state.

        Raises:
            ValueError: If a shape does not fit, or the state is of another model or batch.
        """
        if len(state.layers) != self.config.depth:
            raise ValueError(f"state must have {self.config.depth} layers as the model has, got {len(state.layers)}")
        if patches.shape[0] != len(state):
            raise ValueError(f"patches must be of the {len(state)} images of the state, got {patches.shape[0]}")
        features, layers = self._encode(self._embed(patches, moves), state.layers)
        steps = state.steps + features.shape[1]
        # a copy: a view would keep the whole chunk's features alive
        feature = features[:, -1].clone()
        return features, replace(state, layers=layers, steps=steps, feature=feature, logits=None)

    def step(self, state: EyeState, patches: Tensor, moves: Tensor) -> EyeState:
        """Reads one glimpse per image, or a chunk of them, and answers.

        Args:
            state: From :meth:`start` or an earlier step; it stays valid.
            patches: One glimpse: [B, c s s] or [B, c, s, s]. A chunk: as for :meth:`forward`.
            moves: One glimpse: [B, 2] or [B, 2 move_dim]. A chunk: as for :meth:`forward`.

        Returns:
            The new state; ``logits`` [B, C] is the answer after the last glimpse read.

        Raises:
            ValueError: If a shape does not fit, or the state is of another model or batch.
        """
        if patches.ndim in (2, 4):
            patches, moves = patches[:, None], moves[:, None]
        _, state = self.forward_chunk(state, patches, moves)
        assert state.feature is not None
        return replace(state, logits=self.forward_head(state.feature))

    def transform(self, is_training: bool = False) -> Callable[[Any], Any]:
        """Image of any size to pixels [C, H, W] in [0, 1]; :mod:`mambascope.eye.glimpses` cuts glimpses of it.

        The image is what :meth:`HubMixin.transform` takes.

        Raises:
            ValueError: If ``is_training``: random views come with their glimpses, from the training data modules.
        """
        if is_training:
            raise ValueError("is_training must be false: a MambaEye's random views come from its data modules")
        from torchvision.transforms import Compose, ToTensor

        return Compose([ToPicture(self.in_chans, stored_value_range(self)), ToTensor()])

    # ---- timm's model contract -----------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.classification_head[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one (0 classes: none); ``global_pool`` is unused, nothing is pooled."""
        self.config = replace(self.config, num_classes=num_classes)
        self.num_classes = num_classes
        self.classification_head = self._make_head(num_classes).to(self.mamba2_net.norm_f.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The SSM's own parameters: decay rates, skip weights and step sizes."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^init_fc",
            "blocks": [(r"^mamba2_net\.layers\.(\d+)", None), (r"^mamba2_net\.norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
