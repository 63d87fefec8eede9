"""Who is pre-contrast and who is low dose, and when nobody can say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from service.core.errors import Permanent, Reason
from tests.factories import SyntheticPair, as_enhanced, encode, make_pair, uid
from worker.pairing import Pair, choose_pair
from worker.study import Study, read_study


def study_of(folder: Path, *series: Sequence[Dataset]) -> Study:
    paths = []
    for n, dataset in enumerate(dataset for datasets in series for dataset in datasets):
        paths.append(folder / f"{n:04}.dcm")
        paths[-1].write_bytes(encode(dataset))
    return read_study(paths)


def another(datasets: Sequence[Dataset], name: str, **changes: Any) -> list[Dataset]:
    """The same slices as a further series."""
    copies = copy.deepcopy(list(datasets))
    for k, dataset in enumerate(copies):
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid(name), uid(name, k)
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
    return copies


def chosen(folder: Path, *series: Sequence[Dataset]) -> tuple[str, str]:
    pair = choose_pair(study_of(folder, *series))
    return pair.pre.label, pair.low.label


def refused(study: Study, **named: str) -> Permanent:
    with pytest.raises(Permanent) as error:
        choose_pair(study, **named)
    return error.value


def healthy(**options: Any) -> SyntheticPair:
    return make_pair(rows=8, columns=8, **options)


def test_attributes_times_and_words_that_agree_decide(tmp_path: Path) -> None:
    pair = healthy()
    assert chosen(tmp_path, pair.low, pair.pre) == ("series 4", "series 9")


@pytest.mark.parametrize(
    ("pre", "low"),
    [
        ("t1_mprage_sag_p2_iso", "t1_mprage_sag_p2_iso_KM"),
        ("SAG T1 3D PRE", "SAG T1 3D POST"),
        ("T1 native", "T1 + Gd"),
        ("AX T1 w/o contrast", "AX T1 with contrast"),
        ("T1W 3D TFE", "T1W 3D TFE +C"),
        ("T1 ohne KM", "T1 mit KM"),
        ("t1 sans gado", "t1 apres gado"),
        ("T1 pre-Gd", "T1 post-Gd"),
        ("Ax BRAVO", "Ax BRAVO Dotarem"),
        ("t1_mpr_ns_sag", "t1_mpr_ns_sag_KM"),  # short for MPRAGE; reformatted images say so in ImageType
    ],
)
def test_words_and_times_decide_where_the_console_wrote_the_agent_everywhere(
    tmp_path: Path, pre: str, low: str
) -> None:
    pair = healthy(
        pre_description=pre, low_description=low, pre_changes={"ContrastBolusAgent": "Gadovist"}, agent="Gadovist"
    )
    assert chosen(tmp_path, pair.pre, pair.low) == ("series 4", "series 9")


def test_an_agent_entered_before_the_injection_does_not_make_a_series_contrasted(tmp_path: Path) -> None:
    start = {"ContrastBolusAgent": "Gadovist", "ContrastBolusStartTime": "101000"}
    pair = healthy(pre_description="T1", low_description="T1", pre_changes=start, low_changes=start)
    assert chosen(tmp_path, pair.pre, pair.low) == ("series 4", "series 9")


def test_the_administered_flag_of_enhanced_mr_outranks_the_agent(tmp_path: Path) -> None:
    pair = healthy(pre_description="T1", low_description="T1", pre_changes={"ContrastBolusAgent": "Gadovist"})
    pre = as_enhanced(pair.pre)
    pre.SharedFunctionalGroupsSequence[0].ContrastBolusUsageSequence[0].ContrastBolusAgentAdministered = "NO"
    assert chosen(tmp_path, [pre], [as_enhanced(pair.low)]) == ("series 4", "series 9")


@pytest.mark.parametrize(
    "options",
    [
        {"pre_changes": {"AcquisitionTime": "110000"}},  # acquired last, without contrast attributes
        {"pre_description": "T1 POST", "low_description": "T1 PRE"},
        {"agent": None, "pre_description": "T1", "low_description": "T1"},  # the order of times alone proves nothing
        {"agent": None, "pre_description": "T1 post", "low_description": "T1 post"},
    ],
)
def test_witnesses_that_disagree_or_are_alone_leave_it_to_a_person(tmp_path: Path, options: dict[str, Any]) -> None:
    pair = healthy(**options)
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "contrast attributes" in error.detail
    assert "time of acquisition" in error.detail


def test_two_candidates_for_one_role_leave_it_to_a_person(tmp_path: Path) -> None:
    pair = healthy()
    full = another(pair.low, "full", AcquisitionTime="103000", SeriesNumber="12")
    error = refused(study_of(tmp_path, pair.pre, pair.low, full))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "series 4 with series 9; series 4 with series 12" in error.detail


def test_named_series_outrank_the_witnesses(tmp_path: Path) -> None:
    pair = healthy()
    full = another(pair.low, "full", AcquisitionTime="103000", SeriesNumber="12")
    study = study_of(tmp_path, pair.pre, pair.low, full)
    found: Pair = choose_pair(study, pre_series_uid=uid(0, "pre"), low_series_uid=uid("full"))
    assert (found.pre.label, found.low.label) == ("series 4", "series 12")
    assert any("series 9" in line for line in found.set_aside)
    assert choose_pair(study, low_series_uid=uid(0, "low")).pre.label == "series 4"


def test_a_named_series_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pair = healthy()
    study = study_of(tmp_path, pair.pre, pair.low)
    assert refused(study, pre_series_uid="1.2.3").reason is Reason.AMBIGUOUS_SERIES
    same = uid(0, "pre")
    assert refused(study, pre_series_uid=same, low_series_uid=same).reason is Reason.AMBIGUOUS_SERIES


@pytest.mark.parametrize(
    "changes",
    [
        {"SeriesDescription": "t2_tse_tra", "RepetitionTime": "5000", "EchoTime": "95", "ScanningSequence": "SE"},
        {"SeriesDescription": "3D", "RepetitionTime": "5000", "EchoTime": "390", "ScanningSequence": "SE"},
        {"SeriesDescription": "ep2d", "ScanningSequence": "EP", "EchoTime": "28"},
        {"SeriesDescription": "T1 MPR cor", "ImageType": ["DERIVED", "SECONDARY", "MPR"]},
        {"SeriesDescription": "T1 SUB", "ImageType": ["DERIVED", "PRIMARY", "SUB"]},
        {"SeriesDescription": "SWI", "EchoTime": "20"},
        {"SeriesDescription": "field map", "ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]},
    ],
)
def test_series_of_other_kinds_are_set_aside(tmp_path: Path, changes: dict[str, Any]) -> None:
    pair = healthy()
    assert chosen(tmp_path, another(pair.low, "x", SeriesNumber="7", **changes), pair.pre, pair.low) == (
        "series 4",
        "series 9",
    )


@pytest.mark.parametrize(
    "changes", [{"FlipAngle": "25"}, {"PixelSpacing": ["0.5", "0.5"]}, {"EchoTime": "6"}, {"MRAcquisitionType": "2D"}]
)
def test_series_of_different_sequence_or_geometry_are_no_pair(tmp_path: Path, changes: dict[str, Any]) -> None:
    pair = healthy(low_changes=changes)
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert next(iter(changes)) in error.detail


def test_one_series_with_philips_floating_point_scaling_and_one_without_are_no_pair(tmp_path: Path) -> None:
    pair = healthy(vendor="philips")
    for dataset in pair.low:
        dataset.remove_private_tags()
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert "scaling" in error.detail
