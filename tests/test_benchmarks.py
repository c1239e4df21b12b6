"""The benchmarks compare before they time, and what they compare with is right."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mambascope  # noqa: F401  (registers the timm entries)
from tests.conftest import relative_error

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_all_can_be_imported(benchmark, name):
    """Their names of the package are still right; most take too long to run here."""
    assert benchmark(name).__doc__


def test_official_formulas_are_our_model(benchmark):
    cpu_peers = benchmark("cpu_peers")
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch8_64", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        official = cpu_peers.use_official_formulas(model)(x)
    assert not torch.equal(logits, official)
    assert relative_error(official, logits) < 1e-4


def test_wrong_scans_are_found(benchmark):
    cpu_peers, scan_cpu = benchmark("cpu_peers"), benchmark("scan_cpu")
    good = {"torch": scan_cpu.package_scan("torch"), "formula": cpu_peers.official_formula}
    assert scan_cpu.wrong(good, 24, 8) == {}
    bad = {"off": lambda **tensors: 1.01 * cpu_peers.official_formula(**tensors)}
    assert list(scan_cpu.wrong(bad, 24, 8)) == ["off"]


def test_hidden_packages_come_back(benchmark):
    cpu_peers = benchmark("cpu_peers")
    import timm.layers as layers

    with cpu_peers.hidden("timm"), pytest.raises(ImportError):
        __import__("timm")
    import timm.layers as again

    assert again is layers


def test_rounds_and_files(benchmark, tmp_path):
    measure = benchmark("measure")
    calls = []
    rows = measure.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert all(row["min"] <= row["ms"] <= row["max"] for row in rows.values())
    path = measure.write("x", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": "z"}], {"rounds": 3}, tmp_path)
    assert list(csv.DictReader(path.open())) == [{"a": "1", "b": "0.12346", "c": ""}, {"a": "2", "b": "", "c": "z"}]
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["rounds"] == 3
    assert facts["versions"]["torch"] == torch.__version__


def test_graphs_need_cuda(benchmark):
    with pytest.raises(ValueError, match="CUDA"):
        benchmark("gpu_measure").graphed(nn.Linear(2, 2).eval(), torch.zeros(1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_gives_the_models_logits(benchmark):
    graphed = benchmark("gpu_measure").graphed
    with pytest.raises(ValueError, match="eval"):
        graphed(nn.Linear(2, 2).cuda(), torch.zeros(1, 2, device="cuda"))
    model = timm.create_model("vim_nano_patch8_64", num_classes=5).cuda().eval()
    first, second = (torch.randn(2, 3, 64, 64, device="cuda") for _ in range(2))
    run = graphed(model, first)
    with torch.no_grad():
        for x in (first, second):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="x must be"):
        run(first[:1])
