"""PerModalityUnion: one branch for each modality of a table, joined side by side."""

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
# The dense copy of a sparse output is copied once more, into the joined table. Half a GiB is a
# million rows of 64 columns; what is larger is the user's decision, not a default.
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


class PerModalityUnion(CallbackSupportMixin, TransformerMixin, BaseEstimator):
    """Send each modality of a table through a branch of its own and join the results.

    A branch is a transformer, often a pipeline of an encoder and a projector, with the columns it
    reads, as in :class:`~sklearn.compose.ColumnTransformer`. Its output is a *block*: columns named
    ``<branch>__…``, side by side in the joined table.

    A row may lack a modality: all cells that a branch reads are None or NaN. A transformer that
    handles missing values, such as an imputer or a one-hot encoder, is given these rows, as in
    :class:`~sklearn.compose.ColumnTransformer`. Any other transformer, such as an encoder, a
    projector or PCA, is not, neither in fit nor in transform, and the row's block is NaN. The
    parameter `missing_rows` changes this for each branch. Downstream, XGBoost and
    :class:`~sklearn.ensemble.HistGradientBoostingClassifier` take NaN as it is; put a
    :class:`~sklearn.impute.SimpleImputer` before other classifiers.

    A branch may also return tokens, as ``FrozenEncoder(output="tokens")`` does: one object column
    whose cells are float arrays of shape (n_tokens, n_features). Its block is that column, None
    where a row lacks the modality. Tokens stand beside numbers in a DataFrame only: call
    ``set_output(transform="pandas")``.

    Parameters
    ----------
    transformers : list of (str, transformer, columns) tuples
        The branches. A name must not contain ``__`` and is used to set parameters, as in
        ``set_params(text__frozenencoder__normalize=True)``, or to replace the whole branch.
        "passthrough" hands the columns on as they are, "drop" leaves the branch out. Columns are
        a name, a position, a list or slice of these, a boolean mask or a callable that takes the
        table; a single name or position is handed to the transformer as a one-dimensional column.
        A branch whose selection is empty is skipped.

    remainder : {"drop", "passthrough"} or transformer, default="drop"
        What becomes of the columns that no branch names. They are dropped, or they are read by a
        last branch called "remainder", which hands them on as they are or has this transformer.
        `fit` settles which columns are left; the columns of a branch that is "drop" are not.

    n_jobs : int or None, default=None
        Branches to run at once.

    transformer_weights : dict of str to float or None, default=None
        What the block of a branch is multiplied by, in each cell if these are tokens; 1 for
        branches that are not in it.

    add_indicator : bool, default=False
        Whether to add a last block, "missing", with one column for each branch, that is 1 where the
        row lacks the branch's modality and 0 elsewhere.

    missing_rows : {"auto", "skip", "pass", "error"} or dict of str to these, default="auto"
        What to do with rows that lack a branch's modality. A dict sets it for some branches; the
        others have "auto".

        - "auto": "pass" if the transformer handles missing values itself, "skip" otherwise. A
          transformer handles them if its tag ``input_tags.allow_nan`` is true and it does not
          merely return NaN for NaN, as scalers, feature selectors and encoders do. A pipeline
          does if one of its steps handles them and no step before cannot take NaN.
        - "skip": the transformer is not given these rows, and their block is NaN.
        - "pass": the transformer is given all rows, with NaN for None in columns of objects.
        - "error": raise an error that names the branch, before any branch is run.

    keep_unobserved : bool, default=False
        Whether to keep a branch whose modality no row has in fit, as a block of NaN, instead of
        raising an error. The block has as many columns as the transformer can name without being
        fitted, otherwise one. In transform it is NaN for all rows, with a warning if some have the
        modality.

    Attributes
    ----------
    transformers_ : list of (str, transformer, columns) tuples
        The fitted branches, without the dropped ones; the remainder, if there is one, is the last.
        The transformer of a branch that selects no column or is in `unobserved_` is not fitted.

    named_transformers_ : :class:`~sklearn.utils.Bunch`
        The fitted branches by name.

    blocks_ : dict of str to slice
        The columns of the output that each branch fills, and those of the indicator.

    holds_tokens_ : dict of str to bool
        Whether that block is a column of tokens.

    unobserved_ : list of str
        The branches whose modality no row had in fit, see `keep_unobserved`.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    sklearn.compose.ColumnTransformer : Gives all rows to each transformer.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklembed import CallableBackend, FrozenEncoder, PerModalityUnion
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> shape = CallableBackend(load, name="lengths", version="1", modality="text", n_features=2)
    >>> X = pd.DataFrame({"note": ["a red cat", None, "blue"], "size": [1.0, 2.0, None]})
    >>> union = PerModalityUnion([
    ...     ("text", FrozenEncoder(shape, store=None), "note"),
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
        """Get the parameters of the union and, if deep, its branches and their parameters.

        Parameters
        ----------
        deep : bool, default=True
            Whether to look into the branches.

        Returns
        -------
        params : dict
            Parameter names mapped to their values.
        """
        params = super().get_params(deep=False)
        if deep:
            for name, transformer in self._transformers_by_name():
                params[name] = transformer
                if hasattr(transformer, "get_params"):
                    nested = transformer.get_params(deep=True)
                    params |= {f"{name}__{key}": value for key, value in nested.items()}
        return params

    def set_params(self, **params):
        """Set parameters of the union, replace branches, or set parameters within them.

        If the union is fitted, parameters within a branch are also set on its fitted transformer,
        so that they take effect in `transform`. A branch that is replaced has to be fitted again;
        until then `transform` raises an error.

        Parameters
        ----------
        **params : dict
            For example ``n_jobs=2``, ``image="drop"``, ``text__pca__n_components=64`` or
            ``remainder__with_mean=False``.

        Returns
        -------
        self : PerModalityUnion
            The union.
        """
        branches = self._all_branches()
        within = _params_within_branches(params, self.get_params(deep=True))
        if "transformers" in params:
            self.transformers = params.pop("transformers")
        if _are_branches(self.transformers) and any(
            n in params for n, _, _ in self.transformers
        ):
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
        """Fit each branch on the rows that have its modality, or on all; see `missing_rows`.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Targets.

        **params : dict
            Metadata for the branches; needs ``sklearn.set_config(enable_metadata_routing=True)``.
            What has one entry a row is cut to the branch's rows.

        Returns
        -------
        self : PerModalityUnion
            The fitted union.

        Raises
        ------
        ValueError
            If a selected column is absent, a branch name is not allowed, a weight is of no branch,
            no row has a branch's modality, a row lacks one that `missing_rows` requires, or the
            output of a branch is sparse and too large to be made dense.
        """
        self._fit_branches(_fit_branch, "fit", X, y, params)
        return self

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)
    def fit_transform(self, X, y=None, **params):
        """Fit each branch, and join what their `fit_transform` returns for the training rows.

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
            The joined blocks, NaN where a row lacks the modality. An ndarray of dtype object if all
            are tokens; None where these are missing.

        Raises
        ------
        ValueError
            For what `fit` raises it, or if the output cannot hold tokens: it is polars, or numbers
            stand beside them and it is not pandas.
        TypeError
            If a branch returns neither numbers nor tokens.
        """
        outputs, parts, X = self._fit_branches(
            _fit_transform_branch, "fit_transform", X, y, params
        )
        return self._join(outputs, parts, X)

    def transform(self, X, **params):
        """Run each branch on the rows that it is given, see `missing_rows`, and join the results.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table. Columns that a name selected are found by name, in any order.

        **params : dict
            Metadata for the branches, as for `fit`.

        Returns
        -------
        blocks : ndarray or DataFrame of shape (n_samples, n_features_out)
            The joined blocks, NaN where a row lacks the modality. An ndarray of dtype object if all
            are tokens; None where these are missing.

        Raises
        ------
        ValueError
            For what `fit` raises it, if a branch was replaced by `set_params` after fit, or if the
            output cannot hold tokens: it is polars, or numbers stand beside them and it is not
            pandas.
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
        parts = [
            part._replace(cells=empty_as_objects(part.cells, self._objects[part.name]))
            for part in self._parts(X, self.transformers_)
        ]
        self._warn_of_unobserved(parts)
        outputs = self._run(
            {
                part.name: delayed(_noting_branch)(
                    _transform_branch,
                    part,
                    _cut_to_rows(routed[part.name]["transform"], part.rows, len(X)),
                )
                for part in parts
                if len(part.rows) and part.name not in self.unobserved_
            },
            parts,
        )
        return self._join(outputs, parts, X)

    def iter_parts(self, X):
        """Yield what fit gives each branch of a table; the union need not be fitted.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        Yields
        ------
        name : str
            The branch. Those that fit does not run are left out: dropped branches, and branches
            that select no column or whose modality no row has. The remainder is the last.

        transformer : transformer or "passthrough"
            Its transformer, not fitted.

        part : DataFrame, Series or ndarray
            The columns that it reads, of the rows that have the modality, or of all rows if the
            transformer handles missing values.
        """
        X = as_table(X)
        for part in self._parts(X, self._branches(X)):
            if len(part.observed):
                yield part.name, part.transformer, part.cells

    @property
    def named_transformers_(self):
        """The fitted branches by name."""
        return Bunch(**{name: fitted for name, fitted, _ in self.transformers_})

    def get_feature_names_out(self, input_features=None):
        """Name the output columns ``<branch>__<the branch's own name>`` or ``missing__<branch>``.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns; by default those seen in `fit`.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            The names; a branch that cannot name its columns has them numbered.
        """
        check_is_fitted(self)
        seen = getattr(self, "feature_names_in_", input_features)
        if input_features is not None and (
            len(input_features) != self.n_features_in_
            or list(input_features) != list(seen)
        ):
            raise ValueError(
                f"input_features must equal the {self.n_features_in_} columns seen in fit; got "
                f"{list(input_features)}."
            )
        if input_features is None:
            input_features = getattr(
                self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)]
            )
        names = []
        for name, transformer, columns in self.transformers_:
            width = _width_of(self.blocks_[name])
            if not width:
                continue
            columns_out = _feature_names(
                transformer, _names_of(columns, input_features)
            )
            if columns_out is None or len(columns_out) != width:
                columns_out = range(width)
            names += [f"{name}__{column}" for column in columns_out]
        if self._has_indicator:
            names += [
                f"missing__{name}"
                for name, _, columns in self.transformers_
                if _selects(columns)
            ]
        return np.asarray(names, dtype=object)

    def get_metadata_routing(self):
        """Say which metadata goes to which branch.

        Returns
        -------
        routing : MetadataRouter
            The routing, see scikit-learn's user guide on metadata routing.
        """
        router = MetadataRouter(owner=self)
        for name, transformer in self._transformers_by_name():
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
        """Fit all branches; return their outputs by name, what each was given, and the table."""
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
        parts = [
            part._replace(transformer=clone(_as_transformer(part.transformer)))
            for part in self._parts(X, branches)
        ]
        self.unobserved_ = self._check_unobserved(parts)
        fitted_parts = [part for part in parts if len(part.observed)]
        context = self._init_callback_context(
            max_subtasks=len(fitted_parts), sequential_subtasks=False
        )
        _callbacks.begin(self, context, X, y)
        tasks = {  # before the loop: it pickles the union, of which they change an attribute
            part.name: _callbacks.subtask(
                context, f"fit-{part.name}", 0, task_id=number
            )
            for number, part in enumerate(fitted_parts)
        }
        results = self._run(
            {
                part.name: delayed(_noting_branch)(
                    _fit_with_callbacks,
                    part,
                    None if y is None else take_rows(y, part.rows),
                    {
                        method: _cut_to_rows(metadata, part.rows, len(X))
                        for method, metadata in routed[part.name].items()
                    },
                    run,
                    self,
                    tasks[part.name],
                )
                for part in fitted_parts
            },
            parts,
        )
        for part in parts:
            if part.name not in results:
                results[part.name] = _unfitted_result(part, X)
        self.transformers_ = [
            (part.name, results[part.name].transformer, part.columns) for part in parts
        ]
        widths = {part.name: results[part.name].width for part in parts}
        if self.add_indicator:
            widths["missing"] = sum(_selects(part.columns) for part in parts)
        self.blocks_ = _side_by_side(widths)
        self.holds_tokens_ = dict.fromkeys(self.blocks_, False) | {
            part.name: results[part.name].holds_tokens for part in parts
        }
        self._objects = {
            part.name: holds_objects(part.cells) if _selects(part.columns) else None
            for part in parts
        }
        self._replaced = []
        _callbacks.end(self, context, X, y)
        return {name: result.output for name, result in results.items()}, parts, X

    def _run(self, calls, parts):
        """Run delayed calls of branches; return their results by name.

        Encoders and what is trained on their vectors come last: they take hours where the others
        take seconds, and what those refuse should be refused before.
        """
        costly = {part.name for part in parts if _is_costly(part.transformer)}
        cheap_names = [name for name in calls if name not in costly]
        costly_names = [name for name in calls if name in costly]
        results = {}
        for names in (cheap_names, costly_names):
            outcomes = Parallel(n_jobs=self.n_jobs)(calls[name] for name in names)
            results |= zip(names, outcomes, strict=True)
        return results

    def _transformers_by_name(self):
        """List the name and the transformer of each branch, the remainder last."""
        branches = self.transformers if _are_branches(self.transformers) else []
        named = [(name, transformer) for name, transformer, _ in branches]
        return [*named, ("remainder", self.remainder)]

    def _branches(self, X):
        """List the branches that are run, the remainder last, with their columns fixed."""
        branches = list(self.transformers)
        if not _is_dropped(self.remainder) and (left := _columns_left(X, branches)):
            branches.append(("remainder", self.remainder, left))
        return [
            (
                name,
                transformer,
                _resolve(X, name, columns, flat=not _is_passthrough(transformer)),
            )
            for name, transformer, columns in branches
            if not _is_dropped(transformer)
        ]

    def _parts(self, X, branches):
        """Cut out of the table what each branch is given: its columns, and some rows or all."""
        parts = []
        for name, transformer, columns in branches:
            if not _selects(columns):
                nothing = np.array([], dtype=np.intp)
                parts.append(
                    _Part(name, transformer, columns, None, nothing, nothing, len(X))
                )
                continue
            cells = _select(X, name, columns)
            rows = observed = np.flatnonzero(~_missing_rows(cells))
            treatment = self._treatment(name, transformer)
            if treatment == "error" and len(observed) < len(X):
                raise _lacking_error(name, columns, observed, len(X))
            if treatment == "pass":
                rows = np.arange(len(X))
                # scikit-learn reads polars as arrays, in which a missing text is None.
                is_read_as_array = _is_of_sklearn(transformer)
                cells = missing_as_nan(as_pandas(cells) if is_read_as_array else cells)
            else:
                cells = take_rows(cells, rows)
            _check_dates(name, transformer, cells)
            parts.append(
                _Part(name, transformer, columns, cells, rows, observed, len(X))
            )
        return parts

    def _treatment(self, name, transformer):
        """Return what becomes of rows that lack a modality: "skip", "pass" or "error"."""
        setting = self.missing_rows
        if isinstance(setting, dict):
            setting = setting.get(name, "auto")
        if setting == "auto":
            reaction = _reaction_to_nan(transformer)
            return "pass" if reaction is not None and reaction.handles else "skip"
        return setting

    def _check_unobserved(self, parts):
        """Return the branches that no row has; raise an error unless they are to be kept."""
        unobserved = [
            part for part in parts if not len(part.observed) and _selects(part.columns)
        ]
        if unobserved and not self.keep_unobserved:
            part = unobserved[0]
            raise ValueError(
                f"Branch {part.name!r} has nothing to learn from: column {part.columns!r} is "
                f"missing in all {part.n_rows} rows. Check the column, drop the branch, or set "
                "keep_unobserved=True to keep it as a block of NaN."
            )
        return [part.name for part in unobserved]

    def _warn_of_unobserved(self, parts):
        """Warn of rows that have a modality which no row had in fit."""
        surplus = {
            part.name: len(part.observed)
            for part in parts
            if part.name in self.unobserved_ and len(part.observed)
        }
        if surplus:
            warnings.warn(
                f"No row had the modality of the branches {list(surplus)} in fit, so their blocks "
                f"are NaN, but now {max(surplus.values())} rows have it. Fit again on rows that "
                "have it, or set the branches to 'drop'.",
                UserWarning,
                stacklevel=4,
            )

    def _all_branches(self):
        """Return the transformer and the columns of each branch by name, with the remainder."""
        branches = self.transformers if _are_branches(self.transformers) else []
        by_name = {
            name: (transformer, columns) for name, transformer, columns in branches
        }
        return by_name | {"remainder": (self.remainder, None)}

    def _set_fitted_params(self, within, before):
        """Set parameters on the fitted branches, and note which branches were replaced."""
        after = self._all_branches()
        replaced = [
            name
            for name in before | after
            if not _is_same_branch(before.get(name), after.get(name))
        ]
        self._replaced = list(dict.fromkeys([*self._replaced, *replaced]))
        for name, transformer, _ in self.transformers_:
            if within[name] and name not in self._replaced:
                transformer.set_params(**within[name])

    def _check_not_replaced(self):
        """Refuse to run branches that are not those set now."""
        if self._replaced:
            raise ValueError(
                f"The branches {self._replaced} were replaced by set_params after fit, so the "
                "fitted branches are no longer those of the union. Call fit again."
            )

    def _check_transformers(self):
        """Refuse what is no list of branches, and what is no transformer in one."""
        if not self.transformers:
            raise ValueError(
                "transformers is empty; give at least one (name, transformer, columns)."
            )
        if not _are_branches(self.transformers):
            raise ValueError(
                "transformers is a list of tuples (name, transformer, columns); got "
                f"{self.transformers!r}."
            )
        for name, transformer, _ in self.transformers:
            if not (
                _is_dropped(transformer)
                or hasattr(_as_transformer(transformer), "transform")
            ):
                raise TypeError(
                    f"Branch {name!r} needs a transformer, 'passthrough' or 'drop'; got "
                    f"{transformer!r}."
                )
        self._check_names([name for name, _, _ in self.transformers])

    def _check_names(self, names):
        """Refuse names of branches that could not be told apart later."""
        for name, times in Counter(names).items():
            if times > 1:
                raise ValueError(
                    f"Branch names must differ, but {name!r} stands {times} times."
                )
            if not isinstance(name, str) or not name or "__" in name:
                raise ValueError(
                    f"A branch name is a string without '__', which separates the branch from its "
                    f"columns; got {name!r}."
                )
            if name in self.get_params(deep=False):
                raise ValueError(
                    f"{name!r} is a parameter of the union; name the branch otherwise."
                )
            if name == "missing" and self.add_indicator:
                raise ValueError(
                    "'missing' is the block that add_indicator adds; name the branch otherwise."
                )

    def _check_by_branch(self):
        """Refuse settings of branches that there are not, and values that are not allowed."""
        known = [name for name, _ in self._transformers_by_name()]
        settings = self.missing_rows if isinstance(self.missing_rows, dict) else {}
        for name, setting in settings.items():
            if name not in known:
                raise ValueError(
                    f"missing_rows has a setting for {name!r}, but the branches are {known}."
                )
            if setting not in _MISSING_ROWS:
                raise ValueError(
                    f"missing_rows must be one of {list(_MISSING_ROWS)}; got {setting!r} for "
                    f"branch {name!r}."
                )
        for name, weight in (self.transformer_weights or {}).items():
            if name not in known:
                raise ValueError(
                    f"transformer_weights has a weight for {name!r}, but the branches are {known}."
                )
            if not (isinstance(weight, Real) and 0 <= weight < np.inf):
                raise ValueError(
                    f"A weight is a finite number that is not negative; got {weight!r} for branch "
                    f"{name!r}."
                )

    def _join(self, outputs, parts, X):
        """Scatter each branch's rows into its block, leaving the others missing, and weight it."""
        tokens = [
            part.name
            for part in parts
            # Fit may have been shown a cell that gave none, such as an image that is damaged.
            if self.holds_tokens_[part.name] or _holds_tokens(outputs.get(part.name))
        ]
        self._check_container(tokens)
        arrays = {
            part.name: _as_array(
                outputs[part.name], part, self.blocks_[part.name], part.name in tokens
            )
            for part in parts
            if outputs.get(part.name) is not None
        }
        dtypes = [array.dtype for array in arrays.values() if array.dtype != object]
        joined = np.full(
            (len(X), max(block.stop for block in self.blocks_.values())),
            np.nan,
            dtype=np.result_type(*dtypes) if dtypes else np.float64,
        )
        blocks = {name: joined[:, block] for name, block in self._filled_blocks.items()}
        blocks |= {name: np.full((len(X), 1), None, dtype=object) for name in tokens}
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
        """Refuse output that cannot hold the tokens of these branches."""
        container = output_container(self)
        numbers = [name for name in self._filled_blocks if name not in tokens]
        if tokens and container == "polars":
            raise ValueError(
                f"Branches {tokens} give tokens, one object column each of arrays of different "
                "lengths, which polars does not have. Use set_output(transform='pandas')."
            )
        if tokens and numbers and container != "pandas":
            raise ValueError(
                f"Branches {tokens} give tokens, but {numbers} numbers, and only a DataFrame holds "
                "both. Call set_output(transform='pandas') on the union or its pipeline, or give "
                "each kind a union of its own."
            )

    @property
    def _filled_blocks(self):
        """The blocks that have a column."""
        return {name: block for name, block in self.blocks_.items() if _width_of(block)}

    @property
    def _has_indicator(self):
        """Whether fit added the indicator; the parameter may have been set since."""
        return len(self.blocks_) > len(self.transformers_)

    def _sk_visual_block_(self):
        return ColumnTransformer(
            self.transformers, remainder=self.remainder
        )._sk_visual_block_()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        # Single numbers that are missing reach every branch.
        tags.input_tags.allow_nan = all(
            _is_dropped(transformer) or _reaction_to_nan(transformer) is not None
            for _, transformer in self._transformers_by_name()
        )
        return tags


