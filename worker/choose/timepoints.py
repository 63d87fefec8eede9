"""Timepoints: which series of a study were acquired in one visit to the scanner.

Hides how long a visit is. A pre-contrast series of one visit and a low-dose series of another are not a
pair, however alike they are: the patient has moved, may have been treated, and may still hold earlier contrast agent.
Must never guess: series without a time are not told apart here, and other witnesses have to.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from worker.read.study import Series

LONGEST_BREAK = timedelta(hours=2)  # between two series of one visit; few stay in a scanner as long as that


def hours_apart(one: Series, other: Series) -> float | None:
    """Hours between the starts of two series; None where that is not known."""
    starts = one.facts.started_at, other.facts.started_at
    if starts[0] is None or starts[1] is None:
        return None
    return abs(starts[0] - starts[1]) / timedelta(hours=1)


def are_of_one_visit(one: Series, other: Series) -> bool:
    """Whether nothing in the headers speaks against it."""
    hours = hours_apart(one, other)
    return hours is None or timedelta(hours=hours) <= LONGEST_BREAK


def span_visits(series: Iterable[Series]) -> bool:
    """Whether two of them are of different visits."""
    several = list(series)
    return not all(are_of_one_visit(several[0], other) for other in several[1:])
