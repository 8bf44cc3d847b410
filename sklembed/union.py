"""PerModalityUnion: one branch for each modality of a table, concatenated."""

import contextlib
import warnings
from collections import Counter, defaultdict
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context, clone
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectorMixin
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    OrdinalEncoder,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.utils import Bunch, get_tags
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    process_routing,
)
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._display import DocLinkMixin
from sklembed._table.columns import (
    as_pandas,
    as_table,
    column_positions,
    empty_as_objects,
    holds_objects,
    is_frame,
    missing_as_nan,
    missing_cells,
    missing_dates,
    output_container,
    take_columns,
    take_rows,
)
from sklembed._table.tokens import token_columns
from sklembed._validation import check_routing_enabled

_MISSING_ROWS = ("auto", "skip", "pass", "error")
# The dense copy of a sparse output is copied once more, into the joined table. Half a
# GiB is a million rows of 64 columns. Larger copies should be an explicit decision.
_LARGEST_DENSE_OUTPUT = 2**29
# These ignore NaN in fit and return it in transform.
_KEEP_MISSING = (
    MaxAbsScaler,
    MinMaxScaler,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SelectorMixin,
    StandardScaler,
)


class PerModalityUnion(
    DocLinkMixin, CallbackSupportMixin, TransformerMixin, BaseEstimator
):
    """Apply a transformer to each modality of a table and concatenate the outputs.

    A branch is a transformer, often a pipeline of an encoder and a projector, with the
    columns that it reads, as in :class:`~sklearn.compose.ColumnTransformer`. Its output
    is a *block*: contiguous columns of the joined table, named ``<branch>__…``.

    A modality is missing in a row if all cells that the branch reads are None or NaN.
    Transformers that handle missing values, such as imputers and one-hot encoders,
    receive these rows, as in :class:`~sklearn.compose.ColumnTransformer`. Other
    transformers, such as encoders, projectors and PCA, do not receive them in fit or
    transform, and the block is NaN in these rows. The parameter `missing_rows`
    overrides this for each branch. XGBoost and
    :class:`~sklearn.ensemble.HistGradientBoostingClassifier` accept NaN; put a
    :class:`~sklearn.impute.SimpleImputer` before other classifiers.

    A branch may also return tokens, as ``FrozenEncoder(output="tokens")`` does: one
    object column whose cells are float arrays of shape (n_tokens, n_features), and None
    where the modality is missing. Only a DataFrame can contain both tokens and numbers:
    call ``set_output(transform="pandas")``.

    Parameters
    ----------
    transformers : list of (str, transformer, columns) tuples
        The branches. A name must not contain ``__``. It is used to set parameters, as
        in ``set_params(text__frozenencoder__normalize=True)``, and to replace the
        branch. "passthrough" passes the columns through unchanged, "drop" omits the
        branch. Columns are a name, a position, a list or slice of these, a boolean mask
        or a callable that takes the table. A single name or position is passed to the
        transformer as a one-dimensional column. A branch without columns is skipped.

    remainder : {"drop", "passthrough"} or transformer, default="drop"
        Treatment of the columns that no branch selects. "passthrough" or a transformer
        makes them a last branch, called "remainder". `fit` determines these columns,
        which do not include the columns of a branch that is "drop".

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    transformer_weights : dict of str to float or None, default=None
        Factor by which the block of each branch is multiplied, also if its cells are
        tokens. The default factor of a branch is 1.

    add_indicator : bool, default=False
        Whether to add a last block, "missing", with one column for each branch: 1 where
        the modality is missing, 0 elsewhere.

    missing_rows : {"auto", "skip", "pass", "error"} or dict of str to these, default="auto"
        Treatment of rows in which the modality of a branch is missing. A dict sets it
        for single branches; the default of a branch is "auto".

        - "auto": "pass" if the transformer handles missing values, "skip" otherwise. A
          transformer handles them if its tag ``input_tags.allow_nan`` is true and it
          does not merely return NaN for NaN, as scalers, feature selectors and encoders
          do. A pipeline handles them if one of its steps does and all earlier steps
          accept NaN.
        - "skip": the transformer does not receive these rows, and their block is NaN.
        - "pass": the transformer receives all rows, with NaN for None in object
          columns.
        - "error": raise an error that names the branch, before any branch is run.

    keep_unobserved : bool, default=False
        Whether to keep a branch whose modality is missing in all rows of fit, as a
        block of NaN, instead of raising an error. The block has as many columns as the
        transformer can name before fit, otherwise one. In transform it is NaN for all
        rows, with a warning if the modality is observed in some.

    Attributes
    ----------
    transformers_ : list of (str, transformer, columns) tuples
        The fitted branches without dropped ones; the remainder is the last. The
        transformer of a branch without columns or in `unobserved_` is not fitted.

    named_transformers_ : :class:`~sklearn.utils.Bunch`
        The fitted transformers by name of the branch.

    blocks_ : dict of str to slice
        The output columns of each branch, and of the indicator.

    holds_tokens_ : dict of str to bool
        Whether the block is a column of tokens.

    unobserved_ : list of str
        The branches whose modality was missing in all rows of fit, see
        `keep_unobserved`.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    sklearn.compose.ColumnTransformer : Passes all rows to each transformer.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklembed import CallableBackend, FrozenEncoder, PerModalityUnion
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> lengths = CallableBackend(
    ...     load, name="lengths", version="1", modality="text", n_features=2
    ... )
    >>> X = pd.DataFrame({"note": ["a red cat", None, "blue"], "size": [1.0, 2.0, None]})
    >>> union = PerModalityUnion([
    ...     ("text", FrozenEncoder(lengths, store=None), "note"),
    ...     ("table", StandardScaler(), ["size"]),
    ... ]).set_output(transform="pandas")
    >>> union.fit_transform(X)
       text__frozenencoder0  text__frozenencoder1  table__size
    0                   9.0                   2.0         -1.0
    1                   NaN                   NaN          1.0
    2                   4.0                   0.0          NaN
    """

    _parameter_constraints: dict = {
        "transformers": [list],
        "remainder": [
            StrOptions({"drop", "passthrough"}),
            HasMethods(["fit", "transform"]),
        ],
        "n_jobs": [Integral, None],
        "transformer_weights": [dict, None],
        "add_indicator": ["boolean"],
        "missing_rows": [StrOptions(set(_MISSING_ROWS)), dict],
        "keep_unobserved": ["boolean"],
    }

    def __init__(
        self,
        transformers,
        *,
        remainder="drop",
        n_jobs=None,
        transformer_weights=None,
        add_indicator=False,
        missing_rows="auto",
        keep_unobserved=False,
    ):
        self.transformers = transformers
        self.remainder = remainder
        self.n_jobs = n_jobs
        self.transformer_weights = transformer_weights
        self.add_indicator = add_indicator
        self.missing_rows = missing_rows
        self.keep_unobserved = keep_unobserved

    def get_params(self, deep=True):
        """Get the parameters of the union and, if deep, of its branches.

        Parameters
        ----------
        deep : bool, default=True
            Whether to include the branches and their parameters.

        Returns
        -------
        params : dict
            Parameter names mapped to their values.
        """
        params = super().get_params(deep=False)
        if not deep:
            return params
        for name, (transformer, _) in self._all_branches().items():
            params[name] = transformer
            if hasattr(transformer, "get_params"):
                for key, value in transformer.get_params(deep=True).items():
                    params[f"{name}__{key}"] = value
        return params

    def set_params(self, **params):
        """Set parameters of the union, replace branches, or set parameters within them.

        If the union is fitted, parameters within a branch are also set on its fitted
        transformer, so that they take effect in `transform`. After a branch is
        replaced, `transform` raises an error until `fit` is called again.

        Parameters
        ----------
        **params : dict
            For example ``n_jobs=2``, ``image="drop"``, ``text__pca__n_components=64``
            or ``remainder__with_mean=False``.

        Returns
        -------
        self : PerModalityUnion
            The union.
        """
        branches = self._all_branches()
        within = _params_within_branches(params, self.get_params(deep=True))
        if "transformers" in params:
            self.transformers = params.pop("transformers")
        if self._all_branches().keys() & (params.keys() - {"remainder"}):
            self.transformers = [
                (name, params.pop(name, transformer), columns)
                for name, transformer, columns in self.transformers
            ]
        super().set_params(**params)
        if hasattr(self, "transformers_"):
            self._set_fitted_params(within, branches)
        return self

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)  # branches validate themselves
    def fit(self, X, y=None, **params):
        """Fit each branch, on the rows that `missing_rows` selects.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Targets.

        **params : dict
            Metadata for the branches. Requires
            ``sklearn.set_config(enable_metadata_routing=True)``. Metadata with one
            entry per row is restricted to the rows of each branch.

        Returns
        -------
        self : PerModalityUnion
            The fitted union.

        Raises
        ------
        ValueError
            If a selected column does not exist, a branch name or a weight is invalid, a
            modality is missing in all rows or in a row where `missing_rows` requires
            it, or the sparse output of a branch is too large for a dense array.
        """
        self._fit_branches(_fit_branch, "fit", X, y, params)
        return self

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)
    def fit_transform(self, X, y=None, **params):
        """Fit each branch and join the outputs of its `fit_transform`.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Targets.

        **params : dict
            Metadata for the branches, as for `fit`.

        Returns
        -------
        blocks : ndarray or DataFrame of shape (n_samples, n_features_out)
            The joined blocks, NaN where a modality is missing. If all blocks are
            tokens, an ndarray of dtype object, None where a modality is missing.

        Raises
        ------
        ValueError
            As in `fit`, or if the output container cannot contain tokens: it is polars,
            or it is not pandas and other blocks are numbers.
        TypeError
            If a branch returns neither numbers nor tokens.
        """
        outputs, parts, X = self._fit_branches(
            _fit_transform_branch, "fit_transform", X, y, params
        )
        return self._join(outputs, parts, X)

    def transform(self, X, **params):
        """Run each branch, on the rows that `missing_rows` selects, and join the outputs.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table. Columns that were selected by name may be in any order.

        **params : dict
            Metadata for the branches, as for `fit`.

        Returns
        -------
        blocks : ndarray or DataFrame of shape (n_samples, n_features_out)
            The joined blocks, NaN where a modality is missing. If all blocks are
            tokens, an ndarray of dtype object, None where a modality is missing.

        Raises
        ------
        ValueError
            As in `fit`, if `set_params` replaced a branch after fit, or if the output
            container cannot contain tokens: it is polars, or it is not pandas and other
            blocks are numbers.
        TypeError
            If a branch returns neither numbers nor tokens.
        """
        check_is_fitted(self)
        check_routing_enabled(params, self)
        self._check_not_replaced()
        self._check_by_branch()
        routed = process_routing(self, "transform", **params)
        X = as_table(X)
        if not (is_frame(X) and hasattr(self, "feature_names_in_")):
            validate_data(self, X, reset=False, skip_check_array=True)
        parts = []
        for part in self._parts(X, self.transformers_):
            cells = empty_as_objects(part.cells, self._objects[part.name])
            parts.append(part._replace(cells=cells))
        self._warn_about_unobserved(parts)
        calls = {}
        for part in parts:
            if len(part.rows) and part.name not in self.unobserved_:
                metadata = _cut_to_rows(routed[part.name], part)
                call = delayed(_run_branch)(_transform_branch, part, metadata)
                calls[part.name] = call
        return self._join(self._run(calls, parts, "transform"), parts, X)

    def iter_parts(self, X):
        """Yield the part of a table that fit passes to each branch.

        The union need not be fitted.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        Yields
        ------
        name : str
            Name of the branch; the remainder is the last. Branches that fit does not
            run are omitted: dropped branches, and those without columns or observed
            rows.

        transformer : transformer or "passthrough"
            Its transformer, not fitted.

        part : DataFrame, Series or ndarray
            The columns that it reads, of the rows with the modality, or of all rows if
            the transformer handles missing values.
        """
        X = as_table(X)
        for part in self._parts(X, self._branches(X)):
            if len(part.observed):
                yield part.name, part.transformer, part.cells

    @property
    def named_transformers_(self):
        """The fitted transformers by name of the branch."""
        return Bunch(**{name: fitted for name, fitted, _ in self.transformers_})

    def get_feature_names_out(self, input_features=None):
        """Get output feature names: ``<branch>__<name>`` and ``missing__<branch>``.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns. None means those seen during fit.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The output feature names. Columns of a branch without feature names are
            numbered.
        """
        check_is_fitted(self)
        names_in = getattr(self, "feature_names_in_", input_features)
        if names_in is None:
            names_in = self._input_names()
        if input_features is not None and (
            len(input_features) != self.n_features_in_
            or list(input_features) != list(names_in)
        ):
            raise ValueError(
                f"input_features must equal the {self.n_features_in_} columns seen in "
                f"fit; got {list(input_features)}."
            )
        names, indicator_names = [], []
        for name, transformer, columns in self.transformers_:
            if not _selects(columns):
                continue
            indicator_names.append(f"missing__{name}")
            width = _width_of(self.blocks_[name])
            columns_out = _feature_names(transformer, _names_of(columns, names_in))
            if columns_out is None or len(columns_out) != width:
                columns_out = range(width)
            names += [f"{name}__{column}" for column in columns_out]
        if self._has_indicator:
            names += indicator_names
        return np.asarray(names, dtype=object)

    def get_metadata_routing(self):
        """Get the metadata routing of the branches.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        router = MetadataRouter(owner=self)
        for name, (transformer, _) in self._all_branches().items():
            transformer = _as_transformer(transformer)
            mapping = MethodMapping().add(caller="fit", callee="fit")
            if hasattr(transformer, "fit_transform"):
                mapping.add(caller="fit_transform", callee="fit_transform")
            else:
                mapping.add(caller="fit_transform", callee="fit")
                mapping.add(caller="fit_transform", callee="transform")
            mapping.add(caller="transform", callee="transform")
            router.add(method_mapping=mapping, **{name: transformer})
        return router

    def _fit_branches(self, run, caller, X, y, params):
        """Fit all branches; return outputs by name, parts, and the table."""
        check_routing_enabled(params, self)
        self._check_transformers()
        self._check_by_branch()
        routed = process_routing(self, caller, **params)
        X = as_table(X)
        validate_data(self, X, skip_check_array=True)
        check_consistent_length(X, y)
        branches = self._branches(X)
        if not branches:
            raise ValueError(
                "All branches are 'drop'; keep at least one, or set remainder."
            )
        parts = []
        for part in self._parts(X, branches):
            transformer = clone(_as_transformer(part.transformer))
            parts.append(part._replace(transformer=transformer))
        self.unobserved_ = self._check_unobserved(parts)
        observed_parts = [part for part in parts if len(part.observed)]
        context = self._init_callback_context(
            max_subtasks=len(observed_parts), sequential_subtasks=False
        )
        _callbacks.begin(self, context, X, y)
        calls = {}
        for number, part in enumerate(observed_parts):
            y_part = None if y is None else take_rows(y, part.rows)
            metadata = _cut_to_rows(routed[part.name], part)
            task = _callbacks.subtask(context, f"fit-{part.name}", 0, task_id=number)
            calls[part.name] = delayed(_run_branch)(
                _fit_with_callbacks, part, y_part, metadata, run, self, task
            )
        results = self._run(calls, parts, caller)
        for part in parts:
            if part.name not in results:
                results[part.name] = _unfitted_result(part, self._input_names())
        self._set_results(parts, results)
        _callbacks.end(self, context, X, y)
        outputs = {name: result.output for name, result in results.items()}
        return outputs, parts, X

    def _set_results(self, parts, results):
        """Set the fitted attributes that describe the branches and their blocks."""
        # _objects: in transform, a column without any value gets its dtype of fit.
        self.transformers_, self.holds_tokens_, self._objects = [], {}, {}
        widths, n_selecting = {}, 0
        for part in parts:
            result = results[part.name]
            self.transformers_.append((part.name, result.transformer, part.columns))
            self.holds_tokens_[part.name] = result.holds_tokens
            self._objects[part.name] = None
            widths[part.name] = result.width
            if _selects(part.columns):
                self._objects[part.name] = holds_objects(part.cells)
                n_selecting += 1
        if self.add_indicator:
            self.holds_tokens_["missing"] = False
            widths["missing"] = n_selecting
        self.blocks_ = _side_by_side(widths)
        self._replaced = []

    def _run(self, calls, parts, caller):
        """Run delayed calls of branches; return their results by name.

        Encoders, and transformers trained on their vectors, are run last. They may take
        hours where others take seconds, so invalid input of the others should fail
        first. Encoders of the same column may share the passes through a model.
        """
        cheap, costly, encoding_parts = {}, {}, []
        for part in parts:
            if part.name not in calls:
                continue
            if _is_costly(part.transformer):
                costly[part.name] = calls[part.name]
                encoding_parts.append(part)
            else:
                cheap[part.name] = calls[part.name]
        results = dict(zip(cheap, self._run_parallel(cheap), strict=True))
        _encode_jointly(encoding_parts, caller)
        return results | dict(zip(costly, self._run_parallel(costly), strict=True))

    def _run_parallel(self, calls):
        return Parallel(n_jobs=self.n_jobs)(calls.values())

    def _all_branches(self):
        """Return the transformer and the columns of each branch by name.

        The remainder, which has no columns before fit, is the last.
        """
        branches = {}
        if _are_branches(self.transformers):
            for name, transformer, columns in self.transformers:
                branches[name] = transformer, columns
        return branches | {"remainder": (self.remainder, None)}

    def _branches(self, X):
        """List the branches to run, the remainder last, with their columns resolved."""
        branches = list(self.transformers)
        if not is_dropped(self.remainder):
            columns = _remaining_columns(X, branches)
            if columns:
                branches.append(("remainder", self.remainder, columns))
        resolved = []
        for name, transformer, columns in branches:
            if not is_dropped(transformer):
                flat = not _is_passthrough(transformer)
                columns = _resolve(X, name, columns, flat=flat)
                resolved.append((name, transformer, columns))
        return resolved

    def _parts(self, X, branches):
        """List the part of the table that each branch receives."""
        parts = []
        for name, transformer, columns in branches:
            if not _selects(columns):
                empty = np.array([], dtype=np.intp)
                part = _Part(name, transformer, columns, None, empty, empty, len(X))
                parts.append(part)
                continue
            cells = _select(X, name, columns)
            rows = observed = np.flatnonzero(~_missing_rows(cells))
            treatment = self._treatment(name, transformer)
            if treatment == "error" and len(observed) < len(X):
                raise _missing_modality_error(name, columns, observed, len(X))
            if treatment == "pass":
                rows = np.arange(len(X))
                if _is_of_sklearn(transformer):
                    # It reads polars as an array, in which a missing text is None.
                    cells = as_pandas(cells)
                cells = missing_as_nan(cells)
            else:
                cells = take_rows(cells, rows)
            _check_dates(name, transformer, cells)
            part = _Part(name, transformer, columns, cells, rows, observed, len(X))
            parts.append(part)
        return parts

    def _treatment(self, name, transformer):
        """Return how a branch treats missing rows: "skip", "pass" or "error"."""
        setting = self.missing_rows
        if isinstance(setting, dict):
            setting = setting.get(name, "auto")
        if setting != "auto":
            return setting
        reaction = reaction_to_nan(transformer)
        return "pass" if reaction is not None and reaction.handles else "skip"

    def _check_unobserved(self, parts):
        """Return the branches without any observed row; refuse them unless allowed."""
        unobserved = []
        for part in parts:
            if len(part.observed) or not _selects(part.columns):
                continue
            if not self.keep_unobserved:
                raise ValueError(
                    f"Branch {part.name!r} has nothing to learn from: column "
                    f"{part.columns!r} is missing in all {part.n_rows} rows. Check the "
                    "column, drop the branch, or set keep_unobserved=True to keep it "
                    "as a block of NaN."
                )
            unobserved.append(part.name)
        return unobserved

    def _warn_about_unobserved(self, parts):
        """Warn if a modality that was missing in all rows of fit is observed."""
        n_observed = {}
        for part in parts:
            if part.name in self.unobserved_ and len(part.observed):
                n_observed[part.name] = len(part.observed)
        if n_observed:
            warnings.warn(
                f"The modalities of the branches {list(n_observed)} were missing in "
                "all rows of fit, so their blocks are NaN, but now they are observed "
                f"in up to {max(n_observed.values())} rows. Fit again on rows that "
                "have them, or set the branches to 'drop'.",
                UserWarning,
                stacklevel=4,
            )

    def _set_fitted_params(self, within, before):
        """Set parameters on the fitted branches, and record the replaced branches."""
        after = self._all_branches()
        for name in before | after:
            is_same = _is_same_branch(before.get(name), after.get(name))
            if not is_same and name not in self._replaced:
                self._replaced = [*self._replaced, name]
        for name, transformer, _ in self.transformers_:
            if within[name] and name not in self._replaced:
                transformer.set_params(**within[name])

    def _check_not_replaced(self):
        """Refuse to run if branches were replaced after fit."""
        if self._replaced:
            raise ValueError(
                f"The branches {self._replaced} were replaced by set_params after fit, "
                "so the fitted branches are out of date. Call fit again."
            )

    def _check_transformers(self):
        """Refuse invalid lists of branches, transformers and names."""
        if not self.transformers:
            raise ValueError(
                "transformers is empty; pass at least one (name, transformer, columns)."
            )
        if not _are_branches(self.transformers):
            raise ValueError(
                "transformers must be a list of tuples (name, transformer, columns); got "
                f"{self.transformers!r}."
            )
        for name, transformer, _ in self.transformers:
            if is_dropped(transformer):
                continue
            if not hasattr(_as_transformer(transformer), "transform"):
                raise TypeError(
                    f"Branch {name!r} needs a transformer, 'passthrough' or 'drop'; "
                    f"got {transformer!r}."
                )
        self._check_names([name for name, _, _ in self.transformers])

    def _check_names(self, names):
        """Refuse names of branches that are ambiguous."""
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(
                    f"Branch names must be unique, but {name!r} occurs {count} times."
                )
            if not isinstance(name, str) or not name or "__" in name:
                raise ValueError(
                    "A branch name must be a string without '__', which separates the "
                    f"branch from its columns; got {name!r}."
                )
            if name in self.get_params(deep=False):
                raise ValueError(
                    f"{name!r} is a parameter of the union; use another branch name."
                )
            if name == "missing" and self.add_indicator:
                raise ValueError(
                    "'missing' is the block that add_indicator adds; use another "
                    "branch name."
                )

    def _check_by_branch(self):
        """Refuse settings of unknown branches, and invalid values."""
        names = list(self._all_branches())
        settings = {}
        if isinstance(self.missing_rows, dict):
            settings = self.missing_rows
        for name, setting in settings.items():
            if name not in names:
                raise ValueError(
                    f"missing_rows has a setting for {name!r}, but the branches are "
                    f"{names}."
                )
            if setting not in _MISSING_ROWS:
                raise ValueError(
                    f"missing_rows must be one of {list(_MISSING_ROWS)}; got "
                    f"{setting!r} for branch {name!r}."
                )
        for name, weight in (self.transformer_weights or {}).items():
            if name not in names:
                raise ValueError(
                    f"transformer_weights has a weight for {name!r}, but the branches "
                    f"are {names}."
                )
            if not (isinstance(weight, Real) and 0 <= weight < np.inf):
                raise ValueError(
                    "A weight must be a finite number that is not negative; got "
                    f"{weight!r} for branch {name!r}."
                )

    def _join(self, outputs, parts, X):
        """Scatter the rows of each branch into its block, and weight the block."""
        tokens = []
        for part in parts:
            # In fit, all cells may have had no tokens, as damaged images have none.
            if self.holds_tokens_[part.name] or _holds_tokens(outputs.get(part.name)):
                tokens.append(part.name)
        self._check_container(tokens)
        arrays, dtypes = {}, []
        for part in parts:
            name, output = part.name, outputs.get(part.name)
            if output is not None:
                width = _width_of(self.blocks_[name])
                arrays[name] = _as_array(output, part, width, name in tokens)
                if name not in tokens:
                    dtypes.append(arrays[name].dtype)
        n_columns = max(block.stop for block in self.blocks_.values())
        dtype = np.result_type(*dtypes) if dtypes else np.float64
        joined = np.full((len(X), n_columns), np.nan, dtype=dtype)
        blocks = {}
        for name, block in self.blocks_.items():
            if name in tokens:
                blocks[name] = np.full((len(X), 1), None, dtype=object)
            elif _width_of(block):
                blocks[name] = joined[:, block]
        weights = self.transformer_weights or {}
        for part in parts:
            if part.name in arrays:
                weight = float(weights.get(part.name, 1))
                _fill(blocks[part.name], arrays[part.name], part.rows, weight)
        if self._has_indicator and "missing" in blocks:
            blocks["missing"][:] = _indicator(parts, len(X))
        if tokens and len(tokens) == len(blocks):
            return np.hstack(list(blocks.values()))
        if tokens:
            joined = pd.DataFrame(joined, index=getattr(X, "index", None), copy=False)
            for name in tokens:
                joined.isetitem(self.blocks_[name].start, blocks[name][:, 0])
        return joined

    def _check_container(self, tokens):
        """Refuse an output container that does not support tokens of these branches."""
        if not tokens:
            return
        container = output_container(self)
        if container == "polars":
            raise ValueError(
                f"Branches {tokens} return tokens, object columns of arrays of "
                "different lengths, which polars does not support. Use "
                "set_output(transform='pandas')."
            )
        numeric = []
        for name, block in self.blocks_.items():
            if _width_of(block) and name not in tokens:
                numeric.append(name)
        if numeric and container != "pandas":
            raise ValueError(
                f"Branches {tokens} return tokens and {numeric} return numbers, and "
                "only a DataFrame can contain both. Call "
                "set_output(transform='pandas') on the union or its pipeline, or use "
                "one union for tokens and one for numbers."
            )

    def _input_names(self):
        """Return the names of the columns seen in fit, or x0, x1, … without names."""
        default = [f"x{i}" for i in range(self.n_features_in_)]
        return getattr(self, "feature_names_in_", default)

    @property
    def _has_indicator(self):
        """Whether fit added the indicator; the parameter may have changed since."""
        return len(self.blocks_) > len(self.transformers_)

    def _sk_visual_block_(self):
        """Return the diagram of a ColumnTransformer with the same branches."""
        branches, remainder = self.transformers, self.remainder
        if hasattr(self, "transformers_"):  # these include the remainder
            branches, remainder = self.transformers_, "drop"
        return ColumnTransformer(branches, remainder=remainder)._sk_visual_block_()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        # Every branch receives rows in which only some cells are missing.
        tags.input_tags.allow_nan = True
        for transformer, _ in self._all_branches().values():
            if not is_dropped(transformer) and reaction_to_nan(transformer) is None:
                tags.input_tags.allow_nan = False
        return tags


class _Part(NamedTuple):
    """The part of a table that a branch receives, and the rows with its modality."""

    name: str
    transformer: Any
    columns: Any
    cells: Any  # the columns, of these rows:
    rows: np.ndarray
    observed: np.ndarray
    n_rows: int  # of the table


class _Fitted(NamedTuple):
    """A fitted branch, its output for the training rows, and the form of its block."""

    transformer: Any
    output: Any
    width: int
    holds_tokens: bool


class _Reaction(NamedTuple):
    """The output of a transformer that accepts rows of NaN."""

    handles: bool  # at least some columns are not NaN
    keeps: bool  # some columns may be NaN


_KEEPS = _Reaction(handles=False, keeps=True)
_FILLS = _Reaction(handles=True, keeps=False)


def reaction_to_nan(transformer):
    """Return the reaction of a transformer to rows of NaN; None if it refuses them."""
    if transformer is None or _is_passthrough(transformer):
        return _KEEPS
    if isinstance(transformer, Pipeline):
        return _reaction_in_sequence(transformer.steps)
    if isinstance(transformer, PerModalityUnion):
        return _reaction_of_union(transformer)
    if isinstance(transformer, FeatureUnion):
        return _reaction_side_by_side(dict(transformer.transformer_list).values())
    if isinstance(transformer, ColumnTransformer):
        inner = [inner for _, inner, _ in transformer.transformers]
        return _reaction_side_by_side([*inner, transformer.remainder])
    if isinstance(transformer, FunctionTransformer):
        # Whether the function fills NaN is unknown.
        return None if transformer.validate else _KEEPS
    if _keeps_missing_rows(transformer):
        return _KEEPS
    if not hasattr(transformer, "__sklearn_tags__"):
        return None
    if not get_tags(transformer).input_tags.allow_nan:
        wrapped = _wrapped_estimators(transformer)
        return _reaction_side_by_side(wrapped) if wrapped else None
    if isinstance(transformer, OrdinalEncoder):
        keeps = bool(pd.isna(transformer.encoded_missing_value))
        return _Reaction(handles=True, keeps=keeps)
    return _KEEPS if isinstance(transformer, _KEEP_MISSING) else _FILLS


def _reaction_in_sequence(steps):
    """Return the reaction of a pipeline, up to the first step that leaves no NaN."""
    handles = False
    for _, step in steps:
        reaction = reaction_to_nan(step)
        if reaction is None:
            return None
        handles = handles or reaction.handles
        if not reaction.keeps:
            return _FILLS
    return _Reaction(handles, keeps=True)


def _reaction_side_by_side(transformers):
    """Return the joint reaction of transformers that each receive the rows."""
    reactions = []
    for transformer in transformers:
        if not is_dropped(transformer):
            reactions.append(reaction_to_nan(transformer))
    return _joint_reaction(reactions)


def _reaction_of_union(union):
    """Return the reaction of a nested union, whose branches may skip rows of NaN."""
    reactions = []
    for name, (transformer, _) in union._all_branches().items():
        if is_dropped(transformer):
            continue
        treatment = union._treatment(name, transformer)
        if treatment == "error":
            return None
        if treatment == "skip":
            reactions.append(_KEEPS)
        else:  # "pass" may be set for any transformer, so its reaction may be unknown
            reaction = reaction_to_nan(transformer) or _KEEPS
            reactions.append(_Reaction(handles=True, keeps=reaction.keeps))
    return _joint_reaction(reactions)


def _joint_reaction(reactions):
    """Return the reaction of concatenated outputs; None if one refuses NaN."""
    if None in reactions:
        return None
    handles, keeps = False, not reactions
    for reaction in reactions:
        handles = handles or reaction.handles
        keeps = keeps or reaction.keeps
    return _Reaction(handles, keeps)


def _keeps_missing_rows(transformer):
    """Return whether a transformer of this package keeps missing rows as NaN."""
    return getattr(transformer, "_keeps_missing_rows", False) is True


def _wrapped_estimators(transformer):
    """List the estimators among the parameters of a transformer, which it may wrap."""
    if not hasattr(transformer, "get_params"):
        return []
    wrapped = []
    for value in transformer.get_params(deep=False).values():
        if hasattr(value, "get_params") and not isinstance(value, type):
            wrapped.append(value)
    return wrapped


def _is_costly(transformer):
    """Return whether a branch contains an encoder or is trained on its vectors."""
    if not hasattr(transformer, "get_params"):
        return False
    steps = [transformer, *transformer.get_params(deep=True).values()]
    return any(_keeps_missing_rows(step) for step in steps)


def _are_branches(transformers):
    """Return whether `transformers` is well-formed; get_params precedes validation."""
    if not isinstance(transformers, list):
        return False
    return all(isinstance(b, tuple | list) and len(b) == 3 for b in transformers)


def _params_within_branches(params, before):
    """Group parameters within branches by branch."""
    within = defaultdict(dict)
    for key, value in params.items():
        name, _, inner = key.partition("__")
        # An unfitted step that get_params returned must not replace the fitted one.
        is_same = value is before.get(key) and (
            isinstance(value, list) or hasattr(value, "get_params")
        )
        if inner and not is_same:
            within[name][inner] = value
    return within


def _is_same_branch(before, after):
    """Return whether a branch has the same transformer object and equal columns."""
    if before is None or after is None:
        return False
    for old, new in zip(before, after, strict=True):
        is_comparable = isinstance(new, str | int | slice | list | tuple)
        if new is not old and not (is_comparable and new == old):
            return False
    return True


def is_dropped(transformer):
    """Return whether a branch is not run."""
    return isinstance(transformer, str) and transformer == "drop"


def _remaining_columns(X, branches):
    """Return the positions of columns that no branch selects, dropped or not."""
    selected = []
    for name, _, columns in branches:
        selected += column_positions(X, columns, owner=f"Branch {name!r}")[0]
    return np.setdiff1d(np.arange(X.shape[1]), selected).tolist()


def _resolve(X, name, columns, *, flat):
    """Resolve a selection to names if the table has them, otherwise to positions.

    In transform, names select the same columns in any order. A scalar remains a scalar,
    which selects a one-dimensional column, if `flat`.
    """
    resolved, is_scalar = column_positions(X, columns, owner=f"Branch {name!r}")
    if is_frame(X) and all(isinstance(column, str) for column in X.columns):
        resolved = [X.columns[position] for position in resolved]
    return resolved[0] if is_scalar and flat else resolved


def _selects(columns):
    """Return whether a selection, as `_resolve` returns it, has any column."""
    return not (isinstance(columns, list) and not columns)


def _select(X, name, columns):
    """Return the columns of a branch."""
    positions, scalar = column_positions(X, columns, owner=f"Branch {name!r}")
    return take_columns(X, positions, scalar=scalar)


def _names_of(columns, names_in):
    """Return the names of selected columns, which are names or positions."""
    if isinstance(columns, str | Integral):
        columns = [columns]
    return [c if isinstance(c, str) else names_in[c] for c in columns]


def _missing_rows(cells):
    """Return a mask of the rows in which all cells are missing."""
    missing = missing_cells(cells)
    return missing.reshape(len(missing), -1).all(axis=1)


def _check_dates(name, transformer, cells):
    """Refuse missing dates where they would silently become numbers."""
    if not _is_of_sklearn(transformer):
        return
    dates = missing_dates(cells)
    if dates:
        raise ValueError(
            f"Branch {name!r} reads the columns {dates}, in which dates are missing. "
            "Transformers of scikit-learn do not recognise missing dates and would "
            "read them as numbers near -9e18. Convert the dates to numbers first, for "
            "example with skrub.TableVectorizer or skrub.DatetimeEncoder."
        )


def _is_of_sklearn(transformer):
    """Return whether a transformer, or a pipeline's first, is of scikit-learn."""
    if isinstance(transformer, Pipeline) and transformer.steps:
        transformer = transformer.steps[0][1]
    passes_on = isinstance(
        transformer, FunctionTransformer | ColumnTransformer | FeatureUnion
    )
    return type(transformer).__module__.startswith("sklearn.") and not passes_on


