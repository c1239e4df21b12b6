#!/usr/bin/env python
"""Evaluates a gated segmentor or detector: threshold sweep, cost, measured time. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.mm.eval_cli import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
