"""Metrics of embeddings and of masks.

Embeddings: gaps between modalities, their distribution, and retrieval. A row of NaN is
a missing modality and is excluded. Rows are scaled to unit length, except in
`effective_rank`; a row of zeros stays zero.
"""

from collections.abc import Iterator
from numbers import Integral, Real

import numpy as np
from scipy.linalg import svdvals
from scipy.special import entr, logsumexp
from scipy.stats import hypergeom
from sklearn.preprocessing import normalize
from sklearn.utils import check_array, check_scalar, column_or_1d, gen_batches
from sklearn.utils.extmath import row_norms
from sklearn.utils.random import sample_without_replacement

from sklembed._table.blocks import observed_rows
from sklembed._validation import check_masks, check_no_missing_label, sorted_labels

__all__ = [
    "alignment",
    "cone_concentration",
    "dice_score",
    "distributional_gap",
    "effective_rank",
    "iou_score",
    "modality_gap",
    "pair_similarities",
    "retrieval_recall",
    "uniformity",
]

_CHUNK = 2**21  # numbers in memory at once when all pairs of rows are compared
_TIE = 1e-6  # cosines that differ by at most this are equal up to rounding


def dice_score(y_true, y_pred, *, empty="count", adjusted=False) -> float:
    """Mean Dice coefficient of images, ``2 |P & T| / (|P| + |T|)``.

    P and T are the predicted and the true pixels of a class. The Dice coefficient of an
    image is the mean over the classes in its mask or prediction; label 0 is background
    and not a class.

    Published figures differ in the score of empty masks [1]_. If an empty prediction on
    an empty mask scores 1, always predicting background scores the fraction of empty
    masks, which may look good. Report both ``empty="count"`` and ``empty="skip"``, or
    the adjusted score.

    Parameters
    ----------
    y_true : sequence of array-like of shape (height, width)
        True masks: integers, a label for each pixel.

    y_pred : sequence of array-like of shape (height, width)
        Predicted masks, each of the size of the true mask.

    empty : {"count", "skip"}, default="count"
        How to score images with an empty true mask. "count" scores 1 if the prediction
        is empty too, otherwise 0. "skip" excludes the images.

    adjusted : bool, default=False
        Whether to scale the mean to ``(score - e) / (1 - e)``, where e is the fraction
        of empty masks. Always predicting background then scores 0, as guessing does in
        :func:`sklearn.metrics.balanced_accuracy_score`. Scores below 0 are worse.

    Returns
    -------
    score : float
        From 0 to 1; lower if adjusted.

    Raises
    ------
    ValueError
        If the numbers or sizes of masks and predictions differ, a label is not an
        integer, or all true masks are empty with ``empty="skip"`` or `adjusted`.

    See Also
    --------
    iou_score : Intersection over union.

    References
    ----------
    .. [1] arXiv 2401.01179. Its tables have the same figure for 1, 10 and 100 % of the
       labels; its code scores an empty prediction on an empty mask as 1.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed.metrics import dice_score
    >>> y_true = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    >>> y_pred = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    >>> round(dice_score(y_true, y_pred), 3)
    0.833
    >>> round(dice_score(y_true, y_pred, empty="skip"), 3)
    0.667
    >>> background = np.zeros_like(y_true)
    >>> dice_score(y_true, background), dice_score(y_true, background, adjusted=True)
    (0.5, 0.0)
    """

    def dice(n_both, n_true, n_pred):
        return 2 * n_both / (n_true + n_pred)

    return _mask_score(y_true, y_pred, empty, adjusted, dice)


