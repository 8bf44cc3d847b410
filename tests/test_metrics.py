"""Metrics: naive loops, invariances, collapsed embeddings, empty masks and errors."""

import re
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import normalize

from sklembed import metrics
from sklembed.metrics import (
    alignment,
    cone_concentration,
    dice_score,
    distributional_gap,
    effective_rank,
    iou_score,
    modality_gap,
    pair_similarities,
    retrieval_recall,
    uniformity,
)

LABELS = np.array(list("abcaabddeabc"))
ALONE = [cone_concentration, uniformity, effective_rank]
UNPAIRED = [modality_gap, distributional_gap]
PAIRED = [
    alignment,
    retrieval_recall,
    lambda A, B: np.concatenate(pair_similarities(A, B)),
]
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
        "distributional_gap": lambda: (
            2 * distance(A, B) - distance(A, A) - distance(B, B)
        ),
        "cone_concentration": lambda: np.mean([A[i] @ A[j] for i, j in distinct]),
        "alignment": lambda: np.mean(
            [np.linalg.norm(A[i] - B[i]) ** 2 for i in range(n)]
        ),
        "uniformity": lambda: np.log(
            np.mean(
                [np.exp(-2 * np.linalg.norm(A[i] - A[j]) ** 2) for i, j in distinct]
            )
        ),
    }[name]()


def expected_recall(cosines, right, k):
    """Average recall over all orders of the rows."""
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
@pytest.mark.parametrize(
    "metric", [*UNPAIRED, cone_concentration, alignment, uniformity]
)
def test_equals_the_double_loop(metric, seed, dtype, chunk):
    A, B = two_modalities(seed)
    parts = [A.astype(dtype), B.astype(dtype)][: 1 if metric in ALONE else 2]
    expected = naive(metric.__name__, A, B)
    assert metric(*parts) == pytest.approx(
        expected, rel=1e-4 if dtype == np.float32 else 1e-9
    )


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
    np.testing.assert_allclose(
        metric(*(part * lengths for part in parts)), metric(*parts)
    )


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
    assert distributional_gap(A, A[::-1].astype(np.float32)) == pytest.approx(
        0, abs=1e-6
    )
    cross = np.array([[1.0, 0], [-1, 0]]), np.array([[0.0, 1], [0, -1]])
    assert modality_gap(*cross) == 0
    assert distributional_gap(*cross) > 0.8


def test_uniformity_neither_cancels_nor_underflows():
    """Orthogonal rows have a squared distance of 2, so uniformity is -2 t."""
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
        some = pair_similarities(A, B, labels=labels, max_negatives=50, random_state=0)[
            1
        ]
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


# Errors


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
    with pytest.raises(
        ValueError, match="B needs 1 or more rows with values, but only 0 of its 3"
    ):
        metric(np.ones((2, 2)), np.full((3, 2), np.nan))


@pytest.mark.parametrize("metric", [cone_concentration, uniformity])
def test_one_row_has_no_spread(metric):
    with pytest.raises(
        ValueError, match="A needs 2 or more rows with values, but only 1 of its 2"
    ):
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
        ({"k": 13}, "at most the number of rows with both modalities, 12; got 13"),
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


# Masks


MASK_SCORES = [dice_score, iou_score]
each_mask_score = pytest.mark.parametrize("score", MASK_SCORES)


