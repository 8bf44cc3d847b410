"""PerModalityUnion: branches receive the observed rows of their modality only."""

from functools import partial
from uuid import uuid4

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
from joblib import parallel_config
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    FrozenEncoder,
    PerModalityUnion,
)


@pytest.fixture
def table():
    """Six rows of a text and two numbers, with missing texts and numbers."""
    return pd.DataFrame(
        {
            "note": ["a red cat", None, "a blue dog", "red", "blue", "a dog"],
            "height": [1.0, 2.0, np.nan, 4.0, np.nan, 6.0],
            "width": [0.5, 1.5, np.nan, 2.5, 3.5, 9.5],
        },
        index=list("uvwxyz"),
    )


@pytest.fixture
def union(text_backend):
    return PerModalityUnion(
        [
            ("text", FrozenEncoder(text_backend, store=None), "note"),
            (
                "size",
                make_pipeline(SimpleImputer(), StandardScaler()),
                ["height", "width"],
            ),
        ]
    )


class Recorder(TransformerMixin, BaseEstimator):
    """Record the arguments of fit."""

    def fit(self, X, y=None, sample_weight=None):
        self.fitted_on_, self.y_, self.sample_weight_ = X, y, sample_weight
        return self

    def transform(self, X):
        return np.asarray(X, dtype=float)


def test_a_union_of_one_branch_is_that_branch(clusters):
    X, y = clusters
    union = PerModalityUnion([("all", PCA(3, random_state=0), slice(None))])
    np.testing.assert_array_equal(
        union.fit_transform(X), PCA(3, random_state=0).fit_transform(X)
    )


def test_without_missing_rows_it_equals_column_transformer(table):
    table = table.dropna()
    branches = [
        ("size", StandardScaler(), ["height", "width"]),
        ("width", MinMaxScaler(), ["width"]),
    ]
    ours = (
        PerModalityUnion(branches).set_output(transform="pandas").fit_transform(table)
    )
    theirs = (
        ColumnTransformer(branches).set_output(transform="pandas").fit_transform(table)
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_a_missing_modality_is_a_row_of_nan_in_its_block(union, table):
    blocks = union.set_params(missing_rows="skip").fit_transform(table)
    assert union.blocks_ == {"text": slice(0, 9), "size": slice(9, 11)}
    nan = np.isnan(blocks)
    assert nan[:, :9].all(axis=1).tolist() == [False, True, False, False, False, False]
    assert nan[:, 9:].all(axis=1).tolist() == [False, False, True, False, False, False]
    assert not nan[:, :9].any(axis=1)[[0, 2, 3, 4, 5]].any()
    assert not nan[
        4, 9:
    ].any()  # one of two numbers is observed, so the imputer fills the row


def test_a_branch_sees_only_the_rows_that_have_its_modality(table):
    union = PerModalityUnion([("size", Recorder(), ["height", "width"])])
    union.fit(table, y=np.arange(6))
    recorder = union.named_transformers_["size"]
    assert recorder.fitted_on_.index.tolist() == list("uvxyz")
    assert recorder.y_.tolist() == [0, 1, 3, 4, 5]


def test_missing_rows_do_not_touch_the_others(union, table):
    """Rows with a missing modality have no influence on the other rows."""
    complete = table.dropna()
    union.set_params(missing_rows="skip")
    fitted = clone(union).fit(complete)
    padded = complete.reindex([*complete.index, "n"])
    refitted = clone(union).fit(padded)
    np.testing.assert_array_equal(
        fitted.transform(complete), refitted.transform(complete)
    )


def test_rows_that_lack_everything_at_transform(union, table):
    union.fit(table)
    nothing = pd.DataFrame({"note": [None], "height": [np.nan], "width": [np.nan]})
    blocks = union.transform(nothing)
    assert blocks.shape == (1, 11)
    assert np.isnan(blocks[:, :9]).all()
    np.testing.assert_allclose(
        blocks[:, 9:], 0, atol=1e-12
    )  # the imputed means, standardised
    union.set_params(missing_rows="skip")
    assert np.isnan(union.transform(nothing)).all()


def test_a_branch_without_any_observed_row_is_refused_by_name(union, table):
    table["note"] = None
    with pytest.raises(
        ValueError, match="Branch 'text' has nothing to learn from: column 'note'"
    ):
        union.fit(table)


def test_fit_transform_equals_fit_then_transform(union, table):
    np.testing.assert_array_equal(
        clone(union).fit_transform(table), clone(union).fit(table).transform(table)
    )


def test_fit_learns_the_blocks_without_transforming_everything(union, table):
    assert clone(union).fit(table).blocks_ == {
        "text": slice(0, 9),
        "size": slice(9, 11),
    }
    unnamed = PerModalityUnion([("size", Recorder(), ["height", "width"])]).fit(table)
    assert unnamed.blocks_ == {"size": slice(0, 2)}
    assert unnamed.get_feature_names_out().tolist() == ["size__0", "size__1"]


@pytest.mark.parametrize(
    "columns",
    [
        ["height", "width"],
        [1, 2],
        slice(1, 3),
        slice("height", "width"),
        [False, True, True],
        np.array([False, True, True]),
        pd.Index(["height", "width"]),
        make_column_selector(dtype_include=float),
        [-2, -1],
    ],
    ids=lambda columns: type(columns).__name__,
)
def test_columns_are_selected_as_in_column_transformer(table, columns):
    union = PerModalityUnion([("size", MinMaxScaler(), columns)]).fit(table)
    expected = MinMaxScaler().fit_transform(table[["height", "width"]].drop(index="w"))
    np.testing.assert_array_equal(union.transform(table)[[0, 1, 3, 4, 5]], expected)


def test_named_columns_are_found_in_any_order_and_among_others(union, table):
    union.fit(table)
    moved = table[["width", "note", "height"]].assign(extra=1)
    np.testing.assert_array_equal(union.transform(moved), union.transform(table))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "colour",
            r"Branch 'b' selects column 'colour', which is not in X. X has the columns \['",
        ),
        ([7], "Branch 'b' selects column 7, but X has n_features=3"),
        (slice("colour", None), "selects column 'colour'"),
        ([True, False], "a mask of 2 values, but X has n_features=3"),
    ],
)
def test_absent_columns_are_refused(table, columns, message):
    with pytest.raises(ValueError, match=message):
        PerModalityUnion([("b", "passthrough", columns)]).fit(table)


