"""Validation, hashing and decoding of text and image cells."""

import os
import pickle
import re
import threading
import warnings
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO

import joblib
import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

# Part of every fingerprint. Increase it when a decoding rule below changes, so that vectors
# made under the old rule are not returned under the new one.
DECODING_VERSION = 2
# Minimum sides of a JPEG image that is decoded at reduced size, relative to the input of the
# model. Part of the fingerprints of encoders with an `image_size`. bench_encode.py prints how
# close the vectors of photographs are to full decoding.
DRAFT_RATIO = 4

_DIGEST_SIZE = 16  # bytes; a collision becomes likely at 2**64 cells
# In bytes. An image within Pillow's limit of pixels is smaller, even uncompressed.
_MAX_FILE_SIZE = 2**30
_LONGEST_CELL, _LONGEST_PATH = 40, 200  # characters in a message

# Pillow's settings that decide which images can be read: their module and their default.
_LIMITS = {
    "MAX_IMAGE_PIXELS": (Image, 89_478_485),
    "MAX_TEXT_CHUNK": (PngImagePlugin, 2**20),
    "MAX_TEXT_MEMORY": (PngImagePlugin, 2**26),
}
_IMAGE_SUFFIXES = set(".avif .bmp .gif .heic .jpeg .jpg .png .tif .tiff .webp".split())
_TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's settings and openers belong to the process. The lock guards them and the three
# names below.
_PILLOW_LOCK = threading.RLock()
_n_decoding_threads = 0
_SAVED_SETTINGS: dict = {}  # to be restored when no thread decodes any more
_OPENER_ERRORS: dict = {}  # by pickled opener: why it is not available, or None


def is_missing(cell) -> bool:
    """Return whether a cell is None, NaN, NaT, NA, or a dict with only such values."""
    if isinstance(cell, str):  # the most frequent type; pandas.isna would be slow
        return False
    if isinstance(cell, dict):  # data sets of Hugging Face mark missing images this way
        return bool(cell) and all(_is_missing_scalar(value) for value in cell.values())
    return _is_missing_scalar(cell)


def _is_missing_scalar(value) -> bool:
    try:
        return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))
    except ArithmeticError:  # a signalling decimal NaN cannot even be compared
        return True


def image_settings() -> dict:
    """Return the settings of this process that decide which images can be read.

    Worker processes import Pillow anew, without the limits that the user has raised and
    without the formats that a plugin has registered. An encoder therefore carries these
    settings in its pickles.

    Returns
    -------
    settings : dict
        "limits" maps names of Pillow's settings to values that differ from Pillow's
        defaults. "openers" maps names of formats to the module of the plugin and the
        pickled opener, or None if it cannot be pickled. Empty if the user has changed
        nothing.
    """
    limits = {}
    for name, (module, default) in _LIMITS.items():
        value = _SAVED_SETTINGS.get(name, getattr(module, name))
        if value != default:
            limits[name] = value
    openers = {}
    for image_format, opener in list(Image.OPEN.items()):
        if not _belongs_to_pillow(opener):
            openers[image_format] = (_module_name(opener), _pickle_opener(opener))
    settings = {"limits": limits, "openers": openers}
    return {name: values for name, values in settings.items() if values}


def identify(cell, modality: str, settings: dict | None = None) -> bytes:
    """Hash the content of a cell, so that equal content has an equal hash.

    Text and encoded image bytes are hashed as they are, files by their content, and
    images in memory by their pixels.

    Parameters
    ----------
    cell : object
        The cell, which is not missing.
    modality : {"text", "image"}
        Modality that the cell must have.
    settings : dict or None
        The `image_settings` of the process in which the encoder was pickled.

    Returns
    -------
    digest : bytes
        The hash, of 16 bytes.

    Raises
    ------
    TypeError
        If the type of the cell does not fit the modality.
    ValueError
        If the cell is a URL, a file that is too large, or an image in memory that
        cannot be read.
    OSError
        If the cell is a path without a readable file.
    """
    if modality == "text":
        if not isinstance(cell, str):
            raise TypeError(
                f"expected a str, got {_type_name(cell)} ({shorten(cell)}). The model encodes "
                "text: select a column of str, convert the column with astype('string'), or "
                "use None for a missing text"
            )
        return hash_text(cell)
    return _hash_image(_image_source(cell, settings))


