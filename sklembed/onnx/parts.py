"""The parts of a pipeline in an ONNX graph: a converter for each estimator."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.pipeline import Pipeline

from sklembed._graph import Graph, missing_package
from sklembed.alignment import CanonicalAligner, ModalityGapAligner
from sklembed.ensemble import EmbeddingClassifier, EmbeddingRegressor
from sklembed.fusion import (
    DecisionFusionClassifier,
    FusionClassifier,
    FusionRegressor,
    KernelFusionClassifier,
    KernelFusionRegressor,
)
from sklembed.onnx.ensemble import add_ensemble
from sklembed.onnx.fusion import (
    add_decision_fusion,
    add_fusion_network,
    add_kernel_fusion,
    to_probabilities,
)
from sklembed.onnx.transformers import (
    add_canonical_aligner,
    add_gap_aligner,
    add_imputer,
)
from sklembed.onnx.trees import add_tree_predictions
from sklembed.projection import ContrastiveProjector
from sklembed.projection.onnx import add_projection

_NAIVE_BAYES = (BernoulliNB, ComplementNB, GaussianNB, MultinomialNB)


class Predictions(NamedTuple):
    """The tensors that a classifier returns."""

    probabilities: str | None  # None for a classifier without predict_proba
    label: str | None  # None: the most probable class, or labels above 0.5


def add_transformer(graph: Graph, transformer, X: str) -> str:
    """Add a transformer; return its output, of dtype float32.

    Raises
    ------
    TypeError
        If the transformer cannot be converted.
    """
    convert = _TRANSFORMERS.get(type(transformer), _add_sklearn)
    return _refuse(convert, graph, transformer, X)


def add_regressor(graph: Graph, regressor, X: str) -> str:
    """Add a regressor; return its predictions, of shape (n_samples, n_outputs)."""
    convert = _REGRESSORS.get(type(regressor), _add_sklearn)
    return _refuse(convert, graph, regressor, X)


def add_classifier(graph: Graph, classifier, X: str) -> Predictions:
    """Add a classifier."""
    convert = _CLASSIFIERS.get(type(classifier), _add_sklearn_classifier)
    return _refuse(convert, graph, classifier, X)


def flatten(estimator) -> list:
    """List the steps of a pipeline; a search is replaced by its best estimator."""
    if isinstance(estimator, FrozenEstimator):
        return flatten(estimator.estimator)
    estimator = getattr(estimator, "best_estimator_", estimator)
    if not isinstance(estimator, Pipeline):
        return [estimator]
    steps: list = []
    for _, step in estimator.steps:
        if step is not None and not isinstance(step, str):  # "passthrough"
            steps += flatten(step)
    return steps


def add_steps(graph: Graph, steps, X: str) -> str:
    """Add transformers one after another."""
    for step in steps:
        X = add_transformer(graph, step, X)
    return X


def _refuse(convert, graph, estimator, X):
    """Convert; an error of a converter names the estimator."""
    try:
        return convert(graph, estimator, X)
    except Unsupported:
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            raise
        raise Unsupported(
            f"{type(estimator).__name__} cannot be converted to ONNX: "
            f"{_first_sentence(error)}"
        ) from error


class Unsupported(TypeError):
    """An estimator cannot be converted to ONNX."""


def _first_sentence(error):
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def _add_gradient_boosting(graph, model, X):
    return Predictions(add_tree_predictions(graph, model, X), None)


def _add_ensemble_classifier(graph, model, X):
    return Predictions(add_ensemble(graph, model, X), None)


def _add_logits(graph, model, X):
    """Add a classifier that has logits."""
    logits = _LOGITS[type(model)](graph, model, X)
    return Predictions(to_probabilities(graph, logits, model.target_type_), None)


def _add_decision_fusion(graph, model, X):
    """Add a DecisionFusionClassifier, up to its logits."""

    def add_probabilities(estimator, block):
        *steps, classifier = flatten(estimator)
        if isinstance(classifier, _NAIVE_BAYES):
            raise TypeError(
                f"its classifier {type(classifier).__name__} has probabilities that "
                "underflow in single precision. Use LogisticRegression."
            )
        block = add_steps(graph, steps, block)
        return add_classifier(graph, classifier, block).probabilities

    return add_decision_fusion(graph, model, X, add_probabilities)


def _add_calibrated(graph, model, X):
    """Add the mean of calibrated classifiers."""
    if model.method == "isotonic":
        raise TypeError(
            "method='isotonic' has no exact graph. Use method='temperature' or 'sigmoid'."
        )
    inner = flatten(model.calibrated_classifiers_[0].estimator)[-1]
    if type(inner) not in (*_LOGITS, EmbeddingClassifier):
        return _add_sklearn_classifier(graph, model, X)
    probabilities = []
    for calibrated in model.calibrated_classifiers_:
        probabilities.append(_add_one_calibrated(graph, calibrated, X))
    total = graph.node("Sum", *probabilities)
    return Predictions(graph.node("Div", total, np.float64(len(probabilities))), None)


def _add_one_calibrated(graph, calibrated, X):
    """Add a classifier and its calibrator; return probabilities of classes."""
    *steps, classifier = flatten(calibrated.estimator)
    if not np.array_equal(classifier.classes_, calibrated.classes):
        raise TypeError("a fold lacks a class. Use fewer folds.")
    X = add_steps(graph, steps, X)
    has_logits = type(classifier) in _LOGITS
    if has_logits:
        scores = _LOGITS[type(classifier)](graph, classifier, X)
    else:
        scores = add_classifier(graph, classifier, X).probabilities
    is_binary = len(calibrated.classes) == 2
    if is_binary:  # the decision for the second class, or its probability
        absent = graph.columns(scores, slice(0, 1))
        scores = graph.columns(scores, slice(1, 2))
        if has_logits:
            scores = graph.node("Sub", scores, absent)
    if calibrated.method == "sigmoid":
        return _add_sigmoids(graph, calibrated.calibrators, scores)
    if is_binary:
        other = graph.node("Neg", scores)
        if not has_logits:
            other = graph.node("Sub", np.float64(1), scores)
        scores = graph.join([other, scores])
    if not has_logits:
        scores = graph.node("Log", graph.node("Add", scores, np.float64(1e-12)))
    scores = graph.node("Mul", scores, np.float64(calibrated.calibrators[0].beta_))
    return graph.node("Softmax", scores, axis=1)


def _add_sigmoids(graph, calibrators, scores):
    fitted = np.array([[calibrator.a_, calibrator.b_] for calibrator in calibrators])
    slopes, intercepts = -fitted.T
    scores = graph.node("Add", graph.node("Mul", scores, slopes), intercepts)
    positive = graph.node("Sigmoid", scores)
    if len(calibrators) == 1:
        return graph.join([graph.node("Sub", np.float64(1), positive), positive])
    return graph.node("Div", positive, graph.sum(positive))


def _add_multi_output(graph, model, X):
    probabilities = []
    for estimator in model.estimators_:
        if not np.array_equal(estimator.classes_, [0, 1]):
            raise TypeError(
                f"a label has the values {estimator.classes_.tolist()}; 0 and 1 were "
                "expected."
            )
        *steps, classifier = flatten(estimator)
        predicted = add_classifier(graph, classifier, add_steps(graph, steps, X))
        if predicted.probabilities is None:
            raise TypeError(f"{type(classifier).__name__} has no predict_proba.")
        positive = graph.columns(predicted.probabilities, slice(1, 2))
        probabilities.append(graph.cast(positive, np.float64))
    return Predictions(graph.join(probabilities), None)


def _add_logistic(graph, model, X):
    """Add a logistic regression in double precision, also for small probabilities."""
    if model.solver == "liblinear" and len(model.classes_) > 2:
        return _add_sklearn_classifier(graph, model, X)
    scores = graph.node("MatMul", graph.cast(X, np.float64), _doubles(model.coef_.T))
    scores = graph.node("Add", scores, _doubles(model.intercept_))
    if len(model.classes_) == 2:
        scores = graph.join([graph.node("Mul", scores, np.float64(0)), scores])
    return Predictions(graph.node("Softmax", scores, axis=1), None)


def _doubles(array):
    return np.asarray(array, dtype=np.float64)


def _add_sklearn_classifier(graph, classifier, X):
    """Add a classifier of scikit-learn by skl2onnx."""
    outputs = _inline(graph, classifier, X)
    label, probabilities = outputs
    if not hasattr(classifier, "predict_proba"):
        return Predictions(None, label)
    classes = classifier.classes_
    if isinstance(classes, list):  # (n_labels, n_samples, 2)
        for values in classes:
            if not np.array_equal(values, [0, 1]):
                raise TypeError(
                    f"a label has the values {values.tolist()}; 0 and 1 were expected."
                )
        positive = graph.node("Gather", probabilities, np.int64(1), axis=2)
        probabilities = graph.node("Transpose", positive)
    return Predictions(probabilities, label)


def _add_sklearn(graph, estimator, X):
    """Add a transformer or a regressor of scikit-learn by skl2onnx."""
    outputs = _inline(graph, estimator, X)
    return graph.cast(outputs[0], np.float32)


def _inline(graph, estimator, X):
    if type(estimator).__module__.split(".")[0] != "sklearn":
        raise TypeError(
            "it is neither a part of scikit-learn nor a supported part of sklembed. "
            "Use joblib or sklembed.save."
        )
    try:
        from skl2onnx import convert_sklearn
        from skl2onnx.common.data_types import FloatTensorType
    except ImportError as error:
        raise missing_package("skl2onnx") from error
    options = None
    if is_classifier(estimator) and hasattr(estimator, "predict_proba"):
        options = {id(estimator): {"zipmap": False}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = convert_sklearn(
            estimator,
            initial_types=[("X", FloatTensorType([None, estimator.n_features_in_]))],
            options=options,
            target_opset=graph.opsets,
        )
    return graph.inline(model, X)


_TRANSFORMERS: dict[type, Callable[..., Any]] = {
    CanonicalAligner: add_canonical_aligner,
    ContrastiveProjector: add_projection,
    ModalityGapAligner: add_gap_aligner,
    SimpleImputer: add_imputer,
}
_REGRESSORS: dict[type, Callable[..., Any]] = {
    EmbeddingRegressor: add_ensemble,
    FusionRegressor: add_fusion_network,
    HistGradientBoostingRegressor: add_tree_predictions,
    KernelFusionRegressor: add_kernel_fusion,
}
_LOGITS: dict[type, Callable[..., Any]] = {
    DecisionFusionClassifier: _add_decision_fusion,
    FusionClassifier: add_fusion_network,
    KernelFusionClassifier: add_kernel_fusion,
}
_CLASSIFIERS: dict[type, Callable[..., Any]] = {
    **dict.fromkeys(_LOGITS, _add_logits),
    CalibratedClassifierCV: _add_calibrated,
    EmbeddingClassifier: _add_ensemble_classifier,
    HistGradientBoostingClassifier: _add_gradient_boosting,
    LogisticRegression: _add_logistic,
    MultiOutputClassifier: _add_multi_output,
}
