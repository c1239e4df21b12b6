"""What every room needs: argument checks, files written whole, evaluation mode, devices, and errors of one line."""

from __future__ import annotations

import contextlib
import csv
import math
import numbers
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from mambascope._names import as_json, open_streams, printable


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raises ``ValueError``, naming the argument, unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in accepted)}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raises ``ValueError``, naming the argument, unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def share(name: str, value: Any, *, below_one: bool = False) -> float:
    """Returns a number in [0, 1] as a float; raises ``ValueError``, naming it, for anything else."""
    number = as_number(value)
    if number is None or not 0 <= number <= 1 or (below_one and number == 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value!r}")
    return number


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for key, value in mapping.items():
        inner = isinstance(value, Mapping) and bool(value)
        result |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return result


def as_number(value: Any) -> float | None:
    """A Python, NumPy or one-element torch number as a float; ``None`` for anything else, also for bool and NaN."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        return None
    return float(value)


_UMASK = os.umask(0)  # it can only be read by changing it, for all threads: once, here
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside ``path``, renamed to it when the block succeeds; a failure changes nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` in evaluation mode without gradients, and back as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a loader's batch.

    Raises:
        ValueError: The batch is not (images [B, C, H, W], labels [B]).
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"a loader for evaluation must give (images, labels), got {type(batch).__name__}")
    images, labels = batch[0], torch.as_tensor(batch[1])
    if not isinstance(images, Tensor) or images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = [list(getattr(part, "shape", [])) for part in (images, labels)]
        raise ValueError(f"a loader for evaluation must give images [B, C, H, W] and labels [B], got {shapes}")
    return images, labels


def model_device(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:<n>``.

    Raises:
        ValueError: An unknown device, or CUDA where there is none.
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


class RowWriter:
    """Writes rows of results as they come, as CSV, JSON lines or a table whose first column is a label.

    Args:
        stream: Where to.
        kind: ``"csv"``, ``"jsonl"`` or ``"table"``.
        columns: Names of a row's values.
        labels: What the labels may be, as far as it is known; they set the width of their column.
        heading: Line above a table, without the first column.
    """

    def __init__(
        self, stream: IO[str], kind: str, columns: Iterable[str], labels: Sequence[str] | None, heading: str
    ) -> None:
        self.stream, self.kind = stream, kind
        # a stream has no longest label yet; those of the model are there
        self.width = min(40, max([5, *(len(str(label)) for label in labels or [])]))
        if kind == "csv":
            csv.writer(stream, lineterminator="\n").writerow(columns)
        elif kind == "table":
            print(f"{'label':<{self.width}}  {heading}", file=stream)

    def write(self, values: Mapping[str, Any], label: str, line: str) -> None:
        """Writes one row: its values by name, or in a table its label and the rest of the line."""
        rounded = {key: round(v, 6) if isinstance(v, float) else v for key, v in values.items()}
        if self.kind == "csv":
            csv.writer(self.stream, lineterminator="\n").writerow(rounded.values())
        elif self.kind == "jsonl":
            print(as_json(rounded), file=self.stream)
        else:
            shown = label if len(label) <= self.width else label[: self.width - 1] + "…"
            print(f"{shown:<{self.width}}  {line}", file=self.stream)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file that has its name only when it is complete (``NAME.part`` until then)."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        yield stream
    os.replace(part, path)
