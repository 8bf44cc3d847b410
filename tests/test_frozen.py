"""FrozenEncoder: cells in, vectors out, each distinct cell once, and clear refusals."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

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
from sklembed.encoders import cells
from sklembed.encoders import checkpoints as checkpoint_module

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
    return CallableBackend(
        load, name="c", version=version, modality="text", n_features=9
    ), seen


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
    vectors = FrozenEncoder(text_backend, store=None).fit_transform(
        column_forms(TEXTS)[form]
    )
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
    in_another_run = FrozenEncoder(backend, store=store.path).transform(
        pd.Series(TEXTS)
    )
    assert len(seen) == 3
    np.testing.assert_array_equal(first, again[::-1])
    np.testing.assert_array_equal(first, in_another_run)
    stats = encoder.stats()
    assert stats == {
        "model": "c",
        "pooling": None,
        "layer": None,
        "unit_length": False,
        "rows": 3,
        "bytes": 108,
        "encoded": 3,
        "served": 6,
        "hit_rate": 2 / 3,
        "runtime": None,
        "dtype": "float32",
    }


def test_stats_of_an_encoder_that_has_done_nothing(text_backend, store):
    stats = FrozenEncoder(text_backend, store=store).stats()
    assert np.isnan(stats.pop("hit_rate"))
    counts = {"rows": 0, "bytes": 0, "encoded": 0, "served": 0}
    settings = {"pooling": None, "layer": None, "unit_length": False}
    assert stats == {"model": "letters"} | settings | counts | {
        "runtime": None,
        "dtype": "float32",
    }


def test_stats_without_a_store(text_backend):
    with pytest.raises(ValueError, match="store=None stores no vectors"):
        FrozenEncoder(text_backend, store=None).stats()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_hit_equals_a_miss_within_the_documented_tolerance(
    checkpoints, store, dtype
):
    """The store's vector was made in another batch than the fresh one."""
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    texts = [
        "the cat",
        "a dog sat on the mat and slept",
        "tree",
        "the dog ran under a tree then",
    ]
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
    X = pd.DataFrame(
        {"note": [f"note {rng.integers(150)} {'xo'[i % 2]}" for i in range(240)]}
    )
    backend = CallableBackend(
        _load_slowly, name="s", version="1", modality="text", n_features=9
    )
    encoder = FrozenEncoder(backend, store=store, batch_size=4)
    for seed in (0, 1):
        GridSearchCV(
            make_pipeline(encoder, LogisticRegression()),
            {"logisticregression__C": [0.1, 1, 10]},
            cv=StratifiedKFold(4, shuffle=True, random_state=seed),
            n_jobs=n_jobs,
            error_score="raise",
        ).fit(X[["note"]], np.arange(240) % 2)
        assert (
            encoder.stats()["encoded"] == encoder.stats()["rows"] == X["note"].nunique()
        )


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
    with pytest.raises(
        ValueError, match=r"Row 1 \(index 'b'\) of column 'note' is missing"
    ):
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
    cells = [
        path,
        str(path),
        path.read_bytes(),
        {"path": path},
        pixels,
        Image.open(path),
        None,
    ]
    vectors = FrozenEncoder(image_backend, store=None).transform(cells)
    np.testing.assert_allclose(
        vectors[:6], np.repeat(mean_colours([pixels]), 6, 0), rtol=1e-6
    )
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
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32").fit(
        TEXTS
    )
    vectors = encoder.transform(TEXTS)
    data = pickle.dumps(encoder)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data).transform(TEXTS), vectors)


def test_a_broken_picture_is_refused_by_row_and_what_came_before_is_kept(
    image_backend, store
):
    good = [np.full((4, 4, 3), value, dtype=np.uint8) for value in range(5)]
    X = pd.DataFrame(
        {"scan": [*good, b"\x89PNG\r\n\x1a\n broken"]}, index=range(100, 106)
    )
    encoder = FrozenEncoder(image_backend, store=store, batch_size=2)
    with pytest.raises(
        ValueError, match=r"Row 5 \(index 105\) of column 'scan': cannot decode"
    ):
        encoder.transform(X)
    assert encoder.stats()["rows"] == 5


