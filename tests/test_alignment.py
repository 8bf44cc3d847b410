"""Alignment: the formulas of the papers, and no leakage from test rows."""

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import interp1d
from sklearn.covariance import LedoitWolf
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from sklembed import CanonicalAligner, ModalityGapAligner, PerModalityUnion

METHODS = ("shift", "unit_shift", "center", "procrustes", "whiten")
EQUAL = {"text": slice(0, 5), "image": slice(5, 10)}


def two_cones(n_rows=80, seed=0, width=5):
    """Make two paired modalities that lie in separate cones."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n_rows, 3))
    cones = rng.normal(size=(2, width)) * 2
    parts = [shared @ rng.normal(size=(3, width)) + cone for cone in cones]
    return np.hstack(parts) + 0.1 * rng.normal(size=(n_rows, 2 * width))


def halves(X):
    return X[:, :5], X[:, 5:]


def by_the_papers_formula(text, image, new_text, new_image, shift):
    """Shift as arXiv 2406.02601 does, but with the gap of the training rows."""
    gap = normalize(image).mean(axis=0) - normalize(text).mean(axis=0)
    text = normalize(normalize(new_text) + shift / 2 * gap)
    return np.hstack([text, normalize(normalize(new_image) - shift / 2 * gap)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3, 1.0])
def test_two_modalities_move_by_half_the_gap_each(seed, shift):
    X, new = two_cones(seed=seed), two_cones(seed=seed + 10)
    aligner = ModalityGapAligner(EQUAL, shift=shift).fit(X)
    expected = by_the_papers_formula(*halves(X), *halves(new), shift)
    np.testing.assert_allclose(aligner.transform(new), expected)


@pytest.mark.parametrize("method", ["shift", "unit_shift"])
def test_centroids_coincide_at_a_shift_of_the_whole_gap(method):
    X = two_cones()
    aligner = ModalityGapAligner(EQUAL, method=method).fit(X)
    whole = 1.0 if method == "shift" else aligner.gap_before_  # delta = lambda * |gap|
    moved = [
        normalize(part).mean(axis=0) + whole * offset
        for part, offset in zip(halves(X), aligner.offsets_.values(), strict=True)
    ]
    np.testing.assert_allclose(moved[0], moved[1])
    np.testing.assert_allclose(moved[0], aligner.grand_centroid_)


def test_a_unit_shift_moves_by_half_of_its_own_length():
    X = two_cones()
    aligner = ModalityGapAligner(EQUAL, method="unit_shift", shift=0.4).fit(X)
    gap = aligner.centroids_["image"] - aligner.centroids_["text"]
    moved = normalize(X[:, :5]) + 0.5 * 0.4 * gap / np.linalg.norm(gap)
    np.testing.assert_allclose(aligner.transform(X)[:, :5], normalize(moved))


@pytest.mark.parametrize("method", METHODS)
def test_no_shift_is_the_identity_up_to_the_length_of_rows(method):
    X = two_cones()
    Z = ModalityGapAligner(EQUAL, method=method, shift=0.0).fit_transform(X)
    np.testing.assert_allclose(Z, np.hstack([normalize(part) for part in halves(X)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["shift", "center", "whiten"])
def test_the_gap_of_training_rows_nearly_closes(seed, method):
    aligner = ModalityGapAligner(EQUAL, method=method).fit(two_cones(seed=seed))
    assert aligner.gap_after_ < 0.35 * aligner.gap_before_


def test_gaps_are_the_distances_of_centroids():
    X = two_cones()
    aligner = ModalityGapAligner(EQUAL).fit(X)
    for Z, gap in (
        (X, aligner.gap_before_),
        (aligner.transform(X), aligner.gap_after_),
    ):
        text, image = (normalize(part).mean(axis=0) for part in halves(Z))
        assert gap == pytest.approx(np.linalg.norm(text - image))


def test_centring_takes_each_centroid_away():
    X = two_cones()
    Z = ModalityGapAligner(EQUAL, method="center").fit_transform(X)
    text = normalize(X[:, :5])
    np.testing.assert_allclose(Z[:, :5], normalize(text - text.mean(axis=0)))


def test_procrustes_keeps_inner_products_and_brings_pairs_together():
    X = two_cones()
    Z = ModalityGapAligner(EQUAL, method="procrustes").fit_transform(X)
    (text, image), (Z_text, Z_image) = map(normalize, halves(X)), halves(Z)
    np.testing.assert_allclose(Z_text, text)  # the first block stays
    np.testing.assert_allclose(Z_image @ Z_image.T, image @ image.T)
    assert (Z_text * Z_image).sum(axis=1).mean() > (text * image).sum(
        axis=1
    ).mean() + 0.1


def test_whitened_directions_vary_alike():
    X = np.random.default_rng(0).normal(size=(5000, 10)) * ([1, 2, 3, 1, 2] * 2)
    aligner = ModalityGapAligner(EQUAL, method="whiten").fit(X)
    whitened = normalize(X[:, :5]) @ aligner.maps_["text"] + aligner.offsets_["text"]
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(5) / 5, atol=0.01)


def test_the_gap_is_learned_from_training_rows_alone():
    X = two_cones(100)
    far_away = X.copy()
    far_away[50:] *= -3  # other test rows
    for table in (X, far_away):
        aligner = ModalityGapAligner(EQUAL).fit(table[:50])
        np.testing.assert_array_equal(
            aligner.transform(table)[:50],
            ModalityGapAligner(EQUAL).fit(X[:50]).transform(X[:50]),
        )
    # In cross-validation, a gap computed over all rows would leak the centroid of the
    # test rows.
    y = np.arange(100) % 2
    pipeline = make_pipeline(ModalityGapAligner(EQUAL), LogisticRegression())
    by_fold = cross_val_score(pipeline, X, y, cv=[(np.arange(50), np.arange(50, 100))])
    alone = pipeline.fit(X[:50], y[:50]).score(X[50:], y[50:])
    assert by_fold == [alone]


def test_noise_has_the_requested_deviation_and_is_for_training_rows_alone():
    X = two_cones(2000)
    quiet, noisy = (
        ModalityGapAligner(EQUAL, noise_std=s, random_state=0) for s in (0.0, 0.126)
    )
    noise = noisy.fit_transform(X) - quiet.fit_transform(X)
    assert noise.std() == pytest.approx(0.126, rel=0.02)
    assert abs(noise.mean()) < 0.005
    np.testing.assert_array_equal(noisy.transform(X), quiet.transform(X))
    np.testing.assert_array_equal(noisy.fit(X).transform(X), quiet.transform(X))
    again = ModalityGapAligner(EQUAL, noise_std=0.126, random_state=0).fit_transform(X)
    np.testing.assert_array_equal(again, noisy.fit_transform(X))


@pytest.mark.parametrize("method", METHODS)
def test_missing_modalities_stay_missing_and_change_nothing_else(method):
    X = two_cones()
    X[::7, :5] = np.nan
    X[3, 5:] = np.nan
    aligner = ModalityGapAligner(EQUAL, method=method, noise_std=0.1, random_state=0)
    Z = aligner.fit_transform(X)
    np.testing.assert_array_equal(np.isnan(Z), np.isnan(X))
    text = normalize(X[~np.isnan(X[:, 0]), :5])
    np.testing.assert_allclose(aligner.centroids_["text"], text.mean(axis=0))


def test_three_modalities_meet_at_the_grand_centroid():
    X = np.hstack([two_cones(), two_cones(seed=5)[:, :5]])
    aligner = ModalityGapAligner(EQUAL | {"sound": slice(10, 15)}).fit(X)
    for name, centroid in aligner.centroids_.items():
        moved = centroid + aligner.offsets_[name]
        np.testing.assert_allclose(moved, aligner.grand_centroid_)
    assert aligner.gap_after_ < aligner.gap_before_


def test_resampling_interpolates_between_coordinates():
    X = two_cones()[:, :8]
    blocks = {"text": slice(0, 3), "image": slice(3, 8)}
    aligner = ModalityGapAligner(blocks, shift=0.0, widths="resample").fit(X)
    text = normalize(X[:, :3])
    stretched = interp1d(np.linspace(0, 1, 3), text)(np.linspace(0, 1, 5))
    np.testing.assert_allclose(aligner.transform(X)[:, :5], normalize(stretched))
    names = aligner.get_feature_names_out().tolist()
    assert names[:6] == [
        "text__0",
        "text__1",
        "text__2",
        "text__3",
        "text__4",
        "image__0",
    ]


def test_centring_and_whitening_take_unequal_widths_as_they_are():
    X = two_cones()[:, :8]
    for method in ("center", "whiten"):
        aligner = ModalityGapAligner(
            {"a": slice(0, 3), "b": slice(3, 8)}, method=method
        )
        assert aligner.fit_transform(X).shape == X.shape
        assert np.isnan(aligner.gap_before_)


def test_blocks_are_read_from_names_and_names_are_kept():
    X = pd.DataFrame({"text": ["a", "b", "c"], "a": [1.0, 2, 4], "b": [4.0, -1, 3]})
    union = PerModalityUnion(
        [("first", StandardScaler(), ["a"]), ("last", "passthrough", ["b"])]
    )
    pipeline = make_pipeline(union, ModalityGapAligner()).set_output(transform="pandas")
    Z = pipeline.fit_transform(X)
    assert list(Z.columns) == ["first__a", "last__b"]
    assert list(pipeline[-1].blocks_) == ["first", "last"]


def test_scattered_columns_are_the_same_blocks():
    X = two_cones()
    order = np.random.default_rng(0).permutation(10)
    place = np.argsort(order)
    scattered = {name: place[cols] for name, cols in EQUAL.items()}
    Z = ModalityGapAligner(scattered).fit_transform(X[:, order])
    np.testing.assert_allclose(Z[:, place], ModalityGapAligner(EQUAL).fit_transform(X))


def test_blocks_may_be_masks():
    X = two_cones()
    mask = np.arange(10) < 5
    aligner = ModalityGapAligner({"text": mask, "image": (~mask).tolist()}).fit(X)
    assert aligner.blocks_ == EQUAL


def test_shift_and_noise_can_be_searched():
    X = two_cones().astype(np.float32)
    y = X[:, 0] > X[:, 0].mean()
    pipeline = make_pipeline(
        ModalityGapAligner(EQUAL, random_state=0), LogisticRegression()
    )
    grid = {
        "modalitygapaligner__shift": [0.0, 0.5, 1.0],
        "modalitygapaligner__noise_std": [0.0, 0.5],
    }
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    assert len(set(search.cv_results_["mean_test_score"])) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"blocks": {"text": slice(0, 10)}},
            r"at least two modalities.*\['text'\] only",
        ),
        (
            {"blocks": {"a": slice(0, 4), "b": slice(4, 10)}},
            r"{'a': 4, 'b': 6}.*resample",
        ),
        ({"blocks": {"a": slice(0, 6), "b": slice(4, 10)}}, "column 4 is in 2 of"),
        ({"blocks": {"a": slice(0, 4), "b": slice(5, 10)}}, "column 4 is in 0 of"),
        (
            {"blocks": {"a": slice(0, 10), "b": slice(10, 12)}},
            "Block 'b' selects none of the",
        ),
        (
            {"blocks": {"a": [0, 11], "b": slice(2, 10)}},
            "selects column 11, but X has",
        ),
        (
            {"blocks": {"a": "x", "b": slice(2, 10)}},
            "selects column 'x' by name.*no column names",
        ),
        (
            {"blocks": None},
            r"X has no names.*set_output\(transform='pandas'\).*or pass blocks",
        ),
        ({"blocks": EQUAL, "method": "rotate"}, "'method' parameter"),
        ({"blocks": EQUAL, "noise_std": -1.0}, "'noise_std' parameter"),
    ],
)
def test_what_cannot_be_aligned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModalityGapAligner(**options).fit(two_cones())


def test_names_that_name_no_modality_are_refused():
    X = pd.DataFrame(two_cones()[:, :3], columns=["text__0", "image__0", "text__1"])
    with pytest.raises(
        ValueError, match="columns of 'text' are not contiguous: 'text__1' follows"
    ):
        ModalityGapAligner().fit(X)
    with pytest.raises(ValueError, match="Column 'size' has no modality in its name"):
        ModalityGapAligner().fit(X.rename(columns={"text__1": "size"}))


def test_rows_that_cannot_be_aligned_are_refused():
    X = two_cones()
    X[4, 6] = np.nan
    with pytest.raises(ValueError, match="NaN in 1 of 5 columns of row 4") as caught:
        ModalityGapAligner(EQUAL).fit(X)
    assert "block 'image'" in caught.value.__notes__[0]
    X[:, 5:] = np.nan
    with pytest.raises(ValueError, match="Block 'image' is NaN in all 80 rows"):
        ModalityGapAligner(EQUAL).fit(X)
    X = two_cones()
    X[:40, 5:] = np.nan
    X[40:, :5] = np.nan
    with pytest.raises(ValueError, match="rows that have both, and there are none"):
        ModalityGapAligner(EQUAL, method="procrustes").fit(X)


# Canonical correlations


def test_canonical_correlations_are_scikit_learn_s():
    X = two_cones(500)
    aligner = CanonicalAligner(3, blocks=EQUAL, shrinkage=0.0, weighted=False).fit(X)
    a, b = CCA(3, max_iter=5000, tol=1e-12).fit(*halves(X)).transform(*halves(X))
    expected = [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(3)]
    np.testing.assert_allclose(aligner.correlations_, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_projections_correlate_by_the_canonical_correlations(seed):
    X = two_cones(300, seed)
    aligner = CanonicalAligner(blocks=EQUAL, shrinkage=0.0).fit(X)
    a, b = (
        (part - aligner.means_[name]) @ aligner.maps_[name]
        for name, part in zip(EQUAL, halves(X), strict=True)
    )
    np.testing.assert_allclose(a.T @ a / 300, np.eye(5), atol=1e-8)
    np.testing.assert_allclose(a.T @ b / 300, np.diag(aligner.correlations_), atol=1e-8)


def test_weighted_inner_products_are_the_similarity_of_the_paper():
    X = two_cones(300)
    plain = CanonicalAligner(blocks=EQUAL, weighted=False).fit(X)
    a, b = halves(plain.transform(X))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1)
    Z_a, Z_b = halves(CanonicalAligner(blocks=EQUAL).fit(X).transform(X))
    expected = (a[:, None] * b[None] * plain.correlations_).sum(axis=2)
    np.testing.assert_allclose(Z_a @ Z_b.T, expected)


def test_shrinkage_keeps_few_rows_from_correlating_by_chance():
    noise = np.random.default_rng(0).normal(size=(12, 40))
    blocks = {"a": slice(0, 20), "b": slice(20, 40)}
    chance = CanonicalAligner(blocks=blocks, shrinkage=0.0).fit(noise).correlations_[0]
    shrunk = CanonicalAligner(blocks=blocks).fit(noise).correlations_[0]
    assert chance == pytest.approx(1)
    assert shrunk < 0.8


def isotropic(n_rows, width, seed=0, whiten=False):
    """Make two modalities of uncorrelated columns of unit variance; four are shared."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n_rows, 4))
    parts = []
    for _ in range(2):
        part = rng.normal(size=(n_rows, width))
        part[:, :4] = shared + 0.3 * part[:, :4]
        parts.append(PCA(whiten=True).fit_transform(part) if whiten else part)
    return np.hstack(parts), {"text": slice(0, width), "image": slice(width, 2 * width)}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("n_rows", "width"), [(1000, 16), (2000, 64), (200, 5)])
