"""ModalityGapAligner and CanonicalAligner: modalities brought into one space, in closed form."""

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

from sklembed._table.blocks import check_one_block, observed_in_block, resolve_blocks
from sklembed._validation import check_vectors

# Methods that compare modalities coordinate by coordinate.
_OF_EQUAL_WIDTHS = {"shift", "unit_shift", "procrustes"}


class ModalityGapAligner(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Move the embeddings of several modalities towards each other.

    Embeddings of different modalities lie in cones of their own, also in models that were trained
    to share one space [2]_. The aligner scales rows to unit length, moves those of each modality
    by `shift` of the way to where `method` wants them, and scales them again. All is learnt from
    the training rows, without labels.

    For two modalities and ``method="shift"`` this is the alignment of [1]_: each moves by half of
    ``shift`` times the gap, the difference of the two centroids. That paper's code computes the gap
    over training and test rows together; this one never sees the test rows.

    A row may lack a modality: its block is NaN throughout, and stays so.

    Parameters
    ----------
    blocks : dict of str to columns, or None, default=None
        The columns of each modality: a slice, or a list of positions or names. None reads them
        from names such as ``text__0``, which :class:`PerModalityUnion` gives under
        ``set_output(transform="pandas")``.

    method : {"shift", "unit_shift", "center", "procrustes", "whiten"}, default="shift"
        Where rows are wanted:

        - "shift": moved by what takes their modality's centroid to the grand centroid, the mean
          of the centroids [1]_.
        - "unit_shift": moved in that direction, in units of length instead of the gap's own size
          (delta of [2]_).
        - "center": without their modality's centroid (I0T-post [3]_).
        - "procrustes": turned by the rotation that brings them closest to the first block's rows;
          needs rows with both modalities.
        - "whiten": centred, and with equal variance in all directions, by a covariance with
          Ledoit and Wolf's shrinkage.

    shift : float, default=1.0
        How far rows move: 0 leaves them, as unit vectors, where they are, 1 takes them all the
        way; lambda of [1]_. Negative values widen the gap.

    noise_std : float, default=0.0
        Standard deviation of Gaussian noise on the aligned training rows, added by `fit_transform`
        alone [4]_.

    widths : {"error", "resample"}, default="error"
        What becomes of modalities of unequal width, for the methods that compare them coordinate
        by coordinate ("shift", "unit_shift", "procrustes"): an error, or all are stretched to the
        widest by linear interpolation, as in [1]_. Coordinates of unrelated spaces have nothing to
        do with each other, stretched or not.

    random_state : int, RandomState instance or None, default=None
        Seeds the noise.

    Attributes
    ----------
    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    width_ : int or None
        The width that modalities were resampled to; None where they were left alone.

    centroids_ : dict of str to ndarray
        Mean of each modality's unit rows.

    grand_centroid_ : ndarray or None
        Mean of the centroids; None where widths differ.

    offsets_ : dict of str to ndarray
        What is added to the rows of each modality, at a `shift` of 1.

    maps_ : dict of str to ndarray
        What they are multiplied by before, by "procrustes" and "whiten"; else empty.

    gap_before_ : float
        Distance of the centroids of the training rows, the mean over pairs of modalities; NaN where
        widths differ.

    gap_after_ : float
        The same for the aligned rows.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    CanonicalAligner : Learns from pairs, and needs no equal widths.
    sklembed.metrics.modality_gap : The distance of two centroids.

    References
    ----------
    .. [1] Restrepo et al. Multimodal Deep Learning for Low-Resource Settings: A Vector Embedding
       Alignment Approach. arXiv 2406.02601.
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
    >>> aligner = ModalityGapAligner(blocks={"text": slice(0, 4), "image": slice(4, 8)}).fit(X)
    >>> round(float(aligner.gap_before_), 2), round(float(aligner.gap_after_), 2)
    (1.84, 0.16)
    """

    _keeps_missing_rows = True  # missing in, missing out: PerModalityUnion reads this
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
        """Learn where each modality lies.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of all modalities side by side; a missing one is a block of NaN.

        y : None
            Not used.

        Returns
        -------
        self : ModalityGapAligner
            The fitted aligner.

        Raises
        ------
        ValueError
            If there are fewer than two modalities, one is missing in all rows, widths differ, or a
            block is NaN in part of a row.
        """
        self._fit(X)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y=None):
        """Learn where each modality lies, align the training rows, and add noise to them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings, as for `fit`.

        y : None
            Not used.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out)
            Aligned rows, of unit length in each block but for the noise.
        """
        aligned, observed, dtype = self._fit(X)
        Z = self._join(aligned, observed).astype(dtype, copy=False)
        if self.noise_std > 0:
            rng = check_random_state(self.random_state)
            Z += rng.normal(scale=self.noise_std, size=Z.shape).astype(Z.dtype)
        return Z

    def transform(self, X):
        """Align rows; never adds noise.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a block of NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_features_out)
            Aligned rows, of unit length in each block.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = validate_data(
            self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False, reset=False
        )
        rows, observed = self._all_unit_rows(X)
        aligned = {name: self._aligned(name, rows[name]) for name in rows}
        return self._join(aligned, observed).astype(X.dtype, copy=False)

    def encode(self, X, modality):
        """Align rows of one modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_columns)
            The columns of that modality alone, in the order of its block.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_columns_out)
            Aligned rows, the same as the modality's block of `transform`.

        Raises
        ------
        ValueError
            If there is no such block, or the width is not that seen in `fit`.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = check_one_block(self, X, modality, FLOAT_DTYPES)
        rows, observed = self._unit_rows(X, modality, slice(None))
        return _scattered(
            self._aligned(modality, rows).astype(X.dtype, copy=False), observed
        )

    def get_feature_names_out(self, input_features=None):
        """Name the output columns as those of the input, or ``<block>__<number>`` if resampled.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns; by default those seen in `fit`.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names.
        """
        names = super().get_feature_names_out(input_features)
        return names if self.width_ is None else _numbered(self.blocks_, self.width_)

    def _fit(self, X):
        """Learn from training rows; return them aligned, which are observed, and their dtype."""
        check_vectors(X, self)
        table = X
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite="allow-nan")
        names = getattr(self, "feature_names_in_", None)
        self.blocks_ = resolve_blocks(self.blocks, names, X.shape[1], table)
        self.width_ = self._common_width(X)
        rows, observed = self._all_unit_rows(X)
        for name, seen in observed.items():
            if not seen.any():
                raise ValueError(
                    f"Block {name!r} is NaN in all {len(X)} rows, so there is no centroid to move. "
                    "Leave it out, or check the step before."
                )
        self.centroids_ = _centroids(rows)
        equal = len({len(centroid) for centroid in self.centroids_.values()}) == 1
        self.grand_centroid_ = (
            np.mean(list(self.centroids_.values()), axis=0) if equal else None
        )
        self.gap_before_ = _gap(self.centroids_) if equal else np.nan
        self.maps_, self.offsets_ = self._find_maps(rows, observed)
        aligned = {name: self._aligned(name, rows[name]) for name in rows}
        self.gap_after_ = _gap(_centroids(aligned)) if equal else np.nan
        return aligned, observed, X.dtype

    def _common_width(self, X):
        """Return the width that all modalities are stretched to, None if they are left alone."""
        widths = {
            name: X[:1, columns].shape[1] for name, columns in self.blocks_.items()
        }
        if len(widths) < 2:
            raise ValueError(
                f"A gap needs at least two modalities, but the n_features={X.shape[1]} columns "
                f"hold the blocks {list(widths)} only."
            )
        if len(set(widths.values())) == 1 or self.method not in _OF_EQUAL_WIDTHS:
            return None
        if self.widths == "error":
            raise ValueError(
                f"method={self.method!r} needs modalities of equal width, but got {widths}. Bring "
                "them into one space first (CanonicalAligner), reduce each to the same number of "
                "components, use method='center', or pass widths='resample' as arXiv 2406.02601 "
                "does."
            )
        return max(widths.values())

    def _all_unit_rows(self, X):
        """Return `_unit_rows` of every modality."""
        found = {
            name: self._unit_rows(X, name, columns)
            for name, columns in self.blocks_.items()
        }
        return ({name: pair[i] for name, pair in found.items()} for i in (0, 1))

    def _unit_rows(self, X, name, columns):
        """Return a modality's observed rows, of unit length and the common width; and which.

        They are of double precision, as rows that lie close together would cancel in single.
        """
        observed = observed_in_block(X, name, columns)
        part = X[observed][:, columns].astype(np.float64, copy=False)
        part = normalize(part) if len(part) else part
        return part if self.width_ is None else _resample(part, self.width_), observed

    def _find_maps(self, rows, observed):
        """Return the matrices and offsets that take rows to where `method` wants them."""
        maps, centroids = {}, self.centroids_
        if self.method in ("shift", "unit_shift"):
            # For two modalities, twice the distance to the grand centroid is that of the two.
            distances = [
                np.linalg.norm(self.grand_centroid_ - c) for c in centroids.values()
            ]
            size = 2 * np.mean(distances) if self.method == "unit_shift" else 1.0
            size = max(size, np.finfo(np.float64).tiny)
            offsets = {
                name: (self.grand_centroid_ - c) / size for name, c in centroids.items()
            }
        elif self.method == "center":
            offsets = {name: -centroid for name, centroid in centroids.items()}
        elif self.method == "procrustes":
            maps = _rotations(rows, observed)
            offsets = {
                name: np.zeros_like(centroid) for name, centroid in centroids.items()
            }
        else:
            maps = {
                name: _whitening_matrix(_centred(part, centroids[name]))
                / np.sqrt(part.shape[1])
                for name, part in rows.items()
            }
            offsets = {name: -centroids[name] @ maps[name] for name in rows}
        return maps, offsets

    def _aligned(self, name, rows):
        """Move unit rows of one modality, and scale them to unit length again."""
        wanted = rows @ self.maps_[name] if self.maps_ else rows
        wanted = wanted + self.offsets_[name]
        moved = rows + self.shift * (wanted - rows)
        return normalize(moved, copy=False) if len(moved) else moved

    def _join(self, rows, observed):
        """Put modalities side by side, NaN where a row lacks one."""
        columns = self.blocks_
        if self.width_ is not None:
            starts = np.arange(len(columns)) * self.width_
            columns = {
                name: slice(start, start + self.width_)
                for name, start in zip(columns, starts, strict=True)
            }
        return _side_by_side(rows, observed, columns)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class CanonicalAligner(TransformerMixin, BaseEstimator):
    """Project two modalities to where their rows correlate most.

    Canonical correlation analysis in closed form: each modality is whitened, and the singular
    vectors of what remains between them are the directions, with their correlations. Rows are
    scaled to unit length there and, if `weighted`, each direction by the root of its correlation,
    so that inner products are the similarity of canonical similarity analysis [1]_,
    ``sum_k rho_k x_k y_k``.

    Pairs are the rows that have both modalities; rows with one help to whiten it. All rows are
    projected; a missing modality stays NaN.

    Parameters
    ----------
    n_components : int or None, default=None
        Number of directions; None takes as many as the narrower modality has columns.

    blocks : dict of str to columns, or None, default=None
        The columns of the two modalities, as for :class:`ModalityGapAligner`.

    shrinkage : float or "auto", default="auto"
        How far each covariance is drawn towards a multiple of the identity, from 0 to less than 1.
        The covariance between the modalities shrinks with them, so that no correlation exceeds 1.
        "auto" takes the share of the covariance's squared norm that is sampling noise. With fewer
        rows than columns and no shrinkage all correlations are 1.

    weighted : bool, default=True
        Whether directions weigh by their correlation.

    Attributes
    ----------
    correlations_ : ndarray of shape (n_components,)
        The canonical correlations on the training rows, falling, by the covariances after
        shrinkage; 0 beyond the number of directions in which the rows vary.

    blocks_ : dict of str to slice or ndarray
        The columns of each modality in `X`.

    means_ : dict of str to ndarray of shape (n_columns,)
        Mean of each modality.

    maps_ : dict of str to ndarray of shape (n_columns, n_components)
        The directions of each modality, 0 where the correlation is 0 for lack of one.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    References
    ----------
    .. [1] Li et al. CSA: Data-efficient Mapping of Unimodal Features to Multimodal Features.
       arXiv 2410.07610.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CanonicalAligner
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.normal(size=(500, 2))
    >>> text = shared @ rng.normal(size=(2, 5)) + rng.normal(size=(500, 5))
    >>> image = shared @ rng.normal(size=(2, 7)) + rng.normal(size=(500, 7))
    >>> aligner = CanonicalAligner(2, blocks={"text": slice(0, 5), "image": slice(5, 12)})
    >>> aligner.fit(np.hstack([text, image])).correlations_.round(2)
    array([0.67, 0.6 ])
    """

    _keeps_missing_rows = True  # missing in, missing out: PerModalityUnion reads this
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
        """Find the directions in which the modalities of a row correlate.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings of both modalities side by side; a missing one is a block of NaN.

        y : None
            Not used.

        Returns
        -------
        self : CanonicalAligner
            The fitted aligner.

        Raises
        ------
        ValueError
            If there are not two modalities, fewer than two rows have both, or more components are
            asked for than the narrower modality has columns.
        """
        check_vectors(X, self)
        table = X
        X = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite="allow-nan")
        names = getattr(self, "feature_names_in_", None)
        self.blocks_ = resolve_blocks(self.blocks, names, X.shape[1], table)
        rows, observed, paired = self._check_pairs(X)
        self.means_ = _centroids(rows)
        pairs, whitenings, shrinkages = [], [], []
        for name, part in rows.items():
            centred = _centred(part, self.means_[name])
            shrinkage = (
                _noise_share(centred) if self.shrinkage == "auto" else self.shrinkage
            )
            axes, roots, _ = _whitening(centred, shrinkage)
            pairs.append(centred[paired[observed[name]]])
            whitenings.append(axes * roots)
            shrinkages.append(shrinkage)
        a, b = (
            part @ whitening for part, whitening in zip(pairs, whitenings, strict=True)
        )
        # The cross-covariance shrinks too, else correlations could be more than 1.
        remaining = np.sqrt((1 - shrinkages[0]) * (1 - shrinkages[1]))
        left, correlations, right = linalg.svd(
            remaining * a.T @ b / len(a), full_matrices=False
        )
        n_components = self.n_components or min(part.shape[1] for part in pairs)
        self.correlations_ = _padded(correlations.clip(0, 1), n_components)
        self.maps_ = {
            name: _padded(whitening @ directions, n_components)
            for name, whitening, directions in zip(
                rows, whitenings, (left, right.T), strict=True
            )
        }
        return self

    def transform(self, X):
        """Project the rows of each modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Embeddings; a missing one is a block of NaN.

        Returns
        -------
        Z : ndarray of shape (n_samples, 2 * n_components)
            Projections, a block for each modality.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = validate_data(
            self, X, dtype=FLOAT_DTYPES, ensure_all_finite=False, reset=False
        )
        return np.hstack(
            [self._project(X[:, part], name) for name, part in self.blocks_.items()]
        )

    def encode(self, X, modality):
        """Project rows of one modality.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_columns)
            The columns of that modality alone, in the order of its block.

        modality : str
            Name of the block.

        Returns
        -------
        Z : ndarray of shape (n_samples, n_components)
            Projections, the same as the modality's block of `transform`.

        Raises
        ------
        ValueError
            If there is no such block, or the width is not that seen in `fit`.
        """
        check_is_fitted(self)
        check_vectors(X, self)
        X = check_one_block(self, X, modality, FLOAT_DTYPES)
        return self._project(X, modality)

    def _project(self, X, name):
        """Project one modality's columns, NaN where a row lacks it."""
        observed = observed_in_block(X, name, slice(None))
        # In double precision: in single, columns far from 0 would cancel.
        rows = (X[observed] - self.means_[name]) @ self.maps_[name]
        rows = normalize(rows, copy=False) if len(rows) else rows
        if self.weighted:
            rows *= np.sqrt(self.correlations_)
        return _scattered(rows.astype(X.dtype, copy=False), observed)

    def get_feature_names_out(self, input_features=None):
        """Name the output columns ``<block>__<number>``.

        Parameters
        ----------
        input_features : None
            Not used.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names.
        """
        check_is_fitted(self)
        return _numbered(self.blocks_, len(self.correlations_))

    def _check_pairs(self, X):
        """Return the rows of each modality, which are observed, and which have both."""
        if len(self.blocks_) != 2:
            raise ValueError(
                f"CanonicalAligner pairs two modalities, but the n_features={X.shape[1]} columns "
                f"hold the blocks {list(self.blocks_)}."
            )
        rows, observed = {}, {}
        for name, columns in self.blocks_.items():
            observed[name] = observed_in_block(X, name, columns)
            rows[name] = X[observed[name]][:, columns]
        paired = np.logical_and(*observed.values())
        if paired.sum() < 2:
            raise ValueError(
                f"Only {paired.sum()} of n_samples={len(X)} rows have both modalities; at least "
                "two are needed to tell what correlates."
            )
        narrower = min(part.shape[1] for part in rows.values())
        if (self.n_components or 1) > narrower:
            raise ValueError(
                f"n_components={self.n_components}, but the narrower modality has {narrower} "
                "columns. Ask for no more than that."
            )
        return rows, observed, paired

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _centroids(rows):
    """Return the mean of each modality's rows, summed in double precision."""
    return {name: part.mean(axis=0, dtype=np.float64) for name, part in rows.items()}


