"""Compare ways to adapt frozen embeddings to a task: score, significance and cost."""

import gc
import math
import warnings
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sklearn
from scipy.stats import t as student
from sklearn.base import clone
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    check_consistent_length,
    column_or_1d,
    has_fit_parameter,
)

import sklembed
from sklembed._display import as_html, as_text, progress_bar
from sklembed._table.columns import take_rows
from sklembed._validation import (
    check_no_missing_label,
    draw_seed,
    is_a_classifier,
)
from sklembed.encoders import prefetch
from sklembed.evaluation.arms import Arm, Table, count_parameters, make_arms, read_table
from sklembed.evaluation.efficiency import warm_up_torch
from sklembed.evaluation.errors import Failures, check_error_score, check_one_score
from sklembed.evaluation.folds import Fold, list_folds
from sklembed.evaluation.memory import PeakMemory
from sklembed.evaluation.records import RecordFile, hash_settings

ITSELF = "itself"  # the estimator of an adaptation that predicts
_TIMED_ROWS = 64  # encoded again, to time an encoder whose vectors are stored
_SECONDS = ["encode s", "fit s", "predict s"]
_SIZES = ["peak MiB", "parameters"]
_COSTS = [*_SECONDS, *_SIZES]


class AdaptationComparison(NamedTuple):
    """Result of :func:`~sklembed.evaluation.compare_adaptations`, a named tuple.

    Parameters
    ----------
    folds : DataFrame
        Score and costs of each adaptation and estimator in each fold.

    summary : DataFrame
        Means over folds, and paired differences to the reference.
    """

    folds: pd.DataFrame
    summary: pd.DataFrame

    def __repr__(self):
        return as_text("AdaptationComparison", [], {"": self.summary})

    def _repr_html_(self):
        return as_html("AdaptationComparison", [], {"": self.summary})