def iou_score(y_true, y_pred, *, empty="count", adjusted=False) -> float:
    """Mean intersection over union of images, ``|P & T| / |P | T|``.

    Also known as the Jaccard index. Images, classes and empty masks count as in
    :func:`dice_score`.

    Parameters
    ----------
    y_true : sequence of array-like of shape (height, width)
        True masks: integers, a label for each pixel; 0 is background.

    y_pred : sequence of array-like of shape (height, width)
        Predicted masks, each of the size of the true mask.

    empty : {"count", "skip"}, default="count"
        Whether images with an empty true mask count or are excluded.

    adjusted : bool, default=False
        Whether to scale the mean so that always predicting background scores 0.

    Returns
    -------
    score : float
        From 0 to 1; lower if adjusted.

    Raises
    ------
    ValueError
        In the same cases as `dice_score`.

    Examples
    --------
    >>> from sklembed.metrics import iou_score
    >>> iou_score([[[1, 1], [0, 0]]], [[[1, 0], [0, 0]]])
    0.5
    """

    def iou(n_both, n_true, n_pred):
        return n_both / (n_true + n_pred - n_both)

    return _mask_score(y_true, y_pred, empty, adjusted, iou)


def modality_gap(A, B) -> float:
    """Distance between the centroids of two modalities [1]_.

    Parameters
    ----------
    A : array-like of shape (n_samples_A, n_features)
        Embeddings of one modality.

    B : array-like of shape (n_samples_B, n_features)
        Embeddings of the second modality; rows need not be pairs.

    Returns
    -------
    gap : float
        From 0 to 2.

    Raises
    ------
    ValueError
        If the numbers of columns differ, or a modality has no row.

    See Also
    --------
    distributional_gap : Gap that also measures differences beyond the centroids.

    References
    ----------
    .. [1] Liang et al. Mind the Gap. arXiv 2203.02053.

    Examples
    --------
    >>> from sklembed.metrics import modality_gap
    >>> modality_gap([[1, 0], [3, 0]], [[0, 1], [0, 4]])
    1.414...
    """
    A, B = _two_samples(A, B)
    centroid_A = _unit(A).mean(axis=0, dtype=np.float64)
    centroid_B = _unit(B).mean(axis=0, dtype=np.float64)
    return float(np.linalg.norm(centroid_A - centroid_B))


def distributional_gap(A, B) -> float:
    """Energy distance of two modalities: ``2 E|a - b| - E|a - a'| - E|b - b'|``.

    It is 0 only if the two samples have the same distribution, whereas centroids of
    different distributions can coincide [1]_. Means are over all pairs of rows,
    including a row with itself, so that the gap is never negative.

    Parameters
    ----------
    A : array-like of shape (n_samples_A, n_features)
        Embeddings of one modality.

    B : array-like of shape (n_samples_B, n_features)
        Embeddings of the second modality; rows need not be pairs.

    Returns
    -------
    gap : float
        From 0 to 4.

    Raises
    ------
    ValueError
        If the numbers of columns differ, or a modality has no row.

    References
    ----------
    .. [1] arXiv 2604.00279, on why the gap of centroids alone is misleading.

    Examples
    --------
    >>> from sklembed.metrics import distributional_gap, modality_gap
    >>> A, B = [[1, 0], [-1, 0]], [[0, 1], [0, -1]]
    >>> modality_gap(A, B), round(distributional_gap(A, B), 3)
    (0.0, 0.828)
    """
    A, B = _two_samples(A, B)
    A, B = _unit(A.astype(np.float64)), _unit(B.astype(np.float64))
    gap = 2 * _mean_distance(A, B) - _mean_distance(A, A) - _mean_distance(B, B)
    return float(max(gap, 0))


def cone_concentration(A) -> float:
    """Mean cosine of two distinct rows, which measures how narrow their cone is [1]_.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings of one modality, at least two.

    Returns
    -------
    concentration : float
        1 if all rows have the same direction, about 0 if they have all directions.

    Raises
    ------
    ValueError
        If there are fewer than two rows.

    References
    ----------
    .. [1] Liang et al. Mind the Gap. arXiv 2203.02053.

    Examples
    --------
    >>> from sklembed.metrics import cone_concentration
    >>> cone_concentration([[1, 0], [0, 1], [1, 0]])
    0.333...
    """
    A = _unit(_sample(A, at_least=2))
    # |sum of rows|^2 is the sum of all inner products, of a row with itself too.
    all_products = np.square(A.sum(axis=0, dtype=np.float64)).sum()
    squared_norms = row_norms(A, squared=True).sum(dtype=np.float64)
    return float((all_products - squared_norms) / (len(A) * (len(A) - 1)))


