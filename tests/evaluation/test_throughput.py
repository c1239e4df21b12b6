"""Timing: modes in turn, real splits; and the engine gives what the plain split gives."""

import pytest
import torch

from mambascope.evaluation.throughput import compare_engine, interleaved, measure_model, measure_scope, quartiles
from mambascope.models import VimConfig, VisionMamba
from mambascope.models.engine import ScopePredictor


def assert_same(result, expected):
    assert torch.allclose(result.logits, expected.logits, atol=1e-4)
    for name in ("exited", "selected", "tokens"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert torch.allclose(result.importance, expected.importance, atol=1e-5)


@pytest.fixture(scope="module")
def expected(tiny_scope, images, eta):
    with torch.no_grad():
        output = tiny_scope.forward_scope(images, eta)
    assert output.exited.sum() == 15
    return output


@pytest.mark.parametrize("batch_size", [1, 4, 30])
@pytest.mark.parametrize("fine_batch_size", [1, 4, 64])
def test_engine_equals_the_plain_split(tiny_scope, images, eta, expected, batch_size, fine_batch_size):
    engine = ScopePredictor(tiny_scope, threshold=eta, fine_batch_size=fine_batch_size)
    assert_same(engine(images, batch_size), expected)
    # all fine batches but the last are full
    assert set(engine.fine_batches[:-1]) <= {fine_batch_size}
    assert sum(engine.fine_batches) == 15


def test_engine_returns_batches_in_order_with_what_belongs_to_them(tiny_scope, images, eta, expected):
    parts = list(images.split([5, 1, 9, 15]))
    engine = ScopePredictor(tiny_scope, threshold=eta, fine_batch_size=8)
    results = list(engine.stream(zip(parts, "abcd", strict=True)))
    assert [name for _, name in results] == list("abcd")
    assert [len(output.logits) for output, _ in results] == [5, 1, 9, 15]
    assert torch.allclose(torch.cat([output.logits for output, _ in results]), expected.logits, atol=1e-4)


def test_engine_does_not_hold_results_back_forever(tiny_scope, images, eta):
    """With few refined images the queue never fills: `max_open` bounds how far the engine reads ahead."""
    read = []

    def source():
        for i, part in enumerate(images.split(1)):
            read.append(i)
            yield part, i

    engine = ScopePredictor(tiny_scope, threshold=eta, fine_batch_size=1000, max_open=4)
    for _, i in engine.stream(source()):
        assert len(read) - i <= 6
    assert len(read) == 30


def test_engine_takes_images_of_changing_size(tiny_scope, images, eta):
    wide = torch.nn.functional.interpolate(images[:6], size=(32, 48))
    engine = ScopePredictor(tiny_scope, threshold=1.0, fine_batch_size=64)
    outputs = [output for output, _ in engine.stream([(images[:3], 0), (wide, 1), (images[3:5], 2)])]
    assert engine.fine_batches == [3, 6, 2]
    with torch.no_grad():
        assert_same(outputs[1], tiny_scope.forward_scope(wide, 1.0))


@pytest.mark.parametrize(("threshold", "alpha", "refined"), [(0.0, None, 0), (1.0, None, 30), (1.0, 0.0, 0)])
def test_engine_at_the_ends(tiny_scope, images, threshold, alpha, refined):
    engine = ScopePredictor(tiny_scope, threshold=threshold, alpha=alpha)
    with torch.no_grad():
        assert_same(engine(images, 8), tiny_scope.forward_scope(images, threshold, alpha))
    assert sum(engine.fine_batches) == refined


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"threshold": float("nan")}, "threshold"),
        ({"alpha": 2.0}, "alpha"),
        ({"fine_batch_size": 0}, "fine_batch_size"),
        ({"max_open": 0}, "max_open"),
    ],
)
def test_engine_refuses_bad_options(tiny_scope, options, word):
    with pytest.raises(ValueError, match=word):
        ScopePredictor(tiny_scope, **options)


def test_engine_needs_two_stages():
    with pytest.raises(ValueError, match="MambaScope"):
        ScopePredictor(VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1)))


def test_measured_modes_and_shares(tiny_scope, images, eta):
    timings = measure_scope(tiny_scope, images, [eta, 0.0], batch_size=7, rounds=3)
    assert [t.mode for t in timings] == ["coarse", "refine_all", "dynamic", "dynamic"]
    assert {t.images for t in timings} == {28}  # whole batches only
    assert [t.share_refined for t in timings[:2]] == [0.0, 1.0]
    assert 0 < timings[2].share_refined < 1
    assert timings[3].share_refined == 0.0
    assert all(0 < t.ms_low <= t.ms <= t.ms_high for t in timings)
    assert timings[0].images_per_s == pytest.approx(1e3 / timings[0].ms)


def test_one_stage_model_is_timed_too(images):
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3))
    assert measure_model(model, images, batch_size=64, rounds=2).images == 30


def test_runs_are_interleaved_with_a_rotating_order():
    order = []
    runs = {name: (lambda n=name: order.append(n)) for name in "abc"}
    seconds = interleaved(runs, torch.device("cpu"), rounds=3, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    with pytest.raises(ValueError, match="rounds"):
        interleaved(runs, torch.device("cpu"), rounds=0)


def test_time_limits_shrink_rounds_and_images_but_not_below_what_is_needed(tiny_scope, images):
    few = measure_scope(tiny_scope, images, [], batch_size=5, rounds=50, max_seconds=0.0)
    assert [(t.rounds, t.images) for t in few] == [(3, 5)] * 2
    generous = measure_scope(tiny_scope, images, [], batch_size=5, rounds=4, max_seconds=1e6)
    assert [(t.rounds, t.images) for t in generous] == [(4, 30)] * 2
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3))
    assert measure_model(model, images, batch_size=10, rounds=9, max_seconds=0.0).images == 10


def test_quartiles():
    assert quartiles([1.0]) == (1.0, 1.0, 1.0)
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)


def test_engine_and_plain_split_are_compared_in_one_run(tiny_scope, images, eta):
    split, engine = compare_engine(tiny_scope, images, eta, batch_size=2, fine_batch_size=16, rounds=2)
    assert (split.mode, engine.mode) == ("split", "engine")
    assert split.share_refined == engine.share_refined == 0.5
