"""FusionClassifier and FusionRegressor: one small network on several modalities."""

from functools import partial
from numbers import Real

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import (
    _check_sample_weight,
)

from sklembed import _callbacks
from sklembed._callbacks import with_callbacks
from sklembed._trained import TrainedEstimator, moments
from sklembed._validation import (
    check_layer_sizes,
    check_new_rows,
    draw_seed,
    in_pieces,
)
from sklembed.fusion._base import (
    by_modality,
    check_labelled_table,
    check_table,
    decided,
    find_prior,
    logits_of_prior,
    probabilities,
    scale_targets,
    warn_ignored,
    weight_classes,
)

_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the caches of the processor


class _FusionNetwork(TrainedEstimator):
    """Train a network on blocks of embeddings; a subclass reads the target."""

    _parameter_constraints: dict = {
        **TrainedEstimator._parameter_constraints,
        "join": [StrOptions({"early", "late"})],
        "hidden_layer_sizes": ["array-like"],
        "blocks": [dict, None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "modality_dropout": [Interval(Real, 0, 1, closed="left")],
    }

    def _fit_network(self, table, y, targets, weight, strata, loss, resume):
        """Train the network on a validated table and its encoded targets."""
        structure = {
            "widths": list(self.widths_.values()),
            "hidden_layer_sizes": [int(size) for size in self.hidden_layer_sizes],
            "n_outputs": self._n_outputs(),
            "join": self.join,
        }
        self._set_structure(structure, resume)
        X, observed = by_modality(table, self.blocks_)
        rows = np.flatnonzero(observed.any(axis=1) & (weight > 0))
        scaling = self._find_scaling(X, observed, rows, resume)
        self._find_ignored(observed[rows], resume)
        seed = draw_seed(self.random_state)
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        with _callbacks.task(self, context, table, y):
            self._train_network(
                partial(self._make_module, scaling),
                loss,
                X,
                targets,
                self._split_rows(rows, strata, seed),
                seed,
                sample_weight=None if (weight[rows] == 1).all() else weight,
                resume=resume,
                on_epoch=self._report_epochs(context, table, y),
            )
        return self

    def _find_scaling(self, X, observed, rows, resume):
        """Return the mean and scale of each column over the training rows that have it.

        If training is resumed, only blocks that were ignored before get a new scaling.
        """
        new_blocks = list(self.blocks_)
        mean = np.zeros(X.shape[1], dtype=np.float32)
        scale = np.ones(X.shape[1], dtype=np.float32)
        if resume:
            new_blocks = self.ignored_blocks_
            mean, scale = self.weights_["mean"].copy(), self.weights_["scale"].copy()
        for name, mask, columns in zip(
            self.blocks_, observed.T, self._column_slices(), strict=True
        ):
            rows_of_block = rows[mask[rows]]
            if name in new_blocks and len(rows_of_block):
                chunks = gen_batches(len(rows_of_block), _CHUNK_ROWS)
                batches = (X[rows_of_block[chunk], columns] for chunk in chunks)
                mean[columns], scale[columns] = moments(batches)
        if resume:
            self.weights_ = self.weights_ | {"mean": mean, "scale": scale}
        return mean, scale

    def _find_ignored(self, observed, resume):
        """Set the blocks without an observed training row, and warn about each."""
        unobserved = np.array(list(self.blocks_))[~observed.any(axis=0)].tolist()
        if resume:
            ignored = set(self.ignored_blocks_) & set(unobserved)
            self.ignored_blocks_ = [name for name in self.blocks_ if name in ignored]
            return
        if len(unobserved) == len(self.blocks_):
            raise ValueError(
                f"The blocks {unobserved} are NaN in all rows of positive weight, so nothing "
                "can be learned. Check the previous step of the pipeline."
            )
        for name in unobserved:
            warn_ignored(name, "is NaN in all rows of positive weight")
        self.ignored_blocks_ = unobserved

    def _make_module(self, scaling, generator):
        """Return the network, with weights drawn from the generator."""
        from sklembed._torch import to_tensor
        from sklembed.nn.fusion import FusionHead

        mean, scale = scaling
        return FusionHead(
            **self.structure_,
            dropout=self.dropout,
            modality_dropout=self.modality_dropout,
            generator=generator,
            mean=to_tensor(mean, generator.device),
            scale=to_tensor(scale, generator.device),
        )

    def _outputs(self, X):
        """Return the outputs of the network, NaN for rows without any modality."""
        X = check_new_rows(self, X, ensure_all_finite=False)
        X, observed = by_modality(X, self.blocks_)
        observed = observed & ~np.isin(list(self.blocks_), self.ignored_blocks_)
        outputs = np.full((len(X), self.structure_["n_outputs"]), np.nan)
        for rows in gen_batches(len(X), _CHUNK_ROWS):
            outputs[rows] = self._forward(X[rows], observed[rows])
        outputs[~observed.any(axis=1)] = np.nan
        return outputs

    def _forward(self, X, observed):
        """Run the network in numpy, in float64, so that rounding is the same in all batches."""
        weights = self.weights_
        X = (X.astype(np.float64) - weights["mean"]) / weights["scale"]
        X[~np.repeat(observed, self._n_columns(), axis=1)] = 0.0
        if self.structure_["join"] == "early":
            hidden = _run_chain(weights, 0, X)
        else:
            outputs = []
            for number, columns in enumerate(self._column_slices()):
                output = _run_chain(weights, number, X[:, columns])
                outputs.append(output * observed[:, [number]])
            hidden = np.hstack(outputs)
        return hidden @ weights["output.weight"].T + weights["output.bias"]

    def _n_columns(self):
        """Return the number of columns of each block."""
        return np.array(list(self.widths_.values()))

    def _column_slices(self):
        """Return the columns of each block in the table that `by_modality` returns."""
        ends = np.cumsum(self._n_columns()).tolist()
        return [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]


class FusionClassifier(ClassifierMixin, _FusionNetwork):
    """Classify by a small network that joins the embeddings of several modalities.

    The early and late fusion of [1]_. A hidden layer consists of a linear layer, ReLU, dropout
    and batch normalisation. Early fusion concatenates all modalities first. Late fusion has
    hidden layers for each modality and concatenates their outputs. A linear layer follows.

    A modality may be missing: its block is NaN. Modalities are hidden at random during training
    (`modality_dropout`), so that the network also predicts from some of them. Columns are
    standardised.

    Neural networks tend to be overconfident: for calibrated probabilities wrap the classifier in
    :class:`~sklearn.calibration.CalibratedClassifierCV`, for example with
    ``method="temperature"`` (scikit-learn 1.8).

    The code released with [1]_ selects the epoch on the test rows, ignores class weights for
    binary classes, and trains without dropout. This implementation does not.

    Parameters
    ----------
    join : {"early", "late"}, default="early"
        Whether modalities are joined before or after the hidden layers. "early" has one
        network on the concatenation. "late" has hidden layers for each modality, whose
        outputs are concatenated.

    hidden_layer_sizes : tuple of int, default=(256,)
        Units of the hidden layers; for ``join="late"``, of each modality. ``()`` gives a
        linear model.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    dropout : float, default=0.5
        Dropout probability of hidden units during training.

    modality_dropout : float, default=0.3
        Probability of hiding a modality of a row during training, so that one fitted
        network predicts from every subset of modalities. Each row keeps at least one.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn. With several labels, the weight of
        rows with the label relative to rows without, by the position of its column, or by its
        name if `y` is a DataFrame; a label without an entry has weight 1. "balanced" gives both
        kinds of rows the same total weight.

    max_epochs : int, default=30
        Number of passes over the training rows.

    batch_size : int, default=64
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
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
        accelerator if there is one. Predictions are always computed in numpy.

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
    classes_ : ndarray of shape (n_classes,)
        The classes; with several labels, the positions of their columns.

    target_type_ : {"binary", "multiclass", "multilabel"}
        Type of the target.

    prior_ : ndarray of shape (n_classes,) or (n_labels,)
        Proportion of each class, or of rows with each label, in training. It is the prediction
        for rows without any modality.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    ignored_blocks_ : list of str
        Blocks that are NaN in all training rows. They are ignored in prediction too.

    structure_ : dict
        The arguments that determine the shapes of the network.

    weights_ : dict of str to ndarray
        Weights of the network.

    n_parameters_ : int
        Number of trained parameters.

    history_ : list of dict
        An entry for each epoch with its mean loss.

    n_iter_ : int
        Number of epochs.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

    See Also
    --------
    FusionRegressor : The same networks for numeric targets.
    DecisionFusionClassifier : Pools the probabilities of one classifier per modality.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector Embedding
       Alignment Approach. arXiv 2406.02601.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import FusionClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> halves = {"upper": slice(0, 32), "lower": slice(32, 64)}
    >>> classifier = FusionClassifier("late", blocks=halves, max_epochs=10, random_state=0)
    >>> classifier.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.9
    True
    """

    _parameter_constraints: dict = {
        **_FusionNetwork._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        join="early",
        *,
        hidden_layer_sizes=(256,),
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
        self.join = join
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

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities, concatenated; a missing modality is a block of NaN.
            Rows without any modality are not used in training. A block that is NaN in all rows
            is ignored with a warning.

        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or a 0/1 column for each label.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss. Rows of weight 0 are ignored.

        Returns
        -------
        self : FusionClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If a label is missing, there is only one class, the columns do not form blocks, all
            modalities are missing in all rows, a cell is not a number, a block is NaN in part of
            a row, or `class_weight` names a label that `y` does not have.
        """
        resume = self._begin_fit()
        check_layer_sizes(self.hidden_layer_sizes)
        label_names = getattr(y, "columns", None)
        table, target = check_labelled_table(
            self, X, y, dtype=np.float32, reset=not resume
        )
        weight = self._row_weights(table, target, sample_weight)
        loss = self._make_loss(self._label_weights(target, weight, label_names))
        self.prior_ = find_prior(target, weight)
        targets = target.values
        if self.target_type_ != "multiclass":
            targets = targets.reshape(len(targets), -1).astype(np.float32)
        return self._fit_network(table, y, targets, weight, target.strata, loss, resume)

    @in_pieces
    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        logits : ndarray of shape (n_samples,), (n_samples, n_classes) or (n_samples, n_labels)
            Logits. For two classes, the logit of the second. Rows without any modality have the
            logits of the class prior.
        """
        logits = self._outputs(X)
        unobserved = np.isnan(logits[:, 0])
        logits[unobserved] = logits_of_prior(self.prior_, self.target_type_)
        return logits[:, 0] if self.target_type_ == "binary" else logits

    @in_pieces
    def predict_proba(self, X):
        """Return the probability of each class or label.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Probabilities. For classes, rows sum to 1.
        """
        return probabilities(self.decision_function(X), self.target_type_)

    @in_pieces
    def predict(self, X):
        """Return the most probable class, or the labels with a probability above 0.5.

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

    def _n_outputs(self):
        return 1 if self.target_type_ == "binary" else len(self.classes_)

    def _row_weights(self, X, target, sample_weight):
        """Return the weight of each row in the loss."""
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float32, ensure_non_negative=True
        )
        if target.kind == "multilabel":
            return weight
        return weight_classes(weight, target, self.class_weight)

    def _label_weights(self, target, weight, names):
        """Return the weight of rows with each of several labels, or None."""
        if target.kind != "multilabel" or self.class_weight is None:
            return None
        odds = np.ones(len(self.classes_))
        if self.class_weight == "balanced":
            share = np.average(target.values.astype(np.float64), axis=0, weights=weight)
            varies = (share > 0) & (share < 1)
            odds[varies] = (1 - share[varies]) / share[varies]
            return odds
        positions = {}
        if names is not None:
            positions = {name: i for i, name in enumerate(names)}
        if all(isinstance(name, str) for name in positions):  # no name is a position
            positions |= {label: label for label in self.classes_.tolist()}
        unknown = [key for key in self.class_weight if key not in positions]
        if unknown:
            raise ValueError(
                f"class_weight has weights for the labels {unknown}, which y does not have. Its "
                f"labels are {list(positions)}: column numbers, or names if y is a DataFrame."
            )
        for key, value in self.class_weight.items():
            odds[positions[key]] = value
        return odds

    def _make_loss(self, label_weight):
        """Return the loss of a batch, given logits, targets and weights."""
        from sklembed.nn.losses import binary_cross_entropy, cross_entropy

        if self.target_type_ == "multiclass":
            return cross_entropy
        if label_weight is None:
            return binary_cross_entropy
        from sklembed._torch import resolve_device, to_tensor

        label_weight = to_tensor(
            label_weight.astype(np.float32), resolve_device(self.device)
        )
        return partial(binary_cross_entropy, pos_weight=label_weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class FusionRegressor(RegressorMixin, _FusionNetwork):
    """Predict numbers by a small network that joins the embeddings of several modalities.

    The networks are those of :class:`FusionClassifier`, trained by the squared error. Targets are
    standardised for training. Modalities may be missing, and are hidden at random during training
    (`modality_dropout`), so that the network also predicts from some of them.

    Parameters
    ----------
    join : {"early", "late"}, default="early"
        Whether modalities are joined before or after the hidden layers. "early" has one
        network on the concatenation. "late" has hidden layers for each modality, whose
        outputs are concatenated.

    hidden_layer_sizes : tuple of int, default=(256,)
        Units of the hidden layers; for ``join="late"``, of each modality. ``()`` gives a
        linear model.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    dropout : float, default=0.5
        Dropout probability of hidden units during training.

    modality_dropout : float, default=0.3
        Probability of hiding a modality of a row during training, so that one fitted
        network predicts from every subset of modalities. Each row keeps at least one.

    max_epochs : int, default=30
        Number of passes over the training rows.

    batch_size : int, default=64
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size.

    lr : float, default=1e-3
        Learning rate of AdamW.

    weight_decay : float, default=0.01
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
        accelerator if there is one. Predictions are always computed in numpy.

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
    target_mean_, target_scale_ : float or ndarray of shape (n_outputs,)
        Weighted mean and standard deviation of the targets in training. The mean is the
        prediction for rows without any modality.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    widths_ : dict of str to int
        The number of columns of each modality.

    ignored_blocks_ : list of str
        Blocks that are NaN in all training rows. They are ignored in prediction too.

    structure_ : dict
        The arguments that determine the shapes of the network.

    weights_ : dict of str to ndarray
        Weights of the network.

    n_parameters_ : int
        Number of trained parameters.

    history_ : list of dict
        An entry for each epoch with its mean loss.

    n_iter_ : int
        Number of epochs.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

    See Also
    --------
    FusionClassifier : The same networks for classes and labels.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklembed import FusionRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> blocks = {"patient": slice(0, 4), "blood": slice(4, 10)}
    >>> regressor = FusionRegressor(blocks=blocks, random_state=0)
    >>> regressor.fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.4
    True
    """

    def __init__(
        self,
        join="early",
        *,
        hidden_layer_sizes=(256,),
        blocks=None,
        dropout=0.5,
        modality_dropout=0.3,
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
        self.join = join
        self.hidden_layer_sizes = hidden_layer_sizes
        self.blocks = blocks
        self.dropout = dropout
        self.modality_dropout = modality_dropout
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
    def fit(self, X, y, sample_weight=None):
        """Train the network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities, concatenated; a missing modality is a block of NaN.
            Rows without any modality are not used in training. A block that is NaN in all rows
            is ignored with a warning.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numeric targets.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the loss. Rows of weight 0 are ignored.

        Returns
        -------
        self : FusionRegressor
            The fitted regressor.

        Raises
        ------
        ValueError
            If a target is missing or not a finite number, the columns do not form blocks, all
            modalities are missing in all rows, a cell is not a number, or a block is NaN in part
            of a row.
        """
        from sklembed.nn.losses import squared_error

        resume = self._begin_fit()
        check_layer_sizes(self.hidden_layer_sizes)
        table, y = check_table(
            self, X, y, dtype=np.float32, reset=not resume, y_numeric=True
        )
        y = y.astype(np.float64)
        weight = _check_sample_weight(
            sample_weight, table, dtype=np.float32, ensure_non_negative=True
        )
        if not resume:
            self.target_mean_, self.target_scale_ = scale_targets(y, weight)
        elif y.shape[1:] != np.shape(self.target_mean_):
            raise ValueError(
                "With warm_start, a row of y must have the shape of the previous fit, "
                f"{np.shape(self.target_mean_)}; got {y.shape[1:]}. Clone the regressor to fit a "
                "new network."
            )
        targets = (y - self.target_mean_) / self.target_scale_
        targets = targets.reshape(len(y), -1).astype(np.float32)
        return self._fit_network(table, y, targets, weight, None, squared_error, resume)

    @in_pieces
    def predict(self, X):
        """Return the predicted targets.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing modality is a block of NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            Predictions, of the shape of the targets in `fit`.
        """
        outputs = np.nan_to_num(self._outputs(X), nan=0.0)  # 0 is the mean
        if np.ndim(self.target_mean_) == 0:
            outputs = outputs[:, 0]
        return outputs * self.target_scale_ + self.target_mean_

    def _n_outputs(self):
        return np.size(self.target_mean_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _run_chain(weights, chain, X):
    """Run a chain of hidden layers in numpy, normalised by the running moments."""
    layer = 0
    while (prefix := f"chains.{chain}.{layer}.") + "linear.weight" in weights:
        X = X @ weights[prefix + "linear.weight"].T + weights[prefix + "linear.bias"]
        X = np.maximum(X, 0)
        mean = weights[prefix + "norm.running_mean"]
        variance = weights[prefix + "norm.running_var"]
        scale = weights[prefix + "norm.weight"] / np.sqrt(variance + 1e-5)
        X = X * scale + (weights[prefix + "norm.bias"] - mean * scale)
        layer += 1
    return X
