"""DecisionFusionClassifier: one classifier per modality, with pooled probabilities."""

from inspect import signature
from itertools import product
from numbers import Integral
from typing import NamedTuple

import numpy as np
import sklearn
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context, clone
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    process_routing,
)
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    FLOAT_DTYPES,
    _check_sample_weight,
)

from sklembed._display import DocLinkMixin
from sklembed._validation import (
    check_class_weight,
    check_new_rows,
    check_routing_enabled,
    in_pieces,
    split_rows,
)
from sklembed.fusion._base import (
    check_labelled_table,
    decided,
    find_prior,
    observed_modalities,
    probabilities,
    to_log_prior,
    warn_ignored,
)
from sklembed.fusion.pooling import (
    find_floors,
    learn_weights,
    pool,
    row_weights,
    smooth,
)

_ROWS_TO_FIND_ZEROS = 1024  # training rows on which zero probabilities are detected


class DecisionFusionClassifier(DocLinkMixin, ClassifierMixin, BaseEstimator):
    """Fit one classifier per modality and pool their class probabilities.

    Each classifier is trained on the rows in which its modality is observed. The
    prediction for a row is the weighted mean over its observed modalities. A row with a
    single modality gets the prediction of that classifier.

    Weights are learned from out-of-fold predictions. They stay equal unless other
    weights make the labels clearly more likely; a modality without information then
    gets a low weight.

    Log-probabilities are pooled in double precision, so that the order of rare or very
    many classes is preserved. A forest, a tree or nearest neighbors return a zero
    whenever no similar training row had the class. For classifiers that return zeros,
    the geometric mean adds the class prior to the probabilities, with the weight of one
    training row. A single zero then cannot overrule all other modalities.

    Parameters
    ----------
    estimator : classifier, or dict of str to classifier
        The classifier that is cloned for each modality, or one classifier per block. It
        needs `predict_proba` once it is fitted. With several labels, a classifier that
        supports only a single target is fitted once per label.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    weights : "auto", dict of str to float, or None, default="auto"
        Weight of each modality. "auto" learns them from out-of-fold predictions; if
        None, they are equal.

    pooling : {"geometric", "arithmetic"}, default="geometric"
        Mean of the probabilities. The geometric mean suits independent evidence.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds from which weights are learned; None means 5. If an int, the number of
        shuffled folds, over which classes and modalities are spread evenly. It is
        capped at the size of the largest class. The shuffling has a fixed seed. If
        every class has a single row, weights are equal.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes. With several labels, the positions of their columns in `y`.

    target_type_ : {"binary", "multiclass", "multilabel"}
        Kind of `y`.

    estimators_ : dict of str to classifier or list of classifier
        The fitted classifiers. As in :class:`~sklearn.ensemble.VotingClassifier`, they
        are fitted on codes: code ``i`` stands for ``estimator_classes_[name][i]``. With
        several labels, a classifier that supports only a single target is replaced by a
        list, with one classifier for each label in ``estimator_classes_[name]``.

    estimator_classes_ : dict of str to ndarray
        The classes in the training rows of each classifier. With several labels, the
        labels that are not constant in these rows.

    weights_ : dict of str to float
        Weight of each modality; they sum to 1.

    floors_ : dict of str to ndarray of shape (2, n_classes) or (2, n_labels, 2)
        Two rows of logarithms for each classifier, used by the geometric mean: the
        amounts added to its probabilities, and the values that replace zeros.

    ignored_blocks_ : list of str
        Blocks without a classifier, because the modality is missing in all training
        rows or observed in a single class only. They have weight 0 and are ignored in
        prediction.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        Class prior in the training rows, or frequency of each label. It is the
        prediction for rows without any modality.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    FusionClassifier : Joins the modalities within one network.
    sklearn.ensemble.StackingClassifier : Fits a classifier on predictions.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklembed import DecisionFusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X = np.hstack([X / 16, np.random.default_rng(0).normal(size=(len(X), 8))])
    >>> blocks = {"digit": slice(0, 64), "noise": slice(64, 72)}
    >>> classifier = LogisticRegression(max_iter=500)
    >>> fusion = DecisionFusionClassifier(classifier, blocks=blocks).fit(X, y)
    >>> fusion.weights_["noise"] < 0.1
    True
    """

    _parameter_constraints: dict = {
        "estimator": [HasMethods(["fit", "get_params"]), dict],
        "blocks": [dict, None],
        "weights": [StrOptions({"auto"}), dict, None],
        "pooling": [StrOptions({"geometric", "arithmetic"})],
        "cv": ["cv_object"],
        "n_jobs": [Integral, None],
    }

    def __init__(
        self,
        estimator,
        *,
        blocks=None,
        weights="auto",
        pooling="geometric",
        cv=5,
        n_jobs=None,
    ):
        self.estimator = estimator
        self.blocks = blocks
        self.weights = weights
        self.pooling = pooling
        self.cv = cv
        self.n_jobs = n_jobs

    def get_params(self, deep=True):
        """Get the parameters and, if deep, the classifiers and their parameters.

        Parameters
        ----------
        deep : bool, default=True
            Whether to include the classifiers in ``estimator={...}`` by the name of
            their block, such as ``text``, and their parameters, such as ``text__C``.
            Parameters of a single classifier are named ``estimator__C``.

        Returns
        -------
        params : dict
            Parameter names mapped to their values.
        """
        params = super().get_params(deep=deep)
        if not deep or not isinstance(self.estimator, dict):
            return params
        for name, estimator in self.estimator.items():
            # If a block is called "cv" or "weights", the bare name is the parameter.
            params.setdefault(name, estimator)
            if not hasattr(estimator, "get_params") or isinstance(estimator, type):
                continue
            for key, value in estimator.get_params(deep=True).items():
                params[f"{name}__{key}"] = value
        return params

    def set_params(self, **params):
        """Set parameters, also of the classifiers, or replace classifiers by block.

        After `fit`, parameters of a classifier are set in the fitted classifiers too,
        as in a :class:`~sklearn.pipeline.Pipeline`. Parameters that matter only in
        training take effect in the next `fit`.

        Parameters
        ----------
        **params : dict
            For example ``pooling="arithmetic"``, ``estimator__C=10`` for a single
            classifier, ``text__C=10`` for the classifier of a block, or
            ``text=GaussianNB()`` to replace it.

        Returns
        -------
        self : DecisionFusionClassifier
            The classifier.
        """
        if "estimator" in params:
            self.estimator = params.pop("estimator")
        fitted = getattr(self, "estimators_", {})
        if not isinstance(self.estimator, dict):
            super().set_params(**params)
            nested, _ = _split_prefix(params, "estimator__")
            for estimators in fitted.values():
                _set_fitted(estimators, nested)
            return self
        reserved = self.get_params(deep=False)
        for name in self.estimator:
            if name in params and name not in reserved:
                self.estimator = {**self.estimator, name: params.pop(name)}
        # The longest name first: one block may be called "text", another "text__title".
        for name in sorted(self.estimator, key=len, reverse=True):
            nested, params = _split_prefix(params, f"{name}__")
            if nested:
                self.estimator[name].set_params(**nested)
                _set_fitted(fitted.get(name, []), nested)
        nested, _ = _split_prefix(params, "estimator__")
        if nested:
            example = next(iter(self.estimator), "text")
            raise ValueError(
                f"estimator is a dict; got {sorted(params)}. Set parameters of a "
                f"classifier by the name of the block, such as '{example}__C'."
            )
        return super().set_params(**params)

    # The classifiers validate their own parameters.
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X, y, sample_weight=None, **params):
        """Fit a classifier for each modality, and learn the weights.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing modality is a block of
            NaN. A modality that is observed in no row, or in a single class only, is
            ignored with a warning.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, passed on to the classifiers. With metadata routing,
            they are passed on to classifiers that request them, for example to a step
            of a pipeline.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`, or for the classifiers.
            Requires ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        self : DecisionFusionClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, `y` has a single class, the columns do not form
            blocks, no modality can be used, a cell is not a number, a block is NaN in
            part of a row, `weights` do not match the blocks, or a classifier does not
            support `sample_weight` or `predict_proba`.
        """
        check_routing_enabled(params, self)
        X, target = check_labelled_table(self, X, y, dtype=FLOAT_DTYPES, reset=True)
        estimators = self._check_estimators(sample_weight)
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        metadata, split_params = self._route(sample_weight, weight, params)
        masks = observed_modalities(X, self.blocks_).T
        observed = dict(zip(self.blocks_, masks, strict=True))
        codes = target.values.astype(np.int64)
        data = _TrainingSet(X, codes, weight, observed, metadata)
        self.prior_ = find_prior(target, weight)
        self.ignored_blocks_ = self._find_ignored(data)
        folds = self._make_folds(data, target, split_params)
        final, *by_fold = self._fit_classifiers(estimators, data, folds)
        self.estimators_, self.estimator_classes_, self.floors_ = {}, {}, {}
        for name, classifier in final.items():
            self.estimators_[name] = classifier.estimator
            self.estimator_classes_[name] = self.classes_[classifier.present]
            self.floors_[name] = classifier.floors
        self.weights_ = self._find_weights(data, folds, by_fold)
        return self

    @in_pieces
    def predict_proba(self, X):
        """Return the probability of each class, or of each label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Rows of classes sum to 1. Each label has its own probability.
        """
        return probabilities(self.decision_function(X), self.target_type_)

    @in_pieces
    def decision_function(self, X):
        """Return log-probabilities of classes, or log-odds for two classes and labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples, n_classes), (n_samples,) or \
(n_samples, n_labels)
            Log-probabilities of three or more classes, log-odds of the second of two
            classes, or log-odds of each label.
        """
        X = check_new_rows(self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False)
        logs = self._pool(X, observed_modalities(X, self.blocks_))
        if self.target_type_ == "multiclass":
            return logs
        return logs[..., 1] - logs[..., 0]

    @in_pieces
    def predict(self, X):
        """Return the most likely class, or 1 for labels with probability above 0.5.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Classes, or 0 and 1.
        """
        return decided(self.predict_proba(X), self.classes_, self.target_type_)

    def get_metadata_routing(self):
        """Return the routing of metadata to the classifiers and the `cv` splitter.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(
            splitter=self.cv,
            method_mapping=MethodMapping().add(caller="fit", callee="split"),
        )
        to_fit = MethodMapping().add(caller="fit", callee="fit")
        if not isinstance(self.estimator, dict):
            return router.add(estimator=self.estimator, method_mapping=to_fit)
        for name, estimator in self.estimator.items():
            router.add(**{f"estimator_{name}": estimator}, method_mapping=to_fit)
        return router

    def _check_estimators(self, sample_weight):
        """Validate weights and classifiers; return the classifier of each block."""
        if isinstance(self.weights, dict):
            _check_weights(self.weights, list(self.blocks_))
        estimators = self.estimator
        if not isinstance(estimators, dict):
            estimators = dict.fromkeys(self.blocks_, estimators)
        if set(estimators) != set(self.blocks_):
            raise ValueError(
                f"estimator has classifiers of {sorted(estimators)}, but the blocks "
                f"are {sorted(self.blocks_)}. Pass one for each block, or a single one."
            )
        for name, estimator in estimators.items():
            if isinstance(estimator, type) or not hasattr(estimator, "fit"):
                raise ValueError(
                    f"The classifier of block {name!r} must be an instance of a "
                    f"classifier; got {estimator!r}."
                )
            # A search may have predict_proba only once fitted, but its class has it.
            if not hasattr(estimator, "predict_proba"):
                _check_predict_proba(type(estimator), name)
            if sample_weight is not None and not _routing_is_enabled():
                _check_takes_weights(estimator, name)
            if self.target_type_ != "multilabel":
                _check_class_weights(estimator, name, self.classes_)
        return estimators

    def _route(self, sample_weight, weight, params):
        """Return the metadata of each block's classifier, and of the splitter."""
        if not _routing_is_enabled():
            to_fit = {} if sample_weight is None else {"sample_weight": weight}
            return dict.fromkeys(self.blocks_, to_fit), {}
        if sample_weight is not None:
            params = {**params, "sample_weight": weight}
        routed = process_routing(self, "fit", **params)
        by_block = {}
        for name in self.blocks_:
            step = "estimator"
            if isinstance(self.estimator, dict):
                step = f"estimator_{name}"
            by_block[name] = routed[step]["fit"]
        return by_block, routed["splitter"]["split"]

    def _find_ignored(self, data):
        """List the blocks without two classes, with a warning for each."""
        reasons = {}
        for name, observed in data.observed.items():
            rows = observed & (data.weight > 0)
            if not rows.any():
                reasons[name] = "is NaN in all rows of positive weight"
            elif not len(_varying_classes(data.codes[rows])):
                reasons[name] = f"is observed in {rows.sum()} rows, all of one class"
        if len(reasons) == len(self.blocks_):
            raise ValueError(
                f"None of the blocks {list(self.blocks_)} is observed in rows of two "
                "classes. Check the preceding step, or pass more rows."
            )
        for name, reason in reasons.items():
            warn_ignored(name, reason)
        return list(reasons)

    def _used_blocks(self):
        return [name for name in self.blocks_ if name not in self.ignored_blocks_]

    def _make_folds(self, data, target, split_params):
        """List the folds from which weights are learned, if they are to be learned."""
        if self.weights != "auto" or len(self._used_blocks()) < 2:
            return []
        cv = 5 if self.cv is None else self.cv
        if isinstance(cv, Integral):
            observed = np.stack(list(data.observed.values()), axis=1)
            return _spread_folds(_strata(target), observed, cv)
        y = data.codes
        if target.kind != "multilabel":
            y = target.classes[y]
        return split_rows(check_cv(cv), data.X, y, split_params)

    def _fit_classifiers(self, estimators, data, folds):
        """Fit the classifiers of all modalities on all rows, then on each fold."""
        names = self._used_blocks()
        log_prior = to_log_prior(self.prior_, self.target_type_)
        row_sets = [np.arange(len(data.X))]
        for train, _ in folds:
            row_sets.append(train)
        fitted = Parallel(n_jobs=self.n_jobs)(
            delayed(_fit_modality)(
                estimators[name],
                data.take_block(name, self.blocks_[name], rows),
                name,
                self.classes_,
                log_prior,
            )
            for rows, name in product(row_sets, names)
        )
        by_row_set = []
        for start in range(0, len(fitted), len(names)):
            classifiers = fitted[start : start + len(names)]
            by_row_set.append(dict(zip(names, classifiers, strict=True)))
        return by_row_set

    def _pool(self, X, observed):
        """Return pooled log-probabilities of shape (n_samples, ..., n_classes)."""
        log_prior = to_log_prior(self.prior_, self.target_type_)
        names = self._used_blocks()
        observed = observed[:, np.isin(list(self.blocks_), names)]
        logs = np.zeros((len(names), len(X), *log_prior.shape))
        smoothed = np.zeros_like(logs)
        for number, name in enumerate(names):
            rows = np.flatnonzero(observed[:, number])
            if not len(rows):
                continue
            present = np.isin(self.classes_, self.estimator_classes_[name])
            classifier = _ModalityClassifier(
                self.estimators_[name], np.flatnonzero(present), self.floors_[name]
            )
            block = X[rows][:, self.blocks_[name]]
            logs[number, rows] = classifier.log_proba(block, log_prior)
            smoothed[number, rows] = smooth(logs[number, rows], classifier.floors)
        weights = row_weights([self.weights_[name] for name in names], observed)
        return pool(logs, smoothed, weights, log_prior, self.pooling)

    def _find_weights(self, data, folds, by_fold):
        """Return the weight of each modality: user-defined, equal, or learned."""
        if isinstance(self.weights, dict):
            return _check_weights(self.weights, list(self.blocks_))
        names = self._used_blocks()
        weights = np.full(len(names), 1 / len(names))
        if folds:
            log_prior = to_log_prior(self.prior_, self.target_type_)
            logs = self._predict_out_of_fold(data, folds, by_fold, log_prior)
            weights = learn_weights(logs, log_prior, data.codes, data.weight)
        by_name = dict.fromkeys(self.blocks_, 0.0)
        by_name.update(zip(names, weights.tolist(), strict=True))
        return by_name

    def _predict_out_of_fold(self, data, folds, by_fold, log_prior):
        """Return finite log-probabilities of all modalities; NaN without prediction."""
        names = self._used_blocks()
        logs = np.full((len(names), len(data.X), *log_prior.shape), np.nan)
        for (_, test), classifiers in zip(folds, by_fold, strict=True):
            for number, name in enumerate(names):
                classifier = classifiers[name]
                rows = test[data.observed[name][test]]
                if len(rows) and classifier is not None:
                    block = data.X[rows][:, self.blocks_[name]]
                    log_proba = classifier.log_proba(block, log_prior)
                    logs[number, rows] = smooth(log_proba, classifier.floors)
        return logs

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _routing_is_enabled():
    return sklearn.get_config()["enable_metadata_routing"]


