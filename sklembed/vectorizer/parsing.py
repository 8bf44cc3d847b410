"""Parse the cells of a column: numbers, dates, booleans, categories, texts and images."""

import base64
import binascii
import datetime
import numbers
import os
import re
from decimal import Decimal

import numpy as np
import pandas as pd
from PIL import Image

from sklembed.encoders.cells import is_missing

_NULL_STRINGS = frozenset(
    "|na|n/a|#n/a|nan|-nan|<na>|null|none|nil|?|-|--|...|missing|unknown".split("|")
)
# Both words of a pair must occur in a column of booleans; the first is 1.
BOOLEAN_PAIRS = (
    ("true", "false"),
    ("yes", "no"),
    ("y", "n"),
    ("t", "f"),
    ("on", "off"),
    ("1", "0"),
    ("1.0", "0.0"),
    ("oui", "non"),
    ("ja", "nein"),
    ("si", "no"),
    ("sí", "no"),
)
_TRUE_WORDS = frozenset(pair[0] for pair in BOOLEAN_PAIRS)
_FALSE_WORDS = frozenset(pair[1] for pair in BOOLEAN_PAIRS)

_CURRENCY = (
    r"(?:[$€£¥₹₩₽₺₴₫฿]|[A-Z]{1,2}\$|kr\.?|zł|USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD|SEK|NOK"
    r"|DKK|PLN)"
)
_SPACES = "\u00a0\u202f\u2009 "  # no-break, narrow no-break, thin and plain
_AFFIXES = re.compile(
    rf"^(?P<open>\()?(?P<sign>[-+−])?\s*(?:{_CURRENCY})?\s*(?P<inner>[-+−])?"
    rf"(?P<number>[\d.,'’{_SPACES}]*\d[eE\d.+,-]*)\s*(?:%|‰|{_CURRENCY})?(?(open)\))$"
)
# By the decimal separator. Groups of three digits may be separated.
_NUMBER = {
    ".": re.compile(
        rf"(\d{{1,3}}([,'’{_SPACES}]\d{{3}})+|\d+)?(\.\d*)?([eE][-+]?\d+)?"
    ),
    ",": re.compile(rf"(\d{{1,3}}([.'’{_SPACES}]\d{{3}})+|\d+)?(,\d*)?"),
}
_SEPARATORS = {
    ".": re.compile(rf"[,'’{_SPACES}]"),
    ",": re.compile(rf"[.'’{_SPACES}]"),
}

_DATES = (
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%m/%d/%Y",  # before %d/%m/%Y, so that a column that fits both has the month first
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%m-%d-%Y",
    "%d-%m-%Y",
    "%m/%d/%y",
    "%d/%m/%y",
    "%d.%m.%y",
    "%d %B %Y",
    "%d %b %Y",
    "%B %d, %Y",
    "%b %d, %Y",
    "%B %d %Y",
    "%b %d %Y",
    "%d-%b-%Y",
    "%d-%b-%y",
    "%B %Y",
    "%b %Y",
    "%a, %d %b %Y",
    "%A, %d %B %Y",
)
_TIMES = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S %z")
DAYS_AS_DIGITS = "%Y%m%d"
# Cheap tests that exclude most columns, because trying all formats takes some time.
_DATE_LIKE = re.compile(
    r"^\d{4}[-./]\d{1,2}([-./]\d{1,2})?([T ].*)?$"
    r"|^\d{1,2}[-./]\d{1,2}[-./](\d{2}|\d{4})( .*)?$"
    r"|^([A-Za-z]+,? )?\d{1,2}[- ][A-Za-z]+[- ](\d{2}|\d{4})( .*)?$"
    r"|^[A-Za-z]{3,9} (\d{1,2},? )?\d{4}( .*)?$"
)
_DIGITS_OF_A_DAY = re.compile(r"^(19|20)\d{2}[01]\d[0-3]\d$")
_N_FIRST_DATES = 20  # the formats that fail for all of these are not tried further

_IMAGE_SUFFIXES = set(".avif .bmp .gif .heic .jpeg .jpg .png .tif .tiff .webp".split())
_DATA_URI = re.compile(r"^data:image/[\w.+-]+;base64,", re.IGNORECASE)
# The first bytes of PNG, JPEG, GIF, WebP and BMP files in base64.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk")
_LEAST_BASE64_LENGTH = 60


def is_null_string(cell) -> bool:
    """Return whether a cell is a text that stands for a missing number or category."""
    return isinstance(cell, str) and cell.strip().lower() in _NULL_STRINGS


def is_number_dtype(dtype) -> bool:
    """Return whether a dtype is one of real numbers or booleans."""
    is_complex = pd.api.types.is_complex_dtype(dtype)
    return pd.api.types.is_numeric_dtype(dtype) and not is_complex