def _missing_modality_error(name, columns, observed, n_rows):
    missing = np.setdiff1d(np.arange(n_rows), observed)
    return ValueError(
        f"The modality of branch {name!r} is missing in {len(missing)} of {n_rows} "
        f"rows, first in row {missing[0]}: column {columns!r} has no value. Fill the "
        f"column, add an imputer to the branch, or set missing_rows={{{name!r}: "
        f"'skip'}} and put a SimpleImputer after the union."
    )


def _cut_to_rows(routed, part):
    """Restrict metadata with one entry per row to the rows of a branch, by method."""
    cut = {}
    for method, metadata in routed.items():
        cut[method] = {}
        for key, value in metadata.items():
            if _has_rows(value, part.n_rows):
                value = take_rows(value, part.rows)
            cut[method][key] = value
    return cut


def _has_rows(value, n_rows):
    if not hasattr(value, "__len__") or isinstance(value, str | dict):
        return False
    return len(value) == n_rows


def _is_passthrough(transformer):
    return isinstance(transformer, str) and transformer == "passthrough"


def _as_transformer(transformer):
    """Return the transformer of a branch: the identity for "passthrough"."""
    if _is_passthrough(transformer):
        return FunctionTransformer(feature_names_out="one-to-one")
    return transformer


def _encode_jointly(parts, caller):
    """Let the encoders at the start of several branches encode a column together.

    The branches then read the vectors from the store. They also raise the errors, with
    their names.
    """
    jobs_of_column = {}
    for part in parts:
        first = part.transformer
        while isinstance(first, Pipeline):
            first = first.steps[0][1]
        if first is part.transformer and caller == "fit":
            continue  # an encoder alone encodes nothing in fit
        if hasattr(first, "_fill_jointly"):
            column = repr(np.ravel(part.columns).tolist()), part.rows.tobytes()
            jobs_of_column.setdefault(column, []).append((first, part.cells))
    for jobs in jobs_of_column.values():
        if len(jobs) > 1:
            encoder, _ = jobs[0]
            with contextlib.suppress(Exception):
                encoder._fill_jointly(jobs)