class _TrainingSet(NamedTuple):
    """A training set of decision fusion."""

    X: np.ndarray
    codes: np.ndarray  # of classes, or 0/1 for each label
    weight: np.ndarray
    observed: dict  # a mask of the rows for each modality
    metadata: dict  # passed on to the classifier of each modality

    def take_block(self, name, columns, rows):
        """Return one modality in the rows that have it and a positive weight."""
        rows = rows[self.observed[name][rows] & (self.weight[rows] > 0)]
        metadata = {}
        for key, value in self.metadata[name].items():
            metadata[key] = _take_rows(value, rows, len(self.X))
        X = self.X[rows][:, columns]
        return _BlockRows(X, self.codes[rows], self.weight[rows], metadata)


class _BlockRows(NamedTuple):
    """The training rows of one modality's classifier."""

    X: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    metadata: dict


class _ModalityClassifier(NamedTuple):
    """A fitted classifier, or a list of one per label, and its place in the target."""

    estimator: object
    present: np.ndarray  # positions of its classes or labels among all
    floors: np.ndarray | None

    def log_proba(self, X, log_prior):
        """Return log-probabilities of all classes; absent ones keep their prior."""
        logs = _log_proba(self.estimator, X)
        result = np.tile(log_prior, (len(X), *[1] * log_prior.ndim))
        if log_prior.ndim == 2:
            result[:, self.present] = _stack_labels(logs, len(self.present))
        else:
            share = logsumexp(log_prior[self.present]) - logsumexp(log_prior)
            result[:, self.present] = logs + share
        return result


