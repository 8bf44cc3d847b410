"""
=====================
Search images by text
=====================

MiniLM and EfficientNet were pretrained independently, on texts and on images. A small
adaptor learns a shared space from 2,000 pieces of clip art with their titles, in
seconds and without labels. Queries then retrieve images that it has not seen in
training.

.. seealso:: :doc:`/user_guide/crossmodal` in the user guide.
"""

# %%
# Encode titles and images
# ------------------------
# The union returns a block of columns for each modality. Some drawings have no title:
# their block is NaN. Creators drew in series, so all drawings of a creator are in the
# same part of the split.
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit

from sklembed import (
    CanonicalAligner,
    CrossAttentionAdaptor,
    FrozenEncoder,
    PerModalityUnion,
    SharedFusionEncoder,
)
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.metrics import retrieval_recall

text_encoder = FrozenEncoder(minilm())
union = PerModalityUnion(
    [
        ("text", text_encoder, "title"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")

clipart = load_openclipart()
data = clipart.data
titles = data["title"].fillna("").str.lower().to_numpy()
X = union.fit_transform(data)
split = GroupShuffleSplit(1, train_size=0.75, random_state=10)
train, test = next(split.split(X, groups=clipart.groups))
train = train[titles[train] != ""][:2000]
print(f"{len(train)} training pairs, {len(test)} images by other creators to search")

# %%
# Learn a shared space
# --------------------
# All modalities are mapped to unit vectors of one space, in which an image is close to
# its own title and far from other titles. ``score`` is the recall@1 in both directions,
# so a grid search needs no labels either. The closed form and linear maps are
# baselines.
models = {
    "canonical correlations": CanonicalAligner(),
    "linear maps": CrossAttentionAdaptor(n_layers=0, n_queries=0, random_state=0),
    "adaptor": CrossAttentionAdaptor(random_state=0),
    "shared encoder": SharedFusionEncoder(random_state=0),
}
has_title = (titles != "")[test]
labels = titles[test][has_title]  # drawings with equal titles are all correct
rows = []
for name, model in models.items():
    Z = model.fit(X.iloc[train]).transform(X.iloc[test])
    text, image = np.hsplit(np.asarray(Z)[has_title], 2)
    text_to_image = retrieval_recall(text, image, k=10, labels=labels)
    image_to_text = retrieval_recall(image, text, k=10, labels=labels)
    rows.append((name, text_to_image, image_to_text))
columns = ["model", "text to image @10", "image to text @10"]
print(pd.DataFrame(rows, columns=columns).round(3).to_string(index=False))
print(f"chance: {10 / has_title.sum():.3f}")

# %%
# Search by text
# --------------
# Queries are encoded in the same way as titles, by MiniLM and the adaptor.
adaptor = models["adaptor"]
images = adaptor.encode(X.iloc[test].filter(like="image__"), "image")
queries = [
    "a cat",
    "a sailing boat",
    "red flower",
    "a house with a garden",
    "fast car",
    "music",
]
texts = adaptor.encode(text_encoder.transform(queries), "text")
nearest = np.argsort(-texts @ images.T, axis=1)[:, :7]

figure, axes = plt.subplots(len(queries), 7, figsize=(8, 7))
for row, query in zip(axes, queries, strict=True):
    row[0].set_title(query, loc="left", fontsize=10)
for axis, row in zip(axes.flat, test[nearest].flat, strict=True):
    image = Image.open(io.BytesIO(data["image"].iloc[row])).convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    axis.imshow(Image.alpha_composite(background, image))
    axis.axis("off")
figure.suptitle("The seven nearest images to each text")
figure.tight_layout()
plt.show()
