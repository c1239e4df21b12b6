"""Trainings that a command starts, in a process of their own each: begun ones are resumed, finished ones used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambascope.models.weights import CHECKPOINT_DIR, LAST_NAME, WEIGHTS
from mambascope.utils import CommandError


class Group:
    """Trainings that run at the same time, each waited for by a thread of its own.

    Ctrl-C comes to the main thread only, which then calls :meth:`interrupt`.

    Args:
        threads: CPU threads of each training; by default this process's.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self.interrupted = False

    def start(self, command: Sequence[str], env: dict[str, str], **pipes: Any) -> subprocess.Popen[str]:
        """Starts a process as a group of its own: a terminal's Ctrl-C does not reach it.

        Raises:
            KeyboardInterrupt: If the group was interrupted.
        """
        if self.threads is not None:
            env = {**env, "OMP_NUM_THREADS": str(self.threads)}
        with self._lock:
            if self.interrupted:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, env=env, process_group=0, text=True, errors="replace", **pipes)
            self._running.add(process)
        return process

    def forget(self, process: subprocess.Popen[str]) -> None:
        """Forgets a process that has ended."""
        with self._lock:
            self._running.discard(process)

    def interrupt(self) -> None:
        """Lets all trainings save their state and stop; no other is started any more."""
        with self._lock:
            self.interrupted = True
            for process in self._running:
                process.send_signal(signal.SIGINT)


def finished_weights(folder: Path) -> Path | None:
    """Weights of a training that has ended, else ``None``."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() else None


def finish_training(folder: Path, options: Sequence[str], group: Group | None = None, name: str = "") -> Path:
    """Weights of the training in a run directory, after training whatever is left of it.

    Ctrl-C lets it save its state first, a second one does not. It also saves and stops when this process ends.

    Args:
        folder: The run directory.
        options: Of ``tools/train_cls.py`` for a new run, without the run's name and root.
        group: What it runs together with.
        name: Put before every line that it prints, which then all go to the standard error.

    Raises:
        CommandError: If the training failed; with its message.
        KeyboardInterrupt: If it was interrupted.
    """
    if (weights := finished_weights(folder)) is not None:
        return weights
    last = folder / CHECKPOINT_DIR / LAST_NAME
    if last.is_file():
        options = ["--ckpt_path", str(last)]
    else:
        options = [*options, "--run.root", str(folder.parent), "--run.name", folder.name]
    status, message = _run(options, group or Group(), name)
    if status or finished_weights(folder) is None:
        reason = message or f"it ended with status {status}; run again to go on"
        raise CommandError(f"training in {folder}: {reason}")
    return folder / WEIGHTS


def _run(options: Sequence[str], group: Group, name: str) -> tuple[int, str]:
    """Status of the training command, and the error that it ended with; ``KeyboardInterrupt`` once it has stopped."""
    command = [sys.executable, "-m", "mambascope.commands", *options]
    env = {**os.environ, "MAMBASCOPE_STOP_WITH_PARENT": "1"}
    out, err = (subprocess.PIPE, subprocess.STDOUT) if name else (None, subprocess.PIPE)
    process = group.start(command, env, stdin=subprocess.PIPE, stdout=out, stderr=err)
    lines = process.stdout if name else process.stderr
    assert lines is not None
    message, interrupted = "", False
    with process:
        while True:
            try:
                for line in lines:
                    if line.startswith("error: "):
                        message = line.removeprefix("error: ").strip()
                    elif (interrupted or group.interrupted) and line.startswith("Traceback "):
                        lines.read()  # stopped while it was still starting
                    elif not line.startswith("resume with: "):
                        print(f"{name}: {line}" if name else line, end="", file=sys.stderr, flush=True)
                status = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)  # every Ctrl-C is passed on once
    group.forget(process)
    if interrupted or group.interrupted or status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return status, message
