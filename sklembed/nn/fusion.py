"""The network of the fusion estimators."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklembed.nn.layers import BatchNorm, SeededDropout, StackedLinear


class FusionBlock(nn.Module):
    """Linear layer, ReLU, dropout and batch normalisation, in the order of arXiv 2406.02601."""

    def __init__(
        self, n_in: int, n_out: int, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear = StackedLinear(n_in, n_out, n_networks=1, generator=generator)
        self.dropout = SeededDropout(dropout, generator)
        self.norm = BatchNorm(n_out, generator.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, n_in) to (rows, n_out)."""
        out: Tensor = self.norm(self.dropout(torch.relu(self.linear(x))))
        return out


def make_chain(
    sizes: Sequence[int], dropout: float, generator: torch.Generator
) -> nn.Sequential:
    """Make blocks that follow one another; without any, the identity."""
    return nn.Sequential(
        *(
            FusionBlock(n_in, n_out, dropout, generator)
            for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
    )


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
    factor: Tensor
    offset: Tensor

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
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        self.columns = [
            slice(end - width, end) for end, width in zip(ends, widths, strict=True)
        ]
        self.fusion = fusion
        self.modality_dropout = modality_dropout
        self.generator = generator
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", 1.0 / scale, persistent=False)
        self.register_buffer("offset", -mean / scale, persistent=False)
        inputs = [sum(widths)] if fusion == "early" else widths
        self.chains = nn.ModuleList(
            make_chain([n_in, *hidden], dropout, generator) for n_in in inputs
        )
        n_joined = len(inputs) * hidden[-1] if hidden else sum(widths)
        self.output = StackedLinear(
            n_joined, n_outputs, n_networks=1, generator=generator
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, batch, n_features), NaN where a modality is missing, to (1, batch, n_outputs)."""
        x = x.squeeze(0)
        there = ~torch.stack([x[:, part.start] for part in self.columns], dim=1).isnan()
        there = self._shown(there)  # (batch, n_modalities)
        joined = (
            self._early(x, there) if self.fusion == "early" else self._late(x, there)
        )
        logits: Tensor = self.output(joined)
        return logits.unsqueeze(0)

    def _early(self, x: Tensor, there: Tensor) -> Tensor:
        """Run the one chain, with zero for what is not there."""
        x = torch.addcmul(self.offset, x, self.factor)
        for i, part in enumerate(self.columns):
            x[:, part].index_fill_(0, (~there[:, i]).nonzero().squeeze(1), 0.0)
        out: Tensor = self.chains[0](x)
        return out

    def _late(self, x: Tensor, there: Tensor) -> Tensor:
        """Run each modality's chain on the rows that have it, and write zero for the others."""
        outputs = []
        for i, part in enumerate(self.columns):
            rows = there[:, i].nonzero().squeeze(1)
            own = torch.addcmul(self.offset[part], x[:, part][rows], self.factor[part])
            hidden = self.chains[i](own)
            outputs.append(
                hidden.new_zeros(len(x), hidden.shape[1]).index_copy(0, rows, hidden)
            )
        return torch.cat(outputs, dim=1)

    def _shown(self, there: Tensor) -> Tensor:
        """Hide modalities at random, in training, but never all of a row's."""
        if not self.training or self.modality_dropout == 0.0 or len(self.columns) == 1:
            return there
        luck = torch.rand(there.shape, generator=self.generator, device=there.device)
        luck = luck.masked_fill(~there, -1.0)
        luckiest = luck == luck.amax(dim=-1, keepdim=True)
        return there & ((luck >= self.modality_dropout) | luckiest)
