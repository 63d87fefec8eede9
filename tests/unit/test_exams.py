"""Exams with more than one visit, or more than one body part: nothing is mixed, and what is refused is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from service.core.dicom.header import other_body_part
from service.core.dicom.series import HeaderSummary, find_pair
from service.core.errors import Permanent, Reason
from tests.factories import SyntheticPair, another, as_enhanced, make_pair, uid
from tests.factories.reading import study_of
from worker.choose.pairing import choose_pair
from worker.choose.timepoints import hours_apart

EVENING = {"AcquisitionTime": "193000", "SeriesTime": "193000", "ContentTime": "193000"}
NEXT_DAY = {f"{event}Date": "20240106" for event in ("Acquisition", "Series", "Content")}


def healthy(**options: Any) -> SyntheticPair:
    return make_pair(rows=8, columns=8, **options)


def again(pair: SyntheticPair, **changes: str) -> tuple[list[Dataset], list[Dataset]]:
    """The same pair, acquired another time."""
    return (
        another(pair.pre, "pre again", SeriesNumber="14", **changes),
        another(pair.low, "low again", SeriesNumber="19", **changes | {"AcquisitionTime": "194500"}),
    )


def refused(folder: Path, *series: list[Dataset]) -> Permanent:
    with pytest.raises(Permanent) as error:
        choose_pair(study_of(folder, *series))
    return error.value


def test_two_pairs_of_two_visits_are_refused_by_name_and_each_can_be_named(tmp_path: Path) -> None:
    pair = healthy()
    pre, low = again(pair, **EVENING)
    error = refused(tmp_path, pair.pre, pair.low, pre, low)
    assert error.reason is Reason.SEVERAL_TIMEPOINTS
    assert error.detail == "2 possible pairs: series 4 with series 9; series 14 with series 19"
    study = study_of(tmp_path, pair.pre, pair.low, pre, low)
    first = choose_pair(study, uid(0, "pre"), uid(0, "low"))
    second = choose_pair(study, low_series_uid=uid("low again"))
    assert [(found.pre.label, found.low.label) for found in (first, second)] == [
        ("series 4", "series 9"),
        ("series 14", "series 19"),
    ]


@pytest.mark.parametrize("when", [EVENING, NEXT_DAY])
def test_halves_of_two_visits_are_no_pair(tmp_path: Path, when: dict[str, str]) -> None:
    pair = healthy(low_changes=when)
    error = refused(tmp_path, pair.pre, pair.low)
    assert error.reason is Reason.SEVERAL_TIMEPOINTS
    assert error.detail.startswith("series 4 and series 9 were acquired ")


def test_a_second_visit_with_half_a_pair_leaves_the_first_alone(tmp_path: Path) -> None:
    pair = healthy()
    found = choose_pair(study_of(tmp_path, pair.pre, pair.low, again(pair, **EVENING)[1]))
    assert (found.pre.label, found.low.label) == ("series 4", "series 9")


def test_one_visit_over_midnight_is_one_visit(tmp_path: Path) -> None:
    late = {"AcquisitionTime": "235500", "SeriesTime": "235500", "ContentTime": "235500"}
    early = {**NEXT_DAY, "AcquisitionTime": "001500", "SeriesTime": "001500", "ContentTime": "001500"}
    pair = healthy(pre_changes=late, low_changes={**early, "ContrastBolusStartTime": "000500"})
    study = study_of(tmp_path, pair.pre, pair.low)
    assert hours_apart(*study.series) == pytest.approx(1 / 3)
    assert choose_pair(study).pre.label == "series 4"


def test_the_date_and_time_of_enhanced_frames_count(tmp_path: Path) -> None:
    pair = healthy(low_changes=EVENING)
    assert refused(tmp_path, [as_enhanced(pair.pre)], [as_enhanced(pair.low)]).reason is Reason.SEVERAL_TIMEPOINTS


def test_images_without_times_are_left_to_the_other_witnesses(tmp_path: Path) -> None:
    nothing = {f"{event}{part}": None for event in ("Acquisition", "Series", "Content") for part in ("Date", "Time")}
    pair = healthy(low_changes=nothing)
    assert choose_pair(study_of(tmp_path, pair.pre, pair.low)).pre.label == "series 4"


@pytest.mark.parametrize(
    ("body_part", "description", "expected"),
    [
        ("BRAIN", "t1_mprage_sag", ""),
        ("HEAD", "T1 SPACE C-SPINE sag", "spine"),
        ("CSPINE", "T1 3D", "cspine"),
        ("SPINE", "t1 mprage brain", ""),  # set once for the whole exam; the description knows better
        ("HEAD_NECK", "T1 3D", ""),
        ("HEAD", "T1 head neck", ""),
        ("", "T1 HWS km", "hws"),
        ("KNEE", "pd_fs_sag", "knee"),
        ("SOMETHING ELSE", "T1 3D", ""),
        ("", "", ""),
    ],
)
def test_the_body_part_is_read_from_description_and_body_part_examined(
    body_part: str, description: str, expected: str
) -> None:
    header = Dataset()
    header.BodyPartExamined, header.SeriesDescription = body_part, description
    assert other_body_part(header) == expected


def test_a_pair_of_the_spine_beside_one_of_the_head_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    pair = healthy()
    spine = [
        another(datasets, name, SeriesNumber=number, BodyPartExamined="CSPINE")
        for datasets, name, number in ((pair.pre, "spine", "21"), (pair.low, "spine km", "22"))
    ]
    found = choose_pair(study_of(tmp_path, pair.pre, pair.low, *spine))
    assert (found.pre.label, found.low.label) == ("series 4", "series 9")
    assert "series 21: images of another body part (cspine)" in found.set_aside


def test_intake_does_not_wait_because_of_a_second_pair_of_another_body_part() -> None:
    pair = healthy()
    series = {
        "pre": pair.pre,
        "low": pair.low,
        "spine": another(pair.pre, "spine", BodyPartExamined="CSPINE"),
        "spine km": another(pair.low, "spine km", BodyPartExamined="CSPINE"),
    }
    summaries = {name: [HeaderSummary.of(dataset) for dataset in datasets] for name, datasets in series.items()}
    assert find_pair(summaries) == ("pre", "low")


def test_a_study_of_nothing_but_another_body_part_is_rejected_by_name(tmp_path: Path) -> None:
    part = {"BodyPartExamined": "LSPINE"}
    pair = healthy(pre_changes=part, low_changes=part)
    error = refused(tmp_path, pair.pre, pair.low)
    assert error.reason is Reason.OTHER_BODY_PART
    assert "series 4: images of another body part (lspine)" in error.detail
