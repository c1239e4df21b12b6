"""Weights in and out: official Vim ``.pth`` and MambaEye ``.pt``, Lightning ``.ckpt`` and our ``.safetensors``."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mambascope._version import __version__
from mambascope.eye.model import MambaEye
from mambascope.layers import resample_pos_embed
from mambascope.models.configs import with_overrides
from mambascope.models.description import (
    CheckpointError,
    check_archive,
    check_blocks,
    check_filled,
    check_tensors,
    check_use,
    checked_description,
    shortened,
    unlike,
)
from mambascope.models.meaning import CHOICES, MEANING, Difference, differences
from mambascope.models.scope import MambaScope
from mambascope.models.tables import POSITION_TABLES, other_stride, table_grid
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import SHIPPED, find_weights
from mambascope.peers.timm_classifier import START_ARGS, TimmConfig, create_timm_classifier
from mambascope.utils import _UMASK, atomic_path

_WRAPPERS = ("_orig_mod.", "module.", "model.", "backbone.")  # compile, DDP, a LightningModule, a segmentor or detector
ENCODER = "encoder."  # where a backbone for segmentors and detectors keeps it
_MARKS = ("cls_token", "init_fc.0.weight")  # a name that every Vim has, and one that every MambaEye has
_ARCHITECTURES: dict[str, type[VisionMamba] | type[MambaEye]] = {
    "vim": VisionMamba,
    "mambascope": MambaScope,
    "mambaeye": MambaEye,
}
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


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        matched: Loaded as they are.
        resampled: Position tables brought to another grid.
        new: Parameters of the model that keep their initial values.
        unused: Tensors of the file that the model has no place for.
        differs: Fields of the config that the model keeps with another value than the file's.
    """

    matched: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    differs: list[Difference] = field(default_factory=list)

    def _shown(self, name: str) -> str:
        keys = [str(key) for key in getattr(self, name)]
        return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")

    def __str__(self) -> str:
        lines = [f"{'matched':>9} {len(self.matched):4d}"]
        for name in ("resampled", "new", "unused", *(("differs",) if self.differs else ())):
            shown = self._shown(name)
            lines.append(f"{name:>9} {len(getattr(self, name)):4d}{': ' if shown else ''}{shown}")
        return "\n".join(lines)

    def notes(self) -> str:
        """One line on what is not as in the file; empty if everything is."""
        names = ("resampled", "new", "unused", "differs")
        return "; ".join(f"{name}: {self._shown(name)}" for name in names if getattr(self, name))


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


