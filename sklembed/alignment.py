"""ModalityGapAligner and CanonicalAligner: closed-form alignment of modalities."""

from itertools import combinations
from numbers import Integral, Real

import numpy as np
from scipy import linalg
from sklearn.base import (
    BaseEstimator,
    OneToOneFeatureMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.preprocessing import normalize
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import FLOAT_DTYPES, check_is_fitted, validate_data

from sklembed._display import DocLinkMixin
from sklembed._table.blocks import check_one_block, observed_in_block, resolve_blocks
from sklembed._validation import check_new_rows, check_vectors, in_pieces

# These methods compare modalities coordinate by coordinate.
_METHODS_OF_EQUAL_WIDTHS = {"shift", "unit_shift", "procrustes"}


class ModalityGapAligner(
    DocLinkMixin, OneToOneFeatureMixin, TransformerMixin, BaseEstimator
):
    """Close the gap between the embeddings of several modalities.

    Embeddings of different modalities lie in separate cones, even for models that were
    trained to share one space [2]_. The aligner scales rows to unit length, moves the
    rows of each modality by a fraction `shift` towards the position that `method`
    defines, and scales them to unit length again. Everything is learned from the
    training rows, without labels.

    For two modalities and ``method="shift"`` this is the alignment of [1]_: each
    modality moves by half of ``shift`` times the gap, the difference of the two
    centroids. The code of that paper computes the gap over training and test rows
    together; this estimator never uses the test rows.

    A missing modality is NaN in all columns of its block, and stays NaN.

    Parameters
    ----------
    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    method : {"shift", "unit_shift", "center", "procrustes", "whiten"}, default="shift"
        The position of the aligned rows:

        - "shift": translated so that the modality's centroid coincides with the grand
          centroid, the mean of the centroids [1]_.
        - "unit_shift": translated in that direction, by a distance in units of length
          instead of the size of the gap (delta of [2]_).
        - "center": translated so that the modality's centroid is zero (I0T-post [3]_).
        - "procrustes": rotated by the orthogonal matrix that brings them closest to the
          rows of the first block. Requires rows with both modalities.
        - "whiten": centered and scaled to equal variance in all directions, with the
          Ledoit-Wolf estimate of the covariance.

    shift : float, default=1.0
        Fraction of the way that rows move (lambda of [1]_). 0 leaves the unit vectors
        unchanged, 1 moves them the whole way, and negative values widen the gap.

    noise_std : float, default=0.0
        Standard deviation of Gaussian noise that `fit_transform`, but not `transform`,
        adds to the aligned training rows [4]_.

    widths : {"error", "resample"}, default="error"
        Treatment of modalities of unequal width by the methods that compare coordinates
        ("shift", "unit_shift", "procrustes"). "error" raises an error. "resample"
        stretches all modalities to the widest by linear interpolation, as in [1]_.
        Coordinates of unrelated spaces do not correspond, with or without resampling.

    random_state : int, RandomState instance or None, default=None
        Seeds the noise. Pass an int for reproducible results.

    Attributes
    ----------
    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    width_ : int or None
        Width to which modalities were resampled; None without resampling.

    centroids_ : dict of str to ndarray
        Mean of the unit rows of each modality.

    grand_centroid_ : ndarray or None
        Mean of the centroids; None if widths differ.

    offsets_ : dict of str to ndarray
        Translation of the rows of each modality at ``shift=1``.

    maps_ : dict of str to ndarray
        Matrix by which rows are multiplied before the translation. Empty unless
        `method` is "procrustes" or "whiten".

    gap_before_ : float
        Distance of the centroids of the training rows, averaged over pairs of
        modalities; NaN if widths differ.

    gap_after_ : float
        The same distance for the aligned training rows.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    CanonicalAligner : Learns from pairs, and accepts unequal widths.
    sklembed.metrics.modality_gap : The distance of two centroids.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector
       Embedding Alignment Approach. arXiv 2406.02601.
    .. [2] Liang et al. Mind the Gap. arXiv 2203.02053.
    .. [3] An et al. I0T: Embedding Standardization Method Towards Zero Modality Gap.
       arXiv 2412.14384.
    .. [4] Zhang et al. Connect, Collapse, Corrupt. arXiv 2401.08567.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import ModalityGapAligner
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(100, 8)) + np.repeat([2.0, -2.0], 4)
    >>> blocks = {"text": slice(0, 4), "image": slice(4, 8)}
    >>> aligner = ModalityGapAligner(blocks).fit(X)
    >>> round(float(aligner.gap_before_), 2), round(float(aligner.gap_after_), 2)
    (1.84, 0.16)
    """

    _keeps_missing_rows = True  # for PerModalityUnion: NaN rows stay NaN
    _parameter_constraints: dict = {
        "blocks": [dict, None],
        "method": [
            StrOptions({"shift", "unit_shift", "center", "procrustes", "whiten"})
        ],
        "shift": [Interval(Real, None, None, closed="neither")],
        "noise_std": [Interval(Real, 0, None, closed="left")],
        "widths": [StrOptions({"error", "resample"})],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        blocks=None,
        *,
        method="shift",
        shift=1.0,
        noise_std=0.0,
        widths="error",
        random_state=None,
    ):
        self.blocks = blocks
        self.method = method
        self.shift = shift
        self.noise_std = noise_std
        self.widths = widths
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Learn the centroids and the alignment of each modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side. A missing modality is NaN.

        y : None
            Ignored.

        Returns
        -------
        self : ModalityGapAligner
            The fitted aligner.

        Raises
        ------
        ValueError
            If there are fewer than two modalities, one is missing in all rows, widths
            differ, or NaN fills only part of a block in a row.
        """
        self._fit(X)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y=None):
        """Learn the alignment, align the training rows, and add noise to them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`.

        y : None
            Ignored.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out)
            Aligned rows, of unit length in each block before noise is added.
        """
        aligned, observed, dtype = self._fit(X)
        Z = self._join(aligned, observed).astype(dtype, copy=False)
        if self.noise_std > 0:
            rng = check_random_state(self.random_state)
            Z += rng.normal(scale=self.noise_std, size=Z.shape).astype(Z.dtype)
        return Z

    @in_pieces
    def transform(self, X):
        """Align rows, without noise.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings. A missing modality is NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out)
            Aligned rows, of unit length in each block.
        """
        X = check_new_rows(self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False)
        rows, observed = self._all_unit_rows(X)
        return self._join(self._align_all(rows), observed).astype(X.dtype, copy=False)

    @in_pieces
    def encode(self, X, modality):
        """Align rows of one modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_columns)
            The columns of that modality only, in the order of its block.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_columns_out)
            Aligned rows, equal to the modality's block in the output of `transform`.

        Raises
        ------
        ValueError
            If there is no such block, or its width differs from that in `fit`.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = check_one_block(self, X, modality, FLOAT_DTYPES)
        rows, observed = self._unit_rows(X, modality, slice(None))
        aligned = self._align(modality, rows).astype(X.dtype, copy=False)
        return _scattered(aligned, observed)

    def get_feature_names_out(self, input_features=None):
        """Get output feature names: input names, or ``<block>__<number>`` if resampled.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns. None means those seen during fit.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The output feature names.
        """
        names = super().get_feature_names_out(input_features)
        if self.width_ is None:
            return names
        return _numbered_names(self.blocks_, self.width_)

    def _fit(self, X):
        """Learn the alignment; return the aligned rows, their masks and the dtype."""
        check_vectors(X, self)
        table = X
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite="allow-nan")
        names = getattr(self, "feature_names_in_", None)
        self.blocks_ = resolve_blocks(self.blocks, names, X.shape[1], table)
        self.width_ = self._common_width(X)
        rows, observed = self._all_unit_rows(X)
        for name, mask in observed.items():
            if not mask.any():
                raise ValueError(
                    f"Block {name!r} is NaN in all {len(X)} rows, so it has no "
                    "centroid. Leave it out, or check the previous step."
                )
        self.centroids_ = _centroids(rows)
        self.gap_before_ = _gap(self.centroids_)
        self.grand_centroid_ = None
        if not np.isnan(self.gap_before_):  # widths are equal
            self.grand_centroid_ = np.mean(list(self.centroids_.values()), axis=0)
        self.maps_, self.offsets_ = self._find_maps(rows, observed)
        aligned = self._align_all(rows)
        self.gap_after_ = _gap(_centroids(aligned))
        return aligned, observed, X.dtype

    def _common_width(self, X):
        """Return the width to resample modalities to, None without resampling."""
        widths = {}
        for name, columns in self.blocks_.items():
            widths[name] = X[:1, columns].shape[1]
        if len(widths) < 2:
            raise ValueError(
                "A gap needs at least two modalities, but the "
                f"n_features={X.shape[1]} columns have the blocks {list(widths)} only."
            )
        are_equal = len(set(widths.values())) == 1
        if are_equal or self.method not in _METHODS_OF_EQUAL_WIDTHS:
            return None
        if self.widths == "error":
            raise ValueError(
                f"method={self.method!r} needs modalities of equal width, but got "
                f"{widths}. Project them into one space first (CanonicalAligner), "
                "reduce each to the same number of components, use method='center', or "
                "pass widths='resample' as in arXiv 2406.02601."
            )
        return max(widths.values())

    def _all_unit_rows(self, X):
        """Return the unit rows of every modality, and masks of the observed rows."""
        rows, observed = {}, {}
        for name, columns in self.blocks_.items():
            rows[name], observed[name] = self._unit_rows(X, name, columns)
        return rows, observed

    def _unit_rows(self, X, name, columns):
        """Return the observed rows of a modality, with unit length, and their mask.

        Rows are float64, because differences of nearly equal rows would cancel in
        float32.
        """
        observed = observed_in_block(X, name, columns)
        rows = X[observed][:, columns].astype(np.float64, copy=False)
        rows = _normalized(rows, copy=True)
        if self.width_ is not None:
            rows = _resample(rows, self.width_)
        return rows, observed

    def _find_maps(self, rows, observed):
        """Return the matrix and the offset that `method` defines for each modality."""
        maps, offsets = {}, {}
        if self.method == "procrustes":
            maps = _rotations(rows, observed)
        for name, centroid in self.centroids_.items():
            if self.method == "center":
                offsets[name] = -centroid
            elif self.method == "procrustes":
                offsets[name] = np.zeros_like(centroid)
            elif self.method == "whiten":
                whitening = _whitening_matrix(_centered(rows[name], centroid))
                maps[name] = whitening / np.sqrt(len(centroid))
                offsets[name] = -centroid @ maps[name]
            else:
                offsets[name] = self.grand_centroid_ - centroid
        if self.method == "unit_shift":
            # The gap of two modalities is twice the distance to the grand centroid.
            distances = [np.linalg.norm(offset) for offset in offsets.values()]
            gap = max(2 * np.mean(distances), np.finfo(np.float64).tiny)
            for name in offsets:
                offsets[name] = offsets[name] / gap
        return maps, offsets

    def _align_all(self, rows):
        return {name: self._align(name, rows[name]) for name in rows}

    def _align(self, name, rows):
        """Move unit rows of one modality, and scale them to unit length again."""
        target = rows
        if self.maps_:
            target = rows @ self.maps_[name]
        target = target + self.offsets_[name]
        return _normalized(rows + self.shift * (target - rows))

    def _join(self, rows, observed):
        """Write the rows of each modality into its columns, NaN where it is missing."""
        blocks = self.blocks_
        n_columns = self.n_features_in_
        if self.width_ is not None:
            n_columns = self.width_ * len(blocks)
            positions = np.arange(n_columns).reshape(-1, self.width_)
            blocks = dict(zip(blocks, positions, strict=True))
        n_rows = len(next(iter(observed.values())))
        Z = np.empty((n_rows, n_columns))
        for name, columns in blocks.items():
            Z[:, columns] = _scattered(rows[name], observed[name])
        return Z

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class CanonicalAligner(DocLinkMixin, TransformerMixin, BaseEstimator):
    """Project two modalities onto the directions in which they correlate most.

    This is canonical correlation analysis in closed form. Each modality is whitened,
    and the singular value decomposition of the cross-covariance gives the directions
    and their correlations. Projections are scaled to unit length and, if `weighted`,
    each direction by the root of its correlation. Inner products then equal the
    similarity of canonical similarity analysis [1]_, ``sum_k rho_k x_k y_k``.

    Pairs are the rows that have both modalities. Rows with one modality contribute to
    its mean and covariance. All rows are projected; a missing modality stays NaN.

    Parameters
    ----------
    n_components : int or None, default=None
        Number of directions. None means the number of columns of the narrower modality.

    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, a list of positions or names, a boolean
        mask, or a callable that takes the table. If None, blocks are read from column
        names such as ``text__0``, as :class:`PerModalityUnion` produces under
        ``set_output(transform="pandas")``.

    shrinkage : float or "auto", default="auto"
        Shrinkage of each covariance towards a multiple of the identity, from 0 to less
        than 1. The cross-covariance shrinks with them, so that no correlation exceeds
        1. "auto" uses the fraction of the covariance's squared norm that is sampling
        noise. With fewer rows than columns and no shrinkage, all correlations are 1.

    weighted : bool, default=True
        Whether to weight directions by the root of their correlation.

    Attributes
    ----------
    correlations_ : ndarray of shape (n_components,)
        Canonical correlations on the training rows, in decreasing order, from the
        covariances after shrinkage. 0 beyond the rank of the data.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    means_ : dict of str to ndarray of shape (n_columns,)
        Mean of each modality.

    maps_ : dict of str to ndarray of shape (n_columns, n_components)
        The directions of each modality, 0 beyond the rank of the data.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    References
    ----------
    .. [1] Li et al. CSA: Data-efficient Mapping of Unimodal Features to Multimodal
       Features. arXiv 2410.07610.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CanonicalAligner
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(500, 2))
    >>> text = shared @ rng.normal(size=(2, 5)) + rng.normal(size=(500, 5))
    >>> image = shared @ rng.normal(size=(2, 7)) + rng.normal(size=(500, 7))
    >>> blocks = {"text": slice(0, 5), "image": slice(5, 12)}
    >>> aligner = CanonicalAligner(2, blocks=blocks).fit(np.hstack([text, image]))
    >>> aligner.correlations_.round(2)
    array([0.67, 0.6 ])
    """

    _keeps_missing_rows = True  # for PerModalityUnion: NaN rows stay NaN
    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left"), None],
        "blocks": [dict, None],
        "shrinkage": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "weighted": ["boolean"],
    }

    def __init__(
        self, n_components=None, *, blocks=None, shrinkage="auto", weighted=True
    ):
        self.n_components = n_components
        self.blocks = blocks
        self.shrinkage = shrinkage
        self.weighted = weighted

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Find the directions in which the two modalities of a row correlate.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of both modalities side by side. A missing modality is NaN.

        y : None
            Ignored.

        Returns
        -------
        self : CanonicalAligner
            The fitted aligner.

        Raises
        ------
        ValueError
            If the number of modalities is not two, fewer than two rows have both, or
            `n_components` exceeds the number of columns of the narrower modality.
        """
        check_vectors(X, self)
        table = X
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite="allow-nan")
        names = getattr(self, "feature_names_in_", None)
        self.blocks_ = resolve_blocks(self.blocks, names, X.shape[1], table)
        rows, observed, paired = self._check_pairs(X)
        self.means_ = _centroids(rows)
        whitenings, whitened, remaining = [], [], 1.0
        for name, part in rows.items():
            centered = _centered(part, self.means_[name])
            shrinkage = self.shrinkage
            if shrinkage == "auto":
                shrinkage = _noise_fraction(centered)
            axes, roots, _ = _whitening(centered, shrinkage)
            whitenings.append(axes * roots)
            whitened.append(centered[paired[observed[name]]] @ whitenings[-1])
            remaining *= 1 - shrinkage
        # The cross-covariance shrinks too, otherwise correlations could exceed 1.
        a, b = whitened
        left, correlations, right = linalg.svd(
            np.sqrt(remaining) * a.T @ b / len(a), full_matrices=False
        )
        n_components = self.n_components
        if n_components is None:
            n_components = min(len(whitenings[0]), len(whitenings[1]))
        self.correlations_ = _padded(correlations.clip(0, 1), n_components)
        self.maps_ = {}
        directions = (left, right.T)
        for i, name in enumerate(rows):
            self.maps_[name] = _padded(whitenings[i] @ directions[i], n_components)
        return self

    @in_pieces
    def transform(self, X):
        """Project the rows of each modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings. A missing modality is NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, 2 * n_components)
            Projections, a block for each modality.
        """
        X = check_new_rows(self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False)
        return np.hstack(
            [self._project(X[:, part], name) for name, part in self.blocks_.items()]
        )

    @in_pieces
    def encode(self, X, modality):
        """Project rows of one modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_columns)
            The columns of that modality only, in the order of its block.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components)
            Projections, equal to the modality's block in the output of `transform`.

        Raises
        ------
        ValueError
            If there is no such block, or its width differs from that in `fit`.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = check_one_block(self, X, modality, FLOAT_DTYPES)
        return self._project(X, modality)

    def get_feature_names_out(self, input_features=None):
        """Get output feature names: ``<block>__<number>``.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The output feature names.
        """
        check_is_fitted(self)
        return _numbered_names(self.blocks_, len(self.correlations_))

    def _check_pairs(self, X):
        """Return the rows of each modality, their masks, and the mask of paired rows."""
        if len(self.blocks_) != 2:
            raise ValueError(
                "CanonicalAligner pairs two modalities, but the "
                f"n_features={X.shape[1]} columns have the blocks {list(self.blocks_)}."
            )
        rows, observed = {}, {}
        for name, columns in self.blocks_.items():
            observed[name] = observed_in_block(X, name, columns)
            rows[name] = X[observed[name]][:, columns]
        paired = np.logical_and(*observed.values())
        if paired.sum() < 2:
            raise ValueError(
                f"Only {paired.sum()} of n_samples={len(X)} rows have both modalities; "
                "at least two are needed to estimate correlations."
            )
        first, second = rows.values()
        narrower = min(first.shape[1], second.shape[1])
        if (self.n_components or 1) > narrower:
            raise ValueError(
                f"n_components={self.n_components}, but the narrower modality has "
                f"{narrower} columns. Use at most that many components."
            )
        return rows, observed, paired

    def _project(self, X, name):
        """Project the columns of one modality, NaN where it is missing."""
        observed = observed_in_block(X, name, slice(None))
        # The means are float64: in float32, columns far from 0 would cancel.
        rows = (X[observed] - self.means_[name]) @ self.maps_[name]
        rows = _normalized(rows)
        if self.weighted:
            rows *= np.sqrt(self.correlations_)
        return _scattered(rows.astype(X.dtype, copy=False), observed)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _normalized(rows, copy=False):
    """Scale rows to unit length; scikit-learn alone refuses a table without rows."""
    return normalize(rows, copy=copy) if len(rows) else rows


def _centroids(rows):
    """Return the mean of the rows of each modality, summed in float64."""
    return {name: part.mean(axis=0, dtype=np.float64) for name, part in rows.items()}


def _centered(rows, mean):
    """Subtract the mean in float64, with exact zeros in constant columns."""
    deviations = rows - mean
    rounding = 10 * np.finfo(np.float64).eps * np.abs(mean)
    deviations[:, np.abs(deviations).max(axis=0) <= rounding] = 0.0
    return deviations


def _gap(centroids):
    """Return the mean distance over pairs of centroids; NaN if their widths differ."""
    distances = []
    for a, b in combinations(centroids.values(), 2):
        if len(a) != len(b):
            return np.nan
        distances.append(np.linalg.norm(a - b))
    return float(np.mean(distances))


def _resample(rows, width):
    """Stretch rows to a width by linear interpolation between their coordinates."""
    positions = np.linspace(0, rows.shape[1] - 1, width)
    left = np.floor(positions).astype(int)
    right = np.minimum(left + 1, rows.shape[1] - 1)
    fraction = (positions - left).astype(rows.dtype)
    return rows[:, left] * (1 - fraction) + rows[:, right] * fraction


def _rotations(rows, observed):
    """Return the rotation of each modality onto the first, from rows with both."""
    reference, *names = rows
    target = rows[reference]
    rotations = {reference: np.eye(target.shape[1])}
    for name in names:
        paired = observed[reference] & observed[name]
        if not paired.any():
            raise ValueError(
                f"method='procrustes' rotates {name!r} onto {reference!r} by rows that "
                "have both, and there are none. Use method='shift' or 'center'."
            )
        rotations[name], _ = linalg.orthogonal_procrustes(
            rows[name][paired[observed[name]]], target[paired[observed[reference]]]
        )
    return rotations


def _noise_fraction(centered):
    """Estimate the fraction of a covariance's squared norm that is sampling noise.

    This is the shrinkage towards 0 that minimises the expected squared error. The
    optimal shrinkage towards the identity is no substitute: it is 1 if the covariance
    is the identity, even if the estimate has no noise.
    """
    n_rows, n_columns = centered.shape
    if n_rows < n_columns:  # the smaller Gram matrix has the same norm
        gram = centered @ centered.T
    else:
        gram = centered.T @ centered
    squared_norm = np.square(gram).sum() / n_rows**2
    if n_columns == 1 or squared_norm == 0:
        return 0.0
    # Mean over rows of |x x' - S|^2: n_rows times the variance of S, the mean of x x'.
    spread = np.square(np.square(centered).sum(axis=1)).mean() - squared_norm
    return float(np.clip(spread / n_rows / squared_norm, 0.0, 1.0 - 1.0 / n_rows))


def _whitening(centered, shrinkage):
    """Return the inverse root of a covariance shrunk towards the identity.

    Returns
    -------
    axes : ndarray of shape (n_columns, n_axes)
        Directions in which the rows vary, at most as many as there are rows or columns.
    roots : ndarray of shape (n_axes,)
        The inverse root along each axis; 0 for an axis without variance.
    rest : float
        The inverse root in all directions orthogonal to the axes.
    """
    n_rows, n_columns = centered.shape
    if n_rows < n_columns:
        _, lengths, axes = linalg.svd(centered, full_matrices=False)
        variances, axes = np.square(lengths) / n_rows, axes.T
    else:
        variances, axes = linalg.eigh(centered.T @ centered / n_rows)
    target = shrinkage * variances.sum() / n_columns
    variances = (1 - shrinkage) * variances + target
    # Axes without variance cannot be scaled to unit variance; they are dropped.
    smallest = variances.max() * n_columns * np.finfo(np.float64).eps
    empty = variances <= smallest
    roots = np.where(empty, 0.0, 1 / np.sqrt(np.where(empty, 1.0, variances)))
    rest = 0.0
    if len(variances) < n_columns and target > smallest:
        rest = 1 / np.sqrt(target)
    return axes, roots, rest


def _whitening_matrix(centered):
    """Return the symmetric whitening matrix, with Ledoit-Wolf shrinkage."""
    shrinkage = 0.0
    if centered.shape[1] > 1:
        shrinkage = ledoit_wolf_shrinkage(centered, assume_centered=True)
    axes, roots, rest = _whitening(centered, shrinkage)
    return (axes * (roots - rest)) @ axes.T + rest * np.eye(len(axes))


def _padded(array, width):
    """Cut the last axis to a width, or pad it with zeros."""
    padded = np.zeros((*array.shape[:-1], width))
    n_columns = min(width, array.shape[-1])
    padded[..., :n_columns] = array[..., :n_columns]
    return padded


def _scattered(rows, observed):
    """Write rows to their positions in the table, NaN where the modality is missing."""
    Z = np.full((len(observed), rows.shape[1]), np.nan, dtype=rows.dtype)
    Z[observed] = rows
    return Z


def _numbered_names(blocks, width):
    """Return feature names of a block and a number."""
    names = [f"{name}__{i}" for name in blocks for i in range(width)]
    return np.array(names, dtype=object)
