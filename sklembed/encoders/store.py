"""EmbeddingStore: one SQLite file that keeps every vector ever encoded, for every process."""

import contextlib
import itertools
import json
import os
import re
import sqlite3
import threading
import time
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
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
_DIGEST_SIZE = 16
_LOOKUP_ROWS = 8192  # cells to a query, and to a transaction of bookkeeping
_EXPORT_ROWS = 131072
_WRITE_CACHE_KIB = 65536  # holds the tree of a million cells: digests come in random order
# Joining and checking small pieces stays within the processor's caches: pieces of 1.5 MB took
# half as long again.
_READ_BYTES = 3 << 17
_EXPORT_BYTES = 1 << 24  # row groups of a useful size
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 60.0  # for another process's transaction
_BOOKKEEPING_PATIENCE_SECONDS = 5.0  # counts and recency are not worth a longer wait
_PRUNE_TO = 0.9  # of the cap, so that pruning is rare

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
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fhgfs", "glusterfs", "gpfs"),
    *("lustre", "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs"),
    *("fuse.beegfs", "fuse.ceph", "fuse.davfs2", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs"),
    *("fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
}
_MOUNTS = Path("/proc/self/mounts")


def default_path() -> Path:
    """Return where the default store lies: `SKLEMBED_STORE`, or the user's cache directory."""
    from_environment = os.environ.get("SKLEMBED_STORE")
    if from_environment:
        return Path(from_environment).expanduser()
    return user_cache_path("sklembed", appauthor=False) / "embeddings.sqlite"


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
            raise ValueError(f"dtype must be 'float32' or 'float16'; got {self.dtype!r}.")

    @property
    def _kept_dtype(self):
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def _vector_bytes(self):
        return self.n_features * self._kept_dtype.itemsize

    def _pack(self, values, count):
        """Return the bytes of `count` values to keep, and the values that reading will return."""
        if len(values) != count:
            raise ValueError(f"{count} cells were encoded, but {len(values)} values came of it.")
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

    def _unpack(self, blobs):
        """Turn bytes back into values, by one conversion for all of them."""
        flat = np.frombuffer(bytearray().join(blobs), dtype=self._kept_dtype)
        flat = flat.astype(np.float32, copy=False).reshape(-1, self.n_features)
        if not self.ragged:
            return flat
        ends = np.cumsum([len(blob) for blob in blobs]) // self._vector_bytes
        return np.split(flat, ends[:-1])

    def _fits(self, size):
        """Tell whether so many bytes can be a value."""
        return size % self._vector_bytes == 0 if self.ragged else size == self._vector_bytes


class EmbeddingStore:
    """Keep vectors in one SQLite file, by what was encoded and which model did it.

    The key of a vector is the digest of the cell's content and the fingerprint of the model, so
    folds, candidates, clones, processes, runs and projects share what any of them has computed.
    The file holds no raw inputs, is readable by its owner only, and can be opened with any SQLite
    client. Many processes may read and write at once. Cells that one process is encoding are
    claimed, so that another waits for them instead of encoding them again; claims of a process
    that died are void.

    What was put is safe from any end of the process; a power cut may undo the last batches, never
    the file. A vector is returned only if its checksum is right: one that the disk has damaged
    counts as lacking. Where a store can be read but not written, because of permissions or a full
    disk, encoding goes on without keeping, with a warning.

    Parameters
    ----------
    path : str, path or None, default=None
        The file; by default the one that the environment variable ``SKLEMBED_STORE`` names, else
        ``embeddings.sqlite`` in the user's cache directory for sklembed. It is made on first use,
        and must lie on a local disk.

    max_bytes : int or None, default=None
        The most bytes of vectors to keep, all models together. When encoding exceeds it, the
        least recently used ones go until a tenth is free; see `prune`.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import EmbeddingStore
    >>> store = EmbeddingStore(tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> store.stats()
    Empty DataFrame
    Columns: [model, n_features, rows, bytes, encoded, served, hit_rate]
    Index: []
    """

    def __init__(self, path=None, *, max_bytes=None):
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be above 0, or None for no cap; got {max_bytes!r}. To keep "
                "nothing, give the encoder store=None."
            )
        self.path = path
        self.max_bytes = max_bytes

    def __repr__(self):
        cap = "" if self.max_bytes is None else f", max_bytes={self.max_bytes}"
        return f"EmbeddingStore({os.fspath(self._path())!r}{cap})"

    def read(self, space, digests):
        """Yield what the store has, in pieces of bounded size.

        Parameters
        ----------
        space : Space
            The encoder's space.

        digests : list of bytes
            Digests of the cells, 16 bytes each.

        Yields
        ------
        positions : ndarray of shape (n_found,), dtype int
            Positions in `digests`, in the order in which the vectors lie on the disk.

        values : ndarray of shape (n_found, n_features), dtype float32, or list of ndarray
            Their vectors; for a ragged space a list of arrays of shape (n_tokens, n_features).
        """
        with self._connection() as db:
            model = _model_id(db, space)
            if model is None:
                return
            cells = _look_up(db, model, digests)
            served, damaged = 0, []
            try:
                for piece in _pieces(cells, _READ_BYTES):
                    sound, values, unsound = _fetch(db, space, digests, piece)
                    damaged.extend(unsound)
                    if len(sound):
                        served += len(sound)
                        yield sound["position"], values
            finally:
                _note_use(db, model, digests, cells, served)
            if damaged:
                self._disown(db, model, digests, damaged)

    def lacks(self, space, digests):
        """Tell which cells the store has no vector of, without reading vectors.

        Parameters
        ----------
        space : Space
            The encoder's space.

        digests : list of bytes
            Digests of the cells, 16 bytes each.

        Returns
        -------
        lacking : ndarray of shape (n_digests,), dtype bool
            Whether each is lacking. That a vector is damaged is noticed only when it is read.
        """
        lacking = np.ones(len(digests), dtype=bool)
        with self._connection() as db:
            model = _model_id(db, space)
            if model is not None:
                lacking[_find(db, "cells", model, digests)["position"]] = False
        return lacking

    def fill(self, space, digests, *, encode, claim_size):
        """Encode cells that the store lacks, wait for those that others encode, and yield all.

        However many processes and threads ask for the same cells at once, each is encoded by one
        of them. Values are on disk batch by batch before they are yielded, so that an interrupted
        run resumes.

        Parameters
        ----------
        space : Space
            The encoder's space.

        digests : list of bytes
            Digests of the cells, 16 bytes each, without repeats, in the order in which to encode.

        encode : callable
            A generator function. It takes an iterator of lists of positions in `digests`, which
            claims the cells of each list as it is advanced; it may look ahead, also in another
            thread. For every batch it yields the positions dealt with, those of them that could
            be encoded, and their values. It is called again for cells that others had claimed and
            let go, and never without any cell.

        claim_size : int
            The most positions to a list.

        Yields
        ------
        positions : ndarray of shape (n_done,), dtype int
            Positions in `digests`.

        values : ndarray of shape (n_done, n_features), dtype float32, or list of ndarray
            Their vectors, as `read` would return them. Every cell is yielded once, except those
            that could not be encoded.
        """
        if len(set(digests)) < len(digests):
            raise ValueError("digests must be without repeats: each distinct cell is encoded once.")
        session = _Session(self, space, digests)
        try:
            yield from session.run(encode, claim_size)
        finally:
            session.end()

    def stats(self):
        """Count what the store holds and has done, for each model.

        Returns
        -------
        stats : DataFrame
            A row for each fingerprint: the model's description, `n_features`, `rows` and `bytes`
            of vectors held, how many values were ever `encoded` into the store and `served` from
            it, and the `hit_rate`, the part of both that was served. `encoded` above `rows` means
            that vectors were encoded again, or have been pruned or replaced since.
        """
        with self._connection() as db:
            rows = db.execute(
                "SELECT fingerprint, description, n_features, "
                "(SELECT COUNT(*) FROM cells WHERE model = models.id), bytes, encoded, served "
                "FROM models"
            ).fetchall()
        columns = ["fingerprint", "model", "n_features", "rows", "bytes", "encoded", "served"]
        stats = pd.DataFrame(rows, columns=columns).set_index("fingerprint")
        return stats.assign(hit_rate=stats["served"] / (stats["served"] + stats["encoded"]))

    def clear(self, model=None):
        """Delete vectors and counts, of all models or of one; the file shrinks accordingly.

        Parameters
        ----------
        model : str or None, default=None
            A fingerprint, or the name in a model's description ("label" or "name"): then all
            versions and settings of that model go. None deletes everything.

        Raises
        ------
        ValueError
            If the store has no such model.
        """
        with self._connection() as db:
            spaces = {} if model is None else _spaces(db, model)
            with _transaction(db):
                if model is None:
                    for table in ("claims", "cells", "vectors", "models"):
                        db.execute(f"DELETE FROM {table}")
                for number in spaces:
                    _delete_model(db, number)
            _shrink(db)

    def prune(self, max_bytes):
        """Drop the least recently used vectors until at most so many bytes of vectors are left.

        What counts are the vectors as they are kept, without keys and SQLite's own structures;
        these add some 5 % for 384 numbers of float32. Recency is known to the hour; within an
        hour, what was stored first goes first. The file shrinks.

        Parameters
        ----------
        max_bytes : int
            Bytes of vectors to keep at most, all models together.

        Returns
        -------
        n_dropped : int
            How many vectors were dropped.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative; got {max_bytes!r}.")
        with self._connection() as db:
            return _prune(db, max_bytes)

    def export(self, path, model=None):
        """Write vectors to a file that other programs read, piece by piece.

        A ``.parquet`` file (it needs pyarrow) has the columns ``fingerprint``, ``digest`` (hex),
        ``vector`` (a list of float32) and ``n_tokens``; where that is not null, the vector is
        n_tokens rows of the model's width, one after another. A ``.npy`` file is a float32 array
        with a row for each vector of one model; the digests lie beside it, in
        ``<stem>.digests.npy``, as a uint8 array of shape (n_rows, 16).

        Parameters
        ----------
        path : str or path
            The file, ending in ".parquet" or ".npy". An existing one is overwritten.

        model : str or None, default=None
            A fingerprint, or the name in a model's description, as in `clear`; None exports
            everything.

        Returns
        -------
        n_rows : int
            How many vectors were written.

        Raises
        ------
        ValueError
            If the store has no such model, or a ".npy" file would have to hold several models or
            ragged values.
        """
        path = Path(path)
        writers = {".parquet": _write_parquet, ".npy": _write_npy}
        if path.suffix not in writers:
            raise ValueError(f"path must end in .parquet or .npy; got {os.fspath(path)!r}.")
        with self._connection() as db:
            return writers[path.suffix](path, db, _spaces(db, model))

    def _path(self):
        return default_path() if self.path is None else Path(self.path).expanduser()

    @contextlib.contextmanager
    def _connection(self):
        """Connect for one piece of work."""
        path = self._ready_path()
        with _clear_errors(path), contextlib.closing(_connect(path)) as db:
            _check_is_store(db, path)
            yield db

    def _ready_path(self):
        """Return the path of the store, which is made if there is none."""
        path = self._path()
        _check_is_local(path)
        try:
            if not path.exists():
                _create(path)
        except (OSError, sqlite3.Error) as error:
            raise OSError(_trouble(path, error)) from error
        return path

    def _disown(self, db, model, digests, damaged):
        """Forget damaged vectors, so that they are encoded anew, and warn of them.

        Their rows in `vectors` stay: if it is the row's number that is damaged, it names another
        cell's vector.
        """
        cells = [
            (model, digests[cell["position"]], int(cell["id"]), int(cell["size"]))
            for cell in damaged
        ]
        lost = len(cells)
        with contextlib.suppress(sqlite3.OperationalError), _transaction(db):
            lost = len(_drop(db, cells))
        if lost:  # none if another process has pruned them since they were looked up
            warnings.warn(
                f"{lost} vectors in the embedding store {self._path()} are damaged and count as "
                "lacking. Check the disk.",
                UserWarning,
                stacklevel=3,
            )


class _Session:
    """One caller's run of encoding, known to others by the claims it holds.

    It keeps one connection, which spares a cold encode the opening and the checkpoint of every
    batch; a lock guards it, as claims may be made in the thread that prepares batches.
    """

    def __init__(self, store, space, digests):
        self._store = store
        self._space = space
        self._digests = digests
        self._owner = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._ended = False
        self._path = store._ready_path()
        with store._connection():
            pass  # a foreign or damaged file is an error, and nothing to fall back from
        self._keeps = True
        self._db = self._life = None

    def run(self, encode, claim_size):
        """Yield the values of all digests, encoded here or by others."""
        self._attempt(self._begin)
        waiting = np.arange(len(self._digests))
        while len(waiting):
            waiting = yield from self._read(waiting)
            held = yield from self._encode(waiting, encode, claim_size)
            if held and len(held) == len(waiting):
                self._attempt(self._wait)
            waiting = np.asarray(held, dtype=np.intp)

    def end(self):
        """Let go of all claims."""
        with self._lock:
            self._ended = True
            self._let_go()

    def _read(self, positions):
        """Yield what is there by now; return the positions of the rest."""
        lacking = np.ones(len(positions), dtype=bool)
        digests = [self._digests[i] for i in positions]
        for found, values in self._store.read(self._space, digests):
            lacking[found] = False
            yield positions[found], values
        return positions[lacking]

    def _encode(self, positions, encode, claim_size):
        """Encode what is free of these cells; return the positions that others hold."""
        held = []
        claims = self._claim_lazily(positions, claim_size, held)
        first = next(claims, None)
        if first is None:
            return held
        with contextlib.closing(encode(itertools.chain([first], claims))) as batches:
            for batch, done, values in batches:
                values = self._put(batch, done, values)
                if len(done):
                    yield np.asarray(done), values
        return held

    def _claim_lazily(self, positions, claim_size, held):
        """Yield lists of cells claimed just now, and note the positions that others hold."""
        for start in range(0, len(positions), claim_size):
            wanted = positions[start : start + claim_size].tolist()
            free = self._claim([self._digests[i] for i in wanted])
            mine = [i for i, is_free in zip(wanted, free, strict=True) if is_free]
            held += [i for i, is_free in zip(wanted, free, strict=True) if not is_free]
            if mine:
                yield mine

    def _claim(self, digests):
        """Claim the cells that nobody has encoded or is encoding; return whether each was free."""
        free = np.ones(len(digests), dtype=bool)

        def claim(db):
            with _transaction(db):
                model = _enter_model(db, self._space)
                for table in ("cells", "claims"):
                    free[_find(db, table, model, digests)["position"]] = False
                db.executemany(
                    "INSERT INTO claims (model, digest, owner) VALUES (?, ?, ?)",
                    sorted((model, digests[i], self._owner) for i in np.flatnonzero(free)),
                )

        with self._lock:
            if self._ended:  # a thread that prepares batches has outlived the session
                return np.zeros(len(digests), dtype=bool)
            self._attempt(claim)
        return free if self._keeps else np.ones(len(digests), dtype=bool)

    def _put(self, batch, done, values):
        """Keep values, on disk when this returns, and let go of the claims on a batch's cells.

        A cell that could not be encoded is let go with its batch: another session that wants it
        must not wait for this one, which may be waiting for that.
        """
        blobs = []
        if len(done):
            blobs, values = self._space._pack(values, len(done))

        def put(db):
            with _transaction(db):
                model = _enter_model(db, self._space)
                _insert(db, model, [self._digests[i] for i in done], blobs)
                db.executemany(
                    "DELETE FROM claims WHERE owner = ? AND model = ? AND digest = ?",
                    sorted((self._owner, model, self._digests[i]) for i in batch),
                )
            cap = self._store.max_bytes
            if cap is not None and _bytes_held(db) > cap:
                _prune(db, int(cap * _PRUNE_TO))

        self._attempt(put)
        return values

    def _attempt(self, work):
        """Do a piece of work on the store, or, where the disk refuses it, keep nothing any more."""
        with self._lock:
            if not self._keeps:
                return
            try:
                with _clear_errors(self._path):
                    work(self._db)
            except OSError as error:
                if not _is_refused(error):
                    raise
                self._keeps = False
                self._let_go()
                warnings.warn(
                    f"The embedding store {self._path} cannot be written ({_origin(error)}): what "
                    "is encoded from here on is returned, but not kept. Free the disk or its "
                    "permissions, or give another path.",
                    UserWarning,
                    stacklevel=2,
                )

    def _begin(self, _):
        """Connect, and show a sign of life, before there is any claim to it."""
        self._db = _connect(self._path)
        self._db.execute(f"PRAGMA cache_size = {-_WRITE_CACHE_KIB}")
        self._life = FileLock(self._life_sign(self._owner))
        self._life.acquire()
        self._bury_the_dead(self._db)

    def _let_go(self):
        """End all claims: at once where the file can be written, else by the sign of life."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
            self._db.close()
        if self._life is not None:
            with contextlib.suppress(OSError):
                Path(self._life.lock_file).unlink(missing_ok=True)
            self._life.release()
        self._db = self._life = None

    def _wait(self, db):
        """Give other sessions a moment, and void the claims of those that died."""
        time.sleep(_POLL_SECONDS)
        self._bury_the_dead(db)

    def _bury_the_dead(self, db):
        """Void the claims of sessions that died."""
        owners = {owner for (owner,) in db.execute("SELECT DISTINCT owner FROM claims").fetchall()}
        owners |= {sign.name for sign in self._life_sign(self._owner).parent.iterdir()}
        for owner in owners - {self._owner}:
            if not re.fullmatch("[0-9a-f]{32}", str(owner)):  # damage; it names no file of ours
                db.execute("DELETE FROM claims WHERE owner IS ?", (owner,))
                continue
            lock = FileLock(self._life_sign(owner))
            # A living session keeps its sign locked; the system lets go when it dies.
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                Path(lock.lock_file).unlink(missing_ok=True)

    def _life_sign(self, owner):
        """Name the file that a living session keeps locked."""
        folder = Path(f"{self._path}.sessions")
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / owner


