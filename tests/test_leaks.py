"""leak_report: neighbours, thresholds, groups, scores and columns, and errors."""

import io
import re
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import FitFailedWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline

from sklembed import CallableBackend, FrozenEncoder, PerModalityUnion
from sklembed._validation import draw_seed
from sklembed.evaluation import leak_report, leaks, neighbours
from sklembed.evaluation.single_columns import score_columns
from sklembed.plots import LeakDisplay

matplotlib.use("Agg")
N_ROWS, N_COPIES = 120, 20
WORDS = "red blue green round square small tall old new open shut warm".split()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def vectors():
    """Return rows of two classes, the last of which are noisy copies of the first."""
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=N_ROWS)
    X = rng.normal(size=(N_ROWS, 24)) + y[:, None]
    X[-N_COPIES:] = X[:N_COPIES] + rng.normal(scale=0.02, size=(N_COPIES, 24))
    y[-N_COPIES:] = y[:N_COPIES]
    return X, y


@pytest.fixture(scope="module")
def table():
    """Return texts, images and columns; the last rows are changed copies of the first."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(["no", "yes"], N_ROWS // 2))
    notes, scans = [], []
    for _ in range(N_ROWS):
        notes.append(" ".join(rng.choice(WORDS, size=9)))
        scans.append(rng.integers(256, size=(8, 8, 3)).astype(np.uint8))
    for copy in range(N_COPIES):
        notes[N_ROWS - N_COPIES + copy] = notes[copy].upper()
        scans[N_ROWS - N_COPIES + copy] = np.maximum(scans[copy], 3)
    y[-N_COPIES:] = y[:N_COPIES]
    notes[::7] = [None] * len(notes[::7])
    by_target = np.argsort(np.argsort(y == "yes", kind="stable"))
    files = [f"{label}_{i:03}.png" for i, label in enumerate(y)]
    frame = pd.DataFrame(
        {
            "note": notes,
            "scan": pd.Series([png(scan) for scan in scans], dtype=object),
            "id": 1000 + by_target,
            "file": files,
            "size": rng.normal(size=N_ROWS),
        }
    )
    return frame, y


def letter_pairs(texts):
    """Encode texts by their pairs of letters, whatever the case."""
    vectors = np.zeros((len(texts), 64))
    for row, text in enumerate(texts):
        for first, second in zip(text.lower(), text.lower()[1:], strict=False):
            vectors[row, (ord(first) * 31 + ord(second)) % 64] += 1
    return vectors


def pixels(images):
    return np.array([np.asarray(image, dtype=float).ravel() - 128 for image in images])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    store = tmp_path_factory.mktemp("leaks") / "store.sqlite"
    text = CallableBackend(
        lambda: letter_pairs, name="p", version="1", modality="text", n_features=64
    )
    image = CallableBackend(
        lambda: pixels, name="x", version="1", modality="image", n_features=192
    )
    return FrozenEncoder(text, store=store), FrozenEncoder(image, store=store)


@pytest.fixture(scope="module")
def pipeline(encoders):
    union = PerModalityUnion(
        [
            (
                "text",
                make_pipeline(encoders[0], PCA(4)),
                ["note"],
            ),  # skips missing rows
            ("image", encoders[1], ["scan"]),
        ]
    )
    imputer = SimpleImputer(strategy="constant", fill_value=0.0)
    return make_pipeline(union, imputer, LogisticRegression(max_iter=1000))


@pytest.fixture(scope="module")
def report(pipeline, table):
    return leak_report(pipeline, *table, random_state=0)


def whitened_cosines(X):
    """Return cosines under the inverse covariance, without eigenvectors."""
    observed = ~np.isnan(X).any(axis=1)
    centred = X - X[observed].mean(axis=0)
    covariance = np.cov(centred[observed].T, bias=True)
    ridge = 0.1 * np.trace(covariance) / len(covariance)
    products = centred @ np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
    products = products @ centred.T
    norms = np.sqrt(np.diag(products))
    return products / np.outer(norms, norms)


@pytest.mark.parametrize("cv", [KFold(3), ShuffleSplit(2, random_state=0)])
def test_nearest_rows_equal_a_double_loop(vectors, cv, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_CELLS", 7 * N_ROWS)  # several blocks
    X, y = vectors
    X = X.copy()
    X[3] = np.nan
    X[50] = X[60]
    limit = 0.02
    report = leak_report(
        DummyClassifier(), X, y, cv, vectors={"a": X}, threshold=limit, random_state=0
    )
    similarity = whitened_cosines(X)
    nearest = report.nearest_.set_index(["fold", "row"])
    n_tested = 0
    for fold, (train, test) in enumerate(cv.split(X)):
        for i in set(test) - {3}:
            distances = {j: 1 - similarity[i, j] for j in set(train) - {3}}
            expected = min(distances.values())
            found = nearest.loc[(fold, i)]
            assert found["distance"] == pytest.approx(expected, abs=1e-5)
            assert distances[found["nearest"]] == pytest.approx(expected, abs=1e-5)
            assert found["leaked"] == (expected < limit)
            n_tested += 1
    assert len(nearest) == n_tested
    merged = set()
    for i in range(N_ROWS):
        for j in range(i):
            if 1 - similarity[i, j] < limit:
                merged.add(frozenset((i, j)))
    for i in range(N_ROWS):
        for j in range(i):
            if frozenset((i, j)) in merged:
                assert report.groups_[i] == report.groups_[j]
    n_merged = N_ROWS - len(np.unique(report.groups_))
    assert n_merged == len(merged) == N_COPIES  # disjoint pairs, less the missing row
    assert report.nearest_.query("row == 50")["equal"].isin([True, False]).all()


def test_threshold_marks_the_promised_share_of_random_rows():
    """Of rows without duplicates, false_alarms have a neighbour below the threshold."""
    shares = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        # A surface of two dimensions, of constant density.
        angles = rng.uniform(0, 2 * np.pi, size=(1500, 2))
        X = np.hstack([np.cos(angles), np.sin(angles)])
        space = neighbours._block_space("a", X)
        labels = rng.integers(3, size=1500)
        record = neighbours._estimate_threshold(space, labels, None, True, 0.05, 0.5)
        assert record["dimension"] == pytest.approx(2, rel=0.1)
        similarity = space.vectors @ space.vectors.T
        same_class = labels[:, None] == labels
        similarity[~same_class | np.eye(1500, dtype=bool)] = -1
        shares.append((1 - similarity.max(axis=1) < record["threshold"]).mean())
    assert np.mean(shares) == pytest.approx(0.05, abs=0.015)


def test_duplicates_hardly_change_the_threshold():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 20))
    copies = X[:40] + rng.normal(scale=1e-3, size=(40, 20))
    limits = []
    for rows in (X, np.vstack([X, copies])):
        report = leak_report(DummyClassifier(), rows, np.arange(len(rows)) % 2, 2)
        limits.append(report.thresholds_.loc["X", "threshold"])
    assert limits[1] == pytest.approx(limits[0], rel=0.1)
    assert limits[0] > 0


def test_repeated_cells_are_no_leak():
    """A column of few distinct cells identifies no row, so its threshold is zero."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 20))[rng.integers(6, size=200)]
    report = leak_report(DummyClassifier(), X, np.arange(200) % 2, random_state=0)
    assert report.thresholds_.loc["X", "threshold"] == 0
    assert not report.leaked_rows_.any()
    assert len(np.unique(report.groups_)) == 200
    assert report.duplicates_.loc["X", "share across folds"] == 1


