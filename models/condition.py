"""The conditioning vector: what the network is told about an acquisition, and that something is unknown.

Hides order and scaling of the numbers (contract version 3). Every quantity that a header may lack has a known bit: 1
and the value, or 0 and 0. Must never fill in a default: unknown is passed on as unknown, and so is a timing that no
training study had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.agents import BY_NAME

CONTRACT_VERSION = 3
SEQUENCES = ("SPGR", "MPRAGE", "SE")
NAMES = (
    "field", "field_known",
    "log_dose_fraction", "dose_known",
    "log_effective_dose", "relaxivity", "agent_known",
    "log_sigma",
    "log_noise_left_1", "log_noise_left_2", "log_noise_left_3",
    "log_spacing_i", "log_spacing_j", "log_spacing_k",
    *(f"sequence_{name.lower()}" for name in SEQUENCES),
    "log_repetition_time", "repetition_time_known",
    "log_echo_time", "echo_time_known",
    "log_inversion_time", "inversion_time_known",
    "log_flip_angle", "flip_angle_known",
)  # fmt: skip
MEASURED = tuple(  # from the images and their grid, and never unknown
    name for name in NAMES if name.startswith(("log_sigma", "log_noise_left", "log_spacing"))
)
SEQUENCE_NAMES = tuple(name for name in NAMES if name.startswith("sequence_"))
TIMING_NAMES = NAMES[NAMES.index("log_repetition_time") :]
HEADROOM = 1.5  # amplification beyond 1/dose that the bound of the signal allows: looser than any prediction
UNKNOWN_DOSE_FRACTION = 0.33  # that the bound assumes where the dose is not known
DOSE_INDEX, DOSE_KNOWN_INDEX = NAMES.index("log_dose_fraction"), NAMES.index("dose_known")
TRAINED = {  # what the simulator draws (models.simulation.scenario); outside is said in the report
    "field_strength_t": (1.4, 3.2),
    "dose_fraction": (0.05, 1.0),
    "spacing_mm": (0.75, 6.0),
    "sigma": (0.011, 0.115),
}
Ranges = tuple[tuple[float, float], ...]
TRAINED_TIMING: dict[str, dict[str, Ranges]] = {  # likewise, by sequence class, in s and deg
    "MPRAGE": {
        "repetition_time_s": ((0.006, 0.009), (1.5, 3.0)),  # of the readouts or of the inversions: vendors differ
        "echo_time_s": ((0.002, 0.004),),
        "inversion_time_s": ((0.15, 1.1),),  # shorter delays were drawn too rarely
        "flip_angle_deg": ((7.0, 12.0),),
    },
    "SPGR": {
        "repetition_time_s": ((0.005, 0.012),),
        "echo_time_s": ((0.002, 0.005),),
        "flip_angle_deg": ((10.0, 25.0),),
    },
    "SE": {"repetition_time_s": ((0.45, 0.75),), "echo_time_s": ((0.008, 0.017),)},
}
_USUAL_TIMING = {"repetition_time_s": 0.1, "echo_time_s": 0.004, "inversion_time_s": 0.9, "flip_angle_deg": 10.0}
TIMING_FIELDS = tuple(_USUAL_TIMING)  # of Conditions
_TIMING_MARGIN = 0.1  # outside those ranges that is still told


@dataclass(frozen=True)
class Conditions:
    """What is known of an acquisition; None is unknown."""

    field_strength_t: float | None
    agent: str | None  # generic name, a key of models.agents.BY_NAME
    dose_mmol_per_kg: float | None
    sequence: str | None  # one of SEQUENCES
    sigma: float  # noise of the subtraction, white matter = 1 (measured, so never unknown; so is the next)
    noise_left: tuple[float, float, float]  # share of it that each smoothing leaves (models.preprocess.Comparison)
    spacing_mm: tuple[float, float, float]  # of the working grid along i, j, k
    repetition_time_s: float | None = None  # as the header states it
    echo_time_s: float | None = None
    inversion_time_s: float | None = None
    flip_angle_deg: float | None = None

    @property
    def dose_fraction(self) -> float | None:
        """Dose over the standard dose of this agent; None where either is unknown."""
        if self.agent is None or self.dose_mmol_per_kg is None:
            return None
        return self.dose_mmol_per_kg / BY_NAME[self.agent].standard_dose_mmol_per_kg

    @property
    def relaxivity_per_mm_s(self) -> float | None:
        """r1(B) of the agent in 1/(mM s); None where agent or field strength is unknown."""
        if self.agent is None or self.field_strength_t is None:
            return None
        return BY_NAME[self.agent].relaxivity_per_mm_s(self.field_strength_t)


def vector(conditions: Conditions) -> npt.NDArray[np.float32]:
    """The conditioning vector, float32 of shape (len(NAMES),), in the order of NAMES."""
    field, fraction, r1 = conditions.field_strength_t, conditions.dose_fraction, conditions.relaxivity_per_mm_s
    # The effective dose needs dose, agent and field strength: with one of them unknown, 0 would read as 0.15 /s.
    effective = None if r1 is None or fraction is None else conditions.dose_mmol_per_kg
    return np.array(
        [
            0.0 if field is None else (field - 2.25) / 0.75,
            float(field is not None),
            0.0 if fraction is None else math.log(fraction),
            float(fraction is not None),
            0.0 if r1 is None or effective is None else math.log(effective * r1 / 0.15),
            0.0 if r1 is None or effective is None else r1 / 10,
            float(effective is not None),
            math.log(conditions.sigma / 0.03),
            *(math.log(share) for share in conditions.noise_left),
            *(math.log(s) for s in conditions.spacing_mm),
            *(float(conditions.sequence == name) for name in SEQUENCES),
            *_timing(conditions),
        ],
        dtype=np.float32,
    )


def told_timing(conditions: Conditions) -> dict[str, float | None]:
    """What the network is told of the timing of this sequence class: a value, or None where unknown or not trained.

    Empty where the class is unknown: the timing of another class means something else.
    """
    trained = TRAINED_TIMING.get(conditions.sequence or "", {})
    return {name: _within(getattr(conditions, name), ranges) for name, ranges in trained.items()}


def _within(value: float | None, ranges: Ranges) -> float | None:
    if value is None:
        return None
    low, high = 1 - _TIMING_MARGIN, 1 + _TIMING_MARGIN
    return value if any(low * least <= value <= high * most for least, most in ranges) else None


def _timing(conditions: Conditions) -> Iterator[float]:
    """Logarithm over a usual value and known bit of each."""
    told = told_timing(conditions)
    for name, usual in _USUAL_TIMING.items():
        value = told.get(name)
        yield from (0.0, 0.0) if value is None else (math.log(value / usual), 1.0)
