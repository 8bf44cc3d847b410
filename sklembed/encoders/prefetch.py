"""prefetch: encode the cells of a pipeline or a search once, before workers start."""

from numbers import Integral

import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid, ParameterSampler

from sklembed._table.columns import as_table, column_positions, take_columns
from sklembed.encoders.frozen import FrozenEncoder, frozen_encoders
from sklembed.encoders.joint import fill_stores

_INNER_PARAMETERS = ("estimator", "regressor")


def prefetch(estimator, X):
    """Encode all cells that fitting an estimator or a search on `X` needs.

    The cells are encoded in this process. Encoders of one model that differ only in
    pooling, layers and normalisation share the passes through it.

    Workers of ``GridSearchCV(n_jobs=k)`` then read all vectors from the store, so that
    none loads a model or uses the accelerator. Without prefetching each cell is encoded
    once as well, but by the first worker that needs it, and each worker has a copy of
    the model.

    The steps before an encoder (selected columns, cleaning steps) are replayed on all
    rows of `X`, without labels. If a cleaning step learns from the rows, the cells of a
    fold may differ from these. Such cells are encoded in the fold, so that results are
    the same as without prefetching.

    Parameters
    ----------
    estimator : estimator or search
        A :class:`FrozenEncoder`, or an estimator that contains some: pipelines,
        :class:`PerModalityUnion`, :class:`~sklearn.compose.ColumnTransformer`, feature
        unions, ensembles and other estimators that pass `X` on, and grid or randomised
        searches over these, whose candidates may differ in their encoders.

    X : DataFrame or array-like of shape (n_samples, n_features)
        The table that will be passed to `fit`.

    Returns
    -------
    report : DataFrame
        A row for each encoder and setting: its "path" in the estimator, the "model",
        its "pooling" and "layer", "unit_length", whether vectors have length 1, the
        number of distinct "cells" (the maximum over candidates), and the number of
        cells "encoded" by this call.

    Raises
    ------
    ValueError
        If there is no encoder, an encoder has no store or its input cannot be
        determined, or the `random_state` of a randomised search is not an integer, so
        that its candidates are unknown.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklembed import CallableBackend, FrozenEncoder, prefetch
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> shape = CallableBackend(
    ...     load, name="lengths", version="1", modality="text", n_features=2
    ... )
    >>> encoder = FrozenEncoder(shape, store=tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> pipeline = make_pipeline(encoder, LogisticRegression())
    >>> search = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 1]})
    >>> prefetch(search, ["a red cat", "blue", "blue"])
                path    model pooling layer  unit_length  cells  encoded
    0  frozenencoder  lengths    None  None        False      2        2
    """
    jobs = []
    for candidate in _candidates(estimator):
        jobs += list_jobs(candidate, X)
    if not jobs:
        raise ValueError(
            f"{estimator!r} contains no FrozenEncoder: there is nothing to encode."
        )
    for path, encoder, _ in jobs:
        if encoder.store is None:
            raise ValueError(
                f"The encoder {path!r} has store=None, so its vectors would be lost. "
                "Give it a store."
            )
    paths, encoders, parts = zip(*jobs, strict=True)
    report = pd.DataFrame(fill_stores(zip(encoders, parts, strict=True)))
    report["path"] = paths
    by = report.groupby(["path", "fingerprint"], sort=False)
    how = dict.fromkeys(["model", "pooling", "layer", "unit_length"], "first")
    report = by.agg(how | {"cells": "max", "encoded": "sum"}).reset_index()
    return report.drop(columns="fingerprint")


def _candidates(estimator):
    """Yield the candidates of a search whose encoders or their input differ."""
    if not _is_search(estimator):
        yield estimator
        return
    keys = set()
    # A list keeps the values alive, so that no two have the same id.
    for setting in list(_settings(estimator)):
        # As in the search, each candidate has clones of the values.
        values = {name: clone(value, safe=False) for name, value in setting.items()}
        candidate = clone(estimator.estimator).set_params(**values)
        later_steps = _prefixes_of_later_steps(candidate)
        ids = []
        for name, value in setting.items():
            if not f"{name}__".startswith(later_steps):
                ids.append((name, id(value)))
        if tuple(ids) not in keys:
            keys.add(tuple(ids))
            yield candidate


def _is_search(estimator):
    return hasattr(estimator, "param_grid") or hasattr(estimator, "param_distributions")


def _prefixes_of_later_steps(pipeline):
    """Return the parameter prefixes of steps after the last encoder.

    They do not change the input of any encoder.
    """
    prefixes = []
    for name, step in getattr(pipeline, "steps", [])[::-1]:
        if contains_encoder(step):
            return tuple(prefixes)
        prefixes.append(f"{name}__")
    return ()


