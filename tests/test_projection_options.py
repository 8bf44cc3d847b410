"""ContrastiveProjector's options: targets, weights, passthrough, going on, stopping."""

import numpy as np
import pytest
import sklearn
import torch
from conftest import small_projector as small
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from skorch.dataset import ValidSplit


def losses(projector):
    return [epoch["train_loss"] for epoch in projector.history_]


def assert_same_weights(first, second, atol=0.0):
    assert first.weights_.keys() == second.weights_.keys()
    for name, value in first.weights_.items():
        np.testing.assert_allclose(value, second.weights_[name], atol=atol, rtol=0)


# Targets of every kind


def structured(kind, n=400):
    """Make rows whose target hangs on three columns, beside twelve louder columns of noise."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(n, 3))
    y = {
        "multilabel": (signal > 0).astype(int),
        "continuous": signal[:, 0] + 0.1 * rng.normal(size=n),
        "continuous, two outputs": signal[:, :2] + 0.1 * rng.normal(size=(n, 2)),
        "hierarchical": np.column_stack(
            [signal[:, 0] > 0, 2 * (signal[:, 0] > 0) + (signal[:, 1] > 0)]
        ).astype(int)
        + 5,
    }[kind]
    return np.hstack([signal, rng.normal(scale=2, size=(n, 12))]), y


def agreement(Z, y):
    """Tell how the similarity of two rows goes with how close their targets are, by rank."""
    pairs = np.triu_indices(len(Z), 1)
    near = -np.square(Z[pairs[0]] - Z[pairs[1]]).sum(axis=1)
    y = np.asarray(y, dtype=float).reshape(len(Z), -1)
    alike = -np.square(y[pairs[0]] - y[pairs[1]]).sum(axis=1)
    return np.corrcoef(rankdata(near), rankdata(alike))[0, 1]


@pytest.mark.parametrize(
    "kind", ["multilabel", "continuous", "continuous, two outputs", "hierarchical"]
)
def test_rows_alike_in_their_targets_lie_close_in_new_rows(kind):
    X, y = structured(kind)
    projector = small(max_epochs=10, lr=2e-2, hidden_layer_sizes=(32,), dropout=0.2)
    Z = projector.fit_transform(X[:250], y[:250])
    assert Z.shape == (250, 4)
    assert np.isfinite(Z).all()
    assert projector.target_type_ == kind.split(",")[0]
    new = agreement(projector.transform(X[250:]), y[250:])
    assert new > agreement(X[250:], y[250:]) + 0.1
    assert agreement(Z, y[:250]) > agreement(X[:250], y[:250]) + 0.1


def test_classes_are_those_of_each_kind(clusters):
    X, y = clusters
    levels = np.column_stack([y > 0, y])
    np.testing.assert_array_equal(small().fit(X, y + 5).classes_, [5, 6, 7])
    assert small().fit(X, y + 0.5 * X[:, 0]).classes_ is None
    top, below = small(target_type="hierarchical").fit(X, levels).classes_
    np.testing.assert_array_equal(top, [0, 1])
    np.testing.assert_array_equal(below, [0, 1, 2])
    np.testing.assert_array_equal(
        small().fit(X, np.eye(3, dtype=int)[y]).classes_, [0, 1, 2]
    )


def test_one_label_each_and_one_level_are_classes(clusters):
    """The same pairs, so the same network, however the target is written."""
    X, y = clusters
    classes = small().fit(X, y)
    assert_same_weights(classes, small().fit(X, np.eye(3, dtype=int)[y]), atol=1e-6)
    levels = np.column_stack([y, y])
    assert_same_weights(
        classes, small(target_type="hierarchical").fit(X, levels), atol=1e-6
    )


def test_target_type_overrides_what_the_values_say(clusters):
    X, y = clusters
    assert small().fit(X, y).target_type_ == "multiclass"
    grades = small(target_type="continuous").fit(X, y)
    assert grades.target_type_ == "continuous"
    assert small(target_type="multiclass").fit(X, y + 0.5).target_type_ == "multiclass"
    np.testing.assert_array_equal(
        grades.transform(X),
        small(target_type="continuous").fit(X, y * 3 + 1).transform(X),
    )


# Passthrough


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_passthrough_puts_scaled_principal_components_beside_the_projection(
    clusters, similarity
):
    X, y = clusters
    projector = small(passthrough=True, similarity=similarity)
    Z = projector.fit_transform(X, y)
    scores = PCA(4).fit_transform(X)
    factors = Z[:, 4:] / scores
    np.testing.assert_allclose(np.abs(factors), np.abs(factors).mean(), rtol=1e-2)
    np.testing.assert_allclose(Z[:, 4:], projector.transform(X)[:, 4:])
    without = small(similarity=similarity)
    np.testing.assert_array_equal(Z[:, :4], without.fit_transform(X, y))
    np.testing.assert_array_equal(projector.transform(X)[:, :4], without.transform(X))
    norms = [
        np.sqrt(np.square(part).sum(axis=1).mean())
        for part in np.split(projector.transform(X), [4], axis=1)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    if similarity == "cosine":
        assert norms[0] == pytest.approx(1)


def test_no_more_components_are_carried_along_than_there_are(clusters):
    X, y = clusters
    assert small(passthrough=True, n_components=30).fit_transform(X, y).shape == (
        90,
        50,
    )
    assert small(passthrough=True, n_components=30).fit_transform(
        X[::9], y[::9]
    ).shape == (10, 40)


def far_columns(X):
    return {
        "one far column": X + np.r_[1e5, np.zeros(X.shape[1] - 1)],
        "a constant column": np.hstack([X, np.full((len(X), 1), 1e6)]),
        "all columns far": X + 1000,
    }


@pytest.mark.parametrize(
    "case", ["one far column", "a constant column", "all columns far"]
)
def test_columns_far_from_zero_change_nothing(case):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    X = rng.normal(size=(3, 20))[y] + rng.normal(size=(600, 20))
    far = far_columns(X)[case]
    projector = small(passthrough=True, max_epochs=1).fit(far, y)
    Z = projector.transform(far)

    pca = PCA(4).fit(far)
    expected = pca.transform(far) / np.sqrt(pca.explained_variance_.sum())
    signs = np.sign((Z[:, 4:] * expected).sum(axis=0))
    np.testing.assert_allclose(
        Z[:, 4:] * signs, expected, atol=1e-2
    )  # of float32 at 1e5

    weights = {
        name: value.astype(np.float64) for name, value in projector.weights_.items()
    }
    hidden = (far.astype(np.float32) - weights["mean"]) / weights["scale"]
    hidden = np.maximum(
        hidden @ weights["layers.0.weight"].T + weights["layers.0.bias"], 0
    )
    projected = normalize(
        hidden @ weights["layers.1.weight"].T + weights["layers.1.bias"]
    )
    np.testing.assert_allclose(Z[:, :4], projected, atol=1e-5)


def test_an_input_without_variance_is_carried_along_as_zeros(clusters):
    X, y = np.ones((90, 3)), clusters[1]
    Z = small(passthrough=True).fit_transform(X, y)
    np.testing.assert_array_equal(Z[:, 4:], 0)


# Weights and sampling


@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("loss", ["supcon", "pairwise_bce"])
def test_rows_of_weight_zero_are_not_there(clusters, loss, similarity, passthrough):
    """Means are summed in another order, so to four digits."""
    X, y = clusters
    weight = (np.arange(90) % 4 > 0).astype(float)
    there = weight > 0
    X = np.where(there[:, None], X, 100.0)
    options = {"loss": loss, "similarity": similarity, "passthrough": passthrough}
    whole = small(**options).fit(X, y, sample_weight=weight)
    part = small(**options).fit(X[there], y[there])
    np.testing.assert_allclose(
        whole.transform(X[there]), part.transform(X[there]), atol=1e-4
    )


def test_rows_of_weight_zero_are_not_there_for_the_folds_either(clusters):
    X, y = clusters
    weight = (np.arange(90) % 4 > 0).astype(float)
    there = weight > 0
    folds = list(StratifiedKFold(3).split(X, y))
    position = np.cumsum(there) - 1
    kept = [tuple(position[rows[there[rows]]] for rows in fold) for fold in folds]
    X = np.where(there[:, None], X, 100.0)
    whole = small(cv=folds).fit_transform(X, y, sample_weight=weight)
    part = small(cv=kept).fit_transform(X[there], y[there])
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(whole[there], part, atol=1e-3)


def test_even_weights_are_no_weights(clusters):
    X, y = clusters
    plain = small().fit_transform(X, y)
    for weight in (np.ones(90), np.full(90, 3.0)):
        np.testing.assert_allclose(
            small().fit_transform(X, y, sample_weight=weight), plain, atol=1e-3
        )


def test_weights_change_what_is_learned(clusters):
    X, y = clusters
    weight = np.where(y == 0, 10.0, 1.0)
    assert not np.allclose(
        small().fit(X, y, sample_weight=weight).transform(X),
        small().fit(X, y).transform(X),
        atol=0.05,
    )


def test_weights_that_leave_no_pair_are_refused(clusters):
    X, y = clusters
    for weight in (np.zeros(90), np.eye(90)[3], np.isin(np.arange(90), [0, 40])):
        with pytest.raises(ValueError, match="No two of the 90 observed rows|zero"):
            small().fit(X, y, sample_weight=weight)
    with pytest.raises(ValueError, match="[Nn]egative"):
        small().fit(X, y, sample_weight=np.r_[-1.0, np.ones(89)])


def test_balanced_classes_are_weights_by_hand(clusters):
    X, y = clusters
    rows = np.r_[0:30, 30:40, 60:65]
    X, y = X[rows], y[rows]
    labels = np.array(["ant", "bee", "cow"])[y]
    by_name = {"ant": 45 / (3 * 30), "bee": 45 / (3 * 10), "cow": 45 / (3 * 5)}
    balanced = small(class_weight="balanced").fit(X, labels)
    assert_same_weights(balanced, small(class_weight=by_name).fit(X, labels))
    by_row = np.array([by_name[label] for label in labels])
    assert_same_weights(
        balanced, small().fit(X, labels, sample_weight=by_row), atol=1e-6
    )
    both = small(class_weight="balanced").fit(X, labels, sample_weight=np.full(45, 2.0))
    assert_same_weights(balanced, both, atol=1e-4)
    assert not np.allclose(
        balanced.transform(X), small().fit(X, labels).transform(X), atol=0.01
    )


@pytest.mark.parametrize("levels", [1, 2])
def test_a_class_weight_of_no_class_is_refused(clusters, levels):
    X, y = clusters
    y = np.column_stack([y, y + 5])[:, :levels].squeeze()
    with pytest.raises(
        ValueError, match="class_weight has a weight for 'no such label'"
    ):
        small(class_weight={0: 2.0, "no such label": 50.0}).fit(X, y)
    part = y[y.reshape(90, -1)[:, 0] > 0]
    small(class_weight={0: 2.0}, max_epochs=1).partial_fit(X[: len(part)], part)


def test_whole_numbers_that_look_measured_are_warned_of(clusters):
    X, _ = clusters
    y = np.random.default_rng(0).integers(0, 60, len(X))
    with pytest.warns(UserWarning, match="distinct whole numbers or dates in 90 rows"):
        projector = small(cv=None, max_epochs=1).fit(X, y)
    assert projector.target_type_ == "multiclass"
    for target_type in ("multiclass", "continuous"):  # without a warning
        small(cv=None, max_epochs=1, target_type=target_type).fit(X, y)
    small().partial_fit(X, y)


def test_lists_of_tags_of_equal_length_are_warned_of(clusters):
    X, _ = clusters
    tags = [["red", "round"], ["round", "old"], ["red", "old"]] * 30
    with pytest.warns(
        UserWarning, match="'round' is a label of two columns.*MultiLabelBinarizer"
    ):
        projector = small(cv=None, max_epochs=1).fit(X, tags)
    assert projector.target_type_ == "hierarchical"
    small(cv=None, max_epochs=1, target_type="hierarchical").fit(
        X, tags
    )  # without a warning


def test_balanced_means_the_coarsest_level(clusters):
    X, y = clusters
    levels = np.column_stack([y > 0, 3 * y + (X[:, 0] > 0)])
    by_hand = small(class_weight={0: 90 / 60, 1: 90 / 120}).fit(X, levels)
    assert_same_weights(small(class_weight="balanced").fit(X, levels), by_hand)


def test_balanced_weights_help_the_rare_class():
    rng = np.random.default_rng(0)
    y = (np.arange(800) % 20 == 0).astype(int)
    X = rng.normal(size=(800, 20)) + np.outer(y, np.r_[np.full(6, 1.5), np.zeros(14)])
    recalls = {}
    for class_weight in (None, "balanced"):
        projector = small(class_weight=class_weight, max_epochs=20, lr=5e-3)
        pipe = make_pipeline(projector, LogisticRegression()).fit(X[:400], y[:400])
        recalls[class_weight] = recall_score(y[400:], pipe.predict(X[400:]))
    assert recalls["balanced"] > recalls[None] + 0.1


@pytest.mark.parametrize("kind", ["continuous", "multilabel"])
def test_class_weights_require_classes(clusters, kind):
    X, y = clusters
    y = X[:, 0] if kind == "continuous" else np.eye(3, dtype=int)[y]
    with pytest.raises(ValueError, match=f"requires classes.*{kind}"):
        small(class_weight="balanced").fit(X, y)


# Losses of one's own


def squared(z, affinity):
    return (torch.nn.functional.normalize(z, dim=-1) @ z.T - affinity).square().mean()


def test_a_function_as_loss_is_trained_by(clusters):
    X, y = clusters
    projector = small(loss=squared, max_epochs=20)
    assert np.isfinite(projector.fit_transform(X, y)).all()
    assert losses(projector)[-1] < 0.9 * losses(projector)[0]
    levels = np.column_stack([y > 0, y + 3])
    assert np.isfinite(small(loss=squared).fit_transform(X, levels)).all()


def test_a_module_of_pytorch_metric_learning_trains_the_same_network(clusters):
    X, y = clusters
    theirs = small(loss=SupConLoss(temperature=0.1), cv=3)
    ours = small(cv=3)
    np.testing.assert_allclose(
        theirs.fit_transform(X, y), ours.fit_transform(X, y), atol=1e-3
    )


def test_a_module_that_learns_is_left_as_it_was_given(clusters):
    loss = ProxyAnchorLoss(num_classes=3, embedding_size=4)
    before = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss.proxies = torch.nn.Parameter(before.clone())
    projector = small(loss=loss, max_epochs=40)
    assert np.isfinite(projector.fit_transform(*clusters)).all()
    assert losses(projector)[-1] < 0.8 * losses(projector)[0]
    assert torch.equal(loss.proxies, before)


@pytest.mark.parametrize("loss", [squared, SupConLoss()], ids=["function", "module"])
def test_losses_of_one_s_own_take_no_weights(clusters, loss):
    X, y = clusters
    with pytest.raises(ValueError, match="A custom loss does not support weights"):
        small(loss=loss).fit(X, y, sample_weight=np.ones(90))
    with pytest.raises(ValueError, match="A custom loss does not support weights"):
        small(loss=loss, class_weight="balanced").fit(X, y)
    assert np.isfinite(small(loss=loss).fit_transform(X, y)).all()


def test_a_module_refuses_targets_that_are_no_classes(clusters):
    with pytest.raises(
        ValueError, match="takes class codes, but y was read as continuous"
    ):
        small(loss=SupConLoss()).fit(clusters[0], clusters[0][:, 0])


# Early stopping


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_early_stopping_stops_when_there_is_no_more_to_learn(clusters, kind):
    X, y = clusters
    y = y if kind == "classes" else np.random.default_rng(0).normal(size=90)
    options = {
        "early_stopping": True,
        "max_epochs": 300,
        "n_iter_no_change": 3,
        "lr": 1e-2,
    }
    projector = small(**options, validation_fraction=0.2, cv=3)
    assert np.isfinite(projector.fit_transform(X, y)).all()
    assert projector.n_iter_ == len(projector.history_) < 300
    found = [epoch["valid_loss"] for epoch in projector.history_]
    best = [epoch["valid_loss_best"] for epoch in projector.history_]
    assert int(np.argmin(found)) == len(found) - 4
    assert best[-4:] == [True, False, False, False]


def test_early_stopping_goes_back_to_the_best_epoch(clusters):
    X, y = clusters
    options = {"early_stopping": True, "n_iter_no_change": 3, "lr": 1e-2}
    stopped = small(**options, max_epochs=300).fit(X, y)
    best = stopped.n_iter_ - 3
    assert_same_weights(stopped, small(**options, max_epochs=best).fit(X, y))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_early_stopping_refuses_too_few_rows(clusters, fraction):
    X, y = clusters
    with pytest.raises(
        ValueError, match="splits 9 rows into . training rows and a validation set of ."
    ):
        small(early_stopping=True, validation_fraction=fraction).fit(X[::10], y[::10])


# Going on


def test_partial_fit_goes_on(clusters):
    X, y = clusters
    projector = small()
    first = projector.partial_fit(X, y).transform(X)
    assert projector.n_iter_ == 1
    second = projector.partial_fit(X, y).transform(X)
    assert not np.allclose(first, second)
    for _ in range(18):
        projector.partial_fit(X, y)
    assert [epoch["epoch"] for epoch in projector.history_] == list(range(1, 21))
    assert projector.n_iter_ == 20
    assert np.mean(losses(projector)[-3:]) < 0.9 * losses(projector)[0]


def test_the_first_partial_fit_is_a_fit_of_one_epoch(clusters):
    assert_same_weights(
        small().partial_fit(*clusters), small(max_epochs=1).fit(*clusters)
    )


def test_partial_fit_learns_of_new_classes(clusters):
    X, y = clusters
    labels = np.array(["ant", "bee", "cow"])[y]
    projector = small().partial_fit(X[30:], labels[30:])
    np.testing.assert_array_equal(projector.classes_, ["bee", "cow"])
    projector.partial_fit(X[:60], labels[:60])
    np.testing.assert_array_equal(projector.classes_, ["ant", "bee", "cow"])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_partial_fit_keeps_the_scale_and_axes_of_the_first_call(clusters, similarity):
    X, y = clusters
    projector = small(passthrough=True, similarity=similarity).partial_fit(X, y)
    before = {name: value.copy() for name, value in projector.components_.items()}
    mean = projector.weights_["mean"].copy()
    projector.partial_fit(10 * X + 3, y)
    for name, value in before.items():
        np.testing.assert_array_equal(projector.components_[name], value)
    np.testing.assert_array_equal(projector.weights_["mean"], mean)
    assert projector.transform(X).shape == (90, 8)


def test_partial_fit_refuses_other_columns(clusters):
    X, y = clusters
    projector = small().partial_fit(X, y)
    Z = projector.transform(X)
    with pytest.raises(ValueError, match="X has 19 features, but .* is expecting 20"):
        projector.partial_fit(X[:, 1:], y)
    np.testing.assert_array_equal(projector.transform(X), Z)


def test_warm_start_goes_on_where_the_last_fit_ended(clusters):
    X, y = clusters
    projector = small(warm_start=True, max_epochs=10).fit(X, y)
    first = losses(projector)
    projector.fit(X, y)
    assert losses(projector)[:10] == first
    assert [epoch["epoch"] for epoch in projector.history_] == list(range(1, 21))
    assert np.mean(losses(projector)[10:]) < np.mean(first)
    Z = projector.fit_transform(X, y)
    assert projector.n_iter_ == 30
    assert np.isfinite(Z).all()


def test_without_warm_start_two_fits_are_one(clusters):
    X, y = clusters
    projector = small().fit(X, y)
    once = projector.transform(X)
    np.testing.assert_array_equal(projector.fit(X, y).transform(X), once)
    assert projector.n_iter_ == 5


@pytest.mark.parametrize(
    "change", [{"n_components": 3}, {"hidden_layer_sizes": (8,)}, "columns"]
)
def test_warm_start_refuses_another_shape(clusters, change):
    X, y = clusters
    projector = small(warm_start=True).fit(X, y)
    if change == "columns":
        X = X[:, 1:]
    else:
        projector.set_params(**change)
    with pytest.raises(
        ValueError,
        match="has the structure .*training cannot be resumed|X has 19 features",
    ):
        projector.fit(X, y)


def test_a_refused_fit_leaves_the_last_one_as_it_was(clusters):
    X, y = clusters
    projector = small(warm_start=True, passthrough=True).fit(X, y)
    Z = projector.transform(X)
    with pytest.raises(ValueError, match="X has 19 features"):
        projector.fit(X[:, 1:], y)
    np.testing.assert_array_equal(projector.transform(X), Z)
    with pytest.raises(ValueError, match="No two of the 2 observed rows"):
        projector.partial_fit(X[:2], ["a", "b"])
    assert projector.classes_.tolist() == np.unique(y).tolist()
    projector.set_params(hidden_layer_sizes=(8,), passthrough=False)
    with pytest.raises(ValueError, match="training cannot be resumed"):
        projector.fit(X, y)
    np.testing.assert_array_equal(projector.transform(X), Z)


# skorch


class CountEpochs(Callback):
    def initialize(self):
        self.trainings, self.epochs = (
            getattr(self, "trainings", 0),
            getattr(self, "epochs", 0),
        )
        return self

    def on_train_begin(self, net, **_):
        self.trainings += 1

    def on_epoch_end(self, net, **_):
        self.epochs += 1
        net.history.record("doubled", 2 * len(net.history))


def test_callbacks_of_skorch_see_both_trainings(clusters):
    counter = CountEpochs()
    projector = small(skorch_params={"callbacks": [("count", counter)]})
    projector.fit_transform(*clusters)
    assert (counter.trainings, counter.epochs) == (2, 10)
    assert [epoch["doubled"] for epoch in projector.history_] == [2, 4, 6, 8, 10]


def test_early_stopping_of_skorch_stops(clusters):
    stop = EarlyStopping(patience=2, threshold=0.5)
    projector = small(
        max_epochs=100,
        skorch_params={"callbacks": [stop], "train_split": ValidSplit(5)},
    )
    assert np.isfinite(projector.fit_transform(*clusters)).all()
    assert projector.n_iter_ < 100
    assert all(np.isfinite(epoch["valid_loss"]) for epoch in projector.history_)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_disabled_callbacks_leave_the_training_as_it_is(clusters, early_stopping):
    options = {
        "early_stopping": early_stopping,
        "n_iter_no_change": 1,
        "max_epochs": 30,
    }
    plain = small(**options).fit(*clusters)
    disabled = small(**options, skorch_params={"callbacks": "disable"}).fit(*clusters)
    assert_same_weights(plain, disabled)
    assert disabled.n_iter_ == plain.n_iter_
    assert "train_loss" not in disabled.history_[0]


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping(patience=1, threshold=0.5),
        ("stop", EarlyStopping(patience=1, threshold=0.5)),
    ],
    ids=["plain", "named"],
)
def test_callbacks_may_watch_the_loss_of_early_stopping(clusters, callback):
    options = {"early_stopping": True, "max_epochs": 100, "n_iter_no_change": 100}
    projector = small(**options, skorch_params={"callbacks": [callback]})
    assert np.isfinite(projector.fit_transform(*clusters)).all()
    assert projector.n_iter_ < 100


def test_a_schedule_may_watch_the_loss_of_early_stopping(clusters):
    schedule = LRScheduler(
        "ReduceLROnPlateau", monitor="valid_loss", patience=0, threshold=1.0
    )
    options = {"early_stopping": True, "max_epochs": 8, "n_iter_no_change": 100}
    projector = small(**options, skorch_params={"callbacks": [schedule]}).fit(*clusters)
    assert projector.history_[-1]["event_lr"] < projector.history_[0]["event_lr"]


def test_callbacks_see_the_last_epoch_of_early_stopping(clusters):
    counter = CountEpochs()
    options = {
        "early_stopping": True,
        "max_epochs": 100,
        "n_iter_no_change": 1,
        "lr": 1e-2,
    }
    projector = small(**options, skorch_params={"callbacks": [counter]}).fit(*clusters)
    assert projector.n_iter_ < 100
    assert counter.epochs == projector.n_iter_


def test_parameters_of_callbacks_are_set_by_name(clusters):
    params = {
        "callbacks": [EarlyStopping(monitor="train_loss", threshold=1.0)],
        "callbacks__EarlyStopping__patience": 1,
        "callbacks__print_log": None,
    }
    assert small(skorch_params=params).fit(*clusters).n_iter_ < 5


def test_callbacks_without_a_list_or_a_loss_to_watch_say_what_to_do(clusters):
    with pytest.raises(TypeError, match="expects a list of callbacks"):
        small(skorch_params={"callbacks": EarlyStopping()}).fit(*clusters)
    with pytest.raises(KeyError, match="valid_loss") as caught:
        small(skorch_params={"callbacks": [EarlyStopping()]}).fit(*clusters)
    assert "early_stopping=True" in caught.value.__notes__[0]


# Small data


def test_folds_are_as_many_as_the_smallest_class_of_two_has_rows(clusters):
    X, y = clusters
    rows = np.r_[0:30, 30:32, 60]  # 30, 2 and 1 rows
    projector = small(passthrough="auto")
    assert np.isfinite(projector.fit_transform(X[rows], y[rows])).all()
    assert len(projector.gate_scores_["both"]) == 2


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1], [0, 0, 1, 1, 2]], ids=["two of each", "and one alone"]
)
def test_where_no_fold_is_possible_the_projection_is_plain_with_a_warning(
    clusters, labels
):
    X = clusters[0][: len(labels)]
    with pytest.warns(
        UserWarning, match=f"No folds of the {len(labels)} observed rows"
    ):
        Z = small(n_components=2).fit_transform(X, labels)
    plain = small(n_components=2, cv=None)
    np.testing.assert_array_equal(Z, plain.fit_transform(X, labels))
    np.testing.assert_array_equal(Z, plain.transform(X))
    with pytest.warns(UserWarning, match="No folds of the"):
        assert small(passthrough="auto", n_components=2).fit(X, labels).gate_ == "both"


@pytest.mark.parametrize("kind", ["continuous", "multilabel", "hierarchical"])
def test_five_rows_are_enough(clusters, kind):
    X = clusters[0][:5]
    y = {
        "continuous": [0.1, 0.5, 0.3, 0.9, 0.7],
        "multilabel": [[1, 0], [1, 1], [0, 1], [1, 1], [1, 0]],
        "hierarchical": [["a", "x"], ["a", "x"], ["a", "y"], ["b", "z"], ["a", "x"]],
    }[kind]
    Z = small(passthrough=True).fit_transform(X, np.array(y))
    assert Z.shape == (5, 8)
    assert np.isfinite(Z).all()


@pytest.mark.parametrize("loss", ["supcon", "pairwise_bce", squared, SupConLoss()])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_folds_of_very_different_size_train_together(clusters, loss, similarity):
    """The network of the small fold's other side has fewer rows than there are batches."""
    X, y = clusters
    rows = np.arange(90)
    few = rows % 30 < 2
    folds = [(rows[few], rows[~few]), (rows[~few], rows[few])]
    options = {"cv": folds, "batch_size": 4, "loss": loss, "similarity": similarity}
    assert np.isfinite(small(**options).fit_transform(X, y)).all()


