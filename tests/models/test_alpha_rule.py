"""Cells per image from the importance mass: counts by hand, dense groups, and what a single image gets alone."""

import numpy as np
import pytest
import torch

from mambascope.evaluation.collect import collect
from mambascope.evaluation.sweep import sweep
from mambascope.models import MambaScope
from mambascope.models.cells import count_levels, mass_counts, num_selected
from mambascope.models.cost import stage_macs
from mambascope.models.engine import ScopePredictor
from mambascope.models.export import stages
from mambascope.models.flop_count import expected_count
from mambascope.ops.flops import count_macs
from tests.conftest import relative_error

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5}
MASS = {"alpha_rule": "mass", "alpha": 0.7, "alpha_min": 0.2, "alpha_buckets": 16}


def scope(**kwargs) -> MambaScope:
    torch.manual_seed(1)
    model = MambaScope(**{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        model.head.weight.mul_(60)
    return model


@pytest.fixture
def images():
    """Images of which some are flat but for a corner, so that their importance is spread unevenly."""
    torch.manual_seed(0)
    x = torch.randn(14, 3, 64, 64)
    for i in range(14):
        x[i, :, : 4 + 4 * i] *= 0.02
    return x


def plain_count(scores: list[float], mass: float, levels: tuple[int, ...]) -> int:
    """The definition, cell by cell."""
    above = [s - min(scores) for s in scores]
    share = [a / sum(above) if sum(above) else 1 / len(scores) for a in above]
    reached, count = 0.0, 0
    for value in sorted(share, reverse=True):
        reached, count = reached + value, count + 1
        if reached >= mass - 1e-9:
            break
    return next((level for level in levels if level >= count), levels[-1])


def test_counts_by_hand():
    scores = torch.tensor([[5.0, 1, 1, 1, 1], [1, 2, 3, 4, 5], [2, 2, 2, 2, 2], [9, 9, 1, 1, 1]])
    assert mass_counts(scores, 0.6, (1, 2, 3, 4, 5)).tolist() == [1, 2, 3, 2]
    assert mass_counts(scores, 0.6, (2, 4)).tolist() == [2, 2, 4, 2]
    assert mass_counts(scores, 1.0, (1, 2, 3, 4, 5)).tolist() == [1, 4, 5, 2]
    assert mass_counts(scores, 1.0, (1, 3)).tolist() == [1, 3, 3, 3]
    torch.manual_seed(0)
    many = torch.rand(40, 9).square() - 0.3
    for mass in (0.1, 0.5, 0.9, 0.99):
        expected = [plain_count(row, mass, (2, 5, 8)) for row in many.double().tolist()]
        assert mass_counts(many, mass, (2, 5, 8)).tolist() == expected


def test_levels():
    assert count_levels(16, 0.25, 1.0, 4) == (4, 8, 12, 16)
    assert count_levels(16, 0.0, 0.5, 3) == (1, 5, 8)
    assert count_levels(16, 0.25, 1.0, 1) == (16,)
    assert count_levels(16, 0.5, 0.5, 4) == (8,)
    assert count_levels(4, 0.25, 1.0, 99) == (1, 2, 3, 4)


@torch.no_grad()
def test_equal_masses_are_a_constant_alpha(images):
    """Where all images spread their importance alike, they get what a constant share gives."""
    mass, constant = scope(**{**MASS, "alpha_min": 0.05, "alpha_buckets": 16}), scope(alpha=0.7)
    coarse = constant.forward_coarse(images)
    coarse.importance = torch.full_like(coarse.importance, 3.0)
    found, expected = mass.forward_refined(images, coarse), constant.forward_refined(images, coarse)
    assert torch.equal(found.logits, expected.logits)
    assert found.cells.tolist() == [num_selected(0.7, 16)] * 14
    assert torch.equal(found.selected[:, :12], expected.selected)
    assert bool((found.selected[:, 12:] == -1).all())


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_those_of_the_constant_rule(images, alpha):
    mass, constant = scope(**{**MASS, "alpha": alpha, "alpha_max": 0.5}), scope(alpha=alpha)
    found, expected = mass.forward_scope(images, 1.0), constant.forward_scope(images, 1.0)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.selected, expected.selected)
    assert torch.equal(found.tokens, expected.tokens)


@torch.no_grad()
def test_groups_are_dense_and_results_keep_their_order(images):
    model = scope(**MASS)
    seen = []
    original = model.forward_fine

    def spy(x, coarse, alpha=None, take=(), count=None):
        seen.append((len(x), count))
        return original(x, coarse, alpha, take, count)

    model.forward_fine = spy
    out = model.forward_scope(images, 1.0)
    counts = (out.selected >= 0).sum(1)
    assert len(set(counts.tolist())) >= 3
    # one pass per count, with all its images
    assert seen == [(int((counts == c).sum()), c) for c in sorted(set(counts.tolist()))]
    assert out.tokens.tolist() == [17 + 1 + 4 * c + 16 - c for c in counts.tolist()]
    for i in range(14):
        alone = model.forward_scope(images[i : i + 1], 1.0)
        assert torch.equal(alone.selected[0], out.selected[i])
        assert relative_error(alone.logits[0], out.logits[i]) < 1e-4
        k = int(counts[i])
        same = original(images[i : i + 1], model.forward_coarse(images[i : i + 1]), count=k)
        assert torch.equal(same.selected[0], out.selected[i, :k])


@torch.no_grad()
@pytest.mark.parametrize("fine_batch_size", [1, 3, 64])
def test_engine_equals_the_plain_split(images, fine_batch_size):
    model = scope(**MASS)
    conf = model.forward_scope(images, 0.0).confidence.sort().values
    eta = float(conf[3:5].mean())
    expected = model.forward_scope(images, eta)
    assert expected.exited.sum() == 10
    for threshold in (eta, 1.0):
        expected = model.forward_scope(images, threshold)
        engine = ScopePredictor(model, threshold=threshold, fine_batch_size=fine_batch_size)
        found = engine(images, 4)
        assert torch.allclose(found.logits, expected.logits, atol=1e-4)
        for name in ("exited", "selected", "tokens"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        counts = (expected.selected >= 0).sum(1)
        full = sum(int((counts == c).sum()) // fine_batch_size for c in set(counts[counts > 0].tolist()))
        assert engine.fine_batches.count(fine_batch_size) >= full


def test_gradients_are_those_of_each_image_alone(images):
    model = scope(**MASS).train()
    weights = torch.randn(14, 5)

    def grads(batches):
        model.zero_grad()
        for x, w in batches:
            (model(x).fine * w).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together = grads([(images, weights)])
    alone = grads(zip(images.split(1), weights.split(1), strict=True))
    assert together.keys() == alone.keys()
    for name, grad in together.items():
        assert relative_error(grad, alone[name]) < 1e-3, name


@torch.no_grad()
def test_cost_is_counted_per_image(images):
    """The sweep's mean GFLOPs at every threshold, from the cells of the images that are refined there."""
    model = scope(**MASS)
    record = collect(model, [(images, torch.zeros(14, dtype=torch.long))], progress=False).record
    cost = stage_macs(model.config, convention="both_directions")
    curve = sweep(record, {"both_directions": cost})
    for eta, gflops in zip(curve.threshold, curve.gflops["both_directions"], strict=True):
        out = model.forward_scope(images, float(eta))
        counts = (out.selected >= 0).sum(1)[~out.exited].tolist()
        each = [stage_macs(model.config, alpha=c / 16, convention="both_directions").refined for c in counts]
        assert gflops == pytest.approx((sum(each) + cost.coarse * (14 - len(each))) / 14 / 1e9)
    assert len(np.unique(record.cells)) >= 3


@torch.no_grad()
def test_counted_operations_are_those_of_the_cells(images):
    model = scope(**MASS)
    total = count_macs(model.forward_scope, images, 1.0)
    counts = (model.forward_scope(images, 1.0).selected >= 0).sum(1).tolist()
    expected = 0
    for c in counts:
        model.alpha = c / 16  # the closed form of a constant share
        once = expected_count(model)
        expected += once.coarse + once.fine
    assert total == expected


def test_one_length_only_where_programs_need_it(images):
    model = scope(**MASS)
    for call in (model.forward_features, lambda x: stages(model, x)):
        with pytest.raises(ValueError, match="alpha_rule must be 'constant'"):
            call(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_rule": "best"}, "alpha_rule must be one of 'constant', 'mass'"),
        ({"alpha_min": 0.6, "alpha_max": 0.5}, "alpha_max must be above 0 and not below alpha_min 0.6, got 0.5"),
        ({"alpha_max": 0.0, "alpha_min": 0.0}, "alpha_max must be above 0"),
        ({"alpha_min": -1}, r"alpha_min must lie in \[0, 1\]"),
        ({"alpha_buckets": 0}, "alpha_buckets must be a positive integer"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MambaScope(**SMALL, **options)
