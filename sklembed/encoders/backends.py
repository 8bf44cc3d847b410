"""What a model must offer: describe itself, and load a function that encodes a batch of cells."""

import contextlib
import functools
import inspect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Modality = Literal["text", "image"]
Encode = Callable[[list], np.ndarray]

MODALITIES = ("text", "image")
POOLINGS = ("mean", "cls", "max", "last")


class Backend(Protocol):
    """What FrozenEncoder asks of a model, before and without loading it, and to load it.

    `modality` says what the cells are: "text" cells arrive as str, "image" cells as RGB pictures.
    """

    @property
    def modality(self) -> Modality:
        """What the cells are."""

    @property
    def n_features(self) -> int:
        """Width of the vectors."""

    def describe(self) -> dict[str, Any]:
        """Name everything that changes a vector, in JSON's types."""

    def load(self) -> Encode:
        """Load the model and return a function from a list of cells to (n, n_features) floats."""


class CallableBackend:
    """Bring any model: a function that loads it, and what the vectors are to be known by.

    Parameters
    ----------
    load : callable
        Takes nothing, loads the model and returns a function that maps a list of cells to an
        array of shape (n_cells, n_features). It is called once a process, and only when there is
        something to encode, so that neither clones nor pickles carry weights.

    name : str
        The model's name. With the version it is all that stored vectors are known by, in every
        project that shares the store: make it as telling as the name of a package.

    version : str
        Names everything else that changes a vector: weights, preprocessing, pooling. Change it
        whenever you edit `load`, or you will be handed the vectors and the model of before.

    modality : {"text", "image"}
        What the cells are: "text" cells arrive as str, "image" cells as RGB PIL images.

    n_features : int
        Width of the vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> def load():
    ...     return lambda texts: np.array([[len(t), t.count(" ")] for t in texts], dtype=float)
    >>> backend = CallableBackend(load, name="shape", version="1", modality="text", n_features=2)
    >>> FrozenEncoder(backend, store=None).transform(["to be", "or", None])
    array([[ 5.,  1.],
           [ 2.,  0.],
           [nan, nan]], dtype=float32)
    """

    def __init__(self, load, *, name, version, modality, n_features):
        if not callable(load):
            raise TypeError(
                f"load must be a function that takes nothing and returns the encoding function; "
                f"got {load!r}."
            )
        if modality not in MODALITIES:
            raise ValueError(f"modality must be one of {MODALITIES}; got {modality!r}.")
        if not isinstance(n_features, Integral) or n_features < 1:
            raise ValueError(
                "n_features must be the width of the vectors, a positive integer; got "
                f"{n_features!r}."
            )
        self._load = load
        self.name = name
        self.version = version
        self.modality = modality
        self.n_features = int(n_features)

    def __repr__(self):
        return f"CallableBackend({self.name!r}, version={self.version!r})"

    def __sklearn_clone__(self):
        """Stay the same object in clones: a backend is a value and is never changed."""
        return self

    def describe(self):
        """Name what changes a vector.

        Returns
        -------
        description : dict
            The name, the version, the modality and the width.
        """
        return {
            "backend": "callable",
            "name": self.name,
            "version": self.version,
            "modality": self.modality,
            "n_features": self.n_features,
        }

    def load(self):
        """Load the model.

        Returns
        -------
        encode : callable
            What the `load` given at construction returns.
        """
        if _needs_arguments(self._load):
            raise TypeError(
                f"load must take nothing and return the encoding function, but {self._load!r} asks "
                "for arguments. If it is the encoding function itself, pass: lambda: encode."
            )
        encode = self._load()
        if not callable(encode):
            raise TypeError(f"load must return the encoding function; it returned {encode!r}.")
        return encode


