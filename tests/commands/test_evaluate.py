"""The eval command: data of every kind, targets, export, and every mistake in one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.commands import evaluate as eval_cli
from mambascope.models import MambaScope, ScopeConfig, VimConfig, VisionMamba, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.cost import stage_macs
from mambascope.models.ready import ready_model

ROOT = Path(__file__).parents[2]
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
QUICK = ["--timing-images", "12", "--rounds", "1", "--batch-size", "6", "--measure", "0.5", "--max-seconds", "1"]


@pytest.fixture(scope="module")
def checkpoint(tiny_scope, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_safetensors(tiny_scope, path, {"labels": LABELS, "model": "tiny test"})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A validation folder of the classes bee, dog and gnu: numbers 1, 3 and 6 of the model's, 0 to 2 by alphabet."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("bee", "dog", "gnu"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(6):
            pixels = (128 + rng.normal(size=(36, 36, 3)) * 10 * (i + 1)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run directory with its configuration."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = MambaScope(ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=2, num_classes=10))
    save_safetensors(model, run / "model.safetensors")
    (run / "config.yaml").write_text(
        "data:\n  class_path: mambascope.data.digits_datamodule.ScopeDigitsDataModule\n"
        "  init_args: {val_length: 30, digits: {size: 32}, batch_size: 8}\n"
    )
    return run


def run(capsys, *argv):
    status = eval_cli.main([*map(str, argv), *QUICK, "--no-figures"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_folder_with_the_model_class_numbers(checkpoint, data, tmp_path, capsys):
    status, out, err = run(capsys, checkpoint, "--data", data, "--out", tmp_path)
    assert status == 0, err
    assert "refine everything" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"], report["images"]) == ("tiny test", 18)
    assert {t["threshold"] for t in report["timings"]} >= {0.5, report["threshold"]}
    with (tmp_path / "timings.csv").open() as file:
        assert {row["batch_size"] for row in csv.DictReader(file)} == {"6", "1"}
    assert not (tmp_path / "tradeoff.png").exists()
    # labels are those of the model, not the alphabet's of this folder
    model = ready_model(checkpoint, device="cpu")
    from mambascope.data.open import validation_loader

    loader = validation_loader(model, checkpoint, str(data)).loader
    assert torch.cat([y for _, y in loader]).tolist() == [1] * 6 + [3] * 6 + [6] * 6
    # the class folders may also be given directly
    loader = validation_loader(model, checkpoint, str(data / "val"), batch_size=4).loader
    assert [len(y) for _, y in loader] == [4, 4, 4, 4, 2]


def test_targets_choose_a_threshold_and_store_it(checkpoint, data, tmp_path, capsys):
    model = load_model(checkpoint)
    budget = stage_macs(model.config).gflops(0.5)
    exported = tmp_path / "new" / "small.safetensors"
    options = ("--data", data, "--out", tmp_path, "--target-gflops", budget, "--export", exported)
    status, out, err = run(capsys, checkpoint, *options)
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"]["dynamic"]["gflops_one_direction"] <= budget * (1 + 1e-9)
    stored = load_model(exported)
    assert stored.threshold == report["threshold"]
    assert f"{report['threshold']:.4f}" in out
    assert stored.labels == LABELS
    assert stored.description["report"]["table"] == report["table"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored.state_dict()[name])
    for option, value in (("--target-acc-drop", 100), ("--target-ms", 1e6)):
        status, _, err = run(capsys, checkpoint, "--data", data, "--out", tmp_path / "b", option, value)
        assert status == 0, err
        assert (tmp_path / "b" / "model.safetensors").is_file()
    assert load_model(checkpoint).threshold == model.threshold  # the input is untouched


def test_engine_is_timed_in_the_same_run(checkpoint, data, tmp_path, capsys):
    status, out, err = run(capsys, checkpoint, "--data", data, "--out", tmp_path, "--engine", "--threshold", 0.9)
    assert status == 0, err
    assert "engine ms/image" in out
    with (tmp_path / "engine.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["batch_size"] for row in rows] == ["1", "8"]
    assert all(float(row["engine_ms"]) > 0 for row in rows)


def test_data_of_the_run_and_built_in_digits(digits_run, tmp_path, capsys):
    status, _, err = run(capsys, digits_run, "--out", tmp_path / "a")
    assert status == 0, err
    assert json.loads((tmp_path / "a" / "report.json").read_text())["images"] == 30
    status, _, err = run(
        capsys, digits_run / "model.safetensors", "--data", "scopedigits", "--length", 20, "--out", tmp_path / "b"
    )
    assert status == 0, err
    assert json.loads((tmp_path / "b" / "report.json").read_text())["images"] == 20


def test_one_stage_model(data, tmp_path, capsys):
    save_safetensors(
        VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3)),
        tmp_path / "v.safetensors",
    )
    status, out, err = run(capsys, tmp_path / "v.safetensors", "--data", data, "--out", tmp_path / "out")
    assert status == 0, err
    assert "top-1" in out
    status, _, err = run(capsys, tmp_path / "v.safetensors", "--data", data, "--target-ms", 1)
    assert (status, "one-stage" in err) == (2, True)


def test_mistakes_end_with_one_line(checkpoint, data, digits_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for i in range(8):
        (tmp_path / "many" / "val" / f"c{i}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "many" / "val" / f"c{i}" / "a.png")
    (tmp_path / "hollow" / "val" / "bee").mkdir(parents=True)
    (tmp_path / "broken" / "val" / "bee").mkdir(parents=True)
    (tmp_path / "broken" / "val" / "bee" / "junk.png").write_bytes(b"junk")
    (tmp_path / "file").write_text("x")
    cases = [
        ([checkpoint], "--data"),
        ([checkpoint, "--data", tmp_path / "nowhere"], "does not exist"),
        ([checkpoint, "--data", tmp_path / "empty"], "empty"),
        ([checkpoint, "--data", tmp_path / "hollow"], "no images"),
        ([checkpoint, "--data", tmp_path / "many"], "8 classes, the model has 7"),
        ([checkpoint, "--data", tmp_path / "broken"], "junk.png"),
        ([checkpoint, "--data", "scopedigits"], "10 classes"),
        ([tmp_path / "nothing.safetensors", "--data", data], "does not exist"),
        ([checkpoint, "--data", data, "--alpha", 2], "alpha"),
        ([checkpoint, "--data", data, "--batch-size", 0], "batch"),
        ([checkpoint, "--data", data, "--target-ms", "nan"], "target ms"),
        ([checkpoint, "--data", data, "--target-gflops", 1e-9, "--out", tmp_path / "o"], "cannot be met"),
        ([checkpoint, "--data", data, "--target-ms", 1, "--threshold", 0.5], "not both"),
        ([checkpoint, "--data", data, "--export", "model.bin"], ".safetensors"),
        ([checkpoint, "--data", data, "--out", tmp_path / "file" / "deep"], "file"),
    ]
    for argv, word in cases:
        status = eval_cli.main([*QUICK, *map(str, argv)])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith("evaluating on ")]
        assert status in (1, 2), argv
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert word in lines[0], err


def test_the_tool_itself(digits_run, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "eval_cls.py"), str(digits_run), "--out", str(tmp_path), *QUICK]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "saved by dynamic" in done.stdout
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "tradeoff.png").is_file()


def test_scopedigits_are_as_hard_as_those_of_the_training(tmp_path):
    """Shipped weights, and a run's, meet the digits that they were trained on; other weights the usual ones."""
    from mambascope.data.errors import DataError
    from mambascope.data.open import validation_loader
    from mambascope.data.scopedigits_config import ScopeDigitsConfig
    from mambascope.models.weights import SHIPPED

    model = load_model(SHIPPED["scopedigits"])
    for path, expected in (
        (SHIPPED["scopedigits"], (0.45, 0.85)),
        (tmp_path / "model.safetensors", ScopeDigitsConfig().easy_size),
    ):
        digits = validation_loader(model, path, "scopedigits", length=3).object_masks.__self__.digits
        assert tuple(digits.easy_size) == tuple(expected)
        assert digits.size == 64
    (tmp_path / "config.yaml").write_text("data: [")
    validation_loader(model, tmp_path / "model.safetensors", "scopedigits", length=3)
    (tmp_path / "config.yaml").write_text(
        "data: {class_path: mambascope.data.ScopeDigitsDataModule, init_args: {no_such_argument: 1}}"
    )
    with pytest.raises(DataError, match="no_such_argument"):  # not the usual digits without a word
        validation_loader(model, tmp_path / "model.safetensors", "scopedigits", length=3)
