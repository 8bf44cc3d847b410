"""Rows, columns and missing cells of one table, be it pandas, polars or numpy."""

import numbers
from collections.abc import Hashable

import numpy as np
import pandas as pd
from sklearn import get_config


def is_frame(X):
    """Tell a pandas or polars DataFrame from an array."""
    return hasattr(X, "columns") and hasattr(X, "shape")


def as_table(X):
    """Return X as a table with rows and columns: a DataFrame as it is, anything else as an array.

    Raises
    ------
    TypeError
        If X is sparse.
    ValueError
        If X is not two-dimensional, or has no row or no column.
    """
    if hasattr(X, "toarray"):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. Use X.toarray(), or a "
            "DataFrame."
        )
    if not is_frame(X):
        table = np.asarray(X)
        if table.dtype.kind in "US" and not isinstance(X, np.ndarray):
            table = np.asarray(X, dtype=object)  # else NaN beside texts becomes the text "nan"
        X = table
        if X.ndim != 2:
            raise ValueError(
                f"Expected 2D array, got {X.ndim}D array instead: X must be one table with rows "
                "and columns. Reshape your data either using array.reshape(-1, 1) if it has a "
                "single feature or array.reshape(1, -1) if it contains a single sample."
            )
    n_rows, n_columns = X.shape
    if n_rows == 0:
        raise ValueError(
            f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required: the "
            "table is empty."
        )
    if n_columns == 0:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={X.shape}) while a minimum of 1 is required: "
            "the table has no columns."
        )
    return X


def column_positions(X, columns, *, owner):
    """Turn a column selection, in any form that ColumnTransformer takes, into positions.

    Parameters
    ----------
    X : DataFrame or ndarray of shape (n_samples, n_features)
        The table.
    columns : str, int, slice, list of these, boolean mask, or callable taking X
        The selection. Strings name columns of a DataFrame; integers are positions.
    owner : str
        Who asks, for the error message.

    Returns
    -------
    positions : list of int
        The selected positions.
    scalar : bool
        Whether a single column was named by a scalar, which is handed on one-dimensional.

    Raises
    ------
    ValueError
        If a named column is absent or not the only one of its name, a position is out of range,
        or nothing is selected.
    """
    if callable(columns):
        columns = columns(X)
    names = _positions_by_name(X) if is_frame(X) else None
    scalar = isinstance(columns, str | numbers.Integral) and not isinstance(columns, bool)
    if scalar:
        columns = [columns]
    if isinstance(columns, slice):
        columns = _slice_positions(columns, names, X.shape[1], owner)
    columns = list(columns)
    if columns and all(isinstance(column, bool | np.bool_) for column in columns):
        if len(columns) != X.shape[1]:
            raise ValueError(
                f"{owner} selects by a mask of {len(columns)} values, but X has {X.shape[1]} "
                "columns."
            )
        columns = list(np.flatnonzero(columns))
    if not columns:
        raise ValueError(f"{owner} selects no column.")
    return [_position(column, names, X.shape[1], owner) for column in columns], scalar


def take_columns(X, positions, *, scalar=False):
    """Select columns by position; a scalar selection comes back one-dimensional."""
    key = positions[0] if scalar else list(positions)
    return X.iloc[:, key] if hasattr(X, "iloc") else X[:, key]


def take_rows(X, rows):
    """Select rows of a table, a column, an array or a list by an integer array."""
    if hasattr(X, "iloc"):
        return X.iloc[rows]
    if isinstance(X, list | tuple):
        return type(X)(X[row] for row in rows)
    return X[rows] if hasattr(X, "__getitem__") else np.asarray(X)[rows]


def missing_cells(X):
    """Tell which cells of a table or column are None, NaN or NA; the result has the same shape."""
    if hasattr(X, "to_pandas"):  # polars: nulls of any type, and NaN
        X = np.asarray(X.to_numpy(), dtype=object)
    return np.asarray(pd.isna(X))


def output_container(estimator):
    """Return what `set_output`, or else the global configuration, says that transform returns."""
    config = getattr(estimator, "_sklearn_output_config", {})
    return config.get("transform") or get_config()["transform_output"]


def _positions_by_name(X):
    """Find the columns of each name, of which there should be one."""
    positions = {}
    for position, name in enumerate(X.columns):
        positions.setdefault(name, []).append(position)
    return positions


def _slice_positions(columns, names, n_columns, owner):
    if isinstance(columns.start, str) or isinstance(columns.stop, str):
        start = None if columns.start is None else _position(columns.start, names, n_columns, owner)
        # As in pandas and ColumnTransformer, a slice of names includes its end.
        stop = (
            None if columns.stop is None else _position(columns.stop, names, n_columns, owner) + 1
        )
        columns = slice(start, stop, columns.step)
    return range(*columns.indices(n_columns))


def _position(column, names, n_columns, owner):
    if isinstance(column, numbers.Integral):
        if not -n_columns <= column < n_columns:
            raise ValueError(f"{owner} asks for column {column}, but X has {n_columns} columns.")
        return int(column) % n_columns
    if names is None:
        raise ValueError(
            f"{owner} asks for column {column!r} by name, but X is an array without names. Pass a "
            "DataFrame, or select by position."
        )
    found = names.get(column, []) if isinstance(column, Hashable) else []
    if not found:
        raise ValueError(
            f"{owner} asks for column {column!r}, which is not in X. X has the columns "
            f"{list(names)}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{owner} asks for column {column!r}, but X has {len(found)} columns of that name. "
            "Rename them."
        )
    return found[0]