def _create(path):
    """Make the file, complete and private, under another name, and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        draft = Path(f"{path}.draft")
        draft.unlink(missing_ok=True)  # of a process that died here
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # so that pruning shrinks the file
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute("PRAGMA journal_mode = WAL")
        draft.rename(path)


def _connect(path):
    """Open an existing store; for reading only where it cannot be written."""
    ways = ["mode=rw", "mode=ro"]
    log = Path(f"{path}-wal")
    if not log.exists() or not log.stat().st_size:
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
            if way == ways[-1] or not _is_refused(error):
                raise
        else:
            return db


@contextlib.contextmanager
def _transaction(db):
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite may have rolled back by itself
            db.execute("ROLLBACK")
        raise


def _model_id(db, space):
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


def _enter_model(db, space):
    """Find a space's row, and make it if there is none; `clear` may have deleted it."""
    number = _model_id(db, space)
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


def _spaces(db, model):
    """Map the numbers of the models that a fingerprint or name means to their spaces."""
    spaces = {}
    for number, fingerprint, description, n_features, dtype, ragged in db.execute(
        "SELECT id, fingerprint, description, n_features, dtype, ragged FROM models"
    ).fetchall():
        spaces[number] = Space(
            fingerprint, json.loads(description), n_features, dtype, bool(ragged)
        )
    matching = {
        number: space for number, space in spaces.items() if model in (None, *_names(space))
    }
    if model is not None and not matching:
        known = sorted({_names(space)[-1] for space in spaces.values()})
        raise ValueError(f"The store has no vectors of {model!r}; it has those of {known}.")
    return matching


