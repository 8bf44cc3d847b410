"""Save and load fitted estimators as safetensors and JSON, without code."""

import builtins
import copyreg
import functools
import importlib
import json
import os
import site
import sys
import sysconfig
from collections import OrderedDict
from hashlib import blake2b
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

import sklembed
from sklembed._compiled import check_state

_FORMAT = 4
_CONFIG, _WEIGHTS, _LOCK = "config.json", "weights-{}.safetensors", ".lock"
_MAX_DEPTH = 100  # of values in values, so that `load` stays below Python's limit
# Objects are built of classes in these packages only, except classes that evaluate
# expressions, load pickles or open connections.
_ROOTS = ("sklembed.", "sklearn.", "skrub.", "scipy.sparse.")
_EXCLUDED = (
    "skrub._data_ops.",
    "sklearn.callback._scoring_monitor.",
    "sklearn.callback._transport.",
)
# Compiled classes are built by a call in the first modules, and by their state in the
# others. Those of other modules are refused, because an object without the state that
# its methods expect can end the process.
_CALLED = (
    "sklearn._loss._loss",
    "sklearn.linear_model._sgd_fast",
    "sklearn.tree._tree",
)
_COMPILED = (
    *_CALLED,
    "sklearn.metrics._dist_metrics",
    "sklearn.neighbors._ball_tree",
    "sklearn.neighbors._kd_tree",
)
# Functions within estimators of scikit-learn and skrub. None has side effects.
_FUNCTIONS = (
    "fnmatch:fnmatchcase",
    "sklearn.cluster._kmeans:_kmeans_single_",
    "sklearn.feature_selection._mutual_info:",
    "sklearn.feature_selection._univariate_selection:",
    "sklearn.metrics._classification:",
    "sklearn.metrics._ranking:",
    "sklearn.metrics._regression:",
    "sklearn.utils.validation:check_array",
    "skrub._dataframe._common:",
    "skrub._table_vectorizer:",
    "skrub.selectors.",
)
# Attributes of scikit-learn for callbacks, and the settings of Pillow in a process,
# which contain pickles.
_NOT_SAVED = {
    "_image_settings",
    "_parent_callback_ctx",
    "_skl_callbacks",
}
_SCALARS = "biufU"  # kinds of numbers and texts of numpy
_REMEDY = (
    "Replace it by a part of sklembed, scikit-learn or skrub, or save with joblib."
)
_REMEDY_OF_ENCODER = (
    "Save the encoder without its function: set_params(..., model='name') before you "
    "save, and set_params(..., model=backend) after you load."
)
_TRUST = (
    "trust_remote_code=True runs code that comes with a model, which saved files must "
    "not cause. Set it to False before you save, and to True after you load."
)


class Saved:
    """The methods `save` and `load` of estimators."""

    def save(self, directory):
        """Write the fitted estimator to a directory, as :func:`sklembed.save` does.

        Parameters
        ----------
        directory : str or Path
            Directory of the files; created if it does not exist.

        Raises
        ------
        TypeError
            If a parameter or a label has a type that cannot be saved without code.
        FileExistsError
            If the directory contains other files.
        """
        save(self, directory)

    @classmethod
    def load(cls, directory):
        """Read an estimator that `save` wrote.

        Parameters
        ----------
        directory : str or Path
            Directory of the files.

        Returns
        -------
        estimator : estimator
            The fitted estimator.

        Raises
        ------
        ValueError
            If the files are damaged or contain an estimator of another class.
        """
        estimator = load(directory)
        if type(estimator) is not cls:
            raise ValueError(
                f"{directory} contains a {type(estimator).__name__}; expected a "
                f"{cls.__name__}."
            )
        return estimator


