"""rank_encoders: rungs, cells that are encoded, scores, and resumption."""

import uuid

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import HalvingGridSearchCV, KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.evaluation import rank_encoders
from sklembed.evaluation.encoder_ranking import _closed_form, _plan_rungs

LETTERS = "abcdefg"
N_ROWS = 216


class Letters:
    """Encoders of one letter each, and the texts that each has encoded."""

    def __init__(self, store):
        self.encoded = {letter: [] for letter in LETTERS}
        self.fail_after = np.inf
        self.encoders = {}
        version = uuid.uuid4().hex  # a process keeps models in memory by their version
        for letter in LETTERS:
            backend = CallableBackend(
                lambda letter=letter: self.load(letter),
                name=f"letter {letter}",
                version=version,
                modality="text",
                n_features=2,
            )
            self.encoders[letter] = FrozenEncoder(backend, store=store)

    def load(self, letter):
        def encode(texts):
            if sum(map(len, self.encoded.values())) > self.fail_after:
                raise RuntimeError("power cut")
            self.encoded[letter] += texts
            return [[text.count(letter), len(text)] for text in texts]

        return encode


@pytest.fixture
def letters(store):
    return Letters(store)


@pytest.fixture(scope="module")
def texts():
    """Return texts whose class is told by the letter c, and less by b and d."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(["no", "maybe", "yes"], N_ROWS // 3))
    codes = pd.Series(y).map({"no": 0, "maybe": 3, "yes": 6}).to_numpy()
    spread = {"a": 9, "b": 2, "c": 0, "d": 2, "e": 9, "f": 9, "g": 9}
    cells = []
    for row in range(N_ROWS):
        parts = [f"{row} "]
        for letter, sd in spread.items():
            n = max(0, round(codes[row] + sd * rng.normal()))
            parts.append(letter * n)
        cells.append("".join(parts))
    return np.array(cells, dtype=object), y


@pytest.mark.parametrize("n_encoders", [2, 3, 7, 9, 10])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("min_resources", ["exhaust", "smallest", 20])
def test_rungs_are_those_of_a_halving_search(n_encoders, factor, min_resources):
    n_rows = 130
    search = HalvingGridSearchCV(
        DecisionTreeClassifier(random_state=0),
        {"max_depth": list(range(1, n_encoders + 1))},
        factor=factor,
        min_resources=min_resources,
        cv=2,
    )
    search.fit(np.arange(n_rows)[:, None], np.arange(n_rows) % 2)
    smallest = 2 * 2 * 2
    sizes = _plan_rungs(n_rows, n_encoders, factor, min_resources, 1.0, smallest)
    expected = search.n_resources_
    if min_resources == "exhaust":
        # The search rounds the first rung, and multiplies it.
        assert sizes[-1] == n_rows and len(sizes) == len(expected)
        assert sizes[0] == expected[0] or sizes == [n_rows]
        for size, rounded in zip(sizes, expected, strict=True):
            assert 0 <= size - rounded < factor ** (len(sizes) - 1)
    else:
        assert sizes == expected


def test_the_last_rung_has_all_rows_that_are_allowed():
    sizes = [_plan_rungs(900, 9, 3, "exhaust", 0.5, n) for n in (50, 51, 151, 450)]
    assert sizes == [[50, 150, 450], [150, 450], [450], [450]]
    assert _plan_rungs(1000, 9, 3, "exhaust", 1.0, 50) == [111, 333, 1000]
    assert _plan_rungs(1000, 9, 3, "exhaust", 700, 50) == [77, 233, 700]
    assert _plan_rungs(1000, 5, 1.5, "exhaust", 1.0, 50) == [296, 444, 666, 1000]


def test_an_encoder_encodes_the_rows_of_its_rungs_only(letters, texts):
    X, y = texts
    results, best = rank_encoders(
        letters.encoders, X, y, cv=3, max_resources=1.0, random_state=0
    )
    assert best == "c"
    sizes = results.groupby("rung")["rows"].first().tolist()
    assert sizes == [72, 216]
    assert results.groupby("rung").size().tolist() == [7, 3]
    first, last = results[results["rung"] == 0], results[results["rung"] == 1]
    assert (first["score"].diff()[1:] <= 0).all()
    assert last["encoder"].isin(first["encoder"][:3]).all()
    assert first["dropped at"].tolist() == [pd.NA] * 3 + [0] * 4
    small = set(letters.encoded[first["encoder"].iloc[-1]])
    for letter, encoded in letters.encoded.items():
        assert len(encoded) == (216 if letter in set(last["encoder"]) else 72)
        assert len(set(encoded)) == len(encoded) and small <= set(encoded)
    classes = pd.Series(y[np.isin(X, list(small))]).value_counts()
    assert set(classes) == {24}
    assert results["cells encoded"].tolist() == [72] * 7 + [144] * 3
    assert (results["encode s"] > 0).all()
    per_row = results["encode s"] / results["cells encoded"]
    np.testing.assert_allclose(results["s per 1000 rows"], 1000 * per_row)
    assert set(results["bytes per 1000 rows"]) == {8000}


def test_scores_are_cross_validated_on_the_rows_of_the_rung(letters, texts):
    X, y = texts
    cv = KFold(4, shuffle=True, random_state=1)
    head = LogisticRegression()
    options = {"head": head, "cv": cv, "scoring": "f1_macro", "random_state": 0}
    results, _ = rank_encoders(letters.encoders, X, y, max_resources=1.0, **options)
    for rung, size in ((0, 72), (1, 216)):
        row = results[results["rung"] == rung].set_index("encoder").loc["c"]
        cells = letters.encoded["c"][:size]
        rows = np.flatnonzero(np.isin(X, cells))
        vectors = letters.encoders["c"].transform(X[rows])
        scores = cross_val_score(head, vectors, y[rows], cv=cv, scoring="f1_macro")
        assert row["score"] == pytest.approx(scores.mean())
        assert row["sd"] == pytest.approx(scores.std())


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_head_that_fails_gets_the_error_score(letters, texts, n_jobs):
    X, y = texts
    options = {"cv": 2, "max_resources": 60, "random_state": 0, "n_jobs": n_jobs}
    encoders = {name: letters.encoders[name] for name in "abc"}
    # Without the letter, the head fails on the vectors of its encoder.
    X = [cell.replace("a", "") for cell in X]
    with pytest.warns(FitFailedWarning) as record:
        results, best = rank_encoders(encoders, X, y, head=_RefusesZeros(), **options)
    (warning,) = record
    message = str(warning.message)
    assert "fold 0 of 20 rows with encoder 'a'; fold 1 of 20 rows with enc" in message
    assert "'b'" not in message and "ArithmeticError('zeros')" in message
    failed = results[results["encoder"] == "a"]
    assert failed["score"].isna().all() and failed["dropped at"].tolist() == [0]
    assert best in "bc"
    with pytest.raises(ArithmeticError, match="zeros") as raised:
        rank_encoders(
            encoders, X, y, head=_RefusesZeros(), error_score="raise", **options
        )
    assert "encoder 'a' of rank_encoders" in raised.value.__notes__[0]


class _RefusesZeros(LogisticRegression):
    def fit(self, X, y):
        if not X[:, 0].any():
            raise ArithmeticError("zeros")
        return super().fit(X, y)


def test_an_interrupted_ranking_resumes(letters, texts, tmp_path):
    X, y = texts
    options = {"cv": 3, "max_resources": 1.0, "random_state": 0}
    other = EmbeddingStore(tmp_path / "other.sqlite")
    elsewhere = {
        letter: clone(encoder).set_params(store=other)
        for letter, encoder in letters.encoders.items()
    }
    expected, best = rank_encoders(elsewhere, X, y, **options)
    encoded = {letter: sorted(cells) for letter, cells in letters.encoded.items()}
    for cells in letters.encoded.values():
        cells.clear()
    letters.fail_after = 400
    with pytest.raises(RuntimeError, match="power cut"):
        rank_encoders(letters.encoders, X, y, **options)
    letters.fail_after = np.inf
    results, again = rank_encoders(letters.encoders, X, y, **options)
    assert again == best
    pd.testing.assert_series_equal(results["score"], expected["score"])
    for letter, cells in letters.encoded.items():
        assert sorted(cells) == encoded[letter]
    stored, _ = rank_encoders(letters.encoders, X, y, **options)
    assert stored["cells encoded"].sum() == stored["encode s"].sum() == 0
    assert stored["s per 1000 rows"].isna().all()
    pd.testing.assert_series_equal(stored["score"], expected["score"])


def test_encoders_of_several_columns_and_missing_cells(letters, texts):
    X, y = texts
    table = pd.DataFrame({"noise": "a" + pd.Series(X).str[:3], "text": X})
    table.loc[5, "text"] = None
    encoders = {
        "noise": (letters.encoders["c"], "noise"),
        "text": (letters.encoders["c"], ["text"]),
    }
    results, best = rank_encoders(
        encoders, table, y, cv=3, factor=2, max_resources=216, random_state=0
    )
    assert best == "text"
    assert results["rows"].tolist() == [108, 108, 216]
    with pytest.raises(ValueError, match="Encoder 'noise' selects column 'title'"):
        encoders = {"noise": (letters.encoders["c"], "title")} | letters.encoders
        rank_encoders(encoders, table, y)


def test_numbers_are_predicted_by_ridge_regression(letters, texts):
    X, _ = texts
    y = np.array([text.count("g") for text in X]) ** 1.5
    results, best = rank_encoders(
        letters.encoders, X, y, max_resources=0.5, random_state=0, verbose=1
    )
    assert best == "g"
    assert results["rows"].max() == N_ROWS // 2
    assert results["score"].max() > 0.8


def test_tokens_are_averaged(store):
    def load():
        return lambda texts: [np.array([[t.count("a")], [t.count("b")]]) for t in texts]

    backend = CallableBackend(
        load, name="counts", version="1", modality="text", n_features=1
    )
    tokens = FrozenEncoder(backend, output="tokens", store=store)

    def load_constant():
        return lambda texts: [[1.0] for _ in texts]

    constant = CallableBackend(
        load_constant, name="constant", version="1", modality="text", n_features=1
    )
    y = np.arange(60) % 2
    X = ["a" * (row // 2) + "b" * (40 * label + 9) for row, label in enumerate(y)]
    X[3] = None
    encoders = {"tokens": tokens, "constant": FrozenEncoder(constant, store=store)}
    head = make_pipeline(SimpleImputer(), KNeighborsClassifier(1))
    results, best = rank_encoders(
        encoders, pd.Series(X), y, head=head, cv=2, max_resources=60, random_state=0
    )
    assert best == "tokens"
    by_encoder = results.set_index("encoder")
    assert by_encoder.loc["tokens", "score"] > 0.8
    assert by_encoder.loc["tokens", "bytes per 1000 rows"] == 8000 * 59 / 60
    assert by_encoder["rung"].tolist() == [0, 0]


def test_layers_of_a_checkpoint_share_their_seconds(checkpoints, store):
    X = [f"the {'red ' * (i % 4)}cat {i}" for i in range(36)]
    encoders = {}
    for layer in (0, 1, -1):
        encoders[f"layer {layer}"] = FrozenEncoder(
            checkpoints["bert"], layer=layer, store=store, runtime="torch"
        )
    encoders["other"] = FrozenEncoder(
        CallableBackend(
            lambda: lambda texts: [[len(text)] for text in texts],
            name="length",
            version="1",
            modality="text",
            n_features=1,
        ),
        store=store,
    )
    y = np.arange(36) % 2
    results, _ = rank_encoders(encoders, X, y, cv=2, max_resources=30, random_state=0)
    # Two of four are the best, so a layer is among them, and brings the others.
    last = set(results.loc[results["rung"] == 1, "encoder"])
    assert last >= {"layer 0", "layer 1", "layer -1"}
    assert results.loc[results["rung"] == 0, "rows"].tolist() == [10] * 4
    first = results[results["rung"] == 0].set_index("encoder")
    layers = first.loc[["layer 0", "layer 1", "layer -1"]]
    assert layers["encode s"].nunique() == 1
    np.testing.assert_allclose(
        layers["s per 1000 rows"], 3 * 1000 * layers["encode s"] / 10
    )
    other = first.loc["other"]
    assert other["s per 1000 rows"] == pytest.approx(100 * other["encode s"])


def test_the_closed_form_predicts_missing_rows_as_the_mean():
    X = np.random.default_rng(0).normal(size=(60, 3)) + np.arange(60)[:, None] % 3
    head = _closed_form(is_classification=True).fit(X, np.arange(60) % 3)
    assert head.score(X, np.arange(60) % 3) > 0.5
    regressor = _closed_form(is_classification=False).fit(X, X[:, 0])
    nothing = np.full((1, 3), np.nan)
    assert regressor.predict(nothing) == pytest.approx(X[:, 0].mean())


@pytest.mark.parametrize(
    "change, options, error, message",
    [
        (list, {}, TypeError, "must be a dict"),
        (lambda e: {"a": e["a"]}, {}, ValueError, "nothing to rank"),
        (lambda e: e | {"z": "MiniLM"}, {}, TypeError, "'z' must be a FrozenEncoder"),
        (dict, {"factor": 1}, ValueError, "factor must be"),
        (dict, {"scoring": ["r2"]}, TypeError, "must be one score"),
        (dict, {"error_score": "zero"}, ValueError, "error_score must be"),
        (dict, {"cv": [([0, 1], [2, 3])]}, ValueError, "cv must be a number of folds"),
        (dict, {"max_resources": 1.5}, ValueError, "max_resources must be"),
        (dict, {"max_resources": 500}, ValueError, "from 1 to 216"),
        (dict, {"min_resources": 217}, ValueError, "min_resources=217"),
        (dict, {"max_resources": 20}, ValueError, "'exhaust' is 30 rows"),
    ],
)
def test_bad_input_is_refused_before_encoding(
    letters, texts, change, options, error, message
):
    X, y = texts
    with pytest.raises(error, match=message):
        rank_encoders(change(letters.encoders), X, y, **options)
    letters.encoders["a"].set_params(store=None)
    with pytest.raises(ValueError, match="'a' has store=None"):
        rank_encoders(letters.encoders, X, y)
    assert not any(letters.encoded.values())
