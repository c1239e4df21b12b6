"""Average of the weights, checkpoint files, losses that are no numbers, logs."""

import csv
import errno
import os
import sys

import pytest
import torch
from lightning.pytorch import Callback

import mambascope
from mambascope.models.checkpoint import CheckpointError
from mambascope.training.args import RunArgs
from mambascope.training.checkpointing import NonFiniteLossError, RunCheckpoint
from mambascope.training.ema import EmaWeights
from mambascope.training.export import ExportWeights
from mambascope.training.io import AtomicCheckpointIO, read_training_checkpoint
from mambascope.training.loggers import ContinuingCSVLogger, make_loggers
from tests.training.test_module import data, module, trainer


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class Weights(Callback):
    """Notes the weights after each step and those that are validated."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append(weights(pl_module))


# ---- average ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
def test_average_follows_its_formula(tmp_path, warmup):
    seen, net = Weights(), module()
    trainer(tmp_path, EmaWeights(0.9, warmup), seen, max_epochs=1, limit_val_batches=1).fit(net, data(train=24))
    average = seen.steps[0]
    for n, current in enumerate(seen.steps[1:], 2):
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    for name, value in weights(net).items():
        torch.testing.assert_close(value, average[name], msg=name)
        torch.testing.assert_close(seen.validated[0][name], average[name], msg=name)
    assert not same(seen.steps[-1], weights(net))


def test_late_start_validates_and_saves_the_trained_weights(tmp_path):
    """Before its first update Lightning's average holds the initial weights."""
    seen, saved, net = Weights(), RunCheckpoint(), module()
    initial = weights(net)
    callbacks = EmaWeights(0.9, start_step=100), seen, saved
    trainer(tmp_path, *callbacks, max_epochs=1, limit_val_batches=1, enable_checkpointing=True).fit(net, data(train=8))
    assert same(seen.validated[0], seen.steps[-1])
    assert not same(seen.validated[0], initial)
    content = read_training_checkpoint(saved.last_path)
    assert same(seen.steps[-1], content["state_dict"])
    assert same(seen.steps[-1], weights(net))


def test_trained_weights_return_when_a_validation_breaks_off(tmp_path):
    class Break(Callback):
        def on_validation_batch_start(self, *args):
            raise KeyError("broken")

    seen, net = Weights(), module()
    with pytest.raises(KeyError, match="broken"):
        trainer(tmp_path, EmaWeights(0.9), seen, Break()).fit(net, data(train=12))
    assert same(seen.steps[-1], weights(net))
    assert not same(seen.validated[0], weights(net))


