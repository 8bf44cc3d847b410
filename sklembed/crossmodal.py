"""SharedFusionEncoder and CrossAttentionAdaptor: several modalities in one space, from pairs."""

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
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._table.blocks import (
    check_names,
    check_one_block,
    known_block,
    moments,
    n_trained,
    observed_in_block,
    resolve_blocks,
)
from sklembed._table.columns import as_table, output_container, take_columns
from sklembed._table.tokens import pad_tokens, read_tokens, token_columns
from sklembed._targets import hold_back
from sklembed._validation import check_vectors, draw_seed
from sklembed.metrics import retrieval_recall

FUSIONS = ("add", "multiply", "concat")  # of a context with any vectors
ATTENTION_FUSIONS = ("additive", "general", "scaled_dot")  # with several tokens
_CHUNK_TOKENS = 4096  # of a forward pass without training
_COLLAPSED = 0.99  # rows that are no pair, and more alike than this, are not told apart
_SAME_CONTEXT = (
    1 - 1e-9
)  # nor are contexts; good encoders, too, bring them as near as 1 - 1e-6


class _CrossModalEncoder(CallbackSupportMixin, TransformerMixin, BaseEstimator):
    """What the trained cross-modal encoders share; a subclass makes the network."""

    _keeps_missing_rows = True  # missing in, missing out: PerModalityUnion reads this
    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "blocks": [dict, None],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "dim_feedforward": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "input_dropout": [Interval(Real, 0, 1, closed="left")],
        "temperature": [Interval(Real, 0.01, 1, closed="both")],
        "direction_weight": [Interval(Real, 0, 1, closed="both")],
        "mask_duplicates": ["boolean"],
        "mixup": ["boolean"],
        "structure_weight": [Interval(Real, 0, None, closed="left")],
        "standardize": ["boolean"],
        "chunk_size": [Interval(Integral, 1, None, closed="left"), None],
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
    def fit(self, X, y=None):
        """Learn the shared space from the rows that have two modalities or more.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing one is a block of NaN. In a
            DataFrame, or an array of dtype object, a modality may be one column of tokens: cells
            of shape (n_tokens, width), None where missing.

        y : None
            Not used.

        Returns
        -------
        self : estimator
            The fitted encoder.

        Raises
        ------
        ValueError
            If there is one modality only, the columns do not make up blocks, fewer than two rows
            are pairs, a modality is in none of them, a block is NaN in part of a row, tokens
            differ in width, or the network cannot be made of what was asked for.

        Warns
        -----
        UserWarning
            If the space has collapsed: rows that are no pair are nearly the same. Or if contexts
            have become the same.
        """
        goes_on = self.warm_start and hasattr(self, "weights_")
        parts = self._read(X, reset=not goes_on)
        self._check_network(parts)
        rows = self._check_pairs(parts)
        if goes_on:
            self._check_goes_on()
        self.structure_ = self._structure()
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        _callbacks.begin(self, context, X, y)
        self._train(parts, rows, goes_on, partial(self._watch, context, X, y))
        _callbacks.end(self, context, X, y)
        self._warn_of_collapse()
        return self

    def transform(self, X):
        """Map every modality of each row to the shared space.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`; any modality may be missing.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_modalities * n_components), dtype float32
            A block of unit vectors for each modality, NaN where it is missing. Adapted tokens: of
            shape (n_samples, n_modalities) and dtype object, arrays of shape
            (n_tokens, n_components) and None.
        """
        check_is_fitted(self)
        parts = self._read(X, reset=False)
        return np.hstack([self._embed(name, part) for name, part in parts.items()])

    def encode(self, X, modality):
        """Map rows of one modality to the shared space.

        Parameters
        ----------
        X : array-like of shape (n_samples, width)
            The columns of that modality alone, in the order of its block; or its column of tokens.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components), dtype float32
            The modality's block of `transform`: unit vectors, NaN where `X` is.

        Raises
        ------
        ValueError
            If there is no such block, or the width is not that seen in `fit`.
        """
        check_is_fitted(self)
        known_block(modality, self.blocks_)
        return self._embed(modality, self._read_one(X, modality))

    def score(self, X, y=None):
        """Tell how well rows find their partners: recall at 1, both ways, over pairs of modalities.

        Rows that hold the same in either modality are right for each other, and so are rows that
        are linked by such rows. A grid search needs no labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`; rows without a partner are left out.

        y : None
            Not used.

        Returns
        -------
        recall : float
            From 0 to 1.

        Raises
        ------
        ValueError
            If no row has two modalities.
        """
        check_is_fitted(self)
        parts = self._read(X, reset=False)
        codes = {name: _content_codes(part) for name, part in parts.items()}
        z = {name: self._embed(name, part, "pooled") for name, part in parts.items()}
        recalls = []
        for a, b in combinations(parts, 2):
            pairs = (codes[a] >= 0) & (codes[b] >= 0)
            if pairs.any():
                alike = _groups(codes[a][pairs], codes[b][pairs])
                recalls += [
                    retrieval_recall(z[one][pairs], z[other][pairs], labels=alike)
                    for one, other in ((a, b), (b, a))
                ]
        if not recalls:
            raise ValueError(
                f"None of the {len(next(iter(z.values())))} rows has two modalities."
            )
        return float(np.mean(recalls))

    def get_feature_names_out(self, input_features=None):
        """Name the output columns ``<block>__<number>``.

        Parameters
        ----------
        input_features : None
            Not used.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names.
        """
        check_is_fitted(self)
        return np.array(
            [f"{name}__{i}" for name in self.widths_ for i in range(self._n_columns())],
            dtype=object,
        )

    def _n_columns(self):
        """Return how many columns each modality has in the output."""
        return self.structure_["n_components"]

    def _read(self, X, *, reset):
        """Return the rows of each modality: cells of tokens, or vectors, (n_samples, 1, width)."""
        tokens = token_columns(X)
        if tokens.any() or (not reset and any(self.holds_tokens_.values())):
            X = as_table(X)
            validate_data(self, X, skip_check_array=True, reset=reset)
            columns = [take_columns(X, [i], scalar=True) for i in range(X.shape[1])]
        else:
            check_vectors(X, self)
            X = validate_data(
                self, X, dtype=np.float32, ensure_all_finite="allow-nan", reset=reset
            )
            columns = None
        if reset:
            self._find_blocks(X, tokens, columns)
        for name, part in self.blocks_.items():
            if tokens.any() and tokens[part].any() and not self.holds_tokens_[name]:
                raise ValueError(
                    f"Block {name!r} holds a column of tokens, but held numbers in fit."
                )
        if columns is not None:
            return {name: self._read_columns(name, columns) for name in self.blocks_}
        for name, part in self.blocks_.items():
            observed_in_block(X, name, part)
        return {name: X[:, part][:, None] for name, part in self.blocks_.items()}

    def _find_blocks(self, X, tokens, columns):
        """Set which columns are whose, and whether they hold tokens."""
        names = getattr(self, "feature_names_in_", None)
        if names is not None and len(tokens) and self.blocks is None:
            # A column of tokens is a modality by itself: its name need not say which.
            names = [
                name if "__" in name or not token else f"{name}__"
                for name, token in zip(names, tokens, strict=True)
            ]
        self.blocks_ = resolve_blocks(self.blocks, names, X.shape[1])
        if len(self.blocks_) < 2:
            raise ValueError(
                f"A shared space needs at least two modalities, but the n_features={X.shape[1]} "
                f"columns hold the blocks {list(self.blocks_)} only."
            )
        positions = {
            name: np.arange(X.shape[1])[part] for name, part in self.blocks_.items()
        }
        self.holds_tokens_ = {
            name: bool(len(tokens) and tokens[part].any())
            for name, part in positions.items()
        }
        for name, part in positions.items():
            if self.holds_tokens_[name] and len(part) > 1:
                raise ValueError(
                    f"Block {name!r} holds a column of tokens among its {len(part)} columns; such "
                    "a column is a block by itself. Name the others otherwise, or pass blocks."
                )
        if self.blocks is None and "missing" in positions:
            raise ValueError(
                "The block 'missing' says which modalities rows have, and is none itself. Leave it "
                "out: set add_indicator=False in the union."
            )
        self.widths_ = {name: len(part) for name, part in positions.items()}
        for name in self.widths_:
            if self.holds_tokens_[name]:
                cells = read_tokens(columns[positions[name][0]], name)
                self.widths_[name] = next(
                    cell.shape[1] for cell in cells if cell is not None
                )

    def _read_columns(self, name, columns):
        """Return the rows of one modality of a table that has columns of tokens."""
        positions = np.arange(len(columns))[self.blocks_[name]]
        if self.holds_tokens_[name]:
            return read_tokens(columns[positions[0]], name, self.widths_[name])
        part = np.stack(
            [np.asarray(columns[i], dtype=np.float32) for i in positions], axis=1
        )
        observed_in_block(part, name, slice(None))
        return part[:, None]

    def _read_one(self, X, modality):
        """Return the rows of the one modality that X holds."""
        if self.holds_tokens_[modality]:
            seen = np.arange(self.n_features_in_)[self.blocks_[modality]]
            check_names(X, modality, getattr(self, "feature_names_in_", None), seen)
            if len(getattr(X, "shape", ())) == 2:
                if X.shape[1] != 1:
                    raise ValueError(
                        f"Block {modality!r} is one column of tokens; got {X.shape[1]} columns. "
                        "Give the column of that modality alone."
                    )
                X = take_columns(X, [0], scalar=True)
            return read_tokens(X, modality, self.widths_[modality])
        check_vectors(X, self)
        X = check_one_block(self, X, modality, np.float32)
        return X[:, None]

    def _check_network(self, parts):
        """Refuse a network that cannot be made, before anything is trained."""
        if getattr(self, "n_layers", 1) and self.n_components % self.n_heads:
            raise ValueError(
                f"n_components={self.n_components} cannot be split among n_heads={self.n_heads}; "
                "it must be a multiple of that."
            )
        tokens = [name for name, part in parts.items() if self.holds_tokens_[name]]
        if self.mixup and tokens:
            raise ValueError(
                f"mixup mixes vectors, but {tokens} are tokens, of which the third of one row has "
                "nothing to do with that of another. Use pooled embeddings, or mixup=False."
            )

    def _check_pairs(self, parts):
        """Return the rows to train on, those that have at least two modalities."""
        there = np.stack([_lengths(part) > 0 for part in parts.values()], axis=1)
        rows = np.flatnonzero(there.sum(axis=1) >= 2)
        counts = dict(zip(parts, there.sum(axis=0).tolist(), strict=True))
        if len(rows) < 2:
            raise ValueError(
                f"{len(rows)} of n_samples={len(there)} rows have two modalities, and at least two "
                f"such rows, pairs, are needed. Rows with each modality: {counts}."
            )
        for name, part in parts.items():
            codes = _content_codes(part[rows])
            codes = codes[codes >= 0]
            if not len(codes):
                raise ValueError(
                    f"No row has {name!r} together with another modality, so its place in the "
                    f"space cannot be learnt. Rows with each modality: {counts}."
                )
            if (codes == codes[0]).all():
                raise ValueError(
                    f"The {len(codes)} pairs with {name!r} all hold the same in it, so that "
                    "nothing tells them apart. Check the step before."
                )
        return rows

    def _check_goes_on(self):
        """Refuse to go on training in a network of another shape."""
        if self.structure_ != self._structure():
            raise ValueError(
                "The fitted network has another structure than the parameters ask for, so training "
                f"cannot go on: {self.structure_}, not {self._structure()}. Clone the encoder to "
                "start anew."
            )

    def _train(self, parts, rows, goes_on, make_watch):
        """Train the network; with `_embed` the only place that needs torch."""
        from sklembed._torch import to_tensor
        from sklembed._training import Rows, Trained, TrainingOptions, train

        seed = draw_seed(self.random_state)
        start = Trained(self.weights_, self.history_, {}) if goes_on else None
        scaling = [
            _moments(part[rows], self.widths_[name], self.standardize)
            for name, part in parts.items()
        ]
        codes = np.stack([_content_codes(part) for part in parts.values()], axis=1)
        padded = [_dense(part, self.widths_[name]) for name, part in parts.items()]
        shapes = [part.shape[1:] for part in padded]

        def make_module(generator):
            network = self._make_network(self.structure_, shapes, generator)
            network.initialize(
                [
                    tuple(to_tensor(m, generator.device) for m in both)
                    for both in scaling
                ]
            )
            return network

        split = Rows(rows)
        if self.early_stopping:
            split = Rows(*hold_back(rows, None, self.validation_fraction, seed))
            if min(len(split.train), len(split.valid)) < 2:
                raise ValueError(
                    f"early_stopping with validation_fraction={self.validation_fraction} holds "
                    f"{len(split.valid)} of {len(rows)} pairs back, and a pair alone has nothing "
                    "to be told from. Change it, or switch early stopping off."
                )
        objective = _Objective(
            self.direction_weight,
            self.structure_weight,
            self.mask_duplicates and not self.mixup,
        )
        trained = train(
            make_module,
            objective,
            np.concatenate([part.reshape(len(part), -1) for part in padded], axis=1),
            codes,
            [split],
            TrainingOptions.of(self, seed),
            start=start,
            on_epoch=make_watch(objective),
        )
        if len(objective.noted(trained.history)) < len(trained.history):
            objective.end_epoch()  # that of the epoch which was told to stop
        self._keep(trained.history, trained.weights, objective)

    def _keep(self, history, weights, objective):
        """Set what training has led to."""
        self.weights_ = weights
        self.history_ = objective.noted(history)
        self.n_iter_ = len(self.history_)
        from sklembed.nn.crossmodal import SCALES

        scale = np.clip(np.exp(np.float64(weights["log_scale"])), *SCALES)
        self.temperature_ = float(1 / scale)

    def _watch(self, context, X, y, objective):
        """Return a function that is told of each epoch: it notes similarities, tells callbacks."""
        names = ("weights_", "history_", "n_iter_", "temperature_", "structure_")

        def so_far(history, weights):
            self._keep(history, weights, objective)
            return {name: getattr(self, name) for name in names}

        tell = _callbacks.each_epoch(self, context, X, y, so_far)

        def after_epoch(history, weights):
            objective.end_epoch()
            return tell is not None and tell(history, weights)

        return after_epoch

    def _warn_of_collapse(self):
        """Warn if pairs and other rows have become the same."""
        last = [entry for entry in self.history_ if entry.get("valid_loss_best", True)][
            -1
        ]
        if last["negative_similarity"] > _COLLAPSED:
            warnings.warn(
                f"{type(self).__name__} has collapsed: rows that are no pair have a similarity of "
                f"{last['negative_similarity']:.3f}, pairs of {last['positive_similarity']:.3f}. "
                "Lower lr, start at a lower temperature, or train for more epochs.",
                stacklevel=2,
            )

    def _embed(self, name, part, output=None):
        """Map rows of one modality by the fitted network; NaN, or None, where a row has none."""
        import torch

        network = self._fitted_network()
        modality = list(self.widths_).index(name)
        output = self._output() if output is None else output
        if output == "tokens":
            found = np.full((len(part), 1), None, dtype=object)
        else:
            width = self.structure_["n_components"]
            found = np.full((len(part), width), np.nan, dtype=np.float32)
        with torch.inference_mode():
            for rows in _batches(_lengths(part)):
                tokens = torch.from_numpy(_dense(part[rows], self.widths_[name]))
                there = ~tokens[..., 0].isnan()
                tokens = network.standardized(tokens, modality)
                if output == "tokens":
                    adapted = network.adapt(tokens, there, modality).numpy()
                    for row, vectors, keep in zip(
                        rows, adapted, there.numpy(), strict=True
                    ):
                        found[row, 0] = vectors[keep]
                else:
                    found[rows] = network.unit(tokens, there, modality).numpy()
        return found

    def _output(self):
        """Return what `transform` is asked for."""
        return "pooled"

    def _fitted_network(self):
        """Rebuild the network around the fitted weights."""
        from sklembed._torch import rebuilt

        return rebuilt(self._make_network(self.structure_), self.weights_)

    def _structure(self):
        """Return the parameters that say what the network is made of; fit keeps them."""
        return {
            "n_components": self.n_components,
            "n_heads": self.n_heads,
            "dim_feedforward": self.dim_feedforward,
        }

    def _make_network(self, structure, shapes=None, generator=None):
        """Make the network, without weights; on the meta device unless a generator is given."""
        import torch

        if shapes is None:
            shapes = [
                (1, width) for width in self.widths_.values()
            ]  # no weight depends on tokens
        with torch.device("meta"):
            network = self._network_class()(
                shapes,
                **structure,
                dropout=self.dropout,
                input_dropout=self.input_dropout,
                temperature=self.temperature,
                mixup=self.mixup,
                chunk_size=self.chunk_size,
                generator=generator,
            )
        return (
            network if generator is None else network.to_empty(device=generator.device)
        )

    @property
    def n_parameters_(self):
        """Number of trained parameters."""
        return n_trained(self.weights_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class SharedFusionEncoder(_CrossModalEncoder):
    """Move modalities into one space by a small encoder that they share (LightCRL [1]_).

    Each modality is projected to one width; a learnt context says which modality it is, and is
    fused with its vectors; one transformer layer, the same for all, follows, and the mean over
    tokens. Trained on pairs by the symmetric contrastive loss, without labels. No row ever sees
    another, so its vector is the same alone, in any batch, with or without its partner.

    The released code of [1]_ differs in three ways: it starts at an almost flat temperature
    (``temperature=exp(-0.07)``, about .93, is its start), lets padding into attention and mean, and
    keeps other captions of the same picture as negatives (``mask_duplicates=False``). Its sizes are
    ``n_components=256, n_heads=4, dim_feedforward=2048, dropout=0.1, input_dropout=0``. What the
    layers add to their input starts at 0 here.

    Parameters
    ----------
    n_components : int, default=256
        Width of the shared space.

    fusion : {"add", "multiply", "concat", "additive", "general", "scaled_dot"}, default="add"
        How a context enters: the first three work on any block; the last three, attentions of the
        context over a row's vectors, need columns of tokens (over one vector the softmax is 1).

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``. A column of tokens is a block by itself.

    n_heads : int, default=4
        Heads of the attention; must divide `n_components`.

    dim_feedforward : int, default=512
        Hidden units of the transformer layer; 2048 in [1]_.

    dropout : float, default=0.5
        Probability of zeroing a unit in training; .1 in [1]_.

    input_dropout : float, default=0.5
        Probability of zeroing a number of the input in training; 0 in [1]_.

    share_layer : bool, default=True
        Whether modalities share the fusion and the layer; False gives each its own.

    temperature : float, default=0.07
        What similarities are divided by at first; learnt, and kept from .01 to 1.

    direction_weight : float, default=0.5
        Share of the loss in which an earlier block's rows look for a later block's.

    mask_duplicates : bool, default=True
        Whether rows that hold the same in one modality are no negatives of each other. With `mixup`
        no two rows hold the same, so that it has no effect.

    mixup : bool, default=False
        Whether a batch's rows are mixed with each other, all modalities by the same share [2]_.

    structure_weight : float, default=0.0
        Weight of a loss that keeps each modality's similarities as they were before [3]_.

    standardize : bool, default=True
        Whether columns are brought to mean 0 and variance 1 first.

    chunk_size : int or None, default=None
        Rows whose activations are held at a time in training, so that large batches fit into
        memory; gradients are those of the whole batch, but for what dropout draws [4]_.

    max_epochs : int, default=30
        Passes over the pairs.

    batch_size : int, default=256
        Pairs of a step, each the others' negatives; all of them where there are fewer.

    lr : float, default=0.001
        Learning rate of AdamW.

    weight_decay : float, default=0.001
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold pairs back, stop when their loss gets no better, and return to the best.

    validation_fraction : float, default=0.1
        Share of the pairs that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without gain after which it stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the weights at hand. The part that early stopping
        holds back is the same if `random_state` is an integer.

    device : str, default="auto"
        Where to train: "auto", "cpu", "cuda", …

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the part held back.

    verbose : int, default=0
        Above 0, skorch prints a line each epoch.

    skorch_params : dict or None, default=None
        Further options of skorch's net, such as callbacks.

    Attributes
    ----------
    context_similarity_ : ndarray of shape (n_modalities, n_modalities)
        Cosines of the contexts that tokens are fused with. At 1 a context does not say which
        modality it is; `fit` warns of it.

    weights_ : dict of str to ndarray
        The network.

    history_ : list of dict
        For each epoch "train_loss", "positive_similarity" and "negative_similarity" (mean cosine
        of pairs, and of other rows, in training), with early stopping "valid_loss".

    n_iter_ : int
        Number of epochs.

    temperature_ : float
        The temperature learnt.

    n_parameters_ : int
        Number of trained parameters.

    structure_ : dict
        The parameters that the network is made of, as they were in `fit`.

    blocks_, widths_, holds_tokens_ : dict
        Columns of each modality, the width of its vectors, and whether it is a column of tokens.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    CrossAttentionAdaptor : Learnt queries in place of contexts.
    CanonicalAligner : The closed form, for two modalities.

    References
    ----------
    .. [1] Faye et al. Lightweight Cross-Modal Representation Learning. arXiv 2403.04650.
    .. [2] Vouitsis et al. Data-Efficient Multimodal Fusion on a Single GPU (FuseMix).
       arXiv 2312.10144.
    .. [3] With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You.
       arXiv 2506.16895.
    .. [4] Gao et al. Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
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
        mixup=False,
        structure_weight=0.0,
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
        self.mixup = mixup
        self.structure_weight = structure_weight
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

    def _structure(self):
        return super()._structure() | {
            "fusion": self.fusion,
            "share_layer": self.share_layer,
        }

    def _check_network(self, parts):
        super()._check_network(parts)
        pooled = [name for name in parts if not self.holds_tokens_[name]]
        if pooled and self.fusion in ATTENTION_FUSIONS:
            raise ValueError(
                f"fusion={self.fusion!r} is an attention over the tokens of a row, but block "
                f"{pooled[0]!r} holds one pooled vector a row, where the softmax over a single key "
                "is 1 and attends to nothing. Use columns of tokens, from "
                "FrozenEncoder(output='tokens'), or fusion='add', 'multiply' or 'concat'."
            )

    def _keep(self, history, weights, objective):
        super()._keep(history, weights, objective)
        import torch

        with torch.inference_mode():
            contexts = self._fitted_network().embedded_contexts().double().numpy()
        norms = np.linalg.norm(contexts, axis=1, keepdims=True)
        contexts /= np.maximum(norms, np.finfo(np.float64).tiny)
        self.context_similarity_ = contexts @ contexts.T

    def _warn_of_collapse(self):
        super()._warn_of_collapse()
        names = list(self.widths_)
        for a, b in combinations(range(len(names)), 2):
            if self.context_similarity_[a, b] > _SAME_CONTEXT:
                warnings.warn(
                    f"The contexts of {names[a]!r} and {names[b]!r} have collapsed: their cosine "
                    f"is {self.context_similarity_[a, b]:.3f}, so that the encoder cannot tell "
                    "which it sees. Train with another random_state, or a lower lr.",
                    stacklevel=2,
                )


class CrossAttentionAdaptor(_CrossModalEncoder):
    """Move modalities into one space by attention layers that they share (Adaptor [1]_).

    Each modality is projected to one width and unit length. A few learnt queries, common to all
    modalities, attend to its vectors in layers that all modalities share; their mean is the row's
    vector. Trained on pairs by a contrastive loss, without labels. No row ever sees another, so its
    vector is the same alone, in any batch, with or without its partner.

    In the released code of [1]_ the partner's pooled vector is the query. Attention over the one
    vector of a row is 1 whatever the query, so nothing is mixed between modalities, and what
    remains is the layers' feed-forward part: ``n_queries=0`` computes just that. Downstream, that
    code attends across the rows of a batch, so that a prediction depends on who else is in it; this
    one never does. Its sizes are ``n_components=768, n_layers=2, n_heads=12, dim_feedforward=2048,
    n_queries=0, dropout=0.1, input_dropout=0, direction_weight=0.75, mask_duplicates=False`` with
    texts as the first block. What the layers add to their input starts at 0 here.

    Parameters
    ----------
    n_components : int, default=256
        Width of the shared space; 768 in [1]_.

    n_queries : int, default=2
        Learnt queries; 0 lets the vectors of a row attend to each other, and the row is their mean,
        as it is with ``output="tokens"``, where queries are of no use.

    n_layers : int, default=1
        Attention layers; 2 in [1]_.

    output : {"pooled", "tokens"}, default="pooled"
        What `transform` gives, and so what is trained: a vector for each row, or an adapted one for
        each of its tokens, in one object column for each modality, as
        ``FrozenEncoder(output="tokens")`` does.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``. A column of tokens is a block by itself.

    n_heads : int, default=4
        Heads of the attention; must divide `n_components`.

    dim_feedforward : int, default=512
        Hidden units of a layer; 2048 in [1]_.

    dropout : float, default=0.5
        Probability of zeroing a unit in training; .1 in [1]_.

    input_dropout : float, default=0.5
        Probability of zeroing a number of the input in training; 0 in [1]_.

    temperature : float, default=0.07
        What similarities are divided by at first; learnt, and kept from .01 to 1.

    direction_weight : float, default=0.5
        Share of the loss in which an earlier block's rows look for a later block's.

    mask_duplicates : bool, default=True
        Whether rows that hold the same in one modality are no negatives of each other. With `mixup`
        no two rows hold the same, so that it has no effect.

    mixup : bool, default=False
        Whether a batch's rows are mixed with each other, all modalities by the same share [2]_.

    structure_weight : float, default=0.0
        Weight of a loss that keeps each modality's similarities as they were before [3]_.

    standardize : bool, default=False
        Whether columns are brought to mean 0 and variance 1 first.

    chunk_size : int or None, default=None
        Rows whose activations are held at a time in training, so that large batches fit into
        memory; gradients are those of the whole batch, but for what dropout draws [4]_.

    max_epochs : int, default=30
        Passes over the pairs.

    batch_size : int, default=256
        Pairs of a step, each the others' negatives; all of them where there are fewer.

    lr : float, default=0.001
        Learning rate of AdamW.

    weight_decay : float, default=0.001
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold pairs back, stop when their loss gets no better, and return to the best.

    validation_fraction : float, default=0.1
        Share of the pairs that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without gain after which it stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the weights at hand. The part that early stopping
        holds back is the same if `random_state` is an integer.

    device : str, default="auto"
        Where to train: "auto", "cpu", "cuda", …

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the part held back.

    verbose : int, default=0
        Above 0, skorch prints a line each epoch.

    skorch_params : dict or None, default=None
        Further options of skorch's net, such as callbacks.

    Attributes
    ----------
    weights_ : dict of str to ndarray
        The network.

    history_ : list of dict
        For each epoch "train_loss", "positive_similarity" and "negative_similarity" (mean cosine
        of pairs, and of other rows, in training), with early stopping "valid_loss".

    n_iter_ : int
        Number of epochs.

    temperature_ : float
        The temperature learnt.

    n_parameters_ : int
        Number of trained parameters.

    structure_ : dict
        The parameters that the network is made of, as they were in `fit`.

    blocks_, widths_, holds_tokens_ : dict
        Columns of each modality, the width of its vectors, and whether it is a column of tokens.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    SharedFusionEncoder : Contexts in place of queries.

    References
    ----------
    .. [1] Qin et al. Freeze the Backbones. arXiv 2401.01179.
    .. [2] Vouitsis et al. Data-Efficient Multimodal Fusion on a Single GPU (FuseMix).
       arXiv 2312.10144.
    .. [3] With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You.
       arXiv 2506.16895.
    .. [4] Gao et al. Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
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
        mixup=False,
        structure_weight=0.0,
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
        self.mixup = mixup
        self.structure_weight = structure_weight
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

    def _structure(self):
        return super()._structure() | {
            "n_queries": self.n_queries,
            "n_layers": self.n_layers,
            "of_tokens": self.output == "tokens",
        }

    def _output(self):
        if self.output == "tokens" and output_container(self) == "polars":
            raise ValueError(
                "output='tokens' makes object columns of arrays of different lengths, which polars "
                "does not have. Use set_output(transform='pandas') or 'default'."
            )
        return self.output

    def _n_columns(self):
        return 1 if self.output == "tokens" else super()._n_columns()


class _Objective:
    """The loss of a batch, over all pairs of modalities; notes how alike rows have become."""

    def __init__(self, direction_weight, structure_weight, mask_duplicates):
        self.direction_weight = direction_weight
        self.structure_weight = structure_weight
        self.mask_duplicates = mask_duplicates
        self.similarities = []  # of each epoch
        self._batches = []

    def __call__(self, embedded, codes, weight):
        """Return the loss, as of one network, given the content codes of rows."""
        from sklembed.nn.losses import info_nce, structure_loss

        codes, losses = codes[0], []
        for a, b in combinations(range(codes.shape[1]), 2):
            there = embedded.there[:, a] & embedded.there[:, b]
            alike = (codes[:, None, a] == codes[:, a]) | (
                codes[:, None, b] == codes[:, b]
            )
            za, zb = embedded.z[:, a], embedded.z[:, b]
            losses.append(
                info_nce(
                    za,
                    zb,
                    embedded.log_scale,
                    there=there,
                    same=alike if self.mask_duplicates else None,
                    direction_weight=self.direction_weight,
                )
            )
            if embedded.z.requires_grad:
                self._note(
                    za.detach()[there], zb.detach()[there], alike[there][:, there]
                )
        loss = sum(losses) / len(losses)
        if self.structure_weight:
            kept = [
                structure_loss(inputs[seen], z[seen])
                for inputs, z, seen in zip(
                    embedded.inputs,
                    embedded.z.unbind(1),
                    embedded.there.unbind(1),
                    strict=True,
                )
                if seen.sum() > 1
            ]
            loss = loss + self.structure_weight * sum(kept) / max(len(kept), 1)
        return loss[None]

    def end_epoch(self):
        """Average what the epoch's batches have shown."""
        positive, negative = (
            math.nan if not batches else float(sum(batches) / len(batches))
            for batches in (
                [seen[0] for seen in self._batches],
                [seen[1] for seen in self._batches if seen[1] is not None],
            )
        )
        self._batches.clear()
        self.similarities.append(
            {"positive_similarity": positive, "negative_similarity": negative}
        )

    def noted(self, history):
        """Return a history whose new epochs, as far as they have ended, say how alike rows were."""
        n_past = sum("positive_similarity" in entry for entry in history)
        new = zip(history[n_past:], self.similarities, strict=False)
        return history[:n_past] + [entry | alike for entry, alike in new]

    def _note(self, a, b, alike):
        """Note the mean cosine of pairs, and of rows that do not hold the same, of one batch."""
        if len(a):
            cosines = a @ b.T
            others = cosines[~alike]
            self._batches.append(
                (cosines.diag().mean(), others.mean() if len(others) else None)
            )


def _lengths(part):
    """Count the tokens of each row of a modality; a vector is one."""
    if part.dtype == object:
        return np.array(
            [0 if cell is None else len(cell) for cell in part], dtype=np.int64
        )
    return (~np.isnan(part[:, 0, 0])).astype(np.int64)


def _dense(part, width):
    """Return rows of a modality as (n_samples, n_tokens, width), NaN where there is none."""
    return (
        pad_tokens(part, width) if part.dtype == object else np.ascontiguousarray(part)
    )


def _batches(lengths):
    """Yield positions of rows that have tokens, the shortest first, so many that memory is kept."""
    order = np.argsort(lengths, kind="stable")
    start = int((lengths == 0).sum())
    while start < len(order):
        # As many as fit if all were as long as the last of them: lengths rise, and so products.
        padded = lengths[order[start : start + _CHUNK_TOKENS]]
        padded = padded * np.arange(1, len(padded) + 1)
        stop = start + max(1, int(np.searchsorted(padded, _CHUNK_TOKENS, side="right")))
        yield order[start:stop]
        start = stop


def _moments(part, width, standardize):
    """Return mean and scale of the vectors of one modality, all of whose rows count."""
    if not standardize:
        return np.zeros(width, dtype=np.float32), np.ones(width, dtype=np.float32)

    tokens = (_dense(part[rows], width) for rows in _batches(_lengths(part)))
    return moments(batch[~np.isnan(batch[..., 0])] for batch in tokens)


def _content_codes(part):
    """Give rows that hold the same the same number; -1 to those that hold nothing."""
    digests = [
        blake2b(row.tobytes(), digest_size=16).digest() if length else None
        for row, length in zip(part, _lengths(part), strict=True)
    ]
    return pd.factorize(np.array(digests, dtype=object))[0].astype(np.int64)


def _groups(a, b):
    """Give rows that share a content of either modality, directly or by others, one number."""
    n_a = a.max() + 1
    size = n_a + b.max() + 1
    links = coo_array((np.ones(len(a)), (a, n_a + b)), shape=(size, size))
    return connected_components(links, directed=False)[1][a]
