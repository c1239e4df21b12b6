"""Vim and MambaScope on the CPU against timm's DeiT and against the time of Vim's matrix products alone.

python benchmarks/vim_cpu.py             writes benchmarks/results/vim_cpu.{csv,json,png}

Forward at batch 1, 8 and 64 and at 224, 512 and 1024 pixels, the training step, MambaScope with several shares of
images refined, and peak memory. The kernels are compared with the plain formulas first; if they differ, nothing is
timed. Rounds go through all subjects in turn: quote the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cpu_peers import use_official_formulas
from measure import RESULTS, medians, show, write
from torch import Tensor, nn

from mambascope.evaluation.memory import peak_memory
from mambascope.models import MambaScope, VisionMamba
from mambascope.ops import linear
from mambascope.utils import atomic_path

SIZES = {"T": "tiny", "S": "small"}
OFFICIAL = "official formulas"
SHARES = (0.0, 1 / 3, 0.5, 1.0)  # of the images refined


def make(family: str, size: str, pixels: int = 224, **options: Any) -> nn.Module:
    """A model of timm's registry."""
    extra = {"dynamic_img_size": True} if family == "deit" else {}
    return timm.create_model(f"{family}_{SIZES[size]}_patch16_224", img_size=pixels, **options, **extra)


def products(model: nn.Module, batch: int, tokens: int, multiply: Callable[..., Tensor]) -> Callable[[], None]:
    """The mixers' matrix products alone, on inputs of the right shapes: the floor of any implementation."""
    mixer = model.layers[0].mixer
    weights = [mixer.in_proj.weight, mixer.x_proj.weight, mixer.x_proj_b.weight, mixer.out_proj.weight]
    inputs = [torch.randn(batch, tokens, w.shape[1]) for w in weights]

    def run() -> None:
        for _ in model.layers:
            for x, w in zip(inputs, weights, strict=True):
                multiply(x, w)

    return run


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step with AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def check(vim: VisionMamba, x: Tensor) -> None:
    """The kernels agree with the official formulas, also in a training step, before anything is timed."""
    plain = make("vim", "T")
    plain.load_state_dict(vim.state_dict())
    use_official_formulas(plain)
    results = []
    for model in (plain.eval(), vim.eval()):
        logits = model(x)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), parameters)
        results.append([logits.detach(), *grads])
    error = max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(*results, strict=True))
    if not error < 1e-3:
        raise SystemExit(f"error: kernels and the official formulas differ by {error:.1e}; nothing was timed")