def save(estimator, directory):
    """Write a fitted estimator or pipeline to a directory, without code.

    The directory contains arrays in a safetensors file and everything else in
    ``config.json``. :func:`load` reads them on any machine, and needs torch only if the
    estimator does. An estimator that was saved there before is replaced: until the new
    one is complete, `load` returns the old one.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator of sklembed, scikit-learn or skrub, with all its parts. A
        search, such as :class:`~sklearn.model_selection.GridSearchCV`, is replaced by
        its ``best_estimator_``. Encoders are saved as parameters, without the weights
        and the store. Models that are installed as packages are found again on another
        machine.

    directory : str or Path
        Directory of the files; created if it does not exist.

    Raises
    ------
    TypeError
        If a part cannot be saved without code, such as an estimator of another library
        or a function. The message names the part. Nothing is written.
    FileExistsError
        If the directory contains other files.
    NotFittedError
        If the estimator is not fitted.

    See Also
    --------
    load : Read the estimator.

    Examples
    --------
    >>> import tempfile
    >>> import sklembed
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> model = make_pipeline(StandardScaler(), LogisticRegression())
    >>> directory = tempfile.mkdtemp()
    >>> sklembed.save(model.fit([[0.0], [1.0]], ["no", "yes"]), directory)
    >>> sklembed.load(directory).predict([[0.1], [0.9]])
    array(['no', 'yes'], dtype='<U3')
    """
    from safetensors.numpy import save as to_bytes

    check_is_fitted(estimator)
    writer = _Writer()
    root = writer.encode(estimator, "")
    weights = to_bytes(writer.arrays)
    config = {
        "format": _FORMAT,
        "versions": _versions(),
        "weights": _digest(weights),
        "estimator": root,
        "objects": writer.objects,
    }
    config["digest"] = _digest_of_config(config)
    directory = Path(directory)
    _check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new_weights = directory / _WEIGHTS.format(config["weights"])
    # Without the lock, a second process could delete the weights of this one.
    with FileLock(directory / _LOCK):
        _write(new_weights, weights)
        # This step alone replaces an earlier estimator, which is whole until then.
        _write(directory / _CONFIG, json.dumps(config).encode())
        current = (_CONFIG, _LOCK, new_weights.name)
        for path in directory.iterdir():  # also files of a save that was killed
            if _is_saved_file(path) and path.name not in current:
                path.unlink()


