"""How the atlas lies in a head: place, rotation and a scale along each of its axes.

Hides the comparison and the search. The comparison is the correlation of the template with the tone of the head, over
the brain and the dark rim around it: outside any brain come CSF, then bone or air; and fat, brighter than brain, counts
as dark. So one template serves skull-stripped, defaced and full heads. The search tries every place at a few scales and
rotations (correlation by Fourier transform), then improves the best by least squares. Nothing is random. Must never
shear, nor scale beyond `SCALE_LIMITS`: a wrong place shows as a bad correlation and is not fitted away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import as_file, files
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import fft, ndimage
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from models.volume import Array, Mask, Volume

RIM_MM = 6.0  # around the atlas brain: CSF, dura and bone of any head
SCALE_LIMITS = (0.74, 1.28)  # of one axis, atlas = 1: from a child of two years to beyond the largest adult
FAT = (1.6, 2.4)  # tissue brighter than this times the typical brain fades to dark

Numbers = npt.NDArray[np.float64]


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

    @cached_property
    def centre_mm(self) -> Numbers:
        """Of the intracranial region (LPS)."""
        middle = np.argwhere(self.intracranial).mean(axis=0)[::-1]
        centre: Numbers = (self.t1.affine @ np.append(middle, 1.0))[:3]
        return centre


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Read the bundled template."""
    with as_file(files("models") / "atlas" / "icbm152.npz") as path, np.load(path) as data:
        affine = data["affine"]
        maps = {n: Volume(data[n].astype(np.float32) / (2**bits - 1), affine) for n, bits in _BITS.items()}
    return Atlas(maps["t1"], maps["gm"], maps["wm"])


_EDGE = 0.05  # of the brain in a coarse template
_BITS = {"t1": 6, "gm": 5, "wm": 5}


@dataclass(frozen=True)
class Pose:
    """A place of the atlas in a head, and how well it fits there."""

    shift_mm: Numbers  # of the atlas' centre (LPS)
    rotation: Numbers  # vector, rad
    scale: Numbers  # along the atlas' axes
    misfit: float  # what was minimised: 1 - correlation^2, and the prior on the scales
    correlation: float  # over brain and rim
    structure: float = (
        0.0  # correlation deep in the brain alone, after smooth shading: ventricles, white and grey matter
    )
    coverage: float = 1.0  # share of brain and rim inside the image

    @property
    def transform(self) -> sitk.AffineTransform:
        """From atlas to head (LPS mm)."""
        affine = sitk.AffineTransform(3)
        affine.SetCenter(load_atlas().centre_mm.tolist())
        affine.SetMatrix((Rotation.from_rotvec(self.rotation).as_matrix() * self.scale).ravel().tolist())
        affine.SetTranslation(self.shift_mm.tolist())
        return affine


def at_spacing(volume: Volume, spacing_mm: float) -> Volume:
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


def tone(head: Volume, typical: float) -> Volume:
    """Intensity without a unit: air 0, typical brain 0.5, and what is much brighter (fat) dark again."""
    relative = np.maximum(head.voxels, 0) / np.float32(typical)
    low, high = FAT
    fading = np.interp(relative, [low, high], [low / (low + 1), 0.2])
    return head.with_voxels(np.where(relative > low, fading, relative / (relative + 1)))


def locate(head: Volume, typical: float) -> Pose | None:
    """The best place of the atlas in a head; None where nothing looks like it at all.

    Args:
        head: T1-weighted volume in its own units.
        typical: intensity of typical tissue in it; the end uses the brain's own, measured at the place found.
    """
    known = _known(head.voxels)
    rough, middle, fine = (_toned(head, known, typical, spacing) for spacing in (8.0, 6.0, 4.0))
    similar = [_improve(middle, pose, 8.0, steps=8, one_scale=True) for pose in _places(rough)]
    better = [_improve(fine, pose, 5.0, steps=8) for pose in _distinct(similar, 10.0, 0.15)[:_REFINED]]
    if not better:
        return None
    best = min(better, key=lambda pose: pose.misfit)
    return _improve(_toned(head, known, _level_at(best, fine, typical), 4.0), best, 5.0, steps=30)


class _Toned(NamedTuple):
    """A head's tone on a coarse grid, and 1 where most of a voxel is known (k, j, i)."""

    volume: Volume
    known: Array


