"""efficiency_report: what is encoded how often, what is measured, and what is refused."""

import math
import threading
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    DecisionFusionClassifier,
    EarlyFusionClassifier,
    EmbeddingStore,
    FrozenEncoder,
    PerModalityUnion,
)
from sklembed.evaluation import (
    _epochs_to_break_even,
    _fits_to_break_even,
    _measure,
    _Meter,
    _metering,
    _n_parameters,
    _one_epoch,
    _rows_that_show_all,
    _split,
    efficiency_report,
)

COLUMNS = [
    "encode s",
    "fit s",
    "predict s",
    "predict again s",
    "peak MiB",
    "stored bytes",
    "cells encoded",
    "parameters trained",
    "accuracy",
    "breaks even at epochs",
    "breaks even at fits",
]
SECONDS_A_CELL = 0.01
SECONDS_OF_LOADING = 1.5
N_EPOCHS = 3


def slow_backend(modality):
    """Make a backend that takes its time to load and to encode."""

    def load():
        time.sleep(SECONDS_OF_LOADING if modality == "text" else 0)

        def encode(cells):
            time.sleep(SECONDS_A_CELL * len(cells))
            if modality == "text":
                return np.array([[len(cell), cell.count("a")] for cell in cells])
            return np.array([np.asarray(cell).mean((0, 1)) for cell in cells])

        return encode

    return CallableBackend(
        load,
        name=f"slow {modality}",
        version="1",
        modality=modality,
        n_features=2 if modality == "text" else 3,
    )


@pytest.fixture(scope="module")
def table():
    """Sixty rows of a text and a picture, of which some repeat and some are missing."""
    rng = np.random.default_rng(0)
    y = np.repeat(["no", "yes"], 30)
    notes = np.array(["a" * (i % 7 + 1) + "b" * 9 * (label == "yes") for i, label in enumerate(y)])
    notes = notes.astype(object)
    notes[::6] = None
    pictures = np.empty(60, dtype=object)
    for i in range(60):
        pictures[i] = None if i % 9 == 4 else np.full((2, 2, 3), rng.integers(12), dtype=np.uint8)
    return pd.DataFrame({"note": notes, "scan": pictures}), y


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "own.sqlite"
    return make_pipeline(
        PerModalityUnion(
            [
                ("text", FrozenEncoder(slow_backend("text"), store=own), "note"),
                ("image", make_pipeline(FrozenEncoder(slow_backend("image"), store=own)), "scan"),
            ],
            n_jobs=2,
        ),
        SimpleImputer(),
        StandardScaler(),
        MLPClassifier((4,), random_state=0),
        memory=str(own.parent / "memory"),
    )


@pytest.fixture(scope="module")
def report(pipeline, table):
    return efficiency_report(pipeline, *table, n_epochs=N_EPOCHS, random_state=0)


def distinct(part):
    """Count the distinct cells of a table, column by column."""
    notes = part["note"].dropna().nunique()
    return notes + len({cell.tobytes() for cell in part["scan"].dropna()})


def test_the_report_has_a_row_for_each_arm(report):
    assert report.index.tolist() == ["raw", "stored"]
    assert report.columns.tolist() == COLUMNS
    assert report.drop(columns=COLUMNS[-2:]).notna().all(axis=None)


def test_raw_encodes_in_every_epoch_and_the_store_each_distinct_cell_once(report, table):
    X, y = table
    train, test = train_test_split(X, stratify=y, random_state=0)
    raw = N_EPOCHS * distinct(train) + 2 * distinct(test)
    assert report["cells encoded"].tolist() == [raw, distinct(X)]


def test_seconds_are_those_of_the_models_and_not_of_loading_them(report, table):
    X, y = table
    train, test = train_test_split(X, stratify=y, random_state=0)
    # The branches run side by side, and time that they share counts once.
    texts, pictures = train["note"].nunique(), distinct(train) - train["note"].nunique()
    least = SECONDS_A_CELL * max(texts, pictures)
    assert N_EPOCHS * least <= report.loc["raw", "encode s"] < SECONDS_OF_LOADING
    assert least <= report.loc["stored", "encode s"] < SECONDS_OF_LOADING
    least = SECONDS_A_CELL * test["note"].nunique()
    assert report.loc["raw", ["predict s", "predict again s"]].min() >= least
    assert (report["fit s"] > 0).all()


