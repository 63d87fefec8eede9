"""What one series says of the contrast agent and the injected dose, and what the site's protocols add to it.

Hides the spellings and habits of headers (PS3.3 C.7.6.4 Contrast/Bolus, C.7.6.4b Enhanced Contrast/Bolus): free text as
agent, volumes in text, decimal commas, concentrations in three units. Must never replace a value: what is implausible
or contradicted is unknown, and the source says why; a site's protocol fills in only what the header leaves open.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.tag import Tag

from models.agents import AGENTS, BY_NAME, Agent, named_agents
from service.core.dicom.header import administered_agents
from service.core.dicom.site_rules import Protocol, names_of, stated
from service.core.dicom.values import items, number, texts
from worker.read.study import Series

T = TypeVar("T")

STANDARD_DOSE_FRACTION = 0.7  # from here on there is nothing to synthesise
WEIGHT_RANGE_KG = (2.0, 300.0)
DISAGREEMENT = 1.2  # ratio of the largest to the smallest statement of a dose
_DOSE_RANGE_MMOL_PER_KG = (0.003, 0.35)
_GADOLINIUM_MG_PER_MMOL = 157.25


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


class ContradictionError(Exception):
    """A header states something that cannot be, or two things that cannot both be."""


def tag(keyword: str) -> str:
    """How sources name an attribute."""
    found = Tag(tag_for_keyword(keyword) or 0)
    return f"tag ({found.group:04X},{found.element:04X})"


def read_number(series: Series, keyword: str, plausible: tuple[float, float]) -> Known[float]:
    """A number that all planes of a series state alike and plausibly."""
    source, value = tag(keyword), number(series.header, keyword)
    if not _same_in_all(series, keyword):
        return Known.unknown(f"{source} differs between slices")
    if value is None:
        return Known.unknown(f"{source} is missing or no number")
    if not plausible[0] <= value <= plausible[1]:
        return Known.unknown(f"{source} is implausible: {value:g}")
    return Known(value, source)


def read_weight(series: Series) -> Known[float]:
    """PatientWeight in kg."""
    return read_number(series, "PatientWeight", WEIGHT_RANGE_KG)


def read_agent(series: Series, protocols: Sequence[Protocol] = ()) -> Known[str]:
    """The agent by code, by text or by protocol: a key of models.agents.BY_NAME. Any two that disagree: unknown."""
    try:
        header, site = _agent(series), _of_site(series, protocols, "agent")
    except ContradictionError as error:
        return Known.unknown(str(error))
    if site is None or header.value == site.value:
        return header
    if header.value is not None:
        return Known.unknown(f"{header.source} and {site.source} disagree")
    return Known(site.value, f"{site.source}; {header.why}")


def read_dose(
    series: Series, agent: Known[str], weight: Known[float], protocols: Sequence[Protocol] = ()
) -> Known[float]:
    """The injected dose in mmol/kg, from every statement in the header and the site's; they agree within 20 %."""
    try:
        header, site = _dose(series, agent, weight), _of_site(series, protocols, "dose_mmol_per_kg")
    except ContradictionError as error:
        return Known.unknown(str(error))
    if site is None or site.value is None:
        return header
    if header.value is None:
        return Known(site.value, f"{site.source}; {header.why}")
    if max(header.value, site.value) > DISAGREEMENT * min(header.value, site.value):
        disagreement = f"{header.value:.4f} mmol/kg by {header.source}, {site.value:.4f} by {site.source}"
        return Known.unknown(f"statements disagree: {disagreement}")
    return Known(header.value, f"{header.source}; {site.source} agrees")


def read_volume(series: Series) -> Known[float]:
    """The injected volume in mL as stated, for the report; the dose is judged by itself."""
    for keyword in ("ContrastBolusVolume", "ContrastBolusTotalDose"):
        value = number(series.header, keyword)
        if value and value > 0:
            return Known(value, tag(keyword))
    in_text = _in_text(" ".join(texts(series.header, "ContrastBolusAgent")), _MILLILITRES)
    return Known(in_text[0], "text (0018,0010)") if len(in_text) == 1 else Known.unknown("no single volume is stated")


def standard_dose(agent: str | None) -> float:
    """The standard dose in mmol/kg.

    Of an unknown agent it is the highest of all: what is standard against that is standard for every agent.
    """
    return max(known.standard_dose_mmol_per_kg for known in AGENTS if agent in (None, known.name))


