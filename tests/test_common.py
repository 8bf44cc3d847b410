"""What every estimator must do: scikit-learn's whole battery, and our own contract beside it."""

import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from conftest import count_letters
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import sklembed
from sklembed import (
    CallableBackend,
    CanonicalAligner,
    ContrastiveProjector,
    CrossAttentionAdaptor,
    DecisionFusionClassifier,
    EmbeddingClassifier,
    EmbeddingRegressor,
    FrozenEncoder,
    FusionClassifier,
    FusionRegressor,
    KernelFusionClassifier,
    KernelFusionRegressor,
    ModalityGapAligner,
    MultimodalVectorizer,
    PatchSegmenter,
    PerModalityUnion,
    SharedFusionEncoder,
    ZeroShotClassifier,
    _trained,
)

CHEAP = {"n_components": 4, "hidden_layer_sizes": (8,), "max_epochs": 2}
# Two modalities of whatever columns there are; one, for checks in which a single NaN is an error.
TWO, ONE = {"b": [-1], "a": slice(0, -1)}, {"all": slice(None)}
HEAD = {"hidden_layer_sizes": (16,), "max_epochs": 15, "lr": 0.05}
# One head, as the battery sets n_components=1.
SHARED = {"n_components": 8, "n_heads": 1, "dim_feedforward": 8, "max_epochs": 2}
SHARED |= {"dropout": 0.1, "input_dropout": 0.1, "standardize": True}


# Rows are drawn into mini-batches, as by SGDClassifier: a row twice is not a row of weight 2.
DRAWN = {"check_sample_weight_equivalence_on_dense_data"}
DRAW = (ContrastiveProjector, FusionClassifier, FusionRegressor)


# Leave-one-out predicts a repeated row from its copy, so it chooses other settings.
LEFT_OUT = (KernelFusionClassifier, KernelFusionRegressor)
FOLDED = (EmbeddingClassifier, EmbeddingRegressor)
TWO_MEMBERS = {"members": ["linear", "kernel"]}


def known_to_fail(estimator):
    reasons = {}
    if isinstance(estimator, DRAW):
        reason = "mini-batches of repeated rows are not those of weighted ones"
        reasons = dict.fromkeys(DRAWN, reason)
    elif isinstance(estimator, LEFT_OUT):
        reason = "leave-one-out predicts a repeated row from its copy"
        reasons = dict.fromkeys(DRAWN, reason)
    elif isinstance(estimator, FOLDED):
        reason = "folds of repeated rows are not those of weighted ones"
        reasons = dict.fromkeys(DRAWN, reason)
    if getattr(estimator, "table_blocks", "auto") != "auto":
        reason = "single values may be missing in table columns, not in vectors"
        reasons["check_estimators_pickle"] = reason
    return reasons


@parametrize_with_checks(
    [
        ContrastiveProjector(**CHEAP, cv=None),
        ContrastiveProjector(
            **CHEAP, cv=None, early_stopping=True, validation_fraction=0.5
        ),
        PerModalityUnion([("all", StandardScaler(), slice(None))]),
        PerModalityUnion(
            [("first", StandardScaler(), [0]), ("all", PCA(1), slice(None))]
        ),
        PerModalityUnion(
            [("last", StandardScaler(), [-1])],
            remainder=PCA(1),
            transformer_weights={"last": 0.5},
            add_indicator=True,
        ),
        MultimodalVectorizer(),
        ModalityGapAligner(TWO, widths="resample"),
        ModalityGapAligner(TWO, method="whiten"),
        CanonicalAligner(blocks=TWO),
        FusionClassifier("early", **HEAD, blocks=ONE),
        FusionClassifier("late", **HEAD, blocks=TWO),
        FusionRegressor("early", **HEAD, blocks=ONE),
        DecisionFusionClassifier(LogisticRegression(), blocks=TWO, cv=2),
        DecisionFusionClassifier(
            DecisionTreeClassifier(random_state=0), blocks=TWO, weights=None
        ),
        KernelFusionClassifier(blocks=ONE),
        KernelFusionClassifier(blocks=TWO, table_blocks=["b"]),
        KernelFusionRegressor(blocks=ONE),
        EmbeddingClassifier(blocks=ONE, **TWO_MEMBERS, cv=2),
        EmbeddingRegressor(blocks=ONE, **TWO_MEMBERS, cv=2),
        SharedFusionEncoder(**SHARED, blocks=TWO),
        CrossAttentionAdaptor(**SHARED, blocks=TWO),
    ],
    expected_failed_checks=known_to_fail,
)
def test_scikit_learn_s_battery(estimator, check):
    check(estimator)