class _Part(NamedTuple):
    """What a branch is given of a table, and which of the table's rows have its modality."""

    name: str
    transformer: Any
    columns: Any
    cells: Any  # its columns, of these rows:
    rows: np.ndarray
    observed: np.ndarray
    n_rows: int  # of the table


class _Fitted(NamedTuple):
    """A fitted branch, what it returned for the training rows, and what its block is."""

    transformer: Any
    output: Any
    width: int
    holds_tokens: bool


class _Reaction(NamedTuple):
    """How a transformer that takes rows of NaN treats them."""

    handles: (
        bool  # it returns something else than a row of NaN, at least in some columns
    )
    keeps: bool  # it may return NaN, at least in some columns


_KEEPS = _Reaction(handles=False, keeps=True)
_FILLS = _Reaction(handles=True, keeps=False)


def _reaction_to_nan(transformer):
    """Tell how a transformer treats rows of NaN; None if it cannot take them."""
    if transformer is None or _is_passthrough(transformer):
        return _KEEPS
    if isinstance(transformer, Pipeline):
        return _reaction_in_sequence([step for _, step in transformer.steps])
    if isinstance(transformer, PerModalityUnion):
        return _reaction_of_union(transformer)
    if isinstance(transformer, FeatureUnion):
        return _reaction_side_by_side(
            [inner for _, inner in transformer.transformer_list]
        )
    if isinstance(transformer, ColumnTransformer):
        inner = [inner for _, inner, _ in transformer.transformers]
        return _reaction_side_by_side([*inner, transformer.remainder])
    if isinstance(transformer, FunctionTransformer):
        # Whether the function fills NaN cannot be read from it.
        return None if transformer.validate else _KEEPS
    if _keeps_missing_rows(transformer):
        return _KEEPS
    if not hasattr(transformer, "__sklearn_tags__"):
        return None
    if not get_tags(transformer).input_tags.allow_nan:
        wrapped = _estimators_within(transformer)
        return _reaction_side_by_side(wrapped) if wrapped else None
    if isinstance(transformer, OrdinalEncoder):
        return _Reaction(
            handles=True, keeps=bool(pd.isna(transformer.encoded_missing_value))
        )
    return _KEEPS if isinstance(transformer, _KEEP_MISSING) else _FILLS


