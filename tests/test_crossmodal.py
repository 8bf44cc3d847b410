"""Cross-modal encoders: independent rows, networks, training, tokens and invalid input."""

import math
import pickle
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback
from torch import nn

from sklembed import (
    CrossAttentionAdaptor,
    PerModalityUnion,
    SharedFusionEncoder,
    crossmodal,
)
from sklembed.crossmodal import ATTENTION_FUSIONS, FUSIONS
from sklembed.metrics import retrieval_recall
from sklembed.nn import crossmodal as networks
from sklembed.nn.crossmodal import (
    AdaptorNetwork,
    AttentionLayer,
    ContextFusion,
    Embedded,
    SharedFusionNetwork,
    masked_mean,
)
from sklembed.nn.layers import SeededDropout
from sklembed.nn.losses import info_nce

BLOCKS = {"text": slice(0, 5), "image": slice(5, 12)}
THREE = BLOCKS | {"sound": slice(12, 16)}
COLUMNS = {"text": [0], "image": [1]}  # of tokens
ENCODERS = (SharedFusionEncoder, CrossAttentionAdaptor)
each_encoder = pytest.mark.parametrize("Encoder", ENCODERS)


def world(n_rows=60, blocks=BLOCKS, seed=0):
    """Make modalities that tell of the same three numbers."""
    rng = np.random.default_rng(seed)
    shared, maps = rng.normal(size=(n_rows, 3)), np.random.default_rng(7)
    n_features = [columns.stop - columns.start for columns in blocks.values()]
    parts = [
        shared @ maps.normal(size=(3, width)) + 0.1 * rng.normal(size=(n_rows, width))
        for width in n_features
    ]
    return np.hstack(parts).astype(np.float32)


def in_tokens(X, seed=0):
    """Make of each modality a column of one to four tokens, noisy copies of its vector."""
    rng = np.random.default_rng(seed)
    cells = np.empty((len(X), 2), dtype=object)
    for row in range(len(X)):
        for column, part in enumerate(BLOCKS.values()):
            n_tokens = rng.integers(1, 5)
            cells[row, column] = X[row, part] + 0.3 * rng.normal(size=(n_tokens, 1))
    return cells


def small(Encoder, **options):
    defaults = {
        "n_components": 8,
        "blocks": BLOCKS,
        "n_heads": 2,
        "dim_feedforward": 16,
        "dropout": 0.1,
        "input_dropout": 0.0,
        "standardize": True,
        "lr": 1e-3,
        "max_epochs": 2,
        "batch_size": 32,
        "random_state": 0,
    }
    return Encoder(**defaults | options)


def without(X, name, rows=slice(None), blocks=BLOCKS):
    X = X.copy()
    X[rows, blocks[name]] = None if X.dtype == object else np.nan
    return X


def own(Z, name, width=8):
    """Return the block of one modality of what `transform` gives."""
    start = width * list(BLOCKS).index(name)
    return Z[:, start : start + width]


def shake(encoder):
    """Move fitted weights, some of which start at 0, to where each of them shows."""
    rng = np.random.default_rng(0)
    for name, value in encoder.weights_.items():
        if not name.startswith(("mean", "scale")):
            value += 0.3 * rng.normal(size=value.shape).astype(np.float32)
    return encoder


# A row by itself


KINDS = {
    "shared": small(SharedFusionEncoder),
    "shared, layers of their own": small(SharedFusionEncoder, share_layer=False),
    "adaptor": small(CrossAttentionAdaptor),
    "adaptor, self-attention": small(CrossAttentionAdaptor, n_queries=0, n_layers=2),
    "adaptor, no layers": small(CrossAttentionAdaptor, n_layers=0),
}
OF_TOKENS = {
    name: clone(encoder).set_params(blocks=COLUMNS) for name, encoder in KINDS.items()
} | {
    fusion: small(SharedFusionEncoder, fusion=fusion, blocks=COLUMNS)
    for fusion in (*FUSIONS, *ATTENTION_FUSIONS)
}


@pytest.mark.parametrize(
    "encoder",
    [*KINDS.values(), *OF_TOKENS.values()],
    ids=[*KINDS, *(f"{n}, t" for n in OF_TOKENS)],
)
def test_a_row_s_vector_knows_neither_batch_nor_padding_nor_partner(encoder):
    X = in_tokens(world()) if encoder.blocks == COLUMNS else world()
    encoder = clone(encoder)
    together = shake(encoder.fit(X)).transform(X)
    assert together.dtype == np.float32
    alone = np.vstack([encoder.transform(row[None]) for row in X[:9]])
    np.testing.assert_allclose(together[:9], alone, atol=1e-5)
    for modality in BLOCKS:
        np.testing.assert_allclose(
            np.linalg.norm(own(together, modality), axis=1), 1, rtol=1e-5
        )
        columns = encoder.blocks_[modality]
        found = encoder.encode(X[:, columns], modality)
        np.testing.assert_array_equal(found, own(together, modality))
        (other,) = set(BLOCKS) - {modality}
        bare = encoder.transform(without(X, other, blocks=encoder.blocks_))
        np.testing.assert_array_equal(own(bare, modality), own(together, modality))
        assert np.isnan(own(bare, other)).all()


@pytest.mark.parametrize("n_queries", [0, 3])
def test_adapted_tokens_know_neither_batch_nor_padding_nor_partner(n_queries):
    X = without(in_tokens(world()), "image", [3], COLUMNS)
    adaptor = small(
        CrossAttentionAdaptor, n_queries=n_queries, n_layers=2, blocks=COLUMNS
    )
    shake(adaptor.fit(X)).set_params(output="tokens")
    together = adaptor.transform(X)
    assert together.shape == (60, 2)
    assert together[3, 1] is None
    assert adaptor.encode(X[:, 1], "image")[3, 0] is None
    for row in range(9):
        alone = adaptor.transform(without(X, "image", blocks=COLUMNS)[row : row + 1])
        assert together[row, 0].shape == (len(X[row, 0]), 8)
        np.testing.assert_allclose(together[row, 0], alone[0, 0], atol=1e-5)
        assert alone[0, 1] is None
    # a token is told of the others of its row
    shorter = X[:1].copy()
    shorter[0, 0] = np.vstack([X[0, 0], -X[0, 0]])
    longer = adaptor.transform(shorter)[0, 0]
    assert np.abs(longer[: len(X[0, 0])] - together[0, 0]).max() > 1e-3


def test_without_queries_the_pooled_vector_is_the_mean_of_adapted_tokens():
    X = in_tokens(world())
    adaptor = small(CrossAttentionAdaptor, n_queries=0, n_layers=2, blocks=COLUMNS)
    pooled = shake(adaptor.fit(X)).encode(X[:, 0], "text")
    tokens = adaptor.set_params(output="tokens").encode(X[:, 0], "text")[:, 0]
    means = np.array([vectors.mean(axis=0) for vectors in tokens])
    np.testing.assert_allclose(
        pooled, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5
    )


@each_encoder
def test_long_tables_are_encoded_in_chunks(Encoder, monkeypatch):
    X = in_tokens(world())
    encoder = shake(small(Encoder, blocks=COLUMNS).fit(X))
    whole = encoder.transform(X)
    monkeypatch.setattr(crossmodal, "_CHUNK_TOKENS", 10)
    np.testing.assert_allclose(encoder.transform(X), whole, atol=1e-5)


