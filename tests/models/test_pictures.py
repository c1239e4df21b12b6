"""Values of every kind become the same 8 bits, and images get as many channels as the model takes."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.data import DataError, open_image
from mambascope.data.image_io import survey
from mambascope.models import MambaScope, ScopeConfig, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.picture_files import is_ordinary
from mambascope.models.pictures import check_value_range, to_bytes, to_picture
from mambascope.models.preprocessing import PerBand, create_transform, make_transform, preprocessing

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))  # [48, 64], 0 to 1
EIGHT = (RAMP * 255 + 0.5).astype(np.uint8)


def png16(values, transparent=None):
    """A 16-bit PNG of [H, W, C] values, which Pillow reads but does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    clear = b"" if transparent is None else chunk(b"tRNS", struct.pack(">3H", *transparent))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def numpy_file(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def signed_tiff(values):
    """A TIFF of int16, as computed tomography has it."""
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, "TIFF", tiffinfo={339: 2})
    with Image.open(buffer) as check:
        assert check.mode == "I"
    return buffer.getvalue()


STORED = {
    "12-bit PNG": (png16((RAMP * 4095 + 0.5).astype(np.uint16)[..., None]), (0, 4095)),
    "12-bit colour PNG": (png16(np.stack([RAMP * 4095 + 0.5] * 3, -1).astype(np.uint16)), (0, 4095)),
    "signed CT": (signed_tiff((RAMP * 4095 - 1024).round().astype(np.int16)), (-1024, 3071)),
    "int32": (tiff((RAMP * 10_000 - 5000).round().astype(np.int32)), (-5000, 5000)),
    "Sentinel-2": (tiff((RAMP * 10_000).astype(np.uint16)), (0, 10_000)),
    "reflectance": (tiff((RAMP * 0.3).astype(np.float32)), (0, 0.3)),
    "decibel": (tiff((RAMP * 30 - 30).astype(np.float32)), (-30, 0)),
    "array": (numpy_file(RAMP * 1e6), (0, 1e6)),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_range_of_values_becomes_0_to_255(kind, channels):
    content, values_given = STORED[kind]
    for value_range in (values_given, "file"):
        picture = np.asarray(open_image(io.BytesIO(content), kind, channels, value_range), int)
        assert picture.shape == (48, 64, channels)
        assert np.abs(picture - EIGHT[..., None]).max() <= 1, value_range
    low, high = values_given
    window = (low + (high - low) / 4, low + (high - low) / 2)  # what lies beyond is cut
    picture = np.asarray(open_image(io.BytesIO(content), kind, channels, window), int)[..., 0]
    expected = ((RAMP - 0.25) * 4 * 255).clip(0, 255)
    assert np.abs(picture - expected).max() <= 5


def test_without_a_range_all_that_such_files_can_hold_is_shown():
    for kind in ("12-bit PNG", "12-bit colour PNG"):
        assert np.asarray(open_image(io.BytesIO(STORED[kind][0]))).max() in (15, 16), kind


def test_both_bytes_of_colours_are_read():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (20, 30, 4)).astype(np.uint16)
    for colours in (values[..., :3], values):
        picture = np.asarray(open_image(io.BytesIO(png16(colours)), "a", colours.shape[2], (1000, 1255)))
        expected = to_bytes(colours, (1000, 1255))
        assert np.array_equal(picture, expected)
        assert 0 < (picture == 0).sum() < picture.size
    clear = np.full((4, 4, 3), 700, np.uint16)
    clear[0, 0] = 300
    picture = open_image(io.BytesIO(png16(clear, (700, 700, 700))), "a", 3, (300, 4000))
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((2, 2)) == (255, 255, 255)  # transparent
    opaque = np.full((4, 4, 2), 65535, np.uint16)
    opaque[..., 0] = 257 * 16
    assert open_image(io.BytesIO(png16(opaque)), "a", 3, (0, 257 * 32)).getpixel((0, 0)) == (128, 128, 128)


def test_ranges_hold_for_8_bits_and_transparency_too():
    layer = np.dstack([np.full((4, 4, 3), 20), [[255, 0, 255, 255]] * 4]).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(layer).save(buffer, "PNG")
    for channels in (1, 3):
        picture = np.asarray(open_image(buffer, "a", channels, (0, 40)))
        assert picture[0, 0].tolist() == [128] * channels
        assert picture[0, 1].tolist() == [255] * channels


def test_stretches():
    values = np.array([np.nan, -5.0, 0.0, 5.0, np.inf, -np.inf])
    assert to_bytes(values, "file").tolist() == [0, 0, 128, 255, 255, 0]
    spread = np.concatenate([np.arange(1000.0), [1e9, -1e9]])  # two broken pixels
    assert to_bytes(spread, "percentile")[[0, 500, 999, 1000, 1001]].tolist() == [0, 128, 255, 255, 0]
    for stretch in ("file", "percentile"):
        assert to_bytes(np.full(4, 7), stretch).tolist() == [0] * 4
        assert to_bytes(np.full(4, np.nan), stretch).tolist() == [0] * 4
    assert to_bytes(np.array([True, False])).tolist() == [255, 0]
    with pytest.raises(ValueError, match="images hold numbers, not complex128"):
        to_bytes(np.zeros(3, complex))


