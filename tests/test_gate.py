"""The gate: which representation it lets through, and that it is the right one."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.multioutput import MultiOutputClassifier

from sklembed import ContrastiveProjector
from sklembed._targets import encode_target
from sklembed.projection import gate as _gate
from sklembed.projection.forward import project, reduce
from sklembed.projection.gate import choose

NAMES = ("passthrough", "projection", "both")


def small(**options):
    defaults = {
        "passthrough": "auto",
        "n_components": 4,
        "hidden_layer_sizes": (16,),
        "max_epochs": 5,
        "batch_size": 32,
        "random_state": 0,
        "cv": 3,
    }
    return ContrastiveProjector(**(defaults | options))


# The rule


def choose_by(monkeypatch, **scores):
    """Let the gate choose by these scores instead of a probe's."""
    candidates = {name: np.array([[number]]) for number, name in enumerate(scores)}
    rows = list(scores.values())
    monkeypatch.setattr(
        _gate, "_score", lambda Z, target, fold, weight: rows[Z[0, 0]][fold]
    )
    choice, found = choose(candidates, None, range(len(rows[0])))
    for name, score in scores.items():
        np.testing.assert_array_equal(found[name], score)
    return choice


@pytest.mark.parametrize(
    ("first", "second", "third", "expected"),
    [
        ([0.9, 0.9, 0.9], [0.8, 0.8, 0.8], [0.7, 0.7, 0.7], "first"),
        ([0.7, 0.7, 0.7], [0.9, 0.9, 0.9], [0.8, 0.8, 0.8], "second"),
        ([0.7, 0.7, 0.7], [0.8, 0.8, 0.8], [0.9, 0.9, 0.9], "third"),
        ([0.8, 0.8, 0.8], [0.8, 0.8, 0.8], [0.8, 0.8, 0.8], "first"),
        # Behind by 0.02 in the mean, with a standard error of 0.01: too far.
        ([0.80, 0.80, 0.80], [0.80, 0.82, 0.84], [0.5, 0.5, 0.5], "second"),
        # Behind by 0.02, with a standard error of 0.04: as good.
        ([0.80, 0.80, 0.80], [0.74, 0.84, 0.88], [0.5, 0.5, 0.5], "first"),
        # Folds differ, but always to the same side: it is the difference that counts.
        ([0.50, 0.70, 0.90], [0.51, 0.71, 0.91], [0.5, 0.5, 0.5], "second"),
        ([0.5, 0.5, 0.5], [0.86, 0.9, 0.92], [0.9, 0.9, 0.9], "second"),
    ],
)
def test_the_simplest_within_one_standard_error_is_chosen(
    monkeypatch, first, second, third, expected
):
    assert choose_by(monkeypatch, first=first, second=second, third=third) == expected


# The probe


def folds_of(n, n_splits=3):
    return list(KFold(n_splits, shuffle=True, random_state=0).split(np.zeros(n)))


def telling_and_noise(y, n_columns=3, scale=0.3):
    """Make one representation that tells a target, and one that tells nothing."""
    rng = np.random.default_rng(0)
    telling = np.asarray(y, dtype=float).reshape(len(y), -1)
    telling = telling + rng.normal(scale=scale, size=telling.shape)
    return {"noise": rng.normal(size=(len(y), n_columns)), "telling": telling}


@pytest.mark.parametrize(
    "kind", ["binary", "multiclass", "multilabel", "continuous", "levels"]
)
def test_the_probe_prefers_what_tells_the_target(kind):
    rng = np.random.default_rng(1)
    y = {
        "binary": rng.integers(0, 2, 90),
        "multiclass": rng.permutation(np.eye(3, dtype=int).repeat(30, axis=0)).argmax(
            axis=1
        ),
        "multilabel": rng.integers(0, 2, (90, 4)),
        "continuous": rng.normal(size=90),
        "levels": np.column_stack([rng.integers(0, 2, 90), rng.integers(5, 9, 90)]),
    }[kind]
    shown = np.eye(3)[y] if kind == "multiclass" else y
    for weight in (None, rng.random(90)):
        choice, scores = choose(
            telling_and_noise(shown), encode_target(y), folds_of(90), weight
        )
        assert choice == "telling"
        assert scores["telling"].mean() > 0.8
        assert scores["noise"].mean() < 0.6
        assert all(score.shape == (3,) for score in scores.values())
    choice, _ = choose(
        dict(reversed(telling_and_noise(shown).items())), encode_target(y), folds_of(90)
    )
    assert choice == "telling"


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "continuous"])
def test_rows_of_weight_zero_have_no_say(kind):
    """A hundred rows that speak for the noise are worth nothing."""
    rng = np.random.default_rng(0)
    y = {
        "multiclass": rng.integers(0, 2, 200),
        "multilabel": rng.integers(0, 2, (200, 3)),
        "continuous": rng.normal(size=200),
    }[kind]
    candidates = telling_and_noise(y)
    shown = np.asarray(y, dtype=float).reshape(200, -1)
    candidates["noise"] = np.vstack(
        [rng.normal(size=(100, shown.shape[1])), shown[100:]]
    )
    candidates["telling"][100:] = rng.normal(size=shown[100:].shape)
    target = encode_target(y)
    assert (
        choose(candidates, target, folds_of(200), np.repeat([1.0, 0.0], 100))[0]
        == "telling"
    )
    assert (
        choose(candidates, target, folds_of(200), np.repeat([0.0, 1.0], 100))[0]
        == "noise"
    )


