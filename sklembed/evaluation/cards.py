"""model_card: what a model is made of, how it was evaluated, and its limitations."""

import inspect
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from numbers import Integral
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import cross_validate
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sklembed._table.columns import as_frame, missing_cells
from sklembed._validation import check_no_missing_label, is_a_classifier
from sklembed.encoders import FrozenEncoder
from sklembed.encoders.cells import shorten
from sklembed.evaluation.leaks import LeakReport
from sklembed.evaluation.modalities import ModalityReport
from sklembed.evaluation.provenance import describe_encoders, fitted_encoders
from sklembed.vectorizer import MultimodalVectorizer
from sklembed.vectorizer.kinds import read_column

_PACKAGES = (
    *("sklembed", "scikit-learn", "numpy", "scipy", "pandas", "skrub"),
    *("torch", "transformers", "tokenizers", "pillow", "peft"),
)
_MOST_ROWS = 50  # of a table of columns, or of classes
_FEW_ROWS = 10  # of a class
# Parameters that contain paths of this machine and do not change predictions.
_LOCAL = {"store", "memory"}
_LONGEST_VALUE = 80
# In a repr: its quote, and the last part of the path.
_ABSOLUTE_PATH = re.compile(
    r"""(['"])(?:/(?!\1)|~[^/'"]*/|[A-Za-z]:[/\\]|\\{4})"""
    r"""(?:(?!\1).)*?((?:(?!\1)[^/\\])*)[/\\]*\1"""
)


