"""Classifiers of several modalities: joined before a head, within it, or by their decisions."""

import warnings
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context, clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils import compute_class_weight, gen_batches, get_tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    FLOAT_DTYPES,
    _check_sample_weight,
    check_is_fitted,
    has_fit_parameter,
    validate_data,
)

from sklembed import _callbacks
from sklembed._blocks import moments, observed_in_block, resolve_blocks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._targets import encode_target, hold_back
from sklembed._validation import (
    check_layer_sizes,
    check_no_missing_label,
    check_routing_enabled,
    draw_seed,
)

_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the processor's caches
_RARE = 1e-3  # the least that a probability counts for as evidence: no classifier has a veto


class _FusionClassifier(CallbackSupportMixin, ClassifierMixin, BaseEstimator):
    """What the two trained heads share; a subclass says where modalities are joined."""

    _parameter_constraints: dict = {
        "hidden_layer_sizes": ["array-like"],
        "blocks": [dict, None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "modality_dropout": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "skorch_params": [dict, None],
    }

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None):
        """Train the head.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing one is a block of NaN. Rows
            without any modality train nothing.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss; a row of weight 0 is not seen.

        Returns
        -------
        self : estimator
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is one class only, the columns do not make up blocks, a
            modality is missing in all rows, or a block is NaN in part of a row.
        """
        goes_on = self.warm_start and hasattr(self, "weights_")
        check_layer_sizes(self.hidden_layer_sizes)
        X, target = _check_table(self, X, y, dtype=np.float32, reset=not goes_on)
        weight = self._row_weights(X, target, sample_weight)
        table = X
        X, there = _by_modality(table, self.blocks_)
        rows = np.flatnonzero(there.any(axis=1) & (weight > 0))
        self._check_rows(there, rows)
        if goes_on:
            self._check_goes_on(X.shape[1])
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        _callbacks.begin(self, context, table, y)
        self.prior_ = _prior(target, weight)
        watch = _callbacks.each_epoch(self, context, table, y, _learnt)
        self._train(X, there, target, weight, rows, goes_on, watch)
        _callbacks.end(self, context, table, y)
        return self

    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples,), (n_samples, n_classes) or (n_samples, n_labels)
            One number of a row for two classes, of the second. Rows without any modality get those
            of the classes' shares in training.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, ensure_all_finite=False, reset=False)
        X, there = _by_modality(X, self.blocks_)
        logits = np.empty((len(X), len(self.weights_["output.bias"])))
        for rows in gen_batches(len(X), _CHUNK_ROWS):
            logits[rows] = self._logits(X[rows], there[rows])
        logits[~there.any(axis=1)] = _logits_of(self.prior_, self.target_type_)
        return logits[:, 0] if self.target_type_ == "binary" else logits

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
        return _probabilities(self.decision_function(X), self.target_type_)

    def predict(self, X):
        """Name the likeliest class, or mark the labels that are likelier than not.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Classes, or 0 and 1.
        """
        return _decided(self.predict_proba(X), self.classes_, self.target_type_)

    def _row_weights(self, X, target, sample_weight):
        """Return the weight of each row in the loss."""
        weight = _check_sample_weight(sample_weight, X, dtype=np.float32, ensure_non_negative=True)
        if self.class_weight is not None and target.kind == "multiclass":
            # of the rows that count, so that a row of weight 0 is as good as absent
            codes, counted = target.values, weight > 0
            present = np.unique(codes[counted])
            by_class = np.zeros(len(self.classes_), dtype=np.float32)
            by_class[present] = compute_class_weight(
                self.class_weight, classes=self.classes_[present], y=self.classes_[codes[counted]]
            )
            weight = weight * by_class[codes]
        return weight

    def _check_rows(self, there, rows):
        """Refuse a modality that no row has."""
        for number, name in enumerate(self.blocks_):
            if not there[rows, number].any():
                raise ValueError(
                    f"Block {name!r} is NaN in all {len(there)} rows that count, so nothing can be "
                    "learnt of it. Leave it out, or check the step before."
                )

    def _check_goes_on(self, n_features):
        """Refuse to go on training in a head of another shape."""
        inputs = [n_features] if self._fusion == "early" else list(self.widths_.values())
        expected = {
            f"chains.{chain}.{layer}.linear.weight": (n_out, n_in)
            for chain, width in enumerate(inputs)
            for layer, (n_in, n_out) in enumerate(
                zip([width, *self.hidden_layer_sizes], self.hidden_layer_sizes, strict=False)
            )
        }
        found = {k: v.shape for k, v in self.weights_.items() if k.endswith("linear.weight")}
        if found != expected:
            raise ValueError(
                f"The fitted head has layers of the shapes {list(found.values())}, but the "
                f"parameters ask for {list(expected.values())}, so training cannot go on. Clone "
                "the classifier to start anew."
            )

    def _train(self, X, there, target, weight, rows, goes_on, watch):
        """Train the head; the only place that needs torch."""
        from sklembed._training import Rows, Trained, TrainingOptions, train

        seed, start = draw_seed(self.random_state), None
        if goes_on:
            start = Trained(_with_network_axis(self.weights_), self.history_, {})
            scaling = self.weights_["mean"], self.weights_["scale"]
        else:
            scaling = self._find_scaling(X, there, rows)
        parts = Rows(rows)
        if self.early_stopping:
            strata = target.strata
            parts = Rows(*hold_back(rows, strata, self.validation_fraction, seed))
            if not len(parts.valid):
                raise ValueError(
                    f"early_stopping with validation_fraction={self.validation_fraction} leaves "
                    f"nothing to train on of {len(rows)} rows. Lower it, or switch early stopping "
                    "off."
                )
        trained = train(
            self._make_module(scaling),
            self._make_loss(target, rows, weight),
            X,
            _as_targets(target, self.target_type_),
            [parts],
            TrainingOptions.of(self, seed),
            sample_weight=None if (weight[rows] == 1).all() else weight,
            start=start,
            on_epoch=watch,
        )
        vars(self).update(_learnt(trained.history, trained.weights))

    def _find_scaling(self, X, there, rows):
        """Return the mean and scale of each column, by the training rows that have it."""
        means, scales, start = [], [], 0
        for number, width in enumerate(self.widths_.values()):
            seen, columns = rows[there[rows, number]], slice(start, start + width)
            chunks = gen_batches(len(seen), _CHUNK_ROWS)
            mean, scale = moments(X[seen[chunk], columns] for chunk in chunks)
            means.append(mean)
            scales.append(scale)
            start += width
        return np.concatenate(means), np.concatenate(scales)

    def _make_module(self, scaling):
        """Return a recipe for the head, given the generator to draw its weights from."""
        from sklembed._torch import to_tensor
        from sklembed.nn.modules import FusionHead

        mean, scale = scaling
        return lambda generator: FusionHead(
            list(self.widths_.values()),
            self.hidden_layer_sizes,
            len(self.classes_) if self.target_type_ != "binary" else 1,
            fusion=self._fusion,
            dropout=self.dropout,
            modality_dropout=self.modality_dropout,
            generator=generator,
            mean=to_tensor(mean, generator.device),
            scale=to_tensor(scale, generator.device),
        )

    def _make_loss(self, target, rows, weight):
        """Return the loss of a batch, given logits, targets and weights."""
        from sklembed.nn.losses import binary_cross_entropy, cross_entropy

        if self.target_type_ == "multiclass":
            return cross_entropy
        if self.target_type_ == "binary" or self.class_weight is None:
            return binary_cross_entropy
        return self._weighted_loss(target.values[rows], weight[rows])

    def _weighted_loss(self, indicators, weight):
        """Weigh rows that carry a label, of several, against those that do not."""
        import torch

        from sklembed.nn.losses import binary_cross_entropy

        if self.class_weight == "balanced":
            carried = np.average(indicators, axis=0, weights=weight)
            odds = np.where(carried > 0, (1 - carried) / np.maximum(carried, _RARE), 1.0)
        else:
            odds = np.array([self.class_weight.get(label, 1.0) for label in self.classes_])
        odds = torch.from_numpy(odds.astype(np.float32))
        return lambda logits, y, weight: binary_cross_entropy(
            logits, y, weight, pos_weight=odds.to(logits.device)
        )

    def _logits(self, X, there):
        """Run the head in numpy, in double precision: so no digit depends on a row's batch."""
        weights = self.weights_
        X = (X.astype(np.float64) - weights["mean"]) / weights["scale"]
        np.nan_to_num(X, copy=False, nan=0.0)
        if self._fusion == "early":
            joined = _through(weights, 0, X)
        else:
            ends = np.cumsum(list(self.widths_.values()))
            parts = np.split(X, ends[:-1], axis=1)
            joined = np.hstack(
                [_through(weights, i, part) * there[:, [i]] for i, part in enumerate(parts)]
            )
        return joined @ weights["output.weight"].T + weights["output.bias"]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class EarlyFusionClassifier(_FusionClassifier):
    """Classify by a small network on the concatenated embeddings of all modalities.

    The early fusion of [1]_: concatenation, blocks of linear layer, ReLU, dropout and batch
    normalisation, and a linear layer.

    A modality may be missing: a block of NaN. Modalities are hidden at random in training
    (`modality_dropout`), so that one fit serves rows with any of them. Columns are standardised
    by the training rows. Probabilities of neural heads tend to be too sure; to calibrate them,
    wrap the head in :class:`~sklearn.calibration.CalibratedClassifierCV`, for example with
    ``method="temperature"``.

    The code released with [1]_ picks the epoch by the test rows, gives binary classes no weight
    whatever is asked, and trains without dropout; this head does none of these.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int, default=(256,)
        Units of the blocks on the concatenated modalities. ``()`` gives a linear classifier.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``.

    dropout : float, default=0.5
        Probability of leaving out a hidden unit in training.

    modality_dropout : float, default=0.3
        Probability of hiding a modality of a row in training, so that one fit serves every subset
        of modalities. A row always keeps one.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn. With several labels, the weight of rows
        that carry a label against those that do not; "balanced" makes both weigh the same.

    max_epochs : int, default=30
        Passes over the training rows.

    batch_size : int, default=64
        Rows in a batch, at most; an epoch is split into batches of nearly equal size.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold back a part of the training rows, stop when the loss on it no longer
        falls, and return to the best epoch.

    validation_fraction : float, default=0.1
        The part that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without a better loss after which early stopping stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the head of the fit before. The part that early stopping
        holds back is the same if `random_state` is an integer.

    device : str, default="auto"
        Where to train: "auto" takes an accelerator if there is one, else the CPU. Predictions are
        always made in numpy.

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the part held back.

    verbose : int, default=0
        Level of the training log that skorch prints.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``; they
        override what the other parameters set.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, their numbers.

    target_type_ : {"binary", "multiclass", "multilabel"}
        What `y` holds.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    weights_ : dict of str to ndarray
        The head.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        The share of each class, or of rows with each label, in training: the answer for rows
        without any modality.

    history_ : list of dict
        An entry for each epoch, with its mean loss.

    n_iter_ : int
        Number of epochs run.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    LateFusionClassifier : Gives each modality blocks of its own.
    DecisionFusionClassifier : Averages the decisions of any classifiers.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector Embedding
       Alignment Approach. arXiv 2406.02601.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import EarlyFusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> halves = {"upper": slice(0, 32), "lower": slice(32, 64)}
    >>> classifier = EarlyFusionClassifier(blocks=halves, max_epochs=5, random_state=0)
    >>> classifier.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
    True
    """

    _fusion = "early"

    def __init__(
        self,
        hidden_layer_sizes=(256,),
        *,
        blocks=None,
        dropout=0.5,
        modality_dropout=0.3,
        class_weight=None,
        max_epochs=30,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.01,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        warm_start=False,
        device="auto",
        random_state=None,
        verbose=0,
        skorch_params=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.blocks = blocks
        self.dropout = dropout
        self.modality_dropout = modality_dropout
        self.class_weight = class_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.skorch_params = skorch_params


class LateFusionClassifier(_FusionClassifier):
    """Classify by a network that gives each modality hidden layers of its own, and joins them.

    The late fusion of [1]_: for each modality, blocks of linear layer, ReLU, dropout and batch
    normalisation; then concatenation, and a linear layer. What a row lacks adds nothing.

    A modality may be missing: a block of NaN. Modalities are hidden at random in training
    (`modality_dropout`), so that one fit serves rows with any of them. Columns are standardised
    by the training rows. Probabilities of neural heads tend to be too sure; to calibrate them,
    wrap the head in :class:`~sklearn.calibration.CalibratedClassifierCV`, for example with
    ``method="temperature"``.

    The code released with [1]_ picks the epoch by the test rows, gives binary classes no weight
    whatever is asked, and trains without dropout; this head does none of these.

    Parameters
    ----------
    hidden_layer_sizes : tuple of int, default=(256,)
        Units of the blocks of each modality. ``()`` gives a linear classifier.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``.

    dropout : float, default=0.5
        Probability of leaving out a hidden unit in training.

    modality_dropout : float, default=0.3
        Probability of hiding a modality of a row in training, so that one fit serves every subset
        of modalities. A row always keeps one.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn. With several labels, the weight of rows
        that carry a label against those that do not; "balanced" makes both weigh the same.

    max_epochs : int, default=30
        Passes over the training rows.

    batch_size : int, default=64
        Rows in a batch, at most; an epoch is split into batches of nearly equal size.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold back a part of the training rows, stop when the loss on it no longer
        falls, and return to the best epoch.

    validation_fraction : float, default=0.1
        The part that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without a better loss after which early stopping stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the head of the fit before. The part that early stopping
        holds back is the same if `random_state` is an integer.

    device : str, default="auto"
        Where to train: "auto" takes an accelerator if there is one, else the CPU. Predictions are
        always made in numpy.

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the part held back.

    verbose : int, default=0
        Level of the training log that skorch prints.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``; they
        override what the other parameters set.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, their numbers.

    target_type_ : {"binary", "multiclass", "multilabel"}
        What `y` holds.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    weights_ : dict of str to ndarray
        The head.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        The share of each class, or of rows with each label, in training: the answer for rows
        without any modality.

    history_ : list of dict
        An entry for each epoch, with its mean loss.

    n_iter_ : int
        Number of epochs run.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    EarlyFusionClassifier : Concatenates before the hidden layers.
    DecisionFusionClassifier : Averages the decisions of any classifiers.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector Embedding
       Alignment Approach. arXiv 2406.02601.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import LateFusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> halves = {"upper": slice(0, 32), "lower": slice(32, 64)}
    >>> classifier = LateFusionClassifier(blocks=halves, max_epochs=10, random_state=0)
    >>> classifier.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
    True
    """

    _fusion = "late"

    def __init__(
        self,
        hidden_layer_sizes=(256,),
        *,
        blocks=None,
        dropout=0.5,
        modality_dropout=0.3,
        class_weight=None,
        max_epochs=30,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.01,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        warm_start=False,
        device="auto",
        random_state=None,
        verbose=0,
        skorch_params=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.blocks = blocks
        self.dropout = dropout
        self.modality_dropout = modality_dropout
        self.class_weight = class_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.skorch_params = skorch_params


class DecisionFusionClassifier(ClassifierMixin, BaseEstimator):
    """Classify each modality by a classifier of its own, and average their probabilities.

    Each classifier is trained on the rows that have its modality. A row's answer is the weighted
    mean over the modalities that it has; where it has one only, it is that classifier's. Weights
    are learnt from predictions out of fold, as those with which the classifiers' log-probabilities
    add up to the likeliest labels: a modality that tells nothing gets next to none.

    Parameters
    ----------
    estimator : classifier, or dict of str to classifier
        What is cloned for each modality, or the classifier of each block. It needs
        `predict_proba`.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``.

    weights : "auto", dict of str to float, or None, default="auto"
        How much each modality counts: learnt out of fold, given, or all alike.

    pooling : {"geometric", "arithmetic"}, default="geometric"
        The mean that is taken of probabilities: of their logarithms, as fits independent
        evidence, or of themselves.

    cv : int, cross-validation splitter or iterable, default=5
        Folds by which weights are learnt. An int is never more than the smallest class with at
        least two rows has rows; where all have one, modalities count alike.

    n_jobs : int or None, default=None
        Classifiers to fit at once.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, their numbers.

    target_type_ : {"binary", "multiclass", "multilabel"}
        What `y` holds.

    estimators_ : dict of str to classifier
        The fitted classifiers.

    weights_ : dict of str to float
        How much each modality counts; they sum to 1.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        The share of each class, or of rows with each label, in training: the answer for rows
        without any modality.

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

    @_fit_context(prefer_skip_nested_validation=False)  # classifiers validate themselves
    def fit(self, X, y, sample_weight=None, **params):
        """Fit a classifier for each modality, and learn how much each counts.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing one is a block of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, handed to the classifiers.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`; needs
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        self : DecisionFusionClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is one class only, the columns do not make up blocks, a
            modality is missing in all rows, or a classifier has no `predict_proba`.
        """
        check_routing_enabled(params, self)
        routed = process_routing(self, "fit", **params)
        X, target = _check_table(self, X, y, dtype=FLOAT_DTYPES, reset=True)
        estimators = self._check_estimators(sample_weight)
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        there = np.stack([observed_in_block(X, *block) for block in self.blocks_.items()], axis=1)
        missing = [name for name, has in zip(self.blocks_, there.T, strict=True) if not has.any()]
        if missing:
            raise ValueError(
                f"Block {missing[0]!r} is NaN in all {len(X)} rows, so nothing can be learnt of "
                "it. Leave it out, or check the step before."
            )
        self.prior_ = _prior(target, weight)
        data = _Decided(
            X,
            target.values if target.kind == "multilabel" else target.classes[target.values],
            None if sample_weight is None else weight,
            there,
        )
        folds = []
        if self.weights == "auto" and len(self.blocks_) > 1:
            folds = self._folds(data, target, routed["splitter"]["split"])
        whole, *parts = self._fit_each(
            estimators, data, [np.arange(len(X)), *(f[0] for f in folds)]
        )
        self.estimators_ = dict(zip(self.blocks_, whole, strict=True))
        self.weights_ = self._find_weights(data, target, folds, parts)
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
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False, reset=False)
        there = np.stack([observed_in_block(X, *block) for block in self.blocks_.items()], axis=1)
        each = self._each_proba(self.estimators_.values(), X, there)
        weights = there * np.array(list(self.weights_.values()))
        # A row whose only modalities weigh nothing is still theirs to decide.
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, there)
        total = weights.sum(axis=1)
        weights = weights / np.where(total > 0, total, 1.0)[:, None]
        shown = _evidence(each, self.target_type_) if self.pooling == "geometric" else each
        pooled = np.einsum("nm,mnc->nc", weights, np.where(there.T[..., None], shown, 0.0))
        if self.pooling == "geometric":
            several = self.target_type_ == "multilabel"
            pooled = expit(pooled) if several else softmax(pooled, axis=1)
        alone = np.flatnonzero((weights > 0).sum(axis=1) == 1)
        pooled[alone] = each[weights[alone].argmax(axis=1), alone]
        pooled[total == 0] = self.prior_
        return pooled

    def decision_function(self, X):
        """Return the log-probability of each class, or the log-odds of the second, or of labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples,), (n_samples, n_classes) or (n_samples, n_labels)
            One number of a row for two classes.
        """
        logits = _logits_of(self.predict_proba(X), self.target_type_)
        return logits[:, 0] if self.target_type_ == "binary" else logits

    def predict(self, X):
        """Name the likeliest class, or mark the labels that are likelier than not.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Classes, or 0 and 1.
        """
        return _decided(self.predict_proba(X), self.classes_, self.target_type_)

    def get_metadata_routing(self):
        """Say that metadata such as `groups` goes to the `cv` splitter.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        mapping = MethodMapping().add(caller="fit", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(splitter=self.cv, method_mapping=mapping)

    def _folds(self, data, target, routed):
        """List the folds by which weights are learnt; none, where every class has one row."""
        cv = self.cv
        if isinstance(cv, Integral) and target.strata is not None:
            sizes = np.bincount(target.strata)
            if sizes.max() < 2:
                return []
            # Never more folds than the smallest class that can be split at all has rows.
            cv = min(cv, sizes[sizes >= 2].min())
        splitter = check_cv(cv, data.y, classifier=True)
        with warnings.catch_warnings():  # of a class of one row, which is held out once
            warnings.filterwarnings("ignore", message="The least populated class")
            return list(splitter.split(data.X, data.y, **routed))

    def _check_estimators(self, sample_weight):
        """Return the classifier to clone for each block."""
        given = self.estimator
        if not isinstance(given, dict):
            given = dict.fromkeys(self.blocks_, given)
        if set(given) != set(self.blocks_):
            raise ValueError(
                f"estimator holds classifiers of {sorted(given)}, but the blocks are "
                f"{sorted(self.blocks_)}. Give one for each block, or a single one for all."
            )
        for name, estimator in given.items():
            if not hasattr(estimator, "predict_proba"):
                raise ValueError(
                    f"The classifier of block {name!r}, {estimator!r}, has no predict_proba, and "
                    "probabilities are what is averaged. Wrap it in CalibratedClassifierCV."
                )
            if sample_weight is not None and not has_fit_parameter(estimator, "sample_weight"):
                raise ValueError(
                    f"The classifier of block {name!r}, {estimator!r}, takes no sample_weight."
                )
        return [given[name] for name in self.blocks_]

    def _fit_each(self, estimators, data, parts):
        """Fit every modality's classifier on each of several sets of rows."""
        fitted = Parallel(n_jobs=self.n_jobs)(
            delayed(_fit_one)(estimator, data, rows, number, block)
            for rows in parts
            for number, (estimator, block) in enumerate(
                zip(estimators, self.blocks_.items(), strict=True)
            )
        )
        n = len(estimators)
        return [fitted[start : start + n] for start in range(0, len(fitted), n)]

    def _each_proba(self, estimators, X, there):
        """Return what each modality's classifier says, NaN where a row lacks the modality."""
        each = np.full((len(self.blocks_), len(X), len(self.classes_)), np.nan)
        columns = self.blocks_.values()
        for number, (estimator, part) in enumerate(zip(estimators, columns, strict=True)):
            rows = there[:, number]
            if rows.any():
                found = estimator.predict_proba(X[rows][:, part])
                each[number, rows] = self._of_all_classes(estimator, found)
        return each

    def _of_all_classes(self, estimator, found):
        """Bring probabilities to all classes; one that a classifier never saw gets its share."""
        if self.target_type_ == "multilabel":
            if not isinstance(found, list):
                return found
            # a column for each label and class, of which a label may have had one only
            ones = [classes.tolist() == [1] for classes in estimator.classes_]
            return np.stack(
                [
                    p[:, 1] if p.shape[1] == 2 else np.full(len(p), one)
                    for p, one in zip(found, ones, strict=True)
                ],
                axis=1,
            )
        seen = np.isin(self.classes_, estimator.classes_)
        whole = np.tile(np.where(seen, 0.0, self.prior_), (len(found), 1))
        whole[:, seen] = found * (1 - whole.sum(axis=1, keepdims=True))
        return whole

    def _find_weights(self, data, target, folds, parts):
        """Return how much each modality counts: given, alike, or learnt out of fold."""
        names = list(self.blocks_)
        if isinstance(self.weights, dict):
            given = np.array([self.weights.get(name, np.nan) for name in names], dtype=float)
            if set(self.weights) != set(names) or not (given >= 0).all() or not given.sum() > 0:
                raise ValueError(
                    f"weights={self.weights!r} must give each of the blocks {names} a number that "
                    "is not negative, and one of them more than 0."
                )
            return dict(zip(names, (given / given.sum()).tolist(), strict=True))
        learnt = np.ones(len(names))
        if folds:
            each = np.full((len(names), len(data.X), len(self.classes_)), np.nan)
            for (_, held_out), estimators in zip(folds, parts, strict=True):
                each[:, held_out] = self._each_proba(
                    estimators, data.X[held_out], data.there[held_out]
                )
            learnt = _learn_weights(each, target.values, data.weight, self.target_type_)
        return dict(zip(names, (learnt / learnt.sum()).tolist(), strict=True))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        given = self.estimator
        estimators = given.values() if isinstance(given, dict) else [given]
        tags.classifier_tags.multi_label = all(
            is_classifier(estimator) and get_tags(estimator).classifier_tags.multi_label
            for estimator in estimators
        )
        return tags


class _Decided(NamedTuple):
    """A training set of decision fusion: rows, labels, weights, and which modalities rows have."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    there: np.ndarray


def _check_table(estimator, X, y, *, dtype, reset):
    """Check a table of blocks and its labels; set what is learnt of both."""
    if y is not None:
        check_no_missing_label(y)
    X, y = validate_data(
        estimator,
        X,
        y,
        dtype=dtype,
        ensure_all_finite="allow-nan",
        ensure_min_samples=2,
        multi_output=True,
        reset=reset,
    )
    check_classification_targets(y)
    target = encode_target(y, "multilabel" if y.ndim == 2 and y.shape[1] > 1 else "multiclass")
    if reset:
        names = getattr(estimator, "feature_names_in_", None)
        estimator.blocks_ = resolve_blocks(estimator.blocks, names, X.shape[1])
        columns = np.arange(X.shape[1])
        estimator.widths_ = {name: len(columns[part]) for name, part in estimator.blocks_.items()}
    elif not np.array_equal(estimator.classes_, target.classes):
        raise ValueError(
            f"warm_start goes on with the classes {estimator.classes_.tolist()}, but y holds "
            f"{target.classes.tolist()}. Clone the classifier to start anew."
        )
    estimator.classes_ = target.classes
    two = target.kind == "multiclass" and len(target.classes) == 2
    estimator.target_type_ = "binary" if two else target.kind
    return X, target


def _by_modality(X, blocks):
    """Return the table with modalities side by side in their order, and which each row has."""
    there = np.stack([observed_in_block(X, *block) for block in blocks.items()], axis=1)
    order = np.concatenate([np.arange(X.shape[1])[columns] for columns in blocks.values()])
    return (X if (np.diff(order) == 1).all() else X[:, order]), there


def _as_targets(target, target_type):
    """Return targets in the form that the loss wants."""
    if target_type == "multiclass":
        return target.values
    return target.values.reshape(len(target.values), -1).astype(np.float32)


def _prior(target, weight):
    """Return the share of each class, or of rows with each label, by weight."""
    if target.kind == "multilabel":
        return np.average(target.values, axis=0, weights=weight)
    shares = np.bincount(target.values, weights=weight, minlength=len(target.classes))
    return shares / shares.sum()


def _logits_of(probabilities, target_type):
    """Turn probabilities into logits, finite ones."""
    p = np.clip(probabilities, _RARE, 1 - _RARE)
    if target_type == "multiclass":
        return np.log(p)
    return np.log(p[..., -1:] / p[..., :1]) if target_type == "binary" else np.log(p / (1 - p))


def _probabilities(logits, target_type):
    """Turn logits into probabilities."""
    if target_type == "binary":
        return expit(np.stack([-logits, logits], axis=1))
    return softmax(logits, axis=1) if target_type == "multiclass" else expit(logits)


def _decided(probabilities, classes, target_type):
    """Name the likeliest class, or mark the labels that are likelier than not."""
    if target_type == "multilabel":
        return (probabilities > 0.5).astype(np.int64)
    return classes[probabilities.argmax(axis=1)]


def _learnt(history, weights):
    """Return the attributes that training leads to."""
    return {
        "weights_": _without_network_axis(weights),
        "history_": history,
        "n_iter_": len(history),
    }


def _through(weights, chain, X):
    """Run a chain of blocks in numpy: linear, ReLU, batch normalisation by the running moments."""
    layer = 0
    while f"chains.{chain}.{layer}.linear.weight" in weights:
        block = {
            name: weights[f"chains.{chain}.{layer}.{name}"]
            for name in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
        }
        mean, var = (weights[f"chains.{chain}.{layer}.norm.running_{m}"] for m in ("mean", "var"))
        X = np.maximum(X @ block["linear.weight"].T + block["linear.bias"], 0)
        scale = block["norm.weight"] / np.sqrt(var + 1e-5)
        X = X * scale + (block["norm.bias"] - mean * scale)
        layer += 1
    return X


def _without_network_axis(weights):
    """Take the one head out of a stack of one."""
    shared = ("mean", "scale")
    return {name: value if name in shared else value[0] for name, value in weights.items()}


def _with_network_axis(weights):
    """Make a stack of the one head."""
    shared = ("mean", "scale")
    return {name: value if name in shared else value[None] for name, value in weights.items()}


def _fit_one(estimator, data, rows, number, block):
    """Fit one modality's classifier on the rows that have it."""
    name, columns = block
    rows = rows[data.there[rows, number]]
    weight = {} if data.weight is None else {"sample_weight": data.weight[rows]}
    try:
        return clone(estimator).fit(data.X[rows][:, columns], data.y[rows], **weight)
    except Exception as error:
        error.add_note(f"This was the classifier of block {name!r}, given {len(rows)} rows.")
        raise


def _evidence(probabilities, target_type):
    """Turn probabilities into what adds up: logarithms of classes, log-odds of labels."""
    p = np.clip(probabilities, _RARE, 1 - _RARE)
    return np.log(p) - np.log1p(-p) if target_type == "multilabel" else np.log(p)


def _learn_weights(each, y, sample_weight, target_type):
    """Find the weights with which evidence adds up to the likeliest labels.

    Their sum is free, as it takes up how sure the classifiers are too much or too little of
    themselves; a modality that tells nothing is then not needed to make up for it. A modality that
    helps by no more than 1.5 standard errors of the loss over rows weighs nothing.
    """
    n_modalities = len(each)
    equal = np.ones(n_modalities)
    several = np.flatnonzero((~np.isnan(each[..., 0])).sum(axis=0) > 1)
    if not len(several):
        return equal
    evidence = np.nan_to_num(_evidence(each[:, several], target_type))
    y = y[several]
    share = np.ones(len(several)) if sample_weight is None else sample_weight[several]
    share = share / max(share.sum(), np.finfo(float).tiny)
    if target_type == "multilabel":  # each label is a choice of two
        evidence = np.stack([np.zeros_like(evidence), evidence], axis=-1)
        evidence = evidence.reshape(n_modalities, -1, 2)
        share = np.repeat(share, y.shape[1]) / y.shape[1]
        y = y.ravel().astype(np.int64)
    right = evidence[:, np.arange(len(y)), y]  # (n_modalities, n_choices)

    rows = np.arange(len(y))

    def loss(weights):
        logs = log_softmax(np.tensordot(weights, evidence, 1), axis=1)
        expected = (np.exp(logs) * evidence).sum(axis=2)
        gradient = ((expected - right) * share).sum(axis=1)
        return -(share * logs[rows, y]).sum(), gradient

    def fitted(used):
        bounds = [(0, None if use else 0) for use in used]
        weights = minimize(loss, np.where(used, equal, 0), jac=True, bounds=bounds).x
        return weights, -log_softmax(np.tensordot(weights, evidence, 1), axis=1)[rows, y]

    used = np.ones(n_modalities, dtype=bool)
    weights, losses = fitted(used)
    for number in np.argsort(weights):  # the least first
        fewer = used & (np.arange(n_modalities) != number)
        if fewer.any():
            simpler, more = fitted(fewer)
            gain = more - losses
            if np.average(gain, weights=share) <= 1.5 * gain.std() / np.sqrt(len(gain)):
                used, weights, losses = fewer, simpler, more
    return weights if weights.sum() > 0 else equal
