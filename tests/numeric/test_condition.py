"""The conditioning vector: what is unknown is said to be unknown, and nothing else of it can be read from the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.condition import NAMES, TIMING_NAMES, TRAINED_TIMING, Conditions, vector
from models.simulation.scenario import draw_scenario

EFFECTIVE = ("log_effective_dose", "relaxivity", "agent_known")


def values(field: float | None, agent: str | None, dose: float | None) -> dict[str, float]:
    made = vector(Conditions(field, agent, dose, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0)))
    return dict(zip(NAMES, made.tolist(), strict=True))


def test_a_known_acquisition_has_all_known_bits() -> None:
    known = values(3.0, "gadobutrol", 0.033)
    assert [known[name] for name in ("field_known", "dose_known", "agent_known")] == [1, 1, 1]
    assert known["log_dose_fraction"] == pytest.approx(-1.1087, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "agent", "dose"), [(None, "gadobutrol", 0.033), (3.0, None, 0.033), (3.0, "gadobutrol", None)]
)
def test_an_effective_dose_of_which_a_part_is_unknown_is_unknown(
    field: float | None, agent: str | None, dose: float | None
) -> None:
    made = values(field, agent, dose)
    assert [made[name] for name in EFFECTIVE] == [0, 0, 0]


def timing(sequence: str | None, **stated: float) -> dict[str, float]:
    made = Conditions(3.0, "gadobutrol", 0.033, sequence, 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0), **stated)
    return {name: value for name, value in zip(NAMES, vector(made).tolist(), strict=True) if name in TIMING_NAMES}


@pytest.mark.parametrize(("repetition_s", "inversion_s"), [(2.3, 0.9), (0.0082, 0.45)])  # as two vendors state it
def test_the_timing_of_a_trained_sequence_is_told(repetition_s: float, inversion_s: float) -> None:
    made = timing(
        "MPRAGE", repetition_time_s=repetition_s, echo_time_s=0.003, inversion_time_s=inversion_s, flip_angle_deg=9.0
    )
    assert [value for name, value in made.items() if name.endswith("_known")] == [1, 1, 1, 1]
    assert made["log_repetition_time"] == pytest.approx(math.log(repetition_s / 0.1))


@pytest.mark.parametrize(
    ("sequence", "stated"),
    [
        ("MPRAGE", {}),
        (None, {"repetition_time_s": 0.008}),  # of which class?
        ("MPRAGE", {"repetition_time_s": 0.1}),  # neither between readouts nor between inversions
        ("MPRAGE", {"flip_angle_deg": 20.0}),
        ("SPGR", {"inversion_time_s": 0.9}),  # a spoiled gradient echo has none
        ("SE", {"repetition_time_s": 2.5}),
    ],
)
def test_a_timing_that_is_unknown_or_that_no_training_study_had_is_not_told(
    sequence: str | None, stated: dict[str, float]
) -> None:
    assert set(timing(sequence, **stated).values()) == {0.0}


def test_what_the_simulator_states_is_what_the_network_is_told() -> None:
    told: dict[tuple[str, bool], list[int]] = {}
    for seed in range(300):
        sequence = draw_scenario(np.random.default_rng(seed)).sequence
        stated = {name: value for name, value in sequence.stated.items() if name in TRAINED_TIMING[sequence.kind]}
        known = [int(value) for name, value in timing(sequence.kind, **stated).items() if name.endswith("_known")]
        told.setdefault((sequence.kind, sequence.states_delay), []).append(
            sum(known) - len(TRAINED_TIMING[sequence.kind])
        )
    assert {one for (_, by_delay), missing in told.items() if not by_delay for one in missing} == {0}
    delays = told["MPRAGE", True]  # the shortest delays between inversion and first readout lie outside the table
    assert set(delays) <= {0, -1}
    assert np.mean(delays) > -0.15
