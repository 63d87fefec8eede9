"""The pair: which two series of a study are the pre-contrast and the low-dose T1 images.

Hides how scanners and technologists say so: contrast attributes and doses (PS3.3 C.7.6.4 and C.7.6.4b), times, words in
several languages, and the site's own protocols. Must never guess: two witnesses that know it from different sources
have to agree and none may say the contrary, or a person decides (ADR 9). The images themselves are asked last, by
`models.quality.judge_pair`, when they lie upon each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from models.agents import find_agent
from models.quality import LIMITS, Verdict
from service.core.dicom.header import has_contrast, other_body_part, why_not_t1
from service.core.dicom.site_rules import Protocol, names_of, stated
from service.core.dicom.values import date_and_time, numbers, texts
from service.core.dicom.vocabulary import contrast_said
from service.core.errors import Permanent, Reason
from worker.choose.timepoints import are_of_one_visit, hours_apart, span_visits
from worker.read.contrast import DISAGREEMENT, Known, is_standard_dose, read_agent, read_dose, read_weight
from worker.read.sequence import describe, judge_likeness
from worker.read.study import Series, Study, axes


@dataclass(frozen=True)
class Pair:
    """The two series that are processed, what spoke for the choice, and why the other series were set aside."""

    pre: Series
    low: Series
    witnesses: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Account:
    """What is known of one series without the others."""

    series: Series
    why_not: str  # why it is no candidate for the pair; empty when it is one
    has_contrast: bool
    words: int  # +1 when the description speaks of contrast agent, -1 when it denies it, 0 when it is silent
    roles: dict[str, str]  # what the site's protocols say: the rule by role; more than one: they disagree
    agent: Known[str]
    dose: Known[float]  # mmol/kg by the header alone

    @property
    def label(self) -> str:
        """How messages name the series."""
        return self.series.label

    @property
    def is_standard(self) -> bool:
        """Whether the header says that it was acquired at about the standard dose."""
        return self.dose.value is not None and is_standard_dose(self.dose.value, self.agent.value)


def take_accounts(study: Study, protocols: Sequence[Protocol] = ()) -> tuple[Account, ...]:
    """What is known of each series of a study."""
    return tuple(_account(series, protocols) for series in study.series)


def choose_pair(
    study: Study,
    pre_series_uid: str | None = None,
    low_series_uid: str | None = None,
    protocols: Sequence[Protocol] = (),
) -> Pair:
    """The pre-contrast and the low-dose series of a study.

    Two T1 series alike in sequence and geometry, of which at least two of these say who is who and none says the
    contrary: contrast attributes with the dose computed from them, time of acquisition, words of the description, the
    site's protocols. Series named by the caller outrank them.

    Raises:
        Permanent: ONE_SERIES_ONLY, OTHER_BODY_PART, SEVERAL_TIMEPOINTS, AMBIGUOUS_SERIES, PAIR_NOT_COMPARABLE, or the
            fault of a series that would be in the pair (MISSING_SLICES, IRREGULAR_GEOMETRY).
    """
    named = [uid for uid in (pre_series_uid, low_series_uid) if uid]
    unknown = set(named) - {series.series_uid for series in study.series}
    if unknown or len(set(named)) != len(named):
        raise Permanent(Reason.AMBIGUOUS_SERIES, "a named series is not in the study, or one is named twice")
    accounts = take_accounts(study, protocols)
    usable = [one for one in accounts if one.series.series_uid in named or not one.why_not]
    if len(named) == 2:
        usable = [one for one in usable if one.series.series_uid in named]
    if len(usable) < 2:
        aside = [f"{one.label}: {one.why_not}" for one in accounts if one not in usable]
        elsewhere = not usable and any(other_body_part(series.header) for series in study.series)
        reason = Reason.OTHER_BODY_PART if elsewhere else Reason.ONE_SERIES_ONLY
        raise Permanent(reason, "; ".join([f"{len(usable)} usable", *aside, *study.ignored]))
    alike = _alike(usable) if len(named) == 2 else _of_one_visit(_alike(usable))
    for couple in alike:
        _refuse_parts(*couple)
    pre, low, witnesses = _decided(alike, pre_series_uid, low_series_uid)
    aside = [f"{one.label}: {_why_aside(one)}" for one in accounts if one not in (pre, low)]
    return Pair(pre.series, low.series, witnesses, (*aside, *study.ignored))


def _account(series: Series, protocols: Sequence[Protocol]) -> Account:
    agent = read_agent(series, protocols)
    roles = stated(protocols, names_of(series.header), "role")
    return Account(
        series=series,
        why_not=_why_not_usable(series, roles),
        has_contrast=has_contrast(series.header),
        words=_words(series),
        roles=roles,
        agent=agent,
        dose=read_dose(series, agent, read_weight(series)),
    )


def _why_not_usable(series: Series, roles: dict[str, str]) -> str:
    """Why a series is no candidate for the pair, or an empty text. A role in the site file vouches for its timing."""
    if list(roles) == ["ignore"]:
        return f"ignored by the site file ({roles['ignore']})"
    if len(series.planes) <= 3:  # one per orientation; a volume with slices missing is refused as such, not overlooked
        return "too few slices"
    return why_not_t1(series.header, is_vouched_for=bool(roles))


def _why_aside(account: Account) -> str:
    if account.is_standard and not account.why_not:
        return f"acquired at about the standard dose, {account.dose.value:.3f} mmol/kg"
    return account.why_not or "has no partner or was not named"


def _alike(usable: Sequence[Account]) -> list[tuple[Account, Account]]:
    """All two that are alike in sequence and geometry."""
    couples = list(itertools.combinations(usable, 2))
    alike = [couple for couple in couples if not _differences(*(one.series for one in couple))]
    if not alike:
        if len(couples) == 1:
            _refuse_unlike(*(one.series for one in couples[0]))
        detail = [
            f"{len(usable)} T1 series, no two alike",
            *(f"{one.label} is {describe(one.series)}" for one in usable),
        ]
        raise Permanent(Reason.PAIR_NOT_COMPARABLE, "; ".join(detail))
    return alike


def _refuse_unlike(one: Series, other: Series) -> NoReturn:
    """Refuse two series, whoever named them, with what they differ in and the figures of their headers."""
    figures = judge_likeness(one, other)
    detail = [f"the two T1 series differ in {', '.join(_differences(one, other))}"]
    detail += [
        f"{bad.name} is {bad.value:g}: {LIMITS[bad.name].meaning}" for bad in figures if bad.verdict is Verdict.REFUSE
    ]
    detail += [f"{series.label} is {describe(series)}" for series in (one, other)]
    report = {"quality": [figure.row() for figure in figures]}
    raise Permanent(Reason.PAIR_NOT_COMPARABLE, "; ".join(detail), report=report)


def _of_one_visit(alike: Sequence[tuple[Account, Account]]) -> list[tuple[Account, Account]]:
    """Those of one visit to the scanner each."""
    together = [couple for couple in alike if are_of_one_visit(*(one.series for one in couple))]
    if not together:
        one, other = alike[0]
        apart = f"{one.label} and {other.label} were acquired {hours_apart(one.series, other.series):.1f} h apart"
        raise Permanent(Reason.SEVERAL_TIMEPOINTS, apart)
    return together


def _refuse_parts(one: Account, other: Account) -> None:
    """Refuse a pair in which a series is not whole, or lacks slices at an end."""
    one.series.refuse_fault()
    other.series.refuse_fault()
    if len(one.series.planes) != len(other.series.planes):
        counts = " and ".join(f"{each.label} has {len(each.series.planes)}" for each in (one, other))
        raise Permanent(Reason.MISSING_SLICES, f"{counts} slices")


@dataclass(frozen=True)
class _Assignment:
    """One series as pre-contrast and another as low dose, and what each witness says of that."""

    pre: Account
    low: Account
    votes: dict[str, tuple[int, str]]  # by witness: +1 for, -1 against, 0 silent, and in words
    named: int = 0  # how many of the two series the caller named

    @property
    def agreeing(self) -> int:
        """How many witnesses agree that know it from different sources: the dose is one of the contrast attributes."""
        vote = {witness: said > 0 for witness, (said, _) in self.votes.items()}
        attributes = vote["contrast attributes"] or vote["computed dose"]
        return attributes + sum(vote[name] for name in vote.keys() - {"contrast attributes", "computed dose"})

    @property
    def is_certain(self) -> bool:
        """Whether it is left to nobody's judgement."""
        against = any(vote < 0 for vote, _ in self.votes.values())
        return self.named == 2 or (self.agreeing + self.named >= 2 and not against)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the witnesses say."""
        by_name = ("no series was named", "one series was named", "both series were named")[self.named]
        said = tuple(f"{witness}: {sentence}" for witness, (_, sentence) in self.votes.items())
        return (by_name, *said) if self.named else said


def _decided(
    alike: Iterable[tuple[Account, Account]], pre_uid: str | None, low_uid: str | None
) -> tuple[Account, Account, tuple[str, ...]]:
    """The one pair (pre, low) that the witnesses agree on, and what they said."""
    assignments = [
        _Assignment(pre, low, _votes(pre, low), bool(pre_uid) + bool(low_uid))
        for couple in alike
        for pre, low in (couple, couple[::-1])
        if pre_uid in (None, pre.series.series_uid) and low_uid in (None, low.series.series_uid)
    ]
    certain = [one for one in assignments if one.is_certain]
    # A series at the standard dose is no low dose where there is another; where there is none, the worker says so.
    certain = [one for one in certain if not one.low.is_standard] or certain
    if len(certain) != 1:
        if certain and span_visits(one.series for each in certain for one in (each.pre, each.low)):
            raise Permanent(Reason.SEVERAL_TIMEPOINTS, _listed(certain))
        raise Permanent(Reason.AMBIGUOUS_SERIES, _doubt(assignments, certain))
    return certain[0].pre, certain[0].low, certain[0].sentences


def _doubt(assignments: Sequence[_Assignment], certain: Sequence[_Assignment]) -> str:
    """Every witness's words, for the person who has to decide."""
    if not assignments:
        return "the named series has no partner"
    likely = certain or _likelier(assignments)
    said = [
        f"{one.pre.label} as pre-contrast with {one.low.label} as low dose: {'; '.join(one.sentences)}"
        for one in likely
    ]
    if not certain:
        return ". ".join(said)
    return ". ".join([_listed(certain), *_split_dose(certain), *said])


