"""Errors in a fold of a report: with their place, or as a warning and a score.

Parameters that all folds need are checked before the first.
"""

import warnings
from contextlib import contextmanager
from numbers import Real

from sklearn.exceptions import FitFailedWarning


@contextmanager
def located(place, error_score="raise", action="Fitting"):
    """Add its place to an error, or turn it into a warning if it has a score.

    Parameters
    ----------
    place : str
        Where the error occurs, such as "fold 0 of leak_report".
    error_score : "raise" or float, default="raise"
        Score that replaces the error.
    action : str, default="Fitting"
        What fails, as the subject of the warning.
    """
    try:
        yield
    except Exception as error:
        if error_score == "raise":
            error.add_note(f"This was in {place}.")
            raise
        warnings.warn(
            f"{action} failed in {place}. The score is {error_score}: {error!r}",
            FitFailedWarning,
            stacklevel=3,  # of this function and of contextlib
        )


def check_error_score(error_score):
    """Refuse an error score that is neither "raise" nor a number."""
    is_raise = isinstance(error_score, str) and error_score == "raise"
    if not is_raise and not isinstance(error_score, Real):
        raise ValueError(
            f"error_score must be 'raise' or a number; got {error_score!r}."
        )


def check_one_score(scoring):
    """Refuse several scores."""
    if scoring is not None and not isinstance(scoring, str) and not callable(scoring):
        raise TypeError(
            "scoring must be one score: a name, a scorer or None; got "
            f"{scoring!r}. Call the function once for each score."
        )
