"""Measures of embeddings, and of masks; arrays in, floats out.

Of embeddings: gaps between modalities, their shape, retrieval. A row of NaN throughout is a missing
modality and is left out. Only directions count, except in `effective_rank`: rows are scaled to unit
length; a row of zeros has no direction and stays zero.
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

_CHUNK = 2**21  # numbers held at once, where all pairs of rows are met
_TIE = 1e-6  # cosines no further apart are equal, but for rounding


def dice_score(y_true, y_pred, *, empty="count", adjusted=False) -> float:
    """Mean Dice coefficient of pictures: ``2 |P & T| / (|P| + |T|)`` of predicted and true pixels.

    A picture's Dice is the mean over the classes that its mask or prediction shows; label 0 is
    background, and none of them. What a picture counts for that shows nothing is where published
    figures differ [1]_: if an empty prediction on an empty mask is 1, a predictor that never finds
    anything scores the share of empty masks, which may look good. So report both
    ``empty="count"`` and ``empty="skip"``, or the first adjusted for it.

    Parameters
    ----------
    y_true : sequence of array-like of shape (height, width)
        True masks: whole numbers, a label for each pixel.

    y_pred : sequence of array-like of shape (height, width)
        Predicted masks, each of the size of the true one.

    empty : {"count", "skip"}, default="count"
        Whether pictures whose true mask is empty count, 1 if the prediction is empty as well, else
        0; or are left out.

    adjusted : bool, default=False
        Whether to scale the mean so that predicting nothing anywhere scores 0, as
        :func:`sklearn.metrics.balanced_accuracy_score` does for guessing: ``(score - e) / (1 - e)``
        with e the share of empty masks. Below 0 is worse than predicting nothing.

    Returns
    -------
    score : float
        1 is perfect; from 0, unless adjusted.

    Raises
    ------
    ValueError
        If there are not as many predictions as masks, sizes differ, a label is no whole number, or
        all true masks are empty where these are skipped or adjusted for.

    See Also
    --------
    iou_score : The same of intersection over union.

    References
    ----------
    .. [1] In the tables of arXiv 2401.01179 the same figure stands at 1, 10 and 100 % of the
       labels; its code counts an empty prediction on an empty mask as 1.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed.metrics import dice_score
    >>> y_true = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    >>> y_pred = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    >>> round(dice_score(y_true, y_pred), 3), round(dice_score(y_true, y_pred, empty="skip"), 3)
    (0.833, 0.667)
    >>> dice_score(y_true, np.zeros_like(y_true)), dice_score(y_true, 0 * y_true, adjusted=True)
    (0.5, 0.0)
    """
    return _mask_score(
        y_true, y_pred, empty, adjusted, lambda both, t, p: 2 * both / (t + p)
    )


def iou_score(y_true, y_pred, *, empty="count", adjusted=False) -> float:
    """Mean intersection over union of pictures: ``|P & T| / |P | T|``, the Jaccard index.

    As :func:`dice_score` in all else.

    Parameters
    ----------
    y_true : sequence of array-like of shape (height, width)
        True masks: whole numbers, a label for each pixel; 0 is background.

    y_pred : sequence of array-like of shape (height, width)
        Predicted masks, each of the size of the true one.

    empty : {"count", "skip"}, default="count"
        Whether pictures whose true mask is empty count, or are left out.

    adjusted : bool, default=False
        Whether to scale the mean so that predicting nothing anywhere scores 0.

    Returns
    -------
    score : float
        1 is perfect; from 0, unless adjusted.

    Raises
    ------
    ValueError
        As `dice_score`.

    Examples
    --------
    >>> from sklembed.metrics import iou_score
    >>> iou_score([[[1, 1], [0, 0]]], [[[1, 0], [0, 0]]])
    0.5
    """
    return _mask_score(
        y_true, y_pred, empty, adjusted, lambda both, t, p: both / (t + p - both)
    )


def modality_gap(A, B) -> float:
    """Distance of two modalities' centroids [1]_.

    Parameters
    ----------
    A : array-like of shape (n_samples_A, n_features)
        Embeddings of one modality.

    B : array-like of shape (n_samples_B, n_features)
        Embeddings of the other; rows need not be pairs.

    Returns
    -------
    gap : float
        From 0 to 2.

    Raises
    ------
    ValueError
        If widths differ, or a modality has no row.

    See Also
    --------
    distributional_gap : Sees what centroids do not.

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
    means = [_unit(part).mean(axis=0, dtype=np.float64) for part in (A, B)]
    return float(np.linalg.norm(means[0] - means[1]))


