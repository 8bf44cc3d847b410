"""Displays: two modalities before and after alignment; masks beside what was predicted."""

import copy
from itertools import combinations
from numbers import Integral

import numpy as np
from sklearn.decomposition import PCA
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sklembed._table.columns import take_columns
from sklembed._validation import check_masks
from sklembed.encoders.cells import decode
from sklembed.metrics import dice_score, modality_gap


class ModalityGapDisplay:
    """Picture of the gap between modalities, before and after alignment, and of a search.

    Make it by `from_estimator` or `from_search`.

    Parameters
    ----------
    before, after : dict of str to ndarray of shape (n_samples, 2), or None, default=None
        The modalities' rows on two principal components of the rows before alignment.

    gap_before, gap_after : float or None, default=None
        Distance of the centroids in the whole space.

    shifts : ndarray of shape (n_shifts,) or None, default=None
        The shifts that a search has tried.

    mean_scores, sd_scores : ndarray of shape (n_shifts,) or None, default=None
        Mean and standard deviation over folds of the cross-validated score at each.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes
        Its panels.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import ModalityGapAligner
    >>> from sklembed.plots import ModalityGapDisplay
    >>> X = np.random.default_rng(0).normal(size=(50, 8)) + np.repeat([2.0, -2.0], 4)
    >>> aligner = ModalityGapAligner({"text": slice(0, 4), "image": slice(4, 8)}).fit(X)
    >>> display = ModalityGapDisplay.from_estimator(aligner, X)
    >>> display.gap_after < display.gap_before
    True
    """

    def __init__(
        self,
        *,
        before=None,
        after=None,
        gap_before=None,
        gap_after=None,
        shifts=None,
        mean_scores=None,
        sd_scores=None,
    ):
        self.before = before
        self.after = after
        self.gap_before = gap_before
        self.gap_after = gap_after
        self.shifts = shifts
        self.mean_scores = mean_scores
        self.sd_scores = sd_scores

    @classmethod
    def from_estimator(
        cls, aligner, X, *, search=None, max_rows=500, random_state=None
    ):
        """Show rows before and after a fitted aligner, and a search over its shift.

        Parameters
        ----------
        aligner : ModalityGapAligner
            The fitted aligner; its modalities have one width.

        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side.

        search : fitted search such as GridSearchCV, default=None
            Draws the scores of the shifts that it tried beside them.

        max_rows : int, default=500
            How many rows are drawn, at most.

        random_state : int, RandomState instance or None, default=None
            Chooses them.

        Returns
        -------
        display : ModalityGapDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If the modalities have no common width.
        """
        check_is_fitted(aligner)
        if aligner.grand_centroid_ is None:
            raise ValueError(
                "The modalities have no common width, so they cannot be drawn in one space. Fit "
                "the aligner with widths='resample', or on components of equal number."
            )
        unmoved = copy.copy(aligner)
        unmoved.shift = 0.0
        parts = [_by_modality(each, X) for each in (unmoved, aligner)]
        gaps = [_gap(part) for part in parts]
        plane = PCA(2).fit(np.vstack(list(parts[0].values())))
        rng = check_random_state(random_state)
        drawn = {
            name: rng.permutation(len(rows))[:max_rows]
            for name, rows in parts[0].items()
        }
        before, after = (
            {name: plane.transform(rows[drawn[name]]) for name, rows in part.items()}
            for part in parts
        )
        sweep = {} if search is None else _sweep(search, "shift")
        return cls(
            before=before, after=after, gap_before=gaps[0], gap_after=gaps[1], **sweep
        )

    @classmethod
    def from_search(cls, search, *, param="shift"):
        """Show what a search found of each shift.

        Parameters
        ----------
        search : fitted search such as GridSearchCV
            Where it tried other parameters too, the best mean score of each shift is shown.

        param : str, default="shift"
            The parameter, by its name or the end of it.

        Returns
        -------
        display : ModalityGapDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If the search is not fitted, or did not try that parameter.
        """
        return cls(**_sweep(search, param))

    def plot(self, axes=None):
        """Draw the panels there are.

        Parameters
        ----------
        axes : sequence of matplotlib Axes, default=None
            Where to: two for the rows, one for the scores.

        Returns
        -------
        self : ModalityGapDisplay
            The display, with `figure_` and `axes_`.
        """
        plt = _pyplot()
        n_panels = 2 * (self.before is not None) + (self.shifts is not None)
        if axes is None:
            _, axes = plt.subplots(
                1,
                n_panels,
                figsize=(4.6 * n_panels, 4.2),
                layout="constrained",
                squeeze=False,
            )
        self.axes_ = np.ravel(axes)
        if len(self.axes_) != n_panels:
            raise ValueError(
                f"There are {n_panels} panels to draw; got {len(self.axes_)} axes."
            )
        self.figure_ = self.axes_[0].figure
        if self.before is not None:
            self._draw_rows(
                self.axes_[0], self.before, f"before: gap {self.gap_before:.2f}"
            )
            self._draw_rows(
                self.axes_[1], self.after, f"after: gap {self.gap_after:.2f}"
            )
            limits = [(ax.get_xlim(), ax.get_ylim()) for ax in self.axes_[:2]]
            low, high = np.min(limits, axis=(0, 2)), np.max(limits, axis=(0, 2))
            for ax in self.axes_[:2]:
                ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
            self.axes_[0].legend(fontsize="small")
        if self.shifts is not None:
            self._draw_scores(self.axes_[-1])
        return self

    @staticmethod
    def _draw_rows(ax, modalities, title):
        """Draw the rows of each modality, and an arrow from each centroid to the next."""
        centroids = []
        for number, (name, rows) in enumerate(modalities.items()):
            ax.scatter(*rows.T, s=7, alpha=0.5, color=f"C{number}", label=name)
            centroids.append(rows.mean(axis=0))
        for start, end in zip(centroids, centroids[1:], strict=False):
            arrow = {"arrowstyle": "->", "lw": 2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
        ax.scatter(*np.transpose(centroids), s=60, color="black", marker="X", zorder=3)
        ax.set(title=title, xticks=[], yticks=[])

    def _draw_scores(self, ax):
        """Draw the mean score of each shift, and its spread over folds."""
        ax.errorbar(
            self.shifts, self.mean_scores, yerr=self.sd_scores, marker="o", capsize=3
        )
        ax.set(
            title="cross-validated score, mean ± sd of folds",
            xlabel="shift (lambda)",
            ylabel="score",
        )


class SegmentationDisplay:
    """Pictures, their masks, and the masks that were predicted, side by side.

    Make it by `from_estimator` or `from_predictions`.

    Parameters
    ----------
    y_true, y_pred : list of ndarray of shape (height, width)
        True and predicted masks; 0 is background.

    images : list of ndarray of shape (height, width, 3), dtype uint8, or None, default=None
        The pictures.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes of shape (n_pictures, 3), or (n_pictures, 2) without pictures
        Its panels.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed.plots import SegmentationDisplay
    >>> y_true = np.zeros((2, 8, 8), dtype=int)
    >>> y_true[:, 2:6, 2:6] = 1
    >>> display = SegmentationDisplay.from_predictions(y_true, y_true.transpose(0, 2, 1))
    >>> len(display.y_true)
    2
    """

    def __init__(self, *, y_true, y_pred, images=None):
        self.y_true = y_true
        self.y_pred = y_pred
        self.images = images

    @classmethod
    def from_estimator(cls, estimator, X, y, *, images=None, rows=4):
        """Show what a fitted segmenter makes of pictures, from the worst to the best.

        Parameters
        ----------
        estimator : PatchSegmenter, or a pipeline that ends in one
            The fitted estimator.

        X : DataFrame or array-like of shape (n_samples, n_features)
            What it takes.

        y : sequence of array-like of shape (height, width)
            True masks.

        images : sequence of pictures or None, default=None
            What to show, as a :class:`FrozenEncoder` takes it: paths, bytes, arrays, PIL pictures.
            None shows no pictures.

        rows : int or array-like of int, default=4
            Which pictures; an integer takes that many, at equal steps from the one with the lowest
            Dice coefficient to that with the highest, empty masks included.

        Returns
        -------
        display : SegmentationDisplay
            Call `plot` to draw it.
        """
        masks = check_masks(y)
        predicted = estimator.predict(X)
        if any(a.shape != b.shape for a, b in zip(masks, predicted, strict=True)):
            predicted = estimator.predict(X, sizes=[mask.shape for mask in masks])
        return cls.from_predictions(masks, predicted, images=images, rows=rows)

    @classmethod
    def from_predictions(cls, y_true, y_pred, *, images=None, rows=4):
        """Show masks and predictions, from the worst to the best.

        Parameters
        ----------
        y_true : sequence of array-like of shape (height, width)
            True masks.

        y_pred : sequence of array-like of shape (height, width)
            Predicted masks.

        images : sequence of pictures or None, default=None
            The pictures, as a :class:`FrozenEncoder` takes them.

        rows : int or array-like of int, default=4
            Which pictures; an integer takes that many, as in `from_estimator`.

        Returns
        -------
        display : SegmentationDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If there are not as many pictures and predictions as masks, or sizes differ.
        """
        masks, predicted = check_masks(y_true), check_masks(y_pred)
        dice_score(masks, predicted)  # which looks at numbers and sizes
        if images is not None:
            images = _as_column(images)
            if len(images) != len(masks):
                raise ValueError(
                    f"There are {len(images)} images for {len(masks)} masks."
                )
        if isinstance(rows, Integral) and not isinstance(rows, bool):
            if rows < 1:
                raise ValueError(f"rows must be at least 1; got {rows}.")
            scores = [
                dice_score([a], [b]) for a, b in zip(masks, predicted, strict=True)
            ]
            steps = (
                np.linspace(0, len(masks) - 1, min(rows, len(masks)))
                .round()
                .astype(int)
            )
            rows = np.argsort(scores, kind="stable")[steps]
        rows = np.arange(len(masks))[np.asarray(rows)]
        return cls(
            y_true=[masks[row] for row in rows],
            y_pred=[predicted[row] for row in rows],
            images=None if images is None else [_pixels(images[row]) for row in rows],
        )

    def plot(self, axes=None):
        """Draw a line of panels for each picture.

        Parameters
        ----------
        axes : array-like of matplotlib Axes, default=None
            Where to: for each picture three, or two where there are no pictures.

        Returns
        -------
        self : SegmentationDisplay
            The display, with `figure_` and `axes_`.
        """
        plt = _pyplot()
        shape = len(self.y_true), 2 + (self.images is not None)
        if axes is None:
            size = (2.2 * shape[1], 2.3 * shape[0])
            _, axes = plt.subplots(
                *shape, figsize=size, layout="constrained", squeeze=False
            )
        self.axes_ = np.array(axes, dtype=object)
        if self.axes_.size != shape[0] * shape[1]:
            raise ValueError(
                f"There are {shape} panels to draw; got {self.axes_.size} axes."
            )
        self.axes_ = self.axes_.reshape(shape)
        self.figure_ = self.axes_[0, 0].figure
        for row, (truth, found) in enumerate(
            zip(self.y_true, self.y_pred, strict=True)
        ):
            image = None if self.images is None else self.images[row]
            if image is not None:
                self.axes_[row, 0].imshow(image)
            _draw_mask(self.axes_[row, -2], truth, image)
            _draw_mask(self.axes_[row, -1], found, image)
            self.axes_[row, -1].set_title(
                f"Dice {dice_score([truth], [found]):.2f}", fontsize=10
            )
        for ax, title in zip(
            self.axes_[0][::-1], ("predicted", "truth", "picture"), strict=False
        ):
            ax.set_title(f"{title}, {ax.get_title()}".rstrip(", "), fontsize=10)
        for ax in self.axes_.flat:
            ax.set(xticks=[], yticks=[])
        shown = np.unique(
            np.concatenate([m.ravel() for m in [*self.y_true, *self.y_pred]])
        )
        if len(shown[shown > 0]) > 1:
            handles = [
                plt.Rectangle((0, 0), 1, 1, color=_colour(n)) for n in shown[shown > 0]
            ]
            labels = [str(label) for label in shown[shown > 0]]
            self.figure_.legend(handles, labels, loc="outside lower center", ncols=8)
        return self


def _pyplot():
    """Import matplotlib, or say how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: pip install 'sklembed[plots]'."
        ) from error
    return plt


def _as_column(images):
    """Return pictures as a sequence that positions select from."""
    if len(getattr(images, "shape", ())) == 2 and images.shape[1] == 1:
        images = take_columns(images, [0], scalar=True)
    return images.tolist() if hasattr(images, "iloc") else images


def _pixels(image):
    """Return the pixels of a picture, however it comes."""
    return np.asarray(decode(image, "image"))


def _draw_mask(ax, mask, image):
    """Lay the colour of each label over the picture, or over white; background stays as it is."""
    labels, codes = np.unique(mask, return_inverse=True)
    colours = np.array([_colour(label) for label in labels])
    height, width = mask.shape if image is None else image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(
        np.full((1, 1, 3), 255) if image is None else image, extent=extent, alpha=0.6
    )
    ax.imshow(
        colours[codes.reshape(mask.shape)], extent=extent, interpolation="nearest"
    )


def _colour(label):
    """Return the colour of a label, always the same; twenty differ. Background is transparent."""
    from matplotlib import colormaps

    place, pale = (int(label) - 1) % 10, (int(label) - 1) // 10 % 2
    return (*colormaps["tab20"](2 * place + pale)[:3], 0.75 * bool(label))


def _by_modality(aligner, X):
    """Return the aligned rows of each modality, without those that lack it."""
    Z = aligner.transform(X)
    Z = Z.to_numpy() if hasattr(Z, "to_numpy") else Z
    width = len(aligner.grand_centroid_)
    columns = aligner.blocks_
    if aligner.width_ is not None:
        columns = {
            name: slice(i * width, (i + 1) * width)
            for i, name in enumerate(aligner.blocks_)
        }
    parts = {name: Z[:, part] for name, part in columns.items()}
    return {name: part[~np.isnan(part[:, 0])] for name, part in parts.items()}


def _gap(parts):
    """Return the modality gap, averaged over pairs of modalities."""
    return float(
        np.mean([modality_gap(a, b) for a, b in combinations(parts.values(), 2)])
    )


def _sweep(search, param):
    """Read from a search the score of each value of a parameter."""
    results = getattr(search, "cv_results_", None)
    if results is None:
        raise ValueError(
            f"{type(search).__name__} is not fitted; fit it before it is shown."
        )
    known = [key.removeprefix("param_") for key in results if key.startswith("param_")]
    names = [name for name in known if name == param or name.endswith(f"__{param}")]
    if len(names) != 1:
        raise ValueError(
            f"The search tried {known}, of which {len(names)} are called {param!r}."
        )
    values = np.asarray(results[f"param_{names[0]}"], dtype=float)
    shifts = np.unique(values)
    means, sds = results["mean_test_score"], results["std_test_score"]
    best = [
        max(np.flatnonzero(values == shift), key=lambda i: means[i]) for shift in shifts
    ]
    return {"shifts": shifts, "mean_scores": means[best], "sd_scores": sds[best]}
