"""The picture of the gap shows the numbers that are there."""

import matplotlib
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklembed import ModalityGapAligner
from sklembed.metrics import modality_gap
from sklembed.plots import ModalityGapDisplay

matplotlib.use("Agg")
BLOCKS = {"text": slice(0, 4), "image": slice(4, 8)}


@pytest.fixture
def cones():
    X = np.random.default_rng(0).normal(size=(60, 8)) + np.repeat([2.0, -2.0], 4)
    X[:5, :4] = np.nan
    return X


@pytest.fixture
def search(cones):
    grid = {"modalitygapaligner__shift": [0.0, 1.0], "modalitygapaligner__noise_std": [0.0, 0.5]}
    pipeline = make_pipeline(ModalityGapAligner(BLOCKS, random_state=0), LogisticRegression())
    return GridSearchCV(pipeline, grid, cv=3).fit(cones[5:], np.arange(55) % 2)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_gaps_are_those_of_the_whole_space(cones):
    aligner = ModalityGapAligner(BLOCKS).fit(cones)
    display = ModalityGapDisplay.from_estimator(aligner, cones, max_rows=20, random_state=0)
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
    aligner = ModalityGapAligner(BLOCKS | {"sound": slice(8, 11)}, widths="resample").fit(X)
    display = ModalityGapDisplay.from_estimator(aligner, X)
    assert display.gap_after == pytest.approx(aligner.gap_after_)
    assert list(display.plot().before) == ["text", "image", "sound"]


def test_a_search_is_shown_by_its_best_score_of_each_shift(cones, search):
    aligner = search.best_estimator_[0]
    display = ModalityGapDisplay.from_estimator(aligner, cones, search=search).plot()
    assert len(display.axes_) == 3
    scores = np.asarray(search.cv_results_["mean_test_score"])
    shifts = np.asarray(search.cv_results_["param_modalitygapaligner__shift"], dtype=float)
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