def _names(space):
    """List what a model is called: its fingerprint, and its name where it has one."""
    names = (space.description.get(key) for key in ("label", "name"))
    return [space.fingerprint, *(name for name in names if name is not None)]


def _find(db, table, model, digests, columns=()):
    """Return the positions of the digests that a table has, and integer columns of their rows.

    The digests travel as one value that SQL takes apart: a parameter for each took twice as long.
    """
    kinds = np.dtype([(name, np.int64) for name in ("position", *columns)])
    joined = b"".join(digests)
    if len(joined) != _DIGEST_SIZE * len(digests):
        raise ValueError(f"digests must be of {_DIGEST_SIZE} bytes each.")
    keys = np.frombuffer(joined, dtype=f"V{_DIGEST_SIZE}")
    # In the tree's order, or nearly, so that neighbours share its pages.
    order = np.argsort(keys.view(">u8")[::2].astype(np.uint64))
    # A damaged row may hold anything; what is not a whole number matches no vector.
    selected = "".join(f", IFNULL(CAST({name} AS INTEGER), 0)" for name in columns)
    query = (
        "WITH RECURSIVE place (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM place WHERE i < :last) "
        f"SELECT i{selected} FROM place CROSS JOIN {table} "
        f"ON model = :model AND digest = SUBSTR(:keys, {_DIGEST_SIZE} * i + 1, {_DIGEST_SIZE})"
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


def _look_up(db, model, digests):
    """Return what is known of the cells that the store has, in the order of their vectors."""
    cells = _find(db, "cells", model, digests, ("id", "checksum", "size", "used"))
    return cells[np.argsort(cells["id"])]


def _pieces(cells, max_bytes):
    """Cut cells into pieces of about so many bytes of vectors."""
    cuts = np.flatnonzero(np.diff(np.cumsum(cells["size"]) // max_bytes)) + 1
    return np.split(cells, cuts) if len(cells) else []


def _fetch(db, space, digests, cells):
    """Read vectors; return the cells whose vector is sound, their values, and the other cells."""
    blobs = [b""] * len(cells)
    for place, blob in db.execute(
        "SELECT key, CAST(vector AS BLOB) FROM json_each(?) "
        "CROSS JOIN vectors ON vectors.id = value",
        (json.dumps(cells["id"].tolist()),),
    ).fetchall():
        blobs[place] = blob or b""
    sizes = np.fromiter(map(len, blobs), np.int64, len(blobs))
    # The digest asked for is part of it: in a damaged tree a lookup may end at a neighbour's row.
    asked = map(digests.__getitem__, cells["position"].tolist())
    checksums = np.fromiter(map(crc32, blobs, map(crc32, asked)), np.int64, len(blobs))
    sound = (sizes == cells["size"]) & (checksums == cells["checksum"]) & space._fits(sizes)
    if sound.all():
        return cells, space._unpack(blobs), cells[:0]
    blobs = list(itertools.compress(blobs, sound))
    return cells[sound], space._unpack(blobs) if blobs else [], cells[~sound]


def _insert(db, model, digests, blobs):
    """Keep vectors of cells; what is there already stays."""
    there = set(_find(db, "cells", model, digests)["position"].tolist())
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
            (model, digests[i], first + n, crc32(blobs[i], crc32(digests[i])), len(blobs[i]), hour)
            for n, i in enumerate(fresh)
        ),
    )
    db.execute(
        "UPDATE models SET encoded = encoded + ?, bytes = bytes + ? WHERE id = ?",
        (len(digests), sum(len(blobs[i]) for i in fresh), model),
    )


def _next_vector(db):
    """Return the first number that no vector has ever had."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'vectors'").fetchone()
    return 1 if row is None else row[0] + 1


def _note_use(db, model, digests, cells, served):
    """Count what was served and note its hour; reading goes on where that cannot be written."""
    if not served:
        return
    hour = _hour()
    old = sorted(digests[i] for i in cells["position"][cells["used"] < hour])
    db.execute(f"PRAGMA busy_timeout = {int(_BOOKKEEPING_PATIENCE_SECONDS * 1000)}")
    with contextlib.suppress(sqlite3.OperationalError):
        for start in range(0, len(old), _LOOKUP_ROWS):
            with _transaction(db):
                db.executemany(
                    "UPDATE cells SET used = ? WHERE model = ? AND digest = ?",
                    [(hour, model, digest) for digest in old[start : start + _LOOKUP_ROWS]],
                )
        db.execute("UPDATE models SET served = served + ? WHERE id = ?", (served, model))


def _hour():
    """Return the hour since 1970: recency so coarse that warm reads hardly ever write."""
    return int(time.time() // 3600)


def _bytes_held(db):
    return db.execute("SELECT TOTAL(bytes) FROM models").fetchone()[0]


def _prune(db, max_bytes):
    """Drop the least recently used vectors, in transactions that keep nobody waiting for long."""
    doomed = _least_recently_used(db, _bytes_held(db) - max_bytes)
    n_dropped = 0
    for start in range(0, len(doomed), _LOOKUP_ROWS):
        with _transaction(db):
            numbers = _drop(db, doomed[start : start + _LOOKUP_ROWS])
            db.executemany("DELETE FROM vectors WHERE id = ?", [(n,) for n in sorted(numbers)])
        n_dropped += len(numbers)
    if n_dropped:
        _shrink(db)
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


def _drop(db, cells):
    """Delete cells, given as (model, digest, id, size); return the ids of those still there."""
    numbers = []
    for model, digest, number, size in cells:
        if db.execute(
            "DELETE FROM cells WHERE model = ? AND digest = ? AND id = ?", (model, digest, number)
        ).rowcount:
            db.execute("UPDATE models SET bytes = bytes - ? WHERE id = ?", (size, model))
            numbers.append(number)
    return numbers


def _delete_model(db, model):
    db.execute(
        "DELETE FROM vectors WHERE id IN (SELECT id FROM cells WHERE model = ?)",
        (model,),
    )
    for table, column in (("cells", "model"), ("claims", "model"), ("models", "id")):
        db.execute(f"DELETE FROM {table} WHERE {column} = ?", (model,))


def _shrink(db):
    """Give free pages back to the file system."""
    db.executescript("PRAGMA incremental_vacuum")  # execute() would stop after the first page
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _everything(db, model, space):
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
        for piece in _pieces(_look_up(db, model, digests), _EXPORT_BYTES):
            sound, values, _ = _fetch(db, space, digests, piece)
            if len(sound):
                yield [digests[i] for i in sound["position"]], values


def _write_parquet(path, db, spaces):
    """Write the vectors of several models into one table."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    schema = pa.schema(
        {
            "fingerprint": pa.string(),
            "digest": pa.string(),
            "vector": pa.list_(pa.float32()),
            "n_tokens": pa.int32(),
        }
    )
    n_rows = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for model, space in spaces.items():
            for digests, values in _everything(db, model, space):
                ends = np.cumsum([0, *(value.size for value in values)], dtype=np.int32)
                columns = {
                    "fingerprint": pa.array([space.fingerprint] * len(digests)),
                    "digest": [digest.hex() for digest in digests],
                    "vector": pa.ListArray.from_arrays(ends, np.concatenate(values, axis=None)),
                    "n_tokens": [len(value) if space.ragged else None for value in values],
                }
                file.write_table(pa.table(columns, schema=schema))
                n_rows += len(digests)
    return n_rows


