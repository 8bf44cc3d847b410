"""The table of blocks, class priors and probabilities of the fusion estimators."""

import warnings

import numpy as np
import pandas as pd
from scipy.special import expit, softmax
from sklearn.utils import column_or_1d, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    validate_data,
)

from sklembed._table.blocks import observed_in_block, resolve_blocks
from sklembed._targets import encode_target
from sklembed._validation import (
    check_class_weight,
    check_new_rows,
    check_no_missing_label,
    check_vectors,
)
from sklembed.fusion.scaling import check_vectors_complete

TINY = np.finfo(np.float64).tiny  # lower limit of probabilities before the logarithm


def check_table(estimator, X, y, *, dtype, reset, **options):
    """Validate a table of blocks and its target; `reset` sets the blocks."""
    check_vectors(X, estimator)
    table = X
    X, y = validate_data(
        estimator,
        X,
        y,
        dtype=dtype,
        ensure_all_finite="allow-nan",
        ensure_min_samples=2,
        multi_output=True,
        reset=reset,
        **options,
    )
    if reset:
        names = getattr(estimator, "feature_names_in_", None)
        estimator.blocks_ = resolve_blocks(estimator.blocks, names, X.shape[1], table)
        columns = np.arange(X.shape[1])
        estimator.widths_ = {
            name: len(columns[part]) for name, part in estimator.blocks_.items()
        }
    return X, y


def check_rows(estimator, X):
    """Validate a table to predict for."""
    X = check_new_rows(estimator, X)
    check_vectors_complete(X, estimator.blocks_, estimator.table_blocks_)
    return X


def check_labelled_table(estimator, X, y, *, dtype, reset):
    """Validate a table of blocks and its labels; set the blocks and the classes."""
    if y is not None:
        check_no_missing_label(y)
    X, y = check_table(estimator, X, y, dtype=dtype, reset=reset)
    check_classification_targets(y)
    kind = "multiclass"
    if y.ndim == 2 and y.shape[1] > 1:
        kind = "multilabel"
    target = encode_target(y, kind)
    target_type = kind
    if kind == "multiclass" and len(target.classes) == 2:
        target_type = "binary"
    if not reset:
        _check_same_labels(estimator, target.classes, target_type)
    estimator.classes_, estimator.target_type_ = target.classes, target_type
    return X, target


def _check_same_labels(estimator, classes, target_type):
    """Refuse labels of other values or of another type than in the previous fit."""
    if not np.array_equal(classes, estimator.classes_):
        raise ValueError(
            f"With warm_start, y must have the classes {estimator.classes_.tolist()} of the "
            f"previous fit; got {classes.tolist()}. Clone the classifier to fit a new network."
        )
    if target_type != estimator.target_type_:
        raise ValueError(
            f"With warm_start, y must be {estimator.target_type_}, as in the previous fit; got "
            f"{target_type}. Clone the classifier to fit a new network."
        )


def warn_ignored(name, reason):
    """Warn about a block from which nothing can be learned."""
    warnings.warn(
        f"Block {name!r} {reason}, so nothing can be learned from it. It is ignored, in prediction "
        "too.",
        stacklevel=3,
    )


def observed_modalities(X, blocks):
    """Return a mask (n_samples, n_modalities) of the observed modalities of each row."""
    masks = [observed_in_block(X, name, columns) for name, columns in blocks.items()]
    return np.stack(masks, axis=1)


def by_modality(X, blocks):
    """Return the table with its columns in the order of blocks, and the observed modalities."""
    observed = observed_modalities(X, blocks)
    columns = np.arange(X.shape[1])
    order = np.concatenate([columns[part] for part in blocks.values()])
    if (order != columns).any():
        X = X[:, order]
    return X, observed


def find_prior(target, weight):
    """Return the weighted proportion of each class, or of the rows with each label."""
    if target.kind == "multilabel":
        return np.average(target.values, axis=0, weights=weight)
    shares = np.bincount(target.values, weights=weight, minlength=len(target.classes))
    return shares / shares.sum()


