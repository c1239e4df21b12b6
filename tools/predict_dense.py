#!/usr/bin/env python
"""Draws what a gated segmentor or detector found and where it looked again. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.mm.predict_cli import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
