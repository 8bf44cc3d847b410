"""Targets of all types, encoded as arrays that define the affinity of two rows."""

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from numbers import Real

import numpy as np
import pandas as pd
from scipy.sparse import issparse
from scipy.stats import rankdata
from sklearn.model_selection import train_test_split
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import type_of_target

from sklembed._validation import check_no_missing_label, encode_classes, sorted_labels

TARGET_TYPES = ("multiclass", "multilabel", "continuous", "hierarchical")

# Whole numbers look like measurements rather than classes if there are more values than
# the first number, and half of the values have fewer rows than the second.
_MEASURED = ((20, 10), (10, 2))

_KINDS = {
    "binary": "multiclass",
    "multiclass": "multiclass",
    "multilabel-indicator": "multilabel",
    "multiclass-multioutput": "hierarchical",
    "continuous": "continuous",
    "continuous-multioutput": "continuous",
}


@dataclass(frozen=True)
class Target:
    """An encoded target.

    Attributes
    ----------
    kind : {"multiclass", "multilabel", "continuous", "hierarchical"}
        Type of the target.
    values : ndarray of shape (n_samples,) or (n_samples, n_columns)
        Class codes; indicators of labels; ranks scaled to [0, 1]; codes of each level.
    classes : ndarray, list of ndarray or None
        The labels, a list of them if there are levels; None for numbers.
    strata : ndarray of shape (n_samples,) or None
        Class codes by which folds and batches are balanced, those of the coarsest
        level. None if a row has no single class.
    """

    kind: str
    values: np.ndarray
    classes: np.ndarray | list[np.ndarray] | None = None
    strata: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Target":
        """Return the target of a subset of rows, by positions or a mask."""
        strata = None if self.strata is None else self.strata[rows]
        return replace(self, values=self.values[rows], strata=strata)

    def describe(self) -> str:
        """Return the type and the number of classes or levels in words."""
        if self.kind == "continuous":
            return "continuous"
        if self.kind == "hierarchical":
            return f"hierarchical, {len(self.classes)} levels"
        return f"{self.kind}, {len(self.classes)} classes"

    def looks_measured(self) -> bool:
        """Return whether classes look like whole numbers that were measured or counted.

        Each level of several is examined. A level of a tree, where every label belongs
        to one label of the level above, does not count.
        """
        if self.strata is None:
            return False
        levels = [self.classes]
        if self.kind == "hierarchical":
            levels = self.classes
        codes = self.values.reshape(len(self.values), -1)
        for level, classes in enumerate(levels):
            counts = np.unique(codes[:, level], return_counts=True)[1]
            if not _has_rare_values(counts) or _numbers(classes) is None:
                continue
            with_parents = np.unique(codes[:, max(level - 1, 0) : level + 1], axis=0)
            if level == 0 or len(with_parents) > len(counts):
                return True
        return False

    def has_pairs(self, rows: np.ndarray) -> bool:
        """Return whether any two of these rows are a positive pair."""
        values = self.values[rows]
        if len(values) < 2:
            return False
        if self.kind == "continuous":
            return True
        if self.kind == "multilabel":
            return bool((values.sum(axis=0) > 1).any())
        codes = values.reshape(len(values), -1)[:, 0]  # of the coarsest level
        return len(np.unique(codes)) < len(codes)


def _has_rare_values(counts: np.ndarray) -> bool:
    """Return whether there are too many values with too few rows for classes."""
    for n_values, n_rows in _MEASURED:
        if len(counts) > n_values and np.median(counts) < n_rows:
            return True
    return False


def encode_target(y, target_type: str = "auto") -> Target:
    """Encode a target of any type, which is inferred from its values by default.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_columns)
        Class labels; numbers with a fraction; a 0/1 column for each label; or a column
        of labels for each level of a tree, the coarsest first.
    target_type : {"auto", "multiclass", "multilabel", "continuous", "hierarchical"}
        Type of the target.

    Returns
    -------
    target : Target
        The encoded target.

    Raises
    ------
    ValueError
        If a label is missing or a list, all rows have the same target, or `y` does not
        match the type.
    """
    if issparse(y):
        y = y.toarray()
    check_no_missing_label(y)
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1 and target_type != "multilabel":
        y = column_or_1d(y, warn=True)
    if target_type == "auto":
        target_type = _infer_type(y)
    encode = {
        "multiclass": _multiclass,
        "multilabel": _multilabel,
        "continuous": _continuous,
        "hierarchical": _hierarchical,
    }[target_type]
    return encode(y)


def _infer_type(y: np.ndarray) -> str:
    """Infer the type of a target from its values."""
    if y.dtype.kind == "O" and not isinstance(y.flat[0], date):
        numbers = _numbers(y)
        if numbers is not None and (numbers != np.floor(numbers)).any():
            return "continuous"
    if y.ndim == 2 and y.dtype.kind in "OUS":
        return "hierarchical"
    if y.ndim == 1 and y.dtype.kind in "OUS":
        return "multiclass"
    kind = type_of_target(y)
    if kind not in _KINDS:
        raise ValueError(
            f"Unknown label type: y of shape {y.shape} is {kind!r}. Pass class labels, "
            "numbers, a 0/1 column for each label, or a column of labels for each "
            "level of a tree."
        )
    return _KINDS[kind]


def _multiclass(y: np.ndarray) -> Target:
    classes, codes = encode_classes(y)
    return Target("multiclass", codes, classes, codes)


