"""ONNX files of fitted models: predictions of ONNX Runtime, refusals, a fresh process."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import SVC, SVR

import sklembed
from sklembed import (
    CallableBackend,
    CanonicalAligner,
    ContrastiveProjector,
    DecisionFusionClassifier,
    EmbeddingClassifier,
    EmbeddingRegressor,
    FrozenEncoder,
    FusionClassifier,
    FusionRegressor,
    KernelFusionClassifier,
    KernelFusionRegressor,
    ModalityGapAligner,
    PerModalityUnion,
    multimodal_pipeline,
    to_onnx,
)
from sklembed._graph import Graph
from sklembed.ensemble.svm import couple
from sklembed.onnx import ensemble

NAMES = np.array(["no", "yes", "maybe"])
VECTORS = {"text": slice(0, 20), "image": slice(20, 40)}
BLOCKS = VECTORS | {"table": slice(40, 45)}
KERNEL = {"gamma": 2.0, "alpha": 0.1, "random_state": 0}  # without a search
TOLERANCE = 1e-5  # to_onnx promises 1e-4


@cache
def make_rows(seed, n_rows=60):
    """Return blocks of vectors and a table, all with missing values, and classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n_rows)
    centres = np.random.default_rng(7).normal(size=(3, 40))
    vectors = centres[y] + 1.5 * rng.normal(size=(n_rows, 40))
    table = rng.normal(size=(n_rows, 5)) * [1, 10, 100, 1, 1] + y[:, None]
    table[:, 4] = 3  # a constant
    X = np.hstack([vectors, table]).astype(np.float32)
    X[::9, VECTORS["text"]] = np.nan
    X[::11, VECTORS["image"]] = np.nan
    X[::7, 41] = np.nan
    X[0] = np.nan
    return X, y


def make_vectors(seed):
    X, y = make_rows(seed)
    return X[:, :40], y


def target(kind, X, y):
    """Return a target that depends on the classes."""
    numbers = y + 0.3 * np.nan_to_num(X[:, 25])
    return {
        "texts": NAMES[y],
        "booleans": y == 1,
        "labels": np.column_stack([y == 0, y != 1]).astype(int),
        "numbers": numbers,
        "several numbers": np.column_stack([numbers, -5 * numbers]),
    }[kind]


