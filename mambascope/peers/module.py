"""Training of a Vim with token reduction: labels, the method's own terms, and a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from mambascope.models.cost import CONVENTIONS, StageCost
from mambascope.peers.cost import reduced_cost, switches_scans
from mambascope.peers.loss import ReductionLoss
from mambascope.peers.model import ReducedVim
from mambascope.peers.teacher import Teacher
from mambascope.training.args import MixArgs, ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.module import ClassifierModule


@dataclass(frozen=True)
class TeacherArgs:
    """The unreduced Vim that a Vim with token reduction learns from.

    Attributes:
        checkpoint: Its weights; ``null`` takes those that the training starts from (``net.checkpoint``).
        kl_weight: Weight of KL(teacher || model) between the logits. R-MeeTo and DyVM have 0.5.
        token_weight: Weight of the same between the outputs of the patches that are left. DyVM has 0.5; not for methods
            that merge.
    """

    checkpoint: str | None = None
    kl_weight: float = 0.0
    token_weight: float = 0.0

    @property
    def teaches(self) -> bool:
        """Whether anything is learned from it."""
        return self.kl_weight != 0 or self.token_weight != 0


class ReducedModule(ClassifierModule):
    """Trains a Vim with token reduction.

    Args:
        net: The model, with ``reduction`` among its options.
        loss: What the labels ask for: from logits [B, C] and targets to the loss, or to a mapping with ``loss``.
        teacher: What the model is trained with besides the labels.
        optimizer: AdamW.
        schedule: Learning rate over the steps.
        mix: Mixup and CutMix.
        grad_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        compile: Not available: the shapes change.
        seed: Of everything that is drawn during training.
        data_facts: Fields of the model's config that follow from the data (``num_classes``, ``img_size``); they hold
            where ``net.args`` does not say otherwise.
    """

    criterion: ReductionLoss

    def __init__(
        self,
        net: ModelArgs = ModelArgs("vim_nano_patch8_64", {"reduction": {"name": "r_meeto"}}),  # noqa: B008 (frozen)
        loss: nn.Module | None = None,
        teacher: TeacherArgs = TeacherArgs(),
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
        mix: MixArgs = MixArgs(),  # noqa: B008
        grad_checkpointing: bool = False,
        compile: bool | str = False,
        seed: int = 0,
        data_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(net, loss, optimizer, schedule, mix, grad_checkpointing, compile, seed, data_facts)
        if not isinstance(self.model, ReducedVim):
            raise ValueError(f"teacher needs a model with reduction (net.args.reduction), got {net.name} without")
        if compile:
            raise ValueError(f"compile is not available with reduction, which changes shapes, got {compile!r}")
        self.criterion = ReductionLoss(self.criterion, teacher.kl_weight, teacher.token_weight)
        self.teacher = self._make_teacher(teacher, net)
        for block in self._switched():
            self.val_metrics[f"scan_share_{block}"] = MeanMetric(nan_strategy="disable")

    @classmethod
    def complete_options(cls, options: Any) -> None:
        """The teacher has the weights that the training starts from; a resumed one would not know them any more."""
        teacher = options.teacher
        if teacher.checkpoint is None and (teacher.kl_weight or teacher.token_weight):
            teacher.checkpoint = options.net.checkpoint

    def _make_teacher(self, teacher: TeacherArgs, net: ModelArgs) -> Teacher | None:
        if not teacher.teaches:
            return None
        checkpoint = teacher.checkpoint or net.checkpoint
        if checkpoint is None:
            raise ValueError(
                "teacher.checkpoint must be given: without it and net.checkpoint there is nothing to learn from"
            )
        return Teacher(self.model.config, checkpoint)

    def _switched(self) -> range:
        """Blocks whose scans are switched per image."""
        return range(self.model.config.depth if switches_scans(self.model) else 0)

    def loss_parts(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """``loss`` and its parts, of images [B, C, H, W] and classes [B] or probabilities [B, C]."""
        output = self.model.forward_reduced(x)
        lesson = None if self.teacher is None else self.teacher(x)
        return self.criterion(output, y, self.model.reduction.penalties(output), lesson)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C]; the share of scans that ran is noted where it differs between images."""
        if not self._switched():
            return self.model(x)
        output = self.model.forward_reduced(x)
        for block, share in enumerate(output.switches.mean(2).unbind(1)):
            self._update(f"scan_share_{block}", share)
        return output.logits

    def stage_costs(self, results: dict[str, Any], img_size: tuple[int, int]) -> tuple[dict[str, StageCost], float]:
        """Cost per convention with the share of scans that ran; there is one stage."""
        ran = [float(results[f"val/scan_share_{block}"]) for block in self._switched()] or None
        costs = {c: reduced_cost(self.model.config, img_size, convention=c, scan_share=ran) for c in CONVENTIONS}
        return costs, 1.0
