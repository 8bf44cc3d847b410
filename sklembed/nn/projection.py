"""The network of ContrastiveProjector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklembed.nn.layers import SeededDropout, SeededLinear


class Projection(nn.Module):
    """A multi-layer perceptron with ReLU and dropout, or a stack of several.

    Parameters
    ----------
    sizes : sequence of int
        Input width, hidden widths, output width.
    n_networks : int or None
        Number of stacked networks, each with its own rows; None is a single network.
    dropout : float
        Dropout probability of hidden units during training.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the device of the module.
    mean, scale : Tensor of shape (sizes[0],)
        Mean and scale by which inputs are standardised.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        n_networks: int | None = None,
        dropout: float,
        generator: torch.Generator,
        mean: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = nn.ModuleList()
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layer = SeededLinear(
                n_in, n_out, n_networks=n_networks, generator=generator
            )
            self.layers.append(layer)
        self.dropout = SeededDropout(dropout, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., batch, n_features) to (..., batch, n_components)."""
        x = (x - self.mean).div_(self.scale)
        for layer in self.layers[:-1]:
            x = self.dropout(torch.relu(layer(x)))  # (..., batch, hidden)
        out: Tensor = self.layers[-1](x)
        return out
