"""Learning curves over the fraction of labelled rows."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.metrics import get_scorer, get_scorer_names, roc_auc_score
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
)
from sklearn.pipeline import make_pipeline
from sklearn.utils import check_random_state, column_or_1d, get_tags
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._table.columns import take_rows
from sklembed._validation import (
    check_at_least_one,
    check_no_missing_label,
    is_a_classifier,
    sorted_labels,
)
from sklembed.evaluation.errors import Failures, located
from sklembed.evaluation.folds import list_folds


def few_label_curve(
    head,
    X,
    y,
    *,
    pretrained=None,
    supervised=None,
    fractions=(0.01, 0.1, 1.0),
    cv=5,
    groups=None,
    n_seeds=5,
    scoring=("f1_macro", "accuracy", "roc_auc_ovr"),
    error_score=math.nan,
    n_jobs=None,
    random_state=None,
):
    """Compute learning curves over the fraction of labelled rows.

    The protocol is that of [1]_: a head is fitted with 1, 10 and 100 % of the labels,
    on features learned from all training rows without labels. The arm "control", which
    the published comparison lacks, is the same head on the frozen embeddings. It
    separates the benefit of the features from that of the embeddings.

    In each fold all arms are fitted on the same labelled rows and scored on the same
    test rows, so that they can be compared by paired differences.

    Parameters
    ----------
    head : classifier
        Fitted on the labelled training rows: on `X` itself in the control arm,
        otherwise on the output of a transformer.

    X : array-like or DataFrame of shape (n_samples, n_features)
        Embeddings.

    y : array-like of shape (n_samples,)
        Classes.

    pretrained : dict of str to transformer, default=None
        Arms that need no labels. In each fold the transformer is fitted once on all
        training rows, without `y`, and serves all fractions.

    supervised : dict of str to transformer or classifier, default=None
        Arms that are fitted only on the labelled rows. A transformer is followed by the
        head in a pipeline, which calls `fit_transform`, so that cross-fitting as in
        :class:`~sklembed.ContrastiveProjector` takes effect. A classifier is used without the
        head. An estimator of both kinds counts as a classifier, unless
        ``"passthrough"`` follows it in a pipeline.

    fractions : float or sequence of float, default=(0.01, 0.1, 1.0)
        Fractions of the training rows that have a label, above 0 and up to 1.

    cv : int, cross-validation splitter or iterable, default=5
        If an int, the number of stratified folds, shuffled anew for each seed; with
        `groups`, each group stays in one fold. Any other splitter is applied without
        change for every seed.

    groups : array-like of shape (n_samples,), default=None
        Group of each row, for the folds. The draw of labelled rows does not use it.

    n_seeds : int, default=5
        Number of times that folds and labelled rows are drawn.

    scoring : str or sequence of str, default=("f1_macro", "accuracy", "roc_auc_ovr")
        Names of scikit-learn's scorers. "roc_auc_ovr" is computed here, see Notes.

    error_score : "raise" or float, default=nan
        Score of an arm that cannot be fitted on the labels at hand, as a cross-fitted
        arm on one row of each class. A warning is issued. If "raise", the error is
        raised.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors. A job is a fold of a seed.

    random_state : int, RandomState instance or None, default=None
        Seeds the draw of folds and labelled rows. Estimators have their own seeds: pass
        integers there for reproducible results.

    Returns
    -------
    curve : DataFrame
        A row for each arm ("control", then `pretrained`, then `supervised`), fraction,
        seed and fold, in this order, with the columns

        - "arm", "fraction": as passed.
        - "n_labelled": number of training rows with a label.
        - "seed", "fold": their numbers, from 0.
        - a column for each of `scoring`, on all test rows of the fold.
        - "fit s": seconds of fitting the transformer and the head. A transformer of
          `pretrained` is fitted once, and its seconds count in each fraction.

    Raises
    ------
    TypeError
        If `head` is not a classifier, an arm is neither a transformer nor a classifier,
        or `n_seeds` is not an integer.
    ValueError
        If an arm's name is repeated or "control", a fraction is repeated or not in
        (0, 1], a name in `scoring` is unknown, `n_seeds` is below 1, `y` does not have
        one class for each row, or all training rows of a fold are of one class. All
        errors are raised before anything is fitted.

    Warns
    -----
    FitFailedWarning
        If an arm could not be fitted and `error_score` is a number.

    Notes
    -----
    Of n training rows ``round(fraction * n)`` have a label, but at least one of each
    class in the training rows. Further rows are allocated to classes by the method of
    Sainte-Laguë, which preserves their shares. The total is therefore exact, and rows
    labelled at one fraction are labelled at every larger one.

    "roc_auc_ovr" is the mean, over classes, of the area under the ROC curve of a class
    against all others. It uses `predict_proba` if available, otherwise
    `decision_function`. For two classes it is the area of the second. A class counts if
    it has a label in training, and if some but not all test rows belong to it. Without
    such a class the score is NaN. If the test rows contain all classes, the score
    equals scikit-learn's scorer of that name, which does not support folds without a
    class.

    References
    ----------
    .. [1] Qin, Liu, Cheng, Guo, Arcucci. Freeze the Backbones: A Parameter-Efficient
       Contrastive Approach to Robust Medical Vision-Language Pre-training. arXiv
       2401.01179.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.linear_model import RidgeClassifier
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklembed.evaluation import few_label_curve
    >>> X, y = load_digits(return_X_y=True)
    >>> curve = few_label_curve(
    ...     KNeighborsClassifier(1),
    ...     X,
    ...     y,
    ...     pretrained={"components": PCA(16, random_state=0)},
    ...     supervised={"ridge": RidgeClassifier()},
    ...     scoring="accuracy",
    ...     cv=3,
    ...     n_seeds=2,
    ...     random_state=0,
    ... )
    >>> curve.pivot_table("accuracy", "arm", "fraction", sort=False).round(1)
    fraction    0.01  0.10  1.00
    arm
    control      0.7   0.9   1.0
    components   0.7   0.9   1.0
    ridge        0.6   0.8   0.9
    """
    pretrained, supervised = _as_arms(pretrained), _as_arms(supervised)
    _check_arms(head, pretrained, supervised)
    fractions = _check_fractions(fractions)
    scorers = _get_scorers(scoring)
    check_at_least_one("n_seeds", n_seeds)
    check_consistent_length(X, y, groups)
    y = _check_classes(y)
    folds = _draw_folds(X, y, groups, cv, n_seeds, random_state)
    results = Parallel(n_jobs=n_jobs)(
        delayed(_run_fold)(
            fold, X, y, head, pretrained, supervised, fractions, scorers, error_score
        )
        for fold in folds
    )
    rows, failures = [], Failures("few_label_curve", error_score)
    for rows_of_fold, failures_of_fold in results:
        rows += rows_of_fold
        failures.update(failures_of_fold)
    failures.warn()
    arms = ["control", *pretrained, *supervised]

    def position(row):
        return arms.index(row["arm"]), fractions.index(row["fraction"])

    return pd.DataFrame(sorted(rows, key=position))


def _as_arms(arms):
    """Return arms as a dict."""
    if arms is not None and not isinstance(arms, Mapping):
        raise TypeError(f"Arms must be a dict from names to estimators; got {arms!r}.")
    return dict(arms or {})


def _check_arms(head, pretrained, supervised):
    """Validate the kind and the name of each arm."""
    if not is_a_classifier(head):
        raise TypeError(f"head must be a classifier; got {head!r}.")
    for name, arm in pretrained.items():
        learns = hasattr(arm, "__sklearn_tags__") and get_tags(arm).target_tags.required
        if learns or not hasattr(arm, "transform"):
            raise TypeError(
                "Arms of pretrained must be transformers that need no labels; "
                f"{name!r} is {arm!r}. Pass estimators that need labels as supervised."
            )
    for name, arm in supervised.items():
        if not (is_a_classifier(arm) or hasattr(arm, "transform")):
            raise TypeError(
                "Arms of supervised must be transformers or classifiers; "
                f"{name!r} is {arm!r}."
            )
    if "control" in pretrained or "control" in supervised:
        raise ValueError(
            "The name 'control' is reserved for the head on X itself. Rename the arm."
        )
    duplicates = [name for name in pretrained if name in supervised]
    if duplicates:
        raise ValueError(
            f"The arms {duplicates} are in pretrained and in supervised. Rename one."
        )


def _check_fractions(fractions):
    """Return the fractions as a list."""
    if isinstance(fractions, Real):
        fractions = [fractions]
    fractions = list(fractions)
    for fraction in fractions:
        if not isinstance(fraction, Real) or not 0 < fraction <= 1:
            raise ValueError(
                f"fractions must be numbers above 0 and up to 1; got {fractions}."
            )
    if not fractions or len(set(fractions)) < len(fractions):
        raise ValueError(
            f"fractions must be one or more distinct numbers; got {fractions}."
        )
    return fractions


def _get_scorers(scoring):
    """Return a dict of scorers by name."""
    names = [scoring]
    if isinstance(scoring, list | tuple):
        names = list(scoring)
    available = get_scorer_names()
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        raise ValueError(
            f"scoring must be one or more names of scorers; got {unknown or names}. "
            "See sklearn.metrics.get_scorer_names()."
        )
    scorers = {name: get_scorer(name) for name in names}
    if "roc_auc_ovr" in scorers:
        scorers["roc_auc_ovr"] = _auroc
    return scorers


def _check_classes(y):
    """Return y as an array, one class for each row."""
    check_no_missing_label(y)
    kind = type_of_target(y, input_name="y")
    if kind not in ("binary", "multiclass"):
        raise ValueError(
            f"y must have one class for each row; got shape {np.shape(y)} and the "
            f"target type {kind!r}."
        )
    return column_or_1d(y, warn=True)


class _Fold(NamedTuple):
    """A fold of a seed; its training rows are in the order in which they get labels."""

    seed: int
    number: int
    train: np.ndarray
    test: np.ndarray
    n_classes: int

    def labelled(self, fraction):
        """Return the rows that have a label, in the order of the table."""
        n_labelled = max(self.n_classes, round(fraction * len(self.train)))
        return np.sort(self.train[:n_labelled])


def _draw_folds(X, y, groups, cv, n_seeds, random_state):
    """Return the folds of all seeds."""
    seeds = check_random_state(random_state).randint(
        np.iinfo(np.int32).max, size=n_seeds
    )
    splitter = check_cv(cv, y, classifier=True)
    folds = []
    for number, seed in enumerate(seeds.tolist()):
        if isinstance(cv, Integral):
            kind = StratifiedKFold if groups is None else StratifiedGroupKFold
            splitter = kind(cv, shuffle=True, random_state=seed)
        for fold, train, test in list_folds(splitter, X, y, groups):
            classes = np.unique(y[train])
            if len(classes) < 2:
                raise ValueError(
                    f"The {len(train)} training rows of seed {number}, fold {fold} are "
                    f"all of the class {classes.tolist()[0]!r}; at least two are "
                    "needed. Use other folds."
                )
            order = _labelling_order(y[train], np.random.default_rng([seed, fold]))
            folds.append(_Fold(number, fold, train[order], test, len(classes)))
    return folds


def _labelling_order(y, rng):
    """Order rows at random, such that any first rows preserve the shares of classes.

    One row of each class comes first. Then row k of a class of n rows, counted from 0,
    is placed by (k + 1/2) / n: Sainte-Laguë's quotients, which do not depend on the
    total.
    """
    rows = rng.permutation(len(y))
    codes = sorted_labels(y)[1][rows]
    k = pd.Series(codes).groupby(codes).cumcount().to_numpy()
    quotients = np.where(k == 0, 0.0, (k + 0.5) / np.bincount(codes)[codes])
    return rows[np.argsort(quotients, kind="stable")]


def _run_fold(
    fold, X, y, head, pretrained, supervised, fractions, scorers, error_score
):
    """Fit and score all arms at all fractions; return a row for each, and failures."""
    rows, failures = [], Failures("few_label_curve", error_score)
    train = np.sort(fold.train)
    for arm in ("control", *pretrained, *supervised):
        estimator = supervised.get(arm, head)
        Z, Z_test = take_rows(X, train), take_rows(X, fold.test)
        seconds = 0.0
        if arm in pretrained:
            with located(f"{_place(arm, fold)} of few_label_curve"):
                start = perf_counter()
                transformer = clone(pretrained[arm]).fit(Z)
                Z, Z_test = transformer.transform(Z), transformer.transform(Z_test)
                seconds = perf_counter() - start
        elif not is_a_classifier(estimator):
            estimator = make_pipeline(estimator, head)
        for fraction in fractions:
            labelled = fold.labelled(fraction)
            row = {"arm": arm, "fraction": fraction, "n_labelled": len(labelled)}
            row |= {"seed": fold.seed, "fold": fold.number}
            row |= dict.fromkeys(scorers, error_score) | {"fit s": math.nan}
            rows.append(row)
            fitted = None
            with failures.located(_place(arm, fold, fraction)):
                start = perf_counter()
                Z_labelled = take_rows(Z, np.searchsorted(train, labelled))
                fitted = clone(estimator).fit(Z_labelled, y[labelled])
                row["fit s"] = seconds + perf_counter() - start
            if fitted is None:  # the row keeps the error score
                continue
            with located(f"{_place(arm, fold, fraction)} of few_label_curve"):
                for name, score in scorers.items():
                    row[name] = score(fitted, Z_test, y[fold.test])
    return rows, failures


def _place(arm, fold, fraction=None):
    """Name an arm in a fold."""
    place = f"arm {arm!r}"
    if fraction is not None:
        place += f", fraction {fraction}"
    return f"{place}, seed {fold.seed}, fold {fold.number}"


def _auroc(classifier, X, y):
    """Return the mean area under the ROC curves of the classes that have a curve."""
    method = "decision_function"
    if hasattr(classifier, "predict_proba"):
        method = "predict_proba"
    scores = np.asarray(getattr(classifier, method)(X)).reshape(len(y), -1)
    classes = classifier.classes_
    if len(classes) == 2:
        scores, classes = scores[:, -1:], classes[1:]
    # Three classes have as many pairs as classes.
    of_pairs = method == "decision_function" and _scores_pairs(classifier)
    if scores.shape[1] != len(classes) or (of_pairs and len(classes) > 2):
        raise ValueError(
            f"'roc_auc_ovr' needs a score for each of {len(classes)} classes, but "
            f"{classifier!r} returns {scores.shape[1]}, possibly of pairs. Use another "
            "scorer or classifier."
        )
    areas = []
    for label, class_scores in zip(classes, scores.T, strict=True):
        positive = y == label
        if 0 < np.count_nonzero(positive) < len(y):
            areas.append(roc_auc_score(positive, class_scores))
    return float(np.mean(areas)) if areas else math.nan


def _scores_pairs(classifier):
    """Return whether a parameter asks for scores of pairs of classes, as in SVC."""
    if not hasattr(classifier, "get_params"):
        return False
    for name, value in classifier.get_params().items():
        if name.endswith("decision_function_shape") and value == "ovo":
            return True
    return False
