"""SQLite file of a store: schema, connections, queries and errors."""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path

_APPLICATION_ID = 0x534B4C45  # "SKLE", in the header of the file
_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused, even after clear()
    fingerprint TEXT NOT NULL UNIQUE,  -- key of all settings that change a vector
    description TEXT NOT NULL,         -- the settings in JSON
    n_features INTEGER NOT NULL,
    dtype TEXT NOT NULL,               -- of the stored numbers: float32 or float16
    ragged INTEGER NOT NULL,           -- 1: a value has shape (n_tokens, n_features)
    bytes INTEGER NOT NULL DEFAULT 0,    -- sum of the sizes of its cells, for max_bytes
    encoded INTEGER NOT NULL DEFAULT 0,  -- number of values encoded so far
    served INTEGER NOT NULL DEFAULT 0    -- number of values read so far
);
-- Small rows apart from the vectors: a lookup or update reads no page of vectors.
CREATE TABLE cells (
    model INTEGER NOT NULL REFERENCES models (id),
    digest BLOB NOT NULL,       -- hash of the content; the cell itself is not stored
    id INTEGER NOT NULL,        -- of its row in vectors
    checksum INTEGER NOT NULL,  -- CRC-32 of digest and vector; SQLite has no checksums
    size INTEGER NOT NULL,      -- of the vector, in bytes
    used INTEGER NOT NULL,      -- hour of last use, since 1970
    PRIMARY KEY (model, digest)
) WITHOUT ROWID;
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a reader may have an old id
    vector BLOB NOT NULL  -- little-endian
);
CREATE TABLE claims (  -- cells that a process is encoding
    model INTEGER NOT NULL,
    digest BLOB NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (model, digest)
) WITHOUT ROWID;
"""
_PAGE_SIZE = 32768  # pages of 4096 bytes waste space on vectors of 1.5 to 6 kB
DIGEST_SIZE = 16
# Cells in a query, and in a transaction that updates `used`. Larger results leave the
# caches of the processor.
_LOOKUP_ROWS = 4096
_EXPORT_ROWS = 131072
_EXPORT_BYTES = 1 << 24  # gives Parquet row groups of a useful size
_TIMEOUT_SECONDS = 60.0  # for the transaction of another process
# A read without encoding takes about this long, and counts do not justify waiting.
_COUNTS_TIMEOUT_SECONDS = 0.05
# Left free on the disk in addition to the log, so that a full store can be pruned.
_SPARE_BYTES = 1 << 20

_DISK_ERRORS = {  # of a disk that is full, failing, busy or write-protected
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
# Processes share the memory of a write-ahead log, which is impossible across machines.
_NETWORK_FILE_SYSTEMS = set(
    "9p afs beegfs ceph cifs coda davfs fhgfs glusterfs gpfs lustre ncpfs nfs nfs4 orangefs "
    "panfs pvfs2 smb2 smb3 smbfs fuse.beegfs fuse.ceph fuse.davfs2 fuse.gcsfuse "
    "fuse.glusterfs fuse.juicefs fuse.rclone fuse.s3fs fuse.sshfs".split()
)
_MOUNTS = Path("/proc/self/mounts")


def default_path() -> Path:
    """Return the default store: `SKLEMBED_STORE`, or a file in the user's cache.

    A relative `SKLEMBED_STORE` is made absolute in the environment on first use, so
    that worker processes and later calls use the same file in any working directory.

    Raises
    ------
    OSError
        If the variable is not set and the user has no home directory.
    """
    from_environment = os.environ.get("SKLEMBED_STORE")
    if from_environment:
        path = absolute(from_environment)
        os.environ["SKLEMBED_STORE"] = path
        return Path(path)
    try:
        return user_cache_path("sklembed", appauthor=False) / "embeddings.sqlite"
    except RuntimeError as error:  # of platformdirs or pathlib
        raise OSError(
            f"There is no default embedding store: {error}. Set the variable SKLEMBED_STORE or "
            "store=... to a path, or pass store=None."
        ) from error


def absolute(path) -> str:
    """Make a path absolute, and validate that it can be a file.

    Raises
    ------
    ValueError
        If the path is SQLite's name for a database in memory, a URL, or a directory.
    OSError
        If the path starts with ``~`` and the user has no home directory.
    """
    path = os.fsdecode(path)
    if path.endswith(("/", os.sep)) or not path:
        raise ValueError(
            f"store={path!r} is a directory, but the store is one file. Name a file in it: "
            f"store={os.path.join(path, 'embeddings.sqlite')!r}."
        )
    if path == ":memory:" or path.startswith("file:") or "://" in path:
        raise ValueError(
            f"store={path!r} is not the path of a file, which worker processes need to share. "
            "Pass a path on a local disk, or store=None to store nothing."
        )
    path = os.path.expanduser(path)
    if path.startswith(("~/", f"~{os.sep}")):
        raise OSError(
            f"store={path!r}: this user has no home directory. Pass an absolute path."
        )
    return os.path.abspath(path)


@dataclass(frozen=True)
class Space:
    """Key, description and shape of the vectors of one encoder configuration.

    Parameters
    ----------
    fingerprint : str
        Key of all settings that change a vector, including how it is stored.

    description : dict
        The settings in readable form, of JSON types.

    n_features : int
        Width of a vector.

    dtype : {"float32", "float16"}, default="float32"
        Type of the stored numbers. Values are passed and returned as float32. With
        "float16" they are rounded before they are returned for the first time.

    ragged : bool, default=False
        Whether a value has shape (n_tokens, n_features) instead of (n_features,).
    """

    fingerprint: str
    description: dict = field(hash=False)
    n_features: int
    dtype: str = "float32"
    ragged: bool = False

    def __post_init__(self):
        if self.dtype not in ("float32", "float16"):
            raise ValueError(
                f"dtype must be 'float32' or 'float16'; got {self.dtype!r}."
            )

    @property
    def names(self):
        """Names of the model: its fingerprint and, if defined, its label and name."""
        names = [self.fingerprint]
        for key in ("label", "name"):
            if self.description.get(key) is not None:
                names.append(self.description[key])
        return names

    def settings(self):
        """Return the model and its settings, for reports; None if it does not state one."""
        layers = self.description.get("layers")
        if layers is not None and len(layers) == 1:
            (layers,) = layers
        return {
            "model": self.names[-1],
            "pooling": self.description.get("pooling"),
            "layer": layers,
            "unit_length": self.description.get("unit_length"),
        }

    @property
    def _stored_dtype(self):
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def _vector_bytes(self):
        return self.n_features * self._stored_dtype.itemsize

    def pack(self, values, count):
        """Return the bytes of `count` values, and the values as they will be read."""
        if len(values) != count:
            raise ValueError(
                f"{count} cells were encoded, but {len(values)} values were returned."
            )
        if not self.ragged:
            block = self._round(values)
            return [row.tobytes() for row in block], block.astype(np.float32)
        blobs, rounded = [], []
        for value in values:
            block = self._round(value)
            blobs.append(block.tobytes())
            rounded.append(block.astype(np.float32))
        return blobs, rounded

    def _round(self, block):
        """Convert a block of vectors to the stored type."""
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != self.n_features:
            raise ValueError(
                f"expected vectors of {self.n_features} features; got the shape {block.shape}."
            )
        with np.errstate(over="ignore"):  # an error is raised below
            rounded = np.ascontiguousarray(block, dtype=self._stored_dtype)
        if self.dtype == "float16" and (np.isinf(rounded) & np.isfinite(block)).any():
            raise ValueError(
                "a value is beyond 65504, the largest float16. Scale the vectors, or store "
                "them as float32."
            )
        return rounded

    def unpack(self, blobs):
        """Convert bytes back to values, all at once."""
        flat = np.frombuffer(bytearray().join(blobs), dtype=self._stored_dtype)
        flat = flat.astype(np.float32, copy=False).reshape(-1, self.n_features)
        if not self.ragged:
            return flat
        ends = np.cumsum([len(blob) for blob in blobs]) // self._vector_bytes
        return np.split(flat, ends[:-1])

    def is_valid_size(self, size):
        """Return whether a value can have `size` bytes."""
        if self.ragged:
            return size % self._vector_bytes == 0
        return size == self._vector_bytes


def create(path):
    """Create a store as a private file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if _size(path):
            return
        draft = Path(f"{path}.draft")
        draft.unlink(missing_ok=True)  # of a process that died here
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
            # Lets pruning shrink the file.
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute("PRAGMA journal_mode = WAL")
        draft.replace(path)  # an empty file may be in its place


