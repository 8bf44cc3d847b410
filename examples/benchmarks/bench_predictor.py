"""Compare EmbeddingClassifier and EmbeddingRegressor with tuned baselines.

The data are MiniLM vectors of names and titles, EfficientNet-lite0 vectors of images,
and four numbers of clip art. There are six tasks with classes, one with several labels,
and two targets that are numbers. Folds are random, or keep a subcategory or a creator
together. Baselines are tuned inside each outer training fold, on inner folds of the same
kind; no choice uses a test row. Only preprocessing without labels (means, PCA, tf-idf) is
fitted once per outer fold.

The probabilities of a tuned baseline are scaled by one temperature, fitted on
out-of-fold scores; "as fitted" is without. A missing title is imputed by the mean, with
an indicator, unless the estimator handles missing values itself.

Each (task, arm, fold) is a job, and its result a line of the cache, so that a run can be
resumed. Seconds are wall time of one job with `--threads` threads, of a fit with all its
tuning, and of the prediction of labels and probabilities. A job that had to wait for other
processes (wall time above its CPU time) is marked as busy, and
`--refresh busy` runs such jobs again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from comparison import difference, show, summarise
from joblib import Parallel, delayed
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from scipy.sparse import hstack as stack_sparse
from scipy.special import log_softmax, softmax
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    average_precision_score,
    euclidean_distances,
    f1_score,
    log_loss,
    r2_score,
)
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer
from sklearn.svm import SVC, SVR
from sklearn.utils import get_tags
from threadpoolctl import threadpool_limits
from vectors import BLOCKS, LOADERS, TITLES, load, outer_folds
from xgboost import XGBClassifier, XGBRegressor

import sklembed
from sklembed import (
    ContrastiveProjector,
    DecisionFusionClassifier,
    EmbeddingStore,
    PerModalityUnion,
)

NUMBERS = ["svg_kb", "n_path", "n_group", "n_gradient"]
N_VECTOR_COLUMNS = 1664
VECTORS = slice(0, N_VECTOR_COLUMNS)
TABLE = slice(N_VECTOR_COLUMNS, None)
N_INNER_FOLDS = 3


# Tasks


@dataclass(frozen=True)
class Task:
    """A data set, its target, and its folds.

    `base` names the same task without table columns. Its baselines count as baselines
    of this task too.
    """

    dataset: str
    kind: str  # "classes", "labels" or "number"
    grouped: bool
    target: str | None = None
    with_table: bool = False
    base: str | None = None


TASKS = {
    "emoji random": Task("emoji", "classes", False),
    "emoji by subcategory": Task("emoji", "classes", True),
    "clip art random": Task("openclipart", "classes", False),
    "clip art by creator": Task("openclipart", "classes", True),
    "clip art and numbers random": Task(
        "openclipart", "classes", False, with_table=True, base="clip art random"
    ),
    "clip art and numbers by creator": Task(
        "openclipart", "classes", True, with_table=True, base="clip art by creator"
    ),
    "emoji keywords": Task("emoji", "labels", False),
    "paths by creator": Task("openclipart", "number", True, "n_path"),
    "paths by creator, with table": Task(
        "openclipart", "number", True, "n_path", True, "paths by creator"
    ),
    "size by creator": Task("openclipart", "number", True, "svg_kb"),
    "size by creator, with table": Task(
        "openclipart", "number", True, "svg_kb", True, "size by creator"
    ),
}
MEASURES = {
    "classes": [
        "macro-F1",
        "log loss",
        "log loss as fitted",
        "calibration error",
    ],
    "labels": ["micro-F1", "average precision, macro", "average precision, micro"],
    "number": ["R2"],
}
LOWER_IS_BETTER = {"log loss", "log loss as fitted", "calibration error"}
# Measures in which a best baseline is chosen in hindsight.
COMPARED = {
    "classes": ["macro-F1", "log loss"],
    "labels": MEASURES["labels"],
    "number": ["R2"],
}


@dataclass
class Rows:
    """Some rows of a task: vectors and numbers side by side, raw cells and target."""

    kind: str
    X: np.ndarray  # (n_rows, 1664 + n_numbers), NaN for a missing title
    raw: pd.DataFrame  # the title, and the numbers
    y: np.ndarray
    groups: np.ndarray | None
    n_classes: int
    key: tuple  # identifies target and fold

    def take(self, rows, key):
        """Return a part of the rows."""
        groups = None if self.groups is None else self.groups[rows]
        raw = self.raw.iloc[rows]
        return Rows(
            self.kind, self.X[rows], raw, self.y[rows], groups, self.n_classes, key
        )

    @property
    def text(self):
        """The titles, empty if missing."""
        return self.raw.iloc[:, 0].fillna("")

    @property
    def table(self):
        """The numbers."""
        return self.raw.iloc[:, 1:]

    @property
    def blocks(self):
        """The columns of each block in `X`."""
        if self.X.shape[1] == N_VECTOR_COLUMNS:
            return BLOCKS
        return BLOCKS | {"table": slice(N_VECTOR_COLUMNS, self.X.shape[1])}

    @cached_property
    def inner(self):
        """Inner folds of the same kind as the outer folds."""
        options = {"n_splits": N_INNER_FOLDS, "shuffle": True, "random_state": 0}
        if self.kind == "classes":
            kinds = StratifiedKFold, StratifiedGroupKFold
        else:
            kinds = KFold, GroupKFold
        splitter = kinds[self.groups is not None](**options)
        return list(splitter.split(self.X, self.y, self.groups))


@lru_cache(maxsize=2)
def load_task(name):
    """Return all rows of a task, and its groups even if its folds are random."""
    task = TASKS[name]
    X, data = load(task.dataset)
    numbers = []
    if task.with_table:
        numbers = [column for column in NUMBERS if column != task.target]
    raw = data.data[[TITLES[task.dataset], *numbers]]
    if task.kind == "classes":
        y = data.target.to_numpy()
    elif task.kind == "labels":
        y = keywords(data)
    else:
        y = np.log1p(data.data[task.target].to_numpy(float))
    X = np.hstack([X.astype(float), raw[numbers].to_numpy(float)])
    groups = data.groups if task.grouped else None
    n_classes = len(data.target_names) if task.kind == "classes" else 0
    return Rows(task.kind, X, raw, y, groups, n_classes, (name,))


def keywords(data):
    """Return the keywords of at least 30 emoji as indicators."""
    words = data.data["keywords"].fillna("").str.get_dummies(sep=", ")
    frequent = words.loc[:, words.sum(axis=0) >= 30]
    return frequent.drop(columns="", errors="ignore").to_numpy()


def split(name, fold, n_folds):
    """Return the training and the test rows of an outer fold."""
    rows = load_task(name)
    if rows.kind == "classes":
        folds = outer_folds(rows.y, rows.groups, rows.groups is not None, n_folds)
    elif rows.groups is None:
        folds = KFold(n_folds, shuffle=True, random_state=0).split(rows.X)
    else:
        folds = GroupKFold(n_folds).split(rows.X, rows.y, rows.groups)
    train, test = list(folds)[fold]
    base = TASKS[name].base or name
    return rows.take(train, (base, fold, n_folds)), rows.take(test, None)


# Scores


@dataclass
class Output:
    """The predictions of a model.

    `scores` are probabilities, scores of labels, or numbers; `as_fitted` are
    probabilities before a temperature.
    """

    scores: np.ndarray
    labels: np.ndarray
    as_fitted: np.ndarray | None = None


@dataclass
class Model:
    """A prediction function from rows to output, and the seconds of its own fit.

    If `seconds` is None, they are the seconds of the whole arm.
    """

    predict: Callable
    seconds: float | None = None


def measure(rows, output):
    """Return the measures of predictions on test rows."""
    if rows.kind == "number":
        return {"R2": r2_score(rows.y, output.scores)}
    if rows.kind == "labels":
        precision = partial(average_precision_score, rows.y, output.scores)
        return {
            "micro-F1": f1_score(
                rows.y, output.labels, average="micro", zero_division=0
            ),
            "average precision, macro": precision(average="macro"),
            "average precision, micro": precision(average="micro"),
        }
    nll = partial(log_loss, rows.y, labels=np.arange(rows.n_classes))
    as_fitted = output.scores if output.as_fitted is None else output.as_fitted
    return {
        "macro-F1": f1_score(rows.y, output.labels, average="macro"),
        "log loss": nll(output.scores),
        "log loss as fitted": nll(as_fitted),
        "calibration error": calibration_error(rows.y, output.scores),
    }


def calibration_error(y, probabilities, n_bins=15):
    """Return the expected calibration error of the top label, in bins of equal width."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == y
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, correct - confidence, minlength=n_bins)
    return np.abs(gaps).sum() / len(y)


