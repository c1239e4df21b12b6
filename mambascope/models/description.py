"""What a weights file says of itself, checked before it is used: files come from strangers."""

from __future__ import annotations

import contextlib
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.models.pictures import STRETCHES, check_value_range
from mambascope.models.retired import without_retired

MAX_SIDE = 4096
"""Longest side of the images that a description may ask for where no tensor of the file shows the size."""

TRANSFORM = ("input_size", "mean", "std", "interpolation", "crop_pct", "value_range")
"""What a description may say about preprocessing."""

GLIMPSES = ("length", "canvas_size", "pattern", "resize_mode", "compat")
"""What a description may say about how images become glimpses."""

_MOST_GLIMPSES = 2**16
_LONGEST_LINE = 1000
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _value_range(value: Any) -> bool:
    try:
        check_value_range(value)
    except ValueError:
        return False
    return True


def _line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_LINE


def _sides(value: Any, count: int) -> bool:
    listed = isinstance(value, (list, tuple)) and len(value) == count
    return listed and all(type(side) is int and 1 <= side <= MAX_SIDE for side in value)


def _channels(value: Any, in_chans: int, low: float) -> bool:
    listed = isinstance(value, (list, tuple)) and len(value) in (1, 3, in_chans)
    return listed and all(_number(x, low, 1e12) for x in value)


_ACCEPTED: dict[str, tuple[Callable[[Any, int], bool], str]] = {
    "input_size": (lambda v, _: _sides(v, 3), f"channels, height and width, each in 1..{MAX_SIDE}"),
    "mean": (lambda v, in_chans: _channels(v, in_chans, -1e12), "finite numbers, one per channel"),
    "std": (lambda v, in_chans: _channels(v, in_chans, 1e-12), "finite, positive numbers, one per channel"),
    "interpolation": (lambda v, _: v in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    "crop_pct": (lambda v, _: _number(v, 0.05, 2), "a number in [0.05, 2]"),
    "value_range": (lambda v, _: _value_range(v), f"low and high, or one of {', '.join(STRETCHES)}"),
    "length": (lambda v, _: type(v) is int and 1 <= v <= _MOST_GLIMPSES, f"an integer in 1..{_MOST_GLIMPSES}"),
    "canvas_size": (lambda v, _: _sides(v, 2) or _sides([v], 1), f"one side or two, each in 1..{MAX_SIDE}"),
    "pattern": (lambda v, _: isinstance(v, str), "a text"),
    "resize_mode": (lambda v, _: isinstance(v, str), "a text"),
    "compat": (lambda v, _: isinstance(v, bool), "true or false"),
}
"""Whether a value, given the model's channels, is one that its readers take; and what those are."""

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("config", "glimpses", "report", "transform"), ((dict,), "a mapping")),
    **dict.fromkeys(("architecture", "model", "version"), ((str,), "a text")),
    **dict.fromkeys(("epochs", "steps"), ((int,), "an integer")),
    "labels": ((list, tuple), "a list"),
}
_MOST_VALUES, _MOST_LEVELS = 500_000, 16
_SPARE_BYTES = 2**26
_BLOCK = re.compile(r"(?:mamba2_net\.)?layers\.(\d+)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model."""


def shortened(value: Any) -> str:
    """What a value of a stranger's is shown as."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def plain_values(value: Any) -> Any:
    """A copy of nested mappings and lists that hold text and 64-bit numbers, and nothing else.

    Raises:
        ValueError: If there is anything else, or more than a description has: a few kilobytes can stand for terabytes
            where lists are shared.
    """
    left = _MOST_VALUES

    def copy(value: Any, levels: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or levels == 0:
            raise ValueError("it is larger or deeper than any description")
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: copy(inner, levels - 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            inner = [copy(element, levels - 1) for element in value]
            return inner if isinstance(value, list) else tuple(inner)
        kind = "number beyond 64 bits" if isinstance(value, int) else type(value).__name__
        raise ValueError(f"it holds a {kind}")

    return copy(value, _MOST_LEVELS)


def checked_description(path: Path, description: Any) -> dict[str, Any]:
    """What a file says about itself as plain values, each of the kind that its readers expect.

    Raises:
        CheckpointError: If it is anything else.
    """
    damaged = f"checkpoint {path} has a damaged description"
    if not isinstance(description, Mapping):
        raise CheckpointError(f"{damaged}: 'mambascope' must be a mapping")
    try:
        values = plain_values(description)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{damaged}: {error}") from None
    for name, (kinds, words) in _KINDS.items():
        value = values.get(name)
        if value is not None and type(value) not in kinds:
            raise CheckpointError(f"{damaged}: {name} must be {words}, got a {type(value).__name__}")
    report = values.get("report") or {}
    table, choice = report.get("table"), report.get("choice")
    if not all(isinstance(label, str) for label in values.get("labels") or ()):
        raise CheckpointError(f"{damaged}: labels must be texts")
    if table is not None and not (isinstance(table, list) and all(isinstance(row, dict) for row in table)):
        raise CheckpointError(f"{damaged}: report.table must be a list of mappings")
    if choice is not None and not (isinstance(choice, dict) and _line(choice.get("rule", ""))):
        raise CheckpointError(f"{damaged}: report.choice must be a mapping whose rule is one line of text")
    try:
        config = without_retired(values.get("config") or {})
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from None
    values = {name: value for name, value in values.items() if value is not None}
    return {**values, "config": config} if "config" in values else values


def check_use(path: Path, description: Mapping[str, Any], config: Any) -> None:
    """Checks labels, preprocessing and glimpses against the described model.

    Args:
        path: The file.
        description: See :func:`checked_description`.
        config: The model's config.

    Raises:
        CheckpointError: If they do not fit.
    """
    labels, classes = description.get("labels") or (), config.num_classes
    if 0 < classes < len(labels):  # fewer are fine: a model may have more classes than its data
        raise CheckpointError(f"checkpoint {path} has {len(labels)} labels for {classes} classes")
    transform = description.get("transform") or {}
    for section, names in (
        (description, TRANSFORM),
        (transform, TRANSFORM),
        (description.get("glimpses") or {}, GLIMPSES),
    ):
        for name in names:
            value, (fits, words) = section.get(name), _ACCEPTED[name]
            if value is not None and not fits(value, config.in_chans):
                raise CheckpointError(
                    f"checkpoint {path} does not fit its own description: {name} must be {words}, "
                    f"got {shortened(value)}"
                )


# ---- tensors -----------------------------------------------------------------------------------------------------


def check_archive(path: Path) -> None:
    """Refuses a zip archive that grows when it is read: PyTorch writes none, and a kilobyte could become gigabytes.

    Raises:
        CheckpointError: If it is one.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch.load will say so
    if size > path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} was refused: it unpacks to more than its own size, as none of ours")


