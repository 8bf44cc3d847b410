"""Losses and affinities against naive double loops, their gradients, and losses of one's own."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss

from sklembed.nn.losses import (
    AFFINITIES,
    LOSSES,
    PerNetwork,
    cross_entropy,
    dice_loss,
    focal_loss,
    info_nce,
    label_affinity,
    level_affinity,
    overlap_affinity,
    pairwise_bce,
    rank_affinity,
    structure_loss,
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
    affinity[0] = affinity[:, 0] = 0.0  # a row that belongs with no other
    return affinity.fill_diagonal_(1.0)


def row_weights(n):
    return torch.tensor(
        [1.0, 0.0, 2.5, 0.3, 1.0, 0.0, 4.0, 0.7][:n], dtype=torch.float64
    )


def naive_similarity(z, i, j, similarity):
    product = float(z[i] @ z[j])
    return (
        product / float(z[i].norm() * z[j].norm())
        if similarity == "cosine"
        else product
    )


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
        others = [j for j in range(len(z)) if j != i]
        s = {j: naive_similarity(z, i, j, similarity) / temperature for j in others}
        positive = {j: float(weight[j] * affinity[i, j]) for j in others}
        if weight[i] == 0 or sum(positive.values()) == 0:
            continue
        partition = math.log(sum(float(weight[j]) * math.exp(s[j]) for j in others))
        loss = sum(positive[j] * (partition - s[j]) for j in others) / sum(
            positive.values()
        )
        total += float(weight[i]) * loss
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
    each = torch.ones(7) if weight is None else weight
    expected = NAIVE[name](z, affinity, each, 0.5, similarity)
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
def test_a_row_of_weight_zero_is_a_row_that_is_not_there(batch, name, similarity):
    z, _ = batch
    affinity, weight = soft_affinity(7), row_weights(7)
    kept = weight > 0
    options = {"temperature": 0.1, "similarity": similarity}
    whole = LOSSES[name](z, affinity, weight, **options)
    part = LOSSES[name](z[kept], affinity[kept][:, kept], weight[kept], **options)
    torch.testing.assert_close(whole, part)
    (gradient,) = torch.autograd.grad(whole, z)
    torch.testing.assert_close(gradient[~kept], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_weight_zero_is_not_there_however_long_its_projection(name, dtype):
    """Inner products know no bound: a row that only fills its batch may be the most alike."""
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
    """Class 3 has one row, which is only a negative: repeated, it gives no new pairs but one."""
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
    """An affinity scaled by a constant asks for the same distribution over the other rows."""
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


# Losses of one's own


def stacked_batch(n_networks=2, n=6):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n_networks, n, 4, generator=generator)
    return z, torch.randint(0, 2, (n_networks, n), generator=generator)


def test_a_function_is_given_affinities():
    seen = []

    def loss(z, affinity):
        seen.append(affinity)
        return supcon(z, affinity)

    z, y = stacked_batch()
    losses = PerNetwork(loss, label_affinity, 2)(z, y, None)
    torch.testing.assert_close(losses, supcon(z, label_affinity(y)))
    for number, affinity in enumerate(seen):
        torch.testing.assert_close(affinity, label_affinity(y[number]))


class Labels(torch.nn.Module):
    def forward(self, z, labels):
        assert labels.shape == z.shape[:1]
        return z.sum() + labels.sum()


def test_a_module_is_given_labels():
    z, y = stacked_batch()
    losses = PerNetwork(Labels(), label_affinity, 2)(z, y, None)
    torch.testing.assert_close(losses, z.sum(dim=(1, 2)) + y.sum(dim=1))


def test_the_loss_of_pytorch_metric_learning_equals_ours():
    z, y = stacked_batch()
    theirs = PerNetwork(SupConLoss(temperature=0.1), label_affinity, 2)(z, y, None)
    torch.testing.assert_close(theirs, supcon(z, label_affinity(y), temperature=0.1))


def test_what_a_module_learns_is_each_network_s_own():
    z, y = stacked_batch()
    given = ProxyAnchorLoss(num_classes=2, embedding_size=4)
    before = given.proxies.detach().clone()
    loss = PerNetwork(given, label_affinity, 2)
    first, second = loss.parameters()
    torch.testing.assert_close(first, second)
    loss(z, y, None)[0].backward()
    assert first.grad.abs().sum() > 0
    assert second.grad is None or not second.grad.any()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert not torch.equal(first, second)
    torch.testing.assert_close(given.proxies.detach(), before)


def test_rows_that_only_fill_a_batch_are_kept_from_losses_of_one_s_own():
    z, y = stacked_batch()
    weight = torch.ones(2, 6)
    weight[0, 4:] = 0.0
    losses = PerNetwork(supcon, label_affinity, 2)(z, y, weight)
    torch.testing.assert_close(losses[0], supcon(z[0, :4], label_affinity(y[0, :4])))
    torch.testing.assert_close(losses[1], supcon(z[1], label_affinity(y[1])))


@pytest.mark.parametrize("loss", [lambda z, a: (z @ z.T - a).mean(), SupConLoss()])
def test_a_batch_of_nothing_but_filling_asks_losses_of_one_s_own_for_nothing(loss):
    """A fold with few rows has fewer rows than batches; a mean of none of them is NaN."""
    z, y = stacked_batch()
    z.requires_grad_()
    weight = torch.tensor([[0.0] * 6, [1.0] * 6])
    losses = PerNetwork(loss, label_affinity, 2)(z, y, weight)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(z.grad).all()


# Pairs of two modalities


def two_modalities(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    a, b = (torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in (a, b))
    return a, b, torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


THERE = torch.tensor([True, True, False, True, True, True, False])
SAME = label_affinity(torch.tensor([0, 1, 0, 2, 1, 0, 3])).bool()


def naive_info_nce(a, b, log_scale, there, same, direction_weight):
    rows = [i for i in range(len(a)) if there[i]]
    total = 0.0
    for one, other, share in ((a, b, direction_weight), (b, a, 1 - direction_weight)):
        for i in rows:
            among = [j for j in rows if j == i or not same[i, j]]
            s = {j: float(one[i] @ other[j]) * math.exp(log_scale) for j in among}
            total += share * (math.log(sum(math.exp(s[j]) for j in among)) - s[i])
    return total / len(rows)


@pytest.mark.parametrize("direction_weight", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("same", [None, SAME], ids=["distinct", "same"])
@pytest.mark.parametrize("there", [None, THERE], ids=["all", "there"])
def test_info_nce_equals_the_double_loop(there, same, direction_weight):
    a, b, log_scale = two_modalities()
    options = {"there": there, "same": same, "direction_weight": direction_weight}
    loss = info_nce(a, b, log_scale, **options)
    there = torch.ones(7) if there is None else there
    same = torch.eye(7) if same is None else same
    given = (x.detach() for x in (a, b, log_scale))
    expected = naive_info_nce(*given, there, same, direction_weight)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda *given: info_nce(*given, **options), (a, b, log_scale)
    )
    turned = options | {"direction_weight": 1 - direction_weight}
    torch.testing.assert_close(info_nce(b, a, log_scale, **turned), loss)


def test_rows_that_are_no_pairs_count_in_no_way():
    a, b, log_scale = two_modalities()
    loss = info_nce(a, b, log_scale, there=THERE)
    torch.testing.assert_close(loss, info_nce(a[THERE], b[THERE], log_scale))
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert (gradient[~THERE] == 0).all()
        assert (gradient[THERE] != 0).any(dim=1).all()


def test_rows_that_hold_the_same_do_not_push_each_other_away():
    a, b, log_scale = two_modalities(2)
    apart = info_nce(a, b, log_scale)
    assert apart > 0
    assert info_nce(a, b, log_scale, same=torch.ones(2, 2, dtype=torch.bool)) == 0
    given = torch.eye(2, dtype=torch.bool)
    info_nce(a, b, log_scale, same=given)
    assert given.equal(
        torch.eye(2, dtype=torch.bool)
    )  # what was passed is left as it was


@pytest.mark.parametrize("n_pairs", [0, 1])
@pytest.mark.parametrize("n_rows", [1, 7])
def test_fewer_than_two_pairs_teach_nothing(n_rows, n_pairs):
    a, b, log_scale = two_modalities(n_rows)
    loss = info_nce(a, b, log_scale, there=torch.arange(n_rows) < n_pairs)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (a, b, log_scale)):
        assert (gradient == 0).all()


def naive_structure(inputs, z, temperature):
    def shares(x):
        x = [row / row.norm() for row in x]
        mean = sum(x) / len(x)
        rows = []
        for i in range(len(x)):
            s = [
                math.exp(float((x[i] - mean) @ (other - mean)) / temperature)
                for other in x
            ]
            rows.append([value / sum(s) for value in s])
        return rows

    total = 0.0
    for p, q in zip(shares(inputs), shares(z), strict=True):
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        for own in (p, q):
            total += (
                sum(a * math.log(a / m) for a, m in zip(own, middle, strict=True)) / 2
            )
    return total / len(inputs)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_structure_loss_equals_the_double_loop(temperature):
    z, inputs, _ = two_modalities()
    inputs = torch.cat(
        [inputs, 3 * inputs[:, :2]], dim=1
    ).detach()  # of another width and length
    loss = structure_loss(inputs, z, temperature=temperature)
    expected = naive_structure(inputs, z.detach(), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda z: structure_loss(inputs, z, temperature=temperature), (z,)
    )


def test_turning_and_scaling_keep_the_structure():
    z, inputs, _ = two_modalities()
    turn = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    )
    assert structure_loss(inputs, 5 * inputs @ turn.Q).item() == pytest.approx(
        0, abs=1e-12
    )
    assert 0 < structure_loss(inputs, z) <= math.log(2)


def test_the_structure_loss_of_rows_far_apart_has_finite_gradients():
    z = torch.eye(6, requires_grad=True)
    loss = structure_loss(torch.ones(6, 3), z, temperature=1e-4)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# Pixels


MASK_LOSSES = {"focal": focal_loss, "dice": dice_loss}
each_mask_loss = pytest.mark.parametrize("name", MASK_LOSSES)


def pixels(n=5, n_classes=4, lead=(), seed=0):
    """Logits and masks of n pictures of 3 x 2 pixels; the last class is in none of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        *lead, n, n_classes, 3, 2, generator=generator, dtype=torch.float64
    )
    masks = torch.randint(0, n_classes - 1, (*lead, n, 3, 2), generator=generator)
    return logits.requires_grad_(), masks


