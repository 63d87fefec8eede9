"""Finding the brain: in heads of every kind it is where the truth has it, and what holds no brain is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from models.brain import BRAIN_LIMITS, NoBrainError, dice, find_brain, measure, outline
from models.card import ModelError
from models.extractor import FOLDER, Extraction, Extractor, axes_of
from models.simulation.phantom import Phantom
from models.volume import Array, Mask, Volume
from tests.numeric.phantoms import as_volume, head
from worker.read.study import read_study

SHARED = Path(__file__).parents[3] / "shared" / "data"


def scanned(
    phantom: Phantom, spacing_mm: tuple[float, float, float], slab_mm: float, nod_deg: float
) -> tuple[Volume, Mask]:
    """The phantom nodding, on a grid of `spacing_mm` (i, j, k) that covers `slab_mm` from the top down."""
    source = as_volume(phantom.pre)
    size = np.array([220.0, 250.0, slab_mm])
    count = np.round(size / spacing_mm).astype(int)
    top = 100.0
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-size[0] / 2, -size[1] / 2, top - slab_mm]
    grid = Volume(np.zeros(tuple(count[::-1]), np.float32), affine).to_sitk()
    nod = sitk.Euler3DTransform((0.0, 0.0, 0.0), np.radians(nod_deg), 0.0, 0.0)
    smooth = source.with_voxels(ndimage.gaussian_filter(source.voxels, [0.3 * s / 2 for s in spacing_mm[::-1]]))
    image = Volume.from_sitk(sitk.Resample(smooth.to_sitk(), grid, nod, sitk.sitkLinear, 0.0))
    brain = source.with_voxels(phantom.brain.astype(np.float32)).to_sitk()
    return image, sitk.GetArrayFromImage(sitk.Resample(brain, grid, nod, sitk.sitkLinear, 0.0)) > 0.5


def emptied(phantom: Phantom) -> Array:
    """The head with a smooth random texture in place of the brain."""
    rng = np.random.default_rng(1)
    texture = ndimage.gaussian_filter(rng.standard_normal(phantom.pre.shape), 3)
    filled = np.median(phantom.pre[phantom.brain]) * (1 + 0.25 * texture / texture.std())
    return np.where(phantom.brain, filled, phantom.pre).astype(np.float32)


def gel(*, texture: float = 0.0) -> Array:
    """A bottle of the size and shape of a brain, with noise; its content may be clotted."""
    rng = np.random.default_rng(2)
    z, y, x = np.meshgrid(*[np.arange(n) * 2.0 - n for n in (96, 120, 100)], indexing="ij")
    inside = (x / 68) ** 2 + (y / 85) ** 2 + (z / 62) ** 2 < 1
    clots = ndimage.gaussian_filter(rng.standard_normal(inside.shape), 2)
    return (inside * (1 + texture * clots / clots.std()) + 0.02 * np.abs(rng.standard_normal(inside.shape))).astype(
        "f4"
    )


@lru_cache(maxsize=1)
def seen() -> Extraction:
    """What the networks say of one whole head, for all tests that only look at it."""
    found = Extractor().extract(as_volume(head(stripped=False, seed=8).pre))
    assert found is not None
    return found


@pytest.mark.parametrize("stripped", [True, False], ids=["skull-stripped", "full head"])
def test_the_brain_is_found_with_and_without_a_skull(stripped: bool) -> None:
    phantom = head(stripped=stripped)
    assert dice(find_brain(as_volume(phantom.pre)).mask, phantom.brain) > 0.96


def test_the_brain_is_found_in_sagittal_and_flipped_storage_as_in_axial() -> None:
    voxels = head(stripped=False, seed=8).pre
    volume = as_volume(voxels)
    affine = volume.affine[:, [1, 2, 0, 3]] @ np.diag([1.0, -1.0, 1.0, 1.0])  # i <- j, j <- -k, k <- i
    affine[:3, 3] = (volume.affine @ [0, 0, voxels.shape[0] - 1, 1])[:3]
    sagittal = Volume(np.ascontiguousarray(voxels.transpose(2, 0, 1)[:, ::-1]), affine)
    expected = seen().axes.back(outline(seen()))
    assert np.array_equal(find_brain(sagittal).mask, expected.transpose(2, 0, 1)[:, ::-1])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_voxels_turned_to_anatomical_axes_and_back_are_the_same(
    order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs @ _small_turn()
    volume = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), affine)
    axes = axes_of(volume)
    assert np.array_equal(axes.back(axes.forth(volume.voxels)), volume.voxels)
    k, j, i = np.argwhere(volume.voxels == axes.forth(volume.voxels)[-1, -1, -1])[0]
    farthest = max(np.ndindex(4, 3, 2), key=lambda at: float((affine[:3, :3] @ at) @ [-1, -1, 1]))
    assert (i, j, k) == farthest  # the last voxel along right, anterior and superior


def _small_turn() -> np.ndarray:
    angle = np.radians(10)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("spacing_mm", "slab_mm", "nod_deg"),
    [((1.0, 1.0, 5.0), 180.0, 0.0), ((2.0, 2.0, 2.0), 120.0, -15.0)],
    ids=["thick slices", "a slab without cerebellum, nodding"],
)
def test_the_brain_is_found_in_other_fields_of_view(
    spacing_mm: tuple[float, float, float], slab_mm: float, nod_deg: float
) -> None:
    volume, expected = scanned(head(stripped=False, seed=8), spacing_mm, slab_mm, nod_deg)
    assert dice(find_brain(volume).mask, expected) > 0.94


def test_the_brain_is_found_in_a_defaced_head() -> None:
    phantom = head(stripped=False)
    faceless = phantom.pre.copy()
    faceless[:50, :30] = 0  # lower front, with a part of the brain
    assert dice(find_brain(as_volume(faceless)).mask, phantom.brain) > 0.93


def test_padding_around_an_oblique_image_does_not_hide_the_brain() -> None:
    phantom = head(stripped=False, seed=8)
    padded = phantom.pre.copy()
    k, j = np.indices(padded.shape)[:2]
    padded[k + j < 80] = 0  # through the face and the frontal lobe
    assert dice(find_brain(as_volume(padded)).mask, phantom.brain & (k + j >= 80)) > 0.92


def test_an_empty_volume_has_no_brain() -> None:
    with pytest.raises(NoBrainError, match="nothing"):
        find_brain(as_volume(np.zeros((32, 32, 32), np.float32)))


@pytest.mark.parametrize(
    ("voxels", "checks"),
    [
        (lambda: np.random.default_rng(0).rayleigh(1, (96, 120, 100)), "agreement|volume"),
        (gel, "layers"),
        (lambda: gel(texture=0.2), "layers"),
        (lambda: emptied(head(stripped=False)), "layers"),
        (lambda: 2 - np.clip(head(stripped=False).pre, 0, 2), "volume|agreement|layers"),
        (lambda: head(stripped=False).pre[:30], "volume|agreement"),
    ],
    ids=["noise", "a bottle of gel", "a bottle of clots", "a head without a brain", "a head inverted", "a neck"],
)
def test_what_holds_no_whole_brain_is_refused_with_the_check_that_failed(voxels: object, checks: str) -> None:
    assert callable(voxels)
    with pytest.raises(NoBrainError, match=f"({checks}) is"):
        find_brain(as_volume(voxels()))


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (lambda mask: ndimage.binary_dilation(mask, iterations=4), "agreement"),
        (lambda mask: ndimage.binary_erosion(mask, iterations=3), "agreement"),
        (lambda mask: np.roll(mask, 8, axis=0), "agreement"),
        (lambda mask: mask & (np.indices(mask.shape)[0] > mask.shape[0] // 2), "agreement"),
        (lambda mask: ndimage.binary_dilation(mask, iterations=9), "layers"),
        (lambda mask: mask | (seen().image > 0.3) & ndimage.binary_dilation(mask, iterations=8), "agreement"),
    ],
    ids=["8 mm too large", "6 mm too small", "16 mm aside", "one half", "the skull and its fat", "the scalp in part"],
)
def test_an_outline_that_is_wrong_is_told_by_its_figures(wrong: object, check: str) -> None:
    assert callable(wrong)
    value = measure(seen(), wrong(outline(seen())))[check]
    assert value < BRAIN_LIMITS[check].least


def real_volumes(archive: str, folder: Path) -> list[Volume]:
    """The first volume of every folder of real images in the shared data, or a skip."""
    path = SHARED / archive
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder)
    folders = sorted({file.parent for file in folder.rglob("*") if file.is_file()})
    return [read_study(sorted(file for file in one.iterdir() if file.is_file())).series[0].volume() for one in folders]


@pytest.mark.parametrize("name", ["ms_patient12_study1", "ms_patient01_study1"])
def test_the_brain_is_found_in_a_real_whole_head_as_the_reference_found_it(name: str) -> None:
    path = SHARED / "whole-heads" / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    volume = Volume.from_sitk(sitk.ReadImage(str(path), sitk.sitkFloat32))
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(path).replace(".nii", "_mask.nii"))) > 0
    assert dice(find_brain(volume).mask, reference) > 0.999


@pytest.mark.parametrize("position", ["HFS", "HFDL"])
def test_the_brain_is_found_in_a_real_sagittal_head_with_neck_and_where_the_image_cuts_it(
    position: str, tmp_path: Path
) -> None:
    (volume,) = real_volumes(f"whole-heads/siemens-t1-fl2d-sag-{position}.zip", tmp_path)
    found = find_brain(volume)
    cut = {"HFS": 0.0, "HFDL": 0.02}[position]
    assert found.figures["volume"] == pytest.approx({"HFS": 1543, "HFDL": 1324}[position], rel=0.01)
    assert cut <= 1 - found.figures["inside"] < cut + 0.01


def test_the_brain_is_found_wherever_the_grid_begins_in_thick_slices(tmp_path: Path) -> None:
    volume = real_volumes("real-pairs/tcga-du-7294-33.zip", tmp_path)[0]
    masks = []
    for first in (0, 1):
        voxels = volume.voxels[first : first + 152].reshape(38, 4, 240, 240).mean(axis=1)
        affine = volume.affine @ np.diag([1.0, 1.0, 4.0, 1.0])
        affine[:3, 3] = (volume.affine @ [0, 0, first + 1.5, 1])[:3]
        masks.append(np.repeat(find_brain(Volume(voxels, affine)).mask, 4, axis=0))
    assert dice(masks[0][1:], masks[1][:-1]) > 0.97


@pytest.mark.parametrize("archive", ["not-brains/t1-of-a-fruit.zip", "philips-t1-classic-and-enhanced.zip"])
def test_a_real_fruit_and_a_real_scanner_phantom_have_no_brain(archive: str, tmp_path: Path) -> None:
    for volume in real_volumes(archive, tmp_path):
        with pytest.raises(NoBrainError):
            find_brain(volume)


@pytest.mark.parametrize(("factor", "offset"), [(1000.0, 0.0), (400.0, -1024.0), (400.0, 500.0)])
def test_the_unit_and_the_zero_of_the_image_do_not_matter(factor: float, offset: float) -> None:
    image = seen().image * np.float32(factor) + np.float32(offset)
    moved = dataclasses.replace(seen(), image=image, floor=seen().floor * factor + offset)
    figures, expected = (measure(one, outline(one)) for one in (moved, seen()))
    assert figures == pytest.approx(expected, abs=0.002)


def test_threads_and_repetition_change_no_bit() -> None:
    volume = as_volume(head(stripped=False, seed=8).pre)
    other = Extractor(threads=1).extract(volume)
    assert other is not None
    assert np.array_equal(outline(other), outline(seen()))
    assert np.array_equal(other.fine, seen().fine)


def test_networks_that_are_not_those_of_the_card_are_not_loaded(tmp_path: Path) -> None:
    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Extractor(tmp_path)
    (tmp_path / "fine.onnx").write_bytes((FOLDER / "coarse.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"fine\.onnx has SHA-256"):
        Extractor(tmp_path)
    (tmp_path / "fine.onnx").unlink()
    with pytest.raises(ModelError, match="incomplete"):
        Extractor(tmp_path)


def test_the_notice_of_the_extractor_is_beside_it() -> None:
    assert "Permission is hereby granted" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


PEAK = """
import re, numpy as np
from pathlib import Path
from models.extractor import Extractor
from models.volume import Volume
z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in (180, 256, 256)], indexing="ij")
voxels = (x**2 + y**2 + z**2 < 0.5).astype(np.float32)
assert Extractor().extract(Volume(voxels, np.eye(4))) is not None
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


def test_a_whole_head_takes_less_than_a_gibibyte_and_a_half() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1536