def check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Checks that the file itself holds all values of its tensors: a view can repeat one value a billion times.

    Raises:
        CheckpointError: If it does not.
    """
    total = 0
    for name, tensor in state.items():
        stored = (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_nested
            and not tensor.is_quantized
        )
        needs = tensor.numel() * tensor.element_size() if stored else 0
        if not stored or tensor.untyped_storage().nbytes() < needs:
            raise CheckpointError(f"checkpoint {path} was refused: the file does not hold the values of {name}")
        total += needs
    if total > 2 * path.stat().st_size + _SPARE_BYTES:  # tied weights are stored once
        raise CheckpointError(
            f"checkpoint {path} was refused: its tensors take {total:,} bytes, more than the file has"
        )


def check_blocks(path: Path, state: Mapping[str, Tensor], depth: Any) -> None:
    """Checks the number of blocks before any is made.

    Raises:
        CheckpointError: If the file has another number than its description says.
    """
    blocks = len({match[1] for name in state if (match := _BLOCK.match(name))})
    if depth != blocks or isinstance(depth, bool):
        raise CheckpointError(
            f"checkpoint {path} does not fit its own description: depth is {shortened(depth)}, the file has {blocks} "
            "blocks"
        )


def unlike(tensor: Tensor, target: Tensor) -> tuple[str, str] | None:
    """Both shapes, or both types where only one holds real numbers; ``None`` if the values can be copied."""
    if tensor.shape != target.shape:
        return str(list(tensor.shape)), str(list(target.shape))
    if tensor.is_floating_point() != target.is_floating_point():
        return str(tensor.dtype), str(target.dtype)
    return None


@contextlib.contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Ends the making of a model, of whatever kind, that has far more parameters than there are tensors for it."""
    thread, budget = threading.get_ident(), parameters

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal budget
        budget -= threading.get_ident() == thread  # the hook is every thread's
        if budget < 0:
            raise ValueError(f"it asks for more than {parameters} parameters, far more than the file has tensors")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_filled(path: Path, state: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> None:
    """Checks that the file's tensors are those of the model that it describes, which is not allocated for that.

    Args:
        path: The file.
        state: Its tensors.
        build: Makes the model, on whatever device is the default.

    Raises:
        CheckpointError: If a tensor is missing, left over or of another shape, or the model has other large buffers.
    """
    misfit = f"checkpoint {path} does not fit its own description: "
    try:
        with torch.device("meta"), _at_most(2 * len(state) + 64):  # some are replaced, as a classifier
            model = build()
    except Exception as error:  # whatever a stranger's values do to timm's models
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{misfit}{reason}") from None
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name not in state:
            raise CheckpointError(f"{misfit}{name} is missing")
        if mismatch := unlike(state[name], tensor):
            raise CheckpointError(f"{misfit}{name} is {mismatch[0]}, the description asks for {mismatch[1]}")
    if surplus := [name for name in state if name not in tensors]:
        raise CheckpointError(f"{misfit}{surplus[0]} has no place in the model")
    # tables that are made anew, e.g. masks of windows, grow with the size of the images
    extra = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in tensors)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    if extra > stored + _SPARE_BYTES:
        raise CheckpointError(f"{misfit}it asks for {extra:,} bytes of tables beside {stored:,} bytes of weights")
