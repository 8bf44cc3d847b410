"""Files of estimators and pipelines without code, and ONNX graphs of projectors."""

import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA

import sklembed
from sklembed import ContrastiveProjector


def small(**options):
    defaults = {
        "n_components": 4,
        "hidden_layer_sizes": (16,),
        "max_epochs": 2,
        "batch_size": 32,
        "random_state": 0,
        "cv": 3,
    }
    return ContrastiveProjector(**(defaults | options))


def target(kind, y):
    """Make a target of any kind of three classes."""
    rng = np.random.default_rng(0)
    return {
        "int": y,
        "str": np.array(["ant", "bee", "cöw"])[y],
        "object": np.array(["ant", "bee", "cow"], dtype=object)[y],
        "float": y * 2.0,
        "bool": y == 1,
        "multilabel": (rng.random((90, 3)) < 0.4).astype(int) | np.eye(3, dtype=int)[y],
        "continuous": y + rng.normal(size=90),
        "hierarchical": np.column_stack([y, 3 * y + rng.integers(0, 2, 90)]),
        "levels of words": np.array([["pet", "cat"], ["pet", "dog"], ["wild", "lion"]])[
            y
        ],
    }[kind]


def assert_same_state(first, second):
    """Compare all that two estimators hold, arrays by value and type."""
    if isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert type(first) is type(second)
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_state(one, other)
    else:
        assert first == second


def round_trip(projector, directory):
    projector.save(directory)
    loaded = ContrastiveProjector.load(directory)
    assert_same_state(vars(projector), vars(loaded))
    return loaded


KINDS = [
    "int",
    "str",
    "object",
    "float",
    "bool",
    "multilabel",
    "continuous",
    "hierarchical",
]


@pytest.mark.parametrize("kind", [*KINDS, "levels of words"])
def test_what_is_loaded_is_what_was_saved(clusters, tmp_path, kind):
    X, y = clusters
    projector = small().fit(X, target(kind, y))
    loaded = round_trip(projector, tmp_path / "a" / "b")
    np.testing.assert_array_equal(loaded.transform(X), projector.transform(X))
    np.testing.assert_array_equal(
        loaded.get_feature_names_out(), projector.get_feature_names_out()
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("passthrough", [True, False, "auto"])
def test_what_the_gate_lets_through_is_saved(
    clusters, tmp_path, passthrough, similarity
):
    X, y = clusters
    projector = small(passthrough=passthrough, similarity=similarity)
    projector.fit_transform(X, y)
    loaded = round_trip(projector, tmp_path)
    np.testing.assert_array_equal(loaded.transform(X), projector.transform(X))
    assert loaded.gate_ == projector.gate_


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_layer_sizes": ()},
        {"hidden_layer_sizes": [9, 5]},
        {"class_weight": {0: 2.0, 1: 1.0, 2: 0.5}},
        {"cv": None, "lr": np.float32(0.01), "max_epochs": np.int64(2)},
        {"early_stopping": True},
        {"skorch_params": {"optimizer__betas": (0.8, 0.9)}},
    ],
    ids=str,
)
def test_parameters_come_back(clusters, tmp_path, options):
    projector = small(**options).fit(*clusters)
    projector.save(tmp_path)
    loaded = ContrastiveProjector.load(tmp_path)
    assert clone(loaded).get_params() == clone(projector).get_params()
    np.testing.assert_array_equal(
        clone(loaded).fit(*clusters).transform(clusters[0]),
        projector.transform(clusters[0]),
    )


def test_column_names_are_saved(clusters, tmp_path):
    X, y = clusters
    frame = pd.DataFrame(X, columns=[f"größe {i}" for i in range(20)])
    projector = small().set_output(transform="pandas").fit(frame, y)
    loaded = round_trip(projector, tmp_path)
    pd.testing.assert_frame_equal(loaded.transform(frame), projector.transform(frame))
    with pytest.raises(ValueError, match="feature names"):
        loaded.transform(frame.rename(columns={"größe 0": "length"}))


def test_a_projector_is_saved_over_another(clusters, tmp_path):
    X, y = clusters
    small().fit(X, y).save(tmp_path)
    second = small(hidden_layer_sizes=()).fit(X, y)
    np.testing.assert_array_equal(
        round_trip(second, tmp_path).transform(X), second.transform(X)
    )
    names = {path.name for path in tmp_path.iterdir()} - {".lock"}
    config, weights = sorted(names)
    assert config == "config.json"
    assert weights.startswith("weights-")


def test_a_loaded_projector_goes_on_training_as_the_saved_one(clusters, tmp_path):
    X, y = clusters
    projector = small(passthrough=False).fit(X, y)
    loaded = round_trip(projector, tmp_path)
    np.testing.assert_array_equal(
        loaded.partial_fit(X, y).transform(X), projector.partial_fit(X, y).transform(X)
    )


