"""File names in ``predict_dense``: several of one name, names that are no text, and files beside images."""

import os

import pytest
import torch
from PIL import Image

from mambascope.mm import loading
from mambascope.mm.predict_cli import main
from tests.mm import common

SEG = common.CONFIGS / "upernet_scope_demo.py"
SMALL = ["model.backbone.arch_options.depth=4", "model.backbone.arch_options.embed_dim=32"]


@pytest.fixture
def checkpoint(tmp_path):
    model = loading.build_model(common.demo_config("seg"))
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "seg.pth")
    return tmp_path / "seg.pth"


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(root / name)


def run(checkpoint, *arguments):
    return main([str(SEG), str(checkpoint), *map(str, arguments), "--cfg-options", *SMALL])


def test_every_image_has_a_picture_of_its_own(checkpoint, tmp_path, capsys):
    latin = os.fsdecode(b"caf\xe9.png")
    put(tmp_path / "in", "A/a.png", "A/sub/b.jfif", "B/a.png", "B/a.jpg", "B/$5_vs_$6.png", f"B/{latin}", "B/._a.png")
    (tmp_path / "in/A/features.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    put(tmp_path, "in/sheet.png")
    assert run(checkpoint, tmp_path / "in", "--out", tmp_path / "out", "--sheet") == 0
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    outputs = ["A/a.png", "A/sub/b.png", "B/$5_vs_$6.png", "B/a-2.png", "B/a.png", f"B/{latin}", "sheet-2.png"]
    assert made == sorted([*outputs, "sheet.png"])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 7
    assert "left out: 1 file of no image format (1 .h5), 1 hidden name (._a.png)" in captured.err


def test_a_picture_never_replaces_an_image(checkpoint, tmp_path, capsys):
    put(tmp_path / "in", "a.png")
    before = (tmp_path / "in/a.png").read_bytes()
    assert run(checkpoint, tmp_path / "in", "--out", tmp_path / "in") == 2
    assert "the picture would replace" in capsys.readouterr().err
    assert (tmp_path / "in/a.png").read_bytes() == before
