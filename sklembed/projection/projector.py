"""ContrastiveProjector: adapt frozen embeddings to the task by a small network."""

from functools import partial
from numbers import Integral, Real

import numpy as np
from sklearn.base import (
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.decomposition import PCA
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

from sklembed import _callbacks
from sklembed._callbacks import with_callbacks
from sklembed._table.blocks import observed_rows
from sklembed._targets import (
    TARGET_TYPES,
    encode_target,
    warn_if_measured,
    warn_if_tags,
)
from sklembed._trained import TrainedEstimator, moments
from sklembed._validation import (
    check_class_weight,
    check_layer_sizes,
    check_new_rows,
    check_no_missing_label,
    check_routing_enabled,
    check_vectors,
    draw_seed,
    in_pieces,
)
from sklembed.projection.folds import TrainingData, make_folds
from sklembed.projection.forward import match, normalize, project, reduce
from sklembed.projection.gate import choose

_LOSSES = ("supcon", "pairwise_bce")  # of nn.losses, which imports torch
_CHUNK_ROWS = 1024  # read at a time to compute mean and scale


class ContrastiveProjector(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, TrainedEstimator
):
    """Learn a supervised contrastive projection of frozen embeddings.

    A small multi-layer perceptron is trained on pairs of labelled rows, as in [1]_, with the
    supervised contrastive loss of [2]_ or the pairwise loss of [1]_. The embeddings stay
    frozen; training takes seconds on a CPU. The output consists of the projection and, with
    `passthrough`, of the principal components of the input.

    `fit_transform` is *cross-fitted*, as in :class:`~sklearn.preprocessing.TargetEncoder`: each
    training row is projected by a network that was not trained on its label, and the space of
    this network is mapped onto that of the network fitted on all rows, which `transform` uses.
    Without cross-fitting, training rows would be much better separated than unseen rows, and the
    downstream estimator would be overconfident. Therefore ``fit_transform(X, y)`` differs from
    ``fit(X, y).transform(X)``; with ``cv=None``, as in the paper, they agree.

    Rows that are entirely NaN (a missing modality) are not used in training and stay NaN.

    Parameters
    ----------
    n_components : int, default=128
        Number of columns of the projection, and maximum number of principal components of the
        input.

    hidden_layer_sizes : tuple of int, default=(512,)
        Units of the hidden layers. ``()`` gives a linear map.

    loss : {"supcon", "pairwise_bce"}, callable or torch.nn.Module, default="supcon"
        The loss: supervised contrastive (equation 2 of [2]_), or the binary cross-entropy of
        every pair of a batch (section 3.1 of [1]_). A custom function is called with the
        projections (batch, n_components) and affinities (batch, batch) of a batch and returns
        a scalar. A module, such as a loss of pytorch-metric-learning, is called with
        projections and class codes; its parameters are trained too.

    similarity : {"cosine", "dot"}, default="cosine"
        Similarity of two projections: the cosine, as [1]_ describes, or the inner product,
        as its code computes. With "cosine" the projections are unit vectors.

    temperature : float, default=0.1
        Temperature by which similarities are divided. Ignored by custom losses.

    target_type : {"auto", "multiclass", "multilabel", "continuous", "hierarchical"}, \
            default="auto"
        Type of the target, which determines the affinity of two rows. "multiclass": 1 if the
        classes are equal. "multilabel", a 0/1 column for each label: the Jaccard index of the
        label sets. "continuous": a Gaussian of the distance in rank, of width 0.1.
        "hierarchical", a column of classes for each level of a tree, the coarsest first: the
        fraction of levels that agree, from the top. "auto" infers it from the values: numbers
        with a fraction are continuous; whole numbers and dates are classes. `fit` warns about
        whole numbers that look like measurements or counts: more than 20 distinct values of
        which half have fewer than 10 rows, or more than 10 of which half have one row.

    passthrough : bool or "auto", default=True
        Whether the output also contains the input, reduced to at most `n_components` principal
        components and scaled to the norm of the projection. "auto" chooses between the input,
        the projection and both: the simplest, in this order, for which the score of a linear
        probe is within one standard error of the best over the folds of `cv`. Without folds
        "auto" means True.

    dropout : float, default=0.5
        Dropout probability of hidden units during training.

    standardize : bool, default=True
        Whether to standardise the columns of the input.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn; of the coarsest level, if `y` has
        several. Classes without an entry have weight 1.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds of `fit_transform`. If an int, the number of shuffled (stratified) folds, capped
        at the size of the smallest class with two or more rows. If no folds can be formed,
        cross-fitting is skipped with a warning. A splitter must hold out each row exactly once.
        ``None`` disables cross-fitting.

    max_epochs : int, default=20
        Number of passes over the training rows.

    batch_size : int, default=128
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size. The loss is computed over all pairs of a batch.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to stop when the loss on a held-out validation set stops improving and
        restore the best weights. Each fold uses its own validation set.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. Ignored without
        `early_stopping`.

    n_iter_no_change : int, default=10
        Number of epochs without improvement before early stopping.

    warm_start : bool, default=False
        Whether `fit` continues from the weights of the previous fit. The validation set
        stays the same if `random_state` is an integer. The networks of the folds are always
        trained from the start, for the total number of epochs.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one. Predictions are always computed in numpy.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the initial weights, dropout and the order of
        rows. Pass an int for reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``.
        They override the other parameters. The networks of the folds are trained together in
        a second net with the same arguments. Callbacks can monitor ``valid_loss`` if there is
        early stopping, or a `train_split`. ``{"callbacks": "disable"}`` also disables those of
        skorch; `history_` then has neither loss nor duration.

    Attributes
    ----------
    weights_ : dict of str to ndarray of dtype float32
        Weights of the network fitted on all rows.

    components_ : dict of str to ndarray of dtype float32
        Mean and scaled principal axes of the input; empty without `passthrough`.

    gate_ : {"projection", "passthrough", "both"}
        Content of the output.

    gate_scores_ : dict of str to ndarray of shape (n_folds,)
        Out-of-fold scores of the linear probe on each candidate; empty unless
        ``passthrough="auto"``.

    structure_ : dict
        The arguments that determine the shapes of the network.

    n_parameters_ : int
        Number of trained parameters.

    history_ : list of dict
        An entry for each epoch with its mean loss.

    n_iter_ : int
        Number of epochs.

    target_type_ : str
        Type of the target.

    classes_ : ndarray of shape (n_classes,), list of ndarray or None
        The classes; a list with those of each level for trees; None for numbers.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

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

    _keeps_missing_rows = True  # NaN rows stay NaN: PerModalityUnion reads this
    _parameter_constraints: dict = {
        **TrainedEstimator._parameter_constraints,
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
        "cv": ["cv_object"],
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
        cv=5,
        max_epochs=20,
        batch_size=128,
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
        self.cv = cv
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

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, **params):
        """Train the network on all rows.

        Use `fit_transform` to obtain cross-fitted projections of the training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing embedding is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss. A row of weight w counts as w rows: as an anchor, a
            positive and a negative. Rows of weight 0 are ignored.

        **params : dict
            Metadata as for `fit_transform`, which only ``passthrough="auto"`` uses.

        Returns
        -------
        self : ContrastiveProjector
            The fitted projector.

        Raises
        ------
        ValueError
            If a label is missing or a list, no two observed rows belong together, all rows have
            the same target, `class_weight` has an entry for an unknown class and none for a class
            of `y`, no row is observed, a row is partly NaN, or `X` has tokens or texts.

        Warns
        -----
        UserWarning
            If whole numbers in `y` are read as classes but look like measurements, see
            `target_type`; if two columns of `y` have the same text for a label, as lists of tags
            do; or if a weight in `class_weight` has no effect.
        """
        cross_fit = self.passthrough == "auto"
        self._fit(X, y, sample_weight, params, "fit", cross_fit=cross_fit)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit_transform(self, X, y, sample_weight=None, **params):
        """Train the network, and project each row by a network not trained on its label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing embedding is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss, as for `fit`.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`; requires
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out), dtype float32
            The projections and the reduced input; rows of NaN stay NaN.

        Raises
        ------
        ValueError
            As for `fit`, and if the folds of `cv` do not hold out each row exactly once.
        """
        return self._fit(X, y, sample_weight, params, "fit_transform", cross_fit=True)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train the network for one more epoch on these rows.

        The first call determines how columns are standardised and reduced. Ranks of continuous
        targets are computed within the rows of a call. ``passthrough="auto"`` means True.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing embedding is a row of NaN.

        y : array-like of shape (n_samples,) or (n_samples, n_columns)
            Targets, see `target_type`.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss, as for `fit`.

        Returns
        -------
        self : ContrastiveProjector
            The projector.
        """
        resume = hasattr(self, "weights_")
        classes = getattr(self, "classes_", None)
        data = self._read(X, y, sample_weight, resume)
        if resume and isinstance(classes, np.ndarray):
            self.classes_ = np.union1d(classes, self.classes_)
        seed = draw_seed(self.random_state)
        set_components = None  # later calls keep the components of the first
        if not resume:
            components = self._reduce_input(data, seed)
            set_components = self._components_setter(data, components)
        self._train_on_all(data, seed, resume, set_components, max_epochs=1)
        return self

    @in_pieces
    def transform(self, X):
        """Project rows by the network fitted on all training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing embedding is a row of NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out), dtype float32
            The projections and the reduced input; rows of NaN stay NaN.
        """
        X = check_new_rows(self, X, ensure_all_finite=False)
        names = getattr(self, "feature_names_in_", None)
        observed = observed_rows(X, names=names)  # also checks for infinity
        if not observed.all():
            X = X[observed]
        Z = None
        if self.gate_ != "passthrough":
            Z = project(self.weights_, X, self.similarity)
        return self._output(Z, X, observed)

    def to_onnx(self, path):
        """Write `transform` as an ONNX model, for runtimes without Python; requires ``onnx``.

        The input is ``X``, float32 of shape (n_samples, n_features), the output ``Z``. Rows of
        NaN stay NaN.

        Parameters
        ----------
        path : str or Path
            The file to write.
        """
        from sklembed.projection.onnx import to_onnx

        check_is_fitted(self)
        to_onnx(self, path)

    def get_metadata_routing(self):
        """Return the metadata routing: metadata such as `groups` go to the `cv` splitter.

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
        """Fit, and return the projected training rows if the caller is `fit_transform`."""
        check_routing_enabled(params, self)
        routed = process_routing(self, caller, **params)
        resume = self._begin_fit()
        data = self._read(X, y, sample_weight, resume)
        self._check_labels(data, y)
        seed = draw_seed(self.random_state)
        folds = None
        if cross_fit:
            folds = make_folds(self.cv, data, seed, routed["splitter"]["split"])
        components = self._reduce_input(data, seed)
        set_components = self._components_setter(data, components)
        n_trainings = 1 if folds is None else 2
        context = self._init_callback_context(max_subtasks=n_trainings)
        with _callbacks.task(self, context, X, y):
            self._train_on_all(data, seed, resume, set_components, context)
            Z = None
            if folds is not None:
                Z = self._cross_fit(data, folds, seed, context)
            elif caller == "fit_transform":
                Z = project(self.weights_, data.X, self.similarity)
            if folds is not None and self.passthrough == "auto":
                self._choose_output(data, folds, Z)
        if caller == "fit":
            return None
        return self._output(Z, data.X, data.observed)

    def _read(self, X, y, sample_weight, resume):
        """Validate the training set, set the structure of the network, and return the set."""
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
            reset=not resume,
        )
        observed = observed_rows(X, names=getattr(self, "feature_names_in_", None))
        if not observed.any():
            raise ValueError(
                f"All {len(X)} rows of X are NaN: the modality is missing in all rows, and "
                "nothing can be learned. Remove the branch, or check its column."
            )
        target = encode_target(y, self.target_type)
        weight = self._row_weights(X, target, sample_weight)
        data = TrainingData(
            table=X,
            labels=target.values if target.strata is None else target.strata,
            X=X if observed.all() else X[observed],
            observed=observed,
            target=target.take(observed),
            weight=None if weight is None else weight[observed],
        )
        if not data.has_pairs():
            raise ValueError(
                f"No two of the {len(data.X)} observed rows belong together "
                f"({target.describe()}), so there are no positive pairs. Use more rows or fewer "
                "classes; if y contains measurements or counts, set target_type='continuous'."
            )
        sizes = [X.shape[1], *self.hidden_layer_sizes, self.n_components]
        self._set_structure({"sizes": [int(size) for size in sizes]}, resume)
        self.target_type_, self.classes_ = target.kind, target.classes
        return data

    def _check_labels(self, data, y):
        """Check conditions on the labels that a batch of `partial_fit` need not meet."""
        target = data.target
        if target.strata is not None:
            check_class_weight(self.class_weight, _coarsest_classes(target))
        if self.target_type == "auto":
            warn_if_measured(target, y)
            warn_if_tags(target)

    def _row_weights(self, X, target, sample_weight):
        """Return the weights of rows in the loss; None if all are 1."""
        if self.class_weight is not None and target.strata is None:
            raise ValueError(
                f"class_weight={self.class_weight!r} requires classes, but y was read as "
                f"{target.kind}. Set class_weight=None, or set target_type."
            )
        if sample_weight is None and self.class_weight is None:
            return None
        if self.loss not in _LOSSES:
            raise ValueError(
                "A custom loss does not support weights. Leave sample_weight and class_weight "
                "None."
            )
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float32, ensure_non_negative=True
        )
        if self.class_weight is not None:
            classes, by_class = _coarsest_classes(target), self.class_weight
            if isinstance(by_class, dict):  # a batch of partial_fit may lack classes
                by_class = {
                    label: by_class.get(label, 1.0) for label in classes.tolist()
                }
            weight = weight * compute_sample_weight(by_class, classes[target.strata])
        return weight.astype(np.float32)

    def _train_on_all(
        self, data, seed, resume, set_components, context=None, **options
    ):
        """Train the network that `transform` uses."""
        X, labels = data.X, data.target.values
        if resume:
            scaling = self.weights_["mean"], self.weights_["scale"]
        else:
            scaling = self._find_scaling(data)
        context = _callbacks.subtask(context, "network", None)
        with _callbacks.task(self, context, X, labels):
            self._train_network(
                partial(self._make_module, scaling, None),
                self._make_loss(data.target.kind, None),
                X,
                labels,
                self._split(data, None, seed),
                seed,
                sample_weight=data.weight,
                resume=resume,
                on_epoch=self._report_epochs(context, X, labels, set_components),
                **options,
            )
            if set_components is not None:
                set_components(self)

    def _cross_fit(self, data, folds, seed, context):
        """Project each row by the network of its fold, mapped onto the network of all rows."""
        from sklembed._training import TrainingOptions, train

        max_epochs = self.n_iter_ if self.warm_start else self.max_epochs
        scaling = self.weights_["mean"], self.weights_["scale"]
        context = _callbacks.subtask(context, "folds", None)
        with _callbacks.task(self, context, data.X, data.target.values):
            trained = train(
                partial(self._make_module, scaling, len(folds)),
                self._make_loss(data.target.kind, len(folds)),
                data.X,
                data.target.values,
                [self._split(data, rows, seed) for rows, _ in folds],
                TrainingOptions.of(self, seed, max_epochs=max_epochs),
                sample_weight=data.weight,
                on_epoch=_callbacks.each_epoch(
                    self, context, data.X, data.target.values
                ),
            )
            reference = project(self.weights_, data.X, self.similarity)
            Z = np.empty_like(reference)
            for number, (train_rows, held_out) in enumerate(folds):
                weights = _network_of_fold(trained.weights, number)
                projected = project(weights, data.X, self.similarity)
                # The two spaces are matched on rows that both networks were trained on.
                shared = data.training_rows(train_rows)
                onto = match(projected[shared], reference[shared])
                Z[held_out] = projected[held_out] @ onto
            if self.similarity == "cosine":
                normalize(Z)
        return Z

    def _split(self, data, rows, seed):
        """Divide the training rows of a network for early stopping."""
        rows = data.training_rows(rows)
        return self._split_rows(
            rows,
            data.target.strata,
            seed,
            data.target.has_pairs,
            "two rows that belong together",
        )

    def _find_scaling(self, data):
        """Return the mean and scale of each column over the training rows."""
        n_features = data.X.shape[1]
        if not self.standardize:
            return np.zeros(n_features, np.float32), np.ones(n_features, np.float32)
        rows = data.training_rows()
        chunks = [rows[chunk] for chunk in gen_batches(len(rows), _CHUNK_ROWS)]
        weights = None
        if data.weight is not None:
            weights = (data.weight[chunk] for chunk in chunks)
        return moments((data.X[chunk] for chunk in chunks), weights)

    def _reduce_input(self, data, seed):
        """Return the mean and the principal axes of the input; empty without passthrough."""
        self.gate_scores_ = {}
        self.gate_ = "both" if self.passthrough else "projection"
        self._n_features_out = self.n_components
        if not self.passthrough:
            return {}
        X = data.X
        if data.weight is not None:
            X = X[data.training_rows()]
        # PCA subtracts products of means, which cancels for columns far from 0.
        mean = X.mean(axis=0, dtype=np.float64)
        pca = PCA(min(self.n_components, *X.shape), copy=False, random_state=seed)
        with np.errstate(invalid="ignore", divide="ignore"):  # the variance may be 0
            pca.fit(X - mean)
        norm = np.sqrt(pca.explained_variance_.sum()) or 1.0
        self._n_features_out += len(pca.components_)
        return {
            "mean": mean.astype(np.float32),
            "axes": (pca.components_ / norm).astype(np.float32),
        }

    def _components_setter(self, data, components):
        """Return a function that sets the principal axes of a fitted projector.

        They are scaled to the norm of the projection, which is 1 for cosines.
        """

        def set_components(fitted):
            fitted.components_ = components
            if components and self.similarity == "dot":
                rows = data.training_rows()
                Z = project(fitted.weights_, data.X[rows], self.similarity)
                norm = np.sqrt(np.square(Z).sum(axis=1).mean())
                fitted.components_ = components | {"axes": components["axes"] * norm}

        return set_components

    def _choose_output(self, data, folds, Z):
        """Choose between the input, its projection and both."""
        reduced = reduce(self.components_, data.X)
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
        """Concatenate the columns of the output; missing rows are NaN."""
        parts = []
        if self.gate_ != "passthrough":
            parts.append(Z)
        if self.gate_ != "projection":
            parts.append(reduce(self.components_, X))
        if len(parts) == 1 and observed.all():
            return parts[0]
        out = np.full((len(observed), self._n_features_out), np.nan, dtype=np.float32)
        out[observed] = np.hstack(parts)
        return out

    def _make_module(self, scaling, n_networks, generator):
        """Return the networks, with weights drawn from the generator."""
        from sklembed._torch import to_tensor
        from sklembed.nn.projection import Projection

        mean, scale = scaling
        return Projection(
            **self.structure_,
            n_networks=n_networks,
            dropout=self.dropout,
            generator=generator,
            mean=to_tensor(mean, generator.device),
            scale=to_tensor(scale, generator.device),
        )

    def _make_loss(self, kind, n_networks):
        """Return the loss of a batch, given projections, targets and weights."""
        from torch.nn import Module

        from sklembed.nn.losses import AFFINITIES, LOSSES, CustomLoss

        affinity = AFFINITIES[kind]
        if not isinstance(self.loss, str):
            if isinstance(self.loss, Module) and kind != "multiclass":
                raise ValueError(
                    f"A loss module takes class codes, but y was read as {kind}. Use a function "
                    "of projections and affinities."
                )
            return CustomLoss(self.loss, affinity, n_networks)
        loss = partial(
            LOSSES[self.loss], temperature=self.temperature, similarity=self.similarity
        )
        return lambda z, y, weight: loss(z, affinity(y), weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float32"]  # as all embeddings
        return tags


def _coarsest_classes(target):
    """Return the classes, of the first level if there are several."""
    return target.classes[0] if target.kind == "hierarchical" else target.classes


def _network_of_fold(weights, number):
    """Return the weights of one of several stacked networks."""
    return {
        name: value[number] if name.startswith("layers") else value
        for name, value in weights.items()
    }
