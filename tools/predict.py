#!/usr/bin/env python
"""Classifies images and folders: class, confidence, stage that decided, tokens used. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.predict import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
