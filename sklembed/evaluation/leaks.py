"""leak_report: rows and columns by which a cross-validated score may be too high."""

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from time import perf_counter

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import beta
from sklearn.base import clone
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, get_scorer, r2_score
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.naive_bayes import MultinomialNB
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import column_or_1d, gen_batches
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._table.blocks import resolve_blocks
from sklembed._table.columns import as_pandas, is_frame, take_rows
from sklembed._validation import (
    check_no_missing_label,
    draw_seed,
    is_a_classifier,
    sorted_labels,
)
from sklembed.encoders import FrozenEncoder
from sklembed.encoders.cells import decode, shorten
from sklembed.encoders.prefetch import list_jobs
from sklembed.evaluation.errors import located
from sklembed.vectorizer.kinds import read_column
from sklembed.vectorizer.parsing import distinct, parse_column

ARMS = ("all rows", "without leaked rows", "leaked rows", "suggested groups")
ALL = "(all)"  # the name of the space of all columns together
_SHRINKAGE = 0.1  # of variances, before whitening
_BLOCK_CELLS = 2**22  # similarities in memory at once: 16 MiB
_N_QUERIES = 2000  # rows whose neighbours determine a threshold
_NEAR, _FAR = 5, 20  # ranks of these neighbours
_LEAST_QUERIES = 30
_LEAST_WIDTH = 16  # columns of a block of embeddings; narrower ones are table columns
_N_EXAMPLES = 6  # pairs of each column that the report shows
_THUMBNAIL_SIZE = 72
_N_ROWS_OF_COLUMN = 5000  # on which a single column is tested
_N_CHARACTERS = 200  # of a text
_N_PERMUTATIONS = 5
_LEAST_GAINS = {True: 0.1, False: 0.9}  # of identifiers, and of other columns
_FILE_NAME = re.compile(r"[^/\\]*\.[A-Za-z][A-Za-z0-9]{1,4}$")
_IDENTIFIERS = ("identifier", "file name", "datetime")


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
):
    r"""Search for leaks between the training and the test rows of a cross-validation.

    A test row is leaked if a training row of the same fold has nearly the same text,
    image or embedding. The report compares the score of all test rows with that of
    the rows that are not leaked, and suggests groups that keep near duplicates in one
    fold. It also lists table columns, such as identifiers and file names, that alone
    predict the target.

    Parameters
    ----------
    estimator : classifier or regressor
        Estimator to evaluate. Rows are compared by the vectors of each
        :class:`FrozenEncoder` in it, which are read from its store. If there is none,
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

    Returns
    -------
    report : LeakReport
        Tables of pairs, scores, thresholds, duplicates and columns, and the suggested
        groups. :meth:`plots.LeakDisplay.from_report` draws it.

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
    plots.LeakDisplay : Histogram of distances and scores.

    Notes
    -----
    The distance is one minus the cosine of two vectors. Vectors other than those of
    texts are whitened before, which makes copies of an image easier to tell from
    similar images [1]_: they are divided by the standard deviation along each principal
    component, after a tenth of the mean variance is added to each variance. Rows without
    missing cells are also compared by all columns together, "(all)", where the cosine is
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
    common words make regions dense, in which more rows are near by chance. If most
    cells of a column are repeated, its threshold is zero: equal cells then do not
    indicate a leak.

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
    spaces, table = _make_spaces(estimator, X, vectors)
    spaces += _join_spaces(spaces, len(y))
    thresholds = _thresholds(spaces, y, groups, classes, threshold, false_alarms)
    components = _Components(len(y))
    tables = [_no_nearest()]
    for space in spaces:
        limit = thresholds.loc[space.name, "threshold"]
        tables.append(_nearest_across_folds(space, folds, limit, components))
    nearest = pd.concat(tables, ignore_index=True)
    nearest["same target"] = y[nearest["row"]] == y[nearest["nearest"]]
    if groups is not None:
        components.join_equal(np.arange(len(y)), pd.factorize(np.asarray(groups))[0])
    suggested = _suggest_folds(y, components.groups(), len(folds), classes, seed)
    scores = _score_folds(
        estimator, X, y, folds, suggested, nearest, scorers, error_score, n_jobs
    )
    return LeakReport(
        nearest=nearest,
        thresholds=thresholds,
        duplicates=_count_duplicates(spaces, table, y, folds),
        scores=scores,
        score_names=list(scorers),
        columns=_test_columns(table, y, folds, classes, seed),
        groups=components.groups(),
        examples=_render_examples(nearest, spaces, y),
    )


class LeakReport:
    """Result of :func:`leak_report`, shown as text and in notebooks.

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
        score covers) and "suspicious".

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
                "targets."
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


