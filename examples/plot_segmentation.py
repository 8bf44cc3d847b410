"""
===================================
Segment images from frozen features
===================================

A frozen network returns a vector for each position of its feature maps. A lightweight
decoder turns these vectors into segmentation masks.

.. seealso:: :doc:`/user_guide/segmentation` in the user guide.
"""

# %%
# Create images with masks
# ------------------------
# Emoji are rotated, scaled and placed on textures. A quarter of the images contain only
# texture. Testing on drawings or textures seen in training would measure memorisation.
# Each subgroup of emoji therefore has separate textures, and the split keeps subgroups
# together.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline

from sklembed import FrozenEncoder, PatchSegmenter, PerModalityUnion
from sklembed.datasets import make_composites
from sklembed.encoders import efficientnet_lite0
from sklembed.metrics import dice_score
from sklembed.plots import SegmentationDisplay

composites = make_composites(200, random_state=0)
X, y = composites.data, composites.target
splitter = GroupShuffleSplit(1, test_size=0.33, random_state=0)
train, test = next(splitter.split(X, y, composites.groups))
shape = X["image"].iloc[0].shape
print(f"{len(train)} training images, {len(test)} test images, each of shape {shape}")

# %%
# Encode feature maps
# -------------------
# EfficientNet-lite0 halves the resolution five times. The maps of stride 16 and 8 have
# 14 x 14 and 28 x 28 positions. The coarse map is more informative about the object,
# the fine map about its location.
coarse_map = FrozenEncoder(efficientnet_lite0(stride=16), output="tokens")
fine_map = FrozenEncoder(efficientnet_lite0(stride=8), output="tokens")

# %%
# Fit the decoder
# ---------------
# The union returns a column of tokens for each map. The fine map joins the decoder
# where it reaches 28 x 28 positions. The baselines are a linear probe on the coarse map
# and an empty prediction.
coarse = ("s16", coarse_map, "image")
fine = ("s8", fine_map, "image")


def segmenter(*maps, **options):
    """Return a pipeline from images to masks."""
    union = PerModalityUnion(list(maps)).set_output(transform="pandas")
    return make_pipeline(
        union, PatchSegmenter(**options, max_epochs=20, random_state=0)
    )


arms = {
    "linear probe": segmenter(coarse, hidden_layer_sizes=()),
    "one map": segmenter(coarse),
    "two maps": segmenter(coarse, fine),
}
predicted = {"background": np.zeros((len(test), 128, 128), dtype=np.uint8)}
for name, pipeline in arms.items():
    predicted[name] = pipeline.fit(X.iloc[train], y[train]).predict(X.iloc[test])

# %%
# Score the masks
# ---------------
# Always predicting background is correct for every image without an object. Compare the
# scores of images with an object too, or the adjusted mean, which ``score`` returns.
# One small split cannot separate one map from two, because a few false alarms decide.
# The results in the documentation use folds.
print(f"{'':15} all  objects  adjusted")
for name, masks in predicted.items():
    every = dice_score(y[test], masks)
    objects = dice_score(y[test], masks, empty="skip")
    adjusted = dice_score(y[test], masks, adjusted=True)
    print(f"{name:14} {every:.3f}    {objects:.3f}     {adjusted:.3f}")

# %%
# Plot images from the worst to the best
# --------------------------------------
display = SegmentationDisplay.from_predictions(
    y[test], predicted["two maps"], images=X["image"].iloc[test], rows=5
)
display.plot()
plt.show()
