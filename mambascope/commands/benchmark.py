"""The command of ``tools/benchmark.py``: time per image of models in every form that this machine can run."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mambascope._names import as_json
from mambascope.commands.options import image_size
from mambascope.data.open import validation_loader
from mambascope.evaluation.forms import FORMS, Classifier, Unavailable, logits_of, shares_of_batches
from mambascope.evaluation.machine import machine_info
from mambascope.evaluation.memory import peak_memory
from mambascope.evaluation.throughput import interleaved, quartiles
from mambascope.models.checkpoint import load_model
from mambascope.models.export import has_stages
from mambascope.models.two_stage import is_two_stage
from mambascope.models.weights import SHIPPED, find_weights
from mambascope.ops.native import library
from mambascope.utils import atomic_path, run_command, share, unpack

_DEFAULT = ("eager", "frozen")


def classifier(name: str, size: tuple[int, int] | None) -> nn.Module:
    """A classifier in evaluation mode by the name of shipped weights, a path of weights, or a name of timm's registry.

    Raises:
        ValueError: If there is nothing of that name, or it cannot have the size.
    """
    if name in SHIPPED or Path(name).exists():
        model: Any = load_model(find_weights(name))
    elif timm.is_model(name):
        try:
            model = timm.create_model(name)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"timm does not make {name}: {error}") from None
    else:
        raise ValueError(f"{name} is neither a file nor a model of timm's registry nor one of {', '.join(SHIPPED)}")
    if size is not None and hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=size)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"{name} does not take images of {size[0]} x {size[1]} pixels: {error}") from None
    return model.eval()


def input_shape(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of a model's images."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "image_hw"):
        return (config.in_chans, *(size or config.image_hw))
    channels, height, width = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return (channels, *(size or (height, width)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time per image and memory of classifiers on the CPU, in every form in which they run, in "
        "interleaved rounds.",
        epilog="The images are noise: how many are refined is set, not decided by a threshold. Machines differ and are "
        "shared: compare the ratios of one run. Memory is what the largest batch takes on top of the loaded model.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="shipped weights, a checkpoint, or a name of timm's")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(_DEFAULT), help="default: eager frozen")
    parser.add_argument("--batch", nargs="+", type=_positive, default=[1, 8, 64], metavar="B", help="default: 1 8 64")
    parser.add_argument(
        "--refined",
        nargs="+",
        type=float,
        default=[0.0, 0.5, 1.0],
        metavar="SHARE",
        help="shares of the images that a MambaScope refines; default: 0 0.5 1",
    )
    parser.add_argument(
        "--data", metavar="DATA", help="measure the accuracy of every form, too, on data as for eval_cls"
    )
    parser.add_argument("--length", type=_positive, default=1000, help="images of --data scopedigits; default: 1000")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels")
    parser.add_argument("--rounds", type=_positive, default=15, help="timed rounds; default: 15")
    parser.add_argument("--seconds", type=float, default=120, help="rough limit for each batch size; default: 120")
    parser.add_argument("--threads", type=_positive, help="default: what torch takes")
    parser.add_argument("--out", default="benchmark", metavar="DIR", help="folder of the results; default: benchmark")
    return parser


def _subjects(
    models: dict[str, nn.Module], forms: Sequence[str], images: dict[str, Tensor], part: float
) -> tuple[dict[tuple[str, str], Classifier], list[dict[str, Any]], dict[tuple[str, str], float | None]]:
    """What can be timed, a row for what cannot, with the reason, and the MiB that a batch takes in every form.

    Two-stage models refine a share `part` of it.
    """
    subjects, missing, memory = {}, [], {}
    for name, model in models.items():
        for form in forms:
            print(f"{name}: {form}", flush=True)
            try:
                subject = FORMS[form](model, images[name])
                x = images[name]
                refined = max(shares_of_batches(len(x), part)) if is_two_stage(model) else 0
                with torch.inference_mode():  # its first run: nothing of it is held yet
                    memory[name, form] = peak_memory(partial(_each, subject, x, [refined]))
                    subject.run(x[:1], 1)  # a second look that fails shall fail here
                subjects[name, form] = subject
            except Unavailable as reason:
                missing.append({"model": name, "form": form, "note": str(reason)})
            except Exception as error:  # what others' compilers and exporters raise has no common class
                text = " ".join(str(error).split())[:160]
                missing.append({"model": name, "form": form, "note": f"failed: {type(error).__name__}: {text}"})
    return subjects, missing, memory


@torch.inference_mode()
def _times(
    models: dict[str, nn.Module],
    subjects: dict[tuple[str, str], Classifier],
    images: dict[str, Tensor],
    memory: dict[tuple[str, str], float | None],
    batch: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of one batch size."""
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for (name, form), subject in subjects.items():
        parts = args.refined if is_two_stage(models[name]) else [1.0]
        for part in parts:
            counts = shares_of_batches(batch, part)
            key = f"{name}|{form}|{part}"
            refined = sum(counts) / (batch * len(counts))
            label = f"{name}, {refined:.0%} refined" if is_two_stage(models[name]) else name
            rows[key] = {"model": label, "form": form, "batch": batch, "refined": refined}
            measured = batch == max(args.batch) and part == max(parts)
            run = partial(_each, subject, images[name], counts)
            calls = _calls(run)
            rows[key]["images"] = batch * len(counts) * calls
            rows[key]["peak_mib"] = memory[name, form] if measured else None
            runs[key] = partial(_repeat, run, calls)
    label = f"batch {batch}"
    if not sys.stderr.isatty():
        print(label, flush=True)
    progress = label if sys.stderr.isatty() else None
    limits = {"rounds": args.rounds, "warmup": 2, "max_seconds": args.seconds, "progress": progress}
    seconds = interleaved(runs, torch.device("cpu"), **limits)
    for key, row in rows.items():
        low, middle, high = (1e3 * value / row["images"] for value in quartiles(seconds[key]))
        row |= {"ms_per_image": middle, "low": low, "high": high, "rounds": len(seconds[key])}
        row["ratio"] = row["ms_per_image"] / next(iter(rows.values()))["ms_per_image"]
        del row["images"]
    return list(rows.values())


