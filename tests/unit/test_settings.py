from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.condition import HEADROOM
from service.core.job import Kind
from service.core.settings import Destination, Settings, SettingsError

ROOT = Path(__file__).resolve().parents[2]

SITE = """
default_destinations = ["pacs"]

[[destinations]]
name = "pacs"
host = "pacs.example"
port = 104
ae_title = "ARCHIVE"
"""


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    return path


def test_without_any_setting_everything_stays_on_this_machine() -> None:
    settings = Settings.load({})
    assert settings.listen_host == settings.api_host == "127.0.0.1"
    assert settings.ledger_url.startswith("sqlite:////")
    assert settings.destinations == ()


def test_the_environment_wins_over_the_site_file(site_file: Path) -> None:
    site_file.write_text(f"listen_port = 1\napi_port = 2\n{SITE}")
    settings = Settings.load({"LOWGAD_SITE_FILE": str(site_file), "LOWGAD_LISTEN_PORT": "3"})
    assert (settings.listen_port, settings.api_port) == (3, 2)


def test_destinations_come_from_the_site_file(site_file: Path) -> None:
    settings = Settings.load({}, site_file)
    destination = settings.destination("pacs")
    assert destination is not None
    assert (destination.host, destination.port, destination.calling_ae_title) == ("pacs.example", 104, "LOWGAD")
    assert settings.destination("elsewhere") is None


def test_an_unknown_name_stops_the_start_up_and_names_the_near_miss() -> None:
    with pytest.raises(SettingsError, match=r"LOWGAD_LISTEN_PROT; did you mean LOWGAD_LISTEN_PORT\?"):
        Settings.load({"LOWGAD_LISTEN_PROT": "104"})


def test_an_unknown_name_in_the_site_file_stops_the_start_up(site_file: Path) -> None:
    site_file.write_text("ae_titel = 'X'\n")
    with pytest.raises(SettingsError, match=r"ae_titel; did you mean ae_title\?"):
        Settings.load({}, site_file)


def test_a_setting_that_was_replaced_names_its_successor(site_file: Path) -> None:
    with pytest.raises(SettingsError, match=r"ATTEMPTS; LOWGAD_COMMITMENT_LIMIT_SECONDS has taken its place"):
        Settings.load({"LOWGAD_COMMITMENT_MAX_ATTEMPTS": "24"})
    site_file.write_text("commitment_max_attempts = 24\n")
    with pytest.raises(SettingsError, match=r"line 1: .*_attempts; commitment_limit_seconds has taken its place"):
        Settings.load({}, site_file)


def test_other_programs_variables_are_left_alone() -> None:
    assert Settings.load({"PATH": "/bin", "LOWGADX": "1"}) == Settings.load({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LISTEN_PORT", "70000"),
        ("AE_TITLE", "MORE THAN SIXTEEN CHARACTERS"),
        ("AE_TITLE", "BACK\\SLASH"),
        ("ENGINE", "magic"),
        ("ALLOW_UNKNOWN", "dose,patient"),
        ("DEFAULT_DESTINATIONS", "nowhere"),
        ("MAX_ATTEMPTS", "0"),
    ],
)
def test_an_impossible_value_stops_the_start_up_without_being_shown(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({f"LOWGAD_{name}": value})
    assert name.lower() in str(caught.value)
    assert value not in str(caught.value) or name == "DEFAULT_DESTINATIONS"


def test_a_secret_can_come_from_a_file_and_never_shows_in_an_error(tmp_path: Path) -> None:
    secret = tmp_path / "database"
    secret.write_text("postgresql://lowgad:hunter2@db/lowgad\n")
    settings = Settings.load({"LOWGAD_DATABASE_URL_FILE": str(secret)})
    assert settings.ledger_url == "postgresql+psycopg://lowgad:hunter2@db/lowgad"
    with pytest.raises(SettingsError) as caught:
        Settings.load({"LOWGAD_DATABASE_URL_FILE": str(tmp_path / "absent")})
    assert "LOWGAD_DATABASE_URL_FILE" in str(caught.value)


def test_lists_are_written_with_commas() -> None:
    settings = Settings.load({"LOWGAD_ALLOWED_CALLING_AES": "MR1, MR2,", "LOWGAD_ALLOW_UNKNOWN": "dose, agent"})
    assert settings.allowed_calling_aes == ("MR1", "MR2")
    assert settings.allow_unknown == {"dose", "agent"}


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_only_the_settings_and_the_command_line_touch_the_environment() -> None:
    sources = [*ROOT.glob("service/**/*.py"), *ROOT.glob("worker/**/*.py"), *ROOT.glob("models/*.py")]
    readers = [
        path.relative_to(ROOT)
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert readers == []


def test_who_reports_storage_commitment_must_be_admitted_by_the_listener() -> None:
    pacs = {"name": "pacs", "host": "h", "port": 104, "ae_title": "PACS", "storage_commitment": True}
    with pytest.raises(ValueError, match="needs these in allowed_calling_aes, too: PACS"):
        Settings(destinations=(pacs,), allowed_calling_aes=("MODALITY",))
    Settings(destinations=(pacs,), allowed_calling_aes=("MODALITY", "PACS"))
    Settings(destinations=(pacs | {"commitment_ae_title": "MODALITY"},), allowed_calling_aes=("MODALITY",))


def test_kinds_of_result_come_from_the_environment_and_a_destination_may_take_fewer(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('[[destinations]]\nname = "pacs"\nhost = "pacs"\nport = 104\nae_title = "PACS"\nresults = ["sd"]\n')
    settings = Settings.load({"LOWGAD_RESULTS": "sd, structured_report"}, site)
    assert settings.results == (Kind.SD, Kind.STRUCTURED_REPORT)
    assert [settings.destinations[0].takes(kind.value) for kind in settings.results] == [True, False]
    assert Settings().results == (Kind.SD, Kind.SD_PLUS)
    assert (Settings().watermark, Settings.load({"LOWGAD_WATERMARK": "false"}).watermark) == (True, False)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LOWGAD_RESULTS": "sd, mip"}, "results"),
        ({"LOWGAD_RESULTS": "presentation_state"}, "needs a series of images"),
        ({"LOWGAD_RESULTS": ""}, "results"),
        ({"LOWGAD_DOSE_FACTOR": "1.6"}, "dose_factor"),
    ],
)
def test_results_that_cannot_be_made_stop_the_start_up(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Settings.load(environ)


def test_a_destination_cannot_want_results_that_are_not_made() -> None:
    pacs = Destination(name="pacs", host="pacs", port=104, ae_title="PACS", results=(Kind.SEGMENTATION,))
    with pytest.raises(ValidationError, match="segmentation"):
        Settings(destinations=(pacs,))


def test_the_dose_factor_goes_as_far_as_the_bound() -> None:
    assert HEADROOM == 1.5
    with pytest.raises(ValidationError):
        Settings(dose_factor=HEADROOM + 0.01)
    Settings(dose_factor=HEADROOM)
