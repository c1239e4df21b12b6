"""When a run is saved, and how it ends before its time: stop signals and losses that are no numbers."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from mambascope.models.checkpoint import CheckpointError
from mambascope.models.weights import BEST_NAME, CHECKPOINT_DIR, LAST_NAME
from mambascope.training.limits import reached_limit
from mambascope.training.signals import StopSignals, TrainingStopped
from mambascope.utils import atomic_path

_FAR = 2**62  # larger than any step


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite."""


class RunCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` and ``best.ckpt`` of a run, and stops it cleanly.

    ``last.ckpt`` is written after every validation, at the end of epochs without one, every ``every_minutes`` and every
    ``every_steps`` (also in the middle of an epoch), where ``trainer.max_steps`` or ``trainer.max_time`` end the
    training, and on the signals of :class:`~mambascope.training.signals.StopSignals`, which end it after the current
    step. Nothing is written once the loss or a weight is no finite number, so that the last good state stays.

    Args:
        every_minutes: Time between saves; 0 for none.
        every_steps: Optimizer steps between saves; ``null`` for none.
        monitor: Metric that chooses ``best.ckpt``; ``null`` for the module's own.
        mode: Whether the metric should be large (``max``) or small (``min``).
        sync_steps: On an accelerator or with several processes, steps between looks at the loss, the clock and the
            signals; each look waits for the device. On a single CPU every step is looked at.
    """

    def __init__(
        self,
        every_minutes: float = 15.0,
        every_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "max",
        sync_steps: int = 20,
    ) -> None:
        super().__init__()
        if every_minutes < 0:
            raise ValueError(f"checkpoint.every_minutes must be >= 0, got {every_minutes!r}")
        for name, value in (("every_steps", every_steps), ("sync_steps", sync_steps)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {value!r}")
        if mode not in ("max", "min"):
            raise ValueError(f"checkpoint.mode must be 'max' or 'min', got {mode!r}")
        self.every_minutes, self.every_steps, self.sync_steps = every_minutes, every_steps, sync_steps
        self.monitor, self.mode = monitor, mode
        self.dirpath: Path | None = None
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._signals = StopSignals()
        self._saved_step = -1
        self._last_step = -1
        self._stop_pending = False
        self._saved_at = 0.0
        self._nonfinite: Tensor | None = None

    # ---- what Lightning asks for ---------------------------------------------------------------------------------

    @property
    def last_path(self) -> Path:
        """The newest checkpoint."""
        assert self.dirpath is not None
        return self.dirpath / LAST_NAME

    @property
    def best_model_path(self) -> str:
        """The best checkpoint, or an empty string."""
        path = None if self.dirpath is None else self.dirpath / BEST_NAME
        return str(path) if path is not None and path.exists() else ""

    def state_dict(self) -> dict[str, Any]:
        """Best score so far."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agrees on the directory and removes what a killed process left half written."""
        if stage != "fit":
            return
        directory = self.dirpath or Path(trainer.default_root_dir) / CHECKPOINT_DIR
        self.dirpath = Path(trainer.strategy.broadcast(str(directory)))
        if trainer.is_global_zero:
            for stale in self.dirpath.glob(".*.ckpt.*"):
                stale.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and takes over the signals."""
        self._check_validation_interval(trainer)
        self._saved_at = time.monotonic()
        self._last_step = trainer.global_step
        self._saved_step = -1
        self._stop_pending = False
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._signals.take(lambda: trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the loss, the clock and the signals, and saves if it is time."""
        self._note_loss(outputs, trainer.global_step)
        if trainer.global_step == self._last_step:
            # gradients are being accumulated; a checkpoint would lose them, and so would a stop, which therefore waits
            self._stop_pending = self._stop_pending or trainer.should_stop
            trainer.should_stop = False
            return
        self._last_step = trainer.global_step
        trainer.should_stop = trainer.should_stop or self._stop_pending
        steps_due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        # what Lightning takes for the end of the epoch: by then it is too late to save its middle
        ends = reached_limit(trainer) is not None
        if not (steps_due or ends) and trainer.global_step % self._look_every(trainer) != 0:
            return
        stop, time_due = self._look(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # validation or the end of the epoch comes next and saves
        if stop:
            # what Lightning does after this hook: the row of this step must be in the log before the run ends
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer, pl_module)
            raise TrainingStopped(stop, trainer.global_step, self.last_path)
        if steps_due or time_due or ends:
            self._save(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Does not wait for the end of a validation when told to stop; ``on_exception`` saves.

        With several processes it does wait: they may have different numbers of batches, and cannot agree in between.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            stop, _ = self._look(trainer)
            if stop:
                raise TrainingStopped(stop, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, and keeps the checkpoint as the best one if it is."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(str(self.monitor or getattr(pl_module, "monitor", "")))
        improvement = score is not None and self._is_better(float(score))
        if improvement:
            self.best_score, self.best_step = float(score), trainer.global_step  # type: ignore[arg-type]
        # Lightning counts this step for the loggers after the validation: a resumed run does it where it comes to the
        # same validation again, not where the clock or a stop brought it about
        extra = int(not self._validates_by_position(trainer))
        trainer.fit_loop.epoch_loop._batches_that_stepped += extra
        self._save(trainer, pl_module)
        trainer.fit_loop.epoch_loop._batches_that_stepped -= extra
        if improvement and trainer.is_global_zero:
            self._keep_as_best()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of an epoch without validation, and stops if a signal came with its last batch."""
        if self._saved_step != trainer.global_step:
            self._save(trainer, pl_module)
        stop, _ = self._look(trainer)
        if stop:
            raise TrainingStopped(stop, trainer.global_step, self.last_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves where a signal came at a moment that has no hook of its own."""
        self._signals.give_back()
        if not self._signals.first or self._signals.at_once or getattr(exception, "path", None) is not None:
            return
        if not isinstance(exception, (TrainingStopped, RuntimeError)):  # Ctrl-C also ends the loader's workers
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if trainer.validating:
            self._restart_validation(trainer)
        elif progress.current.ready != progress.current.completed:
            return  # in the middle of a step: the last checkpoint is the one to go back to
        self._save(trainer, pl_module)
        if isinstance(exception, TrainingStopped):
            exception.path = self.last_path

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._signals.give_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back: what follows training ends as any program does."""
        self._signals.give_back()

    @staticmethod
    def _validates_by_position(trainer: Trainer) -> bool:
        """Whether the validation belongs to this place in the epoch."""
        if trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
            return False
        stop, trainer.should_stop = trainer.should_stop, False
        try:
            assert trainer.fit_loop._data_fetcher is not None
            return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        finally:
            trainer.should_stop = stop

    @staticmethod
    def _check_validation_interval(trainer: Trainer) -> None:
        """A checkpoint written while gradients are being accumulated would lose them."""
        every, batches = trainer.val_check_batch, trainer.accumulate_grad_batches
        if trainer._val_check_time_interval is not None and batches > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "trainer.val_check_interval must be a number where trainer.accumulate_grad_batches is above 1: the "
                "clock may ask for a validation before the optimizer step"
            )
        if isinstance(every, int) and every < trainer.num_training_batches and every % batches:
            raise ValueError(
                f"trainer.val_check_interval means a validation every {every} batches, which must be a multiple of "
                f"trainer.accumulate_grad_batches = {batches}"
            )

    # ---- saving --------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_finite(trainer, pl_module)
        trainer.save_checkpoint(self.last_path)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        for logger in trainer.loggers:
            logger.save()  # so that the log reaches as far as the checkpoint, whatever happens

    def _keep_as_best(self) -> None:
        """Gives the file a second name: ``last.ckpt`` is never written to, only replaced."""
        assert self.dirpath is not None
        best = self.dirpath / BEST_NAME
        link = self.dirpath / f".{BEST_NAME}.{os.getpid()}"
        try:
            link.unlink(missing_ok=True)
            os.link(self.last_path, link)
            os.replace(link, best)
        except OSError:  # a file system without hard links
            try:
                with atomic_path(best) as temporary:
                    shutil.copyfile(self.last_path, temporary)
            except OSError as error:
                raise CheckpointError(f"checkpoint {best} could not be written: {error}") from error

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score):
            return False
        if self.best_score is None:
            return True
        return score > self.best_score if self.mode == "max" else score < self.best_score

    @staticmethod
    def _restart_validation(trainer: Trainer) -> None:
        """Makes the loop's state that of a validation in its first batch, which Lightning then runs from the start."""
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        for counts in (progress.total, progress.current):
            counts.load_state_dict({"ready": 1, "started": 1, "processed": 0, "completed": 0})
        progress.is_last_batch = False

    # ---- the loss ------------------------------------------------------------------------------------------------

    def _note_loss(self, outputs: Any, step: int) -> None:
        """Remembers the first bad step on the device, without waiting for it."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            assert self._nonfinite is not None
            self._nonfinite = torch.maximum(self._nonfinite, (~torch.isfinite(loss.detach())).long() * (_FAR - step))

    def _check_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps weights that are no numbers out of checkpoints; the loss shows them only a step later."""
        norms = torch._foreach_norm([p.detach() for p in pl_module.parameters()])
        if not bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()):
            raise NonFiniteLossError(self._complaint("a weight is not finite", trainer.global_step, trainer))

    def _complaint(self, reason: str, step: int, trainer: Trainer) -> str:
        last = self.last_path if self.last_path.exists() else "none was written yet"
        return (
            f"{reason} at step {step} (epoch {trainer.current_epoch}); training stopped, last good checkpoint: {last}. "
            "A lower learning rate, a longer warm-up or gradient clipping may help"
        )

    # ---- several processes ---------------------------------------------------------------------------------------

    def _look_every(self, trainer: Trainer) -> int:
        single_cpu = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        return 1 if single_cpu else self.sync_steps

    def _look(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal to stop for (0 for none) and whether the clock asks for a save, agreed on by all processes."""
        assert self._nonfinite is not None
        signum = self._signals.first or (signal.SIGTERM if trainer.received_sigterm else 0)
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.every_minutes > 0 and minutes >= self.every_minutes
        flags = torch.stack([self._nonfinite, *self._nonfinite.new_tensor([signum, int(due)])])
        if trainer.world_size > 1:
            flags = trainer.strategy.reduce(flags, reduce_op="max")
        nonfinite, signum, due = flags.tolist()
        if nonfinite:
            raise NonFiniteLossError(self._complaint("the loss is not finite", _FAR - nonfinite, trainer))
        self._signals.first = signum
        return signum, bool(due)
