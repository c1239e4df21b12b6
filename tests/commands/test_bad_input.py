"""What users get wrong and what machines do to them, through the real evaluate, predict, export and cost tools."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mambascope.commands import cost
from mambascope.commands import evaluate as eval_cli
from mambascope.commands import export as export_cli
from mambascope.commands import predict as predict_cli
from mambascope.models import MambaScope, ScopeConfig, load_model
from mambascope.models.checkpoint import save_safetensors
from tests.hostile import RunsCode, fill, obey_modes, small_disk

ROOT = Path(__file__).parents[2]
QUICK = ["--timing-images", "8", "--rounds", "1", "--batch-size", "4", "--measure", "0.5", "--max-seconds", "1"]
QUICK += ["--no-figures"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    config = ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, num_classes=3)
    save_safetensors(MambaScope(config), path, {"labels": ["ant", "bee", "cat"]})
    return path


@pytest.fixture
def data(tmp_path):
    """A validation folder of three classes with two images each."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "val" / name / f"{i}.png")
    return tmp_path / "data"


def tool(name, *args, **options):
    """Runs a script of tools/."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120, **options)


def one_line(captured, *words):
    """The only line on stderr is an error that holds these words."""
    lines = [line for line in captured.splitlines() if not line.startswith("evaluating on ")]
    assert len(lines) == 1, captured
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], captured


def test_unreadable_files_are_skipped_with_a_count_when_asked(checkpoint, data, tmp_path, capsys, caplog):
    (data / "val" / "bee" / "note.png").write_text("not an image")
    whole = (data / "val" / "cat" / "0.png").read_bytes()
    (data / "val" / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    argv = [str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out"), *QUICK]
    assert eval_cli.main(argv) == 2
    one_line(capsys.readouterr().err, "note.png", "skip")
    assert eval_cli.main([*argv, "--skip-bad"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 6
    assert "2 unreadable files skipped" in caplog.text  # a warning, which the command shows on stderr


def test_a_very_large_image_and_a_single_pixel(checkpoint, data, tmp_path, capsys):
    folder = data / "val" / "ant"
    Image.new("1", (16_000, 13_000), 1).save(folder / "huge.png")  # 208 million pixels, above Pillow's own limit
    Image.new("RGB", (1, 1), (9, 200, 9)).save(folder / "dot.png")
    Image.new("CMYK", (50, 40), (9, 200, 9, 0)).save(folder / "print.jpg")
    assert predict_cli.main([str(checkpoint), str(folder), "--format", "jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert eval_cli.main([str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out"), *QUICK]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 9


def test_labels_outside_the_models_classes(checkpoint, tmp_path, capsys):
    """Digits have ten classes; a run's configuration beside the weights may belong to other ones."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(checkpoint.read_bytes())
    (run / "config.yaml").write_text(
        "data:\n  class_path: mambascope.data.digits_datamodule.ScopeDigitsDataModule\n"
        "  init_args: {val_length: 8, digits: {size: 32}}\n"
    )
    assert eval_cli.main([str(run), *QUICK]) == 2
    one_line(capsys.readouterr().err, "10 classes", "the model has 3")