@dataclass
class _Space:
    """The vectors by which the rows of a table are compared.

    `rows` are the observed rows of the table, `vectors` have unit length, and equal
    `codes` mean cells of equal content. `cells` is None for blocks of embeddings.
    """

    name: str
    modality: str
    rows: np.ndarray
    vectors: np.ndarray
    codes: np.ndarray
    cells: list | None = None

    def positions(self, n_rows):
        """Return the position of each row of the table, -1 if it is missing."""
        positions = np.full(n_rows, -1, dtype=np.intp)
        positions[self.rows] = np.arange(len(self.rows))
        return positions


class _Components:
    """Connected components of rows, updated by lists of pairs."""

    def __init__(self, n_rows):
        self.labels = np.arange(n_rows)

    def join(self, rows, others):
        """Join the components of each pair of rows."""
        pairs = self.labels[rows], self.labels[others]
        shape = len(self.labels), len(self.labels)
        graph = coo_matrix((np.ones(len(rows), dtype=bool), pairs), shape=shape)
        _, merged = connected_components(graph, directed=False)
        self.labels = merged[self.labels]

    def join_equal(self, rows, codes):
        """Join rows of equal code."""
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        self.join(rows, rows[first[inverse]])

    def groups(self):
        """Return the number of each row's component, in the order of first rows."""
        return pd.factorize(self.labels)[0].astype(np.intp)


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
    if error_score != "raise" and not isinstance(error_score, Real):
        raise ValueError(
            f"error_score must be 'raise' or a number; got {error_score!r}."
        )
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
    positions, folds = np.arange(len(y)), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        for train, test in splitter.split(X, y, groups):
            folds.append((positions[train], positions[test]))  # they may be masks
    for number, (train, test) in enumerate(folds):
        if not len(train) or not len(test):
            raise ValueError(
                f"Fold {number} of cv has {len(train)} training and {len(test)} test "
                "rows; both must have some. Use other folds."
            )
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


def _make_spaces(estimator, X, vectors):
    """Return the vectors to compare, and the columns of X that are no embeddings."""
    if vectors is not None:
        spaces = []
        for name, values in vectors.items():
            check_consistent_length(X, values)
            spaces.append(_block_space(str(name), np.asarray(values)))
        return spaces, _as_frame(X)
    encoders = []
    for value in [estimator, *estimator.get_params(deep=True).values()]:
        if isinstance(value, FrozenEncoder) or hasattr(value, "make_union"):
            encoders.append(value)
    if encoders:
        table = _as_frame(X)
        return _encoder_spaces(estimator, table), table
    spaces, table = _spaces_of_blocks(estimator, X)
    if not spaces:
        warnings.warn(
            "There are no embeddings to compare: the estimator contains no "
            f"FrozenEncoder, and X has no block of at least {_LEAST_WIDTH} numbers. "
            "Only equal rows and single columns are examined. Put the encoders into the "
            "estimator, or pass vectors.",
            UserWarning,
            stacklevel=3,
        )
    return spaces, table


def _as_frame(X):
    """Return X as pandas, whose index is the position of the rows."""
    X = as_pandas(X)
    if hasattr(X, "iloc"):
        X = X.reset_index(drop=True)
        return X.to_frame() if X.ndim == 1 else X
    if np.ndim(X) == 2:
        return pd.DataFrame(X)
    return pd.Series(list(X), dtype=object, name="X").to_frame()


def _encoder_spaces(estimator, table):
    """Encode the cells of each encoder, or read their vectors from its store."""
    jobs, names = [], []
    for path, encoder, part in list_jobs(estimator, table):
        name = getattr(part, "name", None)
        if is_frame(part):
            name = part.columns[0]
        names.append(path if name is None else str(name))
        jobs.append((path, clone(encoder), part))
    spaces, keys = [], set()
    for name, (path, encoder, part) in zip(names, jobs, strict=True):
        vectors = np.asarray(encoder.fit_transform(part))
        digests = encoder.digests(part)
        key = encoder.fingerprint(), tuple(digests)
        if key in keys:  # the same encoder and cells, in another candidate of a search
            continue
        keys.add(key)
        if vectors.dtype == object:
            vectors = _average_tokens(vectors)
        observed = np.flatnonzero(~np.isnan(vectors).any(axis=1))
        cells = part.iloc[:, 0] if is_frame(part) else pd.Series(part)
        space = _Space(
            name=path if names.count(name) > 1 else name,
            modality=encoder.space_["modality"],
            rows=_rows_of(part, len(table), path)[observed],
            vectors=_prepare(vectors[observed], encoder.space_["modality"]),
            codes=pd.factorize(digests[observed])[0],
            cells=cells.iloc[observed].tolist(),
        )
        spaces.append(space)
    return spaces