def hash_text(cell: str) -> bytes:
    """Hash a text as `identify` does, without checking its type."""
    # A subclass, such as a member of an enum, may override encode and __str__.
    content = str.encode(cell, "utf-8", "surrogatepass")
    hasher = _TEXT.copy()
    hasher.update(len(content).to_bytes(8, "little") + content)
    return hasher.digest()


def names_image_file(cell: str) -> bool:
    """Return whether a text is the path of an existing image file."""
    return os.path.splitext(cell)[1].lower() in _IMAGE_SUFFIXES and os.path.isfile(cell)


def n_pixels(
    cell, modality: str, settings: dict | None = None, min_size: int | None = None
) -> int:
    """Return the number of pixels that `decode` has in memory, from the header of a file.

    Parameters
    ----------
    cell : object
        The cell, which is not missing.
    modality : {"text", "image"}
        Modality of the cell.
    settings, min_size
        As in `decode`.

    Returns
    -------
    n_pixels : int
        Number of pixels; 0 for texts, and for images that cannot be opened.
    """
    if modality == "text":
        return 0
    content = _unwrap(cell) if isinstance(cell, dict) else cell
    if isinstance(content, Image.Image):
        return content.width * content.height
    if isinstance(content, np.ndarray):
        return int(np.prod(content.shape[:2]))
    settings = settings or {}
    try:
        with _pillow_settings(settings.get("limits", {})):
            _register_openers(settings.get("openers", {}))
            if isinstance(content, bytes | bytearray | memoryview):
                content = BytesIO(content)
            elif not os.path.isfile(content):  # opening a pipe could block
                return 0
            with Image.open(content) as image:
                # libjpeg keeps a progressive image in memory at its full size.
                if min_size is not None and not image.info.get("progressive"):
                    _draft(image, min_size)
                return image.width * image.height
    except Exception:  # raised again by `decode`, with a message
        return 0


def decode(
    cell,
    modality: str,
    digest: bytes | None = None,
    settings: dict | None = None,
    min_size: int | None = None,
):
    """Decode a cell to the input of backends: valid UTF-8 text or an upright RGB image.

    Images are rotated by their EXIF orientation, transparent images are composited on
    white, and 16-bit images keep their upper 8 bits. Of an animated file the first
    frame is decoded, of an animation in memory the current one. Colour profiles are
    ignored. The result has pixels but no metadata.

    Parameters
    ----------
    cell : object
        The cell, which is not missing.
    modality : {"text", "image"}
        Modality of the cell.
    digest : bytes or None
        Hash of the cell when it was identified, to detect later changes.
    settings : dict or None
        The `image_settings` of the process in which the encoder was pickled. Limits
        that the user has changed in this process take precedence.
    min_size : int or None
        Smaller side, in pixels, to which the model resizes images. If not None, a JPEG
        file is decoded at 1/8, 1/4 or 1/2 of its size, which is faster and needs less
        memory, if both sides are multiples of the divisor and stay at least
        `DRAFT_RATIO` times `min_size`. Pixels differ slightly from the resized full
        image. Images in memory and other formats are decoded at full size.

    Returns
    -------
    decoded : str or PIL.Image.Image
        Text, or an image of mode "RGB".

    Raises
    ------
    ValueError
        If the image cannot be decoded, has more than ``PIL.Image.MAX_IMAGE_PIXELS``
        pixels, or has changed since `digest` was computed.
    ImportError
        If this process cannot open the format of the image, and a plugin in `settings`
        cannot be imported. The image may be intact, so it must not count as missing.
    """
    if modality == "text":
        encoded = str.encode(cell, "utf-8", "replace")  # lone surrogates become "?"
        return encoded.decode("utf-8")
    source = _image_source(cell, settings)
    if digest is not None and _hash_image(source) != digest:
        raise ValueError("the image was changed while it was being encoded. Run again")
    if isinstance(source, bytes):
        return _to_rgb(source, cell, settings, min_size)
    return source


