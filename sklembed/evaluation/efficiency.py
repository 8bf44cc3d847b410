"""The cost of training on stored or on repeated encodings: time, memory and disk."""

import math
import sys
import tempfile
import threading
import warnings
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from joblib import parallel_config
from joblib.externals.loky import ProcessPoolExecutor
from sklearn import config_context, get_config
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.model_selection import (
    train_test_split,
)
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_consistent_length

from sklembed._table.columns import missing_cells, take_rows
from sklembed._validation import (
    check_at_least_one,
    check_no_missing_label,
    is_a_classifier,
)
from sklembed.encoders import FrozenEncoder, prefetch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_NOT_TRAINED = (
    "mean",
    "scale",
    "n_batches",
    "num_batches_tracked",
)  # among a head's weights


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
        :class:`FusionClassifier`, or scikit-learn's ``MLPClassifier`` is trained an epoch at a
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
    if not is_a_classifier(head):
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
    check_at_least_one("n_epochs", n_epochs)


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
        job = executor.submit(
            _measure, arm, pipeline, split, n_epochs, folder, get_config()
        )
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
                figures["reading pass s"] = _seconds_of_encoders(
                    meter, features.transform, X
                )
            tick = perf_counter()
            predicted = head.predict(features.transform(X_test))
            tock = perf_counter()
            head.predict(features.transform(X_test))
            end = perf_counter()
    return figures | {
        "predict s": tock - tick,
        "predict again s": end - tock,
        "peak MiB": _peak_mib(),
        "stored bytes": sum(
            path.stat().st_size for path in Path(folder).glob("store.sqlite*")
        ),
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
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # an epoch alone seldom suffices
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
    from sklembed.fusion import FusionClassifier

    head = FusionClassifier(
        hidden_layer_sizes=(2,),
        blocks={"all": slice(0, 2)},
        max_epochs=1,
        device=device,
    )
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
    if (
        status.exists()
    ):  # elsewhere than here, the peak may include what the parent process had
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
        return math.prod(np.shape(head.coef_)) + np.size(
            getattr(head, "intercept_", ())
        )
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
    return (
        float(max(1, math.ceil((once - read) / (anew - read))))
        if anew > read
        else math.inf
    )
