"""The quality gate: like pairs pass, unlike ones are refused, and every figure has a limit with its origin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from models.condition import Conditions
from models.preprocess import Comparison, prepare
from models.quality import (
    LIMITS,
    SENSITIVITY,
    Figure,
    Gate,
    Verdict,
    judge_conditions,
    judge_pair,
    judge_sequences,
    judge_signal,
    refused,
)
from models.runtime import LinearEngine
from models.simulation.phantom import make_phantom
from models.simulation.physics import Sequence, Tissue, signal
from models.volume import Array, Volume
from tests.numeric.phantoms import as_volume, head, prepared_head

TRUTH = Path(__file__).parents[3] / "shared" / "data" / "tcga-du-7294-truth.npz"
SPIN_ECHO = Sequence("SE", 0.55, 0.010)
CONDITIONS = Conditions(3.0, "gadobutrol", 0.033, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (2.0, 2.0, 2.0))


def real_pair() -> tuple[Array, Array]:
    """A real skull-stripped head in 2 mm voxels, white matter = 1, before contrast and at a third of the dose."""
    if not TRUTH.exists():
        pytest.skip(f"{TRUTH} is not here")
    with np.load(TRUTH) as data:
        pre, enhancement = (block_means(data[name]) / float(data["wm"]) for name in ("pre", "ce"))
    rng = np.random.default_rng(0)
    noisy = [np.abs(image + rng.normal(0, 0.02, image.shape)) for image in (pre, pre + 0.35 * enhancement)]
    return noisy[0].astype(np.float32), noisy[1].astype(np.float32)


def block_means(voxels: Array) -> Array:
    """Means of 2 x 2 x 2 voxels."""
    k, j, i = (n // 2 for n in voxels.shape)
    return voxels[: 2 * k, : 2 * j, : 2 * i].reshape(k, 2, j, 2, i, 2).mean(axis=(1, 3, 5)).astype(np.float32)


def verdicts(figures: tuple[Figure, ...]) -> dict[str, Verdict]:
    return {figure.name: figure.verdict for figure in figures}


# Typical protocols, and white and grey matter at 1.5 and 3 T: the middle of models.simulation.physics.TISSUES.
PROTOCOLS = {
    "SPGR": Sequence("SPGR", 0.008, 0.003, 12),
    "MPRAGE": Sequence("MPRAGE", 2.3, 0.003, 9, 0.9, 0.0072, 176),
    "SE": Sequence("SE", 0.6, 0.012),
}
MATTER = {
    1.5: (Tissue(0.66, 0.75, 0.060), Tissue(0.785, 1.10, 0.068)),
    3.0: (Tissue(0.66, 0.925, 0.050), Tissue(0.785, 1.55, 0.0575)),
}


def grey(sequence: Sequence, field_strength_t: float) -> float:
    """Grey matter without contrast agent, white matter = 1."""
    white, matter = (float(signal(tissue, sequence, np.zeros(1), 4.0)[0]) for tissue in MATTER[field_strength_t])
    return matter / white


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_the_sensitivity_of_contrast_to_each_time_and_angle_is_that_of_the_signal_equations(kind: str) -> None:
    fields = {"RepetitionTime": "tr_s", "InversionTime": "ti_s", "FlipAngle": "flip_deg", "EchoTime": "te_s"}
    for keyword, name in fields.items():
        protocol = PROTOCOLS[kind]
        changed = replace(protocol, **{name: 1.02 * getattr(protocol, name)})
        slope = max(abs(grey(changed, field) - grey(protocol, field)) / 0.02 for field in MATTER)
        assert slope == pytest.approx(SENSITIVITY[kind].get(keyword, 0.0), abs=0.02), keyword


def test_grey_matter_is_darker_in_mprage_than_in_both_others() -> None:
    others = [grey(PROTOCOLS[kind], 3.0) for kind in ("SPGR", "SE")]
    assert grey(PROTOCOLS["MPRAGE"], 3.0) < min(others) - 0.1


@pytest.mark.parametrize(
    ("pre", "low", "changes", "refuses"),
    [
        ("MPRAGE", "MPRAGE", {}, set()),
        ("MPRAGE", "MPRAGE", {"RepetitionTime": 0.02, "EchoTime": 0.04}, set()),  # as scanners fit them to a series
        ("SPGR", "SPGR", {"RepetitionTime": 0.04, "EchoTime": 0.04}, set()),
        ("MPRAGE", "MPRAGE", {"RepetitionTime": 0.08, "InversionTime": 0.08}, {"contrast_change"}),
        ("SPGR", "SPGR", {"RepetitionTime": 0.08, "FlipAngle": 0.08}, set()),  # contrast hardly depends on them
        (None, "SPGR", {"RepetitionTime": 0.08, "FlipAngle": 0.08}, {"contrast_change"}),  # for all that is known
        ("SE", "SE", {"EchoTime": 0.2}, {"timing_change"}),
        ("SPGR", "MPRAGE", {}, {"sequence_class"}),
        ("SE", "SPGR", {"FlipAngle": 0.8}, {"sequence_class", "timing_change", "contrast_change"}),
    ],
)
def test_sequences_are_judged_by_class_timing_and_the_contrast_that_follows(
    pre: str | None, low: str | None, changes: dict[str, float], refuses: set[str]
) -> None:
    figures = judge_sequences(pre, low, changes)
    assert {figure.name for figure in figures if figure.verdict is Verdict.REFUSE} == refuses
    assert ("sequence_class" in verdicts(figures)) == (None not in (pre, low))


@pytest.mark.parametrize("stripped", [True, False], ids=["skull-stripped", "full head"])
def test_a_pair_of_like_sequences_passes_every_limit(stripped: bool) -> None:
    assert set(verdicts(judge_pair(prepared_head(stripped=stripped))).values()) == {Verdict.PASS}


def inverted(low: Array, brain: Array) -> Array:
    """Grey and white matter change places, as in a T2-weighted image."""
    return np.where(brain, np.maximum(1.5 - low, 0), 0).astype(np.float32)


@pytest.mark.parametrize(("seed", "gate"), [(9, Gate.PAIR), (8, None)], ids=["refused", "near the limit: warned of"])
def test_a_pair_of_a_gradient_echo_and_a_spin_echo_never_passes(seed: int, gate: Gate | None) -> None:
    phantom = head(stripped=False, seed=seed)
    scenario = replace(phantom.scenario, sequence=SPIN_ECHO)
    other = make_phantom(seed, shape=(96, 120, 100), scenario=scenario, whole=True)  # the same head
    figures = judge_pair(prepare(as_volume(phantom.pre), as_volume(other.low)))
    assert verdicts(figures)["residual_contrast"] is (Verdict.REFUSE if gate else Verdict.WARN)
    shut = refused(figures)
    assert (shut and shut[0]) is gate
    assert gate is None or (shut and "residual_contrast is" in shut[1])


def test_a_pair_with_inverted_contrast_is_refused() -> None:
    phantom = head(stripped=True)
    shut = refused(judge_pair(prepare(as_volume(phantom.pre), as_volume(inverted(phantom.low, phantom.brain)))))
    assert shut is not None
    assert "pair_correlation is" in shut[1]


def test_a_pair_whose_series_changed_places_is_refused_and_the_right_order_passes() -> None:
    phantom = head(stripped=False)
    swapped = judge_pair(prepare(as_volume(phantom.low), as_volume(phantom.pre)))
    assert verdicts(judge_pair(prepared_head(stripped=False)))["darkening"] is Verdict.PASS
    shut = refused(swapped)
    assert shut is not None
    assert shut[0] is Gate.ORDER


@pytest.mark.parametrize(
    "unlike",
    [
        lambda low: 1.5 * np.clip(1.5 - low, 0.05, 1.4),
        lambda low: np.interp(low, [0, 0.3, 0.6, 0.8, 1.0, 1.3], [0.1, 0.3, 1.1, 0.95, 0.75, 1.2]),
        lambda low: low**1.6,
    ],
    ids=["T2-like", "FLAIR-like", "steeper T1"],
)
def test_a_real_head_with_another_contrast_after_injection_is_refused(unlike: Callable[[Array], Array]) -> None:
    pre, low = real_pair()
    brain = ndimage.gaussian_filter(pre, 1) > 0.1
    shut = refused(judge_pair(prepare(as_volume(pre), as_volume(np.where(brain, unlike(low), low)))))
    assert shut is not None
    assert shut[0] is Gate.PAIR


def test_a_real_head_with_the_same_contrast_after_injection_passes() -> None:
    pre, low = real_pair()
    assert refused(judge_pair(prepare(as_volume(pre), as_volume(low)))) is None


def test_a_low_dose_image_that_ends_in_the_brain_is_refused() -> None:
    prepared = prepared_head(stripped=True)
    low = prepared.native_low
    half = Volume(low.voxels[:40], low.affine)
    assert verdicts(judge_pair(replace(prepared, native_low=half)))["brain_in_low"] is Verdict.REFUSE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("residual_motion", lambda seen: replace(seen, displacement=np.full_like(seen.displacement, 1.0))),
        ("noise", lambda seen: replace(seen, sigma=0.4)),
    ],
)
def test_what_makes_a_pair_unfit_is_refused_by_its_own_figure(
    name: str, change: Callable[[Comparison], Comparison]
) -> None:
    prepared = prepared_head(stripped=True)
    changed = replace(prepared, comparison=change(prepared.comparison))
    assert [figure.name for figure in judge_pair(changed) if figure.verdict is Verdict.REFUSE] == [name]


def test_a_gain_that_differs_between_the_sides_of_the_brain_is_refused() -> None:
    prepared = prepared_head(stripped=True)
    field = np.full(prepared.brain.shape, 0.88, np.float32)
    field[:, :, : field.shape[2] // 2] = 1.12
    changed = replace(prepared, comparison=replace(prepared.comparison, gain_field=field))
    assert [figure.name for figure in judge_pair(changed) if figure.verdict is Verdict.REFUSE] == ["gain_field_sd"]


@pytest.mark.parametrize(("fraction", "verdict"), [(0.33, Verdict.PASS), (0.04, Verdict.WARN), (0.02, Verdict.REFUSE)])
def test_a_dose_far_below_what_was_trained_is_refused(fraction: float, verdict: Verdict) -> None:
    assert verdicts(judge_conditions(replace(CONDITIONS, dose_mmol_per_kg=fraction * 0.1)))["dose_fraction"] is verdict


def test_a_condition_that_is_unknown_has_no_figure() -> None:
    assert "field_strength" not in verdicts(judge_conditions(replace(CONDITIONS, field_strength_t=None)))


@pytest.mark.parametrize(
    ("sequence", "stated", "share"),
    [
        ("SPGR", {"repetition_time_s": 0.008, "echo_time_s": 0.003, "flip_angle_deg": 15.0}, 1.0),
        ("SE", {"repetition_time_s": 0.6, "echo_time_s": 0.012, "flip_angle_deg": 90.0}, 1.0),
        ("MPRAGE", {"repetition_time_s": 2.3, "echo_time_s": 0.003, "flip_angle_deg": 20.0}, 0.5),
        ("MPRAGE", {}, 0.0),
        (None, {"repetition_time_s": 2.3}, 0.0),
    ],
)
def test_timing_that_is_unknown_or_not_trained_warns_and_stops_nothing(
    sequence: str | None, stated: dict[str, float], share: float
) -> None:
    (figure,) = (
        one for one in judge_conditions(replace(CONDITIONS, sequence=sequence, **stated)) if one.name == "timing_told"
    )
    assert figure.value == share
    assert figure.verdict is (Verdict.PASS if share == 1 else Verdict.WARN)


def test_a_signal_of_the_linear_engine_passes() -> None:
    prepared = prepared_head(stripped=True)
    signal = LinearEngine().predict(prepared, CONDITIONS)
    assert set(verdicts(judge_signal(signal, prepared, CONDITIONS)).values()) == {Verdict.PASS}


@pytest.mark.parametrize(
    ("value", "place", "name"),
    [(np.nan, 40, "not_finite"), (-0.1, 40, "not_finite"), (0.3, 0, "outside_support"), (50.0, 40, "bound_use")],
)
def test_a_signal_that_cannot_be_is_refused_whichever_engine_made_it(value: float, place: int, name: str) -> None:
    prepared = prepared_head(stripped=True)
    signal = np.zeros_like(prepared.pre.voxels)
    signal[place, place, place] = value
    figures = judge_signal(signal, prepared, CONDITIONS)
    shut = refused(figures)
    assert shut is not None
    assert shut[0] is Gate.OUTPUT
    assert verdicts(figures)[name] is Verdict.REFUSE


def test_every_figure_has_a_unit_a_verdict_and_a_reason_and_every_limit_is_measured() -> None:
    prepared = prepared_head(stripped=True)
    signal = np.zeros_like(prepared.pre.voxels)
    rows = (
        *judge_sequences("SPGR", "SPGR", {"EchoTime": 0.0}),
        *judge_pair(prepared),
        *judge_conditions(CONDITIONS),
        *judge_signal(signal, prepared, CONDITIONS),
    )
    assert [row.name for row in rows] == list(LIMITS)
    assert all(row.unit and row.reason and isinstance(row.value, float) for row in rows)


def test_every_limit_says_what_it_means_and_where_it_comes_from_and_warns_before_it_refuses() -> None:
    for limit in LIMITS.values():
        assert limit.meaning
        assert limit.origin
        assert limit.works[0] <= limit.passes[0] <= limit.passes[1] <= limit.works[1]
