"""An ONNX graph, written node by node."""

from itertools import count

import numpy as np

_DOMAIN_OF_TREES = "ai.onnx.ml"
_OPSETS, _IR_VERSION = {"": 18, _DOMAIN_OF_TREES: 3}, 9


class Graph:
    """An ONNX graph with one input, ``X``, float32 of shape (n_samples, n_features).

    Methods take and return the names of tensors. Numpy arrays and scalars among the
    inputs of a node become constants.

    Parameters
    ----------
    body_of : Graph or None, default=None
        The graph that contains this one as the body of a loop. It shares its names.

    Raises
    ------
    ImportError
        If onnx is not installed.
    """

    opsets = _OPSETS

    def __init__(self, body_of: "Graph | None" = None):
        try:
            import onnx.compose
        except ImportError as error:
            raise missing_package("onnx") from error
        self._onnx = onnx
        self._numbers = count() if body_of is None else body_of._numbers
        self._nodes: list = []
        self._constants: list = []

    def constant(self, value) -> str:
        """Add an array or a scalar; texts become strings."""
        name = f"constant_{next(self._numbers)}"
        value = np.asarray(value)
        if value.dtype.kind == "U":
            value = value.astype(object)
        value = np.ascontiguousarray(value).reshape(value.shape)
        self._constants.append(self._onnx.numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, *inputs, n_outputs: int = 1, **attributes):
        """Add a node; return the name of its output, or a list of several."""
        number = next(self._numbers)
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        outputs = [f"{kind}_{number}_{i}" for i in range(n_outputs)]
        domain = _DOMAIN_OF_TREES if kind.startswith("Tree") else ""
        self._nodes.append(
            self._onnx.helper.make_node(
                kind, names, outputs, domain=domain, **attributes
            )
        )
        return outputs[0] if n_outputs == 1 else outputs

    def cast(self, x, dtype) -> str:
        """Convert a tensor to a type of numpy."""
        return self.node("Cast", x, to=self._type(dtype))

    def columns(self, x, columns) -> str:
        """Select columns by a slice or by positions."""
        if not isinstance(columns, slice):
            return self.node("Gather", x, np.asarray(columns, dtype=np.int64), axis=1)
        ends = np.array([[columns.start], [columns.stop]], dtype=np.int64)
        return self.node("Slice", x, *ends, np.array([1]))

    def join(self, parts) -> str:
        """Concatenate columns."""
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=1)

    def sum(self, x, kind: str = "ReduceSum") -> str:
        """Reduce rows to one column, by their sum or by another reduction."""
        return self.node(kind, x, np.array([1]))

    def missing(self, x) -> str:
        """Return a mask (n_samples, 1) of the rows with NaN."""
        # Values times 0 cannot overflow.
        zeros = self.node("Mul", x, np.float32(0))
        return self.node("IsNaN", self.sum(zeros))

    def repeat(self, x, row) -> str:
        """Return a row for each row of x, which has float32 columns."""
        first = self.node("IsNaN", self.columns(x, slice(0, 1)))
        zeros = self.node("Mul", self.cast(first, row.dtype), row.dtype.type(0))
        return self.node("Add", zeros, row.reshape(1, -1))

    def inline(self, model, x: str) -> list[str]:
        """Add the nodes of a model with one input; return the names of its outputs."""
        prefix = f"part_{next(self._numbers)}_"
        part = self._onnx.compose.add_prefix(model, prefix).graph
        names = self._onnx.helper.make_node("Identity", [x], [part.input[0].name])
        self._nodes += [names, *part.node]
        self._constants += part.initializer
        return [output.name for output in part.output]

    def loop(self, n_times: int, body, start: str, shape: list) -> str:
        """Apply a body that takes a graph, the iteration and a float64 tensor."""
        helper = self._onnx.helper
        inner = Graph(body_of=self)
        number = next(self._numbers)
        step, go, state = f"step_{number}", f"go_{number}", f"state_{number}"
        result = inner.node("Identity", body(inner, step, state))
        go_out = inner.node("Identity", go)
        boolean, double = self._type(bool), self._type(np.float64)
        graph = helper.make_graph(
            inner._nodes,
            f"body_{number}",
            [
                helper.make_tensor_value_info(step, self._type(np.int64), []),
                helper.make_tensor_value_info(go, boolean, []),
                helper.make_tensor_value_info(state, double, shape),
            ],
            [
                helper.make_tensor_value_info(go_out, boolean, []),
                helper.make_tensor_value_info(result, double, shape),
            ],
            inner._constants,
        )
        return self.node("Loop", np.int64(n_times), np.bool_(True), start, body=graph)

    def to_bytes(self, n_features: int, outputs: dict, metadata: dict) -> bytes:
        """Return the serialized model.

        Parameters
        ----------
        n_features : int
            Number of columns of ``X``.
        outputs : dict of str to (tensor, dtype, shape)
            The outputs by name; the first axis is called "n_samples".
        metadata : dict of str to str
            The metadata of the model.

        Returns
        -------
        content : bytes
            The content of an ONNX file.
        """
        helper = self._onnx.helper
        tables = []
        for name, (tensor, dtype, shape) in outputs.items():
            identity = helper.make_node("Identity", [tensor], [name])
            self._nodes.append(identity)
            shape = ["n_samples", *shape]
            tables.append(helper.make_tensor_value_info(name, self._type(dtype), shape))
        shape = ["n_samples", n_features]
        X = helper.make_tensor_value_info("X", self._type(np.float32), shape)
        graph = helper.make_graph(self._nodes, "sklembed", [X], tables, self._constants)
        model = helper.make_model(
            graph,
            opset_imports=list(
                map(helper.make_opsetid, self.opsets, self.opsets.values())
            ),
            ir_version=_IR_VERSION,
            producer_name="sklembed",
        )
        helper.set_model_props(model, metadata)
        self._onnx.checker.check_model(model)
        return model.SerializeToString()

    def _type(self, dtype) -> int:
        if np.dtype(dtype).kind == "U":
            return self._onnx.TensorProto.STRING
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def missing_package(name: str) -> ImportError:
    """Return the error that names the extra with a package."""
    return ImportError(
        f"to_onnx requires the package {name}: pip install 'sklembed[onnx]'."
    )