def _listed(certain: Sequence[_Assignment]) -> str:
    pairs = "; ".join(f"{one.pre.label} with {one.low.label}" for one in certain)
    return f"{len(certain)} possible pairs: {pairs}"


def _likelier(assignments: Sequence[_Assignment]) -> list[_Assignment]:
    """Of each two series, the way round for which more speaks."""
    best: dict[frozenset[Account], _Assignment] = {}
    for one in assignments:
        key = frozenset({one.pre, one.low})
        if key not in best or one.agreeing > best[key].agreeing:
            best[key] = one
    return list(best.values())


def _split_dose(certain: Sequence[_Assignment]) -> list[str]:
    """A hint where one pre-contrast series has several that follow: a dose in several injections, or repeats."""
    if len({one.pre for one in certain}) > 1:
        return []
    doses = ", ".join(f"{one.low.label} {_in_words(one.low.dose)}" for one in certain)
    followed = f"{len(certain)} series follow {certain[0].pre.label}, by their headers with {doses}"
    return [f"{followed}: a dose in several injections cannot be told from repeated images, name the pair"]


def _in_words(dose: Known[float]) -> str:
    return "an unknown dose" if dose.value is None else f"{dose.value:.4f} mmol/kg"


# ------------------------------------------------------------------------------------------------ witnesses


