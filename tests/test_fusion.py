"""Fusion: the paper's heads, rows that lack modalities, and decisions averaged."""

import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
import torch.nn.functional as F
from conftest import CALIBRATION
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import (
    balanced_accuracy_score,
    f1_score,
    log_loss,
    r2_score,
    roc_auc_score,
)
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from sklembed import DecisionFusionClassifier, FusionClassifier, FusionRegressor
from sklembed._targets import encode_target
from sklembed._torch import to_tensor
from sklembed.fusion import decision as fusion_module
from sklembed.fusion.pooling import _LogLinearPool
from sklembed.nn.fusion import FusionHead
from sklembed.nn.layers import BatchNorm
from sklembed.nn.losses import binary_cross_entropy, cross_entropy, squared_error

BLOCKS = {"text": slice(0, 6), "image": slice(6, 14)}
each_join = pytest.mark.parametrize("join", ["early", "late"])


def world(n_rows=300, n_classes=3, seed=0, noise=1.2):
    """Make two modalities that both tell the class, neither of them alone for certain."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_rows) % n_classes
    centres = np.random.default_rng(7).normal(size=(n_classes, 14))
    return (centres[y] + noise * rng.normal(size=(n_rows, 14))).astype(np.float32), y


SMALL = {"blocks": BLOCKS, "max_epochs": 15, "lr": 5e-3, "random_state": 0}


def small(join, **options):
    return FusionClassifier(join, **SMALL | options)


def without(X, name, rows=slice(None)):
    X = X.copy()
    X[rows, BLOCKS[name]] = np.nan
    return X


# The heads of arXiv 2406.02601


@pytest.mark.parametrize(
    ("join", "widths", "n_parameters"),
    [
        ("early", (512, 512), 131_585),
        ("late", (512, 512), 66_049),
        ("early", (4096, 768), 623_105),
        ("late", (4096, 768), 311_809),
    ],
)
def test_heads_have_as_many_parameters_as_the_paper_s(join, widths, n_parameters):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(8, sum(widths))), np.arange(8) % 2
    blocks = {"text": slice(0, widths[0]), "image": slice(widths[0], sum(widths))}
    units = (128,) if join == "early" else (64,)
    head = FusionClassifier(
        join, hidden_layer_sizes=units, blocks=blocks, max_epochs=1
    ).fit(X, y)
    moments = ("mean", "scale", "running_mean", "running_var", "n_batches")
    counted = sum(v.size for k, v in head.weights_.items() if not k.endswith(moments))
    assert counted == n_parameters


def plain_head(kind, n_outputs=3):
    """Build the paper's head of torch's own layers."""

    def block(n_in):
        return nn.Sequential(
            nn.Linear(n_in, 5), nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm1d(5)
        )

    if kind == "early":
        return nn.Sequential(block(14), nn.Linear(5, n_outputs))
    return nn.ModuleList([block(6), block(8), nn.Linear(10, n_outputs)])


def run_plain(kind, head, X):
    if kind == "early":
        return head(X)
    return head[2](torch.cat([head[0](X[:, :6]), head[1](X[:, 6:])], dim=1))


@pytest.mark.parametrize("kind", ["early", "late"])
def test_training_steps_are_those_of_torch_s_own_layers(kind):
    generator = torch.Generator().manual_seed(0)
    ours = FusionHead(
        [6, 8],
        [5],
        3,
        join=kind,
        dropout=0.0,
        modality_dropout=0.0,
        generator=generator,
        mean=torch.zeros(14),
        scale=torch.ones(14),
    )
    plain = plain_head(kind)
    order = list(plain.parameters())
    assert len(order) == len(list(ours.parameters()))
    with torch.no_grad():
        for source, target in zip(_sorted_like(ours, kind), order, strict=True):
            target.copy_(source)
    X, y = (torch.from_numpy(a) for a in world(32))
    for head in (ours, plain):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(3):
            logits = head(X) if head is ours else run_plain(kind, head, X)
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    for source, target in zip(_sorted_like(ours, kind), order, strict=True):
        torch.testing.assert_close(source, target, atol=1e-5, rtol=1e-4)


def _sorted_like(ours, kind):
    """List our parameters in the order in which torch's own layers stand."""
    blocks = [chain[0] for chain in ours.chains]
    layers = [layer for block in blocks for layer in (block.linear, block.norm)]
    return [p for layer in (*layers, ours.output) for p in (layer.weight, layer.bias)]


def test_running_moments_are_averages_at_first():
    batches = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0))
    ours, plain = BatchNorm(5, torch.device("cpu")), nn.BatchNorm1d(5)
    for batch in batches:
        torch.testing.assert_close(ours(batch), plain(batch))
    torch.testing.assert_close(ours.running_mean, batches.mean(dim=(0, 1)))
    torch.testing.assert_close(ours.running_var, batches.var(dim=1).mean(dim=0))
    before = ours.running_mean.clone()
    assert (
        ours(batches[0, :1]).isfinite().all()
    )  # a batch in which one row has the modality
    assert ours(batches[0, :0]).shape == (0, 5)  # or none
    torch.testing.assert_close(ours.running_mean, before)


def test_rows_that_lack_a_modality_do_not_touch_its_moments():
    X, _ = world(40)
    heads = [
        FusionHead(
            [6, 8],
            [5],
            3,
            join="late",
            dropout=0.0,
            modality_dropout=0.0,
            generator=torch.Generator().manual_seed(0),
            mean=torch.zeros(14),
            scale=torch.ones(14),
        )
        for _ in range(2)
    ]
    heads[0](torch.from_numpy(without(X, "image", slice(10, 40))))
    heads[1](torch.from_numpy(X[:10]))
    for ours, expected in zip(
        heads[0].chains[1].buffers(), heads[1].chains[1].buffers(), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@each_join
def test_numpy_says_what_the_module_says(join):
    X, y = world()
    X = without(X, "image", slice(0, 20))
    head = small(join, hidden_layer_sizes=(7, 5), max_epochs=3).fit(X, y)
    module = FusionHead(
        [6, 8],
        [7, 5],
        3,
        join=head.join,
        dropout=0.2,
        modality_dropout=0.3,
        generator=torch.Generator(),
        mean=to_tensor(head.weights_["mean"], "cpu"),
        scale=to_tensor(head.weights_["scale"], "cpu"),
    )
    module.load_state_dict({k: to_tensor(v, "cpu") for k, v in head.weights_.items()})
    logits = module.eval()(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(head.decision_function(X), logits, atol=1e-5)


def test_hidden_modalities_are_as_many_as_asked_and_never_all_of_a_row():
    generator = torch.Generator().manual_seed(0)
    head = FusionHead(
        [1, 1, 1],
        [2],
        2,
        join="late",
        dropout=0.0,
        modality_dropout=0.4,
        generator=generator,
        mean=torch.zeros(3),
        scale=torch.ones(3),
    )
    there = torch.ones(20_000, 3, dtype=torch.bool)
    there[::2, 0] = False
    shown = head._drop_modalities(there)
    assert shown.any(dim=-1).all()
    assert not shown[::2, 0].any()
    three, two = shown[1::2].float().mean(), shown[::2, 1:].float().mean()
    assert three == pytest.approx(1 - (0.4 - 0.4**3 / 3), abs=0.01)
    assert two == pytest.approx(1 - (0.4 - 0.4**2 / 2), abs=0.01)
    assert head.eval()._drop_modalities(there).equal(there)


# Targets, weights, stopping


@each_join
def test_both_modalities_tell_more_than_either(join):
    X, y = world(600, noise=1.8)
    head = small(join).fit(X[::2], y[::2])
    both = head.score(X[1::2], y[1::2])
    for name in BLOCKS:
        assert both > head.score(without(X, name)[1::2], y[1::2])


@each_join
def test_one_fit_serves_rows_that_lack_a_modality(join):
    X, y = world(600, noise=1.0)
    head = small(join, max_epochs=30).fit(X[::2], y[::2])
    for name, other in (("text", "image"), ("image", "text")):
        alone = small(join, blocks={"it": slice(None)}, max_epochs=30)
        alone.fit(X[::2, BLOCKS[other]], y[::2])
        of_its_own = alone.score(X[1::2, BLOCKS[other]], y[1::2])
        assert head.score(without(X, name)[1::2], y[1::2]) > of_its_own - 0.06


@each_join
def test_two_classes_have_one_logit(join):
    X, y = world(n_classes=2)
    head = small(join).fit(X, np.array(["no", "yes"])[y])
    logits, probabilities = head.decision_function(X), head.predict_proba(X)
    assert logits.shape == (300,)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-logits)))
    np.testing.assert_array_equal(head.predict(X) == "yes", logits > 0)
    assert (head.predict(X) == head.classes_[y]).mean() > 0.9


