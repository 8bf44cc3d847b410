"""Cross-modal encoders: rows by themselves, the papers' networks, training, tokens, bad input."""

import math
import pickle
from itertools import combinations

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import torch.nn.functional as F
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
from sklembed.nn.losses import info_nce, structure_loss

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
        "batch_size": 16,
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


def same_weights(one, other, **tolerance):
    assert one.weights_.keys() == other.weights_.keys()
    for name, value in one.weights_.items():
        np.testing.assert_allclose(
            value, other.weights_[name], err_msg=name, **tolerance
        )


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
    encoder = small(Encoder, structure_weight=1.0).fit(
        np.vstack([X[:30], 100 * lone, X[30:]])
    )
    same_weights(encoder, small(Encoder, structure_weight=1.0).fit(X), rtol=0)
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
    defaults = {"n_heads": 4, "dropout": 0.0, "temperature": 0.07, "mixup": False}
    defaults |= {"chunk_size": None, "dim_feedforward": 16, "input_dropout": 0.0}
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


@each_encoder
def test_parameters_are_counted_without_moments(Encoder):
    encoder = small(Encoder).fit(world())
    assert encoder.n_parameters_ == count(encoder._fitted_network())


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
    """Five rows of up to four tokens, and which of these there are."""
    there = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    return torch.randn(5, 4, 8, generator=seeded()), there


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_layer_is_torch_s_own(layer, tokens, training):
    x, there = tokens
    theirs = torch_s_layer(layer, 2).train(training)
    with torch.set_grad_enabled(
        training
    ):  # without gradients torch takes its fast path
        expected = theirs(x, src_key_padding_mask=~there)
    torch.testing.assert_close(
        layer(x, x, there)[there], expected[there], atol=1e-5, rtol=1e-4
    )


def test_attention_over_one_vector_does_not_depend_on_the_query(layer):
    one, there = (
        torch.randn(5, 1, 8, generator=seeded()),
        torch.ones(5, 1, dtype=torch.bool),
    )
    queries = torch.randn(2, 5, 3, 8, generator=seeded(1))
    first, second = (layer._attend(query, one, there) for query in queries)
    torch.testing.assert_close(first, second)
    # so what tells the queries apart is the residual alone
    assert (
        layer(queries[0], one, there) - layer(queries[1], one, there)
    ).abs().max() > 0.1
    two, both = one.repeat(1, 2, 1) * torch.tensor([[1.0], [-1.0]]), there.repeat(1, 2)
    first, second = (layer._attend(query, two, both) for query in queries)
    assert (first - second).abs().max() > 1e-3


def test_the_released_adaptor_s_cross_attention_is_self_attention_over_one_vector():
    """arXiv 2401.01179: ``Layer(src=img, query=txt, key=value=img)``, residual around src."""
    adaptor = shaken(network(AdaptorNetwork, [(1, 5), (1, 7)], 8, seeded(), n_heads=2))
    text, image = (torch.randn(6, 1, n, generator=seeded(n)) for n in (5, 7))
    there = torch.ones(6, 1, dtype=torch.bool)
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
        found = adaptor.unit(x, there, modality)
        torch.testing.assert_close(
            found, F.normalize(expected[:, 0], dim=-1), atol=1e-5, rtol=1e-4
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
    x, there = tokens
    for modality in (0, 1):
        expected = []
        for row, mask in zip(x, there, strict=True):
            projected = shared.projections[modality](row[mask])
            context = shared.context_network(shared.contexts[modality])
            u = naive_fusion(shared.fusions[0], projected, context)
            expected.append((u + theirs(shared.norms[0](u)[None])[0]).mean(dim=0))
        found = shared.encode(x, there, modality)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ATTENTION_FUSIONS)
def test_a_context_s_attention_over_one_vector_is_blind(kind):
    """Which is why these fusions are refused for pooled blocks."""
    with torch.random.fork_rng():
        fusion = ContextFusion(kind, 8)
    one, there = (
        torch.randn(5, 1, 8, generator=seeded()),
        torch.ones(5, 1, dtype=torch.bool),
    )
    contexts = torch.randn(2, 8, generator=seeded(1))
    torch.testing.assert_close(
        fusion(one, contexts[0], there), fusion(one, contexts[1], there)
    )


