"""modality_report: Shapley values, refits on subsets, noise and missing modalities."""

from itertools import permutations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from numpy.testing import assert_allclose
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import ColumnTransformer
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import get_scorer
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklembed import (
    CallableBackend,
    FrozenEncoder,
    KernelFusionClassifier,
    MultimodalVectorizer,
    PerModalityUnion,
)
from sklembed.evaluation import modality_report
from sklembed.evaluation.modalities import shapley_values
from sklembed.plots import ModalityDisplay

matplotlib.use("Agg")
BLOCKS = {"text": slice(0, 4), "image": [7, 4, 5], "table": [6, 8]}
CV = StratifiedKFold(3, shuffle=True, random_state=0)
IMPUTED = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression())


@pytest.fixture(scope="module")
def vectors():
    """Return three blocks: the first tells most of the class, the last nothing."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = rng.normal(size=(90, 9))
    X[:, :4] += 2 * rng.normal(size=(3, 4))[y]
    X[:, [7, 4, 5]] += rng.normal(size=(3, 3))[y]
    return X, np.array(["a", "b", "c"])[y]


def means(table, by, column="score"):
    return table.groupby(by, sort=False)[column].mean()


@pytest.mark.parametrize("n_players", [1, 2, 3, 4])
def test_shapley_values_are_mean_gains_over_orders(n_players):
    scores = np.random.default_rng(n_players).normal(size=(5, 2**n_players))
    expected = np.zeros((5, n_players))
    orders = list(permutations(range(n_players)))
    for order in orders:
        joined = 0
        for player in order:
            gain = scores[:, joined | 1 << player] - scores[:, joined]
            expected[:, player] += gain / len(orders)
            joined |= 1 << player
    values = shapley_values(scores)
    assert_allclose(values, expected, atol=1e-12)
    assert_allclose(values.sum(axis=1), scores[:, -1] - scores[:, 0], atol=1e-12)


def test_scores_are_those_of_fits_on_the_columns_of_each_subset(vectors):
    X, y = vectors
    report = modality_report(
        IMPUTED, X, y, blocks=BLOCKS, cv=CV, scoring="f1_macro", random_state=0
    )
    columns = {"text": [0, 1, 2, 3], "image": [4, 5, 7], "table": [6, 8]}
    subsets = report.subsets.groupby("modalities", sort=False)["score"]
    assert list(subsets.groups) == [
        "none",
        "text",
        "image",
        "table",
        "text + image",
        "text + table",
        "image + table",
        "text + image + table",
    ]
    for subset, scores in subsets:
        model, part = IMPUTED, X
        if subset == "none":
            model = DummyClassifier()
        else:
            names = subset.split(" + ")
            part = X[:, sorted(sum((columns[name] for name in names), []))]
        expected = cross_val_score(model, part, y, cv=CV, scoring="f1_macro")
        assert_allclose(scores, expected, err_msg=subset)
    fold = report.subsets.pivot_table("score", "fold", "modalities")
    sums = report.shapley.groupby("fold")["value"].sum()
    assert_allclose(sums, fold["text + image + table"] - fold["none"], atol=1e-9)
    values = means(report.shapley, "modality", "value")
    assert values["text"] > values["image"] > values["table"]


def test_blocks_of_the_estimator_are_restricted(vectors):
    X, y = vectors
    options = {"gamma": 1.0, "alpha": 1.0, "table_blocks": ["table"]}
    fusion = KernelFusionClassifier(blocks=BLOCKS, **options)
    report = modality_report(fusion, X, y, cv=CV, missing=(), noise=())
    assert report.degradation.empty
    subsets = report.subsets.groupby("modalities")["score"]
    blocks = {"image": [2, 0, 1], "table": slice(3, 5)}
    smaller = KernelFusionClassifier(blocks=blocks, **options)
    part = X[:, [4, 5, 7, 6, 8]]
    expected = cross_val_score(smaller, part, y, cv=CV)
    assert_allclose(subsets.get_group("image + table"), expected)
    names = ["text__0", "text__1", "text__2", "text__3", "image__0", "image__1"]
    frame = pd.DataFrame(X[:, :6], columns=names)
    fusion.set_params(blocks=None, table_blocks=[])
    report = modality_report(fusion, frame, y, cv=CV, missing=(), noise=())
    expected = cross_val_score(fusion, frame.iloc[:, :4], y, cv=CV)
    subsets = report.subsets.groupby("modalities")["score"]
    assert_allclose(subsets.get_group("text"), expected)


@pytest.mark.parametrize("container", [np.asarray, pd.DataFrame])
def test_a_modality_degrades_without_another_fit(vectors, container):
    X, y = vectors
    X = container(X)
    options = {"blocks": BLOCKS, "cv": CV, "random_state": 0}
    report = modality_report(
        IMPUTED, X, y, noise=[1e-9, 100], missing=[0.5, 1], **options
    )
    rows = report.degradation
    assert rows.groupby(["modality", "kind"]).size().unique().tolist() == [9]
    complete = report.subsets.query("n_modalities == 3")["score"].to_numpy()
    scorer = get_scorer("accuracy")
    without = []
    for train, test in CV.split(X, y):
        fitted = IMPUTED.fit(np.asarray(X)[train], y[train])
        Z = np.array(X)[test]
        Z[:, BLOCKS["text"]] = np.nan
        without.append(scorer(fitted, Z, y[test]))
    for kind in ("noise", "missing"):
        part = rows[(rows["modality"] == "text") & (rows["kind"] == kind)]
        part = part.set_index("level")
        assert_allclose(part.loc[0, "score"], complete)
        assert_allclose(part["loss"], complete[part["fold"]] - part["score"])
    text = rows.query("modality == 'text'").set_index(["kind", "level"]).sort_index()
    assert_allclose(text.loc[("missing", 1.0), "score"], without)
    assert_allclose(text.loc[("noise", 1e-9), "score"], complete)
    losses = means(text, ["kind", "level"], "loss")
    assert 0 < losses["missing", 0.5] < losses["missing", 1]
    assert losses["noise", 100] > 0.3
    table = rows.query("modality == 'table' and kind == 'missing'")
    assert table["loss"].abs().max() < losses["missing", 0.5]
    options |= {"noise": [1e-9, 100], "missing": [0.5, 1], "n_jobs": 2}
    with parallel_config(backend="threading"):
        again = modality_report(IMPUTED, X, y, **options)
    pd.testing.assert_frame_equal(again.degradation, rows)


def test_noise_is_relative_to_the_spread_of_each_column(vectors):
    X, y = vectors
    options = {"blocks": BLOCKS, "cv": CV, "noise": [1.0], "missing": ()}
    lda = LinearDiscriminantAnalysis()
    report = modality_report(lda, X, y, random_state=3, **options)
    scaled = X * 10.0 ** np.arange(9) - 5
    other = modality_report(lda, scaled, y, random_state=3, **options)
    pd.testing.assert_frame_equal(report.degradation, other.degradation)


@pytest.fixture
def table():
    """Return texts and numbers, in which the text tells the class."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    notes = [f"{'good ' * label}row {i}" for i, label in enumerate(y)]
    notes[3] = None
    return pd.DataFrame({"note": notes, "size": rng.normal(size=60)}), y


