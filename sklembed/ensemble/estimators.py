"""EmbeddingClassifier and EmbeddingRegressor: good without tuning."""

import time
import warnings
from numbers import Integral

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import StrOptions

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._display import DocLinkMixin
from sklembed._persistence import Saved
from sklembed._validation import draw_seed, in_pieces, split_rows
from sklembed.ensemble.features import Features, Problem
from sklembed.ensemble.members import Kernel, Linear, Trees
from sklembed.ensemble.svm import SupportVectorMachine
from sklembed.fusion._base import (
    TINY,
    check_labelled_table,
    check_rows,
    check_table,
    check_weights,
    decided,
    encode_groups,
    scale_targets,
    weight_classes,
)
from sklembed.fusion.calibration import calibrate
from sklembed.fusion.scaling import check_vectors_complete, find_table_blocks
from sklembed.projection.folds import check_each_row_held_out_once

MEMBERS = ("linear", "kernel", "svm", "projection", "trees")
_SVM_ROWS = 5000  # more take too long
_SVM_DECISIONS = 20_000_000  # of rows for pairs of classes, more take too much memory
_MANY_CLASSES = 30  # gradient boosting fits a tree for each class in each iteration
_LARGE_TABLE = 20_000  # rows, above which an int cv means two folds
_CHUNK_ROWS = 8192  # of a prediction
# scikit-learn warns of folds with few rows per class.
_FEW_ROWS = "The number of unique classes is greater than 50% of the number of samples"


def _make_member(name):
    if name == "linear":
        return Linear("scaled")
    if name == "projection":
        return Linear("projected_and_scaled")
    return {"kernel": Kernel, "svm": SupportVectorMachine, "trees": Trees}[name]()


def _default_members(problem):
    """Return the members that are used by default."""
    if problem.kind == "numbers":
        return ["kernel", "trees"]
    if problem.kind == "labels":
        return ["kernel"]
    n_rows = np.count_nonzero(problem.weight > 0)
    n_pairs = problem.n_outputs * (problem.n_outputs - 1) // 2
    if n_rows <= _SVM_ROWS and n_rows * n_pairs <= _SVM_DECISIONS:
        return ["kernel", "svm"]
    if problem.n_outputs > _MANY_CLASSES:
        return ["linear", "kernel", "projection"]
    return ["linear", "kernel", "projection", "trees"]


class _EmbeddingEnsemble(DocLinkMixin, Saved, CallbackSupportMixin, BaseEstimator):
    """Average members on blocks of embeddings; a subclass reads the target."""

    _parameter_constraints: dict = {
        "blocks": [dict, None],
        "table_blocks": [StrOptions({"auto"}), list],
        "members": [StrOptions({"auto"}), list, tuple],
        "cv": ["cv_object"],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
    }

    def _fit_members(self, problem, X, y):
        """Fit the members, and calibrate each on its predictions out of fold."""
        names = self._member_names(problem)
        self.members_, self.scores_, self.seconds_ = {}, {}, {}
        self.slopes_, self.intercepts_ = {}, {}
        out_of_fold = {}
        context = self._init_callback_context(max_subtasks=len(names) + 1)
        with _callbacks.task(self, context, X, y):
            self._features, view = self._fit_features(problem, names, context, X, y)
            for name in names:
                started = time.perf_counter()
                member = _make_member(name)
                task = _callbacks.subtask(context, f"fit-{name}", 0)
                with _callbacks.task(self, task, X, y), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=_FEW_ROWS)
                    outputs = member.fit(view, problem)
                self.members_[name] = member
                if problem.kind != "numbers":
                    self.slopes_[name], self.intercepts_[name] = calibrate(
                        outputs, problem.y, problem.weight
                    )
                out_of_fold[name] = self._calibrate(name, outputs[-1])
                self.scores_[name] = _score(out_of_fold[name], problem)
                self.seconds_[name] = time.perf_counter() - started
        average = np.mean(list(out_of_fold.values()), axis=0)
        self.scores_["average"] = _score(average, problem)

    def _fit_features(self, problem, names, context, X, y):
        """Return the features, and the view of the training rows."""
        started = time.perf_counter()
        features = Features(problem)
        projected = {}
        task = _callbacks.subtask(context, "project", 0)
        with _callbacks.task(self, task, X, y):
            if set(names) & {"projection", "trees"}:
                projected = features.project(problem)
        self.seconds_["features"] = time.perf_counter() - started
        return features, features.view(problem.X, projected)

    def _check_members(self):
        """Refuse members that do not exist, or are named twice."""
        if isinstance(self.members, str):
            return
        for name in self.members:
            if name not in MEMBERS:
                raise ValueError(
                    f"members has {name!r}; the members are {list(MEMBERS)}."
                )
        if not self.members or len(set(self.members)) < len(self.members):
            raise ValueError(
                f"members must be different names, at least one; got {self.members!r}."
            )

    def _member_names(self, problem):
        if isinstance(self.members, str):
            return _default_members(problem)
        if "svm" in self.members and problem.kind != "classes":
            raise ValueError(
                f"The member 'svm' requires classes, but y has {problem.kind}. Leave it out."
            )
        return list(self.members)

    def _make_problem(self, X, y, kind, strata, labels, weight, groups):
        """Return the training rows with their folds."""
        groups = encode_groups(groups, weight)
        seed = draw_seed(self.random_state)
        self.table_blocks_ = find_table_blocks(self.table_blocks, X, self.blocks_)
        check_vectors_complete(X, self.blocks_, self.table_blocks_)
        cv = 5 if self.cv is None else self.cv
        group_folds = None
        if groups is not None:
            n_folds = cv if isinstance(cv, Integral) else 5
            group_folds = _make_folds(n_folds, weight, strata, groups, seed)
        if isinstance(cv, Integral):
            folds = _make_folds(cv, weight, strata, None, seed)
        else:
            params = {} if groups is None else {"groups": groups}
            splitter = check_cv(cv, labels, classifier=strata is not None)
            folds = split_rows(splitter, X, labels, params)
            check_each_row_held_out_once(folds, len(X))
            folds = _without_unused(folds, weight)
        return Problem(
            X=X,
            y=y,
            kind=kind,
            n_outputs=y.shape[1] if y.ndim == 2 else int(y.max()) + 1,
            weight=weight / weight[weight > 0].mean(),
            groups=groups,
            folds=folds,
            group_folds=group_folds,
            blocks=self.blocks_,
            table_blocks=self.table_blocks_,
            n_jobs=self.n_jobs,
            seed=seed,
        )

    def _calibrate(self, name, outputs):
        """Return probabilities of classes or labels, or numbers unchanged."""
        if name not in self.slopes_:
            return outputs
        logits = self.slopes_[name] * outputs + self.intercepts_[name]
        if self.target_type_ == "multilabel":
            return expit(logits)
        return softmax(logits, axis=1)

    def _predict_members(self, X):
        """Return the calibrated predictions of each member."""
        X = check_rows(self, X)
        chunks = {name: [] for name in self.members_}
        for rows in gen_batches(len(X), _CHUNK_ROWS):
            view = self._features.view(X[rows])
            for name, member in self.members_.items():
                chunks[name].append(self._calibrate(name, member.outputs(view)))
        return {name: np.concatenate(parts) for name, parts in chunks.items()}

    def __sklearn_is_fitted__(self):
        return hasattr(self, "members_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.multi_output = True
        return tags


def _make_folds(n_folds, weight, strata, groups, seed):
    """Return shuffled folds, stratified by class and divided by group.

    Rows of weight 0 do not influence the folds. They are held out in the first.
    """
    used, unused = np.flatnonzero(weight > 0), np.flatnonzero(weight == 0)
    n_rows = len(used)
    if n_rows < 2:
        raise ValueError(
            f"One of {len(weight)} rows has a positive weight; at least two are needed."
        )
    if strata is not None:
        strata = strata[used]
    if groups is not None:
        groups = groups[used]
    if n_rows > _LARGE_TABLE:
        n_folds = min(n_folds, 2)
    settings = {"shuffle": True, "random_state": seed}
    if groups is not None:
        n_folds = min(n_folds, len(np.unique(groups)))
        splitter = GroupKFold(n_folds, **settings)
        if strata is not None:
            n_folds = max(2, min(n_folds, np.bincount(strata).max()))
            splitter = StratifiedGroupKFold(n_folds, **settings)
    elif strata is not None:
        n_folds = min(n_folds, np.bincount(strata).max())
        if n_folds < 2:
            raise ValueError(
                f"Every class has a single row, of {n_rows} rows of positive weight; at "
                "least one class needs two."
            )
        splitter = StratifiedKFold(n_folds, **settings)
    else:
        splitter = KFold(min(n_folds, n_rows), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        folds = list(splitter.split(used, strata, groups))
    folds = [(used[train], used[held_out]) for train, held_out in folds]
    train, held_out = folds[0]
    folds[0] = train, np.concatenate([held_out, unused])
    return folds


def _without_unused(folds, weight):
    """Return folds whose training rows have positive weights."""
    used_in_training = []
    for fold, (train, held_out) in enumerate(folds):
        used = train[weight[train] > 0]
        if not len(used):
            raise ValueError(
                f"Fold {fold} of cv has {len(train)} training rows, none of positive "
                "weight. Pass other folds, or drop the rows of weight 0."
            )
        used_in_training.append((used, held_out))
    return used_in_training


def _score(predicted, problem):
    """Return the mean log-likelihood of the rows with a prediction, or R² for numbers."""
    rows = np.flatnonzero(~np.isnan(predicted[:, 0]) & (problem.weight > 0))
    predicted, y, weight = predicted[rows], problem.y[rows], problem.weight[rows]
    if problem.kind == "numbers":
        return float(r2_score(y, predicted, sample_weight=weight))
    if problem.kind == "classes":
        likelihood = predicted[np.arange(len(y)), y][:, None]
    else:
        likelihood = np.where(y > 0, predicted, 1 - predicted)
    logs = np.log(np.maximum(likelihood, TINY)).sum(axis=1)
    return float(np.average(logs, weights=weight))


class EmbeddingClassifier(ClassifierMixin, _EmbeddingEnsemble):
    """Classify blocks of embeddings and table columns, without tuning.

    The classifier averages calibrated members that make different errors:

    - "kernel": :class:`KernelFusionClassifier`, ridge regression in a mean of kernels,
      one per block;
    - "svm": a support vector machine in the product of these kernels, whose pairwise
      decisions are coupled [1]_;
    - "linear": logistic regression on all blocks;
    - "projection": logistic regression on the cross-fitted
      :class:`ContrastiveProjector` of each block, as in [2]_, and the table columns;
    - "trees": gradient boosting on the same projections and the table columns.

    The settings of each member are chosen on predictions out of fold, on which its
    probabilities are also calibrated: by a slope, and an intercept for each class. All
    members share one set of folds, and each block is projected once. Members have equal
    weights.

    A modality may be missing: its block is NaN. Single values of table columns may be
    missing as well. They are imputed by the median, with an indicator, except in trees.

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

    members : "auto" or list of str, default="auto"
        Names of the members. "auto" means "kernel" and "svm": in the benchmarks, more
        members are slower and not better. A support vector machine takes too long on
        many rows and too much memory for many pairs of classes: above 5,000 rows, or
        20 million pairs of all rows, "auto" means all others, without "trees" above 30
        classes. With several labels it means "kernel". "svm" is for classes only.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn. Not supported with several labels.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds on which members are tuned and calibrated; None means 5. If an int, the
        number of shuffled folds, stratified by class, and at most 2 above 20,000 rows.
        A splitter must hold out each row exactly once. The kernel uses leave-one-out.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the folds and the projections. Pass an int for
        reproducible results.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, the positions of their columns.

    target_type_ : {"binary", "multiclass", "multilabel"}
        Type of the target.

    members_ : dict of str to object
        The fitted members.

    slopes_ : dict of str to float
        The slope by which log-probabilities of each member are multiplied, which is the
        inverse of a temperature. With several labels, the slope of log-odds.

    intercepts_ : dict of str to ndarray of shape (n_classes,) or (n_labels,)
        The intercepts that are added, one per class or label.

    scores_ : dict of str to float
        Mean log-likelihood of the labels out of fold, of each member and of their
        average. Higher is better.

    seconds_ : dict of str to float
        Duration of the fit of each member, and of scaling and projecting the blocks.

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
    EmbeddingRegressor : The same members for numeric targets.
    multimodal_pipeline : Reads a table and ends in this classifier.

    References
    ----------
    .. [1] Wu, Lin, Weng. Probability Estimates for Multi-class Classification by
       Pairwise Coupling. JMLR 5 (2004), section 4.2.

    .. [2] Margaritis, Petridis, Bertsimas. Efficient Domain Adaptation of Multimodal
       Embeddings using Contrastive Learning. arXiv 2502.02048.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import EmbeddingClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> blocks = {"top": slice(0, 32), "bottom": slice(32, 64)}
    >>> classifier = EmbeddingClassifier(blocks=blocks, random_state=0)
    >>> classifier.fit(X[:600], y[:600]).score(X[600:], y[600:]) > 0.9
    True
    >>> list(classifier.members_)
    ['kernel', 'svm']
    """

    _parameter_constraints: dict = {
        **_EmbeddingEnsemble._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        *,
        blocks=None,
        table_blocks="auto",
        members="auto",
        class_weight=None,
        cv=5,
        n_jobs=None,
        random_state=None,
    ):
        self.blocks = blocks
        self.table_blocks = table_blocks
        self.members = members
        self.class_weight = class_weight
        self.cv = cv
        self.n_jobs = n_jobs
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, groups=None):
        """Fit and calibrate the members.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. Rows of weight 0 are not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row. Folds that keep groups together correct the slopes of the
            members, so that probabilities of new groups are as certain as they are
            right. The kernel is tuned by leave-one-group-out.

        Returns
        -------
        self : EmbeddingClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is only one class, the columns do not form
            blocks, a cell is not a number, a vector is NaN in part of a row, all rows
            of positive weight are in one group, or there is no such member.
        """
        self._check_members()
        table, target = check_labelled_table(self, X, y, dtype=np.float32, reset=True)
        weight = check_weights(sample_weight, table)
        codes, strata, kind = target.values.astype(np.intp), target.strata, "classes"
        labels = codes
        if target.kind == "multilabel":
            kind = "labels"
            self._refuse_class_weight()
        else:
            weight = weight_classes(weight, target, self.class_weight)
        problem = self._make_problem(table, codes, kind, strata, labels, weight, groups)
        self._fit_members(problem, X, y)
        return self

    @in_pieces
    def predict_proba(self, X):
        """Return the probability of each class or label, the mean of the members.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Calibrated probabilities. For classes, rows sum to 1.
        """
        return np.mean(list(self._predict_members(X).values()), axis=0)

    def member_predictions(self, X):
        """Return the probabilities of each member.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : dict of str to ndarray
            Calibrated probabilities of each member, of the shape of `predict_proba`.
        """
        return self._predict_members(X)

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

    def _refuse_class_weight(self):
        if self.class_weight is not None:
            raise ValueError(
                f"class_weight={self.class_weight!r} requires classes, but y has several "
                "labels. Set class_weight=None."
            )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class EmbeddingRegressor(RegressorMixin, _EmbeddingEnsemble):
    """Predict numbers from blocks of embeddings and table columns, without tuning.

    The regressor averages :class:`KernelFusionRegressor` and gradient boosting on the
    table columns and 30 principal components of each block of vectors. The other
    members of :class:`EmbeddingClassifier` are available too, as ridge regressions.

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

    members : "auto" or list of str, default="auto"
        Names of the members: "linear", "kernel", "projection" or "trees". "auto" means
        "kernel" and "trees".

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds on which members are tuned; None means 5. If an int, the number of
        shuffled folds, and at most 2 above 20,000 rows. A splitter must hold out each
        row exactly once.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the folds and the projections. Pass an int for
        reproducible results.

    Attributes
    ----------
    members_ : dict of str to object
        The fitted members.

    scores_ : dict of str to float
        R² out of fold of each member and of their average.

    seconds_ : dict of str to float
        Duration of the fit of each member, and of scaling and projecting the blocks.

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
    EmbeddingClassifier : The same members for classes and labels.
    multimodal_pipeline : Reads a table and ends in this regressor.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklembed import EmbeddingRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> blocks = {"patient": slice(0, 4), "blood": slice(4, 10)}
    >>> regressor = EmbeddingRegressor(blocks=blocks, random_state=0)
    >>> regressor.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.4
    True
    """

    def __init__(
        self,
        *,
        blocks=None,
        table_blocks="auto",
        members="auto",
        cv=5,
        n_jobs=None,
        random_state=None,
    ):
        self.blocks = blocks
        self.table_blocks = table_blocks
        self.members = members
        self.cv = cv
        self.n_jobs = n_jobs
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, groups=None):
        """Fit the members.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numeric targets.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. Rows of weight 0 are not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row, for scores on new groups. The kernel is tuned by
            leave-one-group-out.

        Returns
        -------
        self : EmbeddingRegressor
            The fitted regressor.

        Raises
        ------
        ValueError
            If a target is missing or not a finite number, the columns do not form
            blocks, a cell is not a number, a vector is NaN in part of a row, all rows
            of positive weight are in one group, or there is no such member.
        """
        self._check_members()
        table, targets = check_table(
            self, X, y, dtype=np.float32, reset=True, y_numeric=True
        )
        weight = check_weights(sample_weight, table)
        self.target_mean_, self.target_scale_ = scale_targets(targets, weight)
        targets = targets.astype(np.float64)
        targets = (targets - self.target_mean_) / self.target_scale_
        targets = targets.reshape(len(targets), -1)
        problem = self._make_problem(
            table, targets, "numbers", None, targets, weight, groups
        )
        self._fit_members(problem, X, y)
        return self

    @in_pieces
    def predict(self, X):
        """Return the predicted targets, the mean of the members.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Predictions, of the shape of the targets in `fit`.
        """
        return np.mean(list(self.member_predictions(X).values()), axis=0)

    def member_predictions(self, X):
        """Return the predictions of each member.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Blocks side by side; a missing modality is a block of NaN.

        Returns
        -------
        predictions : dict of str to ndarray
            Predictions of each member, of the shape of `predict`.
        """
        predictions = {}
        for name, predicted in self._predict_members(X).items():
            if np.ndim(self.target_mean_) == 0:
                predicted = predicted[:, 0]
            predictions[name] = predicted * self.target_scale_ + self.target_mean_
        return predictions