def run(path, X):
    """Return the outputs of a file by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"X": X}), strict=True))


def is_tied(probabilities, is_multilabel):
    """Return a mask of the predictions that rounding may decide otherwise."""
    if is_multilabel:
        return np.abs(probabilities - 0.5) < TOLERANCE
    *_, second, first = np.sort(probabilities, axis=1).T
    return first - second < TOLERANCE


def check(estimator, X, path, tolerance=TOLERANCE, expected_from=None):
    """Write an estimator, and compare its predictions with those of the file."""
    to_onnx(estimator, path)
    outputs = run(path, X)
    table = X if expected_from is None else expected_from
    if not hasattr(estimator, "predict"):
        assert list(outputs) == ["variable"]
        expected = np.asarray(estimator.transform(table))
        np.testing.assert_allclose(outputs["variable"], expected, atol=tolerance)
    elif "variable" in outputs:
        expected = estimator.predict(table).reshape(len(X), -1)
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(
            outputs["variable"], expected, atol=tolerance * scale
        )
    else:
        expected = estimator.predict(table)
        assert outputs["label"].shape == expected.shape
        differs = outputs["label"] != expected
        if hasattr(estimator, "predict_proba"):
            expected = estimator.predict_proba(table)
            received = outputs["probabilities"]
            assert received.dtype == np.float32
            np.testing.assert_allclose(received, expected, atol=tolerance)
            differs &= ~is_tied(expected, differs.ndim == 2)
        assert not differs.any()
    return outputs


@pytest.mark.parametrize("kind", ["texts", "booleans", "labels"])
@pytest.mark.parametrize("blocks", [VECTORS, BLOCKS], ids=["vectors", "table"])
def test_kernel_classifier(tmp_path, kind, blocks):
    X, y = make_rows(0)
    X_new, _ = make_rows(1)
    n_columns = max(part.stop for part in blocks.values())
    X, X_new = X[:, :n_columns], X_new[:, :n_columns]
    model = KernelFusionClassifier(blocks=blocks, **KERNEL)
    model.fit(X, target(kind, X, y))
    check(model, X_new, tmp_path / "it.onnx")


@pytest.mark.parametrize("n_landmarks", [50, 3000])
@pytest.mark.parametrize("kind", ["numbers", "several numbers"])
def test_kernel_regressor(tmp_path, kind, n_landmarks):
    X, y = make_rows(0)
    model = KernelFusionRegressor(blocks=BLOCKS, n_landmarks=n_landmarks, **KERNEL)
    model.fit(X, target(kind, X, y))
    check(model, make_rows(1)[0], tmp_path / "it.onnx")


def test_a_lexical_block_is_part_of_the_block_of_its_text(tmp_path):
    X, y = make_vectors(0)
    blocks = {"text": slice(0, 20), "text_lexical": slice(20, 40)}
    model = KernelFusionClassifier(blocks=blocks, **KERNEL).fit(X, y)
    check(model, make_vectors(1)[0], tmp_path / "it.onnx")


def test_blocks_may_be_scattered(tmp_path):
    X, y = make_vectors(0)
    order = np.random.default_rng(0).permutation(40)
    X, X_new = X[:, order], make_vectors(1)[0][:, order]
    back = np.argsort(order)
    blocks = {"text": back[:20].tolist(), "image": back[20:].tolist()}
    for model in (
        KernelFusionClassifier(blocks=blocks, **KERNEL),
        FusionClassifier("late", blocks=blocks, max_epochs=1, random_state=0),
    ):
        check(model.fit(X, y), X_new, tmp_path / "it.onnx")


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ("auto", "texts"),  # kernel and svm
        ("auto", "booleans"),
        ("auto", "labels"),
        (["linear"], "texts"),
        (["linear"], "labels"),
        (["projection", "trees"], "booleans"),
        (["trees"], "labels"),
    ],
)
def test_embedding_classifier(tmp_path, members, kind):
    X, y = make_rows(0)
    model = EmbeddingClassifier(blocks=BLOCKS, members=members, cv=2, random_state=0)
    model.fit(X, target(kind, X, y))
    outputs = check(model, make_rows(1)[0], tmp_path / "it.onnx")
    if kind == "texts":
        assert outputs["label"].dtype == object
        assert outputs["label"][0] in NAMES


@pytest.mark.parametrize("members", ["auto", ["linear", "projection"]], ids=str)
def test_embedding_regressor(tmp_path, members):
    X, y = make_rows(0)
    model = EmbeddingRegressor(blocks=BLOCKS, members=members, cv=2, random_state=0)
    model.fit(X, target("several numbers", X, y))
    check(model, make_rows(1)[0], tmp_path / "it.onnx")


def test_members_of_classes_that_the_machines_have_not_seen(tmp_path):
    X, y = make_vectors(0)
    y = y.copy()
    y[3:5] = 3
    weight = np.where(y == 3, 0.0, 1.0)  # the class has no row of positive weight
    model = EmbeddingClassifier(
        blocks=VECTORS, members=["svm", "trees"], cv=2, random_state=0
    )
    model.fit(X, y, sample_weight=weight)
    check(model, make_vectors(1)[0], tmp_path / "it.onnx")


@pytest.mark.parametrize("n_classes", [2, 3, 12])
def test_pairs_are_coupled_without_a_solver(tmp_path, n_classes):
    rng = np.random.default_rng(0)
    n_pairs = n_classes * (n_classes - 1) // 2
    # From undecided pairs to pairs that are decided up to the last digit.
    steepness = np.tile([[1], [10], [100]], (20, 1))
    in_pairs = expit(steepness * rng.normal(size=(60, n_pairs)))
    in_pairs = np.clip(in_pairs, 1e-6, 1 - 1e-6).astype(np.float32).astype(float)
    graph = Graph()
    X = graph.cast("X", np.float64)
    first, second = np.triu_indices(n_classes, 1)
    upper = np.zeros((n_pairs, n_classes**2))
    upper[np.arange(n_pairs), first * n_classes + second] = 1
    lower = np.zeros((n_pairs, n_classes**2))
    lower[np.arange(n_pairs), second * n_classes + first] = 1
    matrix = graph.node("MatMul", X, upper - lower)
    matrix = graph.node("Add", matrix, lower.sum(axis=0))
    shape = np.array([-1, n_classes, n_classes])
    coupled = ensemble._couple(graph, graph.node("Reshape", matrix, shape), n_classes)
    outputs = {"P": (coupled, np.float64, [n_classes])}
    path = tmp_path / "it.onnx"
    path.write_bytes(graph.to_bytes(n_pairs, outputs, {}))
    received = run(path, in_pairs.astype(np.float32))["P"]
    np.testing.assert_allclose(received, couple(in_pairs, n_classes), atol=1e-9)


@pytest.mark.parametrize("join", ["early", "late"])
@pytest.mark.parametrize("kind", ["texts", "booleans", "labels"])
def test_fusion_classifier(tmp_path, kind, join):
    X, y = make_vectors(0)
    model = FusionClassifier(join, blocks=VECTORS, max_epochs=2, random_state=0)
    check(model.fit(X, target(kind, X, y)), make_vectors(1)[0], tmp_path / "it.onnx")


@pytest.mark.filterwarnings("ignore:Block 'audio' is NaN")
@pytest.mark.parametrize("join", ["early", "late"])
def test_fusion_regressor_with_an_ignored_block(tmp_path, join):
    X, y = make_vectors(0)
    blocks = VECTORS | {"audio": slice(40, 42)}
    X = np.hstack([X, np.full((len(X), 2), np.nan, dtype=np.float32)])
    model = FusionRegressor(join, blocks=blocks, max_epochs=2, random_state=0)
    model.fit(X, target("numbers", X, y))
    X_new = make_vectors(1)[0]
    X_new = np.hstack([X_new, np.ones((len(X), 2), dtype=np.float32)])
    check(model, X_new, tmp_path / "it.onnx")


@pytest.mark.parametrize("pooling", ["geometric", "arithmetic"])
@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        (make_pipeline(StandardScaler(), LogisticRegression()), "texts"),
        (RandomForestClassifier(5, random_state=0), "texts"),  # returns zeros
        (KNeighborsClassifier(3), "labels"),
        (LogisticRegression(), "labels"),  # a classifier for each label
    ],
    ids=["linear", "forest", "labels", "list"],
)
def test_decision_fusion(tmp_path, estimator, kind, pooling):
    X, y = make_vectors(0)
    model = DecisionFusionClassifier(estimator, blocks=VECTORS, pooling=pooling, cv=2)
    model.fit(X, target(kind, X, y))
    check(model, make_vectors(1)[0], tmp_path / "it.onnx")


def test_a_modality_that_lacks_a_class_keeps_its_prior(tmp_path):
    X, y = make_vectors(0)
    X = X.copy()
    X[y == 2, VECTORS["image"]] = np.nan
    model = DecisionFusionClassifier(LogisticRegression(), blocks=VECTORS, cv=2)
    check(model.fit(X, NAMES[y]), make_vectors(1)[0], tmp_path / "it.onnx")


@pytest.mark.parametrize("kind", ["texts", "booleans"])
@pytest.mark.parametrize("method", ["temperature", "sigmoid"])
@pytest.mark.parametrize("inner", ["logits", "probabilities"])
def test_calibrated_heads(tmp_path, inner, method, kind):
    X, y = make_vectors(0)
    head = EmbeddingClassifier(blocks=VECTORS, members=["linear"], cv=2, random_state=0)
    if inner == "logits":
        head = FusionClassifier(blocks=VECTORS, max_epochs=2, random_state=0)
    y = target(kind, X, y)
    model = CalibratedClassifierCV(FrozenEstimator(head.fit(X, y)), method=method)
    check(model.fit(X, y), make_vectors(1)[0], tmp_path / "it.onnx")


@pytest.mark.parametrize(
    "aligner",
    [
        ModalityGapAligner(blocks=VECTORS),
        ModalityGapAligner(
            method="whiten", blocks={"image": slice(20, 40), "text": range(20)}
        ),
        ModalityGapAligner(
            blocks={"text": slice(0, 15), "image": slice(15, 40)}, widths="resample"
        ),
        CanonicalAligner(n_components=4, blocks=VECTORS),
    ],
    ids=["shift", "whiten", "resample", "canonical"],
)
def test_aligners(tmp_path, aligner):
    X, _ = make_vectors(0)
    if "resample" in str(aligner):
        X = np.where(np.isnan(X).any(axis=1, keepdims=True), np.float32(np.nan), X)
    X = X.astype(np.float32)
    check(aligner.fit(X), X, tmp_path / "it.onnx")


@pytest.mark.parametrize(
    "estimator",
    [
        make_pipeline(
            SimpleImputer(add_indicator=True), StandardScaler(), LogisticRegression()
        ),
        make_pipeline(SimpleImputer(), Normalizer(), PCA(5), RidgeClassifier()),
        make_pipeline(SimpleImputer(strategy="median"), SVC()),
        HistGradientBoostingClassifier(max_iter=5, class_weight="balanced"),
        make_pipeline(SimpleImputer(), RandomForestClassifier(5, random_state=0)),
        make_pipeline(SimpleImputer(), CalibratedClassifierCV(RidgeClassifier(), cv=2)),
    ],
    ids=["imputer", "pca", "svm", "boosting", "forest", "calibrated"],
)
def test_classifiers_of_scikit_learn(tmp_path, estimator):
    X, y = make_rows(0)
    check(estimator.fit(X, NAMES[y]), make_rows(1)[0], tmp_path / "it.onnx")


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        (HistGradientBoostingRegressor(max_iter=5, loss="poisson"), "numbers"),
        (make_pipeline(SimpleImputer(), StandardScaler(), SVR()), "numbers"),
        (make_pipeline(SimpleImputer(), Ridge()), "several numbers"),
        (make_pipeline(SimpleImputer(), HistGradientBoostingClassifier()), "booleans"),
        (MultiOutputClassifier(HistGradientBoostingClassifier(max_iter=3)), "labels"),
    ],
    ids=["boosting", "svm", "ridge", "booleans", "labels"],
)
def test_other_targets_of_scikit_learn(tmp_path, estimator, kind):
    X, y = make_rows(0)
    y = target(kind, X, y)
    if kind == "numbers":
        y = np.abs(y)
    if kind == "labels":
        estimator.fit(X, y)
        to_onnx(estimator, tmp_path / "it.onnx")
        outputs = run(tmp_path / "it.onnx", X)
        expected = np.array(estimator.predict_proba(X))[..., 1].T
        np.testing.assert_array_equal(outputs["label"], estimator.predict(X))
        np.testing.assert_allclose(outputs["probabilities"], expected, atol=TOLERANCE)
    else:
        check(estimator.fit(X, y), make_rows(1)[0], tmp_path / "it.onnx")


def test_thresholds_of_trees_are_exact(tmp_path):
    # Values next to each other in float32, between which thresholds in float64 lie.
    x = np.float32(1) + np.arange(64, dtype=np.float32) * np.finfo(np.float32).eps
    X, y = x[:, None], np.arange(64) // 4 % 2
    model = HistGradientBoostingClassifier(min_samples_leaf=2, max_iter=5).fit(X, y)
    assert model.score(X, y) == 1
    check(model, X, tmp_path / "it.onnx")


def load():
    return lambda texts: [
        [len(t), t.count("a"), t.count("e"), t.count("t")] for t in texts
    ]


def letters():
    return CallableBackend(
        load, name="letters", version="onnx", modality="text", n_features=4
    )


def make_table():
    words = "the a cat dog sat ran on under mat tree late beta".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=6)) for _ in range(80)]
    table = pd.DataFrame(
        {"title": texts, "body": texts[::-1], "price": rng.normal(size=80)}
    )
    table["price"] += table["title"].str.len() / 10
    table.loc[::9, "title"] = None
    table.loc[::7, "body"] = None
    table.loc[::5, "price"] = np.nan
    y = np.where(table["price"].fillna(0) > table["price"].median(), "high", "low")
    return table, y


def encode(table, column):
    """Return the encoder's vectors, NaN where missing, which a service computes."""
    vectors = np.full((len(table), 4), np.nan, dtype=np.float32)
    observed = table[column].notna().to_numpy()
    vectors[observed] = load()(table[column][observed])
    return vectors