def _fit_with_callbacks(part, y, params, run, union, task):
    """Fit a branch as a task of the union, with the callbacks of the union."""
    with _callbacks.fitting(union, task, part.transformer, part.cells, y):
        return run(part, y, params)


def _fit_branch(part, y, params):
    transformer = part.transformer.fit(part.cells, y, **params["fit"])
    names = _feature_names(transformer)
    if names is not None and len(names) != 1 and _is_costly(transformer):
        return _Fitted(transformer, None, len(names), False)
    # Only the output of a row reveals whether a column has tokens, or output is sparse.
    row = np.searchsorted(part.rows, part.observed[0])
    output = _dense(transformer.transform(take_rows(part.cells, [row])), part)
    return _Fitted(transformer, None, _width(output), _holds_tokens(output))


def _fit_transform_branch(part, y, params):
    transformer, X = part.transformer, part.cells
    if hasattr(transformer, "fit_transform"):
        output = transformer.fit_transform(X, y, **params["fit_transform"])
    else:
        transformer = transformer.fit(X, y, **params["fit"])
        output = transformer.transform(X, **params["transform"])
    output = _dense(output, part)
    return _Fitted(transformer, output, _width(output), _holds_tokens(output))


def _transform_branch(part, params):
    return _dense(part.transformer.transform(part.cells, **params["transform"]), part)


