"""Contrastive losses over pair affinities in [0, 1], these affinities; losses of classes and masks.

An affinity says how much two rows belong together: 1 for the same class, 0 for different ones.
Losses never see labels, so that one code path serves every kind of target. All take leading
dimensions, for several networks trained at once, and return one number for each.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def label_affinity(labels: Tensor) -> Tensor:
    """Affinity of rows that carry one label each: 1 where the labels agree, else 0.

    Labels have the shape (..., batch), affinities (..., batch, batch).
    """
    return (labels[..., :, None] == labels[..., None, :]).float()


def overlap_affinity(indicators: Tensor) -> Tensor:
    """Affinity of rows that carry several labels: those shared over those that either carries.

    Indicators of 0 and 1 have the shape (..., batch, n_labels). Rows without labels belong with no
    row.
    """
    shared = indicators @ indicators.transpose(-2, -1)
    counts = indicators.sum(dim=-1)
    either = counts[..., :, None] + counts[..., None, :] - shared
    return shared / either.clamp(min=1.0)


def rank_affinity(ranks: Tensor, *, width: float = 0.1) -> Tensor:
    """Affinity of rows with continuous targets: a Gaussian of their distance in rank.

    Ranks are scaled to [0, 1] and have the shape (..., batch, n_outputs); `width` is the standard
    deviation of the kernel. The distance is the root mean square over the outputs.
    """
    gaps = (
        ranks[..., :, None, :] - ranks[..., None, :, :]
    )  # (..., batch, batch, n_outputs)
    return torch.exp(-gaps.square().mean(dim=-1) / (2 * width**2))


def level_affinity(levels: Tensor) -> Tensor:
    """Affinity of rows in a tree of labels: the share of levels, from the top, that agree.

    Labels have the shape (..., batch, n_levels), the coarsest level first. Below a level where two
    rows part, equal names say nothing.
    """
    agree = levels[..., :, None, :] == levels[..., None, :, :]
    return agree.float().cumprod(dim=-1).mean(dim=-1)


AFFINITIES = {
    "multiclass": label_affinity,
    "multilabel": overlap_affinity,
    "continuous": rank_affinity,
    "hierarchical": level_affinity,
}


def pair_similarity(z: Tensor, similarity: str) -> Tensor:
    """Similarity of all pairs of rows: their inner product, of unit vectors for "cosine"."""
    if similarity == "cosine":
        z = F.normalize(z, dim=-1)
    return z @ z.transpose(-2, -1)  # (..., batch, batch)


def pairwise_bce(
    z: Tensor,
    affinity: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 0.1,
    similarity: str = "cosine",
) -> Tensor:
    """Binary cross-entropy of every pair i < j (arXiv 2502.02048, section 3.1).

    The logit is the similarity over the temperature, without bias or learned scale:
    ``mean_{i<j} log(1 + exp(s_ij)) - a_ij s_ij``. The paper describes the cosine, its released
    code takes the plain inner product. With weights, the mean is that of pairs weighted by
    ``w_i w_j``.
    """
    logits = pair_similarity(z, similarity) / temperature
    # The matrix is symmetric, so the mean over i != j is that over i < j, without slow indexing.
    losses = F.softplus(logits) - affinity.to(logits.dtype) * logits
    losses = losses.masked_fill(_itself(z), 0.0)
    if weight is None:
        n = z.shape[-2]
        return losses.sum(dim=(-2, -1)) / max(n * (n - 1), 1)
    pairs = (weight[..., :, None] * weight[..., None, :]).masked_fill(_itself(z), 0.0)
    return _ratio((losses * pairs).sum(dim=(-2, -1)), pairs.sum(dim=(-2, -1)))


def supcon(
    z: Tensor,
    affinity: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 0.1,
    similarity: str = "cosine",
) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, equation 2), also of soft labels.

    For each anchor, the cross-entropy between its affinities to the other rows, scaled to sum to
    one, and the softmax of its similarities to them; averaged over the anchors that have a
    positive. A batch without any gives 0, with zero gradients. A row of weight w counts as w rows,
    as an anchor, a positive and a negative.
    """
    itself = _itself(z)
    logits = pair_similarity(z, similarity) / temperature
    affinity = affinity.to(logits.dtype).masked_fill(itself, 0.0)
    # A large finite number in place of infinity: a batch of one row must not give NaN gradients.
    others = logits.masked_fill(itself, -1e9)
    if weight is not None:
        weight = weight.to(logits.dtype)
        affinity = affinity * weight[..., None, :]
        others = (
            others
            + weight.clamp(min=torch.finfo(logits.dtype).tiny).log()[..., None, :]
        )
        others = others.masked_fill((weight == 0)[..., None, :], -1e9)
    mass = affinity.sum(dim=-1)  # (..., batch)
    losses = others.logsumexp(dim=-1) - _ratio((affinity * logits).sum(dim=-1), mass)
    anchors = (mass > 0).to(losses.dtype)
    if weight is not None:
        anchors = anchors * weight
    return _ratio((losses * anchors).sum(dim=-1), anchors.sum(dim=-1))


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of class codes (n_networks, batch), the weighted mean over the batch."""
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(
        y.shape
    )
    return _mean(losses, weight)


def binary_cross_entropy(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of indicators (n_networks, batch, n_labels), the mean over labels.

    `pos_weight` (n_labels,) weighs the rows that carry a label.
    """
    losses = F.binary_cross_entropy_with_logits(
        logits, y, pos_weight=pos_weight, reduction="none"
    )
    return _mean(losses.mean(dim=-1), weight)