def load(directory):
    """Read an estimator or pipeline that :func:`save` wrote.

    The files contain no code, and only classes of sklembed, scikit-learn, skrub and
    scipy.sparse are built. Predictions are identical under equal versions of these
    packages and of numpy.

    Parameters
    ----------
    directory : str or Path
        Directory of the files.

    Returns
    -------
    estimator : estimator
        The fitted estimator. ``set_params`` reaches the fitted encoders, for example to
        change the store or the path of a model.

    Raises
    ------
    FileNotFoundError
        If the directory or one of the files does not exist.
    ValueError
        If the files are damaged, name other classes, or have the format of another
        release.

    Warns
    -----
    InconsistentVersionWarning
        If another version of scikit-learn fitted the estimator.

    See Also
    --------
    save : Write the estimator.

    Examples
    --------
    >>> import tempfile
    >>> import sklembed
    >>> from sklearn.linear_model import Ridge
    >>> directory = tempfile.mkdtemp()
    >>> sklembed.save(Ridge(alpha=1.0).fit([[0.0], [2.0]], [0.0, 3.0]), directory)
    >>> sklembed.load(directory).predict([[1.0]])
    array([1.5])
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    directory = Path(directory)
    config, path, weights = _read(directory)
    if _digest(weights) != config["weights"]:
        raise ValueError(f"{path} is damaged: its content has another digest.")
    try:
        reader = _Reader(config["objects"], from_bytes(weights))
        estimator = reader.decode(config["estimator"])
        if not isinstance(estimator, BaseEstimator):
            raise TypeError(f"{type(estimator).__name__} is not an estimator")
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RecursionError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{directory / _CONFIG} cannot be read: {type(error).__name__}: {error}. "
            f"It was written with {config['versions']}; this is {_versions()}. If the "
            "versions are equal, the file is damaged, and you should not trust it."
        ) from error
    return estimator


class _Writer:
    """Turn an estimator into JSON, a list of objects and a dict of arrays.

    JSON types are written as they are, and other types as a dict with one key, the name
    of the type. Objects are listed once each, so that shared objects stay shared.
    """

    def __init__(self):
        self.arrays, self.objects = {}, []
        self._depth = 0
        # Values by id, which keeps them alive, so that no id is used twice.
        self._written = {}

    def encode(self, value, path):
        """Return a value in JSON types; `path` names it in errors."""
        if self._depth == _MAX_DEPTH:
            raise TypeError(
                f"{path[:200]} is within {_MAX_DEPTH} values in one another, or "
                "contains itself, which cannot be saved."
            )
        self._depth += 1
        encoded = self._encode(value, path)
        self._depth -= 1
        return encoded

    def _encode(self, value, path):
        kind = type(value)
        if value is None or kind in (bool, int, float):
            return value
        if kind is str:
            installed = _relative_to_packages(value)
            return value if installed is None else {"installed": installed}
        if kind is list:
            return self._items(value, path)
        if kind in (tuple, set, frozenset):
            return {kind.__name__: self._items(list(value), path)}
        if kind is slice:
            return {"slice": self._items([value.start, value.stop, value.step], path)}
        if kind in (dict, OrderedDict):
            return {kind.__name__: self._pairs(value, path)}
        if _is_missing_value(value):
            return {"missing": str(value)}
        if isinstance(value, Path):
            return {"path": self.encode(str(value), path)}
        if isinstance(value, np.generic) and _is_json_scalar(value.dtype):
            return {"scalar": [value.dtype.str, value.item()]}
        if isinstance(value, np.generic) and _descr(value.dtype) is not None:
            return {"element": self._array(np.asarray(value), path)}
        if isinstance(value, np.dtype) and _descr(value) is not None:
            return {"dtype": _descr(value)}
        if isinstance(value, type) and _is_plain(value):
            return {"type": [value.__module__, value.__qualname__]}
        if isinstance(value, np.ufunc) and getattr(np, value.__name__, 0) is value:
            return {"ufunc": value.__name__}
        if isinstance(value, np.random.RandomState):
            return {"RandomState": self.encode(value.get_state(legacy=False), path)}
        if isinstance(value, np.random.Generator):
            return {"Generator": self.encode(value.bit_generator.state, path)}
        if _is_spline(value):
            return {"spline": self._items(_parts_of(value), path)}
        if kind is functools.partial:
            parts = [value.func, list(value.args), value.keywords]
            return {"partial": self._items(parts, path)}
        if _is_known_function(value):
            return {"function": [value.__module__, value.__name__]}
        if id(value) not in self._written:
            if kind in (np.ndarray, np.memmap):
                written = self._array(value, path)
            else:
                written = self._object(value, path)
            self._written[id(value)] = written, value
        return self._written[id(value)][0]

    def _pairs(self, items, path):
        """Return a list of keys and values, because keys of JSON are strings."""
        pairs = []
        for key, item in items.items():
            item = self.encode(item, _join(path, key))
            pairs.append([self.encode(key, path), item])
        return pairs

    def _items(self, items, path):
        encoded = []
        for number, item in enumerate(items):
            # The steps of a pipeline and the branches of a union are named.
            if type(item) is tuple and item and type(item[0]) is str:
                parts = [self.encode(part, _join(path, item[0])) for part in item]
                encoded.append({"tuple": parts})
            else:
                encoded.append(self.encode(item, _join(path, number)))
        return encoded

    def _array(self, value, path):
        if value.dtype.kind == "O":
            return {"objects": [value.shape, self._items(list(value.flat), path)]}
        descr = _descr(value.dtype)
        if descr is None:
            raise TypeError(_describe_refusal(value.dtype, path))
        name = path.encode(errors="backslashreplace").decode()
        while name in self.arrays:
            name += "'"
        if value.dtype.kind in "biuf" and value.dtype.isnative and value.itemsize <= 8:
            # The order of the memory can change the last bits of a product.
            is_transposed = value.flags.f_contiguous and not value.flags.c_contiguous
            value = value.T if is_transposed else value
            self.arrays[name] = np.asarray(value, order="C")
            return {"tensor": [name, is_transposed]}
        self.arrays[name] = np.frombuffer(value.tobytes(), dtype=np.uint8)
        return {"bytes": [name, descr, value.shape]}

    def _object(self, value, path):
        """List an object by its class and its state, and return its number."""
        if hasattr(value, "best_estimator_"):
            return self.encode(value.best_estimator_, path)
        if hasattr(value, "cv_results_") and getattr(value, "refit", True) is False:
            raise TypeError(
                f"{path or 'The estimator'} is a search without best_estimator_, which "
                "does not predict. Search with refit=True."
            )
        try:
            args, state, items = _reduce(value)
        except (AttributeError, ImportError, TypeError, ValueError):
            raise TypeError(_describe_refusal(value, path)) from None
        state = _without_process(state)
        if _trusts_code(state):
            raise TypeError(f"{path or 'The estimator'}: {_TRUST}")
        number = len(self.objects)
        written = {"object": number}
        self._written[id(value)] = written, value  # the state may refer to the object
        self.objects.append(None)
        self.objects[number] = {
            "class": _class_name(type(value)),
            "args": self._items(args, path),
            "state": self.encode(state, path),
            "items": self.encode(items, path),
        }
        return written


class _Reader:
    """Turn back what a `_Writer` wrote."""

    def __init__(self, objects, arrays):
        self._objects, self._arrays = objects, arrays
        self._built = {}
        self._readers = {
            "Generator": self._generator,
            "OrderedDict": lambda pairs: OrderedDict(self.decode(pairs)),
            "RandomState": self._random_state,
            "bytes": self._bytes,
            "dict": lambda pairs: dict(self.decode(pairs)),
            "dtype": _dtype,
            "element": lambda array: self.decode(array)[()],
            "frozenset": lambda items: frozenset(self.decode(items)),
            "function": _find_function,
            "installed": _absolute,
            "missing": _missing_value,
            "object": self._object,
            "objects": self._object_array,
            "partial": self._partial,
            "path": lambda path: Path(self.decode(path)),
            "scalar": _scalar,
            "set": lambda items: set(self.decode(items)),
            "slice": lambda ends: slice(*self.decode(ends)),
            "spline": self._spline,
            "tensor": self._tensor,
            "tuple": lambda items: tuple(self.decode(items)),
            "type": _find_type,
            "ufunc": _find_ufunc,
        }

    def decode(self, value):
        """Return the value that was encoded."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return self._readers[kind](content)

    def _object(self, number):
        if number not in self._built:
            entry = self._objects[number]
            cls = _find_class(entry["class"])
            args = self.decode(entry["args"])
            if entry["class"][0] in _CALLED:
                instance = cls(*args)
            elif issubclass(cls, tuple):
                instance = cls.__new__(cls, *args)
            else:
                instance = cls.__new__(cls)
            self._built[number] = instance
            state = _without_process(self.decode(entry["state"]))
            if _trusts_code(state):
                raise ValueError(_TRUST)
            if state is not None and hasattr(cls, "__setstate__"):
                instance.__setstate__(state)
            elif state is not None:
                vars(instance).update(state)
            if entry["items"] is not None:
                instance.update(self.decode(entry["items"]))
            check_state(instance, args, state)
        return self._built[number]

    def _tensor(self, content):
        name, is_transposed = content
        array = self._writable(name)
        return array.T if is_transposed else array

    def _bytes(self, content):
        name, descr, shape = content
        return self._writable(name).view(_dtype(descr)).reshape(shape)

    def _writable(self, name):
        if not self._arrays[name].flags.writeable:
            self._arrays[name] = self._arrays[name].copy()
        return self._arrays[name]

    def _object_array(self, content):
        shape, items = content
        array = np.empty(len(items), dtype=object)
        for position, item in enumerate(items):
            array[position] = self.decode(item)
        return array.reshape(shape)

    def _partial(self, parts):
        function, args, keywords = self.decode(parts)
        return functools.partial(function, *args, **keywords)

    def _random_state(self, state):
        random_state = np.random.RandomState()
        random_state.set_state(self.decode(state))
        return random_state

    def _generator(self, state):
        state = self.decode(state)
        name = state["bit_generator"]
        cls = getattr(np.random, name)
        if not (isinstance(cls, type) and issubclass(cls, np.random.BitGenerator)):
            raise ValueError(f"numpy.random.{name} is not a bit generator")
        bit_generator = cls()
        bit_generator.state = state
        return np.random.Generator(bit_generator)

    def _spline(self, parts):
        from scipy.interpolate import BSpline

        return BSpline(*self.decode(parts))


