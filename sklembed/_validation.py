"""Checks shared by estimators, with messages that say what was got and what to do."""

import warnings
from datetime import date
from numbers import Integral, Real

import numpy as np
import pandas as pd
import sklearn
from pandas.api.types import is_numeric_dtype
from scipy.sparse import issparse
from sklearn.base import is_classifier
from sklearn.utils import check_random_state, column_or_1d

_MOST_LABELS = 2**16 - 1  # of a pixel
_COLLECTIONS = (list, tuple, set, frozenset, np.ndarray)


def check_no_missing_label(y) -> None:
    """Refuse a target with a missing label or with lists of labels, naming the first such row.

    Raises
    ------
    ValueError
        If any label is None, NaN or NA, or the labels of a row are a list.
    """
    check_no_label_lists(y)
    missing = np.atleast_1d(pd.isna(np.asarray(y)))
    rows = np.flatnonzero(missing.any(axis=tuple(range(1, missing.ndim))))
    if len(rows):
        raise ValueError(
            f"Input y contains NaN or None in {len(rows)} of {len(missing)} rows, first in row "
            f"{rows[0]}. Drop the rows without a label before fitting."
        )


def check_no_label_lists(y) -> None:
    """Refuse a target whose cells are lists of labels, naming the first such row.

    Lists of equal length are a table, and pass: a column for each level of a tree.

    Raises
    ------
    ValueError
        If a cell is a list, a tuple, a set or an array, or rows differ in length.
    """
    if issparse(y):
        return
    for row, cell in enumerate(_cells_of_objects(y)):
        if isinstance(cell, _COLLECTIONS):
            raise ValueError(
                f"Row {row} of y is {cell!r}, a {type(cell).__name__} of labels. For several "
                "labels of a row, give a column of 0 and 1 for each label: "
                "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
            )


def _cells_of_objects(y):
    """Return the cells of a target that is a column of objects; none of any other."""
    try:
        cells = np.asarray(y)
    except ValueError:  # rows of different lengths
        return y
    if cells.ndim == 2 and cells.shape[1] == 1:
        cells = cells[:, 0]
    return cells if cells.ndim == 1 and cells.dtype == object else []


def check_vectors(X, estimator) -> None:
    """Refuse tokens, texts and images where each row is a vector of numbers.

    Parameters
    ----------
    X : array-like
        A table.
    estimator : estimator
        Named in the message.

    Raises
    ------
    ValueError
        If a cell is an array, a list, a text, a date or an image.
    """
    name = type(estimator).__name__
    if getattr(X, "ndim", 2) == 3:
        raise ValueError(
            f"Found array with dim 3, of shape {X.shape}, but {name} takes pooled vectors, one for "
            "each row. Set output='pooled' in the FrozenEncoder, or reduce X to two dimensions."
        )
    for column, cells in _columns_of_objects(X):
        for row, cell in enumerate(cells):
            what, remedy = _what_is_no_number(cell)
            if what:
                raise ValueError(
                    f"Row {row} of column {column!r} of X is {what}, but {name} takes vectors, "
                    f"with one number in each cell. {remedy}"
                )


def _what_is_no_number(cell) -> tuple[str, str]:
    """Say what a cell is instead of a number, and what to do; empty if it may be a number."""
    if isinstance(cell, Real):  # the usual case
        return "", ""
    if isinstance(cell, _COLLECTIONS):
        shape = np.shape(cell) if isinstance(cell, np.ndarray) else (len(cell),)
        remedy = "Stack the vectors to a table with a column for each number: np.stack(cells)."
        if len(shape) > 1:
            remedy = "Set output='pooled' in the FrozenEncoder that makes the column."
        return f"an array of shape {shape}", remedy
    if isinstance(cell, date | np.datetime64) and not pd.isna(cell):
        return f"the date {cell}", "Turn dates into numbers first."
    remedy = "Encode texts and images first, for example with FrozenEncoder."
    if isinstance(cell, str | bytes) and not _is_number(cell):
        return f"the text {cell[:40]!r}", remedy
    return ("an image", remedy) if hasattr(cell, "getbands") else ("", "")


def _columns_of_objects(X):
    """Return name and cells of each column of a table that is not of a numeric dtype."""
    if isinstance(X, pd.Series):
        X = X.to_frame()
    if isinstance(X, pd.DataFrame):
        positions = [
            i for i, dtype in enumerate(X.dtypes) if not is_numeric_dtype(dtype)
        ]
        return [(X.columns[i], X.iloc[:, i].to_numpy()) for i in positions]
    if (
        not isinstance(X, np.ndarray)
        or X.dtype.kind not in "OUT"
        or X.ndim not in (1, 2)
    ):
        return []
    return list(enumerate(X.reshape(len(X), -1).T))


def _is_number(text: str | bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_class_weight(class_weight, classes) -> None:
    """Refuse weights of classes that look like a misspelt label, as scikit-learn does.

    Parameters
    ----------
    class_weight : dict, "balanced" or None
        Weights of classes; those without one weigh 1.
    classes : ndarray of shape (n_classes,)
        The classes in `y`.

    Raises
    ------
    ValueError
        If a weight is that of no class, while a class has none.

    Warns
    -----
    UserWarning
        If a weight is that of no class, while every class has one: a class that a fold lacks.
    """
    if not isinstance(class_weight, dict):
        return
    known = set(np.asarray(classes).tolist())
    unknown = [label for label in class_weight if label not in known]
    if not unknown:
        return
    message = (
        f"class_weight has a weight for {unknown[0]!r}, which is none of the {len(known)} classes "
        f"in y, {np.asarray(classes)[:10].tolist()}."
    )
    if known - set(class_weight):
        raise ValueError(f"{message} Use the labels as they are in y.")
    warnings.warn(f"{message} It has no effect.", UserWarning, stacklevel=3)


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
        raise ValueError(
            f"{what} should be a mask of whole numbers; got dtype {mask.dtype}."
        )
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


def split_rows(splitter, X, y, params) -> list:
    """Return the folds of a splitter; an error about groups says how they are passed.

    Raises
    ------
    ValueError
        If the splitter refuses the rows, or needs groups and `params` has none.
    """
    try:
        return list(splitter.split(X, y, **params))
    except ValueError as error:
        if "groups" not in str(error) or "groups" in params:
            raise
        raise ValueError(
            f"cv={splitter!r} needs groups, and none were passed. Call "
            "sklearn.set_config(enable_metadata_routing=True), then pass groups to fit, of this "
            "estimator or of the pipeline."
        ) from error


def check_layer_sizes(sizes) -> None:
    """Refuse hidden layers that are not a sequence of positive integers.

    Raises
    ------
    ValueError
        If they are not.
    """
    if not all(
        isinstance(size, Integral) and not isinstance(size, bool) and size > 0
        for size in sizes
    ):
        raise ValueError(
            f"hidden_layer_sizes must hold positive integers, such as (256,), or be empty; got "
            f"{sizes!r}."
        )


def draw_seed(random_state) -> int:
    """Draw one seed for everything random in a fit."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def is_a_classifier(step):
    return hasattr(step, "__sklearn_tags__") and is_classifier(step)


def check_at_least_one(name, number):
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise TypeError(f"{name} must be an integer; got {number!r}.")
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}.")