def _centred(rows, mean):
    """Subtract the mean in double precision; what rounding leaves of a constant column is 0."""
    deviations = rows - mean
    rounding = 10 * np.finfo(np.float64).eps * np.abs(mean)
    deviations[:, np.abs(deviations).max(axis=0) <= rounding] = 0.0
    return deviations


def _gap(centroids):
    """Return the distance of two centroids, averaged over pairs of modalities."""
    pairs = combinations(centroids.values(), 2)
    return float(np.mean([np.linalg.norm(a - b) for a, b in pairs]))


def _resample(rows, width):
    """Stretch rows to a width by linear interpolation between their coordinates."""
    places = np.linspace(0, rows.shape[1] - 1, width)
    left = np.floor(places).astype(int)
    right = np.minimum(left + 1, rows.shape[1] - 1)
    part = (places - left).astype(rows.dtype)
    return rows[:, left] * (1 - part) + rows[:, right] * part


def _rotations(rows, observed):
    """Find the rotation of each modality onto the first, by rows that have both."""
    (reference, target), *others = rows.items()
    rotations = {reference: np.eye(target.shape[1])}
    for name, part in others:
        both = observed[reference] & observed[name]
        if not both.any():
            raise ValueError(
                f"method='procrustes' turns {name!r} onto {reference!r} by rows that have both, "
                "and there are none. Use method='shift' or 'center'."
            )
        source, goal = part[both[observed[name]]], target[both[observed[reference]]]
        rotations[name] = linalg.orthogonal_procrustes(
            source.astype(np.float64), goal.astype(np.float64)
        )[0]
    return rotations


