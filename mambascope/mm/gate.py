"""The gate of dense models: which classes the coarse look sees, how sure it is, and what it is trained on.

Shape letters: B batch, C classes, H and W pixels. MambaScope section 5.2: an image-level multi-label head on the coarse
CLS output, trained with binary cross-entropy on the classes that are present.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambascope.data.errors import DataError
from mambascope.models.gate import Gate
from mambascope.models.states import CoarseState
from mambascope.ops.flops import count_macs
from mambascope.utils import check_positive, evaluating


def _mean_present(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    present = p >= 0.5
    mean = (p * present).sum(1) / present.sum(1).clamp(min=1)
    return torch.where(present.any(1), mean, p.amax(1))


def _max(logits: Tensor) -> Tensor:
    return logits.sigmoid().amax(1)


def _margin(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    present = p >= 0.5
    lowest_in = p.masked_fill(~present, 1.0).amin(1)
    highest_out = p.masked_fill(present, 0.0).amax(1)
    return torch.where(present.any(1), lowest_in - highest_out, torch.zeros_like(highest_out))


def _entropy(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    nats = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))
    return 1 - nats.mean(1) / math.log(2)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_present": _mean_present,
    "max": _max,
    "margin": _margin,
    "entropy": _entropy,
}
"""From multi-label logits [B, C] to confidence [B] in [0, 1].

``mean_present``: Mean probability of the classes predicted present (p >= 0.5); if there is none, the largest
probability. ``max``: The largest probability. ``margin``: The gap between the least likely class that is predicted
present and the most likely one that is not; 0 if none is present. It is small as soon as a single class is in doubt,
where a mean hides it behind the rest. ``entropy``: 1 minus the mean entropy of the classes in bits: every class in
doubt counts, those thought absent too.
"""


def gate_confidence(logits: Tensor, rule: str = "mean_present") -> Tensor:
    """How sure the gate is of each image, in [0, 1].

    Args:
        logits: Multi-label logits [B, C].
        rule: One of :data:`RULES`.

    Returns:
        Confidence [B], at least fp32.

    Raises:
        ValueError: If the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"confidence must be one of {', '.join(RULES)}, got {rule!r}")
    return RULES[rule](logits.to(torch.promote_types(logits.dtype, torch.float32)))


def check_labels(labels: Sequence[int], num_classes: int, ignore_index: int, name: str) -> None:
    """Checks that what a mask holds are classes or ``ignore_index``; ``name`` is what to call it.

    Raises:
        DataError: If a label is something else.
    """
    wrong = [label for label in labels if label != ignore_index and not 0 <= label < num_classes]
    if wrong:
        raise DataError(
            f"{name} holds label {', '.join(map(str, wrong[:5]))}; accepted are 0..{num_classes - 1} and "
            f"{ignore_index} (ignored) after loading. Check num_classes and reduce_zero_label of the data set"
        )


