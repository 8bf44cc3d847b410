"""prefetch: encode once, in the parent, what a pipeline or a search is going to ask for."""

from numbers import Integral

import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid, ParameterSampler

from sklembed._table.columns import as_table, column_positions, take_columns
from sklembed.encoders.frozen import FrozenEncoder

_INNER = ("estimator", "regressor")


def prefetch(estimator, X):
    """Encode every cell that fitting an estimator or a search on `X` will ask for, in this process.

    Workers of ``GridSearchCV(n_jobs=k)`` then find all vectors in the store, so that none loads a
    model or touches the accelerator. Without it each cell is encoded once as well, but by whichever
    worker comes first, each with a copy of the model.

    What comes before an encoder (selected columns, cleaning steps) is replayed on all rows of `X`,
    without labels. Where a cleaning step learns from the rows, a fold's cells may differ from
    these; those are encoded in the fold, so that results are the same as without prefetching.

    Parameters
    ----------
    estimator : estimator or search
        A :class:`FrozenEncoder`, or what holds some: pipelines, :class:`PerModalityUnion`,
        :class:`~sklearn.compose.ColumnTransformer`, feature unions, ensembles and other estimators
        that hand their `X` on, and grid or randomised searches over these, whose candidates may
        differ in their encoders.

    X : DataFrame or array-like of shape (n_samples, n_features)
        The table that will be passed to `fit`.

    Returns
    -------
    report : DataFrame
        A row for each encoder and setting: its "path" in the estimator, the "model", how many
        distinct "cells" reach it (the most of any candidate), and how many were "encoded" now.

    Raises
    ------
    ValueError
        If there is no encoder, one has no store, one is out of reach, or the candidates of a
        randomised search cannot be known because its `random_state` is not an integer.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklembed import CallableBackend, FrozenEncoder, prefetch
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> shape = CallableBackend(load, name="lengths", version="1", modality="text", n_features=2)
    >>> encoder = FrozenEncoder(shape, store=tempfile.mkdtemp() + "/embeddings.sqlite")
    >>> pipeline = make_pipeline(encoder, LogisticRegression())
    >>> search = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 1]})
    >>> prefetch(search, ["a red cat", "blue", "blue"])
                path    model  cells  encoded
    0  frozenencoder  lengths      2        2
    """
    jobs = [job for candidate in _candidates(estimator) for job in _jobs(candidate, X)]
    if not jobs:
        raise ValueError(
            f"{estimator!r} holds no FrozenEncoder: there is nothing to encode."
        )
    for path, encoder, _ in jobs:
        if encoder.store is None:
            raise ValueError(
                f"The encoder {path!r} has store=None, so what is encoded now would be lost. Give "
                "it a store."
            )
    encoded = [
        {"path": path} | encoder._fill_store(part) for path, encoder, part in jobs
    ]
    by = ["path", "model", "fingerprint"]
    report = pd.DataFrame(encoded).groupby(by, sort=False, as_index=False, dropna=False)
    return report.agg({"cells": "max", "encoded": "sum"}).drop(columns="fingerprint")


def _candidates(estimator):
    """Yield the estimators that a search is going to fit, as far as their encoders differ."""
    if not _is_search(estimator):
        yield estimator
        return
    seen = set()
    for setting in _settings(estimator):
        # As in the search, what is set is the candidate's own.
        own = {name: clone(value, safe=False) for name, value in setting.items()}
        candidate = clone(estimator.estimator).set_params(**own)
        later = _later_steps(candidate)
        key = frozenset(
            (name, id(value))
            for name, value in setting.items()
            if not f"{name}__".startswith(later)
        )
        if key not in seen:
            seen.add(key)
            yield candidate


def _is_search(estimator):
    return hasattr(estimator, "param_grid") or hasattr(estimator, "param_distributions")


def _later_steps(pipeline):
    """Return the prefixes of parameters of steps after the last encoder, which it cannot feel."""
    later = []
    for name, step in getattr(pipeline, "steps", [])[::-1]:
        if _holds_encoder(step):
            return tuple(later)
        later.append(f"{name}__")
    return ()


