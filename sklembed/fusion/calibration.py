"""Probabilities from scores, calibrated on predictions out of fold."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, softmax

_LARGEST = 1e4  # slope and intercept
_LEAST_FACTOR = 0.05  # for groups; positive, so that the most probable class remains so


def calibrate(out_of_fold, y, weight):
    """Return the slope and the intercepts that turn scores into logits.

    Parameters
    ----------
    out_of_fold : list of ndarray of shape (n_samples, n_outputs)
        Scores out of random folds, NaN for rows without a score. If there is a second
        array, its scores are out of folds that keep groups together. They correct the
        slope, so that probabilities of new groups are as certain as they are right.
        They would misjudge the intercepts: a fold may lack most rows of a class.
    y : ndarray of int of shape (n_samples,) or (n_samples, n_outputs)
        Codes of classes, or 0/1 for each label.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.

    Returns
    -------
    slope : float
        Not negative.
    intercepts : ndarray of shape (n_outputs,)
        One per class or label.
    """
    slope, intercepts = _fit_known(out_of_fold[0], y, weight, True)
    for of_groups in out_of_fold[1:]:
        factor, _ = _fit_known(slope * of_groups + intercepts, y, weight, False)
        factor = max(factor, _LEAST_FACTOR)
        slope, intercepts = factor * slope, factor * intercepts
    return slope, intercepts


def _fit_known(scores, y, weight, with_intercepts):
    """Fit on the rows with a score; return the slope and the intercepts."""
    rows = ~np.isnan(scores[:, 0])
    return fit_calibration(scores[rows], y[rows], weight[rows], with_intercepts)[:2]


def fit_calibration(scores, y, weight, with_intercepts=True):
    """Fit the slope and the intercepts that turn scores into logits, by maximum likelihood.

    The slope of log-probabilities is the inverse of a temperature. The intercepts correct
    classes that scores favour or neglect. One more row, of unknown class, limits both where
    all scores are right: of few rows, that is no proof that the scores are certain.

    Parameters
    ----------
    scores : ndarray of shape (n_samples, n_outputs)
        Scores of classes or labels, out of fold.
    y : ndarray of int of shape (n_samples,) or (n_samples, n_outputs)
        Codes of classes, or 0/1 for each label.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.
    with_intercepts : bool, default=True
        If False, intercepts are 0.

    Returns
    -------
    slope : float
        Not negative.
    intercepts : ndarray of shape (n_outputs,)
        One per class or label.
    loss : float
        Mean log loss, with that row; the sum over labels if there are several.
    """
    weight = weight / weight.sum()
    n_outputs = scores.shape[1]
    is_classes = y.ndim == 1
    truth = np.eye(n_outputs)[y] if is_classes else y
    n_rows = 1 / np.square(weight).sum()  # of equal weight that are as certain
    truth = _with_unknown_row(truth, n_rows, n_outputs if is_classes else 2)

    def loss(parameters):
        logits = parameters[0] * scores + parameters[1:]
        if is_classes:
            losses = -(truth * log_softmax(logits, axis=1)).sum(axis=1)
            residual = softmax(logits, axis=1) - truth
        else:
            losses = _log_losses(logits, truth).sum(axis=1)
            residual = expit(logits) - truth
        residual *= weight[:, None]
        gradient = np.append((residual * scores).sum(), residual.sum(axis=0))
        return weight @ losses, gradient

    largest = _LARGEST if with_intercepts else 0
    bounds = [(0, _LARGEST)] + [(-largest, largest)] * n_outputs
    start = np.append(1.0, np.zeros(n_outputs))
    result = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return float(result.x[0]), result.x[1:], float(result.fun)


def fit_sigmoids(scores, truth, weight, column, n_columns):
    """Fit a slope and an intercept for each column of scores, as Platt's method does.

    Parameters
    ----------
    scores : ndarray of shape (n_scores,)
        Scores out of fold, of all columns.
    truth : ndarray of shape (n_scores,)
        0 or 1.
    weight : ndarray of shape (n_scores,)
        Weights of the scores.
    column : ndarray of int of shape (n_scores,)
        The column of each score.
    n_columns : int
        Number of columns.

    Returns
    -------
    slopes : ndarray of shape (n_columns,)
        Not negative.
    intercepts : ndarray of shape (n_columns,)
        Zero for a column without scores.
    """

    def sums(values):
        return np.bincount(column, values, n_columns)

    def shares(values):
        return values / np.maximum(sums(values), np.finfo(float).tiny)[column]

    weight = shares(weight)
    n_rows = 1 / np.maximum(sums(np.square(weight)), np.finfo(float).tiny)
    truth = _with_unknown_row(truth, n_rows[column], 2)

    def loss(parameters):
        slopes, intercepts = parameters.reshape(2, n_columns)
        logits = slopes[column] * scores + intercepts[column]
        residual = weight * (expit(logits) - truth)
        gradient = np.concatenate([sums(residual * scores), sums(residual)])
        return weight @ _log_losses(logits, truth), gradient

    bounds = [(0, _LARGEST)] * n_columns + [(-_LARGEST, _LARGEST)] * n_columns
    start = np.repeat([1.0, 0.0], n_columns)
    result = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return result.x.reshape(2, n_columns)


def _with_unknown_row(truth, n_rows, n_classes):
    share = 1 / (n_rows + 1)
    return (1 - share) * truth + share / n_classes


def _log_losses(logits, truth):
    return -(truth * log_expit(logits) + (1 - truth) * log_expit(-logits))