def test_both_arms_train_the_same_head(report):
    assert report.loc["raw", "accuracy"] == report.loc["stored", "accuracy"]
    assert report["parameters trained"].tolist() == [5 * 4 + 4 + 4 + 1] * 2


def test_only_the_stored_arm_stores(report):
    assert report.loc["raw", "stored bytes"] == 0
    assert report.loc["stored", "stored bytes"] > 0
    assert (report["peak MiB"] > 1).all()


def test_only_the_stored_arm_breaks_even(report):
    even = report[["breaks even at epochs", "breaks even at fits"]]
    assert even.loc["raw"].isna().all()
    assert (even.loc["stored"] >= 1).all()


def test_the_pipeline_its_store_and_its_memory_are_left_alone(report, pipeline):
    encoder = pipeline[0].transformers[0][1]
    assert not encoder.store.exists()
    assert not (encoder.store.parent / "memory").exists()
    assert not hasattr(pipeline[-1], "coefs_")


def test_an_arm_that_fails_says_which_it_was():
    def load():
        def encode(texts):
            raise RuntimeError("the model has a bad day")

        return encode

    backend = CallableBackend(load, name="bad", version="1", modality="text", n_features=1)
    pipeline = make_pipeline(FrozenEncoder(backend), LogisticRegression())
    with pytest.raises(RuntimeError, match="bad day") as caught:
        efficiency_report(pipeline, ["a", "b", "c", "d"], [0, 1, 0, 1])
    assert "the arm 'raw' of efficiency_report" in caught.value.__notes__[-1]


# What follows runs in this process


def measure(arm, pipeline, X, y, folder, n_epochs=2):
    return _measure(arm, pipeline, _split(X, y, 0.25, 0), n_epochs, folder, {})


@pytest.fixture
def texts():
    return [f"{'a' * (i % 5)} {'or' * (i % 4)}" for i in range(40)], [i % 2 for i in range(40)]


@pytest.mark.parametrize("arm", ["raw", "stored"])
def test_torch_heads_are_trained_by_the_epoch(arm, text_backend, texts, tmp_path):
    head = EarlyFusionClassifier((8,), blocks={"text": slice(0, 9)}, max_epochs=7, random_state=0)
    pipeline = make_pipeline(FrozenEncoder(text_backend), head)
    found = measure(arm, pipeline, *texts, tmp_path)
    assert head.n_iter_ == 2
    linear, normalised, output = 9 * 8 + 8, 2 * 8, 8 + 1
    assert found["parameters trained"] == linear + normalised + output


def test_training_between_encoder_and_head_is_no_encoding(text_backend, texts, tmp_path):
    def pause(vectors):
        time.sleep(0.5)
        return vectors

    projector = ContrastiveProjector(2, max_epochs=2, cv=2, random_state=0)
    steps = FunctionTransformer(pause), projector, LogisticRegression()
    found = measure("stored", make_pipeline(FrozenEncoder(text_backend), *steps), *texts, tmp_path)
    assert found["encode s"] < 0.5 < found["fit s"]


def test_the_head_sees_the_cross_fitted_features_in_both_arms(text_backend, texts, tmp_path):
    def coefficients(arm):
        projector = ContrastiveProjector(2, max_epochs=2, cv=2, random_state=0)
        head = LogisticRegression()
        pipeline = make_pipeline(FrozenEncoder(text_backend), projector, head)
        measure(arm, pipeline, *texts, tmp_path)
        return head.coef_

    np.testing.assert_allclose(coefficients("raw"), coefficients("stored"), rtol=1e-4)


def test_a_reader_is_not_an_encoder(text_backend, store):
    with _metering() as meter:
        encoder = FrozenEncoder(text_backend, store=store)
        for _ in range(2):
            encoder.transform(["a", "b", "a", None])
    assert meter.cells == 2
    assert meter.seconds > 0
    encoder.transform(["c"])
    assert meter.cells == 2