def distributional_gap(A, B) -> float:
    """Energy distance of two modalities: ``2 E|a - b| - E|a - a'| - E|b - b'|``.

    It is 0 only where the samples are distributed alike, while centroids can coincide without that
    [1]_. Means are over all pairs of rows, a row and itself included, so that it is never negative.

    Parameters
    ----------
    A : array-like of shape (n_samples_A, n_features)
        Embeddings of one modality.

    B : array-like of shape (n_samples_B, n_features)
        Embeddings of the other; rows need not be pairs.

    Returns
    -------
    gap : float
        From 0 to 4.

    Raises
    ------
    ValueError
        If widths differ, or a modality has no row.

    References
    ----------
    .. [1] arXiv 2604.00279: a gap of centroids alone misleads.

    Examples
    --------
    >>> from sklembed.metrics import distributional_gap, modality_gap
    >>> A, B = [[1, 0], [-1, 0]], [[0, 1], [0, -1]]
    >>> modality_gap(A, B), round(distributional_gap(A, B), 3)
    (0.0, 0.828)
    """
    A, B = (_unit(part.astype(np.float64)) for part in _two_samples(A, B))
    return float(
        max(2 * _mean_distance(A, B) - _mean_distance(A, A) - _mean_distance(B, B), 0)
    )


def cone_concentration(A) -> float:
    """Mean cosine of two distinct rows: how narrow the cone is in which a modality lies [1]_.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings of one modality, at least two.

    Returns
    -------
    concentration : float
        1 for rows of one direction, about 0 for rows of all directions.

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
    itself = row_norms(A, squared=True).sum(dtype=np.float64)
    whole = np.square(A.sum(axis=0, dtype=np.float64)).sum()
    return float((whole - itself) / (len(A) * (len(A) - 1)))


def alignment(A, B, *, alpha=2) -> float:
    """Mean distance of the two rows of a pair, to a power [1]_.

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities; row i of both is a pair, left out if it lacks either.

    alpha : float, default=2
        The power.

    Returns
    -------
    alignment : float
        0 where the two rows of every pair agree, at most ``2**alpha``.

    Raises
    ------
    ValueError
        If widths or numbers of rows differ, no pair is left, or `alpha` is not positive.

    References
    ----------
    .. [1] Wang and Isola. Understanding Contrastive Representation Learning through Alignment and
       Uniformity on the Hypersphere. arXiv 2005.10242.

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
        0 for rows of one direction; the lower, the more evenly rows are spread.

    Raises
    ------
    ValueError
        If there are fewer than two rows, or `t` is not positive.

    References
    ----------
    .. [1] Wang and Isola. Understanding Contrastive Representation Learning through Alignment and
       Uniformity on the Hypersphere. arXiv 2005.10242.

    Examples
    --------
    >>> from sklembed.metrics import uniformity
    >>> round(uniformity([[1, 0], [0, 1]]), 6)
    -4.0
    """
    check_scalar(t, "t", Real, min_val=0, include_boundaries="neither")
    A = _unit(_sample(A, at_least=2).astype(np.float64))
    parts = []
    for rows, squares in _squared_distances(A, A):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = (
            np.inf
        )  # itself
        nearest = (
            squares.min()
        )  # its part is taken out, for the others may underflow with it
        parts.append(np.log(np.exp(t * (nearest - squares)).sum()) - t * nearest)
    return float(logsumexp(parts) - np.log(len(A) * (len(A) - 1)))


def retrieval_recall(A, B, *, k=1, labels=None) -> float:
    """Share of queries that find a right row of the other modality among the `k` most alike.

    Cosines that differ from that of a query's best right row by at most 1e-6 tie with it. What ties
    comes in random order, and the result is the expectation over these orders: embeddings that
    have collapsed to a point score ``k / n_samples``, as chance does.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        The queries.

    B : array-like of shape (n_samples, n_features)
        What they search. Row i of both is a pair, left out on both sides if it lacks either.

    k : int, default=1
        How many found rows count.

    labels : array-like of shape (n_samples,) or None, default=None
        Rows of equal label, for example of equal title, are right for each other. None: only the
        query's own row is right.

    Returns
    -------
    recall : float
        From 0 to 1.

    Raises
    ------
    ValueError
        If widths or numbers of rows differ, no pair is left, a label is missing, or `k` is not
        from 1 to the number of pairs.

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
            f"k={k} asks for more rows than there are: {len(A)} have both modalities. Lower k."
        )
    chunks = gen_batches(len(A), _chunk_rows(len(B)))
    found = sum(_chances(A[r] @ B.T, codes[r, None] == codes, k).sum() for r in chunks)
    return float(found / len(A))


