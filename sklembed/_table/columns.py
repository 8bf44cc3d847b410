"""Rows, columns and missing cells of one table in pandas, polars or numpy."""

import numbers
from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from scipy.sparse import issparse
from sklearn import get_config


def is_frame(X):
    """Return whether X is a pandas or polars DataFrame, not an array."""
    return hasattr(X, "columns") and hasattr(X, "shape")


def as_table(X):
    """Return X as a table: a DataFrame unchanged, anything else as an array.

    Raises
    ------
    TypeError
        If X is sparse, or a container to be converted first, such as a dict, a pyarrow
        Table, a polars LazyFrame or a Hugging Face dataset.
    ValueError
        If X is not two-dimensional, or has no rows or no columns.
    """
    if hasattr(X, "toarray"):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. Use "
            "X.toarray(), or a DataFrame."
        )
    _check_eager(X)
    if not is_frame(X):
        table = np.asarray(X)
        if table.dtype.kind in "US" and not isinstance(X, np.ndarray):
            # Among texts, numpy would turn NaN into the text "nan".
            table = np.asarray(X, dtype=object)
        if table.ndim != 2:
            raise ValueError(
                f"Expected 2D array, got {table.ndim}D array instead: X must be one "
                f"table with rows and columns, but it is {_article(type(X).__name__)}. "
                f"{_way_to_a_table(X)}"
            )
        X = table
    for number, kind in zip(X.shape, ("sample", "feature"), strict=True):
        if number == 0:
            raise ValueError(
                f"Found array with 0 {kind}(s) (shape={X.shape}) while a minimum of 1 "
                "is required."
            )
    return X


def _check_eager(X):
    """Refuse tables that are neither pandas nor polars, and name the conversion."""
    # This comes first, because a column may have the name of a method below.
    if isinstance(X, pd.DataFrame | pd.Series | np.ndarray) or hasattr(X, "to_frame"):
        return
    conversion = _conversion(X)
    if conversion is None:
        return
    container = type(X).__name__
    package = type(X).__module__.split(".")[0]
    if package != "builtins":
        container = f"{package} {container}"
    raise TypeError(
        "X must be a pandas or polars DataFrame, or an array with rows and columns; "
        f"got {_article(container)}. Pass {conversion}."
    )


def _conversion(X):
    """Return the call that makes a DataFrame of a container, None if X is not one."""
    if isinstance(X, Mapping):
        for split, part in X.items():
            if hasattr(part, "to_pandas") and not hasattr(part, "to_frame"):
                return f"one part of it, such as X[{split!r}].to_pandas()"
        return "pd.DataFrame(X)"
    if hasattr(X, "get_column_index"):  # a polars DataFrame that is not lazy
        return None
    for method in ("toPandas", "to_pandas", "collect", "df"):
        if hasattr(X, method):
            return f"X.{method}()"
    return None


def _article(noun):
    article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"{article} {noun}"


def _way_to_a_table(X):
    """Return the advice on how to turn a value into a two-dimensional table."""
    if hasattr(X, "to_frame"):
        return "Pass X.to_frame() if it is a column, or X.to_frame().T if it is a row."
    if isinstance(X, list | tuple) and X and isinstance(X[0], Mapping):
        return "Pass pd.DataFrame(X)."
    if not np.ndim(X):
        return "Pass a DataFrame."
    return (
        "Reshape your data either using array.reshape(-1, 1) if it has a single "
        "feature or array.reshape(1, -1) if it contains a single sample."
    )


