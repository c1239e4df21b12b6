"""Names that Linux allows: bytes that are no UTF-8, dollars, accents, in every command that prints, writes or draws."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from mambascope.commands import evaluate as eval_cli
from mambascope.commands import predict as predict_cli
from mambascope.eye import MambaEye
from mambascope.eye import evaluate as eye_cli
from mambascope.models import MambaScope, ScopeConfig
from mambascope.models.checkpoint import save_safetensors
from mambascope.plotting import style

ROOT = Path(__file__).parents[2]
LATIN = os.fsdecode(b"caf\xe9")  # not UTF-8
COMPOSED, DECOMPOSED = "ca\u00f1a", "can\u0303a"
CLASSES = ["$5_vs_$6", LATIN, COMPOSED]
EVAL = ["--timing-images", "4", "--rounds", "1", "--batch-size", "4", "--measure", "0.5", "--max-seconds", "1"]


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """Weights with labels as an older run stored them, one of them decomposed."""
    path = tmp_path_factory.mktemp("scope") / "model.safetensors"
    torch.manual_seed(0)
    model = MambaScope(ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(model, path, {"labels": [*CLASSES[:2], DECOMPOSED]})
    return path


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    path = tmp_path_factory.mktemp("eye") / "model.safetensors"
    model = MambaEye(embed_dim=32, depth=1, d_state=8, head_dim=16, move_dim=8, patch_size=8, num_classes=3)
    glimpses = {"length": 4, "canvas_size": 16, "pattern": "random", "resize_mode": "fit", "patch_size": 8}
    save_safetensors(model, path, {"labels": CLASSES, "glimpses": glimpses})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images in each class folder."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}{name}.png")
    return root


def files(data):
    return sorted(os.fsencode(path) for path in (data / "val").rglob("*.png"))


@pytest.mark.parametrize("kind", ["scope", "eye"])
def test_answers_name_files_that_are_found_again(kind, data, tmp_path, capsys, request):
    weights = request.getfixturevalue(kind)
    argv = [str(weights), str(data / "val")]
    assert predict_cli.main([*argv, "--format", "jsonl", "--output", str(tmp_path / "out.jsonl")]) == 0
    content = (tmp_path / "out.jsonl").read_bytes().decode("utf-8")  # JSON is UTF-8
    rows = [json.loads(line) for line in content.splitlines()]
    assert sorted(os.fsencode(row["file"]) for row in rows) == files(data)
    assert {row["label"] for row in rows} <= {*CLASSES, DECOMPOSED}
    assert predict_cli.main([*argv, "--format", "csv", "--output", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(errors="surrogateescape", newline="") as file:
        assert sorted(os.fsencode(row["file"]) for row in csv.DictReader(file)) == files(data)
    assert predict_cli.main([*argv, "--output", str(tmp_path / "out.txt")]) == 0
    table = (tmp_path / "out.txt").read_bytes()
    assert all(name in table for name in files(data))
    capsys.readouterr()


def test_pictures_and_films_of_any_name(scope, eye, data, tmp_path):
    assert predict_cli.main([str(scope), str(data / "val"), "--save-dir", str(tmp_path / "drawn")]) == 0
    assert predict_cli.main([str(eye), str(data / "val"), "--animate", str(tmp_path / "films")]) == 0
    for folder, ending in (("drawn", b".png"), ("films", b".gif")):
        made = [os.fsencode(path) for path in (tmp_path / folder).rglob(f"*{ending.decode()}")]
        expected = [os.path.relpath(name, os.fsencode(data / "val")) + ending for name in files(data)]
        assert sorted(os.path.relpath(name, os.fsencode(tmp_path / folder)) for name in made) == sorted(expected)


def test_reports_of_classes_of_any_name(scope, eye, data, tmp_path, capsys):
    """The class folders are found among the labels, however these spell an accent."""
    out = tmp_path / LATIN
    assert eval_cli.main([str(scope), "--data", str(data), "--out", str(out), *EVAL]) == 0
    report = json.loads((out / "report.json").read_bytes().decode("utf-8"))
    assert report["images"] == 6
    assert (out / "heatmaps.png").stat().st_size > 10_000
    assert eye_cli.main([str(eye), "--data", str(data), "--out", str(out / "eye"), "--sizes", "16"]) == 0
    assert (out / "eye" / "report.json").is_file()
    assert "Traceback" not in capsys.readouterr().err


def test_long_names(scope, tmp_path):
    """No longer than the file system allows, which leaves no room for much more."""
    name = "é" * 120 + ".png"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / name)
    assert predict_cli.main([str(scope), str(tmp_path / "in"), "--save-dir", str(tmp_path / "drawn")]) == 0
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == [f"{name}.png"]


def test_errors_name_the_file(scope, tmp_path, capsys):
    (tmp_path / f"{LATIN}.png").write_text("not an image")
    assert predict_cli.main([str(scope), str(tmp_path)]) == 1
    assert rf"cannot read image {tmp_path}/caf\xe9.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["$5_vs_$6", r"$\frac$", LATIN, "a$b", r"\$x", "{}_^"])
def test_names_are_drawn_as_they_are(name, tmp_path):
    """No TeX; what no font can show is escaped."""
    with style.styled():
        figure = style.new_figure(3, 2)
        axes = figure.subplots()
        axes.set_title(name)
        axes.set_xlabel(name)
        axes.plot([1, 2], label=name)
        axes.legend()
        figure.suptitle(name)
    style.save(figure, tmp_path / "a.png")
    drawn = [text for text in figure.findobj(Text) if text.get_text() == name.replace("\udce9", r"\xe9")]
    assert len(drawn) == 4
    assert all(text._preprocess_math(text.get_text()) == (text.get_text(), False) for text in drawn)


def test_two_folders_with_files_of_one_name(scope, eye, tmp_path):
    for name, colour in (("A", "red"), ("B", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / name / "a.png")
    inputs = [str(tmp_path / "A"), str(tmp_path / "B")]
    assert predict_cli.main([str(scope), *inputs, "--save-dir", str(tmp_path / "drawn")]) == 0
    assert predict_cli.main([str(eye), *inputs, "--animate", str(tmp_path / "films")]) == 0
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("[df]*/*/*"))
    assert drawn == ["drawn/A/a.png.png", "drawn/B/a.png.png", "films/A/a.png.gif", "films/B/a.png.gif"]
    assert (tmp_path / drawn[0]).read_bytes() != (tmp_path / drawn[1]).read_bytes()


@pytest.mark.parametrize("kind", ["scope", "eye"])
def test_files_beside_images_are_left_out_with_a_word(kind, tmp_path, capsys, request):
    for name in ("features.h5", "clip.mpg", "field.grib", "drawing.wmf", "figure.eps", "cloud.pcd", "._1.png"):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    assert predict_cli.main([str(request.getfixturevalue(kind)), str(tmp_path), "--format", "jsonl"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["file"] for line in captured.out.splitlines()] == [str(tmp_path / "1.png")]
    assert captured.err.count("\n") == 1
    expected = "6 files of no image format (1 .eps, 1 .grib, 1 .h5, 1 .mpg, 1 .pcd, 1 .wmf), 1 hidden name (._1.png)"
    assert f"left out: {expected}" in captured.err


def test_answers_before_a_folder_without_images_are_kept(scope, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    argv = [str(scope), str(tmp_path / "1.png"), str(tmp_path / "empty"), "--format", "jsonl"]
    assert predict_cli.main(argv) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "holds no images" in captured.err


def test_an_ascii_locale(scope, data, tmp_path):
    """As in many containers and jobs; PYTHONUTF8=0 keeps Python from helping itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": ""}
    root = tmp_path / "wurzel-ä"
    root.symlink_to(data)
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), str(scope), str(root), "--save-dir", str(root / "ö")]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (os.fsencode(root / "val" / n / f"0{n}.png") for n in CLASSES))
    assert len(list((root / "ö").rglob("*.png"))) == 6
