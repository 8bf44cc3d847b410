"""to_onnx: the part of a fitted model after the encoders as one ONNX file."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

import sklembed
from sklembed._graph import Graph, missing_package
from sklembed.encoders import FrozenEncoder
from sklembed.onnx.parts import (
    Predictions,
    Unsupported,
    add_classifier,
    add_regressor,
    add_steps,
    add_transformer,
    flatten,
)
from sklembed.union import PerModalityUnion
from sklembed.vectorizer import MultimodalVectorizer

_TOLERANCE = 1e-4
_SHARE_OF_LABELS = 0.05  # that may differ where there are no probabilities
_N_CHECKED = 32  # rows of each kind


def to_onnx(estimator, path):
    """Write the part of a fitted model after the encoders as one ONNX file.

    A service then needs neither Python packages for machine learning nor torch: it
    encodes texts and images, and a runtime of ONNX turns embeddings into predictions.
    If the estimator is a pipeline whose first step is a :class:`FrozenEncoder`, a
    :class:`PerModalityUnion` or a :class:`MultimodalVectorizer`, the input of the graph
    is the output of that step. In a branch of a union that is a pipeline after a
    `FrozenEncoder`, the input is the output of the encoder, and the rest is part of the
    graph. Otherwise, the input is that of the estimator.

    The input ``X`` is float32 of shape (n_samples, n_features); a missing modality is a
    block of NaN, as in scikit-learn. The outputs are ``label`` and ``probabilities`` of
    a classifier, ``label`` alone if it has no `predict_proba`, and ``variable``, of
    shape (n_samples, n_outputs), of a regressor or a transformer. With several labels,
    ``label`` contains 0 and 1, and ``probabilities`` has a column for each label. The
    metadata of the model contain ``classes``, the names ``columns`` of the input, both
    as JSON, and ``sklembed_version``.

    Kernels, support vector machines and networks are computed in double precision. The
    graph does not validate its input. Before the file is written, it is run and compared
    with the estimator on random rows.

    Parameters
    ----------
    estimator : estimator
        A fitted classifier, regressor or transformer of sklembed or scikit-learn, a
        pipeline of them, or a search, which is replaced by its ``best_estimator_``. Parts
        of scikit-learn are converted by skl2onnx.

    path : str or Path
        The file to write.

    Raises
    ------
    ImportError
        If onnx, onnxruntime or skl2onnx is not installed.
    TypeError
        If a part cannot be converted. The message names the part. Nothing is written.
    ValueError
        If the predictions of the graph differ from those of the estimator by more than
        0.0001, as for a part that skl2onnx converts wrongly. Nothing is written.
        If the estimator is not fitted.

    See Also
    --------
    save : Writes the whole pipeline for Python, with the parameters of the encoders.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import onnxruntime
    >>> import sklembed
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> blocks = {"top": slice(0, 32), "bottom": slice(32, 64)}
    >>> classifier = sklembed.KernelFusionClassifier(blocks=blocks, random_state=0)
    >>> path = Path(tempfile.mkdtemp()) / "digits.onnx"
    >>> sklembed.to_onnx(classifier.fit(X[:900], y[:900]), path)
    >>> session = onnxruntime.InferenceSession(path)
    >>> rows = X[900:].astype(np.float32)
    >>> label, probabilities = session.run(None, {"X": rows})
    >>> bool((label == classifier.predict(rows)).all())
    True
    """
    check_is_fitted(estimator)
    _import_runtime()
    graph = Graph()
    source, steps = _split(estimator)
    X = source.add(graph)
    outputs = _add_model(graph, steps, X)
    metadata = {
        "columns": json.dumps(list(map(str, source.names))),
        "sklembed_version": sklembed.__version__,
    }
    classes = getattr(steps[-1], "classes_", None) if steps else None
    if "label" in outputs:
        metadata["classes"] = json.dumps(_as_list(classes))
    content = graph.to_bytes(len(source.names), outputs, metadata)
    _check(content, source, steps)
    Path(path).write_bytes(content)


class _Branch(NamedTuple):
    """A block of the input, and the transformers that follow its encoder."""

    name: str
    names: list  # of the columns of the input
    steps: list
    skips: bool  # whether the transformers do not receive missing rows
    weight: float

    def apply(self, X):
        """Return the block that the union returns, in numpy."""
        if not self.steps:
            return X
        rows = np.arange(len(X))
        if self.skips:
            rows = np.flatnonzero(~np.isnan(X).any(axis=1))
        Z = _transform(self.steps, X[rows]) * self.weight
        out = np.full((len(X), Z.shape[1]), np.nan, dtype=np.float32)
        out[rows] = Z
        return out

    def add(self, graph, X):
        """Add the transformers to a graph."""
        if not self.steps:
            return X
        rows = X
        if self.skips:
            rows = graph.node("Where", graph.missing(X), np.float32(0), X)
        Z = add_steps(graph, self.steps, rows)
        Z = graph.node("Mul", Z, np.float32(self.weight))
        if not self.skips:
            return Z
        return graph.node("Where", graph.missing(X), np.float32(np.nan), Z)


class _Source:
    """The input of the graph, as blocks side by side."""

    def __init__(self, branches: Sequence[_Branch]):
        self.branches = branches
        self.names: list = []
        self.slices: list[slice] = []
        self.has_steps = False
        for branch in branches:
            start = len(self.names)
            self.names += branch.names
            self.slices.append(slice(start, len(self.names)))
            self.has_steps = self.has_steps or bool(branch.steps)

    def apply(self, X):
        """Return the joined blocks, in numpy."""
        parts = []
        for branch, columns in zip(self.branches, self.slices, strict=True):
            parts.append(branch.apply(X[:, columns]))
        return np.hstack(parts)

    def add(self, graph):
        """Add what follows the encoders to a graph; return the joined blocks."""
        if not self.has_steps:
            return "X"
        parts = []
        for branch, columns in zip(self.branches, self.slices, strict=True):
            parts.append(branch.add(graph, graph.columns("X", columns)))
        return graph.join(parts)


def _split(estimator):
    """Return the input of the graph and the steps that follow it."""
    steps = flatten(estimator)
    first = steps[0]
    if isinstance(first, FrozenEncoder):
        if first.output == "tokens":
            raise Unsupported(
                "The FrozenEncoder returns tokens, of which each row has another number. "
                "Only pooled embeddings can be the input of the graph."
            )
        branch = _Branch("", list(first.get_feature_names_out()), [], False, 1.0)
        source = _Source([branch])
    elif isinstance(first, PerModalityUnion | MultimodalVectorizer):
        source = _read_union(getattr(first, "union_", first))
    else:
        return _Source([_Branch("", _names_in(first), [], False, 1.0)]), steps
    if len(steps) == 1 and not source.has_steps:
        raise Unsupported(
            f"Nothing follows the {type(first).__name__}, so there is nothing to write. "
            "Pass the pipeline with the classifier; FrozenEncoder.export writes an encoder."
        )
    return source, steps[1:]


def _names_in(estimator):
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        names = [f"x{i}" for i in range(estimator.n_features_in_)]
    return list(names)


def _read_union(union):
    """Return the encoders' outputs of a fitted union, and what follows in each branch."""
    tokens = [name for name, holds in union.holds_tokens_.items() if holds]
    if tokens:
        raise Unsupported(
            f"The branches {tokens} return tokens, of which each row has another number. "
            "Only pooled embeddings can be the input of the graph."
        )
    names = list(union.get_feature_names_out())
    weights = union.transformer_weights or {}
    fitted = union.named_transformers_
    branches = []
    for name, block in union.blocks_.items():
        names_in, after = names[block], []
        transformer = fitted.get(name)
        if name not in union.unobserved_ and isinstance(transformer, Pipeline):
            encoder, *after = flatten(transformer)
            if isinstance(encoder, FrozenEncoder) and encoder.output != "tokens":
                if after:
                    columns = encoder.get_feature_names_out()
                    names_in = [f"{name}__{column}" for column in columns]
            else:
                after = []
        skips = name in fitted and union._treatment(name, transformer) == "skip"
        weight = float(weights.get(name, 1))
        branches.append(_Branch(name, names_in, after, skips, weight))
    return _Source(branches)


