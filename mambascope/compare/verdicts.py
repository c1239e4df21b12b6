"""The tables of an ablation in Markdown: whether the paper's best choice is the best one here, and gains at equal cost.

No row says more than its noise: ± is one standard error, and a difference counts from two of them on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mambascope.compare.lists import Comparison, Entry
from mambascope.compare.sources import make_source
from mambascope.compare.table import BUDGETS, HONEST, Row, Spread, budget_name


def markdown(plan: Comparison, rows: Sequence[Row]) -> str:
    """A section for every table that has rows.

    Args:
        plan: The whole list: settings without rows are named, too.
        rows: What was evaluated of it.
    """
    parts = []
    for name, entry in plan.entries.items():
        figures = {(row.setting, row.point): row for row in rows if row.entry == name}
        if entry.table is not None and figures:
            trained = make_source(plan, name, entry.settings[0]).trained
            section = _gain_section if entry.table == "gain" else _best_section
            parts.append("\n".join(section(entry, figures, trained)))
    return "\n\n".join(parts) + "\n"


Figures = dict[tuple[str, str], Row]


def _percent(value: Spread) -> str:
    return f"{100 * value.mean:.2f}"


def _kind(trained: bool) -> str:
    return "trainings" if trained else "sets of images"


def _error(row: Row, trained: bool) -> float:
    """Standard error of the mean top-1: of the trainings where there are several, else of the number of images."""
    p = row.top1.mean
    sampling = math.sqrt(p * (1 - p) / (row.images * row.seeds))
    return max(sampling, row.top1.error) if trained else sampling


def _gain_section(entry: Entry, figures: Figures, trained: bool) -> Iterator[str]:
    """Top-1 at the budgets, and by how much each row is above or below the first."""
    shares = " | ".join(f"at {budget_name(share)}" for share in BUDGETS)
    yield f"### {entry.label}\n"
    yield f"| setting | coarse | refined | GFLOPs refined | {shares} | gain (mean) | {_kind(trained)} |"
    yield "|---|---|---|---|" + "---|" * (len(BUDGETS) + 2)
    first = entry.settings[0].label
    for label in (s.label for s in entry.settings):
        refined = figures.get((label, "refined"))
        if refined is None:
            continue
        at = [_percent(figures[label, budget_name(share)].top1) for share in BUDGETS]
        ends = [_percent(figures[label, "coarse"].top1), _percent(refined.top1)]
        cost = f"{refined.gflops[HONEST].mean:.4f}"
        difference = "" if label == first else _difference(gain(figures, label, first))
        yield f"| {' | '.join([label, *ends, cost, *at, difference, str(refined.seeds)])} |"
    yield ""
    yield (
        "Gain: mean difference to the first row over the three costs and the same seeds, in points; ± is one standard "
        "error over the seeds."
    )


def gain(figures: Figures, label: str, first: str) -> Spread:
    """Mean difference of a row's top-1 to the first row's at the same costs, in points, for each seed."""
    pairs = [(figures[label, name].top1, figures[first, name].top1) for name in map(budget_name, BUDGETS)]
    differences = [[a - b for a, b in zip(x.values, y.values, strict=True)] for x, y in pairs]
    return Spread(tuple(100 * math.fsum(values) / len(values) for values in zip(*differences, strict=True)))


def _difference(value: Spread) -> str:
    return f"{value.mean:+.2f}" + (f" ± {value.error:.2f}" if len(value.values) > 1 else "")


def _best_section(entry: Entry, figures: Figures, trained: bool) -> Iterator[str]:
    seeds = sorted({row.seeds for row in figures.values()})
    number = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    kind = _kind(trained)
    yield f"### {entry.label}\n"
    yield f"| setting | top-1 refined | top-1 at η | refined at η | GFLOPs refined | published (other data) | {kind} |"
    yield "|---|---|---|---|---|---|---|"
    for s in entry.settings:
        published = "" if s.published is None else f"{s.published:.1f}"
        row = figures.get((s.label, "refined"))
        if row is None:
            yield f"| {s.label} | | | | | {published} | 0 |"
            continue
        model = figures[s.label, "model"]
        share, cost = f"{100 * model.share_refined.mean:.0f} %", f"{row.gflops[HONEST].mean:.4f}"
        top1 = f"{_percent(row.top1)} ± {100 * _error(row, trained):.2f}"
        yield f"| {' | '.join([s.label, top1, _percent(model.top1), share, cost, published])} | {row.seeds} |"
    yield ""
    yield f"{verdict(entry, figures, trained)} ({number} {kind}; ± is one standard error)"


def verdict(entry: Entry, figures: Figures, trained: bool) -> str:
    """Whether the paper's best setting is the best here, beyond two standard errors of a difference."""
    compared = [s for s in entry.settings if s.published is not None and (s.label, "refined") in figures]
    here = {s.label: figures[s.label, "refined"].top1.mean for s in compared}
    errors = {s.label: _error(figures[s.label, "refined"], trained) for s in compared}
    top = max((s.published for s in entry.settings if s.published is not None), default=None)
    tied = [s.label for s in compared if s.published == top]
    if len(compared) < 2 or not tied:
        return "Too few rows to compare."
    best, worst = max(here, key=here.__getitem__), min(here, key=here.__getitem__)
    spread = 100 * (here[best] - here[worst])
    if spread < 200 * math.hypot(errors[best], errors[worst]):
        return f"**No difference beyond noise**: best and worst are {spread:.2f} points apart."
    if best in tied:
        return f"**Holds**: {best} is best here too, {spread:.2f} points above {worst}."
    paper = max(tied, key=here.__getitem__)
    gap = 100 * (here[best] - here[paper])
    if gap < 200 * math.hypot(errors[best], errors[paper]):
        return f"**Agrees within noise**: {paper} is {gap:.2f} points below {best}; {worst} is {spread:.2f} below."
    return f"**Does not hold here**: {best} is {gap:.2f} points above {paper}, the paper's choice."
