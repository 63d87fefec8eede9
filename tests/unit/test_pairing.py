"""Who is pre-contrast and who is low dose, and when nobody can say."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.quality import LIMITS, Verdict
from service.core.dicom.site_rules import SiteRule
from service.core.errors import Permanent, Reason
from tests.factories import SyntheticPair, another, as_enhanced, make_pair, uid
from tests.factories.reading import study_of
from worker.choose.pairing import Pair, choose_pair, image_witness
from worker.read.study import Study, find_files, read_study


def chosen(folder: Path, *series: Sequence[Dataset]) -> tuple[str, str]:
    pair = choose_pair(study_of(folder, *series))
    return pair.pre.label, pair.low.label


NO_TIMES = {f"{event}Time": None for event in ("Acquisition", "Series", "Content")}


def refused(study: Study, **named: Any) -> Permanent:
    with pytest.raises(Permanent) as error:
        choose_pair(study, **named)
    return error.value


RULES = (
    SiteRule(name="before", series_description="*_a", role="pre"),
    SiteRule(name="after", series_description="*_b", role="low"),
)


def halves(**options: Any) -> tuple[list[Dataset], list[Dataset]]:
    pair = healthy(**options)
    return pair.pre, pair.low


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
        ("頭部 造影前 T1強調", "頭部 造影後 T1強調"),
        ("脳単純MPRAGE", "脳MPRAGE造影"),
        ("T1 非造影", "Gd造影\uff34\uff11"),
        ("T1 造影剤なし", "T1 造影 前額断"),  # the frontal plane
        ("T1 MPRAGE 平扫", "T1 MPRAGE增强"),
        ("T1加权 增强前", "T1加权 增强后"),
        ("3D T1 平掃", "3D T1 打藥後"),
        ("T1", "T1 增强"),
        ("造影前頭部T1", "造影後頭部T1"),
        ("T1 造影剤なし", "T1 造影 前頭葉"),  # the frontal lobe
        ("T1 造影剤投与前", "T1 造影剤投与後"),
        ("T1 造影剤静注前", "T1 造影検査"),
        ("T1 增强扫描前", "T1 增强扫描后"),
        ("T1 不增强", "T1 增强前颅窝"),  # the anterior cranial fossa
        ("T1 造影せず", "T1 造影(+)"),
        ("T1 造影\uff08\uff0d\uff09", "T1 造影\uff08\uff0b\uff09"),
        ("t1_mpr_ns_sag", "t1_mpr_ns_sag_KM"),  # short for MPRAGE; reformatted images say so in ImageType
    ],
)
def test_words_and_times_decide_where_the_console_wrote_the_agent_everywhere(
    tmp_path: Path, pre: str, low: str
) -> None:
    entered = {"agent": "Gadovist", "pre_changes": {"ContrastBolusAgent": "Gadovist"}}
    pair = healthy(pre_description=pre, low_description=low, charset="ISO_IR 192", **entered)
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


def test_an_examination_that_names_both_in_every_description_says_nothing(tmp_path: Path) -> None:
    both = {"pre_description": "头颅平扫+增强", "low_description": "头颅平扫+增强", "charset": "ISO_IR 192"}
    assert "words of the description: silent" in choose_pair(study_of(tmp_path, *halves(**both))).witnesses


@pytest.mark.parametrize("word", ["なし", "无", "NONE"])
def test_an_agent_that_says_none_in_any_language_is_no_contrast(tmp_path: Path, word: str) -> None:
    pair = halves(pre_changes={"ContrastBolusAgent": word}, charset="ISO_IR 192")
    witnesses = choose_pair(study_of(tmp_path, *pair)).witnesses
    assert "contrast attributes: series 4 is pre-contrast" in witnesses


@pytest.mark.parametrize("written", ["20240105{}", "20240105{}.120000", "20240105{}.5+0900"])
def test_an_acquisition_whose_time_stands_in_its_date_and_time_alone_has_a_time(tmp_path: Path, written: str) -> None:
    changes = [NO_TIMES | {"AcquisitionDateTime": written.format(clock)} for clock in ("100500", "101500")]
    found = choose_pair(study_of(tmp_path, *halves(pre_changes=changes[0], low_changes=changes[1])))
    assert "time of acquisition: series 4 is pre-contrast" in found.witnesses
    late = NO_TIMES | {"AcquisitionDateTime": written.format("140000")}
    (tmp_path / "late").mkdir()
    apart = refused(study_of(tmp_path / "late", *halves(pre_changes=changes[0], low_changes=late)))
    assert apart.reason is Reason.SEVERAL_TIMEPOINTS


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


@pytest.mark.parametrize(
    "witness",
    ["contrast attributes", "computed dose", "time of acquisition", "words of the description", "site file"],
)
def test_every_witness_is_heard_whether_the_pair_is_found_or_not(tmp_path: Path, witness: str) -> None:
    pair = healthy()
    study = study_of(tmp_path, pair.pre, pair.low)
    assert sum(line.startswith(f"{witness}: ") for line in choose_pair(study).witnesses) == 1
    (tmp_path / "late").mkdir()
    late = healthy(pre_changes={"AcquisitionTime": "110000"})
    error = refused(study_of(tmp_path / "late", late.pre, late.low))
    assert error.detail.startswith("series 4 as pre-contrast with series 9 as low dose: ")
    assert error.detail.count(f"{witness}: ") == 1
    assert "time of acquisition: series 9 is pre-contrast" in error.detail


def test_the_dose_counts_with_the_attributes_it_is_computed_from(tmp_path: Path) -> None:
    pair = healthy(pre_description="T1", low_description="T1", pre_changes=NO_TIMES, low_changes=NO_TIMES)
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "computed dose: series 4 has none, series 9 has 0.0250 mmol/kg" in error.detail


def test_two_different_doses_are_of_two_series_with_contrast_and_neither_is_the_pre_contrast(tmp_path: Path) -> None:
    entered = {"ContrastBolusAgent": "Gadovist", "ContrastBolusVolume": "1.0"}
    pair = healthy(pre_changes=entered)
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "0.0125 mmol/kg, series 9 has 0.0250 mmol/kg: neither is pre-contrast" in error.detail


def test_of_a_low_and_a_standard_dose_the_low_dose_is_the_partner(tmp_path: Path) -> None:
    pair = healthy()
    later = {"AcquisitionTime": "103000", "SeriesNumber": "12"}
    full = another(pair.low, "full", ContrastBolusVolume="8.0", **later)
    found = choose_pair(study_of(tmp_path, full, pair.low, pair.pre))
    assert (found.pre.label, found.low.label) == ("series 4", "series 9")
    assert "series 12: acquired at about the standard dose, 0.100 mmol/kg" in found.set_aside


def test_a_dose_split_into_injections_below_the_standard_is_left_to_a_person_and_says_so(tmp_path: Path) -> None:
    pair = healthy()
    more = another(pair.low, "more", ContrastBolusVolume="4.0", AcquisitionTime="103000", SeriesNumber="12")
    error = refused(study_of(tmp_path, pair.pre, pair.low, more))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert (
        "2 series follow series 4, by their headers with series 9 0.0250 mmol/kg, series 12 0.0500 mmol/kg: "
        "a dose in several injections cannot be told from repeated images, name the pair" in error.detail
    )


def test_roles_of_the_site_file_are_a_witness_like_the_others(tmp_path: Path) -> None:
    entered = {"ContrastBolusAgent": "Gadovist"}  # for the whole examination: attributes and dose are silent
    pair = healthy(pre_description="x_a", low_description="x_b", pre_changes=entered)
    assert refused(study_of(tmp_path, pair.pre, pair.low)).reason is Reason.AMBIGUOUS_SERIES
    found = choose_pair(study_of(tmp_path, pair.pre, pair.low, rules=RULES))
    assert "site file: series 4 is pre by before, series 9 is low by after" in found.witnesses
    (tmp_path / "swapped").mkdir()
    swapped = healthy(pre_description="x_b", low_description="x_a")
    error = refused(study_of(tmp_path / "swapped", swapped.pre, swapped.low, rules=RULES))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "site file: series 4 is low by after, series 9 is pre by before" in error.detail


def test_the_site_file_ignores_series_and_vouches_for_unusual_timing(tmp_path: Path) -> None:
    slow = {"RepetitionTime": "9000"}
    pair = healthy(
        sequence="SE",
        pre_description="x_a",
        low_description="x_b",
        pre_changes=slow,
        low_changes=slow,
        agent="Gadovist",
    )
    again = another(pair.low, "again", SeriesNumber="12", SeriesDescription="x_c")
    assert refused(study_of(tmp_path, pair.pre, pair.low, again)).reason is Reason.ONE_SERIES_ONLY
    ignored = SiteRule(name="repeats", series_description="x_c", role="ignore")
    found = choose_pair(study_of(tmp_path, pair.pre, pair.low, again, rules=(*RULES, ignored)))
    assert (found.pre.label, found.low.label) == ("series 4", "series 9")
    assert "series 12: ignored by the site file (repeats)" in found.set_aside


def test_rules_of_the_site_file_that_disagree_leave_it_to_a_person(tmp_path: Path) -> None:
    pair = healthy(pre_description="x_a", low_description="x_b")
    other = SiteRule(name="station", station_name="*", series_description="x_a", role="low")
    error = refused(study_of(tmp_path, pair.pre, pair.low, rules=(*RULES, other)))
    assert error.reason is Reason.AMBIGUOUS_SERIES
    assert "site file: before and station disagree about series 4" in error.detail


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
    assert found.witnesses[0] == "both series were named"
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


FSPGR = {"sequence": "SPGR", "vendor": "ge", "pre_description": "SAG 3D FSPGR", "low_description": "SAG 3D FSPGR +C"}
NO_INVERSION = {"pre_changes": {"InversionTime": "0"}}
AS_FLASH = {
    "SeriesDescription": "t1_fl3d_KM",
    "ProtocolName": "t1_fl3d_KM",
    "SequenceName": "*fl3d1",
    "ScanningSequence": "GR",
    "SequenceVariant": "SP",
    "InversionTime": None,
    "RepetitionTime": "8.2",
    "EchoTime": "3.2",
    "FlipAngle": "12",
}


@pytest.mark.parametrize("named", [{}, {"pre_series_uid": uid(0, "pre"), "low_series_uid": uid(0, "low")}])
@pytest.mark.parametrize(
    ("options", "figures"),
    [
        (FSPGR | NO_INVERSION | {"low_changes": {"InversionTime": "450"}}, {"sequence_class"}),  # all else is alike
        ({"low_changes": AS_FLASH}, {"sequence_class", "timing_change", "contrast_change"}),
        ({"low_changes": {"InversionTime": "830", "RepetitionTime": "2130"}}, {"contrast_change"}),
    ],
)
def test_unlike_sequences_are_refused_with_their_figures_whoever_named_them(
    tmp_path: Path, options: dict[str, Any], figures: set[str], named: dict[str, str]
) -> None:
    pair = healthy(**options)
    error = refused(study_of(tmp_path, pair.pre, pair.low), **named)
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert {row["name"] for row in error.report["quality"] if row["verdict"] == "refuse"} == figures
    assert all(f"{figure} is " in error.detail for figure in figures)
    assert "series 9 is " in error.detail


def test_a_like_series_is_preferred_to_an_unlike_one(tmp_path: Path) -> None:
    pair = healthy()
    fast = another(pair.low, "fast", SeriesNumber="7", InversionTime="700")
    assert chosen(tmp_path, pair.pre, fast, pair.low) == ("series 4", "series 9")


@pytest.mark.parametrize(
    "options",
    [
        {"low_changes": {"EchoTime": "3.05", "RepetitionTime": "2310"}},  # what a scanner fits to each series
        {"sequence": "SPGR", "vendor": "ge", "pre_description": "Sag BRAVO", "low_description": "Sag T1 POST"},
        {"low_changes": {"InversionTime": None}},  # stated once, and the class is plain without it
        FSPGR | {"low_changes": {"InversionTime": "450"}},  # stated once, and the class hangs on it
        FSPGR | {"low_changes": {"RepetitionTime": "2300"}, "pre_changes": {"RepetitionTime": "0"}},
        {"low_changes": {"RepetitionTime": "0", "EchoTime": "0", "InversionTime": "0", "FlipAngle": "0"}},
    ],
)
def test_a_like_pair_passes_whatever_its_headers_say_in_other_words(tmp_path: Path, options: dict[str, Any]) -> None:
    pair = choose_pair(study_of(tmp_path, *halves(**options)))
    assert {figure.verdict for figure in pair.likeness} == {Verdict.PASS}


def test_a_real_like_pair_passes_and_as_another_sequence_is_refused(tmp_path: Path) -> None:
    archive = Path(__file__).parents[3] / "shared" / "data" / "tcga-du-7294-lowdose33.zip"
    if not archive.exists():
        pytest.skip("the real case is not beside this checkout")
    zipfile.ZipFile(archive).extractall(tmp_path)
    pair = choose_pair(read_study(find_files(tmp_path)))
    assert {figure.verdict for figure in pair.likeness} == {Verdict.PASS}
    for plane in pair.low.planes:
        image = dcmread(plane.pixels.path)
        for keyword, value in AS_FLASH.items():
            setattr(image, keyword, value)
        image.save_as(plane.pixels.path)
    study = read_study(find_files(tmp_path))
    error = refused(study, pre_series_uid=pair.pre.series_uid, low_series_uid=pair.low.series_uid)
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert "series 9 is SPGR, RepetitionTime 8.2, EchoTime 3.2, FlipAngle 12" in error.detail


def test_one_series_with_philips_floating_point_scaling_and_one_without_are_no_pair(tmp_path: Path) -> None:
    pair = healthy(vendor="philips")
    for dataset in pair.low:
        dataset.remove_private_tags()
    error = refused(study_of(tmp_path, pair.pre, pair.low))
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert "scaling" in error.detail


@pytest.mark.parametrize(("excess", "says"), [(-0.002, "silent"), (-0.02, "is pre-contrast")])
def test_images_that_hardly_differ_are_no_witness(tmp_path: Path, excess: float, says: str) -> None:
    made = healthy()
    pair = choose_pair(study_of(tmp_path, made.pre, made.low))
    assert says in image_witness(pair, judged := [LIMITS["darkening"].judge("darkening", excess)])
    assert judged[0].verdict is Verdict.PASS  # brightening is what contrast does, however little
