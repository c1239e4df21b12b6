"""Measured time per image: real dynamic inference on real images, not a formula.

All modes are timed in one interleaved run (mode A, B, C, then B, C, A, …), so that clock drift and other load meet all
modes alike; the figure is the median over the rounds. CUDA is synchronised before every clock reading.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mambascope.evaluation.collect import Collected
from mambascope.models.engine import ScopePredictor
from mambascope.models.scope import MambaScope
from mambascope.utils import evaluating, model_device


@dataclass(frozen=True)
class Timing:
    """Time of one mode.

    Attributes:
        mode: ``"coarse"``, ``"refine_all"``, ``"dynamic"`` or a caller's name.
        batch_size: Images per call.
        images: Images per round.
        rounds: Timed rounds.
        ms: Median milliseconds per image.
        ms_low, ms_high: Quartiles over the rounds.
        threshold: η of a dynamic mode.
        share_refined: Share of the timed images that were refined.
    """

    mode: str
    batch_size: int
    images: int
    rounds: int
    ms: float
    ms_low: float
    ms_high: float
    threshold: float | None = None
    share_refined: float | None = None

    @property
    def images_per_s(self) -> float:
        """Images per second."""
        return 1e3 / self.ms

    def to_dict(self) -> dict[str, Any]:
        """All fields and the rate, for JSON."""
        return {**asdict(self), "images_per_s": self.images_per_s}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 1,
    max_seconds: float | None = None,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run in every round; the order rotates from round to round.

    Args:
        runs: What to time, by name.
        device: Synchronised before every clock reading.
        rounds: Timed rounds, at least 1.
        warmup: Rounds before them that are not timed.
        max_seconds: No further round is begun after that time, once three (or `rounds`) are done.
        progress: Label of a progress bar; ``None`` for none.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for step in tqdm(range(-warmup, rounds), desc=progress, unit="round", disable=progress is None, leave=False):
        if max_seconds is not None and step >= 3 and time.perf_counter() - begin > max_seconds:
            break
        for offset in range(len(names)):
            name = names[(step + offset) % len(names)]
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def representative(sample: np.ndarray, population: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Picks images to time whose confidences are spread like those of all images, so that their shares refined agree.

    Args:
        sample: Coarse confidences of the images at hand [K].
        population: Coarse confidences of all images [N].
        count: Images wanted, at most K.
        seed: Of the order in which they are returned (mixed, so that every batch is like the others).

    Returns:
        Indices into `sample` [min(count, K)].
    """
    count = min(count, len(sample))
    order = np.argsort(sample, kind="stable")
    ranks = np.sort(population)
    # middle rank where confidences are equal
    low, high = (np.searchsorted(ranks, sample[order], side=side) for side in ("left", "right"))
    quantile = (low + high) / (2 * len(ranks))
    indices: list[int] = []
    start = 0
    for j in range(count):
        stop = len(order) - (count - j) + 1  # leave enough for the others
        start += int(np.argmin(np.abs(quantile[start:stop] - (j + 0.5) / count)))
        indices.append(int(order[start]))
        start += 1
    return np.random.default_rng(seed).permutation(np.array(indices, dtype=int))


