"""Fill the stores of several encoders; encoders of one network share its passes."""

import itertools
from hashlib import blake2b

import numpy as np

from sklembed.encoders.runtimes import RefusedError

_CELLS_IN_MEMORY = 1024  # whose vectors of the other encoders wait to be stored


def fill_stores(jobs):
    """Encode and store the cells that encoders lack.

    Encoders that differ only in pooling, layers and normalisation take the vectors of
    equal cells from the same passes through the network.

    Parameters
    ----------
    jobs : iterable of (FrozenEncoder, X)
        Encoders that have a store, and their columns of cells.

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
    fillings, by_passes = [], {}
    for i, (encoder, X) in enumerate(jobs):
        filling = _Filling(encoder, X)
        fillings.append(filling)
        key = i if filling.passes is None else filling.passes
        by_passes.setdefault(key, []).append(filling)
    for together in by_passes.values():
        for i, filling in enumerate(together):
            filling.fill(together[i + 1 :])
    return [filling.report() for filling in fillings]


class _Filling:
    """An encoder and its column of cells, whose vectors are to be stored."""

    def __init__(self, encoder, X):
        encoder._validate_params()
        self.store = encoder._required_store()
        if self.store.read_only:
            raise ValueError(
                f"{self.store!r} is read-only, so no vectors can be stored in it."
            )
        self.encoder = encoder
        self.column, self.backend, self.space = encoder._validate(X)
        self.passes = encoder._passes(self.backend)
        if self.passes is not None:
            keys = b"".join(self.column.distinct_keys())
            self.passes = self.passes, blake2b(keys, digest_size=16).digest()
        self.n_encoded = 0
        self._digests, self._vectors = [], []  # in memory

    def fill(self, others):
        """Encode the cells that the store lacks, also for other encoders that lack them."""
        positions = self._missing()
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
            ):
                self.n_encoded += len(done)
        finally:
            for other in others:
                other.flush()

    def _missing(self):
        """Return the positions of the distinct cells that the store lacks."""
        return np.flatnonzero(self.store.lacks(self.space, self.column.distinct_keys()))

    def _useful(self, others, positions):
        """List the encoders with other vectors that lack some of the cells."""
        useful, fingerprints = [], {self.space.fingerprint}
        for other in others:
            is_new = other.space.fingerprint not in fingerprints
            fingerprints.add(other.space.fingerprint)
            if is_new and len(np.intersect1d(other._missing(), positions)):
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
            vectors = np.concatenate(self._vectors)
            self.n_encoded += self.store.add(self.space, self._digests, vectors)
        self._digests, self._vectors = [], []

    def report(self):
        """Return the settings and the numbers of cells."""
        return self.space.settings() | {
            "fingerprint": self.space.fingerprint,
            "cells": len(self.column.rows),
            "encoded": self.n_encoded,
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
