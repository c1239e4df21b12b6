#!/usr/bin/env python
"""Evaluates a MambaEye: accuracy against glimpses, image size, scan pattern and choice, early stopping. See --help."""

import sys

from mambascope.evaluation.eye_cli import main

if __name__ == "__main__":
    sys.exit(main())
