"""Derived images against the standard: dciodvfy, dcentvfy, and the promises of deploy/conformance.md."""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmread
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset

from models.condition import Conditions
from models.runtime import Engine, LinearEngine
from service.core.errors import Permanent, Reason
from service.core.job import Kind
from tests.dicom3tools import errors_of, inconsistencies, needs_dicom3tools
from tests.factories import SyntheticPair, as_enhanced, as_stacks, encode, make_pair, uid, write_study
from tests.factories.reading import paired
from tests.factories.results import CONTEXT, saved
from worker.choose.acquisition import read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.compose.attributes import TABLE, Action
from worker.compose.context import DerivationContext, Outputs, make_context
from worker.compose.derived import MR_SERIES, derive
from worker.read.study import Series, read_study

REAL_PAIR = Path(__file__).parents[2].parent / "shared" / "data" / "tcga-du-7294-lowdose33.zip"
LINEAR = LinearEngine()


def signal_for(series: Series, seed: int = 0) -> npt.NDArray[np.float32]:
    """A made-up signal in the unit of the series: a fifth of the voxels gain up to half of their value."""
    voxels = series.volume().voxels
    random = np.random.default_rng(seed).random(voxels.shape)
    return np.where(random < 0.2, voxels * random * 2.5, 0).clip(0).astype(np.float32)


def derived(pair: Pair, kind: Kind, context: DerivationContext = CONTEXT) -> list[Dataset]:
    source, other = (pair.low, pair.pre) if kind is Kind.SD_PLUS else (pair.pre, pair.low)
    return list(derive(kind, source, signal_for(source), other, context))


def errors(path: Path) -> list[str]:
    return errors_of(path, iod="MRImage")


def check(sources: Sequence[Path], pair: Pair, out: Path, *, every: int = 1) -> None:
    results = [saved(out / kind.value, derived(pair, kind)) for kind in MR_SERIES]
    for paths in results:
        assert [error for path in paths[::every] for error in errors(path)] == []
    assert inconsistencies([*sources, *itertools.chain(*results)]) == ""


# ------------------------------------------------------------------------------------------------ the validators


@needs_dicom3tools
@pytest.mark.parametrize("plane", ["axial", "sagittal", "oblique"])
@pytest.mark.parametrize("vendor", ["siemens", "ge", "philips"])
def test_derived_series_are_valid_and_consistent_with_their_sources(tmp_path: Path, vendor: str, plane: str) -> None:
    sources = write_study(tmp_path / "in", vendor=vendor, plane=plane, start_time="101000", concentration="1")
    check(sources, choose_pair(read_study(sources)), tmp_path / "out", every=4)


@needs_dicom3tools
def test_a_sparse_but_valid_source_gives_a_valid_result(tmp_path: Path) -> None:
    gone = dict.fromkeys(["ImagingFrequency", "ImagedNucleus", "NumberOfAverages", "SliceLocation", "ProtocolName"])
    blank = {"ScanOptions": "", "AccessionNumber": "", "AcquisitionNumber": None, "StationName": None}
    sources = write_study(tmp_path / "in", pre_changes=gone | blank, low_changes=gone | blank)
    check(sources, choose_pair(read_study(sources)), tmp_path / "out", every=4)


@needs_dicom3tools
@pytest.mark.parametrize("vendor", ["siemens", "philips"])
def test_enhanced_input_gives_valid_classic_images(tmp_path: Path, vendor: str) -> None:
    pair = enhanced_pair(tmp_path, make_pair(vendor=vendor, plane="oblique"))
    for kind in MR_SERIES:
        for path in saved(tmp_path / kind.value, derived(pair, kind))[::3]:
            assert errors(path) == []


@needs_dicom3tools
def test_the_real_case_gives_valid_images(tmp_path: Path) -> None:
    if not REAL_PAIR.exists():
        pytest.skip("the real case is not beside this checkout")
    zipfile.ZipFile(REAL_PAIR).extractall(tmp_path / "in")
    sources = sorted((tmp_path / "in").rglob("*.dcm"))
    check(sources, choose_pair(read_study(sources)), tmp_path / "out", every=50)


