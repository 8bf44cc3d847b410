"""Missing rows: a modality that a row lacks is a row of NaN in its block of columns."""

import numpy as np


def observed_rows(X: np.ndarray) -> np.ndarray:
    """Tell which rows of a numeric block hold values, and refuse a row that is half there.

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
        If NaN fills only some of a row's columns.
    """
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
