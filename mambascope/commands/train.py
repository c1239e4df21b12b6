"""The command line of ``tools/train_cls.py``: LightningCLI with run directories, exact resume and short errors."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambascope._names import open_streams, printable
from mambascope.data import DataError, load_data_modules
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.errors import worker_failure
from mambascope.eye import MambaEye
from mambascope.eye.module import EyeModule
from mambascope.models import MambaScope
from mambascope.models.architectures import ARCHITECTURES, architecture_of_entry, import_object
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.description import TRANSFORM
from mambascope.models.retired import LAST_COMMIT, RETIRED_LOSS, without_other_kinds, without_retired_loss
from mambascope.training.args import ModelArgs, RunArgs
from mambascope.training.base import TrainModule, is_main_process
from mambascope.training.checkpointing import NonFiniteLossError, RunCheckpoint
from mambascope.training.cluster import slurm_plugins
from mambascope.training.ema import EmaWeights
from mambascope.training.export import ExportWeights
from mambascope.training.io import AtomicCheckpointIO, read_training_checkpoint
from mambascope.training.limits import planned_steps, reached_limit
from mambascope.training.loggers import make_loggers
from mambascope.training.progress import TrainProgress
from mambascope.training.runs import (
    CHECKPOINT_DIR,
    CONFIG_NAME,
    LAST_NAME,
    LOG_DIR,
    WEIGHTS_NAME,
    find_checkpoint,
    find_config,
    hold_run,
    in_use,
    leave_runs,
    name_of,
    new_run,
    run_of,
    scratch_run,
    shipped_configs,
)
from mambascope.training.signals import TrainingStopped
from mambascope.utils import atomic_path

DEFAULT_CONFIG = "scopedigits"
REPORT_DIR = "report"
_DEBUG = "MAMBASCOPE_DEBUG"
_RESUMED = "MAMBASCOPE_RESUMED_CHECKPOINT"


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


def data_facts(datamodule: Any) -> dict[str, Any]:
    """Fields of the model's config that follow from the data, unless they are set."""
    facts = {name: getattr(datamodule, name, None) for name in ("num_classes", "img_size", "in_chans", "patch_size")}
    return {name: value for name, value in facts.items() if value is not None}


def module_class(args: Sequence[str]) -> type[TrainModule]:
    """The Lightning module that trains the model which the command line or its last config names."""

    def says(config: str, field: str) -> Any:
        try:
            return yaml.safe_load(Path(config).read_text(encoding="utf-8"))["model"]["net"][field]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return None  # the parser will say what is wrong with it

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config", "-c", action="append", default=[])
    known.add_argument("--model.net.name", dest="name")
    given, rest = known.parse_known_args(list(args))
    configs = list(reversed(given.config))
    name = given.name or next((value for config in configs if (value := says(config, "name"))), ModelArgs.name)
    options = next((value for config in configs if isinstance(value := says(config, "args"), dict)), {})
    options |= {arg.split("=")[0].split(".")[3]: True for arg in rest if arg.startswith("--model.net.args.")}
    architecture = architecture_of_entry(name, options) or ARCHITECTURES["mambascope"]
    return import_object(architecture.module)


