"""Records of finished work in a file, so that an interrupted report resumes."""

import inspect
import json
from functools import partial
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

    Objects are hashed by their parameters or attributes and never pickled, since classes
    and functions of a script cannot be pickled by value. An object without these whose
    ``repr`` has an address has another hash in each process.
    """
    text = json.dumps(_describe(values))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _describe(value, within=()):
    """Return a JSON value that differs if the setting differs.

    `within` are the objects that contain it.
    """
    if any(value is outer for outer in within):
        return "a cycle"
    describe = partial(_describe, within=(*within, value))
    if isinstance(value, FrozenEncoder):
        return ["FrozenEncoder", value.fingerprint()]
    if isinstance(value, type):
        return ["class", _name(value)]
    if hasattr(value, "get_params"):
        params = value.get_params(deep=False)
        effective = params.keys() - _WITHOUT_EFFECT
        return [
            _name(type(value)),
            [[k, describe(params[k])] for k in sorted(effective)],
        ]
    if isinstance(value, dict):
        return ["dict", [[repr(k), describe(v)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return list(map(describe, value))
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), joblib.hash(value)]
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        return [_name(type(value)), joblib.hash(value)]
    if inspect.isfunction(value):
        enclosed = inspect.getclosurevars(value).nonlocals
        bound = [value.__defaults__, value.__kwdefaults__, enclosed]
        return [
            "function",
            _name(value),
            _describe_code(value.__code__),
            describe(bound),
        ]
    if isinstance(value, partial):
        return ["partial", *map(describe, (value.func, value.args, value.keywords))]
    # The repr of other objects, such as scorers, may leave out some of their settings.
    settings = getattr(value, "__dict__", None)
    return [_name(type(value)), describe(settings)] if settings else repr(value)


def _describe_code(code):
    """Return the instructions and constants of a function and of those within it."""
    constants = []
    for constant in code.co_consts:
        is_code = inspect.iscode(constant)  # its repr has an address
        constants.append(_describe_code(constant) if is_code else repr(constant))
    return [repr((code.co_code, code.co_names)), constants]


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
