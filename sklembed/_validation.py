"""Input checks that estimators share; errors name the row, the value and the remedy."""

import functools
import warnings
from collections.abc import Callable
from datetime import date
from numbers import Integral, Real

import numpy as np
import pandas as pd
import sklearn
from pandas.api.types import is_numeric_dtype
from scipy.sparse import issparse
from sklearn.base import is_classifier
from sklearn.utils import (
    check_array,
    check_random_state,
    column_or_1d,
    gen_batches,
)
from sklearn.utils.validation import check_is_fitted, validate_data

_LARGEST_PIXEL_LABEL = 2**16 - 1
_PIECE_ROWS = 16384  # of a table that is too long to be converted at once
_COLLECTIONS = (list, tuple, set, frozenset, np.ndarray)
_ENCODE_FIRST = "Encode texts and images first, for example with FrozenEncoder."


def check_no_missing_label(y) -> None:
    """Refuse a target with missing labels or lists of labels, and name the first row.

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
            f"Input y contains NaN or None in {len(rows)} of {len(missing)} rows, "
            f"first in row {rows[0]}. Drop the rows without a label before fitting."
        )


def check_no_label_lists(y) -> None:
    """Refuse a target whose cells are lists of labels, and name the first such row.

    Lists of equal length are accepted: they are a table with one column for each level
    of a tree.

    Raises
    ------
    ValueError
        If a cell is a list, a tuple, a set or an array, or rows differ in length.
    """
    if issparse(y):
        return
    for row, cell in enumerate(_object_cells(y)):
        if isinstance(cell, _COLLECTIONS):
            raise ValueError(
                f"Row {row} of y is {cell!r}, a {type(cell).__name__} of labels. If "
                "rows have several labels, pass a column of 0 and 1 for each label: "
                "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
            )


def _object_cells(y):
    """Return the cells of a target that is one column of objects, else no cells."""
    try:
        cells = np.asarray(y)
    except ValueError:  # rows of different lengths
        return y
    if cells.ndim == 2 and cells.shape[1] == 1:
        cells = cells[:, 0]
    if cells.ndim == 1 and cells.dtype == object:
        return cells
    return []


def check_vectors(X, estimator) -> None:
    """Refuse tokens, texts and images where each row should be a vector of numbers.

    Parameters
    ----------
    X : array-like
        A table.
    estimator : estimator
        The estimator named in the message.

    Raises
    ------
    ValueError
        If a cell is an array, a list, a text, a date or an image.
    """
    name = type(estimator).__name__
    if getattr(X, "ndim", 2) == 3:
        raise ValueError(
            f"Found array with dim 3, of shape {X.shape}, but {name} takes pooled "
            "vectors, one for each row. Set output='pooled' in the FrozenEncoder, or "
            "reduce X to two dimensions."
        )
    for column, cells in _object_columns(X):
        for row, cell in enumerate(cells):
            if isinstance(cell, Real):  # the usual case
                continue
            description, remedy = _describe_non_number(cell)
            if description:
                raise ValueError(
                    f"Row {row} of column {column!r} of X is {description}, but {name} "
                    f"takes vectors, with one number in each cell. {remedy}"
                )


def check_new_rows(
    estimator, X, *, dtype=np.float32, ensure_all_finite: bool | str = "allow-nan"
) -> np.ndarray:
    """Validate the table that a fitted estimator transforms or predicts.

    Parameters
    ----------
    estimator : estimator
        The fitted estimator.
    X : array-like of shape (n_samples, n_features)
        A table of numbers.
    dtype, ensure_all_finite
        As in scikit-learn's ``check_array``.

    Returns
    -------
    X : ndarray of shape (n_samples, n_features)
        The numbers.
    """
    check_is_fitted(estimator)
    if isinstance(X, pd.DataFrame) and _has_floats_only(X):
        # Checks of each column would take longer than to predict a row.
        validate_data(estimator, X, reset=False, skip_check_array=True)
        return check_array(
            X.to_numpy(),
            dtype=dtype,
            ensure_all_finite=ensure_all_finite,
            estimator=estimator,
            input_name="X",
        )
    check_vectors(X, estimator)
    return validate_data(
        estimator, X, dtype=dtype, ensure_all_finite=ensure_all_finite, reset=False
    )


def _has_floats_only(table) -> bool:
    """Return whether all columns of a DataFrame have one dtype of numpy's floats."""
    dtypes = set(table.dtypes)
    return len(dtypes) == 1 and getattr(dtypes.pop(), "kind", "O") == "f"