class TrainCLI(LightningCLI):
    """Parses the options, makes the run directory, trains, exports and reports.

    Args:
        args: Command line; see :func:`complete_args`.

    Attributes:
        run_dir: The run directory.
        resume_from: The checkpoint that is resumed, or ``None``.
    """

    run_dir: Path
    resume_from: Path | None

    def __init__(self, args: Sequence[str]) -> None:
        load_data_modules()  # --data finds by name those that are imported
        super().__init__(
            module_class(args),
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=OneLineParser,
            # an abbreviation would turn a wrong name into another option
            parser_kwargs={
                "description": "Train a MambaScope, Vision Mamba or MambaEye classifier.",
                "allow_abbrev": False,
            },
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; Lightning's own method would warn that arguments are given besides the command line."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run, the average, the checkpoints and what to resume."""
        kind: Any = self.model_class
        loss = kind.loss_class
        parser.set_defaults({"model.loss": {"class_path": f"{loss.__module__}.{loss.__qualname__}"}})
        parser.add_class_arguments(RunArgs, "run")
        parser.add_lightning_class_args(EmaWeights, "ema")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Resume exactly: 'last' (of the newest run, or of --run.name), 'best', or a .ckpt file. 'auto' "
            "resumes the run of this name (by default the config's) if it has a checkpoint, and else starts it.",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data", "model.data_facts", compute_fn=data_facts, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Nothing is finetuned when a run is resumed: the checkpoint brings the weights, but not those of a teacher."""
        kind: Any = self.model_class
        kind.complete_options(self.config.model)
        if self.config.ckpt_path == "auto":
            run = self.config.run
            run.name = run.name or name_of(self._configs())
            last = Path(run.root) / run.name / CHECKPOINT_DIR / LAST_NAME
            self.config.ckpt_path = str(last) if last.is_file() else None
            run.name = None if last.is_file() else run.name  # the checkpoint says it
        if self.config.ckpt_path is not None:
            self.config.model.net.checkpoint = None

    def _configs(self) -> list[str]:
        return [str(path) for path in self.config.config or []]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer with the run's loggers, callbacks and checkpoint files."""
        run: RunArgs = self.config_init.run
        main = is_main_process()
        reads = "glimpses" if isinstance(self.model, EyeModule) else "images"
        gives = "glimpses" if hasattr(self.datamodule, "glimpses") else "images"
        if reads != gives:
            raise ValueError(
                f"{self.model.net.name} reads {reads}, but data.class_path {type(self.datamodule).__name__} gives "
                f"{gives}; Glimpse…DataModule is for a MambaEye, the others for MambaScope and Vim"
            )
        if isinstance(self.datamodule, ResumableDataModule):
            self.datamodule.fit_channels(self.model.model.config.in_chans)
        self.resume_from = None
        self.resume_step = 0
        if self.config.ckpt_path is not None:
            self.resume_from = find_checkpoint(self.config.ckpt_path, run.root, run.name)
            self.resume_step = int(read_training_checkpoint(self.resume_from, mmap=True)["global_step"])
        trainer = self.config_init.trainer
        cluster = slurm_plugins()
        # what is wrong with the data is a mistake like any other so far; one process downloads, as later on
        elsewhere = getattr(self.datamodule, "download", False) and not main
        if isinstance(self.datamodule, ResumableDataModule) and not elsewhere:
            self.datamodule.setup("fit")
        self.run_dir = self._run_dir(run, main)
        checkpoint: RunCheckpoint = self.config_init.checkpoint
        checkpoint.dirpath = self.run_dir / CHECKPOINT_DIR
        self.model.model.description.update(self._facts())
        self.export = ExportWeights(self.run_dir / WEIGHTS_NAME)
        plugins = trainer.plugins or []
        own: dict[str, Any] = {
            "default_root_dir": str(self.run_dir),
            "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), *cluster, AtomicCheckpointIO()],
        }
        if trainer.logger is None or trainer.logger is True:
            own["logger"] = make_loggers(run, self.run_dir, self.resume_step) or False
        ema: EmaWeights = self.config_init.ema
        callbacks = [*([ema] if ema.active else []), self.export, checkpoint]
        if trainer.enable_progress_bar in (None, True):
            callbacks.append(TrainProgress())
        built = self._instantiate_trainer({**trainer, **own, **kwargs}, callbacks)
        if main:
            self._save_config()
        return built

    def _run_dir(self, run: RunArgs, main: bool) -> Path:
        """The directory of the resumed run, or one for a new run."""
        if self.config_init.trainer.fast_dev_run and main:
            return scratch_run()
        known = run_of(self.resume_from) if self.resume_from and run.name is None else None
        # an older state goes on as a run of its own, so that the newer one is not overwritten
        if known is None or self.resume_from is None or self.resume_from.name != LAST_NAME:
            return new_run(run.root, run.name, self._configs(), claim=main)
        if main and not hold_run(known):
            raise ValueError(in_use(known))
        return known

    def _facts(self) -> dict[str, Any]:
        """What weights files say about the data, so that they can be used without them."""
        told = self.datamodule.describe() if hasattr(self.datamodule, "describe") else {}
        transform = {name: told[name] for name in TRANSFORM if told.get(name) is not None}
        facts = {"model": self.model.net.name, "labels": told.get("class_names"), "transform": transform}
        if isinstance(self.model, EyeModule):
            facts["glimpses"] = told.get("glimpses")
        return {name: value for name, value in facts.items() if value}

    def _save_config(self) -> None:
        """Writes the whole configuration; neither the name nor the checkpoint belong to a run started from it."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        config["ckpt_path"] = None
        config["run"]["name"] = None
        with atomic_path(self.run_dir / CONFIG_NAME) as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")

    # ---- the run -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains, then writes the report."""
        if self.trainer.is_global_zero:
            print(self._headline(), flush=True)
        path = str(self.resume_from) if self.resume_from else None
        self.trainer.fit(self.model, self.datamodule, ckpt_path=path)
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", 0):
            self._say_why_it_ended()
            self._finish()

    def _say_why_it_ended(self) -> None:
        """One line where that is not the end of the last epoch, or where there was nothing to do."""
        step, limit = self.trainer.global_step, reached_limit(self.trainer)
        idle = step == self.resume_step
        if idle and self.resume_from is None:
            options = {name: getattr(self.trainer, name) for name in ("max_epochs", "max_steps", "limit_train_batches")}
            print(f"nothing was trained: {', '.join(f'trainer.{name}={value}' for name, value in options.items())}")
            return
        if limit is None and idle:
            limit = f"trainer.max_epochs={self.trainer.max_epochs}"
        if limit is None:
            return
        option = limit.partition("=")[0]
        change = f"a larger --{option}" if option.startswith("trainer.") else "other options of it"
        how = f"to go on: --ckpt_path {self.run_dir / CHECKPOINT_DIR / LAST_NAME} with {change}"
        if idle:
            print(f"nothing is left to train: step {step} has reached {limit}; {how}")
        elif step < (planned := planned_steps(self.trainer)):
            print(f"ended by {limit} after step {step} of {planned:g}; {how}")

    def _headline(self) -> str:
        model = self.model.model
        count = sum(p.numel() for p in model.parameters())
        if isinstance(model, MambaEye):
            sees = f"glimpses of {model.config.patch_size}x{model.config.patch_size} pixels"
        else:
            sees = "{}x{} pixels".format(*model.config.image_hw)
        trainer: Any = self.trainer
        where = "fast_dev_run: nothing is kept" if trainer.fast_dev_run else f"run directory {self.run_dir}"
        start = f", resumed from {self.resume_from}" if self.resume_from else ""
        return (
            f"{self.model.net.name}: {count / 1e6:.2f} M parameters, {sees}, "
            f"{model.num_classes} classes; {where}{start}"
        )

    def _finish(self) -> None:
        """Report and table; the threshold that the report chose goes into the exported weights."""
        run: RunArgs = self.config_init.run
        model = self.model.model
        if run.report and isinstance(model, MambaEye):
            self._report_eye(model)
        elif run.report:
            from mambascope.evaluation.options import ReportOptions
            from mambascope.evaluation.report import write_report
            from mambascope.evaluation.sweep import Target

            self.datamodule.trainer = None  # the loaders shall give this process every image
            given = self.model.net.args.get("threshold")
            options = ReportOptions(
                class_names=getattr(self.datamodule, "class_names", None),
                metrics_csv=self.run_dir / LOG_DIR / "metrics.csv",
                # on other images the drop differs by a few tenths: aim at none, to stay within half a point
                target=Target("acc_drop", 0.0),
                calibration_loader=getattr(self.datamodule, "calibration_dataloader", lambda: None)(),
                mean=getattr(self.datamodule, "mean", None),
                std=getattr(self.datamodule, "std", None),
                name=self.model.net.name,
                threshold=given if isinstance(model, MambaScope) else None,
                published=model.num_classes == 1000,  # the published rows are ImageNet's
                progress=sys.stdout.isatty(),
                print_table=False,
            )
            trained = model.to(self.trainer.strategy.root_device).eval()
            report = write_report(trained, self.datamodule, self.run_dir / REPORT_DIR, options)
            print(f"\n{report.table}\n")
            if isinstance(model, MambaScope) and report.threshold is not None:
                model.threshold = report.threshold
            kept = ("threshold", "table", "choice")
            model.description["report"] = {key: report.data.get(key) for key in kept}
            self.export.write(self.model)
            print(f"report:  {self.run_dir / REPORT_DIR}")
        print(f"weights: {self.run_dir / WEIGHTS_NAME}")

    def _report_eye(self, model: MambaEye) -> None:
        """Accuracy against the number of glimpses, on the validation images."""
        from mambascope.eye.report import write_eye_report

        report = write_eye_report(
            model.to(self.trainer.strategy.root_device).eval(),
            self.datamodule.val_images(),
            self.run_dir / REPORT_DIR,
            options=self.datamodule.glimpses,
            name=self.model.net.name,
            progress=sys.stdout.isatty(),
        )
        print(f"\n{report.table}\n")
        model.description["report"] = {"table": report.rows}
        self.export.write(self.model)
        print(f"report:  {self.run_dir / REPORT_DIR}")


def complete_args(argv: Sequence[str]) -> list[str]:
    """Adds the config that the command line leaves out.

    Without ``--config`` that is the built-in data's, or the resumed run's own. Shipped configs may be named without
    their path. ``last`` and ``best`` become the checkpoint's path, so that every process means the same file.

    Raises:
        ValueError: If a config or a checkpoint does not exist.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config", "-c", action="append", default=[])
    known.add_argument("--ckpt_path")
    known.add_argument("--run.root", dest="root", default=RunArgs.root)
    known.add_argument("--run.name", dest="name")
    given, rest = known.parse_known_args(list(argv))
    if given.ckpt_path == "null":
        given.ckpt_path = None
    before = [part for config in given.config for part in ("--config", find_config(config))]
    if given.ckpt_path == "auto":
        rest += ["--ckpt_path", "auto"]  # the same command line as at the start, so that its configs and name hold
    elif given.ckpt_path is not None:
        if not is_main_process() and _RESUMED in os.environ:
            given.ckpt_path = os.environ[_RESUMED]
        checkpoint = find_checkpoint(given.ckpt_path, given.root, given.name)
        os.environ[_RESUMED] = str(checkpoint)  # for the processes that Lightning starts: "last" may move on
        run = run_of(checkpoint)
        if not before and run is not None:
            before = ["--config", str(run / CONFIG_NAME)]
        if run is not None and given.name == run.name:
            given.name = None  # the checkpoint says it
        rest += ["--ckpt_path", str(checkpoint)]
    before = before or ["--config", str(shipped_configs()[DEFAULT_CONFIG])]
    if given.root != RunArgs.root:
        rest += ["--run.root", given.root]
    return before + rest + (["--run.name", given.name] if given.name is not None else [])


def _quiet() -> None:
    """Leaves the screen to what matters."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*GPU available but not.*",
        ".*LeafSpec.*",
        ".*compute.. method of metric .* before the ..update.. method.*",  # a process without validation images
        r".*need to be provided during `Trainer` instantiation.*\['Timer'\].*",  # resumed without trainer.max_time
    ):
        warnings.filterwarnings("ignore", message=message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 when training has ended, 2 for a mistake on the command line or in a config, 1 for a failure on the way, and
        128 + signal number (130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1) when it was stopped and can be resumed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    open_streams()
    cli: TrainCLI | None = None
    try:
        if foreign := [arg for arg in argv if printable(arg) != arg]:
            raise DataError(f"{printable(foreign[0])} is no UTF-8, as a run's config must be: name it through a link")
        cli = TrainCLI(complete_args(argv))
        cli.train()
        return 0
    except TrainingStopped as stop:
        return _stopped(stop, cli)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into a status of 1
            raise
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (CheckpointError, DataError, NonFiniteLossError, MisconfigurationException, OSError, ValueError) as error:
        if os.environ.get(_DEBUG):
            raise
        if isinstance(error.__cause__, (DataError, ValueError)):
            error = error.__cause__  # what is linked between the options wraps what it meets
        own = isinstance(error, (CheckpointError, DataError, NonFiniteLossError))
        hint = "" if own else f" ({_DEBUG}=1 shows where)"
        print(f"error: {printable(' '.join(str(error).split()))}{hint}", file=sys.stderr)
        return 1 if cli is not None else 2
    except RuntimeError as error:
        failure = worker_failure(error)  # raised wherever the main thread is, also in the middle of a step
        if failure is not None and not os.environ.get(_DEBUG):
            print(f"error: {failure}", file=sys.stderr)
            return 1
        if "find_unused_parameters=True" in str(error) and not os.environ.get(_DEBUG):
            print(
                "error: steps leave parameters of this model without a gradient, which several processes must know of: "
                "--trainer.strategy=ddp_find_unused_parameters_true",
                file=sys.stderr,
            )
            return 1
        # torch's own message for a checkpoint of another model lists every tensor
        if os.environ.get(_DEBUG) or "Error(s) in loading state_dict" not in str(error):
            raise
        print("error: the checkpoint belongs to another model than the configuration describes", file=sys.stderr)
        return 1
    finally:
        leave_runs()


def _stopped(stop: TrainingStopped, cli: TrainCLI | None) -> int:
    if not is_main_process():
        return 0  # a status other than 0 makes Lightning kill the process that prints
    before = cli.run_dir / CHECKPOINT_DIR / LAST_NAME if cli is not None else None
    path = stop.path
    if path is not None:
        print(f"{stop}; state saved in {path}", file=sys.stderr)
    elif before is not None and before.is_file():
        path = before
        print(f"{stop}; the last steps were not saved", file=sys.stderr)
    else:
        print(f"{stop}; nothing was saved", file=sys.stderr)
    if path is not None:
        print(f"resume with: python {sys.argv[0]} --ckpt_path {path}", file=sys.stderr, flush=True)
    return 128 + stop.signum
