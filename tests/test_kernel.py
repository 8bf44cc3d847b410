"""Kernel ridge on blocks: closed forms against brute force, scaling, calibration, search."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from sklembed import KernelFusionClassifier, KernelFusionRegressor
from sklembed._grid import descend
from sklembed.fusion import kernel
from sklembed.fusion.calibration import calibrate, fit_calibration, fit_sigmoids
from sklembed.fusion.scaling import find_table_blocks, fit_scaling, scale_blocks

WIDTH = 18  # columns of a vector; blocks below 16 columns are table columns
BLOCKS = {
    "text": slice(0, WIDTH),
    "image": slice(WIDTH, 2 * WIDTH),
    "table": slice(2 * WIDTH, 2 * WIDTH + 3),
}
VECTORS = {"text": BLOCKS["text"], "image": BLOCKS["image"]}


def make_table(n_rows=60, n_classes=3, seed=0):
    """Return two vectors and three table columns side by side, and classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_rows) % n_classes
    X = rng.normal(size=(n_rows, 2 * WIDTH + 3))
    X[:, :WIDTH] += rng.normal(size=(n_classes, WIDTH))[y]
    X[:, -1] += y
    return X, y


def make_vectors(n_rows=60, n_classes=3, seed=0):
    X, y = make_table(n_rows, n_classes, seed)
    return X[:, : 2 * WIDTH], y


def classifier(blocks=BLOCKS, **options):
    return KernelFusionClassifier(blocks=blocks, random_state=0, **options)


def regressor(blocks=BLOCKS, **options):
    return KernelFusionRegressor(blocks=blocks, random_state=0, **options)


def make_labels(y):
    """Return three labels of each row, of which the last is rare."""
    return np.column_stack([y == 0, y != 1, np.arange(len(y)) % 9 == 4]).astype(int)


def make_numbers(X, y):
    return y + X[:, 0] - X[:, -1] / 2


# Closed forms


def make_rows(n_rows=14, n_outputs=2, weighted=True):
    """Return a kernel matrix, training rows with targets, and groups."""
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(n_rows, 4))
    K = np.exp(-0.3 * np.square(Z[:, None] - Z[None]).sum(axis=2))
    weight = rng.uniform(0.2, 3, n_rows) if weighted else np.ones(n_rows)
    targets = rng.normal(size=(n_rows, n_outputs))
    return K, kernel._Rows(Z, targets, weight, np.arange(n_rows) % 4)


def ridge(K, data, train, alpha):
    """Solve (W K + alpha) coef = W y for some rows, without symmetry or square roots."""
    W = np.diag(data.weight[train])
    system = W @ K[np.ix_(train, train)] + alpha * np.eye(len(train))
    return np.linalg.solve(system, W @ data.targets[train])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
def test_closed_form_equals_fits_without_the_row_or_its_group(weighted, by_group):
    K, data = make_rows(weighted=weighted)
    rows = np.arange(len(K))
    groups = data.groups if by_group else rows
    coef, predicted = kernel._solve_dual(
        K, data, 0.1, kernel._rows_by_group(groups) if by_group else None
    )
    np.testing.assert_allclose(coef, ridge(K, data, rows, 0.1), rtol=1e-8)
    for group in np.unique(groups):
        train, held_out = rows[groups != group], rows[groups == group]
        expected = K[np.ix_(held_out, train)] @ ridge(K, data, train, 0.1)
        np.testing.assert_allclose(predicted[-1][held_out], expected, rtol=1e-8)


def test_groups_of_single_rows_are_leave_one_out():
    K, data = make_rows()
    singles = kernel._rows_by_group(np.arange(len(K))[::-1])
    by_row, by_group = kernel._solve_dual(K, data, 0.1, singles)[1]
    np.testing.assert_allclose(by_group, by_row)
    (without_groups,) = kernel._solve_dual(K, data, 0.1, None)[1]
    np.testing.assert_array_equal(without_groups, by_row)


def fitted_without(model, X, y, rows, scaled_like):
    """Predict with the coefficients of a fit on some rows, all else as in another fit."""
    targets = (y - scaled_like.target_mean_) / scaled_like.target_scale_
    reduced = clone(model)
    vars(reduced).update(vars(scaled_like))
    data = kernel._Rows(X[rows].astype(np.float32), None, np.ones(len(rows)), None)
    K = reduced._set_landmarks(data)
    reduced._coef = np.linalg.solve(
        K + scaled_like.alpha_ * np.eye(len(rows)), targets[rows, None]
    )
    return reduced


