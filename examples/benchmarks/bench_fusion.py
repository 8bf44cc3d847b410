"""Compare early, late and decision fusion of text and image, also with missing
modalities.

The data are MiniLM and EfficientNet-lite0 vectors of emoji (random folds) and clip art
(by creator). All parameters are fixed; decision fusion learns its weights on the
training rows.

Tables: "fusion" (macro-F1 and seconds, with all cells and with a share of the test
rows' texts or images removed), "shift" (lambda and noise in nested cross-validation
between unrelated spaces, a null control), "speed" (training against a bare torch loop),
"efficiency" (encoding in every epoch, or once).
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from bench_adaptation import TASKS
from comparison import in_parallel, judge_gains, show
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import GaussianRandomProjection
from vectors import BLOCKS, LOADERS, load, outer_folds
from xgboost import XGBClassifier

from sklembed import (
    DecisionFusionClassifier,
    FrozenEncoder,
    FusionClassifier,
    ModalityGapAligner,
    PerModalityUnion,
)
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import efficiency_report

CHOSEN = {name: TASKS[name] for name in ("emoji random", "openclipart by creator")}
SHARES = (0.25, 0.5, 0.75)
LR = LogisticRegression(C=10, max_iter=1000)
XGB = XGBClassifier(
    n_estimators=80, max_depth=4, tree_method="hist", n_jobs=1, random_state=0
)

OURS = {
    "early fusion": FusionClassifier("early", blocks=BLOCKS, random_state=0),
    "late fusion": FusionClassifier("late", blocks=BLOCKS, random_state=0),
    "decision fusion, LR": DecisionFusionClassifier(LR, blocks=BLOCKS, cv=3),
}
OTHERS = {
    "LR": make_pipeline(SimpleImputer(), LR),
    "XGBoost": XGB,
    "HistGradientBoosting": HistGradientBoostingClassifier(max_iter=80, random_state=0),
    "MLPClassifier": make_pipeline(
        SimpleImputer(),
        StandardScaler(),
        MLPClassifier((256,), max_iter=30, random_state=0),
    ),
}
SINGLE = {
    "LR": LR,
    "head": FusionClassifier(blocks={"it": slice(None)}, random_state=0),
}


# Fusion with all cells and with missing cells


def masks(n_rows, fold):
    """Return the modality and the test rows of each mask, the same for all arms."""
    rng = np.random.default_rng(fold)
    draws = rng.random(n_rows)
    cases = {"all cells": (None, np.zeros(n_rows, dtype=bool))}
    for name in BLOCKS:
        for share in SHARES:
            cases[f"{share:.0%} of {name} missing"] = (name, draws < share)
    return cases


def without(X, name, rows):
    """Replace a modality of some rows by NaN."""
    X = X.copy()
    if name is not None:
        X[np.ix_(rows, np.arange(X.shape[1])[BLOCKS[name]])] = np.nan
    return X


def run_fusion(task, arm, estimator, fold, n_folds):
    """Evaluate an arm in one outer fold under all masks."""
    dataset, grouped = CHOSEN[task]
    X, data = load(dataset)
    y = data.target.to_numpy()
    train, test = outer_folds(y, data.groups, grouped, n_folds)[fold]
    score = partial(f1_score, y[test], average="macro")
    tick = time.perf_counter()
    predict = fit(arm, clone(estimator), X[train], y[train])
    result = {
        "task": task,
        "arm": arm,
        "fold": fold,
        "fit s": time.perf_counter() - tick,
    }
    for case, (name, rows) in masks(len(test), fold).items():
        result[case] = score(predict(without(X[test], name, rows)))
    return result


def fit(arm, estimator, X, y):
    """Fit an arm; return its prediction function.

    An arm of a single modality predicts the largest class for rows without it.
    """
    columns = BLOCKS.get(arm.split(" alone")[0])
    if columns is None:
        return estimator.fit(X, y).predict
    observed = ~np.isnan(X[:, columns.start])
    estimator.fit(X[observed][:, columns], y[observed])
    prior = DummyClassifier().fit(X, y).predict(X[:1])[0]

    def predict(X):
        observed = ~np.isnan(X[:, columns.start])
        predicted = np.full(len(X), prior)
        if observed.any():
            predicted[observed] = estimator.predict(X[observed][:, columns])
        return predicted

    return predict


def fusion_table(options):
    """Evaluate and summarise the arms."""
    singles = {
        f"{name} alone, {kind}": estimator
        for name in BLOCKS
        for kind, estimator in SINGLE.items()
    }
    arms = OURS | OTHERS | singles
    cells = in_parallel(
        options,
        [
            (run_fusion, task, arm, estimator, fold, options.folds)
            for task in CHOSEN
            for arm, estimator in arms.items()
            for fold in range(options.folds)
        ],
    )
    cases = [c for c in cells if c not in {"task", "arm", "fold", "fit s"}]
    by_arm = cells.groupby(["task", "arm"], sort=False)
    means, sds = by_arm[cases].mean(), by_arm[cases].std(ddof=0)
    table = means.map("{:.3f}".format) + " ± " + sds.map("{:.3f}".format)
    table.insert(0, "fit s", by_arm["fit s"].median().map("{:.1f}".format))
    return {
        "records": table.reset_index().to_dict("records"),
        "verdicts": judge(means, singles),
    }


def judge(means, singles):
    """Return the mean loss of each arm to missing cells, and its lead over one modality."""
    verdicts = []
    for (task, arm), row in means.iterrows():
        if arm in singles:
            continue
        missing = row.drop("all cells")
        best = means.loc[task].loc[list(singles)].max()
        verdicts.append(
            {
                "task": task,
                "arm": arm,
                "mean loss to missing cells": row["all cells"] - missing.mean(),
                "mean with cells missing": missing.mean(),
                "least lead over the better single modality": (row - best).min(),
            }
        )
    return verdicts


# Lambda x noise


def run_shift(seed, shift_grid, noise_grid, n_folds):
    """Tune shift and noise in nested cross-validation, against neither, on emoji."""
    X, data = load("emoji")
    y = data.target.to_numpy()
    rows = []
    for fold, (train, test) in enumerate(
        StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(X, y)
    ):
        # Random projections give equal widths and preserve distances and the gap. Principal
        # components are centred and would remove the gap.
        Z = np.hstack(
            [
                GaussianRandomProjection(256, random_state=0).fit_transform(
                    X[:, columns]
                )
                for columns in BLOCKS.values()
            ]
        ).astype(np.float32)
        blocks = {"text": slice(0, 256), "image": slice(256, 512)}
        for head_name, head in {
            "LR": LR,
            "late": FusionClassifier("late", blocks=blocks, random_state=seed),
        }.items():
            pipeline = make_pipeline(
                ModalityGapAligner(blocks, random_state=seed), head
            )
            grid = {
                "modalitygapaligner__shift": shift_grid,
                "modalitygapaligner__noise_std": noise_grid,
            }
            search = GridSearchCV(pipeline, grid, cv=3, scoring="f1_macro", refit=True)
            search.fit(Z[train], y[train])
            still = (
                clone(pipeline)
                .set_params(modalitygapaligner__shift=0.0)
                .fit(Z[train], y[train])
            )
            rows.append(
                {
                    "head": head_name,
                    "seed": seed,
                    "fold": fold,
                    "tuned": f1_score(
                        y[test], search.predict(Z[test]), average="macro"
                    ),
                    "neither": f1_score(
                        y[test], still.predict(Z[test]), average="macro"
                    ),
                    "shift": search.best_params_["modalitygapaligner__shift"],
                    "noise_std": search.best_params_["modalitygapaligner__noise_std"],
                }
            )
    return rows


def shift_table(options):
    """Test whether tuning shift and noise gains."""
    plan = [
        (run_shift, seed, [-1.0, 0.0, 0.5, 1.0], [0.0, 0.126], options.folds)
        for seed in range(options.seeds)
    ]
    records = []
    for head, rows in in_parallel(options, plan).groupby("head", sort=False):
        gains = rows["tuned"] - rows["neither"]
        verdict = judge_gains(gains, options.folds)
        records.append(
            {
                "head": head,
                "neither": f"{rows['neither'].mean():.3f} ± {rows['neither'].std():.3f}",
                "shift and noise tuned": f"{rows['tuned'].mean():.3f} ± {rows['tuned'].std():.3f}",
                "gain": verdict["gain"],
                "sd over seeds": gains.groupby(rows["seed"]).mean().std(),
                "p": verdict["p"],
                "shifts chosen": " ".join(
                    f"{value:g}: {times}"
                    for value, times in rows["shift"].value_counts().items()
                ),
                "noise chosen": " ".join(
                    f"{value:g}: {times}"
                    for value, times in rows["noise_std"].value_counts().items()
                ),
            }
        )
    return {"records": records + widths()}


def widths():
    """Score the first columns of both spaces without any shift."""
    X, data = load("emoji")
    y = data.target.to_numpy()
    records = []
    for width in (16, 32, 64, 128):
        scores = []
        for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(X, y):
            cut = {name: X[:, c][:, :width] for name, c in BLOCKS.items()}
            Z = np.hstack(list(cut.values()))
            predicted = clone(LR).fit(Z[train], y[train]).predict(Z[test])
            scores.append(f1_score(y[test], predicted, average="macro"))
        text = f"{np.mean(scores):.3f} ± {np.std(scores):.3f}"
        records.append({"head": f"LR, first {width} columns of each", "neither": text})
    return records


# Cost of training


def speed_table(options):
    """Time fits and the same arithmetic in a bare loop, alternately in one process."""
    X, data = load("emoji")
    y = data.target.to_numpy()
    records = []
    for join in ("early", "late"):
        head = FusionClassifier(
            join, blocks=BLOCKS, random_state=0, max_epochs=10, device="cpu"
        )
        ratios, ours, bare = [], [], []
        head.fit(X, y), bare_loop(join, X, y)
        for _ in range(options.repeats):
            mine, theirs = (
                timed(lambda h=head: h.fit(X, y)),
                timed(lambda join=join: bare_loop(join, X, y)),
            )
            ours.append(mine), bare.append(theirs), ratios.append(mine / theirs)
        records.append(
            {
                "head": join,
                "fit s": np.median(ours),
                "bare loop s": np.median(bare),
                "ratio": np.median(ratios),
            }
        )
    return {"records": records}


def timed(run):
    """Return the seconds of a call."""
    tick = time.perf_counter()
    run()
    return time.perf_counter() - tick


def bare_loop(join, X, y, n_epochs=10, batch_size=64):
    """Train the same network with layers of torch, and modality dropout."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    X = StandardScaler().fit_transform(X).astype(np.float32)
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    widths = [c.stop - c.start for c in BLOCKS.values()]

    def block(n_in):
        return nn.Sequential(
            nn.Linear(n_in, 256), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(256)
        )

    parts = nn.ModuleList(
        [block(sum(widths))] if join == "early" else map(block, widths)
    )
    output = nn.Linear(256 * len(parts), 9)
    parameters = [*parts.parameters(), *output.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(X)).split(batch_size):
            x = list(X[rows].split(widths, dim=1))
            observed = torch.rand(len(rows), 2) >= 0.3
            observed[~observed.any(dim=1), 0] = True
            x = [part * observed[:, [i]] for i, part in enumerate(x)]
            if join == "early":
                hidden = parts[0](torch.cat(x, dim=1))
            else:
                pairs = zip(parts, x, strict=True)
                hidden = torch.cat(
                    [p(v) * observed[:, [i]] for i, (p, v) in enumerate(pairs)], dim=1
                )
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(output(hidden), y[rows]).backward()
            optimizer.step()


def efficiency_table(options):
    """Encode 600 emoji in each of two epochs, or once."""
    emoji = LOADERS["emoji"]()
    pipeline = make_pipeline(
        PerModalityUnion(
            [
                ("text", FrozenEncoder(minilm()), "name"),
                ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
            ]
        ),
        FusionClassifier("early", blocks=BLOCKS, random_state=0),
    )
    X, y = emoji.data.iloc[::3], emoji.target.iloc[::3]
    report = efficiency_report(pipeline, X, y, n_epochs=2, random_state=0)
    return {"records": report.reset_index().to_dict("records")}


# The command


TABLES = {
    "fusion": fusion_table,
    "shift": shift_table,
    "speed": speed_table,
    "efficiency": efficiency_table,
}


def main():
    """Compute and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES, nargs="?", default="fusion")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    for dataset in LOADERS:
        load(dataset)  # workers then read all vectors from the store
    tick = time.perf_counter()
    result = TABLES[options.table](options)
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
