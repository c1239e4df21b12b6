"""What the GPU benchmarks share: times of calls and of CUDA graphs, the table of rows, facts about the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambascope.ops import mamba_ssm

FIELDS = (
    "part", "name", "backend", "mode", "batch", "tokens", "channels", "states", "dtype", "ms", "ms_low", "ms_high",
    "graph_ms", "memory_MiB", "note",
)  # fmt: skip


def graphed(model: Callable[[Tensor], Tensor], example: Tensor, *, warmup: int = 3) -> Callable[[Tensor], Tensor]:
    """Captures a model's inference in a CUDA graph for one input shape.

    A Vim of 24 layers launches several hundred kernels; replaying a graph takes one launch. What is captured must not
    depend on the numbers: no early exit, no ``.item()``. So capture a plain Vim, or one stage of a MambaScope, and
    leave the decision outside. Parameters are read when the graph runs: other weights in the same memory need no new
    capture.

    Args:
        model: Module or function from an image batch [B, C, H, W] to one tensor; a module must be in eval mode.
        example: Input with the shape, dtype and device that will be used.
        warmup: Runs before the capture, in which kernels are compiled and chosen.

    Returns:
        A function of a tensor like `example`. Its result is a new tensor; no gradients flow.

    Raises:
        ValueError: `example` is not on a CUDA device, the module is in training mode, or later an input of another
            shape or dtype.
    """
    if not example.is_cuda:
        raise ValueError(f"example must be on a CUDA device, got {example.device}")
    if isinstance(model, torch.nn.Module) and model.training:
        raise ValueError("model must be in eval mode")
    static = example.detach().clone()
    with torch.cuda.device(example.device), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(1, warmup)):
                model(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)

    def replay(x: Tensor) -> Tensor:
        if x.shape != static.shape or x.dtype != static.dtype:
            raise ValueError(f"x must be {list(static.shape)} {static.dtype}, got {list(x.shape)} {x.dtype}")
        static.copy_(x)
        graph.replay()
        return output.clone()

    return replay


def timed(call: Callable[[], object], budget_ms: int) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=budget_ms // 4, rep=budget_ms, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def graph_time(call: Callable[[], object]) -> float | str:
    """ms of a replayed CUDA graph, or nothing if the call cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return round(do_bench_cudagraph(call, rep=50), 4)
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  no graph: {type(error).__name__}")
        return ""


class Table:
    """Collects rows, prints each as it comes."""

    def __init__(self, budget_ms: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.budget_ms = budget_ms

    def add(self, call: Callable[[], object], *, graph: bool = False, **labels: Any) -> float:
        """Times a call; an out-of-memory error becomes a note."""
        row = dict.fromkeys(FIELDS, "") | labels
        ms = float("nan")
        try:
            torch.cuda.reset_peak_memory_stats()
            call()
            row["memory_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            ms, low, high = timed(call, self.budget_ms)
            row |= {"ms": round(ms, 4), "ms_low": round(low, 4), "ms_high": round(high, 4)}
            if graph:
                row["graph_ms"] = graph_time(call)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
            torch.cuda.empty_cache()
        self.rows.append(row)
        shape = "x".join(str(row[k]) for k in ("batch", "tokens", "channels") if row[k] != "")
        what = f"{row['part']:6} {row['name']:22} {row['backend']:28} {row['mode']:9} {shape:14}"
        print(f"{what} {row['ms']!s:>9} ms  graph {row['graph_ms']!s:>8}  {row['memory_MiB']!s:>9} MiB {row['note']}")
        return ms


def machine() -> dict[str, Any]:
    """Device and versions."""
    device = torch.cuda.get_device_properties(0)
    versions = {}
    for package in ("mambascope", "torch", "triton", "timm", "mamba-ssm", "causal-conv1d"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory_GiB": round(device.total_memory / 2**30, 1),
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "peers": {p: mamba_ssm.why_unavailable(p) or "available" for p in ("mamba_ssm", "causal_conv1d")},
    }
