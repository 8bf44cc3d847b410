"""Targets of all types: how they are inferred and encoded, and which are refused."""

import warnings
from datetime import date
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.exceptions import DataConversionWarning

from sklembed._targets import encode_target, warn_if_measured
from sklembed._validation import check_class_weight

LEVELS = [["cat", "lion"], ["cat", "lynx"], ["dog", "wolf"], ["dog", "wolf"]]
LABELS = [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    "y",
    [
        ["b", "a", "c", "a"],
        np.array(["b", "a", "c", "a"], dtype=object),
        pd.Series(["b", "a", "c", "a"]),
        pd.Categorical(["b", "a", "c", "a"]),
        [2, 1, 3, 1],
        [2.0, 1.0, 3.0, 1.0],
        np.array([-1, -5, 7, -5], dtype=np.int8),
    ],
    ids=["list", "object", "series", "categorical", "from one", "whole floats", "int8"],
)
def test_classes_are_coded_by_their_order(y):
    target = encode_target(y)
    assert target.kind == "multiclass"
    np.testing.assert_array_equal(target.values, [1, 0, 2, 0])
    np.testing.assert_array_equal(target.strata, [1, 0, 2, 0])
    np.testing.assert_array_equal(target.classes[target.values], np.asarray(y))
    assert target.values.dtype == np.int64


@pytest.mark.parametrize(
    "y", [[0, 1, 1], [True, False, False], ["no", "yes", "yes"], [1.0, 2, 2]]
)
def test_two_classes_are_classes(y):
    target = encode_target(y)
    assert target.kind == "multiclass"
    assert len(target.classes) == 2
    assert target.values[1] == target.values[2] != target.values[0]


@pytest.mark.parametrize(
    "form", [list, np.array, csr_array, pd.DataFrame], ids=lambda f: f.__name__
)
def test_a_column_of_zeros_and_ones_for_each_label_is_multilabel(form):
    target = encode_target(form(LABELS))
    assert target.kind == "multilabel"
    np.testing.assert_array_equal(target.values, LABELS)
    np.testing.assert_array_equal(target.classes, [0, 1, 2])
    assert target.values.dtype == np.float32
    assert target.strata is None


def test_numbers_become_ranks_between_zero_and_one():
    target = encode_target([0.1, 7.5, -3.2, 100.0, 8.1])
    assert target.kind == "continuous"
    np.testing.assert_allclose(target.values, [[0.25], [0.5], [0], [1], [0.75]])
    assert target.values.dtype == np.float32
    assert target.classes is None
    assert target.strata is None


def test_equal_numbers_share_the_mean_of_their_ranks():
    target = encode_target([0.5, 0.5, 1.5, 1.5, 1.5])
    np.testing.assert_allclose(target.values[:, 0], [0.125, 0.125, 0.75, 0.75, 0.75])


def test_ranks_know_no_scale():
    y = np.random.default_rng(0).normal(size=20)
    np.testing.assert_array_equal(
        encode_target(y).values, encode_target(np.exp(5 * y)).values
    )


def test_each_output_is_ranked_by_itself():
    first, second = [0.5, 1.5, 2.5], [9.1, 1.1, 5.1]
    target = encode_target(np.column_stack([first, second]))
    assert target.kind == "continuous"
    np.testing.assert_allclose(target.values, [[0, 1], [0.5, 0], [1, 0.5]])


@pytest.mark.parametrize(
    "y",
    [
        LEVELS,
        np.array(LEVELS, dtype=object),
        pd.DataFrame(LEVELS),
        [[5, 10], [5, 12], [7, 3], [7, 3]],
    ],
    ids=["list", "object", "frame", "ints"],
)
def test_a_column_of_classes_for_each_level_is_hierarchical(y):
    target = encode_target(y)
    assert target.kind == "hierarchical"
    np.testing.assert_array_equal(target.strata, [0, 0, 1, 1])
    np.testing.assert_array_equal(target.values[:, 0], target.strata)
    assert target.values.dtype == np.int64
    for level in range(2):
        np.testing.assert_array_equal(
            target.classes[level][target.values[:, level]], np.asarray(y)[:, level]
        )


# Explicit types


def test_classes_can_be_taken_for_numbers_and_numbers_for_classes():
    grades = [1, 2, 3, 3]
    assert encode_target(grades).kind == "multiclass"
    np.testing.assert_allclose(
        encode_target(grades, "continuous").values[:, 0], [0, 1 / 3, 5 / 6, 5 / 6]
    )
    sizes = [0.5, 0.5, 1.5, 2.5]
    assert encode_target(sizes).kind == "continuous"
    np.testing.assert_array_equal(
        encode_target(sizes, "multiclass").values, [0, 0, 1, 2]
    )


def test_labels_can_be_taken_for_levels_and_a_tree_for_labels():
    assert encode_target(LABELS, "hierarchical").kind == "hierarchical"
    assert encode_target(np.array(LABELS), "multilabel").kind == "multilabel"
    assert encode_target(np.array(LABELS), "continuous").values.shape == (4, 3)