def _unfitted_result(part, names_in):
    """Return the result of a branch that is not run: no column, or a block of NaN."""
    if not _selects(part.columns):
        return _Fitted(part.transformer, None, 0, False)
    names = _feature_names(part.transformer, _names_of(part.columns, names_in))
    width, holds_tokens = 1, False
    if names is not None and len(names):
        width = len(names)
    last = part.transformer
    if isinstance(last, Pipeline):
        last = last[-1]
    if width == 1 and _keeps_missing_rows(last) and not get_tags(last).requires_fit:
        # An encoder that returns tokens returns None for a missing cell, otherwise NaN.
        vector = last.transform(np.array([[None]], dtype=object))
        holds_tokens = np.asarray(vector).dtype == object
    return _Fitted(part.transformer, None, width, holds_tokens)


def _dense(output, part):
    """Return sparse output as a dense array, unless that would be too large."""
    if not hasattr(output, "toarray"):
        return output
    n_bytes = part.n_rows * output.shape[1] * output.dtype.itemsize
    if n_bytes > _LARGEST_DENSE_OUTPUT:
        raise ValueError(
            f"Branch {part.name!r} returned a sparse matrix of {output.shape[1]} "
            f"columns. A dense block of {part.n_rows} rows needs {n_bytes / 2**30:.1f} "
            f"GiB; up to {_LARGEST_DENSE_OUTPUT / 2**30:.1f} GiB are converted. End "
            "the branch with a TruncatedSVD, limit its columns (max_features, "
            "max_categories, n_features), or make its output dense yourself "
            "(sparse_output=False)."
        )
    return output.toarray()


