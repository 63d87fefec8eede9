"""Where the brain is in a T1 volume.

Hides the atlas (ICBM 152, see atlas/NOTICE) and the search that brings it to a patient: skull-stripped, defaced and
full-head volumes in any orientation are tried from several starts, and the affine transform with the best Mattes mutual
information wins. Deterministic: every random choice is seeded. Must never say "found" for a volume that holds no brain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
import SimpleITK as sitk

from models.volume import Array, Mask, Volume

SEED = 20240306
MARGIN_MM = 15.0  # of the metric's region around the atlas brain, as in the paper
_MIN_BRAIN_ML, _MAX_BRAIN_ML = 500.0, 2600.0


class NoBrainError(ValueError):
    """The volume does not look like a head: the detail says which check failed."""


@dataclass(frozen=True)
class Atlas:
    """ICBM 152 2009a on its 1 mm grid: T1 average and tissue fractions, each (k, j, i) in 0..1."""

    t1: Volume
    grey: Volume
    white: Volume

    @property
    def intracranial(self) -> Mask:
        """Where the template has signal: brain and the CSF around it."""
        inside: Mask = self.t1.voxels > 0.02
        return inside


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Read the bundled template."""
    with as_file(files("models") / "atlas" / "icbm152.npz") as path, np.load(path) as data:
        affine = data["affine"]
        maps = {n: Volume(data[n].astype(np.float32) / (2**bits - 1), affine) for n, bits in _BITS.items()}
    return Atlas(maps["t1"], maps["gm"], maps["wm"])


_BITS = {"t1": 6, "gm": 5, "wm": 5}


def find_brain(head: Volume) -> Mask:
    """The intracranial region of a T1 volume.

    Args:
        head: T1-weighted volume, any intensity unit, any orientation.

    Returns:
        Mask (k, j, i) on the grid of `head`.

    Raises:
        NoBrainError: nothing of a plausible volume and position was found.
    """
    coarse = _at_spacing(head, 4.0)
    foreground = coarse.voxels > _background_level(coarse.voxels)
    if foreground.sum() * 0.064 < _MIN_BRAIN_ML:
        raise NoBrainError("the image holds less tissue than a brain")
    moving = coarse.with_voxels(_compress(coarse.voxels))
    stripped = _is_stripped(foreground)
    with one_thread():
        transform = _search(moving.to_sitk(), _starts(coarse, foreground), stripped=stripped)
    mask = _atlas_mask_on(head, transform)
    if stripped:
        mask = _tissue_near(mask, head)
    volume_ml = float(mask.sum()) * abs(float(np.linalg.det(head.affine[:3, :3]))) / 1000
    if not _MIN_BRAIN_ML <= volume_ml <= _MAX_BRAIN_ML:
        raise NoBrainError(f"the region found has {volume_ml:.0f} mL")
    return mask