def exists(path):
    """Return whether there is a store; an empty file, as of `tempfile`, is not one."""
    return _size(path) > 0


def _size(file):
    """Return the size of a file, or 0 if another process has deleted it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def connect(path, *, read_only=False):
    """Open an existing store, read-only if it cannot or must not be written.

    Raises
    ------
    sqlite3.Error
        If it cannot be opened.
    OSError
        If it is not a store, or has another schema.
    """
    modes = ["mode=ro"] if read_only else ["mode=rw", "mode=ro"]
    log = Path(f"{path}-wal")
    if read_only and not log.exists():
        modes = [
            "mode=ro&immutable=1"
        ]  # otherwise SQLite creates a log and shared memory
    elif not _size(log):
        # For a directory in which SQLite cannot create shared memory. If another process can
        # and writes meanwhile, the structure or a checksum reveals a torn page.
        modes.append("mode=ro&immutable=1")
    for mode in modes:
        db = _open(path, mode)
        try:
            # Survives SIGKILL; a power cut may undo transactions since the checkpoint.
            db.execute("PRAGMA synchronous = NORMAL")
            check_is_store(db, path)  # opens the file and its log
        except BaseException as error:
            db.close()
            if mode == modes[-1] or not is_disk_error(error):
                raise
        else:
            return db


def _open(path, mode):
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=_TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,  # a generator may be closed in another thread
    )


@contextlib.contextmanager
def connect_in_place(path):
    """Open a store without a log, if the disk has no space for one.

    No other process can use the store until the connection is closed.
    """
    with contextlib.closing(_open(path, "mode=rw")) as db:
        # Exclusive locking needs no shared memory, which is a file.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = MEMORY").fetchone()
        yield db
        db.execute("PRAGMA journal_mode = WAL").fetchone()


@contextlib.contextmanager
def transaction(db):
    """Execute a block of statements as a whole or not at all, as the only writer."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite rolls back by itself after some errors
            db.execute("ROLLBACK")
        raise


