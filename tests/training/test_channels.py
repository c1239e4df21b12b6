"""Values and channels from a folder to the model: the same in training, validation, prediction and evaluation."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import mambascope
from mambascope.commands import evaluate as eval_cli
from mambascope.commands import predict as predict_cli
from mambascope.commands.train import main
from mambascope.data import GlimpseImageDataModule, ImageDataModule, open_image
from mambascope.models.preprocessing import make_transform
from tests.models.test_pictures import png16

TINY = {
    "config": "scopedigits",
    "data": "ImageDataModule",
    "data.img_size": 32,
    "data.batch_size": 2,
    "data.num_workers": 0,
    "model.net.args.embed_dim": 16,
    "model.net.args.depth": 1,
    "model.net.args.d_state": 4,
    "model.full_refine_epochs": 0,
    "model.schedule.warmup_epochs": 0,
    "trainer.max_epochs": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
    "run.name": "a",
}
EYE = {
    "config": "scopedigits_mambaeye",
    "data": "GlimpseImageDataModule",
    "data.length": 8,
    "data.patch_size": 8,
    "data.glimpses.length": 8,
    "data.glimpses.canvas_size": 32,
    "data.augment.canvas_size": [32, 40],
    "data.batch_size": 2,
    "data.num_workers": 0,
    "model.net.args.embed_dim": 32,
    "model.net.args.depth": 1,
    "model.net.args.d_state": 8,
    "model.net.args.head_dim": 16,
    "model.net.args.move_dim": 8,
    "model.schedule.warmup_epochs": 0,
    "trainer.max_epochs": 1,
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
    "run.name": "eye",
}


def train(base, **changes):
    """Runs the command in this process; ``a__b=c`` changes ``a.b``."""
    options = {**base, **{key.replace("__", "."): value for key, value in changes.items()}}
    return main([f"--{key}={value}" for key, value in options.items() if value is not None])


def data(kind):
    """A folder of two classes that differ in brightness, below the working directory."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for number, name in enumerate("ab"):
            folder = os.path.join(kind, split, name)
            os.makedirs(folder)
            for i in range(count):
                values = rng.random((40, 50, 13)) * (0.4 + 0.6 * number)
                path = os.path.join(folder, f"{i}.png")
                if kind == "grey":
                    Image.fromarray((values[..., 0] * 255).astype(np.uint8)).save(path)
                elif kind == "rgba":
                    Image.fromarray((values[..., :4] * 255).astype(np.uint8)).save(path)
                elif kind == "12bit":
                    with open(path, "wb") as file:
                        file.write(png16((values[..., :1] * 4095).astype(np.uint16)))
                else:
                    np.save(os.path.join(folder, f"{i}.npy"), (values * 10_000).astype(np.uint16))
    return kind


def files(kind):
    return sorted(os.path.join(kind, "validation", c, f) for c in "ab" for f in os.listdir(f"{kind}/validation/{c}"))


def predicted(capsys, weights, *inputs):
    capsys.readouterr()
    assert predict_cli.main([str(weights), *inputs, "--format", "jsonl"]) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


CASES = [
    ("grey", 1, None),
    ("rgba", 4, None),
    ("12bit", 3, [0, 4095]),
    ("12bit", 1, "percentile"),
    ("bands", 13, [0, 10_000]),
]


@pytest.mark.parametrize(("kind", "channels", "value_range"), CASES)
def test_a_folder_reaches_the_model(kind, channels, value_range, here, capsys, caplog):
    """Trained, validated, and then predicted and evaluated on what was validated."""
    data(kind)
    options = {"data__root": kind, "data__value_range": value_range, "model__net__args__in_chans": channels}
    assert train(TINY, **options) == 0, capsys.readouterr().err
    assert [record.getMessage() for record in caplog.records if "value_range" in record.getMessage()] == []
    weights = here / "runs" / "a" / "model.safetensors"
    model = mambascope.load(weights)
    assert model.in_chans == channels
    stored = model.description["transform"]
    assert stored.get("value_range") == value_range
    assert len(stored["mean"]) == len(stored["std"]) == channels

    module = ImageDataModule(kind, img_size=32, num_workers=0, batch_size=4, value_range=value_range)
    module.fit_channels(channels)
    images, labels = next(iter(module.val_dataloader()))
    trained, _ = next(iter(module.train_dataloader()))
    assert trained.shape == images.shape == (4, channels, 32, 32)
    # all of the range is used
    mean, std = (torch.tensor(stored[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = images * std + mean
    assert pixels.min() < 0.05
    assert pixels.max() > 0.8
    assert torch.equal(images, torch.stack([model.transform()(file) for file in files(kind)]))
    with torch.no_grad():
        logits = model.forward_scope(images).logits
    rows, err = predicted(capsys, weights, f"{kind}/validation")
    assert "value_range" not in err
    assert [row["class_index"] for row in rows] == logits.argmax(1).tolist()
    assert [row["confidence"] for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-5)
    quick = ["--rounds", "1", "--max-seconds", "0.1", "--timing-images", "4", "--no-figures", "--out"]
    for source in ([], ["--data", kind]):  # the run's own data, and a folder
        out = here / f"eval{len(source)}"
        assert eval_cli.main([str(weights), *source, *quick, str(out)]) == 0, capsys.readouterr().err
        report = json.loads((out / "report.json").read_text())
        assert report["images"] == 4
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("kind", "channels"), [("grey", 1), ("bands", 13)])
def test_other_models_take_their_channels_too(kind, channels, here, capsys):
    data(kind)
    (here / "net.yaml").write_text(
        "model:\n  net:\n    name: resnet50\n    args: "
        f"{{layers: [1, 1, 1, 1], channels: [4, 8, 8, 8], stem_width: 8, in_chans: {channels}}}\n"
    )
    resnet = {key: value for key, value in TINY.items() if not key.startswith(("model.net", "model.full", "config"))}
    options = [f"--{key}={value}" for key, value in resnet.items()]
    configs = ["--config=scopedigits_vim", "--config=net.yaml"]  # a MambaScope's config has options of its loss
    assert main([*configs, *options, f"--data.root={kind}", "--run.name=timm"]) == 0
    assert mambascope.load("runs/timm/model.safetensors").config.in_chans == channels

    options = {"data__root": kind, "data__value_range": "file", "model__net__args__in_chans": channels}
    assert train(EYE, **options) == 0, capsys.readouterr().err
    eye = mambascope.load("runs/eye/model.safetensors")
    assert eye.in_chans == channels
    assert eye.description["transform"]["value_range"] == "file"
    picture = open_image(files(kind)[0], None, channels, "file")
    assert torch.equal(eye.transform()(files(kind)[0]), torch.from_numpy(picture).permute(2, 0, 1) / 255)
    rows, _ = predicted(capsys, "runs/eye/model.safetensors", *files(kind), "--animate", "films")
    assert [row["glimpses"] for row in rows] == [8] * 4
    assert len(os.listdir("films")) > 0


def test_glimpses_of_every_channel_are_cut_alike(here):
    """Five equal channels stay equal through augmentation; RGB pictures are augmented as before."""
    bands = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 50, 1), dtype=np.uint8), 5, 2)
    module = GlimpseImageDataModule("nowhere", length=16, patch_size=8)
    for make in (module.train_transform(), module.val_transform()):
        for seed in range(10):
            torch.manual_seed(seed)
            patches = make(bands).patches
            assert patches.shape[1] == 5 * 8 * 8
            assert torch.equal(patches.view(-1, 5, 64), patches.view(-1, 5, 64)[:, :1].expand(-1, 5, -1))


