"""Accuracy of a MambaEye against the number of glimpses, in one causal pass over every image.

Images are read in chunks of glimpses with the carried state, so that logits exist for one chunk at a time, and only
counts are kept: memory depends neither on the number of images nor on the length of the sequences. B images of a batch,
L glimpses, C classes, K thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambascope.eye.config import MambaEyeConfig
from mambascope.eye.dataset import GlimpseOptions, ImageGlimpses
from mambascope.eye.glimpses import information_ratio
from mambascope.eye.model import MambaEye
from mambascope.eye.placement import Placement
from mambascope.eye.stopping import AnytimeResult, CoverageGate, Glance, answer_when_sure
from mambascope.utils import evaluating, model_device

THRESHOLDS = tuple(i / 100 for i in range(5, 101))


class Pictures(Protocol):
    """Labelled images, read when they are needed."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __call__(self, index: int) -> tuple[Any, int]:
        """An RGB picture and its label."""
        ...


Chooser = Callable[[Sequence[Tensor], Sequence[Placement], Sequence[Sequence[int]]], Sequence[Any]]
"""Chooses positions [L, 2] of each image from their canvases [C, H, W], placements and seeds."""


def glimpse_macs(config: MambaEyeConfig) -> int:
    """Multiply-adds of one glimpse: projections, convolution, state update, head. Norms and activations are left out.

    It does not depend on how many glimpses came before.
    """
    inner, heads = config.inner_dim, config.inner_dim // config.head_dim
    conv = inner + 2 * config.d_state
    layer = config.embed_dim * (inner + conv + heads) + inner * config.embed_dim + config.d_conv * conv
    layer += 3 * inner * config.d_state  # decay, update and read-out of the state
    return config.embed_dim * (config.input_dim + config.num_classes) + config.depth * layer


@dataclass
class StopCurve:
    """Early stopping at every threshold of a criterion.

    Attributes:
        criterion: See :func:`mambascope.eye.stopping.corrected_confidence`.
        thresholds: [K].
        used: Glimpses read by all images together [K].
        hits: Images answered correctly [K].
        images: Images.
    """

    criterion: str
    thresholds: NDArray[np.float64]
    used: NDArray[np.int64]
    hits: NDArray[np.int64]
    images: int = 0

    @property
    def mean_glimpses(self) -> NDArray[np.float64]:
        """Glimpses per image [K]."""
        return self.used / max(1, self.images)

    @property
    def top1(self) -> NDArray[np.float64]:
        """Accuracy [K], 0 to 1."""
        return self.hits / max(1, self.images)

    def choose(self, least: float) -> int:
        """Index of the threshold with the fewest glimpses among those with at least this accuracy (0 to 1).

        If there is none, the most accurate one.
        """
        good = np.flatnonzero(self.top1 >= least)
        if not len(good):
            return int(self.top1.argmax())
        return int(good[self.used[good].argmin()])


@dataclass
class GlimpseCurve:
    """What one pass over the images measured.

    Attributes:
        options: How images became sequences.
        hits: Images answered correctly after each glimpse [L].
        coverage: Sum of the information ratio after each glimpse [L].
        images: Images.
        stops: Early stopping by several criteria.
    """

    options: GlimpseOptions
    hits: NDArray[np.int64]
    coverage: NDArray[np.float64]
    images: int = 0
    stops: list[StopCurve] = field(default_factory=list)

    @property
    def top1(self) -> NDArray[np.float64]:
        """Accuracy after each glimpse [L], 0 to 1."""
        return self.hits / max(1, self.images)

    @property
    def mean_coverage(self) -> NDArray[np.float64]:
        """Mean information ratio after each glimpse [L]."""
        return self.coverage / max(1, self.images)

    def needed(self, least: float) -> int | None:
        """Glimpses after which accuracy first reaches ``least`` (0 to 1); ``None`` if it never does."""
        reached = np.flatnonzero(self.top1 >= least)
        return int(reached[0]) + 1 if len(reached) else None


@dataclass(frozen=True)
class StopOptions:
    """Which early stopping is measured besides.

    Attributes:
        criteria: Of :func:`mambascope.eye.stopping.corrected_confidence`.
        every: Glimpses between two checks.
        min_coverage: No image stops below this information ratio.
        thresholds: All at once, from the same pass.
    """

    criteria: tuple[str, ...] = ("confidence", "raw")
    every: int = 4
    min_coverage: float = 0.05
    thresholds: tuple[float, ...] = THRESHOLDS


def batches(
    pictures: Pictures, batch_size: int, limit: int | None = None, workers: int = 2
) -> Iterator[tuple[list[int], list[Any], Tensor]]:
    """Numbers, pictures and labels [B] of all images in order, decoded one batch ahead."""
    count = len(pictures) if limit is None else min(limit, len(pictures))
    starts = range(0, count, batch_size)
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:

        def submit(start: int) -> list[Any]:
            return [pool.submit(pictures, i) for i in range(start, min(start + batch_size, count))]

        waiting = submit(0) if count else []
        for start in starts:
            rows, waiting = waiting, submit(start + batch_size) if start + batch_size < count else []
            pairs = [row.result() for row in rows]
            labels = torch.tensor([label for _, label in pairs])
            yield list(range(start, start + len(pairs))), [picture for picture, _ in pairs], labels


