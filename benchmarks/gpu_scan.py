"""The GPU kernels against their peers, op by op and model by model. One command; results as CSV beside a machine file.

python benchmarks/gpu_scan.py                             everything, some minutes on an H200
python benchmarks/gpu_scan.py --parts ops --quick         a first look
python benchmarks/gpu_scan.py --parts tune                block shapes of the scan kernels

Correctness comes first: if a backend disagrees with the float64 reference, nothing is timed. Times are medians of CUDA
events with the L2 cache cleared before every run; ``graph_ms`` replays a CUDA graph, which leaves launching out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_measure import FIELDS, Table, graphed, machine
from gpu_peers import OwnLayout, functions, use_their_mixer
from torch import Tensor

from mambascope.ops import ScanDirection, bidirectional_conv, bidirectional_scan, mamba_ssm, triton
from mambascope.ops.backends import Request, why_not
from mambascope.utils import atomic_path

PARTS = ("ops", "conv", "models", "tune")
OURS = ("triton", "torch", "mamba_ssm")
# batch, tokens, channels: Vim-T and Vim-S at the lengths of both stages, then long sequences
SIZES = [(128, n, 384) for n in (50, 155, 197)] + [(64, n, 768) for n in (50, 155, 197)]
SIZES += [(1, 197, 384), (32, 1024, 384), (8, 4097, 384), (1, 4097, 384)]


@contextlib.contextmanager
def padding(on: bool) -> Iterator[None]:
    """Switches the padding of the mamba_ssm backend."""
    before = os.environ.get(mamba_ssm.PAD_ENV)
    os.environ[mamba_ssm.PAD_ENV] = str(int(on))
    try:
        yield
    finally:
        if before is None:
            del os.environ[mamba_ssm.PAD_ENV]
        else:
            os.environ[mamba_ssm.PAD_ENV] = before


def scan_tensors(batch: int, length: int, width: int, states: int = 16, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Random inputs as a mixer makes them: dt bias and A in their usual range, x and z halves of one tensor."""
    rank, kind = -(-width // 32), {"device": "cuda"}
    xz = torch.randn(batch, length, 2 * width, **kind).to(dtype)
    tensors = {"z": xz[..., width:]}
    for side in ("f", "b"):
        step = torch.exp(torch.rand(width, **kind) * 4.6 - 6.9)
        tensors |= {
            f"x_{side}": xz[..., :width] if side == "f" else torch.randn(batch, length, width, **kind).to(dtype),
            f"proj_{side}": torch.randn(batch, length, rank + 2 * states, **kind).to(dtype),
            f"dt_weight_{side}": (torch.rand(width, rank, **kind) * 2 - 1) * rank**-0.5,
            f"dt_bias_{side}": step + torch.log(-torch.expm1(-step)),
            f"A_{side}": -torch.arange(1, states + 1, **kind).float().expand(width, states).contiguous(),
            f"D_{side}": torch.ones(width, **kind),
        }
    return tensors


def our_scan(tensors: dict[str, Tensor], backend: str) -> Tensor:
    directions = [ScanDirection(*(tensors[f"{k}_{side}"] for k in ScanDirection._fields)) for side in ("f", "b")]
    return bidirectional_scan(*directions, tensors["z"], scale=0.5, backend=backend)


def errors(function: Callable[..., Tensor], tensors: dict[str, Tensor], backend: str) -> dict[str, float]:
    """Relative errors of output and gradients against the float64 reference."""
    results: list[list[Tensor]] = []
    grad = torch.randn(next(iter(tensors.values())).shape, device="cuda", dtype=torch.float64)
    for name, values in (("reference", {k: v.double() for k, v in tensors.items()}), (backend, tensors)):
        leaves = {k: v.detach().requires_grad_() for k, v in values.items()}
        out = function(leaves, name)
        results.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))])
    relative = {}
    for name, want, have in zip(("output", *tensors), *results, strict=True):
        error = ((have.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        relative[name] = error if have.isfinite().all() else float("inf")
    return relative


def wrong(backends: list[str]) -> list[str]:
    """What disagrees with the reference, in words."""
    messages = []
    for backend, length, (dtype, limit) in itertools.product(
        backends, (7, 50, 197), ((torch.float32, 1e-3), (torch.bfloat16, 5e-2))
    ):
        tensors = scan_tensors(2, length, 96, dtype=dtype)
        for name, error in errors(our_scan, tensors, backend).items():
            if not error <= limit:
                messages.append(f"scan {backend} {dtype} L={length} {name}: relative error {error:.2e} > {limit:.0e}")
    try:
        functions()
    except RuntimeError:
        return messages
    tensors = scan_tensors(2, 197, 96, dtype=torch.float32)
    first, second = (y[..., :197].transpose(1, 2) for y in OwnLayout(tensors, pad=True).outputs())
    want = our_scan({k: v.double() for k, v in tensors.items()}, "reference")
    error = (((first + second.flip(1)) * 0.5 - want).abs().max() / want.abs().max()).item()
    return messages if error <= 1e-3 else [*messages, f"peer in its own layout: relative error {error:.2e}"]


def variants() -> list[tuple[str, str, bool]]:
    """Label, backend and padding of what can run here."""
    runnable = []
    for backend in OURS:
        reason = why_not(backend, Request("scan", "cuda", torch.bfloat16, 16))
        if reason is not None:
            print(f"{backend}: left out, {reason}")
        elif backend == "mamba_ssm":
            runnable += [("mamba_ssm", backend, False), ("mamba_ssm padded", backend, True)]
        else:
            runnable.append((backend, backend, False))
    return runnable


def peers(tensors: dict[str, Tensor]) -> Iterator[tuple[str, OwnLayout]]:
    with contextlib.suppress(RuntimeError):
        for pad in (False, True):
            yield f"mamba_ssm own layout{' padded' if pad else ''}", OwnLayout(tensors, pad=pad)


def bench_ops(table: Table, quick: bool) -> None:
    for batch, length, width in SIZES[:3] if quick else SIZES:
        tensors = scan_tensors(batch, length, width)
        label = {"part": "ops", "name": "bidirectional_scan", "batch": batch, "tokens": length, "channels": width}
        label |= {"states": 16, "dtype": "bfloat16"}
        grad = torch.randn(batch, length, width, device="cuda").bfloat16()
        for name, backend, pad in variants():
            with padding(pad):
                with torch.no_grad():
                    table.add(
                        lambda b=backend, t=tensors: our_scan(t, b),
                        graph=backend != "torch",
                        **label,
                        backend=name,
                        mode="forward",
                    )
                leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}

                def train(leaves: dict = leaves, backend: str = backend, grad: Tensor = grad) -> object:
                    return torch.autograd.grad(our_scan(leaves, backend), list(leaves.values()), grad)

                table.add(train, **label, backend=name, mode="training")
        for name, peer in peers(tensors):
            with torch.no_grad():
                table.add(peer, graph=True, **label, backend=name, mode="forward")
            leaves = peer.leaves()
            shape = peer.sides[0][0][0].shape
            peer_grad = torch.randn(shape, device="cuda").bfloat16()

            def train_peer(peer: OwnLayout = peer, leaves: list = leaves, grad: Tensor = peer_grad) -> object:
                return torch.autograd.grad(peer(), leaves, grad)

            table.add(train_peer, **label, backend=name, mode="training")
    small = scan_tensors(8, 50, 384)
    label = {"part": "ops", "name": "bidirectional_scan", "batch": 8, "tokens": 50, "channels": 384, "states": 16}
    for backend in ("reference", "triton"):
        with torch.no_grad():
            table.add(lambda b=backend: our_scan(small, b), **label, backend=backend, mode="forward", dtype="bfloat16")


def bench_conv(table: Table, quick: bool) -> None:
    for batch, length, width in SIZES[2:3] if quick else SIZES:
        x = torch.randn(batch, length, 2 * width, device="cuda").bfloat16()[..., :width]
        weights = [torch.randn(s, device="cuda") for s in ((width, 4), (width,), (width, 4), (width,))]
        grad = torch.randn(batch, length, width, device="cuda").bfloat16()
        label = {"part": "conv", "name": "bidirectional_conv", "batch": batch, "tokens": length, "channels": width}
        for backend in OURS:
            if why_not(backend, Request("conv", "cuda", torch.bfloat16, 4)) is not None:
                continue
            with torch.no_grad():

                def forward(x: Tensor = x, w: list = weights, b: str = backend) -> object:
                    return bidirectional_conv(x, *w, backend=b)

                table.add(forward, graph=True, **label, backend=backend, mode="forward", dtype="bfloat16")
            leaves = [t.detach().requires_grad_() for t in (x, *weights)]

            def train(leaves: list = leaves, grad: Tensor = grad, b: str = backend) -> object:
                return torch.autograd.grad(bidirectional_conv(*leaves, backend=b), leaves, [grad, grad])

            table.add(train, **label, backend=backend, mode="training", dtype="bfloat16")


def models() -> Iterator[tuple[str, str, bool, Callable[[], torch.nn.Module]]]:
    """Name, backend, padding and how to make it."""
    import timm

    import mambascope.models  # noqa: F401  (registers the entries)

    name = "vim_small_patch16_224"
    for label, backend, pad in variants():
        yield name, label, pad, lambda b=backend: timm.create_model(name, scan_backend=b)
    with contextlib.suppress(RuntimeError):
        functions()
        yield name, "mamba_ssm Vim's own order", False, lambda: use_their_mixer(timm.create_model(name))
    yield "deit_small_patch16_224", "timm", False, lambda: timm.create_model("deit_small_patch16_224")


def bench_models(table: Table, quick: bool) -> None:
    for name, backend, pad, make in models():
        torch.manual_seed(0)
        model = make().cuda().eval()
        label = {"part": "models", "name": name, "backend": backend, "tokens": 197, "dtype": "bfloat16 autocast"}

        def infer(x: Tensor, model: torch.nn.Module = model) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                return model(x)

        with padding(pad):
            for batch in (128,) if quick else (1, 8, 128):
                x = torch.randn(batch, 3, 224, 224, device="cuda")
                with torch.no_grad():
                    table.add(lambda f=infer, x=x: f(x), **label, batch=batch, mode="forward")
                    try:
                        replay = graphed(infer, x)
                    except RuntimeError as error:
                        print(f"  no graph: {str(error).splitlines()[0]}")
                    else:
                        table.add(lambda f=replay, x=x: f(x), **label, batch=batch, mode="graph")
            model.train()
            batch = 64
            x, y = torch.randn(batch, 3, 224, 224, device="cuda"), torch.randint(1000, (batch,), device="cuda")
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)

            def step(model: Any = model, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()

            table.add(step, **label, batch=batch, mode="step")
        del model, optimizer
        torch.cuda.empty_cache()


def bench_tune(table: Table, quick: bool) -> None:
    """Block shapes of the scan kernels. The best row should be what ``scan.py`` has as its constants."""
    from mambascope.ops.triton import scan

    plan, before = scan._plan, (scan._FORWARD_TOKENS, scan._BACKWARD_TOKENS, scan._REGISTERS)
    try:
        for (batch, length, width), per_thread in itertools.product(SIZES[2:3] if quick else SIZES[:6:2], (1, 2)):
            tensors = scan_tensors(batch, length, width)
            grad = torch.randn(batch, length, width, device="cuda").bfloat16()
            leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}

            def fixed(inputs: Any, segment: int | None, per_thread: int = per_thread) -> Any:
                return plan(inputs, segment)._replace(
                    channels=32 * per_thread, per_thread=per_thread, blocks=-(-inputs.sizes[2] // (32 * per_thread))
                )

            scan._plan = fixed
            label = {"part": "tune", "batch": batch, "tokens": length, "channels": width, "backend": "triton"}
            for tokens, registers in itertools.product((2, 4, 8), (128, 168, 255) if per_thread == 2 else (0,)):
                scan._FORWARD_TOKENS, scan._REGISTERS = tokens, registers
                note = f"CPT={per_thread} T={tokens} registers={registers}"
                with torch.no_grad():
                    table.add(lambda t=tensors: our_scan(t, "triton"), graph=True, **label, name="forward", mode=note)
            scan._FORWARD_TOKENS = before[0]
            for tokens, registers in itertools.product((4, 8), (128, 168, 255) if per_thread == 2 else (0,)):
                scan._BACKWARD_TOKENS, scan._REGISTERS = tokens, registers

                def train(leaves: dict = leaves, grad: Tensor = grad) -> object:
                    return torch.autograd.grad(our_scan(leaves, "triton"), list(leaves.values()), grad)

                table.add(train, **label, name="training", mode=f"CPT={per_thread} T={tokens} registers={registers}")
            scan._FORWARD_TOKENS, scan._BACKWARD_TOKENS, scan._REGISTERS = before
    finally:
        scan._plan = plan
        scan._FORWARD_TOKENS, scan._BACKWARD_TOKENS, scan._REGISTERS = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["ops", "conv", "models"])
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--budget-ms", type=int, default=200, help="time spent on one measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    reason = triton.why_unavailable()
    if reason is not None:
        print(f"gpu_scan: nothing to measure here: {reason}")
        return 0
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    backends = [b for b in OURS if why_not(b, Request("scan", "cuda", torch.float32, 16)) is None]
    messages = wrong(backends)
    if messages:
        print("\n".join(messages))
        print("gpu_scan: wrong results, nothing is timed")
        return 1
    print(f"correct: {', '.join(backends)}")
    table = Table(args.budget_ms)
    for part in args.parts:
        {"ops": bench_ops, "conv": bench_conv, "models": bench_models, "tune": bench_tune}[part](table, args.quick)
    args.output.mkdir(parents=True, exist_ok=True)
    info = machine()
    stem = f"gpu_scan_{info['device'].lower().replace(' ', '_')}{'_quick' if args.quick else ''}"
    with (
        atomic_path(args.output / f"{stem}.csv") as path,
        open(path, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table.rows)
    with atomic_path(args.output / f"{stem}.json") as path:
        path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.output / stem}.csv and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