@each_join
def test_several_labels_are_each_a_choice_of_two(join):
    X, y = world(n_classes=4)
    labels = np.stack([y % 2, y // 2, y == 0], axis=1).astype(int)
    head = small(join, max_epochs=30).fit(X, labels)
    assert head.predict_proba(X).shape == (300, 3)
    assert f1_score(labels, head.predict(X), average="micro") > 0.85
    rare = labels.copy()
    rare[60:, 2] = 0
    plain, balanced = (
        small(join, class_weight=w).fit(X, rare).predict(X)[:, 2].mean()
        for w in (None, "balanced")
    )
    assert balanced > plain
    heavy = small(join, class_weight={2: 20.0}).fit(X, rare).predict(X)[:, 2].mean()
    assert heavy > plain


@each_join
def test_balanced_weights_count_for_two_classes_too(join):
    X, y = world(800, n_classes=2, noise=2.5)
    rows = np.r_[np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:40]]
    plain, balanced = (
        small(join, class_weight=weight).fit(X[rows], y[rows])
        for weight in (None, "balanced")
    )
    test_X, test_y = world(800, n_classes=2, seed=1, noise=2.5)
    scores = [
        balanced_accuracy_score(test_y, head.predict(test_X))
        for head in (plain, balanced)
    ]
    assert scores[1] > scores[0] + 0.03


@each_join
def test_a_row_of_weight_0_is_as_good_as_absent(join):
    X, y = world()
    weight = np.ones(300)
    weight[200:] = 0
    options = {"class_weight": "balanced", "max_epochs": 2}
    weighted = small(join, **options).fit(X, y, sample_weight=weight)
    X = X.copy()
    X[200:] = 100
    np.testing.assert_array_equal(
        small(join, **options).fit(X, y, sample_weight=weight).predict_proba(X[:200]),
        weighted.predict_proba(X[:200]),
    )


def test_losses_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 3)))
    weight = torch.from_numpy(rng.random(5))
    codes = torch.from_numpy(rng.integers(3, size=5))
    labels = torch.from_numpy(rng.integers(2, size=(5, 3)).astype(float))
    pos_weight = torch.tensor([1.0, 2.0, 0.5]).double()
    nll = torch.stack([-logits[i].log_softmax(0)[codes[i]] for i in range(5)])
    weighted = (nll * weight).sum() / weight.sum()
    torch.testing.assert_close(cross_entropy(logits, codes, weight), weighted)
    torch.testing.assert_close(cross_entropy(logits, codes), nll.mean())
    p = logits.sigmoid()
    bce = -(pos_weight * labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(
        binary_cross_entropy(logits, labels, weight, pos_weight=pos_weight),
        (bce * weight).sum() / weight.sum(),
    )
    errors = torch.stack([(logits[i] - labels[i]).pow(2).sum() / 3 for i in range(5)])
    torch.testing.assert_close(
        squared_error(logits, labels, weight), (errors * weight).sum() / weight.sum()
    )


def test_early_stopping_goes_back_to_the_best_epoch_moments_included():
    X, y = world(noise=3.0)
    options = {
        "early_stopping": True,
        "n_iter_no_change": 3,
        "validation_fraction": 0.3,
    }
    head = small("late", max_epochs=200, lr=0.02, **options).fit(X, y)
    losses = [epoch["valid_loss"] for epoch in head.history_]
    best = int(np.argmin(losses)) + 1
    assert head.n_iter_ == best + 3 < 200
    again = small("late", max_epochs=best, lr=0.02, **options).fit(X, y)
    for name, value in head.weights_.items():
        np.testing.assert_array_equal(value, again.weights_[name], err_msg=name)


def test_a_warm_start_goes_on():
    X, y = world()
    head = small("early", max_epochs=2, warm_start=True).fit(X, y)
    first = head.history_[-1]["train_loss"]
    head.fit(X, y)
    assert head.n_iter_ == 4
    assert [epoch["epoch"] for epoch in head.history_] == [1, 2, 3, 4]
    assert head.history_[-1]["train_loss"] < first
    with pytest.raises(ValueError, match=r"must have the classes \[0, 1, 2\].*Clone"):
        head.fit(X, y + 1)
    with pytest.raises(ValueError, match="has the structure .* Clone the estimator"):
        head.set_params(hidden_layer_sizes=(3,)).fit(X, y)


def test_probabilities_can_be_calibrated_with_modalities_missing():
    X, y = world(600, noise=2.0)
    X = without(X, "text", np.random.default_rng(0).random(600) < 0.3)
    head = small("late", max_epochs=60)
    calibrated = CalibratedClassifierCV(head, method=CALIBRATION, cv=3).fit(
        X[::2], y[::2]
    )
    plain = log_loss(y[1::2], head.fit(X[::2], y[::2]).predict_proba(X[1::2]))
    assert log_loss(y[1::2], calibrated.predict_proba(X[1::2])) < plain - 0.02


def test_heads_can_be_searched_in_processes():
    X, y = world()
    grid = {"dropout": [0.0, 0.5], "modality_dropout": [0.0, 0.5]}
    search = GridSearchCV(small("early", max_epochs=2), grid, cv=2, n_jobs=2).fit(X, y)
    assert set(search.best_params_) == set(grid)


# Rows that lack modalities


@each_join
def test_rows_without_any_modality_train_nothing_and_get_the_prior(join):
    X, y = world()
    bare = np.vstack([X, np.full((60, 14), np.nan, np.float32)])
    labels = np.r_[y, np.zeros(60, int)]
    head = small(join, max_epochs=2).fit(bare, labels)
    fewer = small(join, max_epochs=2).fit(X, y)
    for name, value in head.weights_.items():
        np.testing.assert_array_equal(value, fewer.weights_[name])
    np.testing.assert_allclose(head.predict_proba(bare)[-1], np.bincount(labels) / 360)
    two = small(join, max_epochs=2).fit(bare, labels > 0)
    np.testing.assert_allclose(two.predict_proba(bare)[-1, 1], np.mean(labels > 0))


@each_join
def test_predictions_do_not_depend_on_the_batch(join):
    X, y = world()
    X = without(without(X, "text", slice(0, 90)), "image", slice(80, 120))
    head = small(join, max_epochs=2).fit(X, y)
    alone = np.vstack([head.predict_proba(row[None]) for row in X])
    np.testing.assert_allclose(head.predict_proba(X), alone, rtol=1e-10)


@each_join
def test_scattered_columns_make_the_same_head(join):
    X, y = world()
    order = np.random.default_rng(0).permutation(14)
    place = np.argsort(order)
    scattered = {name: place[columns] for name, columns in BLOCKS.items()}
    head = small(join, max_epochs=2).fit(X, y)
    other = small(join, max_epochs=2, blocks=scattered).fit(X[:, order], y)
    np.testing.assert_array_equal(
        head.predict_proba(X), other.predict_proba(X[:, order])
    )


@each_join
def test_what_a_head_cannot_learn_from_is_refused(join):
    X, y = world()
    with pytest.raises(ValueError, match="y has 1 class only"):
        small(join).fit(X, np.zeros(300))
    with pytest.raises(ValueError, match="Unknown label type"):
        small(join).fit(X, np.linspace(0, 1, 300))
    with pytest.raises(
        ValueError, match="NaN or None in 1 of 300 rows, first in row 2"
    ):
        small(join).fit(X, [None if i == 2 else "a" for i in range(300)])
    with pytest.raises(
        ValueError, match=r"\['text', 'image'\] are NaN in all rows of positive"
    ):
        small(join).fit(X * np.nan, y)
    with pytest.raises(ValueError, match="X has no names"):
        small(join, blocks=None).fit(X, y)
    with pytest.raises(
        ValueError, match="hidden_layer_sizes must contain positive integers"
    ):
        small(join, hidden_layer_sizes=(0,)).fit(X, y)
    with pytest.raises(ValueError, match="validation_fraction=0.9 splits 3 rows"):
        small(join, early_stopping=True, validation_fraction=0.9).fit(X[:3], y[:3])
    X[5, 2] = np.nan
    with pytest.raises(
        ValueError, match="NaN in 1 of 6 columns of row 5 of block 'text'"
    ):
        small(join).fit(X, y)


@each_join
def test_a_modality_that_no_row_has_is_ignored_in_prediction_too(join):
    X, y = world()
    head = small(join, max_epochs=2, warm_start=True)
    with pytest.warns(
        UserWarning, match="Block 'image' is NaN in all rows of positive weight"
    ) as caught:
        head.fit(without(X, "image"), y)
    assert len(caught) == 1
    assert head.ignored_blocks_ == ["image"]
    np.testing.assert_array_equal(
        head.predict_proba(X), head.predict_proba(without(X, "image"))
    )
    np.testing.assert_allclose(head.predict_proba(without(X, "text"))[0], head.prior_)
    head.fit(X * 10 + 5, y)  # training goes on with rows that have it
    assert head.ignored_blocks_ == []
    np.testing.assert_allclose(
        head.weights_["mean"][6:], (X * 10 + 5)[:, 6:].mean(axis=0), rtol=1e-4
    )
    assert not np.array_equal(
        head.predict_proba(X), head.predict_proba(without(X, "image"))
    )


@each_join
def test_class_weights_of_unknown_labels_are_refused_by_name(join):
    X, y = world(n_classes=4)
    labels = pd.DataFrame({"cat": y % 2, "dog": y // 2})
    by_name, by_number, plain = (
        small(join, max_epochs=2, class_weight=weight).fit(X, labels).predict_proba(X)
        for weight in ({"dog": 20.0}, {1: 20.0}, None)
    )
    np.testing.assert_array_equal(by_name, by_number)
    assert not np.array_equal(by_name, plain)
    with pytest.raises(
        ValueError, match=r"for the labels \['cow'\].*\['cat', 'dog', 0, 1\]"
    ):
        small(join, class_weight={"cow": 2.0, "cat": 2.0}).fit(X, labels)
    with pytest.raises(ValueError, match=r"for the labels \['cat', 2\].*are \[0, 1\]"):
        small(join, class_weight={"cat": 2.0, 2: 1.0}).fit(X, labels.to_numpy())
    with pytest.raises(ValueError, match=r"for the labels \[0\].*are \[7, 8\]"):
        small(join, class_weight={0: 2.0}).fit(X, labels.set_axis([7, 8], axis=1))


@pytest.mark.parametrize("join", ["early", "late", "decisions"])
def test_class_weights_of_unknown_classes_are_refused_or_warned_of(join):
    def classifier(weights):
        if join == "decisions":
            return decisions(LogisticRegression(class_weight=weights))
        return small(join, max_epochs=1, class_weight=weights)

    X, y = world()
    with pytest.raises(
        ValueError, match="'no such class', which is none of the 3 classes"
    ):
        classifier({0: 2.0, "no such class": 9.0}).fit(X, y)
    with pytest.warns(
        UserWarning, match="weight for 3.*no effect"
    ):  # a fold may lack a class
        classifier({0: 2.0, 1: 1.0, 2: 1.0, 3: 9.0}).fit(X, y)
    classifier({0: 2.0, 2: 1.0}).fit(X, y, sample_weight=(y < 2).astype(float))


def test_balanced_weights_of_rare_labels_are_exact():
    X, y = world(4000)
    labels = np.stack([np.arange(4000) == 5, y == 0, np.ones(4000)], axis=1).astype(int)
    head = small("late", class_weight="balanced", max_epochs=1).fit(X, labels)
    weights = head._label_weights(
        encode_target(labels, "multilabel"), np.ones(4000), None
    )
    np.testing.assert_allclose(
        weights, [3999, (4000 - labels[:, 1].sum()) / labels[:, 1].sum(), 1]
    )


@each_join
def test_rows_without_any_modality_get_a_rare_prior_as_it_is(join):
    X, _ = world(4000)
    head = small(join, max_epochs=1).fit(X, np.arange(4000) == 5)
    bare = np.full((1, 14), np.nan)
    np.testing.assert_allclose(head.predict_proba(bare)[0], [1 - 1 / 4000, 1 / 4000])


@pytest.mark.parametrize("Classifier", [FusionClassifier, DecisionFusionClassifier])
def test_cells_that_are_not_numbers_are_refused_by_column_and_row(Classifier):
    frame = pd.DataFrame({"text__0": [1.0, 2.0, 3.0], "image__0": [1.0, 2.0, 3.0]})
    arguments = (
        (LogisticRegression(),) if Classifier is DecisionFusionClassifier else ()
    )
    for cell, message in (
        ("a dog", "Row 1 of column 'image__0' .* is the text 'a dog'.*FrozenEncoder"),
        (np.ones((4, 3)), r"Row 1 .* is an array of shape \(4, 3\).*output='pooled'"),
        (np.ones(3), r"Row 1 .* is an array of shape \(3,\)"),
        (Image.new("RGB", (2, 2)), "Row 1 .* is an image.*FrozenEncoder"),
    ):
        column = frame["image__0"].astype(object)
        column[1] = cell
        with pytest.raises(ValueError, match=message):
            Classifier(*arguments).fit(frame.assign(image__0=column), [0, 1, 0])


# Decisions


def decisions(estimator=None, **options):
    estimator = LogisticRegression() if estimator is None else estimator
    return DecisionFusionClassifier(estimator, **{"blocks": BLOCKS} | options)


@pytest.mark.parametrize("pooling", ["geometric", "arithmetic"])
@pytest.mark.parametrize("missing", ["text", "image"])
def test_with_a_modality_missing_everywhere_the_other_decides_alone(pooling, missing):
    X, y = world()
    fusion = decisions(pooling=pooling).fit(X, y)
    (left,) = set(BLOCKS) - {missing}
    own = LogisticRegression().fit(X[:, BLOCKS[left]], y)
    np.testing.assert_allclose(
        fusion.predict_proba(without(X, missing)),
        own.predict_proba(X[:, BLOCKS[left]]),
        atol=1e-5,
    )


@pytest.mark.parametrize("pooling", ["geometric", "arithmetic"])
def test_all_the_weight_on_one_side_is_that_side_s_classifier(pooling):
    X, y = world()
    fusion = decisions(weights={"text": 3, "image": 0}, pooling=pooling).fit(X, y)
    own = LogisticRegression().fit(X[:, :6], y).predict_proba(X[:, :6])
    np.testing.assert_allclose(fusion.predict_proba(X), own, atol=1e-5)
    # A modality of weight 0 still decides if it is the only one.
    only_image = fusion.predict(without(X, "text"))
    assert (only_image == y).mean() > 0.6


def test_pooling_is_the_mean_it_says():
    X, y = world()
    p = [
        LogisticRegression().fit(X[:, c], y).predict_proba(X[:, c])
        for c in BLOCKS.values()
    ]
    fused = decisions(pooling="arithmetic", weights=None).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(fused, (p[0] + p[1]) / 2, rtol=1e-5)
    product = np.sqrt(p[0] * p[1])
    fused = decisions(weights=None).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(
        fused, product / product.sum(axis=1, keepdims=True), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(C=100, max_iter=1000),
        RandomForestClassifier(30, random_state=0),
        KNeighborsClassifier(10),
    ],
)
def test_a_modality_of_noise_weighs_little(seed, estimator):
    X, y = world(600, seed=seed)
    X[:, BLOCKS["image"]] = np.random.default_rng(seed).normal(size=(600, 8))
    assert decisions(estimator).fit(X, y).weights_["image"] < 0.2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("n_rows", "n_positive", "shift"), [(60, 30, 0.7), (1000, 10, 0.8)]
)
def test_equally_good_modalities_weigh_alike(seed, n_rows, n_positive, shift):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n_rows) < n_positive)
    X = rng.normal(size=(n_rows, 14)) + shift * y[:, None]
    blocks = {"a": slice(0, 7), "b": slice(7, 14)}
    assert decisions(blocks=blocks).fit(X, y).weights_["a"] == pytest.approx(
        0.5, abs=0.1
    )


