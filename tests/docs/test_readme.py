"""README says what the code does: its tables are written from the code, and what it names exists.

`python -m tests.docs.test_readme` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import lowgad
from service.core.job import TRANSITIONS
from service.core.settings import Settings

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
        default = "" if field.default in (None, "", (), frozenset()) else f"`{field.default}`"
        in_file_only = name == "destinations"
        shown = f"`{name}`" if in_file_only else f"`LOWGAD_{name.upper()}`"
        rows.append(f"| {shown} | {default} | {field.description} |")
    return "\n".join([*rows, ""])


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


@pytest.mark.parametrize("document", ["README.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_file_that_a_document_links_to_exists(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_names_of_unknown_values_in_the_settings_are_those_the_worker_checks() -> None:
    from service.core import settings as module

    assert set(get_args(module.Unknown)) == {"field_strength", "agent", "dose"}


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
