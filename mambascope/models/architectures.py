"""The kinds of models there are, by the name that weights files carry: what the rest of the package asks of them.

A kind registers itself where its class stands, so that reading weights, training and the commands know no class. What
belongs to training, commands or plots is a dotted name (``"package.module:object"``), imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mambascope.models.configs import with_overrides


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        name: What weights files call it.
        config_class: Frozen dataclass of its sizes and options; the type of ``model.config`` tells what a model is.
        build: Makes a model with new weights from such a config: the model's class, or a function.
        entries: Config of each of its timm entries, by name.
        has_entry: Whether a name that is not in ``entries`` is one of its models.
        create: Makes the model of an entry from its name and a mapping of options; ``None`` for ``timm.create_model``.
        read_config: Makes a config from what a stranger's file says and the number of the file's tensors; ``None`` for
            the config's fields.
        write_config: Fields of a config that go into a file; ``None`` for all.
        settings: Attributes of a model that files keep in place of the config's fields, as they are set at the time.
        mark: End of a parameter name that every file of the kind has and no wrapper; empty if any name will do.
        additions: Starts of names of parameters that a model has beyond the one it may start from: they stay new.
        tables: Position tables, each with the one that it starts from where a file lacks it.
        extends: Architecture whose entries make this kind when ``keyword`` is given.
        keyword: That keyword.
        extend: Makes this kind's config from the other's, which has all other options, and the keyword's value.
        inputs: What its data give: ``"images"`` or ``"glimpses"``; data modules say so in their ``inputs``.
        module: The Lightning module that trains it.
        report: Called with the trained model, its data module, the run's folder, the entry's name and its options,
            writes the report and returns its table and what weights files keep of it.
        predict: Module with ``add_arguments``, ``given_options`` and ``run`` that classifies with it; ``None`` for the
            command's own.
    """

    name: str
    config_class: type[Any]
    build: Callable[..., Any]
    entries: Mapping[str, Any] = field(default_factory=dict)
    has_entry: Callable[[str], bool] | None = None
    create: Callable[[str, Mapping[str, Any]], Any] | None = None
    read_config: Callable[[dict[str, Any], int], Any] | None = None
    write_config: Callable[[Any], dict[str, Any]] | None = None
    settings: tuple[str, ...] = ()
    mark: str = ""
    additions: tuple[str, ...] = ()
    tables: Mapping[str, str | None] = field(default_factory=dict)
    extends: str | None = None
    keyword: str | None = None
    extend: Callable[[Any, Any], Any] | None = None
    inputs: str = "images"
    module: str = "mambascope.training.module:ClassifierModule"
    report: str = "mambascope.evaluation.after_training:report_training"
    predict: str | None = None

    def config(self, values: dict[str, Any], tensors: int) -> Any:
        """The config that a file with so many tensors describes.

        Raises:
            ValueError: If a field is unknown or has a value that is not accepted.
            TypeError: If it has one of another kind.
        """
        if self.read_config is not None:
            return self.read_config(values, tensors)
        accepted = {f.name for f in fields(self.config_class)}
        # what a kind does not have, files may say they lack
        return with_overrides(self.config_class(), {k: v for k, v in values.items() if v is not None or k in accepted})

    def config_values(self, config: Any) -> dict[str, Any]:
        """What a file says about a config."""
        return asdict(config) if self.write_config is None else self.write_config(config)


ARCHITECTURES: dict[str, Architecture] = {}
"""Every kind of model by name, in the order of registration."""


def register(architecture: Architecture) -> Architecture:
    """Makes a kind of model known to weights files, training and commands."""
    ARCHITECTURES[architecture.name] = architecture
    return architecture


def architecture_of(model: Any) -> Architecture:
    """The architecture of a model or of a config.

    Raises:
        ValueError: If none is registered.
    """
    config = getattr(model, "config", model)
    kinds = {architecture.config_class: architecture for architecture in ARCHITECTURES.values()}
    for kind in type(config).__mro__:
        if kind in kinds:
            return kinds[kind]
    raise ValueError(f"{type(model).__name__} is none of the architectures {', '.join(ARCHITECTURES)}")


def extension_of(architecture: Architecture, options: Mapping[str, Any]) -> Architecture | None:
    """The architecture that options of another one's entry or config ask for by its keyword; ``None`` for no other."""
    for kind in ARCHITECTURES.values():
        if kind.extends == architecture.name and kind.keyword is not None and options.get(kind.keyword) is not None:
            return kind
    return None


def configured(config: Any, options: Mapping[str, Any]) -> Any:
    """A config with some fields replaced; of another architecture's kind where its keyword is among the options.

    Raises:
        ValueError: If an option is neither a field nor such a keyword, or has a value that is not accepted.
    """
    accepted = {f.name for f in fields(config)}
    keywords = {kind.keyword: kind for kind in ARCHITECTURES.values() if kind.keyword not in (None, *accepted)}
    config = with_overrides(config, {name: value for name, value in options.items() if name not in keywords})
    for name, kind in keywords.items():
        if name is None or kind.extend is None or options.get(name) is None:
            continue
        if kind.extends != architecture_of(config).name:
            raise ValueError(f"{name} is for a plain {str(kind.extends).capitalize()}, not for {type(config).__name__}")
        config = kind.extend(config, options[name])
    return config


def entry_names() -> list[str]:
    """The names of all timm entries of this package."""
    return sorted(name for kind in ARCHITECTURES.values() for name in kind.entries)


def architecture_of_entry(name: str, options: Mapping[str, Any] | None = None) -> Architecture | None:
    """The architecture of the models that an entry makes from some options; ``None`` for an unknown name."""
    for kind in ARCHITECTURES.values():
        if name in kind.entries or (kind.has_entry is not None and kind.has_entry(name)):
            return extension_of(kind, options or {}) or kind
    return None


def import_object(dotted: str) -> Any:
    """What ``"package.module:name"`` or ``"package.module"`` stands for."""
    module, _, name = dotted.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded
