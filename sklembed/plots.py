"""Displays of modalities, adaptations, masks and leaks."""

import copy
import math
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

__all__ = [
    "AdaptationDisplay",
    "LeakDisplay",
    "ModalityDisplay",
    "ModalityGapDisplay",
    "SegmentationDisplay",
]

# Safe for colour-blind readers, by Okabe and Ito, and told apart by markers.
_COLORS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#999999",
    "#F0E442",
)
_MARKERS = "os^Dv<>pX"
_ITSELF = "itself"  # in the place of an estimator: the adaptation predicts


def _color(number):
    return _COLORS[number % len(_COLORS)]


def _marker(number):
    return _MARKERS[number % len(_MARKERS)]


class ModalityGapDisplay:
    """Display of the gap between modalities, and of a search over the shift.

    Create it by `from_estimator` or `from_search`.

    Parameters
    ----------
    before, after : dict of str to ndarray of shape (n_samples, 2) or None, default=None
        Rows of each modality, on two principal components of the rows before alignment.

    gap_before, gap_after : float or None, default=None
        Distance between the centroids in the full space.

    shifts : ndarray of shape (n_shifts,) or None, default=None
        The shifts in a search.

    mean_scores, sd_scores : ndarray of shape (n_shifts,) or None, default=None
        Mean and standard deviation over folds of the score at each shift.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes
        The panels.

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
        """Create a display of rows before and after a fitted aligner.

        Parameters
        ----------
        aligner : ModalityGapAligner
            The fitted aligner, whose modalities have a common width.

        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side.

        search : fitted search such as GridSearchCV, default=None
            Search over `shift`, whose scores are drawn in a third panel.

        max_rows : int, default=500
            Maximum number of rows drawn for each modality.

        random_state : int, RandomState instance or None, default=None
            Seeds the choice of rows.

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
                "The modalities have no common width, so they cannot be drawn in one "
                "space. Fit the aligner with widths='resample', or on equally many "
                "components."
            )
        unshifted = copy.copy(aligner)
        unshifted.shift = 0.0
        rows_before = _split_modalities(unshifted, X)
        rows_after = _split_modalities(aligner, X)
        pca = PCA(2).fit(np.vstack(list(rows_before.values())))
        rng = check_random_state(random_state)
        before, after = {}, {}
        for name, rows in rows_before.items():
            drawn = rng.permutation(len(rows))[:max_rows]
            before[name] = pca.transform(rows[drawn])
            after[name] = pca.transform(rows_after[name][drawn])
        gaps = {"gap_before": _gap(rows_before), "gap_after": _gap(rows_after)}
        scores = {} if search is None else _scores_by_value(search, "shift")
        return cls(before=before, after=after, **gaps, **scores)

    @classmethod
    def from_search(cls, search, *, param="shift"):
        """Create a display of the cross-validated score of each shift in a search.

        Parameters
        ----------
        search : fitted search such as GridSearchCV
            If it varies further parameters, the best mean score of each shift is drawn.

        param : str, default="shift"
            The parameter, by its full name or the part after the last ``__``.

        Returns
        -------
        display : ModalityGapDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If the search is not fitted, or does not vary the parameter.
        """
        return cls(**_scores_by_value(search, param))

    def plot(self, axes=None):
        """Draw the panels.

        Parameters
        ----------
        axes : sequence of matplotlib Axes, default=None
            Axes to draw on: two for the rows, one for the scores. If None, a new figure
            is created.

        Returns
        -------
        self : ModalityGapDisplay
            The display, with `figure_` and `axes_`.
        """
        n_panels = 2 * (self.before is not None) + (self.shifts is not None)
        self.axes_ = _panels(axes, n_panels, (3.6, 3.3))
        self.figure_ = self.axes_[0].figure
        if self.before is not None:
            left, right = self.axes_[:2]
            self._draw_rows(left, self.before, f"before: gap {self.gap_before:.2f}")
            self._draw_rows(right, self.after, f"after: gap {self.gap_after:.2f}")
            # Both panels have the same limits, so that distances can be compared.
            x_limits = left.get_xlim() + right.get_xlim()
            y_limits = left.get_ylim() + right.get_ylim()
            for ax in (left, right):
                ax.set_xlim(min(x_limits), max(x_limits))
                ax.set_ylim(min(y_limits), max(y_limits))
            left.legend(fontsize="small", markerscale=3)
        if self.shifts is not None:
            self._draw_scores(self.axes_[-1])
        return self

    @staticmethod
    def _draw_rows(ax, modalities, title):
        """Draw the rows of each modality, and arrows between consecutive centroids."""
        centroids = []
        for number, (name, rows) in enumerate(modalities.items()):
            ax.scatter(*rows.T, s=7, alpha=0.5, color=_color(number + 1), label=name)
            centroids.append(rows.mean(axis=0))
        for start, end in zip(centroids, centroids[1:], strict=False):
            arrow = {"arrowstyle": "->", "lw": 2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
        ax.scatter(*np.transpose(centroids), s=60, color="black", marker="X", zorder=3)
        ax.set(
            title=title,
            xlabel="principal component 1",
            ylabel="principal component 2",
            xticks=[],
            yticks=[],
        )

    def _draw_scores(self, ax):
        """Draw the mean and the standard deviation of the score at each shift."""
        options = {"marker": "o", "capsize": 3, "color": _color(1)}
        ax.errorbar(self.shifts, self.mean_scores, yerr=self.sd_scores, **options)
        ax.set(
            title="cross-validated score, mean ± sd of folds",
            xlabel="shift (lambda)",
            ylabel="score",
        )


class ModalityDisplay:
    """Display of the value of each modality, and of its degradation.

    Create it by `from_report`.

    Parameters
    ----------
    shapley : DataFrame
        The Shapley values of :func:`~sklembed.evaluation.modality_report`: a row for
        each "modality" and "fold", with the "value".

    degradation : DataFrame or None, default=None
        The scores of the report under noise and missing modalities: a row for each
        "modality", "kind", "level" and "fold", with the "score".

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes
        The panels: the Shapley values, then each kind of degradation.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklembed.evaluation import modality_report
    >>> from sklembed.plots import ModalityDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> report = modality_report(
    ...     KNeighborsClassifier(),
    ...     X[:200],
    ...     y[:200],
    ...     blocks={"top": slice(0, 32), "bottom": slice(32, 64)},
    ...     missing=(),
    ...     random_state=0,
    ... )
    >>> display = ModalityDisplay.from_report(report)
    >>> display.shapley["modality"].unique().tolist()
    ['top', 'bottom']
    """

    def __init__(self, *, shapley, degradation=None):
        self.shapley = shapley
        self.degradation = degradation

    @classmethod
    def from_report(cls, report):
        """Create a display of a report.

        Parameters
        ----------
        report : ModalityReport
            The result of :func:`~sklembed.evaluation.modality_report`.

        Returns
        -------
        display : ModalityDisplay
            Call `plot` to draw it.
        """
        return cls(shapley=report.shapley, degradation=report.degradation)

    def plot(self, axes=None):
        """Draw a bar for each modality, and a curve for each in the other panels.

        Bars, points and their spread are means and standard deviations over folds.

        Parameters
        ----------
        axes : sequence of matplotlib Axes, default=None
            Axes to draw on: one for the Shapley values, and one for each kind of
            degradation. If None, a new figure is created.

        Returns
        -------
        self : ModalityDisplay
            The display, with `figure_` and `axes_`.
        """
        kinds = []
        if self.degradation is not None:
            kinds = sorted(self.degradation["kind"].unique(), reverse=True)
        n_panels = 1 + len(kinds)
        self.axes_ = _panels(axes, n_panels, (3.6, 3.0))
        self.figure_ = self.axes_[0].figure
        self._draw_values(self.axes_[0])
        for ax, kind in zip(self.axes_[1:], kinds, strict=True):
            self._draw_degradation(ax, kind)
        return self

    def _draw_values(self, ax):
        """Draw the Shapley value of each modality, the first on top."""
        values = self.shapley.groupby("modality", sort=False)["value"]
        means, sds = values.mean(), values.std(ddof=0)
        colors = [_color(number) for number in range(len(means))]
        ax.barh(
            list(means.index),
            means.to_numpy(),
            xerr=sds.to_numpy(),
            color=colors,
            capsize=3,
        )
        ax.axvline(0, color="black", lw=0.8)
        ax.invert_yaxis()
        ax.set(title="value of each modality", xlabel="Shapley value of the score")

    def _draw_degradation(self, ax, kind):
        """Draw the score of the fitted model at each level, for each modality."""
        labels = {
            "noise": "noise (standard deviations)",
            "missing": "fraction of rows without it",
        }
        rows = self.degradation[self.degradation["kind"] == kind]
        for number, name in enumerate(self.shapley["modality"].unique()):
            scores = rows[rows["modality"] == name].groupby("level")["score"]
            means, sds = scores.mean(), scores.std(ddof=0)
            options = {"marker": _marker(number), "capsize": 3, "color": _color(number)}
            ax.errorbar(
                means.index.to_numpy(),
                means.to_numpy(),
                yerr=sds.to_numpy(),
                label=name,
                **options,
            )
        ax.set(title=f"{kind} at test time", xlabel=labels[kind], ylabel="score")
        ax.legend(fontsize="small")


class SegmentationDisplay:
    """Display of images, their masks and predicted masks, side by side.

    Create it by `from_estimator` or `from_predictions`.

    Parameters
    ----------
    y_true, y_pred : list of ndarray of shape (height, width)
        True and predicted masks; 0 is background.

    images : list of uint8 ndarray of shape (height, width, 3) or None, default=None
        The images.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes of shape (n_rows, 3) or (n_rows, 2)
        The panels: image, mask and prediction, or the latter two without images.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed.plots import SegmentationDisplay
    >>> y_true = np.zeros((2, 8, 8), dtype=int)
    >>> y_true[:, 2:6, 2:6] = 1
    >>> y_pred = y_true.transpose(0, 2, 1)
    >>> display = SegmentationDisplay.from_predictions(y_true, y_pred)
    >>> len(display.y_true)
    2
    """

    def __init__(self, *, y_true, y_pred, images=None):
        self.y_true = y_true
        self.y_pred = y_pred
        self.images = images

    @classmethod
    def from_estimator(cls, estimator, X, y, *, images=None, rows=4):
        """Create a display of the predictions of a fitted segmenter.

        Parameters
        ----------
        estimator : PatchSegmenter, or a pipeline that ends in one
            The fitted estimator.

        X : DataFrame or array-like of shape (n_samples, n_features)
            Input of the estimator.

        y : sequence of array-like of shape (height, width)
            True masks.

        images : sequence of images or None, default=None
            The images, in any form that :class:`~sklembed.FrozenEncoder` accepts: paths, bytes,
            arrays or PIL images. If None, only masks are drawn.

        rows : int or array-like of int, default=4
            Positions or number of the rows to draw. If an int, rows are chosen at equal
            steps of rank, from the lowest Dice coefficient to the highest. Empty masks
            are included.

        Returns
        -------
        display : SegmentationDisplay
            Call `plot` to draw it.
        """
        masks = check_masks(y)
        predicted = estimator.predict(X)
        sizes = [mask.shape for mask in masks]
        if [mask.shape for mask in predicted] != sizes:
            predicted = estimator.predict(X, sizes=sizes)
        return cls.from_predictions(masks, predicted, images=images, rows=rows)

    @classmethod
    def from_predictions(cls, y_true, y_pred, *, images=None, rows=4):
        """Create a display of masks and predictions.

        Parameters
        ----------
        y_true : sequence of array-like of shape (height, width)
            True masks.

        y_pred : sequence of array-like of shape (height, width)
            Predicted masks.

        images : sequence of images or None, default=None
            The images, in any form that :class:`~sklembed.FrozenEncoder` accepts.

        rows : int or array-like of int, default=4
            Positions or number of the rows to draw, as in `from_estimator`.

        Returns
        -------
        display : SegmentationDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If the numbers of images, masks and predictions or their sizes differ.
        """
        masks, predicted = check_masks(y_true), check_masks(y_pred)
        dice_score(masks, predicted)  # validates numbers and sizes
        if images is not None:
            images = _as_column(images)
            if len(images) != len(masks):
                raise ValueError(
                    f"There are {len(images)} images for {len(masks)} masks."
                )
        if isinstance(rows, Integral) and not isinstance(rows, bool):
            rows = _choose_rows(masks, predicted, rows)
        rows = np.arange(len(masks))[np.asarray(rows)]
        if images is not None:
            images = [_decode_pixels(image) for image in _take(images, rows)]
        y_true, y_pred = _take(masks, rows), _take(predicted, rows)
        return cls(y_true=y_true, y_pred=y_pred, images=images)

    def plot(self, axes=None):
        """Draw the panels of each image side by side.

        Parameters
        ----------
        axes : array-like of matplotlib Axes, default=None
            Axes to draw on: three for each row, or two without images. If None, a new
            figure is created.

        Returns
        -------
        self : SegmentationDisplay
            The display, with `figure_` and `axes_`.
        """
        n_columns = 2 if self.images is None else 3
        shape = len(self.y_true), n_columns
        self.axes_ = _panels(axes, shape[0] * n_columns, (2.2, 2.3), n_columns)
        self.axes_ = self.axes_.reshape(shape)
        self.figure_ = self.axes_[0, 0].figure
        for row, (true, pred) in enumerate(zip(self.y_true, self.y_pred, strict=True)):
            image = None
            if self.images is not None:
                image = self.images[row]
                self.axes_[row, 0].imshow(image)
            _draw_mask(self.axes_[row, -2], true, image)
            _draw_mask(self.axes_[row, -1], pred, image)
            dice = f"Dice {dice_score([true], [pred]):.2f}"
            self.axes_[row, -1].set_title(dice, fontsize=10)
        titles = ["image", "truth", f"predicted, {self.axes_[0, -1].get_title()}"]
        for ax, title in zip(self.axes_[0], titles[-n_columns:], strict=True):
            ax.set_title(title, fontsize=10)
        for ax in self.axes_.flat:
            ax.set(xticks=[], yticks=[])
        self._draw_legend()
        return self

    def _draw_legend(self):
        """Draw a legend of the labels if there are several."""
        labels = set()
        for mask in [*self.y_true, *self.y_pred]:
            labels.update(np.unique(mask[mask > 0]).tolist())
        if len(labels) < 2:
            return
        handles = []
        labels = sorted(labels)
        for label, color in zip(labels, _colors(labels), strict=True):
            patch = _pyplot().Rectangle((0, 0), 1, 1, color=color, label=str(label))
            handles.append(patch)
        n_columns = 2 * self.axes_.shape[1]
        self.figure_.legend(
            handles=handles, loc="outside lower center", ncols=n_columns
        )


class LeakDisplay:
    """Display of the distances between folds, and of the scores without leaked rows.

    Create it by `from_report`.

    Parameters
    ----------
    distances : dict of str to ndarray of shape (n_test_rows,)
        Distance of each test row to its nearest training row, for each column.

    thresholds : dict of str to float
        Distance below which a row is leaked, for each column.

    scores : dict of str to ndarray of shape (n_folds,)
        Score of each fold, for each arm of the report.

    score_name : str
        Name of the score.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes
        The panels: one for each column, and one for the scores.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklembed.evaluation import leak_report
    >>> from sklembed.plots import LeakDisplay
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(100, 32)), np.repeat([0, 1], 50)
    >>> report = leak_report(LogisticRegression(), X, y, random_state=0)
    >>> display = LeakDisplay.from_report(report)
    >>> display.distances["X"].shape
    (100,)
    """

    _COLORS = {False: _color(1), True: _color(2)}

    def __init__(self, *, distances, thresholds, scores, score_name):
        self.distances = distances
        self.thresholds = thresholds
        self.scores = scores
        self.score_name = score_name

    @classmethod
    def from_report(cls, report, *, score=None):
        """Create a display of a report.

        Parameters
        ----------
        report : LeakReport
            Result of :func:`~sklembed.evaluation.leak_report`.

        score : str or None, default=None
            Name of the score to draw. If None, the first.

        Returns
        -------
        display : LeakDisplay
            Call `plot` to draw it.

        Raises
        ------
        ValueError
            If the report has no such score.
        """
        names = report.score_names_
        if score is None:
            score = names[0]
        if score not in names:
            raise ValueError(f"The report has the scores {names}, but not {score!r}.")
        distances, scores = {}, {}
        for column, rows in report.nearest_.groupby("column", sort=False):
            distances[column] = rows["distance"].to_numpy()
        for arm, rows in report.scores_.groupby("arm", sort=False):
            scores[arm] = rows[score].to_numpy()
        return cls(
            distances=distances,
            thresholds=report.thresholds_["threshold"].to_dict(),
            scores=scores,
            score_name=score,
        )

    def plot(self, axes=None):
        """Draw the panels.

        Parameters
        ----------
        axes : sequence of matplotlib Axes, default=None
            Axes to draw on: one for each column, and one for the scores. If None, a new
            figure is created.

        Returns
        -------
        self : LeakDisplay
            The display, with `figure_` and `axes_`.
        """
        n_panels = len(self.distances) + 1
        self.axes_ = _panels(axes, n_panels, (3.6, 3.3))
        self.figure_ = self.axes_[0].figure
        for ax, column in zip(self.axes_, self.distances, strict=False):
            self._draw_distances(ax, column)
        self._draw_scores(self.axes_[-1])
        return self

    def _draw_distances(self, ax, column):
        """Draw a histogram of the nearest distances, and the threshold."""
        distances, threshold = self.distances[column], self.thresholds[column]
        edges = np.linspace(0, max(distances.max(), threshold, 1e-9), 41)
        leaked = distances < threshold
        for is_leaked, label in ((False, "not leaked"), (True, "leaked")):
            drawn = distances[leaked == is_leaked]
            # Open and filled bars differ without colour, too.
            ax.hist(
                drawn,
                edges,
                label=f"{label}: {len(drawn)}",
                histtype="stepfilled" if is_leaked else "step",
                linewidth=1.5,
                color=self._COLORS[is_leaked],
            )
        ax.axvline(threshold, color="black", ls="--", label=f"below {threshold:.3f}")
        ax.set(
            title=column,
            xlabel="cosine distance to the nearest training row",
            ylabel="test rows",
        )
        ax.margins(y=0.4)  # the legend is above the bars
        ax.legend(fontsize="small")

    def _draw_scores(self, ax):
        """Draw the score of each fold, and the mean of each arm."""
        for position, scores in enumerate(self.scores.values()):
            observed = scores[~np.isnan(scores)]
            ax.scatter(
                np.full(len(observed), position),
                observed,
                s=22,
                facecolors="none",
                edgecolors=self._COLORS[False],
            )
            if len(observed):
                mean = observed.mean()
                line = {"color": self._COLORS[True], "linewidth": 3}
                ax.plot([position - 0.25, position + 0.25], [mean, mean], **line)
                label = {"xytext": (0, 5), "textcoords": "offset points"}
                ax.annotate(f"{mean:.2f}", (position + 0.27, mean), **label)
        labels = [arm.replace(" ", "\n") for arm in self.scores]
        ax.set_xticks(range(len(labels)), labels)
        ax.set(
            title="folds and their mean",
            ylabel=self.score_name,
            xlim=(-0.5, len(labels) - 0.2),
        )


class AdaptationDisplay:
    """Display of the scores and the costs of adaptations.

    Create it by `from_comparison`.

    Parameters
    ----------
    summary : DataFrame
        The summary of :func:`~sklembed.evaluation.compare_adaptations`: a row for each
        "adaptation" and "estimator" with "score", "sd", "gain", "p", "encode s" and
        "fit s". The first adaptation is the reference.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure, after `plot`.

    axes_ : ndarray of matplotlib Axes
        The panels: the heat map, then cost against score.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import RidgeClassifier
    >>> from sklembed.evaluation import compare_adaptations
    >>> from sklembed.plots import AdaptationDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> comparison = compare_adaptations(
    ...     X,
    ...     y,
    ...     adaptations=["none", "pca"],
    ...     estimators={"ridge": RidgeClassifier()},
    ...     cv=2,
    ...     random_state=0,
    ... )
    >>> display = AdaptationDisplay.from_comparison(comparison)
    >>> display.summary["adaptation"].tolist()
    ['none', 'pca']
    """

    _SIGNIFICANT = 0.05

    def __init__(self, *, summary):
        self.summary = summary

    @classmethod
    def from_comparison(cls, comparison):
        """Create a display of a comparison.

        Parameters
        ----------
        comparison : AdaptationComparison
            The result of :func:`~sklembed.evaluation.compare_adaptations`.

        Returns
        -------
        display : AdaptationDisplay
            Call `plot` to draw it.
        """
        return cls(summary=comparison.summary)

    def plot(self, axes=None):
        """Draw a heat map of the scores, and the cost of training against the score.

        The heat map has the mean score of each adaptation and estimator, and below it
        the gain over the reference, which is also its colour. A star marks gains with
        p < 0.05. An adaptation that predicts by itself has one cell. Bars of the second
        panel are standard deviations over folds.

        Parameters
        ----------
        axes : sequence of two matplotlib Axes, default=None
            Axes to draw on. If None, a new figure is created.

        Returns
        -------
        self : AdaptationDisplay
            The display, with `figure_` and `axes_`.
        """
        height = 1.2 + 0.45 * self.summary["adaptation"].nunique()
        self.axes_ = _panels(axes, 2, (6.4, max(height, 3.6)), n_columns=1)
        self.figure_ = self.axes_[0].figure
        self._draw_scores(self.axes_[0])
        self._draw_costs(self.axes_[1])
        return self

    def _draw_scores(self, ax):
        """Draw a cell for each adaptation and estimator."""
        adaptations = list(self.summary["adaptation"].unique())
        estimators = self.summary["estimator"].drop_duplicates()
        columns = list(estimators[estimators != _ITSELF]) or [_ITSELF]
        gains = np.full((len(adaptations), len(columns)), np.nan)
        positions = []
        for row in self.summary.to_dict("records"):
            i = adaptations.index(row["adaptation"])
            j = slice(None)
            center = (len(columns) - 1) / 2
            if row["estimator"] in columns:
                center = j = columns.index(row["estimator"])
            gains[i, j] = row["gain"]
            positions.append((center, i, row))
        largest = np.nanmax(np.abs(gains), initial=1e-9)
        ax.imshow(gains, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        ax.set_facecolor("lightgrey")  # of failed cells
        for x, y, row in positions:
            is_dark = abs(row["gain"]) > 0.6 * largest
            ax.text(
                x,
                y,
                self._describe(row, is_reference=y == 0),
                ha="center",
                va="center",
                color="white" if is_dark else "black",
                fontsize="small",
            )
        ax.set_xticks(
            range(len(columns)), [name.replace(" ", "\n") for name in columns]
        )
        ax.set_yticks(range(len(adaptations)), adaptations)
        # Lines between the cells; adaptations that predict have no inner lines.
        with_estimator = self.summary[self.summary["estimator"].isin(columns)]
        for i, adaptation in enumerate(adaptations):
            ax.axhline(i - 0.5, color="white", lw=2)
            if (with_estimator["adaptation"] == adaptation).any():
                edges = np.arange(1, len(columns)) - 0.5
                ax.vlines(edges, i - 0.5, i + 0.5, color="white", lw=2)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        title = f"score, and gain over {adaptations[0]!r} (* p < {self._SIGNIFICANT})"
        ax.set_title(title, fontsize="medium")

    def _describe(self, row, is_reference):
        """Return the text of a cell."""
        if np.isnan(row["score"]):
            return "failed"
        text = f"{row['score']:.3f}"
        if not is_reference and not np.isnan(row["gain"]):
            text += f"\n{row['gain']:+.3f}"
            if row["p"] < self._SIGNIFICANT:
                text += " *"
        if row["failed"]:
            text += f"\n{row['failed']} failed"
        return text

    def _draw_costs(self, ax):
        """Draw a point for each adaptation, coloured, and estimator, by its marker."""
        adaptations = list(self.summary["adaptation"].unique())
        estimators = list(self.summary["estimator"].unique())
        for row in self.summary.to_dict("records"):
            options = {
                "color": _color(adaptations.index(row["adaptation"])),
                "marker": _marker(estimators.index(row["estimator"])),
                "elinewidth": 0.7,
                "linestyle": "",
            }
            seconds = row["encode s"] + row["fit s"]
            ax.errorbar(seconds, row["score"], yerr=row["sd"], **options)
        handles = []
        for number, name in enumerate(adaptations):
            color = _color(number)
            handles += ax.plot([], [], "o", color=color, label=name)
        if estimators != [_ITSELF]:
            for number, name in enumerate(estimators):
                marker = _marker(number)
                handles += ax.plot([], [], marker, mfc="none", mec="grey", label=name)
        ax.legend(
            handles=handles,
            fontsize="x-small",
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        ax.set_xscale("log", subs=[2, 5])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.set(xlabel="seconds of encoding and fitting per fold", ylabel="score")
        ax.set_title("cost of training against score", fontsize="medium")


def _panels(axes, n_panels, size, n_columns=2):
    """Return the axes of panels, row by row, of a new figure if `axes` is None.

    Figures are narrow, so that their text can be read on a phone.

    Parameters
    ----------
    axes : array-like of matplotlib Axes or None
        The axes.
    n_panels : int
        Number of panels.
    size : tuple of float
        Width and height of a panel of a new figure, in inches.
    n_columns : int
        Maximum number of panels side by side. The last panel fills its row.
    """
    if axes is None:
        n_columns = min(n_columns, n_panels)
        n_rows = math.ceil(n_panels / n_columns)
        figure = _pyplot().figure(
            figsize=(size[0] * n_columns, size[1] * n_rows), layout="constrained"
        )
        grid = figure.add_gridspec(n_rows, n_columns)
        axes = []
        for panel in range(n_panels):
            row, column = divmod(panel, n_columns)
            is_last = panel == n_panels - 1
            columns = slice(column, None) if is_last else column
            axes.append(figure.add_subplot(grid[row, columns]))
    axes = np.ravel(axes)
    if len(axes) != n_panels:
        raise ValueError(f"There are {n_panels} panels to draw; got {len(axes)} axes.")
    return axes


def _pyplot():
    """Import matplotlib, or raise with the command that installs it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install it by pip install 'sklembed[plots]'."
        ) from error
    return plt


def _as_column(images):
    """Return images as a sequence that is indexed by position."""
    if len(getattr(images, "shape", ())) == 2 and images.shape[1] == 1:
        images = take_columns(images, [0], scalar=True)
    return images.tolist() if hasattr(images, "iloc") else images


def _choose_rows(masks, predicted, n_rows):
    """Return rows at equal steps of rank by Dice coefficient, the lowest first."""
    if n_rows < 1:
        raise ValueError(f"rows must be at least 1; got {n_rows}.")
    scores = []
    for mask, prediction in zip(masks, predicted, strict=True):
        scores.append(dice_score([mask], [prediction]))
    ranks = np.linspace(0, len(masks) - 1, min(n_rows, len(masks)))
    return np.argsort(scores, kind="stable")[ranks.round().astype(int)]


def _take(sequence, rows):
    """Return the elements at some positions."""
    return [sequence[row] for row in rows]


def _decode_pixels(image):
    """Return the pixels of an image in any supported form."""
    return np.asarray(decode(image, "image"))


def _draw_mask(ax, mask, image):
    """Draw the colors of labels over the image or over white, except for background."""
    labels, codes = np.unique(mask, return_inverse=True)
    background, (height, width) = np.full((1, 1, 3), 255), mask.shape
    if image is not None:
        background, (height, width) = image, image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(background, extent=extent, alpha=0.6)
    layer = _colors(labels)[codes.reshape(mask.shape)]
    ax.imshow(layer, extent=extent, interpolation="nearest")


def _colors(labels):
    """Return an RGBA color for each label, out of 16; background is transparent."""
    from matplotlib.colors import to_rgba_array

    hues = to_rgba_array(_COLORS[1:])
    pale = (hues + 1) / 2
    palette = np.concatenate([hues, pale])
    labels = np.asarray(labels, dtype=int)
    colors = palette[(labels - 1) % len(palette)]
    colors[:, 3] = np.where(labels > 0, 0.75, 0.0)
    return colors


def _split_modalities(aligner, X):
    """Return the aligned rows of each modality, without missing rows."""
    Z = aligner.transform(X)
    if hasattr(Z, "to_numpy"):
        Z = Z.to_numpy()
    width = len(aligner.grand_centroid_)
    rows = {}
    for number, (name, columns) in enumerate(aligner.blocks_.items()):
        if aligner.width_ is not None:  # resampled blocks, side by side
            columns = slice(number * width, (number + 1) * width)
        part = Z[:, columns]
        rows[name] = part[~np.isnan(part[:, 0])]
    return rows


def _gap(rows):
    """Return the modality gap, averaged over pairs of modalities."""
    gaps = [modality_gap(A, B) for A, B in combinations(rows.values(), 2)]
    return float(np.mean(gaps))


def _scores_by_value(search, param):
    """Return the best mean score of a search for each value of a parameter."""
    results = getattr(search, "cv_results_", None)
    if results is None:
        raise ValueError(f"{type(search).__name__} is not fitted. Call fit first.")
    names, matches = [], []
    for key in results:
        if not key.startswith("param_"):
            continue
        names.append(key.removeprefix("param_"))
        if key == f"param_{param}" or key.endswith(f"__{param}"):
            matches.append(names[-1])
    if len(matches) != 1:
        raise ValueError(
            f"The search varies {names}, of which {len(matches)} are called {param!r}. "
            "Pass the full name of one as param."
        )
    values = np.asarray(results[f"param_{matches[0]}"], dtype=float)
    shifts = np.unique(values)
    means, sds = results["mean_test_score"], results["std_test_score"]
    best = []
    for shift in shifts:
        candidates = np.flatnonzero(values == shift)
        best.append(max(candidates, key=lambda candidate: means[candidate]))
    return {"shifts": shifts, "mean_scores": means[best], "sd_scores": sds[best]}
