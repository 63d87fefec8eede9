"""The pair: which two series of a study are the pre-contrast and the low-dose T1 images.

Hides how scanners and technologists say so: contrast attributes (PS3.3 C.7.6.4 and C.7.6.4b), times, words in several
languages. Must never guess: two witnesses have to agree and none may say the contrary, or a person decides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.agents import find_agent
from service.core.errors import Permanent, Reason
from service.core.header import has_contrast, numbers, other_body_part, texts, time_of_day, why_not_t1, words
from worker.study import Series, Study, axes
from worker.timepoints import refuse_mixture, span_visits


@dataclass(frozen=True)
class Pair:
    """The two series that are processed, what spoke for the choice, and why the other series were set aside."""

    pre: Series
    low: Series
    witnesses: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


def choose_pair(study: Study, pre_series_uid: str | None = None, low_series_uid: str | None = None) -> Pair:
    """The pre-contrast and the low-dose series of a study.

    Two T1 series alike in sequence and geometry, of which at least two witnesses (contrast attributes, time of
    acquisition, words of the description) say who is who and none says the contrary. Names outrank the witnesses.

    Raises:
        Permanent: ONE_SERIES_ONLY, OTHER_BODY_PART, SEVERAL_TIMEPOINTS, AMBIGUOUS_SERIES, PAIR_NOT_COMPARABLE, or the
            fault of a series that would be in the pair (MISSING_SLICES, IRREGULAR_GEOMETRY).
    """
    named = [uid for uid in (pre_series_uid, low_series_uid) if uid]
    unknown = set(named) - {series.series_uid for series in study.series}
    if unknown or len(set(named)) != len(named):
        raise Permanent(Reason.AMBIGUOUS_SERIES, "a named series is not in the study, or one is named twice")
    reasons = {series.series_uid: _why_not_usable(series) for series in study.series}
    usable = [series for series in study.series if series.series_uid in named or not reasons[series.series_uid]]
    if len(named) == 2:
        usable = [series for series in usable if series.series_uid in named]
    if len(usable) < 2:
        aside = [f"{series.label}: {reasons[series.series_uid]}" for series in study.series if series not in usable]
        elsewhere = not usable and any(other_body_part(series.header) for series in study.series)
        reason = Reason.OTHER_BODY_PART if elsewhere else Reason.ONE_SERIES_ONLY
        raise Permanent(reason, "; ".join([f"{len(usable)} usable", *aside, *study.ignored]))
    pre, low, witnesses = _decided(_alike(usable, mixed=len(named) == 2), pre_series_uid, low_series_uid)
    aside = [
        f"{series.label}: {reasons[series.series_uid] or 'has no partner or was not named'}"
        for series in study.series
        if series not in (pre, low)
    ]
    return Pair(pre, low, witnesses, (*aside, *study.ignored))


def _alike(usable: Sequence[Series], *, mixed: bool) -> list[tuple[Series, Series]]:
    """All two that are alike in sequence and geometry, and whole; unless `mixed`, only those of one visit."""
    couples = list(itertools.combinations(usable, 2))
    alike = [couple for couple in couples if not _differences(*couple)]
    if not alike:
        detail = f"{len(usable)} T1 series, no two alike"
        if len(couples) == 1:
            detail = "the two T1 series differ in " + ", ".join(_differences(*couples[0]))
        raise Permanent(Reason.PAIR_NOT_COMPARABLE, detail)
    alike = alike if mixed else refuse_mixture(alike)
    for one, other in alike:
        one.refuse_fault()
        other.refuse_fault()
        if len(one.planes) != len(other.planes):
            counts = f"{one.label} has {len(one.planes)} slices, {other.label} has {len(other.planes)}"
            raise Permanent(Reason.MISSING_SLICES, counts)
    return alike


def _decided(
    alike: Sequence[tuple[Series, Series]], pre_uid: str | None, low_uid: str | None
) -> tuple[Series, Series, tuple[str, ...]]:
    """The one pair (pre, low) that the witnesses agree on, and what they said."""
    possible, heard = [], []
    for one, other in alike:
        for pre, low in ((one, other), (other, one)):
            if pre_uid not in (None, pre.series_uid) or low_uid not in (None, low.series_uid):
                continue
            votes = _votes(pre, low)
            sentences = tuple(sentence for _, sentence in votes)
            if pre_uid and low_uid:
                return pre, low, ("both series were named", *sentences)
            agreeing = sum(vote > 0 for vote, _ in votes) + bool(pre_uid or low_uid)
            if agreeing >= 2 and not any(vote < 0 for vote, _ in votes):
                possible.append((pre, low, sentences))
            heard.append(sentences)
    if len(possible) == 1:
        return possible[0]
    if possible:
        pairs = "; ".join(f"{pre.label} with {low.label}" for pre, low, _ in possible)
        several = span_visits(series for pre, low, _ in possible for series in (pre, low))
        reason = Reason.SEVERAL_TIMEPOINTS if several else Reason.AMBIGUOUS_SERIES
        raise Permanent(reason, f"{len(possible)} possible pairs: {pairs}")
    raise Permanent(Reason.AMBIGUOUS_SERIES, "; ".join(heard[0]) if heard else "the named series has no partner")


def _votes(pre: Series, low: Series) -> list[tuple[int, str]]:
    """What each witness says of this assignment: +1 for, -1 against, 0 silent."""
    contrast = int(has_contrast(low.header)) - int(has_contrast(pre.header))
    order = _order(pre, low)
    described = int(np.sign(_words(low) - _words(pre)))
    said = {1: f"{pre.label} is pre-contrast", 0: "silent", -1: f"{low.label} is pre-contrast"}
    return [
        (contrast, f"contrast attributes: {said[contrast]}"),
        (order, f"time of acquisition: {said[order]}"),
        (described, f"words of the description: {said[described]}"),
    ]


def _order(first: Series, second: Series) -> int:
    """+1 when `first` was acquired before `second`, -1 when after, 0 when the headers do not tell."""
    for event in ("Acquisition", "Series", "Content"):
        date, clock = f"{event}Date", f"{event}Time"
        starts = [
            min((*texts(plane.header, date), time_of_day(plane.header, clock)) for plane in series.planes)
            for series in (first, second)
        ]
        if all(len(start) == 2 and start[1] for start in starts):
            return int(starts[0] < starts[1]) - int(starts[0] > starts[1])
    return 0


_WITHOUT = re.compile(
    r"pre(?:gd|gad|gado|con|contrast|km|kontrast)?|nativ\w*|ohne|without|w/o|wo|sans|senza|sin|non|noncon\w*|plain|vor"
    r"|avant|unenhanced"
)
_AFTER = re.compile(r"post(?:gd|gad|gado|con|contrast|km|kontrast)?|nach|apres|after|with|mit|avec|delayed|enhanced")
_AGENT = re.compile(r"km|kontrast\w*|contrast\w*|ce|gd|gad|gado\w*|\+c|c\+|\+gd|gd\+")


def _words(series: Series) -> int:
    """+1 when the description speaks of contrast agent, -1 when it denies it, 0 when it says neither or both."""
    for keyword in ("SeriesDescription", "ProtocolName"):
        text = " ".join(texts(series.header, keyword))
        said = words(text)
        without, after = any(map(_WITHOUT.fullmatch, said)), any(map(_AFTER.fullmatch, said))
        agent = any(map(_AGENT.fullmatch, said)) or find_agent(text) is not None
        if without or after or agent:
            return int((after or agent) and not without) - int(without and not after)
    return 0


def _why_not_usable(series: Series) -> str:
    """Why a series is no candidate for the pair, or an empty text."""
    if len(series.planes) <= 3:  # one per orientation; a volume with slices missing is refused as such, not overlooked
        return "too few slices"
    return why_not_t1(series.header)


def _differences(one: Series, other: Series) -> list[str]:
    """In which attributes two series are not of the same sequence and geometry; slice count is judged elsewhere."""
    faulty = bool(one.fault or other.fault)
    tolerances = {"Rows": 0.0, "Columns": 0.0, "PixelSpacing": 0.02} | dict.fromkeys(
        ("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle"), 0.1
    )
    found = [] if one.unit == other.unit else ["scaling of stored values"]
    for keyword in ("MRAcquisitionType", "ScanningSequence"):
        values = set(texts(one.header, keyword)), set(texts(other.header, keyword))
        if values[0] != values[1] and all(values):
            found.append(keyword)
    for keyword, tolerance in tolerances.items():
        first, second = numbers(one.header, keyword), numbers(other.header, keyword)
        if len(first) == len(second) and not np.allclose(first, second, rtol=tolerance, atol=0):
            found.append(keyword)
    if not faulty:
        turned = np.dot(np.cross(*axes(one.header)), np.cross(*axes(other.header))) < np.cos(np.radians(5))
        turned |= np.dot(axes(one.header)[0], axes(other.header)[0]) < np.cos(np.radians(5))
        found += ["ImageOrientationPatient"] * bool(turned)
    return found
