"""Exported programs: ONNX by onnxruntime, torch.export with and without this package, early exit over two files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mambascope.commands import export as export_cli
from mambascope.commands.early_exit import EarlyExit
from mambascope.commands.export import difference, run_onnx, run_program
from mambascope.models import MambaScope, ScopeConfig, VimConfig, VisionMamba, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.export import export_program, portable, stages
from mambascope.models.preprocessing import make_transform
from mambascope.models.ready import ready_model

ROOT = Path(__file__).parents[2]
TRANSFORM = {"mean": [0.4, 0.5, 0.4], "std": [0.2, 0.2, 0.3], "crop_pct": 0.8, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def exported(images, tmp_path_factory):
    """What the real tool writes for a model of one block, and the checkpoint."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    config = ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, d_state=4, num_classes=7, alpha=0.5)
    model = MambaScope(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(60)  # an untrained head is sure of nothing
        ranked = model.forward_scope(images, 1.0).confidence.sort().values
    model.threshold = float((ranked[14] + ranked[15]) / 2)
    save_safetensors(model, folder / "model.safetensors", {"labels": list("abcdefg"), "transform": TRANSFORM})
    command = [sys.executable, str(ROOT / "tools" / "export.py"), str(folder / "model.safetensors")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()[1:-1]] == [
        f"{name}.{kind}" for name in ("coarse", "fine", "two_stage") for kind in ("onnx", "pt2")
    ]
    return folder / "export"


def test_every_file_equals_the_model_at_any_batch_size(exported, images):
    assert sorted(p.name for p in exported.iterdir()) == [
        "coarse.onnx",
        "coarse.pt2",
        "early_exit.py",
        "export.json",
        "fine.onnx",
        "fine.pt2",
        "two_stage.onnx",
        "two_stage.pt2",
    ]
    model = load_model(exported.parent / "model.safetensors")
    for name, (module, inputs) in stages(model, images).items():
        for size in (1, 2, 30):
            some = [t[:size].contiguous() for t in inputs]
            with torch.no_grad():
                expected = module(*some)
            assert difference(expected, run_onnx(exported / f"{name}.onnx", some)) < 1e-5, (name, size)
            assert difference(expected, run_program(exported / f"{name}.pt2", some)) < 1e-5, (name, size)


def test_a_head_that_reads_every_patch_is_exported(images, tmp_path):
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 7}
    model = MambaScope(**config, alpha=0.5, global_pool="lse").eval()
    save_safetensors(model, tmp_path / "model.safetensors")
    assert export_cli.main([str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        logits = model.forward_scope(images, 1.0).logits
        assert not torch.allclose(logits, model.classify(model.forward_fine(images, model.forward_coarse(images)).cls))
    for name, (module, inputs) in stages(model, images).items():
        with torch.no_grad():
            expected = module(*inputs)
        assert difference(expected, run_onnx(tmp_path / "out" / f"{name}.onnx", inputs)) < 1e-5, name


def test_onnx_files_are_plain_and_say_what_they_are(exported):
    for name in ("coarse", "fine", "two_stage"):
        file = onnx.load(exported / f"{name}.onnx")
        onnx.checker.check_model(file)
        assert {o.domain for o in file.opset_import} <= {
            "",
            "pkg.torch.onnx",
            "pkg.onnxscript.torch_lib.common",
        } or all(node.domain == "" for node in file.graph.node)
        assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*file.graph.input, *file.graph.output)} == {"batch"}
        facts = json.loads({p.key: p.value for p in file.metadata_props}["mambascope"])
        assert facts == json.loads((exported / "export.json").read_text())
        assert facts["labels"] == list("abcdefg")


