"""Column: the cells of one column, their keys, and the rows that repeat a cell."""

import itertools
import re
import warnings
from collections import Counter
from hashlib import blake2b

import numpy as np
import pandas as pd

from sklembed._table.columns import is_frame

_COPY_ROWS = 65536  # repeated rows copied at once
_ANNOUNCED: set[bytes] = set()  # keys of the warnings that this process has issued
_ANNOUNCED_LIMIT = 100_000


class Column:
    """The cells of one column, so that each distinct cell is encoded once.

    Values are computed for distinct cells, which are numbered in the order of their
    first rows. "Positions" are these numbers; "rows" are those of the table.

    Parameters
    ----------
    X : DataFrame, Series, array, list, or table or column of pyarrow or datasets
        The column, or a table of one column.

    Attributes
    ----------
    cells : list
        The cells.

    name : object
        Name of the column, or None.

    reading : tuple or None
        Parameters of an encoder that the keys depend on.

    errors : dict of int to Exception
        Errors of cells that count as missing, by row.

    keys : list of bytes or None
        Key of each cell; None for missing cells. This and the following attributes are
        set by `set_keys`.

    missing : ndarray of shape (n_rows,), dtype bool
        Mask of the missing cells.

    first_rows : ndarray of shape (n_rows,), dtype int
        First row with the same cell. A missing cell has its own row.

    rows : ndarray of shape (n_distinct,), dtype int
        First row of each distinct cell.
    """

    def __init__(self, X):
        self.name = self.reading = None
        self.errors = {}
        if hasattr(X, "column_names"):  # a table of pyarrow or datasets
            _check_one_column(X, X.column_names)
            self.name = X.column_names[0]
            X = X[self.name]
        self.name = getattr(X, "column_name", self.name)  # a column of datasets
        is_pandas = hasattr(X, "iloc")
        self._labels = None
        if is_pandas:
            self._labels = X.index
        if is_frame(X):
            _check_one_column(X, list(X.columns))
            X = X.iloc[:, 0] if is_pandas else X[:, 0]
        if hasattr(X, "to_list") and hasattr(X, "name"):  # a pandas or polars Series
            self.name = X.name
            self.cells = X.to_list()
        else:
            self.cells = _list_cells(X)
        if not self.cells:
            raise ValueError(
                f"{self} has 0 cells (0 samples), and at least one is needed: the "
                "table is empty."
            )

    def __len__(self):
        return len(self.cells)

    def equals(self, other):
        """Return whether another column has the same name and cells, read alike.

        Texts are compared; arrays and images are equal if they are the same object.
        """
        if (self.name, self.reading) != (other.name, other.reading):
            return False
        if len(self) != len(other):
            return False
        return all(map(_is_same_cell, self.cells, other.cells))

    def __str__(self):
        if self.name is None:
            return "the column"
        return f"column {self.name!r}"

    def place(self, row):
        """Name a cell by its row and, where there is one, its index label."""
        if self._labels is None:
            return f"Row {row} of {self}"
        label = self._labels[row]
        if isinstance(label, np.generic):
            label = label.item()
        return f"Row {row} (index {label!r}) of {self}"

    def set_keys(self, keys):
        """Set the key of each cell, and find the distinct cells.

        Parameters
        ----------
        keys : list of bytes or None
            A key for each row; None for missing cells.
        """
        self.keys = keys
        self.missing = np.zeros(len(keys), dtype=bool)
        self.first_rows = np.arange(len(keys))
        row_of_key: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key is None:
                self.missing[row] = True
            else:
                self.first_rows[row] = row_of_key.setdefault(key, row)
        self.rows = np.array(list(row_of_key.values()), dtype=np.intp)

    def distinct_keys(self, positions=slice(None)):
        """Return the keys of the distinct cells, all or at some positions."""
        return [self.keys[row] for row in self.rows[positions]]

    def scatter(self, pieces, n_features, *, ragged=False):
        """Copy the values of distinct cells to all rows with these cells.

        Parameters
        ----------
        pieces : iterable of (positions, values)
            Positions of distinct cells, and an array of shape (n_positions, n_features)
            or, if ragged, a list of arrays of shape (n_tokens, n_features).

        n_features : int
            Width of the values.

        ragged : bool, default=False
            Whether values differ in their number of tokens.

        Returns
        -------
        values : ndarray of shape (n_rows, n_features), dtype float32
            The values; NaN in rows without a value. If ragged, of shape (n_rows, 1) and
            dtype object, with None in rows without a value.
        """
        if ragged:
            output = np.full((len(self), 1), None, dtype=object)
        else:
            output = np.full((len(self), n_features), np.nan, dtype=np.float32)
        for positions, values in pieces:
            rows = self.rows[positions]
            if not ragged:
                output[rows] = values
                continue
            # One by one: numpy would stack arrays of equal shape.
            for row, value in zip(rows, values, strict=True):
                output[row, 0] = value
        repeats = np.flatnonzero(self.first_rows != np.arange(len(self)))
        for rows in np.array_split(repeats, len(repeats) // _COPY_ROWS + 1):
            output[rows] = output[self.first_rows[rows]]
        return output

    def warn_of_errors(self, stacklevel):
        """Warn of cells in `errors` and their repeats, once per process and cell."""
        rows = np.flatnonzero(np.isin(self.first_rows, list(self.errors)))
        reasons, warning_keys, first_new_row = Counter(), [], None
        for row in rows.tolist():
            error = self.errors[self.first_rows[row]]
            reasons[_reason(error)] += 1
            key = _warning_key(str(self), self.keys[row] or str(error))
            warning_keys.append(key)
            if first_new_row is None and key not in _ANNOUNCED:
                first_new_row = row
        if first_new_row is None:
            return
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        warnings.warn(
            f"{len(rows)} cells of {self} could not be read and count as missing "
            f"({counts}), first: {self.place(first_new_row)}: "
            f"{self.errors[self.first_rows[first_new_row]]}.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
        _announce(warning_keys)  # skipped if the filters make the warning an error

    def warn_once(self, topic, message, stacklevel):
        """Issue a warning about the column, once per process and topic."""
        key = _warning_key(topic, str(self))
        if key in _ANNOUNCED:
            return
        warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)
        _announce([key])


def _check_one_column(X, names):
    """Raise an error for a table of several columns, or a dict of tables."""
    if not isinstance(names, list):
        raise TypeError(
            f"X must be one column of cells; got {X!r}. Choose one of its splits."
        )
    if len(names) != 1:
        raise ValueError(
            f"FrozenEncoder takes one column, but X has {len(names)}: {names}. Select "
            "one, or give each its own encoder in a PerModalityUnion."
        )


def _is_same_cell(cell, other):
    if cell is other:
        return True
    # Other types may be missing values, or have no truth value of their equality.
    return type(cell) is type(other) and type(cell) in (str, bytes) and cell == other


def _list_cells(X):
    """List the cells of an array or a list, flat or of one column."""
    if hasattr(X, "to_pylist"):  # a pyarrow array
        return X.to_pylist()
    if hasattr(X, "column_name") and hasattr(X, "features"):  # a column of datasets
        return list(_without_decoding(X)[:])
    if isinstance(X, pd.api.extensions.ExtensionArray):
        return X.tolist()
    if not isinstance(X, np.ndarray | list | tuple):
        raise TypeError(
            "X must be one column of cells: a DataFrame, Series, array or list; got "
            f"{X!r}."
        )
    if isinstance(X, np.ndarray):
        if X.ndim > 2 or (X.ndim == 2 and X.shape[1] != 1):
            raise ValueError(
                f"FrozenEncoder takes one column of cells, but X has shape {X.shape}. "
                "Select a column; pass a stack of images as list(X)."
            )
        return X.reshape(-1).tolist()
    cells = list(X)
    if all(isinstance(cell, list | tuple) and len(cell) == 1 for cell in cells):
        cells = list(itertools.chain.from_iterable(cells))
    return cells


def _without_decoding(column):
    """Keep images encoded: pixels of a whole column may exceed memory."""
    source = column.source
    if getattr(column.features, "decode", False) and hasattr(source, "cast_column"):
        encoded = type(column.features)(decode=False)
        return source.cast_column(column.column_name, encoded)[column.column_name]
    return column


def _warning_key(*parts):
    """Return a short hash that identifies a warning."""
    return blake2b(repr(parts).encode(errors="replace"), digest_size=8).digest()


def _announce(keys):
    """Remember which warnings this process has issued."""
    if len(_ANNOUNCED) > _ANNOUNCED_LIMIT:
        _ANNOUNCED.clear()
    _ANNOUNCED.update(keys)


def _reason(error):
    """Name the kind of an error, without the details of the cell."""
    cause = error.__cause__ or error
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    if type(cause).__name__ == "UnidentifiedImageError":
        return "no known image format"
    text = re.sub(r"'[^']*'|\([^)]*\)", "", str(cause))
    summary = re.split(r"[.:;]", text)[0]
    return re.sub(r"\d+", "N", summary).strip() or type(cause).__name__
