"""Blocks of a table scaled for linear models and kernels."""

from typing import NamedTuple

import numpy as np

from sklembed._table.blocks import Block, observed_in_block

# A block with fewer columns is read as table columns: encoders return wider vectors.
_NARROWEST_VECTOR = 16
# Names that MultimodalVectorizer gives to the block of table columns, and to the block of
# characters of a text, next to its block of vectors.
_TABLE_NAME = "table"
_LEXICAL_SUFFIX = "_lexical"
_LEXICAL_NORM = 0.3  # relative to the vectors of the same text
_ROUNDING = 1e-6  # relative, of vectors
_SUM_ROUNDING = 1e-9  # relative, of sums of weights
_NEAR = 6.0  # median absolute deviations within which squashing is about linear
_LARGEST_SCORE = 4.0  # to which squashed and standardised values are cut


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
        if _find_main_block(name, blocks) is not None:
            continue
        values = X[:, columns]
        is_narrow = values.shape[1] < _NARROWEST_VECTOR
        if name == _TABLE_NAME or is_narrow or _has_partial_rows(values):
            names.append(name)
    return names


def _has_partial_rows(values: np.ndarray) -> bool:
    missing = np.isnan(values)
    return bool((missing.any(axis=1) & ~missing.all(axis=1)).any())


def _find_main_block(name, blocks) -> str | None:
    """Return the block of vectors of the text whose characters a block encodes."""
    if isinstance(name, str) and name.endswith(_LEXICAL_SUFFIX):
        main = name.removesuffix(_LEXICAL_SUFFIX)
        return main if main in blocks else None
    return None


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
        For vectors, the mean of the observed rows. For table columns, the median and
        the spread of each column, mean and scale of its squashed values, and a mask of
        the columns with an indicator of missing values.
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
    spread = np.full(values.shape[1], np.inf)
    for column in np.flatnonzero(~is_empty):
        rows = ~missing[:, column]
        observed, w = values[rows, column], weight[rows, 0]
        median[column] = _weighted_median(observed, w)
        spread[column] = _NEAR * _find_spread(np.abs(observed - median[column]), w)
    # Nothing was learned about other values of a constant column: they count as equal.
    spread[spread <= 1e-9 * np.abs(median)] = np.inf
    squashed = _squash(np.where(missing, median, values), median, spread)
    mean = (weight * squashed).sum(axis=0) / weight.sum()
    variance = (weight * (squashed - mean) ** 2).sum(axis=0) / weight.sum()
    return {
        "median": median,
        "spread": spread,
        "mean": mean,
        "scale": np.sqrt(np.where(variance > 0, variance, np.inf)),
        "indicated": missing.any(axis=0) & ~is_empty,
    }


def _squash(values: np.ndarray, median: np.ndarray, spread: np.ndarray) -> np.ndarray:
    squashed = np.arcsinh((values - median) / spread)
    return np.clip(squashed, -_LARGEST_SCORE, _LARGEST_SCORE)


def _find_spread(deviations: np.ndarray, weight: np.ndarray) -> float:
    """Return the median of absolute deviations; their mean if most of them are 0."""
    median = _weighted_median(deviations, weight)
    return median if median > 0 else float(np.average(deviations, weights=weight))


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the median of values that are repeated as often as their weight says."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    half = total[-1] / 2
    # Sums of weights such as 0.3 miss the half by rounding.
    lower = np.searchsorted(total, half * (1 - _SUM_ROUNDING))
    upper = np.searchsorted(total, half * (1 + _SUM_ROUNDING), "right")
    return float(values[order[[lower, upper]]].mean())


def scale_blocks(
    X: np.ndarray,
    blocks: dict[str, Block],
    scaling: dict[str, dict[str, np.ndarray]],
) -> dict[str, ScaledBlock]:
    """Scale the blocks of a table, so that the rows of each have a norm of about 1.

    Vectors are centred and divided by their norm. Table columns are imputed by the
    median, squashed, standardised, and divided by the root of their number. The
    inverse hyperbolic sine squashes them: linear around the median, logarithmic far
    from it, so that no outlier hides the differences of other rows. Columns with
    missing values in training have an indicator. A block such as ``title_lexical`` is
    appended to the block ``title``, with a smaller norm.

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
    for name in blocks:
        main = _find_main_block(name, blocks)
        if main is not None and "mean" in scaling[main].keys() & scaling[name].keys():
            scaled[main] = _append(scaled[main], scaled.pop(name))
    return scaled


def _append(main: ScaledBlock, lexical: ScaledBlock) -> ScaledBlock:
    values = np.hstack([main.values, _LEXICAL_NORM * lexical.values])
    values /= np.float32(np.hypot(1, _LEXICAL_NORM))
    return ScaledBlock(values, main.observed | lexical.observed)


def _scale_vectors(values, observed, mean) -> ScaledBlock:
    centred = np.zeros(values.shape, dtype=np.float32)
    np.subtract(values, mean, out=centred, where=observed[:, None])
    # Sums in double precision do not depend on the number of rows of the batch.
    norm = np.sqrt(np.einsum("ij,ij->i", centred, centred, dtype=np.float64))
    # What rounding leaves of a vector equal to the mean has no direction.
    is_mean = norm <= _ROUNDING * np.linalg.norm(mean.astype(np.float64))
    centred[is_mean] = 0
    norm[is_mean | (norm == 0)] = 1
    np.divide(centred, norm[:, None], out=centred, casting="same_kind")
    return ScaledBlock(centred, observed)


def _scale_columns(values, median, spread, mean, scale, indicated) -> ScaledBlock:
    missing = np.isnan(values)
    squashed = _squash(np.where(missing, median, values), median, spread)
    scores = np.clip((squashed - mean) / scale, -_LARGEST_SCORE, _LARGEST_SCORE)
    columns = np.hstack([scores, missing[:, indicated]])
    columns /= np.sqrt(columns.shape[1])
    return ScaledBlock(columns.astype(np.float32), np.ones(len(values), dtype=bool))


def half_squared_distances(left, right):
    """Return half the squared distances between rows of blocks, about 1 on average.

    In single precision, kernels of equal or similar rows would not be positive
    definite, and predictions would depend on the rows of the batch.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms_left = np.einsum("ij,ij->i", left, left)
    norms_right = np.einsum("ij,ij->i", right, right)
    distances = left @ right.T
    distances *= -2
    distances += norms_left[:, None]
    distances += norms_right
    distances /= 2
    return np.maximum(distances, 0, out=distances)
