"""The command of ``tools/export.py``: ONNX files and ``torch.export`` programs, each compared with the model."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambascope._names import as_json
from mambascope._version import __version__
from mambascope.commands import early_exit
from mambascope.commands.options import CHECKPOINT_HELP, add_value_range, image_size, value_range
from mambascope.models import picture_files, pictures
from mambascope.models.export import export_program, portable, quiet, stages, to_onnx
from mambascope.models.preprocessing import preprocessing
from mambascope.models.ready import ready_model
from mambascope.models.two_stage import is_two_stage
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import find_weights
from mambascope.utils import CommandError, atomic_path, run_command

FORMATS = ("onnx", "pt2")
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4
_FUTURE = "from __future__ import annotations\n"
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest absolute difference between two lists of results, each relative to its largest value."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            return math.inf
        scale = max(1e-6, a.double().abs().max().item()) if a.numel() else 1.0
        gap = (a.double() - b.double()).abs().max().item() / scale if a.numel() else 0.0
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results of an ONNX file by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def run_program(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results of a stored ``torch.export`` program."""
    with quiet():
        return _tensors(torch.export.load(path).module()(*inputs))


def write_program(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, standalone: bool = False, facts: str = ""
) -> None:
    """Writes one stage as ``.onnx`` or ``.pt2``, as the name of `path` says; atomically."""
    program = export_program(module, inputs)
    if path.suffix == ".onnx":
        onnx = to_onnx(program, module.outputs, {"mambascope": facts})  # type: ignore[arg-type]
        with atomic_path(path) as temporary:
            onnx.save(temporary)
        return
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(portable(program) if standalone else program, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def check_program(module: nn.Module, inputs: Sequence[Tensor], path: Path) -> float:
    """Largest relative difference between a stored program and the model, for several batch sizes."""
    run = run_onnx if path.suffix == ".onnx" else run_program
    worst = 0.0
    for size in CHECKED_BATCHES:
        some = [t[:size].contiguous() for t in inputs]
        with torch.no_grad():
            expected = _tensors(module(*some))
        worst = max(worst, difference(expected, run(path, some)))
    return worst


def describe_export(model: VisionMamba, alpha: float | None) -> dict[str, Any]:
    """What ``export.json`` says: how images are prepared, the labels, and what is fixed in the programs."""
    facts = preprocessing(model) | {"labels": model.labels, "num_classes": model.num_classes, "version": __version__}
    if is_two_stage(model):
        facts |= {"alpha": model.alpha if alpha is None else alpha, "threshold": model.threshold}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def standalone_early_exit() -> str:
    """The source of ``early_exit.py`` with the rules by which images are read in the place of their imports."""
    sources = [Path(str(m.__file__)).read_text(encoding="utf-8") for m in (pictures, picture_files, early_exit)]
    lines = [line for text in sources for line in text.partition(_FUTURE)[2].splitlines(keepends=True)]
    kept = "".join(line for line in lines if not line.startswith("from mambascope."))
    return f"{sources[-1].partition(_FUTURE)[0]}{_FUTURE}{kept}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write ONNX files and torch.export programs of a model's stages, and compare them with the model.",
        epilog="Every program takes any number of images of one size. Early exit runs coarse.onnx on all images and "
        "fine.onnx on the unsure ones: early_exit.py, which is put beside them, does that.",
    )
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--out", metavar="DIR", help="folder; default: export/ beside the checkpoint")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: both")
    parser.add_argument("--standalone", action="store_true", help="pt2 without our operators: loads without mambascope")
    parser.add_argument("--threshold", type=float, help="confidence at which the coarse answer is taken")
    parser.add_argument("--alpha", type=float, help="share of the cells that the fine stage reads, above 0")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels")
    add_value_range(parser)
    parser.add_argument("--model", metavar="NAME", help="model of weights that do not describe it")
    return parser


def _run(args: argparse.Namespace) -> int:
    missing = sorted({m for f in args.format for m in _NEEDED[f] if importlib.util.find_spec(m) is None})
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'mambascope[export]', or pass --format pt2")
    model = ready_model(
        args.checkpoint,
        name=args.model,
        device="cpu",
        threshold=args.threshold,
        alpha=args.alpha,
        img_size=image_size(args.img_size),
        values=value_range(args.value_range),
    )
    folder = find_weights(args.checkpoint).parent / "export"
    out = Path(args.out) if args.out else folder if Path(args.checkpoint).exists() else Path("export")
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(CHECKED_BATCHES), model.in_chans, *model.config.image_hw, generator=generator)
    facts = describe_export(model, args.alpha)
    text = as_json(facts, indent=2)
    print(f"{'file':<16}{'MB':>8}{'difference':>12}")
    for name, (module, inputs) in stages(model, images).items():
        for kind in args.format:
            path = out / f"{name}.{kind}"
            write_program(module, inputs, path, standalone=args.standalone, facts=text)
            gap = check_program(module, inputs, path)
            print(f"{path.name:<16}{path.stat().st_size / 1e6:>8.2f}{gap:>12.1e}", flush=True)
            if gap > TOLERANCE:
                raise CommandError(f"{path} differs from the model by {gap:.1e} (relative), more than {TOLERANCE:g}")
    with atomic_path(out / early_exit.FACTS_NAME) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    if "onnx" in args.format and is_two_stage(model):
        with atomic_path(out / "early_exit.py") as temporary:
            temporary.write_text(standalone_early_exit(), encoding="utf-8")
    print(f"written to {out}; batch sizes {' and '.join(map(str, CHECKED_BATCHES))} compared with the model")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
