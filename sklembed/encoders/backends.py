"""Backend, the protocol of models, and CallableBackend, which wraps any function."""

import copy
import functools
import inspect
import itertools
import json
import pickle
import sys
import types
import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Protocol

import numpy as np
from joblib import wrap_non_picklable_objects

from sklembed.encoders.inference import Encoding, Network, Trainable, loading

Modality = Literal["text", "image"]

MODALITIES = ("text", "image")

# Longer than the blocks into which some models split texts.
_LONG_TEXT = "the dog sat under a tree, and then the cat slept on a mat, " * 5
# Bytes. Code takes some kilobytes, a model some hundred megabytes.
_LARGE_PICKLE = 1_000_000
# Code of the functions that loaded models, by the key of the model.
_LOADED_CODE: dict[str, Any] = {}


class Backend(Protocol):
    """A model as FrozenEncoder uses it. Only `load` and `encoding` load weights.

    Cells are str for the modality "text", and RGB PIL images for "image". A backend of
    images may have an attribute `image_size`: the smaller side, in pixels, to which it
    resizes them. Large JPEG files are then decoded at reduced size.
    """

    @property
    def modality(self) -> Modality:
        """Modality of the cells."""

    @property
    def n_features(self) -> int:
        """Width of the vectors."""

    def describe(self) -> dict[str, Any]:
        """Return everything that changes a vector, in JSON types."""

    def weights(self) -> str:
        """Return the key of the weights. A process loads one copy for each key."""

    def load(self) -> Any:
        """Load the model."""

    def encoding(self, loaded: Any) -> Encoding:
        """Return the steps by which the loaded model encodes cells."""