def weight_classes(weight, target, class_weight):
    """Return the weights of rows multiplied by the weights of their classes."""
    if class_weight is None:
        return weight
    check_class_weight(class_weight, target.classes)
    # Rows of weight 0 must not influence the class weights.
    codes = target.values[weight > 0]
    present = np.unique(codes)
    classes = target.classes[present]
    if isinstance(class_weight, dict):  # y may lack some of the classes
        class_weight = {c: class_weight.get(c, 1.0) for c in classes.tolist()}
    by_class = np.zeros(len(target.classes), dtype=weight.dtype)
    by_class[present] = compute_class_weight(
        class_weight, classes=classes, y=target.classes[codes]
    )
    weight = weight * by_class[target.values]
    check_positive_weight(weight, "The product of sample_weight and class_weight")
    return weight


def scale_targets(y, weight):
    """Return mean and scale of numeric targets; the scale of constant targets is 1."""
    y, weight = y.astype(np.float64), weight.astype(np.float64)
    mean = np.average(y, axis=0, weights=weight)
    variance = np.average(np.square(y - mean), axis=0, weights=weight)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)[()]


def check_weights(sample_weight, X):
    """Return the weights of the rows, float64, which are not negative.

    Raises
    ------
    ValueError
        If there is not one finite weight for each row, or none is positive.
    """
    weight = _check_sample_weight(
        sample_weight, X, dtype=np.float64, ensure_non_negative=True
    )
    check_positive_weight(weight, "sample_weight")
    return weight


def check_positive_weight(weight, name):
    """Refuse weights of rows of which none is positive."""
    if not (weight > 0).any():
        raise ValueError(
            f"{name} is zero in all {len(weight)} rows. Give a positive weight to the "
            "rows to learn from."
        )


def encode_groups(groups, weight):
    """Return the group of each row as a code; None without groups.

    Parameters
    ----------
    groups : array-like of shape (n_samples,) or None
        Groups of any type.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.

    Raises
    ------
    ValueError
        If the number of groups differs from the number of rows, a group is missing, or
        all rows of positive weight are in one group.
    """
    if groups is None:
        return None
    groups = column_or_1d(groups)
    if len(groups) != len(weight):
        raise ValueError(
            f"groups has {len(groups)} values, but X has {len(weight)} rows. Pass the "
            "group of each row."
        )
    codes, _ = pd.factorize(groups)
    missing = np.flatnonzero(codes < 0)
    if len(missing):
        raise ValueError(
            f"groups has no value in {len(missing)} rows, first in row {missing[0]}. "
            "Give each row without a group a new group."
        )
    used = codes[weight > 0]
    if (used == used[0]).all():
        raise ValueError(
            f"All {len(used)} rows of positive weight are in one group, so none can be "
            "predicted by a fit without its group. Pass two or more groups, or none."
        )
    return codes


def logits_of_prior(prior, target_type):
    """Return finite logits of the prior."""
    logs = to_log_prior(prior, target_type)
    if target_type == "multiclass":
        return logs
    if target_type == "binary":
        return logs[1:] - logs[:1]
    return logs[:, 1] - logs[:, 0]


def to_log_prior(prior, target_type):
    """Return finite logarithms of the prior; for labels, of absence and presence."""
    if target_type == "multilabel":
        prior = np.stack([1 - prior, prior], axis=-1)
    return np.log(np.maximum(prior, TINY))


def probabilities(logits, target_type):
    """Return the probabilities of classes or labels."""
    if target_type == "binary":
        return expit(np.stack([-logits, logits], axis=1))
    if target_type == "multiclass":
        return softmax(logits, axis=1)
    return expit(logits)


def decided(probabilities, classes, target_type):
    """Return the most probable class, or the labels with a probability above 0.5."""
    if target_type == "multilabel":
        return (probabilities > 0.5).astype(np.int64)
    return classes[probabilities.argmax(axis=1)]
