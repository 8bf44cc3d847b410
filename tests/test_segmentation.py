"""PatchSegmenter: learned masks, maps and grids, sizes of masks, training, pipelines."""

import pickle

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
import torch.nn.functional as F
from conftest import same_weights
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from skorch.callbacks import Callback

from sklembed import (
    CrossAttentionAdaptor,
    FrozenEncoder,
    PatchSegmenter,
    PerModalityUnion,
    _trained,
    segmentation,
)
from sklembed._validation import check_masks
from sklembed.metrics import dice_score
from sklembed.nn.segmentation import PatchDecoder, resized

LOOKS = np.array(
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, -2.0]]
)  # patches of each class


def column(images):
    """Return a column of patches of images (n_samples, rows, columns, width)."""
    X = np.empty((len(images), 1), dtype=object)
    for row, image in enumerate(images):
        X[row, 0] = image.reshape(-1, image.shape[-1])
    return X


def magnified(grids, times):
    return grids.repeat(times, axis=1).repeat(times, axis=2)


def scenes(n_rows=60, grid=(4, 4), n_classes=2, seed=0):
    """Return noisy patches of each class, and masks with 2 x 2 pixels per patch."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, n_classes, size=(n_rows, *grid)) * rng.integers(
        0, 2, (n_rows, *grid)
    )
    noise = 0.5 * rng.normal(size=(*shown.shape, 3))
    return column(LOOKS[shown] + noise), magnified(shown, 2)


def two_maps(n_rows=80, seed=0):
    """Return maps of 4 x 4 patches (where an object is) and 2 x 2 patches (its class)."""
    rng = np.random.default_rng(seed)
    where, which = (
        rng.integers(0, 2, (n_rows, 4, 4)),
        rng.integers(1, 3, (n_rows, 2, 2)),
    )
    fine, coarse = (
        LOOKS[m] + 0.3 * rng.normal(size=(*m.shape, 3)) for m in (where, which)
    )
    fine = np.concatenate([fine, rng.normal(size=(*where.shape, 2))], axis=-1)
    X = np.hstack([column(fine), column(coarse)])
    return X, magnified(where * magnified(which, 2), 2)


def small(**options):
    defaults = {"hidden_layer_sizes": (4, 4), "max_epochs": 2, "random_state": 0}
    return PatchSegmenter(**defaults | options)


def learner(**options):
    """Return a segmenter that is trained to convergence."""
    defaults = {
        "hidden_layer_sizes": (8, 8),
        "max_epochs": 40,
        "lr": 0.03,
        "dropout": 0.0,
    }
    return small(**defaults | options)


def objects(masks):
    y = np.empty(len(masks), dtype=object)
    y[:] = list(masks)
    return y


# Learning


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([0, 1], bool),
        ([0, 255], np.uint8),
        ([0, 1, 2], np.int64),
        ([0, 300, 7], np.uint16),
    ],
    ids=str,
)
def test_masks_of_unseen_images_are_predicted_from_their_patches(labels, dtype):
    X, shown = scenes(n_classes=len(labels))
    y = np.array(labels)[shown].astype(dtype)
    segmenter = learner().fit(X[:40], y[:40])
    assert segmenter.classes_.tolist() == sorted(labels)
    found = segmenter.predict(X[40:])
    assert found.dtype == segmenter.classes_.dtype == dtype
    assert found.shape == (20, 8, 8)
    assert segmenter.mask_size_ == (8, 8)
    assert set(np.unique(found)) <= set(labels)
    score = segmenter.score(X[40:], y[40:])
    assert score == dice_score(y[40:], found, adjusted=True)
    everywhere = [dice_score(y[40:], np.full_like(y[40:], label)) for label in labels]
    assert score > 0.75 > max(everywhere) + 0.2


def test_every_form_of_masks_teaches_the_same():
    X, y = scenes()
    expected = small().fit(X, y)
    index = np.arange(60)[::-1]
    forms = {
        "list": list(y),
        "lists": y.tolist(),
        "tuple": tuple(y),
        "objects": objects(y),
        "Series": pd.Series(list(y), index=index),
        "images": [Image.fromarray(mask.astype(np.uint8)) for mask in y],
        "floats": y.astype(np.float64),
        "Fortran order": np.asfortranarray(y),
        "unsigned": y.astype(np.uint64),
    }
    for form, masks in forms.items():
        segmenter = small().fit(X, masks)
        np.testing.assert_array_equal(
            segmenter.predict(X), expected.predict(X), err_msg=form
        )
        same_weights(segmenter, expected, rtol=0)
        assert segmenter.score(X, masks) == expected.score(X, y)


def test_every_form_of_a_table_gives_the_same():
    X, y = two_maps()
    expected = small().fit(X, y).predict_proba(X)
    other = X.copy()
    for place in np.ndindex(X.shape):
        other[place] = np.asfortranarray(X[place], dtype=np.float64)
        other[place].flags.writeable = False
    frame = pd.DataFrame(X, columns=["fine", "coarse"], index=np.arange(80) + 7)
    y.flags.writeable = False
    for table in (other, frame):
        found = small().fit(table, y).predict_proba(table)
        np.testing.assert_array_equal(found, expected)
    segmenter = small().fit(frame, y)
    assert segmenter.feature_names_in_.tolist() == ["fine", "coarse"]
    with pytest.raises(ValueError, match="feature names"):
        segmenter.predict(frame[["coarse", "fine"]])


def test_labels_that_no_mask_shows_may_be_told_of():
    X, y = scenes()
    segmenter = small(classes=[5, 1]).fit(X, y.astype(np.uint8))
    assert segmenter.classes_.tolist() == [0, 1, 5]
    assert segmenter.classes_.dtype == np.uint8
    assert segmenter.predict_proba(X).shape == (60, 8, 8, 3)
    assert np.isfinite(segmenter.score(X, np.where(y, 5, 0)))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_likeliest_class_is_predicted(n_classes):
    X, shown = scenes(n_classes=n_classes)
    labels = np.array([0, 9, 4])
    segmenter = learner(max_epochs=10).fit(X, labels[shown])
    probabilities = segmenter.predict_proba(X)
    assert probabilities.shape == (60, 8, 8, n_classes)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    likeliest = segmenter.classes_[probabilities.argmax(axis=-1)]
    np.testing.assert_array_equal(segmenter.predict(X), likeliest)
    for code, label in enumerate(segmenter.classes_):  # in their order
        shows = labels[shown] == label
        assert (
            probabilities[shows, code].mean() > probabilities[~shows, code].mean() + 0.2
        )


def test_focal_weight_dropout_and_gamma_reach_the_loss():
    X, y = scenes()
    once = {"lr": 1e-12, "max_epochs": 1, "batch_size": 60, "hidden_layer_sizes": ()}
    options = {
        "": {},
        "no focal": {"focal_weight": 0.0},
        "twice": {"focal_weight": 2.0},
    }
    options |= {"entropy": {"gamma": 0.0}, "dropped": {"dropout": 0.5}}
    segmenters = {
        name: small(**{"dropout": 0.0} | once | own).fit(X, y)
        for name, own in options.items()
    }
    losses = {
        name: fitted.history_[0]["train_loss"] for name, fitted in segmenters.items()
    }
    p = segmenters[""].predict_proba(X).astype(np.float64)
    right = np.take_along_axis(p, y[..., None], axis=-1)
    focal = np.mean(-((1 - right) ** 2) * np.log(right))
    dice = 1 - (2 * (p[..., 1] * y).sum() + 1) / (p[..., 1].sum() + y.sum() + 1)
    assert losses[""] == pytest.approx(dice + focal, rel=1e-4)
    assert losses["no focal"] == pytest.approx(dice, rel=1e-4)
    assert losses["twice"] == pytest.approx(dice + 2 * focal, rel=1e-4)
    assert losses["entropy"] == pytest.approx(dice - np.log(right).mean(), rel=1e-4)
    assert losses["dropped"] != pytest.approx(losses[""], rel=1e-3)
    dropped = segmenters["dropped"].predict_proba(X)  # not when predicting
    np.testing.assert_allclose(dropped, p, rtol=1e-5)


# Maps and grids


def test_a_finer_map_says_where_and_a_coarser_one_which():
    X, y = two_maps()
    both = learner().fit(X[:60], y[:60])
    assert both.grids_ == [(2, 2), (4, 4)]
    assert both.order_.tolist() == [1, 0]
    assert both.score(X[60:], y[60:]) > 0.8
    for alone in ([0], [1]):
        segmenter = learner().fit(X[:60, alone], y[:60])
        assert segmenter.score(X[60:][:, alone], y[60:]) < 0.65


@pytest.mark.parametrize("hidden_layer_sizes", [(), (4, 4), (4, 4, 4)])
def test_the_order_of_columns_makes_no_difference(hidden_layer_sizes):
    X, y = two_maps()
    one, other = (small(hidden_layer_sizes=hidden_layer_sizes) for _ in range(2))
    one.fit(X, y)
    other.fit(X[:, ::-1], y)
    assert other.order_.tolist() == [0, 1]
    assert one.grids_ == other.grids_
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X[:, ::-1]))


def test_a_refused_warm_start_keeps_the_order_of_maps():
    X, y = two_maps()
    X[:, 1:] = column([np.pad(cell, ((0, 0), (0, 2))) for cell in X[:, 1]])
    segmenter = learner(warm_start=True, max_epochs=1).fit(X, y)
    before = segmenter.predict(X)
    segmenter.set_params(hidden_layer_sizes=(4, 4, 4))
    with pytest.raises(ValueError, match="training cannot be resumed"):
        segmenter.fit(X[:, ::-1], y)
    np.testing.assert_array_equal(segmenter.predict(X), before)


def test_maps_of_one_grid_join_one_after_another():
    X, y = two_maps()
    first, last = (
        column([cell[:, part].reshape(4, 4, -1) for cell in X[:, 0]])
        for part in (slice(0, 1), slice(1, 5))
    )
    X = np.hstack([first, X[:, 1:], last])
    segmenter = learner(hidden_layer_sizes=(8, 8, 8)).fit(X[:60], y[:60])
    assert segmenter.grids_ == [(2, 2), (4, 4), (4, 4)]
    assert segmenter.order_.tolist() == [1, 0, 2]
    assert segmenter.structure_["widths"] == [3, 1, 4]
    assert segmenter.score(X[60:], y[60:]) > 0.8


def test_grids_need_not_be_square():
    X, y = scenes(grid=(2, 6))
    segmenter = learner(grid_shape=(1, 3)).fit(
        X[:40], y[:40]
    )  # the proportions will do
    assert segmenter.grids_ == [(2, 6)]
    assert segmenter.predict(X).shape == (60, 4, 12)
    assert segmenter.score(X[40:], y[40:]) > 0.85
    same_weights(learner(grid_shape=[2, 6]).fit(X[:40], y[:40]), segmenter, rtol=0)
    finer, large = scenes(grid=(4, 12))
    both = small(grid_shape=(2, 6)).fit(np.hstack([finer, X]), large)
    assert both.grids_ == [(2, 6), (4, 12)]
    assert both.mask_size_ == (8, 24)


def test_without_hidden_layers_the_decoder_is_a_linear_map():
    X, y = two_maps()
    segmenter = small(hidden_layer_sizes=(), dropout=0.5).fit(X, y)
    standardised = []
    for cells, side in ((X[:, 1], 2), (X[:, 0], 4)):
        patches = np.stack(list(cells))
        patches = (patches - patches.mean(axis=(0, 1))) / patches.std(axis=(0, 1))
        grid = patches.reshape(80, side, side, -1).transpose(0, 3, 1, 2)
        standardised.append(bilinear(grid, (4, 4)))
    weight, bias = (segmenter.weights_[f"output.{name}"] for name in ("weight", "bias"))
    logits = np.einsum(
        "cd,ndhw->nchw", weight[:, :, 0, 0], np.concatenate(standardised, axis=1)
    )
    logits = bilinear(logits + bias[:, None, None], (8, 8)).transpose(0, 2, 3, 1)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        segmenter.predict_proba(X), expected, rtol=1e-4, atol=1e-6
    )


def bilinear(maps, size):
    maps = torch.from_numpy(maps)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False).numpy()


@pytest.mark.parametrize(
    ("hidden_layer_sizes", "maps", "n_parameters"),
    [
        ((), [1], 3 * 3 + 3),
        ((), [0, 1], 8 * 3 + 3),
        ((6,), [1], (3 * 6 + 6) + (6 * 6 * 9 + 6 + 12) + (6 * 3 + 3)),
        (
            (6, 4),
            [1],
            (3 * 6 + 6) + (6 * 6 * 9 + 6 + 12) + (6 * 4 * 9 + 4 + 8) + (4 * 3 + 3),
        ),
        (
            (6, 4),
            [0, 1],
            (3 * 6 + 6) + (5 * 4 + 4)  # projections
            + (6 * 6 * 9 + 6 + 12) + ((6 + 4) * 4 * 9 + 4 + 8) + (4 * 3 + 3),
        ),
        (
            (6, 4, 9),
            [0, 1],
            (3 * 6 + 6) + (5 * 4 + 4)
            + (6 * 6 * 9 + 6 + 12) + ((6 + 4) * 4 * 9 + 4 + 8) + (4 * 9 * 9 + 9 + 18)
            + (9 * 3 + 3),
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_projections_layers_norms_and_output(
    hidden_layer_sizes, maps, n_parameters
):
    X, y = two_maps()
    segmenter = small(hidden_layer_sizes=hidden_layer_sizes, max_epochs=1).fit(
        X[:, maps], y
    )
    assert segmenter.n_parameters_ == n_parameters
    network = segmenter._empty_network()
    assert n_parameters == sum(value.numel() for value in network.parameters())


def test_the_mask_of_an_image_depends_on_that_image_alone():
    X, y = two_maps()
    segmenter = small().fit(X, y)
    together = segmenter.predict_proba(X)
    other = X.copy()
    for place in np.ndindex(X.shape):
        if place[0] != 33:
            other[place] = 100 * X[place]
    for table, row in ((X[33:34], 0), (other, 33), (X[20:40], 13)):
        found = segmenter.predict_proba(table)
        np.testing.assert_allclose(found[row], together[33], rtol=1e-4, atol=1e-6)


# Sizes of masks


def unequal(y):
    """Return masks of which one is twice as large, and one three times as wide."""
    masks = [np.asarray(mask) for mask in y]
    masks[3] = magnified(masks[3][None], 2)[0]
    masks[5] = masks[5].repeat(3, axis=1)
    return masks


def test_masks_of_other_sizes_are_resized_to_the_most_frequent_with_a_warning():
    X, y = scenes(n_rows=20)
    masks = unequal(y)
    with pytest.warns(
        UserWarning,
        match=r"3 sizes; 2 of 20, the first in row \d+, are resized to \(8, 8\).*mask_size",
    ):
        segmenter = small().fit(X, masks)
    assert segmenter.mask_size_ == (8, 8)
    assert segmenter.n_resized_ == 2
    meant = small(mask_size=(8, 8)).fit(X, masks)  # and says nothing
    assert meant.n_resized_ == 2
    same_weights(segmenter, meant, rtol=0)
    same_weights(
        small().fit(X, y), meant, rtol=0
    )  # as nearest pixels are those that were repeated
    assert small().fit(X, y).n_resized_ == 0
    other = small(mask_size=[6, 10]).fit(X, masks)
    assert other.n_resized_ == 20
    assert other.predict(X).shape == (20, 6, 10)


def test_of_sizes_equally_frequent_the_largest_is_taken():
    X, y = scenes(n_rows=4)
    masks = [*y[:2], *magnified(y[2:], 2)]
    for order in (slice(None), slice(None, None, -1)):
        with pytest.warns(
            UserWarning, match=r"2 of 4, the first in row \d, are resized to \(16, 16\)"
        ):
            small().fit(X, masks[order])


@pytest.mark.parametrize("seed", range(20))
def test_each_pixel_takes_the_label_of_the_nearest_as_in_pil(seed):
    rng = np.random.default_rng(seed)
    old, new = (tuple(size) for size in rng.integers(1, 40, size=(2, 2)).tolist())
    mask = rng.integers(0, 256, size=old, dtype=np.uint8)
    resized_mask = segmentation._resize_nearest(mask, new)
    expected = np.asarray(
        Image.fromarray(mask).resize(new[::-1], Image.Resampling.NEAREST)
    )
    # A pixel whose centre is on an edge has two nearest pixels; PIL takes either by rounding.
    distinct = []
    for n_old, n_new in zip(old, new, strict=True):
        distinct.append((2 * np.arange(n_new) + 1) * n_old % (2 * n_new) != 0)
    inner = np.ix_(*distinct)
    np.testing.assert_array_equal(resized_mask[inner], expected[inner])
    assert inner[0].size
    assert inner[1].size
    assert resized_mask.shape == new


def test_masks_are_predicted_in_any_size():
    X, y = scenes(n_rows=20)
    segmenter = small().fit(X, y)
    expected, certain = segmenter.predict(X), segmenter.predict_proba(X)
    sizes = np.array([[8, 8], [5, 13], [40, 4], [1, 1]] * 5)
    found, likely = (
        segmenter.predict(X, sizes=sizes),
        segmenter.predict_proba(X, sizes=sizes),
    )
    assert found.dtype == likely.dtype == object
    assert [mask.shape for mask in found] == [tuple(size) for size in sizes]
    assert [p.shape for p in likely] == [(*size, 2) for size in sizes]
    for row in range(20):
        assert found[row].dtype == expected.dtype
        np.testing.assert_array_equal(found[row], likely[row].argmax(axis=-1))
    for row in range(0, 20, 4):  # those of mask_size_
        np.testing.assert_array_equal(found[row], expected[row])
        np.testing.assert_array_equal(likely[row], certain[row])
    same = segmenter.predict(X, sizes=[(8, 8)] * 20)  # a list, and all alike
    assert same.shape == (20,)
    np.testing.assert_array_equal(np.stack(list(same)), expected)


def test_logits_are_resized_not_masks():
    """So that an outline in a finer mask has no steps of the coarser one."""
    X, y = scenes(n_rows=20)
    segmenter = small().fit(X, y)
    fine = segmenter.predict_proba(X, sizes=[(16, 16)] * 20)
    at_once = clone(segmenter).set_params(mask_size=(16, 16)).fit(X, y)
    at_once.weights_ = segmenter.weights_
    np.testing.assert_array_equal(np.stack(list(fine)), at_once.predict_proba(X))


def test_each_mask_is_scored_in_its_own_size():
    X, y = scenes()
    masks = unequal(y)
    segmenter = learner(mask_size=(8, 8)).fit(X, masks)
    found = segmenter.predict(X, sizes=[mask.shape for mask in masks])
    assert segmenter.score(X, masks) == dice_score(masks, found, adjusted=True)
    assert found[3].shape == (16, 16)
    assert found[5].shape == (8, 24)


def test_who_finds_nothing_scores_0_and_who_finds_all_1():
    X, y = scenes(grid=(4, 4))
    y[:40, 0, 0], y[40:] = 1, 0
    masks = y[:, ::2, ::2]  # a pixel for each patch
    for row, mask in enumerate(masks):
        X[row, 0] = mask.reshape(16, 1) * np.ones(3)
    segmenter = small(hidden_layer_sizes=()).fit(X, masks)
    bias, weight = (segmenter.weights_[f"output.{name}"] for name in ("bias", "weight"))
    bias[:], weight[:] = [9, 0], 0
    assert not segmenter.predict(X).any()
    assert segmenter.score(X, masks) == pytest.approx(0, abs=1e-12)
    assert dice_score(masks, segmenter.predict(X)) == pytest.approx(1 / 3)
    bias[:], weight[0], weight[1] = 0, -1, 1
    np.testing.assert_array_equal(segmenter.predict(X), masks)
    assert segmenter.score(X, masks) == 1
    bias[:], weight[:] = [0, 9], 0  # objects everywhere
    assert segmenter.score(X, masks) < 0.5


# Training


def test_early_stopping_goes_back_to_the_best_epoch():
    X, y = scenes(n_rows=40)
    y = np.random.default_rng(0).permutation(y)  # can only be memorised
    options = {
        "early_stopping": True,
        "n_iter_no_change": 3,
        "validation_fraction": 0.3,
    }
    segmenter = small(max_epochs=100, lr=0.03, **options).fit(X, y)
    losses = [epoch["valid_loss"] for epoch in segmenter.history_]
    best = int(np.argmin(losses)) + 1
    assert segmenter.n_iter_ == best + 3 < 100
    same_weights(
        small(max_epochs=best, lr=0.03, **options).fit(X, y), segmenter, rtol=0
    )


def test_the_validation_set_has_the_same_fraction_of_empty_masks(monkeypatch):
    X, y = scenes(n_rows=40)
    y[::2], y[1::2, 0, 0] = 0, 1
    validation_sets = []

    def watch(rows, strata, *rest):
        train, valid = split(rows, strata, *rest)
        validation_sets.append(valid)
        return train, valid

    split = _trained.hold_back
    monkeypatch.setattr(_trained, "hold_back", watch)
    small(early_stopping=True, validation_fraction=0.25).fit(X, y)
    assert sorted(validation_sets[0] % 2) == [0] * 5 + [1] * 5


def test_a_warm_start_resumes():
    X, y = scenes()
    segmenter = small(warm_start=True).fit(X, y)
    first, moments = segmenter.history_[-1]["train_loss"], segmenter.weights_["mean_0"]
    segmenter.fit(column([cell.reshape(4, 4, 3) + 1 for cell in X[:, 0]]), y)
    assert [epoch["epoch"] for epoch in segmenter.history_] == [1, 2, 3, 4]
    assert segmenter.n_iter_ == 4
    np.testing.assert_array_equal(segmenter.weights_["mean_0"], moments)
    segmenter.set_params(max_epochs=20).fit(X, y)
    assert segmenter.n_iter_ == 24
    assert segmenter.history_[-1]["train_loss"] < first
    still = small(warm_start=True, lr=1e-12, max_epochs=1).fit(X, y).fit(X, y)
    losses = [epoch["train_loss"] for epoch in still.history_]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # of other batches
    with pytest.raises(
        ValueError,
        match=r"'hidden_layer_sizes': \[4, 4\].* require .*sizes': \[4\].* Clone",
    ):
        segmenter.set_params(hidden_layer_sizes=(4,)).fit(X, y)
    segmenter.set_params(hidden_layer_sizes=(4, 4))
    with pytest.raises(
        ValueError, match="Row 7 of y has the label 2, which is not one of"
    ):
        segmenter.fit(X, np.where(np.arange(60)[:, None, None] == 7, 2, y))
    with pytest.raises(ValueError, match="X has 2 features, but .* expecting 1"):
        segmenter.fit(np.hstack([X, X]), y)
    assert segmenter.set_params(warm_start=False).fit(*two_maps()).n_iter_ == 20


def test_a_warm_start_goes_on_from_a_file():
    X, y = scenes()
    segmenter = small(warm_start=True, dropout=0.0).fit(X, y)
    stored = skops.io.dumps(segmenter)
    trusted = skops.io.get_untrusted_types(data=stored)
    assert trusted == ["sklembed.segmentation.PatchSegmenter"]
    loaded = [
        skops.io.loads(stored, trusted=trusted),
        pickle.loads(pickle.dumps(segmenter)),
    ]
    segmenter.fit(X, y)
    for other in loaded:
        same_weights(other.fit(X, y), segmenter, rtol=0)
        assert other.n_iter_ == 4


def test_skorch_options_device_and_verbosity_reach_training(capsys):
    epochs = []

    class Counts(Callback):
        def on_epoch_end(self, net, **_):
            epochs.append(net.device)

    X, y = scenes()
    plain = small(device="cpu").fit(X, y)
    assert not capsys.readouterr().out
    options = {
        "skorch_params": {"callbacks": [Counts()]},
        "device": "cpu",
        "verbose": 1,
    }
    same_weights(small(**options).fit(X, y), plain, rtol=0)
    assert epochs == [torch.device("cpu")] * 2
    assert "train_loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="device='nowhere' cannot be used here"):
        small(device="nowhere").fit(X, y)
    with pytest.raises(ValueError, match="skorch_params sets criterion"):
        small(skorch_params={"criterion": None}).fit(X, y)
    with pytest.raises(ValueError, match="diverged"):
        small(lr=1e30, max_epochs=20).fit(X, y)


def test_callbacks_are_told_of_every_epoch_and_stop_when_asked():
    from test_callbacks import Record  # of scikit-learn >= 1.9

    X, y = scenes(n_rows=20)
    record = Record(stop_after=3)
    stopped = small(max_epochs=5).set_callbacks(record).fit(X, y)
    assert record.tasks == [("fit", "epoch")] * 3 + [(None, "fit")]
    assert stopped.n_iter_ == 3
    for epochs, (segmenter, said) in enumerate(record.estimators, start=1):
        assert segmenter.n_iter_ == len(segmenter.history_) == epochs
        expected = small(max_epochs=epochs).fit(X, y).predict_proba(X)
        np.testing.assert_array_equal(said, expected)
    again = Record()
    stopped.set_params(warm_start=True, max_epochs=2).set_callbacks(again).fit(X, y)
    assert [len(segmenter.history_) for segmenter, _ in again.estimators] == [4, 5]


def test_what_is_changed_after_fit_does_not_change_what_was_fitted():
    X, y = scenes()
    segmenter = small().fit(X, y)
    before = segmenter.predict_proba(X)
    segmenter.set_params(
        hidden_layer_sizes=(),
        grid_shape=(1, 16),
        classes=[0, 1, 2],
        mask_size=(3, 3),
        dropout=0.9,
    )
    np.testing.assert_array_equal(segmenter.predict_proba(X), before)


def test_a_pickle_holds_arrays_alone_and_a_clone_nothing():
    X, y = two_maps()
    segmenter = small().fit(X, y)
    stored = pickle.dumps(segmenter)
    assert b"torch" not in stored
    np.testing.assert_array_equal(pickle.loads(stored).predict(X), segmenter.predict(X))
    assert not hasattr(clone(segmenter), "weights_")


def round_trip(segmenter, directory):
    """Save a segmenter and load it into a fresh object with the same fitted attributes."""
    segmenter.save(directory)
    loaded = PatchSegmenter.load(directory)
    assert vars(loaded).keys() == vars(segmenter).keys()
    assert loaded.get_params() == segmenter.get_params()
    same_weights(loaded, segmenter, rtol=0)
    for name in vars(segmenter).keys() - {"weights_"}:
        np.testing.assert_equal(getattr(loaded, name), getattr(segmenter, name))
    assert loaded.classes_.dtype == segmenter.classes_.dtype
    return loaded


@pytest.mark.parametrize("hidden_layer_sizes", [(), (4, 4), (4, 4, 4)], ids=str)
def test_a_saved_segmenter_is_loaded_with_the_same_predictions(
    hidden_layer_sizes, tmp_path
):
    X, y = two_maps()
    segmenter = small(hidden_layer_sizes=hidden_layer_sizes).fit(X, y.astype(np.uint8))
    loaded = round_trip(segmenter, tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(X), segmenter.predict_proba(X))
    masks = loaded.predict(X)
    np.testing.assert_array_equal(masks, segmenter.predict(X))
    assert masks.dtype == np.uint8
    assert loaded.score(X, y) == segmenter.score(X, y)


def test_a_loaded_segmenter_keeps_names_sizes_and_classes(tmp_path):
    X, y = two_maps()
    frame = pd.DataFrame(X, columns=["fine", "coarse"])
    options = {"mask_size": (6, 10), "grid_shape": [1, 1], "classes": [1, 2, 5]}
    segmenter = small(early_stopping=True, **options).fit(frame, y)
    loaded = round_trip(segmenter, tmp_path)
    np.testing.assert_array_equal(loaded.predict(frame), segmenter.predict(frame))
    assert loaded.mask_size_ == (6, 10)
    assert loaded.grids_ == [(2, 2), (4, 4)]
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(frame[["coarse", "fine"]])


def test_a_loaded_segmenter_resumes_training_as_the_saved_one(tmp_path):
    X, y = scenes(n_rows=20)
    segmenter = small(warm_start=True, dropout=0.0).fit(X, y)
    loaded = round_trip(segmenter, tmp_path)
    same_weights(loaded.fit(X, y), segmenter.fit(X, y), rtol=0)
    assert loaded.n_iter_ == 4


def test_an_unfitted_segmenter_or_one_with_a_callable_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError):
        small().save(tmp_path / "it")
    X, y = scenes(n_rows=20)
    segmenter = small(skorch_params={"predict_nonlinearity": scenes}).fit(X, y)
    with pytest.raises(
        TypeError, match="skorch_params/predict_nonlinearity is the function"
    ):
        segmenter.save(tmp_path / "it")
    assert not (tmp_path / "it").exists()


@pytest.mark.gpu
def test_training_on_a_gpu_leads_to_masks_as_good():
    X, y = two_maps()
    scores = [
        learner(device=device).fit(X[:60], y[:60]).score(X[60:], y[60:])
        for device in ("cpu", "cuda")
    ]
    assert scores[1] > scores[0] - 0.1


# In company


@pytest.mark.parametrize(
    "form", [list, objects, np.asarray], ids=["list", "objects", "array"]
)
def test_searches_and_cross_validation_take_masks_of_any_form(form):
    X, y = scenes(n_rows=40)
    sizes = {"hidden_layer_sizes": [(), (4,)]}
    search = GridSearchCV(
        small(max_epochs=10, lr=0.03), sizes, cv=2, error_score="raise"
    )
    search.fit(X, form(y))
    best, halves = clone(search.best_estimator_), list(KFold(2).split(X))
    scores = [
        best.fit(X[train], y[train]).score(X[test], y[test]) for train, test in halves
    ]
    assert search.best_score_ == pytest.approx(np.mean(scores))
    found = cross_val_predict(small(), X, form(y), cv=2)
    for train, test in halves:
        np.testing.assert_array_equal(
            found[test], small().fit(X[train], y[train]).predict(X[test])
        )


def photographs(n_rows=40, side=32, seed=0):
    """Return images of a bright square on a dark background, and its masks."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, size=(n_rows, side, side, 3), dtype=np.uint8)
    masks = np.zeros((n_rows, side, side), dtype=bool)
    for image, mask in zip(images, masks, strict=True):
        top, left = rng.integers(0, side // 2, size=2)
        place = slice(top, top + side // 2), slice(left, left + side // 2)
        image[place] += np.array([150, 100, 50], dtype=np.uint8)
        mask[place] = True
    return list(images), masks


@pytest.mark.parametrize(
    ("kind", "options", "grid"),
    [
        ("dinov2_registers", {}, (4, 4)),
        ("vit", {"layer": -2}, (4, 4)),
        ("resnet", {"layer": -2}, (4, 4)),
        ("convnext", {"layer": -3}, (8, 8)),
    ],
)
def test_a_pipeline_maps_images_to_masks(checkpoints, kind, options, grid):
    images, masks = photographs()
    encoder = FrozenEncoder(checkpoints[kind], output="tokens", store=None, **options)
    segmenter = learner(max_epochs=20)
    pipe = make_pipeline(encoder, segmenter).fit(images[:30], masks[:30])
    assert pipe[-1].grids_ == [grid] == [encoder.grid_shape()]
    found = pipe.predict(images)
    assert found.shape == (40, 32, 32)
    assert found.dtype == bool
    assert pipe.score(images[30:], masks[30:]) > 0.6
    larger = pipe.predict(images[:2], sizes=[(64, 64), (7, 9)])
    assert [mask.shape for mask in larger] == [(64, 64), (7, 9)]
    frame = pd.DataFrame({"picture": images}, index=np.arange(40) + 7)
    named = clone(pipe).set_output(transform="pandas").fit(frame[:30], masks[:30])
    np.testing.assert_array_equal(named.predict(frame), found)
    assert len(named[-1].feature_names_in_) == 1


def test_a_union_of_two_strides_feeds_a_decoder_with_skips(checkpoints):
    images, masks = photographs()
    frame = pd.DataFrame({"picture": images})
    encoder = FrozenEncoder(checkpoints["resnet"], output="tokens", store=None)
    union = PerModalityUnion(
        [
            ("s16", clone(encoder).set_params(layer=-2), "picture"),
            ("s32", encoder, "picture"),
        ]
    )
    pipe = make_pipeline(union, learner(max_epochs=20)).fit(frame[:30], masks[:30])
    assert pipe[-1].grids_ == [(2, 2), (4, 4)]
    assert pipe[-1].order_.tolist() == [1, 0]
    assert pipe[-1].structure_["widths"] == [16, 12]
    assert pipe.score(frame[30:], masks[30:]) > 0.6
    named = clone(pipe).set_output(transform="pandas").fit(frame[:30], masks[:30])
    assert [name.split("__")[0] for name in named[-1].feature_names_in_] == [
        "s16",
        "s32",
    ]
    np.testing.assert_array_equal(named.predict(frame), pipe.predict(frame))
    depths = {"patchsegmenter__hidden_layer_sizes": [(), (4, 4), (4, 4, 4)]}
    named.set_params(patchsegmenter__max_epochs=2)
    search = GridSearchCV(named, depths, cv=2, error_score="raise").fit(frame, masks)
    assert search.predict(frame[:3]).shape == (3, 32, 32)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_patches_may_first_be_adapted_to_texts():
    X, y = scenes()
    rng = np.random.default_rng(0)
    # The words of a text are noisy copies of a few patches of its image.
    texts = column([cell[: rng.integers(1, 5)] + 0.1 for cell in X[:, 0]])
    frame = pd.DataFrame({"text": texts[:, 0], "image": X[:, 0]})
    adaptor = CrossAttentionAdaptor(
        8, n_heads=2, dim_feedforward=16, max_epochs=5, output="tokens", random_state=0
    ).fit(frame[:40])
    patches = adaptor.encode(frame[["image"]], "image")
    segmenter = learner().fit(patches[:40], y[:40])
    assert segmenter.structure_["widths"] == [8]
    assert segmenter.score(patches[40:], y[40:]) > 0.6
    by_frame = adaptor.set_output(transform="pandas").transform(frame)[["image__0"]]
    np.testing.assert_array_equal(
        learner().fit(by_frame[:40], y[:40]).predict(by_frame),
        segmenter.predict(patches),
    )


# The network


def decoder(grids, widths, hidden_layer_sizes, *, dropout=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        made = PatchDecoder(
            grids, widths, hidden_layer_sizes, 3, dropout=dropout, generator=generator
        )
    made.to_empty(device="cpu")
    made.initialize(
        [(torch.full((width,), 0.5), torch.full((width,), 2.0)) for width in widths]
    )
    return made


def packed(grids, widths, n_images=5):
    """Return maps (batch, rows, columns, width), and the same in one row per image."""
    generator = torch.Generator().manual_seed(1)
    maps = []
    for grid, width in zip(grids, widths, strict=True):
        maps.append(torch.randn(n_images, *grid, width, generator=generator))
    return maps, torch.cat([m.flatten(1) for m in maps], dim=1)


ONE, TWO = ([(4, 4)], [3]), ([(2, 3), (5, 7)], [3, 4])


@pytest.mark.parametrize(
    ("maps", "hidden_layer_sizes", "size"),
    [
        (ONE, (), (4, 4)),
        (ONE, (6,), (4, 4)),
        (ONE, (6, 9), (8, 8)),
        (ONE, (6, 9, 8), (16, 16)),
        (TWO, (), (5, 7)),
        (TWO, (6, 9), (5, 7)),
        (TWO, (6, 9, 8), (10, 14)),
    ],
)
def test_the_decoder_is_projections_convolutions_and_upsampling(
    maps, hidden_layer_sizes, size
):
    grids, widths = maps
    made = decoder(grids, widths, hidden_layer_sizes)
    state = made.state_dict()
    maps, x = packed(grids, widths)
    maps = [((m - 0.5) / 2).permute(0, 3, 1, 2) for m in maps]

    def convolved(z, name, **options):
        return F.conv2d(z, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def interpolated(z, size):
        return F.interpolate(z, size, mode="bilinear", align_corners=False)

    if not hidden_layer_sizes:
        z = torch.cat([interpolated(m, grids[-1]) for m in maps], dim=1)
    for layer, n_channels in enumerate(hidden_layer_sizes):
        parts = [interpolated(z, [2 * n for n in z.shape[2:]])] if layer else []
        if layer < len(maps):
            parts = [interpolated(z, grids[layer])] if layer else []
            parts.append(convolved(maps[layer], f"projections.{layer}"))
        z = convolved(torch.cat(parts, dim=1), f"layers.{layer}.0", padding=1)
        z = F.group_norm(
            z, {6: 1, 9: 1, 8: 2}[n_channels]
        ).relu()  # of four channels or more
    expected = convolved(z, "output")
    logits = made(x)
    assert logits.shape == (5, 3, *size)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_drawn_as_torch_draws_them_from_the_generator_alone():
    before = torch.get_rng_state()
    made = decoder(*TWO, (64, 16, 20, 9, 4), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for module in made.modules():
            if isinstance(module, torch.nn.Conv2d):
                n_in, n_out, size = (
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size,
                )
                theirs = torch.nn.Conv2d(n_in, n_out, size)
                torch.testing.assert_close(module.state_dict(), theirs.state_dict())
            elif isinstance(module, torch.nn.GroupNorm):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
    groups = [layer[1].num_groups for layer in made.layers]
    assert groups == [8, 4, 4, 1, 1]  # of four channels or more, eight at most


def test_numbers_of_patches_are_dropped_in_training_alone():
    plain, dropped = (decoder(*TWO, (6, 9), dropout=p) for p in (0.0, 0.5))
    _, x = packed(*TWO)
    before = torch.get_rng_state()
    first, second = dropped(x), dropped(x)
    assert not torch.allclose(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(dropped.eval()(x), plain(x))
    maps = dropped.train().unpack(x)
    assert all(0.3 < (m == 0).float().mean() < 0.7 for m in maps)


def test_maps_are_resized_bilinearly():
    maps = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    assert resized(maps, (2, 2)) is maps
    found = resized(maps, (4, 2))
    expected = torch.tensor([[0.0, 4], [2, 6], [6, 10], [8, 12]])
    torch.testing.assert_close(found[0, 0], expected)
    torch.testing.assert_close(
        resized(torch.ones(2, 3, 4, 4), (7, 9)), torch.ones(2, 3, 7, 9)
    )


# Bad input


def replaced(X, row, cell):
    X = X.copy()
    X[row, 0] = cell
    return X


BAD_PATCHES = {
    "a class token": (
        lambda X: column([np.ones((17, 3))] * 60),
        "The 17 patches of row 0 of column 0 do not form a square.*exclude class",
    ),
    "fewer patches": (
        lambda X: replaced(X, 5, np.ones((9, 3))),
        "Row 5 has 9 patches in column 0, but the grid of most rows of fit is 4 x 4",
    ),
    "another width": (
        lambda X: replaced(X, 5, np.ones((16, 4))),
        "Row 5 of the token column 0 has tokens of width 4, but 3 was expected",
    ),
    "no number": (
        lambda X: replaced(X, 5, np.full((16, 3), np.nan)),
        "Row 5 of the token column 0 .* with NaN or infinity",
    ),
    "no patch": (
        lambda X: replaced(X, 5, np.zeros((0, 3))),
        r"Row 5 of the token column 0 .* at least one token; got shape \(0, 3\)",
    ),
    "no image": (
        lambda X: replaced(replaced(X, 3, None), 8, np.nan),
        r"Row 3 has no image in column 0 \(2 such rows\). Remove these rows",
    ),
    "no image at all": (
        lambda X: np.full((60, 1), None),
        "Column 0 of X has no patches",
    ),
    "three dimensions": (
        lambda X: np.stack(list(X[:, 0])),
        r"X is a ndarray of shape \(60, 16, 3\); expected .* with columns of arrays",
    ),
    "one dimension": (
        lambda X: X[:, 0],
        r"X is a ndarray of shape \(60,\); expected a DataFrame or a 2D array",
    ),
    "lists": (
        lambda X: X.tolist(),
        "X is a list; expected a DataFrame or a 2D array",
    ),
    "numbers": (
        lambda X: np.ones((60, 3)),
        "Column 0 of X has no patches: its first cell",
    ),
    "numbers beside patches": (
        lambda X: pd.DataFrame({"image": X[:, 0], "size": 1.0}),
        "Column 'size' of X has no patches",
    ),
    "no image in a frame": (
        lambda X: pd.DataFrame({"fine": X[:, 0], "coarse": replaced(X, 4, None)[:, 0]}),
        r"Row 4 has no image in column 'coarse' \(1 such rows\)",
    ),
}


@pytest.mark.parametrize("case", BAD_PATCHES)
def test_invalid_patches_are_refused_with_their_row_and_column(case):
    make, message = BAD_PATCHES[case]
    X, y = scenes()
    with pytest.raises(ValueError, match=message):
        small().fit(make(X), y)


def test_patches_unlike_those_of_fit_are_refused():
    X, y = two_maps()
    segmenter = small().fit(X, y)
    coarser = np.hstack([column([cell[:4] for cell in X[:, 0]]), X[:, 1:]])
    for method in (
        segmenter.predict,
        segmenter.predict_proba,
        lambda X: segmenter.score(X, y),
    ):
        with pytest.raises(
            ValueError,
            match="Row 0 has 4 patches in column 0, but the grid .* is 4 x 4",
        ):
            method(coarser)
        with pytest.raises(
            ValueError, match="Row 0 of the token column 0 .* width 3, but 5 was"
        ):
            method(X[:, ::-1])
        with pytest.raises(ValueError, match="X has 1 features, but .* expecting 2"):
            method(X[:, :1])
        with pytest.raises(ValueError, match="Row 2 has no image in column 0"):
            method(replaced(X, 2, None))
    for method in (
        small().predict,
        small().predict_proba,
        lambda X: small().score(X, y),
    ):
        with pytest.raises(NotFittedError):
            method(X)


BAD_MASKS = {
    "a vector": (np.zeros(8), r"got shape \(8,\)"),
    "a picture": (
        np.zeros((8, 8, 3)),
        r"got shape \(8, 8, 3\) \(an image\? Take one channel",
    ),
    "no pixel": (np.zeros((0, 8)), r"got shape \(0, 8\)"),
    "None": (None, "got None"),
    "a path": ("mask.png", "got 'mask.png'"),
    "a label": (1, "got 1"),
    "fractions": (np.full((8, 8), 0.5), "has the label 0.5; .* whole numbers from 0"),
    "negative": (np.full((8, 8), -1), "has the label -1"),
    "negative fractions": (np.full((8, 8), -0.5), "has the label -0.5"),
    "large": (np.full((8, 8), 65536), "has the label 65536; .* to 65535"),
    "NaN": (np.where(np.eye(8), np.nan, 1), "has the label nan"),
    "infinity": (np.where(np.eye(8), np.inf, 1), "has the label inf"),
    "words": (
        np.full((8, 8), "cat"),
        "should be a mask of whole numbers; got dtype <U3",
    ),
    "objects": (
        np.full((8, 8), None),
        "should be a mask of whole numbers; got dtype object",
    ),
    "few rows": (np.ones((3, 8), int), "has 3 x 8 pixels for a grid of 4 x 4 patches"),
    "few columns": (
        np.ones((8, 3), int),
        "has 8 x 3 pixels for a grid of 4 x 4 patches",
    ),
    "unknown": (
        np.full((8, 8), 2),
        r"has the label 2, which is not one of the classes \[0, 1\]",
    ),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_what_is_no_mask_is_refused_by_row(case):
    mask, message = BAD_MASKS[case]
    X, y = scenes()
    with pytest.raises(ValueError, match=f"Row 4 of y .*{message}"):
        small(classes=[0, 1], mask_size=(8, 8)).fit(X, [*y[:4], mask, *y[5:]])


def test_masks_without_a_learnable_class_are_refused():
    X, y = scenes()
    with pytest.raises(ValueError, match="All 60 masks are empty"):
        small().fit(X, np.zeros_like(y))
    with pytest.raises(
        ValueError, match="requires y to be passed, but the target y is None"
    ):
        small().fit(X, None)
    for masks in (y[:59], list(y[:59])):
        with pytest.raises(
            ValueError, match=r"inconsistent numbers of samples: \[60, 59\]"
        ):
            small().fit(X, masks)
    grey = np.arange(60 * 8 * 8).reshape(60, 8, 8) % 257
    with pytest.raises(
        ValueError, match="have 257 labels; at most 256 are supported.* grey values"
    ):
        small().fit(X, grey)
    assert len(small(max_epochs=1).fit(X, grey.clip(max=255)).classes_) == 256
    with pytest.raises(
        ValueError, match="splits 1 rows into 1 .* needs at least one row"
    ):
        small(early_stopping=True).fit(X[:1], np.ones((1, 8, 8), int))


@pytest.mark.parametrize("grid", [(2, 6), (6, 2)])
def test_a_mask_that_is_transposed_relative_to_the_grid_is_refused(grid):
    X, y = scenes(grid=grid)
    masks = list(magnified(y, 2))
    segmenter = small(grid_shape=grid).fit(X, masks)
    masks[4] = masks[4].T
    height, width = masks[4].shape
    message = (
        f"Row 4 of y has {height} x {width} pixels, but the grid has {grid[0]} x {grid[1]} "
        "patches: one is portrait, the other landscape"
    )
    with pytest.raises(ValueError, match=message):
        segmenter.fit(X, masks)
    squashed = segmenter.set_params(mask_size=masks[0].shape).fit(
        X, masks
    )  # on purpose
    assert squashed.n_resized_ == 1


def test_layers_far_finer_than_the_masks_are_refused():
    X, y = scenes(n_rows=20)
    message = (
        "of the 5 hidden layers would work on a grid of 64 x 64, for masks of 8 x 8"
    )
    with pytest.raises(ValueError, match=message):
        small(hidden_layer_sizes=(4,) * 5).fit(X, y)


def test_a_fit_that_fails_leaves_nothing_fitted():
    X, y = scenes(n_rows=20)
    segmenter = small().fit(X, y)
    with pytest.raises(ValueError, match="not one of the classes .* Pass all labels"):
        segmenter.set_params(classes=[0, 77]).fit(X, y)
    for method in (segmenter.predict, segmenter.predict_proba):
        with pytest.raises(NotFittedError):
            method(X)


BAD_PARAMETERS = {
    "grid of one number": (
        {"grid_shape": (4,)},
        "grid_shape should be two positive integers",
    ),
    "grid without rows": (
        {"grid_shape": (0, 4)},
        "grid_shape should be two positive integers",
    ),
    "grid of other proportions": (
        {"grid_shape": (3, 4)},
        "a grid of proportions 3 : 4",
    ),
    "size of three numbers": (
        {"mask_size": (8, 8, 1)},
        "mask_size should be two positive",
    ),
    "size of fractions": ({"mask_size": (8.0, 8)}, r"mask_size .* got \(8.0, 8\)"),
    "size of one number": ({"mask_size": 8}, "mask_size"),
    "an empty layer": (
        {"hidden_layer_sizes": (4, 0)},
        "hidden_layer_sizes must contain positive",
    ),
    "a layer of 4.5": (
        {"hidden_layer_sizes": (4.5,)},
        "hidden_layer_sizes must contain positive",
    ),
    "fewer layers than maps": (
        {"hidden_layer_sizes": (4,)},
        "fewer layers than there are maps, 2",
    ),
    "all dropped": ({"dropout": 1.0}, "dropout"),
    "gamma": ({"gamma": -1.0}, "gamma"),
    "focal_weight": ({"focal_weight": -1.0}, "focal_weight"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_parameters_that_make_no_decoder_are_refused(case):
    options, message = BAD_PARAMETERS[case]
    with pytest.raises(ValueError, match=message):
        small(**options).fit(*two_maps())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(8, 8)] * 59, r"inconsistent numbers of samples: \[60, 59\]"),
        ([(8, 8)] * 7 + [(8, 0)] + [(8, 8)] * 52, r"Row 7 of sizes .* got \(8, 0\)"),
        (
            [(8, 8)] * 7 + [(8, 8, 1)] + [(8, 8)] * 52,
            r"Row 7 of sizes .* got \(8, 8, 1\)",
        ),
        (np.full((60, 2), 8.0), "Row 0 of sizes should be two positive integers"),
    ],
)
def test_sizes_that_no_mask_has_are_refused(sizes, message):
    X, y = scenes()
    segmenter = small().fit(X, y)
    for method in (segmenter.predict, segmenter.predict_proba):
        with pytest.raises(ValueError, match=message):
            method(X, sizes=sizes)


def test_scores_of_what_cannot_be_scored_are_refused():
    X, y = scenes()
    segmenter = small().fit(X, y)
    with pytest.raises(
        ValueError, match="Row 0 of y has the label 3, which is not one of"
    ):
        segmenter.score(X, np.where(y, y, 3))
    with pytest.raises(ValueError, match="All 60 masks are empty"):
        segmenter.score(X, np.zeros_like(y))
    with pytest.raises(ValueError, match="requires y to be passed"):
        segmenter.score(X, None)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        segmenter.score(X, y[:5])
    with pytest.raises(ValueError, match="Row 0 of y has the label -1"):
        segmenter.score(X, -y)


def test_masks_keep_their_type_unless_they_are_floats():
    given = [
        np.ones((2, 3), dtype=dtype) for dtype in (bool, np.uint8, np.int64, np.float32)
    ]
    masks = check_masks([*given, [[0, 1], [2, 3]]])
    assert [mask.dtype for mask in masks[:4]] == [bool, np.uint8, np.int64, np.uint16]
    assert all(mask.shape == (2, 3) for mask in masks[:4])
    assert masks[4].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="y has no mask"):
        check_masks([])


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        ([0, 1, 300], np.uint8),
        ([0, 1, 256], np.uint8),
        ([0, 1, 2], bool),
        ([0, 1, 1.5], int),
    ],
    ids=str,
)
def test_classes_are_those_that_were_asked_for_or_refused(classes, dtype):
    X, y = scenes(n_rows=20)
    try:
        fitted = small(classes=classes).fit(X, y.astype(dtype))
    except ValueError:
        return
    assert fitted.classes_.tolist() == classes


@pytest.mark.parametrize(
    "changed", [{"grid_shape": (2, 8)}, {"classes": [0, 1, 2]}], ids=str
)
def test_a_warm_start_refuses_parameters_that_require_another_network(changed):
    X, y = scenes(n_rows=20)
    segmenter = small(warm_start=True).fit(X, y).set_params(**changed)
    with pytest.raises(ValueError, match="has the structure .* require .* Clone"):
        segmenter.fit(X, y)


def test_a_single_size_for_all_images_is_refused():
    X, y = scenes(n_rows=20)
    with pytest.raises(ValueError, match="sizes"):
        small().fit(X, y).predict(X, sizes=(8, 8))


def test_a_mask_of_unequal_rows_is_refused_by_row():
    X, y = scenes(n_rows=20)
    with pytest.raises(ValueError, match="Row 4 of y"):
        small().fit(X, [*y[:4], [[0, 1], [1]], *y[5:]])


def test_a_mask_of_nan_and_infinity_is_refused_without_a_warning():
    with pytest.raises(ValueError, match="Row 0 of y has the label"):
        check_masks([[[np.nan, np.inf]]])


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 20)], ids=["alone", "together"])
def test_images_of_one_patch_are_distinguished_alone_or_together(rows):
    X, y = scenes(n_rows=20, grid=(1, 1))
    segmenter = learner().fit(X, y)
    np.testing.assert_array_equal(segmenter.predict(X[rows]), y[rows])