def distinct(cells: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each cell among the distinct values, and the values.

    Missing and blank cells have the position -1. PIL images are distinct unless they
    are the same object.
    """
    if isinstance(cells.dtype, pd.CategoricalDtype):
        codes, values = cells.cat.codes.to_numpy(), cells.cat.categories
    else:
        try:
            codes, values = pd.factorize(cells)
        except TypeError:  # cells that cannot be hashed, such as dicts and images
            keys = [_key(cell) for cell in cells]
            codes = pd.factorize(pd.Series(keys, dtype=object))[0]
            values = _first_of_each(cells, codes)
    codes = np.asarray(codes, dtype=np.intp)
    if is_number_dtype(cells.dtype) or pd.api.types.is_bool_dtype(cells.dtype):
        return codes, np.asarray(values)
    values = _as_objects(values)
    used = np.zeros(len(values), dtype=bool)
    used[codes[codes >= 0]] = True
    used &= ~np.fromiter(map(_is_missing_or_blank, values), bool, len(values))
    if used.all():
        return codes, values
    new_codes = np.append(np.cumsum(used) - 1, -1)
    new_codes[:-1][~used] = -1
    return new_codes[codes], values[used]


def _first_of_each(cells, codes):
    """Return the first cell of each code, in the order of the codes."""
    _, first_rows = np.unique(codes[codes >= 0], return_index=True)
    first_rows = np.flatnonzero(codes >= 0)[first_rows]
    return [cells.iloc[row] for row in first_rows]


def _as_objects(values):
    """Return values as an array of objects, one for each, also if they are arrays."""
    array = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def _is_missing_or_blank(value):
    if isinstance(value, str):
        return not value or value.isspace()
    return is_missing(value)


def _key(cell):
    """Return a hashable key of a cell: equal keys mean equal cells."""
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"}:
        return cell.get("bytes"), cell.get("path")
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8:
        return cell.shape, hash(cell.tobytes())
    try:
        hash(cell)
    except TypeError:
        return "object", id(cell)
    return cell


def parse_number(cell, decimal: str) -> float:
    """Return a cell as a number, NaN if it is not one.

    Parameters
    ----------
    cell : object
        A number, or a text such as "1,234.50", "$ 3", "(12 %)" or "1e-3".
    decimal : {".", ","}
        The decimal separator of the column.
    """
    if isinstance(cell, numbers.Number | Decimal) and not isinstance(cell, complex):
        return float(cell)
    if isinstance(cell, datetime.timedelta):
        return cell.total_seconds()
    if not isinstance(cell, str):
        return np.nan
    match = _AFFIXES.match(cell.strip())
    if match is None:
        return np.nan
    signs = [match["sign"], match["inner"]]
    digits = match["number"].strip()
    if all(signs) or not _NUMBER[decimal].fullmatch(digits):
        return np.nan
    value = float(_SEPARATORS[decimal].sub("", digits).replace(",", "."))
    if match["open"] or "-" in signs or "−" in signs:
        return -value
    return value


def parse_boolean(cell) -> float:
    """Return 1 for a true cell, 0 for a false one, NaN for any other."""
    if isinstance(cell, str):
        word = cell.strip().lower()
        if word in _TRUE_WORDS:
            return 1.0
        return 0.0 if word in _FALSE_WORDS else np.nan
    return parse_number(cell, ".")


def find_date_format(texts: list[str], least_share: float) -> str | None:
    """Return the format in which most texts are dates, None if too few are.

    Parameters
    ----------
    texts : list of str
        A sample of the column.
    least_share : float
        Share of the texts that must be dates.
    """
    days = [text for text in texts if _DIGITS_OF_A_DAY.match(text)]
    if len(days) == len(texts):
        candidates = [DAYS_AS_DIGITS]
    else:
        candidates = ["ISO8601"]
        candidates += [date + time for date in _DATES for time in _TIMES]
    n_similar = sum(_DATE_LIKE.match(text) is not None for text in texts)
    if max(n_similar, len(days)) < least_share * len(texts):
        return None
    best_format, best_share = None, 0.0
    for candidate in candidates:
        if np.isnan(_dates(texts[:_N_FIRST_DATES], candidate)).all():
            continue
        share = 1 - np.isnan(_dates(texts, candidate)).mean()
        if share > best_share:
            best_format, best_share = candidate, share
    return best_format if best_share >= least_share else None


def _dates(texts, date_format):
    """Return texts as seconds since 1970, NaN where they do not have the format."""
    dates = pd.to_datetime(texts, format=date_format, errors="coerce", utc=True)
    return np.where(dates.isna(), np.nan, dates.as_unit("us").asi8 / 1e6)


def looks_like_base64_image(text: str) -> bool:
    """Return whether a text is an image in base64, with or without the prefix."""
    if _DATA_URI.match(text):
        return True
    is_long = len(text) >= _LEAST_BASE64_LENGTH
    return is_long and text.startswith(_BASE64_STARTS) and " " not in text


def has_image_suffix(text: str) -> bool:
    """Return whether a text ends like the name of an image file, and is no URL."""
    suffix = os.path.splitext(text)[1].lower()
    return suffix in _IMAGE_SUFFIXES and "://" not in text


def is_image_object(cell) -> bool:
    """Return whether a cell has the type of an image, other than a text."""
    if isinstance(cell, dict):
        content = cell.get("bytes")
        if content is None:
            content = cell.get("path")
        has_content = isinstance(content, bytes | bytearray | str | os.PathLike)
        return has_content and cell.keys() <= {"bytes", "path"}
    if isinstance(cell, np.ndarray):
        return cell.dtype == np.uint8 and cell.ndim in (2, 3)
    types = bytes | bytearray | memoryview | os.PathLike | Image.Image
    return isinstance(cell, types)


def parse_image(cell):
    """Return an image cell for the encoder, None if it is not an image or has no file."""
    if isinstance(cell, str):
        if looks_like_base64_image(cell):
            return _decode_base64(cell)
        return cell if os.path.isfile(cell) else None
    if not is_image_object(cell):
        return None
    path = cell
    if isinstance(cell, dict):
        path = cell.get("path")
        if cell.get("bytes") is not None:
            return cell
    if isinstance(path, str | os.PathLike) and not os.path.isfile(path):
        return None
    return cell


def _decode_base64(text):
    try:
        return base64.b64decode(_DATA_URI.sub("", text), validate=False)
    except (binascii.Error, ValueError):
        return None


def parse_text(cell):
    """Return a cell of words, which may be a number among texts, as a text."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # as pandas reads integers with missing cells
    return str(cell)


def parse_category(cell):
    """Return a category as a text, None if it stands for a missing one."""
    return None if is_null_string(cell) else parse_text(cell)


def parse_column(cells: pd.Series, kind: str, form: str | None) -> pd.Series:
    """Parse all cells of a column.

    Parameters
    ----------
    cells : Series
        The column.
    kind : str
        Its kind.
    form : str or None
        The decimal separator of numbers, or the format of dates.

    Returns
    -------
    parsed : Series
        float64 for numbers and booleans, datetime64 without a time zone (in UTC) for
        dates, a category dtype for categories, otherwise objects. Missing cells, and
        cells that cannot be parsed, are NaN, NaT or None.
    """
    if kind == "datetime":
        return _parse_dates(cells, form)
    if kind in ("numeric", "boolean") and is_number_dtype(cells.dtype):
        values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
        return pd.Series(values, index=cells.index)
    codes, values = distinct(cells)
    if kind in ("numeric", "boolean"):
        parse = parse_boolean
        if kind == "numeric":
            parse = lambda cell: parse_number(cell, form or ".")  # noqa: E731
        parsed = np.array([parse(value) for value in values] + [np.nan])
        return pd.Series(parsed[codes], index=cells.index)
    parsers = {"categorical": parse_category, "image": parse_image}
    parse = parsers.get(kind, parse_text)
    parsed = np.full(len(values) + 1, None, dtype=object)
    for position, value in enumerate(values):
        parsed[position] = parse(value)
    series = pd.Series(list(parsed[codes]), index=cells.index, dtype=object)
    return series.astype("category") if kind == "categorical" else series


def _parse_dates(cells, date_format):
    if isinstance(cells.dtype, pd.PeriodDtype):
        cells = cells.dt.to_timestamp()
    if date_format == DAYS_AS_DIGITS and is_number_dtype(cells.dtype):
        cells = cells.astype("Int64").astype(object)
    if not pd.api.types.is_datetime64_any_dtype(cells.dtype):
        texts = cells.astype(object)
        if date_format is not None:
            texts = texts.map(_as_date_text)
        # A numeric cell would be read as nanoseconds since 1970.
        texts = texts.where(
            texts.map(lambda c: not isinstance(c, numbers.Number)), None
        )
        cells = pd.to_datetime(texts, format=date_format, errors="coerce", utc=True)
    if getattr(cells.dtype, "tz", None) is not None:
        cells = cells.dt.tz_convert("UTC").dt.tz_localize(None)
    return cells.astype("datetime64[us]")


def _as_date_text(cell):
    """Return a cell as `find_date_format` reads it."""
    if isinstance(cell, numbers.Integral):
        return str(int(cell))
    return cell.strip() if isinstance(cell, str) else cell
