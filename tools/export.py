#!/usr/bin/env python
"""Writes ONNX files and torch.export programs of a classifier, compared with the model. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.export import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