def _reaction_in_sequence(steps):
    """Tell how a pipeline treats rows of NaN: up to the first step that leaves no NaN."""
    handles = False
    for step in steps:
        reaction = _reaction_to_nan(step)
        if reaction is None:
            return None
        handles = handles or reaction.handles
        if not reaction.keeps:
            return _FILLS
    return _Reaction(handles, keeps=True)


def _reaction_side_by_side(transformers):
    """Tell how transformers of which each is given the rows treat rows of NaN."""
    reactions = [
        _reaction_to_nan(inner) for inner in transformers if not _is_dropped(inner)
    ]
    if None in reactions:
        return None
    return _Reaction(
        handles=any(reaction.handles for reaction in reactions),
        keeps=any(reaction.keeps for reaction in reactions) or not reactions,
    )


def _reaction_of_union(union):
    """Tell how a union within a branch treats rows of NaN, which it hides from some branches."""
    reactions = []
    for name, transformer in union._transformers_by_name():
        if not _is_dropped(transformer):
            treatment = union._treatment(name, transformer)
            if treatment == "error":
                return None
            if (
                treatment == "pass"
            ):  # also where the parameter says so of any transformer
                reaction = _reaction_to_nan(transformer)
                keeps = reaction is None or reaction.keeps
                reactions.append(_Reaction(handles=True, keeps=keeps))
            else:
                reactions.append(_KEEPS)
    return _Reaction(
        handles=any(reaction.handles for reaction in reactions),
        keeps=any(reaction.keeps for reaction in reactions) or not reactions,
    )