def read_glimpses(
    images: Sequence[Any],
    options: GlimpseOptions,
    seeds: Sequence[Sequence[int]],
    chooser: Chooser | None = None,
) -> ImageGlimpses:
    """Glimpses of a batch: of the options' scan pattern, or as a chooser wants them."""
    if chooser is None:
        return ImageGlimpses.of_images(images, options, [tuple(seed) for seed in seeds])
    placed = [options.place(image) for image in images]
    canvases, placements = [canvas for canvas, _ in placed], [placement for _, placement in placed]
    positions = chooser(canvases, placements, seeds)
    ratios = [information_ratio(xy, p, options.patch_size) for xy, p in zip(positions, placements, strict=True)]
    return ImageGlimpses(canvases, positions, torch.from_numpy(np.stack(ratios)), options.patch_size)


def _stop_curves(stop: StopOptions | None) -> list[StopCurve]:
    """A curve without images for each criterion."""
    if stop is None:
        return []
    grid = np.array(stop.thresholds, dtype=np.float64)
    zeros = np.zeros(len(grid), np.int64)
    return [StopCurve(criterion, grid, zeros.copy(), zeros.copy()) for criterion in stop.criteria]


class _Stops:
    """Where each image of a batch stops at each threshold of one criterion."""

    def __init__(self, curve: StopCurve, options: StopOptions, batch: int) -> None:
        self.curve, self.options = curve, options
        self.gate = CoverageGate(curve.criterion, options.min_coverage)
        self.open = torch.ones(batch, len(curve.thresholds), dtype=torch.bool)
        self.thresholds = torch.from_numpy(curve.thresholds)

    def read(self, logits: Tensor, coverage: Tensor, correct: Tensor, start: int, length: int) -> None:
        """Checks a chunk of glimpses [B, l, ...] that begins after ``start`` of ``length``."""
        for i in range(logits.shape[1]):
            step = start + i + 1
            if step % self.options.every == 0 or step == length:
                self.check(logits[:, i], coverage[:, i], correct[:, i], step, step == length)

    def check(self, logits: Tensor, coverage: Tensor, correct: Tensor, step: int, last: bool) -> None:
        """Closes what is sure now (everything after the last glimpse) and counts it."""
        _, exited = self.gate.decide(Glance(logits, coverage), self.thresholds)
        closes = self.open if last else self.open & exited
        self.curve.used += step * closes.sum(0).numpy()
        self.curve.hits += (closes & correct[:, None]).sum(0).numpy()
        self.open = self.open & ~closes


def evaluate_glimpses(
    model: MambaEye,
    pictures: Pictures,
    options: GlimpseOptions,
    *,
    stop: StopOptions | None = None,
    chooser: Chooser | None = None,
    seed: int = 0,
    batch_size: int = 64,
    chunk: int = 128,
    limit: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> GlimpseCurve:
    """Accuracy after every glimpse.

    Args:
        model: The model.
        pictures: Labelled images.
        options: How they become sequences; the patch size is the model's.
        stop: Measure early stopping as well.
        chooser: Chooses the positions instead of the options' scan pattern.
        seed: Positions depend on it and on the image's number alone.
        batch_size: Images per pass.
        chunk: Glimpses whose logits [B, chunk, C] exist at once.
        limit: Most images.
        progress: Wraps the batches, to show how far it is.

    Raises:
        ValueError: If an option does not have an accepted value, or there is no image.
    """
    for name, value in (("batch_size", batch_size), ("chunk", chunk), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    options = replace(options, patch_size=model.config.patch_size)
    length, device = options.length, model_device(model)
    curve = GlimpseCurve(options, np.zeros(length, np.int64), np.zeros(length), stops=_stop_curves(stop))
    with evaluating(model):
        for numbers, images, labels in progress(batches(pictures, batch_size, limit)):
            glimpses = read_glimpses(images, options, [(seed, i) for i in numbers], chooser)
            curve.coverage += glimpses.ratios.double().sum(0).numpy()
            stops = [_Stops(c, stop, len(images)) for c in curve.stops] if stop is not None else []
            state, rows = model.start(len(images)), torch.arange(len(images))
            for start in range(0, length, chunk):
                patches, moves, ratios = glimpses.read(rows, start, min(start + chunk, length))
                features, state = model.forward_chunk(state, patches.to(device), moves.to(device))
                logits = model.forward_head(features).float().cpu()
                correct = logits.argmax(-1) == labels[:, None]
                curve.hits[start : start + chunk] += correct.sum(0).numpy()
                for part in stops:
                    part.read(logits, ratios, correct, start, length)
            curve.images += len(images)
            for c in curve.stops:
                c.images = curve.images
    if not curve.images:
        raise ValueError("there are no images to evaluate")
    return curve


def evaluate_stopping(
    model: MambaEye,
    pictures: Pictures,
    options: GlimpseOptions,
    *,
    threshold: float,
    criterion: str = "confidence",
    stop: StopOptions | None = None,
    chooser: Chooser | None = None,
    seed: int = 0,
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[float, float, int]:
    """Really stops early: finished images leave the batch and cost nothing more.

    Returns:
        Accuracy (0 to 1), glimpses per image, and images.
    """
    stop = stop or StopOptions()
    options = replace(options, patch_size=model.config.patch_size)
    hits = used = count = 0
    with evaluating(model):
        for numbers, images, labels in batches(pictures, batch_size, limit):
            glimpses = read_glimpses(images, options, [(seed, i) for i in numbers], chooser)
            result: AnytimeResult = answer_when_sure(
                model,
                glimpses,
                threshold=threshold,
                criterion=criterion,
                min_coverage=stop.min_coverage,
                every=stop.every,
            )
            hits += int((result.logits.cpu().argmax(1) == labels).sum())
            used += result.steps_computed
            count += len(images)
    if not count:
        raise ValueError("there are no images to evaluate")
    return hits / count, used / count, count
