"""What the commands share: a ready model from a file, its preprocessing, a device, and errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mambascope.models.pictures import ValueRange, check_value_range
from mambascope.models.weights import SHIPPED

CHECKPOINT_HELP = (
    f"weights of ours (.safetensors, .ckpt), a folder with model.safetensors, or shipped: {', '.join(SHIPPED)}"
)


def add_value_range(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says which values of image files become 0 and 255."""
    parser.add_argument(
        "--value-range",
        nargs="+",
        metavar="V",
        help="values of the files that become 0 and 255: two numbers, or file or percentile; default: the weights'",
    )


def value_range(words: Sequence[str] | None) -> ValueRange:
    """The value of a ``--value-range`` option."""
    return check_value_range(words[0] if words and len(words) == 1 else words)


def image_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """The value of an ``--img-size`` option: a side, or height and width."""
    if values is None:
        return None
    if len(values) not in (1, 2) or min(values) < 1:
        raise ValueError(f"img-size must be one or two positive integers, got {' '.join(map(str, values))}")
    return (values[0], values[-1])


def add_column_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the columns of a data set of Hugging Face."""
    parser.add_argument("--input-key", metavar="COLUMN", help="of the images of hfds/… data (default: image)")
    parser.add_argument("--target-key", metavar="COLUMN", help="of the labels of hfds/… data (default: label)")
