"""The fusion estimators in an ONNX graph, in double precision."""

import numpy as np

from sklembed._graph import Graph
from sklembed.fusion._base import logits_of_prior, to_log_prior
from sklembed.fusion.kernel import deviation_factors, is_empty, mean_weights
from sklembed.onnx.blocks import (
    half_squared_distances,
    observed_in_block,
    scale_blocks,
)

_LOG_TINY = np.log(np.finfo(np.float64).tiny)


def to_probabilities(graph: Graph, logits: str, target_type: str) -> str:
    """Turn logits of shape (n_samples, n_outputs) into probabilities.

    If the target is binary, there are log-probabilities of two classes, or log-odds of
    the second in a single column.
    """
    if target_type == "multilabel":
        return graph.node("Sigmoid", logits)
    return graph.node("Softmax", logits, axis=1)


def add_kernel_fusion(graph: Graph, model, X: str) -> str:
    """Add a KernelFusionClassifier, up to its logits, or a KernelFusionRegressor.

    The logits are log-probabilities of classes, or log-odds of labels.
    """
    predicted = _add_kernel_ridge(graph, model, X)
    if hasattr(model, "target_scale_"):
        return unscale(graph, predicted, model)
    logits = graph.node("Mul", predicted, np.float64(model.slope_))
    logits = graph.node("Add", logits, model.intercepts_)
    if model.target_type_ != "multilabel":
        logits = graph.node("LogSoftmax", logits, axis=1)
    if model.table_blocks_:
        return logits
    observed = [observed_in_block(graph, X, part) for part in model.blocks_.values()]
    return _or_prior(graph, logits, observed, model._logits_of_prior())


def unscale(graph: Graph, predicted: str, model) -> str:
    """Turn standardised predictions into numbers of the scale of the targets."""
    scale = np.atleast_1d(model.target_scale_).astype(np.float64)
    mean = np.atleast_1d(model.target_mean_).astype(np.float64)
    return graph.node("Add", graph.node("Mul", predicted, scale), mean)


def _or_prior(graph, logits, observed, prior):
    """Replace the logits of rows without any observed modality."""
    any_observed = observed[0]
    for mask in observed[1:]:
        any_observed = graph.node("Or", any_observed, mask)
    return graph.node("Where", any_observed, logits, prior[None].astype(np.float64))


def _add_kernel_ridge(graph, model, X):
    """Add `_KernelFusion._predict_ridge`, with one term for each block."""
    landmarks = model._landmarks
    blocks = scale_blocks(graph, X, model.blocks_, model._scaling)
    shares = model._shares(blocks, model.table_share_)
    factors, any_observed = _add_deviation_factors(graph, blocks, shares)
    landmark_factors = deviation_factors(landmarks, shares)
    all_coef = model._coef * ~is_empty(landmarks)[:, None]
    terms = []
    for name, block in blocks.items():
        is_table = name in model.table_blocks_
        gamma = model.table_gamma_ if is_table else model.gamma_
        distances = half_squared_distances(graph, block.values, landmarks[name].values)
        kernel = graph.node("Exp", graph.node("Mul", distances, np.float64(-gamma)))
        # A landmark is its deviation from the mean of all landmarks, rescaled, plus this mean.
        factor = landmark_factors[name][:, None]
        of_mean = mean_weights(landmarks[name], model._landmark_weight)
        coef = factor * all_coef + np.outer(of_mean, ((1 - factor) * all_coef).sum(0))
        term = graph.node("MatMul", kernel, shares[name] * coef)
        mean = (model._means[name] @ all_coef)[None]
        deviation = graph.node("Mul", graph.node("Sub", term, mean), factors[name])
        terms.append(graph.node("Add", deviation, mean))
    total = graph.node("Where", any_observed, graph.node("Sum", *terms), np.float64(0))
    return graph.node("Add", total, model.intercept_[None])


def _add_deviation_factors(graph, blocks, shares):
    """Add `kernel.deviation_factors`, and a mask of the rows with any observed block."""
    observed, weighted = {}, []
    for name, block in blocks.items():
        mask = np.ones((1, 1), dtype=bool) if block.observed is None else block.observed
        observed[name] = graph.cast(mask, np.float64)
        weighted.append(graph.node("Mul", observed[name], np.float64(shares[name])))
    share = graph.node(
        "Div", graph.node("Sum", *weighted), np.sum(list(shares.values()))
    )
    any_observed = graph.node("Greater", share, np.float64(0))
    share = graph.node("Where", any_observed, share, np.float64(1))
    factor = graph.node("Div", np.float64(1), graph.node("Sqrt", share))
    factors = {name: graph.node("Mul", factor, mask) for name, mask in observed.items()}
    return factors, any_observed


