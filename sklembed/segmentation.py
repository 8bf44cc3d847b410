"""PatchSegmenter: masks made of the patches of a frozen encoder."""

import math
import warnings
from collections import Counter
from functools import partial, reduce
from numbers import Integral, Real

import numpy as np
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils import check_consistent_length, column_or_1d, gen_batches
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._table.blocks import moments, n_trained
from sklembed._table.columns import as_table, is_frame, missing_cells, take_columns
from sklembed._table.tokens import read_tokens, token_columns
from sklembed._targets import hold_back
from sklembed._validation import (
    check_labels_of_pixels,
    check_layer_sizes,
    check_masks,
    draw_seed,
)
from sklembed.metrics import dice_score

_MOST_CLASSES = 256  # of pixels
_CHUNK_PICTURES = 16  # of a forward pass without training


class PatchSegmenter(CallbackSupportMixin, BaseEstimator):
    """Say of each pixel what it shows, from the patch tokens of a frozen encoder.

    A light decoder of convolutions and upsampling, as SETR's [1]_, makes masks of the patches of a
    :class:`FrozenEncoder` with ``output="tokens"``. Several columns of tokens are maps of the same
    pictures: finer ones, such as those of a smaller `stride`, join where the decoder has reached
    their grid, as skips do in a U-Net [2]_. Trained by the Dice and the focal loss [3]_.

    Parameters
    ----------
    hidden_layer_sizes : array-like of int, default=(64, 32, 16)
        Channels of the decoder's layers: 3 x 3 convolutions, the first on the coarsest map, each of
        the others on a grid of twice as many rows and columns, or on that of the next finer map. At
        least as many as there are maps. Empty, the decoder is a linear map of each patch.

    grid_shape : tuple of two int or None, default=None
        Rows and columns of the patches, of which those of all maps have the proportions; None is
        square. See :meth:`FrozenEncoder.grid_shape`.

    classes : array-like of int or None, default=None
        The labels that pixels may have; None takes those of the masks in `fit`, so that name them
        if folds may lack some. 0 is background and need not be among them.

    mask_size : tuple of two int or None, default=None
        Height and width that masks are learnt in and, unless said otherwise, predicted; None takes
        the most frequent size in `fit`, and warns if there are others. Memory in training grows
        with it, and with the number of classes.

    dropout : float, default=0.1
        Probability of zeroing a number of a patch in training.

    focal_weight : float, default=1.0
        Weight of the focal loss; that of the Dice loss is 1. In [3]_ it is 10.

    gamma : float, default=2.0
        How much less pixels count for the focal loss that are right already; at 0 it is the
        cross-entropy.

    max_epochs : int, default=30
        Passes over the pictures.

    batch_size : int, default=16
        Pictures of a step.

    lr : float, default=0.003
        Learning rate of AdamW.

    weight_decay : float, default=0.001
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to hold pictures back, stop when their loss gets no better, and return to the best.

    validation_fraction : float, default=0.1
        Share of the pictures that early stopping holds back.

    n_iter_no_change : int, default=10
        Epochs without gain after which it stops.

    warm_start : bool, default=False
        Whether `fit` goes on from the weights at hand. The part that early stopping
        holds back is the same if `random_state` is an integer.

    device : str, default="auto"
        Where to train: "auto", "cpu", "cuda", …

    random_state : int, RandomState instance or None, default=None
        Seeds weights, dropout, batches and the part held back.

    verbose : int, default=0
        Above 0, skorch prints a line each epoch.

    skorch_params : dict or None, default=None
        Further options of skorch's net, such as callbacks.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels of pixels, sorted, of the masks' dtype (uint16 of floats); the first is
        background.

    mask_size_ : tuple of int
        Height and width that masks are learnt in.

    n_resized_ : int
        How many masks of other sizes `fit` has brought to that.

    grids_ : list of tuple of int
        Rows and columns of each map, the coarsest first.

    order_ : ndarray of shape (`n_features_in_`,), dtype int
        The columns of `X` in that order.

    weights_ : dict of str to ndarray
        The decoder.

    history_ : list of dict
        For each epoch "train_loss", with early stopping "valid_loss".

    n_iter_ : int
        Number of epochs.

    n_parameters_ : int
        Number of trained parameters.

    structure_ : dict
        What the decoder is made of, as it was in `fit`.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    FrozenEncoder : Makes the tokens.
    CrossAttentionAdaptor : May adapt them first, with ``output="tokens"``.
    sklembed.metrics.dice_score : What `score` is made of.

    Notes
    -----
    A picture's mask depends on that picture alone.

    :func:`~sklearn.model_selection.cross_val_predict` works with ``method="predict"`` only: for
    probabilities it takes `y` for the labels of rows.

    References
    ----------
    .. [1] Zheng et al. Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective
       with Transformers. arXiv 2012.15840.
    .. [2] Ronneberger et al. U-Net. arXiv 1505.04597.
    .. [3] Qin et al. Freeze the Backbones. arXiv 2401.01179, section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import PatchSegmenter
    >>> rng = np.random.default_rng(0)
    >>> coarse = rng.integers(0, 2, size=(60, 4, 4))  # what each of 4 x 4 patches shows
    >>> y = coarse.repeat(4, axis=1).repeat(4, axis=2)  # masks of 16 x 16 pixels
    >>> X = np.empty((60, 1), dtype=object)
    >>> for i in range(60):
    ...     X[i, 0] = coarse[i].reshape(16, 1) * [1, -1, 2] + rng.normal(size=(16, 3))
    >>> segmenter = PatchSegmenter((8, 8), random_state=0).fit(X[:40], y[:40])
    >>> segmenter.predict(X[40:]).shape, segmenter.score(X[40:], y[40:]) > 0.7
    ((20, 16, 16), True)
    """

    _parameter_constraints: dict = {
        "hidden_layer_sizes": ["array-like"],
        "grid_shape": ["array-like", None],
        "classes": ["array-like", None],
        "mask_size": ["array-like", None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "focal_weight": [Interval(Real, 0, None, closed="left")],
        "gamma": [Interval(Real, 0, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "skorch_params": [dict, None],
    }

    def __init__(
        self,
        hidden_layer_sizes=(64, 32, 16),
        *,
        grid_shape=None,
        classes=None,
        mask_size=None,
        dropout=0.1,
        focal_weight=1.0,
        gamma=2.0,
        max_epochs=30,
        batch_size=16,
        lr=3e-3,
        weight_decay=1e-3,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        warm_start=False,
        device="auto",
        random_state=None,
        verbose=0,
        skorch_params=None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.grid_shape = grid_shape
        self.classes = classes
        self.mask_size = mask_size
        self.dropout = dropout
        self.focal_weight = focal_weight
        self.gamma = gamma
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.skorch_params = skorch_params

    @_fit_context(prefer_skip_nested_validation=True)
    @with_callbacks
    def fit(self, X, y):
        """Train the decoder.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens: cells of shape (n_patches, width), row by row of the picture.

        y : sequence of array-like of shape (height, width)
            Masks: whole numbers or booleans, a label for each pixel; 0 is background. Those of
            other than the common size are resized, each pixel taking the label of the nearest.

        Returns
        -------
        self : PatchSegmenter
            The fitted segmenter.

        Raises
        ------
        ValueError
            If a picture is missing, patches make up no grid or not that of the others, a mask is no
            table of whole numbers, has fewer pixels than the grid has patches one way, lies where
            the grid stands, has a label that `classes` does not, or all masks are empty.

        Warns
        -----
        UserWarning
            If masks differ in size and `mask_size` does not say which is meant.
        """
        goes_on = self.warm_start and hasattr(self, "weights_")
        check_layer_sizes(self.hidden_layer_sizes)
        maps = self._read(X, reset=not goes_on)
        masks = self._check_masks(X, y)
        order, grids = self._lay_out(maps)
        classes = self._find_classes(masks, self.classes_ if goes_on else None)
        structure = {
            "grids": grids,
            "widths": [maps[i][0].shape[1] for i in order],
            "hidden_layer_sizes": [int(size) for size in self.hidden_layer_sizes],
            "n_classes": len(classes),
        }
        if goes_on and not (
            structure == self.structure_ and np.array_equal(classes, self.classes_)
        ):
            raise ValueError(
                "The fitted decoder has another structure than is asked for, so training cannot go "
                f"on: {self.structure_} for the classes {self.classes_.tolist()}, not {structure} "
                f"for {classes.tolist()}. Clone the segmenter to start anew."
            )
        if not goes_on:
            vars(self).pop(
                "weights_", None
            )  # so that a fit that fails leaves none of before
        self.order_, self.classes_, self.structure_ = order, classes, structure
        self._find_size(masks, goes_on)
        self._check_patches(maps)
        patches, codes = self._pack(maps), self._encode(masks)
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        _callbacks.begin(self, context, X, y)
        watch = _callbacks.each_epoch(self, context, X, y, _learnt)
        self._train(patches, codes, goes_on, watch)
        _callbacks.end(self, context, X, y)
        return self

    def predict(self, X, sizes=None):
        """Say what each pixel shows.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        sizes : array-like of shape (n_samples, 2) or None, default=None
            Height and width of the mask that each picture is to get; None gives all `mask_size_`.

        Returns
        -------
        masks : ndarray of shape (n_samples, height, width), of the masks' dtype
            Labels of pixels. With `sizes` of shape (n_samples,) and dtype object: an array for each
            picture.

        Raises
        ------
        ValueError
            If a picture is missing, or its patches are not of the grid seen in `fit`.
        """
        check_is_fitted(self, "weights_")
        return self._each(X, sizes, (), self.classes_.dtype, self._decided)

    def predict_proba(self, X, sizes=None):
        """Return how likely each pixel shows each class.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        sizes : array-like of shape (n_samples, 2) or None, default=None
            Height and width of the mask that each picture is to get; None gives all `mask_size_`.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, height, width, n_classes), dtype float32
            The last axis in the order of `classes_`. With `sizes` of shape (n_samples,) and dtype
            object: an array for each picture.

        Raises
        ------
        ValueError
            If a picture is missing, or its patches are not of the grid seen in `fit`.
        """
        check_is_fitted(self, "weights_")
        return self._each(X, sizes, (len(self.classes_),), np.float32, _probabilities)

    def score(self, X, y):
        """Return the mean Dice coefficient, adjusted so that predicting nothing scores 0.

        An empty prediction on an empty mask counts 1, and is no merit of one who never predicts
        anything: see :func:`sklembed.metrics.dice_score`, and take its other figures from there.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        y : sequence of array-like of shape (height, width)
            Masks; each is compared with a prediction of its own size.

        Returns
        -------
        score : float
            1 is perfect, 0 as good as predicting nothing.

        Raises
        ------
        ValueError
            If a label is none of `classes_`, or all masks are empty.
        """
        check_is_fitted(self, "weights_")
        masks = self._check_masks(X, y)
        for row, mask in enumerate(masks):
            self._codes(mask, row)
        predicted = self.predict(X, sizes=[mask.shape for mask in masks])
        return dice_score(masks, predicted, adjusted=True)

    def _read(self, X, *, reset):
        """Return the cells of each column of patches, all pictures there."""
        if not (is_frame(X) or (isinstance(X, np.ndarray) and X.ndim == 2)):
            raise ValueError(
                f"X is a {type(X).__name__}"
                + (f" of shape {X.shape}" if hasattr(X, "shape") else "")
                + "; patches come in a DataFrame or a 2D array, as columns of arrays of shape "
                "(n_patches, width): X = np.empty((n_samples, 1), dtype=object), then fill it."
            )
        X = as_table(X)
        validate_data(self, X, skip_check_array=True, reset=reset)
        names = list(getattr(self, "feature_names_in_", range(X.shape[1])))
        columns = [take_columns(X, [i], scalar=True) for i in range(X.shape[1])]
        holds = token_columns(X)
        if not reset and len(
            holds
        ):  # a column without any image is refused below, by its row
            holds |= [missing_cells(column).all() for column in columns]
        if not (len(holds) and holds.all()):
            wrong = names[int(np.argmin(holds))] if len(holds) else names[0]
            raise ValueError(
                f"Column {wrong!r} of X holds no patches: its first cell should be an array of "
                "shape (n_patches, width), as FrozenEncoder(output='tokens') gives."
            )
        widths = [None] * len(names)
        if not reset:
            widths = [self.structure_["widths"][i] for i in np.argsort(self.order_)]
        maps = []
        for name, column, width in zip(names, columns, widths, strict=True):
            cells = read_tokens(column, name, width)
            lacking = [row for row, cell in enumerate(cells) if cell is None]
            if lacking:
                raise ValueError(
                    f"Row {lacking[0]} has no picture in column {name!r} ({len(lacking)} such "
                    "rows). Leave them out."
                )
            maps.append(cells)
        return maps

    def _check_masks(self, X, y):
        """Return the masks, one for each picture."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None. Give a "
                "mask for each picture."
            )
        check_consistent_length(X, y)
        return check_masks(y)

    def _lay_out(self, maps):
        """Return in which order maps come, and the grid of each."""
        names = getattr(self, "feature_names_in_", range(len(maps)))
        grids = [
            _grid(cells, self.grid_shape, name)
            for name, cells in zip(names, maps, strict=True)
        ]
        order = np.argsort([math.prod(grid) for grid in grids], kind="stable")
        if 0 < len(self.hidden_layer_sizes) < len(maps):
            raise ValueError(
                f"hidden_layer_sizes={self.hidden_layer_sizes} has fewer layers than there are "
                f"maps, {len(maps)}, each of which enters at a layer of its own. Add layers, or "
                "leave all out for a linear map."
            )
        return order, [grids[i] for i in order]

    def _find_classes(self, masks, known):
        """Return the labels that pixels may have, background first."""
        seen = reduce(np.union1d, [np.unique(mask) for mask in masks])
        if not seen.any():
            raise ValueError(
                f"All {len(masks)} masks are empty, 0 throughout, so there is nothing to learn. "
                "Check the step that made them."
            )
        dtype = np.result_type(*{mask.dtype for mask in masks})
        dtype = (
            dtype if dtype.kind in "biu" else np.dtype(np.int64)
        )  # of uint64 beside int64
        if self.classes is not None:
            allowed = np.asarray(column_or_1d(self.classes))
            if allowed.dtype.kind not in "biuf":
                raise ValueError(
                    f"classes must be whole numbers; got {self.classes!r}."
                )
            check_labels_of_pixels(allowed, "classes")
            seen = allowed.astype(np.int64)
        elif known is not None:
            return known
        if (seen.astype(dtype) != seen).any():
            dtype = np.result_type(dtype, np.min_scalar_type(seen.max()))
        classes = np.union1d(seen.astype(dtype), np.zeros(1, dtype=dtype))
        if len(classes) > _MOST_CLASSES:
            raise ValueError(
                f"The masks hold {len(classes)} labels, and {_MOST_CLASSES} are the most. Are they "
                "grey values? Then threshold them."
            )
        return classes

    def _find_size(self, masks, goes_on):
        """Set the size that masks are learnt in."""
        for row, mask in enumerate(masks):
            self._check_fits(mask.shape, f"Row {row} of y")
        sizes = Counter(mask.shape for mask in masks)
        if self.mask_size is not None:
            self.mask_size_ = _check_size(self.mask_size, "mask_size")
            self._check_fits(self.mask_size_, "mask_size")
        elif not goes_on:
            self.mask_size_ = max(sizes, key=lambda size: (sizes[size], size))
        others = [
            row for row, mask in enumerate(masks) if mask.shape != self.mask_size_
        ]
        self.n_resized_ = len(others)
        if others and self.mask_size is None:
            warnings.warn(
                f"The masks are of {len(sizes)} sizes; {len(others)} of {len(masks)}, the first in "
                f"row {others[0]}, are resized to {self.mask_size_}, in which `predict` answers, "
                "unless it is told sizes. Pass mask_size to say that this is meant, and to have "
                "one size in all folds.",
                stacklevel=2,
            )
        self._check_depth()

    def _check_depth(self):
        """Refuse layers that would work on far finer grids than masks have pixels."""
        n_more = len(self.hidden_layer_sizes) - len(self.grids_)
        grid = [2 ** max(n_more, 0) * side for side in self.grids_[-1]]
        if n_more > 0 and all(
            side >= 4 * n for side, n in zip(grid, self.mask_size_, strict=True)
        ):
            raise ValueError(
                f"The last of the {len(self.hidden_layer_sizes)} hidden layers would work on a "
                f"grid of {grid[0]} x {grid[1]}, for masks of {self.mask_size_[0]} x "
                f"{self.mask_size_[1]}: each layer doubles the grid. Leave layers out."
            )

    def _check_patches(self, maps):
        """Refuse pictures of another grid than that of most in fit."""
        for i, grid in zip(self.order_, self.grids_, strict=True):
            for row, cell in enumerate(maps[i]):
                if len(cell) != math.prod(grid):
                    raise ValueError(
                        f"Row {row} has {len(cell)} patches in column {i}, but those of most rows "
                        f"of fit make up a grid of {grid[0]} x {grid[1]}."
                    )

    def _pack(self, maps):
        """Lay the patches of each picture in one row, the coarsest map first."""
        cells = [maps[i] for i in self.order_]
        ends = np.cumsum([0, *(part[0].size for part in cells)])
        packed = np.empty((len(cells[0]), ends[-1]), dtype=np.float32)
        for part, start, end in zip(cells, ends[:-1], ends[1:], strict=True):
            for row, cell in enumerate(part):
                packed[row, start:end] = cell.ravel()
        return packed

    def _encode(self, masks):
        """Return masks as codes of classes, all of one size."""
        codes = np.empty((len(masks), *self.mask_size_), dtype=np.uint8)
        for row, mask in enumerate(masks):
            codes[row] = _nearest(self._codes(mask, row), self.mask_size_)
        return codes

    def _codes(self, mask, row):
        """Return the position of each pixel's label among the classes."""
        codes = np.searchsorted(self.classes_, mask).clip(max=len(self.classes_) - 1)
        unknown = self.classes_[codes] != mask
        if unknown.any():
            raise ValueError(
                f"Row {row} of y holds the label {mask[unknown][0]}, which is none of the classes "
                f"{self.classes_[:10].tolist()}. Pass classes to name those that the masks of fit "
                "may lack, as folds do."
            )
        return codes

    def _check_fits(self, size, what):
        """Refuse masks that cannot be those of pictures with such a grid."""
        (rows, columns), (height, width) = self.grids_[0], size
        if self.mask_size is None and (rows - columns) * (height - width) < 0:
            raise ValueError(
                f"{what} is {'higher' if height > width else 'wider'} than "
                f"{'wide' if height > width else 'high'}, {height} x {width}, but the grid is not, "
                f"{rows} x {columns}. Is the mask transposed, or grid_shape? If pictures are "
                "squashed to the grid, pass mask_size."
            )
        if height < rows or width < columns:
            raise ValueError(
                f"{what} has {height} x {width} pixels for a grid of {rows} x {columns} patches: "
                "the picture is smaller than a patch. Give masks of the pictures' own size."
            )

    def _train(self, patches, codes, goes_on, watch):
        """Train the decoder; with `_each` the only place that needs torch."""
        from sklembed._torch import to_tensor
        from sklembed._training import Rows, Trained, TrainingOptions, train

        seed = draw_seed(self.random_state)
        rows = np.arange(len(patches))
        scaling = _moments(patches, self.structure_)

        def make_module(generator):
            network = self._make_network(generator)
            network.initialize(
                [
                    tuple(to_tensor(m, generator.device) for m in both)
                    for both in scaling
                ]
            )
            return network

        split = Rows(rows)
        if self.early_stopping:
            empty = (codes == 0).all(axis=(1, 2)).astype(np.int64)
            split = Rows(*hold_back(rows, empty, self.validation_fraction, seed))
            if not len(split.valid):
                raise ValueError(
                    f"early_stopping with validation_fraction={self.validation_fraction} leaves "
                    f"nothing to train on of {len(rows)} pictures. Lower it, or switch early "
                    "stopping off."
                )
        trained = train(
            make_module,
            partial(_loss, focal_weight=self.focal_weight, gamma=self.gamma),
            patches,
            codes,
            [split],
            TrainingOptions.of(self, seed),
            start=Trained(self.weights_, self.history_, {}) if goes_on else None,
            on_epoch=watch,
        )
        vars(self).update(_learnt(trained.history, trained.weights))

    def _each(self, X, sizes, more, dtype, finish):
        """Decode each picture at its size; `finish` makes of its logits what is asked for."""
        import torch

        from sklembed._torch import rebuilt
        from sklembed.nn.segmentation import resized

        maps = self._read(X, reset=False)
        self._check_patches(maps)
        n_rows = len(maps[0])
        if sizes is None:
            found = np.empty((n_rows, *self.mask_size_, *more), dtype=dtype)
            sizes = [self.mask_size_] * n_rows
        else:
            found = np.empty(n_rows, dtype=object)
            sizes = [
                _check_size(size, f"Row {row} of sizes")
                for row, size in enumerate(sizes)
            ]
            check_consistent_length(maps[0], sizes)
        network = rebuilt(self._make_network(), self.weights_)
        with torch.inference_mode():
            for rows in gen_batches(
                n_rows, _CHUNK_PICTURES
            ):  # whole, all would be copied
                patches = self._pack([cells[rows] for cells in maps])
                logits = network(torch.from_numpy(patches)[None])[0]
                for row, own in enumerate(logits, start=rows.start):
                    found[row] = finish(resized(own[None], sizes[row])[0])
        return found

    def _decided(self, logits):
        """Return the likeliest label of each pixel."""
        return self.classes_[logits.argmax(dim=0).numpy()]

    def _make_network(self, generator=None):
        """Make the decoder, without weights; on the meta device unless a generator is given."""
        import torch

        from sklembed.nn.segmentation import PatchDecoder

        with torch.device("meta"):
            network = PatchDecoder(
                **self.structure_, dropout=self.dropout, generator=generator
            )
        return (
            network if generator is None else network.to_empty(device=generator.device)
        )

    @property
    def grids_(self):
        """Rows and columns of each map, the coarsest first."""
        return self.structure_["grids"]

    @property
    def n_parameters_(self):
        """Number of trained parameters."""
        return n_trained(self.weights_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _learnt(history, weights):
    """Return the attributes that training leads to."""
    return {"weights_": weights, "history_": history, "n_iter_": len(history)}


def _grid(cells, grid_shape, name):
    """Return rows and columns of most pictures' patches, of the proportions given."""
    n_patches = Counter(len(cell) for cell in cells).most_common(1)[0][0]
    rows, columns = (
        (1, 1) if grid_shape is None else _check_size(grid_shape, "grid_shape")
    )
    times = math.sqrt(n_patches / (rows * columns))
    grid = round(times * rows), round(times * columns)
    if math.prod(grid) != n_patches:
        row = next(row for row, cell in enumerate(cells) if len(cell) == n_patches)
        wanted = (
            "a square"
            if grid_shape is None
            else f"a grid proportioned {rows} : {columns}"
        )
        raise ValueError(
            f"The {n_patches} patches of row {row} of column {name!r} do not make up {wanted}. "
            "Pass the rows and columns as grid_shape; leave class and register tokens out "
            "(special_tokens=False)."
        )
    return grid


def _check_size(size, what):
    """Return height and width as a tuple of positive integers."""
    numbers = tuple(size) if np.iterable(size) else ()
    if len(numbers) != 2 or not all(isinstance(n, Integral) and n > 0 for n in numbers):
        raise ValueError(
            f"{what} should be two positive integers, height and width; got {size}."
        )
    return int(numbers[0]), int(numbers[1])


def _nearest(mask, size):
    """Resize a mask, each pixel taking the label of the nearest."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def _moments(patches, structure):
    """Return mean and scale of the numbers of a patch, for each map."""
    found, start = [], 0
    for grid, width in zip(structure["grids"], structure["widths"], strict=True):
        own = patches[:, start : start + math.prod(grid) * width]
        batches = gen_batches(len(own), _CHUNK_PICTURES)
        found.append(moments(own[rows].reshape(-1, width) for rows in batches))
        start += own.shape[1]
    return found


def _loss(logits, masks, weight, *, focal_weight, gamma):
    """Return the loss of a batch, as of one network, given codes of pixels."""
    from sklembed.nn.losses import dice_loss, focal_loss
    from sklembed.nn.segmentation import resized

    logits, masks = resized(logits[0], masks.shape[2:])[None], masks.long()
    focal = focal_loss(logits, masks, weight, gamma=gamma)
    return focal_weight * focal + dice_loss(logits, masks, weight)


def _probabilities(logits):
    """Return the probability of each class, the classes last."""
    return logits.softmax(dim=0).permute(1, 2, 0).numpy()
