"""The command line of ``tools/train_cls.py``: LightningCLI with run directories, exact resume and short errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mambascope._names import open_streams, printable
from mambascope.commands.train_options import CommandLine, OneLineParser, complete_args
from mambascope.data import DataError, load_data_modules
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.errors import worker_failure
from mambascope.models.architectures import architecture_of, import_object
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.description import TRANSFORM
from mambascope.models.weights import CHECKPOINT_DIR, LAST_NAME, REPORT_DIR, RUN_CONFIG, WEIGHTS
from mambascope.training.args import RunArgs
from mambascope.training.base import is_main_process
from mambascope.training.checkpointing import NonFiniteLossError, RunCheckpoint
from mambascope.training.cluster import slurm_plugins
from mambascope.training.ema import EmaWeights
from mambascope.training.export import ExportWeights
from mambascope.training.io import AtomicCheckpointIO, read_training_checkpoint
from mambascope.training.limits import planned_steps, reached_limit
from mambascope.training.loggers import make_loggers
from mambascope.training.progress import TrainProgress
from mambascope.training.runs import (
    find_checkpoint,
    hold_run,
    in_use,
    leave_runs,
    name_of,
    new_run,
    run_of,
    scratch_run,
)
from mambascope.training.signals import TrainingStopped
from mambascope.utils import atomic_path

_DEBUG = "MAMBASCOPE_DEBUG"


def data_facts(datamodule: Any) -> dict[str, Any]:
    """Fields of the model's config that follow from the data, unless they are set."""
    facts = {name: getattr(datamodule, name, None) for name in ("num_classes", "img_size", "in_chans", "patch_size")}
    return {name: value for name, value in facts.items() if value is not None}


def _inputs(datamodule: Any) -> str:
    """What a data module gives to models."""
    return getattr(datamodule, "inputs", "images")


