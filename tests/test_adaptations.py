"""compare_adaptations: its scores, costs and tests, resuming, and its display."""

import gc
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import ttest_1samp
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import make_column_selector
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import FitFailedWarning, UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    EmbeddingRegressor,
    FinetunedClassifier,
    FrozenEncoder,
    KernelFusionClassifier,
    PerModalityUnion,
)
from sklembed.evaluation import adaptations as module
from sklembed.evaluation import arms as arms_module
from sklembed.evaluation import compare_adaptations
from sklembed.evaluation.memory import PeakMemory, peak_mib
from sklembed.evaluation.records import RecordFile, hash_settings
from sklembed.plots import AdaptationDisplay

matplotlib.use("Agg")
BLOCKS = {"text": slice(0, 16), "image": slice(16, 36)}
CV = StratifiedKFold(3, shuffle=True, random_state=0)
LR = LogisticRegression(C=10, max_iter=1000)
NEIGHBOURS = KNeighborsClassifier(5)


@pytest.fixture(scope="module", autouse=True)
def _light_heap():
    """Spare garbage collections the modules and tests in memory.

    `compare_adaptations` collects before each fit, which would take most of its time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = rng.normal(size=(60, 36)) + 0.7 * rng.normal(size=(3, 36))[y]
    X[::7, 16:] = np.nan  # missing images
    return X, np.array(["a", "b", "c"])[y]


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch):
    monkeypatch.setattr(module, "_warm_up", lambda: None)


def compare(vectors, *, estimators=None, **options):
    X, y = vectors
    estimators = estimators or {"lr": LR}
    options = {"blocks": BLOCKS, "cv": CV, "random_state": 0} | options
    return compare_adaptations(X, y, estimators=estimators, **options)


def adapt(X, y, train, test, transform):
    """Adapt the vectors of both blocks by the naive code that the docstring describes."""
    parts = []
    for block in BLOCKS.values():
        Z, observed = X[:, block], ~np.isnan(X[:, block]).any(axis=1)
        rows, new = train[observed[train]], test[observed[test]]
        fitted, adapted = transform(Z[rows], y[rows], Z[new])
        mean = fitted.mean(axis=0)
        scale = np.sqrt((np.linalg.norm(fitted - mean, axis=1) ** 2).mean())
        part = np.zeros((len(X), fitted.shape[1]))  # the mean is 0 after centring
        part[rows], part[new] = (fitted - mean) / scale, (adapted - mean) / scale
        parts.append(part)
    Z = np.hstack(parts)
    return Z[train], Z[test]


def fit_pca(Z, y, new):
    pca = PCA(min(Z.shape)).fit(Z)
    return pca.transform(Z), pca.transform(new)


def fit_projector(projector, Z, y, new):
    return projector.fit_transform(Z, y), projector.transform(new)


def test_scores_are_those_of_the_adapted_vectors(vectors):
    X, y = vectors
    projector = ContrastiveProjector(
        n_components=3, hidden_layer_sizes=(4,), max_epochs=2, cv=2, random_state=0
    )
    estimators = {"lr": LR, "5-NN": NEIGHBOURS}
    arms = {"raw": "none", "PCA": "pca", "projected": projector}
    folds, summary = compare(vectors, adaptations=arms, estimators=estimators)
    transforms = {
        "raw": lambda Z, y, new: (Z, new),
        "PCA": fit_pca,
        "projected": partial(fit_projector, projector),
    }
    assert len(folds) == 3 * 2 * 3 and (folds["error"] == "").all()
    for (arm, name), rows in folds.groupby(["adaptation", "estimator"]):
        expected = []
        for train, test in CV.split(X, y):
            Z, new = adapt(X, y, train, test, transforms[arm])
            expected.append(estimators[name].fit(Z, y[train]).score(new, y[test]))
        assert_allclose(rows["score"], expected, err_msg=f"{arm} {name}")
    means = folds.groupby(["adaptation", "estimator"], sort=False)["score"].mean()
    assert_allclose(summary["score"], means)
    scores = folds.pivot(index="fold", columns=["adaptation", "estimator"])["score"]
    for row in summary.to_dict("records"):
        cell = scores[row["adaptation"], row["estimator"]]
        gains = cell - scores["raw", row["estimator"]]
        assert_allclose(row["gain"], gains.mean(), atol=1e-12)
        assert row["reference"] == f"raw, {row['estimator']}"


def test_one_projection_joins_the_modalities(vectors, monkeypatch):
    small = partial(ContrastiveProjector, n_components=3, max_epochs=1, cv=None)
    monkeypatch.setattr(arms_module, "ContrastiveProjector", small)
    names = ["one projection", "per modality"]
    folds, summary = compare(vectors, adaptations=names)
    counts = summary.set_index("adaptation")["parameters"]
    # Logistic regression has three classes, and each projection six columns.
    joint, apart = small().fit(np.nan_to_num(vectors[0]), vectors[1]), 0
    for block in BLOCKS.values():
        Z = np.nan_to_num(vectors[0][:, block])
        apart += small().fit(Z, vectors[1]).n_parameters_
    assert counts["one projection"] == joint.n_parameters_ + 3 * (6 + 1)
    assert counts["per modality"] == apart + 3 * (12 + 1)


def test_ensembles_predict_themselves_and_get_groups(vectors):
    class Recorder(KernelFusionClassifier):
        groups = []

        def fit(self, X, y, groups=None):
            self.groups.append(groups)
            return super().fit(X, y)

    groups = np.arange(60) // 4
    cv = GroupKFold(3)
    arms = {"raw": "none", "kernel": Recorder(gamma=1.0, alpha=1.0)}
    folds, summary = compare(vectors, adaptations=arms, cv=cv, groups=groups)
    X, y = vectors
    kernel = KernelFusionClassifier(blocks=BLOCKS, gamma=1.0, alpha=1.0)
    expected = cross_val_score(kernel, X, y, cv=cv, groups=groups)
    assert_allclose(folds.query("estimator == 'itself'")["score"], expected)
    assert summary["reference"].tolist() == ["raw, lr", "raw, lr"]
    splits = [train for train, _ in cv.split(X, y, groups)]
    for seen, train in zip(Recorder.groups, splits, strict=True):
        assert_allclose(seen, groups[train])


def test_numbers_are_compared_by_regressors(vectors):
    X, _ = vectors
    y = X[:, 0] + 0.1 * X[:, 1]
    kernel = EmbeddingRegressor(members=["kernel"], random_state=0)
    arms, ridge = {"none": "none", "kernel": kernel}, Ridge(0.1)
    cv = KFold(3)
    folds, _ = compare((X, y), adaptations=arms, cv=cv, estimators={"ridge": ridge})
    expected = []
    for train, test in cv.split(X):
        Z, new = adapt(X, y, train, test, lambda Z, y, new: (Z, new))
        expected.append(ridge.fit(Z, y[train]).score(new, y[test]))
    scores = folds.groupby("adaptation")["score"]
    assert_allclose(scores.get_group("none"), expected)
    kernel.set_params(blocks=BLOCKS)
    expected = cross_val_score(kernel, X, y, cv=cv)
    assert_allclose(scores.get_group("kernel"), expected)
    assert list(module._default_estimators("continuous", 0))[0] == "ridge regression"
    with pytest.raises(
        ValueError, match="estimators are classifiers, but y has numbers"
    ):
        compare((X, y))


@pytest.mark.parametrize("seed", range(3))
def test_the_t_test_is_corrected_for_overlap(seed):
    gains = np.random.default_rng(seed).normal(0.5, 1, size=8)
    plain = module.corrected_t_test(gains, ratio=0.0)
    assert_allclose(plain["p"], ttest_1samp(gains, 0).pvalue)
    # In a test of twice the variance, the statistic is smaller by sqrt(2).
    doubled = module.corrected_t_test(gains, ratio=1 / 8)
    spread = gains.mean() + (gains - gains.mean()) * np.sqrt(2)
    assert_allclose(doubled["p"], ttest_1samp(spread, 0).pvalue)
    with_failure = module.corrected_t_test(np.r_[gains, np.nan], ratio=0.0)
    assert with_failure == plain
    assert np.isnan(module.corrected_t_test(np.zeros(4), ratio=0.25)["p"])


class Counted(LogisticRegression):
    """Counts its fits, and fails or stops in some."""

    fits = Counter()

    def __init__(self, *, error=None, at=None, C=1.0):
        super().__init__(C=C, max_iter=1000)
        self.error, self.at = error, at

    def fit(self, X, y):
        Counted.fits["all"] += 1
        if self.error is not None and Counted.fits["all"] == self.at:
            raise self.error
        return super().fit(X, y)


@pytest.fixture(autouse=True)
def _reset_counts():
    Counted.fits.clear()


ARMS = ["none", "pca"]
TWO_FOLDS = StratifiedKFold(2, shuffle=True, random_state=0)


def run(vectors, path, counted=None, **options):
    """Return the comparison, and the number of fits that it took."""
    Counted.fits.clear()
    estimators = {"counted": counted or Counted()}
    options = {"adaptations": ARMS, "path": path, "cv": TWO_FOLDS} | options
    comparison = compare(vectors, estimators=estimators, **options)
    return comparison, Counted.fits["all"]


def test_an_interrupted_run_resumes(vectors, tmp_path, monkeypatch):
    path = tmp_path / "new" / "cells.jsonl"
    fit = Counted.fit

    def interrupt(self, X, y):
        if Counted.fits["all"] == 3:
            raise KeyboardInterrupt
        return fit(self, X, y)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Counted, "fit", interrupt)
        run(vectors, path)
    with path.open("a") as file:
        file.write('{"key": "a9')  # the process ended while it wrote
    resumed, n_fits = run(vectors, path)
    assert n_fits == 1
    expected, n_fits = run(vectors, None)
    assert n_fits == 4
    columns = ["adaptation", "fold", "score", "parameters"]
    pd.testing.assert_frame_equal(resumed.folds[columns], expected.folds[columns])
    again, n_fits = run(vectors, path, n_jobs=1, verbose=0)
    assert n_fits == 0
    pd.testing.assert_frame_equal(again.folds, resumed.folds)
    pd.testing.assert_frame_equal(again.summary, resumed.summary)


def test_results_of_other_rows_or_settings_are_not_read(vectors, tmp_path):
    X, y = vectors
    path = tmp_path / "cells.jsonl"
    run(vectors, path)
    new_names = {"a": "none", "b": "pca"}
    assert run(vectors, path, adaptations=new_names)[1] == 0
    assert run(vectors, path, adaptations=ARMS[::-1])[1] == 0
    changed = X.copy()
    changed[5, 3] += 1e-6
    other_cv = StratifiedKFold(2, shuffle=True, random_state=1)
    other_blocks = {"text": slice(0, 17), "image": slice(17, 36)}
    assert run((changed, y), path)[1] == 4
    other_y = np.r_[y[1::-1], y[2:]]
    assert run((X, other_y), path, cv=list(TWO_FOLDS.split(X, y)))[1] == 4
    assert run(vectors, path, Counted(C=2.0))[1] == 4
    assert run(vectors, path, cv=other_cv)[1] == 4
    assert run((X[:, :], y), path, blocks=other_blocks)[1] == 4
    assert run(vectors, path, scoring="f1_macro")[1] == 4
    # of PCA in both folds; the vectors have no seed
    assert run(vectors, path, random_state=1)[1] == 2
    assert run(vectors, path)[1] == 0


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "table.csv"
    for content in ("a,b\n1,2\n", "a,b"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a file of records: line 1"):
            RecordFile(path).read()
        assert path.read_text() == content


def test_a_failure_is_recorded_and_tried_again(vectors, tmp_path):
    path = tmp_path / "cells.jsonl"
    failing = Counted(error=MemoryError("4 GiB"), at=2)
    match = r"failed in fold 0 \('pca' with 'counted'\): MemoryError: 4 GiB"
    with pytest.warns(FitFailedWarning, match=match):
        (folds, summary), _ = run(vectors, path, failing)
    assert folds["error"].ne("").sum() == folds["score"].isna().sum() == 1
    failed = summary.set_index("adaptation").loc["pca"]
    assert failed["failed"] == 1
    assert not np.isnan(failed[["score", "gain"]].tolist()).any()
    with pytest.raises(MemoryError, match="4 GiB") as raised:
        run(vectors, None, failing, error_score="raise")
    assert "'pca' in fold 0" in raised.value.__notes__[0]
    failing = Counted(error=MemoryError("4 GiB"), at=2)
    Counted.fits["all"] = 5
    estimators = {"counted": failing}
    options = {"adaptations": ARMS, "path": path, "cv": TWO_FOLDS}
    folds, _ = compare(vectors, estimators=estimators, **options)
    assert Counted.fits["all"] == 6 and not folds["score"].isna().any()


def test_a_killed_process_fails_for_its_own_job_only(vectors, monkeypatch):
    class Parallel:
        """Runs jobs in this process; a pool that has the job "killer" breaks."""

        def __init__(self, n_jobs, **_):
            pass

        def __call__(self, jobs):
            for function, args, _ in jobs:
                if args[2].arm.name == "killer" and args[2].fold.number == 1:
                    raise BrokenProcessPool("killed")
                yield function(*args)

    monkeypatch.setattr(module, "Parallel", Parallel)
    monkeypatch.setattr(module, "delayed", lambda run: lambda *args: (run, args, {}))
    arms = {"none": "none", "killer": "pca", "last": "none"}
    with pytest.warns(FitFailedWarning, match="fold 1 .'killer'.*: BrokenProcessPool"):
        folds, _ = compare(vectors, adaptations=arms)
    errors = folds.set_index(["adaptation", "fold"])["error"]
    assert errors[errors != ""].index.tolist() == [("killer", 1)]


def test_folds_without_a_class(vectors):
    X, y = vectors
    train, test = np.flatnonzero(y != "c"), np.flatnonzero(y == "c")
    folds = [(train[:20], train[20:]), (train, test), *CV.split(X, y)]
    scores = compare(vectors, adaptations=ARMS, cv=folds).folds["score"]
    assert not scores.isna().any()
    with pytest.warns(
        FitFailedWarning, match="compare_adaptations .*\n.*failed in fold 1"
    ):
        rows, _ = compare(vectors, adaptations="none", cv=folds, scoring="neg_log_loss")
    assert rows.set_index("fold")["score"].isna().tolist() == [False, True] + 3 * [
        False
    ]
    one_class = [(test, train)]
    with pytest.raises(ValueError, match=r"training rows of fold 0 .* class \['c'\]"):
        compare(vectors, cv=one_class)


TEXTS = [f"{word} {'ae' * (n % 5)} {n}" for n in range(10) for word in ("rose", "tin")]
LABELS = ["plant", "metal"] * 10


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(9, 4)

    def forward(self, counts):
        return self.layer(counts)


def load_network():
    def prepare(text):
        counts = Counter(text)
        return torch.tensor([float(counts[x]) for x in "aeinorsty"])

    return prepare, Network()


def test_cells_are_encoded_once(text_backend, store):
    titles = [*TEXTS, *TEXTS[:4], None, None]
    X = pd.DataFrame({"title": titles, "price": np.arange(26.0)}, index=[7] * 26)
    y = [*LABELS, *LABELS[:4], "plant", "metal"]
    encoder = FrozenEncoder(text_backend, store=store)
    union = PerModalityUnion(
        [("title", encoder, "title"), ("p", "passthrough", ["price"])]
    )
    options = {"estimators": {"lr": LR}, "adaptations": ["none"], "cv": 2}
    folds, _ = compare_adaptations(X, y, features=union, **options)
    assert encoder.stats()["encoded"] == 20
    assert (folds["encode s"] > 0).all() and (folds["predict s"] > 0).all()
    Z = np.hstack([encoder.transform(X["title"]), X[["price"]]])
    blocks = {"title": slice(0, 9), "p": [9]}
    expected, _ = compare_adaptations(Z, y, blocks=blocks, **options)
    assert_allclose(folds["score"], expected["score"])
    assert (expected["encode s"] == 0).all()
    texts, _ = compare_adaptations(TEXTS, LABELS, features=encoder, **options)
    assert encoder.stats()["encoded"] == 20 and not texts["score"].isna().any()


def test_fine_tuning_a_column(store):
    backend = CallableBackend(
        load_network, name="net", version="1", modality="text", n_features=4
    )
    encoder = FrozenEncoder(backend, store=store)
    X = pd.DataFrame({"price": np.arange(20.0), "title": [*TEXTS[:18], None, None]})
    union = PerModalityUnion([("title", encoder, "title")])
    full = FinetunedClassifier(
        encoder,
        method="full",
        max_epochs=1,
        validation_fraction=0.4,
        device="cpu",
        random_state=0,
    )
    arms = {"head": "head", "full": full, "frozen": "none"}
    folds, summary = compare_adaptations(
        X,
        LABELS,
        features=union,
        adaptations=arms,
        estimators={"lr": LR},
        cv=StratifiedKFold(2),
        random_state=0,
    )
    head = FinetunedClassifier(encoder, method="head", random_state=0)
    expected = cross_val_score(head, X["title"], LABELS, cv=StratifiedKFold(2))
    scores = folds.groupby("adaptation")["score"]
    assert_allclose(scores.get_group("head"), expected)
    parameters = summary.set_index("adaptation")["parameters"]
    assert parameters["full"] == parameters["head"] + 9 * 4 + 4
    assert set(summary["reference"]) == {"head, itself"}
    assert (folds["error"] == "").all()


def test_bad_input_is_refused_before_work(vectors, text_backend, store, monkeypatch):
    X, y = vectors

    def refused(match, kind=ValueError, X=X, y=y, **options):
        with pytest.raises(kind, match=match):
            compare((X, y), estimators=options.pop("estimators", None), **options)

    refused("no adaptation 'umap'; the names are", adaptations=["umap"])
    refused("named twice", adaptations=["none", "none"])
    refused("There is no adaptation", adaptations=[])
    refused("Pass other classifiers and", TypeError, adaptations={"lr": LR})
    refused("must be a classifier", TypeError, adaptations={"e": EmbeddingRegressor()})
    refused("X has embeddings", adaptations=["lora"])
    refused("must be a classifier or regressor", TypeError, estimators={"a": PCA()})
    refused("a dict of names", TypeError, estimators=LR)
    refused("not both", TypeError, estimators={"a": LR, "b": Ridge()})
    refused("'itself' is reserved", estimators={"itself": LR})
    refused("blocks are for", features=FrozenEncoder(text_backend, store=store))
    refused("features must be", TypeError, features=PCA(), blocks=None)
    refused("first in row 0", y=np.r_[[None], y[1:]])
    refused("its type is 'multilabel", y=np.eye(60, 3, dtype=int))
    refused("is .* text", X=np.array([["a", "b"]] * 60, dtype=object), blocks=None)
    refused("cannot be computed", scoring="roc_auc")
    refused("must be one score", TypeError, scoring=["accuracy", "f1_macro"])
    refused("error_score must be", error_score="ignore")
    refused("cv has no folds", cv=[])
    refused("Fold 0 of cv has 30 .* and 0 test", cv=[(np.arange(30), [])])
    match = "scoring='neg_log_loss' needs probabilities .* 'ridge'"
    refused(match, scoring="neg_log_loss", estimators={"ridge": RidgeClassifier()})
    table = pd.DataFrame({"title": TEXTS, "note": TEXTS})
    encoder = FrozenEncoder(text_backend, store=store)
    twice = [("t", encoder, "title"), ("n", encoder, "note")]
    cells = {"X": table, "y": LABELS, "blocks": None}
    features = PerModalityUnion(twice)
    refused(r"\['title', 'note'\]", adaptations=["full"], features=features, **cells)
    options = {"adaptations": ["full"], "column": "note", "features": features}
    with monkeypatch.context() as patch:
        patch.delattr(CallableBackend, "trainable")
        refused("is run without torch", **options, **cells)
    options["adaptations"] = ["none", "lora"]
    monkeypatch.setattr(arms_module, "find_spec", lambda name: None)
    refused("sklembed\\[finetune\\]", ImportError, **options, **cells)
    for settings, match in (
        ({"store": None}, "store=None"),
        ({"output": "tokens"}, "tokens"),
    ):
        if "output" in settings:
            settings["store"] = store
        features = FrozenEncoder(text_backend, **settings)
        refused(match, X=TEXTS, y=LABELS, blocks=None, features=features)
    assert encoder.stats()["encoded"] == 0


class Allocating(ClassifierMixin, BaseEstimator):
    def fit(self, X, y):
        np.ones(2**23).sum()  # 64 MiB
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset")
def test_peak_memory_is_of_the_job_alone(vectors):
    big = np.ones(2**25)  # 256 MiB, before
    del big
    estimators = {"big": Allocating(), "lr": LR}
    folds, _ = compare(vectors, adaptations="none", estimators=estimators)
    peaks = folds.groupby("estimator")["peak MiB"]
    assert (abs(peaks.get_group("big") - 64) < 8).all()
    assert (peaks.get_group("lr") < 16).all()
    assert peak_mib() > 64
    with PeakMemory() as memory:
        pass
    assert memory.mib < 4


def test_the_display_marks_significant_gains(vectors):
    comparison = compare(vectors, adaptations=["none", "pca", "ensemble"])
    summary = comparison.summary.copy()
    summary["gain"], summary["p"] = [0, 0.1, -0.2], [np.nan, 0.01, 0.3]
    summary.loc[2, "failed"] = 1
    display = AdaptationDisplay(summary=summary).plot()
    texts = [text.get_text() for text in display.axes_[0].texts]
    assert texts[0] == f"{summary['score'][0]:.3f}"
    assert texts[1].endswith("+0.100 *")
    assert texts[2].endswith("-0.200\n1 failed")
    heat = display.axes_[0].images[0].get_array()
    assert_allclose(np.asarray(heat)[:, 0], summary["gain"])
    points = [container[0] for container in display.axes_[1].containers]
    seconds = summary["encode s"] + summary["fit s"]
    assert_allclose([point.get_xdata()[0] for point in points], seconds)
    assert_allclose([point.get_ydata()[0] for point in points], summary["score"])
    matplotlib.pyplot.close(display.figure_)
    failed = AdaptationDisplay.from_comparison(comparison)
    failed.summary.loc[1, ["score", "gain", "p", "fit s", "encode s"]] = np.nan
    failed.plot()
    assert failed.axes_[0].texts[1].get_text() == "failed"
    matplotlib.pyplot.close(failed.figure_)


def test_functions_are_settings():
    hashes = set()
    for function in (lambda X: 2 * X, lambda X: 3 * X, lambda X: 2 * X):
        model = make_pipeline(FunctionTransformer(function), LR)
        hashes.add(hash_settings(model))
    assert len(hashes) == 2


def test_other_functions_and_objects_are_other_settings():
    def scale(factor):
        return lambda X: factor * X

    def nested(X):
        return [value + 1 for value in X] if X else (lambda: 2)()

    def changed(X):
        return [value + 1 for value in X] if X else (lambda: 3)()

    def itself(X):
        return itself(X)

    changed.__qualname__ = nested.__qualname__
    selectors = [make_column_selector("a"), make_column_selector("b")]
    series = [pd.Series(np.arange(500)), pd.Series(np.arange(500))]
    series[1][250] = -1
    different = [
        (scale(2), scale(3)),
        (nested, changed),
        (lambda X, n=2: n * X, lambda X, n=3: n * X),
        (partial(scale, 2), partial(scale, 3)),
        tuple(make_scorer(lambda y, p, n=n: n) for n in (1, 2)),
        tuple(selectors),
        tuple(series),
        (itself, scale(itself)),
    ]
    for first, second in different:
        assert hash_settings(first) != hash_settings(second)
    assert hash_settings(scale(2)) == hash_settings(scale(2))
    assert hash_settings(selectors[0]) == hash_settings(make_column_selector("a"))


def test_transformers_that_also_predict_are_transformers(vectors):
    adaptations = {"none": "none", "lda": LinearDiscriminantAnalysis()}
    X, y = vectors
    folds, _ = compare((X[:, :16], y), adaptations=adaptations, blocks=None)
    assert folds["estimator"].eq("lr").all() and folds["error"].eq("").all()
    expected = []
    for train, test in CV.split(X, y):
        lda = LinearDiscriminantAnalysis().fit(X[train, :16], y[train])
        Z = lda.transform(X[:, :16])
        Z = (Z - Z[train].mean(axis=0)) / np.sqrt(Z[train].var(axis=0).sum())
        expected.append(clone(LR).fit(Z[train], y[train]).score(Z[test], y[test]))
    assert_allclose(folds.loc[folds["adaptation"] == "lda", "score"], expected)


def test_a_fold_whose_score_is_undefined_is_counted(vectors):
    X, y = vectors
    is_a, rows = y == "a", np.arange(60)
    cv = [(rows[:30], np.flatnonzero(~is_a)), (rows[:30], rows[30:])]
    with pytest.warns(UndefinedMetricWarning):
        _, summary = compare((X, is_a), adaptations=["none"], cv=cv, scoring="roc_auc")
    assert summary["failed"].tolist() == [1]


def test_cells_before_a_step_are_part_of_the_table(text_backend, store):
    lower = FunctionTransformer(lambda frame: frame.map(str.lower))
    branches = [
        (
            "lower",
            make_pipeline(lower, FrozenEncoder(text_backend, store=store)),
            ["a"],
        ),
        ("length", FunctionTransformer(lambda frame: frame.map(hash)), ["a"]),
    ]
    keys = set()
    for texts in (["a cat", "Dog"], ["A cat", "Dog"], ["a cat", "Dogs"]):
        table = pd.DataFrame({"a": texts})
        keys.add(arms_module.read_table(table, PerModalityUnion(branches), None).key())
    assert len(keys) == 3
