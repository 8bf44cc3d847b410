"""FrozenEncoder: check cells, digest them, ask the store, encode what is missing."""

import contextlib
import inspect
import itertools
import json
import os
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import blake2b
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import (
    BaseEstimator,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from tqdm import tqdm

from sklembed._table.columns import is_frame, output_container
from sklembed.encoders.backends import MODALITIES
from sklembed.encoders.cells import (
    DECODING_VERSION,
    decode,
    identify,
    image_settings,
    is_missing,
    names_image_file,
    shorten,
)
from sklembed.encoders.checkpoints import Checkpoint
from sklembed.encoders.database import Space, absolute, default_path
from sklembed.encoders.huggingface import POOLINGS, TOLERANCES, HuggingFaceBackend
from sklembed.encoders.inference import encode, without_frames
from sklembed.encoders.store import EmbeddingStore

# Cells claimed at once: enough to keep claims rare, few enough to share work between processes.
_CLAIM_SIZE = {"text": 128, "image": 64}
_COPIED_ROWS = 65536  # at once, from a row to those that repeat it
# Parameters that decide what a vector is, beside the content of the checkpoint.
_DECIDING = (
    "model",
    "modality",
    "output",
    "pooling",
    "layer",
    "layer_aggregation",
    "normalize",
    "max_length",
    "dtype",
    "revision",
    "trust_remote_code",
)
# Parts of a description that change a vector by rounding, or not at all.
_PRECISION_ONLY = ("dtype", "store_dtype", "label")
_LOOKED_AT = 20  # cells of a text column, for the names of image files
_ANNOUNCED: set[bytes] = set()  # what this process has warned of: cells and columns
_ANNOUNCED_LIMIT = 100_000
# What a backend object decides for itself; given beside one, these would silently do nothing.
_HUB_ONLY = (
    "pooling",
    "layer",
    "layer_aggregation",
    "max_length",
    "device",
    "dtype",
    "revision",
    "local_files_only",
    "trust_remote_code",
)


class FrozenEncoder(TransformerMixin, BaseEstimator):
    """Turn a column of texts or images into vectors by a pretrained model that stays frozen.

    Each distinct cell is encoded once *ever*: a store on disk keeps every vector under the digest
    of the cell's content and the fingerprint of the model, so cross-validation folds, grid search
    candidates, clones, worker processes and later runs find it there (arXiv 2502.02048 and
    2406.02601 rest on the same economy: one inference a sample).

    `transform` works without `fit`, `fit` never runs the model, and neither pickles nor clones
    carry weights; a model is loaded once a process, when there is something to encode. A fitted
    encoder remembers the key of its vectors. As long as no parameter that changes a vector is
    set, it returns stored vectors without the checkpoint and without transformers.

    Parameters
    ----------
    model : str, path or backend
        A local checkpoint directory or hub id of a text or vision model that transformers'
        ``AutoModel`` knows, or of a dual encoder such as CLIP; or a backend object, such as
        :class:`CallableBackend`. For a sentence-transformers directory pooling, normalisation and
        maximum length are those of its files.

    modality : {"auto", "text", "image"}, default="auto"
        What the cells are. "auto" reads it from the model; a dual encoder needs it said.

    output : {"pooled", "tokens"}, default="pooled"
        One vector a cell, or the vectors of its tokens (words, image patches, the cells of a
        convolutional feature map): one object column whose entries are arrays of shape
        (n_tokens, n_features), and None for missing cells. See :meth:`grid_shape`.

    pooling : {"auto", "mean", "cls", "max", "last", "pooler"}, default="auto"
        How the vectors of tokens become one. "auto" follows sentence-transformers files, else it is
        the projection into the common space for dual encoders, the class token for vision
        transformers, and the mean for texts and convolutional networks. "pooler" is the model's own
        pooled vector, before any projection. Padding is left out.

    layer : int or list of int, default=-1
        Which hidden states: -1 is the model's output, 0 the embeddings before the first layer.
        Those of intermediate layers often transfer better, and come as they are, before any final
        normalisation.

    layer_aggregation : {"concat", "mean"}, default="concat"
        How the vectors of several layers become one.

    normalize : bool, default=False
        Whether to scale vectors to unit length. Those of a sentence-transformers model that
        normalises have it anyway, whatever the pooling and the layer.

    max_length : int or None, default=None
        Tokens after which a text is cut, special tokens included; by default what the model says.

    batch_size : int or "auto", default="auto"
        Cells to a batch; "auto" fills batches by their number of tokens. It does not change vectors
        beyond rounding. A batch for which memory runs out is halved.

    device : str, default="auto"
        Where the model runs: "auto" takes an accelerator if there is one, else the CPU.

    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Precision of the model: "auto" is bfloat16 where the hardware gains by it (CUDA, CPUs with
        AMX), else float32. The precision is part of the key of a vector. Without its
        checkpoint, a fitted encoder returns vectors in the precision of `fit`.
        Vectors are float32 either way. A vector depends on its batch only by rounding: the
        relative error is below 1e-5 in float32 and 3e-2 in bfloat16.

    store : "default", path, EmbeddingStore or None, default="default"
        Where vectors are stored, those of `transform` included. ``None`` stores none, and
        ``EmbeddingStore(path, read_only=True)`` only reads. A relative path is made absolute when
        it is first used, and in pickles, so that worker processes use the same file.

    missing : {"nan", "error"}, default="nan"
        What becomes of None and NaN cells: a row of NaN, or an error.

    errors : {"raise", "missing"}, default="raise"
        What to do about a file that is absent, an image that cannot be decoded or a cell for
        which the model returns NaN: raise an error that names the row, or treat the cell as
        missing. A warning then counts such cells by reason and names the first; each cell is
        reported once per process, so that a search does not repeat it for every fold. The
        downstream estimator has to accept the row of NaN.

    revision : str or None, default=None
        Branch, tag or commit of a hub model.

    local_files_only : bool, default=False
        Whether to stay offline and use the hub's local cache only.

    trust_remote_code : bool, default=False
        Whether to run modelling code that a hub repository brings.

    verbose : int, default=0
        Above 0, shows a progress bar while encoding, with the rate and what the store had.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns seen during fit: one.

    feature_names_in_ : ndarray of shape (1,)
        The column's name, where `X` has one.

    space_ : dict
        Key and shape of the vectors: "fingerprint", "description", "n_features", "dtype",
        "ragged", "modality", and the "parameters" that decided them.

    See Also
    --------
    PerModalityUnion : Gives each column of a table its own encoder.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> def load():
    ...     return lambda pictures: np.array([np.asarray(p).mean((0, 1)) for p in pictures])
    >>> colour = CallableBackend(load, name="colour", version="1", modality="image", n_features=3)
    >>> red = np.full((8, 8, 3), [200, 0, 0], dtype=np.uint8)
    >>> FrozenEncoder(colour, store=None).transform([red, None])
    array([[200.,   0.,   0.],
           [ nan,  nan,  nan]], dtype=float32)
    """

    _keeps_missing_rows = True  # missing in, missing out: PerModalityUnion reads this
    _parameter_constraints: dict = {
        "model": "no_validation",  # checked by _backend
        "modality": [StrOptions({"auto", *MODALITIES})],
        "output": [StrOptions({"pooled", "tokens"})],
        "pooling": [StrOptions({"auto", *POOLINGS})],
        "layer": [Integral, list, tuple],
        "layer_aggregation": [StrOptions({"concat", "mean"})],
        "normalize": ["boolean"],
        "max_length": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
        ],
        "device": [str],
        "dtype": [StrOptions({"auto", "float32", "bfloat16", "float16"})],
        "store": [str, os.PathLike, EmbeddingStore, None],
        "missing": [StrOptions({"nan", "error"})],
        "errors": [StrOptions({"raise", "missing"})],
        "revision": [str, None],
        "local_files_only": ["boolean"],
        "trust_remote_code": ["boolean"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        model,
        *,
        modality="auto",
        output="pooled",
        pooling="auto",
        layer=-1,
        layer_aggregation="concat",
        normalize=False,
        max_length=None,
        batch_size="auto",
        device="auto",
        dtype="auto",
        store="default",
        missing="nan",
        errors="raise",
        revision=None,
        local_files_only=False,
        trust_remote_code=False,
        verbose=0,
    ):
        self.model = model
        self.modality = modality
        self.output = output
        self.pooling = pooling
        self.layer = layer
        self.layer_aggregation = layer_aggregation
        self.normalize = normalize
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.store = store
        self.missing = missing
        self.errors = errors
        self.revision = revision
        self.local_files_only = local_files_only
        self.trust_remote_code = trust_remote_code
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Check the parameters, the model's configuration and the cells; run nothing.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        y : None
            Ignored.

        Returns
        -------
        self : FrozenEncoder
            The encoder.

        Raises
        ------
        TypeError, ValueError, OSError
            If a cell is not of the modality, all cells are missing, there is more or less than one
            column, or the model cannot be found.
        """
        column, backend, space, _, missing = self._check(X, fitting=True)
        return self._fit(column, backend, space, missing)

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y=None):
        """Do what `fit` and `transform` do, but look at each cell once.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        y : None
            Ignored.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors; NaN for missing cells. For ``output="tokens"`` of shape (n_samples, 1) and
            dtype object: arrays of shape (n_tokens, n_features), dtype float32; None for missing
            cells.
        """
        checked = self._check(X, fitting=True)
        column, backend, space, _, missing = checked
        self._fit(column, backend, space, missing)
        return self._transform(*checked)

    def transform(self, X):
        """Return a vector for each cell, from the store or the model.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors; NaN for missing cells. For ``output="tokens"`` of shape (n_samples, 1) and
            dtype object: arrays of shape (n_tokens, n_features), dtype float32; None for missing
            cells.

        Raises
        ------
        TypeError, ValueError, OSError
            For what `fit` raises them, if a cell cannot be decoded, if the model returns NaN for
            a cell, and if a cell is not in the store and the checkpoint cannot be read. What was
            encoded before such a cell is in the store.
        """
        self._validate_params()
        checked = self._check(X)
        name, fitted = checked[0].name, getattr(self, "feature_names_in_", [None])[0]
        if isinstance(name, str) and fitted not in (None, name):
            raise ValueError(
                "The feature names should match those that were passed during fit: this encoder "
                f"was fitted on {fitted!r}, and X is {name!r}."
            )
        return self._transform(*checked)

    def get_feature_names_out(self, input_features=None):
        """Name the columns of the output, from the model's configuration alone.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            "frozenencoder0", "frozenencoder1", and so on; for tokens one name.
        """
        n_columns = (
            1 if self.output == "tokens" else self._model_and_space()[1].n_features
        )
        return np.asarray([f"frozenencoder{i}" for i in range(n_columns)], dtype=object)

    def fingerprint(self):
        """Return what the store knows this encoder's vectors by.

        Returns
        -------
        fingerprint : str
            A digest of everything that changes a vector, for :meth:`EmbeddingStore.clear` and
            :meth:`EmbeddingStore.export`.
        """
        return self._model_and_space()[1].fingerprint

    def digests(self, X):
        """Return what the store knows cells by, to match what it exports with a table.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        digests : ndarray of shape (n_samples,), dtype object
            Digests of the cells in hex; None for missing cells.
        """
        self._validate_params()
        *_, digests, _ = self._check(X)
        named = [None if digest is None else digest.hex() for digest in digests]
        return np.asarray(named, dtype=object)

    def stats(self):
        """Count what the store holds of this encoder's vectors, and has done for it.

        Returns
        -------
        stats : dict
            "rows" and "bytes" held now, how many vectors were ever "encoded" and "served", by any
            process and clone, and the "hit_rate", served of both together.

        Raises
        ------
        ValueError
            If the encoder has no store.
        """
        self._validate_params()
        counts = (
            self._required_store()
            .stats()
            .drop(columns=["model", "n_features", "description"])
        )
        fingerprint = self._model_and_space()[1].fingerprint
        if fingerprint not in counts.index:
            return dict.fromkeys(counts.columns, 0) | {"hit_rate": np.nan}
        return counts.astype(object).loc[fingerprint].to_dict()

    def verify(self, X, n_samples=100, random_state=None):
        """Encode a sample of cells anew and compare with what the store holds for them.

        The store holds no cells, so it takes `X` to know what to encode. Vectors may drift when a
        library that decodes, tokenises or multiplies is updated.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        n_samples : int, default=100
            How many distinct cells to compare, of those that the store has.

        random_state : int, RandomState instance or None, default=None
            Chooses them.

        Returns
        -------
        report : dict
            "compared", the number of cells; "median_error" and "max_error", the length of the
            difference relative to that of the stored vector; and "tolerance", what rounding may
            make of it in this precision. Above it, the stored vectors are of another making: clear
            them, by ``EmbeddingStore.clear``.

        Raises
        ------
        ValueError
            If the encoder has no store, or the store has none of the cells.
        """
        self._validate_params()
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1; got {n_samples}.")
        store = self._required_store()
        column, backend, space, digests, _ = self._check(X)
        first_row = _first_rows(digests)
        known = np.flatnonzero(~store.lacks(space, list(first_row)))
        if not len(known):
            raise ValueError(
                f"The store has none of the {len(first_row)} distinct cells of {column}; transform "
                "them first."
            )
        size = min(n_samples, len(known))
        chosen = np.sort(
            check_random_state(random_state).choice(known, size, replace=False)
        )
        stored = _by_position(store.read(space, [list(first_row)[i] for i in chosen]))
        fresh = _by_position(
            self._encode(column, backend, None, space, first_row, chosen)
        )
        errors = [_relative_error(fresh[chosen[i]], stored[i]) for i in stored]
        dtypes = {space.description.get("dtype", "float32"), space.dtype}
        return {
            "compared": len(errors),
            "median_error": float(np.median(errors)),
            "max_error": float(np.max(errors)),
            "tolerance": max(TOLERANCES.get(dtype, 0) for dtype in dtypes),
        }

    def grid_shape(self):
        """Count the rows and columns of patches that the tokens of an image stand for, row by row.

        Returns
        -------
        shape : tuple of int
            Rows and columns.

        Raises
        ------
        ValueError
            If the model encodes text, keeps the proportions of each picture, or is a backend object
            that has no grid.
        """
        backend = self._backend()
        if not hasattr(backend, "grid_shape"):
            raise ValueError(
                f"{self.model!r} is a backend object, of whose grid nothing is known."
            )
        return backend.grid_shape

    def _check(self, X, *, fitting=False):
        """Check the parameters against the model, then the cells; digest them. Run nothing."""
        self._check_container()
        column = _Column(X)
        if fitting:
            backend = self._backend()
            space = self._space(
                backend
            )  # asks the checkpoint for all that it must offer
        else:
            backend, space = self._model_and_space()
        if isinstance(self.model, str | os.PathLike):
            modality = space.description[
                "modality"
            ]  # without reading the configuration
        else:
            modality = backend.modality
        digests, missing = self._identify(column, modality)
        if modality == "text":
            self._warn_of_image_files(column)
        return column, backend, space, digests, missing

    def _fit(self, column, backend, space, missing):
        """Refuse an empty column; remember the space, and what scikit-learn asks for."""
        if missing.all() and column.unreadable:
            row, error = min(column.unreadable.items(), key=lambda item: item[0])
            raise ValueError(
                f"No cell of {column} could be read ({len(column.unreadable)} of {len(missing)} "
                f"failed, the others are missing), first: {column.place(row)}: {error}."
            ) from error
        if missing.all():
            raise ValueError(
                f"All {len(missing)} cells of {column} are missing: there is nothing to encode. "
                "Leave the branch out, or check the column."
            )
        self.space_ = asdict(space) | {
            "modality": backend.modality,
            "parameters": self._deciding_parameters(),
        }
        self._store()  # resolves a relative path
        self.n_features_in_ = 1
        if isinstance(column.name, str):
            self.feature_names_in_ = np.asarray([column.name], dtype=object)
        return self

    def _transform(self, column, backend, space, digests, missing):
        """Give each row the vector of the distinct cell that it shows."""
        first_row = _first_rows(digests)
        rows = np.fromiter(first_row.values(), dtype=np.intp, count=len(first_row))
        if self.output == "tokens":
            vectors = np.full((len(digests), 1), None, dtype=object)
        else:
            vectors = np.full(
                (len(digests), space.n_features), np.nan, dtype=np.float32
            )
        for positions, values in self._vectors(column, backend, space, first_row):
            if self.output == "tokens":
                for row, value in zip(rows[positions], values, strict=True):
                    vectors[row, 0] = value
            else:
                vectors[rows[positions]] = values
        if len(rows) + missing.sum() < len(digests):
            source = np.asarray(
                [i if d is None else first_row[d] for i, d in enumerate(digests)]
            )
            repeats = np.flatnonzero(source != np.arange(len(source)))
            for some in np.array_split(repeats, len(repeats) // _COPIED_ROWS + 1):
                vectors[some] = vectors[source[some]]
        self._warn_of_unreadable(column, vectors, digests, first_row)
        return vectors

    def _encode_lacking(self, X):
        """Encode the cells that the store lacks, and say how many; `prefetch` calls this."""
        self._validate_params()
        store = self._required_store()
        if store.read_only:
            raise ValueError(
                f"{store!r} is for reading only, so nothing can be encoded into it."
            )
        column, backend, space, digests, _ = self._check(X)
        first_row = _first_rows(digests)
        lacking = np.flatnonzero(store.lacks(space, list(first_row))).tolist()
        found = self._encode(column, backend, store, space, first_row, lacking)
        return {
            "model": space.names[-1],
            "fingerprint": space.fingerprint,
            "cells": len(first_row),
            "encoded": sum(len(positions) for positions, _ in found) if lacking else 0,
        }

    def _vectors(self, column, backend, space, first_row):
        """Yield positions among the distinct cells, and vectors: the store's first, then the rest.

        `first_row` maps the digest of each distinct cell to a row that shows it.
        """
        store = self._store()
        known = np.zeros(len(first_row), dtype=bool)
        if store is not None:
            for positions, values in store.read(space, list(first_row)):
                known[positions] = True
                yield positions, values
        if not known.all():
            lacking = np.flatnonzero(~known).tolist()
            yield from self._encode(column, backend, store, space, first_row, lacking)

    def _encode(self, column, backend, store, space, first_row, lacking):
        """Encode the distinct cells at the positions `lacking`; yield positions and vectors."""
        digests, rows = list(first_row), list(first_row.values())
        n_known = len(rows) - len(lacking)
        if len(lacking):
            self._check_can_encode(
                backend, space, column.place(rows[lacking[0]]), len(lacking)
            )
        settings = getattr(self, "_image_settings", None)
        if (
            backend.modality == "text"
        ):  # longest first: texts of like length pad each other little
            lacking = sorted(lacking, key=lambda i: -len(column.cells[rows[i]]))
        digests, rows = [digests[i] for i in lacking], [rows[i] for i in lacking]
        progress = tqdm(
            desc=f"encoding {column}",
            total=len(rows),
            postfix=f"{n_known} more from the store" if n_known else None,
            unit=" cells",
            disable=not self.verbose,
        )

        def encode_chunks(chunks):
            for batch, done, values in encode(
                backend,
                chunks,
                lambda i: decode(
                    column.cells[rows[i]], backend.modality, digests[i], settings
                ),
                batch_size=None if self.batch_size == "auto" else self.batch_size,
                on_error=lambda error, i: self._raise_unless_tolerated(
                    error, column, rows[i]
                ),
            ):
                values, finite = self._checked(values, len(done), space)
                sound = [
                    i for i, is_finite in zip(done, finite, strict=True) if is_finite
                ]
                unsound = [
                    i
                    for i, is_finite in zip(done, finite, strict=True)
                    if not is_finite
                ]
                yield [i for i in batch if i not in unsound], sound, values
                progress.update(len(batch))
                for i in unsound:
                    error = ValueError(
                        "the model returned NaN or too large numbers: for the cell "
                        f"{shorten(column.cells[rows[i]])}, in {space.dtype}. Drop the cell, "
                        "mark it as missing by None, or pass errors='missing'"
                    )
                    self._raise_unless_tolerated(error, column, rows[i])
                if unsound:
                    yield unsound, [], self._checked([], 0, space)[0]

        if store is None:
            results = (result[1:] for result in encode_chunks([range(len(rows))]))
        else:
            results = store.fill(
                space,
                digests,
                encode=encode_chunks,
                claim_size=_CLAIM_SIZE[backend.modality],
            )
        order = np.asarray(lacking)
        with progress, contextlib.closing(results):
            for positions, values in results:
                yield order[positions], values
            progress.update(len(rows) - progress.n)  # what other processes have encoded

    def _check_can_encode(self, backend, space, place, n_cells):
        """Refuse to encode cells without a checkpoint, or under a key that is not its own."""
        if isinstance(backend, _AbsentCheckpoint):
            others = f" (and {n_cells - 1} more cells)" if n_cells > 1 else ""
            raise OSError(
                f"{place}{others} cannot be encoded, as its vector is not in the store and "
                f"the checkpoint cannot be read: {backend.reason} An encoder carries no weights: "
                "copy the checkpoint there, or name another place by set_params(model=...)."
            )
        if not isinstance(self.model, str | os.PathLike):
            return
        try:
            fingerprint = self._space(backend).fingerprint
        except ImportError as error:
            raise ImportError(
                f"{place} cannot be encoded, as its vector is not in the store and the model does "
                f"not run here: {error}. Install transformers and torch."
            ) from error
        if fingerprint != space.fingerprint:
            raise OSError(
                f"{self.model!r} had another fingerprint in fit, under other releases of the "
                "libraries, so that new vectors would not match the stored ones. Fit the encoder "
                "again."
            )

    def _model_and_space(self):
        """Return what offers the model, and the space of its vectors.

        A fitted encoder needs only the identity of its checkpoint. If the checkpoint cannot be
        read any more, the space of `fit` still tells which stored vectors belong to it.
        """
        backend = self._backend()
        space = self._fitted_space(backend)
        if space is None:
            space = self._space(backend)
            self._warn_of_other_vectors(space)
            return backend, space
        checkpoint = backend.checkpoint
        identity = space.description["checkpoint"]
        if "@" in identity:  # a model of the hub, at a commit
            try:
                return backend, self._space_now(backend, identity)
            except (OSError, ImportError) as error:
                return _AbsentCheckpoint(self.space_["modality"], str(error)), space
        if not checkpoint.is_directory or checkpoint.file("config.json") is None:
            place = os.path.abspath(checkpoint.model)
            reason = f"There is no directory {place!r} on this machine."
            return _AbsentCheckpoint(self.space_["modality"], reason), space
        if checkpoint.identity() == identity and self._computes_in(backend, space):
            return backend, space
        return backend, self._space_now(backend, identity)

    def _space_now(self, backend, fitted_identity):
        """Return the space of a checkpoint, and warn if it is not the one of `fit` any more."""
        space = self._space(backend)
        if space.description["checkpoint"] != fitted_identity:
            warnings.warn(
                f"The checkpoint {self.model!r} has changed since fit, so its vectors differ from "
                "those that downstream estimators were fitted on. Fit again, or restore the "
                "checkpoint (of a hub model, by revision=).",
                UserWarning,
                stacklevel=5,
            )
        return space

    def _warn_of_other_vectors(self, space):
        """Warn if parameters set after fit change the vectors by more than their precision."""
        if not hasattr(self, "space_"):
            return
        fitted, now = (
            {
                name: value
                for name, value in description.items()
                if name not in _PRECISION_ONLY
            }
            for description in (self.space_["description"], space.description)
        )
        changed = [name for name in fitted | now if fitted.get(name) != now.get(name)]
        if changed:
            warnings.warn(
                f"This encoder was fitted with other settings ({', '.join(changed)}), so its "
                "vectors differ from those that downstream estimators were fitted on. Fit again, "
                "or set the parameters back.",
                UserWarning,
                stacklevel=4,
            )

    def _computes_in(self, backend, space):
        """Tell whether the model would run in the precision of a space."""
        if self.dtype != "auto":
            return True
        try:
            return backend._dtype_name == space.description["dtype"]
        except (
            ImportError
        ):  # without its libraries it does not run, but the store can be read
            return True

    def _fitted_space(self, backend):
        """Return the space of `fit` if it still holds; None for backend objects, as a rule."""
        fitted = getattr(self, "space_", None)
        if fitted is None or not isinstance(self.model, str | os.PathLike):
            return None
        space = Space(**{name: fitted[name] for name in Space.__dataclass_fields__})
        is_known = (
            "checkpoint" in space.description
        )  # else `model` was a backend object in fit
        if not is_known or space.description["decoding"] != DECODING_VERSION:
            return None
        parameters, fitted_model = (
            self._deciding_parameters(),
            fitted["parameters"].get("model"),
        )
        if parameters | {"model": fitted_model} != fitted["parameters"]:
            return None
        if parameters["model"] == fitted_model:
            return space
        checkpoint = (
            backend.checkpoint
        )  # in another place, perhaps with the same content
        is_copy = (
            checkpoint.is_directory
            and checkpoint.identity() == space.description["checkpoint"]
        )
        return space if is_copy else None

    def _deciding_parameters(self):
        """Return the parameters that change a vector, in plain types."""
        parameters = {name: getattr(self, name) for name in _DECIDING}
        if isinstance(self.model, str | os.PathLike):
            parameters["model"] = os.fspath(self.model)
        else:
            del parameters["model"]  # a backend object describes itself
        return parameters | {
            "layer": _as_ints(self.layer),
            "store_dtype": self._store_dtype(),
        }

    def _backend(self):
        """Return what offers the model, without loading it."""
        if isinstance(self.model, str | os.PathLike):
            return HuggingFaceBackend(
                Checkpoint(
                    os.fspath(self.model),
                    self.revision,
                    self.local_files_only,
                    self.trust_remote_code,
                ),
                modality_wanted=self.modality,
                output=self.output,
                pooling_wanted=self.pooling,
                layer=_as_ints(self.layer),
                layer_aggregation=self.layer_aggregation,
                max_length_wanted=None
                if self.max_length is None
                else int(self.max_length),
                device=self.device,
                dtype=self.dtype,
            )
        lacks = [
            name
            for name in (
                "modality",
                "n_features",
                "describe",
                "weights",
                "load",
                "encoding",
            )
            if not hasattr(self.model, name)
        ]
        if lacks:
            raise TypeError(
                f"model must be a hub id, a checkpoint directory or a backend; got {self.model!r}, "
                f"which lacks {lacks}. Wrap any model in a CallableBackend."
            )
        self._check_nothing_is_ignored()
        return self.model

    def _check_nothing_is_ignored(self):
        """Refuse parameters that a backend object decides for itself."""
        defaults = inspect.signature(type(self)).parameters
        ignored = [
            name for name in _HUB_ONLY if getattr(self, name) != defaults[name].default
        ]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} would have no effect: {self.model!r} is a backend object "
                "and decides that itself."
            )
        if self.modality not in ("auto", self.model.modality):
            raise ValueError(
                f"modality={self.modality!r}, but {self.model!r} takes {self.model.modality}."
            )

    def _space(self, backend):
        """Name everything that changes a vector, and its shape, for the store."""
        own = backend.describe()
        description = own | {
            "output": self.output,
            "unit_length": bool(self.normalize or own.get("unit_length", False)),
            "decoding": DECODING_VERSION,
            "store_dtype": self._store_dtype(),
        }
        key = {name: value for name, value in description.items() if name != "label"}
        text = json.dumps(key, sort_keys=True)
        return Space(
            fingerprint=blake2b(text.encode(), digest_size=16).hexdigest(),
            description=description,
            n_features=backend.n_features,
            dtype=self._store_dtype(),
            ragged=self.output == "tokens",
        )

    def _store(self):
        if self.store is None or isinstance(self.store, EmbeddingStore):
            return self.store
        if self.store == "default":
            return EmbeddingStore()
        # Relative to the working directory of the first use, also if that changes afterwards.
        given, path = getattr(self, "_resolved_store", (None, None))
        if given != self.store:
            path = absolute(self.store)
            self._resolved_store = self.store, path
        return EmbeddingStore(path)

    def _store_dtype(self):
        """Return the precision in which vectors are stored: float32 without a store."""
        return getattr(self.store, "dtype", "float32")

    def _required_store(self):
        store = self._store()
        if store is None:
            raise ValueError("store=None keeps nothing; give the encoder a store.")
        return store

    def _check_container(self):
        """Refuse the one container that cannot hold tokens."""
        if self.output == "tokens" and output_container(self) == "polars":
            raise ValueError(
                "output='tokens' makes an object column of arrays of different lengths, which "
                "polars does not have. Use set_output(transform='pandas') or 'default'."
            )

    def _identify(self, column, modality):
        """Digest each cell, with None where it is missing; return digests and missing rows."""
        digests = [None] * len(column.cells)
        settings = getattr(self, "_image_settings", None)
        for row, cell in enumerate(column.cells):
            if is_missing(cell):
                if self.missing == "error":
                    raise ValueError(
                        f"{column.place(row)} is missing, and missing='error'. Fill the cell, or "
                        "pass missing='nan'."
                    )
                continue
            try:
                digests[row] = identify(cell, modality, settings)
            except (TypeError, ValueError, OSError) as error:
                self._raise_unless_tolerated(error, column, row)
        return digests, np.asarray([digest is None for digest in digests])

    def _checked(self, values, n_cells, space):
        """Check the shape of what the model returned; bring it to the store's precision.

        Returns the values that are finite, and for each cell whether its value is.
        """
        if n_cells == 0:
            return (
                [] if space.ragged else np.empty((0, space.n_features), np.float32)
            ), []
        values = _without_none(values, space)
        if space.ragged:
            shape = f"{n_cells} arrays of shape (n_tokens, {space.n_features})"
            arrays = [_as_array(value) for value in values]
            shapes = [array.shape for array in arrays]
            fits = len(arrays) == n_cells and all(
                a.ndim == 2 and a.shape[1] == space.n_features for a in arrays
            )
        else:
            shape = f"shape {(n_cells, space.n_features)}"
            arrays = _as_array(values)
            shapes = arrays.shape
            fits = shapes == (n_cells, space.n_features)
        if not fits:
            raise ValueError(
                f"{self.model!r} returned shape {shapes} for a batch of {n_cells} cells; "
                f"numbers of {shape} were expected. Nothing of the batch was stored."
            )
        if not space.ragged:
            vectors = self._finished(arrays, space.dtype)
            finite = np.isfinite(vectors).all(axis=1)
            return (vectors if finite.all() else vectors[finite]), finite
        arrays = [self._finished(array, space.dtype) for array in arrays]
        finite = [bool(np.isfinite(array).all()) for array in arrays]
        return list(itertools.compress(arrays, finite)), finite

    def _finished(self, vectors, dtype):
        """Scale to unit length if asked to, and round as the store does."""
        with np.errstate(over="ignore"):  # what overflows is refused
            vectors = vectors.astype(np.float32)
            if self.normalize:
                norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors /= np.maximum(norms, 1e-12)
            return vectors.astype(dtype).astype(np.float32, copy=False)

    def _raise_unless_tolerated(self, error, column, row):
        """Raise an error that names the cell, unless the cell is to count as missing."""
        if self.errors == "missing" and not isinstance(error, TypeError):
            column.unreadable[row] = without_frames(error)
            return
        kinds = (TypeError, FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{column.place(row)}: {error}.") from error

    def _warn_of_unreadable(self, column, vectors, digests, first_row):
        """Warn of cells that have content but no vector, of each once a process."""
        first = vectors[:, 0]
        empty = [v is None for v in first] if first.dtype == object else np.isnan(first)
        lost = [
            row for row in np.flatnonzero(empty) if not is_missing(column.cells[row])
        ]
        errors = {}
        for row in lost:
            shown = row if row in column.unreadable else first_row.get(digests[row])
            errors[row] = column.unreadable.get(shown) or ValueError(
                "there is no vector"
            )
        keys = {
            row: _key(str(column), digests[row] or str(errors[row])) for row in lost
        }
        unannounced = [row for row in lost if keys[row] not in _ANNOUNCED]
        if not unannounced:
            return
        counts = Counter(_reason(error) for error in errors.values())
        reasons = ", ".join(
            f"{count} x {reason}" for reason, count in counts.most_common()
        )
        row = unannounced[0]
        warnings.warn(
            f"{len(lost)} cells of {column} could not be read and count as missing ({reasons}), "
            f"first: {column.place(row)}: {errors[row]}.",
            UserWarning,
            stacklevel=3,
        )
        _announce(keys.values())  # not if the warning was made an error

    def _warn_of_image_files(self, column):
        """Warn if a text model is given the names of image files."""
        texts = [cell for cell in column.cells[:_LOOKED_AT] if isinstance(cell, str)]
        key = _key("image files", str(column))
        if not texts or key in _ANNOUNCED or not all(map(names_image_file, texts)):
            return
        warnings.warn(
            f"The cells of {column} are the names of image files, such as {texts[0]!r}, and "
            f"{self.model!r} encodes text: it reads the names, not the images. Choose an image "
            "model, or modality='image' if the model encodes both.",
            UserWarning,
            stacklevel=4,
        )
        _announce([key])

    def __getstate__(self):
        """Carry what other processes cannot know: the store's place, how images can be read."""
        state = dict(super().__getstate__())
        state.pop("_resolved_store", None)
        if isinstance(self.store, str | os.PathLike) and self.store != "default":
            with contextlib.suppress(OSError, ValueError):  # which `transform` raises
                path = self._store().path
                state["store"] = path if isinstance(self.store, str) else Path(path)
        if "SKLEMBED_STORE" in os.environ:
            with contextlib.suppress(OSError, ValueError):
                default_path()  # makes it absolute for processes that are started from here
        settings = self._merged_image_settings()
        if settings:
            state["_image_settings"] = settings
        return state

    def _merged_image_settings(self):
        """Return the settings of this process, and those that the encoder came with."""
        merged = dict(getattr(self, "_image_settings", {}))
        for name, values in image_settings().items():
            merged[name] = merged.get(name, {}) | values
        return merged

    def __sklearn_clone__(self):
        copy = super().__sklearn_clone__()
        for name in ("_resolved_store", "_image_settings"):
            if hasattr(self, name):
                setattr(copy, name, getattr(self, name))
        return copy

    def __sklearn_is_fitted__(self):
        return True  # stateless: there is nothing to learn

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = (
            True  # cells are objects, checked here and not by check_array
        )
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


@dataclass(frozen=True)
class _AbsentCheckpoint:
    """Stands for a checkpoint that cannot be read, while stored vectors are served."""

    modality: str
    reason: str


class _Column:
    """One column of cells, and how to name a place in it."""

    def __init__(self, X):
        self.name = None
        self.unreadable = {}  # errors of cells that count as missing, by row
        if hasattr(X, "column_names"):  # of pyarrow or Hugging Face datasets
            _check_is_one_column(X, X.column_names)
            self.name = X.column_names[0]
            X = X[self.name]
        self.name = getattr(X, "column_name", self.name)  # of a column of datasets
        self.labels = getattr(X, "index", None) if hasattr(X, "iloc") else None
        if is_frame(X):
            _check_is_one_column(X, list(X.columns))
            X = X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]
        if hasattr(X, "to_list") and hasattr(X, "name"):  # a pandas or polars Series
            self.name = X.name
            self.cells = X.to_list()
        else:
            self.cells = _list_cells(X)
        if not self.cells:
            raise ValueError(
                f"{self} has 0 cells (0 samples), and at least one is needed: the table is empty."
            )

    def __str__(self):
        return "the column" if self.name is None else f"column {self.name!r}"

    def place(self, row):
        """Name a cell for a message, by its position and, where there is one, its index label."""
        if self.labels is None:
            return f"Row {row} of {self}"
        label = self.labels[row]
        label = label.item() if isinstance(label, np.generic) else label
        return f"Row {row} (index {label!r}) of {self}"