EMPTY = {
    "list": [],
    "tuple": (),
    "array": np.array([], dtype=int),
    "mask": [False, False, False],
    "array of a mask": np.zeros(3, dtype=bool),
    "slice": slice(0, 0),
    "slice of names": slice("width", "note"),
    "selector": make_column_selector(dtype_include=bool),
    "callable": lambda X: [],
}


@pytest.mark.parametrize("container", ["default", "pandas", "polars"])
@pytest.mark.parametrize("columns", EMPTY.values(), ids=EMPTY)
def test_a_branch_without_columns_is_skipped(table, columns, container):
    size = ("size", StandardScaler(), ["height", "width"])
    options = {"transformer_weights": {"size": 2.0, "none": 3.0}, "add_indicator": True}
    union = PerModalityUnion([("none", PCA(7), columns), size], **options)
    union.set_output(transform=container)
    expected = PerModalityUnion(
        [size], **options | {"transformer_weights": {"size": 2.0}}
    )
    for blocks in (union.fit_transform(table), union.fit(table).transform(table)):
        np.testing.assert_array_equal(np.asarray(blocks), expected.fit_transform(table))
    assert (
        union.get_feature_names_out().tolist()
        == expected.get_feature_names_out().tolist()
    )
    assert union.blocks_ == {"none": slice(0, 0)} | expected.blocks_
    assert [name for name, _, _ in union.iter_parts(table)] == ["size"]
    assert [name for name, _, _ in union.transformers_] == ["none", "size"]
    assert "PCA" in union._repr_html_()


@pytest.mark.parametrize("container", ["default", "pandas", "polars"])
def test_branches_without_any_column_give_a_table_without_columns(table, container):
    """As ColumnTransformer does."""
    if container == "polars":  # which fails in earlier versions
        pytest.importorskip("sklearn", minversion="1.9")
    branches = [("none", PCA(7), []), ("nothing", "passthrough", slice(0, 0))]
    union = PerModalityUnion(branches, add_indicator=True).set_output(
        transform=container
    )
    theirs = ColumnTransformer(branches).set_output(transform=container)
    expected = theirs.fit_transform(table)
    for blocks in (union.fit_transform(table), union.fit(table).transform(table)):
        assert type(blocks) is type(expected)
        assert blocks.shape == expected.shape
    assert union.get_feature_names_out().tolist() == []


