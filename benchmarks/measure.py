"""What the CPU benchmarks share: rounds through all subjects in turn, facts about the machine, result files."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mambascope.evaluation.machine import machine_info
from mambascope.utils import atomic_path

RESULTS = Path(__file__).parent / "results"
PEERS = ("mambapy", "transformers", "mamba_ssm")


def medians(
    subjects: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, seconds: float = 60.0
) -> dict[str, dict[str, float]]:
    """Times every subject once per round, so that a machine that slows down slows all of them.

    Args:
        subjects: Calls by name.
        rounds: Counted rounds, at least three; fewer than asked for if they take longer than `seconds`.
        warmup: Rounds before them.
        seconds: Rough limit for the counted rounds.

    Returns:
        Per name ``ms`` (median), ``min`` and ``max`` of a call in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    start = time.perf_counter()
    for round_ in range(warmup + rounds):
        if round_ == warmup:
            start = time.perf_counter()
        if round_ >= warmup + 3 and time.perf_counter() - start > seconds:
            break
        for name, call in subjects.items():
            begin = time.perf_counter()
            call()
            if round_ >= warmup:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: {"ms": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def machine() -> dict[str, Any]:
    """Processor, threads and versions, also of the peers."""
    info = machine_info(torch.device("cpu"))
    info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    for package in PEERS:
        try:
            info["versions"][package] = version(package)
        except PackageNotFoundError:
            info["versions"][package] = "not installed"
    return info


def write(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``name.csv`` and, beside it, ``name.json`` with the machine and `facts`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[str] = list(dict.fromkeys(key for row in rows for key in row))
    path = folder / f"{name}.csv"
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({**machine(), **facts}, indent=2, ensure_ascii=False) + "\n")
    return path


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints rows as a table."""
    table = [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in table for key in row))
    widths = {c: max(len(c), *(len(row.get(c, "")) for row in table)) for c in columns}
    print("  ".join(c.ljust(widths[c]) for c in columns))
    for row in table:
        print("  ".join(row.get(c, "").ljust(widths[c]) for c in columns), flush=True)
