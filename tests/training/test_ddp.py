"""Two processes on the CPU (gloo), through the real command, beside the same in one process."""

import contextlib
import os

import pytest
import torch

from mambascope.commands.train import main
from tests.eye import test_training as test_eye
from tests.training.helpers import tiny, train
from tests.training.test_resume import SIGTERM, checkpoint

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
# what two processes with half the batch do is what one does with the whole: no random draws of their own
PLAIN = {
    "model__mix__mixup": 0,
    "model__mix__cutmix": 0,
    "model__net__args__drop_path_rate": 0,
    "trainer__max_epochs": 2,
    "data__val_length": 23,  # the processes get different numbers of images, and each image counts once
}


def metrics(run):
    text = (run / "logs" / "metrics.csv").read_text().splitlines()
    names = text[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
    return [{n: float(v) for n, v in row.items() if n.startswith("val/") and v} for row in rows if row["val/fine_top1"]]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    with contextlib.chdir(folder):
        assert main([*tiny(**PLAIN, data__batch_size=8, run__name="single"), "--trainer.accelerator=cpu"]) == 0
    os.environ.pop("PL_GLOBAL_SEED", None)
    return folder / "runs" / "single"


def test_two_processes_equal_one(single, tmp_path):
    done = train(*tiny(**PLAIN, data__batch_size=4, run__name="two"), *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unused parameters" not in done.stderr  # every parameter has a gradient, no search is needed
    run = tmp_path / "runs" / "two"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    one, two = checkpoint(single), checkpoint(run)
    assert one["global_step"] == two["global_step"] == 12
    for name, value in one["current_model_state"].items():
        torch.testing.assert_close(two["current_model_state"][name], value, atol=2e-4, rtol=1e-3, msg=name)
    for expected, measured in zip(metrics(single), metrics(run), strict=True):
        assert measured == pytest.approx(expected, abs=1e-3)


def test_signal_to_one_process_stops_both_and_resumes(single, tmp_path):
    # the callback signals the first process only
    callback = ["--trainer.callbacks+=tests.training.helpers.SignalAt", "--trainer.callbacks.step=5"]
    callback += ["--checkpoint.sync_steps=1"]
    done = train(*tiny(**PLAIN, data__batch_size=4, run__name="two"), *TWO, *callback, cwd=tmp_path)
    assert done.returncode == 128 + SIGTERM, done.stderr
    assert done.stderr.count("resume with:") == 1
    run = tmp_path / "runs" / "two"
    assert checkpoint(run)["global_step"] == 5
    done = train("--ckpt_path=last", "--trainer.callbacks=null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = checkpoint(single), checkpoint(run)
    for name, value in one["current_model_state"].items():
        torch.testing.assert_close(two["current_model_state"][name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_alpha_0_and_a_single_validation_image(tmp_path, monkeypatch):
    """Steps that leave the fine stage's parameters out, after some that did not, and a process without an image."""
    monkeypatch.chdir(tmp_path)
    options = {**PLAIN, "model__net__args__alpha": 0, "data__train_length": 16, "data__val_length": 1}
    done = train(*tiny(**options, data__batch_size=4, run__name="two"), *TWO, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "compute" not in done.stderr
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert main([*tiny(**options, data__batch_size=8, run__name="one"), "--trainer.accelerator=cpu"]) == 0
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    one, two = (checkpoint(run)["current_model_state"] for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-3, msg=name)
    for expected, measured in zip(*map(metrics, runs), strict=True):
        assert measured == pytest.approx(expected, abs=1e-3)


def test_mambaeye_with_a_single_validation_image(tmp_path):
    args = test_eye.tiny(data__val_length=1, data__train_length=16, trainer__max_epochs=1)
    done = train(*args, *TWO, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "val: top-1" in done.stdout
    assert "Traceback" not in done.stderr
