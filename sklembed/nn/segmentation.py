"""The decoder of PatchSegmenter."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sklembed.nn.layers import SeededDropout

_MAX_GROUPS = 8  # of a group normalisation
_MIN_CHANNELS = 4  # of a group


class PatchDecoder(nn.Module):
    """Upsample patches step by step (SETR, arXiv 2012.15840) with skip connections (U-Net).

    The input has the patches of all maps of an image in one row, the coarsest map first. A hidden
    layer is a 3 x 3 convolution, group normalisation and ReLU. The first layer works on the
    coarsest map. Each of the others doubles the grid, or resizes it to that of the next finer
    map, which is projected and concatenated. Without hidden layers, all maps are resized to the
    finest grid and mapped linearly. Images of a batch do not influence each other.

    Parameters
    ----------
    grids : sequence of (int, int)
        Rows and columns of each map.
    widths : sequence of int
        Width of the patches of each map.
    hidden_layer_sizes : sequence of int
        Channels of the hidden layers: at least as many as maps, or none.
    n_classes : int
        Number of output channels.
    dropout : float
        Dropout probability of the entries of a patch during training.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the device of the module.
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
        self.projections = nn.ModuleList()
        self.layers = nn.ModuleList()
        for i, width in enumerate(self.widths):
            self.register_buffer(f"mean_{i}", torch.empty(width))
            self.register_buffer(f"scale_{i}", torch.empty(width))
        n_channels = 0
        for i, size in enumerate(hidden_layer_sizes):
            if i < len(self.widths):
                self.projections.append(nn.Conv2d(self.widths[i], size, 1))
                n_channels += size
            convolution = nn.Conv2d(n_channels, size, 3, padding=1)
            norm = nn.GroupNorm(_n_groups(size), size)
            self.layers.append(nn.Sequential(convolution, norm, nn.ReLU()))
            n_channels = size
        if not hidden_layer_sizes:
            n_channels = sum(self.widths)
        self.output = nn.Conv2d(n_channels, n_classes, 1)

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights from the generator, as torch's layers do; set mean and scale."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                bound = 1.0 / math.sqrt(module.weight[0].numel())
                for parameter in (module.weight, module.bias):
                    nn.init.uniform_(parameter, -bound, bound, generator=self.generator)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for i, (mean, scale) in enumerate(moments):
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"scale_{i}").copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map packed patches (batch, n_packed) to logits (batch, n_classes, rows, columns).

        The grid is that of the last layer; `resized` resizes logits to the size of masks.
        """
        maps = self.unpack(x)
        if not len(self.layers):
            finest = self.grids[-1]
            z = torch.cat([resized(part, finest) for part in maps], dim=1)
        else:
            z = self._decode(maps)
        logits: Tensor = self.output(z)
        return logits

    def _decode(self, maps: list[Tensor]) -> Tensor:
        """Run the hidden layers on maps (batch, width, rows, columns)."""
        z: Tensor = self.layers[0](self.projections[0](maps[0]))
        for i, layer in enumerate(self.layers[1:], start=1):
            if i < len(maps):
                skip = self.projections[i](maps[i])
                z = torch.cat([resized(z, self.grids[i]), skip], dim=1)
            else:
                z = resized(z, (2 * z.shape[2], 2 * z.shape[3]))
            z = layer(z)  # (batch, channels, rows, columns)
        return z

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Return standardised maps (batch, width, rows, columns) with dropout."""
        maps, start = [], 0
        for i, (grid, width) in enumerate(zip(self.grids, self.widths, strict=True)):
            stop = start + math.prod(grid) * width
            part = x[:, start:stop].reshape(len(x), *grid, width)
            part = (part - getattr(self, f"mean_{i}")) / getattr(self, f"scale_{i}")
            maps.append(self.dropout(part).permute(0, 3, 1, 2))
            start = stop
        return maps


def _n_groups(n_channels: int) -> int:
    """Return the number of groups of channels; normalising a single channel removes its mean."""
    n_groups = math.gcd(_MAX_GROUPS, n_channels)
    while n_groups > 1 and n_channels // n_groups < _MIN_CHANNELS:
        n_groups //= 2
    return n_groups


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (batch, channels, rows, columns) by bilinear interpolation."""
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
