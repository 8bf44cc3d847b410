"""The SQLite file of a store: its schema, how it is opened, read, written and pruned."""

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

_APPLICATION_ID = 0x534B4C45  # "SKLE", in the file's header
_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice, even after clear()
    fingerprint TEXT NOT NULL UNIQUE,  -- names everything that changes a vector
    description TEXT NOT NULL,         -- the same in JSON, for people
    n_features INTEGER NOT NULL,
    dtype TEXT NOT NULL,               -- of the stored numbers: float32 or float16
    ragged INTEGER NOT NULL,           -- 1: a value is (n_tokens, n_features)
    bytes INTEGER NOT NULL DEFAULT 0,    -- sum of its cells' sizes, so that a cap needs no scan
    encoded INTEGER NOT NULL DEFAULT 0,  -- values ever computed
    served INTEGER NOT NULL DEFAULT 0    -- values ever read back
);
-- Small rows apart from the vectors: looking up and marking as used touch no vector's page.
CREATE TABLE cells (
    model INTEGER NOT NULL REFERENCES models (id),
    digest BLOB NOT NULL,       -- of the cell's content; the cell itself is not kept
    id INTEGER NOT NULL,        -- of its row in vectors
    checksum INTEGER NOT NULL,  -- CRC-32 of digest and vector: SQLite has none for its pages
    size INTEGER NOT NULL,      -- bytes of the vector
    used INTEGER NOT NULL,      -- hour of last use, since 1970
    PRIMARY KEY (model, digest)
) WITHOUT ROWID;
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice: a reader may hold an old one
    vector BLOB NOT NULL  -- little-endian
);
CREATE TABLE claims (  -- cells that some process is encoding now
    model INTEGER NOT NULL,
    digest BLOB NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (model, digest)
) WITHOUT ROWID;
"""
_PAGE_SIZE = 32768  # vectors of 1.5 to 6 kB fill a page of 4096 badly
DIGEST_SIZE = 16
_LOOKUP_ROWS = 8192  # cells to a query, and to a transaction of bookkeeping
_EXPORT_ROWS = 131072
_EXPORT_BYTES = 1 << 24  # row groups of a useful size
_PATIENCE_SECONDS = 60.0  # for another process's transaction
_BOOKKEEPING_PATIENCE_SECONDS = (
    0.05  # a warm read takes less; counts are not worth a wait
)
_SPARE_BYTES = (
    1 << 20
)  # of disk left free, beside the log, so that a full store can be pruned

_REFUSED = {  # what a full, failing, busy or write-protected disk answers
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
# The processes that share a write-ahead log share memory, which they cannot across machines.
_NETWORK_FILE_SYSTEMS = {
    *(
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fhgfs",
        "glusterfs",
        "gpfs",
    ),
    *(
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
    ),
    *(
        "fuse.beegfs",
        "fuse.ceph",
        "fuse.davfs2",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.juicefs",
    ),
    *("fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
}
_MOUNTS = Path("/proc/self/mounts")


def default_path() -> Path:
    """Return where the default store lies: `SKLEMBED_STORE`, or the user's cache directory.

    A relative `SKLEMBED_STORE` is made absolute in the environment when it is first used, so that
    worker processes and later calls mean the same file, whatever the working directory is then.

    Raises
    ------
    OSError
        If the user has no home directory, and the variable names no path.
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
            f"There is no default embedding store: {error}. Let the variable SKLEMBED_STORE or "
            "store=... name a path, or pass store=None."
        ) from error


def absolute(path) -> str:
    """Make a path absolute, and refuse a name that can be no file.

    Raises
    ------
    ValueError
        If the path is an SQLite name for a store in memory, a URL, or names a folder.
    OSError
        If it lies in the home directory of a user who has none.
    """
    path = os.fsdecode(path)
    if path.endswith(("/", os.sep)) or not path:
        raise ValueError(
            f"store={path!r} names a directory, and the store is one file. Name a file in it: "
            f"store={os.path.join(path, 'embeddings.sqlite')!r}."
        )
    if path == ":memory:" or path.startswith("file:") or "://" in path:
        raise ValueError(
            f"store={path!r} is not the path of a file, which worker processes need to share. "
            "Give a path on a local disk, or store=None to keep nothing."
        )
    path = os.path.expanduser(path)
    if path.startswith(f"~{os.sep}"):
        raise OSError(
            f"store={path!r}: this user has no home directory. Give an absolute path."
        )
    return os.path.abspath(path)


