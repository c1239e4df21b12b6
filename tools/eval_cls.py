#!/usr/bin/env python
"""Evaluates a classifier: threshold sweep, measured dynamic inference, choice of a threshold. See --help."""

import os
import sys

from mambascope._names import utf8_mode
from mambascope.commands.evaluate import main

if __name__ == "__main__":
    utf8_mode()
    sys.path.append(os.getcwd())  # where one's own classes lie that options name
    sys.exit(main())