def test_of_three_modalities_the_one_of_noise_is_left_out():
    X, y = world(600)
    X = np.hstack([X, np.random.default_rng(0).normal(size=(600, 5))])
    blocks = BLOCKS | {"noise": slice(14, 19)}
    weights = (
        decisions(RandomForestClassifier(30, random_state=0), blocks=blocks)
        .fit(X, y)
        .weights_
    )
    assert weights["noise"] < 0.1
    assert min(weights["text"], weights["image"]) > 0.2


def test_weights_are_learned_out_of_fold():
    X, y = world(noise=2.0)
    X[:, BLOCKS["image"]] = np.random.default_rng(0).normal(size=(300, 8))
    memorizer = KNeighborsClassifier(1)  # perfect on its training rows
    fusion = decisions({"text": LogisticRegression(), "image": memorizer}).fit(X, y)
    assert fusion.weights_["image"] <= 0.1


def test_each_block_may_have_a_classifier_of_its_own():
    X, y = world()
    each = {
        "text": LogisticRegression(),
        "image": RandomForestClassifier(10, random_state=0),
    }
    fusion = decisions(each).fit(X, y)
    assert isinstance(fusion.estimators_["image"], RandomForestClassifier)
    assert fusion.score(X, y) > 0.9
    with pytest.raises(
        ValueError, match=r"of \['text'\], but the blocks are \['image', 'text'\]"
    ):
        decisions({"text": LogisticRegression()}).fit(X, y)


