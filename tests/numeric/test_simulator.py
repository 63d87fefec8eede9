"""Physics and phantoms of the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.agents import AGENTS, BY_NAME, find_agent
from models.condition import TRAINED
from models.training.phantom import draw_scenario, make_phantom
from models.training.physics import Sequence, Tissue, draw_tissue, signal, smooth_field
from tests.numeric.phantoms import MPRAGE, head

SPGR = Sequence("SPGR", 0.007, 0.003, 15.0)
LESION = Tissue(0.9, 1.65, 0.08)


def enhancement(sequence: Sequence, concentration: float, r1: float = 4.5) -> float:
    values = signal(LESION, sequence, np.array([0.0, concentration]), r1)
    return float(values[1] - values[0])


@pytest.mark.parametrize(("concentration", "expected"), [(0.05, 0.34), (0.2, 0.37), (0.5, 0.41), (1.0, 0.48)])
def test_a_third_of_the_concentration_gives_more_than_a_third_of_the_spgr_enhancement(
    concentration: float, expected: float
) -> None:
    # Ratios computed independently for SPGR at 3 T, TR 7 ms, 15 degrees, gadobutrol, lesion T1 1.65 s.
    ratio = enhancement(SPGR, concentration / 3) / enhancement(SPGR, concentration)
    assert ratio == pytest.approx(expected, abs=0.015)


def test_the_mprage_signal_is_the_steady_state_of_a_simulated_train() -> None:
    r1, angle = 1 / 1.65, np.radians(MPRAGE.flip_deg)
    before = MPRAGE.ti_s - MPRAGE.readouts // 2 * MPRAGE.echo_spacing_s
    after = MPRAGE.tr_s - before - MPRAGE.readouts * MPRAGE.echo_spacing_s
    level, seen = 1.0, 0.0
    for _ in range(30):  # repetitions until the magnetisation repeats itself
        level = 1 + (-level - 1) * np.exp(-before * r1)
        for readout in range(MPRAGE.readouts):
            if readout == MPRAGE.readouts // 2:
                seen = abs(level * np.sin(angle))
            level = 1 + (level * np.cos(angle) - 1) * np.exp(-MPRAGE.echo_spacing_s * r1)
        level = 1 + (level - 1) * np.exp(-after * r1)
    ideal = Tissue(1.0, 1.65, 1e6, r2_per_mm_s=0.0)
    assert float(signal(ideal, MPRAGE, np.zeros(1), 4.5)[0]) == pytest.approx(seen, rel=1e-4)


def test_the_spin_echo_signal_saturates_and_decays() -> None:
    tissue = Tissue(1.0, 1.0, 0.1, r2_per_mm_s=0.0)
    expected = (1 - np.exp(-0.5)) * np.exp(-0.01 / 0.15)
    assert float(signal(tissue, Sequence("SE", 0.5, 0.01), np.zeros(1), 4.5)[0]) == pytest.approx(expected)


def test_tissue_constants_lie_in_their_tables_at_both_field_strengths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert 0.60 <= draw_tissue("white", 1.5, rng).t1_s <= 0.90
        assert 0.75 <= draw_tissue("white", 3.0, rng).t1_s <= 1.10


@pytest.mark.parametrize("scale", [4.0, 10.0, 25.0])
def test_a_smooth_field_has_the_amplitude_that_was_asked_for(scale: float) -> None:
    fields = [smooth_field((64, 64, 64), scale, 0.5, np.random.default_rng(n)) for n in range(8)]
    assert np.std(fields) == pytest.approx(0.5, rel=0.25)


def test_the_same_seed_gives_the_same_phantom_and_another_seed_another() -> None:
    one, same, other = (make_phantom(seed, shape=(48, 48, 48)) for seed in (5, 5, 6))
    assert np.array_equal(one.low, same.low)
    assert one.scenario == same.scenario
    assert not np.array_equal(one.low, other.low)


def test_what_the_report_calls_the_range_of_training_is_what_the_simulator_draws() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_scenario(rng) for _ in range(2000)]
    values = {
        "field_strength_t": [s.field_strength_t for s in drawn],
        "dose_fraction": [s.dose_fraction for s in drawn],
        "spacing_mm": [spacing for s in drawn for spacing in s.spacing_mm],
        "sigma": [s.sigma * np.sqrt(2) for s in drawn],  # of the subtraction
    }
    for name, (low, high) in TRAINED.items():
        assert low <= min(values[name]) <= low * 1.1
        assert high * 0.9 <= max(values[name]) <= high


def test_brain_tissue_without_vessels_lesions_or_meninges_does_not_enhance() -> None:
    phantom = head(stripped=True)
    assert np.median(phantom.enhancement[phantom.brain]) == pytest.approx(0.0, abs=2e-3)  # ringing of what does
    assert (phantom.enhancement[phantom.lesion_labels > 0] > 0.01).mean() > 0.9


def test_half_of_all_lesions_are_smaller_than_six_millimetres() -> None:
    rng = np.random.default_rng(0)
    scenario = replace(draw_scenario(rng), lesions=12, spacing_mm=(2.0, 2.0, 2.0))
    diameters = [
        d for seed in range(6) for d in make_phantom(seed, shape=(64, 64, 64), scenario=scenario).lesion_diameters_mm
    ]
    assert np.mean(np.array(diameters) < 6.0) >= 0.5


def test_every_spelling_of_an_agent_finds_it_and_non_answers_find_none() -> None:
    for agent in AGENTS:
        for spelling in (agent.name, *agent.spellings):
            assert find_agent(f"8,5 ml {spelling.lower()} i.v.") is agent
    for text in ("", "CE", "YES", "GD", "KM", "8 ml", "0.1mmol/kg", "Gadovist or Dotarem"):
        assert find_agent(text) is None


def test_relaxivity_is_interpolated_between_field_strengths() -> None:
    gadobutrol = BY_NAME["gadobutrol"]
    assert gadobutrol.relaxivity_per_mm_s(1.5) == 4.6
    assert gadobutrol.relaxivity_per_mm_s(2.25) == pytest.approx(4.55)
    assert gadobutrol.relaxivity_per_mm_s(0.5) == 4.6
