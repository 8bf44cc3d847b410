"""Decide the kind of a column, and say why."""

import datetime
import json
import numbers
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from io import BytesIO

import numpy as np
import pandas as pd
from PIL import Image

from sklembed.encoders.cells import shorten
from sklembed.vectorizer.parsing import (
    BOOLEAN_PAIRS,
    DAYS_AS_DIGITS,
    distinct,
    find_date_format,
    has_image_suffix,
    is_image_object,
    is_null_string,
    looks_like_base64_image,
    parse_number,
    parse_text,
)

KINDS = (
    "text",
    "name",
    "image",
    "numeric",
    "categorical",
    "datetime",
    "boolean",
    "dropped",
)
TABLE_KINDS = ("numeric", "categorical", "datetime", "boolean")

# Distinct cells that the rules read, spread evenly.
SAMPLE_SIZE = 1000
_N_OPENED_IMAGES = 20
# Share of the sample that must be numbers, dates, URLs or images.
_LEAST_SHARE = 0.9
_MOST_CATEGORIES = 40
# Rows for each category, on average: of single words, and of texts.
_LEAST_REPEATS = {False: 2, True: 5}
# Share of distinct cells of at least two words in a column of text.
_LEAST_MULTI_WORD = 0.4
_LEAST_ROWS_OF_IDS = 20
# Range of unique integers in relation to their number: half of the rows of a counter,
# as in a fold, still count as dense.
_LARGEST_ID_RANGE = 2.5
_MOST_SHARED_WORDS = 0.1
_LEAST_WITH_DIGITS = 0.7
_LEAST_ID_LENGTH = 8  # shorter codes, such as postal codes, may have telling parts
_CODE_LENGTH = 9  # digits of equal number, as in bar codes and phone numbers

_WORD = re.compile(r"[^\W\d_]{2,}")
_TOKEN = re.compile(r"[^\W\d_]{2,}|\d+")
_ALPHANUMERIC = re.compile(r"[^\W_]+")
# Scripts that are written without spaces between words: Thai, Lao, Burmese, Khmer,
# Japanese and Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
)
_URL = re.compile(r"^(https?|ftp|s3|gs)://\S+$|^www\.\S+$", re.IGNORECASE)
_NAME_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_ID_NAMES = frozenset(
    "id ids uuid guid key pk index idx rowid userid identifier ean isbn barcode serial "
    "phone".split()
)
_MEASURE_NAMES = frozenset(
    "rank ranking position place year age rating score level time day week month hour "
    "date count price total population".split()
)
_YEARS = (1500, 2200)


@dataclass
class ColumnReading:
    """How a column is read.

    `form` is the decimal separator of numbers or the format of dates. `are_texts`:
    whether all observed cells are str. `is_dirty`: whether `fit` met cells of another
    kind. `has_absent_images`: whether names are paths of images, but no such file
    exists. `blocks`: the blocks of the column by the parameter that sets their encoder.
    """

    name: str
    kind: str
    reason: str
    n_rows: int
    n_missing: int
    n_distinct: int
    form: str | None = None
    are_texts: bool = False
    is_dirty: bool = False
    has_absent_images: bool = False
    encoder: str = ""
    seconds: float = 0.0
    blocks: dict[str, str] = field(default_factory=dict)


def read_column(cells: pd.Series, name: str, kind: str | None = None) -> ColumnReading:
    """Decide the kind of a column.

    Parameters
    ----------
    cells : Series
        The column.
    name : str
        Its name, which may tell an identifier.
    kind : str or None, default=None
        The kind that the user has set.

    Returns
    -------
    reading : ColumnReading
        The kind and its reason.

    Raises
    ------
    ValueError
        If cells are lists, dicts or other objects that are not images, and the user has
        not set the kind.
    """
    codes, values = distinct(cells)
    reading = start_reading(name, codes, values)
    sample = _evenly(values).tolist()
    reading.are_texts = all(isinstance(value, str) for value in sample)
    if kind is not None:
        reading.kind, reading.reason = kind, "set by the parameter kinds"
        reading.form = _form_of(kind, cells, sample)
        return reading
    if "other" in map(_type_of, sample):
        raise ValueError(_message_on_objects(name, cells))
    repeats = (reading.n_rows - reading.n_missing) / max(len(values), 1)
    if not len(values) or all(is_null_string(value) for value in values):
        return _as(reading, "dropped", "all cells are missing")
    if len(values) == 1 and reading.n_missing == 0:
        return _as(reading, "dropped", f"constant: all cells are {shorten(values[0])}")
    _read_by_dtype(reading, cells, values, sample, repeats)
    if len(values) == 1 and reading.kind not in ("image", "dropped"):
        reason = f"cells are {shorten(values[0])} or missing"
        return _as(reading, "categorical", reason)
    return reading