def _votes(pre: Account, low: Account) -> dict[str, tuple[int, str]]:
    """What each witness says of this assignment: +1 for, -1 against, 0 silent, and in words."""
    said = {1: f"{pre.label} is pre-contrast", 0: "silent", -1: f"{low.label} is pre-contrast"}
    contrast = int(low.has_contrast) - int(pre.has_contrast)
    order = _order(pre.series, low.series)
    described = int(np.sign(low.words - pre.words))
    return {
        "contrast attributes": (contrast, said[contrast]),
        "computed dose": _dose_vote(pre, low),
        "time of acquisition": (order, said[order]),
        "words of the description": (described, said[described]),
        "site file": _site_vote(pre, low),
    }


def _dose_vote(pre: Account, low: Account) -> tuple[int, str]:
    """A low dose in one series and none in the other; the same in both was entered for the whole examination."""
    before = pre.dose.value if pre.has_contrast else None
    after = low.dose.value if low.has_contrast else None
    said = ", ".join(f"{one.label} has {_in_words(one.dose) if one.has_contrast else 'none'}" for one in (pre, low))
    if before and after:
        differ = max(before, after) > DISAGREEMENT * min(before, after)
        return (-1, f"{said}: neither is pre-contrast") if differ else (0, "silent, the same in both")
    if before:
        return (0, "silent") if low.has_contrast else (-1, said)
    if not after or pre.has_contrast:
        return 0, "silent"
    return (0, f"{said}, about the standard dose") if low.is_standard else (1, said)


