"""What the headers say about dose, agent, field strength and sequence, and what they leave unknown."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from service.core.dicom.site_rules import SiteRule
from service.core.errors import Permanent, Reason
from tests.factories import as_enhanced, encode, make_pair, write_study
from worker.choose.acquisition import Acquisition, check_acquisition, read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.read.known import Known
from worker.read.study import read_study


def acquired(folder: Path, rules: Sequence[SiteRule] = (), **options: Any) -> Acquisition:
    return read_acquisition(choose_pair(read_study(write_study(folder, rows=6, columns=6, **options), rules)))


@pytest.mark.parametrize(
    ("amount", "dose"),
    [
        (("gadobutrol", "8", None, "80"), 0.100),
        (("gadobutrol", "0.8", "157.25", "80"), 0.010),  # mg of gadolinium per mL
        (("gadobutrol", "0.8", "604.72", "80"), 0.010),  # mg of agent per mL
        (("gadobutrol", "0.8", "1", "80"), 0.010),  # mmol per mL
        (("Dotarem", "4", None, "80"), 0.025),
        (("Dotarem", "4", "78.6", "80"), 0.025),
        (("Vueway", "2.0", None, "80"), 0.0125),
        (("Magnevist", "4.95", None, "75"), 0.033),
        (("Gadovist 1.0", "2,4", None, "80,0"), 0.030),  # decimal commas
        (("Eovist", "8", "0.25", "80"), 0.025),
        (("gadobutrol", "1.6", "78.625", "80"), 0.010),  # diluted to half
    ],
)
def test_the_dose_follows_from_volume_agent_and_weight(
    tmp_path: Path, amount: tuple[str, str, str | None, str], dose: float
) -> None:
    agent, volume, concentration, weight = amount
    found = acquired(tmp_path, agent=agent, volume_ml=volume, concentration=concentration, weight_kg=weight)
    assert found.dose_mmol_per_kg.value == pytest.approx(dose, rel=0.002)


@pytest.mark.parametrize("text", ["GADAVIST 2ML/S", "Gadovist 1 ml/10 kg", "Gadovist 1mmol/1ml", "Gadovist 2 ml / sec"])
def test_a_rate_or_a_strength_in_free_text_is_no_volume(tmp_path: Path, text: str) -> None:
    found = acquired(tmp_path, agent=text, volume_ml=None, weight_kg="70")
    assert (found.volume_ml.value, found.dose_mmol_per_kg.value) == (None, None)


def test_agent_and_volume_in_one_free_text_are_found_where_the_volume_tag_says_zero(tmp_path: Path) -> None:
    found = acquired(
        tmp_path, agent="4,2 ml Omniscan", volume_ml="0", weight_kg="70", field_strength_t="1.4939999580383"
    )
    assert found.agent.value == "gadodiamide"
    assert found.volume_ml.value == 4.2
    assert found.dose_mmol_per_kg.value == pytest.approx(0.030)
    assert "text (0018,0010)" in found.dose_mmol_per_kg.source


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("GADAVIST", "gadobutrol"),
        ("Gadovist", "gadobutrol"),
        ("Gadovist 1.0", "gadobutrol"),
        ("gadobutrol", "gadobutrol"),
        ("DOTAREM", "gadoterate"),
        ("Artirem", "gadoterate"),
        ("gadoterate", "gadoterate"),
        ("gadoteridol", "gadoteridol"),
        ("Vueway", "gadopiclenol"),
        ("gadopiclenol", "gadopiclenol"),
        ("MultiHance", "gadobenate"),
        ("gadobenate", "gadobenate"),
        ("Eovist", "gadoxetate"),
        ("Magnevist", "gadopentetate"),
        ("  omniscan ", "gadodiamide"),
        ("GADOVIST 7,5ML", "gadobutrol"),
        ("Clariscan", "gadoterate"),
        ("Gd-DOTA", "gadoterate"),
        ("ProHance", "gadoteridol"),
        ("ELUCIREM", "gadopiclenol"),
        ("Primovist", "gadoxetate"),
        ("CE", None),
        ("YES", None),
        ("KM", None),
        ("", None),
        ("Y", None),
        ("GD", None),
        ("GADO", None),
        ("IV", None),
        ("CONTRAST", None),
        ("0.1mmol/kg", None),
        ("LD brain", None),
        ("8 ml", None),
        ("Gadovist/Dotarem", None),
    ],
)
def test_spellings_of_agents_are_recognised_and_non_answers_are_not(
    tmp_path: Path, spelling: str, name: str | None
) -> None:
    assert acquired(tmp_path, agent=spelling).agent.value == name


def test_a_real_header_with_agent_and_volume_in_one_text_is_read(tmp_path: Path) -> None:
    path = get_testdata_file("examples_overlay.dcm")
    assert isinstance(path, str)
    (series,) = read_study([Path(path)]).series
    assert (series.header.ContrastBolusAgent, series.header.ContrastBolusVolume) == ("11 ml Omniscan", 0)
    injection = series.facts.injection
    assert (injection.agent.value, injection.volume_ml.value) == ("gadodiamide", 11)
    dose = injection.dose(Known(80.0, "told"))
    assert dose.value == pytest.approx(11 * 0.5 / 80)
    field = read_acquisition(Pair(series, series)).field_strength_t
    assert field.value == 1.5
    assert field.source == "tag (0018,0087), where 1.494 is written"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (("407976008", "SCT", "x"), "gadobutrol"),
        (("353946009", "SCT", "x"), "gadoteridol"),
        (("792865009", "SCT", "x"), "gadobenate"),
        (("440223009", "SCT", "x"), "gadoxetate"),
        (("109216000", "SCT", "x"), "gadopentetate"),
        (("354088005", "SCT", "x"), "gadodiamide"),
        (("409477004", "SCT", "x"), "gadoversetamide"),
        (("C-B0415", "SRT", "x"), "gadobutrol"),  # the older codes of the same agents
        (("C-F06BC", "SRT", "x"), "gadoterate"),
        (("1", "99SITE", "Elucirem"), "gadopiclenol"),  # no code of its own in the standard
        (("7140000", "SCT", "Contrast agent"), None),
        (("768763008", "SCT", "Gadolinium"), None),
        (("1", "99SITE", "Iohexol"), None),
        (("407976008", "SCT", "Dotarem"), None),  # code and meaning disagree
    ],
)
def test_codes_of_agents_are_recognised(tmp_path: Path, code: tuple[str, str, str], name: str | None) -> None:
    assert acquired(tmp_path, agent="CE", agent_code=code).agent.value == name


def test_a_code_for_contrast_agents_in_general_leaves_it_to_the_text(tmp_path: Path) -> None:
    found = acquired(tmp_path, agent="Gadovist", agent_code=("7140000", "SCT", "Contrast agent"))
    assert (found.agent.value, found.agent.source) == ("gadobutrol", "text (0018,0010)")


def enhanced(folder: Path, edit: Callable[[Dataset], None]) -> Acquisition:
    """A pair in which the low-dose series is one Enhanced MR object, edited."""
    pair = make_pair(rows=6, columns=6)
    low = as_enhanced(pair.low)
    edit(low)
    for n, dataset in enumerate([*pair.pre, low]):
        (folder / f"{n}.dcm").write_bytes(encode(dataset))
    return read_acquisition(choose_pair(read_study(sorted(folder.glob("*.dcm")))))


def phases(*volumes: str) -> list[Dataset]:
    """An administration profile."""
    found = []
    for volume in volumes:
        found.append(Dataset())
        found[-1].ContrastBolusVolume = volume
    return found


def test_the_phases_of_an_injection_add_up_and_may_not_contradict_its_volume(tmp_path: Path) -> None:
    def of_phases(multi: Dataset) -> None:
        multi.ContrastBolusAgentSequence[0].ContrastBolusVolume = None
        multi.ContrastBolusAgentSequence[0].ContrastAdministrationProfileSequence = phases("1.5", "0.5")

    def contradicting(multi: Dataset) -> None:
        multi.ContrastBolusAgentSequence[0].ContrastAdministrationProfileSequence = phases("4", "4")

    (tmp_path / "sum").mkdir()
    assert enhanced(tmp_path / "sum", of_phases).dose_mmol_per_kg.value == pytest.approx(0.025)
    (tmp_path / "not").mkdir()
    dose = enhanced(tmp_path / "not", contradicting).dose_mmol_per_kg
    assert dose.value is None
    assert "2 mL against 8 mL in the administration profile" in dose.source


def test_an_agent_that_was_not_yet_given_does_not_count(tmp_path: Path) -> None:
    def split(multi: Dataset) -> None:
        second = copy.deepcopy(multi.ContrastBolusAgentSequence[0])
        second.ContrastBolusAgentNumber, second.ContrastBolusVolume = 2, "6"
        multi.ContrastBolusAgentSequence.append(second)
        usage = copy.deepcopy(multi.SharedFunctionalGroupsSequence[0].ContrastBolusUsageSequence[0])
        usage.ContrastBolusAgentNumber, usage.ContrastBolusAgentAdministered = 2, "NO"
        multi.SharedFunctionalGroupsSequence[0].ContrastBolusUsageSequence.append(usage)

    found = enhanced(tmp_path, split)
    assert found.volume_ml.value == 2.0
    assert found.dose_mmol_per_kg.value == pytest.approx(0.025)


RULE = SiteRule(name="ld", series_description="*KM", agent="gadobutrol", dose_mmol_per_kg=0.025)


@pytest.mark.parametrize(
    ("options", "dose", "source"),
    [
        ({"volume_ml": None}, 0.025, "site file (ld); no volume"),
        ({"weight_kg": "0"}, 0.025, "site file (ld); tag (0010,1030) is implausible: 0"),
        ({"agent": "LD brain", "volume_ml": "2"}, 0.025, "(0018,1041), assumes undiluted"),  # with the site's agent
        ({"volume_ml": "2.2"}, 0.0275, "site file (ld) agrees"),
        ({"volume_ml": "4"}, None, "0.0500 mmol/kg by tag (0018,1041)"),
        ({"volume_ml": "80"}, None, "implausible"),  # never replaced
        ({"volume_ml": "2", "total_dose_ml": "4"}, None, "disagree"),
        ({"agent": "Dotarem", "volume_ml": None}, 0.025, "site file (ld)"),
    ],
)
def test_a_protocol_fills_in_what_the_header_leaves_open_and_replaces_nothing(
    tmp_path: Path, options: dict[str, Any], dose: float | None, source: str
) -> None:
    found = acquired(tmp_path, [RULE], **options)
    assert found.dose_mmol_per_kg.value == (dose if dose is None else pytest.approx(dose))
    assert source in found.dose_mmol_per_kg.source


def test_an_agent_of_the_site_file_needs_a_header_that_names_no_other(tmp_path: Path) -> None:
    agent = acquired(tmp_path / "named", [RULE], agent="Dotarem").agent
    assert (agent.value, agent.source) == (None, "unknown: text (0018,0010) and site file (ld) disagree")
    agent = acquired(tmp_path / "short", [RULE], agent="LD brain").agent
    assert agent.value == "gadobutrol"
    assert agent.source == "site file (ld); tag (0018,0010) names no known agent"
    two = SiteRule(name="other", station_name="*", agent="gadoterate")
    agent = acquired(tmp_path / "two", [RULE, two], agent="LD brain").agent
    assert agent.source == "unknown: site file: ld and other disagree"


KEPT = {"SeriesNumber", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "MRAcquisitionType"}


def test_the_headers_are_read_once_and_asked_neither_for_the_choice_nor_for_the_acquisition(tmp_path: Path) -> None:
    paths = write_study(tmp_path, rows=6, columns=6, volume_ml="2.2", odd=["localizer"])
    pair = choose_pair(read_study(paths, [RULE]))
    study = read_study(paths, [RULE])
    for plane in (plane for series in study.series for plane in series.planes):
        for tag in [element.tag for element in plane.header if element.keyword not in KEPT]:
            del plane.header[tag]
    again = choose_pair(study)
    assert (again.witnesses, again.set_aside, again.likeness) == (pair.witnesses, pair.set_aside, pair.likeness)
    assert read_acquisition(again) == read_acquisition(pair)
    assert read_acquisition(again).dose_mmol_per_kg.source.endswith("site file (ld) agrees")


def test_a_code_names_the_agent_where_the_text_does_not(tmp_path: Path) -> None:
    found = acquired(tmp_path, agent="CE", agent_code=("712714000", "SCT", "Gadoterate meglumine"), volume_ml="4")
    assert (found.agent.value, found.agent.source) == ("gadoterate", "code (0018,0012)")
    assert found.dose_mmol_per_kg.value == pytest.approx(0.025)


def test_code_and_text_that_disagree_leave_the_agent_unknown(tmp_path: Path) -> None:
    found = acquired(tmp_path, agent="Gadovist", agent_code=("712714000", "SCT", "Gadoterate meglumine"))
    assert found.agent.value is None
    assert found.dose_mmol_per_kg.value is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weight_kg": None}, "missing"),
        ({"weight_kg": "0"}, "implausible"),
        ({"weight_kg": "8000"}, "implausible"),
        ({"volume_ml": "0"}, "no volume"),
        ({"volume_ml": None}, "no volume"),
        ({"volume_ml": "80"}, "implausible"),
        ({"volume_ml": "0.01"}, "implausible"),
        ({"volume_ml": "2", "total_dose_ml": "4"}, "disagree"),
        ({"agent": "Gadovist 8 ml", "volume_ml": "2"}, "disagree"),
        ({"agent": "Dotarem", "volume_ml": "4", "concentration": "1"}, "does not fit"),
        ({"volume_ml": "2", "concentration": "300"}, "does not fit"),
        ({"agent": "YES"}, "names no known agent"),
    ],
)
def test_a_dose_that_is_missing_implausible_or_contradicted_is_unknown_and_says_why(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    found = acquired(tmp_path, **options)
    assert found.dose_mmol_per_kg.value is None
    assert why in found.dose_mmol_per_kg.source


def test_total_dose_and_volume_that_agree_give_the_dose_of_the_undiluted_agent(tmp_path: Path) -> None:
    found = acquired(tmp_path, volume_ml="2.1", total_dose_ml="2")
    assert found.dose_mmol_per_kg.value == pytest.approx(0.025)
    assert "(0018,1044)" in found.dose_mmol_per_kg.source


def test_a_dose_written_as_text_needs_no_weight(tmp_path: Path) -> None:
    found = acquired(tmp_path, agent="Dotarem 0,025 mmol/kg", volume_ml=None, weight_kg=None)
    assert found.dose_mmol_per_kg.value == 0.025


@pytest.mark.parametrize(
    ("written", "frequency", "value"),
    [
        ("3", "123.25", 3.0),
        ("1.4939999580383", "63.6", 1.5),
        ("1.5", None, 1.5),
        ("30000", "123.25", 3.0),  # gauss, confirmed
        ("15000", None, None),  # gauss, unconfirmed
        ("30000", "63.9", None),
        ("3", "63.9", None),  # contradicted
        ("0", None, None),
        ("15", None, None),
        (None, "123.25", None),  # never derived where nothing is stated
    ],
)
def test_field_strength_is_that_of_the_magnet_or_unknown(
    tmp_path: Path, written: str | None, frequency: str | None, value: float | None
) -> None:
    changes = {"ImagingFrequency": frequency}
    found = acquired(tmp_path, field_strength_t=written, pre_changes=changes, low_changes=changes)
    assert found.field_strength_t.value == value


def test_series_that_contradict_each_other_leave_field_strength_unknown(tmp_path: Path) -> None:
    changes = {"MagneticFieldStrength": "1.5", "ImagingFrequency": None}
    found = acquired(tmp_path, pre_changes=changes, low_changes={"ImagingFrequency": None})
    assert found.field_strength_t.value is None


@pytest.mark.parametrize("sequence", ["MPRAGE", "SPGR", "SE"])
@pytest.mark.parametrize("vendor", ["siemens", "ge", "philips"])
def test_the_sequence_class_is_read_from_the_pulse_sequence_tags(tmp_path: Path, sequence: str, vendor: str) -> None:
    description = {"pre_description": "T1 3D", "low_description": "T1 3D KM"}
    changes = {"SequenceName": None}
    found = acquired(
        tmp_path, sequence=sequence, vendor=vendor, pre_changes=changes, low_changes=changes, **description
    )
    assert found.sequence.value == sequence


def test_an_inversion_prepared_spoiled_gradient_echo_of_ge_counts_as_mprage(tmp_path: Path) -> None:
    changes = {"InversionTime": "450"}
    found = acquired(tmp_path, sequence="SPGR", vendor="ge", pre_changes=changes, low_changes=changes)
    assert found.sequence.value == "MPRAGE"


TIMES = ("repetition_time_s", "echo_time_s", "inversion_time_s", "flip_angle_deg")
GE_BRAVO = {"RepetitionTime": "8.0", "EchoTime": "3.1", "InversionTime": "450", "FlipAngle": "12"}


def timing(found: Acquisition) -> tuple[float | None, ...]:
    return tuple(getattr(found, name).value for name in TIMES)


def test_the_times_of_an_inversion_train_are_read_as_the_vendor_writes_them(tmp_path: Path) -> None:
    siemens = acquired(tmp_path / "siemens")
    assert timing(siemens) == (2.3, 0.00298, 0.9, 9.0)
    assert [getattr(siemens, name).source for name in TIMES] == [
        "tag (0018,0080)",
        "tag (0018,0081)",
        "tag (0018,0082)",
        "tag (0018,1314)",
    ]
    ge = acquired(tmp_path / "ge", sequence="SPGR", vendor="ge", pre_changes=GE_BRAVO, low_changes=GE_BRAVO)
    assert timing(ge) == (0.008, 0.0031, 0.45, 12.0)
    philips = acquired(tmp_path / "philips", sequence="SPGR", vendor="philips")
    assert timing(philips) == (0.0082, 0.0032, None, 12.0)
    assert philips.inversion_time_s.source == "unknown: tag (0018,0082) is missing or no number"


@pytest.mark.parametrize("sequence", ["MPRAGE", "SPGR", "SE"])
def test_enhanced_mr_states_the_same_times_in_its_functional_groups(tmp_path: Path, sequence: str) -> None:
    pair = make_pair(rows=6, columns=6, sequence=sequence)
    found = []
    for form in (lambda series: series, lambda series: [as_enhanced(series)]):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        for n, dataset in enumerate([*form(pair.pre), *form(pair.low)]):
            (folder / f"{n}.dcm").write_bytes(encode(dataset))
        found.append(timing(read_acquisition(choose_pair(read_study(sorted(folder.glob("*.dcm")))))))
    assert found[1] == found[0]
    assert found[1][0] is not None


@pytest.mark.parametrize(
    ("changes", "low", "unknown", "why"),
    [
        ({"InversionTime": "0"}, {}, {"inversion_time_s"}, "implausible: 0"),  # Philips and GE write it for none
        ({"FlipAngle": ""}, {}, {"flip_angle_deg"}, "missing or no number"),
        ({"EchoTime": "4500"}, {}, {"echo_time_s"}, "implausible: 4500"),
        ({"RepetitionTime": "2.3"}, {}, {"repetition_time_s", "echo_time_s"}, "is not shorter than"),  # in seconds
        ({}, {"FlipAngle": "9.6"}, {"flip_angle_deg"}, "differs between the two series"),
        ({}, {"EchoTime": "3.02"}, set(), ""),  # the shortest echo of another matrix or bandwidth
    ],
)
def test_times_that_are_zero_absent_implausible_or_contradicted_are_unknown_and_say_why(
    tmp_path: Path, changes: dict[str, str], low: dict[str, str], unknown: set[str], why: str
) -> None:
    pair = make_pair(rows=6, columns=6, pre_changes=changes, low_changes=changes | low)
    (tmp_path / "pair").mkdir()
    series = []
    for n, datasets in enumerate((pair.pre, pair.low)):
        paths = [tmp_path / "pair" / f"{n}{k}.dcm" for k in range(len(datasets))]
        for path, dataset in zip(paths, datasets, strict=True):
            path.write_bytes(encode(dataset))
        series += read_study(paths).series
    found = read_acquisition(Pair(*series))
    assert {name for name in TIMES if getattr(found, name).value is None} == unknown
    assert all(why in getattr(found, name).source for name in unknown)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"field_strength_t": None}, Reason.UNKNOWN_FIELD_STRENGTH),
        ({"agent": "CE"}, Reason.UNKNOWN_AGENT),
        ({"weight_kg": None}, Reason.UNKNOWN_DOSE),
        ({"volume_ml": "8"}, Reason.STANDARD_DOSE),
        ({"agent": "Vueway", "volume_ml": "8"}, Reason.STANDARD_DOSE),  # 0.05 mmol/kg is the standard of gadopiclenol
    ],
)
def test_what_is_unknown_or_standard_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], reason: Reason
) -> None:
    found = acquired(tmp_path, **options)
    with pytest.raises(Permanent) as refusal:
        check_acquisition(found)
    assert refusal.value.reason is reason


def test_a_site_may_allow_the_dose_to_be_unknown(tmp_path: Path) -> None:
    found = acquired(tmp_path, weight_kg=None)
    check_acquisition(found, allow_unknown={"dose"})
    assert found.dose_mmol_per_kg.value is None


def test_a_healthy_low_dose_pair_passes(tmp_path: Path) -> None:
    found = acquired(tmp_path)
    check_acquisition(found)
    assert found.dose_mmol_per_kg.value == pytest.approx(0.025)
    assert found.weight_kg.source == "tag (0010,1030)"