@each_encoder
def test_rows_without_a_partner_train_nothing_but_are_embedded(Encoder):
    X = world()
    lone = without(world(20, seed=1), "image")
    lone[:5] = np.nan  # nothing at all
    encoder = small(Encoder).fit(np.vstack([X[:30], 100 * lone, X[30:]]))
    same_weights(encoder, small(Encoder).fit(X), rtol=0)
    Z = encoder.transform(lone)
    assert np.isfinite(own(Z, "text")[5:]).all()
    assert np.isnan(own(Z, "image")).all()
    assert np.isnan(Z[:5]).all()


@each_encoder
def test_scattered_columns_make_the_same_encoder(Encoder):
    X = world()
    order = np.random.default_rng(0).permutation(12)
    place = np.argsort(order)
    scattered = {name: place[columns].tolist() for name, columns in BLOCKS.items()}
    other = small(Encoder, blocks=scattered).fit(X[:, order])
    encoder = small(Encoder).fit(X)
    np.testing.assert_array_equal(encoder.transform(X), other.transform(X[:, order]))
    assert encoder.score(X) == other.score(X[:, order])


# The papers' networks


def count(module):
    return sum(value.numel() for value in module.parameters())


def network(kind, shapes, n_components, generator=None, **options):
    defaults = {"n_heads": 4, "dim_feedforward": 16, "dropout": 0.0}
    defaults |= {"input_dropout": 0.0, "temperature": 0.07, "chunk_size": None}
    if kind is SharedFusionNetwork:
        defaults |= {"fusion": "add", "share_layer": True}
    else:
        defaults |= {"n_layers": 2, "n_queries": 0}
    with torch.device("meta"):
        made = kind(shapes, n_components, generator=generator, **defaults | options)
    if generator is None:
        return made
    made.to_empty(device="cpu")
    made.initialize([(torch.zeros(width), torch.ones(width)) for _, width in shapes])
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def paper_s(fusion, **options):
    options = {"dim_feedforward": 2048} | options
    return network(
        SharedFusionNetwork, [(1, 768), (1, 768)], 256, fusion=fusion, **options
    )


def test_the_shared_encoder_has_as_many_parameters_as_the_paper_s():
    shared = paper_s("add")
    assert count(shared) == 1_884_039
    assert [count(projection) for projection in shared.projections] == [
        263_168,
        263_168,
    ]
    assert count(shared.context_network) + shared.contexts.numel() == 42_118
    assert count(paper_s("add", share_layer=False)) == 1_884_039 + 1_315_584


@pytest.mark.parametrize(
    ("fusion", "n_parameters"),
    [
        ("add", 1_315_584),
        ("multiply", 1_315_584),
        ("concat", 1_454_958),
        ("additive", 1_447_425),
        ("general", 1_381_376),
        ("scaled_dot", 1_512_960),
    ],
)
def test_every_fusion_has_as_many_parameters_as_the_paper_s(fusion, n_parameters):
    shared = paper_s(fusion)
    assert (
        count(shared.fusions) + count(shared.norms) + count(shared.layers)
        == n_parameters
    )
    contexts = count(shared.context_network) + shared.contexts.numel()
    assert contexts == (66 if fusion == "concat" else 42_118)


@pytest.mark.parametrize(
    ("widths", "n_parameters"), [((768, 768), 12_207_617), ((768, 384), 11_912_705)]
)
def test_the_adaptor_has_as_many_parameters_as_the_paper_s(widths, n_parameters):
    shapes = [(1, width) for width in widths]
    adaptor = network(AdaptorNetwork, shapes, 768, n_heads=12, dim_feedforward=2048)
    assert count(adaptor) == n_parameters


def test_the_default_is_no_larger_than_the_paper_s_abstract_says():
    encoder = SharedFusionEncoder()
    options = {name: getattr(encoder, name) for name in ("n_heads", "dim_feedforward")}
    shapes = [(1, 768), (1, 768)]
    assert (
        count(network(SharedFusionNetwork, shapes, encoder.n_components, **options))
        <= 1.5e6
    )


@pytest.mark.parametrize("encoder", KINDS.values(), ids=KINDS)
def test_n_parameters_counts_the_parameters_of_the_network_without_moments(encoder):
    encoder = clone(encoder).fit(world())
    assert encoder.n_parameters_ == count(encoder._fitted_network())
    sizes = {name: value.size for name, value in encoder.weights_.items()}
    moments = [sizes[f"{name}_{i}"] for name in ("mean", "scale") for i in (0, 1)]
    assert encoder.n_parameters_ == sum(sizes.values()) - sum(moments)


def torch_s_layer(layer, n_heads):
    """Build torch's own transformer layer of the weights of ours."""
    width, hidden = layer.query.in_features, layer.feedforward_in.out_features
    theirs = nn.TransformerEncoderLayer(
        width, n_heads, hidden, dropout=0.0, batch_first=True
    )
    pairs = [
        (theirs.self_attn.out_proj, layer.out),
        (theirs.linear1, layer.feedforward_in),
        (theirs.linear2, layer.feedforward_out),
        (theirs.norm1, layer.norm_attention),
        (theirs.norm2, layer.norm_feedforward),
    ]
    parts = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(
            torch.cat([part.weight for part in parts])
        )
        theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        for target, source in pairs:
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)
    return theirs


