"""The only module that imports skorch: it trains a network and returns arrays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from skorch import NeuralNet
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler
from skorch.exceptions import SkorchException
from torch import Tensor, nn

from sklembed._torch import resolve_device, to_numpy, to_tensor

Arrays = dict[str, np.ndarray]
History = list[dict[str, float]]
Watch = Callable[[History, Callable[[], Arrays]], bool]

_SIGNIFICANCE = 0.05  # of the gain of fine-tuning
# Arguments of `train` decide these options, so skorch_params must not set them.
_RESERVED = frozenset(
    {"module", "criterion", "iterator_train", "iterator_valid", "device"}
)


@dataclass(frozen=True)
class TrainingOptions:
    """Training options under the names of the estimators' parameters."""

    max_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    device: str
    seed: int
    n_iter_no_change: int = 10
    verbose: int = 0
    skorch_params: dict[str, Any] | None = None

    @classmethod
    def of(cls, estimator: Any, seed: int, **overrides: Any) -> "TrainingOptions":
        """Read the options from an estimator's parameters."""
        names = {option.name for option in fields(cls)}
        names &= estimator.get_params(deep=False).keys()
        options = {name: getattr(estimator, name) for name in names}
        return cls(**(options | {"seed": seed} | overrides))


@dataclass(frozen=True)
class Rows:
    """Positions of the rows of one network.

    Attributes
    ----------
    train : ndarray of int
        The training rows.
    valid : ndarray of int
        The validation set of early stopping; empty without early stopping.
    """

    train: np.ndarray
    valid: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class Trained:
    """The result of training: weights and buffers as plain arrays, and the history."""

    weights: Arrays
    history: History
    n_parameters: int = 0


def train(
    make_module: Callable[[torch.Generator], nn.Module],
    loss: Callable[..., Tensor],
    X: np.ndarray,
    y: np.ndarray,
    rows: Rows | Sequence[Rows],
    options: TrainingOptions,
    *,
    sample_weight: np.ndarray | None = None,
    start: Trained | None = None,
    on_epoch: Watch | None = None,
) -> Trained:
    """Train one network, or several networks of one shape at once, with AdamW.

    Several networks are stacked along a leading axis and trained by batched products. They are
    independent: each has its own batches and its own loss, and AdamW works elementwise. All take
    the same number of steps per epoch, in batches of nearly equal size.

    The global random states of torch and numpy are neither read nor changed. Weights, dropout and
    the order of rows come from generators of this call, so equal seeds give equal networks in any
    thread.

    Rows that would fill more than half of the free memory of the device stay in the memory of the
    host, and are copied to the device by batch.

    Parameters
    ----------
    make_module : callable
        Takes a torch generator and returns the module on the device of that generator. The module
        maps (batch, ...) to (batch, ...), or (n_networks, batch, ...) if there are several.
    loss : callable
        Takes outputs, targets (batch, ...) and weights (batch,) or None, and returns a scalar.
        With several networks, all of them have a leading axis of networks.
    X : ndarray of shape (n_samples, ...)
        Inputs.
    y : ndarray of shape (n_samples, ...)
        Targets.
    rows : Rows or sequence of Rows
        The rows of the network, or of each of several networks.
    options : TrainingOptions
        Optimizer, batches, device and seed. `skorch_params` overrides the arguments of the net.
    sample_weight : ndarray of shape (n_samples,) or None
        Weights of the rows in the loss.
    start : Trained or None
        Weights and history to continue from. Batches and dropout are drawn anew.
    on_epoch : callable or None
        Called after each epoch with the history and a function that returns the weights. Training
        stops if it returns True.

    Returns
    -------
    trained : Trained
        Parameters and buffers, and a history entry for each epoch with "epoch", "train_loss",
        "dur" (seconds) and the records of callbacks.

    Raises
    ------
    ValueError
        If the device is not available, the weights are not finite after training, or
        `skorch_params` sets a reserved option.
    TypeError
        If the callbacks in `skorch_params` are not a list.
    torch.OutOfMemoryError
        If a batch does not fit into the memory of the device.
    """
    device = resolve_device(options.device)
    past = [] if start is None else start.history
    seed = options.seed + len(past)  # a resumed training must not repeat its batches
    generator = torch.Generator(device).manual_seed(seed)
    weight = None
    if sample_weight is not None:
        weight = to_tensor(sample_weight.astype(np.float32), device)
    settings = _settings(options, device, rows, weight, seed)
    first, last = _make_callbacks(rows, options, on_epoch, past)
    callbacks = settings.get("callbacks")
    if callbacks != "disable":
        settings["callbacks"] = [*first, *_as_list(callbacks), *last]
    net = _NetWithCallbacks(
        make_module(generator), Criterion(loss), **settings
    ).initialize()
    if callbacks == "disable":  # disables skorch's and the user's; training needs ours
        net.callbacks_ = [*first, *last]
    if start is not None:
        state = {name: torch.from_numpy(v.copy()) for name, v in start.weights.items()}
        _module(net).load_state_dict(state)
    place = device if _fits(X, device) else torch.device("cpu")
    try:
        net.partial_fit(to_tensor(X, place), to_tensor(y, device))
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"Training ran out of memory on device={options.device!r}. Lower batch_size, or n_jobs "
            "if several processes train on it, or pass device='cpu'."
        )
        raise
    except (KeyError, ValueError, SkorchException) as error:
        if "valid_loss" in str(error):
            error.add_note(
                "The callback monitors the validation loss, but there is no validation set. Set "
                "early_stopping=True, or pass a train_split in skorch_params."
            )
        raise
    weights = _weights(net)
    if not all(np.isfinite(value).all() for value in weights.values()):
        raise ValueError(
            f"Training diverged: the weights are not finite after {len(net.history)} epochs at "
            f"lr={options.lr}. Lower lr, or scale the input."
        )
    n_parameters = sum(p.numel() for p in net.module_.parameters())
    return Trained(weights, _history(net, past), n_parameters)


