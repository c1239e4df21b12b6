"""What is compared: weights, their trainings and the settings they are evaluated at, from a YAML file.

A comparison of methods has an entry per method. An ablation has an entry per table, whose settings differ in one field
from the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mambascope.evaluation.published import IMAGENET_ROWS
from mambascope.models.weights import CONFIG_DIR
from mambascope.training.runs import find_config
from mambascope.utils import as_number, check_choice, flat

LIST_DIR = CONFIG_DIR / "compare"
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CELLS = ("important", "random", "least", "central")
TABLES = ("best", "gain")


def _check(condition: bool, name: str, accepted: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged into each other; whatever else the later one has replaces what the earlier one had."""
    result = dict(base)
    for change in changes:
        for key, value in change.items():
            inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if inner else value
    return result


@dataclass(frozen=True)
class Setting:
    """One row: how weights are run, or trained.

    Attributes:
        label: What it is called; by default, what it changes.
        model: Fields of the model's config to change, e.g. ``{"alpha": 0.5}`` or ``{"reduction": {"keep": 0.8}}``;
            mappings are merged. The model is built anew with them and gets the same weights.
        data: Options of the data module to change, e.g. ``{"img_size": 48}``; the model is then run at that size.
        training: What to change in the training config: the setting has a training of its own.
        cells: Which cells are read again: the most important ones, or as a control ``random`` ones, the
            ``least`` important ones or the most ``central`` ones, which are the same in every image.
        published: The paper's top-1 in per cent, on its own data; ``None`` where it has no such row.
    """

    label: str = ""
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    data: dict[str, Any] = field(default_factory=dict, hash=False)
    training: dict[str, Any] = field(default_factory=dict, hash=False)
    cells: str = CELLS[0]
    published: float | None = None

    def __post_init__(self) -> None:
        _check(isinstance(self.label, str), "label", "a text", self.label)
        for name in ("model", "data", "training"):
            _check(isinstance(getattr(self, name), dict), name, "a mapping", getattr(self, name))
        check_choice("cells", self.cells, CELLS)
        top1 = self.published
        _check(top1 is None or as_number(top1) is not None, "published", "a number", top1)
        if not self.label:
            changes = {**flat(self.model), **flat(self.data), **flat(self.training)}
            text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changes.items())
            object.__setattr__(self, "label", text or "as trained")


