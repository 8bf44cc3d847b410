"""What a model must offer: describe itself, and load a function that encodes a batch of cells."""

import contextlib
import inspect
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from sklembed.encoders.checkpoints import Checkpoint

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
        for argument, value in (("name", name), ("version", version)):
            if not isinstance(value, str) or not value:
                raise TypeError(f"{argument} must be a str that is not empty; got {value!r}.")
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

    The parameters are those of FrozenEncoder. All but `load` do without the weights.
    """

    checkpoint: Checkpoint
    modality_wanted: str
    pooling_wanted: str
    max_length_wanted: int | None
    device: str
    dtype: str

    @property
    def modality(self) -> Modality:
        """The modality asked for, checked against what the checkpoint offers."""
        offered = self._towers()
        if self.modality_wanted == "auto":
            if len(offered) > 1:
                raise ValueError(
                    f"{self._name} encodes text and images; say which: modality='text' or "
                    "modality='image'."
                )
            return offered[0]
        if self.modality_wanted not in offered:
            raise ValueError(
                f"modality={self.modality_wanted!r}, but {self._name} "
                f"({self._config.model_type}) encodes {' and '.join(offered)}."
            )
        return self.modality_wanted

    @property
    def n_features(self) -> int:
        """Width of the vectors, from the configuration."""
        config = self._config
        if self._is_dual:
            tower = config.text_config if self.modality == "text" else config.vision_config
            projected = getattr(config, "projection_dim", None)
            return projected or getattr(tower, "projection_size", None) or tower.hidden_size
        for name in ("hidden_size", "d_model", "dim"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
        if getattr(config, "hidden_sizes", None):
            return config.hidden_sizes[-1]
        raise ValueError(
            f"The width of the vectors of {self._name} ({config.model_type}) cannot be read from "
            "its configuration; wrap the model in a CallableBackend."
        )

    @property
    def pooling(self) -> str:
        """How a sequence of vectors becomes one."""
        if self._is_dual:
            if self.pooling_wanted != "auto":
                raise ValueError(
                    f"pooling={self.pooling_wanted!r}, but {self._name} pools its towers itself; "
                    "leave pooling='auto'."
                )
            return "projected"
        if self.pooling_wanted != "auto":
            return self.pooling_wanted
        if self.modality == "text":
            return self._settings.get("pooling", "mean")
        return "cls" if self._config.model_type in _WITH_CLASS_TOKEN else "mean"

    @property
    def max_length(self) -> int | None:
        """Tokens after which a text is cut; None where the model knows no limit."""
        most = _most_tokens(self._config.text_config if self._is_dual else self._config)
        if self.max_length_wanted is not None:
            if most and self.max_length_wanted > most:
                raise ValueError(
                    f"max_length={self.max_length_wanted}, but {self._name} takes at most {most} "
                    "tokens. Leave max_length=None, or lower it."
                )
            return self.max_length_wanted
        return self._settings.get("max_length") or most

    def describe(self) -> dict[str, Any]:
        """Name what changes a vector: checkpoint, tower, pooling, length, precision.

        Raises
        ------
        ValueError, OSError
            If the checkpoint cannot be found, or does not offer what is asked of it.
        """
        if self._config.model_type in _RANDOM:
            raise ValueError(
                f"{self._name} ({self._config.model_type}) masks patches at random, so a picture "
                "has no vector of its own. Choose another checkpoint."
            )
        description = {
            "backend": "huggingface",
            "label": Path(self.checkpoint.model).name,  # for people; no part of the fingerprint
            "checkpoint": self.checkpoint.identity(),
            "modality": self.modality,
            "pooling": self.pooling,
            "dtype": str(self._dtype()).removeprefix("torch."),
            "unit_length": self._settings.get("normalize", False),
        }
        if self.modality == "text":
            description |= {
                "max_length": self.max_length,
                "prompt": self._settings.get("prompt", ""),
                "lower_case": self._settings.get("lower_case", False),
            }
        return description

    def load(self) -> Encode:
        """Load the checkpoint, to evaluation mode, on the device.

        Raises
        ------
        OSError
            If tokenizer files or weights are absent, which transformers would make up.
        """
        from sklembed._torch import resolve_device

        prepare = self._tokenizer() if self.modality == "text" else self._image_processor()
        model = self._model().eval().requires_grad_(False).to(resolve_device(self.device))
        encoding = self._text_encoding if self.modality == "text" else self._image_encoding
        return encoding(model, prepare)

    def _model(self):
        from transformers import AutoModel

        with _quiet():
            model, report = AutoModel.from_pretrained(
                dtype=self._dtype(), output_loading_info=True, **self.checkpoint.source()
            )
        unused = () if self._is_dual else ("pooler", "lm_head")
        if hasattr(model, "encoder") and hasattr(model, "decoder"):  # T5 and its like
            model, unused = model.get_encoder(), (*unused, "decoder")
        absent = [key for key in report["missing_keys"] if not any(u in key for u in unused)]
        if absent or report["mismatched_keys"]:
            raise OSError(
                f"{self._name} lacks {len(absent)} weights of its architecture, such as "
                f"{absent[:2] or report['mismatched_keys']}; they would be made up at random. Save "
                "the whole model by save_pretrained."
            )
        return model

    def _tokenizer(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**self.checkpoint.source())
        # Where the files are absent, transformers makes one that knows no word and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError(
                f"{self._name} holds no tokenizer files, without which every text looks alike. "
                "Save the tokenizer beside the model: tokenizer.save_pretrained(directory)."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"  # on the left it would shift absolute positions
        return tokenizer

    def _image_processor(self):
        from transformers import AutoImageProcessor

        # Pillow resizes alike on every machine; torchvision, where present, would not.
        return AutoImageProcessor.from_pretrained(backend="pil", **self.checkpoint.source())

    def _text_encoding(self, model, tokenizer) -> Encode:
        prompt, lower_case = self._settings.get("prompt", ""), self._settings.get("lower_case")
        limits = [self.max_length, tokenizer.model_max_length]
        max_length = min(limit for limit in [*limits, _UNLIMITED] if limit is not None)
        # SigLIP reads the last position, and was trained with every text padded to full length.
        whole = self._config.model_type.startswith("siglip")

        def forward(texts):
            texts = [prompt + text for text in texts]
            inputs = tokenizer(
                [text.lower() for text in texts] if lower_case else texts,
                padding="max_length" if whole else True,
                truncation=max_length < _UNLIMITED,
                max_length=max_length if max_length < _UNLIMITED else None,
                return_attention_mask=not whole,
                return_tensors="pt",
            ).to(model.device)
            if self._is_dual:
                return _features(model.get_text_features(**inputs))
            states = model(**inputs).last_hidden_state
            return _pool(states.float(), inputs["attention_mask"], self.pooling)

        return self._finish(forward)

    def _image_encoding(self, model, processor) -> Encode:
        def forward(pictures):
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            pixels = pixels.to(model.device, model.dtype)
            if self._is_dual:
                return _features(model.get_image_features(pixel_values=pixels))
            states = model(pixel_values=pixels).last_hidden_state.float()
            if states.ndim == 4:  # (batch, channels, height, width) of a convolutional network
                states = states.flatten(2).transpose(1, 2)
            return _pool(states, None, self.pooling)

        return self._finish(forward)

    def _finish(self, forward) -> Encode:
        import torch

        from sklembed._torch import to_numpy

        normalize = self._settings.get("normalize", False)

        def encode(cells):
            with torch.inference_mode():
                vectors = forward(cells).float()
                if normalize:
                    vectors = torch.nn.functional.normalize(vectors, dim=1)
            return to_numpy(vectors)

        return encode

    def _towers(self) -> list[Modality]:
        if self._is_dual:
            return ["text", "image"]
        return ["image"] if hasattr(self._config, "num_channels") else ["text"]

    @property
    def _name(self) -> str:
        return repr(self.checkpoint.model)

    @property
    def _config(self):
        return self.checkpoint.config()

    @property
    def _settings(self) -> dict[str, Any]:
        return self.checkpoint.sentence_transformer()

    @property
    def _is_dual(self) -> bool:
        return hasattr(self._config, "text_config") and hasattr(self._config, "vision_config")

    def _dtype(self):
        from sklembed._torch import resolve_device, resolve_dtype

        return resolve_dtype(self.dtype, resolve_device(self.device))


# Vision transformers whose first token stands for the picture; others have patches alone.
_WITH_CLASS_TOKEN = {
    "beit",
    "clip_vision_model",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
    "vit_msn",
}
_RANDOM = {"vit_mae"}
# Position embeddings of these begin behind the padding token's index.
_OFFSET_POSITIONS = {"camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta"}
_UNLIMITED = 1_000_000  # tokenizers say 1e30 where they know no limit


def _most_tokens(config) -> int | None:
    """Find how many tokens a model has positions for, where it says so."""
    most = getattr(config, "max_position_embeddings", None)
    if most and config.model_type in _OFFSET_POSITIONS:
        most -= config.pad_token_id + 1
    return most


def _needs_arguments(function) -> bool:
    """Tell whether a function cannot be called without arguments."""
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )


_LOADED: OrderedDict[str, Encode] = OrderedDict()
_LOADED_LIMIT = 4
_MODELS = (
    threading.RLock()
)  # a model may call another; guards _LOADED, loading (not safe in threads) and the models' use


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
    _MODELS = threading.RLock()
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
