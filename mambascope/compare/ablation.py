"""The paper's ablations (arXiv 2512.00647, Tables 4-7 and Figure 5) in form, and options beyond it, on built-in digits.

What can be changed at inference (token score, alpha, momentum, layers) is changed on a trained model. What the weights
depend on (place of CLS, order, feature reuse) is trained anew. The published accuracies belong to other data and larger
models: what can be compared is which choice is best.

Options that change what an image costs are compared at equal cost: each row's threshold is set so that its mean GFLOPs
are those of the reference model with a quarter, half and three quarters of the images refined. No label takes part.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.modules import run_config, run_data
from mambascope.evaluation.sweep import StageRecord, sweep
from mambascope.models.configs import ScopeConfig, with_overrides
from mambascope.models.cost import StageCost, stage_macs
from mambascope.models.gate import confidence, exit_mask
from mambascope.models.scope import MambaScope
from mambascope.utils import atomic_path, evaluating, model_device, unpack

BUDGETS = (0.25, 0.5, 0.75)
"""Shares of refined images whose cost in the reference model the rows are compared at."""
SELECTIONS = ("importance", "random", "least")
SEED_STRIDE = 100_000  # images of one seed do not reach into those of the next


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        label: what the row is called.
        overrides: fields of the model's config.
        published: the paper's top-1 in per cent, on its own data; ``None`` where it has no such row.
        selection: cells that are re-read: the most important ones, ``random`` ones, or the ``least`` important ones.
        training: further options of the training by their name on its command line, in trained tables.
    """

    label: str
    overrides: dict[str, Any]
    published: float | None = None
    selection: str = "importance"
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: what is compared, and where in the paper.
        settings: its rows.
        trained: whether every row is a training of its own.
        equal_cost: whether the rows are compared at equal cost, against the first one.
    """

    title: str
    settings: tuple[Setting, ...]
    trained: bool = False
    equal_cost: bool = False


def tables(config: ScopeConfig) -> dict[str, Table]:
    """All comparisons for a model of this depth, by the name they have on the command line."""

    def layers(share: float) -> int:
        return min(config.depth, max(1, math.ceil(share * config.depth)))

    def plain(name: str, rows: Sequence[tuple[Any, float | None]], text: str = "{}") -> tuple[Setting, ...]:
        return tuple(Setting(text.format(value), {name: value}, published) for value, published in rows)

    metrics = [("max", 88.0), ("clip", 87.9), ("softplus", 87.8), ("topk", 87.8), ("l2", 86.7), ("mean", 86.7)]
    controls = tuple(Setting(f"{how} cells (control)", {}, None, how) for how in ("random", "least"))
    parts = [(0.25, 86.7), (0.5, 87.0), (0.75, 86.8)]
    return {
        "importance": Table("Token importance (Table 4)", plain("score_metric", metrics) + controls),
        "alpha": Table(
            "Share of cells that are re-read (Table 5)",
            plain("alpha", [(0.5, 78.5), (0.6, 79.1), (0.7, 79.7), (0.8, 80.1), (0.9, 80.3)]),
        ),
        "beta": Table(
            "Momentum of the average over layers (Table 6)",
            plain("beta", [(0.0, 86.8), (0.5, 87.1), (0.9, 87.4), (0.99, 87.6), (0.999, 87.6)]),
        ),
        "layers": Table(
            f"Layers that take part, of {config.depth} (Table 6: 6, 12, 18 of 24)",
            tuple(Setting(f"last {layers(s)}", {"score_layers": layers(s)}, p) for s, p in parts),
        ),
        "cls": Table(
            "Place of CLS in the fine sequence (Table 7)",
            plain("fine_cls", [("first", 87.6), ("middle", None), ("last", 86.8)]),
            trained=True,
        ),
        "order": Table(
            "Order of the fine sequence (Table 7)",
            plain("fine_order", [("important_first", 87.6), ("important_last", 86.9)]),
            trained=True,
        ),
        "reuse": Table(
            "Feature reuse (Figure 5)",
            (
                Setting("mlp", {"reuse": "mlp", "reuse_cls": False}, 87.6),
                Setting("linear", {"reuse": "linear", "reuse_cls": False}, 87.3),
                Setting("mlp, CLS too", {"reuse": "mlp", "reuse_cls": True}, 87.0),
                Setting("off", {"reuse": "off", "reuse_cls": False}),
            ),
            trained=True,
        ),
        **improvements(),
    }


def improvements() -> dict[str, Table]:
    """Options beyond the paper, compared at equal cost with the model as it is."""
    base = Setting("as it is", {})
    most = {"alpha": 0.9375}  # 15 of 16 cells
    cells = (
        Setting("score clip", {"score_metric": "clip"}),
        Setting("alpha 0.9375", most),
        Setting("score clip, alpha 0.9375", {"score_metric": "clip", **most}),
    )
    coarse_loss = (
        Setting("coarse CE 0", {}, training={"model.loss.coarse_ce_weight": 0.0}),
        Setting("coarse CE 1", {}, training={"model.loss.coarse_ce_weight": 1.0}),
    )
    recipe = (Setting("stem 32", {"stem_width": 32}),)
    return {
        "cells": Table("Which cells are re-read, without training anew", (base, *cells), equal_cost=True),
        "coarse_loss": Table("Loss of the coarse stage", (base, *coarse_loss), trained=True, equal_cost=True),
        "trained_cells": Table("Which cells are re-read, trained so", (base, *cells), trained=True, equal_cost=True),
        "recipe": Table("Recipe of the encoder", (base, *recipe), trained=True, equal_cost=True),
    }


@dataclass(frozen=True)
class Row:
    """A finished setting: what identifies it, and its figures.

    Attributes:
        table, setting, seed: which one; the seed is that of the images and, in trained tables, of the training.
        source: what was evaluated: a fingerprint of the weights, or the recipe of the training.
        images: how many.
        top1_fine: top-1 when every image is refined, 0 to 1.
        top1_coarse: of the coarse stage.
        top1_dynamic: at the model's threshold.
        share_refined: share of images that the threshold lets go on.
        gflops_fine: multiply-adds of both stages / 1e9, both scan directions.
        top1_cost25, top1_cost50, top1_cost75: top-1 at the cost of the reference with that per cent of the images
            refined (:data:`BUDGETS`); NaN if the row's coarse stage alone costs more, or was not asked for.
    """

    table: str
    setting: str
    seed: int
    source: str
    images: int
    top1_fine: float
    top1_coarse: float
    top1_dynamic: float
    share_refined: float
    gflops_fine: float
    top1_cost25: float = math.nan
    top1_cost50: float = math.nan
    top1_cost75: float = math.nan

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What makes a row the same as another."""
        return self.table, self.setting, self.seed, self.source, self.images