def alignment(A, B, *, alpha=2) -> float:
    """Mean distance between the two rows of a pair, raised to a power [1]_.

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities. Row i of A and of B is a pair, which is excluded
        if either is missing.

    alpha : float, default=2
        The power.

    Returns
    -------
    alignment : float
        0 if the two rows of every pair agree, at most ``2**alpha``.

    Raises
    ------
    ValueError
        If the shapes differ, there is no complete pair, or `alpha` is not positive.

    References
    ----------
    .. [1] Wang and Isola. Understanding Contrastive Representation Learning through
       Alignment and Uniformity on the Hypersphere. arXiv 2005.10242.

    Examples
    --------
    >>> from sklembed.metrics import alignment
    >>> alignment([[1, 0], [0, 1]], [[2, 0], [0, -1]])
    2.0
    """
    check_scalar(alpha, "alpha", Real, min_val=0, include_boundaries="neither")
    A, B, _ = _pairs(A, B)
    return float(np.mean(row_norms(A - B) ** alpha, dtype=np.float64))


def uniformity(A, *, t=2) -> float:
    """Logarithm of the mean of ``exp(-t |x - y|^2)`` over pairs of distinct rows [1]_.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings of one modality, at least two.

    t : float, default=2
        Inverse width of the kernel.

    Returns
    -------
    uniformity : float
        0 if all rows have the same direction; lower if rows are spread more evenly.

    Raises
    ------
    ValueError
        If there are fewer than two rows, or `t` is not positive.

    References
    ----------
    .. [1] Wang and Isola. Understanding Contrastive Representation Learning through
       Alignment and Uniformity on the Hypersphere. arXiv 2005.10242.

    Examples
    --------
    >>> from sklembed.metrics import uniformity
    >>> round(uniformity([[1, 0], [0, 1]]), 6)
    -4.0
    """
    check_scalar(t, "t", Real, min_val=0, include_boundaries="neither")
    A = _unit(_sample(A, at_least=2).astype(np.float64))
    log_sums = []
    for rows, squares in _squared_distances(A, A):
        diagonal = np.arange(len(squares)), np.arange(rows.start, rows.stop)
        squares[diagonal] = np.inf  # a row and itself are not a pair
        nearest = squares.min()  # factored out, since exp(-t * squares) may underflow
        log_sums.append(np.log(np.exp(t * (nearest - squares)).sum()) - t * nearest)
    return float(logsumexp(log_sums) - np.log(len(A) * (len(A) - 1)))


def retrieval_recall(A, B, *, k=1, labels=None) -> float:
    """Fraction of queries with a correct row among the `k` most similar rows.

    Rows tie with a query's best correct row if their cosines differ from its cosine by
    at most 1e-6. The result is the expectation over random orders of ties. Embeddings
    that have collapsed to a point therefore score ``k / n_samples``, the chance level.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        The queries.

    B : array-like of shape (n_samples, n_features)
        The rows that are searched. Row i of A and of B is a pair, which is excluded on
        both sides if either is missing.

    k : int, default=1
        Number of most similar rows that count.

    labels : array-like of shape (n_samples,) or None, default=None
        Rows of equal label, for example of equal title, count as correct matches. If
        None, only the other row of the pair does.

    Returns
    -------
    recall : float
        From 0 to 1.

    Raises
    ------
    ValueError
        If the shapes differ, there is no complete pair, a label is missing, or `k` is
        not from 1 to the number of pairs.

    Examples
    --------
    >>> from sklembed.metrics import retrieval_recall
    >>> A, B = [[1, 0], [0, 1], [1, 1]], [[2, 1], [1, 2], [0, 1]]
    >>> retrieval_recall(A, B), retrieval_recall(A, B, k=2)
    (0.333..., 0.666...)
    """
    A, B, codes = _pairs(A, B, labels)
    check_scalar(k, "k", Integral, min_val=1)
    if k > len(A):
        raise ValueError(
            f"k must be at most the number of rows with both modalities, {len(A)}; got "
            f"{k}."
        )
    n_hits = 0.0
    for rows in gen_batches(len(A), _chunk_rows(len(B))):
        is_correct = codes[rows, None] == codes
        n_hits += _hit_probabilities(A[rows] @ B.T, is_correct, k).sum()
    return float(n_hits / len(A))


