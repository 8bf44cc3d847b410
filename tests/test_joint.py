"""Encoders of one network share the passes through it, in prefetch and in a union."""

import errno
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklembed import EmbeddingStore, FrozenEncoder, PerModalityUnion, prefetch
from sklembed.encoders import database, runtimes
from sklembed.encoders.huggingface import HuggingFaceBackend

TEXTS = ["the cat", "a dog sat on the mat", "tree", "the red house under a tree"]


@pytest.fixture
def passes(monkeypatch):
    """Outputs of each pass through a network of transformers."""
    passes, run = [], HuggingFaceBackend._states

    def counted(self, model, inputs):
        passes.append(self._outputs)
        return run(self, model, inputs)

    monkeypatch.setattr(HuggingFaceBackend, "_states", counted)
    return passes


def union_of(encoders, column="cell"):
    branches = [(f"b{i}", encoder, column) for i, encoder in enumerate(encoders)]
    return PerModalityUnion(branches)


def images(n=4):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(n)]


TEXT_SETTINGS = [
    {"pooling": "mean"},
    {"pooling": "cls", "layer": -2},
    {"pooling": "max", "layer": [0, 1], "layer_aggregation": "mean"},
    {"pooling": "last", "layer": [-1, -2], "normalize": True},
    {"pooling": "pooler"},
    {"pooling": "mean", "normalize": True},
]


@pytest.mark.parametrize(
    "model, settings",
    [
        ("bert", TEXT_SETTINGS),
        ("qwen", TEXT_SETTINGS[:4]),
        ("vit", [{}, {"pooling": "mean", "layer": 1}]),
        ("dinov2", [{"pooling": "pooler"}, {"layer": -2}, {"normalize": True}]),
        ("resnet", [{}, {"layer": -2}, {"pooling": "max", "layer": [1, -1]}]),
        ("swin", [{"pooling": "mean"}, {"pooling": "pooler"}]),
    ],
)
def test_settings_of_a_model_share_its_passes(
    checkpoints, store, passes, model, settings
):
    cells = TEXTS if model in ("bert", "qwen") else images()
    encoders = [
        FrozenEncoder(checkpoints[model], store=store, **setting)
        for setting in settings
    ]
    prefetch(encoders[0], cells)
    n_of_one = len(passes)
    assert n_of_one
    store = EmbeddingStore(f"{store.path}2")
    for encoder in encoders:
        encoder.set_params(store=store)
    passes.clear()
    X = pd.DataFrame({"cell": pd.Series(cells, dtype=object)})
    report = prefetch(union_of(encoders), X)
    assert len(passes) == n_of_one
    assert report["encoded"].tolist() == [len(cells)] * len(encoders)
    stored = [encoder.transform(cells) for encoder in encoders]
    assert len(passes) == n_of_one  # all vectors were stored
    for vectors, encoder in zip(stored, encoders, strict=True):
        alone = encoder.set_params(store=None).transform(cells)
        np.testing.assert_array_equal(vectors, alone)


def test_a_union_encodes_for_its_branches_together(checkpoints, store, passes):
    mean, last = (
        FrozenEncoder(checkpoints["bert"], store=store, pooling=pooling)
        for pooling in ("mean", "last")
    )
    X = pd.DataFrame({"cell": [*TEXTS, None, "the cat"]})
    union = union_of([mean, make_pipeline(last, StandardScaler())])
    blocks = union.fit_transform(X)
    assert len(passes) == 3  # two of them test which cells may share a batch
    union.transform(X)
    assert len(passes) == 3
    assert store.stats()["encoded"].tolist() == [4, 4]
    np.testing.assert_array_equal(blocks[:, :16], mean.transform(X))


def test_encoders_alone_encode_nothing_in_fit(checkpoints, store, passes):
    encoders = [
        FrozenEncoder(checkpoints["bert"], store=store, pooling=pooling)
        for pooling in ("mean", "last")
    ]
    union_of(encoders).fit(pd.DataFrame({"cell": TEXTS}))
    assert passes == []


