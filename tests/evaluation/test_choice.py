"""A threshold is chosen, and stored, only where the images can decide it; what is known of it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mambascope import MambaScope
from mambascope.commands import evaluate as eval_cli
from mambascope.commands import predict as predict_cli
from mambascope.evaluation.choice import (
    binomial_interval,
    describe_choice,
    drop_interval,
    images_for_drop,
    images_for_share,
    images_needed,
)
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.report import write_report
from mambascope.evaluation.sweep import StageRecord, Target
from mambascope.models.checkpoint import load_model, save_safetensors

NO_FIGURES = {"figures": False, "rounds": 1, "batch_sizes": (8, 1), "timing_images": 8, "progress": False}
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MambaScope(**OPTIONS, threshold=0.7).eval()


def data(model, images):
    """Images on which the coarse stage is always right: nothing needs to be refined."""
    x = torch.randn(images, 3, 32, 32)
    with torch.no_grad():
        return x, model.forward_coarse(x).logits.argmax(1)


@pytest.mark.parametrize(("hits", "images"), [(0, 3), (3, 3), (1, 20), (400, 1000)])
def test_interval_is_exact(hits, images):
    low, high = binomial_interval(hits, images)
    assert low <= hits / images <= high
    if hits:
        assert binom.sf(hits - 1, images, low) == pytest.approx(0.025)
    if hits < images:
        assert binom.cdf(hits, images, high) == pytest.approx(0.025)


def test_number_of_images_follows_from_the_interval():
    assert images_for_drop(0.005) == 598
    for drop in (0.005, 0.01, 0.1):
        n = images_for_drop(drop)
        assert binom.pmf(0, n, drop) <= 0.05 < binom.pmf(0, n - 1, drop)
    assert images_for_drop(0.0) == images_for_drop(0.005)  # what a target of none is for
    assert images_for_drop(1.0) == 1
    n = images_for_share()
    widths = [np.ptp(binomial_interval(m // 2, m)) for m in (n - 1, n)]
    assert widths[0] >= 0.5 > widths[1]
    assert images_needed(Target("ms", 3.0)) == images_needed(Target("gflops", 3.0)) == n


def test_drop_interval_covers_what_was_drawn():
    rng = np.random.default_rng(0)
    true, covered = 0.02 - 0.01, 0
    for _ in range(200):
        lost, won, _ = rng.multinomial(300, [0.02, 0.01, 0.97])
        low, high = drop_interval(int(lost), int(won), 300)
        covered += low <= true <= high
    assert covered >= 190


def test_what_is_said_of_a_choice():
    n = 1000
    confidence = np.linspace(0, 1, n, endpoint=False)
    coarse, fine = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    labels = np.zeros(n, dtype=np.int64)
    coarse[:900:100] = 1  # nine wrong coarse answers, of which those below the threshold are refined
    fine[995] = 1
    hit = np.ones(n, dtype=bool)
    record = StageRecord(labels, confidence, coarse, hit, confidence, fine, hit)
    report = describe_choice(Target(), record, 0.45, 0.8)
    assert (report["decided"], report["images"], report["threshold"]) == (True, n, 0.45)
    assert report["drop"] == pytest.approx((4 - 1) / n)
    assert report["drop_interval"] == pytest.approx(drop_interval(4, 1, n))
    assert report["share_refined"] == pytest.approx(0.45)
    assert describe_choice(Target(), record, 0.0, 0.8)["share_refined"] == 0
    assert describe_choice(Target(), record, 1.0, 0.8)["share_refined"] == 1


@pytest.mark.parametrize("where", ["evaluation", "calibration"])
def test_three_images_leave_the_threshold(model, tmp_path, where):
    """It became 0, and the model never refined again."""
    few = data(model, 3)
    loader, calibration = ([few], None) if where == "evaluation" else ([data(model, 40)], [few])
    report = write_report(model, loader, tmp_path, ReportOptions(calibration_loader=calibration, **NO_FIGURES))
    assert report.threshold == 0.7
    choice = json.loads((tmp_path / "report.json").read_text())["choice"]
    assert (choice["decided"], choice["images"], choice["images_needed"]) == (False, 3, 598)
    assert choice["drop_interval"][0] < -0.5
    assert choice["drop_interval"][1] > 0.5
    assert "the model's own 0.7 stays: 3 images are too few to choose" in report.table
    assert "598 can" in report.table
    assert "95 % interval" in report.table


def test_enough_images_choose(model, tmp_path):
    report = write_report(model, [data(model, 600)], tmp_path, ReportOptions(**NO_FIGURES))
    assert report.threshold == 0.0
    assert report.data["choice"]["decided"]
    assert report.data["choice"]["drop_interval"][1] < 0.01


@pytest.mark.parametrize(("target", "stays"), [(["--target-acc-drop", 0.5], True), (["--target-acc-drop", 20], False)])
def test_eval_and_predict_say_which_rule(model, tmp_path, capsys, target, stays):
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_safetensors(model, weights)
    folder = tmp_path / "images"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            save_image(folder / name / f"{i}.png")
    quick = ["--timing-images", 8, "--rounds", 1, "--batch-size", 4, "--measure", "--no-figures"]
    args = [weights, "--data", folder, "--out", out, *target, *quick]
    assert eval_cli.main([str(a) for a in args]) == 0
    stored = load_model(out / "model.safetensors")
    assert (stored.threshold == 0.7) is stays
    output = capsys.readouterr().out
    assert ("stays: 30 images are too few" in output) is stays
    assert predict_cli.main([str(out / "model.safetensors"), str(folder / "a")]) == 0
    warning = capsys.readouterr().err
    assert ("the model's own 0.7 stays: 30 images" if stays else "(threshold") in warning
    assert "points below refining every image" in warning
    # a threshold that is given is not one that was chosen
    assert predict_cli.main([str(out / "model.safetensors"), str(folder / "a"), "--threshold", "0.4"]) == 0
    assert "(threshold 0.4: given)" in capsys.readouterr().err
    stored.threshold = 0.6
    save_safetensors(stored, weights)
    assert predict_cli.main([str(weights), str(folder / "a")]) == 0
    assert "(threshold 0.6)" in capsys.readouterr().err


def save_image(path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
