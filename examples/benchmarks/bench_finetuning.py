"""Compare fine-tuning with classifiers on frozen vectors, and their costs.

The tasks are single columns: names and images of emoji by group, and titles and images
of clip art by tag, with folds by creator. Texts are encoded by MiniLM and images by
EfficientNet-lite0. The arms without training of the encoder are logistic regression, the
cross-fitted projector with logistic regression, EmbeddingClassifier, and "head", the start of
FinetunedClassifier. The others are its methods "bitfit", "lora" and "full". Nothing is tuned on
test rows.

The encoder, the fit and the prediction are timed apart: `encoding s` is the time to encode the
training rows, once, and `fit s` that of a fit on stored vectors. Seconds are of the processor,
over all threads of the process, so that other work on the machine hardly changes them. With
``--shuffled`` the labels of the training rows are shuffled too, to check that training does not
end below the head.

Each cell, an arm in a fold, is written to ``--cells`` when it is done, and a later run resumes
there. Images are a random sample of 900 rows. Method "lora" is skipped if peft is not installed.
A full run takes one to two hours on two cores.
"""

import argparse
import json
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from comparison import difference, quietly, show, summarise
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from vectors import LOADERS, TITLES, outer_folds

from sklembed import (
    ContrastiveProjector,
    EmbeddingClassifier,
    FinetunedClassifier,
    FrozenEncoder,
)
from sklembed.encoders import efficientnet_lite0, minilm

TASKS = {
    "emoji, name": ("emoji", TITLES["emoji"]),
    "clip art, title": ("openclipart", TITLES["openclipart"]),
    "emoji, image": ("emoji", "image"),
    "clip art, image": ("openclipart", "image"),
}
METHODS = ("head", "bitfit", "lora", "full")
ARMS = ("frozen + LR", "projector + LR", "EmbeddingClassifier", *METHODS)
EPOCHS = {"text": 5, "image": 3}
ROWS = {"text": None, "image": 900}  # of images a sample, to take a few hours
KEYS = ("task", "labels", "fold", "arm", "of rows", "folds", "epochs")
LR = LogisticRegression(C=10, max_iter=1000)


def modality_of(task):
    """Return the modality of a task."""
    return "image" if TASKS[task][1] == "image" else "text"


def make_encoder(task, store):
    """Return the frozen encoder of a task."""
    if modality_of(task) == "text":
        return FrozenEncoder(minilm(), dtype="float32", store=store)
    return FrozenEncoder(efficientnet_lite0(), normalize=True, store=store)


def make_arm(arm, encoder, n_epochs):
    """Return the estimator of an arm, which takes a column of cells."""
    if arm in METHODS:
        return FinetunedClassifier(
            encoder, method=arm, max_epochs=n_epochs, device="cpu", random_state=0
        )
    if arm == "EmbeddingClassifier":
        blocks = {"cell": slice(None)}
        return make_pipeline(
            encoder, EmbeddingClassifier(blocks=blocks, random_state=0)
        )
    if arm == "projector + LR":
        projector = ContrastiveProjector(device="cpu", random_state=0)
        return make_pipeline(encoder, SimpleImputer(), projector, LR)
    return make_pipeline(encoder, SimpleImputer(), LR)


def load_task(task, n_rows):
    """Return the column, labels and groups of a task, of all rows or of some."""
    name, column = TASKS[task]
    data = LOADERS[name]()
    rows = np.flatnonzero(data.data[column].notna())
    rows = np.random.default_rng(0).permutation(rows)[:n_rows]
    groups = None if name == "emoji" else np.asarray(data.groups)[rows]
    return data.data[[column]].iloc[rows], np.asarray(data.target)[rows], groups


def run_cell(estimator, X, y, train, test):
    """Fit on the training rows, predict the test rows, and time both."""
    labels = y[test]
    tick = time.process_time()
    estimator = clone(estimator).fit(X.iloc[train], y[train])
    fitted = time.process_time()
    predicted = estimator.predict(X.iloc[test])
    done = time.process_time()
    cell = {
        "macro-F1": f1_score(labels, predicted, average="macro"),
        "fit s": fitted - tick,
        "predict s": done - fitted,
        "rows": len(train),
    }
    if isinstance(estimator, FinetunedClassifier):
        cell |= {
            "best step": estimator.best_step_,
            "steps": estimator.n_steps_,
            "parameters": estimator.n_parameters_,
        }
    return cell


def shuffled(y, rows):
    """Return labels that are permuted within some rows."""
    y = y.copy()
    y[rows] = np.random.default_rng(0).permutation(y[rows])
    return y