def shaken(module, seed=0):
    """Move all parameters away from where they start, so that each of them shows."""
    generator = seeded(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return module


@pytest.fixture
def layer():
    with torch.random.fork_rng():
        return shaken(AttentionLayer(8, 2, 16, SeededDropout(0.0, seeded())))


@pytest.fixture
def tokens():
    """Return five rows of up to four tokens, and the mask of the observed tokens."""
    observed = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    return torch.randn(5, 4, 8, generator=seeded()), observed


def single_tokens():
    """Return five rows of one token, and the mask of the observed tokens."""
    x = torch.randn(5, 1, 8, generator=seeded())
    return x, torch.ones(5, 1, dtype=torch.bool)


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_layer_is_torch_s_own(layer, tokens, training):
    x, observed = tokens
    theirs = torch_s_layer(layer, 2).train(training)
    # Without gradients torch takes its fast path.
    with torch.set_grad_enabled(training):
        expected = theirs(x, src_key_padding_mask=~observed)
    outputs = layer(x, x, observed)
    torch.testing.assert_close(
        outputs[observed], expected[observed], atol=1e-5, rtol=1e-4
    )


def test_attention_over_one_vector_does_not_depend_on_the_query(layer):
    x, observed = single_tokens()
    a, b = torch.randn(2, 5, 3, 8, generator=seeded(1))
    torch.testing.assert_close(
        layer._attend(a, x, observed), layer._attend(b, x, observed)
    )
    # Outputs differ by the residual connection alone.
    assert (layer(a, x, observed) - layer(b, x, observed)).abs().max() > 0.1
    x = x.repeat(1, 2, 1) * torch.tensor([[1.0], [-1.0]])
    observed = observed.repeat(1, 2)
    difference = layer._attend(a, x, observed) - layer._attend(b, x, observed)
    assert difference.abs().max() > 1e-3


def test_the_released_adaptor_s_cross_attention_is_self_attention_over_one_vector():
    """arXiv 2401.01179: ``Layer(src=img, query=txt, key=value=img)``, residual around src."""
    adaptor = shaken(network(AdaptorNetwork, [(1, 5), (1, 7)], 8, seeded(), n_heads=2))
    text, image = (torch.randn(6, 1, n, generator=seeded(n)) for n in (5, 7))
    observed = torch.ones(6, 1, dtype=torch.bool)
    a, b = (
        F.normalize(projection(x), dim=-1)
        for projection, x in zip(adaptor.projections, (text, image), strict=True)
    )
    for layer in adaptor.layers:
        theirs = torch_s_layer(layer, 2)

        def released(source, query, theirs=theirs):
            source = theirs.norm1(source + theirs.self_attn(query, source, source)[0])
            return theirs.norm2(source + theirs.linear2(theirs.linear1(source).relu()))

        b = released(b, a)
        a = released(a, b)
    for modality, (x, expected) in enumerate(((text, a), (image, b))):
        z = adaptor.unit(x, observed, modality)
        torch.testing.assert_close(
            z, F.normalize(expected[:, 0], dim=-1), atol=1e-5, rtol=1e-4
        )


def naive_fusion(fusion, x, c):
    """Fuse the tokens (n_tokens, width) of one row with a context."""
    if fusion.kind == "add":
        return x + c
    if fusion.kind == "multiply":
        return x * c
    if fusion.kind == "concat":
        return x + torch.stack([fusion.join(torch.cat([token, c])) for token in x])
    if fusion.kind == "additive":
        scores = [
            fusion.score(torch.tanh(fusion.of_context(c) + fusion.of_tokens(t)))
            for t in x
        ]
    elif fusion.kind == "general":
        scores = [(fusion.of_tokens(token) @ c)[None] for token in x]
    else:
        scale = math.sqrt(x.shape[1])
        scores = [(fusion.of_context(c) @ fusion.of_tokens(t) / scale)[None] for t in x]
    values = fusion.value(x) if fusion.kind == "scaled_dot" else x
    shares = torch.cat(scores).softmax(dim=0)
    return x + sum(share * value for share, value in zip(shares, values, strict=True))


@pytest.mark.parametrize("fusion", FUSIONS + ATTENTION_FUSIONS)
def test_the_shared_encoder_is_the_paper_s(fusion, tokens):
    """arXiv 2403.04650, row by row and without padding: u = fuse(x, c); mean of u + T(LN(u))."""
    shared = network(
        SharedFusionNetwork, [(4, 8), (4, 8)], 8, seeded(), fusion=fusion, n_heads=2
    )
    shaken(shared)
    theirs = torch_s_layer(shared.layers[0], 2)
    x, observed = tokens
    for modality in (0, 1):
        expected = []
        for row, mask in zip(x, observed, strict=True):
            projected = shared.projections[modality](row[mask])
            context = shared.context_network(shared.contexts[modality])
            u = naive_fusion(shared.fusions[0], projected, context)
            expected.append((u + theirs(shared.norms[0](u)[None])[0]).mean(dim=0))
        z = shared.encode(x, observed, modality)
        torch.testing.assert_close(z, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ATTENTION_FUSIONS)
def test_attention_over_one_vector_does_not_depend_on_the_context(kind):
    """This is why these fusions are refused for pooled blocks."""
    with torch.random.fork_rng():
        fusion = ContextFusion(kind, 8)
    x, observed = single_tokens()
    a, b = torch.randn(2, 8, generator=seeded(1))
    torch.testing.assert_close(fusion(x, a, observed), fusion(x, b, observed))


def test_modalities_differ_by_their_context():
    shared = network(SharedFusionNetwork, [(1, 8), (1, 8)], 8, seeded())
    assert not torch.equal(*shared.embedded_contexts())
    shared.projections[1].load_state_dict(shared.projections[0].state_dict())
    x, observed = single_tokens()
    a, b = shared.unit(x, observed, 0), shared.unit(x, observed, 1)
    assert not torch.allclose(a, b, atol=1e-3)


def test_modalities_may_have_separate_layers():
    shared = network(
        SharedFusionNetwork, [(1, 8), (1, 8)], 8, seeded(), share_layer=False
    )
    x, observed = single_tokens()
    before = [shared.unit(x, observed, modality) for modality in (0, 1)]
    for part in (shared.fusions, shared.norms, shared.layers):
        shaken(part[1])
    torch.testing.assert_close(shared.unit(x, observed, 0), before[0])
    assert (shared.unit(x, observed, 1) - before[1]).abs().max() > 0.01


def test_without_layers_the_adaptor_is_a_projection(tokens):
    x, observed = tokens
    for n_queries in (0, 3):
        adaptor = network(
            AdaptorNetwork, [(4, 8)], 8, seeded(), n_layers=0, n_queries=n_queries
        )
        unit_tokens = F.normalize(adaptor.projections[0](x), dim=-1)
        expected = masked_mean(unit_tokens, observed)
        if n_queries:
            expected = expected + adaptor.queries.mean(dim=0)
        torch.testing.assert_close(adaptor.encode(x, observed, 0), expected)


def test_the_scale_of_similarities_stays_in_its_bounds_and_can_come_back():
    X = torch.from_numpy(world(10))
    made = network(AdaptorNetwork, [(1, 5), (1, 7)], 8, seeded())
    for training in (True, False):
        for scale, bound in ((-3.0, 0.0), (9.0, math.log(100))):
            with torch.no_grad():
                made.log_scale.fill_(scale)
            out = made.train(training)(X)
            assert out.z.shape == (10, 2, 8)
            assert out.observed.shape == (10, 2)
            assert out.log_scale.item() == pytest.approx(bound)
            loss = info_nce(*out.z.unbind(1), out.log_scale)
            (gradient,) = torch.autograd.grad(loss, out.log_scale)
            assert gradient != 0


def test_the_masked_mean_is_that_of_the_observed_tokens(tokens):
    x, observed = tokens
    observed[1] = False
    expected = [row[mask].mean(dim=0) for row, mask in zip(x, observed, strict=True)]
    expected[1] = torch.zeros(8)
    torch.testing.assert_close(masked_mean(x, observed), torch.stack(expected))


# Training


@each_encoder
def test_partners_that_were_never_seen_find_each_other(Encoder):
    X = world(400)
    encoder = small(Encoder, n_components=16, max_epochs=10, batch_size=64, lr=0.01)
    encoder.fit(X[:300])
    similarities = [epoch["positive_similarity"] for epoch in encoder.history_]
    assert similarities[-1] > similarities[0]
    assert encoder.history_[-1]["negative_similarity"] < similarities[-1] - 0.5
    assert encoder.score(X[300:]) > 0.3  # of a hundred


@each_encoder
def test_tokens_find_their_partners_too(Encoder):
    X = in_tokens(world(300))
    encoder = small(Encoder, blocks=COLUMNS, max_epochs=12, batch_size=64, lr=0.02)
    assert encoder.fit(X[:250]).score(X[250:]) > 0.2  # of fifty


@each_encoder
def test_history_says_how_alike_rows_were(Encoder):
    X = world(30)
    encoder = small(
        Encoder, max_epochs=1, batch_size=30, lr=1e-12, dropout=0.0, weight_decay=0.0
    )
    Z = encoder.fit(X).transform(X)
    cosines = own(Z, "text") @ own(Z, "image").T
    (epoch,) = encoder.history_
    others = ~np.eye(30, dtype=bool)
    assert epoch["positive_similarity"] == pytest.approx(
        np.diag(cosines).mean(), abs=1e-5
    )
    assert epoch["negative_similarity"] == pytest.approx(
        cosines[others].mean(), abs=1e-5
    )
    z = torch.from_numpy(np.stack([own(Z, name) for name in BLOCKS]))
    loss = info_nce(*z, torch.tensor(-math.log(0.07)))
    assert epoch["train_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_loss_is_the_mean_over_pairs_of_modalities():
    z = F.normalize(torch.randn(9, 3, 4, generator=seeded()), dim=-1)
    observed = torch.rand(9, 3, generator=seeded()) < 0.7
    log_scale = torch.tensor(1.0)
    embedded = Embedded(z, observed, log_scale)
    codes = torch.arange(9)[:, None].expand(9, 3) // torch.tensor([1, 2, 1])
    objective = crossmodal._Objective(0.75, mask_duplicates=True)
    expected = 0.0
    for a, b in combinations(range(3), 2):
        same = (codes[:, None, a] == codes[:, a]) | (codes[:, None, b] == codes[:, b])
        pairs = observed[:, a] & observed[:, b]
        options = {"observed": pairs, "same": same, "direction_weight": 0.75}
        expected += info_nce(z[:, a], z[:, b], log_scale, **options) / 3
    loss = objective(embedded, codes, None)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


@each_encoder
def test_rows_with_the_same_content_are_no_negatives(Encoder):
    X = world()
    X[1:, BLOCKS["text"]] = X[0, BLOCKS["text"]]  # one caption for all images but one
    X[0, BLOCKS["text"]] += 5
    options = {"batch_size": 60, "max_epochs": 1}
    masked = small(Encoder, **options).fit(X)
    unmasked = small(Encoder, mask_duplicates=False, **options).fit(X)
    assert masked.history_[0]["train_loss"] < 0.7 * unmasked.history_[0]["train_loss"]
    X[0, BLOCKS["text"]] = X[1, BLOCKS["text"]]
    with pytest.raises(
        ValueError, match="The 60 pairs with 'text' all have the same content"
    ):
        small(Encoder).fit(X)


def test_score_is_recall_both_ways_and_knows_what_is_the_same():
    X = world(40)
    X[20:30, BLOCKS["text"]] = X[:10, BLOCKS["text"]]
    X[30:40, BLOCKS["image"]] = X[
        20:30, BLOCKS["image"]
    ]  # so that row 0 goes with 20, and with 30
    rows = np.r_[np.arange(20), np.arange(10), np.arange(10)]
    encoder = small(SharedFusionEncoder, max_epochs=5, batch_size=16).fit(X)
    text, image = (own(encoder.transform(X), name) for name in BLOCKS)
    both = [
        retrieval_recall(*pair, labels=rows) for pair in ((text, image), (image, text))
    ]
    assert both[0] != both[1]
    assert encoder.score(X) == pytest.approx(np.mean(both))
    lone = np.vstack([without(X, "image"), X, without(X, "text")])
    assert encoder.score(lone) == encoder.score(X)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", [SharedFusionNetwork, AdaptorNetwork])
def test_gradients_of_chunks_are_those_of_the_whole_batch(
    kind, dropout, chunk_size, monkeypatch
):
    """With dropout: of one pass over the same chunks, which is drawn the same way."""
    X = torch.from_numpy(world(10))
    X[2, :5] = torch.nan

    def run(chunk_size):
        generator = seeded()
        drops = {"dropout": dropout, "input_dropout": dropout}
        made = network(
            kind, [(1, 5), (1, 7)], 8, generator, chunk_size=chunk_size, **drops
        )
        out = shaken(made).train()(X)
        state = generator.get_state()
        pairs = out.observed.all(dim=1)
        info_nce(*out.z.unbind(1), out.log_scale, observed=pairs).backward()
        assert torch.equal(generator.get_state(), state)  # the backward pass replays
        gradients = {name: value.grad for name, value in made.named_parameters()}
        return out.z.detach(), gradients

    in_chunks = run(chunk_size)
    if dropout:
        monkeypatch.setattr(networks, "checkpoint", lambda run, *args, **_: run(*args))
    expected = run(chunk_size if dropout else None)
    torch.testing.assert_close(in_chunks, expected, atol=1e-5, rtol=1e-4)


@each_encoder
def test_fitting_in_chunks_is_fitting_at_once(Encoder):
    X = world()
    options = {"dropout": 0.0, "batch_size": 60, "max_epochs": 3}
    whole = small(Encoder, **options).fit(X)
    same_weights(small(Encoder, chunk_size=7, **options).fit(X), whole, atol=1e-4)


@each_encoder
def test_numbers_of_the_input_are_dropped_in_training_alone(Encoder):
    X = world()
    options = {"dropout": 0.0, "lr": 1e-12, "max_epochs": 1, "batch_size": 60}
    plain, dropped = (
        small(Encoder, input_dropout=p, **options).fit(X) for p in (0.0, 0.5)
    )
    np.testing.assert_allclose(dropped.transform(X), plain.transform(X), atol=1e-6)
    assert dropped.history_[0]["train_loss"] != pytest.approx(
        plain.history_[0]["train_loss"]
    )


@each_encoder
def test_standardized_columns_may_have_any_unit(Encoder):
    X = world()
    encoder = small(Encoder).fit(X)
    units = np.array([1000.0] * 6 + [0.01] * 6, dtype=np.float32)
    scaled = small(Encoder).fit(X * units + 3 * units)
    Z, found = encoder.transform(X), scaled.transform(X * units + 3 * units)
    np.testing.assert_allclose(Z, found, atol=1e-3)
    raw = small(Encoder, standardize=False).fit(X)
    assert (raw.weights_["mean_0"] == 0).all()
    assert (raw.weights_["scale_1"] == 1).all()


@each_encoder
def test_a_constant_column_is_not_blown_up(Encoder):
    X = world()
    X[:, 2] = 1e4 + 1e-3 * (np.arange(60) % 2)  # rounding
    encoder = small(Encoder).fit(X)
    assert encoder.weights_["scale_0"][2] == 1
    other = X.copy()
    other[:, 2] += 0.01
    assert np.abs(encoder.transform(other) - encoder.transform(X)).max() < 0.1


@each_encoder
@pytest.mark.parametrize("lr", [1e-9, 0.01, 10.0])
def test_the_temperature_is_learned_within_its_bounds(Encoder, lr):
    encoder = small(Encoder, lr=lr, max_epochs=3, dropout=0.0, early_stopping=True)
    encoder.set_params(validation_fraction=0.3, batch_size=16).fit(world())
    assert 0.01 <= encoder.temperature_ <= 1
    assert (encoder.temperature_ == pytest.approx(0.07)) == (lr == 1e-9)


def test_early_stopping_goes_back_to_the_best_epoch():
    X = world(200)
    X += np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    options = {
        "early_stopping": True,
        "n_iter_no_change": 3,
        "validation_fraction": 0.3,
    }
    encoder = small(SharedFusionEncoder, max_epochs=100, lr=0.02, **options).fit(X)
    losses = [epoch["valid_loss"] for epoch in encoder.history_]
    best = int(np.argmin(losses)) + 1
    assert encoder.n_iter_ == best + 3 < 100
    shorter = small(SharedFusionEncoder, max_epochs=best, lr=0.02, **options).fit(X)
    same_weights(encoder, shorter, rtol=0)
    same_similarities(encoder.history_[:best], shorter.history_)
    # Early stopping ends the last epoch before it is reported.
    assert math.isfinite(encoder.history_[-1]["positive_similarity"])


def same_similarities(history, expected):
    assert len(history) == len(expected)
    for epoch, expected_epoch in zip(history, expected, strict=True):
        for name in ("positive_similarity", "negative_similarity"):
            assert epoch[name] == expected_epoch[name]


def test_similarities_are_recorded_in_the_epoch_in_which_a_callback_stops():
    class StopAtOnce(Callback):
        def on_epoch_end(self, net, **_):
            raise KeyboardInterrupt

    X = world()
    stop = {"skorch_params": {"callbacks": [StopAtOnce()]}}
    encoder = small(SharedFusionEncoder, max_epochs=5, warm_start=True, **stop).fit(X)
    once = small(SharedFusionEncoder, max_epochs=1, warm_start=True).fit(X)
    same_similarities(encoder.history_, once.history_)
    same_similarities(encoder.fit(X).history_, once.fit(X).history_)
    assert encoder.n_iter_ == 2


def test_a_warm_start_resumes():
    X = world()
    encoder = small(SharedFusionEncoder, warm_start=True).fit(X)
    first, moments = encoder.history_[-1]["train_loss"], encoder.weights_["mean_0"]
    encoder.fit(X + 1)
    assert [epoch["epoch"] for epoch in encoder.history_] == [1, 2, 3, 4]
    assert encoder.n_iter_ == 4
    np.testing.assert_array_equal(encoder.weights_["mean_0"], moments)
    encoder.set_params(max_epochs=20).fit(X)
    assert encoder.history_[-1]["train_loss"] < first
    still = (
        small(SharedFusionEncoder, warm_start=True, lr=1e-12, max_epochs=1)
        .fit(X)
        .fit(X)
    )
    losses = [epoch["train_loss"] for epoch in still.history_]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # of other batches
    with pytest.raises(
        ValueError, match="has the structure .*'n_components': 8.* require .* Clone"
    ):
        encoder.set_params(n_components=4).fit(X)
    with pytest.raises(ValueError, match="X has 11 features, but .* is expecting 12"):
        encoder.fit(X[:, :11])
    assert (
        encoder.set_params(warm_start=False, blocks=COLUMNS).fit(X[:, :2]).n_iter_ == 20
    )


def test_skorch_options_device_and_verbosity_reach_training(capsys):
    epochs = []

    class Counts(Callback):
        def on_epoch_end(self, net, **_):
            epochs.append(net.device)

    X = world()
    plain = small(SharedFusionEncoder, device="cpu").fit(X)
    assert not capsys.readouterr().out
    options = {
        "skorch_params": {"callbacks": [Counts()]},
        "device": "cpu",
        "verbose": 1,
    }
    same_weights(small(SharedFusionEncoder, **options).fit(X), plain, rtol=0)
    assert epochs == [torch.device("cpu")] * 2
    assert "train_loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="device='nowhere' cannot be used here"):
        small(SharedFusionEncoder, device="nowhere").fit(X)
    with pytest.raises(ValueError, match="skorch_params sets criterion"):
        small(SharedFusionEncoder, skorch_params={"criterion": None}).fit(X)


@each_encoder
def test_fewer_pairs_than_a_batch_are_one_batch(Encoder):
    X = world(5)
    encoder = small(Encoder, batch_size=1000).fit(X)
    same_weights(small(Encoder, batch_size=5).fit(X), encoder, rtol=0)
    assert small(Encoder).fit(X[:2]).transform(X).shape == (5, 16)


@each_encoder
def test_a_collapsed_space_gives_a_warning(Encoder, monkeypatch):
    monkeypatch.setattr(crossmodal, "_COLLAPSED", -1.0)
    with pytest.warns(
        UserWarning, match=f"{Encoder.__name__} has collapsed: .* for non-pairs and"
    ):
        small(Encoder).fit(world())


def test_collapsed_contexts_give_a_warning(monkeypatch):
    X = world(blocks=THREE)
    encoder = small(SharedFusionEncoder, blocks=THREE).fit(X)  # without a warning
    similarity = encoder.context_similarity_
    assert similarity.shape == (3, 3)
    np.testing.assert_allclose(np.diag(similarity), 1)
    np.testing.assert_allclose(similarity, similarity.T)
    contexts = encoder._fitted_network().embedded_contexts().detach()
    assert similarity[0, 2] == pytest.approx(
        float(F.cosine_similarity(*contexts[[0, 2]], dim=0))
    )
    alike = np.triu(similarity, 1)
    a, b = np.unravel_index(alike.argmax(), alike.shape)
    monkeypatch.setattr(crossmodal, "_SAME_CONTEXT", alike.max() - 1e-6)
    names = list(THREE)
    with pytest.warns(
        UserWarning, match=f"contexts of '{names[a]}' and '{names[b]}' have coll"
    ):
        encoder.fit(X)


# In company


@each_encoder
def test_three_modalities_of_which_any_pair_may_miss(Encoder):
    X = world(300, THREE)
    for rows, name in enumerate(THREE):  # every row lacks one
        X = without(X, name, slice(rows, None, 3), THREE)
    encoder = small(Encoder, blocks=THREE, max_epochs=10, batch_size=64, lr=0.02).fit(X)
    Z = encoder.transform(X)
    assert Z.shape == (300, 24)
    np.testing.assert_array_equal(np.isnan(Z[:, ::8]), np.isnan(X[:, [0, 5, 12]]))
    full = world(60, THREE, seed=1)
    parts = np.split(encoder.transform(full), 3, axis=1)
    for a, b in combinations(parts, 2):
        assert retrieval_recall(a, b) > 0.15  # of sixty
    assert encoder.score(full) == pytest.approx(
        np.mean([retrieval_recall(a, b) for a in parts for b in parts if a is not b])
    )


@each_encoder
def test_a_grid_search_needs_no_labels(Encoder):
    search = GridSearchCV(small(Encoder), {"lr": [1e-9, 0.01], "max_epochs": [4]}, cv=2)
    assert search.fit(world()).best_params_["lr"] == 0.01


@each_encoder
def test_a_pickle_holds_arrays_alone_and_does_the_same(Encoder):
    X = world()
    encoder = small(Encoder).fit(X)
    stored = pickle.dumps(encoder)
    assert b"torch" not in stored
    np.testing.assert_array_equal(
        pickle.loads(stored).transform(X), encoder.transform(X)
    )
    assert not hasattr(clone(encoder), "weights_")


def round_trip(encoder, directory):
    """Save an encoder and load it into a fresh object with the same fitted attributes."""
    encoder.save(directory)
    loaded = type(encoder).load(directory)
    assert vars(loaded).keys() == vars(encoder).keys()
    assert loaded.get_params() == encoder.get_params()
    for name, value in encoder.weights_.items():
        assert loaded.weights_[name].shape == value.shape
        assert loaded.weights_[name].dtype == value.dtype
    same_weights(loaded, encoder, rtol=0)
    for name in vars(encoder).keys() - {"weights_"}:
        np.testing.assert_equal(getattr(loaded, name), getattr(encoder, name))
    return loaded


@pytest.mark.parametrize("encoder", KINDS.values(), ids=KINDS)
def test_a_saved_encoder_is_loaded_with_the_same_vectors(encoder, tmp_path):
    X = world()
    encoder = clone(encoder).fit(X)
    loaded = round_trip(encoder, tmp_path)
    assert loaded.blocks == loaded.blocks_ == BLOCKS  # slices
    np.testing.assert_array_equal(loaded.transform(X), encoder.transform(X))
    for name, columns in BLOCKS.items():
        np.testing.assert_array_equal(
            loaded.encode(X[:, columns], name), encoder.encode(X[:, columns], name)
        )
    assert loaded.score(X) == encoder.score(X)


@each_encoder
def test_scattered_blocks_names_and_missing_modalities_are_saved(Encoder, tmp_path):
    X = pd.DataFrame(world(), columns=[f"c{i}" for i in range(12)])
    X.iloc[:9, 1:8] = np.nan
    blocks = {"text": ["c0", "c8", "c9", "c10", "c11"], "image": slice(1, 8)}
    encoder = small(Encoder, blocks=blocks).set_output(transform="pandas").fit(X)
    loaded = round_trip(encoder, tmp_path)
    pd.testing.assert_frame_equal(loaded.transform(X), encoder.transform(X))
    with pytest.raises(ValueError, match="feature names"):
        loaded.transform(X[X.columns[::-1]])


@pytest.mark.parametrize("output", ["pooled", "tokens"])
def test_encoders_of_tokens_are_saved(output, tmp_path):
    cells = in_tokens(world())
    adaptor = small(CrossAttentionAdaptor, blocks=COLUMNS, output=output).fit(cells)
    loaded = round_trip(adaptor, tmp_path)
    assert loaded.holds_tokens_ == {"text": True, "image": True}
    expected = adaptor.transform(cells).tolist()
    np.testing.assert_equal(loaded.transform(cells).tolist(), expected)


def test_a_loaded_encoder_resumes_training_as_the_saved_one(tmp_path):
    X = world()
    encoder = small(SharedFusionEncoder, warm_start=True, dropout=0.0).fit(X)
    loaded = round_trip(encoder, tmp_path)
    same_weights(loaded.fit(X), encoder.fit(X), rtol=0)
    assert loaded.n_iter_ == 4


def last_seven_columns(X):
    return list(range(5, X.shape[1]))


@each_encoder
def test_an_encoder_with_a_callable_in_blocks_is_not_saved(Encoder, tmp_path):
    encoder = small(Encoder).fit(world())
    encoder.set_params(blocks={"text": slice(0, 5), "image": last_seven_columns})
    with pytest.raises(TypeError, match="blocks/image is the function"):
        encoder.save(tmp_path / "it")
    assert not (tmp_path / "it").exists()


@each_encoder
def test_a_file_of_another_class_is_refused(Encoder, tmp_path):
    small(Encoder).fit(world()).save(tmp_path)
    (another,) = set(ENCODERS) - {Encoder}
    with pytest.raises(
        ValueError, match=f"{Encoder.__name__}; expected a {another.__name__}"
    ):
        another.load(tmp_path)
    with pytest.raises(NotFittedError):
        small(Encoder).save(tmp_path)


@each_encoder
def test_names_come_from_the_union_and_go_on(Encoder):
    X = pd.DataFrame(
        world(), columns=[f"c{i}" for i in range(12)], index=np.arange(60) + 7
    )
    union = PerModalityUnion(
        [
            ("text", StandardScaler(), slice(0, 5)),
            ("image", StandardScaler(), slice(5, 12)),
        ]
    )
    pipe = make_pipeline(union, small(Encoder, blocks=None)).set_output(
        transform="pandas"
    )
    Z = pipe.fit_transform(X)
    assert list(Z.columns) == [f"{name}__{i}" for name in BLOCKS for i in range(8)]
    assert Z.index.equals(X.index)
    assert pipe[-1].blocks_ == BLOCKS
    plain = small(Encoder).fit(union.set_output(transform="default").fit_transform(X))
    np.testing.assert_array_equal(plain.transform(union.transform(X)), Z)


@each_encoder
def test_tokens_and_numbers_stand_side_by_side_in_a_frame(Encoder):
    X, cells = world(), in_tokens(world())
    frame = pd.DataFrame(
        {"text": cells[:, 0]}
    )  # a column of tokens is a block by itself
    frame[[f"image__{i}" for i in range(7)]] = X[:, 5:]
    frame.loc[3, "text"] = None
    frame.iloc[4, 1:] = np.nan
    encoder = small(Encoder, blocks=None).set_output(transform="pandas")
    Z = encoder.fit_transform(frame)
    assert encoder.holds_tokens_ == {"text": True, "image": False}
    assert encoder.widths_ == {"text": 5, "image": 7}
    names = [f"{name}__{i}" for name in BLOCKS for i in range(8)]
    assert list(Z.columns) == list(encoder.get_feature_names_out()) == names
    assert np.isnan(Z.iloc[3, :8]).all()
    assert np.isnan(Z.iloc[4, 8:]).all()
    assert np.isfinite(Z.drop(index=[3, 4])).all(axis=None)
    for cells in (frame[["text"]], frame["text"], list(frame["text"])):
        np.testing.assert_array_equal(encoder.encode(cells, "text"), Z.iloc[:, :8])
    np.testing.assert_array_equal(
        encoder.encode(frame.iloc[:, 1:], "image"), Z.iloc[:, 8:]
    )
    # the same in an array of objects, without names
    blocks = {"text": [0], "image": slice(1, None)}
    plain = small(Encoder, blocks=blocks).fit(frame.to_numpy())
    np.testing.assert_array_equal(plain.transform(frame.to_numpy()), Z)
    torn = frame.copy()
    torn.iloc[9, 4] = np.nan
    with pytest.raises(ValueError, match="NaN in 1 of 7 columns of row 9") as caught:
        encoder.fit(torn)
    assert caught.value.__notes__ == ["This was in block 'image'."]


def test_adapted_tokens_are_object_columns_with_the_names_of_the_modalities():
    frame = pd.DataFrame(in_tokens(world()), columns=["text__tokens", "image__tokens"])
    adaptor = small(CrossAttentionAdaptor, blocks=None, output="tokens")
    Z = adaptor.set_output(transform="pandas").fit_transform(frame)
    assert list(Z.columns) == ["text__0", "image__0"]
    assert all(dtype.kind == "O" for dtype in Z.dtypes)
    again = small(SharedFusionEncoder, blocks=None, fusion="general").fit(
        Z
    )  # tokens go in again
    assert again.widths_ == {"text": 8, "image": 8}
    assert 0 <= adaptor.score(frame) <= 1  # of pooled vectors, still
    with pytest.raises(ValueError, match="polars does not support"):
        adaptor.set_output(transform="polars").transform(frame)


@each_encoder
def test_tokens_one_to_a_row_are_pooled_vectors(Encoder):
    X = world()
    cells = np.empty((60, 2), dtype=object)
    for row, vector in enumerate(X):
        cells[row] = [vector[None, :5], vector[None, 5:]]
    of_tokens = small(Encoder, blocks=COLUMNS).fit(cells)
    encoder = small(Encoder).fit(X)
    np.testing.assert_array_equal(of_tokens.transform(cells), encoder.transform(X))
    assert of_tokens.score(cells) == encoder.score(X)


@each_encoder
def test_forms_of_a_table_make_no_difference(Encoder):
    pl = pytest.importorskip("polars")
    X = world()
    expected = small(Encoder).fit(X).transform(X)
    bare = X.astype(object)
    for form in (
        pl.DataFrame(X),
        np.asfortranarray(X, dtype=np.float64),
        bare,
        X.tolist(),
    ):
        np.testing.assert_array_equal(
            small(Encoder).fit(form).transform(form), expected
        )
    cells = in_tokens(X)
    encoder = small(Encoder, blocks=COLUMNS).fit(cells)
    expected, other = encoder.transform(cells), cells.copy()
    for row, column in np.ndindex(other.shape):
        other[row, column] = np.asfortranarray(cells[row, column], dtype=np.float64)[
            :, ::1
        ]
    other[0, 0], other[1, 0] = cells[0, 0].tolist(), torch.from_numpy(cells[1, 0])
    np.testing.assert_allclose(encoder.transform(other), expected, atol=1e-6)


@each_encoder
def test_rows_that_lack_everything_come_out_as_nan(Encoder):
    X = world()
    encoder = small(Encoder).fit(X)
    assert np.isnan(encoder.transform(np.full((3, 12), np.nan))).all()
    encoder = small(Encoder, blocks=COLUMNS).fit(in_tokens(X))
    for missing in (None, np.nan, pd.NA):
        Z = encoder.transform(np.full((3, 2), missing, dtype=object))
        assert Z.shape == (3, 16)
        assert np.isnan(Z).all()


# Bad input


@each_encoder
def test_tables_without_a_learnable_space_are_refused(Encoder):
    X = world()
    with pytest.raises(
        ValueError, match=r"at least two modalities, but .* the blocks \['all'\]"
    ):
        small(Encoder, blocks={"all": slice(None)}).fit(X)
    lone = without(without(X, "text", slice(0, 31)), "image", slice(30, 60))
    lone[30, :5] = X[30, :5]
    with pytest.raises(
        ValueError, match=r"0 of n_samples=60 rows have two .*'text': 30, 'image'"
    ):
        small(Encoder).fit(lone)
    one = np.vstack([lone, X[:1]])
    with pytest.raises(ValueError, match="1 of n_samples=61 rows have two modalities"):
        small(Encoder).fit(one)
    three = world(blocks=THREE)
    three[:30, 12:] = np.nan
    three[30:, :12] = np.nan
    with pytest.raises(
        ValueError, match="No row has 'sound' together with another modality"
    ):
        small(Encoder, blocks=THREE).fit(three)
    X[5, 2] = np.nan
    with pytest.raises(ValueError, match="NaN in 1 of 5 columns of row 5") as caught:
        small(Encoder).fit(X)
    assert caught.value.__notes__ == ["This was in block 'text'."]


@each_encoder
def test_blocks_that_are_not_there_are_refused(Encoder):
    X = world()
    with pytest.raises(ValueError, match="X has no names"):
        small(Encoder, blocks=None).fit(X)
    with pytest.raises(
        ValueError, match="'sound' selects column 20, but X has n_features=12"
    ):
        small(Encoder, blocks=BLOCKS | {"sound": [20]}).fit(X)
    with pytest.raises(ValueError, match="column 5 is in 2 of the blocks"):
        small(Encoder, blocks=BLOCKS | {"text": slice(0, 6)}).fit(X)
    with pytest.raises(NotFittedError):
        small(Encoder).transform(X)
    with pytest.raises(NotFittedError):
        small(Encoder).encode(X[:, :5], "text")
    encoder = small(Encoder).fit(X)
    with pytest.raises(
        ValueError, match=r"no modality 'sound'; fit has seen \['text', 'image'\]"
    ):
        encoder.encode(X[:, :5], "sound")
    with pytest.raises(ValueError, match="Block 'text' has 5 columns; got 7"):
        encoder.encode(X[:, 5:], "text")
    with pytest.raises(ValueError, match="X has 11 features, but .* expecting 12"):
        encoder.transform(X[:, :11])
    with pytest.raises(ValueError, match="None of the 60 rows has two modalities"):
        encoder.score(without(X, "text"))


@each_encoder
def test_networks_that_cannot_be_made_are_refused(Encoder):
    X = world()
    with pytest.raises(
        ValueError, match="n_components=8 must be a multiple of n_heads=3"
    ):
        small(Encoder, n_heads=3).fit(X)
    with pytest.raises(
        ValueError,
        match=r"validation_fraction=0\.1 splits 10 rows into 9 .* of 1, .* two pairs",
    ):
        small(Encoder, early_stopping=True).fit(X[:10])
    with pytest.raises(ValueError, match="splits 4 rows into 1 training rows .* of 3"):
        small(Encoder, early_stopping=True, validation_fraction=0.7).fit(X[:4])


@pytest.mark.parametrize("fusion", ATTENTION_FUSIONS)
def test_attention_over_pooled_blocks_is_refused(fusion):
    with pytest.raises(
        ValueError, match=f"fusion='{fusion}' is an attention .* 'text' has one vector"
    ):
        small(SharedFusionEncoder, fusion=fusion).fit(world())


@each_encoder
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            np.ones((2, 4)),
            "Row 3 of the token column 'text' has tokens of width 4, but 5 was",
        ),
        (np.zeros((0, 5)), r"Row 3 of .* at least one token; got shape \(0, 5\)\."),
        (np.ones(5), r"Row 3 of .* got shape \(5,\)\."),
        (
            np.full((2, 5), np.nan),
            r"Row 3 of .* got shape \(2, 5\), with NaN or infinity",
        ),
        (
            np.full((2, 5), np.inf),
            r"Row 3 of .* got shape \(2, 5\), with NaN or infinity",
        ),
        ("words", "could not convert string"),
    ],
)
def test_cells_that_are_no_tokens_are_refused_by_row(Encoder, cell, message):
    X = in_tokens(world())
    encoder = small(Encoder, blocks=COLUMNS).fit(X)
    X[3, 0] = cell
    for method in (encoder.transform, clone(encoder).fit):
        with pytest.raises(ValueError, match=message) as caught:
            method(X)
    if isinstance(cell, str):
        assert caught.value.__notes__ == [
            "This was in row 3 of the token column 'text'."
        ]


