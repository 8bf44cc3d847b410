"""Classifiers of several modalities: joined before a head, within it, or by their decisions."""

import warnings
from inspect import signature
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import sklearn
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context, clone
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import compute_class_weight, gen_batches, get_tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    FLOAT_DTYPES,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from sklembed import _callbacks
from sklembed._blocks import moments, observed_in_block, resolve_blocks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._targets import encode_target, hold_back
from sklembed._validation import (
    check_class_weight,
    check_layer_sizes,
    check_no_missing_label,
    check_routing_enabled,
    check_vectors,
    draw_seed,
    split_rows,
)

_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the processor's caches
_TINY = np.finfo(np.float64).tiny  # what a probability of 0 is raised to before its logarithm
_LOG_TINY = np.log(_TINY)
_ROWS_TO_FIND_ZEROS = 1024  # training rows by which a classifier that gives zeros is recognised


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
            without any modality train nothing. A modality that no row has is ignored with a
            warning.

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
            If a label is missing, there is one class only, the columns do not make up blocks, all
            modalities are missing in all rows, a cell is not a number, a block is NaN in part of a
            row, or `class_weight` names a label that `y` does not have.
        """
        goes_on = self.warm_start and hasattr(self, "weights_")
        check_layer_sizes(self.hidden_layer_sizes)
        label_names = getattr(y, "columns", None)
        X, target = _check_table(self, X, y, dtype=np.float32, reset=not goes_on)
        weight = self._row_weights(X, target, sample_weight)
        label_weight = self._find_label_weights(target, weight, label_names)
        table = X
        X, there = _by_modality(table, self.blocks_)
        rows = np.flatnonzero(there.any(axis=1) & (weight > 0))
        resumed = self.ignored_blocks_ if goes_on else None
        self.ignored_blocks_ = self._find_ignored(there, rows, resumed)
        if goes_on:
            self._check_goes_on(X.shape[1])
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        _callbacks.begin(self, context, table, y)
        self.prior_ = _prior(target, weight)
        watch = _callbacks.each_epoch(self, context, table, y, _learnt)
        self._train(X, there, target, weight, label_weight, rows, resumed, watch)
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
        check_vectors(X, self)
        X = validate_data(self, X, dtype=np.float32, ensure_all_finite=False, reset=False)
        X, there = _by_modality(X, self.blocks_)
        ignored = np.isin(list(self.blocks_), self.ignored_blocks_)
        if ignored.any():
            there = there & ~ignored
            X = np.where(np.repeat(ignored, list(self.widths_.values())), np.nan, X)
        logits = np.empty((len(X), len(self.weights_["output.bias"])))
        for rows in gen_batches(len(X), _CHUNK_ROWS):
            logits[rows] = self._logits(X[rows], there[rows])
        logits[~there.any(axis=1)] = _logits_of_prior(self.prior_, self.target_type_)
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
            check_class_weight(self.class_weight, self.classes_)
            # of the rows that count, so that a row of weight 0 is as good as absent
            codes, counted = target.values, weight > 0
            present = np.unique(codes[counted])
            by_label = self.class_weight
            if isinstance(by_label, dict):
                by_label = {c: by_label.get(c, 1.0) for c in self.classes_[present].tolist()}
            by_class = np.zeros(len(self.classes_), dtype=np.float32)
            by_class[present] = compute_class_weight(
                by_label, classes=self.classes_[present], y=self.classes_[codes[counted]]
            )
            weight = weight * by_class[codes]
        return weight

    def _find_label_weights(self, target, weight, names):
        """Return the weight of rows that carry a label, for each of several labels, or None."""
        if target.kind != "multilabel" or self.class_weight is None:
            return None
        if self.class_weight == "balanced":
            carried = np.average(target.values.astype(np.float64), axis=0, weights=weight)
            varies = (carried > 0) & (carried < 1)
            odds = np.ones(len(carried))
            odds[varies] = (1 - carried[varies]) / carried[varies]
            return odds
        positions = {} if names is None else {name: i for i, name in enumerate(names)}
        if all(isinstance(name, str) for name in positions):  # names that are no numbers
            positions |= {label: label for label in self.classes_.tolist()}
        unknown = [key for key in self.class_weight if key not in positions]
        if unknown:
            raise ValueError(
                f"class_weight has weights for the labels {unknown}, which y does not have. Its "
                f"labels are {list(positions)}: column numbers, or names if y is a DataFrame."
            )
        odds = np.ones(len(self.classes_))
        for key, value in self.class_weight.items():
            odds[positions[key]] = value
        return odds

    def _find_ignored(self, there, rows, resumed):
        """List the blocks that no row has and no fit before has had, with a warning for each."""
        unobserved = [
            name for name, mask in zip(self.blocks_, there[rows].T, strict=True) if not mask.any()
        ]
        if resumed is not None:
            return [name for name in unobserved if name in resumed]
        if len(unobserved) == len(self.blocks_):
            raise ValueError(
                f"The blocks {unobserved} are NaN in all {len(there)} rows that count, so nothing "
                "can be learned. Check the step before."
            )
        for name in unobserved:
            _warn_ignored(name, "is NaN in all rows that count")
        return unobserved

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

    def _train(self, X, there, target, weight, label_weight, rows, resumed, watch):
        """Train the head; the only place that needs torch."""
        from sklembed._training import Rows, Trained, TrainingOptions, train

        seed, start = draw_seed(self.random_state), None
        scaling = self._find_scaling(X, there, rows)
        if resumed is not None:
            # A block that the fit before ignored is scaled by the rows that now have it.
            known = np.repeat(~np.isin(list(self.blocks_), resumed), list(self.widths_.values()))
            before = self.weights_["mean"], self.weights_["scale"]
            scaling = tuple(np.where(known, *pair) for pair in zip(before, scaling, strict=True))
            weights = self.weights_ | dict(zip(("mean", "scale"), scaling, strict=True))
            start = Trained(_with_network_axis(weights), self.history_, {})
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
            self._make_loss(label_weight),
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
            mean, scale = np.zeros(width, np.float32), np.ones(width, np.float32)
            if len(seen):
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

    def _make_loss(self, label_weight):
        """Return the loss of a batch, given logits, targets and weights."""
        from sklembed.nn.losses import binary_cross_entropy, cross_entropy

        if self.target_type_ == "multiclass":
            return cross_entropy
        if label_weight is None:
            return binary_cross_entropy
        import torch

        odds = torch.from_numpy(label_weight.astype(np.float32))
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
        that carry a label relative to those that do not, by the number of its column, or by its
        name if `y` is a DataFrame; labels without a weight have weight 1. "balanced" makes both
        weigh the same.

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

    ignored_blocks_ : list of str
        Blocks that are NaN in all training rows. They are ignored in prediction too.

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
        that carry a label relative to those that do not, by the number of its column, or by its
        name if `y` is a DataFrame; labels without a weight have weight 1. "balanced" makes both
        weigh the same.

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

    ignored_blocks_ : list of str
        Blocks that are NaN in all training rows. They are ignored in prediction too.

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

    @_fit_context(prefer_skip_nested_validation=False)  # classifiers validate themselves
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
        X, target = _check_table(self, X, y, dtype=FLOAT_DTYPES, reset=True)
        estimators = self._check_estimators(sample_weight)
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        metadata = self._route(sample_weight, weight, params)
        observed = dict(zip(self.blocks_, _observed(X, self.blocks_).T, strict=True))
        data = _TrainingSet(X, target.values.astype(np.int64), weight, observed, metadata)
        self.prior_ = _prior(target, weight)
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
        return _probabilities(self.decision_function(X), self.target_type_)

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
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False, reset=False)
        logs = self._pool(X, _observed(X, self.blocks_))
        return logs if self.target_type_ == "multiclass" else logs[..., 1] - logs[..., 0]

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
        return _decided(self.predict_proba(X), self.classes_, self.target_type_)

    def get_metadata_routing(self):
        """Return the routing of `fit`'s metadata to the classifiers and the `cv` splitter.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(
            splitter=self.cv, method_mapping=MethodMapping().add(caller="fit", callee="split")
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
        targets = {name: f"estimator_{name}" if several else "estimator" for name in self.blocks_}
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
                reasons[name] = f"is observed in {rows.sum()} rows that count, all of one class"
        if len(reasons) == len(self.blocks_):
            raise ValueError(
                f"None of the blocks {list(self.blocks_)} is observed in rows of two classes, so "
                "nothing can be learned. Check the step before."
            )
        for name, reason in reasons.items():
            _warn_ignored(name, reason)
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
        log_prior = _log_prior(self.prior_, self.target_type_)
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
        log_prior = _log_prior(self.prior_, self.target_type_)
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
        return np.where(np.isneginf(pooled), _LOG_TINY, pooled)

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
            log_prior = _log_prior(self.prior_, self.target_type_)
            logs = np.full((len(names), len(data.X), *log_prior.shape), np.nan)
            for (_, held_out), fitted in zip(folds, by_fold, strict=True):
                for number, name in enumerate(names):
                    rows = held_out[data.observed[name][held_out]]
                    if len(rows) and fitted[name] is not None:
                        block = data.X[rows][:, self.blocks_[name]]
                        evidence = fitted[name].log_proba(block, log_prior)
                        logs[number, rows] = _smooth(evidence, fitted[name].floors)
            learned = _learn_weights(logs, log_prior, data.codes, data.weight)
        return dict.fromkeys(self.blocks_, 0.0) | dict(zip(names, learned.tolist(), strict=True))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _check_table(estimator, X, y, *, dtype, reset):
    """Check a table of blocks and its labels; set what is learnt of both."""
    if y is not None:
        check_no_missing_label(y)
    check_vectors(X, estimator)
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


