"""Images on disk: readers, augmentation that repeats, and clear errors for data that do not fit."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.data import DataError, ImageDataModule
from mambascope.data.export_scopedigits import export
from mambascope.data.seeding import seeded


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return export("cls", tmp_path_factory.mktemp("images") / "set", size=32, train=40, val=20, quiet=True)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "set")


def module(root, **options):
    return ImageDataModule(str(root), **{"img_size": 32, "batch_size": 8, "num_workers": 0, **options})


def batches(loader):
    return [(images, labels.tolist()) for images, labels in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and y == v for (x, y), (u, v) in zip(a, b, strict=True))


def pack(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=folder.name)


def test_folder(original):
    data = module(original, crop_pct=1.0)
    assert data.num_classes == 10
    data.setup()
    assert data.class_names == list("0123456789")
    assert (data.in_chans, data.img_size) == (3, (32, 32))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    seen = batches(data.val_dataloader())
    assert [y for _, labels in seen for y in labels] == [d for d in range(10) for _ in range(2)]
    pixels = np.asarray(Image.open(original / "val/0/000000.png"), np.float32) / 255
    expected = (pixels - np.array(data.mean)) / np.array(data.std)
    np.testing.assert_allclose(seen[0][0][0].permute(1, 2, 0), expected, atol=1e-4)
    assert data.describe()["img_size"] == [32, 32]


def test_augmentation_is_a_function_of_the_key(original):
    first = batches(module(original).train_dataloader())
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002
    again = module(original, num_workers=2).train_dataloader()
    assert same(batches(again), first)
    again.set_epoch(1)
    second = batches(again)
    assert not same(second, first)
    loader = module(original).train_dataloader()
    loader.set_epoch(1)
    assert same(batches(loader), second)
    assert not same(batches(module(original, seed=1).train_dataloader()), first)
    repeated = batches(module(original, num_aug_repeats=2).train_dataloader())
    assert not torch.equal(repeated[0][0][0], repeated[0][0][1]), "the copies of an image are augmented differently"
    assert repeated[0][1][0] == repeated[0][1][1]


def test_strong_augmentation_works_with_every_draw(original):
    """Posterising to 0 bits, which strong RandAugment asks for, once failed in Pillow."""
    data = module(original, auto_augment="rand-m10-n6-mstd0.5-inc1")
    transform = data.train_transform()
    picture = Image.open(original / "train/0/000000.png").convert("RGB")
    for seed in range(60):
        with seeded(seed):
            assert torch.isfinite(transform(picture)).all()
    with pytest.raises(ValueError, match="transform options not accepted"):
        module(original, auto_augment="rand-magnitude9").train_dataloader()


def test_no_aug_and_non_square(original):
    data = module(original, no_aug=True, img_size=(24, 48), drop_last=False)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 24, 48)
    loader = data.train_dataloader()
    one = {tuple(y): x for x, y in batches(loader)}
    loader.set_epoch(0)
    assert all(torch.equal(one[tuple(y)], x) for x, y in batches(loader))


@pytest.mark.parametrize("layout", ["train.tar", "folder of tars"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_tar_files_give_the_same_batches(original, tmp_path, layout, num_workers):
    for split in ("train", "val"):
        if layout == "train.tar":
            pack(original / split, tmp_path / f"{split}.tar")
        else:
            (tmp_path / split).mkdir()
            for name in "0123456789":
                pack(original / split / name, tmp_path / split / f"{name}.tar")
    data = module(tmp_path, num_workers=num_workers)
    reference = module(original)
    for which in (ImageDataModule.train_dataloader, ImageDataModule.val_dataloader):
        assert same(batches(which(data)), batches(which(reference)))
    assert data.class_names == list("0123456789")


def test_tar_opened_before_the_workers_start(original, tmp_path):
    for split in ("train", "val"):
        pack(original / split, tmp_path / f"{split}.tar")
    data = module(tmp_path, num_workers=2)
    data.setup()
    with data._open("val").reader[0][0] as file:  # the parent holds the archive open
        file.read()
    assert same(batches(data.val_dataloader()), batches(module(original).val_dataloader()))


def test_validation_classes_are_matched_by_name(folder):
    """A class that is missing from the validation images must not shift the others."""
    shutil.rmtree(folder / "val" / "0")
    data = module(folder)
    labels = [y for _, labels in batches(data.val_dataloader()) for y in labels]
    assert labels == [d for d in range(1, 10) for _ in range(2)]
    (folder / "train" / "9").rename(folder / "train" / "ten")
    with pytest.raises(DataError, match=r"classes in .*val that the training data do not have: 9"):
        module(folder).setup()


def test_class_map_orders_the_classes(folder, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("9876543210"))
    for class_map in (str(tmp_path / "names.txt"), list("9876543210")):
        data = module(folder, class_map=class_map)
        assert data.class_names == list("9876543210")
        assert batches(data.val_dataloader())[0][1] == [9, 9, 8, 8, 7, 7, 6, 6]
    with pytest.raises(DataError, match="that class_map does not name: 8, 9"):
        module(folder, class_map=list("01234567")).setup()


def test_validation_images_alone(folder):
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "val" / "0")
    data = module(folder)
    data.setup("validate")
    assert data.class_names == list("123456789")
    assert len(batches(data.val_dataloader())) == 3
    named = module(folder, class_map=list("0123456789"))
    named.setup("test")
    assert named.num_classes == 10
    assert batches(named.test_dataloader())[0][1] == [1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(DataError, match="has no train"):
        module(folder).setup("fit")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "data folder .*set does not exist"),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), "data folder .*set is a file"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), "has no train or training; it is empty"),
        (lambda f: shutil.rmtree(f / "train"), "has no train or training; it holds README.txt, scopedigits.json, val"),
        (lambda f: shutil.rmtree(f / "val"), "has no validation or val or valid.*; it holds .*train"),
        (
            lambda f: (shutil.rmtree(f / "train"), (f / "train").mkdir()),
            "no images in .*train; it must hold one folder",
        ),
        (lambda f: [p.unlink() for p in (f / "train").rglob("*.png")], "its class folders .0, 1, 2, .*. hold none"),
        (lambda f: [p.unlink() for p in (f / "train/3").iterdir()], "class folders without images in .*train: 3; add"),
        (lambda f: (f / "train/a.png").write_bytes(b"x"), "must lie in one folder per class, found a.png beside"),
        (lambda f: (shutil.rmtree(f / "val"), (f / "val.tar").write_bytes(b"no tar")), "cannot read .*val.tar: "),
    ],
)
def test_missing_data(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        module(folder).setup()
    assert "\n" not in str(caught.value)


def test_more_classes_than_the_model(folder):
    with pytest.raises(DataError, match=r"have 10 classes, but num_classes is 7 .*the first class too many is '7'"):
        module(folder, num_classes=7).setup()
    assert module(folder, num_classes=12).num_classes == 12
    assert module(folder, num_classes=12).class_names[9:] == ["9", "10", "11"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_named_or_skipped(folder, caplog, num_workers):
    (folder / "val/4/notes.jpg").write_text("no image")
    damaged = folder / "train/2" / os.listdir(folder / "train/2")[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    strict = module(folder, num_workers=num_workers)
    for loader, name in ((strict.train_dataloader(), str(damaged)), (strict.val_dataloader(), "notes.jpg")):
        with pytest.raises(DataError) as caught:
            list(loader)
        message = str(caught.value)
        assert message.startswith("cannot read image ")
        assert name in message
        assert "skip_bad_files" in message
        assert "\n" not in message
        assert "Traceback" not in message
    caplog.clear()
    lenient = module(folder, num_workers=num_workers, skip_bad_files=True)
    train, val = lenient.train_dataloader(), lenient.val_dataloader()
    assert [len(labels) for _, labels in batches(train)] == [8] * 5, "training batches keep their size"
    labels = [y for _, labels in batches(val) for y in labels]
    assert labels == [d for d in range(10) for _ in range(2)], "evaluation leaves the file out"
    assert (train.skipped, val.skipped) == (1, 1)
    train.close()
    val.close()
    assert caplog.text.count("skipped: cannot read image") == 2
    assert "1 unreadable files skipped" in caplog.text


def test_only_bad_files(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_text("x")
    with pytest.raises(DataError, match="20 unreadable images in a row; the first: cannot read image"):
        list(module(folder, skip_bad_files=True).train_dataloader())


def test_file_removed_after_the_scan(folder):
    data = module(folder)
    loader = data.val_dataloader()
    (folder / "val/0/000000.png").unlink()
    with pytest.raises(DataError, match=r"val/0/000000\.png: No such file or directory"):
        list(loader)


def test_labels_out_of_range(folder):
    data = module(folder, num_classes=10)
    data.setup()
    rows = data._open("train")
    rows.reader.samples = [(path, label - 3) for path, label in rows.reader.samples]
    with pytest.raises(DataError, match=r"label -\d of .*png is outside 0..9"):
        list(data.train_dataloader())


def test_unusual_images_train(folder):
    kinds = {
        "grey": Image.new("L", (20, 20), 9),
        "cmyk": Image.new("CMYK", (20, 20)),
        "alpha": Image.new("RGBA", (20, 20)),
        "palette": Image.new("P", (20, 20)),
        "bits": Image.new("1", (20, 20)),
        "deep": Image.fromarray(np.full((20, 20), 30000, np.uint16)),
        "dot": Image.new("RGB", (1, 1)),
        "wide": Image.new("RGB", (500, 1)),
    }
    for name, image in kinds.items():
        image.save(folder / "train/0" / f"{name}{'.jpg' if name == 'cmyk' else '.png'}")
        image.save(folder / "val/0" / f"{name}{'.jpg' if name == 'cmyk' else '.png'}")
    data = module(folder)
    assert len(batches(data.train_dataloader())) == 6
    assert sum(len(labels) for _, labels in batches(data.val_dataloader())) == 28
    for images, _ in data.val_dataloader():
        assert torch.isfinite(images).all()


def test_killed_worker_is_one_line(original):
    """In a process of its own, because PyTorch raises the error wherever the main thread is."""
    code = f"""