def compare_adaptations(
    X,
    y,
    *,
    features=None,
    blocks=None,
    adaptations=None,
    estimators=None,
    column=None,
    cv=5,
    groups=None,
    scoring=None,
    path=None,
    error_score=math.nan,
    n_jobs=None,
    random_state=None,
    verbose=0,
):
    """Compare ways to adapt frozen embeddings to a task, with their costs.

    Is a projection worth its training, or an ensemble, or fine-tuning? Each adaptation is
    fitted in each fold, and each downstream estimator is fitted on its output. All
    adaptations have the same folds, so their scores are compared by paired differences
    to the first adaptation, with the corrected resampled t-test [1]_.

    The adaptations by name are

    - "none": the vectors of all modalities, side by side.
    - "pca": at most 128 principal components of each modality.
    - "one projection": a :class:`~sklembed.ContrastiveProjector` of all modalities together.
    - "per modality": a :class:`~sklembed.ContrastiveProjector` of each modality.
    - "ensemble": :class:`~sklembed.EmbeddingClassifier` or :class:`~sklembed.EmbeddingRegressor`.
    - "head", "bitfit", "lora" and "full": the methods of :class:`~sklembed.FinetunedClassifier` or
      :class:`~sklembed.FinetunedRegressor`, for one column of cells. They take minutes to hours,
      so they run only if they are named.

    The ensemble and fine-tuned networks predict without a downstream estimator.

    Parameters
    ----------
    X : DataFrame or array-like of shape (n_samples, n_features)
        The table: embeddings side by side, or the cells that `features` reads.

    y : array-like of shape (n_samples,)
        Classes or numbers.

    features : PerModalityUnion, MultimodalVectorizer, FrozenEncoder or None, default=None
        Makes vectors of cells. It is fitted in each fold; its frozen encoders need a
        store and encode each cell once. A FrozenEncoder is for a table of one column.
        None if `X` has embeddings.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality in a table of embeddings. If None, the prefixes of
        column names such as ``text__0``; an array without names is one modality.

    adaptations : sequence of str, or dict of str to str or estimator, default=None
        The adaptations. The first is the reference. A dict gives them names, and may
        have other values: a transformer, which is fitted on the vectors of each modality;
        a classifier or regressor with a parameter `blocks`; or a FinetunedClassifier or
        FinetunedRegressor with its own settings. None means all names that need no
        fine-tuning; "per modality" if there are several modalities.

    estimators : dict of str to classifier or regressor, or None, default=None
        The downstream estimators. With the first one, the reference is compared with
        adaptations that predict themselves. None means logistic or ridge regression, ten
        nearest neighbours and a random forest.

    column : str or int, default=None
        The column of cells for fine-tuning. If None, the only one that `features` encodes.

    cv : int, cross-validation splitter or iterable, default=5
        The folds, as in :func:`~sklearn.model_selection.cross_validate`.

    groups : array-like of shape (n_samples,), default=None
        Group of each row, for the folds. The ensemble and fine-tuned networks also keep
        groups together in their inner folds.

    scoring : str, callable or None, default=None
        Scorer of scikit-learn. None is accuracy for classes and R² for numbers.

    path : str, Path or None, default=None
        A file to which each result is written when it is there. Another call with this
        file continues: it reads the results for the same rows, targets, folds, estimators
        and settings, and computes the others. Failures are tried again. None means that
        an interrupted comparison starts from the beginning.

    error_score : "raise" or float, default=nan
        Score if an adaptation or estimator fails in a fold, for example for lack of
        memory. The error is recorded, and a warning is issued. If "raise", the error is
        raised.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1 means
        all processors. A job is an adaptation in a fold. If the system ends a process for
        lack of memory, its job counts as failed, unless the process is this one.

    random_state : int, RandomState instance or None, default=None
        Seeds adaptations and estimators that are chosen by name or by default. Pass an
        int for reproducible results. Estimators that you pass have their own seeds.

    verbose : int, default=0
        If greater than 0, a progress bar counts adaptations in folds.

    Returns
    -------
    comparison : AdaptationComparison
        A named tuple of DataFrames. `folds` has a row for each adaptation, estimator and
        fold, with the columns

        - "adaptation", "estimator" and "fold"; the estimator is "itself" for adaptations
          that predict.
        - "score": on the test rows.
        - "encode s": seconds in which frozen encoders encode the distinct cells of the
          training rows, as measured on up to 64 rows. 0 for a table of embeddings.
        - "fit s": seconds to fit `features` on stored vectors, the adaptation and the
          estimator.
        - "predict s": seconds from the cells of the test rows to their score, with
          encoding.
        - "peak MiB": peak of the memory during fit and prediction above the memory
          before, without that of an accelerator. NaN on other systems than Linux. Jobs
          in threads count the memory of all.
        - "parameters": number of trained parameters of adaptation and estimator. NaN if
          it is unknown, or the model consists of training rows or trees.
        - "error": the error, or an empty string.

        `summary` has a row for each adaptation and estimator: "score" and "sd", mean and
        standard deviation over folds; "gain" and "gain sd", of the difference to the
        reference; "p" of its t-test, two-sided and for this comparison alone; the means
        of the seconds; the maxima of "peak MiB" and "parameters"; "failed", the number
        of folds without a score; and "reference", the row that it is compared with.

    Raises
    ------
    TypeError
        If `features`, an adaptation or an estimator has the wrong type, or `scoring` has
        several scores.
    ValueError
        If a name is unknown, `X` has no embeddings, a target is missing or does not suit
        the estimators, there are no folds, a fold has no test rows or training rows of
        one class, an estimator has no method that `scoring` needs, `column` is unclear,
        or `error_score` is neither "raise" nor a number.
    ImportError
        If "lora" is compared and peft is not installed.
        All these errors are raised before anything is encoded or fitted.

    Warns
    -----
    FitFailedWarning
        If an adaptation or estimator failed and `error_score` is a number.

    See Also
    --------
    sklembed.plots.AdaptationDisplay : Draw the comparison.
    few_label_curve : The same question with few labels.

    Notes
    -----
    All adaptations are scaled alike. The vectors of each modality, or the output of
    its transformer, are centred and divided by one number, so that rows have a mean
    squared norm of 1. Missing vectors are imputed by the mean. Blocks of table columns,
    as :class:`~sklembed.EmbeddingClassifier` finds them, are standardised instead, and are only
    projected by "one projection". The ensemble has its own scaling.

    "head" is a logistic or ridge regression on one column. Compare the other methods of
    fine-tuning with it: ``adaptations=["head", "lora", "full"]``.

    The variance of the t-test is multiplied by 1 + k n_test / n_train, because the
    training rows of k folds overlap.

    References
    ----------
    .. [1] Nadeau, Bengio. Inference for the Generalization Error. Machine Learning 52,
       2003.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklembed.evaluation import compare_adaptations
    >>> X, y = load_digits(n_class=4, return_X_y=True)
    >>> folds, summary = compare_adaptations(
    ...     X[:300],
    ...     y[:300],
    ...     blocks={"top": slice(0, 32), "bottom": slice(32, 64)},
    ...     adaptations=["none", "pca", "ensemble"],
    ...     estimators={"neighbours": KNeighborsClassifier()},
    ...     cv=3,
    ...     random_state=0,
    ... )
    >>> summary[["adaptation", "estimator", "score"]].round(1)
      adaptation   estimator  score
    0       none  neighbours    0.9
    1        pca  neighbours    0.9
    2   ensemble      itself    1.0
    """
    check_one_score(scoring)
    check_error_score(error_score)
    table = read_table(X, features, blocks)
    check_consistent_length(table.X, y, groups)
    check_no_missing_label(y)
    if random_state is not None:
        random_state = draw_seed(random_state)
    estimators = _check_estimators(estimators, y, random_state)
    y = column_or_1d(y, warn=True)
    is_classification = is_a_classifier(next(iter(estimators.values())))
    arms = make_arms(adaptations, table, column, is_classification, random_state)
    scorer = _check_scoring(scoring, estimators, arms, y, is_classification)
    splitter = check_cv(cv, y, classifier=is_classification)
    folds = list_folds(splitter, table.X, y, groups)
    if is_classification:
        _check_classes(folds, y)
    if groups is not None:
        groups = np.asarray(groups)
    problem = _Problem(table, y, groups, scorer, error_score)
    file = RecordFile(path)
    jobs = _plan(problem, arms, estimators, folds, scoring, file.read())
    waiting = _encode_cells(table, _list_waiting(jobs))
    progress = progress_bar(verbose=verbose, total=len(jobs), unit=" fits")
    with progress:
        progress.update(len(jobs) - len(waiting))
        for number, records in _run_all(problem, waiting, n_jobs):
            job = waiting[number]
            for record in records:
                job.records[record["estimator"]] = record
                if not record["error"]:
                    file.append(job.keys[record["estimator"]], record)
            progress.update()
    _list_failures(jobs, error_score).warn()
    return _tabulate(jobs, arms, estimators)


