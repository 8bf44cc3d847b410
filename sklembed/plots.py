"""ModalityGapDisplay: two modalities before and after alignment, and what a shift is worth."""

import copy

import numpy as np
from sklearn.decomposition import PCA
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted


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
    def from_estimator(cls, aligner, X, *, search=None, max_rows=500, random_state=None):
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
        drawn = {name: rng.permutation(len(rows))[:max_rows] for name, rows in parts[0].items()}
        before, after = (
            {name: plane.transform(rows[drawn[name]]) for name, rows in part.items()}
            for part in parts
        )
        sweep = {} if search is None else _sweep(search, "shift")
        return cls(before=before, after=after, gap_before=gaps[0], gap_after=gaps[1], **sweep)

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
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("Plots need matplotlib: pip install 'sklembed[plots]'.") from error
        n_panels = 2 * (self.before is not None) + (self.shifts is not None)
        if axes is None:
            _, axes = plt.subplots(
                1, n_panels, figsize=(4.6 * n_panels, 4.2), layout="constrained", squeeze=False
            )
        self.axes_ = np.ravel(axes)
        if len(self.axes_) != n_panels:
            raise ValueError(f"There are {n_panels} panels to draw; got {len(self.axes_)} axes.")
        self.figure_ = self.axes_[0].figure
        if self.before is not None:
            self._draw_rows(self.axes_[0], self.before, f"before: gap {self.gap_before:.2f}")
            self._draw_rows(self.axes_[1], self.after, f"after: gap {self.gap_after:.2f}")
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
        ax.errorbar(self.shifts, self.mean_scores, yerr=self.sd_scores, marker="o", capsize=3)
        ax.set(
            title="cross-validated score, mean ± sd of folds",
            xlabel="shift (lambda)",
            ylabel="score",
        )


def _by_modality(aligner, X):
    """Return the aligned rows of each modality, without those that lack it."""
    Z = aligner.transform(X)
    Z = Z.to_numpy() if hasattr(Z, "to_numpy") else Z
    width = len(aligner.grand_centroid_)
    columns = aligner.blocks_
    if aligner.width_ is not None:
        columns = {
            name: slice(i * width, (i + 1) * width) for i, name in enumerate(aligner.blocks_)
        }
    parts = {name: Z[:, part] for name, part in columns.items()}
    return {name: part[~np.isnan(part[:, 0])] for name, part in parts.items()}


def _gap(parts):
    """Return the distance of centroids, averaged over pairs of modalities."""
    centroids = [rows.mean(axis=0, dtype=np.float64) for rows in parts.values()]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(centroids) for b in centroids[i + 1 :]]
    return float(np.mean(distances))


def _sweep(search, param):
    """Read from a search the score of each value of a parameter."""
    results = getattr(search, "cv_results_", None)
    if results is None:
        raise ValueError(f"{type(search).__name__} is not fitted; fit it before it is shown.")
    known = [key.removeprefix("param_") for key in results if key.startswith("param_")]
    names = [name for name in known if name == param or name.endswith(f"__{param}")]
    if len(names) != 1:
        raise ValueError(f"The search tried {known}, of which {len(names)} are called {param!r}.")
    values = np.asarray(results[f"param_{names[0]}"], dtype=float)
    shifts = np.unique(values)
    means, sds = results["mean_test_score"], results["std_test_score"]
    best = [max(np.flatnonzero(values == shift), key=lambda i: means[i]) for shift in shifts]
    return {"shifts": shifts, "mean_scores": means[best], "sd_scores": sds[best]}