def _reduce(value):
    """Return the arguments, the state and the items of an object, as pickle does.

    Raises
    ------
    AttributeError, ImportError, TypeError, ValueError
        If the class is not known, or its objects are built in another way.
    """
    cls = type(value)
    module, name = _class_name(cls)
    _find_class([module, name])
    function, args, *rest = value.__reduce_ex__(2)
    state, list_items, items = (*rest, None, None, None)[:3]
    if function is copyreg.__newobj__ or function.__name__ == "newObj":
        args = args[1:]
        is_known = not args or isinstance(value, tuple)
    elif function is cls:
        is_known = module in _CALLED
    else:  # Cython's default for a class without state
        is_known = module in _CALLED and not args[-1]
        args = ()
    if not is_known or list_items is not None:
        raise TypeError(f"{module}.{name} is built by {function}")
    return list(args), state, items if items is None else dict(items)


def _describe_refusal(value, path):
    """Return the message for a value that cannot be saved."""
    if hasattr(value, "__qualname__"):
        noun = "class" if isinstance(value, type) else "function"
        module = getattr(value, "__module__", None) or "builtins"
        described = f"the {noun} {module}.{value.__qualname__}"
    else:
        described = f"a {'.'.join(_class_name(type(value)))}"
    remedy = _REMEDY_OF_ENCODER if path.endswith("/_load") else _REMEDY
    path = path or "The estimator"
    return f"{path} is {described}, which cannot be saved without code. {remedy}"