def test_the_wrong_number_of_channels_is_one_early_line(here, capsys):
    def refused(**options):
        assert train(TINY, **options) in (1, 2)
        assert not (here / "runs" / "a").exists()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    for kind, channels, stored_channels in (("grey", 4, 1), ("rgba", 13, 4), ("bands", 3, 13)):
        line = refused(data__root=data(kind), model__net__args__in_chans=channels)
        assert f"it has {stored_channels} channels, the model takes {channels} " in line
        assert f"--model.net.args.in_chans {stored_channels}" in line
    digits = dict.fromkeys(("data__img_size", "data__value_range"))
    line = refused(data="ScopeDigitsDataModule", model__net__args__in_chans=1, **digits)
    assert "have 3 channels, the model takes 1: set --model.net.args.in_chans 3" in line
    assert "mean must hold one value per channel (3) or one for all, got 2" in refused(
        data__root="grey", data__mean=[0.1, 0.2]
    )
    assert "value_range must be the values that become 0 and 255" in refused(
        data__root="grey", data__value_range=[5, 5]
    )
    arguments = {"data__root": "bands", "model__net__args__in_chans": 13, "model__net__checkpoint": "scopedigits"}
    assert "in_chans is 3 in the file and 13 in the model (--model.net.args.in_chans)" in refused(**arguments)
    assert predict_cli.main(["scopedigits", *files("bands")]) == 2
    assert "it has 13 channels, the model takes 3" in capsys.readouterr().err


def test_narrow_values_are_named_in_training_and_prediction(here, capsys, caplog):
    data("12bit")
    assert train(TINY, data__root="12bit") == 0
    lines = [record.getMessage() for record in caplog.records if "value_range" in record.getMessage()]
    assert len(lines) == 1
    assert "they become 0 to 16 of 0 to 255" in lines[0]
    caplog.clear()
    rows, _ = predicted(capsys, "runs/a/model.safetensors", "12bit")
    assert len([r for r in caplog.records if "value_range" in r.getMessage()]) == 1
    caplog.clear()
    # for weights that know nothing of such files
    changed, _ = predicted(capsys, "runs/a/model.safetensors", "12bit", "--value-range", "0", "4095")
    assert [r for r in caplog.records if "value_range" in r.getMessage()] == []
    assert [row["confidence"] for row in rows] != [row["confidence"] for row in changed]


def test_colour_images_are_read_as_ever(here):
    """Tensors and random choices of 8-bit RGB pictures are those of timm's transform alone."""
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in "ab":
            os.makedirs(f"rgb/{split}/{name}")
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(f"rgb/{split}/{name}/{i}.png")
    module = ImageDataModule("rgb", img_size=32, num_workers=0, batch_size=4)
    assert module.mean == (0.485, 0.456, 0.406)
    assert "value_range" not in {k: v for k, v in module.describe().items() if v is not None}
    picture = Image.open("rgb/train/a/0.png")
    plain = create_transform(
        (3, 32, 32), is_training=True, interpolation="bicubic", scale=(0.08, 1.0), color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel",
    )  # fmt: skip
    for seed in range(5):
        views = []
        for transform in (module.train_transform(), plain):
            import random

            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            views.append(transform(picture))
        assert torch.equal(*views)
    model = mambascope.load("scopedigits")
    assert torch.equal(model.transform()(picture), make_transform(model)(picture))
