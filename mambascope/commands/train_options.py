"""The command line of ``tools/train_cls.py`` before it is parsed: configs by name, the resumed run, which model."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from mambascope.models.architectures import ARCHITECTURES, Architecture, architecture_of_entry
from mambascope.models.retired import LAST_COMMIT, RETIRED_LOSS, without_other_kinds, without_retired_loss
from mambascope.models.weights import RUN_CONFIG
from mambascope.training.args import ModelArgs, RunArgs
from mambascope.training.runs import find_checkpoint, find_config, run_of, shipped_configs

DEFAULT_CONFIG = "scopedigits"


class OneLineParser(LightningArgumentParser):
    """Says in one line what is wrong, and reads configs of runs that are older than an option's removal."""

    def parse_string(self, content: str, path: str | os.PathLike[str] = "", **kwargs: Any) -> Any:
        """Parses a config."""
        try:
            content = without_other_kinds(without_retired_loss(content))
        except ValueError as error:
            self.error(f"{path or 'config'}: {error}")
        return super().parse_string(content, path, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and ends with status 2."""
        message = " ".join(message.split())
        # only data modules have options without a default, and their names come without a prefix
        missing = re.fullmatch(r"the following arguments are required: ([\w, ]+)", message)
        if missing:
            message = f"required: {', '.join(f'--data.{name}' for name in missing[1].split(', '))}"
        if removed := [name for name in RETIRED_LOSS if f"loss.{name}" in message or f"'{name}'" in message]:
            message = f"{message}: {removed[0]} was removed; commit {LAST_COMMIT} is the last one that has it"
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


class CommandLine(NamedTuple):
    """A command line that stands for itself.

    Attributes:
        args: With configs and checkpoints as paths, so that every process that gets them means the same files.
        architecture: Kind of model that they name.
    """

    args: list[str]
    architecture: Architecture


def complete_args(argv: Sequence[str]) -> CommandLine:
    """Adds the config that the command line leaves out.

    Without ``--config`` that is the built-in data's, or the resumed run's own. Shipped configs may be named without
    their path. ``last`` and ``best`` become the checkpoint's path. What is complete stays as it is.

    Raises:
        ValueError: If a config or a checkpoint does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--ckpt_path")
    parser.add_argument("--run.root", dest="root", default=RunArgs.root)
    parser.add_argument("--run.name", dest="name")
    parser.add_argument("--model.net.name", dest="model")
    options, rest = parser.parse_known_args(list(argv))
    configs = [find_config(config) for config in options.config]
    if options.ckpt_path == "auto":
        rest += ["--ckpt_path", "auto"]  # the same command line as at the start, so that its configs and name hold
    elif options.ckpt_path not in (None, "null"):
        checkpoint = find_checkpoint(options.ckpt_path, options.root, options.name)
        run = run_of(checkpoint)
        if not configs and run is not None:
            configs = [str(run / RUN_CONFIG)]
        if run is not None and options.name == run.name:
            options.name = None  # the checkpoint says it
        rest += ["--ckpt_path", str(checkpoint)]
    configs = configs or [str(shipped_configs()[DEFAULT_CONFIG])]
    for option, value, default in (
        ("--run.root", options.root, RunArgs.root),
        ("--run.name", options.name, None),
        ("--model.net.name", options.model, None),
    ):
        rest += [option, value] if value != default else []
    args = [part for config in configs for part in ("--config", config)] + rest
    return CommandLine(args, _architecture(configs, options.model, rest))


def _architecture(configs: Sequence[str], name: str | None, rest: Sequence[str]) -> Architecture:
    """The architecture of the model that the command line or its last config names."""
    sections = [section for config in reversed(configs) if (section := _model_section(config))]
    name = name or next((text for section in sections if isinstance(text := section.get("name"), str)), ModelArgs.name)
    options = dict(next((args for section in sections if isinstance(args := section.get("args"), Mapping)), {}))
    # of the model's options on the command line it counts only that they are there
    options |= {arg.split("=")[0].split(".")[3]: True for arg in rest if arg.startswith("--model.net.args.")}
    # the Lightning module will refuse a name that is none
    return architecture_of_entry(name, options) or ARCHITECTURES["mambascope"]


def _model_section(config: str) -> dict[str, Any]:
    """What a config says about the model; empty where the parser will say what is wrong with it."""
    try:
        section = yaml.safe_load(Path(config).read_text(encoding="utf-8"))["model"]["net"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return section if isinstance(section, dict) else {}
