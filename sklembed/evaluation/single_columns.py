"""The score of each single column of a table, as in `leak_report`."""

import math
import re
import warnings

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from sklembed.vectorizer.kinds import read_column
from sklembed.vectorizer.parsing import distinct, parse_column

_N_ROWS_OF_COLUMN = 5000  # on which a single column is tested
_N_CHARACTERS = 200  # of a text
_N_PERMUTATIONS = 5
_LEAST_GAINS = {True: 0.1, False: 0.9}  # of identifiers, and of other columns
_FILE_NAME = re.compile(r"[^/\\]*\.[A-Za-z][A-Za-z0-9]{1,4}$")
_IDENTIFIERS = ("identifier", "file name", "datetime")
# Of values that may be groups, such as patients: distinct values, mean number of rows of
# each, and share of the test rows whose value has training rows.
_LEAST_VALUES = 20
_MOST_ROWS_OF_VALUE = 50
_LEAST_KNOWN = 0.5


def score_columns(table, y, folds, classes, seed):
    """Return a table of the score of each single column; see `LeakReport.columns_`."""
    rng = np.random.default_rng(seed)
    rows = np.arange(len(y))
    if len(rows) > _N_ROWS_OF_COLUMN:
        rows = np.sort(rng.permutation(rows)[:_N_ROWS_OF_COLUMN])
    kept = np.zeros(len(y), dtype=bool)
    kept[rows] = True
    new_rows = np.cumsum(kept) - 1
    small_folds = []
    for train, test in folds:
        train, test = new_rows[train[kept[train]]], new_rows[test[kept[test]]]
        if len(train) and len(test):
            small_folds.append((train, test))
    target = y[rows]
    permuted_targets = [rng.permutation(target) for _ in range(_N_PERMUTATIONS)]
    records = []
    for position, name in enumerate(table.columns):
        kind, features = _read_single_column(table.iloc[rows, position], str(name))
        record = {"column": str(name), "kind": kind}
        records.append(record)
        if kind not in ("image", "other"):
            record |= _score_groups(table.iloc[:, position], y, folds, classes, rng)
        if record.get("groups") or features is None or not small_folds:
            continue
        model = _single_column_model(features, classes)
        record["score"] = _out_of_fold(model, features, target, small_folds, classes)
        permuted = []
        for permuted_target in permuted_targets:
            permuted.append(
                _out_of_fold(model, features, permuted_target, small_folds, classes)
            )
        record["permuted"] = max(permuted)
        record["gain"] = _gain(record["score"], permuted)
        is_identifier = kind in _IDENTIFIERS
        exceeds = record["score"] > record["permuted"]
        record["suspicious"] = exceeds and record["gain"] >= _LEAST_GAINS[is_identifier]
    fields = ["column", "kind", "score", "permuted", "gain", "suspicious", "groups"]
    columns = pd.DataFrame(records, columns=fields)
    for name in ("suspicious", "groups"):
        columns[name] = columns[name].eq(True)
    return columns.sort_values("gain", ascending=False, ignore_index=True)


def _gain(score, permuted):
    """Return the share of the way from chance, the permuted scores, to 1."""
    chance = np.mean(permuted)
    return (score - chance) / (1 - chance)


def _score_groups(cells, y, folds, classes, rng):
    """Return the scores of the targets of equal cells, if these may be groups of rows.

    The values of an identifier that repeats, such as a patient with several rows, are
    many, most are in training and test rows of a fold, and their rows have one target.

    Returns
    -------
    record : dict
        "score", "permuted", "gain", "suspicious" and "groups" of `LeakReport.columns_`.
        Empty if the values are no groups.
    """
    codes, values = distinct(cells)
    n_observed = np.count_nonzero(codes >= 0)
    if not _LEAST_VALUES <= len(values) <= n_observed / 2:
        return {}
    is_float = pd.api.types.is_float_dtype(cells.dtype)
    if is_float and np.any(np.asarray(values, dtype=float) % 1 != 0):  # measurements
        return {}
    if n_observed > _MOST_ROWS_OF_VALUE * len(values):
        return {}
    known_folds, n_known, n_tested = [], 0, 0
    for train, test in folds:
        train, test = train[codes[train] >= 0], test[codes[test] >= 0]
        known = test[np.isin(codes[test], codes[train])]
        known_folds.append((train, known))
        n_known, n_tested = n_known + len(known), n_tested + len(test)
    if n_known < _LEAST_KNOWN * n_tested:
        return {}
    target = np.unique(y, return_inverse=True)[1] if classes else y
    score = _score_equal_cells(codes, target, known_folds, classes)
    permuted = []
    for _ in range(_N_PERMUTATIONS):
        permutation = rng.permutation(target)
        permuted.append(_score_equal_cells(codes, permutation, known_folds, classes))
    gain = _gain(score, permuted)
    if score <= max(permuted) or gain < _LEAST_GAINS[False]:
        return {}
    record = {"score": score, "permuted": max(permuted), "gain": gain}
    return record | {"suspicious": True, "groups": True}


