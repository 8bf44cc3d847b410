"""Choose among frozen encoders by successive halving on subsamples of the rows."""

import math
from collections.abc import Mapping
from functools import partial
from numbers import Integral, Real
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._display import as_html, as_text, progress_bar
from sklembed._table.columns import (
    as_table,
    column_positions,
    take_columns,
    take_rows,
)
from sklembed._table.tokens import average_tokens
from sklembed._validation import (
    check_no_missing_label,
    draw_seed,
    is_a_classifier,
)
from sklembed.encoders import FrozenEncoder
from sklembed.encoders.joint import fill_stores
from sklembed.evaluation.errors import Failures, check_error_score, check_one_score
from sklembed.evaluation.few_labels import _labelling_order

_ALPHAS = np.logspace(-1, 5, 13)  # of standardised columns


class EncoderRanking(NamedTuple):
    """Result of :func:`~sklembed.evaluation.rank_encoders`, a named tuple.

    Parameters
    ----------
    results : DataFrame
        A row for each encoder in each rung.

    best : str
        Name of the best encoder.
    """

    results: pd.DataFrame
    best: str

    def __repr__(self):
        return as_text(*self._report())

    def _repr_html_(self):
        return as_html(*self._report())

    def _report(self):
        sentence = f"{self.best!r} is the best encoder."
        return "EncoderRanking", [sentence], {"": self.results}