@needs_dicom3tools
def test_a_pair_in_one_series_gives_valid_images_with_uids_of_their_own(tmp_path: Path) -> None:
    series = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4", "SeriesTime": "100500"}
    sources = write_study(
        tmp_path / "in", low_changes={**series, "AcquisitionNumber": "2"}, low_description="t1_mprage_sag"
    )
    check(sources, choose_pair(read_study(sources)), tmp_path / "out", every=4)


@needs_dicom3tools
def test_a_pair_in_one_object_gives_valid_images_with_uids_of_their_own(tmp_path: Path) -> None:
    together = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4"}
    datasets = make_pair(low_changes=together)
    (tmp_path / "both.dcm").write_bytes(encode(as_stacks(as_enhanced(datasets.pre), as_enhanced(datasets.low))))
    pre, low = read_study([tmp_path / "both.dcm"]).series
    images = [derived(Pair(*order), kind) for kind, order in itertools.product(MR_SERIES, [(pre, low), (low, pre)])]
    assert len({image.SOPInstanceUID for series in images for image in series}) == 6 * 8
    assert len(images[0][0].ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 1
    for path in saved(tmp_path / "out", images[0])[::4]:
        assert errors(path) == []


def enhanced_pair(folder: Path, pair: SyntheticPair) -> Pair:
    paths = [folder / "pre.dcm", folder / "low.dcm"]
    for path, series in zip(paths, (pair.pre, pair.low), strict=True):
        path.write_bytes(encode(as_enhanced(series)))
    return choose_pair(read_study(paths))


# ------------------------------------------------------------------------------------------------ pixels and geometry


@pytest.mark.parametrize("kind", MR_SERIES)
@pytest.mark.parametrize("vendor", ["siemens", "ge", "philips"])
def test_stored_values_are_the_source_plus_the_signal_and_identical_where_it_rounds_to_zero(
    tmp_path: Path, vendor: str, kind: Kind
) -> None:
    pair = paired(tmp_path, vendor=vendor)
    source = pair.low if kind is Kind.SD_PLUS else pair.pre
    added = np.rint(signal_for(source) / source.planes[0].unit_per_stored)
    assert (added == 0).any()
    for k, image in enumerate(derived(pair, kind)):
        difference = image.pixel_array.astype(int) - (0 if kind is Kind.SUBTRACTION else source.planes[k].stored)
        assert np.array_equal(difference, added[k])
        assert image.PixelRepresentation == int(vendor == "ge")
        assert (image.BitsAllocated, image.BitsStored, image.HighBit) == (16, 16, 15)
        assert (image.SmallestImagePixelValue, image.LargestImagePixelValue) == (
            image.pixel_array.min(),
            image.pixel_array.max(),
        )


def test_no_signal_gives_the_source_bit_for_bit(tmp_path: Path) -> None:
    pair = paired(tmp_path)
    nothing = np.zeros((8, 24, 20), dtype=np.float32)
    for plane, image in zip(pair.pre.planes, derive(Kind.SD, pair.pre, nothing, pair.low, CONTEXT), strict=True):
        assert image.PixelData == plane.stored.astype("<u2").tobytes()


def test_a_sum_beyond_16_bits_is_mapped_linearly_for_the_whole_series_and_says_so(tmp_path: Path) -> None:
    pair = paired(tmp_path)
    signal = np.zeros((8, 24, 20), dtype=np.float32)
    signal[3, 10, 10] = 131070
    images = list(derive(Kind.SD, pair.pre, signal, pair.low, CONTEXT))
    assert max(int(image.pixel_array.max()) for image in images) == 65535
    factor = 65535 / (131070 + float(pair.pre.planes[3].stored[10, 10]))
    for plane, image in zip(pair.pre.planes, images, strict=True):
        expected = np.rint((plane.stored + signal[list(pair.pre.planes).index(plane)]) * factor)
        assert np.array_equal(image.pixel_array, expected)
        assert "multiplied" in image.DerivationDescription


def test_slices_scaled_differently_get_one_scale_and_the_image_says_so(tmp_path: Path) -> None:
    pair = make_pair()
    for k, dataset in enumerate(pair.pre):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(1 + k % 2), "0"
    paths = []
    for n, dataset in enumerate(pair.all):
        paths.append(tmp_path / str(n))
        paths[-1].write_bytes(encode(dataset))
    chosen = choose_pair(read_study(paths))
    images = derived(chosen, Kind.SD)
    values = np.stack([image.pixel_array for image in images]) * 2.0
    expected = chosen.pre.volume().voxels + signal_for(chosen.pre)
    assert np.abs(values - expected).max() <= 2
    assert "one common scale" in images[0].DerivationDescription


def test_a_signal_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    pair = paired(tmp_path)
    with pytest.raises(Permanent) as refused:
        next(derive(Kind.SD, pair.pre, np.full((8, 24, 20), np.nan, dtype=np.float32), pair.low, CONTEXT))
    assert refused.value.reason is Reason.OUTPUT_INVALID


@pytest.mark.parametrize("kind", MR_SERIES)
def test_geometry_is_copied_digit_by_digit_from_the_image_the_signal_was_added_to(tmp_path: Path, kind: Kind) -> None:
    shifted = {"ImageOrientationPatient": ["0.99254615", "0.12186934", "0", "-0.1192063", "0.97085736", "0.2079117"]}
    paths = write_study(tmp_path / "in", plane="oblique", low_changes=shifted)
    pair = choose_pair(read_study(paths))
    source = pair.low if kind is Kind.SD_PLUS else pair.pre
    raw = {str(header.SOPInstanceUID): header for header in map(dcmread, paths)}
    for plane, path in zip(source.planes, saved(tmp_path / "out", derived(pair, kind)), strict=True):
        image, original = dcmread(path), raw[plane.sop_instance_uid]
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            assert image.get_item(keyword).value == original.get_item(keyword).value


def test_a_decimal_string_too_long_for_the_standard_is_shortened_not_moved(tmp_path: Path) -> None:
    long = {"PixelSpacing": ["0.89999999999999997", "0.89999999999999997"]}
    image = derived(paired(tmp_path, pre_changes=long, low_changes=long), Kind.SD)[0]
    assert [len(str(value)) <= 16 for value in image.PixelSpacing] == [True, True]
    assert [float(value) for value in image.PixelSpacing] == [0.9, 0.9]


def test_an_independent_reader_finds_the_same_grid(tmp_path: Path) -> None:
    pair = paired(tmp_path, plane="oblique")
    volume = highdicom.get_volume_from_series(derived(pair, Kind.SD))
    ours = pair.pre.volume()
    corner = volume.map_reference_to_indices(ours.affine[:3, 3][None, :])
    assert np.abs(corner - np.rint(corner)).max() < 1e-4  # of a voxel
    assert sorted(volume.spacing) == pytest.approx(sorted(ours.spacing_mm))


# ------------------------------------------------------------------------------------------------ what it says


def test_every_image_says_in_many_places_that_it_was_not_acquired(tmp_path: Path) -> None:
    for kind in MR_SERIES:
        for image in derived(paired(tmp_path / kind.value), kind):
            assert image.SyntheticData == "YES"
            assert image.ContentQualification == "RESEARCH"
            assert list(image.ImageType) == ["DERIVED", "SECONDARY", "OTHER", "AI_SYNTH"]
            assert "NOT ACQUIRED" in image.SeriesDescription
            assert len(image.SeriesDescription) <= 64
            assert "NOT ACQUIRED" in image.DerivationDescription
            assert "not a medical device" in image.DerivationDescription
            assert image.Manufacturer == "lowgad"
            purposes = [
                item.PurposeOfReferenceCodeSequence[0].CodeValue for item in image.ContributingEquipmentSequence
            ]
            assert purposes == ["109101", "109100"]
            assert image.ContributingEquipmentSequence[0].Manufacturer == "SIEMENS"


def test_both_series_state_the_injected_dose_and_nowhere_the_simulated_one_as_injected(tmp_path: Path) -> None:
    pair = paired(tmp_path, volume_ml="2.0", total_dose_ml="2.0", agent_code=("407976008", "SCT", "Gadobutrol"))
    for kind in MR_SERIES:
        for image in derived(pair, kind):
            assert image.ContrastBolusAgent == "Gadovist"
            assert (str(image.ContrastBolusVolume), str(image.ContrastBolusTotalDose)) == ("2.0", "2.0")
            assert image.ContrastBolusAgentSequence[0].CodeValue == "407976008"
            block = image.private_block(0x4C47, "LOWGAD SYNTHCE 1")
            assert (block[0x05].value, block[0x06].value) == (0.1, 0.025)


def test_each_image_names_its_slice_and_the_partner_at_the_same_place(tmp_path: Path) -> None:
    pair = paired(tmp_path)
    for k, image in enumerate(derived(pair, Kind.SD)):
        sources = image.SourceImageSequence
        assert [item.ReferencedSOPInstanceUID for item in sources] == [
            pair.pre.planes[k].sop_instance_uid,
            pair.low.planes[k].sop_instance_uid,
        ]
        assert [item.SpatialLocationsPreserved for item in sources] == ["YES", "NO"]
        assert [item.SeriesInstanceUID for item in image.ReferencedSeriesSequence] == [
            pair.pre.series_uid,
            pair.low.series_uid,
        ]


def test_images_from_enhanced_input_name_object_and_frame(tmp_path: Path) -> None:
    pair = enhanced_pair(tmp_path, make_pair())
    images = derived(pair, Kind.SD)
    assert [image.SourceImageSequence[0].ReferencedFrameNumber for image in images] == list(range(8, 0, -1))
    assert len({image.SOPInstanceUID for image in images}) == 8
    assert images[0].ContrastBolusAgent == "Gadobutrol"
    assert str(images[0].ContrastBolusVolume) == "2.0"
    assert "ContrastBolusVolume" not in images[0].ContrastBolusAgentSequence[0]


def test_images_from_enhanced_input_tell_the_moment_of_their_frame_alike_wherever_they_do(tmp_path: Path) -> None:
    datasets = make_pair()
    for series in (datasets.pre, datasets.low):
        for k, dataset in enumerate(series):
            dataset.AcquisitionTime = f"{int(dataset.AcquisitionTime) + k:06}.25"
    written = {str(dataset.AcquisitionTime) for dataset in datasets.pre}
    images = derived(enhanced_pair(tmp_path, datasets), Kind.SD)
    assert {str(image.AcquisitionTime) for image in images} == written
    for image in images:
        assert str(image.AcquisitionDateTime) == str(image.AcquisitionDate) + str(image.AcquisitionTime)


def test_the_same_input_model_and_configuration_give_the_same_uids_and_any_other_give_others(tmp_path: Path) -> None:
    pair = paired(tmp_path / "a")

    def uids(pair: Pair = pair, kind: Kind = Kind.SD, **changes: Any) -> set[str]:
        images = derived(pair, kind, dataclasses.replace(CONTEXT, **changes))
        return {image.SOPInstanceUID for image in images} | {image.SeriesInstanceUID for image in images}

    first = uids()
    later = datetime(2032, 1, 1, tzinfo=UTC)
    assert uids(choose_pair(read_study(write_study(tmp_path / "a")[::-1])), now=later) == first
    assert len(first) == 9
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in first)
    others = [
        uids(kind=Kind.SD_PLUS),
        uids(model_sha256="00" * 32),
        uids(config_hash="00" * 32),
        uids(paired(tmp_path / "b", seed=1)),
        uids(paired(tmp_path / "c", slices=9)),
    ]
    for other in others:
        assert not first & other