# fit_transform is cross-fitted, so it cannot equal fit().transform(), which these two compare.
CROSS_FITTED = {"check_transformer_general", "check_transformer_data_not_an_array"}


def test_the_cross_fitted_default_fails_exactly_what_it_must():
    results = check_estimator(ContrastiveProjector(**CHEAP), on_skip=None, on_fail=None)
    failed = {
        result["check_name"] for result in results if result["status"] == "failed"
    }
    assert failed == CROSS_FITTED | DRAWN
    assert "skipped" not in {result["status"] for result in results}
    for result in results:
        if result["check_name"] in CROSS_FITTED:
            assert "fit_transform and transform outcomes not consistent" in str(
                result["exception"]
            )


# Our own contract. A case is an estimator, a table, and labels for those that want them.


def _load():
    return count_letters


BACKEND = CallableBackend(
    _load, name="letters", version="1", modality="text", n_features=9
)


def numeric(n_rows=60):
    rng = np.random.default_rng(0)
    y = np.arange(n_rows) % 3
    return rng.normal(size=(3, 6))[y] + rng.normal(size=(n_rows, 6)), y


def numbers():
    X, _ = numeric()
    return X, X[:, 0] - X[:, 4]


def one_sided():
    """Make two modalities of which the second tells little, so that weights are not equal."""
    X, y = numeric(240)
    X[:, 3:] += 3 * np.random.default_rng(1).normal(size=(240, 3))
    return X, y


def _load_vowels():
    return lambda texts: count_letters(texts)[:, :3]


VOWELS = CallableBackend(
    _load_vowels, name="vowels", version="1", modality="text", n_features=3
)


def words(n_rows=60):
    rng = np.random.default_rng(0)
    notes = ["".join(rng.choice(list("aeinorst "), 12)) for _ in range(n_rows)]
    return pd.DataFrame({"note": notes}), np.arange(n_rows) % 3


