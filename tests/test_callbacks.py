"""Callbacks of scikit-learn: reports of the estimators, and propagation by the union."""

import copy

import numpy as np
import pytest
from conftest import small_projector as small
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklembed import (
    CrossAttentionAdaptor,
    FusionClassifier,
    PerModalityUnion,
    SharedFusionEncoder,
)

callback = pytest.importorskip("sklearn.callback")  # of scikit-learn >= 1.9


class Record:
    """Write down the tasks of a fit, and what can be done with the estimator after each."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.tasks, self.estimators, self.calls = [], [], []

    def setup(self, estimator, context):
        self.calls.append("setup")

    def teardown(self, estimator, context):
        self.calls.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.calls.append(f"begin {context.task_name}")

    def on_fit_task_end(
        self, estimator, context, *, X=None, y=None, fitted_estimator=None
    ):
        parent = context.parent.task_name if context.parent else None
        self.tasks.append((parent, context.task_name))
        if fitted_estimator is not None:
            says = (
                getattr(fitted_estimator, "transform", None)
                or fitted_estimator.predict_proba
            )
            self.estimators.append((fitted_estimator, says(X)))
        return context.task_name == "epoch" and len(self.tasks) == self.stop_after


def test_callbacks_are_told_of_every_task(clusters):
    record = Record()
    small(max_epochs=3).set_callbacks(record).fit_transform(*clusters)
    network, folds = [("network", "epoch")] * 3, [("folds", "epoch")] * 3
    assert record.tasks == [
        *network,
        ("fit", "network"),
        *folds,
        ("fit", "folds"),
        (None, "fit"),
    ]
    begun = [call.split()[1] for call in record.calls if call.startswith("begin")]
    assert sorted(begun) == sorted(name for _, name in record.tasks)
    assert (record.calls[0], record.calls[-1]) == ("setup", "teardown")


def test_fit_without_folds_has_no_task_for_them(clusters):
    record = Record()
    small(max_epochs=2).set_callbacks(record).fit(*clusters)
    assert record.tasks == [("network", "epoch")] * 2 + [
        ("fit", "network"),
        (None, "fit"),
    ]


@pytest.mark.parametrize("passthrough", [False, True, "auto"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_callbacks_get_an_estimator_as_if_fit_had_stopped_here(
    clusters, similarity, passthrough
):
    X, y = clusters
    record = Record()
    options = {"similarity": similarity, "passthrough": passthrough, "cv": 3}
    projector = small(**options).set_callbacks(record).fit(X, y)
    assert len(record.estimators) == 5
    for number, (estimator, Z) in enumerate(record.estimators, start=1):
        stopped = small(
            **(options | {"passthrough": bool(passthrough)}), max_epochs=number
        )
        np.testing.assert_allclose(Z, stopped.fit(X, y).transform(X), atol=1e-5)
        assert len(estimator.history_) == number
    assert projector.n_iter_ == 5


def test_the_estimator_of_a_callback_knows_how_long_it_was_trained(clusters):
    record = Record()
    small().set_callbacks(record).fit(*clusters)
    assert [estimator.n_iter_ for estimator, _ in record.estimators] == [1, 2, 3, 4, 5]


def test_callbacks_of_a_warm_start_see_all_epochs_so_far(clusters):
    record = Record()
    projector = small(warm_start=True).fit(*clusters)
    projector.set_callbacks(record).fit(*clusters)
    assert [len(estimator.history_) for estimator, _ in record.estimators] == [
        6,
        7,
        8,
        9,
        10,
    ]
    assert [epoch["epoch"] for epoch in projector.history_] == list(range(1, 11))


def test_callbacks_change_nothing_of_the_fit(clusters):
    with_record = small(cv=3).set_callbacks(Record())
    Z = with_record.fit_transform(*clusters)
    np.testing.assert_array_equal(Z, small(cv=3).fit_transform(*clusters))


def test_a_callback_that_asks_to_stop_stops(clusters):
    X, y = clusters
    projector = small(max_epochs=50).set_callbacks(Record(stop_after=3)).fit(X, y)
    assert projector.n_iter_ == 3
    np.testing.assert_array_equal(
        projector.transform(X), small(max_epochs=3).fit(X, y).transform(X)
    )


def test_scores_are_monitored_epoch_by_epoch(clusters):

    def spread(projector, X, y):
        Z = projector.transform(X)
        centres = np.array([Z[y == label].mean(axis=0) for label in np.unique(y)])
        return float(centres.std(axis=0).mean())

    X, y = clusters
    monitor = callback.ScoringMonitor(scoring={"spread": spread})
    small().set_callbacks(monitor).fit_transform(X, y)
    scores = [entry["spread"] for entry in monitor.get_logs().data]
    by_hand = [spread(small(max_epochs=n).fit(X, y), X, y) for n in range(1, 6)]
    assert scores == pytest.approx(by_hand)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_progress_bar_runs(clusters, capsys):
    pytest.importorskip("rich")
    projector = small().set_callbacks(callback.ProgressBar())
    assert np.isfinite(projector.fit_transform(*clusters)).all()
    assert "ContrastiveProjector" in capsys.readouterr().out


def test_a_fit_that_fails_tears_its_callbacks_down(clusters):
    record = Record()
    with pytest.raises(ValueError, match="diverged"):
        small(lr=1e30, max_epochs=20).set_callbacks(record).fit(*clusters)
    assert record.calls[-1] == "teardown"


# The union


class PropagatedRecord(Record):
    """A record that meta-estimators hand on to those within."""

    max_propagation_depth = None


def union(**branches):
    columns = dict(zip(branches, (slice(0, 12), slice(12, 20)), strict=False))
    return PerModalityUnion(
        [(name, step, columns[name]) for name, step in branches.items()]
    )


@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_a_union_opens_a_task_for_each_branch(clusters, method):
    record = Record()
    two = union(left=StandardScaler(), right=PCA(2)).set_callbacks(record)
    getattr(two, method)(*clusters)
    assert record.tasks == [("fit", "fit-left"), ("fit", "fit-right"), (None, "fit")]
    assert [call for call in record.calls if "fit" not in call] == ["setup", "teardown"]


def test_a_union_hands_callbacks_on_to_its_branches(clusters):
    record = PropagatedRecord()
    projector = small(max_epochs=2)
    two = union(left=projector, right=clone(projector)).set_callbacks(record)
    two.fit_transform(*clusters)
    network = [("network", "epoch")] * 2 + [("fit", "network")]
    folds = [("folds", "epoch")] * 2 + [("fit", "folds")]
    # A branch's own fit stands for the union's task: both are one node of the tree of tasks.
    branch = [*network, *folds, ("fit", "fit")]
    assert record.tasks == [*branch, *branch, (None, "fit")]
    assert record.calls.count("setup") == record.calls.count("teardown") == 1
    assert not any(
        fitted.__dict__.get("_skl_callbacks") for _, fitted, _ in two.transformers_
    )


def test_callbacks_reach_a_projector_in_a_pipeline_in_a_union_in_a_pipeline(clusters):
    record = PropagatedRecord()
    two = union(
        left=make_pipeline(small(max_epochs=3)),
        right=make_pipeline(small(max_epochs=3)),
    )
    make_pipeline(two).set_callbacks(record).fit(*clusters)
    assert record.tasks.count(("network", "epoch")) == 6


def test_callbacks_change_nothing_of_a_union(clusters):
    two = union(left=small(), right=small())
    expected = two.fit_transform(*clusters)
    found = clone(two).set_callbacks(PropagatedRecord()).fit_transform(*clusters)
    np.testing.assert_array_equal(found, expected)


def test_a_branch_without_callbacks_is_named_in_a_warning(clusters):
    two = union(left=small(), right=PCA(2)).set_callbacks(PropagatedRecord())
    with pytest.warns(UserWarning, match="PCA does not support callbacks"):
        two.fit(*clusters)


def test_a_branch_that_fails_tears_the_unions_callbacks_down(clusters):
    record = PropagatedRecord()
    two = union(left=small(lr=1e30, max_epochs=20)).set_callbacks(record)
    with pytest.raises(ValueError, match="diverged"):
        two.fit(*clusters)
    assert record.calls[-1] == "teardown"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("n_jobs", [None, 2])
def test_a_progress_bar_shows_the_projectors_of_a_union(clusters, capsys, n_jobs):
    pytest.importorskip("rich")
    two = union(left=small(), right=small()).set_params(n_jobs=n_jobs)
    two.set_callbacks(callback.ProgressBar()).fit(*clusters)
    shown = capsys.readouterr().out
    assert "PerModalityUnion" in shown
    assert "ContrastiveProjector" in shown


def test_a_search_over_a_union_runs_with_callbacks(clusters):
    record = PropagatedRecord()
    two = union(left=small(max_epochs=1), right=small(max_epochs=1))
    grid = {"permodalityunion__left__n_components": [2, 3]}
    steps = make_pipeline(two, PCA(1))
    search = GridSearchCV(steps, grid, cv=2, scoring=lambda *_: 0.0)
    with pytest.warns(UserWarning, match="PCA does not support callbacks"):
        search.set_callbacks(record).fit(*clusters)
    assert record.tasks.count(("network", "epoch")) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize("join", ["early", "late"])
def test_heads_tell_of_every_epoch_and_stop_when_asked(clusters, join):
    X, y = clusters
    blocks = {"odd": slice(1, None, 2), "even": slice(0, None, 2)}
    options = {"hidden_layer_sizes": (8,), "max_epochs": 5, "random_state": 0}
    head = FusionClassifier(join, blocks=blocks, **options)
    record = Record(stop_after=3)
    stopped = clone(head).set_callbacks(record).fit(X, y)
    assert record.tasks == [("fit", "epoch")] * 3 + [(None, "fit")]
    assert stopped.n_iter_ == 3
    for epochs, (estimator, said) in enumerate(record.estimators, start=1):
        shorter = clone(head).set_params(max_epochs=epochs).fit(X, y)
        assert estimator.n_iter_ == epochs
        np.testing.assert_array_equal(said, shorter.predict_proba(X))


@pytest.mark.parametrize("Encoder", [SharedFusionEncoder, CrossAttentionAdaptor])
@pytest.mark.parametrize("warm_start", [False, True], ids=["new", "resumed"])
def test_cross_modal_encoders_report_every_epoch(clusters, Encoder, warm_start):
    X, _ = clusters
    blocks = {"odd": slice(1, None, 2), "even": slice(0, None, 2)}
    sizes = {"n_components": 8, "n_heads": 2, "dim_feedforward": 16}
    encoder = Encoder(**sizes, blocks=blocks, max_epochs=5, random_state=0)
    n_past = 0
    if warm_start:
        n_past = 2
        encoder.set_params(warm_start=True, max_epochs=2).fit(X)
        encoder.set_params(max_epochs=5)
    shorter = copy.deepcopy(encoder)
    record = Record(stop_after=3)
    encoder.set_callbacks(record).fit(X)
    assert record.tasks == [("fit", "epoch")] * 3 + [(None, "fit")]
    assert encoder.n_iter_ == n_past + 3
    for epochs, (reported, Z) in enumerate(record.estimators, start=1):
        expected = copy.deepcopy(shorter).set_params(max_epochs=epochs).fit(X)
        np.testing.assert_array_equal(Z, expected.transform(X))
        assert reported.temperature_ == expected.temperature_
        assert reported.n_iter_ == n_past + epochs
        for name in ("positive_similarity", "negative_similarity"):
            similarities = [epoch[name] for epoch in expected.history_]
            assert [epoch[name] for epoch in reported.history_] == similarities
            recorded = [epoch[name] for epoch in encoder.history_]
            assert recorded[: n_past + epochs] == similarities


class Diverge:
    """Read the estimator after each epoch, and let training fail after the second."""

    def setup(self, estimator, context):
        self.n_epochs = 0

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(
        self, estimator, context, *, X=None, y=None, fitted_estimator=None
    ):
        assert fitted_estimator.n_iter_
        self.n_epochs += 1
        if self.n_epochs == 2:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("warm_start", [False, True], ids=["new", "resumed"])
def test_a_fit_that_fails_under_callbacks_leaves_no_weights_of_its_own(
    clusters, warm_start
):
    X, y = clusters
    projector = small(warm_start=warm_start).fit(X, y)
    Z, n_iter = projector.transform(X), projector.n_iter_
    with pytest.raises(RuntimeError, match="stopped"):
        projector.set_callbacks(Diverge()).fit(X, y)
    if warm_start:
        assert projector.n_iter_ == n_iter
        np.testing.assert_array_equal(projector.transform(X), Z)
    else:
        with pytest.raises(NotFittedError):
            projector.transform(X)
