"""Text and image cells: what counts as one, what identifies it, and how it is decoded."""

import os
import pickle
import threading
import warnings
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO

import joblib
import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

# Part of every fingerprint: raise it when a decoding rule below changes, so that vectors made
# under the old rule are not mistaken for new ones.
DECODING_VERSION = 2

_DIGEST_SIZE = 16  # bytes; 2**64 cells before a collision becomes likely
_MAX_FILE_SIZE = (
    2**30
)  # bytes; the pixels that Pillow admits fill less, even uncompressed

# Settings of Pillow that decide which images can be read, with Pillow's own values.
_LIMITS = {
    "MAX_IMAGE_PIXELS": (Image, 89_478_485),
    "MAX_TEXT_CHUNK": (PngImagePlugin, 2**20),
    "MAX_TEXT_MEMORY": (PngImagePlugin, 2**26),
}
_IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg"),
    *(".png", ".tif", ".tiff", ".webp"),
)
_PILLOW = (
    threading.RLock()
)  # guards Pillow's settings and openers, and the three names below
_n_decoding = 0  # threads that decode now
_PROCESS_SETTINGS: dict = {}  # what to restore when the last of them is done
_OPENERS: dict = {}  # by the pickled opener: why it is not available, or None
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
    if isinstance(
        cell, dict
    ):  # what Hugging Face data sets hold where there is no image
        values = cell.values()
        return bool(cell) and not any(
            isinstance(v, dict) or not is_missing(v) for v in values
        )
    try:
        return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))
    except ArithmeticError:  # a signalling decimal NaN refuses even to be compared
        return True


def image_settings() -> dict:
    """Return the settings of this process that decide which images can be read.

    Worker processes import Pillow anew and know neither limits that the user has raised nor
    formats that a plugin has registered. An encoder carries these settings in its pickles.

    Returns
    -------
    settings : dict
        "limits", from the names of Pillow's settings to values other than Pillow's own, and
        "openers", from the names of formats to the module of the plugin and the pickled opener
        (None where it cannot be pickled). Empty if the user has changed nothing.
    """
    limits = {}
    for name, (module, default) in _LIMITS.items():
        value = _PROCESS_SETTINGS.get(name, getattr(module, name))
        if value != default:
            limits[name] = value
    openers = {}
    for image_format, opener in list(Image.OPEN.items()):
        plugin = _module_name(opener[0])
        if not plugin.startswith("PIL."):
            openers[image_format] = (plugin, _pickled(opener))
    settings = {"limits": limits, "openers": openers}
    return {name: values for name, values in settings.items() if values}


