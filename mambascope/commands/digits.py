"""The command of ``tools/make_scopedigits.py``: the built-in digits as files."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mambascope.data.export_scopedigits import WRITERS, export
from mambascope.data.scopedigits_config import ScopeDigitsConfig


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_scopedigits.py", description="Write ScopeDigits in the layout of ImageNet, ADE20K or COCO."
    )
    parser.add_argument("--task", required=True, choices=tuple(WRITERS), help="ImageFolder, ADE20K or COCO layout")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--size", type=int, help="image side in pixels (default: 64 for cls, 128 otherwise)")
    parser.add_argument("--train", type=int, help="training images (default: 6000 for cls, 1000 otherwise)")
    parser.add_argument("--val", type=int, help="validation images (default: 1000 for cls, 200 otherwise)")
    parser.add_argument("--seed", type=int, default=0, help="other images, same division of the scans")
    parser.add_argument("--easy-share", type=float, default=ScopeDigitsConfig.easy_share, metavar="SHARE")
    parser.add_argument("--ade-ids", action="store_true", help="seg: class ids of ADE20K's 150 classes")
    parser.add_argument("--coco-ids", action="store_true", help="det: ids and names of COCO's 80 categories")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM clean up like Ctrl-C does."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (0 done, 2 bad input, 130 interrupted)."""
    args = _parser().parse_args(argv)
    try:
        if (args.ade_ids and args.task != "seg") or (args.coco_ids and args.task != "det"):
            raise ValueError("--ade-ids belongs to --task seg and --coco-ids to --task det")
        with _terminate_as_interrupt():
            out = export(
                args.task,
                args.out,
                size=args.size,
                train=args.train,
                val=args.val,
                mapped_ids=args.ade_ids or args.coco_ids,
                overwrite=args.overwrite,
                quiet=args.quiet,
                seed=args.seed,
                easy_share=args.easy_share,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: nothing was written to {args.out}", file=sys.stderr)
        return 130
    print(f"wrote {out}")
    return 0