@pytest.mark.parametrize(
    "difference",
    [
        {"max_length": 4},
        {"errors": "missing"},
        {"batch_size": 2},
        {"output": "tokens"},
        {"dtype": "bfloat16"},
    ],
)
def test_what_changes_more_than_the_vectors_is_encoded_alone(
    checkpoints, store, passes, difference
):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, layer=1)
    other = FrozenEncoder(checkpoints["bert"], store=store, **difference)
    X = pd.DataFrame({"cell": TEXTS})
    report = prefetch(union_of([encoder, other]), X)
    assert report["encoded"].tolist() == [4, 4]
    assert {tuple(outputs) for outputs in passes} == {(1,), (2,)}


def test_only_cells_that_are_not_stored_are_encoded(checkpoints, store, passes):
    mean, last = (
        FrozenEncoder(checkpoints["bert"], store=store, pooling=pooling, layer=layer)
        for pooling, layer in (("mean", 1), ("last", 2))
    )
    mean.transform(TEXTS[:2])
    last.transform(TEXTS[1:])
    union = union_of([mean, last])
    report = prefetch(union, pd.DataFrame({"cell": TEXTS}))
    assert report["encoded"].tolist() == [2, 1]
    assert prefetch(union, pd.DataFrame({"cell": TEXTS}))["encoded"].tolist() == [0, 0]


def test_vectors_before_an_error_are_stored_for_all(checkpoints, store, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    cells = [*images(), str(tmp_path / "cut.png")]
    encoders = [
        FrozenEncoder(checkpoints["vit"], store=store, layer=layer) for layer in (1, 2)
    ]
    X = pd.DataFrame({"cell": pd.Series(cells, dtype=object)})
    with pytest.raises((OSError, ValueError), match="Row 4"):
        prefetch(union_of(encoders), X)
    assert store.stats()["rows"].tolist() == [4, 4]
    with pytest.raises((OSError, ValueError), match="'b0'"):
        union_of(encoders).fit_transform(X)  # names the branch


def test_a_runtime_that_refuses_the_joint_network_runs_single_ones(
    checkpoints, store, monkeypatch
):
    modules, compare = [], runtimes._compare

    def export(network, inputs, precision, folder):
        (folder / "network.onnx").write_text(f"{len(modules)}")
        modules.append(network.module())

    def load(folder, precision, n_threads):
        module = modules[int((folder / "network.onnx").read_text())]

        def run(arrays):
            tensors = map(torch.from_numpy, arrays.values())
            return [output.numpy() for output in module(*tensors)]

        return run

    def differs(expected, actual, cells, widths):
        error, n_compared = compare(expected, actual, cells, widths)
        return (1.0 if len(widths) > 1 else min(error, 0.1)), n_compared

    monkeypatch.setitem(runtimes._EXPORTERS, "onnx", export)  # is slow
    monkeypatch.setitem(runtimes._LOADERS, "onnx", load)
    monkeypatch.setattr(runtimes, "_compare", differs)
    encoders = [
        FrozenEncoder(checkpoints["bert"], store=store, dtype="int8", pooling=pooling)
        for pooling in ("mean", "last")
    ]
    report = prefetch(union_of(encoders), pd.DataFrame({"cell": TEXTS}))
    assert report["encoded"].tolist() == [4, 4]
    for encoder in encoders:
        stats = encoder.stats()
        assert (stats["rows"], stats["runtime"], stats["dtype"]) == (4, "onnx", "int8")


def test_a_check_compares_each_of_joint_vectors():
    reference = np.float32([100, 0, 0.01, 0])
    vectors = np.float32([100, 0, 0.02, 0])
    assert runtimes.relative_error(vectors, reference) < 1e-3
    assert runtimes.relative_error(vectors, reference, (2, 2)) == pytest.approx(1)
    assert runtimes.relative_error(vectors[:2], reference) == np.inf


def test_reports_name_the_settings(checkpoints, text_backend, store):
    settings = ["pooling", "layer", "unit_length"]
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, layer=[0, -1], normalize=True
    )
    report = prefetch(encoder, TEXTS)
    expected = ["mean", [0, 2], True]
    assert report[settings].to_numpy().tolist() == [expected]
    assert store.stats()[settings].to_numpy().tolist() == [expected]
    stats = encoder.stats()
    assert [stats[name] for name in settings] == expected
    assert stats["rows"] == 4
    report = prefetch(FrozenEncoder(text_backend, store=store), TEXTS)
    assert report[settings].isna().to_numpy().tolist() == [[True, True, False]]


