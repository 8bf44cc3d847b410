"""The store: vectors come back bit by bit, to any process, and nothing is encoded twice."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sklembed import EmbeddingStore
from sklembed.encoders.store import default_path

MODEL = {"fingerprint": "f", "description": {"name": "test"}}


def digest(number):
    return int(number).to_bytes(16, "little")


def fill(store, numbers, *, encoded=None, model=MODEL, batch_size=4, encode=None):
    """Fill a store with vectors that say which number they stand for."""

    def default_encode(positions):
        chosen = [numbers[i] for i in positions]
        if encoded is not None:
            encoded.extend(chosen)
        return list(positions), np.repeat(np.float32(chosen)[:, None], 3, axis=1)

    out = np.full((len(numbers), 3), np.nan, dtype=np.float32)
    store.fill(
        out,
        [digest(number) for number in numbers],
        encode=encode or default_encode,
        batch_size=batch_size,
        **model,
    )
    return out


def read(store, numbers, fingerprint="f"):
    out = np.full((len(numbers), 3), np.nan, dtype=np.float32)
    return store.get(fingerprint, [digest(number) for number in numbers], out), out


def test_vectors_come_back_bit_by_bit(store):
    values = np.float32([[0.1, -0.0, 1e-40], [np.pi, 3e38, 1.0]])
    out = np.empty_like(values)
    store.fill(out, [digest(0), digest(1)], encode=lambda i: (i, values[i]), batch_size=2, **MODEL)
    found, back = read(store, [1, 0, 7])
    assert found.tolist() == [True, True, False]
    assert back[:2].tobytes() == values[::-1].tobytes()
    assert np.isnan(back[2]).all()


def test_models_do_not_share_vectors(store):
    fill(store, [1, 2])
    found, _ = read(store, [1, 2], fingerprint="another")
    assert not found.any()


def test_many_more_digests_than_a_query_takes(store):
    numbers = list(range(20_000))
    fill(store, numbers, batch_size=5000)
    found, out = read(store, numbers[::-1])
    assert found.all()
    np.testing.assert_array_equal(out[:, 0], numbers[::-1])


def test_stats_count_rows_bytes_encoded_and_served(store):
    fill(store, [1, 2, 3])
    read(store, [1, 2])
    (stats,) = store.stats().to_dict("records")
    assert stats == {
        "model": '{"name": "test"}',
        "n_features": 3,
        "rows": 3,
        "bytes": 36,
        "encoded": 3,
        "served": 2,
    }


def test_clear_empties_the_store(store):
    fill(store, [1, 2])
    store.clear()
    assert store.stats().empty
    assert not read(store, [1, 2])[0].any()
    np.testing.assert_array_equal(fill(store, [5])[0], 5)


def test_what_was_encoded_before_a_failure_is_kept(store):
    def fail_at_nine(positions):
        if 9 in positions:
            raise RuntimeError("nine")
        return list(positions), np.zeros((len(positions), 3))

    with pytest.raises(RuntimeError, match="nine"):
        fill(store, list(range(12)), encode=fail_at_nine)
    assert read(store, list(range(12)))[0].tolist() == [True] * 8 + [False] * 4
    encoded = []
    fill(store, [8, 9, 10, 11], encoded=encoded)  # nobody holds them any more
    assert sorted(encoded) == [8, 9, 10, 11]


def test_cells_that_cannot_be_encoded_are_left_out(store):
    def skip_odd(positions):
        even = [i for i in positions if i % 2 == 0]
        return even, np.ones((len(even), 3))

    out = fill(store, [0, 1, 2, 3], encode=skip_odd)
    assert np.isnan(out[:, 0]).tolist() == [False, True, False, True]
    assert read(store, [0, 1, 2, 3])[0].tolist() == [True, False, True, False]


def test_sessions_that_cannot_encode_a_cell_do_not_wait_for_each_other(store):
    """Each holds a cell that nobody can encode, and that the other wants too."""
    met = threading.Barrier(2, timeout=20)
    results = {}

    def work(numbers):
        started = []

        def encode(positions):
            if not started:
                started.append(met.wait())
            good = [i for i in positions if numbers[i] not in (0, 99)]
            return good, np.ones((len(good), 3))

        results[numbers[0]] = fill(store, numbers, encode=encode, batch_size=2)

    ways = [list(range(100)), list(range(100))[::-1]]
    threads = [threading.Thread(target=work, args=(way,), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results.keys() == {0, 99}
    for out in results.values():
        assert np.isnan(out[:, 0]).sum() == 2


def test_clear_in_the_middle_of_a_session_mixes_no_models(store):
    another = {"fingerprint": "g", "description": {"name": "another"}}

    def clear_and_let_another_in(positions):
        store.clear()
        fill(store, [1, 2], model=another)
        return list(positions), np.full((len(positions), 3), 100.0)

    out = fill(store, [1, 2], encode=clear_and_let_another_in)
    np.testing.assert_array_equal(out, 100.0)
    found, vectors = read(store, [1, 2], fingerprint="g")
    assert found.all()
    np.testing.assert_array_equal(vectors[:, 0], [1, 2])
    assert read(store, [1, 2])[0].all()


def test_a_batch_may_be_larger_than_a_query(store):
    numbers = list(range(300_000))
    encoded = []
    fill(store, numbers, encoded=encoded, batch_size=300_000)
    assert len(encoded) == 300_000


def test_threads_encode_each_cell_once(store):
    encoded, results = [], {}

    def work(offset):
        numbers = [(number + offset) % 60 for number in range(60)]
        results[offset] = numbers, fill(store, numbers, encoded=encoded)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 15, 30, 45)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(encoded) == list(range(60))
    for numbers, out in results.values():
        np.testing.assert_array_equal(out[:, 0], numbers)


WORKER = """
import sys, time
import numpy as np
from sklembed import EmbeddingStore

