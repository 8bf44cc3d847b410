"""KernelFusionClassifier and KernelFusionRegressor: ridge with a kernel per block."""

from numbers import Integral, Real

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lapack, solve_triangular
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions

from sklembed._display import DocLinkMixin
from sklembed._grid import descend
from sklembed._persistence import Saved
from sklembed._validation import in_pieces
from sklembed.fusion._base import (
    check_labelled_table,
    check_rows,
    check_table,
    check_weights,
    decided,
    encode_groups,
    find_prior,
    observed_modalities,
    probabilities,
    scale_targets,
    to_log_prior,
    weight_classes,
)
from sklembed.fusion.calibration import calibrate, fit_calibration
from sklembed.fusion.scaling import (
    check_vectors_complete,
    find_table_blocks,
    fit_scaling,
    half_squared_distances,
    scale_blocks,
)

_SEARCH_ROWS = 1500  # widths and penalty hardly depend on the number of rows
_CHUNK_ROWS = 2048  # rows of the kernel matrix that are computed at a time
_N_FOLDS = 5  # at most, for predictions out of fold if rows are not all landmarks
_JITTER = 1e-6  # added to the diagonal of the kernel matrix of the landmarks
# Values that leave-one-out chooses from; the search moves to neighbours.
_GRID = {
    "alpha": 10.0 ** np.arange(-3, 2.5, 0.5),
    "gamma": 2.0 ** np.arange(-3, 5),
    "table_gamma": 4.0 ** np.arange(-3, 5),
    "table_share": np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95]),
}
# Positions in the grid.
_START = {"alpha": 3, "gamma": 4, "table_gamma": 3, "table_share": 3}


class _KernelFusion(DocLinkMixin, Saved, BaseEstimator):
    """Kernel ridge with a kernel per block; a subclass reads the target."""

    _parameter_constraints: dict = {
        "blocks": [dict, None],
        "table_blocks": [StrOptions({"auto"}), list],
        "gamma": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "n_landmarks": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
    }

    def _fit_ridge(self, X, targets, weight, groups):
        """Fit a ridge regression in the kernel; return predictions out of fold.

        Parameters
        ----------
        X : ndarray of shape (n_samples, n_features)
            The validated table.
        targets : ndarray of shape (n_samples, n_outputs)
            Numeric targets.
        weight : ndarray of shape (n_samples,)
            Weights of the rows; rows of weight 0 are not used.
        groups : ndarray of int of shape (n_samples,) or None
            Group of each row.

        Returns
        -------
        predicted : list of ndarray of shape (n_samples, n_outputs)
            Predictions for each row by a fit without it. If there are groups, also
            predictions by a fit without its group.
        """
        self.table_blocks_ = find_table_blocks(self.table_blocks, X, self.blocks_)
        check_vectors_complete(X, self.blocks_, self.table_blocks_)
        self._scaling = fit_scaling(X, self.blocks_, self.table_blocks_, weight)
        self.intercept_ = np.average(targets, axis=0, weights=weight)
        rows = np.flatnonzero(weight > 0)
        data = _Rows(
            X[rows],
            targets[rows] - self.intercept_,
            weight[rows],
            None if groups is None else groups[rows],
        )
        random_state = check_random_state(self.random_state)
        order = random_state.permutation(len(rows))
        self._choose(data.take(np.sort(order[:_SEARCH_ROWS])))
        if len(rows) <= self.n_landmarks:
            out_of_fold = self._fit_dual(data)
        else:
            landmarks = np.sort(order[: self.n_landmarks])
            seed = random_state.randint(np.iinfo(np.int32).max)
            out_of_fold = self._fit_landmarks(data, landmarks, seed)
        return [self._complete(X, rows, values) for values in out_of_fold]

    def _complete(self, X, rows, out_of_fold):
        """Add the intercept to predictions out of fold, and predict the other rows."""
        predicted = np.empty((len(X), out_of_fold.shape[1]))
        predicted[rows] = out_of_fold + self.intercept_
        unused = np.delete(np.arange(len(X)), rows)
        if len(unused):
            predicted[unused] = self._predict_ridge(X[unused])
        return predicted

    def _choose(self, data):
        """Set the widths, the penalty and the table's share by leave-one-out."""
        blocks = self._scale(data.X)
        distances = {
            name: half_squared_distances(block.values, block.values)
            for name, block in blocks.items()
        }
        groups = _rows_by_group(data.groups)
        grid = self._grid(data.weight.mean())

        def error(position):
            settings = _at(grid, position)
            K, _ = self._mean_kernel(blocks, blocks, data.weight, settings, distances)
            _, predicted = _solve_dual(K, data, settings["alpha"], groups)
            return self._loss(predicted[-1], data)

        start = []
        for name, values in grid.items():
            start.append(_START[name] if len(values) > 1 else 0)
        sizes = [len(values) for values in grid.values()]
        settings = _at(grid, descend(error, sizes, tuple(start)))
        self.gamma_ = float(settings["gamma"])
        self.table_gamma_ = float(settings["table_gamma"])
        self.alpha_ = float(settings["alpha"])
        self.table_share_ = float(settings["table_share"])

    def _grid(self, mean_weight):
        """Return the candidates of each setting; one if it is not to be chosen."""
        # A multiple of all weights must not change the fit.
        grid = _GRID | {"alpha": _GRID["alpha"] * mean_weight}
        for name in ("gamma", "alpha"):
            if getattr(self, name) != "auto":
                grid[name] = np.array([getattr(self, name)])
        if self.gamma != "auto":
            grid["table_gamma"] = grid["gamma"]
        if len(self.table_blocks_) == len(self.blocks_):
            grid |= {"gamma": np.ones(1), "table_share": np.ones(1)}
        elif not self.table_blocks_:
            grid |= {"table_gamma": np.ones(1), "table_share": np.zeros(1)}
        return grid

    def _mean_kernel(self, left, right, weight, settings, distances=None, means=None):
        """Return the weighted mean of the kernels of all blocks.

        A missing vector is replaced by the mean of the observed ones in the feature
        space of the kernel. The deviations of the observed blocks from their means are
        enlarged, so that the variance of the row does not shrink. Rows without any
        observed block have a kernel of zero.

        Parameters
        ----------
        left, right : dict of str to ScaledBlock
            The rows and the columns of the kernel matrix.
        weight : ndarray of shape (n_right,)
            Weights of `right` in the means.
        settings : dict of str to float
            Widths of the kernels, and the share of the table columns.
        distances : dict of str to ndarray of shape (n_left, n_right), default=None
            Half the squared distances in each block.
        means : dict of str to ndarray of shape (n_right,), default=None
            The kernel between the mean of each block and `right`. If None, `left` is
            `right`.

        Returns
        -------
        K : ndarray of shape (n_left, n_right)
            The kernel matrix.
        means : dict of str to ndarray of shape (n_right,)
            As the parameter.
        """
        shares = self._shares(left, settings["table_share"])
        left_factors = deviation_factors(left, shares)
        right_factors = deviation_factors(right, shares)
        K, means_of_blocks = np.zeros(1), {}
        for name in left:
            is_table = name in self.table_blocks_
            gamma = settings["table_gamma" if is_table else "gamma"]
            if distances is None:
                d = half_squared_distances(left[name].values, right[name].values)
            else:
                d = distances[name]
            kernel = np.exp(-gamma * d)
            kernel *= shares[name]
            of_mean = mean_weights(right[name], weight)
            _rescale_deviations(kernel.T, right_factors[name], kernel @ of_mean)
            mean = of_mean @ kernel if means is None else means[name]
            _rescale_deviations(kernel, left_factors[name], mean)
            K, means_of_blocks[name] = K + kernel, mean
        K[is_empty(left)] = 0
        K[:, is_empty(right)] = 0
        return K, means_of_blocks

    def _shares(self, blocks, table_share):
        """Return the weight of each block in the mean of the kernels."""
        n_table = len(self.table_blocks_)
        n_vectors = len(blocks) - n_table
        shares = {}
        for name in blocks:
            if name in self.table_blocks_:
                shares[name] = table_share / n_table
            else:
                shares[name] = (1 - table_share) / n_vectors
        return shares

    def _set_landmarks(self, data):
        """Set the landmarks and their means; return their kernel matrix."""
        self._landmarks, self._landmark_weight = self._scale(data.X), data.weight
        K, self._means = self._mean_kernel(
            self._landmarks, self._landmarks, data.weight, self._settings()
        )
        return K

    def _settings(self):
        return {
            "gamma": self.gamma_,
            "table_gamma": self.table_gamma_,
            "table_share": self.table_share_,
        }

    def _fit_dual(self, data):
        """Fit with all rows as landmarks; return predictions as `_solve_dual` does."""
        K = self._set_landmarks(data)
        groups = _rows_by_group(data.groups)
        self._coef, predicted = _solve_dual(K, data, self.alpha_, groups)
        return predicted

    def _fit_landmarks(self, data, landmarks, seed):
        """Fit by Nyström's method; return predictions out of fold.

        Folds are random; if there are groups, a second list has predictions of folds
        that keep groups together. Sums over the rows of each fold give the solutions of
        all folds.
        """
        penalty = self._set_landmarks(data.take(landmarks))
        penalty[np.diag_indices(len(landmarks))] += _JITTER
        factor = np.linalg.cholesky(penalty)
        predicted = []
        for fold_of in _folds_of_rows(data, seed):
            predicted.append(self._predict_folds(data, fold_of, factor))
        return predicted

    def _predict_folds(self, data, fold_of, factor):
        """Fit on all rows, and for each fold on the others; return predictions."""
        n_folds, n_landmarks = fold_of.max() + 1, len(factor)
        grams = np.zeros((n_folds, n_landmarks, n_landmarks))
        moments = np.zeros((n_folds, n_landmarks, data.targets.shape[1]))
        for fold in range(n_folds):
            for rows in _chunks(np.flatnonzero(fold_of == fold)):
                K = self._kernel(self._scale(data.X[rows]))
                weighted = K * data.weight[rows, None]
                grams[fold] += K.T @ weighted
                moments[fold] += weighted.T @ data.targets[rows]
        gram, moment = grams.sum(axis=0), moments.sum(axis=0)
        self._coef = _solve_primal(gram, moment, factor, self.alpha_)
        predicted = np.empty_like(data.targets)
        for fold in range(n_folds):
            rest = gram - grams[fold], moment - moments[fold]
            coef = _solve_primal(*rest, factor, self.alpha_)
            for rows in _chunks(np.flatnonzero(fold_of == fold)):
                predicted[rows] = self._kernel(self._scale(data.X[rows])) @ coef
        return predicted

    def _scale(self, X):
        return scale_blocks(X, self.blocks_, self._scaling)

    def _kernel(self, blocks):
        """Return the kernel between rows and landmarks."""
        K, _ = self._mean_kernel(
            blocks,
            self._landmarks,
            self._landmark_weight,
            self._settings(),
            means=self._means,
        )
        return K

    def _predict_ridge(self, X):
        """Return the predictions for the rows of a validated table."""
        predicted = np.empty((len(X), self._coef.shape[1]))
        for chunk in gen_batches(len(X), _CHUNK_ROWS):
            predicted[chunk] = self._kernel(self._scale(X[chunk])) @ self._coef
        return predicted + self.intercept_

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_coef")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.multi_output = True
        return tags


class _Rows:
    """The training rows of positive weight."""

    def __init__(self, X, targets, weight, groups):
        self.X = X
        self.targets = targets  # centred
        self.weight = weight
        self.groups = groups

    def take(self, rows):
        """Return a subset of the rows."""
        groups = None if self.groups is None else self.groups[rows]
        return _Rows(self.X[rows], self.targets[rows], self.weight[rows], groups)


def deviation_factors(blocks, shares):
    """Return the factors of the deviations of each block from its mean.

    The factor is 0 where the block is missing, and 1 for complete rows. If the observed
    blocks of a row have the share `s` of the kernel, their factor is `1 / sqrt(s)`, so
    that all rows have the same variance on average.

    Parameters
    ----------
    blocks : dict of str to ScaledBlock
        The scaled blocks.
    shares : dict of str to float
        The weight of each block in the mean of the kernels.

    Returns
    -------
    factors : dict of str to ndarray of shape (n_samples,)
        The factors of each block.
    """
    observed_share = sum(shares[name] * blocks[name].observed for name in blocks)
    share = observed_share / sum(shares[name] for name in blocks)
    factor = 1 / np.sqrt(np.where(share > 0, share, 1))
    return {name: factor * block.observed for name, block in blocks.items()}


def mean_weights(block, weight):
    """Return the weights of the rows in the mean of a block; zero where missing."""
    weight = weight * block.observed
    return weight / max(weight.sum(), np.finfo(float).tiny)


def is_empty(blocks):
    """Return a mask of the rows without any observed block."""
    return ~np.any([block.observed for block in blocks.values()], axis=0)


def _rescale_deviations(kernel, factor, mean):
    """Multiply the deviations of the rows of a kernel matrix from their mean, in place."""
    rows = np.flatnonzero(factor != 1)
    kernel[rows] = mean + factor[rows, None] * (kernel[rows] - mean)


def _chunks(rows):
    """Yield consecutive parts of an array of rows."""
    for chunk in gen_batches(len(rows), _CHUNK_ROWS):
        yield rows[chunk]


def _at(grid, position):
    """Return the settings at a position of a grid."""
    settings = {}
    for (name, values), index in zip(grid.items(), position, strict=True):
        settings[name] = values[index]
    return settings


def _rows_by_group(groups):
    """Return the positions of the rows of each group; None without groups."""
    if groups is None:
        return None
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return np.split(order, starts)


def _solve_dual(K, data, alpha, groups):
    """Solve a weighted kernel ridge regression in closed form.

    Parameters
    ----------
    K : ndarray of shape (n_samples, n_samples)
        The kernel matrix.
    data : _Rows
        Targets and weights.
    alpha : float
        The penalty.
    groups : list of ndarray or None
        Positions of the rows of each group.

    Returns
    -------
    coef : ndarray of shape (n_samples, n_outputs)
        The dual coefficients.
    predicted : list of ndarray of shape (n_samples, n_outputs)
        Predictions for each row by a fit without it. If there are groups, also
        predictions by a fit without its group.
    """
    root = np.sqrt(data.weight)[:, None]
    system = root * K * root.T
    system[np.diag_indices(len(system))] += alpha
    inverse = _inverse(system, alpha)
    dual = inverse @ (root * data.targets)
    residuals = [dual / np.diag(inverse)[:, None]]
    if groups is not None:
        residual = np.empty_like(dual)
        for rows in groups:
            residual[rows] = np.linalg.solve(inverse[np.ix_(rows, rows)], dual[rows])
        residuals.append(residual)
    return root * dual, [data.targets - residual / root for residual in residuals]


def _inverse(matrix, alpha):
    """Return the inverse of a positive definite matrix, which is overwritten."""
    # The matrix is symmetric, so its transpose is the same matrix in Fortran order.
    factor, info = lapack.dpotrf(matrix.T, lower=1, overwrite_a=1)
    if info:
        raise _too_small(alpha, len(matrix))
    inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
    lower = np.tril(inverse)
    return lower + np.tril(inverse, -1).T


def _too_small(alpha, n_rows):
    return ValueError(
        f"alpha={alpha} is too small: rows are so similar that the kernel matrix of "
        f"{n_rows} rows has no inverse. Pass a larger alpha, or 'auto'."
    )


def _solve_primal(gram, moment, factor, alpha):
    """Solve a ridge regression on landmarks, given sums over rows.

    `factor` is the Cholesky factor of the kernel of the landmarks. In whitened
    coordinates the penalty is `alpha` times the identity.
    """
    whitened = solve_triangular(factor, gram, lower=True)
    whitened = solve_triangular(factor, whitened.T, lower=True)
    whitened[np.diag_indices(len(whitened))] += alpha
    moment = solve_triangular(factor, moment, lower=True)
    try:
        coef = cho_solve(cho_factor(whitened, lower=True), moment)
    except np.linalg.LinAlgError:
        raise _too_small(alpha, len(gram)) from None
    return solve_triangular(factor, coef, lower=True, trans="T")