@dataclass(frozen=True)
class HuggingFaceBackend:
    """A text or vision checkpoint, or one tower of a dual encoder, through transformers.

    The parameters are those of FrozenEncoder. Reading the configuration needs no weights.
    """

    model: str
    modality_wanted: str
    pooling_wanted: str
    max_length_wanted: int | None
    device: str
    dtype: str
    revision: str | None
    local_files_only: bool
    trust_remote_code: bool

    @property
    def modality(self) -> Modality:
        """The modality asked for, checked against what the checkpoint offers."""
        offered = self._towers()
        if self.modality_wanted == "auto":
            if len(offered) > 1:
                raise ValueError(
                    f"{self.model!r} encodes text and images; say which: modality='text' or "
                    "modality='image'."
                )
            return offered[0]
        if self.modality_wanted not in offered:
            raise ValueError(
                f"modality={self.modality_wanted!r}, but {self.model!r} "
                f"({self._config().model_type}) encodes {' and '.join(offered)}."
            )
        return self.modality_wanted

    @property
    def n_features(self) -> int:
        """Width of the vectors, from the configuration."""
        config = self._config()
        if self._is_dual():
            tower = config.text_config if self.modality == "text" else config.vision_config
            projected = getattr(config, "projection_dim", None)
            return projected or getattr(tower, "projection_size", None) or tower.hidden_size
        for name in ("hidden_size", "d_model", "dim"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
        if getattr(config, "hidden_sizes", None):
            return config.hidden_sizes[-1]
        raise ValueError(
            f"The width of the vectors of {self.model!r} ({config.model_type}) cannot be read from "
            "its configuration; wrap the model in a CallableBackend."
        )

    @property
    def pooling(self) -> str:
        """How a sequence of vectors becomes one."""
        if self._is_dual():
            if self.pooling_wanted != "auto":
                raise ValueError(
                    f"pooling={self.pooling_wanted!r}, but {self.model!r} pools its towers itself; "
                    "leave pooling='auto'."
                )
            return "projected"
        if self.pooling_wanted != "auto":
            return self.pooling_wanted
        if self.modality == "text":
            return self._sentence_transformer().get("pooling", "mean")
        return "mean" if self._is_convolutional() else "cls"

    @property
    def max_length(self) -> int | None:
        """Tokens after which a text is cut; None leaves it to the tokenizer."""
        most = getattr(self._config(), "max_position_embeddings", None)
        if self.max_length_wanted is not None:
            if most and self.max_length_wanted > most:
                raise ValueError(
                    f"max_length={self.max_length_wanted}, but {self.model!r} takes at most {most} "
                    "tokens. Leave max_length=None, or lower it."
                )
            return self.max_length_wanted
        return self._sentence_transformer().get("max_length")

    def describe(self) -> dict[str, Any]:
        """Name what changes a vector: checkpoint, tower, pooling, length, precision."""
        return {
            "backend": "huggingface",
            "label": Path(self.model).name,  # for people; no part of the fingerprint
            "checkpoint": self._checkpoint(),
            "modality": self.modality,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "dtype": str(self._dtype()).removeprefix("torch."),
            "unit_length": self._sentence_transformer().get("normalize", False),
        }

    def load(self) -> Encode:
        """Load the checkpoint, to evaluation mode, on the device."""
        from transformers import AutoModel

        from sklembed._torch import resolve_device

        prepare = self._tokenizer() if self.modality == "text" else self._image_processor()
        with _quiet():
            model = AutoModel.from_pretrained(self.model, dtype=self._dtype(), **self._source())
        model = model.eval().requires_grad_(False).to(resolve_device(self.device))
        if self._config().is_encoder_decoder:
            model = model.get_encoder()
        encoding = self._text_encoding if self.modality == "text" else self._image_encoding
        return encoding(model, prepare)

    def _tokenizer(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model, **self._source())
        # Where the files are absent, transformers makes one that knows no word and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError(
                f"{self.model!r} holds no tokenizer files, without which every text looks alike. "
                "Save the tokenizer beside the model: tokenizer.save_pretrained(directory)."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _image_processor(self):
        from transformers import AutoImageProcessor

        # Pillow resizes alike on every machine; torchvision, where present, would not.
        return AutoImageProcessor.from_pretrained(self.model, backend="pil", **self._source())

    def _text_encoding(self, model, tokenizer) -> Encode:
        max_length = self.max_length or _longest(tokenizer, self._config())

        def forward(texts):
            inputs = tokenizer(
                texts,
                padding=True,
                truncation=max_length is not None,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            if self._is_dual():
                return _features(model.get_text_features(**inputs))
            states = model(**inputs).last_hidden_state
            return _pool(states.float(), inputs["attention_mask"], self.pooling)

        return self._finish(forward)

    def _image_encoding(self, model, processor) -> Encode:
        def forward(pictures):
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(model.device, model.dtype)
            if self._is_dual():
                return _features(model.get_image_features(pixel_values=pixels))
            states = model(pixel_values=pixels).last_hidden_state.float()
            if states.ndim == 4:  # (batch, channels, height, width) of a convolutional network
                states = states.flatten(2).transpose(1, 2)
            return _pool(states, None, self.pooling)

        return self._finish(forward)

    def _finish(self, forward) -> Encode:
        import torch

        from sklembed._torch import to_numpy

        normalize = self._sentence_transformer().get("normalize", False)

        def encode(cells):
            with torch.inference_mode():
                vectors = forward(cells).float()
                if normalize:
                    vectors = torch.nn.functional.normalize(vectors, dim=1)
            return to_numpy(vectors)

        return encode

    def _towers(self) -> list[Modality]:
        config = self._config()
        if self._is_dual():
            return ["text", "image"]
        return ["image"] if hasattr(config, "num_channels") else ["text"]

    def _is_dual(self) -> bool:
        config = self._config()
        return hasattr(config, "text_config") and hasattr(config, "vision_config")

    def _is_convolutional(self) -> bool:
        return bool(getattr(self._config(), "hidden_sizes", None))

    def _config(self):
        return _read_config(
            self.model, self._commit(), self.local_files_only, self.trust_remote_code
        )

    def _checkpoint(self) -> str:
        """Name the checkpoint's content: the hub's commit, or a digest of a directory's files."""
        if os.path.isdir(self.model):
            return _digest_directory(self.model)
        return f"{self.model}@{self._commit()}"

    def _commit(self) -> str | None:
        if os.path.isdir(self.model):
            return None
        return _resolve_commit(self.model, self.revision, self.local_files_only)

    def _sentence_transformer(self) -> dict[str, Any]:
        return _read_sentence_transformer(self.model) if os.path.isdir(self.model) else {}

    def _dtype(self):
        from sklembed._torch import resolve_device, resolve_dtype

        return resolve_dtype(self.dtype, resolve_device(self.device))

    def _source(self) -> dict[str, Any]:
        return {
            "revision": self._commit(),  # the one that the fingerprint names
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }


def _needs_arguments(function) -> bool:
    """Tell whether a function cannot be called without arguments."""
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )


_LOADED: OrderedDict[str, Encode] = OrderedDict()
_LOADED_LIMIT = 4
_MODELS = threading.Lock()  # guards _LOADED, loading (not safe in threads) and the models' use


def encode_batch(backend: Backend, key: str, cells: list) -> np.ndarray:
    """Encode decoded cells by a model that is loaded once a process; the last few stay loaded."""
    with _MODELS:
        if key not in _LOADED:
            _LOADED[key] = backend.load()
            if len(_LOADED) > _LOADED_LIMIT:
                _LOADED.popitem(last=False)
        _LOADED.move_to_end(key)
        return _LOADED[key](cells)


def _forget_after_fork() -> None:
    """Start afresh in a forked child, where the lock may be held by a thread that is no more."""
    global _MODELS
    _MODELS = threading.Lock()
    _LOADED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


@contextlib.contextmanager
def _quiet():
    """Keep transformers from drawing a bar for every model that a worker loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pool(states, mask, pooling: str):
    """Reduce (batch, tokens, dim) to (batch, dim), leaving padding out."""
    import torch

    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.dtype)  # (batch, tokens)
    first = mask.argmax(dim=1)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # whichever side the padding is on
    rows = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[rows, first]
    if pooling == "last":
        return states[rows, last]
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _features(output):
    """Return a tower's projected vectors: the output itself, or in transformers 5 a field of it."""
    return getattr(output, "pooler_output", output)


def _longest(tokenizer, config) -> int | None:
    """Find the longest text a model takes, where it says so; tokenizers say 1e30 for "unknown"."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    known = [limit for limit in limits if limit is not None and limit < 1_000_000]
    return min(known, default=None)


@functools.lru_cache(maxsize=64)
def _resolve_commit(model, revision, local_files_only) -> str:
    """Ask the hub, or its local cache, which commit a revision stands for now; once a process.

    Raises
    ------
    OSError
        If the model is neither a directory nor to be found.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model, "config.json", revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        where = "the local cache" if local_files_only else "the hub or the local cache"
        raise OSError(
            f"The model {model!r} is neither a local directory nor found in {where}. Check the "
            "name, download it while online, or give the directory of a checkpoint; offline, "
            "local_files_only=True answers at once. "
            f"(transformers says: {str(error).splitlines()[0]})"
        ) from error
    return Path(path).parent.name  # …/snapshots/<commit>/config.json


@functools.lru_cache(maxsize=64)
def _read_config(model, commit, local_files_only, trust_remote_code):
    """Read a checkpoint's configuration.

    Raises
    ------
    OSError
        If a directory holds none.
    """
    from transformers import AutoConfig

    if commit is None and not Path(model, "config.json").is_file():
        raise OSError(
            f"The directory {model!r} holds no config.json, so it is not a checkpoint. Give the "
            "directory that save_pretrained wrote, or a hub id."
        )
    return AutoConfig.from_pretrained(
        model,
        revision=commit,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )


def _digest_directory(model) -> str:
    files = sorted(
        path
        for path in Path(model).rglob("*")
        if path.suffix in _CONTENT_SUFFIXES and path.is_file()
    )
    signature = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _digest_files(model, signature)


# What can change a vector; a README or an example cannot.
_CONTENT_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".py", ".jinja"}


