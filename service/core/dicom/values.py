"""The values of one header, wherever they stand and however they are written.

Hides where attributes stand in classic MR (PS3.3 A.4) and in Enhanced MR (functional groups, PS3.3 C.7.6.16), decimal
commas, text that is not in the stated character set, and the two ways to write a moment. Must never judge a value, and
never touch pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.valuerep import PersonName


def values(header: Dataset, keyword: str) -> Iterator[Any]:
    """Every value of an element that is not empty: of the header itself, then of its functional groups in order."""
    return (value for group in _groups(header) if (value := group.get(keyword)) not in (None, ""))


def _groups(header: Dataset) -> Iterator[Dataset]:
    """Where an attribute may stand: the header, then each item of the shared and of every frame's functional groups."""
    yield header
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        sequence: Any = header.get(keyword)
        for group in sequence or ():
            yield group
            for element in group:
                if element.VR == "SQ" and not element.is_private:
                    yield from element.value or ()


def texts(header: Dataset, keyword: str) -> list[str]:
    """All values of an element as stripped text, empty ones left out.

    Text that its reader kept as bytes, since it is not in the stated character set, comes with a letter for each byte.
    """
    value: Any = next(values(header, keyword), None)
    several = value if isinstance(value, MultiValue | list) else [value]
    found = [_text(item).strip() for item in several if item is not None]
    return [text for text in found if text]


def _text(value: Any) -> str:
    if isinstance(value, PersonName) and "\N{REPLACEMENT CHARACTER}" in str(value):
        value = value.original_string
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def terms(header: Dataset, *keywords: str) -> set[str]:
    """All values of these elements in upper case, for comparison with the terms that the standard defines."""
    return {text.upper() for keyword in keywords for text in texts(header, keyword)}


def numbers(header: Dataset, keyword: str) -> list[float]:
    """All values of a numeric element as finite floats; empty when absent or when any of them is not a number.

    A decimal comma, which some consoles write, is read as a point.
    """
    try:
        found = [float(text.replace(",", ".")) for text in texts(header, keyword)]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def number(header: Dataset, *keywords: str) -> float | None:
    """The first number that one of these elements holds; None when none of them does."""
    return next((found[0] for keyword in keywords if (found := numbers(header, keyword))), None)


def items(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; empty when the element is absent or is no sequence."""
    value = next(values(header, keyword), None)
    return list(value) if isinstance(value, Sequence) else []


def date_and_time(header: Dataset, event: str) -> tuple[str, str]:
    """Date (YYYYMMDD) and time (HHMMSS.FFFFFF) of an event as text that sorts; empty what is unknown.

    An acquisition may have both in Acquisition DateTime alone (PS3.3 C.7.6.1), or in that of the frame.
    """
    date, clock = (next(iter(texts(header, f"{event}{part}")), "") for part in ("Date", "Time"))
    if not clock and event == "Acquisition":
        date, clock = acquisition_date_and_time(header)
    clock = clock.replace(":", "")
    is_time = re.fullmatch(r"\d{2,6}(\.\d*)?", clock)
    return date.replace(".", ""), f"{float(clock.ljust(6, '0')):013.6f}" if is_time else ""


def acquisition_date_and_time(header: Dataset) -> tuple[str, str]:
    """Date and time as written in the DateTime of the frame or the acquisition, without the offset from UTC."""
    written = next(iter(texts(header, "FrameAcquisitionDateTime") or texts(header, "AcquisitionDateTime")), "")
    clock = re.split(r"[+-]", written)[0]
    return clock[:8], clock[8:]
