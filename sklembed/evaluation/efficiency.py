"""Cost of training on stored embeddings and of encoding anew: time, memory and disk."""

import math
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
from sklearn.model_selection import train_test_split
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
from sklembed.encoders.frozen import frozen_encoders
from sklembed.evaluation.memory import peak_mib


def efficiency_report(pipeline, X, y, *, test_size=0.25, n_epochs=2, random_state=None):
    """Measure the cost of encoding each cell once, and of encoding it in every epoch.

    [1]_ compares fusion of stored embeddings with the same heads on raw data, where the
    frozen encoders run in every epoch. It derives memory from the sizes of tensors.
    Here both arms are run and measured. Each has a fresh process, so that neither
    inherits models or peak memory from the other:

    - "raw": encoders have no store. All training rows are encoded before every epoch of
      the head, and the test rows at every prediction.
    - "stored": encoders share one new store on disk. The training rows are encoded
      once, and the head is trained on their vectors for the same number of epochs. The
      vectors are then read back once, as the next fit on a fold or a candidate would
      do.

    Both arms train the head on the same features, as returned by `fit_transform` of the
    preceding steps. Later passes of the raw arm yield equal vectors and are only timed.

    Parameters
    ----------
    pipeline : :class:`~sklearn.pipeline.Pipeline`
        A pipeline that ends in a classifier, the head. The preceding steps contain one
        or more :class:`~sklembed.FrozenEncoder`, also in branches and nested pipelines. The
        pipeline is cloned. Stores of its encoders are neither read nor written, and its
        `memory` is not used.

        A head with the parameters `max_epochs` and `warm_start`, such as
        :class:`~sklembed.FusionClassifier`, or scikit-learn's ``MLPClassifier`` is trained one
        epoch at a time. `n_epochs` overrides its number of epochs, and its optimizer
        restarts in each. Any other classifier is fitted once; `n_epochs` then only sets
        how often the raw arm encodes.

    X : DataFrame, array-like or list of shape (n_samples, ...)
        The input of `pipeline`.

    y : array-like of shape (n_samples,) or (n_samples, n_labels)
        Classes, or a 0/1 column for each label.

    test_size : float or int, default=0.25
        Fraction or number of rows in the test set. The split is stratified if each
        class has enough rows.

    n_epochs : int, default=2
        Number of epochs of the head.

    random_state : int, RandomState instance or None, default=None
        Seeds the split. Steps of the pipeline have their own seeds: pass integers there
        to get equal accuracies in both arms.

    Returns
    -------
    report : DataFrame
        A row for each arm, "raw" and "stored", with the columns

        - "encode s": seconds in which encoders work on the training rows, over all
          epochs. Time in which several encoders work at once counts once.
        - "fit s": seconds of all other training, of the head and of intermediate steps.
        - "predict s": seconds from the cells of the test rows to labels. The stored arm
          encodes and stores cells that do not occur in training rows.
        - "predict again s": the same for a second prediction, in which the stored arm
          reads the vectors.
        - "peak MiB": peak resident memory of the process, including data, libraries and
          models, but not the memory of an accelerator. The stored arm loads the models
          to encode once; later fits on the same store do not load them. NaN on Windows.
        - "stored bytes": size of the store's file, with the vectors of all rows.
        - "cells encoded": number of cells that a model has encoded, over all epochs and
          predictions. In each pass every distinct cell is encoded once.
        - "parameters trained": number of trained parameters of the head. NaN if it has
          none of ``n_parameters_``, ``coef_`` and ``coefs_``.
        - "accuracy": on the test rows.
        - "breaks even at epochs": the smallest number of epochs for which encoding in
          each takes at least as long as encoding and storing once. NaN for the raw arm.
        - "breaks even at fits": the smallest number of fits for which storing pays.
          Each fit needs all vectors once: the raw arm encodes them, the other reads
          them after the first fit. Infinite if reading is not faster than encoding; NaN
          for the raw arm.

    Raises
    ------
    TypeError
        If `pipeline` is not a Pipeline, its last step is not a classifier, or
        `n_epochs` is not an integer.
    ValueError
        If no step before the last contains an encoder, :func:`~sklembed.prefetch` cannot
        determine the input of one, `n_epochs` is below 1, or a label is missing.

    Notes
    -----
    Loading of models and libraries affects only the memory. Before timing starts, each
    process encodes a few rows, which are discarded. If a step trains with torch, a tiny
    head is trained too. In both processes parallel jobs run as threads.

    The pipeline and the rows are sent to the processes by cloudpickle. Functions and
    classes of a script or notebook therefore need no ``if __name__ == "__main__"``. Run
    the report on an otherwise idle machine, since other load affects the times.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector
       Embedding Alignment Approach. arXiv 2406.02601.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklembed import CallableBackend, FrozenEncoder
    >>> from sklembed.evaluation import efficiency_report
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> lengths = CallableBackend(
    ...     load, name="lengths", version="1", modality="text", n_features=2
    ... )
    >>> pipeline = make_pipeline(FrozenEncoder(lengths), LogisticRegression())
    >>> colours = ["red", "blue", "green", "pink"]
    >>> X = [*colours, "a red cat", "a blue dog", "a green cow", "a pink pig"]
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
    figures = {}
    for arm in ("raw", "stored"):
        figures[arm] = _run_in_subprocess(arm, clone(pipeline), split, n_epochs)
    return _tabulate(figures)


def _check_pipeline(pipeline, n_epochs):
    """Validate the parameters before any work."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"pipeline must be a scikit-learn Pipeline; got {pipeline!r}. Join the "
            "encoder and the classifier by make_pipeline."
        )
    name, head = pipeline.steps[-1]
    if not is_a_classifier(head):
        raise TypeError(
            f"The pipeline's last step must be a classifier; {name!r} is {head!r}. "
            "Append one, such as LogisticRegression()."
        )
    if not frozen_encoders(pipeline[:-1]):
        raise ValueError(
            f"No step of the pipeline before {name!r} contains a FrozenEncoder; the "
            f"steps are {list(pipeline.named_steps)}. Add one before the classifier."
        )
    check_at_least_one("n_epochs", n_epochs)


