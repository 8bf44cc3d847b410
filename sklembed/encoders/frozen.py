"""FrozenEncoder: check cells, digest them, ask the store, encode what is missing."""

import inspect
import json
import os
import warnings
from hashlib import blake2b
from numbers import Integral

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils._param_validation import Interval, StrOptions
from tqdm import tqdm

from sklembed._tables import is_frame
from sklembed.encoders.backends import MODALITIES, POOLINGS, HuggingFaceBackend, encode_batch
from sklembed.encoders.cells import DECODING_VERSION, decode, identify, is_missing
from sklembed.encoders.checkpoints import Checkpoint
from sklembed.encoders.store import EmbeddingStore

_AUTO_BATCH_SIZE = 32
# What a backend object decides for itself; given beside one, these would silently do nothing.
_HUB_ONLY = (
    "pooling",
    "max_length",
    "device",
    "dtype",
    "revision",
    "local_files_only",
    "trust_remote_code",
)


class FrozenEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turn a column of texts or images into vectors by a pretrained model that stays frozen.

    Each distinct cell is encoded once *ever*: a store on disk keeps every vector under the digest
    of the cell's content and the fingerprint of the model, so cross-validation folds, grid search
    candidates, clones, worker processes and later runs find it there (arXiv 2502.02048 and
    2406.02601 rest on the same economy: one inference a sample).

    The encoder is stateless. `transform` works without `fit`, `fit` never runs the model, and
    neither pickles nor clones carry weights; a model is loaded once a process, when there is
    something to encode.

    Parameters
    ----------
    model : str, path or backend
        A local checkpoint directory or hub id of a text or vision model that transformers'
        ``AutoModel`` knows, or of a dual encoder such as CLIP; or a backend object, such as
        :class:`CallableBackend`. For a sentence-transformers directory pooling, normalisation and
        maximum length are those of its files.

    modality : {"auto", "text", "image"}, default="auto"
        What the cells are. "auto" reads it from the model; a dual encoder needs it said.

    pooling : {"auto", "mean", "cls", "max", "last"}, default="auto"
        How a sequence of vectors becomes one. "auto" follows sentence-transformers files, else it
        is the mean for texts and convolutional networks and the class token for vision
        transformers. Padding is left out.

    normalize : bool, default=False
        Whether to scale vectors to unit length.

    max_length : int or None, default=None
        Tokens after which a text is cut; by default what the model says.

    batch_size : int or "auto", default="auto"
        Cells to a batch. It does not change vectors beyond rounding.

    device : str, default="auto"
        Where the model runs: "auto" takes an accelerator if there is one, else the CPU.

    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Precision of the model: "auto" is bfloat16 where the hardware gains by it (CUDA, CPUs with
        AMX), else float32. The precision is part of what a vector is stored under.
        Vectors are float32 either way. A vector depends on its batch only by rounding: the
        relative error is below 1e-5 in float32 and 3e-2 in bfloat16.

    store : "default", path, EmbeddingStore or None, default="default"
        Where vectors are kept. ``None`` keeps none.

    missing : {"nan", "error"}, default="nan"
        What becomes of None and NaN cells: a row of NaN, or an error.

    errors : {"raise", "missing"}, default="raise"
        What to do about a file that is absent or an image that cannot be decoded: raise, naming
        the row, or warn once a call and treat the cell as missing. The row of NaN then reaches
        whatever comes next in the pipeline, which has to take it.

    revision : str or None, default=None
        Branch, tag or commit of a hub model.

    local_files_only : bool, default=False
        Whether to stay offline and use the hub's local cache only.

    trust_remote_code : bool, default=False
        Whether to run modelling code that a hub repository brings.

    verbose : int, default=0
        Above 0, shows a progress bar while encoding.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns seen during fit: one.

    feature_names_in_ : ndarray of shape (1,)
        The column's name, where `X` has one.

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

    _parameter_constraints: dict = {
        "model": "no_validation",  # checked by _backend
        "modality": [StrOptions({"auto", *MODALITIES})],
        "pooling": [StrOptions({"auto", *POOLINGS})],
        "normalize": ["boolean"],
        "max_length": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
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
        pooling="auto",
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
        self.pooling = pooling
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
        column = _Column(X)
        backend = self._backend()
        self._fingerprint(backend)  # asks the checkpoint for all that it must offer
        _, missing = self._identify(column, backend.modality)
        return self._fit(column, missing)

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
            The vectors; NaN for missing cells.
        """
        column = _Column(X)
        digests, missing = self._identify(column, self._backend().modality)
        self._fit(column, missing)
        return self._transform(column, digests, missing)

    def transform(self, X):
        """Return a vector for each cell, from the store or the model.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of cells.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors; NaN for missing cells.

        Raises
        ------
        TypeError, ValueError, OSError
            For what `fit` raises them, and if a cell cannot be decoded. What was encoded before
            such a cell is in the store.
        """
        self._validate_params()
        column = _Column(X)
        digests, missing = self._identify(column, self._backend().modality)
        return self._transform(column, digests, missing)

    def stats(self):
        """Count what the store holds of this encoder's vectors, and has done for it.

        Returns
        -------
        stats : dict
            "rows" and "bytes" held now, and how many vectors were ever "encoded" and "served", by
            any process and clone.

        Raises
        ------
        ValueError
            If the encoder has no store.
        """
        store = self._store()
        if store is None:
            raise ValueError("store=None keeps no counts; give the encoder a store.")
        self._validate_params()
        counts = store.stats().drop(columns=["model", "n_features"])
        fingerprint, _ = self._fingerprint(self._backend())
        if fingerprint not in counts.index:
            return dict.fromkeys(counts.columns, 0)
        return {name: int(count) for name, count in counts.loc[fingerprint].items()}

    def _fit(self, column, missing):
        """Refuse an empty column, and note what scikit-learn asks for."""
        if missing.all():
            raise ValueError(
                f"All {len(missing)} cells of {column} are missing: there is nothing to encode. "
                "Leave the branch out, or check the column."
            )
        self.n_features_in_ = 1
        if isinstance(column.name, str):
            self.feature_names_in_ = np.asarray([column.name], dtype=object)
        return self

    def _transform(self, column, digests, missing):
        """Give each row the vector of the distinct cell that it shows."""
        backend = self._backend()
        distinct = _first_rows(digests)
        if backend.modality == "text":  # longest first: texts of like length pad each other little
            by_length = sorted(distinct.items(), key=lambda item: -len(column.cells[item[1]]))
            distinct = dict(by_length)
        found = self._vectors(column, backend, distinct)

        vectors = np.full((len(digests), backend.n_features), np.nan, dtype=np.float32)
        position = {digest: i for i, digest in enumerate(distinct)}
        vectors[~missing] = found[[position[digest] for digest in digests if digest is not None]]
        self._warn_of_unreadable(column, vectors)
        return vectors

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
                pooling_wanted=self.pooling,
                max_length_wanted=self.max_length,
                device=self.device,
                dtype=self.dtype,
            )
        lacks = [
            name
            for name in ("modality", "n_features", "describe", "load")
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
        ignored = [name for name in _HUB_ONLY if getattr(self, name) != defaults[name].default]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} would have no effect: {self.model!r} is a backend object "
                "and decides that itself."
            )
        if self.modality not in ("auto", self.model.modality):
            raise ValueError(
                f"modality={self.modality!r}, but {self.model!r} takes {self.model.modality}."
            )

    def _fingerprint(self, backend):
        """Name everything that changes a vector: a digest, and what it is the digest of."""
        description = backend.describe()
        description |= {
            "unit_length": self.normalize or description.get("unit_length", False),
            "decoding": DECODING_VERSION,
        }
        key = {name: value for name, value in description.items() if name != "label"}
        text = json.dumps(key, sort_keys=True)
        return blake2b(text.encode(), digest_size=16).hexdigest(), description

    def _store(self):
        if self.store is None or isinstance(self.store, EmbeddingStore):
            return self.store
        return EmbeddingStore(None if self.store == "default" else self.store)

    def _identify(self, column, modality):
        """Digest each cell, with None where it is missing; return digests and missing rows."""
        digests = [None] * len(column.cells)
        for row, cell in enumerate(column.cells):
            if is_missing(cell):
                if self.missing == "error":
                    raise ValueError(
                        f"{column.place(row)} is missing, and missing='error'. Fill the cell, or "
                        "pass missing='nan'."
                    )
                continue
            try:
                digests[row] = identify(cell, modality)
            except (TypeError, ValueError, OSError) as error:
                self._raise_unless_tolerated(error, column, row)
        return digests, np.asarray([digest is None for digest in digests])

    def _vectors(self, column, backend, distinct):
        """Return the vectors of distinct cells, given as digest -> a row that shows the cell."""
        digests, rows = list(distinct), list(distinct.values())
        vectors = np.full((len(rows), backend.n_features), np.nan, dtype=np.float32)
        fingerprint, description = self._fingerprint(backend)
        store = self._store()
        known = np.zeros(len(rows), dtype=bool)
        if store is not None:
            known = store.get(fingerprint, digests, vectors)
        lacking = np.flatnonzero(~known)
        if not len(lacking):
            return vectors
        made = np.full((len(lacking), backend.n_features), np.nan, dtype=np.float32)
        batch_size = _AUTO_BATCH_SIZE if self.batch_size == "auto" else self.batch_size
        progress = tqdm(
            desc=f"encoding {column}",
            total=len(rows),
            initial=int(known.sum()),
            unit="cell",
            disable=not self.verbose,
        )

        def encode(positions):
            """Encode cells by their positions in `lacking`; leave out what cannot be decoded."""
            decoded = {}
            for i in positions:
                row, digest = rows[lacking[i]], digests[lacking[i]]
                try:
                    decoded[i] = decode(column.cells[row], backend.modality, digest)
                except (ValueError, OSError) as error:
                    self._raise_unless_tolerated(error, column, row)
            progress.update(len(positions))
            if not decoded:
                return [], made[:0]
            cells = list(decoded.values())
            return list(decoded), self._encode_batch(cells, backend, fingerprint)

        with progress:
            if store is None:
                for start in range(0, len(lacking), batch_size):
                    done, batch = encode(range(start, min(start + batch_size, len(lacking))))
                    made[done] = batch
            else:
                store.fill(
                    made,
                    [digests[i] for i in lacking],
                    fingerprint=fingerprint,
                    description=description,
                    encode=encode,
                    batch_size=batch_size,
                )
            progress.update(len(rows) - progress.n)  # what other processes have encoded
        vectors[lacking] = made
        return vectors

    def _encode_batch(self, cells, backend, fingerprint):
        """Run the model, and check that it returned what it promised."""
        vectors = _as_array(encode_batch(backend, f"{fingerprint} on {self.device}", cells))
        expected = (len(cells), backend.n_features)
        with np.errstate(over="ignore"):  # what overflows is refused below
            vectors = vectors.astype(np.float32)
        if vectors.shape != expected or not np.isfinite(vectors).all():
            got = f"shape {vectors.shape}" if vectors.shape != expected else "NaN or infinity"
            raise ValueError(
                f"{self.model!r} returned {got} for a batch of {len(cells)} cells; finite "
                f"numbers of shape {expected} were expected. Nothing of the batch was stored."
            )
        if self.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _raise_unless_tolerated(self, error, column, row):
        """Raise an error that names the cell, unless the cell is to count as missing."""
        if self.errors == "missing" and not isinstance(error, TypeError):
            return
        kinds = (TypeError, FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{column.place(row)}: {error}.") from error

    def _warn_of_unreadable(self, column, vectors):
        """Warn once of cells that hold something, but have no vector."""
        lost = [
            row
            for row in np.flatnonzero(np.isnan(vectors[:, 0]))
            if not is_missing(column.cells[row])
        ]
        if lost:
            warnings.warn(
                f"{len(lost)} cells of {column} could not be read and count as missing, first: "
                f"{column.place(lost[0])}.",
                UserWarning,
                stacklevel=3,
            )

    @property
    def _n_features_out(self):
        return self._backend().n_features

    def __sklearn_is_fitted__(self):
        return True  # stateless: there is nothing to learn

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True  # cells are objects, checked here and not by check_array
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


class _Column:
    """One column of cells, and how to name a place in it."""

    def __init__(self, X):
        self.name = None
        self.labels = getattr(X, "index", None) if hasattr(X, "iloc") else None
        if is_frame(X):
            if X.shape[1] != 1:
                raise ValueError(
                    f"FrozenEncoder takes one column, but X has {X.shape[1]}: {list(X.columns)}. "
                    "Select one, or give each its own encoder in a PerModalityUnion."
                )
            X = X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]
        if hasattr(X, "to_list"):  # a pandas or polars Series
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


def _list_cells(X):
    """List the cells of an array or a list, flat or of one column."""
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
    if cells and all(isinstance(cell, list | tuple) and len(cell) == 1 for cell in cells):
        cells = [cell for (cell,) in cells]
    return cells


def _as_array(vectors):
    """Bring home what users' functions return besides arrays: torch tensors, sparse matrices."""
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().numpy()
    return vectors.toarray() if hasattr(vectors, "toarray") else np.asarray(vectors)


def _first_rows(digests):
    """Map each distinct digest to the first row that shows it."""
    rows = {}
    for row, digest in enumerate(digests):
        if digest is not None:
            rows.setdefault(digest, row)
    return rows
