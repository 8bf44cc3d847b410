"""PatchSegmenter: semantic segmentation from frozen patch embeddings."""

import math
import warnings
from collections import Counter
from functools import partial
from numbers import Integral, Real

import numpy as np
from sklearn.base import _fit_context
from sklearn.utils import check_consistent_length, column_or_1d, gen_batches
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed import _callbacks
from sklembed._callbacks import with_callbacks
from sklembed._table.columns import as_table, is_frame, missing_cells, take_columns
from sklembed._table.tokens import read_tokens, token_columns
from sklembed._trained import TrainedEstimator, moments
from sklembed._validation import (
    check_labels_of_pixels,
    check_layer_sizes,
    check_masks,
    draw_seed,
)
from sklembed.metrics import dice_score

_MAX_CLASSES = 256  # codes of pixels are stored as uint8
_CHUNK_IMAGES = 16  # of a forward pass without training


class PatchSegmenter(TrainedEstimator):
    """Semantic segmentation from frozen patch embeddings.

    A lightweight decoder of convolutions and upsampling, as in SETR [1]_, turns the patches of a
    :class:`FrozenEncoder` with ``output="tokens"`` into masks. Several columns of tokens are maps
    of the same images on different grids. A finer map, such as that of an earlier `layer`, is
    concatenated where the decoder reaches its grid, like the skip connections of a U-Net [2]_.
    The loss is the sum of the Dice and the focal loss [3]_.

    Parameters
    ----------
    hidden_layer_sizes : array-like of int, default=(64, 32, 16)
        Channels of the decoder's 3 x 3 convolutions. The first works on the coarsest map. Each
        of the others doubles the grid, or works on the grid of the next finer map. There must be
        at least as many layers as maps. An empty tuple gives a linear map of each patch.

    grid_shape : tuple of two int or None, default=None
        Proportions of the grids of all maps, as rows and columns; None means square. See
        :meth:`FrozenEncoder.grid_shape`.

    classes : array-like of int or None, default=None
        The labels of pixels. None takes those of the masks in `fit`; pass them if folds may lack
        some. Background, 0, is always included.

    mask_size : tuple of two int or None, default=None
        Height and width of the masks in training, and of predictions by default. None takes the
        most frequent size in `fit`, and warns if there are others. Memory in training grows with
        the size and with the number of classes.

    dropout : float, default=0.1
        Dropout probability of the entries of a patch during training.

    focal_weight : float, default=1.0
        Weight of the focal loss; the weight of the Dice loss is 1. In [3]_ it is 10.

    gamma : float, default=2.0
        Focusing parameter of the focal loss: the larger, the less correct pixels count. With 0
        it is the cross-entropy.

    max_epochs : int, default=30
        Number of passes over the training rows.

    batch_size : int, default=16
        Maximum number of rows in a batch. An epoch is split into batches of nearly equal
        size.

    lr : float, default=3e-3
        Learning rate of AdamW.

    weight_decay : float, default=1e-3
        Weight decay of AdamW.

    early_stopping : bool, default=False
        Whether to stop when the loss on a held-out validation set stops improving and
        restore the best weights.

    validation_fraction : float, default=0.1
        Fraction of the training rows in the validation set. Ignored without
        `early_stopping`.

    n_iter_no_change : int, default=10
        Number of epochs without improvement before early stopping.

    warm_start : bool, default=False
        Whether `fit` continues from the weights of the previous fit. The validation set
        stays the same if `random_state` is an integer.

    device : str, default="auto"
        Device to train on: a torch device such as "cpu" or "cuda". "auto" uses an
        accelerator if there is one.

    random_state : int, RandomState instance or None, default=None
        Seeds all random choices, such as the initial weights, dropout and the order of
        rows. Pass an int for reproducible results.

    verbose : int, default=0
        Verbosity. If greater than 0, skorch prints a line for each epoch.

    skorch_params : dict or None, default=None
        Further arguments of :class:`skorch.NeuralNet`, such as ``{"callbacks": [...]}``.
        They override the other parameters.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The sorted labels of pixels, of the dtype of the masks (uint16 for floats). The first is
        background.

    mask_size_ : tuple of int
        Height and width of the masks in training.

    n_resized_ : int
        Number of masks that `fit` has resized to `mask_size_`.

    grids_ : list of tuple of int
        Rows and columns of each map, the coarsest first.

    order_ : ndarray of shape (`n_features_in_`,), dtype int
        The columns of `X` in the order of `grids_`.

    structure_ : dict
        The arguments that determine the shapes of the network.

    weights_ : dict of str to ndarray
        Weights of the decoder.

    n_parameters_ : int
        Number of trained parameters.

    history_ : list of dict
        An entry for each epoch with "train_loss", and "valid_loss" with early stopping.

    n_iter_ : int
        Number of epochs.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column names.

    See Also
    --------
    FrozenEncoder : Computes the patch embeddings.
    CrossAttentionAdaptor : Can adapt patches first, with ``output="tokens"``.
    sklembed.metrics.dice_score : The metric of `score`.

    Notes
    -----
    The mask of an image depends on that image alone.

    :func:`~sklearn.model_selection.cross_val_predict` supports ``method="predict"`` only: for
    probabilities it reads `y` as labels of rows.

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
    >>> labels = rng.integers(0, 2, size=(60, 4, 4))  # of 4 x 4 patches
    >>> y = labels.repeat(4, axis=1).repeat(4, axis=2)  # masks of 16 x 16 pixels
    >>> X = np.empty((60, 1), dtype=object)
    >>> for i in range(60):
    ...     X[i, 0] = labels[i].reshape(16, 1) * [1, -1, 2] + rng.normal(size=(16, 3))
    >>> segmenter = PatchSegmenter((8, 8), random_state=0).fit(X[:40], y[:40])
    >>> segmenter.predict(X[40:]).shape, segmenter.score(X[40:], y[40:]) > 0.7
    ((20, 16, 16), True)
    """

    _parameter_constraints: dict = {
        **TrainedEstimator._parameter_constraints,
        "hidden_layer_sizes": ["array-like"],
        "grid_shape": ["array-like", None],
        "classes": ["array-like", None],
        "mask_size": ["array-like", None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "focal_weight": [Interval(Real, 0, None, closed="left")],
        "gamma": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
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
            Columns of patch tokens: cells of shape (n_patches, width), in row-major order.

        y : sequence of array-like of shape (height, width)
            Masks: integers or booleans, a label for each pixel; 0 is background. Masks of
            another size than `mask_size_` are resized to the label of the nearest pixel.

        Returns
        -------
        self : PatchSegmenter
            The fitted segmenter.

        Raises
        ------
        ValueError
            If an image is missing, the patches do not form a grid or form different grids, a
            mask is not a 2D array of integers, a mask has fewer pixels than the grid has patches
            in one direction, a mask is transposed relative to the grid, a label is not in
            `classes`, or all masks are empty.

        Warns
        -----
        UserWarning
            If masks differ in size and `mask_size` is None.
        """
        resume = self._begin_fit()
        check_layer_sizes(self.hidden_layer_sizes)
        maps = self._read(X, reset=not resume)
        masks = self._check_masks(X, y)
        order, grids = self._find_grids(maps)
        classes = self._find_classes(masks, resume)
        structure = {
            "grids": grids,
            "widths": [maps[i][0].shape[1] for i in order],
            "hidden_layer_sizes": [int(size) for size in self.hidden_layer_sizes],
            "n_classes": len(classes),
        }
        self._set_structure(structure, resume)
        if resume and not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"With warm_start, the classes must be those of the previous fit, "
                f"{self.classes_.tolist()}; got {classes.tolist()}. Clone the segmenter to fit a "
                "new network."
            )
        self.order_, self.classes_ = order, classes
        self._find_mask_size(masks, resume)
        self._check_patches(maps)
        patches, codes = self._pack(maps), self._encode(masks)
        seed = draw_seed(self.random_state)
        is_empty = (codes == 0).all(axis=(1, 2)).astype(np.int64)
        context = self._init_callback_context(max_subtasks=self.max_epochs)
        with _callbacks.task(self, context, X, y):
            self._train_network(
                partial(self._make_network, self._find_scaling(patches)),
                partial(_loss, focal_weight=self.focal_weight, gamma=self.gamma),
                patches,
                codes,
                self._split_rows(np.arange(len(patches)), is_empty, seed),
                seed,
                resume=resume,
                on_epoch=self._report_epochs(context, X, y),
            )
        return self

    def predict(self, X, sizes=None):
        """Return the most probable label of each pixel.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        sizes : array-like of shape (n_samples, 2) or None, default=None
            Height and width of the mask of each image; None means `mask_size_` for all.

        Returns
        -------
        masks : ndarray of shape (n_samples, height, width), of the dtype of the masks
            Labels of pixels. With `sizes`, an array of shape (n_samples,) and dtype object with
            one mask per image.

        Raises
        ------
        ValueError
            If an image is missing, or its patches do not form the grid seen in `fit`.
        """
        check_is_fitted(self)

        def to_labels(logits):
            return self.classes_[logits.argmax(dim=0).numpy()]

        return self._decode(X, sizes, to_labels, (), self.classes_.dtype)

    def predict_proba(self, X, sizes=None):
        """Return the probability of each class for each pixel.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        sizes : array-like of shape (n_samples, 2) or None, default=None
            Height and width of the mask of each image; None means `mask_size_` for all.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, height, width, n_classes), dtype float32
            The last axis is in the order of `classes_`. With `sizes`, an array of shape
            (n_samples,) and dtype object with one array per image.

        Raises
        ------
        ValueError
            If an image is missing, or its patches do not form the grid seen in `fit`.
        """
        check_is_fitted(self)

        def to_probabilities(logits):
            return logits.softmax(dim=0).permute(1, 2, 0).numpy()

        n_classes = len(self.classes_)
        return self._decode(X, sizes, to_probabilities, (n_classes,), np.float32)

    def score(self, X, y):
        """Return the mean Dice coefficient, adjusted so that empty predictions score 0.

        Empty masks predicted as empty score 1; the adjustment removes the credit for always
        predicting background. See :func:`sklembed.metrics.dice_score`.

        Parameters
        ----------
        X : DataFrame or ndarray of dtype object, of shape (n_samples, n_maps)
            Columns of patch tokens, as for `fit`.

        y : sequence of array-like of shape (height, width)
            Masks; each is compared with a prediction of its own size.

        Returns
        -------
        score : float
            1 for perfect predictions, 0 for empty predictions.

        Raises
        ------
        ValueError
            If a label is not in `classes_`, or all masks are empty.
        """
        check_is_fitted(self)
        masks = self._check_masks(X, y)
        for row, mask in enumerate(masks):
            self._codes(mask, row)
        predicted = self.predict(X, sizes=[mask.shape for mask in masks])
        return dice_score(masks, predicted, adjusted=True)

    def _read(self, X, *, reset):
        """Return the cells of each column of patches; no cell is missing."""
        if not (is_frame(X) or (isinstance(X, np.ndarray) and X.ndim == 2)):
            shape = f" of shape {X.shape}" if hasattr(X, "shape") else ""
            raise ValueError(
                f"X is a {type(X).__name__}{shape}; expected a DataFrame or a 2D array with "
                "columns of arrays of shape (n_patches, width): X = np.empty((n_samples, 1), "
                "dtype=object), then fill it."
            )
        X = as_table(X)
        validate_data(self, X, skip_check_array=True, reset=reset)
        names = list(getattr(self, "feature_names_in_", range(X.shape[1])))
        columns = [take_columns(X, [i], scalar=True) for i in range(X.shape[1])]
        self._check_token_columns(X, names, columns, reset)
        widths = [None] * len(names)
        if not reset:
            order = np.argsort(self.order_)
            widths = np.array(self.structure_["widths"])[order].tolist()
        maps = []
        for name, column, width in zip(names, columns, widths, strict=True):
            cells = read_tokens(column, name, width)
            missing = np.flatnonzero([cell is None for cell in cells])
            if len(missing):
                raise ValueError(
                    f"Row {missing[0]} has no image in column {name!r} ({len(missing)} such "
                    "rows). Remove these rows."
                )
            maps.append(cells)
        return maps

    def _check_token_columns(self, X, names, columns, reset):
        """Refuse columns without patches."""
        is_tokens = token_columns(X)
        if not reset and len(is_tokens):
            # A column without any image has an error of its own, which names the row.
            is_tokens |= [missing_cells(column).all() for column in columns]
        if len(is_tokens) and is_tokens.all():
            return
        name = names[int(np.argmin(is_tokens))] if len(is_tokens) else names[0]
        raise ValueError(
            f"Column {name!r} of X has no patches: its first cell should be an array of "
            "shape (n_patches, width), as FrozenEncoder(output='tokens') returns."
        )

    def _check_masks(self, X, y):
        """Return the masks, one for each image."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None. Pass "
                "a mask for each image."
            )
        check_consistent_length(X, y)
        return check_masks(y)

    def _find_grids(self, maps):
        """Return the order of the maps, the coarsest first, and their grids in this order."""
        names = getattr(self, "feature_names_in_", range(len(maps)))
        grids = []
        for name, cells in zip(names, maps, strict=True):
            grids.append(_find_grid(cells, self.grid_shape, name))
        n_patches = [math.prod(grid) for grid in grids]
        order = np.argsort(n_patches, kind="stable")
        if 0 < len(self.hidden_layer_sizes) < len(maps):
            raise ValueError(
                f"hidden_layer_sizes={self.hidden_layer_sizes} has fewer layers than there are "
                f"maps, {len(maps)}, and each map needs a layer. Add layers, or pass an empty "
                "tuple for a linear map."
            )
        return order, [grids[i] for i in order]

    def _find_classes(self, masks, resume):
        """Return the labels of pixels, background first."""
        labels = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
        if not labels.any():
            raise ValueError(
                f"All {len(masks)} masks are empty (0), so nothing can be learned. Check how "
                "they were made."
            )
        dtype = np.result_type(*{mask.dtype for mask in masks})
        if dtype.kind not in "biu":  # uint64 and int64 together give float64
            dtype = np.dtype(np.int64)
        if self.classes is not None:
            classes = np.asarray(column_or_1d(self.classes))
            if classes.dtype.kind not in "biuf":
                raise ValueError(f"classes must be integers; got {self.classes!r}.")
            check_labels_of_pixels(classes, "classes")
            labels = classes.astype(np.int64)
        elif resume:
            return self.classes_
        if (labels.astype(dtype) != labels).any():
            dtype = np.result_type(dtype, np.min_scalar_type(labels.max()))
        classes = np.union1d(labels.astype(dtype), np.zeros(1, dtype=dtype))
        if len(classes) > _MAX_CLASSES:
            raise ValueError(
                f"The masks have {len(classes)} labels; at most {_MAX_CLASSES} are supported. "
                "If they are grey values, apply a threshold."
            )
        return classes

    def _find_mask_size(self, masks, resume):
        """Set the size of masks in training."""
        for row, mask in enumerate(masks):
            self._check_mask_size(mask.shape, f"Row {row} of y")
        sizes = Counter(mask.shape for mask in masks)
        if self.mask_size is not None:
            self.mask_size_ = _check_size(self.mask_size, "mask_size")
            self._check_mask_size(self.mask_size_, "mask_size")
        elif not resume:
            self.mask_size_ = max(sizes, key=lambda size: (sizes[size], size))
        resized = [row for row, m in enumerate(masks) if m.shape != self.mask_size_]
        self.n_resized_ = len(resized)
        if resized and self.mask_size is None:
            warnings.warn(
                f"The masks have {len(sizes)} sizes; {len(resized)} of {len(masks)}, the first in "
                f"row {resized[0]}, are resized to {self.mask_size_}, which is also the size of "
                "predictions unless you pass `sizes`. Set mask_size to silence this warning and "
                "to use one size in all folds.",
                stacklevel=2,
            )
        self._check_depth()

    def _check_mask_size(self, size, name):
        """Refuse masks that do not fit the grid."""
        (rows, columns), (height, width) = self.grids_[0], size
        if self.mask_size is None and (rows - columns) * (height - width) < 0:
            raise ValueError(
                f"{name} has {height} x {width} pixels, but the grid has {rows} x {columns} "
                "patches: one is portrait, the other landscape. Check whether the mask or "
                "grid_shape is transposed. If images are squashed to the grid, pass mask_size."
            )
        if height < rows or width < columns:
            raise ValueError(
                f"{name} has {height} x {width} pixels for a grid of {rows} x {columns} patches: "
                "a pixel would be larger than a patch. Pass masks of the size of the images."
            )

    def _check_depth(self):
        """Refuse layers on grids that are far finer than the masks."""
        n_upsampling = max(len(self.hidden_layer_sizes) - len(self.grids_), 0)
        grid = np.array(self.grids_[-1]) * 2**n_upsampling
        if n_upsampling and (grid >= 4 * np.array(self.mask_size_)).all():
            raise ValueError(
                f"The last of the {len(self.hidden_layer_sizes)} hidden layers would work on a "
                f"grid of {grid[0]} x {grid[1]}, for masks of {self.mask_size_[0]} x "
                f"{self.mask_size_[1]}: each layer doubles the grid. Remove layers."
            )

    def _check_patches(self, maps):
        """Refuse images whose patches do not form the grid."""
        for i, grid in zip(self.order_, self.grids_, strict=True):
            for row, cell in enumerate(maps[i]):
                if len(cell) != math.prod(grid):
                    raise ValueError(
                        f"Row {row} has {len(cell)} patches in column {i}, but the grid of most "
                        f"rows of fit is {grid[0]} x {grid[1]}."
                    )

    def _pack(self, maps):
        """Return the patches of each image in one row, the coarsest map first."""
        ordered = [maps[i] for i in self.order_]
        sizes = [cells[0].size for cells in ordered]
        packed = np.empty((len(maps[0]), sum(sizes)), dtype=np.float32)
        start = 0
        for cells, size in zip(ordered, sizes, strict=True):
            for row, cell in enumerate(cells):
                packed[row, start : start + size] = cell.ravel()
            start += size
        return packed

    def _encode(self, masks):
        """Return masks of class codes, resized to `mask_size_`."""
        codes = np.empty((len(masks), *self.mask_size_), dtype=np.uint8)
        for row, mask in enumerate(masks):
            codes[row] = _resize_nearest(self._codes(mask, row), self.mask_size_)
        return codes

    def _codes(self, mask, row):
        """Return the class code of each pixel."""
        codes = np.searchsorted(self.classes_, mask).clip(max=len(self.classes_) - 1)
        unknown = self.classes_[codes] != mask
        if unknown.any():
            raise ValueError(
                f"Row {row} of y has the label {mask[unknown][0]}, which is not one of the classes "
                f"{self.classes_[:10].tolist()}. Pass all labels as classes if folds may lack "
                "some."
            )
        return codes

    def _find_scaling(self, patches):
        """Return the mean and scale of the entries of a patch, for each map."""
        scaling, start = [], 0
        for grid, width in zip(self.grids_, self.structure_["widths"], strict=True):
            stop = start + math.prod(grid) * width
            batches = gen_batches(len(patches), _CHUNK_IMAGES)
            parts = (patches[rows, start:stop].reshape(-1, width) for rows in batches)
            scaling.append(moments(parts))
            start = stop
        return scaling

    def _decode(self, X, sizes, finish, last_shape, dtype):
        """Decode each image at its size, and apply `finish` to its logits."""
        import torch

        from sklembed._torch import rebuilt
        from sklembed.nn.segmentation import resized

        maps = self._read(X, reset=False)
        self._check_patches(maps)
        n_rows = len(maps[0])
        if sizes is None:
            decoded = np.empty((n_rows, *self.mask_size_, *last_shape), dtype=dtype)
            sizes = [self.mask_size_] * n_rows
        else:
            decoded = np.empty(n_rows, dtype=object)
            sizes = [
                _check_size(size, f"Row {row} of sizes")
                for row, size in enumerate(sizes)
            ]
            check_consistent_length(maps[0], sizes)
        network = rebuilt(self._empty_network(), self.weights_)
        with torch.inference_mode():
            # Packing copies patches, so images are packed in small batches.
            for rows in gen_batches(n_rows, _CHUNK_IMAGES):
                patches = self._pack([cells[rows] for cells in maps])
                logits = network(torch.from_numpy(patches))
                for row, logits_of_row in enumerate(logits, start=rows.start):
                    logits_of_row = resized(logits_of_row[None], sizes[row])[0]
                    decoded[row] = finish(logits_of_row)
        return decoded

    def _make_network(self, scaling, generator):
        """Return the decoder, with weights drawn from the generator."""
        from sklembed._torch import to_tensors

        network = self._empty_network(generator).to_empty(device=generator.device)
        network.initialize(to_tensors(scaling, generator.device))
        return network

    def _empty_network(self, generator=None):
        """Return the decoder on the meta device, without weights."""
        import torch

        from sklembed.nn.segmentation import PatchDecoder

        with torch.device("meta"):
            return PatchDecoder(
                **self.structure_, dropout=self.dropout, generator=generator
            )

    @property
    def grids_(self):
        """Rows and columns of each map, the coarsest first."""
        return self.structure_["grids"]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _find_grid(cells, grid_shape, name):
    """Return rows and columns of the most frequent number of patches."""
    n_patches = Counter(len(cell) for cell in cells).most_common(1)[0][0]
    rows, columns, proportions = 1, 1, "a square"
    if grid_shape is not None:
        rows, columns = _check_size(grid_shape, "grid_shape")
        proportions = f"a grid of proportions {rows} : {columns}"
    factor = math.sqrt(n_patches / (rows * columns))
    grid = round(factor * rows), round(factor * columns)
    if math.prod(grid) != n_patches:
        row = next(row for row, cell in enumerate(cells) if len(cell) == n_patches)
        raise ValueError(
            f"The {n_patches} patches of row {row} of column {name!r} do not form {proportions}. "
            "Pass the rows and columns as grid_shape, and exclude class and register tokens."
        )
    return grid


def _check_size(size, name):
    """Return height and width as a tuple of positive integers."""
    numbers = tuple(size) if np.iterable(size) else ()
    if len(numbers) != 2 or not all(isinstance(n, Integral) and n > 0 for n in numbers):
        raise ValueError(
            f"{name} should be two positive integers, height and width; got {size}."
        )
    return int(numbers[0]), int(numbers[1])


def _resize_nearest(mask, size):
    """Resize a mask to the labels of the nearest pixels."""
    if mask.shape == size:
        return mask
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(np.intp)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(np.intp)
    return mask[rows[:, None], columns]


def _loss(logits, masks, weight, *, focal_weight, gamma):
    """Return the loss of a batch, given class codes of pixels."""
    from sklembed.nn.losses import dice_loss, focal_loss
    from sklembed.nn.segmentation import resized

    logits, masks = resized(logits, masks.shape[1:]), masks.long()
    focal = focal_loss(logits, masks, weight, gamma=gamma)
    return focal_weight * focal + dice_loss(logits, masks, weight)
