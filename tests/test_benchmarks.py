"""The benchmarks compare before they time, and what they compare with is right."""

import csv
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import mambascope  # noqa: F401  (registers the timm entries)
from tests.conftest import relative_error

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import cpu_peers
    import measure
    import scan_cpu

    yield cpu_peers, measure, scan_cpu
    for name in set(sys.modules) - before:
        if name in ("cpu_peers", "measure", "scan_cpu"):
            del sys.modules[name]


def test_official_formulas_are_our_model(benchmarks):
    cpu_peers, _, _ = benchmarks
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch8_64", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = model(x)
        theirs = cpu_peers.use_official_formulas(model)(x)
    assert not torch.equal(ours, theirs)
    assert relative_error(theirs, ours) < 1e-4


def test_wrong_scans_are_found(benchmarks):
    cpu_peers, _, scan_cpu = benchmarks
    good = {"torch": scan_cpu.ours("torch"), "formula": cpu_peers.official_formula}
    assert scan_cpu.wrong(good, 24, 8) == {}
    bad = {"off": lambda **tensors: 1.01 * cpu_peers.official_formula(**tensors)}
    assert list(scan_cpu.wrong(bad, 24, 8)) == ["off"]


def test_hidden_packages_come_back(benchmarks):
    cpu_peers, _, _ = benchmarks
    import timm.layers as layers

    with cpu_peers.hidden("timm"), pytest.raises(ImportError):
        __import__("timm")
    import timm.layers as again

    assert again is layers


def test_rounds_and_files(benchmarks, tmp_path):
    _, measure, _ = benchmarks
    calls = []
    found = measure.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert all(row["min"] <= row["ms"] <= row["max"] for row in found.values())
    path = measure.write("x", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": "z"}], {"rounds": 3}, tmp_path)
    assert list(csv.DictReader(path.open())) == [{"a": "1", "b": "0.12346", "c": ""}, {"a": "2", "b": "", "c": "z"}]
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["rounds"] == 3
    assert facts["versions"]["torch"] == torch.__version__