def _split_prefix(params, prefix):
    """Separate the parameters with a prefix, which is removed, from the rest."""
    nested, rest = {}, {}
    for name, value in params.items():
        if name.startswith(prefix):
            nested[name.removeprefix(prefix)] = value
        else:
            rest[name] = value
    return nested, rest


def _as_list(estimator):
    """Return the classifiers of all labels, or a single classifier, as a list."""
    return estimator if isinstance(estimator, list) else [estimator]


def _set_fitted(estimator, params):
    """Set parameters of a fitted classifier, or of the classifiers of all labels."""
    for classifier in _as_list(estimator):
        classifier.set_params(**params)


def _take_rows(value, rows, n_rows):
    """Take rows of metadata with one value per row; do not change other metadata."""
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != n_rows:
        return value
    return np.asarray(value)[rows]


def _check_predict_proba(estimator, name):
    """Raise if a classifier has no probabilities."""
    if not hasattr(estimator, "predict_proba"):
        raise ValueError(
            f"The classifier of block {name!r}, {estimator!r}, has no predict_proba. "
            "Wrap it in CalibratedClassifierCV."
        )


def _check_takes_weights(estimator, name):
    """Raise if a classifier cannot use sample weights without metadata routing."""
    subject = f"The classifier of block {name!r}, {estimator!r}, "
    if isinstance(estimator, Pipeline):
        raise ValueError(
            f"{subject}is a pipeline, which passes sample_weight on only by metadata "
            "routing. Call sklearn.set_config(enable_metadata_routing=True), and "
            "request the weights in the steps that use them, for example by "
            "LogisticRegression().set_fit_request(sample_weight=True)."
        )
    parameters = signature(estimator.fit).parameters
    has_kwargs = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if "sample_weight" not in parameters and not has_kwargs:
        raise ValueError(
            f"{subject}takes no sample_weight. Use one that does, or pass no weights."
        )


