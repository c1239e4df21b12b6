"""The gate: confidence, targets and loss."""

import math

import pytest
import torch

from mambascope.mm.gate import GateHead, gate_confidence, presence_from_labels, presence_from_masks
from mambascope.mm.metrics import GateMetric, average_precision
from tests.mm import common  # noqa: F401  (skips without the stack)


def logits(*rows):
    return torch.logit(torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean_present", [0.8, 0.4, 0.95]), ("max", [0.9, 0.4, 0.95]), ("margin", [0.4, 0.0, 0.5])],
)
def test_confidence_rules(rule, expected):
    rows = logits([0.9, 0.7, 0.3], [0.4, 0.2, 0.1], [0.95, 0.45, 0.2])
    torch.testing.assert_close(gate_confidence(rows, rule), torch.tensor(expected, dtype=torch.float64))


def test_confidence_of_everything_present_and_half_precision():
    rows = logits([0.9, 0.6])
    assert float(gate_confidence(rows, "margin")) == pytest.approx(0.6)
    assert gate_confidence(rows.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="confidence must be one of mean_present, max, margin, entropy"):
        gate_confidence(rows, "sum")


def test_entropy_counts_every_class_in_doubt():
    rows = logits([0.5, 0.5], [0.5, 1 - 1e-12], [0.25, 0.25])
    bits = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    torch.testing.assert_close(gate_confidence(rows, "entropy"), torch.tensor([0, 0.5, 1 - bits], dtype=torch.float64))
    certain = gate_confidence(torch.tensor([[200.0, -200.0]]), "entropy")
    assert certain.tolist() == [1.0]


@pytest.mark.parametrize("rule", ["mean_present", "max", "margin", "entropy"])
def test_skipped_classes_do_not_count(rule):
    head = GateHead(8, 4, confidence=rule, skip_classes=(0, 2))
    rows = logits([0.99, 0.7, 0.2, 0.4], [0.99, 0.1, 0.97, 0.3])
    torch.testing.assert_close(head.confidence(rows), gate_confidence(rows[:, [1, 3]], rule))
    changed = rows.clone()
    changed[:, [0, 2]] = 0.0
    torch.testing.assert_close(head.confidence(changed), head.confidence(rows))


@pytest.mark.parametrize("skipped", [(4,), (-1,), (0, 1, 2, 3), "[0]"])
def test_skipped_classes_must_leave_one(skipped):
    with pytest.raises(ValueError, match=r"skip_classes of the gate must be some of the classes 0\.\.3 and leave"):
        GateHead(8, 4, skip_classes=skipped)


def test_presence_from_masks_leaves_the_ignored_label_out():
    masks = [torch.tensor([[[0, 2], [255, 2]]]), torch.full((1, 2, 2), 255), torch.zeros(1, 2, 2, dtype=torch.uint8)]
    presence, valid = presence_from_masks(masks, 4)
    assert presence.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert valid.tolist() == [True, False, True]


def test_presence_names_the_file_of_a_wrong_label():
    with pytest.raises(ValueError, match=r"b\.png holds label 7; accepted are 0\.\.3 and 255.*reduce_zero_label"):
        presence_from_masks([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 7)], 4, names=["a.png", "b.png"])
    with pytest.raises(ValueError, match=r"image 1 of the batch has a box of class 4; accepted are 0\.\.3"):
        presence_from_labels([torch.tensor([3]), torch.tensor([0, 4])], 4)


def test_presence_of_an_image_without_boxes():
    labels = presence_from_labels([torch.tensor([], dtype=torch.long), torch.tensor([1, 1])], 3)
    assert labels.tolist() == [[0, 0, 0], [0, 1, 0]]


def test_loss_leaves_unknown_images_out():
    head = GateHead(8, 3, loss_weight=2.0)
    out = head.fc(torch.randn(2, 8))
    target = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    alone = head.loss(out[:1], target[:1])
    torch.testing.assert_close(head.loss(out, target, torch.tensor([True, False])), alone)
    expected = 2 * torch.nn.functional.binary_cross_entropy_with_logits(out[:1], target[:1])
    torch.testing.assert_close(alone, expected)
    assert head.loss(out, target, torch.tensor([False, False])).item() == 0


@pytest.mark.parametrize(
    "options", [{"num_classes": 0}, {"num_classes": 3, "confidence": "x"}, {"num_classes": 3, "prior": 1}]
)
def test_gate_arguments(options):
    with pytest.raises(ValueError, match="of the gate must"):
        GateHead(8, **options)


def test_average_precision_against_sklearn():
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, generator=generator).mul(20).round().div(20).numpy()  # with ties
    present = (torch.rand(200, generator=generator) < 0.3).numpy()
    assert average_precision(scores, present) == pytest.approx(average_precision_score(present, scores))


def test_metric_counts_only_what_is_known():
    def sample(presence, refined, mask):
        fact = {
            "presence": torch.tensor(presence).numpy(),
            "refined": refined,
            "gflops_both_directions": 1.0 + refined,
            "gflops_one_direction": 0.5,
        }
        return {"scope": fact, "gt_sem_seg": {"data": torch.tensor(mask)}}

    metric = GateMetric()
    metric.process(
        None, [sample([0.9, 0.1], 1.0, [[0]]), sample([0.2, 0.8], 0.0, [[1]]), sample([0.9, 0.9], 0.0, [[255]])]
    )
    figures = metric.compute_metrics(metric.results)
    assert figures["mAP"] == 100
    assert figures["share_refined"] == pytest.approx(100 / 3)
    assert figures["backbone_gflops"] == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="model with a gate"):
        metric.process(None, [{}])
