"""What ``tools/predict.py`` does with a MambaEye: class, how sure it is, glimpses used, and films of the glimpses."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mambascope.commands.options import value_range
from mambascope.data.batches import Skipped, surveyed
from mambascope.data.errors import DataError
from mambascope.data.files import LeftOut, Source, find_images
from mambascope.eye.answers import EyePrediction, predict_eye
from mambascope.eye.choice import CHOICES, make_chooser
from mambascope.eye.curves import Chooser
from mambascope.eye.dataset import ImageGlimpses
from mambascope.eye.evaluate import add_glimpse_arguments, canvas, changed_options, ready_eye
from mambascope.eye.glimpses import point_positions
from mambascope.eye.model import MambaEye
from mambascope.eye.placement import Placement
from mambascope.models.preprocessing import stored_value_range
from mambascope.utils import RowWriter, evaluating, open_output

_OPTIONS = ("glimpses", "pattern", "resize_mode", "canvas", "points", "choose", "animate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only a MambaEye has."""
    group = parser.add_argument_group("MambaEye", "--threshold is then the confidence, for what is seen, to stop at")
    add_glimpse_arguments(group)
    group.add_argument("--canvas", metavar="S", help="side, HEIGHTxWIDTH, or native; default: the file's")
    group.add_argument("--points", metavar="FILE", help="CSV of row,column: centres of the glimpses in image pixels")
    group.add_argument("--choose", metavar="HOW", help=f"choose glimpses: {CHOICES}")
    group.add_argument("--every", type=int, default=4, help="glimpses between checks of --threshold (default 4)")
    group.add_argument("--seed", type=int, default=0, help="of the random positions (default 0)")
    group.add_argument("--animate", metavar="DIR", help="write a film of the glimpses for each image there")
    group.add_argument("--film", choices=("gif", "png"), default="gif", help="kind of film (default gif)")


def given_options(args: argparse.Namespace) -> list[str]:
    """Options that only a MambaEye has, as far as they are given."""
    return [name for name in _OPTIONS if getattr(args, name) is not None] + ["compat"] * args.compat


def read_points(path: str) -> np.ndarray:
    """Glimpse centres [L, 2] (row, column) from a CSV file; a first line without numbers is a heading.

    Raises:
        DataError: If the file cannot be read or has other lines.
    """
    try:
        rows = csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines())
        lines = [line for line in rows if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"points file {path} cannot be read: {reason}") from None
    points = []
    for number, line in enumerate(lines, 1):
        try:
            row, column = (float(cell) for cell in line)
        except ValueError:
            if number == 1 and not any(_is_number(cell) for cell in line):
                continue
            raise DataError(f"line {number} of {path} must be two numbers row,column, got {','.join(line)!r}") from None
        points.append((row, column))
    if not points:
        raise DataError(f"points file {path} holds no row,column lines")
    return np.array(points)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def by_points(points: np.ndarray, patch_size: int) -> Chooser:
    """Positions that the user gave, for every image."""

    def choose(
        canvases: Sequence[Tensor], placements: Sequence[Placement], seeds: Sequence[Sequence[int]]
    ) -> list[Any]:
        return [point_positions(points, placement, patch_size=patch_size) for placement in placements]

    return choose


def write_prediction(writer: RowWriter, row: EyePrediction) -> None:
    """Writes one answer."""
    numbers = f"{row.confidence:>10.3f}  {row.sure:>5.3f}  {row.glimpses:>8}  {100 * row.coverage:>4.0f} %"
    writer.write(asdict(row), row.label, f"{numbers}  {row.file}")


def save_films(
    model: MambaEye,
    rows: Sequence[EyePrediction],
    glimpses: ImageGlimpses,
    files: Sequence[Source],
    folder: Path,
    kind: str = "gif",
) -> None:
    """Writes one film per image; sub-folders of the input are kept."""
    from mambascope.eye.animation import Film, write_film

    device = model.mamba2_net.norm_f.weight.device
    for i, (row, file) in enumerate(zip(rows, files, strict=True)):
        patches, moves, coverage = glimpses.read(torch.tensor([i]), 0, row.glimpses)
        with evaluating(model):
            probabilities = model(patches.to(device), moves.to(device))[0].float().softmax(-1).cpu()
        canvas = glimpses.canvases[i]
        film = Film(
            (canvas[:3] if len(canvas) >= 3 else canvas[:1].expand(3, -1, -1)).permute(1, 2, 0).cpu().numpy(),
            np.asarray(glimpses.positions[i])[: row.glimpses],
            probabilities.numpy(),
            coverage[0].numpy(),
            glimpses.patch_size,
            model.labels,
            file.name,
            row.stopped,
        )
        write_film(film, folder / f"{file.name}.{kind}")


def _check(args: argparse.Namespace) -> None:
    for name in ("alpha", "img_size", "save_dir"):
        if getattr(args, name) is not None:
            hint = {"img_size": "; use --canvas", "save_dir": "; use --animate"}.get(name, "")
            raise ValueError(f"{name.replace('_', '-')} is not for a MambaEye{hint}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {args.threshold}")
    if args.every < 1:
        raise ValueError(f"every must be at least 1, got {args.every}")
    if args.seed < 0:
        raise ValueError(f"seed must not be negative, got {args.seed}")
    if args.points and (args.choose or args.glimpses or args.pattern):
        raise ValueError("points already say where to look: leave --choose, --glimpses and --pattern out")


def run(args: argparse.Namespace) -> int:
    """The command's body for a MambaEye."""
    _check(args)
    model = ready_eye(args.checkpoint, args.model, args.device, value_range(args.value_range))
    options = changed_options(model, args)
    if args.canvas is not None:
        options = replace(options, canvas_size=canvas(args.canvas))
        if options.canvas_size is None and args.resize_mode is None:
            options = replace(options, resize_mode="none")
    chooser: Chooser | None = None
    points: np.ndarray | None = None
    if args.points:
        points = read_points(args.points)
        options = replace(options, length=len(points))
        chooser = by_points(points, options.patch_size)
    elif args.choose:
        chooser = make_chooser(args.choose, model, options.length)
    skipped, left_out = Skipped(args.skip_bad), LeftOut()
    count = used = 0
    with (
        tqdm(desc="images", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar,
        open_output(args.output) as stream,
    ):
        heading = "confidence   sure  glimpses    seen  file"
        writer = RowWriter(stream, args.format, EyePrediction.__dataclass_fields__, model.labels, heading)
        for rows, glimpses, files in predict_eye(
            model,
            surveyed(find_images(args.inputs, left_out), model.in_chans, stored_value_range(model)),
            options,
            threshold=args.threshold,
            chooser=chooser,
            every=args.every,
            seed=args.seed,
            batch_size=args.batch_size,
            skipped=skipped,
            check=None if points is None else lambda p: point_positions(points, p, patch_size=options.patch_size),
        ):
            for row in rows:
                write_prediction(writer, row)
                used += row.glimpses
            if args.animate:
                save_films(model, rows, glimpses, files, Path(args.animate), args.film)
            count += len(rows)
            bar.update(len(rows))
    parts = [f"{count:,} images"]
    if count:
        parts.append(f"{used / count:.1f} glimpses each")
    if skipped.count:
        parts.append(f"{skipped.count} unreadable files skipped")
    if left_out:
        parts.append(f"left out: {left_out}")
    print(", ".join(parts), file=sys.stderr)
    return 0 if count else 1