def _site_vote(pre: Account, low: Account) -> tuple[int, str]:
    """What the site's protocols say of the two."""
    disagreeing = [one for one in (pre, low) if len(one.roles) > 1]
    if disagreeing:
        rules = " and ".join(disagreeing[0].roles.values())
        return -1, f"{rules} disagree about {disagreeing[0].label}"
    said = [f"{one.label} is {role} by {rule}" for one in (pre, low) for role, rule in one.roles.items()]
    if not said:
        return 0, "silent"
    fits = set(pre.roles) <= {"pre"} and set(low.roles) <= {"low"}
    return (1 if fits else -1), ", ".join(said)


def _order(first: Series, second: Series) -> int:
    """+1 when `first` was acquired before `second`, -1 when after, 0 when the headers do not tell."""
    for event in ("Acquisition", "Series", "Content"):
        starts = [min(date_and_time(plane.header, event) for plane in series.planes) for series in (first, second)]
        if all(date and clock for date, clock in starts):
            return int(starts[0] < starts[1]) - int(starts[0] > starts[1])
    return 0


def _words(series: Series) -> int:
    """+1 when the description speaks of contrast agent, -1 when it denies it, 0 when it says neither or both."""
    for keyword in ("SeriesDescription", "ProtocolName"):
        text = " ".join(texts(series.header, keyword))
        said = contrast_said(text, names_agent=find_agent(text) is not None)
        if said is not None:
            return said
    return 0


def _differences(one: Series, other: Series) -> list[str]:
    """In what two series are not of the same sequence and geometry; slice count is judged elsewhere."""
    found = [] if one.unit == other.unit else ["scaling of stored values"]
    for keyword in ("MRAcquisitionType", "ScanningSequence"):
        values = set(texts(one.header, keyword)), set(texts(other.header, keyword))
        if values[0] != values[1] and all(values):
            found.append(keyword)
    for keyword, tolerance in (("Rows", 0.0), ("Columns", 0.0), ("PixelSpacing", 0.02)):
        first, second = numbers(one.header, keyword), numbers(other.header, keyword)
        if len(first) == len(second) and not np.allclose(first, second, rtol=tolerance, atol=0):
            found.append(keyword)
    if not (one.fault or other.fault):
        turned = np.dot(np.cross(*axes(one.header)), np.cross(*axes(other.header))) < np.cos(np.radians(5))
        turned |= np.dot(axes(one.header)[0], axes(other.header)[0]) < np.cos(np.radians(5))
        found += ["ImageOrientationPatient"] * bool(turned)
    return found + [figure.name for figure in judge_likeness(one, other) if figure.verdict is Verdict.REFUSE]
