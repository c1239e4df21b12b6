"""Callbacks that the tests put into the real command, and the smallest run it can do."""

import os
import subprocess
import sys
from pathlib import Path

from lightning.pytorch import Callback

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_cls.py"

# 12 steps per epoch; drop path, mixing, clipping, averaging and both phases take part
TINY = {
    "data.train_length": 48,
    "data.val_length": 24,
    "data.calibration_length": 16,
    "data.batch_size": 4,
    "data.val_batch_size": 8,
    "data.digits.size": 32,
    "model.net.args.embed_dim": 16,
    "model.net.args.depth": 2,
    "model.net.args.d_state": 4,
    "model.net.args.drop_path_rate": 0.2,
    "model.mix.mixup": 0.8,
    "model.mix.cutmix": 1.0,
    "model.full_refine_epochs": 1,
    "model.schedule.warmup_epochs": 0.5,
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 1,
    "checkpoint.every_steps": 5,
    "run.report": "false",
}


class SignalAt(Callback):
    """Sends this process a signal, as the outside would at the worst moment.

    Args:
        signum: The signal.
        step: After this optimizer step, or
        val_epoch: In the second batch of the validation of this epoch.
        rank: Only in this process.
    """

    def __init__(self, signum: int = 15, step: int | None = None, val_epoch: int | None = None, rank: int = 0) -> None:
        self.signum, self.step, self.val_epoch, self.rank = signum, step, val_epoch, rank

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == self.val_epoch and batch_idx == 1:
            os.kill(os.getpid(), self.signum)


def tiny(**changes):
    """Command-line options of the smallest run; ``a__b=c`` changes ``a.b``."""
    options = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"--{key}={value}" for key, value in options.items()]


def train(*args, cwd, timeout=240, env=None, before=(), **options):
    """Runs the real command, with these words before it."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(env or {}),
    }
    return subprocess.run(
        [*before, sys.executable, str(TOOL), *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
