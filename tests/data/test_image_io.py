"""Every kind of image file works, and broken ones are named."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from mambascope.data import DataError, open_image

GRADIENT = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # [48, 64]


def colour():
    return Image.fromarray(np.stack([GRADIENT, GRADIENT[:, ::-1], np.full_like(GRADIENT, 90)], -1))


def close(image, expected, tolerance=3):
    assert image.mode == "RGB"
    assert image.size == expected.size
    difference = np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int))
    assert difference.max() <= tolerance, difference.max()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tiff", "gif", "ppm"])
def test_colour_formats(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    colour().save(
        path, **({"lossless": True} if extension == "webp" else {"quality": 98} if extension == "jpg" else {})
    )
    close(open_image(path), colour(), {"jpg": 20, "gif": 30}.get(extension, 0))
    with open(path, "rb") as file:
        close(open_image(file), colour(), 30)
    close(open_image(io.BytesIO(path.read_bytes())), colour(), 30)
    os.remove(path)  # nothing keeps the file open


def test_grey_one_bit_and_palette(tmp_path):
    grey = Image.fromarray(GRADIENT)
    for name, image in {
        "L": grey,
        "1": grey.convert("1"),
        "P": colour().convert("P", palette=Image.Palette.ADAPTIVE),
    }.items():
        image.save(tmp_path / f"{name}.png")
        close(open_image(tmp_path / f"{name}.png"), image, 0)


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, extension):
    values = GRADIENT.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / f"a.{extension}")
    close(open_image(tmp_path / f"a.{extension}"), Image.fromarray(GRADIENT), 0)
    dark = np.full((4, 4), 200, np.uint16)  # a dark 16-bit image stays dark
    Image.fromarray(dark).save(tmp_path / f"b.{extension}")
    assert np.asarray(open_image(tmp_path / f"b.{extension}")).max() <= 1


def test_32_bit_and_float_tiff(tmp_path):
    Image.fromarray(GRADIENT.astype(np.int32) * 257).save(tmp_path / "i.tiff")
    close(open_image(tmp_path / "i.tiff"), Image.fromarray(GRADIENT), 0)
    for scale, name in ((1 / 255, "unit"), (1.0, "byte"), (40.0, "large")):
        values = np.concatenate([GRADIENT, np.full((1, 64), 255, np.uint8)]).astype(np.float32) * scale
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        close(open_image(tmp_path / f"{name}.tiff"), Image.fromarray((values / scale).astype(np.uint8)), 1)
    broken = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(broken).save(tmp_path / "nan.tiff")
    assert np.asarray(open_image(tmp_path / "nan.tiff")).max() == 0


def test_cmyk_and_lab(tmp_path):
    colour().convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    close(open_image(tmp_path / "a.jpg"), colour(), 25)
    colour().convert("YCbCr").save(tmp_path / "y.jpg", quality=98)
    close(open_image(tmp_path / "y.jpg"), colour(), 25)
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "lab.tiff")
    assert np.asarray(open_image(tmp_path / "lab.tiff")).min() > 245  # L* = 100 is white


def test_transparency_shows_white(tmp_path):
    clear = Image.new("RGBA", (6, 6), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    clear.save(tmp_path / "a.png")
    grey = Image.new("LA", (6, 6), (10, 0))
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (6, 6), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("RGB", (6, 6), (1, 2, 3)).save(tmp_path / "trns.png", transparency=(1, 2, 3))
    for name in ("a", "la", "p", "trns"):
        image = open_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB"
        assert image.getpixel((5, 5)) == (255, 255, 255), name
    pixels = open_image(tmp_path / "a.png")
    assert pixels.getpixel((0, 0)) == (255, 0, 0)
    assert pixels.getpixel((1, 0)) == (255, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = colour()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores an upright image that way
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    close(open_image(tmp_path / "a.png"), upright, 0)


def test_broken_exif_is_ignored(tmp_path):
    colour().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00garbage", quality=98)
    close(open_image(tmp_path / "a.jpg"), colour(), 20)


def test_first_frame_of_animations(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / name).getpixel((4, 4)) == (200, 0, 0), name


def test_one_pixel_and_extreme_shapes(tmp_path):
    for size in ((1, 1), (1, 3000), (3000, 1)):
        Image.new("L", size, 7).save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").size == size
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (7, 7, 7)


def test_very_large_images_are_reduced_without_a_warning(tmp_path):
    Image.new("L", (14000, 13000), 100).save(tmp_path / "big.png", compress_level=1)  # 182 million: Pillow refuses
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(tmp_path / "big.png")
    assert image.size == (7000, 6500)
    assert image.getpixel((9, 9)) == (100, 100, 100)
    assert before == Image.MAX_IMAGE_PIXELS


def test_large_jpegs_decode_at_a_fraction(tmp_path):
    Image.new("RGB", (9000, 8000), (10, 200, 10)).save(tmp_path / "big.jpg")
    image = open_image(tmp_path / "big.jpg")
    assert image.size == (4500, 4000)
    assert abs(image.getpixel((5, 5))[1] - 200) < 4


def truncated(extension):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, extension)
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"this is a text", "not an image"),
        (truncated("PNG"), "truncated"),
        (truncated("JPEG"), "truncated"),
        (truncated("GIF"), ""),
        (truncated("WEBP"), ""),
        (truncated("TIFF"), ""),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, ""),
    ],
)
def test_bad_files_are_named(tmp_path, content, reason):
    path = tmp_path / "holiday.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read image {path}: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) > len(f"cannot read image {path}: ")
    with pytest.raises(DataError, match="cannot read image some name: "):
        open_image(io.BytesIO(content), name="some name")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.png: No such file or directory"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="Is a directory"):
        open_image(str(tmp_path))


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mambascope.models.picture_files.MAX_PIXELS", 1000)
    colour().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="64×48 pixels are more than"):
        open_image(tmp_path / "a.png")
