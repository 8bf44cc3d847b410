"""Gradient boosting of scikit-learn in an ONNX graph."""

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingRegressor

from sklembed._graph import Graph

_LOG_LINKS = ("poisson", "gamma")


def add_tree_predictions(graph: Graph, model, X: str) -> str:
    """Add histogram-based gradient boosting: probabilities of classes, or a number.

    Parameters
    ----------
    graph : Graph
        The graph.
    model : HistGradientBoosting estimator or DummyClassifier
        The fitted estimator.
    X : str
        The input, of dtype float32.

    Returns
    -------
    predictions : str
        The predictions, of dtype float64 and shape (n_samples, n_outputs).
    """
    if isinstance(model, DummyClassifier):
        return graph.repeat(X, np.asarray(model.class_prior_, dtype=np.float64))
    if model.is_categorical_ is not None and model.is_categorical_.any():
        raise TypeError(
            "has categorical columns, for which ONNX has no exact node. Encode them, "
            "for example with OneHotEncoder, and set categorical_features=None."
        )
    raw = _add_trees(graph, model._predictors, X)
    raw = graph.node("Add", raw, model._baseline_prediction.reshape(1, -1))
    if isinstance(model, HistGradientBoostingRegressor):
        return graph.node("Exp", raw) if model.loss in _LOG_LINKS else raw
    if len(model.classes_) == 2:
        raw = graph.join([graph.node("Mul", raw, np.float64(0)), raw])
    return graph.node("Softmax", raw, axis=1)


def _add_trees(graph, predictors, X):
    """Add the sum of trees; `predictors` has a list with a tree per output."""
    n_targets = len(predictors[0])
    nodes, leaves, number = [], [], 0
    for iteration in predictors:
        for target, tree in enumerate(iteration):
            nodes.append(_describe_nodes(tree.nodes, number))
            leaves.append(_describe_leaves(tree.nodes, number, target))
            number += 1
    attributes: dict[str, list] = {}
    for described in nodes + leaves:
        for name, values in described.items():
            attributes.setdefault(name, []).extend(values)
    scores = graph.node("TreeEnsembleRegressor", X, n_targets=n_targets, **attributes)
    return graph.cast(scores, np.float64)


def _describe_nodes(nodes, number):
    is_leaf = nodes["is_leaf"].astype(bool)
    modes = np.where(is_leaf, "LEAF", "BRANCH_LEQ")
    tracks = np.where(is_leaf, 0, nodes["missing_go_to_left"])
    return {
        "nodes_treeids": [number] * len(nodes),
        "nodes_nodeids": list(range(len(nodes))),
        "nodes_modes": modes.tolist(),
        "nodes_featureids": np.where(is_leaf, 0, nodes["feature_idx"]).tolist(),
        "nodes_values": _round_down(np.where(is_leaf, 0, nodes["num_threshold"])),
        "nodes_truenodeids": np.where(is_leaf, 0, nodes["left"]).tolist(),
        "nodes_falsenodeids": np.where(is_leaf, 0, nodes["right"]).tolist(),
        "nodes_missing_value_tracks_true": tracks.astype(int).tolist(),
    }


def _describe_leaves(nodes, number, target):
    leaves = np.flatnonzero(nodes["is_leaf"])
    return {
        "target_treeids": [number] * len(leaves),
        "target_nodeids": leaves.tolist(),
        "target_ids": [target] * len(leaves),
        "target_weights": nodes["value"][leaves].tolist(),
    }


def _round_down(thresholds):
    """Return float32 thresholds with the same result for all float32 values."""
    with np.errstate(over="ignore"):
        rounded = thresholds.astype(np.float32)
    too_large = rounded.astype(np.float64) > thresholds
    below = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(too_large, below, rounded).tolist()