import os, signal, time
from mambascope.data import ImageDataModule
from mambascope.data.errors import DataError, worker_failure
loader = ImageDataModule({str(original)!r}, img_size=32, batch_size=1, num_workers=1).train_dataloader()
try:
    for number, batch in enumerate(loader):
        if number == 0:
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(20)
except RuntimeError as error:
    raise SystemExit(str(worker_failure(error)))
except DataError as error:
    raise SystemExit(str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"DataLoader worker \(pid.*num_workers.*\n", result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"val_batch_size": -2}, "val_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_aug_repeats": -1}, "num_aug_repeats must not"),
        ({"hflip": 1.5}, r"hflip must be in \[0, 1\]"),
        ({"crop_pct": 0.0}, r"crop_pct must be in \(0, 1\]"),
        ({"img_size": 0}, "img_size must be positive"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_options(original, options, message):
    with pytest.raises(ValueError, match=message):
        module(original, **options)


def test_batch_larger_than_the_data(original):
    with pytest.raises(DataError, match="40 images are fewer than one batch"):
        module(original, batch_size=64).train_dataloader()
    assert len(module(original, batch_size=64, drop_last=False).train_dataloader()) == 1


def test_unknown_reader(tmp_path):
    with pytest.raises(DataError, match="cannot open data set torch/flowers"):
        module(tmp_path, dataset="torch/flowers", num_classes=3).setup()


def shards(original, root, split, count):
    """Packs a split into WebDataset shards, images of all classes in each."""
    files = sorted((original / split).rglob("*.png"), key=lambda p: p.name)
    for shard in range(count):
        with tarfile.open(root / f"{split}-{shard:02d}.tar", "w") as tar:
            for path in files[shard::count]:
                tar.add(path, arcname=path.name)
                label = path.with_suffix(".cls").name
                (root / label).write_text(path.parent.name)
                tar.add(root / label, arcname=label)
                (root / label).unlink()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_webdataset(original, tmp_path, num_workers):
    pytest.importorskip("webdataset")
    for split, count in (("train", 4), ("val", 2)):
        shards(original, tmp_path, split, count)

    def data():
        return module(
            tmp_path,
            dataset="wds/digits",
            train_split="train-{00..03}.tar|40",
            val_split="val-{00..01}.tar|20",
            num_classes=10,
            num_workers=num_workers,
        )

    with pytest.raises(DataError, match="does not say how many classes"):
        _ = module(tmp_path, dataset="wds/digits", train_split="train-{00..03}.tar|40").num_classes
    loader = data().train_dataloader()
    first = batches(loader)
    assert len(first) == len(loader)
    loader.set_epoch(1)
    second = batches(loader)
    assert not same(first, second)
    state = None
    fresh = data().train_dataloader()
    fresh.set_epoch(1)
    for number, _ in enumerate(fresh):
        if number == 2:
            state = fresh.state_dict()
            break
    assert state is not None
    resumed = data().train_dataloader()
    resumed.load_state_dict(state)
    assert same(batches(resumed), second[3:])
    labels = [y for _, labels in batches(data().val_dataloader()) for y in labels]
    assert sorted(labels) == [d for d in range(10) for _ in range(2)]


def test_hugging_face_datasets(original, tmp_path):
    pytest.importorskip("datasets")
    for split in ("train", "val"):
        shutil.copytree(original / split, tmp_path / "digits" / split)
    data = module(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'digits'}", num_workers=2)
    assert data.num_classes == 10
    data.setup()
    seen = batches(data.train_dataloader())
    assert len(seen) == 5
    assert same(batches(data.train_dataloader()), seen)
    assert [y for _, labels in batches(data.val_dataloader()) for y in labels] == [d for d in range(10) for _ in "ab"]
    assert data.class_names == list("0123456789")
