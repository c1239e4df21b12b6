"""Training of two-stage classifiers: MambaScope (section 3.5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError

from mambascope.models.cost import StageCost
from mambascope.models.flop_count import costs_of
from mambascope.models.losses import ScopeLoss
from mambascope.models.two_stage import is_two_stage
from mambascope.training.args import MixArgs, ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.module import ImageModule

_BAR = ("fine_ce", "coarse_kl")  # parts of the loss that the progress bar shows


class ScopeModule(ImageModule):
    """Trains a two-stage classifier with both stages on every image.

    Args:
        net: The model.
        loss: From both stages' logits (:class:`~mambascope.models.states.StageLogits`) and targets to the loss, or to a
            mapping with ``loss`` and the parts to log.
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
    """

    loss_class = ScopeLoss
    metrics = (
        *(f"{stage}_{top}" for stage in ("coarse", "fine", "dynamic") for top in ("top1", "top5")),
        "share_refined",
        "fine_loss",
        "coarse_loss",
    )
    monitor = "val/dynamic_top1"

    def __init__(
        self,
        net: ModelArgs = ModelArgs(),  # noqa: B008 (frozen)
        loss: nn.Module | None = None,
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
        mix: MixArgs = MixArgs(),  # noqa: B008
        full_refine_epochs: int = 0,
        grad_checkpointing: bool = False,
        compile: bool | str = False,
        seed: int = 0,
        data_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(net, loss, optimizer, schedule, mix, grad_checkpointing, compile, seed, data_facts)
        if not is_two_stage(self.model):
            raise ValueError(f"ScopeModule trains models with two stages; ClassifierModule trains {net.name}")
        if full_refine_epochs < 0:
            raise ValueError(f"full_refine_epochs must be >= 0, got {full_refine_epochs}")
        self.full_refine_epochs = full_refine_epochs
        self.val_metrics["gate_ece"] = BinaryCalibrationError(n_bins=15, validate_args=False)

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """Share of cells that the model re-reads after the first phase."""
        return self.model.config.alpha

    def _set_phase(self) -> None:
        self.model.alpha = 1.0 if self.current_epoch < self.full_refine_epochs else self.alpha

    def _leaves_parameters(self) -> bool:
        return self.alpha == 0  # the fine stage then reads no cell anew

    def on_train_epoch_start(self) -> None:
        """Announces the phase."""
        if self.current_epoch == self.full_refine_epochs > 0:
            self.print(f"epoch {self.current_epoch}: from now on the fine stage re-reads alpha = {self.alpha:g}")

    def end_phase(self) -> None:
        """Gives the model its own alpha back: a run may end in its first phase."""
        self.model.alpha = self.alpha

    def _log_parts(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.log(f"train/{name}", value, prog_bar=name in _BAR)
        self.log("train/alpha", float(self.model.alpha))

    # ---- validation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Runs each stage once on every image; what the gate makes of them follows from the coarse one."""
        x, y = batch[0], batch[1]
        self._val_size = (x.shape[-2], x.shape[-1])
        state = self.model.forward_coarse(x)
        confidence, exited = self.model.decide(state, alpha=self.alpha)
        coarse = fine = state.logits.float()
        if self.alpha > 0:
            fine = self.model.forward_fine(x, state, self.alpha).logits.float()
        self._update("coarse_loss", F.cross_entropy(coarse, y, reduction="none"))
        self._update("fine_loss", F.cross_entropy(fine, y, reduction="none"))
        self._update_tops("coarse_", coarse, y)
        self._update_tops("fine_", fine, y)
        self._update_tops("dynamic_", torch.where(exited.unsqueeze(1), coarse, fine), y)
        self._update("share_refined", (~exited).float())
        self._update_gate(confidence, (coarse.argmax(1) == y).long())

    def _update_gate(self, confidence: Tensor, correct: Tensor) -> None:
        self.val_metrics["gate_ece"].update(confidence, correct)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all processes, and the mean GFLOPs they imply."""
        if self._val_size is None:  # a process without an image: its lists are empty ones, not none
            nothing = torch.zeros(0, device=self.device)
            self._update_gate(nothing, nothing.long())
        super().on_validation_epoch_end()

    def stage_costs(self, results: dict[str, Any], img_size: tuple[int, int]) -> tuple[dict[str, StageCost], float]:
        """Cost per convention at the model's own alpha, and the share of images that were refined."""
        return costs_of(self.model, img_size, self.alpha), float(results["val/share_refined"])

    def describe(self) -> dict[str, Any]:
        """Description of the model as it will be used, whatever the phase of the training."""
        description = super().describe()
        description["config"]["alpha"] = self.alpha
        return description
