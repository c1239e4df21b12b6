#!/usr/bin/env python
"""Reruns the paper's ablations on the built-in digits; interrupted runs go on where they were. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.ablate import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
