"""One way of reading images for training, prediction and drawing; annotations that do not fit name both files."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from PIL import Image

from mambascope.data.errors import DataError
from mambascope.data.image_io import open_image
from mambascope.mm import loading
from mambascope.mm.predict_cli import main as predict_dense
from mambascope.mm.predict_cli import picture
from mambascope.mm.runner import ScopeRunner, one_line
from mambascope.models.frozen import is_frozen, unfreeze
from mambascope.ops.native import library
from mambascope.ops.native.stack import PackedStack
from tests.mm import common
from tests.mm.common import runner

SIZE = (48, 32)  # width, height


def scene():
    """A picture that is different after every turn and mirror."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.NEAREST)


def turned(path, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene().save(path, exif=exif, quality=95)


def transparent(path):
    layer = scene().convert("RGBA")
    layer.putalpha(Image.fromarray((np.arange(32)[:, None] < 16).repeat(48, 1).astype(np.uint8) * 255))
    layer.save(path)


def deep(path):
    Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257).save(path)


def palette(path):
    scene().quantize(8).save(path, transparency=0)


KINDS = {"turned.jpg": turned, "transparent.png": transparent, "deep.png": deep, "palette.png": palette}


@pytest.fixture(params=KINDS)
def odd(request, tmp_path):
    KINDS[request.param](tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("name", sorted(p.name for p in common.CONFIGS.glob("*.py")))
def test_every_config_reads_in_training_and_test_as_the_classifier_does(name, odd):
    cfg = Config.fromfile(common.CONFIGS / name)
    loading.register(cfg.default_scope)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        step = TRANSFORMS.build(cfg[loader].dataset.pipeline[0])
        result = step({"img_path": str(odd)})
        assert np.array_equal(result["img"][..., ::-1], np.asarray(open_image(odd)))
        assert result["img_shape"] == result["ori_shape"] == result["img"].shape[:2]


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_what_is_drawn_is_what_was_predicted_on(kind, odd, tmp_path, capsys):
    cfg = common.demo_config(kind)
    model = loading.build_model(cfg)
    made = picture(model, loading.image_pipeline(cfg), odd, 0.0)
    expected = np.asarray(open_image(odd), dtype=np.float32) / 255
    assert np.allclose(made.image, expected, atol=1e-6)
    if kind == "seg":
        assert made.segmentation.shape == expected.shape[:2]
    else:
        assert made.masks.shape[1:] == expected.shape[:2]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    cfg.dump(tmp_path / "own.py")
    assert (
        predict_dense([str(tmp_path / "own.py"), str(tmp_path / "x.pth"), str(odd), "--out", str(tmp_path / "o")]) == 0
    )
    assert (tmp_path / "o" / f"{odd.stem}.png").stat().st_size > 10_000


def test_a_file_that_cannot_be_read_takes_nothing_from_others(tmp_path, capsys):
    cfg = common.demo_config("seg")
    torch.save({"state_dict": loading.build_model(cfg).state_dict()}, tmp_path / "x.pth")
    cfg.dump(tmp_path / "own.py")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    scene().save(files[0])
    files[1].write_bytes(b"no image")
    out = tmp_path / "out"
    assert (
        predict_dense([*map(str, (tmp_path / "own.py", tmp_path / "x.pth", *files)), "--out", str(out), "--sheet"]) == 2
    )
    assert "b.png: not an image" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "sheet.png"]


def test_jpeg_is_decoded_as_by_mmcv(tmp_path):
    """So that models that were trained with mmcv's reader see the same pixels."""
    from mmcv.transforms import LoadImageFromFile

    scene().save(tmp_path / "a.jpg", quality=90)
    one, other = (
        TRANSFORMS.build({"type": t})({"img_path": str(tmp_path / "a.jpg")})["img"]
        for t in ("LoadAnyImage", LoadImageFromFile)
    )
    assert np.abs(one.astype(int) - other).max() <= 1


def test_large_images_keep_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr("mambascope.models.picture_files.REDUCE_ABOVE", 1000)
    scene().save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size < SIZE
    assert TRANSFORMS.build({"type": "LoadAnyImage"})({"img_path": str(tmp_path / "a.png")})["img"].shape == (32, 48, 3)


def test_values_of_12_bits(tmp_path):
    values = np.linspace(0, 4095, 32 * 48).reshape(32, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    for value_range in (None, [0, 4095], "file"):
        result = TRANSFORMS.build({"type": "LoadAnyImage", "value_range": value_range})
        image = result({"img_path": str(tmp_path / "a.png")})["img"]
        assert np.array_equal(image, np.asarray(open_image(tmp_path / "a.png", value_range=value_range))[..., ::-1])
        assert int(image.max()) == (16 if value_range is None else 255)
    with pytest.raises(ValueError, match="value_range must be the values that become 0 and 255"):
        TRANSFORMS.build({"type": "LoadAnyImage", "value_range": [5]})


def test_a_loader_warns_of_images_that_use_a_small_part_of_their_values(source, tmp_path, caplog):
    root = shutil.copytree(source["seg"], tmp_path / "seg")
    for path in root.glob("images/training/*"):  # Pillow goes by what a file holds
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path, format="PNG")
    cfg = common.demo_config("seg", root)
    ScopeRunner.build_dataloader(cfg.test_dataloader)
    assert not caplog.records
    ScopeRunner.build_dataloader(cfg.train_dataloader)
    [record] = caplog.records
    assert "the values of 4 images looked at are" in record.getMessage()
    caplog.clear()
    cfg.train_dataloader.dataset.pipeline[0]["value_range"] = [0, 4080]
    ScopeRunner.build_dataloader(cfg.train_dataloader)
    assert not caplog.records