path, offset = sys.argv[1], int(sys.argv[2])
numbers = [(n + offset) % 200 for n in range(200)]

def encode(positions):
    time.sleep(0.01)
    return list(positions), np.repeat(np.float32([numbers[i] for i in positions])[:, None], 3, 1)

out = np.zeros((200, 3), dtype=np.float32)
EmbeddingStore(path).fill(
    out, [n.to_bytes(16, "little") for n in numbers], fingerprint="f",
    description={}, encode=encode, batch_size=4,
)
assert (out[:, 0] == numbers).all()
"""


def test_processes_encode_each_cell_once(store):
    """Four processes with overlapping rows start on no file at all."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, store.path, str(offset)])
        for offset in (0, 50, 100, 150)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0, 0]
    (stats,) = store.stats().to_dict("records")
    assert stats["encoded"] == stats["rows"] == 200


def test_claims_of_a_killed_process_are_void(store):
    hang = WORKER.replace("time.sleep(0.01)", "print('working', flush=True); time.sleep(600)")
    worker = subprocess.Popen([sys.executable, "-c", hang, store.path, "0"], stdout=subprocess.PIPE)
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    worker.stdout.close()
    with sqlite3.connect(store.path) as db:
        assert db.execute("SELECT COUNT(*) FROM claims").fetchone()[0] > 0
    db.close()
    encoded = []
    tick = time.perf_counter()
    fill(store, list(range(200)), encoded=encoded)
    assert len(encoded) == 200
    assert time.perf_counter() - tick < 30  # not a time limit that has to run out
    assert not os.listdir(f"{store.path}.sessions")


def test_the_file_is_private(store):
    fill(store, [1])
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600


def test_the_file_is_sound_and_holds_what_the_schema_says(store):
    fill(store, [1])
    with sqlite3.connect(store.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert (
            db.execute("SELECT vector FROM vectors").fetchone()[0] == np.float32([1] * 3).tobytes()
        )
    db.close()


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes " * 100)
    with pytest.raises(OSError, match=r"notes.txt cannot be used: file is not a database"):
        EmbeddingStore(path).stats()
    assert path.read_text().startswith("these are my notes")


def test_another_sqlite_file_is_refused(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(OSError, match="is an SQLite file, but not an embedding store"):
        EmbeddingStore(path).stats()


def test_another_schema_is_refused(store):
    fill(store, [1])
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(
        OSError, match="store of schema 99; this release of sklembed reads schema 1"
    ):
        store.stats()


def test_a_path_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be used.*pass store=None"):
        EmbeddingStore(tmp_path / "file" / "store.sqlite").stats()


def test_the_default_path_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "mine.sqlite"))
    assert default_path() == tmp_path / "mine.sqlite"
    monkeypatch.delenv("SKLEMBED_STORE")
    assert default_path().name == "embeddings.sqlite"
    assert "sklembed" in str(default_path())
