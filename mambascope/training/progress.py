"""What a run shows on the screen."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

# short name -> metric, factor, format
_TRAIN = {"fine": "train/fine_ce", "coarse kl": "train/coarse_kl", "loss": "train/loss"}
_VAL = {
    "coarse": ("val/coarse_top1", 100, "{:.1f}"),
    "fine": ("val/fine_top1", 100, "{:.1f}"),
    "dynamic": ("val/dynamic_top1", 100, "{:.1f}"),
    "top-1": ("val/top1", 100, "{:.1f}"),
    "refined": ("val/share_refined", 100, "{:.0f} %"),
    "GFLOPs": ("val/gflops", 1, "{:.3g}"),
}


class TrainProgress(TQDMProgressBar):
    """A bar with the losses of both stages on a terminal, and one line per validation everywhere.

    Args:
        refresh_rate: Batches between updates of the bar; each one waits for the device.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stdout.isatty() else 0)
        self._started = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The losses under short names."""
        values = trainer.progress_bar_metrics
        return {name: f"{values[key]:.3f}" for name, key in _TRAIN.items() if key in values}

    def on_train_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._started = time.monotonic()
        super().on_train_start(*args)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.say(trainer, self.summary(trainer))
        super().on_validation_end(trainer, pl_module)

    def say(self, trainer: Trainer, text: str) -> None:
        """Prints above the bar, if there is one."""
        if not trainer.is_global_zero:
            return
        if self.is_enabled and self._train_progress_bar is not None:
            self.print(text)
        else:
            print(text, flush=True)

    def summary(self, trainer: Trainer) -> str:
        """Epoch, time, losses and accuracies in one line."""
        values = trainer.callback_metrics
        last = trainer.max_epochs
        total = f"/{last}" if last and last > 0 else ""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        losses = [f"{name} {float(values[key]):.3f}" for name, key in _TRAIN.items() if key in values]
        tops = [
            f"{name} {form.format(factor * float(values[key]))}"
            for name, (key, factor, form) in _VAL.items()
            if key in values
        ]
        epoch = (
            f"epoch {trainer.current_epoch + 1:3d}{total}  step {trainer.global_step:6d}  {minutes:3d}:{seconds:02d}"
        )
        parts = [epoch, *([f"train: {', '.join(losses)}"] if losses else []), f"val: {', '.join(tops)}"]
        return "  ".join(parts)
