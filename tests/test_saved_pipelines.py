"""Whole pipelines in files without code: equal predictions, refusals, damaged files."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.exceptions import InconsistentVersionWarning, NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import RFECV, SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    PowerTransformer,
    SplineTransformer,
    StandardScaler,
)
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from skrub import MinHashEncoder, SelectCols, TableVectorizer, tabular_pipeline
from skrub import selectors as s

import sklembed
from sklembed import (
    EmbeddingClassifier,
    EmbeddingStore,
    FrozenEncoder,
    PerModalityUnion,
    multimodal_pipeline,
)
from sklembed._persistence import _dtype, _Reader, _Writer
from sklembed.encoders import efficientnet_lite0

RNG = np.random.default_rng(0)
N_ROWS = 60
NUMBERS = RNG.normal(size=(N_ROWS, 4))
CLASSES = np.array(["a", "b", "c"])[np.digitize(NUMBERS[:, 0], [-0.5, 0.5])]
TARGETS = NUMBERS @ [1.0, -2.0, 0.5, 0.0] + 0.1 * RNG.normal(size=N_ROWS)
WORDS = "the a cat dog sat ran on under mat tree".split()
TABLE = pd.DataFrame(
    {
        "number": NUMBERS[:, 0],
        "dirty": [f"${abs(value):.2f}" for value in NUMBERS[:, 1]],
        "place": RNG.choice(["north", "south"], N_ROWS),
        "kind": pd.Categorical(RNG.choice(["x", "y", "z"], N_ROWS)),
        "day": pd.date_range("2026-01-01", periods=N_ROWS).astype(str),
        "text": [" ".join(RNG.choice(WORDS, 5)) for _ in range(N_ROWS)],
    }
)
TABLE.loc[3, ["number", "dirty", "place"]] = None


def output(model, X):
    """Return probabilities, predictions or the transformed table."""
    for method in ("predict_proba", "predict", "transform"):
        if hasattr(model, method):
            result = getattr(model, method)(X)
            return result.toarray() if hasattr(result, "toarray") else result


def assert_saved(model, X, directory):
    """Save and load a fitted model; its output must be equal bit by bit."""
    sklembed.save(model, directory)
    loaded = sklembed.load(directory)
    expected, found = output(model, X), output(loaded, X)
    assert type(found) is type(expected)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    return loaded


HEADS = [
    LogisticRegression(),
    SVC(),
    SGDClassifier(random_state=0),
    KNeighborsClassifier(),
    CalibratedClassifierCV(SVC(), cv=2, method="isotonic"),
    CalibratedClassifierCV(SVC(), cv=2),
    RandomForestClassifier(5, random_state=0),
    ExtraTreesClassifier(5, random_state=0),
    HistGradientBoostingClassifier(max_iter=3),
    VotingClassifier([("trees", RandomForestClassifier(3)), ("svc", SVC())]),
    make_pipeline(SplineTransformer(), SelectKBest(k=3), LogisticRegression()),
    RFECV(LogisticRegression(), cv=2),
    make_pipeline(PowerTransformer(), PCA(2, random_state=0), LogisticRegression()),
    make_pipeline(SimpleImputer(add_indicator=True), TruncatedSVD(2), SVC()),
    make_pipeline(
        FunctionTransformer(np.sinh),
        FeatureUnion([("pca", PCA(2)), ("scaler", StandardScaler())]),
        LogisticRegression(),
    ),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_classifiers_predict_the_same(head, tmp_path):
    assert_saved(head.fit(NUMBERS, CLASSES), NUMBERS, tmp_path)


@pytest.mark.parametrize(
    "head",
    [
        Ridge(),
        RandomForestRegressor(5),
        HistGradientBoostingRegressor(loss="quantile", quantile=0.3, max_iter=3),
    ],
    ids=lambda head: type(head).__name__,
)
def test_regressors_predict_the_same(head, tmp_path):
    assert_saved(head.fit(NUMBERS, TARGETS), NUMBERS, tmp_path)


LETTERS = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3), dtype=np.float32)
TRANSFORMERS = {
    "TableVectorizer": TableVectorizer(
        specific_transformers=[(StandardScaler(), ["number"])]
    ),
    "ColumnTransformer": ColumnTransformer(
        [
            ("onehot", OneHotEncoder(handle_unknown="ignore"), ["place", "kind"]),
            ("ordinal", OrdinalEncoder(), ["kind"]),
            ("letters", LETTERS, "text"),
            ("number", "passthrough", ["number"]),
        ]
    ),
    "PerModalityUnion": PerModalityUnion(
        [
            ("text", make_pipeline(LETTERS, TruncatedSVD(3, random_state=0)), "text"),
            ("table", StandardScaler(), ["number"]),
        ],
        add_indicator=True,
    ).set_output(transform="pandas"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_of_tables_return_the_same(name, tmp_path):
    transformer = TRANSFORMERS[name].fit(TABLE)
    loaded = assert_saved(transformer, TABLE, tmp_path)
    names = transformer.get_feature_names_out()
    assert list(loaded.get_feature_names_out()) == list(names)


@pytest.mark.parametrize(
    "model",
    [
        MinHashEncoder(n_components=3),
        SelectCols(s.glob("te*") | s.string()),
        SimpleImputer(missing_values=pd.NA, strategy="constant", fill_value="?"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_other_state_of_transformers_is_saved(model, tmp_path):
    X = TABLE[["place", "text"]].fillna("?")
    if isinstance(model, MinHashEncoder):
        X = X["text"]
    assert_saved(model.fit(X), X, tmp_path)


def test_a_linear_model_of_a_table_predicts_the_same(tmp_path):
    X = TABLE.assign(day=pd.to_datetime(TABLE["day"]))  # months are splines
    model = tabular_pipeline(LogisticRegression()).fit(X, CLASSES)
    assert_saved(model, X, tmp_path)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr", "dia", "lil"])
def test_sparse_matrices_are_saved(layout, tmp_path):
    matrix = sparse.csr_array(np.maximum(NUMBERS, 0)).asformat(layout)
    sklembed.save(FunctionTransformer(kw_args={"a": matrix}), tmp_path)
    loaded = sklembed.load(tmp_path).kw_args["a"]
    assert loaded.format == layout
    np.testing.assert_array_equal(loaded.toarray(), matrix.toarray())


def test_requests_of_metadata_are_saved(tmp_path):
    with sklearn.config_context(enable_metadata_routing=True):
        head = LogisticRegression().set_score_request(sample_weight=True)
        model = make_pipeline(StandardScaler(), head).fit(NUMBERS, CLASSES)
        sklembed.save(model, tmp_path)
        weights = {"sample_weight": np.arange(N_ROWS)}
        score = sklembed.load(tmp_path).score(NUMBERS, CLASSES, **weights)
        assert score == model.score(NUMBERS, CLASSES, **weights)


def test_boosting_on_categories_predicts_the_same(tmp_path):
    X = TABLE[["number", "kind"]]
    model = HistGradientBoostingClassifier(max_iter=3).fit(X, CLASSES)
    assert_saved(model, X, tmp_path)


def test_a_search_is_saved_as_its_best_estimator(tmp_path):
    grid = {"svc__C": [0.1, 1.0]}
    search = GridSearchCV(make_pipeline(StandardScaler(), SVC()), grid, cv=2)
    loaded = assert_saved(search.fit(NUMBERS, CLASSES), NUMBERS, tmp_path)
    assert repr(loaded) == repr(search.best_estimator_)


def values():
    """Return values of all types that are saved."""
    structured = np.array([(1, 2.5)], dtype=[("a", "i1"), ("b", "<f8", (2,))])
    ragged = np.empty((2, 1), dtype=object)
    ragged[:, 0] = [np.arange(3), np.arange(3.0)]
    return {
        1: [None, True, 2**70, -0.5, float("inf"), "tree \ud800"],
        "1": (np.float32(0.1), np.int8(3), np.str_("a"), np.bool_(True)),
        (2, "key"): {"set": {1}, "frozenset": frozenset("a")},
        "slice": slice(None, 3, np.int64(2)),
        "path": Path("/some/path"),
        "ordered": OrderedDict(b=1, a=2),
        "missing": [pd.NA, pd.NaT],
        "scalars": (
            np.datetime64("2026-01-01"),
            np.timedelta64(3, "h"),
            np.complex64(1j),
        ),
        "\ud800": np.arange(2),
        "types": [float, np.float32, np.dtype("M8[D]"), np.dtype("f4"), np.dtype("O")],
        "arrays": [
            np.zeros((0, 3)),
            np.float16(3).reshape(()),
            np.arange(6.0).reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(6)[::2],
            np.arange(3, dtype=">i4"),
            np.array(["a", "bcd"]),
            np.array(["2026-01-01", "NaT"], dtype="datetime64[D]"),
            np.array([1 + 2j]),
            structured,
            ragged,
        ],
    }


OBJECTS = np.dtype(object)


def assert_same(first, second):
    """Compare values and their types, arrays also by the order of the memory."""
    assert type(first) is type(second)
    if isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        assert first.flags.f_contiguous == second.flags.f_contiguous
        assert second.flags.writeable
    if isinstance(first, dict):
        first, second = list(first.items()), list(second.items())
    if first is pd.NA or first is pd.NaT:
        assert first is second
    elif isinstance(first, list | tuple) or getattr(first, "dtype", None) is OBJECTS:
        for one, another in zip(first, second, strict=True):
            assert_same(one, another)
    else:
        np.testing.assert_array_equal(first, second)


def test_values_keep_their_types(tmp_path):
    sklembed.save(FunctionTransformer(kw_args=values()), tmp_path)
    expected = values()
    expected["arrays"][4] = np.array([0, 2, 4])  # a contiguous copy
    assert_same(expected, sklembed.load(tmp_path).kw_args)


def test_random_states_continue_and_shared_objects_stay_shared(tmp_path):
    scaler, array = StandardScaler(), np.arange(3.0)
    generators = [np.random.default_rng(3), np.random.RandomState(3)]  # noqa: NPY002
    generators.append(np.random.Generator(np.random.Philox(3)))
    content = {"objects": [scaler, scaler, array, array], "random": generators}
    sklembed.save(FunctionTransformer(kw_args=content), tmp_path)
    loaded = sklembed.load(tmp_path).kw_args
    first, second, *arrays = loaded["objects"]
    assert first is second
    assert arrays[0] is arrays[1]
    for one, another in zip(generators, loaded["random"], strict=True):
        assert one.normal() == another.normal()


# Encoders


@pytest.fixture(scope="module")
def fitted(checkpoints, tmp_path_factory):
    """Return a pipeline of texts, images and a table whose vectors are stored."""
    store = EmbeddingStore(tmp_path_factory.mktemp("store") / "store.sqlite")
    text = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    image = FrozenEncoder(checkpoints["vit"], store=store, dtype="float32")
    X = TABLE.assign(
        photo=[(np.full((8, 8, 3), 4 * i)).astype(np.uint8) for i in range(N_ROWS)]
    )
    head = EmbeddingClassifier(members=["linear", "kernel"], cv=2, random_state=0)
    model = multimodal_pipeline(
        head, kinds={"text": "text"}, text_encoder=text, image_encoder=image
    )
    return model.fit(X, CLASSES), X


WITHOUT_TORCH = """
import importlib.abc, pickle, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import numpy as np
import sklembed