@dataclass(frozen=True)
class Entry:
    """One method, or one table of an ablation: its weights, and the settings they are evaluated at.

    The weights come from a training (``config``), from a file or timm (``net``), or from another entry (``start``
    alone).

    Attributes:
        label: Name in the legend, or title of the table.
        config: Training config, by name or path.
        options: What to change in it, in the form of a training config.
        start: Entry whose weights (of the same seed) the training starts from; without ``config``, whose weights are
            evaluated as they are.
        net: A model that is not trained here, as ``model.net`` in a training config: ``checkpoint``, and ``name`` and
            ``args`` where the file does not describe its model. ``{seed}`` in the checkpoint stands for the seed.
        settings: How it is evaluated. None: it is only trained, for other entries to start from.
        thresholds: η at which the dynamic inference of a MambaScope is timed; 0 and 1 are timed too.
        table: What a table asks: whether the paper's ``best`` setting is the best one here, or the ``gain`` of each
            setting over the first one at equal cost; ``None`` for a method.
    """

    label: str
    config: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    net: dict[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = (Setting(),)
    thresholds: tuple[float, ...] = THRESHOLDS
    table: str | None = None

    def __post_init__(self) -> None:
        _check(isinstance(self.label, str) and bool(self.label), "label", "a text", self.label)
        for name in ("config", "start"):
            value = getattr(self, name)
            _check(value is None or isinstance(value, str), name, "a name", value)
        for name in ("options", "net"):
            _check(isinstance(getattr(self, name), dict), name, "a mapping", getattr(self, name))
        sources = [n for n in ("config", "start", "net") if getattr(self, n)]
        _check(
            sources in (["config"], ["config", "start"], ["start"], ["net"]),
            "the source of the weights",
            "config, config with start, start, or net",
            " with ".join(sources) or "none",
        )
        _check(self.trained or not self.options, "options", "left out where nothing is trained", self.options)
        accepted = ("name", "args", "checkpoint")
        _check(set(self.net) <= set(accepted), "net", f"a mapping with {', '.join(accepted)}", self.net)
        if self.config is not None:
            find_config(self.config)
        etas = self.thresholds
        valid = isinstance(etas, (list, tuple)) and all(as_number(v) is not None and 0 < v < 1 for v in etas)
        _check(valid, "thresholds", "numbers between 0 and 1", etas)
        object.__setattr__(self, "thresholds", tuple(sorted(float(v) for v in etas)))
        object.__setattr__(self, "settings", _settings(self.settings))
        for setting in self.settings:
            unused = setting.training and not self.trained
            _check(not unused, "training", "left out where nothing is trained", setting.training)
        if self.table is not None:
            check_choice("table", self.table, TABLES)

    @property
    def trained(self) -> bool:
        """Whether it has a training of its own."""
        return self.config is not None


def _settings(values: Any) -> tuple[Setting, ...]:
    _check(isinstance(values, (list, tuple)), "settings", "a list", values)
    parsed = tuple(s if isinstance(s, Setting) else _parse(Setting, s, f"settings[{i}]") for i, s in enumerate(values))
    labels = [s.label for s in parsed]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    _check(not twice, "labels of settings", "different from each other", ", ".join(twice))
    return parsed


@dataclass(frozen=True)
class TimingArgs:
    """How time is measured.

    Attributes:
        batch_sizes: Images per call; the first one is the large batch of the plot's second panel.
        images: Images per round for the large batches; a quarter of them for batches of up to eight.
        rounds: Timed rounds, at most; the median counts.
        max_seconds: Rough limit for each batch size; at least three rounds are timed.
    """

    batch_sizes: tuple[int, ...] = (64, 1)
    images: int = 256
    rounds: int = 7
    max_seconds: float = 120.0

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        valid = isinstance(sizes, (list, tuple)) and bool(sizes) and all(_whole(s, 1) for s in sizes)
        _check(valid, "batch_sizes", "a list of integers >= 1", sizes)
        object.__setattr__(self, "batch_sizes", tuple(dict.fromkeys(sizes)))
        for name in ("images", "rounds"):
            _check(_whole(getattr(self, name), 1), name, "an integer >= 1", getattr(self, name))
        seconds = as_number(self.max_seconds)
        _check(seconds is not None and seconds > 0, "max_seconds", "a positive number", self.max_seconds)


@dataclass(frozen=True)
class Comparison:
    """A list.

    Attributes:
        title: Of the picture and the tables.
        entries: The methods or tables by name.
        baseline: Entry whose first setting measured times are divided by; ``None``: nothing is timed or drawn.
        curve: MambaScope entry that the rest is compared with; ``None`` for no comparison.
        seeds: Of the trainings; every entry is trained once for each.
        options: What to change in every training config.
        data: Data module (``class_path`` and ``init_args``, as in training configs) of entries that are not trained
            here; by default that of the run the weights lie in. Trained ones are evaluated on the validation data of
            their config. ``init_args`` alone changes those.
        image_sets: Whether weights that are not trained here are evaluated once for each seed, on images of its own
            (ScopeDigits only).
        timing: How time is measured.
        published: Sizes (``tiny``, ``small``, ``base``) whose published ImageNet rows are drawn, marked as such.
    """

    title: str
    entries: dict[str, Entry]
    baseline: str | None = None
    curve: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    image_sets: bool = False
    timing: TimingArgs = field(default_factory=TimingArgs)
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(isinstance(self.title, str), "title", "a text", self.title)
        _check(isinstance(self.entries, dict) and bool(self.entries), "entries", "a mapping by name", self.entries)
        entries = {}
        for name, value in self.entries.items():
            plain = isinstance(name, str) and name.replace("-", "_").isidentifier()
            _check(plain, "the name of an entry", "letters, digits, - and _", name)
            entries[name] = value if isinstance(value, Entry) else _parse(Entry, value, f"entries.{name}")
        object.__setattr__(self, "entries", entries)
        seeds = self.seeds
        valid = isinstance(seeds, (list, tuple)) and bool(seeds) and all(_whole(s, 0) for s in seeds)
        _check(valid, "seeds", "a list of integers >= 0", seeds)
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(seeds)))
        for name in ("options", "data"):
            _check(isinstance(getattr(self, name), dict), name, "a mapping", getattr(self, name))
        _check(isinstance(self.image_sets, bool), "image_sets", "true or false", self.image_sets)
        if not isinstance(self.timing, TimingArgs):
            object.__setattr__(self, "timing", _parse(TimingArgs, self.timing, "timing"))
        sizes = sorted({row.size for row in IMAGENET_ROWS})
        valid = isinstance(self.published, (list, tuple)) and set(self.published) <= set(sizes)
        _check(valid, "published", f"a list of {', '.join(sizes)}", self.published)
        self._check_references()

    def _check_references(self) -> None:
        shown = [name for name, entry in self.entries.items() if entry.settings]
        for name in ("baseline", "curve"):
            value = getattr(self, name)
            _check(value is None or value in shown, name, f"one of the entries {', '.join(shown)}", value)
        for name, entry in self.entries.items():
            if entry.start is not None:
                accepted = ", ".join(n for n in self.entries if n != name)
                _check(entry.start in self.entries, f"entries.{name}.start", f"one of {accepted}", entry.start)
            if entry.net and "checkpoint" not in entry.net and "class_path" not in self.data:
                raise ValueError(f"entries.{name} is not trained here: the list needs data with a class_path")
        for name in self.entries:
            self.chain(name)

    def chain(self, name: str) -> tuple[str, ...]:
        """The entries that a method's weights come from, first to last; the last one is the method.

        Raises:
            ValueError: If an entry starts from itself.
        """
        chain = [name]
        while (start := self.entries[chain[0]].start) is not None:
            if start in chain:
                raise ValueError(f"entries.{name}.start must not lead back to itself: {' <- '.join([start, *chain])}")
            chain.insert(0, start)
        return tuple(chain)

    def restricted(
        self, names: Sequence[str] | None, seeds: Sequence[int] | None, rows: Sequence[str] | None = None
    ) -> Comparison:
        """A part of the comparison.

        Args:
            names: Entries, which bring what they start from and the baseline; ``None``: all.
            seeds: Instead of the list's.
            rows: Labels of settings; the first setting of an entry, which the rest is compared with, stays beside
                them, and entries without any of them go.

        Raises:
            ValueError: If there is no such entry or row.
        """
        for name in names or ():
            _check(name in self.entries, "an entry", f"one of {', '.join(self.entries)}", name)
        chosen = list(self.entries if names is None else names)
        settings = {name: self._rows(name, rows) for name in chosen}
        if rows is not None:
            labels = [s.label for name in chosen for s in self.entries[name].settings]
            for row in rows:
                _check(row in labels, "a row", f"one of {', '.join(dict.fromkeys(labels))}", row)
            chosen = [name for name in chosen if settings[name]]
        curve = self.curve if self.curve in chosen else None
        roots = [*([self.baseline] if self.baseline else []), *chosen]
        kept = {link for name in roots for link in self.chain(name)}
        entries = {
            name: replace(entry, settings=settings.get(name) or (entry.settings if name == self.baseline else ()))
            for name, entry in self.entries.items()
            if name in kept
        }
        return replace(self, entries=entries, curve=curve, seeds=self.seeds if seeds is None else tuple(seeds))

    def _rows(self, name: str, rows: Sequence[str] | None) -> tuple[Setting, ...]:
        settings = self.entries[name].settings
        chosen = [rows is None or s.label in rows for s in settings]
        return tuple(s for i, s in enumerate(settings) if chosen[i] or (i == 0 and any(chosen)))


def _parse(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a mapping; mistakes are said to be at `where`."""
    accepted = {f.name: f for f in fields(kind)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(accepted)}, got {values!r}")
    unknown = sorted(str(key) for key in values if key not in accepted)
    if unknown:
        raise ValueError(f"{where} has no option {', '.join(unknown)}; it accepts {', '.join(accepted)}")
    needed = [
        n for n, f in accepted.items() if f.default is MISSING and f.default_factory is MISSING and n not in values
    ]
    if needed:
        raise ValueError(f"{where} needs {', '.join(needed)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def shipped_lists() -> dict[str, Path]:
    """The lists that come with the package, by name."""
    return {path.stem: path for path in sorted(LIST_DIR.glob("*.yaml"))}


def read_list(value: str) -> Comparison:
    """A list from its file, or the shipped one of that name.

    Raises:
        ValueError: If there is none, or something in it is wrong; the message says what and where.
    """
    path = Path(value) if Path(value).is_file() else shipped_lists().get(value)
    if path is None:
        raise ValueError(f"list {value!r} does not exist; the package has {', '.join(shipped_lists()) or 'none'}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"list {path} is not YAML: {' '.join(str(error).split())}") from None
    return _parse(Comparison, content, f"list {path.name}")
