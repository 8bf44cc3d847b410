"""Missing rows of a block."""

import numpy as np
import pytest

from sklembed._blocks import observed_rows


def test_a_row_of_nan_is_missing():
    X = np.array([[1.0, 2.0], [np.nan, np.nan], [0.0, 0.0]])
    assert observed_rows(X).tolist() == [True, False, True]


def test_a_row_that_is_half_there_is_refused_by_name():
    X = np.array([[1.0, 2.0], [np.nan, 5.0]])
    with pytest.raises(ValueError, match=r"contains NaN in 1 of 2 columns of row 1 \(1 such rows"):
        observed_rows(X)


def test_infinities_are_refused_and_large_numbers_are_not():
    largest = np.finfo(np.float32).max
    X = np.full((2, 3), largest, dtype=np.float32)  # the sum of a row is infinite
    assert observed_rows(X).all()
    X[1] = [np.inf, -np.inf, 0]  # and here it is NaN
    with pytest.raises(ValueError, match="Input X contains infinity"):
        observed_rows(X)
