"""
============================
Learn from few labelled rows
============================

Labels are expensive, and rows without labels are often plenty.
:func:`~sklembed.evaluation.few_label_curve` draws learning curves over the share of
labelled rows: of a head on the frozen embeddings, on features that are learned from all
rows without labels, and on a projection that is learned from the labelled rows.

.. seealso:: :doc:`/user_guide/crossmodal` in the user guide.
"""

# %%
# Embed names and images
# ----------------------
# 600 emoji in nine classes, with names by MiniLM and images by EfficientNet-lite0.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from sklembed import (
    ContrastiveProjector,
    CrossAttentionAdaptor,
    FrozenEncoder,
    PerModalityUnion,
)
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import few_label_curve

emoji = load_emoji()
chosen = np.random.default_rng(0).permutation(len(emoji.data))[:600]
y = emoji.target.to_numpy()[chosen]
union = PerModalityUnion(
    [
        ("text", FrozenEncoder(minilm()), "name"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")
X = union.fit_transform(emoji.data.iloc[chosen])

# %%
# Compare features
# ----------------
# ``CrossAttentionAdaptor`` learns from pairs of a name and an image, without labels, and
# ``PCA`` from the vectors alone. Both see all training rows. The projector sees the
# labelled rows alone. All arms have the same folds and labelled rows.
curve = few_label_curve(
    LogisticRegression(C=10, max_iter=2000),
    X,
    y,
    pretrained={
        "PCA, without labels": PCA(128, random_state=0),
        "CrossAttentionAdaptor, without labels": CrossAttentionAdaptor(random_state=0),
    },
    supervised={"ContrastiveProjector": ContrastiveProjector(random_state=0)},
    fractions=(0.05, 0.1, 0.3, 1.0),
    cv=3,
    n_seeds=1,
    scoring="f1_macro",
    random_state=0,
)
scores = curve.pivot_table("f1_macro", "arm", "n_labelled", sort=False)
print(scores.round(3).to_string())

# %%
# Plot the curves
# ---------------
# "control" is the head on the frozen embeddings. A feature is worth its cost where its
# curve is above that of the control by more than the spread.
styles = {
    "control": ("#000000", "o"),
    "PCA, without labels": ("#E69F00", "s"),
    "CrossAttentionAdaptor, without labels": ("#009E73", "^"),
    "ContrastiveProjector": ("#0072B2", "D"),
}
figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for arm, (color, marker) in styles.items():
    folds = curve[curve["arm"] == arm].groupby("n_labelled")["f1_macro"]
    ax.errorbar(
        scores.columns,
        folds.mean(),
        folds.std(ddof=0),
        color=color,
        marker=marker,
        capsize=3,
        label=arm,
    )
ax.set(
    title="Learning curves",
    xscale="log",
    xlabel="labelled training rows, of 400",
    ylabel="macro-F1 (mean and sd over three folds)",
)
ax.set_xticks(scores.columns, [str(n) for n in scores.columns])
ax.minorticks_off()
ax.legend(fontsize="small", loc="lower right")
plt.show()
