"""Reads files of weights, also strangers', without running any code from them, and strips what wraps a model."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambascope.models.architectures import ARCHITECTURES
from mambascope.models.description import CheckpointError, check_archive, check_tensors, checked_description
from mambascope.models.weights import SHIPPED

_WRAPPERS = ("_orig_mod.", "module.", "model.", "backbone.")  # compile, DDP, a LightningModule, a segmentor or detector
ENCODER = "encoder."
"""Where a backbone for segmentors and detectors keeps its encoder."""

# mmengine's files hold the logged scalars beside the weights, of these types
_LOG_TYPES = ("mmengine.", "numpy.", "builtins.getattr")
# Besides its own classes, a pickled OmegaConf names these as the types of its values.
_SETTINGS_TYPES = {"typing.Any", "collections.defaultdict"} | {
    f"builtins.{t}" for t in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")
}


class _Ignored:
    """Takes the place of every class of a pickled OmegaConf or log: holds nothing and does nothing."""

    def __init__(self, *args: Any) -> None:
        del args

    def __new__(cls, *args: Any) -> _Ignored:
        del args
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        del state


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint without running any code from it.

    Args:
        path: A ``.safetensors`` file, a Lightning ``.ckpt``, or a ``.pth``/``.pt`` with the weights at the top or under
            ``model`` (as the official Vim) or ``state_dict`` (of a segmentor or detector the encoder is taken).

    Returns:
        The state dict with plain module names, and the file's description (``architecture`` and ``config`` if known;
        ``part="backbone"`` for the encoder of a segmentor or detector).

    Raises:
        CheckpointError: If the file is missing, damaged, holds no weights or would run code.
    """
    state, description = read_tensors(path)
    if Path(path).suffix == ".safetensors" and "architecture" in description:
        return state, description  # ours, without wrappers
    return encoder_weights(strip_wrappers(state, description), description)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`read_state_dict` reads, with the names that the file has."""
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder that holds no model.safetensors; give the checkpoint itself")
        raise CheckpointError(f"checkpoint {path} is not a file" if path.exists() else _missing(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    check_archive(path)
    try:
        # the official files carry their training arguments; a Namespace only holds values
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            torch.serialization.safe_globals(_ignored_settings(path)),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(f"checkpoint {path} was refused: it holds more than tensors ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not weights")
    description = checked_description(path, content.get("mambascope", {}))
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    check_tensors(path, state)
    if not state:
        raise CheckpointError(
            f"checkpoint {path} holds no weights; expected tensors at the top, under 'model' or 'state_dict'"
        )
    return state, description


def _missing(path: Path) -> str:
    names = f"; names of shipped models: {', '.join(SHIPPED)}" if path.parent == Path() and not path.suffix else ""
    return f"checkpoint {path} does not exist{names}"


def _ignored_settings(path: Path) -> list[Any]:
    """Lets the settings of official MambaEye ``.ckpt`` files and mmengine's logs be skipped; empty if there is more."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip archive, or damaged: torch.load will say so
        return []
    if not all(name.startswith(("omegaconf.", *_LOG_TYPES)) or name in _SETTINGS_TYPES for name in names):
        return []
    return [(_Ignored, name) for name in names]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    try:
        description = json.loads(metadata.get("mambascope", "{}"))
    except (ValueError, RecursionError):  # also a number of more than 4,300 digits
        raise CheckpointError(f"checkpoint {path} has a damaged description: it is not JSON") from None
    return state, checked_description(path, description)


def _marks() -> tuple[str, ...]:
    """Names of parameters that the models of this package have, and no wrapper."""
    return tuple(kind.mark for kind in ARCHITECTURES.values() if kind.mark)


def strip_wrappers(state: dict[str, Tensor], description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Strips what wraps a module and stands before all of its names; drops the wrapper's other tensors."""
    kind = ARCHITECTURES.get(str(description.get("architecture")))
    # a classifier of timm's has no name in common with the rest: all of its module counts
    marks = (kind.mark,) if kind is not None and not kind.mark else _marks()
    changed = True
    while changed:
        changed = False
        for prefix in _WRAPPERS:
            if any(k.startswith(prefix) and k.endswith(marks) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                changed = True
    return state


def encoder_weights(state: dict[str, Tensor], description: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The encoder's weights if these are a backbone's, whose classifier then is no part of them; else all."""
    if not any(f"{ENCODER}{mark}" in state for mark in _marks()):
        return state, description
    encoder = {k.removeprefix(ENCODER): v for k, v in state.items() if k.startswith(ENCODER)}
    return encoder, {**description, "part": "backbone"}
