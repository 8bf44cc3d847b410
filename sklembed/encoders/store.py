"""EmbeddingStore: one SQLite file that keeps every vector ever encoded, for every process."""

import contextlib
import json
import os
import sqlite3
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

_APPLICATION_ID = 0x534B4C45  # "SKLE", in the file's header
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice, even after clear()
    fingerprint TEXT NOT NULL UNIQUE,  -- names everything that changes a vector
    description TEXT NOT NULL,         -- the same in JSON, for people
    n_features INTEGER NOT NULL,
    encoded INTEGER NOT NULL DEFAULT 0,  -- vectors ever computed
    served INTEGER NOT NULL DEFAULT 0    -- vectors ever read back
);
CREATE TABLE vectors (
    model INTEGER NOT NULL REFERENCES models (id),
    digest BLOB NOT NULL,  -- of the cell's content; the cell itself is not kept
    vector BLOB NOT NULL,  -- little-endian float32
    UNIQUE (model, digest)
);
CREATE TABLE claims (  -- cells that some process is encoding now
    model INTEGER NOT NULL,
    digest BLOB NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (model, digest)
) WITHOUT ROWID;
"""
_PAGE_SIZE = 32768  # vectors of 1.5 to 6 kB fill a page of 4096 badly
_LOOKUP_CHUNK = 8192  # digests to a query
_BATCHES_A_CLAIM = 8  # enough to keep claims rare, few enough to share work between processes
_POLL_SECONDS = 0.05


def default_path() -> Path:
    """Return where the default store lies: `SKLEMBED_STORE`, or the user's cache directory."""
    from_environment = os.environ.get("SKLEMBED_STORE")
    if from_environment:
        return Path(from_environment).expanduser()
    return user_cache_path("sklembed", appauthor=False) / "embeddings.sqlite"


