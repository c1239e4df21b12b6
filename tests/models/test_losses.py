import pytest
import timm
import torch
import torch.nn.functional as F

import mambascope  # noqa: F401
from mambascope.models import StageLogits
from mambascope.models.losses import ClassificationLoss, ScopeLoss, coarse_distillation, cross_entropy

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 5}


@pytest.fixture
def logits():
    return StageLogits(torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True))


def test_equals_the_formula(logits):
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    parts = ScopeLoss()(logits, y)
    fine = logits.fine.softmax(-1)
    ce = -fine.log()[torch.arange(6), y].mean()
    kl = (fine * (fine.log() - logits.coarse.softmax(-1).log())).sum(-1).mean()
    torch.testing.assert_close(parts["fine_ce"], ce.detach())
    torch.testing.assert_close(parts["coarse_kl"], kl.detach())
    torch.testing.assert_close(parts["loss"], ce + kl)


def test_teacher_gets_no_gradient_from_the_distillation(logits):
    coarse_distillation(logits.coarse, logits.fine).backward()
    assert logits.fine.grad is None
    # the gradient of KL(p || softmax(c)) in c is softmax(c) - p
    expected = (logits.coarse.softmax(-1) - logits.fine.softmax(-1)).detach() / 6
    torch.testing.assert_close(logits.coarse.grad, expected)


def test_weights_and_coarse_cross_entropy(logits):
    y = torch.arange(6) % 5
    parts = ScopeLoss(kl_weight=0.5, coarse_ce_weight=0.25)(logits, y)
    expected = parts["fine_ce"] + 0.5 * parts["coarse_kl"] + 0.25 * parts["coarse_ce"]
    torch.testing.assert_close(parts["loss"].detach(), expected)
    only_ce = ScopeLoss(kl_weight=0.0, coarse_ce_weight=1.0)(logits, y)["loss"]
    (grad,) = torch.autograd.grad(only_ce, logits.coarse)
    (reference,) = torch.autograd.grad(F.cross_entropy(logits.coarse, y), logits.coarse)
    torch.testing.assert_close(grad, reference)


def test_temperature_keeps_the_size_of_the_gradient(logits):
    (one,) = torch.autograd.grad(coarse_distillation(logits.coarse, logits.fine, 1.0), logits.coarse)
    (ten,) = torch.autograd.grad(coarse_distillation(logits.coarse, logits.fine, 10.0), logits.coarse)
    assert 0.1 < ten.norm() / one.norm() < 10
    soft = F.kl_div(
        F.log_softmax(logits.coarse / 3, -1), F.softmax(logits.fine.detach() / 3, -1), reduction="batchmean"
    )
    torch.testing.assert_close(coarse_distillation(logits.coarse, logits.fine, 3.0), 9 * soft)


def test_soft_targets_are_mixed_hard_ones(logits):
    y = torch.arange(6) % 5
    criterion = ScopeLoss(label_smoothing=0.1, coarse_ce_weight=1.0)
    one_hot = F.one_hot(y, 5).float()
    for key, value in criterion(logits, y).items():
        torch.testing.assert_close(criterion(logits, one_hot)[key], value, msg=key)
    lam, other = 0.3, y.flip(0)
    mixed = lam * one_hot + (1 - lam) * F.one_hot(other, 5)
    expected = lam * cross_entropy(logits.fine, y, 0.1) + (1 - lam) * cross_entropy(logits.fine, other, 0.1)
    torch.testing.assert_close(cross_entropy(logits.fine, mixed, 0.1), expected)


def test_low_precision_logits_are_computed_in_fp32(logits):
    half = StageLogits(logits.coarse.detach().bfloat16(), logits.fine.detach().bfloat16())
    full = StageLogits(half.coarse.float(), half.fine.float())
    y = torch.arange(6) % 5
    for key, value in ScopeLoss()(half, y).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, ScopeLoss()(full, y)[key])


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"alpha": 0.1, "reuse": "off"}, {"reuse": "linear"}])
def test_every_parameter_gets_a_gradient(options):
    model = timm.create_model("mambascope_nano_patch8_64", **TINY, **options).train()
    ScopeLoss()(model(torch.randn(4, 3, 32, 32)), torch.arange(4))["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_one_stage_loss():
    logits, y = torch.randn(4, 5), torch.arange(4)
    torch.testing.assert_close(
        ClassificationLoss(0.1)(logits, y)["loss"], F.cross_entropy(logits, y, label_smoothing=0.1)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"kl_weight": -1.0}, "kl_weight must be a number >= 0"),
        ({"coarse_ce_weight": float("nan")}, "coarse_ce_weight must be a number >= 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"kl_weight": 0.0}, "must not both be 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ScopeLoss(**options)
