"""Compare PatchSegmenter with linear probes, XGBoost, Otsu's threshold and empty masks.

Images are emoji or clip art on textures (`datasets.make_composites`): 600 of each, a
quarter without an object. Folds keep a subgroup of emoji, or a creator, with its
drawings and textures together. Patches are the maps of EfficientNet-lite0 with strides
of 32, 16, 8 and 4 pixels, for images of 224 pixels. All masks are scored at 128 x 128
pixels.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
from comparison import difference, in_parallel, show, summarise
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from vectors import LOADERS, TITLES
from xgboost import XGBClassifier

from sklembed import CrossAttentionAdaptor, FrozenEncoder, PatchSegmenter
from sklembed.datasets import make_composites
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.metrics import dice_score, iou_score

TASKS = {"clip art by creator": "openclipart", "emoji by subgroup": "emoji"}
N_IMAGES = 600
STRIDES = (32, 16, 8, 4)


# The data


def composites(dataset):
    """Return images and masks, the same in every process."""
    return make_composites(N_IMAGES, objects=dataset, random_state=0)


def maps(images, strides):
    """Return a column of patches for each stride."""
    return pd.DataFrame(
        {
            f"stride {stride}": FrozenEncoder(
                efficientnet_lite0(stride=stride), output="tokens"
            ).transform(images)[:, 0]
            for stride in strides
        }
    )


# The arms: estimators on images or on some of their maps


class Constant(BaseEstimator):
    """The best constant mask for all training images, or the empty mask."""

    def __init__(self, empty=False):
        self.empty = empty

    def fit(self, X, y):
        """Find the best threshold of the mean mask."""
        mean = np.mean([mask > 0 for mask in y], axis=0)
        tried = [mean >= share for share in np.quantile(mean, np.linspace(0, 1, 21))]
        tried = [np.zeros_like(mean, dtype=bool)] if self.empty else tried
        self.mask_ = max(
            tried, key=lambda mask: dice_score(y, [mask] * len(y), adjusted=True)
        )
        return self

    def predict(self, X):
        """Return the same mask for all images."""
        return np.repeat(self.mask_[None], len(X), axis=0).astype(np.uint8)


class Otsu(BaseEstimator):
    """Otsu's threshold of the grey values of each image; the side of the border is background.

    If the contrast is below a threshold learned from the training images, the mask is empty.
    """

    def fit(self, X, y):
        """Find the contrast below which empty masks score better."""
        found = [_otsu(image) for image in X["image"]]
        tried = np.quantile([gap for _, gap in found], np.linspace(0, 1, 21))
        masks = {c: [mask * (gap >= c) for mask, gap in found] for c in tried}
        self.contrast_ = max(
            tried, key=lambda c: dice_score(y, masks[c], adjusted=True)
        )
        return self

    def predict(self, X):
        """Threshold each image."""
        found = [_otsu(image) for image in X["image"]]
        return np.stack([mask * (gap >= self.contrast_) for mask, gap in found])


def _otsu(image):
    """Return the mask of an image and the contrast of its two parts."""
    grey = image @ [0.299, 0.587, 0.114]
    counts, edges = np.histogram(grey, bins=256, range=(0, 256))
    levels = edges[:-1] + 0.5
    below, total = np.cumsum(counts), np.cumsum(counts * levels)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = (total[-1] - total) / above - total / below
        between = np.nan_to_num(below * above * gap**2)
    best = between.argmax()
    mask = grey > edges[best + 1]
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    mask = ~mask if border.mean() > 0.5 else mask
    return mask.astype(np.uint8), np.nan_to_num(gap[best])


class PerPixel(BaseEstimator):
    """A classifier of single pixels, on all maps resized to the size of the image.

    It is trained on randomly drawn pixels of each image.
    """

    def __init__(self, classifier, n_pixels=64, size=(128, 128)):
        self.classifier = classifier
        self.n_pixels = n_pixels
        self.size = size

    def fit(self, X, y):
        """Draw the pixels and fit the classifier."""
        rng = np.random.default_rng(0)
        features, labels = [], []
        for (_, cells), mask in zip(X.iterrows(), y, strict=True):
            chosen = rng.choice(mask.size, self.n_pixels, replace=False)
            features.append(self._pixels(cells)[chosen])
            labels.append(mask.ravel()[chosen])
        self.classifier_ = clone(self.classifier)
        self.classifier_.fit(np.concatenate(features), np.concatenate(labels))
        return self

    def predict(self, X):
        """Classify each pixel."""
        found = [
            self.classifier_.predict(self._pixels(cells)) for _, cells in X.iterrows()
        ]
        return np.stack(found).reshape(-1, *self.size).astype(np.uint8)

    def _pixels(self, cells):
        """Return the features of each pixel of an image."""
        import torch

        from sklembed.nn.segmentation import resized

        layers = []
        for cell in cells:
            side = math.isqrt(len(cell))
            patches = torch.from_numpy(cell.T.reshape(1, -1, side, side))
            layers.append(resized(patches, self.size)[0].flatten(1).T.numpy())
        return np.concatenate(layers, axis=1)


def linear(**options):
    """Return a linear probe on patches."""
    return PatchSegmenter((), random_state=0, **options)


def decoder(**options):
    """Return a segmenter with the given parameters."""
    return PatchSegmenter(random_state=0, **options)


XGB = XGBClassifier(
    n_estimators=100, max_depth=6, learning_rate=0.2, n_jobs=1, random_state=0
)
LOGISTIC = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
# The estimator and the strides of its maps; without strides, its input are the images.
ARMS = {
    "all empty": (Constant(empty=True), ()),
    "best constant mask": (Constant(), ()),
    "Otsu's threshold": (Otsu(), ()),
    "linear probe, stride 32": (linear(), (32,)),
    "linear probe, stride 16": (linear(), (16,)),
    "linear probe, strides 16, 8, 4": (linear(), (16, 8, 4)),
    "LR per pixel, stride 16": (PerPixel(LOGISTIC), (16,)),
    "XGBoost per pixel, strides 16, 8, 4": (PerPixel(XGB), (16, 8, 4)),
    "PatchSegmenter, stride 16": (decoder(), (16,)),
    "PatchSegmenter, strides 16, 8": (decoder(), (16, 8)),
    "PatchSegmenter, strides 16, 8, 4": (decoder(), (16, 8, 4)),
}
PROBES = [arm for arm in ARMS if arm.startswith("linear")]
ADAPTED = [
    "linear probe, stride 16",
    "PatchSegmenter, stride 16",
]  # also with an adaptor in between
OURS = "PatchSegmenter, strides 16, 8, 4"


def adaptor(dataset, groups):
    """Pre-train an adaptor of patches on names and images of the training groups."""
    data = LOADERS[dataset]()
    rows = np.isin(data.groups, groups) & data.data[TITLES[dataset]].notna().to_numpy()
    table = data.data[rows]
    words = FrozenEncoder(minilm(), output="tokens").transform(table[[TITLES[dataset]]])
    pairs = pd.DataFrame({"text": words[:, 0]})
    pairs["image"] = maps(table[["image"]], (16,))["stride 16"]
    trained = CrossAttentionAdaptor(
        128,
        dim_feedforward=256,
        output="tokens",
        blocks={"text": ["text"], "image": ["image"]},
        chunk_size=64,
        max_epochs=10,
        random_state=0,
    )
    return trained.fit(pairs)


# The table


def run_fold(task, arms, fold, n_folds):
    """Evaluate all arms in one fold."""
    data = composites(TASKS[task])
    train, test = list(GroupKFold(n_folds).split(data.data, groups=data.groups))[fold]
    patches, rows = maps(data.data, STRIDES), []

    def note(arm, estimator, X):
        found = judge(estimator, X, data.target, train, test)
        rows.append({"task": task, "arm": arm, "fold": fold} | found)

    for arm in arms:
        estimator, strides = ARMS[arm]
        note(
            arm,
            estimator,
            patches[[f"stride {s}" for s in strides]] if strides else data.data,
        )
    if set(ADAPTED) <= set(arms):
        trained = adaptor(TASKS[task], np.unique(data.groups[train]))
        adapted = trained.encode(
            patches[["stride 16"]].set_axis(["image"], axis=1), "image"
        )
        for arm in ADAPTED:
            note(
                f"{arm}, adapted", ARMS[arm][0], pd.DataFrame({"image": adapted[:, 0]})
            )
    return rows


def judge(estimator, X, y, train, test):
    """Fit on training rows and score test rows; seconds exclude the adaptor."""
    tick = time.perf_counter()
    fitted = clone(estimator).fit(X.iloc[train], y[train])
    tock = time.perf_counter()
    found = fitted.predict(X.iloc[test])
    end = time.perf_counter()
    truth = y[test]
    return {
        "score": dice_score(truth, found, adjusted=True),
        "Dice, objects": dice_score(truth, found, empty="skip"),
        "Dice, all": dice_score(truth, found),
        "IoU, objects": iou_score(truth, found, empty="skip"),
        "IoU, all": iou_score(truth, found),
        "parameters": getattr(fitted, "n_parameters_", np.nan),
        "fit s": tock - tick,
        "predict s": end - tock,
    }


MEASURES = ["score", "Dice, objects", "Dice, all", "IoU, objects", "IoU, all"]
COSTS = {"parameters": 0, "fit s": 1, "predict s": 1}


def segmentation_table(options):
    """Evaluate all arms, and compare PatchSegmenter with every linear probe."""
    arms = [arm for arm in ARMS if not options.arms or arm in options.arms]
    cells = in_parallel(
        options,
        [
            (run_fold, task, arms, fold, options.folds)
            for task in TASKS
            for fold in range(options.folds)
        ],
    )
    pairs = [(OURS, probe) for probe in PROBES]
    pairs += [
        (OURS, "XGBoost per pixel, strides 16, 8, 4"),
        (OURS, "PatchSegmenter, stride 16"),
    ]
    pairs += [("PatchSegmenter, stride 16", "linear probe, stride 16")]
    pairs += [(f"{arm}, adapted", arm) for arm in ADAPTED]
    return {
        "records": summarise(cells, ["task", "arm"], MEASURES, COSTS),
        "verdicts": [
            {"task": task, "arm": arm, "against": other}
            | {
                f"{name}, {measure}": value
                for measure in ("score", "Dice, objects")
                for name, value in difference(
                    rows, arm, other, measure, options.folds
                ).items()
                if name in ("gain", "p")
            }
            for task, rows in cells.groupby("task", sort=False)
            for arm, other in pairs
            if {arm, other} <= set(rows["arm"])
        ],
    }


def main():
    """Compute and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="*", help="run only these arms")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    for dataset in TASKS.values():  # workers then read all patches from the store
        maps(composites(dataset).data, STRIDES)
        maps(LOADERS[dataset]().data[["image"]], (16,))
    tick = time.perf_counter()
    result = segmentation_table(options)
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