def _keeps_missing_rows(transformer):
    """Tell whether a transformer of this package returns NaN where its input is missing."""
    return getattr(transformer, "_keeps_missing_rows", False) is True


def _estimators_within(transformer):
    """List the estimators among a transformer's parameters, as those that a wrapper has."""
    params = (
        transformer.get_params(deep=False) if hasattr(transformer, "get_params") else {}
    )
    return [
        value
        for value in params.values()
        if hasattr(value, "get_params") and not isinstance(value, type)
    ]


def _is_costly(transformer):
    """Tell whether a branch holds an encoder or what is trained on its vectors."""
    if not hasattr(transformer, "get_params"):
        return False
    steps = [transformer, *transformer.get_params(deep=True).values()]
    return any(_keeps_missing_rows(step) for step in steps)


def _are_branches(transformers):
    """Tell whether `transformers` has the right form; get_params is asked before it is checked."""
    return isinstance(transformers, list) and all(
        isinstance(branch, tuple | list) and len(branch) == 3 for branch in transformers
    )


def _params_within_branches(params, before):
    """Group the parameters that are set within branches by branch."""
    within = defaultdict(dict)
    for key, value in params.items():
        name, _, inner = key.partition("__")
        # What get_params returned of the unfitted branch must not replace what is fitted.
        is_same = value is before.get(key) and (
            isinstance(value, list) or hasattr(value, "get_params")
        )
        if inner and not is_same:
            within[name][inner] = value
    return within


