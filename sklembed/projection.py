"""ContrastiveProjector: a small network that adapts frozen embeddings to the labels at hand."""

import warnings
from functools import partial
from numbers import Integral, Real

import numpy as np
from scipy.linalg import orthogonal_procrustes
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.model_selection import StratifiedKFold, check_cv
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed._blocks import observed_rows
from sklembed._validation import check_no_missing_label, check_routing_enabled, encode_classes


class ContrastiveProjector(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Project embeddings so that rows of one class lie close and rows of others far apart.

    A small multi-layer perceptron is trained on pairs of labelled rows, as in [1]_, with the
    pairwise loss of that paper or the supervised contrastive loss of [2]_. The embeddings stay
    frozen; training takes seconds on a CPU.

    `fit_transform` is *cross-fitted*, as in :class:`~sklearn.preprocessing.TargetEncoder`: each
    training row is projected by a network that has not seen its label, and the fold's space is
    rotated onto that of the network fitted on all rows, which `transform` uses for new rows.
    Without this the training rows are far better clustered than any new row will be, and whatever
    comes next in a pipeline learns to trust a clarity that is not there. So
    ``fit_transform(X, y)`` differs from ``fit(X, y).transform(X)``; with ``cv=None``, the plain
    behaviour of the paper, they agree.

    Rows of NaN throughout (a missing modality) are left out of training and stay NaN.

    Parameters
    ----------
    n_components : int, default=128
        Number of output columns.

    hidden_layer_sizes : tuple of int, default=(256,)
        Units of the hidden layers. ``()`` gives a linear map.

    loss : {"supcon", "pairwise_bce"}, default="supcon"
        What training minimises: the supervised contrastive loss (equation 2 of [2]_), or the
        binary cross-entropy of every pair of a batch (section 3.1 of [1]_).

    similarity : {"cosine", "dot"}, default="cosine"
        How alike two projections are: the cosine, as [1]_ describes, or the plain inner product,
        as its code computes. With "cosine" the projections are unit vectors.

    temperature : float, default=0.1
        What similarities are divided by before the loss.

    dropout : float, default=0.5
        Probability of leaving out a hidden unit in training.

    standardize : bool, default=True
        Whether to centre and scale the columns first, by the training rows.

    cv : int, cross-validation splitter, iterable or None, default=5
        Folds of `fit_transform`. An int means shuffled stratified folds, never more than the
        smallest class with at least two rows has rows. The folds must hold each row out exactly
        once. ``None`` switches cross-fitting off.

    max_epochs : int, default=20
        Passes over the training rows.

    batch_size : int, default=128
        Rows in a batch; all pairs within a batch are contrasted.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    device : str, default="auto"
        Where to train: "auto" takes an accelerator if there is one, else the CPU. `transform`
        always runs in numpy.

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the folds of an int `cv`.

    verbose : int, default=0
        Level of the training log that skorch prints.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``; they
        override what the other parameters set.

    Attributes
    ----------
    weights_ : dict of str to ndarray of dtype float32
        The network fitted on all rows.

    history_ : list of dict
        An entry for each epoch of that network's training, with its mean loss.

    n_iter_ : int
        Number of epochs run.

    classes_ : ndarray of shape (n_classes,)
        The labels seen.

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
    (1797, 16)
    """

    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "hidden_layer_sizes": ["array-like"],
        "loss": [StrOptions({"supcon", "pairwise_bce"})],
        "similarity": [StrOptions({"cosine", "dot"})],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "standardize": ["boolean"],
        "cv": ["cv_object"],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "skorch_params": [dict, None],
    }

    def __init__(
        self,
        n_components=128,
        *,
        hidden_layer_sizes=(256,),
        loss="supcon",
        similarity="cosine",
        temperature=0.1,
        dropout=0.5,
        standardize=True,
        cv=5,
        max_epochs=20,
        batch_size=128,
        lr=1e-3,
        weight_decay=0.01,
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
        self.dropout = dropout
        self.standardize = standardize
        self.cv = cv
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.skorch_params = skorch_params

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y):
        """Train the network on all rows.

        To go on with the projected training rows use `fit_transform`, which is cross-fitted.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        y : array-like of shape (n_samples,)
            Class labels of any type.

        Returns
        -------
        self : ContrastiveProjector
            The fitted projector.

        Raises
        ------
        ValueError
            If a label is missing, there is one class only, no two observed rows share a class, no
            row is observed, or a row is NaN in part.
        """
        X, codes, observed = self._check_training_data(X, y)
        self._fit_all(X[observed], codes[observed], _draw_seed(self.random_state))
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y, **params):
        """Train the network on all rows, and project each by one that has not seen its label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        y : array-like of shape (n_samples,)
            Class labels of any type.

        **params : dict
            Metadata for the `cv` splitter, such as `groups`; needs
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components), dtype float32
            The projections; rows of NaN stay NaN.

        Raises
        ------
        ValueError
            For what `fit` raises it, and if the folds of `cv` do not hold out each row once.
        """
        check_routing_enabled(params, self)
        routed = process_routing(self, "fit_transform", **params)
        X, codes, observed = self._check_training_data(X, y)
        seed = _draw_seed(self.random_state)
        if self.cv is None:
            self._fit_all(X[observed], codes[observed], seed)
            return self._project_observed(self.weights_, X, observed)

        folds = self._folds(X, codes, observed, seed, routed["splitter"]["split"])
        self._fit_all(X[observed], codes[observed], seed)
        everywhere = self._project_observed(self.weights_, X, observed)
        Z = np.full_like(everywhere, np.nan)
        for train, held_out in folds:
            weights, _ = self._train(X[train], codes[train], seed)
            # Both networks see the fold's training rows: there the two spaces are matched.
            rotation, _ = orthogonal_procrustes(self._project(weights, X[train]), everywhere[train])
            Z[held_out] = self._project(weights, X[held_out]) @ rotation
        return Z

    def transform(self, X):
        """Project rows by the network fitted on all training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a row of NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components), dtype float32
            The projections; rows of NaN stay NaN.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, ensure_all_finite="allow-nan", reset=False)
        return self._project_observed(self.weights_, X, observed_rows(X))

    def get_metadata_routing(self):
        """Say that metadata of `fit_transform`, such as `groups`, goes to the `cv` splitter.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        return MetadataRouter(owner=self).add(
            splitter=self.cv,
            method_mapping=MethodMapping().add(caller="fit_transform", callee="split"),
        )

    def _check_training_data(self, X, y):
        """Return X as float32, the class codes, and the mask of observed rows."""
        _check_layer_sizes(self.hidden_layer_sizes)
        if y is not None:
            check_no_missing_label(y)
        X, y = validate_data(
            self, X, y, dtype=np.float32, ensure_all_finite="allow-nan", ensure_min_samples=2
        )
        check_classification_targets(y)
        observed = observed_rows(X)
        if not observed.any():
            raise ValueError(
                f"All {len(X)} rows of X are NaN: the modality is missing everywhere, and there is "
                "nothing to learn from. Leave the branch out, or check the column it reads."
            )
        classes, codes = encode_classes(y)
        if np.bincount(codes[observed]).max() < 2:
            raise ValueError(
                f"No class has two observed rows ({observed.sum()} rows, {len(classes)} classes), "
                "so there is no pair to draw together. Give more rows, or fewer classes."
            )
        self.classes_ = classes
        return X, codes, observed

    def _folds(self, X, codes, observed, seed, routed):
        """List the folds as indices of observed rows to train on, and observed rows held out."""
        rows = np.flatnonzero(observed)
        if isinstance(self.cv, Integral):
            sizes = np.bincount(codes[rows])
            # Never more folds than the smallest class that can be split at all has rows.
            n_splits = min(self.cv, sizes[sizes >= 2].min())
            splitter = _StratifiedFolds(n_splits, shuffle=True, random_state=seed)
            folds = splitter.split(rows, codes[rows])
            return [(rows[train], rows[held_out]) for train, held_out in folds]
        everyone = np.arange(len(X))
        splitter = check_cv(self.cv, codes, classifier=True)
        folds = [
            (everyone[np.asarray(train)], everyone[np.asarray(held_out)])
            for train, held_out in splitter.split(X, codes, **routed)
        ]
        _check_each_row_held_out_once(folds, len(X))
        folds = [
            (train[observed[train]], held_out[observed[held_out]]) for train, held_out in folds
        ]
        if not all(len(train) for train, _ in folds):
            raise ValueError(
                "A fold of cv has no observed row to train on. Use fewer folds, or folds by which "
                "the observed rows are spread."
            )
        return [(train, held_out) for train, held_out in folds if len(held_out)]

    def _fit_all(self, X, codes, seed):
        """Train the network that `transform` uses."""
        self.weights_, self.history_ = self._train(X, codes, seed)
        self.n_iter_ = len(self.history_)
        self._n_features_out = self.n_components

    def _train(self, X, codes, seed):
        """Train one network; the only place that needs torch."""
        from sklembed._training import TrainingOptions, train

        options = TrainingOptions(
            max_epochs=self.max_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            device=self.device,
            seed=seed,
            verbose=self.verbose,
            skorch_params=self.skorch_params,
        )
        return train(self._make_module(X), self._make_loss(), X, codes, options)

    def _make_module(self, X):
        """Return a recipe for the network, given the generator to draw its weights from."""
        from sklembed._torch import to_tensor
        from sklembed.nn.modules import Projection

        mean, scale = np.zeros(X.shape[1], np.float32), np.ones(X.shape[1], np.float32)
        if self.standardize:
            scaler = StandardScaler().fit(X)
            mean, scale = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)
        sizes = [X.shape[1], *self.hidden_layer_sizes, self.n_components]
        return lambda generator: Projection(
            sizes,
            dropout=self.dropout,
            generator=generator,
            mean=to_tensor(mean, generator.device),
            scale=to_tensor(scale, generator.device),
        )

    def _make_loss(self):
        """Return the loss of a batch, given projections and class codes."""
        from sklembed.nn.losses import LOSSES, label_affinity

        loss = partial(LOSSES[self.loss], temperature=self.temperature, similarity=self.similarity)
        return lambda z, codes: loss(z, label_affinity(codes))

    def _project_observed(self, weights, X, observed):
        """Project the observed rows and leave the others NaN."""
        Z = np.full((len(X), self.n_components), np.nan, dtype=np.float32)
        Z[observed] = self._project(weights, X[observed])
        return Z

    def _project(self, weights, X):
        """Run a trained network in numpy."""
        n_layers = sum(name.endswith(".weight") for name in weights)
        Z = (X - weights["mean"]) / weights["scale"]
        for layer in range(n_layers):
            if layer > 0:
                np.maximum(Z, 0, out=Z)
            Z = Z @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        if self.similarity == "cosine":
            Z /= np.maximum(np.linalg.norm(Z, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return Z

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float32"]  # embeddings are float32 everywhere
        return tags


class _StratifiedFolds(StratifiedKFold):
    """Stratified folds that let a class of one row be held out without a warning."""

    def split(self, X, y, groups=None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            yield from super().split(X, y)


def _check_layer_sizes(sizes):
    """Refuse hidden layers that are not a sequence of positive integers."""
    if not all(
        isinstance(size, Integral) and not isinstance(size, bool) and size > 0 for size in sizes
    ):
        raise ValueError(
            f"hidden_layer_sizes must hold positive integers, such as (256,), or be empty; got "
            f"{sizes!r}."
        )


def _draw_seed(random_state):
    """Draw one seed for everything random in a fit."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


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
