#!/usr/bin/env python
"""Draws the accuracy-cost frontier of several methods on one data set. See --help and mambascope/configs/frontier."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.frontier import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
