"""Folders as users have them: which files are images, which class they are, and what is said about the others."""

import os
import random
import subprocess
import tarfile
import unicodedata

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from mambascope.data import DataError, ImageDataModule, open_image
from mambascope.data.files import LeftOut, find_images, image_endings, picture_paths, walk
from mambascope.data.image_io import BadImageError
from mambascope.data.readers import open_folder
from mambascope.data.rows import open_rows

PICTURE = Image.new("RGB", (8, 8), (200, 90, 10))
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
assert COMPOSED != DECOMPOSED


def put(root, *names):
    """Images of these names below `root`; a PNG where Pillow cannot write what the ending says."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions().get(path.suffix.lower())
        PICTURE.save(path, format=kind if kind in Image.SAVE else "PNG")


def module(root, **options):
    return ImageDataModule(str(root), **{"img_size": 8, "batch_size": 2, "num_workers": 0, **options})


def labels(loader):
    return [y for _, batch in loader for y in batch.tolist()]


def pack(folder, path, top=""):
    with tarfile.open(path, "w") as tar:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            tar.add(file, arcname=os.path.join(top, file.relative_to(folder)))


def test_files_and_classes_are_in_the_order_of_timm(tmp_path):
    """Runs that were started with timm's own list go on with ours."""
    drawn = random.Random(0)
    for name in ("2", "10", "a-b", "a", "a b", "B1", "b.2", "n0144"):
        put(tmp_path, *(f"{name}/{drawn.choice(['x', 'X', 'img_', ''])}{drawn.randrange(10**6)}.png" for _ in range(6)))
    rows, classes = open_folder(tmp_path)
    expected = ReaderImageFolder(str(tmp_path))
    assert (rows.reader.samples, classes) == (expected.samples, expected.class_to_idx)
    assert rows[0][0].size == (8, 8)


def test_the_class_is_the_first_folder_below_the_split(tmp_path):
    put(tmp_path / "train", "left/ok/1.png", "right/ok/1.png", "right/bad/2.png", "right/3.png")
    put(tmp_path / "val", "right/ok/1.png", "left/deep/er/1.png")
    data = module(tmp_path)
    assert data.class_names == ["left", "right"]
    data.setup()
    assert [label for _, label in data._open("train").reader.samples] == [0, 1, 1, 1]
    assert labels(data.val_dataloader()) == [0, 1]


def written(kind, path):
    """Whether Pillow can write the format, in whatever mode it has."""
    for mode in ("RGB", "L", "P", "1") if kind in Image.SAVE else ():
        try:
            PICTURE.convert(mode).save(path, format=kind)
            return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def test_every_ending_that_can_be_read_and_no_other(tmp_path):
    extensions = Image.registered_extensions()
    seen = {extensions[ending] for ending in image_endings() if written(extensions[ending], tmp_path / f"a{ending}")}
    assert {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"} <= seen
    for path in tmp_path.iterdir():
        assert open_image(path).mode == "RGB", path
    assert {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".tif", ".tiff", ".mpo", ".webp", ".dds"} <= image_endings()
    others = {".h5", ".hdf", ".mpg", ".grib", ".bufr", ".wmf", ".emf", ".eps", ".ps", ".pdf", ".pcd", ".npy", ".txt"}
    assert not others & image_endings()


def test_postscript_is_not_run(tmp_path):
    """Ghostscript would be started for it, whatever the file is called."""
    PICTURE.save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="not an image, or of an unknown format"):
        open_image(tmp_path / "a.png")


@pytest.fixture
def mess(tmp_path):
    """Nine images in two classes, beside what machines and other programs leave there."""
    for split in ("train", "val"):
        put(tmp_path / split, "ant/1.webp", "ant/2.TIF", "ant/3.jfif", "ant/4.bmp", "ant/5.PNG", "ant/6.gif")
        put(tmp_path / split, "bee/1.jpg", "bee/2.JPEG", "bee/deep/3.png")
        put(tmp_path / split, "bee/._2.png", ".ipynb_checkpoints/1-checkpoint.png", "bee/.ipynb_checkpoints/2.png")
        put(tmp_path / split, "__MACOSX/bee/1.png", "ant/@eaDir/1.png", "bee/.hidden.png")
        for name in ("features.h5", "clip.mpg", "x.grib", "x.wmf", "x.EPS", "README", "bee/cloud.pcd"):
            (tmp_path / split / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    return tmp_path


@pytest.mark.parametrize("archived", [False, True])
def test_what_is_left_out_is_counted_in_one_line(mess, archived, tmp_path_factory, caplog):
    if archived:
        root = tmp_path_factory.mktemp("tars")
        for split in ("train", "val"):
            pack(mess / split, root / f"{split}.tar", split)
    else:
        root = mess
    data = module(root)
    data.setup()
    assert data.class_names == ["ant", "bee"]
    assert labels(data.val_dataloader()) == [0] * 6 + [1] * 3
    assert len(labels(data.train_dataloader())) == 8  # of nine, in whole batches
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "one for each split"
    assert "7 files of no image format (1 without ending, 1 .eps, 1 .grib, 1 .h5, 1 .mpg, 1 .pcd, 1 .wmf)" in lines[0]
    assert "6 hidden names" in lines[0]
    assert str(root / "train") in lines[0]


def test_prediction_sees_the_same_images(mess):
    left_out = LeftOut()
    matches = list(find_images([str(mess / "val")], left_out))
    reader = open_folder(mess / "val")[0].reader
    assert sorted(str(source.path) for source in matches) == sorted(path for path, _ in reader.samples)
    assert left_out.endings.total() == 7
    assert left_out.hidden == 6


def test_hidden_folders_are_no_reason_to_look_for_class_folders_among_archives(tmp_path):
    for name in ("ant", "bee"):
        put(tmp_path / "images", f"{name}/1.png")
        pack(tmp_path / "images" / name, tmp_path / f"{name}.tar")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "._ant.tar").write_bytes(b"x")
    [path.unlink() for path in (tmp_path / "images").rglob("*.png")]
    (tmp_path / "images").rename(tmp_path / "__MACOSX")
    assert open_folder(tmp_path)[1] == {"ant": 0, "bee": 1}