@dataclass(frozen=True)
class Space:
    """What the vectors of one encoder share: how they are known, and their shape.

    Parameters
    ----------
    fingerprint : str
        Names everything that changes a vector, how it is kept included.

    description : dict
        The same for people, in JSON's types.

    n_features : int
        Width of a vector.

    dtype : {"float32", "float16"}, default="float32"
        How numbers are kept. They are given and returned as float32; those kept as float16 are
        rounded before they are returned for the first time.

    ragged : bool, default=False
        Whether a value is of shape (n_tokens, n_features) instead of (n_features,).
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
        """What a model is called: its fingerprint, and its name where it has one."""
        names = (self.description.get(key) for key in ("label", "name"))
        return [self.fingerprint, *(name for name in names if name is not None)]

    @property
    def _kept_dtype(self):
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def _vector_bytes(self):
        return self.n_features * self._kept_dtype.itemsize

    def pack(self, values, count):
        """Return the bytes of `count` values to keep, and the values that reading will return."""
        if len(values) != count:
            raise ValueError(
                f"{count} cells were encoded, but {len(values)} values came of it."
            )
        blocks = [self._round(block) for block in (values if self.ragged else [values])]
        blobs = [row.tobytes() for row in (blocks if self.ragged else blocks[0])]
        back = [block.astype(np.float32) for block in blocks]
        return blobs, (back if self.ragged else back[0])

    def _round(self, block):
        """Bring a block of vectors to the numbers that are kept."""
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != self.n_features:
            raise ValueError(
                f"expected vectors of {self.n_features} features; got the shape {block.shape}."
            )
        with np.errstate(over="ignore"):  # refused below
            kept = np.ascontiguousarray(block, dtype=self._kept_dtype)
        if self.dtype == "float16" and (np.isinf(kept) & np.isfinite(block)).any():
            raise ValueError(
                "a value is beyond 65504, the largest that float16 holds. Scale the vectors, or "
                "keep them as float32."
            )
        return kept

    def unpack(self, blobs):
        """Turn bytes back into values, by one conversion for all of them."""
        flat = np.frombuffer(bytearray().join(blobs), dtype=self._kept_dtype)
        flat = flat.astype(np.float32, copy=False).reshape(-1, self.n_features)
        if not self.ragged:
            return flat
        ends = np.cumsum([len(blob) for blob in blobs]) // self._vector_bytes
        return np.split(flat, ends[:-1])

    def fits(self, size):
        """Tell whether so many bytes can be a value."""
        return (
            size % self._vector_bytes == 0
            if self.ragged
            else size == self._vector_bytes
        )


def create(path):
    """Make the file, complete and private, under another name, and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if _size(path):
            return
        draft = Path(f"{path}.draft")
        draft.unlink(missing_ok=True)  # of a process that died here
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
            db.execute(
                "PRAGMA auto_vacuum = INCREMENTAL"
            )  # so that pruning shrinks the file
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute("PRAGMA journal_mode = WAL")
        draft.rename(path)


def is_made(path):
    """Tell whether there is a store; an empty file, as `tempfile` makes it, is none yet."""
    return _size(path) > 0


def _size(file):
    """Ask once for a file's bytes, 0 if there is none: another process may remove it meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def connect(path, *, read_only=False):
    """Open an existing store; for reading only where it cannot be written, or must not be.

    Raises
    ------
    sqlite3.Error
        If it cannot be opened.
    """
    ways = ["mode=ro"] if read_only else ["mode=rw", "mode=ro"]
    log = Path(f"{path}-wal")
    if read_only and not log.exists():
        ways = ["mode=ro&immutable=1"]  # else SQLite would make a log and shared memory
    elif not _size(log):
        # In a directory where SQLite cannot make its shared memory. Should someone who can write
        # there do so meanwhile, a torn page is caught by structure or checksum.
        ways.append("mode=ro&immutable=1")
    for way in ways:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?{way}",
            uri=True,
            timeout=_PATIENCE_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # generators and their clean-up may end in another thread
        )
        try:
            # Kill -9 loses nothing; a power cut may lose what was not yet checkpointed.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA application_id").fetchone()  # opens the file and its log
        except BaseException as error:
            db.close()
            if way == ways[-1] or not is_refused(error):
                raise
        else:
            return db


@contextlib.contextmanager
def connect_in_place(path):
    """Open a store without a log, for a disk so full that there is no space for one.

    Until the connection is closed, nobody else can use the store.
    """
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_PATIENCE_SECONDS,
        isolation_level=None,
    )
    try:
        db.execute(
            "PRAGMA locking_mode = EXCLUSIVE"
        )  # needs no shared memory, which is a file
        db.execute("PRAGMA journal_mode = MEMORY").fetchone()
        yield db
        db.execute("PRAGMA journal_mode = WAL").fetchone()
    finally:
        db.close()


@contextlib.contextmanager
def transaction(db):
    """Do all of a piece of work or none, as the only one that writes."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite may have rolled back by itself
            db.execute("ROLLBACK")
        raise


