"""Long arrays, also on disk and in half precision, are processed in pieces of rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression

import sklembed as sk
from sklembed import _validation

BLOCKS = {"a": slice(0, 6), "b": slice(6, 12)}
N_ROWS = 50

rng = np.random.default_rng(0)
Y = rng.integers(0, 3, N_ROWS)
TABLE = rng.normal(size=(N_ROWS, 12)).astype(np.float32) + Y[:, None]

ESTIMATORS = {
    "projector": sk.ContrastiveProjector(4, max_epochs=1, cv=None, random_state=0),
    "gap": sk.ModalityGapAligner(BLOCKS),
    "canonical": sk.CanonicalAligner(3, blocks=BLOCKS),
    "decision": sk.DecisionFusionClassifier(LogisticRegression(), blocks=BLOCKS),
    "fusion": sk.FusionClassifier(blocks=BLOCKS, max_epochs=1, random_state=0),
    "fusion regression": sk.FusionRegressor(
        blocks=BLOCKS, max_epochs=1, random_state=0
    ),
    "kernel": sk.KernelFusionClassifier(blocks=BLOCKS),
    "kernel regression": sk.KernelFusionRegressor(blocks=BLOCKS),
    "ensemble": sk.EmbeddingClassifier(
        members=["linear"], blocks=BLOCKS, random_state=0
    ),
    "ensemble regression": sk.EmbeddingRegressor(
        members=["linear"], blocks=BLOCKS, random_state=0
    ),
    "shared": sk.SharedFusionEncoder(blocks=BLOCKS, max_epochs=1, random_state=0),
    "adaptor": sk.CrossAttentionAdaptor(blocks=BLOCKS, max_epochs=1, random_state=0),
}


@pytest.fixture(params=["float32", "float16"])
def table_on_disk(request, tmp_path):
    np.save(tmp_path / "table.npy", TABLE.astype(request.param))
    return np.load(tmp_path / "table.npy", mmap_mode="r")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pieces_give_the_same_output(name, table_on_disk, monkeypatch):
    estimator = ESTIMATORS[name].fit(TABLE, Y)
    methods = "transform predict_proba decision_function predict".split()
    methods = [method for method in methods if hasattr(estimator, method)]
    expected = [getattr(estimator, method)(table_on_disk) for method in methods]
    monkeypatch.setattr(_validation, "_PIECE_ROWS", 7)
    for method, output in zip(methods, expected, strict=True):
        pieces = getattr(estimator, method)(table_on_disk)
        assert pieces.dtype == output.dtype
        np.testing.assert_allclose(pieces, output, rtol=1e-4, atol=1e-5)


def test_an_error_says_from_which_row_its_numbers_count(monkeypatch):
    estimator = ESTIMATORS["projector"].fit(TABLE, Y)
    monkeypatch.setattr(_validation, "_PIECE_ROWS", 20)
    X = TABLE.copy()
    X[43, 2] = np.nan
    with pytest.raises(ValueError, match="columns of row 3") as caught:
        estimator.transform(X)
    assert caught.value.__notes__ == ["Row numbers count from row 40 of X."]


def test_arguments_may_be_keywords(monkeypatch):
    estimator = sk.ModalityGapAligner(BLOCKS).fit(TABLE)
    expected = estimator.encode(X=TABLE[:, :6], modality="a")
    monkeypatch.setattr(_validation, "_PIECE_ROWS", 20)
    pieces = estimator.encode(X=TABLE[:, :6], modality="a")
    np.testing.assert_allclose(pieces, expected, rtol=1e-5)


def test_names_of_the_output_are_kept(monkeypatch):
    estimator = sk.ModalityGapAligner(BLOCKS).fit(TABLE).set_output(transform="pandas")
    expected = estimator.transform(TABLE)
    monkeypatch.setattr(_validation, "_PIECE_ROWS", 20)
    assert estimator.transform(TABLE).columns.equals(expected.columns)


def test_a_projector_learns_from_batches_of_parquet(tmp_path):
    rows = pa.FixedSizeListArray.from_arrays(TABLE.ravel(), 12)
    pq.write_table(pa.table({"vector": rows, "label": Y}), tmp_path / "train.parquet")
    projector = sk.ContrastiveProjector(4, random_state=0)
    for _ in range(20):
        for batch in pq.ParquetFile(tmp_path / "train.parquet").iter_batches(25):
            vectors = batch["vector"].flatten().to_numpy().reshape(-1, 12)
            projector.partial_fit(vectors, batch["label"].to_numpy())
    Z = projector.transform(TABLE)
    same = Y[:, None] == Y
    assert (Z @ Z.T)[same].mean() > (Z @ Z.T)[~same].mean() + 0.5
