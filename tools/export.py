#!/usr/bin/env python
"""Writes ONNX files and torch.export programs of a classifier, compared with the model. See --help."""

import sys

from mambascope.evaluation.export_cli import main

if __name__ == "__main__":
    sys.exit(main())
