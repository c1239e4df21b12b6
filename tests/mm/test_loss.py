"""Cross entropy with class weights."""

import pytest
import torch

from mambascope.mm import ClassWeightedCrossEntropy
from tests.mm import common  # noqa: F401  (skips without the stack)


def test_equals_mmsegs_where_that_works_and_leaves_ignored_pixels_out():
    from mmseg.models.losses import CrossEntropyLoss

    weights = [0.3, 1.0, 2.0]
    weighted, reference = (
        ClassWeightedCrossEntropy(weights, 0.5),
        CrossEntropyLoss(class_weight=weights, loss_weight=0.5),
    )
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5))
    torch.testing.assert_close(weighted(logits, labels), reference(logits, labels))
    labels[0] = 255
    torch.testing.assert_close(weighted(logits, labels), reference(logits[1:], labels[1:]))
    weighted(logits, labels).backward()
    assert logits.grad[0].abs().max() == 0
    assert float(weighted(logits, torch.full_like(labels, 255))) == 0


def test_weights_are_checked():
    for wrong in ([], [1.0, -1.0]):
        with pytest.raises(ValueError, match="class_weight must be numbers >= 0"):
            ClassWeightedCrossEntropy(wrong)