def _noise_share(centred):
    """Estimate how much of a covariance's squared norm is sampling noise.

    This is the shrinkage towards 0 that minimises the expected squared error. Shrinkage towards
    the identity is 1 where the covariance is the identity already, however well it is known.
    """
    n_rows, n_columns = centred.shape
    by_rows = n_rows < n_columns
    gram = centred @ centred.T if by_rows else centred.T @ centred
    squared_norm = np.square(gram).sum() / n_rows**2
    if n_columns == 1 or squared_norm == 0:
        return 0.0
    # Mean over rows of |x x' - S|^2, the variance of the mean S of the x x' times n_rows.
    spread = np.square(np.square(centred).sum(axis=1)).mean() - squared_norm
    return float(np.clip(spread / n_rows / squared_norm, 0.0, 1.0 - 1.0 / n_rows))


def _whitening(centred, shrinkage):
    """Find the inverse root of a covariance drawn towards a multiple of the identity.

    Returns
    -------
    axes : ndarray of shape (n_columns, n_axes)
        Directions in which the rows vary, at most as many as there are rows or columns.
    roots : ndarray of shape (n_axes,)
        The inverse root along each of them; 0 for a direction without variance.
    rest : float
        The inverse root in all directions that are orthogonal to the axes.
    """
    n_rows, n_columns = centred.shape
    if n_rows < n_columns:
        _, lengths, axes = linalg.svd(centred, full_matrices=False)
        variances, axes = np.square(lengths) / n_rows, axes.T
    else:
        variances, axes = linalg.eigh(centred.T @ centred / n_rows)
    drawn_to = shrinkage * variances.sum() / n_columns
    variances = (1 - shrinkage) * variances + drawn_to
    # Directions without variance have no scale to be brought to 1; they are dropped.
    smallest = variances.max() * n_columns * np.finfo(np.float64).eps
    empty = variances <= smallest
    roots = np.where(empty, 0.0, 1 / np.sqrt(np.where(empty, 1.0, variances)))
    rest = 0.0
    if len(variances) < n_columns and drawn_to > smallest:
        rest = 1 / np.sqrt(drawn_to)
    return axes, roots, rest


