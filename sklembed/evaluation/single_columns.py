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
from sklembed.vectorizer.parsing import parse_column

_N_ROWS_OF_COLUMN = 5000  # on which a single column is tested
_N_CHARACTERS = 200  # of a text
_N_PERMUTATIONS = 5
_LEAST_GAINS = {True: 0.1, False: 0.9}  # of identifiers, and of other columns
_FILE_NAME = re.compile(r"[^/\\]*\.[A-Za-z][A-Za-z0-9]{1,4}$")
_IDENTIFIERS = ("identifier", "file name", "datetime")


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
        if features is None or not small_folds:
            continue
        model = _single_column_model(features, classes)
        record["score"] = _out_of_fold(model, features, target, small_folds, classes)
        permuted = []
        for permuted_target in permuted_targets:
            permuted.append(
                _out_of_fold(model, features, permuted_target, small_folds, classes)
            )
        record["permuted"] = max(permuted)
        chance = np.mean(permuted)
        record["gain"] = (record["score"] - chance) / (1 - chance)
        is_identifier = kind in _IDENTIFIERS
        exceeds = record["score"] > record["permuted"]
        record["suspicious"] = exceeds and record["gain"] >= _LEAST_GAINS[is_identifier]
    fields = ["column", "kind", "score", "permuted", "gain", "suspicious"]
    columns = pd.DataFrame(records, columns=fields)
    columns["suspicious"] = columns["suspicious"].eq(True)
    return columns.sort_values("gain", ascending=False, ignore_index=True)


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
    observed, predicted = np.concatenate(observed), np.concatenate(predicted)
    if not classes:
        return r2_score(observed, predicted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        return balanced_accuracy_score(observed, predicted)
