"""Make pictures with masks: emoji or clip art, laid over textures."""

import io
from numbers import Integral, Real

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_params

from sklembed.datasets._loaders import load_emoji, load_openclipart

_SIDES = (0.35, 0.8)  # an object's longer side, of the picture's


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
    """Lay real drawings over textures, and say which pixels are theirs.

    Each picture shows one emoji, or one piece of clip art, turned by any angle, at any place and of
    35 to 80 % of the picture's size; or none. The mask is where it covers at least half of what it
    covers where it is densest. Every group, the subgroup of an emoji or a creator, has textures of
    its own, so that folds which keep groups together share neither drawings of a family nor
    backgrounds.

    Parameters
    ----------
    n_samples : int, default=1000
        Number of pictures.

    objects : {"emoji", "openclipart"}, default="emoji"
        Where drawings come from; one is used again only when all have been.

    image_size : int, default=128
        Height and width of the pictures in pixels.

    empty_fraction : float, default=0.25
        Share of the pictures that show nothing but texture.

    target : {"object", "class"}, default="object"
        What masks hold where a drawing is: 1, or 1 + the number of its class.

    random_state : int, RandomState instance or None, default=None
        Seeds everything.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object with these attributes.

        data : DataFrame of shape (n_samples, 1)
            Column ``image``: arrays of shape (image_size, image_size, 3), dtype uint8.
        target : ndarray of shape (n_samples,), dtype object
            Masks: arrays of shape (image_size, image_size), dtype uint8; 0 is background.
        target_names : list of str
            What the numbers in masks stand for.
        groups : ndarray of shape (n_samples,)
            The group of each picture. Keep groups together with
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
    source = {"emoji": load_emoji, "openclipart": load_openclipart}[objects]()
    drawn = _draw_rows(len(source.data), n_samples, rng)
    empty = np.zeros(n_samples, dtype=bool)
    empty[rng.permutation(n_samples)[: round(empty_fraction * n_samples)]] = True
    palettes = _palettes(source.groups, rng)
    images, masks = np.empty(n_samples, dtype=object), np.empty(n_samples, dtype=object)
    for i, row in enumerate(drawn):
        background = _texture(palettes[source.groups[row]], image_size, rng)
        layer = np.zeros((image_size, image_size, 4), dtype=np.uint8)
        if not empty[i]:
            layer = _placed(source.data["image"].iloc[row], image_size, rng)
        alpha = layer[..., 3:] / 255
        images[i] = np.round(layer[..., :3] * alpha + background * (1 - alpha)).astype(
            np.uint8
        )
        number = 1 if target == "object" else 1 + source.target.iloc[row]
        masks[i] = (number * _covered(layer[..., 3])).astype(np.uint8)
    names = ["object"] if target == "object" else source.target_names
    return Bunch(
        data=pd.DataFrame({"image": images}),
        target=masks,
        target_names=["background", *names],
        groups=source.groups[drawn],
    )


def _draw_rows(n_rows, n_samples, rng):
    """Draw rows, each again only when all have been drawn."""
    rounds = [rng.permutation(n_rows) for _ in range(-(-n_samples // n_rows))]
    return np.concatenate(rounds)[:n_samples]


def _placed(content, size, rng):
    """Lay a drawing on a transparent square, turned and scaled, wholly inside."""
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    drawing = drawing.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC, expand=True)
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    scale = rng.uniform(*_SIDES) * size / max(drawing.size)
    sides = [max(1, round(scale * side)) for side in drawing.size]
    drawing = drawing.resize(sides, Image.Resampling.LANCZOS)
    corner = tuple(int(rng.randint(size - side + 1)) for side in sides)
    layer = Image.new("RGBA", (size, size))
    layer.paste(drawing, corner)
    return np.asarray(layer)


def _covered(alpha):
    """Tell which pixels a drawing covers: to half of what it does where it is densest."""
    return (alpha > 0) & (alpha >= alpha.max() / 2)


def _palettes(groups, rng):
    """Draw for each group what its textures are made of: colours, coarseness and waves."""
    return {
        group: {
            "colours": rng.uniform(0, 255, size=(4, 3)),
            "cells": rng.choice([3, 5, 9, 17, 33], size=2, replace=False),
            "waves": rng.uniform(2, 24, size=2),
            "angle": rng.uniform(0, np.pi),
            "share": rng.uniform(0.1, 0.6),
        }
        for group in np.unique(groups)
    }


def _texture(palette, size, rng):
    """Paint a texture of a group: smooth noise of two grains and waves, through its colours."""
    noise = sum(
        np.asarray(
            Image.fromarray(rng.rand(cells, cells).astype(np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
        for cells in palette["cells"]
    )
    y, x = np.mgrid[:size, :size] / size
    angle = palette["angle"] + rng.uniform(-0.3, 0.3)
    along, across = (
        x * np.cos(angle) + y * np.sin(angle),
        y * np.cos(angle) - x * np.sin(angle),
    )
    phases = rng.uniform(0, 2 * np.pi, size=2)
    wave = np.sin(2 * np.pi * palette["waves"][0] * along + phases[0])
    wave = wave * np.sin(2 * np.pi * palette["waves"][1] * across + phases[1])
    height = noise / 2 + palette["share"] * wave / 2
    height = (
        (height - height.min())
        / max(np.ptp(height), 1e-9)
        * (len(palette["colours"]) - 1)
    )
    stops = np.arange(len(palette["colours"]))
    return np.stack(
        [np.interp(height, stops, c) for c in palette["colours"].T], axis=-1
    )
