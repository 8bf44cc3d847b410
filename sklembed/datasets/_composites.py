"""Generate images with masks: emoji or clip art pasted on textures."""

import io
import math
from numbers import Integral, Real

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_params

from sklembed.datasets._loaders import load_emoji, load_openclipart

_SIDES = (0.35, 0.8)  # the longer side of an object, as a fraction of the image size


@validate_params(
    {
        "n_samples": [Interval(Integral, 1, None, closed="left")],
        "objects": [StrOptions({"emoji", "openclipart"})],
        "image_size": [Interval(Integral, 16, None, closed="left")],
        "empty_fraction": [Interval(Real, 0, 1, closed="both")],
        "target": [StrOptions({"object", "class"})],
        "random_state": ["random_state"],
    },
    prefer_skip_nested_validation=True,
)
def make_composites(
    n_samples=1000,
    *,
    objects="emoji",
    image_size=128,
    empty_fraction=0.25,
    target="object",
    random_state=None,
):
    """Generate images of drawings on textures, with a mask of each drawing.

    An image has one emoji or one piece of clip art, or none. The drawing is rotated by
    a random angle, scaled to 35 to 80 % of the image size, and pasted at a random
    position. The mask marks the pixels with at least half of the drawing's largest
    opacity.

    Each group, an emoji's subgroup or a creator, has its own textures. Folds that keep
    groups together therefore share neither related drawings nor backgrounds.

    Parameters
    ----------
    n_samples : int, default=1000
        Number of images.

    objects : {"emoji", "openclipart"}, default="emoji"
        Source of the drawings. A drawing is reused only after all others have been
        used.

    image_size : int, default=128
        Height and width of the images in pixels.

    empty_fraction : float, default=0.25
        Fraction of images without a drawing.

    target : {"object", "class"}, default="object"
        Label of a drawing in the masks: 1, or 1 + the number of its class.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices. Pass an int for reproducible results.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object with these attributes.

        data : DataFrame of shape (n_samples, 1)
            Column ``image``: arrays of shape (image_size, image_size, 3), dtype uint8.
        target : ndarray of shape (n_samples,), dtype object
            Masks: arrays of shape (image_size, image_size), dtype uint8; 0 is
            background.
        target_names : list of str
            Names of the labels in masks.
        groups : ndarray of shape (n_samples,)
            Group of each image. Keep groups together with
            :class:`~sklearn.model_selection.GroupKFold`.

    Examples
    --------
    >>> from sklembed.datasets import make_composites
    >>> composites = make_composites(8, random_state=0)
    >>> composites.data["image"].iloc[0].shape, composites.target[0].shape
    ((128, 128, 3), (128, 128))
    >>> sum(not mask.any() for mask in composites.target)
    2
    """
    rng = check_random_state(random_state)
    loaders = {"emoji": load_emoji, "openclipart": load_openclipart}
    source = loaders[objects]()
    drawn = _draw_rows(len(source.data), n_samples, rng)
    empty = np.zeros(n_samples, dtype=bool)
    empty[rng.permutation(n_samples)[: round(empty_fraction * n_samples)]] = True
    palettes = _draw_palettes(source.groups, rng)
    labels, names = np.zeros(len(source.data), dtype=int), ["object"]
    if target == "class":
        labels, names = source.target.to_numpy(), source.target_names
    images, masks = np.empty(n_samples, dtype=object), np.empty(n_samples, dtype=object)
    for i, row in enumerate(drawn):
        background = _draw_texture(palettes[source.groups[row]], image_size, rng)
        layer = np.zeros((image_size, image_size, 4), dtype=np.uint8)
        if not empty[i]:
            layer = _paste(source.data["image"].iloc[row], image_size, rng)
        alpha = layer[..., 3:] / 255
        image = layer[..., :3] * alpha + background * (1 - alpha)
        images[i] = np.round(image).astype(np.uint8)
        masks[i] = ((1 + labels[row]) * _is_opaque(layer[..., 3])).astype(np.uint8)
    return Bunch(
        data=pd.DataFrame({"image": images}),
        target=masks,
        target_names=["background", *names],
        groups=source.groups[drawn],
    )


def _draw_rows(n_rows, n_samples, rng):
    """Draw rows at random, without a repeat before all have been drawn."""
    n_rounds = math.ceil(n_samples / n_rows)
    rounds = [rng.permutation(n_rows) for _ in range(n_rounds)]
    return np.concatenate(rounds)[:n_samples]


def _paste(content, size, rng):
    """Paste a drawing, rotated and scaled, on a transparent square."""
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    drawing = drawing.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC, expand=True)
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    scale = rng.uniform(*_SIDES) * size / max(drawing.size)
    width = max(1, round(scale * drawing.width))
    height = max(1, round(scale * drawing.height))
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    left = int(rng.randint(size - width + 1))
    top = int(rng.randint(size - height + 1))
    layer = Image.new("RGBA", (size, size))
    layer.paste(drawing, (left, top))
    return np.asarray(layer)


def _is_opaque(alpha):
    """Return the pixels with at least half of a drawing's largest opacity."""
    return (alpha > 0) & (alpha >= alpha.max() / 2)


def _draw_palettes(groups, rng):
    """Draw the parameters of each group's textures: colors, grains and waves."""
    palettes = {}
    for group in np.unique(groups):
        palettes[group] = {
            "colors": rng.uniform(0, 255, size=(4, 3)),
            "grains": rng.choice([3, 5, 9, 17, 33], size=2, replace=False),
            "waves": rng.uniform(2, 24, size=2),
            "angle": rng.uniform(0, np.pi),
            "share": rng.uniform(0.1, 0.6),
        }
    return palettes


def _draw_texture(palette, size, rng):
    """Return a texture of a group: smooth noise of two grains, and waves."""
    noise = np.zeros((size, size), dtype=np.float32)
    for n_cells in palette["grains"]:
        grain = Image.fromarray(rng.rand(n_cells, n_cells).astype(np.float32))
        noise += np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:size, :size] / size
    angle = palette["angle"] + rng.uniform(-0.3, 0.3)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    phases = rng.uniform(0, 2 * np.pi, size=2)
    wave = np.sin(2 * np.pi * palette["waves"][0] * along + phases[0])
    wave = wave * np.sin(2 * np.pi * palette["waves"][1] * across + phases[1])
    height = noise / 2 + palette["share"] * wave / 2
    n_colors = len(palette["colors"])
    height = (height - height.min()) / max(np.ptp(height), 1e-9) * (n_colors - 1)
    stops = np.arange(n_colors)
    channels = [np.interp(height, stops, values) for values in palette["colors"].T]
    return np.stack(channels, axis=-1)