def presence_from_masks(
    masks: Sequence[Tensor], num_classes: int, ignore_index: int = 255, names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Classes present in segmentation masks.

    Args:
        masks: One integer mask [..., H, W] per image.
        num_classes: C.
        ignore_index: Label of pixels that say nothing.
        names: What to call each mask in an error, e.g. its file.

    Returns:
        Presence [B, C] (0 or 1, float32) and which images have any labelled pixel [B] bool: the others are left out of
        the loss.

    Raises:
        DataError: If a label is neither a class nor ``ignore_index``.
    """
    rows, labelled = [], []
    for i, mask in enumerate(masks):
        labels = mask[mask != ignore_index].long()
        classes = torch.unique(labels)
        check_labels(classes.tolist(), num_classes, ignore_index, names[i] if names else f"mask {i} of the batch")
        row = torch.zeros(num_classes, device=mask.device)
        row[classes] = 1.0
        rows.append(row)
        labelled.append(classes.numel() > 0)
    device = rows[0].device
    return torch.stack(rows), torch.tensor(labelled, device=device)


def presence_from_labels(labels: Sequence[Tensor], num_classes: int, names: Sequence[str] | None = None) -> Tensor:
    """Classes present among the labels [n] of each image's boxes, as [B, C] (0 or 1, float32); n may be 0.

    Raises:
        DataError: If a label is no class.
    """
    rows = []
    for i, image_labels in enumerate(labels):
        wrong = image_labels[(image_labels < 0) | (image_labels >= num_classes)]
        if wrong.numel():
            name = names[i] if names else f"image {i} of the batch"
            raise DataError(
                f"{name} has a box of class {int(wrong.max())}; accepted are 0..{num_classes - 1}. Check num_classes "
                "of the heads and of the gate against the data set's classes"
            )
        row = torch.zeros(num_classes, device=image_labels.device)
        row[image_labels.long()] = 1.0
        rows.append(row)
    return torch.stack(rows)


class DenseGate(Gate):
    """How sure a segmentor or detector is after the coarse look: coarse state to confidence [B].

    It tells which classes are in the image (:meth:`logits`), how sure that is (:meth:`confidence`), and learns from the
    classes that are really there (:meth:`loss`). A gate of one's own derives from this class, writes :meth:`logits` and
    what else shall differ, and is registered with ``@MODELS.register_module()`` of mmengine; a backbone builds the one
    that its config names, ``gate=dict(type="MyGate", num_classes=11)``, with the model width ``dim``. Its weights are
    part of the backbone's (``backbone.gate.*``): saved, loaded and trained with the model.

    Args:
        num_classes: C.
        confidence: Rule, see :func:`gate_confidence`.
        loss_weight: Weight of the loss.
        skip_classes: Classes that the confidence leaves out. A class that nearly every image has, such as a background,
            is always sure to be present and would hide that nothing else is.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        confidence: str = "mean_present",
        loss_weight: float = 1.0,
        skip_classes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_positive("num_classes of the gate", num_classes)
        if confidence not in RULES:
            raise ValueError(f"confidence of the gate must be one of {', '.join(RULES)}, got {confidence!r}")
        if loss_weight < 0:
            raise ValueError(f"loss_weight of the gate must be >= 0, got {loss_weight}")
        skipped = set(skip_classes)
        if not skipped < set(range(num_classes)):
            raise ValueError(
                f"skip_classes of the gate must be some of the classes 0..{num_classes - 1} and leave at least one, "
                f"got {list(skip_classes)}"
            )
        self.num_classes = num_classes
        self.rule = confidence
        self.kept_classes = [c for c in range(num_classes) if c not in skipped]
        self.loss_weight = loss_weight

    def forward(self, coarse: CoarseState) -> Tensor:
        """Confidence [B] of images after the coarse look."""
        return self.confidence(self.logits(coarse))

    def logits(self, coarse: CoarseState) -> Tensor:
        """Multi-label logits [B, C] of the classes in the images."""
        raise NotImplementedError

    def cell_logits(self, features: Tensor) -> Tensor:
        """Multi-label logits [B, M, C] of the classes in each cell, from the coarse patch outputs [B, M, d].

        Asked for where the cells are ranked by evidence (``score_metric``), and then trained too.
        """
        raise NotImplementedError

    @property
    def tells_cells(self) -> bool:
        """Whether the gate can be asked about single cells."""
        return type(self).cell_logits is not DenseGate.cell_logits

    def cell_macs(self, dim: int) -> int:
        """Multiply-adds of :meth:`cell_logits` for one cell; ``dim``: model width d.

        Raises:
            ValueError: If it does not give one logit per class.
        """
        one = torch.zeros(1, 1, dim)
        with evaluating(self):
            shape = tuple(self.cell_logits(one).shape)
            if shape != (1, 1, self.num_classes):
                raise ValueError(
                    f"cell_logits of {type(self).__name__} must give [1, 1, {self.num_classes}] for one cell, "
                    f"got {list(shape)}"
                )
            return count_macs(self.cell_logits, one)

    def cell_presence(self, features: Tensor) -> Tensor:
        """Probabilities [B, M, C] of the classes in each cell, without those that the confidence leaves out."""
        logits = self.cell_logits(features)
        return (
            (logits[..., self.kept_classes] if len(self.kept_classes) < self.num_classes else logits).float().sigmoid()
        )

    def cell_loss(self, logits: Tensor, presence: Tensor, labelled: Tensor) -> Tensor:
        """The loss of cells, as that of images.

        Args:
            logits: [B, M, C].
            presence: Classes that are really there [B, M, C], 0 or 1.
            labelled: Cells that take part [B, M] bool.
        """
        return self.loss(logits.flatten(0, 1), presence.flatten(0, 1), labelled.flatten())

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence [B] of logits [B, C], see :func:`gate_confidence`; no gradient."""
        logits = logits.detach()
        if len(self.kept_classes) < self.num_classes:
            logits = logits[:, self.kept_classes]
        return gate_confidence(logits, self.rule)

    def loss(self, logits: Tensor, presence: Tensor, labelled: Tensor | None = None) -> Tensor:
        """Weighted binary cross-entropy, the mean over classes and over the labelled images.

        Args:
            logits: [B, C].
            presence: Classes that are really there [B, C], 0 or 1.
            labelled: Images that take part [B] bool; default all.
        """
        # in fp32 also under autocast
        loss = F.binary_cross_entropy_with_logits(logits.float(), presence.float(), reduction="none").mean(1)
        weight = torch.ones_like(loss) if labelled is None else labelled.to(loss)
        return self.loss_weight * (loss * weight).sum() / weight.sum().clamp(min=1)


@MODELS.register_module()
class GateHead(DenseGate):
    """The paper's gate: one linear layer on the coarse CLS output.

    Args:
        dim: Model width d.
        num_classes: C.
        confidence: See :class:`DenseGate`, as are ``loss_weight`` and ``skip_classes``.
        prior: Presence that every class starts from; a low one keeps the first steps from being all about the bias.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        confidence: str = "mean_present",
        loss_weight: float = 1.0,
        prior: float = 0.1,
        skip_classes: Sequence[int] = (),
    ) -> None:
        super().__init__(num_classes, confidence, loss_weight, skip_classes)
        if not 0 < prior < 1:
            raise ValueError(f"prior of the gate must lie in (0, 1), got {prior}")
        self.fc = nn.Linear(dim, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.constant_(self.fc.bias, float(torch.logit(torch.tensor(prior))))

    def logits(self, coarse: CoarseState) -> Tensor:
        """Multi-label logits [B, C] of the classes in the images."""
        return self.fc(coarse.cls)

    def cell_logits(self, features: Tensor) -> Tensor:
        """Multi-label logits [B, M, C] of the classes in each cell: the same layer on the coarse patch outputs."""
        return self.fc(features)


def build_gate(options: Mapping[str, Any] | None, dim: int) -> DenseGate | None:
    """The gate that a backbone's config names; a :class:`GateHead` without a ``type``.

    Args:
        options: Its ``type`` and arguments without ``dim``; ``None`` for no gate.
        dim: Model width d.

    Raises:
        ValueError: If it is no :class:`DenseGate`.
    """
    if options is None:
        return None
    gate = MODELS.build({"type": "GateHead", **options, "dim": dim})
    if not isinstance(gate, DenseGate):
        raise ValueError(f"gate must be a mambascope.mm.DenseGate, got {type(gate).__name__}")
    return gate
