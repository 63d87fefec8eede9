from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from service.core.dicom.header import why_not_t1
from service.core.dicom.series import HeaderSummary, find_pair, geometry_faults
from service.core.errors import Reason
from tests.factories import as_concatenation, as_enhanced, make_pair


def summaries(datasets: list[Dataset]) -> list[HeaderSummary]:
    return [HeaderSummary.of(dataset) for dataset in datasets]


def reasons(datasets: list[Dataset]) -> list[Reason]:
    return [fault.reason for fault in geometry_faults(summaries(datasets))]


def enhanced(datasets: list[Dataset]) -> Dataset:
    """The same series as one Enhanced MR object: geometry and timing in functional groups."""
    multi = Dataset()
    for keyword in ("Modality", "ImageType", "Rows", "Columns", "FrameOfReferenceUID"):
        setattr(multi, keyword, datasets[0][keyword].value)
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = [item(datasets[0], "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [item(datasets[0], "PixelSpacing")]
    shared.MRTimingAndRelatedParametersSequence = [item(datasets[0], "RepetitionTime")]
    echo, preparation = Dataset(), Dataset()
    preparation.InversionRecovery = "YES"
    shared.MRModifierSequence = [preparation]
    echo.EffectiveEchoTime = float(datasets[0].EchoTime)
    shared.MREchoSequence = [echo]
    for dataset in datasets:
        frame, usage = Dataset(), Dataset()
        frame.PlanePositionSequence = [item(dataset, "ImagePositionPatient")]
        usage.ContrastBolusAgentAdministered = "YES" if "ContrastBolusAgent" in dataset else "NO"
        frame.ContrastBolusUsageSequence = [usage]
        frames.append(frame)
    multi.SharedFunctionalGroupsSequence = [shared]
    multi.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return multi


def item(source: Dataset, keyword: str) -> Dataset:
    dataset = Dataset()
    setattr(dataset, keyword, source[keyword].value)
    return dataset


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal", "oblique"])
@pytest.mark.parametrize("vendor", ["siemens", "ge", "philips"])
def test_a_healthy_series_is_one_whole_volume_in_any_order(plane: str, vendor: str) -> None:
    pair = make_pair(plane=plane, vendor=vendor)
    assert reasons(pair.pre) == reasons(pair.pre[::-1]) == reasons(pair.pre[1::2] + pair.pre[::2]) == []


def test_a_gap_is_missing_slices() -> None:
    pre = make_pair(slices=12).pre
    assert reasons(pre[:5] + pre[6:]) == [Reason.MISSING_SLICES]


@pytest.mark.parametrize("total_is_stated", [True, False])
def test_a_concatenation_is_whole_when_all_its_objects_are_there(total_is_stated: bool) -> None:
    parts = as_concatenation(as_enhanced(make_pair(slices=24).pre), 3)
    for part in parts:
        if not total_is_stated:  # it is optional; the last object can then not be missed
            del part.InConcatenationTotalNumber
    assert reasons(parts) == reasons(parts[::-1]) == []
    assert reasons(parts[1:]) == reasons(parts[::2]) == [Reason.MISSING_SLICES]
    assert reasons(parts[:2]) == ([Reason.MISSING_SLICES] if total_is_stated else [])


def test_two_slices_at_one_place_are_not_a_volume() -> None:
    pre = make_pair(slices=12).pre
    assert reasons([*pre, pre[3]]) == [Reason.IRREGULAR_GEOMETRY]


def test_slices_that_are_not_equally_spaced_are_not_a_volume() -> None:
    pre = make_pair(slices=12, spacing_mm=(1, 1, 1)).pre
    pre[-1].ImagePositionPatient[2] += 0.2
    assert reasons(pre) == [Reason.IRREGULAR_GEOMETRY]


def test_slices_beside_each_other_are_not_a_volume() -> None:
    pre = make_pair(slices=12).pre
    pre[4].ImagePositionPatient[0] += 3
    assert reasons(pre) == [Reason.IRREGULAR_GEOMETRY]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImageOrientationPatient", ["0", "1", "0", "0", "0", "-1"]),
        ("PixelSpacing", ["2", "2"]),
        ("Rows", 999),
        ("ImagePositionPatient", None),
        ("ImageOrientationPatient", None),
    ],
)
def test_one_slice_that_is_unlike_the_others_spoils_the_volume(keyword: str, value: Any) -> None:
    pre = make_pair(slices=12).pre
    setattr(pre[5], keyword, value)
    assert reasons(pre) == [Reason.IRREGULAR_GEOMETRY]


def test_fewer_slices_than_the_scanner_announced_are_not_the_whole() -> None:
    pair = make_pair(slices=12, pre_changes={"ImagesInAcquisition": "14"})
    assert reasons(pair.pre) == [Reason.MISSING_SLICES]


def test_the_pair_is_found_and_the_one_without_contrast_comes_first() -> None:
    pair = make_pair()
    series = {"low": summaries(pair.low), "pre": summaries(pair.pre)}
    assert find_pair(series) == ("pre", "low")


@pytest.mark.parametrize("sequence", ["MPRAGE", "SPGR", "SE"])
def test_every_usual_t1_sequence_counts(sequence: str) -> None:
    pair = make_pair(sequence=sequence)
    assert find_pair({"pre": summaries(pair.pre), "low": summaries(pair.low)}) == ("pre", "low")


