"""Losses and affinities against naive loops, their gradients, and custom losses."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss

from sklembed.nn.losses import (
    AFFINITIES,
    LOSSES,
    CustomLoss,
    binary_cross_entropy,
    cross_entropy,
    dice_loss,
    focal_loss,
    info_nce,
    label_affinity,
    level_affinity,
    overlap_affinity,
    pairwise_bce,
    rank_affinity,
    squared_error,
    supcon,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return z, torch.tensor([0, 1, 0, 2, 1, 0, 3])  # class 2 and 3 have one row each


def soft_affinity(n, seed=0):
    drawn = torch.rand(
        n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    affinity = (drawn + drawn.T) / 2
    affinity[0] = affinity[:, 0] = 0.0  # a row without positives
    return affinity.fill_diagonal_(1.0)


def row_weights(n):
    return torch.tensor(
        [1.0, 0.0, 2.5, 0.3, 1.0, 0.0, 4.0, 0.7][:n], dtype=torch.float64
    )


def naive_similarity(z, i, j, similarity):
    product = float(z[i] @ z[j])
    if similarity == "cosine":
        return product / float(z[i].norm() * z[j].norm())
    return product


def naive_bce(z, affinity, weight, temperature, similarity):
    total, count = 0.0, 0.0
    for i in range(len(z)):
        for j in range(i + 1, len(z)):
            s = naive_similarity(z, i, j, similarity) / temperature
            pair = float(weight[i] * weight[j])
            total += pair * (math.log(1 + math.exp(s)) - float(affinity[i, j]) * s)
            count += pair
    return total / count


def naive_supcon(z, affinity, weight, temperature, similarity):
    total, count = 0.0, 0.0
    for i in range(len(z)):
        partition, positives, mass = 0.0, 0.0, 0.0
        for j in range(len(z)):
            if j == i:
                continue
            s = naive_similarity(z, i, j, similarity) / temperature
            share = float(weight[j] * affinity[i, j])
            partition += float(weight[j]) * math.exp(s)
            positives += share * s
            mass += share
        if weight[i] == 0 or mass == 0:
            continue
        total += float(weight[i]) * (math.log(partition) - positives / mass)
        count += float(weight[i])
    return total / count


NAIVE = {"pairwise_bce": naive_bce, "supcon": naive_supcon}


def test_every_loss_has_a_naive_twin():
    assert NAIVE.keys() == LOSSES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_double_loop(batch, name, similarity, soft, weighted, dtype):
    z, labels = batch
    z = z.detach().to(dtype)
    affinity = soft_affinity(7).to(dtype) if soft else label_affinity(labels)
    weight = row_weights(7).to(dtype) if weighted else None
    loss = LOSSES[name](z, affinity, weight, temperature=0.5, similarity=similarity)
    row_weight = torch.ones(7) if weight is None else weight
    expected = NAIVE[name](z, affinity, row_weight, 0.5, similarity)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(
        expected, rel=1e-9 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(batch, name, similarity, weighted):
    z, labels = batch
    affinity, weight = label_affinity(labels), row_weights(7) if weighted else None
    assert torch.autograd.gradcheck(
        lambda z: LOSSES[name](
            z, affinity, weight, temperature=0.5, similarity=similarity
        ),
        (z,),
    )


# Weights


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_zero_are_ignored(batch, name, similarity):
    z, _ = batch
    affinity, weight = soft_affinity(7), row_weights(7)
    mask = weight > 0
    options = {"temperature": 0.1, "similarity": similarity}
    loss = LOSSES[name](z, affinity, weight, **options)
    without = LOSSES[name](z[mask], affinity[mask][:, mask], weight[mask], **options)
    torch.testing.assert_close(loss, without)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient[~mask], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_zero_are_ignored_whatever_their_length(name, dtype):
    """Inner products are unbounded: padding may have the largest similarity."""
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    z[5] = 100 * z[0]
    affinity = label_affinity(torch.tensor([0, 0, 1, 1, 2, 2]))
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(
        LOSSES[name](z, affinity, weight, similarity="dot"),
        LOSSES[name](z[:5], affinity[:5, :5], weight[:5], similarity="dot"),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_are_no_weights(batch, name):
    z, labels = batch
    affinity, ones = label_affinity(labels), torch.ones(7, dtype=z.dtype)
    torch.testing.assert_close(
        LOSSES[name](z, affinity, ones), LOSSES[name](z, affinity)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_of_weights_moves_no_gradient(batch, name):
    z, labels = batch
    affinity, weight = label_affinity(labels), row_weights(7)
    (once,) = torch.autograd.grad(LOSSES[name](z, affinity, weight), z)
    (thrice,) = torch.autograd.grad(LOSSES[name](z, affinity, 3 * weight), z)
    torch.testing.assert_close(once, thrice)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_may_be_of_lower_precision_than_projections(batch, name):
    z, labels = batch
    affinity, weight = label_affinity(labels), torch.tensor([1.0, 0, 2, 1, 1, 0, 4])
    torch.testing.assert_close(
        LOSSES[name](z, affinity, weight), LOSSES[name](z, affinity, weight.double())
    )


def test_supcon_counts_a_negative_of_weight_two_twice(batch):
    """The repeated row is only a negative: its affinity to all other rows is 0."""
    z, labels = batch
    twice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    affinity = label_affinity(torch.arange(8))
    affinity[0, 2] = affinity[2, 0] = 1.0
    doubled = supcon(z[twice], affinity)
    weighted = supcon(
        z, affinity[:7, :7], torch.tensor([1.0, 1, 1, 1, 1, 1, 2]).double()
    )
    torch.testing.assert_close(doubled, weighted)


# Several networks at once


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_stacked_batches_give_what_each_alone_gives(name, weighted, similarity):
    z = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2)).round(
        decimals=1
    )
    losses = LOSSES[name](
        z, label_affinity(labels), weight if weighted else None, similarity=similarity
    )
    assert losses.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = LOSSES[name](
                z[i, j],
                label_affinity(labels[i, j]),
                weight[i, j] if weighted else None,
                similarity=similarity,
            )
            torch.testing.assert_close(losses[i, j], alone)


def test_one_empty_batch_leaves_the_gradients_of_the_others_alone():
    z = torch.randn(2, 4, 3, requires_grad=True)
    affinity = label_affinity(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]))
    weight = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    losses = supcon(z, affinity, weight)
    losses.sum().backward()
    assert losses[1] == 0
    assert torch.equal(z.grad[1], torch.zeros(4, 3))
    assert z.grad[0].abs().sum() > 0


# Nothing to contrast


@pytest.mark.parametrize(
    "weight", [None, 1.0, 0.0], ids=["no weights", "ones", "zeros"]
)
@pytest.mark.parametrize(
    "labels", [[0, 1, 2], [0], []], ids=["no positive", "one row", "no row"]
)
def test_supcon_without_positives_is_zero_with_zero_gradients(labels, weight):
    z = torch.randn(len(labels), 4, requires_grad=True)
    weight = None if weight is None else torch.full((len(labels),), weight)
    loss = supcon(z, label_affinity(torch.tensor(labels)), weight)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_weight_is_zero_with_zero_gradients(batch, name, similarity):
    z, labels = batch
    loss = LOSSES[name](
        z, label_affinity(labels), torch.zeros(7, dtype=z.dtype), similarity=similarity
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("weight", [None, torch.ones(1)], ids=["no weights", "ones"])
def test_bce_of_one_row_is_zero_with_zero_gradients(weight):
    z = torch.randn(1, 4, requires_grad=True)
    loss = pairwise_bce(z, torch.ones(1, 1), weight)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_zeros_give_no_nan(name):
    z = torch.zeros(4, 3, requires_grad=True)
    loss = LOSSES[name](z, label_affinity(torch.tensor([0, 0, 1, 1])))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_bce_of_different_classes_at_cosine_zero_is_log_two():
    """The paper's logit has no bias: a pair at cosine 0 sits on the fence, whatever its labels."""
    loss = pairwise_bce(torch.eye(2), label_affinity(torch.tensor([0, 1])))
    assert loss.item() == pytest.approx(math.log(2))


