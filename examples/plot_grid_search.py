"""
================================================
Search over encoders and classifiers in one grid
================================================

Which layer of the encoder, which pooling, which projection and which classifier? All
are parameters of one ``Pipeline``, so ``GridSearchCV`` answers. Each cell is encoded
once per layer and pooling, whatever the number of folds, candidates and processes. This
example counts the work that the store saves.

.. seealso:: :doc:`/user_guide/encoders` in the user guide.
"""

# %%
# Write one pipeline
# ------------------
# The task is to predict the class of an emoji from its name. The store of this example
# is new, so that its counts begin at zero. Without the parameter, all vectors are kept
# in the default store for later runs. Vectors of inner layers vary little around a
# common direction, so the columns are scaled.
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sklembed import ContrastiveProjector, EmbeddingStore, FrozenEncoder, prefetch
from sklembed.datasets import load_emoji
from sklembed.encoders import minilm

emoji = load_emoji()
rows = np.random.default_rng(0).permutation(len(emoji.data))[:600]
X, y = emoji.data[["name"]].iloc[rows], emoji.target.iloc[rows]
store = EmbeddingStore(Path(tempfile.mkdtemp()) / "embeddings.sqlite")
pipeline = Pipeline(
    [
        ("encoder", FrozenEncoder(minilm(), store=store)),
        ("projector", ContrastiveProjector(32, max_epochs=10, cv=3, random_state=0)),
        ("scaler", StandardScaler()),
        ("classifier", LogisticRegression(C=0.1, max_iter=1000)),
    ]
)

# %%
# Define the grid
# ---------------
# A layer is a hidden state of the network, counted from its output, -1. "passthrough"
# removes the projection. Steps are parameters too, so one grid has two classifiers.
# Emoji of one subgroup are similar, and each subgroup is in a single fold.
grid = {
    "encoder__layer": [-1, -3],
    "encoder__pooling": ["mean", "cls"],
    "projector": ["passthrough", pipeline["projector"]],
    "classifier": [LogisticRegression(C=0.1, max_iter=1000), SVC(C=10)],
}
cv = list(
    StratifiedGroupKFold(3, shuffle=True, random_state=0).split(
        X, y, emoji.groups[rows]
    )
)
search = GridSearchCV(pipeline, grid, cv=cv, scoring="f1_macro", n_jobs=2)

# %%
# Encode before the search
# ------------------------
# :func:`~sklembed.prefetch` encodes all cells that the search needs, in this process.
# The four encoders differ in layer and pooling only and share the passes through the
# network. The call is optional: without it, the first worker that needs a cell encodes
# it.
tick = time.perf_counter()
report = prefetch(search, X)
seconds_encoding = time.perf_counter() - tick
print(report.drop(columns=["path", "model"]).to_string(index=False))

# %%
# Search
# ------
tick = time.perf_counter()
search.fit(X, y)
seconds_searching = time.perf_counter() - tick
print({name: str(value) for name, value in search.best_params_.items()})

# %%
# Count the work
# --------------
# A pipeline without a store would encode the training rows and the test rows in every
# fit. The counts below are of the store.
n_fits = len(search.cv_results_["params"]) * search.n_splits_
statistics = store.stats()
encoded, served = statistics["encoded"].sum(), statistics["served"].sum()
print(f"{n_fits} fits in the search, and one of the best model")
print(f"{encoded} vectors encoded, {served} read from the store")
print(f"{seconds_encoding:.0f} s to encode, {seconds_searching:.0f} s to search")

# %%
# Read the result
# ---------------
# Compare the difference of two cells with the standard deviation over folds. Neighbours
# of the best candidate within it are as good. Among equal candidates choose the
# simplest: the output of the encoder, and no projection. The best of many candidates is
# also optimistic, so score the search itself on rows outside of it before you report a
# figure.
results = pd.DataFrame(search.cv_results_)
results["encoder"] = (
    "layer "
    + results["param_encoder__layer"].astype(str)
    + ",\n"
    + results["param_encoder__pooling"]
)
has_projector = results["param_projector"].map(str) != "passthrough"
results["rest"] = np.where(has_projector, "projector\n", "no projector\n")
results["rest"] += results["param_classifier"].map(lambda step: type(step).__name__)
shape = {"index": "encoder", "columns": "rest"}
mean = results.pivot(**shape, values="mean_test_score").sort_index(ascending=True)
std = results.pivot(**shape, values="std_test_score").loc[mean.index]
best = np.unravel_index(mean.to_numpy().argmax(), mean.shape)
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
image = axes.imshow(mean, cmap="viridis", aspect="auto")
middle = (mean.to_numpy().min() + mean.to_numpy().max()) / 2
for row, column in np.ndindex(mean.shape):
    score, deviation = mean.iloc[row, column], std.iloc[row, column]
    axes.text(
        column,
        row,
        f"{score:.3f}\n± {deviation:.3f}",
        ha="center",
        va="center",
        fontsize=12,
        color="white" if score < middle else "black",
        weight="bold" if (row, column) == best else "normal",
    )
axes.add_patch(
    plt.Rectangle(
        (best[1] - 0.48, best[0] - 0.47), 0.96, 0.94, fill=False, ec="#D55E00", lw=3
    )
)
axes.set_xticks(
    range(mean.shape[1]),
    [name.replace("Logistic", "Logistic\n") for name in mean.columns],
    fontsize=12,
)
axes.set_yticks(range(mean.shape[0]), mean.index, fontsize=13)
axes.set_title("macro-F1 on new subgroups ± standard deviation", fontsize=13)
figure.colorbar(image, label="macro-F1")
plt.show()