def test_predictions_out_of_fold_are_those_of_fits_without_the_row():
    X, y = make_table(30)
    y = make_numbers(X, y)
    model = regressor(gamma=0.5, alpha=0.1)
    (out_of_fold,) = model._fit(X, y, None, None)
    for row in (0, 11, 29):
        rest = np.delete(np.arange(30), row)
        reduced = fitted_without(model, X, y, rest, model)
        expected = reduced.predict(X[[row]])
        np.testing.assert_allclose(out_of_fold[row], expected, rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_landmarks_at_all_rows_equal_the_exact_fit(weighted):
    X, y = make_table(60)
    y = make_numbers(X, y)
    weight = np.random.default_rng(0).uniform(0.5, 2, 60) if weighted else None
    exact = regressor(gamma=0.5, alpha=0.1).fit(X, y, sample_weight=weight)
    on_landmarks = clone(exact).fit(X, y, sample_weight=weight)
    data = kernel._Rows(
        X.astype(np.float32),
        ((y - exact.target_mean_) / exact.target_scale_)[:, None],
        np.ones(60) if weight is None else weight,
        None,
    )
    on_landmarks._fit_landmarks(data, np.arange(60), 0)
    new = make_table(40, seed=1)[0]
    np.testing.assert_allclose(
        on_landmarks.predict(new), exact.predict(new), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("n_groups", [None, 2, 3, 12])
def test_fold_predictions_on_landmarks_equal_refits_without_the_fold(n_groups):
    X, y = make_table(60)
    X = X.astype(np.float32)
    rng = np.random.default_rng(0)
    targets, weight = rng.normal(size=(60, 2)), rng.uniform(0.5, 2, 60)
    groups = None if n_groups is None else np.arange(60) % n_groups
    data = kernel._Rows(X, targets, weight, groups)
    model = regressor(gamma=0.5, alpha=0.3).fit(X, y)
    predicted = model._fit_landmarks(data, np.arange(0, 60, 3), 0)[-1]
    fold_of = kernel._folds_of_rows(data, 0)[-1]
    K = model._kernel(model._scale(X))  # rows by landmarks
    penalty = model._kernel(model._landmarks) + kernel._JITTER * np.eye(20)
    for fold in np.unique(fold_of):
        train, held_out = fold_of != fold, fold_of == fold
        W = weight[train, None]
        system = K[train].T @ (W * K[train]) + 0.3 * penalty
        coef = np.linalg.solve(system, K[train].T @ (W * targets[train]))
        np.testing.assert_allclose(predicted[held_out], K[held_out] @ coef, rtol=1e-5)
    if groups is not None:
        for group in range(n_groups):
            assert len(np.unique(fold_of[groups == group])) == 1


def test_few_landmarks_come_close_to_the_exact_fit():
    X, y = make_table(300)
    exact = classifier().fit(X[:200], y[:200])
    approximate = classifier(n_landmarks=100).fit(X[:200], y[:200])
    assert {len(block.values) for block in approximate._landmarks.values()} == {100}
    assert approximate.score(X[200:], y[200:]) > 0.9
    P = exact.predict_proba(X[200:])
    assert np.abs(P - approximate.predict_proba(X[200:])).mean() < 0.1


@pytest.mark.parametrize("n_rows", [3, 4, 6])
def test_hardly_any_rows_and_landmarks(n_rows):
    X, y = make_table(n_rows, n_classes=2)
    model = classifier(n_landmarks=2).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_landmarks_may_be_equal_rows():
    X, y = make_table(15)
    X, y = np.repeat(X, 20, axis=0), np.repeat(y, 20)
    model = classifier(gamma=16.0, n_landmarks=200).fit(X, y)
    assert model.score(X, y) == 1
    smooth = classifier(gamma=1e-3, n_landmarks=200).fit(X, y)
    assert np.isfinite(smooth.predict_proba(X)).all()


# Weights


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
@pytest.mark.parametrize("n_landmarks", [3000, 20])
def test_a_row_of_weight_two_is_a_repeated_row(kind, n_landmarks, monkeypatch):
    X, y = make_table(40)
    X[::5, -1] = np.nan  # imputed by a weighted median
    monkeypatch.setitem(kernel._GRID, "table_share", np.array([0.3]))
    model = classifier(gamma=0.5, alpha=0.2)
    target = make_labels(y) if kind == "labels" else y
    if kind == "numbers":
        model, target = regressor(gamma=0.5, alpha=0.2), make_numbers(X[:, :-1], y)
    weight = 1 + (np.arange(40) % 3 == 0)
    repeated = np.repeat(np.arange(40), weight)
    if n_landmarks < 40:  # the same landmarks, and so the same function
        fit_landmarks = kernel._KernelFusion._fit_landmarks

        def on_the_first(self, data, landmarks, seed):
            _, first = np.unique(data.X[:, 0], return_index=True)
            return fit_landmarks(self, data, first[:20], seed)

        monkeypatch.setattr(kernel._KernelFusion, "_fit_landmarks", on_the_first)
        model.set_params(n_landmarks=20)
    weighted = clone(model).fit(X, target, sample_weight=weight)
    plain = clone(model).fit(X[repeated], target[repeated])
    rows = X.astype(np.float32)
    np.testing.assert_allclose(  # the slopes are fitted on predictions that differ
        weighted._predict_ridge(rows), plain._predict_ridge(rows), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("make", [classifier, regressor])
def test_rows_of_weight_zero_are_not_used(make):
    X, y = make_table(50)
    weight = np.r_[np.random.default_rng(0).uniform(0.5, 2, 40), np.zeros(10)]
    garbage = X.copy()
    garbage[40:] = 1e6
    for options in ({}, {"n_landmarks": 25}):
        with_zeros = make(**options).fit(garbage, y, sample_weight=weight)
        without = make(**options).fit(X[:40], y[:40], sample_weight=weight[:40])
        output = "predict_proba" if make is classifier else "predict"
        np.testing.assert_allclose(
            getattr(with_zeros, output)(X), getattr(without, output)(X), rtol=1e-6
        )


def test_a_multiple_of_all_weights_changes_nothing():
    X, y = make_table(50)
    weight = np.random.default_rng(0).uniform(0.5, 2, 50)
    first = classifier().fit(X, y, sample_weight=weight).predict_proba(X)
    second = classifier().fit(X, y, sample_weight=1e4 * weight).predict_proba(X)
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_class_weights_are_sample_weights():
    X, y = make_table(50)
    y = np.array(["ant", "bee", "cow"])[np.minimum(y, np.arange(50) % 7)]
    by_class = {"ant": 0.5, "bee": 2.0, "cow": 3.0}
    weight = np.array([by_class[label] for label in y])
    first = classifier(class_weight=by_class).fit(X, y)
    second = classifier().fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(first.predict_proba(X), second.predict_proba(X))
    balanced = classifier(class_weight="balanced").fit(X, y)
    np.testing.assert_allclose(balanced.prior_, 1 / 3)


def test_a_class_of_weight_zero_is_never_predicted():
    X, y = make_table(50)
    model = classifier(class_weight={0: 0, 1: 1, 2: 1}).fit(X, y)
    assert model.predict_proba(X).shape == (50, 3)
    assert set(model.predict(X)) == {1, 2}


def test_weights_that_are_zero_everywhere_are_refused():
    X, y = make_table(20)
    with pytest.raises(ValueError, match=r"non-zero|zero in all 20 rows"):
        classifier().fit(X, y, sample_weight=np.zeros(20))
    model = classifier(class_weight={0: 0, 1: 0, 2: 0})
    with pytest.raises(ValueError, match="class_weight is zero in all 20 rows"):
        model.fit(X, y)
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        classifier().fit(X, y, sample_weight=-np.ones(20))


# Missing values and scaling


def test_the_kernel_of_complete_rows_is_the_mean_of_the_kernels():
    X, y = make_vectors()
    model = classifier(VECTORS).fit(X, y)
    blocks = model._scale(X.astype(np.float32))
    expected = 0
    for block in blocks.values():
        Z = block.values.astype(float)
        expected = expected + np.exp(-model.gamma_ * (1 - Z @ Z.T)) / 2
    np.testing.assert_allclose(model._kernel(blocks), expected, rtol=1e-6)
    new = make_vectors(seed=1)[0]
    hidden = np.vstack([new, np.full_like(new[:1], np.nan)])
    np.testing.assert_array_equal(  # another row is empty
        model.predict_proba(hidden)[:-1], model.predict_proba(new)
    )


def features(K):
    """Return vectors with these inner products."""
    values, vectors = np.linalg.eigh(K)
    return vectors * np.sqrt(np.maximum(values, 0))


@pytest.mark.parametrize("n_landmarks", [3000, 25])
@pytest.mark.parametrize("blocks", [VECTORS, BLOCKS], ids=["vectors", "table"])
def test_missing_vectors_are_the_mean_in_the_feature_space(n_landmarks, blocks):
    X, y = make_table()
    hidden = np.random.default_rng(1).random((60, 2)) < 0.3
    X[hidden[:, 0], BLOCKS["text"]] = np.nan
    X[hidden[:, 1], BLOCKS["image"]] = np.nan
    X = X[:, : max(columns.stop for columns in blocks.values())]
    weight = np.random.default_rng(2).uniform(0.5, 2, 60)
    model = classifier(blocks, n_landmarks=n_landmarks)
    model.fit(X, y, sample_weight=weight)
    landmarks, n_rows = model._landmarks, len(model._landmark_weight)
    rows = model._scale(X.astype(np.float32))
    shares = dict.fromkeys(VECTORS, (1 - model.table_share_) / 2)
    if "table" in blocks:
        shares["table"] = model.table_share_
    observed = np.array(
        [np.r_[landmarks[m].observed, rows[m].observed] for m in blocks]
    )
    share = np.array([shares[m] for m in blocks]) @ observed
    expected = 0
    for name, mask in zip(blocks, observed, strict=True):
        values = np.vstack([landmarks[name].values, rows[name].values]).astype(float)
        d = np.square(values[:, None] - values).sum(axis=2) / 2
        gamma = model.table_gamma_ if name == "table" else model.gamma_
        Z = features(np.exp(-gamma * d))
        of_mean = (model._landmark_weight * mask[:n_rows]) @ Z[:n_rows]
        of_mean /= model._landmark_weight[mask[:n_rows]].sum()
        deviations = (Z - of_mean) / np.sqrt(np.maximum(share, 1e-9))[:, None]
        Z = of_mean + np.where(mask[:, None], deviations, 0)
        Z[share == 0] = 0
        expected = expected + shares[name] * Z @ Z.T
    np.testing.assert_allclose(
        model._kernel(rows), expected[n_rows:, :n_rows], atol=1e-6
    )


def test_rows_without_a_text_of_one_class_do_not_decide_later_rows():
    # In training, only rows of class 0 lack a text, by chance. The model must not infer
    # that later rows without a text belong to class 0.
    X, y = make_vectors(150)
    X[:, VECTORS["image"]] += np.random.default_rng(2).normal(size=(3, WIDTH))[y]
    X[np.flatnonzero(y == 0)[:8], VECTORS["text"]] = np.nan
    new, y_new = X[75:].copy(), y[75:]
    new[:, VECTORS["text"]] = np.nan
    model = classifier(VECTORS).fit(X[:75], y[:75])
    refit = classifier({"image": slice(None)})
    refit.fit(X[:75, VECTORS["image"]], y[:75])
    expected = refit.predict_proba(new[:, VECTORS["image"]])
    assert model.score(new, y_new) > (expected.argmax(axis=1) == y_new).mean() - 0.05
    assert log_loss(y_new, model.predict_proba(new)) < log_loss(y_new, expected) + 0.1


def test_a_missing_vector_hardly_shrinks_the_predictions():
    X, y = make_vectors(200)
    X[:, VECTORS["image"]] = X[:, VECTORS["text"]]  # each contains all information
    y = X[:, :3].sum(axis=1)
    model = regressor(VECTORS).fit(X[:100], y[:100])
    new = X[100:].copy()
    complete = model.predict(new)
    new[:, VECTORS["image"]] = np.nan
    slope = np.polyfit(complete, model.predict(new), 1)[0]
    assert slope == pytest.approx(1 / np.sqrt(2), abs=0.02)  # 1 / 2 without the factor


@pytest.mark.parametrize("kind", ["binary", "classes", "labels"])
def test_a_row_without_any_block_gets_the_prior(kind):
    X, y = make_vectors()
    y = {"binary": y == 2, "classes": y, "labels": make_labels(y)}[kind]
    X[::7, VECTORS["text"]] = np.nan
    weight = np.random.default_rng(0).uniform(0.5, 2, len(X))
    model = classifier(VECTORS).fit(X, y, sample_weight=weight)
    empty = np.full((2, X.shape[1]), np.nan)
    predicted = model.predict_proba(empty)
    expected = model.prior_
    if kind == "labels":
        np.testing.assert_allclose(expected, np.average(y, axis=0, weights=weight))
    else:
        np.testing.assert_allclose(expected.sum(), 1)
    np.testing.assert_allclose(predicted, [expected, expected], rtol=1e-9)


def test_a_row_without_any_block_gets_the_mean():
    X, y = make_vectors()
    y = np.column_stack([make_numbers(X, y), y])
    weight = np.random.default_rng(0).uniform(0.5, 2, len(X))
    model = regressor(VECTORS).fit(X, y, sample_weight=weight)
    mean = np.average(y, axis=0, weights=weight)
    predicted = model.predict(np.full((1, X.shape[1]), np.nan))
    np.testing.assert_allclose(predicted, [mean])


@pytest.mark.parametrize("make", [classifier, regressor])
def test_units_do_not_matter(make):
    X, y = make_table()
    y = y if make is classifier else make_numbers(X, y)
    X[::6, -2] = np.nan
    new = make_table(seed=1)[0]
    new[::5, -1] = np.nan
    shift = np.zeros(X.shape[1])
    shift[:WIDTH] = np.linspace(-2, 2, WIDTH)
    factor = np.ones(X.shape[1])
    factor[BLOCKS["text"]], factor[BLOCKS["image"]] = 50, 1e-3
    factor[BLOCKS["table"]] = [1e6, 1e-6, 1000]
    shift[BLOCKS["table"]] = [3e6, 1e-5, -2000]
    output = "predict_proba" if make is classifier else "predict"
    expected = getattr(make().fit(X, y), output)(new)
    changed = getattr(make().fit(factor * X + shift, y), output)(factor * new + shift)
    np.testing.assert_allclose(changed, expected, rtol=1e-3, atol=1e-3)


def test_blocks_that_tell_nothing_leave_the_scores_finite():
    X, y = make_table()
    new = make_table(seed=1)[0]
    constant, missing, single = X.copy(), X.copy(), X.copy()
    constant[:, BLOCKS["image"]] = 0.1
    constant[:, -1] = 0.1
    missing[:, BLOCKS["image"]] = np.nan
    missing[:, -1] = np.nan
    single[1:, BLOCKS["image"]] = np.nan
    single[1:, -1] = np.nan
    for table in (constant, missing, single):
        model = classifier().fit(table, y)
        assert np.isfinite(model.predict_proba(new)).all()
        assert model.score(table, y) > 0.8


def test_other_values_of_a_constant_column_count_as_equal():
    X, y = make_table()
    X[:, -2] = 7
    model = classifier().fit(X, y)
    new = X.copy()
    new[:, -2] = 1e9
    np.testing.assert_array_equal(model.predict_proba(new), model.predict_proba(X))


def test_what_rounding_leaves_of_a_constant_vector_is_not_a_direction():
    rng = np.random.default_rng(0)
    vector = rng.normal(size=WIDTH).astype(np.float32)
    X = vector * (1 + 1e-7 * rng.normal(size=(40, WIDTH))).astype(np.float32)
    blocks = {"text": slice(None)}
    scaling = fit_scaling(X, blocks, [], np.ones(40))
    assert not scale_blocks(X, blocks, scaling)["text"].values.any()


def test_a_block_that_all_new_rows_lack():
    X, y = make_table()
    new = X.copy()
    new[:, BLOCKS["image"]] = np.nan
    new[:, -3:] = np.nan
    model = classifier().fit(X, y)
    assert model.score(new, y) > 0.8


def test_weighted_medians_are_medians_of_repeated_rows():
    rng = np.random.default_rng(0)
    for n_rows in (1, 2, 5, 8):
        X = rng.integers(0, 6, size=(n_rows, 2)).astype(np.float32)
        weight = rng.integers(1, 4, n_rows).astype(float)
        scaling = fit_scaling(X, {"t": slice(None)}, ["t"], weight)["t"]
        repeated = np.repeat(X, weight.astype(int), axis=0)
        np.testing.assert_allclose(scaling["median"], np.median(repeated, axis=0))
        deviations = np.abs(repeated - np.median(repeated, axis=0))
        usual = np.median(deviations, axis=0)
        usual = np.where(usual > 0, usual, deviations.mean(axis=0))
        expected = np.where(usual > 0, 6 * usual, np.inf)  # a constant column
        np.testing.assert_allclose(scaling["spread"], expected)
        squashed = np.arcsinh((repeated - scaling["median"]) / scaling["spread"])
        np.testing.assert_allclose(scaling["mean"], squashed.mean(axis=0), atol=1e-9)


def test_an_outlier_hides_no_differences():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 1))
    with_outlier = np.vstack([X, [[1e12]]])
    blocks = {"t": slice(None)}
    scaling = fit_scaling(with_outlier, blocks, ["t"], np.ones(51))
    scores = scale_blocks(X, blocks, scaling)["t"].values[:, 0]
    assert np.corrcoef(scores, X[:, 0])[0, 1] > 0.99
    assert np.ptp(scores) > 0.4


def test_a_lexical_block_is_appended_to_the_vectors_of_its_text():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 30)).astype(np.float32)
    X[3] = np.nan
    parts = slice(0, 20), slice(20, 30)
    names = {"t": parts[0], "t_lexical": parts[1]}  # narrow, but not table columns
    assert find_table_blocks("auto", X, names) == []
    scaling = fit_scaling(X, names, [], np.ones(40))
    (block,) = scale_blocks(X, names, scaling).values()
    norms = np.linalg.norm(block.values, axis=1)
    np.testing.assert_allclose(np.delete(norms, 3), 1, rtol=1e-5)
    assert norms[3] == 0
    assert np.flatnonzero(~block.observed).tolist() == [3]
    lexical = np.linalg.norm(block.values[:, parts[1]], axis=1)
    vectors = np.linalg.norm(block.values[:, parts[0]], axis=1)
    np.testing.assert_allclose(
        np.delete(lexical, 3), 0.3 * np.delete(vectors, 3), rtol=1e-5
    )
    alone = {"other": parts[0], "t_lexical": parts[1]}  # of a text without vectors
    scaling = fit_scaling(X, alone, [], np.ones(40))
    assert list(scale_blocks(X, alone, scaling)) == ["other", "t_lexical"]
    model = classifier(names).fit(X, np.arange(40) % 2)
    assert np.isfinite(model.predict_proba(X)).all()


