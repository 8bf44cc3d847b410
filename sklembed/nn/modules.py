"""Small trainable networks, initialised and dropped out by their own random generator."""

import math
from collections.abc import Sequence

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
        kept = torch.rand(x.shape, generator=self.generator, device=x.device).ge_(self.p)
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


class Projection(nn.Module):
    """Networks of one shape, each of linear layers with ReLU and dropout between them.

    Parameters
    ----------
    sizes : sequence of int
        Input width, hidden widths, output width.
    n_networks : int
        How many; each sees rows of its own.
    dropout : float
        Probability of zeroing a hidden unit in training.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the module's device.
    mean, scale : Tensor of shape (sizes[0],)
        What inputs are standardised with.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        n_networks: int = 1,
        dropout: float,
        generator: torch.Generator,
        mean: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = nn.ModuleList(
            StackedLinear(n_in, n_out, n_networks=n_networks, generator=generator)
            for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
        self.dropout = SeededDropout(dropout, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_networks, batch, n_features) to (n_networks, batch, n_components)."""
        x = (x - self.mean).div_(self.scale)
        for layer in self.layers[:-1]:
            x = self.dropout(torch.relu(layer(x)))  # (n_networks, batch, hidden)
        out: Tensor = self.layers[-1](x)
        return out