def test_supcon_takes_fractional_affinities():
    """The loss scales affinities to sum to one, so a constant factor has no effect."""
    z, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    affinity = label_affinity(labels)
    torch.testing.assert_close(supcon(z, affinity * 0.25), supcon(z, affinity))


# Affinities


def naive_label(a, b):
    return float(a == b)


def naive_overlap(a, b):
    a, b = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return len(a & b) / len(a | b) if a | b else 0.0


def naive_rank(a, b, width=0.1):
    gap = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / len(a)
    return math.exp(-gap / (2 * width**2))


def naive_level(a, b):
    agreeing = 0
    for p, q in zip(a, b, strict=True):
        if p != q:
            break
        agreeing += 1
    return agreeing / len(a)


def targets(kind):
    rng = np.random.default_rng(0)
    return {
        "multiclass": rng.integers(0, 3, 9),
        "multilabel": (rng.random((9, 4)) < [[0.5]] * 8 + [[0.0]]).astype(np.float32),
        "continuous": (rng.permutation(18).reshape(9, 2) / 17).astype(np.float32),
        "hierarchical": rng.integers(0, 2, (9, 3)),
    }[kind]


NAIVE_AFFINITIES = {
    "multiclass": naive_label,
    "multilabel": naive_overlap,
    "continuous": naive_rank,
    "hierarchical": naive_level,
}


