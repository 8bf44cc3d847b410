"""Text and image cells: what counts as one, what identifies it, and how it is decoded."""

import os
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

# Part of every fingerprint: raise it when a decoding rule below changes, so that vectors made
# under the old rule are not mistaken for new ones.
DECODING_VERSION = 1

_DIGEST_SIZE = 16  # bytes; 2**64 cells before a collision becomes likely


def is_missing(cell) -> bool:
    """Tell whether a cell is empty: None, NaN, NaT or NA, or a dict of nothing but None."""
    if isinstance(cell, str):  # by far the most cells, and pandas takes its time
        return False
    if isinstance(cell, dict):  # what Hugging Face data sets hold where there is no image
        return bool(cell) and all(value is None for value in cell.values())
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def identify(cell, modality: str) -> bytes:
    """Digest what a cell shows, so that equal content has one digest wherever it lies.

    Text and encoded image bytes are digested as they are, files by their content, pictures in
    memory by their pixels.

    Raises
    ------
    TypeError
        If the cell is of a type that the modality does not know.
    ValueError
        If the cell is a URL, or a picture that cannot be read.
    FileNotFoundError
        If the cell is a path to no file.
    """
    if modality == "text":
        if not isinstance(cell, str):
            raise TypeError(
                f"expected a str, got {_type_name(cell)} ({_shorten(cell)}). The model encodes "
                "text: select a column of str, or mark the cell as missing by None"
            )
        return _digest(_TEXT, cell.encode("utf-8", "surrogatepass"))
    source = _image_source(cell)
    if isinstance(source, bytes):
        return _digest(_FILE, source)
    picture = _to_rgb(source, cell)
    return _digest(_RGB, repr(picture.size).encode(), picture.tobytes())


def decode(cell, modality: str, digest: bytes | None = None):
    """Turn a cell into what backends take: a str that UTF-8 can carry, or an RGB picture.

    Pictures are turned upright by their EXIF orientation; transparent ones are laid on white;
    16-bit ones keep their upper 8 bits; of an animation the first frame counts.

    Raises
    ------
    ValueError
        If the picture cannot be decoded, or is a file that no longer has the given digest.
    """
    if modality == "text":
        return str(cell).encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
    source = _image_source(cell)
    if digest is not None and isinstance(source, bytes) and _digest(_FILE, source) != digest:
        raise ValueError("the file was changed while it was being encoded. Run again")
    return _to_rgb(source, cell)


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


def _image_source(cell):
    """Reduce an image cell to encoded bytes or to a picture in memory."""
    if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell)
    if isinstance(cell, str | os.PathLike):
        return _read(cell)
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, np.ndarray):
        return _from_array(cell)
    raise TypeError(
        f"expected an image, got {_type_name(cell)} ({_shorten(cell)}). An image cell is a path, "
        "bytes, a PIL image, a uint8 array, or a dict with 'bytes' or 'path'"
    )


def _read(path) -> bytes:
    if isinstance(path, str) and "://" in path:
        raise ValueError(f"got the URL {path!r}; no URL is ever opened. Download the image first")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}. Check the path")
    return Path(path).read_bytes()


def _from_array(pixels: np.ndarray) -> Image.Image:
    shape_fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not shape_fits or 0 in pixels.shape:
        raise TypeError(
            f"expected a uint8 array of shape (height, width[, 1, 3 or 4]), got {pixels.dtype} of "
            f"shape {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_rgb(source, cell) -> Image.Image:
    """Decode encoded bytes or a picture in memory into 8-bit RGB; the cell is for the message."""
    try:
        picture = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        return _flatten(ImageOps.exif_transpose(picture))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like at broken files
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"cannot decode the image {_name(cell, source)}: {why}. Repair or drop it, mark it as "
            "missing by None, or pass errors='missing'"
        ) from error


def _name(cell, source) -> str:
    """Name an image by its path where it has one, and its size."""
    if not isinstance(source, bytes):
        return "in memory"
    path = cell.get("path") if isinstance(cell, dict) else cell
    named = f"{os.fspath(path)!r} " if isinstance(path, str | os.PathLike) else ""
    return f"{named}({len(source)} bytes)"


def _flatten(picture: Image.Image) -> Image.Image:
    """Bring any mode of picture to RGB, with transparent parts on white."""
    if picture.mode == "F":
        raise ValueError("its pixels are floats, of unknown range; convert it to 8 bits first")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode == "I":
        low, high = picture.getextrema()
        if low < 0 or high > 255:
            raise ValueError(f"its pixels run from {low} to {high}; convert it to 8 bits first")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _type_name(cell) -> str:
    return f"{type(cell).__module__}.{type(cell).__qualname__}".removeprefix("builtins.")


def _shorten(cell, width: int = 40) -> str:
    text = repr(cell)
    return text if len(text) <= width else text[: width - 1] + "…"
