"""The pair: which two series of a study are the pre-contrast and the low-dose T1 images.

Hides how scanners and technologists say so: contrast attributes and doses (PS3.3 C.7.6.4 and C.7.6.4b), times, words in
several languages, and the site's own rules. Must never guess: two witnesses that know it from different sources
have to agree and none may say the contrary, or a person decides (ADR 9). The images themselves are asked last, by
`models.quality.judge_pair`, when they lie upon each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from models.quality import LIMITS, Figure, Verdict
from service.core.dicom.values import numbers, texts
from service.core.errors import Permanent, Reason
from worker.choose.timepoints import are_of_one_visit, hours_apart, span_visits
from worker.read.facts import EVENTS
from worker.read.injection import disagree
from worker.read.known import Known
from worker.read.sequence import judge_likeness
from worker.read.study import Series, Study, axes


@dataclass(frozen=True)
class Pair:
    """The two series that are processed, what spoke for the choice, and why the other series were set aside."""

    pre: Series
    low: Series
    likeness: tuple[Figure, ...] = ()  # of the two sequences, by their headers
    witnesses: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


def choose_pair(study: Study, pre_series_uid: str | None = None, low_series_uid: str | None = None) -> Pair:
    """The pre-contrast and the low-dose series of a study.

    Two T1 series alike in sequence and geometry, of which at least two of these say who is who and none says the
    contrary: contrast attributes with the dose computed from them, time of acquisition, words of the description, the
    site's rules. Series named by the caller outrank them.

    Raises:
        Permanent: ONE_SERIES_ONLY, OTHER_BODY_PART, SEVERAL_TIMEPOINTS, AMBIGUOUS_SERIES, PAIR_NOT_COMPARABLE, or the
            fault of a series that would be in the pair (MISSING_SLICES, IRREGULAR_GEOMETRY).
    """
    named = [uid for uid in (pre_series_uid, low_series_uid) if uid]
    unknown = set(named) - {series.series_uid for series in study.series}
    if unknown or len(set(named)) != len(named):
        raise Permanent(Reason.AMBIGUOUS_SERIES, "a named series is not in the study, or one is named twice")
    usable = [one for one in study.series if one.series_uid in named or not one.facts.why_not]
    if len(named) == 2:
        usable = [one for one in usable if one.series_uid in named]
    if len(usable) < 2:
        aside = [f"{one.label}: {one.facts.why_not}" for one in study.series if one not in usable]
        elsewhere = not usable and any(one.facts.other_body_part for one in study.series)
        reason = Reason.OTHER_BODY_PART if elsewhere else Reason.ONE_SERIES_ONLY
        raise Permanent(reason, "; ".join([f"{len(usable)} usable", *aside, *study.ignored]))
    alike = _alike(usable) if len(named) == 2 else _of_one_visit(_alike(usable))
    for couple in alike:
        _refuse_parts(couple)
    chosen = _decided(alike, pre_series_uid, low_series_uid)
    pre, low = chosen.pre, chosen.low
    aside = [f"{one.label}: {_why_aside(one)}" for one in study.series if one not in (pre, low)]
    return Pair(pre, low, chosen.likeness, chosen.sentences, (*aside, *study.ignored))


def _why_aside(series: Series) -> str:
    facts = series.facts
    if facts.is_standard and not facts.why_not:
        return f"acquired at about the standard dose, {facts.header_dose.value:.3f} mmol/kg"
    return facts.why_not or "has no partner or was not named"


# ------------------------------------------------------------------------------------------------ likeness


@dataclass(frozen=True)
class _Couple:
    """Two series, either way round, and how alike they are by their headers."""

    one: Series
    other: Series
    likeness: tuple[Figure, ...]  # of their sequences
    differences: tuple[str, ...]  # in sequence and geometry; empty when they are alike


def _couple(one: Series, other: Series) -> _Couple:
    likeness = judge_likeness(one.facts.sequence, other.facts.sequence)
    unlike = [figure.name for figure in likeness if figure.verdict is Verdict.REFUSE]
    return _Couple(one, other, likeness, (*_differences(one, other), *unlike))


def _differences(one: Series, other: Series) -> list[str]:
    """In what two series differ beside class and timing of their sequence; slice count is judged elsewhere."""
    found = [] if one.unit == other.unit else ["scaling of stored values"]
    stated = {
        "MRAcquisitionType": [frozenset(texts(series.header, "MRAcquisitionType")) for series in (one, other)],
        "ScanningSequence": [series.facts.sequence.scanning for series in (one, other)],
    }
    found += [keyword for keyword, values in stated.items() if all(values) and values[0] != values[1]]
    for keyword, tolerance in (("Rows", 0.0), ("Columns", 0.0), ("PixelSpacing", 0.02)):
        first, second = numbers(one.header, keyword), numbers(other.header, keyword)
        if len(first) == len(second) and not np.allclose(first, second, rtol=tolerance, atol=0):
            found.append(keyword)
    if not (one.fault or other.fault):
        turned = np.dot(np.cross(*axes(one.header)), np.cross(*axes(other.header))) < np.cos(np.radians(5))
        turned |= np.dot(axes(one.header)[0], axes(other.header)[0]) < np.cos(np.radians(5))
        found += ["ImageOrientationPatient"] * bool(turned)
    return found


def _alike(usable: Sequence[Series]) -> list[_Couple]:
    """All two that are alike in sequence and geometry."""
    couples = [_couple(*two) for two in itertools.combinations(usable, 2)]
    alike = [couple for couple in couples if not couple.differences]
    if not alike:
        raise _unlike(couples[0]) if len(couples) == 1 else _no_two_alike(usable)
    return alike


def _unlike(couple: _Couple) -> Permanent:
    """Why two series are no pair, whoever named them: what they differ in, and the figures of their headers."""
    detail = [f"the two T1 series differ in {', '.join(couple.differences)}"]
    detail += [
        f"{bad.name} is {bad.value:g}: {LIMITS[bad.name].meaning}"
        for bad in couple.likeness
        if bad.verdict is Verdict.REFUSE
    ]
    detail += [f"{series.label} is {series.facts.sequence}" for series in (couple.one, couple.other)]
    report = {"quality": [figure.row() for figure in couple.likeness]}
    return Permanent(Reason.PAIR_NOT_COMPARABLE, "; ".join(detail), report=report)


def _no_two_alike(usable: Sequence[Series]) -> Permanent:
    said = [f"{one.label} is {one.facts.sequence}" for one in usable]
    return Permanent(Reason.PAIR_NOT_COMPARABLE, "; ".join([f"{len(usable)} T1 series, no two alike", *said]))


def _of_one_visit(alike: Sequence[_Couple]) -> list[_Couple]:
    """Those of one visit to the scanner each."""
    together = [couple for couple in alike if are_of_one_visit(couple.one, couple.other)]
    if not together:
        one, other = alike[0].one, alike[0].other
        apart = f"{one.label} and {other.label} were acquired {hours_apart(one, other):.1f} h apart"
        raise Permanent(Reason.SEVERAL_TIMEPOINTS, apart)
    return together


def _refuse_parts(couple: _Couple) -> None:
    """Refuse a pair in which a series is not whole, or lacks slices at an end."""
    both = couple.one, couple.other
    for series in both:
        series.refuse_fault()
    if len({len(series.planes) for series in both}) > 1:
        counts = " and ".join(f"{series.label} has {len(series.planes)}" for series in both)
        raise Permanent(Reason.MISSING_SLICES, f"{counts} slices")


# ------------------------------------------------------------------------------------------------ decision


@dataclass(frozen=True)
class _Assignment:
    """One series as pre-contrast and another as low dose, and what each witness says of that."""

    pre: Series
    low: Series
    likeness: tuple[Figure, ...]
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


def _decided(alike: Iterable[_Couple], pre_uid: str | None, low_uid: str | None) -> _Assignment:
    """The one pair that the witnesses agree on."""
    assignments = [
        _Assignment(pre, low, couple.likeness, _votes(pre, low), bool(pre_uid) + bool(low_uid))
        for couple in alike
        for pre, low in ((couple.one, couple.other), (couple.other, couple.one))
        if pre_uid in (None, pre.series_uid) and low_uid in (None, low.series_uid)
    ]
    certain = [one for one in assignments if one.is_certain]
    # A series at the standard dose is no low dose where there is another; where there is none, the worker says so.
    certain = [one for one in certain if not one.low.facts.is_standard] or certain
    if len(certain) != 1:
        if certain and span_visits(series for one in certain for series in (one.pre, one.low)):
            raise Permanent(Reason.SEVERAL_TIMEPOINTS, _listed(certain))
        raise Permanent(Reason.AMBIGUOUS_SERIES, _doubt(assignments, certain))
    return certain[0]


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
    best: dict[frozenset[Series], _Assignment] = {}
    for one in assignments:
        key = frozenset({one.pre, one.low})
        if key not in best or one.agreeing > best[key].agreeing:
            best[key] = one
    return list(best.values())


def _split_dose(certain: Sequence[_Assignment]) -> list[str]:
    """A hint where one pre-contrast series has several that follow: a dose in several injections, or repeats."""
    if len({one.pre for one in certain}) > 1:
        return []
    doses = ", ".join(f"{one.low.label} {_in_words(one.low.facts.header_dose)}" for one in certain)
    followed = f"{len(certain)} series follow {certain[0].pre.label}, by their headers with {doses}"
    return [f"{followed}: a dose in several injections cannot be told from repeated images, name the pair"]


def _in_words(dose: Known[float]) -> str:
    return "an unknown dose" if dose.value is None else f"{dose.value:.4f} mmol/kg"


# ------------------------------------------------------------------------------------------------ witnesses


def _votes(pre: Series, low: Series) -> dict[str, tuple[int, str]]:
    """What each witness says of this assignment: +1 for, -1 against, 0 silent, and in words."""
    said = {1: f"{pre.label} is pre-contrast", 0: "silent", -1: f"{low.label} is pre-contrast"}
    contrast = int(low.facts.has_contrast) - int(pre.facts.has_contrast)
    order = _order(pre, low)
    described = int(np.sign(low.facts.words - pre.facts.words))
    return {
        "contrast attributes": (contrast, said[contrast]),
        "computed dose": _dose_vote(pre, low),
        "time of acquisition": (order, said[order]),
        "words of the description": (described, said[described]),
        "site file": _site_vote(pre, low),
    }


def _dose_vote(pre: Series, low: Series) -> tuple[int, str]:
    """A low dose in one series and none in the other; the same in both was entered for the whole examination."""
    before, after = (one.facts.header_dose.value if one.facts.has_contrast else None for one in (pre, low))
    said = ", ".join(
        f"{one.label} has {_in_words(one.facts.header_dose) if one.facts.has_contrast else 'none'}"
        for one in (pre, low)
    )
    if before and after:
        if disagree(before, after):
            return -1, f"{said}: neither is pre-contrast"
        return 0, "silent, the same in both"
    if before:
        return (0, "silent") if low.facts.has_contrast else (-1, said)
    if not after or pre.facts.has_contrast:
        return 0, "silent"
    return (0, f"{said}, about the standard dose") if low.facts.is_standard else (1, said)


def _site_vote(pre: Series, low: Series) -> tuple[int, str]:
    """What the site's rules say of the two."""
    roles = {one: one.facts.roles for one in (pre, low)}
    for one, said_of_it in roles.items():
        if len(said_of_it) > 1:
            return -1, f"{' and '.join(said_of_it.values())} disagree about {one.label}"
    said = [f"{one.label} is {role} by {rule}" for one in (pre, low) for role, rule in roles[one].items()]
    if not said:
        return 0, "silent"
    fits = set(roles[pre]) <= {"pre"} and set(roles[low]) <= {"low"}
    return (1 if fits else -1), ", ".join(said)


def _order(first: Series, second: Series) -> int:
    """+1 when `first` was acquired before `second`, -1 when after, 0 when the headers do not tell."""
    for event in EVENTS:
        starts = first.facts.starts[event], second.facts.starts[event]
        if all(date and clock for date, clock in starts):
            return int(starts[0] < starts[1]) - int(starts[0] > starts[1])
    return 0


def image_witness(pair: Pair, figures: Sequence[Figure]) -> str:
    """What the images themselves say of the order, when it did not refuse the study."""
    more = -next(figure.value for figure in figures if figure.name == "darkening")
    says = f"{pair.pre.label} is pre-contrast" if more > LIMITS["darkening"].works[1] else "silent"
    return f"images: {says}, {100 * more:.2f} % of the brain brightens with the low dose, less what darkens"
