"""How a head is imaged before and after contrast, and what a scan adds to the ideal image.

Hides the image formation: the signal of each tissue under transmit and receive fields, the point spread, Gibbs ringing,
noise, gain, residual misalignment, skull stripping and defacing. The truth passes through the same point spread: it is
what the same scan of the standard dose would show without noise. Must never leave a structure that enhances only in one
of low dose and truth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import fft, ndimage

from models.simulation.anatomy import Anatomy
from models.simulation.physics import Tissue, draw_tissue, magnitude, signal, smooth_field
from models.simulation.scenario import Scenario, draw_flow, draw_relaxivity, draw_uptake
from models.volume import Array, Mask

B1_RANGE, B1_NODES = (0.7, 1.3), 61  # transmit field, 1 = nominal (which is a node)
PSF_VOXELS = (0.3, 0.6)  # standard deviation of the point spread
INTERPOLATED, INTERPOLATED_VOXELS = 0.4, (0.6, 1.3)  # share of studies with an axis on a finer grid, its point spread
CURVE_NODES = 320  # of concentration
TRANSMIT_MEAN, TRANSMIT_SPREAD = (0.9, 1.05), (0.02, 0.1)  # of the flip angle's scale
RECEIVE_SPREAD = (0.0, 0.15)  # of the logarithm of the receive coil's gain


@dataclass(frozen=True)
class Images:
    """The images of a study, (k, j, i), white matter of the noise-free pre-contrast image = 1."""

    pre: Array
    low: Array
    enhancement: Array  # the truth: contrast enhancement of the standard dose without noise
    standard: Array | None = None


def scan(anatomy: Anatomy, scenario: Scenario, rng: np.random.Generator, *, whole: bool, standard: bool) -> Images:
    """Image a head before contrast and at the low dose.

    Args:
        anatomy: the head.
        scenario: how it is imaged.
        rng: everything random follows from it.
        whole: at the nominal flip angle, neither ringing nor interpolated nor defaced.
        standard: acquire the standard dose, too; nothing else changes.
    """
    ideal, spread = _ideal_images(anatomy, scenario, rng, whole=whole)
    low = depart(ideal[0.0], ideal[scenario.dose_fraction], ideal[1.0], scenario.dose_fraction, rng)
    after = [low, ideal[1.0]] if standard else [low]
    (pre, low, *more), kept = _acquire(ideal[0.0], after, anatomy.brain, scenario, rng, spread=spread, whole=whole)
    enhancement = (np.abs(ideal[1.0]) - np.abs(ideal[0.0])) * kept
    return Images(pre, low, enhancement.astype(np.float32), *more)


def _ideal_images(
    anatomy: Anatomy, scenario: Scenario, rng: np.random.Generator, *, whole: bool
) -> tuple[dict[float, Array], Array]:
    """Noise-free signed images by dose fraction (none, low, standard), and their point spread (3,) in voxels."""
    ideal = {dose: np.zeros(anatomy.brain.shape, np.float32) for dose in (0.0, scenario.dose_fraction, 1.0)}
    r1, uptake = draw_relaxivity(scenario, rng), draw_uptake(scenario, rng)
    b1 = np.ones(anatomy.brain.shape, np.float32) if whole else _transmit_field(anatomy.brain.shape, rng)
    flow = draw_flow(scenario.sequence, rng)
    for name, fraction in anatomy.fractions.items():
        tissue = draw_tissue(name, scenario.field_strength_t, rng)
        if name == "blood":
            tissue = replace(tissue, pd=tissue.pd * flow)
        texture = 1 + smooth_field(fraction.shape, rng.uniform(2, 8), rng.uniform(0.01, 0.04), rng)
        amount, concentration = fraction * texture, anatomy.concentration.get(name)
        for dose in ideal:
            ideal[dose] += amount * _tissue_signal(tissue, scenario, concentration, dose * uptake, r1=r1, b1=b1)
    spread = _point_spread(rng, interpolated=0.0 if whole else INTERPOLATED)
    if whole:
        ideal = {dose: ndimage.gaussian_filter(image, spread) for dose, image in ideal.items()}
    else:
        window = _spectral_window(anatomy.brain.shape, spread, rng)
        ideal = {dose: fft.irfftn(fft.rfftn(image) * window, image.shape) for dose, image in ideal.items()}
    level = float(np.quantile(ideal[0.0][anatomy.brain], 0.9)) if anatomy.brain.sum() > 100 else 1.0
    bias = np.exp(smooth_field(anatomy.brain.shape, 40, rng.uniform(*RECEIVE_SPREAD), rng))
    ideal = {dose: (image * bias / level).astype(np.float32) for dose, image in ideal.items()}
    return ideal, spread


def depart(before: Array, low: Array, full: Array, dose_fraction: float, rng: np.random.Generator) -> Array:
    """The low-dose image somewhere between the signal equations and enhancement in proportion to dose.

    How much a scanner's signal saturates follows from the equations only in part: the order of k-space, slice profile,
    inflow, water exchange and the vendor's filters are not in the header (ADR 14). Of the signed signal: across a null
    its magnitude is not in proportion.
    """
    proportional = before + np.float32(dose_fraction) * (full - before)
    return (low + np.float32(rng.uniform()) * (proportional - low)).astype(np.float32)


def _transmit_field(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Smooth transmit field (k, j, i) of a block, as a scale of the flip angle."""
    field = 1 + smooth_field(shape, 45, rng.uniform(*TRANSMIT_SPREAD), rng)
    return np.clip(field * rng.uniform(*TRANSMIT_MEAN), *B1_RANGE).astype(np.float32)


