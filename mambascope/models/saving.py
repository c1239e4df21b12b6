"""Writes weights together with what is needed to use them: architecture, config, labels, preprocessing, figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from mambascope._version import __version__
from mambascope.models.architectures import architecture_of
from mambascope.utils import atomic_path


def describe(model: Any, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file says about its model: architecture, config as it is set now, and the model's own description."""
    architecture = architecture_of(model)
    config = architecture.config_values(model.config)
    config.update({name: getattr(model, name) for name in architecture.settings})
    identity = {"architecture": architecture.name, "config": config, "version": __version__}
    description = {**model.description, **(extra or {}), **identity}
    if 0 < model.num_classes < len(description.get("labels") or ()):  # of a classifier that was replaced
        description.pop("labels")
    return description


def save_safetensors(model: Any, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
    """Writes weights with the model's config, so that :func:`mambascope.load_model` can rebuild it.

    Args:
        model: The model; what files keep as it is set now (a MambaScope's ``alpha`` and ``threshold``) is stored so.
        path: File to write, atomically.
        extra: More JSON-serialisable facts (labels, transform, figures), added to ``model.description``.
    """
    from safetensors.torch import save

    description = describe(model, extra)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(state, metadata={"mambascope": json.dumps(description)}))
