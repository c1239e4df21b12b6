"""The images of the OpenMMLab demos: ScopeDigits scenes in ADE20K's and COCO's layout.

``python -m mambascope.mm.demo_data`` writes ``data/scopedigits_seg`` and ``data/scopedigits_det`` and leaves sets that
are there alone. The digits look like those the shipped classifier was trained on, so that starting from it makes sense:
large ones that half the size still shows, and small ones that it does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambascope.data.export_scopedigits import MARKER, export

SIZE, TRAIN, VAL = 64, 6000, 500
SCENES: dict[str, Any] = {
    "easy_share": 0.5,
    "scene_size": (0.6, 0.85),
    "hard_size": (0.17, 0.22),
    "scene_large": (0, 0),
    "scene_small": (7, 10),
    "contrast": (0.5, 0.8),
    "clutter": (0, 1),
    "texture": 0.12,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mambascope.mm.demo_data", description="Make the demos' images.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of both sets (default data)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"image side in pixels (default {SIZE})")
    parser.add_argument("--train", type=int, default=TRAIN, help=f"training images (default {TRAIN})")
    parser.add_argument("--val", type=int, default=VAL, help=f"validation images (default {VAL})")
    args = parser.parse_args(argv)
    for task in ("seg", "det"):
        out = args.out / f"scopedigits_{task}"
        if (out / MARKER).is_file():
            print(f"{out} is there")
            continue
        try:
            export(task, out, args.size, args.train, args.val, quiet=not sys.stderr.isatty(), **SCENES)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
