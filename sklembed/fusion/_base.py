"""What trained and decision fusion share: the table, the class prior and probabilities."""

import warnings

import numpy as np
from scipy.special import expit, softmax
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    validate_data,
)

from sklembed._table.blocks import observed_in_block, resolve_blocks
from sklembed._targets import encode_target
from sklembed._validation import (
    check_no_missing_label,
    check_vectors,
)

TINY = np.finfo(
    np.float64
).tiny  # what a probability of 0 is raised to before its logarithm


def check_table(estimator, X, y, *, dtype, reset):
    """Check a table of blocks and its labels; set what is learnt of both."""
    if y is not None:
        check_no_missing_label(y)
    check_vectors(X, estimator)
    X, y = validate_data(
        estimator,
        X,
        y,
        dtype=dtype,
        ensure_all_finite="allow-nan",
        ensure_min_samples=2,
        multi_output=True,
        reset=reset,
    )
    check_classification_targets(y)
    target = encode_target(
        y, "multilabel" if y.ndim == 2 and y.shape[1] > 1 else "multiclass"
    )
    if reset:
        names = getattr(estimator, "feature_names_in_", None)
        estimator.blocks_ = resolve_blocks(estimator.blocks, names, X.shape[1])
        columns = np.arange(X.shape[1])
        estimator.widths_ = {
            name: len(columns[part]) for name, part in estimator.blocks_.items()
        }
    elif not np.array_equal(estimator.classes_, target.classes):
        raise ValueError(
            f"warm_start goes on with the classes {estimator.classes_.tolist()}, but y holds "
            f"{target.classes.tolist()}. Clone the classifier to start anew."
        )
    estimator.classes_ = target.classes
    two = target.kind == "multiclass" and len(target.classes) == 2
    estimator.target_type_ = "binary" if two else target.kind
    return X, target


def warn_ignored(name, reason):
    """Warn of a block of which nothing can be learned."""
    warnings.warn(
        f"Block {name!r} {reason}, so nothing can be learned from it. It is ignored, in prediction "
        "too.",
        stacklevel=3,
    )


def observed_modalities(X, blocks):
    """Tell which modalities each row has."""
    return np.stack([observed_in_block(X, *block) for block in blocks.items()], axis=1)


def by_modality(X, blocks):
    """Return the table with modalities side by side in their order, and which each row has."""
    there = observed_modalities(X, blocks)
    order = np.concatenate(
        [np.arange(X.shape[1])[columns] for columns in blocks.values()]
    )
    return (X if (np.diff(order) == 1).all() else X[:, order]), there


def find_prior(target, weight):
    """Return the share of each class, or of rows with each label, by weight."""
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
    """Return finite logarithms of the prior, for each label of "not" and "yes"."""
    if target_type == "multilabel":
        prior = np.stack([1 - prior, prior], axis=-1)
    return np.log(np.maximum(prior, TINY))


def probabilities(logits, target_type):
    """Turn logits into probabilities."""
    if target_type == "binary":
        return expit(np.stack([-logits, logits], axis=1))
    return softmax(logits, axis=1) if target_type == "multiclass" else expit(logits)


def decided(probabilities, classes, target_type):
    """Name the likeliest class, or mark the labels that are likelier than not."""
    if target_type == "multilabel":
        return (probabilities > 0.5).astype(np.int64)
    return classes[probabilities.argmax(axis=1)]
