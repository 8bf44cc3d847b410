"""Measures of embeddings: the gap between modalities, their shape, and retrieval across them."""

import numpy as np
from scipy.special import gammaln
from sklearn.metrics import pairwise_distances_chunked
from sklearn.preprocessing import normalize
from sklearn.utils import check_array, check_random_state, gen_batches

from sklembed._blocks import observed_rows

_CHUNK_ROWS = 1024
_TIE = 1e-6  # similarities that differ by no more are alike


def modality_gap(A, B):
    """Distance of the centroids of two modalities' unit rows (arXiv 2203.02053).

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities, not necessarily of the same rows; rows of NaN are left out.

    Returns
    -------
    gap : float
        Between 0 and 2.

    Examples
    --------
    >>> from sklembed.metrics import modality_gap
    >>> modality_gap([[1, 0], [3, 0]], [[0, 1], [0, 2]]) ** 2
    2.0...
    """
    A, B = _of_one_space(A, B)
    return float(np.linalg.norm(A.mean(axis=0) - B.mean(axis=0)))


def distributional_gap(A, B):
    """Energy distance of two modalities' unit rows: 2 E|a - b| - E|a - a'| - E|b - b'|.

    It is 0 for equal distributions alone, where centroids may coincide and the rows not; so it
    tells what the gap of centroids does not (arXiv 2604.00279).

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities; rows of NaN are left out.

    Returns
    -------
    gap : float
        Not negative.
    """
    A, B = _of_one_space(A, B)
    between, within = _mean_distance(A, B), _mean_distance(A, A) + _mean_distance(B, B)
    return max(float(2 * between - within), 0.0)


def cone_concentration(A):
    """Mean cosine of two different rows: 1 where all point one way, 0 where they point anywhere.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings; rows of NaN are left out.

    Returns
    -------
    concentration : float
        At most 1.
    """
    A = _unit_rows(A, at_least=2)
    n = len(A)
    return float((np.square(A.sum(axis=0)).sum() - np.square(A).sum()) / (n * (n - 1)))


def alignment(A, B, *, alpha=2):
    """Mean distance of the two unit rows of a pair, to the power of `alpha` (arXiv 2005.10242).

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities of the same rows; rows that lack one are left out.

    alpha : float, default=2
        The power.

    Returns
    -------
    alignment : float
        0 where pairs coincide.
    """
    A, B, _ = _pairs(A, B)
    return float(np.mean(np.linalg.norm(A - B, axis=1) ** alpha))


def uniformity(A, *, t=2):
    """Logarithm of the mean of exp(-t |x - y|²) over pairs of unit rows (arXiv 2005.10242).

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings; rows of NaN are left out.

    t : float, default=2
        How fast a pair's part falls with its distance.

    Returns
    -------
    uniformity : float
        0 where all rows are one, the lower the more evenly they are spread.
    """
    A = _unit_rows(A, at_least=2)
    total = sum(np.exp(-t * (2 - 2 * A[rows] @ A.T)).sum() for rows in gen_batches(len(A), 1024))
    itself = np.exp(-t * (2 - 2 * np.square(A).sum(axis=1))).sum()
    return float(np.log((total - itself) / (len(A) * (len(A) - 1))))


def retrieval_recall(A, B, *, k=1, labels=None):
    """Share of rows of one modality that find a right row of the other among the `k` most alike.

    What is equally alike is taken to come in random order, so that embeddings that have collapsed
    to a point score what chance scores.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        The queries.

    B : array-like of shape (n_samples, n_features)
        What is searched, of the same rows. Rows that lack one of both are left out.

    k : int, default=1
        How many are looked at.

    labels : array-like of shape (n_samples,), default=None
        Rows of equal labels, such as equal titles, are right for each other; by default a row is
        right for itself alone.

    Returns
    -------
    recall : float
        Between 0 and 1.

    Examples
    --------
    >>> from sklembed.metrics import retrieval_recall
    >>> retrieval_recall([[1, 0], [0, 1], [1, 1]], [[2, 1], [1, 2], [0, 1]])
    0.33...
    """
    A, B, kept = _pairs(A, B)
    if not 1 <= k <= len(A):
        raise ValueError(f"k={k}, but there are {len(A)} pairs: k must lie between 1 and that.")
    labels = np.arange(len(A)) if labels is None else _labels(labels, kept)
    found = 0.0
    for rows in gen_batches(len(A), _CHUNK_ROWS):
        cosines = A[rows] @ B.T
        right = labels[rows, None] == labels[None, :]
        last = np.partition(cosines, -k, axis=1)[:, [-k]]  # of the k most alike
        above, ties = cosines > last + _TIE, np.abs(cosines - last) <= _TIE
        slots = k - above.sum(axis=1)
        n_ties, n_wrong = ties.sum(axis=1), (ties & ~right).sum(axis=1)
        missed = _all_wrong(n_wrong, n_ties, slots)
        found += np.where((above & right).any(axis=1), 1.0, 1.0 - missed).sum()
    return float(found / len(A))