# The downstream estimators and their score


def _check_estimators(estimators, y, random_state):
    """Return the downstream estimators, which suit the target."""
    kind = type_of_target(y, input_name="y")
    if kind not in ("binary", "multiclass", "continuous"):
        raise ValueError(f"y must be classes or numbers; its type is {kind!r}.")
    if estimators is None:
        return _default_estimators(kind, random_state)
    if not isinstance(estimators, Mapping) or not estimators:
        raise TypeError(
            f"estimators must be a dict of names to estimators; got {estimators!r}."
        )
    first = is_a_classifier(next(iter(estimators.values())))
    for name, estimator in estimators.items():
        if isinstance(estimator, type) or not hasattr(estimator, "predict"):
            raise TypeError(
                f"The estimator {name!r} must be a classifier or regressor; got "
                f"{estimator!r}."
            )
        if is_a_classifier(estimator) != first:
            raise TypeError(
                "estimators must be classifiers or regressors, not both; got "
                f"{estimators}."
            )
    if ITSELF in estimators:
        raise ValueError(f"The name {ITSELF!r} is reserved. Rename the estimator.")
    if first and kind == "continuous":
        raise ValueError(
            "estimators are classifiers, but y has numbers with a fraction. Pass "
            "regressors, or classes."
        )
    return dict(estimators)


def _default_estimators(kind, random_state):
    if kind == "continuous":
        forest = RandomForestRegressor(max_features="sqrt", random_state=random_state)
        return {
            "ridge regression": RidgeCV(np.logspace(-3, 3, 13)),
            "nearest neighbours": KNeighborsRegressor(10),
            "random forest": forest,
        }
    return {
        "logistic regression": LogisticRegression(C=10, max_iter=1000),
        "nearest neighbours": KNeighborsClassifier(10),
        "random forest": RandomForestClassifier(random_state=random_state),
    }


