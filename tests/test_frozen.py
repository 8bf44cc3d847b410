"""FrozenEncoder: cells in, vectors out, each distinct cell once, and clear refusals."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import count_letters, mean_colours
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder

TEXTS = ["a note", "another", "a note", "the end"]


@pytest.fixture
def counting():
    """A text backend and the list of every text it has been given."""
    seen = []

    def load():
        def encode(texts):
            seen.extend(texts)
            return count_letters(texts)

        return encode

    version = str(id(seen))  # a loaded backend stays loaded for the whole process
    return CallableBackend(load, name="c", version=version, modality="text", n_features=9), seen


def column_forms(texts):
    return {
        "list": texts,
        "nested list": [[text] for text in texts],
        "array": np.array(texts),
        "object array": np.array(texts, dtype=object),
        "array of one column": np.array(texts, dtype=object)[:, None],
        "reversed view": np.array(texts[::-1], dtype=object)[::-1],
        "series": pd.Series(texts, index=list("wxyz")),
        "frame": pd.DataFrame({"note": texts}),
        "string dtype": pd.Series(texts, dtype="string"),
        "categories": pd.Series(texts, dtype="category"),
        "polars series": pl.Series("note", texts),
        "polars frame": pl.DataFrame({"note": texts}),
    }


@pytest.mark.parametrize("form", column_forms(TEXTS))
def test_any_form_of_column_gives_the_same_vectors(text_backend, form):
    vectors = FrozenEncoder(text_backend, store=None).fit_transform(column_forms(TEXTS)[form])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, count_letters(TEXTS))


def test_distinct_cells_are_encoded_once_in_a_call(counting):
    backend, seen = counting
    FrozenEncoder(backend, store=None).transform(TEXTS * 10)
    assert sorted(seen) == ["a note", "another", "the end"]


def test_distinct_cells_are_encoded_once_ever(counting, store):
    backend, seen = counting
    encoder = FrozenEncoder(backend, store=store)
    first = encoder.transform(TEXTS)
    again = clone(encoder).transform(TEXTS[::-1])
    in_another_run = FrozenEncoder(backend, store=store.path).transform(pd.Series(TEXTS))
    assert len(seen) == 3
    np.testing.assert_array_equal(first, again[::-1])
    np.testing.assert_array_equal(first, in_another_run)
    stats = encoder.stats()
    assert stats == {"rows": 3, "bytes": 108, "encoded": 3, "served": 6, "hit_rate": 2 / 3}


def test_stats_of_an_encoder_that_has_done_nothing(text_backend, store):
    stats = FrozenEncoder(text_backend, store=store).stats()
    assert np.isnan(stats.pop("hit_rate"))
    assert stats == {"rows": 0, "bytes": 0, "encoded": 0, "served": 0}


def test_stats_without_a_store(text_backend):
    with pytest.raises(ValueError, match="store=None keeps nothing"):
        FrozenEncoder(text_backend, store=None).stats()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_hit_equals_a_miss_within_the_documented_tolerance(checkpoints, store, dtype):
    """The store's vector was made in another batch than the fresh one."""
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    texts = ["the cat", "a dog sat on the mat and slept", "tree", "the dog ran under a tree then"]
    encoder = FrozenEncoder(checkpoints["bert"], dtype=dtype, store=store)
    encoder.transform(texts[::2])
    mixed = encoder.transform(texts)
    fresh = clone(encoder).set_params(store=None, batch_size=1).transform(texts)
    error = np.linalg.norm(mixed - fresh, axis=1) / np.linalg.norm(fresh, axis=1)
    assert error.max() < tolerance


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_grid_search_encodes_each_distinct_row_once(store, n_jobs):
    """Cold store, shuffled folds, several candidates; then once more, for nothing."""
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"note": [f"note {rng.integers(150)} {'xo'[i % 2]}" for i in range(240)]})
    backend = CallableBackend(_load_slowly, name="s", version="1", modality="text", n_features=9)
    encoder = FrozenEncoder(backend, store=store, batch_size=4)
    for seed in (0, 1):
        GridSearchCV(
            make_pipeline(encoder, LogisticRegression()),
            {"logisticregression__C": [0.1, 1, 10]},
            cv=StratifiedKFold(4, shuffle=True, random_state=seed),
            n_jobs=n_jobs,
            error_score="raise",
        ).fit(X[["note"]], np.arange(240) % 2)
        assert encoder.stats()["encoded"] == encoder.stats()["rows"] == X["note"].nunique()


