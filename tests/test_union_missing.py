"""PerModalityUnion: which branches receive rows with a missing modality."""

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
    TargetEncoder,
)
from sklearn.utils import get_tags

from sklembed import (
    CallableBackend,
    CanonicalAligner,
    ContrastiveProjector,
    FrozenEncoder,
    PerModalityUnion,
)


def load_lengths():
    return lambda texts: np.array(
        [[len(text), text.count("a")] for text in texts], dtype=float
    )


def load_words():
    return lambda texts: [np.ones((len(text.split()), 2)) for text in texts]


def callable_backend(load):
    return CallableBackend(
        load,
        name=f"{load.__name__} of a table",
        version="1",
        modality="text",
        n_features=2,
    )


ENCODER = FrozenEncoder(callable_backend(load_lengths), store=None)
TOKENS = FrozenEncoder(callable_backend(load_words), output="tokens", store=None)
PROJECTOR = ContrastiveProjector(
    2, hidden_layer_sizes=(4,), max_epochs=1, random_state=0
)
ONE_HOT = OneHotEncoder(sparse_output=False, handle_unknown="ignore")


class Filling(TransformerMixin, BaseEstimator):
    """A transformer of another package whose tags allow NaN."""

    def fit(self, X, y=None):
        self.n_rows_ = len(X)
        return self

    def transform(self, X):
        return np.nan_to_num(np.asarray(X, dtype=float), nan=-1.0)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class Probabilities(TransformerMixin, BaseEstimator):
    """A wrapper that sets no tags."""

    def __init__(self, estimator):
        self.estimator = estimator

    def fit(self, X, y):
        self.fitted_ = clone(self.estimator).fit(X, y)
        return self

    def transform(self, X):
        return self.fitted_.predict_proba(X)


@pytest.fixture
def table():
    """Nine rows of two numbers; both are missing in two rows, one in another."""
    numbers = np.arange(18.0).reshape(9, 2)
    numbers[[2, 8]] = np.nan
    numbers[3, 0] = np.nan
    return pd.DataFrame(numbers, columns=["a", "b"])


Y = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0])


def inner_union(transformer, **options):
    return PerModalityUnion(
        [("a", transformer, [0]), ("b", StandardScaler(), [1])], **options
    )


def no_score(*_):
    return 0.0


HANDLING = {
    "imputer": SimpleImputer(),
    "neighbours": KNNImputer(),
    "indicator": MissingIndicator(features="all"),
    "one-hot": OneHotEncoder(handle_unknown="ignore"),
    "ordinal": OrdinalEncoder(encoded_missing_value=-1),
    "target": TargetEncoder(cv=2),
    "another package's": Filling(),
    "stacked trees": StackingClassifier(
        [("trees", HistGradientBoostingClassifier())], cv=2
    ),
    "wrapped trees": Probabilities(HistGradientBoostingClassifier()),
    "wrapped pipeline": Probabilities(
        make_pipeline(SimpleImputer(), LogisticRegression())
    ),
    "searched": GridSearchCV(
        make_pipeline(SimpleImputer(), PCA(1)), {}, cv=2, scoring=no_score
    ),
    "imputer, PCA": make_pipeline(SimpleImputer(), PCA(1)),
    "scaler, imputer, PCA": make_pipeline(StandardScaler(), SimpleImputer(), PCA(1)),
    "selector, imputer": make_pipeline(VarianceThreshold(), SimpleImputer()),
    "function, imputer": make_pipeline(FunctionTransformer(), SimpleImputer()),
    "projector, imputer": make_pipeline(PROJECTOR, SimpleImputer()),
    "passthrough, imputer": make_pipeline("passthrough", SimpleImputer()),
    "beside each other": FeatureUnion(
        [("i", SimpleImputer()), ("m", MissingIndicator())]
    ),
    "of columns": ColumnTransformer(
        [("i", SimpleImputer(), [0])], remainder=KNNImputer()
    ),
    "inner union": make_pipeline(inner_union(SimpleImputer()), SimpleImputer()),
}
NOT_HANDLING = {
    "PCA": PCA(1),
    "projector": PROJECTOR,
    "scaler": StandardScaler(),
    "passthrough": "passthrough",
    "scaler, PCA": make_pipeline(StandardScaler(), PCA(1)),
    "PCA, imputer": make_pipeline(PCA(1), SimpleImputer()),
    "selector, PCA": make_pipeline(VarianceThreshold(), PCA(1)),
    "ordinal with NaN, PCA": make_pipeline(OrdinalEncoder(), PCA(1)),
    "function": FunctionTransformer(),
    "function that checks, imputer": make_pipeline(
        FunctionTransformer(validate=True), SimpleImputer()
    ),
    "beside PCA": FeatureUnion([("i", SimpleImputer()), ("p", PCA(1))]),
    "of columns with PCA": ColumnTransformer(
        [("i", SimpleImputer(), [0])], remainder=PCA(1)
    ),
    "inner union, PCA": make_pipeline(inner_union(SimpleImputer()), PCA(1)),
    "inner union that skips": inner_union(SimpleImputer(), missing_rows="skip"),
    "wrapped linear model": Probabilities(LogisticRegression()),
}


