"""leak_report: rows and columns by which a cross-validated score may be too high."""

import base64
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from time import perf_counter

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.utils import column_or_1d
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._display import progress_bar
from sklembed._table.columns import take_rows
from sklembed._validation import (
    check_no_missing_label,
    draw_seed,
    is_a_classifier,
)
from sklembed.encoders.cells import decode, shorten
from sklembed.evaluation.errors import Failures, check_error_score
from sklembed.evaluation.folds import list_folds
from sklembed.evaluation.neighbours import (
    Components,
    find_thresholds,
    join_spaces,
    make_spaces,
    nearest_across_folds,
    no_nearest,
)
from sklembed.evaluation.single_columns import score_columns
from sklembed.vectorizer.parsing import distinct

ARMS = ("all rows", "without leaked rows", "leaked rows", "suggested groups")
_N_EXAMPLES = 6  # pairs of each column that the report shows
_THUMBNAIL_SIZE = 72


def leak_report(
    estimator,
    X,
    y,
    cv=5,
    groups=None,
    *,
    vectors=None,
    threshold="auto",
    false_alarms=0.01,
    scoring=None,
    error_score=math.nan,
    n_jobs=None,
    random_state=None,
    verbose=0,
):
    r"""Search for leaks between the training and the test rows of a cross-validation.

    A test row is leaked if a training row of the same fold has nearly the same text,
    image or embedding. The report compares the score of all test rows with that of
    the rows that are not leaked, and suggests groups that keep near duplicates in one
    fold. It also lists table columns, such as identifiers and file names, that alone
    predict the target, and marks identifiers that may be groups, such as patients.

    Parameters
    ----------
    estimator : classifier or regressor
        Estimator to evaluate. Rows are compared by the vectors of each
        :class:`~sklembed.FrozenEncoder` in it, which are read from its store. If there is none,
        X is a table of embeddings, see `vectors`.

    X : DataFrame or array-like of shape (n_samples, n_features)
        The table.

    y : array-like of shape (n_samples,)
        Target.

    cv : int, cross-validation splitter or iterable, default=5
        If an int, the number of shuffled folds, stratified for classifiers; with
        `groups`, each group stays in one fold.

    groups : array-like of shape (n_samples,), default=None
        Groups that are already known. They are passed to `cv`, and the suggested groups
        keep them together.

    vectors : dict of str to array-like of shape (n_samples, n_components)
        Default None. Embeddings by which rows are compared instead of those of the encoders. NaN
        marks missing rows. If None and `estimator` has no encoder, they are the blocks
        of X: those of the parameter `blocks` of the estimator, or of column names such
        as ``text__0``, or all columns as one block. Blocks of fewer than 16 columns are
        table columns, which are not compared.

    threshold : "auto", float or dict of str to float, default="auto"
        Cosine distance below which two rows are near duplicates, for all columns or by
        name. Columns that a dict does not name have the threshold "auto", see Notes.
        Zero excludes a column. The name of all columns together is "(all)".

    false_alarms : float, default=0.01
        Expected share of rows without a duplicate that the threshold "auto" marks, where
        rows are evenly spread, see Notes.

    scoring : str, callable, list or dict, default=None
        Scores, as in :func:`~sklearn.model_selection.cross_validate`. If None, accuracy
        for classifiers and R² for regressors.

    error_score : "raise" or float, default=nan
        Score of a fold in which the estimator or a scorer fails. A warning is issued
        and the rest of the report is computed. If "raise", the error is raised.

    n_jobs : int or None, default=None
        Number of folds that are fitted in parallel, as in scikit-learn.

    random_state : int, RandomState instance or None, default=None
        Seeds the folds, if `cv` is an int, the folds of the suggested groups, and the
        permutations of the target.

    verbose : int, default=0
        If greater than 0, a progress bar counts the fits.

    Returns
    -------
    report : LeakReport
        Tables of pairs, scores, thresholds, duplicates and columns, and the suggested
        groups. :meth:`~sklembed.plots.LeakDisplay.from_report` draws it.

    Raises
    ------
    TypeError
        If the estimator cannot be fitted or predict, or a threshold is no number.
    ValueError
        If lengths differ, a label is missing, `y` has several columns, a fold is empty,
        a threshold is out of range or names an unknown column, or the input of an
        encoder cannot be determined. All are raised before anything is fitted.

    Warns
    -----
    FitFailedWarning
        If an estimator or scorer fails and `error_score` is a number.
    UserWarning
        If there are no embeddings to compare, if the training rows of a fold lack a
        class, or if the suggested groups cannot be distributed over folds.

    See Also
    --------
    sklembed.plots.LeakDisplay : Histogram of distances and scores.

    Notes
    -----
    The distance is one minus the cosine of two vectors. Vectors other than those of
    texts are whitened before, which makes copies of an image easier to tell from
    similar images [1]_: they are divided by the standard deviation along each principal
    component, after a tenth of the mean variance is added to each variance. Embeddings
    of drawings change much if an image is compressed. The cosine of two images is
    therefore the mean of two: of embeddings, and of thumbnails of 12 × 12 pixels,
    which are whitened, too. To find cropped images, the thumbnail of each image is also
    compared with that of the inner 88 % of the other, and the larger cosine counts. Rows
    without missing cells are also compared by all columns together, "(all)", where the cosine is
    the mean over columns. Neighbours are exact: matrix products are computed in blocks
    of rows, in a few dozen MiB.

    The threshold "auto" follows from the distances within classes, of which near
    duplicates are a small part. Let :math:`r_k` be the Euclidean distance of a unit
    vector to its k-th nearest neighbour of the same class; without classes, of all
    rows. In a space of intrinsic dimension D of locally constant density,
    :math:`(r_j / r_k)^D` for j < k has the beta distribution B(j, k - j), as the j-th
    smallest of k - 1 uniform variables has [2]_ [3]_. D therefore follows from the
    medians of :math:`r_5 / r_{20}` and of B(5, 15). A row without a duplicate has a
    neighbour closer than

    .. math:: t = r_{20} \, q^{1/D}, \quad q = 1 - (1 - \alpha)^{1/19},

    with probability :math:`\alpha`. The threshold is t for the median of
    :math:`r_{20}`, in up to 2,000 rows; up to four duplicates of each row do not change
    it. For "(all)", :math:`\alpha` is `false_alarms` divided by the number of columns.
    For a single column it is divided by the number of rows, too, because series and
    common words make regions dense, in which more rows are near by chance. If a tenth of
    the cells of one of several columns, or half of the rows, have five equal neighbours,
    the threshold is zero: equal cells then do not indicate a leak.

    Encoded cells are in the store of the encoders, so a report that was interrupted
    encodes no cell again.

    References
    ----------
    .. [1] Jégou, Chum. Negative Evidences and Co-occurences in Image Retrieval: The
       Benefit of PCA and Whitening. ECCV 2012.
    .. [2] Levina, Bickel. Maximum Likelihood Estimation of Intrinsic Dimension. NIPS
       2004.
    .. [3] Facco, d'Errico, Rodriguez, Laio. Estimating the intrinsic dimension of
       datasets by a minimal neighborhood information. Scientific Reports 7, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklembed.evaluation import leak_report
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 32))
    >>> y = rng.integers(2, size=200)
    >>> X[150:] = X[:50] + rng.normal(scale=0.01, size=(50, 32))
    >>> y[150:] = y[:50]
    >>> report = leak_report(LogisticRegression(), X, y, random_state=0)
    >>> report.leaked_rows_.mean().round(2)
    np.float64(0.37)
    >>> len(np.unique(report.groups_))
    150
    """
    y = _check_input(estimator, X, y, groups, false_alarms, error_score)
    classes = is_a_classifier(estimator)
    scorers = _get_scorers(scoring, classes)
    seed = draw_seed(random_state)
    folds = _draw_folds(X, y, groups, cv, classes, seed)
    spaces, table = make_spaces(estimator, X, vectors)
    spaces += join_spaces(spaces, len(y))
    thresholds = find_thresholds(spaces, y, groups, classes, threshold, false_alarms)
    components = Components(len(y))
    tables = [no_nearest()]
    for space in spaces:
        limit = thresholds.loc[space.name, "threshold"]
        tables.append(nearest_across_folds(space, folds, limit, components))
    nearest = pd.concat(tables, ignore_index=True)
    nearest["same target"] = y[nearest["row"]] == y[nearest["nearest"]]
    if groups is not None:
        components.join_equal(np.arange(len(y)), pd.factorize(np.asarray(groups))[0])
    suggested = _suggest_folds(y, components.groups(), len(folds), classes, seed)
    failures = Failures("leak_report", error_score)
    scores = _score_folds(
        estimator,
        X,
        y,
        folds,
        suggested,
        nearest,
        scorers,
        failures,
        n_jobs,
        verbose,
    )
    failures.warn()
    return LeakReport(
        nearest=nearest,
        thresholds=thresholds,
        duplicates=_count_duplicates(spaces, table, y, folds),
        scores=scores,
        score_names=list(scorers),
        columns=score_columns(table, y, folds, classes, seed),
        groups=components.groups(),
        examples=_render_examples(nearest, spaces, y),
    )


