"""Faults of processes, disks and files cause no wrong vector and lose no stored one."""

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from sklembed.encoders import database
from sklembed.encoders.database import Space
from sklembed.encoders.store import EmbeddingStore

SPACE = Space("f", {"name": "test"}, 64)
BATCH = 8

# Reads lists of jobs, one list per line, and forks a process for each job. A fork starts
# immediately, since all modules are imported.
SERVER = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
import numpy as np
from sklembed.encoders.database import Space
from sklembed.encoders.store import EmbeddingStore

def run(path, log, numbers):
    numbers = np.array(numbers)
    log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def vectors(positions):
        return np.sin(np.outer(numbers[positions], np.arange(64))).astype(np.float32)

    def encode(claims):
        for claimed in claims:
            for start in range(0, len(claimed), 8):
                batch = claimed[start : start + 8]
                time.sleep(0.001)
                os.write(log, numbers[batch].tobytes())
                yield batch, batch, vectors(batch)

    n_done = 0
    digests = [blake2b(bytes([*divmod(i, 256)]), digest_size=16).digest() for i in numbers]
    for positions, values in EmbeddingStore(path).fill(
        Space("f", {"name": "test"}, 64), digests, encode=encode, claim_size=32
    ):
        assert np.array_equal(values, vectors(positions))
        n_done += len(positions)
    assert n_done == len(numbers)

def fork(job):
    child = os.fork()
    if child:
        return child
    try:
        run(*job)
        os._exit(0)
    finally:
        os._exit(1)

