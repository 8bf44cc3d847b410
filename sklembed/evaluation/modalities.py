"""The value of each modality, and the cost of noise and of missing cells."""

import math
import warnings
from itertools import compress, product
from numbers import Real
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._display import as_html, as_text, progress_bar
from sklembed._table.columns import (
    as_pandas,
    as_table,
    is_frame,
    take_rows,
)
from sklembed._validation import (
    check_no_missing_label,
    draw_seed,
    is_a_classifier,
)
from sklembed.encoders import prefetch
from sklembed.encoders.frozen import frozen_encoders
from sklembed.evaluation.errors import (
    Failures,
    check_error_score,
    check_one_score,
)
from sklembed.evaluation.folds import list_folds
from sklembed.evaluation.subsets import as_task

_LARGEST_N_MODALITIES = 8  # 256 fits for each fold
_SEPARATOR = " + "


class ModalityReport(NamedTuple):
    """Result of :func:`~sklembed.evaluation.modality_report`, a named tuple.

    Parameters
    ----------
    subsets : DataFrame
        Scores of the estimator on each subset of the modalities.

    shapley : DataFrame
        Shapley value of each modality.

    degradation : DataFrame
        Scores under noise and missing cells.
    """

    subsets: pd.DataFrame
    shapley: pd.DataFrame
    degradation: pd.DataFrame

    def __repr__(self):
        return as_text("ModalityReport", [], self._tables())

    def _repr_html_(self):
        return as_html("ModalityReport", [], self._tables())

    def _tables(self):
        """Return the means over folds, by heading."""
        subsets = self.subsets.groupby("modalities", sort=False)["score"]
        shapley = self.shapley.groupby("modality", sort=False)["value"]
        degradation = self.degradation.groupby(
            ["modality", "kind", "level"], sort=False
        )
        return {
            "Score of each subset of modalities": subsets.agg(["mean", "std"]),
            "Shapley values": shapley.agg(["mean", "std"]),
            "Under noise and missing cells": degradation[["score", "loss"]].mean(),
        }