def test_a_warm_start_allows_masks_of_another_size_and_without_a_class():
    X, y = scenes(n_rows=20)
    segmenter = small(warm_start=True, mask_size=(8, 8)).fit(X, y)
    segmenter.set_params(mask_size=(16, 16)).fit(X, y)
    assert segmenter.predict(X[:1]).shape == (1, 16, 16)
    assert segmenter.n_resized_ == 20
    classes = segmenter.classes_
    segmenter.fit(X, np.where(y == classes[-1], classes[-1], 0))
    assert segmenter.classes_ is classes
    with pytest.raises(
        ValueError, match="Row 0 of y has the label 7, which is not one of"
    ):
        segmenter.fit(X, np.where(y > 0, 7, 7))


def test_a_size_that_the_grid_refuses_is_refused_before_training():
    X, y = scenes(n_rows=20)
    with pytest.raises(
        ValueError, match="mask_size has 2 x 2 pixels for a grid of 4 x 4"
    ):
        small(mask_size=(2, 2)).fit(X, y)


def test_masks_of_signed_and_unsigned_numbers_stay_whole():
    X, y = scenes(n_rows=20)
    mixed = [y[0].astype(np.uint64), *(mask.astype(np.int64) for mask in y[1:])]
    assert small().fit(X, mixed).predict(X).dtype == np.int64


def test_the_grid_is_that_of_most_images():
    X, y = scenes(n_rows=20)
    X[0, 0] = X[0, 0][:9]
    with pytest.raises(ValueError, match="Row 0 has 9 patches in column 0, .* 4 x 4"):
        small().fit(X, y)


def test_a_request_without_any_image_names_the_row():
    rng = np.random.default_rng(0)
    X = np.empty((6, 1), dtype=object)
    X[:, 0] = list(rng.normal(size=(6, 4, 3)))
    y = rng.integers(0, 2, size=(6, 4, 4))
    segmenter = PatchSegmenter((), max_epochs=1, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="Row 0 has no image in column 0"):
        segmenter.predict(np.full((1, 1), None))
