"""Where weights come from: a training, a file, or timm; and what that starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mambascope.compare.lists import Comparison, Setting, merged
from mambascope.training.runs import find_config

_QUIET = {"run": {"report": False, "loggers": ["csv"]}}  # the comparison is the report


def digest(*values: Any) -> str:
    """A short name for values, the same on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def fingerprint(checkpoint: Path) -> str:
    """A short name for the weights in a file."""
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Point:
    """A setting of an entry with the weights of one seed."""

    entry: str
    setting: Setting
    seed: int


@dataclass(frozen=True)
class Source:
    """Weights of every seed.

    Attributes:
        name: What it is called in messages.
        recipe: Names the training config, or the file, and what it starts from: the same recipe makes the same weights.
        config: The whole training config; ``None`` where nothing is trained.
        net: The model, where nothing is trained.
        start: What the training starts from.
    """

    name: str
    recipe: str
    config: Mapping[str, Any] | None
    net: Mapping[str, Any]
    start: Source | None

    @property
    def trained(self) -> bool:
        """Whether it is a training."""
        return self.config is not None

    @property
    def seeded(self) -> bool:
        """Whether every seed has weights of its own."""
        links = list(self.chain())
        return any(link.trained or "{seed}" in str(link.net.get("checkpoint")) for link in links)

    def chain(self) -> Iterator[Source]:
        """What the weights come from, first to last; the last one is this source."""
        if self.start is not None:
            yield from self.start.chain()
        yield self


def make_source(plan: Comparison, name: str, setting: Setting | None = None) -> Source:
    """The source of an entry's weights, or of a setting that has a training of its own."""
    entry = plan.entries[name]
    if not entry.trained and entry.start is not None:
        return make_source(plan, entry.start)
    start = None if entry.start is None else make_source(plan, entry.start)
    changes = setting.training if setting is not None else {}
    config = None
    if entry.config is not None:
        base = yaml.safe_load(Path(find_config(entry.config)).read_text(encoding="utf-8"))
        config = merged(base, plan.options, entry.options, changes, _QUIET)
    title = f"{name} {setting.label}" if setting is not None and changes else name
    recipe = digest(entry.net if config is None else config, None if start is None else start.recipe)
    return Source(title, recipe, config, entry.net, start)


def sources_of(plan: Comparison, name: str) -> Iterator[Source]:
    """What the settings of an entry need; the entry's own weights where it has no setting."""
    for setting in plan.entries[name].settings or (None,):
        yield make_source(plan, name, setting)
