"""Adaptations of frozen embeddings, and the tables of vectors or cells that they take."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_array

from sklembed._table.blocks import resolve_blocks
from sklembed._table.columns import as_pandas, as_table, is_frame, take_rows
from sklembed._validation import check_vectors, is_a_classifier
from sklembed.encoders import FrozenEncoder
from sklembed.encoders.column import Column
from sklembed.encoders.prefetch import list_jobs
from sklembed.ensemble import EmbeddingClassifier, EmbeddingRegressor
from sklembed.evaluation.efficiency import n_parameters
from sklembed.evaluation.records import hash_settings, hash_table
from sklembed.finetune import FinetunedClassifier, FinetunedRegressor
from sklembed.fusion.scaling import find_table_blocks
from sklembed.projection import ContrastiveProjector
from sklembed.union import PerModalityUnion
from sklembed.vectorizer import MultimodalVectorizer

_METHODS = ("head", "bitfit", "lora", "full")
_JOINT = "one projection"
_NAMES = ("none", "pca", _JOINT, "per modality", "ensemble", *_METHODS)
_N_COMPONENTS = 128  # of PCA, as many as ContrastiveProjector has


class Encoded(NamedTuple):
    """A column of cells and its frozen encoder."""

    encoder: FrozenEncoder
    cells: Any
    name: Any
    digests: np.ndarray
    is_direct: bool = True  # whether the cells are those of the table, unchanged

    def n_distinct(self, rows):
        """Return the number of distinct observed cells of some rows."""
        return len(set(self.digests[rows]) - {None})


class Table(NamedTuple):
    """Embeddings with their blocks, or cells with the union that encodes them."""

    X: Any
    features: PerModalityUnion | None
    blocks: dict | None
    encoded: list[Encoded]

    def vectors(self, y, fold):
        """Return the vectors of training and test rows, and their blocks."""
        train, test = take_rows(self.X, fold.train), take_rows(self.X, fold.test)
        if self.features is None:
            return train, test, self.blocks
        union = clone(self.features).set_output(transform="default")
        train = union.fit_transform(train, y[fold.train])
        return train, union.transform(test), union.blocks_

    def key(self):
        """Return a hash of the table."""
        digests, of_table = [], {}
        for encoded in self.encoded:
            digests.append(encoded.digests)
            if encoded.is_direct:  # else other cells may become the same
                of_table[encoded.name] = encoded.digests
        return hash_settings(hash_table(self.X, of_table), digests)


def read_table(X, features, blocks):
    """Validate the table; return it with its blocks or its encoders."""
    if features is None:
        return _read_embeddings(X, blocks)
    if blocks is not None:
        raise ValueError(
            "blocks are for a table of embeddings. With features, the modalities are "
            "its branches: set blocks=None."
        )
    if isinstance(features, FrozenEncoder):
        column = Column(X)  # refuses several columns
        name = "cells" if column.name is None else column.name
        X = pd.DataFrame({name: pd.Series(column.cells, dtype=object)})
        features = PerModalityUnion([("cells", features, [0])])
    X = as_pandas(as_table(X))
    if isinstance(features, MultimodalVectorizer):
        # The union that fit would make, so that all folds have the same branches.
        features, X = features.make_union(X)
    if not isinstance(features, PerModalityUnion):
        raise TypeError(
            "features must be a PerModalityUnion, MultimodalVectorizer or FrozenEncoder "
            f"that makes vectors of cells, or None; got {features!r}."
        )
    # Encoders receive only rows that have a cell, whose labels are then their positions.
    X = pd.DataFrame(X).reset_index(drop=True)
    encoded = []
    for path, encoder, cells in list_jobs(features, X):
        if encoder.output != "pooled":
            raise ValueError(
                f"The encoder {path!r} returns tokens, but the adaptations take vectors. "
                "Set output='pooled'."
            )
        if encoder.store is None:
            raise ValueError(
                f"The encoder {path!r} has store=None, so that each fit would encode its "
                "cells again. Give it a store."
            )
        if hasattr(cells, "reindex"):
            cells = cells.reindex(X.index)
        if len(cells) != len(X):
            raise ValueError(
                f"The step before the encoder {path!r} returns an array, so the rows of "
                "its cells are unknown. Let it return a DataFrame, by "
                "set_output(transform='pandas')."
            )
        digests = encoder.digests(cells)
        is_direct = path in [branch for branch, *_ in features.transformers]
        name = Column(cells).name
        encoded.append(Encoded(encoder, cells, name, digests, is_direct))
    return Table(X, features, None, encoded)


def _read_embeddings(X, blocks):
    """Validate a table of embeddings."""
    table = as_pandas(as_table(X))
    try:
        check_vectors(table, EmbeddingClassifier())
    except ValueError as error:
        error.add_note("Or pass features, to make vectors of cells.")
        raise
    names = list(table.columns) if is_frame(table) else None
    if blocks is None and names is None:
        blocks = {"X": slice(None)}
    resolved = resolve_blocks(blocks, names, table.shape[1], table)
    dtypes = [np.float64, np.float32]
    vectors = check_array(table, dtype=dtypes, ensure_all_finite="allow-nan")
    return Table(vectors, None, resolved, [])


class _CentredScaler(TransformerMixin, BaseEstimator):
    """Centre vectors, and divide them by one number: their mean squared norm is 1."""

    def fit(self, X, y=None):
        X = np.asarray(X, dtype=np.float64)
        self.mean_ = X.mean(axis=0)
        mean_square = np.square(X - self.mean_).sum(axis=1).mean()
        self.scale_ = math.sqrt(mean_square) or 1.0
        self.n_parameters_ = 0
        return self

    def transform(self, X):
        return (np.asarray(X) - self.mean_) / self.scale_


class _LeadingComponents(TransformerMixin, BaseEstimator):
    """At most 128 principal components, and no more than there are rows or columns."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def fit(self, X, y=None):
        n_components = min(_N_COMPONENTS, *X.shape)
        self.pca_ = PCA(n_components, random_state=self.random_state).fit(X)
        self.n_parameters_ = self.pca_.components_.size
        return self

    def transform(self, X):
        return self.pca_.transform(X)


