"""Voxels and where they lie, against dcm2niix: an independent reader that knows the vendors' files.

dcm2niix turns rows and slices as NIfTI likes them, so nothing is compared by index: each of our voxels is looked up by
its place in the patient.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dcm2niix
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from models.volume import Volume
from tests.factories import as_enhanced, as_legacy_converted, compress_file, encode, make_pair
from worker.read.study import Series, find_files, read_study

REAL_PHILIPS = Path(__file__).parents[2].parent / "shared" / "data" / "philips-t1-classic-and-enhanced.zip"
VOXEL = (0.9, 1.1, 1.3)
PLAIN: Callable[[list[Dataset]], Sequence[Dataset]] = list


def enhanced(datasets: list[Dataset]) -> list[Dataset]:
    return [as_enhanced(datasets)]


def legacy(datasets: list[Dataset]) -> list[Dataset]:
    return [as_legacy_converted(datasets)]


@pytest.mark.parametrize(
    ("flavour", "form", "syntax"),
    [
        ({"plane": "axial"}, PLAIN, ExplicitVRLittleEndian),
        ({"plane": "sagittal", "spacing_mm": VOXEL, "vendor": "canon"}, PLAIN, ExplicitVRLittleEndian),
        ({"plane": "coronal", "spacing_mm": VOXEL}, PLAIN, JPEGLSLossless),
        ({"plane": "oblique", "spacing_mm": VOXEL, "vendor": "ge"}, PLAIN, JPEG2000Lossless),
        ({"plane": "oblique", "spacing_mm": VOXEL, "vendor": "philips"}, PLAIN, ExplicitVRLittleEndian),
        ({"plane": "oblique", "spacing_mm": (0.6, 0.6, 5.5), "thickness_mm": 5.0}, PLAIN, ExplicitVRLittleEndian),
        ({"plane": "sagittal", "spacing_mm": VOXEL}, enhanced, ExplicitVRLittleEndian),
        ({"plane": "oblique", "spacing_mm": VOXEL, "vendor": "philips"}, enhanced, ExplicitVRLittleEndian),
        ({"plane": "oblique", "spacing_mm": VOXEL, "vendor": "ge"}, enhanced, ExplicitVRLittleEndian),
        ({"plane": "coronal", "spacing_mm": VOXEL}, legacy, ExplicitVRLittleEndian),
    ],
    ids=[
        *("axial", "sagittal", "coronal, JPEG-LS", "oblique signed, JPEG 2000", "oblique, Philips scaling", "gapped"),
        *("Enhanced sagittal", "Enhanced Philips", "Enhanced signed", "Legacy Converted"),
    ],
)
def test_dcm2niix_finds_the_same_values_at_the_same_places(
    tmp_path: Path, flavour: dict[str, Any], form: Callable[[list[Dataset]], Sequence[Dataset]], syntax: UID
) -> None:
    (tmp_path / "in").mkdir()
    for n, dataset in enumerate(form(make_pair(rows=36, columns=32, **flavour).pre)):
        path = tmp_path / "in" / f"{n}.dcm"
        path.write_bytes(encode(dataset))
        if syntax.is_compressed:
            compress_file(path, syntax)
    (series,) = read_study(find_files(tmp_path / "in")).series
    assert_alike(series, by_dcm2niix(tmp_path / "in", tmp_path / "out"))


def test_real_philips_series_in_both_forms_have_the_values_and_places_that_dcm2niix_finds(tmp_path: Path) -> None:
    """Four series: classic slices, and Enhanced objects of two releases; the floating-point values of the vendor."""
    if not REAL_PHILIPS.exists():
        pytest.skip("the real Philips files are not beside this checkout")
    zipfile.ZipFile(REAL_PHILIPS).extractall(tmp_path)
    folders = sorted({path.parent for path in tmp_path.rglob("*.dcm")})
    assert len(folders) == 4
    for folder in folders:
        (series,) = read_study(find_files(folder)).series
        assert series.unit == "Philips FP"
        assert_alike(series, by_dcm2niix(folder, tmp_path / "out" / folder.name))


def by_dcm2niix(folder: Path, out: Path) -> Volume:
    """The one volume that dcm2niix makes of a folder. SimpleITK turns the axes of NIfTI into those of DICOM."""
    out.mkdir(parents=True)
    command = [dcm2niix.bin, "-z", "n", "-b", "n", "-f", "volume", "-o", out, folder]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.nii")
    return Volume.from_sitk(sitk.ReadImage(str(path)))


def assert_alike(series: Series, oracle: Volume) -> None:
    """Every voxel of ours lies on a voxel of the oracle, to 0.001 of it, and has its value; none is left over."""
    ours = series.volume()
    k, j, i = np.indices(ours.voxels.shape).reshape(3, -1)
    places = np.linalg.inv(oracle.affine) @ ours.affine @ np.stack([i, j, k, np.ones_like(i)])
    found = np.rint(places).astype(int)
    assert np.abs(places - found).max() < 1e-3
    index = np.ravel_multi_index((found[2], found[1], found[0]), oracle.voxels.shape)  # raises outside the grid
    assert np.array_equal(np.sort(index), np.arange(oracle.voxels.size))
    assert np.allclose(oracle.voxels.ravel()[index], ours.voxels.ravel(), rtol=1e-5, atol=1e-3)
