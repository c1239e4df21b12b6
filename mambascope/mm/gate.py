"""The gate of dense models: which classes the coarse look sees, how sure it is, and what it is trained on.

Shape letters: B batch, C classes, H and W pixels. MambaScope section 5.2: an image-level multi-label head on the coarse
CLS output, trained with binary cross-entropy on the classes that are present.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambascope.data.errors import DataError

CONFIDENCES = ("mean_present", "max", "margin", "entropy")


def gate_confidence(logits: Tensor, rule: str = "mean_present") -> Tensor:
    """How sure the gate is of each image, in [0, 1].

    Args:
        logits: Multi-label logits [B, C].
        rule: ``mean_present``: mean probability of the classes predicted present (p >= 0.5); if there is none, the
            largest probability. ``max``: the largest probability. ``margin``: the gap between the least likely class
            that is predicted present and the most likely one that is not; 0 if none is present. It is small as soon as
            a single class is in doubt, where a mean hides it behind the others. ``entropy``: 1 minus the mean entropy
            of the classes in bits: every class in doubt counts, those thought absent too.

    Returns:
        Confidence [B], at least fp32.

    Raises:
        ValueError: If the rule is unknown.
    """
    if rule not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {rule!r}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = logits.sigmoid()
    if rule == "entropy":
        nats = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))
        return 1 - nats.mean(1) / math.log(2)
    largest = p.amax(1)
    if rule == "max":
        return largest
    present = p >= 0.5
    if rule == "mean_present":
        mean = (p * present).sum(1) / present.sum(1).clamp(min=1)
        return torch.where(present.any(1), mean, largest)
    lowest_in = p.masked_fill(~present, 1.0).amin(1)
    highest_out = p.masked_fill(present, 0.0).amax(1)
    return torch.where(present.any(1), lowest_in - highest_out, torch.zeros_like(largest))


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


class GateHead(nn.Module):
    """Image-level multi-label head on the coarse CLS output.

    Args:
        dim: Model width d.
        num_classes: C.
        confidence: See :func:`gate_confidence`.
        loss_weight: Weight of the loss.
        prior: Presence that every class starts from; a low one keeps the first steps from being all about the bias.
        skip_classes: Classes that the confidence leaves out. A class that nearly every image has, such as a background,
            is always sure to be present and would hide that nothing else is.

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
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes of the gate must be a positive integer, got {num_classes!r}")
        if confidence not in CONFIDENCES:
            raise ValueError(f"confidence of the gate must be one of {', '.join(CONFIDENCES)}, got {confidence!r}")
        if loss_weight < 0:
            raise ValueError(f"loss_weight of the gate must be >= 0, got {loss_weight}")
        if not 0 < prior < 1:
            raise ValueError(f"prior of the gate must lie in (0, 1), got {prior}")
        skipped = set(skip_classes)
        if not skipped < set(range(num_classes)):
            raise ValueError(
                f"skip_classes of the gate must be some of the classes 0..{num_classes - 1} and leave at least one, "
                f"got {list(skip_classes)}"
            )
        self.num_classes = num_classes
        self.confidence = confidence
        self.kept_classes = [c for c in range(num_classes) if c not in skipped]
        self.loss_weight = loss_weight
        self.fc = nn.Linear(dim, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.constant_(self.fc.bias, float(torch.logit(torch.tensor(prior))))

    def forward(self, cls: Tensor) -> Tensor:
        """Logits [B, C] of the coarse CLS output [B, d]."""
        return self.fc(cls)

    def sureness(self, logits: Tensor) -> Tensor:
        """Confidence [B] of logits [B, C], see :func:`gate_confidence`; no gradient."""
        logits = logits.detach()
        if len(self.kept_classes) < self.num_classes:
            logits = logits[:, self.kept_classes]
        return gate_confidence(logits, self.confidence)

    def loss(self, logits: Tensor, presence: Tensor, known: Tensor | None = None) -> Tensor:
        """Weighted binary cross-entropy, the mean over classes and over the images of which something is known.

        Args:
            logits: [B, C].
            presence: [B, C], 0 or 1.
            known: Images that take part [B] bool; default all.
        """
        # in fp32 also under autocast
        loss = F.binary_cross_entropy_with_logits(logits.float(), presence.float(), reduction="none").mean(1)
        weight = torch.ones_like(loss) if known is None else known.to(loss)
        return self.loss_weight * (loss * weight).sum() / weight.sum().clamp(min=1)