def _check_is_one_column(X, names):
    """Refuse a table of several columns, and a dict of tables."""
    if not isinstance(names, list):
        raise TypeError(
            f"X must be one column of cells; got {X!r}. Choose one of its splits."
        )
    if len(names) != 1:
        raise ValueError(
            f"FrozenEncoder takes one column, but X has {len(names)}: {names}. "
            "Select one, or give each its own encoder in a PerModalityUnion."
        )


def _list_cells(X):
    """List the cells of an array or a list, flat or of one column."""
    if hasattr(X, "to_pylist"):  # a pyarrow array
        return X.to_pylist()
    if hasattr(X, "column_name") and hasattr(X, "features"):  # of Hugging Face datasets
        return list(_undecoded(X)[:])
    if isinstance(X, pd.api.extensions.ExtensionArray):
        return X.tolist()
    if not isinstance(X, np.ndarray | list | tuple):
        raise TypeError(
            f"X must be one column of cells: a DataFrame, Series, array or list; got {X!r}."
        )
    if isinstance(X, np.ndarray):
        if X.ndim > 2 or (X.ndim == 2 and X.shape[1] != 1):
            raise ValueError(
                f"FrozenEncoder takes one column of cells, but X has shape {X.shape}. Select a "
                "column; pass a stack of pictures as list(X)."
            )
        return X.reshape(-1).tolist()
    cells = list(X)
    if cells and all(
        isinstance(cell, list | tuple) and len(cell) == 1 for cell in cells
    ):
        cells = [cell for (cell,) in cells]
    return cells