class Arm(NamedTuple):
    """An adaptation: a transformer of vectors, or an estimator that predicts."""

    name: str
    estimator: Any  # None for the vectors themselves
    is_joint: bool = False  # whether a transformer takes all modalities together
    encoded: Encoded | None = None  # the column whose encoder is fine-tuned

    @property
    def predicts(self):
        """Whether the estimator predicts without a downstream estimator.

        Some transformers also predict, such as LinearDiscriminantAnalysis and KMeans.
        """
        return self.encoded is not None or _predicts_from_blocks(self.estimator)

    def prepare(self, table, y, fold, record):
        """Return what the final estimator takes of training and test rows.

        Returns
        -------
        train, test : tables
            The adapted vectors of the rows, or the cells of one column.
        params : dict
            Parameters of the final estimator.
        """
        if self.encoded is not None:
            cells = self.encoded.cells
            return take_rows(cells, fold.train), take_rows(cells, fold.test), {}
        start = perf_counter()
        train, test, blocks = table.vectors(y, fold)
        if self.predicts:
            record["fit s"] = perf_counter() - start
            return train, test, {"blocks": self.estimator.blocks or blocks}
        adaptation = self._build(train, blocks)
        train = adaptation.fit_transform(train, y[fold.train])
        fitted = perf_counter()
        test = adaptation.transform(test)
        record["fit s"] = fitted - start
        record["predict s"] = perf_counter() - fitted
        record["parameters"] = count_parameters(adaptation)
        return train, test, {}

    def _build(self, X, blocks):
        """Return a pipeline that adapts the vectors of some blocks."""
        table_blocks = find_table_blocks("auto", X, blocks)
        branches = []
        for name, columns in blocks.items():
            steps = [_CentredScaler()]
            if name in table_blocks:
                steps = [SimpleImputer(), StandardScaler(), _CentredScaler()]
            elif self.estimator is not None and not self.is_joint:
                steps = [clone(self.estimator), _CentredScaler()]
            branches.append((name, make_pipeline(*steps), columns))
        union = PerModalityUnion(branches, keep_unobserved=True)
        steps = [union, SimpleImputer(keep_empty_features=True)]
        if self.is_joint:
            steps += [clone(self.estimator), _CentredScaler()]
        return make_pipeline(*steps)


def make_arms(adaptations, table, column, is_classification, random_state):
    """Validate the adaptations; return an arm for each."""
    if adaptations is None:
        adaptations = ["none", "pca", _JOINT, "per modality", "ensemble"]
        modalities = table.blocks
        if table.features is not None:
            modalities = table.features.transformers
        if len(modalities) == 1:
            adaptations.remove("per modality")
    if isinstance(adaptations, str):
        adaptations = [adaptations]
    if not isinstance(adaptations, Mapping):
        if len(set(adaptations)) < len(adaptations):
            raise ValueError(f"An adaptation is named twice; got {adaptations}.")
        adaptations = {name: name for name in adaptations}
    if not adaptations:
        raise ValueError("There is no adaptation to compare.")
    arms = []
    for name, value in adaptations.items():
        if isinstance(value, str):
            arm = _arm_by_name(
                name, value, table, column, is_classification, random_state
            )
        else:
            arm = _arm_of_estimator(name, value, table, column, is_classification)
        arms.append(arm)
    return arms