def test_parts_after_an_encoder_are_in_the_graph(tmp_path):
    table, y = make_table()
    union = PerModalityUnion(
        [
            (
                "title",
                make_pipeline(
                    FrozenEncoder(letters(), store=None),
                    ContrastiveProjector(3, max_epochs=1, cv=2, random_state=0),
                ),
                "title",
            ),
            (
                "body",
                make_pipeline(
                    FrozenEncoder(letters(), store=None),
                    SimpleImputer(),
                    StandardScaler(),
                ),
                "body",
            ),
            ("price", StandardScaler(), ["price"]),
        ],
        add_indicator=True,
        transformer_weights={"title": 0.5, "price": 3},
    )
    model = make_pipeline(union, SimpleImputer(), LogisticRegression()).fit(table, y)
    title, body = encode(table, "title"), encode(table, "body")
    rest = model[0].transform(table)[:, model[0].blocks_["price"].start :]
    X = np.hstack([title, body, rest]).astype(np.float32)
    check(model, X, tmp_path / "it.onnx", expected_from=table)
    check(model[:1], X, tmp_path / "union.onnx", expected_from=table)
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["high", "low"]
    names = json.loads(metadata["columns"])
    assert names[0] == "title__frozenencoder0"
    assert names[8:] == [
        "price__price",
        "missing__title",
        "missing__body",
        "missing__price",
    ]
    assert metadata["sklembed_version"] == sklembed.__version__
    labels, probabilities = session.get_outputs()
    assert [labels.name, labels.type] == ["label", "tensor(string)"]
    assert probabilities.shape == ["n_samples", 2]


