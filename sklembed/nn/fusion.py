"""The network of FusionClassifier and FusionRegressor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sklembed.nn.layers import BatchNorm, SeededDropout, SeededLinear


class FusionBlock(nn.Module):
    """Linear layer, ReLU, dropout and batch normalisation, in the order of arXiv 2406.02601."""

    def __init__(
        self, n_in: int, n_out: int, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear = SeededLinear(n_in, n_out, generator=generator)
        self.dropout = SeededDropout(dropout, generator)
        self.norm = BatchNorm(n_out, generator.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, n_in) to (batch, n_out)."""
        out: Tensor = self.norm(self.dropout(torch.relu(self.linear(x))))
        return out


class FusionHead(nn.Module):
    """A network on several modalities that joins them before or after the hidden layers.

    Early fusion has one chain of blocks on the concatenation; a missing modality is replaced by
    its mean, which is zero after standardisation. Late fusion has a chain for each modality; a
    missing modality contributes zero. A linear layer maps the result to the outputs.

    Parameters
    ----------
    widths : sequence of int
        Number of columns of each modality, in the order of the columns.
    hidden_layer_sizes : sequence of int
        Units of the blocks of a chain.
    n_outputs : int
        Number of outputs.
    join : {"early", "late"}
        Whether modalities are joined before or after the hidden layers.
    dropout : float
        Dropout probability of hidden units during training.
    modality_dropout : float
        Probability of hiding a modality of a row during training; each row keeps at least one.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the device of the module.
    mean, scale : Tensor of shape (sum(widths),)
        Mean and scale by which inputs are standardised.
    """

    mean: Tensor
    scale: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        hidden_layer_sizes: Sequence[int],
        n_outputs: int,
        join: str,
        *,
        dropout: float,
        modality_dropout: float,
        generator: torch.Generator,
        mean: Tensor,
        scale: Tensor,
    ) -> None:
        super().__init__()
        self.columns = []
        for i, width in enumerate(widths):
            start = sum(widths[:i])
            self.columns.append(slice(start, start + width))
        self.join = join
        self.modality_dropout = modality_dropout
        self.generator = generator
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", 1.0 / scale, persistent=False)
        self.register_buffer("offset", -mean / scale, persistent=False)
        inputs = [sum(widths)] if join == "early" else widths
        self.chains = nn.ModuleList()
        for n_in in inputs:
            sizes = [n_in, *hidden_layer_sizes]
            chain = nn.Sequential()
            for n_before, n_after in zip(sizes, sizes[1:], strict=False):
                chain.append(FusionBlock(n_before, n_after, dropout, generator))
            self.chains.append(chain)
        n_joined = sum(widths)
        if hidden_layer_sizes:
            n_joined = len(inputs) * hidden_layer_sizes[-1]
        self.output = SeededLinear(n_joined, n_outputs, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, n_features), NaN where missing, to (batch, n_outputs)."""
        first_columns = [columns.start for columns in self.columns]
        observed = ~x[:, first_columns].isnan()  # (batch, n_modalities)
        observed = self._drop_modalities(observed)
        fuse = self._early if self.join == "early" else self._late
        out: Tensor = self.output(fuse(x, observed))
        return out

    def _early(self, x: Tensor, observed: Tensor) -> Tensor:
        """Run the chain on the concatenation, with zeros for missing modalities."""
        x = torch.addcmul(self.offset, x, self.factor)
        for i, columns in enumerate(self.columns):
            missing_rows = (~observed[:, i]).nonzero().squeeze(1)
            x[:, columns].index_fill_(0, missing_rows, 0.0)
        out: Tensor = self.chains[0](x)
        return out

    def _late(self, x: Tensor, observed: Tensor) -> Tensor:
        """Run the chain of each modality on its rows, and concatenate; missing rows are zero."""
        outputs = []
        for i, columns in enumerate(self.columns):
            rows = observed[:, i].nonzero().squeeze(1)
            part = torch.addcmul(
                self.offset[columns], x[:, columns][rows], self.factor[columns]
            )
            hidden = self.chains[i](part)
            padded = hidden.new_zeros(len(x), hidden.shape[1])
            outputs.append(padded.index_copy(0, rows, hidden))
        return torch.cat(outputs, dim=1)

    def _drop_modalities(self, observed: Tensor) -> Tensor:
        """Hide modalities at random during training; each row keeps at least one."""
        if not self.training or self.modality_dropout == 0.0 or len(self.columns) == 1:
            return observed
        draws = torch.rand(
            observed.shape, generator=self.generator, device=observed.device
        )
        draws = draws.masked_fill(~observed, -1.0)
        largest = draws == draws.amax(dim=-1, keepdim=True)
        return observed & ((draws >= self.modality_dropout) | largest)