def add_fusion_network(graph: Graph, model, X: str) -> str:
    """Add a FusionClassifier, up to its logits, or a FusionRegressor."""
    blocks = model.blocks_
    x = graph.join([graph.columns(X, part) for part in blocks.values()])
    x = graph.cast(x, np.float64)
    x = graph.node("Sub", x, model.weights_["mean"].astype(np.float64))
    x = graph.node("Div", x, model.weights_["scale"].astype(np.float64))
    parts, observed = [], {}
    for name, columns in zip(blocks, model._column_slices(), strict=True):
        part = graph.columns(x, columns)
        if name in model.ignored_blocks_:
            part = graph.repeat(X, np.zeros(columns.stop - columns.start))
        else:
            observed[name] = observed_in_block(graph, X, blocks[name])
            part = graph.node("Where", observed[name], part, np.float64(0))
        parts.append(part)
    if model.structure_["join"] == "early":
        hidden = _add_chain(graph, model.weights_, 0, graph.join(parts))
    else:
        chains = []
        for number, (name, part) in enumerate(zip(blocks, parts, strict=True)):
            chain = _add_chain(graph, model.weights_, number, part)
            mask = observed.get(name, np.zeros((1, 1), dtype=bool))
            chains.append(graph.node("Where", mask, chain, np.float64(0)))
        hidden = graph.join(chains)
    outputs = _add_linear(graph, model.weights_, "output.", hidden)
    if hasattr(model, "target_scale_"):
        mean = np.zeros(np.size(model.target_mean_))
        outputs = _or_prior(graph, outputs, list(observed.values()), mean)
        return unscale(graph, outputs, model)
    prior = logits_of_prior(model.prior_, model.target_type_)
    logits = _or_prior(graph, outputs, list(observed.values()), prior)
    if model.target_type_ != "binary":
        return logits
    return graph.join([graph.node("Mul", logits, np.float64(0)), logits])


def _add_linear(graph, weights, prefix, x):
    weight = weights[prefix + "weight"].astype(np.float64)
    bias = weights[prefix + "bias"].astype(np.float64)
    return graph.node("Gemm", x, weight, bias, transB=1)


def _add_chain(graph, weights, chain, x):
    """Add a chain of hidden layers, normalised by the running moments."""
    layer = 0
    while (prefix := f"chains.{chain}.{layer}.") + "linear.weight" in weights:
        x = graph.node("Relu", _add_linear(graph, weights, prefix + "linear.", x))
        mean = weights[prefix + "norm.running_mean"].astype(np.float64)
        variance = weights[prefix + "norm.running_var"].astype(np.float64)
        scale = weights[prefix + "norm.weight"] / np.sqrt(variance + 1e-5)
        shift = weights[prefix + "norm.bias"] - mean * scale
        x = graph.node("Add", graph.node("Mul", x, scale), shift)
        layer += 1
    return x


def add_decision_fusion(graph: Graph, model, X: str, add_probabilities) -> str:
    """Add a DecisionFusionClassifier, up to its log-probabilities or log-odds of labels.

    `add_probabilities` adds a classifier and returns its probabilities.
    """
    log_prior = to_log_prior(model.prior_, model.target_type_)
    n_classes = len(model.classes_)
    # Of labels, columns are log-probabilities of absence, then of presence.
    log_prior = log_prior.T.reshape(-1)
    logs, weights, masks = [], [], []
    for name in model._used_blocks():
        observed = observed_in_block(graph, X, model.blocks_[name])
        block = graph.columns(X, model.blocks_[name])
        block = graph.node("Where", observed, block, np.float32(0))
        masks.append(observed)
        logs.append(
            _add_modality(graph, model, name, block, log_prior, add_probabilities)
        )
        weights.append(model.weights_[name])
    weights = _add_row_weights(graph, graph.join(masks), np.array(weights))
    pooled = _pool(graph, model, logs, weights, log_prior)
    if model.target_type_ != "multilabel":
        return _normalize(graph, pooled)
    absent = graph.columns(pooled, slice(0, n_classes))
    present = graph.columns(pooled, slice(n_classes, 2 * n_classes))
    total = _log_add(graph, absent, present)
    logs = []
    for part in (absent, present):
        part = graph.node("Sub", part, total)
        logs.append(graph.node("Max", part, np.float64(_LOG_TINY)))
    return graph.node("Sub", logs[1], logs[0])


def _normalize(graph, logs):
    return graph.node(
        "Max", graph.node("LogSoftmax", logs, axis=1), np.float64(_LOG_TINY)
    )


