"""EmbeddingStore: one SQLite file of vectors that all processes share."""

import atexit
import contextlib
import io
import itertools
import math
import os
import re
import sqlite3
import threading
import time
import uuid
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from sklembed._display import as_html
from sklembed.encoders import database
from sklembed.encoders.export import WRITERS
from sklembed.encoders.networks import (
    RECIPE,
    clear_networks,
    directory_beside,
    list_networks,
    name_directory,
    read_json,
)

# Small enough that a piece is joined and checked within the caches of the processor.
_READ_BYTES = 3 << 17
# For the tree of a million cells, since digests arrive in random order.
_WRITE_CACHE_KIB = 65536
_POLL_SECONDS = 0.05
# Limits of the counts of reads that a process has not written yet.
_UNWRITTEN_ROWS = 100
_UNWRITTEN_SECONDS = 10.0
_PRUNE_TO = 0.9  # of max_bytes, so that pruning is rare


class EmbeddingStore:
    """Store vectors in one SQLite file.

    The key of a vector combines a hash of the cell's content with the fingerprint of
    the model. Folds, candidates, clones, processes, runs and projects therefore share
    all vectors. The file contains no raw inputs, is readable by its owner only, and can
    be opened with any SQLite client. Many processes may read and write at once. A
    process claims cells before it encodes them, and other processes wait for these
    cells instead of encoding them again. Claims of a process that died are void.

    Stored vectors survive the end of any process. A power cut may undo the last batches
    but does not damage the file. A vector is returned only if its checksum is right; a
    damaged vector counts as missing. If a store can be read but not written, because of
    permissions or a full disk, encoding continues without storing and a warning is
    issued.

    Parameters
    ----------
    path : str, path or None, default=None
        The file. None means the path in the environment variable ``SKLEMBED_STORE`` or,
        without it, ``embeddings.sqlite`` in the user's cache directory for sklembed.
        The file is created on first use and must be on a local disk. A relative path is
        made absolute immediately and links are followed, so that all processes use the
        same file.

    max_bytes : int or None, default=None
        Maximum number of bytes of vectors, over all models. When encoding exceeds it,
        the least recently used vectors are deleted until a tenth is free; see `prune`.

    read_only : bool, default=False
        Whether to return vectors without writing anything: no vectors, no counts, no
        times of use, and no files in the folder of the store. Encoders return the
        vectors of new cells without storing them. `clear` and `prune` raise an error,
        and so does a path without a store.

    dtype : {"float32", "float16"}, default="float32"
        Precision in which encoders store vectors; "float16" halves the file. Vectors
        are rounded to it before they are returned for the first time, and are always
        returned as float32. Vectors of both precisions may be in the same file, under
        different fingerprints; pass the same dtype to read them again.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import EmbeddingStore
    >>> store = EmbeddingStore(tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> store.stats()[["model", "rows", "bytes", "hit_rate"]]
    Empty DataFrame
    Columns: [model, rows, bytes, hit_rate]
    Index: []
    """

    def __init__(self, path=None, *, max_bytes=None, read_only=False, dtype="float32"):
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be above 0, or None for no limit; got {max_bytes!r}. To store "
                "nothing, pass store=None to the encoder."
            )
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be 'float32' or 'float16'; got {dtype!r}.")
        if path is not None:
            # Here, since the working directory may differ later or in a worker process.
            absolute = database.absolute(path)
            path = absolute if isinstance(path, str) else Path(absolute)
        self.path = path
        self.max_bytes = max_bytes
        self.read_only = read_only
        self.dtype = dtype

    def __setstate__(self, state):
        # Pickles of older versions lack these attributes.
        self.__dict__ = {"read_only": False, "dtype": "float32"} | state

    def __repr__(self):
        arguments = []
        with contextlib.suppress(OSError):  # a user without a home directory
            arguments.append(repr(os.fspath(self._path())))
        if self.max_bytes is not None:
            arguments.append(f"max_bytes={self.max_bytes}")
        if self.read_only:
            arguments.append("read_only=True")
        if self.dtype != "float32":
            arguments.append(f"dtype={self.dtype!r}")
        return f"EmbeddingStore({', '.join(arguments)})"

    def _repr_html_(self):
        """Return the statistics as HTML; a store that does not exist is not created."""
        try:
            if not database.exists(self._path()):
                return as_html(repr(self), ["The file does not exist yet."], {})
            stats = self.stats()
        except OSError as error:
            return as_html(repr(self), [str(error)], {})
        n_vectors, n_bytes = stats["rows"].sum(), stats["bytes"].sum()
        sentence = f"{n_vectors:,} vectors, {n_bytes / 1e6:,.3g} MB."
        columns = ["model", "pooling", "layer", "n_features", "rows", "hit_rate"]
        table = stats[columns].reset_index(drop=True)
        return as_html(repr(self), [sentence], {"": table})

    def read(self, space, digests):
        """Yield the stored vectors of cells, in pieces of bounded size.

        Parameters
        ----------
        space : Space
            The space of the encoder.

        digests : list of bytes
            Hashes of the cells, 16 bytes each.

        Yields
        ------
        positions : ndarray of shape (n_positions,), dtype int
            Positions in `digests`, in the order in which the vectors are stored.

        values : ndarray of shape (n_positions, n_features), dtype float32, or list of ndarray
            Their vectors; for a ragged space a list of arrays of shape (n_tokens,
            n_features).
        """
        with self._connection() as db:
            model = database.model_id(db, space)
            if model is None:
                return
            cells = database.look_up(db, model, digests)
            n_served, damaged = 0, []
            try:
                for piece in database.pieces(cells, _READ_BYTES):
                    intact, values, unusable = database.fetch(db, space, digests, piece)
                    damaged.extend(unusable)
                    if len(intact):
                        n_served += len(intact)
                        yield intact["position"], values
            finally:
                if not self.read_only and n_served:
                    database.record_use(db, model, digests, cells)
                    self._count_served(db, space.fingerprint, n_served)
            if damaged:
                self._drop_damaged(db, model, digests, damaged)

    def lacks(self, space, digests):
        """Return which cells have no vector in the store; no vectors are read.

        Parameters
        ----------
        space : Space
            The space of the encoder.

        digests : list of bytes
            Hashes of the cells, 16 bytes each.

        Returns
        -------
        missing : ndarray of shape (n_digests,), dtype bool
            Mask of the cells without a vector. Damaged vectors are recognised only when
            they are read.
        """
        missing = np.ones(len(digests), dtype=bool)
        with self._connection() as db:
            model = database.model_id(db, space)
            if model is not None:
                missing[database.find(db, "cells", model, digests)["position"]] = False
        return missing

    def _is_writable(self):
        """Return whether permissions allow this process to write the store."""
        path = self._path()
        return not path.exists() or os.access(path, os.W_OK)

    def fill(self, space, digests, *, encode, claim_size):
        """Encode the cells that are not stored, and yield the vectors of all cells.

        If several processes and threads request the same cells at once, one of them
        encodes a cell and the rest wait. Each batch is on disk before it is yielded, so
        that an interrupted run can be resumed.

        Parameters
        ----------
        space : Space
            The space of the encoder.

        digests : list of bytes
            Hashes of the cells, 16 bytes each, without repeats, in the order of
            encoding.

        encode : callable
            A generator function. Its argument is an iterator over lists of positions in
            `digests`; advancing it claims the cells of a list. It may be advanced early,
            also in another thread. For each batch, the generator yields the positions in
            the batch, the positions that could be encoded, and their values. It is
            called again for cells that another session has claimed and released without
            a vector. The iterator is never empty.

        claim_size : int
            Maximum number of positions in a list.

        Yields
        ------
        positions : ndarray of shape (n_positions,), dtype int
            Positions in `digests`.

        values : ndarray of shape (n_positions, n_features), dtype float32, or list of ndarray
            Their vectors, as `read` would return them. Every cell is yielded once,
            except cells that could not be encoded.
        """
        _check_distinct(digests)
        if self.read_only:
            yield from self._fill_without_storing(space, digests, encode, claim_size)
            return
        session = _Session(self, space, digests)
        try:
            yield from session.run(encode, claim_size)
        finally:
            session.end()

    def add(self, space, digests, values):
        """Store the vectors of cells; cells that are stored keep their vectors.

        Parameters
        ----------
        space : Space
            The space of the encoder.

        digests : list of bytes
            Hashes of the cells, 16 bytes each, without repeats.

        values : ndarray of shape (n_digests, n_features), or list of ndarray
            Their vectors; for a ragged space arrays of shape (n_tokens, n_features).

        Returns
        -------
        n_added : int
            Number of vectors written.

        Raises
        ------
        ValueError
            If the store is read-only, or the digests do not match the values.
        """
        self._check_writable("adding vectors")
        _check_distinct(digests)
        if len(values) != len(digests):
            raise ValueError(f"got {len(values)} values for {len(digests)} digests.")
        is_new = self.lacks(space, digests)
        digests = list(itertools.compress(digests, is_new))
        if not digests:
            return 0
        session = _Session(self, space, digests)
        try:
            session.put(list(itertools.compress(values, is_new)))
        finally:
            session.end()
        return len(digests) if session.can_write else 0

    def stats(self):
        """Return statistics of the store for each model.

        Returns
        -------
        stats : DataFrame
            A row for each fingerprint, with the columns `model`, `pooling`, `layer`,
            `unit_length` (whether vectors have length 1), `n_features`, `rows`,
            `bytes` (of stored vectors), `encoded` (number of values ever encoded),
            `served` (number of values ever read), `hit_rate` (served / (served +
            encoded)), and `description` (all settings in JSON). If `encoded` exceeds
            `rows`, vectors were encoded again, pruned or replaced. A running process
            may hold back the counts of its last small reads, of at most 100 values.
        """
        with self._connection() as db:
            self._write_served(db)
            # A damaged row may have any type.
            rows = db.execute(
                "SELECT fingerprint, description, n_features, dtype, ragged, "
                "(SELECT COUNT(*) FROM cells WHERE model = models.id), "
                "CAST(bytes AS INTEGER), CAST(encoded AS INTEGER), "
                "CAST(served AS INTEGER) FROM models"
            ).fetchall()
            settings = [database.read_space(*row[:5]).settings() for row in rows]
        names = ["model", "pooling", "layer", "unit_length"]
        settings = pd.DataFrame(settings, columns=names, dtype=object)
        counts = ["n_features", "rows", "bytes", "encoded", "served"]
        columns = ["fingerprint", "description", "n_features", "dtype", "ragged"]
        stats = pd.DataFrame(rows, columns=[*columns, *counts[1:]])
        stats = stats.join(settings).set_index("fingerprint")
        stats["hit_rate"] = stats["served"] / (stats["served"] + stats["encoded"])
        return stats[[*names, *counts, "hit_rate", "description"]]

    def clear(self, model=None):
        """Delete vectors, counts and networks of all models or of one; shrink the file.

        Parameters
        ----------
        model : str, path, backend or None, default=None
            The parameter `model` of an encoder: a hub id, the directory of a checkpoint
            or a backend object. All versions and settings of this model are deleted;
            they are found by name, which for a directory is the last two parts of its
            path. The name in the column `model` of `stats` is accepted, too. A
            fingerprint selects one setting, and deletes no network, since other
            settings share it. None deletes everything.

        Raises
        ------
        TypeError
            If `model` is of another type.
        ValueError
            If the store has no such model, or is read-only.
        """
        self._check_writable("clear()")
        model = _name_of(model)
        has_networks = clear_networks(self.networks_directory, model)
        try:
            self._free_space(lambda db: database.clear(db, model))
        except ValueError:
            if not has_networks:
                raise

    def prune(self, max_bytes):
        """Delete the least recently used vectors until `max_bytes` bytes are left.

        Only the vectors count, without keys and the structures of SQLite. These add
        about 5 % to vectors of 384 float32 numbers. The time of last use is stored in
        hours. Within an hour, the oldest vectors are deleted first. The file shrinks.

        Parameters
        ----------
        max_bytes : int
            Maximum number of bytes of vectors, over all models.

        Returns
        -------
        n_dropped : int
            Number of deleted vectors.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative; got {max_bytes!r}.")
        self._check_writable("prune()")
        return self._free_space(lambda db: database.prune(db, max_bytes))

    def export(self, path, model=None):
        """Write vectors to a Parquet or .npy file, with bounded memory.

        A ``.parquet`` file (which needs pyarrow) has the columns ``fingerprint``,
        ``digest`` (the hash of the cell in hex), ``vector`` (a list of float32) and
        ``n_tokens``. If ``n_tokens`` is not null, the vector is a flattened array of
        shape (n_tokens, n_features). A ``.npy`` file is a float32 array with one row
        for each vector of one model. The hashes are in ``<stem>.digests.npy``, a uint8
        array of shape (n_rows, 16).

        Parameters
        ----------
        path : str or path
            The file, ending in ".parquet" or ".npy". An existing file is overwritten.

        model : str, path, backend or None, default=None
            A model as encoders take it, its name, or a fingerprint, as in `clear`. None
            exports all models.

        Returns
        -------
        n_rows : int
            Number of exported vectors.

        Raises
        ------
        TypeError
            If `model` is of another type.
        ValueError
            If the store has no such model, or a ".npy" file is requested for several
            models or ragged values.
        """
        path = Path(path)
        if path.suffix not in WRITERS:
            raise ValueError(
                f"path must end in .parquet or .npy; got {os.fspath(path)!r}."
            )
        contents = []
        model = _name_of(model)
        with self._connection() as db:
            for number, space in database.spaces(db, model).items():
                contents.append((space, database.iter_vectors(db, number, space)))
            return WRITERS[path.suffix](path, contents)

    @property
    def networks_directory(self):
        """Directory of the exported networks, which need not exist."""
        return directory_beside(self._path())

    def networks(self):
        """List the networks that were exported for faster runtimes.

        They are files in the directory ``<path>.networks`` beside the store, in the
        formats of the runtimes. `max_bytes` and `prune` do not count them.

        Returns
        -------
        networks : DataFrame
            A row for each network, with the columns `model`, `runtime`, `version` (of
            the runtime), `dtype`, `bytes` and `exported` (a time in UTC).
        """
        columns = ["model", "runtime", "version", "dtype", "bytes", "exported"]
        table = pd.DataFrame(list_networks(self.networks_directory), columns=columns)
        table["exported"] = pd.to_datetime(table["exported"], unit="s", utc=True)
        return table

    def _path(self):
        """Return the path without links, since locks are in the folder of the file."""
        path = database.default_path() if self.path is None else self.path
        return Path(os.path.realpath(path))

    @contextlib.contextmanager
    def _connection(self):
        """Connect to the store for one operation."""
        path = self._ensure_file()
        with (
            database.readable_errors(path),
            contextlib.closing(database.connect(path, read_only=self.read_only)) as db,
        ):
            yield db

    def _ensure_file(self):
        """Return the path of the store, and create the file if there is none."""
        path = self._path()
        database.check_is_local(path)
        database.check_is_not_directory(path)
        try:
            exists = database.exists(path)
            if not exists and not self.read_only:
                database.create(path)
        except (OSError, sqlite3.Error) as error:
            raise OSError(database.error_message(path, error)) from error
        if self.read_only and not exists:
            raise FileNotFoundError(
                f"There is no embedding store at {path}, and read_only=True does not create "
                "one. Pass the path of a store, read_only=False, or store=None."
            )
        return path

    def _check_writable(self, action):
        if self.read_only:
            raise io.UnsupportedOperation(
                f"{self!r} is read-only, so {action} is not possible. Use a store without "
                "read_only=True."
            )

    def _free_space(self, operation):
        """Run an operation that frees space, without a log if it has no space."""
        try:
            with self._connection() as db:
                self._write_served(db)
                return operation(db)
        except OSError as error:
            if not database.is_full(self._path(), error):
                raise
        path = self._ensure_file()
        with database.readable_errors(path), database.connect_in_place(path) as db:
            return operation(db)

    def _count_served(self, db, fingerprint, n_served):
        """Count served vectors; the counts of small reads are written together."""
        path = str(self._path())
        _SERVED.add(path, fingerprint, n_served)
        if _SERVED.is_due(path):
            self._write_served(db)

    def _write_served(self, db):
        """Write the counts of this process, if the store can be written."""
        if self.read_only:
            return
        path = str(self._path())
        counts = _SERVED.pop(path)
        if counts and not database.record_served(db, counts):
            for fingerprint, n_served in counts.items():
                _SERVED.add(path, fingerprint, n_served)

    def _fill_without_storing(self, space, digests, encode, claim_size):
        """Yield the vectors of all cells as `fill` does, for a read-only store."""
        missing = np.ones(len(digests), dtype=bool)
        for positions, values in self.read(space, digests):
            missing[positions] = False
            yield positions, values
        positions = np.flatnonzero(missing).tolist()
        if not positions:
            return
        starts = range(0, len(positions), claim_size)
        chunks = (positions[start : start + claim_size] for start in starts)
        with contextlib.closing(encode(chunks)) as batches:
            for _, encoded, values in batches:
                if len(encoded):
                    yield np.asarray(encoded), space.pack(values, len(encoded))[1]

    def _drop_damaged(self, db, model, digests, damaged):
        """Delete the cells of damaged vectors and warn, so that they are encoded again.

        Their rows in `vectors` stay. If the id of the row is damaged, the row belongs
        to another cell.
        """
        cells = []
        for cell in damaged:
            digest = digests[cell["position"]]
            cells.append((model, digest, int(cell["id"]), int(cell["size"])))
        n_dropped = len(cells)
        if not self.read_only:
            with (
                contextlib.suppress(sqlite3.OperationalError),
                database.transaction(db),
            ):
                n_dropped = len(database.drop(db, cells))
        if n_dropped:  # 0 if another process has pruned them since the lookup
            warnings.warn(
                f"{n_dropped} vectors in the embedding store {self._path()} are damaged and "
                "count as missing. Check the disk.",
                UserWarning,
                stacklevel=3,
            )


def _name_of(model):
    """Return the name by which descriptions list a model that an encoder takes."""
    if hasattr(model, "describe"):  # a backend object
        description = model.describe()
        return description.get("label") or description.get("name")
    if model is None:
        return None
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            "model must be a hub id, a checkpoint directory, a backend, a name or a "
            f"fingerprint; got {model!r}. For an encoder, pass encoder.model, or "
            "encoder.fingerprint() for its settings alone."
        )
    model = os.path.expanduser(os.fspath(model))
    if not (os.path.isdir(model) or os.path.isabs(model)):
        return model
    recipe = read_json(Path(model, RECIPE)) or {}  # an export has the name of its model
    return recipe.get("description", {}).get("label") or name_directory(model)


def _check_distinct(digests):
    if len(set(digests)) < len(digests):
        raise ValueError(
            "digests must be without repeats: pass each distinct cell once."
        )


class _ServedCounts:
    """Numbers of vectors that this process has read, before they are written.

    A transaction, and the checkpoint that follows it, takes longer than reading a row.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        """Forget all counts; in a forked child, whose parent writes them."""
        self._lock = threading.Lock()
        self._counts: dict[str, Counter] = {}  # number by fingerprint, by path
        self._written: dict[str, float] = {}  # time by path

    def add(self, path, fingerprint, n_served):
        with self._lock:
            counts = self._counts.setdefault(path, Counter())
            counts[fingerprint] += n_served

    def is_due(self, path):
        """Return whether the counts are large or old enough to be written."""
        with self._lock:
            age = time.monotonic() - self._written.get(path, -math.inf)
            counts = self._counts.get(path, Counter())
            return counts.total() > _UNWRITTEN_ROWS or age > _UNWRITTEN_SECONDS

    def pop(self, path):
        with self._lock:
            self._written[path] = time.monotonic()
            return self._counts.pop(path, Counter())

    def write_all(self):
        """Write all counts at the end of the process, to stores that still exist."""
        for path in list(self._counts):
            with contextlib.suppress(OSError, sqlite3.Error):
                with contextlib.closing(database.connect(Path(path))) as db:
                    database.record_served(db, self.pop(path))