def received_rows(transformer, X):
    """Return the index of the rows that a branch receives."""
    union = PerModalityUnion([("numbers", transformer, ["a", "b"])])
    [(_, _, part)] = union.iter_parts(X)
    return part.index.tolist()


@pytest.mark.parametrize("name", HANDLING)
def test_a_transformer_that_handles_missing_values_is_given_all_rows(table, name):
    transformer = HANDLING[name]
    takes_single_nan = "union" not in name and "projector" not in name
    X = table if takes_single_nan else table.dropna().reindex(range(9))
    assert received_rows(transformer, X) == list(range(9))
    union = PerModalityUnion([("numbers", transformer, ["a", "b"])], add_indicator=True)
    blocks = union.fit_transform(X, Y)
    assert np.isfinite(blocks).all()
    np.testing.assert_array_equal(blocks[:, -1], X.isna().all(axis=1))
    alone = clone(transformer).fit(X, Y).transform(X)
    alone = alone.toarray() if hasattr(alone, "toarray") else np.asarray(alone)
    np.testing.assert_allclose(union.fit(X, Y).transform(X)[:, :-1], alone, atol=1e-6)


@pytest.mark.parametrize("name", NOT_HANDLING)
def test_any_other_transformer_is_not_given_rows_without_the_modality(table, name):
    X = table.dropna().reindex(range(9))
    lacking = X["a"].isna().to_numpy()
    transformer = NOT_HANDLING[name]
    assert received_rows(transformer, X) == X.dropna().index.tolist()
    union = PerModalityUnion([("numbers", transformer, ["a", "b"])])
    for blocks in (union.fit_transform(X, Y), union.fit(X, Y).transform(X)):
        np.testing.assert_array_equal(np.isnan(blocks).all(axis=1), lacking)
        np.testing.assert_array_equal(np.isnan(blocks).any(axis=1), lacking)


@pytest.mark.parametrize(
    ("transformer", "handles"),
    [
        (ENCODER, False),
        (make_pipeline(ENCODER, PCA(1)), False),
        (make_pipeline(ENCODER, PROJECTOR), False),
        (make_pipeline(ENCODER, SimpleImputer(), PCA(1)), True),
        (make_pipeline(ENCODER, PROJECTOR, SimpleImputer()), True),
        (make_pipeline(ENCODER, CanonicalAligner(), SimpleImputer()), True),
        (TfidfVectorizer(), False),
        (TOKENS, False),
    ],
)
def test_encoders_keep_missing_rows_for_an_imputer_after_them(transformer, handles):
    X = pd.DataFrame({"note": ["a red cat", None, "a blue dog"] * 3})
    [(_, _, part)] = PerModalityUnion([("text", transformer, "note")]).iter_parts(X)
    assert len(part) == (9 if handles else 6)


def test_an_imputer_after_an_encoder_fills_rows_without_a_text():
    X = pd.DataFrame({"note": ["a red cat", None, "a blue dog"] * 3})
    union = PerModalityUnion(
        [("text", make_pipeline(ENCODER, SimpleImputer()), "note")]
    )
    blocks = union.fit_transform(X)
    np.testing.assert_allclose(blocks[1], blocks[[0, 2]].mean(axis=0))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA], ids=repr)
@pytest.mark.parametrize("dtype", ["category", object, "string"])
def test_a_row_without_numbers_and_category_is_predicted_as_by_column_transformer(
    missing, dtype
):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"age": rng.normal(size=60), "sex": rng.choice(["f", "m"], 60)})
    y = (X["age"] > 0).astype(int)
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    branches = [("numbers", numbers, ["age"]), ("sex", ONE_HOT, ["sex"])]
    new = pd.DataFrame({"age": [0.5, np.nan], "sex": ["f", None]})
    expected = make_pipeline(ColumnTransformer(branches), LogisticRegression()).fit(
        X, y
    )
    model = make_pipeline(PerModalityUnion(branches), LogisticRegression())
    model.fit(X.astype({"sex": dtype}), y)
    cells = pd.Series(["f", missing], dtype=object).astype(dtype)
    np.testing.assert_allclose(
        model.predict_proba(new.assign(sex=cells)), expected.predict_proba(new)
    )


