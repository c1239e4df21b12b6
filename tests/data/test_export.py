"""``tools/make_scopedigits.py``: layouts other people's readers accept, complete or absent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambascope.commands.digits import main
from mambascope.data.coco_categories import COCO_CATEGORIES
from mambascope.data.export_scopedigits import export, rle_encode
from mambascope.data.scopedigits import ScopeDigits

TOOL = Path(__file__).parents[2] / "tools" / "make_scopedigits.py"


def run_tool(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, check=False)


def decode(rle):
    """Independent reading of uncompressed run lengths."""
    height, width = rle["size"]
    values = []
    for number, count in enumerate(rle["counts"]):
        values += [number % 2] * count
    return np.array(values, bool).reshape(width, height).T


def test_image_folder(tmp_path, capsys):
    out = tmp_path / "new" / "digits"
    result = run_tool("--task", "cls", "--out", out, "--train", 30, "--val", 10, "--size", 48, "--seed", 5)
    assert result.returncode == 0, result.stderr
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    assert len(files) == 40
    assert "train/9/000029.png" in files
    data = ScopeDigits(split="val", size=48, seed=5)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "val/3/000003.png")), data[3][0])
    assert json.loads((out / "scopedigits.json").read_text())["config"]["seed"] == 5
    assert "make_scopedigits" in (out / "README.txt").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["digits"]
    capsys.readouterr()
    assert main(["--task", "cls", "--out", str(out)]) == 2
    assert (
        capsys.readouterr().err.strip() == f"error: --out {out} is not empty; choose another folder or pass --overwrite"
    )


@pytest.mark.parametrize(("mapped", "values"), [(False, range(1, 12)), (True, [1, *range(15, 151, 15)])])
def test_ade_layout(tmp_path, mapped, values):
    out = export("seg", tmp_path / "ade", train=6, val=3, mapped_ids=mapped, quiet=True)
    for split, folder, count in (("train", "training", 6), ("val", "validation", 3)):
        images = sorted((out / "images" / folder).glob("*.jpg"))
        labels = sorted((out / "annotations" / folder).glob("*.png"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        data = ScopeDigits("seg", split, size=128)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            raw = Image.open(label)
            assert raw.mode == "L"
            expected_image, mask = data[index]
            np.testing.assert_array_equal(np.asarray(raw), np.array(list(values))[mask])
            assert np.abs(np.asarray(Image.open(image)).astype(int) - expected_image).mean() < 6


@pytest.mark.parametrize("mapped", [False, True])
def test_coco_layout(tmp_path, mapped):
    out = export("det", tmp_path / "coco", train=5, val=4, mapped_ids=mapped, quiet=True)
    table = json.loads((out / "annotations" / "instances_val2017.json").read_text())
    assert sorted(p.name for p in (out / "val2017").iterdir()) == [image["file_name"] for image in table["images"]]
    names = {c["id"]: c["name"] for c in table["categories"]}
    assert names == (COCO_CATEGORIES if mapped else {d + 1: str(d) for d in range(10)})
    data = ScopeDigits("det", "val", size=128)
    ids = sorted(
        {
            a["category_id"]
            for a in json.loads((out / "annotations/instances_train2017.json").read_text())["annotations"]
        }
    )
    assert set(ids) <= set(names)
    assert len({a["id"] for a in table["annotations"]}) == len(table["annotations"])
    mapping = {}
    for index in range(4):
        target = data[index][1]
        rows = [a for a in table["annotations"] if a["image_id"] == index + 1]
        assert len(rows) == len(target["labels"])
        for row, box, label, mask in zip(rows, target["boxes"], target["labels"], target["masks"], strict=True):
            x, y, w, h = row["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert row["area"] == mask.sum()
            np.testing.assert_array_equal(decode(row["segmentation"]), mask)
            assert mapping.setdefault(int(label), row["category_id"]) == row["category_id"]
    assert len(set(mapping.values())) == len(mapping)


def test_coco_file_loads_in_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    out = export("det", tmp_path / "coco", train=2, val=2, quiet=True)
    table = coco.COCO(str(out / "annotations" / "instances_val2017.json"))
    for annotation in table.loadAnns(table.getAnnIds()):
        np.testing.assert_array_equal(table.annToMask(annotation), decode(annotation["segmentation"]))


def test_coco_has_its_80_categories():
    assert len(COCO_CATEGORIES) == 80
    assert len(set(COCO_CATEGORIES.values())) == 80
    checks = {
        1: "person",
        11: "fire hydrant",
        25: "giraffe",
        28: "umbrella",
        44: "bottle",
        65: "bed",
        82: "refrigerator",
    }
    assert {i: COCO_CATEGORIES[i] for i in checks} == checks
    assert COCO_CATEGORIES[90] == "toothbrush"
    assert not set(COCO_CATEGORIES) & {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def test_run_lengths_of_full_and_empty_masks():
    assert rle_encode(np.zeros((2, 3), bool)) == {"counts": [6], "size": [2, 3]}
    assert rle_encode(np.ones((2, 3), bool)) == {"counts": [0, 6], "size": [2, 3]}
    corner = np.zeros((2, 3), bool)
    corner[1, 0] = True
    assert rle_encode(corner) == {"counts": [1, 1, 4], "size": [2, 3]}


def test_overwrite_replaces_only_its_own_folders(tmp_path):
    out = export("cls", tmp_path / "a", train=10, val=10, quiet=True)
    export("cls", out, train=20, val=10, quiet=True, overwrite=True)
    assert len(list((out / "train").rglob("*.png"))) == 20
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.jpg").write_text("x")
    assert main(["--task", "cls", "--out", str(mine), "--overwrite"]) == 2
    assert (mine / "holiday.jpg").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    export("cls", empty, train=10, val=10, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty", "photos"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "cls", "--train", "3"], "train must be at least 10 images"),
        (["--task", "det", "--ade-ids"], "--ade-ids belongs to --task seg"),
        (["--task", "seg", "--size", "5"], "size must be an integer of at least 32"),
        (["--task", "seg", "--easy-share", "2"], "easy_share must be in"),
    ],
)
def test_bad_arguments(tmp_path, capsys, args, message):
    assert main([*args, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_way(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert main(["--task", "cls", "--out", str(tmp_path / "x")]) == 2
    assert main(["--task", "cls", "--out", str(tmp_path / "x" / "y")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path, sign):
    command = [sys.executable, str(TOOL), "--task", "seg", "--out", str(tmp_path / "x"), "--train", "100000"]
    # a test run started in the background has SIGINT ignored, which children inherit
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".x.tmp-*/images/training/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, sign)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: nothing was written" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
