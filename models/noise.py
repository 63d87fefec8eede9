"""How strong the noise of a subtraction is, where it is stronger, and how correlated.

Hides the estimates: what they leave out (structure, enhancement) and what they give back for it. Equations are those of
sections 2.3 and 2.4 of the paper's method (arXiv 2403.03539), with robust estimates in place of its one-sided ones.
Must never take enhancement for noise.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from models.statistics import robust_std, smooth
from models.volume import Array, Mask

NOISE_SIGMA_MM = 8.0  # of the neighbourhood (section 2.4: 16 voxels of .5 mm)
_TRUNCATED_AT = 2.0  # standard deviations: beyond is structure or enhancement (section 2.4)
_TRUNCATED_STD = 0.88  # that of a unit normal cut there: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = .8796
_PRIOR = 0.02  # weight of the expected deviation, over that of a neighbourhood full of brain. Chosen
_LEAST_SPREAD = 1.4826e-6  # white matter = 1: an image without noise has a share, too
_LEAST = 1e-4  # noise that is measured at least, white matter = 1: logarithms of it are taken


def high_pass_noise(image: Array, mask: Mask) -> float:
    """Robust standard deviation, in a mask, of an image less its 3x3x3 mean.

    Of white noise that difference has the variance 1 - 1/27, which is given back.
    """
    rest = image - ndimage.uniform_filter(image, 3)
    return max(robust_std(rest[mask]) / float(np.sqrt(1 - 1 / 27)), _LEAST)


def local_noise(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Array:
    """Local standard deviation of what is not enhancement."""
    sigma = robust_std(subtraction[brain]) + 1e-6
    return local_statistics(subtraction, brain, spacing_mm, sigma)[1]


def local_statistics(
    subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float], sigma: Array | float
) -> tuple[Array, Array]:
    """Local mean and standard deviation over |z| < 2 sigma; what cutting there takes is given back.

    With G a Gaussian and M = 1 there (section 2.4): mean = G(M z) / G(M), std^2 = G(M z^2) / G(M) - mean^2.

    Args:
        subtraction: (k, j, i), white matter = 1.
        brain: (k, j, i), where both are measured.
        spacing_mm: along i, j, k.
        sigma: expected standard deviation, one or (k, j, i); what is returned where there is no brain.
    """
    quiet = (brain & (np.abs(subtraction) < _TRUNCATED_AT * sigma)).astype(np.float32)
    weight, first, second = smooth([quiet, quiet * subtraction, quiet * subtraction**2], spacing_mm, NOISE_SIGMA_MM)
    prior = _PRIOR * float(weight.max()) + 1e-9
    mean = first / (weight + prior)
    square = (second + prior * (_TRUNCATED_STD * sigma) ** 2) / (weight + prior)
    std = np.sqrt(np.maximum(square - mean**2, 1e-8)) / _TRUNCATED_STD
    return mean, std.astype(np.float32)


def noise_left(subtraction: Array, brain: Mask) -> tuple[float, float, float]:
    """Robust standard deviation in the brain after each smoothing, over that before: tells the noise's correlation."""
    before, *after = (robust_std(image[brain]) + _LEAST_SPREAD for image in (subtraction, *smoothings(subtraction)))
    once, twice, wide = (min(1.0, spread / before) for spread in after)
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