def info_nce(
    a: Tensor,
    b: Tensor,
    log_scale: Tensor,
    *,
    there: Tensor | None = None,
    same: Tensor | None = None,
    direction_weight: float = 0.5,
) -> Tensor:
    """Contrastive loss of the rows of two modalities (arXiv 2403.04650; 2401.01179).

    With ``S = a b^T exp(log_scale)``, the cross-entropy of finding row i of `b` by row i of `a`,
    weighted by `direction_weight`, and that of finding `a` by `b`, by the rest; each the mean over
    rows. The papers take .5, and .75 for texts that look for pictures.

    Parameters
    ----------
    a, b : Tensor of shape (batch, n_components)
        Unit vectors; row i of both is a pair.
    log_scale : Tensor of shape ()
        Logarithm of the factor of similarities.
    there : Tensor of shape (batch,), dtype bool, or None
        Rows that are pairs; others count in no way. None: all.
    same : Tensor of shape (batch, batch), dtype bool, or None
        Rows that are no negatives of each other, as they hold the same.
    direction_weight : float
        Share of the loss of looking in `b`.

    Returns
    -------
    loss : Tensor of shape ()
        0, with zero gradients, for fewer than two pairs.
    """
    logits = a @ b.T * log_scale.exp()
    hidden = (
        torch.zeros_like(logits, dtype=torch.bool) if same is None else same.clone()
    )
    there = torch.ones_like(a[:, 0], dtype=torch.bool) if there is None else there
    hidden |= ~(there[:, None] & there)
    hidden.fill_diagonal_(False)
    logits = logits.masked_fill(hidden, -1e9)
    found = logits.diagonal()
    losses = direction_weight * (logits.logsumexp(dim=1) - found)
    losses = losses + (1 - direction_weight) * (logits.logsumexp(dim=0) - found)
    return _ratio((losses * there).sum(), there.to(losses.dtype).sum())


def structure_loss(inputs: Tensor, z: Tensor, *, temperature: float = 0.05) -> Tensor:
    """How much the rows' similarities to each other have changed (arXiv 2506.16895, level 1).

    The mean over rows of the Jensen-Shannon divergence between the softmax of a row's similarities
    before and after; vectors are scaled to unit length and centred first.
    """
    before, after = (_neighbours(x, temperature) for x in (inputs, z))
    middle = (
        ((before.exp() + after.exp()) / 2).clamp(min=torch.finfo(z.dtype).tiny).log()
    )
    divergence = (before.exp() * (before - middle) + after.exp() * (after - middle)) / 2
    return divergence.sum(dim=1).mean()