def pair_similarities(A, B, *, labels=None, max_negatives=100_000, random_state=None):
    """Cosines of the rows of a pair, and of rows that are no pair.

    Parameters
    ----------
    A, B : array-like of shape (n_samples, n_features)
        Embeddings of two modalities; row i of both is a pair, left out if it lacks either.

    labels : array-like of shape (n_samples,) or None, default=None
        Rows of equal label are not negatives either.

    max_negatives : int, default=100_000
        If there are more negative pairs, that many of them are drawn, each at most once.

    random_state : int, RandomState instance or None, default=None
        Seeds the draw.

    Returns
    -------
    positive : ndarray of shape (n_pairs,)
        Cosine of ``A[i]`` and ``B[i]``, in their order.

    negative : ndarray of shape (n_negatives,)
        Cosines of ``A[i]`` and ``B[j]`` of different rows or labels.

    Raises
    ------
    ValueError
        If widths or numbers of rows differ, no pair is left, a label is missing, or no two rows
        differ.

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
    """Exponential of the entropy of the singular values, as shares of their sum (RankMe [1]_).

    Rows are neither centred nor scaled.

    Parameters
    ----------
    A : array-like of shape (n_samples, n_features)
        Embeddings of one modality.

    Returns
    -------
    rank : float
        From 1, for rows on one line through the origin, to the smaller number of rows and columns;
        0 if all numbers are 0, which is the rank of such a matrix.

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


# What comes in


def _checked(A, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings as floats, and which of their rows are not missing."""
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
    """Return the rows that are not missing."""
    A, observed = _checked(A, name)
    if observed.sum() < at_least:
        raise ValueError(
            f"{name} needs {at_least} or more rows with values, but {observed.sum()} of its "
            f"{len(A)} rows have any; rows of NaN are left out."
        )
    return A[observed]


def _two_samples(A, B) -> tuple[np.ndarray, np.ndarray]:
    """Return what is not missing of two modalities in one space."""
    A, B = _sample(A), _sample(B, "B")
    _check_widths(A, B)
    return A, B


def _pairs(A, B, labels=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the unit rows of complete pairs, and codes of their labels, else of their rows."""
    A, in_A = _checked(A, "A")
    B, in_B = _checked(B, "B")
    _check_widths(A, B)
    if len(A) != len(B):
        raise ValueError(
            f"A has {len(A)} rows and B {len(B)}, but row i of both has to be a pair. Give a row "
            "that lacks a modality NaN throughout."
        )
    codes = np.arange(len(A)) if labels is None else _label_codes(labels, len(A))
    both = in_A & in_B
    if not both.any():
        raise ValueError(f"None of the {len(A)} rows has both modalities.")
    return _unit(A[both]), _unit(B[both]), codes[both]


def _check_widths(A: np.ndarray, B: np.ndarray) -> None:
    """Refuse rows that do not lie in one space."""
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"A has {A.shape[1]} columns and B {B.shape[1]}, but rows are compared in one space. "
            "Bring them into one first, by CanonicalAligner or ModalityGapAligner("
            "widths='resample')."
        )


def _label_codes(labels, n_rows: int) -> np.ndarray:
    """Return each row's position among the distinct labels."""
    labels = column_or_1d(labels)
    if len(labels) != n_rows:
        raise ValueError(
            f"There are {len(labels)} labels for {n_rows} rows; give one for each."
        )
    try:
        check_no_missing_label(labels)
        return sorted_labels(labels)[1]
    except (TypeError, ValueError) as error:
        error.add_note("This was in labels.")
        raise


def _unit(A: np.ndarray) -> np.ndarray:
    """Scale rows to unit length, whatever their scale; rows of zeros stay."""
    largest = np.abs(A).max(axis=1, keepdims=True)  # first, for squares may overflow
    return normalize(A / np.where(largest > 0, largest, 1), copy=False)


# Masks