def _point_spread(rng: np.random.Generator, *, interpolated: float) -> Array:
    """Standard deviation (3,) in voxels along k, j, i.

    Scanners and software often interpolate one axis, mostly across the slices, to a finer grid than was measured: that
    of a share `interpolated` of the studies.
    """
    spread = np.full(3, rng.uniform(*PSF_VOXELS))
    if rng.uniform() < interpolated:
        spread[rng.integers(3)] = rng.uniform(*INTERPOLATED_VOXELS)
    return spread


def _spectral_window(shape: tuple[int, ...], spread: Array, rng: np.random.Generator) -> Array:
    """What a scanner keeps of k-space, for `rfftn`: a soft window, and in half of the studies a hard end (Gibbs).

    The truth passes through the same window: it is what the same scan of the standard dose would show without noise.
    """
    whole_band = np.full(3, 1.0)  # cycles per voxel; 0.5 is all there is
    ends = rng.uniform(0.35, 0.5, 3) if rng.uniform() < 0.5 else whole_band
    axes = [fft.fftfreq(n) for n in shape[:2]] + [fft.rfftfreq(shape[2])]
    k, j, i = (
        (np.exp(-2 * (np.pi * width * f) ** 2) * (np.abs(f) <= end)).astype(np.float32)
        for f, end, width in zip(axes, ends, spread, strict=True)
    )
    window: Array = k[:, None, None] * j[None, :, None] * i[None, None, :]
    return window


def _tissue_signal(
    tissue: Tissue, scenario: Scenario, concentration: Array | None, scale: float, *, r1: float, b1: Array
) -> Array:
    """Signal by linear interpolation over transmit field and concentration, to 1e-4 of the receiver's M0."""
    fields = np.linspace(*B1_RANGE, B1_NODES)
    at = (b1 - B1_RANGE[0]) * ((B1_NODES - 1) / (B1_RANGE[1] - B1_RANGE[0]))
    if concentration is None:
        curve = [signal(tissue, scenario.sequence, np.zeros(1), r1, float(field))[0] for field in fields]
        return np.interp(at, np.arange(B1_NODES), curve).astype(np.float32)
    top = float(concentration.max()) * scale + 1e-6
    grid = np.linspace(0, top, CURVE_NODES)
    table = np.stack([signal(tissue, scenario.sequence, grid, r1, float(field)) for field in fields])
    places = np.stack([at, concentration * np.float32(scale * (CURVE_NODES - 1) / top)])
    return ndimage.map_coordinates(table.astype(np.float32), places, order=1, mode="nearest")