def _undecoded(column):
    """Take images as they are encoded, not as the pixels of the whole column at once."""
    if getattr(column.features, "decode", False) and hasattr(
        column.source, "cast_column"
    ):
        encoded = type(column.features)(decode=False)
        return column.source.cast_column(column.column_name, encoded)[
            column.column_name
        ]
    return column


def _without_none(values, space):
    """Put NaN where a function, such as the client of a service, returns None for a cell."""
    if not isinstance(values, list | tuple) or not any(
        value is None for value in values
    ):
        return values
    shape = (1, space.n_features) if space.ragged else space.n_features
    return [np.full(shape, np.nan) if value is None else value for value in values]


def _key(*parts):
    """Digest what identifies a warning, in little space."""
    return blake2b(repr(parts).encode(errors="replace"), digest_size=8).digest()


def _announce(keys):
    """Note what this process has warned of."""
    if len(_ANNOUNCED) > _ANNOUNCED_LIMIT:
        _ANNOUNCED.clear()
    _ANNOUNCED.update(keys)


def _reason(error):
    """Name the kind of an error, without what differs from cell to cell."""
    cause = error.__cause__ or error
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    if type(cause).__name__ == "UnidentifiedImageError":
        return "no known image format"
    text = re.sub(r"'[^']*'|\([^)]*\)", "", str(cause))
    return (
        re.sub(r"\d+", "N", re.split(r"[.:;]", text)[0]).strip() or type(cause).__name__
    )


def _as_array(vectors):
    """Bring home what users' functions return besides arrays: torch tensors, sparse matrices."""
    if hasattr(vectors, "detach"):
        from sklembed._torch import to_numpy

        return to_numpy(vectors)
    return vectors.toarray() if hasattr(vectors, "toarray") else np.asarray(vectors)


def _as_ints(layer):
    """Bring a layer or a list of them to Python's integers, which JSON knows."""
    if isinstance(layer, Integral):
        return int(layer)
    return tuple(int(i) if isinstance(i, Integral) else i for i in layer)


def _by_position(chunks):
    """Map positions to vectors, out of chunks of both."""
    return {
        int(position): value
        for positions, values in chunks
        for position, value in zip(positions, values, strict=True)
    }


def _relative_error(vectors, reference):
    """Measure how far vectors are from others; tokens of another number are infinitely far."""
    if vectors.shape != reference.shape:
        return np.inf
    return np.linalg.norm(vectors - reference) / max(np.linalg.norm(reference), 1e-12)


def _first_rows(digests):
    """Map each distinct digest to the first row that shows it."""
    rows = {}
    for row, digest in enumerate(digests):
        if digest is not None:
            rows.setdefault(digest, row)
    return rows
