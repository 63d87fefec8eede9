"""How the pair was acquired: field strength, agent, injected dose and sequence class, each with where it came from.

Hides the spellings and habits of headers (PS3.3 C.7.6.4 Contrast/Bolus, C.7.6.4b Enhanced Contrast/Bolus, C.8.3.1 MR
Image): free text as agent, volumes in text, decimal commas, concentrations in three units. Must never replace a value:
what is missing, implausible or contradicted is unknown, and the source says why.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from models.agents import AGENTS, BY_NAME, Agent, find_agent
from models.condition import Conditions
from models.preprocess import Prepared
from service.core.errors import Permanent, Reason
from service.core.header import items, number, texts
from worker.pairing import Pair
from worker.study import Series

T = TypeVar("T")

_FIELD_STRENGTH_RANGE_T = (0.2, 7.5)
_WEIGHT_RANGE_KG = (2.0, 300.0)
_DOSE_RANGE_MMOL_PER_KG = (0.003, 0.35)
STANDARD_DOSE_FRACTION = 0.7  # from here on there is nothing to synthesise
_GADOLINIUM_MG_PER_MMOL = 157.25

_DISAGREEMENT = 1.2  # ratio of the largest to the smallest candidate dose
_PROTON_MHZ_PER_T = 42.577


@dataclass(frozen=True)
class Known(Generic[T]):
    """A value and its source, or None and `unknown: why`."""

    value: T | None
    source: str


@dataclass(frozen=True)
class Acquisition:
    """What is known of how the low-dose series was acquired."""

    field_strength_t: Known[float]
    agent: Known[str]  # generic name, a key of models.agents.BY_NAME
    dose_mmol_per_kg: Known[float]
    weight_kg: Known[float]
    volume_ml: Known[float]
    sequence: Known[str]  # SPGR, MPRAGE or SE

    def conditions(self, prepared: Prepared) -> Conditions:
        """What the network is told: the header's values as they are known, noise and grid as they are measured."""
        return Conditions(
            field_strength_t=self.field_strength_t.value,
            agent=self.agent.value,
            dose_mmol_per_kg=self.dose_mmol_per_kg.value,
            sequence=self.sequence.value,
            sigma=prepared.comparison.sigma,
            spacing_mm=prepared.pre.spacing_mm,
        )


def read_acquisition(pair: Pair) -> Acquisition:
    """Read the headers of both series; the dose is that of the low-dose series."""
    agent = _agent(pair.low)
    weight = _agreed(pair, "PatientWeight", _WEIGHT_RANGE_KG, tolerance=0.02)
    volume = _volume(pair.low)
    return Acquisition(
        field_strength_t=_field_strength(pair),
        agent=agent,
        dose_mmol_per_kg=_dose(pair.low, agent, weight),
        weight_kg=weight,
        volume_ml=volume,
        sequence=_sequence(pair),
    )


def check_acquisition(acquisition: Acquisition, allow_unknown: Collection[str] = ()) -> None:
    """Refuse an acquisition that is not known well enough, or that was made at the standard dose.

    Args:
        acquisition: what the headers say.
        allow_unknown: of "field_strength", "agent" and "dose", those that may be unknown.

    Raises:
        Permanent: UNKNOWN_FIELD_STRENGTH, UNKNOWN_AGENT, UNKNOWN_DOSE, STANDARD_DOSE.
    """
    checks: tuple[tuple[str, Known[float] | Known[str], Reason], ...] = (
        ("field_strength", acquisition.field_strength_t, Reason.UNKNOWN_FIELD_STRENGTH),
        ("agent", acquisition.agent, Reason.UNKNOWN_AGENT),
        ("dose", acquisition.dose_mmol_per_kg, Reason.UNKNOWN_DOSE),
    )
    for name, known, reason in checks:
        if known.value is None and name not in allow_unknown:
            raise Permanent(reason, known.source)
    agent, dose = acquisition.agent.value, acquisition.dose_mmol_per_kg.value
    # No agent has a higher standard dose than the highest: what is standard against that is standard for every agent.
    standards = [known.standard_dose_mmol_per_kg for known in AGENTS if agent in (None, known.name)]
    standard = max(standards)
    if dose is not None and dose >= STANDARD_DOSE_FRACTION * standard:
        raise Permanent(Reason.STANDARD_DOSE, f"{dose:.3f} mmol/kg against a standard of {standard:g} mmol/kg")