def _mask_score(y_true, y_pred, empty: str, adjusted: bool, measure) -> float:
    """Average over pictures what `measure` makes of the pixels of each class."""
    if empty not in ("count", "skip"):
        raise ValueError(f"empty must be 'count' or 'skip'; got {empty!r}.")
    truth, found = check_masks(y_true, "y_true"), check_masks(y_pred, "y_pred")
    if len(truth) != len(found):
        raise ValueError(f"There are {len(found)} predictions for {len(truth)} masks.")
    for one, other in ((truth, found), (found, truth)):
        if any(m.dtype.kind == "b" for m in one) and any(m.max() > 1 for m in other):
            raise ValueError(
                "Masks are boolean on one side and hold labels above 1 on the other, so that none "
                "of their pixels would agree. Give both in one form, such as mask > 0."
            )
    scores, shows = [], []
    for row, (t, p) in enumerate(zip(truth, found, strict=True)):
        if t.shape != p.shape:
            raise ValueError(
                f"In row {row} the mask has the size {t.shape}, but the prediction {p.shape}. "
                "Resize the prediction first."
            )
        n_labels = int(max(t.max(), p.max())) + 1
        both, true, pred = (
            np.bincount(labels.ravel().astype(np.intp), minlength=n_labels)[1:]
            for labels in (t[t == p], t, p)
        )
        seen = true + pred > 0
        scores.append(
            measure(both[seen], true[seen], pred[seen]).mean() if seen.any() else 1.0
        )
        shows.append(true.any())
    share = np.mean(np.logical_not(shows))
    if share == 1 and (empty == "skip" or adjusted):
        raise ValueError(
            f"All {len(truth)} masks are empty, so that predicting nothing is perfect. Only "
            "a Dice coefficient with empty='count', not adjusted, can tell how often it is so."
        )
    if empty == "skip":
        return float(np.mean(np.array(scores)[shows]))
    mean = np.mean(scores)
    return float((mean - share) / (1 - share) if adjusted else mean)


# All pairs of rows, some at a time


def _chunk_rows(width: int) -> int:
    """Return how many rows of that width to hold at once."""
    return max(1, _CHUNK // width)


def _squared_distances(
    A: np.ndarray, B: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield some rows of A at a time, and their squared distances to all of B."""
    for rows in gen_batches(len(A), _chunk_rows(len(B))):
        squares = row_norms(A[rows], squared=True)[:, None] + row_norms(B, squared=True)
        squares -= 2 * (A[rows] @ B.T)
        yield rows, np.maximum(squares, 0, out=squares)


def _mean_distance(A: np.ndarray, B: np.ndarray) -> float:
    """Return the mean distance of a row of A and one of B."""
    total = sum(np.sqrt(squares).sum() for _, squares in _squared_distances(A, B))
    return total / (len(A) * len(B))


def _chances(cosines: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Return each query's chance of a right row among its k first, if ties are broken at random.

    A query misses if only wrong rows fill the places that better rows leave to those that tie with
    its best right row. Ties are with that row, not from row to row: they do not chain, and a
    larger k is never worse.
    """
    best = np.where(right, cosines, -np.inf).max(axis=1, keepdims=True)
    better = (cosines > best + _TIE).sum(axis=1)  # all of them wrong
    tied = (cosines >= best - _TIE) & (cosines <= best + _TIE)
    n_tied, n_right = tied.sum(axis=1), (tied & right).sum(axis=1)
    places = np.clip(k - better, 0, n_tied)
    missed = hypergeom.pmf(0, n_tied, n_right, places)
    return np.where(places > 0, 1 - missed, 0.0)


def _negative_pairs(
    codes: np.ndarray, max_negatives: int, random_state
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of pairs of different codes, each once, at most that many.

    Such pairs are numbered row by row, so that drawing numbers draws pairs: sorted by code, the
    rows that make no negative with a row stand side by side and are stepped over.
    """
    order = np.argsort(codes, kind="stable")
    _, which, counts = np.unique(codes, return_inverse=True, return_counts=True)
    same, first = counts[which], (np.cumsum(counts) - counts)[which]
    ends = np.cumsum(len(codes) - same)  # of the numbers of each row's pairs
    total = int(ends[-1])
    if total == 0:
        raise ValueError(
            f"No two of the {len(codes)} pairs differ in row or label; there is no negative."
        )
    if total > max_negatives:
        numbers = np.sort(
            sample_without_replacement(total, max_negatives, random_state=random_state)
        )
    else:
        numbers = np.arange(total)
    left = np.searchsorted(ends, numbers, side="right")
    place = numbers - (ends - (len(codes) - same))[left]
    place += np.where(place >= first[left], same[left], 0)
    return left, order[place]


def _row_products(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return the inner product of each row of A with the same row of B."""
    return np.einsum("ij,ij->i", A, B)