def model_card(
    pipeline,
    X=None,
    y=None,
    *,
    scores=None,
    cv=None,
    groups=None,
    scoring=None,
    leaks=None,
    modalities=None,
    description="",
    limitations=(),
    licenses=None,
    directory="model",
    download=False,
):
    """Write a model card of a fitted model, as a ``skops.card.Card``.

    The card lists the encoders with the commit or digest of their weights and their
    license, the training table, the scores of each fold, the results of reports, known
    limitations, code that loads the model, and the versions of packages. It contains
    names of columns and classes, but no cells of the table and no paths of the machine.
    Nothing is fitted or encoded, unless `cv` asks for scores.

    Parameters
    ----------
    pipeline : estimator
        The fitted classifier or regressor.

    X : DataFrame, Series or array-like of shape (n_samples, ...), default=None
        The training table. If None, the section on data lists the columns that a
        :class:`~sklembed.MultimodalVectorizer` in the pipeline has read.

    y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
        The training target.

    scores : dict, DataFrame or array-like of shape (n_folds,), default=None
        Scores of each fold that are already known: the result of
        :func:`~sklearn.model_selection.cross_validate` or
        :func:`~sklearn.model_selection.cross_val_score`. If None, they are computed
        with `cv`; without `cv`, they are those of the best candidate if `pipeline` is a
        search, or those of the report `leaks`.

    cv : int, cross-validation splitter or iterable, default=None
        Folds. If `scores` is None, a clone of `pipeline` is fitted on each. Otherwise
        the card states that `scores` are on these folds.

    groups : array-like of shape (n_samples,), default=None
        Groups for `cv`.

    scoring : str, callable, list or dict, default=None
        Scores to compute with `cv`, as in
        :func:`~sklearn.model_selection.cross_validate`.

    leaks : LeakReport, default=None
        Result of :func:`leak_report`.

    modalities : ModalityReport, default=None
        Result of :func:`modality_report`.

    description : str, default=""
        What the model is for, in Markdown.

    limitations : sequence of str, default=()
        Further limitations. They follow those that are found in the model and reports.

    licenses : dict of str to str, default=None
        Licenses of encoders by the name in the card. The license of another encoder is
        the one that the model page (README.md) in its directory or in the cache of the
        hub states, or the metadata of the package that contains it, or "unknown".

    directory : str or Path, default="model"
        Directory of the saved model, as the code that loads it names it.

    download : bool, default=False
        Whether to download the model page of hub models for their license. Otherwise
        the network is not used.

    Returns
    -------
    card : skops.card.Card
        The card. Extend it by ``card.add(**{"Intended use": "..."})``, and write it by
        ``card.save("README.md")``.

    Raises
    ------
    ImportError
        If skops is not installed.
    NotFittedError
        If `pipeline` is not fitted.
    TypeError
        If `pipeline` does not predict, or `leaks` or `modalities` is not a report of that type.
    ValueError
        If lengths differ, `scores` has no fold, `cv` is passed without data, a license
        is passed for an unknown model, or `leaks` is a report on another table.

    See Also
    --------
    leak_report : Find near duplicates between training and test rows.
    modality_report : Measure the value of each modality.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklembed.evaluation import model_card
    >>> X, y = load_iris(return_X_y=True, as_frame=True)
    >>> model = LogisticRegression(max_iter=500).fit(X, y)
    >>> card = model_card(model, X, y, scores=[0.96, 0.98, 0.97])
    >>> print(card.select("Evaluation/Scores").format())
    Mean over 3 folds ± standard deviation: score 0.970 ± 0.010.
    <BLANKLINE>
    | fold | score |
    | :--: | :---: |
    |  0   | 0.960 |
    |  1   | 0.980 |
    |  2   | 0.970 |
    """
    if find_spec("skops") is None:
        raise ImportError(
            "model_card needs skops, which the extra 'card' installs: pip install "
            "'sklembed[card]'."
        )
    _check_input(pipeline, X, y, scores, cv, leaks, modalities)
    encoders = fitted_encoders(pipeline)
    licenses = dict(licenses or {})
    _check_licenses(licenses, encoders)
    table = None if X is None else as_frame(X)
    columns = _describe_columns(pipeline, table)

    from skops.card import Card

    card = Card(pipeline, model_diagram=False, template=None)
    card.add(**{"Model description": _describe_model(pipeline, description)})
    _add_table(card, "Model description/Parameters", _changed_parameters(pipeline))
    _add_table(card, "Encoders", describe_encoders(encoders, licenses, download))
    card.add(Data=_describe_size(table, columns))
    _add_table(card, "Data/Columns", columns)
    if y is not None:
        _add_table(card, "Data/Target", _describe_target(y, is_a_classifier(pipeline)))
    scores = _find_scores(pipeline, X, y, scores, cv, groups, scoring, leaks)
    _add_evaluation(card, scores, cv, leaks, modalities)
    reasons = [
        *_limitations_of_model(pipeline, encoders, y),
        *_limitations_of_evaluation(scores, leaks, modalities),
        *limitations,
    ]
    card.add(Limitations="\n".join(f"- {reason}" for reason in reasons))
    card.add(**{"How to load and predict": _usage(pipeline, directory)})
    _add_table(card, "Versions", _versions())
    return card


def _check_input(pipeline, X, y, scores, cv, leaks, modalities):
    """Validate parameters before any work."""
    if isinstance(pipeline, type) or not hasattr(pipeline, "predict"):
        raise TypeError(
            f"pipeline must be a fitted classifier or regressor; got {pipeline!r}."
        )
    check_is_fitted(pipeline)
    if leaks is not None and not isinstance(leaks, LeakReport):
        raise TypeError(f"leaks must be the result of leak_report; got {leaks!r}.")
    if modalities is not None and not isinstance(modalities, ModalityReport):
        raise TypeError(
            f"modalities must be the result of modality_report; got {modalities!r}."
        )
    if y is not None:
        check_no_missing_label(y)
    if X is not None and y is not None:
        check_consistent_length(X, y)
    if cv is not None and scores is None and (X is None or y is None):
        raise ValueError("Scores with cv need the data. Pass X and y, or scores.")
    n_rows = None
    for rows in (X, y):
        if rows is not None:
            n_rows = rows.shape[0] if hasattr(rows, "shape") else len(rows)
    if leaks is not None and n_rows not in (None, len(leaks.groups_)):
        raise ValueError(
            f"leaks is a report on {len(leaks.groups_)} rows, but the data have "
            f"{n_rows}. Pass the report on the training table."
        )