class LeakReport:
    """Result of :func:`~sklembed.evaluation.leak_report`, shown as text and in notebooks.

    Parameters
    ----------
    nearest, thresholds, duplicates, scores, score_names, columns, groups : object
        The attributes of these names.

    examples : dict
        Cells of the worst pairs, for notebooks.

    Attributes
    ----------
    scores_ : DataFrame
        A row for each arm and fold, with the columns "arm", "fold", "n_train",
        "n_test", a column for each score, and "fit s", seconds. The arms are "all
        rows", "without leaked rows" and "leaked rows", which are test rows of the same
        fits, and "suggested groups", folds that keep the suggested groups together.

    score_names_ : list of str
        Names of the scores.

    pairs_ : DataFrame
        Near duplicates across folds: the rows of `nearest_` below the threshold, the
        smallest distance first.

    nearest_ : DataFrame
        A row for each column that is compared, fold and test row, with the columns
        "column", "fold", "row", "nearest" (its nearest training row), "distance",
        "equal" (whether the cells have the same content), "leaked" (whether the
        distance is below the threshold) and "same target". Rows are positions in X.

    thresholds_ : DataFrame
        A row for each column that is compared, with "modality", "threshold",
        "typical distance" (the median distance to the 20th neighbour of the class),
        "dimension" (intrinsic dimension) and "n_rows", from which they are estimated.
        The latter three are NaN if the threshold was passed.

    duplicates_ : DataFrame
        Equal cells: a row for each column that is compared, and "(row)" for rows that
        are equal in all columns. "n_distinct" and "n_repeated" count distinct contents
        and the rows of contents that occur more than once; "share across folds" is the
        share of observed test cells that equal a training cell; "same target" is the
        share of these cells that equal one with the same target.

    columns_ : DataFrame
        A row for each column of the table, the highest gain first, with "column",
        "kind", "score" (out of fold; balanced accuracy for classifiers, R² for
        regressors), "permuted" (the largest score in five permutations of the target),
        "gain" (the share of the distance from the mean permuted score to 1 that the
        score covers), "suspicious" and "groups": whether at least 20 values repeat in
        training and test rows, each with nearly one target. The score is then that of
        the most frequent or mean target of a value. Pass such a column as `groups`, if
        it identifies a patient or the like.

    groups_ : ndarray of shape (n_samples,), dtype int
        Suggested groups: connected components of all near duplicates and of the groups
        that were passed.

    leaked_rows_ : ndarray of shape (n_samples,), dtype bool
        Whether a row is leaked in any fold.
    """

    def __init__(
        self,
        *,
        nearest,
        thresholds,
        duplicates,
        scores,
        score_names,
        columns,
        groups,
        examples,
    ):
        self.nearest_ = nearest
        self.thresholds_ = thresholds
        self.duplicates_ = duplicates
        self.scores_ = scores
        self.score_names_ = score_names
        self.columns_ = columns
        self.groups_ = groups
        leaked = nearest[nearest["leaked"]]
        self.pairs_ = leaked.sort_values("distance", kind="stable", ignore_index=True)
        self.leaked_rows_ = np.zeros(len(groups), dtype=bool)
        self.leaked_rows_[leaked["row"]] = True
        self._examples = examples

    def summary(self):
        """Return the mean and standard deviation over folds of each score.

        Returns
        -------
        summary : DataFrame
            A row for each arm, with "n_test", the number of test rows in all folds, and
            two columns for each score.
        """
        by_arm = self.scores_.groupby("arm", sort=False)
        summary = pd.DataFrame({"n_test": by_arm["n_test"].sum()})
        for name in self.score_names_:
            summary[name] = by_arm[name].mean()
            summary[f"{name} sd"] = by_arm[name].std()
        return summary

    def _sentences(self):
        """Return the results in sentences."""
        n_rows, n_groups = len(self.groups_), len(np.unique(self.groups_))
        n_leaked = int(self.leaked_rows_.sum())
        sentences = [
            f"{n_leaked} of {n_rows} rows ({n_leaked / n_rows:.1%}) have a near "
            "duplicate among the training rows of their fold."
        ]
        by_column = self.pairs_.groupby("column", sort=False)["row"].nunique()
        for column, row in self.thresholds_.iterrows():
            sentences.append(
                f"Column {column!r}: {by_column.get(column, 0)} rows at a cosine "
                f"distance below {row['threshold']:.3f}."
            )
        largest = np.bincount(self.groups_).max()
        sentences.append(
            f"{n_groups} groups are suggested; the largest has {largest} rows."
        )
        suspicious = self.columns_[self.columns_["suspicious"]]
        for _, row in suspicious.iterrows():
            sentences.append(
                f"Column {row['column']!r} ({row['kind']}) alone predicts the target: "
                f"score {row['score']:.3f}, at most {row['permuted']:.3f} on permuted "
                f"targets.{_advise_groups(row)}"
            )
        return sentences

    def __repr__(self):
        summary = self.summary().round(3).to_string()
        return "\n".join(["LeakReport", *self._sentences(), summary])

    def _repr_html_(self):
        """Return the report as HTML, with the nearest pairs of each column."""
        parts = ["<div><h4>LeakReport</h4><ul>"]
        for sentence in self._sentences():
            parts.append(f"<li>{escape(sentence)}</li>")
        parts.append("</ul>" + self.summary().round(3).to_html())
        if self._examples:
            parts.append(
                "<table><tr><th>column</th><th>distance</th><th>test row</th>"
                "<th></th><th>training row</th><th></th></tr>"
            )
        for example in self._examples:
            parts.append(example.as_html())
        if self._examples:
            parts.append("</table>")
        return "".join([*parts, "</div>"])


