"""FinetunedClassifier and FinetunedRegressor: start at the frozen head, then train."""

import time
import warnings
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from numbers import Integral, Real

import numpy as np
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    RegressorMixin,
    _fit_context,
    clone,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._display import DocLinkMixin
from sklembed._persistence import Saved
from sklembed._targets import encode_target
from sklembed._validation import check_no_missing_label, draw_seed
from sklembed.encoders.frozen import FrozenEncoder
from sklembed.encoders.inference import is_out_of_memory
from sklembed.finetune.networks import (
    Cells,
    TunedBackend,
    inject_adapters,
    normalized,
)
from sklembed.finetune.problem import Problem, find_C, fit_logistic
from sklembed.fusion._base import (
    check_weights,
    encode_groups,
    find_prior,
    scale_targets,
    weight_classes,
)

METHODS = ("head", "bitfit", "lora", "full")
# Full fine-tuning changes all weights, so that each may move little.
_LEARNING_RATES = {"bitfit": 1e-3, "lora": 5e-4, "full": 3e-5}
_ALPHAS = 10.0 ** np.arange(-3, 3)


class _Finetuned(DocLinkMixin, Saved, CallbackSupportMixin, BaseEstimator):
    """Base class: a column of cells, a frozen head, and training of the network.

    A subclass reads the target, fits the head and turns outputs into predictions.
    """

    _parameter_constraints: dict = {
        "encoder": [FrozenEncoder],
        "method": [StrOptions(set(METHODS))],
        "rank": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "layer_decay": [Interval(Real, 0, 1, closed="right")],
        "warmup_fraction": [Interval(Real, 0, 1, closed="both")],
        "max_grad_norm": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def _begin_fit(self, X):
        """Check method and encoder, and hash the cells.

        Returns
        -------
        column, backend, space : tuple
            The cells, their model, and the key of their vectors.
        """
        if hasattr(self, "coef_"):
            del self.coef_  # an estimator whose fit fails is not fitted
        if self.method == "lora" and find_spec("peft") is None:
            raise ImportError(
                "method='lora' needs peft, which the extra 'finetune' installs: pip "
                "install 'sklembed[finetune]'. Or choose method='bitfit' or 'full'."
            )
        encoder = clone(self.encoder)
        if encoder.output != "pooled":
            raise ValueError(
                f"The encoder has output={encoder.output!r}, but a head needs one vector "
                "for each cell. Set output='pooled'."
            )
        column, backend, space = encoder._validate(X, fitting=True)
        if self.method != "head" and not hasattr(backend, "trainable"):
            raise ValueError(
                f"{encoder.model!r} has no torch network to train (it is run by "
                f"{type(backend).__name__}). Pass a checkpoint for transformers, or set "
                "method='head'."
            )
        encoder._fit(column, backend, space)
        self.encoder_ = encoder
        return column, backend, space

    def _fit_problem(self, problem, losses, X, y):
        """Encode the cells, fit the head, train the network, and keep the better."""
        self.seconds_ = {}
        with self._timed("encoding"):
            self._encode(problem)
        with self._timed("head"):
            self.penalty_ = self._find_penalty(problem)
        parts = self._split(problem) if self.method != "head" else None
        self.best_step_ = self.n_steps_ = 0
        self.history_, self.change_ = [], {}
        if parts is not None:
            with self._timed("head"):
                start = self._fit_head(problem, parts.train)
            with self._timed("training"):
                self._train(problem, parts, start, losses, X, y)
        if self.best_step_ == 0:
            with self._timed("head"):
                self.coef_, self.intercept_ = self._fit_head(problem, problem.rows)
            if parts is None:
                self.n_parameters_ = self.coef_.size + self.intercept_.size
        return self

    @contextmanager
    def _timed(self, step):
        tick = time.perf_counter()
        yield
        seconds = time.perf_counter() - tick
        self.seconds_[step] = self.seconds_.get(step, 0.0) + seconds

    def _encode(self, problem):
        """Set centred and scaled vectors, and the rows that have one."""
        vectors = self.encoder_._transform(
            problem.column, problem.backend, problem.space
        )
        observed = ~np.isnan(vectors).any(axis=1)
        problem.rows = np.flatnonzero(observed & (problem.weight > 0))
        self._check_rows(problem)
        used = vectors[problem.rows].astype(np.float64)
        self.mean_ = used.mean(axis=0)
        distances = np.square(used - self.mean_).sum(axis=1)
        self.scale_ = float(np.sqrt(distances.mean())) or 1.0
        problem.vectors = (vectors - self.mean_) / self.scale_

    def _check_rows(self, problem):
        """Refuse too few rows with a cell and a positive weight."""
        if len(problem.rows) < 2:
            raise ValueError(
                f"{len(problem.rows)} of {len(problem.weight)} rows have a cell and a "
                "positive weight; at least two are needed."
            )

    def _split(self, problem):
        """Return training rows and the validation set."""
        from sklembed._training import Rows

        train, valid = problem.split(self.validation_fraction)
        if not len(valid):
            raise ValueError(
                f"validation_fraction={self.validation_fraction} leaves no validation set "
                f"of {len(problem.rows)} rows, since rows of one group or cell stay "
                "together, and no class may lack training rows. Pass more rows, a larger "
                "fraction, or method='head', which needs no validation set."
            )
        return Rows(train, valid)

    def _train(self, problem, parts, start, losses, X, y):
        """Train the network from a head; set the attributes of the best step."""
        import torch

        from sklembed._torch import resolve_device, resolve_dtype, to_numpy, to_tensor
        from sklembed._training import FinetuningOptions, finetune
        from sklembed.nn.finetuning import CellNetwork, LinearHead, parameter_groups

        device = resolve_device(self.device)
        trainable = problem.backend.trainable(self.device)
        head = LinearHead(
            *(torch.tensor(part, dtype=torch.float32) for part in start),
            torch.tensor(self.mean_, dtype=torch.float32),
            self.scale_,
        ).to(device)
        with Cells(problem, trainable, self.encoder_) as cells:
            tuned = self._choose_parameters(problem, trainable, cells)
            heights = [(head.weight, 0), (head.bias, 0), *tuned.values()]
            lr = _LEARNING_RATES[self.method] if self.lr == "auto" else self.lr
            groups = parameter_groups(heights, lr, self.layer_decay, self.weight_decay)
            for parameter, _ in heights:
                parameter.requires_grad_(True)
            # Other accelerators and CPUs compute in the precision of the frozen vectors.
            precision = "auto" if device.type == "cuda" else "float32"
            module = CellNetwork(
                trainable.network,
                head,
                partial(normalized, trainable.vectors, self.encoder_.normalize),
                cells,
                resolve_dtype(precision, device),
            )
            context = self._init_callback_context(max_subtasks=self.max_epochs)
            with _callbacks.task(self, context, X, y):
                result = finetune(
                    module,
                    groups,
                    losses,
                    torch.arange(len(problem.targets), device=device),
                    to_tensor(problem.targets, device),
                    parts,
                    FinetuningOptions(
                        self.max_epochs,
                        self.batch_size,
                        self.warmup_fraction,
                        self.max_grad_norm,
                        self.n_iter_no_change,
                        problem.seed,
                        self.verbose,
                    ),
                    sample_weight=to_tensor(problem.weight.astype(np.float32), device),
                    is_out_of_memory=is_out_of_memory,
                    on_epoch=_callbacks.each_epoch(self, context, X, y),
                )
        self.best_step_, self.history_ = result.best_step, result.history
        self.n_steps_ = result.n_steps
        if result.has_diverged:
            warnings.warn(
                f"Training diverged: a loss was not finite at step {result.n_steps}, with "
                f"lr={lr}. The result is {_name_step(result.best_step)}. Lower lr.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.n_parameters_ = sum(parameter.numel() for parameter, _ in heights)
        if result.best_step:
            self.coef_, self.intercept_ = to_numpy(head.weight), to_numpy(head.bias)
            for name, (parameter, _) in tuned.items():
                self.change_[name] = to_numpy(parameter).copy()

    def _choose_parameters(self, problem, trainable, cells):
        """Return the parameters to train by name, each with its number of layers to the head.

        Raises
        ------
        ValueError
            If the network has no parameters of the kind that the method trains.
        """
        import torch

        from sklembed.nn import finetuning

        network = trainable.network
        first = cells(problem.rows[:1].tolist())
        names = finetuning.used_parameters(
            network, lambda network: trainable.vectors(network, first)
        )
        heights = finetuning.heights(network, names)
        if self.method == "bitfit":
            names = [name for name in names if name.rpartition(".")[2] == "bias"]
        if self.method == "lora":
            modules = finetuning.adaptable_modules(network, names)
            names = []
            if modules:
                generator = torch.Generator().manual_seed(problem.seed)
                names = inject_adapters(network, modules, self.rank, generator)
        if not names:
            kind = {"bitfit": "biases", "lora": "linear layers"}
            raise ValueError(
                f"method={self.method!r} trains {kind.get(self.method, 'parameters')}, but "
                f"{self.encoder.model!r} has none that change its vectors. Choose "
                f"another of the methods {list(METHODS)}."
            )
        tuned = {}
        device = next(network.parameters()).device
        for name in names:
            parameter = network.get_parameter(name)
            parameter.data = parameter.data.to(device)
            height = heights.get(f"{name.partition('.lora_')[0]}.weight")
            tuned[name] = parameter, heights.get(name, height)
        return tuned

    def _outputs(self, X):
        """Return the outputs of the head; NaN for missing cells."""
        check_is_fitted(self)
        vectors = self._encoder_of_best_step().transform(X).astype(np.float64)
        return (vectors - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_

    def _encoder_of_best_step(self):
        """Return the frozen encoder, or an encoder by the trained network."""
        encoder = self.encoder_
        if self.best_step_ == 0:
            return encoder
        backend, _ = encoder._backend_and_space()
        if not hasattr(backend, "trainable"):
            raise OSError(
                f"The checkpoint {encoder.model!r} cannot be read: {backend.reason} The "
                "fitted model has the trained parameters alone. Copy the checkpoint to "
                "this machine, or pass another path: encoder_.set_params(model=...)."
            )
        tuned = FrozenEncoder(
            TunedBackend(backend, self.method, self.change_, self.device),
            normalize=encoder.normalize,
            batch_size=encoder.batch_size,
            missing=encoder.missing,
            errors=encoder.errors,
            verbose=encoder.verbose,
            store=None,  # the vectors depend on y
        )
        for name in ("feature_names_in_", "_image_settings"):
            if hasattr(encoder, name):
                setattr(tuned, name, getattr(encoder, name))
        return tuned

    @property
    def n_features_in_(self):
        """Number of columns seen during fit."""
        return self.encoder_.n_features_in_

    @property
    def feature_names_in_(self):
        """Names of the columns seen during fit."""
        return self.encoder_.feature_names_in_

    def __sklearn_is_fitted__(self):
        return hasattr(self, "coef_")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.no_validation = True  # cells are objects, which check_array would refuse
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags


def _name_step(step):
    return f"step {step}, the best" if step else "the frozen head"


class FinetunedClassifier(ClassifierMixin, _Finetuned):
    """Classify texts or images by a pretrained network that is trained for the task.

    Training starts at a logistic regression on vectors of the frozen encoder, which are
    read from the store if they are there: linear probing, then fine-tuning [1]_. A part
    of the rows is a validation set, which decides when training stops. The best step is
    restored. If its gain over the start is not significant (a paired t-test over the
    validation set, at 5 %), the result is the frozen head, fitted on all rows.

    Parameters
    ----------
    encoder : FrozenEncoder
        The encoder of the cells: a checkpoint of texts or images, or a backend object
        whose function `load` returns a torch module. It must return pooled vectors.

    method : {"head", "bitfit", "lora", "full"}, default="lora"
        Parameters to train besides the head. "head" trains none, so that the result is
        a logistic regression on frozen vectors. "bitfit" trains biases [2]_, "lora" low-rank
        adapters of all linear layers [3]_, and "full" all parameters. "lora" needs the
        extra ``finetune``; a fitted model predicts without it.

    rank : int, default=8
        Rank of the adapters of "lora". Other methods ignore it.

    C : float or "auto", default="auto"
        Inverse penalty of the logistic regression, on vectors that are centred and have
        a mean square of 1. "auto" chooses 0.1, 1, 10 or 100 by cross-validation.

    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss, as in scikit-learn.

    max_epochs : int, default=5
        Number of passes over the training rows.

    batch_size : int, default=16
        Maximum number of rows in a batch. An epoch is split into batches of nearly
        equal size. If memory runs out, gradients are accumulated over parts of a batch.

    lr : float or "auto", default="auto"
        Learning rate of AdamW. It belongs to the head, and decays towards the input.
        "auto" is 1e-3 for "bitfit", 5e-4 for "lora" and 3e-5 for "full".

    layer_decay : float, default=0.9
        Factor of the learning rate from a layer to the layer below it.

    warmup_fraction : float, default=0.1
        Fraction of the steps in which the learning rate rises linearly. It falls
        linearly afterwards.

    max_grad_norm : float, default=1.0
        Norm to which larger gradients are clipped.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. It decides when training
        stops, and which step is the best.

    n_iter_no_change : int, default=2
        Number of epochs without improvement before early stopping.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one. Predictions of a trained network are computed
        there, too. On a GPU that has it, training computes products in bfloat16.

    random_state : int, RandomState instance or None, default=None
        Seeds the adapters, the order of rows and the validation set. Pass an int for
        reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes.

    prior_ : ndarray of shape (n_classes,)
        Proportion of each class in training. It is the prediction for missing cells.

    encoder_ : FrozenEncoder
        The fitted encoder.

    best_step_ : int
        Step of the lowest loss on the validation set. 0 is the frozen head.

    n_steps_ : int
        Number of steps that training took.

    history_ : list of dict
        An entry for each evaluation of the validation set: "step", "epoch",
        "valid_loss", and "train_loss" after the first.

    change_ : dict of str to ndarray
        The trained parameters of the network by name: biases, adapters or all. Empty if
        `best_step_` is 0.

    coef_ : ndarray of shape (n_classes, n_features)
        Weights of the head, for centred and scaled vectors.

    intercept_ : ndarray of shape (n_classes,)
        Intercepts of the head.

    mean_, scale_ : ndarray of shape (n_features,), float
        Mean of the frozen vectors, and the root mean square of their distance to it.

    penalty_ : float
        The value of `C` that was used.

    n_parameters_ : int
        Number of trained parameters, with the head.

    seconds_ : dict of str to float
        Duration of "encoding" by the frozen encoder, of fitting the "head", and of
        "training" the network.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    FinetunedRegressor : The same for numeric targets.
    EmbeddingClassifier : Classifies frozen vectors, without tuning.

    Notes
    -----
    The network stays in evaluation mode in training: there is no dropout, and batch
    normalisation keeps its statistics. The network is loaded anew for each fit, so
    that frozen encoders in the same process do not change.

    If training diverges, so that a loss is not finite, it stops with a warning. The
    best step before is restored, or the frozen head, as after any other training.

    Rows with the same cell are in one part, training rows or validation set, unless
    `groups` are passed.

    References
    ----------
    .. [1] Kumar et al. Fine-Tuning can Distort Pretrained Features and Underperform
       Out-of-Distribution. arXiv 2202.10054.

    .. [2] Ben Zaken, Ravfogel, Goldberg. BitFit. arXiv 2106.10199.

    .. [3] Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. arXiv
       2106.09685.

    Examples
    --------
    >>> from sklembed import FinetunedClassifier, FrozenEncoder
    >>> from sklembed.encoders import minilm
    >>> texts = [f"{n} red apples" for n in range(20)] + [f"{n} dogs" for n in range(20)]
    >>> labels = ["fruit"] * 20 + ["animal"] * 20
    >>> classifier = FinetunedClassifier(
    ...     FrozenEncoder(minilm(), store=None),
    ...     method="bitfit",
    ...     max_epochs=1,
    ...     random_state=0,
    ... )
    >>> classifier.fit(texts, labels).predict(["a pear", "a cat", None]).shape
    (3,)
    """

    _parameter_constraints: dict = {
        **_Finetuned._parameter_constraints,
        "C": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        encoder,
        *,
        method="lora",
        rank=8,
        C="auto",
        class_weight=None,
        max_epochs=5,
        batch_size=16,
        lr="auto",
        layer_decay=0.9,
        warmup_fraction=0.1,
        max_grad_norm=1.0,
        weight_decay=0.01,
        validation_fraction=0.1,
        n_iter_no_change=2,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.encoder = encoder
        self.method = method
        self.rank = rank
        self.C = C
        self.class_weight = class_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.layer_decay = layer_decay
        self.warmup_fraction = warmup_fraction
        self.max_grad_norm = max_grad_norm
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=False)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, groups=None):
        """Fit the head on frozen vectors, then train the network.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells. Rows with a missing cell are not used in training.

        y : array-like of shape (n_samples,)
            Class of each row.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the losses of head and network. Rows of weight 0 are
            not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row. The validation set has other groups than the training
            rows.

        Returns
        -------
        self : FinetunedClassifier
            The fitted classifier.

        Raises
        ------
        ImportError
            If `method` is "lora" and peft is not installed.
        ValueError
            If a label is missing, there is only one class, all cells are missing, the
            network has no parameters that the method trains, or there are too few rows
            for a validation set.
        MemoryError
            If memory runs out on a single row.

        Warns
        -----
        ConvergenceWarning
            If training diverges.
        """
        check_no_missing_label(y)
        column, backend, space = self._begin_fit(X)
        check_consistent_length(column.cells, y)
        y_column = column_or_1d(y, warn=True)
        check_classification_targets(y_column)
        target = encode_target(y_column, "multiclass")
        weight = check_weights(sample_weight, np.zeros((len(column), 1)))
        weight = weight_classes(weight, target, self.class_weight)
        self.classes_ = target.classes
        self.prior_ = find_prior(target, weight)
        problem = Problem(
            column,
            backend,
            space,
            target.values,
            target.strata,
            weight,
            encode_groups(groups, weight),
            len(target.classes),
            draw_seed(self.random_state),
        )
        return self._fit_problem(problem, _cross_entropies, X, y)

    def predict_proba(self, X):
        """Return the probability of each class.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes)
            Probabilities; `prior_` for missing cells.
        """
        probabilities = softmax(self._outputs(X), axis=1)
        probabilities[np.isnan(probabilities[:, 0])] = self.prior_
        return probabilities

    def predict(self, X):
        """Return the most probable class.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Classes.
        """
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def _check_rows(self, problem):
        super()._check_rows(problem)
        if len(np.unique(problem.targets[problem.rows])) < 2:
            raise ValueError(
                f"The {len(problem.rows)} rows with a cell and a positive weight have one "
                "class; at least two are needed. Fill the missing cells."
            )

    def _find_penalty(self, problem):
        """Return C, chosen by the log loss out of fold if it is "auto"."""
        return find_C(problem) if self.C == "auto" else float(self.C)

    def _fit_head(self, problem, rows):
        return fit_logistic(problem, rows, self.penalty_)


def _cross_entropies(logits, codes):
    from sklembed.nn.finetuning import cross_entropies

    return cross_entropies(logits, codes)


class FinetunedRegressor(RegressorMixin, _Finetuned):
    """Predict numbers from texts or images by a network that is trained for the task.

    Training starts at a ridge regression on vectors of the frozen encoder, and is that
    of :class:`FinetunedClassifier`, with the squared error of standardised targets: the
    best step on a validation set is restored, and the result is the frozen head if no
    step is significantly better than the start [1]_.

    Parameters
    ----------
    encoder : FrozenEncoder
        The encoder of the cells: a checkpoint of texts or images, or a backend object
        whose function `load` returns a torch module. It must return pooled vectors.

    method : {"head", "bitfit", "lora", "full"}, default="lora"
        Parameters to train besides the head. "head" trains none, so that the result is
        a ridge regression on frozen vectors. "bitfit" trains biases [2]_, "lora" low-rank
        adapters of all linear layers [3]_, and "full" all parameters. "lora" needs the
        extra ``finetune``; a fitted model predicts without it.

    rank : int, default=8
        Rank of the adapters of "lora". Other methods ignore it.

    alpha : float or "auto", default="auto"
        Penalty of the ridge regression, on vectors that are centred and have a mean
        square of 1. "auto" chooses 0.001 to 100 by leave-one-out.

    max_epochs : int, default=5
        Number of passes over the training rows.

    batch_size : int, default=16
        Maximum number of rows in a batch. An epoch is split into batches of nearly
        equal size. If memory runs out, gradients are accumulated over parts of a batch.

    lr : float or "auto", default="auto"
        Learning rate of AdamW. It belongs to the head, and decays towards the input.
        "auto" is 1e-3 for "bitfit", 5e-4 for "lora" and 3e-5 for "full".

    layer_decay : float, default=0.9
        Factor of the learning rate from a layer to the layer below it.

    warmup_fraction : float, default=0.1
        Fraction of the steps in which the learning rate rises linearly. It falls
        linearly afterwards.

    max_grad_norm : float, default=1.0
        Norm to which larger gradients are clipped.

    weight_decay : float, default=0.01
        Weight decay of AdamW.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. It decides when training
        stops, and which step is the best.

    n_iter_no_change : int, default=2
        Number of epochs without improvement before early stopping.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one. Predictions of a trained network are computed
        there, too. On a GPU that has it, training computes products in bfloat16.

    random_state : int, RandomState instance or None, default=None
        Seeds the adapters, the order of rows and the validation set. Pass an int for
        reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    Attributes
    ----------
    target_mean_, target_scale_ : float
        Mean and standard deviation of the targets in training. The mean is the
        prediction for missing cells.

    encoder_ : FrozenEncoder
        The fitted encoder.

    best_step_ : int
        Step of the lowest loss on the validation set. 0 is the frozen head.

    n_steps_ : int
        Number of steps that training took.

    history_ : list of dict
        An entry for each evaluation of the validation set: "step", "epoch",
        "valid_loss", and "train_loss" after the first.

    change_ : dict of str to ndarray
        The trained parameters of the network by name: biases, adapters or all. Empty if
        `best_step_` is 0.

    coef_ : ndarray of shape (1, n_features)
        Weights of the head, for centred and scaled vectors.

    intercept_ : ndarray of shape (1,)
        Intercepts of the head.

    mean_, scale_ : ndarray of shape (n_features,), float
        Mean of the frozen vectors, and the root mean square of their distance to it.

    penalty_ : float
        The value of `alpha` that was used.

    n_parameters_ : int
        Number of trained parameters, with the head.

    seconds_ : dict of str to float
        Duration of "encoding" by the frozen encoder, of fitting the "head", and of
        "training" the network.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    FinetunedClassifier : The same for classes.
    EmbeddingRegressor : Predicts from frozen vectors, without tuning.

    Notes
    -----
    The network stays in evaluation mode in training: there is no dropout, and batch
    normalisation keeps its statistics. The network is loaded anew for each fit, so
    that frozen encoders in the same process do not change.

    If training diverges, so that a loss is not finite, it stops with a warning. The
    best step before is restored, or the frozen head, as after any other training.

    Rows with the same cell are in one part, training rows or validation set, unless
    `groups` are passed.

    References
    ----------
    .. [1] Kumar et al. Fine-Tuning can Distort Pretrained Features and Underperform
       Out-of-Distribution. arXiv 2202.10054.

    .. [2] Ben Zaken, Ravfogel, Goldberg. BitFit. arXiv 2106.10199.

    .. [3] Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. arXiv
       2106.09685.

    Examples
    --------
    >>> from sklembed import FinetunedRegressor, FrozenEncoder
    >>> from sklembed.encoders import minilm
    >>> texts = [f"{n} red apples" for n in range(40)]
    >>> regressor = FinetunedRegressor(
    ...     FrozenEncoder(minilm(), store=None),
    ...     method="bitfit",
    ...     max_epochs=1,
    ...     random_state=0,
    ... )
    >>> regressor.fit(texts, range(40)).predict(["7 pears", None]).shape
    (2,)
    """

    _parameter_constraints: dict = {
        **_Finetuned._parameter_constraints,
        "alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        encoder,
        *,
        method="lora",
        rank=8,
        alpha="auto",
        max_epochs=5,
        batch_size=16,
        lr="auto",
        layer_decay=0.9,
        warmup_fraction=0.1,
        max_grad_norm=1.0,
        weight_decay=0.01,
        validation_fraction=0.1,
        n_iter_no_change=2,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.encoder = encoder
        self.method = method
        self.rank = rank
        self.alpha = alpha
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.layer_decay = layer_decay
        self.warmup_fraction = warmup_fraction
        self.max_grad_norm = max_grad_norm
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=False)
    @with_callbacks
    def fit(self, X, y, sample_weight=None, groups=None):
        """Fit the head on frozen vectors, then train the network.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells. Rows with a missing cell are not used in training.

        y : array-like of shape (n_samples,)
            Numeric targets.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows in the losses of head and network. Rows of weight 0 are
            not used.

        groups : array-like of shape (n_samples,), default=None
            Group of each row. The validation set has other groups than the training
            rows.

        Returns
        -------
        self : FinetunedRegressor
            The fitted regressor.

        Raises
        ------
        ImportError
            If `method` is "lora" and peft is not installed.
        ValueError
            If a target is missing or not finite, all targets or all cells are equal or
            missing, the network has no parameters that the method trains, or there are
            too few rows for a validation set.
        MemoryError
            If memory runs out on a single row.

        Warns
        -----
        ConvergenceWarning
            If training diverges.
        """
        check_no_missing_label(y)
        column, backend, space = self._begin_fit(X)
        check_consistent_length(column.cells, y)
        numbers = column_or_1d(y, dtype=np.float64, warn=True)
        encode_target(numbers, "continuous")  # refuses infinite and constant targets
        weight = check_weights(sample_weight, np.zeros((len(column), 1)))
        self.target_mean_, self.target_scale_ = map(
            float, scale_targets(numbers, weight)
        )
        targets = (numbers - self.target_mean_) / self.target_scale_
        problem = Problem(
            column,
            backend,
            space,
            targets.astype(np.float32),
            None,
            weight,
            encode_groups(groups, weight),
            1,
            draw_seed(self.random_state),
        )
        return self._fit_problem(problem, _squared_errors, X, y)

    def predict(self, X):
        """Return the predicted numbers.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Numbers; `target_mean_` for missing cells.
        """
        outputs = self._outputs(X)[:, 0]
        outputs[np.isnan(outputs)] = 0.0
        return outputs * self.target_scale_ + self.target_mean_

    def _find_penalty(self, problem):
        """Return alpha, chosen by leave-one-out if it is "auto"."""
        if self.alpha != "auto":
            return float(self.alpha)
        rows = problem.rows
        model = RidgeCV(_ALPHAS)
        model.fit(problem.vectors[rows], problem.targets[rows], problem.weight[rows])
        return float(model.alpha_)

    def _fit_head(self, problem, rows):
        model = Ridge(self.penalty_)
        model.fit(problem.vectors[rows], problem.targets[rows], problem.weight[rows])
        return model.coef_[None], np.array([model.intercept_])


def _squared_errors(outputs, y):
    from sklembed.nn.finetuning import squared_errors

    return squared_errors(outputs, y)