def test_numbers_in_strings_can_be_taken_for_numbers():
    assert encode_target(["10", "9", "1"]).kind == "multiclass"
    np.testing.assert_allclose(
        encode_target(["10", "9", "1"], "continuous").values[:, 0], [1, 0.5, 0]
    )


def test_one_column_is_a_vector_unless_it_is_a_label():
    with pytest.warns(DataConversionWarning):
        target = encode_target([[0], [1], [1]])
    assert target.kind == "multiclass"
    assert encode_target([[0], [1], [1]], "multilabel").values.shape == (3, 1)


# Invalid targets


@pytest.mark.parametrize(
    ("y", "target_type", "message"),
    [
        (["a", None, "b"], "auto", "NaN or None in 1 of 3 rows, first in row 1"),
        ([0.5, 1.5, np.nan], "auto", "NaN or None in 1 of 3 rows, first in row 2"),
        (
            [["a", "b"], ["a", None]],
            "auto",
            "NaN or None in 1 of 2 rows, first in row 1",
        ),
        (["a", "a"], "auto", "y has 1 class only .a in all 2 rows"),
        ([0.5, 0.5, 0.5], "auto", r"y is \[0.5\] in all 3 rows"),
        ([[0.5, 1.5]] * 3, "auto", r"y is \[0.5, 1.5\] in all 3 rows"),
        ([1.0, 2.5, np.inf], "continuous", "contains infinity"),
        ([["a", "x"], ["a", "y"]], "auto", "y has 1 class only"),
        ([0, 1, 1], "multilabel", "a column of 0 and 1 for each label; got shape .3,."),
        ([[0, 2], [1, 1]], "multilabel", r"a column of 0 and 1 .* values \[0 1 2\]"),
        (
            [0, 1, 1],
            "hierarchical",
            "a column of labels for each level.*got shape .3,.",
        ),
        (np.zeros((2, 2, 2)), "auto", "Unknown label type"),
        (LABELS, "multiclass", "1d array"),
        ([[1, 0, 1]] * 4, "auto", r"y is \[1, 0, 1\] in all 4 rows"),
        (csr_array([[0, 1]] * 4), "multilabel", r"y is \[0, 1\] in all 4 rows"),
    ],
)
def test_what_does_not_fit_is_refused(y, target_type, message):
    with pytest.raises(ValueError, match=message):
        encode_target(y, target_type)


def column(cells):
    array = np.empty(len(cells), dtype=object)
    array[:] = cells
    return array


TAGS = [["red", "round"], ["blue"], []]


@pytest.mark.parametrize(
    "y",
    [
        TAGS,
        [tuple(tags) for tags in TAGS],
        [set(tags) for tags in TAGS],
        [np.array(tags) for tags in TAGS],
        pd.Series(TAGS),
        pd.Series([["red"], ["blue"], ["red"]]),
        pd.DataFrame({"tags": TAGS}),
        column(TAGS),
        column(TAGS)[:, None],
        [[3, 5], [3], [4]],
    ],
)
@pytest.mark.parametrize(
    "target_type", ["auto", "multiclass", "multilabel", "continuous"]
)
def test_lists_of_labels_are_refused_with_the_call_that_helps(y, target_type):
    with pytest.raises(
        ValueError, match=r"Row 0 of y .* labels.*MultiLabelBinarizer\(\)\.fit_tra"
    ):
        encode_target(y, target_type)


@pytest.mark.parametrize(
    "y",
    [
        np.array([1.5, 2, 3], dtype=object),
        pd.Series([Decimal("1.5"), Decimal(2), Decimal(3)]),
        pd.Series([1.5, 2, 3], dtype="Float64"),
    ],
    ids=["object", "decimal", "nullable"],
)
@pytest.mark.parametrize("target_type", ["auto", "continuous"])
def test_numbers_of_any_type_are_continuous(y, target_type):
    target = encode_target(y, target_type)
    assert target.kind == "continuous"
    np.testing.assert_allclose(target.values[:, 0], [0, 0.5, 1])


DAYS = pd.date_range("2024-01-01", periods=40)


@pytest.mark.parametrize(
    "y",
    [
        DAYS,
        DAYS.tz_localize("Europe/Paris"),
        pd.Series([date(2024, 1, 1 + i) for i in range(31)]),
        pd.to_timedelta(np.arange(40), unit="min"),
    ],
    ids=["datetime", "time zone", "date", "timedelta"],
)
def test_dates_and_durations_can_be_taken_for_numbers(y):
    target = encode_target(y, "continuous")
    np.testing.assert_allclose(
        target.values[:, 0], np.linspace(0, 1, len(y)), atol=1e-6
    )
    with pytest.warns(
        UserWarning, match="whole numbers or dates.* target_type='continuous'"
    ):
        warn_if_measured(encode_target(y), y)


def test_whole_numbers_of_objects_are_classes_as_they_are():
    target = encode_target(np.array([3, 1, 3], dtype=object))
    assert target.kind == "multiclass"
    assert target.classes.dtype == object
    assert (
        encode_target(pd.Series([Decimal(3), Decimal(1), Decimal(3)])).kind
        == "multiclass"
    )


