"""The injection: how much contrast agent one series says was injected, and what the site's rules add to it.

Hides the habits of headers (PS3.3 C.7.6.4 Contrast/Bolus, C.7.6.4b Enhanced Contrast/Bolus): volumes in text, decimal
commas, concentrations in three units. Must never replace a value: what is implausible or contradicted is unknown, and
the source says why; a site's rule fills in only what the header leaves open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pydicom.dataset import Dataset

from models.agents import AGENTS, BY_NAME, Agent
from service.core.dicom.header import administered_agents
from service.core.dicom.site_rules import DOSE_RANGE_MMOL_PER_KG, SiteRule
from service.core.dicom.values import items, number, texts
from worker.read.agent import read_agent
from worker.read.known import ContradictionError, Known, of_site, refuse_differing, tag, with_site
from worker.read.planes import Plane

_STANDARD_DOSE_FRACTION = 0.7  # from here on there is nothing to synthesise
_DISAGREEMENT = 1.2  # ratio of the larger to the smaller of two statements of a dose
_GADOLINIUM_MG_PER_MMOL = 157.25


@dataclass(frozen=True)
class Amount:
    """One way to the injected dose: mmol, or mmol/kg, and what it rests on."""

    mmol: float | None
    mmol_per_kg: float | None
    source: str


@dataclass(frozen=True)
class Injection:
    """What one series says was injected. The dose follows from it with the weight, which two series may state."""

    agent: Known[str]  # a key of models.agents.BY_NAME, by code, by text or by rule; any two that disagree: unknown
    volume_ml: Known[float]  # as stated, for the report; the dose is judged by itself
    amounts: tuple[Amount, ...]  # all statements of the header, best first
    contradiction: str  # why these cannot all be true; empty when they can
    site_dose: Known[float] | None  # mmol/kg by the site's rules; None where they say nothing

    def dose(self, weight: Known[float]) -> Known[float]:
        """The dose in mmol/kg, from every statement of the header and the site's rules; they agree within 20 %."""
        try:
            return with_site(self._header_dose(weight), self.site_dose, _agreeing)
        except ContradictionError as error:
            return Known.unknown(str(error))

    def header_dose(self, weight: Known[float]) -> Known[float]:
        """The dose in mmol/kg by the header alone."""
        return replace(self, site_dose=None).dose(weight)

    def _header_dose(self, weight: Known[float]) -> Known[float]:
        if self.contradiction:
            raise ContradictionError(self.contradiction)
        doses = dict(self._doses(weight))
        if not doses:
            return Known.unknown(self._why_no_dose(weight))
        least, most = min(doses.values()), max(doses.values())
        span = f"{least:.4f}..{most:.4f} mmol/kg by {'; '.join(doses)}"
        if least < DOSE_RANGE_MMOL_PER_KG[0] or most > DOSE_RANGE_MMOL_PER_KG[1]:
            raise ContradictionError(f"implausible: {span}")
        if disagree(least, most):
            raise ContradictionError(f"statements disagree: {span}")
        source, value = next(iter(doses.items()))
        return Known(value, source)

    def _doses(self, weight: Known[float]) -> Iterator[tuple[str, float]]:
        """What each statement rests on, and the dose in mmol/kg that follows."""
        for amount in self.amounts:
            if amount.mmol_per_kg is not None:
                yield amount.source, amount.mmol_per_kg
            elif amount.mmol is not None and weight.value is not None:
                yield f"{amount.source} / {weight.source}", amount.mmol / weight.value

    def _why_no_dose(self, weight: Known[float]) -> str:
        if self.amounts:
            return weight.why
        return self.agent.why if self.agent.value is None else "no volume, total dose or dose text"


def read_injection(planes: Sequence[Plane], rules: Sequence[SiteRule], names: Mapping[str, str]) -> Injection:
    """What was injected.

    Args:
        planes: of the series.
        rules: of the site.
        names: of the series, as `service.core.dicom.site_rules.names_of` gives them.
    """
    agent = read_agent(planes, of_site(rules, names, "agent"))
    amounts, contradiction = _amounts_of(planes, agent)
    return Injection(
        agent=agent,
        volume_ml=_volume(planes[0].header),
        amounts=amounts,
        contradiction=contradiction,
        site_dose=of_site(rules, names, "dose_mmol_per_kg"),
    )