def _known(voxels: Array) -> Mask | None:
    """Where the image is known: exact zeros amid noisy air were removed (a face) or never measured (padding).

    None where all of it is: without noise in the air, as in most skull-stripped volumes, zeros are the air itself.
    """
    zero = voxels == 0
    air = voxels < 0.1 * np.quantile(voxels, 0.98)
    noisy = air.sum() - zero.sum() > 0.3 * air.sum()
    return ~zero if noisy and zero.any() else None


def _toned(head: Volume, known: Mask | None, typical: float, spacing_mm: float) -> _Toned:
    toned = at_spacing(tone(head, typical), spacing_mm)
    if known is None:
        return _Toned(toned, np.ones_like(toned.voxels))
    share = at_spacing(head.with_voxels(known.astype(np.float32)), spacing_mm).voxels
    return _Toned(
        toned.with_voxels(np.asarray(toned.voxels / np.maximum(share, 0.5), np.float32)),
        (share > 0.5).astype(np.float32),
    )


def _level_at(pose: Pose, toned: _Toned, typical: float) -> float:
    """Median intensity in the atlas brain at a place, from the tone (0.5 is `typical`)."""
    value = float(np.clip(_Fit(toned, 5.0).median(pose), 0.3, 0.6))  # within what the tone of brain can be
    return typical * value / (1 - value)


@lru_cache(maxsize=4)
def _template(spacing_mm: float) -> tuple[Volume, Volume]:
    """The tone of the atlas, and 1 over brain and rim, with room for the rim."""
    coarse = at_spacing(load_atlas().t1, spacing_mm).to_sitk()
    reach = [int(np.ceil(20.0 / spacing_mm))] * 3
    padded = sitk.ConstantPad(coarse, reach, reach, 0.0)
    brain = sitk.Cast(padded > _EDGE, sitk.sitkUInt8)
    near = sitk.SignedMaurerDistanceMap(brain, squaredDistance=False, useImageSpacing=True) < RIM_MM
    volume = Volume.from_sitk(padded)
    typical = float(np.median(volume.voxels[volume.voxels > _EDGE]))
    return tone(volume, typical), Volume.from_sitk(sitk.Cast(near, sitk.sitkFloat32))


_SCALES = (0.8, 0.9, 1.0, 1.12)
_TURNS_DEG = ((0, 0, 0), (-20, 0, 0), (20, 0, 0), (0, -18, 0), (0, 18, 0), (0, 0, -18), (0, 0, 18))
_STARTS, _REFINED = 8, 5


def _places(rough: _Toned) -> list[Pose]:
    """The best distinct places among all positions on a coarse grid, at a few scales and rotations."""
    found = []
    correlate = _Correlator(rough)
    for scale, turn in product(_SCALES, _TURNS_DEG):
        found += correlate.peaks(scale, Rotation.from_euler("xyz", turn, degrees=True).as_rotvec())
    return _distinct(found, 20.0, np.inf)[:_STARTS]


def _distinct(poses: list[Pose], apart_mm: float, apart_rad: float) -> list[Pose]:
    """Best first, each apart in place, in rotation or by 4 % in scale from all before it."""
    kept: list[Pose] = []
    for pose in sorted(poses, key=lambda pose: pose.misfit):
        if all(
            np.linalg.norm(pose.shift_mm - other.shift_mm) > apart_mm
            or abs(np.log(pose.scale / other.scale)).max() > 0.04
            or np.linalg.norm(pose.rotation - other.rotation) > apart_rad
            for other in kept
        ):
            kept.append(pose)
    return kept


