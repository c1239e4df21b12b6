"""The vectorised sweep against a plain loop over images and thresholds."""

import numpy as np
import pytest

from mambascope.commands.cost import model_config
from mambascope.evaluation.sweep import (
    StageRecord,
    Target,
    calibration_error,
    candidate_thresholds,
    oracle_top1,
    pick_acc_drop,
    pick_gflops,
    pick_ms,
    sweep,
)
from mambascope.models.cost import stage_macs

COSTS = {"one_direction": stage_macs(model_config("mambascope_nano_patch8_64"))}


def made_up(n=400, classes=7, seed=0):
    """Logits of a weak and a strong stage about the same labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    onehot = np.eye(classes)[labels]
    return rng.normal(size=(n, classes)) + 1.0 * onehot, rng.normal(size=(n, classes)) + 3.0 * onehot, labels


@pytest.fixture(scope="module")
def record():
    return StageRecord.from_logits(*made_up())


def test_record_agrees_with_a_plain_computation():
    coarse, fine, labels = made_up(n=50)
    r = StageRecord.from_logits(coarse, fine, labels)
    for i in range(50):
        p = np.exp(coarse[i]) / np.exp(coarse[i]).sum()
        assert r.confidence[i] == pytest.approx(p.max())
        assert r.coarse_pred[i] == p.argmax()
        assert r.fine_top5[i] == (labels[i] in np.argsort(-fine[i])[:5])


def test_sweep_equals_a_loop_over_images(record):
    etas = [-1.0, 0.0, 0.2, float(record.confidence[3]), 0.5, 0.9, 1.0, 2.0]
    curve = sweep(record, COSTS, thresholds=etas)
    assert curve.threshold.tolist() == sorted(etas)
    for i, eta in enumerate(curve.threshold):
        exits = [eta <= 0 or (eta < 1 and c >= eta) for c in record.confidence]
        right = np.array(
            [c if out else f for out, c, f in zip(exits, record.coarse_correct, record.fine_correct, strict=True)]
        )
        exited = np.array(exits)
        row = curve.row(i)
        assert row["top1"] == pytest.approx(right.mean())
        assert row["share_refined"] == pytest.approx(1 - exited.mean())
        assert row["gflops_one_direction"] == pytest.approx(COSTS["one_direction"].gflops(1 - exited.mean()))
        if exited.any():
            assert row["coarse_top1_exited"] == pytest.approx(record.coarse_correct[exited].mean())
        if not exited.all():
            assert row["fine_top1_refined"] == pytest.approx(record.fine_correct[~exited].mean())
    assert np.isnan(curve.coarse_top1_exited[-1])
    assert np.isnan(curve.fine_top1_refined[0])


def test_ends_are_the_stages_and_the_share_only_rises(record):
    curve = sweep(record)
    assert curve.top1[0] == record.coarse_correct.mean()
    assert curve.top1[-1] == record.fine_correct.mean()
    assert curve.top5[0] == record.coarse_top5.mean()
    assert curve.top5[-1] == record.fine_top5.mean()
    assert (np.diff(curve.share_refined) > 0).all()
    assert len(curve) == len(np.unique(record.confidence)) + 1
    thin = curve.thinned(21)
    assert len(thin) <= 21
    assert (thin.threshold[[0, -1]] == [0, 1]).all()
    assert set(thin.top1) <= set(curve.top1)


def test_candidate_thresholds_separate_equal_confidences_once():
    assert candidate_thresholds(np.array([0.4, 0.4, 0.8])).tolist() == pytest.approx([0, 0.6, 1])
    assert candidate_thresholds(np.array([0.4])).tolist() == [0, 1]
    assert candidate_thresholds(np.array([1.0, 1.0])).tolist() == [0, 1]


def test_picks_meet_their_target_and_nothing_cheaper_does(record):
    curve = sweep(record, COSTS, ms_coarse=1.0, ms_refined=5.0)
    best = pick_acc_drop(curve, 0.01)
    assert curve.top1[best] >= record.fine_correct.mean() - 0.01
    assert (curve.top1[:best] < record.fine_correct.mean() - 0.01).all()
    budget = COSTS["one_direction"].gflops(0.5)
    chosen = pick_gflops(curve, budget)
    affordable = curve.gflops["one_direction"] <= budget
    assert affordable[chosen]
    assert curve.top1[chosen] == curve.top1[affordable].max()
    assert curve.ms[pick_ms(curve, 3.0)] <= 3.0
    assert curve.ms[[0, -1]].tolist() == [1.0, 5.0]


def test_impossible_targets_say_what_is_possible(record):
    curve = sweep(record, COSTS, ms_coarse=1.0, ms_refined=5.0)
    with pytest.raises(ValueError, match=r"cannot be met.* 1 ms .* 5 ms"):
        pick_ms(curve, 0.5)
    with pytest.raises(ValueError, match="measured times"):
        pick_ms(sweep(record), 1.0)
    with pytest.raises(ValueError, match="accuracy drop"):
        pick_acc_drop(curve, 2)
    with pytest.raises(ValueError, match="convention"):
        pick_gflops(curve, 1.0, "three")


@pytest.mark.parametrize(
    "bad", [{"kind": "speed"}, {"value": 2.0}, {"value": -1.0}, {"kind": "ms", "value": float("nan")}]
)
def test_bad_targets(bad):
    with pytest.raises(ValueError, match=r"kind|target"):
        Target(**bad)


def test_calibration_error_of_known_cases():
    assert calibration_error(np.full(10, 0.8), np.arange(10) < 8) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.full(10, 0.9), np.zeros(10)) == pytest.approx(0.9)
    # two bins: (0.6 claimed, 1.0 true) and (1.0 claimed, 0.5 true), half of the images each
    assert calibration_error(np.array([0.6, 0.6, 1.0, 1.0]), np.array([1, 1, 1, 0])) == pytest.approx(0.45)


def test_oracle_is_at_least_as_good_as_any_threshold(record):
    assert oracle_top1(record) >= sweep(record).top1.max()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c, f, y: (c, f[:, :3], y), "logits must both be"),
        (lambda c, f, y: (c, f, y + 1), r"labels must be in 0\.\.6"),
        (lambda c, f, y: (c, f, y * 1.0), "integers"),
        (lambda c, f, y: (c * np.nan, f, y), "NaN"),
    ],
)
def test_bad_records_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        StageRecord.from_logits(*change(*made_up()))


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        StageRecord.concatenate([])
