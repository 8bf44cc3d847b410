"""Displays show the right numbers and masks."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklembed import ModalityGapAligner
from sklembed.metrics import dice_score, modality_gap
from sklembed.plots import ModalityGapDisplay, SegmentationDisplay

matplotlib.use("Agg")
BLOCKS = {"text": slice(0, 4), "image": slice(4, 8)}


@pytest.fixture
def cones():
    X = np.random.default_rng(0).normal(size=(60, 8)) + np.repeat([2.0, -2.0], 4)
    X[:5, :4] = np.nan
    return X


@pytest.fixture
def search(cones):
    grid = {
        "modalitygapaligner__shift": [0.0, 1.0],
        "modalitygapaligner__noise_std": [0.0, 0.5],
    }
    pipeline = make_pipeline(
        ModalityGapAligner(BLOCKS, random_state=0), LogisticRegression()
    )
    return GridSearchCV(pipeline, grid, cv=3).fit(cones[5:], np.arange(55) % 2)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_gaps_are_those_of_the_whole_space(cones):
    aligner = ModalityGapAligner(BLOCKS).fit(cones)
    display = ModalityGapDisplay.from_estimator(
        aligner, cones, max_rows=20, random_state=0
    )
    Z = aligner.transform(cones)
    assert display.gap_before == pytest.approx(modality_gap(cones[:, :4], cones[:, 4:]))
    assert display.gap_after == pytest.approx(modality_gap(Z[:, :4], Z[:, 4:]))
    assert {rows.shape for rows in display.after.values()} == {(20, 2)}
    assert aligner.shift == 1.0
    display.plot()
    assert len(display.axes_) == 2
    assert display.axes_[0].get_title() == f"before: gap {display.gap_before:.2f}"
    assert display.axes_[0].get_xlim() == display.axes_[1].get_xlim()


def test_three_modalities_of_unequal_width_are_drawn_resampled(cones):
    X = np.hstack([cones, cones[:, :3]])
    aligner = ModalityGapAligner(
        BLOCKS | {"sound": slice(8, 11)}, widths="resample"
    ).fit(X)
    display = ModalityGapDisplay.from_estimator(aligner, X)
    assert display.gap_after == pytest.approx(aligner.gap_after_)
    assert list(display.plot().before) == ["text", "image", "sound"]


def test_a_search_is_shown_by_its_best_score_of_each_shift(cones, search):
    aligner = search.best_estimator_[0]
    display = ModalityGapDisplay.from_estimator(aligner, cones, search=search).plot()
    assert len(display.axes_) == 3
    scores = np.asarray(search.cv_results_["mean_test_score"])
    shifts = np.asarray(
        search.cv_results_["param_modalitygapaligner__shift"], dtype=float
    )
    assert display.shifts.tolist() == [0.0, 1.0]
    for shift, score in zip(display.shifts, display.mean_scores, strict=True):
        assert score == scores[shifts == shift].max()
    by_noise = ModalityGapDisplay.from_search(search, param="noise_std")
    assert by_noise.shifts.tolist() == [0.0, 0.5]


def test_what_cannot_be_shown_is_refused(cones, search):
    narrow = ModalityGapAligner({"a": slice(0, 3), "b": slice(3, 8)}, method="center")
    with pytest.raises(ValueError, match="no common width"):
        ModalityGapDisplay.from_estimator(narrow.fit(cones[5:]), cones)
    with pytest.raises(ValueError, match="GridSearchCV is not fitted"):
        ModalityGapDisplay.from_search(GridSearchCV(LogisticRegression(), {}))
    with pytest.raises(ValueError, match="of which 0 are called 'delta'"):
        ModalityGapDisplay.from_search(search, param="delta")
    with pytest.raises(ValueError, match="1 panels to draw; got 2 axes"):
        import matplotlib.pyplot as plt

        ModalityGapDisplay.from_search(search).plot(plt.subplots(1, 2)[1])


@pytest.fixture
def masks():
    """Return squares; prediction k lacks k columns. The last mask and prediction are empty."""
    y_true = np.zeros((6, 8, 8), dtype=int)
    y_true[:5, 2:6, 1:6] = 1
    y_pred = y_true.copy()
    for k in range(5):
        y_pred[k, :, 1 : 1 + k] = 0
    return y_true, y_pred


class Predicting:
    """Estimator that predicts fixed masks, in other sizes by repeating pixels."""

    def __init__(self, masks):
        self.masks = masks

    def predict(self, X, sizes=None):
        if sizes is None:
            return self.masks
        times = [
            size[0] // mask.shape[0]
            for mask, size in zip(self.masks, sizes, strict=True)
        ]
        return [
            np.kron(mask, np.ones((n, n), int))
            for mask, n in zip(self.masks, times, strict=True)
        ]


def test_rows_go_from_the_worst_to_the_best(masks):
    display = SegmentationDisplay.from_predictions(*masks, rows=3)
    scores = [
        dice_score([t], [p])
        for t, p in zip(display.y_true, display.y_pred, strict=True)
    ]
    each = sorted(dice_score([t], [p]) for t, p in zip(*masks, strict=True))
    assert scores == [each[0], each[2], each[5]]
    assert len(SegmentationDisplay.from_predictions(*masks, rows=99).y_true) == 6
    chosen = SegmentationDisplay.from_predictions(*masks, rows=[5, 1])
    np.testing.assert_array_equal(chosen.y_pred, masks[1][[5, 1]])


def test_a_panel_shows_the_mask_over_the_image(masks):
    images = np.random.default_rng(0).integers(
        0, 256, size=(6, 16, 16, 3), dtype=np.uint8
    )
    display = SegmentationDisplay.from_predictions(
        *masks, images=images, rows=[1, 5]
    ).plot()
    assert display.axes_.shape == (2, 3)
    assert [ax.get_title() for ax in display.axes_[0]] == [
        "image",
        "truth",
        "predicted, Dice 0.89",
    ]
    assert display.axes_[1, 2].get_title() == "Dice 1.00"
    np.testing.assert_array_equal(
        display.axes_[0, 0].get_images()[0].get_array(), images[1]
    )
    behind, layer = display.axes_[0, 2].get_images()
    np.testing.assert_array_equal(behind.get_array(), images[1])
    np.testing.assert_array_equal(layer.get_array()[..., 3] > 0, masks[1][1] == 1)
    assert layer.get_extent() == [-0.5, 15.5, 15.5, -0.5]  # as large as the image


def test_without_pixelsmasks_stand_alone_and_classes_have_distinct_colors(
    masks,
):
    y_true, y_pred = masks
    y_true, y_pred = 3 * y_true, np.where(y_pred, 7, 0)
    display = SegmentationDisplay.from_predictions(y_true, y_pred, rows=[0]).plot()
    assert display.axes_.shape == (1, 2)
    layers = [ax.get_images()[1].get_array()[3, 3] for ax in display.axes_[0]]
    assert not np.array_equal(layers[0], layers[1])
    texts = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert texts == ["3", "7"]
    alone = SegmentationDisplay.from_predictions(y_true, y_true, rows=[0]).plot()
    assert not alone.figure_.legends
    colour = alone.axes_[0, 0].get_images()[1].get_array()[3, 3]
    np.testing.assert_array_equal(colour, layers[0])  # independent of other labels


def test_masks_of_another_size_are_predicted_in_it(masks):
    y_true, y_pred = masks
    double = [np.kron(mask, np.ones((2, 2), int)) for mask in y_true]
    display = SegmentationDisplay.from_estimator(
        Predicting(y_pred), None, double, rows=[1]
    )
    assert display.y_pred[0].shape == (16, 16)
    same = SegmentationDisplay.from_estimator(
        Predicting(y_pred), None, y_true, rows=[1]
    )
    np.testing.assert_array_equal(same.y_pred[0], y_pred[1])


def test_a_frame_of_pixelsis_taken_as_its_column(masks):
    pixels = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    column = pd.Series(list(pixels), index=range(10, 16))
    for images in (column, column.to_frame(), list(pixels)):
        display = SegmentationDisplay.from_predictions(*masks, images=images, rows=[2])
        np.testing.assert_array_equal(display.images[0], pixels[2])


def test_masks_that_cannot_be_shown_are_refused(masks):
    with pytest.raises(ValueError, match="There are 2 images for 6 masks"):
        SegmentationDisplay.from_predictions(
            *masks, images=[np.zeros((4, 4, 3), np.uint8)] * 2
        )
    with pytest.raises(ValueError, match="There are 5 predictions for 6 masks"):
        SegmentationDisplay.from_predictions(masks[0], masks[1][:5])
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        SegmentationDisplay.from_predictions(*masks, rows=0)
    mask = np.arange(6) == 4
    assert len(SegmentationDisplay.from_predictions(*masks, rows=mask).y_true) == 1
    display = SegmentationDisplay.from_predictions(*masks, rows=2)
    import matplotlib.pyplot as plt

    with pytest.raises(ValueError, match="4 panels to draw; got 3"):
        display.plot(plt.subplots(1, 3)[1])
    assert display.plot(plt.subplots(1, 4)[1]).axes_.shape == (2, 2)


def test_figures_are_narrow_and_the_last_panel_fills_its_row(cones, search):
    aligner = search.best_estimator_[0]
    display = ModalityGapDisplay.from_estimator(aligner, cones, search=search).plot()
    assert display.figure_.get_figwidth() <= 7.5  # legible on a phone
    first, second, last = (ax.get_subplotspec() for ax in display.axes_)
    assert (first.rowspan.start, second.rowspan.start, last.rowspan.start) == (0, 0, 1)
    assert len(last.colspan) == 2


def test_sixteen_labels_have_distinct_colors():
    mask = np.arange(1, 17).reshape(4, 4)
    display = SegmentationDisplay.from_predictions([mask], [mask]).plot()
    layer = display.axes_[0, 0].get_images()[1].get_array()
    assert len(np.unique(layer.reshape(-1, 4), axis=0)) == 16
    display.figure_.draw_without_rendering()
    legend = display.figure_.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= display.figure_.bbox.width