def test_unreadable_pictures_can_count_as_missing(image_backend, store):
    good = np.zeros((2, 2, 3), dtype=np.uint8)
    X = pd.DataFrame({"scan": [b"broken", good, "no/such/file.png", b"broken"]})
    encoder = FrozenEncoder(image_backend, store=store, errors="missing")
    with pytest.warns(
        UserWarning, match="of column 'scan' could not be read"
    ) as caught:
        vectors = encoder.transform(X)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("3 cells")
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, True, True]


def test_a_picture_of_the_wrong_type_is_refused_even_so(image_backend):
    with pytest.raises(
        TypeError, match="Row 0 of the column: expected an image, got int"
    ):
        FrozenEncoder(image_backend, errors="missing").transform([5])


def test_nothing_is_loaded_before_bad_cells_are_found():
    def load():
        raise AssertionError("loaded")

    backend = CallableBackend(
        load, name="no", version="1", modality="text", n_features=1
    )
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
        (
            pd.DataFrame({"note": [None, None]}),
            ValueError,
            "All 2 cells of column 'note'",
        ),
        (
            ["fine", b"bytes"],
            TypeError,
            "Row 1 of the column: expected a str, got bytes",
        ),
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
        (
            np.full((2, 9), np.nan),
            "Row 0 .* returned NaN or too large numbers: cell 'a'",
        ),
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
        (
            {"max_length": 5, "dtype": "float16"},
            ValueError,
            "max_length, dtype would have no",
        ),
        ({"modality": "image"}, ValueError, "modality='image', but .* encodes text"),
        ({"model": 3}, TypeError, "got 3, which lacks"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"store": 3}, ValueError, "store"),
    ],
)
def test_bad_parameters_are_refused(text_backend, options, error, message):
    with pytest.raises(error, match=message):
        FrozenEncoder(**({"model": text_backend, "store": None} | options)).transform(
            ["x"]
        )


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
    (tmp_path / "notes").write_text(
        "not a database, just some notes, long enough " * 50
    )
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

    slow = CallableBackend(
        load, name="slow", version="1", modality="text", n_features=1
    )
    thread = threading.Thread(
        target=FrozenEncoder(slow, store=None).transform, args=(["a"],)
    )
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

    backend = CallableBackend(
        load, name="busy", version="1", modality="text", n_features=1
    )
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
    backend = Described(
        lambda: len, name="d", version="1", modality="text", n_features=1
    )
    spaces = [
        FrozenEncoder(backend, normalize=normalize)._space(backend)
        for normalize in (True, False)
    ]
    assert described == {"backend": "mine"}
    assert spaces[0].fingerprint != spaces[1].fingerprint


@pytest.mark.parametrize(
    ("dtype", "fingerprint"),
    [
        ("float32", "98d7749b92fe61d4ad4b0a2118cad48e"),
        ("float16", "7d9a61187666402bffcdfbad7073c65e"),
    ],
)
def test_fingerprints_stay_the_same_so_that_existing_stores_stay_valid(
    tmp_path, dtype, fingerprint
):
    backend = CallableBackend(
        lambda: len, name="n", version="1", modality="text", n_features=2
    )
    store = EmbeddingStore(tmp_path / "s.sqlite", dtype=dtype)
    encoder = FrozenEncoder(backend, store=store)
    assert encoder.fingerprint() == fingerprint


def test_a_store_checks_its_precision(tmp_path):
    with pytest.raises(ValueError, match="dtype must be 'float32' or .*got 'int8'"):
        EmbeddingStore(dtype="int8")
    store = EmbeddingStore(tmp_path / "s.sqlite", dtype="float16")
    assert repr(store).endswith("s.sqlite', dtype='float16')")
    assert pickle.loads(pickle.dumps(store)).dtype == "float16"


