"""Training and validation of MambaEye: an answer after every glimpse, each as sure as the image has been seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mambascope.eye.config import MAMBAEYE_CONFIGS
from mambascope.eye.glimpses import GlimpseSequence
from mambascope.eye.loss import GlimpseLoss
from mambascope.eye.model import MambaEye
from mambascope.models import load_checkpoint
from mambascope.training.args import ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.base import TrainModule, is_main_process

_CHUNK = 256  # glimpses whose logits exist at once in validation


def build_eye(args: ModelArgs, verbose: bool = True) -> MambaEye:
    """Creates the model and loads the weights to finetune from.

    Raises:
        ValueError: For an unknown model, an unknown field of its config, or a checkpoint that does not fit.
    """
    if args.name not in MAMBAEYE_CONFIGS:
        raise ValueError(f"net.name must be one of {', '.join(sorted(MAMBAEYE_CONFIGS))}, got {args.name!r}")
    model = timm.create_model(args.name, **args.args)
    assert isinstance(model, MambaEye)
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint, strict=args.strict, verbose=verbose)
    return model


class EyeModule(TrainModule):
    """Trains a MambaEye on glimpse sequences with the diffusion-inspired loss of its paper (arXiv 2511.19963).

    Args:
        net: The model.
        loss: From logits [B, L, C], classes [B] and information ratios [B, L] to a mapping with ``loss`` and ``floor``.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        report_at: Glimpses after which validation accuracy is logged, besides the last one.
        grad_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        matmul_precision: Of fp32 matrix products on a GPU; the paper's ``high`` is TF32.
        compile: Compile the training step's forward pass: true, or the name of a ``torch.compile`` backend.
        seed: Of everything that is drawn during training.
        data_facts: Fields of the model's config that follow from the data (``num_classes``, ``patch_size``); they hold
            where ``net.args`` does not say otherwise.

    Attributes:
        model: The timm model.
        monitor: Name of the metric that the best checkpoint is chosen by: accuracy after the last glimpse.
    """

    loss_class = GlimpseLoss

    def __init__(
        self,
        net: ModelArgs = ModelArgs("mambaeye_nano_patch16"),  # noqa: B008 (frozen)
        loss: nn.Module | None = None,
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
        report_at: Sequence[int] = (16, 64, 256, 512, 1024, 2048),
        grad_checkpointing: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        compile: bool | str = False,
        seed: int = 0,
        data_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(net, optimizer, schedule, compile, seed)
        if any(step < 1 for step in report_at):
            raise ValueError(f"report_at must be numbers of glimpses, each at least 1, got {list(report_at)}")
        facts = {k: v for k, v in (data_facts or {}).items() if k in MambaEye.config_class.__dataclass_fields__}
        self.model = build_eye(replace(net, args={**facts, **net.args}), verbose=is_main_process())
        if self.model.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 to train a classifier, got {self.model.num_classes}")
        if self.model.config.patch_size != facts.get("patch_size", self.model.config.patch_size):
            raise ValueError(
                f"patch_size must be the same for the data and the model, got data.patch_size {facts['patch_size']} "
                f"and net.args.patch_size {self.model.config.patch_size}"
            )
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.matmul_precision = matmul_precision
        self.report_at = sorted(set(report_at))
        self.criterion: nn.Module = self.loss_class() if loss is None else loss
        self.monitor = "val/top1"
        names = ["top1", "top5", "loss", "floor", *(f"top1_at_{step}" for step in self.report_at)]
        # values that are not finite stay visible
        self.val_metrics = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    def forward(self, patches: Tensor, moves: Tensor) -> Tensor:
        """The model's own forward."""
        return self.model(patches, moves)

    def on_fit_start(self) -> None:
        """Chooses how matrix products are computed."""
        torch.set_float32_matmul_precision(self.matmul_precision)
        super().on_fit_start()

    def training_step(self, batch: tuple[GlimpseSequence, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of glimpse sequences and classes [B]."""
        glimpses, y = batch
        parts = self.criterion(self.model(glimpses.patches, glimpses.moves), y, glimpses.information_ratio)
        if self._logs_now():
            self.log("train/loss", parts["loss"].detach(), prog_bar=True)
            # what is above the floor is what the model has still to learn
            self.log("train/excess_loss", parts["loss"].detach() - parts["floor"])
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return parts["loss"]

    def validation_step(self, batch: tuple[GlimpseSequence, Tensor], batch_idx: int) -> None:
        """One causal pass; logits are made a few hundred glimpses at a time."""
        glimpses, y = batch
        features = self.model.forward_features(glimpses.patches, glimpses.moves)
        length = features.shape[1]
        for start in range(0, length, _CHUNK):
            part = slice(start, min(start + _CHUNK, length))
            logits = self.model.forward_head(features[:, part]).float()
            parts = self.criterion(logits, y, glimpses.information_ratio[:, part])
            for name in ("loss", "floor"):
                # one value per answer: with nan_strategy="disable" torchmetrics ignores weights
                self._update(name, parts[name].expand(logits.shape[:2].numel()))
            for step in self.report_at:
                if start < step <= part.stop:
                    self._update(f"top1_at_{step}", (logits[:, step - 1 - start].argmax(1) == y).float())
            if part.stop == length:
                self._update_tops("", logits[:, -1], y)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all processes; steps beyond the sequences have no value."""
        weights = self._over_processes([metric.weight for metric in self.val_metrics.values()], "sum")  # type: ignore
        seen = {f"val/{name}" for name, weight in zip(self.val_metrics, weights, strict=True) if weight > 0}
        self._log_results({name: value for name, value in self._results().items() if name in seen})