def _load_slowly():
    import time

    def encode(texts):
        time.sleep(0.01)
        return count_letters(texts)

    return encode


def test_missing_cells_are_rows_of_nan(text_backend):
    vectors = FrozenEncoder(text_backend, store=None).transform(
        pd.Series([None, "a", np.nan, pd.NA, ""])
    )
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, True, True, False]


def test_missing_cells_can_be_an_error(text_backend):
    encoder = FrozenEncoder(text_backend, missing="error")
    with pytest.raises(ValueError, match=r"Row 1 \(index 'b'\) of column 'note' is missing"):
        encoder.fit(pd.DataFrame({"note": ["x", None]}, index=["a", "b"]))


def test_transform_of_missing_cells_only_is_nan(text_backend, store):
    vectors = FrozenEncoder(text_backend, store=store).transform([None, None])
    assert vectors.shape == (2, 9)
    assert np.isnan(vectors).all()


def test_normalize_scales_to_unit_length(text_backend):
    vectors = FrozenEncoder(text_backend, normalize=True, store=None).transform(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_images_of_every_form_are_encoded(image_backend, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    cells = [path, str(path), path.read_bytes(), {"path": path}, pixels, Image.open(path), None]
    vectors = FrozenEncoder(image_backend, store=None).transform(cells)
    np.testing.assert_allclose(vectors[:6], np.repeat(mean_colours([pixels]), 6, 0), rtol=1e-6)
    assert np.isnan(vectors[6]).all()


def test_fit_runs_nothing(counting):
    backend, seen = counting
    assert FrozenEncoder(backend).fit(TEXTS).n_features_in_ == 1
    assert not seen


def test_set_output_and_feature_names(text_backend):
    encoder = FrozenEncoder(text_backend, store=None).set_output(transform="pandas")
    frame = encoder.fit_transform(pd.DataFrame({"note": TEXTS}, index=list("wxyz")))
    assert frame.columns.tolist() == [f"frozenencoder{i}" for i in range(9)]
    assert frame.index.tolist() == list("wxyz")
    assert encoder.feature_names_in_.tolist() == ["note"]
    polars = FrozenEncoder(text_backend, store=None).set_output(transform="polars")
    assert isinstance(polars.fit_transform(pl.DataFrame({"note": TEXTS})), pl.DataFrame)


def test_a_pickle_carries_no_weights_and_works_after_loading(checkpoints, store):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32").fit(TEXTS)
    vectors = encoder.transform(TEXTS)
    data = pickle.dumps(encoder)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data).transform(TEXTS), vectors)


def test_a_broken_picture_is_refused_by_row_and_what_came_before_is_kept(image_backend, store):
    good = [np.full((4, 4, 3), value, dtype=np.uint8) for value in range(5)]
    X = pd.DataFrame({"scan": [*good, b"\x89PNG\r\n\x1a\n broken"]}, index=range(100, 106))
    encoder = FrozenEncoder(image_backend, store=store, batch_size=2)
    with pytest.raises(ValueError, match=r"Row 5 \(index 105\) of column 'scan': cannot decode"):
        encoder.transform(X)
    assert encoder.stats()["rows"] == 5


def test_unreadable_pictures_can_count_as_missing(image_backend, store):
    good = np.zeros((2, 2, 3), dtype=np.uint8)
    X = pd.DataFrame({"scan": [b"broken", good, "no/such/file.png", b"broken"]})
    encoder = FrozenEncoder(image_backend, store=store, errors="missing")
    with pytest.warns(UserWarning, match="of column 'scan' could not be read") as caught:
        vectors = encoder.transform(X)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("3 cells")
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, True, True]


def test_a_picture_of_the_wrong_type_is_refused_even_so(image_backend):
    with pytest.raises(TypeError, match="Row 0 of the column: expected an image, got int"):
        FrozenEncoder(image_backend, errors="missing").transform([5])


