"""What frozen embeddings cost, in time, memory and disk, and what few labels on them are worth."""

import math
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from contextlib import closing, contextmanager
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from joblib import parallel_config
from joblib.externals.loky import ProcessPoolExecutor
from sklearn import config_context, get_config
from sklearn.base import clone, is_classifier
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.metrics import accuracy_score, get_scorer, get_scorer_names, roc_auc_score
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    check_cv,
    train_test_split,
)
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import check_random_state, column_or_1d, get_tags
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length

from sklembed._tables import missing_cells, take_rows
from sklembed._validation import check_no_missing_label, sorted_labels
from sklembed.encoders import FrozenEncoder, prefetch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_NOT_TRAINED = ("mean", "scale", "n_batches", "num_batches_tracked")  # among a head's weights


def efficiency_report(pipeline, X, y, *, test_size=0.25, n_epochs=2, random_state=None):
    """Measure what encoding each cell once saves, against encoding it again in every epoch.

    [1]_ compares fusion of stored embeddings with the same heads on raw data, whose frozen encoders
    run in every epoch, and computes the memory of both from the sizes of tensors. Here both are
    run, each in a fresh process of its own, so that neither inherits the other's models or peak:

    - "raw": encoders have no store. All training rows are encoded before every epoch of the head,
      and the test rows whenever they are predicted.
    - "stored": encoders share one fresh store on disk. The training rows are encoded once, the head
      is trained for as many epochs on their vectors, and the vectors are read back once more, as
      the next fit would, be it a fold or a candidate.

    Both arms train the head on the same features, those that `fit_transform` of the steps before it
    returns; the later passes of the raw arm cost what they cost, and lead to equal vectors.

    Parameters
    ----------
    pipeline : :class:`~sklearn.pipeline.Pipeline`
        Its last step is a classifier, the head. The steps before hold one :class:`FrozenEncoder` or
        more, in branches and nested pipelines as well. It is cloned; its encoders' stores are
        neither read nor written, and what its `memory` would spare is computed.

        A head with the parameters `max_epochs` and `warm_start`, such as
        :class:`EarlyFusionClassifier`, or scikit-learn's ``MLPClassifier`` is trained an epoch at a
        time; `n_epochs` overrides its own number, and its optimiser starts anew with each. Any
        other classifier has no epochs: it is fitted once, and `n_epochs` still says how often the
        raw arm encodes.

    X : DataFrame, array-like or list of shape (n_samples, ...)
        The table that `pipeline` takes.

    y : array-like of shape (n_samples,) or (n_samples, n_labels)
        Classes, or a 0/1 column for each label.

    test_size : float or int, default=0.25
        The part of the rows, or their number, to test on. The split is stratified where each class
        has rows enough.

    n_epochs : int, default=2
        Epochs of the head.

    random_state : int, RandomState instance or None, default=None
        Draws the test rows. The steps of the pipeline keep their own: give them integers for arms
        of equal accuracy.

    Returns
    -------
    report : DataFrame
        A row for each arm, "raw" and "stored", with the columns

        - "encode s": seconds that encoders work on the training rows, over all epochs. Time in
          which several are at work counts once.
        - "fit s": seconds of all other training, of the head and of steps between.
        - "predict s": seconds from the cells of the test rows to labels. The stored arm encodes
          them, except for cells that training rows show as well, and stores their vectors.
        - "predict again s": the same, a second time: the stored arm reads the vectors.
        - "peak MiB": the most memory that the arm's process had resident, with data, libraries and
          the models, which the stored arm loads to encode once and later fits on the same store do
          not load; not that of an accelerator. NaN on Windows.
        - "stored bytes": size of the store's file, with the vectors of all rows.
        - "cells encoded": how many cells went through a model, over all epochs and predictions;
          within a pass each distinct cell goes once.
        - "parameters trained": of the head; NaN where it has neither ``weights_`` nor ``coef_`` or
          ``coefs_``.
        - "accuracy": on the test rows.
        - "breaks even at epochs": the least number of epochs that take no less time to encode for,
          raw, than encoding and storing once; NaN for the raw arm.
        - "breaks even at fits": the same for fits, of which each needs all vectors once, encoded
          anew in the raw arm and read back in the other after the first; infinite where reading is
          no faster than encoding; NaN for the raw arm.

    Raises
    ------
    TypeError
        If `pipeline` is no Pipeline, its last step no classifier, or `n_epochs` no integer.
    ValueError
        If no step before the last holds an encoder, :func:`prefetch` cannot tell what reaches one,
        `n_epochs` is below 1, or a label is missing.

    Notes
    -----
    Before the clock starts, each process encodes a few rows into nothing, and trains a head of a
    few numbers where one of the pipeline's steps trains by torch, so that loading models and
    libraries counts nowhere but in the memory. In either process parallel jobs are threads.

    The pipeline and the rows travel to the processes by cloudpickle, so that functions and classes
    of a script or notebook need no ``if __name__ == "__main__"``. The time of a pass depends on
    what else the machine does: measure on one that is idle.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector Embedding
       Alignment Approach. arXiv 2406.02601.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> from sklembed.evaluation import efficiency_report
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> shape = CallableBackend(load, name="lengths", version="1", modality="text", n_features=2)
    >>> pipeline = make_pipeline(FrozenEncoder(shape), LogisticRegression())
    >>> X = ["red", "blue", "green", "pink", "a red cat", "a blue dog", "a green cow", "a pink pig"]
    >>> y = ["colour"] * 4 + ["animal"] * 4
    >>> report = efficiency_report(pipeline, X, y, n_epochs=3, random_state=0)
    >>> report[["cells encoded", "parameters trained", "accuracy"]]
            cells encoded  parameters trained  accuracy
    arm
    raw                22                   3       1.0
    stored              8                   3       1.0
    """
    _check_pipeline(pipeline, n_epochs)
    check_consistent_length(X, y)
    check_no_missing_label(y)
    split = _split(X, y, test_size, random_state)
    arms = {
        arm: _in_a_process_of_its_own(arm, clone(pipeline), split, n_epochs)
        for arm in ("raw", "stored")
    }
    return _tabulate(arms)


