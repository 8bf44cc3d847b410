"""A fitted projection as an ONNX graph."""

import numpy as np


def to_onnx(projector, path) -> None:
    """Write what a projector's `transform` computes as an ONNX graph.

    Raises
    ------
    ImportError
        If onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ImportError(
            "to_onnx needs the package onnx: pip install 'sklembed[onnx]'."
        ) from error

    nodes, constants = [], {}

    def constant(name, value):
        constants[name] = np.ascontiguousarray(value)
        return name

    def node(kind, inputs, **attributes):
        name = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    weights, parts = projector.weights_, []
    if projector.gate_ != "passthrough":
        x = node("Sub", ["X", constant("mean", weights["mean"])])
        x = node("Div", [x, constant("scale", weights["scale"])])
        for layer in range(sum(name.endswith(".weight") for name in weights)):
            names = [f"layers.{layer}.weight", f"layers.{layer}.bias"]
            x = node("Relu", [x]) if layer else x
            x = node("Gemm", [x, *(constant(n, weights[n]) for n in names)], transB=1)
        if projector.similarity == "cosine":
            axes = constant("columns", np.array([1], dtype=np.int64))
            norm = node("ReduceL2", [x, axes])
            tiny = constant("tiny", np.finfo(np.float32).tiny)
            x = node("Div", [x, node("Max", [norm, tiny])])
        parts.append(x)
    if projector.gate_ != "projection":
        x = node("Sub", ["X", constant("input.mean", projector.components_["mean"])])
        parts.append(
            node("MatMul", [x, constant("input.axes", projector.components_["axes"].T)])
        )
    joined = node("Concat", parts, axis=1) if len(parts) > 1 else parts[0]
    # Runtimes differ in what Relu and Max make of NaN: a missing row is marked by its own input.
    nothing = node("Mul", ["X", constant("zero", np.float32(0))])
    missing = node(
        "ReduceSum", [nothing, constant("axis", np.array([1], dtype=np.int64))]
    )
    nodes.append(helper.make_node("Add", [joined, missing], ["Z"]))
    graph = helper.make_graph(
        nodes,
        type(projector).__name__,
        [
            helper.make_tensor_value_info(
                "X", TensorProto.FLOAT, ["n_samples", projector.n_features_in_]
            )
        ],
        [
            helper.make_tensor_value_info(
                "Z", TensorProto.FLOAT, ["n_samples", projector._n_features_out]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
        producer_name="sklembed",
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
