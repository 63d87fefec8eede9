"""What the headers say about dose, agent, field strength and sequence, and what they leave unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.core.errors import Permanent, Reason
from tests.factories import write_study
from worker.acquisition import Acquisition, check_acquisition, read_acquisition
from worker.pairing import choose_pair
from worker.study import read_study


def acquired(folder: Path, **options: Any) -> Acquisition:
    return read_acquisition(choose_pair(read_study(write_study(folder, rows=6, columns=6, **options))))


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
    ],
)
def test_the_dose_follows_from_volume_agent_and_weight(
    tmp_path: Path, amount: tuple[str, str, str | None, str], dose: float
) -> None:
    agent, volume, concentration, weight = amount
    found = acquired(tmp_path, agent=agent, volume_ml=volume, concentration=concentration, weight_kg=weight)
    assert found.dose_mmol_per_kg.value == pytest.approx(dose, rel=0.002)


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
        ("GADOVIST 7,5ML", "gadobutrol"),
        ("Clariscan", "gadoterate"),
        ("Gd-DOTA", "gadoterate"),
        ("ProHance", "gadoteridol"),
        ("ELUCIREM", "gadopiclenol"),
        ("Primovist", "gadoxetate"),
        ("CE", None),
        ("YES", None),
        ("KM", None),
        ("8 ml", None),
        ("Gadovist/Dotarem", None),
    ],
)
def test_spellings_of_agents_are_recognised_and_non_answers_are_not(
    tmp_path: Path, spelling: str, name: str | None
) -> None:
    assert acquired(tmp_path, agent=spelling).agent.value == name


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
        ("1.4939999580383", "63.6", 1.4939999580383),
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
def test_field_strength_is_kept_as_written_or_unknown(
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
