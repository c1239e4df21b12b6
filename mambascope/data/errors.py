"""The error that every reader of user data raises."""

from __future__ import annotations

import errno
import os

# of torch: where a block cannot be had, where its file cannot be grown, where a worker died of writing to it
_SHARED_MEMORY = ("shared memory", "unable to write to file </torch_", "unable to mmap", "killed by signal: Bus error")


class DataError(ValueError):
    """A problem in the user's data: missing folders, broken files, labels out of range.

    The message is one line, names the file or the argument, and says what would be accepted, so that a command can
    print it instead of a traceback.
    """


def worker_failure(error: BaseException) -> DataError | None:
    """A one-line error when ``error`` is PyTorch's report of loader processes that lack something or died, else None.

    PyTorch raises the latter in the main thread wherever it happens to be, so whoever runs the training should ask.
    """
    text = str(error)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC  # not even a semaphore has room
    if not full and not isinstance(error, RuntimeError):
        return None
    if full or any(words in text for words in _SHARED_MEMORY):
        return DataError(
            f"the loader's workers hand images over in shared memory (/dev/shm), which {_shared_memory()}: give more "
            "of it (docker run --shm-size=2g), or set fewer num_workers, a smaller batch_size, or num_workers 0"
        )
    if not text.startswith("DataLoader worker"):
        return None
    first_line = " ".join(text.splitlines()[0].split())
    return DataError(f"{first_line} Was memory short? Fewer num_workers or a smaller batch_size may help.")


def _shared_memory() -> str:
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return "is not there"
    return f"is full (it has {disk.f_blocks * disk.f_frsize / 2**20:.3g} MB)"
