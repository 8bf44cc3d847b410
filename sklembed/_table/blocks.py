"""Blocks: the columns of one wide table that belong to one modality, and the rows that lack it."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils import assert_all_finite, check_array

Block = slice | np.ndarray


def resolve_blocks(
    blocks: Mapping[str, Any] | None, names: Sequence[str] | None, n_features: int
) -> dict[str, Block]:
    """Find the columns of each modality, which between them hold every column once.

    Parameters
    ----------
    blocks : mapping of str to columns, or None
        Columns are a slice of positions, a name or a position, a list of these, or a mask. None
        reads them from names such as ``text__0, text__1, image__0``, which PerModalityUnion gives.
    names : sequence of str or None
        Names of the columns, if they have any.
    n_features : int
        How many columns there are.

    Returns
    -------
    blocks : dict of str to slice or ndarray of int
        A slice where the columns stand side by side.

    Raises
    ------
    ValueError
        If columns have no names that say, a block holds no column, or a column is in no block or
        in two.
    """
    if blocks is None:
        found = _read_from_names(names)
    else:
        found = {
            name: _positions(name, cols, names, n_features)
            for name, cols in blocks.items()
        }
    times = np.bincount(
        [column for cols in found.values() for column in cols], minlength=n_features
    )
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        column = int(wrong[0]) if names is None else names[wrong[0]]
        raise ValueError(
            f"Every column belongs to one block, but column {column!r} is in {times[wrong[0]]} of "
            f"the blocks {list(found)} ({len(wrong)} such columns of n_features={n_features})."
        )
    return {name: _as_slice(columns) for name, columns in found.items()}


def observed_in_block(X: np.ndarray, name: str, columns: Block) -> np.ndarray:
    """Tell which rows of a table have one modality, as `observed_rows` does of its columns."""
    try:
        return observed_rows(X[:, columns], f" of block {name!r}")
    except ValueError as error:
        error.add_note(f"This was in block {name!r}.")
        raise


def check_one_block(estimator: Any, X: Any, name: str, dtype: Any) -> np.ndarray:
    """Return the columns of one modality that come without the others, checked.

    Raises
    ------
    ValueError
        If `fit` has seen no such block, the width is another, columns are those of another block or
        stand in another order, a value is infinite, or a row is torn.
    """
    seen = np.arange(estimator.n_features_in_)[known_block(name, estimator.blocks_)]
    check_names(X, name, getattr(estimator, "feature_names_in_", None), seen)
    X = check_array(X, dtype=dtype, ensure_all_finite="allow-nan")
    if X.shape[1] != len(seen):
        raise ValueError(
            f"Block {name!r} has {len(seen)} columns; got {X.shape[1]}. Give the columns of that "
            "modality alone."
        )
    observed_in_block(X, name, slice(None))
    return X


def check_names(X: Any, name: str, fitted: np.ndarray | None, seen: np.ndarray) -> None:
    """Refuse columns that `fit` has seen in another block or order; other names say nothing."""
    if fitted is None or not hasattr(X, "columns"):
        return
    names = list(X.columns)
    if set(names) & set(fitted) and names != list(fitted[seen]):
        raise ValueError(
            f"The feature names should be those of block {name!r} in their order, "
            f"{list(fitted[seen][:3])} …; got {names[:3]} …."
        )


def known_block(name: str, blocks: Mapping[str, Block]) -> Block:
    """Return the columns of a block that was seen in fit.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in blocks:
        raise ValueError(f"There is no modality {name!r}; fit has seen {list(blocks)}.")
    return blocks[name]


def _read_from_names(names: Sequence[str] | None) -> dict[str, list[int]]:
    """Read blocks from the names of columns, which must stand side by side."""
    if names is None:
        raise ValueError(
            "blocks=None reads the modalities from column names such as 'text__0', but X has no "
            "names. Call set_output(transform='pandas') on the pipeline or the union, or pass "
            "blocks, for example {'text': slice(0, 384), 'image': slice(384, 1664)}."
        )
    found: dict[str, list[int]] = {}
    last = None
    for position, name in enumerate(names):
        block, separator, _ = name.partition("__")
        if not separator or not block:
            raise ValueError(
                f"Column {name!r} names no modality: with blocks=None columns are called "
                "'<modality>__…', as PerModalityUnion calls them. Rename it, or pass blocks."
            )
        if block in found and block != last:
            raise ValueError(
                f"The columns of {block!r} do not stand side by side: {name!r} comes after one of "
                f"{last!r}. Sort the columns, or pass blocks."
            )
        found.setdefault(block, []).append(position)
        last = block
    return found


def _positions(
    block: str, columns: Any, names: Sequence[str] | None, n_features: int
) -> list[int]:
    """Turn a block's columns into positions."""
    if isinstance(columns, slice):
        positions = list(range(*columns.indices(n_features)))
    else:
        chosen = [columns] if isinstance(columns, str | Integral) else list(columns)
        if len(chosen) == n_features and all(
            isinstance(c, bool | np.bool_) for c in chosen
        ):
            chosen = np.flatnonzero(chosen).tolist()  # a mask
        positions = [_position(block, column, names, n_features) for column in chosen]
    if not positions:
        raise ValueError(
            f"Block {block!r} holds none of the n_features={n_features} columns."
        )
    return positions


def _position(
    block: str, column: str | int, names: Sequence[str] | None, n_features: int
) -> int:
    """Find one column."""
    if isinstance(column, str):
        known = [] if names is None else list(names)
        if column in known:
            return known.index(column)
        raise ValueError(
            f"Block {block!r} asks for column {column!r}, which X does not have; it has "
            + (
                f"{known[:5]} …"
                if known
                else "no names: pass positions, or a DataFrame."
            )
        )
    if not -n_features <= column < n_features:
        raise ValueError(
            f"Block {block!r} asks for column {column}, but X has n_features={n_features}."
        )
    return int(column) % n_features


def _as_slice(positions: list[int]) -> Block:
    """Return a slice, which copies nothing, where positions stand side by side."""
    start, stop = positions[0], positions[-1] + 1
    if positions == list(range(start, stop)):
        return slice(start, stop)
    return np.array(positions)


def observed_rows(
    X: np.ndarray, where: str = "", names: Sequence[str] | None = None
) -> np.ndarray:
    """Tell which rows of a numeric block hold values, and refuse infinities and torn rows.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        One modality's columns; a missing modality is a row of NaN.
    where : str
        Added to the row in the error message.
    names : sequence of str or None
        Names of the columns, for the error message.

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
        column = int(nan[row].argmax())
        first = "" if names is None else f", first in {names[column]!r}"
        raise ValueError(
            f"Input X contains NaN in {nan[row].sum()} of {X.shape[1]} columns of row {row}{where}"
            f"{first} ({len(torn)} such rows in all). A row of NaN throughout is a missing "
            "modality; single missing numbers have to be imputed first, for example by "
            "SimpleImputer."
        )
    return ~missing