def _check_pipeline(pipeline, n_epochs):
    """Refuse what cannot be measured, before any work."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"pipeline must be a scikit-learn Pipeline; got {pipeline!r}. Join the encoder and "
            "the classifier by make_pipeline."
        )
    name, head = pipeline.steps[-1]
    if not _is_a_classifier(head):
        raise TypeError(
            f"The pipeline's last step must be a classifier; {name!r} is {head!r}. Append one, "
            "such as LogisticRegression()."
        )
    if all(path.split("__")[0] == name for path in _encoders(pipeline)):
        raise ValueError(
            f"No step of the pipeline before {name!r} holds a FrozenEncoder, so there is no "
            f"encoding to measure; the steps are {[step for step, _ in pipeline.steps]}. Put one "
            "before the classifier."
        )
    _check_at_least_one("n_epochs", n_epochs)


def _is_a_classifier(step):
    return hasattr(step, "__sklearn_tags__") and is_classifier(step)


def _check_at_least_one(name, number):
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise TypeError(f"{name} must be an integer; got {number!r}.")
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}.")


def _encoders(pipeline):
    """Return the paths of the encoders in a pipeline, as set_params takes them."""
    found = pipeline.get_params(deep=True).items()
    return [path for path, value in found if isinstance(value, FrozenEncoder)]


def _split(X, y, test_size, random_state):
    """Return training and test rows of X and y, stratified if the classes allow it."""
    y = np.asarray(y)
    options = {"test_size": test_size, "random_state": random_state}
    try:
        return train_test_split(X, y, stratify=y, **options)
    except ValueError:  # a class has too few rows
        return train_test_split(X, y, **options)


def _in_a_process_of_its_own(arm, pipeline, split, n_epochs):
    """Measure one arm; return a dict of figures."""
    with (
        tempfile.TemporaryDirectory(prefix="sklembed-") as folder,
        ProcessPoolExecutor(max_workers=1) as executor,
    ):
        job = executor.submit(_measure, arm, pipeline, split, n_epochs, folder, get_config())
        try:
            return job.result()
        except Exception as error:
            error.add_note(f"This was in the arm {arm!r} of efficiency_report.")
            raise


def _measure(arm, pipeline, split, n_epochs, folder, config):
    """Train and predict as the arm does; return a dict of figures."""
    X, X_test, y, y_test = split
    store = Path(folder) / "store.sqlite" if arm == "stored" else None
    with config_context(**config), parallel_config(backend="threading"):
        _warm_up(pipeline, X, Path(folder) / "warm-up.sqlite")
        _set_stores(pipeline, store)
        features, head = pipeline[:-1], pipeline[-1]
        with _metering() as meter:
            figures = _train(features, head, X, y, n_epochs, meter, again=store is None)
            if store is not None:
                figures["reading pass s"] = _seconds_of_encoders(meter, features.transform, X)
            tick = perf_counter()
            predicted = head.predict(features.transform(X_test))
            tock = perf_counter()
            head.predict(features.transform(X_test))
            end = perf_counter()
    return figures | {
        "predict s": tock - tick,
        "predict again s": end - tock,
        "peak MiB": _peak_mib(),
        "stored bytes": sum(path.stat().st_size for path in Path(folder).glob("store.sqlite*")),
        "cells encoded": meter.cells,
        "parameters trained": _n_parameters(head),
        "accuracy": float(accuracy_score(y_test, predicted)),
    }


def _train(features, head, X, y, n_epochs, meter, *, again):
    """Train all steps; encode the rows for the first epoch or, if `again`, for each."""
    one_epoch = _one_epoch(head)
    head.set_params(**one_epoch)
    start = perf_counter()
    # Features of the first pass serve all epochs: a step that is cross-fitted in fit_transform
    # would show the head its own labels in transform.
    vectors = features.fit_transform(X, y)
    passes = [meter.seconds]
    for epoch in range(n_epochs):
        if again and epoch > 0:
            passes.append(_seconds_of_encoders(meter, features.transform, X))
        if one_epoch or epoch == n_epochs - 1:
            _fit_quietly(head, vectors, y)
    return {
        "encode s": sum(passes),
        "fit s": perf_counter() - start - sum(passes),
        "encoding pass s": sum(passes) / len(passes),
    }


def _one_epoch(head):
    """Return parameters by which `fit` trains one epoch and goes on; none if it has no epochs."""
    parameters = head.get_params(deep=False)
    if {"max_epochs", "warm_start"} <= parameters.keys():
        return {"max_epochs": 1, "warm_start": True}
    if isinstance(head, MLPClassifier) and head.solver != "lbfgs":
        return {"max_iter": 1, "warm_start": True}
    return {}


def _fit_quietly(head, vectors, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an epoch alone seldom suffices
        head.fit(vectors, y)


def _set_stores(pipeline, store):
    """Give all encoders a store, and have no step remember outputs."""
    pipeline.set_params(**{f"{path}__store": store for path in _encoders(pipeline)})
    for step in [pipeline, *pipeline.get_params(deep=True).values()]:
        if isinstance(step, Pipeline):
            step.set_params(memory=None)


def _warm_up(pipeline, X, throwaway):
    """Load all models and libraries, by encoding and training as little as can be."""
    features = clone(pipeline[:-1])
    _set_stores(features, throwaway)
    prefetch(features, take_rows(X, _rows_that_show_all(X)))
    steps = pipeline.get_params(deep=True).values()
    devices = {s.device for s in steps if hasattr(s, "max_epochs") and _is_ours(s)}
    for device in sorted(devices):
        _train_by_torch(device)


def _rows_that_show_all(X):
    """Find a few rows in which each column has a cell."""
    missing = missing_cells(pd.Series(X, dtype=object) if isinstance(X, list) else X)
    there = ~missing.reshape(len(missing), -1)
    rows = np.unique(there.argmax(axis=0)[there.any(axis=0)])
    return rows if len(rows) else np.array([0])


def _is_ours(step):
    return type(step).__module__.startswith("sklembed.")


def _train_by_torch(device):
    """Train a head on next to nothing: torch imports and starts parts of itself on first use."""
    from sklembed.fusion import EarlyFusionClassifier

    head = EarlyFusionClassifier((2,), blocks={"all": slice(0, 2)}, max_epochs=1, device=device)
    head.fit(np.eye(4, 2, dtype=np.float32), [0, 1, 0, 1])


class _Meter:
    """Seconds in which at least one encoder of this process works, and the cells they encode."""

    def __init__(self):
        self.seconds = 0.0
        self.cells = 0
        self._at_work = 0
        self._since = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def working(self):
        """Count the time spent here, which other threads may share."""
        with self._lock:
            if self._at_work == 0:
                self._since = perf_counter()
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                if self._at_work == 0:
                    self.seconds += perf_counter() - self._since

    def count(self, n_cells):
        """Count cells that were encoded."""
        with self._lock:
            self.cells += n_cells


@contextmanager
def _metering():
    """Meter all encoders of this process, also those that pipelines clone."""
    meter = _Meter()

    def timed(method):
        @wraps(method)
        def call(encoder, *args, **kwargs):
            with meter.working():
                return method(encoder, *args, **kwargs)

        return call

    def counted(method):
        @wraps(method)
        def generate(encoder, *args):
            with closing(method(encoder, *args)) as results:
                for positions, values in results:
                    meter.count(len(positions))
                    yield positions, values

        return generate

    wrappers = {"fit_transform": timed, "transform": timed, "_encode": counted}
    originals = {name: vars(FrozenEncoder)[name] for name in wrappers}
    for name, wrap in wrappers.items():
        setattr(FrozenEncoder, name, wrap(originals[name]))
    try:
        yield meter
    finally:
        for name, method in originals.items():
            setattr(FrozenEncoder, name, method)


def _seconds_of_encoders(meter, transform, X):
    """Run a transform for nothing but the time that encoders take in it."""
    before = meter.seconds
    transform(X)
    return meter.seconds - before


def _peak_mib():
    """Return the most memory this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere than here, the peak may include what the parent process had
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _n_parameters(head):
    """Count the numbers that a head has learnt, without the statistics it keeps; NaN if unknown."""
    if hasattr(head, "n_parameters_"):
        return head.n_parameters_
    weights = getattr(head, "weights_", None)
    if isinstance(weights, dict):
        trained = [weight for name, weight in weights.items() if _is_trained(name)]
        arrays = all(isinstance(weight, np.ndarray) for weight in trained)
        return sum(weight.size for weight in trained) if arrays else math.nan
    if hasattr(head, "coefs_"):  # layer by layer
        return sum(array.size for array in [*head.coefs_, *head.intercepts_])
    if hasattr(head, "coef_"):
        return math.prod(np.shape(head.coef_)) + np.size(getattr(head, "intercept_", ()))
    return math.nan


