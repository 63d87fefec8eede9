"""The pulse sequence: what kind of T1 sequence a series is, and whether two series are of like sequences.

Hides the pulse sequence tags (PS3.3 C.8.3.1 MR Image) and the names that vendors give. Must never guess a class, and
never judge by what only one of two series states.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from pydicom.dataset import Dataset

from models.quality import Figure, judge_sequences
from service.core.dicom.values import texts
from worker.read.known import Known, Stated, tag

TIMING = ("RepetitionTime", "EchoTime", "InversionTime", "FlipAngle")
_NAMES = ("SequenceName", "PulseSequenceName", "SeriesDescription", "ProtocolName")
_MPRAGE_NAMES = re.compile(r"mprage|mp-rage|tfl|bravo|tfe|ir-?f?spgr")
_SPGR_NAMES = re.compile(r"f?spgr|flash|\bfl[23]d|vibe|lava|thrive|t1w?[ _-]*ffe")
_CLASS_TAGS = ("ScanningSequence", "SequenceVariant", "RepetitionTime", "InversionTime")


@dataclass(frozen=True)
class PulseSequence:
    """What the header of one series says of its pulse sequence."""

    scanning: frozenset[str]  # ScanningSequence
    variant: frozenset[str]  # SequenceVariant
    names: str  # all that may name it, lower case
    timing: Mapping[str, Stated]  # by keyword of TIMING; what is not there is not stated

    @property
    def kind(self) -> Known[str]:
        """Spin echo without inversion is SE; a gradient echo is MPRAGE when prepared, otherwise SPGR when spoiled."""
        by_tags, by_name = "tags (0018,0020) (0018,0021) (0018,0080) (0018,0082)", "name of the sequence"
        repetition_ms = self._plausible("RepetitionTime")
        inverted = self._plausible("InversionTime") is not None or bool({"IR", "MP"} & (self.scanning | self.variant))
        if "SE" in self.scanning:
            plain = "GR" not in self.scanning and not inverted
            return Known("SE", by_tags) if plain else Known.unknown("spin echo with inversion or gradient echoes")
        if "GR" not in self.scanning:
            return Known.unknown(f"{tag('ScanningSequence')} is neither GR nor SE")
        # No steady state has so long a repetition: it is that of the inversion.
        if inverted or (repetition_ms is not None and repetition_ms >= 1000):
            return Known("MPRAGE", by_tags)
        if _MPRAGE_NAMES.search(self.names):
            return Known("MPRAGE", by_name)
        if "SP" in self.variant:
            return Known("SPGR", by_tags)
        is_named_so = _SPGR_NAMES.search(self.names)
        return Known("SPGR", by_name) if is_named_so else Known.unknown("gradient echo without spoiling")

    def __str__(self) -> str:
        """For a person who compares two: MPRAGE, RepetitionTime 2300, EchoTime 2.98."""
        said = [f"{stated.keyword} {stated.value:g}" for stated in self.timing.values() if stated.value is not None]
        return ", ".join([self.kind.value or "unknown sequence", *said])

    def states(self, keyword: str) -> bool:
        """Whether the header says something with a tag; an InversionTime of 0 says that there is none."""
        if keyword not in TIMING:
            return bool(self.scanning if keyword == "ScanningSequence" else self.variant)
        is_without = keyword == "InversionTime" and self.timing[keyword].value == 0
        return self._plausible(keyword) is not None or is_without

    def by(self, keywords: Collection[str]) -> PulseSequence:
        """The sequence if its header had none but these tags, and its names."""
        return replace(
            self,
            scanning=self.scanning if "ScanningSequence" in keywords else frozenset(),
            variant=self.variant if "SequenceVariant" in keywords else frozenset(),
            timing={keyword: stated for keyword, stated in self.timing.items() if keyword in keywords},
        )

    def _plausible(self, keyword: str) -> float | None:
        return self.timing[keyword].plausible if keyword in self.timing else None


def read_sequence(header: Dataset, numbers: Mapping[str, Stated]) -> PulseSequence:
    """What one header says of the pulse sequence; `numbers` is what the series states, by keyword."""
    return PulseSequence(
        scanning=frozenset(texts(header, "ScanningSequence")),
        variant=frozenset(texts(header, "SequenceVariant")),
        names=" ".join(text for keyword in _NAMES for text in texts(header, keyword)).casefold(),
        timing={keyword: numbers[keyword] for keyword in TIMING},
    )


def judge_likeness(one: PulseSequence, other: PulseSequence) -> tuple[Figure, ...]:
    """Figures of the likeness of two sequences, either way round, by what both headers state.

    What only one of them states has no figure. A class is unknown where the two differ only through a tag that one
    header lacks, or one by its tags and the other by its name: "BRAVO" in one description and "POST" in the other are
    no contradiction.
    """
    both = {keyword: (one.timing[keyword].plausible, other.timing[keyword].plausible) for keyword in TIMING}
    changes = {keyword: abs(a - b) / max(a, b) for keyword, (a, b) in both.items() if a is not None and b is not None}
    classes = one.kind, other.kind
    shared = [keyword for keyword in _CLASS_TAGS if one.states(keyword) and other.states(keyword)]
    by_shared = one.by(shared).kind, other.by(shared).kind
    alike = classes[0].value == classes[1].value
    unlike = all(a.source == b.source and a.value != b.value for a, b in (classes, by_shared))
    first, second = (known.value if alike or unlike else None for known in classes)
    return judge_sequences(first, second, changes)