def _describe_non_number(cell) -> tuple[str, str]:
    """Describe a cell and the remedy; both are empty if the cell may be a number."""
    if isinstance(cell, _COLLECTIONS):
        shape = cell.shape if isinstance(cell, np.ndarray) else (len(cell),)
        remedy = (
            "Stack the vectors into a table, one column per number: np.stack(cells)."
        )
        if len(shape) > 1:
            remedy = "Set output='pooled' in the FrozenEncoder that makes the column."
        return f"an array of shape {shape}", remedy
    if isinstance(cell, date | np.datetime64) and not pd.isna(cell):
        return f"the date {cell}", "Turn dates into numbers first."
    if isinstance(cell, str | bytes) and not _is_number(cell):
        return f"the text {cell[:40]!r}", _ENCODE_FIRST
    if hasattr(cell, "getbands"):  # of PIL
        return "an image", _ENCODE_FIRST
    return "", ""


def _object_columns(X):
    """Yield the name and the cells of each column of a table that is not numeric."""
    if isinstance(X, pd.Series):
        X = X.to_frame()
    if isinstance(X, pd.DataFrame):
        for position, dtype in enumerate(X.dtypes):
            if not is_numeric_dtype(dtype):
                yield X.columns[position], X.iloc[:, position].to_numpy()
    elif isinstance(X, np.ndarray) and X.dtype.kind in "OUT" and X.ndim in (1, 2):
        yield from enumerate(X.reshape(len(X), -1).T)
    elif isinstance(X, list) and any(isinstance(cell, str) for cell in X):
        yield 0, X