def test_a_context_tells_modalities_apart():
    shared = network(SharedFusionNetwork, [(1, 8), (1, 8)], 8, seeded())
    assert not torch.equal(*shared.embedded_contexts())
    shared.projections[1].load_state_dict(shared.projections[0].state_dict())
    x, there = (
        torch.randn(5, 1, 8, generator=seeded()),
        torch.ones(5, 1, dtype=torch.bool),
    )
    assert not torch.allclose(
        shared.unit(x, there, 0), shared.unit(x, there, 1), atol=1e-3
    )


def test_modalities_may_have_layers_of_their_own():
    shared = network(
        SharedFusionNetwork, [(1, 8), (1, 8)], 8, seeded(), share_layer=False
    )
    x, there = (
        torch.randn(5, 1, 8, generator=seeded()),
        torch.ones(5, 1, dtype=torch.bool),
    )
    before = [shared.unit(x, there, modality) for modality in (0, 1)]
    for part in (shared.fusions, shared.norms, shared.layers):
        shaken(part[1])
    torch.testing.assert_close(shared.unit(x, there, 0), before[0])
    assert (shared.unit(x, there, 1) - before[1]).abs().max() > 0.01


def test_without_layers_the_adaptor_is_a_projection(tokens):
    x, there = tokens
    for n_queries in (0, 3):
        adaptor = network(
            AdaptorNetwork, [(4, 8)], 8, seeded(), n_layers=0, n_queries=n_queries
        )
        expected = masked_mean(F.normalize(adaptor.projections[0](x), dim=-1), there)
        if n_queries:
            expected = expected + adaptor.queries.mean(dim=0)
        torch.testing.assert_close(adaptor.encode(x, there, 0), expected)


def test_the_scale_of_similarities_stays_in_its_bounds_and_can_come_back():
    X = torch.from_numpy(world(10))[None]
    made = network(AdaptorNetwork, [(1, 5), (1, 7)], 8, seeded())
    for training in (True, False):
        for scale, bound in ((-3.0, 0.0), (9.0, math.log(100))):
            with torch.no_grad():
                made.log_scale.fill_(scale)
            out = made.train(training)(X)
            assert out.log_scale.item() == pytest.approx(bound)
            (gradient,) = torch.autograd.grad(
                info_nce(*out.z.unbind(1), out.log_scale), out[2]
            )
            assert gradient != 0


def test_a_mean_is_that_of_the_tokens_that_are_there(tokens):
    x, there = tokens
    there[1] = False
    expected = [row[mask].mean(dim=0) for row, mask in zip(x, there, strict=True)]
    expected[1] = torch.zeros(8)
    torch.testing.assert_close(masked_mean(x, there), torch.stack(expected))


# Training


@each_encoder
def test_partners_that_were_never_seen_find_each_other(Encoder):
    X = world(400)
    encoder = small(Encoder, n_components=16, max_epochs=30, batch_size=64, lr=0.003)
    encoder.fit(X[:300])
    similarities = [epoch["positive_similarity"] for epoch in encoder.history_]
    assert similarities[-1] > similarities[0]
    assert encoder.history_[-1]["negative_similarity"] < similarities[-1] - 0.5
    assert encoder.score(X[300:]) > 0.3  # of a hundred


@each_encoder
def test_tokens_find_their_partners_too(Encoder):
    X = in_tokens(world(300))
    encoder = small(Encoder, blocks=COLUMNS, max_epochs=30, batch_size=64, lr=0.01)
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
    there = torch.rand(9, 3, generator=seeded()) < 0.7
    inputs = [torch.randn(9, 5, generator=seeded(i)) for i in range(3)]
    embedded = Embedded(z, there, torch.tensor(1.0), inputs)
    codes = torch.arange(9)[:, None].expand(9, 3) // torch.tensor([1, 2, 1])
    objective = crossmodal._Objective(0.75, 0.5, True)
    expected = 0.0
    for a, b in combinations(range(3), 2):
        same = (codes[:, None, a] == codes[:, a]) | (codes[:, None, b] == codes[:, b])
        pairs = there[:, a] & there[:, b]
        options = {"there": pairs, "same": same, "direction_weight": 0.75}
        expected += info_nce(z[:, a], z[:, b], torch.tensor(1.0), **options) / 3
    for i in range(3):
        expected += 0.5 * structure_loss(inputs[i][there[:, i]], z[there[:, i], i]) / 3
    torch.testing.assert_close(objective(embedded, codes[None], None), expected[None])


