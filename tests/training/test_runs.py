"""Who a run directory belongs to, and what a run that did not come to a checkpoint leaves of it."""

import multiprocessing
import os
import pty
import select
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from PIL import Image

from mambascope.commands.train import TrainCLI, complete_args, main
from mambascope.training.runs import hold_run, leave_runs, new_run
from mambascope.training.trainings import finish_training
from mambascope.utils import CommandError
from tests.training.helpers import ROOT, TOOL, tiny, train
from tests.training.test_resume import checkpoint

FORK = multiprocessing.get_context("fork")  # for what holds files only: OpenMP would wait for threads that are gone
SHORT = {"trainer__accelerator": "cpu", "trainer__max_epochs": 1, "data__train_length": 16, "data__val_length": 8}


class Fail(Callback):
    """Raises something that nobody expects, at a moment and step of the training."""

    def __init__(self, where: str, kind: str = "KeyError", step: int = 0) -> None:
        self.where, self.kind, self.step = where, kind, step

    def _fail(self, where, step=0):
        if where == self.where and step >= self.step:
            raise {"KeyError": KeyError, "KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}[self.kind](
                where
            )

    def setup(self, trainer, pl_module, stage):
        self._fail("setup")

    def on_train_start(self, trainer, pl_module):
        self._fail("start")

    def on_train_batch_end(self, trainer, *args):
        self._fail("step", trainer.global_step)


