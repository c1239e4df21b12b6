"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class EmaWeights(WeightAveraging):
    """Averages the weights over the steps; validation, the export and ``state_dict`` in checkpoints use the average.

    On top of Lightning's callback: the decay may warm up, one fused update per step, no validation with weights that
    were never averaged, and the trained weights come back also when a validation is interrupted.

    Args:
        decay: Share of the old average that each step keeps, below 1. 0 switches the average off.
        warmup: Keep less in the first steps, ``min(decay, (1 + n) / (10 + n))`` at update n, so that short runs average
            over recent weights too.
        start_step: Optimizer steps before the first update.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must lie in [0, 1), got {decay!r}")
        if start_step < 0:
            raise ValueError(f"ema.start_step must be >= 0, got {start_step!r}")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self._swapped = False
        self._done = False

    @property
    def active(self) -> bool:
        """Whether weights are averaged at all."""
        return self.decay > 0

    @property
    def started(self) -> bool:
        """Whether the average holds anything but the initial weights."""
        return self._latest_update_step > 0

    def effective_decay(self, updates: int) -> float:
        """Decay at an update, counted from 1."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def _average(self, averages: Any, current: Any, count: Any) -> None:
        # the number of updates follows from the step: reading `count` would wait for the device
        decay = self.effective_decay(self._latest_update_step + 1 - self.start_step)
        torch._foreach_lerp_(averages, current, 1 - decay)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step from ``start_step`` on."""
        return step_idx is not None and step_idx >= self.start_step

    # ---- where Lightning would use an average that is none -------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the average in."""
        if self._average_model is not None and self.started and not self._done:
            self._swap_models(pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the trained weights back in."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swaps back if a validation was interrupted, before checkpoints are written."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the model."""
        self._finish(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a finished run was resumed and nothing was left to train."""
        self._finish(pl_module)

    def _finish(self, pl_module: LightningModule) -> None:
        if self._average_model is not None and self.started and not self._done:
            self._average_model.to(pl_module.device)
            self._copy_average_to_current(pl_module)
            self._done = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores both; before the first update the average is what is being trained, not the initial weights."""
        if self._average_model is not None and not self.started:
            for average, current in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
                average.data.copy_(current.data)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