@each_encoder
def test_tokens_and_numbers_do_not_stand_for_each_other(Encoder):
    X, cells = world(), in_tokens(world())
    of_tokens = small(Encoder, blocks=COLUMNS).fit(cells)
    with pytest.raises(
        ValueError, match=r"Row 0 of the token column 'text' .* got shape \(\)"
    ):
        of_tokens.transform(X[:, :2])
    with pytest.raises(
        ValueError, match="Block 'text' is one column of tokens; got 5 columns"
    ):
        of_tokens.encode(X[:, :5], "text")
    with pytest.raises(ValueError, match="inhomogeneous"):
        of_tokens.transform(cells.tolist())
    of_numbers = small(Encoder, blocks=COLUMNS).fit(X[:, :2])
    with pytest.raises(
        ValueError, match="'text' has a column of tokens, but had numbers in fit"
    ):
        of_numbers.transform(cells)
    with pytest.raises(
        ValueError, match="'text' has a column of tokens among its 2 columns"
    ):
        small(Encoder, blocks={"text": [0, 1], "image": [2]}).fit(
            np.hstack([cells, X[:, :1]])
        )


def test_what_is_changed_after_fit_does_not_change_what_was_fitted():
    X = world()
    for Encoder, changes in (
        (SharedFusionEncoder, {"fusion": "multiply", "share_layer": False}),
        (CrossAttentionAdaptor, {"n_queries": 5, "n_layers": 3}),
    ):
        encoder = shake(small(Encoder).fit(X))
        before = encoder.transform(X)
        encoder.set_params(n_components=16, n_heads=8, dim_feedforward=3, **changes)
        np.testing.assert_array_equal(encoder.transform(X), before)
        assert len(encoder.get_feature_names_out()) == before.shape[1]


