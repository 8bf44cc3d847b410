"""Save and load fitted estimators as safetensors and JSON."""

import importlib
import json
from pathlib import Path

import numpy as np
from sklearn.utils.validation import check_is_fitted

import sklembed

_FORMAT = 2
# Attributes that scikit-learn sets for metadata routing and callbacks.
_NOT_SAVED = {"_metadata_request", "_skl_callbacks", "_parent_callback_ctx"}
_WEIGHTS, _CONFIG = "weights.safetensors", "config.json"


class Saved:
    """The methods `save` and `load` of estimators."""

    def save(self, directory):
        """Write the fitted estimator to ``weights.safetensors`` and ``config.json``.

        Neither file contains code. `load` reads them on any machine and needs no torch.
        Trees are written by skops, which must be installed.

        Parameters
        ----------
        directory : str or Path
            Directory of the files; created if it does not exist.

        Raises
        ------
        TypeError
            If a parameter or a label has a type that JSON does not support. Use pickle then.
        """
        check_is_fitted(self)
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
            If the directory contains an estimator of another class.
        """
        return load(cls, directory)


def save(estimator, directory) -> None:
    """Write an estimator whose attributes are arrays, plain values, and objects of these.

    Raises
    ------
    TypeError
        If a parameter or an attribute has a type that JSON does not support.
    """
    from safetensors.numpy import save_file

    params = estimator.get_params(deep=False)
    arrays, fitted = {}, {}
    for name, value in vars(estimator).items():
        if name not in params and name not in _NOT_SAVED:
            fitted[name] = _encode(value, name, arrays)
    for name, value in params.items():
        params[name] = _encode(value, name, arrays)
    config = {
        "format": _FORMAT,
        "class": type(estimator).__name__,
        "sklembed": sklembed.__version__,
        "params": params,
        "fitted": fitted,
    }
    text = json.dumps(config, indent=1)  # can fail, so before anything is written
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / _WEIGHTS)
    (directory / _CONFIG).write_text(text, encoding="utf-8")


def load(cls, directory):
    """Read an estimator of the class that `save` wrote.

    Raises
    ------
    ValueError
        If the directory contains an estimator of another class or format.
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if (config.get("format"), config.get("class")) != (_FORMAT, cls.__name__):
        raise ValueError(
            f"{directory} contains a {config.get('class')} in format {config.get('format')}; "
            f"expected a {cls.__name__} in format {_FORMAT}."
        )
    arrays = load_file(directory / _WEIGHTS)
    params = {}
    for name, value in config["params"].items():
        params[name] = _decode(value, arrays)
    estimator = cls(**params)
    for name, value in config["fitted"].items():
        setattr(estimator, name, _decode(value, arrays))
    return estimator


def _encode(value, path, arrays):
    """Return a value that JSON supports; move numeric arrays to `arrays` by path.

    Other types are marked by their name. Estimators of scikit-learn are encoded by
    skops, as an array of bytes.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return _encode_array(value, path, arrays)
    if isinstance(value, list):
        return [_encode(item, f"{path}/{i}", arrays) for i, item in enumerate(value)]
    if isinstance(value, slice):
        ends = [value.start, value.stop, value.step]
        return {"slice": _encode(ends, path, arrays)}
    if isinstance(value, dict):  # a list of pairs, because keys of JSON are strings
        pairs = []
        for key, item in value.items():
            pairs.append(
                [_encode(key, path, arrays), _encode(item, f"{path}/{key}", arrays)]
            )
        return {"dict": pairs}
    module = type(value).__module__.split(".")[0]
    if module == "sklembed":
        return _encode_object(value, path, arrays)
    if isinstance(value, tuple):
        return {"tuple": _encode(list(value), path, arrays)}
    if module == "sklearn" and hasattr(value, "get_params"):
        path = _unused(path, arrays)
        arrays[path] = np.frombuffer(_skops().dumps(value), dtype=np.uint8)
        return {"skops": path}
    name = path.split("/")[0]
    raise TypeError(
        f"{name} is a {type(value).__name__}, which JSON does not support. Save with "
        f"pickle, joblib or skops, or set {name} to a plain value first."
    )


def _encode_array(value, path, arrays):
    if value.dtype.kind in "biuf" and value.dtype.isnative:
        path = _unused(path, arrays)
        arrays[path] = np.asarray(value, order="C")
        return {"tensor": path}
    dtype = "object" if value.dtype.kind == "O" else str(value.dtype)
    return {"array": _encode(value.tolist(), path, arrays), "dtype": dtype}


def _unused(path, arrays):
    """Return a path without an array; the keys 1 and "1" make equal paths."""
    while path in arrays:
        path += "'"
    return path


def _encode_object(value, path, arrays):
    """Encode an object of this package by its class and its attributes."""
    state = value._asdict() if isinstance(value, tuple) else vars(value)
    state = {name: item for name, item in state.items() if name not in _NOT_SAVED}
    cls = type(value)
    return {
        "object": f"{cls.__module__}:{cls.__qualname__}",
        "state": _encode(state, path, arrays),
    }


def _decode(value, arrays):
    """Return the value from which `_encode` was made."""
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return arrays[value["tensor"]]
    if "array" in value:
        return np.array(_decode(value["array"], arrays), dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_decode(value["tuple"], arrays))
    if "slice" in value:
        return slice(*value["slice"])
    if "object" in value:
        return _decode_object(value, arrays)
    if "skops" in value:
        return _load_sklearn(arrays[value["skops"]].tobytes())
    return dict(_decode(value["dict"], arrays))


def _decode_object(value, arrays):
    module, _, name = value["object"].partition(":")
    if module.split(".")[0] != "sklembed":
        raise ValueError(f"{value['object']} is not a class of sklembed.")
    cls = getattr(importlib.import_module(module), name, None)
    # A module also has the names that it imports.
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f"{value['object']} is not a class of sklembed.")
    state = _decode(value["state"], arrays)
    if issubclass(cls, tuple):
        return cls(**state)
    decoded = cls.__new__(cls)
    vars(decoded).update(state)
    return decoded


def _load_sklearn(data):
    """Load an estimator of scikit-learn; refuse types of other packages."""
    unknown = _skops().get_untrusted_types(data=data)
    for name in unknown:
        # Before scikit-learn 1.9, its compiled losses have the module "_loss".
        if not name.startswith(("sklearn.", "_loss.Cy")):
            raise ValueError(
                f"The file contains a {name}, but only estimators of scikit-learn are "
                "expected. Do not trust it."
            )
    return _skops().loads(data, trusted=unknown)


def _skops():
    try:
        import skops.io
    except ImportError as error:
        raise ImportError(
            "Saving and loading estimators of scikit-learn requires skops. Install it "
            "by: pip install skops"
        ) from error
    return skops.io