def _rows_of(part, n_rows, path):
    """Return the rows of the table that the input of an encoder contains."""
    if len(part) == n_rows:
        return np.arange(n_rows)
    if not hasattr(part, "iloc"):
        raise ValueError(
            f"The input of the encoder {path!r} has {len(part)} of {n_rows} rows and no "
            "index, so they cannot be matched with the rows of X. Pass vectors, or let "
            "the steps before the encoder return DataFrames."
        )
    return part.index.to_numpy()


def _average_tokens(tokens):
    """Return the mean of the tokens of each cell; NaN for missing cells."""
    width = next(cell.shape[1] for cell in tokens[:, 0] if cell is not None)
    averages = np.full((len(tokens), width), np.nan, dtype=np.float32)
    for row, cell in enumerate(tokens[:, 0]):
        if cell is not None:
            averages[row] = cell.mean(axis=0)
    return averages


def _prepare(vectors, modality):
    """Return vectors of unit length, whitened unless they are embeddings of texts.

    Sentence encoders are trained for the cosine. The other vectors have a few
    directions of large variance, in which unrelated rows are similar.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if modality == "text" or len(vectors) < 2:
        return _as_unit(vectors)
    centred = vectors - vectors.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    variances = np.maximum(variances, 0) + _SHRINKAGE * variances.mean()
    scale = np.sqrt(np.maximum(variances, np.finfo(np.float32).tiny))
    return _as_unit(centred @ (directions / scale))


def _join_spaces(spaces, n_rows):
    """Return a space of all columns, in which the cosine is the mean over columns."""
    if len(spaces) < 2:
        return []
    widths = [space.vectors.shape[1] for space in spaces]
    joint = np.zeros((n_rows, sum(widths)), dtype=np.float32)
    codes = np.zeros(n_rows, dtype=np.intp)
    stops = np.cumsum(widths)
    for space, width, stop in zip(spaces, widths, stops, strict=True):
        joint[space.rows, stop - width : stop] = space.vectors
        of_column = np.zeros(n_rows, dtype=np.intp)  # 0 is a missing cell
        of_column[space.rows] = space.codes + 1
        codes = pd.factorize(codes * (of_column.max() + 1) + of_column)[0]
    # A row without an image would be as near as its text alone.
    complete = np.arange(n_rows)
    for space in spaces:
        complete = np.intersect1d(complete, space.rows)
    return [_Space(ALL, "all", complete, _as_unit(joint[complete]), codes[complete])]


def _as_unit(vectors):
    """Return vectors of unit length; zero vectors stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def _spaces_of_blocks(estimator, X):
    """Return the blocks of a table of embeddings, and its other columns."""
    table = _as_frame(X)
    numeric = table.select_dtypes("number")
    names = [str(name) for name in table.columns]
    blocks = {}
    for name, value in estimator.get_params(deep=True).items():
        if name.split("__")[-1] == "blocks" and isinstance(value, Mapping):
            blocks = resolve_blocks(value, names, table.shape[1], table)
    if not blocks and numeric.shape[1] == table.shape[1]:
        blocks = {"X": slice(0, table.shape[1])}
        if all("__" in name for name in names):
            blocks = resolve_blocks(None, names, table.shape[1])
    spaces, compared = [], np.zeros(table.shape[1], dtype=bool)
    for name, columns in blocks.items():
        values = table.iloc[:, columns]
        if values.shape[1] >= _LEAST_WIDTH:
            compared[columns] = True
            spaces.append(_block_space(str(name), values.to_numpy(dtype=np.float32)))
    return spaces, table.loc[:, ~compared]


def _block_space(name, values):
    """Return a block of embeddings as a space; rows with NaN are missing."""
    observed = np.flatnonzero(~np.isnan(values).any(axis=1))
    values = np.ascontiguousarray(values[observed])
    as_bytes = [row.tobytes() for row in values]
    codes = pd.factorize(np.array(as_bytes, dtype=object))[0]
    return _Space(name, "vectors", observed, _prepare(values, "vectors"), codes)


