"""The table of kinds, the cost of encoding, and copies of the target."""

import os

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from sklearn.base import clone

from sklembed._table.columns import missing_cells
from sklembed.encoders.frozen import frozen_encoders
from sklembed.vectorizer.lexical import LexicalEncoder
from sklembed.vectorizer.parsing import distinct, parse_column

# Roughly the cost of a sentence in all-MiniLM-L6-v2 and of an image in DINOv2-small, on
# one CPU core.
SECONDS_PER_CELL = {"text": 0.01, "image": 0.2}
_N_LOOKED_UP = 200  # cells of a column, to estimate how many are stored
_LEAST_ROWS_OF_TARGET = 20


def kinds_table(readings) -> pd.DataFrame:
    """Return a table of the readings, with a row for each column."""
    fields = {
        "kind": "kind",
        "reason": "reason",
        "missing": "n_missing",
        "distinct": "n_distinct",
        "encoder": "encoder",
        "seconds": "seconds",
    }
    columns = {}
    for title, attribute in fields.items():
        columns[title] = [getattr(reading, attribute) for reading in readings]
    return pd.DataFrame(columns, index=[reading.name for reading in readings])


def reasons(readings) -> str:
    """Return the reasons of all readings in one line."""
    return "; ".join(f"{reading.name!r}: {reading.reason}" for reading in readings)


def estimate_seconds(table, readings, branches) -> None:
    """Set the encoder of each reading, and the seconds to encode cells not yet stored."""
    readings = {reading.name: reading for reading in readings}
    for _, transformer, columns in branches:
        if isinstance(columns, str):
            columns = [columns]
        for name in columns:
            reading = readings[name]
            label = _label(transformer)
            if reading.encoder:
                label = f"{reading.encoder} + {label}"
            reading.encoder = label
            if reading.kind not in SECONDS_PER_CELL:
                continue
            for encoder in frozen_encoders(transformer).values():
                share = _share_to_encode(encoder, table[name], reading)
                n_cells = reading.n_distinct * share
                seconds = n_cells * SECONDS_PER_CELL[reading.kind]
                reading.seconds = round(reading.seconds + seconds, 2)


def _label(transformer):
    """Return a short name of a transformer: the model of a frozen encoder, or the class."""
    encoders = list(frozen_encoders(transformer).values())
    if isinstance(transformer, LexicalEncoder):
        return "lexical"
    if not encoders:
        return getattr(type(transformer), "__name__", str(transformer))
    model = encoders[0].model
    if isinstance(model, os.PathLike | str):
        return os.path.basename(os.fspath(model))
    return getattr(model, "name", type(model).__name__)


def _share_to_encode(encoder, cells, reading):
    """Estimate the share of distinct cells that are not stored; NaN if unknown.

    Images are read to compute their keys, so only some are looked up.
    """
    observed = cells[~missing_cells(cells)]
    if len(observed) > _N_LOOKED_UP:
        rows = np.linspace(0, len(observed) - 1, _N_LOOKED_UP).astype(np.intp)
        observed = observed.iloc[rows]
    if isinstance(encoder.model, str):  # a hub id must not be asked for
        encoder = clone(encoder).set_params(local_files_only=True)
    try:
        parsed = parse_column(observed, reading.kind, reading.form)
        return encoder._share_to_encode(parsed)
    except OSError:
        return 1.0  # a model that is not on this machine
    except (ValueError, TypeError, ImportError):
        return np.nan  # raised by fit, with the name of the column


def columns_that_determine(y, table, prepared, readings) -> list[str]:
    """Return the columns that are copies of `y`, or map one-to-one to it.

    Parameters
    ----------
    y : array-like or None
        The target; only one-dimensional ones are compared.
    table : DataFrame
        The table.
    prepared : DataFrame
        Its parsed columns, of which numbers are compared with a numeric `y`.
    readings : list of ColumnReading
        Their readings.

    Returns
    -------
    names : list of str
        The columns. A column without repeated values is one only if it equals `y`.
    """
    if y is None or len(table) < _LEAST_ROWS_OF_TARGET:
        return []
    labels = np.asarray(y)
    if labels.ndim != 1:
        return []
    target = pd.Series(labels)
    if target.nunique() < 2 or target.isna().any():
        return []
    target_codes = pd.factorize(target)[0]
    n_values = target_codes.max() + 1
    names = []
    for reading in readings:
        name = reading.name
        if reading.n_distinct != n_values or reading.n_missing:
            continue
        codes, _ = distinct(table[name])
        n_pairs = len(np.unique(codes * n_values + target_codes))
        is_copy = n_values < len(table)
        if n_values == len(table) and name in prepared:
            is_copy = _equals(prepared[name], target)
        if n_pairs == n_values and is_copy:
            names.append(name)
    return names


def _equals(column, target):
    """Return whether a column of distinct values equals the target."""
    if is_numeric_dtype(column.dtype) and is_numeric_dtype(target.dtype):
        return np.allclose(column.to_numpy(float), target.to_numpy(float))
    return list(column) == list(target)