def test_weights_of_one_are_no_weights():
    y = np.random.default_rng(0).integers(0, 3, 90)
    candidates = telling_and_noise(np.eye(3)[y], scale=1.0)
    target, folds = encode_target(y), folds_of(90)
    _, even = choose(candidates, target, folds)
    _, ones = choose(candidates, target, folds, np.ones(90))
    for name in candidates:
        np.testing.assert_allclose(even[name], ones[name])


def test_a_class_that_only_one_fold_has_can_be_judged():
    y = np.r_[np.repeat([0, 1], 30), 2]
    choice, scores = choose(
        telling_and_noise(np.eye(3)[y]), encode_target(y), folds_of(61)
    )
    assert choice == "telling"
    assert np.isfinite(scores["telling"]).all()


# Three worlds, in each of which another choice is right


def faint_side(rng, n):
    """Two classes a little apart in ten of thirty columns: a network of 60 rows learns noise."""
    y = rng.integers(0, 2, n)
    apart = np.r_[np.full(10, 0.4), np.zeros(20)]
    return rng.normal(size=(n, 30)) + np.outer(2 * y - 1, apart), y


def checkerboard(rng, n):
    """Classes by the sign of a product, beside eight columns of noise: nothing linear tells it."""
    X = rng.normal(size=(n, 10))
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


def ring_and_sides(rng, n):
    """Labels in or out of a ring, and four sides in fainter columns, for six hidden units."""
    ring, sides = rng.normal(size=(n, 2)), rng.normal(size=(n, 4))
    inside = np.linalg.norm(ring, axis=1) < 1.2
    return np.hstack([0.3 * sides, ring]), np.column_stack(
        [inside, ~inside, sides > 0]
    ).astype(int)