def _unknown(why: str) -> Known[T]:
    return Known(None, f"unknown: {why}")


def _tag(keyword: str) -> str:
    tag = Tag(tag_for_keyword(keyword) or 0)
    return f"tag ({tag.group:04X},{tag.element:04X})"


def _same_in_all(series: Series, keyword: str) -> bool:
    return len({tuple(texts(plane.header, keyword)) for plane in series.planes}) == 1


def _agreed(pair: Pair, keyword: str, plausible: tuple[float, float], *, tolerance: float) -> Known[float]:
    """A number that the low-dose series states plausibly and the pre-contrast series does not contradict."""
    source = _tag(keyword)
    if not (_same_in_all(pair.low, keyword) and _same_in_all(pair.pre, keyword)):
        return _unknown(f"{source} differs between slices")
    low, pre = number(pair.low.header, keyword), number(pair.pre.header, keyword)
    if low is None:
        return _unknown(f"{source} is missing or no number")
    if not plausible[0] <= low <= plausible[1]:
        return _unknown(f"{source} is implausible: {low:g}")
    if pre is not None and abs(pre - low) > tolerance * low:
        return _unknown(f"{source} differs between the two series")
    return Known(low, source)


# ------------------------------------------------------------------------------------------------ field strength


def _field_strength(pair: Pair) -> Known[float]:
    """MagneticFieldStrength as written, unless the proton frequency contradicts it.

    Some systems write gauss (15000 for 1.5 T). That is converted only where the imaging frequency confirms it.
    """
    by_frequency = _proton_field_t(pair.low.header)
    gauss = number(pair.low.header, "MagneticFieldStrength") or 0.0
    if by_frequency and gauss > 1000 and _near(gauss / 1e4, by_frequency, 0.1):
        return Known(gauss / 1e4, f"{_tag('MagneticFieldStrength')} in gauss, confirmed by {_tag('ImagingFrequency')}")
    known = _agreed(pair, "MagneticFieldStrength", _FIELD_STRENGTH_RANGE_T, tolerance=0.05)
    if known.value is None and gauss > 1000:
        return _unknown(f"{known.source.removeprefix('unknown: ')}; perhaps gauss, but no frequency confirms it")
    if known.value is not None and by_frequency and not _near(known.value, by_frequency, 0.1):
        return _unknown(f"{known.source} contradicts {_tag('ImagingFrequency')}")
    return known


def _proton_field_t(header: Dataset) -> float | None:
    """The field strength at which protons have the stated imaging frequency."""
    frequency_mhz = number(header, "ImagingFrequency") or 0.0
    if not 5 <= frequency_mhz <= 330 or texts(header, "ImagedNucleus") not in ([], ["1H"], ["H"]):
        return None
    return frequency_mhz / _PROTON_MHZ_PER_T


def _near(value: float, reference: float, tolerance: float) -> bool:
    return abs(value - reference) <= tolerance * reference


# ------------------------------------------------------------------------------------------------ agent and dose


def _agent(low: Series) -> Known[str]:
    """The agent by code or by text; text and code that disagree, and other kinds of agent, make it unknown."""
    header = low.header
    if not _same_in_all(low, "ContrastBolusAgent"):
        return _unknown(f"{_tag('ContrastBolusAgent')} differs between slices")
    if set(texts(header, "ContrastBolusIngredient")) & {"IODINE", "BARIUM", "CARBON DIOXIDE", "XENON"}:
        return _unknown(f"{_tag('ContrastBolusIngredient')} is not gadolinium")
    found: dict[str, str] = {}
    for item in items(header, "ContrastBolusAgentSequence"):
        coded = _coded_agent(item)
        if coded is None:
            return _unknown("a code of (0018,0012) is no known gadolinium agent")
        found[coded.name] = "code (0018,0012)"
    text = " ".join(texts(header, "ContrastBolusAgent"))
    named = find_agent(text)
    if named:
        found.setdefault(named.name, "text (0018,0010)")
    if len(found) > 1:
        return _unknown("several agents in (0018,0010) and (0018,0012)")
    if not found:
        why = "is missing or empty" if not text else "names no known agent, or several"
        return _unknown(f"{_tag('ContrastBolusAgent')} {why}")
    return Known(*found.popitem())


