"""The command of ``tools/eval_dense.py``: threshold sweep and measured time of a segmentor or detector."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambascope._names import open_streams, printable
from mambascope.evaluation.choice import images_for_drop
from mambascope.mm.data_checks import check_data
from mambascope.utils import atomic_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="mIoU or box and mask AP of a gated model at every exit threshold, with backbone GFLOPs and "
        "measured time at several input sizes, beside a plain Vim of the same sizes."
    )
    parser.add_argument("config", help="a config with a ScopeBackbone, e.g. mm_configs/upernet_scope_ti.py")
    parser.add_argument("checkpoint", help="written by its training, e.g. work_dirs/upernet_scope_ti/iter_160000.pth")
    parser.add_argument(
        "--vim", metavar="CKPT", help="trained plain Vim (upernet_vim_*, cascade_vim_*) to score as well"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the results; default: eval/ beside the checkpoint")
    parser.add_argument("--points", type=int, default=21, help="thresholds of the sweep (default 21)")
    parser.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="accepted loss of the chosen one (default 1)"
    )
    parser.add_argument("--threshold", type=float, help="report this threshold instead of choosing one")
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="SIDE", help="short sides to time; default: around the data's"
    )
    parser.add_argument("--timing-images", type=int, default=16, help="images per timing (default 16)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per call in the timings (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median counts (default 5)")
    parser.add_argument("--max-seconds", type=float, default=20.0, help="limit for each size and kind (default 20)")
    parser.add_argument("--limit", type=int, help="evaluate the first images only")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--no-figures", action="store_true", help="numbers only")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as for mim train")
    return parser


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """``--cfg-options`` as mmengine reads them."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser.parse_args(["--cfg-options", *texts]).cfg_options if texts else {}


def _check(args: argparse.Namespace) -> None:
    for name in ("points", "timing_images", "batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if args.sizes and min(args.sizes) < 16:
        raise ValueError(f"--sizes must be at least 16 pixels, got {min(args.sizes)}")
    if args.max_drop < 0:
        raise ValueError(f"--max-drop must be >= 0 points, got {args.max_drop:g}")


def _first(loader: Iterable, count: int) -> list[dict]:
    """The first ``count`` images as batches of one."""
    batches: list[dict] = []
    for batch in loader:
        for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
            batches.append({"inputs": [image], "data_samples": [sample]})
            if len(batches) == count:
                return batches
    return batches


def _grouped(batches: Sequence[dict], size: int) -> list[dict]:
    """Batches of one joined to batches of ``size``, images of one shape together."""
    shapes: dict[tuple[int, ...], list[dict]] = {}
    for batch in batches:
        shapes.setdefault(tuple(batch["inputs"][0].shape), []).append(batch)
    joined = []
    for same_shape in shapes.values():
        for i in range(0, len(same_shape), size):
            part = same_shape[i : i + size]
            joined.append({k: [b[k][0] for b in part] for k in ("inputs", "data_samples")})
    # sizes are compared between modes, not between batches: keep the most frequent shape
    most = max(shapes, key=lambda s: len(shapes[s]))
    return [b for b in joined if tuple(b["inputs"][0].shape) == most]


class _Head:
    """The first batches of a loader, as often as it is asked."""

    def __init__(self, loader: Any, images: int) -> None:
        self.loader, self.images = loader, images

    def __iter__(self) -> Any:
        left = self.images
        for batch in self.loader:
            yield {k: v[:left] for k, v in batch.items()}
            left -= len(batch["inputs"])
            if left <= 0:
                return


def _progress(label: str) -> Callable[[Iterable], Iterable]:
    return lambda loader: tqdm(loader, desc=label, unit="batch", leave=False, disable=not sys.stderr.isatty())


def _limited(metric: Any, loader: Any, images: int) -> None:
    """Lets COCO score the images that were looked at only."""
    if hasattr(metric, "img_ids"):
        metric.img_ids = [loader.dataset.get_data_info(i)["img_id"] for i in range(min(images, len(loader.dataset)))]


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the tables and writes the files."""
    from mambascope.mm import evaluate, loading
    from mambascope.mm.runner import ScopeRunner
    from mambascope.utils import pick_device

    _check(args)
    device = pick_device(args.device)
    cfg = loading.read_config(args.config, parse_options(args.cfg_options))
    check_data(cfg, ("test_dataloader",))
    model: Any = loading.build_model(cfg, args.checkpoint, device)
    loading.scope_backbone(model)
    plain: Any = loading.build_model(loading.plain_config(cfg), args.vim, device)
    loader: Any = ScopeRunner.build_dataloader(cfg.test_dataloader)
    metrics = evaluate.build_metrics(cfg, loader.dataset.metainfo)
    if args.limit is not None:
        loader_all, loader = loader, _Head(loader, args.limit)
        for metric in metrics:
            _coco_ready(metric)
            _limited(metric, loader_all, args.limit)
    record = evaluate.collect(model, loader, metrics, _progress)
    fixed, choice = how_chosen(len(record), args.threshold, args.max_drop, float(model.backbone.threshold))
    grid = [] if fixed is None else [fixed]
    thresholds = sorted({0.0, 1.0, *grid, *map(float, evaluate.thresholds_for(record.confidence, args.points))})
    rows = evaluate.sweep(record, metrics, thresholds)
    chosen = evaluate.choose(rows, args.max_drop) if fixed is None else thresholds.index(fixed)
    vim = None
    if args.vim:
        vim = evaluate.scores(metrics, evaluate.predictions(plain, loader, metrics, _progress("plain Vim")))

    first = _first(loader, args.timing_images)
    side = min(first[0]["inputs"][0].shape[-2:])
    sides = sorted(set(args.sizes or [round(side * f / 16) * 16 for f in (0.75, 1, 1.5, 2)]))
    settings = {"all exit": 0.0, "dynamic": rows[chosen]["threshold"], "refine all": 1.0}
    batches = _grouped(first, args.batch_size)
    timings = evaluate.measure(model, plain, batches, sides, settings, rounds=args.rounds, max_seconds=args.max_seconds)
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / "eval"
    print(sweep_table(rows, chosen, vim, choice))
    print("\n" + timing_table(timings, args.batch_size))
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "sweep.csv", table_csv(rows))
    _write(out / "timings.csv", table_csv(timings))
    facts = {
        "config": str(args.config),
        "checkpoint": os.path.relpath(args.checkpoint),
        "images": len(record),
        "chosen": rows[chosen],
        "choice": choice,
        "vim": vim,
        "parameters_millions": {"model": evaluate.parameters(model), "plain": evaluate.parameters(plain)},
        "threads": torch.get_num_threads(),
    }
    _write(out / "results.json", json.dumps(facts, indent=2) + "\n")
    if not args.no_figures:
        from mambascope.plotting.dense import plot_dense

        vim_cost = plain.backbone.cost(*batches[0]["inputs"][0].shape[-2:])[1]
        plot_dense(rows, chosen, timings, out / "dense.png", vim=vim, vim_gflops=vim_cost, title=Path(args.config).stem)
    print(f"\nresults: {out}")
    return 0


def _coco_ready(metric: Any) -> None:
    """COCO's metric finds its category ids when it is first used, together with all images."""
    if hasattr(metric, "cat_ids") and metric.cat_ids is None and metric._coco_api is not None:
        metric.cat_ids = metric._coco_api.get_cat_ids(cat_names=metric.dataset_meta["classes"])


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def table_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; NaN is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) for k, v in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def how_chosen(images: int, requested: float | None, max_drop: float, configured: float) -> tuple[float | None, str]:
    """Where the marked threshold comes from.

    Args:
        images: How many there are to choose on.
        requested: The threshold of the command line, if there is one.
        max_drop: Accepted loss in points.
        configured: The model's threshold.

    Returns:
        The threshold, ``None`` if the images are to choose it, and why it is that.
    """
    if requested is not None:
        return requested, "the threshold was given"
    needed = images_for_drop(max_drop / 100)
    if images < needed:
        return configured, f"the config's threshold: {images} images are too few to choose one, {needed} can"
    return None, (
        f"fewest refined at most {max_drop:g} points below refining all; chosen on the {images} images reported here: "
        "its figures are slightly optimistic"
    )


