"""efficiency_report and few_label_curve: figures, rows of each arm, and errors."""

import math
import threading
import time

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.compose import make_column_transformer
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.feature_selection import SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    ShuffleSplit,
    StratifiedKFold,
    cross_validate,
    train_test_split,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    DecisionFusionClassifier,
    EmbeddingStore,
    FrozenEncoder,
    FusionClassifier,
    PerModalityUnion,
)
from sklembed.evaluation import efficiency_report, few_label_curve
from sklembed.evaluation.efficiency import (
    _epochs_to_break_even,
    _fits_to_break_even,
    _measure,
    _Meter,
    _metered_encoders,
    _rows_covering_columns,
    _single_epoch_params,
    _split,
    n_parameters,
)
from sklembed.evaluation.few_labels import _auroc, _Fold, _labelling_order

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
    """Make a backend that is slow to load and to encode."""

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
    """Return sixty rows of a text and an image; some repeat and some are missing."""
    rng = np.random.default_rng(0)
    y = np.repeat(["no", "yes"], 30)
    notes = np.array(
        ["a" * (i % 7 + 1) + "b" * 9 * (label == "yes") for i, label in enumerate(y)]
    )
    notes = notes.astype(object)
    notes[::6] = None
    images = np.empty(60, dtype=object)
    for i in range(60):
        images[i] = (
            None if i % 9 == 4 else np.full((2, 2, 3), rng.integers(12), dtype=np.uint8)
        )
    return pd.DataFrame({"note": notes, "scan": images}), y


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "own.sqlite"
    return make_pipeline(
        PerModalityUnion(
            [
                ("text", FrozenEncoder(slow_backend("text"), store=own), "note"),
                (
                    "image",
                    make_pipeline(FrozenEncoder(slow_backend("image"), store=own)),
                    "scan",
                ),
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


def test_raw_encodes_in_every_epoch_and_the_store_each_distinct_cell_once(
    report, table
):
    X, y = table
    train, test = train_test_split(X, stratify=y, random_state=0)
    raw = N_EPOCHS * distinct(train) + 2 * distinct(test)
    assert report["cells encoded"].tolist() == [raw, distinct(X)]


def test_seconds_are_those_of_the_models_and_not_of_loading_them(report, table):
    X, y = table
    train, test = train_test_split(X, stratify=y, random_state=0)
    # The branches run in parallel, and time that they share counts once.
    texts, images = train["note"].nunique(), distinct(train) - train["note"].nunique()
    least = SECONDS_A_CELL * max(texts, images)
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

    backend = CallableBackend(
        load, name="bad", version="1", modality="text", n_features=1
    )
    pipeline = make_pipeline(FrozenEncoder(backend), LogisticRegression())
    with pytest.raises(RuntimeError, match="bad day") as caught:
        efficiency_report(pipeline, ["a", "b", "c", "d"], [0, 1, 0, 1])
    assert "the arm 'raw' of efficiency_report" in caught.value.__notes__[-1]


# Tests in this process


def measure(arm, pipeline, X, y, folder, n_epochs=2):
    return _measure(arm, pipeline, _split(X, y, 0.25, 0), n_epochs, folder, {})


@pytest.fixture
def texts():
    return [f"{'a' * (i % 5)} {'or' * (i % 4)}" for i in range(40)], [
        i % 2 for i in range(40)
    ]


@pytest.mark.parametrize("arm", ["raw", "stored"])
def test_torch_heads_are_trained_by_the_epoch(arm, text_backend, texts, tmp_path):
    head = FusionClassifier(
        "early",
        hidden_layer_sizes=(8,),
        blocks={"text": slice(0, 9)},
        max_epochs=7,
        random_state=0,
    )
    pipeline = make_pipeline(FrozenEncoder(text_backend), head)
    found = measure(arm, pipeline, *texts, tmp_path)
    assert head.n_iter_ == 2
    linear, normalised, output = 9 * 8 + 8, 2 * 8, 8 + 1
    assert found["parameters trained"] == linear + normalised + output


def test_training_between_encoder_and_head_is_no_encoding(
    text_backend, texts, tmp_path
):
    def pause(vectors):
        time.sleep(0.5)
        return vectors

    projector = ContrastiveProjector(2, max_epochs=2, cv=2, random_state=0)
    steps = FunctionTransformer(pause), projector, LogisticRegression()
    found = measure(
        "stored", make_pipeline(FrozenEncoder(text_backend), *steps), *texts, tmp_path
    )
    assert found["encode s"] < 0.5 < found["fit s"]


def test_the_head_sees_the_cross_fitted_features_in_both_arms(
    text_backend, texts, tmp_path
):
    def coefficients(arm):
        projector = ContrastiveProjector(2, max_epochs=2, cv=2, random_state=0)
        head = LogisticRegression()
        pipeline = make_pipeline(FrozenEncoder(text_backend), projector, head)
        measure(arm, pipeline, *texts, tmp_path)
        return head.coef_

    np.testing.assert_allclose(coefficients("raw"), coefficients("stored"), rtol=1e-4)


def test_a_reader_is_not_an_encoder(text_backend, store):
    with _metered_encoders() as meter:
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
        with meter.timing(), meter.timing():
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
        (3, 4, 1, 1, 1),  # the cost of storing is not measurable
        (10, 4, 4, 3, math.inf),
        (10, 4, 5, 3, math.inf),
        (10, 0, 0, math.inf, math.inf),
    ],
)
def test_breaking_even_is_the_least_number_that_pays(once, anew, read, epochs, fits):
    assert _epochs_to_break_even(once, anew) == epochs
    assert _fits_to_break_even(once, anew, read) == fits


def test_heads_without_epochs_are_fitted_once():
    assert _single_epoch_params(FusionClassifier()) == {
        "max_epochs": 1,
        "warm_start": True,
    }
    assert _single_epoch_params(MLPClassifier()) == {"max_iter": 1, "warm_start": True}
    assert _single_epoch_params(MLPClassifier(solver="lbfgs")) == {}
    assert _single_epoch_params(LogisticRegression()) == {}


def test_parameters_are_counted_where_they_are_known(clusters):
    X, y = clusters
    assert n_parameters(LogisticRegression().fit(X, y)) == 3 * 20 + 3
    assert math.isnan(n_parameters(RandomForestClassifier(2).fit(X, y)))
    head = DecisionFusionClassifier(GaussianNB(), blocks={"all": slice(0, 20)}).fit(
        X, y
    )
    assert math.isnan(n_parameters(head))  # of several classifiers


def test_warming_up_takes_rows_that_show_each_column():
    X = pd.DataFrame({"a": [None, "x", "y"], "b": [None, None, 1.0], "c": [None] * 3})
    assert _rows_covering_columns(X).tolist() == [1, 2]
    assert _rows_covering_columns(X[["c"]]).tolist() == [0]
    assert _rows_covering_columns(
        [None, np.zeros((2, 2, 3)), np.zeros((4, 4, 3))]
    ).tolist() == [1]


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
    with pytest.raises(
        TypeError, match=r"must be a scikit-learn Pipeline; got FrozenEncoder"
    ):
        efficiency_report(encoder, X, y)
    with pytest.raises(TypeError, match=r"must be a classifier; 'ridge' is Ridge"):
        efficiency_report(make_pipeline(encoder, Ridge()), X, y)
    with pytest.raises(
        TypeError, match=r"must be a classifier; 'passthrough' is 'passthrough'"
    ):
        efficiency_report(make_pipeline(encoder, "passthrough"), X, y)
    with pytest.raises(
        ValueError, match=r"before 'logisticregression' contains a FrozenEncoder"
    ):
        efficiency_report(make_pipeline(StandardScaler(), LogisticRegression()), X, y)
    with pytest.raises(ValueError, match="n_epochs must be at least 1; got 0"):
        efficiency_report(good, X, y, n_epochs=0)
    with pytest.raises(TypeError, match="n_epochs must be an integer; got 1.5"):
        efficiency_report(good, X, y, n_epochs=1.5)
    with pytest.raises(ValueError, match="NaN or None in 1 of 4 rows"):
        efficiency_report(good, X, [0, 1, None, 1])
    assert isinstance(encoder.store, EmbeddingStore)
    assert not store.path.exists()


# Few labels


def parliament(sizes, n_seats):
    """Allocate seats by the method of Sainte-Laguë, after one seat for each party."""
    seats = np.ones(len(sizes), dtype=int)
    while seats.sum() < n_seats:
        seats[np.argmax(sizes / (2 * seats + 1))] += 1
    return seats


SIZES = np.array(
    [100, 54, 29, 8, 1]
)  # of different parity, so that no two quotients are equal


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_given_as_seats_in_a_parliament(seed):
    y = np.repeat(list("edcba"), SIZES[::-1])
    order = _labelling_order(y, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(y)))
    for n_labelled in range(len(SIZES), len(y) + 1):
        counts = pd.Series(y[order[:n_labelled]]).value_counts().sort_index()
        assert counts.tolist() == parliament(SIZES, n_labelled).tolist()


