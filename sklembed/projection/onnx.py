"""A fitted projection as part of an ONNX graph."""

from pathlib import Path

import numpy as np

from sklembed._graph import Graph


def to_onnx(projector, path) -> None:
    """Write the `transform` of a projector as an ONNX model with the output ``Z``.

    Raises
    ------
    ImportError
        If onnx is not installed.
    """
    graph = Graph()
    Z = add_projection(graph, projector, "X")
    outputs = {"Z": (Z, np.float32, [projector._n_features_out])}
    content = graph.to_bytes(projector.n_features_in_, outputs, {})
    Path(path).write_bytes(content)


def add_projection(graph: Graph, projector, X: str) -> str:
    """Add the `transform` of a projector; return its output, of dtype float32."""
    parts = []
    if projector.gate_ != "passthrough":
        parts.append(_add_network(graph, projector, X))
    if projector.gate_ != "projection":
        components = projector.components_
        centred = graph.node("Sub", X, components["mean"])
        parts.append(graph.node("MatMul", centred, components["axes"].T))
    # Runtimes differ in the Relu and the Max of NaN, so missing rows are set explicitly.
    return graph.node("Where", graph.missing(X), np.float32(np.nan), graph.join(parts))


def _add_network(graph, projector, X):
    weights = projector.weights_
    x = graph.node("Sub", X, weights["mean"])
    x = graph.node("Div", x, weights["scale"])
    for layer in range(sum(name.endswith(".weight") for name in weights)):
        if layer:
            x = graph.node("Relu", x)
        weight, bias = (
            weights[f"layers.{layer}.weight"],
            weights[f"layers.{layer}.bias"],
        )
        x = graph.node("Gemm", x, weight, bias, transB=1)
    if projector.similarity == "cosine":
        norm = graph.sum(x, "ReduceL2")
        x = graph.node("Div", x, graph.node("Max", norm, np.finfo(np.float32).tiny))
    return x
