"""StaticBackend: static token embeddings of model2vec and sentence-transformers."""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from sklembed.encoders.backends import CheckpointBackend
from sklembed.encoders.checkpoints import check_file
from sklembed.encoders.inference import Encoding

_BATCH_SIZE = 1024
# Values of the parameters that have no effect on a mean of token vectors.
_SUPPORTED = {
    "modality": ("auto", "text"),
    "pooling": ("auto", "mean"),
    "layer": (-1,),
    "layer_aggregation": ("concat",),
    "device": ("auto", "cpu"),
    "dtype": ("auto", "float32"),
    "runtime": ("auto",),
}


@dataclass(frozen=True)
class StaticBackend(CheckpointBackend):
    """A table of token vectors. The vector of a text is the mean over its tokens.

    numpy computes the mean, without torch and, for directories, without transformers.
    """

    modality = "text"
    dtype_name = "float32"
    precision = {"dtype": "float32"}

    @property
    def n_features(self) -> int:
        """Width of the vectors, from the header of the weights."""
        n_features = self._width
        if self.output == "pooled":
            for step in self._head:
                n_features = min(n_features, step.get("n_features", n_features))
        return n_features

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens of a text; None for the limit of the tokenizer."""
        if self.max_length_parameter is None:
            return self._settings.get("max_length")
        return int(self.max_length_parameter)

    def describe(self) -> dict[str, Any]:
        """Describe everything that changes a vector, in JSON types.

        Raises
        ------
        ValueError, OSError
            If a parameter would have no effect, or the files are not supported.
        """
        self._check_parameters()
        description = {
            "backend": "static",
            "label": self.checkpoint.name,  # for people; no part of the fingerprint
            "checkpoint": self.checkpoint.identity(),
            "modality": self.modality,
            "dtype": self.dtype_name,
            "max_length": self.max_length,
        }
        if self.output == "pooled":
            description["unit_length"] = self._head[-1:] == [{"kind": "normalize"}]
        return description

    def weights(self) -> str:
        """Return the key of the weights: the content of the checkpoint."""
        return f"static embeddings of {self.checkpoint.identity()}"

    def load(self) -> "_Loaded":
        """Load the tokenizer and the table.

        Raises
        ------
        OSError
            If a file is absent or damaged, or the files do not match.
        """
        tokenizer = _read_tokenizer(self._file("tokenizer.json"))
        tensors = _read_tensors(self._file("model.safetensors"))
        embeddings = tensors[_table_name(tensors)]
        # model2vec can cluster the vectors of a large vocabulary.
        rows = tensors.get("mapping", np.arange(len(embeddings)))
        weights = tensors.get("weights", np.ones(len(rows)))
        vocabulary = tokenizer.get_vocab()
        n_tokens = max(vocabulary.values()) + 1
        n_vectors = min(len(rows), len(weights))
        if n_tokens > n_vectors or rows.max() >= len(embeddings):
            raise OSError(
                f"The tokenizer of {self._name} has {n_tokens} tokens, and its weights "
                f"{n_vectors}, in a table of {len(embeddings)} vectors: these files do "
                "not belong together. Download the complete model again."
            )
        loaded = _Loaded(
            tokenizer,
            table=embeddings.astype(np.float32),
            rows=rows,
            weights=weights.astype(np.float32),
            # Both libraries round means of half precision to half precision.
            dtype=np.float16 if embeddings.dtype == np.float16 else np.float32,
        )
        if self._settings["library"] == "model2vec":
            tokenizer.no_truncation()  # the configuration has the limit
            loaded.unknown = _unknown_token(tokenizer)
            lengths = [len(token) for token in vocabulary]
            loaded.median_length = int(np.median(lengths))
        return loaded

    def encoding(self, loaded: "_Loaded") -> Encoding:
        """Return the steps by which the loaded checkpoint encodes texts.

        Raises
        ------
        ValueError
            If `max_length` exceeds the limit in the tokenizer file.
        """
        limit, prompt = self.max_length, self._settings.get("prompt", "")
        truncation = loaded.tokenizer.truncation or {}
        if limit is not None and limit > truncation.get("max_length", limit):
            raise ValueError(
                f"max_length={limit}, but the tokenizer of {self._name} returns at most "
                f"{truncation['max_length']} tokens. Leave max_length=None, or lower it."
            )
        n_characters = None
        if limit is not None and loaded.median_length is not None:
            # As in model2vec, to save time; a text of short tokens loses some.
            n_characters = limit * loaded.median_length

        def prepare(texts):
            texts = [(prompt + text)[:n_characters] for text in texts]
            tokenize = loaded.tokenizer.encode_batch_fast
            encodings = tokenize(texts, add_special_tokens=False)
            return [encoding.ids[:limit] for encoding in encodings]

        def forward(prepared):
            tokens, counts = loaded.join(prepared)
            if self.output == "tokens":
                return np.split(loaded.vectors(tokens), np.cumsum(counts)[:-1])
            vectors = loaded.mean(tokens, counts)
            for step in self._head:
                if step["kind"] == "normalize":
                    vectors = loaded.normalize(vectors)
                else:
                    vectors = vectors[:, : step["n_features"]]
            return vectors

        return Encoding(forward, prepare, budget=_BATCH_SIZE)

    def _check_parameters(self) -> None:
        """Raise an error for parameters that have no effect on static embeddings."""
        values = {
            "modality": self.modality_parameter,
            "pooling": self.pooling_parameter,
            "layer": self.layer,
            "layer_aggregation": self.layer_aggregation,
            "device": self.device,
            "dtype": self.dtype,
            "runtime": self.runtime,
        }
        for name, value in values.items():
            if value not in _SUPPORTED[name]:
                raise ValueError(
                    f"{name}={value!r}, but {self._name} has static token embeddings: "
                    "texts get the mean over their tokens, in float32 on the CPU. "
                    f"Leave {name}={_SUPPORTED[name][0]!r}; in a grid search with other "
                    "models, pass a list of grids."
                )
        if self.output == "tokens" and self.pooling_parameter != "auto":
            raise ValueError(
                f"pooling={self.pooling_parameter!r} would have no effect with "
                "output='tokens'."
            )

    def _file(self, name: str) -> Path:
        """Return the path of a file of the embeddings, after checking it."""
        name = str(PurePosixPath(self._settings["folder"], name))
        path = self.checkpoint.file(name)
        if path is None:
            raise OSError(
                f"{self._name} has static token embeddings, but no file {name!r}. "
                "Download the complete model again, or save it again."
            )
        check_file(path)
        return path

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        return self.checkpoint.static_embedding()

    @property
    def _head(self) -> list[dict[str, Any]]:
        """Steps after the mean."""
        return self._settings["head"]

    @functools.cached_property
    def _width(self) -> int:
        from safetensors import safe_open

        with safe_open(self._file("model.safetensors"), framework="numpy") as file:
            return file.get_slice(_table_name(file.keys())).get_shape()[1]


@dataclass
class _Loaded:
    """A tokenizer, and a table with the vectors of its tokens."""

    tokenizer: Any
    table: np.ndarray  # (n_vectors, n_features), dtype float32
    rows: np.ndarray  # (n_tokens,): row of each token in the table
    weights: np.ndarray  # (n_tokens,), dtype float32
    dtype: type  # of pooled vectors
    unknown: int | None = None  # token that is removed
    median_length: int | None = None  # characters of a token

    def join(self, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the known tokens of all texts, and their number in each text."""
        counts = np.fromiter(map(len, texts), np.intp, len(texts))
        chained = itertools.chain.from_iterable(texts)
        tokens = np.fromiter(chained, np.intp, counts.sum())
        if self.unknown is None:
            return tokens, counts
        is_known = tokens != self.unknown
        positions = np.repeat(np.arange(len(texts)), counts)[is_known]
        return tokens[is_known], np.bincount(positions, minlength=len(texts))

    def vectors(self, tokens: np.ndarray) -> np.ndarray:
        """Return the weighted vectors of tokens: (n_tokens, n_features)."""
        return self.table[self.rows[tokens]] * self.weights[tokens, None]

    def mean(self, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the mean of each text, zero without tokens: (n_texts, n_features)."""
        starts = np.append(0, np.cumsum(counts))
        # A product with a sparse matrix adds vectors without a copy of each.
        matrix = csr_array(
            (self.weights[tokens], self.rows[tokens], starts),
            shape=(len(counts), len(self.table)),
        )
        divisors = np.maximum(counts, 1).astype(np.float32)
        return (matrix @ self.table / divisors[:, None]).astype(self.dtype)

    def normalize(self, vectors: np.ndarray) -> np.ndarray:
        """Scale vectors to unit length; zero vectors remain."""
        vectors = vectors.astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(norms, 1e-12)).astype(self.dtype)


def _read_tokenizer(path):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise OSError(
            f"The file {str(path)!r} is no tokenizer ({error}). Download it again."
        ) from error
    tokenizer.no_padding()
    return tokenizer


def _read_tensors(path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except TypeError:  # bfloat16 has no counterpart in numpy
        tensors = {}
    # With the package ml_dtypes, arrays of bfloat16 have a type of the kind "V".
    kinds = {tensor.dtype.kind for tensor in tensors.values()}
    if not tensors or "V" in kinds:
        raise OSError(
            f"numpy cannot read the weights {str(path)!r}. Save them in float16 or "
            "float32."
        )
    return tensors


def _table_name(names) -> str:
    """Return the name of the table, which differs by library."""
    for name in ("embedding.weight", "embeddings"):
        if name in names:
            return name
    raise OSError(
        "The weights of static token embeddings must include 'embeddings' or "
        f"'embedding.weight'; they are {list(names)}. Save the model again."
    )


def _unknown_token(tokenizer) -> int | None:
    """Return the token of unknown words, or None."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "Unigram":
        return model.get("unk_id")
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)
