"""The folds of a report, checked before any of them is fitted."""

from typing import NamedTuple

import numpy as np


class Fold(NamedTuple):
    """The rows of a fold."""

    number: int
    train: np.ndarray
    test: np.ndarray


def list_folds(splitter, X, y, groups) -> list[Fold]:
    """Return the folds of a splitter.

    Raises
    ------
    ValueError
        If there are no folds, or a fold has no training or no test rows.
    """
    folds, rows = [], np.arange(len(y))
    for number, (train, test) in enumerate(splitter.split(X, y, groups)):
        fold = Fold(number, rows[train], rows[test])  # they may be masks
        if not len(fold.train) or not len(fold.test):
            raise ValueError(
                f"Fold {number} of cv has {len(fold.train)} training and "
                f"{len(fold.test)} test rows; both must have some. Use other folds."
            )
        folds.append(fold)
    if not folds:
        raise ValueError("cv has no folds. Pass at least one.")
    return folds
