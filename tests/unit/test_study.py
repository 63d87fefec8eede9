"""Files become a study, its series and their volumes, or end in a named reason."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import compress
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from service.core.dicom.values import texts
from service.core.errors import Permanent, Reason
from tests.factories import (
    SyntheticPair,
    as_concatenation,
    as_enhanced,
    as_legacy_converted,
    as_stacks,
    compress_file,
    encode,
    make_pair,
    uid,
    write_study,
)
from worker.choose.acquisition import read_acquisition
from worker.choose.pairing import choose_pair
from worker.read.planes import read_instance
from worker.read.study import Study, find_files, read_study

REAL_PHILIPS = Path(__file__).parents[2].parent / "shared" / "data" / "philips-t1-classic-and-enhanced.zip"


def written(folder: Path, datasets: Sequence[Dataset]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{n:03}" for n in range(len(datasets))]
    for path, dataset in zip(paths, datasets, strict=True):
        path.write_bytes(encode(dataset))
    return paths


def refusal(folder: Path, **options: Any) -> Reason:
    write_study(folder, **options)
    with pytest.raises(Permanent) as refused:
        choose_pair(read_study(find_files(folder)))
    return refused.value.reason


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("not_dicom", Reason.UNREADABLE_FILE),
        ("cut_file", Reason.UNREADABLE_FILE),
        ("empty_file", Reason.UNREADABLE_FILE),
        ("short_pixels", Reason.UNREADABLE_FILE),
        ("absurd_size", Reason.UNSUPPORTED_OBJECT),
        ("two_patients", Reason.TWO_PATIENTS),
        ("two_studies", Reason.TWO_STUDIES),
        ("not_mr", Reason.NOT_MR),
        ("gap_in_pre", Reason.MISSING_SLICES),
        ("gap_in_low", Reason.MISSING_SLICES),
        ("short_low", Reason.MISSING_SLICES),
        ("duplicated_position", Reason.IRREGULAR_GEOMETRY),
        ("mixed_orientation", Reason.IRREGULAR_GEOMETRY),
        ("pre_only", Reason.ONE_SERIES_ONLY),
    ],
)
def test_a_study_that_cannot_be_processed_ends_in_its_reason(tmp_path: Path, odd: str, reason: Reason) -> None:
    assert refusal(tmp_path, odd=[odd], slices=12) is reason


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ("ct_beside", "CT Image Storage"),
        ("localizer", "series 1"),
        ("own_output", "8 x synthetic image"),
    ],
)
def test_other_series_beside_a_good_pair_are_ignored_and_listed(tmp_path: Path, odd: str, told: str) -> None:
    pair = choose_pair(read_study(write_study(tmp_path, odd=[odd])))
    assert (pair.pre.label, pair.low.label) == ("series 4", "series 9")
    assert any(told in line for line in pair.set_aside)


def test_colour_maps_and_a_directory_beside_a_good_pair_are_ignored_but_alone_they_are_unsupported(
    tmp_path: Path,
) -> None:
    pair, colour = make_pair(), make_pair().pre[:3]
    for k, dataset in enumerate(colour):
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid("colour"), uid("colour", k)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = bytes(3 * len(dataset.PixelData))
    directory = Dataset()
    directory.SOPClassUID, directory.SOPInstanceUID = MediaStorageDirectoryStorage, uid("directory")
    paths = written(tmp_path, [*pair.all, *colour, directory])
    found = choose_pair(read_study(paths))
    assert (found.pre.label, found.low.label) == ("series 4", "series 9")
    assert "3 x MR Image Storage in colour or of an unusual pixel format" in found.set_aside
    with pytest.raises(Permanent) as refused:
        read_study(paths[16:])
    assert refused.value.reason is Reason.UNSUPPORTED_OBJECT


@pytest.mark.parametrize("mark", ["SyntheticData", "Manufacturer", "private block"])
def test_any_of_our_marks_alone_keeps_our_images_from_being_input(tmp_path: Path, mark: str) -> None:
    pair = make_pair()
    for dataset in pair.low:
        if mark == "private block":
            dataset.private_block(0x4C47, "LOWGAD SYNTHCE 1", create=True)
        else:
            setattr(dataset, mark, {"SyntheticData": "YES", "Manufacturer": "lowgad"}[mark])
    paths = written(tmp_path, pair.all)
    study = read_study(paths)
    assert [series.label for series in study.series] == ["series 4"]
    assert "8 x synthetic image (SyntheticData is YES, or lowgad made it)" in study.ignored
    with pytest.raises(Permanent) as refused:
        read_study(paths[8:])
    assert refused.value.reason is Reason.OWN_OUTPUT


def test_nothing_to_read_is_an_empty_upload() -> None:
    with pytest.raises(Permanent) as refused:
        read_study([])
    assert refused.value.reason is Reason.EMPTY_UPLOAD


@pytest.mark.filterwarnings("ignore:Failed to decode byte string")
@pytest.mark.parametrize("keyword", ["PatientID", "PatientName"])
def test_two_patients_are_told_apart_by_letters_that_their_character_set_does_not_hold(
    tmp_path: Path, keyword: str
) -> None:
    paths = write_study(tmp_path, pre_changes={keyword: "M\u00fcller"}, low_changes={keyword: "M\u00f6ller"})
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 192"))
    with pytest.raises(Permanent) as refused:
        read_study(paths)
    assert refused.value.reason is Reason.TWO_PATIENTS


def test_a_refusal_never_quotes_what_identifies_a_patient(tmp_path: Path) -> None:
    write_study(tmp_path, odd=["two_patients"])
    with pytest.raises(Permanent) as refused:
        read_study(find_files(tmp_path))
    assert "SOMEBODY" not in str(refused.value)
    assert "SYNTH" not in str(refused.value)


def test_only_files_that_may_be_images_are_found(tmp_path: Path) -> None:
    paths = write_study(tmp_path / "a", slices=8)
    paths[0].rename(tmp_path / "a" / "noextension")
    paths[1].rename(tmp_path / "a" / "renamed.xyz")
    for name in ("DICOMDIR", "notes.txt", "truth.npz", "preview.png", ".hidden.dcm", "report.json", "README"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    (tmp_path / "a" / "damaged.dcm").write_bytes(b"no image")
    found = {path.name for path in find_files(tmp_path)}
    assert len(found) == 17
    assert {"noextension", "renamed.xyz", "damaged.dcm"} <= found


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal", "oblique"])
def test_the_affine_maps_every_voxel_to_where_its_header_puts_it(tmp_path: Path, plane: str) -> None:
    """PS3.3 C.7.6.2.1.1, checked slice by slice against the formula written out."""
    paths = write_study(tmp_path, plane=plane, spacing_mm=(0.9, 1.1, 1.3))
    series = choose_pair(read_study(paths[::-1])).pre
    volume = series.volume()
    for k, header in enumerate(plane.header for plane in series.planes):
        position, cosines, spacing = (
            np.array(header[keyword].value, dtype=float)
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        )
        i, j = 7, 13
        expected = position + cosines[:3] * spacing[1] * i + cosines[3:] * spacing[0] * j
        assert volume.affine @ (i, j, k, 1) == pytest.approx([*expected, 1], abs=1e-6)
    assert np.linalg.det(volume.affine) > 0
    assert volume.spacing_mm == pytest.approx((0.9, 1.1, 1.3), abs=1e-6)


def test_slices_are_ordered_by_position_whatever_their_numbers_and_files_say(tmp_path: Path) -> None:
    pair = make_pair()
    for number, dataset in enumerate(pair.pre):
        dataset.InstanceNumber = str(1 + (number * 5) % 8)
    pair.pre.reverse()
    series = read_study(written(tmp_path, pair.all)).series[0]
    assert [plane.sop_instance_uid for plane in series.planes] == [uid(0, "pre", k) for k in range(8)]


def test_signed_and_rescaled_values_are_read_as_numbers(tmp_path: Path) -> None:
    pair = make_pair(vendor="ge")
    stored = np.frombuffer(pair.pre[0].PixelData, "<i2") - 300
    pair.pre[0].PixelData = stored.astype("<i2").tobytes()
    for dataset in pair.pre:
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-10"
    volume = read_study(written(tmp_path, pair.all)).series[0].volume()
    assert volume.voxels[0].ravel() == pytest.approx(stored * 0.5 - 10)
    assert volume.voxels[0].min() < 0


def test_philips_series_with_their_own_scalings_give_comparable_floating_point_values(tmp_path: Path) -> None:
    plain = choose_pair(read_study(write_study(tmp_path / "s", vendor="siemens")))
    philips = choose_pair(read_study(write_study(tmp_path / "p", vendor="philips")))
    for one, other in ((plain.pre, philips.pre), (plain.low, philips.low)):
        assert other.unit == "Philips FP"
        assert other.volume().voxels == pytest.approx(one.volume().voxels, abs=2.5)


@pytest.mark.parametrize("vendor", ["siemens", "ge", "philips"])
def test_an_enhanced_object_reads_like_the_slices_it_holds(tmp_path: Path, vendor: str) -> None:
    pair = make_pair(vendor=vendor, plane="oblique", agent="Gadobutrol")
    classic = choose_pair(read_study(written(tmp_path / "classic", pair.all)))
    enhanced = choose_pair(read_study(written(tmp_path / "enhanced", [as_enhanced(pair.pre), as_enhanced(pair.low)])))
    for one, other in ((classic.pre, enhanced.pre), (classic.low, enhanced.low)):
        assert np.array_equal(one.volume().voxels, other.volume().voxels)
        assert np.array_equal(one.volume().affine, other.volume().affine)
        assert [plane.frame_number for plane in other.planes] == list(range(8, 0, -1))
        for keyword in ("ImagePositionPatient", "RepetitionTime", "EchoTime", "FlipAngle", "AcquisitionTime"):
            assert str(one.header[keyword].value) == str(other.header[keyword].value)


@pytest.mark.parametrize("vendor", ["siemens", "philips"])
def test_a_legacy_converted_object_reads_like_the_slices_it_holds(tmp_path: Path, vendor: str) -> None:
    pair = make_pair(vendor=vendor)
    classic = read_study(written(tmp_path / "classic", pair.all))
    objects = [as_legacy_converted(pair.pre), as_legacy_converted(pair.low)]
    legacy = read_study(written(tmp_path / "legacy", objects))
    for one, other in zip(classic.series, legacy.series, strict=True):
        assert one.unit == other.unit
        assert np.array_equal(one.volume().voxels, other.volume().voxels)
        assert one.volume().affine == pytest.approx(other.volume().affine)
    assert choose_pair(legacy).pre.label == "series 4"


def test_a_concatenation_is_one_volume_and_without_one_of_its_objects_it_has_slices_missing(tmp_path: Path) -> None:
    multi = as_enhanced(make_pair(slices=24).pre)
    whole = read_study(written(tmp_path / "whole", [multi])).series[0]
    parts = as_concatenation(multi, 3)
    joined = read_study(written(tmp_path / "parts", parts[::-1])).series[0]
    assert np.array_equal(joined.volume().voxels, whole.volume().voxels)
    assert np.array_equal(joined.volume().affine, whole.volume().affine)
    for missing in range(3):  # also the first or the last, which leaves no gap between slices
        present = [part for n, part in enumerate(parts) if n != missing]
        fault = read_study(written(tmp_path / str(missing), present)).series[0].fault
        assert fault
        assert (fault.reason, fault.detail) == (Reason.MISSING_SLICES, "2 of 3 objects of a concatenation")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"AcquisitionNumber": "2"}, ["AcquisitionNumber 1", "AcquisitionNumber 2"]),
        ({"TemporalPositionIdentifier": "2"}, ["TemporalPositionIdentifier ", "TemporalPositionIdentifier 2"]),
        ({"EchoTime": "9.8"}, ["EchoTime 2.98", "EchoTime 9.8"]),
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]},
            ["ImageType ORIGINAL\\PRIMARY\\M\\ND", "ImageType ORIGINAL\\PRIMARY\\P\\ND"],
        ),
    ],
)
@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_volumes_in_one_series_are_told_apart_by_what_they_say(
    tmp_path: Path, form: str, changes: dict[str, Any], parts: list[str]
) -> None:
    together = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4"}
    pair = make_pair(low_changes=together | changes)
    alone = [volume_of(tmp_path / name, datasets) for name, datasets in (("pre", pair.pre), ("low", pair.low))]
    if form == "enhanced":
        pair = SyntheticPair([as_enhanced(pair.pre)], [as_enhanced(pair.low)])
    series = read_study(written(tmp_path / "both", pair.all)).series
    assert [(one.part, one.fault) for one in series] == [(part, None) for part in parts]
    for one, volume in zip(series, alone, strict=True):
        assert np.array_equal(one.volume().voxels, volume)


def volume_of(folder: Path, datasets: list[Dataset]) -> np.ndarray:
    return read_study(written(folder, datasets)).series[0].volume().voxels


def test_stacks_of_one_object_are_volumes_of_their_own_whatever_their_orientation(tmp_path: Path) -> None:
    axial, sagittal = make_pair(plane="axial").pre, make_pair(plane="sagittal").pre
    alone = [volume_of(tmp_path / name, one) for name, one in (("a", axial), ("s", sagittal))]
    both = as_stacks(as_enhanced(axial), as_enhanced(sagittal))
    for frame in both.PerFrameFunctionalGroupsSequence:
        stack = axial if frame.FrameContentSequence[0].StackID == "1" else sagittal
        item = Dataset()
        item.ImageOrientationPatient = stack[0].ImageOrientationPatient
        frame.PlaneOrientationSequence = [item]
    del both.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    series = read_study(written(tmp_path / "both", [both])).series
    assert [one.label for one in series] == ["series 4 (StackID 1)", "series 4 (StackID 2)"]
    for one, volume in zip(series, alone, strict=True):
        assert np.array_equal(one.volume().voxels, volume)


def test_a_pair_in_one_series_is_a_pair(tmp_path: Path) -> None:
    together = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4", "AcquisitionNumber": "2"}
    pair = choose_pair(read_study(written(tmp_path, make_pair(low_changes=together).all)))
    assert (pair.pre.part, pair.low.part) == ("AcquisitionNumber 1", "AcquisitionNumber 2")


def test_slices_that_are_there_twice_and_say_nothing_apart_stay_an_irregular_series(tmp_path: Path) -> None:
    pair = make_pair(low_changes={"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4"})
    series = read_study(written(tmp_path, pair.all)).series
    assert [one.fault and one.fault.reason for one in series] == [Reason.IRREGULAR_GEOMETRY]


def test_a_gap_is_a_gap_also_where_the_acquisition_number_changes_across_it(tmp_path: Path) -> None:
    """Two whole halves would be two wrong volumes."""
    slices = make_pair(slices=24).pre
    for k, dataset in enumerate(slices):
        dataset.AcquisitionNumber = str(1 + k // 12)
    del slices[12]
    series = read_study(written(tmp_path, slices)).series
    assert [one.fault and one.fault.reason for one in series] == [Reason.MISSING_SLICES]


def test_stacks_above_each_other_are_two_volumes(tmp_path: Path) -> None:
    slices = make_pair(slices=24).pre
    series = read_study(written(tmp_path, [as_stacks(as_enhanced(slices[:9]), as_enhanced(slices[12:]))])).series
    assert [(one.part, len(one.planes), one.fault) for one in series] == [
        ("StackID 1", 9, None),
        ("StackID 2", 12, None),
    ]


@pytest.mark.parametrize(("claimed", "parts"), [("16", 2), ("17", 1)])
def test_images_in_acquisition_may_count_all_volumes_of_a_series_but_must_not_count_more(
    tmp_path: Path, claimed: str, parts: int
) -> None:
    count = {"ImagesInAcquisition": claimed}
    together = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4", "TemporalPositionIdentifier": "2"}
    pair = make_pair(pre_changes=count, low_changes=together | count)
    series = read_study(written(tmp_path, pair.all)).series
    assert len(series) == parts
    assert [one.fault and one.fault.reason for one in series] == [None if parts == 2 else Reason.MISSING_SLICES] * parts


def test_a_dynamic_examination_in_one_series_is_not_taken_apart(tmp_path: Path) -> None:
    phases = []
    for phase in range(6):
        changes = {"TemporalPositionIdentifier": str(phase)}
        for k, dataset in enumerate(make_pair(pre_changes=changes, rows=8, columns=8).pre):
            dataset.SOPInstanceUID = uid("phase", phase, k)
            phases.append(dataset)
    series = read_study(written(tmp_path, phases)).series
    assert [one.fault and one.fault.reason for one in series] == [Reason.IRREGULAR_GEOMETRY]


@pytest.mark.parametrize(("syntax", "marked"), [(JPEGLSNearLossless, ["01"]), (JPEG2000, ["01"]), (RLELossless, [])])
def test_pixels_in_a_lossy_transfer_syntax_count_as_lossy_where_the_header_is_silent(
    tmp_path: Path, syntax: UID, marked: list[str]
) -> None:
    (path,) = written(tmp_path, make_pair(rows=64, columns=64).pre[:1])
    compress_file(path, syntax)
    assert texts(read_instance(path).planes[0].header, "LossyImageCompression") == marked


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_losslessly_compressed_pixels_are_the_same_pixels(tmp_path: Path, syntax: UID) -> None:
    paths = write_study(tmp_path / "plain", rows=64, columns=64, vendor="ge")
    (tmp_path / "packed").mkdir()
    packed = []
    for path in paths:
        dataset = dcmread(path)
        compress(dataset, syntax, generate_instance_uid=False)
        packed.append(tmp_path / "packed" / path.name)
        dataset.save_as(packed[-1])
    for one, other in zip(read_study(paths).series, read_study(packed).series, strict=True):
        assert np.array_equal(one.volume().voxels, other.volume().voxels)


@pytest.mark.skipif(shutil.which("dcmcjpeg") is None, reason="dcmtk is not installed")
@pytest.mark.parametrize("option", ["+el", "+e1"], ids=["process 14", "process 14, first-order prediction"])
def test_jpeg_lossless_from_dcmtk_reads_as_what_it_was_made_from(tmp_path: Path, option: str) -> None:
    plain = write_study(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for path in plain:
        subprocess.run(["dcmcjpeg", option, path, tmp_path / "packed" / path.name], check=True)
    packed = read_study(sorted((tmp_path / "packed").iterdir()))
    for one, other in zip(read_study(plain).series, packed.series, strict=True):
        assert np.array_equal(one.volume().voxels, other.volume().voxels)


def test_implicit_and_explicit_transfer_syntax_read_alike(tmp_path: Path) -> None:
    studies = [read_study(write_study(tmp_path / str(i), vendor="philips", implicit=i)) for i in (False, True)]
    first, second = (study.series[1].volume().voxels for study in studies)
    assert np.array_equal(first, second)


def test_damaged_compressed_pixels_are_refused_when_they_are_decoded(tmp_path: Path) -> None:
    paths = write_study(tmp_path, rows=64, columns=64)
    dataset = dcmread(paths[0])
    compress(dataset, RLELossless, generate_instance_uid=False)
    dataset.PixelData = dataset.PixelData[:90] + bytes(len(dataset.PixelData) - 90)
    dataset.save_as(paths[0])
    with pytest.raises(Permanent) as refused:
        read_study(paths).series[0].volume()
    assert refused.value.reason is Reason.UNREADABLE_FILE


def test_a_deflated_object_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    paths = write_study(tmp_path)
    data = paths[0].read_bytes()
    explicit, deflated = b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.1.99"
    at = data.index(explicit)
    bomb = data[: at - 2] + len(deflated).to_bytes(2, "little") + deflated + data[at + len(explicit) :]
    paths[0].write_bytes(bomb)
    with pytest.raises(Permanent) as refused:
        read_study(paths)
    assert refused.value.reason is Reason.UNSUPPORTED_OBJECT


def test_sequences_nested_without_end_are_an_unreadable_file(tmp_path: Path) -> None:
    paths = write_study(tmp_path)
    item = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    head = paths[0].read_bytes()
    at = head.index(b"\x08\x00\x60\x00CS")  # before Modality, in the order of tags
    paths[0].write_bytes(head[:at] + item * 5000 + head[at:])
    with pytest.raises(Permanent) as refused:
        read_study(paths)
    assert refused.value.reason is Reason.UNREADABLE_FILE


def test_the_same_file_twice_counts_once_but_two_objects_under_one_uid_are_refused(tmp_path: Path) -> None:
    paths = write_study(tmp_path)
    twin = tmp_path / "twin.dcm"
    twin.write_bytes(paths[3].read_bytes())
    assert len(read_study([*paths, twin]).series[0].planes) == 8
    dataset = dcmread(twin)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(twin)
    with pytest.raises(Permanent) as refused:
        read_study([*paths, twin])
    assert refused.value.reason is Reason.IRREGULAR_GEOMETRY


def test_slices_that_are_hardly_apart_are_no_volume(tmp_path: Path) -> None:
    (series,) = read_study(written(tmp_path, make_pair(spacing_mm=(1.0, 1.0, 0.0005)).pre)).series
    assert series.fault
    assert (series.fault.reason, series.fault.detail) == (Reason.IRREGULAR_GEOMETRY, "slices are 0.0005 mm apart")


@pytest.mark.parametrize(
    ("vendor", "changes", "reason"),
    [
        ("ge", {"RescaleSlope": "0", "RescaleIntercept": "0"}, Reason.UNSUPPORTED_OBJECT),
        ("ge", {"RescaleSlope": "-1", "RescaleIntercept": "0"}, Reason.UNSUPPORTED_OBJECT),
        ("ge", {"RescaleSlope": "1e37", "RescaleIntercept": "0"}, Reason.UNSUPPORTED_OBJECT),
        ("philips", {"RescaleSlope": "0"}, Reason.UNSUPPORTED_OBJECT),
        ("philips", 0.0, Reason.UNSUPPORTED_OBJECT),  # of the private scale slope
        ("philips", -0.25, Reason.UNSUPPORTED_OBJECT),
        ("ge", {"PixelSpacing": ["1e-9", "1e-9"]}, Reason.IRREGULAR_GEOMETRY),
        ("ge", {"PixelSpacing": ["0", "0"]}, Reason.IRREGULAR_GEOMETRY),
        ("ge", {"PixelSpacing": ["900", "900"]}, Reason.IRREGULAR_GEOMETRY),
    ],
)
def test_scaling_and_spacing_that_cannot_be_are_the_fault_of_their_series_alone(
    tmp_path: Path, vendor: str, changes: dict[str, Any] | float, reason: Reason
) -> None:
    pair = make_pair(vendor=vendor, low_changes=changes if isinstance(changes, dict) else {})
    for dataset in pair.low:
        if isinstance(changes, float):
            dataset[0x2005, 0x100E].value = changes
    pre, low = read_study(written(tmp_path, pair.all)).series
    assert pre.volume().voxels.min() >= 0
    with pytest.raises(Permanent) as refused:
        low.volume()
    assert refused.value.reason is reason


def test_every_other_slice_missing_is_noticed_from_the_stated_distance(tmp_path: Path) -> None:
    pair = make_pair(slices=20)
    study: Study = read_study(written(tmp_path, [*pair.pre[::2], *pair.low[::2]]))
    assert [series.fault and series.fault.reason for series in study.series] == [Reason.MISSING_SLICES] * 2


def test_patients_that_differ_only_in_how_the_name_is_written_are_one(tmp_path: Path) -> None:
    changes = {"PatientName": "PHANTOM^TEST^^"}
    assert len(read_study(write_study(tmp_path, low_changes=changes)).series) == 2


def test_real_philips_series_read_alike_in_classic_and_enhanced_form(tmp_path: Path) -> None:
    """Two T1-FFE series of one phantom session, one as 24 classic slices, the other as one Enhanced object."""
    if not REAL_PHILIPS.exists():
        pytest.skip("the real Philips files are not beside this checkout")
    import zipfile

    zipfile.ZipFile(REAL_PHILIPS).extractall(tmp_path)
    folders = {path.parent.name: path.parent for path in tmp_path.rglob("*.dcm")}
    classic, enhanced = (
        read_study(find_files(next(folder for name, folder in folders.items() if name.startswith(start)))).series[0]
        for start in ("501_T1W_FFE", "401_T1W_FFE")
    )
    assert classic.unit == enhanced.unit == "Philips FP"
    assert np.abs(classic.volume().affine - enhanced.volume().affine).max() < 1e-6
    ratio = classic.volume().voxels.mean() / enhanced.volume().voxels.mean()
    assert 0.8 < ratio < 1.25  # stored values alone differ by 40 %, displayed values by a factor of 1700


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # it warns of the damage that the test makes
def test_damaged_headers_end_in_a_reason_and_never_in_a_crash(tmp_path: Path) -> None:
    paths = write_study(tmp_path, vendor="philips", rows=8, columns=8)
    random, victim = np.random.default_rng(7), paths[11]
    sound, reasons = victim.read_bytes(), set()
    for _ in range(80):
        damaged = bytearray(sound)
        for place in random.integers(132, min(2500, len(sound)), 3):
            damaged[place] = random.choice([0, 255, ord("9"), ord("\\"), ord(" ")])
        victim.write_bytes(damaged)
        try:
            pair = choose_pair(read_study(paths))
            read_acquisition(pair)
            pair.low.volume()
        except Permanent as error:
            reasons.add(error.reason)
    assert Reason.UNREADABLE_FILE in reasons