@pytest.mark.parametrize("top", ["", "train", "./data/train"])
def test_classes_in_archives(tmp_path, top):
    """As in folders, whatever folder was packed; archives of one class each may have folders of their own."""
    put(tmp_path / "a", "left/ok/1.png", "right/ok/1.png")
    pack(tmp_path / "a", tmp_path / "a.tar", top)
    assert open_folder(tmp_path / "a.tar")[1] == {"left": 0, "right": 1}
    (tmp_path / "each").mkdir()
    for name in ("n01", "n02"):
        put(tmp_path / name, "images/1.png")
        pack(tmp_path / name, tmp_path / "each" / f"{name}.tar", top)
    rows, classes = open_folder(tmp_path / "each")
    assert classes == {"n01": 0, "n02": 1}
    assert sorted(rows.reader.targets) == [0, 1]
    pack(tmp_path / "each", tmp_path / "nested.tar", top)  # ImageNet as it is downloaded
    rows, classes = open_folder(tmp_path / "nested.tar")
    assert classes == {"n01": 0, "n02": 1}
    assert rows[1][0].size == (8, 8)


def test_archives_of_mixed_classes_and_of_one_class(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in "12":
        put(tmp_path / shard, "cat/1.png", "dog/1.png")
        pack(tmp_path / shard, tmp_path / "shards" / f"{shard}.tar")
    assert open_folder(tmp_path / "shards")[1] == {"cat": 0, "dog": 1}
    put(tmp_path / "one", "cat/1.png")
    pack(tmp_path / "one", tmp_path / "one.tar", "val")
    assert open_folder(tmp_path / "one.tar")[1] == {"cat": 0}
    put(tmp_path / "loose", "cat/1.png", "2.png")
    pack(tmp_path / "loose", tmp_path / "loose.tar")
    with pytest.raises(DataError, match=r"in one folder per class, found 1 beside them"):
        open_folder(tmp_path / "loose.tar")


def test_a_name_has_one_spelling(tmp_path):
    """macOS decomposes accents; the folders of the splits, class maps and labels then differ byte by byte."""
    put(tmp_path / "train", f"{DECOMPOSED}/1.png", "zoo/1.png")
    put(tmp_path / "val", f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png", "zoo/1.png")
    data = module(tmp_path)
    data.setup()
    assert data.class_names == [COMPOSED, "zoo"]  # in the order of the folders on the disk, as before
    assert labels(data.val_dataloader()) == [0, 0, 1]
    for names in ([COMPOSED, "zoo"], [DECOMPOSED, "zoo"]):
        mapped = module(tmp_path, class_map=names[::-1])
        assert labels(mapped.val_dataloader()) == [1, 1, 0]


def test_class_maps_from_text_files(tmp_path):
    put(tmp_path / "val", "ant/1.png", "bee/1.png")
    (tmp_path / "names.txt").write_bytes("\ufeffbee\r\nant\r\n\r\n".encode())  # a byte order mark, an empty line
    for spelling in (str(tmp_path / "names.txt"), "names.txt"):
        data = module(tmp_path, class_map=spelling)
        data.setup("validate")
        assert data.class_names == ["bee", "ant"]
    (tmp_path / "names.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(DataError, match="class_map names twice: ant"):
        module(tmp_path, class_map="names.txt").setup("validate")
    (tmp_path / "names.pkl").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(DataError, match="no text file with one class name per line"):
        module(tmp_path, class_map="names.pkl").setup("validate")
    with pytest.raises(DataError, match=r"class_map missing.txt does not exist"):
        module(tmp_path, class_map="missing.txt").setup("validate")


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The layout that is downloaded: images of a class in a folder of its own, those of validation unsorted."""
    put(tmp_path / "train", "n01/images/n01_0.JPEG", "n01/images/n01_1.JPEG", "n02/images/n02_0.JPEG")
    put(tmp_path / "val/images", "val_0.JPEG", "val_1.JPEG", "val_2.JPEG")
    for name in ("n01", "n02"):
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t9\t9\n")
    lines = [f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet_as_downloaded(tiny_imagenet):
    """The message says how to sort the validation images; then training sees what it should."""
    data = module(tiny_imagenet)
    assert data.num_classes == 2
    with pytest.raises(DataError, match=r"val/images are not sorted: .*val must hold one folder per class") as caught:
        data.setup()
    command = str(caught.value).partition("sort them: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    data = module(tiny_imagenet, num_classes=2)
    data.setup()
    assert data.class_names == ["n01", "n02"]
    assert [os.path.basename(path) for path, _ in data._open("val").reader.samples] == [
        "val_1.JPEG",
        "val_0.JPEG",
        "val_2.JPEG",
    ]
    assert labels(data.val_dataloader()) == [0, 1, 1]


@pytest.mark.parametrize("labels", [["n01", "n02"], None])
def test_unsorted_images_are_not_evaluated_as_the_first_class(tiny_imagenet, labels):
    class Model:
        num_classes = 2

    Model.labels = labels
    with pytest.raises(DataError, match=r"val/images are not sorted: .*sort them: "):
        open_rows(Model(), str(tiny_imagenet), "validation")


@pytest.mark.parametrize("num_classes", [None, 200])
def test_one_class_is_nothing_to_train_on(tmp_path, num_classes):
    put(tmp_path / "train/images", "1.png", "2.png")
    put(tmp_path / "val/images", "1.png")
    with pytest.raises(DataError, match=r"the images in .*train/images are not sorted: .*one folder per class"):
        module(tmp_path, num_classes=num_classes).setup()


def test_class_folders_one_level_deeper(tmp_path):
    put(tmp_path, "train/images/ant/1.png", "train/images/bee/1.png", "val/ant/1.png", "val/bee/1.png")
    with pytest.raises(DataError, match=r"if those are below images, name the split train/images$"):
        module(tmp_path).setup()
    data = module(tmp_path, train_split="train/images")
    data.setup()
    assert data.class_names == ["ant", "bee"]


def test_images_without_folders(tmp_path):
    put(tmp_path / "train", "ant/1.png", "bee/1.png")
    put(tmp_path / "val", "ILSVRC2012_val_1.JPEG", "ILSVRC2012_val_2.JPEG")
    with pytest.raises(DataError, match=r"the images in .*val are not sorted"):
        module(tmp_path).setup()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "ant").mkdir()
    (tmp_path / "only" / "ant" / "scan.dcm").write_bytes(b"x")
    with pytest.raises(DataError, match=r"class folders \(ant\) hold none; left out: 1 file of no image .*1 \.dcm"):
        open_folder(tmp_path / "only")


def test_names_that_sort_alike_and_odd_digits(tmp_path):
    """`Cat` and `cat`, `1` and `01` are different classes, in the same order in every process; `²` is no number."""
    put(tmp_path, "cat/1.png", "Cat/1.png", "1/1.png", "01/1.png", "m²/3²4.png")
    rows, classes = open_folder(tmp_path)
    assert list(classes) == ["01", "1", "Cat", "cat", "m²"]
    assert [label for _, label in rows.reader.samples] == [0, 1, 2, 3, 4]


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere", "1.png")
    put(tmp_path / "set", "ant/1.png", "bee/1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "ant" / "up").symlink_to("..")
    (tmp_path / "set" / "bee" / "other").symlink_to(tmp_path / "set")
    left_out = LeftOut()
    matches = [os.path.relpath(path, tmp_path / "set") for path in walk(str(tmp_path / "set"), left_out)]
    assert matches == ["ant/1.png", "bee/1.png", "cat/1.png"]
    assert "2 links back to a folder above" in str(left_out)


def test_pictures_have_names_of_their_own(tmp_path):
    put(tmp_path, "A/a.png", "B/a.png", "B/a.jpg", "B/sub/a.png", "sheet.png")
    names = [source.name for source in find_images([str(tmp_path / "A"), str(tmp_path / "B")])]
    assert names == ["A/a.png", "B/a.jpg", "B/a.png", "B/sub/a.png"]
    assert [source.name for source in find_images([str(tmp_path / "B")])] == ["a.jpg", "a.png", "sub/a.png"]
    files = [str(tmp_path / name) for name in ("B/a.png", "B/a.jpg")]
    assert [source.name for source in find_images(files)] == ["a.png", "a.jpg"]
    sources = list(find_images([str(tmp_path)]))
    paths = [str(path) for path in picture_paths(sources, tmp_path.parent / "out", ["sheet"])]
    assert [os.path.relpath(path, tmp_path.parent / "out") for path in paths] == [
        "A/a.png",
        "B/a.png",
        "B/a-2.png",
        "B/sub/a.png",
        "sheet-2.png",
    ]
    with pytest.raises(ValueError, match=r"the picture would replace .*A/a.png"):
        picture_paths(sources, tmp_path)
