"""The site's own rules: what they match, what they say together, and how a mistake in them is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lowgad import main
from service.core.dicom.site_rules import SiteRule, names_of, role_of, stated
from service.core.settings import Settings, SettingsError
from tests.factories import make_pair

SITE = """# brain protocols
[[protocols]]
name = "scanner 1"
station_name = "mr*"
agent = "gadoterate"

[[protocols]]
name = "low dose"
protocol_name = "T1*lowdose"
series_description = "*"
role = "low"
dose_mmol_per_kg = 0.025
"""
NAMES = {"protocol_name": "t1_mprage_LOWDOSE", "series_description": "t1", "station_name": "MR7"}


def load(folder: Path, text: str) -> Settings:
    (folder / "site.toml").write_text(text)
    return Settings.load({"LOWGAD_SITE_FILE": str(folder / "site.toml")})


def test_all_rules_that_match_count_and_case_does_not_matter(tmp_path: Path) -> None:
    rules = load(tmp_path, SITE).protocols
    assert stated(rules, NAMES, "agent") == {"gadoterate": "scanner 1"}
    assert stated(rules, NAMES, "dose_mmol_per_kg") == {0.025: "low dose"}
    assert role_of(rules, NAMES) == "low"
    other = NAMES | {"protocol_name": "t1_mprage"}
    assert (role_of(rules, other), stated(rules, other, "agent")) == ("", {"gadoterate": "scanner 1"})


def test_every_pattern_of_a_rule_has_to_fit() -> None:
    rule = SiteRule(name="x", protocol_name="t1*", station_name="MR1", role="pre")
    assert not rule.matches(NAMES)
    assert rule.matches(NAMES | {"station_name": "mr1"})


def test_rules_that_disagree_are_not_decided_by_their_order() -> None:
    rules = [
        SiteRule(name="one", station_name="MR?", role="low"),
        SiteRule(name="two", series_description="t1", role="pre"),
    ]
    assert stated(rules, NAMES, "role") == {"low": "one", "pre": "two"}
    assert role_of(rules, NAMES) == "unclear"


def test_rules_are_compared_with_what_the_header_names() -> None:
    header = make_pair(pre_changes={"ProtocolName": "BRAIN/T1 ", "StationName": None}).pre[0]
    names = {"protocol_name": "BRAIN/T1", "series_description": "t1_mprage_sag", "station_name": ""}
    assert names_of(header) == names


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('role = "low"', 'role = "lo"', "line 11: protocols.1.role: "),
        ("dose_mmol_per_kg = 0.025", "dose_mmol_per_kg = 2.5", "line 12: protocols.1.dose_mmol_per_kg: "),
        ("dose_mmol_per_kg", "dose_mmol_kg", "line 12: protocols.1.dose_mmol_kg: unknown key; did you mean dose_mmol"),
        ('"gadoterate"', '"Dotarem"', "line 5: protocols.0.agent: "),
        ('agent = "gadoterate"', "", "line 2: protocols.0: says nothing: give one of role, agent, dose_mmol_per_kg"),
        ('station_name = "mr*"', "", "line 2: protocols.0: no pattern: give one of protocol_name"),
        ('name = "scanner 1"', "", "line 2: protocols.0.name: "),
        ('role = "low"', 'role = "pre"', "line 7: protocols.1: a series of the role pre has neither agent nor dose"),
        ('"low dose"', '"scanner 1"', "two protocols share a name"),
        ("[[protocols]]\nname", "[[protocolls]]\nname", "unknown setting protocolls; did you mean protocols?"),
        ('station_name = "mr*"', "station_name = mr*", "(at line 4, column 16)"),
    ],
)
def test_a_mistake_in_the_site_file_is_told_with_line_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, SITE.replace(old, new, 1))
    assert told in str(caught.value)


def test_two_rules_with_the_same_patterns_may_not_disagree(tmp_path: Path) -> None:
    again = SITE + '\n[[protocols]]\nname = "again"\nstation_name = "mr*"\nagent = "gadobutrol"\n'
    with pytest.raises(SettingsError, match="protocols scanner 1 and again have the same patterns and disagree"):
        load(tmp_path, again)


def test_the_doctor_counts_the_rules_and_finds_a_dose_that_is_standard(tmp_path: Path) -> None:
    def doctor(text: str) -> str:
        (tmp_path / "site.toml").write_text(text)
        environ = {"LOWGAD_DATA_DIR": str(tmp_path), "LOWGAD_SITE_FILE": str(tmp_path / "site.toml")}
        return CliRunner().invoke(main, ["doctor"], env=environ).output

    assert "ok    protocols: 2 in the site file" in doctor(SITE)
    assert "FAIL  protocols: low dose: 0.1 mmol/kg is about the standard dose" in doctor(SITE.replace("0.025", "0.1"))
    assert "line 11: protocols.1.role" in doctor(SITE.replace('"low"', '"lo"'))