def _is_same_branch(before, after):
    """Tell whether a branch is the same: the transformer itself, and the same columns."""
    if before is None or after is None:
        return False
    return all(
        new is old or (isinstance(new, str | int | slice | list | tuple) and new == old)
        for old, new in zip(before, after, strict=True)
    )


def _is_dropped(transformer):
    return isinstance(transformer, str) and transformer == "drop"


def _columns_left(X, branches):
    """Return the positions of the columns that no branch names, be it run or dropped."""
    named = set()
    for name, _, columns in branches:
        named.update(column_positions(X, columns, owner=f"Branch {name!r}")[0])
    return [position for position in range(X.shape[1]) if position not in named]


def _resolve(X, name, columns, *, flat):
    """Fix a selection, as names where the table has them, to be found again; else positions.

    A scalar stays one, and so hands on a flat column, if `flat`.
    """
    positions, scalar = column_positions(X, columns, owner=f"Branch {name!r}")
    named = is_frame(X) and all(isinstance(column, str) for column in X.columns)
    resolved = [X.columns[position] for position in positions] if named else positions
    return resolved[0] if scalar and flat else resolved


def _selects(columns):
    """Tell whether a selection, as `_resolve` returns it, holds a column."""
    return not (isinstance(columns, list) and not columns)


def _select(X, name, columns):
    """Cut a branch's columns out of the table."""
    positions, scalar = column_positions(X, columns, owner=f"Branch {name!r}")
    return take_columns(X, positions, scalar=scalar)


