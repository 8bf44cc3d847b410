"""The one door to skorch: a module, a loss and arrays go in; weights and history come out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from torch import Tensor, nn

from sklembed._torch import resolve_device, to_numpy, to_tensor

Weights = dict[str, np.ndarray]
History = list[dict[str, float]]


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained; the names are those of the estimators' parameters."""

    max_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    device: str
    seed: int
    verbose: int = 0
    skorch_params: dict[str, Any] | None = None


def train(
    make_module: Callable[[torch.Generator], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    X: np.ndarray,
    y: np.ndarray,
    options: TrainingOptions,
) -> tuple[Weights, History]:
    """Train a network with AdamW on in-memory arrays and return what it learnt.

    The global random state of torch and numpy is neither read nor changed: weights, dropout and
    the order of rows come from generators of the call's own, so that equal seeds give equal
    networks in any thread.

    Parameters
    ----------
    make_module : callable
        Builds the network on the device of the generator it is given, drawing from that generator.
    loss : callable
        Maps the network's output on a batch, and the batch's targets, to a scalar.
    X : ndarray of shape (n_samples, ...)
        Inputs.
    y : ndarray of shape (n_samples, ...)
        Targets.
    options : TrainingOptions
        Optimiser, batches, device, seed; `skorch_params` override anything the net is built with.

    Returns
    -------
    weights : dict of str to ndarray
        The module's parameters and buffers.
    history : list of dict
        One entry an epoch: "epoch", "train_loss", "dur" (seconds) and whatever callbacks recorded.

    Raises
    ------
    ValueError
        If the device cannot be used, or the weights did not stay finite.
    """
    device = resolve_device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    settings: dict[str, Any] = {
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": options.weight_decay,
        "optimizer__fused": True,
        "lr": options.lr,
        "max_epochs": options.max_epochs,
        "batch_size": options.batch_size,
        "iterator_train": ShuffledBatches,
        "iterator_train__seed": options.seed,
        "train_split": None,
        "verbose": options.verbose,
        "device": device,
    }
    given = options.skorch_params or {}
    for part, own in (
        ("optimizer", "optimizer__fused"),
        ("iterator_train", "iterator_train__seed"),
    ):
        if part in given:
            del settings[own]  # another class may not know it
    net = NeuralNet(make_module(generator), Criterion(loss), **(settings | given))
    net.fit(to_tensor(X, device), to_tensor(y, device))
    weights = {name: to_numpy(value) for name, value in net.module_.state_dict().items()}
    if not all(np.isfinite(value).all() for value in weights.values()):
        raise ValueError(
            f"Training diverged: the weights are not finite after {len(net.history)} epochs at "
            f"lr={options.lr}. Lower lr, or scale the input."
        )
    return weights, [_scalars(epoch) for epoch in net.history]


class Criterion(nn.Module):
    """A loss function in the form that skorch asks for."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Apply the loss to one batch."""
        return self.loss(output, target)


class ShuffledBatches:
    """Batches cut by index from tensors that lie on the device, in a new order every epoch.

    A DataLoader would fetch row by row, which on small networks costs more than the training. The
    order is drawn on the CPU, so that it is the same on every device.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int = 0) -> None:
        rows = getattr(dataset, "indices", slice(None))  # skorch's train_split hands on a Subset
        dataset = getattr(dataset, "dataset", dataset)
        self.X, self.y = dataset.X[rows], dataset.y[rows]
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.X), generator=self.generator).to(self.X.device)
        for rows in torch.split(order, self.batch_size):
            yield self.X[rows], self.y[rows]


def _scalars(epoch: dict[str, Any]) -> dict[str, float]:
    """Keep an epoch's numbers; its list of batches is bulky and says nothing more."""
    return {key: value for key, value in epoch.items() if isinstance(value, int | float)}