def strip_wrappers(state: dict[str, Tensor], description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Strips what wraps a module and stands before all of its names; drops the wrapper's other tensors."""
    # a classifier of timm's has no name in common with others: all of its module counts
    marks = ("",) if description.get("architecture") == "timm" else _MARKS
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
    if not any(f"{ENCODER}{mark}" in state for mark in _MARKS):
        return state, description
    own = {k.removeprefix(ENCODER): v for k, v in state.items() if k.startswith(ENCODER)}
    return own, {**description, "part": "backbone"}


def load_checkpoint(
    model: VisionMamba | MambaEye,
    path: str | os.PathLike[str],
    strict: bool = True,
    verbose: bool = True,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """Loads weights into a model; position tables are resampled to the model's grids.

    A plain Vim starts a MambaScope: its position table also gives the coarse one, and feature reuse stays new. It also
    starts a Vim with token reduction, whose own parameters stay new. The encoder of a segmentor or detector starts a
    classifier, whose head stays new. With ``strict=False`` weights without a stem start a model that has one, whose
    stem stays new, and the other way round.

    Args:
        model: A :class:`VisionMamba`, :class:`MambaScope` or :class:`MambaEye`.
        path: See :func:`read_state_dict`; also a folder that holds ``model.safetensors``, or a shipped model's name.
        strict: Whether tensors that are missing, left over or of another shape are an error, and fields of the config
            that say what the weights mean (:data:`mambascope.models.meaning.MEANING`) and differ from the file's. Those
            that stay free after training, as ``alpha``, are reported.
        verbose: Whether to print the report.
        ignore: Starts of names that may be left over, e.g. ``("head.",)`` for a model without a classifier.

    Raises:
        CheckpointError: If the file cannot be read, or does not fit and ``strict`` is set. The model is then unchanged.
    """
    path = find_weights(path)
    report = load_weights(model, *read_state_dict(path), f"checkpoint {path}", strict, ignore)
    if verbose:
        print(f"{path}\n{report}")
    return report


def load_weights(
    model: VisionMamba | MambaEye,
    source: Mapping[str, Tensor],
    description: Mapping[str, Any],
    name_of_source: str,
    strict: bool = True,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """What :func:`load_checkpoint` does with what :func:`read_state_dict` gave; ``name_of_source`` is for errors."""
    config, own = description.get("config", {}), describe(model)["config"]
    target = model.state_dict()
    loaded: dict[str, Tensor] = {}
    report = LoadReport()
    problems: list[str] = []
    start = isinstance(model, MambaScope) and not any(k.startswith(("reuse.", "pos_embed_coarse")) for k in source)
    reduced = any(k.startswith("reduction.") for k in source)
    fresh = (  # may start anew
        *(("reuse.",) if start else ()),
        *(() if reduced else ("reduction.",)),
        *(("head.", "norm_f.") if description.get("part") == "backbone" else ()),
    )
    report.differs = differences(config, own, (*MEANING, *CHOICES))
    meant = [found for found in report.differs if found.name not in CHOICES]
    problems += map(str, meant)
    # the shape of the first layer says it too, but not which option it is
    problems += [f"{found} (--model.net.args.in_chans)" for found in differences(config, own, ("in_chans",))]
    stems = stem_width(source), getattr(model.config, "stem_width", 0)
    other_stem: tuple[str, ...] = ()
    if stems[0] != stems[1]:
        problems.append(f"stem_width is {stems[0]} in the file and {stems[1]} in the model")
        other_stem = ("patch_embed.stem",)  # one line says it for all of them
    for name, wanted in target.items():
        found = source.get(name)
        coarse = name == "pos_embed_coarse"
        if coarse and found is None and start:
            found = source.get("pos_embed")
        apart = None if found is None else unlike(found, wanted)
        if (
            isinstance(model, VisionMamba)
            and name in POSITION_TABLES
            and found is not None
            and found.ndim == 3
            and found.shape[1] > 1
            and found.shape[::2] == wanted.shape[::2]
            and found.is_floating_point()
        ):
            new_grid = (model.grid[0] // 2, model.grid[1] // 2) if coarse else model.grid
            if found is source.get("pos_embed") and (other := other_stride(source, model, config)):
                old_grid: tuple[int, int] | None = other[0].grid
                if not coarse:
                    report.differs.append(other[1])
                    problems.append(other[2])
            else:
                old_grid = table_grid(found.shape[1] - 1, config, coarse and not start, new_grid)
            if old_grid is None:
                report.new.append(name)
                problems.append(f"{name} has {found.shape[1] - 1} rows, which is no square grid")
            elif old_grid == new_grid:
                loaded[name] = found
                report.matched.append(name)
            else:
                loaded[name] = resample_pos_embed(found, old_grid, new_grid, model.config.cls_position)
                report.resampled.append(name)
        elif found is not None and apart is None:
            loaded[name] = found
            report.matched.append(name)
        else:
            report.new.append(name)
            if found is None and not name.startswith((*fresh, *other_stem)):
                problems.append(f"{name} is missing")
            elif apart is not None and not name.startswith(other_stem):
                problems.append(f"{name} is {apart[0]} in the file and {apart[1]} in the model")
    report.unused = [k for k in source if k not in loaded]
    surplus = [k for k in report.unused if k not in target and not k.startswith((*ignore, *other_stem))]
    problems += [f"{k} has no place in the model" for k in surplus]
    if not report.matched:
        problems.insert(0, "no tensor of the file has a place in the model")
    if problems and (strict or not report.matched):
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        given = ", ".join(found.argument for found in report.differs)
        ways = [f"create the model with {given}, as mambascope.load does"] if meant else []
        ways += ["pass strict=False to load what fits"] if report.matched else []
        advice = f" ({', or '.join(ways)})" if ways else ""
        raise CheckpointError(
            f"{name_of_source} does not fit {type(model).__name__}{advice}: {'; '.join(problems[:4])}{more}"
        )
    with torch.no_grad():
        for name, value in loaded.items():
            target[name].copy_(value)
    return report


def stem_width(state: Mapping[str, Tensor]) -> int:
    """Width of the stem that weights have; 0 without one. Files from elsewhere do not say it."""
    projection = state.get("patch_embed.stem_proj.weight")
    return 0 if projection is None or projection.ndim < 2 else projection.shape[1] // 2


os.umask(_UMASK)


def describe(model: VisionMamba | MambaEye, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file says about its model: architecture, config as it is set now, and the model's own description."""
    config = asdict(model.config)
    architecture = "mambaeye" if isinstance(model, MambaEye) else "vim"
    if isinstance(model.config, TimmConfig):
        architecture = "timm"
    if isinstance(model, MambaScope):
        architecture = "mambascope"
        config.update(alpha=model.alpha, threshold=model.threshold, temperature=model.temperature)
    if architecture == "timm":  # where weights came from is no part of the model
        config["args"] = {key: value for key, value in config["args"].items() if key not in START_ARGS}
    known = {"architecture": architecture, "config": config, "version": __version__}
    told = {**model.description, **(extra or {}), **known}
    if 0 < model.num_classes < len(told.get("labels") or ()):  # of a classifier that was replaced
        told.pop("labels")
    return told


def save_safetensors(
    model: VisionMamba | MambaEye, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes weights with the model's config, so that :func:`load_model` can rebuild it.

    Args:
        model: The model; ``alpha``, ``threshold`` and ``temperature`` are stored as they are set now.
        path: File to write, atomically.
        extra: More JSON-serialisable facts (labels, transform, figures), added to ``model.description``.
    """
    description = describe(model, extra)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(state, metadata={"mambascope": json.dumps(description)}))


def _config(architecture: str, config: dict[str, Any]) -> Any:
    """The config that a file describes."""
    if architecture == "timm":
        args = config.get("args", {})
        if not isinstance(args, Mapping):
            raise ValueError(f"args must be a mapping, got {shortened(args)}")
        if refused := sorted({*args} & {*START_ARGS} - {"pretrained"}):
            raise ValueError(f"a weights file may not say {', '.join(refused)}")
        # the weights follow: nothing is downloaded
        return TimmConfig(**{**config, "args": {k: v for k, v in args.items() if k != "pretrained"}})
    return with_overrides(_ARCHITECTURES[architecture].config_class(), config)  # type: ignore[type-var]


def _build(architecture: str, config: Any) -> Any:
    """A model with new weights."""
    kind: Any = create_timm_classifier if architecture == "timm" else _ARCHITECTURES[architecture]
    return kind(config)


def described_config(path: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Any:
    """The config of the model that a file describes; ``None`` if it describes none.

    Nothing is taken on trust: the file's tensors are all that the model has.

    Args:
        path: The file.
        state: See :func:`read_state_dict`.
        description: See :func:`read_state_dict`.

    Raises:
        CheckpointError: If the description is not that of a model, or its tensors are not the file's.
    """
    architecture, config = description.get("architecture"), description.get("config")
    if architecture not in (*_ARCHITECTURES, "timm") or config is None:
        return None
    if architecture != "timm":
        check_blocks(path, state, config.get("depth", _ARCHITECTURES[architecture].config_class().depth))
    try:
        made = _config(architecture, config)
        if isinstance(made, TimmConfig):
            made.check_sizes(len(state))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own description: {' '.join(str(error).split())[:300]}"
        ) from None
    check_filled(path, state, lambda: _build(architecture, made))
    check_use(path, description, made)
    return made


def load_model(path: str | os.PathLike[str]) -> Any:
    """Builds the model that a file of ours describes and loads its weights; the model is in evaluation mode.

    It is a :class:`VisionMamba`, :class:`MambaScope`, :class:`MambaEye` or a classifier of timm's, as the file says;
    the file's description is at ``model.description``.

    Args:
        path: A file, a folder that holds ``model.safetensors``, or the name of a model that is shipped with the
            package (``"scopedigits"``).

    Raises:
        CheckpointError: If the file cannot be read or does not say which model it belongs to.
    """
    path = find_weights(path)
    state, description = read_state_dict(path)
    config = described_config(path, state, description)
    if config is None:
        raise CheckpointError(
            f"checkpoint {path} does not describe its model; create the model with timm.create_model and call "
            "load_checkpoint"
        )
    try:
        model = _build(description["architecture"], config)
        model.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own description: {str(error).splitlines()[0]}"
        ) from None
    model.description = description
    return model.eval()
