"""
==========================
Check for leaks in a score
==========================

Random folds put near duplicates into training and test rows: a drawing in two colours, a
series by one author, a text with two words changed. The cross-validated score is then
too high for new rows. :func:`~sklembed.evaluation.leak_report` finds such rows by the
frozen embeddings of a pipeline, scores the model without them, and suggests groups for
cross-validation.

.. seealso:: :doc:`/user_guide/evaluate` in the user guide.
"""

# %%
# Report on a pipeline
# --------------------
# Clip art in 14 classes, by image and title. Rows are compared by the vectors of both
# encoders, which are in the store.
import io

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageOps
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from sklembed import FrozenEncoder, PerModalityUnion
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import leak_report
from sklembed.plots import LeakDisplay

clip_art = load_openclipart()
table = clip_art.data[["image", "title"]].iloc[:1500]
y = clip_art.target.iloc[:1500]
creators = clip_art.groups[:1500]
union = PerModalityUnion(
    [
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
        ("title", FrozenEncoder(minilm()), "title"),
    ]
)
model = make_pipeline(union, SimpleImputer(), LogisticRegression(C=10, max_iter=1000))
report = leak_report(model, table, y, cv=5, random_state=0)
print(report.summary().round(3).to_string())

# %%
# ``leaked rows`` are test rows with a near duplicate among the training rows of their
# fold. The model has nearly seen them, and scores higher on them. The score in
# ``suggested groups`` is that of folds that keep near duplicates together.
LeakDisplay.from_report(report).plot()
plt.show()

# sphinx_gallery_thumbnail_number = 2
# %%
# Look at the pairs
# -----------------
# Five of the pairs, from the nearest to the threshold. Look at them before you trust a
# threshold: the nearest here are placeholders of images that were lost.
pairs = report.pairs_[report.pairs_["column"] == "image"]
chosen = pairs.iloc[np.linspace(0, len(pairs) - 1, 5).astype(int)]
figure, axes = plt.subplots(2, 5, figsize=(8, 4.2), layout="constrained")
for column, (_, pair) in zip(axes.T, chosen.iterrows(), strict=True):
    for ax, row in zip(column, (pair["row"], pair["nearest"]), strict=True):
        title = table["title"].iloc[row] or "(no title)"
        with Image.open(io.BytesIO(table["image"].iloc[row])) as image:
            image = ImageOps.pad(image.convert("RGBA"), (128, 128))
        ax.imshow(image)
        ax.set_title(title[:16], fontsize="small")
        ax.set(xticks=[], yticks=[])
    column[1].set_xlabel(f"distance {pair['distance']:.2f}")
figure.suptitle("Test rows and their nearest training rows")
axes[0, 0].set_ylabel("test row")
axes[1, 0].set_ylabel("training row")
plt.show()

# %%
# Cross-validate by groups
# ------------------------
# The suggested groups are the connected components of the near duplicates. Groups that
# are known, such as the creators of drawings, are better: a style is shared by images
# that are not alike.
folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
for name, groups in (("suggested", report.groups_), ("creators", creators)):
    scores = cross_val_score(model, table, y, cv=folds, groups=groups)
    print(
        f"{name:10s} {len(np.unique(groups)):5d} groups   "
        f"accuracy {scores.mean():.3f} ± {scores.std():.3f}"
    )
