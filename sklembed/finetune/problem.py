"""The rows of a fit, their division into parts, and logistic regression on vectors."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import (
    GroupShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
)

from sklembed._grid import descend
from sklembed._logistic import fit_classes
from sklembed._targets import hold_back

_CS = 10.0 ** np.arange(-1, 3)  # inverse penalties
_START_C = 2  # position of 10
_N_FOLDS = 3  # on which the penalty is chosen
# scikit-learn warns of folds with few rows per class.
_FEW_ROWS = "The (least populated class|number of unique classes)"


@dataclass
class Problem:
    """The rows of a fit: cells, targets and weights."""

    column: Any
    backend: Any
    space: Any
    targets: np.ndarray  # (n_samples,): class codes, or standardised numbers
    strata: np.ndarray | None  # (n_samples,)
    weight: np.ndarray  # (n_samples,)
    groups: np.ndarray | None  # (n_samples,)
    n_outputs: int
    seed: int
    vectors: np.ndarray = None  # (n_samples, n_features), centred and scaled
    rows: np.ndarray = None  # rows with a cell and a positive weight

    @property
    def group_codes(self):
        """Group of each row; without groups, rows with equal cells are one."""
        return self.column.first_rows if self.groups is None else self.groups

    def split(self, fraction):
        """Return training rows and validation set, without a common group.

        Classes that the training rows would lack are in the training rows alone.
        """
        if _has_repeats(self.group_codes[self.rows]):
            train, valid = self._split_groups(fraction)
        else:
            train, valid = hold_back(self.rows, self.strata, fraction, self.seed)
        if self.strata is not None:
            is_rare = ~np.isin(self.strata[valid], self.strata[train])
            codes = self.group_codes[valid]
            joins = np.isin(codes, codes[is_rare])
            train, valid = np.concatenate([train, valid[joins]]), valid[~joins]
        return np.sort(train), np.sort(valid)

    def _split_groups(self, fraction):
        rows, codes = self.rows, self.group_codes[self.rows]
        n_groups = len(np.unique(codes))
        if n_groups < 2:
            return rows, rows[:0]
        if self.strata is None:
            splitter = GroupShuffleSplit(1, test_size=fraction, random_state=self.seed)
            train, valid = next(splitter.split(rows, groups=codes))
            return rows[train], rows[valid]
        folds = self._stratified_folds(max(2, round(1 / fraction)))
        return folds[0] if folds else (rows, rows[:0])

    def folds(self):
        """Return folds for the penalty, each with two classes in training; maybe none."""
        folds = []
        for train, held_out in self._stratified_folds(_N_FOLDS):
            if len(np.unique(self.targets[train])) > 1:
                folds.append((train, held_out))
        return folds

    def _stratified_folds(self, n_folds):
        """Return shuffled folds of the rows, stratified and divided by group."""
        rows, strata = self.rows, self.strata[self.rows]
        codes = self.group_codes[rows]
        n_folds = min(n_folds, len(np.unique(codes)), np.bincount(strata).max())
        if n_folds < 2:
            return []
        if _has_repeats(codes):
            splitter = StratifiedGroupKFold
        else:
            splitter, codes = StratifiedKFold, None
        splitter = splitter(n_folds, shuffle=True, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_FEW_ROWS)
            folds = list(splitter.split(rows, strata, codes))
        return [(rows[train], rows[held_out]) for train, held_out in folds]


def _has_repeats(codes):
    return len(np.unique(codes)) < len(codes)


def find_C(problem):
    """Return the inverse penalty of logistic regression with the lowest log loss."""
    folds = problem.folds()
    if not folds:
        return float(_CS[_START_C])

    def error(position):
        C = _CS[position[0]]
        return sum(_fold_loss(problem, C, *fold) for fold in folds)

    return float(_CS[descend(error, [len(_CS)], (_START_C,))[0]])


def _fold_loss(problem, C, train, held_out):
    """Return the weighted log loss of a logistic regression on held-out rows."""
    coef, intercept = fit_logistic(problem, train, C, tol=1e-3)
    probabilities = softmax(problem.vectors[held_out] @ coef.T + intercept, axis=1)
    likelihood = probabilities[np.arange(len(held_out)), problem.targets[held_out]]
    # The training rows may lack a class.
    smallest = 1 / (len(train) + problem.n_outputs)
    return -problem.weight[held_out] @ np.log(np.maximum(likelihood, smallest))


def fit_logistic(problem, rows, C, tol=1e-4):
    """Fit logistic regression on some rows.

    Returns
    -------
    coef : ndarray of shape (n_classes, n_features)
        Coefficients of all classes.

    intercept : ndarray of shape (n_classes,)
        Intercepts; a low score for classes without a row.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the last digits
        warnings.filterwarnings("ignore", message=_FEW_ROWS)
        coef, intercept = fit_classes(
            C,
            problem.vectors[rows],
            problem.targets[rows],
            problem.weight[rows],
            problem.n_outputs,
            tol=tol,
        )
    return coef.T, intercept