@pytest.mark.parametrize("kind", AFFINITIES)
def test_affinities_equal_the_double_loop(kind):
    y = targets(kind)
    affinity = AFFINITIES[kind](torch.from_numpy(y)).numpy()
    expected = np.array([[NAIVE_AFFINITIES[kind](a, b) for b in y] for a in y])
    np.testing.assert_allclose(affinity, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(affinity, affinity.T)
    assert (affinity >= 0).all()
    assert (affinity <= 1).all()
    alone = (y == 0).all(axis=1) if kind == "multilabel" else np.zeros(9, dtype=bool)
    np.testing.assert_array_equal(affinity.diagonal(), ~alone)


@pytest.mark.parametrize("kind", AFFINITIES)
def test_affinities_of_stacked_batches_are_those_of_each(kind):
    y = torch.from_numpy(targets(kind))
    stacked = AFFINITIES[kind](torch.stack([y, y.flip(0)]))
    torch.testing.assert_close(stacked[0], AFFINITIES[kind](y))
    torch.testing.assert_close(stacked[1], AFFINITIES[kind](y.flip(0)))


def test_one_label_each_is_a_class_each():
    labels = torch.tensor([0, 1, 2, 1, 0])
    indicators = torch.nn.functional.one_hot(labels).float()
    torch.testing.assert_close(overlap_affinity(indicators), label_affinity(labels))


def test_one_level_is_a_class_each():
    labels = torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(level_affinity(labels[:, None]), label_affinity(labels))


def test_equal_names_below_a_parting_say_nothing():
    levels = torch.tensor([[0, 5, 5], [1, 5, 5], [0, 4, 5]])
    expected = torch.tensor([[1, 0, 1 / 3], [0, 1, 0], [1 / 3, 0, 1]])
    torch.testing.assert_close(level_affinity(levels), expected)


def test_a_narrow_kernel_keeps_only_equal_ranks_together():
    ranks = torch.tensor([[0.0], [0.5], [0.5], [1.0]])
    torch.testing.assert_close(
        rank_affinity(ranks, width=1e-3), label_affinity(ranks[:, 0])
    )


# Custom losses


def stacked_batch(n_networks=2, n=6):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n_networks, n, 4, generator=generator)
    return z, torch.randint(0, 2, (n_networks, n), generator=generator)


