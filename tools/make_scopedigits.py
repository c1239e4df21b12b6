"""Writes the built-in digits data set as ImageFolder, ADE20K or COCO: see ``--help``."""

import sys

from mambascope._names import utf8_mode
from mambascope.commands.digits import main

if __name__ == "__main__":
    utf8_mode()
    sys.exit(main())
