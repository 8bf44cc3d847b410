"""A support vector machine with probabilities: one machine for each pair of classes.

Platt's method turns the decision of each machine into a probability. The second method
of Wu, Lin and Weng turns those into probabilities of classes: Probability Estimates for
Multi-class Classification by Pairwise Coupling, JMLR 5 (2004), section 4.2.
"""

import numpy as np
from scipy.special import expit
from sklearn.svm import SVC
from sklearn.utils import gen_batches

from sklembed._grid import descend
from sklembed.ensemble.features import Problem, View
from sklembed.fusion.calibration import fit_sigmoids
from sklembed.fusion.scaling import half_squared_distances

_C = 3.0  # inverse penalty
_GAMMAS = np.array([0.25, 0.5, 1.0, 2.0])  # inverse widths of the kernel
_TABLE_WEIGHTS = np.array([0.1, 0.3, 1.0, 3.0])  # of distances between table columns
_START_GAMMA, _START_WEIGHT = 1, 2  # positions
_BATCH_PAIRS = 4_000_000  # pairs of classes of the rows of a batch
_SMALLEST = 1e-6  # probability in a pair
_SEARCH_ROWS = 1500  # the width hardly depends on the number of rows


class SupportVectorMachine:
    """A support vector machine in the product of the kernels of all blocks.

    Decisions have shape (n_samples, n_pairs). They are positive for the first class of
    a pair, and infinite if the machine has no rows of the other.
    """

    def fit(self, view: View, problem: Problem) -> list[np.ndarray]:
        """Choose the kernel on the folds and fit; return outputs out of fold."""
        self.n_classes = problem.n_outputs
        # Probability in a pair of a class of which a fold has no row.
        self.rarest = 1 / (np.count_nonzero(problem.weight > 0) + 2)
        vectors, table = _scaled_parts(view)
        of_vectors = half_squared_distances(vectors, vectors)
        of_table = half_squared_distances(table, table)
        search = problem.thin(_SEARCH_ROWS)

        is_mixed = 0 < len(problem.table_blocks) < len(problem.blocks)
        weights, start = np.ones(1), (_START_GAMMA, 0)
        if is_mixed:
            weights, start = _TABLE_WEIGHTS, (_START_GAMMA, _START_WEIGHT)

        def kernel_at(position):
            gamma, weight = _GAMMAS[position[0]], weights[position[1]]
            return np.exp(-gamma * (of_vectors + weight * of_table))

        sizes = [len(_GAMMAS), len(weights)]
        position = descend(lambda p: self._log_loss(kernel_at(p), search), sizes, start)
        kernel = kernel_at(position)
        self.gamma = float(_GAMMAS[position[0]])
        self.table_weight = float(weights[position[1]])
        decisions = [_hold_out(kernel, problem, f) for f in problem.all_folds]
        self._fit_sigmoids(decisions[0], problem)
        used = np.flatnonzero(problem.weight > 0)
        self.rows = [vectors[used], table[used]]
        self.machines = _fit_machines(kernel, problem, used)
        return [self._outputs(of_folds) for of_folds in decisions]

    def outputs(self, view: View) -> np.ndarray:
        """Return the outputs for the rows of a view."""
        of_vectors, of_table = map(
            half_squared_distances, _scaled_parts(view), self.rows
        )
        kernel = np.exp(-self.gamma * (of_vectors + self.table_weight * of_table))
        outputs = np.empty((len(kernel), self.n_classes))
        for rows in _batches(kernel, self.n_classes):
            decisions = _decide(self.machines, kernel[rows], self.n_classes)
            outputs[rows] = self._outputs(decisions)
        return outputs

    def _log_loss(self, kernel, problem):
        """Return the log loss of calibrated outputs out of fold."""
        decisions = _hold_out(kernel, problem, problem.folds)
        self._fit_sigmoids(decisions, problem)
        return problem.log_loss(self._outputs(decisions))

    def _fit_sigmoids(self, decisions, problem):
        """Fit the sigmoids of all pairs on the rows of both classes."""
        first, second = np.triu_indices(self.n_classes, 1)
        is_first = problem.y[:, None] == first
        in_pair = is_first | (problem.y[:, None] == second)
        row, pair = np.nonzero(np.isfinite(decisions) & in_pair)
        self.slopes, self.intercepts = fit_sigmoids(
            decisions[row, pair],
            is_first[row, pair],
            problem.weight[row],
            pair,
            len(first),
        )

    def _outputs(self, decisions):
        """Return log-probabilities of classes."""
        outputs = np.empty((len(decisions), self.n_classes))
        for rows in _batches(decisions, self.n_classes):
            known = np.isfinite(decisions[rows])
            logits = self.slopes * np.where(known, decisions[rows], 0) + self.intercepts
            in_pairs = expit(logits)
            of_absent = np.clip(decisions[rows], self.rarest, 1 - self.rarest)
            in_pairs = np.where(known, in_pairs, of_absent)
            in_pairs = np.clip(in_pairs, _SMALLEST, 1 - _SMALLEST)
            outputs[rows] = np.log(couple(in_pairs, self.n_classes))
        return outputs