def _check_scoring(scoring, estimators, arms, y, is_classification):
    """Return the scorer; refuse estimators without the methods that it needs."""
    first = next(iter(estimators.values()))
    if scoring is None:
        scoring = "accuracy" if is_classification else "r2"
    scorer = check_scoring(first, scoring)
    if not isinstance(scoring, str):
        return scorer
    predictors = dict(estimators)
    for arm in arms:
        if arm.predicts:
            predictors[arm.name] = arm.estimator
    X = np.zeros((len(y), 1))
    for name, estimator in predictors.items():
        probe = DummyRegressor()
        if is_classification:
            probe = _Probe(estimator)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constant predictions
                scorer(probe.fit(X, y), X, y)
        except AttributeError as error:
            raise ValueError(
                f"scoring={scoring!r} needs probabilities or decision values, but "
                f"{name!r}, {estimator!r}, has no such method. Calibrate it by "
                "CalibratedClassifierCV, leave it out, or choose another score."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"scoring={scoring!r} cannot be computed for this target: {error}"
            ) from error
    return scorer


class _Probe(DummyClassifier):
    """Predicts the frequencies of classes, by the methods that another classifier has."""

    def __init__(self, like):
        super().__init__(strategy="prior")
        self.like = like

    @available_if(lambda self: hasattr(self.like, "predict_proba"))
    def predict_proba(self, X):
        return super().predict_proba(X)

    @available_if(lambda self: hasattr(self.like, "decision_function"))
    def decision_function(self, X):
        probabilities = super().predict_proba(X)
        return probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities


# The jobs


class _Problem(NamedTuple):
    """The rows that all jobs share, and their score."""

    table: Table
    y: np.ndarray
    groups: np.ndarray | None
    scorer: Any
    error_score: Any


class _Job(NamedTuple):
    """An adaptation in a fold, with the estimators that are fitted on its output."""

    arm: Arm
    fold: Fold
    estimators: dict
    keys: dict  # of estimators
    records: dict  # of estimators, filled when they are finished
    seconds: tuple = (0.0, 0.0)  # of encoding training and test rows

    @property
    def place(self):
        return f"fold {self.fold.number} of compare_adaptations"


def _check_classes(folds, y):
    """Refuse folds whose training rows are all of one class."""
    for number, train, _ in folds:
        classes = np.unique(y[train])
        if len(classes) < 2:
            raise ValueError(
                f"The {len(train)} training rows of fold {number} are all of the class "
                f"{classes.tolist()}; at least two classes are needed. Use other folds."
            )


def _plan(problem, arms, estimators, folds, scoring, finished):
    """Return all jobs, with the records of an earlier call that are the same."""
    table = problem.table
    shared = hash_settings(
        sklembed.__version__,
        sklearn.__version__,
        table.key(),
        table.features,
        table.blocks,
        problem.y,
        problem.groups,
        scoring,
    )
    jobs = []
    for fold in folds:
        for arm in arms:
            job = _Job(arm, fold, estimators, {}, {})
            if arm.predicts:
                job = job._replace(estimators={ITSELF: arm.estimator})
            column = None if arm.encoded is None else arm.encoded.name
            settings = [
                shared,
                fold.train,
                fold.test,
                arm.estimator,
                arm.is_joint,
                column,
            ]
            for name, estimator in job.estimators.items():
                key = hash_settings(*settings, estimator)
                job.keys[name] = key
                if key in finished:
                    place = _place_of_record(job, name)
                    job.records[name] = finished[key] | place
            jobs.append(job)
    return jobs


def _place_of_record(job, name):
    return {"adaptation": job.arm.name, "estimator": name, "fold": job.fold.number}


def _list_waiting(jobs):
    """Return the jobs that are not finished, with the estimators that are not."""
    waiting = []
    for job in jobs:
        missing = {}
        for name, estimator in job.estimators.items():
            if name not in job.records:
                missing[name] = estimator
        if missing:
            waiting.append(job._replace(estimators=missing))
    return waiting


