"""Tokens: columns whose cells are sequences of vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def token_columns(X: Any) -> np.ndarray:
    """Tell which columns of a table hold a sequence of vectors in each cell.

    Parameters
    ----------
    X : DataFrame or array-like
        A table; an array holds tokens if its dtype is object.

    Returns
    -------
    holds : ndarray of shape (n_columns,), dtype bool
        Of those columns whose first cell that is not missing is an array of two dimensions. Empty
        for tables of numbers.
    """
    if isinstance(X, pd.DataFrame):
        columns = [X.iloc[:, i] for i in range(X.shape[1])]
    elif isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 2:
        columns = list(X.T)
    else:
        return np.zeros(0, dtype=bool)
    return np.array([_holds_tokens(column) for column in columns], dtype=bool)


def _holds_tokens(column: Any) -> bool:
    if column.dtype != object:
        return False
    known = (cell for cell in column if not _is_missing(cell))
    return getattr(next(known, None), "ndim", 0) == 2


def _is_missing(cell: Any) -> bool:
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def read_tokens(column: Any, name: str, width: int | None = None) -> np.ndarray:
    """Read the cells of a column of tokens.

    Parameters
    ----------
    column : sequence of array-like of shape (n_tokens, width), or None
        The cells; None or NaN is missing.
    name : str
        The modality, for the error message.
    width : int or None
        The width that tokens must have; None takes that of the first row.

    Returns
    -------
    cells : ndarray of shape (n_samples,), dtype object
        Arrays of shape (n_tokens, width), dtype float32; None where missing.

    Raises
    ------
    ValueError
        If a cell is no table of finite numbers, has no token, or tokens differ in width.
    """
    cells = np.full(len(column), None, dtype=object)
    for row, raw in enumerate(column):
        cell = _cell_of_tokens(raw, row, name)
        if cell is None:
            continue
        if cell.ndim != 2 or not len(cell) or not np.isfinite(cell).all():
            raise ValueError(
                f"Row {row} of the token column {name!r} should hold an array of finite numbers of "
                f"shape (n_tokens, n_features) with at least one token; got shape {cell.shape}"
                + (
                    "."
                    if cell.ndim != 2 or not len(cell)
                    else ", with NaN or infinity."
                )
            )
        width = cell.shape[1] if width is None else width
        if cell.shape[1] != width:
            raise ValueError(
                f"Row {row} of the token column {name!r} has tokens of width {cell.shape[1]}, but "
                f"{width} was expected: all must come from one encoder."
            )
        cells[row] = cell
    return cells


def pad_tokens(cells: Sequence[np.ndarray | None], width: int) -> np.ndarray:
    """Stack cells of tokens into (n_samples, most tokens of a cell, width), NaN after the last."""
    longest = max((len(cell) for cell in cells if cell is not None), default=1)
    tokens = np.full((len(cells), longest, width), np.nan, dtype=np.float32)
    for row, cell in enumerate(cells):
        if cell is not None:
            tokens[row, : len(cell)] = cell
    return tokens


def _cell_of_tokens(cell: Any, row: int, name: str) -> np.ndarray | None:
    """Return a cell as an array, None where missing."""
    try:
        with np.errstate(over="ignore"):  # infinity is found out later
            return None if _is_missing(cell) else np.asarray(cell, dtype=np.float32)
    except (TypeError, ValueError) as error:
        error.add_note(f"This was in row {row} of the token column {name!r}.")
        raise