for line in sys.stdin:
    children = [fork(job) for job in json.loads(line)]
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def start(server, *jobs):
    """Start a process for each job: path of the store, path of a log, numbers to encode."""
    server.stdin.write(json.dumps(jobs) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def statuses(server):
    """Wait for the processes that were started last; return their exit statuses."""
    return json.loads(server.stdout.readline())


def logged(log):
    """Return the numbers that were encoded."""
    return np.fromfile(log, dtype=np.int64).tolist() if log.exists() else []


def vectors(numbers):
    return np.sin(np.outer(numbers, np.arange(64))).astype(np.float32)


def digests(n):
    return [
        blake2b(bytes([*divmod(i, 256)]), digest_size=16).digest() for i in range(n)
    ]


def encode(claims):
    for claimed in claims:
        yield claimed, claimed, vectors(claimed)


def gather(pieces):
    """Return the values by number, after comparing them bit by bit."""
    values = {}
    for positions, stored in pieces:
        np.testing.assert_array_equal(stored, vectors(positions))
        values |= dict(zip(positions.tolist(), stored, strict=True))
    return values


def fill(store, n, encode=encode):
    return gather(store.fill(SPACE, digests(n), encode=encode, claim_size=BATCH))


def read(store, n):
    return gather(store.read(SPACE, digests(n)))


def assert_intact(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_kill_9_loses_at_most_a_batch_and_nothing_is_encoded_again(
    server, store, tmp_path
):
    rng = np.random.default_rng(0)
    n = 20_000
    stored = set()
    n_interrupted = 0
    while n_interrupted < 5:
        log = tmp_path / f"encoded-{n_interrupted}"
        (process,) = start(server, (str(store.path), str(log), list(range(n))))
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(process, signal.SIGKILL)
        assert statuses(server) == [signal.SIGKILL]
        encoded = logged(log)
        assert stored.isdisjoint(encoded)  # no stored cell is encoded again
        stored |= read(store, n).keys()
        assert len(set(encoded) - stored) <= BATCH  # at most one batch is lost
        assert_intact(store.path)
        n_interrupted += bool(encoded)
    assert len(stored) < n  # no run was complete


def test_eight_processes_encode_each_cell_once(server, store, tmp_path):
    """They start without a file, and overlap in rows of different order."""
    rng = np.random.default_rng(0)
    jobs = [
        (
            str(store.path),
            str(tmp_path / "encoded"),
            rng.permutation(1600)[:1200].tolist(),
        )
        for _ in range(8)
    ]
    start(server, *jobs)
    assert statuses(server) == [0] * 8
    encoded = logged(tmp_path / "encoded")
    assert (
        len(encoded) == len(set(encoded)) == len(set().union(*(job[2] for job in jobs)))
    )
    stats = store.stats().loc["f"]
    assert stats["encoded"] == stats["rows"] == len(encoded)
    assert_intact(store.path)


def test_claims_of_a_dead_process_block_no_other_process(server, store, tmp_path):
    jobs = [
        (str(store.path), str(tmp_path / f"encoded-{i}"), list(range(2000)))
        for i in range(3)
    ]
    processes = start(server, *jobs)
    while len(logged(tmp_path / "encoded-0")) < BATCH:
        time.sleep(0.005)
    os.kill(processes[0], signal.SIGKILL)
    assert statuses(server) == [signal.SIGKILL, 0, 0]
    assert read(store, 2000).keys() == set(range(2000))
    encoded = sum((logged(tmp_path / f"encoded-{i}") for i in range(3)), [])
    assert len(encoded) <= 2000 + BATCH
    assert not os.listdir(f"{store.path}.sessions")


@pytest.fixture
def folder():
    """A folder that every user can read."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def write_protected(folder, file_mode=0o600):
    """Remove write permission of a folder and, by `file_mode`, its files; also for root."""
    root = os.geteuid() == 0
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else file_mode)
        if root:
            os.chown(path, 65534, 65534)
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("file_mode", [0o600, 0o400])
def test_a_write_protected_store_is_read_and_encoding_continues(folder, file_mode):
    store = EmbeddingStore(folder / "store.sqlite")
    fill(store, 10)
    with write_protected(folder, file_mode):
        assert read(store, 12).keys() == set(range(10))
        assert store.lacks(SPACE, digests(12)).tolist() == [False] * 10 + [True] * 2
        with pytest.warns(
            UserWarning, match=r"store.sqlite cannot be written"
        ) as caught:
            assert fill(store, 40).keys() == set(range(40))
        assert len(caught) == 1
        with pytest.raises(OSError, match="readonly database"):
            store.clear()
    assert read(store, 40).keys() == set(range(10))


def test_the_log_may_be_removed_while_another_process_connects(store):
    """SQLite removes the log when the last connection is closed."""
    fill(store, 1)

    def connect_repeatedly(_):
        for _ in range(200):
            with contextlib.closing(database.connect(store.path)) as db:
                db.execute("SELECT count(*) FROM models").fetchone()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(connect_repeatedly, range(4)))


def test_a_store_that_cannot_be_created_is_an_error(folder):
    store = EmbeddingStore(folder / "store.sqlite")
    for use in (store.stats, lambda: read(store, 1), lambda: fill(store, 1)):
        with (
            write_protected(folder),
            pytest.raises(
                OSError, match=r"store.sqlite cannot be used.*Permission.*store=None"
            ),
        ):
            use()


def test_a_full_disk_loses_no_result(store, monkeypatch):
    fill(store, 10)
    connect = database.connect

    def connect_to_a_full_disk(path, **options):
        db = connect(path, **options)
        db.execute(
            "PRAGMA max_page_count = 1"
        )  # SQLite raises it to the current number
        return db

    monkeypatch.setattr(database, "connect", connect_to_a_full_disk)
    with pytest.warns(
        UserWarning, match="disk is full.*without being stored"
    ) as caught:
        assert fill(store, 2000).keys() == set(range(2000))
    assert len(caught) == 1
    monkeypatch.undo()
    stored = read(store, 2000).keys()
    assert set(range(10)) <= stored < set(range(2000))
    assert_intact(store.path)
    # With space on the disk, all are stored.
    assert fill(store, 2000).keys() == set(range(2000))
    assert read(store, 2000).keys() == set(range(2000))


def test_an_input_output_error_loses_no_result(store):
    fill(store, 10)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = os.path.getsize(store.path)
    with pytest.warns(
        UserWarning, match=r"(I/O error|disk is full).*without being stored"
    ) as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            assert fill(store, 2000).keys() == set(range(2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(caught) == 1
    assert set(range(10)) <= read(store, 2000).keys() < set(range(2000))
    assert_intact(store.path)


@pytest.mark.parametrize(
    "mounts, kind",
    [
        ("server:/home {mount} nfs4 rw 0 0", "nfs4"),
        ("//server/home {mount} cifs rw 0 0", "cifs"),
        ("me@server: {mount} fuse.sshfs rw 0 0", "fuse.sshfs"),
        ("/dev/sda1 {mount} ext4 rw 0 0\nserver:/x {mount} lustre rw 0 0", "lustre"),
        ("server:/x {mount} nfs rw 0 0\n/dev/sda1 {mount}/local ext4 rw 0 0", None),
        ("server:/x {mount}/loc nfs rw 0 0", None),
        ("server:/x / nfs rw 0 0\n/dev/sda1 {mount} xfs rw 0 0", None),
    ],
)
def test_a_network_file_system_is_an_error(tmp_path, monkeypatch, mounts, kind):
    """The last of the deepest mount points counts; their names may be escaped."""
    mount = tmp_path / "my files"
    table = tmp_path / "mounts"
    table.write_text(
        "/dev/vda / ext4 rw 0 0\n" + mounts.format(mount=f"{tmp_path}/my\\040files")
    )
    monkeypatch.setattr(database, "_MOUNTS", table)
    store = EmbeddingStore(mount / "local" / "store.sqlite")
    if kind is None:
        assert store.stats().empty
        return
    for use in (store.stats, lambda: read(store, 1), lambda: fill(store, 1)):
        with pytest.raises(
            OSError, match=rf"network file system \({kind}\).*SKLEMBED_STORE"
        ):
            use()
    assert not mount.exists()


def test_any_path_is_allowed_if_mounts_are_unknown(store, monkeypatch, tmp_path):
    monkeypatch.setattr(database, "_MOUNTS", tmp_path / "absent")
    assert fill(store, 1).keys() == {0}


def test_a_damaged_vector_is_encoded_again(store):
    fill(store, 20)
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        wrong = vectors([99]).tobytes()
        db.execute("UPDATE vectors SET vector = ? WHERE id = 5", (wrong,))
        db.execute("UPDATE vectors SET vector = SUBSTR(vector, 5) WHERE id = 7")
        db.execute("UPDATE vectors SET vector = 'text' WHERE id = 9")
        db.execute("DELETE FROM vectors WHERE id = 11")
    encoded = []

    def record(claims):
        for claimed in claims:
            encoded.extend(claimed)
            yield claimed, claimed, vectors(claimed)

    with pytest.warns(
        UserWarning, match="4 vectors in .*store.sqlite are damaged"
    ) as caught:
        assert fill(store, 20, record).keys() == set(range(20))
    assert len(caught) == 1
    assert sorted(encoded) == [4, 6, 8, 10]
    assert read(store, 20).keys() == set(range(20))
    assert store.stats().loc["f", "bytes"] == 20 * 256


def test_damage_in_a_write_protected_store_causes_no_endless_loop(folder):
    store = EmbeddingStore(folder / "store.sqlite")
    fill(store, 3)
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE vectors SET vector = x'00' WHERE id = 2")
    with (
        write_protected(folder),
        pytest.warns(UserWarning, match="cannot be written"),
        pytest.warns(UserWarning, match="1 vectors in .* are damaged"),
    ):
        assert fill(store, 3).keys() == {0, 1, 2}


def mutate(content, rng):
    """Damage the content of a file as disks, programs and people do."""
    content = bytearray(content)
    at = int(rng.integers(len(content)))
    page = at // 32768 * 32768
    # Positions in headers are drawn more often, since structure is a small part of the file.
    small = int(
        rng.choice(
            [rng.integers(100), rng.integers(len(content)), page + rng.integers(64)]
        )
    )
    kind = rng.integers(6)
    if kind <= 1:
        content[small] ^= 1 << rng.integers(8)
    elif kind == 2:
        for place in rng.integers(len(content), size=20):
            content[place] = rng.integers(256)
    elif kind == 3:
        del content[at:]
    elif kind == 4:
        content[page : page + 32768] = rng.bytes(32768)
    else:
        content[at : at + 5000] = bytes(len(content[at : at + 5000]))
    return content


def test_no_damage_to_the_file_causes_a_wrong_vector(store, tmp_path):
    """Reading and filling either raise an error or return right vectors."""
    rng = np.random.default_rng(0)
    fill(store, 600)
    content = store.path.read_bytes()
    counts = {"right": 0, "error": 0}
    for trial in range(120):
        victim = EmbeddingStore(tmp_path / f"{trial}.sqlite")
        victim.path.write_bytes(mutate(content, rng))
        for use in (read, fill):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    n_vectors = len(use(victim, 600))
                except OSError as error:
                    assert "ove" in str(error)  # "Move it away", or "or move it"
                    counts["error"] += 1
                else:
                    assert use is read or n_vectors == 600
                    counts["right"] += 1
    assert min(counts.values()) >= 40


def test_a_disk_without_any_space_can_be_pruned_and_cleared(store, monkeypatch):
    """Without space for a log or shared memory, only writing in place works."""
    fill(store, 200)
    connect = database.connect

    def connect_without_space(path, **options):
        db = connect(path, **options)
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(database, "connect", connect_without_space)
    monkeypatch.setattr(
        database.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
    )
    assert store.prune(50 * 256) == 150
    monkeypatch.undo()
    assert len(read(store, 200)) == 50
    monkeypatch.setattr(database, "connect", connect_without_space)
    monkeypatch.setattr(
        database.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
    )
    store.clear()
    monkeypatch.undo()
    assert store.stats().empty
    assert_intact(store.path)
    assert fill(store, 20).keys() == set(range(20))


def test_the_disk_is_not_filled_to_the_last_byte(store, monkeypatch):
    monkeypatch.setattr(
        database.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.warns(
        UserWarning, match="the disk is full.*without being stored"
    ) as caught:
        assert fill(store, 40).keys() == set(range(40))
    assert len(caught) == 1
    assert not read(store, 40)


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.parquet"])
def test_an_export_that_fails_leaves_the_earlier_one(
    store, tmp_path, monkeypatch, name
):
    fill(store, 10)
    store.export(tmp_path / name)
    files = {path: path.read_bytes() for path in tmp_path.glob("vectors*")}
    fill(store, 20)
    chunks = database.iter_vectors

    def fail_after_a_chunk(*args):
        yield next(chunks(*args))
        raise OSError("the disk is full")

    monkeypatch.setattr(database, "iter_vectors", fail_after_a_chunk)
    with pytest.raises(OSError, match="disk is full"):
        store.export(tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.glob("*vectors*")} == files


@pytest.mark.parametrize("description", ["3", "{", "[" * 100_000])
def test_a_damaged_description_is_an_error_that_names_the_store(
    store, tmp_path, description
):
    fill(store, 1)
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE models SET description = ?", (description,))
    for use in (store.stats, lambda: store.export(tmp_path / "x.npy")):
        with pytest.raises(OSError, match="store.sqlite.*is damaged.*Move it away"):
            use()
    assert read(store, 1).keys() == {0}
