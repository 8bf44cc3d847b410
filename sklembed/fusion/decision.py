"""DecisionFusionClassifier: one classifier per modality, pooled by their probabilities."""

from inspect import signature
from numbers import Integral
from typing import NamedTuple

import numpy as np
import sklearn
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
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
    check_is_fitted,
    validate_data,
)

from sklembed._validation import (
    check_class_weight,
    check_routing_enabled,
    check_vectors,
    split_rows,
)
from sklembed.fusion._base import (
    TINY,
    check_labelled_table,
    decided,
    find_prior,
    observed_modalities,
    probabilities,
    to_log_prior,
    warn_ignored,
)

LOG_TINY = np.log(TINY)
_ROWS_TO_FIND_ZEROS = (
    1024  # training rows by which a classifier that gives zeros is recognised
)


class DecisionFusionClassifier(ClassifierMixin, BaseEstimator):
    """Classify each modality by a classifier of its own, and pool their probabilities.

    Each classifier is trained on the rows that have its modality. The prediction for a row is the
    weighted mean over its observed modalities; with a single modality, it is that classifier's.
    Weights are learned from out-of-fold predictions. They are equal unless other weights make the
    labels clearly likelier; a modality without information then gets a low weight.

    Logarithms of probabilities are pooled in full precision, so that rare and many classes keep
    their order. A zero of a forest, a tree or of nearest neighbors only means that no such row was
    near. Therefore the geometric mean adds the class prior, with the weight of one training row, to
    the probabilities of classifiers that give zeros. No zero overrules all other modalities.

    Parameters
    ----------
    estimator : classifier, or dict of str to classifier
        The classifier that is cloned for each modality, or one classifier per block. It needs
        `predict_proba` once it is fitted. With several labels, a classifier that supports a single
        target only is fitted once per label.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``.

    weights : "auto", dict of str to float, or None, default="auto"
        Weight of each modality: learned from out-of-fold predictions, given, or equal (None).

    pooling : {"geometric", "arithmetic"}, default="geometric"
        Mean of the probabilities: geometric, which suits independent evidence, or arithmetic.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds by which weights are learned. If an int, the number of shuffled folds, in which
        classes and modalities are spread evenly; the shuffling has a fixed seed. It is capped at
        the size of the largest class; if every class has a single row, weights are equal. None
        means 5.

    n_jobs : int or None, default=None
        Number of classifiers to fit in parallel.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, their numbers.

    target_type_ : {"binary", "multiclass", "multilabel"}
        Kind of `y`.

    estimators_ : dict of str to classifier or list of classifier
        The fitted classifiers. As in :class:`~sklearn.ensemble.VotingClassifier`, they are fitted
        on codes: code ``i`` stands for ``estimator_classes_[name][i]``. With several labels, a
        classifier that supports a single target only is a list, with one entry for each label in
        ``estimator_classes_[name]``.

    estimator_classes_ : dict of str to ndarray
        The classes that occur in the training rows of each classifier. With several labels, the
        numbers of the labels that vary in these rows.

    weights_ : dict of str to float
        Weight of each modality; they sum to 1.

    floors_ : dict of str to ndarray of shape (2, n_classes) or (2, n_labels, 2)
        For each classifier, logarithms of what is added to its probabilities before pooling by the
        geometric mean, and of what a zero counts then.

    ignored_blocks_ : list of str
        Blocks without a classifier, because no training row has the modality, or all these rows
        have the same class. They weigh 0 and are ignored in prediction.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        The share of each class, or of rows with each label, in training. It is the prediction for
        rows without any modality.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    LateFusionClassifier : Joins modalities within one network.
    sklearn.ensemble.StackingClassifier : Learns from predictions what to make of them.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklembed import DecisionFusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X = np.hstack([X / 16, np.random.default_rng(0).normal(size=(len(X), 8))])
    >>> blocks = {"digit": slice(0, 64), "noise": slice(64, 72)}
    >>> fusion = DecisionFusionClassifier(LogisticRegression(max_iter=500), blocks=blocks).fit(X, y)
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
            Whether to include the classifiers in ``estimator={...}`` by the name of their block,
            such as ``text``, and their parameters, such as ``text__C``. A single classifier's
            parameters are called ``estimator__C``.

        Returns
        -------
        params : dict
            Parameter names mapped to their values.
        """
        params = super().get_params(deep=deep)
        if not deep or not isinstance(self.estimator, dict):
            return params
        for name, estimator in self.estimator.items():
            # A block may be called "cv" or "weights"; then the parameter keeps the bare name.
            params.setdefault(name, estimator)
            if hasattr(estimator, "get_params") and not isinstance(estimator, type):
                nested = estimator.get_params(deep=True)
                params |= {f"{name}__{key}": value for key, value in nested.items()}
        return params

    def set_params(self, **params):
        """Set parameters, replace classifiers of ``estimator={...}``, or set their parameters.

        After `fit`, parameters of a classifier are set in the fitted classifiers too, as in a
        :class:`~sklearn.pipeline.Pipeline`; those that matter in training only need another `fit`.

        Parameters
        ----------
        **params : dict
            For example ``pooling="arithmetic"``, ``estimator__C=10`` for a single classifier,
            ``text__C=10`` for that of a block, or ``text=GaussianNB()`` to replace it.

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
        own_names = self.get_params(deep=False)
        for name in self.estimator:
            if name in params and name not in own_names:
                self.estimator = {**self.estimator, name: params.pop(name)}
        # The longest name first, as a block may be called "text" and another "text__title".
        for name in sorted(self.estimator, key=len, reverse=True):
            nested, params = _split_prefix(params, f"{name}__")
            if nested:
                self.estimator[name].set_params(**nested)
                _set_fitted(fitted.get(name, []), nested)
        nested, _ = _split_prefix(params, "estimator__")
        if nested:
            raise ValueError(
                f"estimator is a dict, so that parameters are set by the name of the block, such "
                f"as '{next(iter(self.estimator), 'text')}__C'; got {sorted(params)}."
            )
        return super().set_params(**params)

    @_fit_context(
        prefer_skip_nested_validation=False
    )  # classifiers validate themselves
    def fit(self, X, y, sample_weight=None, **params):
        """Fit a classifier for each modality, and learn the weights.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing one is a block of NaN. A modality
            that no row has, or only rows of one class, is ignored with a warning.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, passed on to the classifiers. With metadata routing, they are
            passed on to classifiers that request them, for example a step of a pipeline.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`, or for the classifiers; needs
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        self : DecisionFusionClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is one class only, the columns do not make up blocks, no
            modality can be learned from, a cell is not a number, a block is NaN in part of a row,
            a classifier takes no `sample_weight`, or a classifier has no `predict_proba`.
        """
        check_routing_enabled(params, self)
        X, target = check_labelled_table(self, X, y, dtype=FLOAT_DTYPES, reset=True)
        estimators = self._check_estimators(sample_weight)
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        metadata = self._route(sample_weight, weight, params)
        observed = dict(
            zip(self.blocks_, observed_modalities(X, self.blocks_).T, strict=True)
        )
        data = _TrainingSet(
            X, target.values.astype(np.int64), weight, observed, metadata
        )
        self.prior_ = find_prior(target, weight)
        self.ignored_blocks_ = self._find_ignored(data)
        folds = self._folds(data, target, metadata["splitter"])
        all_rows, *by_fold = self._fit_each(
            estimators, data, [np.arange(len(X)), *(train for train, _ in folds)]
        )
        self.estimators_, self.estimator_classes_, self.floors_ = {}, {}, {}
        for name, fitted in all_rows.items():
            self.estimators_[name] = fitted.estimator
            self.estimator_classes_[name] = self.classes_[fitted.present]
            self.floors_[name] = fitted.floors
        self.weights_ = self._find_weights(data, folds, by_fold)
        return self

    def predict_proba(self, X):
        """Return the probability of each class, or of each label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Rows sum to 1 for classes; labels have a probability each.
        """
        return probabilities(self.decision_function(X), self.target_type_)

    def decision_function(self, X):
        """Return the log-probability of each class, or the log-odds of the second, or of labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples,), (n_samples, n_classes) or (n_samples, n_labels)
            One number per row for two classes.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = validate_data(
            self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False, reset=False
        )
        logs = self._pool(X, observed_modalities(X, self.blocks_))
        return (
            logs if self.target_type_ == "multiclass" else logs[..., 1] - logs[..., 0]
        )

    def predict(self, X):
        """Return the most likely class, or mark the labels that are likelier than not.

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
        """Return the routing of `fit`'s metadata to the classifiers and the `cv` splitter.

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
        """Return the classifier to clone for each block."""
        estimators = self.estimator
        if not isinstance(estimators, dict):
            estimators = dict.fromkeys(self.blocks_, estimators)
        if set(estimators) != set(self.blocks_):
            raise ValueError(
                f"estimator holds classifiers of {sorted(estimators)}, but the blocks are "
                f"{sorted(self.blocks_)}. Give one for each block, or a single one for all."
            )
        for name, estimator in estimators.items():
            if isinstance(estimator, type) or not hasattr(estimator, "fit"):
                raise ValueError(
                    f"The classifier of block {name!r} should be an instance of a classifier; got "
                    f"{estimator!r}."
                )
            # Some get predict_proba in fit, but their class has it beforehand.
            if not hasattr(estimator, "predict_proba"):
                _check_predict_proba(type(estimator), name)
            if sample_weight is not None and not _routing_is_enabled():
                _check_takes_weights(estimator, name)
            if self.target_type_ != "multilabel":
                _check_class_weights(estimator, name, self.classes_)
        return {name: estimators[name] for name in self.blocks_}

    def _route(self, sample_weight, weight, params):
        """Return what is passed to the splitter, and to the classifier of each block."""
        if not _routing_is_enabled():
            to_fit = {} if sample_weight is None else {"sample_weight": weight}
            return dict.fromkeys(self.blocks_, to_fit) | {"splitter": {}}
        if sample_weight is not None:
            params = {**params, "sample_weight": weight}
        routed = process_routing(self, "fit", **params)
        several = isinstance(self.estimator, dict)
        targets = {
            name: f"estimator_{name}" if several else "estimator"
            for name in self.blocks_
        }
        metadata = {name: routed[target]["fit"] for name, target in targets.items()}
        return metadata | {"splitter": routed["splitter"]["split"]}

    def _find_ignored(self, data):
        """List the blocks of which nothing can be learned, with a warning for each."""
        reasons = {}
        for name, observed in data.observed.items():
            rows = observed & (data.weight > 0)
            if not rows.any():
                reasons[name] = "is NaN in all rows that count"
            elif not len(_classes_in(data.codes[rows])):
                reasons[name] = (
                    f"is observed in {rows.sum()} rows that count, all of one class"
                )
        if len(reasons) == len(self.blocks_):
            raise ValueError(
                f"None of the blocks {list(self.blocks_)} is observed in rows of two classes, so "
                "nothing can be learned. Check the step before."
            )
        for name, reason in reasons.items():
            warn_ignored(name, reason)
        return list(reasons)

    def _folds(self, data, target, metadata):
        """List the folds by which weights are learned; none where they are not needed."""
        if self.weights != "auto" or len(self.blocks_) - len(self.ignored_blocks_) < 2:
            return []
        cv = 5 if self.cv is None else self.cv
        if isinstance(cv, Integral):
            observed = np.stack(list(data.observed.values()), axis=1)
            return _spread_folds(_strata(target), observed, cv)
        y = data.codes if target.kind == "multilabel" else target.classes[data.codes]
        return split_rows(check_cv(cv), data.X, y, metadata)

    def _fit_each(self, estimators, data, row_sets):
        """Fit every modality's classifier on each of several sets of rows."""
        names = [name for name in self.blocks_ if name not in self.ignored_blocks_]
        log_prior = to_log_prior(self.prior_, self.target_type_)
        fitted = Parallel(n_jobs=self.n_jobs)(
            delayed(_fit_modality)(
                estimators[name],
                data.of_block(name, self.blocks_, rows),
                name,
                self.classes_,
                log_prior,
            )
            for rows in row_sets
            for name in names
        )
        results = iter(fitted)
        return [{name: next(results) for name in names} for _ in row_sets]

    def _pool(self, X, observed):
        """Return logarithms of the pooled probabilities, of shape (n_samples, ..., n_classes)."""
        log_prior = to_log_prior(self.prior_, self.target_type_)
        names = [name for name in self.blocks_ if name not in self.ignored_blocks_]
        observed = observed[:, np.isin(list(self.blocks_), names)]
        weights = observed * np.array([self.weights_[name] for name in names])
        # A row whose only modalities weigh nothing is still theirs to decide.
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, observed)
        total = weights.sum(axis=1)
        weights = weights / np.where(total > 0, total, 1.0)[:, None]
        logs = np.zeros((len(names), len(X), *log_prior.shape))
        smoothed = np.zeros_like(logs)
        for number, name in enumerate(names):
            rows = np.flatnonzero(observed[:, number])
            if len(rows):
                fitted = self._fitted(name)
                block = X[rows][:, self.blocks_[name]]
                logs[number, rows] = fitted.log_proba(block, log_prior)
                smoothed[number, rows] = _smooth(logs[number, rows], fitted.floors)
        factors = np.expand_dims(weights.T, tuple(range(2, logs.ndim)))
        if self.pooling == "geometric":
            pooled = (factors * smoothed).sum(axis=0)
        else:
            with np.errstate(divide="ignore"):  # where all say 0
                pooled = logsumexp(logs, axis=0, b=factors)
        alone = np.flatnonzero((weights > 0).sum(axis=1) == 1)
        pooled[alone] = logs[weights[alone].argmax(axis=1), alone]
        pooled[total == 0] = log_prior
        pooled = log_softmax(pooled, axis=-1)
        return np.where(np.isneginf(pooled), LOG_TINY, pooled)

    def _fitted(self, name):
        """Return what `fit` has learned of one modality."""
        present = np.flatnonzero(np.isin(self.classes_, self.estimator_classes_[name]))
        return _Fitted(self.estimators_[name], present, self.floors_[name])

    def _find_weights(self, data, folds, by_fold):
        """Return the weight of each modality: given, equal, or learned out of fold."""
        if isinstance(self.weights, dict):
            return _check_weights(self.weights, list(self.blocks_))
        names = [name for name in self.blocks_ if name not in self.ignored_blocks_]
        learned = np.full(len(names), 1 / len(names))
        if folds:
            log_prior = to_log_prior(self.prior_, self.target_type_)
            logs = np.full((len(names), len(data.X), *log_prior.shape), np.nan)
            for (_, held_out), fitted in zip(folds, by_fold, strict=True):
                for number, name in enumerate(names):
                    rows = held_out[data.observed[name][held_out]]
                    if len(rows) and fitted[name] is not None:
                        block = data.X[rows][:, self.blocks_[name]]
                        evidence = fitted[name].log_proba(block, log_prior)
                        logs[number, rows] = _smooth(evidence, fitted[name].floors)
            learned = _learn_weights(logs, log_prior, data.codes, data.weight)
        return dict.fromkeys(self.blocks_, 0.0) | dict(
            zip(names, learned.tolist(), strict=True)
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _routing_is_enabled():
    return sklearn.get_config()["enable_metadata_routing"]


class _TrainingSet(NamedTuple):
    """A training set of decision fusion; codes are of classes, or 0/1 for each label."""

    X: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    observed: dict  # a mask of the rows for each modality
    metadata: dict  # what is passed on to the classifier of each modality

    def of_block(self, name, blocks, rows):
        """Return the rows, of some, that have a modality and count; only its columns."""
        rows = rows[self.observed[name][rows] & (self.weight[rows] > 0)]
        metadata = {
            key: _take_rows(value, rows, len(self.X))
            for key, value in self.metadata[name].items()
        }
        X = self.X[rows][:, blocks[name]]
        return _BlockRows(X, self.codes[rows], self.weight[rows], metadata)


class _BlockRows(NamedTuple):
    """The training rows of one modality's classifier."""

    X: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    metadata: dict


class _Fitted(NamedTuple):
    """A modality's classifier, or a list for labels; the classes in its rows; its floors."""

    estimator: object
    present: np.ndarray
    floors: np.ndarray | None

    def log_proba(self, X, log_prior):
        """Return log-probabilities of all classes; absent ones keep their prior."""
        logs = _log_proba(self.estimator, X)
        result = np.tile(log_prior, (len(X), *[1] * log_prior.ndim))
        if log_prior.ndim == 2:
            result[:, self.present] = _pairs(logs, len(self.present))
        else:
            share = logsumexp(log_prior[self.present]) - logsumexp(log_prior)
            result[:, self.present] = logs + share
        return result


def _split_prefix(params, prefix):
    """Split parameters into those with a prefix, which is removed, and the rest."""
    nested = {
        k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)
    }
    return nested, {k: v for k, v in params.items() if not k.startswith(prefix)}


def _set_fitted(estimators, params):
    """Set parameters of a fitted classifier, or of those of all labels."""
    for estimator in estimators if isinstance(estimators, list) else [estimators]:
        estimator.set_params(**params)


def _take_rows(value, rows, n_rows):
    """Take rows of metadata that holds a value per row."""
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != n_rows:
        return value
    return np.asarray(value)[rows]


def _check_predict_proba(estimator, name):
    """Refuse a classifier without probabilities."""
    if not hasattr(estimator, "predict_proba"):
        raise ValueError(
            f"The classifier of block {name!r}, {estimator!r}, has no predict_proba, and "
            "probabilities are pooled. Wrap it in CalibratedClassifierCV."
        )


def _check_takes_weights(estimator, name):
    """Refuse sample weights for a classifier that cannot use them without metadata routing."""
    where = f"The classifier of block {name!r}, {estimator!r}, "
    if isinstance(estimator, Pipeline):
        raise ValueError(
            f"{where}is a pipeline, which passes sample_weight on by metadata routing only. Call "
            "sklearn.set_config(enable_metadata_routing=True), and request the weights where they "
            "are used, for example by LogisticRegression().set_fit_request(sample_weight=True)."
        )
    parameters = signature(estimator.fit).parameters
    passes_on = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if "sample_weight" not in parameters and not passes_on:
        raise ValueError(f"{where}takes no sample_weight.")


def _class_weights(estimator):
    """List the class weights by label among the parameters of a classifier."""
    params = estimator.get_params() if hasattr(estimator, "get_params") else {}
    return {
        key: value
        for key, value in params.items()
        if key.split("__")[-1] == "class_weight" and isinstance(value, dict)
    }


def _check_class_weights(estimator, name, classes):
    """Check class weights among the parameters of a classifier, as `check_class_weight` does."""
    for key, weights in _class_weights(estimator).items():
        try:
            check_class_weight(weights, classes)
        except ValueError as error:
            error.add_note(f"This was {key} of the classifier of block {name!r}.")
            raise


def _check_weights(weights, names):
    """Return weights of modalities that are given, scaled to sum to 1."""
    values = np.array([weights.get(name, np.nan) for name in names], dtype=float)
    valid = np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0
    if set(weights) != set(names) or not valid:
        raise ValueError(
            f"weights={weights!r} must give each of the blocks {names} a number that is finite and "
            "not negative, and one of them more than 0."
        )
    return dict(zip(names, (values / values.sum()).tolist(), strict=True))


def _classes_in(codes):
    """Return the classes that occur, or the labels that vary; none where rows are all alike."""
    if codes.ndim == 1:
        classes = np.unique(codes)
        return classes if len(classes) > 1 else classes[:0]
    if not len(codes):
        return np.arange(0)
    return np.flatnonzero((codes != codes[0]).any(axis=0))


def _strata(target):
    """Return what folds are stratified by: the class, or the rarest label of each row."""
    if target.kind != "multilabel":
        return target.strata
    frequency = target.values.sum(axis=0)
    frequency_of_carried = np.where(target.values > 0, frequency, np.inf)
    rarest = frequency_of_carried.argmin(axis=1)
    return np.where(target.values.any(axis=1), rarest, target.values.shape[1])


def _spread_folds(strata, observed, n_folds):
    """Make shuffled folds over which classes, and rows with each modality, are spread evenly.

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
    # Rows with the rarest combination of modalities choose first, as they are hardest to spread.
    for pattern in np.argsort(np.bincount(pattern_of), kind="stable"):
        rows_of_pattern = shuffled[pattern_of[shuffled] == pattern]
        rows_of_pattern = rows_of_pattern[
            np.argsort(strata[rows_of_pattern], kind="stable")
        ]
        starts = np.flatnonzero(np.diff(strata[rows_of_pattern])) + 1
        for rows in np.split(rows_of_pattern, starts):
            n_in_class = n_of_class[strata[rows[0]]]
            crowded = n_of_modality @ (patterns[pattern] * rarity)
            n_each, n_left = divmod(len(rows), n_folds)
            least_filled = np.lexsort((n_of_class.sum(axis=0), crowded, n_in_class))
            folds = np.r_[np.repeat(np.arange(n_folds), n_each), least_filled[:n_left]]
            fold_of[rows] = folds
            counts = np.bincount(folds, minlength=n_folds)
            n_in_class += counts
            n_of_modality += counts[:, None] * patterns[pattern]
    return [
        (np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold))
        for fold in range(n_folds)
    ]


def _fit_modality(estimator, part, name, classes, log_prior):
    """Fit one modality's classifier; None if its rows are all of one class."""
    present = _classes_in(part.codes)
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
            f"This was the classifier of block {name!r}, given {len(part.X)} rows."
        )
        raise
    for one in estimator if isinstance(estimator, list) else [estimator]:
        _check_predict_proba(one, name)
    fitted = _Fitted(estimator, present, None)
    return fitted._replace(floors=_find_floors(fitted, part, log_prior))


def _clone_for_codes(estimator, labels):
    """Clone a classifier that will be shown codes of labels, as its class weights then are too."""
    estimator = clone(estimator)
    labels = labels.tolist()
    for key, weights in _class_weights(estimator).items():
        by_code = {
            labels.index(label): w for label, w in weights.items() if label in labels
        }
        estimator.set_params(**{key: by_code})
    return estimator


def _fit_labels(estimator, part, y):
    """Fit a classifier on several labels, or one for each label if it supports a single target."""
    tags = get_tags(estimator)
    if y.shape[1] == 1 and tags.target_tags.single_output:
        return clone(estimator).fit(part.X, y[:, 0], **part.metadata)
    if tags.classifier_tags.multi_label or tags.target_tags.multi_output:
        return clone(estimator).fit(part.X, y, **part.metadata)
    return [clone(estimator).fit(part.X, label, **part.metadata) for label in y.T]


def _log_proba(estimator, X):
    """Return a classifier's log-probabilities, -inf for 0; a list if it returns one."""
    if isinstance(estimator, list):
        return [_log_proba(one, X) for one in estimator]
    with np.errstate(divide="ignore"):
        # Naive Bayes knows logarithms where the probability underflows.
        if hasattr(estimator, "predict_log_proba"):
            return estimator.predict_log_proba(X)
        probabilities = estimator.predict_proba(X)
        if isinstance(probabilities, list):
            return [np.log(p.astype(np.float64)) for p in probabilities]
        return np.log(np.asarray(probabilities, dtype=np.float64))


def _pairs(logs, n_labels):
    """Bring log-probabilities of labels into the shape (n_samples, n_labels, 2): not, and yes."""
    if isinstance(logs, list):
        return np.stack(logs, axis=1)
    if n_labels == 1 and logs.shape[1] == 2:
        return logs[:, None]
    logs = np.minimum(logs, 0)
    with np.errstate(divide="ignore"):
        return np.stack([np.log(-np.expm1(logs)), logs], axis=-1)


def _find_floors(fitted, part, log_prior):
    """Return what is added to probabilities before pooling, and what a zero counts, as logarithms.

    A zero of a forest, of a tree or of neighbors only means that no training row with this class
    was near. It counts as one more row would that belonged to all classes by their prior, or as the
    smallest probability that the classifier gives, if that is less.
    """
    step = max(1, len(part.X) // _ROWS_TO_FIND_ZEROS)
    logs = fitted.log_proba(part.X[::step], log_prior)
    smallest = min(-np.log1p(part.weight.sum()), logs[np.isfinite(logs)].min())
    floor = log_prior + smallest
    # Where there are zeros, all probabilities are raised by the floor, which keeps their order.
    # Other classifiers' probabilities count as they are, however small.
    gives_zeros = np.isneginf(logs).any()
    return np.stack([floor if gives_zeros else np.full_like(floor, -np.inf), floor])


def _smooth(logs, floors):
    """Return finite log-probabilities for pooling by the geometric mean; they need not sum to 1."""
    added, zero = floors
    logs = np.logaddexp(logs, added)
    return np.where(np.isneginf(logs), zero, logs)


def _learn_weights(logs, log_prior, codes, sample_weight):
    """Average weights of modalities by how likely they make the labels, out of fold.

    Candidates are equal weights, equal weights of fewer modalities, and weights fitted freely. A
    candidate counts by how much likelier than equal weights it makes the labels, after a cost: one
    unit of log-likelihood for each modality left out, and half the logarithm of the number of rows
    for each free weight, as in Schwarz's criterion. If none is worth its cost, weights are equal.

    Parameters
    ----------
    logs : ndarray of shape (n_modalities, n_samples, n_classes) or (..., n_labels, 2)
        Log-probabilities out of fold; NaN where a row lacks the modality.
    log_prior : ndarray of shape (n_classes,) or (n_labels, 2)
        Logarithms of the prior.
    codes : ndarray of int of shape (n_samples,) or (n_samples, n_labels)
        The true classes or labels.
    sample_weight : ndarray of shape (n_samples,)
        Weights of the rows.

    Returns
    -------
    weights : ndarray of shape (n_modalities,)
        They sum to 1.
    """
    n_modalities = len(logs)
    equal = np.full(n_modalities, 1 / n_modalities)
    n_observed = (~np.isnan(logs.reshape(*logs.shape[:2], -1)[..., 0])).sum(axis=0)
    rows = np.flatnonzero((n_observed > 1) & (sample_weight > 0))
    if not len(rows):
        return equal
    pool = _PoolOfEvidence.of(
        logs[:, rows], log_prior, codes[rows], sample_weight[rows]
    )
    cost_of_free_weight = 0.5 * np.log(max(pool.importance.sum(), 8))
    used = np.arange(n_modalities)
    baseline = pool.fit_equal(used)
    weights, shares = [equal], [1.0]
    while len(used) > 1:
        cost = float(n_modalities - len(used))
        fitted, free_likelihood = pool.fit_free(used)
        weights.append(fitted)
        free_cost = cost + cost_of_free_weight * (len(used) - 1)
        shares.append(_worth(free_likelihood - free_cost - baseline))
        # Leave out the modality that is missed least.
        subsets = [np.delete(used, i) for i in range(len(used))]
        likelihoods = [pool.fit_equal(subset) for subset in subsets]
        used, likelihood = max(
            zip(subsets, likelihoods, strict=True), key=lambda pair: pair[1]
        )
        weights.append(np.isin(np.arange(n_modalities), used) / len(used))
        shares.append(_worth(likelihood - cost - 1 - baseline))
    return np.average(weights, axis=0, weights=shares)


def _worth(gain):
    """Return the share of a candidate that gains in log-likelihood on equal weights of share 1."""
    return np.expm1(np.clip(gain, 0, 100))


class _PoolOfEvidence(NamedTuple):
    """Choices between classes, and the evidence of each modality for each class.

    Evidence is what a log-probability differs from the log prior by. Its weighted sum is scaled
    freely, as classifiers may be too sure or not sure enough of themselves.
    """

    evidence: np.ndarray  # (n_modalities, n_choices, n_classes)
    log_prior: np.ndarray  # (n_choices, n_classes)
    y: np.ndarray
    importance: np.ndarray

    @classmethod
    def of(cls, logs, log_prior, codes, sample_weight):
        """Make a choice of each row; of each label, which together count as one row."""
        evidence = np.nan_to_num(logs - log_prior)
        log_prior = np.broadcast_to(log_prior, evidence.shape[1:])
        if codes.ndim == 2:
            n_labels = codes.shape[1]
            evidence = evidence.reshape(len(logs), -1, 2)
            log_prior = log_prior.reshape(-1, 2)
            sample_weight = np.repeat(sample_weight / n_labels, n_labels)
        return cls(evidence, log_prior, codes.ravel(), sample_weight)

    def fit_equal(self, used):
        """Return the log-likelihood of equal weights of some modalities."""
        evidence = self.evidence[used].mean(axis=0, keepdims=True)

        def loss(scale):
            value, by_scale = self._loss(np.exp(scale), evidence)
            return value, by_scale * np.exp(scale)

        return -minimize(loss, np.zeros(1), jac=True, bounds=[(-10, 10)]).fun

    def fit_free(self, used):
        """Return the likeliest weights of some modalities, and their log-likelihood."""
        evidence = self.evidence[used]

        def loss(parameters):
            shares = softmax(parameters[1:])
            scaled = np.exp(parameters[0]) * shares
            value, by_scaled = self._loss(scaled, evidence)
            total = (by_scaled * scaled).sum()
            return value, np.r_[total, by_scaled * scaled - shares * total]

        bounds = [(-10, 10)] * (len(used) + 1)
        result = minimize(loss, np.zeros(len(used) + 1), jac=True, bounds=bounds)
        weights = np.zeros(len(self.evidence))
        weights[used] = softmax(result.x[1:])
        return weights, -result.fun

    def _loss(self, scaled, evidence):
        """Return minus the log-likelihood of scaled weights, and its gradient."""
        right = np.arange(len(self.y)), self.y
        log_p = log_softmax(self.log_prior + np.tensordot(scaled, evidence, 1), axis=1)
        surprise = np.exp(log_p)
        surprise[right] -= 1
        surprise *= self.importance[:, None]
        gradient = np.tensordot(evidence, surprise, 2)
        return -(self.importance * log_p[right]).sum(), gradient