def test_branches_without_columns_are_skipped_beside_a_remainder_and_tokens(table):
    union = PerModalityUnion(
        [("none", PCA(7), []), ("n", "drop", "note")], remainder="passthrough"
    )
    np.testing.assert_array_equal(
        union.fit_transform(table), table[["height", "width"]]
    )
    backend = CallableBackend(
        load_words, name="words of ones", version="1", modality="text", n_features=2
    )
    words = FrozenEncoder(backend, output="tokens", store=None)
    tokens = PerModalityUnion([("none", PCA(7), []), ("words", words, "note")])
    assert tokens.fit_transform(table).shape == (6, 1)


def load_words():
    return lambda texts: [np.ones((len(text.split()), 2)) for text in texts]


def test_a_column_absent_at_transform_is_refused(union, table):
    union.fit(table)
    with pytest.raises(ValueError, match="Branch 'size' selects column 'width'"):
        union.transform(table.drop(columns="width"))


def test_names_do_not_select_from_an_array(table):
    with pytest.raises(ValueError, match="by name, but X has no column names"):
        PerModalityUnion([("b", "passthrough", "note")]).fit(table.to_numpy())


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_set_output_names_blocks(union, table, kind):
    frame = union.set_output(transform=kind).fit_transform(table)
    names = [f"text__frozenencoder{i}" for i in range(9)] + [
        "size__height",
        "size__width",
    ]
    assert list(frame.columns) == names
    assert union.get_feature_names_out().tolist() == names
    if kind == "pandas":
        assert frame.index.tolist() == list("uvwxyz")
    np.testing.assert_array_equal(
        np.asarray(frame, dtype=float),
        clone(union).set_output(transform="default").fit_transform(table),
    )


def test_polars_tables_give_the_same_blocks(union, table):
    polars = pl.from_pandas(table)
    np.testing.assert_array_equal(
        clone(union).fit_transform(polars), clone(union).fit_transform(table)
    )


def test_global_pandas_output_reaches_branches_harmlessly(union, table):
    expected = clone(union).fit_transform(table)
    with sklearn.config_context(transform_output="pandas"):
        np.testing.assert_array_equal(union.fit_transform(table).to_numpy(), expected)


def test_float32_blocks_stay_float32(text_backend):
    union = PerModalityUnion(
        [("text", FrozenEncoder(text_backend, store=None), "note")]
    )
    assert union.fit_transform(pd.DataFrame({"note": ["a", None]})).dtype == np.float32


def test_nested_parameters_and_replaced_branches(union, table):
    union.set_params(
        text__normalize=True, size__simpleimputer__strategy="median", n_jobs=2
    )
    params = union.get_params()
    assert params["text__normalize"] is True
    assert params["size__simpleimputer__strategy"] == "median"
    assert params["n_jobs"] == 2
    assert clone(union).set_params(text="drop").fit(table).blocks_ == {
        "size": slice(0, 2)
    }
    replaced = clone(union).set_params(size="passthrough").fit_transform(table)
    np.testing.assert_array_equal(replaced[0, 9:], [1.0, 0.5])
    with pytest.raises(ValueError, match="Invalid parameter 'colour'"):
        union.set_params(colour=PCA())


def test_dropping_a_branch_can_be_searched_over(table):
    union = PerModalityUnion(
        [("h", "passthrough", ["height"]), ("w", "passthrough", ["width"])]
    )
    X = pd.DataFrame({"height": np.arange(40) % 2, "width": np.zeros(40)})
    search = GridSearchCV(
        make_pipeline(union, DecisionTreeClassifier()),
        {"permodalityunion__h": ["drop", "passthrough"]},
    ).fit(X, np.arange(40) % 2)
    assert search.best_params_ == {"permodalityunion__h": "passthrough"}