@dataclass(frozen=True)
class CheckpointBackend:
    """The files of a model, and the parameters of FrozenEncoder for them.

    Fields named `…_parameter` may be "auto" or None; the property of the same name of a
    subclass resolves them.
    """

    checkpoint: Any
    modality_parameter: str = "auto"
    output: str = "pooled"
    pooling_parameter: str = "auto"
    layer: int | tuple[int, ...] = -1
    layer_aggregation: str = "concat"
    max_length_parameter: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    runtime: str = "auto"

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image; an error for texts."""
        raise ValueError(
            f"{self._name} encodes text; only images have a grid of patches."
        )

    @property
    def _name(self) -> str:
        return repr(self.checkpoint.model)


class CallableBackend:
    """Wrap any model: a function that loads it, and the key of its vectors.

    Parameters
    ----------
    load : callable
        Takes no arguments, loads the model and returns ``encode``: a function that maps
        a list of cells to an array of shape (n_cells, n_features), or for an encoder
        with ``output="tokens"`` to a list of n_cells arrays of shape (n_tokens,
        n_features). It may return a pair ``prepare, encode`` instead. Threads call
        ``prepare`` on single cells while the model is busy, and ``encode`` takes a list
        of prepared cells. If ``encode`` is a ``torch.nn.Module``, it takes one tensor,
        the stacked prepared cells, and returns the array as a tensor. It runs on the
        device of its weights. On the CPU, faster runtimes may run it instead; see
        `runtime` of :class:`FrozenEncoder`. `load` is called once per process, and only
        when there is a cell to encode, so that neither clones nor pickles carry
        weights. Load the model inside `load`: a model from outside is copied into every
        pickle, which raises a warning.

    name : str
        Name of the model. Name and version are the key of stored vectors in every
        project that shares the store, so make the name as specific as that of a
        package.

    version : str
        Version of everything else that changes a vector: weights, preprocessing,
        pooling. Change it whenever you edit `load`; otherwise the old vectors and the
        old model are used.

    modality : {"text", "image"}
        Modality of the cells: "text" cells are str, "image" cells are RGB PIL images.

    n_features : int
        Width of the vectors.

    image_size : int or None, default=None
        Smaller side, in pixels, to which the model resizes images. If not None, JPEG
        files with much larger sides are decoded at 1/2, 1/4 or 1/8 of their size, which
        is faster. It changes vectors slightly and is part of their key.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> def load():
    ...     return lambda texts: np.array([[len(t), t.count(" ")] for t in texts])
    >>> backend = CallableBackend(
    ...     load, name="shape", version="1", modality="text", n_features=2
    ... )
    >>> FrozenEncoder(backend, store=None).transform(["to be", "or", None])
    array([[ 5.,  1.],
           [ 2.,  0.],
           [nan, nan]], dtype=float32)
    """

    def __init__(self, load, *, name, version, modality, n_features, image_size=None):
        if not callable(load):
            raise TypeError(
                "load must be a function that takes no arguments and returns the "
                f"encoding function; got {load!r}."
            )
        for argument, value in (("name", name), ("version", version)):
            if not isinstance(value, str) or not value:
                raise TypeError(f"{argument} must be a non-empty str; got {value!r}.")
        if modality not in MODALITIES:
            raise ValueError(f"modality must be one of {MODALITIES}; got {modality!r}.")
        if not isinstance(n_features, Integral) or n_features < 1:
            raise ValueError(
                "n_features must be the width of the vectors, a positive integer; got "
                f"{n_features!r}."
            )
        if image_size is not None:
            _check_image_size(image_size, modality)
            image_size = int(image_size)
        self._load = load
        self.name = name
        self.version = version
        self.modality = modality
        self.n_features = int(n_features)
        self.image_size = image_size
        self._is_size_checked = False

    def __getstate__(self):
        """Return the state to pickle, and warn once if it contains a model."""
        if not self._is_size_checked:
            self._is_size_checked = True
            self._warn_of_large_pickle()
        return self.__dict__

    def _warn_of_large_pickle(self):
        try:
            n_bytes = len(pickle.dumps(wrap_non_picklable_objects(self._load)))
        except Exception:  # raised again by the pickler that called __getstate__
            return
        if n_bytes > _LARGE_PICKLE:
            warnings.warn(
                f"The function load of {self!r} is a pickle of {n_bytes / 1e6:.0f} MB, "
                "which is copied for each task of a parallel search: it seems to use a "
                "model from outside. Load the model inside of load, as in: def load(): "
                "return make_model().encode",
                UserWarning,
                stacklevel=2,
            )

    def __repr__(self):
        return f"CallableBackend({self.name!r}, version={self.version!r})"

    def __sklearn_clone__(self):
        """Return the backend itself, which is immutable."""
        return self

    def describe(self):
        """Return everything that changes a vector.

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

    def weights(self):
        """Return the key of the loaded model.

        Returns
        -------
        key : str
            The description in JSON: equal backends share one loaded model in a process.
        """
        return json.dumps(self.describe())

    @property
    def network_key(self):
        """Key of the exported network, if `load` returns a torch module."""
        return self.weights()

    network_use = "as it is"

    def load(self):
        """Load the model.

        Returns
        -------
        loaded : callable or pair of callables
            The value that the `load` passed at construction returns.

        Raises
        ------
        TypeError
            If `load` requires arguments, or returns neither a function nor a pair of
            functions.
        """
        if _needs_arguments(self._load):
            raise TypeError(
                "load must take no arguments and return the encoding function, but "
                f"{self._load!r} requires arguments. If it is the encoding function "
                "itself, pass: lambda: encode."
            )
        loaded = self._load()
        _LOADED_CODE[self.weights()] = _code(self._load)
        functions = [loaded]
        if isinstance(loaded, tuple) and len(loaded) == 2:
            functions = loaded
        if not all(map(callable, functions)):
            raise TypeError(
                "load must return the encoding function, or a pair of functions "
                f"(prepare, encode); it returned {loaded!r}."
            )
        return loaded

    def encoding(self, loaded):
        """Return the steps by which the loaded model encodes cells.

        Parameters
        ----------
        loaded : callable or pair of callables
            The return value of `load`.

        Returns
        -------
        encoding : Encoding
            The steps.

        Warns
        -----
        UserWarning
            If another function of the same name and version loaded the model.
        """
        if _LOADED_CODE.get(self.weights(), _code(self._load)) != _code(self._load):
            warnings.warn(
                f"Another function load has loaded the model of {self!r} in this "
                "process, and its vectors are returned. Change the version whenever "
                "you edit load.",
                UserWarning,
                stacklevel=2,
            )
        if not isinstance(loaded, tuple):
            return Encoding(loaded)
        prepare, encode = loaded
        prepare_all = functools.partial(_prepare_each, prepare)
        if not _is_module(encode):
            return Encoding(encode, prepare_all)
        network = self._network(encode)
        if _device_of(encode).type == "cpu":
            return Encoding(None, prepare_all, network=network)
        # Runtimes run on the CPU only, so they are not offered the network.
        module = network.module()
        forward = network.forward(lambda inputs: module(*inputs.values()))
        return Encoding(forward, prepare_all)

    def trainable(self, device):
        """Return a copy of the network, and its differentiable steps.

        Parameters
        ----------
        device : str
            Device of the copy.

        Returns
        -------
        trainable : Trainable
            The network and the steps.

        Raises
        ------
        ValueError
            If `load` does not return a pair of a function and a torch module.
        """
        with loading():
            loaded = self.load()
        if not (isinstance(loaded, tuple) and _is_module(loaded[1])):
            raise ValueError(
                f"{self!r} cannot be fine-tuned: its function load must return a pair "
                "(prepare, encode), and encode must be a torch.nn.Module."
            )

        from sklembed._torch import resolve_device

        prepare, network = loaded
        device = resolve_device(device)
        # `load` may return a module that others use.
        network = copy.deepcopy(network).float().eval().to(device)

        def vectors(network, prepared):
            output = network(_stack(prepared, device))
            return output[0] if isinstance(output, tuple) else output

        return Trainable(network, vectors, functools.partial(_prepare_each, prepare))

    def _network(self, module):
        """Return the network of a torch module that takes stacked cells."""
        import torch

        from sklembed.nn.layers import Applied

        device = _device_of(module)

        def inputs(prepared):
            return {"cells": _stack(prepared, device)}

        def forward(run):
            def encode(prepared):
                with torch.inference_mode():
                    return run(inputs(prepared))[0].cpu().numpy()

            return encode

        return Network(
            label=self.name,
            key=self.network_key,
            use=self.network_use,
            module=lambda: Applied(lambda network, cells: network(cells), module),
            inputs=inputs,
            forward=forward,
            trial=list,  # nobody knows which cells `prepare` takes
            dynamic_axes=(0,),
        )


