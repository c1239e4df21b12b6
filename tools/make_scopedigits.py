"""Writes the built-in digits data set as ImageFolder, ADE20K or COCO: see ``--help``."""

import sys

from mambascope.data.export_scopedigits import main

if __name__ == "__main__":
    sys.exit(main())
