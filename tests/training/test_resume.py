"""A run that is stopped and resumed ends as the one that was not, to the last bit.

The uninterrupted run, what is killed, and one of those that go on are the real command in processes of their own; the
others run it in this one.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training.helpers import tiny, train

SIGKILL, SIGTERM, SIGINT = 9, 15, 2


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def differences(a, b, path=""):
    """Places where two nested structures are not equal to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    cwd = tmp_path_factory.mktemp("whole")
    done = train(*tiny(run__name="whole"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "whole"


def test_the_comparison_can_fail(whole, tmp_path, train_here):
    """Another seed gives other weights, and training moved them."""
    done = train_here(*tiny(run__name="other", seed_everything=1, trainer__max_epochs=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, other = checkpoint(whole), checkpoint(tmp_path / "runs" / "other")
    assert differences(first["current_model_state"], other["current_model_state"])
    assert differences(first["current_model_state"], first["state_dict"])  # the average is another set of weights
    best = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] <= first["global_step"] == 36


@pytest.mark.parametrize(
    ("signum", "moment", "stopped_at", "in_process"),
    [
        (SIGKILL, {"step": 17}, 15, False),  # in the middle of an epoch, two steps after its last save
        (SIGKILL, {"step": 13}, 12, True),  # just after the end of an epoch
        (SIGTERM, {"step": 17}, 17, True),
        (SIGINT, {"val_epoch": 1}, 24, True),  # in the middle of a validation, which is then repeated
    ],
)
def test_stopped_and_resumed(whole, tmp_path, train_here, signum, moment, stopped_at, in_process):
    run = tmp_path / "runs" / "stopped"
    callback = ["--trainer.callbacks+=tests.training.helpers.SignalAt", f"--trainer.callbacks.signum={signum}"]
    callback += [f"--trainer.callbacks.{key}={value}" for key, value in moment.items()]
    start = train if signum == SIGKILL else train_here
    stopped = start(*tiny(run__name="stopped"), *callback, cwd=tmp_path)
    assert stopped.returncode == (-SIGKILL if signum == SIGKILL else 128 + signum), stopped.stderr
    assert checkpoint(run)["global_step"] == stopped_at
    assert not (run / "model.safetensors").exists()
    if signum != SIGKILL:
        assert f"after step {stopped_at}" in stopped.stderr
        assert "--ckpt_path runs/stopped/checkpoints/last.ckpt" in stopped.stderr
        assert "Traceback" not in stopped.stderr

    # no config is named: the run's own is used
    resume = train_here if in_process else train
    resumed = resume("--ckpt_path=last", "--trainer.callbacks=null", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from runs/stopped" in resumed.stdout
    expected, resumed_state = checkpoint(whole), checkpoint(run)
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "loops"):
        assert differences(expected[part], resumed_state[part]) == [], part
    assert differences(load_file(whole / "model.safetensors"), load_file(run / "model.safetensors")) == []
    log = "logs/metrics.csv"
    assert (run / log).read_text() == (whole / log).read_text()


def test_resuming_a_finished_run_exports_the_average(whole, tmp_path, train_here):
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    (run / "model.safetensors").unlink()
    done = train_here("--ckpt_path=last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert differences(load_file(whole / "model.safetensors"), load_file(run / "model.safetensors")) == []


def test_going_on_from_the_best_starts_a_run_of_its_own(whole, tmp_path, train_here):
    """An older state must not overwrite the newer one."""
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    done = train_here("--ckpt_path=best", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert checkpoint(tmp_path / "runs" / "whole-2")["global_step"] == 36


def test_going_on_without_the_average_trains_the_trained_weights(whole, tmp_path, train_here):
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run)
    done = train_here("--ckpt_path=last", "--ema.decay=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = {name.removeprefix("model."): t for name, t in checkpoint(whole)["current_model_state"].items()}
    exported = load_file(run / "model.safetensors")
    assert exported
    assert all(torch.equal(tensor, trained[name]) for name, tensor in exported.items())