def _class_weights(estimator):
    """Return those parameters of a classifier that are class weights by label."""
    weights = {}
    if not hasattr(estimator, "get_params"):
        return weights
    for key, value in estimator.get_params().items():
        if key.split("__")[-1] == "class_weight" and isinstance(value, dict):
            weights[key] = value
    return weights


def _check_class_weights(estimator, name, classes):
    """Validate class weights among the parameters of a classifier."""
    for key, weights in _class_weights(estimator).items():
        try:
            check_class_weight(weights, classes)
        except ValueError as error:
            error.add_note(f"This was {key} of the classifier of block {name!r}.")
            raise


def _check_weights(weights, names):
    """Return the user's weights of modalities, scaled to sum to 1."""
    values = np.array([weights.get(name, np.nan) for name in names], dtype=float)
    valid = np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0
    if set(weights) != set(names) or not valid:
        raise ValueError(
            f"weights must give each of the blocks {names} a finite weight of at least "
            f"0, and one of them more than 0; got {weights!r}."
        )
    return dict(zip(names, (values / values.sum()).tolist(), strict=True))


def _varying_classes(codes):
    """Return the classes that occur or labels that vary; none if all rows agree."""
    if codes.ndim == 1:
        classes = np.unique(codes)
        return classes if len(classes) > 1 else classes[:0]
    if not len(codes):
        return np.arange(0)
    return np.flatnonzero((codes != codes[0]).any(axis=0))


