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


class StackedBatchNorm(nn.Module):
    """Batch normalisation of each of several networks, by the rows that have a modality alone.

    The running moments are plain averages at first, so that they are right after few batches.
    """

    running_mean: Tensor
    running_var: Tensor
    n_batches: Tensor

    def __init__(self, n_features: int, *, n_networks: int, device: torch.device) -> None:
        super().__init__()
        shape = (n_networks, n_features)
        self.weight = nn.Parameter(torch.ones(shape, device=device))
        self.bias = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("running_mean", torch.zeros(shape, device=device))
        self.register_buffer("running_var", torch.ones(shape, device=device))
        self.register_buffer("n_batches", torch.zeros(n_networks, device=device))

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Normalise (n_networks, batch, n_features); rows that are not `there` do not count."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._moments(x, there)
        scale = self.weight * torch.rsqrt(var + 1e-5)
        shift = self.bias - mean * scale
        return x * scale[:, None, :] + shift[:, None, :]

    def _moments(self, x: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the batch's mean and variance, and let the running ones follow."""
        if there is None:
            n_rows = torch.full((len(x), 1), float(x.shape[1]), device=x.device)
            var, mean = torch.var_mean(x, dim=1, correction=0)
        else:
            counts = there.to(x.dtype)
            n_rows = counts.sum(dim=1, keepdim=True)
            share = (counts / n_rows.clamp(min=1.0))[:, None, :]  # (n_networks, 1, batch)
            mean = (share @ x).squeeze(1)
            var = (share @ (x - mean[:, None, :]).square()).squeeze(1)
        with torch.no_grad():
            seen = (n_rows > 1).to(x.dtype)
            self.n_batches += seen.squeeze(1)
            momentum = seen * (1.0 / self.n_batches.clamp(min=1.0)).clamp(min=0.1)[:, None]
            unbiased = var * (n_rows / (n_rows - 1.0).clamp(min=1.0))
            self.running_mean += momentum * (mean - self.running_mean)
            self.running_var += momentum * (unbiased - self.running_var)
        return mean, var


class FusionBlock(nn.Module):
    """Linear layer, ReLU, dropout and batch normalisation, in the order of arXiv 2406.02601."""

    def __init__(self, n_in: int, n_out: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = StackedLinear(n_in, n_out, n_networks=1, generator=generator)
        self.dropout = SeededDropout(dropout, generator)
        self.norm = StackedBatchNorm(n_out, n_networks=1, device=generator.device)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Map (1, batch, n_in) to (1, batch, n_out); moments are those of rows that are `there`."""
        out: Tensor = self.norm(self.dropout(torch.relu(self.linear(x))), there)
        return out


class FusionChain(nn.ModuleList):
    """Blocks one after the other; without any, the identity."""

    def __init__(self, sizes: Sequence[int], dropout: float, generator: torch.Generator) -> None:
        super().__init__(
            FusionBlock(n_in, n_out, dropout, generator)
            for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Apply each block."""
        for block in self:
            x = block(x, there)
        return x


class FusionHead(nn.Module):
    """A classifier of several modalities, joined before the hidden layers or after them.

    "early" has one chain of blocks on the concatenation, "late" one for each modality; a linear
    layer decides. What a row lacks is zero, its mean, in early fusion, and adds nothing in late
    fusion.

    Parameters
    ----------
    widths : sequence of int
        Columns of each modality, which stand side by side.
    hidden : sequence of int
        Units of each block of a chain.
    n_outputs : int
        Number of logits.
    fusion : {"early", "late"}
        Where modalities are joined.
    dropout : float
        Probability of zeroing a hidden unit in training.
    modality_dropout : float
        Probability of hiding a modality of a row in training; one always remains.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the module's device.
    mean, scale : Tensor of shape (sum(widths),)
        What inputs are standardised with.
    """

    mean: Tensor
    scale: Tensor
    modality: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        hidden: Sequence[int],
        n_outputs: int,
        *,
        fusion: str,
        dropout: float,
        modality_dropout: float,
        generator: torch.Generator,
        mean: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__()
        device = generator.device
        self.widths = list(widths)
        self.fusion = fusion
        self.modality_dropout = modality_dropout
        self.generator = generator
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        numbers = torch.arange(len(widths), device=device)
        sizes = torch.tensor(self.widths, device=device)
        self.register_buffer("modality", numbers.repeat_interleave(sizes), persistent=False)
        inputs = [sum(widths)] if fusion == "early" else self.widths
        self.chains = nn.ModuleList(
            FusionChain([n_in, *hidden], dropout, generator) for n_in in inputs
        )
        n_joined = len(inputs) * hidden[-1] if hidden else sum(widths)
        self.output = StackedLinear(n_joined, n_outputs, n_networks=1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, batch, n_features), NaN where a modality is missing, to (1, batch, n_outputs)."""
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        there = self._shown(~x[..., starts].isnan())  # (1, batch, n_modalities)
        x = ((x - self.mean).div_(self.scale)).masked_fill_(~there[..., self.modality], 0.0)
        if self.fusion == "early":
            joined = self.chains[0](x)
        else:
            columns = torch.split(x, self.widths, dim=-1)
            parts = [
                chain(part, there[..., i]) * there[..., i, None]
                for i, (chain, part) in enumerate(zip(self.chains, columns, strict=True))
            ]
            joined = torch.cat(parts, dim=-1)
        logits: Tensor = self.output(joined)
        return logits

    def _shown(self, there: Tensor) -> Tensor:
        """Hide modalities at random, in training, but never all of a row's."""
        if not self.training or self.modality_dropout == 0.0 or len(self.widths) == 1:
            return there
        luck = torch.rand(there.shape, generator=self.generator, device=there.device)
        luck = luck.masked_fill(~there, -1.0)
        luckiest = luck == luck.amax(dim=-1, keepdim=True)
        return there & ((luck >= self.modality_dropout) | luckiest)