def test_nothing_is_loaded_before_bad_cells_are_found():
    def load():
        raise AssertionError("loaded")

    backend = CallableBackend(load, name="no", version="1", modality="text", n_features=1)
    with pytest.raises(TypeError, match="Row 1 of the column: expected a str, got int"):
        FrozenEncoder(backend, store=None).transform(["fine", 3])


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ([], ValueError, "0 samples.*the table is empty"),
        (pd.DataFrame({"note": []}), ValueError, "column 'note' has 0 cells"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), ValueError, r"X has 2: \['a', 'b'\]"),
        (np.array([["x", "y"]]), ValueError, r"X has shape \(1, 2\)"),
        ("one text", TypeError, "X must be one column of cells"),
        (Path("one.png"), TypeError, "X must be one column of cells"),
        ({"note": ["x"]}, TypeError, "X must be one column of cells"),
        (pd.DataFrame({"note": [None, None]}), ValueError, "All 2 cells of column 'note'"),
        (["fine", b"bytes"], TypeError, "Row 1 of the column: expected a str, got bytes"),
    ],
)
def test_bad_columns_are_refused(text_backend, X, error, message):
    with pytest.raises(error, match=message):
        FrozenEncoder(text_backend).fit(X)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.full((2, 9), 1e300), "Row 0 of the column: .* NaN or too large numbers"),
        (np.zeros((2, 3)), r"returned shape \(2, 3\)"),
        (np.zeros(9), r"returned shape \(9,\)"),
        (np.full((2, 9), np.nan), "Row 0 .* returned NaN or too large numbers: for the cell 'a'"),
    ],
)
def test_a_backend_that_breaks_its_promise_is_refused(store, made, message):
    backend = CallableBackend(
        lambda: lambda texts: made,
        name=message,
        version=str(made.max()),
        modality="text",
        n_features=9,
    )
    encoder = FrozenEncoder(backend, store=store)
    with pytest.raises(ValueError, match=message):
        encoder.transform(["a", "b"])
    assert encoder.stats()["rows"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "cls"}, ValueError, "pooling would have no effect"),
        ({"max_length": 5, "dtype": "float16"}, ValueError, "max_length, dtype would have no"),
        ({"modality": "image"}, ValueError, "modality='image', but .* takes text"),
        ({"model": 3}, TypeError, "got 3, which lacks"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"store": 3}, ValueError, "store"),
    ],
)
def test_bad_parameters_are_refused(text_backend, options, error, message):
    with pytest.raises(error, match=message):
        FrozenEncoder(**({"model": text_backend, "store": None} | options)).transform(["x"])


def test_a_progress_bar_appears_only_when_asked(text_backend, store, capsys):
    FrozenEncoder(text_backend, store=store).transform(TEXTS)
    assert capsys.readouterr().err == ""
    FrozenEncoder(text_backend, store=store, verbose=1).transform([*TEXTS, "new"])
    assert "encoding the column: 100%" in capsys.readouterr().err
    FrozenEncoder(text_backend, store=store, verbose=1).transform(TEXTS)
    assert capsys.readouterr().err == ""  # nothing to encode


def test_without_a_store_nothing_is_written(text_backend, monkeypatch, tmp_path):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "store.sqlite"))
    FrozenEncoder(text_backend, store=None).transform(TEXTS)
    assert not list(tmp_path.iterdir())
    FrozenEncoder(text_backend).transform(TEXTS)
    assert (tmp_path / "store.sqlite").exists()


def test_a_store_that_cannot_be_used_is_a_clear_error(text_backend, tmp_path):
    (tmp_path / "notes").write_text("not a database, just some notes, long enough " * 50)
    with pytest.raises(OSError, match="pass store=None"):
        FrozenEncoder(text_backend, store=tmp_path / "notes").transform(TEXTS)


