"""The members of the ensembles: models that fail differently on the same blocks.

The outputs of a member are log-probabilities of classes, log-odds of labels, or numbers,
of shape (n_samples, n_outputs). `fit` returns outputs of the training rows out of fold;
with groups, also a second array out of the folds that keep groups together.
"""

import numpy as np
from scipy.special import log_softmax, logit
from sklearn.base import clone, is_classifier
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.utils.parallel import Parallel, delayed
from threadpoolctl import threadpool_limits

from sklembed._grid import descend
from sklembed._logistic import fit_classes
from sklembed.ensemble.features import Problem, View
from sklembed.ensemble.ridge import fit_ridge, rotate
from sklembed.fusion.kernel import KernelFusionClassifier, KernelFusionRegressor

_SMALLEST = 1e-6  # probability
_CS = 10.0 ** np.arange(-1.5, 2.5, 0.5)  # inverse penalties of logistic regression
_START_C = 3  # position of 1.0
_SEARCH_ROWS = 10_000  # the penalty hardly depends on the number of rows
_SEARCH_LABELS = 16
_CALIBRATION_ROWS = 600  # out of fold, on which trees are calibrated
_WEIGHTED_BINS = 63
_ROWS_OF_THREADS = 20_000  # from which more than one thread pays
_CLASSIFIER = {
    "max_iter": 40,
    "max_leaf_nodes": 8,
    "min_samples_leaf": 10,
    "max_features": 0.2,
    "l2_regularization": 3.0,
    "early_stopping": False,
}
_REGRESSOR = {
    "max_iter": 300,
    "learning_rate": 0.03,
    "max_leaf_nodes": 12,
    "max_features": 0.3,
    "l2_regularization": 5.0,
    "early_stopping": False,
}


class Linear:
    """Logistic or ridge regression on one form of the blocks.

    Parameters
    ----------
    form : {"scaled", "projected_and_scaled"}
        The form of the blocks, an attribute of `View`.
    """

    def __init__(self, form: str):
        self.form = form

    def fit(self, view: View, problem: Problem) -> list[np.ndarray]:
        """Choose the penalty on the folds and fit; return outputs out of fold."""
        Z = getattr(view, self.form)
        if problem.kind == "numbers":
            return self._fit_ridge(Z, problem)
        return self._fit_logistic(Z, problem)

    def outputs(self, view: View) -> np.ndarray:
        """Return the outputs for the rows of a view."""
        scores = getattr(view, self.form) @ self.coef + self.intercept
        if self.kind == "classes":
            return log_softmax(scores, axis=1)
        return scores

    def _fit_ridge(self, Z, problem):
        folds = problem.all_folds[-1]
        ridge, out_of_fold = fit_ridge(Z, problem.y, problem.weight, folds)
        self.kind, self.penalty = problem.kind, ridge.penalty
        self.coef, self.intercept = ridge.coef, ridge.intercept
        return [out_of_fold]

    def _fit_logistic(self, Z, problem):
        """Fit a logistic regression, or one for each label."""
        self.kind = problem.kind
        Z, axes = rotate(Z)
        search = problem.thin(_SEARCH_ROWS, _SEARCH_LABELS)
        position = descend(
            lambda p: search.log_loss(_hold_out(_CS[p[0]], Z, search, search.folds)),
            [len(_CS)],
            (_START_C,),
        )
        C = _CS[position[0]]
        self.penalty = float(1 / C)
        out_of_fold = [_hold_out(C, Z, problem, f) for f in problem.all_folds]
        coef, self.intercept = _fit_scores(C, Z, problem, slice(None))
        self.coef = axes @ coef
        return out_of_fold


def _hold_out(C, Z, problem, folds):
    return problem.hold_out(folds, _score_fold, C, Z, problem)


def _score_fold(C, Z, problem, train, held_out):
    """Return the outputs of logistic regression for the held-out rows of a fold."""
    coef, intercept = _fit_scores(C, Z, problem, train)
    scores = Z[held_out] @ coef + intercept
    return log_softmax(scores, axis=1) if problem.kind == "classes" else scores


def _fit_scores(C, Z, problem, rows):
    """Fit logistic regression; return coefficients and intercepts of all outputs."""
    Z, y, weight = Z[rows], problem.y[rows], problem.weight[rows]
    if problem.kind == "classes":
        return fit_classes(C, Z, y, weight, problem.n_outputs)
    coef = np.zeros((Z.shape[1], problem.n_outputs))
    intercept = np.zeros(problem.n_outputs)
    for label in range(problem.n_outputs):
        coef_of_classes, intercepts = fit_classes(C, Z, y[:, label], weight, 2)
        coef[:, label] = coef_of_classes[:, 1] - coef_of_classes[:, 0]
        intercept[label] = intercepts[1] - intercepts[0]
    return coef, intercept


