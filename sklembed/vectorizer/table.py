"""The table as the vectorizer takes it, and its parsed and checked columns."""

import warnings
from collections import Counter

import numpy as np
import pandas as pd

from sklembed._table.columns import is_frame
from sklembed.encoders.cells import shorten
from sklembed.vectorizer.parsing import distinct, is_null_string, parse_column

SPECIFIC = "specific"  # the kind of a column in specific_transformers
_KINDS_OF_TEXT = ("text", "name", "categorical")
_N_NAMED = 5  # rows in a message


def as_named_frame(X):
    """Return a table as pandas with unique names of type str."""
    if not is_frame(X):
        return pd.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])], copy=False)
    names = [str(name) for name in X.columns]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Column names must be unique, but {repeated[0]!r} occurs "
            f"{names.count(repeated[0])} times ({len(repeated)} such names). Rename "
            "the columns."
        )
    if not hasattr(X, "iloc"):
        columns = [_as_pandas_column(X[:, i]) for i in range(X.shape[1])]
        return pd.DataFrame(dict(zip(names, columns, strict=True)))
    table = X.copy(deep=False)
    table.columns = names
    return table


def _as_pandas_column(column):
    """Return a polars column as pandas; binary cells and structs as objects."""
    dtype = column.dtype
    if dtype.is_temporal() and not hasattr(dtype, "time_unit"):
        return pd.Series(column.to_list(), dtype=object)  # dates and times
    if dtype.is_numeric() or dtype.is_temporal() or str(dtype) == "Boolean":
        if column.null_count() == 0 or dtype.is_float() or dtype.is_temporal():
            return pd.Series(column.to_numpy())
    return pd.Series(column.to_list(), dtype=object)


def parse_table(table, readings, accepts_damage, *, fitting=False):
    """Return the parsed columns, as the union takes them."""
    columns = {}
    for reading in readings:
        if reading.kind == SPECIFIC:
            columns[reading.name] = table[reading.name]
        elif reading.kind != "dropped":
            cells = table[reading.name]
            parsed = parse_column(cells, reading.kind, reading.form)
            if reading.kind == "image" and accepts_damage:
                parsed = cells.astype(object).where(parsed.isna(), parsed)
            else:
                _check_parsed(cells, parsed, reading, fitting)
            columns[reading.name] = parsed
    return pd.DataFrame(columns, index=table.index, copy=False)


def _check_parsed(cells, parsed, reading, fitting):
    """Refuse or report cells that are not of the kind of the column."""
    _check_finite(parsed, reading)
    failed = parsed.isna().to_numpy()
    if failed.any():
        codes, values = distinct(cells)
        is_null = np.array([*map(is_null_string, values), True])
        failed = failed & ~is_null[codes]
    if reading.are_texts and reading.kind in _KINDS_OF_TEXT and not fitting:
        failed = failed | _are_not_texts(cells)
    n_failed, n_observed = int(failed.sum()), len(cells) - int(parsed.isna().sum())
    if n_failed == 0:
        return
    rows = np.flatnonzero(failed)
    first = f"first in row {rows[0]}: {shorten(cells.iloc[rows[0]])}"
    if reading.kind == "image":
        raise ValueError(
            f"Column {reading.name!r} has images, but {n_failed} of {len(cells)} cells "
            f"are no image or name no file: rows {_rows(rows)}, {first}. Restore the "
            "files, use None for missing images, or pass image_encoder=FrozenEncoder("
            "..., errors='missing')."
        )
    received = f"{n_failed} of {len(cells)} cells are not, {first}."
    if reading.kind in _KINDS_OF_TEXT:
        n_observed -= n_failed
    if n_failed > max(n_observed, reading.is_dirty):
        raise ValueError(
            f"Column {reading.name!r} was read as {reading.kind} ({reading.reason}), "
            f"but {received} Pass the column as in fit, use None for unknown cells, or "
            "set another kind by the parameter kinds and fit again."
        )
    if fitting:
        reading.is_dirty = True
    if reading.kind not in _KINDS_OF_TEXT:
        warnings.warn(
            f"Column {reading.name!r} is read as {reading.kind}, but {received} They "
            "count as missing.",
            UserWarning,
            stacklevel=5,
        )


def _check_finite(parsed, reading):
    if reading.kind not in ("numeric", "boolean"):
        return
    rows = np.flatnonzero(np.isinf(parsed))
    if len(rows):
        raise ValueError(
            f"Input X contains infinity or a value too large: column {reading.name!r} "
            f"in {len(rows)} rows, first in row {rows[0]}. Use None for a missing "
            "number."
        )


def _are_not_texts(cells):
    """Return a mask of the observed cells that are not texts."""
    codes, values = distinct(cells)
    is_other = [not isinstance(value, str) for value in values]
    return np.array([*is_other, False])[codes]


def _rows(rows):
    named = ", ".join(map(str, rows[:_N_NAMED]))
    return f"{named}, …" if len(rows) > _N_NAMED else named
