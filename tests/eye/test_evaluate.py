"""Both tools with a MambaEye, on good and bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mambascope.commands import predict as predict_cli
from mambascope.eye import MAMBAEYE_CONFIGS, MambaEye
from mambascope.eye import evaluate as eye_cli
from mambascope.eye.curves import evaluate_glimpses
from mambascope.eye.dataset import GlimpseOptions
from mambascope.models import VimConfig, VisionMamba
from mambascope.models.checkpoint import save_safetensors
from tests.eye.common import LABELS, OPTIONS

ROOT = Path(__file__).parents[2]


def run(main, capsys, *argv):
    try:
        status = main([str(a) for a in argv])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_evaluation_writes_table_numbers_and_picture(model, checkpoint, data, tmp_path, capsys):
    vim = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(vim, tmp_path / "vim.safetensors", {"labels": LABELS})
    status, out, err = run(
        eye_cli.main, capsys, checkpoint, "--data", data, "--out", tmp_path / "report", "--sizes", 16, 32, "48x40",
        "--patterns", "hilbert", "horizontal_raster", "--choose", "contrast", "--vim", tmp_path / "vim.safetensors",
    )  # fmt: skip
    assert status == 0, err
    assert all(words in out for words in ("Vim trained at 32²", "16²", "48x40", "hilbert", "stops when sure"))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images"] == 6
    assert list(report["sizes"]) == ["16²", "32²", "48x40"]
    assert list(report["orders"]) == ["random", "hilbert", "column_raster", "contrast"]
    rows = list(csv.DictReader((tmp_path / "report" / "accuracy.csv").open()))
    assert len(rows) == 20 * (3 + 3)
    expected = evaluate_glimpses(
        model, eye_cli.EyeData(model, checkpoint, str(data), "validation", 1).pictures, OPTIONS
    )
    base = [r for r in rows if r["size"] == "32²" and r["order"] == "random"]
    assert [float(r["top1"]) for r in base] == pytest.approx(expected.top1.tolist(), abs=1e-6)
    stops = list(csv.DictReader((tmp_path / "report" / "early_stop.csv").open()))
    assert {r["criterion"] for r in stops} == {"confidence", "raw"}
    assert (tmp_path / "report" / "accuracy.png").stat().st_size > 10_000


def test_prediction_equals_the_model_run_by_hand(model, checkpoint, data, tmp_path, capsys):
    status, out, err = run(predict_cli.main, capsys, checkpoint, data, "--format", "jsonl", "--batch-size", 4)
    assert status == 0
    assert "6 images, 20.0 glimpses each" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 6
    for number, row in enumerate(rows):
        sequence = OPTIONS.sequence(Image.open(row["file"]), (0, number))
        with torch.no_grad():
            logits = model(sequence.patches[None], sequence.moves[None])[0, -1]
        assert row["class_index"] == int(logits.argmax())
        assert row["label"] == LABELS[row["class_index"]]
        assert row["confidence"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-4)
        assert row["coverage"] == pytest.approx(float(sequence.information_ratio[-1]), abs=1e-5)
        assert (row["glimpses"], row["stopped"]) == (20, False)
    status, out, _ = run(
        predict_cli.main, capsys, checkpoint, data, "--threshold", 0, "--every", 2, "--animate", tmp_path / "films"
    )
    assert status == 0
    assert out.splitlines()[0].split() == ["label", "confidence", "sure", "glimpses", "seen", "file"]
    films = sorted(p.relative_to(tmp_path / "films") for p in (tmp_path / "films").rglob("*.gif"))
    assert [str(f) for f in films] == [f"val/{name}/{k}.png.gif" for name in LABELS for k in range(2)]


def test_prediction_at_given_points(checkpoint, data, tmp_path, capsys):
    (tmp_path / "points.csv").write_text("row,column\n4,4\n20.5,12\n26,36\n")
    image = data / "val" / "ant" / "0.png"
    status, out, err = run(
        predict_cli.main, capsys, checkpoint, image, "--points", tmp_path / "points.csv", "--canvas", "native",
        "--format", "csv",
    )  # fmt: skip
    assert status == 0, err
    (row,) = csv.DictReader(out.splitlines())
    assert row["glimpses"] == "3"
    assert float(row["coverage"]) == pytest.approx(3 * 64 / (30 * 40), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--points", "outside.csv"], "glimpses must lie inside the canvas of 32x32 pixels"),
        (["--points", "bad.csv"], "line 2 of bad.csv must be two numbers row,column, got '3,x'"),
        (["--points", "empty.csv"], "points file empty.csv holds no row,column lines"),
        (["--points", "none.csv"], "points file none.csv cannot be read"),
        (["--points", "outside.csv", "--glimpses", "3"], "points already say where to look"),
        (["--glimpses", "0"], "glimpses must be at least 1, got 0"),
        (["--pattern", "zigzag"], "pattern must be one of random"),
        (["--canvas", "4"], "canvas_size must be at least the patch size 8, got 4x4"),
        (["--canvas", "big"], "sizes must be a side in pixels"),
        (["--canvas", "native", "--resize-mode", "fit"], "canvas_size must be given for resize_mode 'fit'"),
        (["--threshold", "2"], "threshold must lie in [0, 1], got 2.0"),
        (["--every", "0"], "every must be at least 1, got 0"),
        (["--choose", "best"], "choice must be contrast"),
        (["--alpha", "0.5"], "alpha is not for a MambaEye"),
        (["--img-size", "64"], "img-size is not for a MambaEye; use --canvas"),
        (["thin.png"], "thin.png: an image of 5x90 pixels is smaller than a patch of 8x8"),
    ],
)
def test_prediction_names_mistakes_in_one_line(arguments, words, checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("outside.csv").write_text("10,10\n300,10\n")
    Path("bad.csv").write_text("1,2\n3,x\n")
    Path("empty.csv").write_text("row,column\n")
    Image.new("RGB", (90, 5)).save("thin.png")
    status, _, err = run(predict_cli.main, capsys, checkpoint, data / "val" / "ant" / "0.png", *arguments)
    assert status in (1, 2)
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no run configuration beside the checkpoint: pass --data FOLDER"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--data", "scopedigits"], "the data have 10 classes, the model has 3"),
        (["--data", "data", "--sizes", "0"], "sizes must be a side in pixels"),
        (["--data", "data", "--sizes", "native"], "size native needs --resize-mode none"),
        (["--data", "data", "--stop", "top"], "stop must be of confidence, margin, entropy, raw, got top"),
        (["--data", "data", "--patterns", "zigzag"], "pattern must be one of"),
        (["--data", "data", "--glimpses", "-3"], "glimpses must be at least 1"),
        (["--data", "data", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--data", "data", "--limit", "0"], "limit must be at least 1"),
        (["--data", "data", "--seed", "-1"], "seed must not be negative"),
        (["--data", "data", "--vim", "no.pth"], "no.pth does not exist"),
    ],
)
def test_evaluation_names_mistakes_in_one_line(arguments, words, checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(eye_cli.main, capsys, checkpoint, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("evaluating on")]
    assert status in (1, 2)
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_options_of_a_mambaeye_need_one(tiny_scope, checkpoint, data, tmp_path, capsys):
    save_safetensors(tiny_scope, tmp_path / "scope.safetensors")
    image = data / "val" / "ant" / "0.png"
    status, _, err = run(predict_cli.main, capsys, tmp_path / "scope.safetensors", image, "--glimpses", 3, "--compat")
    assert (status, err) == (2, "error: glimpses, compat: only a MambaEye has these options\n")
    status, _, err = run(eye_cli.main, capsys, tmp_path / "scope.safetensors", "--data", data)
    assert status == 2
    assert "holds a MambaScope, not a MambaEye; tools/eval_cls.py evaluates it" in err
    save_safetensors(tiny_scope, tmp_path / "same.safetensors")
    status, _, err = run(eye_cli.main, capsys, checkpoint, "--data", data, "--model", "resnet50")
    assert "model must be one of mambaeye_tiny" in err


def test_official_weights_by_the_name_of_their_model(data, tmp_path, capsys):
    torch.manual_seed(0)
    eye = MambaEye(MAMBAEYE_CONFIGS["mambaeye_nano_patch16"])
    torch.save(eye.state_dict(), tmp_path / "official.pt")
    image = data / "val" / "ant" / "0.png"
    how = ["--model", "mambaeye_nano_patch16", "--glimpses", 3, "--format", "jsonl"]
    status, out, err = run(predict_cli.main, capsys, tmp_path / "official.pt", image, *how)
    assert status == 0, err
    sequence = GlimpseOptions(length=3).sequence(Image.open(image), (0, 0))  # the paper's canvas of 512 pixels
    with torch.no_grad():
        logits = eye.eval()(sequence.patches[None], sequence.moves[None])[0, -1]
    assert json.loads(out)["class_index"] == int(logits.argmax())
    status, out, err = run(
        eye_cli.main, capsys, tmp_path / "official.pt", *how[:4], "--data", data, "--sizes", 32, "--compat",
        "--out", tmp_path / "report", "--stop", "--no-figures",
    )  # fmt: skip
    assert status == 0, err
    assert not (tmp_path / "report" / "early_stop.csv").exists()
    assert json.loads((tmp_path / "report" / "report.json").read_text())["options"]["compat"] is True


def test_bad_images_are_named(checkpoint, data, tmp_path, capsys):
    (data / "val" / "bee" / "broken.png").write_bytes(b"no image")
    status, _, err = run(eye_cli.main, capsys, checkpoint, "--data", data, "--out", tmp_path / "r")
    assert status == 2
    assert "broken.png: not an image" in err
    status, out, err = run(predict_cli.main, capsys, checkpoint, data, "--skip-bad", "--batch-size", 4)
    assert status == 0
    assert len(out.splitlines()) == 7
    assert "1 unreadable files skipped" in err
    (data / "val" / "zoo").mkdir()
    (data / "val" / "zoo" / "broken.png").write_bytes(b"no image")
    (data / "val" / "bee" / "broken.png").unlink()
    status, out, err = run(predict_cli.main, capsys, checkpoint, data, "--batch-size", 4)
    assert status == 1
    assert "broken.png" in err
    assert len(out.splitlines()) == 7  # the answers to the images before it are not lost


def test_the_real_tools(checkpoint, data, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for tool, arguments in (
        ("predict.py", [checkpoint, data, "--format", "csv", "--output", tmp_path / "out.csv"]),
        ("eval_eye.py", [checkpoint, "--data", data, "--out", tmp_path / "report", "--no-figures", "--sizes", 24]),
    ):
        command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 7
    assert (tmp_path / "report" / "table.txt").is_file()
