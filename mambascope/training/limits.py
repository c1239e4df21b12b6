"""What ends a training before its epochs do: steps, time, or a callback."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer


def reached_limit(trainer: Trainer) -> str | None:
    """What ends the training at this step whatever is left of its epochs, in the user's words; ``None`` for nothing."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return f"trainer.max_steps={trainer.max_steps}"
    if not trainer.should_stop or not trainer.fit_loop._can_stop_early:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None and remaining <= 0:
            return "trainer.max_time"
        if isinstance(callback, EarlyStopping) and getattr(callback, "stopping_reason_message", None):
            return f"EarlyStopping ({callback.monitor})"
    return "a callback"


def whole_epochs(trainer: Trainer) -> int:
    """Epochs that were trained to their end; Lightning also counts the one that a limit broke off."""
    loop = trainer.fit_loop
    progress = loop.epoch_progress.current
    interruption = progress.ready == progress.completed and not loop.epoch_loop.batch_progress.is_last_batch
    return max(0, trainer.current_epoch - int(interruption))


def planned_steps(trainer: Trainer) -> float:
    """Optimizer steps of all epochs; where their number is not limited, those of ``trainer.max_steps``.

    A limit on the steps or on the time does not change the plan: what it interrupts can go on as if it had not been.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or batches == float("inf"):
        return trainer.estimated_stepping_batches
    return -(-int(batches) // trainer.accumulate_grad_batches) * max(epochs, 1)
