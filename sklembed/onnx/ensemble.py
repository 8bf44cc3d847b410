"""EmbeddingClassifier and EmbeddingRegressor in an ONNX graph, in double precision."""

import numpy as np
from sklearn.decomposition import PCA

from sklembed._graph import Graph
from sklembed.ensemble import members, svm
from sklembed.onnx.blocks import half_squared_distances, scale_blocks, side_by_side
from sklembed.onnx.fusion import add_kernel_fusion, to_probabilities, unscale
from sklembed.onnx.trees import add_tree_predictions
from sklembed.projection.onnx import add_projection


def add_ensemble(graph: Graph, model, X: str) -> str:
    """Add the mean of the calibrated members: probabilities, or numbers."""
    view = GraphView(graph, model._features, X)
    predictions = []
    for name, member in model.members_.items():
        outputs = _MEMBERS[type(member)](view, member)
        if name in model.slopes_:
            logits = graph.node("Mul", outputs, np.float64(model.slopes_[name]))
            logits = graph.node("Add", logits, model.intercepts_[name])
            outputs = to_probabilities(graph, logits, model.target_type_)
        predictions.append(outputs)
    total = graph.node("Sum", *predictions)
    average = graph.node("Div", total, np.float64(len(predictions)))
    return average if model.slopes_ else unscale(graph, average, model)


class GraphView:
    """The forms of a table, as `features.View`; of dtype float64."""

    def __init__(self, graph: Graph, features, X: str):
        self.graph = graph
        self.features = features
        self.X = X
        self._projected: dict | None = None

    def projected(self) -> dict[str, str]:
        """Return the projection of each block of vectors, float32; NaN where missing."""
        if self._projected is None:
            self._projected = {}
            for name, projection in self.features.projections.items():
                values = self.graph.columns(self.X, self.features.blocks[name])
                add = add_projection
                if isinstance(projection, PCA):
                    add = _add_components
                self._projected[name] = add(self.graph, projection, values)
        return self._projected

    def scale(self, names) -> str:
        """Return some blocks side by side, scaled, zero where missing."""
        features = self.features
        blocks = {name: features.blocks[name] for name in names}
        scaled = scale_blocks(self.graph, self.X, blocks, features.scaling)
        parts = [block.values for block in scaled.values()]
        return side_by_side(self.graph, self.X, parts)

    def scaled(self) -> str:
        """Return all blocks, scaled."""
        return self.scale(self.features.blocks)

    def projected_and_scaled(self) -> str:
        """Return the projections, zero where missing, and the scaled table columns."""
        graph, parts = self.graph, []
        for Z in self.projected().values():
            Z = graph.node("Where", graph.node("IsNaN", Z), np.float32(0), Z)
            parts.append(graph.cast(Z, np.float64))
        if self.features.table_blocks:
            parts.append(self.scale(self.features.table_blocks))
        return side_by_side(graph, self.X, parts)

    def projected_and_raw(self) -> str:
        """Return the projections and the table columns, float32; NaN where missing."""
        parts = list(self.projected().values())
        for name in self.features.table_blocks:
            parts.append(self.graph.columns(self.X, self.features.blocks[name]))
        return self.graph.cast(side_by_side(self.graph, self.X, parts), np.float32)


def _add_components(graph, pca, X):
    """Add principal components, which propagate the NaN of missing rows."""
    x = graph.node("Sub", graph.cast(X, np.float64), pca.mean_.astype(np.float64))
    x = graph.node("MatMul", x, pca.components_.T.astype(np.float64))
    missing = graph.missing(X)
    return graph.node("Where", missing, np.float32(np.nan), graph.cast(x, np.float32))


def _add_linear(view, member):
    graph = view.graph
    Z = getattr(view, member.form)()
    coef = np.asarray(member.coef, dtype=np.float64)
    intercept = np.asarray(member.intercept, dtype=np.float64)
    scores = graph.node("Add", graph.node("MatMul", Z, coef), intercept)
    if member.kind == "classes":
        return graph.node("LogSoftmax", scores, axis=1)
    return scores