def _class_name(cls):
    """Return the module and the name of a class."""
    # Before scikit-learn 1.9, its compiled losses have the module "_loss".
    module = "sklearn._loss._loss" if cls.__module__ == "_loss" else cls.__module__
    return [module, cls.__qualname__]


def _find_class(content):
    """Return a class of a known package."""
    module, name = content
    cls = None
    if f"{module}.".startswith(_ROOTS):
        cls = getattr(importlib.import_module(module), name)
    # A module also has the names that it imports.
    is_known = isinstance(cls, type) and _class_name(cls) == [module, name]
    if is_known and _is_compiled(cls):
        is_known = module in _COMPILED
    if not is_known or any(_is_excluded(base) for base in cls.__mro__):
        raise ValueError(
            f"{module}.{name} is not a class of sklembed, scikit-learn, skrub or "
            "scipy.sparse"
        )
    return cls


def _is_compiled(cls):
    """Return whether a class is defined in an extension module."""
    file = getattr(sys.modules[cls.__module__], "__file__", None) or ""
    return file.endswith(tuple(EXTENSION_SUFFIXES))


def _is_excluded(cls):
    return f"{cls.__module__}.".startswith(_EXCLUDED)


def _find_type(content):
    module, name = content
    found = getattr({"builtins": builtins, "numpy": np}[module], name)
    if not _is_plain(found):
        raise ValueError(f"{module}.{name} is not a type of numbers or texts")
    return found


def _is_plain(value):
    """Return whether a type is a number, a text, or the base of all objects."""
    is_scalar = isinstance(value, type) and issubclass(value, np.generic)
    return is_scalar or value in (bool, int, float, str, object)


def _find_ufunc(name):
    ufunc = getattr(np, name)
    if not isinstance(ufunc, np.ufunc):
        raise ValueError(f"numpy.{name} is not a ufunc")
    return ufunc


def _is_known_function(value):
    """Return whether a value is a function that estimators may refer to."""
    if isinstance(value, type) or not callable(value):
        return False
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not f"{module}:{name}".startswith(_FUNCTIONS):
        return False
    return getattr(sys.modules[module], name, None) is value


def _find_function(content):
    module, name = content
    function = None
    if f"{module}:{name}".startswith(_FUNCTIONS):
        function = getattr(importlib.import_module(module), name)
    if not _is_known_function(function):
        raise ValueError(f"{module}.{name} is not a known function")
    return function


def _without_process(state):
    """Return a state without the attributes that refer to the process."""
    if not isinstance(state, dict):
        return state
    return {name: state[name] for name in state if name not in _NOT_SAVED}


def _trusts_code(state):
    return isinstance(state, dict) and bool(state.get("trust_remote_code"))


def _is_json_scalar(dtype):
    """Return whether JSON represents the scalars of a dtype exactly."""
    return dtype.kind in _SCALARS and (dtype.kind == "U" or dtype.itemsize <= 8)


def _scalar(content):
    dtype, value = content
    dtype = np.dtype(dtype)
    if not _is_json_scalar(dtype):
        raise ValueError(f"{dtype} is not a number or a text")
    return dtype.type(value)