def test_isotropic_modalities_keep_their_correlations(n_rows, width, whiten):
    X, blocks = isotropic(n_rows, width, whiten=whiten)
    plain = CanonicalAligner(4, blocks=blocks, shrinkage=0.0).fit(X)
    aligner = CanonicalAligner(4, blocks=blocks).fit(X)
    np.testing.assert_allclose(aligner.correlations_, plain.correlations_, atol=0.06)
    assert (np.linalg.norm(aligner.transform(X), axis=1) > 0.5).all()


def test_noise_of_more_columns_than_rows_does_not_correlate():
    X = np.random.default_rng(0).normal(size=(50, 1000))
    aligner = CanonicalAligner(blocks={"a": slice(0, 500), "b": slice(500, 1000)}).fit(
        X
    )
    assert 0 < aligner.correlations_[0] < 0.8


def inverse_root(covariance):
    variances, axes = np.linalg.eigh(covariance)
    return (axes / np.sqrt(variances)) @ axes.T


@pytest.mark.parametrize("shrinkage", [0.1, 0.7])
@pytest.mark.parametrize("n_missing", [0, 6])
@pytest.mark.parametrize("width", [20, 70])
def test_directions_are_those_of_the_covariances(width, n_missing, shrinkage):
    """With fewer rows than columns, the decomposition is of rows by rows."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3)) @ rng.normal(size=(3, width + 50))
    X += 3 + rng.normal(size=X.shape)
    X[:n_missing, :width] = np.nan
    X[n_missing : 2 * n_missing, width:] = np.nan
    blocks = {"text": slice(0, width), "image": slice(width, width + 50)}
    aligner = CanonicalAligner(3, blocks=blocks, shrinkage=shrinkage).fit(X)

    roots, centred = [], []
    for columns in blocks.values():
        part = X[:, columns] - np.nanmean(X[:, columns], axis=0)
        rows = part[~np.isnan(part).any(axis=1)]
        covariance = rows.T @ rows / len(rows)
        target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        roots.append(inverse_root((1 - shrinkage) * covariance + shrinkage * target))
        centred.append(part)
    paired = ~np.isnan(X).any(axis=1)
    a, b = (part[paired] for part in centred)
    between = (1 - shrinkage) * roots[0] @ a.T @ b @ roots[1] / paired.sum()
    left, correlations, right = np.linalg.svd(between)
    np.testing.assert_allclose(aligner.correlations_, correlations[:3].clip(max=1))
    for root, directions, part in zip(
        roots, (left, right.T), aligner.maps_.values(), strict=True
    ):
        expected = root @ directions[:, :3]
        signs = np.sign((expected * part).sum(axis=0))
        np.testing.assert_allclose(part * signs, expected, atol=1e-8)


def test_whitening_is_the_same_from_rows_and_from_columns():
    X = np.random.default_rng(0).normal(size=(20, 80)) + 1
    blocks = {"text": slice(0, 30), "image": slice(30, 80)}
    aligner = ModalityGapAligner(blocks, method="whiten").fit(X)
    for name, columns in blocks.items():
        rows = normalize(X[:, columns])
        covariance = LedoitWolf().fit(rows).covariance_
        expected = inverse_root(covariance) / np.sqrt(len(covariance))
        np.testing.assert_allclose(aligner.maps_[name], expected, rtol=1e-8, atol=1e-10)


def test_components_beyond_the_rank_are_zero():
    X = np.random.default_rng(0).normal(size=(6, 40))
    aligner = CanonicalAligner(blocks={"a": slice(0, 20), "b": slice(20, 40)}).fit(X)
    assert (aligner.correlations_[:5] > 0.1).all()
    np.testing.assert_allclose(aligner.correlations_[5:], 0, atol=1e-12)
    assert aligner.transform(X).shape == (6, 40)


@pytest.mark.parametrize("n_rows", [2, 3, 30])
@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("shape", ["constant", "duplicated", "plain"])
def test_degenerate_blocks_give_finite_rows(shape, width, n_rows):
    X = np.random.default_rng(0).normal(size=(n_rows, 2 * width))
    if shape == "constant":
        X[:, :width] = 3.1
    elif shape == "duplicated":
        X = X[:, [0] * width + [width] * width]
    blocks = {"a": slice(0, width), "b": slice(width, 2 * width)}
    for aligner in (
        CanonicalAligner(blocks=blocks),
        ModalityGapAligner(blocks, method="whiten"),
    ):
        Z = aligner.fit(X).transform(X + 1e-6)
        assert np.isfinite(Z).all()
        assert np.abs(Z).max() <= 1 + 1e-12
    if shape == "constant":
        aligner = CanonicalAligner(blocks=blocks).fit(X)
        assert not aligner.correlations_.any()
        assert not aligner.maps_["a"].any()


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_a_far_column_of_float32_changes_no_projection(offset):
    X = two_cones(300).astype(np.float32)
    far = X + np.float32(offset)
    X = (far - np.float32(offset)).astype(np.float64)  # as rounded to float32
    aligner = CanonicalAligner(3, blocks=EQUAL)
    Z = aligner.fit_transform(X)
    Z_far = aligner.fit_transform(far)
    assert Z_far.dtype == np.float32
    signs = np.sign((Z * Z_far).sum(axis=0))
    np.testing.assert_allclose(Z_far * signs, Z, atol=1e-4)


@pytest.mark.parametrize("method", ["center", "whiten"])
def test_far_columns_of_float32_are_aligned_as_in_double_precision(method):
    far = (two_cones(300) + 1000).astype(np.float32)
    aligner = ModalityGapAligner(EQUAL, method=method)
    expected = aligner.fit_transform(far.astype(np.float64))
    Z = aligner.fit_transform(far)
    assert Z.dtype == np.float32
    np.testing.assert_allclose(Z, expected, atol=1e-5)
    np.testing.assert_array_equal(
        aligner.encode(far[:, :5], "text"), aligner.transform(far)[:, :5]
    )


def test_shrinkage_leaves_something_of_the_covariance():
    with pytest.raises(ValueError, match=r"'shrinkage' parameter.*0.0, 1.0"):
        CanonicalAligner(blocks=EQUAL, shrinkage=1.0).fit(two_cones())


@pytest.mark.parametrize(
    "aligner", [CanonicalAligner(3, blocks=EQUAL), ModalityGapAligner(EQUAL)]
)
def test_a_request_without_any_modality_stays_missing(aligner):
    X = two_cones()
    aligner.fit(X)
    Z = aligner.transform(np.full((1, 10), np.nan))
    assert Z.shape == (1, aligner.transform(X).shape[1])
    assert np.isnan(Z).all()
    assert np.isnan(aligner.encode(np.full((1, 5), np.nan), "text")).all()


def test_unpaired_rows_are_projected_too():
    X = two_cones()
    X[:5, :5] = np.nan
    Z = (
        CanonicalAligner(3, blocks=EQUAL)
        .set_output(transform="pandas")
        .fit_transform(X)
    )
    assert list(Z.columns[:4]) == ["text__0", "text__1", "text__2", "image__0"]
    assert Z.iloc[:5, :3].isna().all(axis=None)
    assert Z.iloc[:, 3:].notna().all(axis=None)


def test_what_cannot_be_paired_is_refused():
    X = two_cones()
    with pytest.raises(ValueError, match="pairs two modalities"):
        CanonicalAligner(blocks={"all": slice(0, 10)}).fit(X)
    with pytest.raises(
        ValueError, match="n_components=6, but the narrower modality has 5"
    ):
        CanonicalAligner(6, blocks=EQUAL).fit(X)
    X[1:, :5] = np.nan
    with pytest.raises(ValueError, match="Only 1 of n_samples=80 rows have both"):
        CanonicalAligner(blocks=EQUAL).fit(X)