def _settings(search):
    """List the parameter settings of a search's candidates."""
    if hasattr(search, "param_grid"):
        return ParameterGrid(search.param_grid)
    later = _later_steps(search.estimator)
    if later and all(
        f"{name}__".startswith(later) for name in search.param_distributions
    ):
        return [{}]  # whatever is drawn, the encoders are those of the estimator
    if not isinstance(search.random_state, Integral) or not hasattr(search, "n_iter"):
        raise ValueError(
            f"The candidates of {type(search).__name__} cannot be known beforehand. Give it an "
            "integer random_state, or prefetch the encoders themselves."
        )
    return ParameterSampler(
        search.param_distributions, search.n_iter, random_state=search.random_state
    )


def _jobs(estimator, X):
    """List the encoders within an estimator, by path, with the columns that reach them."""
    jobs = list(_walk(estimator, X, ()))
    reached = {path for path, _, _ in jobs}
    jobs = [job for job in jobs if job[2] is not None]
    lost = [
        name
        for name, value in estimator.get_params(deep=True).items()
        if isinstance(value, FrozenEncoder) and name not in reached
    ]
    if lost:
        raise ValueError(
            f"prefetch cannot tell what reaches the encoders {lost}. Transform their columns by "
            "them once, with the same store, instead."
        )
    return jobs


def _walk(estimator, X, path):
    """Yield each encoder's path, the encoder and what reaches it of X."""
    if isinstance(estimator, FrozenEncoder):
        yield "__".join(path), estimator, X
    elif X is None:  # a branch that fit does not run: nothing reaches its encoders
        for name, inner in estimator.get_params(deep=True).items():
            if isinstance(inner, FrozenEncoder):
                yield "__".join((*path, name)), inner, None
    elif _is_search(estimator):
        for candidate in _candidates(estimator):
            yield from _walk(candidate, X, (*path, "estimator"))
    elif hasattr(estimator, "steps"):
        yield from _walk_steps(estimator.steps, X, path)
    else:
        for name, inner, part in _parts(estimator, X):
            if _holds_encoder(inner):
                yield from _walk(inner, part, (*path, name))


def _walk_steps(steps, X, path):
    """Walk a pipeline up to its last encoder, replaying the steps before it."""
    holding = [i for i, (_, step) in enumerate(steps) if _holds_encoder(step)]
    for i, (name, step) in enumerate(steps[: holding[-1] + 1] if holding else ()):
        if i in holding:
            yield from _walk(step, X, (*path, name))
        if i < holding[-1] and step is not None and step != "passthrough":
            try:
                X = clone(step).fit_transform(X)
            except Exception as error:
                error.add_note(
                    f"prefetch replays the step {'__'.join((*path, name))!r} on all rows, without "
                    "labels, because an encoder comes after it."
                )
                raise


def _parts(estimator, X):
    """Yield the estimators that another hands X on to, by name, and what of X each is handed."""
    if hasattr(estimator, "iter_parts"):
        parts = {name: part for name, _, part in estimator.iter_parts(X)}
        for name, inner, _ in [
            *estimator.transformers,
            ("remainder", estimator.remainder, None),
        ]:
            yield name, inner, parts.get(name)
    elif hasattr(estimator, "transformers"):  # a ColumnTransformer
        X = as_table(X)
        for name, inner, columns in estimator.transformers:
            if _holds_encoder(inner):
                positions, scalar = column_positions(
                    X, columns, owner=f"the branch {name!r}"
                )
                part = take_columns(X, positions, scalar=scalar) if positions else None
                yield name, inner, part
    else:
        for name, inner in getattr(estimator, "transformer_list", ()):
            yield name, inner, X
        ensemble = getattr(estimator, "estimators", ())
        for name, inner in ensemble if isinstance(ensemble, list) else ():
            yield name, inner, X
        for name in _INNER:
            if hasattr(estimator, name):
                yield name, getattr(estimator, name), X


def _holds_encoder(estimator):
    if not hasattr(estimator, "get_params"):
        return False
    values = [estimator, *estimator.get_params(deep=True).values()]
    return any(isinstance(value, FrozenEncoder) for value in values)