def resolve_columns(columns, n_columns, *, owner, names=None, table=None):
    """Resolve a column selection, in any form of ColumnTransformer, to positions.

    Parameters
    ----------
    columns : str, int, slice, list of str or int, boolean mask, or callable
        The selection. Strings are column names, integers are positions. A slice of
        names includes its end. A callable takes the table and returns a selection.
    n_columns : int
        Number of columns of the table.
    owner : str
        Subject of error messages, such as "Branch 'text'".
    names : sequence of hashable or None, default=None
        Column names. If None, columns can be selected by position only.
    table : DataFrame, ndarray or None, default=None
        The table, for a callable.

    Returns
    -------
    positions : list of int
        The selected positions. May be empty, as for a selector of dtypes.
    is_scalar : bool
        Whether a scalar selected a single column, which is then one-dimensional.

    Raises
    ------
    ValueError
        If a column does not exist, several columns have the name, a mask has another
        length, the selection has another form, or there is no table for a callable.
    """
    if callable(columns):
        if table is None:
            raise ValueError(
                f"{owner} selects columns by a callable, but there is no table to pass "
                "to it. Select them by name or position."
            )
        columns = columns(table)
    positions_by_name = _positions_by_name(names)
    if isinstance(columns, str | numbers.Integral) and not isinstance(columns, bool):
        return [_position(columns, positions_by_name, n_columns, owner)], True
    try:
        if isinstance(columns, slice):
            columns = _slice_positions(columns, positions_by_name, n_columns, owner)
        columns = list(columns)
    except TypeError as error:
        raise ValueError(
            f"{owner} selects columns by {columns!r}. Use a name, a position, a list "
            "or slice of these, a boolean mask, or a callable."
        ) from error
    if pd.api.types.infer_dtype(columns, skipna=False) == "boolean":
        if len(columns) != n_columns:
            raise ValueError(
                f"{owner} selects columns by a mask of {len(columns)} values, but X "
                f"has n_features={n_columns}."
            )
        return np.flatnonzero(columns).tolist(), False
    positions = [
        _position(column, positions_by_name, n_columns, owner) for column in columns
    ]
    return positions, False


def column_positions(X, columns, *, owner):
    """Resolve a column selection on a table: `resolve_columns` with its own names."""
    names = getattr(X, "columns", None)
    return resolve_columns(columns, X.shape[1], owner=owner, names=names, table=X)


def _positions_by_name(names):
    """Map each name to its positions, which should be one; None without names."""
    if names is None:
        return None
    positions = {}
    for position, name in enumerate(names):
        positions.setdefault(name, []).append(position)
    return positions


def _slice_positions(columns, positions_by_name, n_columns, owner):
    start, stop = columns.start, columns.stop
    if isinstance(start, str):
        start = _position(start, positions_by_name, n_columns, owner)
    if isinstance(stop, str):
        # As in pandas and ColumnTransformer, a slice of names includes its end.
        stop = _position(stop, positions_by_name, n_columns, owner) + 1
    return range(*slice(start, stop, columns.step).indices(n_columns))


def _position(column, positions_by_name, n_columns, owner):
    if isinstance(column, numbers.Integral) and not isinstance(column, bool):
        if not -n_columns <= column < n_columns:
            raise ValueError(
                f"{owner} selects column {column}, but X has n_features={n_columns}."
            )
        return int(column) % n_columns
    if positions_by_name is None:
        raise ValueError(
            f"{owner} selects column {column!r} by name, but X has no column names. "
            "Pass a DataFrame, or select by position."
        )
    if not isinstance(column, Hashable) or column not in positions_by_name:
        raise ValueError(
            f"{owner} selects column {column!r}, which is not in X. X has the columns "
            f"{list(positions_by_name)}."
        )
    positions = positions_by_name[column]
    if len(positions) > 1:
        raise ValueError(
            f"{owner} selects column {column!r}, but X has {len(positions)} columns of "
            "that name. Rename them."
        )
    return positions[0]


def take_columns(X, positions, *, scalar=False):
    """Select columns by position; a scalar selection is returned one-dimensional."""
    key = list(positions)
    if scalar:
        key = positions[0]
    return X.iloc[:, key] if hasattr(X, "iloc") else X[:, key]