def _names_in_table(columns, X):
    """Name the columns of a table that a branch reads."""
    return _names_of(
        columns, X.columns if is_frame(X) else [f"x{i}" for i in range(X.shape[1])]
    )


def _names_of(columns, input_features):
    """Name the input columns of a fitted branch, whose selection is names or positions."""
    columns = [columns] if isinstance(columns, str | Integral) else columns
    return [c if isinstance(c, str) else input_features[c] for c in columns]


def _missing_rows(part):
    """Tell which rows lack a modality: those with no value in any of its columns."""
    missing = missing_cells(part)
    return missing if missing.ndim == 1 else missing.all(axis=1)


def _check_dates(name, transformer, cells):
    """Refuse missing dates where they would silently become numbers."""
    dates = missing_dates(cells) if _is_of_sklearn(transformer) else []
    if dates:
        raise ValueError(
            f"Branch {name!r} reads the columns {dates}, in which dates are missing. Transformers "
            "of scikit-learn do not recognise missing dates: they would take them for numbers "
            "near -9e18. Turn the dates into numbers first, for example by skrub.TableVectorizer "
            "or skrub.DatetimeEncoder."
        )


def _is_of_sklearn(transformer):
    """Tell whether a transformer, or a pipeline's first, is one of scikit-learn's own."""
    if isinstance(transformer, Pipeline) and transformer.steps:
        transformer = transformer.steps[0][1]
    hands_on = isinstance(
        transformer, FunctionTransformer | ColumnTransformer | FeatureUnion
    )
    return type(transformer).__module__.startswith("sklearn.") and not hands_on


