"""What is ours on top of the paper: parameters of the coarse look's own, and answers of both looks."""

import pytest
import torch
from timm.models import group_parameters

from mambascope import MambaScope
from mambascope.evaluation.both_looks import WEIGHTS, best_weight, fit_coarse_weight
from mambascope.models.export import export_program, stages

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 5, "alpha": 0.5}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 3, 32, 32)


def test_offsets_of_zero_change_nothing_and_learn_from_the_coarse_look_alone(x):
    torch.manual_seed(0)
    plain = MambaScope(**SMALL)
    model = MambaScope(**SMALL, coarse_offsets=True)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("coarse_offsets.") for name in missing)
    with torch.no_grad():
        for a, b in zip(plain(x), model(x), strict=True):
            assert torch.equal(a, b)
    model(x).coarse.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.coarse_offsets.parameters())
    model.zero_grad()
    state = model.forward_coarse(x)
    fixed = state.index_select(torch.arange(3))
    for name in ("logits", "cls", "features", "tokens"):
        setattr(fixed, name, getattr(fixed, name).detach())
    model.forward_fine(x, fixed).logits.square().sum().backward()
    assert all(p.grad is None for p in model.coarse_offsets.parameters())


def test_offsets_are_what_the_coarse_look_adds(x):
    torch.manual_seed(0)
    model = MambaScope(**SMALL, coarse_offsets=True).eval()
    changed = MambaScope(**SMALL).eval()
    with torch.no_grad():
        for parameter in model.coarse_offsets.parameters():
            parameter.normal_(std=0.1)
        changed.load_state_dict({k: v for k, v in model.state_dict().items() if "coarse_offsets" not in k})
        changed.cls_token += model.coarse_offsets.cls_token
        changed.norm_f.weight += model.coarse_offsets.norm_f
        for block, offsets in zip(changed.layers, model.coarse_offsets.layers, strict=True):
            block.norm.weight += offsets.norm
            for name in ("D", "D_b"):
                getattr(block.mixer, name).add_(getattr(offsets, name))
            block.mixer.dt_proj.bias += offsets.dt_bias
            block.mixer.dt_proj_b.bias += offsets.dt_bias_b
        torch.testing.assert_close(model.forward_coarse(x).logits, changed.forward_coarse(x).logits)
        assert not torch.allclose(model.forward_scope(x, 1.0).logits, changed.forward_scope(x, 1.0).logits)


def test_offsets_are_few():
    count = [sum(p.numel() for p in MambaScope(coarse_offsets=on).parameters()) for on in (False, True)]
    assert 0 < count[1] - count[0] < 0.02 * count[0]


@torch.no_grad()
def test_both_looks_answer(x):
    model = MambaScope(**SMALL, threshold=0.9).eval()
    alone = model.forward_scope(x, 1.0)
    model.coarse_weight = 0.3
    both = model.forward_scope(x, 1.0)
    want = alone.logits.log_softmax(-1) + 0.3 * alone.coarse_logits.log_softmax(-1)
    torch.testing.assert_close(both.logits, want)
    assert torch.equal(both.coarse_logits, alone.coarse_logits)
    coarse = model.forward_coarse(x)
    torch.testing.assert_close(model.forward_fine(x, coarse).logits, want)
    assert torch.equal(model.train().forward_fine(x, coarse).logits, alone.logits)  # the looks learn apart
    model.eval()
    programs = stages(model, x)
    module, inputs = programs["fine"]
    torch.testing.assert_close(export_program(module, inputs).module()(*inputs)[0], want)
    module, inputs = programs["two_stage"]
    torch.testing.assert_close(module(*inputs)[0], model.forward_scope(x, 0.9).logits)


def test_a_weight_is_refused():
    for weight in (-0.1, float("nan"), float("inf"), "much", True):
        with pytest.raises(ValueError, match="coarse_weight must be a number >= 0"):
            MambaScope(**SMALL, coarse_weight=weight)
    with pytest.raises(ValueError, match="coarse_offsets must be true or false"):
        MambaScope(**SMALL, coarse_offsets=1)


def test_the_weight_is_that_of_the_likeliest_answers():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2000,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 4).double()
    noise = torch.randn(2, 2000, 4, generator=generator, dtype=torch.double)
    good, useless = 2 * hot + noise[0], noise[1]
    confidence = torch.rand(2000, generator=generator)
    assert best_weight(useless, good, confidence, labels) <= 0.1
    equal = best_weight(2 * hot + noise[1], 2 * hot + noise[0], confidence, labels)
    assert 0.5 <= equal <= max(WEIGHTS)


def test_a_fit_leaves_the_model_as_it_is_and_needs_images(x):
    model = MambaScope(**SMALL, coarse_weight=0.4)
    assert fit_coarse_weight(model, [(x, torch.zeros(3, dtype=torch.long))]) == 0.4
    batches = [(torch.randn(100, 3, 32, 32), torch.randint(5, (100,))) for _ in range(5)]
    assert fit_coarse_weight(model, batches) in WEIGHTS
    assert model.coarse_weight == 0.4
    assert model.training


def test_offsets_learn_at_the_rate_of_what_they_add_to():
    model = MambaScope(**SMALL, coarse_offsets=True)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    offsets = {name for name, _ in model.named_parameters() if name.startswith("coarse_offsets.")}
    shared = {"norm": "norm.weight", "dt_bias": "mixer.dt_proj.bias"}
    assert offsets
    for name in offsets:
        place = name.removeprefix("coarse_offsets.")
        start, _, last = place.rpartition(".")
        kin = {"cls_token": "cls_token", "norm_f": "norm_f.weight"}.get(
            place, f"{start}.{shared.get(last, 'norm.weight')}"
        )
        assert layers[name] == layers[kin], name
    plain = MambaScope(**SMALL)
    without = group_parameters(plain, plain.group_matcher(), reverse=True)
    assert {name: layers[name] for name in without} == without
