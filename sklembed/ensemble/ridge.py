"""Ridge regression in closed form, with predictions out of fold."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

_ALPHAS = 10.0 ** np.arange(-3, 3.5, 0.5)


class Ridge(NamedTuple):
    """A fitted ridge regression."""

    coef: np.ndarray  # (n_columns, n_outputs)
    intercept: np.ndarray  # (n_outputs,)
    penalty: float


def fit_ridge(Z, targets, weight, folds) -> tuple[Ridge, np.ndarray]:
    """Fit a ridge regression with the penalty of the smallest error out of fold.

    Sums over the rows of each fold give the solutions of all folds.

    Parameters
    ----------
    Z : ndarray of shape (n_samples, n_columns)
        The rows.
    targets : ndarray of shape (n_samples, n_outputs)
        The targets.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.
    folds : list of (train, held_out)
        Positions of rows; each row is held out once.

    Returns
    -------
    ridge : Ridge
        The regression, fitted on all rows.
    predicted : ndarray of shape (n_samples, n_outputs)
        Predictions out of fold.
    """
    mean = np.average(Z, axis=0, weights=weight)
    center = np.average(targets, axis=0, weights=weight)
    Z, targets = Z - mean, targets - center
    Z, axes = rotate(Z.astype(np.float64))
    gram, moment = _sums(Z, targets, weight, slice(None))
    sums = [_sums(Z, targets, weight, held_out) for _, held_out in folds]
    best_error = np.inf
    for alpha in _ALPHAS:
        predicted = np.empty_like(targets)
        for (_, held_out), sums_of_fold in zip(folds, sums, strict=True):
            rest = gram - sums_of_fold[0], moment - sums_of_fold[1]
            predicted[held_out] = Z[held_out] @ _solve(*rest, alpha)
        error = weight @ np.square(predicted - targets).sum(axis=1)
        if error < best_error:
            best_error, best_alpha, best = error, float(alpha), predicted
    coef = axes @ _solve(gram, moment, best_alpha)
    return Ridge(coef, center - mean @ coef, best_alpha), best + center


def rotate(Z):
    """Return the rows in as many dimensions as there are rows, and the axes of these.

    Penalised linear models do not change under a rotation.
    """
    n_rows, n_columns = Z.shape
    if n_columns <= n_rows:
        return Z, np.eye(n_columns, dtype=Z.dtype)
    axes, _ = np.linalg.qr(Z.T)
    return Z @ axes, axes


def _sums(Z, targets, weight, rows):
    weighted = Z[rows] * weight[rows, None]
    return Z[rows].T @ weighted, weighted.T @ targets[rows]


def _solve(gram, moment, alpha):
    """Solve a ridge regression, given sums over rows."""
    system = gram.copy()
    system[np.diag_indices(len(system))] += alpha
    return cho_solve(cho_factor(system, lower=True, overwrite_a=True), moment)