def start_reading(name: str, codes: np.ndarray, values) -> ColumnReading:
    """Return a reading without a kind, with the counts of a column."""
    return ColumnReading(name, "", "", len(codes), int((codes < 0).sum()), len(values))


def _evenly(values):
    """Return a sample of values that are spread evenly over an array."""
    if len(values) <= SAMPLE_SIZE:
        return values
    return values[np.linspace(0, len(values) - 1, SAMPLE_SIZE).astype(np.intp)]


def _form_of(kind, cells, sample):
    """Return the decimal separator or the date format of a column of a given kind."""
    observed = [parse_text(value).strip() for value in sample]
    observed = [text for text in observed if not is_null_string(text)]
    if kind == "numeric":
        return _decimal_separator(observed)[0]
    is_date = pd.api.types.is_datetime64_any_dtype(cells.dtype)
    if kind == "datetime" and observed and not is_date:
        return find_date_format(observed, least_share=0.5)
    return None


def _as(reading, kind, reason):
    reading.kind, reading.reason = kind, reason
    return reading


def _read_by_dtype(reading, cells, values, sample, repeats):
    """Set the kind by the dtype of the column, or by the types of its cells."""
    dtype = cells.dtype
    if isinstance(dtype, pd.CategoricalDtype) and len(values) <= _MOST_CATEGORIES:
        return _as(reading, "categorical", f"{len(values)} categories")
    if pd.api.types.is_bool_dtype(dtype):
        return _as(reading, "boolean", "true and false")
    if pd.api.types.is_timedelta64_dtype(dtype):
        return _as(reading, "numeric", "durations, in seconds")
    is_date = pd.api.types.is_datetime64_any_dtype(dtype)
    if is_date or isinstance(dtype, pd.PeriodDtype):
        return _as(reading, "datetime", "dates")
    types = Counter(_type_of(value) for value in sample)
    most_frequent = types.most_common(1)[0][0]
    if types["image"] and most_frequent == "image":
        return _read_images(reading, sample)
    if types["image"]:
        raise ValueError(
            f"Column {reading.name!r} mixes images with other cells "
            f"({types['image']} of {len(sample)} distinct cells that were read). Make "
            "them one type, or set kinds={" + repr(reading.name) + ": 'dropped'}."
        )
    if types["boolean"] == len(sample):
        return _as(reading, "boolean", "true and false")
    if types["date"] == len(sample):
        return _as(reading, "datetime", "dates")
    if types["duration"] == len(sample):
        return _as(reading, "numeric", "durations, in seconds")
    is_number = types["number"] + types["boolean"] == len(sample)
    if is_number and not isinstance(dtype, pd.CategoricalDtype):
        return _read_numbers(reading, values, sample)
    return _read_texts(reading, values, repeats)


def _type_of(cell):
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, bool | np.bool_):
        return "boolean"
    if isinstance(cell, datetime.timedelta | np.timedelta64):
        return "duration"
    if isinstance(cell, numbers.Real | Decimal):
        return "number"
    if isinstance(cell, datetime.date | np.datetime64):
        return "date"
    return "image" if is_image_object(cell) else "other"


