"""Statistics that several steps share: the unit of intensity, a robust standard deviation, means over a neighbourhood.

Hides that wide Gaussians are computed on means of blocks, which is far less work and as smooth. Must never hold what
only one step needs.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, stats

from models.volume import Array

SCALE_QUANTILE = 0.95  # of the brain, about white matter: the unit of every signal (arXiv 2403.03539)
# From where on a voxel counts as enhancing, white matter = 1. Chosen: about what 0.02 mM of gadobutrol add to a lesion
# at 3 T by the signal equations (.08 to .14, by sequence and tissue).
ENHANCING = 0.1
# Standard deviation of a normal distribution over its median absolute deviation. Rounded as it has always been: with
# SciPy's 1.482602 (scale="normal") single voxels change sides at a limit, and results of known UIDs change a little.
_NORMAL = 1.4826


def robust_std(values: Array) -> float:
    """The standard deviation that few outliers (enhancement, edges) do not change.

    The median absolute deviation from the median, over that of a normal distribution.
    """
    return _NORMAL * float(stats.median_abs_deviation(values, axis=None))


def smooth(arrays: list[Array], spacing_mm: tuple[float, float, float], sigma_mm: float) -> list[Array]:
    """Gaussian of `sigma_mm` computed on block means, carried back linearly."""
    means, blocks = block_means(arrays, spacing_mm, sigma_mm)
    return [expand(mean, blocks, arrays[0].shape) for mean in means]


def block_means(
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


def expand(means: Array, blocks: list[int], shape: tuple[int, ...]) -> Array:
    """Linear interpolation from block centres to voxels, one axis at a time."""
    for axis, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        at = np.clip((np.arange(size) - (block - 1) / 2) / block, 0, means.shape[axis] - 1)
        lower = np.minimum(at.astype(int), max(means.shape[axis] - 2, 0))
        upper = np.minimum(lower + 1, means.shape[axis] - 1)
        weight = (at - lower).reshape([-1 if a == axis else 1 for a in range(3)]).astype(np.float32)
        means = means.take(lower, axis) * (1 - weight) + means.take(upper, axis) * weight
    return means.astype(np.float32)
