"""The network of ContrastiveProjector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklembed.nn.layers import SeededDropout, StackedLinear


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