def criterion(rows, output):
    """Return the score that baselines are tuned by: macro-F1, micro-F1 or R²."""
    if rows.kind == "number":
        return r2_score(rows.y, output.scores)
    average = "macro" if rows.kind == "classes" else "micro"
    return f1_score(rows.y, output.labels, average=average, zero_division=0)


# Tuning on inner folds


def predict_with(model, Z, rows):
    """Return the output of a fitted estimator, with a column for each class of the task."""
    if rows.kind == "number":
        values = model.predict(Z)
        return Output(values, values)
    if rows.kind == "labels":
        return predict_labels(model, Z)
    if not hasattr(model, "predict_proba"):
        labels = model.predict(Z)
        return Output(np.eye(rows.n_classes)[labels], labels)
    probabilities = model.predict_proba(Z)
    return Output(
        with_all_classes(probabilities, model.classes_, rows), model.predict(Z)
    )


def predict_labels(model, Z):
    """Return scores of several labels, and the labels that the estimator predicts."""
    if hasattr(model, "predict_proba"):
        scores = model.predict_proba(Z)
        if isinstance(scores, list):  # one array (n_rows, 2) per label
            scores = np.stack([pair[:, 1] for pair in scores], axis=1)
        return Output(scores, model.predict(Z))
    if hasattr(model, "decision_function"):
        scores = model.decision_function(Z)
        return Output(scores, scores > 0)
    scores = model.predict(Z)
    return Output(scores, scores > 0.5)


def with_all_classes(probabilities, classes, rows):
    """Add columns of zeros for classes that the training rows lack."""
    complete = np.zeros((len(probabilities), rows.n_classes))
    complete[:, classes] = probabilities
    return complete


def out_of_fold(estimator, Z, train):
    """Return the out-of-fold output; `Z` is a kernel matrix for pairwise estimators."""
    parts = []
    for fit_rows, rows in train.inner:
        Z_fit, Z_rows = Z[fit_rows], Z[rows]
        if get_tags(estimator).input_tags.pairwise:
            Z_fit, Z_rows = Z_fit[:, fit_rows], Z_rows[:, fit_rows]
        model = clone(estimator).fit(Z_fit, train.y[fit_rows])
        parts.append(predict_with(model, Z_rows, train))
    return in_order(parts, train)


