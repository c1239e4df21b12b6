"""Time and memory of MambaEye against the number of glimpses, each length in a process of its own.

Reading on with the carried state must cost the same per glimpse and hold the same memory however many came before;
reading a whole sequence in one pass is shown beside it. Memory is the peak resident set above what the process holds
after reading its first chunk. Before timing, the two ways are checked to give the same last answer.

python benchmarks/eye_scaling.py                  # writes benchmarks/results/mambaeye/scaling.csv and scaling.png
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor

import mambascope  # noqa: F401  (registers the timm entries)
from mambascope.eye import MambaEye
from mambascope.utils import atomic_path

RESULTS = Path(__file__).parent / "results" / "mambaeye"
MODES = {"stream": "carried state, 256 at a time", "step": "carried state, one at a time", "whole": "one pass"}
CHUNK = 256
STEP_LIMIT = 4096  # one at a time is slow, and no different beyond


@functools.lru_cache(maxsize=1)
def block(number: int, patch_dim: int) -> tuple[Tensor, Tensor]:
    """A chunk of random glimpses."""
    generator = torch.Generator().manual_seed(number)
    patches = torch.randint(0, 256, (1, CHUNK, patch_dim), dtype=torch.uint8, generator=generator)
    return patches, torch.randint(-200, 200, (1, CHUNK, 2), generator=generator).float()


def glimpses(model: MambaEye, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Random glimpses that depend on their numbers alone, so that no mode has to hold all of them."""
    numbers = range(start // CHUNK, math.ceil(stop / CHUNK))
    parts = [block(number, model.config.patch_dim) for number in numbers]
    first = start // CHUNK * CHUNK
    patches, moves = (torch.cat(part, 1)[:, start - first : stop - first] for part in zip(*parts, strict=True))
    return patches, moves


def pieces(mode: str, length: int) -> Iterator[tuple[int, int]]:
    """First and last glimpse of each call."""
    size = {"stream": CHUNK, "step": 1, "whole": length}[mode]
    yield from ((start, min(start + size, length)) for start in range(0, length, size))


@torch.inference_mode()
def measure(name: str, mode: str, length: int, device: str) -> dict[str, object]:
    """One row of the table, in this process."""
    torch.manual_seed(0)
    model: MambaEye = timm.create_model(name).to(device).eval()  # type: ignore[assignment]
    cuda = device.startswith("cuda")

    def read(mode: str, length: int) -> Tensor:
        state = model.start(1)
        for start, stop in pieces(mode, length):
            patches, moves = glimpses(model, start, stop)
            state = model.step(state, patches.to(device), moves.to(device))
        held.append(state.nbytes)
        assert state.logits is not None
        return state.logits.cpu()

    held: list[int] = []
    read("step", 4)
    read("stream", 2 * CHUNK)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = time.perf_counter()
    answer = read(mode, length)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "model": name,
        "mode": mode,
        "glimpses": length,
        "ms": round(1e3 * seconds, 2),
        "us_per_glimpse": round(1e6 * seconds / length, 2),
        "state_mb": round(held[-1] / 1e6, 3),
        "extra_peak_mb": round(max(0.0, peak - before), 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "check": [round(float(v), 4) for v in answer[0, :4]],
    }


def slope(rows: list[dict[str, object]]) -> float:
    """Exponent of time against length over the longer half: 1 is linear."""
    points = [(math.log(float(str(r["glimpses"]))), math.log(float(str(r["ms"])))) for r in rows]
    points = points[len(points) // 2 - 1 :] if len(points) > 3 else points
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> None:
    """Measures every length, prints the table, and writes CSV and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mambaeye_tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--measure-only", nargs=2, help=argparse.SUPPRESS
    )  # mode and length, in the process that is measured
    args = parser.parse_args()
    if args.measure_only:
        print(json.dumps(measure(args.model, args.measure_only[0], int(args.measure_only[1]), args.device)))
        return
    rows: list[dict[str, object]] = []
    for mode in MODES:
        for length in args.lengths:
            if mode == "step" and length > STEP_LIMIT:
                continue
            command = [sys.executable, __file__, "--model", args.model, "--device", args.device]
            done = subprocess.run(
                [*command, "--measure-only", mode, str(length)], check=True, capture_output=True, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            for earlier in rows:
                same = all(abs(a - b) < 2e-3 for a, b in zip(row["check"], earlier["check"], strict=True))  # type: ignore[call-overload]
                if earlier["glimpses"] == length and not same:
                    raise SystemExit(f"{mode} and {earlier['mode']} differ after {length} glimpses")
            rows.append(row)
            shown = {k: v for k, v in row.items() if k not in ("check", "model")}
            print(*(f"{k} {v}" for k, v in shown.items()), sep="  ", flush=True)
    for mode in MODES:
        print(f"{mode}: time grows with glimpses to the power {slope([r for r in rows if r['mode'] == mode]):.2f}")
    fields = [k for k in rows[0] if k != "check"]
    with atomic_path(args.out / "scaling.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from mambascope.eye.plots import plot_scaling

    series = {}
    for mode, label in MODES.items():
        mode_rows = [r for r in rows if r["mode"] == mode]
        series[label] = tuple([float(str(r[k])) for r in mode_rows] for k in ("glimpses", "ms", "extra_peak_mb"))
    plot_scaling(series, args.out / "scaling.png", title=f"{args.model} on {rows[0]['device']}")  # type: ignore[arg-type]
    print(f"wrote {args.out / 'scaling.csv'}")


if __name__ == "__main__":
    main()
