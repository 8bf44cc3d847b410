"""
===============================
Predict with missing modalities
===============================

Real tables have holes: a note was never written, or a scan was not taken. sklembed
represents a missing text or image as a block of NaN. This example hides titles or
images of clip art at random, first in new rows only and then in training as well. It
compares estimators that leave a missing modality out with imputation.

.. seealso:: :doc:`/user_guide/missing` in the user guide.
"""

# %%
# Encode once, hide later
# -----------------------
# A row with a hole has lost its title or its image, by chance. Hidden cells are None in
# the table, as they would be in practice. The cells that remain are read from the
# store, so that holes cost no encoding. Creators often drew series, which fall on both
# sides of random folds, so the scores of all models are optimistic.
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.utils.parallel import Parallel, delayed

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
rows = np.random.default_rng(0).permutation(len(clipart.data))[:800]
X = clipart.data.iloc[rows][["title", "image"]].reset_index(drop=True)
y = np.array(clipart.target_names)[clipart.target.iloc[rows]]
folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y))
union = PerModalityUnion(
    [
        ("title", FrozenEncoder(minilm()), "title"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")


def hide(table, share, seed):
    """Return the table with a title or an image of a share of rows set to None."""
    generator = np.random.default_rng(seed)
    has_hole = generator.random(len(table)) < share
    hides_title = generator.random(len(table)) < 0.5
    hidden = np.column_stack([has_hole & hides_title, has_hole & ~hides_title])
    return table.mask(hidden, None)


shares = [0.0, 0.45, 0.9]
tables = {share: union.fit_transform(hide(X, share, seed=1)) for share in shares}
for share in shares:
    n_missing = hide(X, share, seed=1).isna().sum()
    print(f"holes in {share:.0%} of rows: {n_missing.to_dict()} cells are missing")

# %%
# Choose estimators
# -----------------
# Three estimators accept blocks of NaN. The kernel of
# :class:`~sklembed.EmbeddingClassifier` imputes a missing modality by the mean in its
# feature space, and enlarges the deviations of the other modality from its mean.
# :class:`~sklembed.FusionClassifier` hides modalities at random while it trains.
# :class:`~sklembed.DecisionFusionClassifier` fits a classifier for each modality and
# pools the predictions of the observed ones. A logistic regression does not accept NaN. The
# imputer gives it the mean vector.
logistic = LogisticRegression(C=10, tol=1e-3, max_iter=1000)
models = {
    "kernel of EmbeddingClassifier": EmbeddingClassifier(
        members=["kernel"], random_state=0
    ),
    "FusionClassifier": FusionClassifier("late", random_state=0),
    "DecisionFusionClassifier": DecisionFusionClassifier(logistic, weights=None),
    "imputed by the mean": make_pipeline(SimpleImputer(), logistic),
}

# %%
# Fit with and without holes
# --------------------------
# Models that were fitted on complete rows predict rows with any share of holes. Each
# model is also fitted on rows with holes, and predicts rows with the same share. A few
# titles are missing from the start, so single rows lose both cells. Classifiers then
# return the class prior.


def score(model, share_in_training, fold):
    """Fit on a table, and return the macro-F1 on new rows by their share of holes."""
    train, test = folds[fold]
    model = clone(model).fit(tables[share_in_training].iloc[train], y[train])
    scores = {}
    for share in shares if share_in_training == 0 else [share_in_training]:
        labels = model.predict(tables[share].iloc[test])
        scores[share] = f1_score(y[test], labels, average="macro")
    return scores


tasks = list(product(models, shares, range(len(folds))))
scores_of_tasks = Parallel(n_jobs=2, prefer="threads")(
    delayed(score)(models[name], share, fold) for name, share, fold in tasks
)
records = []
for (name, share_in_training, fold), by_share in zip(
    tasks, scores_of_tasks, strict=True
):
    for share, value in by_share.items():
        if share_in_training == 0:
            records.append(("new rows only", name, share, fold, value))
        if share_in_training == share:
            records.append(("training and new rows", name, share, fold, value))
columns = ["holes in", "model", "share", "fold", "macro-F1"]
results = pd.DataFrame(records, columns=columns)
scores = results.groupby(columns[:3])["macro-F1"]
mean_scores, errors = scores.mean().unstack("share"), scores.sem().unstack("share")
print(mean_scores.round(3).to_string())
print("\nstandard error over folds")
print(errors.round(3).to_string())

# %%
# Choose by the rows that you expect
# ----------------------------------
# - If new rows are complete, holes do not matter: choose the model that is best on
#   complete rows.
# - If training rows are complete and new rows are not, choose the kernel. If most new
#   rows have holes, choose a network with modality dropout. Both lose less than
#   imputation.
# - If training rows have holes, keep them: no row has to be dropped.
# - Imputation by the mean moves a row towards the middle of all rows. It is simple, but
#   a baseline to compare with, not a default. The kernel imputes the mean as well, but
#   enlarges the evidence of the observed modality.
# - All titles that are missing from the start belong to one class. A model that reads
#   missing titles as a sign of this class fails as soon as other titles are missing.

# %%
# Plot the scores
# ---------------
# The error bars are standard errors over folds.
styles = [("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "v")]
figure, panels = plt.subplots(1, 2, figsize=(9, 5), sharey=True, layout="constrained")
for axes, holes in zip(panels, results["holes in"].unique(), strict=True):
    for name, (color, marker) in zip(models, styles, strict=True):
        mean, error = mean_scores.loc[holes, name], errors.loc[holes, name]
        style = {"color": color, "marker": marker, "lw": 2, "capsize": 3, "ms": 7}
        axes.errorbar(np.array(shares) * 100, mean, error, label=name, **style)
    axes.set_title(f"holes in {holes}", fontsize=13)
    axes.set_xlabel("rows without title or image (%)", fontsize=12)
    axes.set_xticks(np.array(shares) * 100)
    axes.grid(alpha=0.3)
panels[0].set_ylabel("macro-F1 on new rows", fontsize=12)
handles = panels[0].get_legend_handles_labels()
figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=12)
plt.show()
