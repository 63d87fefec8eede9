"""Registration, gain, noise and the way back, against phantoms whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from models.preprocess import compare, prepare
from models.registration import RegistrationError, symmetric_gain
from models.volume import Array, Volume
from tests.numeric.phantoms import as_volume, head, prepared_head


def turned(volume: Volume, degrees: float, shift_mm: float) -> Volume:
    """The same head, moved: rotation about z and a shift along x, resampled on the same grid."""
    motion = sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.0, 0.0, np.radians(degrees), (shift_mm, 0.0, 0.0))
    return Volume.from_sitk(sitk.Resample(volume.to_sitk(), motion, sitk.sitkBSpline, 0.0))


def test_a_turned_and_shifted_low_dose_image_is_aligned_to_a_tenth_of_a_voxel() -> None:
    phantom = head(stripped=False)
    # The phantom's own low-dose image has a residual misalignment: the pre-contrast image, moved, has a known one.
    low = turned(as_volume(phantom.pre), degrees=2.0, shift_mm=3.0)
    prepared = prepare(as_volume(phantom.pre), low)
    angle = prepared.pre_to_low.GetParameters()[2]
    middle = np.zeros(3)
    moved = np.array(prepared.pre_to_low.TransformPoint(middle.tolist()))
    assert np.degrees(angle) == pytest.approx(-2.0, abs=0.2)
    expected = np.array([-3.0 * np.cos(np.radians(2)), 3.0 * np.sin(np.radians(2)), 0.0])
    assert np.linalg.norm(moved - expected) < 0.35


def test_an_empty_low_dose_image_cannot_be_aligned() -> None:
    pre = as_volume(head(stripped=True).pre)
    with pytest.raises(RegistrationError, match="empty"):
        prepare(pre, pre.with_voxels(np.zeros_like(pre.voxels)))


def test_preparing_the_same_pair_twice_gives_the_same_bits() -> None:
    phantom = head(stripped=True)
    one, other = prepared_head(stripped=True), prepare(as_volume(phantom.pre), as_volume(phantom.low))
    assert np.array_equal(one.comparison.subtraction, other.comparison.subtraction)
    assert one.pre_to_low.GetParameters() == other.pre_to_low.GetParameters()


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.08])
def test_the_gain_is_unbiased_under_noise_and_enhancement(sigma: float) -> None:
    rng = np.random.default_rng(1)
    tissue = rng.choice([0.3, 0.7, 1.0], 60_000)
    enhancement = np.where(rng.uniform(size=tissue.size) < 0.03, 0.5, 0.0)
    pre = (tissue + rng.normal(0, sigma, tissue.size)).astype(np.float32)
    low = ((tissue + enhancement + rng.normal(0, sigma, tissue.size)) / 1.17).astype(np.float32)
    assert symmetric_gain(low, pre) == pytest.approx(1.17, rel=0.004)


def test_a_smooth_gain_field_is_taken_out() -> None:
    phantom = head(stripped=True)
    ramp = np.linspace(0.96, 1.04, phantom.pre.shape[2], dtype=np.float32)
    plain = compare(phantom.pre, phantom.low, phantom.brain, (2.0, 2.0, 2.0))
    tilted = compare(phantom.pre, phantom.low * ramp, phantom.brain, (2.0, 2.0, 2.0))
    left, right = phantom.brain.copy(), phantom.brain.copy()
    left[:, :, 50:], right[:, :, :50] = False, False
    for side in (left, right):
        bias = np.median(tilted.subtraction[side]) - np.median(plain.subtraction[side])
        assert abs(bias) < 0.006  # 2 % before


def test_noise_is_measured_as_it_was_made() -> None:
    rng = np.random.default_rng(2)
    shape = (48, 48, 48)
    brain = np.ones(shape, bool)
    pre = (1 + rng.normal(0, 0.03, shape)).astype(np.float32)
    low = (1 + rng.normal(0, 0.03, shape)).astype(np.float32)
    seen = compare(pre, low, brain, (1.0, 1.0, 1.0))
    expected = 0.03 * np.sqrt(2)
    assert seen.sigma == pytest.approx(expected, rel=0.03)
    assert float(np.median(seen.sigma_map)) == pytest.approx(expected, rel=0.05)


def test_a_signal_returns_to_the_low_dose_image_through_the_motion_that_was_undone() -> None:
    phantom = head(stripped=True)
    straight = as_volume(phantom.pre)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zyx", [20, 15, 10], degrees=True).as_matrix()  # an oblique grid
    volume = Volume(straight.voxels, turn @ straight.affine)
    prepared = prepare(volume, volume)
    signal = np.zeros_like(prepared.pre.voxels)
    signal[20:23, 30:33, 20:23] = 0.5
    moved = np.stack([np.full(signal.shape, mm, np.float32) for mm in (0.5, 1.0, -1.5)])  # along k, j, i

    def centre(displacement: Array) -> Array:
        comparison = replace(prepared.comparison, displacement=displacement)
        carried = replace(prepared, comparison=comparison).signal_on_low(signal)
        assert carried.min() >= 0
        return np.array(ndimage.center_of_mass(carried))

    off = 2.0 * (centre(moved) - centre(0 * moved))  # mm
    assert off == pytest.approx([-0.5, -1.0, 1.5], abs=0.1)  # low(x - u) is pre(x)


def test_a_signal_goes_to_the_pre_contrast_grid_unchanged_and_is_zero_elsewhere() -> None:
    prepared, pre = prepared_head(stripped=True), as_volume(head(stripped=True).pre)
    signal = np.zeros_like(prepared.pre.voxels)
    signal[20, 30, 25] = 0.5
    native = prepared.signal_on_pre(signal)
    assert native.shape == pre.voxels.shape
    assert np.count_nonzero(native) == 1
    assert native.max() == pytest.approx(0.5 * prepared.scale, rel=1e-5)


def test_a_signal_goes_back_through_gain_and_motion_to_the_low_dose_grid() -> None:
    phantom = head(stripped=False)
    low = turned(as_volume(phantom.pre * 3.0), degrees=2.0, shift_mm=4.0)
    prepared = prepare(as_volume(phantom.pre), low)
    native = prepared.signal_on_low(prepared.pre.voxels * prepared.brain)
    inside = ndimage.binary_erosion(native > 0, iterations=2)
    # Nothing enhances: the carried image is the low-dose image itself, in its own units.
    assert np.median(native[inside] / low.voxels[inside]) == pytest.approx(1.0, abs=0.03)
    assert np.corrcoef(native[inside], low.voxels[inside])[0, 1] > 0.97


def test_a_finer_grid_is_worked_on_at_one_millimetre_and_carried_back() -> None:
    phantom = head(stripped=True)
    # Every 2 mm voxel stored as four voxels of 0.5 mm along a row.
    pre, low = (np.repeat(v, 4, axis=2) for v in (phantom.pre, phantom.low))
    affine = np.diag([0.5, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-(n - 1) * s / 2 for n, s in zip(pre.shape[::-1], (0.5, 2.0, 2.0), strict=True)]
    fine = [Volume(v.astype(np.float32), affine) for v in (pre, low)]
    prepared = prepare(*fine)
    assert prepared.pre.spacing_mm == pytest.approx((1.0, 2.0, 2.0))
    assert prepared.signal_on_pre(prepared.support).shape == fine[0].voxels.shape