@each_encoder
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_modality_that_is_in_few_batches_trains_in_those(Encoder, chunk_size):
    X = without(world(60, THREE), "sound", np.arange(2, 60), THREE)
    encoder = small(Encoder, blocks=THREE, batch_size=8, chunk_size=chunk_size).fit(X)
    assert np.isfinite(encoder.transform(X)[:2]).all()
    assert np.isfinite(encoder.history_[-1]["train_loss"])


def test_tokens_are_trained_where_tokens_are_asked_for():
    X = in_tokens(world(200))
    options = {
        "blocks": COLUMNS,
        "max_epochs": 6,
        "batch_size": 16,
        "dropout": 0.0,
        "lr": 0.02,
        "n_components": 16,
    }
    adaptor = small(CrossAttentionAdaptor, output="tokens", **options).fit(X[:150])
    z = [
        np.stack([cell.mean(axis=0) for cell in column])
        for column in adaptor.transform(X[150:]).T
    ]
    assert retrieval_recall(*z) > 0.5


def swap_modalities(state):
    """Exchange the first and the second modality in the weights of a shared encoder."""
    swapped = {}
    for name, value in state.items():
        match = re.match(r"(projections\.|mean_|scale_)([01])(.*)", name)
        if match:
            start, modality, end = match.groups()
            name = f"{start}{1 - int(modality)}{end}"
        swapped[name] = value
    return swapped | {"contexts": state["contexts"].flip(0)}