def _defaced(brain: Mask, rng: np.random.Generator) -> Mask:
    """What software that removes faces leaves: the brain with some margin, and one half of what is around it."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in brain.shape), indexing="ij")
    normal = rng.standard_normal(3)
    plane = sum(n * axis for n, axis in zip(normal / np.linalg.norm(normal), axes, strict=True))
    kept: Mask = (plane > rng.uniform(-0.4, 0.2)) | ndimage.binary_dilation(brain, iterations=4)
    return kept


def _acquire(
    pre: Array,
    after: list[Array],
    brain: Mask,
    scenario: Scenario,
    rng: np.random.Generator,
    *,
    spread: Array,
    whole: bool,
) -> tuple[list[Array], Mask]:
    """Noise on every image; on those after contrast a gain and a residual misalignment, too, each with its own.

    What is drawn for the first two does not depend on whether there are more.

    Returns:
        The images, and what stripping and defacing left of the head: nothing enhances where nothing is.
    """
    shape = pre.shape
    drift = _drift(shape, rng)
    g_map = np.clip(1 + smooth_field(shape, 30, rng.uniform(0, 0.25), rng), 0.6, 2.5)
    blur = np.full(3, rng.uniform(0, 0.6))
    if rng.uniform() < 0.6:  # noise was there when an axis was interpolated, and not added later
        blur = np.where(spread > PSF_VOXELS[1], spread, blur)
    if scenario.stripped:
        pre = pre * brain
    moved = _placed(after[0], brain, scenario, rng)
    first = magnitude(pre, scenario.sigma, blur, g_map, rng)
    second = _received(moved, scenario.sigma, blur, g_map, rng)
    keep = np.ones(shape, bool)
    if scenario.stripped and rng.uniform() < 0.6:  # otherwise noise is left around the brain
        keep = ndimage.binary_dilation(np.abs(pre) > 0.02)
    elif not whole and not scenario.stripped and rng.uniform() < 0.15:
        keep = _defaced(brain, rng)
    images = [first * keep, (second * keep * drift).astype(np.float32)]
    for image, own in zip(after[1:], rng.spawn(len(after) - 1), strict=True):
        gain = _drift(shape, own)
        received = _received(_placed(image, brain, scenario, own), scenario.sigma, blur, g_map, own)
        images.append((received * keep * gain).astype(np.float32))
    return images, brain if scenario.stripped else keep


def _drift(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Gain of a later image over the first, nearly even."""
    return np.asarray(np.exp(smooth_field(shape, 45, rng.uniform(0, 0.02), rng)) * rng.uniform(0.85, 1.2))


def _placed(image: Array, brain: Mask, scenario: Scenario, rng: np.random.Generator) -> Array:
    """A later image as registration leaves it."""
    return _misalign(_cut_elsewhere(image, brain, rng) if scenario.stripped else image, scenario, rng)


def _received(image: Array, sigma: float, blur: Array, g_map: Array, rng: np.random.Generator) -> Array:
    """A later image with noise, which registration may have interpolated; the image itself is left to `_misalign`."""
    received = magnitude(image, sigma, blur, g_map, rng)
    if rng.uniform() < 0.7:
        ideal = np.abs(image)
        noise = ndimage.shift(received - ideal, rng.uniform(-0.5, 0.5, 3), order=3, mode="nearest")
        received = np.maximum(ideal + noise, 0)
    return received


def _cut_elsewhere(image: Array, brain: Mask, rng: np.random.Generator) -> Array:
    """The image cut to the brain on another grid, then brought to this one: interpolation rings at the cut."""
    apart = rng.uniform(-0.5, 0.5, 3)
    there = ndimage.shift(image, apart, order=3, mode="nearest")
    there *= ndimage.shift(brain.astype(np.float32), apart, order=1, mode="nearest") > 0.5
    return ndimage.shift(there, -apart, order=3, mode="nearest")


def _misalign(image: Array, scenario: Scenario, rng: np.random.Generator) -> Array:
    """Residual rigid error (0.05 to 0.3 mm, rarely 1 mm) and local non-rigid motion of up to 0.3 mm.

    As if all of it were motion: it moves the signed signal, where registration would interpolate its magnitude.
    """
    shape = image.shape
    size = 1.0 if rng.uniform() < 0.05 else rng.uniform(0.05, 0.3)
    spacing = scenario.spacing_mm[::-1]
    at = np.indices(shape, dtype=np.float32)
    for axis in range(3):
        local = smooth_field(shape, 15, rng.uniform(0, 0.15), rng)
        at[axis] += (rng.normal(0, size) + local) / spacing[axis]
    return ndimage.map_coordinates(image, at, order=3, mode="nearest").astype(np.float32)
