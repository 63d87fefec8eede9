"""Where the brain is in a T1 volume.

Hides how the place of the atlas (ICBM 152, see atlas/NOTICE) becomes a mask, and the checks that a place must pass:
skull-stripped, defaced and full-head volumes in any orientation. Deterministic. Must never say "found" for a volume
that holds no brain, nor return a mask in the wrong place: where a check fails, it says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from models.pose import Pose, at_spacing, load_atlas, locate
from models.volume import Array, Mask, Volume

_MIN_BRAIN_ML, _MAX_BRAIN_ML = 500.0, 2600.0
_STRIPPED = (
    0.1  # most tissue 8 to 16 mm outside the brain of a stripped volume; measured 0 there, 0.4 and more in heads
)


class NoBrainError(ValueError):
    """The volume does not look like a head: the detail says which check failed."""


@dataclass(frozen=True)
class PoseLimit:
    """The least a figure of the fit may be, and what a lower one means."""

    least: float
    meaning: str


POSE_LIMITS: dict[str, PoseLimit] = {
    "correlation": PoseLimit(
        0.60, "the image does not look like the atlas brain and its rim; measured .78 to .94 in the right place"
    ),
    "structure": PoseLimit(
        0.33, "the inside does not look like a brain; measured .45 to .77 in the right place, .26 at most elsewhere"
    ),
    "coverage": PoseLimit(0.50, "most of the brain lies outside the image"),
}  # fmt: skip


@dataclass(frozen=True)
class Brain:
    """The intracranial region (k, j, i) on the grid of the volume, and the place of the atlas that it comes from."""

    mask: Mask
    pose: Pose


def find_brain(head: Volume) -> Brain:
    """The intracranial region of a T1 volume.

    Args:
        head: T1-weighted volume, any intensity unit, any orientation.

    Raises:
        NoBrainError: nothing was found that passes every check.
    """
    coarse = at_spacing(head, 8.0)
    foreground = coarse.voxels > _background_level(coarse.voxels)
    if foreground.sum() * _voxel_ml(coarse) < _MIN_BRAIN_ML:
        raise NoBrainError("the image holds less tissue than a brain")
    typical = float(np.median(coarse.voxels[foreground]))
    pose = locate(head, typical)
    if pose is None:
        raise NoBrainError("nothing in the image looks like a brain")
    for name, limit in POSE_LIMITS.items():
        value = getattr(pose, name)
        if not value >= limit.least:
            raise NoBrainError(f"{name} is {value:.2f}: {limit.meaning}")
    mask = _atlas_mask_on(head, pose.transform)
    if _is_stripped(head, pose):
        mask = _tissue_near(mask, head)
    volume_ml = float(mask.sum()) * _voxel_ml(head)
    if not _MIN_BRAIN_ML <= volume_ml <= _MAX_BRAIN_ML:
        raise NoBrainError(f"the region found has {volume_ml:.0f} mL")
    return Brain(mask, pose)


def _voxel_ml(volume: Volume) -> float:
    return abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000


def _is_stripped(head: Volume, pose: Pose) -> bool:
    """Whether there is nothing but air around the brain."""
    coarse = at_spacing(head, 4.0)
    mask = _atlas_mask_on(coarse, pose.transform)
    distance = ndimage.distance_transform_edt(~mask, sampling=coarse.spacing_mm[::-1])
    around = coarse.voxels[(distance > 8) & (distance < 16)]
    return around.size == 0 or float((around > 0.2 * np.median(coarse.voxels[mask])).mean()) < _STRIPPED


def _background_level(voxels: Array) -> float:
    """Half of what separates the two halves of the histogram (Otsu) tells tissue from air, also after defacing."""
    positive = voxels[voxels > 0]
    if positive.size == 0:
        raise NoBrainError("the image is empty")
    image = sitk.GetImageFromArray(np.minimum(positive, np.quantile(positive, 0.99))[None, None, :])
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(image)
    return 0.5 * float(otsu.GetThreshold())


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


def _atlas_mask_on(head: Volume, atlas_to_head: sitk.Transform) -> Mask:
    """The atlas' intracranial region carried to the grid of `head`."""
    atlas = load_atlas()
    inside = atlas.t1.with_voxels(atlas.intracranial.astype(np.float32)).to_sitk()
    carried = sitk.Resample(inside, head.to_sitk(), atlas_to_head.GetInverse(), sitk.sitkLinear, 0.0)
    mask: Mask = sitk.GetArrayFromImage(carried) > 0.5
    return mask
