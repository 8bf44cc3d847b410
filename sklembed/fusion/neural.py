"""FusionClassifier: small networks on the embeddings of several modalities."""

from numbers import Integral, Real

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.utils import compute_class_weight, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._table.blocks import moments
from sklembed._targets import hold_back
from sklembed._validation import (
    check_class_weight,
    check_layer_sizes,
    check_vectors,
    draw_seed,
)
from sklembed.fusion._base import (
    by_modality,
    check_table,
    decided,
    find_prior,
    logits_of_prior,
    probabilities,
    warn_ignored,
)

_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the processor's caches


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
        X, target = check_table(self, X, y, dtype=np.float32, reset=not goes_on)
        weight = self._row_weights(X, target, sample_weight)
        label_weight = self._find_label_weights(target, weight, label_names)
        table = X
        X, there = by_modality(table, self.blocks_)
        rows = np.flatnonzero(there.any(axis=1) & (weight > 0))
        resumed = self.ignored_blocks_ if goes_on else None
        self.ignored_blocks_ = self._find_ignored(there, rows, resumed)
        if goes_on:
            self._check_goes_on(X.shape[1])
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        _callbacks.begin(self, context, table, y)
        self.prior_ = find_prior(target, weight)
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
        X = validate_data(
            self, X, dtype=np.float32, ensure_all_finite=False, reset=False
        )
        X, there = by_modality(X, self.blocks_)
        ignored = np.isin(list(self.blocks_), self.ignored_blocks_)
        if ignored.any():
            there = there & ~ignored
            X = np.where(np.repeat(ignored, list(self.widths_.values())), np.nan, X)
        logits = np.empty((len(X), len(self.weights_["output.bias"])))
        for rows in gen_batches(len(X), _CHUNK_ROWS):
            logits[rows] = self._logits(X[rows], there[rows])
        logits[~there.any(axis=1)] = logits_of_prior(self.prior_, self.target_type_)
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
        return probabilities(self.decision_function(X), self.target_type_)

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
        return decided(self.predict_proba(X), self.classes_, self.target_type_)

    def _row_weights(self, X, target, sample_weight):
        """Return the weight of each row in the loss."""
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float32, ensure_non_negative=True
        )
        if self.class_weight is not None and target.kind == "multiclass":
            check_class_weight(self.class_weight, self.classes_)
            # of the rows that count, so that a row of weight 0 is as good as absent
            codes, counted = target.values, weight > 0
            present = np.unique(codes[counted])
            by_label = self.class_weight
            if isinstance(by_label, dict):
                by_label = {
                    c: by_label.get(c, 1.0) for c in self.classes_[present].tolist()
                }
            by_class = np.zeros(len(self.classes_), dtype=np.float32)
            by_class[present] = compute_class_weight(
                by_label,
                classes=self.classes_[present],
                y=self.classes_[codes[counted]],
            )
            weight = weight * by_class[codes]
        return weight

    def _find_label_weights(self, target, weight, names):
        """Return the weight of rows that carry a label, for each of several labels, or None."""
        if target.kind != "multilabel" or self.class_weight is None:
            return None
        if self.class_weight == "balanced":
            carried = np.average(
                target.values.astype(np.float64), axis=0, weights=weight
            )
            varies = (carried > 0) & (carried < 1)
            odds = np.ones(len(carried))
            odds[varies] = (1 - carried[varies]) / carried[varies]
            return odds
        positions = {} if names is None else {name: i for i, name in enumerate(names)}
        if all(
            isinstance(name, str) for name in positions
        ):  # names that are no numbers
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
            name
            for name, mask in zip(self.blocks_, there[rows].T, strict=True)
            if not mask.any()
        ]
        if resumed is not None:
            return [name for name in unobserved if name in resumed]
        if len(unobserved) == len(self.blocks_):
            raise ValueError(
                f"The blocks {unobserved} are NaN in all {len(there)} rows that count, so nothing "
                "can be learned. Check the step before."
            )
        for name in unobserved:
            warn_ignored(name, "is NaN in all rows that count")
        return unobserved

    def _check_goes_on(self, n_features):
        """Refuse to go on training in a head of another shape."""
        inputs = (
            [n_features] if self._fusion == "early" else list(self.widths_.values())
        )
        expected = {
            f"chains.{chain}.{layer}.linear.weight": (n_out, n_in)
            for chain, width in enumerate(inputs)
            for layer, (n_in, n_out) in enumerate(
                zip(
                    [width, *self.hidden_layer_sizes],
                    self.hidden_layer_sizes,
                    strict=False,
                )
            )
        }
        found = {
            k: v.shape for k, v in self.weights_.items() if k.endswith("linear.weight")
        }
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
            known = np.repeat(
                ~np.isin(list(self.blocks_), resumed), list(self.widths_.values())
            )
            before = self.weights_["mean"], self.weights_["scale"]
            scaling = tuple(
                np.where(known, *pair) for pair in zip(before, scaling, strict=True)
            )
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
        from sklembed.nn.fusion import FusionHead

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
                [
                    _through(weights, i, part) * there[:, [i]]
                    for i, part in enumerate(parts)
                ]
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


def _as_targets(target, target_type):
    """Return targets in the form that the loss wants."""
    if target_type == "multiclass":
        return target.values
    return target.values.reshape(len(target.values), -1).astype(np.float32)


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
        mean, var = (
            weights[f"chains.{chain}.{layer}.norm.running_{m}"] for m in ("mean", "var")
        )
        X = np.maximum(X @ block["linear.weight"].T + block["linear.bias"], 0)
        scale = block["norm.weight"] / np.sqrt(var + 1e-5)
        X = X * scale + (block["norm.bias"] - mean * scale)
        layer += 1
    return X


def _without_network_axis(weights):
    """Take the one head out of a stack of one."""
    shared = ("mean", "scale")
    return {
        name: value if name in shared else value[0] for name, value in weights.items()
    }


def _with_network_axis(weights):
    """Make a stack of the one head."""
    shared = ("mean", "scale")
    return {
        name: value if name in shared else value[None]
        for name, value in weights.items()
    }