def sweep_table(
    rows: Sequence[dict[str, float]], chosen: int, vim: dict[str, float] | None, choice: str = "chosen"
) -> str:
    """The sweep for people; the chosen row is marked and ``choice`` says why it is."""
    names = [k for k in rows[0] if k not in ("threshold", "share_refined") and not k.startswith("gflops")]
    head = "".join(f"{n:>10}" for n in names)
    lines = [f"  {'threshold':>10}{'refined':>9}{'GFLOPs':>10}{head}"]
    for i, row in enumerate(rows):
        figures = "".join(f"{row[n]:>10.2f}" for n in names)
        mark = "*" if i == chosen else " "
        cost = row["gflops_both_directions"]
        lines.append(f"{mark} {row['threshold']:>10.4f}{100 * row['share_refined']:>8.1f}%{cost:>10.4g}{figures}")
    if vim:
        lines.append(f"  {'plain Vim':>10}{'':>9}{'':>10}" + "".join(f"{vim[n]:>10.2f}" for n in names))
    return "\n".join(lines) + f"\n* {choice}\nGFLOPs of the backbone per image, both scan directions"


def timing_table(rows: Sequence[dict[str, Any]], batch_size: int) -> str:
    """The measured times for people."""
    lines = [
        f"measured, batch {batch_size}",
        f"{'side':>6}  {'mode':<12}{'refined':>9}{'GFLOPs':>10}{'ms backbone':>13}{'ms model':>11}",
    ]
    for row in rows:
        lines.append(
            f"{row['side']:>6}  {row['mode']:<12}{100 * row['share_refined']:>8.1f}%"
            f"{row['gflops_both_directions']:>10.4g}{row['ms_backbone']:>13.2f}{row['ms_model']:>11.2f}"
        )
    return "\n".join(lines)


def guarded(action: Callable[[], int]) -> int:
    """Runs a command: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    from mambascope.mm.runner import one_line

    open_streams()
    try:
        with one_line():
            return action()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    return guarded(lambda: run(args))