def test_the_order_of_modalities_does_not_matter():
    options = {"n_heads": 2, "dim_feedforward": 16}
    forward = network(SharedFusionNetwork, [(1, 5), (1, 7)], 8, seeded(), **options)
    backward = network(SharedFusionNetwork, [(1, 7), (1, 5)], 8, seeded(), **options)
    backward.load_state_dict(swap_modalities(shaken(forward).state_dict()))
    X = torch.from_numpy(world())
    a = forward.eval()(X)
    b = backward.eval()(torch.cat([X[:, 5:], X[:, :5]], dim=1))
    torch.testing.assert_close(a.z, b.z.flip(1))
    codes = torch.arange(60)[:, None].expand(60, 2)
    loss = crossmodal._Objective(0.7, mask_duplicates=True)(a, codes, None)
    swapped = crossmodal._Objective(0.3, mask_duplicates=True)(b, codes, None)
    torch.testing.assert_close(loss, swapped)


@each_encoder
def test_one_long_row_does_not_lengthen_the_others(Encoder, monkeypatch):
    X = in_tokens(world())
    encoder = shake(small(Encoder, blocks=COLUMNS).fit(X))
    expected = encoder.encode(X[:, 0], "text")
    longest = []
    padded = crossmodal.pad_tokens

    def watch(cells, width):
        tokens = padded(cells, width)
        longest.append(tokens.shape[:2])
        return tokens

    monkeypatch.setattr(crossmodal, "pad_tokens", watch)
    X[7, 0] = np.tile(X[7, 0], (500, 1))
    Z = encoder.encode(X[:, 0], "text")
    assert longest[-1] == (1, len(X[7, 0]))
    assert sum(n * length for n, length in longest[:-1]) < 60 * 5
    np.testing.assert_allclose(np.delete(Z, 7, 0), np.delete(expected, 7, 0), atol=1e-5)


