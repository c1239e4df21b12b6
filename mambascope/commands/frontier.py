"""The command of ``tools/frontier.py``: trains, evaluates, times and compares what a list names."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mambascope.compare.compare import Curve, compare, make_curve, text
from mambascope.compare.lists import FrontierList, read_list, shipped_lists
from mambascope.compare.table import Row, Spread, make_rows, write_csv
from mambascope.compare.timing import Measured, measure
from mambascope.compare.work import Point, Result, Work
from mambascope.evaluation.published import IMAGENET_ROWS
from mambascope.utils import atomic_path, pick_device, run_command

CSV_NAME, PLOT_NAME, FACTS_NAME, TEXT_NAME = "frontier.csv", "frontier.png", "frontier.json", "comparison.txt"
TIMINGS_NAME = "timings.json"
MAX_JOBS = 4  # small models gain more from that than from threads, but each takes a gigabyte


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Accuracy against cost of several methods: trains or loads them, evaluates, times, compares.",
        epilog=f"Finished pieces are kept: run again to go on. Shipped lists: {', '.join(shipped_lists())}.",
    )
    parser.add_argument("list", help="what is compared: a YAML file, or the name of a shipped list")
    parser.add_argument("--entries", nargs="+", metavar="NAME", help="only these, and what they need")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the list's")
    parser.add_argument("--runs", metavar="DIR", help="trainings and results (default runs/frontier/<list>)")
    parser.add_argument("--out", metavar="DIR", help=f"folder of {CSV_NAME} and {PLOT_NAME} (default: that of --runs)")
    parser.add_argument("--device", default="auto", help="of evaluation and timing: auto, cpu, cuda or cuda:<number>")
    parser.add_argument(
        "--jobs",
        type=int,
        help=f"trainings at a time (default: 1 where there is a GPU, else one per thread, at most {MAX_JOBS})",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and stop")
    return parser


def _train(work: Work, jobs: int | None) -> None:
    threads = torch.get_num_threads()
    if jobs is None:
        # trainings choose their device themselves, and take a GPU where there is one
        jobs = 1 if torch.cuda.is_available() else min(MAX_JOBS, threads)
    work.train_all(jobs, threads)


def _evaluate(work: Work) -> dict[Point, Result]:
    results = {}
    points = list(work.points())
    for point in tqdm(points, desc="evaluating", unit="point", disable=not work.progress, leave=False):
        results[point] = work.evaluate(point)
    return results


def _curves(plan: FrontierList, results: dict[Point, Result], measured: Sequence[Measured]) -> dict[str, Curve]:
    """The curve of every MambaScope by its entry, at its first setting."""
    curves = {}
    for name, entry in plan.entries.items():
        own = [(p, r) for p, r in results.items() if p.entry == name and p.setting == entry.settings[0]]
        if own and own[0][1].two_stage:
            curves[name] = make_curve(entry.label, own, measured)
    return curves


def _plot(plan: FrontierList, rows: Sequence[Row], curves: dict[str, Curve], path: Path) -> None:
    from mambascope.plotting.methods import Method, plot_methods
    from mambascope.plotting.published import PublishedPoint

    convention = "one_direction" if plan.published else "both_directions"
    sizes = plan.timing.batch_sizes
    panels = {convention: ("computation", f"GFLOPs per image ({convention.replace('_', ' ')})")}
    panels |= {str(s): (f"measured time, batch {s}", "ms per image") for s in sizes}
    methods = []
    for name, entry in plan.entries.items():
        # of a curve, the thresholds that were timed are marked
        own = [r for r in rows if r.entry == name and r.ms]
        if not own:
            continue
        curve = curves.get(name)
        cost = {convention: np.array([_three(r.gflops[convention]) for r in own])}
        cost |= {str(s): np.array([_three(r.ms[s]) for r in own]) for s in sizes}
        methods.append(
            Method(
                entry.label,
                np.array([_three(r.top1) for r in own]),
                cost,
                None if curve is None else np.stack([curve.mean, curve.top1.min(0), curve.top1.max(0)], axis=1),
                {} if curve is None else {convention: curve.gflops[convention], **_named(curve)},
                reference=name == plan.baseline,
            )
        )
    models = [row for row in IMAGENET_ROWS if row.size in plan.published]
    published = [PublishedPoint(row.label, row.top1, row.gflops) for row in models]
    plot_methods(methods, panels, path, published=published, title=plan.title)


def _named(curve: Curve) -> dict[str, np.ndarray]:
    return {str(size): ms for size, ms in curve.ms.items()}


def _three(value: Spread) -> tuple[float, float, float]:
    return value.mean, value.low, value.high


def _report(work: Work, results: dict[Point, Result], measured: Sequence[Measured], out: Path) -> None:
    plan = work.plan
    rows = make_rows(plan, results, measured)
    curves = _curves(plan, results, measured)
    write_csv(rows, plan.timing.batch_sizes, out / CSV_NAME)
    _plot(plan, rows, curves, out / PLOT_NAME)
    if plan.curve is not None:
        if plan.curve not in curves:
            raise ValueError(f"curve must be an entry with a MambaScope, got {plan.curve!r}, a one-stage model")
        others = [row for row in rows if row.entry != plan.curve and row.ms]
        lines = text(curves[plan.curve], [compare(curves[plan.curve], row) for row in others])
        with atomic_path(out / TEXT_NAME) as temporary:
            temporary.write_text(lines + "\n", encoding="utf-8")
        print(f"\n{lines}\n")
    print(f"written: {out / CSV_NAME}, {out / PLOT_NAME}")


def _run(args: argparse.Namespace) -> int:
    plan = read_list(args.list).restricted(args.entries, args.seeds)
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {args.jobs}")
    folder = Path(args.runs or Path("runs") / "frontier" / Path(args.list).stem)
    work = Work(plan, folder, pick_device(args.device), progress=sys.stderr.isatty())
    if args.dry_run:
        for name, seed in work.trainings():
            print(f"{'trained' if work.is_trained(name, seed) else 'to train':<9} {work.run_dir(name, seed)}")
        return 0
    _train(work, args.jobs)
    results = _evaluate(work)
    measured, machine = measure(work, results, plan.timing, folder / TIMINGS_NAME)
    out = Path(args.out or folder)
    facts = {"title": plan.title, "seeds": plan.seeds, "timing": asdict(plan.timing), **machine}
    with atomic_path(out / FACTS_NAME) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _report(work, results, measured, out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