def test_common_cells_of_a_column_are_no_leak():
    """If a tenth of the cells are common, equal cells of the other rows are no leak."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    vectors = {name: rng.normal(size=(300, 20)) for name in ("a", "b")}
    vectors["a"][:60] = vectors["a"][0]
    vectors["a"][60:64] = vectors["a"][64:68]
    report = leak_report(
        DummyClassifier(), np.zeros((300, 1)), y, vectors=vectors, random_state=0
    )
    assert report.thresholds_.loc["a", "threshold"] == 0
    assert (report.thresholds_.loc[["b", "(all)"], "threshold"] > 0).all()
    assert not report.nearest_.query("column == 'a'")["leaked"].any()


def test_changed_copies_are_found_by_the_encoders(report, table):
    frame, _ = table
    copies = np.arange(N_ROWS - N_COPIES, N_ROWS)
    images = report.nearest_[report.nearest_["column"] == "scan"].set_index("row")
    texts = report.nearest_[report.nearest_["column"] == "note"].set_index("row")
    assert len(texts) == frame["note"].notna().sum()
    in_same_fold = images.loc[copies, "fold"].to_numpy() == (
        images.loc[copies - copies[0], "fold"].to_numpy()
    )
    across = copies[~in_same_fold]
    assert len(across) > 10
    assert images.loc[across, "leaked"].all()
    assert (images.loc[across, "nearest"] == across - copies[0]).all()
    for row in across:
        if row in texts.index and row - copies[0] in texts.index:
            assert texts.loc[row, ["nearest", "leaked"]].tolist() == [
                row - copies[0],
                True,
            ]
    assert (report.groups_[copies] == report.groups_[copies - copies[0]]).all()
    assert len(np.unique(report.groups_)) == N_ROWS - N_COPIES


def test_images_are_compared_by_embeddings_and_pixels(tmp_path):
    """Pixels find what an embedding that depends on every byte cannot."""
    rng = np.random.default_rng(0)
    originals, copies = [], []
    for number in range(40):
        small = Image.fromarray(rng.integers(256, size=(6, 6, 3)).astype(np.uint8))
        image = small.resize((64, 48), Image.Resampling.BICUBIC)
        originals.append(image)
        if number % 3 == 0:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=40)
            copies.append(Image.open(file))
        elif number % 3 == 1:
            copies.append(image.resize((40, 30)))
        else:
            copies.append(image.crop((4, 3, 60, 46)))
    frame = pd.DataFrame({"scan": pd.Series(originals + copies, dtype=object)})

    def embed(images):
        vectors = []
        for image in images:
            seed = int(np.asarray(image).sum())
            vectors.append(np.random.default_rng(seed).normal(size=200))
        return np.array(vectors)

    backend = CallableBackend(
        lambda: embed, name="r", version="1", modality="image", n_features=200
    )
    encoder = FrozenEncoder(backend, store=tmp_path / "store.sqlite")
    pipeline = make_pipeline(encoder, LogisticRegression())
    (space,), _ = neighbours.make_spaces(pipeline, frame, None)
    similarities = space.similarities(np.arange(80))

    images = frame["scan"].map(lambda image: image.convert("RGB"))
    pixels = []
    for share in (1, 0.88):
        for image in images:
            margins = [(1 - share) / 2 * side for side in image.size]
            sides = [share * side for side in image.size]
            box = (*margins, margins[0] + sides[0], margins[1] + sides[1])
            small = image.resize((12, 12), Image.Resampling.BOX, box=box)
            pixels.append(np.asarray(small, dtype=float).ravel())
    pixels = np.array(pixels) - np.mean(pixels[:80], axis=0)
    covariance = np.cov(pixels[:80].T, bias=True)
    ridge = 0.1 * np.trace(covariance) / len(covariance)
    products = pixels @ np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
    products = products @ pixels.T
    cosines = products / np.sqrt(np.outer(np.diag(products), np.diag(products)))
    of_pixels = np.maximum(cosines[:80, :80], cosines[:80, 80:])
    of_pixels = np.maximum(of_pixels, cosines[80:, :80])
    of_embeddings = whitened_cosines(np.asarray(encoder.fit_transform(frame)))
    expected = (of_embeddings + of_pixels) / 2
    np.testing.assert_allclose(similarities, expected, atol=1e-4)
    np.fill_diagonal(similarities, -1)
    assert (similarities[40:].argmax(axis=1) == np.arange(40)).all()


def test_scores_equal_those_of_cross_validation(report, pipeline, table):
    frame, y = table
    seed = draw_seed(0)
    cv = StratifiedKFold(5, shuffle=True, random_state=seed)
    expected = cross_val_score(pipeline, frame, y, cv=cv)
    scores = report.scores_.set_index(["arm", "fold"])["accuracy"]
    assert scores["all rows"].to_numpy() == pytest.approx(expected)
    sizes = report.scores_.pivot(index="fold", columns="arm", values="n_test")
    assert (
        sizes["without leaked rows"] + sizes["leaked rows"] == sizes["all rows"]
    ).all()
    weighted = scores["without leaked rows"] * sizes["without leaked rows"]
    weighted += scores["leaked rows"] * sizes["leaked rows"]
    assert (weighted / sizes["all rows"]).to_numpy() == pytest.approx(expected)
    assert report.summary().loc["all rows", "n_test"] == N_ROWS


def test_suggested_groups_leave_no_leak(report, pipeline, table):
    groups = report.groups_
    again = leak_report(pipeline, *table, GroupKFold(5), groups, random_state=0)
    pairs = again.pairs_[again.pairs_["column"] == "scan"]
    assert pairs.empty


def test_groups_are_kept_together(vectors):
    X, y = vectors
    groups = np.arange(N_ROWS) // 2
    report = leak_report(LogisticRegression(), X, y, 3, groups, random_state=0)
    assert (report.groups_[::2] == report.groups_[1::2]).all()
    folds = report.nearest_.set_index("row")["fold"]
    assert (folds[::2].to_numpy() == folds[1::2].to_numpy()).shape == (N_ROWS // 2,)
    by_row = folds.sort_index().to_numpy()
    assert (by_row[::2] == by_row[1::2]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the splitter ignores groups
        leak_report(LogisticRegression(), X, y, StratifiedKFold(3), groups)


def test_identifiers_that_predict_the_target_are_suspicious(report):
    columns = report.columns_.set_index("column")
    assert columns.loc["id", "kind"] == "identifier"
    assert columns.loc["file", "kind"] == "file name"
    assert columns.loc[["id", "file"], "score"].min() > 0.9
    assert columns["suspicious"].to_dict() == {
        "id": True,
        "file": True,
        "size": False,
        "note": False,
        "scan": False,
    }
    assert "'file' (file name) alone predicts the target" in repr(report)


def repeated(n_values, n_rows_of_value, n_targets, rng):
    """Return shuffled values, and a target that depends on the value alone."""
    values = rng.permutation(np.repeat(np.arange(n_values), n_rows_of_value))
    return values, rng.integers(n_targets, size=n_values)[values]


def columns_of(frame, y, classes=True, by_patient=False):
    """Return the scores of the columns of a table."""
    folds = list(KFold(5, shuffle=True, random_state=0).split(frame))
    if by_patient:
        folds = list(GroupKFold(5).split(frame, groups=frame["patient"]))
    return score_columns(frame, y, folds, classes, seed=0).set_index("column")


@pytest.mark.parametrize("n_classes", [2, 7])
@pytest.mark.parametrize("form", ["int", "float", "code", "full name", "category"])
def test_identifiers_that_repeat_are_groups(form, n_classes):
    rng = np.random.default_rng(n_classes)
    values, y = repeated(60, 3, n_classes, rng)
    cells = {
        "int": values + 1000,
        "float": np.where(np.arange(180) % 30, values + 1000.0, np.nan),
        "code": [f"P{value:03}" for value in values],
        "full name": [f"Ann Mc{'abcdefgh'[v % 8]}{'lmnopqrs'[v // 8]}" for v in values],
        "category": pd.Categorical(values),
    }
    frame = pd.DataFrame(
        {"patient": cells[form], "row": np.arange(180), "size": rng.normal(size=180)}
    )
    columns = columns_of(frame, y)
    assert columns["groups"].to_dict() == {"patient": True, "row": False, "size": False}
    assert columns.loc["patient", "suspicious"]
    assert columns.loc["patient", "score"] == 1
    assert columns.loc["patient", "permuted"] < 0.8
    # In folds of patients, no value is on both sides.
    frame["patient"] = values
    assert not columns_of(frame, y, by_patient=True)["groups"].any()


def test_the_report_advises_to_pass_groups(vectors):
    X, _ = vectors
    values, y = repeated(N_ROWS // 3, 3, 2, np.random.default_rng(0))
    frame = pd.DataFrame({"patient": values})
    options = {"vectors": {"text": X[: len(y)]}, "random_state": 0}
    report = leak_report(DummyClassifier(), frame, y, **options)
    assert "drop the column and pass groups=X['patient']." in repr(report)
    report = leak_report(DummyClassifier(), frame.to_numpy(), y, **options)
    assert "drop the column and pass groups=its values." in repr(report)
    report = leak_report(DummyClassifier(), frame, y, groups=values, **options)
    assert "groups=" not in repr(report)


def test_features_that_repeat_are_no_groups():
    rng = np.random.default_rng(0)
    n_rows = 600
    colours = np.array(list("abcdefghij"))
    colour = rng.integers(10, size=n_rows)  # predicts the target exactly
    y = colour % 2
    town, rates = rng.integers(60, size=n_rows), rng.random(60)
    y[colour > 7] = rng.random((colour > 7).sum()) < rates[town[colour > 7]]
    frame = pd.DataFrame(
        {
            "colour": colours[colour],
            "town": [f"town {value:02}" for value in town],
            "row": rng.permutation(n_rows),
            "pressure": np.round(rng.normal(size=n_rows) + y, 1),
            "patient": np.arange(n_rows) // 2,  # of no influence
        }
    )
    assert not columns_of(frame, y)["groups"].any()


def test_groups_of_a_regression_and_of_many_rows():
    rng = np.random.default_rng(0)
    values, _ = repeated(4000, 3, 2, rng)  # more rows than single columns are tested on
    level = rng.normal(size=4000)
    y = level[values] + 0.1 * rng.normal(size=12_000)
    frame = pd.DataFrame({"patient": values, "noise": rng.integers(4000, size=12_000)})
    columns = columns_of(frame, y, classes=False)
    assert columns["groups"].to_dict() == {"patient": True, "noise": False}
    assert columns.loc["patient", "score"] > 0.9


def test_dates_and_numbers_of_a_regression(vectors):
    X, _ = vectors
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"noise": rng.normal(size=N_ROWS)})
    days = rng.permutation(N_ROWS)
    frame["day"] = pd.Timestamp("2026-01-01") + pd.to_timedelta(days, "D")
    y = days + rng.normal(size=N_ROWS)
    selecting = make_pipeline(_Selector(), Ridge())
    report = leak_report(selecting, frame, y, vectors={"text": X}, random_state=0)
    assert report.score_names_ == ["r2"]
    columns = report.columns_.set_index("column")
    assert columns.loc["day", "suspicious"]
    assert columns.loc["day", "score"] > 0.9
    assert not columns.loc["noise", "suspicious"]


class _Selector(BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X[["noise"]]


def test_blocks_are_read_from_names_and_parameters(vectors):
    X, y = vectors
    names = [f"text__{i}" for i in range(16)] + [f"table__{i}" for i in range(8)]
    frame = pd.DataFrame(X, columns=names)
    report = leak_report(LogisticRegression(), frame, y, 3, random_state=0)
    assert report.thresholds_.index.tolist() == ["text"]
    assert sorted(report.columns_["column"]) == names[16:]


def test_a_table_without_embeddings_still_has_scores_and_columns(vectors):
    X, y = vectors
    with pytest.warns(UserWarning, match="no embeddings to compare"):
        report = leak_report(LogisticRegression(), X[:, :3], y, random_state=0)
    assert report.pairs_.empty
    assert not report.leaked_rows_.any()
    assert len(report.columns_) == 3
    means = report.summary()["accuracy"]
    assert means["all rows"] == means["without leaked rows"] > 0.5
    assert report._repr_html_()


@pytest.mark.parametrize("form", ["array", "list"])
def test_containers_without_index(encoders, table, form):
    frame, y = table
    texts = frame["note"].fillna("").tolist()
    model = make_pipeline(encoders[0], LogisticRegression(max_iter=1000))
    X = texts if form == "list" else np.array(texts, dtype=object).reshape(-1, 1)
    report = leak_report(model, X, y, 3, random_state=0)
    assert len(report.nearest_) == N_ROWS
    search = GridSearchCV(model, {"logisticregression__C": [0.1, 1]}, cv=2)
    again = leak_report(search, X, y, 3, random_state=0)
    assert (again.groups_ == report.groups_).all()


class _FailsOnce(ClassifierMixin, BaseEstimator):
    def fit(self, X, y):
        if X[0, 0] == -99:
            raise ArithmeticError("no solution")
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_failing_fold_loses_nothing_else(vectors, n_jobs):
    X, y = vectors
    X = X.copy()
    X[0, 0] = -99
    folds = list(KFold(3).split(X))  # row 0 is in the training rows of folds 1 and 2
    options = {"error_score": -1, "random_state": 0, "n_jobs": n_jobs}
    with pytest.warns(FitFailedWarning) as record:
        report = leak_report(_FailsOnce(), X, y, folds, **options)
    (warning,) = record
    match = r"Fitting failed in fold 1 \(all rows\); fold 2 \(all rows\); fold . \(sug"
    assert re.search(match, str(warning.message))
    assert warning.filename == __file__
    scores = report.scores_.set_index(["arm", "fold"])["accuracy"]
    assert scores["all rows"].tolist()[1:] == [-1, -1]
    assert scores[("all rows", 0)] >= 0
    with pytest.raises(ArithmeticError) as caught:
        leak_report(_FailsOnce(), X, y, folds, error_score="raise", n_jobs=n_jobs)
    assert "fold 1" in caught.value.__notes__[0]


def test_a_failing_scorer_loses_nothing_else(vectors):
    X, y = vectors
    with pytest.warns(
        FitFailedWarning, match="scorer .neg_log_loss. failed in fold 0 .all rows.;"
    ):
        report = leak_report(
            RidgeClassifier(), X, y, scoring=["neg_log_loss", "accuracy"]
        )
    assert report.scores_["neg_log_loss"].isna().all()
    arm = report.scores_[report.scores_["arm"] == "all rows"]
    assert arm["accuracy"].notna().all()


def test_folds_without_a_class_are_named(vectors):
    X, y = vectors
    y = y.copy()
    y[:5] = 7
    with pytest.warns(UserWarning, match=r"fold 0 lack the classes \[7\]"):
        leak_report(LogisticRegression(), X, y, KFold(6), random_state=0)


def test_html_is_escaped_and_has_thumbnails(encoders, table):
    frame, y = table
    frame = frame.assign(note="<script>" + frame["note"].fillna("none"))
    union = PerModalityUnion(
        [("t", encoders[0], ["note"]), ("i", encoders[1], ["scan"])]
    )
    report = leak_report(
        make_pipeline(union, DummyClassifier()),
        frame,
        y,
        threshold={"scan": 0.05, "note": 1e-3},
        random_state=0,
    )
    html = report._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert len(report._examples) > leaks._N_EXAMPLES
    assert html.count("data:image/jpeg;base64,") == 2 * len(report._examples)
    assert len(html) < 200_000


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"threshold": {"b": 0.1}}, ValueError, r"\['b'\], but the columns"),
        ({"threshold": -1}, ValueError, "between 0 and 2"),
        ({"threshold": None}, TypeError, "threshold must be"),
        ({"false_alarms": 0}, ValueError, "false_alarms"),
        ({"error_score": "x"}, ValueError, "error_score"),
        ({"groups": [None] * N_ROWS}, ValueError, "groups has no value in 120 rows"),
        ({"y": np.zeros((N_ROWS, 2))}, ValueError, "one target for each row"),
        ({"y": [None] * N_ROWS}, ValueError, "first in row 0"),
        ({"cv": [(np.arange(9), [])]}, ValueError, "Fold 0 of cv has 9 training and 0"),
        ({"estimator": PCA()}, TypeError, "estimator must be"),
        ({"estimator": LogisticRegression}, TypeError, "estimator must be"),
        ({"vectors": {"a": np.ones((3, 2))}}, ValueError, "inconsistent"),
    ],
)
def test_bad_input(vectors, change, error, match):
    X, y = vectors
    options = {"estimator": LogisticRegression(), "X": X, "y": y} | change
    with pytest.raises(error, match=match):
        leak_report(**options)


def test_display_shows_distances_and_scores(report):
    display = LeakDisplay.from_report(report).plot()
    assert list(display.distances) == ["note", "scan", "(all)"]
    assert len(display.axes_) == 4
    assert len(display.axes_[0].patches) == 2
    labels = [text.get_text() for text in display.axes_[1].get_legend().get_texts()]
    n_leaked = np.count_nonzero(
        report.nearest_.query("column == 'scan'")["leaked"].to_numpy()
    )
    assert f"leaked: {n_leaked}" in labels
    ticks = [tick.get_text() for tick in display.axes_[3].get_xticklabels()]
    assert ticks[0] == "all\nrows"
    assert display.axes_[3].get_ylabel() == "accuracy"
    with pytest.raises(ValueError, match="but not 'r2'"):
        LeakDisplay.from_report(report, score="r2")
    with pytest.raises(ValueError, match="4 panels"):
        display.plot(axes=display.axes_[:1])
    matplotlib.pyplot.close("all")
