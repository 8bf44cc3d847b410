"""Blocks: the columns of one table that belong to one modality."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils import assert_all_finite, check_array

from sklembed._table.columns import as_table, resolve_columns

Block = slice | np.ndarray


def resolve_blocks(
    blocks: Mapping[str, Any] | None,
    names: Sequence[str] | None,
    n_features: int,
    X: Any = None,
) -> dict[str, Block]:
    """Find the columns of each modality; every column must be in exactly one block.

    Parameters
    ----------
    blocks : mapping of str to columns, or None
        The columns of each modality, in any form that `resolve_columns` accepts. None
        reads them from names such as ``text__0, text__1, image__0``, as
        PerModalityUnion produces.
    names : sequence of str or None
        Column names, if there are any.
    n_features : int
        Number of columns.
    X : DataFrame, array-like or None, default=None
        The table that callables take. None if they are not supported.

    Returns
    -------
    blocks : dict of str to slice or ndarray of int
        A slice if the columns are contiguous.

    Raises
    ------
    ValueError
        If a column name has no block prefix, a selection is invalid, a block has no
        columns, or a column is in no block or in several.
    """
    if blocks is None:
        positions = _read_from_names(names)
    else:
        positions = _select_positions(blocks, names, n_features, X)
    n_blocks = np.zeros(n_features, dtype=np.intp)
    for columns in positions.values():
        np.add.at(n_blocks, columns, 1)
    invalid = np.flatnonzero(n_blocks != 1)
    if len(invalid):
        column = int(invalid[0]) if names is None else names[invalid[0]]
        raise ValueError(
            f"Every column belongs to one block, but column {column!r} is in "
            f"{n_blocks[invalid[0]]} of the blocks {list(positions)} ({len(invalid)} "
            f"such columns of n_features={n_features})."
        )
    return {name: _as_slice(columns) for name, columns in positions.items()}


def observed_in_block(X: np.ndarray, name: str, columns: Block) -> np.ndarray:
    """Return a mask of the rows that have one modality; see `observed_rows`."""
    try:
        return observed_rows(X[:, columns], f" of block {name!r}")
    except ValueError as error:
        error.add_note(f"This was in block {name!r}.")
        raise


def check_one_block(estimator: Any, X: Any, name: str, dtype: Any) -> np.ndarray:
    """Validate the columns of one modality, passed without the other modalities.

    Raises
    ------
    ValueError
        If `fit` had no such block, the width differs, columns are those of another
        block or in another order, a value is infinite, or NaN fills only part of a row.
    """
    columns = known_block(name, estimator.blocks_)
    positions = np.arange(estimator.n_features_in_)[columns]
    check_names(X, name, getattr(estimator, "feature_names_in_", None), positions)
    X = check_array(X, dtype=dtype, ensure_all_finite="allow-nan")
    if X.shape[1] != len(positions):
        raise ValueError(
            f"Block {name!r} has {len(positions)} columns; got {X.shape[1]}. Pass only "
            "the columns of that modality."
        )
    observed_in_block(X, name, slice(None))
    return X


def check_names(
    X: Any, name: str, fitted: np.ndarray | None, positions: np.ndarray
) -> None:
    """Refuse fitted column names of another block or order; new names are ignored."""
    if fitted is None or not hasattr(X, "columns"):
        return
    names = list(X.columns)
    expected = list(fitted[positions])
    if set(names) & set(fitted) and names != expected:
        raise ValueError(
            f"The feature names should be those of block {name!r} in their order, "
            f"{expected[:3]} …; got {names[:3]} …."
        )


def known_block(name: str, blocks: Mapping[str, Block]) -> Block:
    """Return the columns of a block by name.

    Raises
    ------
    ValueError
        If `fit` had no such block.
    """
    if name not in blocks:
        raise ValueError(f"There is no modality {name!r}; fit has seen {list(blocks)}.")
    return blocks[name]


def _read_from_names(names: Sequence[str] | None) -> dict[str, list[int]]:
    """Read contiguous blocks from the prefixes of column names."""
    if names is None:
        raise ValueError(
            "blocks=None reads the modalities from column names such as 'text__0', but X "
            "has no names. Call set_output(transform='pandas') on the whole pipeline, so "
            "that each step returns named columns, or pass blocks, for example {'text': "
            "slice(0, 384), 'image': slice(384, 1664)}."
        )
    positions: dict[str, list[int]] = {}
    previous = None
    for position, name in enumerate(names):
        block, separator, _ = name.partition("__")
        if not separator or not block:
            raise ValueError(
                f"Column {name!r} has no modality in its name: with blocks=None "
                "columns are named '<modality>__…', as by PerModalityUnion. Rename it, "
                "or pass blocks."
            )
        if block in positions and block != previous:
            raise ValueError(
                f"The columns of {block!r} are not contiguous: {name!r} follows a "
                f"column of {previous!r}. Sort the columns, or pass blocks."
            )
        positions.setdefault(block, []).append(position)
        previous = block
    return positions


def _select_positions(
    blocks: Mapping[str, Any], names: Sequence[str] | None, n_features: int, X: Any
) -> dict[str, list[int]]:
    """Resolve the columns of each block to positions."""
    if X is not None:
        X = as_table(X)
    positions = {}
    for block, columns in blocks.items():
        positions[block], _ = resolve_columns(
            columns, n_features, owner=f"Block {block!r}", names=names, table=X
        )
        if not positions[block]:
            raise ValueError(
                f"Block {block!r} selects none of the n_features={n_features} columns."
            )
    return positions


def _as_slice(positions: list[int]) -> Block:
    """Return contiguous positions as a slice, which selects without a copy."""
    start, stop = positions[0], positions[-1] + 1
    if positions == list(range(start, stop)):
        return slice(start, stop)
    return np.array(positions)


def observed_rows(
    X: np.ndarray, where: str = "", names: Sequence[str] | None = None
) -> np.ndarray:
    """Return a mask of the rows with values; refuse infinity and partly missing rows.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        The columns of one modality. A missing modality is a row of NaN.
    where : str, default=""
        Text after the row number in the error message.
    names : sequence of str or None, default=None
        Column names, for the error message.

    Returns
    -------
    observed : ndarray of shape (n_samples,), dtype bool
        True where the row has values.

    Raises
    ------
    ValueError
        If X contains infinity, or NaN in only some columns of a row.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # A finite sum proves a finite row, so most tables take one pass without a mask.
        if np.isfinite(X.sum(axis=1)).all():
            return np.ones(len(X), dtype=bool)
        assert_all_finite(X, allow_nan=True, input_name="X")
    nan = np.isnan(X)
    missing = nan.all(axis=1)
    partial_rows = np.flatnonzero(nan.any(axis=1) & ~missing)
    if len(partial_rows):
        row = partial_rows[0]
        column = ""
        if names is not None:
            column = f", first in {names[int(nan[row].argmax())]!r}"
        raise ValueError(
            f"Input X contains NaN in {nan[row].sum()} of {X.shape[1]} columns of row "
            f"{row}{where}{column} ({len(partial_rows)} such rows in all). A missing "
            "modality is a row with NaN in all columns; impute single missing numbers "
            "first, for example with SimpleImputer."
        )
    return ~missing