X, expected = pickle.load(open(sys.argv[1], "rb"))
model = sklembed.load(sys.argv[2])
np.testing.assert_array_equal(model.predict_proba(X), expected)
"""


def test_a_fresh_process_without_torch_predicts_the_same(fitted, tmp_path):
    model, X = fitted
    sklembed.save(model, tmp_path / "model")
    pd.to_pickle((X, model.predict_proba(X)), tmp_path / "expected.pkl")
    arguments = [str(tmp_path / "expected.pkl"), str(tmp_path / "model")]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], check=True)


def test_parameters_reach_the_encoders_of_a_loaded_pipeline(fitted, tmp_path):
    model, X = fitted
    loaded = assert_saved(model, X, tmp_path)
    assert loaded.get_params().keys() == model.get_params().keys()
    loaded.set_params(multimodalvectorizer__text_encoder__store=None)
    encoder = loaded[0].union_.named_transformers_["text"]
    assert encoder.store is None
    new = X.assign(text="a new cat").iloc[:2]
    expected = model.predict_proba(new)
    np.testing.assert_allclose(loaded.predict_proba(new), expected, rtol=1e-5)


def test_models_of_installed_packages_are_found_elsewhere(tmp_path, monkeypatch):
    packages = {}
    for name in ("here", "there", "nowhere"):
        packages[name] = str(tmp_path / name)
    for name in ("here", "there"):
        (tmp_path / name / "some_model" / "files").mkdir(parents=True)

    def install(*names):
        monkeypatch.setattr(
            "sklembed._persistence._packages", lambda: [packages[n] for n in names]
        )

    install("here")
    encoder = FrozenEncoder(os.path.join(packages["here"], "some_model", "files"))
    sklembed.save(encoder, tmp_path / "model")
    assert packages["here"] not in (tmp_path / "model" / "config.json").read_text()
    for names, place in (
        (["nowhere", "there"], "there"),
        (["nowhere"], "nowhere"),
    ):
        install(*names)
        loaded = sklembed.load(tmp_path / "model")
        assert loaded.model == os.path.join(packages[place], "some_model/files")


def test_the_packaged_encoder_of_images_is_saved_with_its_settings(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = FrozenEncoder(efficientnet_lite0(stride=16), output="tokens")
    sklembed.save(encoder, tmp_path)
    assert sklembed.load(tmp_path).fingerprint() == encoder.fingerprint()


def test_the_function_of_an_encoder_is_added_after_loading(text_backend, tmp_path):
    union = PerModalityUnion(
        [("text", FrozenEncoder(text_backend, store=None), "text")]
    )
    model = make_pipeline(union, Ridge()).fit(TABLE, TARGETS)
    expected = model.predict(TABLE)
    place = "steps/permodalityunion/transformers/text/model/_load is the function "
    with pytest.raises(TypeError, match=place + r".*set_params\(\.\.\., model="):
        sklembed.save(model, tmp_path)
    model.set_params(permodalityunion__text__model="letters")
    sklembed.save(model, tmp_path)
    loaded = sklembed.load(tmp_path)
    loaded.set_params(permodalityunion__text__model=text_backend)
    np.testing.assert_array_equal(loaded.predict(TABLE), expected)


# Refused before anything is written


class Foreign(BaseEstimator):
    """A classifier of no package that is known to be safe."""

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self


def squash(X):
    return X


def nested(depth):
    """Return dicts in one another, which need the most frames to load."""
    values = {}
    for _ in range(depth):
        values = {0: values}
    return values


def test_values_that_are_nested_deeply_are_loaded(tmp_path):
    values = nested(97)
    sklembed.save(FunctionTransformer(kw_args=values), tmp_path)
    assert sklembed.load(tmp_path).kw_args == values


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Foreign(), r"The estimator is a test_saved_pipelines\.Foreign, which cannot"),
        (
            make_pipeline(StandardScaler(), Foreign()),
            r"steps/foreign is a test_saved_pipelines\.Foreign, .* save with joblib",
        ),
        (
            make_pipeline(FunctionTransformer(squash), SVC()),
            r"steps/functiontransformer/func is the function .*\.squash",
        ),
        (
            make_pipeline(FunctionTransformer(np.nan_to_num), SVC()),
            "func is the function numpy.nan_to_num",
        ),
        (
            FunctionTransformer(kw_args={"a": [b"bytes"]}),
            "^kw_args/a/0 is a builtins.bytes",
        ),
        (
            FunctionTransformer(kw_args={"split": str.split}),
            "^kw_args/split is the function builtins.str.split",
        ),
        (
            FunctionTransformer(kw_args={"a": np.zeros(1, [("x", "i4"), ("y", "O")])}),
            "^kw_args/a is a numpy.dtypes.VoidDType",
        ),
        (
            FunctionTransformer(kw_args=nested(101)),
            "^kw_args/0/0/.* is within 100 values in one another, or contains itself",
        ),
        (
            GridSearchCV(SVC(), {"C": [1.0]}, refit=False, cv=2),
            "The estimator is a search without best_estimator_, which",
        ),
    ],
    ids=[
        "foreign",
        "within",
        "function",
        "numpy",
        "bytes",
        "method",
        "fields",
        "nested",
        "search",
    ],
)
def test_parts_that_need_code_are_refused_by_their_place(model, message, tmp_path):
    if not isinstance(model, FunctionTransformer):
        model.fit(NUMBERS, CLASSES)
    with pytest.raises(TypeError, match=message):
        sklembed.save(model, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_remote_code_is_neither_saved_nor_loaded(tmp_path):
    encoder = FrozenEncoder("some/model", trust_remote_code=True)
    with pytest.raises(TypeError, match="trust_remote_code=True runs code.*after you"):
        sklembed.save(encoder, tmp_path / "it")
    assert not (tmp_path / "it").exists()
    sklembed.save(encoder.set_params(trust_remote_code=False), tmp_path)
    rewrite(tmp_path, '["trust_remote_code", false]', '["trust_remote_code", true]')
    with pytest.raises(ValueError, match="trust_remote_code=True runs code"):
        sklembed.load(tmp_path)


def test_an_unfitted_pipeline_and_other_files_are_refused(tmp_path):
    with pytest.raises(NotFittedError):
        sklembed.save(make_pipeline(StandardScaler(), SVC()), tmp_path / "it")
    with pytest.raises(TypeError, match="not an estimator"):
        sklembed.save([1, 2], tmp_path / "it")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="contains 'notes.txt'"):
        sklembed.save(StandardScaler().fit(NUMBERS), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Replaced as a whole


@pytest.mark.parametrize("n_writes", [0, 1])
def test_an_interrupted_save_leaves_the_earlier_estimator(
    n_writes, tmp_path, monkeypatch
):
    earlier = SVC().fit(NUMBERS, CLASSES)
    sklembed.save(earlier, tmp_path)
    replace, calls = os.replace, []

    def interrupt(*paths):
        if len(calls) == n_writes:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    model = LogisticRegression().fit(NUMBERS, CLASSES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        sklembed.save(model, tmp_path)
    loaded = sklembed.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict(NUMBERS), earlier.predict(NUMBERS))
    assert_saved(model, NUMBERS, tmp_path)


def test_a_second_save_replaces_the_first(tmp_path):
    assert_saved(SVC().fit(NUMBERS, CLASSES), NUMBERS, tmp_path)
    # Files of a process that was killed while it saved
    (tmp_path / "weights-0.safetensors").touch()
    (tmp_path / "config.json.1.tmp").touch()
    for _ in range(2):
        assert_saved(Ridge().fit(NUMBERS, TARGETS), NUMBERS, tmp_path)
        files = [path.name for path in tmp_path.iterdir() if path.name != ".lock"]
        assert len(files) == 2


def save_models(directory, models):
    for model in 20 * models:
        sklembed.save(model, directory)


def test_processes_save_and_load_at_the_same_time(tmp_path):
    models = [Ridge(alpha).fit(NUMBERS, TARGETS) for alpha in (1.0, 2.0)]
    sklembed.save(models[0], tmp_path)
    context = multiprocessing.get_context("fork")
    savers = [
        context.Process(target=save_models, args=(tmp_path, order))
        for order in (models, models[::-1])
    ]
    for saver in savers:
        saver.start()
    n_loads = 0
    while any(saver.is_alive() for saver in savers) or n_loads == 0:
        assert sklembed.load(tmp_path).alpha in (1.0, 2.0)
        n_loads += 1
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert sklembed.load(tmp_path).alpha in (1.0, 2.0)


def test_a_file_is_no_directory(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(FileExistsError, match="file is a file. Save to a directory"):
        sklembed.save(Ridge().fit(NUMBERS, TARGETS), path)


# Damaged and hostile files


def rewrite(directory, old, new):
    """Replace a text in the configuration, in which it must occur."""
    file = directory / "config.json"
    text = file.read_text()
    assert old in text
    text = text.replace(old, new)
    with contextlib.suppress(RecursionError, ValueError):  # hostile, but not damaged
        config = json.loads(text)
        del config["digest"]
        config["digest"] = digest_of(json.dumps(config).encode())
        text = json.dumps(config)
    file.write_text(text)


def digest_of(data):
    return blake2b(data, digest_size=16).hexdigest()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Return the directory of a saved model; the module `hostile` can be imported."""
    code = "raise SystemExit('the file ran code')"
    (tmp_path / "hostile.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = make_pipeline(FunctionTransformer(np.sinh), StandardScaler(), SVC())
    sklembed.save(model.fit(NUMBERS, CLASSES), tmp_path / "model")
    return tmp_path / "model"


SCALER = '"class": ["sklearn.preprocessing._data", "StandardScaler"]'
UFUNC = '{"ufunc": "sinh"}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SCALER, '"class": ["hostile", "A"]', "hostile.A is not a class of sklembed"),
        (SCALER, '"class": ["os", "PathLike"]', "os.PathLike is not a class"),
        (
            SCALER,  # compiled, and not built by its arguments
            '"class": ["sklearn.neighbors._quad_tree", "_QuadTree"]',
            "_QuadTree is not a class",
        ),
        (
            UFUNC,
            '{"Generator": {"dict": [["bit_generator", "seed"]]}}',
            "seed is not a bit",
        ),
        (SCALER, '"class": ["sklearned", "A"]', "sklearned.A is not a class"),
        (
            SCALER,  # loads a pickle with its state
            '"class": ["skrub._data_ops._estimator", "SkrubLearner"]',
            "SkrubLearner is not a class",
        ),
        (
            SCALER,  # imported there
            '"class": ["sklearn.preprocessing._data", "BaseEstimator"]',
            "BaseEstimator is not a class",
        ),
        (
            SCALER,
            '"class": ["sklearn.preprocessing._data", "scale"]',
            "scale is not a class",
        ),
        (SCALER, '"class": ["sklearn.pipeline", "Absent"]', "no attribute 'Absent'"),
        (UFUNC, '{"ufunc": "load"}', "numpy.load is not a ufunc"),
        (UFUNC, '{"function": ["os", "system"]}', "os.system is not a known function"),
        (UFUNC, '{"function": ["hostile", "f"]}', "hostile.f is not a known function"),
        (UFUNC, '{"type": ["numpy", "memmap"]}', "numpy.memmap is not a type of"),
        (UFUNC, '{"type": ["hostile", "A"]}', "KeyError: 'hostile'"),
        (UFUNC, '{"scalar": ["|S2", [1, 2]]}', "is not a number or a text"),
        (UFUNC, '{"pickle": "gASVAAAA"}', "KeyError: 'pickle'"),
        (UFUNC, '{"object": 99}', "IndexError"),
        (UFUNC, '{"tensor": ["absent", false]}', "KeyError: 'absent'"),
        (UFUNC, "{}", "not enough values"),
        ('"estimator": {"object": 0}', '"estimator": {"set": []}', "set is not an est"),
        ('"objects": [', '"objects": 3, "more": [', "objects is not a list"),
        ('"format": 4', '"format": 99', "has format 99; this version .* format 4"),
        ('"format": 4, ', "", "has format None"),
        ('{"format"', '{format"', "is damaged: Expecting property name"),
        ('{"format"', "[" * 100_000 + '{"format"', "config.json is damaged"),
        ('"weights": "', '"weights": 1, "was": "', "weights is not a str"),
    ],
)
def test_hostile_and_damaged_files_raise_and_run_nothing(directory, old, new, message):
    rewrite(directory, old, new)
    with pytest.raises(ValueError, match=message):
        sklembed.load(directory)
    assert "hostile" not in sys.modules


