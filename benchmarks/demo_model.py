"""The shipped demo model in bfloat16 and as ONNX, on the demo's 2,000 test images.

python benchmarks/demo_model.py          writes benchmarks/results/demo_{precision,onnx}.{csv,json}

Precision: accuracy of both stages and of dynamic inference at the model's threshold after ``model.bfloat16()``, beside
float32. ONNX: CPU milliseconds per image (what others do on the machine is not counted) of the exported stages in
onnxruntime and of the package, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import show, write
from torch import Tensor

import mambascope
from mambascope.commands.early_exit import EarlyExit
from mambascope.commands.export import main as export
from mambascope.data.open import validation_loader
from mambascope.evaluation.collect import collect
from mambascope.evaluation.sweep import StageRecord, sweep
from mambascope.models.scope import MambaScope
from mambascope.models.weights import find_weights

MODEL = "scopedigits"


def data(length: int) -> list[tuple[Tensor, Tensor]]:
    """The demo's test images in batches of 64, and their labels."""
    source = validation_loader(mambascope.load(MODEL), find_weights(MODEL), None, batch_size=64)
    return [(images, labels) for images, labels in itertools.islice(source.loader, -(-length // 64))]


def precision_rows(batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Accuracies by precision and way to run the model; changes in points."""
    records: dict[str, StageRecord] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = mambascope.load(MODEL).to(dtype)
        records[name] = collect(model, [(x.to(dtype), y) for x, y in batches], progress=False).record
    eta = mambascope.load(MODEL).threshold
    rows = []
    for way, at in (("coarse look only", 0.0), ("everything refined", 1.0), ("dynamic", eta)):
        full = sweep(records["float32"], thresholds=[at])
        for name, record in records.items():
            curve = sweep(record, thresholds=[at])
            rows.append(
                {
                    "way": way,
                    "threshold": at,
                    "precision": name,
                    "images": len(record),
                    "top1": 100 * float(curve.top1[0]),
                    "change_points": 100 * float(curve.top1[0] - full.top1[0]),
                    "refined": 100 * float(curve.share_refined[0]),
                }
            )
    return rows


def cpu_medians(subjects: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each call, all in turn, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 2):
        for name, call in subjects.items():
            begin = time.process_time()
            call()
            if round_ >= 2:
                times[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def onnx_rows(batches: list[tuple[Tensor, Tensor]], rounds: int) -> list[dict[str, Any]]:
    """CPU milliseconds per image of each way at batch 1 and 64, and how many times those of the package they are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    torch.set_num_threads(1)
    model: MambaScope = mambascope.load(MODEL)
    images = batches[0][0]
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        assert export([MODEL, "--out", folder, "--format", "onnx"]) == 0
        early = EarlyExit(folder)
        for stage in ("coarse", "fine"):
            path = str(Path(folder) / f"{stage}.onnx")
            setattr(early, stage, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        for size in (1, 64):
            some = images[:size]
            arrays = some.numpy()
            for way, eta in (("coarse look only", 0.0), ("everything refined", 1.0)):
                early.threshold = eta
                expected, logits = model.forward_scope(some, eta).logits, early(arrays)[0]
                assert np.abs(logits - expected.numpy()).max() < 1e-3
                package, exported = partial(model.forward_scope, some, eta), partial(early, arrays)
                times = cpu_medians({"package": package, "onnxruntime": exported}, rounds if size > 1 else 10 * rounds)
                for name, ms in times.items():
                    ratio = ms / times["package"]
                    rows.append({"way": way, "batch": size, "runtime": name, "cpu_ms": ms / size})
                    rows[-1]["times_the_package"] = ratio
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2000, help="test images (default 2000, those of the demo)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    batches = data(args.length)
    precision, onnx = precision_rows(batches), onnx_rows(batches, args.rounds)
    for name, rows in (("demo_precision", precision), ("demo_onnx", onnx)):
        show(rows)
        print(f"written: {write(name, rows, {'model': MODEL})}")


if __name__ == "__main__":
    main()
