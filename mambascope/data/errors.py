"""The error that every reader of user data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A problem in the user's data: missing folders, broken files, labels out of range.

    The message is one line, names the file or the argument, and says what would be accepted, so that a command can
    print it instead of a traceback.
    """
