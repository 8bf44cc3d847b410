"""Text and image cells: hashes, decoding and errors."""

import enum
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image, ImageFile, ImageOps

from sklembed.encoders import cells
from sklembed.encoders.cells import decode, identify, is_missing, n_pixels

# Every run draws the same examples and stores none on disk.
many_examples = settings(
    deadline=None, derandomize=True, max_examples=100, database=None
)


def encoded(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


@pytest.fixture
def image(pixels):
    return Image.fromarray(pixels)


def png(size, depth, colour, rows, *chunks):
    """Write a PNG that Pillow cannot save, according to the specification."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    "cell",
    [
        None,
        float("nan"),
        Decimal("nan"),
        Decimal("snan"),
        np.datetime64("NaT"),
        pd.NA,
        pd.NaT,
        {"bytes": None, "path": None},
        {"bytes": None, "path": float("nan")},
    ],
)
def test_missing(cell):
    assert is_missing(cell)


@pytest.mark.parametrize(
    "cell", ["", "nan", b"", 0, np.zeros((2, 2)), {"bytes": b""}, {}, []]
)
def test_not_missing(cell):
    assert not is_missing(cell)


def test_equal_texts_have_equal_hashes_and_different_texts_do_not():
    assert identify("note", "text") == identify(np.str_("note"), "text")
    assert identify("note", "text") != identify("note ", "text")


# Half of them contain surrogates, which UTF-8 cannot encode, or NUL, which ends a string in C.
texts = st.text(st.characters(exclude_categories=())) | st.text(
    "\ud83d\ude00\0?🙂a", max_size=6
)


@many_examples
@given(st.lists(texts, min_size=2, unique=True))
@example(["\ud83d\ude00", "🙂", "??", "?"])
@example(["a", "a\0", "\0a", ""])
def test_distinct_texts_have_distinct_hashes_that_differ_from_those_of_files(texts):
    digests = {identify(text, "text") for text in texts}
    files = {identify(text.encode("utf-8", "surrogatepass"), "image") for text in texts}
    assert len(digests) == len(texts)
    assert not digests & files


@many_examples
@given(texts)
def test_a_decoded_text_is_a_plain_str_of_valid_utf_8_and_decodes_to_itself(
    text,
):
    decoded = decode(text, "text")
    decoded.encode("utf-8")
    assert type(decoded) is str
    assert len(decoded) == len(text)
    assert decode(decoded, "text") == decoded
    assert decode(np.str_("a" + text + "b"), "text") == f"a{decoded}b"


def test_a_huge_text_is_not_truncated():
    text = "x" * 5_000_000
    assert decode(text, "text") == text
    assert identify(text, "text") != identify(text + "x", "text")


def test_a_str_subclass_is_read_by_its_characters():
    """A member of an enum prints as its name; hash and decoded text must agree."""

    class Size(str, enum.Enum):  # noqa: UP042
        SMALL = "small"

    class OverridesEncode(str):
        def encode(self, *args):
            return b"other"

    assert decode(Size.SMALL, "text") == "small"
    assert identify(Size.SMALL, "text") == identify(OverridesEncode("small"), "text")
    assert identify(Size.SMALL, "text") == identify("small", "text")


@pytest.mark.parametrize("cell", [3, b"bytes", ["list"], np.zeros(3)])
def test_a_cell_that_is_not_a_text_is_an_error(cell):
    with pytest.raises(TypeError, match="expected a str, got"):
        identify(cell, "text")


def test_a_file_has_one_hash_as_path_bytes_or_dict(image, tmp_path):
    data = encoded(image)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    cells = [
        data,
        bytearray(data),
        path,
        str(path),
        {"bytes": data},
        {"bytes": None, "path": path},
    ]
    assert len({identify(cell, "image") for cell in cells}) == 1


def test_a_changed_file_has_another_hash(image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    before = identify(path, "image")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert identify(path, "image") != before


def test_a_file_that_changes_before_it_is_decoded_is_an_error(image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    digest = identify(path, "image")
    assert decode(path, "image", digest).size == image.size
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(ValueError, match="changed while it was being encoded"):
        decode(path, "image", digest)


def test_pixels_have_one_hash_as_array_or_image(pixels, image):
    assert identify(pixels, "image") == identify(image, "image")
    assert identify(pixels[::-1], "image") == identify(pixels[::-1].copy(), "image")
    assert identify(pixels, "image") != identify(pixels[::-1], "image")
    assert identify(pixels, "image") != identify(pixels.reshape(4, 6, 3), "image")


@pytest.mark.parametrize(
    "mode", ["L", "1", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_opaque_modes_are_converted_to_rgb_as_pillow_does(image, mode):
    converted = image.convert(mode)
    np.testing.assert_array_equal(decode(converted, "image"), converted.convert("RGB"))


def test_the_a_of_lab_is_not_an_alpha_channel():
    """Merged bands leave a fourth byte of 0, which would be full transparency."""
    grey = Image.merge("LAB", [Image.new("L", (1, 1), 128)] * 3)
    assert decode(grey, "image").getpixel((0, 0)) == pytest.approx(
        (119, 119, 119), abs=1
    )
    np.testing.assert_array_equal(
        decode(encoded(grey, "TIFF"), "image"), decode(grey, "image")
    )


@pytest.mark.parametrize(
    ("mode", "clear", "half"),
    [
        ("LA", (90, 0), (0, 128)),
        ("La", (0, 0), (0, 128)),
        ("RGBA", (9, 9, 9, 0), (0, 0, 0, 128)),
        ("RGBa", (0, 0, 0, 0), (0, 0, 0, 128)),
        ("PA", (7, 0), (0, 128)),
    ],
)
def test_every_mode_with_alpha_is_composited_on_white(mode, clear, half):
    image = Image.new(mode, (2, 1), clear)
    if mode == "PA":
        image.putpalette([0, 0, 0] + [50] * 765)
    image.putpixel((1, 0), half)
    decoded = decode(image, "image")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_cmyk_jpegs_are_read_as_inverted_by_adobe():
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert decode(red, "image").getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


def test_images_of_equal_pixels_have_one_hash_in_memory(image):
    """The order of the palette does not change the pixels."""
    palette = image.quantize(16)
    reordered = palette.remap_palette(list(range(16))[::-1])
    assert palette.tobytes() != reordered.tobytes()
    assert (
        len(
            {identify(p, "image") for p in (palette, reordered, palette.convert("RGB"))}
        )
        == 1
    )


def test_decoding_a_file_keeps_its_pixels(image, pixels):
    np.testing.assert_array_equal(decode(encoded(image), "image"), pixels)


def test_transparent_parts_are_composited_on_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 255, 128))
    decoded = decode(encoded(half), "image")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == pytest.approx((127, 127, 255), abs=1)


def test_a_palette_with_a_transparent_colour_is_composited_on_white():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert decode(encoded(palette, transparency=0), "image").getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_a_palette_may_have_several_transparencies_or_an_alpha_channel():
    palette = Image.new("P", (2, 1), 0)
    palette.putpixel((1, 0), 1)
    palette.putpalette([0, 0, 0, 20, 20, 20])
    decoded = decode(encoded(palette, transparency=b"\x80\x00"), "image")
    assert np.asarray(decoded)[0, :, 0].tolist() == pytest.approx([127, 255], abs=1)
    palette.putpalette([0, 0, 0, 128, 20, 20, 20, 0], "RGBA")
    decoded = decode(palette, "image")
    assert np.asarray(decoded)[0, :, 0].tolist() == pytest.approx([127, 255], abs=1)


sixteen_bits = np.array([[0, 256 * 128, 65535]], dtype=">u2")


@pytest.mark.parametrize(
    "cell",
    [
        encoded(Image.fromarray(sixteen_bits.astype(np.uint16))),
        encoded(Image.fromarray(sixteen_bits.astype(np.uint16)), "TIFF"),
        encoded(Image.frombytes("I;16B", (3, 1), sixteen_bits.tobytes()), "TIFF"),
        Image.frombytes("I;16B", (3, 1), sixteen_bits.tobytes()),
        Image.frombytes("I;16", (3, 1), sixteen_bits.astype("<u2").tobytes()),
        png((3, 1), 16, 2, b"\0" + np.repeat(sixteen_bits, 3, axis=1).tobytes()),
        b"P5 3 1 65535\n" + sixteen_bits.tobytes(),
        b"P6 3 1 65535\n" + np.repeat(sixteen_bits, 3, axis=1).tobytes(),
    ],
)
def test_images_of_16_bits_keep_their_upper_8_bits(cell):
    assert np.asarray(decode(cell, "image"))[0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
    ]


@pytest.mark.parametrize("colour", [0, 2])
def test_the_transparent_colour_of_16_bits_is_composited_on_white(colour):
    """Pillow compares it with pixels that are already reduced to 8 bits."""
    repeats = 1 if colour == 0 else 3
    pixels = np.repeat(np.array([[0, 0x8001, 0xFF00]], dtype=">u2"), repeats, axis=1)
    key = (b"tRNS", struct.pack(">H", 0x8001) * repeats)
    decoded = decode(png((3, 1), 16, colour, b"\0" + pixels.tobytes(), key), "image")
    assert np.asarray(decoded)[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    key = (b"tRNS", struct.pack(">H", 0x0001) * repeats)
    decoded = decode(png((3, 1), 16, colour, b"\0" + pixels.tobytes(), key), "image")
    assert np.asarray(decoded)[0, 1].tolist() == [128] * 3


def test_images_of_32_bits_with_values_below_256_are_read():
    assert decode(Image.new("I", (1, 1), 200), "image").getpixel((0, 0)) == (
        200,
        200,
        200,
    )


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(image, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    cell = encoded(image, format, exif=exif)
    decoded = decode(cell, "image")
    np.testing.assert_array_equal(
        decoded, ImageOps.exif_transpose(Image.open(BytesIO(cell)))
    )
    assert decoded.size == (image.size[::-1] if 5 <= orientation <= 8 else image.size)
    np.testing.assert_array_equal(decode(decoded, "image"), decoded)
    np.testing.assert_array_equal(ImageOps.exif_transpose(decoded), decoded)


@pytest.mark.parametrize(
    "exif",
    [
        b"garbage",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x00\0\0\x10\xff\xff\xff\x0f",
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_do_not_make_an_image_unreadable(image, exif, format):
    plain = decode(encoded(image, format), "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of the metadata
        np.testing.assert_array_equal(
            decode(encoded(image, format, exif=exif), "image"), plain
        )


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("GIF", {}),
        ("GIF", {"transparency": 0}),
        ("PNG", {}),
        ("PNG", {"default_image": True}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ],
)
def test_the_first_frame_of_an_animated_file_is_decoded(format, options):
    frames = [Image.new("P", (3, 2), index) for index in range(3)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] + [0] * 759)
    animation = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **options
    )
    assert Image.open(BytesIO(animation)).n_frames >= 2
    first = (255, 255, 255) if "transparency" in options else (200, 0, 0)
    assert decode(animation, "image").getcolors() == [(6, first)]
    assert decode(Image.open(BytesIO(animation)), "image").getcolors() == [(6, first)]


def test_the_current_frame_of_an_animation_in_memory_is_decoded():
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue")]
    animation = Image.open(
        BytesIO(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    )
    animation.seek(1)
    assert identify(animation, "image") == identify(frames[1], "image")
    assert decode(animation, "image").getpixel((0, 0)) == (0, 0, 255)
    assert animation.tell() == 1


def test_one_pixel_is_an_image():
    assert decode(encoded(Image.new("RGB", (1, 1), "red")), "image").getpixel(
        (0, 0)
    ) == (255, 0, 0)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
    ],
)
def test_a_truncated_file_is_an_error_wherever_it_is_cut(
    format, options, lenient, monkeypatch
):
    """Also if the process has set LOAD_TRUNCATED_IMAGES."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format, **options)
    for cut in range(0, len(data) - 20, max(1, len(data) // 50)):
        with pytest.raises(
            ValueError, match=rf"cannot decode the image \({cut} bytes\).*Repair"
        ):
            decode(data[:cut], "image")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("format", ["PNG", "JPEG", "JPEG2000"])
def test_a_truncated_image_in_memory_is_an_error_at_each_attempt(
    format,
):
    """Pillow raises at the first attempt and may return a partial image at the second."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    lazy = Image.open(BytesIO(data[: len(data) * 2 // 3]))
    for _ in range(3):
        with pytest.raises(ValueError, match="cannot decode the image in memory"):
            identify(lazy, "image")


def test_an_image_whose_file_is_closed_is_an_error(image, tmp_path):
    image.save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as lazy:
        pass
    with pytest.raises(ValueError, match="its file was closed"):
        identify(lazy, "image")
    with Image.open(tmp_path / "image.png") as loaded:
        loaded.load()
    assert identify(loaded, "image") == identify(image, "image")


@pytest.mark.parametrize("action", ["error", "always"])
@pytest.mark.parametrize("limit", [5, 20])
def test_a_decompression_bomb_is_an_error_under_any_warning_filter(
    image, limit, action, monkeypatch
):
    """Pillow raises beyond twice its limit; below it warns and decodes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter(action)
        with pytest.raises(ValueError, match="(?i)raise .*if you trust the image"):
            decode(encoded(image), "image")


def test_a_decompression_bomb_is_recognised_by_its_header_and_not_loaded():
    bomb = png((10_000, 10_000), 8, 2, bytes(10_000_000))
    assert len(bomb) < 10_000
    with mock.patch.object(ImageFile.ImageFile, "load") as load:
        with pytest.raises(ValueError, match="100000000 pixels"):
            decode(bomb, "image")
    load.assert_not_called()


def test_postscript_is_not_run(image):
    with pytest.raises(ValueError, match="it is PostScript"):
        decode(encoded(image, "EPS"), "image")


@pytest.mark.parametrize("lenient", [False, True])
def test_threads_restore_the_settings_of_the_process(image, lenient, monkeypatch):
    """Settings belong to the process, so no thread may restore them while another decodes."""
    good, bad = encoded(image), encoded(image)[:60]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    filters = list(warnings.filters)

    def read(i):
        try:
            return decode(bad if i % 3 else good, "image")
        except ValueError:
            return None

    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(read, range(300)))
    assert [image is not None for image in decoded] == [i % 3 == 0 for i in range(300)]
    assert (warnings.filters, ImageFile.LOAD_TRUNCATED_IMAGES) == (filters, lenient)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (3, TypeError, "expected an image, got int"),
        ({"url": "x"}, TypeError, "expected an image, got dict"),
        (np.zeros((2, 2)), TypeError, "expected a uint8 array"),
        (np.zeros((2, 2, 7), np.uint8), TypeError, "expected a uint8 array"),
        (np.zeros((0, 2), np.uint8), TypeError, "expected a uint8 array"),
        ("https://example.org/cat.png", ValueError, "URLs are not opened"),
        ("no/such/file.png", FileNotFoundError, "there is no file 'no/such/file.png'"),
        ("no/such/\0.png", FileNotFoundError, r"there is no file 'no/such/.x00.png'"),
        ("\ud800.png", FileNotFoundError, r"there is no file '.ud800.png'"),
        (
            "a long text " * 1000,
            FileNotFoundError,
            r"there is no file '….{150,200}'\. The .* looks like a text",
        ),
        ("", FileNotFoundError, "there is no file ''"),
        (Path(), FileNotFoundError, "there is no file '.'"),
        ("/dev/zero", FileNotFoundError, "there is no file '/dev/zero'"),
        (
            b"",
            ValueError,
            r"cannot decode the image \(0 bytes\): no known image format",
        ),
        (b"<svg></svg>", ValueError, "no known image format"),
        (b"version https://git-lfs.github.com/spec/v1\n", ValueError, "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", ValueError, "it is a web page"),
        ({"bytes": "image.png"}, TypeError, "expected an image, got dict"),
        ({"path": b"encoded"}, TypeError, "expected an image, got dict"),
        ({"bytes": {"bytes": b""}}, TypeError, "expected an image, got dict"),
        ({"bytes": None, "url": "x"}, TypeError, "expected an image, got dict"),
        (Image.new("L", (0, 3)), ValueError, "it has no pixels"),
        (Image.new("I", (0, 0)), ValueError, "it has no pixels"),
        (Image.new("F", (2, 2)), ValueError, "pixels are floats"),
        (
            Image.new("I", (2, 2), 70_000),
            ValueError,
            "pixels range from 70000 to 70000",
        ),
    ],
)
def test_a_cell_that_is_not_an_image_is_an_error(cell, error, message):
    with pytest.raises(error, match=message):
        decode(cell, "image", identify(cell, "image"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes exist on POSIX only")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match="pipe.png"):
        identify(tmp_path / "pipe.png", "image")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_MAX_FILE_SIZE", 100)
    (tmp_path / "disk.img").write_bytes(bytes(101))
    with pytest.raises(ValueError, match="disk.img' has 101 bytes"):
        identify(tmp_path / "disk.img", "image")


def test_a_path_may_come_from_fspath_as_bytes_or_from_a_dict_with_nan(image, tmp_path):
    image.save(tmp_path / "image.png")

    class Entry(os.PathLike):
        def __fspath__(self):
            return os.fsencode(tmp_path / "image.png")

    digest = identify((tmp_path / "image.png").read_bytes(), "image")
    assert identify(Entry(), "image") == digest
    assert identify(np.str_(tmp_path / "image.png"), "image") == digest
    assert identify({"bytes": float("nan"), "path": Entry()}, "image") == digest


def change_file(path, image, other):
    image.save(path)
    yield path
    other.save(path)
    yield path


def change_bytes(path, image, other):
    data = bytearray(encoded(image, "BMP"))
    yield data
    data[:] = encoded(other, "BMP")
    yield data


def change_array(path, image, other):
    pixels = np.array(image)
    yield pixels
    pixels[:] = other
    yield pixels


def change_image(path, image, other):
    copy = image.copy()
    yield copy
    copy.paste(other)
    yield copy


@pytest.mark.parametrize(
    "change", [change_file, change_bytes, change_array, change_image]
)
def test_a_cell_that_was_changed_since_it_was_hashed_is_an_error(
    change, image, tmp_path
):
    other = image.transpose(Image.Transpose.ROTATE_180)
    states = change(tmp_path / "image.png", image, other)
    cell = next(states)
    digest = identify(cell, "image")
    np.testing.assert_array_equal(decode(cell, "image", digest), image)
    cell = next(states)
    with pytest.raises(ValueError, match="changed while it was being encoded"):
        decode(cell, "image", digest)
    assert identify(cell, "image") != digest


LOSSLESS_FORMATS = {  # by mode
    "1": ["PNG", "BMP", "GIF", "TIFF"],
    "L": ["PNG", "BMP", "GIF", "TIFF", "WEBP"],
    "P": ["PNG", "BMP", "GIF", "TIFF"],
    "LA": ["PNG", "TIFF", "WEBP"],
    "RGB": ["PNG", "BMP", "TIFF", "WEBP"],
    "RGBA": ["PNG", "TIFF", "WEBP"],
}


@st.composite
def images(draw):
    """Draw an image of any 8-bit mode and a lossless format for it."""
    mode = draw(st.sampled_from(list(LOSSLESS_FORMATS)))
    channels = Image.getmodebands(mode)
    sides = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    pixels = draw(arrays(np.uint8, (*sides, channels) if channels > 1 else sides))
    if mode == "1":
        image = Image.fromarray(pixels).convert("1")
    elif mode == "P":
        image = Image.fromarray(pixels).convert("L")
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(draw(st.binary(min_size=768, max_size=768)))
    else:
        image = Image.frombytes(mode, sides[::-1], pixels.tobytes())
    return image, draw(st.sampled_from(LOSSLESS_FORMATS[mode]))


@many_examples
@given(drawn=images())
def test_an_image_decodes_to_the_same_pixels_from_any_type_of_cell(
    drawn, tmp_path_factory
):
    image, format = drawn
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = encoded(image, format, **options)
    path = tmp_path_factory.mktemp("drawn") / f"image.{format.lower()}"
    path.write_bytes(data)
    encodings = [data, bytearray(data), memoryview(data), path, str(path)]
    encodings += [
        {"bytes": data},
        {"path": path},
        {"bytes": data, "path": "elsewhere.png"},
    ]
    with Image.open(path) as lazy:
        in_memory = [lazy, image, decode(data, "image")]
        in_memory += [
            np.asarray(p) for p in in_memory if p.mode in ("L", "RGB", "RGBA")
        ]
        expected = np.asarray(decode(image, "image"))
        for cell in (*encodings, *in_memory):
            decoded = decode(cell, "image", identify(cell, "image"))
            assert (decoded.mode, decoded.info) == ("RGB", {})
            np.testing.assert_array_equal(decoded, expected)
        assert len({identify(cell, "image") for cell in encodings}) == 1
        assert len({identify(cell, "image") for cell in in_memory}) == 1


@many_examples
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9)), st.data())
def test_an_array_has_one_hash_in_any_memory_layout(grey, data):
    channels = data.draw(st.sampled_from([None, 1, 3, 4]))
    pixels = (
        grey
        if channels is None
        else np.stack([grey ^ i for i in range(channels)], axis=-1)
    )
    frozen = pixels.copy()
    frozen.flags.writeable = False
    layouts = [np.asfortranarray(pixels), pixels[::-1, ::-1].copy()[::-1, ::-1], frozen]
    layouts += [np.repeat(pixels, 2, axis=1)[:, ::2], pixels.astype(">u1")]
    assert {identify(layout, "image") for layout in layouts} == {
        identify(pixels, "image")
    }
    if channels != 4:
        expected = np.broadcast_to(pixels.reshape(*grey.shape, -1), (*grey.shape, 3))
        np.testing.assert_array_equal(decode(pixels, "image"), expected)
    else:
        alpha = pixels[..., 3:] / 255
        on_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
        np.testing.assert_allclose(decode(pixels, "image"), on_white, atol=1)