def _whitening_matrix(centred):
    """Return the symmetric matrix that whitens, with Ledoit and Wolf's shrinkage."""
    shrinkage = (
        ledoit_wolf_shrinkage(centred, assume_centered=True)
        if centred.shape[1] > 1
        else 0.0
    )
    axes, roots, rest = _whitening(centred, shrinkage)
    return (axes * (roots - rest)) @ axes.T + rest * np.eye(len(axes))


def _padded(array, width):
    """Cut the last axis to a width, or fill it up with zeros."""
    filled = np.zeros((*array.shape[:-1], width))
    n_columns = min(width, array.shape[-1])
    filled[..., :n_columns] = array[..., :n_columns]
    return filled


def _side_by_side(rows, observed, columns):
    """Write the observed rows of each modality into its columns, and NaN where there are none."""
    n_rows = len(next(iter(observed.values())))
    width = sum(part.shape[1] for part in rows.values())
    dtype = next(iter(rows.values())).dtype
    Z = np.full((n_rows, width), np.nan, dtype=dtype)
    for name, part in rows.items():
        places = np.arange(width)[columns[name]]
        Z[np.ix_(observed[name], places)] = part
    return Z


def _scattered(rows, observed):
    """Write observed rows where they belong, and NaN where there are none."""
    Z = np.full((len(observed), rows.shape[1]), np.nan, dtype=rows.dtype)
    Z[observed] = rows
    return Z


def _numbered(blocks, width):
    """Name columns by block and number."""
    return np.array(
        [f"{name}__{i}" for name in blocks for i in range(width)], dtype=object
    )
