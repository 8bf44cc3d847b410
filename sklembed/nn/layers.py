"""Layers that draw their weights and their dropout from a given random generator."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Applied(nn.Module):
    """A function of a network and its inputs, as one network that can be exported.

    Parameters
    ----------
    function : callable
        Takes the network and its input tensors, and returns one or several tensors.
    network : torch.nn.Module
        The network.
    """

    def __init__(
        self, function: Callable[..., Tensor | Iterable[Tensor]], network: nn.Module
    ) -> None:
        super().__init__()
        self.function = function
        self.network = network
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the function as a tuple."""
        outputs = self.function(self.network, *inputs)
        if isinstance(outputs, Tensor):
            return (outputs,)
        return tuple(outputs)


class SeededDropout(nn.Module):
    """Dropout with its own generator, so that threads do not share random state."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Zero each entry with probability p and scale the rest; identity in evaluation."""
        if not self.training or self.p == 0.0:
            return x
        # The mask has the dtype of x, because products of bool and float are slower.
        mask = torch.rand(x.shape, generator=self.generator, device=x.device).ge_(
            self.p
        )
        return x * mask.div_(1.0 - self.p)


class SeededLinear(nn.Module):
    """A linear layer, or a stack of linear layers that are applied in one batched product.

    Parameters
    ----------
    n_in, n_out : int
        Widths of input and output.
    n_networks : int or None
        Number of stacked layers. All start from the same weights. None is a single layer, whose
        weights have no leading axis.
    generator : torch.Generator
        Source of the weights, which are drawn as by `torch.nn.Linear`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        n_networks: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(n_in)
        weight = torch.empty(n_out, n_in, device=generator.device)
        bias = torch.empty(n_out, device=generator.device)
        for parameter in (weight, bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        if n_networks is not None:
            weight = weight.repeat(n_networks, 1, 1)
            bias = bias.repeat(n_networks, 1)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., batch, n_in) to (..., batch, n_out)."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        # The weights come first, so that their gradient has their layout and is not copied.
        rows = x.transpose(1, 2)
        return torch.baddbmm(self.bias[:, :, None], self.weight, rows).transpose(1, 2)


class BatchNorm(nn.Module):
    """Batch normalisation whose running moments start as plain averages.

    The running moments are therefore accurate after few batches. A batch of one row is normalised
    by the running moments.
    """

    running_mean: Tensor
    running_var: Tensor
    n_batches: Tensor

    def __init__(self, n_features: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_features, device=device))
        self.bias = nn.Parameter(torch.zeros(n_features, device=device))
        self.register_buffer("running_mean", torch.zeros(n_features, device=device))
        self.register_buffer("running_var", torch.ones(n_features, device=device))
        self.register_buffer("n_batches", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (batch, n_features)."""
        momentum = 0.0
        update = self.training and len(x) > 1
        if update:
            self.n_batches.add_(1)
            momentum = max(0.1, 1.0 / float(self.n_batches))
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            update,
            momentum,
        )