def test_a_class_that_a_modality_never_shows_gets_its_share():
    X, y = world()
    X = without(X, "text", y == 2)
    fusion = decisions().fit(X, y)
    shown = fusion.predict_proba(without(X, "image")[y == 0])
    np.testing.assert_allclose(shown[:, 2], 1 / 3, atol=1e-5)
    np.testing.assert_allclose(shown.sum(axis=1), 1)


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(20, random_state=0),  # a list of arrays
        OneVsRestClassifier(LogisticRegression()),  # one array
    ],
)
def test_decisions_on_several_labels(estimator):
    X, y = world(n_classes=4)
    labels = np.stack([y % 2, y // 2, y == 0], axis=1).astype(int)
    fusion = decisions(estimator).fit(X, labels)
    assert fusion.predict_proba(X).shape == (300, 3)
    assert f1_score(labels, fusion.predict(X), average="micro") > 0.8
    bare = fusion.predict_proba(np.full((1, 14), np.nan))
    np.testing.assert_allclose(bare[0], fusion.prior_)


def test_a_label_that_all_rows_carry_is_carried():
    X, y = world(n_classes=4)
    labels = np.stack([y % 2, np.ones_like(y), np.zeros_like(y)], axis=1)
    fusion = decisions(RandomForestClassifier(20, random_state=0)).fit(X, labels)
    np.testing.assert_array_equal(fusion.predict(X)[:, 1:], labels[:, 1:])


def test_sample_weights_reach_the_classifiers():
    X, y = make_classification(300, 14, random_state=0)
    weight = np.where(y == 1, 10.0, 1.0)
    heavy, plain = (decisions().fit(X, y, w).predict(X).mean() for w in (weight, None))
    assert heavy > plain
    with pytest.raises(ValueError, match="takes no sample_weight"):
        decisions(KNeighborsClassifier()).fit(X, y, weight)


def test_small_classes_make_fewer_folds():
    X, y = world(12)
    y = np.r_[y[:10], 7, 8]  # two classes of one row
    fusion = decisions().fit(X, y)
    assert sum(fusion.weights_.values()) == pytest.approx(1)
    alone = decisions().fit(X[:2], [0, 1])
    assert alone.weights_ == {"text": 0.5, "image": 0.5}


def test_groups_reach_the_splitter():
    X, y = world()
    groups = np.repeat(np.arange(30), 10)
    with sklearn.config_context(enable_metadata_routing=True):
        fusion = decisions(cv=GroupKFold(3)).fit(X, y, groups=groups)
    assert sum(fusion.weights_.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="enable_metadata_routing"):
        decisions(cv=GroupKFold(3)).fit(X, y, groups=groups)
    with pytest.raises(
        ValueError, match=r"needs groups.*set_config\(enable_metadata_routing=True"
    ):
        decisions(cv=GroupKFold(3)).fit(X, y)


def test_what_decisions_cannot_be_made_of_is_refused():
    X, y = world()
    with pytest.raises(
        ValueError, match="block 'text'.*has no predict_proba.*CalibratedClass"
    ):
        decisions(LinearSVC()).fit(X, y)
    with pytest.raises(ValueError, match="must give each of the blocks"):
        decisions(weights={"text": 1.0}).fit(X, y)
    with pytest.raises(ValueError, match="must give each of the blocks"):
        decisions(weights={"text": 1.0, "image": -1.0}).fit(X, y)
    with pytest.raises(ValueError, match="must give each of the blocks"):
        decisions(weights={"text": 1.0, "image": np.inf}).fit(X, y)
    with pytest.raises(ValueError, match=r"weight for 'no', .* none of the 3 classes"):
        decisions(LogisticRegression(class_weight={"no": 2.0})).fit(X, y)
    with pytest.raises(
        ValueError, match=r"None of the blocks \['text', 'image'\] is observed"
    ):
        decisions().fit(X * np.nan, y)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    "estimator",
    [GaussianNB(), RandomForestClassifier(5, random_state=0), KNeighborsClassifier(5)],
)
@pytest.mark.parametrize("pooling", ["geometric", "arithmetic"])
def test_decisions_are_finite_and_rank_rows_as_probabilities_do(
    n_classes, estimator, pooling
):
    X, y = world(n_classes=n_classes, noise=0.5)
    X = without(X, "text", slice(0, 30)) * 5
    fusion = decisions(estimator, pooling=pooling).fit(X[:200], y[:200])
    logits, p = fusion.decision_function(X), fusion.predict_proba(X)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    score, share = (logits, p[:, 1]) if n_classes == 2 else (logits[:, 1], p[:, 1])
    order = np.argsort(score)
    assert (np.diff(share[order]) >= -1e-15).all()


def test_evidence_of_rare_classes_is_not_cut_off():
    rng = np.random.default_rng(0)
    y = rng.random(20_000) < 1 / 1000
    X = rng.normal(size=(20_000, 14)) + 0.7 * y[:, None]
    fusion = decisions(weights=None).fit(X, y)
    logs = [
        e.decision_function(X[:, BLOCKS[name]])
        for name, e in fusion.estimators_.items()
    ]
    np.testing.assert_allclose(
        fusion.decision_function(X), np.mean(logs, axis=0), rtol=1e-9
    )
    assert roc_auc_score(y, fusion.decision_function(X)) > 0.95
    assert fusion.predict_proba(X)[:, 1].mean() == pytest.approx(y.mean(), rel=0.5)


def test_evidence_for_one_of_many_classes_is_not_cut_off():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(1200), 2)
    X = rng.normal(size=(1200, 14))[y] + 0.2 * rng.normal(size=(2400, 14))
    new = X + 0.6 * rng.normal(size=X.shape)
    fusion = decisions(GaussianNB(var_smoothing=100), weights=None).fit(X, y)
    alone = fusion.estimators_["image"].score(new[:, 6:], y)
    assert fusion.score(new, y) > alone