def some_masks(seed, labels, n=8):
    """Draw true and predicted masks of several sizes; in rows 1, 3 and 5 some are empty."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, size=(n, 2))
    truth = [rng.choice(labels, size=size) for size in sizes]
    found = [
        np.where(rng.random(t.shape) < 0.6, t, rng.choice(labels, size=t.shape))
        for t in truth
    ]
    for row in range(n):
        truth[row][0, 0] = found[row][0, 0] = labels[-1]
    for part, rows in ((truth, (1, 3)), (found, (3, 5))):
        for row in rows:
            part[row][:] = 0
    return truth, found


def naive_mask_score(score, truth, found, *, skip=False):
    """Average over images, then over the labels of each, by sets of pixels."""
    means = []
    for t, p in zip(truth, found, strict=True):
        pixels = list(np.ndindex(t.shape))
        parts = []
        for label in {int(m[pixel]) for m in (t, p) for pixel in pixels} - {0}:
            T, P = ({pixel for pixel in pixels if m[pixel] == label} for m in (t, p))
            both = len(T & P)
            parts.append(
                2 * both / (len(T) + len(P))
                if score is dice_score
                else both / len(T | P)
            )
        if not (skip and not t.any()):
            means.append(sum(parts) / len(parts) if parts else 1.0)
    return sum(means) / len(means)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 7], [0, 65535], [3, 4]], ids=str)
@pytest.mark.parametrize("seed", range(5))
@each_mask_score
def test_scores_of_masks_equal_the_loop_over_pixels(score, seed, labels):
    truth, found = some_masks(seed, labels)
    expected = naive_mask_score(score, truth, found)
    assert score(truth, found) == pytest.approx(expected)
    skipped = naive_mask_score(score, truth, found, skip=True)
    assert score(truth, found, empty="skip") == pytest.approx(skipped)
    adjusted = (expected - 2 / 8) / (1 - 2 / 8)
    assert score(truth, found, adjusted=True) == pytest.approx(adjusted)
    assert score(truth, found, empty="skip", adjusted=True) == pytest.approx(skipped)


@each_mask_score
def test_finding_nothing_scores_the_share_of_empty_masks_or_adjusted_nothing(score):
    truth, found = some_masks(0, [0, 1, 2])
    nothing = [np.zeros_like(t) for t in truth]
    assert score(truth, nothing) == pytest.approx(2 / 8)
    assert (
        score(truth, nothing, empty="skip") == score(truth, nothing, adjusted=True) == 0
    )
    assert score(truth, truth) == score(truth, truth, adjusted=True) == 1
    assert score(truth, truth, empty="skip") == 1
    everywhere = [np.ones_like(t) for t in truth]
    assert score(nothing[:1] * 3 + truth[:1], everywhere[:1] * 4, adjusted=True) < 0
    assert score(nothing, nothing) == 1
    assert score(nothing, everywhere) == 0


@pytest.mark.parametrize("seed", range(3))
def test_iou_follows_from_the_dice_of_an_image_of_one_object(seed):
    for t, p in zip(*some_masks(seed, [0, 1]), strict=True):
        dice = dice_score([t], [p])
        assert iou_score([t], [p]) == pytest.approx(dice / (2 - dice))


@each_mask_score
def test_names_of_labels_sides_and_the_order_of_images_change_nothing(score):
    truth, found = some_masks(0, [0, 1, 2])
    expected = score(truth, found)
    names = np.array([0, 9, 4])
    assert score([names[t] for t in truth], [names[p] for p in found]) == pytest.approx(
        expected
    )
    assert score([t.T for t in truth], [p.T for p in found]) == pytest.approx(expected)
    assert score(truth[::-1], found[::-1]) == pytest.approx(expected)
    assert score(found, truth) == pytest.approx(expected)


@each_mask_score
def test_masks_of_any_type_and_form_score_the_same(score):
    truth, found = (
        np.stack([np.resize(m, (4, 4)) for m in part]) for part in some_masks(0, [0, 1])
    )
    expected = score(truth, found)
    assert 0 < expected < 1
    for dtype in (bool, np.uint8, np.int8, np.uint64, np.float32):
        assert score(truth.astype(dtype), found) == expected
        assert score(truth, found.astype(dtype)) == expected
    objects = np.empty(8, dtype=object)
    objects[:] = list(truth)
    for form in (
        truth.tolist(),
        list(truth),
        tuple(truth),
        objects,
        pd.Series(list(truth)),
    ):
        assert score(form, found) == score(found, form) == expected


@each_mask_score
def test_masks_that_cannot_be_compared_are_refused_by_row(score):
    truth, found = some_masks(0, [0, 1])
    with pytest.raises(ValueError, match="There are 7 predictions for 8 masks"):
        score(truth, found[:7])
    turned = [*found[:2], np.zeros((9, 4)), *found[3:]]
    size = re.escape(str(truth[2].shape))
    with pytest.raises(
        ValueError, match=rf"In row 2 the mask has the size {size}.* \(9, 4\)\. Res"
    ):
        score(truth, turned)
    with pytest.raises(ValueError, match="empty must be 'count' or 'skip'; got 'drop'"):
        score(truth, found, empty="drop")
    nothing = [np.zeros_like(t) for t in truth]
    for options in ({"empty": "skip"}, {"adjusted": True}):
        with pytest.raises(ValueError, match="All 8 masks are empty"):
            score(nothing, found, **options)
    for wrong, message in ((0.5, "has the label 0.5"), (-1, "has the label -1")):
        torn = [*found[:4], np.full(found[4].shape, wrong), *found[5:]]
        with pytest.raises(ValueError, match=f"Row 4 of y_pred {message}"):
            score(truth, torn)
        with pytest.raises(ValueError, match=f"Row 4 of y_true {message}"):
            score(torn, truth)


def test_boolean_masks_are_not_compared_with_other_labels_than_1():
    y = np.array([[[0, 255], [0, 0]]])
    with pytest.raises(ValueError, match="boolean on one side and have labels above 1"):
        dice_score(y, y > 0)
    assert dice_score(y // 255, y > 0) == 1
