"""Learning curves over the fraction of labelled rows."""

import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
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
    """Measure what features on frozen embeddings are worth where few rows have a label.

    The protocol of [1]_: a head is fitted on 1, 10 and 100 % of the labels, on features that were
    learnt before from all training rows without labels. Beside them stands what the comparison
    published with [1]_ does not have: the same head on the frozen embeddings as they are, the arm
    "control". Without it nobody can tell what the features add from what the embeddings bring.

    All arms of a fold are fitted on the same labelled rows and judged on the same test rows, so
    that they can be compared by their differences.

    Parameters
    ----------
    head : classifier
        Fitted on the labelled training rows, as they are for the control, and else on what a
        transformer makes of them.

    X : array-like or DataFrame of shape (n_samples, n_features)
        Embeddings.

    y : array-like of shape (n_samples,)
        Classes.

    pretrained : dict of str to transformer, default=None
        Arms that need no labels: the transformer is fitted on all training rows of a fold, without
        `y`, once for all fractions.

    supervised : dict of str to transformer or classifier, default=None
        Arms that are fitted on the labelled rows alone. A transformer is followed by the head, in
        a pipeline, so that one which is cross-fitted in `fit_transform`, such as
        :class:`ContrastiveProjector`, is used as it should be. A classifier stands for itself;
        what is both counts as a classifier, unless ``"passthrough"`` follows it in a pipeline.

    fractions : float or sequence of float, default=(0.01, 0.1, 1.0)
        Shares of the training rows that have a label, above 0 and up to 1.

    cv : int, cross-validation splitter or iterable, default=5
        An int means stratified folds, which with `groups` keep each group together, shuffled anew
        for each seed. Anything else splits as it does for every seed.

    groups : array-like of shape (n_samples,), default=None
        Group of each row, for the folds. Labelled rows are drawn without regard to it.

    n_seeds : int, default=5
        How often folds and labelled rows are drawn.

    scoring : str or sequence of str, default=("f1_macro", "accuracy", "roc_auc_ovr")
        Names of scikit-learn's scorers. "roc_auc_ovr" is computed here, see Notes.

    error_score : "raise" or float, default=nan
        What an arm scores that cannot be fitted on the labels at hand, as a cross-fitted one cannot
        on one row of each class; there is a warning. "raise" raises what went wrong.

    n_jobs : int or None, default=None
        How many folds are run at the same time, over all seeds.

    random_state : int, RandomState instance or None, default=None
        Draws folds and labelled rows. Estimators keep their own: give them integers for figures
        that can be had again.

    Returns
    -------
    curve : DataFrame
        A row for each arm ("control", then those of `pretrained` and of `supervised`), fraction,
        seed and fold, in this order, with the columns

        - "arm", "fraction": as they were given.
        - "n_labelled": how many training rows had a label.
        - "seed", "fold": their numbers, from 0.
        - a column for each of `scoring`, on all test rows of the fold.
        - "fit s": seconds of fitting the transformer and the head. Those of a transformer of
          `pretrained` are spent once and count in each fraction.

    Raises
    ------
    TypeError
        If `head` is no classifier, an arm is neither transformer nor classifier, or `n_seeds` is no
        integer.
    ValueError
        If the name of an arm occurs twice or is "control", a fraction is not in (0, 1] or occurs
        twice, a name in `scoring` is unknown, `n_seeds` is below 1, `y` does not hold one class
        for each row, or all training rows of a fold are of one class. All of these are found
        before anything is fitted.

    Warns
    -----
    FitFailedWarning
        If an arm could not be fitted and `error_score` is a number.

    Notes
    -----
    Of n training rows ``round(fraction * n)`` have a label, but at least one of each class that
    the training rows hold. Beyond that one, classes take turns as parties are given seats by the
    method of Sainte-Laguë, which keeps their shares. So the total is exact, and rows with a label
    at one fraction have it at every larger one.

    "roc_auc_ovr" is the mean over classes of the area under the ROC curve of a class against all
    others, by `predict_proba` or else by `decision_function`; of two classes, the area of the
    second. Only classes that have a label in training count of which the test rows hold some and
    are not all; if there is none, it is NaN. Where the test rows hold all classes this is
    scikit-learn's scorer of that name, which knows no folds without a class.

    References
    ----------
    .. [1] Qin, Liu, Cheng, Guo, Arcucci. Freeze the Backbones: A Parameter-Efficient Contrastive
       Approach to Robust Medical Vision-Language Pre-training. arXiv 2401.01179.

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
    scorers = _find_scorers(scoring)
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
    arms = ["control", *pretrained, *supervised]
    rows = [row for result in results for row in result]
    rows.sort(
        key=lambda row: (arms.index(row["arm"]), fractions.index(row["fraction"]))
    )
    return pd.DataFrame(rows)


def _as_arms(arms):
    """Return arms by their names."""
    if arms is not None and not isinstance(arms, Mapping):
        raise TypeError(f"Arms come as a dict from names to estimators; got {arms!r}.")
    return dict(arms or {})


def _check_arms(head, pretrained, supervised):
    """Refuse arms that cannot be fitted as they should, or told apart."""
    if not is_a_classifier(head):
        raise TypeError(f"head must be a classifier; got {head!r}.")
    for name, arm in pretrained.items():
        learns = hasattr(arm, "__sklearn_tags__") and get_tags(arm).target_tags.required
        if learns or not hasattr(arm, "transform"):
            raise TypeError(
                f"Arms of pretrained must be transformers that need no labels; {name!r} is "
                f"{arm!r}. What learns from labels belongs in supervised."
            )
    for name, arm in supervised.items():
        if not (is_a_classifier(arm) or hasattr(arm, "transform")):
            raise TypeError(
                f"Arms of supervised must be transformers or classifiers; {name!r} is {arm!r}."
            )
    if "control" in pretrained or "control" in supervised:
        raise ValueError(
            "The arm 'control' is the head on X as it is, and always there. Give yours another "
            "name."
        )
    both = [name for name in pretrained if name in supervised]
    if both:
        raise ValueError(
            f"The arms {both} are in pretrained and in supervised. Rename one."
        )


def _check_fractions(fractions):
    """Return the fractions as a list."""
    fractions = [fractions] if isinstance(fractions, Real) else list(fractions)
    if not all(
        isinstance(fraction, Real) and 0 < fraction <= 1 for fraction in fractions
    ):
        raise ValueError(
            f"fractions must be numbers above 0 and up to 1; got {fractions}."
        )
    if not fractions or len(set(fractions)) < len(fractions):
        raise ValueError(
            f"fractions must hold one number or more, each once; got {fractions}."
        )
    return fractions


def _find_scorers(scoring):
    """Return a scorer for each name."""
    names = list(scoring) if isinstance(scoring, list | tuple) else [scoring]
    known = get_scorer_names()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"scoring must name one of scikit-learn's scorers or more; got {unknown or names}. See "
            "sklearn.metrics.get_scorer_names()."
        )
    return {
        name: _auroc if name == "roc_auc_ovr" else get_scorer(name) for name in names
    }


def _check_classes(y):
    """Return y as an array, one class for each row."""
    check_no_missing_label(y)
    kind = type_of_target(y, input_name="y")
    if kind not in ("binary", "multiclass"):
        raise ValueError(
            f"y must hold one class for each row; got shape {np.shape(y)} and what scikit-learn "
            f"calls {kind!r}."
        )
    return column_or_1d(y, warn=True)


class _Fold(NamedTuple):
    """A fold of a seed; its training rows stand in the order in which they are given labels."""

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
    splitter = None if isinstance(cv, Integral) else check_cv(cv, y, classifier=True)
    folds = []
    for number, seed in enumerate(seeds.tolist()):
        if isinstance(cv, Integral):
            kind = StratifiedKFold if groups is None else StratifiedGroupKFold
            splitter = kind(cv, shuffle=True, random_state=seed)
        for fold, split in enumerate(splitter.split(X, y, groups)):
            train, test = (np.arange(len(y))[part] for part in split)  # of masks, too
            classes = np.unique(y[train])
            if len(classes) < 2:
                raise ValueError(
                    f"The {len(train)} training rows of seed {number}, fold {fold} hold 1 class "
                    f"only ({classes.tolist()}); at least two are needed. Use other folds."
                )
            order = _order_of_labels(y[train], np.random.default_rng([seed, fold]))
            folds.append(_Fold(number, fold, train[order], test, len(classes)))
    return folds


def _order_of_labels(y, rng):
    """Order rows at random, but so that classes have their share of however many come first.

    One row of each class leads. Then whoever is next in a class of n rows, with k before it, has
    its turn at (k + 1/2) / n: Sainte-Laguë's quotients, which depend on no total.
    """
    rows = rng.permutation(len(y))
    codes = sorted_labels(y)[1][rows]
    k = pd.Series(codes).groupby(codes).cumcount().to_numpy()
    turns = np.where(k == 0, 0.0, (k + 0.5) / np.bincount(codes)[codes])
    return rows[np.argsort(turns, kind="stable")]


def _run_fold(
    fold, X, y, head, pretrained, supervised, fractions, scorers, error_score
):
    """Fit and judge all arms at all fractions; return a row for each."""
    rows, train = [], np.sort(fold.train)
    for arm in ("control", *pretrained, *supervised):
        estimator, seconds = supervised.get(arm, head), 0.0
        Z, Z_test = take_rows(X, train), take_rows(X, fold.test)
        if arm in pretrained:
            with _telling_where(arm, fold):
                tick = perf_counter()
                transformer = clone(pretrained[arm]).fit(Z)
                Z, Z_test = transformer.transform(Z), transformer.transform(Z_test)
                seconds = perf_counter() - tick
        elif not is_a_classifier(estimator):
            estimator = make_pipeline(estimator, head)
        for fraction in fractions:
            labelled = fold.labelled(fraction)
            row = {"arm": arm, "fraction": fraction, "n_labelled": len(labelled)}
            row |= {"seed": fold.seed, "fold": fold.number}
            row |= dict.fromkeys(scorers, error_score) | {"fit s": math.nan}
            fitted = None
            with _telling_where(arm, fold, fraction, error_score):
                tick = perf_counter()
                known = take_rows(Z, np.searchsorted(train, labelled))
                fitted = clone(estimator).fit(known, y[labelled])
                row["fit s"] = seconds + perf_counter() - tick
            with _telling_where(arm, fold, fraction):
                for name, score in scorers.items() if fitted is not None else ():
                    row[name] = score(fitted, Z_test, y[fold.test])
            rows.append(row)
    return rows


@contextmanager
def _telling_where(arm, fold, fraction=None, error_score="raise"):
    """Add to an error where it was, or warn of it where there is a score for it."""
    try:
        yield
    except Exception as error:
        where = "" if fraction is None else f", fraction {fraction}"
        where = f"the arm {arm!r} of few_label_curve{where}, seed {fold.seed}, fold {fold.number}"
        if error_score == "raise":
            error.add_note(f"This was in {where}.")
            raise
        warnings.warn(
            f"Fitting failed in {where}, which scores {error_score}: {error!r}",
            FitFailedWarning,
            stacklevel=2,
        )


def _auroc(classifier, X, y):
    """Return the mean area under the ROC curves of the classes that can have one."""
    probable = hasattr(classifier, "predict_proba")
    scores = (
        classifier.predict_proba(X) if probable else classifier.decision_function(X)
    )
    scores = np.asarray(scores).reshape(len(y), -1)
    classes = classifier.classes_
    if len(classes) == 2:
        scores, classes = scores[:, -1:], classes[1:]
    given = classifier.get_params() if hasattr(classifier, "get_params") else {}
    shapes = [
        value
        for name, value in given.items()
        if name.endswith("decision_function_shape")
    ]
    pairs = "ovo" in shapes  # of three classes there are as many pairs as classes
    if scores.shape[1] != len(classes) or (pairs and not probable and len(classes) > 2):
        raise ValueError(
            f"'roc_auc_ovr' needs a score for each of {len(classes)} classes, but {classifier!r} "
            f"gives {scores.shape[1]}, of pairs perhaps. Leave it out of scoring, or choose "
            "another classifier."
        )
    areas = [
        roc_auc_score(y == label, scores[:, column])
        for column, label in enumerate(classes)
        if 0 < np.count_nonzero(y == label) < len(y)
    ]
    return float(np.mean(areas)) if areas else math.nan
