"""What would be made of a study, in lines for a person: which series is which and why, and every acquisition value.

Hides how that is laid out. Must never process anything: pixels are not decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from service.core.dicom.site_rules import SiteRule
from service.core.errors import Permanent
from service.core.job import JobOptions
from worker.choose.acquisition import Acquisition, check_acquisition, in_words, read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.read.known import Known
from worker.read.study import Series, Study, read_study


def explain(
    paths: Sequence[Path],
    options: JobOptions,
    rules: Sequence[SiteRule] = (),
    allow_unknown: Collection[str] = (),
) -> Iterator[str]:
    """Lines for a person, until the study is accepted or refused.

    Raises:
        Permanent: why the study would not be processed, after all lines that could be said.
    """
    study = read_study(paths, rules)
    yield from _of_study(study)
    pair = choose_pair(study, options.pre_series_uid, options.low_series_uid)
    yield from _of_pair(pair)
    acquisition = read_acquisition(pair)
    yield from _of_acquisition(acquisition)
    check_acquisition(acquisition, allow_unknown)


def reason_in_words(error: Permanent) -> list[str]:
    """The reason, and each thing that was said about it on a line of its own."""
    return [f"{error.reason.outcome.name} {error.reason.name}: {error.reason.text}", *error.detail.split("; ")]


def _of_study(study: Study) -> Iterator[str]:
    yield "Series"
    for series in study.series:
        yield f"  {series.label}, {len(series.planes)} images, {series.series_uid}"
        yield f"    {series.facts.why_not or '; '.join(_of_candidate(series))}"
    for line in study.ignored:
        yield f"  {line}"


def _of_candidate(series: Series) -> Iterator[str]:
    facts = series.facts
    yield "T1"
    yield "contrast agent in the patient" if facts.has_contrast else "no contrast agent"
    if facts.has_contrast:
        yield f"agent {_said(facts.injection.agent)}"
        yield f"dose {_said(facts.header_dose, 'mmol/kg')}"
    yield {1: "described with contrast", 0: "description silent", -1: "described without contrast"}[facts.words]
    for role, rule in facts.roles.items():
        yield f"{role} by site file ({rule})"
    if series.fault:
        yield f"faulty: {series.fault.detail}"


def _of_pair(pair: Pair) -> Iterator[str]:
    yield f"Pre-contrast is {pair.pre.label}, low dose is {pair.low.label}"
    for sentence in (*pair.witnesses, "images: asked when the study is processed"):
        yield f"  {sentence}"


def _of_acquisition(acquisition: Acquisition) -> Iterator[str]:
    yield "Acquisition"
    for field in fields(acquisition):
        known: Known[float] | Known[str] = getattr(acquisition, field.name)
        name, unit = in_words(field.name)
        yield f"  {name}: {_said(known, unit)}"


def _said(known: Known[float] | Known[str], unit: str = "") -> str:
    if known.value is None:
        return known.source
    value = f"{known.value:.4g}" if isinstance(known.value, float) else known.value
    return f"{value} {unit}".strip() + f", from {known.source}"
