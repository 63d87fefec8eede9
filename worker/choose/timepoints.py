"""Timepoints: which series of a study were acquired in one visit to the scanner.

Hides where headers keep dates and times. A pre-contrast series of one visit and a low-dose series of another are not a
pair, however alike they are: the patient has moved, may have been treated, and may still hold earlier contrast agent.
Must never guess: series without a time are not told apart here, and other witnesses have to.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from pydicom.dataset import Dataset

from service.core.dicom.values import date_and_time
from worker.read.study import Series

LONGEST_BREAK = timedelta(hours=2)  # between two series of one visit; few stay in a scanner as long as that


def started_at(series: Series) -> datetime | None:
    """When the acquisition of a series started, by the first of acquisition, series and content time that is known."""
    for event in ("Acquisition", "Series", "Content"):
        moments = [_moment(plane.header, event) for plane in series.planes]
        known = [moment for moment in moments if moment is not None]
        if known:
            return min(known)
    return None


def hours_apart(one: Series, other: Series) -> float | None:
    """Hours between the starts of two series; None where that is not known."""
    starts = started_at(one), started_at(other)
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


def _moment(header: Dataset, event: str) -> datetime | None:
    """Fractions of seconds and zones do not matter here; the planes of Enhanced MR have date and time, too."""
    date, clock = date_and_time(header, event)
    try:
        return datetime.strptime(date + clock[:6], "%Y%m%d%H%M%S")  # noqa: DTZ007  both series are in the scanner's zone
    except ValueError:
        return None