def _settings(search):
    """List the parameter settings of a search's candidates."""
    if hasattr(search, "param_grid"):
        return ParameterGrid(search.param_grid)
    later_steps = _prefixes_of_later_steps(search.estimator)
    changes_encoders = False
    for name in search.param_distributions:
        if not f"{name}__".startswith(later_steps):
            changes_encoders = True
    if later_steps and not changes_encoders:
        return [{}]  # the encoders are those of the estimator, whatever is drawn
    if not isinstance(search.random_state, Integral) or not hasattr(search, "n_iter"):
        raise ValueError(
            f"The candidates of {type(search).__name__} cannot be known beforehand. "
            "Give it an integer random_state, or prefetch the encoders themselves."
        )
    return ParameterSampler(
        search.param_distributions, search.n_iter, random_state=search.random_state
    )


def list_jobs(estimator, X):
    """List the paths of the encoders in an estimator, the encoders, and their input."""
    jobs, paths = [], set()
    for path, encoder, part in _walk(estimator, X, ()):
        paths.add(path)
        if part is not None:
            jobs.append((path, encoder, part))
    unreachable = [path for path in frozen_encoders(estimator) if path not in paths]
    if unreachable:
        raise ValueError(
            f"prefetch cannot determine the input of the encoders {unreachable}. "
            "Transform their columns by them once, with the same store, instead."
        )
    return jobs


def _walk(estimator, X, path):
    """Yield the path of each encoder, the encoder and its part of X.

    The part is None in a branch that `fit` does not run.
    """
    if isinstance(estimator, FrozenEncoder):
        yield "__".join(path), estimator, X
    elif X is None:
        for name, encoder in frozen_encoders(estimator).items():
            yield "__".join((*path, name)), encoder, None
    elif _is_search(estimator):
        for candidate in _candidates(estimator):
            yield from _walk(candidate, X, (*path, "estimator"))
    elif hasattr(estimator, "steps"):
        yield from _walk_steps(estimator.steps, X, path)
    elif hasattr(estimator, "make_union"):  # a MultimodalVectorizer
        # Its own encoders are templates, which the union has a clone of for each column.
        yield from _walk(estimator, None, path)
        union, columns = estimator.make_union(X)
        yield from _walk(union, columns, path)
    else:
        for name, inner, part in _parts(estimator, X):
            if contains_encoder(inner):
                yield from _walk(inner, part, (*path, name))


def _walk_steps(steps, X, path):
    """Walk a pipeline up to its last encoder, replaying the steps before it."""
    n_encoders = sum(contains_encoder(step) for _, step in steps)
    for name, step in steps:
        if contains_encoder(step):
            yield from _walk(step, X, (*path, name))
            n_encoders -= 1
        if n_encoders == 0:
            return
        if step is None or step == "passthrough":
            continue
        try:
            X = clone(step).fit_transform(X)
        except Exception as error:
            error.add_note(
                f"prefetch replays the step {'__'.join((*path, name))!r} on all rows, "
                "without labels, because an encoder comes after it."
            )
            raise


def _parts(estimator, X):
    """Yield the names of inner estimators, the estimators, and their parts of X."""
    if hasattr(estimator, "iter_parts"):  # a PerModalityUnion
        part_of_branch = {name: part for name, _, part in estimator.iter_parts(X)}
        remainder = ("remainder", estimator.remainder, None)
        for name, inner, _ in [*estimator.transformers, remainder]:
            yield name, inner, part_of_branch.get(name)
    elif hasattr(estimator, "transformers"):  # a ColumnTransformer
        X = as_table(X)
        for name, inner, columns in estimator.transformers:
            if not contains_encoder(inner):
                continue
            owner = f"the branch {name!r}"
            positions, scalar = column_positions(X, columns, owner=owner)
            part = None
            if positions:
                part = take_columns(X, positions, scalar=scalar)
            yield name, inner, part
    else:
        for name, inner in getattr(estimator, "transformer_list", ()):
            yield name, inner, X
        ensemble = getattr(estimator, "estimators", ())
        if isinstance(ensemble, list):
            for name, inner in ensemble:
                yield name, inner, X
        for name in _INNER_PARAMETERS:
            if hasattr(estimator, name):
                yield name, getattr(estimator, name), X


def contains_encoder(estimator) -> bool:
    """Return whether an estimator is or contains an encoder, or makes some in `fit`."""
    if not hasattr(estimator, "get_params"):
        return False
    for value in [estimator, *estimator.get_params(deep=True).values()]:
        if isinstance(value, FrozenEncoder) or hasattr(value, "make_union"):
            return True
    return False