def _advise_groups(row):
    """Return a sentence on a column of values that may be groups, or nothing."""
    if not row["groups"]:
        return ""
    name = row["column"]
    groups = "its values" if name.isdecimal() else f"X[{name!r}]"  # of an array
    return (
        " Its values repeat in training and test rows: if they identify a patient or "
        f"the like, drop the column and pass groups={groups}."
    )


@dataclass
class _Example:
    """A pair of rows, of which the cells are HTML."""

    column: str
    distance: float
    rows: tuple
    targets: tuple
    cells: tuple

    def as_html(self):
        """Return a row of a table."""
        parts = [f"<tr><td>{escape(self.column)}</td><td>{self.distance:.3f}</td>"]
        for row, target, cell in zip(self.rows, self.targets, self.cells, strict=True):
            title = escape(f"row {row}, target {shorten(target)}")
            parts.append(f"<td>{title}</td><td>{cell}</td>")
        return "".join([*parts, "</tr>"])


def _check_input(estimator, X, y, groups, false_alarms, error_score):
    """Validate parameters before any work; return the target as an array."""
    if isinstance(estimator, type) or not hasattr(estimator, "predict"):
        raise TypeError(
            "estimator must be a classifier or a regressor, or a pipeline that ends in "
            f"one; got {estimator!r}."
        )
    check_consistent_length(X, y, groups)
    check_no_missing_label(y)
    if np.ndim(y) == 2 and np.shape(y)[1] > 1:
        raise ValueError(
            f"y must have one target for each row; got shape {np.shape(y)}. Report on "
            "each column of y in turn."
        )
    if groups is not None and pd.isna(np.asarray(groups)).any():
        rows = np.flatnonzero(pd.isna(np.asarray(groups)))
        raise ValueError(
            f"groups has no value in {len(rows)} rows, first in row {rows[0]}. Give "
            "each row without a known group its own."
        )
    if not isinstance(false_alarms, Real) or not 0 < false_alarms < 1:
        raise ValueError(
            f"false_alarms must be a number between 0 and 1; got {false_alarms!r}."
        )
    check_error_score(error_score)
    return column_or_1d(y, warn=True)


