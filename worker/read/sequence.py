"""The pulse sequence: what kind of T1 sequence a series is, and whether two series are of like sequences.

Hides the pulse sequence tags (PS3.3 C.8.3.1 MR Image) and the names that vendors give. Must never guess a class, and
never judge by what only one of two series states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydicom.dataset import Dataset

from models.quality import Figure, judge_sequences
from service.core.dicom.values import number, texts
from worker.read.contrast import Known, tag
from worker.read.study import Series

TIMING = {  # what is plausible of any T1 sequence, in ms and degrees
    "RepetitionTime": (1.0, 20_000.0),
    "EchoTime": (0.02, 200.0),
    "InversionTime": (20.0, 6000.0),
    "FlipAngle": (1.0, 180.0),
}
_NAMES = ("SequenceName", "PulseSequenceName", "SeriesDescription", "ProtocolName")
_MPRAGE_NAMES = re.compile(r"mprage|mp-rage|tfl|bravo|tfe|ir-?f?spgr")
_SPGR_NAMES = re.compile(r"f?spgr|flash|\bfl[23]d|vibe|lava|thrive|t1w?[ _-]*ffe")


def sequence_class(header: Dataset) -> Known[str]:
    """Spin echo without inversion is SE; a gradient echo is MPRAGE when prepared, otherwise SPGR when spoiled."""
    kinds, variant = set(texts(header, "ScanningSequence")), set(texts(header, "SequenceVariant"))
    inversion_ms, repetition_ms = _plausible(header, "InversionTime"), _plausible(header, "RepetitionTime")
    names = " ".join(text for keyword in _NAMES for text in texts(header, keyword)).casefold()
    by_tags, by_name = "tags (0018,0020) (0018,0021) (0018,0080) (0018,0082)", "name of the sequence"
    inverted = inversion_ms is not None or bool({"IR", "MP"} & (kinds | variant))
    if "SE" in kinds:
        plain = "GR" not in kinds and not inverted
        return Known("SE", by_tags) if plain else Known.unknown("spin echo with inversion or gradient echoes")
    if "GR" in kinds:
        # No steady state has so long a repetition: it is that of the inversion.
        if inverted or (repetition_ms is not None and repetition_ms >= 1000):
            return Known("MPRAGE", by_tags)
        if _MPRAGE_NAMES.search(names):
            return Known("MPRAGE", by_name)
        if "SP" in variant:
            return Known("SPGR", by_tags)
        return Known("SPGR", by_name) if _SPGR_NAMES.search(names) else Known.unknown("gradient echo without spoiling")
    return Known.unknown(f"{tag('ScanningSequence')} is neither GR nor SE")


def _plausible(header: Dataset, keyword: str) -> float | None:
    """A time or an angle; None where it is missing or cannot be, as the 0 that many write for what they do not know."""
    value, (least, most) = number(header, keyword), TIMING[keyword]
    return value if value is not None and least <= value <= most else None


def judge_likeness(pre: Series, low: Series) -> tuple[Figure, ...]:
    """Figures of the likeness of two sequences by what both headers state; what only one of them states has none.

    A class is unknown where the two differ only through a tag that one header lacks, or one by its tags and the other
    by its name: "BRAVO" in one description and "POST" in the other are no contradiction.
    """
    stated = {keyword: (_plausible(pre.header, keyword), _plausible(low.header, keyword)) for keyword in TIMING}
    changes = {
        keyword: abs(one - other) / max(one, other)
        for keyword, (one, other) in stated.items()
        if one is not None and other is not None
    }
    classes = sequence_class(pre.header), sequence_class(low.header)
    shared = [keyword for keyword in _CLASS_TAGS if all(_states(series.header, keyword) for series in (pre, low))]
    by_shared = [sequence_class(_only(series.header, [*shared, *_NAMES])) for series in (pre, low)]
    alike = classes[0].value == classes[1].value
    unlike = all(one.source == other.source and one.value != other.value for one, other in (classes, by_shared))
    first, second = (known.value if alike or unlike else None for known in classes)
    return judge_sequences(first, second, changes)


_CLASS_TAGS = ("ScanningSequence", "SequenceVariant", "RepetitionTime", "InversionTime")


def _states(header: Dataset, keyword: str) -> bool:
    """Whether a header says something with a tag; an InversionTime of 0 says that there is none."""
    if keyword not in TIMING:
        return bool(texts(header, keyword))
    return _plausible(header, keyword) is not None or (keyword == "InversionTime" and number(header, keyword) == 0)


def _only(header: Dataset, keywords: Iterable[str]) -> Dataset:
    """A header with nothing but these elements."""
    part = Dataset()
    for keyword in keywords:
        if keyword in header:
            part[keyword] = header[keyword]
    return part


def describe(series: Series) -> str:
    """The sequence of a series for a person who compares two: MPRAGE, RepetitionTime 2300, EchoTime 2.98."""
    values = {keyword: number(series.header, keyword) for keyword in TIMING}
    said = [f"{keyword} {value:g}" for keyword, value in values.items() if value is not None]
    return ", ".join([sequence_class(series.header).value or "unknown sequence", *said])