def test_missing_and_broken_images(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    step = TRANSFORMS.build({"type": "LoadAnyImage"})
    with pytest.raises(DataError, match=r"cannot read image .*bad\.png: not an image"):
        step({"img_path": str(tmp_path / "bad.png")})
    with pytest.raises(DataError, match=r"cannot read image .*none\.png: No such file"):
        step({"img_path": str(tmp_path / "none.png")})
    assert TRANSFORMS.build({"type": "LoadAnyImage", "ignore_empty": True})({"img_path": "none.png"}) is None


# ---- annotations that do not fit -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {kind: common.make_data(kind, root / kind, train=4, val=2) for kind in ("seg", "det")}


def resize(path, size, **options):
    with Image.open(path) as file:
        file.resize(size, Image.Resampling.NEAREST).save(path, **options)


def exif():
    data = Image.Exif()
    data[0x0112] = 6
    return data


def other_size(image, mask):
    resize(mask, (32, 64))


def turn(image, mask):
    resize(image, (64, 48), exif=exif())
    resize(mask, (64, 48))


def rgb(image, mask):
    with Image.open(mask) as file:
        file.convert("RGB").save(mask)


def alpha(image, mask):
    with Image.open(mask) as file:
        file.convert("LA").save(mask)


def jpeg(image, mask):
    with Image.open(mask) as file:
        file.save(mask, format="JPEG")


def sixteen_bits(image, mask):
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(mask)


def no_mask(image, mask):
    mask.unlink()


def broken_mask(image, mask):
    mask.write_bytes(b"no image")


def read_all(loader):
    """Reads a whole epoch, as training, test and eval_dense do."""
    result = ScopeRunner.build_dataloader(loader)
    with one_line():
        for _ in zip(range(len(result.dataset)), result, strict=False):
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_size, r"image {i} is 64×64 pixels and its mask {m} is 32×64: they must be of one size"),
        (turn, r"image {i} is 48×64 pixels \(64×48 before the turn that its EXIF .* and its mask {m} is 64×48"),
        (rgb, r"mask {m} of image {i} is RGB: a mask must hold one number for each pixel, its class"),
        (alpha, r"mask {m} of image {i} is LA: "),
        (jpeg, r"mask {m} of image {i} is a JPEG, which changes labels: save masks as PNG"),
        (sixteen_bits, r"mask {m} of image {i} holds label 300; labels above 255 cannot be read"),
        (no_mask, r"cannot read mask {m} of image {i}: No such file"),
        (broken_mask, r"cannot read mask {m} of image {i}: not an image"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_masks_that_do_not_fit(change, message, split, source, tmp_path):
    root = shutil.copytree(source["seg"], tmp_path / "seg")
    folder = "training" if split == "train" else "validation"
    image = sorted(root.glob(f"images/{folder}/*.jpg"))[1]
    mask = root / "annotations" / folder / f"{image.stem}.png"
    change(image, mask)
    cfg = common.demo_config("seg", root, **{"train_dataloader.num_workers": int(change is other_size)})
    with pytest.raises(DataError, match=message.format(i=image, m=mask)) as error:
        read_all(cfg[f"{split}_dataloader"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_that_do_not_fit(split, source, tmp_path):
    root = shutil.copytree(source["det"], tmp_path / "det")
    name = "train" if split == "train" else "val"
    file = root / "annotations" / f"instances_{name}2017.json"
    image = root / f"{name}2017" / json.loads(file.read_text())["images"][1]["file_name"]
    resize(image, (64, 48), exif=exif())
    message = (
        rf"image {image} is 48×64 pixels \(64×48 before the turn .*\) and annotations {file} say 64×64: boxes would"
    )
    with pytest.raises(DataError, match=message) as error:
        read_all(common.demo_config("det", root)[f"{split}_dataloader"])
    assert "\n" not in str(error.value)


def test_a_training_ends_in_that_line(source, tmp_path):
    root = shutil.copytree(source["seg"], tmp_path / "seg")
    for mask in root.glob("annotations/*/*.png"):
        resize(mask, (32, 64))
    with pytest.raises(
        DataError, match=r"^image .* is 64×64 pixels and its mask .* is 32×64: they must be of one size$"
    ):
        runner("seg", root, tmp_path / "w").train()


@pytest.mark.skipif(library.why_unavailable() is not None, reason="kernels were not compiled")
@pytest.mark.parametrize("kind", ["seg", "det"])
def test_loaded_models_run_frozen_and_answer_the_same(kind, odd, monkeypatch):
    cfg = common.demo_config(kind)
    model = loading.build_model(cfg)
    assert is_frozen(model.backbone.encoder)
    count, call = [0], PackedStack.__call__

    def counted(self, *args, **kwargs):
        count[0] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PackedStack, "__call__", counted)
    images = torch.randn(2, 3, *model.backbone.encoder.config.image_hw)
    with torch.no_grad():
        model.backbone.threshold = 1.0
        frozen = model.backbone(images)
        assert count == [2]
        unfreeze(model.backbone.encoder)
        plain = model.backbone(images)
    assert count == [2]
    for a, b in zip(frozen, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