# ---- files ------------------------------------------------------------------------------------------------------


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    files, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    content = {"loops": {}, "optimizer_states": [], "state_dict": {"a": torch.ones(3)}}
    files.save_checkpoint(content, path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"last\.ckpt could not be written: .*No space left"):
        files.save_checkpoint({**content, "state_dict": {"a": torch.zeros(3)}}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.equal(files.load_checkpoint(path)["state_dict"]["a"], torch.ones(3))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_checkpoints_run_no_code(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "loops": {}, "optimizer_states": Evil(tmp_path / "trace")}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt cannot be read"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        ({"state_dict": {}}, r"holds no training state to resume from \(loops, optimizer_states missing\)"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "some.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_training_checkpoint(path)


def test_best_is_kept_and_stale_files_go(tmp_path):
    scores = [0.2, 0.7, 0.5]

    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", torch.tensor(scores[trainer.current_epoch]))

    saved = RunCheckpoint(monitor="score")
    saved.dirpath = tmp_path / "c"
    saved.dirpath.mkdir()
    (saved.dirpath / ".last.ckpt.x7").write_bytes(b"half")
    trainer(tmp_path, Score(), saved, max_epochs=3, enable_checkpointing=True).fit(module(), data(train=8))
    assert sorted(p.name for p in saved.dirpath.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert read_training_checkpoint(saved.dirpath / "best.ckpt")["global_step"] == 4
    assert read_training_checkpoint(saved.last_path, mmap=True)["global_step"] == 6
    assert (saved.best_score, saved.best_step) == (pytest.approx(0.7), 4)
    assert saved.best_model_path.endswith("best.ckpt")


def test_saves_by_the_clock(tmp_path):
    saved = RunCheckpoint(every_minutes=1e-9)
    steps = []
    save = saved._save
    saved._save = lambda fit, net: steps.append(fit.global_step) or save(fit, net)
    options = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer(tmp_path, saved, **options).fit(module(), data(train=20))
    assert steps == [1, 2, 3, 4, 5]


def test_a_checkpoint_describes_its_model(tmp_path):
    saved, net = RunCheckpoint(), module({"threshold": 0.6}, full_refine_epochs=9)
    trainer(tmp_path, saved, max_epochs=1, enable_checkpointing=True).fit(net, data(train=8))
    model = mambascope.load_model(saved.last_path)
    assert (model.alpha, model.threshold, model.config.depth) == (0.5, 0.6, 2)
    assert same(weights(net.model), weights(model))


def test_export_holds_the_average(tmp_path):
    net, path = module(full_refine_epochs=9), tmp_path / "m.safetensors"
    seen = Weights()
    trainer(tmp_path, EmaWeights(0.9), seen, ExportWeights(path), max_epochs=1, limit_val_batches=1).fit(
        net, data(train=8)
    )
    model = mambascope.load_model(path)
    assert model.alpha == 0.5
    assert model.description["steps"] == 2
    average = {name.removeprefix("model."): value for name, value in seen.validated[0].items()}
    assert same(average, weights(model))


# ---- numbers that are none --------------------------------------------------------------------------------------


class Poison(Callback):
    """Spoils the images of one step, or the weights after it."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "images" and trainer.global_step + 1 == self.step:
            batch[0].fill_(float("inf"))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.what == "weights" and trainer.global_step == self.step:
            next(pl_module.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("what", "message", "kept"),
    [("images", "the loss is not finite at step 5", 4), ("weights", "a weight is not finite at step 6", 4)],
)
def test_bad_numbers_stop_the_run_and_are_not_saved(tmp_path, what, message, kept):
    saved = RunCheckpoint(every_steps=2)
    poison = Poison(5 if what == "images" else 6, what)
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        trainer(tmp_path, poison, saved, enable_checkpointing=True).fit(module(), data())
    assert str(saved.last_path) in str(caught.value)
    content = read_training_checkpoint(saved.last_path)
    assert content["global_step"] == kept
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


# ---- logs -------------------------------------------------------------------------------------------------------


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_resumed_log_continues_at_its_checkpoint(tmp_path):
    logger = ContinuingCSVLogger(str(tmp_path))
    for step in range(5):
        logger.log_metrics({"a": step}, step)
    logger.save()
    path = tmp_path / "logs" / "metrics.csv"
    assert [row["step"] for row in rows(path)] == ["0", "1", "2", "3", "4"]
    resumed = ContinuingCSVLogger(str(tmp_path), resume_step=3)
    resumed.log_metrics({"a": 30}, 3)
    resumed.log_metrics({"b": 7}, 4)
    resumed.save()
    assert [(row["step"], row["a"], row["b"]) for row in rows(path)] == [
        ("0", "0", ""),
        ("1", "1", ""),
        ("2", "2", ""),
        ("3", "30", ""),
        ("4", "", "7"),
    ]


def test_loggers_by_name(tmp_path, monkeypatch):
    names = [type(x).__name__ for x in make_loggers(RunArgs(loggers=["tensorboard", "csv"]), tmp_path)]
    assert names == ["ContinuingCSVLogger", "TensorBoardLogger"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"'wandb', which is not installed: pip install 'mambascope\[wandb\]'"):
        make_loggers(RunArgs(loggers=["wandb"]), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmaWeights(1.0), r"ema.decay must lie in \[0, 1\)"),
        (lambda: EmaWeights(0.9, start_step=-1), "ema.start_step must be >= 0"),
        (lambda: RunCheckpoint(every_minutes=-1), "checkpoint.every_minutes must be >= 0"),
        (lambda: RunCheckpoint(every_steps=0), "checkpoint.every_steps must be at least 1"),
        (lambda: RunCheckpoint(mode="best"), "checkpoint.mode must be 'max' or 'min'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
