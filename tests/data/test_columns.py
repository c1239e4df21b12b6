"""Data sets of Hugging Face whose columns have names of their own, from files as users have them."""

import pytest
from PIL import Image

from mambascope.data import DataError, GlimpseImageDataModule, ImageDataModule
from mambascope.data.rows import open_rows

datasets = pytest.importorskip("datasets")
FINE, COARSE = ["ant", "bee", "cat"], ["insect", "mammal"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def saved(root, columns):
    """Parquet files of a training and a validation split, with these columns: name to (feature, six values)."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    table = datasets.Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)
    for split in ("train", "validation"):
        table.to_parquet(root / "set" / f"{split}.parquet")
    return root


PICTURES = [Image.new("RGB", (9, 9), (40 * i, 9, 9)) for i in range(6)]
IMG = (datasets.Image(), PICTURES)
FINE_LABEL = (datasets.ClassLabel(names=FINE), [0, 1, 2, 0, 1, 2])
COARSE_LABEL = (datasets.ClassLabel(names=COARSE), [0, 0, 1, 0, 0, 1])
INTEGERS = (datasets.Value("int64"), [0, 1, 2, 0, 1, 2])
WORDS = (datasets.Value("string"), ["ant", "bee", "cat"] * 2)


def module(root, reader="hfds", kind=ImageDataModule, **options):
    size = {"img_size": 8} if kind is ImageDataModule else {"length": 4, "patch_size": 4}
    settings = {"batch_size": 2, "num_workers": 0, "train_split": "train", "val_split": "validation", **size, **options}
    return kind(str(root / "cache"), f"{reader}/{root / 'set'}", **settings)


def labels(data):
    return [y for _, batch in data.val_dataloader() for y in batch.tolist()]


def test_columns_are_recognised_by_what_they_hold(tmp_path):
    """As in CIFAR-10 and Fashion-MNIST copies: one column of images, one of classes, other ones beside them."""
    saved(tmp_path, {"id": INTEGERS, "img": IMG, "fine_label": FINE_LABEL, "note": WORDS})
    data = module(tmp_path)
    data.setup()
    assert data.class_names == FINE
    assert labels(data) == [0, 1, 2, 0, 1, 2]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 8, 8)
    assert labels(module(tmp_path, kind=GlimpseImageDataModule)) == [0, 1, 2, 0, 1, 2]


def test_streams_too(tmp_path):
    saved(tmp_path, {"img": IMG, "fine_label": FINE_LABEL})
    data = module(tmp_path, "hfids", num_classes=3, num_samples=6)
    assert sorted(y for _, batch in data.train_dataloader() for y in batch.tolist()) == [0, 0, 1, 1, 2, 2]


def test_columns_that_could_be_either_are_listed(tmp_path):
    """CIFAR-100."""
    saved(tmp_path, {"img": IMG, "fine_label": FINE_LABEL, "coarse_label": COARSE_LABEL})
    with pytest.raises(DataError) as caught:
        module(tmp_path).setup()
    assert "columns img (Image), fine_label (3 classes), coarse_label (2 classes)" in str(caught.value)
    assert "Pass target_key" in str(caught.value)
    assert module(tmp_path, target_key="coarse_label").class_names == COARSE
    data = module(tmp_path, target_key="fine_label", kind=GlimpseImageDataModule)
    assert (data.num_classes, labels(data)) == (3, [0, 1, 2, 0, 1, 2])
    with pytest.raises(DataError, match=r"columns img \(Image\).*'label' is none of them"):
        module(tmp_path, target_key="label").setup()


def test_columns_without_types_need_a_word(tmp_path):
    """Files that pandas wrote know neither images nor classes."""
    bytes_of = datasets.Features({"x": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})["x"]
    encoded = [datasets.Image().encode_example(picture) for picture in PICTURES]
    saved(tmp_path, {"photo": (bytes_of, encoded), "kind": INTEGERS})
    with pytest.raises(
        DataError, match=r"columns photo \(.*\), kind \(int64\); which of them is the image\? Pass input"
    ):
        module(tmp_path).setup()
    data = module(tmp_path, input_key="photo", target_key="kind", num_classes=3)
    assert labels(data) == [0, 1, 2, 0, 1, 2]


def test_labels_that_are_words(tmp_path):
    saved(tmp_path, {"image": IMG, "label": WORDS})
    with pytest.raises(DataError, match=r"column label of data set .* holds names: pass class_map"):
        module(tmp_path).setup()
    data = module(tmp_path, class_map=["cat", "bee", "ant"])
    assert (data.class_names, labels(data)) == (["cat", "bee", "ant"], [2, 1, 0, 2, 1, 0])
    with pytest.raises(DataError, match="label 'cat' of row 2 is not in class_map"):
        labels(module(tmp_path, class_map=["ant", "bee"]))


def test_the_usual_names_come_first(tmp_path):
    saved(tmp_path, {"thumbnail": IMG, "image": IMG, "label": FINE_LABEL, "coarse": COARSE_LABEL})
    data = module(tmp_path)
    assert (data.class_names, labels(data)) == (FINE, [0, 1, 2, 0, 1, 2])


def test_evaluation_takes_the_columns_and_matches_classes_by_name(tmp_path):
    saved(tmp_path, {"img": IMG, "fine_label": FINE_LABEL, "coarse_label": COARSE_LABEL})

    class Model:
        labels, num_classes = FINE[::-1], 3

    name = f"hfds/{tmp_path / 'set'}"
    with pytest.raises(DataError, match="Pass target_key"):
        open_rows(Model(), name, "validation")
    rows, _ = open_rows(Model(), name, "validation", target_key="fine_label")
    assert [int(rows.reader[i][1]) for i in range(6)] == [2, 1, 0, 2, 1, 0]


def test_columns_of_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="input_key and target_key name columns; data set 'folder' has none"):
        ImageDataModule(str(tmp_path), input_key="img")