def pair_similarities(A, B, *, labels=None, max_negatives=100_000, random_state=None):
    """Cosines of positive pairs and of negative pairs.

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities. Row i of A and of B is a pair, which is excluded
        if either is missing.

    labels : array-like of shape (n_samples,) or None, default=None
        Rows of equal label are not negatives.

    max_negatives : int, default=100_000
        Maximum number of negative pairs. More pairs are sampled without replacement.

    random_state : int, RandomState instance or None, default=None
        Seeds the sample of negative pairs.

    Returns
    -------
    positive : ndarray of shape (n_pairs,)
        Cosines of ``A[i]`` and ``B[i]``, in the order of rows.

    negative : ndarray of shape (n_negatives,)
        Cosines of ``A[i]`` and ``B[j]`` of different rows or labels.

    Raises
    ------
    ValueError
        If the shapes differ, there is no complete pair, a label is missing, or no two
        rows are a negative pair.

    Examples
    --------
    >>> from sklembed.metrics import pair_similarities
    >>> positive, negative = pair_similarities([[1, 0], [0, 1]], [[1, 0], [1, 0]])
    >>> positive.tolist(), negative.tolist()
    ([1.0, 0.0], [1.0, 0.0])
    """
    check_scalar(max_negatives, "max_negatives", Integral, min_val=1)
    A, B, codes = _pairs(A, B, labels)
    left, right = _negative_pairs(codes, max_negatives, random_state)
    chunks = gen_batches(len(left), _chunk_rows(A.shape[1]))
    negative = np.concatenate([_row_products(A[left[c]], B[right[c]]) for c in chunks])
    return _row_products(A, B), negative


def effective_rank(A) -> float:
    """Exponential of the entropy of the normalized singular values (RankMe [1]_).

    Singular values are divided by their sum. Rows are neither centered nor scaled.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings of one modality.

    Returns
    -------
    rank : float
        From 1, if all rows lie on one line through the origin, to the smaller of the
        numbers of rows and columns. 0 if all values are 0.

    Raises
    ------
    ValueError
        If there is no row.

    References
    ----------
    .. [1] Garrido et al. RankMe. arXiv 2210.02885.

    Examples
    --------
    >>> from sklembed.metrics import effective_rank
    >>> round(effective_rank([[2, 0, 0], [0, 2, 0]]), 6)
    2.0
    """
    values = svdvals(_sample(A).astype(np.float64))
    if values[0] == 0:
        return 0.0
    values /= values[0]
    return float(np.exp(entr(values / values.sum()).sum()))


# Validation