def _check_licenses(licenses, encoders):
    names = sorted({encoder.name for encoder in encoders})
    for name in licenses:
        if name not in names:
            raise ValueError(
                f"licenses has {name!r}, but the encoders of the model are {names}."
            )


class _Scores(NamedTuple):
    """Scores of each fold."""

    by_fold: pd.DataFrame  # empty if there are none
    source: str = ""
    is_optimistic: bool = False


def _find_scores(pipeline, X, y, scores, cv, groups, scoring, leaks):
    """Return the scores that are passed, computed or known from a search or report."""
    if scores is not None:
        return _Scores(_read_scores(scores))
    if cv is not None:
        params = None if groups is None else {"groups": groups}
        scores = cross_validate(
            clone(pipeline), X, y, cv=cv, scoring=scoring, params=params
        )
        return _Scores(_read_scores(scores))
    scores = _scores_of_best_candidate(pipeline)
    if scores:
        source = "They are the scores of the best candidate of a search."
        return _Scores(_read_scores(scores), source, is_optimistic=True)
    if leaks is not None:
        by_fold = leaks.scores_[leaks.scores_["arm"] == "all rows"]
        by_fold = by_fold[leaks.score_names_].reset_index(drop=True)
        return _Scores(by_fold, "They are the scores of all rows in the leak report.")
    return _Scores(pd.DataFrame())


def _scores_of_best_candidate(search):
    """Return the scores of each fold of the best candidate; empty without a search."""
    columns: dict[str, list] = {}
    if not hasattr(search, "cv_results_") or not hasattr(search, "best_index_"):
        return columns
    for key, values in search.cv_results_.items():
        match = re.fullmatch(r"split\d+_(test_.*)", key)
        if match:
            columns.setdefault(match[1], []).append(values[search.best_index_])
    return columns


def _read_scores(scores):
    """Return results of cross-validation as a DataFrame of scores."""
    if not isinstance(scores, Mapping | pd.DataFrame):
        scores = {"test_score": scores}
    columns = {}
    for name in scores:
        if str(name).startswith("test_"):
            values = np.asarray(scores[name], dtype=np.float64)
            columns[str(name).removeprefix("test_")] = np.atleast_1d(values)
    if not columns or not all(len(values) for values in columns.values()):
        raise ValueError(
            "scores must be the result of cross_validate, with keys such as "
            f"'test_score', or an array of a score for each fold; got {scores!r}."
        )
    return pd.DataFrame(columns)


def _add_table(card, title, table):
    """Add a table to a card, with its index if that has names; nothing if it is empty."""
    if not len(table):
        return
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names=table.index.name or "")
    columns = {}
    for name in table.columns:
        columns[_escape(name)] = [_escape(value) for value in table[name]]
    card.add_table(**{title: columns})


def _escape(value):
    """Return a value as the cell of a table in Markdown."""
    if isinstance(value, float):
        value = f"{value:.3f}"
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def _describe_model(pipeline, description):
    """Return the purpose and the steps of a model."""
    kind = "Regressor"
    if is_a_classifier(pipeline):
        kind = "Classifier"
    classes = getattr(pipeline, "classes_", None)
    if isinstance(classes, np.ndarray) and classes.ndim == 1:
        kind = f"{kind} of {len(classes)} classes"
    lines = [description, f"{kind}, fitted with sklembed and scikit-learn. Its steps:"]
    model = getattr(pipeline, "best_estimator_", pipeline)
    steps = [("", model)]
    if isinstance(model, Pipeline):
        steps = model.steps
    numbered = []
    for number, (_, step) in enumerate(steps, start=1):
        numbered.append(f"{number}. {type(step).__name__}")
    lines.append("\n".join(numbered))
    return "\n\n".join(filter(None, lines))


