"""Errors in a fold of a report: with their place, or as a warning and a score.

Parameters that all folds need are checked before the first.
"""

import warnings
from contextlib import contextmanager
from numbers import Real

from sklearn.exceptions import FitFailedWarning

_MOST_PLACES = 10  # of one error that the warning names


@contextmanager
def located(place):
    """Add its place to an error, such as "fold 0 of leak_report"."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was in {place}.")
        raise


class Failures:
    """Errors in the jobs of a report that a score replaces.

    A job returns its failures with its result, because a warning in a worker process
    does not reach the caller. The report then warns once of the failures of all jobs.

    Parameters
    ----------
    function : str
        Name of the report.
    error_score : "raise" or float
        Score that replaces an error. "raise" raises it, with a note on its place.
    """

    def __init__(self, function, error_score):
        self.function = function
        self.error_score = error_score
        self._places = {}  # by action and error

    @contextmanager
    def located(self, place, action="Fitting"):
        """Record an error of an action, such as "Scoring", in a place such as "fold 0"."""
        try:
            yield
        except Exception as error:
            if self.error_score == "raise":
                error.add_note(f"This was in {place} of {self.function}.")
                raise
            self.add(place, repr(error), action)

    def add(self, place, error, action="Fitting"):
        """Record an error, a text, in a place."""
        self._places.setdefault((action, error), []).append(place)

    def update(self, other):
        """Add the failures of a job."""
        for (action, error), places in other._places.items():
            for place in places:
                self.add(place, error, action)

    def warn(self):
        """Warn once if there are failures; for the caller of the calling function."""
        if not self._places:
            return
        lines = [f"The score of {self.function} is {self.error_score} where it failed:"]
        for (action, error), places in self._places.items():
            named = "; ".join(places[:_MOST_PLACES])
            if len(places) > _MOST_PLACES:
                named += f"; and {len(places) - _MOST_PLACES} more"
            lines.append(f"{action} failed in {named}: {error}")
        warnings.warn("\n".join(lines), FitFailedWarning, stacklevel=3)


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
