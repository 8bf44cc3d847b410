"""Compare EmbeddingClassifier and EmbeddingRegressor with tuned baselines.

The data are MiniLM vectors of names and titles, EfficientNet-lite0 vectors of images,
and four numbers of clip art. There are six tasks with classes, one with several labels,
and two targets that are numbers. Folds are random, or keep a subcategory or a creator
together. Baselines are tuned inside each outer training fold, on inner folds of the same
kind; no choice uses a test row. Only preprocessing without labels (means, PCA, tf-idf) is
fitted once per outer fold.

The probabilities of a tuned baseline are scaled by one temperature, fitted on
out-of-fold scores; "as fitted" is without. A missing title is imputed by the mean, with
an indicator, unless the estimator handles missing values itself.

Each (task, arm, fold) is a job, and its result a line of the cache, so that a run can be
resumed. Seconds are wall time of one job with `--threads` threads, of a fit with all its
tuning, and of the prediction of labels and probabilities. A job that had to wait for other
processes (wall time above its CPU time) is marked as busy, and
`--refresh busy` runs such jobs again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from baselines import (
    BASELINES,
    N_VECTOR_COLUMNS,
    SVM_AS_USERS_TUNE_IT,
    VECTORS,
    Model,
    Output,
    Rows,
    predict_with,
    with_all_classes,
)
from comparison import difference, show, summarise
from joblib import Parallel, delayed
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    log_loss,
    r2_score,
)
from sklearn.model_selection import (
    GroupKFold,
    KFold,
)
from threadpoolctl import threadpool_limits
from vectors import BLOCKS, LOADERS, TITLES, load, outer_folds

import sklembed
from sklembed import (
    EmbeddingStore,
)

NUMBERS = ["svg_kb", "n_path", "n_group", "n_gradient"]


# Tasks


@dataclass(frozen=True)
class Task:
    """A data set, its target, and its folds.

    `base` names the same task without table columns. Its baselines count as baselines
    of this task too.
    """

    dataset: str
    kind: str  # "classes", "labels" or "number"
    grouped: bool
    target: str | None = None
    with_table: bool = False
    base: str | None = None


TASKS = {
    "emoji random": Task("emoji", "classes", False),
    "emoji by subcategory": Task("emoji", "classes", True),
    "clip art random": Task("openclipart", "classes", False),
    "clip art by creator": Task("openclipart", "classes", True),
    "clip art and numbers random": Task(
        "openclipart", "classes", False, with_table=True, base="clip art random"
    ),
    "clip art and numbers by creator": Task(
        "openclipart", "classes", True, with_table=True, base="clip art by creator"
    ),
    "emoji keywords": Task("emoji", "labels", False),
    "paths by creator": Task("openclipart", "number", True, "n_path"),
    "paths by creator, with table": Task(
        "openclipart", "number", True, "n_path", True, "paths by creator"
    ),
    "size by creator": Task("openclipart", "number", True, "svg_kb"),
    "size by creator, with table": Task(
        "openclipart", "number", True, "svg_kb", True, "size by creator"
    ),
}
MEASURES = {
    "classes": [
        "macro-F1",
        "log loss",
        "log loss as fitted",
        "calibration error",
    ],
    "labels": ["micro-F1", "average precision, macro", "average precision, micro"],
    "number": ["R2"],
}
LOWER_IS_BETTER = {"log loss", "log loss as fitted", "calibration error"}
# Measures in which a best baseline is chosen in hindsight.
COMPARED = {
    "classes": ["macro-F1", "log loss"],
    "labels": MEASURES["labels"],
    "number": ["R2"],
}


@lru_cache(maxsize=2)
def load_task(name):
    """Return all rows of a task, and its groups even if its folds are random."""
    task = TASKS[name]
    X, data = load(task.dataset)
    numbers = []
    if task.with_table:
        numbers = [column for column in NUMBERS if column != task.target]
    raw = data.data[[TITLES[task.dataset], *numbers]]
    if task.kind == "classes":
        y = data.target.to_numpy()
    elif task.kind == "labels":
        y = keywords(data)
    else:
        y = np.log1p(data.data[task.target].to_numpy(float))
    X = np.hstack([X.astype(float), raw[numbers].to_numpy(float)])
    groups = data.groups if task.grouped else None
    n_classes = len(data.target_names) if task.kind == "classes" else 0
    return Rows(task.kind, X, raw, y, groups, n_classes, (name,))


def keywords(data):
    """Return the keywords of at least 30 emoji as indicators."""
    words = data.data["keywords"].fillna("").str.get_dummies(sep=", ")
    frequent = words.loc[:, words.sum(axis=0) >= 30]
    return frequent.drop(columns="", errors="ignore").to_numpy()


def split(name, fold, n_folds):
    """Return the training and the test rows of an outer fold."""
    rows = load_task(name)
    if rows.kind == "classes":
        folds = outer_folds(rows.y, rows.groups, rows.groups is not None, n_folds)
    elif rows.groups is None:
        folds = KFold(n_folds, shuffle=True, random_state=0).split(rows.X)
    else:
        folds = GroupKFold(n_folds).split(rows.X, rows.y, rows.groups)
    train, test = list(folds)[fold]
    base = TASKS[name].base or name
    return rows.take(train, (base, fold, n_folds)), rows.take(test, None)


# Scores


def measure(rows, output):
    """Return the measures of predictions on test rows."""
    if rows.kind == "number":
        return {"R2": r2_score(rows.y, output.scores)}
    if rows.kind == "labels":
        precision = partial(average_precision_score, rows.y, output.scores)
        return {
            "micro-F1": f1_score(
                rows.y, output.labels, average="micro", zero_division=0
            ),
            "average precision, macro": precision(average="macro"),
            "average precision, micro": precision(average="micro"),
        }
    nll = partial(log_loss, rows.y, labels=np.arange(rows.n_classes))
    as_fitted = output.scores if output.as_fitted is None else output.as_fitted
    return {
        "macro-F1": f1_score(rows.y, output.labels, average="macro"),
        "log loss": nll(output.scores),
        "log loss as fitted": nll(as_fitted),
        "calibration error": calibration_error(rows.y, output.scores),
    }


def calibration_error(y, probabilities, n_bins=15):
    """Return the expected calibration error of the top label, in bins of equal width."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == y
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, correct - confidence, minlength=n_bins)
    return np.abs(gaps).sum() / len(y)