def test_time_that_encoders_share_counts_once():
    meter = _Meter()

    def work():
        with meter.working(), meter.working():
            time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.2 <= meter.seconds <= time.perf_counter() - start


@pytest.mark.parametrize(
    ("once", "anew", "read", "epochs", "fits"),
    [
        (10, 8, 1, 2, 2),  # 10 <= 2 * 8; 10 + 1 <= 2 * 8
        (10, 5, 0, 2, 2),  # exactly
        (10, 4, 3, 3, 7),  # 10 + 6 * 3 <= 7 * 4
        (3, 4, 1, 1, 1),  # storing costs nothing that could be measured
        (10, 4, 4, 3, math.inf),
        (10, 4, 5, 3, math.inf),
        (10, 0, 0, math.inf, math.inf),
    ],
)
def test_breaking_even_is_the_least_number_that_pays(once, anew, read, epochs, fits):
    assert _epochs_to_break_even(once, anew) == epochs
    assert _fits_to_break_even(once, anew, read) == fits


def test_heads_without_epochs_are_fitted_once():
    assert _one_epoch(EarlyFusionClassifier()) == {"max_epochs": 1, "warm_start": True}
    assert _one_epoch(MLPClassifier()) == {"max_iter": 1, "warm_start": True}
    assert _one_epoch(MLPClassifier(solver="lbfgs")) == {}
    assert _one_epoch(LogisticRegression()) == {}


def test_parameters_are_counted_where_they_are_known(clusters):
    X, y = clusters
    assert _n_parameters(LogisticRegression().fit(X, y)) == 3 * 20 + 3
    assert math.isnan(_n_parameters(RandomForestClassifier(2).fit(X, y)))
    head = DecisionFusionClassifier(GaussianNB(), blocks={"all": slice(0, 20)}).fit(X, y)
    assert math.isnan(_n_parameters(head))  # its weights are those of modalities


def test_warming_up_takes_rows_that_show_each_column():
    X = pd.DataFrame({"a": [None, "x", "y"], "b": [None, None, 1.0], "c": [None] * 3})
    assert _rows_that_show_all(X).tolist() == [1, 2]
    assert _rows_that_show_all(X[["c"]]).tolist() == [0]
    assert _rows_that_show_all([None, np.zeros((2, 2, 3)), np.zeros((4, 4, 3))]).tolist() == [1]


def test_the_split_is_stratified_where_it_can_be():
    X = list(range(40))
    *_, test = _split(X, [0] * 36 + [1] * 4, 0.25, 0)
    assert test.tolist().count(1) == 1
    *_, test = _split(X, [0] * 39 + [1], 0.25, 0)
    assert len(test) == 10


def test_what_cannot_be_measured_is_refused_before_any_work(text_backend, store):
    encoder = FrozenEncoder(text_backend, store=store)
    good = make_pipeline(encoder, LogisticRegression())
    X, y = ["a", "b", "c", "d"], [0, 1, 0, 1]
    with pytest.raises(TypeError, match=r"must be a scikit-learn Pipeline; got FrozenEncoder"):
        efficiency_report(encoder, X, y)
    with pytest.raises(TypeError, match=r"must be a classifier; 'ridge' is Ridge"):
        efficiency_report(make_pipeline(encoder, Ridge()), X, y)
    with pytest.raises(TypeError, match=r"must be a classifier; 'passthrough' is 'passthrough'"):
        efficiency_report(make_pipeline(encoder, "passthrough"), X, y)
    with pytest.raises(ValueError, match=r"before 'logisticregression' holds a FrozenEncoder"):
        efficiency_report(make_pipeline(StandardScaler(), LogisticRegression()), X, y)
    with pytest.raises(ValueError, match="n_epochs must be at least 1; got 0"):
        efficiency_report(good, X, y, n_epochs=0)
    with pytest.raises(TypeError, match="n_epochs must be an integer; got 1.5"):
        efficiency_report(good, X, y, n_epochs=1.5)
    with pytest.raises(ValueError, match="NaN or None in 1 of 4 rows"):
        efficiency_report(good, X, [0, 1, None, 1])
    assert isinstance(encoder.store, EmbeddingStore)
    assert not store.path.exists()