def _start_hash(kind: bytes):
    """Start a hash with the kind of content, so that equal bytes of two kinds differ."""
    return blake2b(len(kind).to_bytes(8, "little") + kind, digest_size=_DIGEST_SIZE)


_TEXT, _FILE, _RGB = _start_hash(b"text"), _start_hash(b"file"), _start_hash(b"rgb")


def _hash_parts(start, *parts: bytes) -> bytes:
    """Hash the length and content of each part, so that two lists of parts differ."""
    hasher = start.copy()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def _hash_image(source) -> bytes:
    if isinstance(source, bytes):
        return _hash_parts(_FILE, source)
    return _hash_parts(_RGB, repr(source.size).encode(), source.tobytes())


def _image_source(cell, settings):
    """Return the encoded bytes of an image cell, or an RGB image if it is in memory."""
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
        f"expected an image, got {_type_name(cell)} ({shorten(cell)}). Pass a path, bytes, a "
        "PIL image, a uint8 array, or a dict with 'bytes' or 'path'"
    )


def _unwrap(cell: dict):
    """Return the bytes in a dict, else its path; None if the value has another type."""
    types = {"bytes": bytes | bytearray | memoryview, "path": str | os.PathLike}
    for key, expected_type in types.items():
        content = cell.get(key)
        if isinstance(content, expected_type):
            return content
        if not is_missing(content):
            return None
    return None


def _read(path) -> bytes:
    path = os.fsdecode(path)
    if "://" in path:
        raise ValueError(
            f"URLs are not opened: {_quote(path)}. Download the image first"
        )
    if not os.path.isfile(path):  # opening a pipe or a device could block
        raise FileNotFoundError(
            f"there is no file {_quote(path)}. {_path_advice(path)}"
        )
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_SIZE:
            raise ValueError(
                f"the file {_quote(path)} has {size} bytes, too many for an image"
            )
        return file.read()


def _path_advice(path: str) -> str:
    if not path.strip() or path.lower() in ("nan", "none", "null"):
        return "Use None for a missing image"
    if os.path.isdir(path):
        return "It is a directory: pass the path of an image in it"
    if _looks_like_text(path):
        return (
            "The model encodes images, and this looks like a text: choose a text model, or "
            "pass modality='text' if the model encodes both"
        )
    return "Check the path, or use None for a missing image"


def _looks_like_text(path: str) -> bool:
    """Return whether a path has no suffix and either white space or no folder."""
    suffix = os.path.splitext(path)[1]
    if len(suffix) > 1 and not re.search(r"\s", suffix):
        return False
    return bool(re.search(r"\s", path)) or os.path.basename(path) == path


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


