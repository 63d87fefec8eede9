"""README says what the code does: its tables are written from the code, and what it names exists.

`python -m tests.docs.test_readme` writes the tables anew.
"""

from __future__ import annotations

import re
import shlex
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest

import lowgad
from service.core.job import TRANSITIONS
from service.core.ledger import Ledger
from service.core.queue import make_celery
from service.core.settings import SITE_FILE_ONLY, Settings
from service.core.spool import Spool
from service.web.api import create_app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


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


def replaced(text: str, name: str, content: str) -> str:
    """`text` with the block called `name` written anew."""
    begin, end = rf"<!-- {name}: begin [^>]*-->\n", rf"<!-- {name}: end -->"
    return re.sub(rf"({begin}).*?({end})", lambda m: m[1] + content + m[2], text, flags=re.DOTALL)


def written(text: str) -> str:
    return replaced(replaced(text, "states", states()), "settings", settings())


def test_the_tables_of_readme_are_those_of_the_code() -> None:
    assert README.read_text(encoding="utf-8") == written(README.read_text(encoding="utf-8"))


def test_every_command_that_readme_names_exists() -> None:
    named = set(re.findall(r"`lowgad ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named == set(lowgad.main.commands)


def test_every_make_target_that_readme_names_exists() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)\b", README.read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(program: str) -> list[list[str]]:
    """The words after `program` in the shell blocks, comments and variables in front left out."""
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_every_option_of_a_command_that_readme_shows_exists() -> None:
    shown = command_lines("lowgad")
    for name, *words in shown:
        lowgad.main.commands[name].make_context(name, [*words], resilient_parsing=True)
        known = {option for parameter in lowgad.main.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    assert len(shown) >= 3


def test_every_request_that_readme_shows_is_served(tmp_path: Path) -> None:
    site = Settings(data_dir=tmp_path)
    with Ledger.open(site.ledger_url) as ledger:
        app = create_app(site, ledger, Spool(site.spool_dir), make_celery(site))
        served = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    shown = command_lines("curl")
    for words in shown:
        path = re.sub(r"/JOB\b", "/{job_id}", next(word for word in words if word.startswith("http")).split(":8080")[1])
        method = "POST" if {"-F", "POST"} & set(words) else "GET"
        assert (method, path) in served
    assert len(shown) >= 4


def test_the_site_file_that_readme_shows_is_valid(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("\n".join(blocks("toml")), encoding="utf-8")
    shown = Settings.load({}, tmp_path / "site.toml")
    assert [shown.destination(name) for name in shown.default_destinations] == list(shown.destinations) != []


@pytest.mark.parametrize("document", ["README.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_file_that_a_document_links_to_exists(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_names_of_unknown_values_in_the_settings_are_those_the_worker_checks() -> None:
    from service.core import settings as module

    assert set(get_args(module.Unknown)) == {"field_strength", "agent", "dose"}


def test_the_agents_that_a_site_file_may_name_are_those_that_the_worker_knows() -> None:
    from models.agents import BY_NAME
    from service.core.dicom.site_rules import AgentName

    assert set(get_args(AgentName)) == set(BY_NAME)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
