"""The selective scan on the CPU: every backend and the scans of others, forward and with the backward pass.

python benchmarks/scan_cpu.py            writes benchmarks/results/scan_cpu.{csv,json,png}

One direction with bias, softplus, skip and gate at the width of Vim-T (384 channels, 16 states); ``both`` rows are the
two directions of a mixer in one call. Everything is compared with float64 first; if one of ours is wrong, nothing is
timed. The loop of transformers is inside its mixer: it is compared with our mixer, per direction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cpu_peers import hidden, official_formula, scans, transformers_mixer
from measure import RESULTS, medians, show, write
from torch import Tensor

from mambascope.layers.mixer import BidirectionalMamba
from mambascope.ops import ScanDirection, bidirectional_scan, selective_scan
from mambascope.utils import atomic_path

SIZES = ((8, 50), (8, 155), (8, 197), (2, 577), (1, 1025), (1, 4097), (1, 16385))  # images, tokens
LONGEST = {"torch.compile": 200, "formula": 600, "ref": 600}  # tokens: compiling an unrolled loop takes minutes
LIMIT = 1e-4


def tensors(batch: int, length: int, width: int, states: int) -> dict[str, Tensor]:
    """Inputs in the range of a trained layer."""
    make = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    return {
        "x": randn(batch, length, width),
        "dt": 0.5 * randn(batch, length, width),
        "A": -torch.arange(1, states + 1).float().expand(width, states).contiguous(),
        "B": randn(batch, length, states),
        "C": randn(batch, length, states),
        "D": torch.ones(width),
        "z": randn(batch, length, width),
        "bias": torch.full((width,), -4.0),
    }


def package_scan(backend: str) -> Callable[..., Tensor]:
    """Our scan with the arguments of the peers."""

    def scan(x, dt, A, B, C, D, z, bias):  # type: ignore[no-untyped-def]
        return selective_scan(x, dt, A, B, C, D, z, dt_bias=bias, backend=backend)

    return scan


def longest(name: str) -> float:
    """Tokens up to which a scan is timed."""
    return min((tokens for part, tokens in LONGEST.items() if part in name), default=float("inf"))


def both_directions(inputs: dict[str, Tensor], rank: int = 12, return_inputs: bool = False) -> Any:
    """Both directions in one call, with the projection of the step sizes, as the mixer uses it."""
    width, states = inputs["A"].shape
    low, weight = torch.randn(*inputs["x"].shape[:2], rank + 2 * states), torch.randn(width, rank) * 0.1
    side = ScanDirection(inputs["x"], low, weight, inputs["bias"], inputs["A"], inputs["D"])
    call = partial(bidirectional_scan, side, side, inputs["z"])
    return (call, low, weight) if return_inputs else call


def gradients(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward and backward pass of a scan; returns its output."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    grad = torch.ones_like(inputs["x"])

    def run() -> Tensor:
        out = call(**leaves)
        torch.autograd.grad(out, list(leaves.values()), grad)
        return out

    return run


def wrong(candidates: dict[str, Callable[..., Tensor]], width: int, states: int) -> dict[str, float]:
    """Relative errors above the limit, of outputs and of all gradients, at an odd length."""
    inputs = tensors(2, 63, width, states)
    grad = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))

    def results(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        out = call(**leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))]

    reference = results(official_formula, torch.float64)
    errors = {}
    for name, call in candidates.items():
        values = results(call, torch.float32)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, reference, strict=True))
        if not error < LIMIT:
            errors[name] = error
    return errors


def wrong_both(width: int, states: int) -> dict[str, float]:
    """The same for the output of the two directions in one call."""
    inputs = tensors(2, 63, width, states)
    call, low, weight = both_directions(inputs, return_inputs=True)
    x, z, bias, A, D = (inputs[name].double() for name in ("x", "z", "bias", "A", "D"))
    dt, b, c = low.double().split([weight.shape[1], states, states], -1)
    dt = dt @ weight.double().T
    first = official_formula(x, dt, A, b, c, D, z, bias)
    second = official_formula(*(t.flip(1) if t.ndim == 3 else t for t in (x, dt, A, b, c, D, z, bias))).flip(1)
    want = (first + second) * 0.5
    error = float((call() - want).abs().max() / want.abs().max())
    return {} if error < LIMIT else {"both directions": error}


def mixer_rows(rounds: int) -> list[dict[str, Any]]:
    """Our mixer (both directions) against that of transformers (one direction) at the width of Vim-T."""
    mixer, tokens = BidirectionalMamba(192).eval(), torch.randn(8, 197, 192)
    try:
        with hidden("mamba_ssm"), torch.no_grad():
            peer = transformers_mixer(192, 16).eval()
            subjects = {"mixer, cpu": lambda: mixer(tokens), "mixer of transformers": lambda: peer(tokens)}
            times = medians(subjects, rounds)
    except Exception as error:  # whatever a foreign package raises where it cannot run
        print(f"transformers: left out, {type(error).__name__}: {error}", file=sys.stderr)
        return []
    directions = {"mixer, cpu": 2, "mixer of transformers": 1}
    rows = [
        {"scan": name, "mode": "forward", "batch": 8, "tokens": 197, "directions": directions[name], **row}
        for name, row in times.items()
    ]
    show(rows)
    return rows


def measure(width: int, states: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All rows, after the comparison."""
    backends = {backend: package_scan(backend) for backend in ("cpu", "torch", "reference")}
    peers: dict[str, Callable[..., Tensor]] = {}
    for name, scan in scans().items():
        if isinstance(scan, str):
            print(f"{name}: left out, {scan.splitlines()[0]}", file=sys.stderr)
        else:
            peers[name] = scan
    if bad := wrong(backends, width, states) | wrong_both(width, states):
        raise SystemExit(f"error: off the float64 result: {bad}; nothing was timed")
    for name, error in wrong(peers, width, states).items():
        print(f"{name}: left out, relative error {error:.1e}", file=sys.stderr)
        del peers[name]
    rows = mixer_rows(rounds)
    for batch, length in SIZES:
        inputs = tensors(batch, length, width, states)
        candidates = {n: c for n, c in {**backends, **peers}.items() if length <= longest(n)}
        for mode in ("forward", "forward+backward"):
            subjects: dict[str, Callable[[], object]] = {}
            for name, call in candidates.items():
                subjects[name] = partial(call, **inputs) if mode == "forward" else gradients(call, inputs)
            if mode == "forward":
                subjects["cpu, both directions"] = both_directions(inputs)
            with torch.set_grad_enabled(mode != "forward"):
                times = medians(subjects, rounds, seconds=seconds)
            for name, row in times.items():
                two = 2 if "both" in name else 1
                base = times["cpu"]["ms"]
                rows.append(
                    {"scan": name, "mode": mode, "batch": batch, "tokens": length, "directions": two}
                    | row
                    | {"us_per_token": 1e3 * row["ms"] / (batch * length * two), "relative_to_cpu": row["ms"] / base}
                )
            show(rows[-len(times) :])
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Time per token against tokens: flat is linear time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, mode in zip(axes, ("forward", "forward+backward"), strict=True):
        kept = [r for r in rows if r["mode"] == mode and "us_per_token" in r and r["directions"] == 1]
        for name in dict.fromkeys(r["scan"] for r in kept):
            curve = [r for r in kept if r["scan"] == name]
            axis.plot([r["tokens"] for r in curve], [r["us_per_token"] for r in curve], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=mode)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs per token (384 channels, 16 states)")
    axes[0].legend(fontsize=7)
    with atomic_path(RESULTS / "scan_cpu.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="channels E")
    parser.add_argument("--states", type=int, default=16, help="states N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=12.0, help="rough limit for each size and mode")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(args.width, args.states, args.rounds, args.seconds)
    path = write("scan_cpu", rows, {"width": args.width, "states": args.states, "rounds": args.rounds})
    plot(rows)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
