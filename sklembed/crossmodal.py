"""SharedFusionEncoder and CrossAttentionAdaptor: align modalities from unlabelled pairs."""

import math
import warnings
from functools import partial
from hashlib import blake2b
from itertools import combinations
from numbers import Integral, Real

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.base import TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed import _callbacks
from sklembed._callbacks import with_callbacks
from sklembed._table.blocks import (
    check_names,
    check_one_block,
    known_block,
    observed_in_block,
    resolve_blocks,
)
from sklembed._table.columns import as_table, output_container, take_columns
from sklembed._table.tokens import pad_tokens, read_tokens, token_columns
from sklembed._trained import TrainedEstimator, moments
from sklembed._validation import check_vectors, draw_seed, in_pieces
from sklembed.metrics import retrieval_recall

FUSIONS = ("add", "multiply", "concat")  # for any block
ATTENTION_FUSIONS = ("additive", "general", "scaled_dot")  # for columns of tokens
_CHUNK_TOKENS = 4096  # of a forward pass without training
_COLLAPSED = 0.99  # mean similarity of non-pairs in a collapsed space
# Cosine of collapsed contexts; those of accurate encoders can be as near as 1 - 1e-6.
_SAME_CONTEXT = 1 - 1e-9


class _CrossModalEncoder(TransformerMixin, TrainedEstimator):
    """Base class of the cross-modal encoders; a subclass makes the network."""

    _keeps_missing_rows = True  # NaN rows stay NaN: PerModalityUnion reads this
    _parameter_constraints: dict = {
        **TrainedEstimator._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "blocks": [dict, None],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "dim_feedforward": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "input_dropout": [Interval(Real, 0, 1, closed="left")],
        "temperature": [Interval(Real, 0.01, 1, closed="both")],
        "direction_weight": [Interval(Real, 0, 1, closed="both")],
        "mask_duplicates": ["boolean"],
        "standardize": ["boolean"],
        "chunk_size": [Interval(Integral, 1, None, closed="left"), None],
    }

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y=None):
        """Learn the shared space from the rows that have two modalities or more.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities, concatenated; a missing modality is a block of NaN. In a
            DataFrame, or an array of dtype object, a modality may be one column of tokens: cells
            of shape (n_tokens, width), None where missing.

        y : None
            Ignored.

        Returns
        -------
        self : estimator
            The fitted encoder.

        Raises
        ------
        ValueError
            If there is only one modality, the columns do not form blocks, fewer than two rows are
            pairs, a modality is in no pair, a block is NaN in part of a row, tokens differ in
            width, or the parameters of the network are incompatible.

        Warns
        -----
        UserWarning
            If the space has collapsed, so that non-pairs are nearly identical, or if the contexts
            have.
        """
        resume = self._begin_fit()
        parts = self._read(X, reset=not resume)
        self._check_network()
        rows = self._find_pairs(parts)
        self._set_structure(self._make_structure(), resume)
        seed = draw_seed(self.random_state)
        scaling = []
        for name, part in parts.items():
            width = self.widths_[name]
            scaling.append(_find_scaling(part[rows], width, self.standardize))
        codes = np.stack([_content_codes(part) for part in parts.values()], axis=1)
        padded = [_dense(part, self.widths_[name]) for name, part in parts.items()]
        packed = np.hstack([part.reshape(len(part), -1) for part in padded])
        shapes = [part.shape[1:] for part in padded]
        objective = _Objective(self.direction_weight, self.mask_duplicates)
        n_past = len(self.history_) if resume else 0
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        with _callbacks.task(self, context, X, y):
            self._train_network(
                partial(self._make_network, scaling, shapes),
                objective,
                packed,
                codes,
                self._split_rows(
                    rows, None, seed, lambda part: len(part) > 1, "two pairs"
                ),
                seed,
                resume=resume,
                on_epoch=self._watch(objective, self._report_epochs(context, X, y)),
            )
        if len(objective.epochs) < self.n_iter_ - n_past:
            objective.end_epoch()  # a callback stopped training before this epoch was reported
        self.history_ = objective.record(self.history_)
        self._warn_if_collapsed()
        return self

    @in_pieces
    def transform(self, X):
        """Map every modality of each row to the shared space.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`; any modality may be missing.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_modalities * n_components), dtype float32
            A block of unit vectors for each modality, NaN where it is missing. Adapted tokens
            are an array of shape (n_samples, n_modalities) and dtype object, with cells of shape
            (n_tokens, n_components), None where missing.
        """
        check_is_fitted(self)
        parts = self._read(X, reset=False)
        output = self._checked_output()
        blocks = [self._embed(name, part, output) for name, part in parts.items()]
        return np.hstack(blocks)

    @in_pieces
    def encode(self, X, modality):
        """Map rows of one modality to the shared space.

        Parameters
        ----------
        X : array-like of shape (n_samples, width)
            The columns of this modality alone, in the order of its block; or its column of tokens.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components), dtype float32
            The block of the modality in `transform`: unit vectors, NaN where `X` is.

        Raises
        ------
        ValueError
            If there is no such block, or the width differs from that in `fit`.
        """
        check_is_fitted(self)
        known_block(modality, self.blocks_)
        part = self._read_one(X, modality)
        return self._embed(modality, part, self._checked_output())

    def score(self, X, y=None):
        """Mean recall@1 of cross-modal retrieval, in both directions, over pairs of modalities.

        Rows with identical content in either modality, directly or transitively, count as correct
        matches. A grid search needs no labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`; rows with fewer than two modalities are ignored.

        y : None
            Ignored.

        Returns
        -------
        recall : float
            Recall between 0 and 1.

        Raises
        ------
        ValueError
            If no row has two modalities.
        """
        check_is_fitted(self)
        parts = self._read(X, reset=False)
        codes, vectors = {}, {}
        for name, part in parts.items():
            codes[name] = _content_codes(part)
            vectors[name] = self._embed(name, part, "pooled")
        recalls = []
        for a, b in combinations(parts, 2):
            pairs = (codes[a] >= 0) & (codes[b] >= 0)
            if not pairs.any():
                continue
            groups = _content_groups(codes[a][pairs], codes[b][pairs])
            a, b = vectors[a][pairs], vectors[b][pairs]
            recalls.append(retrieval_recall(a, b, labels=groups))
            recalls.append(retrieval_recall(b, a, labels=groups))
        if not recalls:
            n_rows = len(next(iter(codes.values())))
            raise ValueError(f"None of the {n_rows} rows has two modalities.")
        return float(np.mean(recalls))

    def get_feature_names_out(self, input_features=None):
        """Return the names of the output columns, ``<block>__<number>``.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names.
        """
        check_is_fitted(self)
        n_columns = self._n_columns()
        names = [f"{name}__{i}" for name in self.widths_ for i in range(n_columns)]
        return np.array(names, dtype=object)

    def _n_columns(self):
        """Return the number of output columns of each modality."""
        return self.structure_["n_components"]

    def _read(self, X, *, reset):
        """Return the rows of each modality: vectors (n_samples, 1, width), or cells of tokens."""
        table, tokens = X, token_columns(X)
        columns = None
        if tokens.any() or (not reset and any(self.holds_tokens_.values())):
            X = as_table(X)
            validate_data(self, X, skip_check_array=True, reset=reset)
            columns = [take_columns(X, [i], scalar=True) for i in range(X.shape[1])]
        else:
            check_vectors(X, self)
            X = validate_data(
                self, X, dtype=np.float32, ensure_all_finite="allow-nan", reset=reset
            )
        if reset:
            self._find_blocks(as_table(table), tokens, columns)
        parts = {}
        for name, block in self.blocks_.items():
            if tokens.any() and tokens[block].any() and not self.holds_tokens_[name]:
                raise ValueError(
                    f"Block {name!r} has a column of tokens, but had numbers in fit."
                )
            if columns is None:
                observed_in_block(X, name, block)
                parts[name] = X[:, block][:, None]
            else:
                parts[name] = self._read_columns(name, columns)
        return parts

    def _find_blocks(self, X, tokens, columns):
        """Set the columns of each modality, their widths, and which of them are tokens."""
        n_columns = X.shape[1]
        names = getattr(self, "feature_names_in_", None)
        if names is not None and len(tokens) and self.blocks is None:
            # A column of tokens is a modality by itself, so its name needs no separator.
            names = list(names)
            for position in np.flatnonzero(tokens):
                if "__" not in names[position]:
                    names[position] += "__"
        self.blocks_ = resolve_blocks(self.blocks, names, n_columns, X)
        if len(self.blocks_) < 2:
            raise ValueError(
                f"A shared space requires at least two modalities, but the n_features={n_columns} "
                f"columns form the blocks {list(self.blocks_)}."
            )
        if self.blocks is None and "missing" in self.blocks_:
            raise ValueError(
                "The block 'missing' indicates missing modalities and is not a modality. Exclude "
                "it: set add_indicator=False in the union."
            )
        self.widths_, self.holds_tokens_ = {}, {}
        for name, block in self.blocks_.items():
            positions = np.arange(n_columns)[block]
            width = len(positions)
            holds_tokens = len(tokens) > 0 and bool(tokens[block].any())
            if holds_tokens and width > 1:
                raise ValueError(
                    f"Block {name!r} has a column of tokens among its {width} columns, but a "
                    "column of tokens is a block by itself. Rename the other columns, or pass "
                    "blocks."
                )
            if holds_tokens:
                cells = read_tokens(columns[positions[0]], name)
                width = next(cell.shape[1] for cell in cells if cell is not None)
            self.widths_[name], self.holds_tokens_[name] = width, holds_tokens

    def _read_columns(self, name, columns):
        """Return the rows of one modality of a table with columns of tokens."""
        positions = np.arange(len(columns))[self.blocks_[name]]
        if self.holds_tokens_[name]:
            return read_tokens(columns[positions[0]], name, self.widths_[name])
        numbers = [np.asarray(columns[i], dtype=np.float32) for i in positions]
        part = np.stack(numbers, axis=1)
        observed_in_block(part, name, slice(None))
        return part[:, None]

    def _read_one(self, X, modality):
        """Return the rows of a table with one modality only."""
        if not self.holds_tokens_[modality]:
            check_vectors(X, self)
            return check_one_block(self, X, modality, np.float32)[:, None]
        columns = np.arange(self.n_features_in_)[self.blocks_[modality]]
        fitted_names = getattr(self, "feature_names_in_", None)
        check_names(X, modality, fitted_names, columns)
        if len(getattr(X, "shape", ())) == 2:
            if X.shape[1] != 1:
                raise ValueError(
                    f"Block {modality!r} is one column of tokens; got {X.shape[1]} columns. "
                    "Pass the column of this modality alone."
                )
            X = take_columns(X, [0], scalar=True)
        return read_tokens(X, modality, self.widths_[modality])

    def _check_network(self):
        """Refuse parameters from which no network can be made."""
        if getattr(self, "n_layers", 1) and self.n_components % self.n_heads:
            raise ValueError(
                f"n_components={self.n_components} must be a multiple of n_heads={self.n_heads}."
            )

    def _find_pairs(self, parts):
        """Return the training rows, which have at least two modalities."""
        observed = np.stack([_n_tokens(part) > 0 for part in parts.values()], axis=1)
        rows = np.flatnonzero(observed.sum(axis=1) >= 2)
        counts = dict(zip(parts, observed.sum(axis=0).tolist(), strict=True))
        if len(rows) < 2:
            raise ValueError(
                f"{len(rows)} of n_samples={len(observed)} rows have two modalities, but at least "
                f"two such rows (pairs) are required. Rows with each modality: {counts}."
            )
        for name, part in parts.items():
            codes = _content_codes(part[rows])
            codes = codes[codes >= 0]
            if not len(codes):
                raise ValueError(
                    f"No row has {name!r} together with another modality, so it cannot be "
                    f"aligned. Rows with each modality: {counts}."
                )
            if (codes == codes[0]).all():
                raise ValueError(
                    f"The {len(codes)} pairs with {name!r} all have the same content in it, so "
                    "they cannot be distinguished. Check the previous step of the pipeline."
                )
        return rows

    def _set_trained(self, history, weights):
        from sklembed.nn.crossmodal import SCALES

        super()._set_trained(history, weights)
        scale = np.clip(np.exp(np.float64(weights["log_scale"])), *SCALES)
        self.temperature_ = float(1 / scale)

    def _watch(self, objective, report):
        """Return a function that records the similarities of an epoch and reports the epoch."""

        def after_epoch(history, weights):
            objective.end_epoch()
            return report is not None and report(objective.record(history), weights)

        return after_epoch

    def _warn_if_collapsed(self):
        """Warn if pairs and non-pairs have nearly the same similarity."""
        for entry in reversed(self.history_):  # the last epoch that improved
            if entry.get("valid_loss_best", True):
                break
        if entry["negative_similarity"] > _COLLAPSED:
            warnings.warn(
                f"{type(self).__name__} has collapsed: the mean similarity is "
                f"{entry['negative_similarity']:.3f} for non-pairs and "
                f"{entry['positive_similarity']:.3f} for pairs. Lower lr or the initial "
                "temperature, or train for more epochs.",
                stacklevel=2,
            )

    def _embed(self, name, part, output):
        """Map rows of one modality by the fitted network; missing rows are NaN, or None."""
        import torch

        network = self._fitted_network()
        modality = list(self.widths_).index(name)
        if output == "tokens":
            embedded = np.full((len(part), 1), None, dtype=object)
        else:
            n_components = self.structure_["n_components"]
            embedded = np.full((len(part), n_components), np.nan, dtype=np.float32)
        with torch.inference_mode():
            for rows in _batches_by_length(_n_tokens(part)):
                tokens = torch.from_numpy(_dense(part[rows], self.widths_[name]))
                observed = ~tokens[..., 0].isnan()
                tokens = network.standardized(tokens, modality)
                if output == "pooled":
                    embedded[rows] = network.unit(tokens, observed, modality).numpy()
                    continue
                adapted = network.adapt(tokens, observed, modality).numpy()
                for row, vectors, mask in zip(
                    rows, adapted, observed.numpy(), strict=True
                ):
                    embedded[row, 0] = vectors[mask]
        return embedded

    def _checked_output(self):
        """Return the kind of output of `transform`."""
        return "pooled"

    def _make_structure(self):
        """Return the parameters that determine the shapes of the network."""
        return {
            "n_components": self.n_components,
            "n_heads": self.n_heads,
            "dim_feedforward": self.dim_feedforward,
        }

    def _make_network(self, scaling, shapes, generator):
        """Return the network, with weights drawn from the generator."""
        from sklembed._torch import to_tensors

        network = self._empty_network(shapes, generator)
        network = network.to_empty(device=generator.device)
        network.initialize(to_tensors(scaling, generator.device))
        return network

    def _fitted_network(self):
        """Return the network with the fitted weights."""
        from sklembed._torch import rebuilt

        shapes = [
            (1, width) for width in self.widths_.values()
        ]  # for any number of tokens
        return rebuilt(self._empty_network(shapes), self.weights_)

    def _empty_network(self, shapes, generator=None):
        """Return the network on the meta device, without weights."""
        import torch

        with torch.device("meta"):
            return self._network_class()(
                shapes,
                **self.structure_,
                dropout=self.dropout,
                input_dropout=self.input_dropout,
                temperature=self.temperature,
                chunk_size=self.chunk_size,
                generator=generator,
            )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class SharedFusionEncoder(_CrossModalEncoder):
    """Align modalities by a small encoder with a learned context per modality (LightCRL [1]_).

    Each modality is projected to the same width and fused with a learned context vector of the
    modality. One transformer layer, shared by all modalities, and the mean over tokens follow.
    The symmetric contrastive loss on unlabelled pairs trains the network. Rows do not influence
    each other: the vector of a row is the same alone, in any batch, with or without its partner.

    The released code of [1]_ differs in three ways: its initial temperature is
    ``exp(-0.07)``, about 0.93; padding takes part in attention and mean; and other captions of the
    same image are negatives (``mask_duplicates=False``). Its sizes are ``n_components=256,
    n_heads=4, dim_feedforward=2048, dropout=0.1, input_dropout=0``. Here, the residual branches of
    the transformer layer start at 0.

    Parameters
    ----------
    n_components : int, default=256
        Number of dimensions of the shared space.

    fusion : {"add", "multiply", "concat", "additive", "general", "scaled_dot"}, default="add"
        Fusion of context and tokens. The first three support any block. The last three are
        attentions of the context over the tokens of a row and require columns of tokens, because
        over one vector the softmax is 1.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``. A column of tokens is a block by itself.

    n_heads : int, default=4
        Number of attention heads; must divide `n_components`.

    dim_feedforward : int, default=512
        Hidden units of a transformer layer; 2048 in [1]_.

    dropout : float, default=0.5
        Dropout probability of hidden units during training.

    input_dropout : float, default=0.5
        Dropout probability of the entries of the input during training; 0 in [1]_.

    share_layer : bool, default=True
        Whether modalities share fusion and transformer layer.

    temperature : float, default=0.07
        Initial temperature by which similarities are divided. It is learned, within
        [0.01, 1].

    direction_weight : float, default=0.5
        Weight of the loss that retrieves a later block by an earlier block; the opposite
        direction has the remaining weight.

    mask_duplicates : bool, default=True
        Whether to exclude rows with identical content in one modality from each other's
        negatives.

    standardize : bool, default=True
        Whether to standardise the columns of the input.

    chunk_size : int or None, default=None
        Micro-batch size for gradient caching [2]_. Reduces memory; gradients equal those of
        the full batch up to dropout noise.

    max_epochs : int, default=30
        Number of passes over the training rows.

    batch_size : int, default=256
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size. The other rows of a batch are the negatives of a row.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=1e-3
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to stop when the loss on a held-out validation set stops improving and
        restore the best weights.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. Ignored without
        `early_stopping`.

    n_iter_no_change : int, default=10
        Number of epochs without improvement before early stopping.

    warm_start : bool, default=False
        Whether `fit` continues from the weights of the previous fit. The validation set
        stays the same if `random_state` is an integer.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the initial weights, dropout and the order of
        rows. Pass an int for reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``.
        They override the other parameters.

    Attributes
    ----------
    context_similarity_ : ndarray of shape (n_modalities, n_modalities)
        Cosine similarity of the contexts. At 1, contexts do not distinguish the modalities, and
        `fit` warns.

    weights_ : dict of str to ndarray
        Weights of the network.

    history_ : list of dict
        An entry for each epoch with "train_loss", "positive_similarity" and
        "negative_similarity" (mean cosine of pairs and of non-pairs in training), and
        "valid_loss" with early stopping.

    n_iter_ : int
        Number of epochs.

    temperature_ : float
        The learned temperature.

    n_parameters_ : int
        Number of trained parameters.

    structure_ : dict
        The arguments that determine the shapes of the network.

    blocks_, widths_, holds_tokens_ : dict
        For each modality: its columns, the width of its vectors, and whether it is a column of
        tokens.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

    See Also
    --------
    CrossAttentionAdaptor : Learned queries in place of contexts.
    CanonicalAligner : The closed form, for two modalities.

    References
    ----------
    .. [1] Faye et al. Lightweight Cross-Modal Representation Learning. arXiv 2403.04650.
    .. [2] Gao et al. Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
       arXiv 2101.06983.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import SharedFusionEncoder
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(400, 4))
    >>> text = shared @ rng.normal(size=(4, 10)) + 0.1 * rng.normal(size=(400, 10))
    >>> image = shared @ rng.normal(size=(4, 20)) + 0.1 * rng.normal(size=(400, 20))
    >>> X = np.hstack([text, image])
    >>> blocks = {"text": slice(0, 10), "image": slice(10, 30)}
    >>> encoder = SharedFusionEncoder(32, blocks=blocks, max_epochs=20, random_state=0)
    >>> encoder.fit(X[:300]).score(X[300:]) > 0.5
    True
    """

    _parameter_constraints: dict = {
        **_CrossModalEncoder._parameter_constraints,
        "fusion": [StrOptions({*FUSIONS, *ATTENTION_FUSIONS})],
        "share_layer": ["boolean"],
    }

    def __init__(
        self,
        n_components=256,
        *,
        fusion="add",
        blocks=None,
        n_heads=4,
        dim_feedforward=512,
        dropout=0.5,
        input_dropout=0.5,
        share_layer=True,
        temperature=0.07,
        direction_weight=0.5,
        mask_duplicates=True,
        standardize=True,
        chunk_size=None,
        max_epochs=30,
        batch_size=256,
        lr=1e-3,
        weight_decay=1e-3,
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
        self.fusion = fusion
        self.blocks = blocks
        self.n_heads = n_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.share_layer = share_layer
        self.temperature = temperature
        self.direction_weight = direction_weight
        self.mask_duplicates = mask_duplicates
        self.standardize = standardize
        self.chunk_size = chunk_size
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

    def _network_class(self):
        from sklembed.nn.crossmodal import SharedFusionNetwork

        return SharedFusionNetwork

    def _make_structure(self):
        return super()._make_structure() | {
            "fusion": self.fusion,
            "share_layer": self.share_layer,
        }

    def _check_network(self):
        super()._check_network()
        pooled = [name for name in self.blocks_ if not self.holds_tokens_[name]]
        if pooled and self.fusion in ATTENTION_FUSIONS:
            raise ValueError(
                f"fusion={self.fusion!r} is an attention over the tokens of a row, but block "
                f"{pooled[0]!r} has one vector per row, for which the softmax is 1. Use columns "
                "of tokens, from FrozenEncoder(output='tokens'), or fusion='add', 'multiply' or "
                "'concat'."
            )

    def _set_trained(self, history, weights):
        import torch

        super()._set_trained(history, weights)
        with torch.inference_mode():
            contexts = self._fitted_network().embedded_contexts().double().numpy()
        norms = np.linalg.norm(contexts, axis=1, keepdims=True)
        contexts /= np.maximum(norms, np.finfo(np.float64).tiny)
        self.context_similarity_ = contexts @ contexts.T

    def _warn_if_collapsed(self):
        super()._warn_if_collapsed()
        names = list(self.widths_)
        for a, b in combinations(range(len(names)), 2):
            if self.context_similarity_[a, b] > _SAME_CONTEXT:
                warnings.warn(
                    f"The contexts of {names[a]!r} and {names[b]!r} have collapsed: their cosine "
                    f"is {self.context_similarity_[a, b]:.3f}, so the encoder cannot distinguish "
                    "the modalities. Change random_state, or lower lr.",
                    stacklevel=2,
                )


class CrossAttentionAdaptor(_CrossModalEncoder):
    """Align modalities by shared attention layers with learned queries (Adaptor [1]_).

    Each modality is projected to the same width and unit length. A few learned queries attend to
    its vectors in layers; queries and layers are shared by all modalities. The mean of the queries
    is the vector of the row. A contrastive loss on unlabelled pairs trains the network. Rows do not
    influence each other: the vector of a row is the same alone, in any batch, with or without its
    partner.

    In the released code of [1]_ the query is the pooled vector of the partner. Attention over the
    single vector of a row is 1 for any query, so modalities are not mixed and only the feed-forward
    part of the layers remains; ``n_queries=0`` computes just that. Downstream, the released code
    attends across the rows of a batch, so that a prediction depends on the other rows; this
    implementation does not. The sizes of that code are ``n_components=768, n_layers=2, n_heads=12,
    dim_feedforward=2048, n_queries=0, dropout=0.1, input_dropout=0, direction_weight=0.75,
    mask_duplicates=False`` with texts as the first block. Here, the residual branches of the layers
    start at 0.

    Parameters
    ----------
    n_components : int, default=256
        Number of dimensions of the shared space; 768 in [1]_.

    n_queries : int, default=2
        Number of learned queries. With 0 the vectors of a row attend to each other, and the vector
        of the row is their mean; so it is with ``output="tokens"``, which has no use for queries.

    n_layers : int, default=1
        Number of attention layers; 2 in [1]_.

    output : {"pooled", "tokens"}, default="pooled"
        Output of `transform`, and therefore of the network in training: one vector per row, or an
        adapted vector per token, in one object column for each modality, as from
        ``FrozenEncoder(output="tokens")``.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``. A column of tokens is a block by itself.

    n_heads : int, default=4
        Number of attention heads; must divide `n_components`.

    dim_feedforward : int, default=512
        Hidden units of a transformer layer; 2048 in [1]_.

    dropout : float, default=0.5
        Dropout probability of hidden units during training. 0.1 in [1]_.

    input_dropout : float, default=0.5
        Dropout probability of the entries of the input during training; 0 in [1]_.

    temperature : float, default=0.07
        Initial temperature by which similarities are divided. It is learned, within
        [0.01, 1].

    direction_weight : float, default=0.5
        Weight of the loss that retrieves a later block by an earlier block; the opposite
        direction has the remaining weight.

    mask_duplicates : bool, default=True
        Whether to exclude rows with identical content in one modality from each other's
        negatives.

    standardize : bool, default=False
        Whether to standardise the columns of the input.

    chunk_size : int or None, default=None
        Micro-batch size for gradient caching [2]_. Reduces memory; gradients equal those of
        the full batch up to dropout noise.

    max_epochs : int, default=30
        Number of passes over the training rows.

    batch_size : int, default=256
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size. The other rows of a batch are the negatives of a row.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=1e-3
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to stop when the loss on a held-out validation set stops improving and
        restore the best weights.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. Ignored without
        `early_stopping`.

    n_iter_no_change : int, default=10
        Number of epochs without improvement before early stopping.

    warm_start : bool, default=False
        Whether `fit` continues from the weights of the previous fit. The validation set
        stays the same if `random_state` is an integer.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the initial weights, dropout and the order of
        rows. Pass an int for reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``.
        They override the other parameters.

    Attributes
    ----------
    weights_ : dict of str to ndarray
        Weights of the network.

    history_ : list of dict
        An entry for each epoch with "train_loss", "positive_similarity" and
        "negative_similarity" (mean cosine of pairs and of non-pairs in training), and
        "valid_loss" with early stopping.

    n_iter_ : int
        Number of epochs.

    temperature_ : float
        The learned temperature.

    n_parameters_ : int
        Number of trained parameters.

    structure_ : dict
        The arguments that determine the shapes of the network.

    blocks_, widths_, holds_tokens_ : dict
        For each modality: its columns, the width of its vectors, and whether it is a column of
        tokens.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

    See Also
    --------
    SharedFusionEncoder : Contexts in place of queries.

    References
    ----------
    .. [1] Qin et al. Freeze the Backbones. arXiv 2401.01179.
    .. [2] Gao et al. Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
       arXiv 2101.06983.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CrossAttentionAdaptor
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(400, 4))
    >>> text = shared @ rng.normal(size=(4, 10)) + 0.1 * rng.normal(size=(400, 10))
    >>> image = shared @ rng.normal(size=(4, 20)) + 0.1 * rng.normal(size=(400, 20))
    >>> X = np.hstack([text, image])
    >>> blocks = {"text": slice(0, 10), "image": slice(10, 30)}
    >>> adaptor = CrossAttentionAdaptor(32, blocks=blocks, max_epochs=20, random_state=0)
    >>> adaptor.fit(X[:300]).score(X[300:]) > 0.5
    True
    """

    _parameter_constraints: dict = {
        **_CrossModalEncoder._parameter_constraints,
        "n_queries": [Interval(Integral, 0, None, closed="left")],
        "n_layers": [Interval(Integral, 0, None, closed="left")],
        "output": [StrOptions({"pooled", "tokens"})],
    }

    def __init__(
        self,
        n_components=256,
        *,
        n_queries=2,
        n_layers=1,
        output="pooled",
        blocks=None,
        n_heads=4,
        dim_feedforward=512,
        dropout=0.5,
        input_dropout=0.5,
        temperature=0.07,
        direction_weight=0.5,
        mask_duplicates=True,
        standardize=False,
        chunk_size=None,
        max_epochs=30,
        batch_size=256,
        lr=1e-3,
        weight_decay=1e-3,
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
        self.n_queries = n_queries
        self.n_layers = n_layers
        self.output = output
        self.blocks = blocks
        self.n_heads = n_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.temperature = temperature
        self.direction_weight = direction_weight
        self.mask_duplicates = mask_duplicates
        self.standardize = standardize
        self.chunk_size = chunk_size
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

    def _network_class(self):
        from sklembed.nn.crossmodal import AdaptorNetwork

        return AdaptorNetwork

    def _make_structure(self):
        return super()._make_structure() | {
            "n_queries": self.n_queries,
            "n_layers": self.n_layers,
            "of_tokens": self.output == "tokens",
        }

    def _checked_output(self):
        if self.output == "tokens" and output_container(self) == "polars":
            raise ValueError(
                "output='tokens' returns object columns of arrays of different lengths, which "
                "polars does not support. Use set_output(transform='pandas') or 'default'."
            )
        return self.output

    def _n_columns(self):
        return 1 if self.output == "tokens" else super()._n_columns()


class _Objective:
    """The contrastive loss over all pairs of modalities; records similarities in training."""

    def __init__(self, direction_weight, mask_duplicates):
        self.direction_weight = direction_weight
        self.mask_duplicates = mask_duplicates
        self.epochs = []
        self._positive = []  # mean similarities in the batches of the current epoch
        self._negative = []

    def __call__(self, embedded, codes, weight):
        """Return the loss of a batch, given the content codes (batch, n_modalities) of rows."""
        from sklembed.nn.losses import info_nce

        losses = []
        for a, b in combinations(range(codes.shape[1]), 2):
            za, zb = embedded.z[:, a], embedded.z[:, b]
            pairs = embedded.observed[:, a] & embedded.observed[:, b]
            same = codes[:, None, a] == codes[:, a]
            same |= codes[:, None, b] == codes[:, b]
            loss = info_nce(
                za,
                zb,
                embedded.log_scale,
                observed=pairs,
                same=same if self.mask_duplicates else None,
                direction_weight=self.direction_weight,
            )
            losses.append(loss)
            if za.requires_grad and pairs.any():
                cosines = (za[pairs] @ zb[pairs].T).detach()
                self._positive.append(cosines.diag().mean())
                different = cosines[~same[pairs][:, pairs]]
                if len(different):
                    self._negative.append(different.mean())
        return sum(losses) / len(losses)

    def end_epoch(self):
        """Average the similarities over the batches of the epoch."""
        epoch = {
            "positive_similarity": _mean(self._positive),
            "negative_similarity": _mean(self._negative),
        }
        self.epochs.append(epoch)
        self._positive.clear()
        self._negative.clear()

    def record(self, history):
        """Return the history with the similarities of its last epochs."""
        n_past = len(history) - len(self.epochs)
        recorded = history[:n_past]
        for entry, epoch in zip(history[n_past:], self.epochs, strict=True):
            recorded.append(entry | epoch)
        return recorded


def _mean(similarities):
    """Return the mean; NaN without any."""
    if not similarities:
        return math.nan
    return float(sum(similarities) / len(similarities))


def _n_tokens(part):
    """Return the number of tokens of each row of a modality; a vector is one token."""
    if part.dtype == object:
        counts = [0 if cell is None else len(cell) for cell in part]
        return np.array(counts, dtype=np.int64)
    return (~np.isnan(part[:, 0, 0])).astype(np.int64)


def _dense(part, width):
    """Return rows of a modality as (n_samples, n_tokens, width), NaN where missing."""
    if part.dtype == object:
        return pad_tokens(part, width)
    return np.ascontiguousarray(part)


def _batches_by_length(lengths):
    """Yield positions of rows with tokens, from short to long, in batches of limited memory."""
    order = np.argsort(lengths, kind="stable")
    start = int((lengths == 0).sum())
    while start < len(order):
        # Lengths are padded to that of the last row, so memory grows with each row of the batch.
        padded = lengths[order[start : start + _CHUNK_TOKENS]]
        n_padded = padded * np.arange(1, len(padded) + 1)
        n_rows = int(np.searchsorted(n_padded, _CHUNK_TOKENS, side="right"))
        stop = start + max(1, n_rows)
        yield order[start:stop]
        start = stop


def _find_scaling(part, width, standardize):
    """Return mean and scale of the vectors of one modality."""
    if not standardize:
        return np.zeros(width, dtype=np.float32), np.ones(width, dtype=np.float32)
    batches = _batches_by_length(_n_tokens(part))
    tokens = (_dense(part[rows], width) for rows in batches)
    return moments(batch[~np.isnan(batch[..., 0])] for batch in tokens)


def _content_codes(part):
    """Return a code for each row that is the same for identical content; -1 where missing."""
    hashes = np.full(len(part), None, dtype=object)
    for row in np.flatnonzero(_n_tokens(part)):
        hashes[row] = blake2b(part[row].tobytes(), digest_size=16).digest()
    return pd.factorize(hashes)[0].astype(np.int64)


def _content_groups(a, b):
    """Return a group for each row; rows linked by identical content share a group."""
    n_a = a.max() + 1
    size = n_a + b.max() + 1
    links = coo_array((np.ones(len(a)), (a, n_a + b)), shape=(size, size))
    return connected_components(links, directed=False)[1][a]