def _fits(array: np.ndarray, device: torch.device) -> bool:
    """Return whether an array leaves half of the free memory of the device to the network."""
    if device.type != "cuda":
        return True
    n_free, _ = torch.cuda.mem_get_info(device)
    return array.nbytes <= n_free / 2


def _settings(
    options: TrainingOptions,
    device: torch.device,
    rows: Rows | Sequence[Rows],
    weight: Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """Return the arguments of the skorch net."""
    params = options.skorch_params or {}
    reserved = sorted(name for name in params if name.split("__")[0] in _RESERVED)
    if reserved:
        raise ValueError(
            f"skorch_params sets {', '.join(reserved)}, which the estimator sets itself. Use its "
            "own parameters; skorch_params is for callbacks, optimizer, train_split and the like."
        )
    settings: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": options.weight_decay,
        "optimizer__fused": True,
        "lr": options.lr,
        "max_epochs": options.max_epochs,
        "batch_size": options.batch_size,
        "iterator_train": Batches,
        "iterator_valid": Batches,
        "train_split": None,
        "verbose": options.verbose,
        "device": device,
    }
    if "optimizer" in params:
        del settings["optimizer__fused"]  # other optimizers may lack this argument
    settings |= params
    for iterator in ("iterator_train", "iterator_valid"):
        settings[f"{iterator}__rows"] = rows
        settings[f"{iterator}__sample_weight"] = weight
    settings["iterator_train__seed"] = seed
    return settings


