#!/usr/bin/env python
"""Reruns the paper's ablations on the built-in digits; interrupted runs go on where they were. See --help."""

import sys

from mambascope.evaluation.ablation_cli import main

if __name__ == "__main__":
    sys.exit(main())