def _get_scorers(scoring, classes):
    """Return a dict of scorers by name."""
    if scoring is None:
        scoring = "accuracy" if classes else "r2"
    if isinstance(scoring, str):
        scoring = [scoring]
    if callable(scoring):
        scoring = {getattr(scoring, "__name__", "score"): scoring}
    if not isinstance(scoring, Mapping):
        scoring = dict(zip(scoring, scoring, strict=True))
    scorers = {}
    for name, scorer in scoring.items():
        scorers[name] = scorer
        if isinstance(scorer, str):
            scorers[name] = get_scorer(scorer)
    return scorers


def _draw_folds(X, y, groups, cv, classes, seed):
    """Return the folds as lists of training and test rows; warn of missing classes."""
    splitter = cv
    if isinstance(cv, Integral):
        splitter = _shuffled_folds(cv, classes, groups is not None, seed)
    splitter = check_cv(splitter, y, classifier=classes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        listed = list_folds(splitter, X, y, groups)
    folds = []
    for number, train, test in listed:
        folds.append((train, test))
        if not classes:
            continue
        absent = np.setdiff1d(y[test], y[train])
        if len(absent):
            warnings.warn(
                f"The training rows of fold {number} lack the classes "
                f"{absent.tolist()}, so all test rows of these classes count as "
                "errors. Use stratified folds, or fewer folds.",
                UserWarning,
                stacklevel=3,
            )
    return folds


def _shuffled_folds(n_splits, classes, with_groups, seed):
    """Return a splitter of shuffled folds, stratified for classes."""
    if with_groups:
        kind = StratifiedGroupKFold if classes else GroupKFold
    else:
        kind = StratifiedKFold if classes else KFold
    return kind(n_splits, shuffle=True, random_state=seed)


def _count_duplicates(spaces, table, y, folds):
    """Return a table of equal cells in each space, and of equal rows."""
    codes_of = {}
    for space in spaces:
        codes = np.full(len(y), -1, dtype=np.intp)
        codes[space.rows] = space.codes
        codes_of[space.name] = codes
    row_codes = np.zeros(len(y), dtype=np.intp)
    columns = list(codes_of.values())
    for position, name in enumerate(table.columns):
        if str(name) not in codes_of:
            columns.append(distinct(table.iloc[:, position])[0])
    for codes in columns:
        pairs = row_codes * (codes.max() + 2) + codes + 1
        row_codes = pd.factorize(pairs)[0]
    records = []
    for name, codes in [*codes_of.items(), ("(row)", row_codes)]:
        records.append({"column": name} | _count_equal(codes, y, folds))
    return pd.DataFrame(records).set_index("column")


def _count_equal(codes, y, folds):
    """Count equal cells, and test cells that equal a training cell."""
    counts = np.bincount(codes[codes >= 0], minlength=1)
    target = pd.factorize(y)[0]
    keys = codes * (target.max() + 1) + target
    n_observed = n_equal = n_same = 0
    for train, test in folds:
        observed = test[codes[test] >= 0]
        equal = np.isin(codes[observed], codes[train])
        n_observed += len(observed)
        n_equal += np.count_nonzero(equal)
        n_same += np.count_nonzero(np.isin(keys[observed[equal]], keys[train]))
    return {
        "n_distinct": np.count_nonzero(counts),
        "n_repeated": counts[counts > 1].sum(),
        "share across folds": n_equal / n_observed if n_observed else math.nan,
        "same target": n_same / n_equal if n_equal else math.nan,
    }


def _suggest_folds(y, groups, n_folds, classes, seed):
    """Return folds that keep the suggested groups together; none if impossible."""
    n_groups = len(np.unique(groups))
    n_folds = min(max(n_folds, 2), n_groups)
    if n_folds < 2:
        warnings.warn(
            "All rows are in one suggested group, so there is no score of suggested "
            "groups. Pass a smaller threshold or fewer false_alarms.",
            UserWarning,
            stacklevel=3,
        )
        return []
    splitter = _shuffled_folds(n_folds, classes, True, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        folds = list(splitter.split(y, y, groups))
    return [(train, test) for train, test in folds if len(train) and len(test)]


def _score_folds(
    estimator, X, y, folds, suggested, nearest, scorers, failures, n_jobs, verbose
):
    """Fit and score the estimator in each fold; return a row for each arm and fold."""
    leaked = nearest[nearest["leaked"]]
    jobs = []
    for number, (train, test) in enumerate(folds):
        is_leaked = np.isin(test, leaked.loc[leaked["fold"] == number, "row"])
        parts = test, test[~is_leaked], test[is_leaked]
        jobs.append((number, train, dict(zip(ARMS, parts, strict=False))))
    for number, (train, test) in enumerate(suggested):
        jobs.append((number, train, {ARMS[-1]: test}))
    results = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_score_fold)(estimator, X, y, *job, scorers, failures.error_score)
        for job in jobs
    )
    records = []
    progress = progress_bar(results, verbose=verbose, unit=" fits", total=len(jobs))
    for rows, failures_of_fold in progress:
        records.extend(rows)
        failures.update(failures_of_fold)
    scores = pd.DataFrame(records)
    order = scores["arm"].map(ARMS.index)
    return scores.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def _score_fold(estimator, X, y, number, train, parts, scorers, error_score):
    """Fit the estimator once, and score each part of the test rows.

    Returns
    -------
    records : list of dict
        A row of the scores for each part.
    failures : Failures
        Of the estimator and of scorers.
    """
    failures = Failures("leak_report", error_score)
    start, fitted = perf_counter(), None
    with failures.located(f"fold {number} ({next(iter(parts))})"):
        fitted = clone(estimator).fit(take_rows(X, train), y[train])
    seconds = perf_counter() - start
    records = []
    for arm, rows in parts.items():
        record = {"arm": arm, "fold": number, "n_train": len(train)}
        record |= {"n_test": len(rows)} | dict.fromkeys(scorers, math.nan)
        records.append(record)
        if fitted is None:
            record |= dict.fromkeys(scorers, error_score)
        elif len(rows):
            X_part, y_part = take_rows(X, rows), y[rows]
            for name, scorer in scorers.items():
                record[name] = error_score
                action = f"The scorer {name!r}"
                with failures.located(f"fold {number} ({arm})", action):
                    record[name] = float(scorer(fitted, X_part, y_part))
        record["fit s"] = seconds
    return records, failures