@pytest.mark.parametrize("command", ["predict", "eval", "export"])
def test_wrong_checkpoints(command, checkpoint, data, tmp_path, capsys):
    trace = tmp_path / "code was run"
    state = timm.create_model("resnet18", num_classes=3).state_dict()
    torch.save(state, tmp_path / "resnet.pth")
    torch.save({"state_dict": RunsCode(trace)}, tmp_path / "evil.ckpt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(RunsCode(trace)))
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    eye = timm.create_model("mambaeye_tiny", embed_dim=32, depth=1, num_classes=3)
    save_safetensors(eye, tmp_path / "eye.safetensors")
    main, rest = {
        "predict": (predict_cli.main, [str(data / "val")]),
        "eval": (eval_cli.main, ["--data", str(data), *QUICK]),
        "export": (export_cli.main, ["--format", "pt2"]),
    }[command]
    cases = [
        ("resnet.pth", [], "does not describe its model"),
        ("resnet.pth", ["--model", "mambascope_nano_patch8_64"], "does not fit MambaScope"),
        ("resnet.pth", ["--model", "resnet18"], "unknown model 'resnet18'; known: mambascope_base"),
        ("evil.ckpt", [], "was refused"),
        ("evil.pkl", [], "was refused"),
        ("cut.safetensors", [], "cannot be read"),
        *([("eye.safetensors", [], "MambaEye")] if command != "predict" else []),  # predict knows it
        ("no such file", [], "does not exist"),
    ]
    for name, options, word in cases:
        assert main([str(tmp_path / name), *rest, *options]) == 2, name
        one_line(capsys.readouterr().err, word)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "-0.1"], "alpha must lie in [0, 1]"),
        (["--alpha", "1.01"], "alpha must lie in [0, 1]"),
        (["--alpha", "nan"], "alpha must lie in [0, 1]"),
        (["--threshold", "nan"], "threshold must be a number"),
    ],
)
def test_eta_and_alpha_outside_their_range(options, message, checkpoint, data, tmp_path, capsys):
    assert predict_cli.main([str(checkpoint), str(data / "val"), *options]) == 2
    one_line(capsys.readouterr().err, message)
    argv = [str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out"), *QUICK, *options]
    assert eval_cli.main(argv) == 2
    one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(("eta", "stage"), [("-3", "coarse"), ("0", "coarse"), ("1", "fine"), ("1.5", "fine")])
def test_eta_beyond_its_ends_always_or_never_exits(eta, stage, checkpoint, data, capsys):
    assert predict_cli.main([str(checkpoint), str(data), "--format", "jsonl", f"--threshold={eta}"]) == 0
    assert {json.loads(line)["stage"] for line in capsys.readouterr().out.splitlines()} == {stage}


def test_unknown_backend_model_and_option(checkpoint, data, capsys):
    done = tool("predict.py", checkpoint, data, env={"MAMBASCOPE_SCAN_BACKEND": "cuda"})
    assert done.returncode == 2
    one_line(done.stderr, "MAMBASCOPE_SCAN_BACKEND must be one of reference, torch, cpu, triton, mamba_ssm, got 'cuda'")
    assert cost.main(["mambascope_huge"]) == 2
    one_line(capsys.readouterr().err, "unknown model 'mambascope_huge'; known: mambascope_base_patch16_224")
    assert cost.main(["mambascope_tiny_patch16_224", "--alpha", "2"]) == 2
    one_line(capsys.readouterr().err, "alpha must lie in [0, 1]")
    with pytest.raises(SystemExit) as ended:
        predict_cli.main([str(checkpoint), str(data), "--treshold", "0.5"])
    assert ended.value.code == 2
    assert "--treshold" in capsys.readouterr().err


def test_no_permission_to_write(checkpoint, data, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "old.csv").write_text("from yesterday")
    locked.chmod(0o555)
    try:
        cases = [
            ("predict.py", [checkpoint, data, "--output", locked / "old.csv"]),
            ("eval_cls.py", [checkpoint, "--data", data, "--out", locked / "report", *QUICK]),
        ]
        for name, args in cases:
            done = tool(name, *args, preexec_fn=obey_modes)
            assert done.returncode == 1, (name, done.stderr)
            one_line(done.stderr, str(locked), "Permission denied")
        assert [p.name for p in locked.iterdir()] == ["old.csv"]
        assert (locked / "old.csv").read_text() == "from yesterday"
    finally:
        locked.chmod(0o755)


def test_no_permission_to_read(checkpoint, data):
    secret = data / "val" / "bee" / "0.png"
    secret.chmod(0)
    done = tool("predict.py", checkpoint, data, preexec_fn=obey_modes)
    assert done.returncode == 1
    one_line(done.stderr, "bee/0.png", "Permission denied")


def test_full_disk(checkpoint, data, tmp_path):
    """The model that was exported before is still there when its successor does not fit."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        old = disk / "model.safetensors"
        old.write_bytes(checkpoint.read_bytes())
        fill(disk, leave=old.stat().st_size // 2)
        argv = ["--data", data, "--out", tmp_path / "out", "--target-acc-drop", "1", "--export", old, *QUICK]
        done = tool("eval_cls.py", checkpoint, *argv)
        assert done.returncode == 1
        one_line(done.stderr, "No space left on device")
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "model.safetensors"]
        assert old.read_bytes() == checkpoint.read_bytes()
        load_model(old)
        fill(disk, leave=4096)
        done = tool("predict.py", checkpoint, *[data] * 20, "--output", disk / "answers.jsonl", "--format", "jsonl")
        assert done.returncode == 1
        one_line(done.stderr, "No space left on device")
        assert not (disk / "answers.jsonl").exists()


def test_ctrl_c_ends_cleanly_and_keeps_what_is_done(checkpoint, data, tmp_path):
    target = tmp_path / "answers.csv"
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), str(checkpoint), *[str(data)] * 500]
    command += ["--batch-size", "2", "--format", "csv", "--output", str(target)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        part = Path(f"{target}.part")
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        message = process.stderr.read()
    assert process.returncode == 130
    assert message == "interrupted\n"
    assert not target.exists()
    assert part.read_text().startswith("file,label")


def test_memory_stays_flat_over_many_files(checkpoint, data):
    """Through large folders in constant memory: ten times the files, the same peak."""
    code = (
        "import resource, sys, torch; from mambascope.commands.predict import main; torch.set_num_threads(1)\n"
        "for count in (10, 100):\n"
        "    assert main([sys.argv[1], *[sys.argv[2]] * count, '--batch-size', '8']) == 0\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(checkpoint), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert len(done.stdout.splitlines()) == 6 * 110 + 2
    few, many = (int(line) for line in done.stderr.splitlines() if line.isdigit())
    assert many < few * 1.05 + 5_000  # kB