def test_forked_children_start_afresh(text_backend):
    """A thread of the parent is inside a model, and so holds the lock, when the child is born."""
    import os
    import threading

    inside, leave = threading.Event(), threading.Event()

    def load():
        def encode(texts):
            inside.set()
            leave.wait(timeout=60)
            return np.zeros((len(texts), 1))

        return encode

    slow = CallableBackend(load, name="slow", version="1", modality="text", n_features=1)
    thread = threading.Thread(target=FrozenEncoder(slow, store=None).transform, args=(["a"],))
    thread.start()
    inside.wait(timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        child = os.fork()
    if child == 0:
        import signal

        signal.alarm(20)  # a deadlock ends the child
        vectors = FrozenEncoder(text_backend, store=None).transform(TEXTS)
        os._exit(0 if np.array_equal(vectors, count_letters(TEXTS)) else 1)
    status = os.waitpid(child, 0)[1]
    leave.set()
    thread.join()
    assert status == 0


def test_threads_use_a_model_one_at_a_time():
    import threading
    import time

    busy = []

    def load():
        def encode(texts):
            busy.append(1)
            assert len(busy) == 1
            time.sleep(0.02)
            busy.pop()
            return np.zeros((len(texts), 1))

        return encode

    backend = CallableBackend(load, name="busy", version="1", modality="text", n_features=1)
    failures = []

    def work():
        try:
            FrozenEncoder(backend, store=None, batch_size=1).transform(["a", "b", "c"])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_texts_are_encoded_longest_first(counting):
    backend, seen = counting
    FrozenEncoder(backend, store=None).transform(["aa", "aaaa", "a", "aaa"])
    assert seen == ["aaaa", "aaa", "aa", "a"]


def test_stores_are_given_by_path_or_object(text_backend, tmp_path):
    path = tmp_path / "one.sqlite"
    FrozenEncoder(text_backend, store=str(path)).transform(TEXTS)
    assert EmbeddingStore(path).stats()["rows"].item() == 3


def test_a_backend_s_own_description_is_left_alone():
    class Described(CallableBackend):
        def describe(self):
            return described

    described = {"backend": "mine"}
    backend = Described(lambda: len, name="d", version="1", modality="text", n_features=1)
    spaces = [
        FrozenEncoder(backend, normalize=normalize)._space(backend) for normalize in (True, False)
    ]
    assert described == {"backend": "mine"}
    assert spaces[0].fingerprint != spaces[1].fingerprint


def test_repeated_rows_are_copied_in_blocks(text_backend, monkeypatch):
    monkeypatch.setattr("sklembed.encoders.frozen._COPIED_ROWS", 3)
    texts = [None, *TEXTS, None, *TEXTS[::-1], *TEXTS]
    vectors = FrozenEncoder(text_backend, store=None).transform(texts)
    filled = [text or "" for text in texts]
    expected = np.where([[t is None] for t in texts], np.nan, count_letters(filled))
    np.testing.assert_array_equal(vectors, expected)


def test_parameters_are_checked_against_the_model_before_cells_are_read(checkpoints):
    with pytest.raises(ValueError, match="layer=99"):
        FrozenEncoder(checkpoints["bert"], layer=99).transform([3])


def test_looking_at_an_encoder_asks_its_model_nothing(text_backend):
    for encoder in (FrozenEncoder("no/such/model"), FrozenEncoder(text_backend).fit(TEXTS)):
        assert "transform" in dir(encoder)
        assert "FrozenEncoder" in encoder._repr_html_()


def test_what_the_store_exports_can_be_matched_with_the_table(text_backend, store, tmp_path):
    encoder = FrozenEncoder(text_backend, store=store)
    texts = [*TEXTS, None]
    vectors = encoder.transform(texts)
    store.export(tmp_path / "all.parquet", model=encoder.fingerprint())
    exported = pd.read_parquet(tmp_path / "all.parquet").set_index("digest")
    digests = encoder.digests(texts)
    assert digests[-1] is None
    for digest, vector in zip(digests[:-1], vectors, strict=False):
        np.testing.assert_array_equal(exported.loc[digest, "vector"], vector)


def test_another_column_than_that_of_fit_is_refused(text_backend):
    encoder = FrozenEncoder(text_backend, store=None).fit(pd.DataFrame({"note": TEXTS}))
    encoder.transform(TEXTS)  # without a name
    with pytest.raises(ValueError, match="feature names should match.*fitted on 'note', and X is"):
        encoder.transform(pd.DataFrame({"title": TEXTS}))


def test_a_cell_that_cannot_be_prepared_is_named(store):
    def prepare(text):
        if text == "bad":
            raise ValueError("no such word")
        return text

    backend = CallableBackend(
        lambda: (prepare, count_letters), name="p", version="1", modality="text", n_features=9
    )
    encoder = FrozenEncoder(backend, store=store)
    with pytest.raises(ValueError, match="Row 1 of the column: no such word"):
        encoder.transform(["good", "bad"])
    with pytest.warns(UserWarning, match="1 cells of the column"):
        vectors = encoder.set_params(errors="missing").transform(["good", "bad"])
    assert np.isnan(vectors[:, 0]).tolist() == [False, True]