def _folds_of_rows(data, seed):
    """Return the random fold of each row; also a fold of each group if there are any."""
    n_rows = len(data.targets)
    random = KFold(min(_N_FOLDS, n_rows), shuffle=True, random_state=seed)
    splits = [random.split(data.targets)]
    if data.groups is not None:
        by_group = GroupKFold(min(_N_FOLDS, len(np.unique(data.groups))))
        splits.append(by_group.split(data.targets, None, data.groups))
    folds = []
    for split in splits:
        fold_of = np.empty(n_rows, dtype=np.intp)
        for fold, (_, rows) in enumerate(split):
            fold_of[rows] = fold
        folds.append(fold_of)
    return folds


class KernelFusionClassifier(ClassifierMixin, _KernelFusion):
    """Classify by ridge regression in a mean of kernels, one per block of a table.

    Each block has a Gaussian kernel: of the angle between two vectors, or of the
    standardised distance between two rows of table columns. The kernel of two rows is
    the mean over the blocks. A missing vector is replaced by the mean of the observed
    ones in the feature space of the kernel, and the deviations of the other blocks from
    their means are divided by the root of their share of the kernel. Rows thus have the
    same variance, and no class is inferred from the fact that a vector is missing. A row
    without any modality gets the class prior. Missing values of table columns are
    imputed by the median, with an indicator.

    The width of the kernels, the penalty and the share of the table columns are chosen
    by leave-one-out, which has a closed form for ridge regression, or by
    leave-one-group-out if `groups` are passed. Probabilities are calibrated on these
    predictions, by a slope and an intercept for each class. Nothing needs tuning.

    The computing time grows with the cube of the number of rows up to `n_landmarks`.
    Larger tables use Nyström's approximation with that many random rows, whose time and
    memory grow linearly with the number of rows.

    Parameters
    ----------
    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    table_blocks : "auto" or list of str, default="auto"
        Blocks of table columns, such as numbers and categories, which are standardised
        and in which single values may be missing. The other blocks contain vectors.
        "auto" selects a block called "table", blocks of fewer than 16 columns, and
        blocks with a row of which only some values are missing.

    gamma : "auto" or float, default="auto"
        Inverse width of the kernels, ``exp(-gamma * d)``, where ``d`` is half the
        squared distance of two scaled rows, about 1 on average.

    alpha : "auto" or float, default="auto"
        Penalty of the ridge regression, relative to a kernel that is 1 for equal rows,
        and to rows of weight 1.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn. Not supported with several labels.

    n_landmarks : int, default=3000
        Maximum number of training rows that the kernel matrix contains.

    random_state : int, RandomState instance or None, default=None
        Seeds the choice of landmarks and of the rows for leave-one-out, which matters
        for more than 1,500 rows. Pass an int for reproducible results.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, the positions of their columns.

    target_type_ : {"binary", "multiclass", "multilabel"}
        Type of the target.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        Proportion of each class, or of rows with each label, in training. It is the
        prediction for rows of missing vectors.

    gamma_, table_gamma_ : float
        Inverse width of the kernels of vectors, and of table columns.

    alpha_ : float
        Penalty of the ridge regression.

    table_share_ : float
        Weight of the table columns in the mean of the kernels. The other blocks have
        equal shares of the rest.

    slope_ : float
        Slope by which predictions of the regression become logits.

    intercepts_ : ndarray of shape (n_classes,) or (n_labels,)
        Intercepts of the logits.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    table_blocks_ : list of str
        The blocks that were read as table columns.

    widths_ : dict of str to int
        The number of columns of each modality.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    KernelFusionRegressor : The same kernels for numeric targets.
    EmbeddingClassifier : Averages this classifier with other models.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import KernelFusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> blocks = {"top": slice(0, 32), "bottom": slice(32, 64)}
    >>> classifier = KernelFusionClassifier(blocks=blocks, random_state=0)
    >>> classifier.fit(X[:900], y[:900]).score(X[900:], y[900:]) > 0.9
    True
    """

    _parameter_constraints: dict = {
        **_KernelFusion._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        *,
        blocks=None,
        table_blocks="auto",
        gamma="auto",
        alpha="auto",
        class_weight=None,
        n_landmarks=3000,
        random_state=None,
    ):
        self.blocks = blocks
        self.table_blocks = table_blocks
        self.gamma = gamma
        self.alpha = alpha
        self.class_weight = class_weight
        self.n_landmarks = n_landmarks
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, groups=None):
        """Choose the width and the penalty by leave-one-out, and fit the regression.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. Rows of weight 0 are not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row, for leave-one-group-out.

        Returns
        -------
        self : KernelFusionClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is only one class, the columns do not form
            blocks, a cell is not a number, a vector is NaN in part of a row, all rows
            of positive weight are in one group, or `alpha` is too small for the rows.
        """
        self._fit(X, y, sample_weight, groups)
        return self

    @in_pieces
    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples,), (n_samples, n_classes) or \
