"""
==================================
Predict with missing modalities
==================================

Real tables have holes: a note was never written, or a scan was not taken. sklembed
represents a missing text or image as a block of NaN. This example hides titles and
images of clip art at random, first in new rows only and then in training as well, and
compares estimators that leave a missing modality out with imputation.
"""

# %%
# Encode once, hide later
# -----------------------
# Hidden cells are None in the table, as they would be in practice. The cells that
# remain are read from the store, so that holes cost no encoding. The rows are split by
# creator.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline

from sklembed import (
    DecisionFusionClassifier,
    EmbeddingClassifier,
    FrozenEncoder,
    FusionClassifier,
    PerModalityUnion,
)
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

clipart = load_openclipart()
rows = np.random.default_rng(0).permutation(len(clipart.data))[:1000]
X = clipart.data.iloc[rows][["title", "image"]].reset_index(drop=True)
y = np.array(clipart.target_names)[clipart.target.iloc[rows]]
folds = list(
    GroupKFold(3, shuffle=True, random_state=0).split(X, y, clipart.groups[rows])
)
union = PerModalityUnion(
    [
        ("title", FrozenEncoder(minilm()), "title"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")


def hide(table, share, seed):
    """Return the table with this share of its titles and images set to None."""
    hidden = np.random.default_rng(seed).random(table.shape) < share
    return table.mask(hidden, None)


shares = [0.0, 0.2, 0.4, 0.6, 0.8]
tables = {share: union.fit_transform(hide(X, share, seed=1)) for share in shares}
n_missing = hide(X, 0.4, seed=1).isna().sum(axis=1)
print("missing cells of a row at a share of 0.4:")
print(n_missing.value_counts(normalize=True).sort_index().round(2).to_string())

# %%
# Choose estimators
# -----------------
# Three estimators accept blocks of NaN. The kernel of :class:`~sklembed.EmbeddingClassifier`
# sums over the observed modalities. :class:`~sklembed.FusionClassifier` hides modalities
# at random while it trains. :class:`~sklembed.DecisionFusionClassifier` fits a classifier
# for each modality and pools those of the observed ones. Imputation by the mean, with or
# without an indicator, is the baseline. A logistic regression cannot accept NaN.


def logistic():
    """Return the classifier that three of the models have in common."""
    return LogisticRegression(C=10, max_iter=1000)


models = {
    "EmbeddingClassifier": EmbeddingClassifier(members=["kernel"], random_state=0),
    "FusionClassifier": FusionClassifier("late", random_state=0),
    "DecisionFusionClassifier": DecisionFusionClassifier(logistic()),
    "mean imputation": make_pipeline(SimpleImputer(), logistic()),
    "mean and indicator": make_pipeline(SimpleImputer(add_indicator=True), logistic()),
}

# %%
# Hide cells
# ----------
# Each model is fitted on complete rows and on rows with holes, and predicts rows with
# the same share of holes. A few titles are missing from the start.
records = []
for name, model in models.items():
    for fold, (train, test) in enumerate(folds):
        for holes in ("new rows only", "training and new rows"):
            model.fit(tables[0.0].iloc[train], y[train])
            for share in shares:
                if holes == "training and new rows":
                    model.fit(tables[share].iloc[train], y[train])
                labels = model.predict(tables[share].iloc[test])
                score = f1_score(y[test], labels, average="macro")
                records.append((name, holes, share, fold, score))
columns = ["model", "holes in", "share", "fold", "score"]
results = pd.DataFrame(records, columns=columns)
scores = results.groupby(["holes in", "model", "share"], sort=False)["score"]
print(scores.mean().unstack("share").round(3).to_string())
print("\nstandard deviation over folds")
print(scores.std().unstack("share").round(3).to_string())

# %%
# Conclude
# --------
# TODO

# %%
# Plot the scores
# ---------------
# The error bars are standard errors over folds. A row may lack both cells; its share
# grows to the square of the share of missing cells, and its prediction is the most
# frequent class at best.
colors = ["#0072B2", "#E69F00", "#009E73", "#999999", "#CC79A7"]
figure, panels = plt.subplots(
    1, 2, figsize=(10, 4.6), sharey=True, layout="constrained"
)
for axes, holes in zip(panels, results["holes in"].unique(), strict=True):
    for (name, color), marker in zip(
        zip(models, colors, strict=True), "osD^v", strict=True
    ):
        line = scores.mean()[holes, name]
        error = scores.sem()[holes, name]
        axes.errorbar(
            line.index * 100,
            line,
            error,
            color=color,
            marker=marker,
            lw=2,
            capsize=3,
            label=name,
        )
    axes.set(title=f"holes in {holes}", xlabel="missing titles and images (%)")
    axes.grid(alpha=0.3)
panels[0].set(ylabel="macro-F1 on new creators", ylim=(0, None))
figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
)
plt.show()