def _strata(target):
    """Return the stratum of each row: its class, or the rarest of its labels."""
    if target.kind != "multilabel":
        return target.strata
    frequency = target.values.sum(axis=0)
    rarest = np.where(target.values > 0, frequency, np.inf).argmin(axis=1)
    return np.where(target.values.any(axis=1), rarest, target.values.shape[1])


def _spread_folds(strata, observed, n_folds):
    """Make shuffled folds over which classes and modalities are spread evenly.

    Parameters
    ----------
    strata : ndarray of int of shape (n_samples,)
        The class of each row.
    observed : ndarray of bool of shape (n_samples, n_modalities)
        The modalities of each row.
    n_folds : int
        The number of folds, at most.

    Returns
    -------
    folds : list of (train, test)
        Positions of rows; no fold if no class has two rows.
    """
    n_folds = min(n_folds, np.bincount(strata).max())
    if n_folds < 2:
        return []
    patterns, pattern_of = np.unique(observed, axis=0, return_inverse=True)
    pattern_of = pattern_of.ravel()
    shuffled = np.random.default_rng(0).permutation(len(strata))
    rarity = 1 / np.maximum(observed.sum(axis=0), 1)
    n_of_class = np.zeros((strata.max() + 1, n_folds))
    n_of_modality = np.zeros((n_folds, observed.shape[1]))
    fold_of = np.empty(len(strata), dtype=np.int64)
    # The rarest combination of modalities first, since it is the hardest to spread.
    for pattern in np.argsort(np.bincount(pattern_of), kind="stable"):
        rows_of_pattern = shuffled[pattern_of[shuffled] == pattern]
        by_class = np.argsort(strata[rows_of_pattern], kind="stable")
        rows_of_pattern = rows_of_pattern[by_class]
        starts = np.flatnonzero(np.diff(strata[rows_of_pattern])) + 1
        for rows in np.split(rows_of_pattern, starts):
            n_in_class = n_of_class[strata[rows[0]]]
            n_per_fold, n_left = divmod(len(rows), n_folds)
            # The remaining rows go to folds with the fewest rows of their class, then
            # of their modalities, then of all.
            crowding = n_of_modality @ (patterns[pattern] * rarity)
            order = np.lexsort((n_of_class.sum(axis=0), crowding, n_in_class))
            folds = np.repeat(np.arange(n_folds), n_per_fold)
            fold_of[rows] = folds = np.r_[folds, order[:n_left]]
            counts = np.bincount(folds, minlength=n_folds)
            n_in_class += counts  # a view: this updates n_of_class
            n_of_modality += counts[:, None] * patterns[pattern]
    splits = []
    for fold in range(n_folds):
        is_test = fold_of == fold
        splits.append((np.flatnonzero(~is_test), np.flatnonzero(is_test)))
    return splits