def test_requests_for_metadata_do_not_stand_in_the_way(clusters, tmp_path):
    import sklearn

    with sklearn.config_context(enable_metadata_routing=True):
        projector = small().set_fit_request(sample_weight=True).fit(*clusters)
        projector.save(tmp_path)
        loaded = ContrastiveProjector.load(tmp_path)
    np.testing.assert_array_equal(
        loaded.transform(clusters[0]), projector.transform(clusters[0])
    )


def test_loading_needs_no_torch(clusters, tmp_path):
    X, y = clusters
    projector = small(passthrough="auto").fit(X, y)
    projector.save(tmp_path / "it")
    joblib.dump((projector, X, projector.transform(X)), tmp_path / "it.joblib")
    code = """
import joblib, sys
import numpy as np
from sklembed import ContrastiveProjector
unpickled, X, Z = joblib.load("it.joblib")
for projector in (unpickled, ContrastiveProjector.load("it")):
    np.testing.assert_array_equal(projector.transform(X), Z)
assert not {"torch", "skorch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# Refused


def any_loss(z, affinity):
    return (z @ z.T - affinity).square().mean()


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"loss": any_loss}, "loss"),
        (
            {"skorch_params": {"predict_nonlinearity": any_loss}},
            "skorch_params/predict_nonlinearity",
        ),
    ],
    ids=["loss", "skorch_params"],
)
def test_functions_are_refused_before_anything_is_written(
    clusters, tmp_path, options, place
):
    projector = small(**options).fit(*clusters)
    with pytest.raises(TypeError, match=f"{place} is the function .*any_loss, which"):
        projector.save(tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_labels_of_other_types_are_refused(clusters, tmp_path):
    X, y = clusters
    days = np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    projector = small().fit(X, days[y].astype(object))
    with pytest.raises(TypeError, match="classes_/0 is a datetime.date, which"):
        projector.save(tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_an_unfitted_projector_is_not_saved(tmp_path):
    for write in (small().save, small().to_onnx):
        with pytest.raises(ValueError, match="not fitted"):
            write(tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_an_estimator_of_another_class_is_not_loaded(clusters, tmp_path):
    sklembed.save(PCA(2).fit(clusters[0]), tmp_path)
    with pytest.raises(ValueError, match="contains a PCA; expected a ContrastiveProj"):
        ContrastiveProjector.load(tmp_path)


def run_onnx(projector, X, path):
    import onnxruntime

    projector.to_onnx(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (Z,) = session.run(None, {"X": X})
    return Z


@pytest.mark.parametrize("n_rows", [1, 50])
@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("hidden", [(), (7,), (9, 5)])
def test_the_onnx_graph_computes_transform(
    clusters, tmp_path, hidden, similarity, passthrough, n_rows
):
    X, y = clusters
    projector = small(
        hidden_layer_sizes=hidden, similarity=similarity, passthrough=passthrough
    ).fit(X, y)
    rows = X[::2][:n_rows] if n_rows == 1 else X[:n_rows]
    Z = run_onnx(projector, rows, tmp_path / "it.onnx")
    assert Z.dtype == np.float32
    np.testing.assert_allclose(Z, projector.transform(rows), atol=1e-5)


@pytest.mark.parametrize("gate", ["passthrough", "projection", "both"])
def test_the_onnx_graph_follows_the_gate(clusters, tmp_path, monkeypatch, gate):
    X, y = clusters
    monkeypatch.setattr("sklembed.projection.projector.choose", lambda *_: (gate, {}))
    projector = small(passthrough="auto").fit(X, y)
    assert projector.gate_ == gate
    Z = run_onnx(projector, X, tmp_path / "it.onnx")
    np.testing.assert_allclose(Z, projector.transform(X), atol=1e-5)


@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_rows_of_nan_stay_nan_in_onnx_and_only_these(
    clusters, tmp_path, similarity, passthrough
):
    X, y = clusters
    projector = small(similarity=similarity, passthrough=passthrough).fit(X, y)
    X = X.copy()
    X[::7] = np.nan
    Z, expected = run_onnx(projector, X, tmp_path / "it.onnx"), projector.transform(X)
    np.testing.assert_array_equal(np.isnan(Z), np.isnan(expected))
    assert np.isnan(Z[::7]).all()
    np.testing.assert_allclose(Z, expected, atol=1e-5)


def test_a_missing_onnx_names_the_command_that_brings_it(
    clusters, tmp_path, monkeypatch
):
    projector = small().fit(*clusters)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'sklembed\[onnx\]'"):
        projector.to_onnx(tmp_path / "it.onnx")
    assert not (tmp_path / "it.onnx").exists()