def _batches(images: Tensor, batch_size: int) -> list[Tensor]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(images):
        raise ValueError("there are no images to time")
    # whole batches only: a small last one would be timed as if it were full
    count = max(1, len(images) // batch_size) * batch_size
    return list(images[:count].split(batch_size))


def measure_scope(
    model: MambaScope,
    images: Tensor,
    thresholds: Iterable[float],
    *,
    batch_size: int,
    alpha: float | None = None,
    rounds: int = 7,
    max_seconds: float | None = None,
    progress: bool = False,
) -> list[Timing]:
    """Times the coarse stage alone, refining everything, and dynamic inference at `thresholds`.

    Args:
        model: On the device to measure.
        images: Real images [K, C, H, W]; moved to the model's device beforehand, so that loading is not timed.
        thresholds: η of the dynamic modes.
        batch_size: Images per call; images beyond the last whole batch are left out.
        alpha: Share of cells to refine; ``None`` for the model's.
        rounds: Timed rounds; each mode runs through all images once per round.
        max_seconds: Rough limit for everything; fewer rounds (at least 3) and then fewer images are timed to keep it.
        progress: Whether to show a progress bar.

    Returns:
        Timings: ``coarse`` (η = 0), ``refine_all`` (η = 1), then one ``dynamic`` per threshold, in order.
    """
    device = model_device(model)
    batches = _batches(images.to(device), batch_size)
    settings = [("coarse", 0.0), ("refine_all", 1.0), *(("dynamic", float(t)) for t in thresholds)]

    def passes(threshold: float) -> list[Tensor]:
        return [model.forward_scope(batch, threshold, alpha).exited for batch in batches]

    with evaluating(model):
        if max_seconds is not None:
            # modes between coarse only and everything refined cost about two thirds of the latter
            modes = len(settings) * 2 / 3
            batches, rounds = _fit(lambda x: model.forward_scope(x, 1.0, alpha), batches, modes, rounds, max_seconds)
        shares = [1 - float(torch.cat(passes(eta)).double().mean()) for _, eta in settings]
        seconds = interleaved(
            {str(i): partial(passes, eta) for i, (_, eta) in enumerate(settings)},
            device,
            rounds=rounds,
            warmup=0,  # the pass over the shares has warmed everything up
            max_seconds=max_seconds,
            progress=f"timing, batch {batch_size}" if progress else None,
        )
    total = sum(len(b) for b in batches)
    return [
        _timing(mode, batch_size, total, seconds[str(i)], eta if mode == "dynamic" else None, shares[i])
        for i, (mode, eta) in enumerate(settings)
    ]


def measure_all(
    model: MambaScope,
    sample: Collected,
    thresholds: Sequence[float],
    batch_sizes: Sequence[int],
    count: int = 384,
    *,
    rounds: int = 7,
    max_seconds: float | None = None,
    progress: bool = False,
) -> list[Timing]:
    """Times all modes at every batch size on about `count` sampled images; larger batches shrink to the sample.

    Args:
        model: On the device to measure.
        sample: Its answers on all images, and some of the images.
        thresholds: η of the dynamic modes.
        batch_sizes: Images per call.
        count: Images to time.
        rounds, max_seconds, progress: See :func:`measure_scope`.
    """
    timings: list[Timing] = []
    confidence = sample.record.confidence[sample.index.numpy()]
    count = min(count, len(confidence))
    for size in dict.fromkeys(min(int(s), count) for s in batch_sizes):
        # single images take several times longer each: a quarter of the sample is enough
        images = count // size * size if size > 8 else max(size, count // 4)
        indices = representative(confidence, sample.record.confidence, images)
        timings += measure_scope(
            model,
            sample.images[torch.from_numpy(indices)],
            thresholds,
            batch_size=size,
            rounds=rounds,
            max_seconds=max_seconds,
            progress=progress,
        )
    return timings


def _fit(
    forward: Callable[[Tensor], Any], batches: list[Tensor], modes: float, rounds: int, max_seconds: float
) -> tuple[list[Tensor], int]:
    """Batches and rounds that take about `max_seconds` for `modes` times what `forward` does, judged by one batch."""
    device = batches[0].device
    forward(batches[0])
    synchronize(device)
    start = time.perf_counter()
    forward(batches[0])
    synchronize(device)
    step = max(1e-9, (time.perf_counter() - start) * modes)
    rounds = max(min(rounds, 3), min(rounds, int(max_seconds / (step * len(batches))) - 1))
    keep = max(1, min(len(batches), int(max_seconds / (step * (rounds + 1)))))  # one more pass is for warming up
    return batches[:keep], rounds


def _timing(
    mode: str,
    batch_size: int,
    images: int,
    seconds: Sequence[float],
    threshold: float | None = None,
    share: float | None = None,
) -> Timing:
    low, mid, high = (1e3 * s / images for s in quartiles(seconds))
    return Timing(mode, batch_size, images, len(seconds), mid, low, high, threshold, share)


def compare_engine(
    model: MambaScope,
    images: Tensor,
    threshold: float,
    *,
    batch_size: int,
    fine_batch_size: int = 64,
    rounds: int = 7,
    max_seconds: float | None = None,
    progress: bool = False,
) -> tuple[Timing, Timing]:
    """Times splitting every batch on its own (``split``) against :class:`ScopePredictor` (``engine``) in one run.

    Args:
        model: On the device to measure.
        images: Real images [K, C, H, W].
        threshold: η.
        batch_size: Images per coarse pass.
        fine_batch_size: Images per fine pass of the engine.
        rounds: Timed rounds.
        max_seconds: See :func:`interleaved`.
        progress: Whether to show a progress bar.
    """
    device = model_device(model)
    batches = _batches(images.to(device), batch_size)
    total = sum(len(b) for b in batches)
    engine = ScopePredictor(model, threshold=threshold, fine_batch_size=fine_batch_size)

    def split() -> None:
        for batch in batches:
            model.forward_scope(batch, threshold)

    def stream() -> None:
        for _ in engine.stream((batch, None) for batch in batches):
            pass

    with evaluating(model):
        label = f"split against engine, batch {batch_size}" if progress else None
        runs = {"split": split, "engine": stream}
        seconds = interleaved(runs, device, rounds=rounds, max_seconds=max_seconds, progress=label)
    share = sum(engine.fine_batches) / total
    first, second = (_timing(name, batch_size, total, seconds[name], threshold, share) for name in ("split", "engine"))
    return first, second


def measure_model(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int,
    rounds: int = 7,
    max_seconds: float | None = None,
    progress: bool = False,
) -> Timing:
    """Times a one-stage model on `images` [K, C, H, W]; see :func:`measure_scope`."""
    device = model_device(model)
    batches = _batches(images.to(device), batch_size)

    def run() -> None:
        for batch in batches:
            model(batch)

    with evaluating(model):
        if max_seconds is not None:
            batches, rounds = _fit(model, batches, 1, rounds, max_seconds)
        label = f"timing, batch {batch_size}" if progress else None
        seconds = interleaved({"all": run}, device, rounds=rounds, max_seconds=max_seconds, progress=label)["all"]
    return _timing("all", batch_size, sum(len(b) for b in batches), seconds)