def two_poolings(checkpoints, store, **parameters):
    return [
        FrozenEncoder(checkpoints["bert"], store=store, pooling=pooling, **parameters)
        for pooling in ("mean", "last")
    ]


def test_stored_vectors_are_read_by_a_union_without_joint_passes(
    checkpoints, store, monkeypatch
):
    union = union_of(two_poolings(checkpoints, store))
    X = pd.DataFrame({"cell": TEXTS})
    expected = union.fit_transform(X)

    def passes(self):
        raise AssertionError("the configuration is read")

    monkeypatch.setattr(HuggingFaceBackend, "passes", property(passes))
    np.testing.assert_array_equal(union.transform(X), expected)


def test_equal_columns_are_hashed_once(checkpoints, store, monkeypatch):
    hashed, hash_cells = [], FrozenEncoder._hash_cells

    def count(self, column, modality):
        hashed.append(len(column))
        return hash_cells(self, column, modality)

    monkeypatch.setattr(FrozenEncoder, "_hash_cells", count)
    X = pd.DataFrame({"cell": [*TEXTS, None], "other": [*TEXTS[:-1], "new", None]})
    encoders = two_poolings(checkpoints, store)
    prefetch(union_of(encoders), X)
    assert hashed == [4]
    prefetch(union_of(encoders, column="other"), X)
    assert hashed == [4, 4]
    X = pd.DataFrame({"a": TEXTS, "b": TEXTS})  # errors have to name the column
    branches = zip("ab", encoders, "ab", strict=True)
    prefetch(PerModalityUnion([*branches]), X)
    assert hashed == [4, 4, 4, 4]
    assert store.stats()["rows"].tolist() == [5, 5]


@pytest.mark.parametrize("columns", [["cell", ["cell"]], [0, [True]]])
def test_columns_of_one_or_several_names_share_passes(
    checkpoints, store, passes, columns
):
    encoders = two_poolings(checkpoints, store)
    branches = zip("ab", encoders, columns, strict=True)
    union = PerModalityUnion([*branches]).fit(pd.DataFrame({"cell": TEXTS}))
    passes.clear()
    union.transform(pd.DataFrame({"cell": ["a new text", "another"]}))
    assert len(passes) == 1


def test_vectors_that_cannot_be_stored_are_encoded_once(checkpoints, store, passes):
    encoders = two_poolings(checkpoints, store)
    prefetch(encoders[0], TEXTS)
    n_of_one = len(passes)
    with mock.patch.object(database, "transaction", side_effect=full_disk):
        X = pd.DataFrame({"cell": [f"{text} again" for text in TEXTS]})
        passes.clear()
        with pytest.warns(UserWarning, match="cannot be written"):
            report = prefetch(union_of(encoders), X)
    assert report["encoded"].tolist() == [4, 4]
    assert len(passes) <= n_of_one


def full_disk(db):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_store_that_deletes_vectors_is_not_filled_for_a_union(
    checkpoints, store, passes
):
    small = EmbeddingStore(store.path, max_bytes=100)
    union = union_of(two_poolings(checkpoints, small))
    X = pd.DataFrame({"cell": TEXTS[:1]})
    union.fit_transform(X)
    assert [len(outputs) for outputs in passes] == [1, 1]
