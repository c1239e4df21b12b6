"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_BY_HAND = {signal.SIGINT, signal.SIGTERM}  # asked for twice, they are meant
# what clusters, queues and lost connections send before they kill
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class TrainingStopped(BaseException):
    """Training ended by a signal; like ``KeyboardInterrupt`` it is no error that a handler on the way may swallow.

    Attributes:
        signum: The signal.
        path: The checkpoint to resume from; ``None`` if nothing could be saved.
    """

    def __init__(self, signum: int, step: int, path: Path | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.path = path


class StopSignals:
    """Notes that the training shall be saved and stop: SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2, SIGHUP and SIGXCPU.

    Attributes:
        first: The signal that came first; 0 for none.
        at_once: Whether Ctrl-C or SIGTERM came again, which stops without saving.
    """

    def __init__(self) -> None:
        self.first = 0
        self.at_once = False
        self._handlers: dict[int, Any] = {}
        self._pid = os.getpid()
        self._step: Callable[[], int] = lambda: 0

    def take(self, step: Callable[[], int]) -> None:
        """Takes the signals over; what is ignored (``nohup``) stays so.

        Args:
            step: The optimizer steps done.
        """
        self._step = step
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for signum in _STOPS:
            handler = signal.getsignal(signum)
            if handler is not signal.SIG_IGN or signum in _BY_HAND:
                self._handlers.setdefault(signum, handler)
                signal.signal(signum, self._on_signal)

    def give_back(self) -> None:
        """Ends that."""
        while self._handlers:
            signum, handler = self._handlers.popitem()
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader's worker, which inherits the handler and a terminal's Ctrl-C
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if signum == signal.SIGHUP:
            drop_output(stat.S_ISCHR)
        if self.first:
            self.at_once = {self.first, signum} <= _BY_HAND
            if self.at_once:
                raise TrainingStopped(signum, self._step())
            return
        self.first = signum
        hint = " (once more to stop without saving)" if signum in _BY_HAND else ""
        print(f"\n{signal.Signals(signum).name}: saving after this step{hint}", file=sys.stderr, flush=True)


def drop_output(kind: Callable[[int], bool]) -> None:
    """Lets standard output and error go nowhere where they led to a terminal or a pipe that is no longer there.

    Args:
        kind: Which kind of file that is, e.g. ``stat.S_ISFIFO``.
    """
    null_device = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if kind(os.fstat(descriptor).st_mode):
            os.dup2(null_device, descriptor)
    os.close(null_device)