def pair_similarities(A, B, *, labels=None, max_negatives=100_000, random_state=None):
    """Cosines of pairs, and of rows that are no pair.

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities of the same rows; rows that lack one are left out.

    labels : array-like of shape (n_samples,), default=None
        Rows of equal labels are no negative pair either.

    max_negatives : int, default=100_000
        How many negative pairs are drawn, if there are more; some may be drawn twice.

    random_state : int, RandomState instance or None, default=None
        Seeds the draw.

    Returns
    -------
    positive : ndarray of shape (n_pairs,)
        Cosines of the two modalities of a row.

    negative : ndarray of shape (n_negatives,)
        Cosines across rows.
    """
    A, B, kept = _pairs(A, B)
    labels = np.arange(len(A)) if labels is None else _labels(labels, kept)
    n = len(A)
    if n * n <= max_negatives:
        left, right = (index.ravel() for index in np.indices((n, n)))
    else:
        left, right = check_random_state(random_state).randint(n, size=(2, max_negatives))
    different = labels[left] != labels[right]
    left, right = left[different], right[different]
    negative = np.concatenate(
        [np.einsum("ij,ij->i", A[left[r]], B[right[r]]) for r in gen_batches(len(left), 8192)]
        or [np.empty(0)]
    )
    return np.einsum("ij,ij->i", A, B), negative


def effective_rank(A):
    """Exponential of the entropy of the singular values, as shares of their sum (arXiv 2210.02885).

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings; rows of NaN are left out.

    Returns
    -------
    rank : float
        1 where rows have collapsed to a line, at most the smaller number of rows and columns.
    """
    A = _rows(A)
    shares = np.linalg.svd(A, compute_uv=False)
    if not shares.sum() > 0:
        raise ValueError("All numbers are 0, which has no rank to tell of.")
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _rows(A, name="A"):
    """Check embeddings; return the observed rows in double precision."""
    A = check_array(A, dtype=np.float64, ensure_all_finite=False, input_name=name)
    A = A[observed_rows(A)]
    if not len(A):
        raise ValueError(f"All rows of {name} are NaN; there is nothing to measure.")
    return A


def _unit_rows(A, at_least):
    A = normalize(_rows(A))
    if len(A) < at_least:
        raise ValueError(f"{at_least} observed rows are needed; got {len(A)}.")
    return A


def _check_widths(A, B):
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"A has {A.shape[1]} columns and B has {B.shape[1]}: coordinates of one space are "
            "compared. Bring both into one first, for example by CanonicalAligner."
        )


def _of_one_space(A, B):
    """Return the unit rows of two modalities that share a space."""
    A, B = normalize(_rows(A)), normalize(_rows(B, "B"))
    _check_widths(A, B)
    return A, B


def _pairs(A, B):
    """Return the unit rows of pairs that have both modalities, and which these are."""
    A = check_array(A, dtype=np.float64, ensure_all_finite=False, input_name="A")
    B = check_array(B, dtype=np.float64, ensure_all_finite=False, input_name="B")
    _check_widths(A, B)
    if len(A) != len(B):
        raise ValueError(f"A has {len(A)} rows and B has {len(B)}; row i of both is a pair.")
    kept = observed_rows(A) & observed_rows(B)
    if not kept.any():
        raise ValueError("No row has both modalities; there is no pair to measure.")
    return normalize(A[kept]), normalize(B[kept]), kept


def _labels(labels, kept):
    """Return the labels of the pairs that are kept, as numbers."""
    labels = np.asarray(labels)
    if labels.shape != kept.shape:
        raise ValueError(
            f"labels has shape {labels.shape}; expected one for each row, {kept.shape}."
        )
    return np.unique(labels[kept], return_inverse=True)[1]


def _mean_distance(A, B):
    """Return the mean Euclidean distance of rows of A to rows of B."""
    return sum(part.sum() for part in pairwise_distances_chunked(A, B)) / (len(A) * len(B))


def _all_wrong(n_wrong, n_ties, slots):
    """Return the odds that of what ties, some of it wrong, all that fits the slots is wrong."""
    slots = np.minimum(slots, n_ties)
    possible = n_wrong >= slots
    wrong = np.where(possible, n_wrong, slots)  # any number that the formula takes

    def log_choices(n):
        return gammaln(n + 1) - gammaln(n - slots + 1)

    return np.where(possible, np.exp(log_choices(wrong) - log_choices(n_ties)), 0.0)