def run_task(task, options, done):
    """Yield the cells of a task that are not done."""
    labels = ["true", "shuffled"] if options.shuffled else ["true"]
    n_rows = n_rows_of(task, options)
    X, y, groups = load_task(task, n_rows)
    folds = outer_folds(y, groups, groups is not None, options.folds)
    # An interrupted run has all arms of the finished folds.
    keys = list(product(labels, range(options.folds), options.arms))
    n_epochs = options.epochs or EPOCHS[modality_of(task)]
    settings = {"of rows": n_rows, "folds": options.folds, "epochs": n_epochs}
    missing = [key for key in keys if (task, *key, *settings.values()) not in done]
    if not missing:
        return
    with TemporaryDirectory() as folder:
        encoder = make_encoder(task, f"{folder}/store.sqlite")
        encoder.warm_up()
        tick = time.process_time()
        encoder.transform(X)
        seconds = (time.process_time() - tick) / len(X)
        for label, fold, arm in missing:
            train, test = folds[fold]
            targets = shuffled(y, train) if label == "shuffled" else y
            estimator = make_arm(arm, encoder, n_epochs)
            cell = quietly(run_cell, estimator, X, targets, train, test)
            key = {"task": task, "labels": label, "arm": arm, "fold": fold}
            cell |= {"encoding s": seconds * len(train)}
            yield key | settings | cell


def n_rows_of(task, options):
    """Return the number of rows to draw of a task; None for all."""
    return options.rows or ROWS[modality_of(task)]


def key_of(cell):
    """Return the key of a cell in the file."""
    return tuple(cell[name] for name in KEYS)


def read_cells(path):
    """Return the cells of earlier runs; an interrupted last line is ignored."""
    cells = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                cells.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return cells


def scores(cells):
    """Return scores and seconds of each arm."""
    seconds = {"encoding s": 2, "fit s": 2, "predict s": 2, "best step": 0}
    seconds |= {"steps": 0, "parameters": 0}
    return summarise(cells, ["task", "labels", "arm"], ["macro-F1"], seconds)


def costs(cells):
    """Compare the cost and the score of each arm with full fine-tuning."""
    records = []
    means = cells.groupby(["task", "arm"], sort=False).mean(numeric_only=True)
    for task in dict.fromkeys(cells["task"]):
        if (task, "full") not in means.index:
            continue
        full = means.loc[task, "full"]
        for arm, row in means.loc[task].iterrows():
            both = (full["encoding s"] + full["fit s"]) / (
                row["encoding s"] + row["fit s"]
            )
            records.append(
                {
                    "task": task,
                    "arm": arm,
                    "fit ms per row": 1000 * row["fit s"] / row["rows"],
                    "full / arm": full["fit s"] / row["fit s"],
                    "full / arm, with encoding": both,
                    "share of the F1 of full": row["macro-F1"] / full["macro-F1"],
                }
            )
    return records


def gains(cells, n_folds):
    """Compare each method with the head within folds."""
    records = []
    for (task, label), rows in cells.groupby(["task", "labels"], sort=False):
        arms = set(rows["arm"])
        for arm in METHODS[1:]:
            if {"head", arm} <= arms:
                record = {"task": task, "labels": label, "arm": arm}
                record |= difference(rows, arm, "head", "macro-F1", n_folds)
                best_steps = rows.loc[rows["arm"] == arm, "best step"]
                record["folds at the start"] = int((best_steps == 0).sum())
                records.append(record)
    return records


def main():
    """Run the cells that are not done, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="of a random sample, instead of ROWS")
    parser.add_argument("--epochs", type=int, help="of 5 for texts and 3 for images")
    parser.add_argument(
        "--shuffled", action="store_true", help="also with noise labels"
    )
    parser.add_argument(
        "--fast", action="store_true", help="120 rows, 2 folds, 1 epoch"
    )
    parser.add_argument(
        "--cells",
        type=Path,
        default=Path("examples/output/finetuning.jsonl"),
        help="file of the finished cells",
    )
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.folds, options.epochs = 120, 2, 1
        options.cells = options.cells.with_suffix(".fast.jsonl")
    if find_spec("peft") is None and "lora" in options.arms:
        print("lora is skipped: peft is not installed")
        options.arms = [arm for arm in options.arms if arm != "lora"]
    options.cells.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(cell) for cell in read_cells(options.cells)}
    for task in options.tasks:
        for cell in run_task(task, options, done):
            with options.cells.open("a") as file:
                file.write(json.dumps(cell, default=float) + "\n")
            print(json.dumps(cell, default=float), flush=True)
    chosen = []
    for cell in read_cells(options.cells):
        if cell["task"] not in options.tasks or cell["arm"] not in options.arms:
            continue
        settings = n_rows_of(cell["task"], options), options.folds
        if settings == (cell["of rows"], cell["folds"]):
            chosen.append(cell)
    cells = pd.DataFrame(chosen)
    result = {
        "scores": scores(cells),
        "gains": gains(cells, options.folds),
    }
    result["costs"] = costs(cells[cells["labels"] == "true"])
    show(result, options.json)


if __name__ == "__main__":
    main()