def test_table_blocks_are_found():
    X, y = make_table()
    assert classifier().fit(X, y).table_blocks_ == ["table"]
    wide = {"table": slice(0, 20), "narrow": slice(20, 22), "rest": slice(22, None)}
    X[0, 30] = np.nan
    assert find_table_blocks("auto", X, wide) == ["table", "narrow", "rest"]
    assert find_table_blocks(["rest", "rest"], X, wide) == ["rest"]
    with pytest.raises(ValueError, match=r"table_blocks has 'tabel', but the blocks"):
        classifier(table_blocks=["tabel"]).fit(X, y)


@pytest.mark.parametrize("n_rows", [60, 5000])
def test_a_vector_missing_in_part_is_refused_by_row_and_block(n_rows):
    X, y = make_table(60)
    model = classifier(table_blocks=["table"], n_landmarks=30).fit(X, y)
    new = np.tile(X, (n_rows // 60 + 1, 1))[:n_rows]
    new[n_rows - 3, WIDTH + 1] = np.nan
    message = f"NaN in 1 of {WIDTH} columns of row {n_rows - 3} of block 'image'"
    with pytest.raises(ValueError, match=message):
        model.predict(new)
    weight = np.r_[0, np.ones(n_rows - 1)]
    y = np.arange(n_rows) % 2
    with pytest.raises(ValueError, match=message):
        model.fit(new, y, sample_weight=weight)


def test_infinity_is_refused():
    X, y = make_table()
    infinite = X.copy()
    infinite[3, 2] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        classifier().fit(infinite, y)
    with pytest.raises(ValueError, match="infinity"):
        classifier().fit(X, y).predict(infinite)


# Targets


def test_labels_of_all_kinds():
    X, y = make_table()
    words = np.array(["ant", "bee", "cow"], dtype=object)[y]
    model = classifier().fit(X, words)
    assert model.classes_.tolist() == ["ant", "bee", "cow"]
    assert (model.predict(X) == words).mean() > 0.9
    binary = classifier().fit(X, y == 1)
    logits = binary.decision_function(X)
    assert logits.shape == (60,)
    np.testing.assert_allclose(binary.predict_proba(X)[:, 1], expit(logits))
    np.testing.assert_array_equal(binary.predict(X), logits > 0)


def test_several_labels():
    X, y = make_table()
    Y = np.column_stack([make_labels(y), np.zeros(60), np.ones(60)]).astype(int)
    model = classifier().fit(X, Y)
    P = model.predict_proba(X)
    assert P.shape == Y.shape
    assert (P[:, 3] < 0.05).all()
    assert (P[:, 4] > 0.95).all()
    assert (model.predict(X)[:, :2] == Y[:, :2]).mean() > 0.9
    np.testing.assert_allclose(P, expit(model.decision_function(X)))
    with pytest.raises(ValueError, match=r"class_weight='balanced' requires classes"):
        classifier(class_weight="balanced").fit(X, Y)


def test_two_classes_as_labels_rank_rows_equally():
    X, y = make_vectors()  # without table columns, whose share is chosen
    binary = classifier(VECTORS, gamma=1.0, alpha=0.1).fit(X, y == 0)
    Y = np.column_stack([y == 0, y != 0]).astype(int)
    labels = classifier(VECTORS, gamma=1.0, alpha=0.1).fit(X, Y)
    np.testing.assert_array_equal(
        np.argsort(binary.decision_function(X)),
        np.argsort(labels.decision_function(X)[:, 0]),
    )


def test_several_numbers_are_fitted_with_shared_settings():
    X, y = make_table()
    numbers = make_numbers(X, y)
    targets = np.column_stack([numbers, np.full(60, 0.1), 1e6 - 1e3 * numbers])
    model = regressor(gamma=0.5, alpha=0.1).fit(X, targets)
    alone = clone(model).fit(X, numbers)
    predicted = model.predict(X)
    np.testing.assert_allclose(predicted[:, 0], alone.predict(X), rtol=1e-9)
    np.testing.assert_allclose(predicted[:, 1], 0.1)
    np.testing.assert_allclose(predicted[:, 2], 1e6 - 1e3 * predicted[:, 0])


def test_a_group_that_decides_the_class():
    X, y = make_table()
    model = classifier().fit(X, y, groups=y)
    assert np.isfinite(model.predict_proba(X)).all()
    assert model.slope_ < classifier().fit(X, y).slope_


def test_groups_change_the_choice():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    centres = rng.normal(size=(12, WIDTH))
    X = centres[groups] + 0.2 * rng.normal(size=(120, WIDTH))
    y = centres[groups, 0] + rng.normal(size=12)[groups]  # half of it is of the group
    blocks = {"text": slice(None)}
    alone = regressor(blocks).fit(X, y)
    grouped = regressor(blocks).fit(X, y, groups=groups.astype(str))
    assert grouped.alpha_ > alone.alpha_


@pytest.mark.parametrize("make", [classifier, regressor])
def test_groups_that_cannot_be_used_are_refused(make):
    X, y = make_table()
    with pytest.raises(ValueError, match="groups has 59 values, but X has 60 rows"):
        make().fit(X, y, groups=np.arange(59))
    groups = np.arange(60.0)
    groups[7] = np.nan
    with pytest.raises(ValueError, match="no value in 1 rows, first in row 7"):
        make().fit(X, y, groups=groups)
    with pytest.raises(ValueError, match="60 rows of positive weight are in one group"):
        make().fit(X, y, groups=["a"] * 60)
    weight = np.ones(60)
    weight[0] = 0
    with pytest.raises(ValueError, match="59 rows of positive weight are in one group"):
        make().fit(X, y, groups=["b"] + ["a"] * 59, sample_weight=weight)


# Settings


@pytest.mark.parametrize("n_rows", [2, 3])
@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_two_and_three_rows(n_rows, kind):
    X, _ = make_table(n_rows)
    y = np.array([0, 1, 1])[:n_rows]
    model = regressor() if kind == "numbers" else classifier()
    target = np.column_stack([y, 1 - y, 0 * y]) if kind == "labels" else y
    predicted = model.fit(X, target).predict(X)
    assert predicted.shape == target.shape
    assert np.isfinite(predicted).all()


def test_equal_rows():
    X, y = make_table(5)
    X, y = np.repeat(X, 12, axis=0), np.repeat(y, 12)
    model = classifier().fit(X, y)
    P = model.predict_proba(X)
    assert (P.argmax(axis=1) == y).all()
    np.testing.assert_array_equal(P[::12], P[11::12])


@pytest.mark.parametrize("gamma", [1e-12, 1e12, 1e300])
@pytest.mark.parametrize("alpha", [1e-6, 1e12])
def test_extreme_settings_give_finite_scores(gamma, alpha):
    X, y = make_table()
    model = classifier(gamma=gamma, alpha=alpha).fit(X, y)
    P = model.predict_proba(make_table(seed=1)[0])
    np.testing.assert_allclose(P.sum(axis=1), 1)
    model = regressor(gamma=gamma, alpha=alpha).fit(X, y)
    assert np.isfinite(model.predict(X)).all()


def test_a_penalty_too_small_for_equal_rows_is_refused():
    X, y = make_table(20)
    X, y = np.repeat(X, 3, axis=0), np.repeat(y, 3)
    with pytest.raises(ValueError, match=r"alpha=1e-300 is too small.*of 60 rows"):
        classifier(gamma=1e-6, alpha=1e-300).fit(X, y)


def test_a_wide_kernel_of_a_standardised_column_is_linear_regression():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(80, 1))
    model = regressor({"x": [0]}, gamma=1e-6, alpha=1e-9).fit(x, 3 * x[:, 0] + 1)
    np.testing.assert_allclose(model.predict(x / 2), 1.5 * x[:, 0] + 1, atol=0.05)


def test_the_search_finds_what_brute_force_finds(monkeypatch):
    X, y = make_table(40)
    model = classifier(blocks={"all": slice(None)}).fit(X, y)
    errors = {}
    for gamma in kernel._GRID["gamma"]:
        for alpha in kernel._GRID["alpha"]:
            fixed = clone(model).set_params(gamma=gamma, alpha=alpha)
            (log_probabilities,) = fixed._fit(X, y, None, None)
            errors[gamma, alpha] = -log_probabilities[np.arange(40), y].mean()
    chosen = errors[model.gamma_, model.alpha_]
    assert chosen <= min(errors.values()) + 0.02
    assert chosen == pytest.approx(min(errors.values()), rel=0.1)


def test_probabilities_are_calibrated_on_predictions_out_of_fold():
    X, y = make_vectors(120)
    X = X + 2 * np.random.default_rng(1).normal(size=X.shape)
    model = classifier(VECTORS)
    (out_of_fold,) = model._fit(X, y, None, None)
    for factor in (0.5, 0.9, 1.1, 2.0):
        prior = np.log(model.prior_)
        other = log_softmax(prior + factor * (out_of_fold - prior), axis=1)
        assert log_loss(y, np.exp(out_of_fold)) <= log_loss(y, np.exp(other)) + 1e-6


# Forms of input


def test_forms_of_input():
    X, y = make_table()
    X = X.astype(np.float32)
    X[::7, BLOCKS["image"]] = np.nan
    expected = classifier().fit(X, y).predict_proba(X)
    names = []
    for block, columns in BLOCKS.items():
        names += [f"{block}__{i}" for i in range(columns.stop - columns.start)]
    frame = pd.DataFrame(X, columns=names)
    np.testing.assert_array_equal(
        classifier(blocks=None).fit(frame, y).predict_proba(frame), expected
    )
    readonly = X.astype(np.float64)
    readonly.flags.writeable = False
    np.testing.assert_allclose(
        classifier().fit(readonly, y).predict_proba(readonly), expected
    )
    order = np.random.default_rng(0).permutation(X.shape[1])
    positions = np.argsort(order)
    shuffled = {block: positions[columns] for block, columns in BLOCKS.items()}
    np.testing.assert_allclose(
        classifier(shuffled).fit(X[:, order], y).predict_proba(X[:, order]), expected
    )


@pytest.mark.parametrize("n_landmarks", [3000, 25])
def test_the_order_of_the_rows_does_not_matter(n_landmarks):
    X, y = make_table()
    X[::7, BLOCKS["image"]] = np.nan
    model = classifier(n_landmarks=n_landmarks).fit(X, y)
    P = model.predict_proba(X)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(model.predict_proba(X[order]), P[order], rtol=1e-9)
    alone = np.concatenate([model.predict_proba(X[[i]]) for i in range(60)])
    np.testing.assert_allclose(alone, P, rtol=1e-9)
    if n_landmarks > 60:
        refitted = clone(model).fit(X[order], y[order])
        np.testing.assert_allclose(refitted.predict_proba(X), P, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_landmarks", [3000, 25])
@pytest.mark.parametrize("kind", ["words", "labels", "numbers"])
def test_save_and_load_and_pickle(tmp_path, n_landmarks, kind):
    X, y = make_table()
    X[::7, BLOCKS["image"]] = np.nan
    model = classifier(n_landmarks=n_landmarks)
    if kind == "numbers":
        model, y = regressor(n_landmarks=n_landmarks), make_numbers(X[:, -3:], y)
    elif kind == "words":
        y = np.array(["ant", "bee", "cöw"])[y]
    else:
        y = make_labels(y)
    output = "predict" if kind == "numbers" else "predict_proba"
    model.fit(X, y)
    expected = getattr(model, output)(X)
    model.save(tmp_path)
    loaded = type(model).load(tmp_path)
    for copy in (loaded, pickle.loads(pickle.dumps(model)), clone(model).fit(X, y)):
        np.testing.assert_array_equal(getattr(copy, output)(X), expected)
    assert loaded.predict(X).dtype == model.predict(X).dtype
    assert repr(loaded.get_params()) == repr(model.get_params())
    expected_class = "KernelFusionRegressor" if kind != "numbers" else "Classifier"
    other = KernelFusionRegressor if kind != "numbers" else KernelFusionClassifier
    with pytest.raises(ValueError, match=f"expected a .*{expected_class}"):
        other.load(tmp_path)


def test_a_model_on_landmarks_does_not_contain_the_training_table():
    X, y = make_table(300)
    model = classifier(n_landmarks=20).fit(X, y)
    assert len(pickle.dumps(model)) < X.astype(np.float32).nbytes


# The search, and the calibration


@pytest.mark.parametrize("start", [(0, 0, 0), (6, 0, 3), (3, 4, 5)])
def test_descend_finds_the_minimum_of_a_convex_function(start):
    calls = []

    def error(position):
        calls.append(position)
        x, y, z = position
        return (x - 4) ** 2 + (y - 1) ** 2 + (z - 5) ** 2 + 0.5 * (x - 4) * (y - 1)

    assert descend(error, (7, 5, 6), start) == (4, 1, 5)
    assert len(calls) == len(set(calls)) < 7 * 5 * 6


def test_descend_stays_where_no_neighbour_is_better():
    assert descend(lambda position: 0.0, (3, 3), (1, 1)) == (1, 1)
    assert descend(lambda position: 0.0, (1, 1), (0, 0)) == (0, 0)


def loss_of_classes(logits, y, weight):
    """Return the log loss, with one more row of unknown class."""
    logs = log_softmax(logits, axis=1)
    n_rows = weight.sum() ** 2 / np.square(weight).sum()
    of_labels = -np.average(logs[np.arange(len(y)), y], weights=weight)
    of_unknown = -np.average(logs.mean(axis=1), weights=weight)
    return (n_rows * of_labels + of_unknown) / (n_rows + 1)


def loss_of_labels(logits, y, weight):
    total = 0
    for label, column in enumerate(y.T):
        two_classes = np.column_stack([0 * column, logits[:, label]])
        total += loss_of_classes(two_classes, column, weight)
    return total


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_a_calibration_is_that_of_brute_force(kind):
    rng = np.random.default_rng(0)
    weight, scores = rng.uniform(0.2, 2, 80), rng.normal(size=(80, 3))
    y, loss = rng.integers(0, 3, 80), loss_of_classes
    scores[np.arange(80), y] += 1
    scores[:, 2] -= 3  # scores neglect a class
    if kind == "labels":
        y, loss = (scores + rng.normal(size=(80, 3)) > 0).astype(int), loss_of_labels
    slope, intercepts, error = fit_calibration(scores, y, weight)

    def brute_force(parameters):
        return loss(parameters[0] * scores + parameters[1:], y, weight)

    result = minimize(
        brute_force,
        np.r_[1.0, np.zeros(3)],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 10_000},
    )
    assert slope == pytest.approx(result.x[0], abs=2e-3)
    best = result.x[1:]
    if kind == "classes":  # a constant changes nothing
        best = best - best.mean()
    np.testing.assert_allclose(intercepts, best, atol=2e-3)
    assert error == pytest.approx(result.fun, abs=1e-7)
    assert error == pytest.approx(brute_force(np.r_[slope, intercepts]))


def test_a_calibration_corrects_a_neglected_class():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 3000)
    scores = np.eye(3)[y] + 0.5 * rng.normal(size=(3000, 3))
    slope, intercepts, loss = fit_calibration(scores, y, np.ones(3000))
    biased = scores - [0, 0, 1]
    same_slope, corrected, same_loss = fit_calibration(biased, y, np.ones(3000))
    assert same_slope == pytest.approx(slope, rel=1e-2)
    assert same_loss == pytest.approx(loss, abs=1e-5)
    expected = intercepts + slope * np.array([-1, -1, 2]) / 3
    np.testing.assert_allclose(corrected, expected, atol=0.05)


