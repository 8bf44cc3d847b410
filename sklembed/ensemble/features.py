"""The forms in which the members of an ensemble read a table, each computed once."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.utils.parallel import Parallel, delayed

from sklembed._table.blocks import Block, observed_in_block
from sklembed._targets import encode_target
from sklembed.fusion.calibration import fit_calibration
from sklembed.fusion.scaling import fit_scaling, scale_blocks
from sklembed.projection import ContrastiveProjector

_N_COMPONENTS = 64  # of a projection; it has as many principal components
_N_PRINCIPAL = 30  # components where there is no projection
_MAX_EPOCHS = 20  # of a projection, for up to 5,000 rows
_FULL_EPOCH_ROWS = 5000
_LARGE_BATCH_ROWS = 20_000


class Problem(NamedTuple):
    """The training rows of an ensemble, their folds, and the settings of the fit."""

    X: np.ndarray  # (n_samples, n_features)
    y: np.ndarray  # codes (n_samples,); 0/1 or numbers (n_samples, n_outputs)
    kind: str  # "classes", "labels" or "numbers"
    n_outputs: int
    weight: np.ndarray  # (n_samples,); the mean of positive weights is 1
    groups: np.ndarray | None  # codes (n_samples,)
    folds: list  # (training rows, held-out rows), on which members are tuned
    group_folds: list | None  # that keep groups together
    blocks: dict[str, Block]
    table_blocks: list[str]
    n_jobs: int | None
    seed: int

    @property
    def all_folds(self) -> list[list]:
        """The folds; with groups, also the folds that keep groups together."""
        if self.group_folds is None:
            return [self.folds]
        return [self.folds, self.group_folds]

    def hold_out(self, folds, predict, *arguments) -> np.ndarray:
        """Return outputs for the held-out rows of all folds; NaN for other rows.

        `predict` takes the arguments, the training rows and the held-out rows.
        """
        folds = [fold for fold in folds if len(fold[1])]
        outputs = Parallel(n_jobs=self.n_jobs)(
            delayed(predict)(*arguments, *fold) for fold in folds
        )
        out_of_fold = np.full((len(self.X), outputs[0].shape[1]), np.nan)
        for (_, held_out), of_fold in zip(folds, outputs, strict=True):
            out_of_fold[held_out] = of_fold
        return out_of_fold

    def log_loss(self, out_of_fold) -> float:
        """Return the log loss of outputs for held-out rows, after a calibration."""
        rows = ~np.isnan(out_of_fold[:, 0])
        return fit_calibration(out_of_fold[rows], self.y[rows], self.weight[rows])[2]

    def thin(self, n_rows: int, n_labels: int | None = None) -> "Problem":
        """Return the problem with about that many random rows of positive weight.

        Of many labels, `n_labels` are kept, evenly spread by frequency.
        """
        share = n_rows / np.count_nonzero(self.weight > 0)
        rng = np.random.RandomState(self.seed)

        def some(rows):
            rows = rows[self.weight[rows] > 0]
            if share >= 1:
                return rows
            return np.sort(rng.permutation(rows)[: int(np.ceil(share * len(rows)))])

        folds = [(some(train), some(held_out)) for train, held_out in self.folds]
        y, n_outputs = self.y, self.n_outputs
        if self.kind == "labels" and n_labels is not None and n_outputs > n_labels:
            by_frequency = np.argsort(y.sum(axis=0), kind="stable")
            spread = np.linspace(0, n_outputs - 1, n_labels).astype(np.intp)
            y, n_outputs = y[:, by_frequency[spread]], n_labels
        return self._replace(y=y, n_outputs=n_outputs, folds=folds)


class Features:
    """The scaling and the projections of the blocks of a table.

    Parameters
    ----------
    problem : Problem
        The training rows.
    """

    def __init__(self, problem: Problem):
        self.blocks = problem.blocks
        self.table_blocks = problem.table_blocks
        self.scaling = fit_scaling(
            problem.X, problem.blocks, problem.table_blocks, problem.weight
        )
        self.projections: dict[str, ContrastiveProjector | PCA] = {}

    def project(self, problem: Problem) -> dict[str, np.ndarray]:
        """Fit a projection for each block of vectors; return the projected training rows.

        Each row is projected by a network that was not trained on its label. Where the
        target is numbers, or no network can be trained, the projection consists of
        principal components. A block with fewer than two observed rows is omitted.
        """
        projected = {}
        for name, columns in self.blocks.items():
            if name in self.table_blocks:
                continue
            observed = observed_in_block(problem.X, name, columns)
            if np.count_nonzero(observed & (problem.weight > 0)) < 2:
                continue
            values = problem.X[:, columns]
            projection, Z = _fit_projection(problem, values, observed)
            self.projections[name], projected[name] = projection, Z
        return projected

    def scale(self, X: np.ndarray, names) -> np.ndarray:
        """Return some blocks side by side, scaled, zero where missing."""
        blocks = {name: self.blocks[name] for name in names}
        scaled = scale_blocks(X, blocks, self.scaling)
        return side_by_side([block.values for block in scaled.values()], len(X))

    def view(self, X: np.ndarray, projected: dict | None = None) -> "View":
        """Return the forms of a table. Projections of training rows must be passed."""
        return View(self, X, projected)


class View:
    """The forms of one table."""

    def __init__(self, features: Features, X: np.ndarray, projected: dict | None):
        self.features = features
        self.X = X
        if projected is not None:
            self.projected = projected

    @cached_property
    def projected(self) -> dict[str, np.ndarray]:
        """The projection of each block of vectors; NaN where missing."""
        projected = {}
        for name, projection in self.features.projections.items():
            values = self.X[:, self.features.blocks[name]]
            projected[name] = _apply(projection, values)
        return projected

    @cached_property
    def scaled(self) -> np.ndarray:
        """All blocks, scaled to rows of norm 1, zero where missing."""
        return self.features.scale(self.X, self.features.blocks)

    @cached_property
    def projected_and_scaled(self) -> np.ndarray:
        """The projections, zero where missing, and the scaled table columns."""
        parts = [np.nan_to_num(Z) for Z in self.projected.values()]
        if self.features.table_blocks:
            parts.append(self.features.scale(self.X, self.features.table_blocks))
        return side_by_side(parts, len(self.X))

    @cached_property
    def projected_and_raw(self) -> np.ndarray:
        """The projections and the table columns, NaN where missing."""
        parts = list(self.projected.values())
        for name in self.features.table_blocks:
            parts.append(self.X[:, self.features.blocks[name]])
        return side_by_side(parts, len(self.X))


def side_by_side(parts, n_rows) -> np.ndarray:
    """Concatenate columns; without parts, return a constant column."""
    if not parts:
        return np.zeros((n_rows, 1), dtype=np.float32)
    return np.hstack(parts).astype(np.float32, copy=False)


def _fit_projection(problem, values, observed):
    """Fit the projection of one block; return it with the projected training rows."""
    if problem.kind == "numbers" or not _has_pairs(problem, observed):
        rows = np.flatnonzero(observed & (problem.weight > 0))
        n_components = min(_N_PRINCIPAL, values.shape[1], len(rows))
        pca = PCA(n_components, random_state=problem.seed)
        with np.errstate(invalid="ignore"):  # equal rows have no variance to explain
            pca.fit(values[rows])
        return pca, _apply(pca, values)
    n_rows = len(values)
    n_epochs = round(_MAX_EPOCHS * _FULL_EPOCH_ROWS / n_rows)
    projector = ContrastiveProjector(
        min(_N_COMPONENTS, values.shape[1]),
        target_type="multiclass" if problem.kind == "classes" else "multilabel",
        cv=problem.all_folds[-1],  # no network may know the group of a row
        max_epochs=int(np.clip(n_epochs, 3, _MAX_EPOCHS)),
        batch_size=128 if n_rows <= _LARGE_BATCH_ROWS else 512,
        random_state=problem.seed,
    )
    Z = projector.fit_transform(values, problem.y, sample_weight=problem.weight)
    projector.set_params(cv=None)  # the folds are not kept with the model
    return projector, Z


def _has_pairs(problem, observed):
    """Return whether every fold has two training rows that belong together."""
    usable = observed & (problem.weight > 0)
    y = problem.y
    if len(np.unique(y, axis=0)) < 2:
        return False
    kind = "multiclass" if problem.kind == "classes" else "multilabel"
    target = encode_target(y, kind)
    for train, _ in problem.all_folds[-1]:
        rows = train[usable[train]]
        if len(np.unique(y[rows], axis=0)) < 2 or not target.has_pairs(rows):
            return False
    return True


def _apply(projection, values) -> np.ndarray:
    """Return the projection of a block; NaN where missing."""
    if isinstance(projection, ContrastiveProjector):
        return projection.transform(values)
    observed = ~np.isnan(values[:, 0])
    Z = np.full((len(values), projection.n_components_), np.nan, dtype=np.float32)
    if observed.any():
        Z[observed] = projection.transform(values[observed])
    return Z
