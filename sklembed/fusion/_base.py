"""The table of blocks, class priors and probabilities of the fusion estimators."""

import warnings

import numpy as np
from scipy.special import expit, softmax
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from sklembed._table.blocks import observed_in_block, resolve_blocks
from sklembed._targets import encode_target
from sklembed._validation import check_no_missing_label, check_vectors

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