@dataclass
class Results:
    """The rows so far, in a CSV file that is replaced as a whole after every one of them.

    Attributes:
        path: the file; read when it exists.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = [self._parse(line) for line in csv.DictReader(file)]

    def _parse(self, line: dict[str, str]) -> Row:
        try:
            kinds = {"int": int, "float": float, "str": str}
            # tables of an earlier version have fewer columns
            known = [f for f in fields(Row) if f.name in line or not f.name.startswith("top1_cost")]
            return Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in known})
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path} is no table of ablations; move it away") from None

    def find(self, *key: Any) -> Row | None:
        """The row with this key."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        """Adds a row and writes the file; a row of the same setting from other weights or images is replaced."""
        same = (row.table, row.setting, row.seed)
        self.rows = [r for r in self.rows if (r.table, r.setting, r.seed) != same] + [row]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            for r in self.rows:
                cells = asdict(r).items()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells})


def digits_loader(model: MambaScope, checkpoint: Path, seed: int, images: int, batch_size: int = 250) -> Iterable[Any]:
    """Images of the validation scans that look like the run's own; every seed has others, seed 0 the run's first ones.

    Raises:
        DataError: the run's data are not ScopeDigits, or unknown.
    """
    config = run_config(checkpoint)
    module = run_data(config, model) if config is not None else None
    if not isinstance(module, ScopeDigitsDataModule):
        raise DataError(f"ablations run on ScopeDigits; {checkpoint} does not lie in a run that was trained on them")
    options: dict[str, Any] = {"digits": module.digits, "batch_size": 1, "val_batch_size": batch_size}
    if seed == 0:
        return ScopeDigitsDataModule(1, images, **options).val_dataloader()
    return ScopeDigitsDataModule(1, SEED_STRIDE * seed, calibration_length=images, **options).calibration_dataloader()


def _choose(importance: Tensor, selection: str, generator: torch.Generator) -> Tensor:
    if selection == "least":
        return -importance
    if selection == "random":
        return torch.rand(importance.shape, generator=generator).to(importance)
    return importance


def evaluate(
    model: MambaScope,
    loader: Iterable[Any],
    overrides: dict[str, Any],
    selection: str = "importance",
    seed: int = 0,
    reference: StageCost | None = None,
) -> dict[str, Any]:
    """Figures of a model with fields of its config replaced, as :class:`Row` has them; the model is left as it was.

    Args:
        model: a MambaScope, on any device.
        loader: of images [B, C, H, W] and labels [B].
        overrides: fields that do not change the weights.
        selection: one of :data:`SELECTIONS`.
        seed: of ``random`` cells.
        reference: cost of the model (both directions) at whose budgets top-1 is given too; ``None`` for no budgets.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    before, alpha = model.config, model.alpha
    generator = torch.Generator().manual_seed(seed)
    device = model_device(model)
    parts: list[StageRecord] = []
    exits: list[Tensor] = []
    try:
        model.config = with_overrides(before, {"alpha": alpha, **overrides})
        model.set_alpha(model.config.alpha)
        with evaluating(model):
            for images, labels in map(unpack, loader):
                x, y = images.to(device), labels.to(device)
                coarse = model.forward_coarse(x)
                coarse.importance = _choose(coarse.importance, selection, generator)
                parts.append(_record(coarse.logits, model.forward_fine(x, coarse).logits, y))
                exits.append(exit_mask(confidence(coarse.logits), model.threshold).cpu())
        cost = stage_macs(model.config, convention="both_directions")
    finally:
        model.config, model.alpha = before, alpha
    if not parts:
        raise DataError("there are no images to evaluate on")
    record, exited = StageRecord.concatenate(parts), torch.cat(exits).numpy()
    figures = {
        "images": len(record),
        "top1_fine": float(record.fine_correct.mean()),
        "top1_coarse": float(record.coarse_correct.mean()),
        "top1_dynamic": float(np.where(exited, record.coarse_correct, record.fine_correct).mean()),
        "share_refined": float(1 - exited.mean()),
        "gflops_fine": cost.gflops(),
    }
    if reference is not None:
        for share in BUDGETS:
            figures[f"top1_cost{100 * share:.0f}"] = top1_at_cost(record, cost, reference.gflops(share))
    return figures


