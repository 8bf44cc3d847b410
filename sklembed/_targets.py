"""Targets of every kind, turned into arrays from which the affinity of two rows can be told."""

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

# Whole numbers look like measurements, not like classes, if there are more values than the first
# number and half of them have fewer rows than the second.
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
    """A target, encoded.

    Attributes
    ----------
    kind : {"multiclass", "multilabel", "continuous", "hierarchical"}
        What it is.
    values : ndarray of shape (n_samples,) or (n_samples, n_columns)
        Class codes; indicators of labels; ranks scaled to [0, 1]; codes of each level.
    classes : ndarray, list of ndarray or None
        The labels seen, for each level if there are levels; None for numbers.
    strata : ndarray of shape (n_samples,) or None
        The classes that folds and batches are balanced by: the coarsest level; None where a row
        has no one class.
    """

    kind: str
    values: np.ndarray
    classes: np.ndarray | list[np.ndarray] | None = None
    strata: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Target":
        """Return the target of some rows, by positions or a mask."""
        strata = None if self.strata is None else self.strata[rows]
        return replace(self, values=self.values[rows], strata=strata)

    def describe(self) -> str:
        """Say in words what it is."""
        if self.kind == "continuous":
            return "continuous"
        if self.kind == "hierarchical":
            return f"hierarchical, {len(self.classes)} levels"
        return f"{self.kind}, {len(self.classes)} classes"

    def looks_measured(self) -> bool:
        """Tell whether classes look like whole numbers that were measured or counted.

        Of several levels each is looked at, but not one of a tree, where every label belongs to
        one label of the level above.
        """
        if self.strata is None:
            return False
        levels = self.classes if self.kind == "hierarchical" else [self.classes]
        codes = self.values.reshape(len(self.values), -1)
        for level, classes in enumerate(levels):
            counts = np.unique(codes[:, level], return_counts=True)[1]
            rare = any(
                len(counts) > n_values and np.median(counts) < n_rows
                for n_values, n_rows in _MEASURED
            )
            if not rare or _numbers(classes) is None:
                continue
            with_parents = np.unique(codes[:, max(level - 1, 0) : level + 1], axis=0)
            if level == 0 or len(with_parents) > len(counts):
                return True
        return False

    def has_pairs(self, rows: np.ndarray) -> bool:
        """Tell whether any two of these rows belong together."""
        values = self.values[rows]
        if self.kind == "continuous":
            return len(values) > 1
        if self.kind == "multilabel":
            return bool((values.sum(axis=0) > 1).any())
        top = values if values.ndim == 1 else values[:, 0]
        return len(top) > 0 and bool(np.bincount(top).max() > 1)


def encode_target(y, target_type: str = "auto") -> Target:
    """Encode a target of any kind, which is told from its values unless it is named.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_columns)
        Class labels; or numbers with a fraction; or a 0/1 column for each label; or a column of
        labels for each level of a tree, the coarsest first.
    target_type : {"auto", "multiclass", "multilabel", "continuous", "hierarchical"}
        Which of these it is.

    Returns
    -------
    target : Target
        The target as arrays.

    Raises
    ------
    ValueError
        If a label is missing or a list, all rows are alike, or `y` does not fit the type.
    """
    y = y.toarray() if issparse(y) else y
    check_no_missing_label(y)
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1 and target_type != "multilabel":
        y = column_or_1d(y, warn=True)
    kind = _kind(y) if target_type == "auto" else target_type
    return {
        "multiclass": _multiclass,
        "multilabel": _multilabel,
        "continuous": _continuous,
        "hierarchical": _hierarchical,
    }[kind](y)


def _kind(y: np.ndarray) -> str:
    """Tell the kind of a target from its values."""
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
            f"Unknown label type: y of shape {y.shape} is {kind!r}. Give class labels, numbers, a "
            "0/1 column for each label, or a column of labels for each level of a tree."
        )
    return _KINDS[kind]


def _multiclass(y: np.ndarray) -> Target:
    classes, codes = encode_classes(y)
    return Target("multiclass", codes, classes, codes)


