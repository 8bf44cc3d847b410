"""The decoder that makes masks of frozen patches; every picture is decoded by itself."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sklembed.nn.layers import SeededDropout

_MOST_GROUPS, _LEAST_OF_GROUP = 8, 4  # of a group normalisation, and channels of each


class PatchDecoder(nn.Module):
    """Upsample patches step by step (SETR, arXiv 2012.15840); finer maps join on the way (U-Net).

    Pictures come packed: the patches of one map after another, the coarsest map first. Each hidden
    layer is a 3 x 3 convolution, group normalisation and ReLU. The first works on the coarsest map;
    each of the others doubles the grid, or brings it to that of the next finer map, which is
    projected to its width and joined. Without hidden layers, all maps are brought to the finest
    grid and a linear map follows.

    Parameters
    ----------
    grids : sequence of (int, int)
        Rows and columns of each map's patches.
    widths : sequence of int
        Width of each map's patches.
    hidden_layer_sizes : sequence of int
        Channels of the hidden layers, at least as many as maps, or none.
    n_classes : int
        Channels of the output.
    dropout : float
        Probability of zeroing a number of a patch in training.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the module's device.
    """

    def __init__(
        self,
        grids: Sequence[tuple[int, int]],
        widths: Sequence[int],
        hidden_layer_sizes: Sequence[int],
        n_classes: int,
        *,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.grids, self.widths = list(grids), list(widths)
        self.generator = generator
        self.dropout = SeededDropout(dropout, generator)
        for i, width in enumerate(self.widths):
            self.register_buffer(f"mean_{i}", torch.empty(width))
            self.register_buffer(f"scale_{i}", torch.empty(width))
        own = list(hidden_layer_sizes[: len(self.widths)])
        self.projections = nn.ModuleList(
            nn.Conv2d(width, size, 1)
            for width, size in zip(self.widths, own, strict=False)
        )
        joined = [
            n_in + n_own
            for n_in, n_own in zip([0, *hidden_layer_sizes], own, strict=False)
        ]
        joined += hidden_layer_sizes[len(own) - 1 : -1] if own else []
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, padding=1),
                nn.GroupNorm(_n_groups(n_out), n_out),
                nn.ReLU(),
            )
            for n_in, n_out in zip(joined, hidden_layer_sizes, strict=True)
        )
        n_last = hidden_layer_sizes[-1] if hidden_layer_sizes else sum(self.widths)
        self.output = nn.Conv2d(n_last, n_classes, 1)

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights as torch's layers do, from the generator; set mean and scale."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                bound = 1.0 / math.sqrt(module.weight[0].numel())
                for drawn in (module.weight, module.bias):
                    nn.init.uniform_(drawn, -bound, bound, generator=self.generator)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for i, (mean, scale) in enumerate(moments):
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"scale_{i}").copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map packed pictures (1, batch, n_packed) to logits (1, batch, n_classes, rows, columns).

        The grid is the last layer's; `resized` brings logits to the size of masks.
        """
        maps = self.unpack(x.squeeze(0))
        if not len(self.layers):
            finest = self.grids[-1]
            logits: Tensor = self.output(
                torch.cat([resized(m, finest) for m in maps], dim=1)
            )
            return logits[None]
        maps = [
            project(part) for project, part in zip(self.projections, maps, strict=True)
        ]
        z = self.layers[0](maps[0])  # (batch, channels, rows, columns)
        for i, layer in enumerate(self.layers[1:], start=1):
            if i < len(maps):
                z = torch.cat([resized(z, self.grids[i]), maps[i]], dim=1)
            else:
                z = resized(z, (2 * z.shape[2], 2 * z.shape[3]))
            z = layer(z)
        logits = self.output(z)
        return logits[None]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split packed pictures into standardised maps (batch, width, rows, columns)."""
        sizes = [
            math.prod(grid) * width
            for grid, width in zip(self.grids, self.widths, strict=True)
        ]
        maps = []
        for i, part in enumerate(torch.split(x, sizes, dim=1)):
            part = part.reshape(len(x), *self.grids[i], self.widths[i])
            part = (part - getattr(self, f"mean_{i}")) / getattr(self, f"scale_{i}")
            maps.append(self.dropout(part).permute(0, 3, 1, 2))
        return maps


def _n_groups(n_channels: int) -> int:
    """Return how many groups channels are normalised in; a channel alone would lose its mean."""
    n = math.gcd(_MOST_GROUPS, n_channels)
    while n > 1 and n_channels // n < _LEAST_OF_GROUP:
        n //= 2
    return n


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps (batch, channels, rows, columns) to another size, bilinearly."""
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
