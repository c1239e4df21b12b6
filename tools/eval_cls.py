#!/usr/bin/env python
"""Evaluates a classifier: threshold sweep, measured dynamic inference, choice of a threshold. See --help."""

import sys

from mambascope.evaluation.eval_cli import main

if __name__ == "__main__":
    sys.exit(main())