def test_what_is_measured_changes_no_uid_and_what_the_header_says_does(tmp_path: Path) -> None:
    acquisition = read_acquisition(paired(tmp_path))
    known = Conditions(3.0, "gadobutrol", 0.033, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0))

    def config_hash(engine: Engine = LINEAR, **changes: Any) -> str:
        made = dataclasses.replace(known, **changes)
        now = datetime(2032, 1, 1, tzinfo=UTC)
        return make_context(engine, acquisition, made, Outputs(), numbers=frozenset(), now=now).config_hash

    assert config_hash(sigma=0.0300001, noise_left=(0.3500001, 0.25, 0.15)) == config_hash()
    assert config_hash(dose_mmol_per_kg=0.034) != config_hash()
    other = dataclasses.replace(LINEAR, provider="another")  # last digits of its signal differ, and so may pixels
    assert config_hash(other) != config_hash()


def test_series_numbers_are_high_unused_and_different(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, low_changes={"SeriesNumber": "9001"}))
    context = dataclasses.replace(CONTEXT, series_numbers_in_use=study.series_numbers | {9002})
    pair = choose_pair(study)
    found = [derived(pair, kind, context)[0].SeriesNumber for kind in MR_SERIES]
    assert found == [9021, 9022, 9003]


def test_dates_of_the_result_are_those_given_in_the_zone_of_the_source(tmp_path: Path) -> None:
    zone = {"TimezoneOffsetFromUTC": "+0930"}
    image = derived(paired(tmp_path, pre_changes=zone, low_changes=zone), Kind.SD)[0]
    assert (image.ContentDate, image.ContentTime) == ("20310504", "123201")
    assert (image.SeriesDate, image.InstanceCreationTime) == ("20310504", "123201")
    assert image.AcquisitionTime == "100500"