def _lacking_error(name, columns, observed, n_rows):
    lacking = np.setdiff1d(np.arange(n_rows), observed)
    return ValueError(
        f"{len(lacking)} of {n_rows} rows lack the modality of branch {name!r}, first row "
        f"{lacking[0]}: column {columns!r} is missing. Fill the column, put an imputer into the "
        f"branch, or set missing_rows={{{name!r}: 'skip'}} and put a SimpleImputer after the union."
    )


def _cut_to_rows(metadata, rows, n_rows):
    """Cut metadata that has one entry a row to the given rows, and leave the rest alone."""
    return {
        key: take_rows(value, rows) if _has_rows(value, n_rows) else value
        for key, value in metadata.items()
    }


def _has_rows(value, n_rows):
    return (
        hasattr(value, "__len__")
        and not isinstance(value, str | dict)
        and len(value) == n_rows
    )


def _is_passthrough(transformer):
    return isinstance(transformer, str) and transformer == "passthrough"


def _as_transformer(transformer):
    """Return what stands for a branch's transformer: for "passthrough", the identity."""
    if _is_passthrough(transformer):
        return FunctionTransformer(feature_names_out="one-to-one")
    return transformer


def _fit_with_callbacks(part, y, params, run, union, task):
    """Fit a branch as a task of the union; its transformer is handed the callbacks."""
    with _callbacks.fitting(union, task, part.transformer, part.cells, y):
        return run(part, y, params)


def _fit_branch(part, y, params):
    transformer = part.transformer.fit(part.cells, y, **params["fit"])
    names = _feature_names(transformer)
    if names is not None and len(names) != 1 and _is_costly(transformer):
        return _Fitted(transformer, None, len(names), False)
    # Only its cells tell a column of tokens from one of numbers, and whether output is sparse.
    row = np.searchsorted(part.rows, part.observed[0])
    output = _dense(transformer.transform(take_rows(part.cells, [row])), part)
    return _Fitted(transformer, None, _width(output), _holds_tokens(output))


def _fit_transform_branch(part, y, params):
    transformer, X = part.transformer, part.cells
    if hasattr(transformer, "fit_transform"):
        output = transformer.fit_transform(X, y, **params["fit_transform"])
    else:
        output = transformer.fit(X, y, **params["fit"]).transform(
            X, **params["transform"]
        )
    output = _dense(output, part)
    return _Fitted(transformer, output, _width(output), _holds_tokens(output))


def _transform_branch(part, params):
    return _dense(part.transformer.transform(part.cells, **params), part)


def _unfitted_result(part, X):
    """Return what becomes of a branch that is not run: no column, or a block of NaN."""
    if not _selects(part.columns):
        return _Fitted(part.transformer, None, 0, False)
    names = _feature_names(part.transformer, _names_in_table(part.columns, X))
    width = len(names) if names is not None and len(names) else 1
    holds_tokens = False
    last = (
        part.transformer[-1]
        if isinstance(part.transformer, Pipeline)
        else part.transformer
    )
    if width == 1 and _keeps_missing_rows(last) and not get_tags(last).requires_fit:
        # An encoder returns None for a missing cell if it returns tokens for others.
        vector = last.transform(np.array([[None]], dtype=object))
        holds_tokens = np.asarray(vector).dtype == object
    return _Fitted(part.transformer, None, width, holds_tokens)


def _dense(output, part):
    """Make sparse output dense, if that is small for the whole table."""
    if not hasattr(output, "toarray"):
        return output
    n_bytes = part.n_rows * output.shape[1] * output.dtype.itemsize
    if n_bytes > _LARGEST_DENSE_OUTPUT:
        raise ValueError(
            f"Branch {part.name!r} returned a sparse matrix of {output.shape[1]} columns, which as "
            f"a dense block of {part.n_rows} rows needs {n_bytes / 2**30:.1f} GiB; up to "
            f"{_LARGEST_DENSE_OUTPUT / 2**30:.1f} GiB are made dense. End the branch with a "
            "TruncatedSVD, limit its columns (max_features, max_categories, n_features), or make "
            "its output dense yourself (sparse_output=False)."
        )
    return output.toarray()


def _width(output):
    """Return the number of columns of a branch's output."""
    shape = np.shape(output)
    if len(shape) != 2:
        raise ValueError(
            f"The output has shape {shape}, but a table is needed. A column that is selected by a "
            "scalar is handed on one-dimensional: select it by a list, as in ['x']."
        )
    return shape[1]


