"""The command of ``tools/compare.py``: trains, evaluates, times and compares what a list names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambascope.compare.lists import Comparison, read_list, shipped_lists
from mambascope.compare.results import Result
from mambascope.compare.sources import Point
from mambascope.compare.timing import Measured, measure
from mambascope.compare.work import Work
from mambascope.utils import pick_device, run_command

TIMINGS_NAME = "timings.json"
MAX_JOBS = 4  # small models gain more from that than from threads, but each takes a gigabyte


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares methods, or the settings of an ablation: trains or loads, evaluates, times, compares.",
        epilog=f"Finished pieces are kept: run again to go on. Shipped lists: {', '.join(shipped_lists())}.",
    )
    parser.add_argument("list", help="what is compared: a YAML file, or the name of a shipped list")
    parser.add_argument("--entries", nargs="+", metavar="NAME", help="only these methods or tables, and what they need")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help='only these settings and the first of their entries, e.g. "score clip"'
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the list's")
    parser.add_argument(
        "--weights", nargs="+", metavar="[NAME=]FILE", help="weights instead of those the list has for its entries"
    )
    parser.add_argument("--runs", metavar="DIR", help="trainings and results (default runs/compare/<list>)")
    parser.add_argument("--out", metavar="DIR", help="folder of tables and pictures (default: that of --runs)")
    parser.add_argument("--device", default="auto", help="of evaluation and timing: auto, cpu, cuda or cuda:<number>")
    parser.add_argument(
        "--jobs",
        type=int,
        help=f"trainings at a time (default: 1 where there is a GPU, else one per thread, at most {MAX_JOBS})",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and stop")
    return parser


def _with_weights(plan: Comparison, options: Sequence[str]) -> Comparison:
    """The list with other weights of entries that are not trained; without a name, of all that have weights."""
    entries = dict(plan.entries)
    accepted = [name for name, entry in entries.items() if "checkpoint" in entry.net]
    for option in options:
        name, separator, file = option.partition("=")
        names, file = ([name], file) if separator and name in entries else (accepted, option)
        if not names or not set(names) <= set(accepted):
            raise ValueError(f"weights must be of one of {', '.join(accepted) or 'no entry'}, got {option!r}")
        for name in names:
            entries[name] = replace(entries[name], net={**entries[name].net, "checkpoint": file})
    return replace(plan, entries=entries)


def _train(work: Work, jobs: int | None) -> None:
    threads = torch.get_num_threads()
    if jobs is None:
        # trainings choose their device themselves, and take a GPU where there is one
        jobs = 1 if torch.cuda.is_available() else min(MAX_JOBS, threads)
    work.trainings.train_all(jobs, threads)


def _evaluate(work: Work) -> dict[Point, Result]:
    results = {}
    points = list(work.points())
    for point in tqdm(points, desc="evaluating", unit="point", disable=not work.progress, leave=False):
        results[point] = work.evaluate(point)
    return results


def _run(args: argparse.Namespace) -> int:
    from mambascope.compare.report import write_report

    whole = _with_weights(read_list(args.list), args.weights or ())
    plan = whole.restricted(args.entries, args.seeds, args.rows)
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {args.jobs}")
    folder = Path(args.runs or Path("runs") / "compare" / Path(args.list).stem)
    work = Work(plan, folder, pick_device(args.device), progress=sys.stderr.isatty())
    if args.dry_run:
        for training in work.trainings:
            done = work.trainings.is_finished(training)
            print(f"{'trained' if done else 'to train':<9} {work.trainings.run_dir(training)}")
        return 0
    _train(work, args.jobs)
    results = _evaluate(work)
    facts: dict[str, Any] = {"title": plan.title, "seeds": plan.seeds}
    measured: list[Measured] = []
    machine: dict[str, Any] = {}
    if plan.baseline is not None:
        measured, machine = measure(work, results, plan.timing, folder / TIMINGS_NAME)
        facts["timing"] = asdict(plan.timing)
    files = write_report(plan, results, measured, {**facts, **machine}, Path(args.out or folder), whole)
    print(f"written: {', '.join(map(str, files))}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