@pytest.mark.parametrize("dtype", [object, "string", "category"])
@pytest.mark.parametrize(
    "encoder",
    [ONE_HOT, ColumnTransformer([("sex", ONE_HOT, ["sex"])], remainder="passthrough")],
)
def test_a_category_without_any_value_in_a_request_is_a_missing_category(
    encoder, dtype
):
    X = pd.DataFrame(
        {"sex": ["f", "m", None] * 4, "ward": ["a", None, "b"] * 4}, dtype=dtype
    )
    if isinstance(encoder, ColumnTransformer):
        X["ward"] = np.arange(12.0)
    union = PerModalityUnion([("category", encoder, ["sex", "ward"])]).fit(X)
    row = X.iloc[[2]]
    csv = row.assign(sex=np.nan)  # as file readers return an empty column
    assert csv["sex"].dtype == float
    np.testing.assert_array_equal(union.transform(csv), union.transform(row))
    assert csv["sex"].dtype == float


def test_a_category_without_any_value_in_an_array_or_polars_table_is_a_missing_category():
    cells = [["f"], ["m"], [None]]
    union = PerModalityUnion([("category", ONE_HOT, [0])]).fit(
        np.array(cells, dtype=object)
    )
    assert union.transform(np.array([[np.nan]])).tolist() == [[0, 0, 1]]
    union = PerModalityUnion([("category", ONE_HOT, ["sex"])])
    union.fit(pl.DataFrame({"sex": ["f", "m", None]}))
    assert union.transform(pl.DataFrame({"sex": [None]})).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("dtype", [object, "string", "category"])
@pytest.mark.parametrize("missing", [None, np.nan, pd.NA], ids=repr)
def test_imputers_of_texts_recognise_every_kind_of_missing_cell(dtype, missing):
    cells = pd.Series(["a", missing, "b", "a"], dtype=object).astype(dtype)
    most_frequent = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder()
    )
    frame = pd.DataFrame({"c": cells})
    polars = pl.DataFrame({"c": ["a", None, "b", "a"]})
    for X, column in [(frame, ["c"]), (polars, ["c"]), (frame.to_numpy(object), [0])]:
        union = PerModalityUnion([("c", most_frequent, column)])
        assert union.fit_transform(X).tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    "cells",
    [
        pd.Series([1.0, None, 3.0], dtype=object),
        pd.Series([1, pd.NA, 3], dtype=object),
        pd.Series([1, None, 3], dtype="Int64"),
        pd.Series([True, None, False]),
        pd.Series([True, None, False], dtype="boolean"),
    ],
)
def test_imputers_of_numbers_recognise_every_kind_of_missing_cell(cells):
    union = PerModalityUnion([("c", SimpleImputer(), ["c"])])
    first, filled, last = union.fit_transform(pd.DataFrame({"c": cells}))[:, 0]
    assert filled == (first + last) / 2


def test_a_table_vectorizer_is_given_all_rows():
    skrub = pytest.importorskip("skrub")
    X = pd.DataFrame(
        {"kind": ["a", None, "b", "a"], "since": pd.to_datetime(["2020-01-01"] * 4)}
    )
    union = PerModalityUnion([("rest", skrub.TableVectorizer(), ["kind"])])
    np.testing.assert_array_equal(
        union.fit_transform(X), skrub.TableVectorizer().fit_transform(X[["kind"]])
    )
    X.loc[1, "since"] = None
    dates = PerModalityUnion(
        [("since", skrub.TableVectorizer(), ["since"])]
    ).fit_transform(X)
    assert np.isnan(dates).any(axis=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["pandas", "polars", "numpy"])
def test_missing_dates_never_become_numbers(kind):
    dates = pd.DataFrame({"since": pd.to_datetime(["2020-01-01", None, "2020-03-01"])})
    X = {"pandas": dates, "polars": pl.from_pandas(dates), "numpy": dates.to_numpy()}[
        kind
    ]
    column = [0] if kind == "numpy" else ["since"]
    message = (
        "'d' reads the columns .*, in which dates are missing. Transformers of scikit-l"
    )
    for imputer in (SimpleImputer(), make_pipeline(SimpleImputer(), StandardScaler())):
        with pytest.raises(ValueError, match=message):
            PerModalityUnion([("d", imputer, column)]).fit(X)
    skipping = PerModalityUnion([("d", SimpleImputer(), column)], missing_rows="skip")
    if kind == "pandas":
        assert np.isnan(skipping.fit_transform(X)[:, 0]).tolist() == [
            False,
            True,
            False,
        ]


