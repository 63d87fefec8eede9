"""What is known and from where, or why it is unknown; numbers of a series against what is plausible.

Hides how sources are named. Must never replace a value: what is missing, implausible or not the same in all slices is
unknown, and the source says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydicom.datadict import tag_for_keyword
from pydicom.tag import Tag

from service.core.dicom.site_rules import SiteRule, stated
from service.core.dicom.values import number, texts
from worker.read.planes import Plane

T = TypeVar("T")

PLAUSIBLE = {  # of a head at T1, in the unit of the attribute; anything else is a slip, or another unit
    "PatientWeight": (2.0, 300.0),  # kg
    "MagneticFieldStrength": (0.2, 7.5),  # T
    "RepetitionTime": (1.0, 20_000.0),  # ms
    "EchoTime": (0.02, 200.0),  # ms
    "InversionTime": (20.0, 6000.0),  # ms
    "FlipAngle": (1.0, 180.0),  # degrees
}


@dataclass(frozen=True)
class Known(Generic[T]):
    """A value and its source (tag, code, text or site file), or None and `unknown: why`."""

    value: T | None
    source: str

    @classmethod
    def unknown(cls, why: str) -> Known[T]:
        """Nothing is known, and why."""
        return cls(None, f"unknown: {why}")

    @property
    def why(self) -> str:
        """The source without the word `unknown`."""
        return self.source.removeprefix("unknown: ")


def with_site(header: Known[T], site: Known[T] | None, compared: Callable[[Known[T], Known[T]], Known[T]]) -> Known[T]:
    """What a header and the site's rules say together; `compared` decides where both say something.

    A site's rule fills in what the header leaves open. Rules that contradict each other make the value unknown.
    """
    if site is None:
        return header
    if site.value is None:
        return site
    return Known(site.value, f"{site.source}; {header.why}") if header.value is None else compared(header, site)


class ContradictionError(Exception):
    """A header states something that cannot be, or two things that cannot both be."""


@dataclass(frozen=True)
class Stated:
    """What a series states under one keyword of PLAUSIBLE, before it is judged."""

    keyword: str
    value: float | None  # of the first slice; None where it is missing or no number
    is_uniform: bool  # the same in all slices

    @property
    def plausible(self) -> float | None:
        """The value of the first slice; None where it cannot be, as the 0 that many write for what they do not know."""
        least, most = PLAUSIBLE[self.keyword]
        return self.value if self.value is not None and least <= self.value <= most else None

    @property
    def known(self) -> Known[float]:
        """The value, where all slices state it alike and plausibly."""
        source = tag(self.keyword)
        if not self.is_uniform:
            return Known.unknown(f"{source} differs between slices")
        if self.value is None:
            return Known.unknown(f"{source} is missing or no number")
        if self.plausible is None:
            return Known.unknown(f"{source} is implausible: {self.value:g}")
        return Known(self.value, source)


def read_stated(planes: Sequence[Plane]) -> dict[str, Stated]:
    """What a series states of PLAUSIBLE, by keyword."""
    return {
        keyword: Stated(keyword, number(planes[0].header, keyword), is_uniform(planes, keyword))
        for keyword in PLAUSIBLE
    }


def is_uniform(planes: Sequence[Plane], keyword: str) -> bool:
    """Whether all slices have the same text under a keyword, or none."""
    return len({tuple(texts(plane.header, keyword)) for plane in planes}) == 1


def tag(keyword: str) -> str:
    """How sources name an attribute."""
    found = Tag(tag_for_keyword(keyword) or 0)
    return f"tag ({found.group:04X},{found.element:04X})"


def of_site(rules: Iterable[SiteRule], names: Mapping[str, str], quantity: str) -> Known[Any] | None:
    """What the site's rules say, or None when they say nothing; rules that disagree leave it unknown."""
    found = stated(rules, names, quantity)
    if len(found) > 1:
        return Known.unknown(f"site file: {' and '.join(found.values())} disagree")
    return next((Known(value, f"site file ({rule})") for value, rule in found.items()), None)


def refuse_differing(planes: Sequence[Plane], *keywords: str) -> None:
    """Raise ContradictionError where slices differ under one of these keywords."""
    for keyword in keywords:
        if not is_uniform(planes, keyword):
            raise ContradictionError(f"{tag(keyword)} differs between slices")