class _Correlator:
    """Correlation of the template with a head at every position, over what of brain and rim is known of it."""

    def __init__(self, head: _Toned) -> None:
        volume, known = head
        self._volume = volume
        self._spacing = np.array(volume.spacing_mm)
        self._half = np.ceil(125.0 / self._spacing).astype(int)  # (i, j, k): the largest template has this radius
        side = 2 * self._half[::-1] + 1
        self._shape = [fft.next_fast_len(int(n), real=True) for n in np.array(volume.voxels.shape) + side]
        self._inside, self._first, self._second = (
            fft.rfftn(array * known, self._shape) for array in (1.0, volume.voxels, volume.voxels**2)
        )
        affine = volume.affine.copy()
        affine[:3, 3] = -affine[:3, :3] @ self._half
        self._window = Volume(np.zeros(tuple(side), np.float32), affine).to_sitk()  # centred on the origin

    def peaks(self, scale: float, rotation: Numbers) -> list[Pose]:
        """The three best positions."""
        values = self._correlation(scale, rotation)
        top = (values == ndimage.maximum_filter(values, 5, mode="wrap")) & (values > 0)
        where = np.argwhere(top)[np.argsort(-values[top], kind="stable")[:3]]
        return [self._pose(index, float(values[tuple(index)]), scale, rotation) for index in where]

    def _pose(self, index: npt.NDArray[np.int_], value: float, scale: float, rotation: Numbers) -> Pose:
        corner = np.where(index >= self._volume.voxels.shape, index - self._shape, index)  # of the window
        centre = (self._volume.affine @ np.append(corner[::-1] + self._half, 1.0))[:3]
        return Pose(centre - load_atlas().centre_mm, rotation, np.full(3, scale), 1 - value**2, value)

    def _correlation(self, scale: float, rotation: Numbers) -> Array:
        """Padfield, Masked object registration in the Fourier domain (IEEE TIP 2012), with a mask of the template."""
        to_atlas = sitk.AffineTransform(3)
        to_atlas.SetMatrix((Rotation.from_rotvec(rotation).as_matrix().T / scale).ravel().tolist())
        to_atlas.SetTranslation(load_atlas().centre_mm.tolist())
        values, region = (
            sitk.GetArrayFromImage(sitk.Resample(v.to_sitk(), self._window, to_atlas, sitk.sitkLinear, 0.0))
            for v in _template(4.0)
        )
        weight, first, second = (
            np.conj(fft.rfftn(array, self._shape)) for array in (region, values * region, values**2 * region)
        )
        count, mine, mine2, its, its2, both = (
            fft.irfftn(product, self._shape)
            for product in (
                self._inside * weight, self._first * weight, self._second * weight,
                self._inside * first, self._inside * second, self._first * first,
            )
        )  # fmt: skip
        covered = count > 0.5 * region.sum()
        count = np.maximum(count, 1.0)
        spread = np.maximum(mine2 - mine**2 / count, 1e-3 * count) * np.maximum(its2 - its**2 / count, 1e-3 * count)
        correlation: Array = np.where(covered, (both - mine * its / count) / np.sqrt(spread), -1.0)
        return correlation


def _improve(image: _Toned, pose: Pose, spacing_mm: float, *, steps: int, one_scale: bool = False) -> Pose:
    """Least squares from a pose; `spacing_mm` is that of the points compared."""
    fit = _Fit(image, spacing_mm)
    start = np.concatenate([pose.shift_mm / 100, pose.rotation, np.log(pose.scale)[: 1 if one_scale else 3]])
    limits = np.log(SCALE_LIMITS)
    low = np.concatenate([np.full(3, -np.inf), np.full(3, -1.2), np.full(len(start) - 6, limits[0])])
    high = np.concatenate([np.full(3, np.inf), np.full(3, 1.2), np.full(len(start) - 6, limits[1])])
    start = np.clip(start, low + 1e-3, high - 1e-3)
    found = least_squares(
        fit.residuals, start, fit.jacobian, bounds=(low, high), max_nfev=steps, xtol=1e-4, ftol=1e-4, gtol=1e-6
    )
    return fit.pose(found.x, float(2 * found.cost))


_UNEQUAL, _UNUSUAL = 0.3, 0.05  # weight of scales that differ, and of their mean's distance from 1 (log)


def _three(parameters: Numbers) -> Numbers:
    """Log scales of the three axes."""
    scales: Numbers = np.broadcast_to(parameters[6:], 3) if len(parameters) == 7 else parameters[6:]
    return scales


def _cosine(one: Numbers, other: Numbers) -> float:
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-9))