def test_a_lossy_source_stays_marked_as_lossy(tmp_path: Path) -> None:
    lossy = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": "8",
        "LossyImageCompressionMethod": "ISO_15444_1",
    }
    image = derived(paired(tmp_path, low_changes=lossy), Kind.SD)[0]
    assert (image.LossyImageCompression, image.LossyImageCompressionMethod) == ("01", "ISO_15444_1")


def test_results_are_refused_as_input(tmp_path: Path) -> None:
    paths = saved(tmp_path, derived(paired(tmp_path / "in"), Kind.SD))
    with pytest.raises(Permanent) as refused:
        read_study(paths)
    assert refused.value.reason is Reason.OWN_OUTPUT


# ------------------------------------------------------------------------------------------------ text and the table


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Grüße^Jörg"),
        ("ISO_IR 192", "Ångström^Zoë=王^小東"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 144", "\u041b\u044e\u043a\u0441"),
    ],
)
def test_text_keeps_its_bytes_in_every_character_set(tmp_path: Path, charset: str | list[str], name: str) -> None:
    paths = write_study(tmp_path / "in", charset=charset, patient_name=name)
    image = dcmread(saved(tmp_path / "out", derived(choose_pair(read_study(paths)), Kind.SD))[0])
    original = dcmread(paths[0])
    for keyword in ("SpecificCharacterSet", "PatientName", "PatientID", "StudyDescription"):
        assert image.get_item(keyword).value == original.get_item(keyword).value
    assert image.PatientName == name