@pytest.mark.parametrize("value", ["min", (1, 1), (2, 1), (1,), (0, 1, 2), 5, ("a", "b"), (0, float("inf")), {}])
def test_ranges_that_are_none_are_named(value):
    with pytest.raises(ValueError, match=r"value_range must be the values .* one of file, percentile, got"):
        check_value_range(value)


def test_arrays_have_their_channels_first_or_last():
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 13)).astype(np.uint8)
    for stored in (values, values.transpose(2, 0, 1)):
        assert np.array_equal(open_image(io.BytesIO(numpy_file(stored)), "a", 13), values)
    for stored, channels, stored_channels in (
        (values, 3, 13),
        (values.transpose(2, 0, 1), 3, 13),
        (values[..., 0], 4, 1),
    ):
        option = f"--model.net.args.in_chans {stored_channels}"
        message = f"a: it has {stored_channels} channels, the model takes {channels} .*{option}"
        with pytest.raises(DataError, match=message):
            open_image(io.BytesIO(numpy_file(stored)), "a", channels)
    with pytest.raises(DataError, match=r"must be an array \[H, W\] or \[H, W, channels\], got \[2, 3, 4, 5\]"):
        open_image(io.BytesIO(numpy_file(np.zeros((2, 3, 4, 5)))), "a")
    with pytest.raises(DataError, match="allow_pickle"):
        open_image(io.BytesIO(numpy_file(np.array([None]))), "a")


def test_bands_of_a_tiff(tmp_path):
    import tifffile

    values = np.random.default_rng(0).integers(0, 10_000, (20, 30, 13)).astype(np.uint16)
    expected = to_bytes(values, (0, 10_000))
    ways = {
        "pixel": (values, {"planarconfig": "contig"}),
        "band": (values.transpose(2, 0, 1), {"planarconfig": "separate"}),
        "page": (values.transpose(2, 0, 1), {}),
        "deflate": (values, {"planarconfig": "contig", "compression": "zlib"}),
    }
    for name, (stored, options) in ways.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", stored, photometric="minisblack", **options)
        assert np.array_equal(open_image(tmp_path / f"{name}.tif", None, 13, (0, 10_000)), expected), name
        if name != "page":  # whose first is a grey picture
            with pytest.raises(DataError, match="it has 13 channels, the model takes 3"):
                open_image(tmp_path / f"{name}.tif")
    tifffile.imwrite(tmp_path / "array.tif", values)  # tifffile makes a page of each row
    assert np.array_equal(open_image(tmp_path / "array.tif", None, 13, (0, 10_000)), expected)
    # what Pillow refuses, or makes noise of
    for dtype in (np.float32, np.int16, np.uint16):
        colours = values[..., :3].astype(dtype)
        for planes in ("contig", "separate"):
            stored = colours if planes == "contig" else colours.transpose(2, 0, 1)
            tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes)
            picture = np.asarray(open_image(tmp_path / "a.tif", None, 3, (0, 10_000)))
            assert np.array_equal(picture, expected[..., :3]), (dtype, planes)


def test_without_tifffile_it_is_named(tmp_path, monkeypatch):
    # the header of a TIFF with 13 16-bit bands, one pixel
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 13), (279, 4, 1, 26)]
    head = b"II*\0" + struct.pack("<I", 34) + bytes(26)
    content = head + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="it has 13 channels, the model takes 3"):
        open_image(io.BytesIO(content), "a")
    with pytest.raises(DataError, match="pip install tifffile"):
        open_image(io.BytesIO(content), "a", 13)


def test_grey_and_colour_for_every_model():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    assert to_picture(rgb) is rgb
    assert np.array_equal(to_picture(rgb, 1)[..., 0], np.asarray(rgb.convert("L")))
    assert np.array_equal(to_picture(rgb.convert("L"), 1)[..., 0], np.asarray(rgb.convert("L")))
    assert np.array_equal(to_picture(np.asarray(rgb), 1), to_picture(rgb, 1))
    assert to_picture(rgb.convert("P"), 1).shape == (8, 9, 1)
    assert np.array_equal(to_picture(rgb.convert("RGBA"), 4), np.asarray(rgb.convert("RGBA")))
    assert to_picture(np.zeros((8, 9), np.uint8)).mode == "RGB"


