"""The training rows of a projection, and the folds of its cross-fitting."""

import warnings
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold, check_cv

from sklembed._targets import Target
from sklembed._validation import split_rows


@dataclass(frozen=True)
class TrainingData:
    """A training set: all rows (`table`, `labels`), and the observed rows (`X`, `target`)."""

    table: np.ndarray
    labels: np.ndarray
    X: np.ndarray
    observed: np.ndarray
    target: Target
    weight: np.ndarray | None

    def training_rows(self, rows=None):
        """Return the positions of the observed rows, or of some of them, of positive weight."""
        if rows is None:
            rows = np.arange(len(self.X))
        return rows if self.weight is None else rows[self.weight[rows] > 0]

    def has_pairs(self, rows=None):
        """Return whether two of these rows belong together."""
        return self.target.has_pairs(self.training_rows(rows))


def make_folds(cv, data, seed, metadata):
    """Return the folds of cross-fitting.

    Parameters
    ----------
    cv : int, cross-validation splitter, iterable or None
        An int is the number of shuffled folds, stratified if the target has classes.
    data : TrainingData
        The training set.
    seed : int
        Seeds the folds of an int.
    metadata : dict
        Metadata for the splitter, such as `groups`.

    Returns
    -------
    folds : list of (train, held_out) or None
        Positions of observed rows; None if `cv` is None, or if no folds can be formed.

    Raises
    ------
    ValueError
        If a splitter does not hold out each row exactly once, or leaves no pair to train on.
    """
    if cv is None:
        return None
    if not isinstance(cv, Integral):
        return _folds_of_splitter(cv, data, metadata)
    n_rows, strata = len(data.X), data.target.strata
    if strata is None:
        splitter = KFold(min(cv, n_rows), shuffle=True, random_state=seed)
    else:
        sizes = np.bincount(strata)
        n_splits = min(cv, sizes[sizes >= 2].min())
        splitter = _StratifiedFolds(n_splits, shuffle=True, random_state=seed)
    folds = list(splitter.split(data.X, strata))
    if all(data.has_pairs(train) for train, _ in folds):
        return folds
    warnings.warn(
        f"No folds of the {n_rows} observed rows ({data.target.describe()}) leave two rows that "
        "belong together to train on, so cross-fitting is skipped. The training rows are "
        "projected by a network that was trained on their labels, and the downstream estimator "
        "will be overconfident.",
        UserWarning,
        stacklevel=2,
    )
    return None


def _folds_of_splitter(cv, data, metadata):
    """Return the folds of a splitter on all rows as positions of observed rows."""
    observed = data.observed
    has_classes = data.target.strata is not None
    splitter = check_cv(cv, data.labels, classifier=has_classes)
    positions = np.arange(len(observed))
    folds = []
    for train, held_out in split_rows(splitter, data.table, data.labels, metadata):
        folds.append((positions[np.asarray(train)], positions[np.asarray(held_out)]))
    check_each_row_held_out_once(folds, len(observed))
    position_of_observed = np.cumsum(observed) - 1
    observed_folds = []
    for number, (train, held_out) in enumerate(folds):
        train = position_of_observed[train[observed[train]]]
        held_out = position_of_observed[held_out[observed[held_out]]]
        if not data.has_pairs(train):
            raise ValueError(
                f"Fold {number} of cv has {len(train)} observed training rows, of which no two "
                "belong together. Use fewer folds, or folds over which the observed rows are "
                "spread evenly."
            )
        if len(held_out):
            observed_folds.append((train, held_out))
    return observed_folds


def check_each_row_held_out_once(folds, n_samples):
    """Refuse folds that hold out a row twice or never, or also train on it."""
    times = np.zeros(n_samples, dtype=int)
    for fold, (train, held_out) in enumerate(folds):
        times[held_out] += 1
        overlap = np.intersect1d(train, held_out)
        if len(overlap):
            raise ValueError(
                f"Fold {fold} of cv trains on row {overlap[0]}, which it holds out "
                f"({len(overlap)} such rows). The two parts of a fold must be disjoint."
            )
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        raise ValueError(
            f"cv must hold out each row exactly once, but row {wrong[0]} is held out "
            f"{times[wrong[0]]} times ({len(wrong)} such rows). Use a splitter whose test folds "
            "partition the rows, such as StratifiedKFold or StratifiedGroupKFold."
        )


class _StratifiedFolds(StratifiedKFold):
    """Stratified folds without a warning about classes of one row."""

    def split(self, X, y, groups=None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            yield from super().split(X, y)