def rank_encoders(
    encoders,
    X,
    y,
    *,
    head=None,
    cv=5,
    groups=None,
    scoring=None,
    factor=3,
    min_resources="exhaust",
    max_resources=1.0,
    error_score=math.nan,
    n_jobs=None,
    random_state=None,
    verbose=0,
):
    """Choose among frozen encoders without encoding all rows with all of them.

    Successive halving [1]_, with rows as the resource: all encoders encode a small
    stratified subsample, a simple model is cross-validated on the vectors, and the
    best third goes on to the next *rung* with three times as many rows, which include
    the previous ones. No row is encoded for an encoder that has been dropped.

    Parameters
    ----------
    encoders : dict of str to FrozenEncoder or (FrozenEncoder, column)
        The encoders by name, which may differ in model, layer, pooling and column. Each
        needs a store. The vectors of ``output="tokens"`` are averaged over each cell.

    X : DataFrame or array-like of shape (n_samples,) or (n_samples, n_columns)
        The column of cells. Or a table, if encoders have a column.

    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Classes or numeric targets.

    head : classifier, regressor or None, default=None
        The model that is fitted on the vectors. None is a ridge regression in closed
        form on standardised columns, whose penalty is chosen by leave-one-out:
        :class:`~sklearn.linear_model.RidgeClassifierCV` for classes, and
        :class:`~sklearn.linear_model.RidgeCV` for numbers. Integers count as classes:
        convert numbers of pieces or years to float. Missing cells get the mean vector.

    cv : int or cross-validation splitter, default=5
        The folds of the rows of a rung, the same for all encoders.

    groups : array-like of shape (n_samples,), default=None
        Group of each row, for the folds.

    scoring : str, callable or None, default=None
        Scorer of scikit-learn. None is the method `score` of the head: accuracy or R².

    factor : int or float, default=3
        Of the n best encoders n / factor, rounded up, go on to the next rung, which has
        `factor` times as many rows; and so do encoders that share their passes with
        one of these.

    min_resources : "exhaust", "smallest" or int, default="exhaust"
        Number of rows of the first rung. "smallest" is two for each fold and class, or
        two for each fold for numeric targets. With "exhaust", the last rung has
        `max_resources` rows, and there are as many rungs before it as "smallest" and
        the number of encoders allow. Names and numbers are those of
        :class:`~sklearn.model_selection.HalvingGridSearchCV`, whose last rung may lack
        a few rows because of rounding.

    max_resources : int or float, default=1.0
        Largest number of rows of a rung. A float is a fraction of all rows, and the
        largest share of the time of a comparison on all rows that encoding can take.
        With few rows, encoders that are nearly equal may change places.

    error_score : "raise" or float, default=nan
        Score if the head cannot be fitted or scored in a fold. A warning is issued.
        Encoders without a score are dropped first.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors. A job cross-validates the head on the vectors of one
        encoder; encoding is not parallel.

    random_state : int, RandomState instance or None, default=None
        Seeds the order in which rows are used. Pass an int for reproducible results,
        and to resume.

    verbose : int, default=0
        If greater than 0, a progress bar counts the encoders of all rungs.

    Returns
    -------
    ranking : EncoderRanking
        A named tuple of `results` and `best`, the name of the encoder with the best
        score in the last rung. `results` has a row for each encoder in each rung, by
        score, with the columns

        - "rung", from 0; "encoder"; "rows", the number of rows of the rung.
        - "score" and "sd": mean and standard deviation over folds.
        - "cells encoded": number of distinct cells that the encoder encoded for this
          rung. Cells in the store are not encoded.
        - "encode s": seconds of encoding them, without loading the model. Encoders of
          one network share its passes, and their seconds are divided evenly, so that
          the column sums to the time spent.
        - "s per 1000 rows": seconds in which the encoder would encode 1,000 rows by
          itself: the shared passes count in full. Equal cells count once. NaN if all
          cells were stored.
        - "bytes per 1000 rows": bytes of their vectors in the store.
        - "dropped at": the rung after which the encoder was dropped, NA for the
          encoders in the last rung.

    Raises
    ------
    TypeError
        If `encoders` is not a dict of encoders, or `scoring` has several scores.
    ValueError
        If there are fewer than two encoders, an encoder has no store or a column is
        unknown, `cv` lists positions, a number of rows or `factor` is out of range, a
        label is missing, or `error_score` is invalid.
        All errors are raised before a cell is encoded.

    Warns
    -----
    FitFailedWarning
        If the head or the scorer failed in a fold and `error_score` is a number.

    See Also
    --------
    sklearn.model_selection.HalvingGridSearchCV : The same scheme for parameters.
    sklembed.prefetch : Encode all cells with all encoders.

    Notes
    -----
    All vectors are in the store. An interrupted ranking with the same `random_state`
    reads them and continues, and so does the pipeline that is built on the winner.

    Encoders of one column that differ only in layers and pooling share the passes
    through their network. Dropping one of them would save no time, so they go on as
    long as one of them is among the best.

    Equal scores are ranked by the bytes of the vectors, the smallest first.

    References
    ----------
    .. [1] Jamieson, Talwalkar. Non-stochastic Best Arm Identification and
       Hyperparameter Optimization. AISTATS 2016.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> from sklembed.evaluation import rank_encoders
    >>> def count(letters):
    ...     def load():
    ...         return lambda texts: [[t.count(c) for c in letters] for t in texts]
    ...     return CallableBackend(
    ...         load, name=letters, version="1", modality="text", n_features=len(letters)
    ...     )
    >>> store = tempfile.mkdtemp() + "/embeddings.sqlite"
    >>> encoders = {
    ...     letters: FrozenEncoder(count(letters), store=store)
    ...     for letters in ["a", "ab", "xyz", "q"]
    ... }
    >>> X = ["b" * (i % 3) + "a" * (i % 5) + "c" * i for i in range(90)]
    >>> y = [i % 3 > 0 for i in range(90)]
    >>> results, best = rank_encoders(encoders, X, y, random_state=0)
    >>> best
    'ab'
    >>> results[["rung", "rows", "encoder", "cells encoded", "dropped at"]]
       rung  rows encoder  cells encoded  dropped at
    0     0    30      ab             30        <NA>
    1     0    30       a             30        <NA>
    2     0    30       q             30           0
    3     0    30     xyz             30           0
    4     1    90      ab             60        <NA>
    5     1    90       a             60        <NA>
    """
    check_one_score(scoring)
    check_error_score(error_score)
    candidates = _check_encoders(encoders, X)
    check_consistent_length(X, y, groups)
    check_no_missing_label(y)
    y = np.asarray(y)
    is_classification = type_of_target(y) in ("binary", "multiclass")
    if head is None:
        head = _closed_form(is_classification)
    else:
        is_classification = is_a_classifier(head)
    if not isinstance(cv, Integral) and not hasattr(cv, "split"):
        raise ValueError(
            f"cv must be a number of folds or a splitter, because the rows differ by "
            f"rung; got {cv!r}."
        )
    splitter = check_cv(cv, y, classifier=is_classification)
    n_smallest = 2 * splitter.get_n_splits(y, y, groups)
    if is_classification and y.ndim == 1:
        n_smallest *= len(np.unique(y))
    n_rows = _plan_rungs(
        len(y), len(candidates), factor, min_resources, max_resources, n_smallest
    )
    rng = np.random.default_rng(draw_seed(random_state))
    order = rng.permutation(len(y))
    if is_classification and y.ndim == 1:
        order = _labelling_order(y, rng)  # any first rows are stratified
    scorer = check_scoring(head, scoring)
    failures = Failures("rank_encoders", error_score)
    cross_validate = partial(
        _cross_validate, head, y, groups, splitter, scorer, error_score, n_jobs
    )
    rungs, n_best = [], len(candidates)
    with progress_bar(verbose=verbose, unit=" encoders") as progress:
        for rung, size in enumerate(n_rows):
            if rungs:
                n_best = math.ceil(n_best / factor)
                candidates = _select(candidates, rungs[-1]["encoder"][:n_best])
            rows = np.sort(order[:size])
            records = _encode(candidates, rows)
            scores = cross_validate(candidates, rows)
            for record, result in zip(records, scores, strict=True):
                scores_of_folds, failures_of_encoder = result
                failures.update(failures_of_encoder)
                record |= {"rung": rung, "score": np.mean(scores_of_folds)}
                record["sd"] = np.std(scores_of_folds)
                progress.update()
            by = ["score", "bytes per 1000 rows"]
            table = pd.DataFrame(records)
            rungs.append(table.sort_values(by, ascending=[False, True], kind="stable"))
    failures.warn()
    return _tabulate(rungs)


