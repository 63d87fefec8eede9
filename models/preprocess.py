"""From a pre-contrast and a low-dose volume to what the network sees, and back to the native grids.

The one implementation for training and inference. Hides the order of the steps (brain, registration, gain, residual
motion, noise), the working grid (the pre-contrast grid cropped to the brain, its axes never finer than `FINEST_MM`)
and the way back. Follows section 2 of the paper's method (arXiv 2403.03539) with four changes: the gain is trimmed
symmetrically, a gain field is fitted, local residual motion is undone before subtracting, and the image itself is never
resampled for output (only the predicted signal is). Must never be random: the same pair gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from models.brain import find_brain
from models.motion import residual_motion
from models.noise import high_pass_noise, local_noise, noise_left
from models.registration import RegistrationError, match_intensity, register
from models.statistics import SCALE_QUANTILE
from models.volume import Array, Mask, Volume

FINEST_MM, WORKING_MM = 0.7, 1.0  # an axis finer than this becomes so: chosen: what a 3-D T1 tells ends near 1 mm
SUPPORT_MM = 12.0  # signal is predicted up to here outside the brain. Chosen: meninges and sinuses lie within
SUPPORT_FADE_MM = 4.0  # and fades over the last of it, so that it has no edge
# Onto a grid coarser by this factor an image is smoothed first, by this share of a new voxel (a Gaussian), so that only
# what the grid can carry is left. Chosen: .4 leaves .45 of what is at the grid's Nyquist frequency.
_COARSER, _ANTIALIAS = 1.2, 0.4

FractionDone = Callable[[float], None]  # told the fraction of the work that is done


@dataclass(frozen=True)
class Comparison:
    """How a low-dose image relates to its pre-contrast image, both on one grid and in units of white matter."""

    subtraction: Array  # low dose, gain-corrected and residual motion undone, minus pre-contrast
    gain: float  # scalar that brings low dose to pre-contrast
    gain_field: Array  # smooth, around 1, beside the scalar
    sigma: float  # noise of the subtraction (high-pass, robust)
    sigma_map: Array  # local standard deviation of what is not enhancement
    noise_left: tuple[float, float, float]  # share of the noise that each of `smoothings` leaves
    displacement: Array  # (3, k, j, i), mm along k, j, i: image(x - u) undid residual motion

    def motion_mm(self, brain: Mask) -> float:
        """0.95 quantile, in the brain, of the length of the residual motion that was undone."""
        return float(np.sqrt(np.quantile((self.displacement**2).sum(axis=0)[brain], 0.95)))


@dataclass(frozen=True)
class Prepared:
    """What the network sees (arrays (k, j, i) on the working grid, white matter = 1) and the way back."""

    pre: Volume
    brain: Mask
    found: Mapping[str, float]  # figures of the brain, by the names of `models.brain.BRAIN_LIMITS`
    support: Array  # 0..1: where signal may be predicted
    comparison: Comparison
    scale: float  # native units of the pre-contrast image per unit
    low_scale: float  # native units of the low-dose image per unit, before the gain
    pre_to_low: sitk.Transform  # from a point of the pre-contrast head to the same point in the low-dose image (LPS mm)
    native_pre: Volume
    native_low: Volume

    def signal_on_pre(self, signal: Array) -> Array:
        """Carry a signal on the working grid to the pre-contrast series.

        Args:
            signal: (k, j, i) contrast enhancement, white matter = 1.

        Returns:
            (k, j, i) on the native pre-contrast grid, in its native units; exactly 0 where nothing was predicted.
        """
        return self._carry(signal * np.float32(self.scale), self.native_pre, sitk.Transform())

    def signal_on_low(self, signal: Array) -> Array:
        """Carry a signal back through motion, registration and gain to the low-dose series, in its native units."""
        seen = self.comparison
        unit = self.low_scale / (seen.gain * seen.gain_field)
        back = sitk.CompositeTransform([self._displacement(), self.pre_to_low.GetInverse()])  # the last comes first
        return self._carry(signal * unit.astype(np.float32), self.native_low, back)

    def _displacement(self) -> sitk.Transform:
        """From where a point lies in the rigidly aligned low-dose image to where the pre-contrast head has it."""
        directions = self.pre.affine[:3, :3] / np.array(self.pre.spacing_mm)  # columns i, j, k
        vectors = np.tensordot(self.comparison.displacement[::-1], directions, (0, 1))
        field = sitk.GetImageFromArray(vectors.astype(np.float64), isVector=True)
        field.CopyInformation(self.pre.to_sitk())
        return sitk.DisplacementFieldTransform(field)

    def _carry(self, signal: Array, grid: Volume, to_working: sitk.Transform) -> Array:
        """Linear: the signal stays non-negative, and zero where all neighbours are zero."""
        image = self.pre.with_voxels(signal).to_sitk()
        carried = sitk.Resample(image, grid.to_sitk(), to_working, sitk.sitkLinear, 0.0)
        native: Array = sitk.GetArrayFromImage(carried)
        return native


def prepare(pre: Volume, low: Volume, *, progress: FractionDone = lambda _: None) -> Prepared:
    """Bring a pair to the working grid.

    Args:
        pre: pre-contrast T1, native grid and units.
        low: low-dose T1 of the same head and sequence; any grid.
        progress: told the fraction done.

    Raises:
        NoBrainError: no brain was found in the pre-contrast volume.
        RegistrationError: the two volumes could not be aligned.
    """
    found = find_brain(pre)
    brain = found.mask
    progress(0.3)
    pre_to_low = register(pre, low, brain)
    progress(0.7)
    grid = _working_grid(pre, brain)
    work_brain = _nearest(brain, pre, grid)
    work_pre = _resample(pre, grid, sitk.Transform())
    scale = float(np.quantile(work_pre.voxels[work_brain], SCALE_QUANTILE))
    work_low = _resample(low, grid, pre_to_low)
    low_scale = float(np.quantile(work_low.voxels[work_brain], SCALE_QUANTILE))
    if min(scale, low_scale) <= 0:
        raise RegistrationError("most of the brain has no signal in one of the images")
    unit_pre = work_pre.with_voxels(work_pre.voxels / scale)
    unit_low = (work_low.voxels / low_scale).astype(np.float32)
    comparison = compare(unit_pre.voxels, unit_low, work_brain, grid.spacing_mm)
    progress(1.0)
    return Prepared(
        pre=unit_pre,
        brain=work_brain,
        found=found.figures,
        support=_support(work_brain, grid.spacing_mm),
        comparison=comparison,
        scale=scale,
        low_scale=low_scale,
        pre_to_low=pre_to_low,
        native_pre=pre,
        native_low=low,
    )


def compare(pre: Array, low: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Comparison:
    """Radiometric registration, subtraction and noise of an aligned pair.

    Args:
        pre: (k, j, i), white matter = 1.
        low: (k, j, i), aligned; any gain.
        brain: (k, j, i), where gain and noise are measured.
        spacing_mm: along i, j, k.
    """
    gain, field = match_intensity(pre, low, brain, spacing_mm)
    corrected = (gain * field * low).astype(np.float32)
    displacement, moved = residual_motion(corrected, pre, brain, spacing_mm)
    subtraction = moved - pre
    sigma = high_pass_noise(subtraction, brain)
    noise = local_noise(subtraction, brain, spacing_mm)
    return Comparison(subtraction, gain, field, sigma, noise, noise_left(subtraction, brain), displacement)


def _working_grid(pre: Volume, brain: Mask) -> Volume:
    """The box of the brain plus `SUPPORT_MM`, on the native axes; axes finer than `FINEST_MM` become `WORKING_MM`."""
    margin = [int(np.ceil(SUPPORT_MM / s)) for s in pre.spacing_mm[::-1]]
    low, high = [], []
    for axis in range(3):
        where = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        low.append(max(0, int(where[0]) - margin[axis]))
        high.append(min(brain.shape[axis], int(where[-1]) + 1 + margin[axis]))
    corner = np.array(low[::-1], dtype=float)  # i, j, k
    size = np.array(high[::-1], dtype=float) - corner
    spacing = np.array(pre.spacing_mm)
    factor = np.where(spacing < FINEST_MM, WORKING_MM / spacing, 1.0)
    shape = np.maximum(1, np.ceil(size / factor - 1e-6)).astype(int)
    affine = pre.affine.copy()
    affine[:3, :3] = pre.affine[:3, :3] * factor
    affine[:3, 3] = (pre.affine @ np.append(corner + (factor - 1) / 2, 1.0))[:3]
    return Volume(np.zeros(tuple(shape[::-1]), np.float32), affine)


def _resample(volume: Volume, grid: Volume, transform: sitk.Transform) -> Volume:
    """Cubic B-spline onto `grid`, limited to the range of the source; a pure crop copies voxels exactly."""
    crop = _as_crop(volume, grid) if transform.GetName() == "IdentityTransform" else None
    if crop is not None:
        return grid.with_voxels(crop)
    image = volume.to_sitk()
    for axis, (fine, coarse) in enumerate(zip(volume.spacing_mm, grid.spacing_mm, strict=True)):
        if coarse > _COARSER * fine:
            image = sitk.RecursiveGaussian(
                image, _ANTIALIAS * coarse, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis
            )
    moved = sitk.GetArrayFromImage(sitk.Resample(image, grid.to_sitk(), transform, sitk.sitkBSpline, 0.0))
    return grid.with_voxels(np.clip(moved, float(volume.voxels.min()), float(volume.voxels.max())))


def _as_crop(volume: Volume, grid: Volume) -> Array | None:
    if not np.allclose(volume.affine[:3, :3], grid.affine[:3, :3], atol=1e-6):
        return None
    start = np.rint((np.linalg.inv(volume.affine) @ grid.affine[:, 3])[:3]).astype(int)[::-1]
    stop = start + grid.voxels.shape
    return volume.voxels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]


def _nearest(mask: Mask, volume: Volume, grid: Volume) -> Mask:
    image = volume.with_voxels(mask.astype(np.float32)).to_sitk()
    moved: Mask = (
        sitk.GetArrayFromImage(sitk.Resample(image, grid.to_sitk(), sitk.Transform(), sitk.sitkLinear, 0.0)) > 0.5
    )
    return moved


def _support(brain: Mask, spacing_mm: tuple[float, float, float]) -> Array:
    distance = ndimage.distance_transform_edt(~brain, sampling=spacing_mm[::-1])
    return np.clip((SUPPORT_MM - distance) / SUPPORT_FADE_MM, 0, 1).astype(np.float32)
