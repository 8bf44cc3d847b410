"""Token columns: columns whose cells are sequences of vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def token_columns(X: Any) -> np.ndarray:
    """Return a mask of the columns with a sequence of vectors in each cell.

    Parameters
    ----------
    X : DataFrame or array-like
        A table. An array may contain tokens only if its dtype is object.

    Returns
    -------
    mask : ndarray of shape (n_columns,), dtype bool
        True for columns whose first observed cell is a two-dimensional array. Empty for
        numeric tables.
    """
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 2:
        X = pd.DataFrame(X)
    if not isinstance(X, pd.DataFrame):
        return np.zeros(0, dtype=bool)
    columns = range(X.shape[1])
    return np.array([_holds_tokens(X.iloc[:, i]) for i in columns], dtype=bool)


def _holds_tokens(column: pd.Series) -> bool:
    if column.dtype != object:
        return False
    for cell in column:
        if not _is_missing(cell):
            return getattr(cell, "ndim", 0) == 2
    return False


def _is_missing(cell: Any) -> bool:
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def read_tokens(column: Any, name: str, width: int | None = None) -> np.ndarray:
    """Read the cells of a token column.

    Parameters
    ----------
    column : sequence of array-like of shape (n_tokens, width), or None
        The cells. None or NaN is missing.
    name : str
        The modality, for the error message.
    width : int or None, default=None
        Expected width of the tokens. None means the width of the first observed row.

    Returns
    -------
    cells : ndarray of shape (n_samples,), dtype object
        Arrays of shape (n_tokens, width), dtype float32. None where missing.

    Raises
    ------
    ValueError
        If a cell is not a table of finite numbers, has no tokens, or tokens differ in
        width.
    """
    cells = np.full(len(column), None, dtype=object)
    for row, raw in enumerate(column):
        cell = _cell_of_tokens(raw, row, name)
        if cell is None:
            continue
        problem = ""
        if cell.ndim != 2 or not len(cell):
            problem = f"shape {cell.shape}."
        elif not np.isfinite(cell).all():
            problem = f"shape {cell.shape}, with NaN or infinity."
        if problem:
            raise ValueError(
                f"Row {row} of the token column {name!r} should be an array of finite "
                "numbers of shape (n_tokens, n_features) with at least one token; got "
                f"{problem}"
            )
        if width is None:
            width = cell.shape[1]
        if cell.shape[1] != width:
            raise ValueError(
                f"Row {row} of the token column {name!r} has tokens of width "
                f"{cell.shape[1]}, but {width} was expected: all must come from one "
                "encoder."
            )
        cells[row] = cell
    return cells


def pad_tokens(cells: Sequence[np.ndarray | None], width: int) -> np.ndarray:
    """Stack cells of tokens into one array, padded with NaN.

    Returns
    -------
    tokens : ndarray of shape (n_samples, n_tokens, width), dtype float32
        The tokens, as many as the longest cell has. NaN after the last token of a cell.
    """
    longest = 1
    for cell in cells:
        if cell is not None:
            longest = max(longest, len(cell))
    tokens = np.full((len(cells), longest, width), np.nan, dtype=np.float32)
    for row, cell in enumerate(cells):
        if cell is not None:
            tokens[row, : len(cell)] = cell
    return tokens


def average_tokens(cells: Sequence[np.ndarray | None], width: int) -> np.ndarray:
    """Return the mean of the tokens of each cell; NaN for missing cells.

    Parameters
    ----------
    cells : sequence of ndarray of shape (n_tokens, width), or None
        The tokens.
    width : int
        Number of columns.

    Returns
    -------
    averages : ndarray of shape (n_cells, width), dtype float32
        The means.
    """
    averages = np.full((len(cells), width), np.nan, dtype=np.float32)
    for row, cell in enumerate(cells):
        if cell is not None:
            averages[row] = cell.mean(axis=0)
    return averages


def _cell_of_tokens(cell: Any, row: int, name: str) -> np.ndarray | None:
    """Return a cell as an array, None where missing."""
    if _is_missing(cell):
        return None
    try:
        with np.errstate(over="ignore"):  # infinite values are refused later
            return np.asarray(cell, dtype=np.float32)
    except (TypeError, ValueError) as error:
        error.add_note(f"This was in row {row} of the token column {name!r}.")
        raise