def in_order(parts, train):
    """Join outputs of the inner folds in the order of the rows."""
    order = np.argsort(np.concatenate([rows for _, rows in train.inner]))
    scores = np.concatenate([part.scores for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Output(scores[order], labels[order])


def best(candidates, train):
    """Return the best of candidates (key, estimator, Z), with its out-of-fold output."""
    results = []
    for key, estimator, Z in candidates:
        output = out_of_fold(estimator, Z, train)
        results.append((criterion(train, output), key, estimator, Z, output))
    return max(results, key=lambda result: result[0])[1:]


def temperature(output, train):
    """Return the inverse temperature of the lowest log loss on out-of-fold scores."""
    rows = np.arange(len(train.y))
    possible = output.scores[rows, train.y] > 0  # the fold has the class
    logs = np.log(np.clip(output.scores[possible], 1e-12, None))
    rows, y = rows[: len(logs)], train.y[possible]

    def loss(log_slope):
        return -log_softmax(np.exp(log_slope) * logs, axis=1)[rows, y].mean()

    return np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def tempered(output, slope):
    """Scale probabilities by an inverse temperature."""
    scores = softmax(slope * np.log(np.clip(output.scores, 1e-12, None)), axis=1)
    return Output(scores, output.labels, output.scores)


def finish(model, features, train, output):
    """Return prediction functions of a fitted model, tempered on out-of-fold scores."""
    slope = temperature(output, train) if train.kind == "classes" else None

    def predict(rows):
        result = predict_with(model, features(rows), rows)
        return result if slope is None else tempered(result, slope)

    models = {"": Model(predict)}
    if train.kind == "labels":
        threshold = best_threshold(output, train)

        def predict_by_threshold(rows):
            scores = predict(rows).scores
            return Output(scores, scores > threshold)

        models["threshold tuned"] = Model(predict_by_threshold)
    return models


def best_threshold(output, train):
    """Return the threshold of all labels with the best out-of-fold micro-F1."""
    thresholds = np.quantile(output.scores, np.linspace(0.5, 0.999, 100))
    scores = [
        criterion(train, Output(output.scores, output.scores > threshold))
        for threshold in thresholds
    ]
    return thresholds[np.argmax(scores)]


# Features


def prepare(train):
    """Fit imputation of vectors, with an indicator, and standardise skewed numbers."""
    steps = [
        ("vectors", SimpleImputer(), VECTORS),
        ("missing", MissingIndicator(error_on_new=False), [0]),
    ]
    if "table" in train.blocks:
        steps.append(("numbers", PowerTransformer(), TABLE))
    return ColumnTransformer(steps).fit(train.X)


def standard_features(train):
    """Return the function from rows to imputed vectors and standardised numbers."""
    preparation = prepare(train)
    return lambda rows: preparation.transform(rows.X)


def reduced_features(train):
    """Return the function from rows to 30 components per modality and raw numbers."""
    parts = [(name, PCA(30, random_state=0), c) for name, c in BLOCKS.items()]
    union = PerModalityUnion(parts).fit(train.X[:, VECTORS])

    def features(rows):
        return np.hstack([union.transform(rows.X[:, VECTORS]), rows.X[:, TABLE]])

    return features


def standard_numbers(train):
    """Return the function from rows to standardised numbers, if there are any."""
    if "table" not in train.blocks:
        return lambda rows: rows.X[:, TABLE]
    scaler = PowerTransformer().fit(train.X[:, TABLE])
    return lambda rows: scaler.transform(rows.X[:, TABLE])


def tfidf_features(train, **options):
    """Return the function from rows to tf-idf of the title and standardised numbers."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, **options).fit(train.text)
    numbers = standard_numbers(train)

    def features(rows):
        parts = [vectorizer.transform(rows.text), csr_array(numbers(rows))]
        return csr_array(stack_sparse(parts))

    return features


def text_features(train):
    """Return tf-idf features of characters and of words."""
    return {
        "characters": tfidf_features(train, analyzer="char_wb", ngram_range=(2, 4)),
        "words": tfidf_features(train, ngram_range=(1, 2)),
    }


# Linear baselines


def logistic(train, C=1.0):
    """Return logistic regression, one per label for several labels."""
    estimator = LogisticRegression(C=C, max_iter=1000)
    return OneVsRestClassifier(estimator) if train.kind == "labels" else estimator


def linear_candidates(train, Z, key=None):
    """Return logistic regressions over C, or ridges over alpha."""
    if train.kind == "number":
        return [
            ((key, alpha), Ridge(alpha), Z) for alpha in (0.1, 0.3, 1, 3, 10, 30, 100)
        ]
    return [((key, C), logistic(train, C), Z) for C in (1, 10, 100)]


def fit_linear(train, features=None):
    """Tune logistic regression or ridge."""
    features = features or standard_features(train)
    Z = features(train)
    _, estimator, Z, output = best(linear_candidates(train, Z), train)
    return finish(estimator.fit(Z, train.y), features, train, output)


def fit_setfit_head(train):
    """Fit SetFit's default head: logistic regression with C=1 on unit vectors.

    It tunes nothing, and its probabilities are as fitted.
    """
    features = standard_features(train)
    model = logistic(train).fit(features(train), train.y)
    return {"": Model(lambda rows: predict_with(model, features(rows), rows))}


def fit_tfidf(train):
    """Tune characters or words, and the strength of a linear model."""
    choices = text_features(train)
    candidates = []
    for key, features in choices.items():
        candidates += linear_candidates(train, features(train), key)
    (key, _), estimator, Z, output = best(candidates, train)
    return finish(estimator.fit(Z, train.y), choices[key], train, output)


def fit_late_fusion(train):
    """Pool logistic regressions of the modalities, each with its own tuned C."""
    numbers = standard_numbers(train)

    def features(rows):
        return np.hstack([rows.X[:, VECTORS], numbers(rows)])

    Z = features(train)
    estimators = {}
    for name, columns in train.blocks.items():
        part = SimpleImputer().fit_transform(Z[:, columns])
        _, estimators[name], *_ = best(linear_candidates(train, part), train)
    model = DecisionFusionClassifier(estimators, blocks=train.blocks, cv=train.inner)
    model.fit(Z, train.y)
    return {"": Model(lambda rows: predict_with(model, features(rows), rows))}


# Kernel baselines


def squared_distances(preparation, train, rows):
    """Return squared distances of vectors, and of numbers at unit length on average."""
    Z, Z_train = preparation.transform(rows.X), preparation.transform(train.X)
    n_numbers = train.X.shape[1] - N_VECTOR_COLUMNS
    end = Z.shape[1] - n_numbers
    between = euclidean_distances(Z[:, :end], Z_train[:, :end], squared=True)
    if not n_numbers:
        return between, 0.0
    numbers = euclidean_distances(Z[:, end:], Z_train[:, end:], squared=True)
    return between, numbers / n_numbers


def rbf_kernels(train, preparation):
    """Return kernel matrices by gamma and by weight of the numbers.

    The widths are scikit-learn's "scale" and four others. Numbers weigh as much as a
    modality, or are standardised.
    """
    n_numbers = train.X.shape[1] - N_VECTOR_COLUMNS
    vectors, numbers = squared_distances(preparation, train, train)
    scale = 1 / vectors.mean() * 2
    weights = (1, n_numbers) if n_numbers else (0,)
    gammas = (0.125, 0.25, 0.5, 1, scale)
    return {
        (gamma, weight): np.exp(-gamma * (vectors + weight * numbers))
        for gamma, weight in product(gammas, weights)
    }


def kernel_features(train, preparation, gamma, weight):
    """Return the function from rows to their kernel with the training rows."""

    def features(rows):
        vectors, numbers = squared_distances(preparation, train, rows)
        return np.exp(-gamma * (vectors + weight * numbers))

    return features


def svm(train, C):
    """Return a support vector machine on a precomputed kernel."""
    if train.kind == "number":
        return SVR(kernel="precomputed", C=C)
    estimator = SVC(kernel="precomputed", C=C)
    return OneVsRestClassifier(estimator) if train.kind == "labels" else estimator


def fit_svm(train):
    """Tune C and gamma of an RBF support vector machine.

    The kernels are computed once, so tuning is faster than by GridSearchCV; the
    estimator is the same. Its probabilities are those of `SVC(probability=True)`: a
    logistic function per pair of classes, fitted on folds, and coupled. One function
    per class, or a temperature of decision values, has a log loss up to twice as high
    here. The labels are those of `SVC.predict`.
    """
    candidates = partial(product, rbf_kernels(train, prepare(train)).items())
    penalties = (0.3, 1, 3, 10) if train.kind == "number" else (1, 10, 100)
    return fit_on_kernels(
        train,
        [(kernel, svm(train, C)) for kernel, C in candidates(penalties)],
        probability=train.kind == "classes",
    )


def fit_kernel_ridge(train):
    """Tune the penalty and the width of kernel ridge regression on indicators."""
    candidates = partial(product, rbf_kernels(train, prepare(train)).items())
    penalties = (0.03, 0.1, 0.3, 1)
    return fit_on_kernels(
        train,
        [
            (kernel, KernelRidge(alpha, kernel="precomputed"))
            for kernel, alpha in candidates(penalties)
        ],
    )


def fit_on_kernels(train, pairs, probability=False):
    """Tune over pairs of ((gamma, weight), kernel matrix) and estimator."""
    candidates = [(key, estimator, Z) for (key, Z), estimator in pairs]
    (gamma, weight), estimator, Z, output = best(candidates, train)
    if probability:
        estimator.set_params(probability=True, random_state=0)
        output = out_of_fold(estimator, Z, train)
    features = kernel_features(train, prepare(train), gamma, weight)
    return finish(estimator.fit(Z, train.y), features, train, output)


def fit_svm_by_grid_search(train):
    """Tune an RBF support vector machine by GridSearchCV, as users do.

    It has the same grid but for a width and the weight of numbers.
    """
    features = standard_features(train)
    estimator = SVR() if train.kind == "number" else SVC()
    scoring = "r2" if train.kind == "number" else "f1_macro"
    grid = {"C": [1, 10, 100], "gamma": [0.25, 0.5, 1, "scale"]}
    search = GridSearchCV(
        estimator, grid, cv=train.inner, scoring=scoring, refit=train.kind == "number"
    )
    Z = features(train)
    search.fit(Z, train.y)
    if train.kind == "number":
        model = search.best_estimator_
    else:
        model = SVC(**search.best_params_, probability=True, random_state=0)
        model.fit(Z, train.y)
    return {"": Model(lambda rows: predict_with(model, features(rows), rows))}


def fit_neighbors(train):
    """Tune the number of nearest neighbors and their weights."""
    features = standard_features(train)
    Z = features(train)
    candidates = []
    for k, weights in product((3, 5, 10, 20, 40), ("uniform", "distance")):
        candidates.append(((k, weights), KNeighborsClassifier(k, weights=weights), Z))
    _, estimator, Z, output = best(candidates, train)
    return finish(estimator.fit(Z, train.y), features, train, output)


# Trees


def fit_boosting(train):
    """Tune the number of trees of HistGradientBoosting on PCA-30 of each modality."""
    return fit_trees(boosting(train), reduced_features(train), (25, 50, 100), train)


def boosting(train):
    """Return scikit-learn's gradient boosting with smaller trees than by default."""
    options = {"max_leaf_nodes": 8, "random_state": 0}
    if train.kind == "number":
        return HistGradientBoostingRegressor(**options)
    return HistGradientBoostingClassifier(**options)


def fit_xgboost(train):
    """Tune the number of trees of XGBoost on the vectors and numbers as they are."""
    options = {
        "max_depth": 3,
        "colsample_bytree": 0.1,
        "max_bin": 32,
        "tree_method": "hist",
        "n_jobs": 1,
        "random_state": 0,
    }
    if train.kind == "number":
        estimator = XGBRegressor(learning_rate=0.1, **options)
        counts = (50, 100, 200)
    else:
        estimator = XGBClassifier(learning_rate=0.3, **options)
        counts = (15, 30, 60)
    return fit_trees(estimator, lambda rows: rows.X, counts, train)


def fit_trees(estimator, features, counts, train):
    """Choose the number of trees on inner folds; the first trees are the same."""
    Z = features(train)
    folds = []
    for fit_rows, rows in train.inner:
        predict = fit_stages(estimator, Z[fit_rows], train.y[fit_rows], counts, train)
        folds.append(predict(Z[rows]))
    outputs = [in_order(parts, train) for parts in zip(*folds, strict=True)]
    scores = [criterion(train, output) for output in outputs]
    chosen = int(np.argmax(scores))
    output = outputs[chosen]
    predict = fit_stages(estimator, Z, train.y, counts[chosen : chosen + 1], train)
    slope = temperature(output, train) if train.kind == "classes" else None

    def predict_rows(rows):
        result = predict(features(rows))[0]
        return result if slope is None else tempered(result, slope)

    return {"": Model(predict_rows)}


def fit_stages(estimator, Z, y, counts, train):
    """Fit trees; return a function from features to an output for each count."""
    xgboost = isinstance(estimator, XGBClassifier | XGBRegressor)
    size = {"n_estimators" if xgboost else "max_iter": max(counts)}
    classes = None
    if train.kind == "classes":  # XGBoost needs classes without gaps
        classes, y = np.unique(y, return_inverse=True)
    model = clone(estimator).set_params(**size).fit(Z, y)

    def predict(Z):
        method = "predict" if classes is None else "predict_proba"
        if xgboost:
            stages = [
                getattr(model, method)(Z, iteration_range=(0, count))
                for count in counts
            ]
        else:
            steps = list(islice(getattr(model, f"staged_{method}")(Z), max(counts)))
            stages = [steps[count - 1] for count in counts]
        if classes is None:
            return [Output(values, values) for values in stages]
        stages = [with_all_classes(stage, classes, train) for stage in stages]
        return [Output(stage, stage.argmax(axis=1)) for stage in stages]

    return predict


def fit_tabular_pipeline(train):
    """Fit skrub's `tabular_pipeline` on the title and the numbers, without the image.

    It has nothing to tune, and its probabilities are as fitted.
    """
    from skrub import tabular_pipeline

    kind = "regressor" if train.kind == "number" else "classifier"
    model = tabular_pipeline(kind).fit(train.raw, train.y)
    return {"": Model(lambda rows: predict_with(model, rows.raw, rows))}


# Projections


PROJECTIONS = {}


def projected_features(train):
    """Return the function from rows to projections and numbers, and its seconds.

    The output of training rows is cross-fitted, by group where the folds are. A
    projection is fitted once for a target with and without the table.
    """
    if train.key not in PROJECTIONS:
        tick = time.perf_counter()
        PROJECTIONS[train.key] = (*fit_projectors(train), time.perf_counter() - tick)
    pipeline, Z_train, seconds = PROJECTIONS[train.key]
    numbers = standard_numbers(train)

    def features(rows):
        if rows is train:
            Z = Z_train
        else:
            Z = pipeline.transform(rows.X[:, VECTORS])
        return np.hstack([Z, numbers(rows)])

    return features, seconds


def fit_projectors(train):
    """Return a projector for each modality, and the output of the training rows."""
    routed = {} if train.groups is None else {"groups": train.groups}
    with sklearn.config_context(enable_metadata_routing=bool(routed)):
        folds = 5
        if routed:
            folds = GroupKFold(5, shuffle=True, random_state=0)
            folds.set_split_request(groups=True)
        target_type = "continuous" if train.kind == "number" else "auto"
        projector = ContrastiveProjector(
            target_type=target_type, cv=folds, random_state=0
        )
        parts = [(name, projector, columns) for name, columns in BLOCKS.items()]
        pipeline = make_pipeline(PerModalityUnion(parts), SimpleImputer())
        Z_train = pipeline.fit_transform(train.X[:, VECTORS], train.y, **routed)
    return pipeline, Z_train


def fit_projected_linear(train):
    """Tune logistic regression on projections."""
    features, _ = projected_features(train)
    return fit_linear(train, features)


def fit_projected_regressors(train):
    """Tune ridge, gradient boosting and a support vector machine on projections."""
    features, seconds = projected_features(train)
    heads = {"ridge": fit_linear, "HGB": fit_boosting_on, "SVR": fit_svr_on}
    models = {}
    for name, fit in heads.items():
        tick = time.perf_counter()
        model = fit(train, features)[""]
        model.seconds = seconds + time.perf_counter() - tick
        models[name] = model
    return models


def fit_boosting_on(train, features):
    """Tune the number of trees of HistGradientBoosting."""
    return fit_trees(boosting(train), features, (25, 50, 100), train)


def fit_svr_on(train, features):
    """Tune C and gamma of an RBF support vector machine."""
    Z = features(train)
    distances = euclidean_distances(Z, squared=True)
    scale = 2 / distances.mean()
    candidates = []
    for gamma, C in product(scale * np.array([0.25, 0.5, 1, 2]), (0.1, 1, 10)):
        kernel = np.exp(-gamma * distances)
        candidates.append((gamma, SVR(kernel="precomputed", C=C), kernel))
    gamma, estimator, kernel, output = best(candidates, train)

    def kernel_of(rows):
        between = euclidean_distances(features(rows), Z, squared=True)
        return np.exp(-gamma * between)

    return finish(estimator.fit(kernel, train.y), kernel_of, train, output)


# EmbeddingClassifier and EmbeddingRegressor


def fit_ours(train):
    """Fit the estimator with default parameters; also return its members."""
    if train.kind == "number":
        model = sklembed.EmbeddingRegressor(random_state=0)
    else:
        model = sklembed.EmbeddingClassifier(random_state=0)
    # Unlike the tuning of the baselines, the fit does not use the groups.
    model.fit(wide_table(train), train.y)
    models = {"": Model(lambda rows: predict_with(model, wide_table(rows), rows))}
    for name in model.member_predictions(wide_table(train).iloc[:2]):
        seconds = model.seconds_.get(name, np.nan)
        models[name] = Model(partial(predict_member, model, name), seconds)
    return models


def wide_table(rows):
    """Return the vectors and numbers as columns such as `text__0` and `table__svg_kb`."""
    names = []
    for block, columns in BLOCKS.items():
        names += [f"{block}__{i}" for i in range(columns.stop - columns.start)]
    vectors = rows.X[:, VECTORS].astype(np.float32)
    vectors = pd.DataFrame(vectors, columns=names, index=rows.raw.index)
    return pd.concat([vectors, rows.table.add_prefix("table__")], axis=1)


def predict_member(model, name, rows):
    """Return the output of one member of a fitted estimator."""
    values = model.member_predictions(wide_table(rows))[name]
    if rows.kind == "number":
        return Output(values, values)
    if rows.kind == "labels":
        return Output(values, values > 0.5)
    probabilities = with_all_classes(values, model.classes_, rows)
    return Output(probabilities, probabilities.argmax(axis=1))


OURS = "sklembed"
SVM_AS_USERS_TUNE_IT = "SVM, GridSearchCV"
ARMS = {
    "classes": {
        "LR": fit_linear,
        "SVM": fit_svm,
        "SetFit's head": fit_setfit_head,
        "XGBoost": fit_xgboost,
        "tabular_pipeline": fit_tabular_pipeline,
        "PCA-30 + HGB": fit_boosting,
        "tf-idf + LR": fit_tfidf,
        "late fusion": fit_late_fusion,
        SVM_AS_USERS_TUNE_IT: fit_svm_by_grid_search,
        OURS: fit_ours,
    },
    "labels": {
        "LR": fit_linear,
        "SVM": fit_svm,
        "SetFit's head": fit_setfit_head,
        "kernel ridge": fit_kernel_ridge,
        "k-NN": fit_neighbors,
        "projector + LR": fit_projected_linear,
        "tf-idf + LR": fit_tfidf,
        "late fusion": fit_late_fusion,
        OURS: fit_ours,
    },
    "number": {
        "ridge": fit_linear,
        "SVM": fit_svm,
        "XGBoost": fit_xgboost,
        "tabular_pipeline": fit_tabular_pipeline,
        "PCA-30 + HGB": fit_boosting,
        "tf-idf + ridge": fit_tfidf,
        "projected": fit_projected_regressors,
        SVM_AS_USERS_TUNE_IT: fit_svm_by_grid_search,
        OURS: fit_ours,
    },
}


# Jobs and their cache


def run_cell(job, n_threads):
    """Fit and evaluate an arm in an outer fold; return a record for the cache."""
    task, arm, fold, n_folds = job
    train, test = split(task, fold, n_folds)
    with threadpool_limits(n_threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers that do not converge
        wall, cpu = time.perf_counter(), time.process_time()
        models = ARMS[train.kind][arm](train)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows = []
        for name, model in models.items():
            tick = time.perf_counter()
            output = model.predict(test)
            seconds = {
                "fit s": wall if model.seconds is None else model.seconds,
                "predict s": time.perf_counter() - tick,
            }
            label = f"{arm}: {name}" if name else arm
            rows.append({"arm": label} | measure(test, output) | seconds)
    return {
        "job": job,
        "sources": hash_sources() if arm == OURS else None,
        "threads": n_threads,
        # A quiet job computes all the time; several threads compute more than that.
        "busy": wall > 1.1 * cpu,
        "CPU s": cpu,
        "rows": rows,
    }


def hash_sources():
    """Hash the sources of sklembed."""
    root = Path(sklembed.__file__).parent
    sources = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


def read_cache(path):
    """Return the latest record of each job."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {tuple(record["job"]): record for record in records}


def plan(options):
    """Return the chosen jobs.

    GridSearchCV, of which the time is of interest, has one fold and no numbers.
    """
    jobs = []
    for task in options.tasks:
        for arm in ARMS[TASKS[task].kind]:
            if options.arms and arm not in options.arms:
                continue
            folds = options.folds or range(options.n_folds)
            if arm == SVM_AS_USERS_TUNE_IT:
                folds = [] if TASKS[task].with_table else [0]
            jobs += [(task, arm, fold, options.n_folds) for fold in folds]
    return jobs


def is_due(job, cache, refresh):
    """Return whether a job has no result, or one that is to be replaced."""
    if job not in cache or refresh == "all":
        return True
    record = cache[job]
    if refresh == "busy":
        return record["busy"]
    return refresh == "stale" and record["sources"] not in (None, hash_sources())


def run_jobs(options):
    """Run the chosen jobs that are due, and append each result to the cache."""
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    cache = read_cache(options.cache)
    due = [job for job in plan(options) if is_due(job, cache, options.refresh)]
    if not due:
        return
    for name in LOADERS:
        load(name)  # jobs then read all vectors from the store
    parallel = Parallel(
        n_jobs=options.n_jobs, batch_size=1, return_as="generator_unordered"
    )
    results = parallel(delayed(run_cell)(job, options.threads) for job in due)
    for number, record in enumerate(results, start=1):
        with options.cache.open("a") as file:
            file.write(json.dumps(record) + "\n")
        task, arm, fold, _ = record["job"]
        seconds = record["rows"][0]["fit s"]
        print(f"{number}/{len(due)} {task}, {arm}, {fold}: {seconds:.1f} s", flush=True)


# Tables


def table(options):
    """Return the scores of all arms, the best baselines in hindsight, and the bars."""
    cells, settings = read_cells(options)
    measures = dict.fromkeys(sum(MEASURES.values(), []))
    measures = [name for name in measures if name in cells]
    medians = {"fit s": 1, "predict s": 2, "CPU s": 1}
    result = {
        "settings": [settings],
        "records": summarise(cells, ["task", "arm"], measures, medians),
        "verdicts": [],
    }
    for name, task in TASKS.items():
        if name in set(cells["task"]):
            for measure in COMPARED[task.kind]:
                row = compare(cells, name, measure, options.n_folds)
                result["verdicts"].append(row)
    if cells["arm"].eq(OURS).any():
        result["bars"] = judge_bars(cells, result["verdicts"])
    return result


def read_cells(options):
    """Return a row per fold, task and arm, and the settings of the results."""
    cache = read_cache(options.cache)
    chosen = [job for job in cache if job[3] == options.n_folds and job[0] in TASKS]
    rows, busy, stale = [], 0, 0
    for job in chosen:
        record = cache[job]
        busy += record["busy"]
        stale += record["sources"] not in (None, hash_sources())
        for row in record["rows"]:
            keys = {"task": job[0], "fold": job[2], "CPU s": record["CPU s"]}
            rows.append(keys | row)
    if stale:
        print(f"{stale} results come from other sources of sklembed: --refresh stale")
    if busy:
        print(f"{busy} jobs had to wait for other processes: --refresh busy")
    settings = {
        "folds": options.n_folds,
        "threads": cache[chosen[0]]["threads"],
        "jobs": len(chosen),
        "busy jobs": busy,
        "scikit-learn": sklearn.__version__,
    }
    cells = pd.DataFrame(rows)
    order = {name: position for position, name in enumerate(TASKS)}
    cells["position"] = cells["task"].map(order)
    return cells.sort_values("position", kind="stable"), settings


def compare(cells, task, measure, n_folds):
    """Return the best baseline of a task in hindsight, and the gain over it.

    For log loss, the better of the tempered and the fitted probabilities counts.
    """
    rows = cells[cells["task"] == task]
    base = TASKS[task].base
    if base is not None:
        simpler = cells[(cells["task"] == base) & ~cells["arm"].map(is_ours)]
        simpler = simpler.assign(arm=simpler["arm"] + ", without table")
        rows = pd.concat([rows, simpler])
    if measure == "log loss":
        fitted = rows[~rows["arm"].map(is_ours)]
        fitted = fitted.assign(
            arm=fitted["arm"] + ", as fitted",
            **{"log loss": fitted["log loss as fitted"]},
        )
        rows = pd.concat([rows, fitted])
    sign = -1 if measure in LOWER_IS_BETTER else 1
    means = rows.groupby("arm")[measure].mean()
    baselines = sign * means[~means.index.map(is_ours).astype(bool)]
    timing = baselines.index.str.startswith(SVM_AS_USERS_TUNE_IT)
    best_arm = baselines[~timing].idxmax()
    row = {
        "task": task,
        "measure": measure,
        "best baseline": best_arm,
        "score": means[best_arm],
    }
    if OURS not in means:
        return row
    gains = difference(rows, OURS, best_arm, measure, n_folds)
    if sign < 0:
        gains |= {"gain": -gains["gain"], "folds won": _reverse(gains["folds won"])}
    return row | {OURS: means[OURS]} | gains


def is_ours(arm):
    """Return whether an arm is the estimator or one of its members."""
    return arm.startswith(OURS)


def _reverse(percent):
    return f"{100 - int(percent.rstrip('%'))}%"


# Least gain over the best baseline of each task, and whether the mean must be positive.
LEAST_GAINS = {
    "macro-F1": (-0.005, True),
    "micro-F1": (0.0, False),
    "average precision, macro": (0.0, False),
    "average precision, micro": (0.0, False),
    "R2": (-0.005, True),
}


def judge_bars(cells, comparisons):
    """Return for each requirement whether it is met, and by how much."""
    gains = pd.DataFrame(comparisons)
    gains = gains[gains["gain"].notna()]
    by_measure = {name: rows["gain"] for name, rows in gains.groupby("measure")}
    bars = []
    for name, (least, positive_mean) in LEAST_GAINS.items():
        if name not in by_measure:
            continue
        gain = by_measure[name]
        bars.append(_bar(f"{name}: least gain >= {least}", gain.min(), least))
        if positive_mean:
            bars.append(_bar(f"{name}: mean gain >= 0", gain.mean(), 0.0))
    means = cells.groupby(["task", "arm"]).mean(numeric_only=True)
    if "log loss" in by_measure:
        gain = by_measure["log loss"]
        share = (gain >= 0).mean()
        bars.append(_bar("log loss: lowest on a share of tasks >= 0.75", share, 0.75))
        losses = means[["log loss", "log loss as fitted"]].min(axis=1).unstack()
        if "LR" in losses:
            lead = losses["LR"] - means["log loss"].unstack()[OURS]
            bars.append(_bar("log loss: least lead over LR >= 0", lead.min(), 0.0))
    seconds = means["fit s"].unstack()
    for arm in ("SVM", SVM_AS_USERS_TUNE_IT):
        if arm in seconds:
            ratio = (seconds[OURS] / seconds[arm]).max()
            name = f"fit s / fit s of {arm}: largest <= 3"
            bars.append({"bar": name, "value": float(ratio), "met": bool(ratio <= 3)})
    return bars


def _bar(name, value, least):
    return {"bar": name, "value": float(value), "met": bool(value >= least)}


# Scale, and a second run


def scale_table(options):
    """Fit EmbeddingClassifier on more and more rows, each in a process of its own."""
    records = []
    with tempfile.TemporaryDirectory() as directory:
        for n_rows in options.rows:
            path = Path(directory) / "rows.npz"
            # The peak of a process starts at the memory of its parent, which stays small.
            in_new_process(write_many_rows, path, n_rows)
            records.append(in_new_process(fit_many, path, options.threads))
            print(records[-1], flush=True)
    growth = [np.nan]
    for before, after in zip(records, records[1:], strict=False):
        ratio = np.log(after["rows"] / before["rows"])
        growth.append(np.log(after["fit s"] / before["fit s"]) / ratio)
    for record, exponent in zip(records, growth, strict=True):
        record["exponent of rows"] = exponent
    return {"records": records}


def write_many_rows(path, n_rows, n_columns=1200, n_test=2000):
    """Write vectors of clip art resampled with noise, of its ten largest classes.

    They have the 384 columns of the title and 816 of the image. Test rows are
    resampled from other images than training rows. The noise of a column has half of
    its standard deviation; the vectors are scaled to unit length again.
    """
    X, data = load("openclipart")
    rng = np.random.default_rng(0)
    image = rng.permutation(np.arange(384, N_VECTOR_COLUMNS))[: n_columns - 384]
    X = np.hstack([X[:, :384], X[:, np.sort(image)]]).astype(np.float32)
    y = data.target.to_numpy()
    largest = np.argsort(-np.bincount(y), kind="stable")[:10]
    X, y = X[np.isin(y, largest)], y[np.isin(y, largest)]
    deviations = np.nanstd(X, axis=0)
    train, test = outer_folds(y, None, False, 5)[0]
    arrays = {}
    for name, rows, size in (("train", train, n_rows), ("test", test, n_test)):
        chosen = rng.choice(rows, size)
        noise = rng.standard_normal((size, n_columns), dtype=np.float32)
        noise *= 0.5 * deviations
        noise += X[chosen]
        for columns in (slice(0, 384), slice(384, None)):
            noise[:, columns] /= np.linalg.norm(
                noise[:, columns], axis=1, keepdims=True
            )
        arrays[f"X_{name}"], arrays[f"y_{name}"] = noise, y[chosen]
    np.savez(path, **arrays)


def fit_many(path, n_threads):
    """Fit on stored rows; return seconds, peak memory of the process, and macro-F1."""
    arrays = np.load(path)
    X, y = arrays["X_train"], arrays["y_train"]
    blocks = {"text": slice(0, 384), "image": slice(384, X.shape[1])}
    model = sklembed.EmbeddingClassifier(blocks=blocks, random_state=0)
    with threadpool_limits(n_threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = peak_gib()
        tick = time.perf_counter()
        model.fit(X, y)
        seconds = time.perf_counter() - tick
        tick = time.perf_counter()
        predicted = model.predict(arrays["X_test"])
        predict_seconds = time.perf_counter() - tick
    return {
        "rows": len(X),
        "columns": X.shape[1],
        "fit s": seconds,
        "predict s, 2,000 rows": predict_seconds,
        "peak GiB": peak_gib(),
        "peak GiB before fit": before,
        "macro-F1": f1_score(arrays["y_test"], predicted, average="macro"),
        "members s": {name: round(s, 1) for name, s in model.seconds_.items()},
    }


def peak_gib():
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def second_run_table(options):
    """Encode all cells of emoji in an empty store, then once more in a new process."""
    records = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["SKLEMBED_STORE"] = str(Path(directory) / "store.sqlite")
        for run in ("first", "second"):
            before = sum(row["encoded"] for row in records)
            counts = in_new_process(count_encoded, "emoji")
            counts["encoded"] -= before
            records.append({"run": run} | counts)
    return {"records": records}


def count_encoded(name):
    """Load a data set; return the number of cells ever encoded, and the seconds."""
    tick = time.perf_counter()
    load(name)
    seconds = time.perf_counter() - tick
    stats = EmbeddingStore().stats()
    return {
        "encoded": int(stats["encoded"].sum()),
        "stored": int(stats["rows"].sum()),
        "seconds": seconds,
    }


def in_new_process(function, *arguments):
    """Call a function in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# The command


def main():
    """Compute and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arms = sorted(set().union(*ARMS.values()))
    parser.add_argument("--arms", nargs="+", choices=arms, help="all by default")
    parser.add_argument("--n-folds", type=int, default=5)
    parser.add_argument("--folds", type=int, nargs="+", help="all by default")
    parser.add_argument(
        "--cache", type=Path, default=Path("examples/output/predictor.jsonl")
    )
    parser.add_argument(
        "--refresh",
        choices=["all", "busy", "stale"],
        help="run chosen jobs again: all, those that had to wait for other processes, "
        "or those of other sources of sklembed",
    )
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of each job")
    parser.add_argument(
        "--table-only", action="store_true", help="print the table of the cache"
    )
    parser.add_argument(
        "--scale", action="store_true", help="fit on up to 100,000 rows"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1000, 3000, 10_000, 30_000, 100_000],
        help="numbers of rows for --scale",
    )
    parser.add_argument(
        "--second-run", action="store_true", help="count encoded rows of two runs"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    tick = time.perf_counter()
    if options.scale:
        result = scale_table(options)
    elif options.second_run:
        result = second_run_table(options)
    else:
        if not options.table_only:
            run_jobs(options)
        result = table(options)
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
