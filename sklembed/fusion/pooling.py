"""Pooling of log-probabilities of several modalities, and weights learned for it."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

_LOG_TINY = np.log(np.finfo(np.float64).tiny)


def find_floors(logs, total_weight, log_prior):
    """Return logarithms of the floors that keep probabilities from being 0.

    A forest, a tree or nearest neighbors return a zero if no similar training row had
    the class. The floor of a class is its prior times 1 / (1 + `total_weight`), the
    effect of one additional training row. If the classifier returns a smaller positive
    probability than that, the smallest one is the factor.

    Parameters
    ----------
    logs : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels, 2)
        Log-probabilities of training rows; -inf for a zero.
    total_weight : float
        Sum of the weights of the training rows.
    log_prior : ndarray of shape (n_classes,) or (n_labels, 2)
        Logarithms of the prior.

    Returns
    -------
    floors : ndarray of shape (2, n_classes) or (2, n_labels, 2)
        Logarithms of the amounts added to all probabilities, and of the values that
        replace zeros.
    """
    smallest = min(-np.log1p(total_weight), logs[np.isfinite(logs)].min())
    floor = log_prior + smallest
    added = np.full_like(floor, -np.inf)
    # A classifier that returns zeros has all its probabilities raised by the floor,
    # which keeps their order. Small but positive probabilities count as they are.
    if np.isneginf(logs).any():
        added = floor
    return np.stack([added, floor])


def smooth(logs, floors):
    """Return finite, unnormalized log-probabilities for the geometric mean."""
    added, zero = floors
    logs = np.logaddexp(logs, added)
    return np.where(np.isneginf(logs), zero, logs)


def row_weights(weights, observed):
    """Return the weights of the observed modalities in each row.

    Parameters
    ----------
    weights : array-like of shape (n_modalities,)
        Weight of each modality.
    observed : ndarray of bool of shape (n_samples, n_modalities)
        The modalities of each row.

    Returns
    -------
    weights : ndarray of shape (n_samples, n_modalities)
        Rows sum to 1, or to 0 without any modality. If all observed modalities have
        weight 0, they count equally.
    """
    weights = observed * np.asarray(weights)
    has_weight = weights.sum(axis=1, keepdims=True) > 0
    weights = np.where(has_weight, weights, observed)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def pool(logs, smoothed, weights, log_prior, pooling):
    """Return the logarithm of the weighted mean of the modalities' probabilities.

    Parameters
    ----------
    logs : ndarray of shape (n_modalities, n_samples, n_classes) or (..., n_labels, 2)
        Log-probabilities, -inf for a zero. Values of missing modalities are ignored.
    smoothed : ndarray of the same shape
        The same from `smooth`, for the geometric mean.
    weights : ndarray of shape (n_samples, n_modalities)
        Weights from `row_weights`.
    log_prior : ndarray of shape (n_classes,) or (n_labels, 2)
        Logarithms of the prior, for rows without any modality.
    pooling : {"geometric", "arithmetic"}
        The mean.

    Returns
    -------
    pooled : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels, 2)
        Finite log-probabilities, normalized over the last axis.
    """
    factors = np.expand_dims(weights.T, tuple(range(2, logs.ndim)))
    if pooling == "geometric":
        pooled = (factors * smoothed).sum(axis=0)
    else:
        with np.errstate(divide="ignore"):  # all probabilities may be 0
            pooled = logsumexp(logs, axis=0, b=factors)
    n_used = (weights > 0).sum(axis=1)
    single = np.flatnonzero(n_used == 1)
    pooled[single] = logs[weights[single].argmax(axis=1), single]
    pooled[n_used == 0] = log_prior
    pooled = log_softmax(pooled, axis=-1)
    return np.where(np.isneginf(pooled), _LOG_TINY, pooled)


def learn_weights(logs, log_prior, codes, sample_weight):
    """Average candidate weights by the likelihood of the labels out of fold.

    Candidates are equal weights of all modalities, equal weights of a subset, and
    freely fitted weights. The share of a candidate grows with its gain in
    log-likelihood over equal weights of all, minus a cost. The cost is 1 for each
    excluded modality, and half the logarithm of the number of rows for each free
    weight, as in Schwarz's criterion. If no candidate is worth its cost, the weights
    are equal.

    Parameters
    ----------
    logs : ndarray of shape (n_modalities, n_samples, n_classes) or (..., n_labels, 2)
        Finite log-probabilities out of fold; NaN where a row lacks the modality.
    log_prior : ndarray of shape (n_classes,) or (n_labels, 2)
        Logarithms of the prior.
    codes : ndarray of int of shape (n_samples,) or (n_samples, n_labels)
        The true classes or labels.
    sample_weight : ndarray of shape (n_samples,)
        Weights of the rows.

    Returns
    -------
    weights : ndarray of shape (n_modalities,)
        They sum to 1.
    """
    n_modalities, n_samples = logs.shape[:2]
    equal = np.full(n_modalities, 1 / n_modalities)
    observed = ~np.isnan(logs.reshape(n_modalities, n_samples, -1)[..., 0])
    rows = np.flatnonzero((observed.sum(axis=0) > 1) & (sample_weight > 0))
    if not len(rows):
        return equal
    model = _LogLinearPool.from_predictions(
        logs[:, rows], log_prior, codes[rows], sample_weight[rows]
    )
    cost_of_free_weight = 0.5 * np.log(max(model.importance.sum(), 8))
    used = np.arange(n_modalities)
    baseline = model.fit_equal(used)
    candidates, shares = [equal], [1.0]
    # Backward elimination: each step excludes the modality with the smallest loss.
    while len(used) > 1:
        cost = float(n_modalities - len(used))
        free_weights, likelihood = model.fit_free(used)
        candidates.append(free_weights)
        free_cost = cost + cost_of_free_weight * (len(used) - 1)
        shares.append(_share(likelihood - free_cost - baseline))
        likelihoods = [model.fit_equal(np.delete(used, i)) for i in range(len(used))]
        used = np.delete(used, np.argmax(likelihoods))
        candidates.append(np.isin(np.arange(n_modalities), used) / len(used))
        shares.append(_share(max(likelihoods) - cost - 1 - baseline))
    return np.average(candidates, axis=0, weights=shares)


def _share(gain):
    """Return a candidate's share from its gain over equal weights, whose share is 1."""
    return np.expm1(np.clip(gain, 0, 100))