@each_encoder
def test_the_indicator_of_a_union_is_no_modality(Encoder):
    names = [
        f"{block}__{i}"
        for block, n in (("text", 5), ("image", 5), ("missing", 2))
        for i in range(n)
    ]
    X = pd.DataFrame(world(), columns=names)
    with pytest.raises(ValueError, match="add_indicator=False"):
        small(Encoder, blocks=None).fit(X)


def test_linear_maps_need_no_width_that_heads_share():
    X = world()
    maps = small(
        CrossAttentionAdaptor, n_components=5, n_layers=0, n_queries=0, n_heads=4
    )
    assert maps.fit(X).transform(X).shape == (60, 10)


@each_encoder
def test_token_columns_of_another_modality_are_refused_by_name(Encoder):
    cells = in_tokens(world())
    frame = pd.DataFrame({"text": cells[:, 0], "image": cells[:, 1]})
    encoder = small(Encoder, blocks=None).fit(frame)
    with pytest.raises(ValueError, match="those of block 'text'"):
        encoder.encode(frame[["image"]], "text")


@pytest.mark.gpu
@each_encoder
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_training_on_a_gpu_leads_to_a_space_as_good(Encoder, chunk_size):
    X = world(200)
    options = {"max_epochs": 60, "lr": 0.005, "chunk_size": chunk_size}
    scores = [
        small(Encoder, device=d, **options).fit(X[:150]).score(X[150:])
        for d in ("cpu", "cuda")
    ]
    assert scores[1] > scores[0] - 0.1


@each_encoder
def test_a_request_without_any_modality_stays_missing(Encoder):
    X = world()
    encoder = small(Encoder).fit(X)
    Z = encoder.transform(np.full((1, X.shape[1]), np.nan))
    assert Z.shape == (1, encoder.transform(X).shape[1])
    assert np.isnan(Z).all()


@each_encoder
def test_texts_are_refused(Encoder):
    X = pd.DataFrame({"text__0": ["a red cat"] * 9, "image__0": 1.0})
    with pytest.raises(
        ValueError, match="column 'text__0' of X is the text 'a red cat'.*Encode"
    ):
        small(Encoder, blocks=None).fit(X)


@each_encoder
def test_a_list_of_texts_is_no_query(Encoder):
    encoder = small(Encoder).fit(world())
    with pytest.raises(
        ValueError, match="Row 0 of column 0 .* is the text 'a red cat'"
    ):
        encoder.encode(["a red cat"], "text")