class EmbeddingStore:
    """Keep vectors in one SQLite file, by what was encoded and which model did it.

    The key of a vector is the digest of the cell's content and the fingerprint of the model, so
    folds, candidates, clones, processes, runs and projects share what any of them has computed.
    The file holds no raw inputs, is readable by its owner only, and can be opened with any SQLite
    client. Many processes may read and write at once. Cells that one process is encoding are
    claimed, so that another waits for them instead of encoding them again; claims of a process
    that died are void.

    Parameters
    ----------
    path : str, path or None, default=None
        The file; by default the one that the environment variable ``SKLEMBED_STORE`` names, else
        ``embeddings.sqlite`` in the user's cache directory for sklembed. It is made on first use.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import EmbeddingStore
    >>> store = EmbeddingStore(tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> store.stats()
    Empty DataFrame
    Columns: [model, n_features, rows, bytes, encoded, served]
    Index: []
    """

    def __init__(self, path=None):
        self.path = path

    def __repr__(self):
        return f"EmbeddingStore({os.fspath(self._path())!r})"

    def get(self, fingerprint, digests, out):
        """Read vectors into the rows of `out`.

        Parameters
        ----------
        fingerprint : str
            The model's fingerprint.
        digests : list of bytes
            Digests of the cells.
        out : ndarray of shape (n_digests, n_features), dtype float32
            Where the vectors are written; rows that the store lacks are left alone.

        Returns
        -------
        found : ndarray of shape (n_digests,), dtype bool
            Which vectors the store had.
        """
        found = np.zeros(len(digests), dtype=bool)
        with self._connection() as db:
            model = _model_id(db, fingerprint)
            if model is None:
                return found
            position = {digest: i for i, digest in enumerate(digests)}
            for digest, vector in _select(db, "digest, vector", "vectors", model, digests):
                out[position[digest]] = np.frombuffer(vector, dtype="<f4")
                found[position[digest]] = True
            if found.any():
                db.execute(
                    "UPDATE models SET served = served + ? WHERE id = ?", (int(found.sum()), model)
                )
        return found

    def fill(self, out, digests, *, fingerprint, description, encode, batch_size):
        """Encode cells that the store lacked when asked, and wait for those that others encode.

        However many processes and threads ask for the same cells at once, each is encoded by one
        of them. Vectors are on disk batch by batch, so that an interrupted run resumes.

        Parameters
        ----------
        out : ndarray of shape (n_digests, n_features), dtype float32
            Where the vectors are written.
        digests : list of bytes
            Digests of the cells, without repeats, in the order in which to encode.
        fingerprint : str
            The model's fingerprint.
        description : dict
            What the fingerprint stands for; kept for people to read.
        encode : callable
            Takes positions in `digests`; returns the list of those that could be encoded, and
            their vectors.
        batch_size : int
            Cells to a call of `encode`.
        """
        size = batch_size * _BATCHES_A_CLAIM
        with self._session(fingerprint, description, out.shape[1]) as session:

            def claim_and_encode(positions):
                """Encode what is free of these cells; return the positions that others hold."""
                free = session.claim([digests[i] for i in positions])
                mine = [i for i in positions if digests[i] in free]
                for start in range(0, len(mine), batch_size):
                    batch = mine[start : start + batch_size]
                    done, vectors = encode(batch)
                    # A cell that could not be encoded is let go with its batch: another session
                    # that wants it must not wait for this one, which may be waiting for that.
                    session.put([digests[i] for i in done], vectors, [digests[i] for i in batch])
                    out[done] = vectors
                return [i for i in positions if digests[i] not in free]

            held = []
            for start in range(0, len(digests), size):
                held += claim_and_encode(range(start, min(start + size, len(digests))))
            while held:
                vectors = np.empty((len(held), out.shape[1]), dtype=np.float32)
                found = self.get(fingerprint, [digests[i] for i in held], vectors)
                held = np.asarray(held)
                out[held[found]] = vectors[found]
                still_held = list(held[~found])
                # What is free now was left by a session that failed or died.
                held = claim_and_encode(still_held[:size]) + still_held[size:]
                if len(held) == len(still_held):
                    session.wait()

    def stats(self):
        """Count what the store holds and has done, for each model.

        Returns
        -------
        stats : DataFrame
            A row for each model, by fingerprint: its description, `n_features`, `rows` and
            `bytes` held, and how many vectors were ever `encoded` into the store and `served`
            from it. `encoded` above `rows` would mean that a cell was encoded twice.
        """
        with self._connection() as db:
            rows = db.execute(
                "SELECT fingerprint, description, n_features, COUNT(vector), "
                "TOTAL(LENGTH(vector)), encoded, served "
                "FROM models LEFT JOIN vectors ON model = id GROUP BY id"
            ).fetchall()
        columns = ["fingerprint", "model", "n_features", "rows", "bytes", "encoded", "served"]
        return pd.DataFrame(rows, columns=columns).astype({"bytes": int}).set_index("fingerprint")

    def clear(self):
        """Delete all vectors and counts; the file shrinks to a few pages."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            for table in ("claims", "vectors", "models"):
                db.execute(f"DELETE FROM {table}")
            db.execute("COMMIT")
            db.execute("VACUUM")

    @contextlib.contextmanager
    def _session(self, fingerprint, description, n_features):
        """Open a session that may claim cells; its claims end with it, however it ends."""
        model = (fingerprint, json.dumps(description, sort_keys=True), n_features)
        owner = uuid.uuid4().hex
        with FileLock(self._life_sign(owner)) as life:
            try:
                yield _Session(self, model, owner)
            finally:
                with self._connection() as db:
                    db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                Path(life.lock_file).unlink(missing_ok=True)

    def _path(self):
        return default_path() if self.path is None else Path(self.path).expanduser()

    @contextlib.contextmanager
    def _connection(self):
        """Connect for one piece of work: no connection outlives a fork or crosses a thread."""
        path = self._path()
        if not path.exists():
            self._create(path)
        try:
            db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise OSError(_trouble(path, error)) from error
        try:
            _check_is_store(db, path)
            yield db
        except sqlite3.DatabaseError as error:
            raise OSError(_trouble(path, error)) from error
        finally:
            db.close()

    def _create(self, path):
        """Make the file, complete and private, under a name of its own, and move it into place."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if path.exists():
                    return
                draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
                os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
                    db.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                    db.executescript(_SCHEMA)
                    db.execute("PRAGMA journal_mode = WAL")
                draft.rename(path)
        except OSError as error:
            raise OSError(_trouble(path, error)) from error

    def _life_sign(self, owner):
        """Name the file that a living session keeps locked; the system lets go when it dies."""
        folder = Path(f"{self._path()}.sessions")
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / owner

    def _bury(self, db, owner):
        """Void the claims of a session that died; return at once if it lives."""
        lock = FileLock(self._life_sign(owner))
        try:
            with lock.acquire(timeout=0):
                db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            return


