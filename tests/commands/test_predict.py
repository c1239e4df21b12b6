"""The predict command on every kind of image and every mistake."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.commands import predict as predict_cli
from mambascope.data.image_io import open_image
from mambascope.models import VimConfig, VisionMamba
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.preprocessing import make_transform, preprocessing
from mambascope.models.ready import ready_model
from mambascope.utils import pick_device

ROOT = Path(__file__).parents[2]
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
TRANSFORM = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def checkpoint(tiny_scope, eta, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    before = tiny_scope.threshold
    tiny_scope.threshold = eta
    save_safetensors(tiny_scope, path, {"labels": LABELS, "transform": TRANSFORM})
    tiny_scope.threshold = before
    return path


@pytest.fixture
def folder(tmp_path):
    """Nine images in sub-folders, beside files that are none."""
    rng = np.random.default_rng(0)
    top = tmp_path / "pictures"
    for i in range(9):
        sub = top / f"class {i % 3}"
        sub.mkdir(parents=True, exist_ok=True)
        pixels = (128 + rng.normal(size=(40, 50, 3)) * 12 * (i + 1)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(sub / f"{i}.png")
    (top / "notes.txt").write_text("not an image")
    (top / ".hidden.png").write_bytes(b"junk")
    return top


def run(capsys, *argv):
    status = predict_cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_lines_equal_the_model_run_by_hand(checkpoint, folder, capsys, eta):
    status, out, err = run(capsys, checkpoint, folder, "--format", "jsonl", "--batch-size", 4)
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    files = [f for sub in sorted(folder.glob("class *")) for f in sorted(sub.iterdir())]
    assert [row["file"] for row in rows] == [str(f) for f in files]
    model = ready_model(checkpoint, device="cpu")
    assert model.threshold == pytest.approx(eta)
    transform = make_transform(model)
    images = torch.stack([transform(open_image(f)) for f in files])
    with torch.no_grad():
        output = model.forward_scope(images)
    assert 0 < output.exited.sum() < 9
    for i, row in enumerate(rows):
        assert row["class_index"] == int(output.logits[i].argmax())
        assert row["label"] == LABELS[row["class_index"]]
        assert row["stage"] == ("coarse" if output.exited[i] else "fine")
        assert row["tokens"] == int(output.tokens[i])
        assert row["confidence"] == pytest.approx(float(output.logits[i].softmax(-1).max()), abs=1e-4)
        assert row["coarse_confidence"] == pytest.approx(float(output.confidence[i]), abs=1e-4)
    assert "9 images" in err


def test_table_and_csv(checkpoint, folder, tmp_path, capsys):
    status, out, _ = run(capsys, checkpoint, folder / "class 0")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["label", "confidence", "stage", "tokens", "file"]
    assert len(lines) == 4
    target = tmp_path / "new folder" / "out.csv"
    status, out, _ = run(capsys, checkpoint, folder, "--format", "csv", "--output", target)
    assert (status, out) == (0, "")
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["stage"] for row in rows} <= {"coarse", "fine"}
    assert [p.name for p in target.parent.iterdir()] == ["out.csv"]


def test_threshold_alpha_and_size_options(checkpoint, folder, capsys):
    def stages(*options):
        _, out, _ = run(capsys, checkpoint, folder, "--format", "jsonl", *options)
        return [json.loads(line) for line in out.splitlines()]

    assert {r["stage"] for r in stages("--threshold", 0)} == {"coarse"}
    refined = stages("--threshold", 1, "--alpha", 0.25)
    assert {r["stage"] for r in refined} == {"fine"}
    assert {r["tokens"] for r in refined} == {17 + 1 + 4 * 4 + 12}
    assert {r["tokens"] for r in stages("--threshold", 0, "--img-size", 64, 32)} == {1 + 8 * 4}


def test_pictures_keep_the_folders(checkpoint, folder, tmp_path, capsys):
    status, _, _ = run(capsys, checkpoint, folder, "--save-dir", tmp_path / "drawn")
    assert status == 0
    drawn = sorted(str(p.relative_to(tmp_path / "drawn")) for p in (tmp_path / "drawn").rglob("*.png"))
    assert drawn == [f"class {i % 3}/{i}.png.png" for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    with Image.open(tmp_path / "drawn" / drawn[0]) as image:
        assert image.width > 600


def test_every_kind_of_image_works(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(0)
    grey = (rng.random((30, 40)) * 255).astype(np.uint8)
    rgb = Image.fromarray((rng.random((30, 40, 3)) * 255).astype(np.uint8))
    kinds = {
        "grey.png": Image.fromarray(grey),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.convert("P"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "bit.png": rgb.convert("1"),
        "pixel.png": Image.new("RGB", (1, 1), (200, 10, 10)),
        "wide.png": Image.new("RGB", (300, 3), (0, 90, 10)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    status, out, err = run(capsys, checkpoint, tmp_path, "--format", "jsonl")
    assert status == 0, err
    assert len(out.splitlines()) == len(kinds) + 2


def test_bad_files_are_named_and_skipped_only_when_asked(checkpoint, folder, tmp_path, capsys):
    (folder / "class 1" / "broken.png").write_bytes((folder / "class 1" / "1.png").read_bytes()[:200])
    status, out, err = run(capsys, checkpoint, folder, "--format", "csv")
    assert status == 1
    assert "broken.png" in err
    assert "--skip-bad" in err
    assert err.count("\n") == 1
    names = [Path(line.split(",")[0]).relative_to(folder).as_posix() for line in out.splitlines()[1:]]
    everything = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("[0-9b]*.png"))
    assert names == everything[: everything.index("class 1/broken.png")]  # nothing that was read before is lost
    assert names
    target = tmp_path / "out.jsonl"
    status, _, err = run(capsys, checkpoint, folder, "--skip-bad", "--format", "jsonl", "--output", target)
    assert status == 0
    assert "1 unreadable files skipped" in err
    assert len(target.read_text().splitlines()) == 9
    status, _, err = run(capsys, checkpoint, folder / "notes.txt")
    assert (status, "notes.txt" in err) == (1, True)


def test_an_interrupted_run_keeps_what_it_has_under_another_name(checkpoint, folder, tmp_path, capsys):
    (folder / "class 2" / "broken.png").write_bytes(b"junk")
    target = tmp_path / "out.csv"
    target.write_text("from an earlier run")
    status, _, _ = run(capsys, checkpoint, folder, "--format", "csv", "--output", target, "--batch-size", 1)
    assert status == 1
    assert target.read_text() == "from an earlier run"
    assert Path(f"{target}.part").read_text().count("\n") > 1


def test_only_a_few_batches_are_read_ahead(folder):
    asked = []

    def sources():
        for i in range(1000):
            asked.append(i)
            yield predict_cli.Source(folder / "class 0" / "0.png", str(i))

    batches = predict_cli.load_batches(
        sources(), lambda image: torch.zeros(1, 2, 2), 5, predict_cli.Skipped(False), workers=2
    )
    assert [f.name for f in next(batches)[1]] == ["0", "1", "2", "3", "4"]
    assert len(asked) <= 5 * 5
    batches.close()


def test_one_stage_models_predict_too(folder, tmp_path, capsys):
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(model, tmp_path / "vim.safetensors")
    status, out, _ = run(capsys, tmp_path / "vim.safetensors", folder, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {(r["stage"], r["tokens"]) for r in rows} == {("single", 17)}
    status, _, err = run(capsys, tmp_path / "vim.safetensors", folder, "--threshold", 0.5)
    assert (status, "MambaScope" in err) == (2, True)


def test_weights_without_description_need_a_name(folder, tmp_path, capsys):
    import timm

    model = timm.create_model("vim_nano_patch8_64", num_classes=4)
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    status, _, err = run(capsys, tmp_path / "plain.pth", folder)
    assert (status, "does not describe" in err) == (2, True)
    status, out, _ = run(capsys, tmp_path / "plain.pth", folder / "class 0", "--model", "vim_nano_patch8_64")
    assert status == 0
    assert len(out.splitlines()) == 4
    status, _, err = run(capsys, tmp_path / "plain.pth", folder, "--model", "vim_huge")
    assert (status, "known: mambascope_base" in err) == (2, True)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/mambascope_evil",))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--threshold", "nan"], "threshold"),
        (["--alpha", "1.5"], "alpha"),
        (["--device", "tpu"], "device"),
        (["--device", "cuda:99"], "not available"),
        (["--batch-size", "0"], "batch-size"),
        (["--img-size", "1", "2", "3"], "img-size"),
        (["--output", "/proc/nowhere/out.csv"], "/proc/nowhere"),
    ],
)
def test_bad_options_end_with_one_line(checkpoint, folder, capsys, options, word):
    status, _, err = run(capsys, checkpoint, folder, *options)
    assert status in (1, 2)
    assert err.startswith("error: ")
    assert word in err
    assert err.count("\n") == 1


def test_bad_inputs_end_with_one_line(checkpoint, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    cases = [
        ([checkpoint, tmp_path / "missing.png"], "missing.png does not exist"),
        ([checkpoint, tmp_path / "empty"], "holds no images"),
        ([tmp_path / "missing.safetensors", folder], "does not exist"),
        ([tmp_path / "empty", folder], "holds no model.safetensors"),
        ([tmp_path / "text.safetensors", folder], "cannot be read"),
        ([tmp_path / "evil.pth", folder], "evil.pth"),
    ]
    for argv, word in cases:
        status, _, err = run(capsys, *argv)
        assert status == 2, err
        assert word in err
        assert err.count("\n") == 1
    assert not Path("/tmp/mambascope_evil").exists()


def test_the_tool_itself_and_a_closed_pipe(checkpoint, folder):
    # more lines than fit into a pipe's buffers, so that writing fails after the reader has left
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), str(checkpoint), *[str(folder)] * 80]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline().startswith("label")
        process.stdout.close()  # as `head -1` does
        message = process.stderr.read()
    assert process.returncode == 0
    assert "720 images" not in message  # it really stopped early
    assert "rror" not in message


def test_preprocessing_comes_from_the_file(checkpoint):
    config = preprocessing(ready_model(checkpoint, device="cpu"))
    assert config["mean"] == (0.4,) * 3
    assert config["interpolation"] == "bilinear"
    assert config["input_size"] == (3, 32, 32)
    assert pick_device("cpu").type == "cpu"