def _cross_validate(
    head, y, groups, splitter, scorer, error_score, n_jobs, candidates, rows
):
    """Yield the scores and failures of the head on each encoder, in equal folds."""
    if groups is not None:
        groups = take_rows(groups, rows)
    folds = list(splitter.split(rows, y[rows], groups))

    def job(candidate):
        vectors = candidate.vectors(rows)
        return delayed(_score_head)(
            candidate.name, head, vectors, y[rows], folds, scorer, error_score
        )

    # Vectors are read when a worker is free.
    return Parallel(n_jobs=n_jobs, return_as="generator")(map(job, candidates))


def _score_head(name, head, vectors, y, folds, scorer, error_score):
    """Return the scores of the head in all folds, and its failures."""
    scores, failures = [], Failures("rank_encoders", error_score)
    for number, (train, test) in enumerate(folds):
        score = error_score
        place = f"fold {number} of {len(y)} rows with encoder {name!r}"
        with failures.located(place, "Fitting or scoring"):
            fitted = clone(head).fit(take_rows(vectors, train), y[train])
            score = float(scorer(fitted, take_rows(vectors, test), y[test]))
        scores.append(score)
    return scores, failures


def _closed_form(is_classification):
    """Return the default head."""
    ridge = RidgeClassifierCV if is_classification else RidgeCV
    return make_pipeline(
        SimpleImputer(keep_empty_features=True), StandardScaler(), ridge(_ALPHAS)
    )


class _Candidate(NamedTuple):
    """An encoder and its column."""

    name: str
    encoder: FrozenEncoder
    cells: Any
    passes: Any  # key of the passes that it shares

    def vectors(self, rows):
        """Return the vectors of some rows; tokens are averaged."""
        vectors = self.encoder.transform(take_rows(self.cells, rows))
        if self.encoder.output == "pooled":
            return vectors
        return average_tokens(vectors[:, 0], self.encoder.space_["n_features"])


def _check_encoders(encoders, X):
    """Return the candidates; refuse objects of other types, and encoders without a store."""
    if not isinstance(encoders, Mapping):
        raise TypeError(
            f"encoders must be a dict of names to FrozenEncoders; got {encoders!r}."
        )
    if len(encoders) < 2:
        raise ValueError(
            f"There is nothing to rank: encoders has {len(encoders)} entries."
        )
    candidates, columns = [], {}
    for name, value in encoders.items():
        encoder, cells = value, X
        if isinstance(value, tuple):
            encoder, column = value
            table = as_table(X)
            positions, _ = column_positions(table, column, owner=f"Encoder {name!r}")
            # One object for each column, by which encoders share their passes.
            cells = columns.setdefault(tuple(positions), take_columns(table, positions))
        if not isinstance(encoder, FrozenEncoder):
            raise TypeError(
                f"Encoder {name!r} must be a FrozenEncoder or a pair of one and a "
                f"column; got {encoder!r}. Wrap functions in a CallableBackend."
            )
        if encoder.store is None:
            raise ValueError(
                f"Encoder {name!r} has store=None, so that each rung would encode its "
                "rows again. Give it a store."
            )
        encoder = clone(encoder).set_output(transform="default").fit(cells)
        passes = encoder._passes(encoder._backend_and_space()[0]) or name
        candidates.append(_Candidate(name, encoder, cells, (passes, id(cells))))
    return candidates


