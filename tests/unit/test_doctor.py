from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from click.testing import CliRunner

from lowgad import main
from service.core.dicom.commitment import Reference, Request
from service.core.ledger import Ledger
from service.core.settings import CommitmentRequestor, Destination, Settings
from service.doctor import checks
from service.probes import examine
from tests.conftest import Clock
from tests.peers import MR_IMAGE_STORAGE, free_port, running_scp

VERIFICATION = "1.2.840.10008.1.1"


def findings(settings: Settings) -> dict[str, tuple[bool, str]]:
    return {finding.name: (finding.ok, finding.detail) for finding in examine(checks(settings))}


def test_on_a_fresh_machine_all_that_lowgad_needs_is_there(tmp_path: Path) -> None:
    found = findings(Settings(data_dir=tmp_path))
    assert list(found) == ["database", "spool", "broker"]
    assert all(ok for ok, _ in found.values())


def test_a_disk_below_the_watermark_is_a_finding(tmp_path: Path) -> None:
    ok, detail = findings(Settings(data_dir=tmp_path, disk_low_bytes=1 << 60))["spool"]
    assert not ok
    assert "refused until space is freed" in detail


def test_a_database_and_a_broker_that_are_away_are_findings_without_secrets(tmp_path: Path) -> None:
    port = free_port()
    found = findings(
        Settings(
            data_dir=tmp_path,
            database_url=f"postgresql://lowgad:hunter2@127.0.0.1:{port}/lowgad",
            broker_url=f"redis://:hunter2@127.0.0.1:{port}/0",
        )
    )
    assert (found["database"][0], found["broker"][0]) == (False, False)
    assert "hunter2" not in str(found)


def test_reports_of_storage_commitment_that_nobody_sends_are_a_finding(tmp_path: Path, clock: Clock) -> None:
    modality = CommitmentRequestor(ae_title="MODALITY", host="127.0.0.1", port=104)
    settings = Settings(data_dir=tmp_path, commitment_requestors=(modality,))
    assert findings(settings)["commitment reports"] == (True, "none is overdue")
    clock.now = datetime.now(UTC) - timedelta(hours=1)
    with Ledger.open(settings.ledger_url, clock) as ledger:
        ledger.requests.add("MODALITY", Request("2.25.1", (Reference(MR_IMAGE_STORAGE, "1.2.3"),)))
    ok, detail = findings(settings)["commitment reports"]
    assert not ok
    assert "1 are overdue" in detail


def test_a_destination_is_asked_by_echo(tmp_path: Path) -> None:
    with running_scp(sop_classes=[VERIFICATION]) as archive:
        there = Destination(name="archive", host="127.0.0.1", port=archive.port, ae_title="ARCHIVE")
        away = Destination(name="away", host="127.0.0.1", port=free_port(), ae_title="AWAY")
        found = findings(Settings(data_dir=tmp_path, destinations=(there, away)))
    assert found["destination archive"] == (True, "answers C-ECHO")
    assert found["destination away"][0] is False


def test_a_destination_that_would_be_asked_for_storage_commitment_in_vain_is_a_finding(tmp_path: Path) -> None:
    with running_scp(sop_classes=[VERIFICATION]) as archive:
        asked = Destination(
            name="asked", host="127.0.0.1", port=archive.port, ae_title="ARCHIVE", storage_commitment=True
        )
        ok, detail = findings(Settings(data_dir=tmp_path, destinations=(asked,)))["destination asked"]
    assert not ok
    assert "does not know storage commitment" in detail


def test_a_destination_that_does_not_know_us_is_a_finding(tmp_path: Path) -> None:
    with running_scp(sop_classes=[VERIFICATION], called_ae_required=True) as archive:
        wrong = Destination(name="wrong", host="127.0.0.1", port=archive.port, ae_title="OTHER")
        ok, detail = findings(Settings(data_dir=tmp_path, destinations=(wrong,)))["destination wrong"]
    assert not ok
    assert "refuses our AE titles" in detail


def test_the_command_prints_one_line_for_each_check_and_fails_with_any(tmp_path: Path) -> None:
    environ = {"LOWGAD_DATA_DIR": str(tmp_path), "LOWGAD_MODEL_DIR": str(tmp_path / "no model")}
    result = CliRunner().invoke(main, ["doctor"], env=environ)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["ok", "settings:"], ["ok", "database:"]]
    assert lines[-1].startswith("FAIL  model: ")