def modality_report(
    estimator,
    X,
    y,
    *,
    blocks=None,
    cv=5,
    groups=None,
    scoring=None,
    noise=(0.5, 1.0, 2.0),
    missing=(0.25, 0.5, 1.0),
    error_score=math.nan,
    n_jobs=None,
    random_state=None,
    verbose=0,
):
    """Measure which modalities a model needs, and how it degrades without them.

    Two questions have different answers. *What would I lose without this modality?* The
    estimator is fitted again on every subset of the modalities, and Shapley values [1]_
    divide the gain over a constant prediction among them. *What happens if the modality
    is noisy or missing later?* The estimator that was fitted on all modalities predicts
    for test rows with noise or missing cells, without another fit.

    Parameters
    ----------
    estimator : classifier or regressor
        Fitted on a table of embeddings; or a pipeline whose first step is a
        :class:`~sklembed.PerModalityUnion` or a :class:`~sklembed.MultimodalVectorizer`.

    X : DataFrame or array-like of shape (n_samples, n_features)
        The table: embeddings side by side, or the cells that the pipeline reads.

    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Targets.

    blocks : dict of str to columns, or None, default=None
        The columns of `X` of each modality, in any form of
        :class:`~sklearn.compose.ColumnTransformer`. If None, the modalities of a
        pipeline are its branches; branches that share a column are one modality, and
        for a :class:`~sklembed.MultimodalVectorizer` there is one for each text and image and one
        for the other columns. For a table of embeddings they are the parameter `blocks`
        of the estimator, or else the prefixes of column names such as ``text__0``.

    cv : int, cross-validation splitter or iterable, default=5
        The folds, as in :func:`~sklearn.model_selection.cross_validate`.

    groups : array-like of shape (n_samples,), default=None
        Group of each row, for the folds.

    scoring : str, callable or None, default=None
        Scorer of scikit-learn. None is the method `score` of the estimator.

    noise : sequence of float, default=(0.5, 1.0, 2.0)
        Standard deviations of Gaussian noise that is added to the vectors of one
        modality in all test rows. The unit is the standard deviation of each column in
        the training rows, so that 1 adds as much variance as there is. In a pipeline,
        noise is added to the output of the first step.

    missing : sequence of float, default=(0.25, 0.5, 1.0)
        Fractions of the test rows in which one modality is missing, above 0 and up to
        1. The cells of `X` are missing, so that imputers of the pipeline take effect.

    error_score : "raise" or float, default=nan
        Score if the estimator cannot be fitted or scored in a fold. A warning is
        issued. If "raise", the error is raised.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors. A job is a subset of the modalities in a fold.

    random_state : int, RandomState instance or None, default=None
        Seeds the noise and the choice of missing rows. Estimators have their own seeds:
        pass integers there for reproducible results.

    verbose : int, default=0
        If greater than 0, a progress bar counts the fits.

    Returns
    -------
    report : ModalityReport
        A named tuple of DataFrames, each with a row for each fold:

        - `subsets`: "modalities", a subset such as ``"text + image"``, or ``"none"``
          for the constant prediction; "n_modalities"; "fold"; "score"; and "fit s",
          seconds.
        - `shapley`: "modality", "fold" and "value". In each fold, the values sum to the
          score of all modalities less that of none.
        - `degradation`: "modality", "kind" ("noise" or "missing"), "level", "fold",
          "score", and "loss", the score of the same fitted model on the same rows
          without noise and with all cells, less this score. Level 0 is that model.

    Raises
    ------
    TypeError
        If `estimator` has no method `fit` or `predict`, or `scoring` has several scores.
    ValueError
        If there is only one modality or more than eight, the modalities do not match
        the branches of a pipeline, a branch returns tokens and there is `noise`, the
        estimator does not accept NaN and there is `missing`, there are no folds, a fold
        has no training or test rows, or a level or `error_score` is invalid. All errors
        are raised before anything is fitted.

    Warns
    -----
    FitFailedWarning
        If the estimator failed in a fold and `error_score` is a number.

    See Also
    --------
    sklembed.plots.ModalityDisplay : Draw the report.

    Notes
    -----
    k modalities take 2^k - 1 fits for each fold. A pipeline is fitted on a subset by
    setting the other branches to "drop"; from a table of embeddings, the other columns
    are removed, and the parameters `blocks` and `table_blocks` are restricted. The
    prediction without a modality is that of
    :class:`~sklearn.dummy.DummyClassifier` or :class:`~sklearn.dummy.DummyRegressor`.

    Frozen encoders with a store encode each cell once, before the first fit, so that an
    interrupted report only repeats the fits. The kinds of columns that a
    :class:`~sklembed.MultimodalVectorizer` reads are those of all rows of `X`.

    Levels are comparable within a fold: the noise is the same draw, multiplied, and
    rows that are missing at one fraction are missing at every larger one.

    References
    ----------
    .. [1] Shapley. A value for n-person games. Contributions to the Theory of Games 2,
       1953.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklembed import KernelFusionClassifier
    >>> from sklembed.evaluation import modality_report
    >>> X, y = load_digits(n_class=4, return_X_y=True)
    >>> blocks = {"top": slice(0, 32), "bottom": slice(32, 64)}
    >>> report = modality_report(
    ...     KernelFusionClassifier(blocks=blocks, random_state=0),
    ...     X[:300],
    ...     y[:300],
    ...     cv=3,
    ...     missing=[1.0],
    ...     random_state=0,
    ... )
    >>> report.subsets.groupby("modalities", sort=False)["score"].mean().round(1)
    modalities
    none            0.3
    top             0.9
    bottom          1.0
    top + bottom    1.0
    Name: score, dtype: float64
    >>> report.shapley.groupby("modality", sort=False)["value"].mean().sum().round(1)
    np.float64(0.7)
    """
    if not (hasattr(estimator, "fit") and hasattr(estimator, "predict")):
        raise TypeError(
            f"estimator must be a classifier or regressor; got {estimator!r}."
        )
    noise = _check_levels("noise", noise, math.inf)
    missing = _check_levels("missing", missing, 1)
    check_one_score(scoring)
    check_error_score(error_score)
    X = as_pandas(as_table(X))
    check_consistent_length(X, y, groups)
    check_no_missing_label(y)
    y = np.asarray(y)
    task = as_task(estimator, X, blocks)
    _check_modalities(task, noise, missing)
    scorer = check_scoring(estimator, scoring)
    splitter = check_cv(cv, y, classifier=is_a_classifier(estimator))
    folds = list_folds(splitter, task.X, y, groups)
    seed = draw_seed(random_state)
    _encode_cells(task)
    # Bit i of a subset's position is 1 if modality i is in it.
    subsets = list(product([False, True], repeat=len(task.modalities)))
    subsets = [subset[::-1] for subset in subsets]
    jobs = []
    for fold in folds:
        for subset in subsets:
            levels = {}
            if all(subset):
                levels = {"noise": noise, "missing": missing}
            job = delayed(_run)(
                task, subset, fold, y, scorer, levels, [seed, fold.number], error_score
            )
            jobs.append(job)
    results = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    progress = progress_bar(results, verbose=verbose, total=len(jobs), unit=" fits")
    rows, degraded, failures = [], [], Failures("modality_report", error_score)
    for row, degraded_rows, failures_of_job in progress:
        rows.append(row)
        degraded += degraded_rows
        failures.update(failures_of_job)
    failures.warn()
    return _tabulate(rows, degraded, list(task.modalities))


