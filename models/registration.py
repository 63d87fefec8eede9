"""How a low-dose image is brought to its pre-contrast image: rigidly in space, and by a gain in intensity.

Hides the optimiser of the rigid alignment, and what is left out of the gain so that enhancement does not pull it. Must
never be random: every sample is seeded and every sum runs in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import SimpleITK as sitk

from models.statistics import SCALE_QUANTILE, robust_std, smooth
from models.volume import Array, Mask, Volume

SEED = 20240306  # of the voxels that are compared; any number serves
FIELD_SIGMA_MM = 20.0  # of the gain field. Chosen (ADR 3): a receive field is smooth over centimetres, lesions are not
GAIN_LIMITS = (0.85, 1.15)  # of the field. Chosen: a larger difference is of another sequence, and is not taken out
_FIELD_ROUNDS = 2  # the field changes what is trimmed, and that the field. Chosen
_GAIN_ROUNDS, _GAIN_SETTLED = 20, 1e-5  # at most; done when a round changes the gain by less
_TRIM = 2.5  # robust standard deviations. Chosen: a test holds the gain's error below .4 % with 3 % enhancing voxels
_PRIOR = 0.02  # weight of a field of 1, over that of a neighbourhood full of brain. Chosen: small, and never 0
# Of the rigid alignment, all chosen; a test holds its error below .35 mm and .2 degrees.
_LEVELS = (  # factor by which images shrink, Gaussian (mm), share of the voxels compared, first step (mm)
    (4, 3.0, 0.5, 2.0),
    (2, 1.5, 0.15, 0.5),
    (1, 0.7, 0.05, 0.1),
)
_LAST_STEP, _MOST_STEPS, _RELAXATION = 0.002, 100, 0.6  # mm, per factor; of the descent at each level
_BINS = 48  # of each axis of the joint histogram
_AROUND_MM = 4.0  # the brain and so much around it is compared: its border tells most
_MOST_MM, _MOST_DEG = 60.0, 30.0  # of a head between two series: a coil leaves no room for more
_BRIGHTEST = 1.2  # brighter than this times the brain is as bright: vessels, and fat most of all
_BRIGHT_QUANTILE = 0.98  # of all that is above 0, where no brain is known: about that of its brain


class RegistrationError(ValueError):
    """The two volumes could not be aligned."""


def register(pre: Volume, low: Volume, brain: Mask) -> sitk.Transform:
    """Rigid transform from points of `pre` to points of `low` (LPS mm).

    Mattes mutual information inside the dilated brain, coarse to fine, seeded and single-threaded.

    Raises:
        RegistrationError: the optimiser failed or moved the head by more than `_MOST_MM` or `_MOST_DEG`.
    """
    fixed, moving = _clipped(pre, brain), _clipped(low, None)
    region = sitk.Cast(pre.with_voxels(brain.astype(np.float32)).to_sitk() > 0.5, sitk.sitkUInt8)
    region = sitk.BinaryDilate(region, [max(1, round(_AROUND_MM / s)) for s in pre.spacing_mm])
    points = (pre.affine @ np.append(np.argwhere(brain).mean(axis=0)[::-1], 1.0))[:3]
    rigid = sitk.Euler3DTransform(points.tolist(), 0.0, 0.0, 0.0)
    with _one_thread():
        _align(fixed, moving, region, rigid)
    rigid.SetParameters([round(value, 6) for value in rigid.GetParameters()])  # well below a micrometre at the skull
    angles = np.degrees(rigid.GetParameters()[:3])
    shift = np.array(rigid.GetParameters()[3:])
    if np.abs(angles).max() > _MOST_DEG or np.linalg.norm(shift) > _MOST_MM:
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
    for shrink, smooth_mm, sampling, step in _LEVELS:
        method = sitk.ImageRegistrationMethod()  # keeps the number of threads that it is made with
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(sampling, SEED)
        method.SetMetricFixedMask(region)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel([shrink])
        method.SetSmoothingSigmasPerLevel([smooth_mm])
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetOptimizerAsRegularStepGradientDescent(
            step, _LAST_STEP * shrink, _MOST_STEPS, relaxationFactor=_RELAXATION
        )
        method.SetInitialTransform(rigid, inPlace=True)
        try:
            method.Execute(fixed, moving)
        except RuntimeError as error:
            raise RegistrationError("the images do not overlap") from error


def _clipped(volume: Volume, brain: Mask | None) -> sitk.Image:
    """Intensities over the volume's own bright tissue, up to `_BRIGHTEST`, so that fat does not own the histogram.

    Raises:
        RegistrationError: the volume is empty.
    """
    inside = volume.voxels[brain] if brain is not None else volume.voxels[volume.voxels > 0]
    if inside.size == 0:
        raise RegistrationError("the low-dose image is empty")
    top = float(np.quantile(inside, SCALE_QUANTILE if brain is not None else _BRIGHT_QUANTILE))
    return volume.with_voxels(np.clip(volume.voxels / max(top, 1e-6), 0, _BRIGHTEST)).to_sitk()


def match_intensity(pre: Array, low: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> tuple[float, Array]:
    """The gain that brings `low` to `pre`, and a smooth field (k, j, i) around 1 beside it.

    Args:
        pre: (k, j, i), white matter = 1.
        low: (k, j, i) on the same grid.
        brain: (k, j, i), where both are measured.
        spacing_mm: along i, j, k.
    """
    gain = symmetric_gain(low[brain], pre[brain])
    field = np.ones_like(pre)
    for _ in range(_FIELD_ROUNDS):
        plain = _plain(gain * field * low - pre, brain)
        field = _gain_field(pre, gain * low, plain, spacing_mm)
    return gain, field


def symmetric_gain(low: Array, pre: Array) -> float:
    """The factor s that brings `low` to `pre`: sqrt(sum pre^2 / sum low^2) over |s low - pre - centre| < 2.5 sigma.

    Iterated; sigma is the robust standard deviation. The geometric mean of both regressions: unbiased when both images
    carry the same noise, and trimmed on both sides, so that enhancement does not pull it (a one-sided quantile biases
    it upward by 1 to 2 %).

    Args:
        low: voxels of the low-dose brain, any shape.
        pre: the same voxels before contrast.
    """
    gain = float(np.median(pre) / max(float(np.median(low)), 1e-6))
    for _ in range(_GAIN_ROUNDS):
        difference = gain * low - pre
        centre, limit = _trim(difference)
        kept = np.abs(difference - centre) < limit
        new = float(np.sqrt(np.sum(pre[kept] ** 2, dtype=np.float64) / np.sum(low[kept] ** 2, dtype=np.float64)))
        if abs(new - gain) < _GAIN_SETTLED:
            break
        gain = new
    return new


def _plain(difference: Array, brain: Mask) -> Array:
    """1 where a brain voxel does not enhance (within the trim), else 0."""
    centre, limit = _trim(difference[brain])
    return (brain & (np.abs(difference - centre) < limit)).astype(np.float32)


def _trim(differences: Array) -> tuple[float, float]:
    """The centre of what does not enhance, and how far from it a difference may lie."""
    return float(np.median(differences)), _TRIM * robust_std(differences) + 1e-6


def _gain_field(pre: Array, low: Array, plain: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """Local geometric-mean gain sqrt(G(m pre^2) / G(m low^2)), G a Gaussian, m `plain`; 1 where there is no brain."""
    top, bottom = smooth([plain * pre**2, plain * low**2], spacing_mm, FIELD_SIGMA_MM)
    prior = _PRIOR * float(top.max()) + 1e-9
    return np.clip(np.sqrt((top + prior) / (bottom + prior)), *GAIN_LIMITS).astype(np.float32)
