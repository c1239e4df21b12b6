"""The command of ``tools/eval_cls.py``: sweeps the threshold, measures dynamic inference, chooses a threshold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mambascope.commands.options import CHECKPOINT_HELP, add_column_arguments, add_value_range, image_size, value_range
from mambascope.data.open import EvalData, validation_loader
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.report import Report, write_report
from mambascope.evaluation.sweep import Target
from mambascope.evaluation.throughput import Timing, compare_engine, representative
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.ready import ready_model
from mambascope.models.scope import MambaScope
from mambascope.models.two_stage import is_two_stage
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import SHIPPED, WEIGHTS, find_weights
from mambascope.utils import atomic_path, run_command

ENGINE_BATCHES = (1, 8, 64)
DATA_HELP = "folder, timm data set, scopedigits, or data module as in training; default: the run's validation data"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Accuracy, GFLOPs and measured time of a classifier at every exit threshold.",
        epilog="Without a target the threshold that costs at most half a point against refining every image is shown.",
    )
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--data", metavar="WHAT", help=DATA_HELP)
    parser.add_argument("--split", default="validation", help="of the data (default validation)")
    add_column_arguments(parser)
    parser.add_argument("--length", type=int, default=1000, help="images of scopedigits (default 1000)")
    parser.add_argument("--out", metavar="DIR", help="report folder; default: eval/ beside the checkpoint")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target-gflops", type=float, help="choose the most accurate threshold with at most that many")
    target.add_argument("--target-ms", type=float, help="the same for measured ms per image at --batch-size")
    target.add_argument(
        "--target-acc-drop", type=float, metavar="POINTS", help="choose the cheapest threshold within it"
    )
    parser.add_argument(
        "--with-confidence",
        type=float,
        metavar="C",
        help="promise the --target-acc-drop for other images of the same kind with this probability, e.g. 0.95",
    )
    parser.add_argument("--threshold", type=float, help="report this threshold instead of choosing one")
    parser.add_argument("--measure", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.9], metavar="ETA")
    parser.add_argument("--batch-size", type=int, default=64, help="the large batch of the timings (default 64)")
    parser.add_argument("--timing-images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median counts (default 7)")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="limit for the timing of each batch size")
    parser.add_argument("--both-directions", action="store_true", help="--target-gflops counts both scan directions")
    parser.add_argument("--engine", action="store_true", help="also time the throughput engine against plain splitting")
    parser.add_argument("--export", metavar="FILE", help="write the model with the chosen threshold (.safetensors)")
    parser.add_argument("--published", action="store_true", help="draw the published ImageNet rows too, marked as such")
    parser.add_argument("--no-figures", action="store_true", help="numbers only")
    parser.add_argument("--alpha", type=float, help="share of the cells that the fine stage reads, 0 to 1")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels")
    add_value_range(parser)
    parser.add_argument("--model", metavar="NAME", help="model of weights that do not describe it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--workers", type=int, default=0, help="worker processes that load images")
    parser.add_argument("--skip-bad", action="store_true", help="name and count unreadable files instead of stopping")
    return parser


def chosen_target(args: argparse.Namespace) -> Target | None:
    """What the options ask for; ``None`` without a target."""
    if args.with_confidence is not None and args.target_acc_drop is None:
        raise ValueError("--with-confidence needs --target-acc-drop: it promises that drop")
    if args.target_gflops is not None:
        convention = "both_directions" if args.both_directions else "one_direction"
        return Target("gflops", args.target_gflops, convention)
    if args.target_ms is not None:
        return Target("ms", args.target_ms)
    if args.target_acc_drop is not None:
        return Target("acc_drop", args.target_acc_drop / 100, confidence=args.with_confidence)
    return None


def engine_table(model: MambaScope, report: Report, args: argparse.Namespace) -> str:
    """Times plain splitting against the throughput engine at the chosen threshold; writes ``engine.csv``."""
    sample = report.collected
    picked = representative(sample.record.confidence[sample.index], sample.record.confidence, args.timing_images)
    images = sample.images[torch.from_numpy(picked)]
    rows: list[tuple[Timing, Timing]] = []
    for size in ENGINE_BATCHES:
        if size <= len(images):
            kept = images[: max(size, len(images) // 4)] if size == 1 else images
            eta = float(report.threshold or 0.0)
            rows.append(
                compare_engine(
                    model,
                    kept,
                    eta,
                    batch_size=size,
                    fine_batch_size=args.batch_size,
                    rounds=args.rounds,
                    max_seconds=args.max_seconds,
                )
            )
    lines = [f"{'coarse batch':>12}  {'split ms/image':>14}  {'engine ms/image':>15}  {'saved':>6}"]
    cells = ["batch_size,split_ms,engine_ms,share_refined"]
    for split, engine in rows:
        saved = f"{100 * (1 - engine.ms / split.ms):.0f} %"
        lines.append(f"{split.batch_size:>12}  {split.ms:>14.3f}  {engine.ms:>15.3f}  {saved:>6}")
        cells.append(f"{split.batch_size},{split.ms:.6g},{engine.ms:.6g},{engine.share_refined:.6g}")
    with atomic_path(report.directory / "engine.csv") as temporary:
        temporary.write_text("\n".join(cells) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _export(model: VisionMamba, report: Report, target: Path) -> None:
    assert is_two_stage(model)
    assert report.threshold is not None
    model.threshold = report.threshold
    figures = {key: report.data[key] for key in ("threshold", "table", "choice", "images", "machine", "date")}
    save_safetensors(model.cpu(), target, {"report": figures})


def _data(args: argparse.Namespace, model: VisionMamba, checkpoint: Path) -> EvalData:
    return validation_loader(
        model,
        checkpoint,
        args.data,
        split=args.split,
        batch_size=args.batch_size,
        num_workers=args.workers,
        length=args.length,
        skip_bad_files=args.skip_bad,
        input_key=args.input_key,
        target_key=args.target_key,
    )


def _run(args: argparse.Namespace) -> int:
    target = chosen_target(args)
    checkpoint = find_weights(args.checkpoint)
    model = ready_model(
        checkpoint,
        name=args.model,
        device=args.device,
        alpha=args.alpha,
        img_size=image_size(args.img_size),
        values=value_range(args.value_range),
    )
    if not is_two_stage(model):
        for name in ("threshold", "export", "engine"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs a MambaScope; this is a one-stage model")
        if target is not None:
            raise ValueError("targets choose the threshold of a MambaScope; this is a one-stage model")
    if target is not None and args.threshold is not None:
        raise ValueError("give a target or --threshold, not both")
    if args.export and Path(args.export).suffix != ".safetensors":
        raise ValueError(f"--export must name a .safetensors file, got {args.export!r}")
    data = _data(args, model, checkpoint)
    # nothing is written into the package itself
    beside = Path("runs") / f"eval_{args.checkpoint}" if checkpoint in SHIPPED.values() else checkpoint.parent / "eval"
    out = Path(args.out) if args.out else beside
    print(f"evaluating on {data.name}", file=sys.stderr)
    options = ReportOptions(
        name=model.description.get("model"),
        object_masks=data.object_masks,
        calibration_loader=data.calibration,
        threshold=args.threshold,
        target=target or Target(),
        measure_thresholds=args.measure,
        batch_sizes=(args.batch_size, 1),
        timing_images=args.timing_images,
        rounds=args.rounds,
        max_seconds=args.max_seconds,
        published=args.published,
        figures=not args.no_figures,
        progress=sys.stderr.isatty(),
    )
    report = write_report(model, data.loader, out, options)
    if args.engine and is_two_stage(model):
        print("\n" + engine_table(model, report, args))
    if target is not None or args.export:
        exported = Path(args.export) if args.export else out / WEIGHTS
        _export(model, report, exported)
        print(f"\nthreshold {report.threshold:.4f} ({report.data['choice']['rule']}) stored in {exported}")
    print(f"report: {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
