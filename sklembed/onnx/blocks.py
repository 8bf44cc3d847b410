"""Scaled blocks and their kernels in an ONNX graph, as `sklembed.fusion.scaling`."""

from typing import NamedTuple

import numpy as np

from sklembed._graph import Graph
from sklembed.fusion import scaling as numpy_scaling

_LARGEST = numpy_scaling._LARGEST_SCORE


class GraphBlock(NamedTuple):
    """A scaled block and its observed rows."""

    values: str  # (n_samples, n_columns), float64, zero where missing
    observed: str | None  # (n_samples, 1); None if the block is observed in all rows


def observed_in_block(graph: Graph, X: str, columns) -> str:
    """Return a mask (n_samples, 1) of the rows that have one modality."""
    return graph.node("Not", graph.missing(graph.columns(X, columns)))


def scale_blocks(graph: Graph, X: str, blocks, scaling) -> dict[str, GraphBlock]:
    """Add `scaling.scale_blocks`."""
    scaled = {}
    for name, columns in blocks.items():
        values = graph.columns(X, columns)
        if "median" in scaling[name]:
            scaled[name] = GraphBlock(
                _scale_columns(graph, values, scaling[name]), None
            )
        else:
            observed = observed_in_block(graph, X, columns)
            mean = scaling[name]["mean"]
            values = _scale_vectors(graph, values, observed, mean)
            scaled[name] = GraphBlock(values, observed)
    for name in blocks:
        main = numpy_scaling._find_main_block(name, blocks)
        if main is not None and "mean" in scaling[main].keys() & scaling[name].keys():
            scaled[main] = _append(graph, scaled[main], scaled.pop(name))
    return scaled


def side_by_side(graph: Graph, X: str, parts) -> str:
    """Concatenate columns; without parts, return a constant column."""
    if not parts:
        return graph.repeat(X, np.zeros(1))
    return graph.join(parts)


def half_squared_distances(graph: Graph, left: str, right: np.ndarray) -> str:
    """Add half the squared distances of rows to constant rows of dtype float32."""
    norms_right = np.einsum("ij,ij->i", right, right, dtype=np.float64) / 2
    norms_left = graph.node("Mul", graph.sum(left, "ReduceSumSquare"), np.float64(0.5))
    right = graph.cast(right.T, np.float64)  # the file has single precision
    norms = graph.node("Add", norms_left, norms_right[None])
    distances = graph.node("Sub", norms, graph.node("MatMul", left, right))
    return graph.node("Max", distances, np.float64(0))


def _rounded(graph, x):
    """Return float64 values that are rounded to single precision, as in training."""
    return graph.cast(graph.cast(x, np.float32), np.float64)


def _append(graph, main, lexical):
    weight = numpy_scaling._LEXICAL_NORM
    lexical_values = graph.node("Mul", lexical.values, np.float64(weight))
    values = graph.join([main.values, lexical_values])
    values = graph.node("Div", values, np.float64(np.hypot(1, weight)))
    if main.observed is None or lexical.observed is None:
        return GraphBlock(values, None)
    return GraphBlock(values, graph.node("Or", main.observed, lexical.observed))


def _scale_vectors(graph, values, observed, mean):
    centred = graph.node("Sub", values, mean)
    centred = graph.node("Where", observed, centred, np.float32(0))
    centred = graph.cast(centred, np.float64)
    norm = graph.sum(centred, "ReduceL2")
    # What rounding leaves of a vector equal to the mean has no direction.
    rounding = numpy_scaling._ROUNDING * np.linalg.norm(mean.astype(np.float64))
    has_direction = graph.node("Greater", norm, np.float64(rounding))
    norm = graph.node("Where", has_direction, norm, np.float64(np.inf))
    return _rounded(graph, graph.node("Div", centred, norm))


def _scale_columns(graph, values, fitted):
    missing = graph.node("IsNaN", values)
    values = graph.cast(values, np.float64)
    values = graph.node("Where", missing, fitted["median"][None], values)
    values = graph.node("Sub", values, fitted["median"])
    squashed = _clip(
        graph, _arcsinh(graph, graph.node("Div", values, fitted["spread"]))
    )
    scores = graph.node("Sub", squashed, fitted["mean"])
    columns = [_clip(graph, graph.node("Div", scores, fitted["scale"]))]
    indicated = np.flatnonzero(fitted["indicated"])
    if len(indicated):
        columns.append(graph.cast(graph.columns(missing, indicated), np.float64))
    n_columns = len(fitted["median"]) + len(indicated)
    columns = graph.node("Div", graph.join(columns), np.float64(np.sqrt(n_columns)))
    return _rounded(graph, columns)


def _clip(graph, x):
    return graph.node("Clip", x, np.float64(-_LARGEST), np.float64(_LARGEST))


def _arcsinh(graph, x):
    """Add the inverse hyperbolic sine, which runtimes lack in double precision."""
    size = graph.node("Abs", x)
    root = graph.node("Sqrt", graph.node("Add", graph.node("Mul", x, x), np.float64(1)))
    log = graph.node("Log", graph.node("Add", size, root))
    return graph.node("Mul", graph.node("Sign", x), log)
