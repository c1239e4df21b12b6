"""The command of ``tools/predict.py``: classes of images, with the stage that decided and the tokens it took.

Memory does not grow with the number of images: files are listed one folder at a time, decoded a few batches ahead, and
every result is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mambascope.commands.options import CHECKPOINT_HELP, add_value_range, image_size, value_range
from mambascope.data.batches import Skipped, load_batches, surveyed
from mambascope.data.files import LeftOut, Source, find_images
from mambascope.evaluation.choice import stored_rule
from mambascope.models.architectures import ARCHITECTURES, Architecture, architecture_of_entry, import_object
from mambascope.models.checkpoint import described_architecture, read_state_dict
from mambascope.models.engine import ScopePredictor
from mambascope.models.gate import confidence
from mambascope.models.preprocessing import make_transform, stored_value_range
from mambascope.models.ready import ready_model
from mambascope.models.scope import MambaScope
from mambascope.models.states import ScopeOutput
from mambascope.models.two_stage import is_two_stage
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import find_weights
from mambascope.utils import CommandError, RowWriter, open_output, run_command

FORMATS = ("table", "jsonl", "csv")


@dataclass(frozen=True)
class Prediction:
    """One image's answer.

    Attributes:
        file: Its path as given.
        label: Name of the class, or its number.
        class_index: Number of the class.
        confidence: Probability of the answer, 0 to 1.
        stage: ``"coarse"`` or ``"fine"``; ``"single"`` for a one-stage model.
        tokens: Tokens read over both stages, CLS included.
        coarse_confidence: Probability of the coarse answer; that of the answer for a one-stage model.
    """

    file: str
    label: str
    class_index: int
    confidence: float
    stage: str
    tokens: int
    coarse_confidence: float


def predict(
    model: VisionMamba, batches: Iterable[tuple[Tensor, list[Source]]], fine_batch_size: int = 64
) -> Iterator[tuple[list[Prediction], Tensor, ScopeOutput | None, list[Source]]]:
    """Answers for batches of images, in order, with what is needed to draw them (no output for a one-stage model).

    An error of ``batches`` comes after the answers to all batches before it.
    """
    labels = model.labels
    stopped: list[Exception] = []

    def until_stopped() -> Iterator[tuple[Tensor, list[Source]]]:
        try:
            yield from batches
        except (CommandError, OSError, ValueError) as error:
            stopped.append(error)  # images that wait for a full fine batch are answered first

    def name(index: int) -> str:
        return str(labels[index]) if labels and index < len(labels) else str(index)

    if is_two_stage(model):
        engine = ScopePredictor(model, fine_batch_size=fine_batch_size)
        for output, (images, files) in engine.stream((images, (images, files)) for images, files in until_stopped()):
            final, best = confidence(output.logits).tolist(), output.logits.argmax(1).tolist()
            coarse, exited, tokens = output.confidence.tolist(), output.exited.tolist(), output.tokens.tolist()
            rows = [
                Prediction(
                    str(f.path), name(best[i]), best[i], final[i], ("fine", "coarse")[exited[i]], tokens[i], coarse[i]
                )
                for i, f in enumerate(files)
            ]
            yield rows, images, output, files
        if stopped:
            raise stopped[0]
        return
    device = next(model.parameters()).device
    for images, files in batches:
        with torch.inference_mode():
            logits = model(images.to(device))
        count = 1 + _patches(model, images)
        sure, best = confidence(logits).tolist(), logits.argmax(1).tolist()
        rows = [
            Prediction(str(f.path), name(best[i]), best[i], sure[i], "single", count, sure[i])
            for i, f in enumerate(files)
        ]
        yield rows, images, None, files


def _patches(model: VisionMamba, images: Tensor) -> int:
    rows, cols = model.patch_embed.grid_size(images.shape[-2], images.shape[-1])
    return rows * cols


def write_prediction(writer: RowWriter, row: Prediction) -> None:
    """Writes one answer."""
    writer.write(asdict(row), row.label, f"{row.confidence:>10.3f}  {row.stage:<6}  {row.tokens:>6}  {row.file}")


def save_pictures(
    model: MambaScope, images: Tensor, output: ScopeOutput, files: Sequence[Source], folder: Path
) -> None:
    """Writes one picture per image: heat map and refined cells. Sub-folders of the input are kept."""
    from mambascope.evaluation.examples import make_examples
    from mambascope.plotting import draw_example

    examples = make_examples(model, images, output, class_names=model.labels, names=[f.name for f in files])
    for example, file in zip(examples, files, strict=True):
        draw_example(example, folder / f"{file.name}.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Classify images; show which stage decided and the tokens it took.")
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("inputs", nargs="+", help="image files and folders")
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to the screen")
    parser.add_argument("--save-dir", metavar="DIR", help="also write pictures with heat map and refined cells")
    parser.add_argument("--threshold", type=float, help="confidence at which the coarse answer is taken")
    parser.add_argument("--alpha", type=float, help="share of the cells that the fine stage reads, 0 to 1")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels")
    add_value_range(parser)
    parser.add_argument("--model", metavar="NAME", help="model of weights that do not describe it")
    parser.add_argument("--batch-size", type=int, default=32, help="images per coarse pass (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="threads that decode images")
    parser.add_argument("--skip-bad", action="store_true", help="name and count unreadable files instead of stopping")
    for architecture in _special():
        import_object(str(architecture.predict)).add_arguments(parser)
    return parser


def _special() -> list[Architecture]:
    """Kinds of models that classify images in a way of their own."""
    return [architecture for architecture in ARCHITECTURES.values() if architecture.predict is not None]


def _special_command(args: argparse.Namespace) -> Any:
    """The module that classifies with the weights' kind of model; ``None`` for this one.

    Raises:
        ValueError: If an option of another kind is given.
    """
    if args.model is not None:
        architecture = architecture_of_entry(args.model)
    else:
        architecture = described_architecture(read_state_dict(find_weights(args.checkpoint))[1])
    for special in _special():
        command = import_object(str(special.predict))
        if special is architecture:
            return command
        if options := command.given_options(args):
            names = ", ".join(options).replace("_", "-")
            raise ValueError(f"{names}: only a {special.build.__name__} has these options")
    return None


def _run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {args.batch_size}")
    for path in args.inputs:
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist")
    if (command := _special_command(args)) is not None:
        return command.run(args)
    model = ready_model(
        args.checkpoint,
        name=args.model,
        device=args.device,
        threshold=args.threshold,
        alpha=args.alpha,
        img_size=image_size(args.img_size),
        values=value_range(args.value_range),
    )
    if args.save_dir and not is_two_stage(model):
        raise ValueError("save-dir draws what a MambaScope refined; this is a one-stage model")
    skipped, left_out = Skipped(args.skip_bad), LeftOut()
    values = stored_value_range(model)
    sources = surveyed(find_images(args.inputs, left_out), model.in_chans, values)
    transform = make_transform(model)
    batches = load_batches(sources, transform, args.batch_size, skipped, args.workers, model.in_chans, values)
    count = left = 0
    with (
        tqdm(desc="images", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar,
        open_output(args.output) as stream,
    ):
        heading = "confidence  stage   tokens  file"
        writer = RowWriter(stream, args.format, Prediction.__dataclass_fields__, model.labels, heading)
        # pending images wait for a full fine batch: as large as the coarse one, so that a few batches suffice
        for rows, images, output, files in predict(model, batches, fine_batch_size=args.batch_size):
            for row in rows:
                write_prediction(writer, row)
                left += row.stage == "coarse"
            if args.save_dir and output is not None and is_two_stage(model):
                save_pictures(model, images, output, files, Path(args.save_dir))
            count += len(rows)
            bar.update(len(rows))
    parts = [f"{count:,} images"]
    if is_two_stage(model) and count:
        rule = "given" if args.threshold is not None else stored_rule(model)
        eta = f"threshold {model.threshold:g}" + (f": {rule}" if rule else "")
        parts.append(f"{100 * left / count:.0f} % left after the coarse look ({eta})")
    if skipped.count:
        parts.append(f"{skipped.count} unreadable files skipped")
    if left_out:
        parts.append(f"left out: {left_out}")
    print(", ".join(parts), file=sys.stderr)
    return 0 if count else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