def _add_model(graph, steps, X):
    """Add the steps after the encoders; return the outputs of the graph."""
    if not steps:
        return {"variable": (X, np.float32, [None])}
    *transformers, last = steps
    X = add_steps(graph, transformers, X)
    if is_classifier(last):
        return _name_predictions(graph, last, add_classifier(graph, last, X))
    if is_regressor(last):
        variable = add_regressor(graph, last, X)
    else:
        variable = add_transformer(graph, last, X)
    return {"variable": (graph.cast(variable, np.float32), np.float32, [None])}


def _name_predictions(graph, classifier, predictions: Predictions):
    """Return the outputs of a classifier by name."""
    probabilities, label = predictions
    classes = classifier.classes_
    outputs = {}
    is_multilabel = isinstance(classes, list) or (
        getattr(classifier, "target_type_", "") == "multilabel"
        or getattr(classifier, "multilabel_", False)
    )
    if is_multilabel:
        if label is None:
            label = graph.node("Greater", probabilities, np.float64(0.5))
        n_labels = len(classes)
        outputs["label"] = (graph.cast(label, np.int64), np.int64, [n_labels])
        shape = [n_labels]
    else:
        classes = _as_classes(classes)
        if label is None:
            position = graph.node("ArgMax", probabilities, axis=1, keepdims=0)
            label = graph.node("Gather", classes, position, axis=0)
        if classes.dtype.kind != "U":
            label = graph.cast(label, classes.dtype)
        outputs["label"] = (label, classes.dtype, [])
        shape = [len(classes)]
    if probabilities is not None:
        probabilities = graph.cast(probabilities, np.float32)
        outputs["probabilities"] = (probabilities, np.float32, shape)
    return outputs