def _prepare_each(prepare, cells) -> list:
    return [prepare(cell) for cell in cells]


def _stack(prepared, device):
    """Return prepared cells as one tensor on a device."""
    import torch

    return torch.stack([torch.as_tensor(cell) for cell in prepared]).to(device)


def trial_cells(modality: Modality) -> list:
    """Return a short text, a long one and one of 2000 tokens, or two images."""
    if modality == "text":
        return ["a", _LONG_TEXT, _LONG_TEXT * 25]
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels), Image.fromarray(255 - pixels[::-1])]


def _is_module(function) -> bool:
    """Return whether a function is a torch module; torch is not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(function, torch.nn.Module)


def _device_of(module):
    """Return the device of the first weight of a torch module; the CPU without any."""
    import torch

    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _check_image_size(image_size, modality):
    """Raise an error if the size of images is not a positive integer, or useless."""
    if not isinstance(image_size, Integral) or image_size < 1:
        raise ValueError(
            "image_size must be the smaller side of the resized images in pixels, a "
            f"positive integer, or None; got {image_size!r}."
        )
    if modality != "image":
        raise ValueError(
            f"image_size would have no effect: the cells are {modality}. Leave it None."
        )


def _code(value):
    """Return the code of a function, its constants and the values that it captures.

    Two functions are equal if these are. Captured values are compared only if they are
    numbers, texts or functions; the position of a function in its file is ignored.
    """
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, tuple(map(_code, value.co_consts))
    if isinstance(value, types.FunctionType):
        captured = [_captured(cell) for cell in value.__closure__ or ()]
        return _code(value.__code__), tuple(captured), _code(value.__defaults__)
    if isinstance(value, functools.partial):
        return _code((value.func, *value.args, *sorted(value.keywords.items())))
    if isinstance(value, tuple):
        return tuple(map(_code, value))
    if isinstance(value, str | bytes | int | float | None):
        return repr(value)
    return type(value).__qualname__


def _captured(cell):
    """Return the code of a captured value, without its own captured values."""
    try:
        value = cell.cell_contents
    except ValueError:  # not assigned yet
        return None
    # Not _code(value): a function that captures itself would recurse for ever.
    return _code(getattr(value, "__code__", value))


def _needs_arguments(function) -> bool:
    """Return whether a function cannot be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False