@pytest.mark.parametrize(
    ("transformers", "message"),
    [
        ([], "transformers is empty"),
        ([("a__b", "passthrough", [0])], "string without '__'"),
        ([("", "passthrough", [0])], "string without '__'"),
        ([(3, "passthrough", [0])], "string without '__'"),
        ([("a", "passthrough", [0]), ("a", "passthrough", [1])], "'a' occurs 2 times"),
        ([("n_jobs", "passthrough", [0])], "'n_jobs' is a parameter of the union"),
        ([("a", "passthrough")], r"tuples \(name, transformer, columns\)"),
        ([("a", "drop", [0])], "All branches are 'drop'"),
        ([("a", None, [0])], "Branch 'a' needs a transformer"),
    ],
)
def test_branches_that_could_not_be_told_apart_are_refused(transformers, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PerModalityUnion(transformers).fit(np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (
            pd.DataFrame({"note": [], "height": [], "width": []}),
            ValueError,
            r"0 sample\(s\) \(shape=\(0, 3\)\) while a minimum of 1 is required",
        ),
        (np.zeros((3, 0)), ValueError, r"0 feature\(s\)"),
        (np.zeros(3), ValueError, "Expected 2D array, got 1D array"),
        (
            pd.Series([1.0]),
            ValueError,
            r"it is a Series. Pass X.to_frame\(\) if it is a column, or X.to_frame\(\).T",
        ),
        ([{"note": "a"}], ValueError, r"it is a list. Pass pd.DataFrame\(X\)"),
        (3, ValueError, "it is an int. Pass a DataFrame"),
        ({"note": ["a"]}, TypeError, r"got a dict. Pass pd.DataFrame\(X\)"),
        (
            pa.table({"note": ["a"]}),
            TypeError,
            r"got a pyarrow Table. Pass X.to_pandas\(\)",
        ),
        (
            pl.LazyFrame({"note": ["a"]}),
            TypeError,
            r"a polars LazyFrame. Pass X.collect\(\)",
        ),
    ],
)
def test_bad_tables_are_refused(union, X, error, message):
    with pytest.raises(error, match=message):
        union.fit(X)


def test_what_is_not_numbers_is_refused_by_branch(table):
    with pytest.raises(
        TypeError, match="Branch 'text' returned object columns that are not numb"
    ):
        PerModalityUnion([("text", "passthrough", ["note"])]).fit_transform(table)


@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_sparse_output_is_made_dense(table, method):
    union = PerModalityUnion(
        [("text", CountVectorizer(), "note"), ("size", StandardScaler(), ["height"])]
    )
    getattr(union, method)(table)
    blocks = union.transform(table)
    texts = table["note"].dropna()
    np.testing.assert_array_equal(
        blocks[table["note"].notna(), :-1],
        CountVectorizer().fit_transform(texts).toarray(),
    )
    assert np.isnan(blocks[1, :-1]).all()
    assert union.blocks_["text"] == slice(0, len(union.get_feature_names_out()) - 1)


@pytest.mark.parametrize("n_jobs", [None, 2])
@pytest.mark.parametrize("method", ["fit", "fit_transform", "transform"])
def test_large_sparse_output_is_refused_before_any_encoding(tmp_path, method, n_jobs):
    """Even if the encoder is the first branch."""
    encoder, encoded = counting_encoder(tmp_path)
    branches = [
        ("encoded", make_pipeline(encoder, StandardScaler()), "note"),
        ("hashed", HashingVectorizer(n_features=2**20), "note"),
    ]
    union = PerModalityUnion(branches, n_jobs=n_jobs)
    small = pd.DataFrame({"note": ["a cat", "a dog"]})
    large = pd.concat([small] * 50, ignore_index=True)
    if method == "transform":
        union.fit(small)
    before = encoded()
    message = (
        r"Branch 'hashed' returned a sparse matrix of 1048576 columns. A dense block of "
        r"100 rows needs 0\.8 GiB; up to 0\.5 GiB .* TruncatedSVD, .*max_features.*sparse_output"
    )
    # An error ends the processes of loky, and new ones are slow to start.
    backend = "loky" if method == "fit_transform" else "threading"
    with parallel_config(backend), pytest.raises(ValueError, match=message):
        getattr(union, method)(large)
    assert encoded() == before