def _thresholds(spaces, y, groups, classes, threshold, false_alarms):
    """Return a table of the threshold of each space, and of its estimates."""
    names = [space.name for space in spaces]
    passed = threshold
    if not isinstance(threshold, Mapping):
        passed = dict.fromkeys(names, threshold)
    unknown = [name for name in passed if name not in names]
    if unknown:
        raise ValueError(
            f"threshold names the columns {unknown}, but the columns that are compared "
            f"are {names}."
        )
    records = []
    for space in spaces:
        limit = passed.get(space.name, "auto")
        record = {"column": space.name, "modality": space.modality}
        if isinstance(limit, str) and limit == "auto":
            alpha = false_alarms / len(spaces)
            if space.name != ALL:
                alpha /= max(len(space.rows), 1)
            record |= _estimate_threshold(space, y, groups, classes, alpha)
        elif not isinstance(limit, Real) or isinstance(limit, bool):
            raise TypeError(
                f"threshold must be 'auto', a number, or a dict of these; got {limit!r} "
                f"for {space.name!r}."
            )
        elif not 0 <= limit <= 2:
            raise ValueError(
                "threshold must be a cosine distance between 0 and 2; got "
                f"{limit!r} for {space.name!r}."
            )
        else:
            record["threshold"] = float(limit)
        records.append(record)
    fields = ["column", "modality", "threshold", "typical distance", "dimension"]
    table = pd.DataFrame(records, columns=[*fields, "n_rows"])
    return table.set_index("column")


def _estimate_threshold(space, y, groups, classes, alpha):
    """Estimate the threshold from distances within classes; see `leak_report`."""
    labels = np.zeros(len(space.rows), dtype=np.intp)
    if classes:
        labels = sorted_labels(y[space.rows])[1]
    relatives = np.arange(len(space.rows))
    if groups is not None:
        relatives = pd.factorize(np.asarray(groups)[space.rows])[0]
    near, far = _ranked_distances(space.vectors, labels, relatives)
    if len(far) < _LEAST_QUERIES and classes:  # classes are small
        near, far = _ranked_distances(space.vectors, np.zeros_like(labels), relatives)
    record = {"threshold": 0.0, "n_rows": len(far)}
    if len(far) < _LEAST_QUERIES:
        warnings.warn(
            f"Only {len(far)} rows of column {space.name!r} have {_FAR} neighbours, too "
            "few to estimate a threshold, so only equal cells are compared. Pass "
            "threshold.",
            UserWarning,
            stacklevel=4,
        )
        return record
    typical = np.median(far)
    record["typical distance"] = typical**2 / 2
    distinct_rows = near > 0
    if np.mean(distinct_rows) > 0.5:
        log_ratio = np.median(np.log(near[distinct_rows] / far[distinct_rows]))
        expected = np.log(beta.median(_NEAR, _FAR - _NEAR))
        record["dimension"] = expected / min(log_ratio, -np.finfo(float).eps)
        share = beta.ppf(alpha, 1, _FAR - 1) ** (1 / record["dimension"])
        record["threshold"] = (typical * share) ** 2 / 2
    return record