class Kernel:
    """Ridge regression in a mean of kernels, one per block."""

    def fit(self, view: View, problem: Problem) -> list[np.ndarray]:
        """Choose the widths and the penalty and fit; return outputs out of fold."""
        estimator = KernelFusionClassifier
        if problem.kind == "numbers":
            estimator = KernelFusionRegressor
        self.model = estimator(
            blocks=problem.blocks,
            table_blocks=problem.table_blocks,
            random_state=problem.seed,
        )
        return self.model._fit(problem.X, problem.y, problem.weight, problem.groups)

    def outputs(self, view: View) -> np.ndarray:
        """Return the outputs for the rows of a view."""
        return self.model._outputs(view.X)


class Trees:
    """Gradient boosting of trees on projections and table columns."""

    def fit(self, view: View, problem: Problem) -> list[np.ndarray]:
        """Fit, also on some of the folds; return outputs out of fold, NaN elsewhere."""
        self.kind, self.n_outputs = problem.kind, problem.n_outputs
        Z = view.projected_and_raw
        out_of_fold = [self._out_of_fold(Z, problem, f) for f in problem.all_folds]
        self.models = _fit_trees(Z, problem, np.arange(len(Z)))
        return out_of_fold

    def _out_of_fold(self, Z, problem, folds):
        out_of_fold = np.full((len(Z), problem.n_outputs), np.nan)
        n_predicted = 0
        for train, held_out in folds:
            models = _fit_trees(Z, problem, train)
            with _few_threads(len(held_out)):
                out_of_fold[held_out] = self._outputs(models, Z[held_out])
            n_predicted += np.count_nonzero(problem.weight[held_out] > 0)
            if n_predicted >= _CALIBRATION_ROWS:
                break
        return out_of_fold

    def outputs(self, view: View) -> np.ndarray:
        """Return the outputs for the rows of a view."""
        Z = view.projected_and_raw
        with _few_threads(len(Z)):
            return self._outputs(self.models, Z)

    def _outputs(self, models, Z):
        if self.kind == "numbers":
            return np.column_stack([model.predict(Z) for model in models])
        if self.kind == "classes":
            probabilities = np.zeros((len(Z), self.n_outputs))
            present = models[0].classes_.astype(np.intp)
            probabilities[:, present] = models[0].predict_proba(Z)
            return np.log(np.maximum(probabilities, _SMALLEST))
        log_odds = np.empty((len(Z), self.n_outputs))
        for label, model in enumerate(models):
            positive = model.predict_proba(Z) @ (model.classes_ == 1)
            log_odds[:, label] = logit(np.clip(positive, _SMALLEST, 1 - _SMALLEST))
        return log_odds


def _fit_trees(Z, problem, rows):
    """Fit gradient boosting: one model for all classes, one per label or number."""
    rows = rows[problem.weight[rows] > 0]
    Z, y, weight = Z[rows], problem.y[rows], problem.weight[rows]
    Z[:, np.isnan(Z).all(axis=0)] = 0  # bins need a value, which no split uses
    model = HistGradientBoostingClassifier(**_CLASSIFIER)
    if problem.kind == "numbers":
        model = HistGradientBoostingRegressor(**_REGRESSOR)
    model.set_params(random_state=problem.seed)
    if (weight == weight[0]).all():
        weight = None
    else:  # scikit-learn computes weighted quantiles bin by bin, in Python
        model.set_params(max_bins=_WEIGHTED_BINS)
    targets = y.reshape(len(y), -1).T
    with _few_threads(len(Z)):
        return Parallel(n_jobs=problem.n_jobs)(
            delayed(_fit_trees_of_target)(model, Z, target, weight)
            for target in targets
        )


def _few_threads(n_rows):
    """Limit OpenMP to one thread for small tables.

    Threads of gradient boosting wait for each other at every node, which is slow where
    other processes use the processors.
    """
    n_threads = 1 if n_rows < _ROWS_OF_THREADS else None
    return threadpool_limits(n_threads, user_api="openmp")


def _fit_trees_of_target(model, Z, y, weight):
    """Fit gradient boosting, or a constant where all rows have one class."""
    if is_classifier(model) and len(np.unique(y)) == 1:
        model = DummyClassifier()
    return clone(model).fit(Z, y, sample_weight=weight)