@pytest.fixture
def letters(store):
    """Return an encoder, and the list of the texts that it has encoded."""
    encoded = []

    def load():
        def encode(texts):
            encoded.extend(texts)
            return [[text.count(letter) for letter in "gowi"] for text in texts]

        return encode

    backend = CallableBackend(
        load, name="letters", version="modality_report", modality="text", n_features=4
    )
    return FrozenEncoder(backend, store=store), encoded


def test_the_branches_of_a_pipeline_are_modalities(table, letters):
    X, y = table
    encoder, encoded = letters
    branches = [
        ("vectors", encoder, "note"),
        ("words", make_pipeline(StandardScaler()), ["size"]),
        ("again", encoder, ["note"]),
    ]
    union = PerModalityUnion(branches)
    pipeline = make_pipeline(union, SimpleImputer(), LogisticRegression())
    report = modality_report(pipeline, X, y, cv=CV, random_state=0, noise=[1.0])
    assert sorted(encoded) == sorted(X["note"].dropna())
    values = means(report.shapley, "modality", "value")
    assert values.index.tolist() == ["words", "vectors/again"]
    assert values["vectors/again"] > 0.4
    alone = PerModalityUnion(branches[1:2])
    pipeline = make_pipeline(alone, SimpleImputer(), LogisticRegression())
    subsets = report.subsets.groupby("modalities")["score"]
    expected = cross_val_score(pipeline, X, y, cv=CV)
    assert_allclose(subsets.get_group("words"), expected)
    worst = report.degradation.query("level == 1 and modality != 'words'")
    losses = means(worst, "kind", "loss")
    assert losses["missing"] > 0.3
    assert losses["noise"] > 0