def _coded_agent(item: Dataset) -> Agent | None:
    code = (texts(item, "CodingSchemeDesignator"), texts(item, "CodeValue"))
    by_code = [agent for agent in AGENTS if agent.sct_code and code == (["SCT"], [agent.sct_code])]
    return by_code[0] if by_code else find_agent(" ".join(texts(item, "CodeMeaning")))


@dataclass(frozen=True)
class _Amount:
    """One way to the injected dose: mmol, or mmol/kg, and what it rests on."""

    mmol: float | None
    mmol_per_kg: float | None
    source: str


def _dose(low: Series, agent: Known[str], weight: Known[float]) -> Known[float]:
    """The injected dose in mmol/kg, from every statement in the header; they have to agree within 20 %."""
    for keyword in ("ContrastBolusVolume", "ContrastBolusTotalDose", "ContrastBolusIngredientConcentration"):
        if not _same_in_all(low, keyword):
            return _unknown(f"{_tag(keyword)} differs between slices")
    amounts, refused = _amounts(low.header, BY_NAME[agent.value] if agent.value else None)
    if refused:
        return _unknown(refused)
    candidates: dict[str, float] = {}
    for amount in amounts:
        if amount.mmol_per_kg is not None:
            candidates[amount.source] = amount.mmol_per_kg
        elif amount.mmol is not None and weight.value is not None:
            candidates[f"{amount.source} / {weight.source}"] = amount.mmol / weight.value
    if not candidates:
        return _unknown(_why_no_candidate(amounts, agent, weight))
    low_end, high_end = min(candidates.values()), max(candidates.values())
    if low_end < _DOSE_RANGE_MMOL_PER_KG[0] or high_end > _DOSE_RANGE_MMOL_PER_KG[1]:
        return _unknown(f"implausible: {low_end:.4f}..{high_end:.4f} mmol/kg by {'; '.join(candidates)}")
    if high_end > _DISAGREEMENT * low_end:
        return _unknown(f"statements disagree: {low_end:.4f}..{high_end:.4f} mmol/kg by {'; '.join(candidates)}")
    source, value = next(iter(candidates.items()))
    return Known(value, source)


def _why_no_candidate(amounts: Collection[_Amount], agent: Known[str], weight: Known[float]) -> str:
    if amounts:
        return weight.source.removeprefix("unknown: ")
    if agent.value is None:
        return agent.source.removeprefix("unknown: ")
    return "no volume, total dose or dose text"


def _amounts(header: Dataset, agent: Agent | None) -> tuple[list[_Amount], str]:
    """All statements of the amount, best first; or why the header contradicts itself.

    ContrastBolusTotalDose is mL of undiluted agent, ContrastBolusVolume mL of the diluted agent (C.7.6.4).
    """
    text = " ".join(texts(header, "ContrastBolusAgent"))
    found = [_Amount(None, value, "text (0018,0010)") for value in _in_text(text, r"mmol\s*/\s*kg")]
    if agent is None:
        return found, ""
    molarity = agent.concentration_mmol_per_ml
    total_ml, volume_ml = number(header, "ContrastBolusTotalDose") or 0.0, number(header, "ContrastBolusVolume") or 0.0
    if total_ml > 0:
        found.append(_Amount(total_ml * molarity, None, _tag("ContrastBolusTotalDose")))
    if volume_ml > 0:
        concentration = number(header, "ContrastBolusIngredientConcentration") or 0.0
        if concentration > 0:
            per_ml = _mmol_per_ml(concentration, agent)
            if per_ml is None:
                return [], f"{_tag('ContrastBolusIngredientConcentration')} does not fit the agent: {concentration:g}"
            source = f"{_tag('ContrastBolusVolume')} x {_tag('ContrastBolusIngredientConcentration')}"
            found.append(_Amount(volume_ml * per_ml, None, source))
        else:
            found.append(_Amount(volume_ml * molarity, None, f"{_tag('ContrastBolusVolume')}, assumes undiluted"))
    found += [
        _Amount(value * molarity, None, "text (0018,0010), assumes undiluted") for value in _in_text(text, _MILLILITRES)
    ]
    found += [_Amount(None, value * molarity, "text (0018,0010)") for value in _in_text(text, r"ml\s*/\s*kg")]
    return found, ""


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


