"""Loggers that continue where a resumed run's checkpoint was written."""

from __future__ import annotations

import csv
import uuid
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mambascope.models.weights import LOG_DIR
from mambascope.training.args import RunArgs
from mambascope.utils import atomic_path


class _ContinuingWriter(ExperimentWriter):
    """Appends to ``metrics.csv``, after dropping what an interrupted run logged beyond its checkpoint."""

    def __init__(self, log_dir: str, resume_step: int) -> None:
        self.resume_step = resume_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            self.metrics_keys = list(reader.fieldnames or [])
        earlier = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < self.resume_step]
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(earlier)


class ContinuingCSVLogger(CSVLogger):
    """Lightning's CSV logger, which would delete the log of the run that is resumed.

    Args:
        save_dir: Run directory; the log is ``logs/metrics.csv`` in it.
        resume_step: Optimizer steps done by the checkpoint that is resumed, 0 for a new run.
    """

    def __init__(self, save_dir: str, resume_step: int = 0) -> None:
        super().__init__(save_dir, name="", version=LOG_DIR, flush_logs_every_n_steps=100)
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when first needed."""
        if self._experiment is None:
            self._experiment = _ContinuingWriter(self.log_dir, self.resume_step)
        return self._experiment


def make_loggers(args: RunArgs, run_dir: Path, resume_step: int = 0) -> list[Logger]:
    """The run's loggers; the CSV log comes first.

    Raises:
        ValueError: If Weights & Biases is asked for and not installed.
    """
    loggers: list[Logger] = []
    if "csv" in args.loggers:
        loggers.append(ContinuingCSVLogger(str(run_dir), resume_step))
    if "tensorboard" in args.loggers:
        # purging hides what was logged beyond the checkpoint
        purge: dict[str, Any] = {"purge_step": resume_step} if resume_step else {}
        loggers.append(TensorBoardLogger(str(run_dir), name="", version=LOG_DIR, default_hp_metric=False, **purge))
    if "wandb" in args.loggers:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError(
                "run.loggers has 'wandb', which is not installed: pip install 'mambascope[wandb]'"
            ) from None
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                name=run_dir.name,
                id=_wandb_id(run_dir),
                save_dir=str(run_dir),
                project=args.wandb_project,
                resume="allow",
            )
        )
    return loggers


def _wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases, kept beside its logs so that a resumed run continues its curves."""
    path = run_dir / LOG_DIR / "wandb_id"
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:10])
    return path.read_text().strip()