def test_sigmoids_are_logistic_regressions_without_penalty():
    rng = np.random.default_rng(0)
    column = np.repeat([0, 2], [90, 30])  # there are no scores in column 1
    scores, weight = rng.normal(size=120), rng.uniform(0, 2, 120)
    truth = (scores + rng.normal(size=120) > 0.5).astype(int)
    slopes, intercepts = fit_sigmoids(scores, truth, weight, column, 3)
    for i in (0, 2):
        w, score, y = weight[column == i], scores[column == i, None], truth[column == i]
        n_rows = w.sum() ** 2 / np.square(w).sum()
        unknown = w / n_rows / 2  # each class for the row of unknown class
        model = LogisticRegression(C=1e12, tol=1e-8)
        model.fit(
            np.tile(score, (3, 1)),
            np.r_[y, 0 * y, 0 * y + 1],
            sample_weight=np.r_[w, unknown, unknown],
        )
        assert slopes[i] == pytest.approx(model.coef_[0, 0], rel=5e-3)
        assert intercepts[i] == pytest.approx(model.intercept_[0], abs=5e-3)
    assert intercepts[1] == 0


def test_scores_that_are_right_in_few_rows_are_not_certain():
    previous = np.inf
    for n_rows in (1000, 30, 4):
        y = np.arange(n_rows) % 2
        slope, _, _ = fit_calibration(np.eye(2)[y], y, np.ones(n_rows))
        # one row in n_rows + 1 is of unknown class
        assert expit(slope) == pytest.approx(1 - 0.5 / (n_rows + 1), abs=1e-4)
        assert slope < previous
        previous = slope