def test_a_function_takes_affinities():
    affinities = []

    def loss(z, affinity):
        affinities.append(affinity)
        return supcon(z, affinity)

    z, y = stacked_batch()
    losses = CustomLoss(loss, label_affinity, 2)(z, y, None)
    torch.testing.assert_close(losses, supcon(z, label_affinity(y)))
    for affinity, labels in zip(affinities, y, strict=True):
        torch.testing.assert_close(affinity, label_affinity(labels))


class LabelSum(torch.nn.Module):
    def forward(self, z, labels):
        assert labels.shape == z.shape[:1]
        return z.sum() + labels.sum()


def test_a_module_takes_labels():
    z, y = stacked_batch()
    losses = CustomLoss(LabelSum(), label_affinity, 2)(z, y, None)
    torch.testing.assert_close(losses, z.sum(dim=(1, 2)) + y.sum(dim=1))


def test_the_loss_of_pytorch_metric_learning_equals_supcon():
    z, y = stacked_batch()
    theirs = CustomLoss(SupConLoss(temperature=0.1), label_affinity, 2)(z, y, None)
    torch.testing.assert_close(theirs, supcon(z, label_affinity(y), temperature=0.1))


def test_networks_do_not_share_the_parameters_of_a_module():
    z, y = stacked_batch()
    module = ProxyAnchorLoss(num_classes=2, embedding_size=4)
    before = module.proxies.detach().clone()
    loss = CustomLoss(module, label_affinity, 2)
    first, second = loss.parameters()
    torch.testing.assert_close(first, second)
    loss(z, y, None)[0].backward()
    assert first.grad.abs().sum() > 0
    assert second.grad is None or not second.grad.any()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert not torch.equal(first, second)
    torch.testing.assert_close(module.proxies.detach(), before)


def test_padding_is_removed_before_a_custom_loss():
    z, y = stacked_batch()
    weight = torch.ones(2, 6)
    weight[0, 4:] = 0.0
    losses = CustomLoss(supcon, label_affinity, 2)(z, y, weight)
    torch.testing.assert_close(losses[0], supcon(z[0, :4], label_affinity(y[0, :4])))
    torch.testing.assert_close(losses[1], supcon(z[1], label_affinity(y[1])))


def mean_difference(z, affinity):
    return (z @ z.T - affinity).mean()


@pytest.mark.parametrize("loss", [mean_difference, SupConLoss()])
def test_a_batch_of_padding_alone_has_a_finite_custom_loss(loss):
    """A fold with few rows has fewer rows than batches; a mean of none of them is NaN."""
    z, y = stacked_batch()
    z.requires_grad_()
    weight = torch.tensor([[0.0] * 6, [1.0] * 6])
    losses = CustomLoss(loss, label_affinity, 2)(z, y, weight)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", [supcon, SupConLoss(temperature=0.1), LabelSum()])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_the_custom_loss_of_a_single_network_has_no_leading_axis(loss, weighted):
    z, y = stacked_batch()
    weight = None
    if weighted:
        weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    single = CustomLoss(loss, label_affinity)(z[0], y[0], weight)
    assert single.shape == ()
    stacked_weight = None if weight is None else torch.stack([weight, weight])
    stacked = CustomLoss(loss, label_affinity, 2)(z, y, stacked_weight)
    torch.testing.assert_close(single, stacked[0])


@pytest.mark.parametrize("n_networks", [None, 2])
def test_a_custom_loss_of_each_row_is_an_error(n_networks):
    z, y = stacked_batch()
    if n_networks is None:
        z, y = z[0], y[0]

    def row_losses(z, affinity):
        return z.square().sum(dim=1)

    loss = CustomLoss(row_losses, label_affinity, n_networks)
    with pytest.raises(ValueError, match=r"must return a scalar.*shape \(6,\)"):
        loss(z, y, None)


