"""ContrastiveProjector: what it learns, how it is cross-fitted, and what it refuses."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from conftest import small_projector as small
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import silhouette_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    LeaveOneGroupOut,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from sklembed import (
    CallableBackend,
    CanonicalAligner,
    ContrastiveProjector,
    FrozenEncoder,
    ModalityGapAligner,
)
from sklembed.nn.losses import LOSSES
from sklembed.nn.projection import Projection
from sklembed.projection.forward import product


def buried_classes(noise):
    """Make three classes that differ in ten columns, beside fifty columns of loud noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 900)
    signal = rng.normal(size=(3, 10))[y] + rng.normal(scale=noise, size=(900, 10))
    return np.hstack([signal, rng.normal(scale=5, size=(900, 50))]), y


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_separates_classes_of_new_rows(loss, similarity):
    X, y = buried_classes(noise=0.7)
    projector = small(loss=loss, similarity=similarity, max_epochs=7, lr=1e-2)
    projector.fit(X[:600], y[:600])
    assert silhouette_score(X[600:], y[600:]) < 0.05
    assert silhouette_score(projector.transform(X[600:]), y[600:]) > 0.25
    assert projector.history_[-1]["train_loss"] < projector.history_[0]["train_loss"]


@pytest.mark.parametrize("hidden", [(), (7,), (9, 5)])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_numpy_transform_equals_the_torch_module(clusters, hidden, similarity):
    X, y = clusters
    projector = small(hidden_layer_sizes=hidden, similarity=similarity).fit(X, y)
    module = Projection(
        [20, *hidden, 4],
        dropout=0.5,
        generator=torch.Generator(),
        mean=torch.zeros(20),
        scale=torch.ones(20),
    )
    weights = {k: torch.from_numpy(v) for k, v in projector.weights_.items()}
    module.load_state_dict(weights)
    with torch.inference_mode():
        expected = module.eval()(torch.from_numpy(X))
    if similarity == "cosine":
        expected = torch.nn.functional.normalize(expected, dim=1)
    np.testing.assert_allclose(projector.transform(X), expected.numpy(), atol=1e-5)


def test_cosine_projections_have_unit_length_and_dot_ones_do_not(clusters):
    cosine = np.linalg.norm(small().fit_transform(*clusters), axis=1)
    dot = np.linalg.norm(small(similarity="dot").fit_transform(*clusters), axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)
    assert np.ptp(dot) > 0.1


def test_weights_are_float32_arrays(clusters):
    projector = small().fit(*clusters)
    assert {name: value.shape for name, value in projector.weights_.items()} == {
        "mean": (20,),
        "scale": (20,),
        "layers.0.weight": (16, 20),
        "layers.0.bias": (16,),
        "layers.1.weight": (4, 16),
        "layers.1.bias": (4,),
    }
    assert {value.dtype for value in projector.weights_.values()} == {
        np.dtype(np.float32)
    }
    assert projector.n_iter_ == 5


# Cross-fitting


