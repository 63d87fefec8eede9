"""From a pre-contrast and a low-dose volume to what the network sees, and back to the native grids.

The one implementation for training and inference. Hides the working grid (the pre-contrast grid cropped to the brain,
its axes never finer than 0.7 mm), the rigid registration, the radiometric registration (one gain and a smooth gain
field), the residual motion and the noise estimate. Follows section 2 of the paper's method (arXiv 2403.03539) with four
changes: the gain is trimmed symmetrically, a gain field is fitted, local residual motion is undone before subtracting,
and the image itself is never resampled for output (only the predicted signal is). Must never be random: every sample
is seeded and every sum runs in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from models.brain import find_brain
from models.volume import Array, Mask, Volume

SEED = 20240306
FINEST_MM = 0.7  # below this an axis is resampled: the information of a 3-D T1 ends near 1 mm
SUPPORT_MM = 12.0  # signal is predicted up to here outside the brain (meninges, sinuses), fading over the last 4 mm
SCALE_QUANTILE = 0.95  # of the pre-contrast brain: about white matter
FIELD_SIGMA_MM = 20.0
NOISE_SIGMA_MM = 8.0
MOTION_LIMIT_MM = 1.5  # the most residual motion that is undone, per axis
_MOTION_SCALES_MM = ((30.0, np.inf), (9.0, np.inf), (5.0, 2.0))  # Gaussian, and the largest voxel side that takes it
_MOTION_BLUR_MM = 0.7  # of the images in which it is measured
_DARKENING_MM = 0.3  # a voxel may be darker by what so much motion explains
_MOTION_ROUNDS, _MOTION_SETTLED_MM = 3, 0.05  # at most at each scale; done when a round moves 95 % of the brain by less
GAIN_LIMITS = (0.85, 1.15)
_TRIM = 2.5  # in robust standard deviations
_TRUNCATED_STD = 0.88  # std of a unit normal truncated at +-2

Progress = Callable[[float], None]


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
    found: Mapping[str, float]  # figures of the brain, by the names of `models.brain.CHECKS`
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


def prepare(pre: Volume, low: Volume, *, progress: Progress = lambda _: None) -> Prepared:
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


class RegistrationError(ValueError):
    """The two volumes could not be aligned."""


def register(pre: Volume, low: Volume, brain: Mask) -> sitk.Transform:
    """Rigid transform from points of `pre` to points of `low` (LPS mm).

    Mattes mutual information inside the dilated brain, coarse to fine, seeded and single-threaded.

    Raises:
        RegistrationError: the optimiser failed or moved the head by more than 60 mm or 30 degrees.
    """
    fixed, moving = _clipped(pre, brain), _clipped(low, None)
    region = sitk.Cast(pre.with_voxels(brain.astype(np.float32)).to_sitk() > 0.5, sitk.sitkUInt8)
    region = sitk.BinaryDilate(region, [max(1, round(4 / s)) for s in pre.spacing_mm])
    points = (pre.affine @ np.append(np.argwhere(brain).mean(axis=0)[::-1], 1.0))[:3]
    rigid = sitk.Euler3DTransform(points.tolist(), 0.0, 0.0, 0.0)
    with _one_thread():
        _align(fixed, moving, region, rigid)
    rigid.SetParameters([round(value, 6) for value in rigid.GetParameters()])  # well below a micrometre at the skull
    angles = np.degrees(rigid.GetParameters()[:3])
    shift = np.array(rigid.GetParameters()[3:])
    if np.abs(angles).max() > 30 or np.linalg.norm(shift) > 60:
        raise RegistrationError(
            f"the alignment found is {np.linalg.norm(shift):.0f} mm, {np.abs(angles).max():.0f} deg"
        )
    return rigid


@contextmanager
def _one_thread() -> Iterator[None]:
    """ITK sums in a fixed order: the same transform, to the last bit, on every run; the setting is restored."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _align(fixed: sitk.Image, moving: sitk.Image, region: sitk.Image, rigid: sitk.Euler3DTransform) -> None:
    """Improve `rigid` in place, coarse to fine."""
    for shrink, smooth_mm, sampling, step in ((4, 3.0, 0.5, 2.0), (2, 1.5, 0.15, 0.5), (1, 0.7, 0.05, 0.1)):
        method = sitk.ImageRegistrationMethod()  # keeps the number of threads that it is made with
        method.SetMetricAsMattesMutualInformation(48)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(sampling, SEED)
        method.SetMetricFixedMask(region)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel([shrink])
        method.SetSmoothingSigmasPerLevel([smooth_mm])
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetOptimizerAsRegularStepGradientDescent(step, 0.002 * shrink, 100, relaxationFactor=0.6)
        method.SetInitialTransform(rigid, inPlace=True)
        try:
            method.Execute(fixed, moving)
        except RuntimeError as error:
            raise RegistrationError("the images do not overlap") from error


