"""Training of image classifiers: what all kinds share, and those with one stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mambascope.models import load_checkpoint
from mambascope.models.architectures import architecture_of_entry, entry_names
from mambascope.models.cost import StageCost
from mambascope.models.flop_count import costs_of
from mambascope.models.losses import ClassificationLoss
from mambascope.models.two_stage import is_two_stage
from mambascope.training.args import MixArgs, ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.base import TrainModule, is_main_process


def build_model(args: ModelArgs, verbose: bool = True) -> Any:
    """Creates the model and loads the weights to finetune from.

    Raises:
        ValueError: For an unknown model, an unknown field of its config, or a checkpoint that does not fit.
    """
    architecture = architecture_of_entry(args.name, args.args)
    if architecture is None:
        raise ValueError(
            f"net.name must be one of {', '.join(entry_names())} or a classifier of timm's, got {args.name!r}"
        )
    create = architecture.create
    model: Any = timm.create_model(args.name, **args.args) if create is None else create(args.name, args.args)
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint, strict=args.strict, verbose=verbose)
    return model


def make_mixup(mix: MixArgs, num_classes: int) -> Mixup | None:
    """Mixup and CutMix by timm; ``None`` for neither.

    Raises:
        ValueError: If an option is out of range.
    """
    for name in ("mixup", "cutmix", "off_epochs"):
        if getattr(mix, name) < 0:
            raise ValueError(f"mix.{name} must be >= 0, got {getattr(mix, name)!r}")
    for name in ("prob", "switch_prob"):
        if not 0 <= getattr(mix, name) <= 1:
            raise ValueError(f"mix.{name} must lie in [0, 1], got {getattr(mix, name)!r}")
    if mix.mixup == 0 and mix.cutmix == 0:
        return None
    # smoothing is left to the loss: on mixed targets it gives the same numbers
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.prob,
        switch_prob=mix.switch_prob,
        mode=mix.mode,
        label_smoothing=0.0,
        num_classes=num_classes,
    )


class ImageModule(TrainModule):
    """Trains a classifier of images; its stages, and how they are measured, are up to the sub-class.

    Args:
        net: The model.
        loss: From the model's output in training and the targets to the loss, or to a mapping with ``loss`` and the
            parts to log; ``None`` for a ``loss_class`` with its defaults.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        mix: Mixup and CutMix.
        grad_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        compile: Compile the training step's forward pass: true, or the name of a ``torch.compile`` backend.
        seed: Of everything that is drawn during training.
        data_facts: Fields of the model's config that follow from the data (``num_classes``, ``img_size``); they hold
            where ``net.args`` does not say otherwise.

    Attributes:
        metrics: Names of the means that validation reports.
    """

    metrics: tuple[str, ...]

    def __init__(
        self,
        net: ModelArgs,
        loss: nn.Module | None,
        optimizer: OptimizerArgs,
        schedule: ScheduleArgs,
        mix: MixArgs,
        grad_checkpointing: bool,
        compile: bool | str,
        seed: int,
        data_facts: dict[str, Any] | None,
    ) -> None:
        super().__init__(net, optimizer, schedule, compile, seed)
        self.mix_args = mix
        net = replace(net, args={**(data_facts or {}), **net.args})
        classes, heads = (data_facts or {}).get("num_classes", 0), net.args.get("num_classes")
        if isinstance(heads, int) and heads < classes:
            raise ValueError(f"num_classes must be at least the {classes} classes of the data, got {heads}")
        self.model = build_model(net, verbose=is_main_process())
        if self.model.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 to train a classifier, got {self.model.num_classes}")
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.criterion: nn.Module = self.loss_class() if loss is None else loss
        self.mixup = make_mixup(mix, self.model.num_classes)
        # values that are not finite stay visible
        self.val_metrics = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in self.metrics})
        self._val_size: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Any:
        """The model's own forward."""
        return self.model(x)

    # ---- training ------------------------------------------------------------------------------------------------

    def _mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixup is None:
            return x, y
        if len(x) % 2:  # timm pairs images; a last odd batch stays as it is
            if not self.trainer.is_last_batch:
                raise ValueError(f"data.batch_size must be even with Mixup or CutMix, got {len(x)}")
            return x, y
        last = self.trainer.max_epochs or 0
        if self.mix_args.off_epochs and 0 < last <= self.current_epoch + self.mix_args.off_epochs:
            return x, y
        return self.mixup(x, y)

    def loss_parts(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """``loss`` and its parts, of images [B, C, H, W] and classes [B] or probabilities [B, C]."""
        parts = self.criterion(self.model(x), y)
        return dict(parts) if isinstance(parts, Mapping) else {"loss": parts}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of images [B, C, H, W] and classes [B]."""
        parts = self.loss_parts(*self._mixed(batch[0], batch[1]))
        if self._logs_now():
            self._log_parts({name: value.detach() for name, value in parts.items()})
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return parts["loss"]

    def _log_parts(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    # ---- validation ----------------------------------------------------------------------------------------------

    def stage_costs(self, results: dict[str, Any], img_size: tuple[int, int]) -> tuple[dict[str, StageCost], float]:
        """Cost per convention, and the share of images that take a second stage.

        Args:
            results: Means of the validation by name.
            img_size: Height and width of its images in pixels.
        """
        del results
        return costs_of(self.model, img_size), 1.0

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all processes, and the mean GFLOPs they imply."""
        results = self._results()
        height, width = self._over_processes(self._val_size or (0, 0), "max")
        costs, share = self.stage_costs(results, (int(height), int(width)))
        results["val/gflops"] = costs["one_direction"].gflops(share)
        results["val/gflops_both_directions"] = costs["both_directions"].gflops(share)
        self._log_results(results)


class ClassifierModule(ImageModule):
    """Trains a classifier with one stage: a Vim, or one of timm's.

    Args:
        net: The model.
        loss: From logits [B, C] and targets to the loss, or to a mapping with ``loss`` and the parts to log.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        mix: Mixup and CutMix.
        grad_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        compile: Compile the training step's forward pass: true, or the name of a ``torch.compile`` backend.
        seed: Of everything that is drawn during training.
        data_facts: Fields of the model's config that follow from the data (``num_classes``, ``img_size``); they hold
            where ``net.args`` does not say otherwise.
    """

    loss_class = ClassificationLoss
    metrics = ("top1", "top5", "loss")
    monitor = "val/top1"

    def __init__(
        self,
        net: ModelArgs = ModelArgs("vim_nano_patch8_64"),  # noqa: B008 (frozen)
        loss: nn.Module | None = None,
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
        mix: MixArgs = MixArgs(),  # noqa: B008
        grad_checkpointing: bool = False,
        compile: bool | str = False,
        seed: int = 0,
        data_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(net, loss, optimizer, schedule, mix, grad_checkpointing, compile, seed, data_facts)
        if is_two_stage(self.model):
            raise ValueError(f"ClassifierModule trains models with one stage; ScopeModule trains {net.name}")

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] of validation images [B, C, H, W]."""
        return self.model(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and cross entropy of a batch of images [B, C, H, W] and classes [B]."""
        x, y = batch[0], batch[1]
        self._val_size = (x.shape[-2], x.shape[-1])
        logits = self.logits(x).float()
        self._update("loss", F.cross_entropy(logits, y, reduction="none"))
        self._update_tops("", logits, y)
