"""What the Lightning modules share: optimizer, schedule, seeded steps, clipping and what checkpoints say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torchmetrics import Metric

from mambascope.models.checkpoint import describe
from mambascope.training.args import ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.limits import planned_steps
from mambascope.training.optim import build_optimizer, build_schedule, scaled_lr
from mambascope.training.rng import seed_step


def is_main_process() -> bool:
    """Whether this is the process that prints and writes; known before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


class TrainModule(LightningModule):
    """A model with its optimizer and schedule; what is trained, and how it is measured, is up to the sub-class.

    Args:
        net: The model's name and options, as they were given.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        compile: Compile the training step's forward pass: true, or the name of a ``torch.compile`` backend.
        seed: Of everything that is drawn during training.

    Attributes:
        model: The timm model.
        loss_class: The loss that a config without ``class_path`` means.
        monitor: Name of the metric that the best checkpoint is chosen by.
        val_metrics: Metrics of the validation by name.
    """

    loss_class: ClassVar[type[nn.Module]]
    model: Any
    monitor: str
    val_metrics: nn.ModuleDict

    def __init__(
        self,
        net: ModelArgs,
        optimizer: OptimizerArgs,
        schedule: ScheduleArgs,
        compile: bool | str,
        seed: int,
    ) -> None:
        super().__init__()
        self.net, self.optimizer_args, self.schedule_args = net, optimizer, schedule
        if isinstance(compile, str):
            backends = torch.compiler.list_backends(exclude_tags=())
            if compile not in backends:
                raise ValueError(f"compile must be true, false or one of {', '.join(backends)}, got {compile!r}")
        self.compile_model = compile
        self.seed = seed
        self._schedule: Scheduler | None = None

    @classmethod
    def complete_options(cls, options: Any) -> None:
        """Fills in options of the config's section ``model`` that follow from others."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedule is driven by the step number (see ``on_train_batch_start``)."""
        # fp16 unscales the gradients before they are clipped, which a fused optimizer would do itself
        fused = self.trainer.precision not in ("16-mixed", "16-true")
        return build_optimizer(self.model, self.optimizer_args, self._peak_lr(), fused)

    def _peak_lr(self) -> float:
        batch = self._global_batch()
        if batch is None:
            if self.optimizer_args.lr_batch is not None:
                raise ValueError("optimizer.lr_batch needs a data module with a batch_size; set it to null")
            return self.optimizer_args.lr
        return scaled_lr(self.optimizer_args, batch)

    def _global_batch(self) -> int | None:
        """Images of one optimizer step over all processes."""
        batch = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        return None if batch is None else batch * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def on_fit_start(self) -> None:
        """Compiles, if wanted: after the averaged copy was made, which need not be compiled."""
        if self._global_batch() is not None:
            self.print(f"{self._global_batch()} images per step, peak learning rate {self._peak_lr():.3g}")
        if self.compile_model:
            backend = {} if self.compile_model is True else {"backend": self.compile_model}
            self.model.compile(**backend)

    def on_train_start(self) -> None:
        """Builds the schedule; here the number of batches is known without touching the loader's restored state."""
        epoch_steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        optimizer = self.trainer.optimizers[0]
        total = planned_steps(self.trainer)
        last = self.trainer.max_steps
        if self.global_step < last < total and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.print(
                f"trainer.max_steps ends the training at step {last} of {total:g}, which the learning rate follows; "
                "for a schedule that ends there: --trainer.max_epochs=-1"
            )
        self._schedule = build_schedule(optimizer, self.schedule_args, self._peak_lr(), total, epoch_steps)

    def _leaves_parameters(self) -> bool:
        """Whether steps may leave parameters without a gradient."""
        return False

    def setup(self, stage: str) -> None:
        """Lets several processes agree on the parameters that a step leaves out, where there are any."""
        if isinstance(self.trainer.strategy, DDPStrategy) and self._leaves_parameters():
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def _set_phase(self) -> None:
        """Sets what the model does differently in some epochs."""

    def end_phase(self) -> None:
        """Sets the model as it is used when training has ended."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets what depends on the step alone: randomness, phase and learning rate."""
        assert self._schedule is not None
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
        self._set_phase()
        self._schedule.step_update(self.global_step)

    def _logs_now(self) -> bool:
        """Whether the loggers write this step; asking them first keeps the other steps free of bookkeeping."""
        return self.trainer._logger_connector.should_update_logs

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, also for a fused optimizer under bf16, which Lightning refuses although nothing is scaled there."""
        fused_bf16 = optimizer.defaults.get("fused") and self.trainer.precision == "bf16-mixed"
        if not gradient_clip_val or not fused_bf16:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    # ---- metrics -------------------------------------------------------------------------------------------------

    def _update(self, name: str, values: Tensor) -> None:
        self.val_metrics[name].update(values)  # type: ignore[operator]

    def _update_tops(self, prefix: str, logits: Tensor, y: Tensor) -> None:
        """Adds hits; with ties the lower class wins top-1."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self._update(f"{prefix}top1", (logits.argmax(1) == y).float())
        self._update(f"{prefix}top5", (best == y.unsqueeze(1)).any(1).float())

    def _results(self) -> dict[str, Any]:
        """Values of all metrics over all processes, which start anew."""
        results = {}
        for name, metric in self.val_metrics.items():
            assert isinstance(metric, Metric)
            results[f"val/{name}"] = metric.compute()
            metric.reset()
        return results

    def _over_processes(self, values: Sequence[float], operation: str) -> list[float]:
        """The sums or maxima of numbers over all processes, of which some may have had no validation image."""
        tensor = torch.tensor(values, device=self.device)
        return self.trainer.strategy.reduce(tensor, reduce_op=operation).tolist()

    def _log_results(self, results: dict[str, Any]) -> None:
        for name, value in results.items():
            # already reduced over the processes by the metrics themselves
            self.log(name, value, sync_dist=self.trainer.world_size > 1)

    # ---- files ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what ``mambascope.load_model`` needs to rebuild the model from the file."""
        checkpoint["mambascope"] = self.describe()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where a run with an average goes on without one, training continues from the trained weights."""
        averages = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if not averages and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")

    def describe(self) -> dict[str, Any]:
        """Description of the model as it will be used, whatever the phase of the training."""
        return describe(self.model)