class TrainCLI(LightningCLI):
    """Parses the options, makes the run directory, trains, exports and reports.

    Args:
        line: The command line, see :func:`~mambascope.commands.train_options.complete_args`.

    Attributes:
        run_dir: The run directory.
        resume_from: The checkpoint that is resumed, or ``None``.
    """

    run_dir: Path
    resume_from: Path | None

    def __init__(self, line: CommandLine) -> None:
        load_data_modules()  # --data finds by name those that are imported
        self.architecture = line.architecture
        super().__init__(
            import_object(line.architecture.module),
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_class=OneLineParser,
            # an abbreviation would turn a wrong name into another option
            parser_kwargs={"description": "Train a classifier.", "allow_abbrev": False},
            args=line.args,
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
        self._check_data()
        self._find_resumed(run)
        cluster = slurm_plugins()
        # what is wrong with the data is a mistake like any other so far; one process downloads, as later on
        awaits_download = getattr(self.datamodule, "download", False) and not main
        if isinstance(self.datamodule, ResumableDataModule) and not awaits_download:
            self.datamodule.setup("fit")
        self.run_dir = self._run_dir(run, main)
        self.model.model.description.update(self._facts())
        section = self.config_init.trainer
        plugins = section.plugins or []
        options: dict[str, Any] = {
            **section,
            "default_root_dir": str(self.run_dir),
            "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), *cluster, AtomicCheckpointIO()],
        }
        if section.logger is None or section.logger is True:
            options["logger"] = make_loggers(run, self.run_dir, self.resume_step) or False
        trainer = self._instantiate_trainer({**options, **kwargs}, self._callbacks(section))
        if main:
            self._save_config()
        return trainer

    def _check_data(self) -> None:
        """Data of the kind that the model reads, with its channels."""
        inputs = self.architecture.inputs
        if inputs != _inputs(self.datamodule):
            modules = " and ".join(name for name, kind in load_data_modules().items() if _inputs(kind) == inputs)
            raise ValueError(
                f"{self.model.net.name} reads {inputs}, but data.class_path {type(self.datamodule).__name__} gives "
                f"{_inputs(self.datamodule)}; {modules} give {inputs}"
            )
        if isinstance(self.datamodule, ResumableDataModule):
            self.datamodule.fit_channels(self.model.model.config.in_chans)

    def _find_resumed(self, run: RunArgs) -> None:
        self.resume_from, self.resume_step = None, 0
        if self.config.ckpt_path is not None:
            self.resume_from = find_checkpoint(self.config.ckpt_path, run.root, run.name)
            self.resume_step = int(read_training_checkpoint(self.resume_from, mmap=True)["global_step"])

    def _callbacks(self, section: Any) -> list[Any]:
        checkpoint: RunCheckpoint = self.config_init.checkpoint
        checkpoint.dirpath = self.run_dir / CHECKPOINT_DIR
        self.export = ExportWeights(self.run_dir / WEIGHTS)
        ema: EmaWeights = self.config_init.ema
        progress = [TrainProgress()] if section.enable_progress_bar in (None, True) else []
        return [*([ema] if ema.active else []), self.export, checkpoint, *progress]

    def _run_dir(self, run: RunArgs, main: bool) -> Path:
        """The directory of the resumed run, or one for a new run."""
        if self.config_init.trainer.fast_dev_run and main:
            return scratch_run()
        resumed_run = run_of(self.resume_from) if self.resume_from and run.name is None else None
        # an older state goes on as a run of its own, so that the newer one is not overwritten
        if resumed_run is None or self.resume_from is None or self.resume_from.name != LAST_NAME:
            return new_run(run.root, run.name, self._configs(), claim=main)
        if main and not hold_run(resumed_run):
            raise ValueError(in_use(resumed_run))
        return resumed_run

    def _facts(self) -> dict[str, Any]:
        """What weights files say about the data, so that they can be used without them."""
        description = self.datamodule.describe() if hasattr(self.datamodule, "describe") else {}
        transform = {name: description[name] for name in TRANSFORM if description.get(name) is not None}
        facts = {
            "model": self.model.net.name,
            "labels": description.get("class_names"),
            "transform": transform,
            "glimpses": description.get("glimpses"),
        }
        return {name: value for name, value in facts.items() if value}

    def _save_config(self) -> None:
        """Writes the whole configuration; neither the name nor the checkpoint belong to a run started from it."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        config["ckpt_path"] = None
        config["run"]["name"] = None
        with atomic_path(self.run_dir / RUN_CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")

    # ---- the run -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains, then writes the report."""
        if self.trainer.is_global_zero:
            print(self._headline(), flush=True)
        path = str(self.resume_from) if self.resume_from else None
        self.trainer.fit(self.model, self.datamodule, ckpt_path=path)
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", 0):
            self._explain_end()
            self._finish()

    def _explain_end(self) -> None:
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
        advice = f"a larger --{option}" if option.startswith("trainer.") else "other options of it"
        advice = f"to go on: --ckpt_path {self.run_dir / CHECKPOINT_DIR / LAST_NAME} with {advice}"
        if idle:
            print(f"nothing is left to train: step {step} has reached {limit}; {advice}")
        elif step < (plan := planned_steps(self.trainer)):
            print(f"ended by {limit} after step {step} of {plan:g}; {advice}")

    def _headline(self) -> str:
        model = self.model.model
        count = sum(p.numel() for p in model.parameters())
        size = getattr(model.config, "image_hw", None)
        if size is not None:
            view = "{}x{} pixels".format(*size)
        else:
            view = f"{self.architecture.inputs} of {model.config.patch_size}x{model.config.patch_size} pixels"
        trainer: Any = self.trainer
        folder = "fast_dev_run: nothing is kept" if trainer.fast_dev_run else f"run directory {self.run_dir}"
        start = f", resumed from {self.resume_from}" if self.resume_from else ""
        return (
            f"{self.model.net.name}: {count / 1e6:.2f} M parameters, {view}, "
            f"{model.num_classes} classes; {folder}{start}"
        )

    def _finish(self) -> None:
        """Report and table; the figures, and the threshold that the report chose, go into the exported weights."""
        if self.config_init.run.report:
            model = self.model.model.to(self.trainer.strategy.root_device).eval()
            report = import_object(architecture_of(model).report)
            net = self.model.net
            table, figures = report(model, self.datamodule, self.run_dir, net.name, net.args)
            print(f"\n{table}\n")
            model.description["report"] = figures
            self.export.write(self.model)
            print(f"report:  {self.run_dir / REPORT_DIR}")
        print(f"weights: {self.run_dir / WEIGHTS}")


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
    args = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    open_streams()
    cli: TrainCLI | None = None
    try:
        if foreign := [arg for arg in args if printable(arg) != arg]:
            raise DataError(f"{printable(foreign[0])} is no UTF-8, as a run's config must be: name it through a link")
        line = complete_args(args)
        if argv is None:
            sys.argv[1:] = line.args  # for the processes that Lightning starts: "last" may move on
        cli = TrainCLI(line)
        cli.train()
        return 0
    except TrainingStopped as stop:
        return _stopped(stop, cli)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into a status of 1
            raise
        return _interrupted()
    except (CheckpointError, DataError, NonFiniteLossError, MisconfigurationException, OSError, ValueError) as error:
        if os.environ.get(_DEBUG):
            raise
        print(f"error: {_mistake(error)}", file=sys.stderr)
        return 1 if cli is not None else 2
    except RuntimeError as error:
        failure = _failure(error)
        if failure is None or os.environ.get(_DEBUG):
            raise
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        leave_runs()


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


def _mistake(error: Exception) -> str:
    """One line on what is wrong with the options, the data or the files."""
    if isinstance(error.__cause__, (DataError, ValueError)):
        error = error.__cause__  # what is linked between the options wraps what it meets
    explained = isinstance(error, (CheckpointError, DataError, NonFiniteLossError))
    hint = "" if explained else f" ({_DEBUG}=1 shows where)"
    return f"{printable(' '.join(str(error).split()))}{hint}"


def _failure(error: RuntimeError) -> str | None:
    """One line on a failure that has one; ``None`` for any other."""
    if (failure := worker_failure(error)) is not None:  # raised wherever the main thread is, also within a step
        return str(failure)
    if "find_unused_parameters=True" in str(error):
        return (
            "steps leave parameters of this model without a gradient, which several processes must know of: "
            "--trainer.strategy=ddp_find_unused_parameters_true"
        )
    if "Error(s) in loading state_dict" in str(error):  # torch's own message lists every tensor
        return "the checkpoint belongs to another model than the configuration describes"
    return None


def _stopped(stop: TrainingStopped, cli: TrainCLI | None) -> int:
    if not is_main_process():
        return 0  # a status other than 0 makes Lightning kill the process that prints
    last = cli.run_dir / CHECKPOINT_DIR / LAST_NAME if cli is not None else None
    path = stop.path
    if path is not None:
        print(f"{stop}; state saved in {path}", file=sys.stderr)
    elif last is not None and last.is_file():
        path = last
        print(f"{stop}; the last steps were not saved", file=sys.stderr)
    else:
        print(f"{stop}; nothing was saved", file=sys.stderr)
    if path is not None:
        print(f"resume with: python {sys.argv[0]} --ckpt_path {path}", file=sys.stderr, flush=True)
    return 128 + stop.signum