def identify(cell, modality: str, settings: dict | None = None) -> bytes:
    """Digest what a cell shows, so that equal content has one digest wherever it lies.

    Text and encoded image bytes are digested as they are, files by their content, pictures in
    memory by their pixels.

    Parameters
    ----------
    cell : object
        The cell, which is not missing.
    modality : {"text", "image"}
        What it should be.
    settings : dict or None
        The `image_settings` of the process that an encoder comes from.

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
                f"expected a str, got {_type_name(cell)} ({shorten(cell)}). The model encodes "
                "text: select a column of str, convert the column by astype('string'), or mark "
                "the cell as missing by None"
            )
        # A subclass, such as an enum's member, may have an encode or __str__ of its own.
        return _digest(_TEXT, str.encode(cell, "utf-8", "surrogatepass"))
    return _digest_image(_image_source(cell, settings))


def names_image_file(cell: str) -> bool:
    """Tell whether a text is the path of an image file on this machine."""
    return os.path.splitext(cell)[1].lower() in _IMAGE_SUFFIXES and os.path.isfile(cell)


def decode(
    cell, modality: str, digest: bytes | None = None, settings: dict | None = None
):
    """Turn a cell into what backends take: a str that UTF-8 can carry, or an RGB picture.

    Pictures are turned upright by their EXIF orientation; transparent ones are laid on white;
    16-bit ones keep their upper 8 bits; of an animation the first frame counts, or in memory the
    frame that it stands at; colour profiles are left alone. What is handed out is pixels only.
    `settings` are the `image_settings` of the process that an encoder comes from; limits that
    the user has changed in this process take precedence.

    Raises
    ------
    ValueError
        If the image cannot be decoded, is larger than ``PIL.Image.MAX_IMAGE_PIXELS``, or no
        longer has the given digest.
    ImportError
        If no opener of this process reads the image, and a plugin that `settings` names cannot be
        imported. The image may be sound, so it must not count as missing.
    """
    if modality == "text":
        return str.encode(cell, "utf-8", "replace").decode(
            "utf-8"
        )  # lone surrogates become "?"
    source = _image_source(cell, settings)
    if digest is not None and _digest_image(source) != digest:
        raise ValueError("the image was changed while it was being encoded. Run again")
    return _to_rgb(source, cell, settings) if isinstance(source, bytes) else source


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


def _image_source(cell, settings):
    """Reduce an image cell to encoded bytes, or to an RGB picture if it is one in memory."""
    content = _unwrap(cell) if isinstance(cell, dict) else cell
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if isinstance(content, str | os.PathLike):
        return _read(content)
    if isinstance(content, Image.Image):
        return _to_rgb(content, cell, settings)
    if isinstance(content, np.ndarray):
        return _to_rgb(_from_array(content), cell, settings)
    raise TypeError(
        f"expected an image, got {_type_name(cell)} ({shorten(cell)}). An image cell is a path, "
        "bytes, a PIL image, a uint8 array, or a dict with 'bytes' or 'path'"
    )


def _unwrap(cell: dict):
    """Take the bytes, else the path, out of a dict; None if they are not what the key says."""
    for key, kinds in (
        ("bytes", bytes | bytearray | memoryview),
        ("path", str | os.PathLike),
    ):
        content = cell.get(key)
        if not is_missing(content):
            return content if isinstance(content, kinds) else None
    return None


def _read(path) -> bytes:
    path = os.fsdecode(path)
    if "://" in path:
        raise ValueError(
            f"got the URL {_quote(path)}; no URL is ever opened. Download it first"
        )
    if not os.path.isfile(path):  # a pipe or a device would be waited for
        advice = "Check the path, or mark the cell as missing by None"
        if not path.strip() or path.lower() in ("nan", "none", "null"):
            advice = "If there is no image, mark the cell as missing by None"
        elif os.path.isdir(path):
            advice = "It is a directory: give the path of an image in it"
        elif _looks_like_text(path):
            advice = (
                "The model encodes images, and this looks like a text: choose a text model, or "
                "modality='text' if the model encodes both"
            )
        raise FileNotFoundError(f"there is no file {_quote(path)}. {advice}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_SIZE:
            raise ValueError(
                f"the file {_quote(path)} has {size} bytes, too many for a picture"
            )
        return file.read()


def _looks_like_text(path: str) -> bool:
    """Tell words from the path of an image: no suffix, and spaces or no folder."""
    suffix = os.path.splitext(path)[1]
    if len(suffix) > 1 and not any(map(str.isspace, suffix)):
        return False
    return any(map(str.isspace, path)) or os.path.basename(path) == path


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


def _to_rgb(source, cell, settings) -> Image.Image:
    """Decode encoded bytes or a picture in memory into 8-bit RGB; the cell is for the message."""
    settings = settings or {}
    try:
        with _pillow_settings(settings.get("limits", {})):
            unavailable = _register_openers(settings.get("openers", {}))
            try:
                return _upright_rgb(source)
            except Warning:
                # The process turns warnings into errors, and its workers do not: in neither is a
                # warning of Pillow's a reason to refuse an image.
                with _PILLOW, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return _upright_rgb(source)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like at broken files
        if isinstance(error, UnidentifiedImageError) and unavailable:
            raise ImportError(
                f"cannot decode the image {_name(cell, source)}: no known image format. The "
                f"encoder comes from a process in which {unavailable}. Install the plugin, or "
                "register an opener in an importable module"
            ) from error
        raise ValueError(
            f"cannot decode the image {_name(cell, source)}: {_reason(error, source)}. Repair or "
            "drop it, mark it as missing by None, or pass errors='missing'"
        ) from error


def _upright_rgb(source) -> Image.Image:
    picture = source
    if isinstance(source, bytes):
        picture = Image.open(BytesIO(source))
        _refuse_bomb(picture)
    if picture is not source and picture.format == "EPS":
        raise ValueError(
            "it is PostScript, a program that Ghostscript would have to run"
        )
    _load(picture)
    rgb = _turn_upright(_flatten(picture), picture)
    rgb.info = {}  # an orientation left here would be applied again further on
    return rgb


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
def _pillow_settings(limits: dict):
    """Decode under the limits of the process that an encoder comes from, and refuse half images.

    A limit that was changed in this process stays, and truncated files are refused even if the
    process has told Pillow to put up with them. The settings are the process's: they come back
    when the last of the threads that decode is done.
    """
    global _n_decoding
    with _PILLOW:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _PROCESS_SETTINGS.setdefault("LOAD_TRUNCATED_IMAGES", True)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        for name, value in limits.items():
            module, default = _LIMITS[name]
            if getattr(module, name) == default:
                _PROCESS_SETTINGS.setdefault(name, default)
                setattr(module, name, value)
        _n_decoding += 1
    try:
        yield
    finally:
        with _PILLOW:
            _n_decoding -= 1
            if _n_decoding == 0:
                for name, value in _PROCESS_SETTINGS.items():
                    module = _LIMITS[name][0] if name in _LIMITS else ImageFile
                    setattr(module, name, value)
                _PROCESS_SETTINGS.clear()


def _register_openers(openers: dict) -> str:
    """Register openers of the process that an encoder comes from; name those that are absent."""
    unavailable = []
    for image_format, (plugin, pickled) in openers.items():
        with _PILLOW:
            if pickled not in _OPENERS:
                _OPENERS[pickled] = _register_opener(image_format, pickled)
            reason = _OPENERS[pickled]
        if reason is not None:
            unavailable.append(
                f"{plugin} opens {image_format} files, which fails here ({reason})"
            )
    return ", and ".join(unavailable)


def _register_opener(image_format: str, pickled: bytes | None) -> str | None:
    """Register one opener, unless a plugin has; return why that fails."""
    Image.preinit()  # Pillow's own openers come first, as in the other process
    if image_format in Image.OPEN and not _module_name(
        Image.OPEN[image_format][0]
    ).startswith("PIL."):
        return None
    if pickled is None:
        return "it cannot be pickled"
    try:
        opener = pickle.loads(pickled)
    except Exception as error:  # whatever importing a module may raise
        return f"{type(error).__name__}: {error}"
    Image.register_open(image_format, *opener)
    return None


def _module_name(function) -> str:
    return getattr(function, "__module__", None) or type(function).__module__


def _pickled(opener) -> bytes | None:
    """Pickle an opener by its name if its module can be imported, else by its code."""
    by_value_if_need_be = joblib.wrap_non_picklable_objects(opener, keep_wrapper=False)
    try:
        return pickle.dumps(by_value_if_need_be)
    except Exception:  # an extension's object; named when it is needed
        return None


def _load(picture: Image.Image) -> None:
    """Read the pixels, or fail as often as asked: Pillow fails once, then shows what it has got."""
    tile = list(getattr(picture, "tile", ()))
    if tile and picture.fp is None:
        raise ValueError(
            "its file is closed, but its pixels are not read; call its load() before"
        )
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
        raise ValueError(
            "its pixels are floats, of unknown range; convert it to 8 bits first"
        )
    if picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format == "PPM"
    ):
        return _flatten_16_bits(picture)
    if picture.mode == "I":
        low, high = picture.getextrema()
        if low < 0 or high > 255:
            raise ValueError(
                f"its pixels run from {low} to {high}; convert it to 8 bits first"
            )
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
    except Warning:
        raise
    except Exception:  # as viewers do: broken metadata does not make a broken picture
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def _name(cell, source) -> str:
    """Name an image by its path where it has one, and its size."""
    if not isinstance(source, bytes):
        return "in memory"
    path = cell.get("path") if isinstance(cell, dict) else cell
    named = (
        f"{_quote(os.fsdecode(path))} " if isinstance(path, str | os.PathLike) else ""
    )
    return f"{named}({len(source)} bytes)"


def _reason(error: Exception, source) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no known image format{_resemblance(source)}"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    return str(error).rstrip(". ") or type(error).__name__


def _resemblance(source: bytes) -> str:
    """Name the content of a file that is often saved in place of an image."""
    start = source[:64].lstrip().lower()
    if not start:
        return ", it is empty"
    if start.startswith(b"version https://git-lfs"):
        return ", it is a pointer of git-lfs: run `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html")):
        return ", it is a web page"
    return ""


def _type_name(cell) -> str:
    return f"{type(cell).__module__}.{type(cell).__qualname__}".removeprefix(
        "builtins."
    )


def _quote(path: str, width: int = 200) -> str:
    """Quote a path, of which the end tells most; a text taken for a path can be of any length."""
    return str.__repr__(path if len(path) <= width else "…" + path[1 - width :])


def shorten(cell, width: int = 40) -> str:
    """Represent a cell for a message, whatever its class and size."""
    try:
        text = repr(cell[:width] if isinstance(cell, str | bytes | bytearray) else cell)
    except Exception:  # a class of the user's, or an int of too many digits
        text = object.__repr__(cell)
    return text if len(text) <= width else text[: width - 1] + "…"