def _ranked_distances(vectors, labels, relatives):
    """Return the distances to two neighbours of the same label that are no relatives.

    Parameters
    ----------
    vectors : ndarray of shape (n_rows, n_components)
        Vectors of unit length.
    labels, relatives : ndarray of shape (n_rows,)
        Class and group of each row.

    Returns
    -------
    near, far : ndarray of shape (n_queries,)
        Euclidean distances to the neighbours of rank `_NEAR` and `_FAR`, of rows that
        are spread evenly over the table; rows with fewer neighbours are omitted.
    """
    n_rows = len(vectors)
    n_queries = min(n_rows, _N_QUERIES)
    queries = np.linspace(0, n_rows - 1, n_queries).astype(np.intp)
    near, far = [np.empty(0)], [np.empty(0)]
    if n_rows <= _FAR:
        return near[0], far[0]
    for block in gen_batches(n_queries, max(1, _BLOCK_CELLS // n_rows)):
        rows = queries[block]
        squared = 2 - 2 * (vectors[rows] @ vectors.T)
        excluded = labels[rows, None] != labels
        excluded |= relatives[rows, None] == relatives
        squared[excluded] = np.inf
        ranked = np.partition(squared, [_NEAR - 1, _FAR - 1], axis=1)
        ranked = ranked[np.isfinite(ranked[:, _FAR - 1])]
        # Rounding errors of equal vectors are below 1e-6.
        ranked[ranked < 1e-6] = 0
        near.append(np.sqrt(ranked[:, _NEAR - 1]))
        far.append(np.sqrt(ranked[:, _FAR - 1]))
    return np.concatenate(near), np.concatenate(far)


def _no_nearest():
    """Return an empty table of nearest neighbours, with its dtypes."""
    dtypes = {"column": object, "fold": int, "row": int, "nearest": int}
    dtypes |= {"distance": float, "equal": bool, "leaked": bool}
    return pd.DataFrame(columns=list(dtypes)).astype(dtypes)


def _nearest_across_folds(space, folds, limit, components):
    """Find the nearest training row of each test row, and join near duplicates.

    Parameters
    ----------
    space : _Space
        The vectors.
    folds : list of (train, test)
        Rows of the table.
    limit : float
        The threshold.
    components : _Components
        Updated by all pairs of rows below the threshold, also within folds.

    Returns
    -------
    nearest : DataFrame
        The columns of `LeakReport.nearest_` before "same target".
    """
    n_rows = max(max(train.max(), test.max()) for train, test in folds) + 1
    positions = space.positions(max(n_rows, space.rows.max(initial=-1) + 1))
    pieces = []
    for number, (train, test) in enumerate(folds):
        train, test = positions[train], positions[test]
        train, test = np.sort(train[train >= 0]), np.sort(test[test >= 0])
        if len(train) and len(test):
            nearest = np.empty(len(test), dtype=np.intp)
            pieces.append((number, train, test, nearest, np.empty(len(test))))
    if limit > 0:
        components.join_equal(space.rows, space.codes)
    for block in gen_batches(
        len(space.rows), max(1, _BLOCK_CELLS // max(len(space.rows), 1))
    ):
        similarity = space.vectors[block] @ space.vectors.T
        if limit > 0:
            rows, others = np.nonzero(similarity > 1 - limit)
            components.join(space.rows[block.start + rows], space.rows[others])
        for _, train, test, nearest, distance in pieces:
            part = slice(*np.searchsorted(test, [block.start, block.stop]))
            to_train = similarity[test[part] - block.start][:, train]
            best = to_train.argmax(axis=1)
            nearest[part] = train[best]
            distance[part] = 1 - to_train[np.arange(len(best)), best]
    tables = [_no_nearest()]
    for number, train, test, nearest, distance in pieces:
        equal = _set_equal(space.codes, train, test, nearest)
        distance = np.where(equal, 0, np.maximum(distance, 0))
        columns = {
            "column": space.name,
            "fold": number,
            "row": space.rows[test],
            "nearest": space.rows[nearest],
            "distance": distance,
            "equal": equal,
            "leaked": distance < limit,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _set_equal(codes, train, test, nearest):
    """Set the nearest row of test cells that equal a training cell; return their mask."""
    first = np.full(codes.max() + 1, -1, dtype=np.intp)
    first[codes[train[::-1]]] = train[::-1]
    equal_row = first[codes[test]]
    equal = equal_row >= 0
    nearest[equal] = equal_row[equal]
    return equal


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
    estimator, X, y, folds, suggested, nearest, scorers, error_score, n_jobs
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
    results = Parallel(n_jobs=n_jobs)(
        delayed(_score_fold)(estimator, X, y, *job, scorers, error_score)
        for job in jobs
    )
    records = []
    for rows in results:
        records.extend(rows)
    scores = pd.DataFrame(records)
    order = scores["arm"].map(ARMS.index)
    return scores.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def _score_fold(estimator, X, y, number, train, parts, scorers, error_score):
    """Fit the estimator once, and score each part of the test rows."""
    start, fitted = perf_counter(), None
    with located(f"fold {number} ({next(iter(parts))}) of leak_report", error_score):
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
            record |= _apply_scorers(
                fitted, take_rows(X, rows), y[rows], scorers, error_score, record
            )
        record["fit s"] = seconds
    return records


def _apply_scorers(fitted, X, y, scorers, error_score, record):
    """Return the scores of some test rows."""
    scores = {}
    for name, scorer in scorers.items():
        scores[name] = error_score
        place = f"fold {record['fold']} ({record['arm']}) of leak_report"
        with located(place, error_score, f"The scorer {name!r}"):
            scores[name] = float(scorer(fitted, X, y))
    return scores


def _test_columns(table, y, folds, classes, seed):
    """Return a table of the score of each single column; see `LeakReport.columns_`."""
    rng = np.random.default_rng(seed)
    rows = np.arange(len(y))
    if len(rows) > _N_ROWS_OF_COLUMN:
        rows = np.sort(rng.permutation(rows)[:_N_ROWS_OF_COLUMN])
    kept = np.zeros(len(y), dtype=bool)
    kept[rows] = True
    new_rows = np.cumsum(kept) - 1
    small_folds = []
    for train, test in folds:
        train, test = new_rows[train[kept[train]]], new_rows[test[kept[test]]]
        if len(train) and len(test):
            small_folds.append((train, test))
    target = y[rows]
    permuted_targets = [rng.permutation(target) for _ in range(_N_PERMUTATIONS)]
    records = []
    for position, name in enumerate(table.columns):
        kind, features = _read_single_column(table.iloc[rows, position], str(name))
        record = {"column": str(name), "kind": kind}
        records.append(record)
        if features is None or not small_folds:
            continue
        model = _single_column_model(features, classes)
        record["score"] = _out_of_fold(model, features, target, small_folds, classes)
        permuted = []
        for permuted_target in permuted_targets:
            permuted.append(
                _out_of_fold(model, features, permuted_target, small_folds, classes)
            )
        record["permuted"] = max(permuted)
        chance = np.mean(permuted)
        record["gain"] = (record["score"] - chance) / (1 - chance)
        is_identifier = kind in _IDENTIFIERS
        exceeds = record["score"] > record["permuted"]
        record["suspicious"] = exceeds and record["gain"] >= _LEAST_GAINS[is_identifier]
    fields = ["column", "kind", "score", "permuted", "gain", "suspicious"]
    columns = pd.DataFrame(records, columns=fields)
    columns["suspicious"] = columns["suspicious"].eq(True)
    return columns.sort_values("gain", ascending=False, ignore_index=True)


def _read_single_column(cells, name):
    """Return the kind of a column and its features; None if it has no cheap ones."""
    try:
        reading = read_column(cells, name)
    except ValueError:  # lists, dicts and the like
        return "other", None
    kind = reading.kind
    observed = cells.dropna()
    texts = observed[observed.map(lambda cell: isinstance(cell, str))]
    if len(texts) and texts.str.contains(_FILE_NAME).mean() >= 0.9:
        kind = "file name"
    elif kind == "dropped" and reading.n_distinct > 1:
        kind = "identifier"
    if kind in ("numeric", "boolean", "datetime"):
        values = parse_column(cells, kind, reading.form)
        return kind, _as_numbers(values)
    if kind == "identifier" and pd.api.types.is_numeric_dtype(cells.dtype):
        return kind, _as_numbers(cells)
    if kind in ("image", "dropped") or not len(texts):
        return kind, None
    hasher = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), n_features=2**14, alternate_sign=False
    )
    starts = []
    for cell in cells:
        starts.append("" if pd.isna(cell) else str(cell)[:_N_CHARACTERS])
    return kind, hasher.transform(starts)


def _as_numbers(values):
    """Return numbers and dates as a column of floats; NaN where missing."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        numbers = values.astype("int64").astype(float)
        values = numbers.where(values.notna(), math.nan)
    return values.to_numpy(dtype=float, na_value=math.nan).reshape(-1, 1)


def _single_column_model(features, classes):
    """Return a cheap model of the features of a column."""
    if isinstance(features, np.ndarray):
        options = {"min_samples_leaf": 3, "random_state": 0}
        if classes:
            return DecisionTreeClassifier(class_weight="balanced", **options)
        return DecisionTreeRegressor(**options)
    if classes:
        return MultinomialNB(alpha=0.01, fit_prior=False)
    return Ridge(solver="sparse_cg")


def _out_of_fold(model, features, y, folds, classes):
    """Return the score of predictions for the test rows of all folds together."""
    observed, predicted = [], []
    for train, test in folds:
        predicted.append(model.fit(features[train], y[train]).predict(features[test]))
        observed.append(y[test])
    observed, predicted = np.concatenate(observed), np.concatenate(predicted)
    if not classes:
        return r2_score(observed, predicted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        return balanced_accuracy_score(observed, predicted)


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
