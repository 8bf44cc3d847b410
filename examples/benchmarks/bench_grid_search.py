"""Count encoded rows and model loads of a grid search, with the store and with other
caches.

The search has 2,000 distinct texts, four candidates, five shuffled folds and the final
refit. It runs three times: first, again with the same folds, and with reshuffled folds.
Each search runs in a separate process, with the files that its arm has written before.
All arms call the same model: all-MiniLM-L6-v2, or with ``--fast`` a function that
counts letters and so times the caches alone.

Counts are exact over all processes. Seconds are those of the search with loading the
model; with ``--repeats`` they are medians.

The baselines encode by a transformer that loads its model once per process, when the
first row is encoded; their own transformers load it for every clone. If a cache works
better before the folds than within them, both are measured. The search can then not
tune the encoder.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from sklembed import CallableBackend, FrozenEncoder, prefetch
from sklembed.encoders import minilm

with suppress(ImportError):  # arms of packages that are not installed are skipped
    import skrub
with suppress(ImportError):
    from embetter.grab import ColumnGrabber
    from embetter.utils import cached

CANDIDATES = [0.1, 1, 10, 100]
RUNS = {
    "first run": 0,
    "same folds again": 0,
    "reshuffled": 1,
}  # with the seeds of their folds
OURS = "FrozenEncoder"


# The model, and the transformer that the baselines cache


def load_letters():
    """Return an encoder that counts the letters of texts."""
    note("loads", 1)

    def encode(texts):
        note("rows", len(texts))
        return np.array(
            [[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        )

    return encode


def load_minilm():
    """Load all-MiniLM-L6-v2."""
    note("loads", 1)
    encoder = FrozenEncoder(minilm(), store=None, dtype="float32")

    def encode(texts):
        note("rows", len(texts))
        return encoder.transform(texts)

    return encode


def note(what, count):
    """Add to the counts of all processes; a short append to a file is atomic."""
    with open(os.environ["COUNTS"], "a") as file:
        file.write(f"{what} {count}\n")


@cache
def loaded(load):
    """Load a model once per process."""
    return load()


def encode(texts, load):
    """Encode a list, a column or a table of one column."""
    texts = list(np.ravel(texts))
    return (
        loaded(load)(texts) if texts else []
    )  # embetter passes no texts if all are cached


class Encoder(TransformerMixin, BaseEstimator):
    """A transformer that encodes by a model."""

    def __init__(self, load):
        self.load = load

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return encode(X, self.load)


# The arms


@dataclass
class Case:
    """The input of all arms: model, table, folds and a persistent folder."""

    load: Any
    width: int
    X: pd.DataFrame
    y: np.ndarray
    folds: StratifiedKFold
    folder: str

    def search(self, *steps, memory=None, n_jobs=1):
        """Return the grid search over these steps and a classifier."""
        pipeline = make_pipeline(
            *steps, LogisticRegression(max_iter=1000), memory=memory
        )
        grid = {"logisticregression__C": CANDIDATES}
        return GridSearchCV(pipeline, grid, cv=self.folds, n_jobs=n_jobs)


def plain(case):
    """Search without a cache."""
    case.search(Encoder(case.load)).fit(case.X, case.y)


def pipeline_memory(case):
    """Let scikit-learn cache the encoded training rows of each fold."""
    case.search(Encoder(case.load), memory=case.folder).fit(case.X, case.y)


def skrub_inside(case):
    """Let skrub cache the encoded training and test rows of each fold."""
    skrub.set_config(cache=case.folder)
    vectors = skrub.X(case.X).skb.apply(Encoder(case.load), no_wrap=True)
    skrub_search(case, vectors)


def skrub_ahead(case):
    """Let skrub cache the encoded table; only the vectors are split."""
    skrub.set_config(cache=case.folder)
    texts = skrub.var("table", case.X)["note"]
    skrub_search(case, texts.skb.apply_func(encode, case.load).skb.mark_as_X())


def skrub_search(case, vectors):
    """Search over DataOps instead of a pipeline."""
    classifier = LogisticRegression(
        C=skrub.choose_from(CANDIDATES, name="C"), max_iter=1000
    )
    predictions = vectors.skb.apply(classifier, y=skrub.y(case.y))
    predictions.skb.make_grid_search(fitted=True, cv=case.folds)


def embetter_inside(case):
    """Use the cached encoder in the pipeline, where clones lose the cache."""
    encoder = cached(case.folder, Encoder(case.load))
    case.search(ColumnGrabber("note"), encoder).fit(case.X, case.y)


def embetter_ahead(case):
    """Encode with the cached encoder, as in the documentation of embetter, then search."""
    vectors = cached(case.folder, Encoder(case.load)).transform(case.X["note"].tolist())
    case.search().fit(vectors, case.y)


def frozen_encoder(case, n_jobs=1, prepare=None):
    """Search with the store; `prepare` takes the search and `X` before the fit."""
    model = CallableBackend(
        case.load,
        name=case.load.__name__,
        version="1",
        modality="text",
        n_features=case.width,
    )
    search = case.search(
        FrozenEncoder(model, store=f"{case.folder}/store.sqlite"), n_jobs=n_jobs
    )
    if prepare is not None:
        prepare(search, case.X)
    search.fit(case.X, case.y)


ARMS = {  # with the packages that they need
    "no cache": (plain, None),
    "Pipeline(memory=)": (pipeline_memory, None),
    "skrub cache, in the folds": (skrub_inside, "skrub"),
    "skrub cache, ahead of them": (skrub_ahead, "skrub"),
    "embetter cached, in the folds": (embetter_inside, "embetter"),
    "embetter cached, ahead of them": (embetter_ahead, "embetter"),
    OURS: (frozen_encoder, None),
    "FrozenEncoder, n_jobs=2": (partial(frozen_encoder, n_jobs=2), None),
    "FrozenEncoder, prefetch, n_jobs=2": (
        partial(frozen_encoder, n_jobs=2, prepare=prefetch),
        None,
    ),
}


# Measurement


def make_texts(n_texts):
    """Return distinct texts of 5 to 12 words, and classes that differ in their words."""
    rng = np.random.default_rng(0)
    words = np.array("red green blue small large round old new soft hard".split())
    y = np.arange(n_texts) % 2
    texts = [
        f"{i} " + " ".join(rng.choice(words[: 7 if label else 10], rng.integers(4, 12)))
        for i, label in enumerate(y)
    ]
    return pd.DataFrame({"note": texts}), y


def time_search(options, arm, seed, folder):
    """Run one search of one arm in this process."""
    load, width = (load_letters, 26) if options.fast else (load_minilm, 384)
    X, y = make_texts(options.n_texts)
    folds = StratifiedKFold(5, shuffle=True, random_state=int(seed))
    run, _ = ARMS[arm]
    tick = time.perf_counter()
    run(Case(load, width, X, y, folds, folder))
    return time.perf_counter() - tick


def measure(arm, run, folder):
    """Run one search of one arm in a separate process; return counts and seconds."""
    counts = Path(folder, "counts")
    counts.write_text("")
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--measure",
        arm,
        str(RUNS[run]),
        folder,
    ]
    environment = {**os.environ, "COUNTS": str(counts)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    total = Counter(rows=0, loads=0)
    for line in counts.read_text().splitlines():
        what, count = line.split()
        total[what] += int(count)
    return {"arm": arm, "run": run, **total, "seconds": float(done.stdout.split()[-1])}


def measure_all(arms):
    """Measure all runs of all arms, with seconds relative to FrozenEncoder."""
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for arm in arms:
            folder = tempfile.mkdtemp(dir=scratch)
            for run in RUNS:
                records.append(measure(arm, run, folder))
                row = "{arm:30s} {run:16s} {rows:6d} rows {seconds:7.1f} s".format(
                    **records[-1]
                )
                print(row, flush=True)
    ours = {
        record["run"]: record["seconds"] for record in records if record["arm"] == OURS
    }
    return [
        {**record, "ratio": record["seconds"] / ours[record["run"]]}
        for record in records
    ]


def installed(packages):
    """Return the versions of the installed packages."""
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def cpu():
    """Return the number of cores and the name of the processor."""
    info = Path("/proc/cpuinfo")
    name = (
        re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    )
    return f"{os.cpu_count()} x {name[1] if name else platform.processor()}"


def print_tables(records, repeats):
    """Print a table for each measure."""
    whose = f"medians of {repeats}" if repeats > 1 else "one run each"
    measures = {
        "rows": ("rows encoded", "{:,.0f}"),
        "loads": ("model loads", "{:.0f}"),
        "seconds": (f"seconds, {whose}", "{:.1f}"),
        "ratio": (
            f"seconds relative to {OURS} in the same run, {whose}",
            "{:.1f}",
        ),
    }
    frame = pd.DataFrame(records)
    for name, (title, form) in measures.items():
        table = frame.pivot_table(name, "arm", "run", aggfunc="median", sort=False)
        table = table.rename_axis(index=None, columns=None)
        print(f"\n{title}:\n\n{table.to_string(float_format=form.format)}")


def main():
    """Measure all arms, print the tables and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fast", action="store_true", help="count letters instead of MiniLM"
    )
    parser.add_argument(
        "--n-texts", type=int, default=2000, help="number of texts; default 2000"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="number of repeats; default 1"
    )
    parser.add_argument(
        "--json", type=Path, help="also write the measurements to this file"
    )
    parser.add_argument(
        "--measure", nargs=3, help=argparse.SUPPRESS
    )  # arm, seed, folder
    options = parser.parse_args()
    if options.measure:
        print(time_search(options, *options.measure))
        return

    versions = installed(["scikit-learn", "joblib", "sklembed", "skrub", "embetter"])
    skipped = [arm for arm, (_, peer) in ARMS.items() if peer and peer not in versions]
    for arm in skipped:
        print(f"{arm:30s} skipped: {ARMS[arm][1]} is not installed")
    arms = [arm for arm in ARMS if arm not in skipped]
    records = []
    for repeat in range(options.repeats):
        records += [{"repeat": repeat, **record} for record in measure_all(arms)]
    print_tables(records, options.repeats)
    if options.json:
        about = {
            "cpu": cpu(),
            "python": platform.python_version(),
            "versions": versions,
            "model": "letters" if options.fast else "all-MiniLM-L6-v2",
            "n_texts": options.n_texts,
            "skipped": skipped,
        }
        options.json.write_text(
            json.dumps({**about, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
