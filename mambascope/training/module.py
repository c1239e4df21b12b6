"""Training and validation of the classifiers: MambaScope with both stages, and the one-stage models."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError

import mambascope  # noqa: F401  (registers the timm entries)
from mambascope.models import SCOPE_CONFIGS, VIM_CONFIGS, MambaScope, load_checkpoint
from mambascope.models.cells import num_selected
from mambascope.models.cost import CONVENTIONS
from mambascope.models.flop_count import costs_of
from mambascope.models.gate import confidence, exit_mask
from mambascope.models.losses import ClassificationLoss, ScopeLoss
from mambascope.peers import ReducedOutput, ReducedVim
from mambascope.peers.cost import reduced_cost, switches_scans
from mambascope.peers.loss import ReductionLoss
from mambascope.peers.teacher import Teacher
from mambascope.peers.timm_classifier import TimmConfig, create_timm_classifier, is_timm_classifier
from mambascope.training.args import LossArgs, MixArgs, ModelArgs, OptimizerArgs, ScheduleArgs, TeacherArgs
from mambascope.training.base import TrainModule, is_main_process

SCOPE_METRICS = tuple(f"{stage}_{top}" for stage in ("coarse", "fine", "dynamic") for top in ("top1", "top5"))


def build_model(args: ModelArgs, verbose: bool = True) -> Any:
    """Creates the model and loads the weights to finetune from.

    Raises:
        ValueError: For an unknown model, an unknown field of its config, or a checkpoint that does not fit.
    """
    known = sorted({**VIM_CONFIGS, **SCOPE_CONFIGS})
    model: Any
    if args.name in known:
        model = timm.create_model(args.name, **args.args)
    elif is_timm_classifier(args.name):
        model = create_timm_classifier(TimmConfig.of(args.name, args.args))
    else:
        raise ValueError(f"net.name must be one of {', '.join(known)} or a classifier of timm's, got {args.name!r}")
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint, strict=args.strict, verbose=verbose)
    return model


class ClassifierModule(TrainModule):
    """Trains a classifier; a MambaScope with both stages on every image (section 3.5), others with cross entropy.

    Args:
        net: The model.
        loss: The loss.
        teacher: What a model with token reduction is trained with besides the labels.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        mix: Mixup and CutMix.
        full_refine_epochs: First epochs in which the fine stage re-reads every cell (alpha = 1); after them, and always
            in validation, the model's own alpha holds. The paper has 200 of 300.
        grad_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        compile: Compile the training step's forward pass: true, or the name of a ``torch.compile`` backend.
        seed: Of everything that is drawn during training.
        data_facts: Fields of the model's config that follow from the data (``num_classes``, ``img_size``); they hold
            where ``net.args`` does not say otherwise.

    Attributes:
        model: The timm model.
        monitor: Name of the metric that the best checkpoint is chosen by.
    """

    def __init__(
        self,
        net: ModelArgs = ModelArgs(),  # noqa: B008 (frozen)
        loss: LossArgs = LossArgs(),  # noqa: B008
        teacher: TeacherArgs = TeacherArgs(),  # noqa: B008
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
        mix: MixArgs = MixArgs(),  # noqa: B008
        full_refine_epochs: int = 0,
        grad_checkpointing: bool = False,
        compile: bool | str = False,
        seed: int = 0,
        data_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(net, optimizer, schedule, compile, seed)
        if full_refine_epochs < 0:
            raise ValueError(f"full_refine_epochs must be >= 0, got {full_refine_epochs}")
        self.mix_args = mix
        self.full_refine_epochs = full_refine_epochs
        net = replace(net, args={**(data_facts or {}), **net.args})
        held, wanted = (data_facts or {}).get("num_classes", 0), net.args.get("num_classes")
        if isinstance(wanted, int) and wanted < held:
            raise ValueError(f"num_classes must be at least the {held} classes of the data, got {wanted}")
        self.model = build_model(net, verbose=is_main_process())
        if self.model.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 to train a classifier, got {self.model.num_classes}")
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.two_stage = isinstance(self.model, MambaScope)
        self.monitor = "val/dynamic_top1" if self.two_stage else "val/top1"
        self.reduced = isinstance(self.model, ReducedVim)
        if self.reduced and compile:
            raise ValueError(f"compile is not available with reduction, which changes shapes, got {compile!r}")
        self.criterion: nn.Module = (
            ScopeLoss(**asdict(loss)) if self.two_stage else ClassificationLoss(loss.label_smoothing)
        )
        self.teacher = self._make_teacher(teacher, net)
        if self.reduced:
            self.criterion = ReductionLoss(
                ClassificationLoss(loss.label_smoothing), teacher.kl_weight, teacher.token_weight
            )
        self.mixup = self._make_mixup(mix)
        names = (
            (*SCOPE_METRICS, "share_refined", "fine_loss", "coarse_loss")
            if self.two_stage
            else ("top1", "top5", "loss")
        )
        if self.reduced and switches_scans(self.model):
            names += tuple(f"scan_share_{block}" for block in range(self.model.config.depth))
        # values that are not finite stay visible
        self.val_metrics = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})
        if self.two_stage:
            self.val_metrics["gate_ece"] = BinaryCalibrationError(n_bins=15, validate_args=False)
        self._val_size: tuple[int, int] | None = None

    def _make_teacher(self, teacher: TeacherArgs, net: ModelArgs) -> Teacher | None:
        if not teacher.wanted:
            return None
        if not self.reduced:
            raise ValueError(f"teacher needs a model with reduction (net.args.reduction), got {net.name} without")
        checkpoint = teacher.checkpoint or net.checkpoint
        if checkpoint is None:
            raise ValueError(
                "teacher.checkpoint must be given: without it and net.checkpoint there is nothing to learn from"
            )
        return Teacher(self.model.config, checkpoint)

    def _make_mixup(self, mix: MixArgs) -> Mixup | None:
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
            num_classes=self.model.num_classes,
        )

    def forward(self, x: Tensor) -> Any:
        """The model's own forward."""
        return self.model(x)

    # ---- training ------------------------------------------------------------------------------------------------

    def _set_phase(self) -> None:
        if isinstance(self.model, MambaScope):
            full = self.current_epoch < self.full_refine_epochs
            self.model.alpha = 1.0 if full else self.model.config.alpha

    def _leaves_parameters(self) -> bool:
        return self.two_stage and self._alpha() == 0  # the fine stage then reads no cell anew

    def on_train_epoch_start(self) -> None:
        """Announces the phase."""
        if self.two_stage and self.current_epoch == self.full_refine_epochs > 0:
            self.print(f"epoch {self.current_epoch}: from now on the fine stage re-reads alpha = {self._alpha():g}")

    def _alpha(self) -> float:
        assert isinstance(self.model, MambaScope)
        return self.model.config.alpha

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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of images [B, C, H, W] and classes [B]."""
        x, y = self._mixed(batch[0], batch[1])
        parts = self._reduced_parts(x, y) if self.reduced else self.criterion(self.model(x), y)
        if self._logs_now():
            if self.reduced:
                for name in parts.keys() - {"loss"}:
                    self.log(f"train/{name}", parts[name])
            self.log("train/loss", parts["loss"].detach(), prog_bar=not self.two_stage)
            if self.two_stage:
                self.log("train/fine_ce", parts["fine_ce"], prog_bar=True)
                self.log("train/coarse_kl", parts["coarse_kl"], prog_bar=True)
                self.log("train/coarse_ce", parts["coarse_ce"])
                self.log("train/alpha", float(self.model.alpha))
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return parts["loss"]

    def _reduced_parts(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The loss of a model with token reduction, and its parts."""
        output: ReducedOutput = self.model.forward_reduced(x)
        taught = None if self.teacher is None else self.teacher(x)
        return self.criterion(output, y, self.model.reduction.penalties(output), taught)

    # ---- validation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Runs each stage once; what the threshold makes of them follows from the logits."""
        x, y = batch[0], batch[1]
        self._val_size = (x.shape[-2], x.shape[-1])
        if not isinstance(self.model, MambaScope):
            logits = self._one_stage_logits(x).float()
            self._update("loss", F.cross_entropy(logits, y, reduction="none"))
            self._update_tops("", logits, y)
            return
        coarse, fine = (logits.float() for logits in self.model.forward_both(x, self.model.config.alpha))
        self._update("coarse_loss", F.cross_entropy(coarse, y, reduction="none"))
        self._update("fine_loss", F.cross_entropy(fine, y, reduction="none"))
        conf = confidence(coarse)
        # alpha = 0 selects nothing, so that every coarse answer stands, as in forward_scope
        selects = num_selected(self.model.config.alpha, self._cells()) > 0
        exited = exit_mask(conf, self.model.threshold if selects else 0.0)
        self._update_tops("coarse_", coarse, y)
        self._update_tops("fine_", fine, y)
        self._update_tops("dynamic_", torch.where(exited.unsqueeze(1), coarse, fine), y)
        self._update("share_refined", (~exited).float())
        self.val_metrics["gate_ece"].update(conf, (coarse.argmax(1) == y).long())  # type: ignore[operator]

    def _one_stage_logits(self, x: Tensor) -> Tensor:
        """Logits [B, C]; the share of scans that ran is noted where it differs between images."""
        if not (self.reduced and switches_scans(self.model)):
            return self.model(x)
        output = self.model.forward_reduced(x)
        assert output.switches is not None
        for block, share in enumerate(output.switches.mean(2).unbind(1)):
            self._update(f"scan_share_{block}", share)
        return output.logits

    def _cells(self) -> int:
        assert self._val_size is not None
        height, width = (math.ceil(side / (2 * self.model.config.patch_size)) for side in self._val_size)
        return height * width

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all processes, and the mean GFLOPs they imply."""
        if self.two_stage and self._val_size is None:  # a process without an image: its lists are empty ones, not none
            nothing = torch.zeros(0, device=self.device)
            self.val_metrics["gate_ece"].update(nothing, nothing.long())  # type: ignore[operator]
        results = self._results()
        height, width = self._over_processes(self._val_size or (0, 0), "max")
        share = float(results["val/share_refined"]) if self.two_stage else 1.0
        switched = self.reduced and switches_scans(self.model)
        blocks = range(self.model.config.depth if switched else 0)
        ran = [float(results[f"val/scan_share_{block}"]) for block in blocks] or None
        size = int(height), int(width)
        costs = costs_of(self.model, size, self._alpha() if self.two_stage else None)
        if ran:
            costs = {c: reduced_cost(self.model.config, size, convention=c, scan_share=ran) for c in CONVENTIONS}
        results["val/gflops"] = costs["one_direction"].gflops(share)
        results["val/gflops_both_directions"] = costs["both_directions"].gflops(share)
        self._log_results(results)

    def describe(self) -> dict[str, Any]:
        """Description of the model as it will be used, whatever the phase of the training."""
        description = super().describe()
        if self.two_stage:
            description["config"]["alpha"] = self._alpha()
        return description
