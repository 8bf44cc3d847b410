"""A gate: of several representations of the same rows, the simplest that serves as well as any."""

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
    """Judge representations by a linear probe out of fold, and apply the one-standard-error rule.

    The rule: of the candidates, ordered from simple to complex, take the first that falls behind
    the best by no more than the standard error of the difference over the folds.

    Parameters
    ----------
    candidates : mapping of str to ndarray of shape (n_samples, n_columns)
        Representations, the simplest first.
    target : Target
        What the probe, a ridge regression, has to tell from them.
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
    scores = {
        name: np.array([_score(Z, target, fold, sample_weight) for fold in folds])
        for name, Z in candidates.items()
    }
    best = max(scores, key=lambda name: scores[name].mean())
    for name, score in scores.items():
        behind = scores[best] - score
        if behind.mean() <= behind.std(ddof=1) / np.sqrt(len(behind)):
            return name, scores
    return best, scores


def _score(
    Z: np.ndarray, target: Target, fold: Fold, weight: np.ndarray | None
) -> float:
    """Fit the probe on a fold's training rows and judge it on those held out."""
    train, held_out = fold
    fit_weight = None
    if weight is not None:
        train, held_out = train[weight[train] > 0], held_out[weight[held_out] > 0]
        fit_weight, weight = weight[train], weight[held_out]
    Y = codes = target.values if target.strata is None else target.strata
    if target.strata is not None:
        Y = np.eye(codes.max() + 1)[codes]
    probe = RidgeCV(np.logspace(-3, 3, 7)).fit(
        Z[train], Y[train], sample_weight=fit_weight
    )
    # Of a single column, as where one class is left, the probe predicts a vector.
    predicted = probe.predict(Z[held_out]).reshape(Y[held_out].shape)
    if target.kind == "continuous":
        if (Y == Y[0]).all():  # nothing to tell from any representation
            return 1.0
        # Against the variance of all rows, so that a fold of a single row has a score too.
        errors = np.square(Y[held_out] - predicted).mean(axis=1)
        return 1 - np.average(errors, weights=weight) / Y.var(axis=0).mean()
    if target.kind == "multilabel":
        return f1_score(
            Y[held_out],
            predicted > 0.5,
            average="micro",
            sample_weight=weight,
            zero_division=0.0,
        )
    # Balanced accuracy, among the classes that held-out rows have. scikit-learn's warns of one.
    codes = codes[held_out]
    present = np.unique(codes)
    right = present[predicted[:, present].argmax(axis=1)] == codes
    weight = np.ones(len(codes)) if weight is None else weight
    recalls = [
        np.average(right[codes == c], weights=weight[codes == c]) for c in present
    ]
    return float(np.mean(recalls))