def _message_on_objects(name, cells):
    """Return the message about the first cell that is a list, a dict or the like."""
    for row, cell in enumerate(cells):
        codes, _ = distinct(cells.iloc[[row]])
        if codes[0] >= 0 and _type_of(cell) == "other":
            break
    advice = "Convert its cells to texts or numbers"
    if isinstance(cell, complex):
        advice = "Complex data not supported. Make it two columns"
    elif isinstance(cell, list | tuple | set | frozenset):
        advice = (
            "Make it one column for each value, for example with "
            "sklearn.preprocessing.MultiLabelBinarizer, or join its values to a text"
        )
    elif isinstance(cell, dict):
        advice = (
            "Make it one column for each key, for example with pandas.json_normalize"
        )
    elif isinstance(cell, np.ndarray):
        advice = "Make it one column for each number with numpy.stack, or uint8 images"
    return (
        f"Row {row} of column {name!r} is a {type(cell).__name__} ({shorten(cell)}), "
        "but cells should be texts, numbers, dates or images. "
        f"{advice}, or set kinds={{{name!r}: 'dropped'}}."
    )


def _read_images(reading, sample):
    encoded = []
    for cell in sample:
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes | bytearray | memoryview):
            encoded.append(bytes(content))
    step = max(len(encoded) // _N_OPENED_IMAGES, 1)
    encoded = encoded[::step]
    n_images = sum(_can_open(content) for content in encoded)
    if encoded and n_images == 0:
        return _as(reading, "dropped", "bytes that are not images")
    return _as(reading, "image", "images")


def _can_open(content):
    """Return whether Pillow recognises bytes as an image, without decoding them."""
    try:
        with Image.open(BytesIO(content)):
            return True
    except Exception:  # Pillow's plugins raise errors of any type
        return False


def _read_numbers(reading, values, sample):
    """Set the kind of a column of numbers: boolean, identifier, dates or numeric."""
    if len(values) == 2 and set(sample) == {0, 1}:
        return _as(reading, "boolean", "0 and 1")
    are_integers = all(isinstance(value, numbers.Integral) for value in sample)
    if are_integers:
        reason = _reason_for_id(reading, values)
        if reason:
            return _as(reading, "dropped", reason)
        texts = [str(value) for value in sample]
        if find_date_format(texts, 1.0) == DAYS_AS_DIGITS:
            reading.form = DAYS_AS_DIGITS
            return _as(reading, "datetime", "dates as YYYYMMDD")
    return _as(reading, "numeric", "integers" if are_integers else "numbers")


def _reason_for_id(reading, values):
    """Return why unique integers are an identifier; empty if they may be a measure."""
    parts = _NAME_PARTS.findall(reading.name)
    parts = {part.lower() for part in parts}
    is_unique = reading.n_distinct == reading.n_rows  # and none is missing
    if not is_unique or reading.n_rows < _LEAST_ROWS_OF_IDS or parts & _MEASURE_NAMES:
        return ""
    if parts & _ID_NAMES:
        return "identifier: unique integers and the column's name"
    low, high = int(min(values)), int(max(values))
    are_years = _YEARS[0] <= low and high <= _YEARS[1]
    if high - low < _LARGEST_ID_RANGE * len(values) and not are_years:
        return f"identifier: unique integers from {low} to {high}"
    return ""


def _read_texts(reading, values, repeats):
    """Set the kind of a column of texts, which may be written numbers or dates."""
    texts = [parse_text(value).strip() for value in _evenly(values)]
    sample = [text for text in texts if not is_null_string(text)]
    # Exact where it matters, as few distinct values are all in the sample.
    n_categories = reading.n_distinct - len(texts) + len(sample)
    words = {text.lower() for text in sample}
    for pair in BOOLEAN_PAIRS:
        if words == set(pair):
            return _as(reading, "boolean", " and ".join(pair))
    if len(sample) == 1:
        return _as(reading, "categorical", f"cells are {shorten(sample[0])} or missing")
    if _share(sample, looks_like_base64_image) >= _LEAST_SHARE:
        return _as(reading, "image", "images in base64")
    if _share(sample, has_image_suffix) >= _LEAST_SHARE:
        n_files = sum(map(os.path.isfile, sample))
        if n_files:
            return _as(reading, "image", "paths of image files")
        reading.has_absent_images = True
        reason = (
            f"names of image files of which none exists, such as {shorten(sample[0])}"
        )
        return _as(reading, "name", reason)
    reading.form = find_date_format(sample, _LEAST_SHARE)
    if reading.form is not None:
        return _as(reading, "datetime", f"dates as {reading.form}")
    decimal, share = _decimal_separator(sample)
    if share >= _LEAST_SHARE and not _are_codes(sample):
        reading.form = decimal
        return _read_written_numbers(reading, values, texts)
    return _read_words(reading, sample, n_categories, repeats)


def _share(sample, test):
    return sum(map(bool, map(test, sample))) / len(sample)


def _decimal_separator(sample):
    """Return the separator by which most texts are numbers, and their share."""
    best, best_share = ".", 0.0
    for decimal in (".", ","):
        parsed = [parse_number(text, decimal) for text in sample]
        share = 1 - np.isnan(parsed).mean() if parsed else 0.0
        if share > best_share:
            best, best_share = decimal, share
    return best, best_share


def _are_codes(sample):
    """Return whether digits are codes: with leading zeros, or long and equally long."""
    if any(text[0] == "0" and text.isdigit() and len(text) > 1 for text in sample):
        return True
    length = len(sample[0])
    if length < _CODE_LENGTH:
        return False
    return all(text.isdigit() and len(text) == length for text in sample)


def _read_written_numbers(reading, values, texts):
    if all(text.isdigit() for text in texts):
        written = [parse_number(value, ".") for value in values]
        is_number = not np.isnan(written).any()
        reason = _reason_for_id(reading, written) if is_number else ""
        if reason:
            return _as(reading, "dropped", reason)
    return _as(reading, "numeric", "numbers as text")


def _read_words(reading, sample, n_categories, repeats):
    """Set the kind of texts that are neither numbers nor dates: by their words."""
    is_distinct = repeats == 1
    n_words = np.array([_n_words(text) for text in sample])
    share_multi = float((n_words >= 2).mean())
    is_prose = share_multi >= _LEAST_MULTI_WORD
    description = f"{n_words.mean():.1f} words per cell"
    are_urls = _share(sample, _URL.match) >= _LEAST_SHARE
    is_json = _share(sample, _is_json) >= _LEAST_SHARE
    is_long = n_words.mean() >= 8
    is_prose = is_prose and not (are_urls or is_json)
    is_repeated = repeats >= _LEAST_REPEATS[is_prose]
    are_categories = n_categories <= _MOST_CATEGORIES and is_repeated
    if are_categories and not (is_long and is_prose):
        return _as(reading, "categorical", f"{n_categories} categories")
    if is_prose:
        return _as(reading, "text", description)
    if is_distinct and _are_ids(sample):
        return _as(
            reading, "dropped", "identifier: distinct codes without shared words"
        )
    if are_urls:
        return _as(reading, "name", "URLs")
    if is_json:
        return _as(reading, "name", "JSON")
    return _as(reading, "name", f"short texts or codes: {description}")


def _n_words(text):
    """Count the words of a text: parts between spaces that are mostly letters."""
    n_words = len(_UNSPACED.findall(text)) // 2
    for part in text.split():
        letters = sum(map(len, _WORD.findall(part)))
        n_words += letters >= 2 and letters >= 0.6 * len(part)
    return n_words


def _is_json(text):
    if text[0] not in "{[" or text[-1] not in "]}":
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _are_ids(sample):
    """Return whether texts, all distinct, are codes that share no words."""
    if len(sample) < _LEAST_ROWS_OF_IDS:
        return False
    if np.median([len(text) for text in sample]) < _LEAST_ID_LENGTH:
        return False
    tokens_of_texts, counts = [], Counter()
    for text in sample:
        # "a1b2" is one mixed token, of which neither letters nor digits are a word.
        parts = set(_ALPHANUMERIC.findall(text.lower()))
        tokens = {part for part in parts if _TOKEN.fullmatch(part)}
        tokens_of_texts.append(tokens)
        counts.update(tokens)
    shared = set()
    for token, count in counts.items():
        if 1 < count < len(sample):  # a token of all texts is a prefix, not a word
            shared.add(token)
    n_sharing = sum(bool(tokens & shared) for tokens in tokens_of_texts)
    n_with_digits = sum(any(map(str.isdigit, text)) for text in sample)
    has_digits = n_with_digits >= _LEAST_WITH_DIGITS * len(sample)
    return has_digits and n_sharing <= _MOST_SHARED_WORDS * len(sample)
