"""The pulse sequence: what kind of T1 sequence a series is, and whether two series are of like sequences.

Hides the pulse sequence tags (PS3.3 C.8.3.1 MR Image) and the names that vendors give. Must never guess a class, and
never judge by what only one of two series states.
"""

from __future__ import annotations

import re

from pydicom.dataset import Dataset

from models.quality import Figure, judge_sequences
from service.core.header import number, texts
from worker.contrast import Known, tag
from worker.study import Series

TIMING = ("RepetitionTime", "EchoTime", "InversionTime", "FlipAngle")
_MPRAGE_NAMES = re.compile(r"mprage|mp-rage|tfl|bravo|tfe|ir-?f?spgr")
_SPGR_NAMES = re.compile(r"f?spgr|flash|\bfl[23]d|vibe|lava|thrive|t1w?[ _-]*ffe")


def sequence_class(header: Dataset) -> Known[str]:
    """Spin echo without inversion is SE; a gradient echo is MPRAGE when prepared, otherwise SPGR when spoiled."""
    kinds, variant = set(texts(header, "ScanningSequence")), set(texts(header, "SequenceVariant"))
    inversion_ms, repetition_ms = number(header, "InversionTime") or 0.0, number(header, "RepetitionTime") or 0.0
    keywords = ("SequenceName", "PulseSequenceName", "SeriesDescription", "ProtocolName")
    names = " ".join(text for keyword in keywords for text in texts(header, keyword)).casefold()
    by_tags, by_name = "tags (0018,0020) (0018,0021) (0018,0080) (0018,0082)", "name of the sequence"
    inverted = inversion_ms > 0 or bool({"IR", "MP"} & (kinds | variant))
    if "SE" in kinds:
        plain = "GR" not in kinds and not inverted
        return Known("SE", by_tags) if plain else Known.unknown("spin echo with inversion or gradient echoes")
    if "GR" in kinds:
        if inverted or repetition_ms >= 1000:  # no steady state has so long a repetition: it is that of the inversion
            return Known("MPRAGE", by_tags)
        if _MPRAGE_NAMES.search(names):
            return Known("MPRAGE", by_name)
        if "SP" in variant:
            return Known("SPGR", by_tags)
        return Known("SPGR", by_name) if _SPGR_NAMES.search(names) else Known.unknown("gradient echo without spoiling")
    return Known.unknown(f"{tag('ScanningSequence')} is neither GR nor SE")


def judge_likeness(pre: Series, low: Series) -> tuple[Figure, ...]:
    """Figures of the likeness of two sequences by what both headers state; what only one of them states has none."""
    stated = {keyword: (number(pre.header, keyword), number(low.header, keyword)) for keyword in TIMING}
    changes = {
        keyword: abs(one - other) / (max(abs(one), abs(other)) or 1.0)
        for keyword, (one, other) in stated.items()
        if one is not None and other is not None
    }
    first, second = sequence_class(pre.header), sequence_class(low.header)
    if first.source != second.source and first.value != second.value:
        # "BRAVO" in one description and "POST" in the other are no contradiction: a spoiled echo may be prepared, too.
        return judge_sequences(None, None, changes)
    return judge_sequences(first.value, second.value, changes)


def describe(series: Series) -> str:
    """The sequence of a series for a person who compares two: MPRAGE, RepetitionTime 2300, EchoTime 2.98."""
    values = {keyword: number(series.header, keyword) for keyword in TIMING}
    said = [f"{keyword} {value:g}" for keyword, value in values.items() if value is not None]
    return ", ".join([sequence_class(series.header).value or "unknown sequence", *said])