(n_samples, n_labels)
            Log-probabilities of three or more classes, log-odds of the second of two
            classes, or log-odds of each label.
        """
        logits = self._outputs(check_rows(self, X))
        if self.target_type_ == "binary":
            return logits[:, 1] - logits[:, 0]
        return logits

    @in_pieces
    def predict_proba(self, X):
        """Return the probability of each class or label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Calibrated probabilities. For classes, rows sum to 1.
        """
        return probabilities(self.decision_function(X), self.target_type_)

    @in_pieces
    def predict(self, X):
        """Return the most probable class, or the labels with a probability above 0.5.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Classes, or 0 and 1.
        """
        return decided(self.predict_proba(X), self.classes_, self.target_type_)

    def _row_weights(self, X, target, sample_weight):
        weight = check_weights(sample_weight, X)
        if self.class_weight is not None and target.kind == "multilabel":
            raise ValueError(
                f"class_weight={self.class_weight!r} requires classes, but y has several "
                "labels. Set class_weight=None."
            )
        return weight_classes(weight, target, self.class_weight)

    def _fit(self, X, y, sample_weight, groups):
        """Fit; return log-probabilities of classes or log-odds of labels out of fold.

        If there are groups, a second array has those by fits without the group.
        """
        X, target = check_labelled_table(self, X, y, dtype=np.float32, reset=True)
        weight = self._row_weights(X, target, sample_weight)
        groups = encode_groups(groups, weight)
        self.prior_ = find_prior(target, weight)
        targets = target.values.astype(np.float64)
        if target.kind != "multilabel":
            targets = np.eye(len(self.classes_))[target.values]
        predicted = self._fit_ridge(X, targets, weight, groups)
        codes = target.values.astype(np.intp)
        self.slope_, self.intercepts_ = calibrate(predicted, codes, weight)
        return [self._logits(values) for values in predicted]

    def _outputs(self, X):
        """Return log-probabilities of classes or log-odds of labels of valid rows."""
        logits = self._logits(self._predict_ridge(X))
        if not self.table_blocks_:
            is_empty = ~observed_modalities(X, self.blocks_).any(axis=1)
            logits[is_empty] = self._logits_of_prior()
        return logits

    def _logits_of_prior(self):
        logs = to_log_prior(self.prior_, self.target_type_)
        if self.target_type_ == "multilabel":
            return logs[:, 1] - logs[:, 0]
        return logs

    def _loss(self, predicted, data):
        """Return the log loss of calibrated predictions, centred as the targets are."""
        present = data.targets + self.intercept_ > 0.5
        y = present.astype(np.intp)
        if self.target_type_ != "multilabel":
            y = present.argmax(axis=1)
        return fit_calibration(predicted, y, data.weight)[2]

    def _logits(self, predicted):
        """Return calibrated log-probabilities of classes, or log-odds of labels."""
        logits = self.slope_ * predicted + self.intercepts_
        if self.target_type_ == "multilabel":
            return logits
        return log_softmax(logits, axis=1)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class KernelFusionRegressor(RegressorMixin, _KernelFusion):
    """Predict numbers by ridge regression in a mean of kernels, one per block.

    Kernels, widths and penalty are chosen as in :class:`KernelFusionClassifier`. A row
    of missing vectors gets the mean of the targets.

    Parameters
    ----------
    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    table_blocks : "auto" or list of str, default="auto"
        Blocks of table columns, such as numbers and categories, which are standardised
        and in which single values may be missing. The other blocks contain vectors.
        "auto" selects a block called "table", blocks of fewer than 16 columns, and
        blocks with a row of which only some values are missing.

    gamma : "auto" or float, default="auto"
        Inverse width of the kernels, ``exp(-gamma * d)``, where ``d`` is half the
        squared distance of two scaled rows, about 1 on average.

    alpha : "auto" or float, default="auto"
        Penalty of the ridge regression, relative to a kernel that is 1 for equal rows,
        and to rows of weight 1.

    n_landmarks : int, default=3000
        Maximum number of training rows that the kernel matrix contains.

    random_state : int, RandomState instance or None, default=None
        Seeds the choice of landmarks and of the rows for leave-one-out, which matters
        for more than 1,500 rows. Pass an int for reproducible results.

    Attributes
    ----------
    gamma_, table_gamma_ : float
        Inverse width of the kernels of vectors, and of table columns.

    alpha_ : float
        Penalty of the ridge regression.

    table_share_ : float
        Weight of the table columns in the mean of the kernels. The other blocks have
        equal shares of the rest.

    target_mean_, target_scale_ : float or ndarray of shape (n_outputs,)
        Mean and standard deviation of each target in training.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    table_blocks_ : list of str
        The blocks that were read as table columns.

    widths_ : dict of str to int
        The number of columns of each modality.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    KernelFusionClassifier : The same kernels for classes and labels.
    EmbeddingRegressor : Averages this regressor with trees.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklembed import KernelFusionRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> blocks = {"patient": slice(0, 4), "blood": slice(4, 10)}
    >>> regressor = KernelFusionRegressor(blocks=blocks, random_state=0)
    >>> regressor.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.4
    True
    """

    def __init__(
        self,
        *,
        blocks=None,
        table_blocks="auto",
        gamma="auto",
        alpha="auto",
        n_landmarks=3000,
        random_state=None,
    ):
        self.blocks = blocks
        self.table_blocks = table_blocks
        self.gamma = gamma
        self.alpha = alpha
        self.n_landmarks = n_landmarks
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, groups=None):
        """Choose the width and the penalty by leave-one-out, and fit the regression.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numeric targets.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. Rows of weight 0 are not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row, for leave-one-group-out.

        Returns
        -------
        self : KernelFusionRegressor
            The fitted regressor.

        Raises
        ------
        ValueError
            If a target is missing or not a finite number, the columns do not form
            blocks, a cell is not a number, a vector is NaN in part of a row, all rows
            of positive weight are in one group, or `alpha` is too small for the rows.
        """
        self._fit(X, y, sample_weight, groups)
        return self

    @in_pieces
    def predict(self, X):
        """Return the predicted targets.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Predictions, of the shape of the targets in `fit`.
        """
        predicted = self._outputs(check_rows(self, X))
        return predicted[:, 0] if np.ndim(self.target_mean_) == 0 else predicted

    def _fit(self, X, y, sample_weight, groups):
        """Fit on standardised targets; return predictions out of fold."""
        X, y = check_table(self, X, y, dtype=np.float32, reset=True, y_numeric=True)
        weight = check_weights(sample_weight, X)
        self.target_mean_, self.target_scale_ = scale_targets(y, weight)
        targets = (y.astype(np.float64) - self.target_mean_) / self.target_scale_
        targets = targets.reshape(len(y), -1)
        groups = encode_groups(groups, weight)
        predicted = self._fit_ridge(X, targets, weight, groups)
        return [self._unscale(values) for values in predicted]

    def _outputs(self, X):
        """Return the predictions, (n_samples, n_outputs), for valid rows."""
        return self._unscale(self._predict_ridge(X))

    def _loss(self, predicted, data):
        """Return the squared error."""
        squared = np.square(data.targets - predicted).sum(axis=1)
        return data.weight @ squared

    def _unscale(self, predicted):
        return predicted * self.target_scale_ + self.target_mean_
