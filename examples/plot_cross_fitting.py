"""
=============================
Avoid leaking training labels
=============================

A supervised projection has seen the labels of its training rows. Projected by the same
network, these rows are much better separated than unseen rows, and a classifier that is
fitted on them is overconfident. ``ContrastiveProjector.fit_transform`` is therefore
cross-fitted, like scikit-learn's ``TargetEncoder``: each training row is projected by a
network that has not seen it.

.. seealso:: :doc:`/user_guide/projection` in the user guide.
"""

# %%
# Load the data
# -------------
# Classify the images of emoji into nine classes, in three folds.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, silhouette_score
from sklearn.model_selection import StratifiedKFold
from xgboost import XGBClassifier

from sklembed import ContrastiveProjector, FrozenEncoder
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0

emoji = load_emoji()
y = emoji.target.to_numpy()
encoder = FrozenEncoder(efficientnet_lite0(), normalize=True)
X = encoder.fit_transform(emoji.data[["image"]])
folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y))

# %%
# Project the training rows in two ways
# -------------------------------------
# The test rows are the same for both, because ``transform`` always uses the network
# fitted on all training rows. ``passthrough=False`` returns the projection alone.


def project(train, test):
    """Return the training rows, projected in both ways, and the projected test rows."""
    projector = ContrastiveProjector(passthrough=False, random_state=0)
    cross_fitted = projector.fit_transform(X[train], y[train])
    return projector.transform(X[train]), cross_fitted, projector.transform(X[test])


# %%
# Compare classifiers on both
# ---------------------------
# Confidence is the mean probability of the predicted class. It should equal the
# accuracy.
classifiers = {
    "XGBoost": XGBClassifier(n_estimators=80, max_depth=4, n_jobs=2, random_state=0),
    "random forest": RandomForestClassifier(n_jobs=2, random_state=0),
    "logistic regression": LogisticRegression(C=10, max_iter=2000),
}
projections = [project(train, test) for train, test in folds]
rows = []
for (train, test), (plain, cross_fitted, Z_test) in zip(
    folds, projections, strict=True
):
    for name, classifier in classifiers.items():
        for method, Z in (
            ("fit and transform", plain),
            ("fit_transform", cross_fitted),
        ):
            probabilities = classifier.fit(Z, y[train]).predict_proba(Z_test)
            predicted = probabilities.argmax(axis=1)
            confidence = probabilities.max(axis=1).mean()
            accuracy = accuracy_score(y[test], predicted)
            f1 = f1_score(y[test], predicted, average="macro")
            rows.append((name, method, confidence, accuracy, f1))
columns = ["classifier", "method", "confidence", "accuracy", "macro-F1"]
by_method = pd.DataFrame(rows, columns=columns).groupby(columns[:2], sort=False)
results = by_method.mean()
spread = by_method.std(ddof=0)
table = results.map("{:.3f}".format) + " ± " + spread.map("{:.3f}".format)
print(table.to_string())

# %%
# Plot the projections
# --------------------
# The three panels show the same two directions of the projected space, in the first
# fold. The result of ``fit_transform`` resembles the unseen rows. The result of ``fit``
# and ``transform`` does not.
(train, test), (plain, cross_fitted, Z_test) = folds[0], projections[0]
panels = {
    "training rows\nfit(X, y).transform(X)": (plain, y[train]),
    "training rows\nfit_transform(X, y)": (cross_fitted, y[train]),
    "new rows\ntransform(X_new)": (Z_test, y[test]),
}
colors = np.array(
    "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #999999 #F0E442".split()
)
figure, axes = plt.subplots(2, 2, figsize=(7, 7), layout="constrained")
pca = PCA(2, random_state=0).fit(plain)
for ax, (title, (Z, labels)) in zip(axes.flat, panels.items(), strict=False):
    ax.scatter(*pca.transform(Z).T, s=8, c=colors[labels])
    ax.set(
        title=title,
        xlabel=f"silhouette {silhouette_score(Z, labels):.2f}",
        xticks=[],
        yticks=[],
        xlim=(-1.1, 1.1),
        ylim=(-1.1, 1.1),
    )

bars, positions = axes[1, 1], np.arange(len(classifiers))
for offset, method, color in (
    (-0.2, "fit and transform", "#E69F00"),
    (0.2, "fit_transform", "#56B4E9"),
):
    scores = results.xs(method, level="method")["macro-F1"]
    container = bars.bar(
        positions + offset, scores, width=0.38, label=method, color=color
    )
    bars.bar_label(container, fmt="{:.2f}", fontsize="small")
bars.set_xticks(positions, [name.replace(" ", "\n") for name in scores.index])
bars.set(
    title="macro-F1 on new rows\nmean of three folds", ylim=(0, 1), yticks=[0, 0.5, 1]
)
bars.legend(loc="upper left", fontsize="small")
figure.savefig("cross_fitting.png", dpi=120)
plt.show()