def _record(coarse: Tensor, fine: Tensor, labels: Tensor) -> StageRecord:
    """Both stages' answers on a batch; the five most likely classes are not looked at."""
    conf, fine_conf = confidence(coarse).double(), confidence(fine).double()
    nothing = torch.zeros_like(labels, dtype=torch.bool)
    values = (labels, conf, coarse.argmax(1), nothing, fine_conf, fine.argmax(1), nothing)
    return StageRecord(*(v.cpu().numpy() for v in values))


def top1_at_cost(record: StageRecord, cost: StageCost, gflops: float) -> float:
    """Top-1 at the highest threshold whose mean cost is at most `gflops`; NaN if the coarse stage alone costs more."""
    curve = sweep(record, {cost.convention: cost})
    within = np.flatnonzero(curve.gflops[cost.convention] <= gflops * (1 + 1e-9))
    return float(curve.top1[within[-1]]) if len(within) else math.nan


def fingerprint(checkpoint: Path) -> str:
    """What the weights are called in the table, so that rows of other weights are made anew."""
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]


def summarise(rows: Sequence[Row], known: dict[str, Table]) -> str:
    """The results as Markdown: a section per comparison, and whether the paper's best choice is the best one here."""
    parts = []
    for name, table in known.items():
        mine = {s.label: [r for r in rows if (r.table, r.setting) == (name, s.label)] for s in table.settings}
        if any(mine.values()):
            section = _equal_cost_section if table.equal_cost else _section
            parts.append("\n".join(section(table, mine)))
    return "\n\n".join(parts) + "\n"


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(getattr(r, name) for r in rows) / len(rows)


def _error(rows: Sequence[Row], trained: bool) -> float:
    """Standard error of the mean top-1: of the trainings where there are several, else of the number of images."""
    p, n = _mean(rows, "top1_fine"), sum(r.images for r in rows)
    sampling = math.sqrt(p * (1 - p) / n)
    if not trained or len(rows) < 2:
        return sampling
    spread = sum((r.top1_fine - p) ** 2 for r in rows) / (len(rows) - 1)
    return max(sampling, math.sqrt(spread / len(rows)))


