"""Time of the information ratio against painting patch after patch, after checking that both are bit-equal.

python benchmarks/bench_information_ratio.py --output benchmarks/results/mambaeye/information_ratio.csv
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mambascope.eye.glimpses import Coverage, information_ratio, scan_positions
from mambascope.eye.placement import Placement
from mambascope.utils import atomic_path


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Best of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(height: int, width: int, length: int, repeats: int) -> dict[str, object]:
    """One row of the table: both ways on the same random glimpses, taken in turn."""
    placement = Placement.centred(height, width, max(height, width))
    positions = scan_positions("random", length, placement)

    def painted() -> np.ndarray:
        coverage = Coverage(placement)
        return np.array([coverage.add(row, column) for row, column in positions.tolist()]).astype(np.float32)

    def naive() -> np.ndarray:
        """The loop as the definition reads: counts the whole mask after every glimpse."""
        seen = np.zeros((height, width), dtype=bool)
        ratios = []
        for row, column in (positions - (placement.top, placement.left)).tolist():
            seen[row : row + 16, column : column + 16] = True
            ratios.append(seen.sum() / seen.size)
        return np.array(ratios).astype(np.float32)

    fast = information_ratio(positions, placement)
    if not fast.tobytes() == painted().tobytes() == naive().tobytes():
        raise SystemExit(f"{height}x{width}, {length} glimpses: the results differ")
    row: dict[str, object] = {"height": height, "width": width, "glimpses": length}
    for name, call in (("vectorised", lambda: information_ratio(positions, placement)), ("incremental", painted)):
        row[f"{name}_ms"] = round(milliseconds(call, repeats), 3)
    row["plain_loop_ms"] = round(milliseconds(naive, 1), 3)
    return row


def main() -> None:
    """Prints the table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    rows = [
        measure(height, width, length, args.repeats)
        for height, width in ((224, 224), (384, 512), (1024, 1024))
        for length in (256, 1024, 4096)
    ]
    print(*rows[0], sep="\t")
    for row in rows:
        print(*row.values(), sep="\t")
    if args.output:
        with atomic_path(args.output) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