def encoded_files():
    """Encode a small image in many ways."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield from (
        encoded(image, format, exif=exif) for format in ("PNG", "JPEG", "WEBP", "TIFF")
    )
    yield from (encoded(image.convert(mode)) for mode in ("1", "L", "P", "LA", "RGBA"))
    yield from (
        encoded(image, format)
        for format in ("BMP", "GIF", "PPM", "TGA", "ICO", "JPEG2000")
    )
    yield from (encoded(image.convert("CMYK"), format) for format in ("JPEG", "TIFF"))
    yield encoded(image, "TIFF", compression="tiff_lzw")
    yield encoded(image, "JPEG", progressive=True)
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        yield encoded(
            image, format, save_all=True, append_images=[ImageOps.invert(image)]
        )
    yield png((3, 1), 16, 0, b"\0" + sixteen_bits.tobytes(), (b"tRNS", b"\x80\x00"))


files = list(encoded_files())


@settings(many_examples, max_examples=600)
@given(
    file=st.sampled_from(files),
    flips=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8
    ),
    fraction=st.just(1.0) | st.floats(0, 1),
)
def test_a_corrupt_file_is_an_image_or_a_value_error(file, flips, fraction):
    corrupt = bytearray(file)
    for place, byte in flips:
        # Squared, because headers lie at the beginning.
        corrupt[int(place**2 * len(corrupt))] = byte
    corrupt = bytes(corrupt[: int(fraction * len(corrupt))])
    with (
        warnings.catch_warnings(record=True),
        mock.patch.object(Image, "MAX_IMAGE_PIXELS", 100_000),  # larger images are slow
    ):
        warnings.simplefilter("always")
        try:
            decoded = decode(corrupt, "image", identify(corrupt, "image"))
        except ValueError as error:
            assert f"cannot decode the image ({len(corrupt)} bytes): " in str(error)
        else:
            assert decoded.mode == "RGB"
            assert 0 not in decoded.size
            np.testing.assert_array_equal(decode(corrupt, "image"), decoded)


class Unprintable:
    def __repr__(self):
        raise RuntimeError("this object has no repr")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.dates(),
    st.timedeltas(),
    st.uuids(),
    st.binary(),
    texts,
    st.builds(Unprintable),
    st.builds(lambda: 10**5000),  # too many digits for a str
    st.sampled_from(
        [
            pd.NA,
            pd.NaT,
            pd.Interval(0, 1),
            pd.Period("2020"),
            np.ma.masked,
            int,
            len,
            ...,
        ]
    ),
)
keys = st.sampled_from(["bytes", "path", "url"]) | st.integers()
objects = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=5,
    ),
    st.builds(Path, st.text("abc/. ")),
    st.builds(memoryview, st.binary()),
    st.sets(st.integers(), max_size=3),
    arrays(scalar_dtypes(), array_shapes(min_dims=0, max_dims=4, max_side=5)),
    st.builds(pd.Series, st.lists(st.integers(), max_size=3)),
)


@settings(many_examples, max_examples=400)
@given(cell=objects, modality=st.sampled_from(["text", "image"]))
@example(date(2020, 1, 1), "image")
def test_any_object_is_missing_or_decoded_or_an_error_that_names_its_type(
    cell, modality
):
    if is_missing(cell):
        return
    try:
        decoded = decode(cell, modality, identify(cell, modality))
    except TypeError as error:
        assert type(cell).__name__ in str(error)
        assert len(str(error)) < 400
    except ValueError as error:
        assert "cannot decode the image" in str(error) or "URL" in str(error)
    except OSError as error:
        assert "there is no file" in str(error)
    else:
        assert isinstance(decoded, str if modality == "text" else Image.Image)


def photograph(size, mode="RGB", format="JPEG", **options):
    """Encode a smooth image, which looks alike at any size."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8))
    large = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    return encoded(large, format, quality=95, **options)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 512), (80, 64)),
        ((632, 512), (79, 64)),
        ((636, 512), (159, 128)),  # no multiple of 8
        ((634, 512), (317, 256)),
        ((635, 512), (635, 512)),
        ((640, 504), (160, 126)),  # 504 / 8 pixels are fewer than 4 * 16
        ((120, 640), (120, 640)),
    ],
)
def test_a_jpeg_is_reduced_by_an_exact_divisor_to_at_least_the_size_for_the_model(
    size, expected
):
    assert decode(photograph(size), "image", min_size=16).size == expected
    assert decode(photograph(size), "image").size == size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_jpeg_has_the_pixels_and_orientation_of_the_full_one(
    mode, orientation, progressive
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photograph((640, 512), mode, exif=exif, progressive=progressive)
    full = decode(data, "image")
    reduced = decode(data, "image", min_size=16)
    assert reduced.mode == "RGB"
    assert reduced.size == (full.width // 8, full.height // 8)
    expected, pixels = (np.asarray(i.resize((16, 16)), float) for i in (full, reduced))
    assert np.abs(pixels - expected).max() <= 4
    assert np.ptp(expected) > 100


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_at_full_size(format):
    data = photograph((640, 512), format=format)
    assert decode(data, "image", min_size=16).size == (640, 512)


def test_an_image_in_memory_keeps_its_size_and_its_hash():
    """A lazily opened JPEG may be read by others, so it is not reduced in place."""
    lazy = Image.open(BytesIO(photograph((640, 512))))
    digest = identify(lazy, "image")
    opened_again = Image.open(BytesIO(photograph((640, 512))))
    decoded = decode(opened_again, "image", digest, min_size=16)
    assert decoded.size == opened_again.size == (640, 512)
    assert identify(opened_again, "image") == digest


def test_the_limit_of_pixels_is_that_of_the_full_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 512 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="it has 327680 pixels"),
    ):
        decode(photograph((640, 512)), "image", min_size=16)