def _is_trained(name):
    return name.split(".")[-1] not in _NOT_TRAINED and "running" not in name


def _tabulate(arms):
    """Put the figures of both arms into one table, and say when storing pays."""
    once, anew = arms["stored"]["encoding pass s"], arms["raw"]["encoding pass s"]
    read = arms["stored"]["reading pass s"]
    report = pd.DataFrame.from_dict(arms, orient="index").rename_axis("arm")
    report = report.drop(columns=["encoding pass s", "reading pass s"])
    report["breaks even at epochs"] = [math.nan, _epochs_to_break_even(once, anew)]
    report["breaks even at fits"] = [math.nan, _fits_to_break_even(once, anew, read)]
    return report


def _epochs_to_break_even(once, anew):
    """Return the least N, from 1, with once <= N * anew, all in seconds."""
    return float(max(1, math.ceil(once / anew))) if anew > 0 else math.inf


def _fits_to_break_even(once, anew, read):
    """Return the least k, from 1, with once + (k - 1) * read <= k * anew, all in seconds."""
    return float(max(1, math.ceil((once - read) / (anew - read)))) if anew > read else math.inf


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
    _check_at_least_one("n_seeds", n_seeds)
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
    rows.sort(key=lambda row: (arms.index(row["arm"]), fractions.index(row["fraction"])))
    return pd.DataFrame(rows)


