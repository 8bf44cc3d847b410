"""A fitted projection as an ONNX graph."""

import numpy as np


def to_onnx(projector, path) -> None:
    """Write the `transform` of a projector as an ONNX graph.

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
            "to_onnx requires the package onnx: pip install 'sklembed[onnx]'."
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
            if layer:
                x = node("Relu", [x])
            weight, bias = f"layers.{layer}.weight", f"layers.{layer}.bias"
            constant(weight, weights[weight])
            constant(bias, weights[bias])
            x = node("Gemm", [x, weight, bias], transB=1)
        if projector.similarity == "cosine":
            axes = constant("columns", np.array([1], dtype=np.int64))
            norm = node("ReduceL2", [x, axes])
            tiny = constant("tiny", np.finfo(np.float32).tiny)
            x = node("Div", [x, node("Max", [norm, tiny])])
        parts.append(x)
    if projector.gate_ != "projection":
        components = projector.components_
        x = node("Sub", ["X", constant("input.mean", components["mean"])])
        x = node("MatMul", [x, constant("input.axes", components["axes"].T)])
        parts.append(x)
    joined = parts[0]
    if len(parts) > 1:
        joined = node("Concat", parts, axis=1)
    # Runtimes differ in the Relu and the Max of NaN, so X * 0 marks missing rows explicitly.
    zeros = node("Mul", ["X", constant("zero", np.float32(0))])
    axis = constant("axis", np.array([1], dtype=np.int64))
    missing = node("ReduceSum", [zeros, axis])
    nodes.append(helper.make_node("Add", [joined, missing], ["Z"]))

    def table(name, n_columns):
        shape = ["n_samples", n_columns]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    tensors = []
    for name, value in constants.items():
        tensors.append(numpy_helper.from_array(value, name))
    graph = helper.make_graph(
        nodes,
        type(projector).__name__,
        [table("X", projector.n_features_in_)],
        [table("Z", projector._n_features_out)],
        tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
        producer_name="sklembed",
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
