"""What the headers of one series say, with what the site's rules add: read once, before two series are compared.

Hides which attributes are asked. Must never compare two series, and never guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydicom.dataset import Dataset

from models.agents import find_agent
from service.core.dicom.header import has_contrast, other_body_part, why_not_t1
from service.core.dicom.site_rules import SiteRule, names_of, stated
from service.core.dicom.values import date_and_time, number, texts
from service.core.dicom.vocabulary import contrast_said
from worker.read.injection import Injection, is_standard_dose, read_injection
from worker.read.known import Known, Stated, read_stated
from worker.read.planes import Plane
from worker.read.sequence import PulseSequence, read_sequence

EVENTS = ("Acquisition", "Series", "Content")  # whose date and time tell when a series was acquired, best first
_PROTON_MHZ_PER_T = 42.577
_MOST_SLICES_OF_A_LOCALIZER = 3  # one for each orientation


@dataclass(frozen=True)
class Facts:
    """What is known of one series without the others."""

    why_not: str  # why it is no candidate for the pair; empty when it is one
    other_body_part: str  # than the head; empty where it is the head, or unknown
    has_contrast: bool
    words: int  # +1 when the description speaks of contrast agent, -1 when it denies it, 0 when it is silent
    roles: Mapping[str, str]  # what the site's rules say: the rule by role; more than one: they disagree
    injection: Injection
    header_dose: Known[float]  # mmol/kg by the header alone
    sequence: PulseSequence
    numbers: Mapping[str, Stated]  # by keyword: see worker.read.known.PLAUSIBLE
    proton_field_t: float | None  # the field strength at which protons have the stated imaging frequency
    starts: Mapping[str, tuple[str, str]]  # by event the first date and time of all slices; empty what is unknown
    started_at: datetime | None  # by the first of the events that is known of any slice

    @property
    def is_standard(self) -> bool:
        """Whether the header says that it was acquired at about the standard dose."""
        dose = self.header_dose.value
        return dose is not None and is_standard_dose(dose, self.injection.agent.value)


def read_facts(planes: Sequence[Plane], rules: Sequence[SiteRule] = ()) -> Facts:
    """What is known of the series that these slices are, in any order."""
    header = planes[0].header
    names = names_of(header)
    roles = stated(rules, names, "role")
    numbers = read_stated(planes)
    injection = read_injection(planes, rules, names)
    moments = {event: [date_and_time(plane.header, event) for plane in planes] for event in EVENTS}
    return Facts(
        why_not=_why_not_usable(planes, roles),
        other_body_part=other_body_part(header),
        has_contrast=has_contrast(header),
        words=_words(header),
        roles=roles,
        injection=injection,
        header_dose=injection.header_dose(numbers["PatientWeight"].known),
        sequence=read_sequence(header, numbers),
        numbers=numbers,
        proton_field_t=_proton_field_t(header),
        starts={event: min(found) for event, found in moments.items()},
        started_at=next((first for event in EVENTS if (first := _earliest(moments[event]))), None),
    )


def _why_not_usable(planes: Sequence[Plane], roles: Mapping[str, str]) -> str:
    """Why a series is no candidate for the pair, or an empty text. A role in the site file vouches for its timing."""
    if list(roles) == ["ignore"]:
        return f"ignored by the site file ({roles['ignore']})"
    if len(planes) <= _MOST_SLICES_OF_A_LOCALIZER:  # a volume with slices missing is refused as such, not overlooked
        return "too few slices"
    return why_not_t1(planes[0].header, is_vouched_for=bool(roles))


def _words(header: Dataset) -> int:
    """+1 when the description speaks of contrast agent, -1 when it denies it, 0 when it says neither or both."""
    for keyword in ("SeriesDescription", "ProtocolName"):
        text = " ".join(texts(header, keyword))
        said = contrast_said(text, names_agent=find_agent(text) is not None)
        if said is not None:
            return said
    return 0


def _proton_field_t(header: Dataset) -> float | None:
    frequency_mhz = number(header, "ImagingFrequency") or 0.0
    if not 5 <= frequency_mhz <= 330 or texts(header, "ImagedNucleus") not in ([], ["1H"], ["H"]):
        return None
    return frequency_mhz / _PROTON_MHZ_PER_T


def _earliest(moments: Sequence[tuple[str, str]]) -> datetime | None:
    """The first of the moments that are whole; fractions of seconds and zones do not matter here."""
    return min(filter(None, map(_moment, moments)), default=None)


def _moment(written: tuple[str, str]) -> datetime | None:
    date, clock = written
    try:
        return datetime.strptime(date + clock[:6], "%Y%m%d%H%M%S")  # noqa: DTZ007  both series are in the scanner's zone
    except ValueError:
        return None
