"""Token reduction around the Vim encoder: what all methods share.

A method is a frozen dataclass of settings and a :class:`Reducer`, which the encoder asks before, in and after every
block. Tokens that are removed or merged leave the sequence, so that no later block computes them.

Shape letters: B batch, M patches in the sequence, K of them that stay, L tokens (M + 1), d model width, E inner width.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambascope.layers import BidirectionalMamba, VimBlock, cls_index, gather_rows


class EncoderSizes(NamedTuple):
    """Sizes that a method depends on: model width d, inner width E, rank R of the step sizes, number of blocks."""

    embed_dim: int
    inner_dim: int
    rank: int
    depth: int


class ReducedOutput(NamedTuple):
    """What a reduced Vim gives besides its logits.

    Attributes:
        logits: [B, C].
        patches: Normalised outputs of the patches [B, M, d], without CLS.
        places: Raster index of each of them [B, M] int64; ``None`` where tokens are merged.
        kept: 1 where it is still computed at test time [B, M]; ``None`` if all are.
        decisions: For every stage of a predictor, 1 where a patch is kept [B, M], with gradient. Training only.
        switches: 1 where a scan ran, per block and direction (forward, backward) [B, depth, 2]; ``None`` if all do.
            In training with gradient.
    """

    logits: Tensor
    patches: Tensor
    places: Tensor | None = None
    kept: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    switches: Tensor | None = None


@dataclass
class TokenState:
    """The sequence between two blocks.

    Attributes:
        hidden: Output of the last block [B, L, d], not yet added to the residual stream.
        residual: Residual stream [B, L, d]; ``None`` before the first block.
        position: Where the CLS token belongs: ``first``, ``middle`` or ``last``.
        cls: Index of the CLS token, per image [B, 1] where it differs between them.
    """

    hidden: Tensor
    residual: Tensor | None
    position: str
    cls: int | Tensor


@dataclass(frozen=True)
class ReductionConfig:
    """Settings of a method; its name says which.

    Attributes:
        name: Name of the method.
    """

    name: str = field(init=False, default="")

    def patch_counts(self, patches: int, depth: int) -> tuple[int, ...]:
        """Patches (without CLS) that each block computes at test time.

        Args:
            patches: Patches of the image.
            depth: Blocks of the encoder.

        Raises:
            ValueError: If the settings do not fit these numbers.
        """
        raise NotImplementedError

    def build(self, sizes: EncoderSizes) -> Reducer:
        """The method for an encoder of these sizes."""
        raise NotImplementedError

    def extra_macs(self, sizes: EncoderSizes, patches: int, directions: int) -> int:
        """Multiply-adds per image of deciding what to reduce.

        Args:
            sizes: Of the encoder.
            patches: Patches of the image.
            directions: Scan directions that are counted, 1 or 2.
        """
        del sizes, patches, directions
        return 0


class Reducer(nn.Module):
    """Runs the blocks of an encoder on fewer and fewer tokens. The base class reduces nothing.

    Args:
        config: Settings.
        sizes: Sizes of the encoder.
    """

    def __init__(self, config: ReductionConfig, sizes: EncoderSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes

    def start(self, tokens: Tensor, position: str) -> Any:
        """State of the sequence [B, L, d] before the first block, with the CLS token at `position`."""
        return TokenState(tokens, None, position, cls_index(tokens.shape[1] - 1, position))

    def before(self, layer: int, state: Any) -> Any:
        """Changes the sequence before a block."""
        del layer
        return state

    def mix(self, layer: int, mixer: BidirectionalMamba, u_BLD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The mixer's output [B, L, d] of a block, and the state with what was found on the way."""
        del layer
        return mixer(u_BLD)[0], state

    def after(self, layer: int, state: Any) -> Any:
        """Changes the sequence after a block."""
        del layer
        return state

    def step(self, layer: int, block: VimBlock, state: Any) -> Any:
        """One block with what the method does around it."""
        state = self.before(layer, state)
        normed, residual = block.norm(state.hidden, state.residual)
        out, state = self.mix(layer, block.mixer, normed, state)
        return self.after(layer, replace(state, hidden=block.drop_path(out), residual=residual))

    def describe(self, state: Any) -> dict[str, Any]:
        """Fields of :class:`ReducedOutput` after the last block, besides logits and patches."""
        del state
        return {}

    def penalties(self, output: ReducedOutput) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of every term that the method adds to the training loss."""
        del output
        return {}


# ---- settings --------------------------------------------------------------------------------------------------------


def check_count(name: str, value: Any, low: int) -> None:
    """Raises ``ValueError`` unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"reduction.{name} must be an integer >= {low}, got {value!r}")


