"""MambaEye stops when it is sure for what it has seen, and what has stopped costs nothing any more."""

import numpy as np
import pytest
import torch

from mambascope.eye import MambaEye
from mambascope.eye.dataset import GlimpseOptions, ImageGlimpses
from mambascope.eye.stopping import CoverageGate, Glance, answer_when_sure, corrected_confidence
from mambascope.models.gate import Gate, MaxProbability

SMALL = {"embed_dim": 32, "depth": 3, "d_state": 8, "head_dim": 16, "move_dim": 8, "patch_size": 4, "num_classes": 5}


def test_confidence_is_measured_against_coverage():
    """The training target itself is fully confident at every coverage; an uninformed answer is at chance."""
    for r in (0.02, 0.1, 0.5, 1.0):
        target = torch.full((10,), (1 - r) / 10, dtype=torch.float64)
        target[3] += r
        coverage = torch.tensor(r, dtype=torch.float64)
        for criterion, chance in (("confidence", 0.1), ("margin", 0), ("entropy", 0)):
            assert corrected_confidence(target.log(), coverage, criterion).item() == pytest.approx(1)
            even = corrected_confidence(torch.zeros(10).double(), coverage, criterion).item()
            assert even == pytest.approx(chance, abs=1e-9)
        assert corrected_confidence(target.log(), coverage, "raw").item() == pytest.approx(r + (1 - r) / 10)
    half = torch.full((4,), 0.25 / 4)
    half[0] += 0.75
    assert corrected_confidence(half.log(), torch.tensor(0.5)).item() == 1  # more than the target allows
    assert corrected_confidence(torch.tensor([3.0, 0.0]), torch.tensor(0.0)).item() == 0
    with pytest.raises(ValueError, match="criterion must be one of confidence, margin, entropy, raw"):
        corrected_confidence(torch.zeros(3), torch.tensor(0.5), "max")
    with pytest.raises(ValueError, match=r"coverage must lie in \[0, 1\]"):
        corrected_confidence(torch.zeros(3), torch.tensor(1.5))


def test_the_gate_decides_as_all_gates_do():
    logits, coverage = 2 * torch.randn(40, 5), torch.linspace(0, 1, 40)
    gate = CoverageGate("confidence", min_coverage=0.3)
    assert isinstance(gate, Gate)
    confidence, exited = gate.decide(Glance(logits, coverage), 0.6)
    assert torch.equal(confidence, corrected_confidence(logits, coverage))
    assert torch.equal(exited, (confidence >= 0.6) & (coverage >= 0.3))
    assert 0 < exited.sum() < (confidence >= 0.6).sum()
    several = gate.decide(Glance(logits, coverage), torch.tensor([0.2, 0.6, 2.0]))[1]
    assert torch.equal(several[:, 1], exited)
    assert not several[:, 2].any()
    # without correction it is the gate of a classifier
    glance = Glance(logits, coverage)
    torch.testing.assert_close(CoverageGate("raw")(glance), MaxProbability()(glance))


@pytest.fixture
def reader():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (24 + 4 * i, 30, 3), dtype=np.uint8) for i in range(6)]
    options = GlimpseOptions(length=50, canvas_size=48, patch_size=4, resize_mode="none")
    return ImageGlimpses.of_images(images, options, seeds=range(6))


def test_early_stopping_compacts_the_batch(reader):
    model = MambaEye(**SMALL).eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.2)  # untrained answers are far too sure for such low coverage
        patches, moves, ratios = reader.read(torch.arange(6), 0, 50)
        logits = model(patches, moves)
    sure = corrected_confidence(logits, ratios)
    checks = torch.tensor([*range(3, 50, 4), 49])
    threshold = sure.where(ratios >= 0.2, 0)[:, checks[:-1]].amax(1).sort().values[2:4].mean().item()  # half reach it

    rows_read = []
    model.init_fc.register_forward_hook(lambda _m, inputs, _o: rows_read.append(inputs[0].shape[:2].numel()))
    result = answer_when_sure(model, reader, threshold=threshold, min_coverage=0.2, every=4)
    assert sum(rows_read) == result.steps_computed == result.used.sum()  # what has stopped is not computed any more
    assert result.exited.sum() == 3
    # every image is answered as it would be alone, at the first check where it is sure
    for i in range(6):
        first = next((t for t in checks.tolist() if sure[i, t] >= threshold and ratios[i, t] >= 0.2), 49)
        assert result.used[i] == first + 1
        assert bool(result.exited[i]) == (first < 49)
        assert torch.allclose(result.logits[i], logits[i, first], atol=1e-4)
        assert result.confidence[i] == pytest.approx(sure[i, first].item(), abs=1e-4)
        assert result.coverage[i] == ratios[i, first]


def test_thresholds_at_the_ends(reader):
    model = MambaEye(**SMALL).eval()
    never = answer_when_sure(model, reader, threshold=1.1, every=16)
    assert never.used.tolist() == [50] * 6
    assert not never.exited.any()
    always = answer_when_sure(model, reader, threshold=0, min_coverage=0, every=1)
    assert always.used.tolist() == [1] * 6
    assert always.exited.all()
    assert answer_when_sure(model, reader, threshold=1.1, max_glimpses=7).used.tolist() == [7] * 6
    for bad, message in (
        ({"every": 0}, "every must be a positive integer"),
        ({"criterion": "top"}, "criterion must be one of"),
        ({"min_coverage": 2}, "min_coverage must lie"),
        ({"max_glimpses": 0}, "at least one glimpse"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_when_sure(model, reader, **bad)
