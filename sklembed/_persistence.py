"""How a fitted estimator leaves Python and comes back: safetensors and JSON."""

import json
from pathlib import Path

import numpy as np

import sklembed

_FORMAT = 1
# What scikit-learn keeps of requests and callbacks.
_OF_THE_PROCESS = {"_metadata_request", "_skl_callbacks", "_parent_callback_ctx"}
_WEIGHTS, _CONFIG = "weights.safetensors", "config.json"


def save(estimator, directory) -> None:
    """Write an estimator whose fitted attributes are dictionaries of arrays and plain values.

    Raises
    ------
    TypeError
        If a parameter or an attribute is of a kind that JSON does not know.
    """
    from safetensors.numpy import save_file

    arrays, plain = {}, {}
    for name, value in vars(estimator).items():
        if name in estimator.get_params(deep=False) or name in _OF_THE_PROCESS:
            continue
        if _is_arrays(value):
            arrays |= {f"{name}/{key}": array for key, array in value.items()}
            plain[name] = {"arrays": list(value)}
        else:
            plain[name] = {"value": _to_json(value, name)}
    config = {
        "format": _FORMAT,
        "class": type(estimator).__name__,
        "sklembed": sklembed.__version__,
        "params": {
            name: _to_json(value, name)
            for name, value in estimator.get_params(deep=False).items()
        },
        "fitted": plain,
    }
    text = json.dumps(config, indent=1)  # before anything is written
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.asarray(array, order="C") for name, array in arrays.items()},
        directory / _WEIGHTS,
    )
    (directory / _CONFIG).write_text(text, encoding="utf-8")


def load(cls, directory):
    """Read an estimator of the class that `save` wrote.

    Raises
    ------
    ValueError
        If the directory holds an estimator of another class or format.
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if (config.get("format"), config.get("class")) != (_FORMAT, cls.__name__):
        raise ValueError(
            f"{directory} holds a {config.get('class')} in format {config.get('format')}; expected "
            f"a {cls.__name__} in format {_FORMAT}."
        )
    arrays = load_file(directory / _WEIGHTS)
    estimator = cls(
        **{name: _from_json(value) for name, value in config["params"].items()}
    )
    for name, entry in config["fitted"].items():
        if "arrays" in entry:
            value = {key: arrays[f"{name}/{key}"] for key in entry["arrays"]}
        else:
            value = _from_json(entry["value"])
        setattr(estimator, name, value)
    return estimator


def _is_arrays(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, np.ndarray) for v in value.values()
    )


def _to_json(value, name):
    """Turn a value into what JSON knows, arrays and tuples marked so that they come back."""
    if isinstance(value, np.ndarray):
        values = [_to_json(item, name) for item in value.tolist()]
        return {
            "array": values,
            "dtype": "object" if value.dtype.kind == "O" else str(value.dtype),
        }
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, slice):
        return {
            "slice": [
                _to_json(part, name) for part in (value.start, value.stop, value.step)
            ]
        }
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item, name) for item in value]}
    if isinstance(value, list):
        return [_to_json(item, name) for item in value]
    if isinstance(value, dict):
        return {
            "dict": [[_to_json(k, name), _to_json(v, name)] for k, v in value.items()]
        }
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which JSON does not know. Save by pickle, joblib "
        f"or skops, or set {name} to a plain value first."
    )


def _from_json(value):
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.array(
            [_from_json(item) for item in value["array"]], dtype=value["dtype"]
        )
    if "slice" in value:
        return slice(*value["slice"])
    if "tuple" in value:
        return tuple(_from_json(value["tuple"]))
    return {_from_json(k): _from_json(v) for k, v in value["dict"]}
