"""Missing rows of a block, a block by itself, and columns of tokens."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from sklembed._table.blocks import check_one_block, known_block, observed_rows
from sklembed._table.tokens import pad_tokens, read_tokens, token_columns


def test_a_row_of_nan_is_missing():
    X = np.array([[1.0, 2.0], [np.nan, np.nan], [0.0, 0.0]])
    assert observed_rows(X).tolist() == [True, False, True]


def test_a_row_that_is_half_there_is_refused_by_name():
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
    found = check_one_block(fitted, X.tolist(), "image", np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, X)
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
    for columns in (list("ced"), list("vwx")):  # other names say nothing of order
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
    """Make an object column, which `np.array` would turn into a table of three dimensions."""
    made = np.empty((len(cells), 1), dtype=object)
    for row, cell in enumerate(cells):
        made[row, 0] = cell
    return made


def test_columns_of_tokens_are_told_by_their_first_cell_that_is_there():
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
