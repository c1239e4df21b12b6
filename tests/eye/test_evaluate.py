"""Accuracy against glimpses, choices and films of a MambaEye, and both tools on good and bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.commands import predict as predict_cli
from mambascope.eye import MAMBAEYE_CONFIGS, MambaEye
from mambascope.eye import evaluate as eye_cli
from mambascope.eye.animation import Film, draw_frame, frame_steps, write_film
from mambascope.eye.choice import (
    ByContrast,
    ByLookahead,
    local_contrast,
    make_chooser,
    places,
    positions_by_importance,
)
from mambascope.eye.curves import StopOptions, evaluate_glimpses, evaluate_stopping, glimpse_macs
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.glimpses import Placement, information_ratio, place_image
from mambascope.eye.stopping import corrected_confidence
from mambascope.models import MambaScope, ScopeConfig, VimConfig, VisionMamba
from mambascope.models.checkpoint import save_safetensors

ROOT = Path(__file__).parents[2]
SMALL = {"embed_dim": 32, "depth": 2, "d_state": 8, "head_dim": 16, "move_dim": 8, "patch_size": 8, "num_classes": 3}
LABELS = ["ant", "bee", "cat"]
OPTIONS = GlimpseOptions(length=20, canvas_size=32, patch_size=8)


class Pictures:
    """Seven random pictures of different sizes."""

    def __len__(self):
        return 7

    def __call__(self, index):
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)), index % 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    eye = MambaEye(**SMALL).eval()
    with torch.no_grad():
        eye.get_classifier().weight.mul_(8)
    return eye


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    glimpses = {"length": 20, "canvas_size": 32, "pattern": "random", "resize_mode": "fit", "patch_size": 8}
    save_safetensors(model, path, {"labels": LABELS, "glimpses": glimpses})
    return path


@pytest.fixture
def data(tmp_path):
    for i, name in enumerate(LABELS):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for k in range(2):
            Pictures()(3 * k + i)[0].save(tmp_path / "data" / "val" / name / f"{k}.png")
    return tmp_path / "data"


# ---- curves ----------------------------------------------------------------------------------------------------------


def by_hand(model, seed=0):
    """Logits, coverage and labels of all pictures, each as one whole sequence."""
    rows = []
    for i in range(7):
        picture, label = Pictures()(i)
        sequence = OPTIONS.sequence(picture, (seed, i))
        with torch.no_grad():
            logits = model(sequence.patches[None], sequence.moves[None])[0]
        rows.append((logits, sequence.information_ratio, label))
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), torch.tensor([r[2] for r in rows])


@pytest.mark.parametrize(("batch_size", "chunk"), [(64, 128), (3, 7), (1, 1)])
def test_curves_equal_whole_sequences(model, batch_size, chunk):
    logits, coverage, labels = by_hand(model)
    stop = StopOptions(("confidence", "raw"), every=3, min_coverage=0.1, thresholds=(0.0, 0.3, 0.6, 0.9, 1.1))
    curve = evaluate_glimpses(model, Pictures(), OPTIONS, stop=stop, batch_size=batch_size, chunk=chunk)
    assert curve.images == 7
    correct = logits.argmax(-1) == labels[:, None]
    assert curve.hits.tolist() == correct.sum(0).tolist()
    assert curve.mean_coverage == pytest.approx(coverage.mean(0).numpy(), abs=1e-6)
    for part in curve.stops:
        sure = corrected_confidence(logits, coverage, part.criterion)
        for k, threshold in enumerate(stop.thresholds):
            checks = [*range(2, 19, 3), 19]
            ends = [
                next((t for t in checks if sure[i, t] >= threshold and coverage[i, t] >= 0.1), 19) for i in range(7)
            ]
            assert part.used[k] == sum(e + 1 for e in ends)
            assert part.hits[k] == sum(int(correct[i, e]) for i, e in enumerate(ends))
    # really stopping gives what the sweep promised
    middle = curve.stops[0]
    top1, used, count = evaluate_stopping(model, Pictures(), OPTIONS, threshold=0.6, stop=stop, batch_size=batch_size)
    assert (top1, used, count) == (middle.top1[2], pytest.approx(middle.mean_glimpses[2]), 7)
    assert curve.needed(-1.0) == 1
    assert curve.needed(1.1) is None
    assert middle.choose(0.0) == int(np.flatnonzero(middle.used == middle.used.min())[0])
    assert middle.choose(2.0) == int(middle.top1.argmax())


def test_never_more_logits_than_a_chunk(model):
    sizes = []
    handle = model.classification_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[:2].numel()))
    evaluate_glimpses(model, Pictures(), OPTIONS, batch_size=4, chunk=6)
    handle.remove()
    assert max(sizes) == 4 * 6
    assert sum(sizes) == 7 * 20


def test_cost_of_a_glimpse_is_the_published_one():
    for size, macs in (("tiny", 6.93), ("small", 13.28), ("base", 25.97)):
        assert glimpse_macs(MAMBAEYE_CONFIGS[f"mambaeye_{size}"]) / 1e6 == pytest.approx(macs, abs=0.006)


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_important_places_are_seen_more_often():
    placement = Placement.centred(40, 56, 64)
    rows, columns = places(placement, 16)
    spans = placement.spans(16)
    assert (rows[0], rows[-1] + 16, columns[0], columns[-1] + 16) == (*spans[0], *spans[1])
    importance = torch.zeros(5, 7)
    importance[4, 6] = 1
    sharp = positions_by_importance(importance, placement, 200, sharpness=50, seed=1)
    corner = np.array([placement.top + 40 - 16, placement.left + 56 - 16])
    assert np.abs(sharp - corner).max() <= 3
    for flat in ({"sharpness": 0}, {}):  # the map is not looked at, or it shows nothing
        even = positions_by_importance(importance * bool(flat), placement, 3000, seed=1, **flat)
        assert np.abs(even.mean(0) - [rows.mean(), columns.mean()]).max() < 1
        assert (even.min(0) == [rows[0], columns[0]]).all()
        assert (even.max(0) == [rows[-1], columns[-1]]).all()
    assert np.array_equal(sharp, positions_by_importance(importance, placement, 200, sharpness=50, seed=1))
    # twice as important is twice as often
    halves = torch.cat([torch.ones(8, 4), 2 * torch.ones(8, 4)], 1)
    wide = Placement.centred(16, 400, 400)
    often = positions_by_importance(halves, wide, 20_000, patch_size=16, seed=0)[:, 1]
    assert (often >= 230).sum() / (often < 154).sum() == pytest.approx(2, rel=0.1)
    for bad in (torch.zeros(3), torch.full((2, 2), float("nan")), -torch.ones(2, 2)):
        with pytest.raises(ValueError, match="importance must be a finite map"):
            positions_by_importance(bad, placement, 5)


def test_contrast_finds_the_detail():
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    pixels[40:56, 8:24] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    canvas, placement = place_image(pixels, 64)
    contrast = local_contrast(canvas)
    assert contrast.shape == (64, 64)
    assert contrast[44:52, 12:20].min() > 10 * contrast[:32, 32:].max()
    (positions,) = ByContrast(50, 16)([canvas], [placement], [(0, 0)])
    overlaps = (np.abs(positions - [40, 8]) < 16).all(1)
    assert overlaps.mean() > 0.9  # a random scan has one in five


def test_lookahead_takes_the_surest_of_its_candidates(model):
    canvas, placement = OPTIONS.place(Pictures()(0)[0])
    chooser = ByLookahead(model, 6, candidates=3)
    (positions,) = chooser([canvas], [placement], [(0, 5)])
    assert chooser.cost == 4
    # the first glimpse by hand
    rng, (rows, columns) = np.random.default_rng((0, 5)), places(placement, 8)
    picked = [rng.integers(0, len(axis), 3) for axis in (rows, columns)]
    cells = np.stack([rows[picked[0]], columns[picked[1]]], 1)
    sure = []
    for row, column in cells.tolist():
        patch = canvas[:, row : row + 8, column : column + 8].reshape(1, -1)
        with torch.no_grad():
            logits = model.step(model.start(1), patch, torch.zeros(1, 2)).logits
        ratio = torch.tensor(information_ratio([[row, column]], placement, 8))
        sure.append(corrected_confidence(logits, ratio).item())
    assert positions[0].tolist() == cells[int(np.argmax(sure))].tolist()
    both = chooser([canvas, canvas], [placement, placement], [(0, 5), (0, 6)])
    assert np.array_equal(both[0], positions)  # a batch does not change it


def test_chooser_names(model, tmp_path):
    scope = MambaScope(ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(scope, tmp_path / "scope.safetensors")
    chooser = make_chooser(f"scope:{tmp_path / 'scope.safetensors'}", model, 9)
    canvas, placement = OPTIONS.place(Pictures()(1)[0])
    (positions,) = chooser([canvas], [placement], [(0, 1)])
    assert positions.shape == (9, 2)
    assert chooser.importance(canvas).shape == (4, 4)
    assert make_chooser("lookahead:2", model, 9).candidates == 2
    for bad in ("best", "lookahead:0", "contrast:3"):
        with pytest.raises(ValueError, match="choice must be contrast, scope:WEIGHTS or lookahead"):
            make_chooser(bad, model, 9)
    save_safetensors(model, tmp_path / "eye.safetensors")
    with pytest.raises(ValueError, match="needs a MambaScope, got a MambaEye"):
        make_chooser(f"scope:{tmp_path / 'eye.safetensors'}", model, 9)


# ---- films -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def film():
    rng = np.random.default_rng(0)
    canvas = np.full((40, 40, 3), 200, dtype=np.uint8)
    probabilities = rng.dirichlet(np.ones(3), 9).astype(np.float32)
    positions = np.array([[0, 0], [8, 8], [32, 32], *[[16, 0]] * 6])
    return Film(canvas, positions, probabilities, np.linspace(0.1, 0.9, 9, dtype=np.float32), 8, LABELS, "a.png", True)


def test_frames_show_what_was_seen(film):
    first, third = (np.array(draw_frame(film, step)) for step in (1, 3))
    assert first.shape == third.shape
    scale, left, top = 256 / 40, 12, 36

    def at(frame, row, column):
        return frame[top + int(row * scale), left + int(column * scale)].tolist()

    assert at(first, 4, 4) == at(third, 4, 4) == [200] * 3
    assert at(first, 36, 36) == [56] * 3  # not seen yet
    assert at(third, 36, 36) == [200] * 3


@pytest.mark.parametrize(("ending", "frames"), [("gif", 60), ("png", 4)])
def test_films_are_animations(film, tmp_path, ending, frames):
    path = write_film(film, tmp_path / "new" / f"a.{ending}", frames=frames)
    with Image.open(path) as image:
        # the last glimpses look alike, and GIF joins equal frames
        assert 4 <= image.n_frames <= 9
        assert image.format == ending.upper()
    with pytest.raises(ValueError, match=r"written as \.gif or \.png"):
        write_film(film, tmp_path / "a.mp4")


def test_frame_steps():
    assert frame_steps(5, 60) == [1, 2, 3, 4, 5]
    steps = frame_steps(4096, 40)
    assert (steps[0], steps[-1]) == (1, 4096)
    assert len(steps) <= 41
    assert steps[:10] == list(range(1, 11))


# ---- tools -----------------------------------------------------------------------------------------------------------


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
    own = [r for r in rows if r["size"] == "32²" and r["order"] == "random"]
    assert [float(r["top1"]) for r in own] == pytest.approx(expected.top1.tolist(), abs=1e-6)
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
