"""Missing rows: a modality that a row lacks is a row of NaN in its block of columns."""

import numpy as np
from sklearn.utils import assert_all_finite


def observed_rows(X: np.ndarray) -> np.ndarray:
    """Tell which rows of a numeric block hold values, and refuse infinities and torn rows.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        One modality's columns; a missing modality is a row of NaN.

    Returns
    -------
    observed : ndarray of shape (n_samples,), dtype bool
        True where the row holds values.

    Raises
    ------
    ValueError
        If X holds an infinity, or NaN fills only some of a row's columns.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(X.sum(axis=1)).all():  # the usual case, in one pass over X
            return np.ones(len(X), dtype=bool)
        assert_all_finite(X, allow_nan=True, input_name="X")
    nan = np.isnan(X)
    missing = nan.all(axis=1)
    torn = np.flatnonzero(nan.any(axis=1) & ~missing)
    if len(torn):
        row = torn[0]
        raise ValueError(
            f"Input X contains NaN in {nan[row].sum()} of {X.shape[1]} columns of row {row} "
            f"({len(torn)} such rows in all). A row of NaN throughout is a missing modality; "
            "single missing numbers have to be imputed first, for example by SimpleImputer."
        )
    return ~missing
