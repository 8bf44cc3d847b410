"""PerModalityUnion: one branch for each modality of a table, joined side by side."""

from collections import Counter
from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context, clone
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import Bunch, get_tags
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from sklembed import _callbacks
from sklembed._blocks import token_columns
from sklembed._callbacks import CallbackSupportMixin, with_callbacks
from sklembed._tables import (
    as_table,
    column_positions,
    is_frame,
    missing_cells,
    output_container,
    take_columns,
    take_rows,
)
from sklembed._validation import check_routing_enabled


class PerModalityUnion(CallbackSupportMixin, TransformerMixin, BaseEstimator):
    """Send each modality of a table through a branch of its own and join the results.

    A branch is a transformer, often a pipeline of an encoder and a projector, with the columns it
    reads, as in :class:`~sklearn.compose.ColumnTransformer`. Its output is a *block*: columns named
    ``<branch>__…``, side by side in the joined table.

    A row may lack a modality: where all cells that a branch reads are None or NaN, the branch never
    sees the row, neither in fit nor in transform, and the row's block is NaN. So any transformer
    with dense numeric output works in a branch. Downstream, XGBoost and
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

    Attributes
    ----------
    transformers_ : list of (str, transformer, columns) tuples
        The fitted branches, without the dropped ones; the remainder, if there is one, is the last.

    named_transformers_ : :class:`~sklearn.utils.Bunch`
        The fitted branches by name.

    blocks_ : dict of str to slice
        The columns of the output that each branch fills, and those of the indicator.

    holds_tokens_ : dict of str to bool
        Whether that block is a column of tokens.

    n_features_in_ : int
        Number of columns seen during fit.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where `X` has them.

    See Also
    --------
    sklearn.compose.ColumnTransformer : Does the same for rows that all have every modality.

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
        "remainder": [StrOptions({"drop", "passthrough"}), HasMethods(["fit", "transform"])],
        "n_jobs": [Integral, None],
        "transformer_weights": [dict, None],
        "add_indicator": ["boolean"],
    }

    def __init__(
        self,
        transformers,
        *,
        remainder="drop",
        n_jobs=None,
        transformer_weights=None,
        add_indicator=False,
    ):
        self.transformers = transformers
        self.remainder = remainder
        self.n_jobs = n_jobs
        self.transformer_weights = transformer_weights
        self.add_indicator = add_indicator

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
        if "transformers" in params:
            self.transformers = params.pop("transformers")
        if _are_branches(self.transformers) and any(n in params for n, _, _ in self.transformers):
            self.transformers = [
                (name, params.pop(name, transformer), columns)
                for name, transformer, columns in self.transformers
            ]
        return super().set_params(**params)

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=False)  # branches validate themselves
    def fit(self, X, y=None, **params):
        """Fit each branch on the rows that have its modality.

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
            or no row has a branch's modality.
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
            If a branch returns neither dense numbers nor tokens.
        """
        outputs, observed, X = self._fit_branches(
            _fit_transform_branch, "fit_transform", X, y, params
        )
        return self._join(outputs, observed, X)

    def transform(self, X, **params):
        """Run each branch on the rows that have its modality, and join the results.

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
            For what `fit` raises it, or if the output cannot hold tokens: it is polars, or numbers
            stand beside them and it is not pandas.
        TypeError
            If a branch returns neither dense numbers nor tokens.
        """
        check_is_fitted(self)
        check_routing_enabled(params, self)
        routed = process_routing(self, "transform", **params)
        X = as_table(X)
        if not (is_frame(X) and hasattr(self, "feature_names_in_")):
            validate_data(self, X, reset=False, skip_check_array=True)
        parts = [_part(X, name, columns) for name, _, columns in self.transformers_]
        observed = [np.flatnonzero(~_missing_rows(part)) for part in parts]
        outputs = Parallel(n_jobs=self.n_jobs)(
            delayed(_noting_branch)(
                _transform_branch,
                name,
                len(X),
                transformer,
                take_rows(part, rows),
                _cut_to_rows(routed[name]["transform"], rows, len(X)),
            )
            for (name, transformer, _), part, rows in zip(
                self.transformers_, parts, observed, strict=True
            )
        )
        return self._join(outputs, observed, X)

    def iter_parts(self, X):
        """Yield what each branch is shown of a table by fit; it need not be fitted.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_features)
            The table.

        Yields
        ------
        name : str
            The branch; dropped ones are left out, the remainder is the last.

        transformer : transformer or "passthrough"
            Its transformer, not fitted.

        part : DataFrame, Series or ndarray
            The columns that it reads, of the rows that have the modality.
        """
        X = as_table(X)
        for name, transformer, columns in self._branches(X):
            part = _part(X, name, columns)
            yield name, transformer, take_rows(part, np.flatnonzero(~_missing_rows(part)))

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
            len(input_features) != self.n_features_in_ or list(input_features) != list(seen)
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
            own = _feature_names(transformer, _names_of(columns, input_features))
            block = self.blocks_[name]
            own = range(block.stop - block.start) if own is None else own
            names += [f"{name}__{column}" for column in own]
        if self._has_indicator:
            names += [f"missing__{name}" for name, _, _ in self.transformers_]
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
        """Fit all branches; return their outputs, the rows each saw, and the table."""
        check_routing_enabled(params, self)
        self._check_transformers()
        self._check_weights()
        routed = process_routing(self, caller, **params)
        X = as_table(X)
        validate_data(self, X, skip_check_array=True)
        check_consistent_length(X, y)
        branches = self._branches(X)
        if not branches:
            raise ValueError("All branches are 'drop'; keep at least one, or set remainder.")
        parts = [_part(X, name, columns) for name, _, columns in branches]
        observed = [
            _observed_in_fit(part, name, columns)
            for part, (name, _, columns) in zip(parts, branches, strict=True)
        ]
        context = self._init_callback_context(max_subtasks=len(branches), sequential_subtasks=False)
        _callbacks.begin(self, context, X, y)
        tasks = [  # before the loop: it pickles the union, of which they change an attribute
            _callbacks.subtask(context, f"fit-{name}", 0, task_id=number)
            for number, (name, _, _) in enumerate(branches)
        ]
        results = Parallel(n_jobs=self.n_jobs)(
            delayed(_noting_branch)(
                _fit_with_callbacks,
                name,
                len(X),
                clone(_as_transformer(transformer)),
                take_rows(part, rows),
                None if y is None else take_rows(y, rows),
                {
                    method: _cut_to_rows(metadata, rows, len(X))
                    for method, metadata in routed[name].items()
                },
                run,
                self,
                task,
            )
            for (name, transformer, _), part, rows, task in zip(
                branches, parts, observed, tasks, strict=True
            )
        )
        fitted, outputs, widths, holds_tokens = zip(*results, strict=True)
        self.transformers_ = [
            (name, transformer, columns)
            for transformer, (name, _, columns) in zip(fitted, branches, strict=True)
        ]
        self.blocks_ = _side_by_side(
            {name: width for (name, _, _), width in zip(branches, widths, strict=True)}
            | ({"missing": len(branches)} if self.add_indicator else {})
        )
        self.holds_tokens_ = dict.fromkeys(self.blocks_, False) | {
            name: holds for (name, _, _), holds in zip(branches, holds_tokens, strict=True)
        }
        _callbacks.end(self, context, X, y)
        return outputs, observed, X

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
            (name, transformer, _resolve(X, name, columns, flat=not _is_passthrough(transformer)))
            for name, transformer, columns in branches
            if not _is_dropped(transformer)
        ]

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
            if not (_is_dropped(transformer) or hasattr(_as_transformer(transformer), "transform")):
                raise TypeError(
                    f"Branch {name!r} needs a transformer, 'passthrough' or 'drop'; got "
                    f"{transformer!r}."
                )
        self._check_names([name for name, _, _ in self.transformers])

    def _check_names(self, names):
        """Refuse names of branches that could not be told apart later."""
        for name, times in Counter(names).items():
            if times > 1:
                raise ValueError(f"Branch names must differ, but {name!r} stands {times} times.")
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

    def _check_weights(self):
        """Refuse weights of branches that there are not, and what is no weight."""
        known = [name for name, _ in self._transformers_by_name()]
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

    def _join(self, outputs, observed, X):
        """Scatter each branch's rows into its block, leaving the others missing, and weight it."""
        names = [name for name, _, _ in self.transformers_]
        tokens = [
            name
            for name, output in zip(names, outputs, strict=True)
            # Fit may have been shown a cell that gave none, such as a picture that is damaged.
            if self.holds_tokens_[name] or _holds_tokens(output)
        ]
        self._check_container(tokens)
        outputs = [
            None
            if output is None
            else _as_array(output, name, len(rows), self.blocks_[name], name in tokens)
            for name, output, rows in zip(names, outputs, observed, strict=True)
        ]
        dtypes = [o.dtype for o in outputs if o is not None and o.dtype != object]
        joined = np.full(
            (len(X), max(block.stop for block in self.blocks_.values())),
            np.nan,
            dtype=np.result_type(*dtypes) if dtypes else np.float64,
        )
        blocks = {name: joined[:, block] for name, block in self.blocks_.items()}
        blocks |= {name: np.full((len(X), 1), None, dtype=object) for name in tokens}
        weights = self.transformer_weights or {}
        for name, output, rows in zip(names, outputs, observed, strict=True):
            _fill(blocks[name], output, rows, float(weights.get(name, 1)))
        if self._has_indicator:
            blocks["missing"][:] = _indicator(observed, len(X))
        if len(tokens) == len(blocks):
            return np.hstack(list(blocks.values()))
        if tokens:
            joined = pd.DataFrame(joined, index=getattr(X, "index", None), copy=False)
            for name in tokens:
                joined.isetitem(self.blocks_[name].start, blocks[name][:, 0])
        return joined

    def _check_container(self, tokens):
        """Refuse output that cannot hold the tokens of these branches."""
        container = output_container(self)
        numbers = [name for name in self.blocks_ if name not in tokens]
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
    def _has_indicator(self):
        """Whether fit added the indicator; the parameter may have been set since."""
        return len(self.blocks_) > len(self.transformers_)

    def _sk_visual_block_(self):
        return ColumnTransformer(self.transformers, remainder=self.remainder)._sk_visual_block_()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        # Rows of NaN never reach a branch; single numbers that are missing do.
        tags.input_tags.allow_nan = all(
            isinstance(transformer, str) or get_tags(transformer).input_tags.allow_nan
            for _, transformer in self._transformers_by_name()
        )
        return tags


