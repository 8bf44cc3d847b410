"""Metrics: naive double loops, what must not matter, and what collapsed embeddings score."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.preprocessing import normalize

from sklembed import metrics
from sklembed.metrics import (
    alignment,
    cone_concentration,
    distributional_gap,
    effective_rank,
    modality_gap,
    pair_similarities,
    retrieval_recall,
    uniformity,
)

LABELS = np.array(list("abcaabddeabc"))
ALONE = [cone_concentration, uniformity, effective_rank]
UNPAIRED = [modality_gap, distributional_gap]
PAIRED = [alignment, retrieval_recall, lambda A, B: np.concatenate(pair_similarities(A, B))]
TWO = UNPAIRED + PAIRED


def two_modalities(seed=0, n_rows=12, width=4):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n_rows, width)) + 1
    return A, A + rng.normal(size=(n_rows, width)) - 1


@pytest.fixture(params=[2**21, 30], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", request.param)


def naive(name, A, B):
    A, B = normalize(A), normalize(B)
    n = len(A)
    distinct = [(i, j) for i in range(n) for j in range(n) if i != j]

    def distance(P, Q):
        return np.mean([np.linalg.norm(p - q) for p in P for q in Q])

    return {
        "modality_gap": lambda: np.linalg.norm(A.mean(axis=0) - B.mean(axis=0)),
        "distributional_gap": lambda: 2 * distance(A, B) - distance(A, A) - distance(B, B),
        "cone_concentration": lambda: np.mean([A[i] @ A[j] for i, j in distinct]),
        "alignment": lambda: np.mean([np.linalg.norm(A[i] - B[i]) ** 2 for i in range(n)]),
        "uniformity": lambda: np.log(
            np.mean([np.exp(-2 * np.linalg.norm(A[i] - A[j]) ** 2) for i, j in distinct])
        ),
    }[name]()


def expected_recall(cosines, right, k):
    """Average over all orders of the found rows."""
    n = len(cosines)
    orders = list(permutations(range(n)))
    hits = [
        right[i, sorted(order, key=lambda j, i=i: -cosines[i, j])[:k]].any()
        for order in orders
        for i in range(n)
    ]
    return np.mean(hits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", [*UNPAIRED, cone_concentration, alignment, uniformity])
def test_equals_the_double_loop(metric, seed, dtype, chunk):
    A, B = two_modalities(seed)
    parts = [A.astype(dtype), B.astype(dtype)][: 1 if metric in ALONE else 2]
    expected = naive(metric.__name__, A, B)
    assert metric(*parts) == pytest.approx(expected, rel=1e-4 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", ALONE + TWO)
def test_rotation_changes_nothing(metric, seed):
    parts = two_modalities(seed)[: 1 if metric in ALONE else 2]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    np.testing.assert_allclose(metric(*(part @ turn for part in parts)), metric(*parts))


@pytest.mark.parametrize("metric", [cone_concentration, uniformity, *TWO])
def test_the_length_of_rows_changes_nothing_however_large_or_small(metric):
    parts = two_modalities()[: 1 if metric in ALONE else 2]
    lengths = 10.0 ** np.linspace(-300, 300, 12)[:, None]
    np.testing.assert_allclose(metric(*(part * lengths for part in parts)), metric(*parts))


@pytest.mark.parametrize("metric", ALONE + UNPAIRED + PAIRED[:2])
def test_the_order_of_rows_changes_nothing(metric):
    parts = two_modalities()[: 1 if metric in ALONE else 2]
    order = np.random.default_rng(0).permutation(12)
    assert metric(*(part[order] for part in parts)) == pytest.approx(metric(*parts))


@pytest.mark.parametrize("metric", ALONE + TWO)
def test_missing_rows_are_left_out_and_pairs_that_lack_either(metric):
    A, B = two_modalities()
    kept_A, kept_B = np.arange(12) != 3, ~np.isin(np.arange(12), [5, 6])
    holed = [np.where(kept_A[:, None], A, np.nan), np.where(kept_B[:, None], B, np.nan)]
    if metric in PAIRED:
        kept_A = kept_B = kept_A & kept_B
    n = 1 if metric in ALONE else 2
    np.testing.assert_allclose(metric(*holed[:n]), metric(*[A[kept_A], B[kept_B]][:n]))


def test_a_sample_has_no_gap_to_itself_and_centroids_do_not_see_all():
    A, _ = two_modalities(n_rows=50)
    assert modality_gap(A, A) == distributional_gap(A, A) == 0
    assert distributional_gap(A, A[::-1].astype(np.float32)) == pytest.approx(0, abs=1e-6)
    cross = np.array([[1.0, 0], [-1, 0]]), np.array([[0.0, 1], [0, -1]])
    assert modality_gap(*cross) == 0
    assert distributional_gap(*cross) > 0.8


def test_uniformity_neither_cancels_nor_underflows():
    """Orthogonal rows are at a squared distance of 2, so that it is -2 t."""
    assert uniformity(np.eye(6), t=1000) == pytest.approx(-2000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_collapsed_embeddings_score_as_chance_does(k, dtype):
    A = np.outer(np.arange(1, 41), np.linspace(0.1, 1, 300)).astype(dtype)
    assert retrieval_recall(A, A, k=k) == pytest.approx(k / 40)
    assert cone_concentration(A) == pytest.approx(1)
    assert uniformity(A) == pytest.approx(0, abs=1e-6)
    assert effective_rank(A) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("labelled", [False, True])
def test_recall_is_the_mean_over_all_orders_of_what_ties(labelled, seed, k, chunk):
    rng = np.random.default_rng(seed)
    angles = rng.integers(0, 3, size=(2, 5))  # few directions: many ties
    A, B = (np.column_stack([np.cos(a), np.sin(a)]) for a in angles)
    labels = rng.integers(0, 3, size=5) if labelled else np.arange(5)
    expected = expected_recall((A @ B.T).round(9), labels[:, None] == labels, k)
    found = retrieval_recall(A, B, k=k, labels=labels if labelled else None)
    assert found == pytest.approx(expected)


def test_ties_do_not_chain():
    """Each cosine ties with the next, but the first is clearly better than the last."""
    angles = np.arccos(0.9 - 0.8e-6 * np.arange(200))
    B = np.column_stack([np.cos(angles), np.sin(angles)])
    A = np.tile([1.0, 0], (200, 1))
    recalls = [retrieval_recall(A, B, k=k) for k in range(1, 201)]
    assert np.diff(recalls).min() >= 0
    np.testing.assert_allclose(recalls, np.arange(1, 201) / 200, atol=1e-3)


def test_negatives_are_all_pairs_of_different_labels_each_once(chunk):
    A, B = two_modalities()
    cosines = normalize(A) @ normalize(B).T
    for labels in (None, LABELS):
        names = np.arange(12) if labels is None else labels
        positive, negative = pair_similarities(A, B, labels=labels)
        expected = cosines[names[:, None] != names]
        np.testing.assert_allclose(positive, cosines.diagonal())
        np.testing.assert_allclose(np.sort(negative), np.sort(expected))
        some = pair_similarities(A, B, labels=labels, max_negatives=50, random_state=0)[1]
        assert len(np.unique(some.round(12))) == 50
        assert np.isin(some.round(9), expected.round(9)).all()


def test_negatives_of_very_many_rows_are_drawn_evenly():
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, size=50_000)
    A = np.column_stack([np.cos(angles), np.sin(angles)])
    negative = pair_similarities(A, A, max_negatives=20_000, random_state=0)[1]
    assert len(negative) == 20_000
    assert negative.mean() == pytest.approx(0, abs=0.02)


def test_effective_rank_counts_directions():
    assert effective_rank(3 * np.eye(7)[:, :5]) == pytest.approx(5)
    assert effective_rank(np.zeros((3, 2))) == 0
    A, _ = two_modalities()
    p = np.linalg.svd(A, compute_uv=False) / np.linalg.svd(A, compute_uv=False).sum()
    assert effective_rank(A) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


# What is refused


@pytest.mark.parametrize("metric", TWO)
def test_rows_of_two_spaces_are_refused(metric):
    expected = r"A has 4 columns and B 3.*CanonicalAligner.*widths='resample'"
    with pytest.raises(ValueError, match=expected):
        metric(np.ones((3, 4)), np.ones((3, 3)))


@pytest.mark.parametrize("metric", PAIRED)
def test_rows_that_are_no_pairs_are_refused(metric):
    with pytest.raises(ValueError, match="A has 4 rows and B 3"):
        metric(np.ones((4, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="None of the 2 rows has both"):
        metric([[np.nan], [1.0]], [[1.0], [np.nan]])


@pytest.mark.parametrize("metric", UNPAIRED)
def test_a_modality_without_rows_is_refused(metric):
    with pytest.raises(ValueError, match="B needs 1 or more rows with values, but 0 of its 3"):
        metric(np.ones((2, 2)), np.full((3, 2), np.nan))


@pytest.mark.parametrize("metric", [cone_concentration, uniformity])
def test_one_row_has_no_spread(metric):
    with pytest.raises(ValueError, match="A needs 2 or more rows with values, but 1 of its 2"):
        metric([[1.0, 2.0], [np.nan, np.nan]])


def test_torn_and_infinite_rows_are_refused_by_name():
    with pytest.raises(ValueError, match="NaN in 1 of 2 columns of row 1") as raised:
        modality_gap(np.ones((2, 2)), [[1.0, 1.0], [1.0, np.nan]])
    assert raised.value.__notes__ == ["This was in B."]
    with pytest.raises(ValueError, match="Input A contains infinity"):
        effective_rank([[1.0, np.inf]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k == 0, must be >= 1"),
        ({"k": 13}, "k=13 asks for more rows than there are: 12 have both"),
        ({"labels": LABELS[:5]}, "5 labels for 12 rows"),
        ({"labels": [None, *LABELS[1:]]}, "None in 1 of 12 rows, first in row 0"),
    ],
)
def test_recall_refuses_what_it_cannot_count(options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(*two_modalities(), **options)


def test_options_outside_their_range_and_no_negatives_are_refused():
    A, B = two_modalities()
    with pytest.raises(ValueError, match="alpha == 0, must be > 0"):
        alignment(A, B, alpha=0)
    with pytest.raises(ValueError, match="t == -1, must be > 0"):
        uniformity(A, t=-1)
    with pytest.raises(ValueError, match="max_negatives == 0, must be >= 1"):
        pair_similarities(A, B, max_negatives=0)
    with pytest.raises(ValueError, match="No two of the 12 pairs differ"):
        pair_similarities(A, B, labels=np.zeros(12))