def _as_arms(arms):
    """Return arms by their names."""
    if arms is not None and not isinstance(arms, Mapping):
        raise TypeError(f"Arms come as a dict from names to estimators; got {arms!r}.")
    return dict(arms or {})


def _check_arms(head, pretrained, supervised):
    """Refuse arms that cannot be fitted as they should, or told apart."""
    if not _is_a_classifier(head):
        raise TypeError(f"head must be a classifier; got {head!r}.")
    for name, arm in pretrained.items():
        learns = hasattr(arm, "__sklearn_tags__") and get_tags(arm).target_tags.required
        if learns or not hasattr(arm, "transform"):
            raise TypeError(
                f"Arms of pretrained must be transformers that need no labels; {name!r} is "
                f"{arm!r}. What learns from labels belongs in supervised."
            )
    for name, arm in supervised.items():
        if not (_is_a_classifier(arm) or hasattr(arm, "transform")):
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
        raise ValueError(f"The arms {both} are in pretrained and in supervised. Rename one.")


def _check_fractions(fractions):
    """Return the fractions as a list."""
    fractions = [fractions] if isinstance(fractions, Real) else list(fractions)
    if not all(isinstance(fraction, Real) and 0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must be numbers above 0 and up to 1; got {fractions}.")
    if not fractions or len(set(fractions)) < len(fractions):
        raise ValueError(f"fractions must hold one number or more, each once; got {fractions}.")
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
    return {name: _auroc if name == "roc_auc_ovr" else get_scorer(name) for name in names}


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
    seeds = check_random_state(random_state).randint(np.iinfo(np.int32).max, size=n_seeds)
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


def _run_fold(fold, X, y, head, pretrained, supervised, fractions, scorers, error_score):
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
        elif not _is_a_classifier(estimator):
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
    scores = classifier.predict_proba(X) if probable else classifier.decision_function(X)
    scores = np.asarray(scores).reshape(len(y), -1)
    classes = classifier.classes_
    if len(classes) == 2:
        scores, classes = scores[:, -1:], classes[1:]
    given = classifier.get_params() if hasattr(classifier, "get_params") else {}
    shapes = [value for name, value in given.items() if name.endswith("decision_function_shape")]
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