def _check_levels(name, levels, largest):
    """Return the levels of noise or of missing rows as a list."""
    levels = list(levels)
    for level in levels:
        if not isinstance(level, Real) or not 0 < level <= largest or level == math.inf:
            limit = "" if largest == math.inf else f" and up to {largest}"
            raise ValueError(f"{name} must be numbers above 0{limit}; got {levels}.")
    return levels


def _check_modalities(task, noise, missing):
    """Refuse too few or too many modalities, and levels that cannot be evaluated."""
    names = list(task.modalities)
    if len(names) < 2:
        raise ValueError(
            f"There is one modality, {names}; at least two are needed. Pass blocks, "
            "for example {'text': ['title'], 'image': ['photo']}."
        )
    if len(names) > _LARGEST_N_MODALITIES:
        raise ValueError(
            f"There are {len(names)} modalities, {names}, with {2 ** len(names):,} "
            f"subsets to fit in each fold; at most {_LARGEST_N_MODALITIES} are "
            "supported. Join some by the parameter blocks."
        )
    for name in names:
        if name == "none" or _SEPARATOR in name:
            raise ValueError(
                f"{name!r} is not a valid name of a modality: 'none' and "
                f"{_SEPARATOR!r} are reserved. Rename it in blocks."
            )
    if noise:
        task.check_noise()
    if missing:
        task.check_missing()


def _encode_cells(task):
    """Encode the cells of a pipeline once, before workers start."""
    encoders = frozen_encoders(task.estimator).values()
    if encoders and all(encoder._keeps_vectors() for encoder in encoders):
        prefetch(task.estimator, task.X)


def _run(task, subset, fold, y, scorer, levels, seed, error_score):
    """Fit on a subset of the modalities in a fold.

    Returns
    -------
    row : dict
        A row of `subsets`.
    degraded : list of dict
        Rows of `degradation`, if there are `levels`.
    failures : Failures
        Of the estimator and of the scorer.
    """
    names = list(compress(task.modalities, subset))
    row = {
        "modalities": _SEPARATOR.join(names) or "none",
        "n_modalities": len(names),
        "fold": fold.number,
        "score": error_score,
        "fit s": math.nan,
    }
    place = f"fold {fold.number} with {row['modalities']!r}"
    failures, fitted = Failures("modality_report", error_score), None
    with failures.located(place, "Fitting or scoring"):
        estimator, X = _constant(task.estimator), task.X
        if names:
            estimator, X = task.restrict(names)
        start = perf_counter()
        fitted = estimator.fit(take_rows(X, fold.train), y[fold.train])
        row["fit s"] = perf_counter() - start
        row["score"] = scorer(fitted, take_rows(X, fold.test), y[fold.test])
    degraded = []
    if any(levels.values()):
        degraded = _list_levels(task, levels, fold, row["score"], error_score)
    if degraded and fitted is not None:
        with failures.located(f"{place}, noisy or missing", "Scoring"):
            _degrade(degraded, task, fitted, fold, y[fold.test], scorer, seed)
    for record in degraded:
        record["loss"] = row["score"] - record["score"]
    return row, degraded, failures


def _constant(estimator):
    """Return the estimator that predicts without any modality."""
    if is_a_classifier(estimator):
        return DummyClassifier(strategy="prior")
    return DummyRegressor()