def _width(output):
    """Return the number of columns of a branch's output."""
    shape = np.shape(output)
    if len(shape) != 2:
        raise ValueError(
            f"The output has shape {shape}, but must be two-dimensional. A scalar "
            "selects a one-dimensional column: select it by a list, as in ['x']."
        )
    return shape[1]


def _holds_tokens(output):
    """Return whether a branch's output is one column of tokens."""
    return np.shape(output)[1:] == (1,) and bool(token_columns(output).any())


def _width_of(block):
    return block.stop - block.start


def _side_by_side(widths):
    """Return the slices of consecutive blocks with these widths."""
    blocks, start = {}, 0
    for name, width in widths.items():
        blocks[name] = slice(start, start + width)
        start += width
    return blocks


def _fill(block, output, rows, weight):
    """Scatter the output for these rows into a block, and weight it."""
    block[rows] = output
    if weight != 1:
        np.multiply(block, weight, out=block, where=~missing_cells(block))


def _indicator(parts, n_rows):
    """Return an array with 1 where the modality of a branch is missing, else 0."""
    columns = []
    for part in parts:
        if _selects(part.columns):
            missing = np.ones(n_rows)
            missing[part.observed] = 0
            columns.append(missing)
    return np.column_stack(columns)


def _run_branch(run, part, *args):
    """Run a branch, and add the branch and its rows to an error."""
    try:
        return run(part, *args)
    except Exception as error:
        error.add_note(_note(part, str(error)))
        raise


