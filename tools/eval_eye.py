#!/usr/bin/env python
"""Evaluates a MambaEye: accuracy against glimpses, image size, scan pattern and choice, early stopping. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.eye.evaluate import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