def model_id(db, space):
    """Find a space's row; None if there is none."""
    row = db.execute(
        "SELECT id, n_features, dtype, ragged FROM models WHERE fingerprint = ?",
        (space.fingerprint,),
    ).fetchone()
    if row is None:
        return None
    number, *kept = row
    asked = [space.n_features, space.dtype, int(space.ragged)]
    if kept != asked:
        raise OSError(
            f"The embedding store keeps {space.fingerprint} as (n_features, dtype, ragged) = "
            f"{kept}, but was asked for {asked}. A fingerprint must tell these apart; if it does, "
            "the file is damaged: move it away."
        )
    return number


def enter_model(db, space):
    """Find a space's row, and make it if there is none; `clear` may have deleted it."""
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


def spaces(db, model):
    """Map the numbers of the models that a fingerprint or name means to their spaces."""
    spaces = {}
    for number, fingerprint, description, n_features, dtype, ragged in db.execute(
        "SELECT id, fingerprint, description, n_features, dtype, ragged FROM models"
    ).fetchall():
        spaces[number] = Space(
            fingerprint, json.loads(description), n_features, dtype, bool(ragged)
        )
    matching = {
        number: space
        for number, space in spaces.items()
        if model in (None, *space.names)
    }
    if model is not None and not matching:
        known = sorted({space.names[-1] for space in spaces.values()})
        raise ValueError(
            f"The store has no vectors of {model!r}; it has those of {known}."
        )
    return matching


def find(db, table, model, digests, columns=()):
    """Return the positions of the digests that a table has, and integer columns of their rows.

    The digests travel as one value that SQL takes apart, which spares a parameter for each.
    """
    kinds = np.dtype([(name, np.int64) for name in ("position", *columns)])
    joined = b"".join(digests)
    if len(joined) != DIGEST_SIZE * len(digests):
        raise ValueError(f"digests must be of {DIGEST_SIZE} bytes each.")
    keys = np.frombuffer(joined, dtype=f"V{DIGEST_SIZE}")
    # In the tree's order, or nearly, so that neighbours share its pages.
    order = np.argsort(keys.view(">u8")[::2].astype(np.uint64))
    # A damaged row may hold anything; what is not a whole number matches no vector.
    selected = "".join(f", IFNULL(CAST({name} AS INTEGER), 0)" for name in columns)
    query = (
        "WITH RECURSIVE place (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM place WHERE i < :last) "
        f"SELECT i{selected} FROM place CROSS JOIN {table} "
        f"ON model = :model AND digest = SUBSTR(:keys, {DIGEST_SIZE} * i + 1, {DIGEST_SIZE})"
    )
    found = [np.empty(0, dtype=kinds)]
    for start in range(0, len(order), _LOOKUP_ROWS):
        part = order[start : start + _LOOKUP_ROWS]
        rows = db.execute(
            query, {"last": len(part) - 1, "model": model, "keys": keys[part].tobytes()}
        ).fetchall()
        numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        found.append(numbers.view(kinds))
        found[-1]["position"] = part[found[-1]["position"]]
    return np.concatenate(found)


def look_up(db, model, digests):
    """Return what is known of the cells that the store has, in the order of their vectors."""
    cells = find(db, "cells", model, digests, ("id", "checksum", "size", "used"))
    return cells[np.argsort(cells["id"])]


