"""Trainings that a command starts, in a process of their own each: begun ones are resumed, finished ones used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mambascope.evaluation.inference import CommandError
from mambascope.models.weights import WEIGHTS


def finished(folder: Path) -> Path | None:
    """Weights of a training that has ended, else ``None``."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() else None


def finish_training(folder: Path, options: Sequence[str]) -> Path:
    """Weights of the training in a run directory, after training whatever is left of it.

    Ctrl-C lets it save its state first, a second one does not. It also saves and stops when this process ends.

    Args:
        folder: The run directory.
        options: Of ``tools/train_cls.py`` for a new run, without the run's name and root.

    Raises:
        CommandError: If the training failed; with its message.
        KeyboardInterrupt: If it was interrupted.
    """
    if (weights := finished(folder)) is not None:
        return weights
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        options = ["--ckpt_path", str(last)]
    else:
        if (folder / "config.yaml").is_file():
            shutil.rmtree(folder)  # it was killed before it had anything to save
        options = [*options, "--run.root", str(folder.parent), "--run.name", folder.name]
    status, message = _run(options)
    if status or finished(folder) is None:
        reason = message or f"it ended with status {status}; run again to go on"
        raise CommandError(f"training in {folder}: {reason}")
    return folder / WEIGHTS


def _run(options: Sequence[str]) -> tuple[int, str]:
    """Status of the training command, and the error that it ended with; ``KeyboardInterrupt`` once it has stopped."""
    command = [sys.executable, "-m", "mambascope.training", *options]
    # a group of its own: a terminal's Ctrl-C reaches this process only, which passes every one of them on once
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,
        env={**os.environ, "MAMBASCOPE_STOP_WITH_PARENT": "1"},
    )
    assert process.stderr is not None
    message, interrupted = "", False
    with process:
        while True:
            try:
                for line in process.stderr:
                    if line.startswith("error: "):
                        message = line.removeprefix("error: ").strip()
                    elif interrupted and line.startswith("Traceback "):
                        process.stderr.read()  # stopped while it was still starting
                    elif not line.startswith("resume with: "):
                        print(line, end="", file=sys.stderr, flush=True)
                status = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    if interrupted or status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return status, message