@pytest.mark.parametrize(
    "changes",
    [
        {"EchoTime": "90", "RepetitionTime": "4000", "InversionTime": None, "ScanningSequence": "SE"},
        {"InversionTime": "2500"},
        {"ScanningSequence": ["EP", "GR"]},
        {"AngioFlag": "Y"},
        {"ImageType": ["DERIVED", "SECONDARY", "MPR"]},
        {"Modality": "CT"},
        {"RepetitionTime": None},
        {"FrameOfReferenceUID": "1.2.3"},
        {"SyntheticData": "YES", "ImageType": ["DERIVED", "SECONDARY", "OTHER"]},
    ],
)
def test_what_is_no_acquired_t1_volume_of_the_same_place_is_no_partner(changes: dict[str, Any]) -> None:
    pair = make_pair(low_changes=changes)
    assert find_pair({"pre": summaries(pair.pre), "low": summaries(pair.low)}) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"EchoTime": "3.568", "RepetitionTime": "256.44"}, ""),  # two-dimensional gradient echo
        ({"ScanningSequence": "SE", "RepetitionTime": "1400", "EchoTime": "34"}, ""),
        ({"ScanningSequence": ["SE", "IR"], "InversionTime": "860", "RepetitionTime": "2500", "EchoTime": "9"}, ""),
        ({"EchoTime": "20"}, "not that of a T1"),
        ({"ScanningSequence": "SE", "RepetitionTime": "2400"}, "not that of a T1"),
        ({"InversionTime": "160"}, "inversion time"),
        ({"EchoTime": None}, "missing"),
        ({"SeriesDescription": "SWI"}, "named"),
        ({"ImageType": ["ORIGINAL", "SECONDARY"]}, "derived"),
        ({"SeriesDescription": "t1_mp2rage_sag_p3_iso_UNI_Images"}, "MP2RAGE"),
        ({"SeriesDescription": "sag3DMP-2RAGE"}, "MP2RAGE"),
        ({"SeriesDescription": "anat", "ProtocolName": "t1_mp2rage"}, "MP2RAGE"),
        ({"SeriesDescription": "sag T1 INV1"}, "MP2RAGE"),
        ({"SeriesDescription": "T1 INV_2"}, "MP2RAGE"),
        ({"SeriesDescription": "MPRAGE_inv1000"}, ""),  # an inversion time
        ({"SeriesDescription": "t1_mp2mm"}, ""),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "UNI"]}, "derived"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "T1", "UNIFORM"]}, "derived"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "T1 MAP"]}, "derived"),
        ({"ScanningSequence": ["GR", "IR"], "InversionTime": "700", "RepetitionTime": "4000"}, "not that of a T1"),
        ({"ScanningSequence": ["GR", "IR"], "InversionTime": "1100", "RepetitionTime": "3000"}, ""),
        ({"ScanningSequence": ["SE", "IR"], "InversionTime": "860", "RepetitionTime": "6000", "EchoTime": "9"}, ""),
    ],
)
def test_one_rule_says_what_is_no_t1_image_and_why(changes: dict[str, Any], why: str) -> None:
    header = make_pair(sequence="SPGR", pre_changes=changes).pre[0]
    assert why in why_not_t1(header)
    assert bool(why) == bool(why_not_t1(header))
    assert HeaderSummary.of(header).looks_t1 == (not why)


def test_a_role_of_the_site_outranks_name_and_timing_but_not_the_image_type() -> None:
    changes = {"SeriesDescription": "t1_mp2rage_INV1", "RepetitionTime": "5000", "InversionTime": "700"}
    assert why_not_t1(make_pair(pre_changes=changes).pre[0], is_vouched_for=True) == ""
    uniform = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "UNI"]}
    assert "derived" in why_not_t1(make_pair(pre_changes=uniform).pre[0], is_vouched_for=True)


@pytest.mark.parametrize(
    ("roles", "pair"),
    [
        (("", ""), None),
        (("pre", "low"), ("pre", "low")),
        (("pre", ""), ("pre", "low")),
        (("ignore", "low"), None),
        (("unclear", "low"), None),
    ],
)
def test_roles_of_the_site_outrank_contrast_attributes(roles: tuple[str, str], pair: tuple[str, str] | None) -> None:
    both = make_pair(pre_changes={"ContrastBolusAgent": "Gadovist"})  # entered for the whole examination
    pre = [replace(item, role=roles[0]) for item in summaries(both.pre)]
    low = [replace(item, role=roles[1]) for item in summaries(both.low)]
    assert find_pair({"pre": pre, "low": low}) == pair


def test_series_of_different_lengths_are_no_pair() -> None:
    pair = make_pair(slices=12)
    assert find_pair({"pre": summaries(pair.pre), "low": summaries(pair.low[:-1])}) is None


def test_two_candidates_are_a_doubt_and_no_pair() -> None:
    pair, again = make_pair(), make_pair()
    series = {"pre": summaries(pair.pre), "low": summaries(pair.low), "other": summaries(again.low)}
    assert find_pair(series) is None


def test_a_multi_frame_object_counts_like_its_slices() -> None:
    pair = make_pair(slices=12)
    pre, low = HeaderSummary.of(enhanced(pair.pre)), HeaderSummary.of(enhanced(pair.low))
    assert len(pre.positions_mm) == 12
    assert geometry_faults([pre]) == []
    assert find_pair({"pre": [pre], "low": [low]}) == ("pre", "low")


def test_a_summary_survives_json_and_identifies_nobody() -> None:
    pair = make_pair(patient_name="Secret^Name")
    summary = HeaderSummary.of(pair.low[0])
    text = json.dumps(summary.to_json())
    assert HeaderSummary.from_json(json.loads(text)) == summary
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AccessionNumber", "InstitutionName"):
        assert str(pair.low[0][keyword].value) not in text


def test_an_empty_header_has_an_empty_summary() -> None:
    assert HeaderSummary.of(Dataset()) == HeaderSummary()
