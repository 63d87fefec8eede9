"""The commands and requests that documents show are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import lowgad
from service.core.ledger import Ledger
from service.core.queue import make_celery
from service.core.settings import Settings
from service.core.spool import Spool
from service.web.api.app import create_app
from tests.docs.documents import DOCUMENTS, ROOT, blocks, command_lines, text_of

SHOWS_COMMANDS = [name for name in DOCUMENTS if command_lines(name, "lowgad")]
SHOWS_REQUESTS = [name for name in DOCUMENTS if command_lines(name, "curl")]


def test_readme_names_every_command_and_the_other_documents_no_other() -> None:
    named = {name: set(re.findall(r"`lowgad ([a-z]+)", text_of(name))) for name in DOCUMENTS}
    assert named["README.md"] == set(lowgad.main.commands)
    assert set.union(*named.values()) == set(lowgad.main.commands)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_a_document_names_exists(document: str) -> None:
    text = "\n".join([*re.findall(r"`([^`\n]+)`", text_of(document)), *blocks(document, "sh")])
    named = set(re.findall(r"\bmake ([a-z-]+)\b", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets
    assert document != "README.md" or {"demo", "test"} <= named


@pytest.mark.parametrize("document", SHOWS_COMMANDS)
def test_every_option_of_a_command_that_a_document_shows_exists(document: str) -> None:
    for name, *words in command_lines(document, "lowgad"):
        lowgad.main.commands[name].make_context(name, [*words], resilient_parsing=True)
        known = {option for parameter in lowgad.main.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("document", SHOWS_REQUESTS)
def test_every_request_that_a_document_shows_is_served(document: str, tmp_path: Path) -> None:
    site = Settings(data_dir=tmp_path)
    with Ledger.open(site.ledger_url) as ledger:
        app = create_app(site, ledger, Spool(site.spool_dir), make_celery(site))
        served = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    for words in command_lines(document, "curl"):
        url = next(word for word in words if word.startswith("http"))
        path = re.sub(r"/JOB\b", "/{job_id}", url.split(":8080")[1].partition("?")[0])
        method = "POST" if {"-F", "POST"} & set(words) else "GET"
        assert (method, path) in served


def test_commands_and_requests_are_shown_where_their_readers_look() -> None:
    assert {"deploy/operating.md", "models/TRAINING.md"} <= {*SHOWS_COMMANDS}
    assert "deploy/integrating.md" in SHOWS_REQUESTS
    assert len(command_lines("models/TRAINING.md", "lowgad")) >= 10
    assert len(command_lines("deploy/integrating.md", "curl")) >= 10


def test_the_problem_that_the_integrators_page_shows_is_one_that_is_answered() -> None:
    from service.core.errors import Reason
    from service.web.problems import Problem

    (shown,) = blocks("deploy/integrating.md", "json")
    problem = Problem.model_validate(json.loads(shown))
    assert problem.title == Reason[problem.reason].text
