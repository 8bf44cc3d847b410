"""
=============================================
Predict a number from text, images and counts
=============================================

How large is the file of a drawing? The target is the size of an SVG file in kilobytes.
The table has the title of the drawing, its image, and the numbers of its elements.
``multimodal_pipeline("regressor")`` reads the columns as they are. This example shows
which columns help on drawings by new creators, and adds prediction intervals.

.. seealso:: :doc:`/user_guide/regression` in the user guide.
"""

# %%
# Load a table with a numeric target
# ----------------------------------
# File sizes differ by a factor of several hundred.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.compose import TransformedTargetRegressor
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict

from sklembed import EmbeddingRegressor, multimodal_pipeline
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

clipart = load_openclipart()
rows = np.random.default_rng(0).permutation(len(clipart.data))[:800]
X, groups = clipart.data.iloc[rows], clipart.groups[rows]
y = X.pop("svg_kb").to_numpy()
print(X.drop(columns="image").assign(svg_kb=y).head().to_string(index=False))
print(f"from {y.min():.1f} to {y.max():.0f} kB, median {np.median(y):.1f} kB")

# %%
# Choose models and an honest split
# ---------------------------------
# Models predict the logarithm of the size, because an error of 10 kB is large for a
# small file and small for a large one. ``TransformedTargetRegressor`` converts
# predictions back to kilobytes. Creators drew series with similar files, so all
# drawings of a creator are in the same fold. The baselines are the median, and gradient
# boosting on the counts, which needs no embeddings.
counts = ["n_path", "n_group", "n_gradient"]


def embedding_regressor():
    """Return a pipeline that reads any columns of the table."""
    # Two folds are enough for the scores that the regressor keeps, and save time.
    return multimodal_pipeline(
        EmbeddingRegressor(cv=2, random_state=0),
        text_encoder=minilm(),
        image_encoder=efficientnet_lite0(),
    )


models = {
    "median": (DummyRegressor(strategy="median"), counts),
    "counts": (HistGradientBoostingRegressor(random_state=0), counts),
    "image": (embedding_regressor(), ["image"]),
    "counts, image": (embedding_regressor(), [*counts, "image"]),
    "counts, image,\ntitle": (embedding_regressor(), [*counts, "image", "title"]),
}
cv = GroupKFold(3, shuffle=True, random_state=0)
folds = list(cv.split(X, y, groups))
predicted = {}
for name, (model, columns) in models.items():
    regressor = TransformedTargetRegressor(model, func=np.log, inverse_func=np.exp)
    predicted[name] = cross_val_predict(regressor, X[columns], y, cv=folds)

# %%
# Score the models
# ----------------
# The typical error is a factor: 2 means that the prediction is twice or half the true
# size. It is the exponential of the mean absolute error of logarithms. Compare the gain
# of a column with the spread over folds, which contain different creators. The image
# shows what the counts cannot, such as the length of the paths. Titles by new creators
# say little about the size of a file, and the typical error shows what such a column is
# worth.


def typical_factor(true, prediction):
    """Return the factor by which predictions are typically wrong."""
    return np.exp(np.abs(np.log(prediction / true)).mean())


factors = pd.DataFrame(
    {
        name: [typical_factor(y[test], prediction[test]) for _, test in folds]
        for name, prediction in predicted.items()
    }
)
table = pd.DataFrame({"typical factor": factors.mean(), "spread": factors.std()})
table.index = table.index.str.replace("\n", " ")
print(table.round(2).to_string())

# %%
# Add prediction intervals
# ------------------------
# The regressor predicts no interval. Its errors on drawings by other creators give one:
# the 5 % and 95 % quantiles of the ratio of the true to the predicted size. Those of a
# fold are taken from the other folds. The coverage of a fold can differ from 90 %,
# because its creators are others. The ratios are the same for all files.
prediction = predicted["counts, image"]
ratios = y / prediction
low, high = np.empty_like(y), np.empty_like(y)
for number, (train, test) in enumerate(folds):
    quantiles = np.quantile(ratios[train], [0.05, 0.95])
    low[test], high[test] = quantiles[:, None] * prediction[test]
    covered = np.mean((low[test] <= y[test]) & (y[test] <= high[test]))
    print(
        f"fold {number}: from {quantiles[0]:.2f} to {quantiles[1]:.2f} times the "
        f"prediction, coverage {covered:.0%}"
    )
inside = (low <= y) & (y <= high)
print(f"all folds: coverage {inside.mean():.0%}")

# %%
# Plot predictions and errors
# ---------------------------
# Left: the predictions out of fold, with the median of the intervals as a band. It is
# wider above the prediction: some files are much larger than the drawing suggests.
# Right: the typical factor in each fold, and its mean.
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
ends = np.array([1.5, 2000])
band = [ends * np.median(bound / prediction) for bound in (low, high)]
left.fill_between(ends, *band, color="#56B4E9", alpha=0.25, lw=0)
left.plot(ends, ends, color="black", lw=1)
for mask, color, label in (
    (inside, "#0072B2", "within its 90 % interval"),
    (~inside, "#D55E00", "outside"),
):
    left.scatter(prediction[mask], y[mask], s=9, color=color, alpha=0.6, label=label)
left.set_title("counts and image, new creators", fontsize=13)
left.set_xlabel("predicted file size (kB)", fontsize=12)
left.set_ylabel("true file size (kB)", fontsize=12)
left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
left.legend(loc="lower right", fontsize=11, markerscale=2)
for position, name in enumerate(factors):
    right.plot(factors[name], [position] * len(folds), "o", color="#999999", ms=6)
    right.plot(factors[name].mean(), position, "D", color="#D55E00", ms=9)
right.set_yticks(range(len(factors.columns)), factors.columns, fontsize=12)
right.invert_yaxis()
right.set_title("error (lower is better)", fontsize=13)
right.set_xlabel("typical factor of the error", fontsize=12)
right.grid(axis="x", alpha=0.4)
plt.show()
