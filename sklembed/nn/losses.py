"""Losses, and the affinities of pairs of rows that the contrastive losses take.

An affinity in [0, 1] is the degree to which two rows belong together: 1 for the same class, 0 for
different classes. Contrastive losses take affinities in place of labels, so one implementation
serves every kind of target. Losses and affinities accept leading dimensions (...), for several
networks that are trained at once, and losses return one number for each network.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def label_affinity(labels: Tensor) -> Tensor:
    """Affinity of rows with one label each: 1 for equal labels, else 0.

    Labels have the shape (..., batch), affinities (..., batch, batch).
    """
    return (labels[..., :, None] == labels[..., None, :]).float()


def overlap_affinity(indicators: Tensor) -> Tensor:
    """Affinity of rows with several labels: the Jaccard index of their label sets.

    Indicators of 0 and 1 have the shape (..., batch, n_labels). Rows without labels have affinity
    0 with all rows.
    """
    shared = indicators @ indicators.transpose(-2, -1)
    counts = indicators.sum(dim=-1)
    union = counts[..., :, None] + counts[..., None, :] - shared
    return shared / union.clamp(min=1.0)


def rank_affinity(ranks: Tensor, *, width: float = 0.1) -> Tensor:
    """Affinity of rows with continuous targets: a Gaussian of their distance in rank.

    Ranks are scaled to [0, 1] and have the shape (..., batch, n_outputs); `width` is the standard
    deviation of the kernel. The distance is the root mean square over the outputs.
    """
    gaps = ranks[..., :, None, :] - ranks[..., None, :, :]
    mean_square = gaps.square().mean(dim=-1)  # (..., batch, batch)
    return torch.exp(-mean_square / (2 * width**2))


def level_affinity(levels: Tensor) -> Tensor:
    """Affinity of rows in a tree of labels: the fraction of levels that agree, from the top.

    Labels have the shape (..., batch, n_levels), the coarsest level first. Below the first level
    at which two rows differ, equal labels do not count.
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
    """Similarity of all pairs of rows: cosine, or inner product."""
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

    The logit is the similarity divided by the temperature, without bias or learned scale:
    ``mean_{i<j} log(1 + exp(s_ij)) - a_ij s_ij``. The paper describes the cosine; its released
    code uses the inner product. With weights, the pair i, j has weight ``w_i w_j``.
    """
    logits = pair_similarity(z, similarity) / temperature
    # The matrix is symmetric: the mean over i != j is that over i < j, without slow indexing.
    losses = F.softplus(logits) - affinity.to(logits.dtype) * logits
    losses = losses.masked_fill(_diagonal(z), 0.0)
    if weight is None:
        n = z.shape[-2]
        return losses.sum(dim=(-2, -1)) / max(n * (n - 1), 1)
    pairs = weight[..., :, None] * weight[..., None, :]
    pairs = pairs.masked_fill(_diagonal(z), 0.0)
    return _ratio((losses * pairs).sum(dim=(-2, -1)), pairs.sum(dim=(-2, -1)))


def supcon(
    z: Tensor,
    affinity: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 0.1,
    similarity: str = "cosine",
) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, equation 2), generalised to soft labels.

    The loss of an anchor is the cross-entropy between its affinities to the other rows, scaled to
    sum to one, and the softmax of its similarities to them. It is averaged over the anchors that
    have a positive. A batch without positives has loss 0 and zero gradients. A row of weight w
    counts as w rows: as an anchor, a positive and a negative.
    """
    diagonal = _diagonal(z)
    logits = pair_similarity(z, similarity) / temperature
    affinity = affinity.to(logits.dtype).masked_fill(diagonal, 0.0)
    # A large finite number in place of infinity: one row alone must not give NaN gradients.
    contrasts = logits.masked_fill(diagonal, -1e9)
    if weight is not None:
        weight = weight.to(logits.dtype)
        affinity = affinity * weight[..., None, :]
        log_weight = weight.clamp(min=torch.finfo(logits.dtype).tiny).log()
        contrasts = contrasts + log_weight[..., None, :]
        contrasts = contrasts.masked_fill((weight == 0)[..., None, :], -1e9)
    mass = affinity.sum(dim=-1)  # (..., batch)
    positives = _ratio((affinity * logits).sum(dim=-1), mass)
    losses = contrasts.logsumexp(dim=-1) - positives
    anchors = (mass > 0).to(losses.dtype)
    if weight is not None:
        anchors = anchors * weight
    return _ratio((losses * anchors).sum(dim=-1), anchors.sum(dim=-1))


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (batch, n_classes) and class codes (batch,): the weighted mean."""
    return _mean(F.cross_entropy(logits, y, reduction="none"), weight)


def binary_cross_entropy(
    logits: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of indicators (batch, n_labels), the mean over labels.

    `pos_weight` (n_labels,) is the weight of the rows with the label.
    """
    losses = F.binary_cross_entropy_with_logits(
        logits, y, pos_weight=pos_weight, reduction="none"
    )
    return _mean(losses.mean(dim=-1), weight)