def _split(X, y, test_size, random_state):
    """Return training and test rows of X and y, stratified if the classes allow it."""
    y = np.asarray(y)
    options = {"test_size": test_size, "random_state": random_state}
    try:
        return train_test_split(X, y, stratify=y, **options)
    except ValueError:  # a class has too few rows
        return train_test_split(X, y, **options)


def _run_in_subprocess(arm, pipeline, split, n_epochs):
    """Measure one arm in a new process; return a dict of figures."""
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
    folder = Path(folder)
    store = folder / "store.sqlite" if arm == "stored" else None
    with config_context(**config), parallel_config(backend="threading"):
        _warm_up(pipeline, X, folder / "warm-up.sqlite")
        _set_stores(pipeline, store)
        features, head = pipeline[:-1], pipeline[-1]
        with _metered_encoders() as meter:
            figures = _train(features, head, X, y, n_epochs, meter, arm == "raw")
            if store is not None:
                seconds = _encoding_seconds(meter, features.transform, X)
                figures["reading pass s"] = seconds
            for key in ("predict s", "predict again s"):
                start = perf_counter()
                predicted = head.predict(features.transform(X_test))
                figures[key] = perf_counter() - start
    store_files = folder.glob("store.sqlite*")
    return figures | {
        "peak MiB": peak_mib(),
        "stored bytes": sum(path.stat().st_size for path in store_files),
        "cells encoded": meter.cells,
        "parameters trained": n_parameters(head),
        "accuracy": float(accuracy_score(y_test, predicted)),
    }


def _train(features, head, X, y, n_epochs, meter, encode_each_epoch):
    """Train all steps; encode the rows for the first epoch only, or for each."""
    epoch_params = _single_epoch_params(head)
    head.set_params(**epoch_params)
    start = perf_counter()
    # All epochs use the features of the first pass. After a cross-fitted step,
    # transform would leak the labels of the training rows to the head.
    vectors = features.fit_transform(X, y)
    passes = [meter.seconds]
    for epoch in range(n_epochs):
        if encode_each_epoch and epoch > 0:
            passes.append(_encoding_seconds(meter, features.transform, X))
        if epoch_params or epoch == n_epochs - 1:
            with warnings.catch_warnings():
                # A single epoch rarely converges.
                warnings.simplefilter("ignore", ConvergenceWarning)
                head.fit(vectors, y)
    return {
        "encode s": sum(passes),
        "fit s": perf_counter() - start - sum(passes),
        "encoding pass s": sum(passes) / len(passes),
    }


def _single_epoch_params(head):
    """Return parameters by which `fit` adds one epoch, if the head has epochs."""
    parameters = head.get_params(deep=False)
    if {"max_epochs", "warm_start"} <= parameters.keys():
        return {"max_epochs": 1, "warm_start": True}
    if isinstance(head, MLPClassifier) and head.solver != "lbfgs":
        return {"max_iter": 1, "warm_start": True}
    return {}


def _set_stores(pipeline, store):
    """Set the store of all encoders, and disable the memory of all pipelines."""
    pipeline.set_params(
        **{f"{path}__store": store for path in frozen_encoders(pipeline)}
    )
    for step in [pipeline, *pipeline.get_params(deep=True).values()]:
        if isinstance(step, Pipeline):
            step.set_params(memory=None)