def test_a_lossless_jpeg_is_decoded_at_full_size():
    """libjpeg cannot reduce it."""

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    frame = struct.pack(">BHH", 8, 512, 640) + bytes([1, 1, 0x11, 0])
    codes = bytes([0, 1, *[0] * 15, 0])  # one code for a difference of zero
    scan = bytes([1, 1, 0, 1, 0, 0])
    segments = segment(0xC3, frame) + segment(0xC4, codes) + segment(0xDA, scan)
    data = b"\xff\xd8" + segments + bytes(640 * 512 // 8) + b"\xff\xd9"
    decoded = decode(data, "image", min_size=16)
    assert decoded.size == (640, 512)
    assert decoded.getextrema() == ((128, 128),) * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "PNG"}, 640 * 512),
        ({}, 80 * 64),
        ({"progressive": True}, 640 * 512),  # libjpeg keeps all coefficients
    ],
)
def test_pixels_are_counted_by_the_header(options, expected, tmp_path):
    data = photograph((640, 512), **options)
    path = tmp_path / "image"
    path.write_bytes(data[: len(data) // 2])
    cells_of_one_image = [data, path, str(path), {"bytes": data}, {"path": path}]
    for cell in cells_of_one_image:
        assert n_pixels(cell, "image", min_size=16) == expected
        assert n_pixels(cell, "image") == 640 * 512


@pytest.mark.parametrize(
    ("cell", "modality", "expected"),
    [
        (np.zeros((5, 4, 3), np.uint8), "image", 20),
        (Image.new("RGB", (5, 4)), "image", 20),
        (b"no image", "image", 0),
        ("no/such/file.png", "image", 0),
        (3, "image", 0),
        ("text", "text", 0),
    ],
)
def test_pixels_of_other_cells(cell, modality, expected):
    assert n_pixels(cell, modality) == expected


@pytest.mark.parametrize("text", ["", "a red apple", "né \ud800 \0", "x" * 1000])
def test_a_text_is_hashed_with_its_kind_and_length(text):
    """Keys of stored vectors must never change."""
    content = text.encode("utf-8", "surrogatepass")
    parts = [len(part).to_bytes(8, "little") + part for part in (b"text", content)]
    expected = blake2b(b"".join(parts), digest_size=16).digest()
    assert identify(text, "text") == expected
