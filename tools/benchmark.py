#!/usr/bin/env python
"""Time per image of models on this CPU: eager, frozen, compiled, exported, in other precisions. See --help."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.benchmark import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
