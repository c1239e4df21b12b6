"""The gate's confidence: values by hand, ranges, and that every way to run a model uses the same one."""

import math

import pytest
import torch

from mambascope.evaluation.collect import collect
from mambascope.models import MambaScope, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.engine import ScopePredictor
from mambascope.models.export import CoarseStage
from mambascope.models.gate import CONFIDENCES, confidence

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def test_values_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    entropy = -sum(v * math.log(v) for v in (0.7, 0.2, 0.1))
    expected = {"max": [0.7, 1 / 3], "margin": [0.5, 0], "entropy": [1 - entropy / math.log(3), 0]}
    for rule in CONFIDENCES:
        assert confidence(p.log(), rule).tolist() == pytest.approx(expected[rule], abs=1e-12)
        # dividing by T raises the probabilities to the power 1/T
        squared = p.square() / p.square().sum(1, keepdim=True)
        torch.testing.assert_close(confidence(p.log(), rule, 0.5), confidence(squared.log(), rule))


@pytest.mark.parametrize("rule", CONFIDENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_range_and_extremes(rule, dtype):
    logits = torch.cat([torch.randn(50, 7) * 20, torch.zeros(1, 7), 60.0 * torch.eye(7)[:1]]).to(dtype)
    found = confidence(logits, rule, 0.3)
    assert found.dtype == torch.float32
    assert bool(((found >= 0) & (found <= 1)).all())
    assert found[-1] == 1
    assert found[-2] == pytest.approx(1 / 7 if rule == "max" else 0.0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["margin", "entropy"])
def test_every_way_to_run_the_model_uses_the_same_gate(rule, tmp_path):
    torch.manual_seed(0)
    model = MambaScope(**SMALL, confidence=rule, temperature=0.7, alpha=0.5).eval()
    model.head.weight.mul_(60)
    x = torch.randn(12, 3, 32, 32)
    logits = model.forward_coarse(x).logits
    expected = confidence(logits, rule, 0.7)
    assert not torch.allclose(expected, confidence(logits))
    eta = float(expected.sort().values[5:7].mean())
    out = model.forward_scope(x, eta)
    torch.testing.assert_close(out.confidence, expected)
    assert out.exited.sum() == 6
    assert torch.equal(ScopePredictor(model, threshold=eta)(x, 4).exited, out.exited)
    torch.testing.assert_close(CoarseStage(model)(x)[1], expected)
    record = collect(model, [(x, torch.zeros(12, dtype=torch.long))], progress=False).record
    assert record.confidence.tolist() == pytest.approx(expected.tolist())
    model.temperature = 2.0
    save_safetensors(model, tmp_path / "m.safetensors")
    twin = load_model(tmp_path / "m.safetensors")
    assert (twin.temperature, twin.config.confidence) == (2.0, rule)
    torch.testing.assert_close(twin.forward_scope(x, eta).confidence, confidence(logits, rule, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": "best"}, "confidence must be one of 'max', 'margin', 'entropy', got 'best'"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": "warm"}, "temperature must be a positive number"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MambaScope(**SMALL, **options)


def test_rules_that_need_two_classes():
    assert confidence(torch.zeros(2, 1)).tolist() == [1, 1]
    for rule in ("margin", "entropy"):
        with pytest.raises(ValueError, match=f"confidence '{rule}' needs at least two classes, got 1"):
            confidence(torch.zeros(2, 1), rule)
    with pytest.raises(ValueError, match="confidence must be one of max, margin, entropy, got 'sum'"):
        confidence(torch.zeros(2, 3), "sum")
