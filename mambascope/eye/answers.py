"""Answers of a MambaEye for image files, a batch at a time, with the glimpses that they rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mambascope.data.batches import Skipped
from mambascope.data.errors import DataError
from mambascope.data.files import Source
from mambascope.data.image_io import BadImageError, open_image
from mambascope.eye.curves import Chooser, read_glimpses
from mambascope.eye.dataset import GlimpseOptions, ImageGlimpses
from mambascope.eye.glimpses import Placement
from mambascope.eye.model import MambaEye
from mambascope.eye.stopping import answer_when_sure
from mambascope.models.preprocessing import stored_value_range
from mambascope.utils import CommandError, evaluating

_NEVER = 2.0  # a threshold that no confidence reaches
_STRIDE = 256  # glimpses read at once where nothing is checked in between
_MIN_COVERAGE = 0.05  # no image stops below this information ratio


@dataclass(frozen=True)
class EyePrediction:
    """One image's answer.

    Attributes:
        file: Its path as given.
        label: Name of the class, or its number.
        class_index: Number of the class.
        confidence: Probability of the answer, 0 to 1; it cannot be much larger than the coverage.
        sure: Confidence measured against what has been seen, 0 to 1.
        glimpses: Glimpses read.
        coverage: Share of the image they show.
        stopped: Whether it stopped because it was sure.
    """

    file: str
    label: str
    class_index: int
    confidence: float
    sure: float
    glimpses: int
    coverage: float
    stopped: bool


def predict_eye(
    model: MambaEye,
    sources: Iterator[Source],
    options: GlimpseOptions,
    *,
    threshold: float | None = None,
    chooser: Chooser | None = None,
    every: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    skipped: Skipped | None = None,
    check: Callable[[Placement], object] | None = None,
) -> Iterator[tuple[list[EyePrediction], ImageGlimpses, list[Source]]]:
    """Answers for images, a batch at a time, with the glimpses they rest on.

    Args:
        model: The model.
        sources: Image files.
        options: How images become sequences.
        threshold: Confidence, for what has been seen, to stop at; ``None`` reads every glimpse.
        chooser: Chooses the positions instead of the options' scan pattern.
        every: Glimpses between two checks of the threshold.
        seed: Of random positions.
        batch_size: Images at a time.
        skipped: What to do with files that cannot be read.
        check: Called with every placement; raises :class:`DataError` for an image that the chooser cannot do.
    """
    pictures = _pictures(model, sources, options, skipped or Skipped(False), check)
    number, batch, failure, more = 0, [], None, True
    while more and failure is None:
        try:
            pair = next(pictures, None)
        except CommandError as error:  # what was read before it is answered first
            pair, failure = None, error
        more = pair is not None
        if pair is not None:
            batch.append(pair)
        if batch and (len(batch) == batch_size or not more):
            files = [file for file, _ in batch]
            seeds = [(seed, number + i) for i in range(len(files))]
            glimpses = read_glimpses([picture for _, picture in batch], options, seeds, chooser)
            yield _answers(model, files, glimpses, threshold, every), glimpses, files
            number, batch = number + len(files), []
    if failure is not None:
        raise failure


def _pictures(
    model: MambaEye,
    sources: Iterator[Source],
    options: GlimpseOptions,
    skipped: Skipped,
    check: Callable[[Placement], object] | None,
) -> Iterator[tuple[Source, Any]]:
    """The files that can be read, with their pictures."""
    values = stored_value_range(model)
    for source in sources:
        try:
            picture = open_image(source.path, None, model.in_chans, values)
            # an image that cannot be placed, or has points outside, is named now and not in the middle of a batch
            placement = options.place(picture)[1]
            if check is not None:
                check(placement)
        except DataError as error:
            skipped.add(error if isinstance(error, BadImageError) else BadImageError(f"{source.path}: {error}"))
        else:
            yield source, picture


def _answers(
    model: MambaEye, files: Sequence[Source], glimpses: ImageGlimpses, threshold: float | None, every: int
) -> list[EyePrediction]:
    with evaluating(model):
        result = answer_when_sure(
            model,
            glimpses,
            threshold=_NEVER if threshold is None else threshold,
            min_coverage=_MIN_COVERAGE,
            every=_STRIDE if threshold is None else every,
        )
    probabilities = result.logits.float().softmax(1).cpu()
    classes = probabilities.argmax(1).tolist()
    labels = model.labels
    return [
        EyePrediction(
            str(file.path),
            str(labels[index]) if labels and index < len(labels) else str(index),
            index,
            float(probabilities[i, index]),
            float(result.confidence[i]),
            int(result.used[i]),
            float(result.coverage[i]),
            bool(result.exited[i]),
        )
        for i, (file, index) in enumerate(zip(files, classes, strict=True))
    ]