_MILLILITRES = r"(?:ml|cc)(?![a-z]|\s*/\s*kg)"


def _in_text(text: str, unit: str) -> list[float]:
    """All positive numbers that stand before a unit, decimal point or comma."""
    values = re.findall(rf"(?<![\d.,])(\d+(?:[.,]\d+)?)\s*{unit}", text.casefold())
    return [value for value in (float(text.replace(",", ".")) for text in values) if value > 0]


def _volume(low: Series) -> Known[float]:
    """The injected volume in mL as stated, for the report; the dose is judged by itself."""
    for keyword in ("ContrastBolusVolume", "ContrastBolusTotalDose"):
        value = number(low.header, keyword)
        if value and value > 0:
            return Known(value, _tag(keyword))
    in_text = _in_text(" ".join(texts(low.header, "ContrastBolusAgent")), _MILLILITRES)
    return Known(in_text[0], "text (0018,0010)") if len(in_text) == 1 else _unknown("no single volume is stated")


# ------------------------------------------------------------------------------------------------ sequence class


def _sequence(pair: Pair) -> Known[str]:
    """SPGR, MPRAGE or SE; unknown when the two series differ or the headers fit none."""
    pre, low = _sequence_class(pair.pre.header), _sequence_class(pair.low.header)
    return low if low.value == pre.value else _unknown("the two series are of different classes")


_MPRAGE_NAMES = re.compile(r"mprage|mp-rage|tfl|bravo|tfe|ir-?f?spgr")
_SPGR_NAMES = re.compile(r"f?spgr|flash|\bfl[23]d|vibe|lava|thrive|t1w?[ _-]*ffe")


def _sequence_class(header: Dataset) -> Known[str]:
    """Spin echo without inversion is SE; a gradient echo is MPRAGE when prepared, otherwise SPGR when spoiled."""
    kinds, variant = set(texts(header, "ScanningSequence")), set(texts(header, "SequenceVariant"))
    inversion_ms, repetition_ms = number(header, "InversionTime") or 0.0, number(header, "RepetitionTime") or 0.0
    keywords = ("SequenceName", "PulseSequenceName", "SeriesDescription", "ProtocolName")
    names = " ".join(text for keyword in keywords for text in texts(header, keyword)).casefold()
    by_tags, by_name = "tags (0018,0020) (0018,0021) (0018,0080) (0018,0082)", "name of the sequence"
    inverted = inversion_ms > 0 or bool({"IR", "MP"} & (kinds | variant))
    if "SE" in kinds:
        plain = "GR" not in kinds and not inverted
        return Known("SE", by_tags) if plain else _unknown("spin echo with inversion or gradient echoes")
    if "GR" in kinds:
        if (
            inverted or repetition_ms >= 1000
        ):  # no steady state has so long a repetition time: it is that of the inversion
            return Known("MPRAGE", by_tags)
        if _MPRAGE_NAMES.search(names):
            return Known("MPRAGE", by_name)
        if "SP" in variant:
            return Known("SPGR", by_tags)
        return Known("SPGR", by_name) if _SPGR_NAMES.search(names) else _unknown("gradient echo without spoiling")
    return _unknown(f"{_tag('ScanningSequence')} is neither GR nor SE")