class Criterion(nn.Module):
    """A loss function as the module that skorch expects; losses of networks are summed."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of the losses of all networks on one batch."""
        return self.per_network(output, target).sum()

    def per_network(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss, a scalar, or a vector with the loss of each network."""
        y, weight = target
        return self.loss(output, y, weight if weight.numel() else None)


class Batches:
    """Batches indexed from tensors, in a new random order every epoch.

    A DataLoader would fetch row by row, which takes longer than the training of a small network.
    Batches are on the device of the targets, and X may be in the memory of the host.
    The order is drawn on the CPU, so it is the same on every device. With several networks, those
    with fewer rows get smaller batches, which are padded with rows of weight 0.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rows: Rows | Sequence[Rows],
        sample_weight: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        subset = getattr(dataset, "indices", None)  # a Subset comes from train_split
        dataset = getattr(dataset, "dataset", dataset)
        self.X, self.y = dataset.X, dataset.y
        self.stacked = not isinstance(rows, Rows)
        networks = [rows] if isinstance(rows, Rows) else rows
        self.rows = [torch.from_numpy(part.train) for part in networks]
        if subset is not None:
            subset = torch.as_tensor(np.asarray(subset))
            self.rows = [part[torch.isin(part, subset)] for part in self.rows]
        self.sample_weight = sample_weight
        self.n_batches = -(-max(len(part) for part in self.rows) // batch_size)
        self.generators: list[torch.Generator] | None = None
        if seed is not None:
            self.generators = [torch.Generator().manual_seed(seed) for _ in networks]

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        orders = self.rows
        if self.generators is not None:
            orders = [
                rows[torch.randperm(len(rows), generator=generator)]
                for rows, generator in zip(self.rows, self.generators, strict=True)
            ]
        parts = [torch.tensor_split(order, self.n_batches) for order in orders]
        for batch in zip(*parts, strict=True):
            # The index has the shape (batch,), or (n_networks, batch).
            if self.stacked:
                index = nn.utils.rnn.pad_sequence(list(batch), True, padding_value=-1)
            else:
                index = batch[0]
            # Padding is found on the CPU, because a test on the device would wait for it.
            mask = index >= 0 if bool((index < 0).any()) else None
            index = index.clamp(min=0)
            X = _take(self.X, index.to(self.X.device)).to(self.y.device)
            index = index.to(self.y.device)
            yield X, (_take(self.y, index), self._weight(mask, index))

    def _weight(self, mask: Tensor | None, index: Tensor) -> Tensor:
        """Return the weights of a batch; empty if all are 1, because skorch rejects None."""
        weight = torch.empty(0, device=index.device)
        if self.sample_weight is not None:
            weight = _take(self.sample_weight, index)
        if mask is not None:
            present = mask.to(index.device, torch.float32)
            weight = present if self.sample_weight is None else weight * present
        return weight


def _make_callbacks(
    rows: Rows | Sequence[Rows],
    options: TrainingOptions,
    on_epoch: Watch | None,
    past: History,
) -> tuple[list[tuple[str, Callback]], list[tuple[str, Callback]]]:
    """Return the callbacks that run before those of the user, and those that run after.

    The validation loss is recorded first, so that the user's callbacks can monitor it. Training is
    stopped last, so that they see the final epoch.
    """
    first: list[tuple[str, Callback]] = []
    last: list[tuple[str, Callback]] = []
    networks = [rows] if isinstance(rows, Rows) else rows
    if len(networks[0].valid):
        best = BestWeights(options.n_iter_no_change)
        first.append(("sklembed_best", best))
        last.append(("sklembed_stop", _StopAfter(best)))
    if on_epoch is not None:
        last.append(("sklembed_epoch", _AfterEpoch(on_epoch, past)))
    return first, last


class EarlyStop(KeyboardInterrupt):
    """Ends training: skorch's own early stopping raises a KeyboardInterrupt, too."""


class _Interrupted(BaseException):
    """An interruption by the user, which skorch does not take for early stopping."""


class _Net(NeuralNet):  # type: ignore[misc]
    """A net whose training ends early by a callback, but not by an interruption of the user.

    skorch takes both for early stopping, and an interrupted fit would count as finished.
    """

    def fit_loop(self, *args: Any, **options: Any) -> NeuralNet:
        """Train until an early stop; let interruptions by the user pass skorch."""
        try:
            return super().fit_loop(*args, **options)
        except EarlyStop:
            raise
        except KeyboardInterrupt as interrupt:
            raise _Interrupted from interrupt

    def partial_fit(self, *args: Any, **options: Any) -> NeuralNet:
        """Train, and raise the KeyboardInterrupt of the user."""
        try:
            return super().partial_fit(*args, **options)
        except _Interrupted:
            raise KeyboardInterrupt from None


class _NetWithCallbacks(_Net):
    """A net with callbacks of the user, which may stop it by a KeyboardInterrupt as skorch does."""

    def notify(self, method_name: str, **options: Any) -> None:
        """Call the callbacks."""
        try:
            super().notify(method_name, **options)
        except KeyboardInterrupt as stop:
            raise EarlyStop from stop


class BestWeights(Callback):  # type: ignore[misc]
    """Record the mean validation loss, and restore the best weights of each network.

    `finished` is True once the loss of no network has improved for `patience` epochs.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, net: NeuralNet, **_: Any) -> None:
        """Reset the best loss."""
        self.best: np.ndarray | None = None
        self.finished = False

    def on_epoch_end(self, net: NeuralNet, dataset_train: Any = None, **_: Any) -> None:
        """Compute the validation loss and keep improved weights."""
        losses = self._validation_losses(net, dataset_train)
        net.history.record("valid_loss", float(losses.mean()))
        state = _module(net).state_dict()
        if self.best is None:
            self.best = np.full(len(losses), np.inf)
            self.epochs = np.zeros(len(losses), dtype=int)  # without improvement
            self.state = _copied(state)
        running = self.epochs < self.patience
        improved = running & (losses < self.best)
        self.epochs = np.where(improved, 0, self.epochs + 1)
        self.best = np.where(improved, losses, self.best)
        if improved.all():
            self.state = _copied(state)
        else:
            self._copy_networks(state, np.flatnonzero(improved))
        net.history.record("valid_loss_best", bool(improved.any()))
        self.finished = bool((self.epochs >= self.patience).all())

    def on_train_end(self, net: NeuralNet, **_: Any) -> None:
        """Restore the best weights."""
        if self.best is not None:
            _module(net).load_state_dict(self.state)

    def _copy_networks(self, state: dict[str, Tensor], networks: np.ndarray) -> None:
        """Copy the weights of some of several stacked networks."""
        n_networks = len(self.epochs)
        for name, value in state.items():
            # Buffers such as the mean of the input are shared and never change.
            if value.ndim and len(value) == n_networks:
                self.state[name][networks] = value[networks]

    @staticmethod
    @torch.inference_mode()
    def _validation_losses(net: NeuralNet, dataset: Any) -> np.ndarray:
        """Return the mean loss of each network on its validation set."""
        rows = net.iterator_train__rows
        if isinstance(rows, Rows):
            rows = Rows(rows.valid)
        else:
            rows = [Rows(part.valid) for part in rows]
        weight = net.iterator_train__sample_weight
        batches = Batches(dataset, net.batch_size, rows=rows, sample_weight=weight)
        net.module_.eval()
        losses = [net.criterion_.per_network(net.module_(X), y) for X, y in batches]
        return np.atleast_1d(torch.stack(losses).mean(dim=0).cpu().double().numpy())


class _StopAfter(Callback):  # type: ignore[misc]
    """Stop training when no network improves any more."""

    def __init__(self, best: BestWeights) -> None:
        self.best = best

    def on_epoch_end(self, net: NeuralNet, **_: Any) -> None:
        """Stop if early stopping has finished."""
        if self.best.finished:
            raise EarlyStop


class _AfterEpoch(Callback):  # type: ignore[misc]
    """Call a function after each epoch."""

    def __init__(self, watch: Watch, past: History) -> None:
        self.watch = watch
        self.past = past

    def on_epoch_end(self, net: NeuralNet, **_: Any) -> None:
        """Call the function, and stop if it returns True."""
        if self.watch(_history(net, self.past), lambda: _weights(net)):
            raise EarlyStop


@dataclass(frozen=True)
class FinetuningOptions:
    """Options of `finetune`."""

    max_epochs: int
    batch_size: int
    warmup_fraction: float
    max_grad_norm: float
    n_iter_no_change: int
    seed: int
    verbose: int = 0
    n_evaluations: int = 4  # per epoch


@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune`; the module has the parameters of the best step."""

    best_step: int
    n_steps: int
    history: History
    has_diverged: bool


def finetune(
    module: nn.Module,
    groups: list[dict[str, Any]],
    losses: Callable[[Tensor, Tensor], Tensor],
    X: Tensor,
    y: Tensor,
    rows: Rows,
    options: FinetuningOptions,
    *,
    sample_weight: Tensor,
    is_out_of_memory: Callable[[Exception], bool],
    on_epoch: Watch | None = None,
) -> Finetuned:
    """Train some parameters of a pretrained module with AdamW, and return to the best step.

    The learning rate rises linearly, then falls linearly to 0. The loss on the validation set is
    computed before the first step and several times an epoch. A later step is the best only if
    its gain over the start is significant in a one-sided paired t-test over the rows, at 5 %.
    Training stops if a loss is not finite, which is no step to return to. If memory runs out,
    gradients are accumulated over parts of a batch.

    Unlike `train`, this keeps copies of the trained parameters alone, and each group of
    parameters has a learning rate.

    Parameters
    ----------
    module : torch.nn.Module
        Maps inputs (batch, ...) to outputs (batch, n_outputs). Changed in place.
    groups : list of dict
        The parameters to train, as groups of `torch.optim.AdamW`.
    losses : callable
        Takes outputs and targets, and returns the loss of each row.
    X, y : Tensor of shape (n_samples, ...)
        Inputs and targets, on the device of the module.
    rows : Rows
        Training rows and validation set, each with at least one row.
    options : FinetuningOptions
        Epochs, batches, schedule and seed.
    sample_weight : Tensor of shape (n_samples,)
        Weights of the rows, positive.
    is_out_of_memory : callable
        Takes an error, and returns whether memory ran out.
    on_epoch : callable or None
        Called after each epoch with the history and a function that returns all weights.
        Training stops if it returns True.

    Returns
    -------
    finetuned : Finetuned
        The best step, 0 for the start; the number of steps; an entry for each evaluation with
        "step", "epoch", "valid_loss", and "train_loss" after the first; and whether training
        diverged, that is, stopped because a loss was not finite.

    Raises
    ------
    ValueError
        If a loss is not finite before the first step.
    MemoryError
        If memory runs out on a single row.
    """
    n_batches = -(-len(rows.train) // options.batch_size)
    best = BestStep(rows.valid, losses, sample_weight, groups, n_batches, options)
    schedule = LRScheduler(
        torch.optim.lr_scheduler.LambdaLR,
        lr_lambda=_Triangle(n_batches * options.max_epochs, options.warmup_fraction),
        step_every="batch",
    )
    callbacks: list[tuple[str, Callback]] = [
        ("clip", GradientNormClipping(options.max_grad_norm)),
        ("schedule", schedule),
        ("best", best),
    ]
    if on_epoch is not None:
        callbacks.append(("epoch", _AfterEpoch(on_epoch, [])))
    net = _PartwiseNet(
        module,
        Criterion(lambda outputs, y, weight: losses(outputs, y)),
        optimizer=lambda parameters, lr: torch.optim.AdamW(groups, lr=lr),
        max_epochs=options.max_epochs,
        batch_size=options.batch_size,
        iterator_train=Batches,
        iterator_train__rows=rows,
        iterator_train__sample_weight=sample_weight,
        iterator_train__seed=options.seed,
        train_split=None,
        callbacks=callbacks,
        verbose=options.verbose,
        device=None,
    ).initialize()
    net.limit = _PartLimit(options.batch_size, is_out_of_memory)
    net.partial_fit(X, y)
    return Finetuned(best.step_of_best, best.step, best.history, best.has_diverged)


@dataclass(frozen=True)
class _Triangle:
    """Factor of the learning rate at a step: linear warm-up, then linear decay."""

    n_steps: int
    warmup_fraction: float

    def __call__(self, step: int) -> float:
        n_warmup = max(1, round(self.warmup_fraction * self.n_steps))
        if step < n_warmup:
            return (step + 1) / n_warmup
        return (self.n_steps - step) / max(1, self.n_steps - n_warmup)


class _PartLimit:
    """Largest number of rows in a forward pass, halved when memory runs out."""

    def __init__(
        self, n_rows: int, is_out_of_memory: Callable[[Exception], bool]
    ) -> None:
        self.n_rows = n_rows
        self.is_out_of_memory = is_out_of_memory

    def run(self, function: Callable[[int], Tensor]) -> Tensor:
        """Call a function with the limit, again with half of it while memory runs out."""
        while True:
            try:
                return function(self.n_rows)
            except Exception as error:
                if not self.is_out_of_memory(error):
                    raise
                if self.n_rows == 1:
                    raise MemoryError(
                        "Training ran out of memory on a single row. Lower max_length of "
                        "the encoder, pass method='lora', a smaller model or device='cpu' "
                        f"({error})"
                    ) from error
            # After the except block, which keeps the tensors of the batch alive.
            self.n_rows = -(-self.n_rows // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _PartwiseNet(_Net):
    """A net that accumulates the gradients of a batch over parts of it."""

    limit: _PartLimit

    def train_step_single(self, batch: Any, **_: Any) -> dict[str, Any]:
        """Compute the gradients of the weighted mean loss of a batch."""
        loss = self.limit.run(lambda n_rows: self._accumulate(batch, n_rows))
        return {"loss": loss, "y_pred": None}

    def _accumulate(self, batch: Any, n_rows: int) -> Tensor:
        X, (y, weight) = batch
        self.optimizer_.zero_grad()
        shares = weight / weight.sum()
        total = torch.zeros((), device=y.device)
        for part in torch.split(torch.arange(len(X), device=X.device), n_rows):
            losses = self.criterion_.per_network(
                self.module_(X[part]), (y[part], shares)
            )
            loss = (shares[part] * losses).sum()
            loss.backward()
            total += loss.detach()
        return total


class BestStep(Callback):  # type: ignore[misc]
    """Evaluate the validation set before and during training, and restore the best step."""

    def __init__(
        self,
        rows: np.ndarray,
        losses: Callable[[Tensor, Tensor], Tensor],
        sample_weight: Tensor,
        groups: list[dict[str, Any]],
        n_batches: int,
        options: FinetuningOptions,
    ) -> None:
        self.rows = torch.from_numpy(rows).to(sample_weight.device)
        self.losses = losses
        self.shares = sample_weight[self.rows] / sample_weight[self.rows].sum()
        self.parameters = [p for group in groups for p in group["params"]]
        self.n_batches = n_batches  # per epoch
        self.interval = -(-n_batches // options.n_evaluations)
        self.patience = options.n_iter_no_change * -(-n_batches // self.interval)

    def on_train_begin(
        self, net: NeuralNet, X: Any = None, y: Any = None, **_: Any
    ) -> None:
        """Evaluate the start, and copy its parameters."""
        self.X, self.y = X, y
        self.history: History = []
        self.train_losses: list[float] = []
        self.step = self.step_of_best = self.n_without_gain = 0
        self.has_diverged = False
        self.start = self.best = self._evaluate(net)
        self._check_start("validation set", self.history[0]["valid_loss"])
        self.start_values = self.best_values = self._copy()

    def on_batch_end(self, net: NeuralNet, loss: Any = None, **_: Any) -> None:
        """Evaluate after some of the steps, and after the last step of an epoch."""
        self.step += 1
        self.train_losses.append(float(loss))
        if self.step == 1:  # the loss before this step
            self._check_start("first batch", self.train_losses[0])
        self._stop_if_diverged(self.train_losses[-1])
        step_of_epoch = self.step % self.n_batches
        if step_of_epoch % self.interval and step_of_epoch:
            return
        losses = self._evaluate(net)
        self._stop_if_diverged(self.history[-1]["valid_loss"])
        self.n_without_gain += 1
        if self._mean(losses) < self._mean(self.best):
            self.best, self.step_of_best = losses, self.step
            self.best_values, self.n_without_gain = self._copy(), 0
        if self.n_without_gain >= self.patience:
            raise EarlyStop

    def on_train_end(self, net: NeuralNet, **_: Any) -> None:
        """Restore the parameters of the best step, or of the start."""
        if not self._exceeds_start():
            self.step_of_best, self.best_values = 0, self.start_values
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best_values, strict=True):
                parameter.copy_(value)

    def _check_start(self, part: str, loss: float) -> None:
        """Raise an error if a loss of the frozen head is not finite."""
        if not np.isfinite(loss):
            raise ValueError(
                f"The loss of the {part} is not finite before the first step of training. "
                "Check the vectors of the encoder."
            )

    def _stop_if_diverged(self, loss: float) -> None:
        """Stop if a loss is not finite: the steps so far are the only ones to return to."""
        if not np.isfinite(loss):
            self.has_diverged = True
            raise EarlyStop

    def _exceeds_start(self) -> bool:
        """Return whether the gain over the start is significant over the rows."""
        gains = self.start - self.best
        gain = self._mean(gains)
        variance = float((self.shares.square() * (gains - gain).square()).sum())
        n_rows = 1 / float(self.shares.square().sum())  # as many rows of equal weight
        if n_rows < 1.5 or gain <= 0:
            return False
        # The variance of the mean, corrected for the estimated mean.
        error = np.sqrt(variance * n_rows / (n_rows - 1))
        return bool(gain > student.ppf(1 - _SIGNIFICANCE, n_rows - 1) * error)

    def _evaluate(self, net: NeuralNet) -> Tensor:
        """Return the loss of each validation row, and record its mean."""
        with torch.inference_mode():
            losses: Tensor = net.limit.run(lambda n_rows: self._row_losses(net, n_rows))
        entry = {"step": self.step, "epoch": self.step / self.n_batches}
        if self.train_losses:
            entry["train_loss"] = float(np.mean(self.train_losses))
            self.train_losses = []
        entry["valid_loss"] = self._mean(losses)
        self.history.append(entry)
        return losses

    def _row_losses(self, net: NeuralNet, n_rows: int) -> Tensor:
        losses = []
        for part in torch.split(self.rows, n_rows):
            losses.append(self.losses(net.module_(self.X[part]), self.y[part]))
        return torch.cat(losses)

    def _mean(self, losses: Tensor) -> float:
        return float((self.shares * losses).sum())

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def _as_list(callbacks: Any) -> list[Any]:
    """Return the callbacks of the user as a list."""
    if callbacks is None:
        return []
    if not isinstance(callbacks, list | tuple):
        raise TypeError(
            f"skorch_params['callbacks'] is {callbacks!r}; skorch expects a list of callbacks, or "
            "of pairs of a name and a callback, or 'disable'. Put a single callback into a list."
        )
    return list(callbacks)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Return ``tensor[index]``; faster than advanced indexing."""
    rows = tensor.index_select(0, index.flatten())
    return rows.view(*index.shape, *tensor.shape[1:])


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _module(net: NeuralNet) -> nn.Module:
    """Return the module; compilation wraps it and renames its weights."""
    module: nn.Module = getattr(net.module_, "_orig_mod", net.module_)
    return module


def _weights(net: NeuralNet) -> Arrays:
    """Copy the module's parameters and buffers to arrays."""
    state = _module(net).state_dict()
    return {name: to_numpy(value).copy() for name, value in state.items()}


def _history(net: NeuralNet, past: History) -> History:
    """Return the entries of all epochs, without the records of batches, which are large."""
    history = list(past)
    for number, epoch in enumerate(net.history, start=len(past) + 1):
        entry = {key: v for key, v in epoch.items() if isinstance(v, int | float)}
        history.append(entry | {"epoch": number})
    return history
