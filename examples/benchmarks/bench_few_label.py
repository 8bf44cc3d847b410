"""Compare features for few labels with the same classifier on frozen vectors.

The protocol is that of arXiv 2401.01179, with 1, 10 and 100 % of the labels. The data
are emoji by subcategory and clip art by creator, with names or titles encoded by MiniLM
and images encoded by EfficientNet-lite0. The classifier is always a logistic
regression. The shared encoder and the adaptor are trained on all training pairs of a
fold, without labels. The projector (plain or cross-fitted) and late fusion are trained
on the labelled rows alone. In the tasks "..., images alone" the classifier uses images
only, as in that paper; the space is still learned from pairs.

A penalty that suits many labels is too strong for few labels on vectors with small
differences, so a space may appear good for its scale alone. There are two further
controls: frozen vectors with a hundredth of the penalty, and frozen vectors
standardised by all training rows.

With very few labels the projector cannot be cross-fitted and is plain, with a warning;
the table "fallbacks" counts these folds. If a fold has only one label per class, no
pair exists and the projector has no row. Parameters are those of bench_crossmodal.py
and defaults. Nothing is tuned on the test rows. Seeds determine folds and labels;
networks have the same initial weights.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from bench_adaptation import ours
from bench_crossmodal import LR, SIZES, TASKS, adaptor, pairs, shared
from comparison import difference, show, summarise
from sklearn.base import clone
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from vectors import BLOCKS

from sklembed import FusionClassifier
from sklembed.evaluation import few_label_curve

SCORES = {"f1_macro": "macro-F1", "accuracy": "accuracy", "roc_auc_ovr": "AUROC"}
CONTROL, WEAKLY = "frozen (control)", "frozen, C = 1000"
PLAIN, CROSS_FITTED = "projector, plain", "projector, cross-fitted"
IMAGES_ALONE = ", images alone"  # suffix of such arms, later of their tasks


def images(X):
    """Return the frozen vectors of the images."""
    return X[:, BLOCKS["image"]]


def images_in_space(Z):
    """Return the image block of a shared space."""
    return Z[:, SIZES["n_components"] :]


def of_images(encoder):
    """Learn a space from pairs, and return its image block."""
    return make_pipeline(encoder, FunctionTransformer(images_in_space))


FROZEN_IMAGES = FunctionTransformer(images)
WEAKLY_PENALISED = clone(LR).set_params(C=1000)
PRETRAINED = {
    "frozen, standardised": StandardScaler(),
    "shared encoder": shared(),
    "adaptor": adaptor(),
    "frozen and adaptor": make_union("passthrough", adaptor()),
    CONTROL + IMAGES_ALONE: FROZEN_IMAGES,
    "frozen, standardised" + IMAGES_ALONE: make_pipeline(
        FROZEN_IMAGES, StandardScaler()
    ),
    "shared encoder" + IMAGES_ALONE: of_images(shared()),
    "adaptor" + IMAGES_ALONE: of_images(adaptor()),
}
SUPERVISED = {
    WEAKLY: WEAKLY_PENALISED,
    WEAKLY + IMAGES_ALONE: make_pipeline(FROZEN_IMAGES, WEAKLY_PENALISED),
    "late fusion": FusionClassifier("late", blocks=BLOCKS, random_state=0),
}
PROJECTORS = {PLAIN: ours(cv=None), CROSS_FITTED: ours()}
# Further comparisons besides that with the control.
AGAINST = {CROSS_FITTED: PLAIN} | dict.fromkeys(
    ("shared encoder", "adaptor", "frozen and adaptor"), WEAKLY
)


def curve_of(task, options):
    """Return the results of a task with both modalities and with images alone."""
    X, _, y, _, groups = pairs(TASKS[task])
    common = {
        "cv": options.folds,
        "groups": groups,
        "n_seeds": options.seeds,
        "scoring": list(SCORES),
        "n_jobs": options.n_jobs,
        "random_state": 0,  # both calls draw the same folds and labels
    }
    curve = few_label_curve(
        LR, X, y, pretrained=PRETRAINED, supervised=SUPERVISED, **common
    )
    fewest = curve.groupby("fraction")["n_labelled"].min()
    enough = fewest.index[
        fewest > len(np.unique(y))
    ].tolist()  # two rows of a class in every fold
    projected = few_label_curve(
        LR, X, y, supervised=PROJECTORS, fractions=enough, **common
    )
    curve = pd.concat([curve, projected[projected["arm"] != "control"]])
    curve = curve.rename(columns=SCORES).replace({"arm": {"control": CONTROL}})
    curve["task"] = task + curve["arm"].str.endswith(IMAGES_ALONE).map(
        {True: IMAGES_ALONE, False: ""}
    )
    curve["arm"] = curve["arm"].str.removesuffix(IMAGES_ALONE)
    curve["labels"] = (100 * curve["fraction"]).map("{:.0f} %".format)
    return curve


def records(cells):
    """Summarise each arm by task and fraction of labels."""
    cells = cells.sort_values(["task", "fraction"], key=_in_order, kind="stable")
    n_labelled = cells.groupby(["task", "labels"])["n_labelled"].transform("mean")
    cells["rows"] = n_labelled.map("{:.0f}".format)
    keys = ["task", "labels", "rows", "arm"]
    return summarise(cells, keys, list(SCORES.values()), {"fit s": 2})


def _in_order(column):
    return pd.factorize(column)[0]


def verdicts(cells, n_folds):
    """Compare each arm with the frozen control, and some with a further arm."""
    return [
        {"task": task, "labels": labels, "arm": arm, "against": other}
        | {
            f"{measure}, {figure}": value
            for measure in ("macro-F1", "AUROC")
            for figure, value in difference(rows, arm, other, measure, n_folds).items()
        }
        for (task, labels), rows in cells.groupby(["task", "labels"], sort=False)
        for arm in dict.fromkeys(rows["arm"])
        if arm != CONTROL
        for other in (CONTROL, AGAINST.get(arm))
        if other is not None
    ]


def fallbacks(cells):
    """Count the folds in which the projector could not be cross-fitted."""
    keys = ["task", "labels", "seed", "fold"]
    scores = {
        arm: cells[cells["arm"] == arm].set_index(keys)[list(SCORES.values())]
        for arm in (PLAIN, CROSS_FITTED)
    }
    plain = (scores[PLAIN] == scores[CROSS_FITTED]).all(axis=1)
    counts = plain.groupby(["task", "labels"], sort=False).agg(["sum", "size"])
    return [
        {"task": task, "labels": labels, "folds not cross-fitted": f"{n} of {n_folds}"}
        for (task, labels), n, n_folds in counts.itertuples()
    ]


def main():
    """Compute and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()

    tick = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # projectors that cannot be cross-fitted are counted below
        cells = pd.concat(
            [curve_of(task, options) for task in TASKS], ignore_index=True
        )
    result = {
        "records": records(cells),
        "verdicts": verdicts(cells, options.folds),
        "fallbacks": fallbacks(cells),
    }
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