def _holds_tokens(output):
    """Tell whether a branch's output is one column of tokens."""
    return np.shape(output)[1:] == (1,) and bool(token_columns(output).any())


def _width_of(block):
    return block.stop - block.start


def _side_by_side(widths):
    """Turn the widths of blocks into the slices that they fill, one after the other."""
    ends = np.cumsum(list(widths.values())).tolist()
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def _fill(block, output, rows, weight):
    """Scatter what a branch returned for these rows into its block, and weight it."""
    block[rows] = output
    if weight != 1:
        np.multiply(block, weight, out=block, where=~missing_cells(block))


def _indicator(parts, n_rows):
    """Say by 1 which rows lack each branch's modality."""
    parts = [part for part in parts if _selects(part.columns)]
    missing = np.ones((n_rows, len(parts)))
    for column, part in enumerate(parts):
        missing[part.observed, column] = 0
    return missing


def _noting_branch(run, part, *rest):
    """Run a branch; an error that leaves it says which branch it was and what rows it was given."""
    try:
        return run(part, *rest)
    except Exception as error:
        error.add_note(_note(part, str(error)))
        raise


def _note(part, message):
    """Say which branch it was, which rows it was given, and what often helps."""
    n_lacking = part.n_rows - len(part.observed)
    all_rows = len(part.rows) == part.n_rows
    rows = (
        "all rows"
        if all_rows
        else f"the {len(part.rows)} of {part.n_rows} rows that it has"
    )
    note = (
        f"This was in branch {part.name!r} of PerModalityUnion, which was given {rows}."
    )
    if all_rows and n_lacking and _mentions(message, "nan", "none", "missing"):
        note += (
            f" {n_lacking} of these lack its modality; missing_rows={{{part.name!r}: 'skip'}} "
            "leaves them out."
        )
    if np.ndim(part.cells) == 1 and _mentions(message, "2d", "2-d", "dataframe"):
        note += (
            f" It selects a single column by a scalar, which is one-dimensional; select "
            f"[{part.columns!r}] instead."
        )
    if isinstance(part.columns, list) and _mentions(message, "'lower'"):
        note += f" For a transformer of texts, select one column, as in {part.columns[0]!r}."
    return note


def _mentions(message, *words):
    return any(word in message.lower() for word in words)


def _feature_names(transformer, input_features=None):
    """Ask a fitted transformer for its output names; None where it has none to give."""
    try:
        return transformer.get_feature_names_out(input_features)
    except (AttributeError, ValueError):
        return None


def _as_array(output, part, block, holds_tokens):
    """Turn a branch's output into an array of numbers, or of tokens, of the expected shape."""
    name = part.name
    output = np.asarray(output)
    if holds_tokens or output.dtype.kind != "f":
        try:
            output = (
                _checked_tokens(output) if holds_tokens else _as_floats(output, part)
            )
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Branch {name!r} returned {output.dtype} columns that are not numbers ({error}). "
                "End the branch with a transformer that returns numbers, such as FrozenEncoder or "
                "OneHotEncoder, or one column of tokens, such as FrozenEncoder(output='tokens')."
            ) from error
    expected = (len(part.rows), _width_of(block))
    if output.shape != expected:
        hint = ""
        if len(output) == 1 != len(part.rows) and isinstance(part.columns, list):
            # Vectorizers of texts iterate over a table's columns, not over its rows.
            hint = (
                f" If the transformer takes a single column of texts, select {part.columns[0]!r} "
                f"instead of {part.columns!r}."
            )
        raise ValueError(
            f"Branch {name!r} returned shape {output.shape}; {expected} was expected.{hint}"
        )
    return output


def _as_floats(output, part):
    """Turn objects into floats; text is refused, also a postal code that could be read as one."""
    if output.dtype.kind in "OUS":
        names = part.columns if isinstance(part.columns, list) else [part.columns]
        if (
            len(names) != np.shape(output)[-1]
        ):  # the branch does not hand columns on as they are
            names = range(np.shape(output)[-1])
        for name, cells in zip(names, np.atleast_2d(output.T), strict=True):
            text = next((cell for cell in cells if isinstance(cell, str | bytes)), None)
            if text is not None:
                raise TypeError(f"column {name!r} has text, such as {text!r:.60}")
    return np.where(pd.isna(output), np.nan, output).astype(np.float64)


def _checked_tokens(output):
    """Refuse cells that are neither arrays of vectors nor missing; the missing become None."""
    missing = missing_cells(output)
    for cell in output[~missing]:
        if not isinstance(cell, np.ndarray) or cell.ndim != 2 or cell.dtype.kind != "f":
            is_array = isinstance(cell, np.ndarray)
            got = (
                f"{cell.dtype} of shape {cell.shape}"
                if is_array
                else type(cell).__name__
            )
            raise TypeError(
                f"tokens are float arrays of shape (n_tokens, n_features), but a cell is {got}"
            )
    return np.where(missing, None, output)