def _fit_modality(estimator, part, name, classes, log_prior):
    """Fit one modality's classifier; return None if all its rows are of one class."""
    present = _varying_classes(part.codes)
    if not len(present):
        return None
    try:
        if log_prior.ndim == 2:
            estimator = _fit_labels(estimator, part, part.codes[:, present])
        else:
            estimator = _clone_for_codes(estimator, classes[present])
            y = np.searchsorted(present, part.codes)
            estimator.fit(part.X, y, **part.metadata)
    except Exception as error:
        error.add_note(
            f"This was the classifier of block {name!r}, fitted on {len(part.X)} rows."
        )
        raise
    for classifier in _as_list(estimator):
        _check_predict_proba(classifier, name)
    fitted = _ModalityClassifier(estimator, present, None)
    step = max(1, len(part.X) // _ROWS_TO_FIND_ZEROS)
    logs = fitted.log_proba(part.X[::step], log_prior)
    return fitted._replace(floors=find_floors(logs, part.weight.sum(), log_prior))


def _clone_for_codes(estimator, classes):
    """Clone a classifier for codes of classes, with its class weights by code."""
    estimator = clone(estimator)
    for key, weights in _class_weights(estimator).items():
        by_code = {}
        for code, label in enumerate(classes.tolist()):
            if label in weights:
                by_code[code] = weights[label]
        estimator.set_params(**{key: by_code})
    return estimator


def _fit_labels(estimator, part, y):
    """Fit a classifier on all labels, or one per label if it takes a single target."""
    tags = get_tags(estimator)
    if y.shape[1] == 1 and tags.target_tags.single_output:
        return clone(estimator).fit(part.X, y[:, 0], **part.metadata)
    if tags.classifier_tags.multi_label or tags.target_tags.multi_output:
        return clone(estimator).fit(part.X, y, **part.metadata)
    return [clone(estimator).fit(part.X, label, **part.metadata) for label in y.T]


def _log_proba(estimator, X):
    """Return a classifier's log-probabilities, -inf for 0; a list if it returns one."""
    if isinstance(estimator, list):
        return [_log_proba(classifier, X) for classifier in estimator]
    with np.errstate(divide="ignore"):
        # Naive Bayes has finite logarithms where its probabilities underflow.
        if hasattr(estimator, "predict_log_proba"):
            return estimator.predict_log_proba(X)
        probabilities = estimator.predict_proba(X)
        if isinstance(probabilities, list):
            return [np.log(p.astype(np.float64)) for p in probabilities]
        return np.log(np.asarray(probabilities, dtype=np.float64))


def _stack_labels(logs, n_labels):
    """Arrange log-probabilities of labels as (n_samples, n_labels, 2), for 0 and 1."""
    if isinstance(logs, list):
        return np.stack(logs, axis=1)
    if n_labels == 1 and logs.shape[1] == 2:
        return logs[:, None]
    logs = np.minimum(logs, 0)
    with np.errstate(divide="ignore"):
        return np.stack([np.log(-np.expm1(logs)), logs], axis=-1)