@pytest.mark.filterwarnings("ignore:Failed to decode byte string")
def test_a_name_that_is_not_in_its_character_set_keeps_its_bytes(tmp_path: Path) -> None:
    """Latin-1 under a header that says UTF-8, as systems in between make it: a replaced letter is another patient."""
    paths = write_study(tmp_path / "in", patient_name="Grüße^Jörg")
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 192"))
    for kind in Kind:
        image = dcmread(saved(tmp_path / kind.value, derived(choose_pair(read_study(paths)), kind))[0])
        assert image.SpecificCharacterSet == "ISO_IR 192"
        assert image.get_item("PatientName").value.strip() == "Grüße^Jörg".encode("latin-1")


def test_two_character_sets_in_one_pair_become_one_that_holds_both(tmp_path: Path) -> None:
    low = {"SpecificCharacterSet": "ISO_IR 192", "ContrastBolusAgent": "Gadovist 注射"}
    paths = write_study(tmp_path / "in", patient_name="Grüße^Jörg", low_changes=low)
    image = dcmread(saved(tmp_path / "out", derived(choose_pair(read_study(paths)), Kind.SD))[0])
    assert image.SpecificCharacterSet == "ISO_IR 192"
    assert image.PatientName == "Grüße^Jörg"
    assert image.ContrastBolusAgent == "Gadovist 注射"


def test_an_image_holds_nothing_that_the_table_does_not_name(tmp_path: Path) -> None:
    secret = {"PatientComments": "x", "OperatorsName": "x", "AdmittingDiagnosesDescription": "x", "MedicalAlerts": "x"}
    named = {row.keyword for row in TABLE if row.action is not Action.REMOVE}
    for kind in MR_SERIES:
        pair = paired(tmp_path / kind.value, vendor="philips", pre_changes=secret, low_changes=secret)
        for image in derived(pair, kind):
            public = {keyword_for_tag(element.tag) for element in image if not element.tag.is_private}
            assert public <= named
            creators = {element.value for element in image if element.tag.is_private_creator}
            assert creators == {"LOWGAD SYNTHCE 1"}


def test_the_table_names_real_attributes_once() -> None:
    keywords = [row.keyword for row in TABLE]
    assert len(keywords) == len(set(keywords))
    assert all(tag_for_keyword(keyword) is not None for keyword in keywords)
    assert all(row.reference for row in TABLE)