def model_id(db, space):
    """Return the id of a space's model, or None if the store has no such model."""
    row = db.execute(
        "SELECT id, n_features, dtype, ragged FROM models WHERE fingerprint = ?",
        (space.fingerprint,),
    ).fetchone()
    if row is None:
        return None
    number, *stored = row
    requested = [space.n_features, space.dtype, int(space.ragged)]
    if stored != requested:
        raise OSError(
            f"The embedding store has {space.fingerprint} with (n_features, dtype, ragged) = "
            f"{stored}, but {requested} was requested. Use a fingerprint that depends on these "
            "three; if it does, the file is damaged: move it away."
        )
    return number


def ensure_model(db, space):
    """Return the id of a space's model; insert the model if `clear` has deleted it."""
    number = model_id(db, space)
    if number is None:
        number = db.execute(
            "INSERT INTO models (fingerprint, description, n_features, dtype, ragged) "
            "VALUES (?, ?, ?, ?, ?)",
            (
                space.fingerprint,
                json.dumps(space.description, sort_keys=True),
                space.n_features,
                space.dtype,
                int(space.ragged),
            ),
        ).lastrowid
    return number


def read_space(fingerprint, description, n_features, dtype, ragged):
    """Return the space in a row of `models`.

    Raises
    ------
    sqlite3.DatabaseError
        If a value of the row is damaged.
    """
    try:
        settings = json.loads(description)
        space = Space(fingerprint, settings, n_features, dtype, bool(ragged))
    except (RecursionError, TypeError, ValueError):
        settings = None
    is_width = isinstance(n_features, int) and n_features >= 1
    if not (isinstance(settings, dict) and is_width):
        raise sqlite3.DatabaseError(f"the row of the model {fingerprint!r} is damaged")
    return space


def spaces(db, model):
    """Map ids of models to spaces; `model` is a fingerprint, a name, or None for all."""
    matching, names = {}, set()
    for number, *row in db.execute(
        "SELECT id, fingerprint, description, n_features, dtype, ragged FROM models"
    ).fetchall():
        space = read_space(*row)
        names.add(space.names[-1])
        if model in (None, *space.names):
            matching[number] = space
    if model is not None and not matching:
        raise ValueError(
            f"The store has no vectors of {model!r}. It has vectors of {sorted(names)}."
        )
    return matching