def _as_list(classes):
    if isinstance(classes, list):
        return [np.asarray(of_label).tolist() for of_label in classes]
    return np.asarray(classes).tolist()


def _as_classes(classes):
    """Return classes in a type of ONNX: texts, int64, float64 or bool."""
    plain = np.array(np.asarray(classes).tolist())
    if plain.dtype.kind in "US" and all(isinstance(c, str) for c in classes):
        return plain
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}
    if plain.dtype.kind not in kinds:
        raise Unsupported(
            f"The classes have the type {type(classes[0]).__name__}, which ONNX lacks. "
            "Fit on texts or numbers."
        )
    return plain.astype(kinds[plain.dtype.kind])


def _import_runtime():
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime") from error
    return onnxruntime


def _check(content, source, steps):
    """Compare the graph with the estimator on random rows.

    skl2onnx converts some estimators to a graph with other predictions, without error.
    """
    runtime = _import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns about shapes, which are not declared
    X, incomplete = _random_rows(source, steps)
    try:
        expected = _predict(steps, source.apply(incomplete))
        X = incomplete
    except ValueError:  # a part does not accept missing values
        expected = _predict(steps, source.apply(X))
    try:
        session = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {"X": X}), strict=True))
    except Exception as error:
        raise Unsupported(
            f"ONNX Runtime cannot run the graph of {_names_of(steps)}: {error}"
        ) from error
    for name, values in expected.items():
        _check_output(name, outputs[name], values, expected, steps)


def _check_output(name, received, values, expected, steps):
    """Refuse an output that differs from the predictions of the estimator."""
    difference = None
    if received.shape != values.shape:
        difference = f"has the shape {received.shape} instead of {values.shape}"
    elif name == "label":
        differs = received != values
        allowed = _SHARE_OF_LABELS
        if "probabilities" in expected:  # ties may be decided otherwise
            differs &= _is_certain(expected["probabilities"], values.ndim == 2)
            allowed = 0
        if differs.mean() > allowed:
            difference = f"differs in {differs.mean():.1%} of random rows"
    else:
        error = np.abs(received - values)
        error[np.isnan(received) & np.isnan(values)] = 0
        allowed = _TOLERANCE * max(1, np.nanmax(np.abs(values), initial=0))
        if not error.max(initial=0) <= allowed:
            difference = f"differs by up to {error.max():.2g} on random rows"
    if difference is not None:
        raise ValueError(
            f"The ONNX graph of {_names_of(steps)} is not equivalent: its output {name!r} "
            f"{difference}. Replace the part, or use sklembed.save."
        )


def _is_certain(probabilities, is_multilabel):
    if is_multilabel:
        return np.abs(probabilities - 0.5) > _TOLERANCE
    largest = np.sort(probabilities, axis=1)
    return largest[:, -1] - largest[:, -2] > _TOLERANCE


def _names_of(steps):
    return " and ".join(type(step).__name__ for step in steps) or "the union"


def _random_rows(source, steps):
    """Return rows of two scales; rows without each modality; rows without any."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, _N_CHECKED, len(source.names)))
    rows[1] /= np.linalg.norm(rows[1], axis=1, keepdims=True)
    X = np.concatenate(rows).astype(np.float32)
    blocks = source.slices.copy()
    if not source.has_steps:
        blocks += getattr(steps[0], "blocks_", {}).values()
    incomplete = X[rng.integers(len(X), size=len(blocks))]
    for row, columns in zip(incomplete, blocks, strict=True):
        row[columns] = np.nan
    empty = np.full((1, X.shape[1]), np.nan, dtype=np.float32)
    return X, np.concatenate([X, incomplete, empty])


def _transform(steps, X):
    for step in steps:
        X = np.asarray(step.transform(X))
    return X


def _predict(steps, X):
    """Return the predictions of the estimator by the names of the graph's outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        if not steps:
            return {"variable": X}
        *transformers, last = steps
        X = _transform(transformers, X)
        if is_classifier(last):
            return _predict_classes(last, X)
        predict = last.predict if is_regressor(last) else last.transform
        return {"variable": np.asarray(predict(X)).reshape(len(X), -1)}


def _predict_classes(classifier, X):
    predictions = {}
    if hasattr(classifier, "predict_proba"):
        probabilities = classifier.predict_proba(X)
        if isinstance(probabilities, list):
            probabilities = np.array(probabilities)[..., 1].T
        predictions["probabilities"] = probabilities
    predictions["label"] = np.asarray(classifier.predict(X))
    return predictions