def _encode_cells(table, waiting):
    """Encode all cells once; return the jobs with the seconds of encoding their rows."""
    prefetched, seconds, jobs = set(), {}, []
    if table.encoded and any(job.arm.encoded is None for job in waiting):
        if all(column.encoder._keeps_vectors() for column in table.encoded):
            prefetch(table.features, table.X)  # encoders of one network share passes
            prefetched.update(map(_key_of_column, table.encoded))
    for job in waiting:
        encoded = table.encoded
        if job.arm.encoded is not None:
            encoded = [job.arm.encoded]
        train_seconds = test_seconds = 0.0
        for column in encoded:
            key = _key_of_column(column)
            if key not in seconds:
                if key not in prefetched and column.encoder._keeps_vectors():
                    prefetch(column.encoder, column.cells)
                seconds[key] = _time_a_cell(column)
            train_seconds += seconds[key] * column.n_distinct(job.fold.train)
            test_seconds += seconds[key] * column.n_distinct(job.fold.test)
        jobs.append(job._replace(seconds=(train_seconds, test_seconds)))
    return jobs


def _key_of_column(column):
    return column.encoder.fingerprint(), column.name


def _time_a_cell(column):
    """Return the seconds in which an encoder encodes a cell, NaN without its weights."""
    rows = np.random.default_rng(0).permutation(len(column.digests))[:_TIMED_ROWS]
    n_cells = column.n_distinct(rows)
    if n_cells == 0:
        return 0.0
    encoder = clone(column.encoder).set_params(store=None)
    cells = take_rows(column.cells, np.sort(rows))
    try:
        encoder.fit(cells).warm_up()
        start = perf_counter()
        encoder.transform(cells)
    except OSError:  # the vectors are stored, but the checkpoint cannot be read
        return math.nan
    return (perf_counter() - start) / n_cells


@cache
def _warm_up():
    """Load torch in this process, so that it counts for no adaptation."""
    warm_up_torch("cpu")


def _run_all(problem, jobs, n_jobs):
    """Yield the number and the records of each job when it is finished.

    If a process is killed, the jobs that are not finished run again, each in a new
    process.
    """
    unfinished = dict(enumerate(jobs))
    parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    try:
        results = parallel(delayed(_run)(problem, n, job) for n, job in enumerate(jobs))
        for number, records in results:
            del unfinished[number]
            yield number, records
    except BrokenProcessPool:
        for number, job in unfinished.items():
            try:
                # Two workers, since one would be this process.
                yield from Parallel(n_jobs=2)([delayed(_run)(problem, number, job)])
            except BrokenProcessPool as error:
                if problem.error_score == "raise":
                    error.add_note(f"This was {job.arm.name!r} in {job.place}.")
                    raise
                yield number, _fail(problem, job, error)


def _run(problem, number, job):
    """Fit and score an adaptation and its estimators; return the number and records."""
    _warm_up()
    shared = {"fit s": 0.0, "predict s": 0.0, "parameters": 0}
    records = []
    gc.collect()  # of earlier jobs, so that their memory is free
    try:
        with PeakMemory() as memory:
            prepared = job.arm.prepare(problem.table, problem.y, job.fold, shared)
    except Exception as error:
        return number, _fail(problem, job, error)
    for name, estimator in job.estimators.items():
        record = _place_of_record(job, name) | {"score": math.nan} | shared
        record["encode s"], record["error"] = job.seconds[0], ""
        try:
            with PeakMemory() as memory_of_estimator:
                _fit_and_score(problem, job, estimator, prepared, record)
        except Exception as error:
            records += _fail(problem, job._replace(estimators={name: estimator}), error)
            continue
        record["peak MiB"] = max(memory.mib, memory_of_estimator.mib)
        records.append(record)
    return number, records


