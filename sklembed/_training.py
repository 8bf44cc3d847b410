"""The one door to skorch: networks, a loss and arrays go in; weights and history come out."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.exceptions import SkorchException
from torch import Tensor, nn

from sklembed._torch import resolve_device, to_numpy, to_tensor

Arrays = dict[str, np.ndarray]
History = list[dict[str, float]]

# What the arguments of `train` decide; skorch_params may not.
_OURS = frozenset({"module", "criterion", "iterator_train", "iterator_valid", "device"})


@dataclass(frozen=True)
class TrainingOptions:
    """How networks are trained; the names are those of the estimators' parameters."""

    max_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    device: str
    seed: int
    n_iter_no_change: int = 10
    keep_optimizer: bool = False
    verbose: int = 0
    skorch_params: dict[str, Any] | None = None

    @classmethod
    def of(cls, estimator: Any, seed: int, **changes: Any) -> "TrainingOptions":
        """Read what an estimator has parameters for; `changes` are set otherwise."""
        names = {option.name for option in fields(cls)} & estimator.get_params(
            deep=False
        ).keys()
        given = {name: getattr(estimator, name) for name in names}
        return cls(**(given | {"seed": seed} | changes))


@dataclass(frozen=True)
class Rows:
    """The rows that one network sees.

    Attributes
    ----------
    train : ndarray of int
        Positions of those it is trained on.
    valid : ndarray of int
        Positions of those by which it is stopped; none, and it is not.
    odds : ndarray of shape (len(train),) or None
        How likely each is drawn, with replacement; None shows each once an epoch.
    """

    train: np.ndarray
    valid: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    odds: np.ndarray | None = None


@dataclass(frozen=True)
class Trained:
    """What training leaves behind: plain arrays, stacked along a leading axis of networks."""

    weights: Arrays
    history: History
    optimizer_state: Arrays


def train(
    make_module: Callable[[torch.Generator], nn.Module],
    loss: Callable[..., Tensor],
    X: np.ndarray,
    y: np.ndarray,
    rows: Sequence[Rows],
    options: TrainingOptions,
    *,
    sample_weight: np.ndarray | None = None,
    start: Trained | None = None,
    on_epoch: Callable[[History, Callable[[], Arrays]], bool] | None = None,
) -> Trained:
    """Train networks of one shape, each on rows of its own, by AdamW and batched products.

    The networks share nothing but the steps: the batches of each come from its own rows, its
    gradient from its own loss, and AdamW works number by number. All make equally many steps an
    epoch, in batches of nearly equal size, so that each sees each of its rows once.

    The global random state of torch and numpy is neither read nor changed: weights, dropout and
    the order of rows come from generators of the call's own, so that equal seeds give equal
    networks in any thread.

    Parameters
    ----------
    make_module : callable
        Builds the networks on the device of the generator it is given, drawing from that
        generator. They map (n_networks, batch, ...) to (n_networks, batch, ...).
    loss : callable
        Maps their output, the targets (n_networks, batch, ...), and weights (n_networks, batch) or
        None to a loss for each network.
    X : ndarray of shape (n_samples, ...)
        Inputs.
    y : ndarray of shape (n_samples, ...)
        Targets.
    rows : sequence of Rows
        The rows of each network.
    options : TrainingOptions
        Optimiser, batches, device, seed; `skorch_params` override what the net is built with.
    sample_weight : ndarray of shape (n_samples,) or None
        Weights of the rows in the loss.
    start : Trained or None
        What to go on from: weights, the optimiser's state if it was kept, and the history, on which
        the new one follows. Batches and dropout are drawn anew, not as at first.
    on_epoch : callable or None
        Called after each epoch with the whole history and a function that returns the weights;
        returns whether to stop.

    Returns
    -------
    trained : Trained
        The parameters and buffers; an entry of history for each epoch, with "epoch",
        "train_loss", "dur" (seconds) and whatever callbacks recorded.

    Raises
    ------
    ValueError
        If the device cannot be used, the weights did not stay finite, or `skorch_params` holds
        what is not theirs to set.
    TypeError
        If the callbacks in `skorch_params` are not a list.
    """
    given = options.skorch_params or {}
    refused = sorted(name for name in given if name.split("__")[0] in _OURS)
    if refused:
        raise ValueError(
            f"skorch_params sets {', '.join(refused)}, which the estimator sets itself. Use its "
            "own parameters; skorch_params is for callbacks, optimizer, train_split and the like."
        )
    device = resolve_device(options.device)
    past = [] if start is None else start.history
    seed = options.seed + len(past)  # not the same batches again
    generator = torch.Generator(device).manual_seed(seed)
    batches = {"rows": rows, "sample_weight": _optional_tensor(sample_weight, device)}
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
    if "optimizer" in given:
        del settings["optimizer__fused"]  # another class may not know it
    settings |= given | {
        f"iterator_{part}__{name}": value
        for part in ("train", "valid")
        for name, value in batches.items()
    }
    settings["iterator_train__seed"] = seed
    # The validation loss is recorded before callbacks of the user that watch it, and training is
    # stopped after them, so that they see its last epoch.
    before: list[tuple[str, Callback]] = []
    after: list[tuple[str, Callback]] = []
    if len(rows[0].valid):
        best = BestOfEach(options.n_iter_no_change)
        before.append(("sklembed_best", best))
        after.append(("sklembed_stop", _StopAfter(best)))
    if on_epoch is not None:
        after.append(("sklembed_epoch", _AfterEpoch(on_epoch, past)))
    callbacks = settings.get("callbacks")
    if callbacks != "disable":
        settings["callbacks"] = [*before, *_as_list(callbacks), *after]
    net = NeuralNet(make_module(generator), Criterion(loss), **settings).initialize()
    if (
        callbacks == "disable"
    ):  # those of skorch and of the user; training itself needs ours
        net.callbacks_ = [*before, *after]
    if start is not None:
        _restore(net, start)
    try:
        net.partial_fit(to_tensor(X, device), to_tensor(y, device))
    except (KeyError, ValueError, SkorchException) as error:
        if "valid_loss" in str(error):
            error.add_note(
                "The callback watches the loss on a validation set, and there is none. Set "
                "early_stopping=True, or give skorch_params a train_split."
            )
        raise
    weights = _weights(net)
    if not all(np.isfinite(value).all() for value in weights.values()):
        raise ValueError(
            f"Training diverged: the weights are not finite after {len(net.history)} epochs at "
            f"lr={options.lr}. Lower lr, or scale the input."
        )
    state = _optimizer_state(net) if options.keep_optimizer else {}
    return Trained(weights, _history(net, past), state)