def _add_kernel(view, member):
    return add_kernel_fusion(view.graph, member.model, view.X)


def _add_trees(view, member):
    graph, Z = view.graph, view.projected_and_raw()
    smallest = np.float64(members._SMALLEST)
    predictions = [add_tree_predictions(graph, tree, Z) for tree in member.models]
    if member.kind == "numbers":
        return graph.join(predictions)
    if member.kind == "classes":
        classes = member.models[0].classes_.astype(np.intp)
        positions = np.full(member.n_outputs, len(classes))
        positions[classes] = np.arange(len(classes))
        absent = graph.repeat(Z, np.zeros(1))
        columns = graph.columns(graph.join([predictions[0], absent]), positions)
        return graph.node("Log", graph.node("Max", columns, smallest))
    labels = []
    for tree, predicted in zip(member.models, predictions, strict=True):
        is_positive = (tree.classes_ == 1).astype(np.float64)[:, None]
        labels.append(graph.node("MatMul", predicted, is_positive))
    positive = graph.node("Clip", graph.join(labels), smallest, 1 - smallest)
    negative = graph.node("Sub", np.float64(1), positive)
    return graph.node("Log", graph.node("Div", positive, negative))


def _add_svm(view, member):
    graph, features = view.graph, view.features
    vectors = [name for name in features.blocks if name not in features.table_blocks]
    support, weights = _decision_weights(member)
    distances = []
    for names, rows in zip([vectors, features.table_blocks], member.rows, strict=True):
        part = view.scale(names)
        distances.append(half_squared_distances(graph, part, rows[support]))
    of_table = graph.node("Mul", distances[1], np.float64(member.table_weight))
    distance = graph.node("Add", distances[0], of_table)
    kernel = graph.node("Exp", graph.node("Mul", distance, np.float64(-member.gamma)))
    decisions = _add_decisions(graph, member, kernel, weights)
    logits = graph.node("Mul", decisions, _symmetric(member.slopes, member, 1))
    logits = graph.node("Add", logits, _symmetric(member.intercepts, member, -1))
    in_pairs = graph.node("Sigmoid", logits)
    in_pairs = graph.node("Where", *_pairs_without_rows(member), in_pairs)
    smallest = np.float64(svm._SMALLEST)
    in_pairs = graph.node("Clip", in_pairs, smallest, 1 - smallest)
    return graph.node("Log", _couple(graph, in_pairs, member.n_classes))


def _present(member):
    if isinstance(member.machines, int):
        return np.array([member.machines])
    return member.machines.classes_.astype(np.intp)


def _decision_weights(member):
    """Return the support vectors, ordered by class, and weights of each class with some.

    The weights of a class have shape (n_support, n_classes): of the decisions between
    the class and each other class.
    """
    machines, present = member.machines, _present(member)
    if isinstance(machines, int):  # no pair of classes has a machine
        return np.zeros(1, np.intp), {machines: np.zeros((1, member.n_classes))}
    # scikit-learn turns the sign where there are two classes.
    dual = machines.dual_coef_ * (-1 if len(present) == 2 else 1)
    ends = np.cumsum(machines.n_support_)
    weights = {}
    for position, code in enumerate(present):
        rows = slice(ends[position] - machines.n_support_[position], ends[position])
        of_class = np.zeros((machines.n_support_[position], member.n_classes))
        of_class[:, np.delete(present, position)] = dual[:, rows].T
        weights[int(code)] = of_class
    return machines.support_, weights


def _add_decisions(graph, member, kernel, weights_of_classes):
    """Return decisions of shape (n_samples, n_classes, n_classes).

    They are positive for the class of the second axis, and antisymmetric.
    """
    n_classes = member.n_classes
    sizes = np.array(list(map(len, weights_of_classes.values())))
    parts = [kernel]
    if len(sizes) > 1:
        parts = graph.node("Split", kernel, sizes, n_outputs=len(sizes), axis=1)
    by_class = dict(zip(weights_of_classes, parts, strict=True))
    sums = []
    for code in range(n_classes):
        weights = np.zeros((sizes[0], n_classes))
        part = parts[0]
        if code in by_class:
            part, weights = by_class[code], weights_of_classes[code]
        sums.append(graph.node("MatMul", part, weights))
    shape = np.array([-1, n_classes, n_classes])
    contributions = graph.node("Reshape", graph.join(sums), shape)
    transposed = graph.node("Transpose", contributions, perm=[0, 2, 1])
    decisions = graph.node("Add", contributions, transposed)
    signs = np.triu(np.ones((n_classes, n_classes)), 1)
    decisions = graph.node("Mul", decisions, signs - signs.T)
    return graph.node("Add", decisions, _decision_intercepts(member))


