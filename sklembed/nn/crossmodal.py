"""Networks that move several modalities into one space; every row is encoded by itself."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sklembed.nn.layers import SeededDropout

SCALES = (
    1.0,
    100.0,
)  # what the learnt factor of similarities, 1 / temperature, is kept within
_LENGTHS = 4  # groups of like length that a batch of ragged rows is encoded in
_CONTEXT_FEATURES = 3  # of a learnt context, before its network
_CONCAT_FEATURES = 10  # of one that is concatenated, after it


class Embedded(NamedTuple):
    """A batch in the shared space, and what a loss may ask of it besides.

    Attributes
    ----------
    z : Tensor of shape (batch, n_modalities, n_components)
        Vectors of unit length; zero where a row lacks the modality.
    there : Tensor of shape (batch, n_modalities), dtype bool
        Which modalities rows have.
    log_scale : Tensor of shape ()
        Logarithm of what similarities are multiplied by.
    inputs : list of Tensor of shape (batch, n_features)
        Each modality before the network, standardised; the mean of its tokens.
    """

    z: Tensor
    there: Tensor
    log_scale: Tensor
    inputs: list[Tensor]


class CrossModalNetwork(nn.Module):
    """What networks into a shared space have in common; a subclass encodes the tokens of a row.

    Rows come packed: the tokens of one modality after another, NaN where a token or a modality is
    missing. A pooled vector is one token.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number of tokens, and their width, of each modality.
    dropout : float
        Probability of zeroing a unit in training.
    input_dropout : float
        Probability of zeroing a number of the input in training.
    temperature : float
        What similarities are divided by at first.
    mixup : bool
        Whether rows are mixed with others in training (arXiv 2312.10144).
    chunk_size : int or None
        Rows whose activations are held at a time in training; None holds those of the batch.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the module's device.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        dropout: float,
        input_dropout: float,
        temperature: float,
        mixup: bool,
        chunk_size: int | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shapes = list(shapes)
        self.mixup = mixup
        self.chunk_size = chunk_size
        self.generator = generator
        self.start_scale = -math.log(temperature)
        self.dropout = SeededDropout(dropout, generator)
        self.input_dropout = SeededDropout(input_dropout, generator)
        self.log_scale = nn.Parameter(torch.empty(()))
        for i, (_, width) in enumerate(self.shapes):
            self.register_buffer(f"mean_{i}", torch.empty(width))
            self.register_buffer(f"scale_{i}", torch.empty(width))

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights as torch's layers do, from the generator; set mean and scale.

        What a layer adds to its input starts at 0, so that with few pairs the network is at first
        close to the linear map that is hard to beat there.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                for drawn in (module.weight, module.bias):
                    if drawn is not None:
                        nn.init.uniform_(drawn, -bound, bound, generator=self.generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                for last in (module.out, module.feedforward_out):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
        nn.init.constant_(self.log_scale, self.start_scale)
        for i, (mean, scale) in enumerate(moments):
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"scale_{i}").copy_(scale)

    def encode(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Map standardised tokens (batch, n_tokens, width) to (batch, n_components)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Embedded:
        """Map packed rows (1, batch, n_packed) to the shared space."""
        parts = self.unpack(x.squeeze(0))
        if self.training and self.mixup:
            parts = self._mixed(parts)
        z, inputs, has = [], [], []
        for modality, part in enumerate(parts):
            there = ~part[..., 0].isnan()  # (batch, n_tokens)
            rows = there.any(dim=1).nonzero().squeeze(1)
            tokens = self.standardized(part, modality)
            own = self.in_chunks(tokens[rows], there[rows], modality)
            z.append(own.new_zeros(len(part), own.shape[1]).index_copy(0, rows, own))
            inputs.append(masked_mean(tokens, there))
            has.append(there.any(dim=1))
        with (
            torch.no_grad()
        ):  # the number itself: a clamped one had no gradient to return by
            self.log_scale.clamp_(*map(math.log, SCALES))
        return Embedded(
            torch.stack(z, dim=1), torch.stack(has, dim=1), self.log_scale, inputs
        )

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split packed rows (batch, n_packed) into (batch, n_tokens, width) of each modality."""
        parts = torch.split(x, [n * width for n, width in self.shapes], dim=1)
        return [
            part.reshape(-1, *shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def standardized(self, part: Tensor, modality: int) -> Tensor:
        """Bring tokens to mean 0 and scale 1; what is missing becomes 0."""
        mean, scale = (
            getattr(self, f"mean_{modality}"),
            getattr(self, f"scale_{modality}"),
        )
        return torch.nan_to_num((part - mean) / scale)

    def unit(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Encode standardised tokens to unit length."""
        tokens = self.input_dropout(tokens)
        return F.normalize(self.encode(tokens, there, modality), dim=-1)

    def _mixed(self, parts: list[Tensor]) -> list[Tensor]:
        """Mix each row with another, in all its modalities by the same share, from Beta(1, 1)."""
        share = torch.rand((), generator=self.generator, device=self.generator.device)
        order = torch.randperm(
            len(parts[0]), generator=self.generator, device=self.generator.device
        )
        return [share * part + (1 - share) * part[order] for part in parts]

    def in_chunks(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Encode standardised rows to unit length, those of like length together.

        So little padding is computed. In training, if asked, only what comes out of a chunk is
        kept: its activations are computed again on the way back, with the same dropout, so that
        gradients are those of the whole batch (gradient caching, arXiv 2101.06983).
        """
        counts = there.sum(dim=1)
        ragged = bool((counts != tokens.shape[1]).any())
        order = counts.argsort(stable=True)
        size = max(len(tokens) // _LENGTHS, 1) if ragged else max(len(tokens), 1)
        caching = self.training and self.chunk_size
        if caching:
            size = min(size, caching)
        encoded = []
        for rows in torch.split(order, size):
            n_tokens = int(counts[rows].amax()) if ragged else tokens.shape[1]
            chunk = tokens[rows, :n_tokens], there[rows, :n_tokens], modality
            if caching:  # what it draws comes from the generator alone
                rerun = partial(
                    checkpoint, use_reentrant=False, preserve_rng_state=False
                )
                encoded.append(rerun(self._replayed(), *chunk))
            else:
                encoded.append(self.unit(*chunk))
        return torch.cat(encoded)[order.argsort()]

    def _replayed(self) -> Callable[..., Tensor]:
        """Return an encoding that draws, when it is run again, what it drew the first time."""
        before = self.generator.get_state()
        first = True

        def run(tokens: Tensor, there: Tensor, modality: int) -> Tensor:
            nonlocal first
            if first:
                first = False
                return self.unit(tokens, there, modality)
            now = self.generator.get_state()
            self.generator.set_state(before)
            try:
                return self.unit(tokens, there, modality)
            finally:
                self.generator.set_state(now)

        return run


class AttentionLayer(nn.Module):
    """A transformer's layer, normalised after each part; queries need not be the tokens."""

    def __init__(
        self, width: int, n_heads: int, dim_feedforward: int, dropout: nn.Module
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.feedforward_in = nn.Linear(width, dim_feedforward)
        self.feedforward_out = nn.Linear(dim_feedforward, width)
        self.norm_attention, self.norm_feedforward = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """Map x (batch, n_queries, width), which attends to the tokens that are there."""
        x = self.norm_attention(x + self.dropout(self._attend(x, tokens, there)))
        hidden = self.dropout(torch.relu(self.feedforward_in(x)))
        out: Tensor = self.norm_feedforward(
            x + self.dropout(self.feedforward_out(hidden))
        )
        return out

    def _attend(self, x: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        def heads(of: Tensor) -> Tensor:  # (batch, n_heads, n, width of a head)
            width = of.shape[-1] // self.n_heads  # said outright: a batch may be empty
            return of.view(*of.shape[:2], self.n_heads, width).transpose(1, 2)

        q, k, v = (
            heads(self.query(x)),
            heads(self.key(tokens)),
            heads(self.value(tokens)),
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        shares = scores.masked_fill(~there[:, None, None, :], -torch.inf).softmax(
            dim=-1
        )
        out: Tensor = self.out((self.dropout(shares) @ v).transpose(1, 2).flatten(-2))
        return out


class ContextFusion(nn.Module):
    """Bring a modality's context into its tokens (arXiv 2403.04650, DFE-1 to DFE-6)."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "concat":
            joined = width + _CONCAT_FEATURES
            self.join = nn.Sequential(
                nn.Linear(joined, joined), nn.ReLU(), nn.Linear(joined, width)
            )
        elif kind == "additive":
            self.of_context, self.of_tokens = (
                nn.Linear(width, width),
                nn.Linear(width, width),
            )
            self.score = nn.Linear(width, 1)
        elif kind == "general":
            self.of_tokens = nn.Linear(width, width)
        elif kind == "scaled_dot":
            self.of_context, self.of_tokens = (
                nn.Linear(width, width),
                nn.Linear(width, width),
            )
            self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, there: Tensor) -> Tensor:
        """Map x (batch, n_tokens, width), given a context (n_context,)."""
        if self.kind == "add":
            return x + context
        if self.kind == "multiply":
            return x * context
        if self.kind == "concat":
            joined: Tensor = self.join(
                torch.cat([x, context.expand(*x.shape[:2], -1)], dim=-1)
            )
            return x + joined
        values = x
        if self.kind == "additive":
            scores = self.score(
                torch.tanh(self.of_context(context) + self.of_tokens(x))
            )
            scores = scores.squeeze(-1)
        elif self.kind == "general":
            scores = self.of_tokens(x) @ context
        else:
            values = self.value(x)
            scores = (
                self.of_tokens(x) @ self.of_context(context) / math.sqrt(x.shape[-1])
            )
        shares = scores.masked_fill(~there, -torch.inf).softmax(
            dim=-1
        )  # (batch, n_tokens)
        return x + torch.einsum("bt,btw->bw", shares, values)[:, None]


class SharedFusionNetwork(CrossModalNetwork):
    """One small encoder for all modalities, told which it sees by a learnt context.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number of tokens, and their width, of each modality.
    n_components : int
        Width of the shared space.
    fusion : str
        How the context enters, by the name of its fusion.
    n_heads, dim_feedforward : int
        Of the transformer's layer.
    share_layer : bool
        Whether modalities share fusion and layer; else each has its own.
    options
        As for `CrossModalNetwork`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        n_components: int,
        *,
        fusion: str,
        n_heads: int,
        dim_feedforward: int,
        share_layer: bool,
        **options: object,
    ) -> None:
        super().__init__(shapes, **options)  # type: ignore[arg-type]
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, n_components),
                nn.GELU(),
                nn.Linear(n_components, n_components),
                self.dropout,
                nn.LayerNorm(n_components),
            )
            for _, width in self.shapes
        )
        self.contexts = nn.Parameter(torch.empty(len(self.shapes), _CONTEXT_FEATURES))
        sizes = [_CONTEXT_FEATURES, 64, 128, n_components]
        if fusion == "concat":
            sizes = [_CONTEXT_FEATURES, _CONCAT_FEATURES]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.context_network = nn.Sequential(*layers[:-1], nn.LayerNorm(sizes[-1]))
        n_layers = 1 if share_layer else len(self.shapes)
        self.fusions = nn.ModuleList(
            ContextFusion(fusion, n_components) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(n_components) for _ in range(n_layers))
        self.layers = nn.ModuleList(
            AttentionLayer(n_components, n_heads, dim_feedforward, self.dropout)
            for _ in range(n_layers)
        )

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights; contexts are N(0, sigma), sigma from U(.1, .6), as in the paper."""
        super().initialize(moments)
        with torch.no_grad():
            sigma = self.contexts.new_empty(len(self.contexts), 1)
            sigma.uniform_(0.1, 0.6, generator=self.generator)
            self.contexts.normal_(generator=self.generator).mul_(sigma)

    def embedded_contexts(self) -> Tensor:
        """Return what tokens are fused with: (n_modalities, n_context)."""
        out: Tensor = self.context_network(self.contexts)
        return out

    def encode(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to the mean of those that the layer makes of them."""
        layer = modality if len(self.layers) > 1 else 0
        context = self.context_network(self.contexts[modality])
        x = self.fusions[layer](self.projections[modality](tokens), context, there)
        normed = self.norms[layer](x)
        return masked_mean(x + self.layers[layer](normed, normed, there), there)


class AdaptorNetwork(CrossModalNetwork):
    """Attention layers that all modalities share, through which learnt queries read tokens.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number of tokens, and their width, of each modality.
    n_components : int
        Width of the shared space.
    n_layers, n_heads, dim_feedforward : int
        Of the layers.
    n_queries : int
        Learnt queries; 0 lets the tokens themselves be the queries.
    of_tokens : bool
        Whether a row is the mean of its adapted tokens, instead of what the queries have read.
    options
        As for `CrossModalNetwork`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        n_components: int,
        *,
        n_layers: int,
        n_heads: int,
        dim_feedforward: int,
        n_queries: int,
        of_tokens: bool = False,
        **options: object,
    ) -> None:
        super().__init__(shapes, **options)  # type: ignore[arg-type]
        self.of_tokens = of_tokens
        self.projections = nn.ModuleList(
            nn.Linear(width, n_components, bias=False) for _, width in self.shapes
        )
        self.queries = nn.Parameter(torch.empty(n_queries, n_components))
        self.layers = nn.ModuleList(
            AttentionLayer(n_components, n_heads, dim_feedforward, self.dropout)
            for _ in range(n_layers)
        )

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights; queries are as long as a projected token."""
        super().initialize(moments)
        with torch.no_grad():
            self.queries.normal_(generator=self.generator)
            self.queries.div_(math.sqrt(max(self.queries.shape[1], 1)))

    def encode(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to one vector of a row."""
        if self.of_tokens or not len(self.queries):
            return masked_mean(self.adapt(tokens, there, modality), there)
        return self._read(
            tokens, there, modality, asked=slice(0, len(self.queries))
        ).mean(dim=1)

    def adapt(self, tokens: Tensor, there: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to adapted ones, (batch, n_tokens, n_components)."""
        return self._read(tokens, there, modality, asked=slice(len(self.queries), None))

    def _read(
        self, tokens: Tensor, there: Tensor, modality: int, *, asked: slice
    ) -> Tensor:
        """Run queries and tokens through the layers; return those asked for."""
        n = len(self.queries)
        x = F.normalize(self.projections[modality](tokens), dim=-1)
        # Queries start from the mean of what they read, so that its residual carries it on.
        queries = self.queries + masked_mean(x, there)[:, None]
        x = torch.cat([queries, x], dim=1)
        if not len(self.layers):
            return x[:, asked]
        *before, last = self.layers
        for layer in before:
            x = layer(x, x[:, n:], there)
        out: Tensor = last(
            x[:, asked], x[:, n:], there
        )  # of the last, no more need be computed
        return out


def masked_mean(x: Tensor, there: Tensor) -> Tensor:
    """Average the tokens that are there; rows without any give 0."""
    mask = there.to(x.dtype)[..., None]
    return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