def _fit_and_score(problem, job, estimator, prepared, record):
    """Fit an estimator on adapted rows; add its costs and its score to the record."""
    train, test, params = prepared
    fold, estimator = job.fold, clone(estimator).set_params(**params)
    fit_params = {}
    if problem.groups is not None and job.arm.predicts:
        if has_fit_parameter(estimator, "groups"):
            fit_params["groups"] = problem.groups[fold.train]
    start = perf_counter()
    estimator.fit(train, problem.y[fold.train], **fit_params)
    fitted = perf_counter()
    record["score"] = float(problem.scorer(estimator, test, problem.y[fold.test]))
    record["fit s"] += fitted - start
    record["predict s"] += perf_counter() - fitted
    if getattr(estimator, "best_step_", 0) == 0:
        record["predict s"] += job.seconds[1]  # else the trained network encodes
    record["parameters"] += count_parameters(estimator)


def _fail(problem, job, error):
    """Return the records of estimators that failed, or raise the error."""
    if problem.error_score == "raise":
        error.add_note(f"This was {job.arm.name!r} in {job.place}.")
        raise error
    records = []
    for name in job.estimators:
        record = _place_of_record(job, name) | {"score": problem.error_score}
        record |= dict.fromkeys(_COSTS, math.nan)
        records.append(record | {"error": f"{type(error).__name__}: {error}"})
    return records


def _list_failures(jobs, error_score):
    """Return the failures in the records, in the order of the jobs."""
    failures = Failures("compare_adaptations", error_score)
    for job in jobs:
        for name, record in job.records.items():
            if record["error"]:
                place = f"fold {job.fold.number} ({job.arm.name!r} with {name!r})"
                failures.add(place, record["error"], "Fitting or scoring")
    return failures


# The tables


def _tabulate(jobs, arms, estimators):
    """Return the comparison of the records of all jobs."""
    rows = []
    for job in jobs:
        sizes = {"ratio": len(job.fold.test) / len(job.fold.train)}
        for name in job.keys:
            rows.append(job.records[name] | sizes)
    adaptations, names = [arm.name for arm in arms], [*estimators, ITSELF]

    def position(row):
        place = adaptations.index(row["adaptation"]), names.index(row["estimator"])
        return *place, row["fold"]

    folds = pd.DataFrame(sorted(rows, key=position))
    cells = dict(list(folds.groupby(["adaptation", "estimator"], sort=False)))
    summary = []
    for (adaptation, estimator), cell in cells.items():
        reference = arms[0].name, estimator
        if arms[0].predicts:
            reference = arms[0].name, ITSELF
        elif estimator == ITSELF:
            reference = arms[0].name, next(iter(estimators))
        record = {"adaptation": adaptation, "estimator": estimator}
        record |= {"score": cell["score"].mean(), "sd": cell["score"].std()}
        gains = cell["score"].to_numpy() - cells[reference]["score"].to_numpy()
        record |= corrected_t_test(gains, cell["ratio"].mean())
        record |= cell[_SECONDS].mean().to_dict() | cell[_SIZES].max().to_dict()
        # A scorer returns NaN if the test rows lack a class that it needs.
        without = cell["error"].ne("") | cell["score"].isna()
        record["failed"] = int(without.sum())
        summary.append(record | {"reference": ", ".join(reference)})
    columns = ["adaptation", "estimator", "fold", "score", *_COSTS, "error"]
    return AdaptationComparison(folds[columns], pd.DataFrame(summary))


def corrected_t_test(gains, ratio):
    """Test whether the mean of paired differences over folds is zero.

    Parameters
    ----------
    gains : ndarray of shape (n_folds,)
        The differences. NaN, of failed folds, are left out.
    ratio : float
        Number of test rows by training rows. The variance of the mean of n differences
        is 1/n + ratio times theirs, since training rows overlap: Nadeau and Bengio,
        equation 9.

    Returns
    -------
    result : dict of str to float
        "gain" and "gain sd", mean and standard deviation; "p", two-sided. "p" is NaN if
        fewer than two differences are left, or all are zero.
    """
    gains = gains[~np.isnan(gains)]
    result = dict.fromkeys(["gain", "gain sd", "p"], math.nan)
    if len(gains):
        result["gain"] = gains.mean()
    if len(gains) > 1:
        result["gain sd"] = gains.std(ddof=1)
        error = result["gain sd"] * math.sqrt(1 / len(gains) + ratio)
        if error > 0:
            result["p"] = 2 * student.sf(abs(result["gain"]) / error, len(gains) - 1)
        elif result["gain"] != 0:
            result["p"] = 0.0
    return result