WORLDS = {
    "passthrough": (faint_side, 60, {"n_components": 30, "max_epochs": 10}),
    "projection": (
        checkerboard,
        400,
        {
            "n_components": 10,
            "hidden_layer_sizes": (32,),
            "max_epochs": 25,
            "dropout": 0.1,
            "lr": 1e-2,
        },
    ),
    "both": (
        ring_and_sides,
        400,
        {
            "n_components": 6,
            "hidden_layer_sizes": (6,),
            "max_epochs": 20,
            "dropout": 0.0,
            "lr": 1e-2,
            "standardize": False,
        },
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("right", NAMES)
def test_in_each_world_the_gate_chooses_what_new_rows_confirm(right, seed):
    world, n_rows, options = WORLDS[right]
    rng = np.random.default_rng(seed)
    X, y = world(rng, n_rows)
    projector = small(
        **({"batch_size": 64, "cv": 5, "random_state": seed} | options)
    ).fit(X, y)
    assert projector.gate_ == right
    assert tuple(projector.gate_scores_) == NAMES
    assert all(score.shape == (5,) for score in projector.gate_scores_.values())

    X, y = world(rng, 2000)
    reduced = reduce(projector.components_, X.astype(np.float32))
    projected = project(projector.weights_, X.astype(np.float32), "cosine")
    Z = dict(
        zip(NAMES, (reduced, projected, np.hstack([projected, reduced])), strict=True)
    )
    np.testing.assert_array_equal(projector.transform(X), Z[right])
    probe = LogisticRegression(C=10, max_iter=1000)
    probe = probe if y.ndim == 1 else MultiOutputClassifier(probe)
    accuracy = {
        name: (probe.fit(z[:1000], y[:1000]).predict(z[1000:]) == y[1000:]).mean()
        for name, z in Z.items()
    }
    assert accuracy[right] >= max(accuracy.values()) - 0.02


# Through the projector


def stay(monkeypatch, gate):
    monkeypatch.setattr(
        "sklembed.projection.projector.choose", lambda *_: (gate, {gate: np.ones(3)})
    )


@pytest.mark.parametrize(
    ("gate", "width"), [("passthrough", 4), ("projection", 4), ("both", 8)]
)
def test_the_width_of_the_output_follows_the_gate(clusters, monkeypatch, gate, width):
    X, y = clusters
    stay(monkeypatch, gate)
    projector = small()
    Z = projector.fit_transform(X, y)
    assert projector.gate_ == gate
    assert Z.shape == projector.transform(X).shape == (90, width)
    assert len(projector.get_feature_names_out()) == width
    open_gate = small(passthrough=True)
    both = open_gate.fit_transform(X, y), open_gate.transform(X)
    columns = {"passthrough": np.s_[4:], "projection": np.s_[:4], "both": np.s_[:]}[
        gate
    ]
    np.testing.assert_array_equal(Z, both[0][:, columns])
    np.testing.assert_array_equal(projector.transform(X), both[1][:, columns])


@pytest.mark.parametrize("gate", NAMES)
def test_missing_rows_stay_nan_whatever_the_gate_lets_through(
    clusters, monkeypatch, gate
):
    X, y = clusters
    stay(monkeypatch, gate)
    X = X.copy()
    X[::9] = np.nan
    projector = small()
    for Z in (projector.fit_transform(X, y), projector.transform(X)):
        np.testing.assert_array_equal(np.isnan(Z), np.isnan(X[:, : Z.shape[1]]))


@pytest.mark.parametrize("seed", range(4))
def test_fit_and_fit_transform_choose_alike(clusters, seed):
    X, y = clusters
    first, second = small(random_state=seed).fit(X, y), small(random_state=seed)
    second.fit_transform(X, y)
    assert first.gate_ == second.gate_
    for name in NAMES:
        np.testing.assert_array_equal(
            first.gate_scores_[name], second.gate_scores_[name]
        )
    np.testing.assert_array_equal(first.transform(X), second.transform(X))


def test_the_gate_is_not_asked_unless_it_is_wanted(clusters, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked")

    monkeypatch.setattr("sklembed.projection.projector.choose", refuse)
    for passthrough, gate in [(True, "both"), (False, "projection")]:
        projector = small(passthrough=passthrough)
        projector.fit_transform(*clusters)
        assert (projector.gate_, projector.gate_scores_) == (gate, {})


def test_without_folds_auto_means_both(clusters):
    X, y = clusters
    projector = small(cv=None)
    Z = projector.fit_transform(X, y)
    assert (projector.gate_, projector.gate_scores_) == ("both", {})
    np.testing.assert_array_equal(
        Z, small(cv=None, passthrough=True).fit(X, y).transform(X)
    )
    assert small().partial_fit(X, y).gate_ == "both"


def test_the_folds_of_a_splitter_are_those_of_the_gate(clusters):
    X, y = clusters
    projector = small(cv=StratifiedKFold(7)).fit(X, y)
    assert all(score.shape == (7,) for score in projector.gate_scores_.values())


@pytest.mark.parametrize("kind", ["multilabel", "continuous", "hierarchical"])
def test_every_kind_of_target_passes_the_gate(clusters, kind):
    X, y = clusters
    y = {
        "multilabel": np.column_stack([y == 0, y > 0, X[:, 0] > 0]).astype(int),
        "continuous": X[:, 0] + y,
        "hierarchical": np.column_stack([y > 0, y + 5]),
    }[kind]
    projector = small().fit(X, y)
    assert projector.gate_ in NAMES
    assert np.isfinite(list(projector.gate_scores_.values())).all()


def test_a_class_of_which_only_missing_rows_are_left_does_not_confuse_the_probe(
    clusters,
):
    X, y = clusters
    X = X.copy()
    X[y == 0] = np.nan
    projector = small().fit(X, y)
    rows = y > 0
    alone = small().fit(X[rows], y[rows])
    for name in NAMES:
        np.testing.assert_array_equal(
            projector.gate_scores_[name], alone.gate_scores_[name]
        )


@pytest.mark.parametrize("observed_class", [0, 1, 2])
def test_a_single_observed_class_passes_the_gate(clusters, observed_class):
    X, y = clusters
    X = np.where((y == observed_class)[:, None], X, np.nan)
    Z = small().fit_transform(X, y)
    assert (~np.isnan(Z).any(axis=1) == (y == observed_class)).all()


def test_a_single_observed_number_passes_the_gate(clusters):
    X, y = clusters
    X = np.where((y == 0)[:, None], X, np.nan)
    projector = small(target_type="continuous").fit(X, y)
    assert all((scores == 1).all() for scores in projector.gate_scores_.values())


def test_a_class_that_weighs_nothing_does_not_count_in_the_gate(clusters):
    projector = small(class_weight={0: 1.0, 1: 1.0, 2: 0.0}).fit(*clusters)
    assert np.isfinite(list(projector.gate_scores_.values())).all()


def test_a_few_rows_of_numbers_pass_the_gate():
    rng = np.random.default_rng(0)
    projector = small(cv=5).fit(rng.normal(size=(7, 5)), rng.normal(size=7))
    assert projector.gate_ in NAMES
