#!/usr/bin/env python
"""Classifies images and folders: class, confidence, stage that decided, tokens used. See --help."""

import sys

from mambascope.evaluation.predict_cli import main

if __name__ == "__main__":
    sys.exit(main())