RNG = np.random.default_rng(0)
PRICES = np.round(RNG.normal(200_000, 50_000, 1000), -3)
COUNTS = RNG.poisson(40, size=(300, 2))


@pytest.mark.parametrize(
    "y",
    [
        PRICES,
        PRICES.astype(int),
        pd.Series(PRICES.astype(int)),
        column([Decimal(int(price)) for price in PRICES]),
        COUNTS,
        np.column_stack([np.arange(300) % 3, COUNTS[:, 0]]),
        RNG.integers(0, 300, size=442),
        RNG.permutation(np.r_[0, np.arange(29)]),
    ],
    ids=[
        "floats",
        "int",
        "series",
        "decimal",
        "counts",
        "class and count",
        "scores",
        "few rows",
    ],
)
def test_whole_numbers_that_look_measured_are_warned_of(y):
    with pytest.warns(
        UserWarning, match=r"whole numbers or dates in .* set target_type='continuous'"
    ):
        warn_if_measured(encode_target(y), y)


INTENTS = np.repeat(np.arange(150), 20)


@pytest.mark.parametrize(
    "y",
    [
        INTENTS,
        RNG.permutation(INTENTS)[: len(INTENTS) * 2 // 3],
        10_000 + 7 * INTENTS,
        np.repeat(np.arange(20), 5),
        np.repeat(np.arange(10), 2),
        PRICES.astype(int).astype(str),
        pd.Categorical(PRICES),
        PRICES + 0.5,
        np.arange(300) % 2 == 0,
        np.column_stack([np.arange(300) % 3, np.arange(300) % 150]),
        np.eye(30, dtype=int)[np.arange(60) % 30],
    ],
    ids=[
        "intents",
        "a fold of intents",
        "numbers of articles",
        "few shots",
        "two shots",
        "strings",
        "categories",
        "fractions",
        "bool",
        "a tree",
        "labels",
    ],
)
def test_labels_are_not_warned_of(y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_measured(encode_target(y), y)


@pytest.mark.parametrize(
    "weights", [{"dog": 2.0, "catt": 5.0}, {"no such label": 5.0}, {0: 5.0}]
)
def test_a_weight_of_no_class_is_refused_by_name(weights):
    unknown = list(weights)[-1]
    with pytest.raises(
        ValueError, match=f"weight for {unknown!r}, which is none of the 2 classes"
    ):
        check_class_weight(weights, np.array(["cat", "dog"]))


def test_a_weight_of_a_class_that_a_fold_lacks_is_warned_of():
    classes = np.array([0, 1])
    with pytest.warns(UserWarning, match=r"weight for 2, .* no effect"):
        check_class_weight({0: 1.0, 1: 2.0, 2: 3.0}, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights in ({1: 2.0}, {0: 1.0, 1.0: 2.0}, "balanced", None):
            check_class_weight(weights, classes)


@pytest.mark.parametrize(
    "y", [[1, "a", 1], [[1, "a"], ["b", "a"]], [["a", 1], ["b", "x"]]], ids=str
)
def test_labels_without_an_order_are_refused_by_their_types(y):
    with pytest.raises(TypeError, match="y mixes labels of the types int, str"):
        encode_target(np.array(y, dtype=object))


def test_words_are_not_numbers():
    with pytest.raises(ValueError, match="lion"):
        encode_target(["1", "lion"], "continuous")


# Subsets of a target


@pytest.mark.parametrize(
    "y", [["a", "b", "a", "c"], LABELS, [0.5, 1.5, 2.5, 3.5], LEVELS], ids=str
)
@pytest.mark.parametrize("rows", [[2, 0], [True, False, True, False]], ids=str)
def test_take_takes_rows_by_positions_or_a_mask(y, rows):
    target, rows = encode_target(y), np.array(rows)
    part = target.take(rows)
    np.testing.assert_array_equal(part.values, target.values[rows])
    assert (part.kind, part.classes) == (target.kind, target.classes)
    if target.strata is None:
        assert part.strata is None
    else:
        np.testing.assert_array_equal(part.strata, target.strata[rows])


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (["a", "b"], "multiclass, 2 classes"),
        (LABELS, "multilabel, 3 classes"),
        ([0.5, 1.5], "continuous"),
        (LEVELS, "hierarchical, 2 levels"),
    ],
    ids=str,
)
def test_it_describes_itself(y, words):
    assert encode_target(y).describe() == words


@pytest.mark.parametrize(
    ("y", "rows", "expected"),
    [
        (["a", "b", "a"], [0, 2], True),
        (["a", "b", "a"], [0, 1], False),
        (LABELS, [0, 2], True),
        (LABELS, [0, 1, 3], False),
        ([0.5, 1.5, 2.5], [0, 1], True),
        ([0.5, 1.5, 2.5], [0], False),
        (LEVELS, [0, 1], True),  # differ below the coarsest level
        (LEVELS, [1, 2], False),
    ],
    ids=str,
)
def test_it_knows_whether_any_two_rows_belong_together(y, rows, expected):
    target = encode_target(y)
    assert target.has_pairs(np.array(rows)) is expected
    assert target.has_pairs(np.empty(0, dtype=int)) is False