def shares(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Share of an inference's time in each operator, the largest ones."""
    with torch.inference_mode():
        model(x)
        with torch.profiler.profile() as profile:
            for _ in range(5):
                model(x)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    return {name: round(t / total, 3) for name, t in sorted(times.items(), key=lambda item: -item[1])[:6]}


def threshold_for(model: MambaScope, x: Tensor, share: float) -> float:
    """The threshold that refines this share of a batch."""
    if share in (0.0, 1.0):
        return share
    confidence = model.forward_scope(x, 0.0).confidence.sort().values
    count = round(share * len(x))
    return float(confidence[count - 1 : count + 1].mean())


def rows_of(times: dict[str, dict[str, float]], base: str, batch: int, pixels: int, mode: str) -> list[dict[str, Any]]:
    """Table rows in milliseconds per image, with the ratio to one of them."""
    return [
        {"model": name, "mode": mode, "batch": batch, "pixels": pixels}
        | {"ms_per_image": row["ms"] / batch, "min": row["min"] / batch, "max": row["max"] / batch}
        | {"relative_to": base, "ratio": row["ms"] / times[base]["ms"]}
        for name, row in times.items()
    ]


@torch.inference_mode()
def forward_rows(size: str, batch: int, pixels: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Inference of all models at one batch and image size."""
    x = torch.randn(batch, 3, pixels, pixels)
    deit, vim, scope = (make(f, size, pixels).eval() for f in ("deit", "vim", "mambascope"))
    assert isinstance(scope, MambaScope)
    tokens = (pixels // 16) ** 2 + 1
    subjects: dict[str, Callable[[], object]] = {
        f"DeiT-{size} (timm)": lambda: deit(x),
        f"Vim-{size}": lambda: vim(x),
        f"Vim-{size}, matrix products alone": products(vim, batch, tokens, linear),
        f"Vim-{size}, matrix products alone, torch's": products(vim, batch, tokens, F.linear),
    }
    if (size, pixels) == ("T", 224):
        half = make("vim", size).eval().bfloat16()
        subjects[f"Vim-{size}, bfloat16"] = lambda: half(x.bfloat16())
    if (size, batch, pixels) == ("T", 1, 224):
        official = use_official_formulas(make("vim", size).eval())
        subjects[f"Vim-{size}, {OFFICIAL}"] = lambda: official(x)
    for share in SHARES if batch >= 6 else (0.0, 1.0):
        eta = threshold_for(scope, x, share)
        refined = float((scope.forward_scope(x, eta).exited.logical_not()).float().mean())
        subjects[f"MambaScope-{size}, {refined:.0%} refined"] = lambda eta=eta: scope.forward_scope(x, eta)
    return rows_of(medians(subjects, rounds, seconds=seconds), f"DeiT-{size} (timm)", batch, pixels, "forward")


def training_rows(size: str, batch: int, rounds: int, seconds: float, plain: Sequence[str]) -> list[dict[str, Any]]:
    """Training steps, also with plain implementations."""
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    subjects = {f"{n}-{size}": step(make(f, size), x, y) for n, f in (("DeiT", "deit"), ("Vim", "vim"))}
    for backend in plain:
        model = make("vim", size, scan_backend=None if backend == OFFICIAL else backend)
        subjects[f"Vim-{size}, {backend}"] = step(use_official_formulas(model) if backend == OFFICIAL else model, x, y)
    return rows_of(medians(subjects, rounds, seconds=seconds), f"Vim-{size}", batch, 224, "training step")


def _peak(family: str, size: str, pixels: int, train: bool, queue: Any) -> None:
    model, x = make(family, size, pixels), torch.randn(1, 3, pixels, pixels)
    if train:
        queue.put(peak_memory(lambda: model(x).sum().backward()))
    else:
        with torch.inference_mode():
            queue.put(peak_memory(lambda: model.eval()(x)))


def memory_rows(size: str) -> list[dict[str, Any]]:
    """Memory above the model's own for one image, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    context, rows = multiprocessing.get_context("spawn"), []
    for pixels in (224, 512, 1024):
        for train in (False, True):
            for family in ("deit", "vim"):
                queue = context.SimpleQueue()
                process = context.Process(target=_peak, args=(family, size, pixels, train, queue))
                process.start()
                process.join()
                mode = "memory, forward and backward" if train else "memory, forward"
                peak = float("nan") if process.exitcode else queue.get()
                rows.append({"model": f"{family}-{size}", "mode": mode, "batch": 1, "pixels": pixels, "MiB": peak})
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Time per image against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    kept = [r for r in rows if r["mode"] == "forward" and r["batch"] == 1 and "-T" in r["model"]]
    for name in dict.fromkeys(r["model"] for r in kept):
        mine = sorted((r for r in kept if r["model"] == name), key=lambda r: r["pixels"])
        tokens = [(r["pixels"] // 16) ** 2 + 1 for r in mine]
        axis.plot(tokens, [r["ms_per_image"] for r in mine], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens of the full image", ylabel="ms per image, batch 1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with atomic_path(RESULTS / "vim_cpu.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=25.0, help="rough limit for each table")
    parser.add_argument("--quick", action="store_true", help="batch 8 at 224 pixels only; writes nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    vim = make("vim", "T").eval()
    assert isinstance(vim, VisionMamba)
    check(vim, torch.randn(1, 3, 224, 224))
    rows: list[dict[str, Any]] = []

    def add(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        show(new)

    add(forward_rows("T", 8, 224, args.rounds, args.seconds))
    if args.quick:
        return
    for size, batch, pixels in (
        *(("T", b, 224) for b in (1, 64)),
        *(("T", 1, p) for p in (512, 1024)),
        *(("S", b, 224) for b in (1, 8)),
    ):
        add(forward_rows(size, batch, pixels, args.rounds, args.seconds))
    rounds = min(args.rounds, 5)
    add(training_rows("T", 8, rounds, args.seconds, ("torch", "reference")))
    add(training_rows("T", 1, rounds, args.seconds, (OFFICIAL,)))  # at batch 8 one such step takes minutes
    add(training_rows("S", 8, rounds, args.seconds, ()))
    add(memory_rows("T"))
    profile = shares(vim, torch.randn(8, 3, 224, 224))
    path = write("vim_cpu", rows, {"rounds": args.rounds, "share_of_time_vim_t_batch_8": profile})
    plot(rows)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
