"""Column: cells of any container, their distinct cells, and values back in all rows."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from sklembed.encoders import column as column_module
from sklembed.encoders.column import Column

TEXTS = ["a", "b", "a", None, "c", "b", None]


@pytest.fixture(autouse=True)
def _no_earlier_warnings(monkeypatch):
    monkeypatch.setattr(column_module, "_ANNOUNCED", set())


def keyed(cells):
    """A column whose keys are the cells themselves."""
    column = Column(cells)
    column.set_keys([None if cell is None else cell.encode() for cell in cells])
    return column


@pytest.mark.parametrize(
    ("X", "name"),
    [
        (["x", "y"], None),
        ([["x"], ["y"]], None),
        (np.array(["x", "y"]), None),
        (np.array([["x"], ["y"]]), None),
        (pd.Series(["x", "y"], name="note"), "note"),
        (pd.DataFrame({"note": ["x", "y"]}), "note"),
        (pl.Series("note", ["x", "y"]), "note"),
        (pl.DataFrame({"note": ["x", "y"]}), "note"),
        (pd.array(["x", "y"], dtype="string"), None),
    ],
)
def test_cells_and_name_of_each_container(X, name):
    column = Column(X)
    assert column.cells == ["x", "y"]
    assert column.name == name
    assert len(column) == 2


def test_a_place_has_the_position_and_the_index_label():
    assert Column(["x"]).place(0) == "Row 0 of the column"
    frame = pd.DataFrame({"note": ["x", "y"]}, index=np.array([3, 7]))
    assert Column(frame).place(1) == "Row 1 (index 7) of column 'note'"
    assert Column(pl.DataFrame({"note": ["x"]})).place(0) == "Row 0 of column 'note'"


def test_distinct_cells_are_numbered_by_their_first_rows():
    column = keyed(TEXTS)
    assert column.rows.tolist() == [0, 1, 4]
    assert column.first_rows.tolist() == [0, 1, 0, 3, 4, 1, 6]
    assert column.missing.tolist() == [text is None for text in TEXTS]
    assert column.distinct_keys() == [b"a", b"b", b"c"]
    assert column.distinct_keys(np.array([2, 0])) == [b"c", b"a"]


def test_a_column_of_missing_cells_has_no_distinct_cells():
    column = keyed([None, None])
    assert column.rows.tolist() == []
    assert column.distinct_keys() == []
    assert np.isnan(column.scatter([], n_features=2)).all()


@pytest.mark.parametrize("block", [1, 2, 100])
@pytest.mark.parametrize("seed", range(5))
def test_scatter_equals_a_dict_lookup_for_each_row(monkeypatch, block, seed):
    monkeypatch.setattr(column_module, "_COPY_ROWS", block)
    rng = np.random.default_rng(seed)
    cells = rng.choice(["a", "b", "c", "d", None], 30).tolist()
    column = keyed(cells)
    values = rng.normal(size=(len(column.rows), 3)).astype(np.float32)
    order = rng.permutation(len(values))
    pieces = [(part, values[part]) for part in np.array_split(order, 2)]
    value_of = dict(zip(column.distinct_keys(), values, strict=True)) | {None: np.nan}
    output = column.scatter(pieces, n_features=3)
    assert output.dtype == np.float32
    for key, row in zip(column.keys, output, strict=True):
        np.testing.assert_array_equal(row, np.broadcast_to(value_of[key], 3))


def test_scatter_of_ragged_values_keeps_arrays_and_none():
    column = keyed(TEXTS)
    tokens = [np.full((n, 2), n, dtype=np.float32) for n in (1, 2, 2)]
    pieces = [(np.array([1, 2]), tokens[1:]), (np.array([0]), tokens[:1])]
    output = column.scatter(pieces, n_features=2, ragged=True)
    assert output.shape == (7, 1)
    assert output[2, 0] is tokens[0]
    assert output[5, 0] is tokens[1]
    assert [value is None for value in output[:, 0]] == column.missing.tolist()


def test_errors_are_reported_with_their_repeats_once_per_process():
    column = keyed(TEXTS)
    column.errors[1] = ValueError("cannot decode b. Check it")
    with pytest.warns(UserWarning, match=r"2 cells .*\(2 x cannot decode b\).*Row 1 "):
        column.warn_of_errors(stacklevel=1)
    column.warn_of_errors(stacklevel=1)  # the second time without a warning
    column.errors[4] = ValueError("cannot decode c")
    with pytest.warns(UserWarning, match="3 cells .*Row 4 .*cannot decode c"):
        column.warn_of_errors(stacklevel=1)


def test_a_topic_is_warned_of_once_per_column():
    with pytest.warns(UserWarning, match="no text"):
        Column(["x"]).warn_once("topic", "no text", stacklevel=1)
    Column(["y"]).warn_once("topic", "no text", stacklevel=1)
    with pytest.warns(UserWarning, match="no text"):
        Column(pd.Series(["x"], name="note")).warn_once(
            "topic", "no text", stacklevel=1
        )