def is_standard_dose(dose_mmol_per_kg: float, agent: str | None) -> bool:
    """Whether so much was injected that there is nothing to synthesise."""
    return dose_mmol_per_kg >= STANDARD_DOSE_FRACTION * standard_dose(agent)


def _same_in_all(series: Series, keyword: str) -> bool:
    return len({tuple(texts(plane.header, keyword)) for plane in series.planes}) == 1


def _refuse_differing(series: Series, *keywords: str) -> None:
    for keyword in keywords:
        if not _same_in_all(series, keyword):
            raise ContradictionError(f"{tag(keyword)} differs between slices")


def _of_site(series: Series, protocols: Sequence[Protocol], quantity: str) -> Known[Any] | None:
    """What the site's protocols say, or None when they say nothing."""
    found = stated(protocols, names_of(series.header), quantity)
    if len(found) > 1:
        raise ContradictionError(f"site file: {' and '.join(found.values())} disagree")
    return next((Known(value, f"site file ({rule})") for value, rule in found.items()), None)


# ------------------------------------------------------------------------------------------------ agent


def _agent(series: Series) -> Known[str]:
    """The agent by code or by text; what names another kind of agent, or two, is a contradiction."""
    _refuse_differing(series, "ContrastBolusAgent")
    header = series.header
    if set(texts(header, "ContrastBolusIngredient")) & {"IODINE", "BARIUM", "CARBON DIOXIDE", "XENON"}:
        raise ContradictionError(f"{tag('ContrastBolusIngredient')} is not gadolinium")
    found: dict[str, str] = {}
    for item in administered_agents(header):
        found |= dict.fromkeys(_coded_agents(item), "code (0018,0012)")
    text = " ".join(texts(header, "ContrastBolusAgent"))
    for agent in named_agents(text):
        found.setdefault(agent.name, "text (0018,0010)")
    if len(found) > 1:
        raise ContradictionError(f"several agents in (0018,0010) and (0018,0012): {', '.join(sorted(found))}")
    if not found:
        return Known.unknown(f"{tag('ContrastBolusAgent')} {'names no known agent' if text else 'is missing or empty'}")
    return Known(*found.popitem())


_NO_AGENT_IN_PARTICULAR = (Code("7140000", "SCT", "Contrast agent"), Code("768763008", "SCT", "Gadolinium agent"))