@each_encoder
def test_rows_that_hold_the_same_are_no_negatives(Encoder):
    X = world()
    X[1:, BLOCKS["text"]] = X[0, BLOCKS["text"]]  # one caption for all pictures but one
    X[0, BLOCKS["text"]] += 5
    once = {"batch_size": 60, "max_epochs": 1}
    losses = [
        small(Encoder, **once, **options).fit(X).history_[0]["train_loss"]
        for options in ({}, {"mask_duplicates": False}, {"mixup": True})
    ]
    assert losses[0] < 0.7 * losses[1]
    assert losses[2] > 1.1 * losses[0]  # mixtures differ
    X[0, BLOCKS["text"]] = X[1, BLOCKS["text"]]
    with pytest.raises(ValueError, match="The 60 pairs with 'text' all hold the same"):
        small(Encoder).fit(X)


def test_score_is_recall_both_ways_and_knows_what_is_the_same():
    X = world(40)
    X[20:30, BLOCKS["text"]] = X[:10, BLOCKS["text"]]
    X[30:40, BLOCKS["image"]] = X[
        20:30, BLOCKS["image"]
    ]  # so that row 0 goes with 20, and with 30
    rows = np.r_[np.arange(20), np.arange(10), np.arange(10)]
    encoder = small(SharedFusionEncoder, max_epochs=5).fit(X)
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
        out = shaken(made).train()(X[None])
        drawn = generator.get_state()
        info_nce(*out.z.unbind(1), out.log_scale, there=out.there.all(dim=1)).backward()
        assert torch.equal(
            generator.get_state(), drawn
        )  # the second pass draws nothing new
        return out.z.detach(), {
            name: value.grad for name, value in made.named_parameters()
        }

    found = run(chunk_size)
    if dropout:
        monkeypatch.setattr(networks, "checkpoint", lambda run, *args, **_: run(*args))
    expected = run(chunk_size if dropout else None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@each_encoder
def test_fitting_in_chunks_is_fitting_at_once(Encoder):
    X = world()
    options = {"dropout": 0.0, "batch_size": 60, "max_epochs": 3}
    whole = small(Encoder, **options).fit(X)
    same_weights(small(Encoder, chunk_size=7, **options).fit(X), whole, atol=1e-4)


def test_mixup_mixes_all_modalities_of_a_row_alike():
    X = torch.from_numpy(world(10))[:, :5]
    pairs = torch.cat(
        [X, 2 * X - 1], dim=1
    )  # what holds between modalities holds of a mixture
    made = network(AdaptorNetwork, [(1, 5), (1, 5)], 8, seeded(), mixup=True)
    a, b = made._mixed(made.unpack(pairs))
    torch.testing.assert_close(b, 2 * a - 1)
    assert not torch.allclose(a[:, 0], X)
    assert (a.amax(dim=(0, 1)) <= X.amax(dim=0) + 1e-6).all()
    plain = network(AdaptorNetwork, [(1, 5), (1, 5)], 8, seeded(), mixup=False)
    torch.testing.assert_close(made.eval()(pairs[None]).z, plain.eval()(pairs[None]).z)
    assert not torch.allclose(made.train()(pairs[None]).z, plain(pairs[None]).z)


@each_encoder
def test_structure_weight_keeps_neighbours(Encoder):
    X = world(100)

    def changed(weight):
        encoder = small(Encoder, structure_weight=weight, max_epochs=15, lr=0.01).fit(X)
        text = torch.from_numpy(StandardScaler().fit_transform(X[:, BLOCKS["text"]]))
        return structure_loss(
            text.float(), torch.from_numpy(own(encoder.transform(X), "text"))
        )

    assert changed(30.0) < 0.8 * changed(0.0)


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
def test_the_temperature_is_learnt_within_its_bounds(Encoder, lr):
    encoder = small(Encoder, lr=lr, max_epochs=3, dropout=0.0, early_stopping=True)
    encoder.set_params(validation_fraction=0.3).fit(world())
    assert 0.01 <= encoder.temperature_ <= 1
    assert (encoder.temperature_ == pytest.approx(0.07)) == (lr == 1e-9)


@each_encoder
def test_early_stopping_goes_back_to_the_best_epoch(Encoder):
    X = world(200)
    X += np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    options = {
        "early_stopping": True,
        "n_iter_no_change": 3,
        "validation_fraction": 0.3,
    }
    encoder = small(Encoder, max_epochs=100, lr=0.02, **options).fit(X)
    losses = [epoch["valid_loss"] for epoch in encoder.history_]
    best = int(np.argmin(losses)) + 1
    assert encoder.n_iter_ == best + 3 < 100
    assert all(
        math.isfinite(epoch["positive_similarity"]) for epoch in encoder.history_
    )
    again = small(Encoder, max_epochs=best, lr=0.02, **options).fit(X)
    same_weights(encoder, again, rtol=0)


@each_encoder
def test_a_warm_start_goes_on(Encoder):
    X = world()
    encoder = small(Encoder, warm_start=True).fit(X)
    first, moments = encoder.history_[-1]["train_loss"], encoder.weights_["mean_0"]
    encoder.fit(X + 1)
    assert [epoch["epoch"] for epoch in encoder.history_] == [1, 2, 3, 4]
    assert encoder.n_iter_ == 4
    np.testing.assert_array_equal(encoder.weights_["mean_0"], moments)
    encoder.set_params(max_epochs=20).fit(X)
    assert encoder.history_[-1]["train_loss"] < first
    still = small(Encoder, warm_start=True, lr=1e-12, max_epochs=1).fit(X).fit(X)
    losses = [epoch["train_loss"] for epoch in still.history_]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # of other batches
    with pytest.raises(
        ValueError, match="another structure than the parameters ask for.* Clone"
    ):
        encoder.set_params(n_components=4).fit(X)
    with pytest.raises(ValueError, match="X has 11 features, but .* is expecting 12"):
        encoder.fit(X[:, :11])
    assert (
        encoder.set_params(warm_start=False, blocks=COLUMNS).fit(X[:, :2]).n_iter_ == 20
    )


@each_encoder
def test_skorch_options_device_and_verbosity_reach_training(Encoder, capsys):
    epochs = []

    class Counts(Callback):
        def on_epoch_end(self, net, **_):
            epochs.append(net.device)

    X = world()
    plain = small(Encoder, device="cpu").fit(X)
    assert not capsys.readouterr().out
    options = {
        "skorch_params": {"callbacks": [Counts()]},
        "device": "cpu",
        "verbose": 1,
    }
    same_weights(small(Encoder, **options).fit(X), plain, rtol=0)
    assert epochs == [torch.device("cpu")] * 2
    assert "train_loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="device='nowhere' cannot be used here"):
        small(Encoder, device="nowhere").fit(X)
    with pytest.raises(ValueError, match="skorch_params sets criterion"):
        small(Encoder, skorch_params={"criterion": None}).fit(X)


@each_encoder
def test_fewer_pairs_than_a_batch_are_one_batch(Encoder):
    X = world(5)
    encoder = small(Encoder, batch_size=1000).fit(X)
    same_weights(small(Encoder, batch_size=5).fit(X), encoder, rtol=0)
    assert small(Encoder).fit(X[:2]).transform(X).shape == (5, 16)


@each_encoder
def test_a_space_that_has_collapsed_is_told_of(Encoder, monkeypatch):
    monkeypatch.setattr(crossmodal, "_COLLAPSED", -1.0)
    with pytest.warns(
        UserWarning, match=f"{Encoder.__name__} has collapsed: rows that are no pai"
    ):
        small(Encoder).fit(world())


def test_contexts_that_have_collapsed_are_told_of(monkeypatch):
    X = world(blocks=THREE)
    encoder = small(SharedFusionEncoder, blocks=THREE).fit(X)  # which warns of nothing
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
    encoder = small(Encoder, blocks=THREE, max_epochs=20, batch_size=64, lr=0.01).fit(X)
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
    search = GridSearchCV(
        small(Encoder), {"lr": [1e-9, 0.003], "max_epochs": [20]}, cv=2
    )
    assert search.fit(world(100)).best_params_["lr"] == 0.003


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
    with pytest.raises(ValueError, match="polars does not have"):
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
def test_what_no_space_can_be_learnt_from_is_refused(Encoder):
    X = world()
    with pytest.raises(
        ValueError, match=r"at least two modalities, but .* blocks \['all'\] only"
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
        ValueError, match="n_components=8 cannot be split among n_heads=3"
    ):
        small(Encoder, n_heads=3).fit(X)
    with pytest.raises(
        ValueError, match=r"mixup mixes vectors, but \['text', 'image'\] are tok"
    ):
        small(Encoder, mixup=True, blocks=COLUMNS).fit(in_tokens(X))
    with pytest.raises(
        ValueError, match=r"validation_fraction=0\.1 holds 1 of 10 pairs back"
    ):
        small(Encoder, early_stopping=True).fit(X[:10])
    with pytest.raises(
        ValueError, match=r"holds 3 of 4 pairs back"
    ):  # and trains on one
        small(Encoder, early_stopping=True, validation_fraction=0.7).fit(X[:4])


@pytest.mark.parametrize("fusion", ATTENTION_FUSIONS)
def test_attention_over_pooled_blocks_is_refused(fusion):
    with pytest.raises(
        ValueError, match=f"fusion='{fusion}' is an attention .* 'text' holds one"
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
        ValueError, match="'text' holds a column of tokens, but held numbers in"
    ):
        of_numbers.transform(cells)
    with pytest.raises(
        ValueError, match="'text' holds a column of tokens among its 2 columns"
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
        "max_epochs": 30,
        "dropout": 0.0,
        "lr": 0.005,
        "n_components": 16,
    }
    adaptor = small(CrossAttentionAdaptor, output="tokens", **options).fit(X[:150])
    z = [
        np.stack([cell.mean(axis=0) for cell in column])
        for column in adaptor.transform(X[150:]).T
    ]
    assert retrieval_recall(*z) > 0.5


def test_the_order_of_modalities_does_not_matter():
    made = [
        networks.SharedFusionNetwork(
            shapes,
            8,
            fusion="add",
            n_heads=2,
            dim_feedforward=16,
            share_layer=True,
            dropout=0.0,
            input_dropout=0.0,
            temperature=0.07,
            mixup=False,
            chunk_size=None,
            generator=torch.Generator().manual_seed(0),
        ).eval()
        for shapes in ([(1, 5), (1, 7)], [(1, 7), (1, 5)])
    ]
    ones = [(torch.zeros(w), torch.ones(w)) for w in (5, 7)]
    made[0].initialize(ones)
    state = made[0].state_dict()

    def swapped(name):
        for a, b in (
            ("projections.0", "projections.1"),
            ("mean_0", "mean_1"),
            ("scale_0", "scale_1"),
        ):
            for one, other in ((a, b), (b, a)):
                if name.startswith(one):
                    return other + name[len(one) :]
        return name

    other = {name: state[swapped(name)] for name in state}
    other["contexts"] = state["contexts"].flip(0)
    made[1].load_state_dict(other)
    X = torch.from_numpy(world())
    one, two = made[0](X[None]), made[1](X[:, [*range(5, 12), *range(5)]][None])
    torch.testing.assert_close(one.z, two.z.flip(1))
    codes = torch.arange(60)[None, :, None].expand(1, 60, 2)
    losses = [
        crossmodal._Objective(w, 0.0, True)(e, codes, None)
        for w, e in ((0.7, one), (0.3, two))
    ]
    torch.testing.assert_close(*losses)


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