def _check_embeddings(A, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings as floats, and a mask of the observed rows."""
    A = check_array(
        A,
        dtype=[np.float64, np.float32],
        ensure_all_finite="allow-nan",
        input_name=name,
    )
    try:
        return A, observed_rows(A)
    except ValueError as error:
        error.add_note(f"This was in {name}.")
        raise


def _sample(A, name: str = "A", at_least: int = 1) -> np.ndarray:
    """Return the observed rows."""
    A, observed = _check_embeddings(A, name)
    if observed.sum() < at_least:
        raise ValueError(
            f"{name} needs {at_least} or more rows with values, but only "
            f"{observed.sum()} of its {len(A)} rows have values; the others are NaN."
        )
    return A[observed]


def _two_samples(A, B) -> tuple[np.ndarray, np.ndarray]:
    """Return the observed rows of two modalities in one space."""
    A, B = _sample(A), _sample(B, "B")
    _check_widths(A, B)
    return A, B


def _pairs(A, B, labels=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the unit rows of complete pairs, and a code for each label or row."""
    A, in_A = _check_embeddings(A, "A")
    B, in_B = _check_embeddings(B, "B")
    _check_widths(A, B)
    if len(A) != len(B):
        raise ValueError(
            f"A has {len(A)} rows and B {len(B)}, but row i of A and of B must be a "
            "pair. Mark a missing modality by a row of NaN."
        )
    codes = np.arange(len(A))
    if labels is not None:
        codes = _label_codes(labels, len(A))
    complete = in_A & in_B
    if not complete.any():
        raise ValueError(f"None of the {len(A)} rows has both modalities.")
    return _unit(A[complete]), _unit(B[complete]), codes[complete]


def _check_widths(A: np.ndarray, B: np.ndarray) -> None:
    """Raise if rows of A and B are not in the same space."""
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"A has {A.shape[1]} columns and B {B.shape[1]}, but rows are compared in "
            "one space. Align them first, by CanonicalAligner or "
            "ModalityGapAligner(widths='resample')."
        )


def _label_codes(labels, n_rows: int) -> np.ndarray:
    """Return the position of each row's label among the sorted labels."""
    labels = column_or_1d(labels)
    if len(labels) != n_rows:
        raise ValueError(
            f"There are {len(labels)} labels for {n_rows} rows. Pass one for each."
        )
    try:
        check_no_missing_label(labels)
        return sorted_labels(labels)[1]
    except (TypeError, ValueError) as error:
        error.add_note("This was in labels.")
        raise


def _unit(A: np.ndarray) -> np.ndarray:
    """Scale rows to unit length; rows of zeros stay zero."""
    # Squares of large or small values would overflow or underflow without this.
    largest = np.abs(A).max(axis=1, keepdims=True)
    return normalize(A / np.where(largest > 0, largest, 1), copy=False)


# Masks


def _mask_score(y_true, y_pred, empty: str, adjusted: bool, measure) -> float:
    """Return the mean over images of the mean of `measure` over their classes."""
    if empty not in ("count", "skip"):
        raise ValueError(f"empty must be 'count' or 'skip'; got {empty!r}.")
    y_true, y_pred = check_masks(y_true, "y_true"), check_masks(y_pred, "y_pred")
    if len(y_true) != len(y_pred):
        raise ValueError(
            f"There are {len(y_pred)} predictions for {len(y_true)} masks."
        )
    _check_same_labels(y_true, y_pred)
    _check_same_labels(y_pred, y_true)
    scores = np.ones(len(y_true))
    has_object = np.zeros(len(y_true), dtype=bool)
    for row, (true, pred) in enumerate(zip(y_true, y_pred, strict=True)):
        if true.shape != pred.shape:
            raise ValueError(
                f"In row {row} the mask has the size {true.shape}, but the prediction "
                f"{pred.shape}. Resize the prediction first."
            )
        n_labels = int(max(true.max(), pred.max())) + 1
        n_both = _count_labels(true[true == pred], n_labels)
        n_true, n_pred = _count_labels(true, n_labels), _count_labels(pred, n_labels)
        has_object[row] = n_true.any()
        present = n_true + n_pred > 0
        if present.any():
            by_class = measure(n_both[present], n_true[present], n_pred[present])
            scores[row] = by_class.mean()
    empty_share = np.mean(~has_object)
    if empty_share == 1 and (empty == "skip" or adjusted):
        raise ValueError(
            f"All {len(y_true)} masks are empty, so predicting background is perfect. "
            "Use empty='count' without adjusted to score such masks."
        )
    if empty == "skip":
        return float(np.mean(scores[has_object]))
    score = np.mean(scores)
    if adjusted:
        score = (score - empty_share) / (1 - empty_share)
    return float(score)


