"""What features are worth where few rows have a label, beside the same head on frozen vectors.

The protocol of arXiv 2401.01179 (1, 10 and 100 % of the labels) on emoji, subcategories kept
together, and clip art, creators kept together: names or titles by MiniLM and pictures by
EfficientNet-lite0, side by side. The head is a logistic regression throughout. The shared encoder
and the adaptor are trained on all training pairs of a fold, without labels; the projector, plain or
cross-fitted, and late fusion on the labelled rows alone. "..., pictures alone" are the same folds
with heads that see pictures only, as that paper does: the space is still learnt from pairs.

Two further controls, because a penalty that suits many labels is too strong for a few of them on
vectors which differ little, and so a space may look good for its scale alone: frozen vectors with a
hundredth of the penalty, and standardised by all training rows.

Where labels are so few that the projector cannot be cross-fitted it is plain, with a warning; the
table "fallbacks" says how often. Where some fold has but one label of each class, as may be at 1 %
with --folds 2, there is no pair to learn a projector from, and it has no row. Parameters are those
of bench_crossmodal.py and defaults; nothing is tuned on the test rows. Seeds draw folds and labels;
networks start alike.
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

from sklembed import LateFusionClassifier
from sklembed.evaluation import few_label_curve

SCORES = {"f1_macro": "macro-F1", "accuracy": "accuracy", "roc_auc_ovr": "AUROC"}
CONTROL, WEAKLY = "frozen (control)", "frozen, C = 1000"
PLAIN, CROSS_FITTED = "projector, plain", "projector, cross-fitted"
PICTURES = ", pictures alone"  # ends the names of such arms, and then of their tasks


def pictures(X):
    """Return the pictures' frozen vectors."""
    return X[:, BLOCKS["image"]]


def pictures_in_space(Z):
    """Return the pictures' part of a space."""
    return Z[:, SIZES["n_components"] :]


def of_pictures(encoder):
    """Learn a space from pairs, and show the head no more than the pictures' part."""
    return make_pipeline(encoder, FunctionTransformer(pictures_in_space))


FROZEN_PICTURES = FunctionTransformer(pictures)
WEAKLY_PENALISED = clone(LR).set_params(C=1000)
PRETRAINED = {
    "frozen, standardised": StandardScaler(),
    "shared encoder": shared(),
    "adaptor": adaptor(),
    "frozen and adaptor": make_union("passthrough", adaptor()),
    CONTROL + PICTURES: FROZEN_PICTURES,
    "frozen, standardised" + PICTURES: make_pipeline(FROZEN_PICTURES, StandardScaler()),
    "shared encoder" + PICTURES: of_pictures(shared()),
    "adaptor" + PICTURES: of_pictures(adaptor()),
}
SUPERVISED = {
    WEAKLY: WEAKLY_PENALISED,
    WEAKLY + PICTURES: make_pipeline(FROZEN_PICTURES, WEAKLY_PENALISED),
    "late fusion": LateFusionClassifier(blocks=BLOCKS, random_state=0),
}
PROJECTORS = {PLAIN: ours(cv=None), CROSS_FITTED: ours()}
# What arms are compared with besides the control.
AGAINST = {CROSS_FITTED: PLAIN} | dict.fromkeys(
    ("shared encoder", "adaptor", "frozen and adaptor"), WEAKLY
)


def curve_of(task, options):
    """Return the cells of a task, and of its pictures alone."""
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
    ].tolist()  # two of a class, in every fold
    projected = few_label_curve(
        LR, X, y, supervised=PROJECTORS, fractions=enough, **common
    )
    curve = pd.concat([curve, projected[projected["arm"] != "control"]])
    curve = curve.rename(columns=SCORES).replace({"arm": {"control": CONTROL}})
    curve["task"] = task + curve["arm"].str.endswith(PICTURES).map(
        {True: PICTURES, False: ""}
    )
    curve["arm"] = curve["arm"].str.removesuffix(PICTURES)
    curve["labels"] = (100 * curve["fraction"]).map("{:.0f} %".format)
    return curve


def records(cells):
    """Summarise each arm, by task and share of labels."""
    cells = cells.sort_values(["task", "fraction"], key=_in_order, kind="stable")
    n_labelled = cells.groupby(["task", "labels"])["n_labelled"].transform("mean")
    cells["rows"] = n_labelled.map("{:.0f}".format)
    keys = ["task", "labels", "rows", "arm"]
    return summarise(cells, keys, list(SCORES.values()), {"fit s": 2})


def _in_order(column):
    return pd.factorize(column)[0]


def verdicts(cells, n_folds):
    """Compare each arm with the frozen control, and some with another, by macro-F1 and AUROC."""
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
    """Count the folds in which the projector could not be cross-fitted: it is the plain one."""
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
    """Compute the curves and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the tables there too")
    options = parser.parse_args()

    tick = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of projectors that cannot be cross-fitted; counted below
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
