"""Measures of embeddings, against loops and what must hold of them."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.preprocessing import normalize

from sklembed import metrics


@pytest.fixture(params=range(3))
def pair(request):
    rng = np.random.default_rng(request.param)
    A = rng.normal(size=(12, 4)) + [1, 0, 0, 0]
    return A, A + rng.normal(size=(12, 4))


OF_TWO = [
    metrics.modality_gap,
    metrics.distributional_gap,
    metrics.alignment,
    metrics.retrieval_recall,
]
OF_ONE = [metrics.cone_concentration, metrics.uniformity]


def test_measures_equal_loops(pair):
    A, B = map(normalize, pair)
    n = len(A)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]

    def mean_distance(P, Q):
        return np.mean([np.linalg.norm(p - q) for p in P for q in Q])

    gap = 2 * mean_distance(A, B) - mean_distance(A, A) - mean_distance(B, B)
    energies = [np.exp(-2 * np.sum((A[i] - A[j]) ** 2)) for i, j in others]
    recall = np.mean([i in np.argsort(-(A[i] @ B.T))[:3] for i in range(n)])
    assert metrics.distributional_gap(*pair) == pytest.approx(gap)
    assert metrics.cone_concentration(pair[0]) == pytest.approx(
        np.mean([A[i] @ A[j] for i, j in others])
    )
    assert metrics.uniformity(pair[0]) == pytest.approx(np.log(np.mean(energies)))
    assert metrics.alignment(*pair) == pytest.approx(((A - B) ** 2).sum(axis=1).mean())
    assert metrics.alignment(*pair, alpha=1) == pytest.approx(np.linalg.norm(A - B, axis=1).mean())
    assert metrics.retrieval_recall(*pair, k=3) == pytest.approx(recall)


@pytest.mark.parametrize("measure", OF_TWO)
def test_a_common_rotation_and_the_length_of_rows_change_nothing(measure, pair):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    scaled = (rng.uniform(1, 5, size=(12, 1)) * part @ turn for part in pair)
    assert measure(*scaled) == pytest.approx(measure(*pair))


@pytest.mark.parametrize("measure", OF_TWO)
def test_rows_that_lack_a_modality_are_left_out(measure, pair):
    A, B = (part.copy() for part in pair)
    A[2], B[2] = np.nan, np.nan
    expected = measure(*(np.delete(part, 2, axis=0) for part in pair))
    assert measure(A, B) == pytest.approx(expected)
    if measure in (metrics.alignment, metrics.retrieval_recall):
        B[2] = pair[1][2]
        assert measure(A, B) == pytest.approx(expected)


def test_equal_modalities_have_no_gap_and_moved_ones_have(pair):
    A, _ = pair
    for gap in (metrics.modality_gap, metrics.distributional_gap):
        assert gap(A, A[::-1]) == pytest.approx(0, abs=1e-8)
        assert gap(A, A + 3) > 0.1


def test_the_distributional_gap_sees_what_centroids_do_not():
    A = np.array([[1.0, 0], [-1, 0]])
    B = np.array([[0.0, 1], [0, -1]])
    assert metrics.modality_gap(A, B) == 0
    assert metrics.distributional_gap(A, B) > 0.5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_come_in_random_order(k):
    A = np.array([[1.0, 0], [1, 0], [0, 1]])
    B = np.array([[1.0, 0], [1, 0], [1, 0.5]])
    labels = [0, 1, 1]
    orders = list(permutations(range(3)))

    def hit(query, order):
        cosines = (A @ normalize(B).T)[query]
        best = sorted(range(3), key=lambda j: (-round(cosines[j], 6), order.index(j)))[:k]
        return any(labels[j] == labels[query] for j in best)

    expected = np.mean([hit(query, order) for query in range(3) for order in orders])
    assert metrics.retrieval_recall(A, B, k=k, labels=labels) == pytest.approx(expected)


def test_collapsed_embeddings_retrieve_by_chance():
    A = np.ones((20, 3))
    assert metrics.retrieval_recall(A, A, k=5) == pytest.approx(0.25)
    assert metrics.effective_rank(A) == pytest.approx(1)
    assert metrics.cone_concentration(A) == pytest.approx(1)
    assert metrics.uniformity(A) == pytest.approx(0)


def test_equal_titles_are_right_for_each_other():
    A = np.eye(4)
    B = A[[1, 0, 3, 2]]
    assert metrics.retrieval_recall(A, B) == 0
    assert metrics.retrieval_recall(A, B, labels=["a", "a", "b", "b"]) == 1


def test_recall_does_not_depend_on_how_many_queries_are_asked_at_once():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(1500, 3))
    B = A + 0.3 * rng.normal(size=A.shape)
    cosines = normalize(A) @ normalize(B).T
    rank = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
    assert metrics.retrieval_recall(A, B, k=10) == pytest.approx((rank < 10).mean(), abs=1e-3)


def test_negative_pairs_are_of_different_rows_or_labels(pair):
    A, B = map(normalize, pair)
    labels = np.arange(12) // 2
    positive, negative = metrics.pair_similarities(*pair, labels=labels)
    np.testing.assert_allclose(positive, (A * B).sum(axis=1))
    expected = [A[i] @ B[j] for i in range(12) for j in range(12) if labels[i] != labels[j]]
    np.testing.assert_allclose(np.sort(negative), np.sort(expected))
    drawn = metrics.pair_similarities(*pair, max_negatives=50, random_state=0)[1]
    assert 30 < len(drawn) <= 50
    assert np.isin(drawn.round(9), (A @ B.T).round(9)).all()


def test_the_effective_rank_counts_directions_of_equal_length():
    assert metrics.effective_rank(np.eye(5)[:, :4] * 7) == pytest.approx(4)
    with pytest.raises(ValueError, match="All numbers are 0"):
        metrics.effective_rank(np.zeros((3, 2)))


@pytest.mark.parametrize("measure", OF_TWO)
def test_what_is_not_of_one_space_is_refused(measure):
    with pytest.raises(ValueError, match="A has 3 columns and B has 2.*CanonicalAligner"):
        measure(np.ones((4, 3)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="NaN"):
        measure(np.full((4, 3), np.nan), np.ones((4, 3))) if measure not in (
            metrics.alignment,
            metrics.retrieval_recall,
        ) else measure([[1.0, np.nan]], [[1.0, 2.0]])


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="A has 4 rows and B has 3"):
        metrics.alignment(np.ones((4, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="No row has both"):
        metrics.alignment([[1.0], [np.nan]], [[np.nan], [1.0]])
    with pytest.raises(ValueError, match="k=5, but there are 4 pairs"):
        metrics.retrieval_recall(np.ones((4, 3)), np.ones((4, 3)), k=5)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        metrics.retrieval_recall(np.ones((4, 3)), np.ones((4, 3)), labels=[1, 2, 3])


@pytest.mark.parametrize("measure", OF_ONE)
def test_one_row_is_no_spread(measure):
    with pytest.raises(ValueError, match="2 observed rows are needed; got 1"):
        measure([[1.0, 2.0]])
