"""The gate: choose the simplest of several representations with a near-optimal score."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import f1_score

from sklembed._targets import Target

Fold = tuple[np.ndarray, np.ndarray]


def choose(
    candidates: Mapping[str, np.ndarray],
    target: Target,
    folds: Sequence[Fold],
    sample_weight: np.ndarray | None = None,
) -> tuple[str, dict[str, np.ndarray]]:
    """Score representations by a linear probe out of fold, and apply the one-standard-error rule.

    Of the candidates, ordered from simple to complex, the rule takes the first whose score is
    within one standard error of the best. The standard error is that of the difference over the
    folds.

    Parameters
    ----------
    candidates : mapping of str to ndarray of shape (n_samples, n_columns)
        Representations, the simplest first.
    target : Target
        Target of the probe, a ridge regression.
    folds : sequence of (train, held_out)
        Positions of rows.
    sample_weight : ndarray of shape (n_samples,) or None
        Weights of rows, for the probe and for its score.

    Returns
    -------
    choice : str
        Name of the chosen candidate.
    scores : dict of str to ndarray of shape (n_folds,)
        Balanced accuracy (classes, the coarsest level), micro-F1 (labels) or R² (numbers) in each
        fold.
    """
    scores = {}
    for name, Z in candidates.items():
        scores[name] = np.array([_score(Z, target, f, sample_weight) for f in folds])
    best = max(scores, key=lambda name: scores[name].mean())
    for name, score in scores.items():
        gap = scores[best] - score
        if gap.mean() <= gap.std(ddof=1) / np.sqrt(len(gap)):
            return name, scores
    return best, scores


def _score(
    Z: np.ndarray, target: Target, fold: Fold, weight: np.ndarray | None
) -> float:
    """Fit the probe on the training rows of a fold, and score it on the held-out rows."""
    train, held_out = fold
    fit_weight = None
    if weight is not None:
        train, held_out = train[weight[train] > 0], held_out[weight[held_out] > 0]
        fit_weight, weight = weight[train], weight[held_out]
    Y = target.values
    if target.strata is not None:
        Y = np.eye(target.strata.max() + 1)[target.strata]
    probe = RidgeCV(np.logspace(-3, 3, 7))
    probe.fit(Z[train], Y[train], sample_weight=fit_weight)
    # The probe predicts a vector if Y has one column, as for a single class.
    predicted = probe.predict(Z[held_out]).reshape(Y[held_out].shape)
    if target.kind == "continuous":
        return _r2(Y, Y[held_out], predicted, weight)
    if target.kind == "multilabel":
        return f1_score(
            Y[held_out],
            predicted > 0.5,
            average="micro",
            sample_weight=weight,
            zero_division=0.0,
        )
    return _balanced_accuracy(target.strata[held_out], predicted, weight)


def _r2(
    Y: np.ndarray,
    Y_held_out: np.ndarray,
    predicted: np.ndarray,
    weight: np.ndarray | None,
) -> float:
    """Return R² relative to the variance of all rows, so that a fold of one row has a score."""
    if (Y == Y[0]).all():  # all representations predict a constant equally well
        return 1.0
    errors = np.square(Y_held_out - predicted).mean(axis=1)
    return 1 - np.average(errors, weights=weight) / Y.var(axis=0).mean()


def _balanced_accuracy(
    codes: np.ndarray, predicted: np.ndarray, weight: np.ndarray | None
) -> float:
    """Return the mean recall of the held-out classes; scikit-learn's warns of a single class."""
    present = np.unique(codes)
    correct = present[predicted[:, present].argmax(axis=1)] == codes
    if weight is None:
        weight = np.ones(len(codes))
    recalls = []
    for code in present:
        rows = codes == code
        recalls.append(np.average(correct[rows], weights=weight[rows]))
    return float(np.mean(recalls))