def test_a_zero_of_a_forest_does_not_overrule_the_other_modality():
    X, y = world(300, n_classes=2)
    each = {"text": KNeighborsClassifier(3), "image": LogisticRegression(C=100)}
    fusion = decisions(each, weights=None).fit(X, y)
    row = X[:1].copy()
    row[:, BLOCKS["text"]] = X[y == 1][0, :6]  # neighbors that all belong to class 1
    row[:, BLOCKS["image"]] = 5 * (X[y == 0].mean(axis=0) - X[y == 1].mean(axis=0))[6:]
    assert fusion.estimators_["text"].predict_proba(row[:, :6])[0, 0] == 0
    assert fusion.predict(row) == 0


@pytest.mark.parametrize("share", [0.25, 0.1, 0.02])
def test_a_modality_may_come_with_the_last_rows_only(share):
    X, y = world()
    X = without(X, "image", slice(0, int(300 * (1 - share))))
    for cv in (2, 5):
        fusion = decisions(cv=cv).fit(X, y)
        assert sum(fusion.weights_.values()) == pytest.approx(1)
        assert fusion.score(X, y) > 0.55  # as the text alone


def test_folds_spread_classes_and_modalities():
    y = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    observed = np.ones((154, 2), dtype=bool)
    observed[:, 1] = np.arange(154) % 50 < 5
    folds = fusion_module._spread_folds(y, observed, 5)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([test for _, test in folds])), range(154)
    )
    for train, test in folds:
        assert not set(train) & set(test)
        assert np.bincount(y[test], minlength=4)[:2].tolist() == [20, 10]
        assert 2 <= observed[test, 1].sum() <= 5


@pytest.mark.parametrize("weights", ["auto", None])
def test_a_modality_without_two_classes_is_ignored(weights):
    X, y = world()
    for table, reason in (
        (without(X, "image"), "is NaN in all rows of positive weight"),
        (
            without(X, "image", y != 0),
            "observed in 100 rows, all of one class",
        ),
    ):
        with pytest.warns(UserWarning, match=f"Block 'image' .*{reason}.*ignored"):
            fusion = decisions(weights=weights).fit(table, y)
        assert fusion.weights_ == {"text": 1.0, "image": 0.0}
        assert list(fusion.estimators_) == ["text"]
        assert fusion.ignored_blocks_ == ["image"]
        own = fusion.estimators_["text"].predict_proba(X[:, :6])
        np.testing.assert_allclose(fusion.predict_proba(X), own, rtol=1e-5)
        np.testing.assert_allclose(
            fusion.predict_proba(without(X, "text"))[0], fusion.prior_
        )


class Codes(LogisticRegression):
    """Refuse labels other than 0 to k - 1, as XGBoost does."""

    def fit(self, X, y, sample_weight=None):
        assert np.unique(y).tolist() == list(range(len(np.unique(y))))
        return super().fit(X, y, sample_weight)


def test_every_classifier_sees_codes_of_the_classes_it_is_shown():
    X, y = world()
    X = without(X, "image", y == 1)
    names = np.array(["ant", "bee", "cow"])
    expected = decisions().fit(X, y).predict_proba(X)
    for labels in (names[y], y + 1, y):
        fusion = decisions(Codes()).fit(X, labels)
        np.testing.assert_allclose(fusion.predict_proba(X), expected, rtol=1e-5)
    fusion = decisions(Codes()).fit(X, names[y])
    assert fusion.estimator_classes_["image"].tolist() == ["ant", "cow"]
    assert fusion.estimators_["image"].classes_.tolist() == [0, 1]
    weighted = decisions(LogisticRegression(class_weight={"cow": 9.0})).fit(X, names[y])
    coded = decisions(LogisticRegression(class_weight={2: 9.0})).fit(X, y)
    np.testing.assert_array_equal(weighted.predict_proba(X), coded.predict_proba(X))
    assert (weighted.predict(X) == "cow").mean() > (fusion.predict(X) == "cow").mean()


