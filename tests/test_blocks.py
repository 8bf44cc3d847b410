"""Column selections, missing rows, single blocks and token columns."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.naive_bayes import GaussianNB

from sklembed import (
    CanonicalAligner,
    CrossAttentionAdaptor,
    DecisionFusionClassifier,
    FusionClassifier,
    FusionRegressor,
    ModalityGapAligner,
    PerModalityUnion,
    SharedFusionEncoder,
)
from sklembed._table.blocks import (
    check_one_block,
    known_block,
    observed_rows,
    resolve_blocks,
)
from sklembed._table.tokens import pad_tokens, read_tokens, token_columns

# Selections

NAMES = ["height", "width", "depth", "weight"]


def in_container(container):
    """Make a table whose last two columns are float32."""
    values = np.random.default_rng(0).normal(size=(30, 4))
    if container == "numpy":
        return values
    frame = pd.DataFrame(values, columns=NAMES)
    frame = frame.astype({"depth": np.float32, "weight": np.float32})
    return frame if container == "pandas" else pl.from_pandas(frame)


BY_POSITION = {
    "positions": [[0, 1], [2, 3]],
    "tuples": [(0, 1), (2, 3)],
    "array": [np.array([0, 1]), np.array([2, 3])],
    "from the end": [[-4, -3], [-2, -1]],
    "slices": [slice(0, 2), slice(2, None)],
    "slices from the end": [slice(None, -2), slice(-2, None)],
    "masks": [[True, True, False, False], np.array([False, False, True, True])],
    "callables of positions": [lambda X: [0, 1], lambda X: [2, X.shape[1] - 1]],
    "callables of slices": [lambda X: slice(0, 2), lambda X: slice(2, 4)],
    "callables of masks": [lambda X: np.arange(4) < 2, lambda X: np.arange(4) > 1],
}
BY_NAME = {
    "names": [NAMES[:2], NAMES[2:]],
    "index": [pd.Index(NAMES[:2]), np.array(NAMES[2:])],
    "slices of names": [slice("height", "width"), slice("depth", None)],
    "slices up to a name": [slice(None, "width"), slice("depth", "weight")],
    "callables of names": [lambda X: X.columns[:2], lambda X: list(X.columns[2:])],
}
SELECTOR = [
    make_column_selector(dtype_include=np.float64),
    make_column_selector(dtype_include=np.float32),
]
SELECTIONS = [
    *[(c, *BY_POSITION[f]) for f in BY_POSITION for c in ("numpy", "pandas", "polars")],
    *[(c, *BY_NAME[f]) for f in BY_NAME for c in ("pandas", "polars")],
    ("pandas", *SELECTOR),
    ("pandas", pd.Series([True, True, False, False]), make_column_selector("^[dw]e")),
]


@pytest.mark.parametrize(("container", "first", "last"), SELECTIONS)
def test_blocks_and_branches_take_every_selection_of_column_transformer(
    container, first, last
):
    X = in_container(container)
    aligner = ModalityGapAligner({"a": first, "b": last})
    assert aligner.fit(X).blocks_ == {"a": slice(0, 2), "b": slice(2, 4)}
    branches = [("b", "passthrough", last), ("a", "passthrough", first)]
    np.testing.assert_array_equal(
        PerModalityUnion(branches).fit_transform(X),
        ColumnTransformer(branches).fit_transform(X),
    )


@pytest.mark.parametrize("form", ["selectors", "callables of names", "slices of names"])
@pytest.mark.parametrize(
    "estimator",
    [
        CanonicalAligner(),
        DecisionFusionClassifier(GaussianNB()),
        FusionClassifier(max_epochs=1),
        FusionRegressor(max_epochs=1),
        SharedFusionEncoder(max_epochs=1),
        CrossAttentionAdaptor(max_epochs=1),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_callables_of_estimators_take_the_table_of_the_user(estimator, form):
    X, y = in_container("pandas"), np.arange(30) % 2
    first, last = (BY_NAME | {"selectors": SELECTOR})[form]
    estimator = clone(estimator).set_params(blocks={"a": first, "b": last})
    assert estimator.fit(X, y).blocks_ == {"a": slice(0, 2), "b": slice(2, 4)}


def test_scalars_select_a_block_of_one_column():
    blocks = {"a": 0, "b": "width", "c": np.int64(-1), "d": lambda X: "depth"}
    X = in_container("pandas")
    found = resolve_blocks(blocks, NAMES, 4, X)
    assert found == {
        "a": slice(0, 1),
        "b": slice(1, 2),
        "c": slice(3, 4),
        "d": slice(2, 3),
    }
    union = PerModalityUnion([(name, "passthrough", blocks[name]) for name in blocks])
    expected = X[["height", "width", "weight", "depth"]]
    np.testing.assert_array_equal(union.fit_transform(X), expected)


def test_scattered_columns_are_positions_in_the_order_of_the_selection():
    blocks = {"a": ["weight", "height"], "b": slice(2, 0, -1)}
    found = resolve_blocks(blocks, NAMES, 4)
    assert [columns.tolist() for columns in found.values()] == [[3, 0], [2, 1]]
    found = resolve_blocks({"a": slice(None, None, -1)}, None, 4)
    assert found["a"].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("colour", r"selects column 'colour', which is not in X. X has the columns"),
        (["colour"], "selects column 'colour', which is not in X"),
        (slice("colour", None), "selects column 'colour'"),
        (slice(None, "colour"), "selects column 'colour'"),
        (lambda X: ["colour"], "selects column 'colour'"),
        ([[0]], r"selects column \[0\], which is not in X"),
        (7, "selects column 7, but X has n_features=4"),
        ([0, -5], "selects column -5, but X has n_features=4"),
        (
            [True, False],
            "selects columns by a mask of 2 values, but X has n_features=4",
        ),
        (None, "selects columns by None. Use a name, a position"),
        (True, "selects columns by True. Use"),
        (1.5, "selects columns by 1.5. Use"),
        (slice(0.5, 2), r"selects columns by slice\(0.5, 2, None\)"),
    ],
)
def test_invalid_selections_are_refused_with_the_block_or_branch(columns, message):
    X = in_container("pandas")
    with pytest.raises(ValueError, match=f"Block 'b' {message}"):
        ModalityGapAligner({"a": [0], "b": columns}).fit(X)
    with pytest.raises(ValueError, match=f"Branch 'b' {message}"):
        PerModalityUnion([("b", "passthrough", columns)]).fit(X)


@pytest.mark.parametrize("columns", ["width", ["width"], slice("width", None)])
def test_names_do_not_select_from_an_array(columns):
    X = in_container("numpy")
    message = "selects column 'width' by name, but X has no column names. Pass a DataF"
    with pytest.raises(ValueError, match=f"Block 'b' {message}"):
        ModalityGapAligner({"a": [0], "b": columns}).fit(X)
    with pytest.raises(ValueError, match=f"Branch 'b' {message}"):
        PerModalityUnion([("b", "passthrough", columns)]).fit(X)


@pytest.mark.parametrize(
    "columns", [[], slice(0, 0), np.zeros(4, dtype=bool), lambda X: []]
)
def test_a_block_without_columns_is_refused(columns):
    with pytest.raises(ValueError, match="'b' selects none of the n_features=4 col"):
        ModalityGapAligner({"a": slice(0, 4), "b": columns}).fit(in_container("numpy"))


def test_a_column_in_no_block_or_in_several_is_refused():
    for columns, message in (
        (["depth"], r"column 'weight' is in 0 of the blocks \['a', 'b'\] \(1 such"),
        (slice(1, None), "column 'width' is in 2 of the blocks"),
        ([2, 3, 3], "column 'weight' is in 2 of the blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_blocks({"a": [0, 1], "b": columns}, NAMES, 4)


def test_a_callable_needs_the_table():
    with pytest.raises(ValueError, match="'a' selects columns by a callable, but the"):
        resolve_blocks({"a": lambda X: [0]}, NAMES, 4)


# Missing rows and single blocks


def test_a_row_of_nan_is_missing():
    X = np.array([[1.0, 2.0], [np.nan, np.nan], [0.0, 0.0]])
    assert observed_rows(X).tolist() == [True, False, True]


def test_a_partly_missing_row_is_refused_by_number():
    X = np.array([[1.0, 2.0], [np.nan, 5.0]])
    with pytest.raises(
        ValueError, match=r"contains NaN in 1 of 2 columns of row 1 \(1 such rows"
    ):
        observed_rows(X)


def test_infinities_are_refused_and_large_numbers_are_not():
    largest = np.finfo(np.float32).max
    X = np.full((2, 3), largest, dtype=np.float32)  # the sum of a row is infinite
    assert observed_rows(X).all()
    X[1] = [np.inf, -np.inf, 0]  # and here it is NaN
    with pytest.raises(ValueError, match="Input X contains infinity"):
        observed_rows(X)


BLOCKS = {"text": slice(0, 2), "image": np.array([2, 4, 3])}


def test_a_block_by_itself_is_checked_as_the_whole_table_is():
    X = np.array([[1, 2, 3], [np.nan] * 3])
    fitted = SimpleNamespace(blocks_=BLOCKS, n_features_in_=5)
    checked = check_one_block(fitted, X.tolist(), "image", np.float32)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, X)
    for X, message in (
        ([[1, 2]], "Block 'image' has 3 columns; got 2"),
        ([[1, np.nan, 2]], "NaN in 1 of 3 columns of row 0"),
        ([[1, np.inf, 2]], "infinity"),
        ([1, 2, 3], "Expected 2D array"),
    ):
        with pytest.raises(ValueError, match=message):
            check_one_block(fitted, X, "image", np.float32)
    with pytest.raises(ValueError, match="no modality 'sound'"):
        check_one_block(fitted, [[1]], "sound", np.float32)


def test_columns_of_another_block_or_order_are_refused_by_name():
    fitted = SimpleNamespace(
        blocks_=BLOCKS,
        n_features_in_=5,
        feature_names_in_=np.array(list("abcde"), dtype=object),
    )
    frame = pd.DataFrame(np.ones((2, 5)), columns=list("abcde"))
    for columns in (list("ced"), list("vwx")):  # new names are ignored
        named = frame[["c", "e", "d"]].set_axis(columns, axis=1)
        assert check_one_block(fitted, named, "image", np.float32).shape == (2, 3)
    for columns in (list("cde"), list("abc")):
        with pytest.raises(
            ValueError, match=r"those of block 'image' in their order, \['c', 'e'"
        ):
            check_one_block(fitted, frame[columns], "image", np.float32)


def test_a_block_is_known_by_its_name():
    assert known_block("text", BLOCKS) == slice(0, 2)
    with pytest.raises(
        ValueError, match=r"no modality 'sound'; fit has seen \['text', 'image'\]"
    ):
        known_block("sound", BLOCKS)


def column(*cells):
    """Make a column of objects; `np.array` would make three dimensions of them."""
    made = np.empty((len(cells), 1), dtype=object)
    for row, cell in enumerate(cells):
        made[row, 0] = cell
    return made


def test_the_first_observed_cell_decides_whether_a_column_has_tokens():
    tokens = column(None, np.nan, np.ones((2, 3)), None)
    others = (
        column(*"abcd"),
        column(None, None, None, None),
        column(1.0, 2.0, None, 4.0),
    )
    table = np.hstack([others[0], tokens, *others[1:]])
    expected = [False, True, False, False]
    assert token_columns(table).tolist() == expected
    frame = pd.DataFrame(table).assign(x=1.5, y=pd.Categorical(list("abab")))
    assert token_columns(frame).tolist() == [*expected, False, False]
    assert token_columns(column(pd.NA, np.ones((1, 3)))).tolist() == [True]
    for numbers in (np.ones((4, 2)), [[1, 2]], np.ones(3, dtype=object)):
        assert len(token_columns(numbers)) == 0


def test_tokens_are_padded_with_nan():
    cells = [np.ones((1, 2)), None, np.full((3, 2), 2.0), np.nan, [[3, 3], [4, 4]]]
    tokens = pad_tokens(read_tokens(cells, "text"), 2)
    assert tokens.dtype == np.float32
    assert tokens.shape == (5, 3, 2)
    for cell, padded in zip(cells, tokens, strict=True):
        vectors = np.asarray(cell) if np.ndim(cell) == 2 else np.empty((0, 2))
        np.testing.assert_array_equal(padded[: len(vectors)], vectors)
        assert np.isnan(padded[len(vectors) :]).all()


def test_a_column_without_a_token_keeps_the_width_that_is_known():
    tokens = pad_tokens(read_tokens([None, np.nan], "text", 7), 7)
    assert tokens.shape == (2, 1, 7)
    assert np.isnan(tokens).all()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            np.ones((2, 4)),
            "Row 1 of the token column 'text' has tokens of width 4, but 3 was exp",
        ),
        (np.ones(3), r"Row 1 of the token column 'text' should .* got shape \(3,\)\."),
        (5.0, r"Row 1 of .* got shape \(\)\."),
        (np.ones((0, 3)), r"Row 1 of .* at least one token; got shape \(0, 3\)\."),
        (
            np.full((1, 3), np.nan),
            r"Row 1 of .* got shape \(1, 3\), with NaN or infinity\.",
        ),
        (
            np.full((1, 3), 1e39),
            r"Row 1 of .* got shape \(1, 3\), with NaN or infinity\.",
        ),
    ],
)
def test_cells_that_hold_no_tokens_are_refused_by_row(cell, message):
    with pytest.raises(ValueError, match=message):
        read_tokens([np.ones((2, 3)), cell], "text")
    if np.shape(cell) == (2, 4):
        with pytest.raises(ValueError, match="Row 0 .* width 4, but 3 was expected"):
            read_tokens([cell], "text", 3)


@pytest.mark.parametrize("cell", ["words", [[1, 2, 3], [1]], {"a": 1}])
def test_cells_that_hold_no_numbers_are_refused_by_row(cell):
    with pytest.raises((ValueError, TypeError)) as caught:
        read_tokens([None, cell], "text")
    assert caught.value.__notes__ == ["This was in row 1 of the token column 'text'."]
