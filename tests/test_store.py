"""The store returns vectors bit by bit to any process, and encodes no cell twice."""

import contextlib
import itertools
import os
import shutil
import sqlite3
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from sklembed import EmbeddingStore, FrozenEncoder
from sklembed.encoders import database
from sklembed.encoders import store as store_module
from sklembed.encoders.database import Space, default_path

SPACE = Space("f", {"name": "test"}, 3)
ANOTHER = Space("g", {"label": "another"}, 3)
RAGGED = Space("r", {"name": "tokens"}, 3, ragged=True)


def digest(number):
    return int(number).to_bytes(16, "little")


def value(number, space=SPACE):
    """Return the value of a cell; a ragged value has as many tokens as the number."""
    return np.full((number, 3) if space.ragged else 3, number, dtype=np.float32)


def in_batches(encode_batch, batch_size=4):
    """Return the generator function that `fill` needs for a function of a batch."""

    def encode(claims):
        for claimed in claims:
            for start in range(0, len(claimed), batch_size):
                batch = claimed[start : start + batch_size]
                yield batch, *encode_batch(batch)

    return encode


def fill(store, numbers, *, space=SPACE, encoded=None, encode=None, batch_size=4):
    """Fill a store with values of numbers; return the values by number."""

    def encode_batch(positions):
        batch = [numbers[i] for i in positions]
        if encoded is not None:
            encoded.extend(batch)
        return positions, [value(number, space) for number in batch]

    pieces = store.fill(
        space,
        [digest(number) for number in numbers],
        encode=encode or in_batches(encode_batch, batch_size),
        claim_size=2 * batch_size,
    )
    return gather(pieces, numbers)


def read(store, numbers, space=SPACE):
    return gather(store.read(space, [digest(number) for number in numbers]), numbers)


def gather(pieces, numbers):
    values = {}
    for positions, vectors in pieces:
        for i, vector in zip(positions, vectors, strict=True):
            assert numbers[i] not in values  # each is yielded once
            values[numbers[i]] = vector
    return values


def assert_values(values, numbers, space=SPACE):
    assert values.keys() == set(numbers)
    for number in numbers:
        np.testing.assert_array_equal(values[number], value(number, space), strict=True)


@contextlib.contextmanager
def opened(store):
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        yield db


@pytest.fixture
def clock(monkeypatch):
    """Set the hour by a one-element list."""
    hour = [1000]
    monkeypatch.setattr(database, "_hour", lambda: hour[0])
    return hour


def test_vectors_come_back_bit_by_bit(store):
    values = np.float32([[0.1, -0.0, 1e-40], [np.pi, 3e38, np.nan]])
    ((_, filled),) = store.fill(
        SPACE,
        [digest(0), digest(1)],
        encode=in_batches(lambda i: (i, values[i])),
        claim_size=2,
    )
    assert filled.tobytes() == values.tobytes()
    ((positions, stored),) = store.read(SPACE, [digest(1), digest(0), digest(7)])
    assert sorted(positions) == [0, 1]
    assert stored[np.argsort(positions)].tobytes() == values[::-1].tobytes()


def test_float16_needs_half_the_space_and_a_hit_equals_a_miss(store):
    space = Space("h", {}, 3, dtype="float16")
    values = np.float32([[0.1, 1000.1, -65504]])
    encode = in_batches(lambda i: (i, values[i]))
    ((_, encoded),) = store.fill(space, [digest(0)], encode=encode, claim_size=1)
    ((_, stored),) = store.read(space, [digest(0)])
    assert encoded.dtype == stored.dtype == np.float32
    np.testing.assert_array_equal(encoded, stored)
    np.testing.assert_array_equal(encoded, values.astype(np.float16))
    assert store.stats().loc["h", "bytes"] == 6