def _warn_ignored(name, reason):
    """Warn of a block of which nothing can be learned."""
    warnings.warn(
        f"Block {name!r} {reason}, so nothing can be learned from it. It is ignored, in prediction "
        "too.",
        stacklevel=3,
    )


def _routing_is_enabled():
    return sklearn.get_config()["enable_metadata_routing"]


def _observed(X, blocks):
    """Tell which modalities each row has."""
    return np.stack([observed_in_block(X, *block) for block in blocks.items()], axis=1)


def _by_modality(X, blocks):
    """Return the table with modalities side by side in their order, and which each row has."""
    there = _observed(X, blocks)
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


def _logits_of_prior(prior, target_type):
    """Return finite logits of the prior."""
    logs = _log_prior(prior, target_type)
    if target_type == "multiclass":
        return logs
    if target_type == "binary":
        return logs[1:] - logs[:1]
    return logs[:, 1] - logs[:, 0]


def _log_prior(prior, target_type):
    """Return finite logarithms of the prior, for each label of "not" and "yes"."""
    if target_type == "multilabel":
        prior = np.stack([1 - prior, prior], axis=-1)
    return np.log(np.maximum(prior, _TINY))


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
            key: _take_rows(value, rows, len(self.X)) for key, value in self.metadata[name].items()
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
    nested = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
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
        rows_of_pattern = rows_of_pattern[np.argsort(strata[rows_of_pattern], kind="stable")]
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
        error.add_note(f"This was the classifier of block {name!r}, given {len(part.X)} rows.")
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
        by_code = {labels.index(label): w for label, w in weights.items() if label in labels}
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
    pool = _PoolOfEvidence.of(logs[:, rows], log_prior, codes[rows], sample_weight[rows])
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
        used, likelihood = max(zip(subsets, likelihoods, strict=True), key=lambda pair: pair[1])
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
