"""``python -m mambascope.commands``: the command of ``tools/train_cls.py``, for programs that start trainings.

With ``MAMBASCOPE_STOP_WITH_PARENT`` in the environment its standard input must be a pipe that the starting program
holds open: when that program ends, however it does, the training saves its state and stops.
"""

import os
import signal
import stat
import sys
import threading

from mambascope._names import utf8_mode
from mambascope.commands.train import main
from mambascope.training.signals import drop_output


def _stop_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # empty once nobody holds the other end any more
        pass
    drop_output(stat.S_ISFIFO)  # the pipes to the program that is gone
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    utf8_mode()
    if os.environ.get("MAMBASCOPE_STOP_WITH_PARENT"):
        threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.exit(main())
