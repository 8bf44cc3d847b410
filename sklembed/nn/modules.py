"""Small trainable networks, initialised and dropped out by their own random generator."""

import math
from collections.abc import Sequence

import torch
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
        # Uniform numbers are drawn faster than bernoulli_ draws with a generator of one's own.
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.p
        return x * kept * (1.0 / (1.0 - self.p))


class Projection(nn.Module):
    """Linear layers with ReLU and dropout between them, on inputs standardised by buffers.

    Parameters
    ----------
    sizes : sequence of int
        Input width, hidden widths, output width.
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
        dropout: float,
        generator: torch.Generator,
        mean: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = nn.ModuleList(
            _linear(n_in, n_out, generator) for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
        self.dropout = SeededDropout(dropout, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, n_features) to (batch, n_components)."""
        x = (x - self.mean) / self.scale
        for layer in self.layers[:-1]:
            x = self.dropout(torch.relu(layer(x)))  # (batch, hidden)
        out: Tensor = self.layers[-1](x)
        return out


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with torch's default initialisation, drawn from the generator."""
    layer = nn.Linear(n_in, n_out, device="meta")
    layer.to_empty(device=generator.device)
    bound = 1.0 / math.sqrt(n_in)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
