"""The command of ``tools/eval_eye.py``: accuracy against glimpses, image size, scan pattern and choice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mambascope.commands.options import CHECKPOINT_HELP, add_column_arguments, add_value_range, value_range
from mambascope.data.errors import DataError
from mambascope.data.modules import run_config, run_module
from mambascope.data.rows import open_rows
from mambascope.data.scopedigits import ScopeDigits
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.data.sources import ImageSource
from mambascope.eye.choice import CHOICES
from mambascope.eye.config import MAMBAEYE_CONFIGS
from mambascope.eye.curves import Pictures, StopOptions
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.measurements import ReportOptions
from mambascope.eye.model import MambaEye
from mambascope.eye.patterns import PATTERNS, resolve_pattern
from mambascope.eye.placement import RESIZE_MODES
from mambascope.eye.report import write_eye_report
from mambascope.eye.stopping import CRITERIA
from mambascope.models.checkpoint import load_checkpoint, load_model
from mambascope.models.pictures import ValueRange
from mambascope.models.preprocessing import stored_value_range
from mambascope.models.ready import ready_model, use_value_range
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import find_weights
from mambascope.utils import pick_device, run_command

DIGITS = "scopedigits"


def ready_eye(checkpoint: str, name: str | None = None, device: str = "auto", values: ValueRange = None) -> MambaEye:
    """A MambaEye in evaluation mode on its device.

    Args:
        checkpoint: Weights that describe their model, or official ones together with `name`.
        name: Registered model that the weights belong to, where they do not describe it.
        device: See :func:`mambascope.utils.pick_device`.
        values: Values of the image files that become 0–255, in place of the stored ones.

    Raises:
        ValueError: If an argument does not have an accepted value, or the weights are of another model.
    """
    target, path = pick_device(device), find_weights(checkpoint)
    if name is None:
        model = load_model(path)
    elif name in MAMBAEYE_CONFIGS:
        model = MambaEye(MAMBAEYE_CONFIGS[name])
        if notes := load_checkpoint(model, path, verbose=False).notes():
            print(f"{path}: {notes}", file=sys.stderr)
    else:
        raise ValueError(f"model must be one of {', '.join(MAMBAEYE_CONFIGS)}, got {name!r}")
    if not isinstance(model, MambaEye):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a MambaEye; tools/eval_cls.py evaluates it")
    use_value_range(model, values)
    return model.to(target).eval()


def stored_options(model: MambaEye) -> GlimpseOptions:
    """How the weights' file says that images become sequences; the paper's evaluation where it says nothing."""
    stored = dict(model.description.get("glimpses") or {})
    names = {f.name for f in fields(GlimpseOptions)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in names}
    return replace(GlimpseOptions(), **{**values, "patch_size": model.config.patch_size})


class EyeData:
    """The images that a command line names.

    Attributes:
        pictures: To evaluate on.
        calibration: Others to choose a threshold on; ``None`` where there are none to spare.
        name: What to call them.
    """

    def __init__(
        self,
        model: MambaEye,
        checkpoint: Path,
        data: str | None,
        split: str,
        length: int,
        input_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        self.calibration: Pictures | None = None
        self.pictures: Pictures
        if data is None:
            config = run_config(checkpoint)
            if config is None:
                raise DataError(
                    "there is no run configuration beside the checkpoint: pass --data FOLDER or scopedigits"
                )
            module = _run_data(config)
            module.fit_channels(model.in_chans)
            self.pictures, self.name = module.val_images(), f"validation data of {config.parent.name}"
            if hasattr(module, "calibration_images"):
                self.calibration = module.calibration_images()
        elif data == DIGITS:
            from mambascope.eye.datamodules import DigitPictures

            digits = ScopeDigits("cls", "val", length, ScopeDigitsConfig())
            self.pictures, self.name = DigitPictures(digits, length), DIGITS
            self.calibration = DigitPictures(digits, length, start=length)
        else:
            rows, _ = open_rows(model, data, split, input_key, target_key)
            source = ImageSource(rows, model.num_classes, model.in_chans, stored_value_range(model))
            source.survey()
            self.pictures, self.name = source, data
        classes = getattr(self.pictures, "num_classes", 10)
        if classes > model.num_classes:
            raise DataError(f"the data have {classes} classes, the model has {model.num_classes}")


def _run_data(config: Path) -> Any:
    module: Any = run_module(config)
    if not hasattr(module, "val_images"):
        raise DataError(f"the data of {config} are no glimpses; pass --data FOLDER or scopedigits")
    return module


def canvas(text: str) -> int | tuple[int, int] | None:
    """The value of a size option: a side, ``HEIGHTxWIDTH``, or ``native``."""
    if text == "native":
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"sizes must be a side in pixels, HEIGHTxWIDTH or native, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def changed_options(model: MambaEye, args: argparse.Namespace) -> GlimpseOptions:
    """The stored options with what the command line changes."""
    options = stored_options(model)
    changes: dict[str, Any] = {}
    if args.glimpses is not None:
        if args.glimpses < 1:
            raise ValueError(f"glimpses must be at least 1, got {args.glimpses}")
        changes["length"] = args.glimpses
    if args.pattern is not None:
        changes["pattern"] = resolve_pattern(args.pattern, args.compat)
    if args.resize_mode is not None:
        changes["resize_mode"] = args.resize_mode
    return replace(options, compat=args.compat or options.compat, **changes)


def add_glimpse_arguments(parser: Any) -> None:
    """Options that say how images become glimpse sequences."""
    parser.add_argument("--glimpses", type=int, metavar="N", help="glimpses per image; default: the file's")
    parser.add_argument("--pattern", metavar="NAME", help=f"scan pattern: {', '.join(PATTERNS)}")
    parser.add_argument("--resize-mode", choices=RESIZE_MODES, help="default: the file's")
    parser.add_argument("--compat", action="store_true", help="reproduce the published evaluation, blind edge included")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Accuracy of a MambaEye against glimpses, image size, scan pattern and choice; early stopping.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP.replace(", or scopedigits (shipped)", ""))
    parser.add_argument("--data", help="folder, timm data set, or scopedigits; default: the run's validation data")
    parser.add_argument("--split", default="validation", help="of the folder (default validation)")
    add_column_arguments(parser)
    parser.add_argument("--length", type=int, default=1000, help="images of scopedigits (default 1000)")
    parser.add_argument("--limit", type=int, help="most images")
    parser.add_argument("--out", metavar="DIR", help="report folder; default: eval/ beside the checkpoint")
    add_glimpse_arguments(parser)
    parser.add_argument("--sizes", nargs="+", metavar="S", help="default: 0.5, 1, 2 and 3 times the file's")
    parser.add_argument("--patterns", nargs="*", default=[], metavar="NAME", help="further scan patterns, or all")
    parser.add_argument("--choose", nargs="*", default=[], metavar="HOW", help=f"choose glimpses: {CHOICES}")
    parser.add_argument("--sharpness", type=float, default=2.0, help="how closely choices follow their map (default 2)")
    parser.add_argument("--vim", nargs="*", default=[], metavar="WEIGHTS", help="Vim or MambaScope to compare with")
    parser.add_argument(
        "--stop", nargs="*", default=["confidence", "raw"], metavar="CRITERION", help=", ".join(CRITERIA)
    )
    parser.add_argument("--every", type=int, default=4, help="glimpses between checks of early stopping (default 4)")
    parser.add_argument("--min-coverage", type=float, default=0.05, help="no stop below it (default 0.05)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass (default 64)")
    parser.add_argument("--chunk", type=int, default=128, help="glimpses whose logits exist at once (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the random positions (default 0)")
    add_value_range(parser)
    parser.add_argument("--model", metavar="NAME", help="model of weights that do not describe it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--no-figures", action="store_true", help="numbers only")
    return parser


def _stop_options(args: argparse.Namespace) -> StopOptions | None:
    if not args.stop:
        return None
    if unknown := [c for c in args.stop if c not in CRITERIA]:
        raise ValueError(f"stop must be of {', '.join(CRITERIA)}, got {', '.join(unknown)}")
    if args.every < 1:
        raise ValueError(f"every must be at least 1, got {args.every}")
    if not 0 <= args.min_coverage <= 1:
        raise ValueError(f"min-coverage must lie in [0, 1], got {args.min_coverage}")
    return StopOptions(tuple(dict.fromkeys(args.stop)), args.every, args.min_coverage)


def _sizes(options: GlimpseOptions, texts: Sequence[str] | None) -> list[int | tuple[int, int] | None]:
    if texts is not None:
        return [canvas(text) for text in texts]
    if isinstance(options.canvas_size, int):
        return [int(options.canvas_size * factor) for factor in (0.5, 1, 2, 3)]
    return [options.canvas_size]


def _report_options(args: argparse.Namespace, options: GlimpseOptions) -> ReportOptions:
    sizes = _sizes(options, args.sizes)
    if None in sizes and options.resize_mode != "none":
        raise ValueError("size native needs --resize-mode none")
    return ReportOptions(
        sizes=sizes,
        patterns=PATTERNS if args.patterns == ["all"] else [resolve_pattern(p, args.compat) for p in args.patterns],
        choices=args.choose,
        sharpness=args.sharpness,
        stop=_stop_options(args),
        limit=args.limit,
        batch_size=args.batch_size,
        chunk=args.chunk,
        seed=args.seed,
        figures=not args.no_figures,
        progress=sys.stderr.isatty(),
    )


def _vims(paths: Sequence[str], device: str) -> dict[str, VisionMamba]:
    """The models to compare with, by what they are called."""
    vims: dict[str, VisionMamba] = {}
    for path in paths:
        vim = ready_model(path, device=device)
        label = type(vim).__name__.replace("VisionMamba", "Vim") + f" trained at {vim.config.image_hw[0]}²"
        vims[label if label not in vims else f"{label} ({path})"] = vim
    return vims


def _run(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise ValueError(f"seed must not be negative, got {args.seed}")
    if args.length < 1:
        raise ValueError(f"length must be at least 1, got {args.length}")
    model = ready_eye(args.checkpoint, args.model, args.device, value_range(args.value_range))
    options = changed_options(model, args)
    measured = _report_options(args, options)
    checkpoint = find_weights(args.checkpoint)
    vims = _vims(args.vim, args.device)
    data = EyeData(model, checkpoint, args.data, args.split, args.length, args.input_key, args.target_key)
    print(f"evaluating on {data.name}", file=sys.stderr)
    out = Path(args.out) if args.out else checkpoint.parent / "eval"
    report = write_eye_report(
        model,
        data.pictures,
        out,
        options,
        measured,
        calibration=data.calibration,
        vims=vims,
    )
    print(report.table)
    print(f"report: {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _run(args))
