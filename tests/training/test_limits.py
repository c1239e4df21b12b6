"""A training that a limit or a signal ends goes on exactly, and says how."""

import contextlib
import io
import os
import signal
import tarfile
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from PIL import Image

import mambascope
from mambascope.commands.train import main
from tests.eye import test_training as test_eye
from tests.training.helpers import tiny
from tests.training.test_resume import checkpoint, differences

EXACT = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
ALONE = {"trainer__accelerator": "cpu", "trainer__max_epochs": 2, "data__train_length": 32, "data__val_length": 8}
EIGHT = {**ALONE, "checkpoint__every_steps": "null"}  # steps per epoch


class StopAt(Callback):
    """Asks the trainer to stop after a batch, counted over all epochs, as early stopping and the clock do."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 >= self.batch:
            trainer.should_stop = True


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("limits")):
        yield
    os.environ.pop("PL_GLOBAL_SEED", None)


_uninterrupted: dict[tuple, Path] = {}


def whole(**options):
    """The uninterrupted run of these options, which is trained once."""
    key = tuple(sorted(options.items()))
    if key not in _uninterrupted:
        name = f"whole{len(_uninterrupted)}"
        assert main(tiny(**EIGHT, **options, run__name=name)) == 0
        _uninterrupted[key] = Path("runs") / name
    return checkpoint(_uninterrupted[key])


def same(name, expected, parts=EXACT):
    state = checkpoint(Path("runs") / name)
    assert state["global_step"] == expected["global_step"]
    for part in parts:
        assert differences(expected[part], state[part]) == [], part


def stop_at(batch):
    return [f"--trainer.callbacks+={__name__}.StopAt", f"--trainer.callbacks.batch={batch}"], "--trainer.callbacks=null"


@pytest.mark.parametrize(("steps", "then"), [(5, -1), (8, 16), (9, 16)])
def test_max_steps_resumes_exactly(steps, then, capsys):
    expected, name = whole(), f"steps{steps}{then}"
    assert main([*tiny(**EIGHT, run__name=name), f"--trainer.max_steps={steps}"]) == 0
    out = capsys.readouterr().out
    assert f"ends the training at step {steps} of 16, which the learning rate follows" in out
    last = f"runs/{name}/checkpoints/last.ckpt"
    assert (
        f"ended by trainer.max_steps={steps} after step {steps} of 16; to go on: --ckpt_path {last} with a larger"
        in out
    )
    assert mambascope.load(f"runs/{name}/model.safetensors").description["epochs"] == steps // 8
    assert main([f"--ckpt_path={last}"]) == 0
    out = capsys.readouterr().out
    assert f"nothing is left to train: step {steps} has reached trainer.max_steps={steps}; to go on: " in out
    assert main([f"--ckpt_path={last}", f"--trainer.max_steps={then}"]) == 0
    assert "ended by" not in capsys.readouterr().out
    same(name, expected, (*EXACT, "loops"))


def test_max_time_resumes_exactly(capsys):
    expected = whole()
    # nothing is as short as the first step
    assert main([*tiny(**EIGHT, run__name="time"), "--trainer.max_time={milliseconds: 1}"]) == 0
    out = capsys.readouterr().out
    assert "ended by trainer.max_time after step 1 of 16; to go on: " in out
    assert main(["--ckpt_path=last", "--run.name=time"]) == 0
    assert "nothing is left to train: step 1 has reached trainer.max_time" in capsys.readouterr().out
    assert main(["--ckpt_path=last", "--run.name=time", "--trainer.max_time=null"]) == 0
    assert capsys.readouterr().err == ""
    same("time", expected, (*EXACT, "loops"))


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"trainer__accumulate_grad_batches": 3}, 4),  # in the middle of a step: the stop waits for its end
        ({"trainer__val_check_interval": 4}, 4),  # where a validation is due
        ({"trainer__val_check_interval": 4}, 5),
        ({"trainer__limit_train_batches": 5}, 7),
        ({"trainer__limit_val_batches": 0}, 8),
    ],
)
def test_a_stop_resumes_exactly(options, batch):
    expected, name = whole(**options), f"stop{batch}{len(_uninterrupted)}"
    stop, undo = stop_at(batch)
    assert main([*tiny(**EIGHT, **options, run__name=name), *stop]) == 0
    assert checkpoint(Path("runs") / name)["global_step"] < expected["global_step"]
    assert main(["--ckpt_path=last", f"--run.name={name}", undo]) == 0
    same(name, expected)


def test_early_stopping_says_so(capsys):
    early = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=val/fine_loss",
    ]
    early += [
        "--trainer.callbacks.mode=min",
        "--trainer.callbacks.stopping_threshold=9",
        "--trainer.val_check_interval=4",
    ]
    assert main([*tiny(**EIGHT, run__name="early"), *early]) == 0
    assert "ended by EarlyStopping (val/fine_loss) after step 4 of 16; to go on" in capsys.readouterr().out
    assert main(["--ckpt_path=last", "--run.name=early", "--trainer.callbacks=null"]) == 0
    same("early", whole(trainer__val_check_interval=4))


def test_more_epochs_afterwards_are_those_of_a_longer_run():
    constant = {"model__schedule__name": "constant"}
    expected = whole(**constant)
    assert main([*tiny(**EIGHT, **constant, run__name="epochs"), "--trainer.max_epochs=1"]) == 0
    assert main(["--ckpt_path=last", "--run.name=epochs", "--trainer.max_epochs=2"]) == 0
    same("epochs", expected)


def test_mambaeye_resumes_exactly():
    assert main(test_eye.tiny(run__name="eye")) == 0
    assert main([*test_eye.tiny(run__name="eye2"), "--trainer.max_steps=3"]) == 0
    assert main(["--ckpt_path=last", "--run.name=eye2", "--trainer.max_steps=-1"]) == 0
    same("eye2", checkpoint(Path("runs/eye")), (*EXACT, "loops"))


def test_streams_resume_exactly():
    pytest.importorskip("webdataset")
    folder = Path("stream").absolute()
    folder.mkdir(exist_ok=True)
    for shard in range(4):
        with tarfile.open(folder / f"all-{shard:02}.tar", "w") as tar:
            for number in range(6):
                picture = io.BytesIO()
                Image.new("RGB", (40, 30), (60 * shard, 40 * number, 20)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{shard:02}{number:02}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    options = [option for option in tiny(**EIGHT) if not option.startswith("--data.")]
    data = {"root": folder, "dataset": "wds/all", "train_split": "all-{00..03}.tar|24", "val_split": "all-00.tar|6"}
    data |= {"num_classes": 2, "img_size": 32, "batch_size": 4, "num_workers": 2}
    args = ["--config=scopedigits", "--data=ImageDataModule", *(f"--data.{k}={v}" for k, v in data.items()), *options]
    assert main([*args, "--run.name=whole stream"]) == 0
    assert main([*args, "--run.name=stream", "--trainer.max_steps=9"]) == 0
    assert main([*args, "--run.name=stream", "--ckpt_path=auto"]) == 0
    same("stream", checkpoint(Path("runs/whole stream")), (*EXACT, "loops"))


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_of_clusters_are_saved_exactly(signum, capsys):
    name = f"signal{signum}"
    callback = ["--trainer.callbacks+=tests.training.helpers.SignalAt", f"--trainer.callbacks.signum={int(signum)}"]
    assert main([*tiny(**EIGHT, run__name=name), *callback, "--trainer.callbacks.step=5"]) == 128 + signum
    assert f"stopped by {signum.name} after step 5; state saved in" in capsys.readouterr().err
    assert main(["--ckpt_path=last", f"--run.name={name}", "--trainer.callbacks=null"]) == 0
    same(name, whole(), (*EXACT, "loops"))
