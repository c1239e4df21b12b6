"""Scores and gates of one's own: entries of dictionaries that forward, engine, export and weights files follow."""

import pytest
import torch
from torch import nn

from mambascope.evaluation.collect import collect
from mambascope.models import MambaScope, load_checkpoint, load_model, save_safetensors
from mambascope.models.engine import ScopePredictor
from mambascope.models.export import export_program, portable, stages
from mambascope.models.gate import GATES, Gate, MaxProbability, confidence
from mambascope.models.scores import SCORES, CoarseTrace, Score, average_blocks
from tests.conftest import relative_error

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_classes": 5, "alpha": 0.5}


class Learned(Gate):
    """One linear layer on the coarse CLS."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.embed_dim, 1)

    def forward(self, coarse):
        return self.linear(coarse.cls).float().sigmoid().squeeze(1)


@pytest.fixture
def _entries(monkeypatch):
    monkeypatch.setitem(GATES, "learned", Learned)
    gate_size = average_blocks(lambda block: block.gate.float().abs().mean(-1), "gate")
    monkeypatch.setitem(SCORES, "gate_size", gate_size)


@pytest.fixture
def x():
    return torch.randn(12, 3, 32, 32)


def create(**options) -> MambaScope:
    torch.manual_seed(1)
    model = MambaScope(**{**SMALL, **options}).eval()
    if options.get("gate") == "learned":
        model.gate.linear.weight.data.mul_(5)
    return model


@torch.no_grad()
@pytest.mark.usefixtures("_entries")
def test_a_gate_and_a_score_of_ones_own_are_used_everywhere(x, tmp_path):
    model, plain = create(gate="learned", score_metric="gate_size"), create()
    coarse = model.forward_coarse(x)
    expected = model.gate(coarse)
    assert not torch.allclose(expected, confidence(coarse.logits))
    eta = float(expected.sort().values[5:7].mean())
    out = model.forward_scope(x, eta)
    assert torch.equal(out.confidence, expected)
    assert int(out.exited.sum()) == 6
    assert not torch.allclose(out.importance, plain.forward_coarse(x).importance)

    gathered = ScopePredictor(model, threshold=eta, fine_batch_size=4)(x, 5)
    assert torch.equal(gathered.exited, out.exited)
    assert relative_error(gathered.logits, out.logits) < 1e-4

    record = collect(model, [(x, torch.zeros(12, dtype=torch.long))], progress=False).record
    assert record.confidence.tolist() == pytest.approx(expected.tolist())

    save_safetensors(model, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors")
    assert (again.config.gate, again.config.score_metric) == ("learned", "gate_size")
    assert torch.equal(again.forward_scope(x, eta).logits, out.logits)

    for name, (module, inputs) in stages(model, x[:4], threshold=eta).items():
        if name == "fine":
            continue
        results = portable(export_program(module, inputs)).module()(*inputs)
        torch.testing.assert_close(results[1], expected[:4], rtol=1e-4, atol=1e-5, msg=name)
        if name == "two_stage":
            assert torch.equal(results[2], out.exited[:4])


@pytest.mark.usefixtures("_entries")
def test_weights_without_a_gate_start_a_model_that_learns_one(tmp_path):
    save_safetensors(create(), tmp_path / "a.safetensors")
    model = create(gate="learned")
    report = load_checkpoint(model, tmp_path / "a.safetensors", verbose=False, strict=False)
    assert sorted(report.new) == ["gate.linear.bias", "gate.linear.weight"]
    assert [difference.name for difference in report.differs] == ["gate"]


def test_the_papers_gate_has_no_parameters_and_unknown_names_are_refused():
    assert isinstance(create().gate, MaxProbability)
    assert not [name for name in create().state_dict() if "gate" in name]
    with pytest.raises(ValueError, match="gate must be one of max, got 'learned'"):
        create(gate="learned")
    with pytest.raises(ValueError, match=r"score_metric must be one of max, l2, .*, got 'gate_size'"):
        create(score_metric="gate_size")


@torch.no_grad()
@pytest.mark.parametrize("name", SCORES)
def test_a_score_gets_what_it_needs_and_nothing_else(name, x, monkeypatch):
    entry, traces = SCORES[name], []

    def compute(coarse: CoarseTrace) -> torch.Tensor:
        traces.append(coarse)
        return entry.compute(coarse)

    monkeypatch.setitem(SCORES, name, Score(compute, entry.needs))
    model = create(score_metric=name, global_pool="lse")
    importance = model.forward_coarse(x).importance
    assert importance.shape == (12, 16)
    assert not importance.requires_grad
    blocks = traces[0].blocks
    assert len(blocks) == (len(model.config.taking_part) if entry.needs else 0)
    for block in blocks:
        assert tuple(field for field, value in block._asdict().items() if value is not None) == entry.needs


@torch.no_grad()
def test_what_a_block_leaves(x):
    model = create()
    block, hidden = model.layers[0], model._tokens(x).tokens
    everything = ("top", "outputs", "steps", "gate", "tokens")
    out, residual, trace = block(hidden, None, everything)
    inner, _ = block.mixer(block.norm(hidden)[0])
    assert relative_error(out, inner) < 1e-5
    forward, backward = trace.outputs
    assert relative_error(block.mixer.finish(forward + backward, trace.gate), inner) < 1e-5
    assert torch.equal(trace.top, (forward + backward).amax(-1))
    assert torch.equal(trace.tokens[0], residual)
    assert torch.equal(trace.tokens[1], residual + out)
    assert all(bool((step > 0).all()) and step.shape == forward.shape for step in trace.steps)


@torch.no_grad()
def test_class_evidence_asks_every_cell_about_the_answer(x):
    model = create(score_metric="evidence", global_pool="lse")
    coarse = model.forward_coarse(x)
    of_each_cell = model.classify(coarse.features).softmax(-1)
    for image, answer in enumerate(coarse.logits.argmax(1).tolist()):
        torch.testing.assert_close(coarse.importance[image], of_each_cell[image, :, answer])


@torch.no_grad()
def test_contrast_weighs_the_evidence(x):
    evidence = create(score_metric="evidence", global_pool="lse")
    both = create(score_metric="evidence_contrast", global_pool="lse")
    both.load_state_dict(evidence.state_dict())
    side = 2 * both.config.patch_size // 2  # of a cell in the half-size image
    image = both.half_image(both.whole_cells(x))
    cells = image.unfold(2, side, side).unfold(3, side, side).flatten(4)
    contrast = (cells.std(-1, correction=0).mean(1).flatten(1) - 1e-3).clamp_min(0)
    want = evidence.forward_coarse(x).importance * contrast
    torch.testing.assert_close(both.forward_coarse(x).importance, want)
    flat = both.forward_coarse(torch.full_like(x, 0.3)).importance  # nothing can be read: no NaN, the first cells
    assert not bool(flat.any())


@torch.no_grad()
def test_without_a_classifier_contrast_is_left(x):
    model = create(score_metric="evidence_contrast", global_pool="lse")
    model.reset_classifier(0)
    assert model.forward_features(x).isfinite().all()
    assert bool((model.forward_coarse(x).importance > 0).any())