def naive_pixels(logits, masks, weight):
    """List weight, true code and probabilities of each pixel."""
    found = []
    for picture in range(len(masks)):
        for row, column in np.ndindex(masks.shape[1:]):
            scores = [
                math.exp(value) for value in logits[picture, :, row, column].tolist()
            ]
            p = [score / sum(scores) for score in scores]
            found.append((float(weight[picture]), int(masks[picture, row, column]), p))
    return found


def naive_focal(logits, masks, weight, gamma=2.0):
    found = naive_pixels(logits, masks, weight)
    total = sum(-w * (1 - p[true]) ** gamma * math.log(p[true]) for w, true, p in found)
    return total / sum(w for w, _, _ in found)


def naive_dice(logits, masks, weight):
    found = naive_pixels(logits, masks, weight)
    losses = []
    for code in range(1, logits.shape[1]):
        truth = sum(w for w, true, _ in found if true == code)
        if truth > 0:
            both = sum(w * p[code] for w, true, p in found if true == code)
            predicted = sum(w * p[code] for w, _, p in found)
            losses.append(1 - (2 * both + 1) / (predicted + truth + 1))
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
    each = torch.ones(5) if weight is None else weight
    assert loss.item() == pytest.approx(
        NAIVE_OF_MASKS[name](logits, masks, each), rel=1e-9
    )
    assert torch.autograd.gradcheck(
        lambda x: MASK_LOSSES[name](x, masks, weight), (logits,)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_gamma_is_the_power_of_what_is_wrong(gamma):
    logits, masks = pixels()
    loss = focal_loss(logits, masks, row_weights(5), gamma=gamma)
    assert loss.item() == pytest.approx(
        naive_focal(logits, masks, row_weights(5), gamma), rel=1e-9
    )


def test_the_focal_loss_without_gamma_is_torch_s_cross_entropy():
    logits, masks = pixels()
    loss = focal_loss(logits, masks, gamma=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, masks))
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, masks), logits
    )
    torch.testing.assert_close(found, expected)
    picture, codes = logits[0].permute(1, 2, 0).reshape(1, 6, 4), masks[0].reshape(1, 6)
    pixelwise = cross_entropy(picture, codes)[0]  # of one picture's pixels as rows
    torch.testing.assert_close(focal_loss(logits[:1], masks[:1], gamma=0.0), pixelwise)


