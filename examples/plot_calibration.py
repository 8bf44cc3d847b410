"""
==========================================
Check whether probabilities can be trusted
==========================================

A probability is calibrated if it is right as often as it says: of all rows with a
confidence of 0.8, 80 % should be classified correctly. Thresholds, costs and abstaining
are only meaningful for calibrated probabilities. :class:`~sklembed.EmbeddingClassifier`
calibrates its members on out-of-fold predictions. This example compares it with other
classifiers on the same frozen embeddings.

.. seealso:: :doc:`/user_guide/predict` in the user guide.
"""

# %%
# Embed names and images
# ----------------------
# 1,200 emoji in nine classes. A missing name is a block of NaN, which
# ``EmbeddingClassifier`` accepts.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import GaussianNB

from sklembed import EmbeddingClassifier, FrozenEncoder, PerModalityUnion
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm

emoji = load_emoji()
chosen = np.random.default_rng(0).permutation(len(emoji.data))[:1200]
y = emoji.target.to_numpy()[chosen]
union = PerModalityUnion(
    [
        ("text", FrozenEncoder(minilm()), "name"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")
X = union.fit_transform(emoji.data.iloc[chosen])

# %%
# Predict each row out of fold
# ----------------------------
classifiers = {
    "EmbeddingClassifier": EmbeddingClassifier(random_state=0),
    "logistic regression, C=1": LogisticRegression(max_iter=2000),
    "logistic regression, C=100": LogisticRegression(C=100, max_iter=2000),
    "random forest": RandomForestClassifier(random_state=0),
    "Gaussian naive Bayes": GaussianNB(),
}
folds = StratifiedKFold(3, shuffle=True, random_state=0)
probabilities = {}
for name, classifier in classifiers.items():
    probabilities[name] = cross_val_predict(
        classifier, X, y, cv=folds, method="predict_proba"
    )

# %%
# Compare confidence and accuracy
# -------------------------------
# The expected calibration error is the mean distance between the confidence and the
# accuracy, over ten bins with equally many rows. The log loss also rewards probabilities
# that are far from the share of the class.


def reliability(proba, n_bins=10):
    """Return the confidence and the accuracy of bins with equally many rows."""
    confidence = proba.max(axis=1)
    correct = proba.argmax(axis=1) == y
    bins = np.array_split(np.argsort(confidence, kind="stable"), n_bins)
    means = [(confidence[rows].mean(), correct[rows].mean()) for rows in bins]
    return np.array(means).T


table = pd.DataFrame(index=list(classifiers))
for name, proba in probabilities.items():
    confidence, accuracy = reliability(proba)
    table.loc[name, "accuracy"] = accuracy_score(y, proba.argmax(axis=1))
    table.loc[name, "mean confidence"] = confidence.mean()
    table.loc[name, "calibration error"] = np.abs(confidence - accuracy).mean()
    table.loc[name, "log loss"] = log_loss(y, proba)
print(table.round(3).to_string())

# %%
# Plot reliability curves
# -----------------------
# Below the diagonal a classifier is overconfident; above, it is underconfident.
styles = zip(
    ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"), "os^Dv", strict=True
)
figure, (curves, points) = plt.subplots(
    1, 2, figsize=(8.5, 4.4), layout="constrained", width_ratios=[1.25, 1]
)
curves.plot([0, 1], [0, 1], color="black", lw=1, ls=":", label="calibrated")
colors = {}
for (name, proba), (color, marker) in zip(probabilities.items(), styles, strict=True):
    colors[name] = color
    width = 3 if name == "EmbeddingClassifier" else 1.5
    curves.plot(
        *reliability(proba), color=color, marker=marker, ms=5, lw=width, label=name
    )
curves.set(
    title="reliability",
    xlabel="confidence (probability of the predicted class)",
    ylabel="accuracy",
    xlim=(0.2, 1.02),
    ylim=(0.2, 1.02),
)
curves.legend(fontsize="small")
losses = table["log loss"].iloc[::-1]
for name, loss in losses.items():
    points.scatter(loss, name, s=80, color=colors[name])
    points.annotate(
        f"{loss:.2f}", (loss, name), xytext=(9, -4), textcoords="offset points"
    )
points.set(
    title="log loss",
    xlabel="log loss in nats (lower is better)",
    xscale="log",
)
points.set_xlim(losses.min() / 1.3, losses.max() * 2)
points.grid(axis="y", alpha=0.3)
points.tick_params(axis="y", labelsize="small")
plt.show()

# %%
# Abstain from uncertain rows
# ---------------------------
# With calibrated probabilities, a threshold on the confidence has the accuracy that it
# promises. The others can go to a person.
proba = probabilities["EmbeddingClassifier"]
for threshold in (0.0, 0.5, 0.8, 0.9):
    rows = proba.max(axis=1) >= threshold
    accuracy = accuracy_score(y[rows], proba[rows].argmax(axis=1))
    print(f"confidence >= {threshold:.1f}: {rows.mean():4.0%} of rows, {accuracy:.3f}")