TREE = DecisionTreeClassifier(max_depth=3, random_state=0).fit(NUMBERS, CLASSES)
STATES = {
    "left": (TREE, "tree_/nodes", "left_child", 10**6),
    "cycle": (TREE, "tree_/nodes", "right_child", 0),
    "feature": (TREE, "tree_/nodes", "feature", 4),
    "forest": (RandomForestClassifier(2), "estimators_/1/tree_/nodes", "feature", -7),
    "gradient": (GradientBoostingClassifier(n_estimators=1), "/nodes", "feature", 9),
    "boosting": (HistGradientBoostingClassifier(max_iter=1), "/nodes", "left", 10**6),
    "column": (HistGradientBoostingClassifier(max_iter=1), "/nodes", "feature_idx", 9),
    "neighbours": (KNeighborsClassifier(algorithm="kd_tree"), "_tree/1", None, 60),
    "nodes": (KNeighborsClassifier(algorithm="ball_tree"), "_tree/2", "idx_end", 61),
    "vectors": (SVC(), "_n_support", None, 10**6),
    "sparse": (KNeighborsClassifier(), "_fit_X/indices", None, 4),
}


@pytest.mark.parametrize("name", STATES)
def test_arrays_that_compiled_code_would_leave_are_refused(name):
    model, place, field, value = STATES[name]
    X = sparse.csr_array(np.maximum(NUMBERS, 0)) if name == "sparse" else NUMBERS
    writer = _Writer()
    root = writer.encode(model.fit(X, CLASSES), "")
    arrays = {name: array.copy() for name, array in writer.arrays.items()}
    (path, *_) = [name for name in arrays if name.endswith(place)]
    _Reader(writer.objects, arrays).decode(root)
    array = arrays[path]
    if field is not None:
        (written,) = [node for node in bytes_of(writer.objects) if node[0] == path]
        array = array.view(_dtype(written[1]))[field]
    array[0] = value
    with pytest.raises(ValueError, match=r"inconsistent|indices|index"):
        _Reader(writer.objects, arrays).decode(root)