# The parameter missing_rows


def test_missing_rows_is_set_for_all_branches_or_for_each(table):
    union = PerModalityUnion([("i", SimpleImputer(), ["a"])], remainder=Filling())
    lacking = {"i": table["a"].isna(), "remainder": table["b"].isna()}
    for missing_rows, skipping in [
        ("auto", []),
        ("pass", []),
        ("skip", ["i", "remainder"]),
        ({"i": "skip"}, ["i"]),
        ({"remainder": "skip", "i": "auto"}, ["remainder"]),
        ({}, []),
    ]:
        blocks = union.set_params(missing_rows=missing_rows).fit_transform(table)
        np.testing.assert_array_equal(union.transform(table), blocks)
        for column, (name, rows) in enumerate(lacking.items()):
            expected = rows if name in skipping else np.zeros(9, dtype=bool)
            np.testing.assert_array_equal(np.isnan(blocks[:, column]), expected)


def test_a_function_that_fills_is_given_all_rows_by_setting_it(table):
    filling = FunctionTransformer(lambda X: X.fillna(0))
    union = PerModalityUnion([("f", filling, ["a", "b"])], missing_rows={"f": "pass"})
    np.testing.assert_array_equal(union.fit_transform(table), table.fillna(0))
    outer = PerModalityUnion([("inner", union, ["a", "b"])])
    np.testing.assert_array_equal(outer.fit_transform(table), table.fillna(0))


def test_what_a_branch_returns_nan_for_stays_nan(table):
    union = PerModalityUnion([("s", MinMaxScaler(), ["a", "b"])], missing_rows="pass")
    np.testing.assert_array_equal(
        union.fit_transform(table), MinMaxScaler().fit_transform(table.to_numpy())
    )


@pytest.mark.parametrize("missing_rows", ["error", {"a": "error"}])
def test_rows_without_a_required_modality_are_an_error_before_any_branch_runs(
    table, missing_rows
):
    branches = [
        ("b", make_pipeline(Filling(), PCA(7)), ["b"]),
        ("a", SimpleImputer(), ["a"]),
    ]
    union = PerModalityUnion(branches[1:], missing_rows=missing_rows)
    message = (
        r"The modality of branch 'a' is missing in 3 of 9 rows, first in row 2: column "
        r"\['a'\] has no value. Fill .* imputer .*missing_rows={'a': 'skip'} "
        r"and put a SimpleImputer after the union"
    )
    for fit in (union.fit, union.fit_transform):
        with pytest.raises(ValueError, match=message):
            fit(table)
    union.fit(table.dropna())
    with pytest.raises(ValueError, match=message):
        union.transform(table)