def _is_number(text: str | bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_class_weight(class_weight, classes) -> None:
    """Refuse class weights for unknown labels, as scikit-learn does.

    Parameters
    ----------
    class_weight : dict, "balanced" or None
        Weights of classes. Classes without a weight have weight 1.
    classes : ndarray of shape (n_classes,)
        The classes in `y`.

    Raises
    ------
    ValueError
        If a weight is of no class, and some class has no weight: a misspelt label.

    Warns
    -----
    UserWarning
        If a weight is of no class, but every class has one: a fold without that class.
    """
    if not isinstance(class_weight, dict):
        return
    classes = np.asarray(classes).tolist()
    labels = set(classes)
    unknown = [label for label in class_weight if label not in labels]
    if not unknown:
        return
    message = (
        f"class_weight has a weight for {unknown[0]!r}, which is none of the "
        f"{len(classes)} classes in y, {classes[:10]}."
    )
    if labels - set(class_weight):
        raise ValueError(f"{message} Use the labels as they are in y.")
    warnings.warn(f"{message} It has no effect.", UserWarning, stacklevel=3)


def encode_classes(y) -> tuple[np.ndarray, np.ndarray]:
    """Encode class labels of any sortable type as integers.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        The sorted distinct labels.
    codes : ndarray of shape (n_samples,), dtype int64
        Position of the label of each row in `classes`.

    Raises
    ------
    ValueError
        If there are fewer than two classes.
    """
    classes, codes = sorted_labels(column_or_1d(y, warn=True))
    if len(classes) < 2:
        raise ValueError(
            f"y has 1 class only ({classes[0]} in all {len(codes)} rows); at least "
            "two are needed."
        )
    return classes, codes


def sorted_labels(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct labels, and the position of each row's label in them.

    Raises
    ------
    TypeError
        If the types of the labels have no common order.
    """
    try:
        classes, codes = np.unique(y, return_inverse=True)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in y})
        raise TypeError(
            f"y mixes labels of the types {', '.join(kinds)}, which have no order. "
            "Make them one type, for example all str."
        ) from error
    return classes, codes.astype(np.int64)


def check_masks(y, name="y") -> list[np.ndarray]:
    """Validate a sequence of masks: integer or boolean arrays, one label per pixel.

    Returns
    -------
    masks : list of ndarray of shape (height, width), dtype bool or integer
        The masks, which may differ in size.

    Raises
    ------
    ValueError
        If there are no masks, one is missing or not two-dimensional, or a label is not
        a whole number from 0 to 65535. The message names the row.
    """
    masks = [_as_mask(raw, f"Row {row} of {name}") for row, raw in enumerate(y)]
    if not masks:
        raise ValueError(f"{name} has no mask; at least one is needed.")
    return masks


def _as_mask(raw, owner: str) -> np.ndarray:
    try:
        mask = np.asarray(raw)
        received = f"shape {mask.shape}"
        if mask.ndim == 0:
            received = repr(raw)
    except ValueError:
        mask, received = np.empty(0), "rows of different lengths"
    if mask.ndim == 3:
        received += " (an image? Take one channel)"
    if mask.ndim != 2 or not mask.size:
        raise ValueError(
            f"{owner} should be a mask, an array of shape (height, width) with a label "
            f"for each pixel; got {received}."
        )
    if mask.dtype.kind == "b":
        return mask
    if mask.dtype.kind not in "iuf":
        raise ValueError(
            f"{owner} should be a mask of whole numbers; got dtype {mask.dtype}."
        )
    check_labels_of_pixels(mask, owner)
    return mask.astype(np.uint16) if mask.dtype.kind == "f" else mask


def check_labels_of_pixels(labels: np.ndarray, owner: str) -> None:
    """Refuse labels that are not whole numbers from 0 to 65535.

    Raises
    ------
    ValueError
        If there is such a label.
    """
    in_range = (labels >= 0) & (labels <= _LARGEST_PIXEL_LABEL)  # False for NaN
    invalid = ~in_range
    if labels.dtype.kind == "f":
        invalid |= labels != np.floor(labels)
    if invalid.any():
        raise ValueError(
            f"{owner} has the label {labels[invalid][0]}; labels of pixels are whole "
            f"numbers from 0, the background, to {_LARGEST_PIXEL_LABEL}."
        )


def check_routing_enabled(params, estimator) -> None:
    """Refuse metadata if metadata routing is disabled.

    Raises
    ------
    ValueError
        If there is any metadata.
    """
    if params and not sklearn.get_config()["enable_metadata_routing"]:
        raise ValueError(
            f"{type(estimator).__name__} was given {sorted(params)}, which requires "
            "metadata routing. Call sklearn.set_config(enable_metadata_routing=True), "
            "and request the metadata where it is used, for example by "
            "set_split_request(groups=True)."
        )


def split_rows(splitter, X, y, params) -> list:
    """Return the folds of a splitter, with a helpful error if groups are missing.

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
            "sklearn.set_config(enable_metadata_routing=True), then pass groups to the "
            "fit method of this estimator or of the pipeline."
        ) from error


def check_layer_sizes(sizes) -> None:
    """Refuse hidden layer sizes that are not positive integers.

    Raises
    ------
    ValueError
        If a size is not a positive integer.
    """
    for size in sizes:
        if not isinstance(size, Integral) or isinstance(size, bool) or size <= 0:
            raise ValueError(
                "hidden_layer_sizes must contain positive integers, such as (256,), or be "
                f"empty; got {sizes!r}."
            )


def draw_seed(random_state) -> int:
    """Draw one seed for all random choices of a fit."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def is_a_classifier(step):
    """Return whether a step is a classifier; False for objects without tags."""
    return hasattr(step, "__sklearn_tags__") and is_classifier(step)


def check_at_least_one(name, number):
    """Refuse a parameter that is not a positive integer."""
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise TypeError(f"{name} must be an integer; got {number!r}.")
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}.")


def in_pieces(method: Callable) -> Callable:
    """Let a method that takes a table X process long arrays in pieces of rows.

    Memory then grows with the output only. X may be an array on disk, and of any type:
    one piece at a time is read and converted.
    """

    @functools.wraps(method)
    def run(self, X, *args, **kwargs):
        is_long = isinstance(X, np.ndarray) and X.ndim == 2 and len(X) > _PIECE_ROWS
        if not is_long:
            return method(self, X, *args, **kwargs)
        output = None
        for rows in gen_batches(len(X), _PIECE_ROWS):
            try:
                piece = method(self, X[rows], *args, **kwargs)
            except ValueError as error:
                error.add_note(f"Row numbers count from row {rows.start} of X.")
                raise
            if output is None:
                output = np.empty((len(X), *piece.shape[1:]), dtype=piece.dtype)
            output[rows] = piece
        return output

    return run