def _to_rgb(source, cell, settings, min_size=None) -> Image.Image:
    """Decode encoded bytes or an image in memory to RGB; messages name the `cell`."""
    settings = settings or {}
    try:
        with _pillow_settings(settings.get("limits", {})):
            unavailable = _register_openers(settings.get("openers", {}))
            return _upright_rgb_without_warnings(source, min_size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        if isinstance(error, UnidentifiedImageError) and unavailable:
            raise ImportError(
                f"cannot decode the image {_name(cell, source)}: no known image format. The "
                f"encoder was pickled in a process in which {unavailable}. Install the "
                "plugin, or register an opener in an importable module"
            ) from error
        raise ValueError(
            f"cannot decode the image {_name(cell, source)}: {_reason(error, source)}. Repair "
            "or drop it, or use None for a missing image"
        ) from error


def _upright_rgb_without_warnings(source, min_size) -> Image.Image:
    """Decode an image, also where a filter of the process turns warnings into errors.

    Worker processes do not inherit such filters. An image must be readable in all
    processes or in none.
    """
    try:
        return _upright_rgb(source, min_size)
    except Warning:
        with _PILLOW_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _upright_rgb(source, min_size)


def _upright_rgb(source, min_size) -> Image.Image:
    image = source
    if isinstance(source, bytes):
        image = Image.open(BytesIO(source))
        _check_n_pixels(image)
        if image.format == "EPS":
            raise ValueError(
                "it is PostScript, which Ghostscript would have to execute"
            )
        if min_size is not None:
            _draft(image, min_size)
    _load(image)
    rgb = _turn_upright(_flatten(image), image)
    rgb.info = {}  # a processor might apply an orientation in it again
    return rgb


def _check_n_pixels(image: Image.Image) -> None:
    """Raise an error before the pixels are loaded; Pillow would only warn."""
    limit = Image.MAX_IMAGE_PIXELS
    n_pixels = image.width * image.height
    if limit is not None and n_pixels > limit:
        raise ValueError(
            f"it has {n_pixels} pixels, and PIL.Image.MAX_IMAGE_PIXELS is {limit}; raise this "
            "limit if you trust the image"
        )


def _draft(image: Image.Image, min_size: int) -> None:
    """Reduce the size at which a JPEG file will be decoded, if it is large enough."""
    if not getattr(image, "quantization", None):  # no JPEG, or a lossless one
        return
    for divisor in (8, 4, 2):
        size = image.width // divisor, image.height // divisor
        # A partial pixel at the border would stretch the image.
        is_exact = image.width % divisor == 0 and image.height % divisor == 0
        if is_exact and min(size) >= DRAFT_RATIO * min_size:
            image.draft(None, size)
            return


@contextmanager
def _pillow_settings(limits: dict):
    """Set the limits of the process in which the encoder was pickled.

    A limit that was changed in this process stays. Truncated files raise an error even
    if the process has set ``LOAD_TRUNCATED_IMAGES``. Settings are shared by all
    threads, so they are restored when the last decoding thread is done.
    """
    global _n_decoding_threads
    with _PILLOW_LOCK:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _SAVED_SETTINGS.setdefault("LOAD_TRUNCATED_IMAGES", True)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        for name, value in limits.items():
            module, default = _LIMITS[name]
            if getattr(module, name) == default:
                _SAVED_SETTINGS.setdefault(name, default)
                setattr(module, name, value)
        _n_decoding_threads += 1
    try:
        yield
    finally:
        with _PILLOW_LOCK:
            _n_decoding_threads -= 1
            if _n_decoding_threads == 0:
                _restore_settings()


def _restore_settings() -> None:
    for name, value in _SAVED_SETTINGS.items():
        module = _LIMITS[name][0] if name in _LIMITS else ImageFile
        setattr(module, name, value)
    _SAVED_SETTINGS.clear()


def _register_openers(openers: dict) -> str:
    """Register pickled openers; return a message about those that are not available."""
    unavailable = []
    for image_format, (plugin, pickled) in openers.items():
        with _PILLOW_LOCK:
            if pickled not in _OPENER_ERRORS:
                _OPENER_ERRORS[pickled] = _register_opener(image_format, pickled)
            reason = _OPENER_ERRORS[pickled]
        if reason is not None:
            unavailable.append(
                f"{plugin} opens {image_format} files, which fails here ({reason})"
            )
    return ", and ".join(unavailable)


def _register_opener(image_format: str, pickled: bytes | None) -> str | None:
    """Register one opener, unless a plugin already has; return the reason of a failure."""
    Image.preinit()  # registers Pillow's openers first, as in the other process
    if image_format in Image.OPEN and not _belongs_to_pillow(Image.OPEN[image_format]):
        return None
    if pickled is None:
        return "it cannot be pickled"
    try:
        opener = pickle.loads(pickled)
    except Exception as error:  # importing a module may raise anything
        return f"{type(error).__name__}: {error}"
    Image.register_open(image_format, *opener)
    return None


def _belongs_to_pillow(opener) -> bool:
    return _module_name(opener).startswith("PIL.")


def _module_name(opener) -> str:
    """Return the module of an opener, a pair of functions as in `PIL.Image.OPEN`."""
    factory = opener[0]
    return getattr(factory, "__module__", None) or type(factory).__module__


def _pickle_opener(opener) -> bytes | None:
    """Pickle an opener by reference if its module can be imported, else by value."""
    wrapped = joblib.wrap_non_picklable_objects(opener, keep_wrapper=False)
    try:
        return pickle.dumps(wrapped)
    except Exception:  # an object of an extension; an error names it when it is needed
        return None


def _load(image: Image.Image) -> None:
    """Load the pixels.

    After a failure, Pillow would return the partial image at the next attempt.
    Restoring the tile makes each attempt fail.
    """
    tile = list(getattr(image, "tile", ()))
    if tile and image.fp is None:
        raise ValueError(
            "its file was closed before its pixels were read; call its load() before"
        )
    try:
        image.load()
    except Exception:
        if tile:
            image.tile = tile
        raise


def _flatten(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparent parts on white."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode == "F":
        raise ValueError(
            "its pixels are floats of unknown range; convert it to 8 bits first"
        )
    is_16_bit_ppm = image.mode == "I" and image.format == "PPM"
    if image.mode.startswith("I;16") or is_16_bit_ppm:
        return _flatten_16_bits(image)
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 255:
            raise ValueError(
                f"its pixels range from {low} to {high}; convert it to 8 bits first"
            )
    if (
        image.mode == "La"
    ):  # the only premultiplied mode that Pillow cannot turn to RGBA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = _with_8_bit_key(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _flatten_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _with_8_bit_key(image: Image.Image) -> Image.Image:
    """Shift a 16-bit transparent colour in the way that Pillow shifts 16-bit RGB pixels."""
    key = image.info.get("transparency")
    if image.mode != "RGB" or not isinstance(key, tuple) or max(key) <= 255:
        return image
    image = image.copy()
    image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _turn_upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Transpose pixels by the EXIF orientation of their image, if it can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        transposition = _TRANSPOSITIONS.get(orientation)
    except Warning:
        raise
    except Exception:  # broken metadata do not make an image unreadable
        return rgb
    if transposition is None:
        return rgb
    return rgb.transpose(transposition)


def _name(cell, source) -> str:
    """Name an image by its size and, if it has one, its path."""
    if not isinstance(source, bytes):
        return "in memory"
    size = f"({len(source)} bytes)"
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(path, str | os.PathLike):
        return f"{_quote(os.fsdecode(path))} {size}"
    return size


def _reason(error: Exception, source) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no known image format{_resemblance(source)}"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust the image"
    return str(error).rstrip(". ") or type(error).__name__


def _resemblance(source: bytes) -> str:
    """Recognise content that is often saved in place of an image."""
    start = source[:64].lstrip().lower()
    if not start:
        return ", it is empty"
    if start.startswith(b"version https://git-lfs"):
        return ", it is a git-lfs pointer: run `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html")):
        return ", it is a web page"
    return ""


def _type_name(cell) -> str:
    cls = type(cell)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _quote(path: str) -> str:
    """Quote the end of a path, since a text passed as a path may have any length."""
    if len(path) > _LONGEST_PATH:
        path = "…" + path[1 - _LONGEST_PATH :]
    return str.__repr__(path)


def shorten(cell) -> str:
    """Return a short representation of a cell of any type and size for a message."""
    try:
        if isinstance(cell, str | bytes | bytearray):
            cell = cell[:_LONGEST_CELL]
        text = repr(cell)
    except Exception:  # a broken __repr__, or an int with too many digits
        text = object.__repr__(cell)
    if len(text) > _LONGEST_CELL:
        text = text[: _LONGEST_CELL - 1] + "…"
    return text
