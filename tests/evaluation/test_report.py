"""The report folder: complete, consistent with the model, atomic."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.evaluation import report as report_module
from mambascope.evaluation.choice import interval_text
from mambascope.evaluation.examples import make_examples, run_scope, to_rgb
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.report import write_report
from mambascope.evaluation.sweep import Target
from mambascope.evaluation.throughput import representative
from mambascope.models import VimConfig, VisionMamba
from mambascope.models.cost import stage_macs

QUICK = {"rounds": 2, "batch_sizes": (8, 1), "timing_images": 16, "max_seconds": 2.0, "progress": False}
NO_FIGURES = {**QUICK, "figures": False}


@pytest.fixture(scope="module")
def loader(images, labels):
    return [(images[:16], labels[:16]), (images[16:], labels[16:])]


@pytest.fixture(scope="module")
def written(tiny_scope, loader, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "folder"
    log = out.parent.parent / "metrics.csv"
    log.write_text("step,train/loss\n0,2.0\n1,1.5\n")
    return write_report(
        tiny_scope,
        loader,
        out,
        ReportOptions(metrics_csv=log, class_names=list("abcdefg"), target=Target(value=0.1), name="test", **QUICK),
    )


def test_every_file_is_there_and_readable(written):
    names = {p.name for p in written.directory.iterdir()}
    pictures = {"tradeoff.png", "heatmaps.png", "exits.png", "training.png"}
    assert names == pictures | {"report.json", "report.txt", "curve.csv", "timings.csv"}
    assert set(written.data["files"]) == names
    for name in pictures:
        with Image.open(written.directory / name) as image:
            assert image.width > 500
    assert json.loads((written.directory / "report.json").read_text()) == written.data
    assert (written.directory / "report.txt").read_text().strip() == written.table


def test_numbers_are_those_of_the_model(written, tiny_scope, images, labels):
    results = written.data["results"]
    for mode, eta in (("coarse", 0.0), ("refine_all", 1.0), ("dynamic", written.threshold)):
        with torch.no_grad():
            output = tiny_scope.forward_scope(images, eta)
        assert results[mode]["top1"] == pytest.approx((output.logits.argmax(1) == labels).double().mean().item()), mode
        assert results[mode]["share_refined"] == pytest.approx(1 - output.exited.double().mean().item())
    for convention in ("one_direction", "both_directions"):
        cost = stage_macs(tiny_scope.config, convention=convention)
        share = results["dynamic"]["share_refined"]
        assert results["dynamic"][f"gflops_{convention}"] == pytest.approx(cost.gflops(share))
        saving = written.data["savings"][f"gflops_{convention}"]
        assert saving == pytest.approx(1 - cost.expected(share) / cost.refined)
    assert written.data["parameters"] == sum(p.numel() for p in tiny_scope.parameters())
    assert written.data["cost"]["one_direction"]["params"] == written.data["parameters"]


def test_choice_of_the_threshold_is_kept_and_explained(written):
    results = written.data["results"]
    assert results["dynamic"]["top1"] >= results["refine_all"]["top1"] - 0.1
    assert written.data["choice"]["data"] == "evaluation data"
    with (written.directory / "curve.csv").open() as file:
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    good = [r for r in rows if r["top1"] >= results["refine_all"]["top1"] - 0.1 - 1e-6]
    assert min(r["share_refined"] for r in good) == pytest.approx(results["dynamic"]["share_refined"], abs=1e-5)
    assert [r["threshold"] for r in (rows[0], rows[-1])] == [0, 1]


def test_table_shows_the_three_ways_and_the_savings(written):
    lines = written.table.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith("-")][1:] == [
        "coarse only",
        "refine everything",
        f"dynamic, η = {written.threshold:.3f}",
        "saved by dynamic",
        f"η: {written.data['choice']['rule']}; chosen on 30 images of the evaluation data, the same as above: "
        "its accuracy is slightly optimistic",
        interval_text(written.data["choice"]),
    ]
    assert "ms/image (batch 8)" in lines[0]
    assert "ms/image (batch 1)" in lines[0]
    assert [row["mode"] for row in written.data["table"]] == [
        "coarse only",
        "refine everything",
        f"dynamic, η = {written.threshold:.3f}",
    ]


def test_times_are_measured_for_every_mode_and_size(written):
    timings = written.data["timings"]
    assert {(t["mode"], t["batch_size"]) for t in timings} == {
        (mode, size) for mode in ("coarse", "refine_all", "dynamic") for size in (8, 1)
    }
    assert all(t["ms"] > 0 for t in timings)
    assert written.data["results"]["dynamic"]["ms_batch_8"] in [t["ms"] for t in timings]


def test_calibration_data_decide_when_there_are_any(tiny_scope, loader, images, tmp_path, capsys):
    with torch.no_grad():
        right = tiny_scope.forward_coarse(images).logits.argmax(1)
    # on data where the coarse stage is always right nothing needs to be refined
    report = write_report(
        tiny_scope, loader, tmp_path, ReportOptions(calibration_loader=[(images, right)] * 20, **NO_FIGURES)
    )
    assert report.threshold == 0.0
    assert report.data["choice"]["data"] == "calibration data"
    assert report.data["images"] == 30
    assert capsys.readouterr().out.strip() == report.table


def test_a_given_threshold_and_a_data_module(tiny_scope, loader, tmp_path, eta):
    class Module:
        def val_dataloader(self):
            return loader

    report = write_report(
        tiny_scope, Module(), tmp_path, ReportOptions(threshold=eta, measure_thresholds=[0.9], **NO_FIGURES)
    )
    assert report.threshold == eta
    assert report.data["choice"]["rule"] == "given"
    assert sorted({t["threshold"] for t in report.data["timings"] if t["mode"] == "dynamic"}) == sorted({eta, 0.9})
    assert not (tmp_path / "training.png").exists()


def test_targets_for_gflops_and_time(tiny_scope, loader, tmp_path):
    cost = stage_macs(tiny_scope.config)
    report = write_report(
        tiny_scope, loader, tmp_path, ReportOptions(target=Target("gflops", cost.gflops(0.5)), **NO_FIGURES)
    )
    assert report.data["results"]["dynamic"]["gflops_one_direction"] <= cost.gflops(0.5) + 1e-12
    assert "GFLOPs (one direction)" in report.data["choice"]["rule"]
    generous = write_report(tiny_scope, loader, tmp_path, ReportOptions(target=Target("ms", 1e6), **NO_FIGURES))
    top1 = [row["top1"] for row in generous.data["curve"]]
    assert generous.data["results"]["dynamic"]["top1"] == pytest.approx(max(top1), abs=1e-5)
    with pytest.raises(ValueError, match="cannot be met"):
        write_report(tiny_scope, loader, tmp_path, ReportOptions(target=Target("ms", 1e-9), **NO_FIGURES))


def test_one_stage_model(images, labels, tmp_path):
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=7))
    report = write_report(model, [(images, labels)], tmp_path, ReportOptions(**NO_FIGURES))
    assert report.threshold is None
    assert report.data["results"]["all"]["gflops_one_direction"] == stage_macs(model.config).gflops()
    assert report.data["results"]["all"]["ms_batch_8"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.txt"}


@pytest.mark.parametrize(
    ("options", "word"),
    [({"timing_images": 0}, "timing_images"), ({"threshold": "a"}, "threshold")],
)
def test_bad_options(tiny_scope, loader, tmp_path, options, word):
    with pytest.raises(ValueError, match=word):
        write_report(tiny_scope, loader, tmp_path, ReportOptions(**{**NO_FIGURES, **options}))


def test_a_crash_while_writing_keeps_the_old_report(tiny_scope, loader, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tiny_scope, loader, tmp_path, ReportOptions(**NO_FIGURES))
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_examples_carry_what_the_model_did(tiny_scope, images, labels, eta):
    output = run_scope(tiny_scope, images, eta, batch_size=7)
    examples = make_examples(
        tiny_scope, images, output, labels=labels, class_names=list("abcdefg"), mean=[0.0] * 3, std=[1.0] * 3
    )
    assert [e.exited for e in examples] == output.exited.tolist()
    for i, e in enumerate(examples):
        assert e.importance.shape == (4, 4)
        assert len(e.selected) == (0 if e.exited else 8)  # alpha 0.5 of 16 cells
        assert e.tokens == (17 if e.exited else 17 + 1 + 4 * 8 + 8)
        assert e.true == "abcdefg"[int(labels[i])]
        assert np.allclose(e.image, images[i].clamp(0, 1).permute(1, 2, 0).numpy())


def test_pictures_of_any_channel_count_are_shown():
    assert to_rgb(torch.full((1, 4, 6), 0.5), [0.5], [0.2]).shape == (4, 6, 3)
    assert to_rgb(torch.full((1, 4, 6), 0.5), [0.5], [0.2])[0, 0] == pytest.approx([0.6] * 3)
    assert to_rgb(torch.zeros(5, 4, 6), [0.1] * 3, [1.0] * 3).shape == (4, 6, 3)


def test_timed_images_are_spread_like_all_images():
    rng = np.random.default_rng(0)
    everything = rng.beta(0.5, 0.5, 5000)
    sample = everything[rng.choice(5000, 300, replace=False)]
    picked = representative(sample, everything, 100)
    assert len(set(picked.tolist())) == 100
    for eta in (0.1, 0.3, 0.5, 0.9):
        assert (sample[picked] < eta).mean() == pytest.approx((everything < eta).mean(), abs=0.011)
    assert sorted(representative(sample, everything, 999)) == list(range(300))
    assert sorted(representative(np.ones(5), np.ones(50), 3).tolist()) != [0, 0, 0]