def pieces(cells, max_bytes):
    """Cut cells into pieces of about so many bytes of vectors."""
    cuts = np.flatnonzero(np.diff(np.cumsum(cells["size"]) // max_bytes)) + 1
    return np.split(cells, cuts) if len(cells) else []


def fetch(db, space, digests, cells):
    """Read vectors; return the cells whose vector is sound, their values, and the other cells."""
    ids = cells["id"].tolist()
    query = "SELECT vectors.id, CAST(vector AS BLOB) FROM "
    if ids[-1] - ids[0] < 2 * len(ids):  # mostly neighbours: reading on beats seeking
        rows = db.execute(query + "vectors WHERE id BETWEEN ? AND ?", (ids[0], ids[-1]))
    else:
        chosen = "json_each(?) CROSS JOIN vectors ON vectors.id = value"
        rows = db.execute(query + chosen, (json.dumps(ids),))
    found = dict(rows.fetchall())
    blobs = [found.get(i) or b"" for i in ids]
    sizes = np.fromiter(map(len, blobs), np.int64, len(blobs))
    # The digest asked for is part of it: in a damaged tree a lookup may end at a neighbour's row.
    asked = map(digests.__getitem__, cells["position"].tolist())
    checksums = np.fromiter(map(crc32, blobs, map(crc32, asked)), np.int64, len(blobs))
    sound = (
        (sizes == cells["size"]) & (checksums == cells["checksum"]) & space.fits(sizes)
    )
    if sound.all():
        return cells, space.unpack(blobs), cells[:0]
    blobs = list(itertools.compress(blobs, sound))
    return cells[sound], space.unpack(blobs) if blobs else [], cells[~sound]


def insert(db, model, digests, blobs):
    """Keep vectors of cells; what is there already stays."""
    there = set(find(db, "cells", model, digests)["position"].tolist())
    fresh = [i for i in range(len(digests)) if i not in there]
    first = _next_vector(db)
    db.executemany(
        "INSERT INTO vectors (id, vector) VALUES (?, ?)",
        [(first + n, blobs[i]) for n, i in enumerate(fresh)],
    )
    hour = _hour()
    db.executemany(
        "INSERT INTO cells (model, digest, id, checksum, size, used) VALUES (?, ?, ?, ?, ?, ?)",
        sorted(  # in the tree's order
            (
                model,
                digests[i],
                first + n,
                crc32(blobs[i], crc32(digests[i])),
                len(blobs[i]),
                hour,
            )
            for n, i in enumerate(fresh)
        ),
    )
    db.execute(
        "UPDATE models SET encoded = encoded + ?, bytes = bytes + ? WHERE id = ?",
        (len(digests), sum(len(blobs[i]) for i in fresh), model),
    )


def _next_vector(db):
    """Return the first number that no vector has ever had."""
    row = db.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = 'vectors'"
    ).fetchone()
    return 1 if row is None else row[0] + 1


def note_use(db, model, digests, cells, served):
    """Count what was served and note its hour; reading goes on where that cannot be written."""
    if not served:
        return
    hour = _hour()
    old = sorted(digests[i] for i in cells["position"][cells["used"] < hour])
    db.execute(f"PRAGMA busy_timeout = {int(_BOOKKEEPING_PATIENCE_SECONDS * 1000)}")
    with contextlib.suppress(sqlite3.OperationalError):
        for start in range(0, len(old), _LOOKUP_ROWS):
            with transaction(db):
                db.executemany(
                    "UPDATE cells SET used = ? WHERE model = ? AND digest = ?",
                    [
                        (hour, model, digest)
                        for digest in old[start : start + _LOOKUP_ROWS]
                    ],
                )
        db.execute(
            "UPDATE models SET served = served + ? WHERE id = ?", (served, model)
        )


def _hour():
    """Return the hour since 1970: recency so coarse that warm reads hardly ever write."""
    return int(time.time() // 3600)


def bytes_held(db):
    """Count the bytes of vectors, of all models together."""
    return db.execute("SELECT TOTAL(bytes) FROM models").fetchone()[0]


def prune(db, max_bytes):
    """Drop the least recently used vectors, in transactions that keep nobody waiting for long."""
    doomed = _least_recently_used(db, bytes_held(db) - max_bytes)
    n_dropped = 0
    for start in range(0, len(doomed), _LOOKUP_ROWS):
        with transaction(db):
            numbers = drop(db, doomed[start : start + _LOOKUP_ROWS])
            db.executemany(
                "DELETE FROM vectors WHERE id = ?", [(n,) for n in sorted(numbers)]
            )
        n_dropped += len(numbers)
    if n_dropped:
        shrink(db)
    return n_dropped


def _least_recently_used(db, n_bytes):
    """List the cells to drop so that so many bytes are freed."""
    cells = []
    with contextlib.closing(
        db.execute("SELECT model, digest, id, size FROM cells ORDER BY used, id")
    ) as rows:
        while n_bytes > 0 and (row := rows.fetchone()) is not None:
            cells.append(row)
            n_bytes -= row[-1]
    return cells


def drop(db, cells):
    """Delete cells, given as (model, digest, id, size); return the ids of those still there."""
    numbers = []
    for model, digest, number, size in cells:
        if db.execute(
            "DELETE FROM cells WHERE model = ? AND digest = ? AND id = ?",
            (model, digest, number),
        ).rowcount:
            db.execute(
                "UPDATE models SET bytes = bytes - ? WHERE id = ?", (size, model)
            )
            numbers.append(number)
    return numbers


def clear(db, model=None):
    """Delete the vectors of all models, or of those that a fingerprint or name means."""
    numbers = [] if model is None else spaces(db, model)
    with transaction(db):
        if model is None:
            for table in ("claims", "cells", "vectors", "models"):
                db.execute(f"DELETE FROM {table}")
        for number in numbers:
            delete_model(db, number)
    shrink(db)


def delete_model(db, model):
    """Delete a model's row, and all that belongs to it."""
    db.execute(
        "DELETE FROM vectors WHERE id IN (SELECT id FROM cells WHERE model = ?)",
        (model,),
    )
    for table, column in (("cells", "model"), ("claims", "model"), ("models", "id")):
        db.execute(f"DELETE FROM {table} WHERE {column} = ?", (model,))


def shrink(db):
    """Give free pages back to the file system."""
    db.executescript(
        "PRAGMA incremental_vacuum"
    )  # execute() would stop after the first page
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def everything(db, model, space):
    """Yield all digests and values of a model, in pieces; skip what is damaged."""
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
            sound, values, _ = fetch(db, space, digests, piece)
            if len(sound):
                yield [digests[i] for i in sound["position"]], values


def check_is_store(db, path):
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


def check_is_no_directory(path):
    """Refuse a directory, and say how to name a file in it."""
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"The embedding store is one file, and {path} is a directory. Name a file in it: "
            f"store={os.fspath(path / 'embeddings.sqlite')!r}."
        )


def check_is_local(path):
    """Refuse a path on a network file system, where SQLite's log would break."""
    kind = _file_system(path)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise OSError(
            f"The embedding store {path} lies on a network file system ({kind}), on which its "
            "processes cannot share memory. Let the variable SKLEMBED_STORE or store=... name a "
            "path on a local disk, or pass store=None."
        )


def _file_system(path):
    """Return the type of the file system that holds a path; None where the system does not say."""
    try:
        mounts = _MOUNTS.read_text(errors="surrogateescape")
    except OSError:  # not Linux
        return None
    place = Path(os.path.realpath(path))
    kind, depth = None, 0
    for line in mounts.splitlines():
        _, mount, mounted, *_ = line.split(" ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount))
        # The deepest mount point holds the path, and of several there the last.
        if len(mount.parts) >= depth and place.is_relative_to(mount):
            kind, depth = mounted, len(mount.parts)
    return kind


@contextlib.contextmanager
def clear_errors(path):
    """Let SQLite's errors say which file, and what to do."""
    try:
        yield
    except (
        sqlite3.Error,
        UnicodeDecodeError,
    ) as error:  # the latter from a damaged schema
        raise OSError(trouble(path, error)) from error


def is_full(path, error):
    """Tell whether a piece of work was refused because the disk has no space left."""
    if getattr(origin(error), "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return True
    # Where there is no space for a log or shared memory, SQLite has other words for it.
    return is_refused(error) and shutil.disk_usage(path.parent).free < _SPARE_BYTES


def check_spare_space(db, path, n_bytes):
    """Refuse to fill the disk to the last byte, which would leave no space to prune with.

    Raises
    ------
    OSError
        If there is not enough space.
    """
    if _has_spare_space(path, n_bytes):
        return
    db.execute(
        "PRAGMA wal_checkpoint(TRUNCATE)"
    ).fetchone()  # the log may hold much of it
    if not _has_spare_space(path, n_bytes):
        raise OSError(
            errno.ENOSPC, "the disk is full, but for the space that pruning needs"
        )


def _has_spare_space(path, n_bytes):
    """Tell whether the log can grow by so many bytes, and the file by the whole log."""
    log_bytes = _size(Path(f"{path}-wal"))
    return shutil.disk_usage(path.parent).free >= _SPARE_BYTES + 2 * (
        n_bytes + log_bytes
    )


def is_refused(error):
    """Tell whether the disk refused a piece of work, and not the file's content."""
    error = origin(error)
    if isinstance(error, OSError):
        return error.errno is not None
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED


def origin(error):
    """Return the system's or SQLite's error that a clear one stands for."""
    return (
        error.__cause__
        if isinstance(error.__cause__, sqlite3.Error | OSError)
        else error
    )


def trouble(path, error):
    """Say which file cannot be used, why, and what to do."""
    if is_refused(error):
        advice = "Check the file and its directory"
    else:
        advice = "It is damaged, or no store. Move it away, and vectors will be computed anew"
    return (
        f"The embedding store {path} cannot be used: {error}. {advice}, give another path "
        "(store=... or the variable SKLEMBED_STORE), or pass store=None."
    )