def _batches(array, n_classes):
    """Yield slices of rows whose pairs of classes take bounded memory."""
    n_rows = max(1, _BATCH_PAIRS // n_classes**2)
    return gen_batches(len(array), n_rows)


def couple(in_pairs, n_classes):
    """Return the probabilities of classes that agree best with those in pairs.

    Parameters
    ----------
    in_pairs : ndarray of shape (n_samples, n_pairs)
        Probability of the first class of each pair, given that one of both is right.
    n_classes : int
        Number of classes.

    Returns
    -------
    probabilities : ndarray of shape (n_samples, n_classes)
        Positive; rows sum to 1.
    """
    first, second = np.triu_indices(n_classes, 1)
    pairs = np.zeros((len(in_pairs), n_classes, n_classes))
    pairs[:, first, second] = in_pairs
    pairs[:, second, first] = 1 - in_pairs
    # The minimum of a sum of squares, with a multiplier for the sum of probabilities.
    system = np.ones((len(in_pairs), n_classes + 1, n_classes + 1))
    system[:, :-1, :-1] = -pairs * pairs.transpose(0, 2, 1)
    diagonal = np.arange(n_classes)
    system[:, diagonal, diagonal] = np.square(pairs).sum(axis=1)
    system[:, -1, -1] = 0
    right = np.zeros((n_classes + 1, 1))
    right[-1] = 1
    solution = np.linalg.solve(system, right)[:, :-1, 0]
    solution = np.maximum(solution, _SMALLEST)
    return solution / solution.sum(axis=1, keepdims=True)


def _scaled_parts(view):
    """Return the scaled vectors and the scaled table columns."""
    features = view.features
    vectors = [name for name in features.blocks if name not in features.table_blocks]
    return [features.scale(view.X, part) for part in (vectors, features.table_blocks)]


def _hold_out(kernel, problem, folds):
    return problem.hold_out(folds, _decide_fold, kernel, problem)


def _decide_fold(kernel, problem, train, held_out):
    machines = _fit_machines(kernel, problem, train)
    return _decide(machines, kernel[np.ix_(held_out, train)], problem.n_outputs)


def _fit_machines(kernel, problem, rows):
    """Fit a machine for each pair of classes; of a single class, return its code."""
    y = problem.y[rows]
    if (y == y[0]).all():
        return int(y[0])
    machines = SVC(
        C=_C, kernel="precomputed", decision_function_shape="ovo", random_state=0
    )  # it draws a seed, which it does not use
    return machines.fit(kernel[np.ix_(rows, rows)], y, problem.weight[rows])


def _decide(machines, kernel, n_classes):
    """Return the decisions of all pairs, given the kernel with the training rows."""
    if isinstance(machines, int):
        present, decisions = np.array([machines]), np.empty((len(kernel), 0))
    else:
        present = machines.classes_
        decisions = machines.decision_function(kernel)
        if len(present) == 2:
            decisions = -decisions[:, None]
    is_present = np.isin(np.arange(n_classes), present)
    first, second = np.triu_indices(n_classes, 1)
    of_absent = np.where(is_present[first], np.inf, -np.inf)
    of_absent[~is_present[first] & ~is_present[second]] = 0
    complete = np.tile(of_absent, (len(kernel), 1))
    complete[:, is_present[first] & is_present[second]] = decisions
    return complete