@pytest.mark.parametrize("estimator", ["classifier", LogisticRegression()], ids=str)
def test_multimodal_pipeline(tmp_path, estimator):
    table, y = make_table()
    model = multimodal_pipeline(
        estimator, text_encoder=letters(), kinds={"title": "text", "body": "text"}
    )
    model.fit(table, y)
    X = model[0].transform(table).to_numpy(dtype=np.float32)
    check(model, X, tmp_path / "it.onnx", expected_from=table)
    metadata = onnxruntime.InferenceSession(tmp_path / "it.onnx").get_modelmeta()
    names = json.loads(metadata.custom_metadata_map["columns"])
    assert names == model[0].get_feature_names_out().tolist()


def test_an_encoder_may_be_the_first_step_and_a_search_is_its_best(tmp_path):
    table, y = make_table()
    texts = table["title"].fillna("none")
    pipeline = make_pipeline(
        FrozenEncoder(letters(), store=None), StandardScaler(), LogisticRegression()
    )
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 1]}, cv=2)
    search.fit(texts, y)
    X = np.array(load()(texts), dtype=np.float32)
    check(search, X, tmp_path / "it.onnx", expected_from=texts)


class Doubled(StandardScaler):
    """A transformer of another library."""


def refused():
    """Return fitted estimators that cannot be converted, with the reason."""
    X, y = make_rows(0)
    filled = np.nan_to_num(X)
    table, high = make_table()
    tokens = make_pipeline(FrozenEncoder(letters(), store=None))
    days = np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    fusion = DecisionFusionClassifier(GaussianNB(), blocks=BLOCKS, cv=2)
    isotonic = CalibratedClassifierCV(LogisticRegression(), method="isotonic", cv=2)
    categories = HistGradientBoostingClassifier(categorical_features=[0], max_iter=2)
    return {
        "FunctionTransformer cannot be": FunctionTransformer(np.log1p).fit(filled),
        "Doubled cannot be converted .* Use joblib": make_pipeline(
            Doubled(), LogisticRegression()
        ).fit(filled, y),
        "GaussianNB .* underflow .* LogisticRegression": fusion.fit(filled, y),
        "categorical columns": categories.fit(np.abs(filled).astype(int) % 9, y),
        "isotonic.* Use method='temp": isotonic.fit(filled[:, :40], y),
        "missing_values=-1": SimpleImputer(missing_values=-1).fit(filled),
        "Nothing follows the Frozen": tokens.fit(table["body"].fillna("")),
        "classes have the type": KernelFusionClassifier(blocks=VECTORS, **KERNEL).fit(
            filled[:, :40], days[y]
        ),
    }