def _multilabel(y: np.ndarray) -> Target:
    if y.ndim != 2 or not np.isin(np.unique(y), (0, 1)).all():
        raise ValueError(
            "A multilabel y has a column of 0 and 1 for each label; got shape "
            f"{y.shape} and the values {np.unique(y)[:5]}. See "
            "sklearn.preprocessing.MultiLabelBinarizer."
        )
    if (y == y[0]).all():
        raise ValueError(
            f"y is {y[0].astype(int).tolist()} in all {len(y)} rows; at least two rows "
            "must differ in a label."
        )
    return Target("multilabel", y.astype(np.float32), np.arange(y.shape[1]))


def _continuous(y: np.ndarray) -> Target:
    numbers = _numbers(y)
    if numbers is None:  # strings, which may be numerals
        numbers = pd.DataFrame(y).apply(pd.to_numeric).to_numpy(np.float64)
    numbers = numbers.reshape(len(y), -1)
    if not np.isfinite(numbers).all():
        raise ValueError(
            "Input y contains infinity. Continuous targets must be finite."
        )
    if (numbers == numbers[0]).all():
        raise ValueError(
            f"y is {numbers[0].tolist()} in all {len(numbers)} rows; at least two rows "
            "must differ."
        )
    ranks = (rankdata(numbers, axis=0) - 1) / (len(numbers) - 1)
    return Target("continuous", ranks.astype(np.float32))


def _numbers(y: np.ndarray) -> np.ndarray | None:
    """Return numbers, dates and durations as floats; None for labels of other types."""
    if y.dtype.kind in "iuf":
        return y.astype(np.float64)
    if y.dtype.kind in "mM":
        return y.astype(np.int64).astype(np.float64)
    if y.dtype.kind != "O":
        return None
    types = {type(cell) for cell in y.flat}
    if all(issubclass(kind, Real | Decimal) and kind is not bool for kind in types):
        return y.astype(np.float64)
    if all(issubclass(kind, date) for kind in types):
        instants = pd.to_datetime(y.ravel(), utc=True).asi8
        return instants.reshape(y.shape).astype(np.float64)
    return None


def _hierarchical(y: np.ndarray) -> Target:
    if y.ndim != 2:
        raise ValueError(
            "A hierarchical y has a column of labels for each level, the coarsest "
            f"first; got shape {y.shape}."
        )
    classes, strata = encode_classes(y[:, 0])
    classes, codes = [classes], [strata]
    for column in y.T[1:]:
        column_classes, column_codes = sorted_labels(column)
        classes.append(column_classes)
        codes.append(column_codes)
    return Target("hierarchical", np.stack(codes, axis=1), classes, strata)


def warn_if_measured(target: Target, y) -> None:
    """Warn if a target was read as classes, but looks like measurements or counts.

    Warns
    -----
    UserWarning
        If `y` has more than 20 distinct whole numbers, half of them with fewer than 10
        rows, or more than 10, half of them with one row. A pandas categorical column is
        never warned about.
    """
    if isinstance(getattr(y, "dtype", None), pd.CategoricalDtype):
        return
    if not target.looks_measured():
        return
    finest = target.values.reshape(len(target.values), -1)[:, -1]
    warnings.warn(
        f"y has {len(np.unique(finest))} distinct whole numbers or dates in "
        f"{len(finest)} rows and was taken for {target.kind} labels, which have no "
        "order. If they are measurements or counts, set target_type='continuous'. If "
        f"they are labels, set target_type={target.kind!r}, which silences this "
        "warning.",
        UserWarning,
        stacklevel=3,
    )


def warn_if_tags(target: Target) -> None:
    """Warn if a target was read as levels of a tree, but looks like lists of tags.

    Warns
    -----
    UserWarning
        If a text is a label in two columns, as in lists of tags of equal length.
    """
    if target.kind != "hierarchical":
        return
    n_levels = Counter()
    for classes in target.classes:
        n_levels.update(classes.tolist())
    for label, n in n_levels.items():
        if n > 1 and isinstance(label, str):
            warnings.warn(
                f"y was taken for the levels of a tree, but {label!r} is a label of "
                "two columns. If y contains lists of tags, pass a column of 0 and 1 "
                "for each tag: "
                "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y). If it "
                "contains levels, set target_type='hierarchical', which silences this "
                "warning.",
                UserWarning,
                stacklevel=3,
            )
            return


def hold_back(
    rows: np.ndarray, strata: np.ndarray | None, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into a training set and a validation set, stratified if possible.

    Parameters
    ----------
    rows : ndarray of int
        Positions of rows.
    strata : ndarray of shape (n_samples,) or None
        Class codes of all rows, if they have classes.
    fraction : float
        Fraction of the rows in the validation set.
    seed : int
        Seed of the split.

    Returns
    -------
    train, valid : ndarray of int
        Positions of rows. The validation set is empty if there are too few rows.
    """
    n_valid = int(np.ceil(fraction * len(rows)))
    if n_valid >= len(rows):
        return rows, rows[:0]
    stratify = None
    if strata is not None:
        sizes = np.bincount(strata[rows])
        sizes = sizes[sizes > 0]
        if sizes.min() >= 2 and n_valid >= len(sizes):
            stratify = strata[rows]
    train, valid = train_test_split(
        rows, test_size=n_valid, stratify=stratify, random_state=seed
    )
    return train, valid