def test_early_exit_over_two_files(exported, images, tmp_path):
    """The copy beside the files works alone: this package cannot be imported there."""
    model = load_model(exported.parent / "model.safetensors")
    with torch.no_grad():
        expected = model.forward_scope(images)
    runner = EarlyExit(exported)
    logits, exited = runner(images.numpy())
    assert runner.threshold == model.threshold
    assert exited.tolist() == expected.exited.tolist()
    assert 0 < exited.sum() < 30
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)
    for threshold in (0.0, 1.0):
        assert EarlyExit(exported, threshold)(images.numpy())[1].all() == (threshold == 0)

    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        pixels = (128 + rng.normal(size=(40 + 9 * i, 57, 3)) * 20 * (i + 1)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file)
    transform = make_transform(ready_model(exported.parent / "model.safetensors", device="cpu"))
    for file in files:
        np.testing.assert_allclose(runner.read(file), transform(Image.open(file)).numpy(), atol=0.03)
    block = "import sys; sys.modules['mambascope'] = None; sys.modules['torch'] = None; import runpy; "
    code = f"{block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(exported / "early_exit.py"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    with torch.no_grad():
        out = model.forward_scope(torch.stack([torch.from_numpy(runner.read(file)) for file in files]))
    assert [row[0] for row in rows] == ["abcdefg"[i] for i in out.logits.argmax(1)]
    assert [row[2] for row in rows] == [("fine", "coarse")[e] for e in out.exited.tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {"score_metric": "topk", "fine_cls": "last", "fine_order": "important_last"},
        {"reuse": "linear", "reuse_cls": True, "cell_order": "raster"},
        {"stem_width": 8, "patch_size": 8, "global_pool": "lse"},
    ],
)
def test_standalone_programs_of_every_option(options, tmp_path):
    config = ScopeConfig(
        **{"img_size": (24, 48), "patch_size": 4, "embed_dim": 16, "depth": 1, "num_classes": 5, **options}
    )
    model, x = MambaScope(config).eval(), torch.randn(4, 3, 24, 48)
    for name, (module, inputs) in stages(model, x, alpha=0.3, threshold=0.21).items():
        if name == "two_stage":
            continue  # the other two in one graph
        program = portable(export_program(module, inputs))
        assert not [n for n in program.graph.nodes if str(n.target).startswith("mambascope")]
        with torch.no_grad():
            assert difference(module(*inputs), program.module()(*inputs)) < 1e-5


def test_a_standalone_file_loads_without_this_package(exported, images, tmp_path):
    model = load_model(exported.parent / "model.safetensors")
    module, inputs = stages(model, images)["coarse"]
    export_cli.write_program(module, inputs, tmp_path / "coarse.pt2", standalone=True)
    torch.save(images[:5], tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['mambascope'] = None; import torch; x = torch.load('x.pt')\n"
        "with torch.no_grad(): torch.save(torch.export.load('coarse.pt2').module()(x)[0], 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = model.forward_coarse(images[:5]).logits
    assert difference([expected], [torch.load(tmp_path / "y.pt")]) < 1e-5


def test_one_stage_models(tmp_path, capsys):
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(model, tmp_path / "vim.safetensors")
    options = ["--format", "pt2", "--value-range", "0", "4095"]
    assert export_cli.main([str(tmp_path / "vim.safetensors"), *options, "--out", str(tmp_path / "o")]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["export.json", "model.pt2"]
    facts = json.loads((tmp_path / "o" / "export.json").read_text())
    assert "threshold" not in facts
    assert facts["value_range"] == [0, 4095]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--alpha", "0"], "alpha must be larger than 0"),
        (["--alpha", "1.5"], "alpha must lie in"),
        (["--threshold", "nan"], "threshold must be a number"),
        (["--img-size", "0"], "img-size"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_end_with_one_line(exported, capsys, tmp_path, options, word):
    argv = [str(exported.parent / "model.safetensors"), "--out", str(tmp_path), *options]
    assert export_cli.main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert word in err
    assert err.count("\n") == 1


def test_a_wrong_program_is_an_error(exported, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export_cli, "TOLERANCE", -1.0)
    argv = [str(exported.parent / "model.safetensors"), "--out", str(tmp_path), "--format", "pt2"]
    assert export_cli.main(argv) == 1
    assert "differs from the model" in capsys.readouterr().err


def test_missing_packages_are_named(exported, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export_cli.importlib.util, "find_spec", lambda name: None)
    assert export_cli.main([str(exported.parent / "model.safetensors"), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "onnx, onnxruntime, onnxscript" in err
    assert "mambascope[export]" in err
