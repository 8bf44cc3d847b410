"""Probabilities from scores: a few slopes, fitted on predictions out of fold."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, softmax

_LARGEST_SLOPE = 1e4


def fit_slopes(features, y, weight, offset=0.0):
    """Fit the slopes of a linear combination of scores by maximum likelihood.

    With a single feature, the log-probability, the slope is the inverse of the
    temperature. One more row, of unknown class, limits the slopes where all scores are
    right: of few rows, that is no proof that the scores are certain.

    Parameters
    ----------
    features : ndarray of shape (n_slopes, n_samples, n_outputs)
        Scores of classes or labels, out of fold.
    y : ndarray of int of shape (n_samples,) or (n_samples, n_outputs)
        Codes of classes, or 0/1 for each label.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.
    offset : ndarray of shape (n_outputs,) or float, default=0.0
        Logit for scores of zero.

    Returns
    -------
    slopes : ndarray of shape (n_slopes,)
        The first slope is not negative.
    loss : float
        Mean log loss, with that row; the sum over labels if there are several.
    """
    weight = weight / weight.sum()
    truth, n_classes = y, 2
    if y.ndim == 1:
        n_classes = features.shape[2]
        truth = np.eye(n_classes)[y]
    n_rows = 1 / np.square(weight).sum()  # of equal weight that are as certain
    share = 1 / (n_rows + 1)
    truth = (1 - share) * truth + share / n_classes

    def loss(slopes):
        logits = np.tensordot(slopes, features, 1) + offset
        if y.ndim == 1:
            losses = -(truth * log_softmax(logits, axis=1)).sum(axis=1)
            residual = softmax(logits, axis=1) - truth
        else:
            losses = truth * log_expit(logits) + (1 - truth) * log_expit(-logits)
            losses = -losses.sum(axis=1)
            residual = expit(logits) - truth
        gradient = np.tensordot(features, residual * weight[:, None], 2)
        return weight @ losses, gradient

    start = np.zeros(len(features))
    start[0] = 1
    bounds = [(-_LARGEST_SLOPE, _LARGEST_SLOPE)] * len(features)
    bounds[0] = 0, _LARGEST_SLOPE
    result = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return result.x, result.fun