_SERVED = _ServedCounts()
atexit.register(_SERVED.write_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SERVED.reset)


class _Session:
    """One run of `EmbeddingStore.fill`, which claims the cells that it encodes.

    A session uses a single connection. Opening one for every batch would also
    checkpoint the log every time. A lock guards the connection, since the thread that
    prepares batches may claim cells.
    """

    def __init__(self, store, space, digests):
        self._store = store
        self._space = space
        self._digests = digests
        self._owner = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._ended = False
        self.can_write = True
        self._session_lock = None
        self._path = store._ensure_file()
        with database.readable_errors(self._path):
            self._db = database.connect(self._path)

    def run(self, encode, claim_size):
        """Yield the vectors of all cells, encoded by this session or another."""
        self._attempt(self._begin)
        pending = np.arange(len(self._digests))
        if not self.can_write:
            pending = yield from self._read(pending)
        while len(pending):
            # Claiming tells which cells are stored, or claimed by others.
            taken = yield from self._encode(pending, encode, claim_size)
            n_pending = len(pending)
            pending = yield from self._read(taken)
            if len(pending) == n_pending:
                self._attempt(self._wait)

    def put(self, values):
        """Store the values of all cells, without claims."""
        positions = range(len(self._digests))
        self._put(positions, positions, values)

    def end(self):
        """Release all claims."""
        with self._lock:
            self._ended = True
            self._release()

    def _digests_at(self, positions):
        return [self._digests[i] for i in positions]

    def _read(self, positions):
        """Yield the stored vectors; return the positions without a vector."""
        if not len(positions):
            return positions
        missing = np.ones(len(positions), dtype=bool)
        digests = self._digests_at(positions)
        for stored, values in self._store.read(self._space, digests):
            missing[stored] = False
            yield positions[stored], values
        return positions[missing]

    def _encode(self, positions, encode, claim_size):
        """Encode the free cells; return the positions of stored and claimed ones."""
        taken = []
        chunks = self._claim_lazily(positions, claim_size, taken)
        first = next(chunks, None)
        if first is None:
            return np.asarray(taken, dtype=np.intp)
        with contextlib.closing(encode(itertools.chain([first], chunks))) as batches:
            for batch, encoded, values in batches:
                values = self._put(batch, encoded, values)
                if len(encoded):
                    yield np.asarray(encoded), values
        return np.asarray(taken, dtype=np.intp)

    def _claim_lazily(self, positions, claim_size, taken):
        """Yield lists of positions after claiming their cells.

        Positions of stored cells and of cells claimed by others are appended to `taken`.
        """
        for start in range(0, len(positions), claim_size):
            chunk = positions[start : start + claim_size]
            is_free = self._claim(self._digests_at(chunk))
            taken += chunk[~is_free].tolist()
            if is_free.any():
                yield chunk[is_free].tolist()

    def _claim(self, digests):
        """Claim the cells that are neither stored nor claimed; return their mask."""
        is_free = np.ones(len(digests), dtype=bool)

        def claim(db):
            with database.transaction(db):
                model = database.ensure_model(db, self._space)
                for table in ("cells", "claims"):
                    rows = database.find(db, table, model, digests)
                    is_free[rows["position"]] = False
                db.executemany(
                    "INSERT INTO claims (model, digest, owner) VALUES (?, ?, ?)",
                    sorted(
                        (model, digests[i], self._owner)
                        for i in np.flatnonzero(is_free)
                    ),
                )

        with self._lock:
            if self._ended:  # the thread that prepares batches has outlived the session
                return np.zeros(len(digests), dtype=bool)
            self._attempt(claim)
        if self.can_write:
            return is_free
        return np.ones(len(digests), dtype=bool)

    def _put(self, batch, encoded, values):
        """Store the values of a batch on disk, and release the claims on its cells.

        Cells that could not be encoded are released too. Two sessions that wait for
        such cells of each other would block forever.
        """
        blobs = []
        if len(encoded):
            blobs, values = self._space.pack(values, len(encoded))

        def put(db):
            database.check_spare_space(db, self._path, sum(map(len, blobs)))
            with database.transaction(db):
                model = database.ensure_model(db, self._space)
                database.insert(db, model, self._digests_at(encoded), blobs)
                db.executemany(
                    "DELETE FROM claims WHERE owner = ? AND model = ? AND digest = ?",
                    sorted((self._owner, model, self._digests[i]) for i in batch),
                )
            max_bytes = self._store.max_bytes
            if max_bytes is not None and database.total_bytes(db) > max_bytes:
                database.prune(db, int(max_bytes * _PRUNE_TO))

        self._attempt(put)
        return values

    def _attempt(self, operation):
        """Run an operation on the store; after a disk error, store nothing more."""
        with self._lock:
            if not self.can_write:
                return
            try:
                with database.readable_errors(self._path):
                    operation(self._db)
            except OSError as error:
                if not database.is_disk_error(error):
                    raise
                self.can_write = False
                self._release()
                reason = database.original(error)
                warnings.warn(
                    f"The embedding store {self._path} cannot be written ({reason}). Vectors "
                    "are returned from now on without being stored. Free space on the disk, "
                    "change the permissions, or pass another path.",
                    UserWarning,
                    stacklevel=2,
                )

    def _begin(self, db):
        """Lock the session's file, before there are claims."""
        db.execute(f"PRAGMA cache_size = {-_WRITE_CACHE_KIB}")
        self._session_lock = FileLock(self._session_file(self._owner))
        self._session_lock.acquire()
        self._delete_stale_claims(db)

    def _release(self):
        """Delete all claims. If this fails, unlocking the file makes them stale."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
            self._db.close()
        if self._session_lock is not None:
            with contextlib.suppress(OSError):
                Path(self._session_lock.lock_file).unlink(missing_ok=True)
            self._session_lock.release()
        self._db = self._session_lock = None

    def _wait(self, db):
        """Wait for other sessions, and delete the claims of sessions that died."""
        time.sleep(_POLL_SECONDS)
        self._delete_stale_claims(db)

    def _delete_stale_claims(self, db):
        """Delete the claims of sessions that died."""
        rows = db.execute("SELECT DISTINCT owner FROM claims").fetchall()
        owners = {owner for (owner,) in rows}
        owners.update(os.listdir(self._session_file(self._owner).parent))
        for owner in owners - {self._owner}:
            if not re.fullmatch("[0-9a-f]{32}", str(owner)):  # damage, not a file name
                db.execute("DELETE FROM claims WHERE owner IS ?", (owner,))
                continue
            lock = FileLock(self._session_file(owner))
            # A running session locks its file; if it dies, the system unlocks the file.
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                # Windows deletes no open file; there, the release deletes it.
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)

    def _session_file(self, owner):
        """Return the path of the file that a running session locks."""
        folder = Path(f"{self._path}.sessions")
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / owner