def _list_levels(task, levels, fold, score, error_score):
    """Return rows of `degradation`, still without their scores."""
    rows = []
    for name in task.modalities:
        for kind in filter(levels.get, levels):
            row = {"modality": name, "kind": kind, "fold": fold.number}
            rows.append(row | {"level": 0, "score": score})
            for level in levels[kind]:
                rows.append(row | {"level": level, "score": error_score})
    return rows


def _degrade(rows, task, fitted, fold, y_test, scorer, seed):
    """Score a fitted estimator on degraded test rows; set the score of each row."""
    with_missing = "missing" in {row["kind"] for row in rows}
    X_train, X_test = take_rows(task.X, fold.train), take_rows(task.X, fold.test)
    parts = task.split(fitted, X_train, X_test, with_missing)
    n_test, names = len(y_test), list(task.modalities)
    for row in rows:
        if row["level"] == 0:
            continue
        name = row["modality"]
        # All levels have the same draw.
        rng = np.random.default_rng([*seed, names.index(name)])
        if row["kind"] == "missing":
            is_missing = rng.permutation(n_test) < round(row["level"] * n_test)
            Z = _replace_rows(parts.Z_test, parts.without[name], is_missing)
        else:
            columns = parts.modalities[name]
            Z = _add_noise(parts.Z_test, parts.Z_train, columns, row["level"], rng)
        row["score"] = scorer(parts.head, Z, y_test)


def _replace_rows(Z, replacement, rows):
    """Return a table with some rows of another one."""
    mask = np.broadcast_to(rows[:, None], Z.shape)
    if is_frame(Z):
        return Z.mask(mask, replacement)
    return np.where(mask, replacement, Z)


def _add_noise(Z, Z_train, columns, level, rng):
    """Return a table of numbers with noise in the columns of a modality."""
    values, train = np.array(Z, dtype=np.float64), np.asarray(Z_train)[:, columns]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN
        sds = np.nanstd(train.astype(np.float64), axis=0)
    draws = rng.standard_normal((len(values), len(columns)))
    values[:, columns] += level * np.nan_to_num(sds) * draws
    if is_frame(Z):
        return pd.DataFrame(values, index=Z.index, columns=Z.columns)
    return values.astype(np.result_type(Z.dtype, np.float32))


def _tabulate(rows, degraded, modalities):
    """Return the report of the rows of all folds and subsets."""
    values = []
    subsets = pd.DataFrame(rows)
    # Folds come first, and in each fold the subsets in the order of their bits.
    n_subsets = 2 ** len(modalities)
    scores = subsets["score"].to_numpy(dtype=np.float64).reshape(-1, n_subsets)
    for i, values_of_folds in enumerate(shapley_values(scores).T):
        for fold, value in enumerate(values_of_folds.tolist()):
            values.append({"modality": modalities[i], "fold": fold, "value": value})
    subsets["order"] = np.arange(len(subsets)) % n_subsets
    subsets = subsets.sort_values(["n_modalities", "order", "fold"], ignore_index=True)
    columns = ["modality", "kind", "level", "fold", "score", "loss"]
    degradation = pd.DataFrame(degraded, columns=columns)
    degradation["order"] = degradation["modality"].map(modalities.index)
    degradation = degradation.sort_values(
        ["order", "kind", "level", "fold"], ignore_index=True
    )
    return ModalityReport(
        subsets.drop(columns="order"),
        pd.DataFrame(values),
        degradation.drop(columns="order"),
    )


def shapley_values(scores):
    """Return the Shapley value of each player.

    Parameters
    ----------
    scores : ndarray of shape (n_games, 2 ** n_players)
        Score of each set of players. Player i is in a set if bit i of its position is
        1.

    Returns
    -------
    values : ndarray of shape (n_games, n_players)
        The mean gain by a player, over all orders in which players can join. The values
        of a game sum to the score of all players less that of none.
    """
    n_players = scores.shape[1].bit_length() - 1
    values = np.zeros((len(scores), n_players))
    subsets = np.arange(2**n_players)
    for player in range(n_players):
        for subset in subsets[subsets >> player & 1 == 0]:
            size = int(subset).bit_count()
            # The share of orders in which exactly this set has joined before.
            share = 1 / (n_players * math.comb(n_players - 1, size))
            gain = scores[:, subset | 1 << player] - scores[:, subset]
            values[:, player] += share * gain
    return values
