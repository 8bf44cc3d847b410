"""Records of finished work in a file, so that an interrupted report resumes."""

import inspect
import json
from hashlib import blake2b
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from sklembed._table.columns import is_frame
from sklembed.encoders import FrozenEncoder

_START = '{"key": '  # of each line
_WITHOUT_EFFECT = {"n_jobs", "verbose"}  # parameters that do not change a result


class RecordFile:
    """A file with a record in each line, as JSON with a key.

    A record is written when it is appended, so that only work in progress is lost if
    the process ends. An incomplete last line is removed.

    Parameters
    ----------
    path : str, Path or None
        The file, created with its directory if there is none. None means no file.

    Raises
    ------
    ValueError
        If the file has other content.
    OSError
        If the file cannot be written.
    """

    def __init__(self, path):
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8"):
                pass

    def read(self):
        """Return a dict of keys to records, the last of each key."""
        records = {}
        if self._path is None:
            return records
        text = self._path.read_text(encoding="utf-8")
        complete, _, last = text.rpartition("\n")
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                self._refuse(number, line)
        if not (last.startswith(_START) or _START.startswith(last)):
            self._refuse(complete.count("\n") + 1, last)
        if last:  # an interrupted record
            self._path.write_text(complete + "\n" if complete else "", encoding="utf-8")
        return records

    def _refuse(self, number, line):
        raise ValueError(
            f"{str(self._path)!r} is not a file of records: line {number} is "
            f"{line[:60]!r}. Pass the path of a new file, or remove the line."
        )

    def append(self, key, record):
        """Write a record."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **record}) + "\n")


def hash_settings(*values):
    """Return a hash of settings: estimators, arrays, functions and plain values.

    Objects are hashed by their parameters and never pickled, since classes and functions
    of a script cannot be pickled by value. An object whose ``repr`` has an address has
    another hash in each process.
    """
    text = json.dumps(_describe(values))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _describe(value):
    """Return a JSON value that differs if the setting differs."""
    if isinstance(value, FrozenEncoder):
        return ["FrozenEncoder", value.fingerprint()]
    if hasattr(value, "get_params") and not isinstance(value, type):
        params = value.get_params(deep=False)
        effective = params.keys() - _WITHOUT_EFFECT
        return [
            _name(type(value)),
            [[k, _describe(params[k])] for k in sorted(effective)],
        ]
    if isinstance(value, dict):
        return ["dict", [[repr(k), _describe(v)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return list(map(_describe, value))
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), joblib.hash(value)]
    if inspect.isfunction(value):
        code = value.__code__
        constants = list(filter(_is_plain, code.co_consts))
        return [
            "function",
            _name(value),
            repr((code.co_code, code.co_names, constants)),
        ]
    if isinstance(value, type):
        return ["class", _name(value)]
    return repr(value)


def _is_plain(constant):
    return not inspect.iscode(constant)  # its repr has an address


def _name(value):
    return f"{value.__module__}.{value.__qualname__}"


def hash_table(X, digests):
    """Return a hash of a table.

    Parameters
    ----------
    X : DataFrame or ndarray
        The table.
    digests : dict of str to ndarray of str
        Hashes of the cells of some columns, which are used instead of the cells.
    """
    if not is_frame(X):
        return joblib.hash(X)
    columns = []
    for position, name in enumerate(X.columns):
        if name in digests:
            cells = list(digests[name])
        else:
            cells = X.iloc[:, position]
            is_number = pd.api.types.is_numeric_dtype(cells)
            cells = cells.to_numpy() if is_number else cells.tolist()
        columns.append((name, cells))
    return joblib.hash(columns)
