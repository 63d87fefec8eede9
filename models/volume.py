"""A volume: voxels that never travel without their geometry.

Hides the order of axes. Everywhere in lowgad `voxels[k, j, i]` is slice, row, column, and `affine @ (i, j, k, 1)` is
the centre of that voxel in the patient coordinate system of DICOM (LPS, mm; PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Volume:
    """Voxels (k, j, i) float32 in any intensity unit, and the 4x4 affine from (i, j, k, 1) to LPS mm."""

    voxels: Array
    affine: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse what is not a volume.

        Raises:
            ValueError: the voxels are not three-dimensional or the affine is not an invertible 4x4 matrix.
        """
        if self.voxels.ndim != 3 or self.affine.shape != (4, 4):
            raise ValueError(f"a volume needs 3-D voxels and a 4x4 affine, not {self.voxels.shape} {self.affine.shape}")
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise ValueError("the affine is singular")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along i, j, k, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def with_voxels(self, voxels: Array) -> Volume:
        """The same grid with other voxels."""
        return Volume(np.ascontiguousarray(voxels, dtype=np.float32), self.affine)

    def to_sitk(self) -> sitk.Image:
        """As a SimpleITK image; ITK indexes (i, j, k) and its arrays are (k, j, i): nothing is transposed."""
        image = sitk.GetImageFromArray(np.ascontiguousarray(self.voxels, dtype=np.float32))
        spacing = np.array(self.spacing_mm)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(self.affine[:3, 3].tolist())
        image.SetDirection((self.affine[:3, :3] / spacing).ravel().tolist())
        return image

    @classmethod
    def from_sitk(cls, image: sitk.Image) -> Volume:
        """The inverse of `to_sitk`."""
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        return cls(sitk.GetArrayFromImage(image).astype(np.float32), affine)
