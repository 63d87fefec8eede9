"""Physics and phantoms of the simulator."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import fft, ndimage

from models.agents import AGENTS, BY_NAME, Agent, find_agent
from models.condition import TRAINED, Conditions
from models.preprocess import compare
from models.simulation.anatomy import _atlas_points, _tissues
from models.simulation.phantom import make_phantom
from models.simulation.physics import TISSUES, Sequence, Tissue, draw_tissue, signal, smooth_field
from models.simulation.scanner import (
    B1_RANGE,
    PSF_VOXELS,
    _defaced,
    _received,
    _spectral_window,
    _tissue_signal,
    depart,
)
from models.simulation.scenario import draw_scenario
from models.volume import Array, Mask
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


@pytest.mark.parametrize(("t1_s", "tr_s", "ti_s"), [(0.9, 1.9, 0.9), (1.65, 1.9, 0.9), (1.65, 6.0, 0.6)])
def test_the_mprage_signal_is_the_steady_state_of_a_simulated_train_and_negative_before_the_null(
    t1_s: float, tr_s: float, ti_s: float
) -> None:
    sequence = replace(MPRAGE, tr_s=tr_s, ti_s=ti_s, readouts=100)
    r1, angle = 1 / t1_s, np.radians(sequence.flip_deg)
    before = ti_s - sequence.readouts // 2 * sequence.echo_spacing_s
    after = tr_s - before - sequence.readouts * sequence.echo_spacing_s
    level, seen = 1.0, 0.0
    for _ in range(30):  # repetitions until the magnetisation repeats itself
        level = 1 + (-level - 1) * np.exp(-before * r1)
        for readout in range(sequence.readouts):
            if readout == sequence.readouts // 2:
                seen = level * np.sin(angle)
            level = 1 + (level * np.cos(angle) - 1) * np.exp(-sequence.echo_spacing_s * r1)
        level = 1 + (level - 1) * np.exp(-after * r1)
    ideal = Tissue(1.0, t1_s, 1e6, r2_per_mm_s=0.0)
    assert float(signal(ideal, sequence, np.zeros(1), 4.5)[0]) == pytest.approx(seen, rel=1e-4)
    assert (seen < 0) == (ti_s < 0.7)


def test_what_is_before_its_null_is_received_as_its_magnitude_whether_or_not_noise_is_interpolated() -> None:
    image = np.sin(np.indices((24, 24, 24), np.float32).sum(axis=0) / 4).astype(np.float32)
    for seed in range(8):
        got = _received(image, 1e-6, np.full(3, 0.4), np.ones_like(image), np.random.default_rng(seed))
        assert got == pytest.approx(np.abs(image), abs=1e-4)


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


def test_lesions_enhance_and_brain_tissue_without_vessels_lesions_or_meninges_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phantom = head(stripped=True)
    assert (phantom.enhancement[phantom.lesion_labels > 0] > 0.01).mean() > 0.9
    for name in ("_add_vessels", "_add_lesions", "_add_meninges"):
        monkeypatch.setattr(f"models.simulation.anatomy.{name}", lambda *_: None)
    bare = make_phantom(3, shape=(48, 48, 48), scenario=phantom.scenario)
    assert bare.brain.any()
    assert np.abs(bare.enhancement).max() < 1e-6


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


def test_the_table_of_signals_agrees_with_the_equations_at_every_transmit_field() -> None:
    rng = np.random.default_rng(0)
    for name in TISSUES:
        for _ in range(5):
            scenario = draw_scenario(rng)
            tissue = draw_tissue(name, scenario.field_strength_t, rng)
            r1 = scenario.agent.relaxivity_per_mm_s(scenario.field_strength_t)
            uptake = scenario.agent.standard_dose_mmol_per_kg / 0.1
            b1, concentration = rng.uniform(*B1_RANGE, (8, 8, 8)), rng.uniform(0, 1, (8, 8, 8))
            for mm in (None, concentration):
                table = _tissue_signal(tissue, scenario, mm, uptake, r1=r1, b1=b1)
                exact = signal(tissue, scenario.sequence, (0 if mm is None else uptake) * concentration, r1, b1)
                assert np.abs(table - exact).max() < 1e-4  # of the receiver's M0


def cut(image: Array, axis: int) -> tuple[int, float]:
    """Frequency where the spectrum along an axis ends most abruptly, and by how many powers of ten."""
    taper = np.hanning(image.shape[axis]).reshape([-1 if other == axis else 1 for other in range(3)])
    others = tuple(other for other in range(3) if other != axis)
    power = np.log10((np.abs(np.fft.rfft(image * taper, axis=axis)) ** 2).mean(others))
    drop = power[20:-2] - power[22:]
    return 20 + int(np.argmax(drop)), float(drop.max())


def test_truth_and_images_pass_through_the_same_window() -> None:
    scenario = replace(draw_scenario(np.random.default_rng(17)), sigma=1e-7, stripped=False)
    phantom = make_phantom(17, shape=(64, 64, 64), scenario=scenario)  # a study whose k-space ends early
    for axis in (1, 2):
        (seen, seen_drop), (true, true_drop) = cut(phantom.pre, axis), cut(phantom.enhancement, axis)
        assert min(seen_drop, true_drop) > 3
        assert abs(seen - true) <= 1


def test_half_of_all_studies_ring_at_edges_and_none_changes_its_mean() -> None:
    step = np.zeros((64, 8, 8))
    step[16:48] = 1.0
    peaks = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        window = _spectral_window(step.shape, np.full(3, rng.uniform(*PSF_VOXELS)), rng)
        seen = fft.irfftn(fft.rfftn(step) * window, step.shape)
        assert seen.mean() == pytest.approx(0.5)
        peaks.append(float(seen.max()))
    assert 0.3 < np.mean(np.array(peaks) > 1.02) < 0.7
    assert max(peaks) < 1.09  # Gibbs' own overshoot, without the soft window


def test_vendors_state_the_timing_of_an_inversion_prepared_train_in_two_ways() -> None:
    train = Sequence("MPRAGE", 2.3, 0.003, 9.0, 0.9, 0.007, 160)
    assert train.stated["repetition_time_s"] == 2.3
    assert train.stated["inversion_time_s"] == 0.9
    other = replace(train, states_readouts=True, states_delay=True)
    assert other.stated["repetition_time_s"] == 0.007
    assert other.stated["inversion_time_s"] == pytest.approx(0.9 - 80 * 0.007)
    assert Sequence("SPGR", 0.008, 0.003, 15.0).stated["inversion_time_s"] is None


def test_the_dose_response_lies_between_the_signal_equations_and_proportion_to_dose() -> None:
    before, full = np.full(1, 1.0, np.float32), np.full(1, 2.0, np.float32)
    saturating = np.full(1, 1.5, np.float32)  # half of the enhancement at a third of the dose
    drawn = [float(depart(before, saturating, full, 0.33, np.random.default_rng(n))[0]) for n in range(50)]
    assert 1.33 <= min(drawn) < 1.37
    assert 1.46 < max(drawn) <= 1.5
    for dose, exact in ((0.0, before), (1.0, full)):  # neither a rescan nor the standard dose is uncertain
        assert depart(before, exact, full, dose, np.random.default_rng(1)) == pytest.approx(exact)


def rim(brain: Mask) -> Mask:
    """Within 1.5 voxels of the border."""
    depth = ndimage.distance_transform_edt(brain)
    return (depth > 0) & (depth <= 1.5)


def test_skull_stripping_takes_the_dura_away_and_leaves_nothing_outside() -> None:
    scenario = replace(head(stripped=True).scenario, spacing_mm=(1.0, 1.0, 1.0))
    left: dict[bool, list[float]] = {False: [], True: []}
    for cut, seed in itertools.product(left, (1, 2, 3)):  # blocks that hold some border
        rng = np.random.default_rng(seed)
        points = _atlas_points((64, 64, 64), scenario.spacing_mm, rng, whole=False)
        anatomy = _tissues(points, replace(scenario, stripped=cut), rng)
        left[cut].append(float(anatomy.fractions["dura"][rim(anatomy.brain)].mean()))
    assert max(left[True]) < 0.3 * min(left[False])
    phantom = make_phantom(7, shape=(64, 64, 64), scenario=scenario)
    assert not phantom.enhancement[~phantom.brain].any()


def test_heads_of_all_ages_have_a_tenth_to_a_third_of_their_intracranial_volume_as_fluid() -> None:
    scenario, shares = replace(head(stripped=False).scenario, spacing_mm=(3.0, 3.0, 3.0)), []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        anatomy = _tissues(_atlas_points((56, 70, 60), scenario.spacing_mm, rng, whole=True), scenario, rng)
        shares.append(float(anatomy.fractions["csf"][anatomy.brain].mean()))
    assert min(shares) > 0.1
    assert max(shares) < 0.33
    assert max(shares) > 1.3 * min(shares)


def test_many_vessels_run_in_the_fluid_around_the_cortex() -> None:
    dark = [0.0, 0.0]
    for seed in (1, 2, 3):
        scenario = replace(head(stripped=True).scenario, spacing_mm=(1.0, 1.0, 1.0), lesions=0, sigma=1e-4)
        phantom = make_phantom(seed, shape=(64, 64, 64), scenario=scenario)
        white = np.quantile(phantom.pre[phantom.brain], 0.95)
        enhancing = phantom.brain & (phantom.enhancement > 0.1 * white)
        dark = np.add(dark, [(phantom.pre[enhancing] < 0.45 * white).sum(), enhancing.sum()])
    assert dark[0] > 0.15 * dark[1]


def test_what_enhances_is_not_uniform_from_one_voxel_to_the_next() -> None:
    deviations = []
    for seed in (1, 2, 3, 4):
        scenario = replace(head(stripped=True).scenario, spacing_mm=(1.0, 1.0, 1.0), lesions=12)
        phantom = make_phantom(seed, shape=(64, 64, 64), scenario=scenario)
        around = ndimage.uniform_filter(phantom.enhancement, 3)
        inside = ndimage.binary_erosion(phantom.lesion_labels > 0, np.ones((3, 3, 3))) & (around > 0.1)
        deviations.append(np.median(np.abs(phantom.enhancement[inside] / around[inside] - 1)))
    assert 0.07 < np.median(deviations) < 0.3  # .02 without grain


def test_a_defaced_head_keeps_its_brain() -> None:
    brain = np.zeros((40, 40, 40), bool)
    brain[12:28, 12:28, 12:28] = True
    kept = [_defaced(brain, np.random.default_rng(seed)) for seed in range(10)]
    assert all(mask[brain].all() for mask in kept)
    assert all(0.3 < mask.mean() < 0.9 for mask in kept)


def test_nothing_enhances_where_defacing_left_nothing() -> None:
    phantom = make_phantom(18, shape=(32, 32, 32))
    removed = phantom.pre == 0
    assert not phantom.scenario.stripped
    assert removed.mean() > 0.05
    assert not phantom.enhancement[removed].any()


@pytest.mark.parametrize(
    "shift_mm", [(0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, -0.3), (0.0, -0.9, 0.4)], ids=["k", "j", "i", "far"]
)
def test_residual_motion_is_undone_and_a_lesion_keeps_its_enhancement_and_its_place(
    shift_mm: tuple[float, float, float],
) -> None:
    rng = np.random.default_rng(1)
    scenario = replace(head(stripped=True).scenario, spacing_mm=(1.0, 1.0, 1.0), sigma=1e-5, lesions=0)
    phantom = make_phantom(7, shape=(64, 64, 64), scenario=scenario)
    at = np.indices(phantom.brain.shape) - np.array([42, 42, 40])[:, None, None, None]
    distance = np.sqrt((at**2).sum(axis=0))
    lesion = np.clip(6.5 - distance, 0, 1) * 0.4  # 12 mm across
    moved = ndimage.shift(phantom.pre + lesion, shift_mm, order=3, mode="nearest")
    pre, low = (x + rng.normal(0, 0.003, moved.shape).astype(np.float32) for x in (phantom.pre, moved))
    seen = compare(pre, low, phantom.brain, (1.0, 1.0, 1.0))
    before, quiet = seen.gain * seen.gain_field * low - pre, phantom.brain & (distance > 12)
    left, was = (np.mean(ndimage.gaussian_filter(x, 0.7)[quiet] ** 2) for x in (seen.subtraction, before))
    assert left < 0.25 * was
    assert seen.motion_mm(phantom.brain) == pytest.approx(np.linalg.norm(shift_mm), rel=0.5)
    assert seen.subtraction[lesion > 0].mean() == pytest.approx(lesion[lesion > 0].mean(), rel=0.03)
    border = (distance > 5) & (distance < 8)
    off, was_off = (np.abs(x - lesion)[border].mean() for x in (seen.subtraction, before))
    assert off < 0.5 * was_off


@pytest.mark.parametrize("contrast", [0.6, -0.6], ids=["haemorrhage", "cyst"])
@pytest.mark.parametrize("shift_mm", [0.15, 0.3, 0.5])
def test_the_border_of_what_is_bright_or_dark_by_itself_does_not_enhance_when_the_head_moved(
    contrast: float, shift_mm: float
) -> None:
    rng = np.random.default_rng(0)
    at = np.indices((64, 64, 64)) - 31.5
    distance = np.sqrt((at**2).sum(axis=0))

    def image(moved_mm: float) -> Array:
        from_centre = np.sqrt(at[0] ** 2 + (at[1] - moved_mm) ** 2 + at[2] ** 2)
        ball = 1 + contrast * np.clip(0.5 + (8 - from_centre) / 1.5, 0, 1)
        return (ball + rng.normal(0, 0.006, ball.shape)).astype(np.float32)

    pre, low, brain = image(0.0), image(shift_mm), distance < 28
    seen = compare(pre, low, brain, (1.0, 1.0, 1.0))
    border, even = np.abs(distance - 8) < 1.5, brain & (distance > 18)
    before = seen.gain * seen.gain_field * low - pre
    left, was = (np.mean(ndimage.gaussian_filter(x, 0.7)[border] ** 2) for x in (seen.subtraction, before))
    assert left < 0.05 * was
    assert seen.displacement[1][border].mean() == pytest.approx(-shift_mm, rel=0.1)
    assert seen.displacement[1][even].mean() == pytest.approx(-shift_mm, rel=0.2)  # told by the border alone


def test_voxels_of_2_mm_are_taken_as_such_however_their_direction_cosines_are_rounded() -> None:
    rng = np.random.default_rng(0)
    pre = ndimage.gaussian_filter(rng.normal(1, 2, (40, 40, 40)), 1.5).astype(np.float32)
    low = ndimage.shift(pre, (0, 0.2, 0), order=3, mode="nearest")
    brain = np.ones(pre.shape, bool)
    read = [compare(pre, low, brain, (side,) * 3).displacement for side in (2.0, 2.000000004, 2.01)]
    assert np.abs(read[1] - read[0]).max() < 1e-5
    assert np.abs(read[2] - read[0]).max() > 1e-3  # one scale fewer


@pytest.mark.parametrize("stripped", [True, False], ids=["stripped", "full head"])
def test_enhancement_in_sulci_and_at_the_border_is_not_taken_for_motion(
    stripped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.simulation.scanner._misalign", lambda image, *_: image)
    scenario = replace(head(stripped=stripped).scenario, spacing_mm=(3.0, 3.0, 3.0), sigma=0.01, dose_fraction=1.0)
    read = []
    for seed in range(2, 8):
        phantom = make_phantom(seed, shape=(56, 70, 60), scenario=scenario, whole=True)
        read.append(compare(phantom.pre, phantom.low, phantom.brain, scenario.spacing_mm).motion_mm(phantom.brain))
    assert np.median(read) < 0.35
    assert max(read) < 0.5


def test_noise_is_interpolated_without_moving_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.simulation.scanner._misalign", lambda image, *_: image)
    for seed in range(4):  # without noise, contrast and motion, only a smooth gain tells the images apart
        scenario = replace(draw_scenario(np.random.default_rng(seed)), sigma=1e-7, dose_fraction=1e-6, stripped=False)
        phantom = make_phantom(seed, shape=(48, 48, 48), scenario=scenario)
        ratio = (phantom.low / np.maximum(phantom.pre, 1e-3))[phantom.brain & (phantom.pre > 0.3)]
        assert ratio.std() < 0.02 * ratio.mean()


@pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
def test_relaxivity_is_tabulated_at_field_strengths_and_linear_between_them(agent: Agent) -> None:
    for field, r1 in agent.r1_per_mm_s:
        assert agent.relaxivity_per_mm_s(field) == r1
    for (low, at_low), (high, at_high) in itertools.pairwise(agent.r1_per_mm_s):
        assert agent.relaxivity_per_mm_s(low + 0.25 * (high - low)) == pytest.approx(0.75 * at_low + 0.25 * at_high)
    assert agent.relaxivity_per_mm_s(0.5) == agent.r1_per_mm_s[0][1]
    assert agent.relaxivity_per_mm_s(9.4) == agent.r1_per_mm_s[-1][1]


# r1 at 1.5, 3 and 7 T in whole blood at 37 C (Shen et al. 2015), mmol/mL and mmol/kg of the labels.
PUBLISHED = {
    "gadobutrol": ((4.6, 4.5, 4.2), 1.0, 0.1),
    "gadoterate": ((3.9, 3.4, 2.8), 0.5, 0.1),
    "gadoteridol": ((4.4, 3.5, 3.4), 0.5, 0.1),
    "gadopentetate": ((4.3, 3.8, 3.1), 0.5, 0.1),
    "gadobenate": ((6.2, 5.4, 4.7), 0.5, 0.1),
    "gadodiamide": ((4.5, 3.9, 3.7), 0.5, 0.1),
    "gadoversetamide": ((4.4, 4.2, 4.3), 0.5, 0.1),
    "gadoxetate": ((7.2, 5.5, 4.9), 0.25, 0.025),
    "gadopiclenol": ((12.8, 11.6, 11.6), 0.5, 0.05),  # plasma; nothing is published at 7 T
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_relaxivity_concentration_and_standard_dose_are_as_published(name: str) -> None:
    r1, concentration, dose = PUBLISHED[name]
    agent = BY_NAME[name]
    assert tuple(agent.relaxivity_per_mm_s(field) for field in (1.5, 3.0, 7.0)) == r1
    assert (agent.concentration_mmol_per_ml, agent.standard_dose_mmol_per_kg) == (concentration, dose)
    assert len(PUBLISHED) == len(AGENTS)


@pytest.mark.parametrize("agent", AGENTS, ids=[agent.name for agent in AGENTS])
def test_the_standard_dose_of_an_agent_is_a_tenth_of_a_millilitre_per_kilogram_or_two(agent: Agent) -> None:
    assert agent.standard_dose_mmol_per_kg / agent.concentration_mmol_per_ml == pytest.approx(0.1, rel=1e-9) or (
        agent.standard_dose_mmol_per_kg / agent.concentration_mmol_per_ml == pytest.approx(0.2, rel=1e-9)
    )


@pytest.mark.parametrize(("name", "dose"), [("gadobutrol", 0.033), ("gadopiclenol", 0.0165), ("gadoxetate", 0.00825)])
def test_a_third_of_the_standard_dose_is_a_third_for_every_agent(name: str, dose: float) -> None:
    made = Conditions(3.0, name, dose, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0))
    assert made.dose_fraction == pytest.approx(0.33)


def test_a_field_strength_near_three_tesla_has_a_relaxivity_near_that_at_three_tesla() -> None:
    for agent in AGENTS:  # 2.89 T is what some 3 T scanners state
        at_3 = agent.relaxivity_per_mm_s(3.0)
        assert agent.relaxivity_per_mm_s(2.89) == pytest.approx(at_3, rel=0.03)
        assert agent.relaxivity_per_mm_s(1.494) == agent.relaxivity_per_mm_s(1.5)