def described(n_rows=60):
    """A title, a code, a number and a category."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(["rain", "sonar", "tree"], 3)) for _ in range(n_rows)]
    X = pd.DataFrame(
        {
            "title": titles,
            "code": [f"{rng.choice(['ab', 'cd'])}-{i % 47}" for i in range(n_rows)],
            "size": rng.normal(size=n_rows),
            "colour": rng.choice(["red", "green", "blue"], n_rows),
        }
    )
    return X, np.arange(n_rows) % 3


def patches(n_rows=60):
    """Tokens of 4 x 4 patches, and masks of twice as many pixels each way."""
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 2, size=(n_rows, 4, 4))
    X = np.empty((n_rows, 1), dtype=object)
    for row, picture in enumerate(shown):
        X[row, 0] = picture.reshape(16, 1) + rng.normal(size=(16, 3))
    return X, shown.repeat(2, axis=1).repeat(2, axis=2)


HALVES = {"text": slice(0, 3), "image": slice(3, 6)}
SMALL_HEAD = {"hidden_layer_sizes": (8,), "blocks": HALVES, "max_epochs": 2}
SMALL_HEAD |= {"random_state": 0}
VECTORS = {"blocks": HALVES, "table_blocks": [], "random_state": 0}
CASES = {
    "FrozenEncoder": (FrozenEncoder(BACKEND, store=None), words),
    "ContrastiveProjector": (ContrastiveProjector(**CHEAP, random_state=0), numeric),
    "ContrastiveProjector, plain": (
        ContrastiveProjector(**CHEAP, cv=None, random_state=0),
        numeric,
    ),
    "PerModalityUnion": (
        PerModalityUnion(
            [
                ("a", StandardScaler(), [0, 1]),
                ("b", ContrastiveProjector(**CHEAP, random_state=0), slice(2, 5)),
            ]
        ),
        numeric,
    ),
    "MultimodalVectorizer": (
        MultimodalVectorizer(text_encoder=FrozenEncoder(BACKEND, store=None)),
        described,
    ),
    "ModalityGapAligner": (ModalityGapAligner(HALVES), numeric),
    "ModalityGapAligner, procrustes": (
        ModalityGapAligner(HALVES, method="procrustes"),
        numeric,
    ),
    "CanonicalAligner": (CanonicalAligner(blocks=HALVES), numeric),
    "FusionClassifier": (FusionClassifier("early", **SMALL_HEAD), numeric),
    "FusionClassifier, late": (FusionClassifier("late", **SMALL_HEAD), numeric),
    "FusionRegressor": (FusionRegressor("early", **SMALL_HEAD), numbers),
    "DecisionFusionClassifier": (
        DecisionFusionClassifier(GaussianNB(var_smoothing=0.1), blocks=HALVES),
        one_sided,
    ),
    "KernelFusionClassifier": (KernelFusionClassifier(**VECTORS), numeric),
    "KernelFusionRegressor": (KernelFusionRegressor(**VECTORS), numbers),
    "EmbeddingClassifier": (
        EmbeddingClassifier(**VECTORS, **TWO_MEMBERS),
        numeric,
    ),
    "EmbeddingRegressor": (EmbeddingRegressor(**VECTORS, **TWO_MEMBERS), numbers),
    "SharedFusionEncoder": (
        SharedFusionEncoder(**SHARED, blocks=HALVES, random_state=0),
        numeric,
    ),
    "CrossAttentionAdaptor": (
        CrossAttentionAdaptor(**SHARED, blocks=HALVES, random_state=0),
        numeric,
    ),
    "ZeroShotClassifier": (
        ZeroShotClassifier(
            CanonicalAligner(blocks=HALVES),
            {0: "a nose", 1: ["rain", "sonar"], 2: "treason"},
            text_encoder=FrozenEncoder(VOWELS, store=None),
        ),
        numeric,
    ),
    "PatchSegmenter": (PatchSegmenter((4, 4), max_epochs=2, random_state=0), patches),
}
NOT_NUMERIC = {"FrozenEncoder", "MultimodalVectorizer", "PatchSegmenter"}
NUMERIC = [name for name in CASES if name not in NOT_NUMERIC]
each = pytest.mark.parametrize("name", CASES)


def output(estimator, X):
    """Return the output of a fitted estimator."""
    for method in ("transform", "predict_proba"):
        if hasattr(estimator, method):
            return as_array(getattr(estimator, method)(X))
    return estimator.predict(X)


def as_array(result):
    """Return the cells of a DataFrame, and anything else unchanged."""
    return result.to_numpy() if isinstance(result, pd.DataFrame) else result


def fit_output(estimator, X, y):
    """Return the output of an estimator for its training rows."""
    if hasattr(estimator, "fit_transform"):
        return as_array(estimator.fit_transform(X, y))
    return output(estimator.fit(X, y), X)


@pytest.fixture
def case(name):
    estimator, make = CASES[name]
    return clone(estimator), *make()


@functools.cache
def fit_case(name):
    """Return an estimator after `fit`, which no test may change, its table and output."""
    estimator, make = CASES[name]
    X, y = make()
    estimator = clone(estimator).fit(X, y)
    return estimator, X, output(estimator, X)


@each
def test_fit_twice_equals_once(case, name):
    estimator, X, y = case
    _, _, once = fit_case(name)
    twice = output(estimator.fit(X[:30], y[:30]).fit(X, y), X)
    np.testing.assert_array_equal(once, twice)


@each
def test_a_row_s_output_depends_neither_on_its_batch_nor_on_its_neighbours(name):
    estimator, X, together = fit_case(name)
    some = np.arange(0, len(X), len(X) // 20)
    alone = np.concatenate([output(estimator, X[i : i + 1]) for i in some])
    order = np.random.default_rng(1).permutation(len(X))
    shuffled = output(estimator, X.iloc[order] if hasattr(X, "iloc") else X[order])
    np.testing.assert_allclose(together[some], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together[order], shuffled, rtol=1e-5, atol=1e-6)


@each
def test_clones_pickles_and_files_do_the_same(case, name, tmp_path):
    _, X, y = case
    estimator, _, expected = fit_case(name)
    np.testing.assert_array_equal(output(clone(estimator).fit(X, y), X), expected)
    np.testing.assert_array_equal(
        output(pickle.loads(pickle.dumps(estimator)), X), expected
    )
    file = skops.io.dumps(estimator)
    unknown = skops.io.get_untrusted_types(data=file)
    own = {
        f"sklembed.{module}"
        for module in (
            "projection",
            "union",
            "vectorizer",
            "encoders",
            "alignment",
            "fusion",
            "ensemble",
            "crossmodal",
            "zero_shot",
            "segmentation",
        )
    }
    own.add("skrub.")  # of the vectorizer
    users = {
        "test_common._load",
        "test_common._load_vowels",
    }  # what the user passed as a parameter
    assert all(t in users or any(t.startswith(o) for o in own) for t in unknown), (
        unknown
    )
    np.testing.assert_array_equal(
        output(skops.io.loads(file, trusted=unknown), X), expected
    )
    if users.intersection(unknown):
        with pytest.raises(TypeError, match="_load is the function test_common._load"):
            sklembed.save(estimator, tmp_path)
        return
    sklembed.save(estimator, tmp_path)
    np.testing.assert_array_equal(output(sklembed.load(tmp_path), X), expected)


@each
def test_global_random_states_are_left_alone(case):
    estimator, X, y = case
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit_output(estimator, X, y)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("name", NUMERIC)
def test_every_form_of_numeric_input_gives_the_same_numbers(case):
    estimator, X, y = case
    X = X.astype(np.float32)
    expected = fit_output(clone(estimator), X, y)
    readonly = np.asfortranarray(X)
    readonly.flags.writeable = False
    forms = {
        "float64": X.astype(np.float64),
        "Fortran order, read-only": readonly,
        "negative strides": X[::-1, ::-1].copy()[::-1, ::-1],
        "frame": pd.DataFrame(X, columns=list("abcdef")),
        "list": X.tolist(),
    }
    for form, table in forms.items():
        np.testing.assert_allclose(
            fit_output(clone(estimator), table, y),
            expected,
            rtol=1e-5,
            atol=1e-6,
            err_msg=form,
        )


@pytest.mark.parametrize("name", [name for name in NUMERIC if "Regressor" not in name])
def test_every_kind_of_label_gives_the_same_numbers(case):
    estimator, X, y = case
    expected = fit_output(clone(estimator), X, y)
    for labels in (
        pd.Series(y + 1),
        np.array(["ant", "bee", "cow"])[y],
        (y * 1.0).tolist(),
    ):
        np.testing.assert_array_equal(fit_output(clone(estimator), X, labels), expected)


# A value for each parameter that changes the result.
EFFECTIVE_OF_HEADS = {
    "hidden_layer_sizes": (5,),
    "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
    "dropout": 0.1,
    "modality_dropout": 0.9,
    "max_epochs": 3,
    "batch_size": 16,
    "lr": 1e-2,
    "weight_decay": 10.0,
    "early_stopping": True,
    "random_state": 1,
    "skorch_params": {"lr": 1e-2},
}
EFFECTIVE_OF_SHARED = {
    "n_components": 4,
    "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
    "n_heads": 4,
    "dim_feedforward": 5,
    "dropout": 0.5,
    "input_dropout": 0.0,
    "temperature": 0.5,
    "direction_weight": 0.75,
    "standardize": False,
    "chunk_size": 7,  # by what dropout draws
    "max_epochs": 3,
    "batch_size": 16,
    "lr": 1e-2,
    "weight_decay": 10.0,
    "early_stopping": True,
    "random_state": 1,
    "skorch_params": {"lr": 1e-2},
}
EFFECTIVE_OF_KERNELS = {
    "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
    "table_blocks": "auto",
    "gamma": 5.0,
    "alpha": 10.0,
    "n_landmarks": 20,
}
EFFECTIVE_OF_ENSEMBLES = {
    "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
    "table_blocks": "auto",
    "members": ["linear"],
    "cv": 3,
    "random_state": 1,
}
EFFECTIVE = {
    "FrozenEncoder": {
        "model": CallableBackend(
            lambda: lambda texts: count_letters(texts) + 1,
            name="letters + 1",
            version="1",
            modality="text",
            n_features=9,
        ),
        "normalize": True,
    },
    "ContrastiveProjector": {
        "n_components": 3,
        "hidden_layer_sizes": (5,),
        "loss": "pairwise_bce",
        "similarity": "dot",
        "temperature": 0.5,
        "target_type": "continuous",
        "passthrough": False,
        "class_weight": {0: 5.0},
        "early_stopping": True,
        "dropout": 0.1,
        "standardize": False,
        "cv": 3,
        "max_epochs": 3,
        "batch_size": 16,
        "lr": 1e-2,
        "weight_decay": 10.0,
        "random_state": 1,
        "skorch_params": {"lr": 1e-2},
    },
    "PerModalityUnion": {
        "transformers": [("a", StandardScaler(), [0, 1])],
        "a": "passthrough",
        "a__with_mean": False,
        "b__temperature": 0.5,
        "remainder": "passthrough",
        "transformer_weights": {"a": 2.0},
        "add_indicator": True,
    },
    "MultimodalVectorizer": {
        "kinds": {"size": "dropped"},
        "text_encoder": FrozenEncoder(VOWELS, store=None),
        "text_encoder__normalize": True,
        "lexical": False,
        "name_encoder": CountVectorizer(max_features=2),
        "table_vectorizer": OneHotEncoder(sparse_output=False),
        "specific_transformers": [("drop", ["code"])],
    },
    "ModalityGapAligner": {
        "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
        "method": "whiten",
        "shift": 0.5,
        "noise_std": 0.1,
    },
    "CanonicalAligner": {
        "n_components": 2,
        "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
        "shrinkage": 0.9,
        "weighted": False,
    },
    "FusionClassifier": EFFECTIVE_OF_HEADS | {"join": "late", "class_weight": {0: 5.0}},
    "FusionRegressor": EFFECTIVE_OF_HEADS | {"join": "late"},
    "DecisionFusionClassifier": {
        "estimator": LogisticRegression(C=0.01),
        "estimator__var_smoothing": 1.0,
        "blocks": {"text": [0, 2, 4], "image": [1, 3, 5]},
        "weights": {"text": 0, "image": 1},
        "pooling": "arithmetic",
        "cv": 2,
    },
    "KernelFusionClassifier": EFFECTIVE_OF_KERNELS | {"class_weight": {0: 5.0}},
    "KernelFusionRegressor": EFFECTIVE_OF_KERNELS,
    "EmbeddingClassifier": EFFECTIVE_OF_ENSEMBLES | {"class_weight": {0: 5.0}},
    "EmbeddingRegressor": EFFECTIVE_OF_ENSEMBLES,
    "ZeroShotClassifier": {
        "encoder": CanonicalAligner(1, blocks=HALVES),
        "encoder__shrinkage": 0.9,
        "prompts": {0: "a", 1: "rain", 2: "e"},
        "classes": [0, 2],
        "text_encoder": FrozenEncoder(
            VOWELS, store=None, normalize=True, max_length=None
        ),
        "modality": "text",
        "text_modality": "image",
        "temperature": 0.5,
    },
    "SharedFusionEncoder": EFFECTIVE_OF_SHARED
    | {"fusion": "multiply", "share_layer": False},
    "CrossAttentionAdaptor": EFFECTIVE_OF_SHARED
    | {"n_queries": 0, "n_layers": 2, "output": "tokens"},
    "PatchSegmenter": {
        "hidden_layer_sizes": (5,),
        "grid_shape": (2, 8),
        "classes": [1, 2],
        "mask_size": (6, 6),
        "dropout": 0.5,
        "focal_weight": 10.0,
        "gamma": 0.0,
        "max_epochs": 3,
        "batch_size": 8,
        "lr": 1e-2,
        "weight_decay": 10.0,
        "early_stopping": True,
        "random_state": 1,
        "skorch_params": {"lr": 1e-2},
    },
}
# How the result is come by, not what it is; each has a test of its own.
SILENT_IN_HEADS = {
    "device",
    "verbose",
    "validation_fraction",
    "n_iter_no_change",
    "warm_start",
}
SILENT_IN_SHARED = SILENT_IN_HEADS | {"mask_duplicates"}  # numeric() has none
SILENT = {
    "FrozenEncoder": {
        "batch_size",
        "store",
        "verbose",
        "missing",
        "errors",
        # of checkpoints alone, and refused beside a backend object: see test_huggingface
        "modality",
        "output",
        "pooling",
        "layer",
        "layer_aggregation",
        "max_length",
        "device",
        "dtype",
        "runtime",  # see test_runtimes
        "revision",
        "local_files_only",
        "trust_remote_code",
        "allow_pickle",
    },
    "ContrastiveProjector": {
        "device",
        "verbose",
        # effective with early_stopping, or in what a fit leaves and the next does
        "validation_fraction",
        "n_iter_no_change",
        "warm_start",
    },
    "PerModalityUnion": {"n_jobs", "missing_rows", "keep_unobserved"},
    "MultimodalVectorizer": {"n_jobs", "image_encoder"},  # the table has no images
    "ModalityGapAligner": {
        "widths",
        "random_state",
    },  # of unequal widths, and of the noise
    "CanonicalAligner": set(),
    "FusionClassifier": SILENT_IN_HEADS,
    "FusionRegressor": SILENT_IN_HEADS,
    "DecisionFusionClassifier": {"n_jobs"},
    "KernelFusionClassifier": {"random_state"},  # of more rows than landmarks
    "KernelFusionRegressor": {"random_state"},
    "EmbeddingClassifier": {"n_jobs"},
    "EmbeddingRegressor": {"n_jobs"},
    "SharedFusionEncoder": SILENT_IN_SHARED,
    "CrossAttentionAdaptor": SILENT_IN_SHARED,
    "ZeroShotClassifier": set(),
    "PatchSegmenter": SILENT_IN_HEADS,
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_every_parameter_that_set_params_sets_changes_the_result(case, name):
    estimator, X, y = case
    base = fit_output(clone(estimator), X, y)
    assert (
        set(estimator.get_params(deep=False)) <= EFFECTIVE[name].keys() | SILENT[name]
    )
    for parameter, value in EFFECTIVE[name].items():
        changed = fit_output(clone(estimator).set_params(**{parameter: value}), X, y)
        same = changed.shape == base.shape and np.array_equal(
            changed, base, equal_nan=True
        )
        assert not same, f"{parameter}={value!r} changed nothing"


@pytest.mark.parametrize(
    "name",
    [
        "ContrastiveProjector, plain",
        "FusionClassifier",
        "FusionRegressor",
        "SharedFusionEncoder",
        "PatchSegmenter",
    ],
)
def test_a_resumed_training_has_the_same_validation_set(case, name, monkeypatch):
    estimator, X, y = case
    held_back, split = [], _trained.hold_back

    def watch(*arguments):
        train, valid = split(*arguments)
        held_back.append(sorted(valid))
        return train, valid

    monkeypatch.setattr(_trained, "hold_back", watch)
    estimator.set_params(warm_start=True, early_stopping=True).fit(X, y).fit(X, y)
    assert held_back[0] == held_back[1]