def squared_error(outputs: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of outputs and targets (batch, n_outputs), the mean over outputs."""
    return _mean((outputs - y).square().mean(dim=-1), weight)


def info_nce(
    a: Tensor,
    b: Tensor,
    log_scale: Tensor,
    *,
    observed: Tensor | None = None,
    same: Tensor | None = None,
    direction_weight: float = 0.5,
) -> Tensor:
    """Contrastive loss of the rows of two modalities (arXiv 2403.04650; 2401.01179).

    With ``S = a b^T exp(log_scale)``, it is the cross-entropy of retrieving row i of `b` by row i
    of `a`, weighted by `direction_weight`, plus that of retrieving `a` by `b`. The papers use 0.5,
    and 0.75 for retrieving images by text.

    Parameters
    ----------
    a, b : Tensor of shape (batch, n_components)
        Unit vectors; row i of `a` and row i of `b` are a pair.
    log_scale : Tensor of shape ()
        Logarithm of the factor by which similarities are multiplied.
    observed : Tensor of shape (batch,), dtype bool, or None
        Rows that have both modalities; the remaining rows are ignored. None means all rows.
    same : Tensor of shape (batch, batch), dtype bool, or None
        Pairs of rows with identical content, which are not used as negatives.
    direction_weight : float
        Weight of retrieving `b` by `a`.

    Returns
    -------
    loss : Tensor of shape ()
        0, with zero gradients, for fewer than two pairs.
    """
    logits = a @ b.T * log_scale.exp()
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if same is not None:
        excluded |= same
    if observed is None:
        observed = torch.ones_like(a[:, 0], dtype=torch.bool)
    excluded |= ~(observed[:, None] & observed)
    excluded.fill_diagonal_(False)
    logits = logits.masked_fill(excluded, -1e9)
    positives = logits.diagonal()
    losses = direction_weight * (logits.logsumexp(dim=1) - positives)
    losses = losses + (1 - direction_weight) * (logits.logsumexp(dim=0) - positives)
    return _ratio((losses * observed).sum(), observed.to(losses.dtype).sum())


def focal_loss(
    logits: Tensor, masks: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Focal loss: cross-entropy with less weight on correct pixels (arXiv 1708.02002, eq. 4).

    ``mean -(1 - p)^gamma log p`` with p the probability of the pixel's class. Logits have the shape
    (batch, n_classes, rows, columns), masks of class codes (batch, rows, columns).
    """
    log_p = logits.log_softmax(dim=1).gather(1, masks.unsqueeze(1)).squeeze(1)
    # 1 - p, kept above 0 so that its power has a finite gradient.
    error = -torch.expm1(log_p).clamp(max=-torch.finfo(log_p.dtype).tiny)
    losses = -(error**gamma) * log_p
    return _mean(losses.mean(dim=(-2, -1)), weight)


def dice_loss(logits: Tensor, masks: Tensor, weight: Tensor | None = None) -> Tensor:
    """Dice loss: one minus the overlap of predicted and true regions (arXiv 1606.04797, eq. 1).

    ``1 - (2 sum p t + 1) / (sum p + sum t + 1)`` with p the probability and t the truth of a class,
    over all pixels of the batch. It is averaged over the classes in the batch except background
    (code 0); a batch without such a class has loss 0. Shapes as for `focal_loss`.
    """
    p = logits.softmax(dim=1)[:, 1:]
    codes = torch.arange(1, logits.shape[1], device=masks.device)
    truth = (masks.unsqueeze(1) == codes[:, None, None]).to(p.dtype)
    pixels = 1.0 if weight is None else weight[:, None, None, None]
    overlap = (p * truth * pixels).sum(dim=(0, 2, 3))  # (n_classes - 1,)
    predicted = (p * pixels).sum(dim=(0, 2, 3))
    actual = (truth * pixels).sum(dim=(0, 2, 3))
    losses = 1 - (2 * overlap + 1) / (predicted + actual + 1)
    present = (actual > 0).to(losses.dtype)
    return _ratio((losses * present).sum(), present.sum())


LOSSES = {"supcon": supcon, "pairwise_bce": pairwise_bce}


class CustomLoss(nn.Module):
    """Apply a user's loss, which takes one network and no weights, to each of several networks.

    A module, such as a loss of pytorch-metric-learning, takes embeddings and labels. It is copied
    for each network, so that its parameters are not shared. Any other function takes embeddings
    and affinities.

    Parameters
    ----------
    loss : callable
        The user's loss.
    affinity : callable
        Maps labels to affinities.
    n_networks : int or None
        Number of stacked networks; None is a single network without a leading axis.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        affinity: Callable[[Tensor], Tensor],
        n_networks: int | None = None,
    ) -> None:
        super().__init__()
        self.affinity = affinity
        self.stacked = n_networks is not None
        self.takes_labels = isinstance(loss, nn.Module)
        self.losses = [copy.deepcopy(loss) for _ in range(n_networks or 1)]
        if self.takes_labels:  # registered, so that their parameters are trained
            self.trained = nn.ModuleList(self.losses)  # type: ignore[arg-type]

    def forward(self, z: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Return the loss of each network, without the rows of weight 0, which are padding."""
        if not self.stacked:
            return self._one(self.losses[0], z, y, weight)
        losses = []
        for network, loss in enumerate(self.losses):
            weight_of_rows = None if weight is None else weight[network]
            losses.append(self._one(loss, z[network], y[network], weight_of_rows))
        return torch.stack(losses)

    def _one(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        y: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        if weight is not None:
            z, y = z[weight > 0], y[weight > 0]
        if not len(z):
            return z.sum() * 0.0
        result = loss(z, y if self.takes_labels else self.affinity(y))
        if result.ndim > 0:
            raise ValueError(
                f"A custom loss must return a scalar, but {loss!r} returned a tensor of shape "
                f"{tuple(result.shape)}. Average it over the batch."
            )
        return result


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Return the weighted mean over the batch."""
    if weight is None:
        return losses.mean(dim=-1)
    return _ratio((losses * weight).sum(dim=-1), weight.sum(dim=-1))


def _diagonal(z: Tensor) -> Tensor:
    """Return a mask (batch, batch) of the pairs of a row with itself."""
    return torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 / 0 is 0."""
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