def _add_modality(graph, model, name, block, log_prior, add_probabilities):
    """Return log-probabilities of all classes, -inf for 0; absent ones keep their prior."""
    present = np.flatnonzero(np.isin(model.classes_, model.estimator_classes_[name]))
    n_classes = len(model.classes_)
    estimators = model.estimators_[name]
    columns = []
    if not isinstance(estimators, list):
        estimators = [estimators]
    for estimator in estimators:
        probabilities = add_probabilities(estimator, block)
        columns.append(graph.cast(probabilities, np.float64))
    if model.target_type_ != "multilabel":
        logs = graph.node("Log", columns[0])
        shares = np.logaddexp.reduce(log_prior[present])
        shares = shares - np.logaddexp.reduce(log_prior)
        return _spread(
            graph, block, graph.node("Add", logs, shares), present, log_prior
        )
    if len(estimators) == len(present):  # a classifier for each label
        negative, positive = (
            graph.join([graph.columns(part, slice(i, i + 1)) for part in columns])
            for i in range(2)
        )
    else:
        positive = columns[0]
        negative = graph.node("Sub", np.float64(1), positive)
    logs = graph.node("Log", graph.join([negative, positive]))
    positions = np.concatenate([present, present + n_classes])
    return _spread(graph, block, logs, positions, log_prior)


def _spread(graph, block, logs, positions, log_prior):
    """Move columns to their positions among the columns of the prior."""
    if len(positions) == len(log_prior):
        return logs
    every = graph.join([logs, graph.repeat(block, log_prior)])
    order = np.arange(len(log_prior)) + len(positions)
    order[positions] = np.arange(len(positions))
    return graph.columns(every, order)


def _add_row_weights(graph, masks, weights):
    """Add `pooling.row_weights`."""
    observed = graph.cast(masks, np.float64)
    weighted = graph.node("Mul", observed, weights)
    has_weight = graph.node("Greater", graph.sum(weighted), np.float64(0))
    weighted = graph.node("Where", has_weight, weighted, observed)
    total = graph.sum(weighted)
    is_empty = graph.node("Equal", total, np.float64(0))
    total = graph.node("Where", is_empty, np.float64(1), total)
    return graph.node("Div", weighted, total)


def _pool(graph, model, logs, weights, log_prior):
    """Add `pooling.pool`, but for the normalization."""
    is_geometric = model.pooling == "geometric"
    pooled, single, names = [], [], model._used_blocks()
    for number, (name, of_modality) in enumerate(zip(names, logs, strict=True)):
        weight = graph.columns(weights, slice(number, number + 1))
        used = graph.node("Greater", weight, np.float64(0))
        single.append(graph.cast(used, np.float64))
        if is_geometric:
            term = graph.node(
                "Mul", _smooth(graph, of_modality, model.floors_[name]), weight
            )
            pooled.append(graph.node("Where", used, term, np.float64(0)))
        else:
            term = graph.node("Add", of_modality, graph.node("Log", weight))
            pooled.append(graph.node("Where", used, term, np.float64(-np.inf)))
    total = pooled[0]
    for term in pooled[1:]:
        add = _log_add if not is_geometric else _add
        total = add(graph, total, term)
    n_used = graph.sum(graph.join(single))
    is_single = graph.node("Equal", n_used, np.float64(1))
    for number, of_modality in enumerate(logs):
        is_used = graph.node("Greater", single[number], np.float64(0))
        alone = graph.node("And", is_single, is_used)
        total = graph.node("Where", alone, of_modality, total)
    is_empty = graph.node("Equal", n_used, np.float64(0))
    return graph.node("Where", is_empty, log_prior[None], total)


def _add(graph, left, right):
    return graph.node("Add", left, right)


def _smooth(graph, logs, floors):
    """Add `pooling.smooth`."""
    added, zero = floors[0].T.reshape(1, -1), floors[1].T.reshape(1, -1)
    logs = _log_add(graph, logs, added)
    is_zero = graph.node("Equal", logs, np.float64(-np.inf))
    return graph.node("Where", is_zero, zero, logs)


def _log_add(graph, left, right):
    """Add the logarithm of the sum of two exponentials, which may be 0."""
    largest = graph.node("Max", left, right)
    is_zero = graph.node("Equal", largest, np.float64(-np.inf))
    shift = graph.node("Where", is_zero, np.float64(0), largest)
    left = graph.node("Exp", graph.node("Sub", left, shift))
    right = graph.node("Exp", graph.node("Sub", right, shift))
    return graph.node("Add", graph.node("Log", graph.node("Add", left, right)), shift)