_LEAST_SECONDS = 0.02  # of a reading: shorter calls are repeated, for others in between empty the caches


def _calls(run: Callable[[], Any]) -> int:
    run()
    start = time.perf_counter()
    run()
    return min(50, 1 + int(_LEAST_SECONDS / (time.perf_counter() - start)))


def _repeat(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


def _each(subject: Classifier, images: Tensor, counts: Sequence[int]) -> None:
    for refined in counts:
        subject.run(images, refined)


def _data(name: str, model: Any, args: argparse.Namespace) -> Iterable[Any]:
    return validation_loader(model, find_weights(name), args.data, batch_size=64, length=args.length).loader


@torch.inference_mode()
def _accuracies(
    models: dict[str, Any], subjects: dict[tuple[str, str], Classifier], loaders: dict[str, Iterable[Any]]
) -> dict[tuple[str, str, float], float]:
    """Top-1 in per cent of every form, of two-stage models without and with everything refined."""
    right: dict[tuple[str, str, float], float] = {}
    for name, model in models.items():
        parts = (0.0, 1.0) if is_two_stage(model) else (1.0,)
        count = 0
        for batch in loaders[name]:
            images, labels = unpack(batch)
            count += len(labels)
            for (other, form), subject in subjects.items():
                for part in parts if other == name else ():
                    answers = logits_of(subject.run(images, len(images) if part else 0)).argmax(1)
                    key = name, form, part
                    right[key] = right.get(key, 0.0) + float((answers == labels).sum())
        right |= {key: 100 * value / count for key, value in right.items() if key[0] == name}
    return right


def _show(rows: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["model"]) for row in rows)
    accurate = any("top1" in row for row in rows)
    heads = f"{'batch':>5} {'ms/image':>9} {'ratio':>6} {'peak MiB':>9}"
    print(f"{'model':<{width}}  {'form':<9} {heads}" + "  top-1" * accurate)
    for row in rows:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        figures = f"{row['batch']:>5} {row['ms_per_image']:>9.3f} {row['ratio']:>6.2f} {peak:>9}"
        top1 = f" {row['top1']:>6.2f}" if row.get("top1") is not None else ""
        print(f"{row['model']:<{width}}  {row['form']:<9} {figures}{top1}")
    for row in missing:
        print(f"{row['model']}: {row['form']} was not timed: {row['note']}")


def _write(folder: Path, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    from mambascope.plotting.forms import plot_forms

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "benchmark.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with atomic_path(folder / "benchmark.json") as temporary:
        temporary.write_text(as_json(facts, indent=2) + "\n", encoding="utf-8")
    times: dict[int, dict[str, dict[str, float]]] = {}
    for row in rows:
        times.setdefault(row["batch"], {}).setdefault(row["form"], {})[row["model"]] = row["ms_per_image"]
    level = library.info()["isa"] or "no compiled kernels"
    title = f"{facts['machine']['cpu']}, {facts['machine']['threads']} threads, instruction level {level}"
    plot_forms(times, folder / "benchmark.png", title)


def _run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    size = image_size(args.img_size)
    args.refined = [share("--refined", value) for value in args.refined]
    models = {name: classifier(name, size) for name in dict.fromkeys(args.models)}
    if args.data is not None and (foreign := [name for name, model in models.items() if not has_stages(model)]):
        raise ValueError(f"--data takes models of this package, {foreign[0]} is none")
    loaders = {} if args.data is None else {name: _data(name, model, args) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    shapes = {name: input_shape(model, size) for name, model in models.items()}
    largest = max(args.batch)
    images = {name: torch.randn(largest, *shape, generator=generator) for name, shape in shapes.items()}
    subjects, missing, memory = _subjects(models, args.forms, images, max(args.refined))
    if not subjects:
        raise ValueError("; ".join(f"{row['model']}: {row['form']}: {row['note']}" for row in missing))
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        rows += _times(models, subjects, {name: x[:batch] for name, x in images.items()}, memory, batch, args)
    if args.data is not None:
        accuracies = _accuracies(models, subjects, loaders)
        for row in rows:
            name = row["model"].removesuffix(f", {row['refined']:.0%} refined")
            row["top1"] = accuracies.get((name, row["form"], row["refined"]))
    facts = {
        "machine": machine_info(torch.device("cpu")),
        "native": library.info() | {"path": None},
        "sizes": {name: list(shape) for name, shape in shapes.items()},
        "ratio_to": f"{rows[0]['model']}, {rows[0]['form']}, at the same batch size",
        "not_timed": missing,
    }
    _write(Path(args.out), rows, facts)
    _show(rows, missing)
    print(f"written to {args.out}: benchmark.csv, benchmark.json, benchmark.png")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch").setLevel(logging.ERROR)
    return run_command(lambda: _run(args))