def find(db, table, model, digests, columns=()):
    """Look up digests in a table of cells or claims.

    Parameters
    ----------
    db : sqlite3.Connection
        The store.

    table : {"cells", "claims"}
        The table.

    model : int
        Id of the model.

    digests : list of bytes
        Hashes of the cells. They are passed as one value that SQL splits, since SQLite
        limits the number of parameters.

    columns : tuple of str, default=()
        Integer columns to return.

    Returns
    -------
    rows : structured ndarray of shape (n_rows,)
        The fields "position", an index into `digests`, and `columns`, for the digests
        in the table.
    """
    dtype = np.dtype([(name, np.int64) for name in ("position", *columns)])
    joined = b"".join(digests)
    if len(joined) != DIGEST_SIZE * len(digests):
        raise ValueError(f"digests must have {DIGEST_SIZE} bytes each.")
    keys = np.frombuffer(joined, dtype=f"V{DIGEST_SIZE}")
    # By the first 8 bytes, nearly the order of the tree: neighbours share its pages.
    order = np.argsort(keys.view(">u8")[::2].astype(np.uint64))
    # A damaged row may have any type. Id 0, in place of non-integers, has no vector.
    selected = "".join(f", IFNULL(CAST({name} AS INTEGER), 0)" for name in columns)
    # `place` enumerates positions, and SUBSTR extracts the key at each of them.
    query = (
        "WITH RECURSIVE place (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM place WHERE i < :last) "
        f"SELECT i{selected} FROM place CROSS JOIN {table} "
        f"ON model = :model AND digest = SUBSTR(:keys, {DIGEST_SIZE} * i + 1, {DIGEST_SIZE})"
    )
    chunks = [np.empty(0, dtype=dtype)]
    for start in range(0, len(order), _LOOKUP_ROWS):
        positions = order[start : start + _LOOKUP_ROWS]
        rows = db.execute(
            query,
            {
                "last": len(positions) - 1,
                "model": model,
                "keys": keys[positions].tobytes(),
            },
        ).fetchall()
        numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        chunk = numbers.view(dtype)
        chunk["position"] = positions[chunk["position"]]
        chunks.append(chunk)
    return np.concatenate(chunks)


def look_up(db, model, digests):
    """Return the rows of `cells` for stored digests, in the order of their vectors."""
    cells = find(db, "cells", model, digests, ("id", "checksum", "size", "used"))
    return cells[np.argsort(cells["id"])]