class _Fit:
    """Residuals of the template after the best linear function of the head's tone, for `least_squares`.

    Parameters: shift (3, in 100 mm), rotation vector (3, rad), log scale (1 or 3).
    """

    def __init__(self, head: _Toned, spacing_mm: float) -> None:
        image, self._known = head
        template, region = _template(spacing_mm)
        inside = region.voxels > 0.5
        self._deep = ndimage.binary_erosion(template.voxels > _EDGE)[inside]
        points = np.argwhere(inside)[:, ::-1]
        self._template = template.voxels[inside].astype(np.float64)
        self._centre = load_atlas().centre_mm[:, None]
        self._points = (template.affine[:3, :3] @ points.T + template.affine[:3, 3:]) - self._centre
        self._inverse = np.linalg.inv(image.affine)
        self._limit = np.array(image.voxels.shape[::-1])[:, None] - 0.5
        self._image = image.voxels
        self._slopes = np.gradient(image.voxels)[::-1]  # per voxel along i, j, k

    def residuals(self, parameters: Numbers) -> Numbers:
        """One per point, in units of the template's spread, then the prior."""
        template, mine, _ = self._compared(parameters)
        scales = _three(parameters)
        prior = np.append(_UNEQUAL * (scales - scales.mean()), _UNUSUAL * scales.mean())
        left = template - (mine @ template) / max(float(mine @ mine), 1e-9) * mine
        return np.concatenate([left / max(float(np.linalg.norm(template)), 1e-9), prior])

    def jacobian(self, parameters: Numbers) -> Numbers:
        """Variable projection (Kaufman, 1975): what the linear function takes up is projected out."""
        template, mine, used = self._compared(parameters)
        at = self._indices(parameters)
        slopes = np.stack([self._sample(slope, at) for slope in self._slopes]) * used
        slopes = self._inverse[:3, :3].T @ slopes  # per mm
        norm, spread = max(float(mine @ mine), 1e-9), max(float(np.linalg.norm(template)), 1e-9)
        columns = []
        for step in 1e-4 * np.eye(len(parameters)):
            moved = (self._places(parameters + step) - self._places(parameters - step)) / 2e-4
            change = np.einsum("an,an->n", slopes, moved)
            change = (change - change.sum() / max(used.sum(), 1)) * used
            columns.append(change - mine * float(mine @ change) / norm)
        rows = -float(mine @ template) / norm / spread * np.stack(columns, axis=1)
        return np.concatenate([rows, self._prior_rows(len(parameters))])

    def pose(self, parameters: Numbers, misfit: float) -> Pose:
        """What the parameters say, rounded well below what is visible, with how well it fits."""
        template, mine, used = self._compared(parameters)
        return Pose(
            shift_mm=np.round(parameters[:3] * 100, 3),
            rotation=np.round(parameters[3:6], 5),
            scale=np.round(np.exp(_three(parameters)), 5).astype(np.float64),
            misfit=misfit,
            correlation=_cosine(template, mine),
            structure=self._structure(template, mine, used > 0),
            coverage=float(used.mean()),
        )

    def median(self, pose: Pose) -> float:
        """Of the tone deep in the brain."""
        at = self._indices(np.concatenate([pose.shift_mm / 100, pose.rotation, np.log(pose.scale)]))
        return float(np.median(self._sample(self._image, at[:, self._deep])))

    def _structure(self, template: Numbers, mine: Numbers, used: Mask) -> float:
        """Partial correlation over deep points, given a quadratic function of place."""
        chosen = self._deep & used
        x, y, z = self._points[:, chosen] / 80
        shading = np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], axis=1)
        basis, _ = np.linalg.qr(shading)
        one, other = (values[chosen] - basis @ (basis.T @ values[chosen]) for values in (template, mine))
        return _cosine(one, other)

    def _compared(self, parameters: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Template and tone, each less its mean over the points inside the image and 0 elsewhere; which those are."""
        at = self._indices(parameters)
        inside = ((at > -0.5) & (at < self._limit)).all(axis=0) & (self._sample(self._known, at) > 0.5)
        used: Numbers = np.asarray(inside, np.float64)
        count = max(float(used.sum()), 1.0)
        mine = self._sample(self._image, at)
        return (
            (self._template - self._template @ used / count) * used,
            (mine - mine @ used / count) * used,
            used,
        )

    def _places(self, parameters: Numbers) -> Numbers:
        """Points of the head (3, n), mm."""
        matrix = Rotation.from_rotvec(parameters[3:6]).as_matrix() * np.exp(_three(parameters))
        places: Numbers = matrix @ self._points + 100 * parameters[:3, None] + self._centre
        return places

    def _indices(self, parameters: Numbers) -> Numbers:
        indices: Numbers = self._inverse[:3, :3] @ self._places(parameters) + self._inverse[:3, 3:]
        return indices

    @staticmethod
    def _sample(array: Array, at: Numbers) -> Numbers:
        return ndimage.map_coordinates(array, at[::-1], np.float64, order=1, mode="nearest")

    @staticmethod
    def _prior_rows(count: int) -> Numbers:
        rows = np.zeros((4, count))
        if count == 7:
            rows[3, 6] = _UNUSUAL
        else:
            rows[:3, 6:] = _UNEQUAL * (np.eye(3) - 1 / 3)
            rows[3, 6:] = _UNUSUAL / 3
        return rows
