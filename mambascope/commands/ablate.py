"""The command of ``tools/ablate.py``: the paper's ablations on the built-in digits, one finished row at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambascope.commands.options import CHECKPOINT_HELP
from mambascope.compare.ablation import (
    Results,
    Row,
    Setting,
    Table,
    digits_loader,
    evaluate,
    fingerprint,
    summarise,
    tables,
)
from mambascope.models.configs import ScopeConfig
from mambascope.models.cost import stage_macs
from mambascope.models.ready import ready_model
from mambascope.models.scope import MambaScope
from mambascope.models.two_stage import is_two_stage
from mambascope.models.weights import find_weights
from mambascope.training.trainings import finish_training, finished_weights
from mambascope.utils import atomic_path, run_command

INTRODUCTION = """# Ablations on ScopeDigits

Written by `tools/ablate.py`: the paper's Tables 4-7 and Figure 5 in form, on the built-in digits and the demo model.
The published figures belong to other data (miniImageNet; Table 5: ImageNet) and larger models, and are *published, not
reproduced here*: only which choice is best can be compared. Top-1 in per cent. "Refined" is with every image refined,
"at η" at the model's threshold. GFLOPs are multiply-adds / 1e9 of both stages, both scan directions counted.
Importance, share of cells, momentum and layers are changed at inference on one model, without training it anew: they
say what this model makes of the change, and every set has other images of the validation scans. In the other tables
every row and seed is a training of its own. Tables with costs compare options beyond the paper: "at 50 % cost" is top-1
at the threshold where a row's mean GFLOPs equal those of the given model with half of the images refined. Options that
were measured and removed: [removed.md](removed.md).

