"""Models that are run with another config than they were trained with: built anew, with the same weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mambascope.compare.lists import merged
from mambascope.models.architectures import architecture_of, configured
from mambascope.models.meaning import differences
from mambascope.models.two_stage import is_two_stage


def rebuilt(model: Any, changes: dict[str, Any]) -> Any:
    """A model with fields of its config changed, and the same weights.

    Raises:
        ValueError: If the weights mean something else, or do not fit.
    """
    if not changes:
        return model
    if not hasattr(model, "config_class"):
        raise ValueError(f"model changes are for Vim and MambaScope, not for {type(model).__name__}")
    config = asdict(model.config)
    changed = configured(model.config, {k: v for k, v in merged(config, changes).items() if k in changes})
    if meant := differences(config, asdict(changed)):
        raise ValueError(
            f"the weights were trained with {meant[0].argument}, got {meant[0].model!r}; an entry of its own can be "
            "trained with that"
        )
    new: Any = architecture_of(changed).build(changed)
    try:
        new.load_state_dict(model.state_dict())
    except RuntimeError:
        raise ValueError(f"the weights do not fit the model with {changes}") from None
    new.description = model.description
    return new


def resized(model: Any, size: tuple[int, int]) -> Any:
    """The model, made to fit images of this height and width if it is built for a size."""
    if tuple(model.config.image_hw) != tuple(size) and hasattr(model, "set_input_size"):
        model.set_input_size(tuple(size))
    return model


def with_control(model: Any, cells: str, seed: int) -> Any:
    """The model, which then reads ``random`` cells again, the ``least`` important or the most ``central`` ones.

    Raises:
        ValueError: If the model has one stage.
    """
    if cells == "important":
        return model
    if not is_two_stage(model):
        raise ValueError(f"cells must be left out for a model of one stage, got {cells!r}")
    generator = torch.Generator().manual_seed(seed)
    look = model.forward_coarse

    def forward_coarse(*args: Any, **kwargs: Any) -> Any:
        coarse = look(*args, **kwargs)
        coarse.importance = reranked(coarse.importance, cells, generator, coarse.grid)
        return coarse

    model.forward_coarse = forward_coarse  # type: ignore[method-assign]
    return model


def reranked(importance: Tensor, cells: str, generator: torch.Generator, grid: tuple[int, int]) -> Tensor:
    """Importance [B, M] by which the cells of a control are chosen; ``grid``: rows and columns of M cells."""
    if cells == "least":
        return -importance
    if cells == "central":  # the same for every image: what it gains is where objects usually are
        rows, cols = (torch.arange(n).sub((n - 1) / 2).abs() for n in grid)
        return -torch.maximum(rows[:, None], cols).flatten().expand_as(importance).to(importance)
    return torch.rand(importance.shape, generator=generator).to(importance)
