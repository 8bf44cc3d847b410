"""Layers that draw their weights and their dropout from a given random generator."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeededDropout(nn.Module):
    """Dropout that draws from its own generator, so that threads neither share nor disturb one."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Zero each entry with probability p and scale the rest, in training only."""
        if not self.training or self.p == 0.0:
            return x
        # Numbers of x's own type throughout: products of bool and float are slower than the draw.
        kept = torch.rand(x.shape, generator=self.generator, device=x.device).ge_(
            self.p
        )
        return x * kept.div_(1.0 - self.p)


class StackedLinear(nn.Module):
    """A linear layer of each of several networks, applied at once by one batched product.

    All networks start from the same weights, drawn as `torch.nn.Linear` draws them.
    """

    def __init__(
        self, n_in: int, n_out: int, *, n_networks: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(n_in)
        weight = torch.empty(n_out, n_in, device=generator.device)
        bias = torch.empty(n_out, device=generator.device)
        for drawn in (weight, bias):
            nn.init.uniform_(drawn, -bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.repeat(n_networks, 1, 1))
        self.bias = nn.Parameter(bias.repeat(n_networks, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_networks, batch, n_in) to (n_networks, batch, n_out)."""
        if len(self.weight) == 1:  # a plain product will do
            return F.linear(x, self.weight.squeeze(0), self.bias.squeeze(0))
        return torch.baddbmm(self.bias[:, None, :], x, self.weight.transpose(1, 2))


class BatchNorm(nn.Module):
    """Batch normalisation whose running moments are plain averages at first.

    So they are right after few batches. A batch of fewer than two rows has no moments of its own
    and is normalised by the running ones. Parameters have a leading axis of one network.
    """

    running_mean: Tensor
    running_var: Tensor
    n_batches: Tensor

    def __init__(self, n_features: int, device: torch.device) -> None:
        super().__init__()
        shape = (1, n_features)
        self.weight = nn.Parameter(torch.ones(shape, device=device))
        self.bias = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("running_mean", torch.zeros(shape, device=device))
        self.register_buffer("running_var", torch.ones(shape, device=device))
        self.register_buffer("n_batches", torch.zeros(1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (rows, n_features)."""
        learns = self.training and len(x) > 1
        momentum = 0.0
        if learns:
            self.n_batches.add_(1)
            momentum = max(0.1, 1.0 / float(self.n_batches))
        moments = self.running_mean[0], self.running_var[0]
        return F.batch_norm(x, *moments, self.weight[0], self.bias[0], learns, momentum)