def test_the_columns_of_a_vectorizer_are_modalities(table, letters):
    X, y = table
    vectorizer = MultimodalVectorizer(
        text_encoder=letters[0], kinds={"note": "text"}, lexical=False
    )
    pipeline = make_pipeline(vectorizer, SimpleImputer(), LogisticRegression())
    report = modality_report(pipeline, X, y, cv=2, noise=(), missing=[1.0])
    assert report.shapley["modality"].unique().tolist() == ["note", "table"]
    # Blocks are columns of X, also if their order is another one.
    blocks = {"number": ["size"], "text": ["note"]}
    other = modality_report(pipeline, X, y, cv=2, blocks=blocks, noise=(), missing=())
    values = means(report.shapley, "modality", "value")
    others = means(other.shapley, "modality", "value")
    assert_allclose(values[["table", "note"]], others[["number", "text"]])
    assert values["note"] > 0.4


def test_regression_starts_from_the_mean(vectors):
    X, y = vectors
    target = np.unique(y, return_inverse=True)[1] + X[:, 0]
    report = modality_report(
        Ridge(), X, target, blocks=BLOCKS, cv=3, missing=(), noise=[1.0], verbose=1
    )
    scores = means(report.subsets, "modalities")
    assert scores["none"] < 0.05
    assert scores["text + image + table"] > 0.5


class FailsWithoutText(ClassifierMixin, BaseEstimator):
    """Refuses tables of fewer than seven columns."""

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        if X.shape[1] < 7:
            raise RuntimeError("too narrow")
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_fit_that_fails_gets_the_error_score(vectors, n_jobs):
    X, y = vectors
    options = {"blocks": BLOCKS, "cv": CV, "missing": (), "noise": (), "n_jobs": n_jobs}
    with pytest.warns(FitFailedWarning) as record:
        report = modality_report(FailsWithoutText(), X, y, **options)
    (warning,) = record
    places = []
    for fold in range(3):
        for subset in ("text", "image", "table", "text + table", "image + table"):
            places.append(f"fold {fold} with {subset!r}")
    assert str(warning.message).splitlines()[1:] == [
        f"Fitting or scoring failed in {'; '.join(places[:10])}; and 5 more: "
        "RuntimeError('too narrow')"
    ]
    subsets = report.subsets.set_index("modalities")["score"]
    assert subsets["text"].isna().all() and subsets["text + image"].notna().all()
    with pytest.raises(RuntimeError, match="too narrow") as raised:
        modality_report(FailsWithoutText(), X, y, error_score="raise", **options)
    assert raised.value.__notes__ == [
        "This was in fold 0 with 'text' of modality_report."
    ]


def pipeline_of(*branches, **options):
    return make_pipeline(PerModalityUnion(list(branches), **options), IMPUTED)


TEXT = ("text", make_pipeline(FunctionTransformer()), [0, 1])