def _arm_by_name(name, value, table, column, is_classification, random_state):
    """Return the arm of one of the names."""
    if value not in _NAMES:
        raise ValueError(
            f"There is no adaptation {value!r}; the names are {list(_NAMES)}."
        )
    if value in _METHODS:
        encoded = _choose_column(name, table, column)
        kind = FinetunedClassifier if is_classification else FinetunedRegressor
        tuned = kind(encoded.encoder, method=value, random_state=random_state)
        return _arm_of_estimator(name, tuned, table, column, is_classification)
    ensemble = EmbeddingClassifier if is_classification else EmbeddingRegressor
    projector = ContrastiveProjector(random_state=random_state)
    if not is_classification:
        projector.set_params(target_type="continuous")
    estimators = {
        "none": None,
        "pca": _LeadingComponents(random_state),
        _JOINT: projector,
        "per modality": projector,
        "ensemble": ensemble(random_state=random_state),
    }
    return Arm(name, estimators[value], is_joint=value == _JOINT)


def _arm_of_estimator(name, estimator, table, column, is_classification):
    """Validate an estimator and return its arm."""
    if isinstance(estimator, FinetunedClassifier | FinetunedRegressor):
        encoded = _choose_column(name, table, column)
        if estimator.encoder is not encoded.encoder:
            encoder = estimator.encoder
            digests = encoder.digests(encoded.cells)
            encoded = encoded._replace(encoder=encoder, digests=digests)
        _check_trainable(name, estimator)
        arm = Arm(name, estimator, encoded=encoded)
    elif _predicts_from_blocks(estimator):
        arm = Arm(name, estimator)
    elif hasattr(estimator, "transform") and not isinstance(estimator, type):
        return Arm(name, estimator)
    else:
        raise TypeError(
            f"The adaptation {name!r} must be one of the names {list(_NAMES)}, a "
            "transformer, an estimator with a parameter blocks, or a fine-tuned one; got "
            f"{estimator!r}. Pass other classifiers and regressors as estimators."
        )
    if is_a_classifier(estimator) != is_classification:
        kind = "classifier" if is_classification else "regressor"
        raise TypeError(f"The adaptation {name!r} must be a {kind}; got {estimator!r}.")
    return arm


def _predicts_from_blocks(estimator):
    return hasattr(estimator, "predict") and hasattr(estimator, "blocks")


def _choose_column(name, table, column):
    """Return the column of cells that is fine-tuned."""
    columns = [encoded.name for encoded in table.encoded]
    if not columns:
        raise ValueError(
            f"The adaptation {name!r} trains an encoder on cells, but X has embeddings. "
            "Pass the table of cells, and features with a FrozenEncoder."
        )
    if column is None and len(columns) == 1:
        return table.encoded[0]
    if columns.count(column) != 1:
        raise ValueError(
            f"The adaptation {name!r} trains the encoder of one column. features encodes "
            f"the columns {columns}, and column={column!r}. Name a column that one "
            "encoder reads."
        )
    return table.encoded[columns.index(column)]


def _check_trainable(name, estimator):
    """Refuse networks that cannot be trained, before any work."""
    if estimator.method == "lora" and find_spec("peft") is None:
        raise ImportError(
            f"The adaptation {name!r} needs peft, which the extra 'finetune' installs: "
            "pip install 'sklembed[finetune]'. Or leave it out, and use 'bitfit' or "
            "'full'."
        )
    backend, _ = estimator.encoder._backend_and_space()
    if estimator.method != "head" and not hasattr(backend, "trainable"):
        raise ValueError(
            f"The adaptation {name!r} trains a network, but {estimator.encoder.model!r} "
            "is run without torch. Leave the adaptation out, or use a checkpoint for "
            "transformers."
        )


def count_parameters(estimator):
    """Return the number of trained parameters of a fitted estimator, NaN if unknown."""
    parts = None
    if isinstance(estimator, Pipeline):
        parts = [step for _, step in estimator.steps]
    elif isinstance(estimator, PerModalityUnion):
        parts = list(estimator.named_transformers_.values())
    if parts is not None:
        return sum(map(count_parameters, parts))
    if isinstance(estimator, str | SimpleImputer | StandardScaler):
        return 0
    return n_parameters(estimator)