def pieces(cells, max_bytes):
    """Split cells into pieces with about `max_bytes` bytes of vectors each."""
    cuts = np.flatnonzero(np.diff(np.cumsum(cells["size"]) // max_bytes)) + 1
    return np.split(cells, cuts) if len(cells) else []


def fetch(db, space, digests, cells):
    """Read the vectors of cells from `look_up`.

    Returns
    -------
    intact : structured ndarray
        The cells whose vectors have the right size and checksum.

    values : ndarray of shape (n_intact, n_features), or list of ndarray
        Their values.

    damaged : structured ndarray
        The other cells.
    """
    ids = cells["id"].tolist()
    query = "SELECT vectors.id, CAST(vector AS BLOB) FROM "
    if ids[-1] - ids[0] < 2 * len(ids):  # mostly neighbours: scanning beats seeking
        rows = db.execute(query + "vectors WHERE id BETWEEN ? AND ?", (ids[0], ids[-1]))
    else:
        selection = "json_each(?) CROSS JOIN vectors ON vectors.id = value"
        rows = db.execute(query + selection, (json.dumps(ids),))
    vectors = dict(rows.fetchall())
    blobs = [vectors.get(i) or b"" for i in ids]
    keys = [digests[position] for position in cells["position"].tolist()]
    # With the digest, since a lookup in a damaged tree may find the row of another cell.
    checksums = map(crc32, blobs, map(crc32, keys))
    checksums = np.fromiter(checksums, np.int64, len(blobs))
    sizes = np.fromiter(map(len, blobs), np.int64, len(blobs))
    is_intact = (sizes == cells["size"]) & (checksums == cells["checksum"])
    is_intact &= space.is_valid_size(sizes)
    if is_intact.all():
        return cells, space.unpack(blobs), cells[:0]
    blobs = list(itertools.compress(blobs, is_intact))
    values = space.unpack(blobs) if blobs else []
    return cells[is_intact], values, cells[~is_intact]


def insert(db, model, digests, blobs):
    """Insert the vectors of cells, except cells that the store already has."""
    stored = set(find(db, "cells", model, digests)["position"].tolist())
    number, hour, n_bytes = _next_vector(db), _hour(), 0
    vectors, cells = [], []
    for i, (digest, blob) in enumerate(zip(digests, blobs, strict=True)):
        if i in stored:
            continue
        checksum = crc32(blob, crc32(digest))
        vectors.append((number, blob))
        cells.append((model, digest, number, checksum, len(blob), hour))
        number += 1
        n_bytes += len(blob)
    db.executemany("INSERT INTO vectors (id, vector) VALUES (?, ?)", vectors)
    cells.sort()  # in the order of the tree
    db.executemany(
        "INSERT INTO cells (model, digest, id, checksum, size, used) VALUES (?, ?, ?, ?, ?, ?)",
        cells,
    )
    db.execute(
        "UPDATE models SET encoded = encoded + ?, bytes = bytes + ? WHERE id = ?",
        (len(digests), n_bytes, model),
    )


def _next_vector(db):
    """Return the first id that no vector has ever had."""
    row = db.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = 'vectors'"
    ).fetchone()
    return 1 if row is None else row[0] + 1


def record_use(db, model, digests, cells):
    """Update the hour of last use, if the store can be written."""
    hour = _hour()
    stale = cells["position"][cells["used"] < hour]
    rows = sorted((hour, model, digests[i]) for i in stale)
    with _without_waiting(db):
        for start in range(0, len(rows), _LOOKUP_ROWS):
            with transaction(db):
                db.executemany(
                    "UPDATE cells SET used = ? WHERE model = ? AND digest = ?",
                    rows[start : start + _LOOKUP_ROWS],
                )


def record_served(db, counts):
    """Add numbers of served vectors by fingerprint; return whether they are written."""
    rows = [(count, fingerprint) for fingerprint, count in counts.items()]
    with _without_waiting(db), transaction(db):
        db.executemany(
            "UPDATE models SET served = served + ? WHERE fingerprint = ?", rows
        )
        return True
    return False


@contextlib.contextmanager
def _without_waiting(db):
    """Skip the rest of a block if another process writes, or nothing can be written."""
    db.execute(f"PRAGMA busy_timeout = {int(_COUNTS_TIMEOUT_SECONDS * 1000)}")
    try:
        yield
    except sqlite3.OperationalError:
        pass
    finally:
        db.execute(f"PRAGMA busy_timeout = {int(_TIMEOUT_SECONDS * 1000)}")


def _hour():
    """Return the hour since 1970. It is so coarse that repeated reads rarely write."""
    return int(time.time() // 3600)


def total_bytes(db):
    """Return the bytes of the vectors of all models."""
    return db.execute("SELECT TOTAL(bytes) FROM models").fetchone()[0]


def prune(db, max_bytes):
    """Delete the least recently used vectors, in short transactions."""
    cells = _least_recently_used(db, total_bytes(db) - max_bytes)
    n_dropped = 0
    for start in range(0, len(cells), _LOOKUP_ROWS):
        with transaction(db):
            ids = drop(db, cells[start : start + _LOOKUP_ROWS])
            db.executemany(
                "DELETE FROM vectors WHERE id = ?", [(i,) for i in sorted(ids)]
            )
        n_dropped += len(ids)
    if n_dropped:
        shrink(db)
    return n_dropped


def _least_recently_used(db, n_bytes):
    """Return the cells to delete so that at least `n_bytes` bytes are freed."""
    cells = []
    with contextlib.closing(
        db.execute("SELECT model, digest, id, size FROM cells ORDER BY used, id")
    ) as rows:
        while n_bytes > 0 and (row := rows.fetchone()) is not None:
            cells.append(row)
            n_bytes -= row[-1]
    return cells


def drop(db, cells):
    """Delete cells, tuples (model, digest, id, size); return the ids of deleted ones."""
    ids = []
    for model, digest, number, size in cells:
        if db.execute(
            "DELETE FROM cells WHERE model = ? AND digest = ? AND id = ?",
            (model, digest, number),
        ).rowcount:
            db.execute(
                "UPDATE models SET bytes = bytes - ? WHERE id = ?", (size, model)
            )
            ids.append(number)
    return ids


def clear(db, model=None):
    """Delete the vectors of all models, or of those with a fingerprint or name."""
    numbers = [] if model is None else spaces(db, model)
    with transaction(db):
        if model is None:
            for table in ("claims", "cells", "vectors", "models"):
                db.execute(f"DELETE FROM {table}")
        for number in numbers:
            delete_model(db, number)
    shrink(db)


def delete_model(db, model):
    """Delete a model with its cells, vectors and claims."""
    db.execute(
        "DELETE FROM vectors WHERE id IN (SELECT id FROM cells WHERE model = ?)",
        (model,),
    )
    for table, column in (("cells", "model"), ("claims", "model"), ("models", "id")):
        db.execute(f"DELETE FROM {table} WHERE {column} = ?", (model,))


def shrink(db):
    """Return free pages to the file system."""
    # execute() would stop after the first page.
    db.executescript("PRAGMA incremental_vacuum")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def iter_vectors(db, model, space):
    """Yield pairs (digests, values) of all cells of a model; skip damaged vectors."""
    last = b""
    while True:
        rows = db.execute(
            "SELECT digest FROM cells WHERE model = ? AND digest > ? ORDER BY digest LIMIT ?",
            (model, last, _EXPORT_ROWS),
        ).fetchall()
        if not rows:
            return
        digests = [digest for (digest,) in rows]
        last = digests[-1]
        for piece in pieces(look_up(db, model, digests), _EXPORT_BYTES):
            intact, values, _ = fetch(db, space, digests, piece)
            if len(intact):
                yield [digests[i] for i in intact["position"]], values


def check_is_store(db, path):
    """Raise an error if a file is not a store, or has another schema."""
    application_id = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application_id != _APPLICATION_ID:
        raise OSError(
            f"{path} is an SQLite file, but not an embedding store. Pass another path, or move "
            "the file away."
        )
    if version != _SCHEMA_VERSION:
        raise OSError(
            f"{path} is an embedding store of schema {version}, but this release of sklembed "
            f"reads schema {_SCHEMA_VERSION}. Pass another path, or move the file away."
        )


def check_is_not_directory(path):
    """Raise an error if a path is a directory, and suggest a file in it."""
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"The embedding store is one file, and {path} is a directory. Name a file in it: "
            f"store={os.fspath(path / 'embeddings.sqlite')!r}."
        )


def check_is_local(path):
    """Raise an error for a network file system, where SQLite's log does not work."""
    kind = _file_system(path)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise OSError(
            f"The embedding store {path} is on a network file system ({kind}), on which "
            "processes cannot share memory. Set the variable SKLEMBED_STORE or store=... to a "
            "path on a local disk, or pass store=None."
        )


def _file_system(path):
    """Return the type of the file system of a path, or None if it is unknown."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        return None
    real_path = os.path.realpath(path)
    kind, depth = None, 0
    for line in mounts.splitlines():
        _, mount, mount_kind, *_ = line.split(" ")
        if "\\" in mount:  # special characters are in octal, a space as \040
            mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount)
        folder = mount.rstrip("/") + "/"
        # The deepest mount point contains the path, and the last if there are several.
        if len(folder) >= depth and f"{real_path}/".startswith(folder):
            kind, depth = mount_kind, len(folder)
    return kind


@contextlib.contextmanager
def readable_errors(path):
    """Replace SQLite's errors by an OSError that names the file and a remedy."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: a damaged schema
        raise OSError(error_message(path, error)) from error


def is_full(path, error):
    """Return whether an error means that the disk has no space left."""
    if getattr(original(error), "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return True
    # Without space for a log or shared memory, SQLite raises other errors.
    return is_disk_error(error) and shutil.disk_usage(path.parent).free < _SPARE_BYTES


def check_spare_space(db, path, n_bytes):
    """Check that `n_bytes` bytes can be written and leave enough space for pruning.

    Raises
    ------
    OSError
        If there is not enough space.
    """
    if _has_spare_space(path, n_bytes):
        return
    # The log may occupy much of the space.
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if not _has_spare_space(path, n_bytes):
        raise OSError(
            errno.ENOSPC, "the disk is full, except for the space that pruning needs"
        )


def _has_spare_space(path, n_bytes):
    """Return whether the log can grow by `n_bytes`, and the file by the log."""
    log_bytes = _size(Path(f"{path}-wal"))
    n_needed = _SPARE_BYTES + 2 * (n_bytes + log_bytes)
    return shutil.disk_usage(path.parent).free >= n_needed


def is_disk_error(error):
    """Return whether the disk caused an error, and not the content of the file."""
    error = original(error)
    if isinstance(error, OSError):
        return error.errno is not None
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS


def original(error):
    """Return the error of the system or SQLite that caused a readable one."""
    if isinstance(error.__cause__, sqlite3.Error | OSError):
        return error.__cause__
    return error


def error_message(path, error):
    """Return a message with the file, the reason and a remedy."""
    if is_disk_error(error):
        advice = "Check the file and its directory"
    else:
        advice = "The file is damaged or not a store. Move it away to compute its vectors again"
    return (
        f"The embedding store {path} cannot be used: {error}. {advice}, pass another path "
        "(store=... or the variable SKLEMBED_STORE), or pass store=None."
    )