def counting_encoder(folder):
    """Return an encoder, and a function that counts its batches in all processes."""
    backend = CallableBackend(
        partial(load_noting, folder),
        name="noting",
        version="1",
        modality="text",
        n_features=2,
    )
    return FrozenEncoder(backend, store=None), lambda: len(list(folder.iterdir()))


def load_noting(folder):
    def encode(texts):
        (folder / uuid4().hex).touch()
        return np.array(
            [[len(text), text.count("a")] for text in texts], dtype=np.float32
        )

    return encode


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_n_jobs_changes_nothing(union, table, n_jobs):
    expected = clone(union).fit_transform(table)
    union.set_params(n_jobs=n_jobs, text="drop")
    np.testing.assert_array_equal(union.fit_transform(table), expected[:, 9:])


def test_metadata_is_routed_and_cut_to_the_branch_s_rows(table):
    with sklearn.config_context(enable_metadata_routing=True):
        recorder = Recorder().set_fit_request(sample_weight=True)
        union = PerModalityUnion([("size", recorder, ["height", "width"])])
        union.fit_transform(table, np.arange(6), sample_weight=np.arange(6) / 10)
        weights = union.named_transformers_["size"].sample_weight_
    np.testing.assert_array_equal(weights, [0.0, 0.1, 0.3, 0.4, 0.5])


