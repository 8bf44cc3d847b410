"""Text and image cells: what counts as one, what identifies it, and how it is decoded."""

import os
import threading
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# Part of every fingerprint: raise it when a decoding rule below changes, so that vectors made
# under the old rule are not mistaken for new ones.
DECODING_VERSION = 2

_DIGEST_SIZE = 16  # bytes; 2**64 cells before a collision becomes likely
_MAX_FILE_SIZE = 2**30  # bytes; the pixels that Pillow admits fill less, even uncompressed

_PILLOW = threading.Lock()  # guards _n_decoding, the threads for which Pillow was made strict
_n_decoding = 0
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_missing(cell) -> bool:
    """Tell whether a cell is empty: None, NaN, NaT or NA, or a dict of nothing else."""
    if isinstance(cell, str):  # by far the most cells, and pandas takes its time
        return False
    if isinstance(cell, dict):  # what Hugging Face data sets hold where there is no image
        values = cell.values()
        return bool(cell) and not any(isinstance(v, dict) or not is_missing(v) for v in values)
    try:
        return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))
    except ArithmeticError:  # a signalling decimal NaN refuses even to be compared
        return True


def identify(cell, modality: str) -> bytes:
    """Digest what a cell shows, so that equal content has one digest wherever it lies.

    Text and encoded image bytes are digested as they are, files by their content, pictures in
    memory by their pixels.

    Raises
    ------
    TypeError
        If the cell is of a type that the modality does not know.
    ValueError
        If the cell is a URL, a file beyond all size, or a picture in memory that cannot be read.
    OSError
        If the cell is a path to no file, or to one that cannot be read.
    """
    if modality == "text":
        if not isinstance(cell, str):
            raise TypeError(
                f"expected a str, got {_type_name(cell)} ({_shorten(cell)}). The model encodes "
                "text: select a column of str, or mark the cell as missing by None"
            )
        # A subclass, such as an enum's member, may have an encode or __str__ of its own.
        return _digest(_TEXT, str.encode(cell, "utf-8", "surrogatepass"))
    return _digest_image(_image_source(cell))


def decode(cell, modality: str, digest: bytes | None = None):
    """Turn a cell into what backends take: a str that UTF-8 can carry, or an RGB picture.

    Pictures are turned upright by their EXIF orientation; transparent ones are laid on white;
    16-bit ones keep their upper 8 bits; of an animation the first frame counts, or in memory the
    frame that it stands at; colour profiles are left alone. What is handed out is pixels only.

    Raises
    ------
    ValueError
        If the picture cannot be decoded, is larger than ``PIL.Image.MAX_IMAGE_PIXELS``, or no
        longer has the given digest.
    """
    if modality == "text":
        return str.encode(cell, "utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
    source = _image_source(cell)
    if digest is not None and _digest_image(source) != digest:
        raise ValueError("the image was changed while it was being encoded. Run again")
    return _to_rgb(source, cell) if isinstance(source, bytes) else source


def _start(kind: bytes):
    """Begin a digest of a kind of content, so that no two kinds run together."""
    return blake2b(len(kind).to_bytes(8, "little") + kind, digest_size=_DIGEST_SIZE)


_TEXT, _FILE, _RGB = _start(b"text"), _start(b"file"), _start(b"rgb")


def _digest(start, *parts: bytes) -> bytes:
    """Digest parts by length and content, so that no two lists of parts run together."""
    digest = start.copy()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _digest_image(source) -> bytes:
    if isinstance(source, bytes):
        return _digest(_FILE, source)
    return _digest(_RGB, repr(source.size).encode(), source.tobytes())


def _image_source(cell):
    """Reduce an image cell to encoded bytes, or to an RGB picture if it is one in memory."""
    content = _unwrap(cell) if isinstance(cell, dict) else cell
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if isinstance(content, str | os.PathLike):
        return _read(content)
    if isinstance(content, Image.Image):
        return _to_rgb(content, cell)
    if isinstance(content, np.ndarray):
        return _to_rgb(_from_array(content), cell)
    raise TypeError(
        f"expected an image, got {_type_name(cell)} ({_shorten(cell)}). An image cell is a path, "
        "bytes, a PIL image, a uint8 array, or a dict with 'bytes' or 'path'"
    )


def _unwrap(cell: dict):
    """Take the bytes, else the path, out of a dict; None if they are not what the key says."""
    for key, kinds in (("bytes", bytes | bytearray | memoryview), ("path", str | os.PathLike)):
        content = cell.get(key)
        if not is_missing(content):
            return content if isinstance(content, kinds) else None
    return None


def _read(path) -> bytes:
    path = os.fsdecode(path)
    if "://" in path:
        raise ValueError(f"got the URL {_quote(path)}; no URL is ever opened. Download it first")
    if not os.path.isfile(path):  # a pipe or a device would be waited for
        raise FileNotFoundError(f"there is no file {_quote(path)}. Check the path")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_SIZE:
            raise ValueError(f"the file {_quote(path)} has {size} bytes, too many for a picture")
        return file.read()


def _from_array(pixels: np.ndarray) -> Image.Image:
    shape_fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not shape_fits or 0 in pixels.shape:
        raise TypeError(
            "expected a uint8 array of shape (height, width[, 1, 3 or 4]), got "
            f"{_type_name(pixels)} of {pixels.dtype} and shape {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_rgb(source, cell) -> Image.Image:
    """Decode encoded bytes or a picture in memory into 8-bit RGB; the cell is for the message."""
    try:
        with _no_half_pictures():
            picture = source
            if isinstance(source, bytes):
                picture = Image.open(BytesIO(source))
                _refuse_bomb(picture)
            if picture is not source and picture.format == "EPS":
                raise ValueError("it is PostScript, a program that Ghostscript would have to run")
            _load(picture)
            rgb = _turn_upright(_flatten(picture), picture)
            rgb.info = {}  # an orientation left here would be applied again further on
            return rgb
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like at broken files
        raise ValueError(
            f"cannot decode the image {_name(cell, source)}: {_reason(error)}. Repair or "
            "drop it, mark it as missing by None, or pass errors='missing'"
        ) from error


def _refuse_bomb(picture: Image.Image) -> None:
    """Refuse what Pillow would only warn of, before its pixels take up memory."""
    limit = Image.MAX_IMAGE_PIXELS
    n_pixels = picture.width * picture.height
    if limit is not None and n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels} pixels, more than the {limit} of PIL.Image.MAX_IMAGE_PIXELS; raise "
            "that if you trust it"
        )


