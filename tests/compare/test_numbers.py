"""Aggregation over seeds and comparison at equal cost and equal accuracy, on records whose answers are known."""

import csv

import numpy as np
import pytest

from mambascope.compare.curves import compare, make_curve, text
from mambascope.compare.lists import Comparison, Setting
from mambascope.compare.results import Result
from mambascope.compare.sources import Point
from mambascope.compare.table import Spread, make_rows, write_csv
from mambascope.compare.timing import Measured, share_refined, threshold_for
from mambascope.evaluation.sweep import StageRecord, sweep
from mambascope.models.cost import CONVENTIONS, StageCost

N = 100


def result(coarse_right, fine_right, two_stage=True, fine_cost=8e9, labels=None):
    """The images are ranked by confidence; of the least confident ones the fine stage answers rightly."""
    labels = np.zeros(N, np.int64) if labels is None else labels
    confidence = np.linspace(0.1, 0.99, N)
    coarse = np.where(np.arange(N) >= N - coarse_right, labels, 1 - labels)
    fine = np.where(np.arange(N) < fine_right, labels, 1 - labels)
    record = StageRecord(labels, confidence, coarse, coarse == labels, confidence, fine, fine == labels)
    parts = (
        {"coarse": 2e9, "reuse": 0, "fine": fine_cost} if two_stage else {"coarse": 0, "reuse": 0, "fine": fine_cost}
    )
    costs = {c: StageCost(c, 10, 1, 2, **{k: int(v) for k, v in parts.items()}) for c in CONVENTIONS}
    return Result(f"{coarse_right}-{fine_right}", record, costs, two_stage, 3)


def plan():
    net = {"checkpoint": "a"}
    entries = {
        "vim": {"label": "Vim", "net": net},
        "scope": {"label": "MambaScope", "net": net, "thresholds": [0.5]},
    }
    return Comparison("t", entries, "vim", "scope", (0, 1), data={"class_path": "x"})


def times(entry, seed, threshold, ms, size=64):
    return Measured(entry, "as trained", seed, threshold, size, 64, 3, ms, ms, ms, ms / 4)


@pytest.fixture
def world():
    """Two seeds: coarse right on 50 and 60 images, all rights moved to the fine stage; Vim right on 70 and 80."""
    results = {Point("vim", Setting(), s): result(0, 70 + 10 * s, False, 6e9) for s in (0, 1)}
    results |= {Point("scope", Setting(), s): result(50 + 10 * s, N) for s in (0, 1)}
    rows = [times("vim", s, None, 4.0) for s in (0, 1)]
    rows += [times("scope", s, eta, ms) for s in (0, 1) for eta, ms in ((0.0, 2.0), (0.5, 4.0), (1.0, 9.0))]
    return results, rows


def test_rows_are_means_and_spreads_over_the_seeds(world, tmp_path):
    results, measured = world
    rows = make_rows(plan(), results, measured)
    vim, *curve = rows
    assert vim.top1.values == (0.7, 0.8)
    assert (vim.top1.mean, vim.top1.low, vim.top1.high) == pytest.approx((0.75, 0.7, 0.8))
    assert vim.top1.std == pytest.approx(0.1 / np.sqrt(2))
    assert vim.gflops["one_direction"].mean == 6.0
    assert (vim.ms[64].mean, vim.ratio[64].mean, vim.epochs) == (4.0, 1.0, 3)
    assert [row.threshold for row in curve] == [i / 20 for i in range(21)]
    for row in curve:  # the same as the sweep of every seed
        for value, point in zip(row.top1.values, [r for p, r in results.items() if p.entry == "scope"], strict=True):
            assert value == sweep(point.record, thresholds=[row.threshold]).top1[0]
    assert [row.threshold for row in curve if row.ms] == [0.0, 0.5, 1.0]
    write_csv(rows, [64], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (lines[0]["top1_mean"], lines[0]["top1_seeds"]) == ("0.75", "0.7 0.8")
    assert (lines[0]["top1_min"], lines[0]["top1_max"], lines[0]["threshold"]) == ("0.7", "0.8", "")
    assert lines[2]["ms_batch_64_mean"] == ""


def test_one_value_has_no_deviation():
    assert (Spread((0.5,)).std, Spread((0.5,)).error) == (0.0, 0.0)


def test_other_images_are_refused(world):
    results, measured = world
    other = result(0, 70, False, labels=np.arange(N) % 2)
    results[Point("vim", Setting(), 1)] = other
    with pytest.raises(ValueError, match="entries must be evaluated on the same images: vim"):
        make_rows(plan(), results, measured)


def test_curve_at_equal_cost_time_and_accuracy(world):
    results, measured = world
    parts = [(p, r) for p, r in results.items() if p.entry == "scope"]
    curve = make_curve("MambaScope", parts, measured)
    share = curve.share
    # the least confident images are wrong at first, so every refined one is a gain until all are right
    for line, right in zip(curve.top1, (0.5, 0.6), strict=True):
        assert np.allclose(line, np.minimum(right + share, 1.0))
    assert np.allclose(curve.gflops["both_directions"], 2 + 8 * share)
    timed = [0.0, share_refined(parts[0][1], 0.5), 1.0]
    assert np.allclose(curve.ms[64], np.interp(share, timed, [2.0, 4.0, 9.0]))

    vim = make_rows(plan(), results, measured)[0]
    compared = compare(curve, vim)
    # 6 GFLOPs are half of the images refined: 1.0 and 1.0 (0.6 + 0.5 is capped), Vim has 0.7 and 0.8
    assert compared.top1_at_gflops.values == pytest.approx((0.3, 0.2))
    # mean accuracy 0.55 + share = 0.75 at share 0.2: 3.6 GFLOPs instead of 6
    assert compared.gflops_at_top1 == pytest.approx(3.6 / 6)
    at = float(np.interp(0.2, timed, [2.0, 4.0, 9.0]))
    assert compared.ms_at_top1[64] == pytest.approx(at / 4.0)
    equal = timed[1]  # Vim's 4 ms are what the middle threshold takes
    assert compared.top1_at_ms[64].values == pytest.approx((0.5 + equal - 0.7, 0.6 + min(equal, 0.4) - 0.8), abs=0.006)
    printed = text(curve, [compared])
    assert "-40 %" in printed
    assert "+25.0 [+20.0, +30.0]" in printed


def test_beyond_the_ends_of_the_curve(world):
    results, measured = world
    parts = [(p, r) for p, r in results.items() if p.entry == "scope"]
    curve = make_curve("MambaScope", parts, measured)
    cost = curve.gflops["one_direction"]
    assert curve.top1_at(cost, 1.9) is None
    assert curve.top1_at(cost, 99.0) == pytest.approx([1.0, 1.0])
    assert curve.cost_at(cost, 0.2) == cost[0]
    assert curve.cost_at(cost, 1.01) is None


def test_the_timed_images_refine_the_share_of_all():
    confidence = np.random.default_rng(0).permutation(np.linspace(0.2, 0.9, 40))
    for share in (0.0, 0.1, 0.5, 0.99, 1.0):
        eta = threshold_for(confidence, share)
        refined = {0.0: 0, 1.0: 40}.get(eta, int((confidence < eta).sum()))
        assert refined == round(40 * share)