def test_repeated_rows_are_copied_in_blocks(text_backend, monkeypatch):
    monkeypatch.setattr("sklembed.encoders.column._COPY_ROWS", 3)
    texts = [None, *TEXTS, None, *TEXTS[::-1], *TEXTS]
    vectors = FrozenEncoder(text_backend, store=None).transform(texts)
    filled = [text or "" for text in texts]
    expected = np.where([[t is None] for t in texts], np.nan, count_letters(filled))
    np.testing.assert_array_equal(vectors, expected)


def test_parameters_are_checked_against_the_model_before_cells_are_read(checkpoints):
    with pytest.raises(ValueError, match="layer=99"):
        FrozenEncoder(checkpoints["bert"], layer=99).transform([3])


def test_looking_at_an_encoder_asks_its_model_nothing(text_backend):
    for encoder in (
        FrozenEncoder("no/such/model"),
        FrozenEncoder(text_backend).fit(TEXTS),
    ):
        assert "transform" in dir(encoder)
        assert "FrozenEncoder" in encoder._repr_html_()


def test_what_the_store_exports_can_be_matched_with_the_table(
    text_backend, store, tmp_path
):
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
    with pytest.raises(
        ValueError, match="feature names should match.*fitted on 'note', and X is"
    ):
        encoder.transform(pd.DataFrame({"title": TEXTS}))


def test_a_cell_that_cannot_be_prepared_is_named(store):
    def prepare(text):
        if text == "bad":
            raise ValueError("no such word")
        return text

    backend = CallableBackend(
        lambda: (prepare, count_letters),
        name="p",
        version="1",
        modality="text",
        n_features=9,
    )
    encoder = FrozenEncoder(backend, store=store)
    with pytest.raises(ValueError, match="Row 1 of the column: no such word"):
        encoder.transform(["good", "bad"])
    with pytest.warns(UserWarning, match="1 cells of the column"):
        vectors = encoder.set_params(errors="missing").transform(["good", "bad"])
    assert np.isnan(vectors[:, 0]).tolist() == [False, True]


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch):
    """Each test is a process of its own, as far as warnings go."""
    monkeypatch.setattr("sklembed.encoders.column._ANNOUNCED", set())


# A fitted encoder that is moved


@pytest.fixture
def moved(checkpoints, store, tmp_path):
    """A fitted encoder whose checkpoint is gone, unpickled, and its vectors of TEXTS."""
    directory = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], directory)
    encoder = FrozenEncoder(str(directory), store=store).fit(TEXTS)
    vectors = encoder.transform(TEXTS)
    fingerprint = encoder.fingerprint()
    shutil.rmtree(directory)
    encoder = pickle.loads(pickle.dumps(encoder))
    return encoder, vectors, fingerprint


def test_stored_vectors_need_no_checkpoint(moved):
    encoder, vectors, fingerprint = moved
    np.testing.assert_array_equal(encoder.transform([*TEXTS, None])[:-1], vectors)
    assert encoder.fingerprint() == fingerprint
    assert len(encoder.get_feature_names_out()) == vectors.shape[1]
    assert encoder.stats()["encoded"] == 3
    assert encoder.digests(TEXTS)[0] is not None


@pytest.mark.parametrize("errors", ["raise", "missing"])
def test_a_cell_that_is_not_stored_is_named_where_the_checkpoint_is_gone(moved, errors):
    encoder, _, _ = moved
    encoder.set_params(errors=errors)
    message = (
        r"Row 1 of the column \(and 1 more cells\).*no directory.*set_params\(model"
    )
    with pytest.raises(OSError, match=message):
        encoder.transform([TEXTS[0], "a new one", "newer"])
    with pytest.raises(OSError, match="Row 0 of the column cannot be encoded"):
        encoder.set_params(store=None).transform(TEXTS[:1])