# EmbeddingClassifier and EmbeddingRegressor


def fit_ours(train, members="auto"):
    """Fit the estimator with default parameters; also return its members."""
    if train.kind == "number":
        model = sklembed.EmbeddingRegressor(members=members, random_state=0)
    else:
        model = sklembed.EmbeddingClassifier(members=members, random_state=0)
    # Unlike the tuning of the baselines, the fit does not use the groups.
    model.fit(wide_table(train), train.y)
    models = {"": Model(lambda rows: predict_with(model, wide_table(rows), rows))}
    for name in model.member_predictions(wide_table(train).iloc[:2]):
        seconds = model.seconds_.get(name, np.nan)
        models[name] = Model(partial(predict_member, model, name), seconds)
    return models


def wide_table(rows):
    """Return the vectors and numbers as columns such as `text__0` and `table__svg_kb`."""
    names = []
    for block, columns in BLOCKS.items():
        names += [f"{block}__{i}" for i in range(columns.stop - columns.start)]
    vectors = rows.X[:, VECTORS].astype(np.float32)
    vectors = pd.DataFrame(vectors, columns=names, index=rows.raw.index)
    return pd.concat([vectors, rows.table.add_prefix("table__")], axis=1)


def predict_member(model, name, rows):
    """Return the output of one member of a fitted estimator."""
    values = model.member_predictions(wide_table(rows))[name]
    if rows.kind == "number":
        return Output(values, values)
    if rows.kind == "labels":
        return Output(values, values > 0.5)
    probabilities = with_all_classes(values, model.classes_, rows)
    return Output(probabilities, probabilities.argmax(axis=1))


def fit_all_members(train):
    """Fit the estimator with all members that the target allows."""
    members = ["linear", "kernel", "svm", "projection", "trees"]
    if train.kind != "classes":
        members.remove("svm")
    return fit_ours(train, members)


OURS = "sklembed"
ALL_MEMBERS = "sklembed, all members"
ARMS = {
    kind: arms | {OURS: fit_ours, ALL_MEMBERS: fit_all_members}
    for kind, arms in BASELINES.items()
}


# Jobs and their cache