def _check_same_labels(masks, counterparts) -> None:
    """Raise if masks are boolean, but their counterparts have labels above 1."""
    has_boolean = any(mask.dtype.kind == "b" for mask in masks)
    if has_boolean and max(mask.max() for mask in counterparts) > 1:
        raise ValueError(
            "Masks are boolean on one side and have labels above 1 on the other, so "
            "their pixels would not match. Pass both in one form, such as mask > 0."
        )


def _count_labels(mask: np.ndarray, n_labels: int) -> np.ndarray:
    """Return the number of pixels of each label from 1."""
    return np.bincount(mask.ravel().astype(np.intp), minlength=n_labels)[1:]


# All pairs of rows, in chunks


def _chunk_rows(width: int) -> int:
    """Return the number of rows of that width in a chunk."""
    return max(1, _CHUNK // width)


def _squared_distances(
    A: np.ndarray, B: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a slice of rows of A, and their squared distances to all rows of B."""
    for rows in gen_batches(len(A), _chunk_rows(len(B))):
        squares = row_norms(A[rows], squared=True)[:, None] + row_norms(B, squared=True)
        squares -= 2 * (A[rows] @ B.T)
        yield rows, np.maximum(squares, 0, out=squares)


def _mean_distance(A: np.ndarray, B: np.ndarray) -> float:
    """Return the mean distance between a row of A and a row of B."""
    total = sum(np.sqrt(squares).sum() for _, squares in _squared_distances(A, B))
    return total / (len(A) * len(B))


def _hit_probabilities(
    cosines: np.ndarray, is_correct: np.ndarray, k: int
) -> np.ndarray:
    """Return the probability of a correct row in each top k, with ties in random order.

    Rows that are more similar than the best correct row come first. A query misses if
    only incorrect rows, of those that tie with the best correct row, fill the remaining
    places. Ties are defined by that row and do not chain, so a larger k is never worse.
    """
    best = np.where(is_correct, cosines, -np.inf).max(axis=1, keepdims=True)
    n_better = (cosines > best + _TIE).sum(axis=1)  # all of them incorrect
    tied = (cosines >= best - _TIE) & (cosines <= best + _TIE)
    n_tied, n_correct = tied.sum(axis=1), (tied & is_correct).sum(axis=1)
    n_places = np.clip(k - n_better, 0, n_tied)
    miss = hypergeom.pmf(0, n_tied, n_correct, n_places)
    return np.where(n_places > 0, 1 - miss, 0.0)


def _negative_pairs(
    codes: np.ndarray, max_negatives: int, random_state
) -> tuple[np.ndarray, np.ndarray]:
    """Return both rows of pairs with different codes, each pair at most once.

    Pairs are numbered row by row, so that sampling numbers samples pairs. The right
    rows are sorted by code. Rows with the code of the left row are then consecutive,
    and positions behind them are shifted by their number.
    """
    order = np.argsort(codes, kind="stable")
    _, code_of, counts = np.unique(codes, return_inverse=True, return_counts=True)
    n_same, first_same = counts[code_of], (np.cumsum(counts) - counts)[code_of]
    n_negatives = len(codes) - n_same
    ends = np.cumsum(n_negatives)  # of the numbers of each left row's pairs
    total = int(ends[-1])
    if total == 0:
        raise ValueError(
            f"No two of the {len(codes)} pairs differ in row or label, so there is no "
            "negative pair."
        )
    if total > max_negatives:
        numbers = np.sort(
            sample_without_replacement(total, max_negatives, random_state=random_state)
        )
    else:
        numbers = np.arange(total)
    left = np.searchsorted(ends, numbers, side="right")
    position = numbers - (ends - n_negatives)[left]
    position += np.where(position >= first_same[left], n_same[left], 0)
    return left, order[position]


def _row_products(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return the inner product of each row of A with the same row of B."""
    return np.einsum("ij,ij->i", A, B)
