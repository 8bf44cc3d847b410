"""Text and image cells: what identifies them, how they are decoded, what is refused."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sklembed.encoders.cells import decode, identify, is_missing


def encoded(picture, format="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


@pytest.fixture
def picture(pixels):
    return Image.fromarray(pixels)


@pytest.mark.parametrize("cell", [None, float("nan"), pd.NA, pd.NaT, {"bytes": None, "path": None}])
def test_missing(cell):
    assert is_missing(cell)


@pytest.mark.parametrize("cell", ["", "nan", b"", 0, np.zeros((2, 2)), {"bytes": b""}])
def test_not_missing(cell):
    assert not is_missing(cell)


def test_equal_texts_have_one_digest_and_others_another():
    assert identify("note", "text") == identify(np.str_("note"), "text")
    assert identify("note", "text") != identify("note ", "text")


def test_any_text_has_a_digest_and_can_be_decoded():
    """A lone surrogate cannot be encoded as UTF-8, and NUL ends a string in other languages."""
    for text in ("", "\ud800", "a\0b", "🙂", "x" * 100_000):
        identify(text, "text")
        decode(text, "text").encode("utf-8")


@pytest.mark.parametrize("cell", [3, b"bytes", ["list"], np.zeros(3)])
def test_what_is_not_a_text_is_refused(cell):
    with pytest.raises(TypeError, match="expected a str, got"):
        identify(cell, "text")


def test_one_file_has_one_digest_however_it_comes(picture, tmp_path):
    data = encoded(picture)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    cells = [data, bytearray(data), path, str(path), {"bytes": data}, {"bytes": None, "path": path}]
    assert len({identify(cell, "image") for cell in cells}) == 1


def test_a_changed_file_has_another_digest(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    before = identify(path, "image")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert identify(path, "image") != before


def test_a_file_that_changes_before_it_is_decoded_is_refused(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    digest = identify(path, "image")
    assert decode(path, "image", digest).size == picture.size
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(ValueError, match="changed while it was being encoded"):
        decode(path, "image", digest)


def test_pixels_have_one_digest_as_array_or_picture(pixels, picture):
    assert identify(pixels, "image") == identify(picture, "image")
    assert identify(pixels[::-1], "image") == identify(pixels[::-1].copy(), "image")
    assert identify(pixels, "image") != identify(pixels[::-1], "image")
    assert identify(pixels, "image") != identify(pixels.reshape(4, 6, 3), "image")


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_becomes_rgb(picture, mode):
    source = picture.convert("RGB") if mode == "LAB" else picture
    converted = Image.new("LAB", source.size) if mode == "LAB" else source.convert(mode)
    decoded = decode(converted, "image")
    assert (decoded.mode, decoded.size) == ("RGB", picture.size)


def test_decoding_a_file_keeps_its_pixels(picture, pixels):
    np.testing.assert_array_equal(decode(encoded(picture), "image"), pixels)


def test_transparent_parts_are_laid_on_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 255, 128))
    decoded = decode(encoded(half), "image")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == pytest.approx((127, 127, 255), abs=1)


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert decode(encoded(palette, transparency=0), "image").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_upper_eight():
    grey = Image.fromarray(np.array([[0, 256 * 128, 65535]], dtype=np.uint16))
    assert [decode(encoded(grey), "image").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_thirty_two_bits_that_hold_eight_are_kept():
    assert decode(Image.new("I", (1, 1), 200), "image").getpixel((0, 0)) == (200, 200, 200)


def test_exif_orientation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = decode(encoded(picture, "JPEG", exif=exif), "image")
    assert turned.size == picture.size[::-1]


def test_an_animation_shows_its_first_frame(picture):
    frames = [picture.convert("P"), Image.new("P", picture.size)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(
        decode(animation, "image"), decode(encoded(frames[0], "GIF"), "image")
    )


def test_one_pixel_is_a_picture():
    assert decode(encoded(Image.new("RGB", (1, 1), "red")), "image").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("cut", [0, 10, 60])
def test_a_truncated_file_is_refused(picture, cut):
    with pytest.raises(ValueError, match=f"cannot decode the image \\({cut} bytes\\).*Repair"):
        decode(encoded(picture)[:cut], "image")


def test_a_decompression_bomb_is_refused(monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(encoded(picture), "image")


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (3, TypeError, "expected an image, got int"),
        ({"url": "x"}, TypeError, "expected an image, got dict"),
        (np.zeros((2, 2)), TypeError, "expected a uint8 array"),
        (np.zeros((2, 2, 7), np.uint8), TypeError, "expected a uint8 array"),
        (np.zeros((0, 2), np.uint8), TypeError, "expected a uint8 array"),
        ("https://example.org/cat.png", ValueError, "no URL is ever opened"),
        ("no/such/file.png", FileNotFoundError, "there is no file 'no/such/file.png'"),
        (Image.new("F", (2, 2)), ValueError, "pixels are floats"),
        (Image.new("I", (2, 2), 70_000), ValueError, "pixels run from 70000 to 70000"),
    ],
)
def test_what_is_not_an_image_is_refused(cell, error, message):
    with pytest.raises(error, match=message):
        identify(cell, "image")