def _render_examples(nearest, spaces, y):
    """Return the nearest leaked pairs of each space, with their cells as HTML."""
    examples = []
    for space in spaces:
        pairs = nearest[(nearest["column"] == space.name) & nearest["leaked"]]
        pairs = pairs.sort_values("distance", kind="stable")
        rendered = set()
        for _, pair in pairs.iterrows():
            rows = pair["row"], pair["nearest"]
            if len(rendered) == _N_EXAMPLES:
                break
            if frozenset(rows) in rendered:
                continue
            rendered.add(frozenset(rows))
            cells = tuple(_render_row(spaces, row, len(y)) for row in rows)
            targets = y[rows[0]], y[rows[1]]
            examples.append(
                _Example(space.name, pair["distance"], rows, targets, cells)
            )
    return examples


def _render_row(spaces, row, n_rows):
    """Return the texts and images of a row as HTML."""
    parts = []
    for space in spaces:
        position = space.positions(n_rows)[row]
        if space.cells is not None and position >= 0:
            parts.append(_render_cell(space, position))
    return " ".join(parts)


def _render_cell(space, position):
    """Return a cell as HTML: a small image, or the start of a text."""
    cell = space.cells[position]
    if space.modality == "text":
        return escape(shorten(cell))
    thumbnail = decode(cell, "image").copy()
    thumbnail.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/jpeg;base64,{content}">'
