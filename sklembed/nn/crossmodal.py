"""The networks of SharedFusionEncoder and CrossAttentionAdaptor."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sklembed.nn.layers import SeededDropout

SCALES = (1.0, 100.0)  # range of the learned factor of similarities, 1 / temperature
_N_LENGTH_GROUPS = 4  # chunks of similar length in a batch of token sequences
_CONTEXT_FEATURES = 3  # of a learned context, before its network
_CONCAT_FEATURES = 10  # of a context that is concatenated, after its network


class Embedded(NamedTuple):
    """The embeddings of a batch, for the loss.

    Attributes
    ----------
    z : Tensor of shape (batch, n_modalities, n_components)
        Unit vectors; zero where a modality is missing.
    observed : Tensor of shape (batch, n_modalities), dtype bool
        The observed modalities of each row.
    log_scale : Tensor of shape ()
        Logarithm of the factor by which similarities are multiplied.
    """

    z: Tensor
    observed: Tensor
    log_scale: Tensor


class CrossModalNetwork(nn.Module):
    """Base class of networks into a shared space; a subclass encodes the tokens of a row.

    The input has the tokens of all modalities of a row in one vector, NaN where a token or a
    modality is missing. A pooled vector is one token. Rows of a batch do not influence each other.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number and width of the tokens of each modality.
    dropout : float
        Dropout probability of hidden units during training.
    input_dropout : float
        Dropout probability of the entries of the input during training.
    temperature : float
        Initial temperature.
    chunk_size : int or None
        Micro-batch size of gradient caching; None keeps the activations of the full batch.
    generator : torch.Generator
        Source of the initial weights and of dropout, on the device of the module.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        dropout: float,
        input_dropout: float,
        temperature: float,
        chunk_size: int | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shapes = list(shapes)
        self.chunk_size = chunk_size
        self.generator = generator
        self.initial_log_scale = -math.log(temperature)
        self.dropout = SeededDropout(dropout, generator)
        self.input_dropout = SeededDropout(input_dropout, generator)
        self.log_scale = nn.Parameter(torch.empty(()))
        for i, (_, width) in enumerate(self.shapes):
            self.register_buffer(f"mean_{i}", torch.empty(width))
            self.register_buffer(f"scale_{i}", torch.empty(width))

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights from the generator, as torch's layers do; set mean and scale.

        The residual branches of attention layers start at 0. With few pairs, the network is then
        close to a linear map, which is a strong baseline.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=self.generator)
                if module.bias is not None:
                    nn.init.uniform_(
                        module.bias, -bound, bound, generator=self.generator
                    )
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                for last in (module.out, module.feedforward_out):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
        nn.init.constant_(self.log_scale, self.initial_log_scale)
        for i, (mean, scale) in enumerate(moments):
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"scale_{i}").copy_(scale)

    def encode(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Map standardised tokens (batch, n_tokens, width) to (batch, n_components)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Embedded:
        """Map packed rows (batch, n_packed) to the shared space."""
        vectors, masks = [], []
        for modality, part in enumerate(self.unpack(x)):
            observed = ~part[..., 0].isnan()  # (batch, n_tokens)
            mask = observed.any(dim=1)  # (batch,)
            rows = mask.nonzero().squeeze(1)
            tokens = self.standardized(part, modality)
            z = self.in_chunks(tokens[rows], observed[rows], modality)
            padded = z.new_zeros(len(part), z.shape[1])
            vectors.append(padded.index_copy(0, rows, z))
            masks.append(mask)
        with (
            torch.no_grad()
        ):  # clamping within the graph would stop its gradient for good
            self.log_scale.clamp_(math.log(SCALES[0]), math.log(SCALES[1]))
        return Embedded(
            torch.stack(vectors, dim=1), torch.stack(masks, dim=1), self.log_scale
        )

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split packed rows (batch, n_packed) into (batch, n_tokens, width) per modality."""
        parts, start = [], 0
        for n_tokens, width in self.shapes:
            stop = start + n_tokens * width
            parts.append(x[:, start:stop].reshape(-1, n_tokens, width))
            start = stop
        return parts

    def standardized(self, part: Tensor, modality: int) -> Tensor:
        """Standardise tokens; missing entries become 0."""
        mean, scale = (
            getattr(self, f"mean_{modality}"),
            getattr(self, f"scale_{modality}"),
        )
        return torch.nan_to_num((part - mean) / scale)

    def unit(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Encode standardised tokens as unit vectors."""
        tokens = self.input_dropout(tokens)
        return F.normalize(self.encode(tokens, observed, modality), dim=-1)

    def in_chunks(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Encode standardised rows as unit vectors, in chunks of similar length.

        Chunks of similar length need little padding. With `chunk_size`, training keeps only the
        output of a chunk and recomputes its activations in the backward pass, with the same
        dropout (gradient caching, arXiv 2101.06983).
        """
        counts = observed.sum(dim=1)
        ragged = bool((counts != tokens.shape[1]).any())
        order = counts.argsort(stable=True)
        size = len(tokens) // _N_LENGTH_GROUPS if ragged else len(tokens)
        caching = False
        if self.training and self.chunk_size is not None:
            caching = True
            size = min(size, self.chunk_size)
        encoded = []
        for rows in torch.split(order, max(size, 1)):
            n_tokens = int(counts[rows].amax()) if ragged else tokens.shape[1]
            chunk = tokens[rows, :n_tokens], observed[rows, :n_tokens], modality
            encode = self.unit
            if caching:
                # All random draws come from the generator, which _replayed resets itself.
                encode = partial(
                    checkpoint,
                    self._replayed(),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            encoded.append(encode(*chunk))
        return torch.cat(encoded)[order.argsort()]

    def _replayed(self) -> Callable[..., Tensor]:
        """Return an encoding whose second run draws the same random numbers as the first."""
        state_before = self.generator.get_state()
        is_first = True

        def run(tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
            nonlocal is_first
            if is_first:
                is_first = False
                return self.unit(tokens, observed, modality)
            state = self.generator.get_state()
            self.generator.set_state(state_before)
            try:
                return self.unit(tokens, observed, modality)
            finally:
                self.generator.set_state(state)

        return run


class AttentionLayer(nn.Module):
    """A transformer layer with normalisation after each part; queries may differ from tokens."""

    def __init__(
        self, width: int, n_heads: int, dim_feedforward: int, dropout: nn.Module
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.feedforward_in = nn.Linear(width, dim_feedforward)
        self.feedforward_out = nn.Linear(dim_feedforward, width)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feedforward = nn.LayerNorm(width)

    def forward(self, x: Tensor, tokens: Tensor, observed: Tensor) -> Tensor:
        """Map queries x (batch, n_queries, width) that attend to the observed tokens."""
        x = self.norm_attention(x + self.dropout(self._attend(x, tokens, observed)))
        hidden = self.dropout(torch.relu(self.feedforward_in(x)))
        hidden = self.dropout(self.feedforward_out(hidden))
        out: Tensor = self.norm_feedforward(x + hidden)
        return out

    def _attend(self, x: Tensor, tokens: Tensor, observed: Tensor) -> Tensor:
        q = self._heads(self.query(x))  # (batch, n_heads, n_queries, width of a head)
        k = self._heads(self.key(tokens))
        v = self._heads(self.value(tokens))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        attention = _masked_softmax(scores, observed[:, None, None, :])
        out: Tensor = self.out(
            (self.dropout(attention) @ v).transpose(1, 2).flatten(-2)
        )
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """Reshape (batch, n, width) to (batch, n_heads, n, width of a head)."""
        width = x.shape[-1] // self.n_heads  # explicit, because a batch may be empty
        return x.view(*x.shape[:2], self.n_heads, width).transpose(1, 2)


class ContextFusion(nn.Module):
    """Fuse the context of a modality with its tokens (arXiv 2403.04650, DFE-1 to DFE-6)."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "concat":
            joined = width + _CONCAT_FEATURES
            self.join = nn.Sequential(
                nn.Linear(joined, joined), nn.ReLU(), nn.Linear(joined, width)
            )
        elif kind == "additive":
            self.of_context = nn.Linear(width, width)
            self.of_tokens = nn.Linear(width, width)
            self.score = nn.Linear(width, 1)
        elif kind == "general":
            self.of_tokens = nn.Linear(width, width)
        elif kind == "scaled_dot":
            self.of_context = nn.Linear(width, width)
            self.of_tokens = nn.Linear(width, width)
            self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, observed: Tensor) -> Tensor:
        """Map x (batch, n_tokens, width), given a context (n_context,)."""
        if self.kind == "add":
            return x + context
        if self.kind == "multiply":
            return x * context
        if self.kind == "concat":
            contexts = context.expand(*x.shape[:2], -1)
            joined: Tensor = self.join(torch.cat([x, contexts], dim=-1))
            return x + joined
        scores = self._scores(x, context)  # (batch, n_tokens)
        values = self.value(x) if self.kind == "scaled_dot" else x
        attention = _masked_softmax(scores, observed)
        return x + torch.einsum("bt,btw->bw", attention, values)[:, None]

    def _scores(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the attention scores of tokens."""
        keys: Tensor = self.of_tokens(x)
        if self.kind == "general":
            return keys @ context
        query: Tensor = self.of_context(context)
        if self.kind == "additive":
            scores: Tensor = self.score(torch.tanh(query + keys))
            return scores.squeeze(-1)
        return keys @ query / math.sqrt(x.shape[-1])


class SharedFusionNetwork(CrossModalNetwork):
    """One small encoder for all modalities, conditioned on a learned context of each modality.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number and width of the tokens of each modality.
    n_components : int
        Width of the shared space.
    fusion : str
        Fusion of context and tokens.
    n_heads, dim_feedforward : int
        Size of the transformer layer.
    share_layer : bool
        Whether modalities share fusion and transformer layer.
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
        self.projections = nn.ModuleList()
        for _, width in self.shapes:
            projection = nn.Sequential(
                nn.Linear(width, n_components),
                nn.GELU(),
                nn.Linear(n_components, n_components),
                self.dropout,
                nn.LayerNorm(n_components),
            )
            self.projections.append(projection)
        self.contexts = nn.Parameter(torch.empty(len(self.shapes), _CONTEXT_FEATURES))
        self.context_network = _make_context_network(n_components, fusion)
        self.fusions = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        for _ in range(1 if share_layer else len(self.shapes)):
            self.fusions.append(ContextFusion(fusion, n_components))
            self.norms.append(nn.LayerNorm(n_components))
            self.layers.append(
                AttentionLayer(n_components, n_heads, dim_feedforward, self.dropout)
            )

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights; contexts are N(0, sigma), sigma from U(0.1, 0.6), as in the paper."""
        super().initialize(moments)
        with torch.no_grad():
            sigma = self.contexts.new_empty(len(self.contexts), 1)
            sigma.uniform_(0.1, 0.6, generator=self.generator)
            self.contexts.normal_(generator=self.generator).mul_(sigma)

    def embedded_contexts(self) -> Tensor:
        """Return the contexts after their network, (n_modalities, n_context)."""
        out: Tensor = self.context_network(self.contexts)
        return out

    def encode(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to the mean of the outputs of the transformer layer."""
        layer = modality if len(self.layers) > 1 else 0
        context = self.context_network(self.contexts[modality])
        x = self.projections[modality](tokens)
        x = self.fusions[layer](x, context, observed)
        normed = self.norms[layer](x)
        return masked_mean(x + self.layers[layer](normed, normed, observed), observed)


class AdaptorNetwork(CrossModalNetwork):
    """Attention layers shared by all modalities, in which learned queries attend to tokens.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Number and width of the tokens of each modality.
    n_components : int
        Width of the shared space.
    n_layers, n_heads, dim_feedforward : int
        Number and size of the layers.
    n_queries : int
        Number of learned queries; with 0 the tokens are the queries.
    of_tokens : bool
        Whether the vector of a row is the mean of its adapted tokens, rather than that of the
        queries.
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
        self.projections = nn.ModuleList()
        for _, width in self.shapes:
            self.projections.append(nn.Linear(width, n_components, bias=False))
        self.queries = nn.Parameter(torch.empty(n_queries, n_components))
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            self.layers.append(
                AttentionLayer(n_components, n_heads, dim_feedforward, self.dropout)
            )

    def initialize(self, moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the weights; queries have the expected length of a projected token."""
        super().initialize(moments)
        with torch.no_grad():
            self.queries.normal_(generator=self.generator)
            self.queries.div_(math.sqrt(max(self.queries.shape[1], 1)))

    def encode(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to one vector per row."""
        n_queries = len(self.queries)
        if self.of_tokens or not n_queries:
            return masked_mean(self.adapt(tokens, observed, modality), observed)
        outputs = self._run_layers(tokens, observed, modality, slice(0, n_queries))
        return outputs.mean(dim=1)

    def adapt(self, tokens: Tensor, observed: Tensor, modality: int) -> Tensor:
        """Map standardised tokens to adapted tokens (batch, n_tokens, n_components)."""
        after_queries = slice(len(self.queries), None)
        return self._run_layers(tokens, observed, modality, after_queries)

    def _run_layers(
        self, tokens: Tensor, observed: Tensor, modality: int, positions: slice
    ) -> Tensor:
        """Run queries and tokens through the layers; return the outputs at some positions."""
        n = len(self.queries)
        x = F.normalize(self.projections[modality](tokens), dim=-1)
        # Queries start at the mean of the tokens, which the residual connection passes on.
        queries = self.queries + masked_mean(x, observed)[:, None]
        # (batch, n_queries + n_tokens, n_components)
        x = torch.cat([queries, x], dim=1)
        if not len(self.layers):
            return x[:, positions]
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            x = layer(x, x[:, n:], observed)
        out: Tensor = last(x[:, positions], x[:, n:], observed)
        return out


def masked_mean(x: Tensor, observed: Tensor) -> Tensor:
    """Return the mean of the observed tokens; 0 for rows without tokens."""
    mask = observed.to(x.dtype)[..., None]
    return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def _masked_softmax(scores: Tensor, observed: Tensor) -> Tensor:
    """Return the softmax over the last axis, in which unobserved tokens have weight 0."""
    return scores.masked_fill(~observed, -torch.inf).softmax(dim=-1)


def _make_context_network(n_components: int, fusion: str) -> nn.Sequential:
    """Return the network of the contexts."""
    sizes = [_CONTEXT_FEATURES, 64, 128, n_components]
    if fusion == "concat":
        sizes = [_CONTEXT_FEATURES, _CONCAT_FEATURES]
    network = nn.Sequential(nn.Linear(sizes[0], sizes[1]))
    for n_in, n_out in zip(sizes[1:], sizes[2:], strict=False):
        network.append(nn.ReLU())
        network.append(nn.Linear(n_in, n_out))
    network.append(nn.LayerNorm(sizes[-1]))
    return network
