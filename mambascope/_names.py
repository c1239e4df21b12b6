"""Names of files and classes as text: on Linux they are bytes, and not all of them are UTF-8."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
from typing import Any

_SURROGATES = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8


def class_name(name: str) -> str:
    """The name under which a class is known: composed Unicode (NFC), since some systems write file names decomposed."""
    return unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    r"""Text that can be drawn and encoded: a byte that is no UTF-8 becomes ``\xe9``, as a shell's ``$'…'`` takes it."""
    return _SURROGATES.sub(lambda m: f"\\x{ord(m[0]) - 0xDC00:02x}" if "\udc80" <= m[0] <= "\udcff" else "?", text)


def as_json(data: Any, **options: Any) -> str:
    """JSON in UTF-8; a byte of a name that is no UTF-8 is escaped, and read back as Python's name of the file."""
    return json.dumps(data, ensure_ascii=False, **options).encode("utf-8", "backslashreplace").decode("utf-8")


def open_streams() -> None:
    """Lets this process print every file name: on its own stdout byte by byte, elsewhere with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.__stdout__ else "backslashreplace")


def utf8_mode() -> None:
    """Starts this program anew in Python's UTF-8 mode where the locale is ASCII, which names and configs do not fit."""
    ascii_only = sys.getfilesystemencoding().lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
    if ascii_only and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