class Criterion(nn.Module):
    """A loss function in the form that skorch asks for; the networks' losses are summed."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the loss to one batch."""
        return self.each(output, target).sum()

    def each(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of each network."""
        y, weight = target
        return self.loss(output, y, weight if weight.numel() else None)


class Batches:
    """Batches cut by index from tensors that lie on the device, in a new order every epoch.

    A DataLoader would fetch row by row, which on small networks costs more than the training. The
    order is drawn on the CPU, so that it is the same on every device. Networks with fewer rows
    than others get smaller batches; what a batch lacks is filled with rows of weight 0.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rows: Sequence[Rows],
        sample_weight: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        subset = getattr(
            dataset, "indices", None
        )  # skorch's train_split hands on a Subset
        dataset = getattr(dataset, "dataset", dataset)
        self.X, self.y = dataset.X, dataset.y
        self.rows = [torch.from_numpy(part.train) for part in rows]
        self.odds = [
            part.odds if part.odds is None else torch.tensor(part.odds) for part in rows
        ]
        if subset is not None:
            chosen = torch.as_tensor(np.asarray(subset))
            kept = [torch.isin(part, chosen) for part in self.rows]
            self.rows = [part[keep] for part, keep in zip(self.rows, kept, strict=True)]
            self.odds = [
                odds if odds is None else odds[keep]
                for odds, keep in zip(self.odds, kept, strict=True)
            ]
        self.sample_weight = sample_weight
        self.n_batches = max(-(-len(part) // batch_size) for part in self.rows)
        self.generators = [
            None if seed is None else torch.Generator().manual_seed(seed) for _ in rows
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        device = self.X.device
        parts = [torch.tensor_split(order, self.n_batches) for order in self._orders()]
        for group in zip(*parts, strict=True):
            padded = len({len(part) for part in group}) > 1
            if padded:
                filled = nn.utils.rnn.pad_sequence(
                    list(group), batch_first=True, padding_value=-1
                )
            else:
                filled = torch.stack(group)
            index = filled.clamp(min=0).to(device) if padded else filled.to(device)
            yield (
                _take(self.X, index),  # (n_networks, batch, ...)
                (
                    _take(self.y, index),
                    self._weight(filled >= 0 if padded else None, index),
                ),
            )

    def _orders(self) -> list[Tensor]:
        """Draw the order of each network's rows."""
        orders = []
        for rows, odds, generator in zip(
            self.rows, self.odds, self.generators, strict=True
        ):
            if generator is None:
                orders.append(rows)
            elif odds is None:
                orders.append(rows[torch.randperm(len(rows), generator=generator)])
            else:
                drawn = torch.multinomial(
                    odds, len(rows), replacement=True, generator=generator
                )
                orders.append(rows[drawn])
        return orders

    def _weight(self, there: Tensor | None, index: Tensor) -> Tensor:
        """Return the weights of a batch; an empty tensor if all are 1, as skorch takes no None."""
        weight = torch.empty(0, device=index.device)
        if self.sample_weight is not None:
            weight = _take(self.sample_weight, index)
        if there is not None:
            present = there.to(index.device, torch.float32)
            weight = present if self.sample_weight is None else weight * present
        return weight


class BestOfEach(Callback):  # type: ignore[misc]
    """Record the mean validation loss of the networks, and give each its best weights.

    `finished` is whether no network's loss has improved for `patience` epochs.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, net: NeuralNet, **_: Any) -> None:
        """Start with nothing seen."""
        self.best: np.ndarray | None = None
        self.finished = False

    def on_epoch_end(self, net: NeuralNet, dataset_train: Any = None, **_: Any) -> None:
        """Judge the epoch."""
        losses = self._validate(net, dataset_train)
        net.history.record("valid_loss", float(losses.mean()))
        state = _module(net).state_dict()
        if self.best is None:
            self.best, self.epochs = (
                np.full(len(losses), np.inf),
                np.zeros(len(losses), dtype=int),
            )
            self.state = {name: value.clone() for name, value in state.items()}
        going = self.epochs < self.patience
        better = going & (losses < self.best)
        self.epochs = np.where(better, 0, self.epochs + 1)
        self.best = np.where(better, losses, self.best)
        if len(losses) == 1 and better[0]:  # its state needs no axis of networks
            self.state = {name: value.clone() for name, value in state.items()}
        elif len(losses) > 1:
            for network in np.flatnonzero(better):
                for name, value in state.items():
                    if len(value) == len(
                        losses
                    ):  # of each; what all share does not change
                        self.state[name][network] = value[network]
        net.history.record("valid_loss_best", bool(better.any()))
        self.finished = bool((self.epochs >= self.patience).all())

    def on_train_end(self, net: NeuralNet, **_: Any) -> None:
        """Go back to the best weights."""
        if self.best is not None:
            _module(net).load_state_dict(self.state)

    @staticmethod
    @torch.inference_mode()
    def _validate(net: NeuralNet, dataset: Any) -> np.ndarray:
        """Return the mean loss of each network on its validation rows."""
        rows = [Rows(part.valid) for part in net.iterator_train__rows]
        weight = net.iterator_train__sample_weight
        batches = Batches(dataset, net.batch_size, rows=rows, sample_weight=weight)
        net.module_.eval()
        losses = [net.criterion_.each(net.module_(X), target) for X, target in batches]
        return np.asarray(torch.stack(losses).mean(dim=0).double().cpu())


class _StopAfter(Callback):  # type: ignore[misc]
    """Stop training once the networks no longer improve."""

    def __init__(self, best: BestOfEach) -> None:
        self.best = best

    def on_epoch_end(self, net: NeuralNet, **_: Any) -> None:
        """Stop if no network improves."""
        if self.best.finished:
            raise KeyboardInterrupt  # how skorch's own early stopping ends training


class _AfterEpoch(Callback):  # type: ignore[misc]
    """Hand each epoch to whoever watches."""

    def __init__(
        self, watch: Callable[[History, Callable[[], Arrays]], bool], past: History
    ) -> None:
        self.watch = watch
        self.past = past

    def on_epoch_end(self, net: NeuralNet, **_: Any) -> None:
        """Tell, and stop if told so."""
        if self.watch(_history(net, self.past), lambda: _weights(net)):
            raise KeyboardInterrupt


def _as_list(callbacks: Any) -> list[Any]:
    """Return the callbacks of the user as a list."""
    if callbacks is None:
        return []
    if not isinstance(callbacks, list | tuple):
        raise TypeError(
            f"skorch_params['callbacks'] is {callbacks!r}; skorch takes a list of callbacks, or of "
            "pairs of a name and a callback, or 'disable'. Put a single callback into a list."
        )
    return list(callbacks)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Return rows, as `tensor[index]` does."""
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])


def _optional_tensor(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else to_tensor(array.astype(np.float32), device)


def _module(net: NeuralNet) -> nn.Module:
    """Return the module itself, whose weights have other names within a compiled one."""
    module: nn.Module = getattr(net.module_, "_orig_mod", net.module_)
    return module


def _weights(net: NeuralNet) -> Arrays:
    """Copy the module's parameters and buffers out."""
    return {
        name: to_numpy(value).copy()
        for name, value in _module(net).state_dict().items()
    }


def _optimizer_state(net: NeuralNet) -> Arrays:
    """Copy the optimiser's tensors out, by the number of the parameter and their name."""
    return {
        f"{number}.{name}": to_numpy(value).copy()
        for number, values in net.optimizer_.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _restore(net: NeuralNet, start: Trained) -> None:
    """Put weights, and the optimiser's state if there is one, where they were."""
    _module(net).load_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in start.weights.items()}
    )
    if start.optimizer_state:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in start.optimizer_state.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = torch.from_numpy(value.copy())
        whole = copy.copy(net.optimizer_.state_dict())
        net.optimizer_.load_state_dict(whole | {"state": state})


def _history(net: NeuralNet, past: History) -> History:
    """Return the epochs so far, numbered on, without their batches, which are bulky."""
    return past + [
        {key: value for key, value in epoch.items() if isinstance(value, int | float)}
        | {"epoch": number}
        for number, epoch in enumerate(net.history, start=len(past) + 1)
    ]
