"""tools/benchmark.py: forms answer alike, rows are complete, wrong arguments are one line."""

import csv
import json
import sys

import pytest
import torch
from torch import nn

from mambascope.commands.benchmark import main
from mambascope.evaluation.forms import FORMS, Unavailable, logits_of, shares_of_batches
from mambascope.models import MambaScope, ScopeConfig, VisionMamba, save_safetensors
from mambascope.ops.native import library
from tests.conftest import relative_error

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 5, "d_state": 8}
LINUX = sys.platform == "linux"
NATIVE = library.why_unavailable() is None


def scope():
    return MambaScope(ScopeConfig(**SMALL, alpha=0.5)).eval()


@pytest.mark.parametrize("form", ["frozen", "onnx", "bf16", "int8"])
@pytest.mark.parametrize("make", [scope, lambda: VisionMamba(**SMALL).eval()])
def test_forms_answer_alike(form, make):
    if form == "frozen" and not NATIVE:
        pytest.skip("kernels were not compiled")
    model, x = make(), torch.randn(4, 3, 32, 32)
    plain, other = FORMS["eager"](model, x), FORMS[form](model, x)
    with torch.inference_mode():
        for refined in (0, 2, 4):
            expected, result = logits_of(plain.run(x, refined)), logits_of(other.run(x, refined))
            assert relative_error(result, expected) < {"bf16": 0.05, "int8": 0.05}.get(form, 1e-4)


def test_models_of_timm_have_their_forms():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 5)).eval(), torch.randn(3, 3, 4, 4)
    with torch.inference_mode():
        expected = model(x)
        for form in ("eager", "onnx", "int8"):
            assert relative_error(logits_of(FORMS[form](model, x).run(x, 3)), expected) < 0.05
    with pytest.raises(Unavailable, match="a Sequential has no frozen form"):
        FORMS["frozen"](model, x)
    with pytest.raises(Unavailable, match="no linear layers but the head"):
        FORMS["int8"](nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)), x)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_shares(batch, share):
    counts = shares_of_batches(batch, share)
    assert all(0 <= count <= batch for count in counts)
    assert abs(sum(counts) / (batch * len(counts)) - share) <= 0.5 / (batch * len(counts)) + 1e-9
    assert len(counts) <= 10


def test_the_command(here, capsys):
    save_safetensors(scope(), here / "model.safetensors")
    words = ["model.safetensors", "--forms", "eager", "frozen", "--batch", "1", "2", "--refined", "0", "0.5"]
    assert main([*words, "--rounds", "3", "--out", "result", "--threads", "1"]) == 0
    rows = list(csv.DictReader((here / "result" / "benchmark.csv").open()))
    assert [(r["form"], r["batch"], float(r["refined"])) for r in rows] == [
        (form, batch, share)
        for batch in "12"
        for form in (("eager", "frozen") if NATIVE else ("eager",))
        for share in (0.0, 0.5)
    ]
    assert all(0 < float(r["low"]) <= float(r["ms_per_image"]) <= float(r["high"]) for r in rows)
    assert float(rows[0]["ratio"]) == 1
    assert [bool(r["peak_mib"]) for r in rows] == [LINUX and (r["batch"], r["refined"]) == ("2", "0.5") for r in rows]
    facts = json.loads((here / "result" / "benchmark.json").read_text())
    assert facts["machine"]["cpu"]
    assert facts["native"]["isa"] == library.info()["isa"]
    assert (here / "result" / "benchmark.png").stat().st_size > 10_000
    assert "model.safetensors, 50% refined" in capsys.readouterr().out


def test_memory_of_the_largest_batch(here):
    save_safetensors(scope(), here / "model.safetensors")
    words = ["model.safetensors", "--forms", "eager", "--batch", "1", "8", "--refined", "0.3", "--rounds", "3"]
    assert main([*words, "--out", "result"]) == 0  # a third of single images, a quarter of eight
    rows = list(csv.DictReader((here / "result" / "benchmark.csv").open()))
    assert [(r["batch"], bool(r["peak_mib"])) for r in rows] == [("1", False), ("8", LINUX)]


def test_accuracy_of_every_form(here):
    words = ["scopedigits", "--data", "scopedigits", "--length", "128", "--forms", "eager", "int8", "--batch", "1"]
    assert main([*words, "--rounds", "3"]) == 0
    rows = list(csv.DictReader((here / "benchmark" / "benchmark.csv").open()))
    assert [(r["form"], r["refined"], bool(r["top1"])) for r in rows] == [
        (form, refined, refined != "0.5") for form in ("eager", "int8") for refined in ("0", "0.5", "1")
    ]
    values = {(r["form"], r["refined"]): float(r["top1"]) for r in rows if r["top1"]}
    assert 85 < values["eager", "0"] < values["eager", "1"]
    assert abs(values["eager", "1"] - values["int8", "1"]) < 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_model"], "no_such_model is neither a file nor a model of timm's registry nor one of scopedigits,"),
        (["scopedigits", "--refined", "1.5"], "--refined must lie in [0, 1], got 1.5"),
        (["scopedigits", "--data", "no/such/folder"], "no/such/folder"),
        (["vgg11_bn.nosuchtag"], "timm does not make vgg11_bn.nosuchtag: "),
        (["resnet18", "--data", "scopedigits"], "--data takes models of this package, resnet18 is none"),
        (["vit_tiny_patch16_224", "--forms", "frozen", "--batch", "1"], "a VisionTransformer has no frozen form"),
    ],
)
def test_wrong_arguments(here, capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(here.iterdir())