def _score_equal_cells(codes, target, folds, classes):
    """Return the score of the most frequent or mean target of equal training cells.

    Parameters
    ----------
    codes : ndarray of shape (n_samples,), dtype int
        Values of the column.
    target : ndarray of shape (n_samples,)
        Numbers, or the codes of classes.
    folds : list of (train, test)
        Rows; the value of each test row is that of a training row.
    """
    observed, predicted = [], []
    for train, test in folds:
        if classes:
            n_classes = target.max() + 1
            pairs = codes[train] * n_classes + target[train]
            pairs, counts = np.unique(pairs, return_counts=True)
            pairs = pairs[np.argsort(counts, kind="stable")]
            by_value = np.zeros(codes.max() + 1, dtype=np.intp)
            by_value[pairs // n_classes] = (
                pairs % n_classes
            )  # the last is most frequent
        else:
            sums = np.bincount(codes[train], target[train], minlength=codes.max() + 1)
            counts = np.bincount(codes[train], minlength=codes.max() + 1)
            by_value = sums / np.maximum(counts, 1)
        predicted.append(by_value[codes[test]])
        observed.append(target[test])
    return _score(np.concatenate(observed), np.concatenate(predicted), classes)


def _read_single_column(cells, name):
    """Return the kind of a column and its features; None if it has no cheap ones."""
    try:
        reading = read_column(cells, name)
    except ValueError:  # lists, dicts and the like
        return "other", None
    kind = reading.kind
    observed = cells.dropna()
    texts = observed[observed.map(lambda cell: isinstance(cell, str))]
    if len(texts) and texts.str.contains(_FILE_NAME).mean() >= 0.9:
        kind = "file name"
    elif kind == "dropped" and reading.n_distinct > 1:
        kind = "identifier"
    if kind in ("numeric", "boolean", "datetime"):
        values = parse_column(cells, kind, reading.form)
        return kind, _as_numbers(values)
    if kind == "identifier" and pd.api.types.is_numeric_dtype(cells.dtype):
        return kind, _as_numbers(cells)
    if kind in ("image", "dropped") or not len(texts):
        return kind, None
    hasher = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), n_features=2**14, alternate_sign=False
    )
    starts = []
    for cell in cells:
        starts.append("" if pd.isna(cell) else str(cell)[:_N_CHARACTERS])
    return kind, hasher.transform(starts)


def _as_numbers(values):
    """Return numbers and dates as a column of floats; NaN where missing."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        numbers = values.astype("int64").astype(float)
        values = numbers.where(values.notna(), math.nan)
    return values.to_numpy(dtype=float, na_value=math.nan).reshape(-1, 1)


def _single_column_model(features, classes):
    """Return a cheap model of the features of a column."""
    if isinstance(features, np.ndarray):
        options = {"min_samples_leaf": 3, "random_state": 0}
        if classes:
            return DecisionTreeClassifier(class_weight="balanced", **options)
        return DecisionTreeRegressor(**options)
    if classes:
        return MultinomialNB(alpha=0.01, fit_prior=False)
    return Ridge(solver="sparse_cg")


def _out_of_fold(model, features, y, folds, classes):
    """Return the score of predictions for the test rows of all folds together."""
    observed, predicted = [], []
    for train, test in folds:
        predicted.append(model.fit(features[train], y[train]).predict(features[test]))
        observed.append(y[test])
    return _score(np.concatenate(observed), np.concatenate(predicted), classes)


def _score(observed, predicted, classes):
    """Return the balanced accuracy, or R² for numbers."""
    if not classes:
        return r2_score(observed, predicted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        return balanced_accuracy_score(observed, predicted)
