"""Data modules by name and from the configurations of runs, which may have come with weights from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule

from mambascope.data import DATA_MODULES
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.errors import DataError
from mambascope.models.description import plain_values, shortened
from mambascope.models.weights import CONFIG_DIR, RUN_CONFIG, SHIPPED

_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_PLAIN_TYPES = (str, int, float, bool, type(None), Path, list, tuple, dict, ...)
_LONGEST = 1000  # characters of a reason that others give


def run_config(checkpoint: Path) -> Path | None:
    """The configuration of the run that a checkpoint lies in, beside it or one folder up, or a shipped model's."""
    for name, path in SHIPPED.items():
        if checkpoint == path:
            return CONFIG_DIR / f"{name}.yaml"
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / RUN_CONFIG).is_file():
            return folder / RUN_CONFIG
    return None


def is_module_name(name: str) -> bool:
    """Whether a text is the name of a data module: one of this package's, or ``package.module.Class`` and no folder."""
    return name in DATA_MODULES or (_CLASS_PATH.fullmatch(name) is not None and not Path(name).exists())


def fit_data(module: LightningDataModule, model: Any, where: str) -> None:
    """Makes a data module's images fit a model, as far as it says how many classes and channels they have.

    Args:
        module: The data module.
        model: What takes its images.
        where: What to call the place that it comes from.

    Raises:
        DataError: They do not fit.
    """
    classes = getattr(module, "num_classes", None)
    if classes is not None and classes != model.num_classes:
        raise DataError(f"the data of {where} have {classes} classes, the model has {model.num_classes}")
    if isinstance(module, ResumableDataModule):
        module.fit_channels(model.in_chans)


def named_module(name: str, config: Path | None) -> LightningDataModule:
    """The data module that a user names, as for training: its class is imported.

    Args:
        name: Of one of this package's modules, or ``package.module.Class``.
        config: Configuration of a run; it gives the arguments if it was trained with such data.

    Raises:
        DataError: There is no such class, or its data cannot be opened.
    """
    path = f"mambascope.data.{name}" if name in DATA_MODULES else name
    try:
        kind = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2], None)
    except ImportError as error:
        raise DataError(f"data {name} are neither a folder nor a data module: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, LightningDataModule)):
        raise DataError(f"data {name} are neither a folder nor a data module")
    arguments: Any = {}
    section = _run_section(config) if config is not None else None
    if isinstance(section, Mapping) and _imported(section.get("class_path")) is kind:
        arguments = section.get("init_args") or {}
        if foreign := _foreign_arguments(kind, arguments):
            raise DataError(f"the data of {config} cannot be opened: {foreign} is not imported by {path}")
    return open_data({"class_path": path, "init_args": arguments}, name, LightningDataModule)


def trained_on(config: Path | None, kind: type) -> bool:
    """Whether a run's configuration names a data module of this class; False where it cannot be read."""
    if config is None:
        return False
    try:
        section = _run_section(config)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(section, Mapping) and _imported(section.get("class_path")) is kind


def _imported(path: Any) -> Any:
    """What ``package.module.name`` is, if that module is imported already or of this package's data."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    module = module or "mambascope.data"
    if module not in sys.modules and not module.startswith("mambascope.data."):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _foreign_arguments(kind: type, arguments: Any) -> str:
    """What arguments name that would be imported; empty if nothing. A text for a class is the name of one."""
    try:
        types = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    except Exception:  # of names that are known to type checkers only
        types = {}

    def foreign(value: Any, plain: bool) -> bool:
        if isinstance(value, Mapping):
            path = value.get("class_path")
            return (path is not None and _imported(path) is None) or any(foreign(v, plain) for v in value.values())
        if isinstance(value, list):
            return any(foreign(v, plain) for v in value)
        return isinstance(value, str) and not plain and "." in value and _imported(value) is None

    for key, value in arguments.items() if isinstance(arguments, Mapping) else ():
        if foreign(value, _is_plain(types.get(key))):
            return f"{key} {shortened(value)}"
    return ""


def _is_plain(annotation: Any) -> bool:
    """Whether an argument takes numbers and texts only, no objects."""
    if typing.get_origin(annotation) is Literal:
        return True
    parts = typing.get_args(annotation)
    return all(map(_is_plain, parts)) if parts else annotation in _PLAIN_TYPES


def _run_section(config: Path) -> Any:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    return plain_values(content.get("data") if isinstance(content, Mapping) else None)


def run_module(config: Path) -> ResumableDataModule:
    """The data module of a run's configuration.

    The file may have come with weights from elsewhere: only classes of this package, or ones that are imported already,
    are made from it.

    Raises:
        DataError: The configuration is damaged, names another class, or its data cannot be opened.
    """
    try:
        section = _run_section(config)
        if foreign := _foreign(section):
            raise DataError(f"the data of {config} cannot be opened: {foreign} is none of this package's data modules")
        return open_data(section, str(config))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        whole = reason if str(config) in reason else f"the data of {config} cannot be opened: {reason}"
        raise DataError(f"{whole}; pass --data") from None


def _foreign(section: Any) -> str:
    """What a ``data`` section names that is not of this package, and would be imported; empty if nothing."""
    path = section.get("class_path") if isinstance(section, Mapping) else section
    kind = _imported(path)
    if not (isinstance(kind, type) and issubclass(kind, ResumableDataModule) and isinstance(section, Mapping)):
        return shortened(path)
    arguments = section.get("init_args") or {}
    for key, parameter in inspect.signature(kind).parameters.items() if isinstance(arguments, Mapping) else ():
        value = arguments.get(key)
        fields = isinstance(value, Mapping) and "class_path" not in value
        if is_dataclass(parameter.default) and value is not None and not fields:
            return f"{key} {shortened(value)}"  # a text or a class_path would be imported, too
    return ""


def open_data(section: Any, where: str, base: type = ResumableDataModule) -> Any:
    """The data module that a ``data`` section of a training config describes.

    Args:
        section: With ``class_path`` and ``init_args``.
        where: What to call the place it stands in.
        base: What its class must be.

    Raises:
        DataError: The section is wrong, or the data cannot be opened.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        # of the parser's account of what it tried, that of the class itself
        reason = re.sub(r"^Parser key .*? Errors: - (.*?) - Expected a <class 'NoneType'>.*$", r"\1", reason)
        reason = re.sub(r"^Problem with given class_path '[^']*': ", "", reason)
        raise DataError(f"the data of {where} cannot be opened: {reason[:_LONGEST]}") from None