@pytest.mark.parametrize(
    "space, values, message",
    [
        (
            SPACE,
            np.zeros((1, 2)),
            r"expected vectors of 3 features; got the shape \(1, 2\)",
        ),
        (
            RAGGED,
            [np.zeros(3)],
            r"expected vectors of 3 features; got the shape \(3,\)",
        ),
        (SPACE, np.zeros((2, 3)), "1 cells were encoded, but 2 values were returned"),
        (Space("h", {}, 3, dtype="float16"), [[1, 2, 1e5]], "beyond 65504"),
    ],
)
def test_values_of_another_shape_than_the_space_s_are_an_error(
    store, space, values, message
):
    with pytest.raises(ValueError, match=message):
        fill(store, [1], space=space, encode=in_batches(lambda i: (i, values)))
    assert not read(store, [1], space=space)


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match="'float32' or 'float16'; got 'int8'"):
        Space("f", {}, 3, dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ragged_values_come_back_in_their_lengths(store, dtype, monkeypatch):
    monkeypatch.setattr(store_module, "_READ_BYTES", 100)  # several pieces
    space = Space("r", {}, 3, dtype=dtype, ragged=True)
    numbers = [5, 0, 1, 17, 2]
    assert_values(fill(store, numbers, space=space), numbers, space)
    assert_values(read(store, [*numbers, 99], space=space), numbers, space)


def test_a_fingerprint_cannot_have_two_shapes(store):
    fill(store, [1])
    with pytest.raises(
        OSError, match=r"has f with .* = \[3, 'float32', 0\], but .* was requested"
    ):
        read(store, [1], space=Space("f", {}, 3, dtype="float16"))


def test_models_do_not_share_vectors(store):
    fill(store, [1, 2])
    assert not read(store, [1, 2], space=ANOTHER)
    assert store.lacks(ANOTHER, [digest(1)]).all()


def test_missing_cells_are_recognised_without_reading_vectors(store):
    fill(store, [1, 2])
    assert store.lacks(SPACE, [digest(n) for n in (3, 2, 1, 0)]).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert store.lacks(SPACE, []).tolist() == []
    assert store.stats().loc["f", "served"] == 0


def test_many_more_digests_than_fit_into_a_query(store):
    numbers = list(range(1, 10_001))
    assert_values(fill(store, numbers, batch_size=5000), numbers)
    assert_values(read(store, numbers[::-1]), numbers)


def test_repeated_digests_are_read_but_not_encoded(store):
    fill(store, [1])
    ((positions, _),) = store.read(SPACE, [digest(1), digest(2), digest(1)])
    assert sorted(positions) == [0, 2]
    with pytest.raises(ValueError, match="without repeats"):
        fill(store, [2, 2])


def test_digests_of_another_length_are_an_error(store):
    fill(store, [1])
    with pytest.raises(ValueError, match="16 bytes each"):
        list(store.read(SPACE, [b"short"]))


def test_stats_count_rows_bytes_encoded_served_and_hits(store):
    fill(store, [1, 2, 3])
    read(store, [1, 2])
    fill(store, [1], space=ANOTHER, encode=in_batches(lambda i: ([], [])))
    stats = store.stats()
    assert stats.loc["f"].to_dict() == {
        "model": "test",
        "pooling": None,
        "layer": None,
        "unit_length": None,
        "description": '{"name": "test"}',
        "n_features": 3,
        "rows": 3,
        "bytes": 36,
        "encoded": 3,
        "served": 2,
        "hit_rate": 0.4,
    }
    assert np.isnan(stats.loc["g", "hit_rate"])


def test_clear_empties_the_store_and_frees_the_space(store):
    fill(store, [1, 2])
    empty = os.path.getsize(store.path)
    fill(store, list(range(3, 20_000)), batch_size=5000)
    assert os.path.getsize(store.path) > 2 * empty
    store.clear()
    assert store.stats().empty
    assert os.path.getsize(store.path) <= empty
    assert not read(store, [1, 2])
    assert_values(fill(store, [5]), [5])


@pytest.mark.parametrize("name", ["g", "another"])
def test_clear_deletes_one_model_by_fingerprint_or_name(store, name):
    fill(store, [1, 2])
    for fingerprint in ("g", "g2"):
        fill(store, [1, 2], space=Space(fingerprint, {"label": "another"}, 3))
    store.clear(name)
    assert_values(read(store, [1, 2]), [1, 2])
    assert list(store.stats().index) == (["f", "g2"] if name == "g" else ["f"])
    assert not read(store, [1, 2], space=ANOTHER)


@pytest.mark.parametrize("kind", ["str", "path", "gone", "backend"])
def test_clear_and_export_take_the_models_of_encoders(
    store, checkpoints, text_backend, tmp_path, kind
):
    shutil.copytree(checkpoints["bert"], tmp_path / "tiny" / "bert")
    model = tmp_path / "tiny" / "bert"
    if kind in ("str", "gone"):
        model = str(model)
    elif kind == "backend":
        model = text_backend
    FrozenEncoder(model, store=store).transform(["cat", "dog"])
    fill(store, [1])
    if kind == "gone":
        shutil.rmtree(model)
    assert store.export(tmp_path / "vectors.npy", model=model) == 2
    store.clear(model=model)
    assert store.stats()["model"].tolist() == ["test"]
    assert store.networks().empty
    with pytest.raises(ValueError, match=r"It has vectors of \['test'\]"):
        store.clear(model=model)


def test_a_model_of_another_type_is_refused(store, text_backend):
    encoder = FrozenEncoder(text_backend, store=store)
    with pytest.raises(TypeError, match="pass encoder.model, or encoder.fingerprint"):
        store.clear(model=encoder)
    encoder.transform(["cat"])
    store.clear(model=encoder.fingerprint())
    assert store.stats().empty


@pytest.mark.parametrize("use", ["clear", "export"])
def test_an_unknown_model_is_an_error_that_lists_the_models(store, tmp_path, use):
    fill(store, [1])
    arguments = (tmp_path / "x.npy",) if use == "export" else ()
    with pytest.raises(
        ValueError, match=r"no vectors of 'bert'. It has vectors of \['test'\]"
    ):
        getattr(store, use)(*arguments, model="bert")
    assert_values(read(store, [1]), [1])


def test_prune_drops_the_least_recently_used_across_models(store, clock):
    fill(store, [1, 2, 3])
    fill(store, [1, 2], space=ANOTHER)
    clock[0] += 1
    read(store, [2])
    fill(store, [4])
    assert store.prune(100) == 0
    assert store.prune(60) == 1
    assert read(store, [1, 2, 3, 4]).keys() == {2, 3, 4}  # 1 was the oldest of its hour
    assert store.prune(47) == 2
    assert store.stats()["bytes"].to_dict() == {"f": 36, "g": 0}
    assert store.prune(0) == 3
    assert not read(store, [2, 4])
    with opened(store) as db:
        assert db.execute("SELECT COUNT(*) FROM vectors").fetchone() == (0,)


def test_pruning_shrinks_the_file(store):
    fill(store, list(range(20_000)), batch_size=5000)
    before = os.path.getsize(store.path)
    store.prune(12_000)
    assert os.path.getsize(store.path) < before / 4


def test_max_bytes_is_respected_while_filling_and_no_value_is_lost(tmp_path):
    store = EmbeddingStore(tmp_path / "store.sqlite", max_bytes=1200)  # 100 vectors
    numbers = list(range(500))
    pieces = store.fill(
        SPACE,
        [digest(n) for n in numbers],
        encode=in_batches(lambda batch: (batch, [value(n) for n in batch])),
        claim_size=8,
    )
    vectors = {}
    for positions, values in pieces:
        vectors |= dict(zip(positions.tolist(), values, strict=True))
        assert store.stats()["bytes"].sum() <= 1200
    assert_values(vectors, numbers)
    stored = read(store, numbers)
    assert 80 <= len(stored) <= 100
    assert min(stored) > 300  # the newest


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_max_bytes_must_be_positive(max_bytes):
    with pytest.raises(ValueError, match="store=None"):
        EmbeddingStore(max_bytes=max_bytes)


def test_reads_write_the_time_of_use_once_an_hour(store, clock):
    fill(store, [1])

    def used_hour():
        with opened(store) as db:
            return db.execute("SELECT used FROM cells").fetchone()[0]

    for hour, used in (
        (1000, 1000),
        (1001, 1001),
        (999, 1001),
    ):  # clocks may be set back
        clock[0] = hour
        read(store, [1])
        assert used_hour() == used


def test_reading_works_while_counts_cannot_be_written(store, monkeypatch):
    fill(store, [1])
    monkeypatch.setattr(database, "_COUNTS_TIMEOUT_SECONDS", 0.01)
    with opened(store) as db:
        db.execute("BEGIN IMMEDIATE")
        assert_values(read(store, [1]), [1])
        assert db.execute("SELECT served FROM models").fetchone() == (0,)
    assert store.stats().loc["f", "served"] == 1


def written_count(store):
    with opened(store) as db:
        return db.execute("SELECT served FROM models").fetchone()[0]


def test_counts_of_small_reads_are_written_together(store, monkeypatch):
    fill(store, list(range(120)))
    read(store, [1])
    assert written_count(store) == 1  # the first read of a process
    for _ in range(3):
        read(store, [1, 2])
    assert written_count(store) == 1
    read(store, list(range(120)))
    assert written_count(store) == 127
    read(store, [1])
    monkeypatch.setattr(store_module, "_UNWRITTEN_SECONDS", 0)
    read(store, [1])
    assert written_count(store) == 129


def test_clear_and_the_counts_of_other_models(store):
    fill(store, [1])
    fill(store, [1], space=ANOTHER)
    for space in (SPACE, ANOTHER, SPACE, ANOTHER):
        read(store, [1], space=space)
    store.clear("g")
    fill(store, [1], space=ANOTHER)
    assert store.stats()["served"].to_dict() == {"f": 2, "g": 0}


def test_a_process_writes_its_counts_when_it_ends(store):
    """A forked child does not write the counts of its parent."""
    fill(store, [1])
    read(store, [1])
    read(store, [1])
    child = os.fork()
    if child == 0:
        for _ in range(4):
            read(store, [1])
        store_module._SERVED.write_all()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert written_count(store) == 5
    store_module._SERVED.write_all()
    assert written_count(store) == 6


def test_the_end_of_a_process_creates_no_store(store):
    fill(store, [1])
    read(store, [1])
    read(store, [1])
    store.path.unlink()
    store_module._SERVED.write_all()
    assert not store.path.exists()


def test_vectors_are_exported_to_parquet(store, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    fill(store, [1, 2])
    fill(store, [0, 2], space=RAGGED)
    assert store.export(tmp_path / "all.parquet") == 4
    table = (
        parquet.read_table(tmp_path / "all.parquet")
        .to_pandas()
        .set_index("fingerprint")
    )
    table["number"] = [
        int.from_bytes(bytes.fromhex(d), "little") for d in table["digest"]
    ]
    for _, row in table.loc["f"].iterrows():
        assert np.isnan(row["n_tokens"])
        np.testing.assert_array_equal(row["vector"], value(row["number"]))
    for _, row in table.loc["r"].iterrows():
        assert row["n_tokens"] == row["number"]
        tokens = row["vector"].reshape(-1, 3)
        np.testing.assert_array_equal(tokens, value(row["number"], RAGGED))
    assert store.export(tmp_path / "one.parquet", model="tokens") == 2


def test_vectors_are_exported_to_npy_in_pieces(store, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_EXPORT_ROWS", 3)
    monkeypatch.setattr(database, "_EXPORT_BYTES", 20)
    fill(store, list(range(10)))
    fill(store, [1], space=RAGGED)
    assert store.export(tmp_path / "some.npy", model="test") == 10
    vectors = np.load(tmp_path / "some.npy", mmap_mode="r")
    digests = np.load(tmp_path / "some.digests.npy")
    numbers = [int.from_bytes(row.tobytes(), "little") for row in digests]
    assert vectors.dtype == np.float32
    assert sorted(numbers) == list(range(10))
    np.testing.assert_array_equal(vectors, [value(number) for number in numbers])
    assert store.stats().loc["f", "served"] == 0


def test_exports_that_are_not_possible_are_errors(store, tmp_path, monkeypatch):
    fill(store, [1])
    fill(store, [1], space=RAGGED)
    with pytest.raises(ValueError, match=r"must end in .parquet or .npy; got .*x.csv"):
        store.export(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="2 match.*model="):
        store.export(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="numbers of tokens differ"):
        store.export(tmp_path / "x.npy", model="r")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        store.export(tmp_path / "x.parquet")


def test_batches_before_a_failure_are_stored(store):
    def fail_at_nine(positions):
        if 9 in positions:
            raise RuntimeError("nine")
        return positions, np.zeros((len(positions), 3))

    with pytest.raises(RuntimeError, match="nine"):
        fill(store, list(range(12)), encode=in_batches(fail_at_nine))
    assert read(store, list(range(12))).keys() == set(range(8))
    encoded = []
    fill(store, [8, 9, 10, 11], encoded=encoded)  # no longer claimed
    assert sorted(encoded) == [8, 9, 10, 11]


def test_values_are_stored_before_they_are_yielded_and_closing_ends_claims(
    store,
):
    encode = in_batches(lambda batch: (batch, [value(i) for i in batch]))
    pieces = store.fill(
        SPACE, [digest(i) for i in range(20)], encode=encode, claim_size=8
    )
    positions, _ = next(pieces)
    assert_values(read(store, list(range(20))), positions.tolist())
    with opened(store) as db:
        assert db.execute("SELECT COUNT(*) FROM claims").fetchone() == (
            4,
        )  # 8 were claimed so far
    pieces.close()
    with opened(store) as db:
        assert db.execute("SELECT COUNT(*) FROM claims").fetchone() == (0,)
    assert not os.listdir(f"{store.path}.sessions")


def test_encoding_may_look_ahead_in_another_thread(store):
    """A thread that outlives its session claims nothing."""
    iterators = []

    def encode(claims):
        ahead = []
        for _ in range(3):
            thread = threading.Thread(target=lambda: ahead.append(next(claims)))
            thread.start()
            thread.join()
        iterators.append(claims)
        for batch in ahead:
            yield batch, batch, [value(i) for i in batch]

    pieces = store.fill(
        SPACE, [digest(i) for i in range(40)], encode=encode, claim_size=8
    )
    assert gather(itertools.islice(pieces, 3), range(40)).keys() == set(range(24))
    pieces.close()
    assert next(iterators[0], None) is None
    encoded = []
    fill(store, list(range(40)), encoded=encoded)
    assert sorted(encoded) == list(range(24, 40))


def test_cells_that_cannot_be_encoded_are_not_yielded(store):
    def skip_odd(positions):
        even = [i for i in positions if i % 2 == 0]
        return even, np.ones((len(even), 3))

    assert fill(store, [0, 1, 2, 3], encode=in_batches(skip_odd)).keys() == {0, 2}
    assert read(store, [0, 1, 2, 3]).keys() == {0, 2}


def test_sessions_that_cannot_encode_a_cell_do_not_wait_for_each_other(store):
    """Each session claims a cell that cannot be encoded and that the other needs."""
    barrier = threading.Barrier(2, timeout=20)
    results = {}

    def work(numbers):
        started = []

        def encode(positions):
            if not started:
                started.append(barrier.wait())
            good = [i for i in positions if numbers[i] not in (0, 99)]
            return good, np.ones((len(good), 3))

        results[numbers[0]] = fill(
            store, numbers, encode=in_batches(encode, 2), batch_size=2
        )

    run_threads(work, [list(range(100)), list(range(100))[::-1]])
    assert results.keys() == {0, 99}
    for values in results.values():
        assert values.keys() == set(range(1, 99))


def run_threads(work, arguments):
    threads = [threading.Thread(target=work, args=(a,), daemon=True) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_clear_during_a_session_mixes_no_models(store):
    def clear_and_fill_another(positions):
        store.clear()
        fill(store, [1, 2], space=ANOTHER)
        return positions, np.full((len(positions), 3), 100.0)

    values = fill(store, [1, 2], encode=in_batches(clear_and_fill_another))
    np.testing.assert_array_equal(list(values.values()), 100.0)
    assert_values(read(store, [1, 2], space=ANOTHER), [1, 2])
    assert read(store, [1, 2]).keys() == {1, 2}


def test_a_batch_may_be_larger_than_a_query(store):
    n = 100_000
    digests = [digest(i) for i in range(n)]
    encode = in_batches(lambda i: (i, np.repeat(np.float32(i)[:, None], 3, axis=1)), n)
    ((positions, values),) = store.fill(SPACE, digests, encode=encode, claim_size=n)
    np.testing.assert_array_equal(values[:, 0], positions)
    assert not store.lacks(SPACE, digests).any()


def test_threads_encode_each_cell_once(store):
    encoded, results = [], {}

    def work(offset):
        numbers = [(number + offset) % 60 for number in range(60)]
        results[offset] = fill(store, numbers, encoded=encoded)

    run_threads(work, [0, 15, 30, 45])
    assert sorted(encoded) == list(range(60))
    assert len(results) == 4
    for values in results.values():
        assert_values(values, range(60))


def test_the_file_and_its_log_are_private(store):
    fill(store, [1])
    for _ in store.fill(
        SPACE, [digest(2)], encode=in_batches(lambda i: (i, [value(2)])), claim_size=1
    ):
        for suffix in ("", "-wal", "-shm"):
            assert stat.S_IMODE(os.stat(f"{store.path}{suffix}").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(f"{store.path}.sessions").st_mode) == 0o700


def test_the_file_is_intact_and_has_the_documented_schema(store):
    fill(store, [1])
    with opened(store) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        ((vector,),) = db.execute("SELECT vector FROM vectors JOIN cells USING (id)")
        assert vector == value(1).tobytes()


def test_a_file_of_another_format_is_an_error(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes " * 100)
    with pytest.raises(
        OSError, match=r"notes.txt cannot be used: file is not a database"
    ):
        EmbeddingStore(path).stats()
    assert path.read_text().startswith("these are my notes")


def test_an_sqlite_file_without_a_store_is_an_error(tmp_path):
    path = tmp_path / "other.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(OSError, match="is an SQLite file, but not an embedding store"):
        EmbeddingStore(path).stats()


def test_another_schema_is_an_error(store):
    fill(store, [1])
    with opened(store) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(
        OSError, match="store of schema 99, but this release of sklembed reads schema 2"
    ):
        store.stats()


def test_a_path_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be used.*pass store=None"):
        EmbeddingStore(tmp_path / "file" / "store.sqlite").stats()


def test_the_default_path_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "mine.sqlite"))
    assert default_path() == tmp_path / "mine.sqlite"
    monkeypatch.delenv("SKLEMBED_STORE")
    assert default_path().name == "embeddings.sqlite"
    assert "sklembed" in str(default_path())


def snapshot(folder):
    """Map the files of a folder to their content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_read_only_store_writes_nothing(store, clock):
    fill(store, [1, 2])
    for leftover in ("lock", "sessions"):
        path = store.path.with_name(f"store.sqlite.{leftover}")
        path.rmdir() if path.is_dir() else path.unlink()
    before = snapshot(store.path.parent)
    clock[0] += 1
    reading = EmbeddingStore(store.path, read_only=True)
    assert_values(read(reading, [1, 2, 3]), [1, 2])
    assert_values(fill(reading, [2, 3, 4]), [2, 3, 4])
    assert reading.lacks(SPACE, [digest(1), digest(3)]).tolist() == [False, True]
    assert reading.stats().loc["f", "rows"] == 2
    for refused in (reading.clear, lambda: reading.prune(0)):
        with pytest.raises(OSError, match="read_only=True.* is read-only, so"):
            refused()
    assert snapshot(store.path.parent) == before


def test_a_read_only_store_reads_vectors_of_an_active_session(store):
    encode = in_batches(lambda batch: (batch, [value(i) for i in batch]))
    pieces = store.fill(
        SPACE, [digest(i) for i in range(20)], encode=encode, claim_size=8
    )
    positions, _ = next(pieces)
    reading = EmbeddingStore(store.path, read_only=True)
    assert_values(read(reading, list(range(20))), positions.tolist())
    pieces.close()


def test_a_read_only_store_must_exist(tmp_path):
    store = EmbeddingStore(tmp_path / "none.sqlite", read_only=True)
    for use in (store.stats, lambda: read(store, [1]), lambda: fill(store, [1])):
        with pytest.raises(
            FileNotFoundError, match=r"no embedding store at .*none.sqlite"
        ):
            use()
    assert not list(tmp_path.iterdir())
    assert repr(store).endswith("none.sqlite', read_only=True)")


def test_links_are_resolved_to_one_store(store, tmp_path):
    fill(store, [1])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.sqlite").symlink_to(store.path)
    (tmp_path / "folder").symlink_to(tmp_path)
    for path in ("elsewhere/link.sqlite", "folder/store.sqlite"):
        linked = EmbeddingStore(tmp_path / path)
        encode = in_batches(lambda batch: (batch, [value(2)]))
        pieces = linked.fill(
            SPACE, [digest(hash(path) % 1000 + 5)], encode=encode, claim_size=1
        )
        next(pieces)
        assert len(os.listdir(f"{store.path}.sessions")) == 1
        pieces.close()
        assert_values(read(linked, [1]), [1])
    assert os.listdir(tmp_path / "elsewhere") == ["link.sqlite"]


def test_a_link_to_a_missing_file_is_followed(tmp_path):
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "disk" / "real.sqlite")
    fill(EmbeddingStore(tmp_path / "link.sqlite"), [1])
    assert (tmp_path / "link.sqlite").is_symlink()
    assert_values(read(EmbeddingStore(tmp_path / "disk" / "real.sqlite"), [1]), [1])


@pytest.mark.parametrize(
    "path, message",
    [
        (":memory:", "':memory:' is not the path of a file.*store=None"),
        ("file:x?mode=memory", "is not the path of a file"),
        ("sqlite:///x.sqlite", "is not the path of a file"),
        ("cache/", "is a directory.*store='cache/embeddings.sqlite'"),
        ("", "is a directory"),
    ],
)
def test_paths_that_cannot_be_files_are_errors(path, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingStore(path)


def test_a_directory_is_an_error_that_suggests_a_file_in_it(tmp_path):
    with pytest.raises(OSError, match=r"is a directory.*/embeddings.sqlite'"):
        EmbeddingStore(tmp_path).stats()


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "empty.sqlite").touch()
    store = EmbeddingStore(tmp_path / "empty.sqlite")
    fill(store, [1])
    assert_values(read(store, [1]), [1])


def test_a_relative_path_is_made_absolute_immediately(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKLEMBED_STORE", "mine.sqlite")
    store = EmbeddingStore("emb.sqlite")
    assert default_path() == tmp_path / "mine.sqlite"
    monkeypatch.chdir("/")
    assert store.path == str(tmp_path / "emb.sqlite")
    assert default_path() == tmp_path / "mine.sqlite"
    assert os.environ["SKLEMBED_STORE"] == str(
        tmp_path / "mine.sqlite"
    )  # for child processes


def test_a_user_without_a_home_directory_gets_an_error_with_a_remedy(monkeypatch):
    def no_home(*args, **kwargs):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SKLEMBED_STORE")
    monkeypatch.setattr(database, "user_cache_path", no_home)
    with pytest.raises(OSError, match="SKLEMBED_STORE.*store=None"):
        EmbeddingStore().stats()
    assert repr(EmbeddingStore(max_bytes=5)) == "EmbeddingStore(max_bytes=5)"


def test_stores_of_older_pickles_are_read(store):
    old = EmbeddingStore.__new__(EmbeddingStore)
    old.__setstate__({"path": store.path, "max_bytes": None})
    assert old.stats().empty


def test_a_session_s_lock_is_not_on_a_deleted_file(store, monkeypatch):
    """Another session may delete the file between opening it and locking it."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock
    deleted = []

    def delete_and_lock(descriptor, operation):
        files = list(Path(f"{store.path}.sessions").glob("*"))
        if files and not deleted:
            deleted.append(files[0])
            files[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delete_and_lock)

    def encode(chunks):
        assert deleted[0].exists()  # locked again, under its name
        for chunk in chunks:
            yield chunk, chunk, np.zeros((len(chunk), 3), dtype=np.float32)

    space = Space("f", {}, 3)
    results = list(store.fill(space, [b"a" * 16], encode=encode, claim_size=1))
    assert len(results) == 1


def test_new_cells_are_not_read_first(store, monkeypatch):
    requested = []
    read = EmbeddingStore.read

    def count(store, space, digests):
        requested.extend(digests)
        return read(store, space, digests)

    monkeypatch.setattr(EmbeddingStore, "read", count)
    fill(store, [1, 2])
    assert requested == []
    assert_values(fill(store, [3, 2, 1]), [1, 2, 3])
    assert sorted(requested) == [digest(1), digest(2)]


def test_added_digests_are_distinct_and_match_the_values(store):
    with pytest.raises(ValueError, match="without repeats"):
        store.add(SPACE, [digest(1), digest(1)], [value(1), value(1)])
    with pytest.raises(ValueError, match="2 values for 1 digests"):
        store.add(SPACE, [digest(1)], [value(1), value(2)])
    assert store.stats().empty
    assert store.add(SPACE, [digest(1)], [value(1)]) == 1
    assert store.add(SPACE, [digest(1), digest(2)], [value(1), value(2)]) == 1