def _changed_parameters(pipeline):
    """Return a table of the parameters that differ from their defaults."""
    rows = [
        {"parameter": path, "value": value} for path, value in _list_changed(pipeline)
    ]
    if not rows:
        rows = [{"parameter": "(all parameters)", "value": "defaults"}]
    return pd.DataFrame(rows)


def _list_changed(estimator, prefix=""):
    """Yield the path and the value of each changed parameter, also of nested parts."""
    defaults = inspect.signature(type(estimator).__init__).parameters
    hidden = _LOCAL | ({"model"} if isinstance(estimator, FrozenEncoder) else set())
    for name, value in estimator.get_params(deep=False).items():
        path = f"{prefix}{name}"
        if name == "estimator":  # of a search, with the parameters that were chosen
            value = getattr(estimator, "best_estimator_", value)
        nested = _nested_estimators(path, prefix, value)
        for nested_path, part in nested:
            yield from _list_changed(part, f"{nested_path}__")
        default = getattr(defaults.get(name), "default", inspect.Parameter.empty)
        if not nested and name not in hidden and repr(value) != repr(default):
            yield path, _readable(value)


def _nested_estimators(path, prefix, value):
    """Return the paths and estimators in a parameter: itself, or named parts of a list."""
    if isinstance(value, BaseEstimator):
        return [(path, value)]
    nested = []
    for part in value if isinstance(value, list) else []:
        is_named = isinstance(part, tuple) and len(part) > 1
        if is_named and isinstance(part[1], BaseEstimator):
            nested.append((f"{prefix}{part[0]}", part[1]))
    return nested


