"""Save and load fitted estimators as safetensors and JSON."""

import json
from pathlib import Path

import numpy as np

import sklembed

_FORMAT = 1
# Attributes that scikit-learn sets for metadata routing and callbacks.
_NOT_SAVED = {"_metadata_request", "_skl_callbacks", "_parent_callback_ctx"}
_WEIGHTS, _CONFIG = "weights.safetensors", "config.json"


def save(estimator, directory) -> None:
    """Write an estimator whose fitted attributes are dictionaries of arrays and plain values.

    Raises
    ------
    TypeError
        If a parameter or an attribute has a type that JSON does not support.
    """
    from safetensors.numpy import save_file

    params = estimator.get_params(deep=False)
    arrays, fitted = {}, {}
    for name, value in vars(estimator).items():
        if name in params or name in _NOT_SAVED:
            continue
        if _is_dict_of_arrays(value):
            for key, array in value.items():
                arrays[f"{name}/{key}"] = np.asarray(array, order="C")
            fitted[name] = {"arrays": list(value)}
        else:
            fitted[name] = {"value": _to_json(value, name)}
    for name, value in params.items():
        params[name] = _to_json(value, name)
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
    params = {name: _from_json(value) for name, value in config["params"].items()}
    estimator = cls(**params)
    for name, entry in config["fitted"].items():
        if "arrays" in entry:
            value = {key: arrays[f"{name}/{key}"] for key in entry["arrays"]}
        else:
            value = _from_json(entry["value"])
        setattr(estimator, name, value)
    return estimator


def _is_dict_of_arrays(value) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(item, np.ndarray) for item in value.values())


def _to_json(value, name):
    """Return a value that JSON supports; arrays, slices and tuples are marked by their type."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        dtype = "object" if value.dtype.kind == "O" else str(value.dtype)
        return {"array": _to_json(value.tolist(), name), "dtype": dtype}
    if isinstance(value, list):
        return [_to_json(item, name) for item in value]
    if isinstance(value, tuple):
        return {"tuple": _to_json(list(value), name)}
    if isinstance(value, slice):
        return {"slice": _to_json([value.start, value.stop, value.step], name)}
    if isinstance(value, dict):  # a list of pairs, because keys of JSON are strings
        return {"dict": _to_json([list(item) for item in value.items()], name)}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which JSON does not support. Save with pickle, "
        f"joblib or skops, or set {name} to a plain value first."
    )


def _from_json(value):
    """Return the value from which `_to_json` was made."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.array(_from_json(value["array"]), dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_from_json(value["tuple"]))
    if "slice" in value:
        return slice(*value["slice"])
    return dict(_from_json(value["dict"]))