@functools.lru_cache(maxsize=64)
def _digest_files(root, signature) -> str:
    """Digest files by name and content; read again only when a size or time has changed."""
    digest = blake2b(digest_size=16)
    for path, size, _ in signature:
        digest.update(f"{os.path.relpath(path, root)}\0{size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _read_sentence_transformer(model) -> dict[str, Any]:
    """Read what a sentence-transformers directory says of pooling, length and normalisation.

    Raises
    ------
    ValueError
        If the directory asks for a module that is not understood here.
    """
    modules = Path(model, "modules.json")
    if not modules.is_file():
        return {}
    settings: dict[str, Any] = {}
    length = _read_json(Path(model, "sentence_bert_config.json"), {}).get("max_seq_length")
    if length:
        settings["max_length"] = length
    for module in _read_json(modules, []):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            settings["pooling"] = _read_pooling(Path(model, module["path"], "config.json"))
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer":
            raise ValueError(
                f"{model!r} is a sentence-transformers model with a {kind} module, which is not "
                "supported. Wrap it: CallableBackend(lambda: SentenceTransformer(...).encode, …)."
            )
    return settings


def _read_pooling(path) -> str:
    config = _read_json(path, {})
    modes = [m for m in config if m.startswith("pooling_mode_") and config[m] is True]
    modes = modes or [f"pooling_mode_{config.get('pooling_mode', 'mean')}"]
    known = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "last",
        "pooling_mode_mean": "mean",
        "pooling_mode_cls": "cls",
        "pooling_mode_max": "max",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(
            f"{str(path)!r} asks for the pooling {modes}; one of {sorted(known)} is supported. "
            "Wrap the model in a CallableBackend."
        )
    return known[modes[0]]


def _read_json(path, default):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