def _note(part, message):
    """Describe the branch and its rows, with advice for common errors."""
    n_missing = part.n_rows - len(part.observed)
    all_rows = len(part.rows) == part.n_rows
    rows = "all rows"
    if not all_rows:
        rows = f"the {len(part.rows)} of {part.n_rows} rows with its modality"
    note = (
        f"This was in branch {part.name!r} of PerModalityUnion, which received {rows}."
    )
    if all_rows and n_missing and _mentions(message, "nan", "none", "missing"):
        note += (
            f" Its modality is missing in {n_missing} of these; "
            f"missing_rows={{{part.name!r}: 'skip'}} excludes them."
        )
    if np.ndim(part.cells) == 1 and _mentions(message, "2d", "2-d", "dataframe"):
        note += (
            " It selects a single column by a scalar, which is one-dimensional; select "
            f"[{part.columns!r}] instead."
        )
    if isinstance(part.columns, list) and _mentions(message, "'lower'"):
        note += (
            " A transformer of texts needs a single column: select "
            f"{part.columns[0]!r} instead."
        )
    return note


def _mentions(message, *words):
    return any(word in message.lower() for word in words)


def _feature_names(transformer, input_features=None):
    """Return the output names of a transformer, None if it cannot name them."""
    try:
        return transformer.get_feature_names_out(input_features)
    except (AttributeError, ValueError):
        return None