def test_every_channel_is_augmented_alike():
    bands = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 50, 1), dtype=np.uint8), 5, 2)
    options = {"is_training": True, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "re_mode": "pixel"}
    transform = create_transform((5, 32, 32), (0.5,), (0.5,), **options)
    assert isinstance(transform, PerBand)
    views = []
    for seed in range(20):
        torch.manual_seed(seed)
        view = transform(bands)
        assert view.shape == (5, 32, 32)
        assert torch.equal(view, view[:1].expand(5, -1, -1))
        views.append(view)
    assert not torch.equal(views[0], views[1])
    one = create_transform((1, 32, 32), (0.5,), (0.5,), **options)
    torch.manual_seed(3)
    single = one(bands[..., :1])
    torch.manual_seed(3)
    following = torch.rand(1)
    torch.manual_seed(3)
    assert single.shape == (1, 32, 32)
    assert not torch.equal(one(bands[..., :1]), torch.zeros(1))
    assert not torch.equal(torch.rand(1), following)  # the choices are used up


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [32, 224])
def test_one_definition_of_the_preprocessing(tmp_path, channels, side):
    """Files without a stored transform: ``model.transform()`` and the commands prepare images alike."""
    config = ScopeConfig(img_size=side, patch_size=16, embed_dim=16, depth=1, in_chans=channels, num_classes=3)
    save_safetensors(MambaScope(config), tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (side + 50, side + 9, channels), dtype=np.uint8)
    tensor = model.transform()(image)
    assert tensor.shape == (channels, side, side)
    assert torch.equal(tensor, make_transform(model)(to_picture(image, channels)))
    assert preprocessing(model)["crop_pct"] == (1.0 if side == 32 else 0.9)
    colours = (0.5,) * 3 if side == 32 else (0.485, 0.456, 0.406)
    assert preprocessing(model)["mean"] == pytest.approx(colours if channels == 3 else [sum(colours) / 3] * channels)


def test_a_stored_transform_without_a_crop_is_of_whole_images():
    """As the digits' weights have it, whatever their size."""
    model = MambaScope(ScopeConfig(img_size=224, patch_size=16, embed_dim=16, depth=1, num_classes=3))
    model.description = {"transform": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    stored_facts = preprocessing(model)
    assert (stored_facts["mean"], stored_facts["crop_pct"]) == ((0.4,) * 3, 1.0)
    frame = np.zeros((300, 300, 3), np.uint8)
    frame[:3] = 255
    assert model.transform()(frame)[0, 0].max() > 1


def test_the_stored_range_is_applied_by_the_model(tmp_path):
    config = ScopeConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3)
    transform = {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0, "value_range": [0, 4095]}
    save_safetensors(MambaScope(config), tmp_path / "model.safetensors", {"transform": transform})
    model = load_model(tmp_path / "model.safetensors")
    path = tmp_path / "a.png"
    path.write_bytes(STORED["12-bit PNG"][0])
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
        seen = model.transform()(image)
    assert 0.8 < seen.max() <= 1  # 0.05 without the range
    assert torch.equal(seen, model.transform()(path))
    assert torch.equal(seen, make_transform(model)(open_image(path, None, 3, (0, 4095))))


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opened_images_are_turned_as_files_are(tmp_path, kind, channels):
    model = MambaScope(ScopeConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, in_chans=channels))
    picture, path = Image.fromarray(np.tile(EIGHT[..., None], 3)), tmp_path / "a"
    turned = picture.getexif()
    turned[274] = 6
    picture.save(path, kind, exif=turned)
    with Image.open(path) as image:
        seen = model.transform()(image)
    assert torch.equal(seen, model.transform()(path))
    assert seen[0, -1].mean() > seen[0, 0].mean() + 1  # bright at the right before, below now
    assert torch.equal(seen, make_transform(model)(open_image(path, None, channels, None)))  # turned once


def test_a_range_from_a_stranger_is_checked(tmp_path):
    config = ScopeConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=3)
    save_safetensors(MambaScope(config), tmp_path / "a.safetensors", {"transform": {"value_range": [5, 5]}})
    with pytest.raises(ValueError, match="value_range must be low and high, or one of file, percentile, got"):
        load_model(tmp_path / "a.safetensors")


def test_a_narrow_range_is_named_once(caplog, monkeypatch):
    def warned(*kinds, value_range=None, channels=3):
        caplog.clear()
        survey([(io.BytesIO(STORED[kind][0]), kind) for kind in kinds], channels, value_range)
        return [record.getMessage() for record in caplog.records]

    for kind in ("12-bit PNG", "12-bit colour PNG", "signed CT", "int32", "Sentinel-2", "decibel"):
        (line,) = warned(kind, kind)
        assert "value_range" in line, kind
        assert "\n" not in line
        assert warned(kind, value_range=STORED[kind][1]) == [], kind
    assert (
        "the values of 1 images looked at are 0 to 4095; of the range 0 to 65535 they become 0 to 16"
        in warned("12-bit PNG")[0]
    )
    assert warned("reflectance") == []  # 0.3 of 1
    assert len(warned("12-bit PNG", value_range=(0, 65535))) == 1
    assert warned("12-bit PNG", value_range="file") == []
    assert len(warned("12-bit PNG", channels=1)) == 1
    monkeypatch.setitem(STORED, "negative", (numpy_file(RAMP * 2 - 1), (-1, 1)))
    assert "are -1 to 1" in warned("negative")[0]
    assert warned("negative", value_range=(-1, 1)) == []


def test_ordinary_images_are_not_decoded():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    assert is_ordinary(io.BytesIO(buffer.getvalue()[:6000]))  # the rest is missing
    assert not is_ordinary(io.BytesIO(STORED["12-bit colour PNG"][0]))