def test_a_single_network_trains_the_parameters_of_a_copy_of_the_module():
    z, y = stacked_batch()
    module = ProxyAnchorLoss(num_classes=2, embedding_size=4)
    loss = CustomLoss(module, label_affinity)
    (proxies,) = loss.parameters()
    loss(z[0], y[0], None).backward()
    assert proxies.grad.abs().sum() > 0
    assert module.proxies.grad is None
    torch.testing.assert_close(proxies, module.proxies)


def test_a_single_network_without_weight_has_a_custom_loss_of_zero():
    z, y = stacked_batch()
    z.requires_grad_()
    loss = CustomLoss(mean_difference, label_affinity)(z[0], y[0], torch.zeros(6))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


# Classes, labels and numbers


def naive_cross_entropy(logits, y):
    p = logits.exp() / logits.exp().sum()
    return -math.log(p[int(y)])


def naive_binary_cross_entropy(logits, y):
    total = 0.0
    for logit, label in zip(logits.tolist(), y.tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= label * math.log(p) + (1 - label) * math.log(1 - p)
    return total / len(y)


def naive_squared_error(outputs, y):
    total = 0.0
    for output, target in zip(outputs.tolist(), y.tolist(), strict=True):
        total += (output - target) ** 2
    return total / len(y)


GENERATOR = torch.Generator().manual_seed(0)
SUPERVISED = {
    "cross_entropy": (
        cross_entropy,
        naive_cross_entropy,
        torch.tensor([0, 2, 1, 1, 0, 2, 0]),
    ),
    "binary_cross_entropy": (
        binary_cross_entropy,
        naive_binary_cross_entropy,
        torch.randint(0, 2, (7, 3), generator=GENERATOR).double(),
    ),
    "squared_error": (
        squared_error,
        naive_squared_error,
        torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_losses_equal_the_loop_over_rows(name, weighted):
    loss, naive, y = SUPERVISED[name]
    outputs = torch.randn(
        7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    weight = row_weights(7) if weighted else None
    row_weight = torch.ones(7) if weight is None else weight
    total = 0.0
    for row in range(7):
        total += float(row_weight[row]) * naive(outputs[row].detach(), y[row])
    expected = total / float(row_weight.sum())
    value = loss(outputs, y, weight)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: loss(z, y, weight), (outputs,))


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_batch_without_weight_has_loss_zero_and_zero_gradients(name):
    loss, _, y = SUPERVISED[name]
    outputs = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    value = loss(outputs, y, torch.zeros(7, dtype=torch.float64))
    value.backward()
    assert value == 0
    assert (outputs.grad == 0).all()


@pytest.mark.parametrize("n_outputs", [1, 4])
def test_the_squared_error_is_the_mean_over_rows_and_outputs(n_outputs):
    outputs, y = torch.randn(2, 6, n_outputs)
    torch.testing.assert_close(
        squared_error(outputs, y), torch.nn.functional.mse_loss(outputs, y)
    )


# Pairs of two modalities


def two_modalities(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    a, b = (torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in (a, b))
    return a, b, torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


OBSERVED = torch.tensor([True, True, False, True, True, True, False])
SAME = label_affinity(torch.tensor([0, 1, 0, 2, 1, 0, 3])).bool()


def naive_info_nce(a, b, log_scale, observed, same, direction_weight):
    rows = [i for i in range(len(a)) if observed[i]]
    directions = ((a, b, direction_weight), (b, a, 1 - direction_weight))
    total = 0.0
    for queries, targets, direction in directions:
        for i in rows:
            partition = 0.0
            for j in rows:
                logit = float(queries[i] @ targets[j]) * math.exp(log_scale)
                if j == i:
                    positive = logit
                if j == i or not same[i, j]:
                    partition += math.exp(logit)
            total += direction * (math.log(partition) - positive)
    return total / len(rows)


@pytest.mark.parametrize("direction_weight", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("same", [None, SAME], ids=["distinct", "same"])
@pytest.mark.parametrize("observed", [None, OBSERVED], ids=["all", "observed"])
def test_info_nce_equals_the_double_loop(observed, same, direction_weight):
    a, b, log_scale = two_modalities()
    options = {"observed": observed, "same": same, "direction_weight": direction_weight}
    loss = info_nce(a, b, log_scale, **options)
    assert loss.shape == ()
    if observed is None:
        observed = torch.ones(7)
    if same is None:
        same = torch.eye(7)
    detached = a.detach(), b.detach(), log_scale.detach()
    expected = naive_info_nce(*detached, observed, same, direction_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda *inputs: info_nce(*inputs, **options), (a, b, log_scale)
    )
    swapped = options | {"direction_weight": 1 - direction_weight}
    torch.testing.assert_close(info_nce(b, a, log_scale, **swapped), loss)


def test_rows_without_a_partner_do_not_change_info_nce():
    a, b, log_scale = two_modalities()
    loss = info_nce(a, b, log_scale, observed=OBSERVED)
    torch.testing.assert_close(loss, info_nce(a[OBSERVED], b[OBSERVED], log_scale))
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert (gradient[~OBSERVED] == 0).all()
        assert (gradient[OBSERVED] != 0).any(dim=1).all()


def test_rows_with_the_same_content_are_no_negatives():
    a, b, log_scale = two_modalities(2)
    assert info_nce(a, b, log_scale) > 0
    assert info_nce(a, b, log_scale, same=torch.ones(2, 2, dtype=torch.bool)) == 0


def test_info_nce_does_not_change_its_masks():
    a, b, log_scale = two_modalities()
    observed, same = OBSERVED.clone(), SAME.clone()
    info_nce(a, b, log_scale, observed=observed, same=same)
    assert observed.equal(OBSERVED)
    assert same.equal(SAME)


@pytest.mark.parametrize("n_pairs", [0, 1])
@pytest.mark.parametrize("n_rows", [1, 7])
def test_fewer_than_two_pairs_have_loss_zero_and_zero_gradients(n_rows, n_pairs):
    a, b, log_scale = two_modalities(n_rows)
    loss = info_nce(a, b, log_scale, observed=torch.arange(n_rows) < n_pairs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (a, b, log_scale)):
        assert (gradient == 0).all()


# Pixels


MASK_LOSSES = {"focal": focal_loss, "dice": dice_loss}
each_mask_loss = pytest.mark.parametrize("name", MASK_LOSSES)


def pixels(n=5, n_classes=4, seed=0):
    """Return logits and masks of n images of 3 x 2 pixels, without the last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, 3, 2, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, n_classes - 1, (n, 3, 2), generator=generator)
    return logits.requires_grad_(), masks


def naive_pixels(logits, masks, weight):
    """Yield weight, true code and probabilities of each pixel."""
    for image, row, column in np.ndindex(masks.shape):
        scores = logits.detach()[image, :, row, column].exp()
        p = (scores / scores.sum()).tolist()
        yield float(weight[image]), int(masks[image, row, column]), p


def naive_focal(logits, masks, weight, gamma=2.0):
    total, total_weight = 0.0, 0.0
    for w, code, p in naive_pixels(logits, masks, weight):
        total -= w * (1 - p[code]) ** gamma * math.log(p[code])
        total_weight += w
    return total / total_weight


def naive_dice(logits, masks, weight):
    losses = []
    for code in range(1, logits.shape[1]):
        overlap, predicted, actual = 0.0, 0.0, 0.0
        for w, true_code, p in naive_pixels(logits, masks, weight):
            predicted += w * p[code]
            if true_code == code:
                overlap += w * p[code]
                actual += w
        if actual > 0:
            losses.append(1 - (2 * overlap + 1) / (predicted + actual + 1))
    return sum(losses) / len(losses)


NAIVE_OF_MASKS = {"focal": naive_focal, "dice": naive_dice}


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@each_mask_loss
def test_losses_of_masks_equal_the_loop_over_pixels(name, weighted, n_classes):
    logits, masks = pixels(n_classes=max(n_classes, 3))
    logits = logits[:, :n_classes]
    weight = row_weights(5) if weighted else None
    loss = MASK_LOSSES[name](logits, masks, weight)
    assert loss.shape == ()
    image_weight = torch.ones(5) if weight is None else weight
    expected = NAIVE_OF_MASKS[name](logits, masks, image_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: MASK_LOSSES[name](x, masks, weight), (logits,)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_gamma_is_the_power_of_the_error(gamma):
    logits, masks = pixels()
    loss = focal_loss(logits, masks, row_weights(5), gamma=gamma)
    assert loss.item() == pytest.approx(
        naive_focal(logits, masks, row_weights(5), gamma), rel=1e-9
    )


def test_the_focal_loss_without_gamma_is_torch_s_cross_entropy():
    logits, masks = pixels()
    loss = focal_loss(logits, masks, gamma=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, masks))
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, masks), logits
    )
    torch.testing.assert_close(gradient, expected)
    rows, codes = logits[0].permute(1, 2, 0).reshape(6, 4), masks[0].reshape(6)
    pixelwise = cross_entropy(rows, codes)  # the pixels of one image as rows
    torch.testing.assert_close(focal_loss(logits[:1], masks[:1], gamma=0.0), pixelwise)


@each_mask_loss
def test_an_image_of_weight_two_counts_twice_and_one_of_weight_zero_not_at_all(name):
    logits, masks = pixels()
    repeated = torch.tensor([0, 2, 2, 3])
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    weighted = MASK_LOSSES[name](logits, masks, weight)
    torch.testing.assert_close(
        weighted, MASK_LOSSES[name](logits[repeated], masks[repeated])
    )
    (gradient,) = torch.autograd.grad(weighted, logits)
    assert (gradient[[1, 4]] == 0).all()
    assert (gradient[[0, 2, 3]] != 0).any()


@each_mask_loss
def test_masks_without_weight_have_loss_zero_and_zero_gradients(name):
    logits, masks = pixels()
    loss = MASK_LOSSES[name](logits, masks, torch.zeros(5, dtype=torch.float64))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("scale", [20.0, 100.0, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_pixels_have_finite_gradients_right_or_wrong(gamma, scale):
    """At 1 - p = 0 a power below 1 is infinitely steep."""
    masks = torch.randint(0, 3, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    sure = torch.nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float() * scale
    for sign, wrong in ((1, False), (-1, True)):
        logits = (sign * sure).requires_grad_()
        loss = focal_loss(logits, masks, gamma=gamma)
        loss.backward()
        assert logits.grad.isfinite().all()
        assert loss.isfinite()
        assert (loss > 1) == wrong
        assert (logits.grad.abs().max() > 1e-3) == wrong


def certain(masks, n_classes):
    indicators = torch.nn.functional.one_hot(masks, n_classes)
    return 100 * indicators.permute(0, 3, 1, 2).double()


@each_mask_loss
def test_the_loss_of_perfect_masks_is_zero(name):
    _, masks = pixels()
    assert MASK_LOSSES[name](certain(masks, 4), masks).item() == pytest.approx(
        0, abs=1e-9
    )
    assert MASK_LOSSES[name](certain((masks + 1) % 3, 4), masks) > 0.5


def test_the_dice_loss_of_a_batch_without_objects_is_zero():
    logits, masks = pixels()
    loss = dice_loss(logits, torch.zeros_like(masks))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    weight = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    masks[1:] = 0  # only an image of weight 0 has objects
    assert dice_loss(logits, masks, weight) == 0


def test_the_dice_loss_ignores_background_and_absent_classes():
    logits, masks = pixels()
    masks = (masks == 1).long()  # class 1 before background
    loss = dice_loss(logits, masks)
    p = logits.softmax(dim=1)[:, 1]
    expected = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dice_loss(logits[:, [3, 1, 0, 2]], masks), loss)
