"""Whether a model takes a coarse and, where needed, a fine look: what other rooms ask instead of its class."""

from __future__ import annotations

from typing import Any, TypeGuard

from mambascope.models.scope import MambaScope


def is_two_stage(model: Any) -> TypeGuard[MambaScope]:
    """Whether `model` has a threshold and the two stages: its class says ``two_stage = True``.

    The type is that of the one model which does so today; another encoder offers the same methods.
    """
    return bool(getattr(model, "two_stage", False))
