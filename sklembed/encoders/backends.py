"""What a model must offer: describe itself, load, and say how it encodes. CallableBackend."""

import functools
import inspect
import json
import pickle
import types
import warnings
from numbers import Integral
from typing import Any, Literal, Protocol

from joblib import wrap_non_picklable_objects

from sklembed.encoders.inference import Encoding

Modality = Literal["text", "image"]

MODALITIES = ("text", "image")

_LARGE_PICKLE = (
    1_000_000  # bytes; code takes some kilobytes, a model some hundred megabytes
)
_LOADED_CODE: dict[
    str, Any
] = {}  # the code of the function that loaded a model, by its key


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

    def weights(self) -> str:
        """Name what `load` loads; encoders that agree in it share one copy in a process."""

    def load(self) -> Any:
        """Load the model."""

    def encoding(self, loaded: Any) -> Encoding:
        """Say how what `load` returned encodes cells."""


class CallableBackend:
    """Bring any model: a function that loads it, and what the vectors are to be known by.

    Parameters
    ----------
    load : callable
        Takes nothing, loads the model and returns ``encode``: a function that maps a list of cells
        to an array of shape (n_cells, n_features), or for an encoder with ``output="tokens"`` to a
        list of n_cells arrays of shape (n_tokens, n_features). It may return a pair ``prepare,
        encode`` instead: ``prepare`` takes one cell, threads call it while the model is busy,
        and ``encode`` is given a list of what it returned. `load` is called once a process, and
        only when there is something to encode, so that neither clones nor pickles carry weights.
        Load the model inside of it: a model from outside travels in every pickle, of which a
        warning is given.

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
                raise TypeError(
                    f"{argument} must be a str that is not empty; got {value!r}."
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
        self._is_weighed = False

    def __getstate__(self):
        """Return the state to pickle, and warn once where it would carry a model along."""
        if not self._is_weighed:
            self._is_weighed = True
            self._warn_of_a_captured_model()
        return self.__dict__

    def _warn_of_a_captured_model(self):
        try:
            n_bytes = len(pickle.dumps(wrap_non_picklable_objects(self._load)))
        except (
            Exception
        ):  # whatever it is, the pickler that asks for the state raises it too
            return
        if n_bytes > _LARGE_PICKLE:
            warnings.warn(
                f"The function load of {self!r} is a pickle of {n_bytes / 1e6:.0f} MB, which each "
                "task of a parallel search carries: it seems to use a model from outside. Load the "
                "model inside of load, as in: def load(): return make_model().encode",
                UserWarning,
                stacklevel=2,
            )

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

    def weights(self):
        """Name what `load` loads.

        Returns
        -------
        key : str
            The description in JSON: equal backends share one loaded model in a process.
        """
        return json.dumps(self.describe())

    def load(self):
        """Load the model.

        Returns
        -------
        loaded : callable or pair of callables
            What the `load` given at construction returns.

        Raises
        ------
        TypeError
            If `load` asks for arguments, or returns neither a function nor two.
        """
        if _needs_arguments(self._load):
            raise TypeError(
                f"load must take nothing and return the encoding function, but {self._load!r} asks "
                "for arguments. If it is the encoding function itself, pass: lambda: encode."
            )
        loaded = self._load()
        _LOADED_CODE[self.weights()] = _code(self._load)
        functions = (
            loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (loaded,)
        )
        if not all(callable(function) for function in functions):
            raise TypeError(
                "load must return the encoding function, or a pair of functions (prepare, encode); "
                f"it returned {loaded!r}."
            )
        return loaded

    def encoding(self, loaded):
        """Say how what `load` returned encodes cells.

        Parameters
        ----------
        loaded : callable or pair of callables
            What `load` returned.

        Returns
        -------
        encoding : Encoding
            The steps.

        Warns
        -----
        UserWarning
            If the function that loaded the model is another one of the same name and version.
        """
        if _LOADED_CODE.get(self.weights(), _code(self._load)) != _code(self._load):
            warnings.warn(
                f"Another function load has loaded the model of {self!r} in this process, and its "
                "vectors are returned. Change the version whenever you edit load.",
                UserWarning,
                stacklevel=2,
            )
        if not isinstance(loaded, tuple):
            return Encoding(loaded)
        prepare, encode = loaded
        return Encoding(encode, lambda cells: [prepare(cell) for cell in cells])


def _code(value):
    """Return what tells functions apart: their code, its constants and the values they capture.

    Of values only numbers and texts count; the place of a function in its file does not.
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
    """Return what tells a captured value from others; a function may capture itself."""
    try:
        value = cell.cell_contents
    except ValueError:  # not assigned yet
        return None
    return _code(getattr(value, "__code__", value))


def _needs_arguments(function) -> bool:
    """Tell whether a function cannot be called without arguments."""
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )
