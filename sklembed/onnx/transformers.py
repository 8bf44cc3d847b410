"""The aligners, and the imputer of scikit-learn, in an ONNX graph."""

import numpy as np

from sklembed._graph import Graph
from sklembed.onnx.blocks import observed_in_block


def add_imputer(graph: Graph, imputer, X: str) -> str:
    """Add a SimpleImputer, with its indicator."""
    if not (
        isinstance(imputer.missing_values, float) and np.isnan(imputer.missing_values)
    ):
        raise TypeError(
            f"has missing_values={imputer.missing_values!r}. Only NaN is supported."
        )
    missing = graph.node("IsNaN", X)
    statistics = imputer.statistics_.astype(np.float64)
    used = np.flatnonzero(~np.isnan(statistics))
    filled = np.nan_to_num(statistics).astype(np.float32)
    parts = [graph.columns(graph.node("Where", missing, filled[None], X), used)]
    if imputer.indicator_ is not None:
        indicated = graph.columns(missing, imputer.indicator_.features_)
        parts.append(graph.cast(indicated, np.float32))
    return graph.join(parts)


def add_gap_aligner(graph: Graph, aligner, X: str) -> str:
    """Add a ModalityGapAligner, of dtype float32."""
    parts, positions = [], []
    for name, columns in aligner.blocks_.items():
        rows = _unit_rows(graph, graph.cast(graph.columns(X, columns), np.float64))
        if aligner.width_ is not None:
            width = np.arange(aligner.n_features_in_)[columns].size
            rows = graph.node("MatMul", rows, _resampling(width, aligner.width_))
        target = rows
        if aligner.maps_:
            target = graph.node("MatMul", rows, aligner.maps_[name].astype(np.float64))
        target = graph.node("Add", target, aligner.offsets_[name].astype(np.float64))
        step = graph.node("Sub", target, rows)
        step = graph.node("Mul", step, np.float64(aligner.shift))
        rows = _unit_rows(graph, graph.node("Add", rows, step))
        parts.append(_or_missing(graph, X, columns, rows))
        positions.append(np.arange(aligner.n_features_in_)[columns])
    joined = graph.join(parts)
    if aligner.width_ is not None:
        return joined
    return graph.columns(joined, np.argsort(np.concatenate(positions)))


def add_canonical_aligner(graph: Graph, aligner, X: str) -> str:
    """Add a CanonicalAligner, of dtype float32."""
    parts = []
    for name, columns in aligner.blocks_.items():
        rows = graph.cast(graph.columns(X, columns), np.float64)
        rows = graph.node("Sub", rows, aligner.means_[name].astype(np.float64))
        rows = graph.node("MatMul", rows, aligner.maps_[name].astype(np.float64))
        rows = _unit_rows(graph, rows)
        if aligner.weighted:
            rows = graph.node("Mul", rows, np.sqrt(aligner.correlations_))
        parts.append(_or_missing(graph, X, columns, rows))
    return graph.join(parts)


def _unit_rows(graph, rows):
    norm = graph.sum(rows, "ReduceL2")
    is_zero = graph.node("Equal", norm, np.float64(0))
    norm = graph.node("Where", is_zero, np.float64(1), norm)
    return graph.node("Div", rows, norm)


def _or_missing(graph, X, columns, rows):
    observed = observed_in_block(graph, X, columns)
    return graph.node(
        "Where", observed, graph.cast(rows, np.float32), np.float32(np.nan)
    )


def _resampling(width, width_out):
    """Return the matrix of the linear interpolation between coordinates."""
    positions = np.linspace(0, width - 1, width_out)
    matrix = np.zeros((width, width_out))
    for column, position in enumerate(positions):
        left = int(position)
        matrix[left, column] += 1 - (position - left)
        matrix[min(left + 1, width - 1), column] += position - left
    return matrix