def _decision_intercepts(member):
    intercepts = np.zeros((member.n_classes, member.n_classes))
    machines, present = member.machines, _present(member)
    if not isinstance(machines, int):
        first, second = np.triu_indices(len(present), 1)
        values = machines.intercept_ * (-1 if len(present) == 2 else 1)
        intercepts[present[first], present[second]] = values
    return intercepts - intercepts.T


def _symmetric(of_pairs, member, sign):
    """Arrange values of pairs as a matrix; `sign` is -1 if it is antisymmetric."""
    matrix = np.zeros((member.n_classes, member.n_classes))
    matrix[np.triu_indices(member.n_classes, 1)] = of_pairs
    return matrix + sign * matrix.T


def _pairs_without_rows(member):
    """Return a mask of the pairs of which one class has no row, and the probabilities."""
    is_present = np.isin(np.arange(member.n_classes), _present(member))
    mask = is_present[:, None] != is_present[None, :]
    probabilities = np.where(is_present, member.rarest, 1 - member.rarest)
    return mask, np.broadcast_to(probabilities, mask.shape)


def _couple(graph, in_pairs, n_classes):
    """Add `svm.couple` for probabilities of shape (n_samples, n_classes, n_classes)."""
    eye = np.eye(n_classes)
    pairs = graph.node("Mul", in_pairs, 1 - eye)
    transposed = graph.node("Transpose", pairs, perm=[0, 2, 1])
    products = graph.node("Mul", pairs, transposed)
    squares = graph.node("ReduceSumSquare", pairs, np.array([1]))
    system = graph.node("Sub", graph.node("Mul", squares, eye), products)
    # The multiplier scales the solution of this positive definite system, in which it
    # is replaced by a penalty of the sum.
    system = graph.node("Add", system, np.float64(1))
    ones = graph.node("Mul", graph.columns(system, slice(0, 1)), np.float64(0))
    ones = graph.node("Add", ones, np.float64(1))
    ones = graph.node("Transpose", ones, perm=[0, 2, 1])
    system = graph.node("Concat", system, ones, axis=2)

    def eliminate(body, step, state):
        """Solve for one class (Gauss-Jordan; no pivots, the system is definite)."""
        row = body.node("Gather", state, step, axis=1)  # (n_samples, n_classes + 1)
        pivot = body.node("Gather", row, body.node("Unsqueeze", step, first), axis=1)
        row = body.node("Unsqueeze", body.node("Div", row, pivot), second)
        column = body.node("Gather", state, step, axis=2)  # (n_samples, n_classes)
        column = body.node("Sub", column, body.node("Gather", identity, step, axis=0))
        column = body.node("Unsqueeze", column, third)
        return body.node("Sub", state, body.node("Mul", column, row))

    identity = graph.constant(eye)
    first = graph.constant(np.array([0]))
    second = graph.constant(np.array([1]))
    third = graph.constant(np.array([2]))
    shape = ["n_samples", n_classes, n_classes + 1]
    solved = graph.loop(n_classes, eliminate, system, shape)
    solution = graph.node("Gather", solved, np.int64(n_classes), axis=2)
    solution = graph.node("Div", solution, graph.sum(solution))
    solution = graph.node("Max", solution, np.float64(svm._SMALLEST))
    return graph.node("Div", solution, graph.sum(solution))


_MEMBERS = {
    members.Linear: _add_linear,
    members.Kernel: _add_kernel,
    members.Trees: _add_trees,
    svm.SupportVectorMachine: _add_svm,
}