def test_groups_reach_the_projector_s_splitter_through_a_pipeline():
    """Groups are routed from the pipeline's fit and restricted to observed rows."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4))
    X[:6, :2] = np.nan
    y = np.arange(60) % 2
    groups = np.repeat(np.arange(10), 6)
    seen = {}

    class Spy(GroupKFold):
        def split(self, X, y=None, groups=None):
            seen["groups"] = groups
            return super().split(X, y, groups)

    with sklearn.config_context(enable_metadata_routing=True):
        projector = ContrastiveProjector(
            2,
            hidden_layer_sizes=(4,),
            max_epochs=1,
            cv=Spy(3).set_split_request(groups=True),
        )
        union = PerModalityUnion([("a", make_pipeline(projector), [0, 1])])
        make_pipeline(union, HistGradientBoostingClassifier()).fit(X, y, groups=groups)
    np.testing.assert_array_equal(seen["groups"], groups[6:])


def test_metadata_of_transform_is_cut_to_the_branch_s_rows(table):
    class Tagging(Recorder):
        def transform(self, X, tags=None):
            self.tags_ = tags
            return super().transform(X)

    with sklearn.config_context(enable_metadata_routing=True):
        tagging = Tagging().set_transform_request(tags=True)
        union = PerModalityUnion([("size", tagging, ["height", "width"])]).fit(table)
        union.transform(table, tags=list("uvwxyz"))
    assert union.named_transformers_["size"].tags_ == list("uvxyz")


def test_passthrough_and_drop_stand_beside_routed_metadata(table):
    with sklearn.config_context(enable_metadata_routing=True):
        recorder = Recorder().set_fit_request(sample_weight=True)
        union = PerModalityUnion(
            [
                ("h", recorder, ["height"]),
                ("w", "passthrough", ["width"]),
                ("n", "drop", "note"),
            ]
        )
        blocks = union.fit_transform(table, sample_weight=np.ones(6))
    np.testing.assert_array_equal(blocks, table[["height", "width"]].to_numpy())


@pytest.mark.parametrize("y", [np.zeros(5), np.zeros(8)])
def test_labels_of_another_length_are_refused(union, table, y):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        union.fit(table, y)


def test_nan_in_a_list_of_rows_is_missing(text_backend):
    union = PerModalityUnion([("text", FrozenEncoder(text_backend, store=None), 0)])
    blocks = union.fit_transform([["a cat", 1.0], [np.nan, 2.0]])
    assert np.isnan(blocks).all(axis=1).tolist() == [False, True]


def test_passthrough_takes_a_single_name_and_nullable_numbers(table):
    union = PerModalityUnion(
        [("h", "passthrough", "height"), ("both", "passthrough", [1, 2])]
    )
    blocks = union.fit_transform(
        table.astype({"height": "Float64", "width": "Float64"})
    )
    np.testing.assert_array_equal(blocks[:, 0], table["height"])
    np.testing.assert_array_equal(blocks[:, 1:], table[["height", "width"]].to_numpy())


@pytest.mark.parametrize("kind", ["pandas", "polars", "numpy"])
def test_a_scalar_selection_for_a_transformer_of_tables_is_explained(table, kind):
    X = {"pandas": table, "polars": pl.from_pandas(table), "numpy": table.to_numpy()}[
        kind
    ]
    column = 1 if kind == "numpy" else "height"
    with pytest.raises(ValueError, match="container|2D array") as caught:
        PerModalityUnion([("h", SimpleImputer(), column)]).fit(X)
    [note] = caught.value.__notes__
    assert "in branch 'h' of PerModalityUnion" in note
    assert note.endswith(f"which is one-dimensional; select [{column!r}] instead.")


@pytest.mark.parametrize("kind", ["pandas", "polars", "numpy"])
def test_a_table_for_a_transformer_of_texts_is_explained(table, kind):
    X = {"pandas": table, "polars": pl.from_pandas(table), "numpy": table.to_numpy()}[
        kind
    ]
    column = 0 if kind == "numpy" else "note"
    with pytest.raises((ValueError, AttributeError)) as caught:
        PerModalityUnion([("text", CountVectorizer(), [column])]).fit_transform(X)
    notes = getattr(caught.value, "__notes__", [])
    assert f"{column!r}" in str(caught.value) + "".join(notes)


def test_a_flat_output_is_refused_with_the_way_out(table):
    with pytest.raises(ValueError, match=r"select it by a list, as in \['x'\]"):
        PerModalityUnion([("h", Recorder(), "height")]).fit_transform(table)


def test_errors_name_the_branch_and_the_rows_it_saw(table):
    with pytest.raises(ValueError, match="y has 1 class only") as caught:
        PerModalityUnion([("h", ContrastiveProjector(), ["height"])]).fit_transform(
            table, ["x", "y", "y", "x", "y", "x"][:1] + ["x", "y", "x", "y", "x"]
        )
    assert caught.value.__notes__ == [
        "This was in branch 'h' of PerModalityUnion, which received the 4 of 6 rows "
        "with its modality."
    ]


def test_names_given_for_output_must_be_those_seen(union, table):
    union.fit(table)
    names = union.get_feature_names_out(["note", "height", "width"])
    assert names.tolist() == union.get_feature_names_out().tolist()
    for wrong in (["a", "b", "c"], ["note"]):
        with pytest.raises(ValueError, match="must equal the 3 columns seen in fit"):
            union.get_feature_names_out(wrong)


def test_metadata_without_routing_is_refused(union, table):
    with pytest.raises(ValueError, match="enable_metadata_routing"):
        union.fit(table, sample_weight=np.ones(6))


def test_the_whole_is_cross_validated_with_missing_modalities(text_backend):
    rng = np.random.default_rng(0)
    y = np.repeat(["cat", "dog"], 60)
    X = pd.DataFrame(
        {
            "note": [
                f"{'aaa' if label == 'cat' else 'ooo'} {rng.integers(9)}" for label in y
            ],
            "height": rng.normal(size=120) + (y == "cat"),
        }
    )
    X.loc[rng.random(120) < 0.3, "note"] = None
    X.loc[X["note"].notna() & (rng.random(120) < 0.3), "height"] = np.nan
    projector = ContrastiveProjector(4, hidden_layer_sizes=(8,), random_state=0)
    union = PerModalityUnion(
        [
            ("text", make_pipeline(FrozenEncoder(text_backend), projector), "note"),
            ("size", StandardScaler(), ["height"]),
        ]
    )
    trees = cross_val_score(
        make_pipeline(union, HistGradientBoostingClassifier()), X, y, cv=3
    )
    linear = cross_val_score(
        make_pipeline(union, SimpleImputer(), LogisticRegression()), X, y, cv=3
    )
    assert trees.mean() > 0.85
    assert linear.mean() > 0.85


def test_the_diagram_shows_the_branches(union):
    html = union._repr_html_()
    for word in ("text", "FrozenEncoder", "size", "SimpleImputer", "note"):
        assert word in html
