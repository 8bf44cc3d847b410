"""EmbeddingStore: one SQLite file that keeps every vector ever encoded, for every process."""

import contextlib
import io
import itertools
import json
import os
import re
import sqlite3
import threading
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from sklembed.encoders import database
from sklembed.encoders.export import WRITERS

# Small enough that joining and checking a piece stays within the processor's caches.
_READ_BYTES = 3 << 17
_WRITE_CACHE_KIB = (
    65536  # holds the tree of a million cells: digests come in random order
)
_POLL_SECONDS = 0.05
_PRUNE_TO = 0.9  # of the cap, so that pruning is rare


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
        and must lie on a local disk. A relative path is made absolute at once, and links are
        followed, so that every process means the same file.

    max_bytes : int or None, default=None
        The most bytes of vectors to keep, all models together. When encoding exceeds it, the
        least recently used ones go until a tenth is free; see `prune`.

    read_only : bool, default=False
        Whether to serve vectors without ever writing: no vectors, counts or recency, and no
        files beside the store. Encoders return the vectors of new cells without storing them;
        `clear` and `prune` raise an error, and so does a path without a store.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import EmbeddingStore
    >>> store = EmbeddingStore(tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> store.stats()
    Empty DataFrame
    Columns: [model, n_features, rows, bytes, encoded, served, hit_rate, description]
    Index: []
    """

    def __init__(self, path=None, *, max_bytes=None, read_only=False):
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be above 0, or None for no cap; got {max_bytes!r}. To keep "
                "nothing, give the encoder store=None."
            )
        if path is not None:
            # Now, since a worker process, or this one later, may have another working directory.
            absolute = database.absolute(path)
            path = absolute if isinstance(path, str) else Path(absolute)
        self.path = path
        self.max_bytes = max_bytes
        self.read_only = read_only

    def __setstate__(self, state):
        self.__dict__ = {
            "read_only": False
        } | state  # pickles of before there was a choice

    def __repr__(self):
        arguments = []
        with contextlib.suppress(OSError):  # a user without a home directory
            arguments.append(repr(os.fspath(self._path())))
        if self.max_bytes is not None:
            arguments.append(f"max_bytes={self.max_bytes}")
        if self.read_only:
            arguments.append("read_only=True")
        return f"EmbeddingStore({', '.join(arguments)})"

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
            model = database.model_id(db, space)
            if model is None:
                return
            cells = database.look_up(db, model, digests)
            served, damaged = 0, []
            try:
                for piece in database.pieces(cells, _READ_BYTES):
                    sound, values, unsound = database.fetch(db, space, digests, piece)
                    damaged.extend(unsound)
                    if len(sound):
                        served += len(sound)
                        yield sound["position"], values
            finally:
                if not self.read_only:
                    database.note_use(db, model, digests, cells, served)
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
            model = database.model_id(db, space)
            if model is not None:
                lacking[database.find(db, "cells", model, digests)["position"]] = False
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
            raise ValueError(
                "digests must be without repeats: each distinct cell is encoded once."
            )
        if self.read_only:
            yield from self._fill_nothing(space, digests, encode, claim_size)
            return
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
            A row for each fingerprint: the `model`, `n_features`, `rows` and `bytes` of vectors
            held, how many values were ever `encoded` into the store and `served` from it, the
            `hit_rate`, the part of both that was served, and the `description` of all settings,
            in JSON. `encoded` above `rows` means that vectors were encoded again, or have been
            pruned or replaced since.
        """
        with self._connection() as db:
            rows = db.execute(
                "SELECT fingerprint, description, n_features, "
                "(SELECT COUNT(*) FROM cells WHERE model = models.id), bytes, encoded, served "
                "FROM models"
            ).fetchall()
        names = [
            database.Space(row[0], json.loads(row[1]), row[2]).names[-1] for row in rows
        ]
        counts = ["n_features", "rows", "bytes", "encoded", "served"]
        stats = pd.DataFrame(rows, columns=["fingerprint", "description", *counts])
        stats = stats.assign(model=names).set_index("fingerprint")
        stats["hit_rate"] = stats["served"] / (stats["served"] + stats["encoded"])
        return stats[["model", *counts, "hit_rate", "description"]]

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
            If the store has no such model, or is for reading only.
        """
        self._refuse_if_read_only("clear()")
        self._free(lambda db: database.clear(db, model))

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
        self._refuse_if_read_only("prune()")
        return self._free(lambda db: database.prune(db, max_bytes))

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
        if path.suffix not in WRITERS:
            raise ValueError(
                f"path must end in .parquet or .npy; got {os.fspath(path)!r}."
            )
        with self._connection() as db:
            contents = [
                (space, database.everything(db, number, space))
                for number, space in database.spaces(db, model).items()
            ]
            return WRITERS[path.suffix](path, contents)

    def _path(self):
        """Return the file itself: its lock and its sessions lie beside it, not beside a link."""
        path = database.default_path() if self.path is None else self.path
        return Path(os.path.realpath(path))

    @contextlib.contextmanager
    def _connection(self):
        """Connect for one piece of work."""
        path = self._ready_path()
        with (
            database.clear_errors(path),
            contextlib.closing(database.connect(path, read_only=self.read_only)) as db,
        ):
            database.check_is_store(db, path)
            yield db

    def _ready_path(self):
        """Return the path of the store, which is made if there is none."""
        path = self._path()
        database.check_is_local(path)
        database.check_is_no_directory(path)
        try:
            is_made = database.is_made(path)
            if not is_made and not self.read_only:
                database.create(path)
        except (OSError, sqlite3.Error) as error:
            raise OSError(database.trouble(path, error)) from error
        if self.read_only and not is_made:
            raise FileNotFoundError(
                f"There is no embedding store at {path}, and read_only=True makes none. Give the "
                "path of a store, read_only=False, or store=None."
            )
        return path

    def _refuse_if_read_only(self, action):
        if self.read_only:
            raise io.UnsupportedOperation(
                f"{self!r} is for reading only, so {action} is refused. Use a store without "
                "read_only=True."
            )

    def _free(self, work):
        """Do a piece of work that frees space, if need be without the space for a log."""
        try:
            with self._connection() as db:
                return work(db)
        except OSError as error:
            if not database.is_full(self._path(), error):
                raise
        path = self._ready_path()
        with database.clear_errors(path), database.connect_in_place(path) as db:
            return work(db)

    def _fill_nothing(self, space, digests, encode, claim_size):
        """Yield the values of all cells as `fill` does, without keeping those that are new."""
        lacking = np.ones(len(digests), dtype=bool)
        for positions, values in self.read(space, digests):
            lacking[positions] = False
            yield positions, values
        positions = np.flatnonzero(lacking).tolist()
        if not positions:
            return
        chunks = (
            positions[i : i + claim_size] for i in range(0, len(positions), claim_size)
        )
        with contextlib.closing(encode(chunks)) as batches:
            for _, done, values in batches:
                if len(done):
                    yield np.asarray(done), space.pack(values, len(done))[1]

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
        if not self.read_only:
            with (
                contextlib.suppress(sqlite3.OperationalError),
                database.transaction(db),
            ):
                lost = len(database.drop(db, cells))
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
            with database.transaction(db):
                model = database.enter_model(db, self._space)
                for table in ("cells", "claims"):
                    free[database.find(db, table, model, digests)["position"]] = False
                db.executemany(
                    "INSERT INTO claims (model, digest, owner) VALUES (?, ?, ?)",
                    sorted(
                        (model, digests[i], self._owner) for i in np.flatnonzero(free)
                    ),
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
            blobs, values = self._space.pack(values, len(done))

        def put(db):
            database.check_spare_space(db, self._path, sum(map(len, blobs)))
            with database.transaction(db):
                model = database.enter_model(db, self._space)
                database.insert(db, model, [self._digests[i] for i in done], blobs)
                db.executemany(
                    "DELETE FROM claims WHERE owner = ? AND model = ? AND digest = ?",
                    sorted((self._owner, model, self._digests[i]) for i in batch),
                )
            cap = self._store.max_bytes
            if cap is not None and database.bytes_held(db) > cap:
                database.prune(db, int(cap * _PRUNE_TO))

        self._attempt(put)
        return values

    def _attempt(self, work):
        """Do a piece of work on the store, or, where the disk refuses it, keep nothing any more."""
        with self._lock:
            if not self._keeps:
                return
            try:
                with database.clear_errors(self._path):
                    work(self._db)
            except OSError as error:
                if not database.is_refused(error):
                    raise
                self._keeps = False
                self._let_go()
                why = database.origin(error)
                warnings.warn(
                    f"The embedding store {self._path} cannot be written ({why}): what is encoded "
                    "from here on is returned, but not kept. Free the disk or its permissions, or "
                    "give another path.",
                    UserWarning,
                    stacklevel=2,
                )

    def _begin(self, _):
        """Connect, and show a sign of life, before there is any claim to it."""
        self._db = database.connect(self._path)
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
        owners = {
            owner
            for (owner,) in db.execute("SELECT DISTINCT owner FROM claims").fetchall()
        }
        owners |= {sign.name for sign in self._life_sign(self._owner).parent.iterdir()}
        for owner in owners - {self._owner}:
            if not re.fullmatch(
                "[0-9a-f]{32}", str(owner)
            ):  # damage; it names no file of ours
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
