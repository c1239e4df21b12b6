"""``python -m mambascope.commands.cost``: multiply-adds and parameters of a model, stage by stage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mambascope.models.architectures import configured
from mambascope.models.configs import SCOPE_CONFIGS, VIM_CONFIGS, ScopeConfig, VimConfig
from mambascope.models.cost import (
    CONVENTIONS,
    count_parameters,
    format_gflops,
    head_macs,
    plain_vim,
    skipped_macs,
    stage_macs,
)


def model_config(name: str, **overrides: Any) -> VimConfig:
    """Config of the registered model `name` with fields replaced.

    Raises:
        ValueError: Unknown model (the message lists the known ones) or a field that is unknown or out of range.
    """
    entries: dict[str, VimConfig] = {**VIM_CONFIGS, **SCOPE_CONFIGS}
    if name not in entries:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(entries))}")
    return configured(entries[name], overrides)


def cost_rows(
    config: VimConfig, img_size: int | Sequence[int] | None = None, shares: Sequence[float] = ()
) -> list[dict]:
    """Rows of the cost table: ``stage``, ``tokens``, and multiply-adds per convention."""
    one, both = (stage_macs(config, img_size, convention=c) for c in CONVENTIONS)
    rows: list[dict] = []

    def add(stage: str, tokens: int | None, a: float, b: float) -> None:
        rows.append({"stage": stage, "tokens": tokens, CONVENTIONS[0]: a, CONVENTIONS[1]: b})

    if not isinstance(config, ScopeConfig):
        add("all", one.tokens_fine, one.fine, both.fine)
        return rows
    add("coarse", one.tokens_coarse, one.coarse, both.coarse)
    add("feature reuse", None, one.reuse, both.reuse)
    add(f"fine (alpha {config.alpha:g})", one.tokens_fine, one.fine, both.fine)
    add("coarse + reuse + fine", one.tokens_coarse + one.tokens_fine, one.refined, both.refined)
    for share in shares:
        add(f"expected, {share:.0%} refined", None, one.expected(share), both.expected(share))
    plain = plain_vim(config)
    vim_one, vim_both = (stage_macs(plain, img_size, convention=c) for c in CONVENTIONS)
    add("plain Vim, full size", vim_one.tokens_fine, vim_one.fine, vim_both.fine)
    return rows


def format_cost(name: str, config: VimConfig, rows: Sequence[dict], img_size: Sequence[int]) -> str:
    """The table that the command prints."""
    lines = [
        f"{name}  {img_size[0]}x{img_size[1]}  {count_parameters(config):,} parameters",
        "GFLOPs (multiply-adds / 1e9) per image; one direction = as published, both directions = what is computed",
        f"{'stage':<24}{'tokens':>8}{'one direction':>16}{'both directions':>18}",
    ]
    for row in rows:
        tokens = "" if row["tokens"] is None else str(row["tokens"])
        cells = ["" if row[c] is None else format_gflops(row[c]) for c in CONVENTIONS]
        note = f"  {row['note']}" if "note" in row else ""
        lines.append(f"{row['stage']:<24}{tokens:>8}{cells[0]:>16}{cells[1]:>18}{note}")
    return "\n".join(lines)


def _counted_rows(name: str, config: VimConfig) -> list[dict]:
    """What torch.utils.flop_counter sees, without the classifier head, which the table leaves out."""
    import timm

    from mambascope.models.flop_count import count_macs, expected_count

    model: Any = timm.create_model(name, **asdict(config))
    counted, expected, cost = count_macs(model), expected_count(model), stage_macs(config)
    skipped = skipped_macs(config) if isinstance(config, ScopeConfig) else 0
    less = f" less {format_gflops(skipped)} for the cells left out" if skipped else ""
    first, last = head_macs(config, cost.tokens_coarse), head_macs(config, cost.tokens_fine)
    rows = [("counted, coarse", counted.coarse, expected.coarse, first, "")] if counted.coarse else []
    rows += [(f"counted, {'reuse + fine' if rows else 'all'}", counted.fine, expected.fine, last, less)]
    return [
        {
            "stage": stage,
            "tokens": None,
            CONVENTIONS[0]: None,
            CONVENTIONS[1]: macs - head,
            "note": ("equal to the closed form" if macs == macs_wanted else f"closed form {macs_wanted - head}") + note,
        }
        for stage, macs, macs_wanted, head, note in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mambascope.commands.cost", description="Parameters and GFLOPs of a model, per stage."
    )
    parser.add_argument("model", help="a registered name, e.g. mambascope_small_patch16_224")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels")
    parser.add_argument("--alpha", type=float, help="share of the cells that the fine stage refines, 0 to 1")
    parser.add_argument("--patch", type=int, dest="patch_size", help="patch size in pixels")
    parser.add_argument("--num-classes", type=int, help="classes of the head (parameters only)")
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.75],
        help="shares of refined images for the expected cost",
    )
    parser.add_argument("--count", action="store_true", help="also run the model under torch.utils.flop_counter")
    parser.add_argument("--json", action="store_true", help="print the numbers (multiply-adds) as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; bad input ends with one line on stderr and status 2."""
    args = _parser().parse_args(argv)
    try:
        overrides: dict[str, Any] = {
            key: getattr(args, key) for key in ("alpha", "patch_size", "num_classes") if getattr(args, key) is not None
        }
        if args.img_size is not None:
            size = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
            overrides["img_size"] = size
        if "alpha" in overrides and args.model in VIM_CONFIGS:
            raise ValueError("--alpha applies to MambaScope models only; a plain Vim has one stage")
        config = model_config(args.model, **overrides)
        rows = cost_rows(config, shares=args.share)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.count:
        rows += _counted_rows(args.model, config)
    if args.json:
        print(json.dumps({"model": args.model, "parameters": count_parameters(config), "rows": rows}, indent=2))
    else:
        print(format_cost(args.model, config, rows, config.image_hw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
