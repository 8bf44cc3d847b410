"""Fill the stores of several encoders; encoders of one network share its passes."""

import itertools
from hashlib import blake2b

import numpy as np

from sklembed.encoders.runtimes import RefusedError

_CELLS_IN_MEMORY = 1024  # whose vectors of the other encoders wait to be stored


def fill_stores(jobs, *, alone=True):
    """Encode and store the cells that encoders lack.

    Encoders that differ only in pooling, layers and normalisation take the vectors of
    equal cells from the same passes through the network.

    Parameters
    ----------
    jobs : iterable of (FrozenEncoder, X)
        Encoders that have a store, and their columns of cells.

    alone : bool, default=True
        Whether to fill the stores of encoders that share their passes with no other.

    Returns
    -------
    report : list of dict
        For each job: "model", "pooling", "layer", "unit_length", "fingerprint",
        "cells", the number of distinct cells, and "encoded", the number of cells that
        this call has encoded.

    Raises
    ------
    TypeError, ValueError, OSError
        If a store is read-only, or as in `FrozenEncoder.transform`.
    """
    fillings = []
    for encoder, X in jobs:
        fillings.append(_Filling(encoder, X, fillings))
    by_passes = {}
    for i, filling in enumerate(fillings):
        if len(filling.missing()):
            by_passes.setdefault(filling.passes() or i, []).append(filling)
    for together in by_passes.values():
        if alone or len(together) > 1:
            for i, filling in enumerate(together):
                filling.fill(together[i + 1 :])
    return [filling.report() for filling in fillings]


class _Filling:
    """An encoder and its column of cells, whose vectors are to be stored.

    Hashes of cells are taken from `earlier` ones of equal cells.
    """

    def __init__(self, encoder, X, earlier):
        encoder._validate_params()
        self.store = encoder._required_store()
        if self.store.read_only:
            raise ValueError(
                f"{self.store!r} is read-only, so no vectors can be stored in it."
            )
        self.encoder = encoder
        columns = {id(other.column): other.column for other in earlier}
        self.column, self.backend, self.space = encoder._validate(
            X, known=columns.values()
        )
        keys, lacks = self.column.distinct_keys(), self.store.lacks
        # Keys of the cells that the store lacked, and of the cells encoded by this call.
        self._lacking = set(itertools.compress(keys, lacks(self.space, keys)))
        self._encoded = set()
        self._digests, self._vectors = [], []  # in memory

    def passes(self):
        """Return a key of the passes that others may share, or None."""
        passes = self.encoder._passes(self.backend)
        if passes is None:
            return None
        keys = b"".join(self.column.distinct_keys())
        return passes, blake2b(keys, digest_size=16).digest()

    def fill(self, others):
        """Encode the cells that the store lacks, also for other encoders that lack them."""
        positions = self.missing()
        if not len(positions):
            return
        others = self._useful(others, positions)
        try:
            self._encode(positions, others)
        except RefusedError:  # the runtime in the key cannot run the joint network
            self._encode(positions, [])

    def _encode(self, positions, others):
        """Encode cells, and store their vectors for this and for other encoders."""
        backend, vectors_of_others = self.backend, None
        if others:
            backend = backend.joined(other.backend for other in others)
            vectors_of_others = VectorsOfOthers(backend.widths, others)
        try:
            for done, _ in self.encoder._encode(
                self.column,
                backend,
                self.space,
                positions,
                self.store,
                vectors_of_others,
                n_read=len(self.column.rows) - len(positions),
            ):
                self._encoded.update(self.column.distinct_keys(done))
        finally:
            for other in others:
                other.flush()

    def missing(self):
        """Return the positions of the distinct cells that are still to be encoded."""
        keys = self.column.distinct_keys()
        # A store that is full, or cannot be written, may lack what has been encoded.
        pending = self._lacking - self._encoded
        if not pending:
            return np.array([], dtype=np.intp)
        is_pending = np.array([key in pending for key in keys])
        return np.flatnonzero(is_pending & self.store.lacks(self.space, keys))

    def _useful(self, others, positions):
        """List the encoders with other vectors that lack some of the cells."""
        useful, fingerprints = [], {self.space.fingerprint}
        for other in others:
            is_new = other.space.fingerprint not in fingerprints
            fingerprints.add(other.space.fingerprint)
            if is_new and len(np.intersect1d(other.missing(), positions)):
                useful.append(other)
        return useful

    def keep(self, digests, values):
        """Keep the vectors of some cells, and store them when there are many."""
        vectors, is_finite = self.encoder._validate_values(
            values, len(digests), self.space
        )
        self._digests += itertools.compress(digests, is_finite)
        self._vectors.append(vectors)
        if len(self._digests) >= _CELLS_IN_MEMORY:
            self.flush()

    def flush(self):
        """Store the vectors in memory."""
        if self._digests:
            self.store.add(self.space, self._digests, np.concatenate(self._vectors))
            self._encoded.update(self._lacking.intersection(self._digests))
        self._digests, self._vectors = [], []

    def report(self):
        """Return the settings and the numbers of cells."""
        return self.space.settings() | {
            "fingerprint": self.space.fingerprint,
            "cells": len(self.column.rows),
            "encoded": len(self._encoded),
        }


class VectorsOfOthers:
    """The part of a network's vectors that belongs to other encoders.

    Parameters
    ----------
    widths : tuple of int
        Widths of the vectors of the encoder that runs the network, and of the others.

    others : list of _Filling
        The others.
    """

    def __init__(self, widths, others):
        self._ends = np.cumsum(widths)[:-1]
        self._others = others

    def split_off(self, digests, values):
        """Keep the vectors of the others; return the vectors of the encoder itself.

        Parameters
        ----------
        digests : list of bytes
            Keys of the cells.

        values : ndarray of shape (n_cells, sum of all widths)
            Vectors of all encoders, side by side.

        Returns
        -------
        values : ndarray of shape (n_cells, width of the encoder)
            Its vectors.
        """
        values, *blocks = np.split(values, self._ends, axis=1)
        for other, block in zip(self._others, blocks, strict=True):
            other.keep(digests, block)
        return values
