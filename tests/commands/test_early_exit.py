"""``early_exit.py`` of an export answers as ``tools/predict.py`` does, on every kind of file; its graphs quantise."""

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from PIL import Image

from mambascope.commands import early_exit
from mambascope.commands import export as export_cli
from mambascope.commands import predict as predict_cli
from mambascope.commands.early_exit import EarlyExit
from mambascope.commands.export import standalone_early_exit
from mambascope.data import ScopeDigitsDataModule, open_image
from mambascope.models import MambaScope, ScopeConfig, load_model
from mambascope.models.export import stages
from mambascope.models.preprocessing import make_transform, preprocessing
from tests.models.test_pictures import STORED, numpy_file, png16


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_files(folder):
    """One file of every kind that users have."""
    rng = np.random.default_rng(0)
    pixels = (128 + rng.normal(size=(37, 61, 3)) * 60).clip(0, 255).astype(np.uint8)
    colour = Image.fromarray(pixels)
    layer = Image.fromarray(np.dstack([pixels, rng.integers(0, 256, (37, 61), dtype=np.uint8)]))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    exif = Image.Exif()
    exif[274] = 6
    files = {
        "colour.png": encoded(colour),
        "turned.jpg": encoded(colour, "JPEG", exif=exif),
        "clear.png": encoded(layer),
        "palette.png": encoded(palette),
        "clear palette.png": encoded(palette, transparency=3),
        "grey.png": encoded(colour.convert("L")),
        "grey and clear.png": encoded(layer.convert("LA")),
        "one bit.png": encoded(colour.convert("1")),
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "film.gif": encoded(colour, "GIF", save_all=True, append_images=[Image.new("RGB", colour.size)]),
        "web.webp": encoded(layer, "WEBP"),
        "16.png": png16(rng.integers(0, 65536, (37, 61, 1)).astype(np.uint16)),
        "16 colours.png": png16(rng.integers(0, 65536, (37, 61, 3)).astype(np.uint16)),
        "16 clear.png": png16(rng.integers(0, 65536, (37, 61, 4)).astype(np.uint16)),
        "float.tiff": encoded(Image.fromarray(rng.random((37, 61), dtype=np.float32) * 900), "TIFF"),
        "values.npy": numpy_file(rng.random((37, 61, 3)) * 0.7),
        "pixel.png": encoded(Image.new("RGB", (1, 1), (9, 200, 30))),
        "small.bmp": encoded(colour.resize((20, 19)), "BMP"),
        **{f"{kind}.img": content for kind, (content, _) in STORED.items()},
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What tools/export.py writes for early exit, of the weights that come with the package."""
    folder, model = tmp_path_factory.mktemp("export"), load_model("scopedigits")
    programs = stages(model, torch.randn(3, 3, 64, 64))
    for name in ("coarse", "fine"):
        export_cli.write_program(*programs[name], folder / f"{name}.onnx")
    (folder / "export.json").write_text(json.dumps(export_cli.describe_export(model, None)))
    (folder / "early_exit.py").write_text(standalone_early_exit(), encoding="utf-8")
    return folder


def test_the_same_tensors_and_answers_file_by_file(exported, tmp_path, capsys, monkeypatch):
    model, runner = load_model("scopedigits"), EarlyExit(exported)
    files, prepare = odd_files(tmp_path / "odd"), make_transform(model)
    for file in files:
        np.testing.assert_array_equal(runner.read(file), prepare(open_image(file)).numpy(), err_msg=file.name)
        np.testing.assert_array_equal(runner.read(file), model.transform()(file).numpy(), err_msg=file.name)
    assert predict_cli.main(["scopedigits", *map(str, files), "--format", "jsonl"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["stage"] for row in expected} == {"coarse", "fine"}
    assert len({row["label"] for row in expected}) > 2

    # bad files between them, and fewer images at once than there are
    bad = [tmp_path / "nowhere.png", tmp_path / "text.png", tmp_path / "end.png"]
    bad[1].write_text("no image")
    bad[2].write_bytes(files[0].read_bytes()[:600])
    arguments = [bad[0], *files[:5], bad[1], *files[5:], bad[2]]
    module = runpy.run_path(str(exported / "early_exit.py"))
    sizes = []
    run = module["EarlyExit"].__call__

    def counted(self, images):
        sizes.append(len(images))
        return run(self, images)

    monkeypatch.setattr(module["EarlyExit"], "__call__", counted)
    monkeypatch.setitem(module["main"].__globals__, "BATCH", 4)
    assert module["main"]([str(file) for file in arguments]) == 1
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [row[3] for row in rows] == [str(file) for file in files]
    assert [(row[0], row[2]) for row in rows] == [(row["label"], row["stage"]) for row in expected]
    assert [float(row[1]) for row in rows] == pytest.approx([row["confidence"] for row in expected], abs=2e-3)
    assert max(sizes) <= 4
    assert sum(sizes) == len(files)
    lines = printed.err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"cannot read image {file}" for file in bad]


@pytest.mark.parametrize(
    ("channels", "size", "interpolation", "crop_pct", "value_range"),
    [
        (3, (24, 40), "bicubic", 0.875, (0, 4095)),
        (3, (32, 32), "lanczos", 1.0, "percentile"),
        (1, (40, 24), "nearest", 0.7, "file"),
        (1, (32, 32), "bicubic", 0.95, None),
    ],
)
def test_ranges_channels_and_crops_are_the_same(tmp_path, channels, size, interpolation, crop_pct, value_range):
    config = ScopeConfig(img_size=size, patch_size=8, embed_dim=16, depth=1, in_chans=channels, num_classes=7)
    net = MambaScope(config)
    net.description = {
        "transform": {
            "mean": [0.3] * channels,
            "std": [0.2] * channels,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "value_range": value_range,
        }
    }
    facts = json.loads(json.dumps(export_cli.describe_export(net, None)))
    assert facts["input_size"] == [channels, *size]
    runner = EarlyExit.__new__(EarlyExit)
    runner.facts, runner.value_range = facts, preprocessing(net)["value_range"]
    for file in odd_files(tmp_path / "odd"):
        np.testing.assert_array_equal(runner.read(file), net.transform()(file).numpy(), err_msg=file.name)


def test_several_bands(tmp_path):
    values = np.random.default_rng(0).integers(0, 10_000, (50, 40, 13)).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    net = MambaScope(ScopeConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, in_chans=13, num_classes=7))
    net.description = {"transform": {"mean": [i / 13 for i in range(13)], "std": [0.2], "value_range": [0, 10_000]}}
    runner = EarlyExit.__new__(EarlyExit)
    runner.facts, runner.value_range = export_cli.describe_export(net, None), (0, 10_000)
    expected = net.transform()(tmp_path / "a.npy").numpy()
    assert expected.shape == (13, 32, 32)
    np.testing.assert_array_equal(runner.read(tmp_path / "a.npy"), expected)


def test_the_copy_needs_neither_this_package_nor_torch(tmp_path):
    (tmp_path / "early_exit.py").write_text(standalone_early_exit(), encoding="utf-8")
    blocked = "import sys; sys.modules.update(mambascope=None, torch=None, timm=None); import early_exit as e; "
    code = f"{blocked}assert e.BATCH and e.read_picture and 'mambascope.' not in open(e.__file__).read()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert Path(early_exit.__file__).read_text() != standalone_early_exit()


def test_the_graphs_quantise(exported, tmp_path):
    """On the weights that come with the package: half the size, and mostly the same answers."""
    (tmp_path / "export.json").write_text((exported / "export.json").read_text())
    for name in ("coarse.onnx", "fine.onnx"):
        whole, small = exported / name, tmp_path / name
        assert not onnx.load(whole).graph.value_info
        quantize_dynamic(whole, small)
        assert small.stat().st_size < 0.55 * whole.stat().st_size
    data = ScopeDigitsDataModule(1, 200, batch_size=1, val_batch_size=200)
    images, labels = next(iter(data.val_dataloader()))
    answers = [EarlyExit(folder)(images.numpy())[0].argmax(1) for folder in (exported, tmp_path)]
    right = [(answer == labels.numpy()).mean() for answer in answers]
    assert (answers[0] == answers[1]).mean() > 0.85
    assert right[0] > 0.7
    assert right[1] > right[0] - 0.05
