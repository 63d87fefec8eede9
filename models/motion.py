"""Residual motion: what a rigid registration leaves, tenths of a millimetre, is measured and undone.

Hides the method of Lucas and Kanade (1981): where image and pre-contrast image differ by a small shift u, their
difference is the slope of the image times u, and u is the weighted least-squares solution around every voxel. Why, and
what it costs: ADR 7; experiments with the constants: models/EXPERIMENTS.md. Must never take enhancement for motion.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from models.statistics import block_means, expand, robust_std
from models.volume import Array, Mask

MOTION_LIMIT_MM = 1.5  # the most residual motion that is undone, per axis. Chosen: beyond, the registration failed
_MOTION_SCALES_MM = ((30.0, np.inf), (9.0, np.inf), (5.0, 2.0))  # Gaussian, and the largest voxel side that takes it
_MOTION_BLUR_MM = 0.7  # of the images in which it is measured. Chosen: less noise, and borders still steep
_ENHANCING_STD = 3.0  # robust standard deviations above the median: brighter may enhance. Chosen
_DARKENING_MM = 0.3  # a voxel may be darker by what so much motion explains; .2 for brighter ones cost enhancement
_RIDGE = 0.02  # of the mean square slope, in every direction: a border tells no motion along itself. Chosen
_MOTION_ROUNDS, _MOTION_SETTLED_MM = 3, 0.05  # at most at each scale; done when a round moves 95 % of the brain by less


def residual_motion(low: Array, pre: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> tuple[Array, Array]:
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
    `sigma_mm`) over brain that does not enhance: within `_ENHANCING_STD`, darker by no more than a small
    shift explains, and not beside what is brighter, because what enhances in a sulcus or at a border has its flanks on
    slopes; nor at the brain's border, where a stripped image was cut. Drawn to 0, the coarser scale's motion, where the
    slopes are no steeper than those of the noise. Solved are the normal equations, with G the Gaussian and m those
    voxels: (G(m slope slope^T) + ridge) u = G(m slope (rest + slope . known)).
    """
    above = rest - np.median(rest[brain])
    spread = robust_std(rest[brain]) + 1e-6
    enhancing = ndimage.binary_dilation(brain & (above > _ENHANCING_STD * spread))
    darkest = -_ENHANCING_STD * spread - _DARKENING_MM * np.sqrt((slope**2).sum(axis=0))
    plain = (ndimage.binary_erosion(brain, border_value=1) & ~enhancing & (above > darkest)).astype(np.float32)
    explained = rest + (slope * known).sum(axis=0)
    pairs = [(a, b) for a in range(3) for b in range(a, 3)]
    products = [plain * slope[a] * slope[b] for a, b in pairs] + [plain * slope[a] * explained for a in range(3)]
    means, blocks = block_means(products, spacing_mm, sigma_mm)
    normal = np.empty((*means[0].shape, 3, 3), np.float32)
    for (a, b), mean in zip(pairs, means, strict=False):
        normal[..., a, b] = normal[..., b, a] = mean
    moving = [axis for axis in range(3) if rest.shape[axis] > 1]
    noise = np.mean(_slopes(rest, spacing_mm)[moving][:, plain > 0] ** 2) if plain.any() else 0.0
    ridge = _RIDGE * float(np.mean(np.trace(normal, axis1=-2, axis2=-1))) + float(noise) + 1e-6
    right = np.stack(means[len(pairs) :], axis=-1)[..., None]
    shift = np.linalg.solve(normal + ridge * np.eye(3, dtype=np.float32), right)[..., 0]
    return np.stack([expand(shift[..., axis], blocks, rest.shape) for axis in range(3)])