def take_rows(X, rows):
    """Select rows of a table, a column, an array or a list by an integer array."""
    if hasattr(X, "iloc"):
        return X.iloc[rows]
    if isinstance(X, list | tuple):
        return type(X)(X[row] for row in rows)
    if hasattr(X, "__getitem__"):
        return X[rows]
    return np.asarray(X)[rows]


def missing_cells(X):
    """Return a mask of the shape of X, true where a cell is None, NaN or NA."""
    if hasattr(X, "to_pandas"):  # polars: nulls of any type, and NaN
        X = np.asarray(X.to_numpy(), dtype=object)
    return np.asarray(pd.isna(X))


def missing_dates(X):
    """Return the names of columns of dates, times or durations with missing cells."""
    if not is_frame(X):
        if _is_date(X.dtype) and missing_cells(X).any():
            return [getattr(X, "name", None)]
        return []
    incomplete = []
    for name, dtype in zip(X.columns, X.dtypes, strict=True):
        if _is_date(dtype) and missing_cells(X[name]).any():
            incomplete.append(name)
    return incomplete


def _is_date(dtype):
    if hasattr(dtype, "is_temporal"):  # polars
        return dtype.is_temporal()
    return getattr(dtype, "kind", None) in ("M", "m")


def as_pandas(X):
    """Return a polars table or column as pandas; anything else unchanged."""
    if not hasattr(X, "to_pandas"):
        return X
    if is_frame(X):
        return pd.DataFrame({name: as_pandas(X[name]) for name in X.columns})
    return pd.Series(X.to_numpy(), name=X.name)


def as_frame(X):
    """Return a table, a sparse matrix or a column of cells as a pandas DataFrame."""
    if issparse(X):
        return pd.DataFrame.sparse.from_spmatrix(X)
    X = as_pandas(X)
    if is_frame(X):
        return X
    if isinstance(X, pd.Series):
        return X.to_frame()
    if np.ndim(X) == 2:
        return pd.DataFrame(X)
    return pd.Series(list(X), dtype=object, name="X").to_frame()


def missing_as_nan(X):
    """Return X with NaN for None and pd.NA in columns of objects or text.

    Imputers and encoders of categories recognise NaN in any column, but None only in
    some, and pd.NA in no column of text. Numeric columns and polars tables are returned
    unchanged.
    """
    if isinstance(X, pd.DataFrame):
        copied = X.copy(deep=False)
        for position, dtype in enumerate(X.dtypes):
            if _may_contain_none(dtype):
                copied.isetitem(position, missing_as_nan(X.iloc[:, position]))
        return copied
    if isinstance(X, pd.Series) and _may_contain_none(X.dtype):
        cells = missing_as_nan(X.to_numpy(dtype=object))
        return pd.Series(cells, index=X.index, name=X.name, dtype=object)
    if isinstance(X, np.ndarray) and X.dtype == object:
        return np.where(missing_cells(X), np.nan, X)
    return X


def _may_contain_none(dtype):
    """Return whether a pandas column may contain None, or pd.NA among texts."""
    if pd.api.types.is_object_dtype(dtype):
        return True
    return pd.api.types.is_string_dtype(dtype) and dtype.na_value is pd.NA


def holds_objects(X):
    """Return a mask of the columns of objects, text or categories; none in polars."""
    if is_frame(X):
        return np.array([_is_object(dtype) for dtype in X.dtypes])
    return np.array([_is_object(X.dtype)])


def _is_object(dtype):
    if isinstance(dtype, pd.CategoricalDtype):
        return True
    return pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)


def empty_as_objects(X, expected):
    """Return X with object dtype in empty columns that are expected to have objects.

    File readers take a column without any value for a numeric one, and encoders of
    categories cannot compare numbers with text.

    Parameters
    ----------
    X : DataFrame, Series or ndarray
        The table or column.
    expected : ndarray of bool
        The result of `holds_objects` for the training rows.
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
    """Return the container set by `set_output`, or else by the global configuration."""
    config = getattr(estimator, "_sklearn_output_config", {})
    return config.get("transform") or get_config()["transform_output"]