def _write_npy(path, db, spaces):
    """Write the vectors of one model as an array, and their digests as another."""
    if len(spaces) != 1 or any(space.ragged for space in spaces.values()):
        raise ValueError(
            f"a .npy file holds one model with one vector a cell, but {len(spaces)} match: "
            f"{[_names(space) for space in spaces.values()]}. Name one as model=..., or export to "
            ".parquet."
        )
    ((model, space),) = spaces.items()
    with (
        _growing_npy(path, np.float32, space.n_features) as vectors,
        _growing_npy(path.with_suffix(".digests.npy"), np.uint8, _DIGEST_SIZE) as names,
    ):
        n_rows = 0
        for digests, values in _everything(db, model, space):
            vectors.write(values.tobytes())
            names.write(b"".join(digests))
            n_rows += len(digests)
    return n_rows


@contextlib.contextmanager
def _growing_npy(path, dtype, width):
    """Open a .npy file to append rows to; its header is written when their number is known."""
    dtype = np.dtype(dtype).newbyteorder("<")

    def write_header(n_rows):
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (n_rows, width)}
        )

    with open(path, "wb") as file:
        write_header(0)  # numpy pads it, so that the number may grow
        start = file.tell()
        yield file
        n_rows = (file.tell() - start) // (width * dtype.itemsize)
        file.seek(0)
        write_header(n_rows)


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


def _check_is_local(path):
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
def _clear_errors(path):
    """Let SQLite's errors say which file, and what to do."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from a damaged schema
        raise OSError(_trouble(path, error)) from error


def _is_refused(error):
    """Tell whether the disk refused a piece of work, and not the file's content."""
    error = _origin(error)
    if isinstance(error, OSError):
        return error.errno is not None
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED


def _origin(error):
    """Return the system's or SQLite's error that a clear one stands for."""
    return error.__cause__ if isinstance(error.__cause__, sqlite3.Error | OSError) else error


def _trouble(path, error):
    if _is_refused(error):
        advice = "Check the file and its directory"
    else:
        advice = "It is damaged, or no store. Move it away, and vectors will be computed anew"
    return (
        f"The embedding store {path} cannot be used: {error}. {advice}, give another path "
        "(store=... or the variable SKLEMBED_STORE), or pass store=None."
    )
