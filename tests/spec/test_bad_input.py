"""Bad input through `lowgad run`: a named reason, its exit code, no output, and the next study unharmed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pydicom
import pytest
from click.testing import CliRunner, Result

import lowgad
from service.core.errors import Reason
from tests.factories import write_study
from tests.numeric.phantoms import head
from worker.lab.phantom_study import write_phantom_study

REFUSED = {
    "pre_only": Reason.ONE_SERIES_ONLY,
    "not_mr": Reason.NOT_MR,
    "two_patients": Reason.TWO_PATIENTS,
    "two_studies": Reason.TWO_STUDIES,
    "gap_in_pre": Reason.MISSING_SLICES,
    "gap_in_low": Reason.MISSING_SLICES,
    "short_low": Reason.MISSING_SLICES,
    "duplicated_position": Reason.IRREGULAR_GEOMETRY,
    "mixed_orientation": Reason.IRREGULAR_GEOMETRY,
    "short_pixels": Reason.UNREADABLE_FILE,
    "cut_file": Reason.UNREADABLE_FILE,
    "not_dicom": Reason.UNREADABLE_FILE,
    "empty_file": Reason.UNREADABLE_FILE,
    "absurd_size": Reason.UNSUPPORTED_OBJECT,
    "standard_dose": Reason.STANDARD_DOSE,
}
PATIENT_DATA = ("Phantom^", "PHANTOM", "SYNTH0", "Else^", "SOMEBODY")  # in the headers of the studies below
UNKNOWN = {
    "field_strength": ({"field_strength_t": None}, Reason.UNKNOWN_FIELD_STRENGTH),
    "agent": ({"agent": "CE"}, Reason.UNKNOWN_AGENT),
    "dose": ({"volume_ml": None}, Reason.UNKNOWN_DOSE),
}


@pytest.fixture(scope="module")
def good_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_phantom_study(head(stripped=True), 3, folder)
    return folder


def run(study: Path, out: Path, *options: str, **variables: str) -> Result:
    arguments = ["run", str(study), "--out", str(out), "--engine", "linear", *options]
    return CliRunner().invoke(lowgad.main, arguments, env=variables, catch_exceptions=False)


def changed(study: Path, copy: Path, series: str, **elements: str | None) -> Path:
    """A copy of the study with other elements in the headers of one series; None removes an element."""
    shutil.copytree(study, copy)
    for path in (copy / series).glob("*.dcm"):
        instance = pydicom.dcmread(path)
        for keyword, value in elements.items():
            delattr(instance, keyword) if value is None else setattr(instance, keyword, value)
        instance.save_as(path)
    return copy


def assert_refused(done: Result, out: Path, reason: Reason) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == reason.outcome.value, done.output
    assert len(lines) == 1
    assert reason.name in lines[0]
    report = json.loads((out / "report.json").read_text())
    assert (report["outcome"], report["reason"]) == (reason.outcome.name, reason.name)
    said = lines[0] + (out / "report.json").read_text()
    assert [name for name in PATIENT_DATA if name in said] == []
    assert sorted(path.name for path in out.iterdir()) == ["report.json"]


@pytest.mark.parametrize(("odd", "reason"), REFUSED.items(), ids=REFUSED)
def test_a_study_that_cannot_be_processed_is_rejected_by_name(tmp_path: Path, odd: str, reason: Reason) -> None:
    write_study(tmp_path / "study", odd=[odd])
    done = run(tmp_path / "study", tmp_path / "out")
    assert_refused(done, tmp_path / "out", reason)
    assert done.exit_code == 4


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_an_unknown_value_needs_review_unless_the_site_allows_it(tmp_path: Path, unknown: str) -> None:
    options, reason = UNKNOWN[unknown]
    write_study(tmp_path / "study", **options)
    refused = run(tmp_path / "study", tmp_path / "out")
    assert_refused(refused, tmp_path / "out", reason)
    assert refused.exit_code == 3
    # Allowed, the study goes on to where a volume of a few voxels ends: no brain is found in it.
    allowed = run(tmp_path / "study", tmp_path / "out", LOWGAD_ALLOW_UNKNOWN=f"{unknown},dose")
    assert_refused(allowed, tmp_path / "out", Reason.REGISTRATION_FAILED)


def test_a_folder_without_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "notes.txt").write_text("nothing to see")
    assert_refused(run(tmp_path / "study", tmp_path / "out"), tmp_path / "out", Reason.EMPTY_UPLOAD)


def test_after_a_refusal_a_good_study_works_its_output_is_no_input_and_no_stale_result_is_left(
    tmp_path: Path, good_study: Path
) -> None:
    out = tmp_path / "out"
    write_study(tmp_path / "bad", odd=["pre_only"])
    assert run(tmp_path / "bad", out).exit_code == 4
    assert run(good_study, out).exit_code == 0
    assert len(list((out / "sd").glob("*.dcm"))) == len(list((out / "sd_plus").glob("*.dcm"))) == 96
    shutil.copytree(out / "sd", tmp_path / "sent_back" / "sd")
    assert_refused(run(tmp_path / "sent_back", out), out, Reason.OWN_OUTPUT)
    # Beside its sources it is set aside, and the result is the same again.
    shutil.copytree(good_study, tmp_path / "sent_back" / "sources")
    assert run(tmp_path / "sent_back", out).exit_code == 0
    series = json.loads((out / "report.json").read_text())["series"]
    assert any(line.startswith("96 x synthetic image") for line in series["set_aside"])
    assert [line.split(",")[0] for line in series["witnesses"][-1:]] == ["images: series 2 is pre-contrast"]
    first, again = (pydicom.dcmread(folder / "0001.dcm") for folder in (tmp_path / "sent_back" / "sd", out / "sd"))
    assert (first.SOPInstanceUID, first.SeriesNumber) == (again.SOPInstanceUID, again.SeriesNumber)


def test_series_that_a_caller_named_the_wrong_way_round_need_review(tmp_path: Path, good_study: Path) -> None:
    pre, low = (str(pydicom.dcmread(good_study / name / "0001.dcm").SeriesInstanceUID) for name in ("pre", "low"))
    headers = {"ContrastBolusAgent": "Gadovist", "ContrastBolusVolume": "2.5"}
    study = changed(good_study, tmp_path / "study", "pre", **headers)
    done = run(study, tmp_path / "out", "--pre-series", low, "--low-series", pre)
    assert_refused(done, tmp_path / "out", Reason.SERIES_SWAPPED)
    detail = json.loads((tmp_path / "out" / "report.json").read_text())["detail"]
    assert "both series were named; contrast attributes: silent; " in detail


def test_a_field_strength_far_outside_the_training_needs_review(tmp_path: Path, good_study: Path) -> None:
    study = changed(good_study, tmp_path / "study", "low", MagneticFieldStrength="7")
    study = changed(study, tmp_path / "both", "pre", MagneticFieldStrength="7")
    assert_refused(run(study, tmp_path / "out"), tmp_path / "out", Reason.OUTSIDE_TRAINING)


def test_a_phantom_with_an_unknown_dose_is_processed_by_the_network_where_the_site_allows_it(
    tmp_path: Path, good_study: Path
) -> None:
    study = changed(good_study, tmp_path / "study", "low", ContrastBolusVolume=None)
    arguments = ["run", str(study), "--out", str(tmp_path / "out"), "--engine", "network"]
    allowed = {"LOWGAD_ALLOW_UNKNOWN": "dose"}
    done = CliRunner().invoke(lowgad.main, arguments, env=allowed, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["acquisition"]["dose_mmol_per_kg"]["value"] is None
    assert report["acquisition"]["dose_mmol_per_kg"]["source"].startswith("unknown")
    # The linear engine cannot: it divides by the dose.
    assert_refused(run(study, tmp_path / "out", **allowed), tmp_path / "out", Reason.UNKNOWN_DOSE)
