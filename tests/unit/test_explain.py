"""`lowgad explain`: which series would be used and why, with nothing processed."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from lowgad import main
from tests.factories import uid, write_study

RULES = """[[protocols]]
name = "ld brain"
protocol_name = "*_KM"
role = "low"
dose_mmol_per_kg = 0.025
"""


def explain(study: Path, *options: str, **variables: str) -> Result:
    return CliRunner().invoke(main, ["explain", str(study), *options], env=variables, catch_exceptions=False)


def test_the_choice_and_every_value_are_told_with_their_reasons_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(RULES)
    magnet = {"MagneticFieldStrength": "1.494", "ImagingFrequency": "63.6"}
    paths = write_study(
        tmp_path / "study",
        odd=["localizer", "own_output"],
        volume_ml=None,
        weight_kg=None,
        pre_changes=magnet,
        low_changes=magnet,
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = explain(tmp_path / "study", LOWGAD_SITE_FILE=str(tmp_path / "site.toml"), LOWGAD_DATA_DIR=str(tmp_path))
    assert done.exit_code == 0
    for line in (
        f"  series 4, 8 images, {uid(0, 'pre')}",
        "    T1; no contrast agent; description silent",
        "    too few slices",
        "  8 x synthetic image (SyntheticData is YES, or lowgad made it)",
        "Pre-contrast is series 4, low dose is series 9",
        "  time of acquisition: series 4 is pre-contrast",
        "  site file: series 9 is low by ld brain",
        "  field strength: 1.5 T, from tag (0018,0087), where 1.494 is written",
        "  agent: gadobutrol, from text (0018,0010)",
        "  dose: 0.025 mmol/kg, from site file (ld brain); no volume, total dose or dose text",
        "  weight: unknown: tag (0010,1030) is missing or no number",
        "  repetition time: 2.3 s, from tag (0018,0080)",
        "  flip angle: 9 deg, from tag (0018,1314)",
    ):
        assert line in done.output.splitlines()
    assert done.output.splitlines()[-1] == "The study would be processed; its images are judged then"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(paths) > 16


def test_a_field_strength_that_its_frequency_contradicts_is_told_with_the_exit_code_of_a_run(tmp_path: Path) -> None:
    write_study(tmp_path / "study", field_strength_t="1.5")
    done = explain(tmp_path / "study")
    assert done.exit_code == 3
    assert "  field strength: unknown: tag (0018,0087) contradicts tag (0018,0084)" in done.output
    assert "NEEDS_REVIEW UNKNOWN_FIELD_STRENGTH: " in done.output


def test_witnesses_that_disagree_are_listed_one_to_a_line(tmp_path: Path) -> None:
    write_study(tmp_path / "study", pre_description="T1 POST", low_description="T1 PRE")
    done = explain(tmp_path / "study")
    assert done.exit_code == 3
    lines = done.output.splitlines()
    assert any(line.startswith("NEEDS_REVIEW AMBIGUOUS_SERIES: ") for line in lines)
    assert "  words of the description: series 9 is pre-contrast" in lines
    assert "  time of acquisition: series 4 is pre-contrast" in lines


def test_named_series_are_explained_as_a_run_would_take_them(tmp_path: Path) -> None:
    write_study(tmp_path / "study", pre_description="T1 POST", low_description="T1 PRE")
    done = explain(tmp_path / "study", "--pre-series", uid(0, "pre"), "--low-series", uid(0, "low"))
    assert done.exit_code == 0
    assert "  both series were named" in done.output.splitlines()


def test_a_study_that_is_rejected_says_so(tmp_path: Path) -> None:
    write_study(tmp_path / "study", odd=["pre_only"])
    done = explain(tmp_path / "study")
    assert done.exit_code == 4
    assert "REJECTED ONE_SERIES_ONLY: " in done.output