def focal_loss(
    logits: Tensor, masks: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Cross-entropy of pixels, where those that are right count less (arXiv 1708.02002, eq. 4).

    ``mean -(1 - p)^gamma log p`` with p the probability of the pixel's class. Logits have the shape
    (..., batch, n_classes, rows, columns), masks, of class codes, (..., batch, rows, columns).
    """
    log_p = logits.log_softmax(dim=-3).gather(-3, masks.unsqueeze(-3)).squeeze(-3)
    wrong = -torch.expm1(log_p).clamp(max=-torch.finfo(log_p.dtype).tiny)  # 1 - p
    losses = -(wrong**gamma) * log_p
    return _mean(losses.mean(dim=(-2, -1)), weight)


def dice_loss(logits: Tensor, masks: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far predicted and true regions are from covering each other (arXiv 1606.04797, eq. 1).

    ``1 - (2 sum p t + 1) / (sum p + sum t + 1)`` with p the probability and t the truth of a class,
    over all pixels of the batch; the mean of the classes that the batch shows, background (code 0)
    left out. A batch without any gives 0. Shapes as for `focal_loss`.
    """
    p = logits.softmax(dim=-3)[..., 1:, :, :]
    codes = torch.arange(1, logits.shape[-3], device=masks.device)
    truth = (masks.unsqueeze(-3) == codes[:, None, None]).to(p.dtype)
    pixels = 1.0 if weight is None else weight[..., None, None, None]
    parts = (p * truth, p, truth)
    both, found, shown = ((part * pixels).sum(dim=(-4, -2, -1)) for part in parts)
    losses = 1 - (2 * both + 1) / (found + shown + 1)  # (..., n_classes - 1)
    present = (shown > 0).to(losses.dtype)
    return _ratio((losses * present).sum(dim=-1), present.sum(dim=-1))


def _neighbours(x: Tensor, temperature: float) -> Tensor:
    """Logarithm of the softmax of each row's similarities to all rows."""
    x = F.normalize(x, dim=-1)
    x = x - x.mean(dim=0)
    return (x @ x.T / temperature).log_softmax(dim=1)


LOSSES = {"supcon": supcon, "pairwise_bce": pairwise_bce}


class PerNetwork(nn.Module):
    """A loss of the user's own, which knows one network and no weights, for each of several.

    A module, such as a loss of pytorch-metric-learning, is given embeddings and labels, and copied
    for each network, so that what it learns is each one's own; any other function is given
    embeddings and affinities.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        affinity: Callable[[Tensor], Tensor],
        n_networks: int,
    ) -> None:
        super().__init__()
        self.affinity = affinity
        self.losses = [copy.deepcopy(loss) for _ in range(n_networks)]
        self.takes_labels = isinstance(loss, nn.Module)
        # Registered, so that their parameters are trained and moved along.
        self.modules_to_train = nn.ModuleList(
            m for m in self.losses if isinstance(m, nn.Module)
        )

    def forward(self, z: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Apply the loss to the rows of each network, without what only fills its batch."""
        losses = []
        for network, loss in enumerate(self.losses):
            rows, labels = z[network], y[network]
            if weight is not None:
                rows, labels = rows[weight[network] > 0], labels[weight[network] > 0]
            if len(rows):
                losses.append(
                    loss(rows, labels if self.takes_labels else self.affinity(labels))
                )
            else:
                losses.append(rows.sum() * 0.0)
        return torch.stack(losses)


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Average over the batch, by weight."""
    if weight is None:
        return losses.mean(dim=-1)
    return _ratio((losses * weight).sum(dim=-1), weight.sum(dim=-1))


def _itself(z: Tensor) -> Tensor:
    """Mark the pairs of a row with itself."""
    return torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, where 0 by 0 is 0."""
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)
