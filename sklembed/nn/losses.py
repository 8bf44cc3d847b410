"""Contrastive losses over pair affinities in [0, 1]; each takes embeddings and returns a scalar.

An affinity says how much two rows belong together: 1 for the same class, 0 for different ones.
Losses never see labels, so that one code path serves every kind of target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_affinity(labels: Tensor) -> Tensor:
    """Affinity of rows that carry one label each: 1 where the labels agree, else 0."""
    return (labels[:, None] == labels[None, :]).float()  # (batch, batch)


def pair_similarity(z: Tensor, similarity: str) -> Tensor:
    """Similarity of all pairs of rows: their inner product, of unit vectors for "cosine"."""
    if similarity == "cosine":
        z = F.normalize(z, dim=1)
    return z @ z.T  # (batch, batch)


def pairwise_bce(
    z: Tensor, affinity: Tensor, *, temperature: float = 0.1, similarity: str = "cosine"
) -> Tensor:
    """Binary cross-entropy of every pair i < j (arXiv 2502.02048, section 3.1).

    The logit is the similarity over the temperature, without bias or learned scale:
    ``mean_{i<j} log(1 + exp(s_ij)) - a_ij s_ij``. The paper describes the cosine, its released
    code takes the plain inner product.
    """
    if len(z) < 2:
        return z.sum() * 0.0
    logits = pair_similarity(z, similarity) / temperature
    # The matrix is symmetric, so the mean over i != j is that over i < j, without slow indexing.
    losses = F.softplus(logits) - affinity.to(logits.dtype) * logits
    losses = losses - torch.diag(losses.diagonal())
    return losses.sum() / (len(z) * (len(z) - 1))


def supcon(
    z: Tensor, affinity: Tensor, *, temperature: float = 0.1, similarity: str = "cosine"
) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, equation 2).

    For each anchor, the cross-entropy between its affinities to the other rows, scaled to sum to
    one, and the softmax of its similarities to them; averaged over the anchors that have a
    positive. A batch without any gives 0, with zero gradients.
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = pair_similarity(z, similarity) / temperature
    log_p = F.log_softmax(logits.masked_fill(itself, float("-inf")), dim=1).masked_fill(itself, 0.0)
    affinity = affinity.to(log_p.dtype).masked_fill(itself, 0.0)
    mass = affinity.sum(dim=1)  # (batch,)
    anchors = mass > 0
    if not anchors.any():
        return z.sum() * 0.0
    return -((affinity * log_p).sum(dim=1)[anchors] / mass[anchors]).mean()


LOSSES = {"supcon": supcon, "pairwise_bce": pairwise_bce}
