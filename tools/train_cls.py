"""Trains a classifier; without arguments a MambaScope on the built-in data. See ``--help`` and docs in README.md."""

import os
import sys

from mambascope._names import utf8_mode
from mambascope.commands.train import main

if __name__ == "__main__":
    utf8_mode()
    sys.path.append(os.getcwd())  # where one's own classes lie that options name
    sys.exit(main())
