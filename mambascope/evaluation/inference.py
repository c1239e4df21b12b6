"""What the commands share: a ready model from a file, its preprocessing, a device, and errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from mambascope._names import open_streams, printable
from mambascope.models.checkpoint import (
    CheckpointError,
    described_config,
    load_checkpoint,
    load_model,
    read_state_dict,
)
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS
from mambascope.models.exit import check_threshold
from mambascope.models.pictures import ValueRange, check_value_range
from mambascope.models.scope import MambaScope
from mambascope.models.tables import table_stride
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import SHIPPED, find_weights

CHECKPOINT_HELP = (
    f"weights of ours (.safetensors, .ckpt), a folder with model.safetensors, or shipped: {', '.join(SHIPPED)}"
)


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:<n>``.

    Raises:
        ValueError: an unknown device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def ready_model(
    checkpoint: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str = "auto",
    threshold: float | None = None,
    alpha: float | None = None,
    img_size: Sequence[int] | None = None,
    values: ValueRange = None,
) -> VisionMamba:
    """A model in evaluation mode on its device.

    Args:
        checkpoint: weights that describe their model (``.safetensors`` or ``.ckpt`` of ours), a folder with
            ``model.safetensors``, the name of a shipped model, or any other weights together with `name`.
        name: registered model that the weights belong to; needed where they do not describe it.
        device: see :func:`pick_device`.
        threshold, alpha: replace the stored η and α of a MambaScope.
        img_size: (height, width) to run at; position tables are resampled. Default: the stored size.
        values: values of the image files that become 0–255, in place of the stored ones.

    Raises:
        ValueError: an argument outside what is accepted, or a checkpoint that cannot be used.
    """
    path = find_weights(checkpoint)
    target = pick_device(device)
    model = load_model(path) if name is None else _named(name, path)
    if not isinstance(model, VisionMamba):
        raise ValueError(f"{path} holds a {type(model).__name__}; this command takes a MambaScope or a VisionMamba")
    if img_size is not None:
        height, width = img_size
        model.set_input_size((int(height), int(width)))
    if isinstance(model, MambaScope):
        if threshold is not None:
            model.threshold = check_threshold(threshold)
        if alpha is not None:
            model.set_alpha(alpha)
    elif threshold is not None or alpha is not None:
        raise ValueError(f"threshold and alpha need a MambaScope; {path} holds a one-stage {type(model).__name__}")
    use_value_range(model, values)
    return model.to(target).eval()


def _named(name: str, path: Path) -> VisionMamba:
    known = sorted([*VIM_CONFIGS, *SCOPE_CONFIGS])
    if name not in known:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(known)}")
    state, description = read_state_dict(path)
    base = {**VIM_CONFIGS, **SCOPE_CONFIGS}[name]
    options: dict[str, Any] = {}
    described = described_config(path, state, description)
    if type(described) is type(base) and all(
        getattr(described, size) == getattr(base, size) for size in ("embed_dim", "depth", "patch_size")
    ):  # the place of CLS, what the head reads and so on are those that the weights were trained with
        options = asdict(described)
    elif "head.weight" in state and state["head.weight"].ndim == 2:
        options["num_classes"] = len(state["head.weight"])
    if described is None and name in VIM_CONFIGS and (found := table_stride(state, base)) is not None:
        options["stride"] = found.stride
        print(f"{path}: stride={found.stride}, as its position table says", file=sys.stderr)
    model: Any = timm.create_model(name, **options)
    try:
        report = load_checkpoint(model, path, verbose=False)
    except CheckpointError as error:
        if described is None:
            raise
        raise CheckpointError(f"{error}; the file describes its own model: leave --model {name} out") from None
    if notes := report.notes():
        print(f"{path}: {notes}", file=sys.stderr)
    model.description = description
    return model


def add_value_range(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says which values of image files become 0 and 255."""
    parser.add_argument(
        "--value-range",
        nargs="+",
        metavar="V",
        help="values of the files that become 0 and 255: two numbers, or file or percentile; default: the weights'",
    )


def value_range(given: Sequence[str] | None) -> ValueRange:
    """The value of a ``--value-range`` option."""
    return check_value_range(given[0] if given and len(given) == 1 else given)


def use_value_range(model: Any, values: ValueRange) -> None:
    """Makes image files be read with other values than those that the weights say; None leaves them."""
    if values is not None:
        model.description = {
            **model.description,
            "transform": {**(model.description.get("transform") or {}), "value_range": values},
        }


class CommandError(Exception):
    """Ends a command with one line and status 1."""


def run_command(body: Callable[[], int]) -> int:
    """Runs a command's body; every foreseeable mistake becomes one line on stderr.

    Returns:
        What `body` returns; 2 for bad input, 1 for a failure on the way, 130 for Ctrl-C.
    """
    open_streams()
    try:
        return body()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has seen enough (head, less); Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CommandError as error:
        status, message = 1, str(error)
    except OSError as error:
        status = 1
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        status, message = 2, str(error)
    if os.environ.get("MAMBASCOPE_DEBUG"):
        raise
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return status
