"""What a report on a MambaEye measures: accuracy by image size, scan pattern and choice, early stopping, other models.

Choice of the stopping threshold: of all that keep top-1 within half a point of reading every glimpse, the one that
reads the fewest. It is made on calibration images if there are any, otherwise on the evaluated ones; the report says
which. Too few images to decide leave the usual threshold (:mod:`mambascope.evaluation.choice`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mambascope.evaluation.choice import CONFIDENCE, binomial_interval, images_for_drop
from mambascope.eye.choice import make_chooser
from mambascope.eye.curves import GlimpseCurve, Pictures, StopOptions, batches, evaluate_glimpses, evaluate_stopping
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.model import MambaEye
from mambascope.models.cost import stage_macs
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.utils import evaluating, model_device

DROP = 0.005  # accuracy that early stopping may cost
USUAL_THRESHOLD = 0.8  # where nothing decides
Canvas = int | tuple[int, int] | None


@dataclass(frozen=True)
class ReportOptions:
    """What a report measures, and how.

    Attributes:
        sizes: Canvas sides to evaluate; ``None`` for the glimpses' alone. The first equal to the glimpses' canvas (else
            the first) also gets early stopping, patterns and choices.
        patterns: Further scan patterns.
        choices: Ways to choose glimpses; see :func:`mambascope.eye.choice.make_chooser`.
        sharpness: Of the choices.
        stop: Early stopping; ``None`` for none.
        limit: Most images.
        batch_size: Images per pass.
        chunk: Glimpses whose logits exist at once.
        seed: Of the positions.
        figures: Whether to draw.
        progress: Whether to show progress bars.
    """

    sizes: Sequence[Canvas] | None = None
    patterns: Sequence[str] = ()
    choices: Sequence[str] = ()
    sharpness: float = 2.0
    stop: StopOptions | None = StopOptions()  # noqa: RUF009 (frozen)
    limit: int | None = None
    batch_size: int = 64
    chunk: int = 128
    seed: int = 0
    figures: bool = True
    progress: bool = False


@dataclass
class Measurements:
    """What was measured.

    Attributes:
        options: How images became sequences on the canvas of early stopping, patterns and choices.
        size: Label of that canvas.
        curves: Accuracy by canvas label.
        orders: Accuracy on that canvas by scan pattern or choice; the options' pattern is the first.
        costs: Model steps per glimpse of each order.
        peers: Accuracy (0 to 1) and GFLOPs of other models by name and canvas label.
        stopping: Thresholds and what they give; ``None`` without early stopping.
    """

    options: GlimpseOptions
    size: str
    curves: dict[str, GlimpseCurve]
    orders: dict[str, GlimpseCurve]
    costs: dict[str, float]
    peers: dict[str, dict[str, tuple[float, float]]]
    stopping: dict[str, Any] | None = None

    @property
    def base(self) -> GlimpseCurve:
        """Accuracy of the options' pattern on their canvas."""
        return self.curves[self.size]


def size_label(size: int | tuple[int, int] | None) -> str:
    """How a canvas is called."""
    if size is None:
        return "native"
    return f"{size}²" if isinstance(size, int) else f"{size[0]}x{size[1]}"