@pytest.mark.parametrize(
    "estimator, options, message",
    [
        (IMPUTED, {"blocks": {"all": slice(0, 9)}}, "one modality"),
        (IMPUTED, {"blocks": {str(i): [i] for i in range(9)}}, "9 modal.*512 subsets"),
        (IMPUTED, {}, "no names"),
        (IMPUTED, {"blocks": {"none": [0], "b": slice(1, 9)}}, "'none' is not a valid"),
        (LogisticRegression(), {"blocks": BLOCKS}, "does not accept NaN"),
        (IMPUTED, {"blocks": BLOCKS, "noise": [0]}, "noise must be"),
        (IMPUTED, {"blocks": BLOCKS, "missing": [1.5]}, "missing must be.*up to 1"),
        (IMPUTED, {"blocks": BLOCKS, "cv": []}, "no folds"),
        (
            IMPUTED,
            {"blocks": BLOCKS, "cv": [([0, 1, 2], [])]},
            "Fold 0 of cv has 3 training and 0 test rows",
        ),
        (pipeline_of(TEXT), {}, "one modality"),
        (
            pipeline_of(TEXT, ("b", StandardScaler(), [2])),
            {"blocks": {"x": [0], "y": [1, 2]}},
            "branch 'text' are in 0 of the modalities",
        ),
        (
            pipeline_of(TEXT, ("b", StandardScaler(), [2])),
            {"blocks": {"x": [0, 1], "y": [2], "z": [3]}},
            "No branch reads a column of the modality 'z'",
        ),
        (
            make_pipeline(
                PerModalityUnion([TEXT]),
                KernelFusionClassifier(blocks=BLOCKS),
            ),
            {},
            "cannot be restricted",
        ),
    ],
)
def test_bad_input_is_refused_before_a_fit(vectors, estimator, options, message):
    X, y = vectors
    with pytest.raises(ValueError, match=message):
        modality_report(estimator, X, y, **options)


def test_a_transformer_is_refused(vectors):
    with pytest.raises(TypeError, match="must be a classifier or regressor"):
        modality_report(make_pipeline(StandardScaler()), *vectors, blocks=BLOCKS)


def test_several_scores_and_an_unknown_error_score_are_refused(vectors):
    with pytest.raises(TypeError, match="must be one score"):
        modality_report(IMPUTED, *vectors, blocks=BLOCKS, scoring=["accuracy"])
    with pytest.raises(ValueError, match="error_score must be"):
        modality_report(IMPUTED, *vectors, blocks=BLOCKS, error_score="nan")


def test_text_in_a_table_of_embeddings_is_refused(table):
    X, y = table
    pipeline = make_pipeline(
        ColumnTransformer([("words", CountVectorizer(), "note")]), LogisticRegression()
    )
    with pytest.raises(ValueError, match="column 'note' has the type"):
        modality_report(pipeline, X, y, blocks={"a": ["note"], "b": ["size"]})


def test_a_display_shows_means_and_spread(vectors):
    X, y = vectors
    report = modality_report(IMPUTED, X, y, blocks=BLOCKS, cv=CV, random_state=0)
    display = ModalityDisplay.from_report(report).plot()
    assert len(display.axes_) == 3
    bars = display.axes_[0].patches
    values = means(report.shapley, "modality", "value")
    assert_allclose([bar.get_width() for bar in bars], values.to_numpy())
    labels = [text.get_text() for text in display.axes_[1].get_legend().get_texts()]
    assert labels == list(BLOCKS)
    missing = report.degradation.query("kind == 'missing' and modality == 'image'")
    line = display.axes_[2].containers[1].lines[0]
    assert display.axes_[2].get_title() == "missing at test time"
    drawn = np.asarray(line.get_ydata(), dtype=float)
    assert_allclose(drawn, means(missing, "level").to_numpy())
    with pytest.raises(ValueError, match="3 panels to draw; got 1"):
        display.plot(axes=[display.axes_[0]])
    small = ModalityDisplay(shapley=report.shapley).plot()
    assert len(small.axes_) == 1
    import matplotlib.pyplot as plt

    plt.close("all")
