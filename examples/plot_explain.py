"""
====================
Explain a prediction
====================

A classifier of frozen embeddings can be explained in the terms of the table: which
modality led to the prediction, and which training rows are most similar in the space of
the classes? This example explains the least certain predictions for emoji.

.. seealso:: :doc:`/user_guide/explain` in the user guide.
"""

# %%
# Fit a classifier
# ----------------
# Two branches with a projection each. ``EmbeddingClassifier`` accepts missing blocks, so
# it can also predict from one modality.
import io
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors

from sklembed import (
    ContrastiveProjector,
    EmbeddingClassifier,
    FrozenEncoder,
    PerModalityUnion,
)
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm

emoji = load_emoji()
names = np.array(emoji.target_names)
chosen = np.random.default_rng(0).permutation(len(emoji.data))[:1200]
table, y = emoji.data.iloc[chosen], names[emoji.target.to_numpy()[chosen]]
union = PerModalityUnion(
    [
        ("text", FrozenEncoder(minilm()), "name"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")
train, test, y_train, y_test = train_test_split(
    table, y, test_size=0.25, stratify=y, random_state=0
)
X_train = union.fit_transform(train)
X_test = union.transform(test)
classifier = EmbeddingClassifier(random_state=0).fit(X_train, y_train)
print(f"accuracy {classifier.score(X_test, y_test):.3f}")

# %%
# Which modality led to the prediction?
# -------------------------------------
# Predict again without a modality: its block is NaN. The difference of the probabilities
# is what the modality adds to the prediction of this row.
blocks = {"both": X_test}
for kept, removed in (("name", "image__"), ("image", "text__")):
    blocks[kept] = X_test.copy()
    blocks[kept][X_test.filter(like=removed).columns] = np.nan
probabilities = {
    kept: classifier.predict_proba(block) for kept, block in blocks.items()
}

# %%
# Which training rows are similar?
# --------------------------------
# Raw embeddings find rows that look or sound alike. A projection that is trained on the
# labels finds rows that are alike in what distinguishes the classes.
projector = ContrastiveProjector(passthrough=False, random_state=0)
Z_train = projector.fit(X_train, y_train).transform(X_train)
neighbours = NearestNeighbors(n_neighbors=3).fit(Z_train)
_, nearest = neighbours.kneighbors(projector.transform(X_test))

# %%
# Explain four rows
# -----------------
# Of the rows on which the name and the image disagree, the four on which each is most
# certain.


def draw(ax, row, label):
    """Draw an emoji with its name and a label."""
    with Image.open(io.BytesIO(row["image"])) as image:
        ax.imshow(image.convert("RGBA"))
    name = shorten(row["name"], 18, placeholder=" …")
    ax.set_title(f"{name}\n{label}", fontsize=8)
    ax.axis("off")


by_name, by_image = probabilities["name"], probabilities["image"]
disagree = by_name.argmax(axis=1) != by_image.argmax(axis=1)
certainty = np.minimum(by_name.max(axis=1), by_image.max(axis=1)) * disagree
rows = np.argsort(-certainty, kind="stable")[:4]
colors = {"both": "#000000", "name": "#0072B2", "image": "#E69F00"}
figure, axes = plt.subplots(
    4, 5, figsize=(8, 7.5), layout="constrained", width_ratios=[1, 1.8, 1, 1, 1]
)
for (left, bars, *others), row in zip(axes, rows, strict=True):
    draw(left, test.iloc[row], f"is {y_test[row]}")
    top = np.argsort(-sum(probabilities[kept][row] for kept in colors))[:3]
    for i, (kept, color) in enumerate(colors.items()):
        positions = np.arange(3) + 0.27 * (i - 1)
        bars.barh(
            positions, probabilities[kept][row, top], 0.25, color=color, label=kept
        )
    bars.set(xlim=(0, 1))
    bars.set_yticks(np.arange(3), classifier.classes_[top], fontsize=8)
    bars.invert_yaxis()
    for ax, neighbour in zip(others, nearest[row], strict=True):
        draw(ax, train.iloc[neighbour], y_train[neighbour])
handles, labels = axes[0, 1].get_legend_handles_labels()
figure.legend(
    handles, labels, title="predicted from", ncols=3, loc="outside lower center"
)
axes[-1, 1].set_xlabel("probability")
figure.suptitle(
    "test row · probabilities · nearest training rows in the projected space"
)
plt.show()