class _LogLinearPool(NamedTuple):
    """Log-linear pool of modalities, fitted by maximum likelihood.

    The evidence of a modality is its log-probability minus the log prior. The weighted
    sum of evidence has a free scale, since classifiers may be over- or underconfident.
    A choice is a row, or a label of a row.
    """

    evidence: np.ndarray  # (n_modalities, n_choices, n_classes)
    log_prior: np.ndarray  # (n_choices, n_classes)
    y: np.ndarray  # (n_choices,)
    importance: np.ndarray  # (n_choices,)

    @classmethod
    def from_predictions(cls, logs, log_prior, codes, sample_weight):
        """Turn rows into choices; all labels of a row together count as one row."""
        evidence = np.nan_to_num(logs - log_prior)
        log_prior = np.broadcast_to(log_prior, evidence.shape[1:])
        if codes.ndim == 2:
            n_labels = codes.shape[1]
            evidence = evidence.reshape(len(logs), -1, 2)
            log_prior = log_prior.reshape(-1, 2)
            sample_weight = np.repeat(sample_weight / n_labels, n_labels)
        return cls(evidence, log_prior, codes.ravel(), sample_weight)

    def fit_equal(self, used):
        """Return the log-likelihood of equal weights of some modalities."""
        evidence = self.evidence[used].mean(axis=0, keepdims=True)

        def loss(log_scale):
            scale = np.exp(log_scale)
            value, gradient = self._loss(scale, evidence)
            return value, gradient * scale

        return -minimize(loss, np.zeros(1), jac=True, bounds=[(-10, 10)]).fun

    def fit_free(self, used):
        """Return maximum-likelihood weights of some modalities, and log-likelihood."""
        evidence = self.evidence[used]

        def loss(parameters):  # the log scale, and logits of the weights
            weights = softmax(parameters[1:])
            scaled = np.exp(parameters[0]) * weights
            value, gradient = self._loss(scaled, evidence)
            by_scale = (gradient * scaled).sum()
            return value, np.r_[by_scale, gradient * scaled - weights * by_scale]

        bounds = [(-10, 10)] * (len(used) + 1)
        result = minimize(loss, np.zeros(len(used) + 1), jac=True, bounds=bounds)
        weights = np.zeros(len(self.evidence))
        weights[used] = softmax(result.x[1:])
        return weights, -result.fun

    def _loss(self, scaled, evidence):
        """Return the negative log-likelihood of scaled weights, and its gradient."""
        truth = np.arange(len(self.y)), self.y
        log_p = log_softmax(self.log_prior + np.tensordot(scaled, evidence, 1), axis=1)
        residual = np.exp(log_p)
        residual[truth] -= 1
        residual *= self.importance[:, None]
        gradient = np.tensordot(evidence, residual, 2)
        return -(self.importance * log_p[truth]).sum(), gradient
