"""How the pair was acquired: field strength, agent, injected dose, sequence and its timing, each with its source.

Hides how the facts of two series are put together (PS3.3 C.7.2.2, C.8.3.1). Must never replace a value: what is
missing, implausible or contradicted is unknown, and the source says why.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from models.condition import Conditions
from models.preprocess import Prepared
from service.core.errors import Permanent, Reason
from worker.choose.pairing import Pair
from worker.read.injection import is_standard_dose, standard_dose
from worker.read.known import Known, tag

_NOMINAL_T = (1.5, 3.0, 7.0)  # what a magnet is called; it is really 1.494 or 2.894 T, and some write that
_NOMINAL_TOLERANCE = 0.04


@dataclass(frozen=True)
class Acquisition:
    """What is known of how the low-dose series was acquired."""

    field_strength_t: Known[float]
    agent: Known[str]  # generic name, a key of models.agents.BY_NAME
    dose_mmol_per_kg: Known[float]
    weight_kg: Known[float]
    volume_ml: Known[float]
    sequence: Known[str]  # SPGR, MPRAGE or SE
    # As the vendor writes them. Of an MPRAGE, Siemens calls the time between two inversions the repetition time, GE and
    # Philips that between two excitations; Philips often leaves the inversion time out.
    repetition_time_s: Known[float]
    echo_time_s: Known[float]
    inversion_time_s: Known[float]
    flip_angle_deg: Known[float]

    def conditions(self, prepared: Prepared) -> Conditions:
        """What the network is told: the header's values as they are known, noise and grid as they are measured."""
        return Conditions(
            field_strength_t=self.field_strength_t.value,
            agent=self.agent.value,
            dose_mmol_per_kg=self.dose_mmol_per_kg.value,
            sequence=self.sequence.value,
            sigma=prepared.comparison.sigma,
            noise_left=prepared.comparison.noise_left,
            spacing_mm=prepared.pre.spacing_mm,
            repetition_time_s=self.repetition_time_s.value,
            echo_time_s=self.echo_time_s.value,
            inversion_time_s=self.inversion_time_s.value,
            flip_angle_deg=self.flip_angle_deg.value,
        )


_UNITS = {"mmol_per_kg": "mmol/kg", "kg": "kg", "ml": "mL", "t": "T", "s": "s", "deg": "deg"}
_ENDING = re.compile(rf"_({'|'.join(_UNITS)})$")


def in_words(name: str) -> tuple[str, str]:
    """A quantity in words and the UCUM unit that its name ends with, "" where it ends with none."""
    words, _, unit = _ENDING.sub(r"|\1", name).partition("|")
    return words.replace("_", " "), _UNITS.get(unit, "")


def read_acquisition(pair: Pair) -> Acquisition:
    """What is known of both series together; agent, volume and dose are those of the low-dose series."""
    injection = pair.low.facts.injection
    weight = _agreed(pair, "PatientWeight", tolerance=0.02)
    return Acquisition(
        field_strength_t=_field_strength(pair),
        agent=injection.agent,
        dose_mmol_per_kg=injection.dose(weight),
        weight_kg=weight,
        volume_ml=injection.volume_ml,
        sequence=_sequence(pair),
        **_timing(pair),
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
    if dose is not None and is_standard_dose(dose, agent):
        detail = f"{dose:.3f} mmol/kg against a standard of {standard_dose(agent):g} mmol/kg"
        raise Permanent(Reason.STANDARD_DOSE, detail)


def _agreed(pair: Pair, keyword: str, *, tolerance: float) -> Known[float]:
    """A number that the low-dose series states plausibly and the pre-contrast series does not contradict."""
    pre, low = pair.pre.facts.numbers[keyword], pair.low.facts.numbers[keyword].known
    if low.value is None:
        return low
    if not pre.is_uniform:
        return pre.known
    if pre.value is not None and abs(pre.value - low.value) > tolerance * low.value:
        return Known.unknown(f"{low.source} differs between the two series")
    return low


# ------------------------------------------------------------------------------------------------ field strength


def _field_strength(pair: Pair) -> Known[float]:
    """MagneticFieldStrength, unless the proton frequency contradicts it.

    Some systems write gauss (15000 for 1.5 T). That is converted only where the imaging frequency confirms it. Others
    write what the magnet really has (1.494 T); that is called by its nominal field strength, as the tables are.
    """
    by_frequency = pair.low.facts.proton_field_t
    gauss = pair.low.facts.numbers["MagneticFieldStrength"].value or 0.0
    if by_frequency and gauss > 1000 and _near(gauss / 1e4, by_frequency, 0.1):
        return _nominal(gauss / 1e4, f"{tag('MagneticFieldStrength')} in gauss, confirmed by {tag('ImagingFrequency')}")
    known = _agreed(pair, "MagneticFieldStrength", tolerance=0.05)
    if known.value is None:
        return Known.unknown(f"{known.why}; perhaps gauss, but no frequency confirms it") if gauss > 1000 else known
    if by_frequency and not _near(known.value, by_frequency, 0.1):
        return Known.unknown(f"{known.source} contradicts {tag('ImagingFrequency')}")
    return _nominal(known.value, known.source)


def _nominal(field_strength_t: float, source: str) -> Known[float]:
    """The field strength that the magnet is sold as; one of another kind as it is written."""
    for nominal in _NOMINAL_T:
        if field_strength_t != nominal and _near(field_strength_t, nominal, _NOMINAL_TOLERANCE):
            return Known(nominal, f"{source}, where {field_strength_t:.4g} is written")
    return Known(field_strength_t, source)


def _near(value: float, reference: float, tolerance: float) -> bool:
    return abs(value - reference) <= tolerance * reference


# ------------------------------------------------------------------------------------------------ sequence


_TIMING = {  # field: the element, and how much of it is one unit
    "repetition_time_s": ("RepetitionTime", 1000),
    "echo_time_s": ("EchoTime", 1000),
    "inversion_time_s": ("InversionTime", 1000),
    "flip_angle_deg": ("FlipAngle", 1),
}
_TIMING_TOLERANCE = 0.05  # scanners fit the shortest times to each series


def _timing(pair: Pair) -> dict[str, Known[float]]:
    """Times and flip angle that both series state alike; an echo that does not precede the next pulse is a slip."""
    found = {}
    for field, (keyword, per_unit) in _TIMING.items():
        known = _agreed(pair, keyword, tolerance=_TIMING_TOLERANCE)
        found[field] = known if known.value is None else Known(round(known.value / per_unit, 9), known.source)
    echo_s, repetition_s = found["echo_time_s"].value, found["repetition_time_s"].value
    if echo_s and repetition_s and echo_s >= repetition_s:
        why = f"{tag('EchoTime')} is not shorter than {tag('RepetitionTime')}"
        found |= dict.fromkeys(("echo_time_s", "repetition_time_s"), Known[float].unknown(why))
    return found


def _sequence(pair: Pair) -> Known[str]:
    """SPGR, MPRAGE or SE; unknown when the two series differ or the headers fit none."""
    pre, low = pair.pre.facts.sequence.kind, pair.low.facts.sequence.kind
    return low if low.value == pre.value else Known.unknown("the two series are of different classes")