def _descr(dtype):
    """Return the description of a dtype in JSON types, or None if it has none."""
    is_mixed = dtype.hasobject and dtype.kind != "O"
    if dtype.kind not in "biufcmMSUVO" or dtype.itemsize == 0 or is_mixed:
        return None
    try:
        descr = np.lib.format.dtype_to_descr(dtype)
        is_complete = _dtype(json.loads(json.dumps(descr))) == dtype
    except (TypeError, ValueError):  # for example, fields that overlap
        return None
    return descr if is_complete else None


def _dtype(descr):
    """Return a dtype; JSON has turned the tuples of its description into lists."""
    if isinstance(descr, list):
        descr = [tuple(field) for field in descr]
    return np.lib.format.descr_to_dtype(descr)


def _is_missing_value(value):
    """Return whether a value is NA or NaT of pandas."""
    cls = type(value)
    return cls.__name__ in ("NAType", "NaTType") and cls.__module__.startswith(
        "pandas."
    )


def _missing_value(name):
    import pandas as pd

    return {"<NA>": pd.NA, "NaT": pd.NaT}[name]


def _is_spline(value):
    """Return whether a value is a spline as in SplineTransformer."""
    cls = type(value)
    is_spline = cls.__name__ == "BSpline" and cls.__module__.startswith("scipy.")
    return is_spline and value.axis == 0


def _parts_of(spline):
    return [spline.t, spline.c, spline.k, spline.extrapolate]


@functools.cache
def _packages():
    """Return the directories in which packages are installed."""
    paths = sysconfig.get_paths()
    directories = [paths["purelib"], paths["platlib"], site.getusersitepackages()]
    return [os.path.realpath(directory) for directory in directories]


def _relative_to_packages(text):
    """Return the path of a file of an installed package relative to the packages."""
    for directory in _packages():
        if text.startswith(directory + os.sep):
            return Path(text).relative_to(directory).as_posix()
    return None


def _absolute(relative):
    """Return the path of a file of a package, also if it is not installed."""
    candidates = [os.path.join(directory, relative) for directory in _packages()]
    for path in candidates:
        if os.path.exists(path):
            return path
    return candidates[0]


def _join(path, name):
    return f"{path}/{name}" if path else str(name)


def _digest(data):
    return blake2b(data, digest_size=16).hexdigest()


def _digest_of_config(config):
    """Return the digest of everything in the configuration but the digest itself."""
    content = {name: config[name] for name in config if name != "digest"}
    return _digest(json.dumps(content).encode())


def _versions():
    names = ("scikit-learn", "skrub", "numpy")
    return {"sklembed": sklembed.__version__} | {name: version(name) for name in names}


def _check_directory(directory):
    """Raise a FileExistsError if a directory cannot take a saved estimator."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file. Save to a directory.")
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if not _is_saved_file(path):
            raise FileExistsError(
                f"{directory} contains {path.name!r}, which is not a file of a saved "
                "estimator. Save to another directory."
            )


def _is_saved_file(path):
    return path.name.startswith((_CONFIG, "weights-", _LOCK))


def _write(path, data):
    """Write a file and move it to its place once it is complete on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(directory):
    """Return the configuration, and the path and the content of the weights."""
    config = _read_config(directory)
    while True:
        path = directory / _WEIGHTS.format(config["weights"])
        try:
            return config, path, path.read_bytes()
        except FileNotFoundError:
            # Another process may have replaced both files.
            earlier, config = config, _read_config(directory)
            if config["weights"] == earlier["weights"]:
                raise


def _read_config(directory):
    """Return the content of the file, and check its format."""
    path = directory / _CONFIG
    digest = None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            digest = _digest_of_config(config)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    written = config.get("format") if isinstance(config, dict) else None
    if written != _FORMAT:
        raise ValueError(
            f"{path} has format {written}; this version of sklembed reads format "
            f"{_FORMAT}. Save again with this version."
        )
    if config.get("digest") != digest:
        raise ValueError(f"{path} is damaged: its content has another digest.")
    expected = {"weights": str, "versions": dict, "objects": list, "estimator": dict}
    for name, kind in expected.items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{path} is damaged: {name} is not a {kind.__name__}.")
    return config
