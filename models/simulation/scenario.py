"""What is drawn once per study: the scanner's field strength, the agent and its dose, the sequence, grid and noise.

Hides the ranges, which reach beyond clinical use, and what of a study its header would tell. Must never draw from
anything but the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.agents import AGENTS, Agent
from models.condition import Conditions
from models.simulation.physics import Sequence, draw_sequence

SHORTEST_DELAY_S = 0.15  # between inversion and first readout that a header states in place of the inversion time


@dataclass(frozen=True)
class Scenario:
    """What is drawn once per study."""

    field_strength_t: float
    agent: Agent
    dose_fraction: float  # of the agent's standard dose
    sequence: Sequence
    spacing_mm: tuple[float, float, float]  # i, j, k
    sigma: float  # noise of one image, white matter = 1
    stripped: bool
    lesions: int

    @property
    def dose_mmol_per_kg(self) -> float:
        """The injected dose."""
        return self.dose_fraction * self.agent.standard_dose_mmol_per_kg

    def conditions(self, sigma: float, noise_left: tuple[float, float, float]) -> Conditions:
        """What its header tells, and the noise that was measured."""
        return Conditions(
            field_strength_t=self.field_strength_t,
            agent=self.agent.name,
            dose_mmol_per_kg=self.dose_mmol_per_kg,
            sequence=self.sequence.kind,
            sigma=sigma,
            noise_left=noise_left,
            spacing_mm=self.spacing_mm,
            **self.sequence.stated,
        )

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.sequence.kind} {self.field_strength_t:.3g} T, {self.dose_fraction:.0%} of the standard dose of "
            f"{self.agent.name}, noise {self.sigma:.3g}, {self.lesions} lesions"
        )


def draw_scenario(rng: np.random.Generator) -> Scenario:
    """Field strength, agent, dose, sequence, grid and noise of a study, spread beyond clinical use."""
    field = float(rng.choice([1.5, 3.0, rng.uniform(1.4, 3.2)], p=[0.4, 0.45, 0.15]))
    agent = AGENTS[int(rng.integers(len(AGENTS)))]
    dose = float(
        rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.2, 0.5), rng.uniform(0.5, 1.0)], p=[0.3, 0.55, 0.15])
    )
    in_plane = float(rng.choice([1.0, rng.uniform(0.75, 1.2)]))
    through = in_plane if rng.uniform() < 0.6 else float(rng.uniform(0.8, 2.0))
    if rng.uniform() < 0.1:
        through = float(rng.uniform(2.0, 6.0))
    sigma = float(np.exp(rng.uniform(np.log(0.008), np.log(0.08))))
    lesions = 0 if rng.uniform() < 0.2 else int(rng.integers(1, 13))
    sequence, stripped = draw_sequence(rng), bool(rng.uniform() < 0.5)
    by_readout = bool(rng.uniform() < 0.6)  # how vendors state the timing of an inversion-prepared train differs
    by_delay = by_readout and bool(rng.uniform() < 0.7) and sequence.preparation_s >= SHORTEST_DELAY_S
    sequence = replace(sequence, states_readouts=by_readout, states_delay=by_delay)
    return Scenario(field, agent, dose, sequence, (in_plane, in_plane, through), sigma, stripped, lesions)


def draw_relaxivity(scenario: Scenario, rng: np.random.Generator) -> float:
    """That of the agent, 1/(mM s), which in tissue is not exactly that in plasma."""
    return float(scenario.agent.relaxivity_per_mm_s(scenario.field_strength_t) * rng.uniform(0.85, 1.15))


def draw_uptake(scenario: Scenario, rng: np.random.Generator) -> float:
    """Scale of all concentrations: a lower-dosed agent reaches the tissue in proportion to what is injected."""
    return float(scenario.agent.standard_dose_mmol_per_kg / 0.1 * rng.uniform(0.8, 1.2))


def draw_flow(sequence: Sequence, rng: np.random.Generator) -> float:
    """Scale of the signal of blood: fresh spins brighten it, dephasing and flow voids darken it."""
    return float(rng.uniform(0.25, 2.0) if sequence.kind != "SE" else rng.uniform(0.1, 1.0))


def with_choices(scenario: Scenario, **chosen: Any) -> Scenario:
    """The scenario with the given fields fixed; None leaves what was drawn. `noise` is the sigma of one image."""
    if "noise" in chosen:
        chosen["sigma"] = chosen.pop("noise")
    return replace(scenario, **{name: value for name, value in chosen.items() if value is not None})
