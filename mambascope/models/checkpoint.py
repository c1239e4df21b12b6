"""Weights into models: official Vim ``.pth`` and MambaEye ``.pt``, Lightning ``.ckpt`` and our ``.safetensors``.

:func:`load_checkpoint` fits a file to a model that exists, :func:`load_model` makes the model that a file describes.
Files are read by :mod:`~mambascope.models.reading` and written by :mod:`~mambascope.models.saving`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambascope.models.architectures import ARCHITECTURES, Architecture, architecture_of, extension_of
from mambascope.models.description import CheckpointError, check_blocks, check_filled, check_use, unlike
from mambascope.models.meaning import CHOICES, MEANING, Difference, differences
from mambascope.models.reading import read_state_dict
from mambascope.models.saving import describe, save_safetensors
from mambascope.models.tables import fit_table
from mambascope.models.weights import find_weights

__all__ = [
    "CheckpointError",
    "LoadReport",
    "describe",
    "described_config",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "read_state_dict",
    "save_safetensors",
    "stem_width",
]


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


# ---- a file into a model that exists -----------------------------------------------------------------------------


def load_checkpoint(
    model: Any,
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
        model: A model of one of :data:`mambascope.models.architectures.ARCHITECTURES`.
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
    model: Any,
    source: Mapping[str, Tensor],
    description: Mapping[str, Any],
    name_of_source: str,
    strict: bool = True,
    ignore: tuple[str, ...] = (),
) -> LoadReport:
    """What :func:`load_checkpoint` does with what :func:`read_state_dict` gave; ``name_of_source`` is for errors.

    Configs are compared, then stems, then every tensor finds its place, and what is left over is looked at; only if
    nothing speaks against it are the values copied.
    """
    fit = _Fit(model, source, description)
    fit.compare_configs()
    fit.compare_stems()
    for name in fit.target:
        fit.place(name)
    fit.look_at_leftovers(ignore)
    if fit.problems and (strict or not fit.report.matched):
        raise CheckpointError(f"{name_of_source} does not fit {type(model).__name__}{fit.complaint()}")
    with torch.no_grad():
        for name, value in fit.values.items():
            fit.target[name].copy_(value)
    return fit.report


class _Fit:
    """How the tensors of a file fit a model.

    Attributes:
        target: Tensors of the model by name; nothing is written to them.
        values: What each of them gets.
        report: What becomes of every tensor.
        problems: What speaks against it, a few words each.
    """

    def __init__(self, model: Any, source: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        self.model, self.source = model, source
        self.config: Mapping[str, Any] = description.get("config", {})
        self.target: dict[str, Tensor] = model.state_dict()
        self.values: dict[str, Tensor] = {}
        self.report = LoadReport()
        self.problems: list[str] = []
        self.architecture: Architecture = architecture_of(model)
        self._other_meaning = False
        self._other_stem: tuple[str, ...] = ()  # starts of names that one line of the problems speaks for
        additions = self.architecture.additions
        self._starts = not any(name.startswith(additions) for name in source) if additions else False
        self._may_be_new = (
            *(additions if self._starts else ()),
            *(("head.", "norm_f.") if description.get("part") == "backbone" else ()),
        )

    def compare_configs(self) -> None:
        """Notes the fields that give the same tensors another meaning, and those that are free."""
        config = describe(self.model)["config"]
        self.report.differs = differences(self.config, config, (*MEANING, *CHOICES))
        meant = [str(difference) for difference in self.report.differs if difference.name not in CHOICES]
        self._other_meaning = bool(meant)
        self.problems += meant
        # the shape of the first layer says it too, but not which option it is
        channels = differences(self.config, config, ("in_chans",))
        self.problems += [f"{difference} (--model.net.args.in_chans)" for difference in channels]

    def compare_stems(self) -> None:
        """Notes another stem once, instead of every tensor of it."""
        stems = stem_width(self.source), getattr(self.model.config, "stem_width", 0)
        if stems[0] != stems[1]:
            self.problems.append(f"stem_width is {stems[0]} in the file and {stems[1]} in the model")
            self._other_stem = ("patch_embed.stem",)

    def place(self, name: str) -> None:
        """Finds what one tensor of the model gets."""
        source = name
        if name not in self.source and self._starts:
            source = self.architecture.tables.get(name) or name
        tensor, target = self.source.get(source), self.target[name]
        if tensor is None:
            self._keep(name, None if name.startswith(self._may_be_new) else f"{name} is missing")
        elif name in self.architecture.tables and _is_table(tensor, target):
            self._place_table(name, source)
        elif (apart := unlike(tensor, target)) is None:
            self.values[name] = tensor
            self.report.matched.append(name)
        else:
            self._keep(name, f"{name} is {apart[0]} in the file and {apart[1]} in the model")

    def _keep(self, name: str, problem: str | None) -> None:
        """A tensor of the model keeps its initial values."""
        self.report.new.append(name)
        if problem is not None and not name.startswith(self._other_stem):
            self.problems.append(problem)

    def _place_table(self, name: str, source: str) -> None:
        fitted = fit_table(name, source, self.source, self.model, self.config)
        if fitted.stride is not None:
            self.report.differs.append(fitted.stride[0])
            self.problems.append(fitted.stride[1])
        if fitted.table is None:
            self._keep(name, f"{name} has {self.source[source].shape[1] - 1} rows, which is no square grid")
            return
        self.values[name] = fitted.table
        (self.report.resampled if fitted.resampled else self.report.matched).append(name)

    def look_at_leftovers(self, ignore: tuple[str, ...]) -> None:
        """Notes tensors that have no place, and a file of which none has one."""
        self.report.unused = [name for name in self.source if name not in self.values]
        expected = (*ignore, *self._other_stem)
        surplus = (name for name in self.report.unused if name not in self.target and not name.startswith(expected))
        self.problems += [f"{name} has no place in the model" for name in surplus]
        if not self.report.matched:
            self.problems.insert(0, "no tensor of the file has a place in the model")

    def complaint(self) -> str:
        """What to do about the problems, and the first of them."""
        arguments = ", ".join(difference.argument for difference in self.report.differs)
        ways = [f"create the model with {arguments}, as mambascope.load does"] if self._other_meaning else []
        ways += ["pass strict=False to load what fits"] if self.report.matched else []
        advice = f" ({', or '.join(ways)})" if ways else ""
        more = f" and {len(self.problems) - 4} more" if len(self.problems) > 4 else ""
        return f"{advice}: {'; '.join(self.problems[:4])}{more}"


def _is_table(tensor: Tensor, target: Tensor) -> bool:
    """Whether a tensor is a position table that can be brought to the grid of another one."""
    rows_only = tensor.ndim == 3 and tensor.shape[1] > 1 and tensor.shape[::2] == target.shape[::2]
    return rows_only and tensor.is_floating_point()


def stem_width(state: Mapping[str, Tensor]) -> int:
    """Width of the stem that weights have; 0 without one. Files from elsewhere do not say it."""
    projection = state.get("patch_embed.stem_proj.weight")
    return 0 if projection is None or projection.ndim < 2 else projection.shape[1] // 2


# ---- the model that a file describes -----------------------------------------------------------------------------


def described_architecture(description: Mapping[str, Any]) -> Architecture | None:
    """The kind of model that a file describes; ``None`` if it describes none."""
    architecture, config = ARCHITECTURES.get(str(description.get("architecture"))), description.get("config")
    if architecture is None or config is None:
        return None
    return extension_of(architecture, config) or architecture


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
    architecture = described_architecture(description)
    if architecture is None:
        return None
    values = description["config"]
    depth = getattr(architecture.config_class, "depth", None)  # the default of a field is a class attribute
    if depth is not None:
        check_blocks(path, state, values.get("depth", depth))
    try:
        config = architecture.config(values, len(state))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own description: {' '.join(str(error).split())[:300]}"
        ) from None
    check_filled(path, state, lambda: architecture.build(config))
    check_use(path, description, config)
    return config


def load_model(path: str | os.PathLike[str]) -> Any:
    """Builds the model that a file of ours describes and loads its weights; the model is in evaluation mode.

    It is a ``VisionMamba``, ``MambaScope``, ``MambaEye`` or a classifier of timm's, as the file says; the file's
    description is at ``model.description``.

    Args:
        path: A file, a folder that holds ``model.safetensors``, or the name of a model that is shipped with the
            package (``"scopedigits"``).

    Raises:
        CheckpointError: If the file cannot be read or does not say which model it belongs to.
    """
    path = find_weights(path)
    state, description = read_state_dict(path)
    architecture, config = described_architecture(description), described_config(path, state, description)
    if architecture is None:
        raise CheckpointError(
            f"checkpoint {path} does not describe its model; create the model with timm.create_model and call "
            "load_checkpoint"
        )
    try:
        model: Any = architecture.build(config)
        model.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own description: {str(error).splitlines()[0]}"
        ) from None
    model.description = description
    return model.eval()