class _Session:
    """One caller's run of encoding, known to others by the claims it holds."""

    def __init__(self, store, model, owner):
        self._store = store
        self._model = model  # fingerprint, description, width
        self._owner = owner

    def claim(self, digests):
        """Claim the cells that nobody has encoded or is encoding; return their digests."""
        with self._transaction() as (db, model):
            taken = {
                digest
                for table in ("vectors", "claims")
                for (digest,) in _select(db, "digest", table, model, digests)
            }
            free = set(digests) - taken
            db.executemany(
                "INSERT INTO claims (model, digest, owner) VALUES (?, ?, ?)",
                [(model, digest, self._owner) for digest in free],
            )
        return free

    def put(self, digests, vectors, let_go):
        """Keep vectors, on disk when this returns, and let go of the claims on a batch's cells."""
        rows = np.ascontiguousarray(vectors, dtype="<f4")
        with self._transaction() as (db, model):
            db.executemany(
                "INSERT OR IGNORE INTO vectors (model, digest, vector) VALUES (?, ?, ?)",
                [(model, d, row.tobytes()) for d, row in zip(digests, rows, strict=True)],
            )
            db.executemany(
                "DELETE FROM claims WHERE owner = ? AND model = ? AND digest = ?",
                [(self._owner, model, digest) for digest in let_go],
            )
            db.execute(
                "UPDATE models SET encoded = encoded + ? WHERE id = ?", (len(digests), model)
            )

    def wait(self):
        """Give other sessions a moment, and void the claims of those that died."""
        time.sleep(_POLL_SECONDS)
        with self._store._connection() as db:
            owners = db.execute(
                "SELECT DISTINCT owner FROM claims WHERE owner != ?", (self._owner,)
            ).fetchall()
            for (owner,) in owners:
                self._store._bury(db, owner)

    @contextlib.contextmanager
    def _transaction(self):
        """Open a write transaction and find the model's row, which `clear` may have deleted."""
        with self._store._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "INSERT OR IGNORE INTO models (fingerprint, description, n_features) "
                "VALUES (?, ?, ?)",
                self._model,
            )
            yield db, _model_id(db, self._model[0])
            db.execute("COMMIT")


def _model_id(db, fingerprint):
    row = db.execute("SELECT id FROM models WHERE fingerprint = ?", (fingerprint,)).fetchone()
    return None if row is None else row[0]


def _select(db, columns, table, model, digests):
    """Select rows of one model by digest; `columns` and `table` are this module's own words."""
    digests = list(digests)
    for start in range(0, len(digests), _LOOKUP_CHUNK):
        chunk = digests[start : start + _LOOKUP_CHUNK]
        marks = ",".join("?" * len(chunk))
        yield from db.execute(
            f"SELECT {columns} FROM {table} WHERE model = ? AND digest IN ({marks})",
            (model, *chunk),
        )


def _check_is_store(db, path):
    """Refuse a file that is not a store, or one of another schema."""
    application_id = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application_id != _APPLICATION_ID:
        raise OSError(
            f"{path} is an SQLite file, but not an embedding store. Give another path, or move it."
        )
    if version != _SCHEMA_VERSION:
        raise OSError(
            f"{path} is an embedding store of schema {version}; this release of sklembed reads "
            f"schema {_SCHEMA_VERSION}. Give another path, or move the file away."
        )


def _trouble(path, error):
    return (
        f"The embedding store {path} cannot be used: {error}. Check the file and its directory, "
        "give another path (store=... or the variable SKLEMBED_STORE), or pass store=None."
    )
