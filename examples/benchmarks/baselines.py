"""Baselines of bench_predictor.py, which are tuned on inner folds of the training rows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, product

import numpy as np
import pandas as pd
import sklearn
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
    euclidean_distances,
    f1_score,
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
from vectors import BLOCKS
from xgboost import XGBClassifier, XGBRegressor

from sklembed import (
    ContrastiveProjector,
    DecisionFusionClassifier,
    PerModalityUnion,
)

N_VECTOR_COLUMNS = 1664
VECTORS = slice(0, N_VECTOR_COLUMNS)
TABLE = slice(N_VECTOR_COLUMNS, None)
N_INNER_FOLDS = 3


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
    """A prediction function from rows to output, and the seconds of its fit.

    If `seconds` is None, they are the seconds of the whole arm.
    """

    predict: Callable
    seconds: float | None = None


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
    estimator is the same. It computes probabilities as `SVC(probability=True)`: a
    logistic function per pair of classes, fitted on folds, and coupled. One function
    per class, or a temperature of decision values, has a log loss up to twice as high
    here. `SVC.predict` gives the labels.
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


SVM_AS_USERS_TUNE_IT = "SVM, GridSearchCV"
BASELINES = {
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
    },
}