def _equal_cost_section(table: Table, mine: dict[str, list[Row]]) -> Iterator[str]:
    """Top-1 at the budgets, and by how much each row is above or below the first."""
    names = [f"top1_cost{100 * share:.0f}" for share in BUDGETS]
    shares = " | ".join(f"at {100 * share:.0f} % cost" for share in BUDGETS)
    kind = "trainings" if table.trained else "sets of images"
    yield f"### {table.title}\n"
    yield f"| setting | coarse | refined | GFLOPs refined | {shares} | gain (mean) | {kind} |"
    yield "|---|---|---|---|" + "---|" * (len(BUDGETS) + 2)
    first = {row.seed: row for row in mine[table.settings[0].label]}
    for s in table.settings:
        rows = mine[s.label]
        if not rows:
            continue
        at = [f"{100 * _mean(rows, name):.2f}" for name in names]
        ends = [f"{100 * _mean(rows, name):.2f}" for name in ("top1_coarse", "top1_fine")]
        cells = [s.label, *ends, f"{_mean(rows, 'gflops_fine'):.4f}", *at, _gain(rows, first, names), str(len(rows))]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        "Gain: mean difference to the first row over the three costs and the same seeds, in points; ± is one standard "
        "error over the seeds."
    )


def _gain(rows: Sequence[Row], first: dict[int, Row], names: Sequence[str]) -> str:
    """Mean difference to the reference rows of the same seeds, with its standard error over the seeds."""
    gains = [
        100 * sum(getattr(row, name) - getattr(first[row.seed], name) for name in names) / len(names)
        for row in rows
        if row.seed in first
    ]
    if not gains or all(row is first.get(row.seed) for row in rows):
        return ""
    mean = sum(gains) / len(gains)
    if len(gains) < 2:
        return f"{mean:+.2f}"
    spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
    return f"{mean:+.2f} ± {spread:.2f}"


def _section(table: Table, mine: dict[str, list[Row]]) -> Iterator[str]:
    counts = sorted({len(r) for r in mine.values() if r})
    kind = "trainings" if table.trained else "sets of images"
    many = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
    yield f"### {table.title}\n"
    yield f"| setting | top-1 refined | top-1 at η | refined at η | GFLOPs refined | published (other data) | {kind} |"
    yield "|---|---|---|---|---|---|---|"
    for s in table.settings:
        rows = mine[s.label]
        published = "" if s.published is None else f"{s.published:.1f}"
        if not rows:
            yield f"| {s.label} | | | | | {published} | 0 |"
            continue
        error = 100 * _error(rows, table.trained)
        top1, at_eta = (100 * _mean(rows, name) for name in ("top1_fine", "top1_dynamic"))
        share, gflops = 100 * _mean(rows, "share_refined"), _mean(rows, "gflops_fine")
        cells = [s.label, f"{top1:.2f} ± {error:.2f}", f"{at_eta:.2f}", f"{share:.0f} %", f"{gflops:.4f}", published]
        yield f"| {' | '.join(cells)} | {len(rows)} |"
    yield ""
    yield _verdict(table, mine) + f" ({many} {kind}; ± is one standard error)"


def _verdict(table: Table, mine: dict[str, list[Row]]) -> str:
    """Whether the paper's best row is the best here, beyond two standard errors of a difference."""
    compared = [s for s in table.settings if s.published is not None and mine[s.label]]
    if len(compared) < 2:
        return "Too few rows to compare."
    here = {s.label: _mean(mine[s.label], "top1_fine") for s in compared}
    errors = {s.label: _error(mine[s.label], table.trained) for s in compared}
    best, worst = max(here, key=here.__getitem__), min(here, key=here.__getitem__)
    top = max(s.published or 0.0 for s in table.settings)
    tied = [s.label for s in compared if s.published == top]
    if not tied:
        return "Too few rows to compare."
    spread = 100 * (here[best] - here[worst])
    noise = 200 * math.hypot(errors[best], errors[worst])
    if spread < noise:
        return f"**No difference beyond noise**: best and worst are {spread:.2f} points apart."
    if best in tied:
        return f"**Holds**: {best} is best here too, {spread:.2f} points above {worst}."
    theirs = max(tied, key=here.__getitem__)
    gap = 100 * (here[best] - here[theirs])
    if gap < 200 * math.hypot(errors[best], errors[theirs]):
        return f"**Agrees within noise**: {theirs} is {gap:.2f} points below {best}; {worst} is {spread:.2f} below."
    return f"**Does not hold here**: {best} is {gap:.2f} points above {theirs}, the paper's choice."