@pytest.fixture
def folder(tmp_path):
    """An ImageNet-like folder of two classes."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 30), (60 * i, 20, 30)).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def on_images(root, **changes):
    options = [o for o in tiny(**{**SHORT, **changes}) if not o.startswith("--data.")]
    data = ["--data=ImageDataModule", f"--data.root={root}", "--data.img_size=32", "--data.batch_size=2"]
    return ["--config=scopedigits", *data, "--data.num_workers=0", *options]


def ends(args):
    """How the command ends."""
    try:
        return main(args)
    except SystemExit as ended:
        return ended.code
    except BaseException as error:
        return type(error).__name__


def failing(where, kind="KeyError", step=0):
    options = {"where": where, "kind": kind, "step": step}
    return [f"--trainer.callbacks+={__name__}.Fail", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


# ---- half-started runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (failing("setup"), "KeyError"),
        (failing("start", "MemoryError"), "MemoryError"),
        (failing("step", step=2), "KeyError"),  # after steps, before the first checkpoint
        (failing("start", "KeyboardInterrupt"), 130),
        (["--trainer.strategy=ddpp"], 2),
        (["--trainer.precision=7"], 2),
        (["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=2"], 1),
        (["--trainer.fast_dev_run=2"], 0),
        (["--run.loggers=[wandb]"], 2),
    ],
)
def test_without_a_checkpoint_nothing_is_left(extra, status, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert ends([*tiny(**SHORT, run__name="mine", checkpoint__every_steps=100), *extra]) == status
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_after_a_checkpoint_everything_is_left(here):
    assert ends([*tiny(**SHORT, run__name="mine", checkpoint__every_steps=1), *failing("step", step=2)]) == "KeyError"
    assert checkpoint(Path("runs/mine"))["global_step"] == 1  # the step in which it failed is not done
    assert Path("runs/mine/logs/metrics.csv").is_file()


def test_nothing_to_train_is_said(here, capsys):
    for option in ("limit_train_batches=0", "max_epochs=0"):
        assert main([*tiny(**SHORT), f"--trainer.{option}"]) == 0
        out = capsys.readouterr().out
        assert "nothing was trained: " in out
        assert f"trainer.{option}" in out


def test_fast_dev_run_of_a_run_leaves_it_as_it_is(here):
    assert main(tiny(**SHORT, run__name="mine")) == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert main(["--ckpt_path=last", "--trainer.fast_dev_run=1", "--trainer.max_epochs=5"]) == 0
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_killed_start_leaves_its_name_free(here):
    """Nothing can be done about SIGKILL: the next run of that name takes the folder over."""
    callback = ["--trainer.callbacks+=tests.training.helpers.SignalAt", "--trainer.callbacks.signum=9"]
    args = tiny(**SHORT, run__name="mine", checkpoint__every_steps="null")
    killed = train(*args, *callback, "--trainer.callbacks.step=2", cwd=here)  # a fork of this process must not compute
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert Path("runs/mine/config.yaml").is_file()
    Path("runs/mine/notes.txt").write_text("mine")
    assert main(args) == 2, "not where somebody put something of his own"
    Path("runs/mine/notes.txt").unlink()
    assert main(args) == 0
    assert Path("runs/mine/logs/metrics.csv").read_text().count("\n") == 6  # header, 4 steps, 1 validation
    assert main(args) == 2, "now there is a run"


def test_a_config_by_hand_is_nobodys_leftover(here):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text("trainer:\n  max_epochs: 1\n")
    assert new_run("runs", None, ["runs/mine/config.yaml"]).name == "mine-2"
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("leftovers", ["samples.txt", "logs/checkpoints/epoch=0-step=2.ckpt", "model.safetensors"])
def test_what_a_failed_run_holds_besides_is_left(leftovers, here):
    run = new_run("runs", "mine", [])
    (run / "logs").mkdir()
    kept = run / leftovers
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("made by a callback")
    leave_runs()
    assert kept.is_file()
    with pytest.raises(ValueError, match="holds no checkpoint to continue from"):
        new_run("runs", "mine", [])
    assert kept.is_file()


def test_links_are_followed_but_not_emptied(here):
    (here / "runs").mkdir()
    (here / "disk" / "logs").mkdir(parents=True)
    (here / "disk" / "logs" / "old.csv").write_text("1")
    (here / "runs" / "mine").symlink_to(here / "elsewhere")
    run = new_run("runs", "mine", [])
    (run / "logs").symlink_to(here / "disk" / "logs")
    leave_runs()
    assert not (here / "elsewhere").exists()
    assert (here / "disk" / "logs" / "old.csv").is_file()
    assert new_run("runs", "mine", []) == run


def _remove(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda split: split.rename(split.with_name("elsewhere")),
        lambda split: _remove(split / "bee"),
        lambda split: [_remove(split / name) for name in ("ant", "bee")],
    ],
)
def test_the_same_mistake_in_either_split_ends_alike(spoil, here, folder, capsys):
    spoil(folder / "val")
    assert ends(on_images(folder)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert not Path("runs").exists()


# ---- one process, one directory -----------------------------------------------------------------------------------


def test_threads_of_one_instant_get_directories_of_their_own(here):
    count = 16
    together = threading.Barrier(count)

    def start(_):
        together.wait()
        return new_run("runs", None, ["scopedigits.yaml"])

    with ThreadPoolExecutor(count) as pool:
        paths = list(pool.map(start, range(count)))
    assert len(set(paths)) == count


def _start(together, paths, done):
    together.wait()
    paths.put(str(new_run("runs", None, ["scopedigits.yaml"])))
    done.wait()  # a directory is held as long as its process lives


def test_processes_of_one_instant_get_directories_of_their_own(here):
    for number in range(4):  # empty ones, which are there for whoever comes first
        (here / "runs" / ("scopedigits" if number == 0 else f"scopedigits-{number + 1}")).mkdir(parents=True)
    together, paths, done = FORK.Barrier(8), FORK.Queue(), FORK.Event()
    started = [FORK.Process(target=_start, args=(together, paths, done)) for _ in range(8)]
    for process in started:
        process.start()
    folders = [paths.get(timeout=60) for _ in started]
    done.set()
    for process in started:
        process.join()
    assert len(set(folders)) == 8


def _hold(path, held, done):
    held.put(hold_run(path))
    done.wait()


def test_a_run_is_not_resumed_by_two_processes(here, capsys):
    args = [*tiny(**SHORT, run__name="mine"), "--ckpt_path=auto"]
    assert main(args) == 0
    held, done = FORK.Queue(), FORK.Event()
    other = FORK.Process(target=_hold, args=(Path("runs/mine"), held, done))
    other.start()
    assert held.get(timeout=60)
    for resume in (args, ["--ckpt_path=last"]):
        assert main(resume) == 2
        assert "run runs/mine is being trained by another process" in capsys.readouterr().err
    done.set()
    other.join()
    assert main(args) == 0


def test_a_comparison_leaves_the_start_of_another_alone(here):
    run = new_run("runs", "mine", [])
    (run / "config.yaml").write_text("trainer:\n")
    with pytest.raises(CommandError, match=r"training in runs/mine: run runs/mine is being trained by another process"):
        finish_training(run, tiny(**SHORT))
    assert (run / "config.yaml").is_file()


def _outlive(path, name):
    """What becomes of a run whose process is killed while a worker of its loader lives on."""
    new_run(str(path.parent), name, [])
    worker = FORK.Process(target=time.sleep, args=(30,))
    worker.start()
    (path.parent / "worker").write_text(str(worker.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_outlive_a_killed_training_do_not_hold_its_run(here):
    run = here / "runs" / "mine"
    process = FORK.Process(target=_outlive, args=(run, "mine"))
    process.start()
    process.join()
    worker = int((here / "runs" / "worker").read_text())
    try:
        assert hold_run(run)
    finally:
        os.kill(worker, signal.SIGKILL)


# ---- the same command line at the start and after a requeue -------------------------------------------------------


def test_auto_starts_then_resumes(here, capsys):
    args = [*tiny(**SHORT), "--ckpt_path=auto"]
    assert main([*tiny(**SHORT, run__name="newer")]) == 0
    assert main(args) == 0
    assert "run directory runs/scopedigits\n" in capsys.readouterr().out
    assert main([*args, "--trainer.max_epochs=2"]) == 0
    assert "resumed from runs/scopedigits/checkpoints/last.ckpt" in capsys.readouterr().out
    assert checkpoint(Path("runs/scopedigits"))["global_step"] == 8
    assert main([*args, "--run.name=other"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["newer", "other", "scopedigits"]


def test_auto_finetunes_only_at_the_start(here):
    weights = "runs/start/model.safetensors"
    assert main(tiny(**SHORT, run__name="start")) == 0
    args = [*tiny(**SHORT, run__name="tuned"), "--ckpt_path=auto", f"--model.net.checkpoint={weights}"]
    assert TrainCLI(complete_args(args)).config.model.net.checkpoint == weights
    leave_runs()
    assert main(args) == 0
    assert TrainCLI(complete_args(args)).config.model.net.checkpoint is None


_SLURM = {"SLURM_JOB_ID": "4321", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1"}


@pytest.mark.parametrize(
    "job",
    [
        {"SLURM_NTASKS": "4"},
        {**_SLURM, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},  # a batch script without srun
        {**_SLURM, "SLURM_STEP_ID": "0"},  # srun
    ],
)
def test_slurm_jobs_train_stop_and_requeue(job, here, monkeypatch, capsys):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    args = [*tiny(**SHORT, run__name="job"), "--ckpt_path=auto"]
    callback = [
        "--trainer.callbacks+=tests.training.helpers.SignalAt",
        f"--trainer.callbacks.signum={int(signal.SIGUSR1)}",
    ]
    assert main([*args, *callback, "--trainer.callbacks.step=2"]) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 after step 2; state saved in" in capsys.readouterr().err
    assert [path.name for path in Path("runs").rglob("*.ckpt")] == ["last.ckpt"]
    assert main(args) == 0
    assert checkpoint(Path("runs/job"))["global_step"] == 4
    assert not list(Path("runs").rglob("hpc*"))


def test_srun_with_tasks_that_lightning_does_not_support(here, monkeypatch, capsys):
    for name, value in {**_SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(tiny(**SHORT)) == 2
    assert "--ntasks-per-node=4" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_lost_connection_is_saved(here):
    """SIGHUP comes when the terminal is gone, to which nothing can be written any more."""
    changes = {**SHORT, "run__name": "mine", "trainer__max_epochs": 10_000, "trainer__limit_val_batches": 0}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        os.execve(sys.executable, [sys.executable, str(TOOL), *tiny(**changes)], environment)
    seen = b""
    while not Path("runs/mine/checkpoints/last.ckpt").exists():
        seen += os.read(terminal, 1000) if select.select([terminal], [], [], 0.05)[0] else b""
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, seen
    files = [path.name for path in Path("runs/mine/checkpoints").iterdir()]
    assert files == ["last.ckpt"]