def run_cell(job, n_threads):
    """Fit and evaluate an arm in an outer fold; return a record for the cache."""
    task, arm, fold, n_folds = job
    train, test = split(task, fold, n_folds)
    with threadpool_limits(n_threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers that do not converge
        wall, cpu = time.perf_counter(), time.process_time()
        models = ARMS[train.kind][arm](train)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows = []
        for name, model in models.items():
            tick = time.perf_counter()
            output = model.predict(test)
            seconds = {
                "fit s": wall if model.seconds is None else model.seconds,
                "predict s": time.perf_counter() - tick,
            }
            label = f"{arm}: {name}" if name else arm
            rows.append({"arm": label} | measure(test, output) | seconds)
    return {
        "job": job,
        "sources": hash_sources() if is_ours(arm) else None,
        "threads": n_threads,
        # A quiet job computes all the time; several threads compute more than that.
        "busy": wall > 1.1 * cpu,
        "CPU s": cpu,
        "rows": rows,
    }


def hash_sources():
    """Hash the sources of sklembed."""
    root = Path(sklembed.__file__).parent
    sources = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


def read_cache(path):
    """Return the latest record of each job."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {tuple(record["job"]): record for record in records}


def plan(options):
    """Return the chosen jobs.

    GridSearchCV, of which the time is of interest, has one fold and no numbers.
    """
    jobs = []
    for task in options.tasks:
        for arm in ARMS[TASKS[task].kind]:
            if options.arms and arm not in options.arms:
                continue
            folds = options.folds or range(options.n_folds)
            if arm == SVM_AS_USERS_TUNE_IT:
                folds = [] if TASKS[task].with_table else [0]
            jobs += [(task, arm, fold, options.n_folds) for fold in folds]
    return jobs


def is_due(job, cache, refresh):
    """Return whether a job has no result, or one that is to be replaced."""
    if job not in cache or refresh == "all":
        return True
    record = cache[job]
    if refresh == "busy":
        return record["busy"]
    return refresh == "stale" and record["sources"] not in (None, hash_sources())


def run_jobs(options):
    """Run the chosen jobs that are due, and append each result to the cache."""
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    cache = read_cache(options.cache)
    due = [job for job in plan(options) if is_due(job, cache, options.refresh)]
    if not due:
        return
    for name in LOADERS:
        load(name)  # jobs then read all vectors from the store
    parallel = Parallel(
        n_jobs=options.n_jobs, batch_size=1, return_as="generator_unordered"
    )
    results = parallel(delayed(run_cell)(job, options.threads) for job in due)
    for number, record in enumerate(results, start=1):
        with options.cache.open("a") as file:
            file.write(json.dumps(record) + "\n")
        task, arm, fold, _ = record["job"]
        seconds = record["rows"][0]["fit s"]
        print(f"{number}/{len(due)} {task}, {arm}, {fold}: {seconds:.1f} s", flush=True)


# Tables


def table(options):
    """Return the scores of all arms, the best baselines in hindsight, and the bars."""
    cells, settings = read_cells(options)
    measures = dict.fromkeys(sum(MEASURES.values(), []))
    measures = [name for name in measures if name in cells]
    medians = {"fit s": 1, "predict s": 2, "CPU s": 1}
    result = {
        "settings": [settings],
        "records": summarise(cells, ["task", "arm"], measures, medians),
        "verdicts": [],
    }
    for name, task in TASKS.items():
        if name in set(cells["task"]):
            for measure in COMPARED[task.kind]:
                row = compare(cells, name, measure, options.n_folds)
                result["verdicts"].append(row)
    if cells["arm"].eq(OURS).any():
        result["bars"] = judge_bars(cells, result["verdicts"])
    return result


def read_cells(options):
    """Return a row per fold, task and arm, and the settings of the results."""
    cache = read_cache(options.cache)
    chosen = complete_jobs(plan(options), cache)
    rows, busy, stale = [], 0, 0
    for job in chosen:
        record = cache[job]
        busy += record["busy"]
        stale += record["sources"] not in (None, hash_sources())
        for row in record["rows"]:
            keys = {"task": job[0], "fold": job[2], "CPU s": record["CPU s"]}
            rows.append(keys | row)
    if stale:
        print(f"{stale} results come from other sources of sklembed: --refresh stale")
    if busy:
        print(f"{busy} jobs had to wait for other processes: --refresh busy")
    settings = {
        "folds": len({job[2] for job in chosen}),
        "of folds": options.n_folds,
        "threads": cache[chosen[0]]["threads"],
        "jobs": len(chosen),
        "busy jobs": busy,
        "scikit-learn": sklearn.__version__,
    }
    cells = pd.DataFrame(rows)
    order = {name: position for position, name in enumerate(TASKS)}
    cells["position"] = cells["task"].map(order)
    return cells.sort_values("position", kind="stable"), settings


def complete_jobs(jobs, cache):
    """Return the jobs of arms that have a result in each chosen fold.

    Means of other arms would be over other folds.
    """
    incomplete = {job[:2] for job in jobs if job not in cache}
    for task, arm in sorted(incomplete):
        print(f"left out, since not run in all chosen folds: {task}, {arm}")
    return [job for job in jobs if job[:2] not in incomplete]


def compare(cells, task, measure, n_folds):
    """Return the best baseline of a task in hindsight, and the gain over it.

    For log loss, the better of the tempered and the fitted probabilities counts.
    """
    rows = cells[cells["task"] == task]
    base = TASKS[task].base
    if base is not None:
        simpler = cells[(cells["task"] == base) & ~cells["arm"].map(is_ours)]
        simpler = simpler.assign(arm=simpler["arm"] + ", without table")
        rows = pd.concat([rows, simpler])
    if measure == "log loss":
        fitted = rows[~rows["arm"].map(is_ours)]
        fitted = fitted.assign(
            arm=fitted["arm"] + ", as fitted",
            **{"log loss": fitted["log loss as fitted"]},
        )
        rows = pd.concat([rows, fitted])
    sign = -1 if measure in LOWER_IS_BETTER else 1
    means = rows.groupby("arm")[measure].mean()
    baselines = sign * means[~means.index.map(is_ours).astype(bool)]
    timing = baselines.index.str.startswith(SVM_AS_USERS_TUNE_IT)
    best_arm = baselines[~timing].idxmax()
    row = {
        "task": task,
        "measure": measure,
        "best baseline": best_arm,
        "score": means[best_arm],
    }
    if OURS not in means:
        return row
    gains = difference(rows, OURS, best_arm, measure, n_folds)
    if sign < 0:
        gains |= {"gain": -gains["gain"], "folds won": _reverse(gains["folds won"])}
    return row | {OURS: means[OURS]} | gains


def is_ours(arm):
    """Return whether an arm is the estimator, with any members, or one of these."""
    return arm.startswith(OURS)


def _reverse(percent):
    return f"{100 - int(percent.rstrip('%'))}%"


# Least gain over the best baseline of each task, and whether the mean must be positive.
LEAST_GAINS = {
    "macro-F1": (-0.005, True),
    "micro-F1": (0.0, False),
    "average precision, macro": (0.0, False),
    "average precision, micro": (0.0, False),
    "R2": (-0.005, True),
}


def judge_bars(cells, comparisons):
    """Return for each requirement whether it is met, and by how much."""
    gains = pd.DataFrame(comparisons)
    gains = gains[gains["gain"].notna()]
    by_measure = {name: rows["gain"] for name, rows in gains.groupby("measure")}
    bars = []
    for name, (least, positive_mean) in LEAST_GAINS.items():
        if name not in by_measure:
            continue
        gain = by_measure[name]
        bars.append(_bar(f"{name}: least gain >= {least}", gain.min(), least))
        if positive_mean:
            bars.append(_bar(f"{name}: mean gain >= 0", gain.mean(), 0.0))
    means = cells.groupby(["task", "arm"]).mean(numeric_only=True)
    if "log loss" in by_measure:
        gain = by_measure["log loss"]
        share = (gain >= 0).mean()
        bars.append(_bar("log loss: lowest on a share of tasks >= 0.75", share, 0.75))
        losses = means[["log loss", "log loss as fitted"]].min(axis=1).unstack()
        if "LR" in losses:
            lead = losses["LR"] - means["log loss"].unstack()[OURS]
            bars.append(_bar("log loss: least lead over LR >= 0", lead.min(), 0.0))
    seconds = means["fit s"].unstack()
    for arm in ("SVM", SVM_AS_USERS_TUNE_IT):
        if arm in seconds:
            ratio = (seconds[OURS] / seconds[arm]).max()
            name = f"fit s / fit s of {arm}: largest <= 3"
            bars.append({"bar": name, "value": float(ratio), "met": bool(ratio <= 3)})
    return bars


def _bar(name, value, least):
    return {"bar": name, "value": float(value), "met": bool(value >= least)}


# Scale, and a second run


def scale_table(options):
    """Fit EmbeddingClassifier on more and more rows, each in a new process."""
    records = []
    with tempfile.TemporaryDirectory() as directory:
        for n_rows in options.rows:
            path = Path(directory) / "rows.npz"
            # The peak of a process starts at the memory of its parent, which stays small.
            in_new_process(write_many_rows, path, n_rows)
            records.append(in_new_process(fit_many, path, options.threads))
            print(records[-1], flush=True)
    growth = [np.nan]
    for before, after in zip(records, records[1:], strict=False):
        ratio = np.log(after["rows"] / before["rows"])
        growth.append(np.log(after["fit s"] / before["fit s"]) / ratio)
    for record, exponent in zip(records, growth, strict=True):
        record["exponent of rows"] = exponent
    return {"records": records}


def write_many_rows(path, n_rows, n_columns=1200, n_test=2000):
    """Write vectors of clip art resampled with noise, of its ten largest classes.

    They have the 384 columns of the title and 816 of the image. Test rows are
    resampled from other images than training rows. The noise of a column has half of
    its standard deviation; the vectors are scaled to unit length again.
    """
    X, data = load("openclipart")
    rng = np.random.default_rng(0)
    image = rng.permutation(np.arange(384, N_VECTOR_COLUMNS))[: n_columns - 384]
    X = np.hstack([X[:, :384], X[:, np.sort(image)]]).astype(np.float32)
    y = data.target.to_numpy()
    largest = np.argsort(-np.bincount(y), kind="stable")[:10]
    X, y = X[np.isin(y, largest)], y[np.isin(y, largest)]
    deviations = np.nanstd(X, axis=0)
    train, test = outer_folds(y, None, False, 5)[0]
    arrays = {}
    for name, rows, size in (("train", train, n_rows), ("test", test, n_test)):
        chosen = rng.choice(rows, size)
        noise = rng.standard_normal((size, n_columns), dtype=np.float32)
        noise *= 0.5 * deviations
        noise += X[chosen]
        for columns in (slice(0, 384), slice(384, None)):
            noise[:, columns] /= np.linalg.norm(
                noise[:, columns], axis=1, keepdims=True
            )
        arrays[f"X_{name}"], arrays[f"y_{name}"] = noise, y[chosen]
    np.savez(path, **arrays)


def fit_many(path, n_threads):
    """Fit on stored rows; return seconds, peak memory of the process, and macro-F1."""
    arrays = np.load(path)
    X, y = arrays["X_train"], arrays["y_train"]
    blocks = {"text": slice(0, 384), "image": slice(384, X.shape[1])}
    model = sklembed.EmbeddingClassifier(blocks=blocks, random_state=0)
    with threadpool_limits(n_threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = peak_gib()
        tick = time.perf_counter()
        model.fit(X, y)
        seconds = time.perf_counter() - tick
        tick = time.perf_counter()
        predicted = model.predict(arrays["X_test"])
        predict_seconds = time.perf_counter() - tick
    return {
        "rows": len(X),
        "columns": X.shape[1],
        "fit s": seconds,
        "predict s, 2,000 rows": predict_seconds,
        "peak GiB": peak_gib(),
        "peak GiB before fit": before,
        "macro-F1": f1_score(arrays["y_test"], predicted, average="macro"),
        "members s": ", ".join(f"{name} {s:.1f}" for name, s in model.seconds_.items()),
    }


def peak_gib():
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def second_run_table(options):
    """Encode all cells of emoji in an empty store, then once more in a new process."""
    records = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["SKLEMBED_STORE"] = str(Path(directory) / "store.sqlite")
        for run in ("first", "second"):
            before = sum(row["encoded"] for row in records)
            counts = in_new_process(count_encoded, "emoji")
            counts["encoded"] -= before
            records.append({"run": run} | counts)
    return {"records": records}


def count_encoded(name):
    """Load a data set; return the number of cells ever encoded, and the seconds."""
    tick = time.perf_counter()
    load(name)
    seconds = time.perf_counter() - tick
    stats = EmbeddingStore().stats()
    return {
        "encoded": int(stats["encoded"].sum()),
        "stored": int(stats["rows"].sum()),
        "seconds": seconds,
    }


def in_new_process(function, *arguments):
    """Call a function in a new Python process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# The command


def main():
    """Compute and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arms = sorted(set().union(*ARMS.values()))
    parser.add_argument("--arms", nargs="+", choices=arms, help="all by default")
    parser.add_argument("--n-folds", type=int, default=5)
    parser.add_argument("--folds", type=int, nargs="+", help="all by default")
    parser.add_argument(
        "--cache", type=Path, default=Path("examples/output/predictor.jsonl")
    )
    parser.add_argument(
        "--refresh",
        choices=["all", "busy", "stale"],
        help="run chosen jobs again: all, jobs that waited for other processes, or jobs "
        "with other sources of sklembed",
    )
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of each job")
    parser.add_argument(
        "--table-only", action="store_true", help="print the table of the cache"
    )
    parser.add_argument(
        "--scale", action="store_true", help="fit on up to 100,000 rows"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1000, 3000, 10_000, 30_000, 100_000],
        help="numbers of rows for --scale",
    )
    parser.add_argument(
        "--second-run", action="store_true", help="count encoded rows of two runs"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    tick = time.perf_counter()
    if options.scale:
        result = scale_table(options)
    elif options.second_run:
        result = second_run_table(options)
    else:
        if not options.table_only:
            run_jobs(options)
        result = table(options)
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