def test_refusals_name_the_part_before_anything_is_written(tmp_path):
    for message, estimator in refused().items():
        with pytest.raises(TypeError, match=message):
            to_onnx(estimator, tmp_path / "it.onnx")
    with pytest.raises(NotFittedError):
        to_onnx(KernelFusionClassifier(), tmp_path / "it.onnx")
    assert not list(tmp_path.iterdir())


def test_tokens_are_refused(tmp_path):
    table, _ = make_table()
    encoder = FrozenEncoder(letters(), store=None)
    union = PerModalityUnion([("body", encoder, "body")])
    model = make_pipeline(union, StandardScaler()).fit(table)
    union.holds_tokens_["body"] = True  # as of an encoder with output="tokens"
    with pytest.raises(TypeError, match=r"\['body'\] return tokens"):
        to_onnx(model, tmp_path / "it.onnx")


def test_a_graph_that_predicts_otherwise_is_not_written(tmp_path, monkeypatch):
    X, y = make_rows(0)
    models = {
        "'probabilities' differs by up to": RandomForestClassifier(5, random_state=0),
        "'label' differs in": RidgeClassifier(),
        "'variable' differs by": Ridge(),
    }
    inline = Graph.inline

    def inline_another(graph, model, x):
        return inline(graph, model, graph.node("Mul", x, np.float32(2)))

    monkeypatch.setattr(Graph, "inline", inline_another)
    for message, model in models.items():
        model.fit(np.nan_to_num(X[:, :40]), y)
        with pytest.raises(ValueError, match=f"{type(model).__name__} .* {message}"):
            to_onnx(model, tmp_path / "it.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "skl2onnx"])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package):
    X, y = make_rows(0)
    model = Ridge().fit(np.nan_to_num(X), y)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"requires the package {package}: pip install 'sklembed\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        to_onnx(model, tmp_path / "it.onnx")


def test_a_process_with_onnxruntime_alone_predicts(tmp_path):
    X, y = make_rows(0)
    model = EmbeddingClassifier(blocks=BLOCKS, cv=2, random_state=0).fit(X, NAMES[y])
    X_new, _ = make_rows(1)
    to_onnx(model, tmp_path / "it.onnx")
    np.save(tmp_path / "X.npy", X_new)
    code = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("it.onnx")
label, probabilities = session.run(None, {"X": np.load("X.npy")})
np.save("probabilities.npy", probabilities)
print(*label)
loaded = {"torch", "sklearn", "sklembed", "scipy", "onnx"} & set(sys.modules)
assert not loaded, loaded
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == model.predict(X_new).tolist()
    np.testing.assert_allclose(
        np.load(tmp_path / "probabilities.npy"),
        model.predict_proba(X_new),
        atol=TOLERANCE,
    )