@pytest.mark.parametrize(
    ("missing_rows", "message"),
    [
        (
            {"c": "skip"},
            r"a setting for 'c', but the branches are \['a', 'remainder'\]",
        ),
        (
            {"a": "keep"},
            r"one of \['auto', 'skip', 'pass', 'error'\]; got 'keep' for branch 'a'",
        ),
        ("keep", "The 'missing_rows' parameter of PerModalityUnion must be"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(table, missing_rows, message):
    with pytest.raises(ValueError, match=message):
        PerModalityUnion(
            [("a", SimpleImputer(), ["a"])], missing_rows=missing_rows
        ).fit(table)


def test_missing_rows_can_be_searched_over(table):
    branch = ("n", make_pipeline(SimpleImputer(), StandardScaler()), ["a", "b"])
    pipeline = make_pipeline(
        PerModalityUnion([branch]), HistGradientBoostingClassifier()
    )
    grid = {"permodalityunion__missing_rows": ["auto", "skip", {"n": "pass"}]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(table, Y)
    assert len(search.cv_results_["params"]) == 3


def test_an_error_of_a_branch_names_the_setting_that_hides_the_rows(table):
    union = PerModalityUnion([("c", OneHotEncoder(), ["a"])]).fit(table.dropna())
    with pytest.raises(ValueError, match="unknown categories") as caught:
        union.transform(table.loc[[0, 2]])
    assert caught.value.__notes__ == [
        "This was in branch 'c' of PerModalityUnion, which received all rows. Its modality "
        "is missing in 1 of these; missing_rows={'c': 'skip'} excludes them."
    ]


def test_the_union_takes_nan_where_every_branch_does():
    def allows_nan(transformer):
        return get_tags(
            PerModalityUnion([("a", transformer, [0])])
        ).input_tags.allow_nan

    assert allows_nan(make_pipeline(SimpleImputer(), PCA()))
    assert allows_nan(make_pipeline(ENCODER, PROJECTOR))
    assert not allows_nan(make_pipeline(StandardScaler(), TruncatedSVD()))


# Modalities that are missing in all training rows


@pytest.fixture
def unobserved():
    return pd.DataFrame({"note": [None] * 4, "size": np.arange(4.0)})


@pytest.mark.parametrize(
    ("transformer", "columns", "names"),
    [
        (ENCODER, "note", ["frozenencoder0", "frozenencoder1"]),
        (make_pipeline(ENCODER), ["note"], ["frozenencoder0", "frozenencoder1"]),
        (make_pipeline(ENCODER, PROJECTOR), "note", ["0"]),
        ("passthrough", ["note"], ["note"]),
        (SimpleImputer(strategy="most_frequent"), ["note"], ["0"]),
        (TfidfVectorizer(), "note", ["0"]),
    ],
)
@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_an_unobserved_modality_is_kept_as_a_block_of_nan(
    unobserved, transformer, columns, names, method
):
    union = PerModalityUnion(
        [("text", transformer, columns), ("size", StandardScaler(), ["size"])],
        keep_unobserved=True,
        add_indicator=True,
        transformer_weights={"text": 2.0},
    ).set_output(transform="pandas")
    getattr(union, method)(unobserved)
    blocks = pickle.loads(pickle.dumps(union)).transform(unobserved)
    expected = [f"text__{name}" for name in names]
    assert blocks.columns.tolist() == [
        *expected,
        "size__size",
        "missing__text",
        "missing__size",
    ]
    assert blocks[expected].isna().all(axis=None)
    assert blocks["missing__text"].tolist() == [1, 1, 1, 1]
    assert union.unobserved_ == ["text"]
    assert [name for name, _, _ in union.iter_parts(unobserved)] == ["size"]


def test_later_rows_that_have_an_unobserved_modality_are_nan_with_one_warning(
    unobserved,
):
    union = PerModalityUnion(
        [("text", ENCODER, "note"), ("again", ENCODER, ["note"])],
        remainder="passthrough",
        keep_unobserved=True,
    )
    later = unobserved.assign(note=["a", "b", None, "c"])
    union.fit(unobserved)
    with pytest.warns(
        UserWarning,
        match=r"branches \['text', 'again'\] were missing in all rows of fit.* 3 rows",
    ) as caught:
        blocks = union.transform(later)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.isnan(blocks[:, :4]).all()
    np.testing.assert_array_equal(blocks[:, 4], unobserved["size"])
    assert union.fit(later).unobserved_ == []


def test_an_unobserved_column_of_tokens_is_none(unobserved):
    branches = [("words", TOKENS, "note"), ("size", StandardScaler(), ["size"])]
    union = PerModalityUnion(branches, keep_unobserved=True).set_output(
        transform="pandas"
    )
    frame = union.fit_transform(unobserved)
    assert frame["words__frozenencoder0"].tolist() == [None] * 4
    assert union.holds_tokens_ == {"words": True, "size": False}


@pytest.mark.parametrize(
    "transformer", [ENCODER, SimpleImputer(strategy="most_frequent")]
)
def test_without_keep_unobserved_the_error_names_the_parameter(unobserved, transformer):
    union = PerModalityUnion([("text", transformer, ["note"])])
    message = r"'text' has nothing to learn from: .* in all 4 rows. .* keep_unobserved=True to keep"
    with pytest.raises(ValueError, match=message):
        union.fit(unobserved)


def test_a_fold_without_a_modality_can_be_fitted():
    X = pd.DataFrame({"note": [None] * 6 + ["a", "bb"] * 3, "size": np.arange(12.0)})
    y = np.arange(12) % 2
    union = PerModalityUnion(
        [("text", ENCODER, "note"), ("size", StandardScaler(), ["size"])],
        keep_unobserved=True,
    )
    imputer = SimpleImputer(keep_empty_features=True)
    pipeline = make_pipeline(union, imputer, LogisticRegression())
    folds = [(np.arange(6), np.arange(6)), (np.arange(12), np.arange(12))]
    search = GridSearchCV(pipeline, {}, cv=folds, error_score="raise").fit(X, y)
    assert search.best_estimator_[0].unobserved_ == []