def as_float(value: Any) -> float:
    """A real number as a float; NaN for anything else."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def check_ratio(name: str, value: Any) -> float:
    """Returns a number in (0, 1] as a float; raises ``ValueError`` for anything else."""
    if not 0 < as_float(value) <= 1:
        raise ValueError(f"reduction.{name} must lie in (0, 1], got {value!r}")
    return float(value)


def check_weight(name: str, value: Any) -> float:
    """Returns a finite number of at least 0 as a float; raises ``ValueError`` for anything else."""
    if not 0 <= as_float(value) < math.inf:
        raise ValueError(f"reduction.{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def as_layers(value: Any) -> tuple[int, ...] | None:
    """Returns a list of ascending layers as a tuple (``None`` stays); raises ``ValueError`` for anything else."""
    if value is None:
        return None
    fits = isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not fits or not value or list(value) != sorted(set(value)) or value[0] < 0:
        raise ValueError(f"reduction.layers must be ascending layer numbers from 0, got {value!r}")
    return tuple(value)


def layers_within(layers: tuple[int, ...], low: int, high: int, depth: int) -> tuple[int, ...]:
    """Returns `layers`; raises ``ValueError`` if one is outside low..high of an encoder with `depth` blocks."""
    outside = [layer for layer in layers if not low <= layer <= high]
    if outside:
        raise ValueError(
            f"reduction.layers must lie in {low}..{high} for an encoder of {depth} blocks, got {outside[0]}"
        )
    return layers


def kept_of(ratio: float, patches: int) -> int:
    """Patches that a keep ratio leaves, rounded down, at least one; safe against binary rounding."""
    return max(1, math.floor(ratio * patches + 1e-9))


# ---- sequences -------------------------------------------------------------------------------------------------------


def in_sequence(patch_BK: Tensor, cls: int | Tensor) -> Tensor:
    """Row of a patch in the sequence, from its number among the patches."""
    return patch_BK + (patch_BK >= cls)


def patch_rows(rows: Tensor, cls: int | Tensor) -> Tensor:
    """Rows [B, M, ...] of the patches out of a sequence [B, L, ...]."""
    if isinstance(cls, int):
        return torch.cat([rows[:, :cls], rows[:, cls + 1 :]], dim=1)
    every = torch.arange(rows.shape[1] - 1, device=rows.device).expand(len(rows), -1)
    return gather_rows(rows, in_sequence(every, cls))


def cls_row(rows: Tensor, cls: int | Tensor) -> Tensor:
    """The CLS row [B, 1, ...] of a sequence [B, L, ...]."""
    return rows[:, cls : cls + 1] if isinstance(cls, int) else gather_rows(rows, cls)


def order_with_cls(patch_BK: Tensor, cls: int | Tensor, at: int | Tensor) -> Tensor:
    """Rows [B, K + 1] of the patches `patch_BK` in this order, with the CLS token between them.

    Args:
        patch_BK: Numbers among the patches.
        cls: Row of the CLS token now, or one per image [B, 1].
        at: Row that it takes, or one per image [B, 1].
    """
    rows = in_sequence(patch_BK, cls)
    if isinstance(at, int) and isinstance(cls, int):
        return torch.cat([rows[:, :at], rows.new_full((len(rows), 1), cls), rows[:, at:]], dim=1)
    slot = torch.arange(rows.shape[1] + 1, device=rows.device).expand(len(rows), -1)
    # slots behind the CLS token show the patch before them; the clamp only touches the CLS token's own slot
    moved = rows.gather(1, (slot - (slot > at).long()).clamp(max=rows.shape[1] - 1))
    return torch.where(slot == at, torch.as_tensor(cls, device=rows.device), moved)


def cls_to_place(tokens: Tensor, cls: int | Tensor, position: str) -> Tensor:
    """The sequence [B, L, d] with its CLS token where `position` says."""
    at = cls_index(tokens.shape[1] - 1, position)
    if isinstance(cls, int) and cls == at:
        return tokens
    patches = patch_rows(tokens, cls)
    return torch.cat([patches[:, :at], cls_row(tokens, cls), patches[:, at:]], dim=1)