"""

STRUCTURE = ("fine_cls", "fine_order", "reuse", "reuse_cls")
"""What the trained tables vary."""


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rerun the paper's ablations on the built-in digits. Finished rows are kept: run again to go on.",
        epilog="Tables of what the weights depend on (cls, order, reuse) train a model per row and seed; give --train.",
    )
    parser.add_argument("checkpoint", help=f"{CHECKPOINT_HELP}; a MambaScope trained on ScopeDigits")
    parser.add_argument("--tables", nargs="+", choices=names, help="default: all that need no training")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help='these and the first one of their tables, e.g. "score clip"'
    )
    parser.add_argument("--train", action="store_true", help="also the tables that need trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--images", type=int, default=2000, help="per seed (default 2000)")
    parser.add_argument("--out", default="benchmarks/results/ablations", metavar="DIR")
    parser.add_argument("--config", default="scopedigits", help="of the trainings (default scopedigits)")
    parser.add_argument("--epochs", type=int, help="of the trainings; default: the config's")
    parser.add_argument("--train-args", nargs=argparse.REMAINDER, default=[], help="more options of tools/train_cls.py")
    parser.add_argument("--runs", default="runs/ablations", metavar="DIR", help="folder of the trainings")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    return parser


def trained_model(config: ScopeConfig, setting: Setting, seed: int, args: argparse.Namespace) -> Path:
    """Weights of a training with this setting; a run that was begun is resumed, a finished one is used.

    Rows of several tables that mean the same model share one training.

    Args:
        config: What the other structural options are taken from.
        setting: The row.
        seed: Of the training.
        args: Of the command.

    Raises:
        CommandError: The training failed.
    """
    whole = {field: getattr(config, field) for field in STRUCTURE} | setting.overrides
    values = [str(value).lower() for value in whole.values()]
    # what a table varies beside the structure is named: its values alone could mean anything
    more = {key.rpartition(".")[2]: value for key, value in (setting.overrides | setting.training).items()}
    own = [f"{key}-{str(value).lower()}" for key, value in sorted(more.items()) if key not in STRUCTURE]
    shared = values[: len(STRUCTURE)]  # the structure comes first, whatever is overridden
    name = "_".join([f"{args.config}-{args.epochs or 'all'}", *shared, *own, f"seed{seed}"])
    folder = Path(args.runs) / name
    options = ["--config", args.config, "--run.report", "false"]
    options += [f"--model.net.args.{field}={value}" for field, value in zip(whole, values, strict=True)]
    options += [f"--{option}={value}" for option, value in setting.training.items()]
    options += [f"--seed_everything={seed}", *([f"--trainer.max_epochs={args.epochs}"] if args.epochs else [])]
    if finished_weights(folder) is None:
        print(f"training {name}", flush=True)
    return finish_training(folder, options + args.train_args)


def _source(trained: bool, weights: str, args: argparse.Namespace) -> str:
    if not trained:
        return weights
    return "-".join([args.config, str(args.epochs or "all"), *args.train_args])


def _chosen_rows(known: dict[str, Table], args: argparse.Namespace) -> dict[str, tuple[Setting, ...]]:
    """The settings of every table that is wanted: all; or the first, which others are compared with, and those named.

    Raises:
        ValueError: If no table that is wanted has a row of that name.
    """
    wanted = args.tables or [name for name, table in known.items() if args.train or not table.trained]
    if args.rows is None:
        return {name: known[name].settings for name in wanted}
    labels = {name: [setting.label for setting in known[name].settings] for name in wanted}
    if unknown := [row for row in args.rows if not any(row in own for own in labels.values())]:
        accepted = ", ".join(dict.fromkeys(label for own in labels.values() for label in own))
        elsewhere = [name for name, table in known.items() if unknown[0] in [s.label for s in table.settings]]
        hint = f"; {unknown[0]} is a row of --tables {elsewhere[0]}" if elsewhere else ""
        raise ValueError(f"rows must be of {accepted}; got {', '.join(unknown)}{hint}")
    return {
        name: tuple(s for i, s in enumerate(known[name].settings) if i == 0 or s.label in args.rows)
        for name in wanted
        if any(row in labels[name] for row in args.rows)
    }


def _run(args: argparse.Namespace, model: MambaScope, checkpoint: Path) -> int:
    known = tables(model.config)
    if args.images < 1:
        raise ValueError(f"images must be at least 1, got {args.images}")
    chosen = _chosen_rows(known, args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "ablations.csv")
    weights = fingerprint(checkpoint)
    reference = stage_macs(model.config, alpha=model.alpha, convention="both_directions")
    loaders: dict[int, list[Any]] = {}
    for name, settings in chosen.items():
        table = known[name]
        source = _source(table.trained, weights, args)
        for seed in args.seeds:
            for setting in settings:
                if results.find(name, setting.label, seed, source, args.images):
                    continue
                if table.trained:
                    own = trained_model(model.config, setting, seed, args)
                    subject: Any = ready_model(own, device=args.device)
                    # the same images for all trainings: only the training differs
                    images = loaders.setdefault(0, list(digits_loader(subject, own, 0, args.images)))
                    figures = evaluate(subject, images, {}, reference=reference if table.equal_cost else None)
                else:
                    if seed not in loaders:
                        loaders[seed] = list(digits_loader(model, checkpoint, seed, args.images))
                    budgets = reference if table.equal_cost else None
                    figures = evaluate(model, loaders[seed], setting.overrides, setting.selection, seed, budgets)
                results.add(Row(name, setting.label, seed, source, **figures))
                print(
                    f"{name:<11}{setting.label:<26}seed {seed}  refined {100 * figures['top1_fine']:6.2f} %  "
                    f"at η {100 * figures['top1_dynamic']:6.2f} %  GFLOPs {figures['gflops_fine']:.4f}",
                    flush=True,
                )
    text = INTRODUCTION + summarise(results.rows, known)
    with atomic_path(out / "ablations.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{summarise(results.rows, {k: v for k, v in known.items() if k in chosen})}")
    print(f"written: {out / 'ablations.csv'}, {out / 'ablations.md'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see :func:`mambascope.utils.run_command` for the status."""
    args = _parser(list(tables(MambaScope.config_class()))).parse_args(argv)

    def body() -> int:
        checkpoint = find_weights(args.checkpoint)
        model = ready_model(checkpoint, device=args.device)
        if not is_two_stage(model):
            raise ValueError(f"ablations need a MambaScope; {checkpoint} holds a one-stage {type(model).__name__}")
        return _run(args, model, checkpoint)

    return run_command(body)
