"""Data shared by benchmarks: frozen vectors of emoji and clip art, and their folds.

Names and titles are encoded by MiniLM and images by EfficientNet-lite0. Both are installed
as packages.
"""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from sklembed import FrozenEncoder
from sklembed.datasets import load_emoji, load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

LOADERS = {"emoji": load_emoji, "openclipart": load_openclipart}
TITLES = {"emoji": "name", "openclipart": "title"}
BLOCKS = {"text": slice(0, 384), "image": slice(384, 1664)}


def load(name):
    """Return the concatenated vectors (NaN for a missing title) and the data set."""
    data = LOADERS[name]()
    text = FrozenEncoder(minilm())
    image = FrozenEncoder(efficientnet_lite0(), normalize=True)
    text_vectors = text.transform(data.data[[TITLES[name]]])
    image_vectors = image.transform(data.data[["image"]])
    return np.hstack([text_vectors, image_vectors]), data


def outer_folds(y, groups, grouped, n_folds):
    """Return fixed folds, stratified and optionally by group."""
    if grouped:
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
        return list(splitter.split(y, y, groups))
    return list(StratifiedKFold(n_folds, shuffle=True, random_state=0).split(y, y))