def standard_dose(agent: str | None) -> float:
    """The standard dose in mmol/kg.

    Of an unknown agent it is the highest of all: what is standard against that is standard for every agent.
    """
    return max(known.standard_dose_mmol_per_kg for known in AGENTS if agent in (None, known.name))


def is_standard_dose(dose_mmol_per_kg: float, agent: str | None) -> bool:
    """Whether so much was injected that there is nothing to synthesise."""
    return dose_mmol_per_kg >= _STANDARD_DOSE_FRACTION * standard_dose(agent)


def disagree(one: float, other: float) -> bool:
    """Whether two statements of a dose, in one unit, cannot be of the same injection."""
    return max(one, other) > _DISAGREEMENT * min(one, other)


def _agreeing(header: Known[float], site: Known[float]) -> Known[float]:
    if header.value is None or site.value is None or not disagree(header.value, site.value):
        return Known(header.value, f"{header.source}; {site.source} agrees")
    disagreement = f"{header.value:.4f} mmol/kg by {header.source}, {site.value:.4f} by {site.source}"
    return Known.unknown(f"statements disagree: {disagreement}")


def faults_of(rules: Iterable[SiteRule]) -> Iterator[str]:
    """What is wrong with the doses that a site's rules give to low-dose series, a sentence for each rule."""
    for rule in rules:
        dose = rule.dose_mmol_per_kg
        if dose is not None and is_standard_dose(dose, rule.agent):
            yield f"{rule.name}: {dose:g} mmol/kg is about the standard dose"


# ------------------------------------------------------------------------------------------------ amounts


def _volume(header: Dataset) -> Known[float]:
    for keyword in ("ContrastBolusVolume", "ContrastBolusTotalDose"):
        value = number(header, keyword)
        if value and value > 0:
            return Known(value, tag(keyword))
    in_text = _in_text(" ".join(texts(header, "ContrastBolusAgent")), _MILLILITRES)
    return Known(in_text[0], "text (0018,0010)") if len(in_text) == 1 else Known.unknown("no single volume is stated")


def _amounts_of(planes: Sequence[Plane], agent: Known[str]) -> tuple[tuple[Amount, ...], str]:
    """All statements of the amount, or none and why they cannot all be true."""
    keywords = ("ContrastBolusVolume", "ContrastBolusTotalDose", "ContrastBolusIngredientConcentration")
    try:
        refuse_differing(planes, *keywords)
        return tuple(_amounts(planes[0].header, BY_NAME[agent.value] if agent.value else None)), ""
    except ContradictionError as error:
        return (), str(error)


def _amounts(header: Dataset, agent: Agent | None) -> list[Amount]:
    """All statements of the amount, best first.

    ContrastBolusTotalDose is mL of undiluted agent, ContrastBolusVolume mL of the diluted agent (C.7.6.4).
    """
    text = " ".join(texts(header, "ContrastBolusAgent"))
    found = [Amount(None, value, "text (0018,0010)") for value in _in_text(text, r"mmol\s*/\s*kg")]
    if agent is None:
        return found
    molarity = agent.concentration_mmol_per_ml
    total_ml, volume_ml = number(header, "ContrastBolusTotalDose") or 0.0, number(header, "ContrastBolusVolume") or 0.0
    _refuse_contradicting_profile(header)
    if total_ml > 0:
        found.append(Amount(total_ml * molarity, None, tag("ContrastBolusTotalDose")))
    if volume_ml > 0:
        per_ml, how = _strength(header, agent)
        found.append(Amount(volume_ml * per_ml, None, f"{tag('ContrastBolusVolume')}{how}"))
    found += [
        Amount(value * molarity, None, "text (0018,0010), assumes undiluted") for value in _in_text(text, _MILLILITRES)
    ]
    return found + [Amount(None, value * molarity, "text (0018,0010)") for value in _in_text(text, r"ml\s*/\s*kg")]


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