def _as_array(output, part, width, holds_tokens):
    """Return the output of a branch as numbers or tokens; check its shape."""
    output = np.asarray(output)
    try:
        if holds_tokens:
            output = _checked_tokens(output)
        elif output.dtype.kind != "f":
            output = _as_floats(output, part)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Branch {part.name!r} returned {output.dtype} columns that are not "
            f"numbers ({error}). End the branch with a transformer that returns "
            "numbers, such as FrozenEncoder or OneHotEncoder, or one column of tokens, "
            "such as FrozenEncoder(output='tokens')."
        ) from error
    expected = (len(part.rows), width)
    if output.shape != expected:
        hint = ""
        if len(output) == 1 != len(part.rows) and isinstance(part.columns, list):
            # Vectorizers of texts iterate over the columns of a table, not its rows.
            hint = (
                " If the transformer takes a single column of texts, select "
                f"{part.columns[0]!r} instead of {part.columns!r}."
            )
        raise ValueError(
            f"Branch {part.name!r} returned shape {output.shape}; {expected} was "
            f"expected.{hint}"
        )
    return output


def _as_floats(output, part):
    """Return objects as floats; refuse text, even numerals such as a postal code."""
    if output.dtype.kind in "OUS":
        names = part.columns
        if not isinstance(names, list):
            names = [names]
        if len(names) != np.shape(output)[-1]:  # the columns are not the input columns
            names = range(np.shape(output)[-1])
        for name, cells in zip(names, np.atleast_2d(output.T), strict=True):
            for cell in cells:
                if isinstance(cell, str | bytes):
                    raise TypeError(f"column {name!r} has text, such as {cell!r:.60}")
    return np.where(pd.isna(output), np.nan, output).astype(np.float64)


def _checked_tokens(output):
    """Return cells of tokens with None where missing; refuse other cells."""
    missing = missing_cells(output)
    for cell in output[~missing]:
        received = type(cell).__name__
        if isinstance(cell, np.ndarray):
            if cell.ndim == 2 and cell.dtype.kind == "f":
                continue
            received = f"{cell.dtype} of shape {cell.shape}"
        raise TypeError(
            "tokens are float arrays of shape (n_tokens, n_features), but a cell is "
            f"{received}"
        )
    return np.where(missing, None, output)
