"""The error that every reader of user data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A problem in the user's data: missing folders, broken files, labels out of range.

    The message is one line, names the file or the argument, and says what would be accepted, so that a command can
    print it instead of a traceback.
    """


def worker_failure(error: BaseException) -> DataError | None:
    """A one-line error when ``error`` is PyTorch's report of a dead loader process, else None.

    PyTorch raises that report in the main thread wherever it happens to be, so whoever runs the training should ask.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    first_line = " ".join(text.splitlines()[0].split())
    return DataError(f"{first_line} Was memory short? Fewer num_workers or a smaller batch_size may help.")