def bytes_of(value):
    """Yield the names, dtypes and shapes of the arrays that are written as bytes."""
    if isinstance(value, dict):
        if "bytes" in value:
            yield value["bytes"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from bytes_of(item)


def test_a_changed_number_is_damage(directory):
    file = directory / "config.json"
    text = file.read_text()
    assert '["C", 1.0]' in text
    file.write_text(text.replace('["C", 1.0]', '["C", 7.0]'))
    with pytest.raises(ValueError, match="config.json is damaged: its content has"):
        sklembed.load(directory)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_damaged_weights_are_refused(directory, damage):
    (path,) = directory.glob("weights-*.safetensors")
    data = path.read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"truncated": data[:-9], "changed": changed, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        sklembed.load(directory)


def test_weights_without_an_array_are_refused(directory):
    (path,) = directory.glob("weights-*.safetensors")
    arrays = load_file(path)
    arrays.pop("steps/standardscaler/mean_")
    save_file(arrays, path)
    digest = digest_of(path.read_bytes())
    path.rename(directory / f"weights-{digest}.safetensors")
    rewrite(directory, path.stem.removeprefix("weights-"), digest)
    with pytest.raises(ValueError, match="KeyError: 'steps/standardscaler/mean_'"):
        sklembed.load(directory)


@pytest.mark.parametrize("pattern", ["config.json", "weights-*.safetensors"])
def test_an_absent_file_is_named(directory, pattern):
    (path,) = directory.glob(pattern)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        sklembed.load(directory)


def test_image_settings_are_neither_saved_nor_loaded(tmp_path):
    encoder = FrozenEncoder("some/model")
    encoder._image_settings = {"openers": {"PNG": ("hostile", None)}}
    sklembed.save(encoder, tmp_path)
    assert "hostile" not in (tmp_path / "config.json").read_text()
    rewrite(tmp_path, '["verbose", 0]', '["verbose", 0], ["_image_settings", 1]')
    assert not hasattr(sklembed.load(tmp_path), "_image_settings")


def test_another_version_of_scikit_learn_warns(tmp_path):
    sklembed.save(SVC().fit(NUMBERS, CLASSES), tmp_path)
    version = '["_sklearn_version", "{}"]'.format
    rewrite(tmp_path, version(sklearn.__version__), version("1.0"))
    with pytest.warns(InconsistentVersionWarning, match="SVC from version 1.0 when"):
        sklembed.load(tmp_path)
