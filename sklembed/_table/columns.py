"""Rows, columns and missing cells of one table, be it pandas, polars or numpy."""

import numbers
from collections.abc import Hashable, Mapping

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
        If X is sparse, or a container that has to be converted first, such as a dict, a pyarrow
        Table, a polars LazyFrame or a dataset of Hugging Face.
    ValueError
        If X is not two-dimensional, or has no row or no column.
    """
    if hasattr(X, "toarray"):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. Use X.toarray(), or a "
            "DataFrame."
        )
    _check_eager(X)
    if not is_frame(X):
        table = np.asarray(X)
        if table.dtype.kind in "US" and not isinstance(X, np.ndarray):
            table = np.asarray(
                X, dtype=object
            )  # else NaN beside texts becomes the text "nan"
        if table.ndim != 2:
            raise ValueError(
                f"Expected 2D array, got {table.ndim}D array instead: X must be one table with "
                f"rows and columns, but it is {_article(type(X).__name__)}. {_way_to_a_table(X)}"
            )
        X = table
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


def _check_eager(X):
    """Refuse containers of columns that are neither pandas nor polars, and say what to call."""
    if isinstance(X, pd.DataFrame | pd.Series | np.ndarray) or hasattr(X, "to_frame"):
        return  # before the methods below, the names of which a pandas column may bear
    call = None
    if isinstance(X, Mapping):
        call = "pd.DataFrame(X)"
        split = next(
            (name for name, part in X.items() if hasattr(part, "to_pandas")), None
        )
        if split is not None and not hasattr(
            X[split], "to_frame"
        ):  # a dataset with splits
            call = f"one part of it, such as X[{split!r}].to_pandas()"
    elif not hasattr(X, "get_column_index"):  # polars, not lazy
        methods = ("toPandas", "to_pandas", "collect", "df")
        call = next((f"X.{method}()" for method in methods if hasattr(X, method)), None)
    if call is not None:
        package = type(X).__module__.split(".")[0]
        container = (
            type(X).__name__
            if package == "builtins"
            else f"{package} {type(X).__name__}"
        )
        raise TypeError(
            "X must be a pandas or polars DataFrame, or an array with rows and columns; got "
            f"{_article(container)}. Pass {call}."
        )


def _article(name):
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _way_to_a_table(X):
    """Say how a value that is not two-dimensional becomes a table."""
    if hasattr(X, "to_frame"):
        return "Pass X.to_frame() if it is a column, or X.to_frame().T if it is a row."
    if isinstance(X, list | tuple) and X and isinstance(X[0], Mapping):
        return "Pass pd.DataFrame(X)."
    if not np.ndim(X):
        return "Pass a DataFrame."
    return (
        "Reshape your data either using array.reshape(-1, 1) if it has a single feature or "
        "array.reshape(1, -1) if it contains a single sample."
    )


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
        The selected positions; empty if nothing is selected, as by a selector of dtypes.
    scalar : bool
        Whether a single column was named by a scalar, which is handed on one-dimensional.

    Raises
    ------
    ValueError
        If a named column is absent or not the only one of its name, or a position is out of range.
    """
    if callable(columns):
        columns = columns(X)
    names = _positions_by_name(X) if is_frame(X) else None
    scalar = isinstance(columns, str | numbers.Integral) and not isinstance(
        columns, bool
    )
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


def missing_dates(X):
    """Return the columns of dates, times or durations of which a cell is missing."""
    if is_frame(X):
        dates = [
            name
            for name, dtype in zip(X.columns, X.dtypes, strict=True)
            if _is_date(dtype)
        ]
        return [name for name in dates if missing_cells(X[name]).any()]
    if _is_date(X.dtype) and missing_cells(X).any():
        return [getattr(X, "name", None)]
    return []


def _is_date(dtype):
    if hasattr(dtype, "is_temporal"):  # polars
        return dtype.is_temporal()
    return getattr(dtype, "kind", None) in ("M", "m")


def as_pandas(X):
    """Return a polars table or column as pandas; anything else as it is."""
    if not hasattr(X, "to_pandas"):
        return X
    if is_frame(X):
        return pd.DataFrame({name: as_pandas(X[name]) for name in X.columns})
    return pd.Series(X.to_numpy(), name=X.name)


def missing_as_nan(X):
    """Return X with NaN for None and pd.NA where its cells are objects or text.

    Imputers and encoders of categories recognise NaN in any column, but None only in some and
    pd.NA in none that holds text. Columns of numbers, and polars tables, are returned as they are.
    """
    if isinstance(X, pd.DataFrame):
        positions = [i for i, dtype in enumerate(X.dtypes) if _hides_missing(dtype)]
        if positions:
            X = X.copy(deep=False)
        for position in positions:
            X.isetitem(position, missing_as_nan(X.iloc[:, position]))
        return X
    if isinstance(X, pd.Series) and _hides_missing(X.dtype):
        cells = missing_as_nan(X.to_numpy(dtype=object))
        return pd.Series(cells, index=X.index, name=X.name, dtype=object)
    if isinstance(X, np.ndarray) and X.dtype == object:
        return np.where(missing_cells(X), np.nan, X)
    return X


def _hides_missing(dtype):
    """Tell whether a pandas column of this dtype may hold None, or pd.NA among texts."""
    if pd.api.types.is_object_dtype(dtype):
        return True
    return pd.api.types.is_string_dtype(dtype) and dtype.na_value is pd.NA


def holds_objects(X):
    """Tell which columns of a table hold objects, texts or categories; none of polars does."""
    dtypes = list(X.dtypes) if is_frame(X) else [X.dtype]
    return np.array([_is_of_objects(dtype) for dtype in dtypes])


def _is_of_objects(dtype):
    if isinstance(dtype, pd.CategoricalDtype):
        return True
    return pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)


def empty_as_objects(X, expected):
    """Return X with NaN of dtype object in columns without a value of which objects are expected.

    Readers take a column without any value for one of numbers, and encoders of categories cannot
    compare numbers with texts.

    Parameters
    ----------
    X : DataFrame, Series or ndarray
        The table or column.
    expected : ndarray of bool
        What `holds_objects` returned of the training rows.
    """
    if not (isinstance(X, pd.DataFrame | pd.Series | np.ndarray) and len(X)):
        return X
    empty = missing_cells(X).all(axis=0)
    changed = expected & ~holds_objects(X) & empty
    if not changed.any():
        return X
    if isinstance(X, np.ndarray):
        return X.astype(object)
    if isinstance(X, pd.Series):
        return pd.Series(np.nan, index=X.index, name=X.name, dtype=object)
    X = X.copy(deep=False)
    for position in np.flatnonzero(changed):
        X.isetitem(position, pd.Series(np.nan, index=X.index, dtype=object))
    return X


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
        start = (
            None
            if columns.start is None
            else _position(columns.start, names, n_columns, owner)
        )
        # As in pandas and ColumnTransformer, a slice of names includes its end.
        stop = (
            None
            if columns.stop is None
            else _position(columns.stop, names, n_columns, owner) + 1
        )
        columns = slice(start, stop, columns.step)
    return range(*columns.indices(n_columns))


def _position(column, names, n_columns, owner):
    if isinstance(column, numbers.Integral):
        if not -n_columns <= column < n_columns:
            raise ValueError(
                f"{owner} asks for column {column}, but X has {n_columns} columns."
            )
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
