"""EmbeddingClassifier and EmbeddingRegressor: members, folds, targets, input, files."""

import pickle
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logit
from sklearn.base import clone, config_context
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    ShuffleSplit,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklembed import EmbeddingClassifier, EmbeddingRegressor, PerModalityUnion
from sklembed.ensemble import estimators, features, svm
from sklembed.ensemble.estimators import MEMBERS, _make_folds
from sklembed.ensemble.members import _CLASSIFIER, _REGRESSOR
from sklembed.ensemble.svm import couple

WIDTH = 18  # columns of a vector; blocks below 16 columns are table columns
BLOCKS = {
    "text": slice(0, WIDTH),
    "image": slice(WIDTH, 2 * WIDTH),
    "table": slice(2 * WIDTH, 2 * WIDTH + 3),
}
CHEAP = ["linear", "kernel"]
FAST = ["linear", "trees"]
SEVERAL = {
    "words": list(MEMBERS),
    "labels": ["linear", "kernel", "projection"],
    "number": ["kernel", "trees"],
    "numbers": ["kernel", "trees"],
}


def make_table(n_rows=60, n_classes=3, seed=0):
    """Return two vectors and three table columns side by side, and classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_rows) % n_classes
    X = rng.normal(size=(n_rows, 2 * WIDTH + 3)).astype(np.float32)
    X[:, :WIDTH] += rng.normal(size=(n_classes, WIDTH))[y]
    X[:, -1] += y
    return X, y


def with_gaps(X):
    """Return a table with missing blocks, missing numbers, and an empty row."""
    X = X.copy()
    X[::3, BLOCKS["text"]] = np.nan
    X[1::4, BLOCKS["image"]] = np.nan
    X[::5, -2] = np.nan
    X[0] = np.nan
    return X


def target_of(kind, X, y):
    if kind == "words":
        return np.array(["ant", "bee", "cöw"])[y]
    if kind == "labels":
        never = np.zeros(len(y))
        once = np.arange(len(y)) == 4  # constant in all training sets but one
        return np.column_stack([y == 0, y != 1, never, once]).astype(int)
    if kind == "number":
        return y + X[:, 0] - X[:, -1] / 2
    return np.column_stack([y + X[:, 0], np.full(len(y), 0.1), 100 * X[:, -1]])


KINDS = ["words", "labels", "number", "numbers"]


def ensemble(kind="words", members="auto", blocks=BLOCKS, **options):
    cls = EmbeddingRegressor if kind.startswith("number") else EmbeddingClassifier
    return cls(blocks=blocks, members=members, random_state=0, **options)


def members_of(kinds):
    """Return pairs of a kind of target and a member for it."""
    pairs = [(kind, member) for kind in kinds for member in MEMBERS]
    return [pair for pair in pairs if pair[0] == "words" or pair[1] != "svm"]


def output(model, X):
    return (getattr(model, "predict_proba", None) or model.predict)(X)


@pytest.fixture(autouse=True)
def train_briefly(monkeypatch):
    """Train for fewer epochs and iterations than by default, which is faster."""
    monkeypatch.setattr(features, "_MAX_EPOCHS", 10)
    monkeypatch.setitem(_CLASSIFIER, "max_iter", 10)
    monkeypatch.setitem(_REGRESSOR, "max_iter", 60)


@pytest.fixture(scope="module")
def fitted():
    """Return a function that fits several members once for each kind of target."""
    models = {}

    def fit(kind):
        if kind not in models:
            X, y = make_table()
            X = with_gaps(X)
            filled = make_table()[0]
            target = target_of(kind, filled, y)
            models[kind] = ensemble(kind, SEVERAL[kind]).fit(X, target)
        return models[kind], with_gaps(make_table()[0])

    return fit


# The average


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_average_of_the_members(fitted, kind):
    model, X = fitted(kind)
    by_member = model.member_predictions(X)
    assert list(by_member) == list(model.members_)
    P = output(model, X)
    np.testing.assert_allclose(np.mean(list(by_member.values()), axis=0), P)
    for predicted in by_member.values():
        assert predicted.shape == P.shape
        assert np.isfinite(predicted).all()
        if kind in ("words", "labels"):
            assert ((predicted >= 0) & (predicted <= 1)).all()
        if kind == "words":
            np.testing.assert_allclose(predicted.sum(axis=1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_seconds_are_reported_for_each_member(fitted, kind):
    model, _ = fitted(kind)
    assert list(model.scores_) == [*model.members_, "average"]
    assert list(model.seconds_) == ["features", *model.members_]
    assert all(seconds >= 0 for seconds in model.seconds_.values())
    assert set(model.members_) <= set(MEMBERS)
    limit = {"words": np.log(1 / 3), "labels": -4 * np.log(2)}.get(kind, 0)
    assert all(limit <= score for score in model.scores_.values())


@pytest.mark.parametrize(("kind", "member"), members_of(["words", "number"]))
def test_scores_out_of_fold_are_close_to_those_of_new_rows(kind, member):
    X, y = make_table(300)
    X += 0.7 * np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    target = target_of(kind, make_table(300)[0], y)
    model = ensemble(kind, [member]).fit(X[:150], target[:150])
    new = X[150:]
    if kind == "words":
        score = -log_loss(target[150:], model.predict_proba(new))
    else:
        score = r2_score(target[150:], model.predict(new))
    assert model.scores_[member] == pytest.approx(score, abs=0.2)
    assert model.scores_["average"] == pytest.approx(model.scores_[member])


def test_the_average_of_members_is_not_worse_than_they_are_on_average(fitted):
    for kind in ("words", "labels"):
        scores = dict(fitted(kind)[0].scores_)
        average = scores.pop("average")
        assert average >= np.mean(list(scores.values()))  # Jensen's inequality


# Members


@pytest.mark.parametrize(("kind", "member"), members_of(KINDS))
def test_each_member_stands_alone(kind, member):
    X, y = make_table()
    target = target_of(kind, X, y)
    model = ensemble(kind, [member]).fit(with_gaps(X), target)
    assert list(model.members_) == [member]
    assert output(model, X).shape == (60, {"words": 3}.get(kind, target[0].size)) or (
        kind == "number" and output(model, X).shape == (60,)
    )
    assert np.isfinite(output(model, with_gaps(X))).all()


@pytest.mark.parametrize("kind", ["labels", "number"])
def test_a_support_vector_machine_requires_classes(kind):
    X, y = make_table()
    with pytest.raises(ValueError, match=f"'svm' requires classes, but y has {kind}"):
        ensemble(kind, ["svm"]).fit(X, target_of(kind, X, y))


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_coupling_recovers_the_probabilities_behind_the_pairs(n_classes):
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(n_classes), size=50).clip(1e-3)
    P /= P.sum(axis=1, keepdims=True)
    first, second = np.triu_indices(n_classes, 1)
    in_pairs = P[:, first] / (P[:, first] + P[:, second])
    np.testing.assert_allclose(couple(in_pairs, n_classes), P, atol=1e-5)


def test_coupling_minimises_the_disagreement_of_the_pairs():
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(4, 1)
    in_pairs = rng.uniform(0.2, 0.8, size=(5, 6))

    def disagreement(p, row):
        losses = in_pairs[row] * p[second] - (1 - in_pairs[row]) * p[first]
        return np.square(losses).sum()

    for row, p in enumerate(couple(in_pairs, 4)):
        assert p.sum() == pytest.approx(1)
        step = 1e-3 * rng.normal(size=(50, 4))
        step -= step.mean(axis=1, keepdims=True)  # probabilities still sum to 1
        for other in p + step:
            assert disagreement(p, row) < disagreement(other, row)


def test_a_class_that_a_fold_lacks_is_improbable_there():
    X, y = make_table()
    y = np.where(np.arange(60) == 7, 3, y)  # a class with a single row
    model = ensemble(members=["svm"]).fit(X, y)
    P = model.predict_proba(X)
    assert np.isfinite(P).all()
    assert P[:, 3].mean() < 0.2
    folds = [(np.flatnonzero(y != k), np.flatnonzero(y == k)) for k in range(4)]
    apart = ensemble(members=["svm"], cv=folds).fit(X, y)
    assert np.isfinite(apart.predict_proba(X)).all()


def test_the_default_members_depend_on_the_size_of_the_table(monkeypatch):
    X, y = make_table()
    assert list(ensemble().fit(X, y).members_) == ["kernel", "svm"]
    monkeypatch.setattr(estimators, "_SVM_ROWS", 59)
    monkeypatch.setattr(estimators, "_MANY_CLASSES", 2)
    many = ["linear", "kernel", "projection"]
    assert list(ensemble().fit(X, y).members_) == many
    assert list(ensemble().fit(X, y == 0).members_) == [*many, "trees"]


@pytest.mark.parametrize("kind", ["labels", "number"])
def test_members_do_not_influence_each_other(fitted, kind):
    model, X = fitted(kind)
    together = model.member_predictions(X)
    filled, y = make_table()
    for member in model.members_:
        alone = ensemble(kind, [member]).fit(X, target_of(kind, filled, y))
        np.testing.assert_allclose(output(alone, X), together[member])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["linear", "forest"], r"members has 'forest'; the members are \['"),
        ([], "at least one; got"),
        (["linear", "linear"], "different names"),
        ("linear", "The 'members' parameter"),
    ],
)
def test_members_that_do_not_exist_are_refused_before_anything_is_fitted(
    members, message
):
    X, y = make_table()
    for kind in ("words", "number"):
        with pytest.raises(ValueError, match=message):
            ensemble(kind, members).fit(X, y)


# Folds, groups and weights


def random_groups(seed):
    rng = np.random.default_rng(seed)
    n_rows, n_groups = rng.integers(4, 40), rng.integers(2, 9)
    groups = rng.integers(0, n_groups, n_rows)
    groups[:2] = 0, 1  # at least two
    strata = rng.integers(0, 3, n_rows)
    if seed % 4 == 0:
        strata = groups % 3
    if seed % 4 == 1:
        strata = None
    weight = rng.integers(0, 3, n_rows).astype(float)
    weight[:4] = 1
    if strata is not None:
        strata[2:4] = strata[:2]
    return weight, strata, groups


@pytest.mark.parametrize("with_groups", [False, True])
def test_folds_hold_out_each_row_once_and_keep_groups_together(with_groups):
    for seed in range(60):
        weight, strata, groups = random_groups(seed)
        codes = groups if with_groups else None
        folds = _make_folds(5, weight, strata, codes, seed)
        held_out = np.concatenate([rows for _, rows in folds])
        np.testing.assert_array_equal(np.sort(held_out), np.arange(len(weight)))
        for train, rows in folds:
            assert len(train)
            assert len(rows)
            assert (weight[train] > 0).all()
            assert not set(train) & set(rows)
            used = rows[weight[rows] > 0]
            if with_groups:
                assert not set(groups[train]) & set(groups[used])


class Spy(KFold):
    """Folds of whole groups that write down the groups."""

    def split(self, X, y=None, groups=None):
        self.groups = groups
        return GroupKFold(self.n_splits).split(X, y, groups)


def test_a_splitter_gets_the_groups():
    X, y = make_table()
    spy = Spy(4)
    groups = np.repeat(["d", "a", "b", "c"], 15)
    ensemble(members=["linear"], cv=spy).fit(X, y, groups=groups)
    assert spy.groups.tolist() == np.repeat([0, 1, 2, 3], 15).tolist()


def test_folds_of_a_list_and_of_a_splitter_are_the_same():
    X, y = make_table()
    folds = list(KFold(4, shuffle=True, random_state=0).split(X))
    first = ensemble(members=CHEAP, cv=folds).fit(X, y)
    second = ensemble(members=CHEAP, cv=KFold(4, shuffle=True, random_state=0))
    np.testing.assert_array_equal(
        first.predict_proba(X), second.fit(X, y).predict_proba(X)
    )


def test_a_splitter_must_hold_out_each_row_once():
    X, y = make_table()
    with pytest.raises(ValueError, match=r"held out|hold out"):
        ensemble(cv=ShuffleSplit(3)).fit(X, y)


def test_large_tables_have_two_folds():
    strata = np.arange(20_001) % 2
    assert len(_make_folds(5, np.ones(20_001), strata, None, 0)) == 2
    assert len(_make_folds(5, np.ones(20_000), strata[1:], None, 0)) == 5


def test_groups_make_scores_honest():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    centres = rng.normal(size=(12, WIDTH))
    X = centres[groups] + 0.2 * rng.normal(size=(120, WIDTH))
    y = rng.integers(0, 2, 12)[groups]  # decided by the group, not by its centre
    blocks = {"text": slice(None)}
    members = ["linear", "kernel"]
    blind = ensemble(members=members, blocks=blocks).fit(X, y)
    honest = ensemble(members=members, blocks=blocks).fit(X, y, groups=groups)
    for member in members:
        assert blind.scores_[member] > -0.1
        assert honest.scores_[member] < -0.4
    assert honest.slopes_["linear"] < blind.slopes_["linear"]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_group_that_decides_the_class(n_classes):
    X, y = make_table(n_classes=n_classes)
    model = ensemble().fit(X, y, groups=y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_groups_that_cannot_be_used_are_refused():
    X, y = make_table()
    for kind in ("words", "number"):
        with pytest.raises(ValueError, match="groups has 59 values, but X has 60 rows"):
            ensemble(kind).fit(X, y, groups=np.arange(59))
        with pytest.raises(ValueError, match="no value in 1 rows, first in row 2"):
            ensemble(kind).fit(X, y, groups=["a", "b", None] + ["c"] * 57)
        with pytest.raises(ValueError, match="All 60 rows of positive weight are in"):
            ensemble(kind).fit(X, y, groups=np.ones(60))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_have_no_influence(kind):
    X, y = make_table(60)
    target = target_of(kind, X, y)
    weight = np.r_[np.random.default_rng(0).uniform(0.5, 2, 50), np.zeros(10)]
    garbage = X.copy()
    garbage[50:] = 1e3
    with_zeros = ensemble(kind, CHEAP).fit(garbage, target, sample_weight=weight)
    without = ensemble(kind, CHEAP)
    without.fit(X[:50], target[:50], sample_weight=weight[:50])
    np.testing.assert_allclose(
        output(with_zeros, X), output(without, X), rtol=1e-4, atol=1e-6
    )


def test_hardly_any_row_of_positive_weight():
    X, y = make_table()
    weight = np.zeros(60)
    weight[:4] = 1
    assert np.isfinite(
        ensemble().fit(X, y, sample_weight=weight).predict_proba(X)
    ).all()
    with pytest.raises(ValueError, match="single row, of 3 rows of positive weight"):
        ensemble().fit(X, y, sample_weight=np.arange(60) < 3)
    with pytest.raises(ValueError, match="One of 60 rows has a positive weight"):
        ensemble("number").fit(X, y, sample_weight=np.arange(60) < 1)
    folds = [(np.arange(30), np.arange(30, 60)), (np.arange(30, 60), np.arange(30))]
    with pytest.raises(ValueError, match="Fold 1 of cv has 30 training rows, none of"):
        ensemble(cv=folds).fit(X, y, sample_weight=weight)


def test_a_multiple_of_all_weights_changes_nothing():
    X, y = make_table()
    weight = np.random.default_rng(0).uniform(0.5, 2, 60)
    first = ensemble(members=CHEAP).fit(X, y, sample_weight=weight)
    second = ensemble(members=CHEAP).fit(X, y, sample_weight=100 * weight)
    np.testing.assert_allclose(
        first.predict_proba(X), second.predict_proba(X), rtol=1e-5
    )


def test_class_weights_are_sample_weights():
    X, y = make_table()
    labels = target_of("words", X, y)
    by_class = {"ant": 0.5, "bee": 1.0, "cöw": 3.0}
    weight = np.array([by_class[label] for label in labels])
    first = ensemble(members=CHEAP, class_weight=by_class).fit(X, labels)
    second = ensemble(members=CHEAP).fit(X, labels, sample_weight=weight)
    np.testing.assert_allclose(first.predict_proba(X), second.predict_proba(X))
    plain = ensemble(members=CHEAP).fit(X, labels).predict_proba(X)
    assert first.predict_proba(X)[:, 2].mean() > plain[:, 2].mean()
    with pytest.raises(ValueError, match="class_weight={0: 2} requires classes"):
        ensemble(class_weight={0: 2}).fit(X, target_of("labels", X, y))


# Targets


def test_a_class_with_a_single_row():
    X, y = make_table()
    y[7] = 9
    model = ensemble().fit(X, y)
    assert model.classes_.tolist() == [0, 1, 2, 9]
    P = model.predict_proba(X)
    assert np.isfinite(P).all()
    assert (np.delete(P[:, 3], 7) < 0.2).all()


def test_rare_and_absent_labels_are_improbable(fitted):
    model, X = fitted("labels")
    P = model.predict_proba(X)
    assert (P[:, 2] < 0.05).all()  # in no row
    assert P[:, 3].mean() < 0.2  # in a single row
    np.testing.assert_array_equal(model.predict(X), P > 0.5)


def test_classes_are_those_of_the_target(fitted):
    model, X = fitted("words")
    assert model.classes_.tolist() == ["ant", "bee", "cöw"]
    assert model.target_type_ == "multiclass"
    best = model.predict_proba(X).argmax(axis=1)
    assert model.predict(X).tolist() == model.classes_[best].tolist()


def test_constant_numbers_are_predicted(fitted):
    model, X = fitted("numbers")
    np.testing.assert_allclose(model.predict(X)[:, 1], 0.1)
    constant = ensemble("number").fit(X, np.full(60, -3.0))
    np.testing.assert_allclose(constant.predict(X), -3)


def test_numbers_in_other_units():
    X, y = make_table()
    target = target_of("number", X, y)
    first = ensemble("number").fit(X, target).predict(X)
    second = ensemble("number").fit(X, 1000 * target - 50).predict(X)
    np.testing.assert_allclose(second, 1000 * first - 50, rtol=1e-4, atol=1)


@pytest.mark.parametrize("n_rows", [3, 4, 6])
@pytest.mark.parametrize("kind", ["words", "labels", "number"])
def test_hardly_any_rows(kind, n_rows):
    X, _ = make_table(n_rows)
    y = np.array([0, 1, 1, 0, 2, 0])[:n_rows]
    if kind == "labels":
        y = np.column_stack([y == 0, y != 1])
    model = ensemble(kind).fit(X, y.astype(int))
    assert np.isfinite(output(model, X)).all()


def test_a_single_class_is_refused():
    X, y = make_table()
    with pytest.raises(ValueError, match=r"class"):
        ensemble().fit(X, 0 * y)
    with pytest.raises(ValueError, match="Every class has a single row, of 3 rows"):
        ensemble().fit(X[:3], y[:3])


# Input


@pytest.mark.parametrize("kind", ["words", "number"])
def test_blocks_that_tell_nothing_leave_the_output_finite(kind):
    X, y = make_table()
    new = with_gaps(make_table(seed=1)[0])
    tables = []
    for first in (0, 1):  # observed in no row, in one
        table = X.copy()
        table[first:, BLOCKS["image"]] = np.nan
        table[first:, -1] = np.nan
        tables.append(table)
    constant = X.copy()
    constant[:, BLOCKS["image"]] = 0.1
    constant[:, -1] = 0.1
    for table in (*tables, constant, np.full_like(X, np.nan)):
        assert np.isfinite(output(ensemble(kind).fit(table, y), new)).all()


@pytest.mark.parametrize("kind", ["words", "number"])
@pytest.mark.parametrize("name", ["image", "table"])
def test_a_single_block(kind, name):
    X, y = make_table()
    X = X[:, BLOCKS[name]]
    model = ensemble(kind, blocks={name: slice(None)})
    empty = np.full_like(X, np.nan)
    assert np.isfinite(output(clone(model).fit(X, y), empty)).all()
    assert np.isfinite(output(clone(model).fit(empty, y), X)).all()


def test_a_vector_missing_in_part_is_refused_by_row_and_block(fitted):
    model, X = fitted("words")
    X = np.tile(X, (150, 1))
    row = 8999
    X[row, BLOCKS["image"]] = 0
    X[row, WIDTH + 1] = np.nan
    message = f"NaN in 1 of {WIDTH} columns of row {row} of block 'image'"
    with pytest.raises(ValueError, match=message):
        model.predict(X)
    strict = ensemble(table_blocks=["table"])
    with pytest.raises(ValueError, match=message):
        strict.fit(X, np.arange(len(X)) % 2)
    with pytest.raises(ValueError, match="table_blocks has 'tables', but the blocks"):
        ensemble(table_blocks=["tables"]).fit(X, np.arange(len(X)) % 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_neither_on_its_batch_nor_on_its_position(fitted, kind):
    model, X = fitted(kind)
    P = output(model, X)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(output(model, X[order]), P[order], rtol=1e-5, atol=1e-6)
    alone = np.concatenate([output(model, X[[row]]) for row in range(0, 60, 6)])
    np.testing.assert_allclose(alone, P[::6], rtol=1e-5, atol=1e-6)


def test_predictions_in_chunks_are_the_same(fitted, monkeypatch):
    model, X = fitted("words")
    P = model.predict_proba(X)
    monkeypatch.setattr(estimators, "_CHUNK_ROWS", 7)
    np.testing.assert_allclose(model.predict_proba(X), P, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["words", "number"])
def test_equal_seeds_give_equal_fits_and_global_states_are_left_alone(fitted, kind):
    model, X = fitted(kind)
    filled, y = make_table()
    target = target_of(kind, filled, y)
    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    again = clone(model).fit(X, target)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    np.testing.assert_array_equal(output(again, X), output(model, X))
    drawn = ensemble(kind, ["linear"]).set_params(random_state=np.random.RandomState(0))
    first = output(drawn.fit(X, target), X)
    assert not np.array_equal(first, output(drawn.fit(X, target), X))


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_two_jobs_give_the_results_of_one(kind):
    X, y = make_table()
    target = target_of(kind, X, y)
    first = ensemble(kind, FAST, n_jobs=1).fit(X, target)
    second = ensemble(kind, FAST, n_jobs=2).fit(X, target)
    np.testing.assert_allclose(output(first, X), output(second, X), rtol=1e-6)


# In scikit-learn


def union():
    branches = []
    for name, columns in BLOCKS.items():
        branches.append((name, StandardScaler(), columns))
    return PerModalityUnion(branches).set_output(transform="pandas")


def test_blocks_come_from_the_names_of_a_union():
    X, y = make_table()
    X = with_gaps(X)
    pipeline = make_pipeline(union(), ensemble(members=CHEAP, blocks=None))
    pipeline.fit(X, y)
    assert list(pipeline[-1].blocks_) == list(BLOCKS)
    assert pipeline[-1].table_blocks_ == ["table"]
    scaled = pipeline[:-1].transform(X)
    assert isinstance(scaled, pd.DataFrame)
    by_position = ensemble(members=CHEAP).fit(scaled.to_numpy(), y)
    np.testing.assert_allclose(
        pipeline.predict_proba(X), by_position.predict_proba(scaled.to_numpy())
    )


def test_a_grid_search_over_members():
    X, y = make_table()
    pipeline = make_pipeline(union(), ensemble(members=CHEAP, blocks=None))
    grid = {"embeddingclassifier__members": [["linear"], ["kernel"], CHEAP]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_score_ > 0.8
    assert (
        search.best_params_["embeddingclassifier__members"]
        in grid["embeddingclassifier__members"]
    )


def test_groups_are_routed():
    X, y = make_table()
    groups = np.repeat(np.arange(10), 6)
    with config_context(enable_metadata_routing=True):
        model = ensemble(members=["linear"]).set_fit_request(groups=True)
        results = cross_validate(
            model,
            X,
            y,
            cv=GroupKFold(2),
            params={"groups": groups},
            return_estimator=True,
            return_indices=True,
        )
    for routed, train in zip(
        results["estimator"], results["indices"]["train"], strict=True
    ):
        direct = ensemble(members=["linear"]).fit(
            X[train], y[train], groups=groups[train]
        )
        P = direct.predict_proba(X)
        np.testing.assert_allclose(routed.predict_proba(X), P)
        blind = ensemble(members=["linear"]).fit(X[train], y[train])
        assert not np.allclose(blind.predict_proba(X), P)


class Record:
    """Write down the tasks of a fit."""

    def __init__(self):
        self.calls, self.tasks = [], []

    def setup(self, estimator, context):
        self.calls.append("setup")

    def teardown(self, estimator, context):
        self.calls.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.calls.append(f"begin {context.task_name}")

    def on_fit_task_end(self, estimator, context, **_):
        parent = context.parent.task_name if context.parent else None
        self.tasks.append((parent, context.task_name))


@pytest.mark.parametrize("kind", ["words", "number"])
def test_callbacks_are_told_of_each_member(kind):
    pytest.importorskip("sklearn.callback")
    X, y = make_table()
    record = Record()
    model = ensemble(kind, CHEAP).set_callbacks(record).fit(X, y)
    assert record.tasks == [
        ("fit", "project"),
        ("fit", "fit-linear"),
        ("fit", "fit-kernel"),
        (None, "fit"),
    ]
    assert (record.calls[0], record.calls[-1]) == ("setup", "teardown")
    without = ensemble(kind, CHEAP).fit(X, y)
    np.testing.assert_array_equal(output(model, X), output(without, X))


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_ensemble_is_loaded_without_pickle(fitted, kind, tmp_path, monkeypatch):
    model, X = fitted(kind)
    model.save(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    loaded = type(model).load(tmp_path)
    np.testing.assert_array_equal(output(loaded, X), output(model, X))
    assert loaded.predict(X).tolist() == model.predict(X).tolist()
    assert loaded.scores_ == model.scores_
    assert repr(loaded.get_params()) == repr(model.get_params())
    assert list(loaded.member_predictions(X)) == list(model.members_)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_ensemble_predicts_the_same(fitted, kind):
    model, X = fitted(kind)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(output(copy, X), output(model, X))


def test_splitters_and_random_states_are_saved(tmp_path):
    X, y = make_table()
    seed = np.random.RandomState(3)  # noqa: NPY002
    model = ensemble(members=["linear"]).set_params(random_state=seed, cv=KFold(3))
    model.fit(X, y).save(tmp_path)
    loaded = EmbeddingClassifier.load(tmp_path)
    assert repr(loaded.cv) == repr(KFold(3))
    assert loaded.random_state.randint(1000) == seed.randint(1000)


def test_keys_that_differ_in_type_are_saved_apart(tmp_path):
    X, y = make_table()
    text, image = np.arange(0, WIDTH), np.arange(WIDTH, X.shape[1])
    model = ensemble(members=["linear"], blocks={1: text[::-1], "1": image})
    model.fit(X, y).save(tmp_path)
    loaded = EmbeddingClassifier.load(tmp_path)
    assert list(loaded.blocks) == [1, "1"]
    np.testing.assert_array_equal(loaded.blocks[1], text[::-1])
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


def arrays_of(value, path, seen):
    """Yield all arrays within an object, by path."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from arrays_of(item, f"{path}/{key}", seen)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from arrays_of(item, f"{path}/{i}", seen)
    elif hasattr(value, "__dict__"):
        yield from arrays_of(vars(value), path, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_ensemble_does_not_contain_the_training_table(fitted, kind):
    model, X = fitted(kind)
    n_rows = len(X)
    of_rows = set()
    for path, array in arrays_of(model, "", set()):
        if n_rows in array.shape:
            of_rows.add(path)
    allowed = (
        "/members_/kernel/model/_landmark",  # its blocks and weights
        "/members_/kernel/model/_means/",  # one kernel value for each landmark
        "/members_/kernel/model/_coef",
        "/members_/svm/rows",  # of which most are support vectors
        "/members_/svm/machines/",
    )
    assert all(path.startswith(allowed) for path in of_rows), of_rows


def test_logits_of_labels_are_linear_in_those_of_the_member(fitted):
    model, X = fitted("labels")
    view = model._features.view(X)
    for name, predicted in model.member_predictions(X).items():
        outputs = model.members_[name].outputs(view)
        logits = model.slopes_[name] * outputs + model.intercepts_[name]
        np.testing.assert_allclose(logit(predicted), logits, rtol=1e-4, atol=1e-4)


def test_seconds_are_those_of_the_fit():
    X, y = make_table()
    started = time.perf_counter()
    model = ensemble(members=CHEAP).fit(X, y)
    assert sum(model.seconds_.values()) <= time.perf_counter() - started


# Rows of weight 0, groups and absent classes in the folds


def make_group_centres(n_groups=40):
    """Return rows around centres of groups, whose classes cannot be learned from others."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(n_groups), 6)
    X = rng.normal(size=(n_groups, 40))[groups] + 0.1 * rng.normal(
        size=(len(groups), 40)
    )
    return X.astype(np.float32), rng.integers(0, 2, n_groups)[groups], groups


@pytest.mark.parametrize("member", MEMBERS)
def test_no_member_knows_the_groups_of_held_out_rows(member):
    X, y, groups = make_group_centres()
    model = ensemble(members=[member], blocks={"v": slice(None)})
    assert model.fit(X, y, groups=groups).scores_[member] < -0.5
    by_splitter = clone(model).set_params(cv=KFold(5, shuffle=True, random_state=0))
    if member != "kernel":  # it has no folds
        by_splitter.set_params(cv=list(by_splitter.cv.split(X)))
        assert by_splitter.fit(X, y, groups=groups).scores_[member] < -0.5


def test_numbers_are_scored_on_new_groups():
    X, y, groups = make_group_centres()
    number = np.random.default_rng(1).normal(size=40)[groups]
    members = ["linear", "kernel", "projection", "trees"]
    model = ensemble("number", members, blocks={"v": slice(None)})
    scores = model.fit(X, number, groups=groups).scores_
    assert all(score < 0.5 for score in scores.values())


def test_rows_of_weight_0_change_neither_the_members_nor_the_fit(monkeypatch):
    X, y = make_table()
    more = np.vstack([X, np.zeros((90, X.shape[1]), dtype=np.float32)])
    labels = np.r_[y, np.zeros(90, dtype=y.dtype)]
    weight = np.r_[np.ones(60), np.zeros(90)]
    monkeypatch.setattr(estimators, "_SVM_ROWS", 60)
    alone = ensemble(table_blocks=["table"]).fit(X, y)
    together = ensemble(table_blocks=["table"]).fit(more, labels, sample_weight=weight)
    assert list(together.members_) == ["kernel", "svm"]
    assert together.members_["svm"].gamma == alone.members_["svm"].gamma
    P = alone.predict_proba(X)
    np.testing.assert_allclose(together.predict_proba(X), P, atol=0.05)


def test_trees_are_calibrated_on_rows_of_positive_weight():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 1300)
    X = rng.normal(size=(1300, 20)) + y[:, None]
    rows, weight = np.arange(1300), np.ones(1300)
    weight[:700] = 0
    folds = [
        (rows[700:], rows[:700]),
        (np.r_[rows[:700], rows[1000:]], rows[700:1000]),
        (rows[:1000], rows[1000:]),
    ]
    model = ensemble(members=["trees"], blocks={"v": slice(None)}, cv=folds)
    assert model.fit(X, y, sample_weight=weight).slopes_["trees"] > 0


def test_many_classes_are_coupled_in_batches(monkeypatch):
    X, y = make_table()
    model = ensemble(members=["svm"]).fit(X, y)
    P = model.predict_proba(X)
    monkeypatch.setattr(svm, "_BATCH_PAIRS", 63)  # seven rows
    np.testing.assert_allclose(model.predict_proba(X), P, rtol=1e-9)
