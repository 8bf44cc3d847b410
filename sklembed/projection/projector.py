"""ContrastiveProjector: a small network that adapts frozen embeddings to the labels at hand."""

import warnings
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

import numpy as np
from scipy import linalg
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils import compute_sample_weight, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    process_routing,
)
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from sklembed import _callbacks, _persistence
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._table.blocks import moments, observed_rows
from sklembed._targets import (
    TARGET_TYPES,
    Target,
    encode_target,
    hold_back,
    warn_if_measured,
    warn_if_tags,
)
from sklembed._validation import (
    check_class_weight,
    check_layer_sizes,
    check_no_missing_label,
    check_routing_enabled,
    check_vectors,
    draw_seed,
    split_rows,
)
from sklembed.projection.gate import choose

_LOSSES = ("supcon", "pairwise_bce")  # of nn.losses, which imports torch
_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the processor's caches


class ContrastiveProjector(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    """Project embeddings so that rows which belong together lie close, and others far apart.

    A small multi-layer perceptron is trained on pairs of labelled rows, as in [1]_, with the
    supervised contrastive loss of [2]_ or the pairwise loss of that paper. The embeddings stay
    frozen; training takes seconds on a CPU. Beside the projection, the output carries the input
    along, reduced by principal components (`passthrough`).

    `fit_transform` is *cross-fitted*, as in :class:`~sklearn.preprocessing.TargetEncoder`: each
    training row is projected by a network that has not seen its label, and the fold's space is
    mapped onto that of the network fitted on all rows, which `transform` uses for new rows.
    Without this the training rows are far better clustered than any new row will be, and whatever
    comes next in a pipeline learns to trust a clarity that is not there. So
    ``fit_transform(X, y)`` differs from ``fit(X, y).transform(X)``; with ``cv=None``, the plain
    behaviour of the paper, they agree.

    Rows of NaN throughout (a missing modality) are left out of training and stay NaN.

    Parameters
    ----------
    n_components : int, default=128
        Number of columns of the projection, and at most as many again of the input.

    hidden_layer_sizes : tuple of int, default=(512,)
        Units of the hidden layers. ``()`` gives a linear map.

    loss : {"supcon", "pairwise_bce"}, callable or torch.nn.Module, default="supcon"
        What training minimises: the supervised contrastive loss (equation 2 of [2]_), or the
        binary cross-entropy of every pair of a batch (section 3.1 of [1]_). A function is called
        with a batch's projections (batch, n_components) and affinities (batch, batch) and returns
        a scalar. A module, such as a loss of pytorch-metric-learning, is called with projections
        and class codes; what it has to learn is trained along.

    similarity : {"cosine", "dot"}, default="cosine"
        How alike two projections are: the cosine, as [1]_ describes, or the plain inner product,
        as its code computes. With "cosine" the projections are unit vectors.

    temperature : float, default=0.1
        What similarities are divided by before the loss. Losses of your own ignore it.

    target_type : {"auto", "multiclass", "multilabel", "continuous", "hierarchical"}, \
            default="auto"
        What `y` holds, and so how much two rows belong together: one class each (1 if they are
        the same); a 0/1 column for each label (labels shared over labels of either); numbers (a
        Gaussian of the distance in rank, of width 0.1); a column of classes for each level of a
        tree, the coarsest first (share of the levels that agree, from the top). "auto" infers it
        from the values: numbers with a fraction are continuous, whole numbers and dates are
        classes. `fit` warns of those that look like measurements or counts: more than
        20 distinct ones of which half have fewer than 10 rows, or more than 10 of which half have
        one row.

    passthrough : bool or "auto", default=True
        Whether to put the input beside its projection, reduced to at most `n_components` principal
        components and scaled to the projection's norm. "auto" lets a gate decide between the
        input, the projection and both: the simplest, in this order, that a linear probe finds as
        good as the best, to within one standard error over the folds of `cv`. Without folds
        "auto" means True.

    dropout : float, default=0.5
        Probability of leaving out a hidden unit in training.

    standardize : bool, default=True
        Whether the network sees centred and scaled columns, by the training rows.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn; of the coarsest level, if `y` has
        several. Classes without a weight in the dict weigh 1.

    sampler : {"balanced"} or None, default=None
        "balanced" draws the rows of a batch so that classes are equally likely, with replacement;
        by the coarsest level, if `y` has several.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds of `fit_transform`. An int means shuffled folds, stratified where `y` holds classes,
        and then never more than the smallest class with at least two rows has rows; where no fold
        can be made, the projection is plain, with a warning. The folds must hold each row out
        exactly once. ``None`` switches cross-fitting off.

    max_epochs : int, default=20
        Passes over the training rows.

    batch_size : int, default=128
        Rows in a batch, at most; an epoch is split into batches of nearly equal size. All pairs
        within a batch are contrasted.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold back a part of the training rows, stop when the loss on it no longer
        falls, and return to the best epoch; for each fold's network by rows of its own.

    validation_fraction : float, default=0.1
        The part that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without a better loss after which early stopping stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the network of the fit before. Networks of the folds always
        start anew, and train as many epochs as the network of all rows has in total. The part that
        early stopping holds back is the same if `random_state` is an integer.

    keep_optimizer : bool, default=False
        Whether to keep AdamW's moments after fit, as arrays, for `partial_fit` and `warm_start`
        to go on with. They take twice the memory of the weights.

    device : str, default="auto"
        Where to train: "auto" takes an accelerator if there is one, else the CPU. `transform`
        always runs in numpy.

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches, the part held back and the folds of an int `cv`.

    verbose : int, default=0
        Level of the training log that skorch prints.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}`` or
        ``{"compile": True}``; they override what the other parameters set. The networks of the
        folds are trained together, in one more net with the same arguments. Callbacks may watch
        ``valid_loss`` with `early_stopping`, which records its mean over the networks, or with a
        `train_split`. ``{"callbacks": "disable"}`` switches off those of skorch, too: `history_`
        then has neither loss nor duration.

    Attributes
    ----------
    weights_ : dict of str to ndarray of dtype float32
        The network fitted on all rows.

    components_ : dict of str to ndarray of dtype float32
        The mean and the scaled principal axes by which the input is carried along; empty without.

    gate_ : {"projection", "passthrough", "both"}
        What the output holds.

    gate_scores_ : dict of str to ndarray of shape (n_folds,)
        What the probe scored with each, out of fold; empty unless the gate was asked.

    history_ : list of dict
        An entry for each epoch of that network's training, with its mean loss.

    n_iter_ : int
        Number of epochs run.

    optimizer_state_ : dict of str to ndarray
        AdamW's moments, with `keep_optimizer`; else empty.

    target_type_ : str
        What `y` was taken for.

    classes_ : ndarray of shape (n_classes,), list of ndarray or None
        The labels seen; for each level, if there are several; None for numbers.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    References
    ----------
    .. [1] Margaritis, Petridis, Bertsimas. Efficient Domain Adaptation of Multimodal Embeddings
       using Contrastive Learning. arXiv 2502.02048.
    .. [2] Khosla et al. Supervised Contrastive Learning. arXiv 2004.11362.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import ContrastiveProjector
    >>> X, y = load_digits(return_X_y=True)
    >>> projector = ContrastiveProjector(n_components=16, max_epochs=5, random_state=0)
    >>> projector.fit_transform(X, y).shape
    (1797, 32)
    """

    _keeps_missing_rows = True  # missing in, missing out: PerModalityUnion reads this
    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "hidden_layer_sizes": ["array-like"],
        "loss": [StrOptions(set(_LOSSES)), callable],
        "similarity": [StrOptions({"cosine", "dot"})],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "target_type": [StrOptions({"auto", *TARGET_TYPES})],
        "passthrough": ["boolean", StrOptions({"auto"})],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "standardize": ["boolean"],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "sampler": [StrOptions({"balanced"}), None],
        "cv": ["cv_object"],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "keep_optimizer": ["boolean"],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "skorch_params": [dict, None],
    }

    def __init__(
        self,
        n_components=128,
        *,
        hidden_layer_sizes=(512,),
        loss="supcon",
        similarity="cosine",
        temperature=0.1,
        target_type="auto",
        passthrough=True,
        dropout=0.5,
        standardize=True,
        class_weight=None,
        sampler=None,
        cv=5,
        max_epochs=20,
        batch_size=128,
        lr=1e-3,
        weight_decay=0.01,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        warm_start=False,
        keep_optimizer=False,
        device="auto",
        random_state=None,
        verbose=0,
        skorch_params=None,
    ):
        self.n_components = n_components
        self.hidden_layer_sizes = hidden_layer_sizes
        self.loss = loss
        self.similarity = similarity
        self.temperature = temperature
        self.target_type = target_type
        self.passthrough = passthrough
        self.dropout = dropout
        self.standardize = standardize
        self.class_weight = class_weight
        self.sampler = sampler
        self.cv = cv
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.keep_optimizer = keep_optimizer
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.skorch_params = skorch_params

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, **params):
        """Train the network on all rows.

        To go on with the projected training rows use `fit_transform`, which is cross-fitted.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss: a row of weight w counts as w rows, as anchor,
            positive and negative; a row of weight 0 is not seen.

        **params : dict
            As for `fit_transform`; used by the gate alone, with ``passthrough="auto"``.

        Returns
        -------
        self : ContrastiveProjector
            The fitted projector.

        Raises
        ------
        ValueError
            If a label is missing or a list, all rows are alike in `y`, no two observed rows belong
            together, `class_weight` names no class of `y` while a class has no weight, no row is
            observed, a row is NaN in part, or `X` holds tokens or texts.

        Warns
        -----
        UserWarning
            If whole numbers in `y` are taken for classes but look like measurements, see
            `target_type`; two columns of `y` have the same text for a label, as lists of tags do;
            or a weight in `class_weight` has no effect.
        """
        self._fit(
            X, y, sample_weight, params, "fit", cross_fit=self.passthrough == "auto"
        )
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit_transform(self, X, y, sample_weight=None, **params):
        """Train the network on all rows, and project each by one that has not seen its label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss, as for `fit`.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`; needs
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out), dtype float32
            The projections, and the reduced input beside them; rows of NaN stay NaN.

        Raises
        ------
        ValueError
            For what `fit` raises it, and if the folds of `cv` do not hold out each row once.
        """
        return self._fit(X, y, sample_weight, params, "fit_transform", cross_fit=True)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train the network for one more epoch, on these rows.

        The first call sets how columns are scaled and reduced. Ranks of numbers are taken within
        the rows of a call. There is no gate: ``passthrough="auto"`` means True.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss, as for `fit`.

        Returns
        -------
        self : ContrastiveProjector
            The projector.
        """
        goes_on = hasattr(self, "weights_")
        classes = getattr(self, "classes_", None)
        data = self._check_training_data(X, y, sample_weight, reset=not goes_on)
        if goes_on and isinstance(classes, np.ndarray):
            self.classes_ = np.union1d(classes, self.classes_)
        seed = draw_seed(self.random_state)
        if not goes_on:
            self._reduce_input(data, seed)
        self._train_on_all(data, seed, max_epochs=1, goes_on=goes_on)
        if not goes_on:
            self.components_ = self._scaled(self.components_, self.weights_, data)
        return self

    def transform(self, X):
        """Project rows by the network fitted on all training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out), dtype float32
            The projections, and the reduced input beside them; rows of NaN stay NaN.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = validate_data(
            self, X, dtype=np.float32, ensure_all_finite=False, reset=False
        )
        names = getattr(self, "feature_names_in_", None)
        observed = observed_rows(X, names=names)  # looks for infinities too
        X = X[observed] if not observed.all() else X
        Z = (
            _project(self.weights_, X, self.similarity)
            if self.gate_ != "passthrough"
            else None
        )
        return self._output(Z, X, observed)

    def save(self, directory):
        """Write the fitted projector to a directory: ``weights.safetensors`` and ``config.json``.

        Neither file holds code; `load` reads them on any machine, without torch.

        Parameters
        ----------
        directory : str or Path
            Where to; made if there is none.

        Raises
        ------
        TypeError
            If a parameter or a label is of a kind that JSON does not know; pickle keeps these.
        """
        check_is_fitted(self)
        _persistence.save(self, directory)

    @classmethod
    def load(cls, directory):
        """Read a projector that `save` wrote.

        Parameters
        ----------
        directory : str or Path
            Where it was saved.

        Returns
        -------
        projector : ContrastiveProjector
            The fitted projector.
        """
        return _persistence.load(cls, directory)

    def to_onnx(self, path):
        """Write `transform` as an ONNX model, for runtimes without Python; needs ``onnx``.

        Its input is ``X``, float32 of shape (n_samples, n_features), its output ``Z``. Rows of NaN
        stay NaN.

        Parameters
        ----------
        path : str or Path
            The file to write.
        """
        check_is_fitted(self)
        from sklembed.projection.onnx import to_onnx

        to_onnx(self, path)

    def get_metadata_routing(self):
        """Say that metadata such as `groups` goes to the `cv` splitter.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        mapping = MethodMapping().add(caller="fit", callee="split")
        mapping.add(caller="fit_transform", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(splitter=self.cv, method_mapping=mapping)

    def _fit(self, X, y, sample_weight, params, caller, *, cross_fit):
        """Fit, and return what becomes of the training rows."""
        check_routing_enabled(params, self)
        routed = process_routing(self, caller, **params)
        goes_on = self.warm_start and hasattr(self, "weights_")
        data = self._check_training_data(X, y, sample_weight, reset=not goes_on)
        self._check_labels(data, y)
        seed = draw_seed(self.random_state)
        folds = (
            self._folds(data, seed, routed["splitter"]["split"]) if cross_fit else None
        )
        context = self._init_callback_context(max_subtasks=1 if folds is None else 2)
        _callbacks.begin(self, context, X, y)
        self._reduce_input(data, seed)
        self._train_on_all(
            data,
            seed,
            self.max_epochs,
            goes_on,
            _callbacks.subtask(context, "network", None),
        )
        self.components_ = self._scaled(self.components_, self.weights_, data)
        if caller == "fit_transform" or folds is not None:
            Z = _project(self.weights_, data.X, self.similarity)
        if folds is not None:
            Z = self._cross_fit(
                data, folds, Z, seed, _callbacks.subtask(context, "folds", None)
            )
            if self.passthrough == "auto":
                self._ask_gate(data, folds, Z)
        _callbacks.end(self, context, X, y)
        return (
            self._output(Z, data.X, data.observed)
            if caller == "fit_transform"
            else None
        )

    def _check_training_data(self, X, y, sample_weight, *, reset):
        """Check all that is given, and return the observed rows."""
        check_layer_sizes(self.hidden_layer_sizes)
        check_vectors(X, self)
        if y is not None:
            check_no_missing_label(y)
        X, y = validate_data(
            self,
            X,
            y,
            dtype=np.float32,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2,
            multi_output=True,
            reset=reset,
        )
        names = getattr(self, "feature_names_in_", None)
        observed = observed_rows(X, names=names)
        if not observed.any():
            raise ValueError(
                f"All {len(X)} rows of X are NaN: the modality is missing everywhere, and there is "
                "nothing to learn from. Leave the branch out, or check the column it reads."
            )
        target = encode_target(y, self.target_type)
        weight = self._row_weights(X, target, sample_weight)
        self.target_type_, self.classes_ = target.kind, target.classes
        data = _TrainingData(
            table=X,
            labels=target.values if target.strata is None else target.strata,
            X=X if observed.all() else X[observed],
            observed=observed,
            target=target.take(observed),
            weight=None if weight is None else weight[observed],
        )
        if not data.target.has_pairs(data.seen()):
            raise ValueError(
                f"No two of the {len(data.X)} observed rows belong together "
                f"({target.describe()}), so there is no pair to draw together. Give more rows or "
                "fewer classes; if y holds measurements or counts, set target_type='continuous'."
            )
        return data

    def _check_labels(self, data, y):
        """Check what a part of the rows, as `partial_fit` has them, cannot tell."""
        target = data.target
        if target.strata is not None:
            top = target.classes[0] if target.kind == "hierarchical" else target.classes
            check_class_weight(self.class_weight, top)
        if self.target_type == "auto":
            warn_if_measured(target, y)
            warn_if_tags(target)

    def _row_weights(self, X, target, sample_weight):
        """Return the weights of rows in the loss, None if all are 1."""
        for name in ("class_weight", "sampler"):
            if getattr(self, name) is not None and target.strata is None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs classes, but y was taken for "
                    f"{target.kind}. Leave it None, or set target_type."
                )
        if sample_weight is None and self.class_weight is None:
            return None
        if self.loss not in _LOSSES:
            raise ValueError(
                "A loss of your own takes no weights of rows: leave sample_weight and class_weight "
                "None, or use sampler='balanced'."
            )
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float32, ensure_non_negative=True
        )
        if self.class_weight is not None:
            top = target.classes[0] if target.kind == "hierarchical" else target.classes
            by_class = self.class_weight
            if isinstance(by_class, dict):  # a part of the rows may lack classes
                by_class = {label: by_class.get(label, 1.0) for label in top.tolist()}
            weight = weight * compute_sample_weight(by_class, top[target.strata])
        return weight.astype(np.float32)

    def _folds(self, data, seed, routed):
        """List the folds as positions of observed rows; None for a plain projection."""
        if self.cv is None:
            return None
        if not isinstance(self.cv, Integral):
            return self._folds_of_splitter(data, routed)
        n_rows, strata = len(data.X), data.target.strata
        if strata is None:
            folds = KFold(min(self.cv, n_rows), shuffle=True, random_state=seed).split(
                data.X
            )
        else:
            sizes = np.bincount(strata)
            # Never more folds than the smallest class that can be split at all has rows.
            n_splits = min(self.cv, sizes[sizes >= 2].min())
            folds = _StratifiedFolds(n_splits, shuffle=True, random_state=seed).split(
                data.X, strata
            )
        folds = list(folds)
        if not all(data.target.has_pairs(data.seen(train)) for train, _ in folds):
            warnings.warn(
                f"No folds can be made of {n_rows} observed rows ({data.target.describe()}) that "
                "leave two rows that belong together to train on. The training rows are projected "
                "by a network that has seen their labels: what learns from them will be "
                "overconfident.",
                UserWarning,
                stacklevel=2,
            )
            return None
        return folds

    def _folds_of_splitter(self, data, routed):
        """List the folds that a splitter makes of all rows, as positions of observed ones."""
        observed = data.observed
        splitter = check_cv(
            self.cv, data.labels, classifier=data.target.strata is not None
        )
        everyone = np.arange(len(observed))
        folds = [
            (everyone[np.asarray(train)], everyone[np.asarray(held_out)])
            for train, held_out in split_rows(splitter, data.table, data.labels, routed)
        ]
        _check_each_row_held_out_once(folds, len(observed))
        position = np.cumsum(observed) - 1
        folds = [
            (position[train[observed[train]]], position[held_out[observed[held_out]]])
            for train, held_out in folds
        ]
        for number, (train, _) in enumerate(folds):
            if not data.target.has_pairs(data.seen(train)):
                raise ValueError(
                    f"Fold {number} of cv has {len(train)} observed rows to train on, of which no "
                    "two belong together. Use fewer folds, or folds by which the observed rows "
                    "are spread."
                )
        return [(train, held_out) for train, held_out in folds if len(held_out)]

    def _reduce_input(self, data, seed):
        """Find the principal axes by which the input is carried along."""
        self.gate_scores_ = {}
        self.gate_ = "both" if self.passthrough else "projection"
        self.components_ = {}
        if self.passthrough:
            X = data.X if data.weight is None else data.X[data.seen()]
            # PCA subtracts products of means, which cancels where columns lie far from 0.
            mean = X.mean(axis=0, dtype=np.float64)
            pca = PCA(min(self.n_components, *X.shape), copy=False, random_state=seed)
            with np.errstate(
                invalid="ignore", divide="ignore"
            ):  # of an input without variance
                pca.fit(X - mean)
            norm = np.sqrt(pca.explained_variance_.sum()) or 1.0
            self.components_ = {
                "mean": mean.astype(np.float32),
                "axes": (pca.components_ / norm).astype(np.float32),
            }
        self._n_features_out = self.n_components + len(self.components_.get("axes", ()))

    def _scaled(self, components, weights, data):
        """Bring the input that is carried along to the projection's norm, 1 for cosines."""
        if not components or self.similarity == "cosine":
            return components
        Z = _project(weights, data.X[data.seen()], self.similarity)
        return components | {
            "axes": components["axes"] * np.sqrt(np.square(Z).sum(axis=1).mean())
        }

    def _train_on_all(self, data, seed, max_epochs, goes_on, context=None):
        """Train the network that `transform` uses."""
        rows = self._rows(data, np.arange(len(data.X)), seed)
        start = None
        if goes_on:
            start = self._last_state(data.X.shape[1])
            scaling = self.weights_["mean"], self.weights_["scale"]
        else:
            scaling = self._find_scaling(data)
        _callbacks.begin(self, context, data.X, data.target.values)
        trained = self._train(
            data,
            [rows],
            scaling,
            seed,
            max_epochs,
            start=start,
            on_epoch=_callbacks.each_epoch(
                self, context, data.X, data.target.values, partial(self._learnt, data)
            ),
        )
        vars(self).update(_learnt(trained.history, trained.weights))
        self.optimizer_state_ = trained.optimizer_state
        _callbacks.end(self, context, data.X, data.target.values)

    def _cross_fit(self, data, folds, everywhere, seed, context):
        """Project each row by its fold's network, mapped onto the network of all rows."""
        _callbacks.begin(self, context, data.X, data.target.values)
        trained = self._train(
            data,
            [self._rows(data, train, seed) for train, _ in folds],
            (self.weights_["mean"], self.weights_["scale"]),
            seed,
            self.n_iter_ if self.warm_start else self.max_epochs,
            on_epoch=_callbacks.each_epoch(self, context, data.X, data.target.values),
        )
        Z = np.empty_like(everywhere)
        for number, (train, held_out) in enumerate(folds):
            projected = _project(
                _network(trained.weights, number), data.X, self.similarity
            )
            # Both networks have seen the fold's training rows: there the two spaces are matched.
            both = data.seen(train)
            Z[held_out] = projected[held_out] @ _match(
                projected[both], everywhere[both]
            )
        if self.similarity == "cosine":
            _normalize(Z)
        _callbacks.end(self, context, data.X, data.target.values)
        return Z

    def _ask_gate(self, data, folds, Z):
        """Let a probe choose between the input, its projection, and both."""
        reduced = _reduce(self.components_, data.X)
        candidates = {
            "passthrough": reduced,
            "projection": Z,
            "both": np.hstack([Z, reduced]),
        }
        self.gate_, self.gate_scores_ = choose(
            candidates, data.target, folds, data.weight
        )
        self._n_features_out = candidates[self.gate_].shape[1]

    def _output(self, Z, X, observed):
        """Put side by side what the gate lets through, and leave missing rows NaN."""
        parts = [] if self.gate_ == "passthrough" else [Z]
        if self.gate_ != "projection":
            parts.append(_reduce(self.components_, X))
        if len(parts) == 1 and observed.all():
            return parts[0]
        out = np.full((len(observed), self._n_features_out), np.nan, dtype=np.float32)
        out[observed] = np.hstack(parts)
        return out

    def _rows(self, data, train, seed):
        """Say which rows one network is trained on, and by which it is stopped."""
        from sklembed._training import Rows

        train, strata = data.seen(train), data.target.strata
        valid = np.empty(0, dtype=np.int64)
        if self.early_stopping:
            train, valid = self._hold_back(train, data.target, seed)
        odds = None
        if self.sampler == "balanced":
            odds = 1.0 / np.bincount(strata[train])[strata[train]]
        return Rows(train, valid, odds)

    def _hold_back(self, rows, target, seed):
        """Split rows into those to train on and those to stop by."""
        train, valid = hold_back(rows, target.strata, self.validation_fraction, seed)
        if not (target.has_pairs(train) and target.has_pairs(valid)):
            raise ValueError(
                f"early_stopping with validation_fraction={self.validation_fraction} splits "
                f"{len(rows)} rows into {len(train)} to train on and {len(valid)} to stop by, and "
                "one part holds no two rows that belong together. Change the fraction, or switch "
                "early stopping off."
            )
        return train, valid

    def _train(
        self, data, rows, scaling, seed, max_epochs, *, start=None, on_epoch=None
    ):
        """Train networks, one for each set of rows; the only place that needs torch."""
        from sklembed._training import TrainingOptions, train

        options = TrainingOptions.of(self, seed, max_epochs=max_epochs)
        return train(
            self._make_module(scaling, len(rows)),
            self._make_loss(data.target.kind, len(rows)),
            data.X,
            data.target.values,
            rows,
            options,
            sample_weight=data.weight,
            start=start,
            on_epoch=on_epoch,
        )

    def _find_scaling(self, data):
        """Return the mean and the scale of each column, by the training rows."""
        n_features = data.X.shape[1]
        if not self.standardize:
            return np.zeros(n_features, np.float32), np.ones(n_features, np.float32)
        seen = data.seen()
        chunks = [seen[chunk] for chunk in gen_batches(len(seen), _CHUNK_ROWS)]
        weights = (
            None if data.weight is None else (data.weight[rows] for rows in chunks)
        )
        return moments((data.X[rows] for rows in chunks), weights)

    def _make_module(self, scaling, n_networks):
        """Return a recipe for networks, given the generator to draw their weights from."""
        from sklembed._torch import to_tensor
        from sklembed.nn.projection import Projection

        mean, scale = scaling
        sizes = [len(mean), *self.hidden_layer_sizes, self.n_components]
        return lambda generator: Projection(
            sizes,
            n_networks=n_networks,
            dropout=self.dropout,
            generator=generator,
            mean=to_tensor(mean, generator.device),
            scale=to_tensor(scale, generator.device),
        )

    def _make_loss(self, kind, n_networks):
        """Return the loss of a batch, given projections, targets and weights."""
        from torch.nn import Module

        from sklembed.nn.losses import AFFINITIES, LOSSES, PerNetwork

        affinity = AFFINITIES[kind]
        if not isinstance(self.loss, str):
            if isinstance(self.loss, Module) and kind != "multiclass":
                raise ValueError(
                    f"A loss module is given class codes, but y was taken for {kind}. Use a "
                    "function of projections and affinities."
                )
            return PerNetwork(self.loss, affinity, n_networks)
        loss = partial(
            LOSSES[self.loss], temperature=self.temperature, similarity=self.similarity
        )
        return lambda z, y, weight: loss(z, affinity(y), weight)

    def _learnt(self, data, history, weights):
        """Return the attributes that training has led to by now, the input carried along too."""
        learnt = _learnt(history, weights)
        return learnt | {
            "components_": self._scaled(self.components_, learnt["weights_"], data)
        }

    def _last_state(self, n_features):
        """Return what the last fit left, to go on from."""
        from sklembed._training import Trained

        sizes = [n_features, *self.hidden_layer_sizes, self.n_components]
        expected = list(zip(sizes[1:], sizes, strict=False))
        found = [value.shape for value in self.weights_.values() if value.ndim == 2]
        if found != expected:
            raise ValueError(
                f"The fitted network has layers of the shapes {found}, but the parameters and X "
                f"ask for {expected}, so training cannot go on. Clone the projector to start anew."
            )
        stacked = {
            name: value[None] if name.startswith("layers") else value
            for name, value in self.weights_.items()
        }
        return Trained(stacked, self.history_, self.optimizer_state_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = [
            "float32"
        ]  # embeddings are float32 everywhere
        return tags


@dataclass(frozen=True)
class _TrainingData:
    """A training set: all its rows (`table`, `labels`), and those that are observed."""

    table: np.ndarray
    labels: np.ndarray
    X: np.ndarray
    observed: np.ndarray
    target: Target
    weight: np.ndarray | None

    def seen(self, rows=None):
        """Return the positions, of these rows, of those that weigh anything."""
        rows = np.arange(len(self.X)) if rows is None else rows
        return rows if self.weight is None else rows[self.weight[rows] > 0]


class _StratifiedFolds(StratifiedKFold):
    """Stratified folds that let a class of one row be held out without a warning."""

    def split(self, X, y, groups=None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            yield from super().split(X, y)


def _project(weights, X, similarity):
    """Run a network in numpy."""
    n_layers = sum(name.endswith(".weight") for name in weights)
    # The first layer takes the scale in. Taking in the mean too would cancel far from 0.
    first = np.ascontiguousarray((weights["layers.0.weight"] / weights["scale"]).T)
    biases = [weights[f"layers.{layer}.bias"] for layer in range(n_layers)]
    matrices = [
        first,
        *(weights[f"layers.{layer}.weight"].T for layer in range(1, n_layers)),
    ]
    Z = np.empty((len(X), len(biases[-1])), dtype=np.float32)
    for start in range(0, len(X), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        H = X[rows] - weights["mean"]
        for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
            H = _product(H, matrix)
            H += bias
            np.maximum(H, 0, out=H)
        _product(H, matrices[-1], out=Z[rows])
        Z[rows] += biases[-1]
        if similarity == "cosine":
            _normalize(Z[rows])
    return Z


def _normalize(Z):
    """Scale rows to unit length, in place."""
    norms = np.sqrt(np.einsum("ij,ij->i", Z, Z))
    Z /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]


def _match(source, target):
    """Find the linear map of one space onto another, by ridge regression on rows of both.

    Unlike a rotation it also evens out how far the two networks stretch each direction.
    """
    gram = source.T @ source
    ridge = 0.01 * np.trace(gram) / len(gram)
    gram[np.diag_indices_from(gram)] += ridge + np.finfo(np.float32).tiny
    return linalg.solve(gram, source.T @ target, assume_a="pos")


def _reduce(components, X):
    """Turn rows into their scaled principal components."""
    return _product(X - components["mean"], components["axes"].T)


def _product(rows, matrix, out=None):
    """Multiply rows by a matrix, so that a row's result depends on that row alone.

    BLAS has another kernel for a single column, and in that, on some processors, rounding depends
    on where a row stands.
    """
    if matrix.shape[1] == 1:
        return np.einsum("ij,jk->ik", rows, matrix, out=out)
    return np.matmul(rows, matrix, out=out)


def _learnt(history, weights):
    """Return the attributes that training leads to."""
    return {
        "weights_": _network(weights, 0),
        "history_": history,
        "n_iter_": len(history),
    }


def _network(weights, number):
    """Take one network out of a stack of them."""
    return {
        name: value[number] if name.startswith("layers") else value
        for name, value in weights.items()
    }


def _check_each_row_held_out_once(folds, n_samples):
    """Refuse folds by which a row has no projection, or two, or one that has seen its label."""
    times = np.zeros(n_samples, dtype=int)
    for fold, (train, held_out) in enumerate(folds):
        times[held_out] += 1
        both = np.intersect1d(train, held_out)
        if len(both):
            raise ValueError(
                f"Fold {fold} of cv trains on row {both[0]}, which it holds out ({len(both)} such "
                "rows). The rows of a fold's two parts must differ."
            )
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        raise ValueError(
            f"cv must hold out each row exactly once, but row {wrong[0]} is held out "
            f"{times[wrong[0]]} times ({len(wrong)} such rows). Use a splitter whose test folds "
            "partition the rows, such as StratifiedKFold or StratifiedGroupKFold."
        )