# Metadata routing


def test_a_pipeline_routes_groups_and_weights(clusters):
    X, y = clusters
    groups, weight = np.arange(90) // 2 % 9, np.random.default_rng(0).random(90)
    with sklearn.config_context(enable_metadata_routing=True):
        projector = small(cv=GroupKFold(3)).set_fit_request(sample_weight=True)
        head = LogisticRegression().set_fit_request(sample_weight=False)
        pipe = make_pipeline(projector, head).fit(
            X, y, sample_weight=weight, groups=groups
        )
    folds = list(GroupKFold(3).split(X, y, groups))
    by_hand = small(cv=folds)
    Z = by_hand.fit_transform(X, y, sample_weight=weight)
    np.testing.assert_array_equal(pipe[:-1].transform(X), by_hand.transform(X))
    head = LogisticRegression().fit(Z, y)
    np.testing.assert_array_equal(pipe[-1].coef_, head.coef_)


def test_the_gate_s_folds_are_given_groups_by_fit_too(clusters):
    X, y = clusters
    groups = np.arange(90) // 2 % 9
    with sklearn.config_context(enable_metadata_routing=True):
        projector = small(passthrough="auto", cv=GroupKFold(3)).fit(X, y, groups=groups)
    folds = list(GroupKFold(3).split(X, y, groups))
    expected = small(passthrough="auto", cv=folds).fit(X, y)
    for name, scores in expected.gate_scores_.items():
        np.testing.assert_array_equal(projector.gate_scores_[name], scores)


def test_weights_that_are_not_asked_for_are_refused_by_the_pipeline(clusters):
    with (
        sklearn.config_context(enable_metadata_routing=True),
        pytest.raises(
            sklearn.exceptions.UnsetMetadataPassedError, match="sample_weight"
        ),
    ):
        make_pipeline(small(), LogisticRegression()).fit(
            *clusters, sample_weight=np.ones(90)
        )


def test_the_first_thousands_of_rows_may_weigh_nothing():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(1300, 5)), np.arange(1300) % 2
    weight = (np.arange(1300) >= 1200).astype(float)
    projector = small(cv=None, max_epochs=1).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(
        projector.weights_["mean"], X[1200:].mean(axis=0), atol=1e-5
    )
