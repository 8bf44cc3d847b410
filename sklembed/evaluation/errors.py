"""Errors in a fold of a report: with their place, or as a warning and a score."""

import warnings
from contextlib import contextmanager

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
