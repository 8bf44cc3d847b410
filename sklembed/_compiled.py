"""Check the state of objects whose compiled code reads memory without bounds checks."""

import numpy as np


def check_state(instance, args, state):
    """Raise a ValueError if a method of the object could read or write out of bounds.

    Trees, forests and boosting, nearest neighbours, support vector machines and sparse
    matrices are checked, in time linear in the size of their arrays.

    Parameters
    ----------
    instance : object
        An object of scikit-learn or scipy.
    args : list
        Arguments of its class.
    state : dict, tuple or None
        The state that was set.
    """
    for cls in type(instance).__mro__:
        if cls.__name__ in _CHECKS and cls.__module__.startswith(
            ("sklearn.", "scipy.")
        ):
            _CHECKS[cls.__name__](instance, args, state)


def _require(condition, instance):
    if not np.all(condition):
        raise ValueError(f"the arrays of a {type(instance).__name__} are inconsistent")


def _check_tree(tree, args, state):
    n_features, n_classes, n_outputs = args
    nodes = state["nodes"]
    _require(len(n_classes) == n_outputs and np.min(n_classes) >= 1, tree)
    _require(state["node_count"] == len(nodes), tree)
    left, right = nodes["left_child"], nodes["right_child"]
    is_split = left != -1
    depth = _depth(left, right, is_split, tree)
    _require(state["max_depth"] >= depth, tree)
    _require_indices(nodes["feature"][is_split], n_features, tree)


def _depth(left, right, is_split, instance):
    """Return the depth of a binary tree, in which children come after their parents."""
    parents = np.flatnonzero(is_split)
    children = np.sort(np.concatenate([left[parents], right[parents]]).astype(np.int64))
    _require(len(children) == len(left) - 1, instance)
    _require(children == np.arange(1, len(left)), instance)
    _require((left[parents] > parents) & (right[parents] > parents), instance)
    depth, level = 0, np.zeros(1, dtype=np.int64)
    while is_split[level].any():
        level = level[is_split[level]]
        level = np.concatenate([left[level], right[level]])
        depth += 1
    return depth


def _check_decision_tree(estimator, args, state):
    if "tree_" in state:
        _require(state["tree_"].n_features == state["n_features_in_"], estimator)


def _check_trees_of_ensemble(estimator, args, state):
    for tree in np.ravel(state.get("estimators_", [])):
        _require(tree.n_features_in_ == state["n_features_in_"], estimator)


def _check_gradient_boosting(estimator, args, state):
    _check_trees_of_ensemble(estimator, args, state)
    if "estimators_" in state and "n_trees_per_iteration_" in state:
        n_columns = state["n_trees_per_iteration_"]
        _require(state["estimators_"].shape[1:] == (n_columns,), estimator)


def _check_isolation_forest(forest, args, state):
    if "estimators_" in state:
        features = state["estimators_features_"]
        for tree, columns in zip(state["estimators_"], features, strict=True):
            _require(tree.n_features_in_ == len(columns), forest)


def _check_predictor(predictor, args, state):
    nodes = state["nodes"]
    is_split = nodes["is_leaf"] == 0
    _depth(nodes["left"], nodes["right"], is_split, predictor)
    is_categorical = is_split & (nodes["is_categorical"] != 0)
    n_sets = len(state["raw_left_cat_bitsets"])
    _require_indices(nodes["bitset_idx"][is_categorical], n_sets, predictor)


def _check_hist_boosting(estimator, args, state):
    if "_predictors" not in state:
        return
    n_features = state["n_features_in_"]
    is_categorical = np.asarray(state["_bin_mapper"].is_categorical_)
    _require(len(is_categorical) == n_features, estimator)
    for predictors in state["_predictors"]:
        for predictor in predictors:
            splits = predictor.nodes[predictor.nodes["is_leaf"] == 0]
            _require_indices(splits["feature_idx"], n_features, estimator)
            by_category = splits["feature_idx"][splits["is_categorical"] != 0]
            _require(is_categorical[by_category], estimator)


def _check_binary_tree(tree, args, state):
    data, indices, nodes, bounds, _, n_levels, n_nodes, *_ = state
    n_rows, n_features = data.shape
    _require(len(indices) == n_rows, tree)
    _require_indices(indices, n_rows, tree)
    _require(n_nodes == len(nodes) == 2**n_levels - 1, tree)
    _require(bounds.shape[1:] == (n_nodes, n_features), tree)
    is_kd_tree = type(tree).__name__.startswith("KD")
    _require(len(bounds) == 1 + is_kd_tree, tree)
    start, end = nodes["idx_start"], nodes["idx_end"]
    _require((start >= 0) & (start <= end) & (end <= n_rows), tree)
    is_last = np.arange(n_nodes) >= n_nodes // 2
    _require(nodes["is_leaf"][is_last] != 0, tree)
    weights = state[12] if len(state) > 12 else None
    _require(weights is None or len(weights) == n_rows, tree)


def _check_libsvm(estimator, args, state):
    if "support_" not in state:
        return
    n_support, vectors = len(state["support_"]), state["support_vectors_"]
    n_classes, coefficients = len(state["_n_support"]), state["_dual_coef_"]
    n_pairs = n_classes * (n_classes - 1) // 2
    _require(coefficients.shape == (n_classes - 1, n_support), estimator)
    if state["_sparse"]:  # all coefficients are stored, in their order
        _require(coefficients.nnz == (n_classes - 1) * n_support, estimator)
    _require(len(state["_intercept_"]) == n_pairs, estimator)
    for name in ("_probA", "_probB"):
        _require(len(state[name]) in (0, n_pairs), estimator)
    if estimator._impl in ("c_svc", "nu_svc"):
        _require(state["_n_support"] >= 0, estimator)
        _require(np.sum(state["_n_support"]) == n_support, estimator)
    if state["kernel"] == "precomputed" or callable(state["kernel"]):
        _require_indices(state["support_"], state["shape_fit_"][0], estimator)
    else:
        _require(vectors.shape == (n_support, state["n_features_in_"]), estimator)


def _check_compressed(matrix, args, state):
    matrix.check_format(full_check=True)


def _check_coordinates(matrix, args, state):
    _require(len(matrix.coords) == len(matrix.shape), matrix)
    for indices, size in zip(matrix.coords, matrix.shape, strict=True):
        _require(len(indices) == len(matrix.data), matrix)
        _require_indices(indices, size, matrix)


def _check_diagonals(matrix, args, state):
    _require(matrix.data.ndim == 2, matrix)
    _require(matrix.offsets.shape == matrix.data.shape[:1], matrix)


def _require_indices(indices, size, instance):
    _require((indices >= 0) & (indices < size), instance)


_CHECKS = {
    "BaseForest": _check_trees_of_ensemble,
    "BaseDecisionTree": _check_decision_tree,
    "BaseGradientBoosting": _check_gradient_boosting,
    "BaseHistGradientBoosting": _check_hist_boosting,
    "BaseLibSVM": _check_libsvm,
    "BinaryTree64": _check_binary_tree,
    "BinaryTree32": _check_binary_tree,
    "IsolationForest": _check_isolation_forest,
    "Tree": _check_tree,
    "TreePredictor": _check_predictor,
    "_coo_base": _check_coordinates,
    "_cs_matrix": _check_compressed,
    "_dia_base": _check_diagonals,
}