def _coded_agents(item: Dataset) -> list[str]:
    """The agents that a code and its meaning name; older SRT codes count as the SCT codes that replaced them.

    Raises:
        ContradictionError: the code stands for something else than a gadolinium agent that is known here.
    """
    parts = [" ".join(texts(item, key)) for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")]
    code = Code(*parts)
    by_code = [agent.name for agent in AGENTS if agent.sct_code and code == Code(agent.sct_code, "SCT", "")]
    named = [agent.name for agent in named_agents(code.meaning)]
    if not by_code and not named and code not in _NO_AGENT_IN_PARTICULAR:
        raise ContradictionError("a code of (0018,0012) is no known gadolinium agent")
    return [*by_code, *named]


# ------------------------------------------------------------------------------------------------ dose


@dataclass(frozen=True)
class _Amount:
    """One way to the injected dose: mmol, or mmol/kg, and what it rests on."""

    mmol: float | None
    mmol_per_kg: float | None
    source: str


def _dose(series: Series, agent: Known[str], weight: Known[float]) -> Known[float]:
    _refuse_differing(series, "ContrastBolusVolume", "ContrastBolusTotalDose", "ContrastBolusIngredientConcentration")
    amounts = _amounts(series.header, BY_NAME[agent.value] if agent.value else None)
    candidates: dict[str, float] = {}
    for amount in amounts:
        if amount.mmol_per_kg is not None:
            candidates[amount.source] = amount.mmol_per_kg
        elif amount.mmol is not None and weight.value is not None:
            candidates[f"{amount.source} / {weight.source}"] = amount.mmol / weight.value
    if not candidates:
        return Known.unknown(_why_no_candidate(amounts, agent, weight))
    low_end, high_end = min(candidates.values()), max(candidates.values())
    span = f"{low_end:.4f}..{high_end:.4f} mmol/kg by {'; '.join(candidates)}"
    if low_end < _DOSE_RANGE_MMOL_PER_KG[0] or high_end > _DOSE_RANGE_MMOL_PER_KG[1]:
        raise ContradictionError(f"implausible: {span}")
    if high_end > DISAGREEMENT * low_end:
        raise ContradictionError(f"statements disagree: {span}")
    source, value = next(iter(candidates.items()))
    return Known(value, source)


def _why_no_candidate(amounts: Collection[_Amount], agent: Known[str], weight: Known[float]) -> str:
    if amounts:
        return weight.why
    return agent.why if agent.value is None else "no volume, total dose or dose text"


def _amounts(header: Dataset, agent: Agent | None) -> list[_Amount]:
    """All statements of the amount, best first.

    ContrastBolusTotalDose is mL of undiluted agent, ContrastBolusVolume mL of the diluted agent (C.7.6.4).
    """
    text = " ".join(texts(header, "ContrastBolusAgent"))
    found = [_Amount(None, value, "text (0018,0010)") for value in _in_text(text, r"mmol\s*/\s*kg")]
    if agent is None:
        return found
    molarity = agent.concentration_mmol_per_ml
    total_ml, volume_ml = number(header, "ContrastBolusTotalDose") or 0.0, number(header, "ContrastBolusVolume") or 0.0
    _refuse_contradicting_profile(header)
    if total_ml > 0:
        found.append(_Amount(total_ml * molarity, None, tag("ContrastBolusTotalDose")))
    if volume_ml > 0:
        per_ml, how = _strength(header, agent)
        found.append(_Amount(volume_ml * per_ml, None, f"{tag('ContrastBolusVolume')}{how}"))
    found += [
        _Amount(value * molarity, None, "text (0018,0010), assumes undiluted") for value in _in_text(text, _MILLILITRES)
    ]
    return found + [_Amount(None, value * molarity, "text (0018,0010)") for value in _in_text(text, r"ml\s*/\s*kg")]


def _refuse_contradicting_profile(header: Dataset) -> None:
    """In Enhanced MR the volume of an agent and the sum over its phases of administration say the same (C.7.6.4b)."""
    for agent in administered_agents(header):
        stated_ml = number(agent, "ContrastBolusVolume")
        phases = items(agent, "ContrastAdministrationProfileSequence")
        given = [value for phase in phases if (value := number(phase, "ContrastBolusVolume")) is not None]
        if stated_ml and phases and len(given) == len(phases) and not _near(sum(given), stated_ml, 0.02):
            detail = f"{stated_ml:g} mL against {sum(given):g} mL in the administration profile (0018,9340)"
            raise ContradictionError(f"{tag('ContrastBolusVolume')}: {detail}")


def _strength(header: Dataset, agent: Agent) -> tuple[float, str]:
    """What a millilitre of the injected solution holds in mmol, and what that rests on."""
    concentration = number(header, "ContrastBolusIngredientConcentration") or 0.0
    source = tag("ContrastBolusIngredientConcentration")
    if concentration <= 0:
        return agent.concentration_mmol_per_ml, ", assumes undiluted"
    per_ml = _mmol_per_ml(concentration, agent)
    if per_ml is None:
        raise ContradictionError(f"{source} does not fit the agent: {concentration:g}")
    return per_ml, f" x {source}"


def _mmol_per_ml(concentration: float, agent: Agent) -> float | None:
    """ContrastBolusIngredientConcentration, which vendors write in three units, as mmol/mL.

    As mmol/mL; as mg of gadolinium per mL, which is what the standard means with GADOLINIUM as ingredient; or as mg of
    the agent per mL, as on the label. A solution stronger than the product is a contradiction.
    """
    molarity = agent.concentration_mmol_per_ml
    for strength in (0.25, 0.5, 1.0):
        for unit in (1.0, _GADOLINIUM_MG_PER_MMOL):
            if _near(concentration, strength * unit, 0.02):
                return concentration / unit if strength <= molarity else None
    if _near(concentration, agent.label_mg_per_ml, 0.02):
        return concentration / (agent.label_mg_per_ml / molarity)
    return None


_MILLILITRES = r"(?:ml|cc)(?![a-z]|\s*/)"  # a flow rate or mL per kg is no volume


def _in_text(text: str, unit: str) -> list[float]:
    """All positive numbers that stand before a unit, decimal point or comma; what is divided by is no amount."""
    values = re.findall(rf"(?<![\d.,/])(\d+(?:[.,]\d+)?)\s*{unit}", text.casefold())
    return [value for value in (float(text.replace(",", ".")) for text in values) if value > 0]


def _near(value: float, reference: float, tolerance: float) -> bool:
    return abs(value - reference) <= tolerance * reference