def compare(pre: Array, low: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Comparison:
    """Radiometric registration, subtraction and noise of an aligned pair.

    Args:
        pre: (k, j, i), white matter = 1.
        low: (k, j, i), aligned; any gain.
        brain: (k, j, i), where gain and noise are measured.
        spacing_mm: along i, j, k.
    """
    gain = symmetric_gain(low[brain], pre[brain])
    field = np.ones_like(pre)
    for _ in range(2):
        plain = _plain(gain * field * low - pre, brain)
        field = _gain_field(pre, gain * low, plain, spacing_mm)
    corrected = (gain * field * low).astype(np.float32)
    displacement, moved = _residual_motion(corrected, pre, brain, spacing_mm)
    subtraction = moved - pre
    sigma = high_pass_noise(subtraction, brain)
    noise = _local_noise(subtraction, brain, spacing_mm)
    return Comparison(subtraction, gain, field, sigma, noise, _noise_left(subtraction, brain), displacement)


def _residual_motion(
    low: Array, pre: Array, brain: Mask, spacing_mm: tuple[float, float, float]
) -> tuple[Array, Array]:
    """Displacement u (3, k, j, i), mm along k, j, i, that the rigid registration left, and low(x - u), on `pre`.

    Coarse to fine: where the image does not tell the finer motion, that of the coarser scale holds. At each scale
    rounds of Lucas and Kanade (1981) on what is left.
    """
    slope = _slopes(_soft(pre, spacing_mm), spacing_mm)
    displacement = np.zeros((3, *pre.shape), np.float32)
    moved = low
    side_mm = round(max(spacing_mm), 3)  # direction cosines in headers have few digits
    for sigma_mm in (sigma for sigma, largest in _MOTION_SCALES_MM if side_mm <= largest):
        coarser = displacement
        for _ in range(_MOTION_ROUNDS):
            known = displacement - coarser
            rest = _soft(moved - pre, spacing_mm)
            finer = _motion(rest, slope, known, brain, spacing_mm, sigma_mm=sigma_mm)
            before, displacement = displacement, np.clip(coarser + finer, -MOTION_LIMIT_MM, MOTION_LIMIT_MM)
            moved = _displaced(low, displacement, spacing_mm)
            if np.quantile(((displacement - before) ** 2).sum(axis=0)[brain], 0.95) < _MOTION_SETTLED_MM**2:
                break
    return displacement, moved


def _displaced(image: Array, displacement: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """`image` (k, j, i) with every point moved by `displacement` (3, k, j, i; mm along k, j, i): image(x - u).

    Cubic B-spline, limited to the range of the image.
    """
    at = np.indices(image.shape, dtype=np.float32)
    at -= displacement / np.array(spacing_mm[::-1], np.float32)[:, None, None, None]
    moved = ndimage.map_coordinates(image, at, order=3, mode="nearest", output=np.float32)
    return np.clip(moved, image.min(), image.max())


def _soft(image: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """The image smoothed by 0.7 mm, in which motion is measured."""
    soft: Array = ndimage.gaussian_filter(image, [_MOTION_BLUR_MM / s for s in spacing_mm[::-1]])
    return soft


def _slopes(image: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """Gradient (3, k, j, i), 1/mm along k, j, i; 0 along an axis of one voxel."""
    slopes = np.zeros((3, *image.shape), np.float32)
    for axis, (size, count) in enumerate(zip(spacing_mm[::-1], image.shape, strict=True)):
        if count > 1:
            slopes[axis] = np.gradient(image, size, axis=axis)
    return slopes


def _motion(
    rest: Array,
    slope: Array,
    known: Array,
    brain: Mask,
    spacing_mm: tuple[float, float, float],
    *,
    sigma_mm: float,
) -> Array:
    """The shift u (3, k, j, i) of which a subtraction shows what is not yet known: rest = slope . (u - known).

    Both are in mm and beyond the motion of the coarser scale. Weighted least squares around every voxel (Gaussian of
    `sigma_mm`) over brain that does not enhance: within 3 robust standard deviations, darker by no more than a small
    shift explains, and not beside what is brighter, because what enhances in a sulcus or at a border has its flanks on
    slopes; nor at the brain's border, where a stripped image was cut. Drawn to 0, the coarser scale's motion, where the
    slopes are no steeper than those of the noise.
    """
    above = rest - np.median(rest[brain])
    spread = 1.4826 * np.median(np.abs(above[brain])) + 1e-6
    enhancing = ndimage.binary_dilation(brain & (above > 3 * spread))
    darkest = -3 * spread - _DARKENING_MM * np.sqrt((slope**2).sum(axis=0))
    plain = (ndimage.binary_erosion(brain, border_value=1) & ~enhancing & (above > darkest)).astype(np.float32)
    explained = rest + (slope * known).sum(axis=0)
    pairs = [(a, b) for a in range(3) for b in range(a, 3)]
    products = [plain * slope[a] * slope[b] for a, b in pairs] + [plain * slope[a] * explained for a in range(3)]
    means, blocks = _block_means(products, spacing_mm, sigma_mm)
    normal = np.empty((*means[0].shape, 3, 3), np.float32)
    for (a, b), mean in zip(pairs, means, strict=False):
        normal[..., a, b] = normal[..., b, a] = mean
    moving = [axis for axis in range(3) if rest.shape[axis] > 1]
    noise = np.mean(_slopes(rest, spacing_mm)[moving][:, plain > 0] ** 2) if plain.any() else 0.0
    ridge = 0.02 * float(np.mean(np.trace(normal, axis1=-2, axis2=-1))) + float(noise) + 1e-6
    right = np.stack(means[len(pairs) :], axis=-1)[..., None]
    shift = np.linalg.solve(normal + ridge * np.eye(3, dtype=np.float32), right)[..., 0]
    return np.stack([_expand(shift[..., axis], blocks, rest.shape) for axis in range(3)])


def _noise_left(subtraction: Array, brain: Mask) -> tuple[float, float, float]:
    """Robust standard deviation in the brain after each smoothing, over that before: tells the noise's correlation."""
    spreads = []
    for image in (subtraction, *smoothings(subtraction)):
        inside = image[brain]
        spreads.append(float(np.median(np.abs(inside - np.median(inside)))) + 1e-6)
    once, twice, wide = (min(1.0, spread / spreads[0]) for spread in spreads[1:])
    return once, twice, wide


def smoothings(subtraction: Array) -> tuple[Array, Array, Array]:
    """3x3x3 binomial once, twice, and then once more with its taps two voxels apart; (k, j, i) each."""
    once = _binomial(subtraction, (0.25, 0.5, 0.25))
    twice = _binomial(once, (0.25, 0.5, 0.25))
    return once, twice, _binomial(twice, (0.25, 0.0, 0.5, 0.0, 0.25))


def _binomial(volume: Array, taps: tuple[float, ...]) -> Array:
    for axis in range(3):
        volume = ndimage.correlate1d(volume, taps, axis, mode="nearest")
    return volume


def symmetric_gain(low: Array, pre: Array) -> float:
    """The factor s that brings `low` to `pre`: sqrt(sum pre^2 / sum low^2) over |s low - pre| < 2.5 MAD, iterated.

    The geometric mean of both regressions: unbiased when both images carry the same noise, and trimmed on both sides,
    so that enhancement does not pull it (a one-sided quantile biases it upward by 1 to 2 %).

    Args:
        low: voxels of the low-dose brain, any shape.
        pre: the same voxels before contrast.
    """
    gain = float(np.median(pre) / max(float(np.median(low)), 1e-6))
    for _ in range(20):
        difference = gain * low - pre
        centre = np.median(difference)
        kept = np.abs(difference - centre) < _TRIM * 1.4826 * np.median(np.abs(difference - centre)) + 1e-6
        new = float(np.sqrt(np.sum(pre[kept] ** 2, dtype=np.float64) / np.sum(low[kept] ** 2, dtype=np.float64)))
        if abs(new - gain) < 1e-5:
            break
        gain = new
    return new


def _plain(difference: Array, brain: Mask) -> Array:
    """1 where a brain voxel does not enhance (within the trim), else 0."""
    inside = difference[brain]
    centre = np.median(inside)
    limit = _TRIM * 1.4826 * np.median(np.abs(inside - centre)) + 1e-6
    return (brain & (np.abs(difference - centre) < limit)).astype(np.float32)


def _gain_field(pre: Array, low: Array, plain: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """Local geometric-mean gain: sqrt(G(m pre^2) / G(m low^2)), drawn to 1 where there is little brain."""
    top, bottom = _smooth([plain * pre**2, plain * low**2], spacing_mm, FIELD_SIGMA_MM)
    prior = 0.02 * float(top.max()) + 1e-9
    return np.clip(np.sqrt((top + prior) / (bottom + prior)), *GAIN_LIMITS).astype(np.float32)


def high_pass_noise(image: Array, mask: Mask) -> float:
    """Robust standard deviation, in a mask, of an image less its 3x3x3 mean, corrected for the mean's own share."""
    rest = image - ndimage.uniform_filter(image, 3)
    inside = rest[mask]
    mad = float(np.median(np.abs(inside - np.median(inside))))
    return max(1.4826 * mad / float(np.sqrt(1 - 1 / 27)), 1e-4)


def _local_noise(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Array:
    """Local standard deviation of what is not enhancement."""
    inside = subtraction[brain]
    sigma = 1.4826 * float(np.median(np.abs(inside - np.median(inside)))) + 1e-6
    return local_statistics(subtraction, brain, spacing_mm, sigma)[1]


def local_statistics(
    subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float], sigma: Array | float
) -> tuple[Array, Array]:
    """Local mean and standard deviation over |z| < 2 sigma; the truncation's loss (0.88) is given back.

    Args:
        subtraction: (k, j, i), white matter = 1.
        brain: (k, j, i), where both are measured.
        spacing_mm: along i, j, k.
        sigma: expected standard deviation, one or (k, j, i); what is returned where there is no brain.
    """
    quiet = (brain & (np.abs(subtraction) < 2 * sigma)).astype(np.float32)
    weight, first, second = _smooth([quiet, quiet * subtraction, quiet * subtraction**2], spacing_mm, NOISE_SIGMA_MM)
    prior = 0.02 * float(weight.max()) + 1e-9
    mean = first / (weight + prior)
    square = (second + prior * (_TRUNCATED_STD * sigma) ** 2) / (weight + prior)
    std = np.sqrt(np.maximum(square - mean**2, 1e-8)) / _TRUNCATED_STD
    return mean, std.astype(np.float32)


def _smooth(arrays: list[Array], spacing_mm: tuple[float, float, float], sigma_mm: float) -> list[Array]:
    """Gaussian of `sigma_mm` computed on block means, carried back linearly."""
    means, blocks = _block_means(arrays, spacing_mm, sigma_mm)
    return [_expand(mean, blocks, arrays[0].shape) for mean in means]


def _block_means(
    arrays: list[Array], spacing_mm: tuple[float, float, float], sigma_mm: float
) -> tuple[list[Array], list[int]]:
    """Gaussian of `sigma_mm` over means of blocks of about a quarter of it, and the sides of a block in voxels."""
    blocks = [max(1, round(sigma_mm / 4 / s)) for s in spacing_mm[::-1]]  # (k, j, i)
    sigmas = [sigma_mm / s / b for s, b in zip(spacing_mm[::-1], blocks, strict=True)]
    out = []
    for array in arrays:
        padded = np.pad(array, [(0, -n % b) for n, b in zip(array.shape, blocks, strict=True)], mode="edge")
        k, j, i = (n // b for n, b in zip(padded.shape, blocks, strict=True))
        means = padded.reshape(k, blocks[0], j, blocks[1], i, blocks[2]).mean(axis=(1, 3, 5))
        out.append(ndimage.gaussian_filter(means, sigmas, mode="constant"))
    return out, blocks


def _expand(means: Array, blocks: list[int], shape: tuple[int, ...]) -> Array:
    """Linear interpolation from block centres to voxels, one axis at a time."""
    for axis, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        at = np.clip((np.arange(size) - (block - 1) / 2) / block, 0, means.shape[axis] - 1)
        lower = np.minimum(at.astype(int), max(means.shape[axis] - 2, 0))
        upper = np.minimum(lower + 1, means.shape[axis] - 1)
        weight = (at - lower).reshape([-1 if a == axis else 1 for a in range(3)]).astype(np.float32)
        means = means.take(lower, axis) * (1 - weight) + means.take(upper, axis) * weight
    return means.astype(np.float32)


def _clipped(volume: Volume, brain: Mask | None) -> sitk.Image:
    """Intensities to 0..1.2 of the volume's own bright tissue, so that scalp fat does not own the histogram.

    Raises:
        RegistrationError: the volume is empty.
    """
    inside = volume.voxels[brain] if brain is not None else volume.voxels[volume.voxels > 0]
    if inside.size == 0:
        raise RegistrationError("the low-dose image is empty")
    top = float(np.quantile(inside, SCALE_QUANTILE if brain is not None else 0.98))
    return volume.with_voxels(np.clip(volume.voxels / max(top, 1e-6), 0, 1.2)).to_sitk()


def _working_grid(pre: Volume, brain: Mask) -> Volume:
    """The box of the brain plus `SUPPORT_MM`, on the native axes; axes finer than `FINEST_MM` become 1 mm."""
    margin = [int(np.ceil(SUPPORT_MM / s)) for s in pre.spacing_mm[::-1]]
    low, high = [], []
    for axis in range(3):
        where = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        low.append(max(0, int(where[0]) - margin[axis]))
        high.append(min(brain.shape[axis], int(where[-1]) + 1 + margin[axis]))
    corner = np.array(low[::-1], dtype=float)  # i, j, k
    size = np.array(high[::-1], dtype=float) - corner
    spacing = np.array(pre.spacing_mm)
    factor = np.where(spacing < FINEST_MM, 1.0 / spacing, 1.0)
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
        if coarse > 1.2 * fine:  # keep what the coarser grid can carry
            image = sitk.RecursiveGaussian(
                image, 0.4 * coarse, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis
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
    return np.clip((SUPPORT_MM - distance) / 4.0, 0, 1).astype(np.float32)