def _multilabel(y: np.ndarray) -> Target:
    if y.ndim != 2 or not np.isin(np.unique(y), (0, 1)).all():
        raise ValueError(
            f"A multilabel y holds a column of 0 and 1 for each label; got shape {y.shape} and the "
            f"values {np.unique(y)[:5]}. See sklearn.preprocessing.MultiLabelBinarizer."
        )
    if (y == y[0]).all():
        raise ValueError(
            f"y is {y[0].astype(int).tolist()} in all {len(y)} rows; at least two rows must differ "
            "in a label."
        )
    return Target("multilabel", y.astype(np.float32), np.arange(y.shape[1]))


def _continuous(y: np.ndarray) -> Target:
    numbers = _numbers(y)
    if numbers is None:  # numbers in strings
        numbers = pd.DataFrame(y).apply(pd.to_numeric).to_numpy(np.float64)
    numbers = numbers.reshape(len(y), -1)
    if not np.isfinite(numbers).all():
        raise ValueError(
            "Input y contains infinity. Continuous targets must be finite."
        )
    if (numbers == numbers[0]).all():
        raise ValueError(
            f"y is {numbers[0].tolist()} in all {len(numbers)} rows; contrasting needs at least "
            "two different values."
        )
    ranks = (rankdata(numbers, axis=0) - 1) / (len(numbers) - 1)
    return Target("continuous", ranks.astype(np.float32))


def _numbers(y: np.ndarray) -> np.ndarray | None:
    """Return numbers, dates and durations as numbers; None for labels of any other type."""
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
            f"A hierarchical y holds a column of labels for each level, the coarsest first; got "
            f"shape {y.shape}."
        )
    top, levels = encode_classes(y[:, 0])
    pairs = [(top, levels)] + [sorted_labels(column) for column in y.T[1:]]
    codes = np.stack([codes for _, codes in pairs], axis=1)
    return Target("hierarchical", codes, [labels for labels, _ in pairs], levels)


def warn_if_measured(target: Target, y) -> None:
    """Warn of a target that was taken for classes, but looks like measurements or counts.

    Warns
    -----
    UserWarning
        If `y` holds more than 20 whole numbers, of which half have fewer than 10 rows, or more
        than 10, of which half have one row. A pandas column of categories is one of classes.
    """
    if (
        isinstance(getattr(y, "dtype", None), pd.CategoricalDtype)
        or not target.looks_measured()
    ):
        return
    n_values = len(
        np.unique(target.values[:, -1] if target.values.ndim > 1 else target.values)
    )
    warnings.warn(
        f"y holds {n_values} distinct whole numbers or dates in {len(target.values)} rows and "
        f"was taken for {target.kind} labels, of which near ones are as different as far ones. If "
        "they are measurements or counts, set target_type='continuous'. If they are labels, set "
        f"target_type={target.kind!r}, which silences this warning.",
        UserWarning,
        stacklevel=3,
    )


def warn_if_tags(target: Target) -> None:
    """Warn of a target that was taken for levels of a tree, but looks like lists of tags.

    Warns
    -----
    UserWarning
        If a text is a label of two columns, as where lists of tags are equally long.
    """
    if target.kind != "hierarchical":
        return
    labels = [label for level in target.classes for label in level.tolist()]
    shared = [
        label
        for label, n in Counter(labels).items()
        if n > 1 and isinstance(label, str)
    ]
    if shared:
        warnings.warn(
            f"y was taken for the levels of a tree, but {shared[0]!r} is a label of two columns. "
            "If y holds lists of tags, give a column of 0 and 1 for each tag: "
            "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y). If it holds levels, set "
            "target_type='hierarchical', which silences this warning.",
            UserWarning,
            stacklevel=3,
        )


def hold_back(
    rows: np.ndarray, strata: np.ndarray | None, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into those to train on and those to stop by, stratified where that can be.

    Parameters
    ----------
    rows : ndarray of int
        Positions of rows.
    strata : ndarray of shape (n_samples,) or None
        The class of every row, if rows have one.
    fraction : float
        The part to stop by.
    seed : int
        Seeds the split.

    Returns
    -------
    train, valid : ndarray of int
        The positions; none to stop by if there are too few rows.
    """
    n_valid = int(np.ceil(fraction * len(rows)))
    if n_valid >= len(rows):
        return rows, rows[:0]
    stratify = None if strata is None else strata[rows]
    if stratify is not None:
        sizes = np.bincount(stratify)
        if sizes[sizes > 0].min() < 2 or n_valid < np.count_nonzero(sizes):
            stratify = None
    train, valid = train_test_split(
        rows, test_size=n_valid, stratify=stratify, random_state=seed
    )
    return train, valid