def test_stored_vectors_need_neither_transformers_nor_torch(
    checkpoints, store, tmp_path
):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps((encoder.fit(TEXTS), TEXTS)))
    encoder.transform(TEXTS)
    code = """
import importlib.abc, pickle, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
encoder, texts = pickle.load(open(sys.argv[1], "rb"))
assert encoder.transform(texts).shape == (4, 16)
encoder.set_params(model=sys.argv[2])  # a copy of the checkpoint
assert encoder.transform(texts).shape == (4, 16)
try:
    encoder.transform(["new"])
except ImportError as error:
    assert "Row 0 of the column" in str(error), error
else:
    raise AssertionError
"""
    shutil.copytree(checkpoints["bert"], tmp_path / "copy")
    arguments = [str(tmp_path / "encoder.pkl"), str(tmp_path / "copy")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_a_directory_of_the_same_content_elsewhere_has_the_same_fingerprint(
    moved, checkpoints
):
    encoder, _, fingerprint = moved
    encoder.set_params(model=checkpoints["bert"])
    assert encoder.fingerprint() == fingerprint
    assert np.isfinite(encoder.transform(["a new one"])).all()


@pytest.mark.parametrize(
    "changed", [{"pooling": "max"}, {"layer": 0}, {"model": "no/such/place"}]
)
def test_what_changes_vectors_forgets_the_space_of_fit(moved, changed):
    encoder, _, _ = moved
    with pytest.raises(OSError, match="no directory|neither a local directory"):
        encoder.set_params(**changed).transform(TEXTS)


@pytest.mark.parametrize(
    "changed",
    [{"device": "cpu"}, {"batch_size": 2}, {"verbose": 1}, {"local_files_only": True}],
)
def test_what_changes_no_vector_can_be_set_after_fit(moved, changed):
    encoder, vectors, _ = moved
    np.testing.assert_array_equal(
        encoder.set_params(**changed).transform(TEXTS), vectors
    )


def test_a_checkpoint_that_changes_after_fit_serves_no_old_vectors(
    checkpoints, store, tmp_path
):
    directory = tmp_path / "model"
    shutil.copytree(checkpoints["bert"], directory)
    encoder = FrozenEncoder(str(directory), store=store).fit(TEXTS)
    before, fingerprint = encoder.transform(TEXTS), encoder.fingerprint()
    shutil.rmtree(directory)
    shutil.copytree(checkpoints["roberta"], directory)
    with pytest.warns(UserWarning, match="has changed since fit"):
        assert encoder.fingerprint() != fingerprint
    with pytest.warns(UserWarning, match="has changed since fit"):
        assert np.abs(encoder.transform(TEXTS) - before).max() > 0.01
    encoder.fit(TEXTS).transform(TEXTS)


def test_settings_of_other_vectors_after_fit_are_warned_of(checkpoints, tmp_path):
    encoder = FrozenEncoder(checkpoints["bert"], store=tmp_path / "s.sqlite").fit(TEXTS)
    half = EmbeddingStore(tmp_path / "half.sqlite", dtype="float16")
    encoder.set_params(batch_size=1, verbose=0, store=None).transform(TEXTS)
    encoder.set_params(store=half).transform(TEXTS)
    with pytest.warns(UserWarning, match="fitted with other settings .pooling"):
        encoder.set_params(pooling="cls").transform(TEXTS)
    encoder.fit(TEXTS).transform(TEXTS)


def test_a_column_of_which_no_cell_can_be_read_is_an_error_with_the_reason(
    image_backend,
):
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    message = r"No cell of column 'scan' could be read \(2 of 3 .*first: Row 1 .*looks like a text"
    with pytest.raises(ValueError, match=message):
        encoder.fit(pd.DataFrame({"scan": [None, "a red cat", "a dog"]}))


@pytest.mark.parametrize("cell", ["", " ", "nan"])
def test_an_image_path_that_stands_for_nothing_is_said_to_be_missing(
    cell, image_backend
):
    with pytest.raises(FileNotFoundError, match="Use None for a missing image"):
        FrozenEncoder(image_backend, store=None).transform([cell])


def test_fit_needs_the_checkpoint_also_when_it_has_been_fitted(moved):
    encoder, _, _ = moved
    with pytest.raises(OSError, match="no directory"):
        encoder.fit(TEXTS)


# Relative stores


class OtherPath(os.PathLike):
    """A path of a class of its own, that two arguments make."""

    def __init__(self, folder, name):
        self.parts = str(folder), name

    def __fspath__(self):
        return os.path.join(*self.parts)


def test_a_store_may_be_any_path(tmp_path):
    encoder = FrozenEncoder("model", store=OtherPath(tmp_path, "s.sqlite"))
    assert pickle.loads(pickle.dumps(encoder)).store == tmp_path / "s.sqlite"


def test_a_relative_store_stays_where_it_was_first_used(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    backend = CallableBackend(
        _load_slowly, name="s", version="1", modality="text", n_features=9
    )
    encoder = FrozenEncoder(backend, store="emb.sqlite").fit(TEXTS)
    object_ = EmbeddingStore("object.sqlite")
    monkeypatch.chdir(tmp_path / "two")
    for same in (encoder, pickle.loads(pickle.dumps(encoder)), clone(encoder)):
        same.transform(TEXTS)
    assert object_.stats().empty
    assert not list((tmp_path / "two").iterdir())
    assert (
        EmbeddingStore(tmp_path / "one" / "emb.sqlite").stats()["encoded"].item() == 3
    )
    assert encoder.store == "emb.sqlite"
    encoder.set_params(store="other.sqlite").transform(TEXTS)
    assert (tmp_path / "two" / "other.sqlite").exists()


def test_workers_use_the_store_of_the_parent_s_working_directory(tmp_path, monkeypatch):
    X, y = [f"text {i}" for i in range(12)], [0, 1] * 6
    for name in ("one", "two"):
        backend = CallableBackend(
            _load_slowly, name=name, version="1", modality="text", n_features=9
        )
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        pipeline = make_pipeline(
            FrozenEncoder(backend, store="e.sqlite"), LogisticRegression()
        )
        GridSearchCV(pipeline, {"logisticregression__C": [1, 2]}, cv=2, n_jobs=2).fit(
            X, y
        )
    for name in ("one", "two"):
        stats = EmbeddingStore(tmp_path / name / "e.sqlite").stats()
        assert stats[["model", "encoded"]].to_numpy().tolist() == [[name, 12]]


# Reading without writing


def test_a_read_only_store_serves_and_encodes_without_keeping(counting, store):
    backend, seen = counting
    FrozenEncoder(backend, store=store).transform(TEXTS)
    before = store.stats()
    reading = EmbeddingStore(store.path, read_only=True)
    vectors = FrozenEncoder(backend, store=reading).transform([*TEXTS, "new"])
    np.testing.assert_array_equal(vectors, count_letters([*TEXTS, "new"]))
    assert sorted(seen) == ["a note", "another", "new", "the end"]
    pd.testing.assert_frame_equal(store.stats(), before)


# What unreadable cells and vectors say


def test_a_cell_without_a_vector_is_named_and_costs_no_other(store):
    def encode(texts):
        return [None if text == "bad" else [float(len(text))] for text in texts]

    backend = CallableBackend(
        lambda: encode, name="service", version="1", modality="text", n_features=1
    )
    texts = ["bad" if i == 57 else f"text {i}" for i in range(100)]
    encoder = FrozenEncoder(backend, store=store)
    with pytest.raises(
        ValueError, match="Row 57 of the column: .* returned NaN .* cell 'bad'"
    ):
        encoder.transform(texts)
    assert encoder.stats()["rows"] > 60  # those of the batch, and of batches before
    encoder.set_params(errors="missing")
    with pytest.warns(
        UserWarning, match="1 cells .*1 x the model returned NaN.*Row 57 .*'bad'"
    ):
        vectors = encoder.transform(texts)
    assert np.flatnonzero(np.isnan(vectors[:, 0])).tolist() == [57]
    assert encoder.stats()["rows"] == 99


def test_tokens_without_numbers_are_named(store):
    backend = CallableBackend(
        lambda: (
            lambda texts: [
                np.full((2, 3), np.nan if t == "bad" else 1.0) for t in texts
            ]
        ),
        name="tokens",
        version="1",
        modality="text",
        n_features=3,
    )
    encoder = FrozenEncoder(backend, output="tokens", store=store, errors="missing")
    with pytest.warns(UserWarning, match="1 cells .*Row 1 "):
        tokens = encoder.transform(["a", "bad", "b"])
    assert [cell is None for cell in tokens[:, 0]] == [False, True, False]


def test_unreadable_cells_are_counted_by_reason_and_the_first_is_named(image_backend):
    good = np.zeros((2, 2, 3), dtype=np.uint8)
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    with pytest.warns(UserWarning) as caught:
        encoder.transform(
            pd.DataFrame({"scan": ["no/such.png", good, b"broken", b"broken", ""]})
        )
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith(
        "4 cells of column 'scan' could not be read and count as missing (2 x no such file, 2 x no "
        "known image format), first: Row 0 (index 0) of column 'scan': there is no file "
        "'no/such.png'. Check the path, or use None for a missing image."
    )


def test_an_unreadable_cell_is_reported_once_a_process_and_a_new_one_again(
    image_backend,
):
    good = np.zeros((2, 2, 3), dtype=np.uint8)
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    with pytest.warns(UserWarning) as caught:
        for _ in range(5):
            clone(encoder).fit_transform([good, b"broken"])
        clone(encoder).transform([b"another", b"broken"])
    assert [str(warning.message)[:30] for warning in caught] == [
        "1 cells of the column could no",
        "2 cells of the column could no",
    ]
    assert "Row 0" in str(caught[1].message)


def test_a_warning_that_is_an_error_stays_one(image_backend):
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    for _ in range(2):
        with pytest.raises(UserWarning, match="1 cells of the column"):
            encoder.transform([b"broken"])


def test_file_names_given_to_a_text_model_are_warned_of(text_backend, tmp_path):
    paths = [str(tmp_path / f"{i}.PNG") for i in range(3)]
    for path in paths:
        Path(path).write_bytes(b"")
    encoder = FrozenEncoder(text_backend, store=None)
    with pytest.warns(
        UserWarning, match="column 'scan' are the names of image files.*image model"
    ):
        encoder.fit(pd.DataFrame({"scan": paths}))
    for texts in (["see cat.png", "a.jpg"], [*paths[:2], "a text"], ["red", paths[0]]):
        encoder.fit(pd.DataFrame({"other": texts}))


@pytest.mark.parametrize(
    "text", ["a red cat", "red", "A cat. It sits on a mat.", "5.5 inch"]
)
def test_texts_given_to_an_image_model_are_recognised(image_backend, text):
    with pytest.raises(
        FileNotFoundError, match=f"Row 0 .*'{text}'.*looks like a text.*text model"
    ):
        FrozenEncoder(image_backend, store=None).fit([text])


@pytest.mark.parametrize("path", ["cat.jpg", "my images/red cat.jpg", "/data/0001"])
def test_paths_that_lead_nowhere_are_not_taken_for_texts(image_backend, path):
    with pytest.raises(FileNotFoundError, match=f"Row 0 .*'{path}'. Check the path"):
        FrozenEncoder(image_backend, store=None).fit([path])


def test_numbers_in_a_text_column_are_named_with_a_remedy(text_backend):
    with pytest.raises(
        TypeError, match=r"Row 1 .* float \(3.5\).*astype\('string'\).*None"
    ):
        FrozenEncoder(text_backend, store=None).fit(pd.DataFrame({"note": ["x", 3.5]}))


# Columns of other libraries


def column_of_arrow(kind):
    arrow = pytest.importorskip("pyarrow")
    texts = [*TEXTS, None]
    array = arrow.array(texts)
    forms = {
        "array": array,
        "chunked array": arrow.chunked_array([array[:2], array[2:]]),
        "table": arrow.table({"note": texts}),
        "dictionary": array.dictionary_encode(),
        "pandas array": pd.array(texts, dtype="string[pyarrow]"),
        "categorical": pd.Categorical(texts),
    }
    return forms[kind]


@pytest.mark.parametrize(
    "kind",
    ["array", "chunked array", "table", "dictionary", "pandas array", "categorical"],
)
def test_columns_of_arrow_are_taken(text_backend, kind):
    vectors = FrozenEncoder(text_backend, store=None).fit_transform(
        column_of_arrow(kind)
    )
    np.testing.assert_array_equal(vectors[:-1], count_letters(TEXTS))
    assert np.isnan(vectors[-1]).all()


def test_columns_of_datasets_are_taken(text_backend, image_backend, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"note": TEXTS, "n": [1, 2, 3, 4]})
    encoder = FrozenEncoder(text_backend, store=None)
    for column in (table["note"], table.select_columns("note")):
        np.testing.assert_array_equal(
            encoder.fit_transform(column), count_letters(TEXTS)
        )
        assert encoder.feature_names_in_ == ["note"]
    with pytest.raises(ValueError, match=r"X has 2: \['note', 'n'\]"):
        encoder.fit(table)
    with pytest.raises(TypeError, match="one of its splits"):
        encoder.fit(datasets.DatasetDict({"train": table}))
    with pytest.raises(TypeError, match="must be one column of cells"):
        encoder.fit(table.to_iterable_dataset()["note"])
    pixels = np.full((4, 4, 3), 200, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    scans = datasets.Dataset.from_dict({"scan": [str(tmp_path / "a.png"), None]})
    scans = scans.cast_column("scan", datasets.Image())
    vectors = FrozenEncoder(image_backend, store=None).transform(scans["scan"])
    np.testing.assert_allclose(vectors[:1], mean_colours([pixels]))
    assert np.isnan(vectors[1]).all()


# What decides in the parent which images can be read


def _load_colours():
    return mean_colours


def test_workers_read_the_images_that_the_parent_reads(monkeypatch):
    monkeypatch.setitem(
        cells._LIMITS, "MAX_IMAGE_PIXELS", (Image, 100)
    )  # Pillow's own, say
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    buffer = BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    large = [buffer.getvalue()]
    backend = CallableBackend(
        _load_colours, name="colours", version="1", modality="image", n_features=6
    )
    encoder = FrozenEncoder(backend, store=None)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
        encoder.transform(large)
    Image.MAX_IMAGE_PIXELS = 1000
    pickled = pickle.dumps(encoder)
    Image.MAX_IMAGE_PIXELS = 100
    for worker in (pickle.loads(pickled), clone(pickle.loads(pickled))):
        assert np.isfinite(worker.transform(large)).all()
    assert Image.MAX_IMAGE_PIXELS == 100
    Image.MAX_IMAGE_PIXELS = 50  # what is set in the process itself comes first
    with pytest.raises(ValueError, match="exceeds limit of 100 pixels"):
        worker.transform(large)


def test_workers_read_formats_of_plugins_that_the_parent_has_registered(tmp_path):
    """In a process of its own, as plugins stay registered."""
    pytest.importorskip("pillow_heif")
    code = """
import sys
import numpy as np
from joblib import Parallel, delayed
from pillow_heif import register_heif_opener
from PIL import Image
from sklembed import CallableBackend, FrozenEncoder

def load():
    return lambda images: [[image.width, image.height] for image in images]

register_heif_opener()
path = sys.argv[1] + "/a.heic"
Image.new("RGB", (16, 24), "red").save(path)
backend = CallableBackend(load, name="sizes", version="1", modality="image", n_features=2)
encoder = FrozenEncoder(backend, store=None, errors="missing")
for n_jobs in (1, 2):
    (vectors,) = Parallel(n_jobs)([delayed(encoder.transform)([path])])
    np.testing.assert_array_equal(vectors, [[16, 24]])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_plugin_that_is_not_installed_makes_no_image_missing(image_backend):
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    absent = pickle.dumps(EmbeddingStore).replace(b"sklembed", b"sklembod")
    encoder._image_settings = {"openers": {"XYZ": ("xyz.plugin", absent)}}
    with pytest.raises(
        ImportError, match="xyz.plugin opens XYZ files.*sklembod.*Install"
    ):
        encoder.transform([b"an image of the format XYZ"])
    readable = np.zeros((2, 2, 3), dtype=np.uint8)
    assert np.isfinite(encoder.transform([readable])).all()


def test_warnings_that_are_errors_make_no_image_unreadable(image_backend):
    buffer = BytesIO()
    palette = Image.new("P", (4, 4))
    palette.putpalette([200, 0, 0] * 256)
    palette.save(buffer, "PNG", transparency=bytes([255] * 256))
    encoder = FrozenEncoder(image_backend, store=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict = encoder.transform([buffer.getvalue()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lenient = encoder.transform([buffer.getvalue()])
    np.testing.assert_array_equal(strict, lenient)


# Cost of a column


def test_an_estimate_counts_cells_and_scales_a_sample(counting, store, monkeypatch):
    backend, seen = counting
    texts = ["a" * n for n in range(1, 101)]
    encoder = FrozenEncoder(backend, store=store)
    encoder.transform(texts[:20])
    # Of the 8 cells in the sample, the first takes 5 seconds and the others 2.
    clock = SimpleNamespace(perf_counter=iter([10.0, 15.0, 15.0, 17.0]).__next__)
    monkeypatch.setattr("sklembed.encoders.frozen.time", clock)
    estimate = encoder.estimate([*texts, texts[0], None], n_samples=8)
    monkeypatch.undo()
    assert estimate == {
        "cells": 100,
        "stored": 20,
        "seconds": pytest.approx(80 / 7 * 2),
        "megabytes": pytest.approx(80 * 9 * 4 / 1e6),
    }
    assert len(seen) == 28
    assert {len(text) for text in seen[20:]} == set(range(26, 101, 10))
    assert encoder.stats()["encoded"] == 28  # the sample is stored


def test_an_estimate_of_stored_cells_encodes_nothing(counting, store):
    backend, seen = counting
    encoder = FrozenEncoder(backend, store=store)
    encoder.transform(TEXTS)
    n_seen = len(seen)
    estimate = encoder.estimate(TEXTS)
    assert estimate == {"cells": 3, "stored": 3, "seconds": 0.0, "megabytes": 0.0}
    assert len(seen) == n_seen
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        encoder.estimate(TEXTS, n_samples=0)


def test_warm_up_loads_the_model(store):
    n_loads = []

    def load():
        n_loads.append(1)
        return lambda texts: np.ones((len(texts), 2))

    backend = CallableBackend(
        load, name="warm", version="1", modality="text", n_features=2
    )
    encoder = FrozenEncoder(backend, store=store)
    assert encoder.warm_up() is encoder
    assert n_loads == [1]
    encoder.transform(["a"])
    assert n_loads == [1]


def test_repr_names_the_precision_that_auto_is(checkpoints):
    encoder = FrozenEncoder(checkpoints["bert"], store=None)
    shown = repr(encoder)
    assert "dtype" not in shown
    encoder.fit(["a cat"])
    assert repr(encoder) == f"{shown[:-1]}, dtype='auto' (float32))"
    nested = repr(make_pipeline(encoder, LogisticRegression()))
    assert re.search(r"\n +store=None", nested)  # parameters are laid out in lines
    fixed = FrozenEncoder(checkpoints["bert"], store=None, dtype="float32")
    assert repr(fixed.fit(["a cat"])).endswith("store=None)")


def test_a_call_reads_the_identity_of_its_checkpoint_once(
    checkpoints, store, monkeypatch
):
    encoder = FrozenEncoder(checkpoints["bert"], store=store).fit(["a"])
    n_read = []
    hash_directory = checkpoint_module.hash_directory

    def count(directory):
        n_read.append(directory)
        return hash_directory(directory)

    monkeypatch.setattr(checkpoint_module, "hash_directory", count)
    encoder.transform(["a"])
    assert len(n_read) == 1
    encoder.transform(["a new text"])
    assert len(n_read) == 2
