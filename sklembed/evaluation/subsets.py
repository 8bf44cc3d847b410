"""Models on a subset of their modalities, and on test rows that lack one of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags

from sklembed._table.blocks import resolve_blocks
from sklembed._table.columns import (
    as_pandas,
    column_positions,
    is_frame,
    take_columns,
)
from sklembed.encoders.frozen import frozen_encoders
from sklembed.union import PerModalityUnion, is_dropped, reaction_to_nan
from sklembed.vectorizer import MultimodalVectorizer


def as_task(estimator, X, blocks):
    """Return an estimator and its table, which `restrict` reduces to modalities."""
    if isinstance(estimator, Pipeline):
        name, first = estimator.steps[0]
        if isinstance(first, MultimodalVectorizer):
            # The union that fit would make, so that all folds have the same branches.
            first, X = first.make_union(X)
            estimator = clone(estimator).set_params(**{name: first})
        if isinstance(first, PerModalityUnion):
            return _Branches(estimator, X, blocks)
    return _Blocks(estimator, X, blocks)


class _Blocks:
    """A table of embeddings, and an estimator that is fitted on it."""

    def __init__(self, estimator, X, blocks):
        self.estimator, self.X = estimator, X
        self._of_estimator = {}
        for name, value in _block_params(estimator).items():
            self._of_estimator[name] = self._positions(value)
        if blocks is None and self._of_estimator:
            self.modalities = next(iter(self._of_estimator.values()))
        else:
            self.modalities = self._positions(blocks)

    def _positions(self, blocks):
        """Return the positions of the columns of each block."""
        names = list(self.X.columns) if is_frame(self.X) else None
        resolved = resolve_blocks(blocks, names, self.X.shape[1], self.X)
        columns = np.arange(self.X.shape[1])
        return {name: columns[block] for name, block in resolved.items()}

    def check_noise(self):
        """Refuse columns that are not numbers."""
        for name, dtype in pd.DataFrame(self.X).dtypes.items():
            if not pd.api.types.is_numeric_dtype(dtype):
                raise ValueError(
                    f"noise needs a table of numbers, but column {name!r} has the type "
                    f"{dtype}. Encode it in a PerModalityUnion as first step of the "
                    "pipeline, or set noise=()."
                )

    def check_missing(self):
        """Refuse estimators that cannot predict for missing modalities."""
        if not _accepts_nan(self.estimator):
            raise ValueError(
                f"{type(self.estimator).__name__} does not accept NaN, so it cannot "
                "predict for rows with a missing modality. Put a SimpleImputer before "
                "it in a pipeline, or set missing=()."
            )

    def restrict(self, names):
        """Return a clone of the estimator, and the table, of some modalities."""
        estimator = clone(self.estimator)
        if len(names) == len(self.modalities):
            return estimator, self.X
        columns = np.sort(np.concatenate(list(map(self.modalities.get, names))))
        params = {}
        for path, blocks in self._of_estimator.items():
            params[path] = _restrict_blocks(blocks, columns)
            table_blocks = path.removesuffix("blocks") + "table_blocks"
            names_of_table = estimator.get_params().get(table_blocks)
            if isinstance(names_of_table, list):
                remaining = filter(params[path].__contains__, names_of_table)
                params[table_blocks] = list(remaining)
        return estimator.set_params(**params), take_columns(self.X, columns)

    def split(self, fitted, X_train, X_test, with_missing):
        """Return the model, which is the fitted estimator, and the tables it takes."""
        without = {}
        for name, columns in self.modalities.items():
            if with_missing:
                without[name] = _set_missing(X_test, columns)
        return _Parts(fitted, X_train, X_test, self.modalities, without)


class _Branches:
    """A table of cells, and a pipeline that starts with a PerModalityUnion."""

    def __init__(self, estimator, X, blocks):
        self.estimator, self.X = estimator, X
        self.step, self.union = estimator.steps[0]
        for name, value in _block_params(estimator[1:]).items():
            raise ValueError(
                f"{name}={value!r} cannot be restricted to some branches. Set "
                "blocks=None, and call set_output(transform='pandas') on the pipeline, "
                "so that the blocks are read from column names."
            )
        self._columns_of_branch = self._find_columns()
        if blocks is None:
            blocks = _connect(self._columns_of_branch)
        self.modalities = {}
        for name, columns in blocks.items():
            owner = f"Block {name!r}"
            self.modalities[name], _ = column_positions(X, columns, owner=owner)
        self._branches = self._assign_branches()

    def _find_columns(self):
        """Return the positions of the columns that each branch reads."""
        columns_of_branch, selected = {}, set()
        for name, transformer, columns in self.union.transformers:
            owner = f"Branch {name!r}"
            positions, _ = column_positions(self.X, columns, owner=owner)
            selected.update(positions)
            if positions and not is_dropped(transformer):
                columns_of_branch[name] = positions
        rest = set(range(self.X.shape[1])) - selected
        if rest and not is_dropped(self.union.remainder):
            columns_of_branch["remainder"] = sorted(rest)
        return columns_of_branch

    def _assign_branches(self):
        """Return the branches of each modality, which contains all their columns."""
        branches = {name: [] for name in self.modalities}
        for branch, columns in self._columns_of_branch.items():
            names = []
            for name, columns_of_modality in self.modalities.items():
                if set(columns) <= set(columns_of_modality):
                    names.append(name)
            if len(names) != 1:
                raise ValueError(
                    f"The columns of branch {branch!r} are in {len(names)} of the "
                    f"modalities {list(self.modalities)}; they must be in one. Change "
                    "blocks."
                )
            branches[names[0]].append(branch)
        for name, branches_of_modality in branches.items():
            if not branches_of_modality:
                raise ValueError(f"No branch reads a column of the modality {name!r}.")
        return branches

    def check_noise(self):
        """Refuse branches that return tokens."""
        for name, encoder in frozen_encoders(self.union).items():
            if encoder.output == "tokens":
                raise ValueError(
                    f"The encoder {name!r} returns tokens, and noise needs vectors. Set "
                    "output='pooled', or noise=()."
                )

    def check_missing(self):
        """Accept any estimator: branches may impute missing cells."""

    def restrict(self, names):
        """Return a clone of the pipeline without the other branches, and the table."""
        params = {}
        for name in self.modalities.keys() - set(names):
            for branch in self._branches[name]:
                params[f"{self.step}__{branch}"] = "drop"
        return clone(self.estimator).set_params(**params), self.X

    def split(self, fitted, X_train, X_test, with_missing):
        """Return the steps of a fitted pipeline after the union, and their tables."""
        union, head = fitted[0], fitted[1:]
        columns = np.arange(union.get_feature_names_out().shape[0])
        modalities, without = {}, {}
        for name, branches in self._branches.items():
            blocks = map(union.blocks_.get, branches)
            modalities[name] = np.concatenate([columns[block] for block in blocks])
            if with_missing:
                incomplete = _set_missing(X_test, self.modalities[name])
                without[name] = as_pandas(union.transform(incomplete))
        Z_train, Z_test = union.transform(X_train), union.transform(X_test)
        return _Parts(head, as_pandas(Z_train), as_pandas(Z_test), modalities, without)


class _Parts(NamedTuple):
    """A fitted model, and the tables that it takes."""

    head: Any
    Z_train: Any
    Z_test: Any
    modalities: dict  # columns of each modality in these tables
    without: dict  # the test rows without each modality


def _block_params(estimator):
    """Return parameters such as "blocks" and "classifier__blocks", if they are set."""
    params = {}
    for name, value in estimator.get_params(deep=True).items():
        if name.split("__")[-1] == "blocks" and isinstance(value, Mapping):
            params[name] = value
    return params


def _accepts_nan(estimator):
    """Return whether an estimator accepts NaN, or an earlier step of it imputes NaN."""
    if isinstance(estimator, Pipeline) and len(estimator) > 1:
        reaction = reaction_to_nan(estimator[:-1])
        if reaction is None or not reaction.keeps:
            return reaction is not None
        return _accepts_nan(estimator[-1])
    return get_tags(estimator).input_tags.allow_nan


def _restrict_blocks(blocks, columns):
    """Return the positions of each block within some sorted columns of a table."""
    restricted = {}
    for name, columns_of_block in blocks.items():
        remaining = columns_of_block[np.isin(columns_of_block, columns)]
        if len(remaining):
            restricted[name] = np.searchsorted(columns, remaining).tolist()
    return restricted


def _connect(columns_of_branch):
    """Return the columns of each modality: of all branches that share columns."""
    modalities = {}
    for branch, columns in columns_of_branch.items():
        names, columns = [branch], set(columns)
        for name in list(modalities):
            if columns & modalities[name]:
                columns |= modalities.pop(name)
                names.insert(-1, name)
        modalities["/".join(names)] = columns
    return {name: sorted(columns) for name, columns in modalities.items()}


def _set_missing(X, columns):
    """Return a table in which the cells of some columns are missing."""
    if not is_frame(X):
        if X.dtype.kind in "iub":
            X = X.astype(np.float64)
        X = X.copy()
        X[:, columns] = None if X.dtype == object else np.nan
        return X
    if {dtype.kind for dtype in X.dtypes.iloc[columns]} == {"f"}:
        X = X.copy()
        X.iloc[:, columns] = np.nan
        return X
    X = X.copy(deep=False)
    for position in columns:
        column = X.iloc[:, position]
        X.isetitem(position, column.mask(np.ones(len(X), dtype=bool)))
    return X