def _warm_up(pipeline, X, temporary_store):
    """Load all models and libraries by a minimum of encoding and training."""
    features = clone(pipeline[:-1])
    _set_stores(features, temporary_store)
    prefetch(features, take_rows(X, _rows_covering_columns(X)))
    devices = set()
    for step in pipeline.get_params(deep=True).values():
        is_from_sklembed = type(step).__module__.startswith("sklembed.")
        if is_from_sklembed and hasattr(step, "max_epochs"):
            devices.add(step.device)
    for device in sorted(devices):
        warm_up_torch(device)


def _rows_covering_columns(X):
    """Return a few rows in which each column has a cell."""
    if isinstance(X, list):
        X = pd.Series(X, dtype=object)
    missing = missing_cells(X)
    observed = ~missing.reshape(len(missing), -1)
    first_rows = observed.argmax(axis=0)
    rows = np.unique(first_rows[observed.any(axis=0)])
    return rows if len(rows) else np.array([0])


def warm_up_torch(device):
    """Train a tiny head, since torch imports and initializes modules on first use."""
    from sklembed.fusion import FusionClassifier

    head = FusionClassifier(
        hidden_layer_sizes=(2,),
        blocks={"all": slice(0, 2)},
        max_epochs=1,
        device=device,
    )
    head.fit(np.eye(4, 2, dtype=np.float32), [0, 1, 0, 1])


class _Meter:
    """Seconds in which at least one encoder of this process works; encoded cells."""

    def __init__(self):
        self.seconds = 0.0
        self.cells = 0
        self._n_active = 0
        self._start = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def timing(self):
        """Count the time in the context; time shared with other threads counts once."""
        with self._lock:
            if self._n_active == 0:
                self._start = perf_counter()
            self._n_active += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_active -= 1
                if self._n_active == 0:
                    self.seconds += perf_counter() - self._start

    def count(self, n_cells):
        """Count cells that were encoded."""
        with self._lock:
            self.cells += n_cells


@contextmanager
def _metered_encoders():
    """Meter all encoders of this process, also clones, by patching their class."""
    meter = _Meter()

    def timed(method):
        @wraps(method)
        def call(encoder, *args, **kwargs):
            with meter.timing():
                return method(encoder, *args, **kwargs)

        return call

    def counted(method):
        @wraps(method)
        def generate(encoder, *args, **kwargs):
            with closing(method(encoder, *args, **kwargs)) as results:
                for positions, values in results:
                    meter.count(len(positions))
                    yield positions, values

        return generate

    originals = {}
    wrappers = {"fit_transform": timed, "transform": timed, "_encode": counted}
    for name, wrap in wrappers.items():
        originals[name] = vars(FrozenEncoder)[name]
        setattr(FrozenEncoder, name, wrap(originals[name]))
    try:
        yield meter
    finally:
        for name, method in originals.items():
            setattr(FrozenEncoder, name, method)


def _encoding_seconds(meter, transform, X):
    """Run a transform, and return only the seconds in which encoders work."""
    before = meter.seconds
    transform(X)
    return meter.seconds - before


def n_parameters(head):
    """Return the number of trained parameters of a head, or NaN if unknown."""
    if hasattr(head, "n_parameters_"):
        return head.n_parameters_
    if hasattr(head, "coefs_"):  # one array per layer
        return sum(array.size for array in [*head.coefs_, *head.intercepts_])
    if hasattr(head, "coef_"):
        n_intercepts = np.size(getattr(head, "intercept_", ()))
        return math.prod(np.shape(head.coef_)) + n_intercepts
    return math.nan


def _tabulate(figures):
    """Put the figures of both arms into one table, with the break-even points."""
    raw, stored = figures["raw"], figures["stored"]
    encode, store = raw["encoding pass s"], stored["encoding pass s"]
    read = stored["reading pass s"]
    report = pd.DataFrame.from_dict(figures, orient="index").rename_axis("arm")
    report = report.drop(columns=["encoding pass s", "reading pass s"])
    report["breaks even at epochs"] = [math.nan, _epochs_to_break_even(store, encode)]
    report["breaks even at fits"] = [math.nan, _fits_to_break_even(store, encode, read)]
    return report


def _epochs_to_break_even(store, encode):
    """Return the smallest N >= 1 with store <= N * encode."""
    if encode <= 0:
        return math.inf
    return float(max(1, math.ceil(store / encode)))


def _fits_to_break_even(store, encode, read):
    """Return the smallest k >= 1 with store + (k - 1) * read <= k * encode."""
    if encode <= read:
        return math.inf
    return float(max(1, math.ceil((store - read) / (encode - read))))
