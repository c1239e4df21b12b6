"""Vim-T and MambaScope-T on the CPU against timm's DeiT-T and the time of Vim-T's matrix products alone.

python benchmarks/vim_cpu.py --output benchmarks/results/vim_cpu.csv

Rounds go through all subjects in turn, so that a machine that slows down slows all of them; quote the ratios.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import mambascope
from mambascope.models.checkpoint import atomic_path
from mambascope.ops import linear, report


def products(model: torch.nn.Module, batch: int, tokens: int) -> Callable[[], None]:
    """The mixers' matrix products alone, on inputs of the right shapes: the floor of any implementation."""
    mixer = model.layers[0].mixer
    weights = [mixer.in_proj.weight, mixer.x_proj.weight, mixer.x_proj_b.weight, mixer.out_proj.weight]
    inputs = [torch.randn(batch, tokens, w.shape[1]) for w in weights]

    def run() -> None:
        for _ in model.layers:
            for x, w in zip(inputs, weights, strict=True):
                linear(x, w)

    return run


def check(vim: torch.nn.Module, x: torch.Tensor) -> None:
    """The kernels agree with the plain formulas before anything is timed."""
    plain = timm.create_model("vim_tiny_patch16_224", scan_backend="reference").eval()
    plain.load_state_dict(vim.state_dict())
    error = (plain(x) - vim(x)).norm() / plain(x).norm()
    if not error < 1e-4:
        raise SystemExit(f"error: kernels and reference differ by {error:.1e}; nothing was timed")


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vim_cpu.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 224, 224)
    vim = timm.create_model("vim_tiny_patch16_224").eval()
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    scope = timm.create_model("mambascope_tiny_patch16_224").eval()
    with torch.inference_mode():
        check(vim, x[:1])
        confidence = scope.forward_scope(x, 0.0).confidence.sort().values
        third = len(confidence) // 3
        eta = float(confidence[third - 1 : third + 1].mean())  # the least confident third is refined
        refined = float((confidence < eta).float().mean())
        subjects: dict[str, Callable[[], object]] = {
            "DeiT-T (timm)": lambda: deit(x),
            "Vim-T": lambda: vim(x),
            "Vim-T, matrix products alone": products(vim, args.batch, 197),
            "MambaScope-T, coarse only": lambda: scope.forward_scope(x, 0.0),
            f"MambaScope-T, {refined:.0%} refined": lambda: scope.forward_scope(x, eta),
            "MambaScope-T, all refined": lambda: scope.forward_scope(x, 1.0),
        }
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for round_ in range(args.rounds + 2):
            for name, call in subjects.items():
                start = time.perf_counter()
                call()
                if round_ >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3 / args.batch)
    base = statistics.median(times["DeiT-T (timm)"])
    rows = [
        {"model": name, "ms_per_image": round(statistics.median(t), 3), "min": round(min(t), 3)}
        | {"relative_to_deit": round(statistics.median(t) / base, 3)}
        for name, t in times.items()
    ]
    with atomic_path(args.output) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "mambascope": mambascope.__version__,
        "backends": report().splitlines()[0],
    }
    with atomic_path(args.output.with_suffix(".json")) as path:
        path.write_text(json.dumps(facts, indent=2) + "\n")
    for row in rows:
        print(f"{row['model']:32s} {row['ms_per_image']:8.2f} ms/image  {row['relative_to_deit']:5.2f} x DeiT-T")


if __name__ == "__main__":
    main()
