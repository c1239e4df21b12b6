#!/usr/bin/env python
"""Compares what a list names: methods on one data set, or the paper's ablations. See --help and configs/compare."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.compare import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