@contextmanager
def _no_half_pictures():
    """Have truncated files refused, also in a process that has told Pillow to put up with them.

    The setting is the process's: it comes back when the last of the threads that decode is done.
    """
    global _n_decoding
    with _PILLOW:
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES or _n_decoding > 0
        _n_decoding += lenient
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        if lenient:
            with _PILLOW:
                _n_decoding -= 1
                ImageFile.LOAD_TRUNCATED_IMAGES = _n_decoding == 0


def _load(picture: Image.Image) -> None:
    """Read the pixels, or fail as often as asked: Pillow fails once, then shows what it has got."""
    tile = list(getattr(picture, "tile", ()))
    if tile and picture.fp is None:
        raise ValueError("its file is closed, but its pixels are not read; call its load() before")
    try:
        picture.load()
    except Exception:
        if tile:
            picture.tile = tile
        raise


def _flatten(picture: Image.Image) -> Image.Image:
    """Bring any mode of picture to RGB, with transparent parts on white."""
    if 0 in picture.size:
        raise ValueError("it has no pixels")
    if picture.mode == "F":
        raise ValueError("its pixels are floats, of unknown range; convert it to 8 bits first")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        return _flatten_16_bits(picture)
    if picture.mode == "I":
        low, high = picture.getextrema()
        if low < 0 or high > 255:
            raise ValueError(f"its pixels run from {low} to {high}; convert it to 8 bits first")
    if picture.mode == "La":  # the one premultiplied mode that knows no way to RGBA
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = _with_8_bit_key(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _flatten_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in picture.info:
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _with_8_bit_key(picture: Image.Image) -> Image.Image:
    """Shift the transparent colour as Pillow shifts the 16-bit RGB pixels that it belongs to."""
    key = picture.info.get("transparency")
    if picture.mode != "RGB" or not isinstance(key, tuple) or max(key) <= 255:
        return picture
    picture = picture.copy()
    picture.info["transparency"] = tuple(value >> 8 for value in key)
    return picture


def _turn_upright(rgb: Image.Image, picture: Image.Image) -> Image.Image:
    """Turn pixels as the EXIF data of their picture say, if those can be read."""
    try:
        turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as viewers do: broken metadata does not make a broken picture
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def _name(cell, source) -> str:
    """Name an image by its path where it has one, and its size."""
    if not isinstance(source, bytes):
        return "in memory"
    path = cell.get("path") if isinstance(cell, dict) else cell
    named = f"{_quote(os.fsdecode(path))} " if isinstance(path, str | os.PathLike) else ""
    return f"{named}({len(source)} bytes)"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    return str(error).rstrip(". ") or type(error).__name__


def _type_name(cell) -> str:
    return f"{type(cell).__module__}.{type(cell).__qualname__}".removeprefix("builtins.")


def _quote(path: str, width: int = 200) -> str:
    """Quote a path, of which the end tells most; a text taken for a path can be of any length."""
    return str.__repr__(path if len(path) <= width else "…" + path[1 - width :])


def _shorten(cell, width: int = 40) -> str:
    try:
        text = repr(cell[:width] if isinstance(cell, str | bytes | bytearray) else cell)
    except Exception:  # a class of the user's, or an int of too many digits
        text = object.__repr__(cell)
    return text if len(text) <= width else text[: width - 1] + "…"
