"""Blocks of a table scaled for linear models and kernels."""

from typing import NamedTuple

import numpy as np

from sklembed._table.blocks import Block, observed_in_block

# A block with fewer columns is read as table columns: encoders return wider vectors.
_NARROWEST_VECTOR = 16
_TABLE_NAME = "table"  # the block of table columns that MultimodalVectorizer returns
_ROUNDING = 1e-6  # relative, of vectors
_LARGEST_SCORE = 4.0  # standard deviations to which outliers of table columns are cut


class ScaledBlock(NamedTuple):
    """A block with rows of norm about 1, and its observed rows."""

    values: np.ndarray  # (n_samples, n_columns), zero where missing
    observed: np.ndarray  # (n_samples,)


def find_table_blocks(
    table_blocks: str | list, X: np.ndarray, blocks: dict[str, Block]
) -> list[str]:
    """Return the names of the blocks that contain table columns rather than vectors.

    Parameters
    ----------
    table_blocks : "auto" or list of str
        The names, or "auto". "auto" selects a block called "table", a block of fewer
        than 16 columns, and a block with a row of which only some values are missing.
    X : ndarray of shape (n_samples, n_features)
        The training rows.
    blocks : dict of str to columns
        The blocks.

    Returns
    -------
    names : list of str
        Names of blocks.

    Raises
    ------
    ValueError
        If there is no such block.
    """
    if not isinstance(table_blocks, str):
        for name in table_blocks:
            if name not in list(blocks):
                raise ValueError(
                    f"table_blocks has {name!r}, but the blocks are {list(blocks)}. "
                    "Pass names of these, or 'auto'."
                )
        return [name for name in blocks if name in table_blocks]
    names = []
    for name, columns in blocks.items():
        values = X[:, columns]
        is_narrow = values.shape[1] < _NARROWEST_VECTOR
        if name == _TABLE_NAME or is_narrow or _has_partial_rows(values):
            names.append(name)
    return names


def _has_partial_rows(values: np.ndarray) -> bool:
    missing = np.isnan(values)
    return bool((missing.any(axis=1) & ~missing.all(axis=1)).any())


def check_vectors_complete(
    X: np.ndarray, blocks: dict[str, Block], table_blocks: list[str]
) -> None:
    """Refuse vectors of which only some values are missing, before any computing.

    Raises
    ------
    ValueError
        If there is such a vector. The message names the row and the block.
    """
    for name, columns in blocks.items():
        if name not in table_blocks:
            observed_in_block(X, name, columns)


def fit_scaling(
    X: np.ndarray,
    blocks: dict[str, Block],
    table_blocks: list[str],
    weight: np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays by which `scale_blocks` scales each block.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        The training rows.
    blocks : dict of str to columns
        The blocks.
    table_blocks : list of str
        The blocks with table columns.
    weight : ndarray of shape (n_samples,)
        Weights of the rows.

    Returns
    -------
    scaling : dict of str to dict of str to ndarray
        For vectors, the mean of the observed rows. For table columns, the median, mean
        and scale of each column, and a mask of the columns with an indicator of missing
        values.
    """
    scaling = {}
    for name, columns in blocks.items():
        if name in table_blocks:
            scaling[name] = _fit_columns(X[:, columns], weight)
        else:
            scaling[name] = {"mean": _mean_vector(X[:, columns], weight)}
    return scaling


def _mean_vector(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted mean of the observed rows, zero if there are none."""
    observed = ~np.isnan(values[:, 0]) & (weight > 0)
    if not observed.any():
        return np.zeros(values.shape[1], dtype=np.float32)
    total = weight[observed] @ values[observed].astype(np.float64)
    return (total / weight[observed].sum()).astype(np.float32)


def _fit_columns(values: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    values = values[weight > 0].astype(np.float64)
    weight = weight[weight > 0][:, None]
    missing = np.isnan(values)
    is_empty = missing.all(axis=0)
    median = np.zeros(values.shape[1])
    for column in np.flatnonzero(~is_empty):
        rows = ~missing[:, column]
        median[column] = _weighted_median(values[rows, column], weight[rows, 0])
    filled = np.where(missing, median, values)
    mean = (weight * filled).sum(axis=0) / weight.sum()
    variance = (weight * (filled - mean) ** 2).sum(axis=0) / weight.sum()
    scale = np.sqrt(variance)
    # Nothing was learned about other values of a constant column: they count as equal.
    scale[scale <= 1e-9 * np.abs(mean)] = np.inf
    return {
        "median": median,
        "mean": mean,
        "scale": scale,
        "indicated": missing.any(axis=0) & ~is_empty,
    }


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the median of values that are repeated as often as their weight says."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    half = total[-1] / 2
    lower, upper = np.searchsorted(total, half), np.searchsorted(total, half, "right")
    return float(values[order[[lower, upper]]].mean())


def scale_blocks(
    X: np.ndarray,
    blocks: dict[str, Block],
    scaling: dict[str, dict[str, np.ndarray]],
) -> dict[str, ScaledBlock]:
    """Scale the blocks of a table, so that the rows of each have a norm of about 1.

    Vectors are centred and divided by their norm. Table columns are imputed by the
    median, standardised, and divided by the root of their number. Columns with missing
    values in training have an indicator.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        The rows.
    blocks : dict of str to columns
        The blocks.
    scaling : dict of str to dict of str to ndarray
        The result of `fit_scaling`.

    Returns
    -------
    scaled : dict of str to ScaledBlock
        The scaled blocks, dtype float32.

    Raises
    ------
    ValueError
        If a vector has both missing and observed values.
    """
    scaled = {}
    for name, columns in blocks.items():
        values = X[:, columns]
        if "median" in scaling[name]:
            scaled[name] = _scale_columns(values, **scaling[name])
        else:
            observed = observed_in_block(X, name, columns)
            scaled[name] = _scale_vectors(values, observed, scaling[name]["mean"])
    return scaled


def _scale_vectors(values, observed, mean) -> ScaledBlock:
    centred = np.zeros(values.shape, dtype=np.float32)
    np.subtract(values, mean, out=centred, where=observed[:, None])
    # Sums in double precision do not depend on the number of rows of the batch.
    norm = np.sqrt(np.einsum("ij,ij->i", centred, centred, dtype=np.float64))
    # What rounding leaves of a vector equal to the mean has no direction.
    is_mean = norm <= _ROUNDING * np.linalg.norm(mean.astype(np.float64))
    centred[is_mean] = 0
    norm[is_mean | (norm == 0)] = 1
    centred /= norm[:, None].astype(np.float32)
    return ScaledBlock(centred, observed)


def _scale_columns(values, median, mean, scale, indicated) -> ScaledBlock:
    missing = np.isnan(values)
    filled = np.where(missing, median, values)
    scores = np.clip((filled - mean) / scale, -_LARGEST_SCORE, _LARGEST_SCORE)
    columns = np.hstack([scores, missing[:, indicated]])
    columns /= np.sqrt(columns.shape[1])
    return ScaledBlock(columns.astype(np.float32), np.ones(len(values), dtype=bool))