def test_fit_transform_shows_each_row_to_no_network_that_has_seen_it():
    """On labels that mean nothing, an honest projection carries no information about them."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 50)), rng.integers(0, 2, 300)
    wide = {"hidden_layer_sizes": (64,), "max_epochs": 40, "dropout": 0.0}
    leaky = small(cv=None, **wide).fit_transform(X, y)
    honest = small(cv=5, **wide).fit_transform(X, y)
    assert cross_val_score(LogisticRegression(), leaky, y).mean() > 0.9
    assert 0.4 < cross_val_score(LogisticRegression(), honest, y).mean() < 0.6


def test_cross_fitting_keeps_what_comes_next_from_being_overconfident():
    """A classifier trusts the clarity of its training rows, which new rows do not have."""
    X, y = buried_classes(noise=1.5)
    losses = {
        cv: -cross_val_score(
            make_pipeline(
                small(cv=cv, hidden_layer_sizes=(64,), max_epochs=20, dropout=0.0),
                LogisticRegression(C=100),
            ),
            X,
            y,
            cv=StratifiedKFold(2, shuffle=True, random_state=0),
            scoring="neg_log_loss",
        ).mean()
        for cv in (None, 3)
    }
    assert losses[3] < 0.8 * losses[None]


def test_held_out_rows_come_from_their_fold_s_network_mapped_onto_the_full_one(
    clusters,
):
    """Columns are scaled by all rows, so the reference is given scaled ones."""
    X, y = clusters
    X = StandardScaler().fit_transform(X)
    folds = list(StratifiedKFold(3, shuffle=True, random_state=1).split(X, y))
    plain = {"standardize": False, "dropout": 0.0}
    projector = small(cv=folds, **plain)
    Z = projector.fit_transform(X, y)
    everywhere = projector.transform(X)
    for train, held_out in folds:
        alone = small(cv=None, **plain).fit(X[train], y[train])
        source = alone.transform(X[train])
        ridge = Ridge(0.01 * np.trace(source.T @ source) / 4, fit_intercept=False)
        mapped = ridge.fit(source, everywhere[train]).predict(
            alone.transform(X[held_out])
        )
        np.testing.assert_allclose(Z[held_out], normalize(mapped), atol=1e-3)


def test_transform_after_fit_transform_uses_the_network_of_all_rows(clusters):
    X, y = clusters
    projector = small()
    Z = projector.fit_transform(X, y)
    np.testing.assert_array_equal(
        projector.transform(X), small().fit(X, y).transform(X)
    )
    assert not np.allclose(Z, projector.transform(X))


def test_without_cv_fit_transform_is_fit_then_transform(clusters):
    X, y = clusters
    np.testing.assert_array_equal(
        small(cv=None).fit_transform(X, y), small(cv=None).fit(X, y).transform(X)
    )


def test_folds_are_capped_at_the_smallest_class(clusters):
    X, y = clusters
    rows = np.r_[0:33]  # 30 of class 0 and 3 of class 1
    projector = small(passthrough="auto")
    assert np.isfinite(projector.fit_transform(X[rows], y[rows])).all()
    assert len(projector.gate_scores_["both"]) == 3


def test_a_class_of_one_row_is_projected_all_the_same(clusters):
    X, y = clusters
    rows = np.r_[0:31]
    assert np.isfinite(small().fit_transform(X[rows], y[rows])).all()


def test_groups_are_routed_to_the_splitter(clusters):
    X, y = clusters
    groups = np.arange(90) // 2 % 15
    splitter = StratifiedGroupKFold(3)
    folds = list(splitter.split(X, y, groups))
    with sklearn.config_context(enable_metadata_routing=True):
        Z = small(cv=splitter).fit_transform(X, y, groups=groups)
        small(cv=3).fit_transform(X, y)  # no groups, and none missed
    np.testing.assert_array_equal(Z, small(cv=folds).fit_transform(X, y))


def test_a_splitter_that_lacks_groups_says_how_to_pass_them(clusters):
    with pytest.raises(ValueError, match=r"set_config\(enable_metadata_routing=True\)"):
        small(cv=GroupKFold(3)).fit_transform(*clusters)


def test_groups_without_routing_are_refused(clusters):
    with pytest.raises(
        ValueError, match=r"given \['groups'\].*enable_metadata_routing=True"
    ):
        small(cv=LeaveOneGroupOut()).fit_transform(*clusters, groups=np.arange(90) % 3)


@pytest.mark.parametrize(
    "as_fold", [list, np.array, lambda rows: np.isin(np.arange(90), rows)]
)
def test_folds_are_given_as_lists_arrays_or_masks(clusters, as_fold):
    X, y = clusters
    folds = list(StratifiedKFold(3).split(X, y))
    given = [
        (as_fold(train.tolist()), as_fold(held_out.tolist()))
        for train, held_out in folds
    ]
    np.testing.assert_array_equal(
        small(cv=given).fit_transform(X, y), small(cv=folds).fit_transform(X, y)
    )


def test_folds_that_train_on_what_they_hold_out_are_refused(clusters):
    rows = np.arange(90)
    with pytest.raises(
        ValueError, match="Fold 0 of cv trains on row 0, which it holds out"
    ):
        small(cv=[(rows, rows[:45]), (rows, rows[45:])]).fit_transform(*clusters)


@pytest.mark.parametrize("seed", range(5))
def test_a_few_observed_rows_are_spread_over_the_folds(seed):
    X = np.full((60, 5), np.nan)
    X[:6] = np.random.default_rng(0).normal(size=(6, 5))
    y = np.arange(60) % 2
    Z = small(random_state=seed, n_components=2).fit_transform(X, y)
    assert np.isfinite(Z[:6]).all()


def test_a_fold_without_an_observed_row_to_train_on_is_refused(clusters):
    X, y = clusters
    X = X.copy()
    X[30:] = np.nan
    folds = [(np.r_[30:90], np.r_[0:30]), (np.r_[0:30], np.r_[30:90])]
    with pytest.raises(ValueError, match="Fold 0 of cv has 0 observed training rows"):
        small(cv=folds).fit_transform(X, np.arange(90) % 2)


def test_training_that_diverges_is_an_error(clusters):
    with pytest.raises(ValueError, match="Training diverged.*Lower lr"):
        small(lr=1e30, max_epochs=20).fit(*clusters)


@pytest.mark.parametrize("cv", [ShuffleSplit(3, random_state=0), [([0, 1, 2, 3], [4])]])
def test_folds_that_do_not_partition_the_rows_are_refused(clusters, cv):
    with pytest.raises(
        ValueError, match="cv must hold out each row exactly once, but row"
    ):
        small(cv=cv).fit_transform(*clusters)


# Missing rows


@pytest.mark.parametrize("cv", [None, 3])
def test_missing_rows_stay_nan_and_teach_nothing(clusters, cv):
    X, y = clusters
    holed = X.copy()
    holed[::7] = np.nan
    observed = ~np.isnan(holed[:, 0])
    projector = small(cv=cv)
    Z = projector.fit_transform(holed, y)
    np.testing.assert_array_equal(np.isnan(Z).all(axis=1), ~observed)
    assert np.isfinite(Z[observed]).all()
    np.testing.assert_array_equal(
        projector.transform(holed)[observed],
        small(cv=cv).fit(X[observed], y[observed]).transform(X[observed]),
    )


@pytest.mark.parametrize("passthrough", [True, False])
def test_a_request_without_any_observed_row_stays_missing(clusters, passthrough):
    projector = small(passthrough=passthrough).fit(*clusters)
    for n_rows in (1, 3):
        Z = projector.transform(np.full((n_rows, 20), np.nan))
        assert Z.shape == (n_rows, len(projector.get_feature_names_out()))
        assert Z.dtype == np.float32
        assert np.isnan(Z).all()


def test_a_pipeline_answers_for_one_row_without_a_text():
    def load():
        return lambda texts: np.array(
            [[len(t), t.count("a")] for t in texts], dtype=float
        )

    backend = CallableBackend(
        load, name="letters", version="1", modality="text", n_features=2
    )
    pipeline = make_pipeline(
        FrozenEncoder(backend, store=None),
        small(max_epochs=1),
        HistGradientBoostingClassifier(max_iter=2),
    )
    texts = pd.Series(["a red cat", "blue", None, "the sea"] * 15)
    pipeline.fit(texts, np.arange(60) % 2)
    assert pipeline.predict(pd.Series([None], dtype=object)).shape == (1,)


def test_a_row_that_is_half_there_is_refused(clusters):
    X, y = clusters
    projector = small().fit(X, y)
    X = X.copy()
    X[5, 3] = np.nan
    for method in (projector.transform, lambda X: small().fit(X, y)):
        with pytest.raises(
            ValueError, match="contains NaN in 1 of 20 columns of row 5"
        ):
            method(X)
    frame = pd.DataFrame(X).add_prefix("text__")
    with pytest.raises(ValueError, match="of row 5, first in 'text__3'"):
        small().fit(frame, y)


# Seeds and threads


def test_equal_seeds_give_equal_projections_and_others_differ(clusters):
    Z = small().fit_transform(*clusters)
    np.testing.assert_array_equal(Z, small().fit_transform(*clusters))
    assert not np.allclose(Z, small(random_state=1).fit_transform(*clusters))


def test_a_random_state_instance_is_drawn_from(clusters):
    rng = np.random.RandomState(0)  # noqa: NPY002
    first, second = (small(random_state=rng).fit_transform(*clusters) for _ in range(2))
    assert not np.allclose(first, second)


# Bad input


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 90, "y has 1 class only .a in all 90 rows"),
        (
            np.arange(90).astype(str),
            "No two of the 90 observed rows belong together .*90 classes",
        ),
        (
            [None] + ["a", "b"] * 44 + ["a"],
            "contains NaN or None in 1 of 90 rows, first in row 0",
        ),
        (
            np.r_[0.0, np.nan, np.ones(88)],
            "contains NaN or None in 1 of 90 rows, first in row 1",
        ),
        (np.full(90, 0.5), "y is .0.5. in all 90 rows"),
        (np.array([1, "a"] * 45, dtype=object), "mixes labels"),
        (np.zeros((90, 2), dtype=int), r"y is \[0, 0\] in all 90 rows"),
        (np.tile([1, 0, 1], (90, 1)), r"y is \[1, 0, 1\] in all 90 rows"),
        (np.arange(90), "No two of the 90 .* set target_type='continuous'"),
        (
            [["red", "round"], ["blue"], []] * 30,
            "Row 0 of y is .'red', .*MultiLabelBinarizer",
        ),
        (
            pd.Series([["red"], ["blue"]] * 45),
            "Row 0 of y is .'red'.*MultiLabelBinarizer",
        ),
    ],
    ids=[
        "one class",
        "one row per class",
        "None",
        "NaN",
        "constant",
        "mixed",
        "no label",
        "the same labels",
        "all different numbers",
        "lists of tags",
        "a column of tags",
    ],
)
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%")
def test_bad_labels_are_refused(clusters, y, message):
    for method in ("fit", "fit_transform"):
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(small(), method)(clusters[0], y)


def test_an_all_missing_modality_is_refused(clusters):
    X, y = clusters
    with pytest.raises(ValueError, match="All 90 rows of X are NaN"):
        small().fit(np.full_like(X, np.nan), y)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.empty((0, 20)), "0 sample"),
        (np.empty((90, 0)), "0 feature"),
        (np.full((90, 2), np.inf), "infinity"),
    ],
)
def test_bad_tables_are_refused(clusters, X, message):
    with pytest.raises(ValueError, match=message):
        small().fit(X, clusters[1][: len(X)])


def tokens_of(n_rows):
    cells = np.empty(n_rows, dtype=object)
    cells[:] = [np.ones((3, 2)) for _ in range(n_rows)]
    return pd.DataFrame({"text__0": cells})


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (
            pd.DataFrame({"day": [None, *["2020-01-01"] * 89]}, dtype="datetime64[us]"),
            "Row 1 of column 'day' of X is the date 2020-01-01",
        ),
        (
            tokens_of(90),
            r"Row 0 of column 'text__0' .* shape \(3, 2\).*output='pooled'",
        ),
        (np.ones((90, 3, 2)), r"dim 3, of shape \(90, 3, 2\).*output='pooled'"),
        (
            pd.DataFrame({"v": [None, *[np.ones(4)] * 89]}),
            r"Row 1 .*shape \(4,\).*np.stack",
        ),
        (
            pd.DataFrame({"a": 1.0, "note": ["a red cat"] * 90}),
            "column 'note' .*'a red cat'.*Encode",
        ),
        (
            np.array([["a red cat"]] * 90),
            "Row 0 of column 0 of X is the text 'a red cat'",
        ),
    ],
    ids=[
        "a column of dates",
        "tokens",
        "padded tokens",
        "a column of vectors",
        "a column of texts",
        "texts",
    ],
)
def test_what_are_no_vectors_is_refused(clusters, X, message):
    with pytest.raises(ValueError, match=message):
        small().fit(X, clusters[1])
    with pytest.raises(ValueError, match=message):
        small().fit(*clusters).transform(X)
    half = {"text": slice(0, 1), "image": slice(1, 2)}
    for aligner in (CanonicalAligner(blocks=half), ModalityGapAligner(half)):
        with pytest.raises(ValueError, match=message):
            aligner.fit(X)


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": 0},
        {"hidden_layer_sizes": 16},
        {"hidden_layer_sizes": (16, 0)},
        {"loss": "triplet"},
        {"similarity": "euclidean"},
        {"temperature": 0},
        {"dropout": 1.0},
        {"cv": 1},
        {"max_epochs": 0},
        {"batch_size": 1},
        {"lr": -1.0},
        {"device": "gpu9"},
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_name(clusters, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}|k-fold"):
        small(**options).fit_transform(*clusters)


# In pipelines


def test_it_is_tuned_inside_a_pipeline(clusters):
    X, y = clusters
    labels = np.array(["ant", "bee", "cow"])[y]
    search = GridSearchCV(
        make_pipeline(small(max_epochs=20), LogisticRegression()),
        {"contrastiveprojector__temperature": [0.05, 0.5]},
        cv=3,
        error_score="raise",
    ).fit(X, labels)
    assert search.best_score_ > 0.5
    assert len(set(search.cv_results_["mean_test_score"])) == 2


def test_the_paper_s_setting_is_a_matter_of_parameters(clusters):
    """arXiv 2502.02048 as released: 16 hidden units, dot product, Adam, no standardisation."""
    preset = {
        "n_components": 128,
        "hidden_layer_sizes": (16,),
        "loss": "pairwise_bce",
        "similarity": "dot",
        "temperature": 0.1,
        "passthrough": False,
        "dropout": 0.0,
        "weight_decay": 0.0,
        "standardize": False,
        "max_epochs": 10,
        "cv": None,
    }
    X, y = clusters
    Z = ContrastiveProjector(**preset, random_state=0).fit_transform(X, y)
    assert Z.shape == (90, 128)
    assert np.linalg.matrix_rank(Z - Z.mean(axis=0), tol=1e-3) <= 16  # the bottleneck


def test_it_works_in_clones_of_fitted_ones(clusters):
    fitted = small().fit(*clusters)
    assert not hasattr(clone(fitted), "weights_")


@pytest.mark.parametrize("n_features", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("n_columns", [1, 2, 5])
def test_a_product_s_row_depends_on_that_row_alone(n_features, n_columns):
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.normal(size=(20, n_features)).astype(np.float32)
        matrix = rng.normal(size=(n_columns, n_features)).astype(np.float32).T
        order = rng.permutation(20)
        together = product(rows, matrix)
        np.testing.assert_array_equal(product(rows[order], matrix), together[order])
        np.testing.assert_allclose(together, rows @ matrix, rtol=1e-5, atol=1e-6)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cv", [None, 3])
def test_a_projector_of_a_gpu_separates_classes_as_well(cv):
    X, y = buried_classes(noise=0.7)
    scores = []
    for device in ("cpu", "cuda"):
        projector = small(cv=cv, max_epochs=20, device=device)
        assert projector.fit_transform(X[:600], y[:600]).dtype == np.float32
        scores.append(silhouette_score(projector.transform(X[600:]), y[600:]))
    assert scores[1] > scores[0] - 0.1


@pytest.mark.gpu
def test_a_projector_of_a_gpu_is_saved_and_loaded_on_a_machine_without(
    clusters, tmp_path
):
    X, y = clusters
    projector = small(device="cuda", early_stopping=True).fit(X, y)
    assert {type(value) for value in projector.weights_.values()} == {np.ndarray}
    assert projector.history_[0]["train_loss"] > projector.history_[-1]["train_loss"]
    projector.save(tmp_path / "saved")
    (tmp_path / "pickled").write_bytes(pickle.dumps(projector))
    np.save(tmp_path / "X.npy", X)
    code = """
import pickle, sys
import numpy as np
from sklembed import ContrastiveProjector
X = np.load("X.npy")
with open("pickled", "rb") as file:
    pickled = pickle.load(file)
projectors = [ContrastiveProjector.load("saved"), pickled]
np.save("Z.npy", [projector.transform(X) for projector in projectors])
assert "torch" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    for Z in np.load(tmp_path / "Z.npy"):
        np.testing.assert_allclose(Z, projector.transform(X), atol=1e-6)


@pytest.mark.gpu
def test_a_module_as_loss_moves_to_the_gpu(clusters):
    class Centres(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = torch.nn.Parameter(torch.zeros(3, 4))

        def forward(self, z, labels):
            return (z - self.centres[labels]).square().mean()

    projector = small(loss=Centres(), device="cuda", cv=2)
    assert np.isfinite(projector.fit_transform(*clusters)).all()
