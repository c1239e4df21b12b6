"""Thresholds with a promise: kept as often as stated, refused where they cannot be, told in report and weights."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mambascope import MambaScope
from mambascope.commands import evaluate as eval_cli
from mambascope.evaluation.promise import GRID, images_to_promise, promised_threshold
from mambascope.evaluation.sweep import StageRecord, Target
from mambascope.models.checkpoint import read_state_dict, save_safetensors
from tests.evaluation.test_choice import save_image

DROP, CONFIDENCE, RUNS = 0.01, 0.95, 200


def record(confidence, coarse_right, fine_right):
    """A record of images of class 0; a wrong answer is 1."""
    n = len(confidence)
    zero, hit = np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool)
    answers = [np.where(right, 0, 1) for right in (coarse_right, fine_right)]
    return StageRecord(zero, confidence, answers[0], hit, np.ones(n), answers[1], hit)


def population(lost, won):
    """100,000 images; ``lost`` and ``won``: probabilities as functions of the confidence."""
    rng = np.random.default_rng(0)
    confidence, draw = rng.random(100_000), rng.random(100_000)
    is_lost = draw < lost(confidence)
    is_won = ~is_lost & (draw > 1 - won(confidence))
    return record(confidence, ~is_lost, ~is_won)


def drops(images):
    """True drop of accuracy at every threshold of the grid."""
    won = images.coarse_correct.astype(int) - images.fine_correct.astype(int)
    return np.array([-won[(images.confidence >= eta) & (eta < 1)].sum() / len(won) for eta in GRID])


def resampled(images, count):
    """The threshold promised on each of 200 samples, and the true drop there."""
    true = dict(zip(GRID, drops(images), strict=True))
    etas = []
    for seed in range(RUNS):
        rows = np.random.default_rng(seed).integers(0, len(images), count)
        etas.append(promised_threshold(images.part(rows), DROP, CONFIDENCE))
    return np.array(etas), np.array([true[eta] for eta in etas])


POPULATIONS = {
    # less sure, more often lost: the usual case
    "usual": (lambda c: 0.3 * (1 - c) ** 2, lambda c: 0.05 * (1 - c)),
    # nothing is ever won, and the drop of many thresholds lies just above what is accepted
    "edge": (lambda c: np.where(c > 0.98, 0.52, 0.0), lambda c: 0 * c),
    # lost at the top, won below: the drop falls again at lower thresholds
    "not monotone": (lambda c: np.where(c > 0.9, 0.3, 0.0), lambda c: np.where(c < 0.9, 0.05, 0.0)),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_is_broken_no_more_often_than_stated(name):
    _, true = resampled(population(*POPULATIONS[name]), 2000)
    assert (true > DROP).sum() <= RUNS * (1 - CONFIDENCE)


def test_the_edge_is_an_edge():
    """Without the promise's margin the same samples would break it about every second time."""
    images, broken = population(*POPULATIONS["edge"]), 0
    assert DROP < drops(images).max() < 1.1 * DROP
    for seed in range(RUNS):
        rows = np.random.default_rng(seed).integers(0, len(images), 2000)
        broken += drops(images.part(rows)).max() <= DROP  # the plain choice would let all of them leave
    assert broken > 0.2 * RUNS


def test_the_promise_is_worth_something():
    etas, true = resampled(population(*POPULATIONS["usual"]), 2000)
    share = etas.mean()  # confidences are uniform
    best = min(eta for eta, drop in zip(GRID, drops(population(*POPULATIONS["usual"])), strict=True) if drop <= DROP)
    assert best < share < best + 0.2
    assert true.mean() > 0.2 * DROP


@pytest.mark.parametrize(("drop", "confidence"), [(0.005, 0.95), (0.01, 0.99), (0.2, 0.5)])
def test_how_many_images_it_takes(drop, confidence):
    n = images_to_promise(drop, confidence)
    assert binom.cdf(0, n, drop) <= 1 - confidence < binom.cdf(0, n - 1, drop)
    right = np.ones(n, dtype=bool)
    assert promised_threshold(record(np.linspace(0, 0.9, n), right, right), drop, confidence) == 0
    with pytest.raises(ValueError, match=f"{n - 1:,} images are too few .* {n:,} are needed"):
        promised_threshold(record(np.linspace(0, 0.9, n - 1), right[1:], right[1:]), drop, confidence)


def test_nothing_can_be_promised_of_a_coarse_look_that_is_sure_and_wrong():
    n = 1000
    assert promised_threshold(record(np.ones(n), np.zeros(n, dtype=bool), np.ones(n, dtype=bool)), 0.005, 0.95) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ms", "value": 1.0, "confidence": 0.9}, "can be asked for with a target of acc_drop, got ms"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, e.g. 0.95, got 1.0"),
        ({"value": 0.0, "confidence": 0.9}, "with a confidence the accepted drop must lie between 0 and 1, got 0.0"),
    ],
)
def test_bad_targets(options, message):
    with pytest.raises(ValueError, match=message):
        Target(**options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MambaScope(img_size=32, patch_size=8, embed_dim=16, depth=1, d_state=4, num_classes=3, threshold=0.7).eval()


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            save_image(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


QUICK = ["--timing-images", 8, "--rounds", 1, "--batch-size", 4, "--measure", "--no-figures"]


def run(weights, images, out, *options):
    return eval_cli.main([str(a) for a in (weights, "--data", images, "--out", out, *options, *QUICK)])


def test_the_command_promises(model, images, tmp_path, capsys):
    save_safetensors(model, tmp_path / "model.safetensors")
    options = ["--target-acc-drop", 20, "--with-confidence", 0.9]  # 11 images can, there are 30
    assert run(tmp_path / "model.safetensors", images, tmp_path / "out", *options) == 0
    rule = (
        "fewest refined images with top-1 at most 20 points below refining every image, promised for other such images "
        "with a confidence of 0.9"
    )
    assert rule in capsys.readouterr().out
    choice = json.loads((tmp_path / "out" / "report.json").read_text())["choice"]
    assert (choice["images"], choice["images_needed"], choice["decided"]) == (30, 11, True)
    assert (choice["promised_confidence"], choice["confidence"]) == (0.9, 0.95)
    stored = read_state_dict(tmp_path / "out" / "model.safetensors")[1]["report"]["choice"]
    assert stored["rule"].startswith(rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--with-confidence", 0.9], "--with-confidence needs --target-acc-drop: it promises that drop"),
        (
            ["--target-acc-drop", 0.5, "--with-confidence", 0.95],
            "30 images are too few to promise a drop of",
        ),
        (["--target-acc-drop", 0.5, "--with-confidence", 95], "confidence must lie between 0 and 1, e.g. 0.95, got 95"),
    ],
)
def test_the_command_refuses_and_leaves_nothing(model, images, tmp_path, capsys, options, message):
    save_safetensors(model, tmp_path / "model.safetensors")
    assert run(tmp_path / "model.safetensors", images, tmp_path / "out", *options) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