def _are_branches(transformers):
    """Tell whether `transformers` has the right form; get_params is asked before it is checked."""
    return isinstance(transformers, list) and all(
        isinstance(branch, tuple | list) and len(branch) == 3 for branch in transformers
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


def _part(X, name, columns):
    """Cut a branch's columns out of the table."""
    positions, scalar = column_positions(X, columns, owner=f"Branch {name!r}")
    return take_columns(X, positions, scalar=scalar)


def _names_of(columns, input_features):
    """Name the input columns of a fitted branch, whose selection is names or positions."""
    columns = [columns] if isinstance(columns, str | Integral) else columns
    return [c if isinstance(c, str) else input_features[c] for c in columns]


def _missing_rows(part):
    """Tell which rows lack a modality: those with no value in any of its columns."""
    missing = missing_cells(part)
    return missing if missing.ndim == 1 else missing.all(axis=1)


def _observed_in_fit(part, name, columns):
    """Return the positions of the rows that have the modality, of which there must be one."""
    observed = np.flatnonzero(~_missing_rows(part))
    if not len(observed):
        raise ValueError(
            f"Branch {name!r} has nothing to learn from: column {columns!r} is missing in all "
            f"{len(part)} rows. Drop the branch, or check the column."
        )
    return observed


def _cut_to_rows(metadata, rows, n_rows):
    """Cut metadata that has one entry a row to the given rows, and leave the rest alone."""
    return {
        key: take_rows(value, rows) if _has_rows(value, n_rows) else value
        for key, value in metadata.items()
    }


def _has_rows(value, n_rows):
    return hasattr(value, "__len__") and not isinstance(value, str | dict) and len(value) == n_rows


def _is_passthrough(transformer):
    return isinstance(transformer, str) and transformer == "passthrough"


def _as_transformer(transformer):
    """Return what stands for a branch's transformer: for "passthrough", the identity."""
    if _is_passthrough(transformer):
        return FunctionTransformer(feature_names_out="one-to-one")
    return transformer


def _fit_with_callbacks(transformer, X, y, params, run, union, task):
    """Fit a branch as a task of the union; its transformer is handed the callbacks."""
    with _callbacks.fitting(union, task, transformer, X, y):
        return run(transformer, X, y, params)


def _fit_branch(transformer, X, y, params):
    transformer.fit(X, y, **params["fit"])
    names = _feature_names(transformer)
    if names is not None and len(names) != 1:
        return transformer, None, len(names), False
    # Nothing but its cells tells a column of tokens from one of numbers.
    output = transformer.transform(take_rows(X, [0]))
    return transformer, None, _width(output), _holds_tokens(output)


def _fit_transform_branch(transformer, X, y, params):
    if hasattr(transformer, "fit_transform"):
        output = transformer.fit_transform(X, y, **params["fit_transform"])
    else:
        output = transformer.fit(X, y, **params["fit"]).transform(X, **params["transform"])
    return transformer, output, _width(output), _holds_tokens(output)


def _transform_branch(transformer, X, params):
    return transformer.transform(X, **params) if len(X) else None


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


def _side_by_side(widths):
    """Turn the widths of blocks into the slices that they fill, one after the other."""
    ends = np.cumsum(list(widths.values())).tolist()
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def _fill(block, output, rows, weight):
    """Scatter what a branch returned for these rows into its block, and weight it."""
    if output is not None:
        block[rows] = output
    if weight != 1:
        np.multiply(block, weight, out=block, where=~missing_cells(block))


def _indicator(observed, n_rows):
    """Say by 1 which rows lack each branch's modality, given those that have it."""
    missing = np.ones((n_rows, len(observed)))
    for column, rows in enumerate(observed):
        missing[rows, column] = 0
    return missing


def _noting_branch(run, name, n_rows, transformer, X, *rest):
    """Run a branch; an error that leaves it says which branch it was and what rows it saw."""
    try:
        return run(transformer, X, *rest)
    except Exception as error:
        seen = "all rows" if len(X) == n_rows else f"the {len(X)} of {n_rows} rows that it has"
        error.add_note(f"This was in branch {name!r} of PerModalityUnion, which was given {seen}.")
        raise


def _feature_names(transformer, input_features=None):
    """Ask a fitted transformer for its output names; None where it has none to give."""
    try:
        return transformer.get_feature_names_out(input_features)
    except (AttributeError, ValueError):
        return None


def _as_array(output, name, n_rows, block, holds_tokens):
    """Turn a branch's output into an array of numbers, or of tokens, of the expected shape."""
    if hasattr(output, "toarray"):
        raise TypeError(
            f"Branch {name!r} returned a sparse matrix; the union joins dense columns. Ask the "
            "transformer for dense output, or add a TruncatedSVD to the branch."
        )
    output = np.asarray(output)
    if holds_tokens or output.dtype.kind != "f":
        try:
            output = _checked_tokens(output) if holds_tokens else _as_floats(output)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Branch {name!r} returned {output.dtype} columns that are not numbers ({error}). "
                "End the branch with a transformer that returns numbers, such as FrozenEncoder or "
                "OneHotEncoder(sparse_output=False), or one column of tokens, such as "
                "FrozenEncoder(output='tokens')."
            ) from error
    expected = (n_rows, block.stop - block.start)
    if output.shape != expected:
        raise ValueError(f"Branch {name!r} returned shape {output.shape}; {expected} was expected.")
    return output


def _as_floats(output):
    return np.where(pd.isna(output), np.nan, output).astype(np.float64)


def _checked_tokens(output):
    """Refuse cells that are neither arrays of vectors nor missing; the missing become None."""
    missing = missing_cells(output)
    for cell in output[~missing]:
        if not isinstance(cell, np.ndarray) or cell.ndim != 2 or cell.dtype.kind != "f":
            is_array = isinstance(cell, np.ndarray)
            got = f"{cell.dtype} of shape {cell.shape}" if is_array else type(cell).__name__
            raise TypeError(
                f"tokens are float arrays of shape (n_tokens, n_features), but a cell is {got}"
            )
    return np.where(missing, None, output)