def _readable(value):
    """Return the value of a parameter without addresses and directories."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(repr(value).split()))
    text = _ABSOLUTE_PATH.sub(r"\1\2\1", text)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _describe_columns(pipeline, table):
    """Return a table of the columns: kind, and share of missing cells."""
    kinds = _kinds_in_fit(pipeline)
    if table is None:
        if kinds is None:
            return pd.DataFrame()
        columns = kinds[["kind", "missing", "distinct"]]
        return columns.reset_index(names="column")
    if table.shape[1] > _MOST_ROWS:
        return _describe_blocks(table)
    rows = []
    for position, name in enumerate(table.columns):
        cells = table.iloc[:, position]
        kind = None
        if kinds is not None and str(name) in kinds.index:
            kind = kinds.loc[str(name), "kind"]
        rows.append(
            {
                "column": str(name),
                "kind": kind or _kind_of(cells, str(name)),
                "missing": f"{missing_cells(cells).mean():.1%}",
            }
        )
    return pd.DataFrame(rows)


def _kinds_in_fit(pipeline):
    """Return the kinds that a fitted vectorizer at the start of a pipeline decided."""
    first = getattr(pipeline, "best_estimator_", pipeline)
    while isinstance(first, Pipeline):
        first = first.steps[0][1]
    if isinstance(first, MultimodalVectorizer):
        return first.kinds_
    return None


def _kind_of(cells, name):
    """Return the kind of a column, or the type of cells that have no kind."""
    try:
        return read_column(cells, name).kind
    except (TypeError, ValueError):  # arrays, lists and other objects
        return str(cells.dtype)


def _describe_blocks(table):
    """Return a row for each block of a wide table: columns of a common prefix."""
    blocks: dict[str, list[int]] = {}
    for position, name in enumerate(table.columns):
        prefix, separator, _ = str(name).rpartition("__")
        blocks.setdefault(prefix if separator else "(all others)", []).append(position)
    rows = []
    for name, positions in blocks.items():
        block = table.iloc[:, positions]
        types = dict.fromkeys(map(str, block.dtypes))
        rows.append(
            {
                "column": f"{name}, {len(positions)} columns",
                "kind": ", ".join(types),
                "missing": f"{missing_cells(block).mean():.1%}",
            }
        )
    return pd.DataFrame(rows)


def _describe_size(table, columns):
    """Return a sentence on the training data."""
    if table is not None:
        return (
            f"{len(table):,} rows and {table.shape[1]:,} columns. Cells are not shown."
        )
    if len(columns):
        return f"{len(columns)} columns, as read in training. Cells are not shown."
    return "The training data were not passed to the card."


def _describe_target(y, classes):
    """Return the distribution of a target, one row for each class or number."""
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2:
        names = [str(output) for output in range(y.shape[1])]
        if y.dtype.kind not in "biuf":
            n_classes = [len(set(output)) for output in y.T]
            return pd.DataFrame({"output": names, "classes": n_classes})
        statistics = {"output": names, "mean": y.mean(axis=0), "sd": y.std(axis=0)}
        if np.isin(y, [0, 1]).all():
            statistics = {"label": names, "rows": y.sum(axis=0)}
        return pd.DataFrame(statistics).head(_MOST_ROWS)
    if not classes:
        quantiles = pd.Series(y.astype(np.float64)).quantile(
            [0.05, 0.25, 0.5, 0.75, 0.95]
        )
        names = ["5 %", "25 %", "median", "75 %", "95 %"]
        values = [y.mean(), y.std(), *quantiles]
        return pd.DataFrame(
            {"statistic": ["mean", "standard deviation", *names], "value": values}
        )
    counts = pd.Series(y).value_counts()
    rows = []
    for label, count in counts.head(_MOST_ROWS).items():
        rows.append({"class": shorten(label), "rows": count})
    if len(counts) > _MOST_ROWS:
        rest = counts.iloc[_MOST_ROWS:]
        rows.append({"class": f"{len(rest)} more", "rows": rest.sum()})
    distribution = pd.DataFrame(rows)
    distribution["share"] = [f"{rows / len(y):.1%}" for rows in distribution["rows"]]
    return distribution


def _add_evaluation(card, scores, cv, leaks, modalities):
    """Add scores and reports to a card."""
    card.add(Evaluation="")
    if len(scores.by_fold):
        by_fold = scores.by_fold.rename_axis("fold").reset_index()
        _add_table(card, "Evaluation/Scores", by_fold)
        card.select("Evaluation/Scores").content = _summarise_scores(scores, cv)
    if leaks is not None:
        lines = [f"- {sentence}" for sentence in leaks._sentences()]
        _add_table(card, "Evaluation/Near duplicates", leaks.summary())
        card.select("Evaluation/Near duplicates").content = "\n".join(lines)
    if modalities is not None:
        _add_modalities(card, modalities)


def _summarise_scores(scores, cv):
    """Return the means over folds, and where the scores come from, in sentences."""
    means = []
    for name, values in scores.by_fold.items():
        means.append(f"{name} {values.mean():.3f} ± {values.std():.3f}")
    n_folds = len(scores.by_fold)
    sentences = [
        f"Mean over {n_folds} folds ± standard deviation: {', '.join(means)}.",
        scores.source,
    ]
    n_failed = int(scores.by_fold.isna().any(axis=1).sum())
    if n_failed:
        sentences.append(f"{n_failed} of the folds failed and do not count.")
    if hasattr(cv, "split") or isinstance(cv, Integral):
        sentences.append(f"Folds: `{_readable(cv)}`.")
    return " ".join(filter(None, sentences))


def _add_modalities(card, report):
    """Add the tables of a modality report, as means over folds."""
    tables = {
        "Subsets of modalities": (report.subsets, ["modalities"], "score"),
        "Shapley values": (report.shapley, ["modality"], "value"),
        "Noise and missing modalities": (
            report.degradation,
            ["modality", "kind", "level"],
            "loss",
        ),
    }
    for title, (table, keys, value) in tables.items():
        if not len(table):
            continue
        means = table.groupby(keys, sort=False)[value].agg(["mean", "std"])
        means = means.rename(columns={"mean": value, "std": "sd over folds"})
        _add_table(card, f"Evaluation/{title}", means.reset_index())


def _limitations_of_model(pipeline, encoders, y):
    """Return the limitations that follow from the encoders and the target."""
    reasons = [
        "Predictions are equal only under equal versions of packages, listed below."
    ]
    if encoders:
        reasons.append(
            "The encoders were trained by others on other data. Their languages, biases "
            "and licenses limit this model."
        )
    for fitted in encoders:
        length = fitted.encoder.space_["description"].get("max_length")
        place = "" if fitted.column is None else f" of column {fitted.column!r}"
        reason = f"Texts{place} are cut after {length} tokens."
        if length and reason not in reasons:
            reasons.append(reason)
    if y is not None and is_a_classifier(pipeline) and np.ndim(y) == 1:
        counts = pd.Series(np.asarray(y)).value_counts()
        n_rare = int((counts < _FEW_ROWS).sum())
        if n_rare:
            reasons.append(
                f"{n_rare} of {len(counts)} classes have fewer than {_FEW_ROWS} rows."
            )
    return reasons


def _limitations_of_evaluation(scores, leaks, modalities):
    """Return the limitations that follow from scores and reports, or their absence."""
    reasons = []
    if not len(scores.by_fold):
        reasons.append("The model was not evaluated.")
    if scores.is_optimistic:
        reasons.append("Parameters were chosen by the scores, which are optimistic.")
    if leaks is None:
        reasons.append(
            "Near duplicates of test rows in training rows were not searched."
        )
    else:
        reasons += _limitations_of_leaks(leaks)
    if modalities is None:
        reasons.append("The effect of missing or noisy modalities was not measured.")
    return reasons


def _limitations_of_leaks(leaks):
    """Return how near duplicates and single columns inflate a score."""
    reasons = []
    n_leaked, summary = int(leaks.leaked_rows_.sum()), leaks.summary()
    if n_leaked:
        name = leaks.score_names_[0]
        all_rows = summary.loc["all rows", name]
        text = f"{n_leaked} rows have near duplicates in other folds"
        without = summary[name].get("without leaked rows", np.nan)
        if not np.isnan(without):  # unless all rows are leaked
            text += f": {name} is {all_rows:.3f}, and {without:.3f} without them"
        reasons.append(f"{text}.")
    for name in leaks.columns_.loc[leaks.columns_["suspicious"], "column"]:
        reasons.append(f"Column {name!r} alone predicts the target.")
    return reasons


def _usage(pipeline, directory):
    """Return code that loads the saved model and predicts."""
    names = getattr(pipeline, "feature_names_in_", None)
    rows = "the input of the model, one row for each prediction"
    if names is not None and len(names) <= _MOST_ROWS:
        rows = f"a DataFrame with the columns {', '.join(map(repr, names.tolist()))}"
    elif hasattr(pipeline, "n_features_in_"):
        rows = f"a table of {pipeline.n_features_in_} columns, as in training"
    lines = [
        "```python",
        "import sklembed",
        "",
        f"model = sklembed.load({os.fspath(directory)!r})  # written by sklembed.save(model, ...)",
        f"rows = ...  # {rows}",
        "model.predict(rows)",
    ]
    if hasattr(pipeline, "predict_proba"):
        lines.append("model.predict_proba(rows)")
    return "\n".join([*lines, "```"])


def _versions():
    """Return the versions of Python and of installed packages."""
    rows = [{"package": "Python", "version": platform.python_version()}]
    for name in _PACKAGES:
        try:
            rows.append({"package": name, "version": version(name)})
        except PackageNotFoundError:
            continue
    return pd.DataFrame(rows)