@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), GaussianNB(), make_pipeline(StandardScaler(), Codes())],
)
def test_classifiers_of_a_single_target_are_fitted_once_for_each_label(estimator):
    X, y = world(n_classes=4)
    labels = np.stack([y % 2, y // 2, y == 0, np.ones_like(y)], axis=1).astype(int)
    fusion = decisions(estimator).fit(X, labels)
    assert len(fusion.estimators_["text"]) == 3
    assert fusion.estimator_classes_["text"].tolist() == [0, 1, 2]
    assert f1_score(labels, fusion.predict(X), average="micro") > 0.8
    assert (fusion.predict(X)[:, 3] == 1).all()
    np.testing.assert_array_equal(
        fusion.predict(X) == 1, fusion.decision_function(X) > 0
    )


def test_routed_sample_weights_reach_steps_of_a_pipeline():
    X, y = make_classification(300, 14, random_state=0)
    weight = np.where(y == 1, 10.0, 1.0)
    with pytest.raises(
        ValueError, match=r"(?s)block 'text'.*set_fit_request\(sample_weight=True\)"
    ):
        decisions(make_pipeline(StandardScaler(), LogisticRegression())).fit(
            X, y, weight
        )
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            StandardScaler().set_fit_request(sample_weight=False),
            LogisticRegression().set_fit_request(sample_weight=True),
        )
        for estimator in (pipeline, {"text": pipeline, "image": pipeline}):
            heavy = (
                decisions(estimator).fit(X, y, sample_weight=weight).predict(X).mean()
            )
            assert heavy > decisions(estimator).fit(X, y).predict(X).mean()
            labels = np.stack([y, 1 - y], axis=1)
            several = (
                decisions(estimator).fit(X, labels, sample_weight=weight).predict(X)
            )
            assert several[:, 0].mean() > several[:, 1].mean()


def test_classifiers_of_a_dict_are_searched_and_replaced_by_the_name_of_their_block():
    X, y = world()
    fusion = decisions({"text": LogisticRegression(), "image": GaussianNB()})
    search = GridSearchCV(
        fusion,
        {"text__C": [1e-3, 1.0], "image": [GaussianNB(), LogisticRegression()]},
        cv=2,
    )
    assert set(search.fit(X, y).best_params_) == {"text__C", "image"}
    fusion.fit(X, y).set_params(
        text__C=3.0, image__var_smoothing=0.5, pooling="arithmetic"
    )
    assert fusion.estimator["text"].C == fusion.estimators_["text"].C == 3.0
    assert fusion.estimators_["image"].var_smoothing == 0.5
    first = fusion.estimator
    fusion.set_params(image=LogisticRegression())
    assert isinstance(first["image"], GaussianNB)
    assert isinstance(fusion.get_params()["image"], LogisticRegression)
    single = (
        decisions(LogisticRegression()).fit(X, y).set_params(estimator__n_jobs=None)
    )
    assert single.set_params(estimator__C=7.0).estimators_["image"].C == 7.0
    with pytest.raises(ValueError, match="by the name of the block, such as 'text__C'"):
        fusion.set_params(estimator__C=1.0)
    with pytest.raises(ValueError, match="Invalid parameter 'sound'"):
        fusion.set_params(sound__C=1.0)


def test_a_block_may_be_called_as_a_parameter_is():
    fusion = DecisionFusionClassifier(
        {"cv": LogisticRegression(), "cv__old": GaussianNB()}
    )
    fusion.set_params(cv=3, cv__C=2.0, cv__old__var_smoothing=0.5)
    assert fusion.cv == fusion.get_params()["cv"] == 3
    assert fusion.estimator["cv"].C == fusion.get_params()["cv__C"] == 2.0
    assert fusion.estimator["cv__old"].var_smoothing == 0.5


def test_a_classifier_may_get_probabilities_in_fit_only():
    X, y = world()
    grid = GridSearchCV(SGDClassifier(random_state=0), {"loss": ["log_loss"]}, cv=2)
    assert not hasattr(grid, "predict_proba")
    assert decisions(grid).fit(X, y).score(X, y) > 0.8
    grid = GridSearchCV(SGDClassifier(random_state=0), {"loss": ["hinge"]}, cv=2)
    with pytest.raises(
        ValueError, match="(?s)block 'text'.*has no predict_proba.*CalibratedClass"
    ):
        decisions(grid).fit(X, y)


def test_a_block_may_be_called_splitter():
    X, y = make_classification(300, 14, random_state=0)
    weight = np.where(y == 1, 10.0, 1.0)
    blocks = {"splitter": slice(0, 6), "image": slice(6, 14)}
    renamed = decisions(blocks=blocks).fit(X, y, weight).predict_proba(X)
    expected = decisions().fit(X, y, weight).predict_proba(X)
    np.testing.assert_array_equal(renamed, expected)


def test_weights_are_validated_before_any_training():
    class Never(LogisticRegression):
        def fit(self, X, y):
            raise AssertionError

    X, y = world()
    with pytest.raises(ValueError, match="weights must give each of the blocks"):
        decisions(Never(), weights={"text": 1.0}).fit(X, y)


@pytest.mark.parametrize("n_labels", [None, 3])
def test_the_gradient_of_the_pool_is_that_of_finite_differences(n_labels):
    rng = np.random.default_rng(0)
    shape = (20, 4) if n_labels is None else (20, n_labels, 2)
    log_prior = np.log(rng.dirichlet(np.ones(shape[-1]), size=shape[1:-1]))
    logs = np.log(rng.dirichlet(np.ones(shape[-1]), size=(2, *shape[:-1])))
    codes = rng.integers(shape[-1], size=shape[:-1])
    weight = rng.random(20)
    pool = _LogLinearPool.from_predictions(logs, log_prior, codes, weight)
    scaled, step = np.array([0.7, 1.5]), 1e-6
    _, gradient = pool._loss(scaled, pool.evidence)
    for number in range(2):
        shift = step * np.eye(2)[number]
        above, _ = pool._loss(scaled + shift, pool.evidence)
        below, _ = pool._loss(scaled - shift, pool.evidence)
        assert (above - below) / (2 * step) == pytest.approx(gradient[number], rel=1e-5)


# Numeric targets


def numeric_world(n_rows=400, seed=0):
    """Make two modalities with noise of a latent vector, and a target far from 0 and 1."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n_rows, 3))
    directions = np.random.default_rng(7).normal(size=(3, 14))
    X = latent @ directions + 0.5 * rng.normal(size=(n_rows, 14))
    y = 100 + 30 * np.sin(latent[:, 0]) + 10 * latent[:, 1]
    return X.astype(np.float32), y


def small_regressor(join, **options):
    return FusionRegressor(join, **SMALL | {"max_epochs": 40} | options)


@each_join
def test_the_regressor_is_as_good_as_a_multi_layer_perceptron(join):
    X, y = numeric_world(600)
    perceptron = TransformedTargetRegressor(
        make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(64,), max_iter=300, random_state=0),
        ),
        transformer=StandardScaler(),
    )
    expected = perceptron.fit(X[:400], y[:400]).score(X[400:], y[400:])
    assert expected > 0.7
    options = {"hidden_layer_sizes": (64,), "max_epochs": 20}
    ours = small_regressor(join, dropout=0.0, modality_dropout=0.0, **options)
    ours.fit(X[:400], y[:400])
    assert ours.score(X[400:], y[400:]) > expected - 0.04


@each_join
def test_one_regressor_serves_rows_without_a_modality(join):
    X, y = numeric_world(800)
    test = slice(400, 800)
    regressor = small_regressor(join).fit(X[:400], y[:400])
    without_dropout = small_regressor(join, modality_dropout=0.0).fit(X[:400], y[:400])
    for name in BLOCKS:
        incomplete = without(X, name)[test]
        score = regressor.score(incomplete, y[test])
        assert 0.4 < score < regressor.score(X[test], y[test])
        assert score > without_dropout.score(incomplete, y[test])


@each_join
def test_the_regressor_predicts_the_mean_without_any_modality(join):
    X, y = numeric_world()
    X[:40] = np.nan
    weight = np.random.default_rng(0).random(400)
    regressor = small_regressor(join, max_epochs=2).fit(X, y, sample_weight=weight)
    mean = np.average(y, weights=weight)
    np.testing.assert_allclose(regressor.predict(X)[:40], mean, rtol=1e-6)
    assert len(np.unique(regressor.predict(X)[40:])) > 300


@each_join
def test_the_regressor_predicts_several_outputs_in_their_units(join):
    X, y = numeric_world()
    outputs = np.stack([y, -1000 * y, np.full(len(y), 7.0)], axis=1)
    regressor = small_regressor(join).fit(X, outputs)
    predicted = regressor.predict(X)
    assert predicted.shape == (400, 3)
    assert r2_score(outputs[:, :2], predicted[:, :2]) > 0.7
    np.testing.assert_allclose(predicted[:, 2], 7.0, atol=0.5)
    assert small_regressor(join, max_epochs=1).fit(X, y).predict(X).shape == (400,)
    column = small_regressor(join, max_epochs=1).fit(X, y[:, None])
    assert column.predict(X).shape == (400, 1)


@each_join
def test_the_predictions_of_numpy_are_those_of_the_module(join):
    X, y = numeric_world()
    X = without(X, "image", slice(0, 20))
    regressor = small_regressor(join, max_epochs=2).fit(X, y)
    module = FusionHead(
        **regressor.structure_,
        dropout=0.5,
        modality_dropout=0.3,
        generator=torch.Generator(),
        mean=torch.from_numpy(regressor.weights_["mean"]),
        scale=torch.from_numpy(regressor.weights_["scale"]),
    )
    state = {k: to_tensor(v, "cpu") for k, v in regressor.weights_.items()}
    module.load_state_dict(state)
    outputs = module.eval()(torch.from_numpy(X)).detach().numpy()[:, 0]
    expected = outputs * regressor.target_scale_ + regressor.target_mean_
    np.testing.assert_allclose(regressor.predict(X), expected, rtol=1e-4)


def test_the_regressor_resumes_and_stops_early():
    X, y = numeric_world()
    regressor = small_regressor("early", max_epochs=2, warm_start=True).fit(X, y)
    mean = regressor.target_mean_
    regressor.fit(X, y + 1)
    assert regressor.n_iter_ == 4
    assert regressor.target_mean_ == mean
    with pytest.raises(
        ValueError, match=r"shape of the previous fit, \(\); got \(2,\).*Clone"
    ):
        regressor.fit(X, np.stack([y, y], axis=1))
    options = {"early_stopping": True, "n_iter_no_change": 3, "max_epochs": 300}
    stopped = small_regressor("early", **options, lr=0.02).fit(X, y)
    losses = [epoch["valid_loss"] for epoch in stopped.history_]
    assert stopped.n_iter_ == int(np.argmin(losses)) + 4 < 300


def test_targets_that_are_not_numbers_are_refused():
    X, y = numeric_world()
    with pytest.raises(ValueError, match="contains NaN"):
        small_regressor("early").fit(X, np.where(y > 120, np.nan, y))
    with pytest.raises(ValueError, match="could not convert string"):
        small_regressor("early").fit(X, ["many"] * 400)


@each_join
def test_a_saved_head_predicts_the_same(join, tmp_path):
    X, y = numeric_world()
    regressor = small_regressor(join, max_epochs=2).fit(X, y)
    regressor.save(tmp_path / "regressor")
    loaded = FusionRegressor.load(tmp_path / "regressor")
    np.testing.assert_array_equal(loaded.predict(X), regressor.predict(X))
    assert loaded.blocks == BLOCKS
    X, y = world()
    classifier = small(join, max_epochs=2).fit(X, np.array(["a", "b", "c"])[y])
    classifier.save(tmp_path / "classifier")
    loaded = FusionClassifier.load(tmp_path / "classifier")
    np.testing.assert_array_equal(loaded.predict(X), classifier.predict(X))
    with pytest.raises(ValueError, match="expected a FusionRegressor"):
        FusionRegressor.load(tmp_path / "classifier")


def test_join_can_be_searched():
    X, y = numeric_world(120)
    search = GridSearchCV(
        small_regressor("early", max_epochs=2), {"join": ["early", "late"]}, cv=2
    )
    assert set(search.fit(X, y).cv_results_["param_join"]) == {"early", "late"}


@pytest.mark.parametrize("change", ["labels", "blocks"])
def test_a_fit_that_fails_leaves_an_unfitted_estimator(change):
    X, y = world()
    classifier = small("early", max_epochs=1).fit(X, y)
    if change == "labels":
        y = np.zeros_like(y)
    else:
        classifier.set_params(blocks={"text": slice(0, 6)})
    with pytest.raises(ValueError, match="1 class only|in 0 of the blocks"):
        classifier.fit(X, y)
    with pytest.raises(NotFittedError):
        classifier.predict(X)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_warm_start_refuses_labels_in_place_of_classes(n_classes):
    X, y = world(n_classes=n_classes)
    classifier = small("early", max_epochs=1, warm_start=True).fit(X, y)
    before = classifier.predict(X)
    with pytest.raises(ValueError, match="multilabel"):
        classifier.fit(X, np.eye(n_classes, dtype=int)[y])
    np.testing.assert_array_equal(classifier.predict(X), before)


# On a GPU


@pytest.mark.gpu
@each_join
def test_a_network_of_a_gpu_predicts_as_well_and_without_it(join):
    X, y = world(600)
    X[::7, BLOCKS["image"]] = np.nan
    scores = []
    for device in ("cpu", "cuda"):
        classifier = small(join, device=device).fit(X[:400], y[:400])
        scores.append(classifier.score(X[400:], y[400:]))
    assert scores[1] > scores[0] - 0.05
    assert {type(value) for value in classifier.weights_.values()} == {np.ndarray}
    probabilities = classifier.predict_proba(X[400:])
    assert probabilities.dtype == np.float64
    loaded = pickle.loads(pickle.dumps(classifier)).set_params(device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(X[400:]), probabilities)


@pytest.mark.gpu
def test_weights_of_labels_are_on_the_gpu():
    X, y = world()
    labels = np.eye(3, dtype=int)[y]
    classifier = small("early", class_weight="balanced", device="cuda")
    predicted = classifier.fit(X, labels).predict(X)
    assert (predicted == labels).mean() > 0.8


@pytest.mark.gpu
def test_a_regressor_of_a_gpu_predicts_numbers():
    X, y = world()
    regressor = FusionRegressor(**SMALL, device="cuda").fit(X, y.astype(float))
    assert regressor.score(X, y) > 0.5
