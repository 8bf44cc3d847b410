"""Checks shared by estimators, with messages that say what was got and what to do."""

from numbers import Integral

import numpy as np
import pandas as pd
import sklearn
from sklearn.utils import check_random_state, column_or_1d

_MOST_LABELS = 2**16 - 1  # of a pixel


def check_no_missing_label(y) -> None:
    """Refuse a target with a missing label, naming the first row that lacks one.

    Raises
    ------
    ValueError
        If any label is None, NaN or NA.
    """
    missing = np.atleast_1d(pd.isna(np.asarray(y)))
    rows = np.flatnonzero(missing.any(axis=tuple(range(1, missing.ndim))))
    if len(rows):
        raise ValueError(
            f"Input y contains NaN or None in {len(rows)} of {len(missing)} rows, first in row "
            f"{rows[0]}. Drop the rows without a label before fitting."
        )


def encode_classes(y) -> tuple[np.ndarray, np.ndarray]:
    """Split class labels of any sortable type into the classes and each row's index into them.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        The sorted distinct labels.
    codes : ndarray of shape (n_samples,), dtype int64
        Position of each row's label in `classes`.

    Raises
    ------
    ValueError
        If there are fewer than two classes.
    """
    classes, codes = sorted_labels(column_or_1d(y, warn=True))
    if len(classes) < 2:
        raise ValueError(
            f"y holds 1 class only ({classes[0]} in all {len(codes)} rows); at least two are "
            "needed."
        )
    return classes, codes


def sorted_labels(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct labels, and each row's index into them.

    Raises
    ------
    TypeError
        If they are of types that have no common order.
    """
    try:
        classes, codes = np.unique(y, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in y})
        raise TypeError(
            f"y mixes labels of the types {', '.join(kinds)}, which have no order. Make them one "
            "type, for example all str."
        ) from error
    return classes, codes.astype(np.int64)


def check_masks(y, name="y") -> list[np.ndarray]:
    """Read a sequence of masks: arrays of whole numbers, a label for each pixel.

    Returns
    -------
    masks : list of ndarray of shape (height, width), dtype bool or integer
        The masks, which may differ in size.

    Raises
    ------
    ValueError
        If there is none, one is missing or has another shape, or a label is no whole number from 0
        to 65535; the message names the row.
    """
    masks = [_as_mask(raw, f"Row {row} of {name}") for row, raw in enumerate(y)]
    if not masks:
        raise ValueError(f"{name} holds no mask; at least one is needed.")
    return masks


def _as_mask(raw, what: str) -> np.ndarray:
    try:
        mask = np.asarray(raw)
        got = f"shape {mask.shape}" if mask.ndim else repr(raw)
    except ValueError:  # rows of different lengths
        mask, got = np.empty(0), "rows of different lengths"
    if mask.ndim != 2 or not mask.size:
        hint = " (a picture? Take one channel)" if mask.ndim == 3 else ""
        raise ValueError(
            f"{what} should be a mask, an array of shape (height, width) with a label for each "
            f"pixel; got {got}{hint}."
        )
    if mask.dtype.kind == "b":
        return mask
    if mask.dtype.kind not in "iuf":
        raise ValueError(f"{what} should be a mask of whole numbers; got dtype {mask.dtype}.")
    check_labels_of_pixels(mask, what)
    return mask if mask.dtype.kind in "iu" else mask.astype(np.uint16)


def check_labels_of_pixels(labels: np.ndarray, what: str) -> None:
    """Refuse labels that are no whole numbers from 0 to 65535.

    Raises
    ------
    ValueError
        If one is.
    """
    wrong = ~((labels >= 0) & (labels <= _MOST_LABELS))  # NaN too
    if labels.dtype.kind == "f":
        wrong |= labels != np.floor(labels)
    if wrong.any():
        raise ValueError(
            f"{what} holds the label {labels[wrong][0]}; labels of pixels are whole numbers from "
            f"0, the background, to {_MOST_LABELS}."
        )


def check_routing_enabled(params, estimator) -> None:
    """Refuse metadata that would go nowhere, because metadata routing is off.

    Raises
    ------
    ValueError
        If there are any.
    """
    if params and not sklearn.get_config()["enable_metadata_routing"]:
        raise ValueError(
            f"{type(estimator).__name__} was given {sorted(params)}, which it could only pass on "
            "by metadata routing. Call sklearn.set_config(enable_metadata_routing=True), and "
            "request the metadata where it is used, for example by set_split_request(groups=True)."
        )


def check_layer_sizes(sizes) -> None:
    """Refuse hidden layers that are not a sequence of positive integers.

    Raises
    ------
    ValueError
        If they are not.
    """
    if not all(
        isinstance(size, Integral) and not isinstance(size, bool) and size > 0 for size in sizes
    ):
        raise ValueError(
            f"hidden_layer_sizes must hold positive integers, such as (256,), or be empty; got "
            f"{sizes!r}."
        )


def draw_seed(random_state) -> int:
    """Draw one seed for everything random in a fit."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