def _select(candidates, best):
    """Return the best candidates, and all that share the passes of one of them."""
    passes = set()
    for candidate in candidates:
        if candidate.name in set(best):
            passes.add(candidate.passes)
    return [candidate for candidate in candidates if candidate.passes in passes]


def _plan_rungs(n_samples, n_encoders, factor, min_resources, max_resources, smallest):
    """Return the number of rows of each rung."""
    if not isinstance(factor, Real) or factor <= 1:
        raise ValueError(f"factor must be a number above 1; got {factor!r}.")
    largest = max_resources
    if isinstance(max_resources, Real) and not isinstance(max_resources, Integral):
        largest = int(max_resources * n_samples)
    if not isinstance(largest, Integral) or not 0 < largest <= n_samples:
        raise ValueError(
            f"max_resources must be a number of rows from 1 to {n_samples}, or a "
            f"fraction above 0 and up to 1.0; got {max_resources!r}."
        )
    n_rungs = 1 + math.floor(math.log(n_encoders, factor) + 1e-9)
    first = min_resources
    if min_resources == "smallest":
        first = smallest
    elif min_resources == "exhaust":
        # Rather than a last rung of too few rows, there are fewer rungs.
        while n_rungs > 1 and largest / factor ** (n_rungs - 1) < smallest:
            n_rungs -= 1
        first = max(smallest, int(largest / factor ** (n_rungs - 1)))
    if not isinstance(first, Integral) or not 0 < first <= largest:
        raise ValueError(
            f"min_resources={min_resources!r} is {first!r} rows, but must be between 1 "
            f"and max_resources, {largest} rows. Raise max_resources, use fewer folds, "
            "or set it to an int."
        )
    sizes = []
    for rung in range(n_rungs):
        size = int(first * factor**rung)
        if min_resources == "exhaust":
            # From above, so that rounding leaves no row out of the last rung.
            size = int(largest / factor ** (n_rungs - 1 - rung))
        if size <= largest:
            sizes.append(size)
    return sizes


def _encode(candidates, rows):
    """Store the vectors of some rows; return a record for each encoder.

    Encoders of one network encode together.
    """
    together, records = {}, {}
    for candidate in candidates:
        cells = take_rows(candidate.cells, rows)
        together.setdefault(candidate.passes, []).append((candidate, cells))
    for group in together.values():
        jobs, lacking = [], []
        for candidate, cells in group:
            jobs.append((candidate.encoder, cells))
            if _lacks(candidate.encoder, cells):
                lacking.append(candidate.encoder)
        if lacking:
            lacking[0].warm_up()  # the time of loading does not count
        start = perf_counter()
        reports = fill_stores(jobs)
        seconds = perf_counter() - start
        n_passed = max(report["encoded"] for report in reports)
        for (candidate, _), report in zip(group, reports, strict=True):
            seconds_of_encoder, seconds_per_cell = 0.0, math.nan
            if report["encoded"]:
                seconds_of_encoder = seconds / len(lacking)
                seconds_per_cell = seconds / n_passed
            cells_of_1000_rows = 1000 * report["cells"] / len(rows)
            records[candidate.name] = {
                "encoder": candidate.name,
                "rows": len(rows),
                "cells encoded": report["encoded"],
                "encode s": seconds_of_encoder,
                "s per 1000 rows": seconds_per_cell * cells_of_1000_rows,
                "bytes per 1000 rows": cells_of_1000_rows
                * _bytes_per_cell(candidate.encoder),
            }
    return [records[candidate.name] for candidate in candidates]


def _lacks(encoder, cells):
    """Return whether the store lacks the vectors of some cells."""
    column, _, space = encoder._validate(cells)
    return encoder._required_store().lacks(space, column.distinct_keys()).any()


def _bytes_per_cell(encoder):
    """Return the mean number of bytes of a vector in the store."""
    stats = encoder._required_store().stats().loc[encoder.fingerprint()]
    return stats["bytes"] / stats["rows"]


def _tabulate(rungs):
    """Return the ranking of the records of all rungs."""
    results = pd.concat(rungs, ignore_index=True)
    last = results["rung"].max()
    rung_of_encoder = results.groupby("encoder")["rung"].transform("max")
    results["dropped at"] = rung_of_encoder.astype("Int64").where(
        rung_of_encoder < last
    )
    names = ["rung", "rows", "encoder", "score", "sd"]
    results = results[[*names, *results.columns.difference(names, sort=False)]]
    best = results.loc[results["rung"] == last, "encoder"].iloc[0]
    return EncoderRanking(results, best)