def vim_accuracy(
    model: VisionMamba,
    pictures: Pictures,
    size: int,
    *,
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and GFLOPs per image of a Vim or MambaScope at an image size; its position tables follow."""
    from mambascope.models.preprocessing import make_transform

    model.set_input_size((size, size))
    transform, device = make_transform(model), model_device(model)
    hits = count = refined = 0
    with evaluating(model):
        for _, images, labels in batches(pictures, batch_size, limit):
            x = torch.stack([transform(image) for image in images]).to(device)
            if isinstance(model, MambaScope):
                output = model.forward_scope(x)
                logits = output.logits
                refined += int((~output.exited).sum())
            else:
                logits = model(x)
                refined += len(images)
            hits += int((logits.argmax(1).cpu() == labels).sum())
            count += len(images)
    cost = stage_macs(model.config, (size, size), convention="both_directions")
    return hits / count, cost.gflops(refined / count)


def measure(
    model: MambaEye,
    pictures: Pictures,
    options: GlimpseOptions,
    report: ReportOptions,
    *,
    calibration: Pictures | None = None,
    vims: Mapping[str, VisionMamba] | None = None,
) -> Measurements:
    """Measures what a report shows.

    Args:
        model: The model.
        pictures: Labelled images.
        options: Glimpses, scan pattern and canvas; the patch size is the model's.
        report: What is measured.
        calibration: Images to choose the stopping threshold on.
        vims: Other models, by name, evaluated on the same images at the same sizes.

    Raises:
        ValueError: If an option does not have an accepted value, or there is no image.
    """
    sizes = list(dict.fromkeys(report.sizes if report.sizes is not None else [options.canvas_size]))
    main = options.canvas_size if options.canvas_size in sizes else sizes[0]

    def bar(text: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        images = len(pictures) if report.limit is None else min(len(pictures), report.limit)
        count = math.ceil(images / max(1, report.batch_size))
        return lambda parts: tqdm(parts, desc=text, total=count, leave=False, disable=not report.progress)

    def run(text: str, sequences: GlimpseOptions, **more: Any) -> GlimpseCurve:
        how: dict[str, Any] = {
            "seed": report.seed,
            "batch_size": report.batch_size,
            "chunk": report.chunk,
            "limit": report.limit,
        }
        return evaluate_glimpses(model, pictures, sequences, progress=bar(text), **how, **more)

    curves = {}
    for size in sizes:
        stop = report.stop if size == main else None
        curves[size_label(size)] = run(size_label(size), replace(options, canvas_size=size), stop=stop)
    options = replace(options, canvas_size=main)
    orders = {options.pattern: curves[size_label(main)]}
    costs = {options.pattern: 1.0}
    for pattern in report.patterns:
        if pattern not in orders:
            orders[pattern], costs[pattern] = run(pattern, replace(options, pattern=pattern)), 1.0
    for choice in report.choices:
        chooser = make_chooser(choice, model, options.length, report.sharpness)
        orders[choice], costs[choice] = run(choice, options, chooser=chooser), chooser.cost
    peers = {name: _peer(vim, pictures, sizes, report) for name, vim in (vims or {}).items()}
    measured = Measurements(options, size_label(main), curves, orders, costs, peers)
    if report.stop is not None:
        measured.stopping = _stopping(model, pictures, measured, report, report.stop, calibration)
    return measured


def _peer(
    vim: VisionMamba, pictures: Pictures, sizes: Sequence[Canvas], report: ReportOptions
) -> dict[str, tuple[float, float]]:
    """Accuracy and GFLOPs of another model on square canvases, by their labels."""
    trained = vim.config.image_hw
    sides = [size for size in sizes if isinstance(size, int)]
    how = {"batch_size": report.batch_size, "limit": report.limit}
    tops = {size_label(side): vim_accuracy(vim, pictures, side, **how) for side in sides}  # type: ignore[arg-type]
    vim.set_input_size(trained)
    return tops


def _drop_interval(whole: int, stopped: int, images: int) -> tuple[float, float]:
    """Interval of the drop from `whole` to `stopped` right answers, whichever images they are of."""
    each = (1 + CONFIDENCE) / 2
    (low, high), (least, most) = (binomial_interval(hits, images, each) for hits in (whole, stopped))
    return low - most, high - least


def _stopping(
    model: MambaEye,
    pictures: Pictures,
    measured: Measurements,
    report: ReportOptions,
    stop: StopOptions,
    calibration: Pictures | None,
) -> dict[str, Any]:
    """Chooses a threshold per criterion, and really runs the first one with it."""
    options, base = measured.options, measured.base
    how: dict[str, Any] = {"batch_size": report.batch_size, "limit": report.limit, "seed": report.seed}
    chosen_on = base
    if calibration is not None:
        chosen_on = evaluate_glimpses(model, calibration, options, stop=stop, **{**how, "seed": how["seed"] + 1})
    needed = images_for_drop(DROP)
    result: dict[str, Any] = {
        "chosen_on": "evaluated images" if calibration is None else "calibration images",
        "images": chosen_on.images,
        "images_needed": needed,
        "decided": chosen_on.images >= needed,
        "all_glimpses": {"top1": float(base.top1[-1]), "glimpses": options.length},
        "criteria": {},
    }
    for here, there in zip(base.stops, chosen_on.stops, strict=True):
        k = there.choose(float(chosen_on.top1[-1]) - DROP)
        if chosen_on.images < needed:
            k = int(np.abs(there.thresholds - USUAL_THRESHOLD).argmin())
        result["criteria"][here.criterion] = {
            "threshold": float(here.thresholds[k]),
            "drop_interval": list(_drop_interval(int(chosen_on.hits[-1]), int(there.hits[k]), chosen_on.images)),
            "top1": float(here.top1[k]),
            "mean_glimpses": float(here.mean_glimpses[k]),
        }
    criterion = base.stops[0].criterion
    top1, used, _ = evaluate_stopping(
        model,
        pictures,
        options,
        threshold=result["criteria"][criterion]["threshold"],
        criterion=criterion,
        stop=stop,
        **how,
    )
    result["measured"] = {"criterion": criterion, "top1": top1, "mean_glimpses": used}
    result["as_many_for_every_image"] = base.needed(top1)
    return result