def test_labels_are_given_at_random():
    y = np.repeat([0, 1], [30, 10])
    orders = [_labelling_order(y, np.random.default_rng(seed)) for seed in range(400)]
    times = np.bincount(
        np.ravel([order[:4] for order in orders]), minlength=40
    )  # 3 + 1 rows
    assert abs(times - 40).max() < 5 * math.sqrt(
        400 * 0.1 * 0.9
    )  # each row one time in ten
    first = [y[order[0]] for order in orders]
    assert 100 < sum(first)  # no class always comes first


@pytest.mark.parametrize(
    ("fraction", "n_labelled"),
    [(0.01, 3), (0.02, 4), (0.1, 20), (0.333, 67), (1.0, 200), (1, 200)],
)
def test_the_number_of_labels_is_exact(fraction, n_labelled):
    y = np.repeat([0, 1, 2], [150, 45, 5])
    train = 7 * np.arange(200)
    order = _labelling_order(y, np.random.default_rng(0))
    rows = _Fold(0, 0, train[order], np.array([1]), 3).labelled(fraction)
    assert len(rows) == n_labelled
    assert (np.diff(rows) > 0).all()
    assert set(y[rows // 7]) == {0, 1, 2}
    assert set(rows) <= set(train)


@pytest.fixture
def few():
    """Return three classes in five columns, the first with row numbers, and 15 groups."""
    X, y = make_classification(
        n_samples=150,
        n_features=4,
        n_informative=3,
        n_redundant=0,
        n_classes=3,
        random_state=0,
    )
    groups = np.random.default_rng(0).permutation(np.arange(150) % 15)
    return np.column_stack([np.arange(150), X]), np.array(["c", "a", "b"])[y], groups


class Watched(ClassifierMixin, BaseEstimator):
    """A classifier that logs the rows of each call."""

    log: list = []

    def __init__(self, name="head", random_state=None):
        self.name = name
        self.random_state = random_state

    def fit(self, X, y):
        self.log.append((self.name, "fit", X[:, 0].astype(int).tolist(), list(y)))
        assert self.random_state is None
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        self.log.append((self.name, "predict", X[:, 0].astype(int).tolist(), None))
        return np.full(len(X), self.classes_[0])


class Doubling(TransformerMixin, BaseEstimator):
    """Transformer that doubles columns; fit_transform appends zeros, as a stand-in."""

    log: list = []

    def __init__(self, name="doubling"):
        self.name = name

    def fit(self, X, y=None):
        self.log.append((self.name, X[:, 0].astype(int).tolist(), y is not None))
        self.n_features_in_ = X.shape[1]
        return self

    def fit_transform(self, X, y=None):
        self.fit(X, y)
        return np.hstack([X, np.zeros_like(X)])

    def transform(self, X):
        return np.hstack([X, X])


@pytest.fixture
def logs():
    Watched.log.clear()
    Doubling.log.clear()
    return Watched.log, Doubling.log


def test_a_row_for_each_arm_fraction_seed_and_fold(few):
    X, y, _ = few
    curve = few_label_curve(
        KNeighborsClassifier(1),
        X,
        y,
        pretrained={"zeta": StandardScaler(), "PCA": PCA(2)},
        supervised={"best": SelectKBest(k=2), "bayes": GaussianNB()},
        fractions=(0.5, 0.2),
        cv=3,
        n_seeds=2,
        random_state=0,
    )
    keys = ["arm", "fraction", "seed", "fold"]
    arms = ["control", "zeta", "PCA", "best", "bayes"]
    every = pd.MultiIndex.from_product(
        [arms, (0.5, 0.2), range(2), range(3)], names=keys
    )
    assert pd.MultiIndex.from_frame(curve[keys]).equals(every)
    scores = ["f1_macro", "accuracy", "roc_auc_ovr"]
    assert curve.columns.tolist() == [
        *keys[:2],
        "n_labelled",
        *keys[2:],
        *scores,
        "fit s",
    ]
    assert curve["n_labelled"].tolist() == ([50] * 6 + [20] * 6) * 5
    assert curve[scores].stack().between(0, 1).all()
    assert (curve["fit s"] > 0).all()


def test_all_arms_see_the_same_labelled_rows_nested_and_stratified(few, logs):
    X, y, _ = few
    fractions = (0.02, 0.1, 1.0)
    few_label_curve(
        Watched(),
        X,
        y,
        pretrained={"pretrained": Doubling()},
        supervised={"transformer": Doubling(), "classifier": Watched("other")},
        fractions=fractions,
        cv=3,
        n_seeds=2,
        scoring="accuracy",
        random_state=0,
    )
    fits = [call for call in Watched.log if call[1] == "fit"]
    tests = [call[2] for call in Watched.log if call[1] == "predict"]
    assert [call[0] for call in fits] == (["head"] * 9 + ["other"] * 3) * 6
    drawn = set()
    for fold in range(6):
        shown = [
            (rows, labels) for _, _, rows, labels in fits[12 * fold : 12 * (fold + 1)]
        ]
        assert shown[:3] == shown[3:6] == shown[6:9] == shown[9:]
        few_rows, more, everything = (set(rows) for rows, _ in shown[:3])
        assert few_rows < more < everything
        assert [len(rows) for rows, _ in shown[:3]] == [3, 10, 100]
        for rows, labels in shown[:3]:
            assert labels == y[rows].tolist()
            assert set(labels) == {"a", "b", "c"}
        test = tests[12 * fold]
        assert tests[12 * fold : 12 * (fold + 1)] == [test] * 12
        assert sorted(everything | set(test)) == list(range(150))
        drawn.add(tuple(sorted(more)))
    assert len(drawn) == 6  # anew in each fold of each seed


def test_pretraining_sees_all_training_rows_once_and_no_label(few, logs):
    X, y, _ = few
    few_label_curve(
        Watched(),
        X,
        y,
        pretrained={"without": Doubling("without")},
        supervised={"with": Doubling("with")},
        fractions=(0.1, 0.5, 1.0),
        cv=3,
        n_seeds=2,
        scoring="accuracy",
    )
    without = [call for call in Doubling.log if call[0] == "without"]
    assert [(len(rows), labelled) for _, rows, labelled in without] == [
        (100, False)
    ] * 6
    assert all(np.all(np.diff(rows) > 0) for _, rows, _ in without)
    tests = [call[2] for call in Watched.log if call[1] == "predict"][::9]
    for (_, rows, _), test in zip(without, tests, strict=True):
        assert not set(rows) & set(test)
    labelled = [
        (len(rows), labelled) for name, rows, labelled in Doubling.log if name == "with"
    ]
    assert labelled == [(10, True), (50, True), (100, True)] * 6


def test_the_head_learns_from_fit_transform_of_a_supervised_arm_alone(few):
    class Shown(Watched):
        def fit(self, X, y):
            columns[X.shape[1] if X[:, -1].any() else -X.shape[1]] += 1
            return super().fit(X, y)

    X, y, _ = few
    columns = {5: 0, 10: 0, -10: 0}
    few_label_curve(
        Shown(),
        X,
        y,
        pretrained={"pretrained": Doubling()},
        supervised={"cross-fitted": Doubling()},
        fractions=(0.5,),
        cv=2,
        n_seeds=1,
        scoring="accuracy",
    )
    assert columns == {5: 2, 10: 2, -10: 2}


@pytest.mark.parametrize("n_classes", [2, 3])
def test_with_all_labels_it_is_cross_validation(n_classes, few):
    X, y, _ = few
    X, y = (X[y != "c"], y[y != "c"]) if n_classes == 2 else (X, y)
    X = X[:, 1:]
    cv = StratifiedKFold(4, shuffle=True, random_state=3)
    head = LogisticRegression()
    curve = few_label_curve(
        head,
        X,
        y,
        pretrained={"PCA": PCA(2)},
        supervised={"best": SelectKBest(k=2), "bayes": GaussianNB()},
        fractions=(1.0,),
        cv=cv,
        n_seeds=1,
    )
    arms = {
        "control": head,
        "PCA": make_pipeline(PCA(2), head),
        "best": make_pipeline(SelectKBest(k=2), head),
        "bayes": GaussianNB(),
    }
    scoring = ["f1_macro", "accuracy", "roc_auc_ovr"]
    for arm, estimator in arms.items():
        expected = cross_validate(estimator, X, y, cv=cv, scoring=scoring)
        for name in scoring:
            found = curve.loc[curve["arm"] == arm, name]
            np.testing.assert_allclose(
                found, expected[f"test_{name}"], err_msg=f"{arm}, {name}"
            )


def test_what_is_both_is_a_classifier_unless_passed_through(few):
    X, y, _ = few
    both = LinearDiscriminantAnalysis()
    curve = few_label_curve(
        Watched(),  # predicts a single class
        X,
        y,
        supervised={
            "classifier": both,
            "transformer": make_pipeline(both, "passthrough"),
        },
        fractions=(1.0,),
        cv=2,
        n_seeds=1,
        scoring="accuracy",
    )
    accuracy = curve.groupby("arm")["accuracy"].mean()
    assert accuracy["control"] == accuracy["transformer"] < accuracy["classifier"] - 0.1


def rows_tested(logs):
    return [call[2] for call in logs[0] if call[1] == "predict"]


def test_folds_of_an_int_are_stratified_and_shuffled_by_the_seed(few, logs):
    X, y, _ = few
    few_label_curve(
        Watched(), X, y, fractions=(1,), cv=3, n_seeds=2, scoring="accuracy"
    )
    tests = rows_tested(logs)
    first, second = (
        sorted(map(tuple, tests[part])) for part in (slice(3), slice(3, 6))
    )
    assert sorted(np.concatenate(first)) == list(range(150))
    assert first != second
    for test in tests:
        assert pd.Series(y[test]).value_counts().between(16, 17).all()


def test_folds_of_an_int_keep_groups_together(few, logs):
    X, y, groups = few
    few_label_curve(
        Watched(),
        X,
        y,
        groups=groups,
        fractions=(1,),
        cv=3,
        n_seeds=2,
        scoring="accuracy",
    )
    tests = rows_tested(logs)
    assert len(tests) == 6
    for test in tests:
        assert not set(groups[test]) & set(np.delete(groups, test))
    assert set(map(tuple, tests[:3])) != set(map(tuple, tests[3:]))


def test_a_splitter_splits_alike_for_every_seed_and_gets_the_groups(few, logs):
    X, y, groups = few
    common = {
        "groups": groups,
        "fractions": (0.1,),
        "n_seeds": 2,
        "scoring": "accuracy",
    }
    few_label_curve(Watched(), X, y, cv=GroupKFold(3), **common)
    expected = [test.tolist() for _, test in GroupKFold(3).split(X, y, groups)]
    assert rows_tested(logs) == 2 * expected
    labelled = [call[2] for call in Watched.log if call[1] == "fit"]
    assert labelled[:3] != labelled[3:]  # labelled rows still depend on the seed


def test_folds_may_be_listed(few, logs):
    X, y, _ = few
    folds = [
        (np.arange(100), np.arange(100, 150)),
        (np.arange(100), np.arange(110, 150)),
    ]
    few_label_curve(
        Watched(), X, y, cv=iter(folds), fractions=(0.1,), n_seeds=2, scoring="accuracy"
    )
    assert rows_tested(logs) == 2 * [test.tolist() for _, test in folds]
    labelled = [tuple(call[2]) for call in Watched.log if call[1] == "fit"]
    assert len(set(labelled)) == 4  # drawn anew by seed and by fold


def test_tables_stay_tables(few):
    X, y, _ = few
    columns = ["row", "text__0", "text__1", "image__0", "image__1"]
    seen = []

    class Named(Watched):
        def fit(self, X, y):
            seen.append(X.columns.tolist())
            return super().fit(X.to_numpy(), y)

        def predict(self, X):
            return super().predict(X.to_numpy())

    X = pd.DataFrame(X, columns=columns, index=np.arange(150)[::-1])
    image = make_column_transformer(("passthrough", ["image__0", "image__1"]))
    image.set_output(transform="pandas")
    few_label_curve(
        Named(),
        X,
        y,
        pretrained={"image": image},
        supervised={"best": SelectKBest(k=2).set_output(transform="pandas")},
        fractions=(0.5,),
        cv=2,
        n_seeds=1,
        scoring="accuracy",
    )
    assert seen[0] == columns
    assert seen[1] == ["passthrough__image__0", "passthrough__image__1"]
    assert set(seen[2]) < set(columns)


def test_a_list_of_labels_and_a_column_do(few):
    X, y, _ = few
    common = {"fractions": (0.5,), "cv": 2, "n_seeds": 1, "random_state": 0}
    expected = few_label_curve(GaussianNB(), X, y, **common)
    for labels in (
        y.tolist(),
        pd.Series(y, index=np.arange(150)[::-1]),
        y.astype(object),
    ):
        found = few_label_curve(GaussianNB(), X.tolist(), labels, **common)
        assert without_seconds(found).equals(without_seconds(expected))


def without_seconds(curve):
    return curve.drop(columns="fit s")


def test_the_random_state_decides(few):
    X, y, _ = few

    def curve(random_state, **options):
        found = few_label_curve(
            GaussianNB(), X, y, random_state=random_state, cv=3, n_seeds=2, **options
        )
        return without_seconds(found)

    once = curve(0)
    assert once.equals(curve(0))
    assert once.equals(curve(np.random.RandomState(0)))
    assert not once.equals(curve(1))
    with parallel_config(backend="threading"):
        assert once.equals(curve(0, n_jobs=2))


def test_folds_run_in_processes(few):
    X, y, _ = few
    options = {
        "supervised": {"trees": RandomForestClassifier(2, random_state=0)},
        "cv": 2,
    }
    alone, together = (
        few_label_curve(
            GaussianNB(), X, y, n_jobs=n_jobs, n_seeds=1, random_state=0, **options
        )
        for n_jobs in (None, 2)
    )
    assert without_seconds(alone).equals(without_seconds(together))


def test_what_is_given_is_left_alone(few):
    X, y, _ = few
    head, pca, best = GaussianNB(), PCA(2), SelectKBest(k=2)
    kept, labels = X.copy(), y.copy()
    arms = {"pretrained": {"PCA": pca}, "supervised": {"best": best}}
    few_label_curve(head, X, y, fractions=(0.5,), cv=2, n_seeds=1, **arms)
    assert not (
        hasattr(head, "theta_") or hasattr(pca, "mean_") or hasattr(best, "scores_")
    )
    np.testing.assert_array_equal(X, kept)
    np.testing.assert_array_equal(y, labels)


def test_pretraining_counts_in_each_fraction(few):
    class Slow(Doubling):
        def fit(self, X, y=None):
            time.sleep(0.2)
            return super().fit(X, y)

    X, y, _ = few
    common = {"cv": 2, "n_seeds": 1, "scoring": "accuracy"}
    arms = {"pretrained": {"before": Slow()}, "supervised": {"within": Slow()}}
    start = time.perf_counter()
    curve = few_label_curve(
        Watched(), X, y, fractions=(0.1, 0.5, 1.0), **arms, **common
    )
    spent = time.perf_counter() - start
    seconds = curve.groupby("arm")["fit s"]
    assert seconds.min()[["before", "within"]].min() >= 0.2
    assert seconds.sum()["control"] < spent - 8 * 0.2


def test_an_arm_that_fails_says_where(few):
    class Bad(Doubling):
        def fit(self, X, y=None):
            if len(X) > 60:
                raise RuntimeError("too many")
            return super().fit(X, y)

    X, y, _ = few
    common = {"cv": 2, "n_seeds": 1, "scoring": "accuracy", "fractions": (0.1, 1.0)}
    with pytest.raises(RuntimeError, match="too many") as caught:
        few_label_curve(
            Watched(), X, y, supervised={"bad": Bad()}, error_score="raise", **common
        )
    note = "This was in arm 'bad', fraction 1.0, seed 0, fold 0 of few_label_curve."
    assert caught.value.__notes__ == [note]
    with pytest.raises(RuntimeError, match="too many") as caught:
        few_label_curve(Watched(), X, y, pretrained={"bad": Bad()}, **common)
    assert caught.value.__notes__ == [note.replace(", fraction 1.0", "")]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_arm_that_cannot_be_fitted_on_few_labels_scores_nan_there_with_a_warning(
    few, n_jobs
):
    X, y, _ = few
    search = GridSearchCV(LogisticRegression(), {"C": [1.0, 10.0]}, cv=3)
    with pytest.warns(Warning) as seen:
        curve = few_label_curve(
            LogisticRegression(),
            X,
            y,
            supervised={"search": search},
            fractions=(0.01, 1.0),
            cv=2,
            n_seeds=1,
            scoring="accuracy",
            n_jobs=n_jobs,
        )
    # The search itself warns, too, in the process that fits it.
    messages = []
    for warning in seen:
        is_failure = warning.category is FitFailedWarning
        if is_failure and "few_label_curve" in str(warning.message):
            messages.append(str(warning.message))
    (message,) = messages
    assert (
        "Fitting failed in arm 'search', fraction 0.01, seed 0, fold 0; arm 'search', "
        "fraction 0.01, seed 0, fold 1: ValueError" in message
    )
    failed = curve["accuracy"].isna()
    assert (failed == ((curve["arm"] == "search") & (curve["fraction"] == 0.01))).all()
    assert (curve["fit s"].isna() == failed).all()


def test_scores_of_pairs_are_no_scores_of_classes_where_there_are_as_many(few):
    X, y, _ = few
    assert len(np.unique(y)) == 3
    with pytest.raises(
        ValueError, match="needs a score for each of 3 classes.* of pairs"
    ):
        few_label_curve(
            SVC(decision_function_shape="ovo"), X, y, fractions=1.0, cv=2, n_seeds=1
        )


def test_what_is_pretrained_is_run_once_a_fold(few):
    calls = []

    class Counted(Doubling):
        def transform(self, X):
            calls.append(len(X))
            return super().transform(X)

    X, y, _ = few
    few_label_curve(GaussianNB(), X, y, pretrained={"a": Counted()}, cv=2, n_seeds=2)
    assert len(calls) == 2 * 2 * 2  # training and test rows of each fold


class Said(BaseEstimator):
    """A classifier that returns predefined scores."""

    def __init__(self, classes, scores, method="predict_proba"):
        self.classes, self.scores, self.method = classes, scores, method
        self.classes_ = np.array(classes)
        setattr(self, method, lambda X: np.asarray(scores))


def pairs_in_order(scores, positive):
    """Return the fraction of pairs of a positive and a negative in the right order."""
    a, b = np.asarray(scores)[positive], np.asarray(scores)[~positive]
    ahead = (a[:, None] > b).sum() + (a[:, None] == b).sum() / 2
    return ahead / (len(a) * len(b))


def test_auroc_is_the_mean_over_classes_that_can_have_one():
    rng = np.random.default_rng(0)
    y = np.array(
        list("aabbbccad")
    )  # d was not among the training labels, e is not here
    scores = rng.integers(5, size=(9, 4)) / 4
    head = Said(list("abce"), scores)
    expected = [
        pairs_in_order(scores[:, i], y == label) for i, label in enumerate("abc")
    ]
    assert _auroc(head, None, y) == pytest.approx(np.mean(expected))
    assert _auroc(
        Said(list("abce"), scores, "decision_function"), None, y
    ) == pytest.approx(np.mean(expected))


def test_auroc_of_two_classes_is_that_of_the_second():
    y = np.array([0, 1, 1, 0, 1])
    p = np.array([0.2, 0.9, 0.1, 0.3, 0.8])
    expected = pairs_in_order(p, y == 1)
    assert _auroc(Said([0, 1], np.column_stack([1 - p, p])), None, y) == pytest.approx(
        expected
    )
    assert _auroc(Said([0, 1], p, "decision_function"), None, y) == pytest.approx(
        expected
    )
    # Tiny probabilities differ where their complements round to 1.
    tiny = np.array([1e-20, 1e-19, 1e-18, 1e-21, 1e-17])
    assert _auroc(Said([0, 1], np.column_stack([1 - tiny, tiny])), None, y) == 1


def test_auroc_is_nan_where_no_class_can_have_one():
    proba = np.full((3, 3), 1 / 3)
    assert math.isnan(_auroc(Said([0, 1, 2], proba), None, np.array([1, 1, 1])))
    assert math.isnan(_auroc(Said([0, 1, 2], proba), None, np.array([3, 4, 3])))


@pytest.mark.parametrize(
    "head", [LogisticRegression(), GaussianNB(), SVC(), RidgeClassifier()]
)
def test_auroc_is_that_of_scikit_learn(few, head):
    X, y, _ = few
    X = StandardScaler().fit_transform(X)
    for rows in (y != "", y != "b"):
        fitted = head.fit(X[rows], y[rows])
        found = _auroc(fitted, X[rows], y[rows])
        if hasattr(fitted, "predict_proba"):
            assert found == pytest.approx(
                get_scorer("roc_auc_ovr")(fitted, X[rows], y[rows])
            )
        else:
            assert found > 0.8


def test_auroc_refuses_scores_of_pairs_of_classes():
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = np.arange(40) % 4
    head = SVC(decision_function_shape="ovo")
    with pytest.raises(
        ValueError, match="a score for each of 4 classes, but SVC.* returns 6"
    ):
        few_label_curve(head, X, y, cv=2, n_seeds=1)


def test_a_class_of_one_row_is_never_learned_where_it_is_tested(few):
    X, y, _ = few
    y = y.astype(object)
    y[10] = "alone"
    with pytest.warns(
        UserWarning, match="The least populated class in y has only 1 member"
    ):
        curve = few_label_curve(KNeighborsClassifier(1), X, y, cv=3, n_seeds=1)
    assert curve[["f1_macro", "accuracy", "roc_auc_ovr"]].notna().all(axis=None)
    # It is among the labelled rows of the two folds that train on it.
    assert sorted(curve.loc[curve["fraction"] == 0.01, "n_labelled"]) == [3, 4, 4]


def test_training_rows_of_one_class_are_refused(few):
    X, y, _ = few
    rows = np.argsort(y, kind="stable")
    n_first = int((y == "a").sum())
    folds = [(rows[n_first - 5 :], rows[:5]), (rows[:n_first], rows[n_first:])]
    with pytest.raises(
        ValueError, match=r"rows of seed 0, fold 1 are all of the class 'a'"
    ):
        few_label_curve(Never(), X, y, cv=folds)
    with pytest.raises(ValueError, match="fold 0 are all of the class"):
        few_label_curve(Never(), X, ["a"] * 150)


class Never(Watched):
    """A classifier that must not be fitted."""

    def fit(self, X, y):
        raise AssertionError("This was to be refused before any work.")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": PCA()}, TypeError, r"head must be a classifier; got PCA"),
        ({"head": Ridge()}, TypeError, r"head must be a classifier; got Ridge"),
        ({"head": "LR"}, TypeError, r"head must be a classifier; got 'LR'"),
        (
            {"pretrained": {"a": GaussianNB()}},
            TypeError,
            "need no labels; 'a' is GaussianNB",
        ),
        (
            {"supervised": {"a": Ridge()}},
            TypeError,
            "transformers or classifiers; 'a' is Ridge",
        ),
        (
            {"supervised": {"control": PCA()}},
            ValueError,
            "The name 'control' is reserved for the head on X",
        ),
        (
            {"pretrained": {"control": PCA()}},
            ValueError,
            "The name 'control' is reserved for the head on X",
        ),
        (
            {"pretrained": {"a": PCA(), "b": PCA()}, "supervised": {"b": PCA()}},
            ValueError,
            r"The arms \['b'\] are in pretrained and in supervised",
        ),
        ({"fractions": ()}, ValueError, r"one or more distinct numbers; got \[\]"),
        ({"fractions": (0.1, 0.1)}, ValueError, "distinct numbers"),
        (
            {"fractions": (0.1, 0.0)},
            ValueError,
            r"above 0 and up to 1; got \[0.1, 0.0\]",
        ),
        ({"fractions": (1.01,)}, ValueError, "above 0 and up to 1"),
        ({"fractions": (10, 100)}, ValueError, "above 0 and up to 1"),
        ({"fractions": (math.nan,)}, ValueError, "above 0 and up to 1"),
        ({"fractions": ("1 %",)}, ValueError, "above 0 and up to 1"),
        ({"n_seeds": 0}, ValueError, "n_seeds must be at least 1; got 0"),
        ({"n_seeds": 2.0}, TypeError, "n_seeds must be an integer; got 2.0"),
        (
            {"scoring": "f2"},
            ValueError,
            r"one or more names of scorers; got \['f2'\]",
        ),
        ({"scoring": ("accuracy", "f2")}, ValueError, r"got \['f2'\]"),
        ({"scoring": ()}, ValueError, r"names of scorers; got \[\]"),
        ({"y": [0, 1, None] * 50}, ValueError, "NaN or None in 50 of 150 rows"),
        (
            {"y": np.linspace(0, 1, 150)},
            ValueError,
            "one class for each row.*'continuous'",
        ),
        (
            {"y": np.eye(3)[[0, 1, 2] * 50]},
            ValueError,
            "one class for each row; got shape",
        ),
        (
            {"y": np.outer(np.arange(150) % 3, [1, 2])},
            ValueError,
            "'multiclass-multioutput'",
        ),
        ({"y": [0, 1, 2]}, ValueError, "inconsistent numbers of samples"),
        ({"groups": [0, 1, 2]}, ValueError, "inconsistent numbers of samples"),
        ({"cv": 1}, ValueError, "at least one train/test split"),
        ({"cv": 151}, ValueError, "n_splits=151 greater than the number of samples"),
    ],
)
def test_what_makes_no_curve_is_refused_before_any_work(few, options, error, message):
    X, y, _ = few
    options = {"head": Never(), "y": y} | options
    with pytest.raises(error, match=message):
        few_label_curve(options.pop("head"), X, options.pop("y"), **options)


def test_a_projector_takes_its_place(clusters):
    X, y = clusters
    projector = ContrastiveProjector(4, max_epochs=2, cv=2, random_state=0)
    curve = few_label_curve(
        LogisticRegression(),
        X,
        y,
        pretrained={"scaled": StandardScaler()},
        supervised={
            "cross-fitted": projector,
            "early": FusionClassifier(
                "early",
                hidden_layer_sizes=(4,),
                blocks={"all": slice(0, 20)},
                max_epochs=2,
                random_state=0,
            ),
        },
        fractions=(0.2, 1.0),
        cv=ShuffleSplit(1, test_size=0.5, random_state=0),
        n_seeds=1,
    )
    assert curve.notna().all(axis=None)
    assert curve["n_labelled"].tolist() == [9, 45] * 4
