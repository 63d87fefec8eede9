"""What operators and integrators read says what the code does: states, settings, site file, reasons, statuses.

`python -m tests.docs.test_operating` writes the tables of deploy/operating.md anew.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from service.core.job import TRANSITIONS, State
from service.core.settings import SITE_FILE_ONLY, Settings
from service.web.operations import Action, possible
from service.web.problems import explained
from tests.docs.blocks import replaced
from tests.docs.documents import ROOT, blocks, text_of

OPERATING, INTEGRATING = "deploy/operating.md", "deploy/integrating.md"


def states() -> str:
    """The transition table as a diagram."""
    arrows = [f"    {state.value} --> {to.value}" for state, after in TRANSITIONS.items() for to in after]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> QUEUED", *sorted(arrows), "```", ""])


def settings() -> str:
    """Every setting with its default."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "", (), frozenset()) else f"`{shown(field.default)}`"
        where = f"`{name}`" if name in SITE_FILE_ONLY else f"`LOWGAD_{name.upper()}`"
        rows.append(f"| {where} | {default} | {field.description} |")
    return "\n".join([*rows, ""])


def shown(default: object) -> str:
    """A default as it is written in an environment variable."""
    several = default if isinstance(default, tuple) else (default,)
    return ", ".join(str(one.value if isinstance(one, Enum) else one) for one in several)


def written(text: str) -> str:
    return replaced(replaced(text, "states", states()), "settings", settings())


def first_cells(document: str, heading: str) -> list[str]:
    """The first column of the tables below a heading."""
    section = re.split(r"^#+ ", text_of(document).split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return [cell for cell in cells if not set(cell) <= {"-"}]


def test_the_tables_of_the_operators_page_are_those_of_the_code() -> None:
    text = text_of(OPERATING)
    assert text == written(text)
    assert "QUEUED --> RUNNING" in text
    assert "LOWGAD_DATA_DIR" in text


def test_the_operators_page_explains_every_state() -> None:
    assert first_cells(OPERATING, "The states of a job")[1:] == [state.value for state in State]


def test_the_integrators_page_says_of_every_state_whether_it_has_ended() -> None:
    told = first_cells(INTEGRATING, "Follow the job")[1:]
    assert sorted(name for cell in told for name in cell.split(", ")) == sorted(state.value for state in State)


def test_the_integrators_page_says_from_which_states_a_job_can_be_sent_again_or_cancelled() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| ([A-Z_, ]+) \|", text_of(INTEGRATING), re.MULTILINE))
    for action in (Action.RESEND, Action.CANCEL):
        jobs = [SimpleNamespace(state=state) for state in State]
        states = {job.state.value for job in jobs if action in possible(job, has_deliveries=True)}
        assert {*rows[action.value].split(", ")} == states


def test_the_site_file_that_the_operators_page_shows_is_valid(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("\n".join(blocks(OPERATING, "toml")), encoding="utf-8")
    shown = Settings.load({}, tmp_path / "site.toml")
    assert [shown.destination(name) for name in shown.default_destinations] == list(shown.destinations) != []


@pytest.mark.parametrize("document", [OPERATING, INTEGRATING, "README.md", "SECURITY.md", "models/TRAINING.md"])
def test_every_setting_that_a_document_names_exists(document: str) -> None:
    known = {f"LOWGAD_{name.upper()}" for name in Settings.model_fields} | {"LOWGAD_SITE_FILE"}
    named = {*re.findall(r"\bLOWGAD_[A-Z_]*[A-Z]\b", text_of(document))}
    assert named <= known


def test_every_reason_that_the_documents_name_is_one() -> None:
    named = {*re.findall(r"`([A-Z]+_[A-Z_]+)`", text_of(OPERATING) + text_of(INTEGRATING))}
    settings = {name for name in named if name.startswith("LOWGAD_")}
    assert named - settings <= explained().keys()


def test_the_names_of_unknown_values_in_the_settings_are_those_the_worker_checks() -> None:
    from service.core import settings as module

    assert set(get_args(module.Unknown)) == {"field_strength", "agent", "dose"}


def test_the_agents_that_a_site_file_may_name_are_those_that_the_worker_knows() -> None:
    from models.agents import BY_NAME
    from service.core.dicom.site_rules import AgentName

    assert set(get_args(AgentName)) == set(BY_NAME)


if __name__ == "__main__":
    (ROOT / OPERATING).write_text(written(text_of(OPERATING)), encoding="utf-8")
