"""Each loss against a naive double loop, its gradients, and batches without positives."""

import math

import pytest
import torch

from sklembed.nn.losses import LOSSES, label_affinity, pairwise_bce, supcon


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return z, torch.tensor([0, 1, 0, 2, 1, 0, 3])  # class 2 and 3 have one row each


def naive_similarity(z, i, j, similarity):
    product = float(z[i] @ z[j])
    return product / float(z[i].norm() * z[j].norm()) if similarity == "cosine" else product


def naive_bce(z, labels, temperature, similarity):
    losses = []
    for i in range(len(z)):
        for j in range(i + 1, len(z)):
            s = naive_similarity(z, i, j, similarity) / temperature
            t = float(labels[i] == labels[j])
            losses.append(math.log(1 + math.exp(s)) - t * s)
    return sum(losses) / len(losses)


def naive_supcon(z, labels, temperature, similarity):
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if not positives:
            continue
        s = {j: naive_similarity(z, i, j, similarity) / temperature for j in others}
        total = math.log(sum(math.exp(value) for value in s.values()))
        losses.append(-sum(s[j] - total for j in positives) / len(positives))
    return sum(losses) / len(losses)


NAIVE = {"pairwise_bce": naive_bce, "supcon": naive_supcon}


def test_every_loss_has_a_naive_twin():
    assert NAIVE.keys() == LOSSES.keys()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_double_loop(batch, name, similarity):
    z, labels = batch
    loss = LOSSES[name](z, label_affinity(labels), temperature=0.5, similarity=similarity)
    assert loss.item() == pytest.approx(NAIVE[name](z.detach(), labels, 0.5, similarity), rel=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(batch, name, similarity):
    z, labels = batch
    affinity = label_affinity(labels)
    assert torch.autograd.gradcheck(
        lambda z: LOSSES[name](z, affinity, temperature=0.5, similarity=similarity), (z,)
    )


@pytest.mark.parametrize("labels", [[0, 1, 2], [0]], ids=["no positive", "one row"])
def test_supcon_without_positives_is_zero_with_zero_gradients(labels):
    z = torch.randn(len(labels), 4, requires_grad=True)
    loss = supcon(z, label_affinity(torch.tensor(labels)))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_bce_of_one_row_is_zero_with_zero_gradients():
    z = torch.randn(1, 4, requires_grad=True)
    loss = pairwise_bce(z, torch.ones(1, 1))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_bce_of_different_classes_at_cosine_zero_is_log_two():
    """The paper's logit has no bias: a pair at cosine 0 sits on the fence, whatever its labels."""
    loss = pairwise_bce(torch.eye(2), label_affinity(torch.tensor([0, 1])))
    assert loss.item() == pytest.approx(math.log(2))


def test_supcon_takes_fractional_affinities():
    """An affinity scaled by a constant asks for the same distribution over the other rows."""
    z, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    affinity = label_affinity(labels)
    torch.testing.assert_close(supcon(z, affinity * 0.25), supcon(z, affinity))