def test_scores_that_are_wrong_get_no_slope():
    y = np.array([0, 1, 0, 1])
    slope, _, error = fit_calibration(-np.eye(2)[y], y, np.ones(4))
    assert slope == 0
    assert error == pytest.approx(np.log(2))


def test_folds_of_groups_correct_the_slope_alone():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 500)
    scores = 3 * np.eye(3)[y] + rng.normal(size=(500, 3)) - [0, 0, 1]
    of_groups = scores + 2 * rng.normal(size=(500, 3))  # right less often
    of_groups[::2] = np.nan  # rows without a score
    slope, intercepts = calibrate([scores], y, np.ones(500))
    careful, shifted = calibrate([scores, of_groups], y, np.ones(500))
    assert careful < 0.8 * slope
    np.testing.assert_allclose(shifted / careful, intercepts / slope)
    logits = careful * of_groups[1::2] + shifted
    expected = fit_calibration(logits, y[1::2], np.ones(250), with_intercepts=False)
    assert expected[0] == pytest.approx(1, abs=1e-3)
    assert not expected[1].any()


@pytest.mark.parametrize("factor", [1, 0.3, 1 / 7])
def test_medians_do_not_depend_on_the_unit_of_weights(factor):
    X = np.arange(58.0)[:, None].astype(np.float32)
    scaling = fit_scaling(X, {"t": slice(None)}, ["t"], np.full(58, factor))["t"]
    assert scaling["median"].tolist() == [28.5]


def test_a_penalty_too_small_for_equal_landmarks_is_an_error():
    X, y = make_table(40)
    X, y = np.repeat(X, 4, axis=0), np.repeat(y, 4)
    with pytest.raises(ValueError, match=r"alpha=1e-14 is too small"):
        classifier(alpha=1e-14, gamma=0.01, n_landmarks=30).fit(X, y)
