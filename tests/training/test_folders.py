"""Training on folders as users have them, through the real command."""

import json
import os
import re

import pytest
from PIL import Image

import mambascope
from mambascope.commands.train import main
from tests.training.helpers import train

TINY = [
    "--config=scopedigits",
    "--data=ImageDataModule",
    "--data.img_size=32",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--model.net.args.embed_dim=16",
    "--model.net.args.depth=2",
    "--model.net.args.d_state=4",
    "--model.full_refine_epochs=0",
    "--model.schedule.warmup_epochs=0",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--run.report=false",
]
LATIN = os.fsdecode(b"caf\xe9")


def put(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (60 * i % 256, 9, 9)).save(root / name)


def test_files_that_are_no_images_do_not_stop_a_run(here, caplog):
    for split in ("train", "val"):
        put(here / "set" / split, *(f"{name}/{i}.webp" for name in ("left/ok", "right/ok", LATIN) for i in range(2)))
        put(here / "set" / split, "left/.ipynb_checkpoints/0.png", "right/._1.png")
        for name in ("features.h5", "right/clip.mpg", "x.grib", "x.wmf", "x.eps"):
            (here / "set" / split / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    assert main([*TINY, "--data.root=set", "--run.name=mess", "--run.report=true"]) == 0
    assert mambascope.load("runs/mess/model.safetensors").labels == [LATIN, "left", "right"]
    assert json.loads((here / "runs/mess/report/report.json").read_text())["images"] == 6
    assert (here / "runs/mess/report/heatmaps.png").is_file()
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert lines == [
        f"left out of set/{split}: 5 files of no image format (1 .eps, 1 .grib, 1 .h5, 1 .mpg, 1 .wmf), "
        "2 hidden names (.ipynb_checkpoints, ._1.png)"
        for split in ("train", "val")
    ]


@pytest.mark.parametrize("more", [[], ["--data.num_classes=200"]])
def test_tiny_imagenet_as_downloaded(here, capsys, more):
    put(here / "set/train", "n01/images/n01_0.JPEG", "n02/images/n02_0.JPEG")
    put(here / "set/val/images", "val_0.JPEG")
    (here / "set/val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t32\t44\t62\n")
    assert main([*TINY, "--data.root=set", *more]) in (1, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: the images in set/val/images are not sorted: .*; sort them: \(cd set/val && .*\)", line
    )


def test_a_root_that_a_config_cannot_name(here, capsys):
    put(here / LATIN / "train", "a/1.png", "b/1.png")
    assert main([*TINY, f"--data.root={LATIN}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: --data.root=caf\xe9 is no UTF-8, as a run's config must be: name it through a link")
    assert not (here / "runs").exists()


def test_an_ascii_locale(here):
    root = here / "wurzel-ä"
    put(root / "train", *(f"{name}/{i}.png" for name in ("ñu", "zoo") for i in range(2)))
    put(root / "val", "ñu/1.png")
    options = [*TINY, f"--data.root={root}", f"--run.root={here / 'läufe'}", "--run.name=c"]
    done = train(*options, cwd=here, env={"PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert mambascope.load(here / "läufe" / "c").labels == ["zoo", "ñu"]
    assert f"root: {root}" in (here / "läufe/c/config.yaml").read_text(encoding="utf-8")