@contextmanager
def one_thread() -> Iterator[None]:
    """ITK sums in a fixed order: the same transform, to the last bit, on every run; the setting is restored."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _background_level(voxels: Array) -> float:
    """Half of what separates the two halves of the histogram (Otsu) tells tissue from air, also after defacing."""
    positive = voxels[voxels > 0]
    if positive.size == 0:
        raise NoBrainError("the image is empty")
    image = sitk.GetImageFromArray(np.minimum(positive, np.quantile(positive, 0.99))[None, None, :])
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(image)
    return 0.5 * float(otsu.GetThreshold())


def _compress(voxels: Array) -> Array:
    return np.clip(voxels / np.quantile(voxels[voxels > 0], 0.98), 0, 1).astype(np.float32)


def _is_stripped(foreground: Mask) -> bool:
    """A skull-stripped head fills less than a head: its foreground is the brain itself."""
    return float(foreground.sum()) * 0.064 < 2500.0


def _at_spacing(volume: Volume, spacing_mm: float) -> Volume:
    """Average to about `spacing_mm` along each axis that is finer."""
    image = volume.to_sitk()
    shrink = [max(1, round(spacing_mm / s)) for s in volume.spacing_mm]
    smooth = sitk.BinShrink(image, shrink)
    size = [max(8, round(n * s / spacing_mm)) for n, s in zip(smooth.GetSize(), smooth.GetSpacing(), strict=True)]
    grid = sitk.Image(size, sitk.sitkFloat32)
    spacing = [n * s / m for n, s, m in zip(smooth.GetSize(), smooth.GetSpacing(), size, strict=True)]
    grid.SetSpacing(spacing)
    direction = np.array(smooth.GetDirection()).reshape(3, 3)
    corner = np.array(smooth.GetOrigin()) - direction @ (np.array(smooth.GetSpacing()) / 2)
    grid.SetOrigin((corner + direction @ (np.array(spacing) / 2)).tolist())
    grid.SetDirection(smooth.GetDirection())
    return Volume.from_sitk(sitk.Resample(smooth, grid, sitk.Transform(), sitk.sitkLinear, 0.0))


def _starts(coarse: Volume, foreground: Mask) -> list[np.ndarray]:
    """Centres (LPS mm) at which the atlas brain is tried: the middle of the tissue, and points below the vertex."""
    k, j, i = np.nonzero(foreground)
    points = (coarse.affine @ np.stack([i, j, k, np.ones_like(i)]))[:3]
    middle = points.mean(axis=1)
    vertex = np.quantile(points[2], 0.999)
    below = [np.array([middle[0], middle[1], vertex - depth]) for depth in (70.0, 85.0)]
    back = points[:, points[2] > vertex - 100].mean(axis=1)
    return [middle, *below, np.array([back[0], back[1], vertex - 85.0])]


def _tissue_near(mask: Mask, head: Volume) -> Mask:
    """The tissue itself, holes closed, within 10 mm of the atlas mask: in a stripped volume that is the brain."""
    radius = [max(1, round(10 / s)) for s in head.spacing_mm]
    near = sitk.BinaryDilate(_binary(mask), radius)
    smooth = sitk.DiscreteGaussian(sitk.GetImageFromArray(head.voxels), [1.0, 1.0, 1.0])
    tissue = sitk.Cast(smooth > _background_level(head.voxels), sitk.sitkUInt8)
    closed = sitk.BinaryMorphologicalClosing(sitk.And(tissue, near), [max(1, round(4 / s)) for s in head.spacing_mm])
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(closed)) == 1
    whole: Mask = sitk.GetArrayFromImage(sitk.BinaryFillhole(largest)) > 0
    return whole


def _binary(mask: Mask) -> sitk.Image:
    return sitk.GetImageFromArray(mask.astype(np.uint8))


def _registration(mask: sitk.Image, sampling: float) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(sampling, SEED)
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerScalesFromPhysicalShift()
    return method


@lru_cache(maxsize=4)
def _template(spacing_mm: float, stripped: bool) -> tuple[sitk.Image, sitk.Image]:
    """The atlas at `spacing_mm`, and the region in which it is compared (brain plus margin).

    The template has no skull. For a full head it is given one (dark for 7 mm, then bright scalp): without it the brain
    grows into the scalp.
    """
    coarse = _at_spacing(load_atlas().t1, spacing_mm).to_sitk()
    reach = [round(MARGIN_MM / spacing_mm)] * 3
    padded = sitk.ConstantPad(coarse, reach, reach, 0.0)
    brain = sitk.Cast(padded > 0.05, sitk.sitkUInt8)
    if not stripped:
        distance = sitk.SignedMaurerDistanceMap(brain, squaredDistance=False, useImageSpacing=True)
        scalp = sitk.Cast(sitk.And(distance > 7.0, distance < 14.0), sitk.sitkFloat32)
        padded = sitk.Maximum(padded, scalp)
    return padded, sitk.BinaryDilate(brain, reach)


def _search(moving: sitk.Image, starts: list[np.ndarray], *, stripped: bool) -> sitk.Transform:
    """Coarse similarity search from every start, then an affine refinement of the best."""
    fixed, mask = _template(6.0, stripped)
    atlas_middle = np.array(fixed.TransformContinuousIndexToPhysicalPoint([n / 2 for n in fixed.GetSize()]))
    tried = []
    for start in starts:
        guess = sitk.Similarity3DTransform(
            1.0, (0.0, 0.0, 0.0, 1.0), (start - atlas_middle).tolist(), atlas_middle.tolist()
        )
        tried.append(_refine(fixed, mask, moving, guess, sampling=0.3, step=4.0))
    best = min(tried, key=lambda pair: pair[0])[1]
    affine = sitk.AffineTransform(3)
    similarity = sitk.Similarity3DTransform(best)
    affine.SetCenter(similarity.GetCenter())
    affine.SetMatrix(similarity.GetMatrix())
    affine.SetTranslation(similarity.GetTranslation())
    fixed, mask = _template(4.0, stripped)
    return _refine(fixed, mask, moving, affine, sampling=0.5, step=2.0)[1]


def _refine(
    fixed: sitk.Image, mask: sitk.Image, moving: sitk.Image, guess: sitk.Transform, *, sampling: float, step: float
) -> tuple[float, sitk.Transform]:
    method = _registration(mask, sampling)
    method.SetOptimizerAsRegularStepGradientDescent(step, 0.02, 120, relaxationFactor=0.6)
    method.SetInitialTransform(guess, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError:  # ITK: all samples map outside the moving image
        return float("inf"), guess
    return float(method.GetMetricValue()), guess


def _atlas_mask_on(head: Volume, atlas_to_head: sitk.Transform) -> Mask:
    """The atlas' intracranial region carried to the grid of `head`."""
    atlas = load_atlas()
    inside = atlas.t1.with_voxels(atlas.intracranial.astype(np.float32)).to_sitk()
    carried = sitk.Resample(inside, head.to_sitk(), atlas_to_head.GetInverse(), sitk.sitkLinear, 0.0)
    mask: Mask = sitk.GetArrayFromImage(carried) > 0.5
    return mask
