"""FrozenEncoder: hash cells, read stored vectors, and encode the remaining cells."""

import contextlib
import inspect
import itertools
import json
import os
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from numbers import Integral
from pathlib import Path

import numpy as np
from sklearn.base import (
    BaseEstimator,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils._pprint import _EstimatorPrettyPrinter

from sklembed._display import DocLinkMixin, progress_bar
from sklembed._table.columns import output_container
from sklembed.encoders.backends import MODALITIES
from sklembed.encoders.cells import (
    DECODING_VERSION,
    DRAFT_RATIO,
    decode,
    hash_text,
    identify,
    image_settings,
    is_missing,
    n_pixels,
    names_image_file,
    shorten,
)
from sklembed.encoders.checkpoints import Checkpoint
from sklembed.encoders.column import Column
from sklembed.encoders.cpu import has_bfloat16
from sklembed.encoders.database import Space, absolute, default_path
from sklembed.encoders.exported import Export, ExportedBackend, write_export
from sklembed.encoders.huggingface import POOLINGS, HuggingFaceBackend
from sklembed.encoders.inference import encode, load_encoding, without_frames
from sklembed.encoders.joint import fill_stores
from sklembed.encoders.networks import directory_beside
from sklembed.encoders.runtimes import (
    RUNTIMES,
    TOLERANCES,
    Plan,
    RefusedError,
    UnavailableError,
    candidates,
    log_once,
    relative_error,
)
from sklembed.encoders.static import StaticBackend
from sklembed.encoders.store import EmbeddingStore

# Cells per claim. Larger claims cost less, smaller claims spread work over processes.
_CLAIM_SIZE = {"text": 128, "image": 64}
# Parameters that change a vector, besides the content of the checkpoint and the
# precision of the store.
_VECTOR_PARAMETERS = (
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
# Entries of a description that change vectors by rounding at most.
_PRECISION_ENTRIES = ("dtype", "runtime", "instructions", "store_dtype", "label")
# Cells from which on exporting a network for a runtime takes less time than it saves.
_WORTH_EXPORTING = {"text": 2000, "image": 256}
_ESTIMATE_CELLS = 64
_ESTIMATE_UNTIMED = 8  # one in so many cells is encoded before the others are timed
_N_SAMPLE_CELLS = 20  # of a text column, searched for names of image files
# A backend object sets these itself, so the parameters would have no effect.
_CHECKPOINT_PARAMETERS = (
    "pooling",
    "layer",
    "layer_aggregation",
    "max_length",
    "device",
    "dtype",
    "revision",
    "local_files_only",
    "trust_remote_code",
    "allow_pickle",
)
_BACKEND_ATTRIBUTES = (
    "modality",
    "n_features",
    "describe",
    "weights",
    "load",
    "encoding",
)


class FrozenEncoder(DocLinkMixin, TransformerMixin, BaseEstimator):
    """Embed a column of texts or images with a frozen pretrained model.

    Each distinct cell is encoded only once. A store on disk keeps every vector under
    the hash of the cell's content and the fingerprint of the model. Cross-validation
    folds, candidates of a grid search, clones, worker processes and later runs read it
    from there. One inference per sample is also the scheme of arXiv 2502.02048 and
    2406.02601.

    `transform` works without `fit`, and `fit` never runs the model. Pickles and clones
    carry no weights; a model is loaded once per process, when there is a cell to
    encode. A fitted encoder remembers the key of its vectors. Until a parameter that
    changes vectors is set, it returns stored vectors without the checkpoint and without
    transformers.

    Parameters
    ----------
    model : str, path or backend
        A local checkpoint directory or hub id of a text or vision model that
        transformers' ``AutoModel`` can load, of a dual encoder such as CLIP, or of
        static token embeddings (model2vec, or StaticEmbedding of
        sentence-transformers), which numpy averages without torch; a directory that
        :meth:`export` has written; or a backend object, such as
        :class:`CallableBackend`. The files of a sentence-transformers directory define
        its pooling, normalisation and maximum length.

    modality : {"auto", "text", "image"}, default="auto"
        Modality of the cells. "auto" infers it from the model; required for dual
        encoders such as CLIP.

    output : {"pooled", "tokens"}, default="pooled"
        Whether to return one vector per cell, or the vectors of its tokens (words,
        image patches, cells of a convolutional feature map). Tokens are one object
        column of arrays of shape (n_tokens, n_features), with None for missing cells.
        Special tokens, such as class and register tokens, are excluded. See
        :meth:`grid_shape`.

    pooling : {"auto", "mean", "cls", "max", "last", "pooler"}, default="auto"
        How the vectors of tokens are reduced to one. "auto" follows the files of
        sentence-transformers. Without these it is the projection into the common space
        for dual encoders, the class token for vision transformers, and the mean for
        texts and convolutional networks. "pooler" is the model's own pooled vector,
        before any projection. Padding is excluded.

    layer : int or list of int, default=-1
        Hidden states to use: -1 is the model's output, 0 the embeddings before the
        first layer. Intermediate layers often transfer better. They are returned
        without any final normalisation. The layers of a convolutional network are its
        feature maps: with ``output="tokens"``, -1 is the map of stride 32, -2 that of
        stride 16, and -3 that of stride 8.

    layer_aggregation : {"concat", "mean"}, default="concat"
        How the vectors of several layers are combined.

    normalize : bool, default=False
        Whether to scale vectors to unit length. A sentence-transformers model that
        normalises its vectors always does so, whatever the pooling and the layer.

    max_length : int or None, default=None
        Maximum number of tokens of a text, special tokens included. If None, the
        model's own limit.

    batch_size : int or "auto", default="auto"
        Number of cells in a batch. "auto" fills batches by their number of tokens. It
        does not change vectors beyond rounding. A batch that exceeds the memory is
        halved.

    device : str, default="auto"
        Device to run the model on: a torch device such as "cpu" or "cuda". "auto" uses
        an accelerator if there is one.

    dtype : {"auto", "float32", "bfloat16", "float16", "int8"}, default="auto"
        Precision of the model. "auto" is bfloat16 on hardware that accelerates it
        (CUDA, CPUs with AMX, and CPUs with AVX512-BF16 on which a matrix product is
        faster in bfloat16), else float32. "int8" quantises the weights and needs ONNX
        Runtime; its vectors deviate visibly and differ between processors. The
        precision is part of the key of a vector. If the checkpoint is absent, a fitted
        encoder returns vectors in the precision of `fit`. Vectors are always returned
        as float32. A vector depends on its batch only by rounding: the relative error
        is below 1e-5 in float32 and 3e-2 in bfloat16.

    runtime : {"auto", "torch", "openvino", "onnx"}, default="auto"
        Library that runs the model on a CPU. "auto" is the fastest installed one that
        passes a check: OpenVINO, ONNX Runtime, then torch. The network of the model is
        exported once, next to the store, and its vectors are compared with torch.
        "auto" exports only if a call encodes enough cells to gain time, 2000 texts or
        256 images. A network that cannot be exported, or deviates, is run by torch, and
        the logger ``sklembed`` says why. In float32 all runtimes share the stored
        vectors: they agree to 1e-4 of the length. In bfloat16 and int8 the runtime is
        part of the key. Install them by the extras ``openvino`` and ``onnx``.

    store : "default", path, EmbeddingStore or None, default="default"
        Store of the vectors, including those of `transform`. None disables it, and
        ``EmbeddingStore(path, read_only=True)`` only reads.
        ``EmbeddingStore(path, dtype="float16")`` stores vectors in half precision. A
        relative path is made absolute when it is first used, and in pickles, so that
        worker processes use the same file.

    missing : {"nan", "error"}, default="nan"
        How to treat None and NaN cells: return a row of NaN, or raise an error.

    errors : {"raise", "missing"}, default="raise"
        How to treat a file that is absent, an image that cannot be decoded or a cell
        for which the model returns NaN: raise an error that names the row, or treat the
        cell as missing. A warning then counts such cells by reason and names the first.
        Each cell is reported once per process, so that a search does not repeat it for
        every fold. The downstream estimator has to accept the row of NaN.

    revision : str or None, default=None
        Branch, tag or commit of a hub model.

    local_files_only : bool, default=False
        Whether to stay offline and use the hub's local cache only.

    trust_remote_code : bool, default=False
        Whether to run modelling code from a hub repository.

    allow_pickle : bool, default=False
        Whether to read weights from pickles, such as ``pytorch_model.bin``, if the
        checkpoint has no safetensors. Only tensors and plain containers are unpickled.

    verbose : int, default=0
        Verbosity. If greater than 0, a progress bar shows the rate of encoding and the
        number of stored cells.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    space_ : dict
        Key and shape of the vectors: "fingerprint", "description", "n_features",
        "dtype", "ragged", "modality", and the "parameters" that determine them.

    See Also
    --------
    PerModalityUnion : Gives each column of a table its own encoder.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> def load():
    ...     return lambda images: np.array([np.asarray(i).mean((0, 1)) for i in images])
    >>> colour = CallableBackend(
    ...     load, name="colour", version="1", modality="image", n_features=3
    ... )
    >>> red = np.full((8, 8, 3), [200, 0, 0], dtype=np.uint8)
    >>> FrozenEncoder(colour, store=None).transform([red, None])
    array([[200.,   0.,   0.],
           [ nan,  nan,  nan]], dtype=float32)
    """

    _keeps_missing_rows = True  # rows of missing cells stay missing in PerModalityUnion
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
        "dtype": [StrOptions({"auto", "float32", "bfloat16", "float16", "int8"})],
        "runtime": [StrOptions({"auto", "torch", *RUNTIMES})],
        "store": [str, os.PathLike, EmbeddingStore, None],
        "missing": [StrOptions({"nan", "error"})],
        "errors": [StrOptions({"raise", "missing"})],
        "revision": [str, None],
        "local_files_only": ["boolean"],
        "trust_remote_code": ["boolean"],
        "allow_pickle": ["boolean"],
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
        runtime="auto",
        store="default",
        missing="nan",
        errors="raise",
        revision=None,
        local_files_only=False,
        trust_remote_code=False,
        allow_pickle=False,
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
        self.runtime = runtime
        self.store = store
        self.missing = missing
        self.errors = errors
        self.revision = revision
        self.local_files_only = local_files_only
        self.trust_remote_code = trust_remote_code
        self.allow_pickle = allow_pickle
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Validate parameters and input. The model is not run.

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
            If a cell is not of the modality, all cells are missing, `X` does not have
            exactly one column, or the model cannot be found.
        """
        self._fit(*self._validate(X, fitting=True))
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y=None):
        """Fit and transform, hashing each cell only once.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        y : None
            Ignored.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors; NaN for missing cells. For ``output="tokens"`` of shape
            (n_samples, 1) and dtype object: arrays of shape (n_tokens, n_features),
            dtype float32; None for missing cells.
        """
        column, backend, space = self._validate(X, fitting=True)
        self._fit(column, backend, space)
        return self._transform(column, backend, space)

    def transform(self, X):
        """Return a vector for each cell, from the store or the model.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors; NaN for missing cells. For ``output="tokens"`` of shape
            (n_samples, 1) and dtype object: arrays of shape (n_tokens, n_features),
            dtype float32; None for missing cells.

        Raises
        ------
        TypeError, ValueError, OSError
            As in `fit`; also if a cell cannot be decoded, if the model returns NaN for
            a cell, and if a cell is not stored and the checkpoint cannot be read. Cells
            encoded before the error are in the store.
        """
        self._validate_params()
        column, backend, space = self._validate(X)
        fitted_name = getattr(self, "feature_names_in_", [None])[0]
        if isinstance(column.name, str) and fitted_name not in (None, column.name):
            raise ValueError(
                "The feature names should match those that were passed during fit: "
                f"this encoder was fitted on {fitted_name!r}, and X is {column.name!r}."
            )
        return self._transform(column, backend, space)

    def get_feature_names_out(self, input_features=None):
        """Return the names of the output columns. The model is not run.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            "frozenencoder0", "frozenencoder1", and so on; a single name for tokens.
        """
        n_columns = 1
        if self.output == "pooled":
            n_columns = self._backend_and_space()[1].n_features
        return np.asarray([f"frozenencoder{i}" for i in range(n_columns)], dtype=object)

    def fingerprint(self):
        """Return the key of this encoder configuration in the store.

        Returns
        -------
        fingerprint : str
            A hash of everything that changes a vector, for :meth:`EmbeddingStore.clear`
            and :meth:`EmbeddingStore.export`.
        """
        return self._backend_and_space()[1].fingerprint

    def digests(self, X):
        """Return the keys of cells in the store, to join exported vectors with a table.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        digests : ndarray of shape (n_samples,), dtype object
            Hashes of the cells' content, in hexadecimal; None for missing cells.
        """
        self._validate_params()
        column, _, _ = self._validate(X)
        digests = np.full(len(column), None, dtype=object)
        for row in np.flatnonzero(~column.missing):
            digests[row] = column.keys[row].hex()
        return digests

    def stats(self):
        """Return store statistics for this encoder: rows, bytes, hits.

        Returns
        -------
        stats : dict
            The "model", its "pooling" and "layer", and "unit_length", whether vectors
            have length 1; None where a model does not state it. Current "rows" and
            "bytes"; the numbers of vectors ever "encoded" and "served", by any process
            and clone; the "hit_rate", the served fraction of both. The "runtime" and
            "dtype" in which a new cell would be encoded; None if the checkpoint cannot
            be read or a function encodes.

        Raises
        ------
        ValueError
            If the encoder has no store.
        """
        self._validate_params()
        stats = self._required_store().stats()
        stats = stats[["rows", "bytes", "encoded", "served", "hit_rate"]]
        backend, space = self._backend_and_space()
        counts = dict.fromkeys(stats.columns, 0) | {"hit_rate": np.nan}
        if space.fingerprint in stats.index:
            counts = stats.astype(object).loc[space.fingerprint].to_dict()
        return space.settings() | counts | self._how_it_runs(backend)

    def _how_it_runs(self, backend):
        """Return the runtime and the precision in which a cell would be encoded."""
        unknown = {"runtime": None, "dtype": None}
        if isinstance(backend, _AbsentCheckpoint):
            return unknown
        try:
            plan = self._plan(backend, None, [])
            runtime = getattr(backend, "exported_runtime", None)
            if hasattr(backend, "network_key"):
                runtime = plan.choice(backend.network_key, backend.network_use)
        # No model runs on this machine.
        except (ImportError, OSError, UnavailableError):
            return unknown
        if runtime == "torch" and not hasattr(backend, "runtimes"):
            runtime = None  # a backend object may hold a function
        return {"runtime": runtime, "dtype": plan.precision}

    def verify(self, X, n_samples=100, random_state=None):
        """Encode a sample of stored cells again and compare with the stored vectors.

        The store contains no cells, so `X` is needed to encode them. Vectors may drift
        when a library that decodes, tokenises or multiplies is updated.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        n_samples : int, default=100
            Maximum number of distinct stored cells to compare.

        random_state : int, RandomState instance or None, default=None
            Seeds the choice of cells. Pass an int for reproducible results.

        Returns
        -------
        report : dict
            "compared", the number of cells; "median_error" and "max_error", the length
            of the difference relative to that of the stored vector; and "tolerance",
            the error that rounding may cause in this precision. Above it the stored
            vectors are stale: delete them by :meth:`EmbeddingStore.clear`.

        Raises
        ------
        ValueError
            If the encoder has no store, the store has none of the cells, or a stored
            cell cannot be encoded any more.
        """
        self._validate_params()
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1; got {n_samples}.")
        store = self._required_store()
        column, backend, space = self._validate(X)
        positions = np.flatnonzero(~store.lacks(space, column.distinct_keys()))
        if not len(positions):
            raise ValueError(
                f"The store has none of the {len(column.rows)} distinct cells of "
                f"{column}; transform them first."
            )
        rng = check_random_state(random_state)
        size = min(n_samples, len(positions))
        positions = np.sort(rng.choice(positions, size, replace=False))
        stored = _by_position(store.read(space, column.distinct_keys(positions)))
        encoded = _by_position(self._encode(column, backend, space, positions, None))
        # `stored` counts within the sample, `encoded` within all distinct cells.
        errors = []
        for i, vector in stored.items():
            position = positions[i]
            if position not in encoded:
                place = column.place(column.rows[position])
                raise ValueError(f"{place} is stored, but cannot be encoded any more.")
            errors.append(relative_error(encoded[position], vector))
        model_tolerance = TOLERANCES.get(space.description.get("dtype"), 0)
        return {
            "compared": len(errors),
            "median_error": float(np.median(errors)),
            "max_error": float(np.max(errors)),
            "tolerance": max(model_tolerance, TOLERANCES[space.dtype]),
        }

    def warm_up(self):
        """Load the model, so that the first cell does not wait for it.

        A service calls it once when it starts. A network for a faster runtime is
        exported only if `runtime` names that runtime, or `dtype` needs it; the network
        of a backend object needs a cell, and is exported by the first call.

        Returns
        -------
        self : FrozenEncoder
            The encoder.

        Raises
        ------
        ValueError, OSError
            If the checkpoint cannot be read.
        """
        self._validate_params()
        backend, space = self._backend_and_space()
        self._check_can_encode(backend, space, "A cell", 1)
        encoding, lock = self._load(backend, space, None, [])
        cells = encoding.network.trial()[:2] if encoding.network else []
        if cells:
            with lock:
                encoding.forward(cells)  # also tests which cells may share a batch
        return self

    def export(self, directory, *, runtime="onnx"):
        """Write the model to a directory that encodes texts without torch.

        Pass the directory as `model` on a machine or in a process that has neither
        torch nor transformers loaded: ``FrozenEncoder(directory)`` needs the runtime
        and tokenizers only. Its vectors have the fingerprint of this encoder, so that
        both share a store. They are compared with torch when the directory is written.

        Parameters
        ----------
        directory : str or path
            The directory. An earlier export is replaced.

        runtime : {"onnx", "openvino"}, default="onnx"
            The runtime that runs the network, on a CPU.

        Raises
        ------
        ValueError
            If the model encodes images or tokens, is not a checkpoint for transformers,
            runs in a precision other than float32 and int8, or has a tokenizer written
            in Python; or if the vectors of the export differ from torch.
        ImportError
            If the runtime is not installed.
        FileExistsError
            If the directory has files that are no export.

        See Also
        --------
        sklembed.to_onnx : Write the estimators after an encoder.

        Examples
        --------
        >>> import tempfile
        >>> from sklembed import FrozenEncoder
        >>> from sklembed.encoders import minilm
        >>> encoder = FrozenEncoder(minilm(), dtype="float32", store=None)
        >>> directory = tempfile.mkdtemp()
        >>> encoder.export(directory, runtime="openvino")
        >>> FrozenEncoder(directory, store=None).transform(["a red cat"]).shape
        (1, 384)
        """
        self._validate_params()
        if runtime not in RUNTIMES:
            raise ValueError(
                f"runtime must be one of {sorted(RUNTIMES)}; got {runtime!r}."
            )
        backend = self._backend()
        if not isinstance(backend, HuggingFaceBackend):
            raise ValueError(
                f"{self.model!r} is no checkpoint for transformers, so that it cannot be "
                "exported. Static token embeddings need no export: they run in numpy."
            )
        backend = replace(backend, device="cpu", runtime=runtime)
        if backend.dtype_name not in ("float32", "int8"):
            raise ValueError(
                f"This encoder runs in {backend.dtype_name} on this machine, and other "
                "processors have other vectors. Export FrozenEncoder(dtype='float32')."
            )
        write_export(backend, directory, runtime)

    def estimate(self, X, n_samples=_ESTIMATE_CELLS):
        """Estimate how long the cells of a column take, and how much space.

        A sample of the cells that are not stored is encoded, and stored. If a call with
        all cells would export the network for a faster runtime, it takes less time.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        n_samples : int, default=64
            Maximum number of cells to encode and time.

        Returns
        -------
        estimate : dict
            "cells", the number of distinct cells; "stored", the number of cells that
            the store had; "seconds" to encode the others, without loading the model;
            and "megabytes" of their vectors in the store.
        """
        self._validate_params()
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1; got {n_samples}.")
        column, backend, space = self._validate(X)
        store = self._store()
        missing = np.arange(len(column.rows))
        if store is not None:
            missing = np.flatnonzero(store.lacks(space, column.distinct_keys()))
        seconds, n_values = 0.0, 0
        if len(missing):
            sample = self._spread(column, missing, n_samples)
            # A larger sample, so that no cell is compared with torch while it is timed.
            checked = self._spread(column, missing, max(n_samples, _ESTIMATE_CELLS))
            self._load(backend, space, column, column.rows[checked].tolist())
            # The first cells take longer, and are not timed if there are others.
            is_first = np.arange(len(sample)) % _ESTIMATE_UNTIMED == 0
            for part in filter(len, (sample[is_first], sample[~is_first])):
                tick, n_values = time.perf_counter(), 0
                for _, vectors in self._encode(column, backend, space, part, store):
                    n_values += sum(vector.size for vector in vectors)
                seconds = time.perf_counter() - tick
            ratio = len(missing) / len(part)
            seconds, n_values = ratio * seconds, ratio * n_values
        return {
            "cells": len(column.rows),
            "stored": len(column.rows) - len(missing),
            "seconds": seconds,
            "megabytes": n_values * np.dtype(space.dtype).itemsize / 1e6,
        }

    def _spread(self, column, positions, n_samples):
        """Choose positions of cells that are spread evenly over all lengths."""
        cells = [column.cells[row] for row in column.rows[positions]]
        if all(isinstance(cell, str) for cell in cells):
            lengths = [len(cell) for cell in cells]
            positions = positions[np.argsort(lengths, kind="stable")]
        n_chosen = min(n_samples, len(positions))
        # The middle of each of `n_chosen` equal parts.
        places = (np.arange(n_chosen) + 0.5) * len(positions) / n_chosen
        return np.sort(positions[places.astype(int)])

    def grid_shape(self):
        """Return the rows and columns of the patches of an image.

        Tokens are ordered row by row.

        Returns
        -------
        shape : tuple of int
            Rows and columns.

        Raises
        ------
        ValueError
            If the model encodes text, keeps the proportions of each image, or is a
            backend object without a `grid_shape`.
        """
        backend = self._backend()
        if not hasattr(backend, "grid_shape"):
            raise ValueError(
                f"grid_shape() is not available for the backend object {self.model!r}."
            )
        return backend.grid_shape

    def _validate(self, X, *, fitting=False, known=()):
        """Validate the parameters and the cells. Return column, backend and space.

        If one of the `known` columns has the same cells, it is returned instead.
        """
        self._check_container()
        column = Column(X)
        if fitting:
            backend = self._backend()
            # Describing the space checks the parameters against the checkpoint.
            space = self._space(backend)
        else:
            backend, space = self._backend_and_space()
        if isinstance(self.model, str | os.PathLike):
            # Not `backend.modality`, which would read the configuration.
            modality = space.description["modality"]
        else:
            modality = backend.modality
        settings = getattr(self, "_image_settings", None)
        column.reading = modality, self.missing, self.errors, repr(settings)
        for other in known:
            if column.equals(other):
                return other, backend, space
        column.set_keys(list(self._hash_cells(column, modality)))
        if modality == "text":
            self._warn_of_image_files(column)
        return column, backend, space

    def _check_container(self):
        """Raise an error if the output container does not support tokens."""
        if self.output == "tokens" and output_container(self) == "polars":
            raise ValueError(
                "output='tokens' returns an object column of arrays of different "
                "lengths, which polars does not support. Use "
                "set_output(transform='pandas') or 'default'."
            )

    def _hash_cells(self, column, modality):
        """Yield the hash of each cell; None for missing cells."""
        settings = getattr(self, "_image_settings", None)
        is_text = modality == "text"
        for row, cell in enumerate(column.cells):
            if is_text and type(cell) is str:  # the most frequent kind of cell
                yield hash_text(cell)
                continue
            key = None
            if not is_missing(cell):
                try:
                    key = identify(cell, modality, settings)
                except (TypeError, ValueError, OSError) as error:
                    self._raise_or_record(error, column, row)
            elif self.missing == "error":
                raise ValueError(
                    f"{column.place(row)} is missing, and missing='error'. Fill the "
                    "cell, or pass missing='nan'."
                )
            yield key

    def _fit(self, column, backend, space):
        """Check that there is a cell to encode, and set the fitted attributes."""
        n_cells, n_errors = len(column), len(column.errors)
        if column.missing.all() and column.errors:
            row = min(column.errors)
            error = column.errors[row]
            raise ValueError(
                f"No cell of {column} could be read ({n_errors} of {n_cells} failed, "
                f"the others are missing), first: {column.place(row)}: {error}."
            ) from error
        if column.missing.all():
            raise ValueError(
                f"All {n_cells} cells of {column} are missing: there is nothing to "
                "encode. Remove the branch, or check the column."
            )
        self.space_ = asdict(space) | {
            "modality": backend.modality,
            "parameters": self._vector_parameters(),
        }
        self._store()  # resolves a relative path
        self.n_features_in_ = 1
        if isinstance(column.name, str):
            self.feature_names_in_ = np.asarray([column.name], dtype=object)

    def _transform(self, column, backend, space):
        """Return the vector of each row."""
        pieces = self._read_or_encode(column, backend, space)
        vectors = column.scatter(pieces, space.n_features, ragged=space.ragged)
        column.warn_of_errors(stacklevel=2)
        return vectors

    def _share_to_encode(self, X):
        """Return the share of distinct cells that are not stored."""
        self._validate_params()
        column, _, space = self._validate(X)
        store = self._store()
        if store is None or not len(column.rows):
            return 1.0
        return float(np.mean(store.lacks(space, column.distinct_keys())))

    def _passes(self, backend):
        """Return a key of passes that encoders with equal keys share, or None."""
        passes = getattr(backend, "passes", None)
        if passes is None or self.store is None:
            return None
        store = self._store()
        return passes, str(store.path), store.dtype, self.batch_size, self.errors

    @staticmethod
    def _fill_jointly(jobs):
        """Fill the stores of encoders that share passes; for unions.

        `jobs` are pairs of an encoder and its column.
        """
        fill_stores((job for job in jobs if job[0]._keeps_vectors()), alone=False)

    def _keeps_vectors(self):
        """Return whether a vector in the store will probably be there when it is read."""
        if self.store is None:
            return False
        store = self._store()
        return not store.read_only and store.max_bytes is None and store._is_writable()

    def _read_or_encode(self, column, backend, space):
        """Yield positions of distinct cells and their vectors, stored ones first."""
        store = self._store()
        is_stored = np.zeros(len(column.rows), dtype=bool)
        if store is not None:
            for positions, vectors in store.read(space, column.distinct_keys()):
                is_stored[positions] = True
                yield positions, vectors
        if not is_stored.all():
            positions = np.flatnonzero(~is_stored)
            n_read = len(is_stored) - len(positions)
            yield from self._encode(
                column, backend, space, positions, store, n_read=n_read
            )

    def _encode(
        self, column, backend, space, positions, store, others=None, *, n_read=0
    ):
        """Encode the distinct cells at `positions`; yield positions and vectors.

        `others`, if any, takes the vectors of other encoders from the same passes. The
        progress bar shows `n_read`, the number of cells that were stored.
        """
        place = column.place(column.rows[positions[0]])
        self._check_can_encode(backend, space, place, len(positions))
        if backend.modality == "text":
            # Texts of similar length need little padding, so the longest come first.
            lengths = [len(column.cells[row]) for row in column.rows[positions]]
            order = np.argsort(np.negative(lengths), kind="stable")
            positions = positions[order]
        rows = column.rows[positions].tolist()
        progress = progress_bar(
            verbose=self.verbose,
            desc=f"encoding {column}",
            total=len(rows),
            unit=" cells",
        )
        plan = self._plan(backend, column, rows)
        plan.exporting = partial(_exporting, progress)
        if plan.precision != "float32":
            backend, space, plan = self._settle_runtime(backend, space, plan)

        def encode_chunks(chunks):
            batches = self._encode_batches(
                column, rows, backend, space, chunks, plan, others
            )
            for batch, done, vectors in batches:
                yield batch, done, vectors
                notes = []
                if plan.used is not None:
                    notes.append(f"{plan.used} in {plan.precision}")
                if n_read:
                    notes.append(f"{n_read} more from the store")
                progress.set_postfix_str(", ".join(notes), refresh=False)
                progress.update(len(batch))

        if store is None:
            results = _drop_batches(encode_chunks([range(len(rows))]))
        else:
            results = store.fill(
                space,
                column.distinct_keys(positions),
                encode=encode_chunks,
                claim_size=_CLAIM_SIZE[backend.modality],
            )
        with progress, contextlib.closing(results):
            for done, vectors in results:
                yield positions[done], vectors
            progress.update(len(rows) - progress.n)  # encoded by other processes

    def _plan(self, backend, column, rows):
        """Return how the network of a backend will be run on cells of some rows."""
        runtimes = getattr(backend, "runtimes", None)
        if runtimes is None:
            runtimes = candidates(self.runtime, "float32", on_cpu=True)
        precision = getattr(backend, "dtype_name", "float32")
        is_demanded = self.runtime in runtimes
        is_worthwhile = len(rows) >= _WORTH_EXPORTING[backend.modality]
        store = self._store()
        is_read_only = store is not None and store.read_only
        may_export = is_demanded or is_worthwhile or precision != "float32"
        settings = getattr(self, "_image_settings", None)
        image_size = getattr(backend, "image_size", None)

        def sample(n_cells):
            places = np.linspace(0, len(rows) - 1, min(n_cells, len(rows)))
            # In random order, so that cells of different lengths share a batch.
            for i in np.random.default_rng(0).permutation(places.astype(int)):
                with contextlib.suppress(ValueError, OSError):  # raised again later
                    cell = column.cells[rows[i]]
                    yield decode(cell, backend.modality, None, settings, image_size)

        return Plan(
            runtimes,
            precision,
            directory=self._networks_directory(),
            may_export=may_export and not is_read_only,
            is_demanded=is_demanded,
            cells=sample,
        )

    def _networks_directory(self):
        """Return the directory of exported networks; None if there is no place."""
        store = self._store()
        with contextlib.suppress(OSError):  # a user without a home directory
            if store is None:
                return directory_beside(default_path())
            return store.networks_directory
        return None

    def _load(self, backend, space, column, rows):
        """Load the model, and choose a runtime by cells of some rows."""
        plan = self._plan(backend, column, rows)
        if plan.precision != "float32":
            backend, space, plan = self._settle_runtime(backend, space, plan)
        return load_encoding(backend, plan.apply)

    def _settle_runtime(self, backend, space, plan):
        """Load a runtime whose name is in the key; use torch if it refuses the network.

        Raises
        ------
        ValueError
            If the user has demanded the runtime, or no other offers the precision.
        RefusedError
            If the network encodes for other encoders too.
        """
        try:
            load_encoding(backend, plan.apply)
        except RefusedError as error:
            if getattr(backend, "others", ()):
                raise
            if plan.is_demanded or plan.precision == "int8":
                raise ValueError(
                    f"{self.model!r} cannot be run in {plan.precision}: {error}. Pass "
                    "dtype='float32', or runtime='auto'."
                ) from error
            log_once(f"torch runs {backend.checkpoint.name} ({error})")
            backend = replace(backend, runtime="torch")
            plan = replace(plan, runtimes=())
            return backend, self._space(backend), plan
        return backend, space, plan

    def _encode_batches(self, column, rows, backend, space, chunks, plan, others):
        """Yield batches, their cells with a vector, and the vectors.

        Batches and chunks are lists of indices into `rows`. Cells without a vector
        follow in a separate batch, so that the vectors before an error are stored.
        """
        settings = getattr(self, "_image_settings", None)
        image_size = getattr(backend, "image_size", None)

        def decode_cell(i):
            cell, key = column.cells[rows[i]], column.keys[rows[i]]
            return decode(cell, backend.modality, key, settings, image_size)

        def count_pixels(i):
            return n_pixels(
                column.cells[rows[i]], backend.modality, settings, image_size
            )

        batches = encode(
            backend,
            chunks,
            decode_cell,
            choose_runtime=plan.apply,
            batch_size=None if self.batch_size == "auto" else self.batch_size,
            on_error=lambda error, i: self._raise_or_record(error, column, rows[i]),
            n_pixels=count_pixels,
        )
        for batch, done, values in batches:
            if not done:
                yield batch, [], []
                continue
            if others is not None:
                keys = [column.keys[rows[i]] for i in done]
                values = others.split_off(keys, values)
            vectors, is_finite = self._validate_values(values, len(done), space)
            failed = list(itertools.compress(done, ~is_finite))
            done = list(itertools.compress(done, is_finite))
            rest = list(set(batch).difference(failed))
            yield rest, done, vectors
            for i in failed:
                error = ValueError(
                    "the model returned NaN or too large numbers: cell "
                    f"{shorten(column.cells[rows[i]])}, dtype {space.dtype}. Drop the "
                    "cell, or mark it as missing by None"
                )
                self._raise_or_record(error, column, rows[i])
            if failed:
                yield failed, [], []

    def _validate_values(self, values, n_cells, space):
        """Check the shape of a batch's values, normalise and round them.

        Returns the vectors of cells with finite values, and the mask of these cells.
        """
        values = _none_to_nan(values, space)
        if space.ragged:
            expected = f"{n_cells} arrays of shape (n_tokens, {space.n_features})"
            arrays = [_as_array(value) for value in values]
            shapes = [array.shape for array in arrays]
            widths = {shape[1:] for shape in shapes}
            is_valid = len(arrays) == n_cells and widths == {(space.n_features,)}
        else:
            expected = f"shape {(n_cells, space.n_features)}"
            arrays = _as_array(values)
            shapes = arrays.shape
            is_valid = shapes == (n_cells, space.n_features)
        if not is_valid:
            raise ValueError(
                f"{self.model!r} returned shape {shapes} for a batch of {n_cells} "
                f"cells; expected numbers of {expected}. The batch was not stored."
            )
        if not space.ragged:
            vectors = self._normalize_and_round(arrays, space.dtype)
            is_finite = np.isfinite(vectors).all(axis=1)
            return vectors[is_finite], is_finite
        vectors, is_finite = [], np.zeros(n_cells, dtype=bool)
        for i, array in enumerate(arrays):
            array = self._normalize_and_round(array, space.dtype)
            is_finite[i] = np.isfinite(array).all()
            if is_finite[i]:
                vectors.append(array)
        return vectors, is_finite

    def _normalize_and_round(self, vectors, dtype):
        """Scale to unit length if `normalize`, and round to the dtype of the store."""
        with np.errstate(over="ignore"):  # infinite values are refused afterwards
            vectors = vectors.astype(np.float32)
            if self.normalize:
                norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors /= np.maximum(norms, 1e-12)
            return vectors.astype(dtype).astype(np.float32, copy=False)

    def _raise_or_record(self, error, column, row):
        """Raise an error that names the cell, or record it if `errors` is "missing"."""
        if self.errors == "missing" and not isinstance(error, TypeError):
            column.errors[row] = without_frames(error)
            return
        if isinstance(error, TypeError):
            raise TypeError(f"{column.place(row)}: {error}.") from error
        message = (
            f"{column.place(row)}: {error}. Pass errors='missing' to treat such cells as "
            "missing."
        )
        # A subclass, such as UnicodeDecodeError, may need other arguments.
        for kind in (FileNotFoundError, OSError, ValueError):
            if isinstance(error, kind):
                raise kind(message) from error

    def _warn_of_image_files(self, column):
        """Warn if a text model receives the names of image files."""
        texts = [
            cell for cell in column.cells[:_N_SAMPLE_CELLS] if isinstance(cell, str)
        ]
        if not texts or not all(map(names_image_file, texts)):
            return
        column.warn_once(
            "image files",
            f"The cells of {column} are the names of image files, such as "
            f"{texts[0]!r}, and {self.model!r} encodes text: it reads the names, not "
            "the images. Choose an image model, or modality='image' if the model "
            "encodes both.",
            stacklevel=4,
        )

    def _check_can_encode(self, backend, space, place, n_cells):
        """Check that the checkpoint is present, and that its key is that of `space`."""
        if isinstance(backend, _AbsentCheckpoint):
            if n_cells > 1:
                place = f"{place} (and {n_cells - 1} more cells)"
            raise OSError(
                f"{place} cannot be encoded, as its vector is not in the store and the "
                f"checkpoint cannot be read: {backend.reason} An encoder carries no "
                "weights: copy the checkpoint to this machine, or pass another path by "
                "set_params(model=...)."
            )
        if not isinstance(self.model, str | os.PathLike):
            return
        try:
            fingerprint = self._space(backend).fingerprint
        except ImportError as error:
            raise ImportError(
                f"{place} cannot be encoded, as its vector is not in the store and the "
                f"model cannot run: {error}. Install transformers and torch."
            ) from error
        if fingerprint != space.fingerprint:
            raise OSError(
                f"{self.model!r} had another fingerprint in fit, under other versions "
                "of the libraries, so that new vectors would not match the stored "
                "ones. Fit the encoder again."
            )

    def _backend_and_space(self):
        """Return the backend of the model and the space of its vectors.

        A fitted encoder needs only the identity of its checkpoint. If the checkpoint
        cannot be read any more, the space of `fit` still identifies the stored vectors.
        """
        backend = self._backend()
        space = self._fitted_space(backend)
        if space is None:
            space = self._space(backend)
            self._warn_of_changed_settings(space)
            return backend, space
        checkpoint = backend.checkpoint
        identity = space.description["checkpoint"]
        if "@" in identity:  # a hub model at a commit
            try:
                return backend, self._current_space(backend, identity)
            except (OSError, ImportError, UnavailableError) as error:
                return _AbsentCheckpoint(self.space_["modality"], str(error)), space
        if not checkpoint.has_config:
            place = os.path.abspath(checkpoint.model)
            reason = f"There is no directory {place!r} on this machine."
            return _AbsentCheckpoint(self.space_["modality"], reason), space
        if checkpoint.identity() == identity and self._has_precision(backend, space):
            return backend, space
        return backend, self._current_space(backend, identity)

    def _fitted_space(self, backend):
        """Return the space of `fit` if it is still valid, or None."""
        fitted = getattr(self, "space_", None)
        if fitted is None or not isinstance(self.model, str | os.PathLike):
            return None
        space = Space(**{name: fitted[name] for name in Space.__dataclass_fields__})
        # Without a checkpoint, `model` was a backend object in fit.
        has_checkpoint = "checkpoint" in space.description
        if not has_checkpoint or space.description["decoding"] != DECODING_VERSION:
            return None
        parameters = self._vector_parameters()
        model, fitted_model = parameters["model"], fitted["parameters"].get("model")
        if parameters | {"model": fitted_model} != fitted["parameters"]:
            return None
        if model == fitted_model:
            return space
        # A checkpoint at another path may have the same content.
        checkpoint = backend.checkpoint
        identity = space.description["checkpoint"]
        if checkpoint.is_directory and checkpoint.identity() == identity:
            return space
        return None

    def _current_space(self, backend, fitted_identity):
        """Return the space of a checkpoint; warn if it has changed since fit."""
        space = self._space(backend)
        if space.description["checkpoint"] != fitted_identity:
            warnings.warn(
                f"The checkpoint {self.model!r} has changed since fit, so its vectors "
                "differ from those that downstream estimators were fitted on. Fit "
                "again, or restore the checkpoint (of a hub model, by revision=).",
                UserWarning,
                stacklevel=5,
            )
        return space

    def _warn_of_changed_settings(self, space):
        """Warn if parameters set after fit change vectors beyond rounding."""
        if not hasattr(self, "space_"):
            return
        fitted, current = self.space_["description"], space.description
        changed = []
        for name in fitted | current:
            is_equal = fitted.get(name) == current.get(name)
            if not is_equal and name not in _PRECISION_ENTRIES:
                changed.append(name)
        if changed:
            warnings.warn(
                f"This encoder was fitted with other settings ({', '.join(changed)}), "
                "so its vectors differ from those that downstream estimators were "
                "fitted on. Fit again, or set the parameters back.",
                UserWarning,
                stacklevel=4,
            )

    def _has_precision(self, backend, space):
        """Return whether the model would run in the precision of a space."""
        if self.dtype in ("float32", "float16"):
            return True
        try:
            precision = getattr(backend, "precision", {})
        except (ImportError, UnavailableError):  # no model runs, but the store is read
            return True
        for name in ("dtype", "runtime", "instructions"):
            if precision.get(name) != space.description.get(name):
                return False
        return True

    def _vector_parameters(self):
        """Return the parameters that change a vector, in JSON types."""
        parameters = {name: getattr(self, name) for name in _VECTOR_PARAMETERS}
        parameters["layer"] = _as_ints(self.layer)
        parameters["store_dtype"] = self._store_dtype()
        if self.dtype != "float32" and self.runtime != "auto":
            parameters["runtime"] = self.runtime
        if isinstance(self.model, str | os.PathLike):
            parameters["model"] = os.fspath(self.model)
        else:
            del parameters["model"]  # a backend object describes itself
        return parameters

    def _backend(self):
        """Return the backend of the model, without loading it."""
        if isinstance(self.model, str | os.PathLike):
            kind, checkpoint = self._kind_and_checkpoint()
            backend = kind(
                checkpoint,
                modality_parameter=self.modality,
                output=self.output,
                pooling_parameter=self.pooling,
                layer=_as_ints(self.layer),
                layer_aggregation=self.layer_aggregation,
                max_length_parameter=self.max_length,
                device=self.device,
                dtype=self.dtype,
                runtime=self.runtime,
            )
            if self.dtype != "float32" and self._is_refused(backend):
                return replace(backend, runtime="torch")
            return backend
        absent = [name for name in _BACKEND_ATTRIBUTES if not hasattr(self.model, name)]
        if absent:
            raise TypeError(
                "model must be a hub id, a checkpoint directory or a backend; got "
                f"{self.model!r}, which lacks {absent}. Wrap any model in a "
                "CallableBackend."
            )
        self._check_ignored_parameters()
        return self.model

    def _kind_and_checkpoint(self):
        """Return the class of the backend, and the files of the model."""
        export = Export(self.model)
        if export.has_config:
            return ExportedBackend, export
        checkpoint = Checkpoint(
            os.fspath(self.model),
            self.revision,
            self.local_files_only,
            self.trust_remote_code,
            self.allow_pickle,
        )
        kind = StaticBackend if checkpoint.is_static else HuggingFaceBackend
        return kind, checkpoint

    def _is_refused(self, backend):
        """Return whether the runtime that "auto" puts in the key refused the network."""
        if self.runtime != "auto" or not has_bfloat16():  # before torch is imported
            return False
        try:
            if "runtime" not in backend.precision or backend.dtype_name == "int8":
                return False
            plan = self._plan(backend, None, [])
            return plan.refuses(backend.network_key, backend.network_use)
        except (ImportError, OSError, ValueError):  # raised again where it matters
            return False

    def _check_ignored_parameters(self):
        """Raise an error for parameters that have no effect beside a backend object."""
        signature = inspect.signature(type(self)).parameters
        ignored = []
        for name in _CHECKPOINT_PARAMETERS:
            if getattr(self, name) != signature[name].default:
                ignored.append(name)
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} would have no effect: {self.model!r} is a "
                "backend object and sets these itself."
            )
        if self.modality not in ("auto", self.model.modality):
            raise ValueError(
                f"modality={self.modality!r}, but {self.model!r} encodes "
                f"{self.model.modality}."
            )

    def _space(self, backend):
        """Describe everything that changes a vector, and its shape, for the store."""
        description = dict(backend.describe())
        has_unit_length = self.normalize or description.get("unit_length", False)
        description |= {
            "output": self.output,
            "unit_length": bool(has_unit_length),
            "decoding": DECODING_VERSION,
            "store_dtype": self._store_dtype(),
        }
        image_size = getattr(backend, "image_size", None)
        if image_size is not None:  # JPEG files are decoded at reduced size
            description["draft"] = DRAFT_RATIO * image_size
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
        """Return the store, or None."""
        if self.store is None or isinstance(self.store, EmbeddingStore):
            return self.store
        if self.store == "default":
            return EmbeddingStore()
        # A relative path refers to the working directory of its first use.
        parameter, path = getattr(self, "_resolved_store", (None, None))
        if parameter != self.store:
            path = absolute(self.store)
            self._resolved_store = self.store, path
        return EmbeddingStore(path)

    def _store_dtype(self):
        """Return the dtype of stored vectors: float32 unless the store has another."""
        return getattr(self.store, "dtype", "float32")

    def _required_store(self):
        """Return the store, or raise an error if there is none."""
        store = self._store()
        if store is None:
            raise ValueError("store=None stores no vectors; pass a store.")
        return store

    def __repr__(self, N_CHAR_MAX=700):
        """Return the call that makes the encoder; after `fit`, also its precision."""
        text = super().__repr__(N_CHAR_MAX)
        space = getattr(self, "space_", None)
        if self.dtype != "auto" or space is None or not text.endswith(")"):
            return text
        precision = space["description"].get("dtype")
        if precision is None:  # of a backend object
            return text
        return f"{text[:-1]}, dtype='auto' ({precision}))"

    def __getstate__(self):
        """Make the store's path absolute, and add this process's image settings."""
        state = dict(super().__getstate__())
        state.pop("_resolved_store", None)
        if isinstance(self.store, str | os.PathLike) and self.store != "default":
            with contextlib.suppress(OSError, ValueError):  # raised again by transform
                path = self._store().path
                state["store"] = path if isinstance(self.store, str) else Path(path)
        if "SKLEMBED_STORE" in os.environ:
            with contextlib.suppress(OSError, ValueError):
                default_path()  # makes the variable absolute for child processes
        settings = self._merged_image_settings()
        if settings:
            state["_image_settings"] = settings
        return state

    def _merged_image_settings(self):
        """Merge the image settings of this and of the pickling process."""
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
        return True  # `transform` works without `fit`

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True  # cells are objects, which check_array would refuse
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


# scikit-learn lays out an estimator within others by its method __repr__.
_EstimatorPrettyPrinter._dispatch[FrozenEncoder.__repr__] = (
    _EstimatorPrettyPrinter._pprint_estimator
)


def frozen_encoders(estimator) -> dict[str, FrozenEncoder]:
    """Return the encoders in an estimator by parameter path; "" is the estimator."""
    if not hasattr(estimator, "get_params"):
        return {}
    encoders = {}
    for path, part in [("", estimator), *estimator.get_params(deep=True).items()]:
        if isinstance(part, FrozenEncoder):
            encoders[path] = part
    return encoders


@dataclass(frozen=True)
class _AbsentCheckpoint:
    """Placeholder for a checkpoint that cannot be read, for stored vectors only."""

    modality: str
    reason: str


def _drop_batches(batches):
    """Yield indices and vectors of batches in which a cell was encoded."""
    for _, done, vectors in batches:
        if done:
            yield done, vectors


def _none_to_nan(values, space):
    """Replace None, which a function may return for a cell that failed, by NaN."""
    if not isinstance(values, list | tuple):
        return values
    shape = (1, space.n_features) if space.ragged else space.n_features
    return [np.full(shape, np.nan) if value is None else value for value in values]


def _as_array(vectors):
    """Convert an array-like, a tensor or a sparse matrix to an array."""
    if hasattr(vectors, "detach"):
        from sklembed._torch import to_numpy

        return to_numpy(vectors)
    if hasattr(vectors, "toarray"):
        return vectors.toarray()
    return np.asarray(vectors)


def _as_ints(layer):
    """Convert a layer or a list of layers to Python integers, as JSON requires."""
    if isinstance(layer, Integral):
        return int(layer)
    return tuple(int(i) if isinstance(i, Integral) else i for i in layer)


@contextlib.contextmanager
def _exporting(progress, runtime):
    """Name an export on the progress bar, and leave its time out of the rate."""
    progress.set_postfix_str(f"exporting to {runtime}, and checking")
    yield
    progress.unpause()


def _by_position(pieces):
    """Return a dict from positions to vectors."""
    vectors = {}
    for positions, values in pieces:
        vectors.update(zip(np.asarray(positions).tolist(), values, strict=True))
    return vectors