@each_mask_loss
def test_a_picture_of_weight_two_is_two_pictures_and_one_of_weight_zero_none(name):
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
def test_masks_without_weight_cost_nothing(name):
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


@each_mask_loss
def test_masks_of_several_networks_give_what_each_alone_gives(name):
    logits, masks = pixels(lead=(3,))
    weight = torch.stack(
        [row_weights(5), torch.ones(5).double(), row_weights(5).flip(0)]
    )
    for given in (None, weight):
        losses = MASK_LOSSES[name](logits, masks, given)
        assert losses.shape == (3,)
        for network in range(3):
            own = None if given is None else given[network]
            alone = MASK_LOSSES[name](logits[network], masks[network], own)
            torch.testing.assert_close(losses[network], alone)


def certain(masks, n_classes):
    return (
        torch.nn.functional.one_hot(masks, n_classes).permute(0, 3, 1, 2).double() * 100
    )


@each_mask_loss
def test_masks_that_are_right_cost_nothing(name):
    _, masks = pixels()
    assert MASK_LOSSES[name](certain(masks, 4), masks).item() == pytest.approx(
        0, abs=1e-9
    )
    assert MASK_LOSSES[name](certain((masks + 1) % 3, 4), masks) > 0.5


def test_a_batch_without_objects_asks_the_dice_loss_for_nothing():
    logits, masks = pixels()
    loss = dice_loss(logits, torch.zeros_like(masks))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    weight = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    masks[1:] = 0  # what is shown is shown by a picture of no weight
    assert dice_loss(logits, masks, weight) == 0


def test_the_dice_loss_leaves_background_and_absent_classes_out():
    logits, masks = pixels()
    masks = (masks == 1).long()  # class 1 before background
    loss = dice_loss(logits, masks)
    p = logits.softmax(dim=1)[:, 1]
    expected = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dice_loss(logits[:, [3, 1, 0, 2]], masks), loss)
